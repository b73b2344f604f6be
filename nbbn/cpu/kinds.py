"""Facts about the dtype of an array that a kernel works on, known when it is compiled."""

from numba import types
from numba.extending import intrinsic

from nbbn.cpu.storage import sum_type


@intrinsic
def sum_origin(typingctx, array):
    """0 of the type that deviations of this array add up in: see `storage.sum_type`."""
    kind = sum_type(array.dtype)

    def codegen(context, builder, signature, arguments):
        return context.get_constant(kind, 0)

    return kind(array), codegen


@intrinsic
def holds_integers(typingctx, array):
    """Whether an array is of integers or booleans, known when compiled."""

    def codegen(context, builder, signature, arguments):
        return context.get_constant(types.boolean, isinstance(signature.args[0].dtype, types.Integer | types.Boolean))

    return types.boolean(array), codegen


@intrinsic
def largest_origin(typingctx, array):
    """The largest float64 that converts to the integers of an array; infinite where any will do."""
    kind = array.dtype
    long = isinstance(kind, types.Integer) and kind.bitwidth == 64

    def codegen(context, builder, signature, arguments):
        largest = (2.0**63 - 1024 if kind.signed else 2.0**64 - 2048) if long else float("inf")
        return context.get_constant(types.float64, largest)

    return types.float64(array), codegen


@intrinsic
def least_squares(typingctx, array):
    """Below this a sum of squares (in the type of `sum_origin`) may have lost digits to denormals."""
    kind = sum_type(array.dtype)

    def codegen(context, builder, signature, arguments):
        tiny = {types.float32: 2.0**-126, types.float64: 2.0**-1022}.get(kind, 0.0)
        return context.get_constant(types.float64, tiny * 2.0**33)

    return types.float64(array), codegen
