"""Place and run: checked arguments become canonical views, the views go to the backend, results come back.

The public functions check and decide; what follows here is the same for all of them.
"""

import numpy as np

from nbbn import backends, checks
from nbbn.arrays import Array, result_dtype
from nbbn.backends import RunningUpdate
from nbbn.layout import Canonical, canonical
from nbbn.moments import Moments, wrap


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
        return Moments.zeros(channels)
    order = canonical(x, channel)
    where = None if mask is None else order.broadcast(mask, x.shape)
    result = backends.empty_moments(channels)
    backends.current().moments(order.view_or_copy(x), where, *result)
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
    y = order.empty(x.shape, result_dtype(x.dtype)) if out is None else out
    if x.size:
        target = Target(order, y)
        addend = None if residual is None else order.view_or_copy(residual)
        backends.current().affine(order.view_or_copy(x), mean, var, weight, bias, eps, addend, relu, target.view)
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
    y = order.empty(x.shape, result_dtype(x.dtype)) if out is None else out
    target = Target(order, y)
    addend = None if residual is None else order.view_or_copy(residual)
    result = backends.empty_moments(checks.channels_of(x, channel))
    skipped = backends.current().train(
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
) -> tuple[Array, Array, Array]:
    """The three gradients, those of the parameters in float64."""
    channels = checks.channels_of(x, channel)
    order = canonical(x, channel)
    grad_x = order.empty(x.shape, result_dtype(x.dtype)) if out is None else out
    grad_weight, grad_bias = np.zeros(channels), np.zeros(channels)
    if x.size:
        target = Target(order, grad_x)
        views = order.view_or_copy(grad_out), order.view_or_copy(x)
        results = target.view, grad_weight, grad_bias
        backends.current().backward(*views, mean, var, weight, eps, training, *results)
        target.finish()
    return grad_x, grad_weight, grad_bias
