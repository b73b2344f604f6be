"""Operations and peers: the one table that tests, benchmarks and comparison read.

To add a peer, write one function per operation it has (like `numpy_training` below; import the library inside,
it is optional) and enter them in `PEERS`. Everything else, tables and plots included, follows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, util

import numpy as np
from inputs import DTYPE, EPS, MOMENTUM, Array, Inputs

import nbbn

#: One call, everything allocated before: returns the operation's results, in the order of `Operation.results`.
Call = Callable[[], tuple[Array, ...]]


# --- operations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """What is timed, what must come out, and the least traffic it can do: arrays of x's size read and written."""

    name: str
    results: tuple[str, ...]
    reads: int
    writes: int
    #: Whether results contain sums over a whole channel, whose rounding errors grow with its length.
    sums: bool = True

    def large_inputs(self, given: Inputs) -> tuple[Array, ...]:
        return (given.x, given.grad_out)[: self.reads]

    def least_bytes(self, given: Inputs) -> int:
        return (self.reads + self.writes) * given.x.nbytes

    def tolerance(self, given: Inputs) -> float:
        """Largest difference between two right answers, relative to the largest magnitude in the result.

        A handful of float32 operations, each off by at most u = eps / 2, give less than 8 u. A float32 sum of n
        terms, added one after another as NumPy does along a strided axis, is off by about sqrt(n) u (Higham & Mary
        2019, theorem 2.4: at most lambda sqrt(n) u with a probability that lambda = 8 makes practically 1).
        """
        terms = given.count if self.sums else 1
        return 8 * terms**0.5 * float(np.finfo(DTYPE).eps) / 2


OPERATIONS = (
    Operation("statistics", ("mean", "var"), reads=1, writes=0),
    Operation("training", ("y", "running_mean", "running_var"), reads=1, writes=1),
    Operation("evaluation", ("y",), reads=1, writes=1, sums=False),
    Operation("backward", ("grad_x", "grad_weight", "grad_bias"), reads=2, writes=1),
)


# --- nbbn -------------------------------------------------------------------------------------------------------


def nbbn_statistics(given: Inputs) -> Call:
    def call():
        stats = nbbn.batch_stats(given.x, axis=given.axis)
        return stats.mean, stats.var()

    return call


def nbbn_training(given: Inputs) -> Call:
    out, mean, var = np.empty_like(given.x), given.running_mean.copy(), given.running_var.copy()

    def call():
        nbbn.batch_norm(
            given.x, mean, var, given.weight, given.bias, True, MOMENTUM, EPS, axis=given.axis, out=out
        )  # fmt: skip
        return out, mean, var

    return call


def nbbn_evaluation(given: Inputs) -> Call:
    out, mean, var = np.empty_like(given.x), given.running_mean, given.running_var

    def call():
        nbbn.batch_norm(given.x, mean, var, given.weight, given.bias, eps=EPS, axis=given.axis, out=out)
        return (out,)

    return call


def nbbn_backward(given: Inputs) -> Call:
    out, grad_out, mean, var = np.empty_like(given.x), given.grad_out, given.batch_mean, given.batch_var

    def call():
        return nbbn.batch_norm_backward(
            grad_out, given.x, mean, var, given.weight, eps=EPS, axis=given.axis, out=out
        )  # fmt: skip

    return call


# --- NumPy: the formulas of the textbook, in the dtype of x. Its last step writes to memory allocated before, as
# --- nbbn does; the temporaries before that are the formula's own.


def numpy_statistics(given: Inputs) -> Call:
    def call():
        return given.x.mean(given.axes), given.x.var(given.axes)

    return call


def numpy_training(given: Inputs) -> Call:
    x, axes, out = given.x, given.axes, np.empty_like(given.x)
    running_mean, running_var = (given.broadcast(a.copy()) for a in (given.running_mean, given.running_var))
    weight, bias = given.broadcast(given.weight), given.broadcast(given.bias)
    unbiased = given.count / (given.count - 1)

    def call():
        mean = x.mean(axes, keepdims=True)
        var = x.var(axes, keepdims=True)
        np.add((x - mean) / np.sqrt(var + EPS) * weight, bias, out=out)
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * unbiased
        return out, running_mean, running_var

    return call


def numpy_evaluation(given: Inputs) -> Call:
    x, out = given.x, np.empty_like(given.x)
    mean, var = given.broadcast(given.running_mean), given.broadcast(given.running_var)
    weight, bias = given.broadcast(given.weight), given.broadcast(given.bias)

    def call():
        np.add((x - mean) / np.sqrt(var + EPS) * weight, bias, out=out)
        return (out,)

    return call


def numpy_backward(given: Inputs) -> Call:
    x, grad_out, axes, count, out = given.x, given.grad_out, given.axes, given.count, np.empty_like(given.x)
    mean, var = given.broadcast(given.batch_mean), given.broadcast(given.batch_var)
    weight = given.broadcast(given.weight)

    def call():
        std = np.sqrt(var + EPS)
        x_hat = (x - mean) / std
        grad_bias = grad_out.sum(axes, keepdims=True)
        grad_weight = (grad_out * x_hat).sum(axes, keepdims=True)
        np.multiply(weight / std, grad_out - grad_bias / count - x_hat * (grad_weight / count), out=out)
        return out, grad_weight, grad_bias

    return call


# --- the table of peers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A library: its name for people, and what builds its call for each operation it has."""

    label: str
    calls: Mapping[str, Callable[[Inputs], Call]]


#: By the name that Python imports. The first is the one all others are compared with.
PEERS = {
    "nbbn": Peer(
        "nbbn",
        {
            "statistics": nbbn_statistics,
            "training": nbbn_training,
            "evaluation": nbbn_evaluation,
            "backward": nbbn_backward,
        },
    ),
    "numpy": Peer(
        "NumPy",
        {
            "statistics": numpy_statistics,
            "training": numpy_training,
            "evaluation": numpy_evaluation,
            "backward": numpy_backward,
        },
    ),
}


def peers_of(operation: Operation, peers: Mapping[str, Peer] = PEERS) -> list[str]:
    """The peers that are installed and have this operation."""
    return [name for name, peer in peers.items() if operation.name in peer.calls and util.find_spec(name)]


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PEERS if util.find_spec(name)}


def prepare(operation: Operation, given: Inputs, peers: Mapping[str, Peer] = PEERS) -> dict[str, Call]:
    """A call per peer, each run once and found to agree with nbbn: the only way to get something to time.

    Raises `AssertionError` that names the peer and the result which differ.
    """
    calls = {name: peers[name].calls[operation.name](given) for name in peers_of(operation, peers)}
    answers = {name: call() for name, call in calls.items()}
    expected = answers.pop("nbbn")
    for name, answer in answers.items():
        for result, ours, theirs in zip(operation.results, expected, answer, strict=True):
            ours, theirs = np.ravel(ours), np.ravel(theirs)
            allowed = operation.tolerance(given) * float(np.abs(ours).max())
            error = float(np.abs(ours - theirs).max())
            if not error <= allowed:  # a NaN fails too
                raise AssertionError(
                    f"{operation.name} of {given.shape}: {result} of {name} differs from nbbn's by {error:.3g}, "
                    f"more than the {allowed:.3g} that rounding explains"
                )
    return calls
