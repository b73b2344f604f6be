"""The short way for plain arrays: what every public call tries first.

It is taken only where nothing is left to decide: C-contiguous NumPy arrays of one float dtype, options at their
defaults. Whether memory overlaps and channels agree is looked at by one compiled kernel. Anything else, every error
included, is the long way's business: the answer is None and nothing has been written.
"""

from functools import lru_cache
from math import inf, prod
from typing import Any

import numpy as np
from numpy import empty, ndarray

from nbbn import backends
from nbbn.arrays import Array, is_data_float, parameter_dtype
from nbbn.moments import Moments, wrap

_FLOAT32, _FLOAT64 = _FLOATS = np.dtype(np.float32), np.dtype(np.float64)


def evaluate(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any) -> Array | None:
    """The affine step."""
    view, plain = _view(x, axis), backends.current().plain
    if view is None or plain is None or not is_plain_eps(eps):
        return None
    if not (_flat(mean) and _flat(var) and (weight is None or _flat(weight)) and (bias is None or _flat(bias))):
        return None
    y = _result(out, x)
    if y is None:
        return None
    return y if plain.normalize(view, y.reshape(view.shape), mean, var, weight, bias, eps) else None


def train(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: Any, eps: Any, axis: Any,
    ddof: Any, out: Any, need_stats: bool,
) -> tuple[Array, Moments | None] | None:  # fmt: skip
    """Statistics, normalization and moving averages; the statistics themselves if asked for."""
    view, plain = _view(x, axis), backends.current().plain
    if view is None or plain is None or view.size == view.shape[1] or not harmless(momentum, ddof):
        return None
    if not is_plain_eps(eps) or not _are_one_kind(running_mean, running_var, weight, bias):
        return None
    if running_mean is None:
        if running_var is not None:
            return None
    elif running_var is None or not (running_mean.flags.writeable and running_var.flags.writeable):
        return None
    y = _result(out, x)
    if y is None:
        return None
    stats = backends.empty_moments(view.shape[1])
    if not plain.train(
        view, y.reshape(view.shape), running_mean, running_var, weight, bias, eps, momentum, ddof, *stats
    ):
        return None
    return y, wrap(*stats) if need_stats else None


def moments(x: Any, axis: Any) -> Moments | None:
    """Statistics."""
    view, plain = _view(x, axis), backends.current().plain
    if view is None or plain is None:
        return None
    stats = backends.empty_moments(view.shape[1])
    plain.moments(view, *stats)
    return wrap(*stats)


def backward(
    grad_out: Any, x: Any, mean: Any, var: Any, weight: Any, eps: Any, axis: Any, out: Any
) -> tuple[Array, Array, Array] | None:
    """The three gradients, in training."""
    view, plain = _view(x, axis), backends.current().plain
    if view is None or plain is None or not is_plain_eps(eps):
        return None
    if type(grad_out) is not ndarray or grad_out.dtype != x.dtype or grad_out.shape != x.shape:
        return None
    flags = grad_out.flags
    if not (flags.c_contiguous and flags.aligned and _flat(mean) and _flat(var) and (weight is None or _flat(weight))):
        return None
    grad_x = _result(out, x)
    if grad_x is None:
        return None
    dtype = parameter_dtype(x.dtype) if weight is None else weight.dtype
    views = grad_out.reshape(view.shape), view, mean, var, weight, eps, grad_x.reshape(view.shape)
    of_parameters = plain.backward(*views, dtype)
    return None if of_parameters is None else (grad_x, of_parameters[0], of_parameters[1])


def _are_one_kind(*parameters: Any) -> bool:
    """Whether those that are given are plain flat arrays of one dtype."""
    dtype = None
    for values in parameters:
        if values is not None:
            if not _flat(values) or (dtype is not None and values.dtype != dtype):
                return False
            dtype = values.dtype
    return True


def harmless(momentum: Any, ddof: Any) -> bool:
    """Whether these options need no check."""
    return type(momentum) is float and 0.0 <= momentum <= 1.0 and type(ddof) is int and 0 <= ddof <= 1


def is_plain_eps(eps: Any) -> bool:
    """Whether this needs no check."""
    return type(eps) is float and 0.0 <= eps < inf


def _flat(values: Any) -> bool:
    """Whether this is a plain flat array of floats; that it has C values is for kernels to find out."""
    if type(values) is not ndarray or values.ndim != 1 or not values.size:
        return False
    flags = values.flags
    return flags.c_contiguous and flags.aligned and _is_float(values.dtype)


def _is_float(dtype: Any) -> bool:
    """Whether this is float32 or float64; what was unpickled has a dtype object of its own."""
    return dtype is _FLOAT32 or dtype is _FLOAT64 or dtype in _FLOATS


def _result(out: Any, x: Array) -> Array | None:
    """New memory for a result like `x`, or `out` if it is plain and writable; None if it is not."""
    if out is None:
        return empty(x.shape, x.dtype)
    if type(out) is not ndarray or out.dtype != x.dtype or out.shape != x.shape:
        return None
    flags = out.flags
    return out if flags.c_contiguous and flags.writeable and flags.aligned else None


def _view(x: Any, axis: Any) -> Array | None:
    """`x` as (outer, channels, inner), or None if it is not a plain array."""
    if type(x) is not ndarray or type(axis) is not int or not _is_data(x.dtype):
        return None
    flags = x.flags
    if not (flags.c_contiguous and flags.aligned):
        return None
    shape = _canonical_shape(x.shape, axis)
    return None if shape is None else x.reshape(shape)


def _is_data(dtype: Any) -> bool:
    """Whether this is a floating dtype in native byte order."""
    return dtype is _FLOAT32 or _is_native_float(dtype)


@lru_cache(64)
def _is_native_float(dtype: Any) -> bool:
    return is_data_float(dtype) and dtype.isnative


@lru_cache(1024)
def _canonical_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int, int] | None:
    """(outer, channels, inner), or None for what is empty or has no such axis."""
    if axis < 0:
        axis += len(shape)
    if not 0 <= axis < len(shape) or len(shape) < 2 or 0 in shape:
        return None
    if shape[axis] == 1:  # one channel is one row, as in `layout.canonical`
        return (1, 1, prod(shape))
    return (prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))
