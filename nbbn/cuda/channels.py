"""Kernels with one thread per channel: moving averages, merging and taking apart moments, variances."""

import math
from functools import cache

from numba import cuda

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import kernel


def ema_source(count, mean, m2, running_mean, running_var, momentum, ddof, flags, channels, skipped):
    """Moving averages of every channel with values."""
    c = cuda.grid(1)
    if c < channels:
        values = simd.load_int64(count, c)
        average = simd.load_float64(mean, c)
        deviations = simd.load_float64(m2, c)
        if formulas.move_running(c, values, average, deviations, running_mean, running_var, momentum, ddof, flags):
            simd.take_ticket(skipped, 0)


def _combining(name, formula):
    """The kernel of that name: moments of every channel from those of two sets."""

    def source(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2, channels):
        c = cuda.grid(1)
        if c < channels:
            values, average, deviations = formula(
                simd.load_int64(count_a, c), simd.load_float64(mean_a, c), simd.load_float64(m2_a, c),
                simd.load_int64(count_b, c), simd.load_float64(mean_b, c), simd.load_float64(m2_b, c),
            )  # fmt: skip
            simd.store_int64(count, c, values)
            simd.store_float64(mean, c, average)
            simd.store_float64(m2, c, deviations)

    source.__name__ = source.__qualname__ = name
    return source


merge_source = _combining("merge_source", formulas.merge)
remove_source = _combining("remove_source", formulas.remove)


def variances_source(count, m2, ddof, root, out, channels):
    """Variance of every channel, or its square root."""
    c = cuda.grid(1)
    if c < channels:
        value = formulas.variance(simd.load_int64(count, c), simd.load_float64(m2, c), ddof)
        simd.store_float64(out, c, math.sqrt(value) if root else value)


ema = cache(lambda: kernel(ema_source))
merge = cache(lambda: kernel(merge_source))
remove = cache(lambda: kernel(remove_source))
variances = cache(lambda: kernel(variances_source))
