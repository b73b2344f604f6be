"""The same for backward: kernels that look at memory and prepare channels, or do all there is to do."""

import numpy as np

from nbbn.cpu import columns, columns_backward, rows_backward
from nbbn.cpu.channels import gradient_coefficients, gradient_fits, inverse_std
from nbbn.cpu.columns_forward import affine_grid
from nbbn.cpu.jit import formula, serial_kernel
from nbbn.cpu.plain_kernels import fits, is_result
from nbbn.cpu.scratch import lesser, scratch, scratch_rows, zero_rows
from nbbn.cpu.tiles import part


@formula
def fits_backward(gradients, x, out, size, mean, var, weight):
    """Whether there are `size` values of every parameter and `out` is an input or memory of its own."""
    return fits(x, out, size, mean, var, weight, weight) and is_result(out, gradients)


@formula
def channels_are_served(mean, var, weight, eps, wide_mean, high, inv_std, scale):
    """Fill mean, its high part, 1 / sqrt(var + eps) and weight of every channel.

    False if some channel needs wider arithmetic than that of `high`.
    """
    served = True
    for c in range(mean.size):
        wide_mean[c] = mean[c]
        high[c] = mean[c]
        inv_std[c] = inverse_std(np.float64(var[c]), eps)
        scale[c] = weight[c] if weight.size else 1.0
        served &= gradient_fits(wide_mean[c], inv_std[c], scale[c])
    return served


@serial_kernel(reads=("gradients", "x", "out", "mean", "var", "weight"))
def prepare(gradients, x, out, mean, var, weight, eps, wide_mean, high, inv_std, scale):
    """Whether memory fits and `channels_are_served`; `gradients`, `x` and `out` as bytes."""
    if not fits_backward(gradients, x, out, high.size, mean, var, weight):
        return False
    return channels_are_served(mean, var, weight, eps, wide_mean, high, inv_std, scale)


@serial_kernel(reads=("first", "second"))
def rounded(first, second, results):
    """Two arrays to the rows of one of another precision; NumPy would warn of numbers that become infinite."""
    for k in range(first.size):
        results[0, k] = first[k]
        results[1, k] = second[k]


@serial_kernel(reads=("gradients", "x", "mean", "var", "weight"))
def by_rows(gradients, x, out, mean, var, weight, eps, group, results):
    """The input gradient, and those of weight and bias as the rows of `results`, by rows; or False."""
    channels = x.shape[1]
    if not fits_backward(gradients, x, out, channels, mean, var, weight):
        return False
    wide = scratch_rows(3, channels, 0.0)
    high = scratch(channels, x.dtype.type(0))
    if not channels_are_served(mean, var, weight, eps, wide[0], high, wide[1], wide[2]):
        return False
    of_channels = wide[0], high, wide[1], wide[2]
    for c in range(0, channels, group):
        size = lesser(group, channels - c)
        rows_backward.channels_backward(gradients, x, of_channels, c, size, False, out, results[0], results[1])
    return True


@serial_kernel(reads=("gradients", "x", "mean", "var", "weight"))
def by_columns(gradients, x, out, mean, var, weight, eps, fold, tile, results):
    """The same by columns."""
    outer, channels, inner = x.shape
    if not fits_backward(gradients, x, out, channels, mean, var, weight):
        return False
    wide = scratch_rows(3, channels, 0.0)
    narrow = scratch_rows(4, channels, x.dtype.type(0))
    high, scale, slope, offset = narrow[0], narrow[1], narrow[2], narrow[3]
    if not channels_are_served(mean, var, weight, eps, wide[0], high, wide[1], wide[2]):
        return False
    chunks, tiles = columns.parts(x, fold, tile)
    totals = zero_rows(chunks, channels, 0.0)
    products = zero_rows(chunks, channels, 0.0)
    for task in range(chunks * tiles):
        columns_backward.part_gradient_sums(gradients, x, high, task, tiles, fold, tile, totals, products)
    for c in range(channels):
        total, product = rows_backward.add_chunks(totals[:, c], products[:, c])
        scale[c], slope[c], offset[c], results[0, c], results[1, c] = gradient_coefficients(
            outer * inner, total, product, wide[0, c], high[c], wide[1, c], wide[2], c
        )
    tile, tiles, chunk, chunks = affine_grid(outer, fold, fold * channels * inner)
    for task in range(chunks * tiles):
        _, r0, r1, step, j0, j1 = part(task, tiles, tile, chunk, outer, fold, channels * inner)
        columns_backward.write_tile(gradients, x, r0, r1, step, j0, j1, high, scale, slope, offset, False, False, out)
    return True
