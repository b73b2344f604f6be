"""The CUDA backend: picks a kernel and a launch plan. The contract is `nbbn.backends.Backend`.

Views and per-channel arrays are `nbbn.cuda.device.DeviceArray`. Importing needs neither a driver nor numba-cuda;
`nbbn.cuda.requirements` says what is missing before anything is called.
"""

import threading
from contextlib import nullcontext
from functools import lru_cache, wraps

import numpy as np
from numba import cuda

from nbbn.cuda import channels, formulas, launch, masked, memory, recipes
from nbbn.cuda.arguments import NOT_RUNNING, flags_of, gradient_flags, packed, running_flags, running_of, steps_of
from nbbn.cuda.device import DeviceArray
from nbbn.cuda.jit import SIMULATED
from nbbn.cuda.launcher import Launch, place_of
from nbbn.cuda.memory import synchronize
from nbbn.cuda.storage import WIDEST
from nbbn.cuda.workspace import read_skipped, workspace

name = "cuda"
plain = None  # a launch costs more than the checks of the long way


#: Held from a launch that counts skipped channels until the count is read: another thread may use the same stream.
_skips = threading.RLock()


def _settled(operation):
    """An operation that has finished when it returns, if some library's arrays must not be let go of before."""

    @wraps(operation)
    def run(*arguments):
        try:
            return operation(*arguments)
        finally:
            if any(isinstance(given, DeviceArray) and not given.library.is_plain for given in arguments):
                place = _place(arguments[0])
                with memory.there(place.device):
                    synchronize(place.stream)

    return run


def _counted(operation):
    """An operation, the last argument of which is the update, that counts what it skips apart from other threads."""

    @wraps(operation)
    def run(*arguments):
        update = arguments[-1]
        with _skips if update is not None and update.skip_nonfinite else nullcontext():
            return operation(*arguments)

    return run


@_settled
def moments(x, where, count, mean, m2):
    if where is None:
        _moments(_place(x), x, count, mean, m2)
    else:
        _masked_moments(_place(x), x, where, count, mean, m2)


@_settled
def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    _affine(_place(x), x, mean, var, weight, bias, eps, residual, relu, out)


@_settled
@_counted
def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    place = _place(x)
    added = None if residual is None else _seen(residual)
    flags = running_flags(update), flags_of(weight=weight, bias=bias)
    recipe = recipes.training(_seen(x), added, _seen(out), *flags, properties(x.device))
    weight, bias = packed(weight, bias)
    space = recipe(
        place, x.address, x.address if residual is None else residual.address, out.address,
        (count.address, mean.address, m2.address), _address(weight), _address(bias), float(eps), _floor(relu),
        running_of(update),
    )  # fmt: skip
    return _skipped(update, space, place)


@_settled
@_counted
def ema(count, mean, m2, update):
    place = _place(count)
    space = workspace(place.device, place.stream, 0, 0)
    _per_channel(channels.ema(), count.size)(
        place, count.address, mean.address, m2.address, *running_of(update), running_flags(update), count.size,
        space.skipped,
    )  # fmt: skip
    return _skipped(update, space, place)


@_settled
def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    place = _place(x)
    flags = flags_of(mean=mean, var=var, weight=weight) | gradient_flags(grad_weight.dtype)
    views = _seen(grad_out), _seen(x)
    mean, var, weight = packed(mean, var, weight)
    # not in the workspace: another thread may launch on this stream between two launches
    totals = x.empty((2 * x.shape[1],), np.dtype(np.float64))
    parameters = totals.address, mean.address, var.address, _address(weight), float(eps)
    results = grad_weight.address, grad_bias.address
    if training:
        recipe = recipes.gradients(*views, _seen(grad_x), flags, properties(x.device))
        recipe(place, grad_out.address, x.address, grad_x.address, parameters, results)
    else:  # mean and var are constants: the gradient is scaled, nothing else
        sums = recipes.gradient_totals(*views, flags, properties(x.device))
        sums(place, grad_out.address, x.address, parameters, results)
        _affine(place, grad_out, None, var, weight, None, eps, None, False, grad_x)


@_settled
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    _combine(channels.merge(), (count_a, mean_a, m2_a, count_b, mean_b, m2_b), (count, mean, m2))


@_settled
def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    _combine(channels.remove(), (count_all, mean_all, m2_all, count_b, mean_b, m2_b), (count, mean, m2))


@_settled
def variances(count, m2, ddof, root, out):
    """The variance of every channel, or its square root: what `Moments` computes by itself in host memory."""
    _per_channel(channels.variances(), count.size)(
        _place(count), count.address, m2.address, ddof, int(root), out.address, count.size
    )


def _place(x):
    return place_of(x.library, x.owner, x.device)


def _seen(array):
    return array.geometry, array.address % WIDEST


def _floor(relu):
    return 0.0 if relu else -float("inf")


def _address(array):
    return 0 if array is None else array.address


def properties(device):
    """What plans need to know of a device."""
    return _properties(memory.number_of(device))


@lru_cache(64)
def _properties(device):
    if SIMULATED:
        return SIMULATED_DEVICE
    return launch.Device.of(cuda.get_current_device() if device is None else cuda.gpus[device])


#: Small, so that small arrays are shared between blocks, and not all of them fit into the cache.
SIMULATED_DEVICE = launch.Device(4, 1 << 18)


def _skipped(update, space, place):
    """How many channels were skipped: only if asked to skip does it look, and wait."""
    if update is None or not update.skip_nonfinite:
        return 0
    with memory.there(place.device):
        return read_skipped(space, place.stream)


@lru_cache(1024)
def _launch(kernel, blocks):
    return Launch(kernel, blocks, 256)


def _per_channel(kernel, count):
    """A launch with one thread per channel."""
    return _launch(kernel, max(1, -(-count // 256)))


def _combine(kernel, arguments, results):
    addresses = [a.address for a in (*packed(*arguments), *results)]
    count = results[0].size
    _per_channel(kernel, count)(_place(arguments[0]), *addresses, count)


def _masked_moments(place, x, where, count, mean, m2):
    outer, channel_count, inner = x.shape
    parts = max(1, min(outer * inner // 4096, -(-2 * properties(x.device).multiprocessors // channel_count)))
    space = workspace(place.device, place.stream, channel_count, 2 * channel_count * parts)  # records of three numbers
    _launch(masked.compiled(x.kind.name), channel_count * parts)(
        place, x.address, *steps_of(x.geometry), where.address, *where.strides, outer, inner, parts, space.sums,
        space.first_ticket, count.address, mean.address, m2.address,
    )  # fmt: skip


def _moments(place, x, count, mean, m2):
    recipe = recipes.statistics(_seen(x), 0, properties(x.device))
    recipe(place, x.address, (count.address, mean.address, m2.address), NOT_RUNNING)


def _affine(place, x, mean, var, weight, bias, eps, residual, relu, out):
    flags = flags_of(mean=mean, var=var, weight=weight, bias=bias)
    flags |= formulas.CONSTANT_STATISTICS if mean is None else 0
    mean, var, weight, bias = packed(mean, var, weight, bias)
    added = None if residual is None else _seen(residual)
    recipe = recipes.affine(_seen(x), added, _seen(out), flags, properties(x.device))
    recipe(
        place, x.address, x.address if residual is None else residual.address, out.address, _address(mean), var.address,
        1.0, _address(weight), _address(bias), float(eps), _floor(relu),
    )  # fmt: skip
