"""Vectors of numbers, as a type that compiled functions compute with: +, -, *, `fmuladd`, `floored`, `lane_sum`.

Written-out vectors instead of loops left to the compiler's vectoriser, for four reasons: non-temporal stores exist
only for vectors; in place (`out` is `x`) the vectoriser gives up; half precision and integers are converted in
registers; and the order of every sum is in the source, so that its bits depend on nothing else. A formula is
written once and serves scalars and vectors alike.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

#: Numbers a vector: one cache line of float32, two or more machine registers, which keeps several sums in flight.
LANES = 16

#: Numbers a short vector, for what does not fill a long one: 16 bytes of float32, the alignment of new arrays.
SHORT = 4

I32 = ir.IntType(32)


class Vector(types.Type):
    """So many numbers of one type."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"vector({lanes} x {dtype})")


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        lane = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(lane, vector.lanes))


def _arithmetic(function, on_floats, on_integers):
    @infer_global(function)
    class Typing(AbstractTemplate):
        def generic(self, arguments, keywords):
            if len(arguments) == 2 and isinstance(arguments[0], Vector) and arguments[0] == arguments[1]:
                return signature(arguments[0], *arguments)
            return None

    @lower_builtin(function, Vector, Vector)
    def lower(context, builder, signature, arguments):
        is_float = isinstance(signature.return_type.dtype, types.Float)
        return getattr(builder, on_floats if is_float else on_integers)(*arguments)


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul", "mul")


def splatted(builder, scalar, lanes):
    """LLVM code for a vector that holds `scalar` in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


@intrinsic
def splat(typingctx, scalar):
    """The vector of LANES with `scalar` in every lane."""

    def codegen(context, builder, signature, arguments):
        return splatted(builder, arguments[0], LANES)

    return Vector(scalar, LANES)(scalar), codegen


def _overloaded(builder, name, kind, *arguments):
    """A call of an LLVM intrinsic that exists for every floating type, vectors included."""
    lane = kind.element if isinstance(kind, ir.VectorType) else kind
    lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    suffix = f"{lanes}{'f32' if isinstance(lane, ir.FloatType) else 'f64'}"
    function = ir.FunctionType(kind, [kind] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"{name}.{suffix}"), arguments)


@intrinsic
def fmuladd(typingctx, a, b, c):
    """a * b + c, with one rounding where the machine has the instruction, and the same way everywhere.

    An explicit operation rather than a fast-math flag: evaluation mode promises the same bits for a row
    whatever loop (vector body, remainder, other layout) it passes through. Of integers: exact.
    """

    def codegen(context, builder, signature, arguments):
        kind = signature.return_type
        if isinstance(kind.dtype if isinstance(kind, Vector) else kind, types.Integer):
            return builder.add(builder.mul(arguments[0], arguments[1]), arguments[2])
        return _overloaded(builder, "llvm.fmuladd", arguments[0].type, *arguments)

    return a(a, a, a), codegen


@intrinsic
def floored(typingctx, y, floor):
    """`floor` where y < floor, else y: a NaN stays one."""

    def codegen(context, builder, signature, arguments):
        value, least = arguments
        return builder.select(builder.fcmp_ordered("<", value, least), least, value)

    return y(y, y), codegen


@intrinsic
def lane_sum(typingctx, vector):
    """Sum of the lanes: halves are added to halves, in this one order."""

    def codegen(context, builder, signature, arguments):
        (rest,) = arguments
        add = builder.fadd if isinstance(signature.return_type, types.Float) else builder.add
        lanes = signature.args[0].lanes
        while lanes > 1:
            lanes //= 2
            undefined = ir.Constant(rest.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(rest, undefined, ir.Constant(ir.VectorType(I32, lanes), list(part)))
                for part in (range(lanes), range(lanes, 2 * lanes))
            )
            rest = add(low, high)
        return builder.extract_element(rest, I32(0))

    return vector.dtype(vector), codegen
