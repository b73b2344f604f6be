"""The rows family: `inner` is long, so a channel is a set of contiguous rows `x[o, c, :]`.

All arrays are canonical 3-d views (outer, channels, inner) with a contiguous last axis. Where a kernel takes
`addend` or `gradients` it has the shape of `x`. Empty `weight` and `bias` mean absent,
`addend` is None then: what is not there is not compiled.
"""

import math

import numpy as np
from numba import prange

from nbbn.cpu.affine import normalize_add_row, normalize_row, rare_add_row, rare_row
from nbbn.cpu.blocks import (
    BLOCK,
    CHUNK,
    MOST_SQUARES,
    chunk_bounds,
    chunks_of,
    plain_sums,
    sums_are_exact,
    sums_of_deviations,
    sums_of_two,
    usable_origin,
)
from nbbn.cpu.channels import fill_coefficients, from_deviations
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.kinds import least_squares, sum_origin
from nbbn.cpu.memory import deviation, element, run
from nbbn.cpu.scratch import greater, lesser, scratch, scratch_rows, zeros
from nbbn.cpu.sharing import shared, someone_was_late, tasks_of

#: Values, spread over a run, that the origin is the mean of: about an eighth of a standard deviation off.
SAMPLE = 32

# --- statistics of one chunk of a channel ------------------------------------------------------------------------


@formula
def origin_of(x, c, o, i0, i1):
    """Something near the mean: that of a sample of the first run. Exactly their value if all are equal."""
    values = run(x, o, c, i0, lesser(i1, i0 + BLOCK))
    kind = type(sum_origin(x))
    first = kind(usable_origin(x, np.float64(element(values, 0, sum_origin(x)))))
    stride = greater(1, values.size // SAMPLE)
    total = kind(0)
    for i in range(0, values.size, stride):
        total += deviation(values, i, first)
    return kind(usable_origin(x, np.float64(first) + np.float64(total) / (-(-values.size // stride))))


@formula
def box_moments(x, o0, o1, c0, c1, i0, i1, mean, m2):
    """Moments of the chunk o0:o1, i0:i1 of the channels from c0 to c1, written to mean and m2 (c1 - c0 values).

    In the order of memory: what one channel gets does not depend on which others there are.
    """
    channels = c1 - c0
    origin = scratch(channels, sum_origin(x))
    total = zeros(channels, 0.0)
    squares = zeros(channels, 0.0)
    for k in range(channels):
        origin[k] = origin_of(x, c0 + k, o0, i0, i1)
    o = o0
    while o + 2 <= o1 and 2 * (i1 - i0) <= BLOCK:
        for k in range(channels):
            c = c0 + k
            first, second = sums_of_two(
                run(x, o, c, i0, i1),
                run(x, o + 1, c, i0, i1),
                run(x, o + 2, c, i0, i1),
                run(x, o + 3, c, i0, i1),
                origin[k],
            )
            total[k] += np.float64(first)
            squares[k] += np.float64(second)
        o += 2
    while o < o1:
        for k in range(channels):
            for i in range(i0, i1, BLOCK):
                end = lesser(i + BLOCK, i1)
                # the next run of the same channel: in a row of memory of its own unless this one is long
                ahead = run(x, o, c0 + k, end, i1) if end < i1 else run(x, o + 1, c0 + k, i0, i1)
                first, second = sums_of_deviations(run(x, o, c0 + k, i, end), ahead, origin[k])
                total[k] += np.float64(first)
                squares[k] += np.float64(second)
        o += 1
    count = (o1 - o0) * (i1 - i0)
    for k in range(channels):
        mean[k], m2[k] = from_deviations(count, np.float64(origin[k]), total[k], squares[k])
        if not sums_are_exact(x, squares[k], m2[k], least_squares(x)):
            mean[k], m2[k] = careful_moments(x, c0 + k, o0, o1, i0, i1)


@formula
def finite_or_zero(value):
    """An origin to subtract: infinity minus itself would turn an infinite mean into NaN."""
    return value if np.isfinite(value) else 0.0


@formula
def careful_sums(x, c, o0, o1, i0, i1, origin):
    total = 0.0
    squares = 0.0
    for o in range(o0, o1):
        for i in range(i0, i1, BLOCK):
            first, second = plain_sums(run(x, o, c, i, lesser(i + BLOCK, i1)), origin)
            total += first
            squares += second
    return total, squares


@formula
def careful_moments(x, c, o0, o1, i0, i1):
    """The same in float64: for constant, huge, denormal, drifting and non-finite chunks of one channel."""
    count = (o1 - o0) * (i1 - i0)
    origin = usable_origin(x, finite_or_zero(element(run(x, o0, c, i0, i1), 0, 0.0)))
    total, squares = careful_sums(x, c, o0, o1, i0, i1, origin)
    mean, m2 = from_deviations(count, origin, total, squares)
    if MOST_SQUARES * m2 < squares < math.inf:  # the origin is far off: once more, from the mean
        origin = usable_origin(x, mean)
        total, squares = careful_sums(x, c, o0, o1, i0, i1, origin)
        mean, m2 = from_deviations(count, origin, total, squares)
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


@formula
def parts(x, group):
    """(chunks of a channel, groups of channels) that statistics are taken of, one by one."""
    outer, channels, inner = x.shape
    return chunks_of(outer, inner), -(-channels // group)


@formula
def part_moments(x, task, groups, group, part_mean, part_m2):
    """Moments of part number `task`, written to the row of its chunk."""
    outer, channels, inner = x.shape
    k, g = divmod(task, groups)
    o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
    c0 = g * group
    c1 = lesser(c0 + group, channels)
    box_moments(x, o0, o1, c0, c1, i0, i1, part_mean[k, c0:c1], part_m2[k, c0:c1])


@formula
def merge_parts(x, part_mean, part_m2, mean, m2):
    """mean[c], m2[c] of every channel from those of its chunks."""
    outer, channels, inner = x.shape
    for c in range(channels):
        mean[c], m2[c] = merge_chunks(outer, inner, part_mean[:, c], part_m2[:, c])


@kernel(reads=("x",))
def moments(workers, x, group, mean, m2):
    """mean[c], m2[c] of every channel; `group` of them are taken together."""
    chunks, groups = parts(x, group)
    part_mean = scratch_rows(chunks, x.shape[1], 0.0)
    part_m2 = scratch_rows(chunks, x.shape[1], 0.0)
    tasks = chunks * groups
    taken = shared(workers)
    for worker in prange(workers):
        for task in tasks_of(np.int64(worker), taken, tasks):
            part_moments(x, task, groups, group, part_mean, part_m2)
    merge_parts(x, part_mean, part_m2, mean, m2)
    return someone_was_late(taken)


# --- normalization ------------------------------------------------------------------------------------------------


@formula
def normalize_part(x, addend, out, o, c, i0, i1, narrow, wide, narrow_serves, k, floor, far, streaming):
    """Part of one row, with column k of the coefficients (mean, scale, shift) that serve it."""
    values = run(x, o, c, i0, i1)
    result = run(out, o, c, i0, i1)
    if narrow_serves[k]:
        ready = narrow[0, k], narrow[1, k], narrow[2, k]
        if addend is None:
            normalize_row(result, (values,), ready, floor, far, streaming)
        else:
            normalize_add_row(result, (values, run(addend, o, c, i0, i1)), ready, floor, far, streaming)
    else:
        exact = wide[0, k], wide[1, k], wide[2, k]
        if addend is None:
            rare_row(result, (values,), exact, np.float64(floor))
        else:
            rare_add_row(result, (values, run(addend, o, c, i0, i1)), exact, np.float64(floor))


@formula
def runs(shape):
    """(pieces a row is cut into, rows taken together, tasks): runs of memory of about CHUNK values."""
    outer, channels, inner = shape
    pieces = -(-inner // CHUNK)
    group = greater(1, CHUNK // inner)
    return pieces, group, -(-(outer * channels) // group) * pieces


@kernel(reads=("x", "addend", "wide", "narrow", "narrow_serves"))
def normalize(workers, x, addend, out, wide, narrow, narrow_serves, floor, streaming):
    """out = max((x - mean) * scale + shift + addend, floor); tasks are runs of memory, whatever the channel.

    `wide` and `narrow` hold mean, scale and shift of every channel in float64 and in the arithmetic of `floor`.
    """
    outer, channels, inner = x.shape
    pieces, group, tasks = runs(x.shape)
    taken = shared(workers)
    for worker in prange(workers):
        for task in tasks_of(np.int64(worker), taken, tasks):
            first, piece = divmod(task, pieces)
            i0 = piece * CHUNK
            i1 = lesser(i0 + CHUNK, inner)
            o, c = divmod(first * group, channels)
            for _ in range(lesser(group, outer * channels - first * group)):
                normalize_part(x, addend, out, o, c, i0, i1, narrow, wide, narrow_serves, c, floor, True, streaming)
                c += 1
                if c == channels:
                    c = 0
                    o += 1
    return someone_was_late(taken)


@kernel(reads=("x", "addend", "weight", "bias"))
def train_by_channel(workers, x, addend, out, weight, bias, eps, floor, group, streaming, mean, m2):
    """Statistics, then normalize, `group` channels at a time: the second read finds them in cache."""
    outer, channels, inner = x.shape
    chunks, tasks = parts(x, group)
    taken = shared(workers)
    for worker in prange(workers):
        for task in tasks_of(np.int64(worker), taken, tasks):
            c0 = task * group
            size = lesser(group, channels - c0)
            chunk_mean = scratch_rows(chunks, size, 0.0)
            chunk_m2 = scratch_rows(chunks, size, 0.0)
            for k in range(chunks):
                o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
                box_moments(x, o0, o1, c0, c0 + size, i0, i1, chunk_mean[k], chunk_m2[k])
            wide = scratch_rows(3, size, 0.0)
            narrow = scratch_rows(3, size, floor)
            narrow_serves = scratch(size, False)
            for k in range(size):
                c = c0 + k
                mean[c], m2[c] = merge_chunks(outer, inner, chunk_mean[:, k], chunk_m2[:, k])
                var = m2[c] / (outer * inner)
                narrow_serves[k] = fill_coefficients(mean[c], var, weight, bias, c, eps, wide, narrow, k)
            for o in range(outer - 1, -1, -1):  # backwards: the last rows are the ones still in cache
                for k in range(size):
                    c = c0 + k
                    normalize_part(
                        x, addend, out, o, c, 0, inner, narrow, wide, narrow_serves, k, floor, False, streaming
                    )
    return someone_was_late(taken)
