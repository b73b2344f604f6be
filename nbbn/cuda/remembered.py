"""What `nbbn.cuda.warm` remembers of a call: made from the arrays of the first one, with the checks of the long way.

Each maker raises what the long way would raise, and returns None for what needs more than launches: copies of strides
that kernels cannot read, or nothing at all because `x` is empty.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

import nbbn.cuda as backend
from nbbn import checks
from nbbn.arrays import parameter_dtype, result_dtype
from nbbn.backends import RunningUpdate
from nbbn.cuda import recipes
from nbbn.cuda.arguments import flags_of, gradient_flags, running_flags
from nbbn.cuda.device import DeviceArray
from nbbn.cuda.libraries import Library
from nbbn.cuda.storage import WIDEST
from nbbn.layout import Canonical, canonical

_INT64, _FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)


@dataclass(frozen=True, slots=True)
class New:
    """An array to be made beside `x`."""

    library: Library
    device: int | None
    shape: tuple[int, ...]
    dtype: Any
    order: tuple[int, ...] | None  # its axes are put in this order

    def make(self) -> tuple[Any, int]:
        """The array and its address."""
        made = self.library.empty(self.shape, self.dtype, self.device)
        address = self.library.address(made)
        return made if self.order is None else self.library.transpose(made, self.order), address


@dataclass(frozen=True, slots=True)
class Fields:
    """Count, mean and m2 to be made beside `x`."""

    library: Library
    device: int | None
    channels: int

    def make(self, apart: bool) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Three arrays, or one piece of memory for what nobody will look at; the addresses of all three."""
        n, library = self.channels, self.library
        if not apart:
            piece = library.empty((3 * n,), _FLOAT64, self.device)
            start = library.address(piece)
            return (piece,), (start, start + 8 * n, start + 16 * n)
        owners = tuple(library.empty((n,), dtype, self.device) for dtype in (_INT64, _FLOAT64, _FLOAT64))
        return owners, tuple(map(library.address, owners))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A call of `normalize`."""

    library: Library
    device: int | None
    affine: recipes.Affine
    result: New
    floor: float


@dataclass(frozen=True, slots=True)
class Training:
    """A call of `batch_norm` in training."""

    library: Library
    device: int | None
    train: recipes.Training | recipes.TrainingAtOnce
    fields: Fields
    result: New
    floor: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A call of `batch_stats`."""

    library: Library
    device: int | None
    statistics: recipes.Statistics
    fields: Fields


@dataclass(frozen=True, slots=True)
class Backward:
    """A call of `batch_norm_backward` in training."""

    library: Library
    device: int | None
    gradients: recipes.Gradients | recipes.GradientsAtOnce
    result: New
    parameter: New
    totals: New


def evaluation(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, out: Any, axis: Any, activation: Any
) -> Evaluation | None:
    x, channel, order = _data(x, axis)
    channels = checks.channels_of(x, channel)
    given = mean, var, weight, bias, 0.0, residual, activation, out
    mean, var, weight, bias, _, residual, relu, out = checks.of_normalize(x, channels, *given)
    views = _views(order, x, residual, _result(order, x, out))
    if views is None or not _are_contiguous(mean, var, weight, bias):
        return None
    flags = flags_of(mean=mean, var=var, weight=weight, bias=bias)
    made = recipes.affine(*views, flags, backend.properties(x.device))
    return Evaluation(x.library, x.device, made, _new(order, x), 0.0 if relu else -float("inf"))


def training(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any, out: Any, axis: Any,
    activation: Any,
) -> Training | None:  # fmt: skip
    x, channel, order = _data(x, axis)
    checks.float_data("x", x, "in training")
    channels = checks.channels_of(x, channel)
    weight = checks.optional_per_channel("weight", weight, channels)
    bias = checks.optional_per_channel("bias", bias, channels)
    residual = checks.residual_like(residual, x)
    relu = checks.activation(activation)
    checks.same_place(x, weight=weight, bias=bias, residual=residual)
    running, out = checks.written_in_training(x, channels, running_mean, running_var, out, weight, bias, residual, None)
    update = None if running is None else RunningUpdate(*running, 0.0, 0, False)
    if not x.size:
        return None
    checks.more_than_one_value(x, channels)
    views = _views(order, x, residual, _result(order, x, out))
    if views is None or not _are_contiguous(weight, bias):
        return None
    flags = flags_of(weight=weight, bias=bias)
    made = recipes.training(*views, running_flags(update), flags, backend.properties(x.device))
    fields = Fields(x.library, x.device, channels)
    return Training(x.library, x.device, made, fields, _new(order, x), 0.0 if relu else -float("inf"))


def summary(x: Any, axis: Any) -> Summary | None:
    x, channel, order = _data(x, axis)
    whole = _view(order, x)
    if whole is None or not x.size:
        return None
    made = recipes.statistics(whole, 0, backend.properties(x.device))
    return Summary(x.library, x.device, made, Fields(x.library, x.device, checks.channels_of(x, channel)))


def backward(grad_out: Any, x: Any, mean: Any, var: Any, weight: Any, out: Any, axis: Any) -> Backward | None:
    x, channel, order = _data(x, axis)
    checks.float_data("x", x, "in backward")
    channels = checks.channels_of(x, channel)
    given = grad_out, mean, var, weight, 0.0, True, out
    grad_out, mean, var, weight, _, _, out = checks.of_backward(x, channels, *given)
    views = _views(order, x, grad_out, _result(order, x, out))
    if views is None or not _are_contiguous(mean, var, weight) or not x.size:
        return None
    dtype = parameter_dtype(x.dtype) if weight is None else weight.dtype
    flags = flags_of(mean=mean, var=var, weight=weight) | gradient_flags(dtype)
    of_x, of_gradient, of_out = views
    assert of_gradient is not None  # it was given
    made = recipes.gradients(of_gradient, of_x, of_out, flags, backend.properties(x.device))
    per_channel = New(x.library, x.device, (channels,), dtype, None)
    totals = New(x.library, x.device, (2 * channels,), _FLOAT64, None)
    return Backward(x.library, x.device, made, _new(order, x), per_channel, totals)


def _data(x: Any, axis: Any) -> tuple[DeviceArray, int | None, Canonical]:
    array: Any = checks.data("x", x)
    channel = checks.channel_axis(array, axis)
    return array, channel, canonical(array, channel)


def _result(order: Canonical, x: Any, out: Any) -> Any:
    return order.empty(x.shape, result_dtype(x.dtype), x) if out is None else out


def _new(order: Canonical, x: Any) -> New:
    turned = order.inverse
    shape = tuple(x.shape[a] for a in order.order)
    kept = None if turned == tuple(range(len(turned))) else turned
    return New(x.library, x.device, shape, result_dtype(x.dtype), kept)


def _view(order: Canonical, array: Any) -> recipes.View | None:
    whole: Any = order.view(array) if array.flags.aligned else None
    return None if whole is None else (whole.geometry, whole.address % WIDEST)


def _views(
    order: Canonical, x: Any, other: Any, result: Any
) -> tuple[recipes.View, recipes.View | None, recipes.View] | None:
    """Canonical views of x, of residual or gradient, of the result; None if a copy is needed, or x is empty."""
    if not x.size:
        return None
    seen = [None if array is None else _view(order, array) for array in (x, other, result)]
    if seen[0] is None or seen[2] is None or (other is not None and seen[1] is None):
        return None
    return seen[0], seen[1], seen[2]


def _are_contiguous(*arrays: Any) -> bool:
    return all(array is None or array.flags.c_contiguous for array in arrays)
