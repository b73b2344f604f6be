"""The CPU backend: picks a kernel by layout, precision and size. The contract is `nbbn.backends.Backend`."""

from typing import Any

import numpy as np

from nbbn.cpu import caches, channels, columns, columns_backward, masked, plan, rows, rows_backward, threads
from nbbn.cpu import small as small  # the short way
from nbbn.cpu.storage import BFLOAT16, HALF

name = "cpu"

_NOTHING = np.empty(0)


def moments(x, where, count, mean, m2):
    x = _raw(x)
    with threads.limit():
        if where is not None:
            masked.moments(plan.parallel(x), x, where, count, mean, m2)
            return
        count[:] = x.shape[0] * x.shape[2]
        if plan.as_columns(x):
            fold = plan.fold(x)
            columns.moments(plan.parallel(x), x, fold, plan.tile(x, fold), mean, m2)
        else:
            rows.moments(plan.parallel(x), x, plan.group_read_once(x), mean, m2)


def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    streaming = caches.streams(out, x, residual)
    x, residual, out = _raw(x), _raw(residual), _raw(out)
    arithmetic = _arithmetic(x, residual, out)
    weight, bias = _float64_or_nothing(weight), _float64_or_nothing(bias)
    wide, narrow, narrow_serves = (
        np.empty((3, x.shape[1])),
        np.empty((3, x.shape[1]), arithmetic),
        np.empty(x.shape[1], bool),
    )
    all_served = channels.coefficients(_float64(mean), _float64(var), weight, bias, eps, wide, narrow, narrow_serves)
    with threads.limit():
        if plan.affine_as_columns(x, out, residual):
            high, scale, shift = narrow if all_served else wide
            floor = _floor(relu, high.dtype)
            fold = plan.fold(x, out, residual)
            columns.normalize(plan.parallel(x), x, residual, out, fold, high, scale, shift, floor, streaming)
        else:
            floor = _floor(relu, arithmetic)
            rows.normalize(plan.parallel(x), x, residual, out, wide, narrow, narrow_serves, floor, streaming)


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    # Which family takes the statistics, and how it cuts channels into chunks, depends on x alone, never on
    # threads or on being fused: the same bits for any number of threads
    parallel = plan.parallel(x)
    if not plan.fused(parallel, x, out, residual):
        moments(x, None, count, mean, m2)
        affine(x, mean, m2 / count, weight, bias, eps, residual, relu, out)
        return 0 if update is None else ema(count, mean, m2, update)
    count[:] = x.shape[0] * x.shape[2]
    streaming = caches.streams(out, x, residual)
    x, residual, out = _raw(x), _raw(residual), _raw(out)
    w, b = _float64_or_nothing(weight), _float64_or_nothing(bias)
    floor = _floor(relu, _arithmetic(x, residual, out))
    with threads.limit():
        if plan.as_columns(x):
            tile = plan.tile(x, 1)
            columns.train_by_tile(parallel, x, residual, out, w, b, eps, floor, tile, streaming, mean, m2)
        else:
            group = plan.group_read_twice(x)
            rows.train_by_channel(parallel, x, residual, out, w, b, eps, floor, group, streaming, mean, m2)
    return 0 if update is None else ema(count, mean, m2, update)


def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    mean, weight = _float64(mean), _float64_or_nothing(weight)
    inv_std = np.empty(mean.size)
    narrow = channels.backward_scales(mean, _float64(var), weight, eps, inv_std)
    streaming = caches.streams(grad_x, x, grad_out)
    fused = training and plan.fused(plan.parallel(x), x, grad_out, grad_x)
    g, x, result = _raw(grad_out), _raw(x), _raw(grad_x)
    arithmetic = _arithmetic(g, x, result) if narrow else np.dtype(np.float64)
    high = mean.astype(arithmetic)
    parallel = plan.parallel(x)
    as_columns = plan.as_columns(x, g, result)
    with threads.limit():
        if fused:
            shared = high, inv_std, weight
            if as_columns:
                columns_backward.backward_by_tile(
                    parallel, g, x, mean, *shared, plan.tile(x, 1), streaming, result, grad_weight, grad_bias
                )
            else:
                group = plan.group_read_twice(x)
                rows_backward.backward_by_channel(
                    parallel, g, x, mean, *shared, group, streaming, result, grad_weight, grad_bias
                )
            return
        total, products = _per_channel(2, x.shape[1], np.float64)
        if as_columns:
            fold = plan.fold(x, g, result)
            columns_backward.gradient_sums(parallel, g, x, fold, plan.tile(x, fold), high, total, products)
        else:
            rows_backward.gradient_sums(parallel, g, x, plan.group_read_once(x), high, total, products)
        scale, slope, offset = _per_channel(3, x.shape[1], arithmetic)
        channels.input_gradient_coefficients(
            x.shape[0] * x.shape[2], total, products, mean, high, inv_std, weight, scale, slope, offset,
            grad_weight, grad_bias,
        )  # fmt: skip
        if not training:  # mean and var are constants: the gradient is scaled, nothing else
            w = weight if weight.size else None
            affine(grad_out, np.zeros_like(mean), var, w, None, eps, None, False, grad_x)
        elif as_columns:
            columns_backward.apply(parallel, g, x, fold, high, scale, slope, offset, streaming, result)
        else:
            rows_backward.apply(parallel, g, x, high, scale, slope, offset, streaming, result)


def ema(count, mean, m2, update):
    running = (update.running_mean, update.running_var)
    return channels.ema(*running, count, mean, m2, update.momentum, update.ddof, update.skip_nonfinite)


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    channels.merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2)


def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    channels.remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2)


# --- arguments of kernels ------------------------------------------------------------------------------------------


def _raw(array: Any) -> Any:
    """What a kernel can be given: arrays of half precision as records (`storage`)."""
    if array is None or array.dtype.char in _KNOWN:
        return array
    return array.view(HALF if array.dtype.char == "e" else BFLOAT16)


#: Characters of the dtypes that Numba knows.
_KNOWN = frozenset("fd?bBhHiIlLqQ")

#: Dtypes whose values float32 holds exactly.
_NARROW = frozenset(np.dtype(kind) for kind in ("f4", "?", "i1", "u1", "i2", "u2")) | {HALF, BFLOAT16}


def _arithmetic(*arrays: Any) -> np.dtype[Any]:
    """float32 where it holds everything read and written exactly, else float64."""
    return np.dtype(np.float32 if all(a is None or a.dtype in _NARROW for a in arrays) else np.float64)


def _floor(relu: bool, arithmetic: np.dtype[Any]) -> Any:
    """The value below which the result is cut: 0 is ReLU, -inf is none."""
    return arithmetic.type(0.0 if relu else -np.inf)


def _float64(values: Any) -> Any:
    """Contiguous float64: one type, so one compiled kernel, for all that comes in."""
    usable = values.dtype.char == "d" and values.flags.c_contiguous and values.flags.aligned
    return values if usable else np.array(values, np.float64)


def _float64_or_nothing(values: Any) -> Any:
    return _NOTHING if values is None else _float64(values)


def _per_channel(number: int, size: int, dtype: Any) -> Any:
    return np.empty((number, size), dtype)
