"""Sums over one contiguous run of values: the innermost loops, and how a channel is cut into chunks.

Statistics are sums of deviations d and of d * d from an origin near the mean, in the precision of the storage, run
by run; runs add up in float64 and chunks merge by Chan's formula. The deviations are small and nearly exact
whatever the mean is, so float32 data gets float64-like statistics in one pass at float32 speed.

The cut into chunks depends on the shape alone, never on the number of threads: any number of threads gives the
same bits.
"""

import math

import numpy as np

from nbbn.cpu.jit import formula
from nbbn.cpu.kinds import holds_integers, largest_origin
from nbbn.cpu.lines import prefetch
from nbbn.cpu.memory import deviation, deviations, deviations_short, element, load
from nbbn.cpu.scratch import greater, lesser
from nbbn.cpu.vector import LANES, SHORT, fmuladd, lane_sum, splat

#: Values a run: what is added up in the precision of the storage. 32 sums of 16 each: equal values (zeros after ReLU)
#: round the same way each time, so long sums would drift.
BLOCK = 512

#: Values a chunk, the unit of parallel work within one channel: 256 kB of float32, half of a common L2.
CHUNK = 65536


@formula
def chunk_grid(outer, inner):
    """(rows a chunk, columns a chunk, chunks along outer, chunks along inner) of one channel."""
    columns = lesser(inner, CHUNK)
    rows = greater(1, CHUNK // columns)
    return rows, columns, -(-outer // rows), -(-inner // columns)


@formula
def chunk_bounds(chunk, outer, inner):
    """Rows [o0, o1) and columns [i0, i1) of chunk number `chunk` of a channel."""
    rows, columns, _, along_inner = chunk_grid(outer, inner)
    o0 = (chunk // along_inner) * rows
    i0 = (chunk % along_inner) * columns
    return o0, lesser(o0 + rows, outer), i0, lesser(i0 + columns, inner)


@formula
def chunks_of(outer, inner):
    """How many chunks a channel is cut into."""
    _, _, along_outer, along_inner = chunk_grid(outer, inner)
    return along_outer * along_inner


@formula
def usable_origin(x, value):
    """`value` as an origin of deviations: whole for integers, so that their sums are exact, and one that they hold.

    0 for one that is not finite: infinity minus itself would turn an infinite mean into NaN.
    """
    if holds_integers(x):
        return lesser(np.floor(value), largest_origin(x))
    return value if math.isfinite(value) else 0.0


#: How many times m2 the sum of squares may be: more, and the origin was too far from the mean.
MOST_SQUARES = 3.0


@formula
def sums_are_exact(x, squares, m2, least):
    """False where squares overflowed or lost digits to denormals, or the origin was too far from the mean."""
    return (holds_integers(x) or least <= squares < math.inf) and squares <= MOST_SQUARES * m2


@formula
def sums_of_deviations(first_run, second_run, step, ahead, origin):
    """Sums of d and of d * d, d = value - origin, in the type of `origin`.

    Over two runs of one length, `step` LANES; or over one, `step` 2 LANES, and the second is what of it begins LANES
    values later. Two vectors at a time: four sums in flight hide the latency of an addition. What lies `ahead`
    values further on is asked for meanwhile.
    """
    total = splat(type(origin)(0))
    squares = total
    total_2 = total
    squares_2 = total
    i = 0
    while i + LANES <= second_run.size:
        prefetch(first_run, i + ahead)
        prefetch(second_run, i + ahead)
        d = deviations(first_run, i, origin)
        e = deviations(second_run, i, origin)
        total = total + d
        total_2 = total_2 + e
        squares = fmuladd(d, d, squares)
        squares_2 = fmuladd(e, e, squares_2)
        i += step
    if i + LANES <= first_run.size:
        prefetch(first_run, i + ahead)
        d = deviations(first_run, i, origin)
        total = total + d
        squares = fmuladd(d, d, squares)
        i += LANES
    first = lane_sum(total + total_2)
    second = lane_sum(squares + squares_2)
    while i + SHORT <= second_run.size:
        few = deviations_short(first_run, i, origin)
        more = deviations_short(second_run, i, origin)
        first += lane_sum(few + more)
        second += lane_sum(few * few + more * more)
        i += SHORT
    while i + SHORT <= first_run.size:
        few = deviations_short(first_run, i, origin)
        first += lane_sum(few)
        second += lane_sum(few * few)
        i += SHORT
    while i < second_run.size:
        d_1 = deviation(first_run, i, origin)
        e_1 = deviation(second_run, i, origin)
        first += d_1 + e_1
        second = fmuladd(d_1, d_1, fmuladd(e_1, e_1, second))
        i += 1
    while i < first_run.size:
        single = deviation(first_run, i, origin)
        first += single
        second = fmuladd(single, single, second)
        i += 1
    return first, second


@formula
def plain_sums(values, origin):
    """The same sums with nothing done for speed but vectors: compiled in a third of the time, for what is rare."""
    total = splat(type(origin)(0))
    squares = total
    i = 0
    while i + LANES <= values.size:
        d = deviations(values, i, origin)
        total = total + d
        squares = fmuladd(d, d, squares)
        i += LANES
    first = lane_sum(total)
    second = lane_sum(squares)
    while i < values.size:
        single = deviation(values, i, origin)
        first += single
        second = fmuladd(single, single, second)
        i += 1
    return first, second


@formula
def sums_of_gradient(gradients, values, mean, ahead):
    """Sums of g and of g * (x - mean), in the type of `mean`; asks for the lines of both `ahead` meanwhile."""
    size = values.size
    gradients_ahead, values_ahead = ahead
    total = splat(type(mean)(0))
    products = total
    total_2 = total
    products_2 = total
    i = 0
    while i + 2 * LANES <= size:
        prefetch(gradients_ahead, i)
        prefetch(gradients_ahead, i + LANES)
        prefetch(values_ahead, i)
        prefetch(values_ahead, i + LANES)
        g = load(gradients, i, mean)
        h = load(gradients, i + LANES, mean)
        total = total + g
        total_2 = total_2 + h
        products = fmuladd(g, deviations(values, i, mean), products)
        products_2 = fmuladd(h, deviations(values, i + LANES, mean), products_2)
        i += 2 * LANES
    if i + LANES <= size:
        g = load(gradients, i, mean)
        total = total + g
        products = fmuladd(g, deviations(values, i, mean), products)
        i += LANES
    first = lane_sum(total + total_2)
    second = lane_sum(products + products_2)
    while i < size:
        single = element(gradients, i, mean)
        first += single
        second = fmuladd(single, deviation(values, i, mean), second)
        i += 1
    return first, second


@formula
def plain_sums_of_gradient(gradients, values, mean):
    """The same sums one by one: compiled in a fifth of the time, for what is rare."""
    first = type(mean)(0)
    second = first
    for i in range(values.size):
        single = element(gradients, i, mean)
        first += single
        second = fmuladd(single, deviation(values, i, mean), second)
    return first, second
