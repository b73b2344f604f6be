"""How the columns family cuts rows of memory into tiles of columns, and chunks of rows.

The cut depends on the shape alone, never on the number of threads.
"""

import math

import numpy as np

from nbbn.cpu.jit import formula
from nbbn.cpu.scratch import lesser
from nbbn.cpu.vector import LANES

#: Columns worked on together: their accumulators (3 x 2 kB of float32) stay in the first-level cache.
TILE = 512

#: Rows worked on together: their accumulators are loaded and stored once. More would be more streams than a
#: processor prefetches.
STRIP = 8

#: Rows whose deviations are added up in the precision of the storage.
BLOCK_ROWS = 64

#: Rows a parallel chunk of statistics: merging a chunk's columns into channels costs about one row of work each.
CHUNK_ROWS = 512

# --- tiles --------------------------------------------------------------------------------------------------------


def tile_columns(width, inner):
    """Columns a tile of statistics: whole channels, about TILE columns of them, full vectors if possible."""
    channels = max(1, TILE // inner)
    full = LANES // math.gcd(LANES, inner)  # so many channels are full vectors
    if channels >= full:
        channels -= channels % full
    elif full * inner <= 2 * TILE:
        channels = full
    return min(width, channels * inner)


def rows_as_one(outer, channels, inner):
    """How many rows of contiguous memory to take as one, so that about TILE columns lie side by side."""
    # a folded row needs its coefficients expanded and its columns merged: worth it for 16 of them or more
    fold = min(TILE // (channels * inner), outer // 16)
    full = LANES // math.gcd(LANES, channels * inner)  # so many rows are full vectors
    return max(1, fold - fold % full if fold > full else fold)


@formula
def chunk_of_rows(k, chunk, outer, fold):
    """Rows [r0, r1) in steps of `step` of chunk number k; the chunk after the last holds what folding left over."""
    whole = outer // fold * fold
    r0 = k * chunk * fold
    if r0 < whole:
        return r0, lesser(r0 + chunk * fold, whole), fold
    return whole, outer, np.int64(1)


@formula
def chunks_of_rows(chunk, outer, fold):
    """How many such chunks there are."""
    whole = outer // fold
    return -(-whole // chunk) + (1 if whole * fold < outer else 0)


@formula
def part(task, tiles, tile, chunk, outer, fold, width):
    """(k, r0, r1, step, j0, j1): chunk k of rows, and a tile of its columns, of part number `task`."""
    k, t = divmod(task, tiles)
    r0, r1, step = chunk_of_rows(k, chunk, outer, fold)
    j0 = t * tile
    return k, r0, r1, step, j0, lesser(j0 + tile, step * width)


@formula
def clear(values):
    for j in range(values.size):  # a tenth of what values[:] = 0 takes to compile
        values[j] = 0


@formula
def expand(values, result, j0, inner):
    """Per-channel values to the columns from j0 on."""
    channels = values.size
    c = (j0 // inner) % channels
    i = j0 % inner
    j = 0
    while j < result.size:
        if inner == 1:
            n = lesser(channels - c, result.size - j)
            for k in range(n):
                result[j + k] = values[c + k]
            c = 0
        else:
            n = lesser(inner - i, result.size - j)
            value = values[c]
            for k in range(n):
                result[j + k] = value
            i = 0
            c = c + 1 if c + 1 < channels else 0
        j += n
