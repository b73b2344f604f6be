"""Cache lines: asking for them ahead, and the order of stores that go past the caches."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbbn.cpu.memory import pointer_to

_BYTES = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)


def _prefetch(context, builder, kind, array, index):
    pointer = pointer_to(context, builder, kind, array, index, ir.IntType(8))
    signature = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (_BYTES,), signature)
    builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # to read, into all caches, data


@intrinsic
def prefetch(typingctx, source, i):
    """Ask for the cache line of source[i], which may lie beyond its end: nothing is read."""

    def codegen(context, builder, signature, arguments):
        _prefetch(context, builder, signature.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(source, types.intp), codegen


@intrinsic
def prefetch_all(typingctx, sources, i):
    """The same for every array of a tuple."""

    def codegen(context, builder, signature, arguments):
        for k, kind in enumerate(signature.args[0]):
            _prefetch(context, builder, kind, builder.extract_value(arguments[0], k), arguments[1])
        return context.get_dummy_value()

    return types.void(sources, types.intp), codegen


@intrinsic
def fence(typingctx):
    """Non-temporal stores so far are seen before what follows. Only x86 needs to be told."""

    def codegen(context, builder, signature, arguments):
        if builder.module.triple.startswith(("x86", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.sfence"), [])
        return context.get_dummy_value()

    return types.void(), codegen
