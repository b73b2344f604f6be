"""nbbn's public functions, with `out=` and without."""

from dataclasses import replace

import numpy as np
from cases import Case
from inputs import EPS, MOMENTUM, Inputs

import nbbn
from peers.table import Call, Peer


def statistics(given: Inputs) -> Call:
    def call():
        stats = nbbn.batch_stats(given.x, axis=given.axis)
        return stats.mean, stats.var()

    return call


def training(given: Inputs, fresh: bool = False) -> Call:
    out = None if fresh else given.empty_result()
    mean, var = given.running_mean.copy(), given.running_var.copy()

    def call():
        y = nbbn.batch_norm(
            given.x, mean, var, given.weight, given.bias, True, MOMENTUM, EPS, axis=given.axis, out=out
        )  # fmt: skip
        return y, mean, var

    return call


def evaluation(given: Inputs, fresh: bool = False) -> Call:
    out = None if fresh else given.empty_result()
    mean, var = given.running_mean, given.running_var

    def call():
        return (nbbn.batch_norm(given.x, mean, var, given.weight, given.bias, eps=EPS, axis=given.axis, out=out),)

    return call


def backward(given: Inputs, fresh: bool = False) -> Call:
    out = None if fresh else given.empty_result()
    grad_out, mean, var = given.grad_out, given.batch_mean, given.batch_var

    def call():
        return nbbn.batch_norm_backward(
            grad_out, given.x, mean, var, given.weight, eps=EPS, axis=given.axis, out=out
        )  # fmt: skip

    return call


def _fresh(build):
    return lambda given: build(given, fresh=True)


def _in_float32(build):
    """The same values in float32, for half precision: how many more elements a second do half the bytes give?"""

    def build_float32(given: Inputs) -> Call | None:
        if given.dtype.itemsize != 2:
            return None
        same = Inputs(Case(given.case.dims, given.case.axis))
        same.x = given.x.astype(np.float32)
        return build(same)

    return build_float32


_WITH_OUT = {"training": training, "evaluation": evaluation, "backward": backward}

WITH_OUT = Peer("nbbn", "nbbn", "nbbn", {"statistics": statistics} | _WITH_OUT)
NEW_RESULT = replace(
    WITH_OUT, label="nbbn, new result", calls={name: _fresh(build) for name, build in _WITH_OUT.items()}
)
FLOAT32 = replace(
    WITH_OUT, label="nbbn in float32", calls={name: _in_float32(build) for name, build in WITH_OUT.calls.items()}
)
