"""The loops that write results, element by element: part of one row of memory each.

Coefficients are scalars (rows family: one channel a row) or arrays with one value per column (columns family).
`streaming` writes past the caches: whole cache lines as long vectors, what sticks out at both ends as short vectors
and one by one. An element comes out the same, bit for bit, in a vector and alone. The result may be one of the
inputs: all is read before it is written.
"""

from numba import literal_unroll

from nbbn.cpu.jit import elementwise, formula
from nbbn.cpu.memory import element, head, head_short, load, load_short, prefetch, run, store, stream
from nbbn.cpu.vector import LANES, SHORT, floored, fmuladd

#: How many elements ahead of a non-temporal store its inputs are asked for: 4 kB of float32. What a row is followed
#: by is the next row, mostly. Without it one core streams 21 to 28 GB/s, with it 31 to 41 (AVX2, 512 columns).
AHEAD = 1024

# --- the formulas: what to read of the coefficients, and what to do with one element of each input ------------------


def _normalize(get):
    @formula
    def coefficients_at(coefficients, i, floor):
        mean, scale, shift = coefficients
        return get(mean, i, floor), get(scale, i, floor), get(shift, i, floor), get(floor, i, floor)

    @formula
    def value(inputs, coefficients, floor, o, c, i0, i1, i):
        """max((x - mean) * scale + shift, floor)."""
        mean, scale, shift, least = coefficients
        x = get(run(inputs[0], o, c, i0, i1), i, floor)
        return floored(fmuladd(x - mean, scale, shift), least)

    return coefficients_at, value


def _normalize_add(get):
    coefficients_at, _ = _normalize(get)

    @formula
    def value(inputs, coefficients, floor, o, c, i0, i1, i):
        """max((x - mean) * scale + shift + addend, floor)."""
        mean, scale, shift, least = coefficients
        x = get(run(inputs[0], o, c, i0, i1), i, floor)
        addend = get(run(inputs[1], o, c, i0, i1), i, floor)
        return floored(fmuladd(x - mean, scale, shift) + addend, least)

    return coefficients_at, value


def _input_gradient(get):
    @formula
    def coefficients_at(coefficients, i, like):
        mean, scale, slope, offset = coefficients
        return get(mean, i, like), get(scale, i, like), get(slope, i, like), get(offset, i, like)

    @formula
    def value(inputs, coefficients, like, o, c, i0, i1, i):
        """scale * gradient + slope * (x - mean) + offset."""
        mean, scale, slope, offset = coefficients
        gradient = get(run(inputs[0], o, c, i0, i1), i, like)
        x = get(run(inputs[1], o, c, i0, i1), i, like)
        return fmuladd(scale, gradient, fmuladd(slope, x - mean, offset))

    return coefficients_at, value


# --- the loops ------------------------------------------------------------------------------------------------------


def _written(formula_with):
    """A loop over elements i0 to i1 of the row out[o, c]."""

    def put_at(get, put):
        coefficients_at, value = formula_with(get)

        @formula
        def at(out, inputs, coefficients, like, o, c, i0, i1, i):
            ready = coefficients_at(coefficients, i, like)
            put(run(out, o, c, i0, i1), i, value(inputs, ready, like, o, c, i0, i1, i))

        return at

    one, few, many = (put_at(get, store) for get in (element, load_short, load))
    stream_one, stream_few, stream_many = (put_at(get, stream) for get in (element, load_short, load))

    @elementwise
    def write(out, inputs, coefficients, like, o, c, i0, i1, streaming):
        size = i1 - i0
        i = 0
        if streaming:
            result = run(out, o, c, i0, i1)
            start = min(head_short(result, 0), size)
            while i < start:
                stream_one(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += 1
            start = min(i + head(result, i), size)
            while i + SHORT <= start:
                stream_few(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += SHORT
            if i == start:  # a line begins here
                while i + LANES <= size:
                    for source in literal_unroll(inputs):
                        prefetch(run(source, o, c, i0, i1), i + AHEAD)
                    stream_many(out, inputs, coefficients, like, o, c, i0, i1, i)
                    i += LANES
                while i + SHORT <= size:
                    stream_few(out, inputs, coefficients, like, o, c, i0, i1, i)
                    i += SHORT
            while i < size:
                stream_one(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += 1
        else:
            while i + LANES <= size:
                many(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += LANES
            while i + SHORT <= size:
                few(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += SHORT
            while i < size:
                one(out, inputs, coefficients, like, o, c, i0, i1, i)
                i += 1

    return write


normalize_row = _written(_normalize)
normalize_add_row = _written(_normalize_add)
gradient_row = _written(_input_gradient)
