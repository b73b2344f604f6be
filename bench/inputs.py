"""What every peer is given for one case: the very same arrays."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from cases import Case

Array = npt.NDArray[Any]

EPS = 1e-5
MOMENTUM = 0.1


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; NumPy has bfloat16 from `ml_dtypes`, where that is installed."""
    if name == "bfloat16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(name)


@dataclass
class Inputs:
    """Arrays for one case. No peer may write to them. Parameters and running statistics are float32 always."""

    case: Case
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0), repr=False)

    def __post_init__(self) -> None:
        dims, axis = self.case.dims, self.case.axis
        self.axis = axis
        self.dtype = numpy_dtype(self.case.dtype)
        #: Integers are normalized to float32.
        self.result_dtype = np.dtype(np.float32) if self.dtype.kind == "u" else self.dtype
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
        if self.dtype.kind == "u":  # 0 to 255, as of a picture
            self.x = self._pixels()
            self.running_mean, self.running_var = 128 + 32 * self.running_mean, 1024 * self.running_var

    @cached_property
    def grad_out(self) -> Array:
        # not of mean 0: sums of gradients that cancel would leave nothing to compare
        return self._values(offset=self._channel(0.1, 0.3), spread=self._channel(0.5, 2))

    @cached_property
    def batch_mean(self) -> Array:
        return self.x.mean(self.axes, dtype=np.float64).astype(np.float32)

    @cached_property
    def batch_var(self) -> Array:
        return self.x.var(self.axes, dtype=np.float64).astype(np.float32)

    def empty_result(self) -> Array:
        return np.empty(self.case.dims, self.result_dtype)

    def broadcast(self, per_channel: Array) -> Array:
        """A view that lies along the channel axis of x."""
        return np.expand_dims(per_channel, self.axes)

    def _channel(self, low: float, high: float) -> Array:
        return self._rng.uniform(low, high, self.channels).astype(np.float32)

    def _values(self, offset: Array, spread: Array) -> Array:
        values = self._rng.standard_normal(self.case.dims, np.float32)
        values *= self.broadcast(spread)
        values += self.broadcast(offset)
        return values if self.dtype.kind == "u" else values.astype(self.dtype, copy=False)

    def _pixels(self) -> Array:
        self.x *= 32
        self.x += 128
        return np.clip(self.x, 0, 255, out=self.x).astype(np.uint8)
