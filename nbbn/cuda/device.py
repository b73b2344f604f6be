"""Arrays on a device as the package sees them: geometry and an address, looked up once per argument.

Every library's arrays become `DeviceArray`; results are made by the library that the input came from, in its memory
pool. Nothing here reads device memory, waits for it, or copies it unless asked to.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.cuda.geometry import Flags, Geometry, broadcast, reshaped, shadow_of, transposed
from nbbn.cuda.libraries import Library, library_of
from nbbn.cuda.storage import Kind


class DeviceArray:
    """An array on a device."""

    __slots__ = ("address", "device", "geometry", "library", "owner")

    def __init__(self, address: int, geometry: Geometry, owner: Any, library: Library, device: int | None):
        self.address, self.geometry = address, geometry
        self.owner, self.library, self.device = owner, library, device

    @property
    def shadow(self) -> np.ndarray:
        """A NumPy array of this geometry at this address, never to be read: NumPy knows what arrays overlap."""
        return _shadow(self.address, self.geometry)

    @property
    def dtype(self) -> Any:
        return self.geometry.dtype

    @property
    def kind(self) -> Kind | None:
        """How its values lie in memory; None for what kernels cannot read."""
        return self.geometry.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.geometry.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.geometry.strides

    @property
    def ndim(self) -> int:
        return self.geometry.ndim

    @property
    def size(self) -> int:
        return self.geometry.size

    @property
    def itemsize(self) -> int:
        return self.geometry.itemsize

    @property
    def flags(self) -> Flags:
        whole = self.geometry
        return whole.flags_misaligned if self.address % whole.itemsize else whole.flags

    def transpose(self, order: tuple[int, ...]) -> "DeviceArray":
        """The same memory with the axes in another order; the owner stays as it is."""
        return self._with(transposed(self.geometry, order))

    def reshape(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory in another shape that its strides allow."""
        return self._with(reshaped(self.geometry, shape))

    def broadcast_to(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory, repeated along axes of stride 0."""
        return self._with(broadcast(self.geometry, shape))

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

    def _with(self, geometry: Geometry) -> "DeviceArray":
        return DeviceArray(self.address, geometry, self.owner, self.library, self.device)


# an address may stand for other memory later: the same address and geometry are the same shadow all the same
_shadow = lru_cache(1024)(shadow_of)


def view(name: str, value: Any) -> DeviceArray:
    """`value`, an array on a device, as geometry and address."""
    library = library_of(value)
    address, geometry, device = library.describe(name, value)
    return DeviceArray(address, geometry, value, library, device)
