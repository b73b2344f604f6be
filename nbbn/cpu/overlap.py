"""Whether arrays share memory.

Written out for the compiler: kernels ask it of ten pairs of arrays, and each would be a function to compile.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbbn.cpu.fields import field


def _extents(context, builder, signature, arguments):
    """Of contiguous arrays: addresses of the first byte and of the byte after the last, as LLVM integers."""
    for kind, argument in zip(signature.args, arguments, strict=True):
        data, size, itemsize = (
            field(context, builder, kind, argument, name) for name in ("data", "nitems", "itemsize")
        )
        begin = builder.ptrtoint(data, ir.IntType(64))
        yield begin, builder.add(begin, builder.mul(size, itemsize))


@intrinsic
def disjoint(typingctx, a, b):
    """Whether two contiguous arrays share no memory."""

    def codegen(context, builder, signature, arguments):
        (a_begin, a_end), (b_begin, b_end) = _extents(context, builder, signature, arguments)
        before = builder.icmp_unsigned("<=", a_end, b_begin)
        return builder.or_(before, builder.icmp_unsigned("<=", b_end, a_begin))

    return types.boolean(a, b), codegen


@intrinsic
def same_place(typingctx, a, b):
    """Whether two arrays begin at the same address."""

    def codegen(context, builder, signature, arguments):
        (a_begin, _), (b_begin, _) = _extents(context, builder, signature, arguments)
        return builder.icmp_unsigned("==", a_begin, b_begin)

    return types.boolean(a, b), codegen
