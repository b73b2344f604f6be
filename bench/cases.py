"""What is measured: shapes with their channel axis and dtype."""

from dataclasses import dataclass
from typing import Self

DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8")


@dataclass(frozen=True)
class Case:
    """The shape of x, its channel axis (1: channels-first, -1: channels-last) and its dtype."""

    dims: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`32x64x56x56`, `32x56x56x64-last` for channels-last, `32x64x56x56-float16`: what `id` gives."""
        sizes, *words = text.split("-")
        axis = -1 if words[:1] == ["last"] else 1
        dtypes = words[axis == -1 :]
        dims = tuple(int(size) for size in sizes.split("x"))
        if len(dims) < 2 or min(dims) < 1 or len(dtypes) > 1 or not set(dtypes) <= set(DTYPES):
            raise ValueError(
                f"case: expected sizes, then perhaps -last, then perhaps a dtype of {', '.join(DTYPES)}, such as "
                f"32x64x56x56 or 32x56x56x64-last-float16, got {text!r}"
            )
        return cls(dims, axis, *dtypes)

    @property
    def id(self) -> str:
        dtype = "" if self.dtype == "float32" else f"-{self.dtype}"
        return "x".join(map(str, self.dims)) + ("-last" if self.axis == -1 else "") + dtype

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.dims}" + (" channels-last" if self.axis == -1 else "") + dtype

    @property
    def channels(self) -> int:
        return self.dims[self.axis]


#: Points of "throughput against size": 64 channels from 16 kB to 206 MB.
LADDER = (
    Case((64, 64)),
    Case((4, 64, 14, 14)),
    Case((1, 64, 56, 56)),
    Case((16, 64, 28, 28)),
    Case((32, 64, 56, 56)),
    Case((64, 64, 56, 56)),
    Case((64, 64, 112, 112)),
)

CASES = (
    *LADDER,
    # many channels and small maps, few channels and large ones, one channel, long rows, a table
    Case((64, 256, 28, 28)),
    Case((32, 512, 14, 14)),
    Case((64, 512, 7, 7)),
    Case((32, 3, 224, 224)),
    Case((4096, 1, 28, 28)),
    Case((16, 16, 44100)),
    Case((65536, 64)),
    Case((8, 14, 14, 64), axis=-1),
    Case((32, 56, 56, 64), axis=-1),
    Case((32, 14, 14, 512), axis=-1),
    Case((64, 28, 28, 256), axis=-1),
    # a small shape and one whose result is larger than caches, in half the bytes
    Case((16, 64, 28, 28), dtype="float16"),
    Case((64, 64, 112, 112), dtype="float16"),
    Case((16, 64, 28, 28), dtype="bfloat16"),
    Case((64, 64, 112, 112), dtype="bfloat16"),
    # pictures, as they come from a file
    Case((64, 3, 224, 224), dtype="uint8"),
    Case((64, 224, 224, 3), axis=-1, dtype="uint8"),
)
