"""Memory as kernels see it: an address and an index. Loads and stores of up to 16 bytes, with conversion in registers.

Plain loops over arrays compile to loads of single values; these compile to `ld.global.v4` and `st.global.v4`. In the
simulator `nbbn.cuda.simulated` stands in, which also checks bounds and alignment.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbbn.cuda.storage import KINDS, Kind

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_GLOBAL = 1  # the address space of device memory


def _pointer(builder, address, index, itemsize, pointee):
    """Address `address` + `index` * `itemsize`, known to lie in device memory."""
    place = builder.add(address, builder.mul(index, ir.Constant(_I64, itemsize)))
    return builder.inttoptr(place, ir.PointerType(pointee, _GLOBAL))


def _words(size):
    """What `size` bytes are loaded as: 32-bit words where possible, for which there are wide instructions."""
    return ir.IntType(8 * size) if size < 4 else _I32 if size == 4 else ir.VectorType(_I32, size // 4)


def _vector(element, lanes):
    return element if lanes == 1 else ir.VectorType(element, lanes)


def _elements(builder, vector, lanes):
    return [vector] if lanes == 1 else [builder.extract_element(vector, _I32(k)) for k in range(lanes)]


def _bit_type(kind: Kind):
    if kind.integer:
        return ir.IntType(8 * kind.itemsize)
    return {"float32": _F32, "float64": _F64}.get(kind.name, _I16)


def _to_float(builder, kind, value):
    """One stored value as float32, or float64 where float32 does not hold it."""
    if kind.name == "float16":
        return builder.call(ir.InlineAsm(ir.FunctionType(_F32, [_I16]), "cvt.f32.f16 $0, $1;", "=f,h"), [value])
    if kind.name == "bfloat16":
        return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)
    if not kind.integer:
        return value
    result = _F32 if kind.narrow else _F64
    return builder.sitofp(value, result) if kind.signed else builder.uitofp(value, result)


def _from_float(builder, kind, value):
    """float32 or float64 to one stored value, rounded to the nearest (even)."""
    source = value.type
    if kind.name == "float32":
        return value if source == _F32 else builder.fptrunc(value, _F32)
    if kind.name == "float64":
        return value if source == _F64 else builder.fpext(value, _F64)
    if kind.name == "float16":
        code, letter = ("cvt.rn.f16.f64 $0, $1;", "d") if source == _F64 else ("cvt.rn.f16.f32 $0, $1;", "f")
        return builder.call(ir.InlineAsm(ir.FunctionType(_I16, [source]), code, f"=h,{letter}"), [value])
    value = value if source == _F32 else builder.fptrunc(value, _F32)
    return builder.call(ir.InlineAsm(ir.FunctionType(_I16, [_F32]), "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [value])


def _make_load(kind: Kind, lanes: int):
    number = types.float32 if kind.narrow else types.float64
    size = kind.itemsize * lanes

    @intrinsic
    def load(typing, address, index):
        signature = types.UniTuple(number, lanes)(types.int64, types.int64)

        def generate(context, builder, signature, arguments):
            words = _words(size)
            loaded = builder.load(_pointer(builder, arguments[0], arguments[1], kind.itemsize, words), align=size)
            if kind.itemsize <= 2 and size >= 4:  # from words: eight halves would be loaded in two pieces
                element, width = ir.IntType(8 * kind.itemsize), 8 * kind.itemsize
                shifted = [
                    builder.lshr(word, _I32(place)) if place else word
                    for word in _elements(builder, loaded, size // 4)
                    for place in range(0, 32, width)
                ]
                bits = [builder.trunc(word, element) for word in shifted]
            else:
                bits = _elements(builder, builder.bitcast(loaded, _vector(_bit_type(kind), lanes)), lanes)
            values = [_to_float(builder, kind, value) for value in bits]
            return context.make_tuple(builder, signature.return_type, values)

        return signature, generate

    return load


def _make_store(kind: Kind, lanes: int):
    size = kind.itemsize * lanes

    @intrinsic
    def store(typing, address, index, values):
        signature = types.void(types.int64, types.int64, values)

        def generate(context, builder, signature, arguments):
            values = [_from_float(builder, kind, builder.extract_value(arguments[2], k)) for k in range(lanes)]
            if kind.itemsize == 2 and lanes > 1:  # as words: eight halves would be stored in two pieces
                halves = [builder.zext(value, _I32) for value in values]
                pairs = zip(halves[::2], halves[1::2], strict=True)
                values = [builder.or_(low, builder.shl(high, _I32(16))) for low, high in pairs]
            stored = values[0]
            if len(values) > 1:
                stored = ir.Constant(ir.VectorType(stored.type, len(values)), ir.Undefined)
                for k, value in enumerate(values):
                    stored = builder.insert_element(stored, value, _I32(k))
            builder.store(stored, _pointer(builder, arguments[0], arguments[1], kind.itemsize, stored.type), size)
            return context.get_dummy_value()

        return signature, generate

    return store


def _lane_counts(kind: Kind):
    return [n for n in (1, 2, 4, 8, 16) if n <= kind.most_lanes]


#: load(address, index) -> tuple of values, by name of the kind and number of lanes; the place is aligned to its size.
LOAD = {(kind.name, n): _make_load(kind, n) for kind in KINDS.values() for n in _lane_counts(kind)}
#: store(address, index, tuple of values)
STORE = {
    (kind.name, n): _make_store(kind, n) for kind in KINDS.values() if not kind.integer for n in _lane_counts(kind)
}


# --- single values of per-channel arrays and of the workspace ------------------------------------------------------


def _make_single(number, llvm_type, size, code=None):
    @intrinsic
    def load(typing, address, index):
        def generate(context, builder, signature, arguments):
            pointer = _pointer(builder, arguments[0], arguments[1], size, llvm_type)
            if code is None:
                return builder.load(pointer, align=size)
            place = builder.ptrtoint(pointer, _I64)
            return builder.call(ir.InlineAsm(ir.FunctionType(llvm_type, [_I64]), *code, side_effect=True), [place])

        return number(types.int64, types.int64), generate

    return load


def _make_single_store(number, llvm_type, size):
    @intrinsic
    def store(typing, address, index, value):
        def generate(context, builder, signature, arguments):
            builder.store(arguments[2], _pointer(builder, arguments[0], arguments[1], size, llvm_type), size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number), generate

    return store


load_float32 = _make_single(types.float32, _F32, 4)
load_float64 = _make_single(types.float64, _F64, 8)
load_int64 = _make_single(types.int64, _I64, 8)
load_mask = _make_single(types.uint8, ir.IntType(8), 1)
#: What another block wrote: never from a cache of this multiprocessor.
load_shared_result = _make_single(types.float64, _F64, 8, ("ld.volatile.global.f64 $0, [$1];", "=d,l"))
load_shared_count = _make_single(types.int64, _I64, 8, ("ld.volatile.global.s64 $0, [$1];", "=l,l"))
store_float32 = _make_single_store(types.float32, _F32, 4)
store_float64 = _make_single_store(types.float64, _F64, 8)
store_int64 = _make_single_store(types.int64, _I64, 8)
store_int32 = _make_single_store(types.int32, _I32, 4)


@intrinsic
def take_ticket(typing, address, index):
    """Add 1 to an int32 of device memory, whichever thread comes; returns what it was before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], arguments[1], 4, _I32), _I32(1), "monotonic")

    return types.int32(types.int64, types.int64), generate


# --- arithmetic on lanes: tuples of equal length, or scalars that stand for as many ---------------------------------


def _elementwise(arity, operation):
    """An intrinsic that applies `operation(builder, *values)` lane by lane."""

    def generate(context, builder, signature, arguments):
        lanes = signature.return_type.count
        columns = [
            [builder.extract_value(value, k) for k in range(lanes)]
            if isinstance(kind, types.UniTuple)
            else [value] * lanes
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        return context.make_tuple(
            builder, signature.return_type, [operation(builder, *values) for values in zip(*columns, strict=True)]
        )

    def signature(*kinds):
        return next(kind for kind in kinds if isinstance(kind, types.UniTuple))(*kinds)

    if arity == 1:
        return intrinsic(lambda typing, a: (signature(a), generate))
    if arity == 2:
        return intrinsic(lambda typing, a, b: (signature(a, b), generate))
    return intrinsic(lambda typing, a, b, c: (signature(a, b, c), generate))


def _fma(builder, a, b, c):
    return builder.fma(a, b, c)


add = _elementwise(2, lambda builder, a, b: builder.fadd(a, b))
subtract = _elementwise(2, lambda builder, a, b: builder.fsub(a, b))
multiply = _elementwise(2, lambda builder, a, b: builder.fmul(a, b))
fma = _elementwise(3, _fma)


def _magnitude(builder, value):
    negative = builder.fcmp_ordered("<", value, ir.Constant(value.type, 0.0))
    return builder.select(negative, builder.fsub(ir.Constant(value.type, -0.0), value), value)


def _finite_or_zero(builder, value):
    """0 for what is infinite or NaN."""
    finite = builder.fcmp_ordered("<", _magnitude(builder, value), ir.Constant(value.type, float("inf")))
    return builder.select(finite, value, ir.Constant(value.type, 0.0))


def _cut(builder, value, floor):
    """`floor` where the value is less; a NaN stays one."""
    return builder.select(builder.fcmp_ordered("<", value, floor), floor, value)


cut = _elementwise(2, _cut)
magnitude = _elementwise(1, _magnitude)
finite_or_zero = _elementwise(1, _finite_or_zero)


@intrinsic
def total(typing, values):
    """The sum over lanes, by halves."""

    def generate(context, builder, signature, arguments):
        parts = [builder.extract_value(arguments[0], k) for k in range(values.count)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
        return parts[0]

    return values.dtype(values), generate


def _make_cast(number, llvm_type):
    @intrinsic
    def cast(typing, values):
        signature = types.UniTuple(number, values.count)(values)

        def convert(builder, value):
            if value.type == llvm_type:
                return value
            return builder.fpext(value, llvm_type) if llvm_type == _F64 else builder.fptrunc(value, llvm_type)

        def generate(context, builder, signature, arguments):
            parts = [convert(builder, builder.extract_value(arguments[0], k)) for k in range(values.count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return signature, generate

    return cast


narrow = _make_cast(types.float32, _F32)
wide = _make_cast(types.float64, _F64)
