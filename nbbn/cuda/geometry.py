"""Shape, strides and dtype of arrays on a device: one object for each that was seen, so that finding it again is cheap.

Two arrays have the same `Geometry` object if and only if they are alike but for their address, so caches of what
follows from a geometry (views, launches) are keyed by the object itself.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.cuda.storage import BFLOAT16, KINDS

#: By character: the name of a dtype takes NumPy microseconds to spell. Several characters may mean one dtype.
_KINDS = {char: KINDS[np.dtype(char).name] for char in "?bBhHiIlLqQefd"} | {BFLOAT16.char: KINDS["bfloat16"]}

#: Where no array is: a geometry is computed with by NumPy as that of an array there, which is never read.
_NOWHERE = 1 << 20


class Flags:
    """What NumPy's flags say, as far as it is asked for."""

    __slots__ = ("aligned", "c_contiguous", "writeable")

    def __init__(self, c_contiguous: bool, writeable: bool, aligned: bool):
        self.c_contiguous, self.writeable, self.aligned = c_contiguous, writeable, aligned


class Geometry:
    """An array without its address. Compared and hashed by identity."""

    __slots__ = (
        "dtype", "flags", "flags_misaligned", "high", "itemsize", "kind", "low", "ndim", "shape", "size", "strides",
        "writeable",
    )  # fmt: skip

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, writeable: bool):
        self.shape, self.strides, self.dtype, self.writeable = shape, strides, dtype, writeable
        #: How its values lie in memory; None for what kernels cannot read.
        self.kind: Any = _KINDS.get(dtype.char)
        shadow = shadow_of(_NOWHERE, self)
        self.ndim, self.size, self.itemsize = shadow.ndim, shadow.size, shadow.itemsize
        contiguous = shadow.flags.c_contiguous
        whole = all(step % self.itemsize == 0 for step, n in zip(strides, shape, strict=True) if n > 1)
        #: By whether the address is divisible by the size of a value.
        self.flags = Flags(contiguous, writeable, whole)
        self.flags_misaligned = Flags(contiguous, writeable, not self.size)
        reaches = [step * (n - 1) for step, n in zip(strides, shape, strict=True)] if self.size else []
        #: Bytes from the address to the first one that belongs to a value, and to the one after the last.
        self.low = sum(min(0, reach) for reach in reaches)
        self.high = sum(max(0, reach) for reach in reaches) + (self.itemsize if self.size else 0)


@lru_cache(4096)
def geometry(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, writeable: bool) -> Geometry:
    """The geometry of arrays of this shape, strides in bytes and dtype."""
    return Geometry(shape, strides, dtype, writeable)


def shadow_of(address: int, whole: Geometry) -> np.ndarray:
    """A NumPy array with that geometry at that address, never to be read: NumPy knows what arrays overlap."""
    stored = np.dtype(np.uint16) if whole.dtype is BFLOAT16 else whole.dtype
    if 0 in whole.shape or not address:
        return np.empty(whole.shape, stored)
    return np.asarray(_Interface(address, whole.shape, whole.strides, stored.str, not whole.writeable))


class _Interface:
    """What NumPy asks of memory to make an array over it, without reading it."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str, read_only: bool):
        self.__array_interface__ = {
            "data": (address, read_only), "shape": shape, "strides": strides, "typestr": typestr, "version": 3,
        }  # fmt: skip


@lru_cache(4096)
def transposed(whole: Geometry, order: tuple[int, ...]) -> Geometry:
    """With the axes in another order."""
    return geometry(
        tuple(whole.shape[a] for a in order), tuple(whole.strides[a] for a in order), whole.dtype, whole.writeable
    )


#: NumPy 2.0 does not know `copy=`; from 2.5 on it does not like `shape` to be assigned.
_RESHAPES_WITHOUT_COPY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


@lru_cache(4096)
def reshaped(whole: Geometry, shape: tuple[int, ...]) -> Geometry:
    """In another shape that the strides allow."""
    shadow = shadow_of(_NOWHERE, whole)
    if _RESHAPES_WITHOUT_COPY:  # else an error, not a copy: nothing can be read there
        shadow = shadow.reshape(shape, copy=False)
    else:
        shadow.shape = shape
    return geometry(shadow.shape, shadow.strides, whole.dtype, whole.writeable)


@lru_cache(4096)
def broadcast(whole: Geometry, shape: tuple[int, ...]) -> Geometry:
    """Repeated along axes of stride 0."""
    strides = np.broadcast_to(shadow_of(_NOWHERE, whole), shape).strides
    return geometry(shape, strides, whole.dtype, whole.writeable)
