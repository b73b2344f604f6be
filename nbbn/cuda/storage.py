"""Kinds of storage: how the values of an array lie in memory, and in which precision kernels compute with them."""

from dataclasses import dataclass

import numpy as np


class BFloat16:
    """bfloat16 as far as this package asks a dtype: NumPy has none of its own."""

    name, char, kind, itemsize = "bfloat16", "E", "V", 2
    isnative = True

    def __repr__(self) -> str:
        return "bfloat16"


BFLOAT16 = BFloat16()

#: Bytes of one load or store at best.
WIDEST = 16


@dataclass(frozen=True)
class Kind:
    """What one value is in memory.

    `narrow`: float32 holds every value, so that float32 arithmetic serves. `narrow_sums`: deviations of it from an
    origin near the mean may be added up in float32; not those of 16-bit integers, whose sums are to be exact.
    """

    name: str
    itemsize: int
    integer: bool = False
    signed: bool = True
    narrow: bool = True
    narrow_sums: bool = True

    @property
    def most_lanes(self) -> int:
        """Values in the widest load; of 16-bit integers, which are added up in float64, half as many."""
        return WIDEST // self.itemsize // (2 if self.integer and self.itemsize == 2 else 1)


def _integer(name: str) -> Kind:
    dtype = np.dtype(name)
    return Kind(name, dtype.itemsize, True, dtype.kind == "i", dtype.itemsize <= 2, dtype.itemsize == 1)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("float32", 4),
        Kind("float64", 8, narrow=False, narrow_sums=False),
        Kind("float16", 2),
        Kind("bfloat16", 2),
        *map(_integer, ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")),
        Kind("bool", 1, True, False),
    )
}

#: Least mean square of float32 deviations: below, squares lose digits to denormals.
LEAST_SQUARE = 1e-30


def packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of an array in C order."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
