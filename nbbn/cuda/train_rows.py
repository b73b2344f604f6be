"""Training in one launch: a block takes a channel, and normalizes what it has just read for the statistics.

The second reading finds the channel in the caches, as long as those that are worked on at one time fit there:
`nbbn.cuda.launch` decides. Sums are taken in the order of `moments_rows` with one part per channel, and coefficients
from what was stored: the same bits as in two launches of those plans.
"""

from functools import cache

from numba import cuda, float64, int64

from nbbn.cuda import formulas
from nbbn.cuda.affine_rows import coefficients_of_block, make_normalized
from nbbn.cuda.jit import kernel
from nbbn.cuda.moments_rows import make_origin_of, make_part_sums, make_settled
from nbbn.cuda.reduce import SLOTS, part_of


@cache
def source(x_name, residual_name, out_name, lanes):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    origin_of, part_sums, settled = make_origin_of(x_name), make_part_sums(x_name, lanes), make_settled(x_name)
    normalized = make_normalized(x_name, residual_name, out_name, lanes)

    def train_rows(
        x, x_stride, x_channel, residual, residual_stride, residual_channel, out, out_stride, out_channel,
        outer, inner, count, mean, m2, running_mean, running_var, momentum, ddof, running_flags, skipped,
        weight, bias, eps, floor, flags,
    ):  # fmt: skip
        slots = cuda.shared.array(SLOTS, float64)
        shared = cuda.shared.array(3, float64)
        c = int64(cuda.blockIdx.x)
        values = outer * inner
        start = c * x_channel
        origin, spread = origin_of(x, start, x_stride, inner, values)
        begin, end = part_of(values, lanes, 0, 1)
        first, second = part_sums(x, start, x_stride, inner, begin, end, origin, spread, slots)
        average, deviations = settled(x, start, x_stride, inner, values, float64(origin), first, second, slots)
        if cuda.threadIdx.x == 0:
            formulas.finish(
                c, values, average, deviations, count, mean, m2, running_mean, running_var, momentum, ddof,
                running_flags, skipped,
            )  # fmt: skip
        # by the thread that stored the moments
        center, scale, shift = coefficients_of_block(shared, mean, m2, float64(values), weight, bias, c, eps, flags)
        normalized(
            x, start, x_stride, residual, c * residual_channel, residual_stride, out, c * out_channel, out_stride,
            inner, begin, end, center, scale, shift, floor, flags,
        )  # fmt: skip

    return train_rows


@cache
def compiled(x_name, residual_name, out_name, lanes):
    """The kernel for these kinds of storage, `lanes` values at a time."""
    return kernel(source(x_name, residual_name, out_name, lanes))
