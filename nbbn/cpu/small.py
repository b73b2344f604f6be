"""The affine step on small contiguous arrays in one serial kernel, checks of memory included.

A call on (64, 64) is a microsecond of work: checks and preparations, array by array, would take twenty times as long.
So these kernels look at memory themselves, and answer False, having written nothing, whenever an argument is not as
they want it; the long way then does what is to be done, or says what is wrong. Arithmetic and its order are those
of the large kernels: results are the same, bit for bit.
"""

from functools import lru_cache

import numpy as np

from nbbn.cpu import channels, columns, columns_backward, plan, rows, rows_backward, tiles
from nbbn.cpu.affine import normalize_row
from nbbn.cpu.channels import channel_scale, channel_shift, fill_narrow, gradient_fits, inverse_std
from nbbn.cpu.channels import ema as ema_kernel
from nbbn.cpu.jit import formula, serial_kernel
from nbbn.cpu.memory import address, run
from nbbn.cpu.scratch import greater, lesser, scratch_rows
from nbbn.cpu.tiles import expand

# --- what `nbbn.backends.Small` asks for -----------------------------------------------------------------------------

_NOTHING = np.empty(0, np.float32)  # what most parameters are: no kernel of its own for those that are absent


def normalize(x, out, mean, var, weight, bias, eps):
    w = _NOTHING if weight is None else weight
    b = _NOTHING if bias is None else bias
    if x.shape[2] >= tiles.ROWS_FROM:
        return _normalize_rows(x, out, mean, var, w, b, eps)
    return _normalize_columns(x, out, mean, var, w, b, eps)


def may_update(running_mean, running_var, x, out, weight, bias):
    w = _NOTHING if weight is None else weight
    b = _NOTHING if bias is None else bias
    return _may_update(running_mean, running_var, x, out, w, b)


#: Columns worked on together, about: more take longer to prepare than they save.
SMALL_TILE = 256


def moments(x, count, mean, m2):
    by_columns, fold, tile, _, _ = _plan(x.shape, x.dtype)
    count.fill(x.shape[0] * x.shape[2])
    if by_columns:
        columns.moments.serial(x, fold, tile, mean, m2)
    else:
        rows.moments.serial(x, 1, mean, m2)


def ema(running_mean, running_var, count, mean, m2, momentum, ddof):
    ema_kernel(running_mean, running_var, count, mean, m2, momentum, ddof, False)


def backward(grad_out, x, mean, var, weight, eps, grad_x):
    outer, size, inner = x.shape
    results = np.empty((2, size), x.dtype if weight is None else weight.dtype)
    wide_mean, inv_std, scale, total, products, grad_weight, grad_bias = np.empty((7, size))
    high, slope, offset, factor = np.empty((4, size), x.dtype)
    w = _NOTHING if weight is None else weight
    if not _prepare_backward(grad_out, x, mean, var, w, eps, grad_x, wide_mean, inv_std, scale, high):
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
    _round(*of_parameters, results)
    return results


@lru_cache(1024)
def _plan(shape, dtype):
    """What `nbbn.cpu.plan` says of such arrays: as_columns, fold, tile, fused (backward), group_read_twice."""
    x = np.empty(shape, dtype)
    fold = plan.fold(x)
    return plan.as_columns(x), fold, plan.tile(x, fold), plan.fused(False, x, x, x), plan.group_read_twice(x)


# --- kernels --------------------------------------------------------------------------------------------------------


@formula
def disjoint(a, b):
    """Whether two contiguous arrays share no memory."""
    a0, b0 = address(a), address(b)
    return a0 + a.size * a.itemsize <= b0 or b0 + b.size * b.itemsize <= a0


@formula
def fits(x, out, mean, var, weight, bias):
    """Whether there is a value per channel everywhere and `out` is `x` or memory of its own."""
    channels = x.shape[1]
    if mean.size != channels or var.size != channels:
        return False
    if (weight.size != channels and weight.size) or (bias.size != channels and bias.size):
        return False
    if address(out) != address(x) and not disjoint(out, x):
        return False
    return disjoint(out, mean) and disjoint(out, var) and disjoint(out, weight) and disjoint(out, bias)


@formula
def alone(running, x, out, weight, bias):
    """Whether a running array shares no memory with anything else."""
    return disjoint(running, x) and disjoint(running, out) and disjoint(running, weight) and disjoint(running, bias)


@serial_kernel(reads=("x", "out", "weight", "bias"))
def _may_update(running_mean, running_var, x, out, weight, bias):
    """Whether the running arrays have a value per channel and memory of their own."""
    channels = x.shape[1]
    if running_mean.size != channels or running_var.size != channels or not disjoint(running_mean, running_var):
        return False
    return alone(running_mean, x, out, weight, bias) and alone(running_var, x, out, weight, bias)


@formula
def coefficients_serve(x, out, mean, var, weight, bias, eps, narrow):
    """Fill mean, scale, shift of every channel; False if memory does not fit, or some channel needs float64."""
    if not fits(x, out, mean, var, weight, bias):
        return False
    served = True
    for c in range(mean.size):
        scale, shift = channel_scale(var[c], weight, c, eps), channel_shift(bias, c)
        served &= fill_narrow(np.float64(mean[c]), scale, shift, narrow, c)
    return served


@serial_kernel(reads=("first", "second"))
def _round(first, second, results):
    """Two arrays to the rows of one of another precision; NumPy would warn of numbers that become infinite."""
    for k in range(first.size):
        results[0, k] = first[k]
        results[1, k] = second[k]


@serial_kernel(reads=("gradients", "x", "mean", "var", "weight", "out"))
def _prepare_backward(gradients, x, mean, var, weight, eps, out, wide_mean, inv_std, scale, high):
    """Fill mean, 1 / sqrt(var + eps) and weight of every channel, and the high part of the mean.

    False if memory or numbers do not fit, or some channel needs float64.
    """
    if not fits(x, out, mean, var, weight, weight):
        return False
    if address(out) != address(gradients) and not disjoint(out, gradients):
        return False
    served = True
    for c in range(mean.size):
        wide_mean[c] = mean[c]
        high[c] = mean[c]
        inv_std[c] = inverse_std(np.float64(var[c]), eps)
        scale[c] = weight[c] if weight.size else 1.0
        served &= gradient_fits(wide_mean[c], inv_std[c], scale[c])
    return served


@serial_kernel(reads=("x", "mean", "var", "weight", "bias"))
def _normalize_rows(x, out, mean, var, weight, bias, eps):
    """out = (x - mean) / sqrt(var + eps) * weight + bias, by rows; or False."""
    outer, channels, inner = x.shape
    narrow = scratch_rows(3, channels, x.dtype.type(0))
    if not coefficients_serve(x, out, mean, var, weight, bias, eps, narrow):
        return False
    floor = x.dtype.type(-np.inf)
    for o in range(outer):
        for c in range(channels):
            ready = narrow[0, c], narrow[1, c], narrow[2, c]
            normalize_row(run(out, o, c, 0, inner), (run(x, o, c, 0, inner),), ready, floor, False)
    return True


@serial_kernel(reads=("x", "mean", "var", "weight", "bias"))
def _normalize_columns(x, out, mean, var, weight, bias, eps):
    """The same by columns, several rows at a time if they are short."""
    outer, channels, inner = x.shape
    narrow = scratch_rows(3, channels, x.dtype.type(0))
    if not coefficients_serve(x, out, mean, var, weight, bias, eps, narrow):
        return False
    floor = x.dtype.type(-np.inf)
    width = channels * inner
    fold = greater(1, lesser(outer, SMALL_TILE // width))
    columns = scratch_rows(3, fold * width, x.dtype.type(0))
    for k in range(3):
        expand(narrow[k], columns[k], 0, inner)
    ready = columns[0], columns[1], columns[2]
    for o in range(0, outer, fold):
        rows = lesser(fold, outer - o)
        size = rows * width
        normalize_row(run(out, o, 0, 0, size), (run(x, o, 0, 0, size),), ready, floor, False)
    return True
