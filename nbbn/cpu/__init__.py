"""The CPU backend: picks a kernel by layout, precision and size. The contract is `nbbn.backends.Backend`."""

from typing import Any

import numpy as np

from nbbn import formulas
from nbbn.cpu import channels, columns, columns_backward, masked, rows, rows_backward, threads

name = "cpu"

#: `inner` below this goes to the columns family. Rows shorter than a few vectors are mostly loop overhead.
ROWS_FROM = 128

_NOTHING = np.empty(0)


def moments(x, where, count, mean, m2):
    with threads.limit():
        if where is not None:
            masked.moments(_parallel(x), x, where, count, mean, m2)
            return
        count[:] = x.shape[0] * x.shape[2]
        if _as_columns(x):
            columns.moments(_parallel(x), x, _fold(x), mean, m2)
        else:
            rows.moments(_parallel(x), x, mean, m2)


def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    arithmetic = _arithmetic(x, residual, out)
    weight, bias = _float64_or_nothing(weight), _float64_or_nothing(bias)
    wide, narrow, narrow_serves = (
        np.empty((3, x.shape[1])),
        np.empty((3, x.shape[1]), arithmetic),
        np.empty(x.shape[1], bool),
    )
    all_served = channels.coefficients(_float64(mean), _float64(var), weight, bias, eps, wide, narrow, narrow_serves)
    addend = _addend(residual, out)
    with threads.limit():
        if _as_columns(x, out, residual):
            high, scale, shift = narrow if all_served else wide
            floor = _floor(relu, high.dtype)
            columns.normalize(_parallel(x), x, addend, out, _fold(x, out, residual), high, scale, shift, floor)
        else:
            rows.normalize(_parallel(x), x, addend, out, wide, narrow, narrow_serves, _floor(relu, arithmetic))


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    # which family takes the statistics depends on x alone, never on threads: the same bits for any number of them
    fused = not _as_columns(x) and not (_parallel(x) and _few_channels(x))
    if fused:
        count[:] = x.shape[0] * x.shape[2]
        w, b = _float64_or_nothing(weight), _float64_or_nothing(bias)
        floor = _floor(relu, _arithmetic(x, residual, out))
        with threads.limit():
            rows.train_by_channel(_parallel(x), x, _addend(residual, out), out, w, b, eps, floor, mean, m2)
    else:
        moments(x, None, count, mean, m2)
        affine(x, mean, m2 / count, weight, bias, eps, residual, relu, out)
    return 0 if update is None else ema(count, mean, m2, update)


def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    mean, weight = _float64(mean), _float64_or_nothing(weight)
    with np.errstate(all="ignore"):
        inv_std = 1.0 / np.sqrt(_float64(var) + eps)
        narrow = _fits_float32(mean, inv_std, weight if weight.size else 1.0)
    arithmetic = _arithmetic(grad_out, x, grad_x) if narrow else np.dtype(np.float64)
    high = mean.astype(arithmetic)
    count = x.shape[0] * x.shape[2]
    as_columns = _as_columns(x, grad_out, grad_x)
    with threads.limit():
        if training and not as_columns and not (_parallel(x) and _few_channels(x)):
            rows_backward.backward_by_channel(
                _parallel(x), grad_out, x, mean, high, inv_std, weight, grad_x, grad_weight, grad_bias
            )
            return
        total, products = _per_channel(2, x.shape[1], np.float64)
        if as_columns:
            fold = _fold(x, grad_out, grad_x)
            columns_backward.gradient_sums(_parallel(x), grad_out, x, fold, high, total, products)
        else:
            rows_backward.gradient_sums(_parallel(x), grad_out, x, high, total, products)
        scale, slope, offset = _per_channel(3, x.shape[1], arithmetic)
        channels.input_gradient_coefficients(
            count, total, products, mean, high, inv_std, weight, scale, slope, offset, grad_weight, grad_bias
        )
        if not training:  # mean and var are constants: the gradient is scaled, nothing else
            affine(grad_out, np.zeros_like(mean), var, weight if weight.size else None, None, eps, None, False, grad_x)
        elif as_columns:
            columns_backward.apply(_parallel(x), grad_out, x, fold, high, scale, slope, offset, grad_x)
        else:
            rows_backward.apply(_parallel(x), grad_out, x, high, scale, slope, offset, grad_x)


def ema(count, mean, m2, update):
    running = (update.running_mean, update.running_var)
    return channels.ema(*running, count, mean, m2, update.momentum, update.ddof, update.skip_nonfinite)


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    channels.merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2)


def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    channels.remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2)


# --- which kernel ---------------------------------------------------------------------------------------------------


def _as_columns(*views: Any) -> bool:
    """Whether the columns family serves these views: short rows, and the channels of a row side by side."""
    inner = views[0].shape[2]
    if inner >= ROWS_FROM:
        return False
    return all(v is None or v.strides[1] == inner * v.itemsize or v.shape[1] == 1 for v in views)


def _parallel(x: Any) -> bool:
    return threads.worth_it(x.size)


def _few_channels(x: Any) -> bool:
    """Whether a task per channel would leave threads without work; then a channel is split between them."""
    return bool(x.shape[1] < 2 * threads.get_num_threads())


def _fold(*views: Any) -> int:
    """How many rows to take as one, so that about TILE columns lie side by side; their memory must be one piece."""
    outer, channels, inner = views[0].shape
    # a folded row needs its coefficients expanded and its columns merged: worth it for 16 of them or more
    fold = min(columns.TILE // (channels * inner), outer // 16)
    if fold < 2 or not all(v is None or v.flags.c_contiguous for v in views):
        return 1
    return fold


# --- arguments of kernels ------------------------------------------------------------------------------------------


def _arithmetic(*arrays: Any) -> np.dtype[Any]:
    """float32 where everything read and written is, else float64."""
    return np.dtype(np.float32 if all(a is None or a.dtype == np.float32 for a in arrays) else np.float64)


def _floor(relu: bool, arithmetic: np.dtype[Any]) -> Any:
    """The value below which the result is cut: 0 is ReLU, -inf is none."""
    return arithmetic.type(0.0 if relu else -np.inf)


def _addend(residual: Any, out: Any) -> Any:
    """The residual, or an empty array of the same kind."""
    return out[:0] if residual is None else residual


def _float64(values: Any) -> Any:
    """Contiguous float64: one type, so one compiled kernel, for all that comes in."""
    usable = values.dtype.char == "d" and values.flags.c_contiguous and values.flags.aligned
    return values if usable else np.array(values, np.float64)


def _float64_or_nothing(values: Any) -> Any:
    return _NOTHING if values is None else _float64(values)


def _per_channel(number: int, size: int, dtype: Any) -> Any:
    return np.empty((number, size), dtype)


def _fits_float32(mean: Any, inv_std: Any, weight: Any) -> bool:
    """Whether float32 arithmetic serves the input gradient of every channel, coefficients included."""
    sizes = np.abs(np.stack(np.broadcast_arrays(inv_std, inv_std * inv_std, inv_std * weight, inv_std**3 * weight)))
    inside = (sizes == 0.0) | ((sizes > formulas.SCALE_LOWEST) & (sizes < formulas.SCALE_HIGHEST))
    return bool(inside.all() and (np.abs(mean) < formulas.MEAN_HIGHEST).all())
