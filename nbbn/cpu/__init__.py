"""The CPU backend: picks a kernel by layout, precision and size. The contract is `nbbn.backends.Backend`."""

from typing import Any

import numpy as np

from nbbn.cpu import caches, channels, columns, columns_backward, masked, rows, rows_backward, threads, tiles
from nbbn.cpu import small as small  # the short way
from nbbn.cpu.storage import BFLOAT16, HALF

name = "cpu"

#: Bytes of memory in one run that channels are taken together for: statistics alone, and what is read twice.
LONG_RUN, SHORT_RUN = 65536, 4096

_NOTHING = np.empty(0)


def moments(x, where, count, mean, m2):
    x = _raw(x)
    with threads.limit():
        if where is not None:
            masked.moments(_parallel(x), x, where, count, mean, m2)
            return
        count[:] = x.shape[0] * x.shape[2]
        if _as_columns(x):
            columns.moments(_parallel(x), x, _fold(x), mean, m2)
        else:
            rows.moments(_parallel(x), x, _side_by_side(x, LONG_RUN), mean, m2)


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
        if _as_columns(x, out, residual):
            high, scale, shift = narrow if all_served else wide
            floor = _floor(relu, high.dtype)
            fold = _fold(x, out, residual)
            columns.normalize(_parallel(x), x, residual, out, fold, high, scale, shift, floor, streaming)
        else:
            floor = _floor(relu, arithmetic)
            rows.normalize(_parallel(x), x, residual, out, wide, narrow, narrow_serves, floor, streaming)


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    # Which family takes the statistics, and how it cuts channels into chunks, depends on x alone, never on
    # threads or on being fused: the same bits for any number of threads
    parallel = _parallel(x)
    if not _fused(parallel, x, out, residual):
        moments(x, None, count, mean, m2)
        affine(x, mean, m2 / count, weight, bias, eps, residual, relu, out)
        return 0 if update is None else ema(count, mean, m2, update)
    count[:] = x.shape[0] * x.shape[2]
    streaming = caches.streams(out, x, residual)
    x, residual, out = _raw(x), _raw(residual), _raw(out)
    w, b = _float64_or_nothing(weight), _float64_or_nothing(bias)
    floor = _floor(relu, _arithmetic(x, residual, out))
    with threads.limit():
        if _as_columns(x):
            columns.train_by_tile(parallel, x, residual, out, w, b, eps, floor, streaming, mean, m2)
        else:
            group = _side_by_side(x, SHORT_RUN)
            rows.train_by_channel(parallel, x, residual, out, w, b, eps, floor, group, streaming, mean, m2)
    return 0 if update is None else ema(count, mean, m2, update)


def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    mean, weight = _float64(mean), _float64_or_nothing(weight)
    inv_std = np.empty(mean.size)
    narrow = channels.backward_scales(mean, _float64(var), weight, eps, inv_std)
    streaming = caches.streams(grad_x, x, grad_out)
    fused = training and _fused(_parallel(x), x, grad_out, grad_x)
    g, x, result = _raw(grad_out), _raw(x), _raw(grad_x)
    arithmetic = _arithmetic(g, x, result) if narrow else np.dtype(np.float64)
    high = mean.astype(arithmetic)
    parallel = _parallel(x)
    as_columns = _as_columns(x, g, result)
    with threads.limit():
        if fused:
            shared = high, inv_std, weight
            if as_columns:
                columns_backward.backward_by_tile(
                    parallel, g, x, mean, *shared, streaming, result, grad_weight, grad_bias
                )
            else:
                group = _side_by_side(x, SHORT_RUN)
                rows_backward.backward_by_channel(
                    parallel, g, x, mean, *shared, group, streaming, result, grad_weight, grad_bias
                )
            return
        total, products = _per_channel(2, x.shape[1], np.float64)
        if as_columns:
            fold = _fold(x, g, result)
            columns_backward.gradient_sums(parallel, g, x, fold, high, total, products)
        else:
            rows_backward.gradient_sums(parallel, g, x, _side_by_side(x, LONG_RUN), high, total, products)
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


# --- which kernel ---------------------------------------------------------------------------------------------------


def _as_columns(*views: Any) -> bool:
    """Whether the columns family serves these views: short rows, and the channels of a row side by side."""
    inner = views[0].shape[2]
    if inner >= tiles.ROWS_FROM:
        return False
    return all(v is None or v.strides[1] == inner * v.itemsize or v.shape[1] == 1 for v in views)


def _parallel(x: Any) -> bool:
    return threads.worth_it(x.size)


def _fused(parallel: bool, *views: Any) -> bool:
    """Whether to take statistics and normalize channel by channel, so that the second read finds it in cache."""
    x = views[0]
    outer, channels, inner = x.shape
    if not _as_columns(x):
        # with few channels a task per channel would leave threads without work: there a channel is split between them
        return not parallel or channels >= 2 * threads.get_num_threads()
    if not _as_columns(*views) or _fold(x) > 1 or outer > tiles.CHUNK_ROWS:
        return False
    # all rows of a tile must stay, and there must be tiles to share. Not a matter of threads: what is fused decides
    # tile by tile, what is not for all channels, which of them need float64
    tile = tiles.tile_columns.py_func(channels * inner, inner)
    bytes_kept = outer * tile * sum(v.itemsize for v in views if v is not None)
    return bool(bytes_kept <= caches.sizes()[0] and channels * inner >= 4 * tile)


def _side_by_side(x: Any, least: int) -> int:
    """How many channels to take together so that about `least` bytes lie side by side: fewer, longer runs of memory."""
    outer, channels, inner = x.shape
    group = -(-least // (inner * x.itemsize))
    kept = caches.sizes()[0] // (2 * outer * inner * x.itemsize)  # in half of the second-level cache
    return int(
        max(1, min(group, kept if least == SHORT_RUN else channels, channels // (4 * threads.get_num_threads())))
    )


def _fold(*views: Any) -> int:
    """How many rows to take as one: their memory must be one piece."""
    if not all(v is None or v.flags.c_contiguous for v in views):
        return 1
    return int(tiles.rows_as_one(*views[0].shape))


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
