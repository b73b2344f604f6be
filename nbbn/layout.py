"""From (shape, strides, axis) to canonical views (outer, channels, inner), without a copy where strides allow.

Statistics and the affine step do not care about the order of the non-channel axes, so they are ordered by
stride: those larger than the channel's collapse into `outer`, the smaller ones into `inner`. C order, Fortran
order, channels-last memory under channels-first shapes and slices along the batch all become plain 3-d views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nbbn.arrays import Array, on_device


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: there is one per shape, strides and axis
class Canonical:
    """An order of the axes, cut in three: the outer axes, the channel axis (None: one channel), the inner axes."""

    outer: tuple[int, ...]
    channel: int | None
    inner: tuple[int, ...]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """All axes, outermost first."""
        return self.outer + (() if self.channel is None else (self.channel,)) + self.inner

    @cached_property
    def inverse(self) -> tuple[int, ...]:
        """Where each axis stands in `order`."""
        return tuple(self.order.index(a) for a in range(len(self.order)))

    def view(self, array: Array) -> Array | None:
        """`array` as (outer, channels, inner), sharing its memory, or None if its strides do not allow that."""
        shape = _view_shape(self, array.shape, array.strides, array.itemsize)
        # reshape cannot copy here: each group of axes collapses
        return None if shape is None else array.transpose(self.order).reshape(shape)

    def copy(self, array: Array) -> Array:
        """`array` as contiguous (outer, channels, inner), in memory of its own."""
        if on_device(array):
            copied: Array = array.contiguous(self.order)  # type: ignore[attr-defined]
            return copied.reshape(self.shape(array.shape))
        return np.array(array.transpose(self.order), order="C", subok=False).reshape(self.shape(array.shape))

    def view_or_copy(self, array: Array) -> Array:
        """A view for reading: of the array itself where possible, of a copy where not."""
        view = self.view(array) if array.flags.aligned else None
        return self.copy(array) if view is None else view

    def broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        """`array`, broadcast to `shape`, as (outer, channels, inner) of any strides; copied only if they demand it."""
        broadcast: Array = array.broadcast_to(shape) if on_device(array) else np.broadcast_to(array, shape)  # type: ignore[attr-defined]
        if all(_collapses(shape, broadcast.strides, group) for group in (self.outer, self.inner)):
            return broadcast.transpose(self.order).reshape(self.shape(shape))
        if on_device(array):
            broadcast = array.repeated(shape)  # type: ignore[attr-defined]
        return self.copy(broadcast)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike, like: Array) -> Array:
        """A new array of this shape, in the memory that `like` is in, laid out so that `view` serves it."""
        if on_device(like):
            ordered = tuple(shape[a] for a in self.order)
            return like.empty(ordered, dtype, self.inverse)  # type: ignore[attr-defined, no-any-return]
        return np.empty([shape[a] for a in self.order], dtype).transpose(self.inverse)

    def write_back(self, computed: Array, array: Array) -> None:
        """Store a canonical result into the array that `view` could not serve."""
        if on_device(array):
            library = array.library  # type: ignore[attr-defined]
            library.assign(library.transpose(array.owner, self.order), computed.owner)  # type: ignore[attr-defined]
            return
        transposed = array.transpose(self.order)
        transposed[...] = computed.reshape(transposed.shape)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(outer, channels, inner) of an array of this shape."""
        channels = 1 if self.channel is None else shape[self.channel]
        return math.prod(shape[a] for a in self.outer), channels, math.prod(shape[a] for a in self.inner)


def canonical(x: Array, axis: int | None) -> Canonical:
    """The order of axes under which `x` needs no copy, if there is one; its own order otherwise."""
    return _canonical(x.shape, x.strides, x.itemsize, axis)


# Pure functions of shape and strides: a program calls them with the same few values again and again.


@lru_cache(1024)
def _canonical(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int | None) -> Canonical:
    def rank(a: int) -> float:
        """Large strides outside; repeated axes (stride 0) outermost; axes of length 1 anywhere."""
        return 0.0 if shape[a] == 1 else abs(strides[a]) or math.inf

    axes = sorted((a for a in range(len(shape)) if a != axis), key=rank, reverse=True)
    if axis is None or shape[axis] == 1:
        # one channel: rows as long as the axes allow, from the inside out
        split = len(axes)
        while split and _collapses(shape, strides, axes[split - 1 :]):
            split -= 1
    else:
        split = sum(rank(a) >= rank(axis) for a in axes)
    by_stride = Canonical(tuple(axes[:split]), axis, tuple(axes[split:]))
    if _view_shape(by_stride, shape, strides, itemsize) is not None:
        return by_stride
    position = 0 if axis is None else axis
    return Canonical(tuple(range(position)), axis, tuple(a for a in range(position, len(shape)) if a != axis))


@lru_cache(1024)
def _view_shape(
    order: Canonical, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, int, int] | None:
    """The canonical shape, or None if the strides do not allow a view that kernels can read."""
    if not (_collapses(shape, strides, order.outer) and _collapses(shape, strides, order.inner)):
        return None
    outer, channels, inner = order.shape(shape)
    # the innermost of the axes that are longer than 1 must have unit stride; single values (inner = 1) need the
    # channels side by side: neither kernel family can read them otherwise
    innermost = [a for a in order.inner if shape[a] != 1][-1:]
    if inner == 1 and channels > 1:
        assert order.channel is not None  # there is more than one channel
        innermost = [order.channel]
    return (outer, channels, inner) if all(strides[a] == itemsize for a in innermost) else None


def _collapses(shape: Sequence[int], strides: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether these axes, in this order, are one axis with one stride."""
    axes = [a for a in axes if shape[a] != 1]
    return all(strides[a] == strides[b] * shape[b] for a, b in pairwise(axes))
