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
    usable_origin,
)
from nbbn.cpu.channels import fill_coefficients, from_deviations
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.kinds import least_squares, sum_origin
from nbbn.cpu.memory import deviation, element, run
from nbbn.cpu.scratch import greater, lesser, scratch, scratch_rows
from nbbn.cpu.sharing import next_task, shared, someone_was_late
from nbbn.cpu.vector import LANES

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
def box_moments(x, box, c0, c1, j0, origins, means, m2s):
    """Moments of the box (o0, o1, i0, i1) of the channels from c0 to c1, written to means and m2s from j0 on.

    `origins` is memory of the same size. In the order of memory: what one channel gets does not depend on which
    others there are. Sums are kept where their moments go.
    """
    o0, o1, i0, i1 = box
    kind = type(sum_origin(x))
    for c in range(c0, c1):
        j = j0 + c - c0
        origins[j] = origin_of(x, c, o0, i0, i1)
        means[j] = 0.0
        m2s[j] = 0.0
    row = x.strides[0] // x.itemsize
    o = o0
    while o + 2 <= o1 and 2 * (i1 - i0) <= BLOCK:  # short: two rows together
        for c in range(c0, c1):
            j = j0 + c - c0
            first, second = sums_of_deviations(
                run(x, o, c, i0, i1), run(x, o + 1, c, i0, i1), LANES, 2 * row, kind(origins[j])
            )
            means[j] += np.float64(first)
            m2s[j] += np.float64(second)
        o += 2
    while o < o1:
        for c in range(c0, c1):
            j = j0 + c - c0
            for i in range(i0, i1, BLOCK):
                end = lesser(i + BLOCK, i1)
                # the next block of the same channel is in a row of memory of its own unless this one is long
                ahead = BLOCK if end < i1 else row + i0 - i
                first, second = sums_of_deviations(
                    run(x, o, c, i, end), run(x, o, c, i + LANES, end), 2 * LANES, ahead, kind(origins[j])
                )
                means[j] += np.float64(first)
                m2s[j] += np.float64(second)
        o += 1
    count = (o1 - o0) * (i1 - i0)
    for c in range(c0, c1):
        j = j0 + c - c0
        squares = m2s[j]
        means[j], m2s[j] = from_deviations(count, origins[j], means[j], squares)
        if not sums_are_exact(x, squares, m2s[j], least_squares(x)):
            means[j], m2s[j] = careful_moments(x, c, o0, o1, i0, i1)


@formula
def careful_moments(x, c, o0, o1, i0, i1):
    """The same in float64: for constant, huge, denormal, drifting and non-finite chunks of one channel."""
    count = (o1 - o0) * (i1 - i0)
    origin = usable_origin(x, element(run(x, o0, c, i0, i1), 0, 0.0))
    mean = m2 = 0.0
    for _ in range(2):
        total = 0.0
        squares = 0.0
        for o in range(o0, o1):
            for i in range(i0, i1, BLOCK):
                few, more = plain_sums(run(x, o, c, i, lesser(i + BLOCK, i1)), origin)
                total += few
                squares += more
        mean, m2 = from_deviations(count, origin, total, squares)
        if not MOST_SQUARES * m2 < squares < math.inf:
            break
        origin = usable_origin(x, mean)  # the first was far off: once more, from the mean
    return mean, m2


@formula
def merge_chunks(x, j, means, m2s):
    """Mean and m2 of a channel from those of its chunks, column j of `means` and `m2s`, merged in order."""
    count = np.int64(0)
    mean = 0.0
    m2 = 0.0
    for k in range(means.shape[0]):
        o0, o1, i0, i1 = chunk_bounds(k, x.shape[0], x.shape[2])
        count, mean, m2 = merge(count, mean, m2, (o1 - o0) * (i1 - i0), means[k, j], m2s[k, j])
    return mean, m2


@formula
def parts(x, group):
    """(chunks of a channel, groups of channels) that statistics are taken of, one by one."""
    outer, channels, inner = x.shape
    return chunks_of(outer, inner), -(-channels // group)


@formula
def part_moments(x, task, groups, group, part_origin, part_mean, part_m2):
    """Moments of part number `task`, written to the row of its chunk."""
    k, g = divmod(task, groups)
    c0 = g * group
    box = chunk_bounds(k, x.shape[0], x.shape[2])
    box_moments(x, box, c0, lesser(c0 + group, x.shape[1]), c0, part_origin[k], part_mean[k], part_m2[k])


@formula
def merge_parts(x, part_mean, part_m2, mean, m2):
    """mean[c], m2[c] of every channel from those of its chunks."""
    for c in range(mean.size):
        mean[c], m2[c] = merge_chunks(x, c, part_mean, part_m2)


@kernel(reads=("x",))
def moments(workers, x, group, mean, m2):
    """mean[c], m2[c] of every channel; `group` of them are taken together."""
    chunks, groups = parts(x, group)
    part_origin = scratch_rows(chunks, x.shape[1], 0.0)
    part_mean = scratch_rows(chunks, x.shape[1], 0.0)
    part_m2 = scratch_rows(chunks, x.shape[1], 0.0)
    tasks = chunks * groups
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            part_moments(x, task, groups, group, part_origin, part_mean, part_m2)
            task = next_task(np.int64(worker), taken, tasks, task)
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
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
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
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)


@formula
def train_channels(x, addend, out, c0, c1, weight, bias, eps, floor, streaming, mean, m2):
    """Statistics, then normalize, of the channels from c0 to c1."""
    outer, _, inner = x.shape
    chunks = chunks_of(outer, inner)
    origins = scratch(c1 - c0, 0.0)
    means = scratch_rows(chunks, c1 - c0, 0.0)
    m2s = scratch_rows(chunks, c1 - c0, 0.0)
    for k in range(chunks):
        box_moments(x, chunk_bounds(k, outer, inner), c0, c1, 0, origins, means[k], m2s[k])
    wide = scratch_rows(3, c1 - c0, 0.0)
    narrow = scratch_rows(3, c1 - c0, floor)
    narrow_serves = scratch(c1 - c0, False)
    for c in range(c0, c1):
        mean[c], m2[c] = merge_chunks(x, c - c0, means, m2s)
        var = m2[c] / (outer * inner)
        narrow_serves[c - c0] = fill_coefficients(mean[c], var, weight, bias, c, eps, wide, narrow, c - c0)
    for o in range(outer - 1, -1, -1):  # backwards: the last rows are the ones still in cache
        for c in range(c0, c1):
            normalize_part(x, addend, out, o, c, 0, inner, narrow, wide, narrow_serves, c - c0, floor, False, streaming)


@kernel(reads=("x", "addend", "weight", "bias"))
def train_by_channel(workers, x, addend, out, weight, bias, eps, floor, group, streaming, mean, m2):
    """Statistics, then normalize, `group` channels at a time: the second read finds them in cache."""
    _, tasks = parts(x, group)
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            c0 = task * group
            c1 = lesser(c0 + group, x.shape[1])
            train_channels(x, addend, out, c0, c1, weight, bias, eps, floor, streaming, mean, m2)
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)
