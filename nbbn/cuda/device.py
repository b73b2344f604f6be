"""Arrays on a device as the package sees them: geometry and an address, looked up once per argument.

Every library's arrays become `DeviceArray`; results are made by the library that the input came from, in its memory
pool. Nothing here reads device memory, waits for it, or copies it unless asked to.
"""

from typing import Any

import numpy as np

from nbbn.cuda.libraries import Library, library_of
from nbbn.cuda.storage import BFLOAT16, KINDS, Kind

#: By character: the name of a dtype takes NumPy microseconds to spell. Several characters may mean one dtype.
_KINDS = {char: KINDS[np.dtype(char).name] for char in "?bBhHiIlLqQefd"} | {BFLOAT16.char: KINDS["bfloat16"]}


class DeviceArray:
    """An array on a device. `shadow` has its shape, strides and address, and is never read: NumPy knows the rest."""

    __slots__ = ("address", "device", "dtype", "kind", "library", "owner", "shadow")

    def __init__(self, shadow: np.ndarray, address: int, dtype: Any, owner: Any, library: Library, device: int | None):
        self.shadow, self.address, self.dtype = shadow, address, dtype
        self.owner, self.library, self.device = owner, library, device
        #: How its values lie in memory; None for what kernels cannot read.
        self.kind: Kind | None = _KINDS.get(dtype.char)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shadow.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.shadow.strides

    @property
    def ndim(self) -> int:
        return self.shadow.ndim

    @property
    def size(self) -> int:
        return self.shadow.size

    @property
    def itemsize(self) -> int:
        return self.shadow.itemsize

    @property
    def flags(self) -> Any:
        return self.shadow.flags

    def transpose(self, order: tuple[int, ...]) -> "DeviceArray":
        """The same memory with the axes in another order; the owner stays as it is."""
        return self._with(self.shadow.transpose(order))

    def reshape(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory in another shape that its strides allow."""
        shaped = self.shadow.view()
        shaped.shape = shape  # raises where reshape would copy, that is read
        return self._with(shaped)

    def broadcast_to(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory, repeated along axes of stride 0."""
        return self._with(np.broadcast_to(self.shadow, shape))

    def repeated(self, shape: tuple[int, ...]) -> "DeviceArray":
        """`broadcast_to` of the owner too, so that it can be copied."""
        return view("where", self.library.broadcast(self.owner, shape))

    def contiguous(self, order: tuple[int, ...] | None = None) -> "DeviceArray":
        """A copy in C order, of the axes in another order."""
        owner = self.owner if order is None else self.library.transpose(self.owner, order)
        return view("array", self.library.contiguous(owner))

    def empty(self, shape: tuple[int, ...], dtype: Any, order: tuple[int, ...] | None = None) -> "DeviceArray":
        """A new array beside this one, in C order before its axes are put in another order."""
        owner = self.library.empty(shape, dtype, self.device)
        return view("array", owner if order is None else self.library.transpose(owner, order))

    def stream(self) -> int:
        """The caller's stream."""
        return self.library.stream(self.owner, self.device)

    def to_host(self) -> np.ndarray:
        """A copy in host memory, once it is computed."""
        return self.library.to_host(self.owner)

    def _with(self, shadow: np.ndarray) -> "DeviceArray":
        return DeviceArray(shadow, self.address, self.dtype, self.owner, self.library, self.device)


def view(name: str, value: Any) -> DeviceArray:
    """`value`, an array on a device, as geometry and address."""
    library = library_of(value)
    address, shape, strides, dtype, device, read_only = library.describe(name, value)
    stored = np.dtype(np.uint16) if dtype is BFLOAT16 else dtype
    if 0 in shape or not address:
        shadow = np.empty(shape, stored)
    else:
        shadow = np.asarray(_Interface(address, shape, strides, stored.str, read_only))
    return DeviceArray(shadow, address, dtype, value, library, device)


class _Interface:
    """What NumPy asks of memory to make an array over it, without reading it."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str, read_only: bool):
        self.__array_interface__ = {
            "data": (address, read_only), "shape": shape, "strides": strides, "typestr": typestr, "version": 3,
        }  # fmt: skip
