"""The columns family, statistics: `inner` is short or 1, so the channels of one row lie side by side.

Data is the canonical (outer, channels, inner) with each row x[o] contiguous, taken as rows of channels * inner
columns. With few columns, `fold` rows that follow each other in memory are taken as one, so that rows are long
enough for full vectors; rows left over at the end are taken singly. Column j belongs to channel
(j // inner) % channels. Statistics accumulate per column and merge into channels at the end; the affine step
expands the per-channel coefficients to columns once a tile. No gathers.
"""

import numpy as np
from numba import prange

from nbbn.cpu.blocks import sums_are_exact, usable_origin
from nbbn.cpu.channels import from_deviations
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.kinds import least_squares, sum_origin
from nbbn.cpu.lines import prefetch
from nbbn.cpu.memory import deviation, deviations, element, load, run, store
from nbbn.cpu.rows import SAMPLE
from nbbn.cpu.scratch import greater, lesser, scratch, scratch_rows
from nbbn.cpu.sharing import next_task, shared, someone_was_late
from nbbn.cpu.tiles import BLOCK_ROWS, CHUNK_ROWS, STRIP, chunk_of_rows, chunks_of_rows, clear, expand, part
from nbbn.cpu.vector import LANES, fmuladd, splat

# --- statistics -----------------------------------------------------------------------------------------------------


@formula
def add_deviations(x, r, step, rows, j0, origin, total, squares):
    """Add d and d * d, d = x - origin, of `rows` rows to sums per column."""
    like = origin.dtype.type(0)
    width = origin.size
    # whole rows follow each other in memory: what comes next is known, and asking for it is a third faster
    ahead = r + rows * step if width == step * x.shape[1] * x.shape[2] else r
    j = 0
    while j + LANES <= width:
        # apart from what there is: two short sums round less than a long one
        first = splat(like)
        second = first
        for k in range(rows):
            prefetch(run(x, ahead + k * step, 0, j0, j0 + width), j)
            d = deviations(run(x, r + k * step, 0, j0, j0 + width), j, origin)
            first = first + d
            second = fmuladd(d, d, second)
        store(total, j, load(total, j, like) + first)
        store(squares, j, load(squares, j, like) + second)
        j += LANES
    j = width & -LANES  # as it is: derived anew, so that LLVM keeps no pointers for what follows in the loop above
    while j < width:
        one = like
        square = like
        for k in range(rows):
            single = deviation(run(x, r + k * step, 0, j0, j0 + width), j, origin)
            one += single
            square = fmuladd(single, single, square)
        total[j] += one
        squares[j] += square
        j += 1


@formula
def add_block(x, r0, r1, step, j0, origin, total, squares):
    """The same for all rows of a block, from zero."""
    clear(total)
    clear(squares)
    r = r0
    while r + STRIP * step <= r1:
        add_deviations(x, r, step, STRIP, j0, origin, total, squares)
        r += STRIP * step
    while r < r1:
        add_deviations(x, r, step, 1, j0, origin, total, squares)
        r += step


@formula
def fill_origin(x, r0, r1, step, j0, origin, sums):
    """Something near the mean of every channel, in all its columns: that of its first rows.

    One origin a channel, so that sums of its columns are sums of the channel. Exactly their value if all are equal.
    """
    width = origin.size
    channels, inner = x.shape[1], x.shape[2]
    start = run(x, r0, 0, j0, j0 + width)
    values = scratch(width // inner if width < channels * inner else channels, origin.dtype.type(0))
    for k in range(values.size):
        values[k] = usable_origin(x, np.float64(element(start, k * inner, sum_origin(x))))
    expand(values, origin, 0, inner)
    # of few rows an eighth: reading them twice is most of the work at (64, 64)
    rows = greater(2, lesser(lesser(2 * STRIP, (r1 - r0) // (8 * step)), SAMPLE * values.size // width))
    end = lesser(r1, r0 + rows * step)
    column_sums(x, r0, end, step, j0, origin, sums)
    for k in range(values.size):
        total, _ = channel_sums(sums, k, values.size, inner)
        offset = total / ((end - r0) // step * (width // values.size))
        values[k] = usable_origin(x, np.float64(values[k]) + offset)
    expand(values, origin, 0, inner)


@formula
def column_sums(x, r0, r1, step, j0, origin, sums):
    """Sums of d and of d * d per column: blocks in the precision of `origin`, their sum in float64."""
    width = origin.size
    block_total = scratch(width, origin.dtype.type(0))
    block_squares = scratch(width, origin.dtype.type(0))
    clear(sums[0])
    clear(sums[1])
    for r in range(r0, r1, BLOCK_ROWS * step):
        add_block(x, r, lesser(r + BLOCK_ROWS * step, r1), step, j0, origin, block_total, block_squares)
        for j in range(width):
            sums[0, j] += block_total[j]
            sums[1, j] += block_squares[j]


@formula
def channel_sums(sums, k, channels, inner):
    """Sums over the columns of channel k of a tile: inner of them, once every channels * inner columns."""
    total = 0.0
    squares = 0.0
    for j in range(k * inner, sums.shape[1], channels * inner):
        for i in range(j, j + inner):
            total += sums[0, i]
            squares += sums[1, i]
    return total, squares


@formula
def merged_columns(x, rows, origin, sums, j0, least, mean, m2):
    """Moments of the channels of a tile from the sums of its columns, written to mean[c], m2[c].

    False if the sums of some channel may be inexact: they overflowed, are below `least`, or lost digits because
    the origin was far from the mean.
    """
    width = origin.size
    inner = x.shape[2]
    channels = lesser(width // inner, x.shape[1])
    count = rows * (width // channels)
    exact = True
    for k in range(channels):
        total, squares = channel_sums(sums, k, channels, inner)
        c = j0 // inner + k
        mean[c], m2[c] = from_deviations(count, np.float64(origin[k * inner]), total, squares)
        exact &= sums_are_exact(x, squares, m2[c], least)
    return exact


@formula
def tile_moments(x, r0, r1, step, j0, j1, mean, m2):
    """Moments of the channels in columns [j0, j1) of rows [r0, r1), written to mean[c], m2[c]."""
    width = j1 - j0
    inner = x.shape[2]
    rows = (r1 - r0) // step
    origin = scratch(width, sum_origin(x))
    sums = scratch_rows(2, width, 0.0)
    fill_origin(x, r0, r1, step, j0, origin, sums)
    column_sums(x, r0, r1, step, j0, origin, sums)
    if merged_columns(x, rows, origin, sums, j0, least_squares(x), mean, m2):
        return
    # in float64, for constant, huge, denormal, drifting and non-finite channels
    start = run(x, r0, 0, j0, j1)
    careful = scratch(width, 0.0)
    channels = lesser(width // inner, x.shape[1])
    values = scratch(channels, 0.0)
    for k in range(channels):
        values[k] = usable_origin(x, element(start, k * inner, 0.0))
    for _ in range(2):
        expand(values, careful, 0, inner)
        column_sums(x, r0, r1, step, j0, careful, sums)
        if merged_columns(x, rows, careful, sums, j0, 0.0, mean, m2):
            return
        for k in range(channels):  # the first values were far off: once more, from the means
            values[k] = usable_origin(x, mean[j0 // inner + k])


@formula
def parts(x, fold, tile):
    """(chunks of rows, tiles of columns) that statistics are taken of, one by one."""
    outer, channels, inner = x.shape
    return chunks_of_rows(CHUNK_ROWS, outer, fold), -(-(fold * channels * inner) // tile)


@formula
def part_moments(x, task, tiles, fold, tile, part_mean, part_m2):
    """Moments of part number `task`, written to the row of its chunk."""
    outer, channels, inner = x.shape
    k, r0, r1, step, j0, j1 = part(task, tiles, tile, CHUNK_ROWS, outer, fold, channels * inner)
    tile_moments(x, r0, r1, step, j0, j1, part_mean[k], part_m2[k])


@formula
def merge_parts(x, fold, part_mean, part_m2, mean, m2):
    """mean[c], m2[c] of every channel from those of its chunks, merged in order."""
    outer, channels, inner = x.shape
    count = np.int64(0)
    for k in range(part_mean.shape[0]):
        r0, r1, _ = chunk_of_rows(k, CHUNK_ROWS, outer, fold)
        size = (r1 - r0) * inner
        for c in range(channels):
            _, mean[c], m2[c] = merge(count, mean[c], m2[c], size, part_mean[k, c], part_m2[k, c])
        count += size


@kernel(reads=("x",))
def moments(workers, x, fold, tile, mean, m2):
    """mean[c], m2[c] of every channel."""
    chunks, tiles = parts(x, fold, tile)
    part_mean = scratch_rows(chunks, x.shape[1], 0.0)
    part_m2 = scratch_rows(chunks, x.shape[1], 0.0)
    tasks = chunks * tiles
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            part_moments(x, task, tiles, fold, tile, part_mean, part_m2)
            task = next_task(np.int64(worker), taken, tasks, task)
    merge_parts(x, fold, part_mean, part_m2, mean, m2)
    return someone_was_late(taken)
