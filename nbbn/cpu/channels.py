"""Arithmetic per channel: coefficients of the affine step, moving averages, merging and removing moments.

`weight` and `bias` are float64 arrays; empty means absent. Everything is computed in float64 and only then
rounded to the precision of the arrays it is stored in.
"""

import math

import numpy as np

from nbbn import formulas
from nbbn.cpu.jit import formula, serial_kernel

from_deviations = formula(formulas.from_deviations)
merge_formula = formula(formulas.merge)
remove_formula = formula(formulas.remove)
variance_formula = formula(formulas.variance)
moving_average_formula = formula(formulas.moving_average)
inverse_std = formula(formulas.inverse_std)
fits_float32 = formula(formulas.fits_float32)
gradient_coefficients_formula = formula(formulas.gradient_coefficients)


@formula
def channel_scale(var, weight, c, eps):
    scale = inverse_std(var, eps)
    return scale * weight[c] if weight.size else scale


@formula
def channel_shift(bias, c):
    return np.float64(bias[c]) if bias.size else -0.0  # y + -0.0 is y, also where y is -0.0


@formula
def fill_coefficients(mean, var, weight, bias, c, eps, wide, narrow, k):
    """Fill column k of `wide` and of `narrow` with mean, scale, shift of channel c; returns whether narrow serves."""
    scale = channel_scale(var, weight, c, eps)
    shift = channel_shift(bias, c)
    wide[0, k], wide[1, k], wide[2, k] = mean, scale, shift
    return fill_narrow(mean, scale, shift, narrow, k)


@formula
def fill_narrow(mean, scale, shift, narrow, k):
    """Fill column k of `narrow` with mean, scale, shift for its arithmetic; returns whether that serves.

    y = (x - mean) * scale + shift with mean = high + low. x - high is exact for x near the mean, and low is at
    most half a unit in the last place of the mean: folding that into the shift costs nothing. Folding the whole
    mean into it, as frameworks do, loses all digits when |mean| >> std.
    """
    narrow[0, k] = mean
    low = mean - np.float64(narrow[0, k])
    narrow[1, k] = scale
    # without a low part, or with that of an infinite mean (NaN), there is nothing to fold: 0 * inf would be NaN
    narrow[2, k] = shift - low * scale if abs(low) > 0.0 else shift
    return fits_float32(mean, low, scale)


@serial_kernel(reads=("mean", "var", "weight", "bias"))
def coefficients(mean, var, weight, bias, eps, wide, narrow, narrow_serves):
    """Fill mean, scale, shift of y = (x - mean) * scale + shift: in float64, and split into narrower arithmetic.

    `narrow_serves[c]` says whether the narrower is accurate enough for channel c; returns whether it is for all.
    """
    all_served = True
    for c in range(var.size):
        narrow_serves[c] = fill_coefficients(mean[c], var[c], weight, bias, c, eps, wide, narrow, c)
        all_served &= narrow_serves[c]
    return all_served


@formula
def gradient_coefficients(count, total, products, mean, high, inv_std, weight, c):
    """(scale, slope, offset) of grad_x = scale * g + slope * (x - high) + offset, and the parameter gradients.

    `products` were summed with x - high: both they and the offset are corrected for the low part of the mean.
    """
    low = mean - np.float64(high)
    corrected = abs(low) > 0.0 and math.isfinite(total)
    deviation_products = products - low * total if corrected else products
    w = weight[c] if weight.size else 1.0
    scale, slope, offset = gradient_coefficients_formula(count, total, deviation_products, inv_std, w)
    return scale, slope, offset - slope * low if abs(low) > 0.0 else offset, deviation_products * inv_std, total


@serial_kernel(reads=("count", "mean", "m2"))
def ema(running_mean, running_var, count, mean, m2, momentum, ddof, skip):
    """Moving averages in place; with `skip`, channels with a non-finite batch keep theirs. Returns how many did.

    Non-finite means: not finite once stored in the precision of the running arrays.
    """
    skipped = np.int64(0)
    narrow_mean = running_mean.dtype.type
    narrow_var = running_var.dtype.type
    for c in range(count.size):
        if count[c] == 0:
            continue
        var = variance_formula(count[c], m2[c], ddof)
        if skip and not (math.isfinite(narrow_mean(mean[c])) and math.isfinite(narrow_var(var))):
            skipped += 1
            continue
        move(running_mean, running_var, c, mean[c], var, momentum)
    return skipped


@formula
def move(running_mean, running_var, c, mean, var, momentum):
    """The moving averages of channel c."""
    running_mean[c] = moving_average_formula(np.float64(running_mean[c]), mean, momentum)
    running_var[c] = moving_average_formula(np.float64(running_var[c]), var, momentum)


@serial_kernel(reads=("count_a", "mean_a", "m2_a", "count_b", "mean_b", "m2_b"))
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    for c in range(count.size):
        count[c], mean[c], m2[c] = merge_formula(count_a[c], mean_a[c], m2_a[c], count_b[c], mean_b[c], m2_b[c])


@serial_kernel(reads=("count_all", "mean_all", "m2_all", "count_b", "mean_b", "m2_b"))
def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    for c in range(count.size):
        whole = (count_all[c], mean_all[c], m2_all[c])
        count[c], mean[c], m2[c] = remove_formula(*whole, count_b[c], mean_b[c], m2_b[c])


@formula
def gradient_fits(mean, inv_std, weight):
    """Whether float32 serves the input gradient of a channel."""
    power = inv_std * inv_std
    served = fits_float32(mean, 0.0, inv_std) and fits_float32(mean, 0.0, power)
    return served and fits_float32(mean, 0.0, inv_std * weight) and fits_float32(mean, 0.0, power * inv_std * weight)


@serial_kernel(reads=("mean", "var", "weight"))
def backward_scales(mean, var, weight, eps, inv_std):
    """Fill 1 / sqrt(var + eps); returns whether float32 serves the input gradient of every channel."""
    served = True
    for c in range(mean.size):
        inv_std[c] = inverse_std(var[c], eps)
        served &= gradient_fits(mean[c], inv_std[c], weight[c] if weight.size else 1.0)
    return served


@serial_kernel(reads=("total", "products", "mean", "high", "inv_std", "weight"))
def input_gradient_coefficients(
    count, total, products, mean, high, inv_std, weight, scale, slope, offset, grad_weight, grad_bias
):
    """Fill the coefficients of the training-mode input gradient and the parameter gradients."""
    for c in range(mean.size):
        scale[c], slope[c], offset[c], grad_weight[c], grad_bias[c] = gradient_coefficients(
            count, total[c], products[c], mean[c], high[c], inv_std[c], weight, c
        )
