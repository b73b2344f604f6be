"""Sums of the gradient, and of the gradient times the deviation, per channel: the parameter gradients."""

from functools import cache

from numba import cuda, float64, int32, int64

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import device, kernel
from nbbn.cuda.lanes import CHANNELS, REPEAT, TAKE
from nbbn.cuda.reduce import (
    SLOTS,
    advance,
    block_sums,
    is_last,
    part_of,
    strides_of_block,
    sum_over_parts,
    two_sum,
)
from nbbn.cuda.tiles import (
    add_lanes,
    channel_sums,
    columns_of_tile,
    make_tile_sums,
    store_parts,
    sum_over_splits,
)


def make_careful_products(load_gradient, load):
    """The sums in float64, value by value, for what float32 cannot hold."""

    @device
    def careful_products(g, g_start, g_stride, x, x_start, x_stride, inner, first, end, mean):
        """Of this thread's share of values `first` to `end` of a channel, numbered row by row."""
        total = 0.0
        products = 0.0
        for position in range(first + cuda.threadIdx.x, end, cuda.blockDim.x):
            o = position // inner
            i = position - o * inner
            gradient = float64(load_gradient(g, g_start + o * g_stride + i)[0])
            total += gradient
            products += gradient * (float64(load(x, x_start + o * x_stride + i)[0]) - mean)
        return total, products

    return careful_products


def make_part_products(g_name, x_name, lanes):
    """Sums over a part of a channel, by a whole block."""
    load_gradient, load = simd.LOAD[g_name, lanes], simd.LOAD[x_name, lanes]
    is_narrow, arithmetic, cast = simd.arithmetic_of(g_name, x_name)
    add, subtract, multiply, fma, total_of = simd.add, simd.subtract, simd.multiply, simd.fma, simd.total
    careful_products = make_careful_products(simd.LOAD[g_name, 1], simd.LOAD[x_name, 1])

    @device
    def part_products(
        g, g_start, g_stride, x, x_start, x_stride, inner, begin, end, c, mean, var, weight, eps, flags, slots
    ):
        """Sums of g and of g * (x - high) of values `begin` to `end`, and what the mean has besides high."""
        center = formulas.parameter(mean, c, flags & formulas.WIDE_MEAN)
        high = arithmetic(center)
        position, o, i, step, step_o, step_i = strides_of_block(begin, inner, lanes)
        total = total_low = products = products_low = arithmetic(0)
        while position + step < end:
            p, j = advance(o, i, step_o, step_i, inner)
            a = cast(load_gradient(g, g_start + o * g_stride + i))
            b = cast(load_gradient(g, g_start + p * g_stride + j))
            d = subtract(cast(load(x, x_start + o * x_stride + i)), high)
            e = subtract(cast(load(x, x_start + p * x_stride + j)), high)
            total, total_low = two_sum(total, total_low, total_of(add(a, b)))
            products, products_low = two_sum(products, products_low, total_of(fma(a, d, multiply(b, e))))
            o, i = advance(p, j, step_o, step_i, inner)
            position += 2 * step
        if position < end:
            a = cast(load_gradient(g, g_start + o * g_stride + i))
            d = subtract(cast(load(x, x_start + o * x_stride + i)), high)
            total, total_low = two_sum(total, total_low, total_of(a))
            products, products_low = two_sum(products, products_low, total_of(multiply(a, d)))

        first = float64(total) + float64(total_low)
        second = float64(products) + float64(products_low)
        first, second = block_sums(first, second, slots)
        inv_std = formulas.inverse_std(formulas.parameter(var, c, flags & formulas.WIDE_VAR), eps)
        holds = formulas.is_finite(first) and formulas.is_finite(second)
        if is_narrow and not (
            holds and formulas.gradient_fits_float32(center, inv_std, formulas.weight_of(weight, c, flags))
        ):
            first, second = careful_products(
                g, g_start, g_stride, x, x_start, x_stride, inner, begin, end, float64(high)
            )
            first, second = block_sums(first, second, slots)
        return first, second, center - float64(high)

    return part_products


@cache
def rows_source(g_name, x_name, lanes):
    """The kernel for long rows as plain Python."""
    part_products = make_part_products(g_name, x_name, lanes)

    def gradient_sums_rows(
        g, g_stride, g_channel, x, x_stride, x_channel, outer, inner, parts, work, tickets, totals, mean, var, weight,
        eps, flags, grad_weight, grad_bias,
    ):  # fmt: skip
        slots = cuda.shared.array(SLOTS, float64)
        ticket = cuda.shared.array(1, int32)
        c = int64(cuda.blockIdx.x) // parts
        part = int64(cuda.blockIdx.x) - c * parts
        begin, end = part_of(outer * inner, lanes, part, parts)
        first, second, low = part_products(
            g, c * g_channel, g_stride, x, c * x_channel, x_stride, inner, begin, end, c, mean, var, weight, eps, flags,
            slots,
        )  # fmt: skip
        if parts > 1:
            if cuda.threadIdx.x == 0:
                simd.store_float64(work, 2 * (c * parts + part), first)
                simd.store_float64(work, 2 * (c * parts + part) + 1, second)
            if not is_last(tickets, c, parts, ticket):
                return
            first, second = sum_over_parts(work, c * parts, 1, parts, slots)
        if cuda.threadIdx.x == 0:
            formulas.finish_gradients(
                c, first, second, low, mean, var, eps, flags, totals, grad_weight, grad_bias
            )  # fmt: skip

    return gradient_sums_rows


@cache
def columns_source(g_name, x_name, lanes):
    """The kernel for channels side by side as plain Python."""
    load_gradient, load = simd.LOAD[g_name, lanes], simd.LOAD[x_name, lanes]
    is_narrow, arithmetic, cast = simd.arithmetic_of(g_name, x_name)
    add, subtract, multiply, fma = simd.add, simd.subtract, simd.multiply, simd.fma
    careful_products = make_careful_products(simd.LOAD[g_name, 1], simd.LOAD[x_name, 1])
    tile_sums = make_tile_sums(lanes)
    repeat, channels_of, take = REPEAT[lanes], CHANNELS[lanes], TAKE[lanes]
    size = columns_of_tile(lanes)

    def gradient_sums_columns(
        g, g_stride, x, x_stride, outer, channels, inner, tile, across, deep, tiles, splits, work, tickets, totals,
        mean, var, weight, eps, flags, grad_weight, grad_bias,
    ):  # fmt: skip
        highs = cuda.shared.array(size, arithmetic)
        sums = cuda.shared.array(size, float64)
        products = cuda.shared.array(size, float64)
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
        for c in range(thread, present, threads):
            highs[c] = arithmetic(formulas.parameter(mean, c0 + c, flags & formulas.WIDE_MEAN))
        cuda.syncthreads()

        r0 = outer * split // splits
        r1 = outer * (split + 1) // splits
        total = total_low = product = product_low = repeat(arithmetic(0))
        if active:
            high = take(highs, channels_of(j, inner))
            r = r0 + row
            while r + deep < r1:
                a = cast(load_gradient(g, r * g_stride + start + j))
                b = cast(load_gradient(g, (r + deep) * g_stride + start + j))
                d = subtract(cast(load(x, r * x_stride + start + j)), high)
                e = subtract(cast(load(x, (r + deep) * x_stride + start + j)), high)
                total, total_low = add_lanes(total, total_low, add(a, b))
                product, product_low = add_lanes(product, product_low, fma(a, d, multiply(b, e)))
                r += 2 * deep
            if r < r1:
                a = cast(load_gradient(g, r * g_stride + start + j))
                d = subtract(cast(load(x, r * x_stride + start + j)), high)
                total, total_low = add_lanes(total, total_low, a)
                product, product_low = add_lanes(product, product_low, multiply(a, d))
        tile_sums(active, j, row, deep, (total, total_low), (product, product_low), sums, products)

        lost = int32(0)
        for c in range(thread, present, threads):
            first, second = channel_sums(c, inner, sums, products)
            if is_narrow and not (formulas.is_finite(first) and formulas.is_finite(second)):
                lost = int32(1)
            center = formulas.parameter(mean, c0 + c, flags & formulas.WIDE_MEAN)
            inv_std = formulas.inverse_std(formulas.parameter(var, c0 + c, flags & formulas.WIDE_VAR), eps)
            w = formulas.weight_of(weight, c0 + c, flags)
            if is_narrow and not formulas.gradient_fits_float32(center, inv_std, w):
                lost = int32(1)
        if cuda.syncthreads_or(lost):
            for c in range(present):
                place = start + c * inner
                first, second = careful_products(
                    g, place, g_stride, x, place, x_stride, inner, r0 * inner, r1 * inner, float64(highs[c])
                )
                first, second = block_sums(first, second, slots)
                if thread == 0:
                    sums[c * inner] = first
                    products[c * inner] = second
            cuda.syncthreads()
        apart = inner  # where a channel's sums are
        if splits > 1:
            store_parts(work, split, channels, c0, present, inner, sums, products)
            if not is_last(tickets, number, splits, ticket):
                return
            sum_over_splits(work, splits, channels, c0, present, sums, products)
            apart = int64(1)
        for c in range(thread, present, threads):
            low = formulas.parameter(mean, c0 + c, flags & formulas.WIDE_MEAN) - float64(highs[c])
            formulas.finish_gradients(
                c0 + c, sums[c * apart], products[c * apart], low, mean, var, eps, flags, totals, grad_weight,
                grad_bias,
            )  # fmt: skip

    return gradient_sums_columns


@cache
def rows(g_name, x_name, lanes):
    """The kernel for long rows."""
    return kernel(rows_source(g_name, x_name, lanes))


@cache
def columns(g_name, x_name, lanes):
    """The kernel for channels side by side."""
    return kernel(columns_source(g_name, x_name, lanes))
