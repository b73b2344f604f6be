"""Vector loads and non-temporal stores for Numba, which has none: what the ceilings are made of.

An ordinary store to a line that is not in cache reads the line first; a non-temporal store goes past the caches and
does not. LLVM emits it for a whole aligned vector marked `!nontemporal`, on any processor (where there is no such
instruction it is an ordinary store). x86 orders these stores only at an `sfence`; elsewhere none is needed.
"""

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Values of float32 a vector: 64 bytes, a whole cache line. LLVM splits it into what the processor has.
WIDTH = 16

_X86 = platform.machine().lower() in {"x86_64", "amd64", "i386", "i686", "x86"}


def _pointer(context, builder, array_type, array, index_type, index, vector):
    data = context.make_array(array_type)(context, builder, array).data
    index = context.cast(builder, index, index_type, types.intp)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _vector_of(context, array_type):
    return ir.VectorType(context.get_value_type(array_type.dtype), WIDTH)


@intrinsic
def stream_one(typing_context, x, i, y, j):
    """`y[j : j + WIDTH] = x[i : i + WIDTH]` past the caches; y[j] lies at a multiple of 64 bytes. Converts to float."""

    def generate(context, builder, signature, arguments):
        value = _load(context, builder, signature.args[0:2], arguments[0:2], _vector_of(context, signature.args[2]))
        _store(context, builder, signature.args[2:4], arguments[2:4], value)
        return context.get_dummy_value()

    return types.void(x, i, y, j), generate


@intrinsic
def stream_two(typing_context, x, z, i, y, j):
    """`y[j : j + WIDTH] = x[i : i + WIDTH] + z[i : i + WIDTH]` past the caches, as `stream_one`."""

    def generate(context, builder, signature, arguments):
        vector = _vector_of(context, signature.args[3])
        x_type, z_type, i_type = signature.args[0:3]
        first = _load(context, builder, (x_type, i_type), (arguments[0], arguments[2]), vector)
        second = _load(context, builder, (z_type, i_type), (arguments[1], arguments[2]), vector)
        _store(context, builder, signature.args[3:5], arguments[3:5], builder.fadd(first, second))
        return context.get_dummy_value()

    return types.void(x, z, i, y, j), generate


def _load(context, builder, kinds, values, wanted):
    array_type = kinds[0]
    vector = _vector_of(context, array_type)
    address = _pointer(context, builder, array_type, values[0], kinds[1], values[1], vector)
    loaded = builder.load(address, align=array_type.dtype.bitwidth // 8)
    return loaded if vector == wanted else builder.uitofp(loaded, wanted)


def _store(context, builder, kinds, values, value):
    address = _pointer(context, builder, kinds[0], values[0], kinds[1], values[1], value.type)
    instruction = builder.store(value, address, align=4 * WIDTH)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


@intrinsic
def fence(typing_context):
    """All non-temporal stores before come before all that follows."""

    def generate(context, builder, signature, arguments):
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), kind), [])
        return context.get_dummy_value()

    return types.void(), generate
