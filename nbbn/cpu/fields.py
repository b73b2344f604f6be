"""Arrays as LLVM values: what they consist of, and what consists of that.

Numba's own way writes an array to memory to read one part of it, and asks all implementations of everything whether
one of them makes arrays. Here it is one instruction.
"""

from llvmlite import ir
from numba.core import cgutils


def field(context, builder, kind, array, name):
    """The part `name` of an array: data, shape, strides, nitems, itemsize, ..."""
    return builder.extract_value(array, context.data_model_manager[kind].get_field_position(name))


def lengths(context, builder, kind, array, name):
    """`shape` or `strides`, one number a dimension."""
    return cgutils.unpack_tuple(builder, field(context, builder, kind, array, name), kind.ndim)


def array_of(context, builder, kind, data, shape, strides, itemsize, meminfo=None):
    """A new array of type `kind`; without `meminfo` it borrows its memory."""
    model = context.data_model_manager[kind]
    size = shape[0]
    for length in shape[1:]:
        size = builder.mul(size, length)
    parts = {
        "nitems": size,
        "itemsize": itemsize,
        "data": data,
        "shape": cgutils.pack_array(builder, shape),
        "strides": cgutils.pack_array(builder, strides),
    }
    if meminfo is not None:
        parts["meminfo"] = meminfo
    array = ir.Constant(model.get_value_type(), None)  # all zeros: no parent
    for name, part in parts.items():
        array = builder.insert_value(array, part, model.get_field_position(name))
    return array
