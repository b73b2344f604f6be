"""Numbers as they lie in memory, and as kernels compute with them: conversions in registers, scalar and vector.

Kernels compute in float32 or float64 (sums of 8-bit integers in int32). Every dtype is converted to that right
after it is loaded and from it right before it is stored; there is never a converted copy of an array. Half
precision is unknown to Numba's CPU target: its arrays come as records of one 16-bit field, whose name tells
float16 from bfloat16 and from an array of integers.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.np import numpy_support

from nbbn.cpu.vector import LANES, splatted

#: The dtypes under which arrays of half precision are handed to kernels (`array.view(...)`).
HALF = np.dtype([("float16", np.uint16)])
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])

_HALF = numpy_support.from_dtype(HALF)
_BFLOAT16 = numpy_support.from_dtype(BFLOAT16)

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32, F64 = ir.FloatType(), ir.DoubleType()
F16 = ir.HalfType()


def memory_type(dtype):
    """The LLVM type of one element in memory."""
    if dtype in (_HALF, _BFLOAT16):
        return I16
    if dtype == types.float32:
        return F32
    if dtype == types.float64:
        return F64
    return I8 if dtype == types.boolean else ir.IntType(dtype.bitwidth)


def sum_type(dtype):
    """The type in which deviations of this dtype are summed over one run.

    Sums of up to 1,024 deviations of 8-bit integers, and of their squares, are exact in int32; those of 65,536
    longer integers in float64 (squares of more than 16 bits are rounded).
    """
    if dtype in (_HALF, _BFLOAT16) or dtype == types.float32:
        return types.float32
    small = dtype == types.boolean or (isinstance(dtype, types.Integer) and dtype.bitwidth == 8)
    return types.int32 if small else types.float64


def from_memory(context, builder, dtype, value, lane):
    """`value` (scalar or vector) as read from memory, converted to numbers of LLVM type `lane`."""
    wanted = _like(value.type, lane)
    if dtype == _HALF:
        return _widened(builder, _float_of_half(context, builder, value), wanted)
    if dtype == _BFLOAT16:
        bits = builder.shl(builder.zext(value, _like(value.type, I32)), _constant(builder, value.type, I32, 16))
        return _widened(builder, builder.bitcast(bits, _like(value.type, F32)), wanted)
    if isinstance(dtype, types.Float):
        return _widened(builder, value, wanted)
    if dtype == types.boolean:  # any byte but 0 is True
        value = builder.icmp_unsigned("!=", value, _constant(builder, value.type, I8, 0))
        return builder.zext(value, wanted) if isinstance(lane, ir.IntType) else builder.uitofp(value, wanted)
    if isinstance(lane, ir.IntType):
        if value.type == wanted:
            return value
        return builder.sext(value, wanted) if dtype.signed else builder.zext(value, wanted)
    return builder.sitofp(value, wanted) if dtype.signed else builder.uitofp(value, wanted)


def to_memory(context, builder, dtype, value):
    """`value` (float32 or float64, scalar or vector), rounded to nearest even for the memory of `dtype`.

    Integers (sums of 8-bit data) go only where they came from.
    """
    lane = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    if isinstance(lane, ir.IntType):
        return value
    if dtype == types.float64:
        return _widened(builder, value, _like(value.type, F64))
    narrow = builder.fptrunc(value, _like(value.type, F32)) if lane == F64 else value
    if dtype == types.float32:
        return narrow
    return (_half_of_float if dtype == _HALF else _bfloat16_of_float)(context, builder, narrow)


def _like(kind, lane):
    """`lane`, or a vector of as many as `kind` has."""
    return ir.VectorType(lane, kind.count) if isinstance(kind, ir.VectorType) else lane


def _constant(builder, kind, lane, number):
    scalar = ir.Constant(lane, number)
    return splatted(builder, scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


def _widened(builder, value, wanted):
    return value if value.type == wanted else builder.fpext(value, wanted)


def _has_half_instructions(context):
    """Whether LLVM can convert halves: on x86 without F16C it would call functions that nobody provides."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features.split(",") if triple.startswith(("x86", "i686")) else triple.startswith("aarch64")


def _float_of_half(context, builder, bits):
    if _has_half_instructions(context):
        return builder.fpext(builder.bitcast(bits, _like(bits.type, F16)), _like(bits.type, F32))
    return half_to_float_bits(builder, bits)


def half_to_float_bits(builder, bits):
    """A half as float32, by arithmetic on its bits."""
    kind = bits.type
    number = lambda n: _constant(builder, kind, I32, n)  # noqa: E731
    wide = builder.zext(bits, _like(kind, I32))
    # sign apart; exponent and fraction move to float32's places, and the difference of the biases is a product,
    # which is exact and makes denormals normal
    magnitude = builder.shl(builder.and_(wide, number(0x7FFF)), number(13))
    factor = _constant(builder, kind, F32, 2.0**112)
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, _like(kind, F32)), factor), _like(kind, I32))
    special = builder.icmp_unsigned(">=", magnitude, number(0x7C00 << 13))  # infinities and NaNs
    magnitude = builder.select(special, builder.or_(magnitude, number(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(wide, number(0x8000)), number(16))
    return builder.bitcast(builder.or_(magnitude, sign), _like(kind, F32))


def _half_of_float(context, builder, value):
    if _has_half_instructions(context):
        return builder.bitcast(builder.fptrunc(value, _like(value.type, F16)), _like(value.type, I16))
    return float_to_half_bits(builder, value)


def float_to_half_bits(builder, value):
    """The half nearest to a float32 (ties to even), by arithmetic on its bits."""
    kind = value.type
    number = lambda n: _constant(builder, kind, I32, n)  # noqa: E731
    bits = builder.bitcast(value, _like(kind, I32))
    magnitude = builder.and_(bits, number(0x7FFFFFFF))
    # normal: shift the exponent, round to even by adding just under a half, or a half to an odd one
    odd = builder.and_(builder.lshr(magnitude, number(13)), number(1))
    moved = builder.sub(magnitude, number((127 - 15) << 23))
    normal = builder.lshr(builder.add(builder.add(moved, number(0xFFF)), odd), number(13))
    # denormal: an addition whose last place is that of half's denormals rounds as it should
    magic = _constant(builder, kind, F32, 0.5)
    shifted = builder.fadd(builder.bitcast(magnitude, _like(kind, F32)), magic)
    tiny = builder.sub(builder.bitcast(shifted, _like(kind, I32)), number(126 << 23))
    result = builder.select(builder.icmp_unsigned("<", magnitude, number(113 << 23)), tiny, normal)
    infinite = builder.icmp_unsigned(">=", magnitude, number(0x477FF000))  # rounds to 2**16 or more
    result = builder.select(infinite, number(0x7C00), result)
    payload = builder.or_(builder.and_(builder.lshr(magnitude, number(13)), number(0x3FF)), number(0x7E00))
    result = builder.select(builder.icmp_unsigned(">", magnitude, number(0x7F800000)), payload, result)
    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    return builder.trunc(builder.or_(result, sign), _like(kind, I16))


def _bfloat16_of_float(context, builder, value):
    kind = value.type
    rounded = builder.lshr(_rounded_to_bfloat16(builder, value), _constant(builder, kind, I32, 16))
    return builder.trunc(rounded, _like(kind, I16))


def _rounded_to_bfloat16(builder, value):
    """Bits of float32 numbers whose upper halves are the nearest bfloat16 numbers (ties to even).

    NaNs stay if they are quiet, as those are that come out of arithmetic: their upper half is one too.
    """
    kind = value.type
    number = lambda n: _constant(builder, kind, I32, n)  # noqa: E731
    bits = builder.bitcast(value, _like(kind, I32))
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    not_a_number = builder.fcmp_unordered("uno", value, value)
    return builder.add(bits, builder.select(not_a_number, number(0), builder.add(odd, number(0x7FFF))))


# --- bfloat16, every other number apart -------------------------------------------------------------------------------
#
# A vector of bfloat16 numbers is two of float32 by a shift and a mask, if those at even places come first and those
# at odd places follow; and back by as much. In order they would take four shuffles more, and their conversion would
# cost more than the rest of normalization.


def is_apart(dtype, lanes):
    """Whether vectors that are written to memory of this dtype hold even places first, odd ones after them."""
    return dtype == _BFLOAT16 and lanes == LANES


def apart(builder, vector):
    """A vector in order, with its even places first."""
    return _shuffled(builder, vector, vector, [*range(0, LANES, 2), *range(1, LANES, 2)])


def apart_from_memory(builder, value, wanted):
    """A vector as read from memory of bfloat16 numbers, as float32 or float64 numbers (a vector type), apart."""
    pairs = builder.bitcast(value, ir.VectorType(I32, LANES // 2))
    even = builder.shl(pairs, _constant(builder, pairs.type, I32, 16))
    odd = builder.and_(pairs, _constant(builder, pairs.type, I32, 0xFFFF0000))
    even, odd = (builder.bitcast(half, ir.VectorType(F32, LANES // 2)) for half in (even, odd))
    return _widened(builder, _shuffled(builder, even, odd, list(range(LANES))), wanted)


def apart_to_memory(builder, value):
    """A vector of float32 or float64 numbers, apart, rounded for memory of bfloat16 numbers."""
    if value.type.element == F64:
        value = builder.fptrunc(value, ir.VectorType(F32, LANES))
    rounded = _rounded_to_bfloat16(builder, value)
    even = _shuffled(builder, rounded, rounded, list(range(LANES // 2)))
    odd = _shuffled(builder, rounded, rounded, list(range(LANES // 2, LANES)))
    low = builder.lshr(even, _constant(builder, even.type, I32, 16))
    high = builder.and_(odd, _constant(builder, odd.type, I32, 0xFFFF0000))
    return builder.bitcast(builder.or_(low, high), ir.VectorType(I16, LANES))


def _shuffled(builder, first, second, places):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(places)), places))
