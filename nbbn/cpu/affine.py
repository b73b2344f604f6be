"""The loops that write results, element by element: part of one row of memory each.

Coefficients are scalars (rows family: one channel a row) or arrays with one value per column (columns family).
With `far`, inputs are not expected in the second-level cache and asked for ahead, as always with `streaming`, which
writes past the caches: whole cache lines as long vectors, what sticks out at both ends as short vectors and one by one.
An element comes out the same, bit for bit, in a vector and alone. The result may be one of the inputs: all is read
before it is written.
"""

from nbbn.cpu.jit import formula
from nbbn.cpu.lines import prefetch_all
from nbbn.cpu.memory import element_for, head, head_short, load_for, load_short_for, store, stream
from nbbn.cpu.scratch import lesser
from nbbn.cpu.vector import LANES, SHORT, floored, fmuladd

#: How many elements ahead of a store its inputs are asked for: 4 kB of float32. What a row is followed by is the next
#: row, mostly. Without it one core streams 21 to 28 GB/s, with it 31 to 41 (AVX2, 512 columns); ordinary stores to
#: arrays in the last-level cache take 0.77 of the time (6272 rows of 512 columns), or as long (long rows).
AHEAD = 1024

# --- the formulas: one element, or one vector of them ----------------------------------------------------------------


def _normalize(get, put):
    @formula
    def at(out, inputs, coefficients, floor, i):
        """out = max((x - mean) * scale + shift, floor)."""
        mean, scale, shift = coefficients
        d = get(out, inputs[0], i, floor) - get(out, mean, i, floor)
        y = fmuladd(d, get(out, scale, i, floor), get(out, shift, i, floor))
        put(out, i, floored(y, get(out, floor, i, floor)))

    return at


def _normalize_add(get, put):
    @formula
    def at(out, inputs, coefficients, floor, i):
        """out = max((x - mean) * scale + shift + addend, floor)."""
        mean, scale, shift = coefficients
        d = get(out, inputs[0], i, floor) - get(out, mean, i, floor)
        addend = get(out, inputs[1], i, floor)
        y = fmuladd(d, get(out, scale, i, floor), get(out, shift, i, floor)) + addend
        put(out, i, floored(y, get(out, floor, i, floor)))

    return at


def _input_gradient(get, put):
    @formula
    def at(out, inputs, coefficients, like, i):
        """out = scale * gradient + slope * (x - mean) + offset."""
        mean, scale, slope, offset = coefficients
        gradient = get(out, inputs[0], i, like)
        d = get(out, inputs[1], i, like) - get(out, mean, i, like)
        tail = fmuladd(get(out, slope, i, like), d, get(out, offset, i, like))
        put(out, i, fmuladd(get(out, scale, i, like), gradient, tail))

    return at


# --- the loops ------------------------------------------------------------------------------------------------------


def _written(formula_with):
    """The loop `write(out, inputs, coefficients, like, far, streaming)` over runs of memory: out, a tuple of inputs."""
    one, few, many = (formula_with(get, store) for get in (element_for, load_short_for, load_for))
    stream_one, stream_few, stream_many = (formula_with(get, stream) for get in (element_for, load_short_for, load_for))

    @formula
    def write(out, inputs, coefficients, like, far, streaming):
        size = out.size
        i = 0
        if streaming:
            start = lesser(head_short(out, 0), size)
            while i < start:
                stream_one(out, inputs, coefficients, like, i)
                i += 1
            start = lesser(i + head(out, i), size)
            while i + SHORT <= start:
                stream_few(out, inputs, coefficients, like, i)
                i += SHORT
            if i == start:  # a line begins here
                while i + LANES <= size:
                    prefetch_all(inputs, i + AHEAD)
                    stream_many(out, inputs, coefficients, like, i)
                    i += LANES
                while i + SHORT <= size:
                    stream_few(out, inputs, coefficients, like, i)
                    i += SHORT
            while i < size:
                stream_one(out, inputs, coefficients, like, i)
                i += 1
        else:
            if far:  # a loop of its own: the question in every turn takes a twenty-fifth of the time
                while i + LANES <= size:
                    prefetch_all(inputs, i + AHEAD)
                    many(out, inputs, coefficients, like, i)
                    i += LANES
            while i + LANES <= size:
                many(out, inputs, coefficients, like, i)
                i += LANES
            while i + SHORT <= size:
                few(out, inputs, coefficients, like, i)
                i += SHORT
            while i < size:
                one(out, inputs, coefficients, like, i)
                i += 1

    return write


normalize_row = _written(_normalize)
normalize_add_row = _written(_normalize_add)
gradient_row = _written(_input_gradient)


def _one_by_one(formula_with):
    """The same result, bit for bit, slower, and compiled in a fifth of the time: for what hardly ever comes."""
    one = formula_with(element_for, store)

    @formula
    def write(out, inputs, coefficients, like):
        for i in range(out.size):
            one(out, inputs, coefficients, like, i)

    return write


rare_row = _one_by_one(_normalize)
rare_add_row = _one_by_one(_normalize_add)
