"""Small contiguous arrays: every call is one or a few serial kernels, checks of memory included.

A call on (64, 64) is a microsecond of work: checks and preparations, array by array, would take twenty times as long.
So these kernels look at memory themselves, and answer False, having written nothing, whenever an argument is not as
they want it; the long way then does what is to be done, or says what is wrong. Arithmetic and its order are those
of the large kernels: results are the same, bit for bit.
"""

from functools import lru_cache

import numpy as np

from nbbn.cpu import channels, columns, columns_backward, plan, rows, rows_backward, small_kernels

# what most parameters are: no kernel of its own for those that are absent
_NOTHING = {kind: np.empty(0, kind) for kind in "fd"}


def normalize(x, out, mean, var, weight, bias, eps):
    w = _NOTHING["f"] if weight is None else weight
    b = _NOTHING["f"] if bias is None else bias
    kernel = small_kernels.normalize_columns if _affine_as_columns(x.shape, x.dtype) else small_kernels.normalize_rows
    return kernel(x, out, mean, var, w, b, eps)


def train(x, out, running_mean, running_var, weight, bias, eps, momentum, ddof, count, mean, m2):
    kind = "f"
    for values in (running_mean, running_var, weight, bias):
        if values is not None:
            kind = values.dtype.char
    given = (_NOTHING[kind] if values is None else values for values in (running_mean, running_var, weight, bias))
    by_columns, fold, tile, _, _ = _plan(x.shape, x.dtype)
    if by_columns:
        return small_kernels.train_columns(x, out, *given, eps, momentum, ddof, fold, tile, count, mean, m2)
    return small_kernels.train_rows(x, out, *given, eps, momentum, ddof, count, mean, m2)


def moments(x, count, mean, m2):
    by_columns, fold, tile, _, _ = _plan(x.shape, x.dtype)
    count.fill(x.shape[0] * x.shape[2])
    if by_columns:
        columns.moments.serial(x, fold, tile, mean, m2)
    else:
        rows.moments.serial(x, 1, mean, m2)


def backward(grad_out, x, mean, var, weight, eps, grad_x):
    outer, size, inner = x.shape
    results = np.empty((2, size), x.dtype if weight is None else weight.dtype)
    wide_mean, inv_std, scale, total, products, grad_weight, grad_bias = np.empty((7, size))
    high, slope, offset, factor = np.empty((4, size), x.dtype)
    w = _NOTHING["f"] if weight is None else weight
    if not small_kernels.prepare_backward(grad_out, x, mean, var, w, eps, grad_x, wide_mean, inv_std, scale, high):
        return None
    by_columns, fold, tile, fused, group = _plan(x.shape, x.dtype)
    shared = wide_mean, high, inv_std, scale
    of_parameters = grad_weight, grad_bias
    if not by_columns:
        rows_backward.backward_by_channel.serial(grad_out, x, *shared, group, False, grad_x, *of_parameters)
    elif fused:
        columns_backward.backward_by_tile.serial(grad_out, x, *shared, tile, False, grad_x, *of_parameters)
    else:
        columns_backward.gradient_sums.serial(grad_out, x, fold, tile, high, total, products)
        ready = factor, slope, offset
        channels.input_gradient_coefficients(outer * inner, total, products, *shared, *ready, *of_parameters)
        columns_backward.apply.serial(grad_out, x, fold, high, *ready, False, grad_x)
    small_kernels.rounded(*of_parameters, results)
    return results


@lru_cache(1024)
def _plan(shape, dtype):
    """What `nbbn.cpu.plan` says of such arrays: as_columns, fold, tile, fused (backward), group_read_twice."""
    x = np.empty(shape, dtype)
    fold = plan.fold(x)
    return plan.as_columns(x), fold, plan.tile(x, fold), plan.fused(False, x, x, x), plan.group_read_twice(x)


@lru_cache(1024)
def _affine_as_columns(shape, dtype):
    return plan.affine_as_columns(np.empty(shape, dtype))
