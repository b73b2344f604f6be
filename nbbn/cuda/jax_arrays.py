"""JAX's arrays on a device: immutable, computed when JAX likes, in memory that is JAX's.

JAX gives arrays and takes them through DLPack, bfloat16 included. It orders the reuse of an array's memory after its
own work only, and says nothing of the stream that this is queued on. So a call that reads one waits for it to be
computed, works on the legacy default stream, and has finished when it returns: only then does it let go of the
array. Results are computed in memory of this package, which JAX takes over as it is; what is no result (`Moments` in
float64, which JAX would round to float32 unless it was told otherwise) stays there.
"""

import sys
from typing import Any

import numpy as np

from nbbn.cuda import dlpack, memory
from nbbn.cuda.geometry import geometry
from nbbn.cuda.storage import BFLOAT16, packed

#: The legacy default stream, as streams are numbered by DLPack and by the CUDA array interface.
STREAM = 1


class DeviceMemory:
    """An array in memory of this package: what JAX has no way to give, memory that a kernel may write."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: int, strides: Any = None, piece: Any = None):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.strides = packed(shape, dtype.itemsize) if strides is None else strides
        if piece is None:
            with memory.there(device):
                dlpack.free()
                piece = memory.allocate(int(np.prod(shape)) * dtype.itemsize)
        self.piece = piece
        self.address = memory.address_of(piece)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = "<V2" if self.dtype is BFLOAT16 else self.dtype.str
        return {
            "shape": self.shape, "strides": self.strides, "typestr": typestr, "data": (self.address, False),
            "version": 3, "stream": STREAM,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device

    def __dlpack__(self, **_: Any) -> Any:
        """Nothing to wait for: the call that computed this waited."""
        steps = tuple(step // self.dtype.itemsize for step in self.strides)
        device = self.__dlpack_device__()
        return dlpack.capsule(self.address, self.shape, steps, self.dtype, device, self.piece)

    def __repr__(self) -> str:
        return f"DeviceMemory(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class Jax:
    """What is asked of an array library (`nbbn.cuda.libraries.Library`)."""

    is_plain = False
    pickles = False  # statistics are in memory of this package

    def describe(self, name: str, value: Any) -> Any:
        if type(value) is DeviceMemory:
            return value.address, geometry(value.shape, value.strides, value.dtype, True), value.device
        if name == "out":
            raise TypeError("out: expected an array that can be updated in place, got a JAX array; leave it out")
        if len(value.devices()) != 1:
            raise TypeError(f"{name}: expected an array on one device, got one sharded over {len(value.devices())}")
        value.block_until_ready()
        try:
            seen = dlpack.look(value.__dlpack__())
        except (BufferError, TypeError) as error:
            raise TypeError(
                f"{name}: expected an array of numbers on one device, got {value.dtype} ({error})"
            ) from None
        itemsize = seen.dtype.itemsize
        steps = seen.strides
        strides = packed(seen.shape, itemsize) if steps is None else tuple(step * itemsize for step in steps)
        return seen.address, geometry(seen.shape, strides, seen.dtype, False), seen.device

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int | None) -> Any:
        return DeviceMemory(shape, dtype, device or 0)

    def address(self, made: Any) -> int:
        return made.address

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        if type(value) is not DeviceMemory:
            return _numpy().transpose(value, order)
        shape, turned = (tuple(sizes[a] for a in order) for sizes in (value.shape, value.strides))
        return DeviceMemory(shape, value.dtype, value.device, turned, value.piece)

    def broadcast(self, value: Any, shape: tuple[int, ...]) -> Any:
        return _numpy().broadcast_to(value, shape)

    def contiguous(self, value: Any) -> Any:
        return value  # what has strides that kernels cannot read was transposed, and so copied, by JAX

    def assign(self, target: Any, source: Any) -> None:
        raise TypeError("expected an array that can be updated in place, got a JAX array")

    def fill(self, target: Any, values: np.ndarray) -> None:
        if type(target) is not DeviceMemory:
            self.assign(target, values)
        with memory.there(target.device):
            memory.to_device(target.piece, values)

    def to_host(self, value: Any) -> np.ndarray:
        if type(value) is DeviceMemory:
            with memory.there(value.device):
                return memory.to_host(value.piece, value.dtype, value.shape)
        return np.asarray(value)

    def stream(self, value: Any, device: int | None) -> int:
        return STREAM

    def finished(self, value: Any) -> Any:
        if 0 in value.shape:  # no memory to take over
            return _numpy().zeros(value.shape, "bfloat16" if value.dtype is BFLOAT16 else value.dtype)
        return sys.modules["jax"].dlpack.from_dlpack(value)


def _numpy() -> Any:
    return sys.modules["jax"].numpy
