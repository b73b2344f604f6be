"""Working memory of kernels, and the lesser and greater of two numbers.

What `np.empty`, `np.zeros`, `min` and `max` do, without what Numba makes of them: each is a function compiled to the
end for every type it meets, 40 to 150 ms, and a kernel meets up to twelve.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbbn.cpu.fields import array_of

#: Alignment of new arrays: a cache line.
_LINE = 64


def _allocate(context, builder, kind, shape, clear):
    """Code for a new array."""
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    size = builder.mul(strides[0], shape[0])
    memory = context.nrt.meminfo_alloc_aligned(builder, size, _LINE)
    data = context.nrt.meminfo_data(builder, memory)
    if clear:
        cgutils.memset(builder, data, size, 0)
    data = builder.bitcast(data, context.get_data_type(kind.dtype).as_pointer())
    return array_of(context, builder, kind, data, shape, strides, itemsize, memory)


def _one_row(clear):
    def typing(typingctx, size, like):
        def codegen(context, builder, signature, arguments):
            return _allocate(context, builder, signature.return_type, (arguments[0],), clear)

        return types.Array(like, 1, "C")(types.intp, like), codegen

    return typing


def _rows(clear):
    def typing(typingctx, rows, size, like):
        def codegen(context, builder, signature, arguments):
            return _allocate(context, builder, signature.return_type, arguments[:2], clear)

        return types.Array(like, 2, "C")(types.intp, types.intp, like), codegen

    return typing


#: An array of `size` numbers of the type of `like`, and one of so many rows; holding anything, or zeros.
scratch = intrinsic(_one_row(clear=False))
scratch_rows = intrinsic(_rows(clear=False))
zeros = intrinsic(_one_row(clear=True))
zero_rows = intrinsic(_rows(clear=True))


def _chosen(operator):
    def typing(typingctx, a, b):
        kind = types.intp if isinstance(a, types.Integer) and isinstance(b, types.Integer) else types.float64

        def codegen(context, builder, signature, arguments):
            first, second = arguments
            compare = builder.icmp_signed if isinstance(first.type, ir.IntType) else builder.fcmp_ordered
            return builder.select(compare(operator, second, first), second, first)

        return kind(kind, kind), codegen

    return typing


#: The lesser and the greater of two integers, or of two floats: the first, if that is a NaN.
lesser = intrinsic(_chosen("<"))
greater = intrinsic(_chosen(">"))
