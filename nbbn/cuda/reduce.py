"""Sums over a block and over the blocks of a channel, in an order fixed by the launch plan: the same bits every run."""

import math

from numba import cuda, float64, int64

from nbbn.cuda import simd
from nbbn.cuda.jit import device
from nbbn.cuda.storage import LEAST_SQUARE

#: All lanes of a warp.
ALL = 0xFFFFFFFF
WARP = 32
#: Most warps in a block, and float64 slots, two for each of them, that `block_sums` needs.
MOST_WARPS = 16
SLOTS = 2 * MOST_WARPS


@device
def two_sum(high, low, value):
    """Add `value` to high + low, keeping what rounding takes (Knuth 1969): float32 sums as good as float64's."""
    result = high + value
    shown = result - high
    return result, low + ((high - (result - shown)) + (value - shown))


@device
def warp_sum(value):
    """The sum over a warp, the same bits in every lane."""
    offset = WARP // 2
    while offset:
        value += cuda.shfl_xor_sync(ALL, value, offset)
        offset //= 2
    return value


@device
def block_sums(first, second, slots):
    """Sums of two float64 values over the block, the same bits in every thread."""
    first = warp_sum(first)
    second = warp_sum(second)
    thread = cuda.threadIdx.x
    if thread % WARP == 0:
        slots[thread // WARP * 2] = first
        slots[thread // WARP * 2 + 1] = second
    cuda.syncthreads()
    first = slots[0]
    second = slots[1]
    for warp in range(1, cuda.blockDim.x // WARP):
        first += slots[2 * warp]
        second += slots[2 * warp + 1]
    cuda.syncthreads()  # the slots may be used again
    return first, second


@device
def is_last(tickets, number, blocks, ticket):
    """Whether this block is the last of `blocks` to come here; what the others stored before is then visible."""
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        ticket[0] = simd.take_ticket(tickets, number)
    cuda.syncthreads()
    last = ticket[0] == blocks - 1
    if last:
        cuda.threadfence()
        if cuda.threadIdx.x == 0:
            simd.store_int32(tickets, number, 0)  # as it was found: the next launch on this stream counts again
    return last


@device
def sum_over_parts(work, first, stride, parts, slots):
    """Sums of the pairs that `parts` blocks stored, `stride` pairs apart from pair number `first` on."""
    total = 0.0
    squares = 0.0
    for part in range(cuda.threadIdx.x, parts, cuda.blockDim.x):
        pair = 2 * (first + part * stride)
        total += simd.load_shared_result(work, pair)
        squares += simd.load_shared_result(work, pair + 1)
    return block_sums(total, squares, slots)


@device
def sums_hold(values, total, squares, spread):
    """Whether float32 sums of deviations lost nothing to overflow, denormals, infinities or NaN.

    All zero is right for a constant; `spread` says whether a sample saw anything else, which squares may have lost.
    """
    if squares == 0.0:
        return total == 0.0 and spread == 0.0
    return LEAST_SQUARE * values <= squares < math.inf


@device
def origin_is_far(squares, m2):
    """Whether the origin was so far from the mean that digits of m2 canceled."""
    return 4.0 * m2 < squares < math.inf


@device
def advance(o, i, rows, columns, inner):
    """The place `rows` * inner + `columns` values on in a channel, without a division."""
    o += rows
    i += columns
    if i >= inner:
        i -= inner
        o += 1
    return o, i


@device
def part_of(values, lanes, part, parts):
    """(begin, end) of a part of a channel's values, which are numbered row by row: whole vectors."""
    vectors = values // lanes
    return vectors * part // parts * lanes, vectors * (part + 1) // parts * lanes


@device
def strides_of_block(begin, inner, lanes):
    """(position, row, column) of this thread's first vector, and the step to its next one: values, rows, columns."""
    position = begin + int64(cuda.threadIdx.x) * lanes
    o = position // inner
    step = int64(cuda.blockDim.x) * lanes
    step_o = step // inner
    return position, o, position - o * inner, step, step_o, step - step_o * inner


def make_careful_sums(load):
    """Sums in float64, value by value: for constant, huge, denormal and non-finite data, and for a bad origin."""

    @device
    def careful_sums(x, start, outer_stride, inner, first, end, origin):
        """Sums of d and d * d, d = x - origin, of this thread's share of values `first` to `end` of a channel.

        The values of a channel are numbered row by row; the channel begins at index `start`.
        """
        total = 0.0
        squares = 0.0
        for position in range(first + cuda.threadIdx.x, end, cuda.blockDim.x):
            o = position // inner
            deviation = float64(load(x, start + o * outer_stride + (position - o * inner))[0]) - origin
            total += deviation
            squares += deviation * deviation
        return total, squares

    return careful_sums


def make_origin(load, arithmetic, integer):
    """An origin near the mean, from a sample of the whole channel: every block of a channel finds the same one."""

    @device
    def origin_of(x, start, outer_stride, inner, values):
        """(origin, spread): the mean of 32 values, exactly their value if all are equal, and how far they are off."""
        lane = cuda.threadIdx.x % WARP
        position = values * int64(lane) // WARP
        o = position // inner
        value = arithmetic(load(x, start + o * outer_stride + (position - o * inner))[0])
        first = cuda.shfl_sync(ALL, value, 0)
        if not abs(first) < math.inf:
            first = arithmetic(0)
        deviation = value - first
        if not abs(deviation) < math.inf:
            deviation = arithmetic(0)
        spread = warp_sum(abs(deviation))
        origin = first + warp_sum(deviation) * arithmetic(1.0 / WARP)
        if integer:
            origin = origin // arithmetic(1)  # deviations are whole then, and their sums exact
        return origin if abs(origin) < math.inf else first, spread

    return origin_of
