"""Reading and writing memory: runs of a row, vectors and single elements, prefetches, non-temporal stores.

Wherever a number is read, `like` (a scalar) tells the type it is computed with. A scalar in place of an array reads
as that scalar everywhere, so that the same loop serves coefficients per row and per column.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbbn.cpu.fields import array_of, field, lengths
from nbbn.cpu.storage import (
    apart,
    apart_from_memory,
    apart_to_memory,
    from_memory,
    is_apart,
    memory_type,
    to_memory,
)
from nbbn.cpu.vector import LANES, SHORT, Vector, splatted

#: Bytes a cache line, and the alignment of non-temporal stores.
LINE = 64

_BYTES = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)


@intrinsic
def run(typingctx, array, i, j, start, stop):
    """array[i, j, start:stop] of a 3-d array whose last axis is contiguous, as a contiguous 1-d array.

    Numba types a view such as big[:, 2:5] as "any layout", and its own slices carry run-time checks that double the
    compile time. The caller vouches for the memory from start to stop being one piece: within the row, or (columns
    family) beyond it where the rows that follow are its continuation.
    """
    result = types.Array(array.dtype, 1, "C", readonly=not array.mutable, aligned=array.aligned)
    signature = result(array, types.intp, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, arguments):
        kind = signature.args[0]
        data = field(context, builder, kind, arguments[0], "data")
        strides = lengths(context, builder, kind, arguments[0], "strides")
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        offset = builder.add(builder.mul(arguments[1], strides[0]), builder.mul(arguments[2], strides[1]))
        offset = builder.add(offset, builder.mul(arguments[3], itemsize))
        pointer = builder.bitcast(builder.gep(builder.bitcast(data, _BYTES), [offset]), data.type)
        size = builder.sub(arguments[4], arguments[3])
        # it borrows from `array`, which the caller keeps alive
        return array_of(context, builder, signature.return_type, pointer, (size,), (itemsize,), itemsize)

    return signature, codegen


def pointer_to(context, builder, kind, array, index, pointee):
    """Where element number `index` of a contiguous 1-d array is, as a pointer to `pointee`."""
    data = field(context, builder, kind, array, "data")
    base = builder.bitcast(data, memory_type(kind.dtype).as_pointer())
    return builder.bitcast(builder.gep(base, [index]), pointee.as_pointer())


def _itemsize(context, kind):
    return context.get_abi_sizeof(memory_type(kind.dtype))


def _read(context, builder, signature, arguments, lanes, convert=True):
    """Code for source[i], or for source[i : i + lanes] as a vector, in the type of the last argument."""
    source, like = signature.args[0], context.get_value_type(signature.args[2])
    if not isinstance(source, types.Array):
        return splatted(builder, arguments[0], lanes) if lanes else arguments[0]
    in_memory = memory_type(source.dtype)
    pointee = ir.VectorType(in_memory, lanes) if lanes else in_memory
    pointer = pointer_to(context, builder, source, arguments[0], arguments[1], pointee)
    value = builder.load(pointer, align=_itemsize(context, source))
    return from_memory(context, builder, source.dtype, value, like) if convert else value


def _reader(lanes):
    def typing(typingctx, source, i, like):
        def codegen(context, builder, signature, arguments):
            return _read(context, builder, signature, arguments, lanes)

        return (Vector(like, lanes) if lanes else like)(source, types.intp, like), codegen

    return typing


#: source[i], or the vector source[i : i + lanes], as numbers like `like`; of a scalar: that scalar, in every lane.
element = intrinsic(_reader(0))
load = intrinsic(_reader(LANES))
load_short = intrinsic(_reader(SHORT))


def _reader_for(lanes):
    def typing(typingctx, target, source, i, like):
        def codegen(context, builder, signature, arguments):
            to, kind = signature.args[:2]
            reader, rest = signature.return_type(*signature.args[1:]), arguments[1:]
            if not isinstance(kind, types.Array) or not is_apart(to.dtype, lanes):
                return _read(context, builder, reader, rest, lanes)
            if not is_apart(kind.dtype, lanes):
                return apart(builder, _read(context, builder, reader, rest, lanes))
            stored = _read(context, builder, reader, rest, lanes, convert=False)
            return apart_from_memory(builder, stored, context.get_value_type(signature.return_type))

        return (Vector(like, lanes) if lanes else like)(target, source, types.intp, like), codegen

    return typing


#: The same of what goes to `target`: in the order of places in which vectors are written there (`storage.is_apart`).
element_for = intrinsic(_reader_for(0))
load_short_for = intrinsic(_reader_for(SHORT))
load_for = intrinsic(_reader_for(LANES))


def _deviation(lanes):
    def typing(typingctx, source, i, origin):
        kind = source.dtype
        like = origin.dtype if isinstance(origin, types.Array) else origin
        reader = like(source, types.intp, like)

        def codegen(context, builder, signature, arguments):
            value = _read(context, builder, reader, arguments, lanes)
            if isinstance(origin, types.Array):
                start = _read(context, builder, like(origin, types.intp, like), (arguments[2], arguments[1]), lanes)
            else:
                start = splatted(builder, arguments[2], lanes) if lanes else arguments[2]
            if isinstance(like, types.Integer):
                return builder.sub(value, start)
            rounded = builder.fsub(value, start)
            if not (isinstance(kind, types.Integer) and kind.bitwidth == 64):
                return rounded
            # float64 does not hold every 64-bit integer: subtract integers, unless the difference may not be one
            whole = _read(context, builder, reader, arguments, lanes, convert=False)
            difference = builder.sub(whole, (builder.fptosi if kind.signed else builder.fptoui)(start, whole.type))
            return _exact_where_in_range(builder, rounded, builder.sitofp(difference, rounded.type))

        return (Vector(like, lanes) if lanes else like)(source, types.intp, origin), codegen

    return typing


def _exact_where_in_range(builder, rounded, exact):
    """`exact` where `rounded` says that it did not overflow."""
    limit = ir.Constant(ir.DoubleType(), 2.0**62)
    most, least = (
        splatted(builder, bound, rounded.type.count) if isinstance(rounded.type, ir.VectorType) else bound
        for bound in (limit, ir.Constant(ir.DoubleType(), -(2.0**62)))
    )
    inside = builder.and_(builder.fcmp_ordered("<", rounded, most), builder.fcmp_ordered(">", rounded, least))
    return builder.select(inside, exact, rounded)


#: source[i] - origin, or source[i : i + LANES] - origin as a vector, in the type of `origin`: a scalar, or an array
#: that is read at i too.
deviation = intrinsic(_deviation(0))
deviations = intrinsic(_deviation(LANES))
deviations_short = intrinsic(_deviation(SHORT))


def _write(non_temporal):
    def typing(typingctx, target, i, value):
        def codegen(context, builder, signature, arguments):
            kind = signature.args[0]
            if isinstance(value, Vector) and is_apart(kind.dtype, value.lanes):
                stored = apart_to_memory(builder, arguments[2])
            else:
                stored = to_memory(context, builder, kind.dtype, arguments[2])
            size = _itemsize(context, kind)
            if non_temporal and isinstance(value, Vector):
                size = min(value.lanes * size, LINE)  # what makes it one instruction: see `head`
            elif non_temporal:
                stored = builder.bitcast(stored, ir.IntType(8 * size))  # scalars: an integer instruction has it
            pointer = pointer_to(context, builder, kind, arguments[0], arguments[1], stored.type)
            store = builder.store(stored, pointer, align=size)
            if non_temporal:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(target, types.intp, value), codegen

    return typing


#: target[i] = value, or target[i : i + lanes] = value for a vector (long ones as `load_for` reads them).
store = intrinsic(_write(non_temporal=False))

#: The same past the caches. A vector needs `target` at i aligned to its own size, or to a cache line: see `head`.
stream = intrinsic(_write(non_temporal=True))


def _head(lanes):
    def typing(typingctx, target, i):
        def codegen(context, builder, signature, arguments):
            kind, size = signature.args[0], _itemsize(context, signature.args[0])
            address = builder.ptrtoint(
                pointer_to(context, builder, kind, arguments[0], arguments[1], ir.IntType(8)), arguments[1].type
            )
            boundary = min(lanes * size, LINE)
            before = builder.and_(builder.neg(address), address.type(boundary - 1))
            return builder.udiv(before, address.type(size))

        return types.intp(target, types.intp), codegen

    return typing


#: How many elements from i on lie before the first place that is aligned for a long, or for a short, vector.
head = intrinsic(_head(LANES))
head_short = intrinsic(_head(SHORT))
