"""What this machine's memory allows: kernels with the traffic of an operation and no work to speak of.

`read` sums its array; `stream` reads one array or two and writes one. A better kernel (with non-temporal stores,
say) goes in by replacing `_copy` or `_add`: a dictionary with a "serial" and a "parallel" function.
"""

from collections.abc import Callable, Sequence

import numpy as np
from inputs import Array, Inputs
from numba import njit, prange
from operations import Operation

import nbbn

#: Values a task: 256 kB of float32, half of a common second-level cache.
CHUNK = 65536


def ceiling_name(operation: Operation) -> str:
    return "stream" if operation.writes else "read"


def ceiling(operation: Operation, given: Inputs) -> Callable[[], object]:
    """A call that moves the bytes of `operation` and does nothing with them."""
    sources = [array.reshape(-1) for array in operation.large_inputs(given)]
    if not operation.writes:
        return lambda: read(sources[0])
    out = np.empty_like(sources[0])
    return lambda: stream(sources, out)


def read(x: Array) -> np.float32:
    """Sum of a contiguous 1-d array."""
    return _read[_variant(x)](x)


def stream(sources: Sequence[Array], out: Array) -> None:
    """Copy of one contiguous 1-d array, or sum of two."""
    (_copy if len(sources) == 1 else _add)[_variant(out)](*sources, out)


def _variant(x: Array) -> str:
    """One chunk needs no second thread; starting one would take longer than the work."""
    return "serial" if x.size <= CHUNK or nbbn.get_num_threads() == 1 else "parallel"


def _compiled(function) -> dict[str, Callable]:
    # fastmath lets the sum use full vectors; nothing here depends on its rounding. No cache=True: Numba's key does
    # not hold the options, so that the serial variant would be loaded where the parallel one is meant
    return {name: njit(parallel=name == "parallel", fastmath=True)(function) for name in ("serial", "parallel")}


def _read_chunks(x):
    totals = np.empty(-(-x.size // CHUNK), x.dtype)
    for k in prange(totals.size):
        chunk = x[k * CHUNK : (k + 1) * CHUNK]
        total = x.dtype.type(0)
        for i in range(chunk.size):  # `for value in chunk` does not vectorise: 4 GB/s instead of 40 in cache
            total += chunk[i]
        totals[k] = total
    return totals.sum()


def _copy_chunks(x, out):
    for k in prange(-(-x.size // CHUNK)):
        source, target = x[k * CHUNK : (k + 1) * CHUNK], out[k * CHUNK : (k + 1) * CHUNK]
        for i in range(target.size):
            target[i] = source[i]


def _add_chunks(x, y, out):
    for k in prange(-(-x.size // CHUNK)):
        first, second = x[k * CHUNK : (k + 1) * CHUNK], y[k * CHUNK : (k + 1) * CHUNK]
        target = out[k * CHUNK : (k + 1) * CHUNK]
        for i in range(target.size):
            target[i] = first[i] + second[i]


_read = _compiled(_read_chunks)
_copy = _compiled(_copy_chunks)
_add = _compiled(_add_chunks)
