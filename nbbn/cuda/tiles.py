"""What the kernels of the columns family share: sums over a tile's columns, over its channels, over the splits."""

from numba import cuda, float64

from nbbn.cuda import simd
from nbbn.cuda.jit import device
from nbbn.cuda.lanes import INCREASE, PUT
from nbbn.cuda.launch import COLUMN_THREADS


def columns_of_tile(lanes):
    """Most columns of a tile: what shared memory has room for."""
    return COLUMN_THREADS // 2 * lanes


@device
def add_lanes(high, low, values):
    """`reduce.two_sum`, lane by lane."""
    result = simd.add(high, values)
    shown = simd.subtract(result, high)
    lost = simd.add(simd.subtract(high, simd.subtract(result, shown)), simd.subtract(values, shown))
    return result, simd.add(low, lost)


def make_tile_sums(lanes):
    """Sums over the threads that take the same columns, into shared memory."""
    put, increase, wide, add = PUT[lanes], INCREASE[lanes], simd.wide, simd.add

    @device
    def tile_sums(active, j, row, deep, first, second, sums, squares):
        """Add lanes (pairs of high and low) of the threads of column j in the order of their rows."""
        for turn in range(deep):
            if active and row == turn:
                a = add(wide(first[0]), wide(first[1]))
                b = add(wide(second[0]), wide(second[1]))
                if turn == 0:
                    put(sums, j, a)
                    put(squares, j, b)
                else:
                    increase(sums, j, a)
                    increase(squares, j, b)
            cuda.syncthreads()

    return tile_sums


@device
def channel_sums(k, inner, sums, squares):
    """Sums over the columns of a channel of the tile, left in its first column."""
    first = sums[k * inner]
    second = squares[k * inner]
    for column in range(k * inner + 1, (k + 1) * inner):
        first += sums[column]
        second += squares[column]
    sums[k * inner] = first
    squares[k * inner] = second
    return first, second


@device
def store_parts(work, split, channels, c0, present, inner, sums, squares):
    """Hand this block's sums of every channel of the tile to the block that will be the last."""
    for k in range(cuda.threadIdx.x, present, cuda.blockDim.x):
        pair = 2 * (split * channels + c0 + k)
        simd.store_float64(work, pair, sums[k * inner])
        simd.store_float64(work, pair + 1, squares[k * inner])


@device
def sum_over_splits(work, splits, channels, c0, present, sums, squares):
    """Sums of what all blocks of the tile stored, into element k for channel c0 + k: groups of threads share it."""
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    width = min(present, threads)
    groups = min(threads // width, splits)
    group = thread // width
    for base in range(0, present, width):
        k = base + thread - group * width
        mine = group < groups and k < present
        first = float64(0.0)
        second = float64(0.0)
        if mine:
            for split in range(group, splits, groups):
                pair = 2 * (split * channels + c0 + k)
                first += simd.load_shared_result(work, pair)
                second += simd.load_shared_result(work, pair + 1)
        for turn in range(groups):
            if mine and group == turn:
                sums[k] = first if turn == 0 else sums[k] + first
                squares[k] = second if turn == 0 else squares[k] + second
            cuda.syncthreads()
