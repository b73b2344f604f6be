"""What the compiler must be told directly: LLVM intrinsics behind plain function names."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


@intrinsic
def fmuladd(typingctx, a, b, c):
    """a * b + c, with one rounding where the machine has the instruction, and the same way everywhere.

    An explicit operation rather than a fast-math flag: evaluation mode promises the same bits for a row
    whatever loop (vector body, remainder, other layout) it passes through.
    """
    signature = a(a, a, a)

    def codegen(context, builder, signature, args):
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.fmuladd", (kind,), ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return signature, codegen


@intrinsic
def run(typingctx, array, i, j, start, stop):
    """array[i, j, start:stop] of a 3-d array whose last axis is contiguous, as a contiguous 1-d array.

    Numba types a view such as big[:, 2:5] as "any layout", and loops over its rows as strided: they would
    not vectorise. And its own slices carry run-time checks that double the compile time. The caller vouches for
    the memory from start to stop being one piece: within the row, or (columns family) beyond it where the rows
    that follow are its continuation.
    """
    result = types.Array(array.dtype, 1, "C", readonly=not array.mutable, aligned=array.aligned)
    signature = result(array, types.intp, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        source = context.make_array(kind)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, source.strides, 3)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        offset = builder.add(builder.mul(args[1], strides[0]), builder.mul(args[2], strides[1]))
        offset = builder.add(offset, builder.mul(args[3], itemsize))
        byte_pointer = builder.bitcast(source.data, ir.IntType(8).as_pointer())
        pointer = builder.bitcast(builder.gep(byte_pointer, [offset]), source.data.type)
        view = context.make_array(signature.return_type)(context, builder)
        # no meminfo: the view borrows from `array`, which the caller keeps alive
        populate_array(
            view,
            data=pointer,
            shape=(builder.sub(args[4], args[3]),),
            strides=(itemsize,),
            itemsize=itemsize,
            meminfo=None,
            parent=None,
        )
        return view._getvalue()

    return signature, codegen
