"""From (shape, strides, axis) to canonical views (outer, channels, inner), without a copy where strides allow.

Statistics and the affine step do not care about the order of the non-channel axes, so they are ordered by
stride: those larger than the channel's collapse into `outer`, the smaller ones into `inner`. C order, Fortran
order, channels-last memory under channels-first shapes and slices along the batch all become plain 3-d views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Canonical:
    """An order of the axes, cut in three: the outer axes, the channel axis (None: one channel), the inner axes."""

    outer: tuple[int, ...]
    channel: int | None
    inner: tuple[int, ...]

    def view(self, array: Array) -> Array | None:
        """`array` as (outer, channels, inner), sharing its memory, or None if its strides do not allow that."""
        transposed, shape = self._transposed(array)
        if not (_collapses(array, self.outer) and _collapses(array, self.inner)):
            return None
        view = transposed.reshape(shape)  # cannot copy: each group collapses
        _, channels, inner = shape
        if inner > 1:
            return view if view.strides[2] == view.itemsize else None
        # single values: neither family can read them unless the channels lie side by side
        return view if channels == 1 or view.strides[1] == view.itemsize else None

    def copy(self, array: Array) -> Array:
        """`array` as contiguous (outer, channels, inner), in memory of its own."""
        transposed, shape = self._transposed(array)
        return np.array(transposed, order="C", copy=True, subok=False).reshape(shape)

    def view_or_copy(self, array: Array) -> Array:
        """A view for reading: of the array itself where possible, of a copy where not."""
        view = self.view(array) if array.flags.aligned else None
        return self.copy(array) if view is None else view

    def broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        """`array`, broadcast to `shape`, as (outer, channels, inner) of any strides; copied only if they demand it."""
        broadcast = np.broadcast_to(array, shape)
        if _collapses(broadcast, self.outer) and _collapses(broadcast, self.inner):
            transposed, flat = self._transposed(broadcast)
            return transposed.reshape(flat)
        return self.copy(broadcast)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array of this shape, laid out in memory so that `view` serves it."""
        order = self._order()
        return np.empty([shape[a] for a in order], dtype).transpose(np.argsort(order))

    def write_back(self, computed: Array, array: Array) -> None:
        """Store a canonical result into the array that `view` could not serve."""
        transposed, _ = self._transposed(array)
        transposed[...] = computed.reshape(transposed.shape)

    def _transposed(self, array: Array) -> tuple[Array, tuple[int, int, int]]:
        transposed = array.transpose(self._order())
        channels = 1 if self.channel is None else array.shape[self.channel]
        return transposed, (_product(array, self.outer), channels, _product(array, self.inner))

    def _order(self) -> tuple[int, ...]:
        return self.outer + (() if self.channel is None else (self.channel,)) + self.inner


def canonical(x: Array, axis: int | None) -> Canonical:
    """The order of axes under which `x` needs no copy, if there is one; its own order otherwise."""
    axes = sorted((a for a in range(x.ndim) if a != axis), key=lambda a: _rank(x, a), reverse=True)
    if axis is None or x.shape[axis] == 1:
        split = _longest_row(x, axes)
    else:
        channel_rank = _rank(x, axis)
        split = sum(_rank(x, a) >= channel_rank for a in axes)
    by_stride = Canonical(tuple(axes[:split]), axis, tuple(axes[split:]))
    if by_stride.view(x) is not None:
        return by_stride
    position = 0 if axis is None else axis
    return Canonical(tuple(range(position)), axis, tuple(a for a in range(position, x.ndim) if a != axis))


def _rank(x: Array, axis: int) -> float:
    """Sort key: large strides outside; repeated axes (stride 0) outermost; axes of length 1 anywhere."""
    if x.shape[axis] == 1:
        return 0.0
    return abs(x.strides[axis]) or float("inf")


def _longest_row(x: Array, axes: Sequence[int]) -> int:
    """Where to cut the axes when there is one channel: the most that collapse, from the inside out."""
    split = len(axes)
    while split and _collapses(x, axes[split - 1 :]):
        split -= 1
    return split


def _collapses(x: Array, axes: Sequence[int]) -> bool:
    """Whether these axes, in this order, are one axis with one stride."""
    axes = [a for a in axes if x.shape[a] != 1]
    return all(x.strides[a] == x.strides[b] * x.shape[b] for a, b in pairwise(axes))


def _product(x: Array, axes: Sequence[int]) -> int:
    result = 1
    for a in axes:
        result *= x.shape[a]
    return result
