"""The columns family, backward. `mean` is the high part of the mean in the arithmetic precision."""

import numpy as np
from numba import prange

from nbbn.cpu.columns import BLOCK_ROWS, CHUNK_ROWS, affine_grid, expand, tile_width
from nbbn.cpu.jit import elementwise, formula, kernel, reduction
from nbbn.cpu.simd import fmuladd, run


@reduction
def add_gradients(gradients, values, mean, total, products):
    for j in range(mean.size):
        total[j] += gradients[j]
        products[j] += gradients[j] * (values[j] - mean[j])


@formula
def tile_gradient_sums(gradients, x, mean, r0, r1, j0, j1, channels, inner, total, products):
    """Add the sums of g and g * (x - mean) over columns [j0, j1) of rows [r0, r1) to total[c], products[c]."""
    width = j1 - j0
    column_mean = np.empty(width, mean.dtype)
    expand(mean, column_mean, j0, channels, inner)
    block_total = np.empty(width, mean.dtype)
    block_products = np.empty(width, mean.dtype)
    for r in range(r0, r1, BLOCK_ROWS):
        block_total[:] = 0
        block_products[:] = 0
        for i in range(r, min(r + BLOCK_ROWS, r1)):
            add_gradients(run(gradients, i, 0, j0, j1), run(x, i, 0, j0, j1), column_mean, block_total, block_products)
        for j in range(width):
            c = ((j0 + j) // inner) % channels
            total[c] += np.float64(block_total[j])
            products[c] += np.float64(block_products[j])


@kernel(reads=("gradients", "x", "tail_gradients", "tail", "mean"))
def gradient_sums(gradients, x, tail_gradients, tail, channels, inner, mean, total, products):
    """total[c] = sum of g, products[c] = sum of g * (x - mean[c]); `tail` as in `columns.moments`."""
    rows, _, width = x.shape
    tile = tile_width(width, channels, inner)
    tiles = -(-width // tile)
    chunks = -(-rows // CHUNK_ROWS)
    part_total = np.zeros((chunks + 1, channels))
    part_products = np.zeros((chunks + 1, channels))
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0 = k * CHUNK_ROWS
        r1 = min(r0 + CHUNK_ROWS, rows)
        j0 = t * tile
        j1 = min(j0 + tile, width)
        tile_gradient_sums(gradients, x, mean, r0, r1, j0, j1, channels, inner, part_total[k], part_products[k])
    if tail.shape[0]:
        start = np.int64(0)  # not a literal: see `columns.moments`
        tile_gradient_sums(
            tail_gradients,
            tail,
            mean,
            start,
            tail.shape[0],
            start,
            channels * inner,
            channels,
            inner,
            part_total[chunks],
            part_products[chunks],
        )
    total[:] = 0.0
    products[:] = 0.0
    for k in range(chunks + 1):
        for c in range(channels):
            total[c] += part_total[k, c]
            products[c] += part_products[k, c]


@elementwise
def gradient_row(gradients, values, result, mean, scale, slope, offset):
    for j in range(values.size):
        result[j] = fmuladd(scale[j], gradients[j], fmuladd(slope[j], values[j] - mean[j], offset[j]))


@kernel(reads=("gradients", "x", "mean", "scale", "slope", "offset"))
def apply(gradients, x, channels, inner, mean, scale, slope, offset, grad_x):
    """grad_x = scale * g + slope * (x - mean) + offset."""
    rows, _, width = x.shape
    tile, chunk = affine_grid(rows, width)
    tiles = -(-width // tile)
    chunks = -(-rows // chunk)
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        j0 = t * tile
        j1 = min(j0 + tile, width)
        columns = np.empty((4, j1 - j0), mean.dtype)
        expand(mean, columns[0], j0, channels, inner)
        expand(scale, columns[1], j0, channels, inner)
        expand(slope, columns[2], j0, channels, inner)
        expand(offset, columns[3], j0, channels, inner)
        for r in range(k * chunk, min(k * chunk + chunk, rows)):
            gradient_row(
                run(gradients, r, 0, j0, j1),
                run(x, r, 0, j0, j1),
                run(grad_x, r, 0, j0, j1),
                columns[0],
                columns[1],
                columns[2],
                columns[3],
            )
