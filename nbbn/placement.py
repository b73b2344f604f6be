"""Place and run: checked arguments become canonical views, the views go to the backend, results come back.

The public functions check and decide; what follows here is the same for all of them.
"""

from typing import Any

import numpy as np

from nbbn import backends, checks
from nbbn.arrays import Array, empty, fill, on_device, result_dtype
from nbbn.backends import RunningUpdate
from nbbn.layout import Canonical, canonical
from nbbn.moments import Moments, wrap, zeros


class Target:
    """Where a backend writes a result: into the array itself, or beside it and then moved."""

    def __init__(self, order: Canonical, array: Array):
        self._order, self._array = order, array
        view = order.view(array) if array.flags.aligned else None
        self._direct = view is not None
        self.view: Array = order.copy(array) if view is None else view

    def finish(self) -> None:
        """The backend is done: the result is, or moves, where it belongs."""
        if not self._direct:
            self._order.write_back(self.view, self._array)


def moments(x: Array, channel: int | None, mask: Array | None) -> Moments:
    """Statistics of `x`, of what `mask` selects of it."""
    channels = checks.channels_of(x, channel)
    if x.size == 0:
        return zeros(channels, x)
    order = canonical(x, channel)
    where = None if mask is None else order.broadcast(mask, x.shape)
    result = backends.empty_moments(channels, x)
    backends.serving(x).moments(order.view_or_copy(x), where, *result)
    return wrap(*result)


def normalize(
    x: Array,
    channel: int | None,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    relu: bool,
    out: Array | None,
) -> Array:
    """The affine step, into `out` or a new array."""
    order = canonical(x, channel)
    y = order.empty(x.shape, result_dtype(x.dtype), x) if out is None else out
    if x.size:
        target = Target(order, y)
        addend = None if residual is None else order.view_or_copy(residual)
        backends.serving(x).affine(order.view_or_copy(x), mean, var, weight, bias, eps, addend, relu, target.view)
        target.finish()
    return y


def train(
    x: Array,
    channel: int | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    relu: bool,
    out: Array | None,
    update: RunningUpdate | None,
) -> tuple[Array, Moments, int]:
    """The fused training call: result, statistics, number of channels skipped. `x` is not empty."""
    order = canonical(x, channel)
    y = order.empty(x.shape, result_dtype(x.dtype), x) if out is None else out
    target = Target(order, y)
    addend = None if residual is None else order.view_or_copy(residual)
    result = backends.empty_moments(checks.channels_of(x, channel), x)
    skipped = backends.serving(x).train(
        order.view_or_copy(x), weight, bias, eps, addend, relu, target.view, *result, update
    )
    target.finish()
    return y, wrap(*result), skipped


def backward(
    grad_out: Array,
    x: Array,
    channel: int | None,
    mean: Array,
    var: Array,
    weight: Array | None,
    eps: float,
    training: bool,
    out: Array | None,
    dtype: np.dtype[Any],
) -> tuple[Array, Array, Array]:
    """The three gradients, those of the parameters in `dtype`."""
    channels = checks.channels_of(x, channel)
    order = canonical(x, channel)
    grad_x = order.empty(x.shape, result_dtype(x.dtype), x) if out is None else out
    backend = backends.serving(x)
    # kernels on a device round to the dtype that is asked for as they store
    kept = dtype if on_device(x) else np.dtype(np.float64)
    grad_weight, grad_bias = empty((channels,), kept, x), empty((channels,), kept, x)
    if x.size:
        target = Target(order, grad_x)
        views = order.view_or_copy(grad_out), order.view_or_copy(x)
        results = target.view, grad_weight, grad_bias
        backend.backward(*views, mean, var, weight, eps, training, *results)
        target.finish()
    else:
        for gradient in (grad_weight, grad_bias):
            fill(gradient, 0.0)
    if on_device(x):
        return grad_x, grad_weight, grad_bias
    with np.errstate(all="ignore"):
        return grad_x, grad_weight.astype(dtype), grad_bias.astype(dtype)
