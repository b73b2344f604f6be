"""Normalization where channels lie side by side or `inner` is short: a thread keeps its columns' coefficients."""

from functools import cache

from numba import cuda, int32, int64, uint8

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import kernel
from nbbn.cuda.lanes import CHANNELS, REPEAT, TAKE
from nbbn.cuda.tiles import columns_of_tile


@cache
def source(x_name, residual_name, out_name, lanes):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    load, load_one = simd.LOAD[x_name, lanes], simd.LOAD[x_name, 1]
    load_residual, load_one_residual = simd.LOAD[residual_name, lanes], simd.LOAD[residual_name, 1]
    store, store_one = simd.STORE[out_name, lanes], simd.STORE[out_name, 1]
    is_narrow, arithmetic, cast = simd.arithmetic_of(x_name, residual_name, out_name)
    add, subtract, fma, cut, wide = simd.add, simd.subtract, simd.fma, simd.cut, simd.wide
    repeat, channels_of, take = REPEAT[lanes], CHANNELS[lanes], TAKE[lanes]
    size = columns_of_tile(lanes)

    def affine_columns(
        x, x_stride, residual, residual_stride, out, out_stride, outer, channels, inner, tile, across, deep, tiles,
        splits, mean, var, divisor, weight, bias, eps, floor, flags,
    ):  # fmt: skip
        highs = cuda.shared.array(size, arithmetic)
        slopes = cuda.shared.array(size, arithmetic)
        offsets = cuda.shared.array(size, arithmetic)
        serves = cuda.shared.array(size, uint8)
        thread, threads = int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        # from the end: what was read last, by the kernel before, may still be in the second-level cache
        block = int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x)
        split = block // tiles
        c0 = (block - split * tiles) * tile
        present = min(tile, channels - c0)
        some = int32(0)
        for c in range(thread, present, threads):
            center, scale, shift = formulas.affine_coefficients(mean, var, divisor, weight, bias, c0 + c, eps, flags)
            highs[c] = arithmetic(center)
            slopes[c] = arithmetic(scale)
            offsets[c] = arithmetic(formulas.folded_shift(center, scale, shift) if is_narrow else shift)
            served = not is_narrow or formulas.fits_float32(center, formulas.low_part(center), scale)
            serves[c] = 1 if served else 0
            if not served:
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
                center, scale, shift = formulas.affine_coefficients(
                    mean, var, divisor, weight, bias, c0 + c, eps, flags
                )
                for o in range(r, r1, deep):
                    one = load_one(x, o * x_stride + place + lane)
                    if serves[c]:
                        y = wide(fma(subtract(cast(one), highs[c]), slopes[c], offsets[c]))
                    else:
                        y = fma(subtract(wide(one), center), scale, shift)
                    if flags & formulas.HAS_RESIDUAL:
                        y = add(y, wide(load_one_residual(residual, o * residual_stride + place + lane)))
                    store_one(out, o * out_stride + place + lane, cut(y, floor))
            return

        k = channels_of(j, inner)
        high = take(highs, k)
        slope = take(slopes, k)
        offset = take(offsets, k)
        least = repeat(arithmetic(floor))
        while r + 3 * deep < r1:
            u = load(x, r * x_stride + place)
            v = load(x, (r + deep) * x_stride + place)
            w = load(x, (r + 2 * deep) * x_stride + place)
            z = load(x, (r + 3 * deep) * x_stride + place)
            u = fma(subtract(cast(u), high), slope, offset)
            v = fma(subtract(cast(v), high), slope, offset)
            w = fma(subtract(cast(w), high), slope, offset)
            z = fma(subtract(cast(z), high), slope, offset)
            if flags & formulas.HAS_RESIDUAL:
                u = add(u, cast(load_residual(residual, r * residual_stride + place)))
                v = add(v, cast(load_residual(residual, (r + deep) * residual_stride + place)))
                w = add(w, cast(load_residual(residual, (r + 2 * deep) * residual_stride + place)))
                z = add(z, cast(load_residual(residual, (r + 3 * deep) * residual_stride + place)))
            store(out, r * out_stride + place, cut(u, least))
            store(out, (r + deep) * out_stride + place, cut(v, least))
            store(out, (r + 2 * deep) * out_stride + place, cut(w, least))
            store(out, (r + 3 * deep) * out_stride + place, cut(z, least))
            r += 4 * deep
        while r < r1:
            u = fma(subtract(cast(load(x, r * x_stride + place)), high), slope, offset)
            if flags & formulas.HAS_RESIDUAL:
                u = add(u, cast(load_residual(residual, r * residual_stride + place)))
            store(out, r * out_stride + place, cut(u, least))
            r += deep

    return affine_columns


@cache
def compiled(x_name, residual_name, out_name, lanes):
    """The kernel for these kinds of storage, `lanes` columns a thread."""
    return kernel(source(x_name, residual_name, out_name, lanes))
