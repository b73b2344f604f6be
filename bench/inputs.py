"""Shapes to measure, and what every peer is given for one of them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

DTYPE = np.float32
EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class Shape:
    """The shape of x and its channel axis: 1 (channels-first) or -1 (channels-last)."""

    dims: tuple[int, ...]
    axis: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`32x64x56x56`, or `32x56x56x64-last` for channels-last: what `id` gives."""
        sizes, last, rest = text.partition("-last")
        dims = tuple(int(size) for size in sizes.split("x"))
        if len(dims) < 2 or min(dims) < 1 or rest:
            raise ValueError(f"shape: expected sizes such as 32x64x56x56 or 32x56x56x64-last, got {text!r}")
        return cls(dims, -1 if last else 1)

    @property
    def id(self) -> str:
        return "x".join(map(str, self.dims)) + ("-last" if self.axis == -1 else "")

    def __str__(self) -> str:
        return f"{self.dims}" + (" channels-last" if self.axis == -1 else "")


SHAPES = (
    Shape((64, 64, 112, 112)),
    Shape((64, 256, 28, 28)),
    Shape((32, 64, 56, 56)),
    Shape((32, 512, 14, 14)),
    Shape((64, 512, 7, 7)),
    Shape((32, 56, 56, 64), axis=-1),
    Shape((32, 14, 14, 512), axis=-1),
    Shape((1, 64, 56, 56)),
    Shape((64, 64)),
)


@dataclass
class Inputs:
    """What every peer is given for one shape: the very same arrays. No peer may write to them."""

    shape: Shape
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0), repr=False)

    def __post_init__(self) -> None:
        dims, axis = self.shape.dims, self.shape.axis
        self.axis = axis
        self.channels = dims[axis]
        #: All axes but the channel axis.
        self.axes = tuple(i for i in range(len(dims)) if i != axis % len(dims))
        #: Values per channel.
        self.count = int(np.prod([dims[i] for i in self.axes]))
        # every channel has statistics of its own, so that mixed-up channels cannot pass the check
        self.x = self._values(offset=self._channel(-1, 1), spread=self._channel(0.5, 2))
        self.weight = self._channel(0.5, 2)
        self.bias = self._channel(-1, 1)
        self.running_mean = self._channel(-1, 1)
        self.running_var = self._channel(0.5, 2)

    @cached_property
    def grad_out(self) -> Array:
        # not of mean 0: sums of gradients that cancel would leave nothing to compare
        return self._values(offset=self._channel(0.1, 0.3), spread=self._channel(0.5, 2))

    @cached_property
    def batch_mean(self) -> Array:
        return self.x.mean(self.axes, dtype=np.float64).astype(DTYPE)

    @cached_property
    def batch_var(self) -> Array:
        return self.x.var(self.axes, dtype=np.float64).astype(DTYPE)

    def broadcast(self, per_channel: Array) -> Array:
        """A view that lies along the channel axis of x."""
        return np.expand_dims(per_channel, self.axes)

    def _channel(self, low: float, high: float) -> Array:
        return self._rng.uniform(low, high, self.channels).astype(DTYPE)

    def _values(self, offset: Array, spread: Array) -> Array:
        values = self._rng.standard_normal(self.shape.dims, DTYPE)
        values *= self.broadcast(spread)
        values += self.broadcast(offset)
        return values
