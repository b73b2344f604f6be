"""The CUDA backend: picks a kernel and a launch plan. The contract is `nbbn.backends.Backend`.

Views and per-channel arrays are `nbbn.cuda.device.DeviceArray`. Importing needs neither a driver nor numba-cuda;
`nbbn.cuda.requirements` says what is missing before anything is called.
"""

import warnings
from functools import lru_cache, wraps

import numpy as np
from numba import cuda

from nbbn.cuda import (
    affine_columns,
    affine_rows,
    channels,
    formulas,
    gradient_sums,
    input_gradient,
    jax_arrays,
    launch,
    masked,
    moments_columns,
    moments_rows,
)
from nbbn.cuda.arguments import (
    find_plan,
    parameters_of,
    places_of,
    row_places_of,
    running_of,
    shares_of,
    strides_of,
    tile_of,
)
from nbbn.cuda.jit import SIMULATED
from nbbn.cuda.launch import Rows
from nbbn.cuda.memory import queue_of, synchronize, there
from nbbn.cuda.storage import WIDEST
from nbbn.cuda.workspace import read_skipped, workspace

name = "cuda"
small = None  # a launch costs more than the checks of the long way


def _settled(operation):
    """An operation that has finished when it returns, if an array of JAX was read for it."""

    @wraps(operation)
    def run(*arguments):
        try:
            return operation(*arguments)
        finally:
            if jax_arrays.were_read():
                synchronize(arguments[0].stream())

    return run


@_settled
def moments(x, where, count, mean, m2):
    if where is None:
        _moments(_Call(x), x, count, mean, m2, None)
    else:
        _masked_moments(_Call(x), x, where, count, mean, m2)


@_settled
def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    _affine(_Call(x), x, mean, var, 1.0, weight, bias, eps, residual, relu, out)


@_settled
def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    """Two launches: statistics with the moving averages, then normalization, which begins where the first ended."""
    call = _Call(x)
    skipped = _moments(call, x, count, mean, m2, update)
    values = float(x.shape[0] * x.shape[2])
    _affine(call, x, mean, m2, values, weight, bias, eps, residual, relu, out)
    return skipped()


@_settled
def ema(count, mean, m2, update):
    call = _Call(count)
    space = call.workspace(0, 0)
    running, flags = running_of(update)
    call.launch(
        channels.ema(), call.per_channel(count), 256, count.address, mean.address, m2.address, *running, flags,
        count.size, space.skipped,
    )  # fmt: skip
    return call.skipped(update, space)()


@_settled
def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    """Two launches: the sums with the parameter gradients, then the input gradient."""
    call = _Call(x)
    outer, channel_count, inner = x.shape
    plan = call.plan((grad_out, x), True)
    (center, spread, factor), flags = parameters_of(mean=mean, var=var, weight=weight)
    flags |= formulas.HAS_WEIGHT if weight is not None else 0
    flags |= formulas.WIDE_GRADIENT if grad_weight.dtype.char == "d" else 0
    space = call.workspace(plan.blocks, channel_count * shares_of(plan))
    # not in the workspace: another thread may launch on this stream between the two launches
    kept = x.empty((2 * channel_count,), np.dtype(np.float64))
    totals, work = kept.address, space.sums
    parameters = center.address, spread.address, 0 if factor is None else factor.address, float(eps), flags
    kinds = grad_out.kind.name, x.kind.name
    results = grad_weight.address, grad_bias.address
    if isinstance(plan, Rows):
        call.launch(
            gradient_sums.rows(*kinds, plan.lanes), plan.blocks, plan.threads, *places_of(grad_out, x), outer, inner,
            plan.parts, work, space.first_ticket, totals, *parameters, *results,
        )  # fmt: skip
    else:
        call.launch(
            gradient_sums.columns(*kinds, plan.lanes), plan.blocks, plan.threads, *row_places_of(grad_out, x), *x.shape,
            *tile_of(plan), work, space.first_ticket, totals, *parameters, *results,
        )  # fmt: skip
    if not training:  # mean and var are constants: the gradient is scaled, nothing else
        _affine(call, grad_out, None, var, 1.0, weight, None, eps, None, False, grad_x)
        return
    all_kinds = *kinds, grad_x.kind.name
    plan = call.plan((grad_out, x, grad_x), False)
    if isinstance(plan, Rows):
        call.launch(
            input_gradient.rows(*all_kinds, plan.lanes), plan.blocks, plan.threads,
            *places_of(grad_out, x, grad_x), outer, inner, plan.parts, totals, *parameters,
        )  # fmt: skip
    else:
        call.launch(
            input_gradient.columns(*all_kinds, plan.lanes), plan.blocks, plan.threads,
            *row_places_of(grad_out, x, grad_x), *x.shape, *tile_of(plan), totals, *parameters,
        )  # fmt: skip


@_settled
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    _combine(channels.merge(), (count_a, mean_a, m2_a, count_b, mean_b, m2_b), (count, mean, m2))


@_settled
def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    _combine(channels.remove(), (count_all, mean_all, m2_all, count_b, mean_b, m2_b), (count, mean, m2))


@_settled
def variances(count, m2, ddof, root, out):
    """The variance of every channel, or its square root: what `Moments` computes by itself in host memory."""
    call = _Call(count)
    call.launch(
        channels.variances(), call.per_channel(count), 256, count.address, m2.address, ddof, int(root), out.address,
        count.size,
    )  # fmt: skip


class _Call:
    """Where a call runs: the device of its first array, on that array's stream."""

    def __init__(self, x):
        self.device, self.stream = x.device, x.stream()
        self.queue = queue_of(self.stream)

    def plan(self, arrays, reduces):
        places = tuple((a.address % WIDEST, *a.strides[:2], a.kind) for a in arrays)
        return find_plan(arrays[0].shape, places, properties(self.device).multiprocessors, reduces)

    def workspace(self, tickets, pairs):
        with there(self.device):
            return workspace(self.device, self.stream, tickets, pairs)

    def launch(self, kernel, blocks, threads, *arguments):
        with there(self.device):
            _configured(kernel, blocks, threads, self.queue)(*arguments)

    def skipped(self, update, space):
        """A function that says how many channels were skipped: only if asked to skip does it look, and wait."""
        if update is None or not update.skip_nonfinite:
            return lambda: 0
        return lambda: read_skipped(space, self.stream)

    def per_channel(self, array):
        """Blocks for one thread per channel."""
        return max(1, -(-array.size // 256))


@lru_cache(1024)
def _configured(kernel, blocks, threads, queue):
    """A kernel with its launch plan and stream: made once. Without Numba's advice on grids below 128 blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, queue]


@lru_cache(64)
def properties(device):
    """What plans need to know of a device."""
    if SIMULATED:
        return SIMULATED_DEVICE
    return launch.Device.of(cuda.get_current_device() if device is None else cuda.gpus[device])


#: Small, so that small arrays are shared between blocks.
SIMULATED_DEVICE = launch.Device(4)


def _combine(kernel, arguments, results):
    call = _Call(arguments[0])
    # what comes from a library may be a view with strides
    packed = (a if a.flags.c_contiguous else a.contiguous() for a in arguments)
    addresses = [a.address for a in (*packed, *results)]
    call.launch(kernel, call.per_channel(results[0]), 256, *addresses, results[0].size)


def _masked_moments(call, x, where, count, mean, m2):
    outer, channel_count, inner = x.shape
    parts = max(1, min(outer * inner // 4096, -(-2 * properties(x.device).multiprocessors // channel_count)))
    space = call.workspace(channel_count, 2 * channel_count * parts)  # records of three numbers
    call.launch(
        masked.compiled(x.kind.name), channel_count * parts, 256, x.address, *strides_of(x), where.address,
        *where.strides, outer, inner, parts, space.sums, space.first_ticket, count.address, mean.address, m2.address,
    )  # fmt: skip


def _moments(call, x, count, mean, m2, update):
    outer, _, inner = x.shape
    plan = call.plan((x,), True)
    running, flags = running_of(update)
    results = count.address, mean.address, m2.address, *running, flags
    space = call.workspace(plan.blocks, x.shape[1] * shares_of(plan))
    sums = space.sums, space.first_ticket
    if isinstance(plan, Rows):
        kernel = moments_rows.compiled(x.kind.name, plan.lanes)
        call.launch(
            kernel, plan.blocks, plan.threads, x.address, *strides_of(x), outer, inner, plan.parts, *sums, *results,
            space.skipped,
        )  # fmt: skip
    else:
        call.launch(
            moments_columns.compiled(x.kind.name, plan.lanes), plan.blocks, plan.threads, x.address, strides_of(x)[0],
            *x.shape, *tile_of(plan), *sums, *results, space.skipped,
        )  # fmt: skip
    return call.skipped(update, space)


def _affine(call, x, mean, var, divisor, weight, bias, eps, residual, relu, out):
    outer, _, inner = x.shape
    addend = x if residual is None else residual
    plan = call.plan((x, out) if residual is None else (x, residual, out), False)
    flags = formulas.HAS_RESIDUAL if residual is not None else 0
    flags |= formulas.CONSTANT_STATISTICS if mean is None else 0
    for given, bit in ((weight, formulas.HAS_WEIGHT), (bias, formulas.HAS_BIAS)):
        flags |= bit if given is not None else 0
    parameters, wide = parameters_of(mean=mean, var=var, weight=weight, bias=bias)
    addresses = [0 if a is None else a.address for a in parameters]
    floor = 0.0 if relu else -float("inf")
    kinds = x.kind.name, addend.kind.name, out.kind.name
    coefficients = *addresses[:2], divisor, *addresses[2:], float(eps), floor, flags | wide
    if isinstance(plan, Rows):
        kernel = affine_rows.compiled(*kinds, plan.lanes)
        call.launch(
            kernel,
            plan.blocks,
            plan.threads,
            *places_of(x, addend, out),
            outer,
            inner,
            plan.parts,
            *coefficients,
        )
    else:
        call.launch(
            affine_columns.compiled(*kinds, plan.lanes), plan.blocks, plan.threads,
            *row_places_of(x, addend, out), *x.shape, *tile_of(plan), *coefficients,
        )  # fmt: skip
