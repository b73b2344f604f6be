"""What `nbbn.cuda.intrinsics` does, in plain Python on host memory, for Numba's CUDA simulator.

Stricter than a device: every access must lie within one registered piece of memory and be aligned to its size.
"""

import weakref
from bisect import bisect_right

import numpy as np

from nbbn.cuda.storage import KINDS, Kind


class Memory:
    """Pieces of host memory that stand for device memory, found by address."""

    def __init__(self):
        self._starts: list[int] = []
        self._pieces: dict[int, np.ndarray] = {}
        self._views: dict[tuple[int, str], tuple[np.ndarray, int]] = {}

    def allocate(self, size: int) -> np.ndarray:
        """A piece of `size` bytes, at an address divisible by 256, filled with bytes that are NaN as any float."""
        room = np.empty(size + 256, np.uint8)
        offset = -room.ctypes.data % 256
        piece = room[offset : offset + size]
        piece[:] = 0xFF
        start = piece.ctypes.data
        self._starts.insert(bisect_right(self._starts, start), start)
        # the piece stays with its owner: what is freed must not be found any more
        self._pieces[start] = _bytes_at(start, size)
        weakref.finalize(piece, self._forget, start)
        return piece

    def _forget(self, start: int) -> None:
        self._starts.remove(start)
        del self._pieces[start]
        self._views = {key: value for key, value in self._views.items() if value[1] != start}

    def find(self, address: int, kind: str) -> tuple[np.ndarray, int]:
        """The piece that holds the address, as an array of that kind, and where it starts."""
        found = self._views.get((address, kind))
        if found is None:
            number = bisect_right(self._starts, address) - 1
            start = self._starts[number] if number >= 0 else 0
            piece = self._pieces.get(start)
            if piece is None or not start <= address < start + max(1, piece.size):
                raise IndexError(f"address {address:#x} is not in device memory")
            dtype = np.dtype(_STORED.get(kind, kind))
            found = self._views[address, kind] = (
                piece[: piece.size // dtype.itemsize * dtype.itemsize].view(dtype),
                start,
            )
        return found


def _bytes_at(address: int, size: int) -> np.ndarray:
    """An array over memory that belongs to another one, without keeping that alive."""
    interface = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
    return np.asarray(type("Bytes", (), {"__array_interface__": interface})()) if size else np.empty(0, np.uint8)


_STORED = {"bfloat16": "uint16", "bool": "uint8"}

MEMORY = Memory()


def _place(address, index, kind, itemsize, lanes):
    view, start = MEMORY.find(int(address), kind)
    offset = int(address) + int(index) * itemsize
    first = (offset - start) // itemsize
    if offset % (itemsize * lanes):
        raise ValueError(f"misaligned access: {lanes} x {kind} at address {offset:#x}")
    if first < 0 or first + lanes > view.size:
        raise IndexError(f"out of bounds: {kind} {first} to {first + lanes} of {view.size}")
    return view, first


def _make_load(kind: Kind, lanes: int):
    number = np.float32 if kind.narrow else np.float64

    def load(address, index):
        view, first = _place(address, index, kind.name, kind.itemsize, lanes)
        values = view[first : first + lanes]
        if kind.name == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return tuple(values.astype(number))

    return load


def to_bfloat16(values):
    """float32 values as the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _make_store(kind: Kind, lanes: int):
    def store(address, index, values):
        if len(values) != lanes:
            raise TypeError(f"expected {lanes} values, got {len(values)}")
        view, first = _place(address, index, kind.name, kind.itemsize, lanes)
        view[first : first + lanes] = to_bfloat16(values) if kind.name == "bfloat16" else values

    return store


def _lane_counts(kind: Kind):
    return [n for n in (1, 2, 4, 8, 16) if n <= kind.most_lanes]


LOAD = {(kind.name, n): _make_load(kind, n) for kind in KINDS.values() for n in _lane_counts(kind)}
STORE = {
    (kind.name, n): _make_store(kind, n) for kind in KINDS.values() if not kind.integer for n in _lane_counts(kind)
}


def _make_single(name, itemsize):
    def load(address, index):
        view, first = _place(address, index, name, itemsize, 1)
        return view[first]

    def store(address, index, value):
        view, first = _place(address, index, name, itemsize, 1)
        view[first] = value

    return load, store


load_float32, store_float32 = _make_single("float32", 4)
load_float64, store_float64 = _make_single("float64", 8)
load_int64, store_int64 = _make_single("int64", 8)
load_int32, store_int32 = _make_single("int32", 4)
load_mask, _ = _make_single("uint8", 1)
load_shared_result, load_shared_count = load_float64, load_int64


def take_ticket(address, index):
    """The threads of a simulated grid run one at a time."""
    before = load_int32(address, index)
    store_int32(address, index, before + 1)
    return before


# --- lanes ----------------------------------------------------------------------------------------------------------


def _elementwise(operation):
    def apply(*arguments):
        lanes = next(len(a) for a in arguments if isinstance(a, tuple))
        # on a device a Python float is a float64
        kinds = {np.result_type(v) for a in arguments for v in (a if isinstance(a, tuple) else (a,))}
        if len(kinds) != 1:
            raise TypeError(f"lanes of different precision: {sorted(map(str, kinds))}")
        columns = (a if isinstance(a, tuple) else (a,) * lanes for a in arguments)
        return tuple(operation(*values) for values in zip(*columns, strict=True))

    return apply


def _fma(a, b, c):
    """One rounding for float32: the product is exact in float64."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c)) if isinstance(a, np.float32) else a * b + c


add = _elementwise(lambda a, b: a + b)
subtract = _elementwise(lambda a, b: a - b)
multiply = _elementwise(lambda a, b: a * b)
fma = _elementwise(_fma)
magnitude = _elementwise(abs)
finite_or_zero = _elementwise(lambda value: value if abs(value) < np.inf else type(value)(0))
cut = _elementwise(lambda value, floor: floor if value < floor else value)


def total(values):
    """The sum over lanes, by halves."""
    while len(values) > 1:
        half = len(values) // 2
        values = tuple(a + b for a, b in zip(values[:half], values[half:], strict=True))
    return values[0]


def narrow(values):
    """As float32."""
    return tuple(np.float32(value) for value in values)


def wide(values):
    """As float64."""
    return tuple(np.float64(value) for value in values)
