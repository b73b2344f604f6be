"""The input gradient of training: scale * g + slope * (x - mean) + offset, with coefficients from the two sums."""

from functools import cache

from numba import cuda, float64, int32, int64, uint8

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import device, kernel
from nbbn.cuda.lanes import CHANNELS, TAKE
from nbbn.cuda.reduce import advance, part_of, strides_of_block
from nbbn.cuda.tiles import columns_of_tile


def make_applied(g_name, x_name, out_name, lanes):
    """The input gradient of a part of a channel, by a whole block."""
    load_gradient, load, store = simd.LOAD[g_name, lanes], simd.LOAD[x_name, lanes], simd.STORE[out_name, lanes]
    load_one_gradient, load_one, store_one = simd.LOAD[g_name, 1], simd.LOAD[x_name, 1], simd.STORE[out_name, 1]
    is_narrow, arithmetic, cast = simd.arithmetic_of(g_name, x_name, out_name)
    add, subtract, multiply, fma, wide = simd.add, simd.subtract, simd.multiply, simd.fma, simd.wide

    @device
    def applied(
        g, g_start, g_stride, x, x_start, x_stride, out, out_start, out_stride, inner, begin, end, shared, serves
    ):
        """Of values `begin` to `end`, with the coefficients that `share_coefficients` left."""
        center = shared[0]
        scale = shared[1]
        slope = shared[2]
        offset = shared[3]
        if is_narrow and not serves[0]:
            for position in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
                o = position // inner
                i = position - o * inner
                d = subtract(wide(load_one(x, x_start + o * x_stride + i)), center)
                gradient = multiply(wide(load_one_gradient(g, g_start + o * g_stride + i)), scale)
                store_one(out, out_start + o * out_stride + i, add(fma(d, slope, gradient), offset))
            return

        high = arithmetic(center)
        low = center - float64(high)
        factor = arithmetic(scale)
        incline = arithmetic(slope)
        constant = arithmetic(offset - slope * low if abs(low) > 0.0 else offset)
        position, o, i, step, step_o, step_i = strides_of_block(begin, inner, lanes)
        while position + step < end:
            p, j = advance(o, i, step_o, step_i, inner)
            a = cast(load_gradient(g, g_start + o * g_stride + i))
            b = cast(load_gradient(g, g_start + p * g_stride + j))
            d = subtract(cast(load(x, x_start + o * x_stride + i)), high)
            e = subtract(cast(load(x, x_start + p * x_stride + j)), high)
            a = add(fma(d, incline, multiply(a, factor)), constant)
            b = add(fma(e, incline, multiply(b, factor)), constant)
            store(out, out_start + o * out_stride + i, a)
            store(out, out_start + p * out_stride + j, b)
            o, i = advance(p, j, step_o, step_i, inner)
            position += 2 * step
        if position < end:
            a = cast(load_gradient(g, g_start + o * g_stride + i))
            d = subtract(cast(load(x, x_start + o * x_stride + i)), high)
            store(out, out_start + o * out_stride + i, add(fma(d, incline, multiply(a, factor)), constant))

    return applied


@device
def share_coefficients(shared, serves, c, count, mean, var, weight, eps, flags, totals):
    """`formulas.input_gradient`, computed by one thread for the block."""
    if cuda.threadIdx.x == 0:
        center, scale, slope, offset, served = formulas.input_gradient(
            c, count, mean, var, weight, eps, flags, totals
        )  # fmt: skip
        shared[0] = center
        shared[1] = scale
        shared[2] = slope
        shared[3] = offset
        serves[0] = 1 if served else 0
    cuda.syncthreads()


@cache
def rows_source(g_name, x_name, out_name, lanes):
    """The kernel for long rows as plain Python."""
    applied = make_applied(g_name, x_name, out_name, lanes)

    def input_gradient_rows(
        g, g_stride, g_channel, x, x_stride, x_channel, out, out_stride, out_channel, outer, inner, parts, totals,
        mean, var, weight, eps, flags,
    ):  # fmt: skip
        shared = cuda.shared.array(4, float64)
        serves = cuda.shared.array(1, int32)
        block = int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x)
        c = block // parts
        share_coefficients(shared, serves, c, outer * inner, mean, var, weight, eps, flags, totals)
        begin, end = part_of(outer * inner, lanes, block - c * parts, parts)
        applied(
            g, c * g_channel, g_stride, x, c * x_channel, x_stride, out, c * out_channel, out_stride, inner, begin, end,
            shared, serves,
        )  # fmt: skip

    return input_gradient_rows


@cache
def columns_source(g_name, x_name, out_name, lanes):
    """The kernel for channels side by side as plain Python."""
    load_gradient, load, store = simd.LOAD[g_name, lanes], simd.LOAD[x_name, lanes], simd.STORE[out_name, lanes]
    load_one_gradient, load_one, store_one = simd.LOAD[g_name, 1], simd.LOAD[x_name, 1], simd.STORE[out_name, 1]
    is_narrow, arithmetic, cast = simd.arithmetic_of(g_name, x_name, out_name)
    add, subtract, multiply, fma, wide = simd.add, simd.subtract, simd.multiply, simd.fma, simd.wide
    channels_of, take = CHANNELS[lanes], TAKE[lanes]
    size = columns_of_tile(lanes)

    def input_gradient_columns(
        g, g_stride, x, x_stride, out, out_stride, outer, channels, inner, tile, across, deep, tiles, splits, totals,
        mean, var, weight, eps, flags,
    ):  # fmt: skip
        highs = cuda.shared.array(size, arithmetic)
        factors = cuda.shared.array(size, arithmetic)
        inclines = cuda.shared.array(size, arithmetic)
        constants = cuda.shared.array(size, arithmetic)
        serves = cuda.shared.array(size, uint8)
        thread, threads = int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        block = int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x)
        split = block // tiles
        c0 = (block - split * tiles) * tile
        present = min(tile, channels - c0)
        some = int32(0)
        for c in range(thread, present, threads):
            center, scale, slope, offset, served = formulas.input_gradient(
                c0 + c, outer * inner, mean, var, weight, eps, flags, totals
            )
            high = arithmetic(center)
            low = center - float64(high)
            highs[c] = high
            factors[c] = arithmetic(scale)
            inclines[c] = arithmetic(slope)
            constants[c] = arithmetic(offset - slope * low if abs(low) > 0.0 else offset)
            serves[c] = 1 if served else 0
            if is_narrow and not served:
                some = int32(1)
        some_do_not = cuda.syncthreads_or(some)
        row = thread // across
        j = (thread - row * across) * lanes
        if row >= deep or j >= present * inner:
            return
        r = outer * split // splits + row
        r1 = outer * (split + 1) // splits
        place = c0 * inner + j
        if some_do_not:
            for lane in range(lanes):
                c = (j + lane) // inner
                center, scale, slope, offset, served = formulas.input_gradient(
                    c0 + c, outer * inner, mean, var, weight, eps, flags, totals
                )
                for o in range(r, r1, deep):
                    one_gradient = load_one_gradient(g, o * g_stride + place + lane)
                    one = load_one(x, o * x_stride + place + lane)
                    if serves[c]:
                        d = subtract(cast(one), highs[c])
                        gradient = multiply(cast(one_gradient), factors[c])
                        result = wide(add(fma(d, inclines[c], gradient), constants[c]))
                    else:
                        d = subtract(wide(one), center)
                        result = add(fma(d, slope, multiply(wide(one_gradient), scale)), offset)
                    store_one(out, o * out_stride + place + lane, result)
            return

        k = channels_of(j, inner)
        high = take(highs, k)
        factor = take(factors, k)
        incline = take(inclines, k)
        constant = take(constants, k)
        while r + deep < r1:
            a = cast(load_gradient(g, r * g_stride + place))
            b = cast(load_gradient(g, (r + deep) * g_stride + place))
            d = subtract(cast(load(x, r * x_stride + place)), high)
            e = subtract(cast(load(x, (r + deep) * x_stride + place)), high)
            a = add(fma(d, incline, multiply(a, factor)), constant)
            b = add(fma(e, incline, multiply(b, factor)), constant)
            store(out, r * out_stride + place, a)
            store(out, (r + deep) * out_stride + place, b)
            r += 2 * deep
        if r < r1:
            a = cast(load_gradient(g, r * g_stride + place))
            d = subtract(cast(load(x, r * x_stride + place)), high)
            store(out, r * out_stride + place, add(fma(d, incline, multiply(a, factor)), constant))

    return input_gradient_columns


@cache
def rows(g_name, x_name, out_name, lanes):
    """The kernel for long rows."""
    return kernel(rows_source(g_name, x_name, out_name, lanes))


@cache
def columns(g_name, x_name, out_name, lanes):
    """The kernel for channels side by side."""
    return kernel(columns_source(g_name, x_name, out_name, lanes))
