"""The backward call in one launch: a block takes a channel, sums first, then the input gradient from the caches.

As `train_rows`: the same bits as in two launches of those plans.
"""

from functools import cache

from numba import cuda, float64, int32, int64

from nbbn.cuda import formulas
from nbbn.cuda.gradient_sums import make_part_products
from nbbn.cuda.input_gradient import make_applied, share_coefficients
from nbbn.cuda.jit import kernel
from nbbn.cuda.reduce import SLOTS, part_of


@cache
def source(g_name, x_name, out_name, lanes):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    part_products = make_part_products(g_name, x_name, lanes)
    applied = make_applied(g_name, x_name, out_name, lanes)

    def gradients_rows(
        g, g_stride, g_channel, x, x_stride, x_channel, out, out_stride, out_channel, outer, inner, totals,
        mean, var, weight, eps, flags, grad_weight, grad_bias,
    ):  # fmt: skip
        slots = cuda.shared.array(SLOTS, float64)
        shared = cuda.shared.array(4, float64)
        serves = cuda.shared.array(1, int32)
        c = int64(cuda.blockIdx.x)
        count = outer * inner
        begin, end = part_of(count, lanes, 0, 1)
        first, second, low = part_products(
            g, c * g_channel, g_stride, x, c * x_channel, x_stride, inner, begin, end, c, mean, var, weight, eps, flags,
            slots,
        )  # fmt: skip
        if cuda.threadIdx.x == 0:
            formulas.finish_gradients(c, first, second, low, mean, var, eps, flags, totals, grad_weight, grad_bias)
        # by the thread that stored the totals
        share_coefficients(shared, serves, c, count, mean, var, weight, eps, flags, totals)
        applied(
            g, c * g_channel, g_stride, x, c * x_channel, x_stride, out, c * out_channel, out_stride, inner, begin, end,
            shared, serves,
        )  # fmt: skip

    return gradients_rows


@cache
def compiled(g_name, x_name, out_name, lanes):
    """The kernel for these kinds of storage, `lanes` values at a time."""
    return kernel(source(g_name, x_name, out_name, lanes))
