"""The columns family, backward. `mean` is the high part of the mean in the arithmetic precision."""

import math

import numpy as np
from numba import prange

from nbbn.cpu.affine import gradient_row
from nbbn.cpu.channels import gradient_coefficients
from nbbn.cpu.columns import parts
from nbbn.cpu.columns_forward import affine_grid
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.memory import deviation, deviations, element, load, run, store
from nbbn.cpu.rows_backward import add_chunks, products_are_exact
from nbbn.cpu.scratch import lesser, scratch, scratch_rows, zero_rows, zeros
from nbbn.cpu.sharing import next_task, shared, someone_was_late
from nbbn.cpu.tiles import BLOCK_ROWS, CHUNK_ROWS, STRIP, clear, expand, part
from nbbn.cpu.vector import LANES, fmuladd, splat


@formula
def add_gradients(gradients, x, r, step, rows, j0, mean, total, products):
    """Add g and g * (x - mean) of `rows` rows to sums per column."""
    like = mean.dtype.type(0)
    width = mean.size
    j1 = j0 + width
    j = 0
    while j + LANES <= width:
        first = splat(like)
        second = first
        for k in range(rows):
            r_k = r + k * step
            g = load(run(gradients, r_k, 0, j0, j1), j, like)
            first = first + g
            second = fmuladd(g, deviations(run(x, r_k, 0, j0, j1), j, mean), second)
        store(total, j, load(total, j, like) + first)
        store(products, j, load(products, j, like) + second)
        j += LANES
    while j < width:
        for k in range(rows):
            r_k = r + k * step
            single = element(run(gradients, r_k, 0, j0, j1), j, like)
            total[j] += single
            products[j] = fmuladd(single, deviation(run(x, r_k, 0, j0, j1), j, mean), products[j])
        j += 1


@formula
def block_gradient_sums(gradients, x, r0, r1, step, j0, mean, total, products):
    """Sums of g and g * (x - mean) per column of one block, in the precision of `mean`. False if unsafe."""
    clear(total)
    clear(products)
    r = r0
    while r + STRIP * step <= r1:
        add_gradients(gradients, x, r, step, STRIP, j0, mean, total, products)
        r += STRIP * step
    while r < r1:
        add_gradients(gradients, x, r, step, 1, j0, mean, total, products)
        r += step
    safe = True
    for j in range(mean.size):
        safe &= products_are_exact(products[j], mean.dtype) and math.isfinite(total[j])
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
    column_mean = scratch(width, mean.dtype.type(0))
    expand(mean, column_mean, j0, inner)
    block_total = scratch(width, mean.dtype.type(0))
    block_products = scratch(width, mean.dtype.type(0))
    for r in range(r0, r1, BLOCK_ROWS * step):
        end = lesser(r + BLOCK_ROWS * step, r1)
        if block_gradient_sums(gradients, x, r, end, step, j0, column_mean, block_total, block_products):
            add_columns(block_total, block_products, j0, inner, total, products)
        else:
            wide_mean = scratch(width, 0.0)
            wide_total = scratch(width, 0.0)
            wide_products = scratch(width, 0.0)
            for j in range(width):
                wide_mean[j] = column_mean[j]
            block_gradient_sums(gradients, x, r, end, step, j0, wide_mean, wide_total, wide_products)
            add_columns(wide_total, wide_products, j0, inner, total, products)


@formula
def part_gradient_sums(gradients, x, mean, task, tiles, fold, tile, part_total, part_products):
    """The same for part number `task`, added to the row of its chunk."""
    outer, channels, inner = x.shape
    k, r0, r1, step, j0, j1 = part(task, tiles, tile, CHUNK_ROWS, outer, fold, channels * inner)
    tile_gradient_sums(gradients, x, mean, r0, r1, step, j0, j1, part_total[k], part_products[k])


@kernel(reads=("gradients", "x", "mean"))
def gradient_sums(workers, gradients, x, fold, tile, mean, total, products):
    """total[c] = sum of g, products[c] = sum of g * (x - mean[c])."""
    channels = x.shape[1]
    chunks, tiles = parts(x, fold, tile)
    part_total = zero_rows(chunks, channels, 0.0)
    part_products = zero_rows(chunks, channels, 0.0)
    tasks = chunks * tiles
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            part_gradient_sums(gradients, x, mean, task, tiles, fold, tile, part_total, part_products)
            task = next_task(np.int64(worker), taken, tasks, task)
    for c in range(channels):
        total[c], products[c] = add_chunks(part_total[:, c], part_products[:, c])
    return someone_was_late(taken)


@formula
def write_tile(gradients, x, r0, r1, step, j0, j1, mean, scale, slope, offset, far, streaming, grad_x):
    """grad_x in columns [j0, j1) of rows [r0, r1)."""
    inner = x.shape[2]
    columns = scratch_rows(4, j1 - j0, mean.dtype.type(0))
    expand(mean, columns[0], j0, inner)
    expand(scale, columns[1], j0, inner)
    expand(slope, columns[2], j0, inner)
    expand(offset, columns[3], j0, inner)
    like = mean.dtype.type(0)
    ready = columns[0], columns[1], columns[2], columns[3]
    for r in range(r0, r1, step):
        gradient_row(
            run(grad_x, r, 0, j0, j1), (run(gradients, r, 0, j0, j1), run(x, r, 0, j0, j1)), ready, like, far, streaming
        )


@kernel(reads=("gradients", "x", "mean", "scale", "slope", "offset"))
def apply(workers, gradients, x, fold, mean, scale, slope, offset, streaming, grad_x):
    """grad_x = scale * g + slope * (x - mean) + offset."""
    outer, channels, inner = x.shape
    tile, tiles, chunk, chunks = affine_grid(outer, fold, fold * channels * inner)
    tasks = chunks * tiles
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            _, r0, r1, step, j0, j1 = part(task, tiles, tile, chunk, outer, fold, channels * inner)
            write_tile(gradients, x, r0, r1, step, j0, j1, mean, scale, slope, offset, True, streaming, grad_x)
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)


@kernel(reads=("gradients", "x", "mean", "high", "inv_std", "weight"))
def backward_by_tile(
    workers, gradients, x, mean, high, inv_std, weight, tile, streaming, grad_x, grad_weight, grad_bias
):
    """Sums, then the input gradient, one tile of whole channels at a time: the second read finds it in cache."""
    outer, channels, inner = x.shape
    width = channels * inner
    total = zeros(channels, 0.0)
    products = zeros(channels, 0.0)
    scale = scratch(channels, high.dtype.type(0))
    slope = scratch(channels, high.dtype.type(0))
    offset = scratch(channels, high.dtype.type(0))
    tasks = -(-width // tile)
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            j0 = task * tile
            j1 = lesser(j0 + tile, width)
            tile_gradient_sums(gradients, x, high, np.int64(0), outer, np.int64(1), j0, j1, total, products)
            for c in range(j0 // inner, j1 // inner):
                scale[c], slope[c], offset[c], grad_weight[c], grad_bias[c] = gradient_coefficients(
                    outer * inner, total[c], products[c], mean[c], high[c], inv_std[c], weight, c
                )
            write_tile(
                gradients,
                x,
                np.int64(0),
                outer,
                np.int64(1),
                j0,
                j1,
                high,
                scale,
                slope,
                offset,
                False,
                streaming,
                grad_x,
            )
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)
