"""Operations: what is timed, what must come out, and the check that comes before any timing."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from cases import Case
from inputs import Array, Inputs
from peers import PEERS, Call, Peer


@dataclass(frozen=True)
class Operation:
    """What is timed, what must come out, and the least traffic it can do: arrays of x's size read and written."""

    name: str
    results: tuple[str, ...]
    reads: int
    writes: int
    dtypes: tuple[str, ...] = ("float32", "float64")
    #: Whether results contain sums over a whole channel, whose rounding errors grow with its length.
    sums: bool = True
    #: Fewest values per channel that it is defined for.
    least_count: int = 2

    def takes(self, case: Case) -> bool:
        return case.dtype in self.dtypes and np.prod(case.dims) // case.channels >= self.least_count

    def large_inputs(self, given: Inputs) -> tuple[Array, ...]:
        return (given.x, given.grad_out)[: self.reads]

    def least_bytes(self, given: Inputs) -> int:
        return given.x.size * (self.reads * given.dtype.itemsize + self.writes * given.result_dtype.itemsize)

    def tolerance(self, given: Inputs, dtype: np.dtype) -> float:
        """Largest difference between two right answers of that dtype, relative to the largest magnitude in them.

        A handful of float32 operations, each off by at most u = eps / 2, give less than 8 u. A float32 sum of n
        terms, added one after another as NumPy does along a strided axis, is off by about sqrt(n) u (Higham & Mary
        2019, theorem 2.4: at most lambda sqrt(n) u with a probability that lambda = 8 makes practically 1). Results
        in half precision are computed in float32 and rounded in the end, by each of the two: eps together.
        """
        terms = given.count if self.sums else 1
        return 8 * terms**0.5 * _eps(np.dtype(np.float32)) / 2 + (_eps(dtype) if dtype.itemsize == 2 else 0)


_FLOATS = ("float32", "float64", "float16", "bfloat16")

OPERATIONS = (
    Operation("statistics", ("mean", "var"), 1, 0, (*_FLOATS, "uint8"), least_count=1),
    Operation("training", ("y", "running_mean", "running_var"), 1, 1, _FLOATS),
    Operation("evaluation", ("y",), 1, 1, (*_FLOATS, "uint8"), sums=False, least_count=1),
    Operation("backward", ("grad_x", "grad_weight", "grad_bias"), 2, 1),
)


class UnsupportedError(Exception):
    """This version of nbbn does not do that operation on that dtype."""


def build(operation: Operation, given: Inputs, peers: Mapping[str, Peer] = PEERS) -> dict[str, Call]:
    """A call of everyone who is installed, has the operation and serves the case."""
    built = {n: p.calls[operation.name](given) for n, p in peers.items() if operation.name in p.calls and p.installed}
    return {name: call for name, call in built.items() if call is not None}


def prepare(operation: Operation, given: Inputs, peers: Mapping[str, Peer] = PEERS) -> dict[str, Call]:
    """A call per peer, each run once and found to agree with nbbn: the only way to get something to time.

    Raises `AssertionError` that names the peer and the result which differ, `UnsupportedError` if nbbn refuses.
    """
    calls = build(operation, given, peers)
    try:
        expected = calls["nbbn"]()
    except TypeError as error:
        raise UnsupportedError(f"{operation.name} of {given.case}: {error}") from error
    expected = [np.array(array) for array in expected]  # the next call overwrites some
    for name, call in calls.items():
        if name == "nbbn":
            continue  # a second training call would move its running statistics on
        answer = peers[name].read(call(), given)
        for result, ours, theirs in zip(operation.results, expected, answer, strict=True):
            _check(operation, given, f"{result} of {name}", ours, theirs)
    return calls


def _check(operation: Operation, given: Inputs, name: str, ours: Array, theirs: Array) -> None:
    tolerance = max(operation.tolerance(given, array.dtype) for array in (ours, theirs))
    ours, theirs = (np.ravel(array).astype(np.float32, copy=False) for array in (ours, theirs))
    allowed = tolerance * float(np.abs(ours).max())
    error = float(np.abs(ours - theirs).max())
    if not error <= allowed:  # a NaN fails too
        raise AssertionError(
            f"{operation.name} of {given.case}: {name} differs from nbbn's by {error:.3g}, "
            f"more than the {allowed:.3g} that rounding explains"
        )


def _eps(dtype: np.dtype) -> float:
    if dtype.name == "bfloat16":  # np.finfo does not know it
        return 2.0**-7
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


@contextmanager
def settings(peers: Mapping[str, Peer] = PEERS) -> Iterator[None]:
    """Threads and modes of all installed peers, set for the time of the measurement."""
    with ExitStack() as stack:
        for setting in {peer.setting for peer in peers.values() if peer.setting and peer.installed}:
            stack.enter_context(setting())
        yield


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
