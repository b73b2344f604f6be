"""The CPU backend: prepares what channels need, then calls `core`. The contract is `nbbn.backends.Backend`."""

from typing import Any

import numpy as np

from nbbn.cpu import channels, core, masked, plan, threads
from nbbn.cpu import plain as plain  # the short way
from nbbn.cpu.core import NOTHING

name = "cpu"


def moments(x, where, count, mean, m2):
    if where is None:
        core.moments(x, count, mean, m2)
        return
    with threads.limit():
        masked.moments(plan.workers(x), core.raw(x), where, count, mean, m2)


def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    ready = core.coefficients(x.shape[1], core.arithmetic(x, residual, out))
    numbers = _float64(mean), _float64(var), _float64_or_nothing(weight), _float64_or_nothing(bias)
    all_served = channels.coefficients(*numbers, eps, *ready)
    core.affine(x, residual, relu, out, all_served, *ready)


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    parameters = _float64_or_nothing(weight), _float64_or_nothing(bias)
    core.train(x, *parameters, eps, residual, relu, out, count, mean, m2)
    return 0 if update is None else ema(count, mean, m2, update)


def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    mean, var, weight = _float64(mean), _float64(var), _float64_or_nothing(weight)
    inv_std = np.empty(mean.size)
    served = channels.backward_scales(mean, var, weight, eps, inv_std)
    high = mean.astype(core.arithmetic(grad_out, x, grad_x) if served else core.FLOAT64)
    of_channels = mean, high, inv_std, weight
    if training:
        core.backward(grad_out, x, *of_channels, grad_x, grad_weight, grad_bias)
    else:  # mean and var are constants: the gradient is scaled, nothing else
        core.parameter_gradients(grad_out, x, *of_channels, grad_weight, grad_bias)
        w = weight if weight.size else None
        affine(grad_out, np.zeros_like(mean), var, w, None, eps, None, False, grad_x)


def ema(count, mean, m2, update):
    running = (update.running_mean, update.running_var)
    return channels.ema(*running, count, mean, m2, update.momentum, update.ddof, update.skip_nonfinite)


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    channels.merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2)


def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    channels.remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2)


def _float64(values: Any) -> Any:
    """Contiguous float64: one type, so one compiled kernel, for all that comes in."""
    usable = values.dtype.char == "d" and values.flags.c_contiguous and values.flags.aligned
    return values if usable else np.array(values, np.float64)


def _float64_or_nothing(values: Any) -> Any:
    return NOTHING if values is None else _float64(values)
