"""The formulas of `nbbn.formulas`, compiled for a device, and what kernels need around them per channel.

Everything here is float64 and runs once per channel, or once per channel and block; never inside a loop over data.
"""

import math

from numba import float32, float64

from nbbn import formulas
from nbbn.cuda import simd
from nbbn.cuda.jit import device

from_deviations = device(formulas.from_deviations)
merge = device(formulas.merge)
remove = device(formulas.remove)
variance = device(formulas.variance)
moving_average = device(formulas.moving_average)
inverse_std = device(formulas.inverse_std)
fits_float32 = device(formulas.fits_float32)
gradient_coefficients = device(formulas.gradient_coefficients)

# What a launch says in one integer: which arrays there are, and which of them hold float64 (the others float32).
HAS_WEIGHT, HAS_BIAS, HAS_RUNNING, SKIP_NONFINITE, HAS_RESIDUAL, CONSTANT_STATISTICS = (1 << k for k in range(6))
WIDE_MEAN, WIDE_VAR, WIDE_WEIGHT, WIDE_BIAS, WIDE_GRADIENT = (1 << k for k in range(8, 13))


@device
def parameter(address, c, is_wide):
    """Value `c` of a per-channel array, as float64."""
    if is_wide:
        return simd.load_float64(address, c)
    return float64(simd.load_float32(address, c))


@device
def set_parameter(address, c, is_wide, value):
    if is_wide:
        simd.store_float64(address, c, value)
    else:
        simd.store_float32(address, c, float32(value))


@device
def is_finite(value):
    return abs(value) < math.inf


@device
def scale_of(var, weight, c, eps, flags):
    """Weight / sqrt(var + eps)."""
    scale = inverse_std(var, eps)
    if flags & HAS_WEIGHT:
        scale *= parameter(weight, c, flags & WIDE_WEIGHT)
    return scale


@device
def affine_coefficients(mean, var, divisor, weight, bias, c, eps, flags):
    """(mean, scale, shift) of y = (x - mean) * scale + shift; `var` holds the variance times `divisor`."""
    spread = parameter(var, c, flags & WIDE_VAR) / divisor
    scale = scale_of(spread, weight, c, eps, flags)
    center = 0.0 if flags & CONSTANT_STATISTICS else parameter(mean, c, flags & WIDE_MEAN)
    shift = parameter(bias, c, flags & WIDE_BIAS) if flags & HAS_BIAS else -0.0  # y + -0.0 is y, also where y is -0.0
    return center, scale, shift


@device
def low_part(mean):
    """What rounding the mean to float32 leaves."""
    return mean - float64(float32(mean))


@device
def folded_shift(mean, scale, shift):
    """The shift that goes with the mean rounded to float32.

    x - high is exact for x near the mean, and the low part is at most half a unit in the last place of the mean:
    folding that into the shift costs nothing. Folding the whole mean into it, as frameworks do, loses all digits
    when |mean| >> std.
    """
    low = low_part(mean)
    # without a low part, or with that of an infinite mean (NaN), there is nothing to fold: 0 * inf would be NaN
    return shift - low * scale if abs(low) > 0.0 else shift


@device
def move_running(c, count, mean, m2, running_mean, running_var, momentum, ddof, flags):
    """The moving averages of one channel; returns 1 if the batch is not finite and the channel keeps its values."""
    if count == 0:
        return 0
    batch_var = variance(count, m2, ddof)
    wide_mean, wide_var = flags & WIDE_MEAN, flags & WIDE_VAR
    if flags & SKIP_NONFINITE:
        # finite once stored in the precision of the running arrays
        stored_mean = mean if wide_mean else float64(float32(mean))
        stored_var = batch_var if wide_var else float64(float32(batch_var))
        if not (is_finite(stored_mean) and is_finite(stored_var)):
            return 1
    new_mean = moving_average(parameter(running_mean, c, wide_mean), mean, momentum)
    new_var = moving_average(parameter(running_var, c, wide_var), batch_var, momentum)
    set_parameter(running_mean, c, wide_mean, new_mean)
    set_parameter(running_var, c, wide_var, new_var)
    return 0


@device
def finish(c, values, mean, m2, count_out, mean_out, m2_out, running_mean, running_var, momentum, ddof, flags, skipped):
    """Store the moments of one channel and move its running averages."""
    simd.store_int64(count_out, c, values)
    simd.store_float64(mean_out, c, mean)
    simd.store_float64(m2_out, c, m2)
    if flags & HAS_RUNNING:
        if move_running(c, values, mean, m2, running_mean, running_var, momentum, ddof, flags):
            simd.take_ticket(skipped, 0)


@device
def weight_of(weight, c, flags):
    return parameter(weight, c, flags & WIDE_WEIGHT) if flags & HAS_WEIGHT else 1.0


@device
def gradient_fits_float32(mean, inv_std, weight):
    """Whether float32 arithmetic serves the gradients of a channel."""
    power = inv_std * inv_std
    return (
        fits_float32(mean, 0.0, inv_std)
        and fits_float32(mean, 0.0, power)
        and fits_float32(mean, 0.0, inv_std * weight)
        and fits_float32(mean, 0.0, power * inv_std * weight)
    )


@device
def finish_gradients(c, total, products, low, mean, var, eps, flags, totals, grad_weight, grad_bias):
    """Store the parameter gradients of a channel, and both sums for the input gradient.

    `products` were summed with x - high, `low` is what the mean has besides.
    """
    if abs(low) > 0.0 and is_finite(total):
        products -= low * total
    simd.store_float64(totals, 2 * c, total)
    simd.store_float64(totals, 2 * c + 1, products)
    inv_std = inverse_std(parameter(var, c, flags & WIDE_VAR), eps)
    set_parameter(grad_weight, c, flags & WIDE_GRADIENT, products * inv_std)
    set_parameter(grad_bias, c, flags & WIDE_GRADIENT, total)


@device
def input_gradient(c, count, mean, var, weight, eps, flags, totals):
    """(mean, scale, slope, offset, whether float32 serves) of grad_x = scale * g + slope * (x - mean) + offset."""
    center = parameter(mean, c, flags & WIDE_MEAN)
    inv_std = inverse_std(parameter(var, c, flags & WIDE_VAR), eps)
    w = weight_of(weight, c, flags)
    total = simd.load_float64(totals, 2 * c)
    products = simd.load_float64(totals, 2 * c + 1)
    scale, slope, offset = gradient_coefficients(count, total, products, inv_std, w)
    return center, scale, slope, offset, gradient_fits_float32(center, inv_std, w)
