"""The formulas of batch normalization, once, as plain scalar functions.

The compiled backends compile them; the reference calls those that are not plain NumPy expressions of whole
arrays. They take and return scalars (float64 unless said otherwise), hold no loop and allocate nothing.

Sources: Welford (1962) and Chan, Golub & LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", for `merge` and `remove`; the same authors (1983), "Algorithms for Computing the
Sample Variance: Analysis and Recommendations", for `from_deviations`; Ioffe & Szegedy (2015), "Batch
Normalization", algorithms 1 and 2, for the rest.
"""

import math

#: float32 arithmetic is used only where the scale lies in this range; outside it the result would
#: lose digits to denormals or overflow, and the channel is computed in float64.
SCALE_LOWEST = 1e-36
SCALE_HIGHEST = 1e36
#: Beyond this mean, x - mean may overflow float32 where the result would not.
MEAN_HIGHEST = 1e30


def from_deviations(count, origin, total, squares):
    """Mean and m2 of a set, from the sums of d and of d * d with d = x - origin, origin near the mean.

    The second term corrects what the origin is off (Chan, Golub & LeVeque 1983, eq. 1.7).
    """
    offset = total / count
    m2 = squares - offset * total
    # an infinite origin is the mean of infinite data: inf - inf would make it NaN. m2 can round to below zero.
    return origin + offset if abs(origin) < math.inf else origin, 0.0 if m2 < 0.0 else m2


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Moments of two sets together (Chan et al. 1979, eq. 2.1)."""
    if count_b == 0:
        return count_a, mean_a, m2_a
    if count_a == 0:
        return count_b, mean_b, m2_b
    count = count_a + count_b
    delta = mean_b - mean_a
    weight_b = count_b / count
    # else a mean is infinite and must stay so, or both are finite and huge
    finite = abs(delta) < math.inf
    mean = mean_a + delta * weight_b if finite else mean_a * (count_a / count) + mean_b * weight_b
    m2 = m2_a + m2_b + delta * delta * (count_a * weight_b)
    return count, mean, m2


def remove(count, mean, m2, count_b, mean_b, m2_b):
    """Moments of what is left when part b is taken out of the whole: `merge` solved for a."""
    if count_b == 0:
        return count, mean, m2
    count_a = count - count_b
    if count_a == 0:
        return count_a, 0.0, 0.0
    delta = mean_b - mean
    mean_a = mean - delta * (count_b / count_a)
    m2_a = m2 - m2_b - delta * delta * (count_b * (count / count_a))
    # rounding can leave a value just below zero, a NaN must stay one
    return count_a, mean_a, 0.0 if m2_a < 0.0 else m2_a


def variance(count, m2, ddof):
    """m2 / (count - ddof), and NaN where that is not defined."""
    return m2 / (count - ddof) if count > ddof else math.nan


def moving_average(running, batch, momentum):
    """running + momentum * (batch - running), exact at both ends.

    momentum 0 keeps `running` and 1 takes `batch`, even where the other one is NaN.
    """
    if momentum == 0.0:
        return running
    if momentum == 1.0:
        return batch
    return running + momentum * (batch - running)


def inverse_std(var, eps):
    """1 / sqrt(var + eps)."""
    return 1.0 / math.sqrt(var + eps)


def fits_float32(mean, low, scale):
    """Whether float32 arithmetic with this mean (low: what its rounding to float32 leaves) and scale is accurate.

    Zero, infinite and NaN scales are as good in float32 as in float64, an infinite one if it meets no low part.
    """
    size = abs(scale)
    return not (
        0.0 < size < SCALE_LOWEST
        or SCALE_HIGHEST < size < math.inf
        or (size == math.inf and low != 0.0)
        or MEAN_HIGHEST < abs(mean) < math.inf
    )


def gradient_coefficients(count, sum_grad, sum_grad_deviation, inv_std, weight):
    """Slope and offset of the input gradient of training-mode batch norm.

    With d = x - mean:  grad_x = scale * grad_out + slope * d + offset, where scale = weight * inv_std
    (Ioffe & Szegedy 2015, section 3, the chain rule written out and collected).
    """
    scale = weight * inv_std
    slope = -scale * inv_std * inv_std * (sum_grad_deviation / count)
    offset = -scale * (sum_grad / count)
    return scale, slope, offset
