"""The columns family, backward. `mean` is the high part of the mean in the arithmetic precision."""

import numpy as np
from numba import prange

from nbbn.cpu.columns import BLOCK_ROWS, CHUNK_ROWS, affine_grid, chunk_of_rows, clear, expand, tile_width
from nbbn.cpu.jit import elementwise, formula, kernel, reduction
from nbbn.cpu.rows_backward import products_are_exact
from nbbn.cpu.simd import fmuladd, run


@reduction
def add_gradients(gradients, values, mean, total, products):
    for j in range(mean.size):
        total[j] += gradients[j]
        products[j] += gradients[j] * (values[j] - mean[j])


@formula
def block_gradient_sums(gradients, x, r0, r1, step, j0, mean, total, products):
    """Sums of g and g * (x - mean) per column of one block, in the precision of `mean`. False if unsafe."""
    clear(total)
    clear(products)
    j1 = j0 + mean.size
    for r in range(r0, r1, step):
        add_gradients(run(gradients, r, 0, j0, j1), run(x, r, 0, j0, j1), mean, total, products)
    safe = True
    for j in range(mean.size):
        safe &= products_are_exact(products[j], mean.dtype)
    return safe


@formula
def add_columns(column_total, column_products, j0, inner, total, products):
    """Add sums per column to those of their channels."""
    for j in range(column_total.size):
        c = ((j0 + j) // inner) % total.size
        total[c] += np.float64(column_total[j])
        products[c] += np.float64(column_products[j])


@formula
def tile_gradient_sums(gradients, x, mean, r0, r1, step, j0, j1, total, products):
    """Add the sums of g and g * (x - mean) over columns [j0, j1) of rows [r0, r1) to total[c], products[c]."""
    width = j1 - j0
    inner = x.shape[2]
    column_mean = np.empty(width, mean.dtype)
    expand(mean, column_mean, j0, inner)
    block_total = np.empty(width, mean.dtype)
    block_products = np.empty(width, mean.dtype)
    for r in range(r0, r1, BLOCK_ROWS * step):
        end = min(r + BLOCK_ROWS * step, r1)
        if block_gradient_sums(gradients, x, r, end, step, j0, column_mean, block_total, block_products):
            add_columns(block_total, block_products, j0, inner, total, products)
        else:
            wide_mean = np.empty(width)
            wide_total = np.empty(width)
            wide_products = np.empty(width)
            for j in range(width):
                wide_mean[j] = column_mean[j]
            block_gradient_sums(gradients, x, r, end, step, j0, wide_mean, wide_total, wide_products)
            add_columns(wide_total, wide_products, j0, inner, total, products)


@kernel(reads=("gradients", "x", "mean"))
def gradient_sums(gradients, x, fold, mean, total, products):
    """total[c] = sum of g, products[c] = sum of g * (x - mean[c])."""
    outer, channels, inner = x.shape
    width = fold * channels * inner
    tile = tile_width(width, fold, inner)
    tiles = -(-width // tile)
    whole = outer // fold
    chunks = -(-whole // CHUNK_ROWS) + (1 if whole * fold < outer else 0)
    part_total = np.zeros((chunks, channels))
    part_products = np.zeros((chunks, channels))
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0, r1, step = chunk_of_rows(k, CHUNK_ROWS, outer, fold)
        j0 = t * tile
        j1 = min(j0 + tile, step * channels * inner)
        tile_gradient_sums(gradients, x, mean, r0, r1, step, j0, j1, part_total[k], part_products[k])
    for c in range(channels):
        total[c] = 0.0
        products[c] = 0.0
        for k in range(chunks):
            total[c] += part_total[k, c]
            products[c] += part_products[k, c]


@elementwise
def gradient_row(gradients, values, result, mean, scale, slope, offset):
    for j in range(values.size):
        result[j] = fmuladd(scale[j], gradients[j], fmuladd(slope[j], values[j] - mean[j], offset[j]))


@kernel(reads=("gradients", "x", "mean", "scale", "slope", "offset"))
def apply(gradients, x, fold, mean, scale, slope, offset, grad_x):
    """grad_x = scale * g + slope * (x - mean) + offset."""
    outer, channels, inner = x.shape
    tile, tiles, chunk, chunks = affine_grid(outer, fold, fold * channels * inner)
    for task in prange(chunks * tiles):
        k, t = divmod(np.int64(task), tiles)
        r0, r1, step = chunk_of_rows(k, chunk, outer, fold)
        j0 = t * tile
        j1 = min(j0 + tile, step * channels * inner)
        columns = np.empty((4, j1 - j0), mean.dtype)
        expand(mean, columns[0], j0, inner)
        expand(scale, columns[1], j0, inner)
        expand(slope, columns[2], j0, inner)
        expand(offset, columns[3], j0, inner)
        for r in range(r0, r1, step):
            values = run(x, r, 0, j0, j1)
            result = run(grad_x, r, 0, j0, j1)
            gradient_row(run(gradients, r, 0, j0, j1), values, result, columns[0], columns[1], columns[2], columns[3])
