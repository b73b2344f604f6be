"""The rows family, backward: sums of the gradient per channel, then the input gradient.

`mean` is the high part of the mean in the arithmetic precision (see `channels.fill_narrow`).
"""

import math

import numpy as np
from numba import prange

from nbbn.cpu.affine import gradient_row
from nbbn.cpu.blocks import BLOCK, CHUNK, chunk_bounds, chunks_of, plain_sums_of_gradient, sums_of_gradient
from nbbn.cpu.channels import gradient_coefficients
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.memory import run
from nbbn.cpu.rows import parts, runs
from nbbn.cpu.scratch import lesser, scratch_rows, zero_rows
from nbbn.cpu.sharing import next_task, shared, someone_was_late


@formula
def products_are_exact(products, dtype):
    """False where products of this precision overflowed, or may have lost digits to denormals."""
    size = abs(products)
    return size == 0.0 or np.finfo(dtype).tiny * 2.0**33 <= size < np.inf


@formula
def box_gradient_sums(gradients, x, mean, o0, o1, c0, i0, i1, total, products):
    """Add the sums of g and of g * (x - mean[c]) over a chunk of the channels from c0 on to total[k], products[k].

    Runs in the precision of `mean`, their sum in float64; in the order of memory.
    """
    for o in range(o0, o1):
        for k in range(total.size):
            c = c0 + k
            for i in range(i0, i1, BLOCK):
                end = lesser(i + BLOCK, i1)
                g = run(gradients, o, c, i, end)
                values = run(x, o, c, i, end)
                # the next runs of the same channel: in a row of memory of their own unless these are long
                next_o, next_i = (o, end) if end < i1 else (o + 1, i0)
                ahead = run(gradients, next_o, c, next_i, i1), run(x, next_o, c, next_i, i1)
                first, second = sums_of_gradient(g, values, mean[c], ahead)
                if products_are_exact(second, mean.dtype) and math.isfinite(first):
                    total[k] += np.float64(first)
                    products[k] += np.float64(second)
                else:
                    wide_first, wide_second = plain_sums_of_gradient(g, values, np.float64(mean[c]))
                    total[k] += wide_first
                    products[k] += wide_second


@kernel(reads=("gradients", "x", "mean"))
def gradient_sums(workers, gradients, x, group, mean, total, products):
    """total[c] = sum of g, products[c] = sum of g * (x - mean[c]); a task is one chunk of `group` channels."""
    outer, channels, inner = x.shape
    chunks, groups = parts(x, group)
    chunk_total = zero_rows(chunks, channels, 0.0)
    chunk_products = zero_rows(chunks, channels, 0.0)
    tasks = chunks * groups
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            k, g = divmod(task, groups)
            o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
            c0 = g * group
            c1 = lesser(c0 + group, channels)
            sums = chunk_total[k, c0:c1], chunk_products[k, c0:c1]
            box_gradient_sums(gradients, x, mean, o0, o1, c0, i0, i1, sums[0], sums[1])
            task = next_task(np.int64(worker), taken, tasks, task)
    for c in range(channels):
        total[c], products[c] = add_chunks(chunk_total[:, c], chunk_products[:, c])
    return someone_was_late(taken)


@formula
def add_chunks(totals, products):
    """Sums over a channel from those over its chunks, in order."""
    total = 0.0
    product = 0.0
    for k in range(totals.size):
        total += totals[k]
        product += products[k]
    return total, product


@formula
def channels_backward(gradients, x, of_channels, c0, size, streaming, grad_x, grad_weight, grad_bias):
    """All gradients of the `size` channels from c0 on; `of_channels` are mean, high, inv_std and weight of all."""
    mean, high, inv_std, weight = of_channels
    outer, _, inner = x.shape
    chunks = chunks_of(outer, inner)
    like = high.dtype.type(0)
    totals = zero_rows(chunks, size, 0.0)
    products = zero_rows(chunks, size, 0.0)
    for k in range(chunks):
        o0, o1, i0, i1 = chunk_bounds(k, outer, inner)
        box_gradient_sums(gradients, x, high, o0, o1, c0, i0, i1, totals[k], products[k])
    coefficients = scratch_rows(3, size, like)
    for k in range(size):
        c = c0 + k
        total, product = add_chunks(totals[:, k], products[:, k])
        scale, slope, offset, grad_weight[c], grad_bias[c] = gradient_coefficients(
            outer * inner, total, product, mean[c], high[c], inv_std[c], weight, c
        )
        coefficients[0, k], coefficients[1, k], coefficients[2, k] = scale, slope, offset
    for o in range(outer - 1, -1, -1):  # backwards: the last rows are the ones still in cache
        for k in range(size):
            c = c0 + k
            ready = high[c], coefficients[0, k], coefficients[1, k], coefficients[2, k]
            inputs = run(gradients, o, c, 0, inner), run(x, o, c, 0, inner)
            gradient_row(run(grad_x, o, c, 0, inner), inputs, ready, like, False, streaming)


@kernel(reads=("gradients", "x", "mean", "high", "inv_std", "weight"))
def backward_by_channel(
    workers, gradients, x, mean, high, inv_std, weight, group, streaming, grad_x, grad_weight, grad_bias
):
    """Sums, then the input gradient, `group` channels at a time: the second read finds them in cache."""
    channels = x.shape[1]
    _, tasks = parts(x, group)
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            c0 = task * group
            of_channels = mean, high, inv_std, weight
            channels_backward(
                gradients, x, of_channels, c0, lesser(group, channels - c0), streaming, grad_x, grad_weight, grad_bias
            )
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)


@kernel(reads=("gradients", "x", "mean", "scale", "slope", "offset"))
def apply(workers, gradients, x, mean, scale, slope, offset, streaming, grad_x):
    """grad_x = scale * g + slope * (x - mean) + offset; tasks are runs of memory, whatever the channel."""
    outer, channels, inner = x.shape
    pieces, group, tasks = runs(x.shape)
    like = mean.dtype.type(0)
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            first, piece = divmod(task, pieces)
            i0 = piece * CHUNK
            i1 = lesser(i0 + CHUNK, inner)
            for r in range(first * group, lesser(first * group + group, outer * channels)):
                o, c = divmod(r, channels)
                ready = mean[c], scale[c], slope[c], offset[c]
                inputs = run(gradients, o, c, i0, i1), run(x, o, c, i0, i1)
                gradient_row(run(grad_x, o, c, i0, i1), inputs, ready, like, True, streaming)
            task = next_task(np.int64(worker), taken, tasks, task)
    return someone_was_late(taken)
