"""Normalization where `inner` is long: a block takes a part of one channel, so its coefficients are computed once."""

from functools import cache

from numba import cuda, float64, int64

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import device, kernel
from nbbn.cuda.reduce import advance, part_of, strides_of_block


def make_normalized(x_name, residual_name, out_name, lanes):
    """Normalization of a part of a channel, by a whole block."""
    load, load_one = simd.LOAD[x_name, lanes], simd.LOAD[x_name, 1]
    load_residual, load_one_residual = simd.LOAD[residual_name, lanes], simd.LOAD[residual_name, 1]
    store, store_one = simd.STORE[out_name, lanes], simd.STORE[out_name, 1]
    is_narrow, arithmetic, cast = simd.arithmetic_of(x_name, residual_name, out_name)
    add, subtract, fma, cut, wide = simd.add, simd.subtract, simd.fma, simd.cut, simd.wide

    @device
    def normalized(
        x, x_start, x_stride, residual, residual_start, residual_stride, out, out_start, out_stride, inner, begin, end,
        center, scale, shift, floor, flags,
    ):  # fmt: skip
        """Store (x - center) * scale + shift of values `begin` to `end`; each channel begins at its start."""
        if is_narrow and not formulas.fits_float32(center, formulas.low_part(center), scale):
            for position in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
                o = position // inner
                i = position - o * inner
                value = wide(load_one(x, x_start + o * x_stride + i))
                value = fma(subtract(value, center), scale, shift)
                if flags & formulas.HAS_RESIDUAL:
                    value = add(value, wide(load_one_residual(residual, residual_start + o * residual_stride + i)))
                store_one(out, out_start + o * out_stride + i, cut(value, floor))
            return

        high = arithmetic(center)
        slope = arithmetic(scale)
        offset = arithmetic(formulas.folded_shift(center, scale, shift)) if is_narrow else arithmetic(shift)
        least = arithmetic(floor)
        position, o, i, step, step_o, step_i = strides_of_block(begin, inner, lanes)
        while position + 3 * step < end:
            p, j = advance(o, i, step_o, step_i, inner)
            q, k = advance(p, j, step_o, step_i, inner)
            r, m = advance(q, k, step_o, step_i, inner)
            u = load(x, x_start + o * x_stride + i)
            v = load(x, x_start + p * x_stride + j)
            w = load(x, x_start + q * x_stride + k)
            z = load(x, x_start + r * x_stride + m)
            u = fma(subtract(cast(u), high), slope, offset)
            v = fma(subtract(cast(v), high), slope, offset)
            w = fma(subtract(cast(w), high), slope, offset)
            z = fma(subtract(cast(z), high), slope, offset)
            if flags & formulas.HAS_RESIDUAL:
                u = add(u, cast(load_residual(residual, residual_start + o * residual_stride + i)))
                v = add(v, cast(load_residual(residual, residual_start + p * residual_stride + j)))
                w = add(w, cast(load_residual(residual, residual_start + q * residual_stride + k)))
                z = add(z, cast(load_residual(residual, residual_start + r * residual_stride + m)))
            store(out, out_start + o * out_stride + i, cut(u, least))
            store(out, out_start + p * out_stride + j, cut(v, least))
            store(out, out_start + q * out_stride + k, cut(w, least))
            store(out, out_start + r * out_stride + m, cut(z, least))
            o, i = advance(r, m, step_o, step_i, inner)
            position += 4 * step
        while position < end:
            u = fma(subtract(cast(load(x, x_start + o * x_stride + i)), high), slope, offset)
            if flags & formulas.HAS_RESIDUAL:
                u = add(u, cast(load_residual(residual, residual_start + o * residual_stride + i)))
            store(out, out_start + o * out_stride + i, cut(u, least))
            o, i = advance(o, i, step_o, step_i, inner)
            position += step

    return normalized


@device
def coefficients_of_block(shared, mean, var, divisor, weight, bias, c, eps, flags):
    """`formulas.affine_coefficients`, computed by one thread, in every thread of the block."""
    if cuda.threadIdx.x == 0:
        center, scale, shift = formulas.affine_coefficients(mean, var, divisor, weight, bias, c, eps, flags)
        shared[0] = center
        shared[1] = scale
        shared[2] = shift
    cuda.syncthreads()
    return shared[0], shared[1], shared[2]


@cache
def source(x_name, residual_name, out_name, lanes):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    normalized = make_normalized(x_name, residual_name, out_name, lanes)

    def affine_rows(
        x, x_stride, x_channel, residual, residual_stride, residual_channel, out, out_stride, out_channel,
        outer, inner, parts, mean, var, divisor, weight, bias, eps, floor, flags,
    ):  # fmt: skip
        shared = cuda.shared.array(3, float64)
        # from the end: what was read last, by the kernel before, may still be in the second-level cache
        block = int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x)
        c = block // parts
        center, scale, shift = coefficients_of_block(shared, mean, var, divisor, weight, bias, c, eps, flags)
        begin, end = part_of(outer * inner, lanes, block - c * parts, parts)
        normalized(
            x, c * x_channel, x_stride, residual, c * residual_channel, residual_stride, out, c * out_channel,
            out_stride, inner, begin, end, center, scale, shift, floor, flags,
        )  # fmt: skip

    return affine_rows


@cache
def compiled(x_name, residual_name, out_name, lanes):
    """The kernel for these kinds of storage, `lanes` values at a time."""
    return kernel(source(x_name, residual_name, out_name, lanes))
