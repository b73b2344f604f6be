"""Statistics where channels lie side by side (channels-last, `(N, C)`) or `inner` is short (7x7 feature maps).

A block takes a tile of whole channels, `inner` columns each, and a share of the rows. A thread owns as many columns
as one load brings, whichever channels they belong to, so no lane idles on a 7x7 map; the columns of a channel are
added up at the end, in shared memory.
"""

import math
from functools import cache

from numba import cuda, float32, float64, int32, int64, uint8

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import kernel
from nbbn.cuda.lanes import CHANNELS, PUT, REPEAT, TAKE
from nbbn.cuda.reduce import SLOTS, block_sums, is_last, make_careful_sums, origin_is_far, sums_hold
from nbbn.cuda.storage import KINDS
from nbbn.cuda.tiles import (
    add_lanes,
    channel_sums,
    columns_of_tile,
    make_tile_sums,
    store_parts,
    sum_over_splits,
)

#: Values a channel that its origin is the mean of, at least.
SAMPLE = 8


@cache
def source(kind_name, lanes):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    kind = KINDS[kind_name]
    load, load_one = simd.LOAD[kind_name, lanes], simd.LOAD[kind_name, 1]
    arithmetic = float32 if kind.narrow_sums else float64
    cast = simd.narrow if kind.narrow_sums else simd.wide
    is_integer = kind.integer
    careful_sums = make_careful_sums(load_one)
    tile_sums = make_tile_sums(lanes)
    add, subtract, multiply, fma = simd.add, simd.subtract, simd.multiply, simd.fma
    magnitude, finite_or_zero, wide = simd.magnitude, simd.finite_or_zero, simd.wide
    repeat, channels_of, take, put = REPEAT[lanes], CHANNELS[lanes], TAKE[lanes], PUT[lanes]
    size = columns_of_tile(lanes)

    def moments_columns(
        x, outer_stride, outer, channels, inner, tile, across, deep, tiles, splits, work, tickets, count, mean, m2,
        running_mean, running_var, momentum, ddof, flags, skipped,
    ):  # fmt: skip
        origins = cuda.shared.array(size, arithmetic)
        varies = cuda.shared.array(size, uint8)
        sums = cuda.shared.array(size, float64)
        squares = cuda.shared.array(size, float64)
        slots = cuda.shared.array(SLOTS, float64)
        ticket = cuda.shared.array(1, int32)
        thread, threads = int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        split = int64(cuda.blockIdx.x) // tiles
        number = int64(cuda.blockIdx.x) - split * tiles
        c0 = number * tile
        present = min(tile, channels - c0)
        start = c0 * inner
        row = thread // across
        j = (thread - row * across) * lanes
        active = row < deep and j < present * inner

        # one origin per channel, near its mean: the same in every block that shares the channel
        for k in range(thread, present, threads):
            first = arithmetic(load_one(x, start + k * inner)[0])
            origins[k] = first if abs(first) < math.inf else arithmetic(0)
        cuda.syncthreads()
        samples = min(outer, max(2, SAMPLE // inner))
        k = channels_of(j, inner)
        if active and row == 0:
            reference = take(origins, k)
            total = repeat(arithmetic(0))
            size_of_all = repeat(arithmetic(0))
            for sample in range(samples):
                values = cast(load(x, start + outer * sample // samples * outer_stride + j))
                values = finite_or_zero(subtract(values, reference))
                total = add(total, values)
                size_of_all = add(size_of_all, magnitude(values))
            put(sums, j, wide(total))
            put(squares, j, wide(size_of_all))
        cuda.syncthreads()
        for c in range(thread, present, threads):
            first, second = channel_sums(c, inner, sums, squares)
            near = origins[c] + arithmetic(first / (samples * inner))
            if is_integer:
                near = near // arithmetic(1)  # deviations are whole then, and their sums exact
            if abs(near) < math.inf:
                origins[c] = near
            varies[c] = 1 if second != 0.0 else 0
        cuda.syncthreads()

        r0 = outer * split // splits
        r1 = outer * (split + 1) // splits
        total = total_low = square = square_low = repeat(arithmetic(0))
        if active:
            origin = take(origins, k)
            r = r0 + row
            while r + 3 * deep < r1:
                index = start + r * outer_stride + j
                step = deep * outer_stride
                a = load(x, index)
                b = load(x, index + step)
                d = load(x, index + 2 * step)
                e = load(x, index + 3 * step)
                a = subtract(cast(a), origin)
                b = subtract(cast(b), origin)
                d = subtract(cast(d), origin)
                e = subtract(cast(e), origin)
                total, total_low = add_lanes(total, total_low, add(add(a, b), add(d, e)))
                products = fma(a, a, fma(b, b, fma(d, d, multiply(e, e))))
                square, square_low = add_lanes(square, square_low, products)
                r += 4 * deep
            while r < r1:
                a = subtract(cast(load(x, start + r * outer_stride + j)), origin)
                total, total_low = add_lanes(total, total_low, a)
                square, square_low = add_lanes(square, square_low, multiply(a, a))
                r += deep
        tile_sums(active, j, row, deep, (total, total_low), (square, square_low), sums, squares)

        values = (r1 - r0) * inner
        lost = int32(0)
        for c in range(thread, present, threads):
            first, second = channel_sums(c, inner, sums, squares)
            if not sums_hold(values, first, second, varies[c]):
                lost = int32(1)
        if cuda.syncthreads_or(lost):
            for c in range(present):
                if not sums_hold(values, sums[c * inner], squares[c * inner], varies[c]):
                    first, second = careful_sums(
                        x, start + c * inner, outer_stride, inner, r0 * inner, r1 * inner, float64(origins[c])
                    )
                    first, second = block_sums(first, second, slots)
                    if thread == 0:
                        sums[c * inner] = first
                        squares[c * inner] = second
                    cuda.syncthreads()

        apart = inner  # where a channel's sums are
        if splits > 1:
            store_parts(work, split, channels, c0, present, inner, sums, squares)
            if not is_last(tickets, number, splits, ticket):
                return
            sum_over_splits(work, splits, channels, c0, present, sums, squares)
            apart = int64(1)
        values = outer * inner
        far = int32(0)
        for c in range(thread, present, threads):
            average, deviations = formulas.from_deviations(
                values, float64(origins[c]), sums[c * apart], squares[c * apart]
            )
            if origin_is_far(squares[c * apart], deviations):
                far = int32(1)
            else:
                formulas.finish(
                    c0 + c, values, average, deviations, count, mean, m2, running_mean, running_var, momentum, ddof,
                    flags, skipped,
                )  # fmt: skip
        if cuda.syncthreads_or(far):
            for c in range(present):
                average, deviations = formulas.from_deviations(
                    values, float64(origins[c]), sums[c * apart], squares[c * apart]
                )
                if origin_is_far(squares[c * apart], deviations):
                    first, second = careful_sums(x, start + c * inner, outer_stride, inner, 0, values, average)
                    first, second = block_sums(first, second, slots)
                    average, deviations = formulas.from_deviations(values, average, first, second)
                    if thread == 0:
                        formulas.finish(
                            c0 + c, values, average, deviations, count, mean, m2, running_mean, running_var, momentum,
                            ddof, flags, skipped,
                        )  # fmt: skip

    return moments_columns


@cache
def compiled(kind_name, lanes):
    """The kernel for one kind of storage, `lanes` columns a thread."""
    return kernel(source(kind_name, lanes))
