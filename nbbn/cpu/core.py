"""Picks kernels by layout, precision and size, once per-channel numbers are prepared: float64, contiguous.

An absent `weight` or `bias` is an empty array, an absent `residual` is None. The views are canonical.
"""

from typing import Any

import numpy as np

from nbbn.cpu import caches, channels, columns, columns_backward, columns_forward, plan, rows, rows_backward, threads
from nbbn.cpu.storage import BFLOAT16, HALF

NOTHING = np.empty(0)

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def moments(x, count, mean, m2):
    """Statistics of every channel."""
    workers = plan.workers(x)
    how = plan.statistics(workers, plan.view(x))
    count.fill(x.shape[0] * x.shape[2])
    x = raw(x)
    with threads.limit():
        if how.by_columns:
            columns.moments(workers, x, how.fold, how.tile, mean, m2)
        else:
            rows.moments(workers, x, how.group, mean, m2)


def coefficients(size, arithmetic):
    """Memory for mean, scale, shift of every channel: float64, the arithmetic that is wanted, and where that serves."""
    return np.empty((3, size)), np.empty((3, size), arithmetic), np.empty(size, bool)


def affine(x, residual, relu, out, all_served, wide, narrow, narrow_serves):
    """out = max((x - mean) * scale + shift + residual, floor) with `coefficients` that are filled."""
    streaming = caches.streams(out, x, residual)
    workers = plan.workers(x)
    how = plan.affine(*plan.views(x, out, residual))
    x, residual, out = raw(x), raw(residual), raw(out)
    with threads.limit():
        if how.by_columns:
            high, scale, shift = narrow if all_served else wide
            floor = _floor(relu, high.dtype)
            columns_forward.normalize(workers, x, residual, out, how.fold, high, scale, shift, floor, streaming)
        else:
            floor = _floor(relu, narrow.dtype)
            rows.normalize(workers, x, residual, out, wide, narrow, narrow_serves, floor, streaming)


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2):
    """Statistics and normalization with them."""
    # Which family takes the statistics, and how it cuts channels into chunks, depends on x alone, never on
    # threads or on being fused: the same bits for any number of threads
    workers = plan.workers(x)
    how = plan.fusion(workers, *plan.views(x, out, residual))
    precision = arithmetic(x, residual, out)
    if how is None:
        moments(x, count, mean, m2)
        ready = coefficients(x.shape[1], precision)
        all_served = channels.coefficients(mean, m2 / count, weight, bias, eps, *ready)
        affine(x, residual, relu, out, all_served, *ready)
        return
    count.fill(x.shape[0] * x.shape[2])
    streaming = caches.streams(out, x, residual)
    x, residual, out = raw(x), raw(residual), raw(out)
    parameters = weight, bias, eps, _floor(relu, precision)
    with threads.limit():
        if how.by_columns:
            columns_forward.train_by_tile(workers, x, residual, out, *parameters, how.tile, streaming, mean, m2)
        else:
            rows.train_by_channel(workers, x, residual, out, *parameters, how.group, streaming, mean, m2)


def backward(grad_out, x, mean, high, inv_std, weight, grad_x, grad_weight, grad_bias):
    """The three gradients in training, in the arithmetic of `high`, the high part of the mean."""
    workers = plan.workers(x)
    how = plan.backward(workers, plan.view(x), plan.view(grad_out), plan.view(grad_x))
    streaming = caches.streams(grad_x, x, grad_out)
    g, x, result = raw(grad_out), raw(x), raw(grad_x)
    of_channels = mean, high, inv_std, weight
    results = streaming, result, grad_weight, grad_bias
    fused = how.fusion
    with threads.limit():
        if fused is None:
            scale, slope, offset = np.empty((3, mean.size), high.dtype)
            total, products = _gradient_sums(workers, how.sums, g, x, high)
            ready = scale, slope, offset
            channels.input_gradient_coefficients(
                x.shape[0] * x.shape[2], total, products, *of_channels, *ready, grad_weight, grad_bias
            )
            if how.write.by_columns:
                columns_backward.apply(workers, g, x, how.write.fold, high, *ready, streaming, result)
            else:
                rows_backward.apply(workers, g, x, high, *ready, streaming, result)
        elif fused.by_columns:
            columns_backward.backward_by_tile(workers, g, x, *of_channels, fused.tile, *results)
        else:
            rows_backward.backward_by_channel(workers, g, x, *of_channels, fused.group, *results)


def parameter_gradients(grad_out, x, mean, high, inv_std, weight, grad_weight, grad_bias):
    """Those of weight and bias alone."""
    workers = plan.workers(x)
    view = plan.view(x)
    how = plan.backward(workers, view, plan.view(grad_out), view)
    with threads.limit():
        total, products = _gradient_sums(workers, how.sums, raw(grad_out), raw(x), high)
    unused = np.empty((3, mean.size), high.dtype)
    channels.input_gradient_coefficients(
        x.shape[0] * x.shape[2], total, products, mean, high, inv_std, weight, *unused, grad_weight, grad_bias
    )


def _gradient_sums(workers, how, g, x, high):
    total, products = np.empty((2, high.size))
    if how.by_columns:
        columns_backward.gradient_sums(workers, g, x, how.fold, how.tile, high, total, products)
    else:
        rows_backward.gradient_sums(workers, g, x, how.group, high, total, products)
    return total, products


# --- arguments of kernels ---------------------------------------------------------------------------------------------


def raw(array: Any) -> Any:
    """What a kernel can be given: arrays of half precision as records (`storage`)."""
    if array is None or array.dtype.char in _KNOWN:
        return array
    return array.view(HALF if array.dtype.char == "e" else BFLOAT16)


#: Characters of the dtypes that Numba knows.
_KNOWN = frozenset("fd?bBhHiIlLqQ")

#: Those of dtypes whose values float32 does not hold exactly.
_WIDE = frozenset("diIlLqQ")


def arithmetic(*arrays: Any) -> np.dtype[Any]:
    """float32 where it holds everything read and written exactly, else float64."""
    for array in arrays:
        if array is not None and array.dtype.char in _WIDE:
            return FLOAT64
    return FLOAT32


def _floor(relu: bool, arithmetic: np.dtype[Any]) -> Any:
    """The value below which the result is cut: 0 is ReLU, -inf is none."""
    return arithmetic.type(0.0 if relu else -np.inf)
