"""The columns family, forward: normalization, and training where a tile of columns stays in cache."""

import numpy as np
from numba import prange

from nbbn.cpu.affine import normalize_add_row, normalize_row, rare_add_row, rare_row
from nbbn.cpu.blocks import CHUNK
from nbbn.cpu.channels import fill_coefficients
from nbbn.cpu.columns import tile_moments
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.memory import run
from nbbn.cpu.scratch import greater, lesser, scratch_rows
from nbbn.cpu.sharing import next_task, shared, someone_was_late
from nbbn.cpu.tiles import TILE, chunks_of_rows, expand, part


@formula
def affine_grid(outer, fold, width):
    """(columns a tile, tiles, folded rows a chunk, chunks): about 4 * CHUNK values a task.

    The expanded coefficients of a tile stay in the first-level cache.
    """
    tile = lesser(width, 2 * TILE)
    chunk = greater(1, 4 * CHUNK // tile)
    return tile, -(-width // tile), chunk, chunks_of_rows(chunk, outer, fold)


@formula
def expanded(mean, scale, shift, start, size, inner):
    """Coefficients of channels as those of `size` columns from column `start` on."""
    columns = scratch_rows(3, size, mean.dtype.type(0))
    expand(mean, columns[0], start, inner)
    expand(scale, columns[1], start, inner)
    expand(shift, columns[2], start, inner)
    return columns[0], columns[1], columns[2]


@formula
def normalize_tile(x, addend, out, r0, r1, step, j0, j1, start, mean, scale, shift, floor, far, streaming):
    """Columns [j0, j1) of rows [r0, r1); `start` is the column among those that the coefficients are for."""
    ready = expanded(mean, scale, shift, start, j1 - j0, x.shape[2])
    for r in range(r0, r1, step):
        values = run(x, r, 0, j0, j1)
        result = run(out, r, 0, j0, j1)
        if addend is None:
            normalize_row(result, (values,), ready, floor, far, streaming)
        else:
            normalize_add_row(result, (values, run(addend, r, 0, j0, j1)), ready, floor, far, streaming)


@formula
def rare_tile(x, addend, out, j0, j1, wide, floor):
    """Columns [j0, j1) of all rows in float64."""
    ready = expanded(wide[0], wide[1], wide[2], 0, j1 - j0, x.shape[2])
    for r in range(x.shape[0]):
        values = run(x, r, 0, j0, j1)
        result = run(out, r, 0, j0, j1)
        if addend is None:
            rare_row(result, (values,), ready, np.float64(floor))
        else:
            rare_add_row(result, (values, run(addend, r, 0, j0, j1)), ready, np.float64(floor))


@kernel(reads=("x", "addend", "mean", "scale", "shift"))
def normalize(workers, x, addend, out, fold, mean, scale, shift, floor, streaming):
    """out = max((x - mean) * scale + shift + addend, floor)."""
    outer, channels, inner = x.shape
    tile, tiles, chunk, chunks = affine_grid(outer, fold, fold * channels * inner)
    tasks = chunks * tiles
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            _, r0, r1, step, j0, j1 = part(task, tiles, tile, chunk, outer, fold, channels * inner)
            normalize_tile(x, addend, out, r0, r1, step, j0, j1, j0, mean, scale, shift, floor, True, streaming)
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)


@kernel(reads=("x", "addend", "weight", "bias"))
def train_by_tile(workers, x, addend, out, weight, bias, eps, floor, tile, streaming, mean, m2):
    """Statistics, then normalize, one tile of whole channels at a time: the second read finds it in cache."""
    outer, channels, inner = x.shape
    width = channels * inner
    tasks = -(-width // tile)
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            j0 = task * tile
            j1 = lesser(j0 + tile, width)
            c0, c1 = j0 // inner, j1 // inner
            tile_moments(x, np.int64(0), outer, np.int64(1), j0, j1, mean, m2)
            wide = scratch_rows(3, c1 - c0, 0.0)
            narrow = scratch_rows(3, c1 - c0, floor)
            narrow_serves = True
            for c in range(c0, c1):
                var = m2[c] / (outer * inner)
                narrow_serves &= fill_coefficients(mean[c], var, weight, bias, c, eps, wide, narrow, c - c0)
            if narrow_serves:
                normalize_tile(
                    x, addend, out, 0, outer, 1, j0, j1, 0, narrow[0], narrow[1], narrow[2], floor, False, streaming
                )
            else:
                rare_tile(x, addend, out, j0, j1, wide, floor)
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)
