"""Statistics where `inner` is long: a channel is a set of contiguous rows, and blocks share it.

A block takes a part of one channel's vectors, numbered row by row, so that no lane idles at the ends of short rows.
Sums of deviations from one origin per channel, the same in every block, simply add up: no merging formula is needed,
and the last block to finish adds the parts in their order.
"""

from functools import cache

from numba import cuda, float32, float64, int32, int64

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import device, kernel
from nbbn.cuda.reduce import (
    SLOTS,
    advance,
    block_sums,
    is_last,
    make_careful_sums,
    make_origin,
    origin_is_far,
    part_of,
    strides_of_block,
    sum_over_parts,
    sums_hold,
    two_sum,
)
from nbbn.cuda.storage import KINDS


def make_part_sums(kind_name, lanes):
    """Sums over a part of a channel, by a whole block."""
    kind = KINDS[kind_name]
    load = simd.LOAD[kind_name, lanes]
    arithmetic = float32 if kind.narrow_sums else float64
    cast = simd.narrow if kind.narrow_sums else simd.wide
    careful_sums = make_careful_sums(simd.LOAD[kind_name, 1])
    add, subtract, multiply, fma, total_of = simd.add, simd.subtract, simd.multiply, simd.fma, simd.total

    @device
    def part_sums(x, start, outer_stride, inner, begin, end, origin, spread, slots):
        """Sums of d and d * d, d = x - origin, of values `begin` to `end`: the same bits in every thread."""
        position, o, i, step, step_o, step_i = strides_of_block(begin, inner, lanes)
        total = total_low = squares = squares_low = arithmetic(0)
        while position + 3 * step < end:
            a = load(x, start + o * outer_stride + i)
            o, i = advance(o, i, step_o, step_i, inner)
            b = load(x, start + o * outer_stride + i)
            o, i = advance(o, i, step_o, step_i, inner)
            d = load(x, start + o * outer_stride + i)
            o, i = advance(o, i, step_o, step_i, inner)
            e = load(x, start + o * outer_stride + i)
            o, i = advance(o, i, step_o, step_i, inner)
            a = subtract(cast(a), origin)
            b = subtract(cast(b), origin)
            d = subtract(cast(d), origin)
            e = subtract(cast(e), origin)
            # few values add up in float32 before rounding is caught: 16 of float32, 32 of halves
            total, total_low = two_sum(total, total_low, total_of(add(add(a, b), add(d, e))))
            products = fma(a, a, fma(b, b, fma(d, d, multiply(e, e))))
            squares, squares_low = two_sum(squares, squares_low, total_of(products))
            position += 4 * step
        while position < end:
            a = subtract(cast(load(x, start + o * outer_stride + i)), origin)
            total, total_low = two_sum(total, total_low, total_of(a))
            squares, squares_low = two_sum(squares, squares_low, total_of(multiply(a, a)))
            o, i = advance(o, i, step_o, step_i, inner)
            position += step

        first = float64(total) + float64(total_low)
        second = float64(squares) + float64(squares_low)
        first, second = block_sums(first, second, slots)
        if not sums_hold(end - begin, first, second, spread):
            first, second = careful_sums(x, start, outer_stride, inner, begin, end, float64(origin))
            first, second = block_sums(first, second, slots)
        return first, second

    return part_sums


def make_settled(kind_name):
    """Moments of a channel from its sums, by a whole block."""
    careful_sums = make_careful_sums(simd.LOAD[kind_name, 1])

    @device
    def settled(x, start, outer_stride, inner, values, center, first, second, slots):
        """(mean, m2), the same bits in every thread; summed again around the mean if the origin was far from it."""
        average, deviations = formulas.from_deviations(values, center, first, second)
        if origin_is_far(second, deviations):
            first, second = careful_sums(x, start, outer_stride, inner, 0, values, average)
            first, second = block_sums(first, second, slots)
            average, deviations = formulas.from_deviations(values, average, first, second)
        return average, deviations

    return settled


def make_origin_of(kind_name):
    """`reduce.make_origin` for this kind of storage."""
    kind = KINDS[kind_name]
    return make_origin(simd.LOAD[kind_name, 1], float32 if kind.narrow_sums else float64, kind.integer)


@cache
def source(kind_name, lanes):
    """The kernel as plain Python, and its name: for the compiler, the simulator and the PTX tests alike."""
    origin_of, part_sums, settled = make_origin_of(kind_name), make_part_sums(kind_name, lanes), make_settled(kind_name)

    def moments_rows(
        x, outer_stride, channel_stride, outer, inner, parts, work, tickets, count, mean, m2,
        running_mean, running_var, momentum, ddof, flags, skipped,
    ):  # fmt: skip
        slots = cuda.shared.array(SLOTS, float64)
        ticket = cuda.shared.array(1, int32)
        c = int64(cuda.blockIdx.x) // parts
        part = int64(cuda.blockIdx.x) - c * parts
        values = outer * inner
        start = c * channel_stride
        origin, spread = origin_of(x, start, outer_stride, inner, values)
        begin, end = part_of(values, lanes, part, parts)
        first, second = part_sums(x, start, outer_stride, inner, begin, end, origin, spread, slots)
        if parts > 1:
            if cuda.threadIdx.x == 0:
                simd.store_float64(work, 2 * (c * parts + part), first)
                simd.store_float64(work, 2 * (c * parts + part) + 1, second)
            if not is_last(tickets, c, parts, ticket):
                return
            first, second = sum_over_parts(work, c * parts, 1, parts, slots)
        center = float64(origin)
        average, deviations = settled(x, start, outer_stride, inner, values, center, first, second, slots)
        if cuda.threadIdx.x == 0:
            formulas.finish(
                c, values, average, deviations, count, mean, m2, running_mean, running_var, momentum, ddof, flags,
                skipped,
            )  # fmt: skip

    return moments_rows


@cache
def compiled(kind_name, lanes):
    """The kernel for one kind of storage, `lanes` values at a time."""
    return kernel(source(kind_name, lanes))
