"""What this machine's memory allows: kernels with the traffic of an operation and no work to speak of.

`read` sums its array. `copy` reads one array or two and writes one, with ordinary stores; `stream` does so with
non-temporal stores, which win where the result is larger than the last-level cache and lose where it is not. Of the
two the faster one, case by case, is the ceiling of what writes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from inputs import Array, Inputs
from numba import njit, prange
from operations import Operation
from streaming import WIDTH, fence, stream_one, stream_two

import nbbn

#: Values a task: 256 kB of float32, half of a common second-level cache.
CHUNK = 65536

#: Values below which handing work to a second thread takes longer than it saves, as in nbbn's own kernels.
PARALLEL_FROM = 262_144

#: Bytes of a cache line; chunks are a multiple of it.
LINE = 64

#: Numba would make a second parallel region of `totals.sum()`: 3 MB read at 4 GB/s instead of 40.
_PRANGE_ONLY = {"prange": True} | dict.fromkeys(
    ("reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion", "comprehension"), False
)


def ceilings(operation: Operation, given: Inputs) -> dict[str, Callable[[], object]]:
    """Calls that move the bytes of `operation` and do nothing with them."""
    sources = [array.reshape(-1) for array in operation.large_inputs(given)]
    if not operation.writes:
        return {"read": read(sources[0])}
    out = _aligned(given.x.size, given.result_dtype)
    if given.dtype.itemsize == 2:  # the same bytes, as numbers that every processor can copy
        sources, out = [_as_float32(array) for array in sources], _as_float32(out)
    return {"stream": stream(sources, out), "copy": copy(sources, out)}


def read(x: Array) -> Callable[[], int]:
    """Sum of the bytes of a contiguous 1-d array, eight at a time; of less than eight left over, nothing."""
    words = x.view(np.uint8)[: x.nbytes // 8 * 8].view(np.int64)
    kernel = _read[_variant(x.size)]
    return lambda: kernel(words)


def copy(sources: Sequence[Array], out: Array) -> Callable[[], None]:
    """Copy of one contiguous 1-d array, or sum of two."""
    kernel = (_copy if len(sources) == 1 else _add)[_variant(out.size)]
    return lambda: kernel(*sources, out)


def stream(sources: Sequence[Array], out: Array) -> Callable[[], None]:
    """`copy` past the caches; `out` begins a cache line."""
    if out.ctypes.data % LINE:
        raise ValueError(f"out: expected memory that begins at a multiple of {LINE}")
    kernel = (_stream if len(sources) == 1 else _stream_sum)[_variant(out.size)]
    return lambda: kernel(*sources, out)


def _aligned(size: int, dtype: np.dtype) -> Array:
    """An array that begins a cache line, as each of its chunks then does."""
    room = np.empty(size * dtype.itemsize + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + size * dtype.itemsize].view(dtype)


def _as_float32(array: Array) -> Array:
    return array.view(np.uint8)[: array.nbytes // 4 * 4].view(np.float32)


def _variant(size: int) -> str:
    return "serial" if size < PARALLEL_FROM or nbbn.get_num_threads() == 1 else "parallel"


def _compiled(function) -> dict[str, Callable]:
    # fastmath lets the sum use full vectors; nothing here depends on its rounding. No cache=True: Numba's key does
    # not hold the options, so that the serial variant would be loaded where the parallel one is meant
    return {
        "serial": njit(fastmath=True)(function),
        "parallel": njit(fastmath=True, parallel=dict(_PRANGE_ONLY))(function),
    }


def _read_chunks(words):
    chunk = CHUNK // 2  # as many bytes
    totals = np.empty(-(-words.size // chunk), np.int64)
    for k in prange(totals.size):
        part = words[k * chunk : (k + 1) * chunk]
        total = 0
        for i in range(part.size):  # `for value in part` does not vectorise: 4 GB/s instead of 40 in cache
            total += part[i]
        totals[k] = total
    return totals.sum()


def _copy_chunks(x, out):
    for k in prange(-(-out.size // CHUNK)):
        source, target = x[k * CHUNK : (k + 1) * CHUNK], out[k * CHUNK : (k + 1) * CHUNK]
        for i in range(target.size):
            target[i] = source[i]


def _add_chunks(x, z, out):
    for k in prange(-(-out.size // CHUNK)):
        first, second = x[k * CHUNK : (k + 1) * CHUNK], z[k * CHUNK : (k + 1) * CHUNK]
        target = out[k * CHUNK : (k + 1) * CHUNK]
        for i in range(target.size):
            target[i] = first[i] + second[i]


def _stream_chunks(x, out):
    for k in prange(-(-out.size // CHUNK)):
        begin, end = k * CHUNK, min(out.size, (k + 1) * CHUNK)
        whole = begin + (end - begin) // WIDTH * WIDTH
        for i in range(begin, whole, WIDTH):
            stream_one(x, i, out, i)
        for i in range(whole, end):
            out[i] = x[i]
        fence()


def _stream_sum_chunks(x, z, out):
    for k in prange(-(-out.size // CHUNK)):
        begin, end = k * CHUNK, min(out.size, (k + 1) * CHUNK)
        whole = begin + (end - begin) // WIDTH * WIDTH
        for i in range(begin, whole, WIDTH):
            stream_two(x, z, i, out, i)
        for i in range(whole, end):
            out[i] = x[i] + z[i]
        fence()


_read = _compiled(_read_chunks)
_copy = _compiled(_copy_chunks)
_add = _compiled(_add_chunks)
_stream = _compiled(_stream_chunks)
_stream_sum = _compiled(_stream_sum_chunks)
