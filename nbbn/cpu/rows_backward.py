"""The rows family, backward: sums of the gradient per channel, then the input gradient.

`mean` is the high part of the mean in the arithmetic precision (see `channels.split`).
"""

import numpy as np
from numba import prange

from nbbn.cpu import blocks
from nbbn.cpu.blocks import BLOCK, CHUNK, chunk_bounds, chunk_grid
from nbbn.cpu.channels import gradient_coefficients
from nbbn.cpu.jit import elementwise, formula, kernel
from nbbn.cpu.simd import fmuladd, run


@formula
def chunk_gradient_sums(gradients, x, mean, c, o0, o1, i0, i1):
    """Sums of g and of g * (x - mean) over one chunk: blocks in the precision of `mean`, their sum in float64."""
    total = 0.0
    products = 0.0
    for o in range(o0, o1):
        for i in range(i0, i1, BLOCK):
            end = min(i + BLOCK, i1)
            block_total, block_products = blocks.sums_of_gradient(
                run(gradients, o, c, i, end), run(x, o, c, i, end), mean
            )
            if not products_are_exact(block_products, x.dtype):
                wide = np.float64(mean)
                block_total, block_products = blocks.sums_of_gradient(
                    run(gradients, o, c, i, end), run(x, o, c, i, end), wide
                )
            total += block_total
            products += block_products
    return total, products


@formula
def products_are_exact(products, dtype):
    """False where products of this storage precision overflowed, or may have lost digits to denormals."""
    size = abs(products)
    return size == 0.0 or np.finfo(dtype).tiny * 2.0**33 <= size < np.inf


@elementwise
def gradient_row(gradients, values, result, mean, scale, slope, offset):
    for i in range(values.size):
        result[i] = fmuladd(scale, gradients[i], fmuladd(slope, values[i] - mean, offset))


@kernel(reads=("gradients", "x", "mean"))
def gradient_sums(gradients, x, mean, total, products):
    """total[c] = sum of g, products[c] = sum of g * (x - mean[c]); the parallel unit is a chunk."""
    outer, channels, inner = x.shape
    _, _, along_outer, along_inner = chunk_grid(outer, inner)
    chunks = along_outer * along_inner
    chunk_total = np.empty((channels, chunks))
    chunk_products = np.empty((channels, chunks))
    for task in prange(channels * chunks):
        c, k = divmod(np.int64(task), chunks)
        o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
        sums = chunk_gradient_sums(gradients, x, mean[c], c, o0, o1, i0, i1)
        chunk_total[c, k], chunk_products[c, k] = sums
    for c in range(channels):
        total[c] = 0.0
        products[c] = 0.0
        for k in range(chunks):
            total[c] += chunk_total[c, k]
            products[c] += chunk_products[c, k]


@formula
def channel_gradient_sums(gradients, x, mean, c):
    """Sums of g and of g * (x - mean) over one channel: its chunks, in order."""
    outer, _, inner = x.shape
    _, _, along_outer, along_inner = chunk_grid(outer, inner)
    total = 0.0
    products = 0.0
    for k in range(along_outer * along_inner):
        o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
        chunk_total, chunk_products = chunk_gradient_sums(gradients, x, mean, c, o0, o1, i0, i1)
        total += chunk_total
        products += chunk_products
    return total, products


@kernel(reads=("gradients", "x", "mean", "high", "inv_std", "weight"))
def backward_by_channel(gradients, x, mean, high, inv_std, weight, grad_x, grad_weight, grad_bias):
    """Sums, then the input gradient, one channel at a time: the second read finds the channel in cache."""
    outer, channels, inner = x.shape
    narrow = high.dtype.type
    for task in prange(channels):
        c = np.int64(task)
        total, products = channel_gradient_sums(gradients, x, high[c], c)
        scale, slope, offset, grad_weight[c], grad_bias[c] = gradient_coefficients(
            outer * inner, total, products, mean[c], high[c], inv_std[c], weight, c
        )
        for o in range(outer - 1, -1, -1):
            gradient_row(
                run(gradients, o, c, 0, inner),
                run(x, o, c, 0, inner),
                run(grad_x, o, c, 0, inner),
                high[c],
                narrow(scale),
                narrow(slope),
                narrow(offset),
            )


@kernel(reads=("gradients", "x", "mean", "scale", "slope", "offset"))
def apply(gradients, x, mean, scale, slope, offset, grad_x):
    """grad_x = scale * g + slope * (x - mean) + offset; tasks are runs of memory, whatever the channel."""
    outer, channels, inner = x.shape
    pieces = -(-inner // CHUNK)
    group = max(1, CHUNK // inner)
    groups = -(-(outer * channels) // group)
    for task in prange(groups * pieces):
        first, piece = divmod(np.int64(task), pieces)
        i0 = piece * CHUNK
        i1 = min(i0 + CHUNK, inner)
        for r in range(first * group, min(first * group + group, outer * channels)):
            o, c = divmod(r, channels)
            gradient_row(
                run(gradients, o, c, i0, i1),
                run(x, o, c, i0, i1),
                run(grad_x, o, c, i0, i1),
                mean[c],
                scale[c],
                slope[c],
                offset[c],
            )
