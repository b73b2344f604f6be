"""The columns family: `inner` is short or 1, so the channels of one row lie side by side.

Data is canonical 3-d again, as (rows, 1, width): each row holds `width` contiguous values, and column j belongs
to channel (j // inner) % channels. A row may hold several copies of the channels ("folded"): with few channels
that makes rows long enough for full vectors. Statistics accumulate per column and merge into channels at the
end; the affine step expands the per-channel coefficients to columns once a tile. No remainders, no gathers.
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
def tile_width(width, channels, inner):
    """Columns a tile: whole channels, about TILE of them; a folded row is one tile."""
    if width != channels * inner:
        return width
    return min(width, max(1, TILE // inner) * inner)


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
def block_columns(x, r0, r1, j0, origin, first, second):
    """Per column of a tile: a mean (origin) and sums of d and d * d of its block. False if a square was unsafe."""
    origin[:] = 0
    first[:] = 0
    second[:] = 0
    j1 = j0 + origin.size
    for r in range(r0, r1):
        add_row(run(x, r, 0, j0, j1), origin)
    rows = origin.dtype.type(r1 - r0)
    for j in range(origin.size):
        origin[j] /= rows
    for r in range(r0, r1):
        add_deviations(run(x, r, 0, j0, j1), origin, first, second)
    safe = True
    for j in range(origin.size):
        safe &= block_is_exact(second[j], origin.dtype)
    return safe


@formula
def wide_block_columns(x, r0, r1, j0, origin, first, second):
    """The same in float64 arrays and from the first row on: nothing overflows or underflows that need not."""
    start = run(x, r0, 0, j0, j0 + origin.size)
    first[:] = 0
    second[:] = 0
    for r in range(r0, r1):
        values = run(x, r, 0, j0, j0 + origin.size)
        for j in range(origin.size):
            first[j] += values[j] - finite_or_zero(np.float64(start[j]))
    for j in range(origin.size):
        origin[j] = finite_or_zero(np.float64(start[j])) + first[j] / (r1 - r0)
    first[:] = 0
    for r in range(r0, r1):
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
def tile_moments(x, r0, r1, j0, j1, channels, inner, mean, m2):
    """Moments of the channels in columns [j0, j1) of rows [r0, r1), written to mean[c], m2[c]."""
    width = j1 - j0
    origin = np.empty(width, x.dtype)
    first = np.empty(width, x.dtype)
    second = np.empty(width, x.dtype)
    column_mean = np.empty(width)
    column_m2 = np.empty(width)
    for r in range(r0, r1, BLOCK_ROWS):
        end = min(r + BLOCK_ROWS, r1)
        if block_columns(x, r, end, j0, origin, first, second):
            merge_block(r - r0, column_mean, column_m2, end - r, origin, first, second)
        else:
            wide = np.empty((3, width))
            wide_block_columns(x, r, end, j0, wide[0], wide[1], wide[2])
            merge_block(r - r0, column_mean, column_m2, end - r, wide[0], wide[1], wide[2])
    merge_columns(r1 - r0, column_mean, column_m2, j0, channels, inner, mean, m2)


@formula
def merge_columns(rows, column_mean, column_m2, j0, channels, inner, mean, m2):
    """Merge columns, `rows` values each, into their channels, in the order of the columns."""
    folds = max(1, column_mean.size // (channels * inner))
    tile_channels = column_mean.size // (folds * inner)
    for k in range(tile_channels):
        count = 0
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


@kernel(reads=("x", "tail"))
def moments(x, tail, channels, inner, mean, m2):
    """mean[c], m2[c] of every channel. `tail` holds the rows that a folded `x` left over, unfolded."""
    rows, _, width = x.shape
    tile = tile_width(width, channels, inner)
    tiles = -(-width // tile)
    chunks = -(-rows // CHUNK_ROWS)
    part_mean = np.empty((chunks + 1, channels))
    part_m2 = np.empty((chunks + 1, channels))
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0 = k * CHUNK_ROWS
        r1 = min(r0 + CHUNK_ROWS, rows)
        j0 = t * tile
        tile_moments(x, r0, r1, j0, min(j0 + tile, width), channels, inner, part_mean[k], part_m2[k])
    if tail.shape[0]:
        start = np.int64(0)  # a plain 0 would be a type of its own, and compile everything below again
        period = channels * inner
        tile_moments(tail, start, tail.shape[0], start, period, channels, inner, part_mean[chunks], part_m2[chunks])
    values_per_row = width // channels
    for c in range(channels):
        count = 0
        channel_mean = 0.0
        channel_m2 = 0.0
        for k in range(chunks + 1):
            part = (min((k + 1) * CHUNK_ROWS, rows) - k * CHUNK_ROWS) * values_per_row
            if k == chunks:
                part = tail.shape[0] * inner
            count, channel_mean, channel_m2 = merge(
                count, channel_mean, channel_m2, part, part_mean[k, c], part_m2[k, c]
            )
        mean[c] = channel_mean
        m2[c] = channel_m2


# --- the affine step ------------------------------------------------------------------------------------------------


@formula
def expand(values, result, j0, channels, inner):
    """Per-channel values to the columns from j0 on."""
    for j in range(result.size):
        result[j] = values[((j0 + j) // inner) % channels]


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
def affine_grid(rows, width):
    """(columns a tile, rows a chunk): about CHUNK values a task, expanded coefficients in first-level cache."""
    tile = min(width, 2 * TILE)
    return tile, min(rows, max(1, CHUNK // tile))


@kernel(reads=("x", "addend", "mean", "scale", "shift"))
def normalize(x, addend, out, channels, inner, mean, scale, shift, floor):
    """Out = max((x - mean) * scale + shift + addend, floor)."""
    rows, _, width = x.shape
    tile, chunk = affine_grid(rows, width)
    tiles = -(-width // tile)
    chunks = -(-rows // chunk)
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        j0 = t * tile
        j1 = min(j0 + tile, width)
        column_mean = np.empty(j1 - j0, mean.dtype)
        column_scale = np.empty(j1 - j0, mean.dtype)
        column_shift = np.empty(j1 - j0, mean.dtype)
        expand(mean, column_mean, j0, channels, inner)
        expand(scale, column_scale, j0, channels, inner)
        expand(shift, column_shift, j0, channels, inner)
        for r in range(k * chunk, min(k * chunk + chunk, rows)):
            result = run(out, r, 0, j0, j1)
            values = run(x, r, 0, j0, j1)
            if addend.size:
                added = run(addend, r, 0, j0, j1)
                normalize_add_row(values, added, result, column_mean, column_scale, column_shift, floor)
            else:
                normalize_row(values, result, column_mean, column_scale, column_shift, floor)
