"""The columns family: `inner` is short or 1, so the channels of one row lie side by side.

Data is the canonical (outer, channels, inner) with each row x[o] contiguous, taken as rows of channels * inner
columns. With few columns, `fold` rows that follow each other in memory are taken as one, so that rows are long
enough for full vectors; rows left over at the end are taken singly. Column j belongs to channel
(j // inner) % channels. Statistics accumulate per column and merge into channels at the end; the affine step
expands the per-channel coefficients to columns once a tile. No remainders, no gathers.
"""

import numpy as np
from numba import prange

from nbbn.cpu.blocks import CHUNK
from nbbn.cpu.channels import from_deviations
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import elementwise, formula, kernel, reduction
from nbbn.cpu.rows import block_is_exact, finite_or_zero
from nbbn.cpu.simd import fmuladd, run

#: Columns worked on together: their float32 accumulators (3 x 2 kB) stay in the first-level cache.
TILE = 512

#: Rows a block of statistics: block and accumulators (128 kB of float32) stay in the second-level cache.
BLOCK_ROWS = 64

#: Rows a parallel chunk of statistics: merging a chunk's columns into channels costs about one row of work each.
CHUNK_ROWS = 512

# --- tiles --------------------------------------------------------------------------------------------------------


@formula
def tile_width(width, fold, inner):
    """Columns a tile: whole channels, about TILE of them; a folded row is one tile."""
    return width if fold > 1 else min(width, max(1, TILE // inner) * inner)


@formula
def chunk_of_rows(k, chunk, outer, fold):
    """Rows [r0, r1) in steps of `step` of chunk number k; the chunk after the last holds what folding left over."""
    whole = outer // fold * fold
    r0 = k * chunk * fold
    if r0 < whole:
        return r0, min(r0 + chunk * fold, whole), fold
    return whole, outer, np.int64(1)


@elementwise
def clear(values):
    for j in range(values.size):  # a tenth of what values[:] = 0 takes to compile
        values[j] = 0


@reduction
def add_row(values, total):
    for j in range(total.size):
        total[j] += values[j]


@reduction
def add_deviations(values, origin, first, second):
    for j in range(origin.size):
        deviation = values[j] - origin[j]
        first[j] += deviation
        second[j] += deviation * deviation


@formula
def block_columns(x, r0, r1, step, j0, origin, first, second):
    """Per column of a tile: a mean (origin) and sums of d and d * d of its block. False if a square was unsafe."""
    clear(origin)
    clear(first)
    clear(second)
    j1 = j0 + origin.size
    for r in range(r0, r1, step):
        add_row(run(x, r, 0, j0, j1), origin)
    rows = origin.dtype.type((r1 - r0) // step)
    for j in range(origin.size):
        origin[j] /= rows
    for r in range(r0, r1, step):
        add_deviations(run(x, r, 0, j0, j1), origin, first, second)
    safe = True
    for j in range(origin.size):
        safe &= block_is_exact(second[j], origin.dtype)
    return safe


@formula
def wide_block_columns(x, r0, r1, step, j0, origin, first, second):
    """The same in float64 arrays and from the first row on: nothing overflows or underflows that need not."""
    start = run(x, r0, 0, j0, j0 + origin.size)
    clear(first)
    clear(second)
    for r in range(r0, r1, step):
        values = run(x, r, 0, j0, j0 + origin.size)
        for j in range(origin.size):
            first[j] += values[j] - finite_or_zero(np.float64(start[j]))
    for j in range(origin.size):
        origin[j] = finite_or_zero(np.float64(start[j])) + first[j] / ((r1 - r0) // step)
    clear(first)
    for r in range(r0, r1, step):
        values = run(x, r, 0, j0, j0 + origin.size)
        for j in range(origin.size):
            deviation = values[j] - origin[j]
            first[j] += deviation
            second[j] += deviation * deviation


@elementwise
def merge_block(count, mean, m2, block_count, origin, first, second):
    """Merge a block into the running moments of every column; all columns have the same counts."""
    for j in range(mean.size):
        block_mean, block_m2 = from_deviations(
            block_count, np.float64(origin[j]), np.float64(first[j]), np.float64(second[j])
        )
        _, mean[j], m2[j] = merge(count, mean[j], m2[j], block_count, block_mean, block_m2)


@formula
def merge_wide_block(x, r0, r1, step, j0, count, mean, m2):
    origin = np.empty(mean.size)
    first = np.empty(mean.size)
    second = np.empty(mean.size)
    wide_block_columns(x, r0, r1, step, j0, origin, first, second)
    merge_block(count, mean, m2, (r1 - r0) // step, origin, first, second)


@formula
def tile_moments(x, r0, r1, step, j0, j1, mean, m2):
    """Moments of the channels in columns [j0, j1) of rows [r0, r1), written to mean[c], m2[c]."""
    width = j1 - j0
    origin = np.empty(width, x.dtype)
    first = np.empty(width, x.dtype)
    second = np.empty(width, x.dtype)
    column_mean = np.empty(width)
    column_m2 = np.empty(width)
    count = np.int64(0)
    for r in range(r0, r1, BLOCK_ROWS * step):
        end = min(r + BLOCK_ROWS * step, r1)
        rows = (end - r) // step
        if block_columns(x, r, end, step, j0, origin, first, second):
            merge_block(count, column_mean, column_m2, rows, origin, first, second)
        else:
            merge_wide_block(x, r, end, step, j0, count, column_mean, column_m2)
        count += rows
    merge_columns(count, column_mean, column_m2, j0, x.shape[1], x.shape[2], mean, m2)


@formula
def merge_columns(rows, column_mean, column_m2, j0, channels, inner, mean, m2):
    """Merge columns, `rows` values each, into their channels, in the order of the columns."""
    folds = max(1, column_mean.size // (channels * inner))
    tile_channels = column_mean.size // (folds * inner)
    for k in range(tile_channels):
        count = np.int64(0)
        channel_mean = 0.0
        channel_m2 = 0.0
        for fold in range(folds):
            for i in range(inner):
                j = (fold * channels + k) * inner + i
                count, channel_mean, channel_m2 = merge(
                    count, channel_mean, channel_m2, rows, column_mean[j], column_m2[j]
                )
        c = j0 // inner + k
        mean[c] = channel_mean
        m2[c] = channel_m2


@kernel(reads=("x",))
def moments(x, fold, mean, m2):
    """mean[c], m2[c] of every channel."""
    outer, channels, inner = x.shape
    width = fold * channels * inner
    tile = tile_width(width, fold, inner)
    tiles = -(-width // tile)
    whole = outer // fold
    chunks = -(-whole // CHUNK_ROWS) + (1 if whole * fold < outer else 0)
    part_mean = np.empty((chunks, channels))
    part_m2 = np.empty((chunks, channels))
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0, r1, step = chunk_of_rows(k, CHUNK_ROWS, outer, fold)
        j0 = t * tile
        j1 = min(j0 + tile, step * channels * inner)
        tile_moments(x, r0, r1, step, j0, j1, part_mean[k], part_m2[k])
    for c in range(channels):
        count = np.int64(0)
        channel_mean = 0.0
        channel_m2 = 0.0
        for k in range(chunks):
            r0, r1, step = chunk_of_rows(k, CHUNK_ROWS, outer, fold)
            count, channel_mean, channel_m2 = merge(
                count, channel_mean, channel_m2, (r1 - r0) * inner, part_mean[k, c], part_m2[k, c]
            )
        mean[c] = channel_mean
        m2[c] = channel_m2


# --- the affine step ------------------------------------------------------------------------------------------------


@formula
def expand(values, result, j0, inner):
    """Per-channel values to the columns from j0 on."""
    channels = values.size
    c = (j0 // inner) % channels
    i = j0 % inner
    for j in range(result.size):
        result[j] = values[c]
        i += 1
        if i == inner:
            i = 0
            c = c + 1 if c + 1 < channels else 0


@elementwise
def normalize_row(values, result, mean, scale, shift, floor):
    for j in range(values.size):
        y = fmuladd(values[j] - mean[j], scale[j], shift[j])
        result[j] = floor if y < floor else y


@elementwise
def normalize_add_row(values, addend, result, mean, scale, shift, floor):
    for j in range(values.size):
        y = fmuladd(values[j] - mean[j], scale[j], shift[j]) + addend[j]
        result[j] = floor if y < floor else y


@formula
def affine_grid(outer, fold, width):
    """(columns a tile, tiles, folded rows a chunk, chunks): about CHUNK values a task.

    The expanded coefficients of a tile stay in the first-level cache.
    """
    tile = min(width, 2 * TILE)
    chunk = max(1, CHUNK // tile)
    whole = outer // fold
    return tile, -(-width // tile), chunk, -(-whole // chunk) + (1 if whole * fold < outer else 0)


@kernel(reads=("x", "addend", "mean", "scale", "shift"))
def normalize(x, addend, out, fold, mean, scale, shift, floor):
    """out = max((x - mean) * scale + shift + addend, floor)."""
    outer, channels, inner = x.shape
    tile, tiles, chunk, chunks = affine_grid(outer, fold, fold * channels * inner)
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0, r1, step = chunk_of_rows(k, chunk, outer, fold)
        j0 = t * tile
        j1 = min(j0 + tile, step * channels * inner)
        columns = np.empty((3, j1 - j0), mean.dtype)
        expand(mean, columns[0], j0, inner)
        expand(scale, columns[1], j0, inner)
        expand(shift, columns[2], j0, inner)
        for r in range(r0, r1, step):
            values = run(x, r, 0, j0, j1)
            result = run(out, r, 0, j0, j1)
            if addend.size:
                added = run(addend, r, 0, j0, j1)
                normalize_add_row(values, added, result, columns[0], columns[1], columns[2], floor)
            else:
                normalize_row(values, result, columns[0], columns[1], columns[2], floor)
