"""The rows family: `inner` is long, so a channel is a set of contiguous rows `x[o, c, :]`.

All arrays are canonical 3-d views (outer, channels, inner) with a contiguous last axis. Where a kernel takes
`addend` or `gradients` it has the shape of `x`. Empty `weight` and `bias` mean absent; an empty `addend` too.
"""

import numpy as np
from numba import prange

from nbbn.cpu import blocks
from nbbn.cpu.blocks import BLOCK, CHUNK, chunk_bounds, chunk_grid
from nbbn.cpu.channels import channel_scale, fits, from_deviations, split
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import elementwise, formula, kernel
from nbbn.cpu.simd import fmuladd, run

# --- one block, one chunk -------------------------------------------------------------------------------------


@formula
def block_is_exact(m2, dtype):
    """False where squares of this storage precision overflowed, or may have lost digits to denormals."""
    return np.finfo(dtype).tiny * 2.0**33 <= m2 < np.inf


@formula
def block_moments(x, c, o0, o1, i0, i1):
    """Mean and m2 of one block of channel c."""
    count = (o1 - o0) * (i1 - i0)
    total = x.dtype.type(0)
    for o in range(o0, o1):
        total += blocks.sum_of(run(x, o, c, i0, i1))
    origin = total / x.dtype.type(count)
    first = x.dtype.type(0)
    second = x.dtype.type(0)
    for o in range(o0, o1):
        deviation, square = blocks.sums_of_deviations(run(x, o, c, i0, i1), origin)
        first += deviation
        second += square
    if not block_is_exact(second, x.dtype):
        return wide_block_moments(x, c, o0, o1, i0, i1)
    return from_deviations(count, np.float64(origin), np.float64(first), np.float64(second))


@formula
def finite_or_zero(value):
    """An origin to subtract: infinity minus itself would turn an infinite mean into NaN."""
    return value if np.isfinite(value) else 0.0


@formula
def wide_block_moments(x, c, o0, o1, i0, i1):
    """The same in float64 from the first value on: for huge, denormal, constant and non-finite blocks."""
    count = (o1 - o0) * (i1 - i0)
    origin = finite_or_zero(np.float64(x[o0, c, i0]))
    total = 0.0
    for o in range(o0, o1):
        total += blocks.sums_of_deviations(run(x, o, c, i0, i1), origin)[0]
    mean = origin + total / count
    first = 0.0
    second = 0.0
    for o in range(o0, o1):
        deviation, square = blocks.sums_of_deviations(run(x, o, c, i0, i1), mean)
        first += deviation
        second += square
    return from_deviations(count, mean, first, second)


@formula
def chunk_moments(x, c, o0, o1, i0, i1):
    """Mean and m2 of one chunk of channel c: its blocks, merged in order."""
    rows = max(1, BLOCK // (i1 - i0))
    count = np.int64(0)
    mean = 0.0
    m2 = 0.0
    for o in range(o0, o1, rows):
        o_end = min(o + rows, o1)
        for i in range(i0, i1, BLOCK):
            i_end = min(i + BLOCK, i1)
            block_mean, block_m2 = block_moments(x, c, o, o_end, i, i_end)
            block_count = (o_end - o) * (i_end - i)
            count, mean, m2 = merge(count, mean, m2, block_count, block_mean, block_m2)
    return mean, m2


@formula
def merge_chunks(outer, inner, means, m2s):
    """Mean and m2 of a channel from those of its chunks, merged in order."""
    count = np.int64(0)
    mean = 0.0
    m2 = 0.0
    for k in range(means.size):
        o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
        count, mean, m2 = merge(count, mean, m2, (o1 - o0) * (i1 - i0), means[k], m2s[k])
    return mean, m2


# --- one row ----------------------------------------------------------------------------------------------------


@elementwise
def normalize_row(values, result, mean, scale, shift, floor):
    for i in range(values.size):
        y = fmuladd(values[i] - mean, scale, shift)
        result[i] = floor if y < floor else y


@elementwise
def normalize_add_row(values, addend, result, mean, scale, shift, floor):
    for i in range(values.size):
        y = fmuladd(values[i] - mean, scale, shift) + addend[i]
        result[i] = floor if y < floor else y


@formula
def normalize_rows(x, addend, out, c, o0, o1, i0, i1, mean, scale, shift, floor):
    """Part of one channel. `out` may be `x`: every value is read before it is written."""
    for o in range(o0, o1):
        values = run(x, o, c, i0, i1)
        result = run(out, o, c, i0, i1)
        if addend.size:
            normalize_add_row(values, run(addend, o, c, i0, i1), result, mean, scale, shift, floor)
        else:
            normalize_row(values, result, mean, scale, shift, floor)


# --- entry points -----------------------------------------------------------------------------------------------


@kernel(reads=("x",))
def moments(x, mean, m2):
    """mean[c], m2[c] of every channel; the parallel unit is a chunk of a channel."""
    outer, channels, inner = x.shape
    _, _, along_outer, along_inner = chunk_grid(outer, inner)
    chunks = along_outer * along_inner
    chunk_mean = np.empty((channels, chunks))
    chunk_m2 = np.empty((channels, chunks))
    for task in prange(channels * chunks):
        c, k = divmod(np.int64(task), chunks)
        o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
        chunk_mean[c, k], chunk_m2[c, k] = chunk_moments(x, c, o0, o1, i0, i1)
    for c in range(channels):
        mean[c], m2[c] = merge_chunks(outer, inner, chunk_mean[c], chunk_m2[c])


@formula
def normalize_channel(x, addend, out, c, o0, o1, i0, i1, mean, scale, shift, floor):
    """Part of one channel, in the arithmetic of `floor` where that is accurate enough, else in float64."""
    narrow = type(floor)
    if fits(mean, scale, narrow):
        high, narrow_scale, narrow_shift = split(mean, scale, shift, narrow)
        normalize_rows(x, addend, out, c, o0, o1, i0, i1, high, narrow_scale, narrow_shift, floor)
    else:
        normalize_rows(x, addend, out, c, o0, o1, i0, i1, mean, scale, shift, np.float64(floor))


@kernel(reads=("x", "addend", "wide", "narrow", "narrow_serves"))
def normalize(x, addend, out, wide, narrow, narrow_serves, floor):
    """out = max((x - mean) * scale + shift + addend, floor); tasks are runs of memory, whatever the channel.

    `wide` and `narrow` hold mean, scale and shift of every channel in float64 and in the arithmetic of `floor`.
    """
    outer, channels, inner = x.shape
    pieces = -(-inner // CHUNK)
    group = max(1, CHUNK // inner)
    groups = -(-(outer * channels) // group)
    for task in prange(groups * pieces):
        first, piece = divmod(np.int64(task), pieces)
        i0 = piece * CHUNK
        i1 = min(i0 + CHUNK, inner)
        o, c = divmod(first * group, channels)
        for _ in range(min(group, outer * channels - first * group)):
            if narrow_serves[c]:
                normalize_rows(x, addend, out, c, o, o + 1, i0, i1, narrow[0, c], narrow[1, c], narrow[2, c], floor)
            else:
                wide_floor = np.float64(floor)
                normalize_rows(x, addend, out, c, o, o + 1, i0, i1, wide[0, c], wide[1, c], wide[2, c], wide_floor)
            c += 1
            if c == channels:
                c = 0
                o += 1


@kernel(reads=("x", "addend", "weight", "bias"))
def train_by_channel(x, addend, out, weight, bias, eps, floor, mean, m2):
    """Statistics, then normalize, one channel at a time: the second read finds the channel in cache."""
    outer, channels, inner = x.shape
    _, _, along_outer, along_inner = chunk_grid(outer, inner)
    chunks = along_outer * along_inner
    for task in prange(channels):
        c = np.int64(task)
        chunk_mean = np.empty(chunks)
        chunk_m2 = np.empty(chunks)
        for k in range(chunks):
            o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
            chunk_mean[k], chunk_m2[k] = chunk_moments(x, c, o0, o1, i0, i1)
        mean[c], m2[c] = merge_chunks(outer, inner, chunk_mean, chunk_m2)

        scale = channel_scale(m2[c] / (outer * inner), weight, c, eps)
        shift = bias[c] if bias.size else 0.0
        for k in range(chunks - 1, -1, -1):  # backwards: the last chunk is the one still in cache
            o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
            normalize_channel(x, addend, out, c, o0, o1, i0, i1, mean[c], scale, shift, floor)
