"""Statistics of what a mask selects: float64, value by value, merged by Chan's formula. For padding, not for speed."""

from functools import cache

from numba import cuda, float64, int32, int64

from nbbn.cuda import formulas, simd
from nbbn.cuda.jit import device, kernel
from nbbn.cuda.reduce import ALL, MOST_WARPS, WARP, is_last


@device
def warp_merge(count, mean, m2):
    """Moments of a warp's lanes together, in the order of a tree: valid in lane 0."""
    offset = WARP // 2
    while offset:
        other_count = cuda.shfl_xor_sync(ALL, count, offset)
        other_mean = cuda.shfl_xor_sync(ALL, mean, offset)
        other_m2 = cuda.shfl_xor_sync(ALL, m2, offset)
        count, mean, m2 = formulas.merge(count, mean, m2, other_count, other_mean, other_m2)
        offset //= 2
    return count, mean, m2


@device
def block_merge(count, mean, m2, counts, means, m2s):
    """Moments of a block's threads together: valid in thread 0."""
    thread = cuda.threadIdx.x
    count, mean, m2 = warp_merge(count, mean, m2)
    if thread % WARP == 0:
        counts[thread // WARP] = count
        means[thread // WARP] = mean
        m2s[thread // WARP] = m2
    cuda.syncthreads()
    if thread == 0:
        for warp in range(1, cuda.blockDim.x // WARP):
            count, mean, m2 = formulas.merge(count, mean, m2, counts[warp], means[warp], m2s[warp])
    cuda.syncthreads()
    return count, mean, m2


@cache
def source(kind_name):
    """The kernel as plain Python: for the compiler, the simulator and the PTX tests alike."""
    load = simd.LOAD[kind_name, 1]

    def masked_moments(
        x, outer_stride, channel_stride, where, where_outer, where_channel, where_inner, outer, inner, parts, work,
        tickets, count, mean, m2,
    ):  # fmt: skip
        counts = cuda.shared.array(MOST_WARPS, int64)
        means = cuda.shared.array(MOST_WARPS, float64)
        m2s = cuda.shared.array(MOST_WARPS, float64)
        ticket = cuda.shared.array(1, int32)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        c = int64(cuda.blockIdx.x) // parts
        part = int64(cuda.blockIdx.x) - c * parts
        values = outer * inner
        n = int64(0)
        origin = 0.0
        total = 0.0
        squares = 0.0
        for position in range(values * part // parts + thread, values * (part + 1) // parts, threads):
            o = position // inner
            i = position - o * inner
            if simd.load_mask(where, o * where_outer + c * where_channel + i * where_inner):
                value = float64(load(x, c * channel_stride + o * outer_stride + i)[0])
                if n == 0 and formulas.is_finite(value):
                    origin = value
                total += value - origin
                squares += (value - origin) * (value - origin)
                n += 1
        average = 0.0
        deviations = 0.0
        if n > 0:
            average, deviations = formulas.from_deviations(n, origin, total, squares)
        n, average, deviations = block_merge(n, average, deviations, counts, means, m2s)
        if parts > 1:
            if thread == 0:
                record = 3 * (c * parts + part)
                simd.store_int64(work, record, n)
                simd.store_float64(work, record + 1, average)
                simd.store_float64(work, record + 2, deviations)
            if not is_last(tickets, c, parts, ticket):
                return
            n = int64(0)
            average = 0.0
            deviations = 0.0
            for other in range(thread, parts, threads):
                record = 3 * (c * parts + other)
                n, average, deviations = formulas.merge(
                    n, average, deviations, simd.load_shared_count(work, record),
                    simd.load_shared_result(work, record + 1), simd.load_shared_result(work, record + 2),
                )  # fmt: skip
            n, average, deviations = block_merge(n, average, deviations, counts, means, m2s)
        if thread == 0:
            simd.store_int64(count, c, n)
            simd.store_float64(mean, c, average)
            simd.store_float64(m2, c, deviations)

    return masked_moments


@cache
def compiled(kind_name):
    """The kernel for one kind of storage."""
    return kernel(source(kind_name))
