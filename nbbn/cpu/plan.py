"""Which kernel serves a call, and how much it takes at a time: pure functions of shapes, strides and cache sizes.

They are asked at every call and remember their answers: what they ask for is `View`s, and the number of threads.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from nbbn.cpu import caches, threads, tiles

#: Bytes of memory in one run that channels are taken together for: what is read once, and what is read twice.
LONG_RUN, SHORT_RUN = 65536, 4096


class View(NamedTuple):
    """What there is to know of a canonical (outer, channels, inner) array."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    itemsize: int

    @property
    def is_one_piece(self) -> bool:
        """Whether it lies in memory without a gap, in C order."""
        step = self.itemsize
        for length, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if length != 1 and stride != step:
                return False
            step *= length
        return True


def view(array: Any) -> View:
    """Of an array."""
    return View(array.shape, array.strides, array.itemsize)


def views(*arrays: Any) -> tuple[View, ...]:
    """Of those arrays that are there."""
    return tuple(View(a.shape, a.strides, a.itemsize) for a in arrays if a is not None)


def workers(x: Any) -> int:
    """How many threads have something to do."""
    return threads.worth(x.size)


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statistics:
    """How to read once: by columns, in tiles of rows taken as one, or by rows, in groups of channels."""

    by_columns: bool
    fold: int
    tile: int
    group: int


@lru_cache(4096)
def statistics(workers: int, x: View) -> Statistics:
    """For statistics of `x`."""
    return _reading((x,), x, workers)


def _reading(all_views: tuple[View, ...], x: View, workers: int) -> Statistics:
    folded = fold(all_views)
    return Statistics(as_columns(all_views), folded, tile(x, folded), _group(x, LONG_RUN, x.shape[1], workers))


def as_columns(all_views: tuple[View, ...]) -> bool:
    """Whether the columns family serves these views: short rows, many of them, and those of all channels in one run.

    Alternated at 7 x 7, the rows family takes statistics of 2, 4, 8, 16 samples in 0.83, 0.88, 1.04, 1.33 of the time,
    training in 0.68, 0.70, 0.81, 0.95, backward in 0.33, 0.39, 0.54, 0.76; statistics at 4 x 4 in twice the time.
    """
    outer, _, inner = all_views[0].shape
    return _side_by_side(all_views) and (inner < 32 or (outer > 8 and inner < tiles.ROWS_FROM))


def _side_by_side(all_views: tuple[View, ...]) -> bool:
    inner = all_views[0].shape[2]
    return all(v.strides[1] == inner * v.itemsize or v.shape[1] == 1 for v in all_views)


def fold(all_views: tuple[View, ...]) -> int:
    """How many rows to take as one: their memory must be one piece."""
    if not all(v.is_one_piece for v in all_views):
        return 1
    return int(tiles.rows_as_one(*all_views[0].shape))


def tile(x: View, fold: int) -> int:
    """Columns a tile of statistics; rows taken as one are one tile."""
    _, channels, inner = x.shape
    return int(fold * channels * inner if fold > 1 else tiles.tile_columns(channels * inner, inner))


def _group(x: View, run: int, most: int, workers: int) -> int:
    """How many channels to take together, so that about `run` bytes lie side by side."""
    wanted = -(-run // (x.shape[2] * x.itemsize))
    return int(max(1, min(wanted, most, x.shape[1] // (4 * workers))))


# --- the affine step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Affine:
    """By columns, so many rows as one; or by rows."""

    by_columns: bool
    fold: int


@lru_cache(4096)
def affine(*all_views: View) -> Affine:
    """For the affine step, which has fewer sums to lose: by rows it takes 0.34 to 0.54 of the time up to 16 samples."""
    outer, _, inner = all_views[0].shape
    by_columns = _side_by_side(all_views) and (inner < 16 or (outer > 31 and inner < tiles.ROWS_FROM))
    return Affine(by_columns, fold(all_views))


# --- statistics and what is done with them, in one --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fusion:
    """How to read twice, if it is better than two passes over memory: by tiles of columns, or groups of channels."""

    by_columns: bool
    tile: int
    group: int


@lru_cache(4096)
def fusion(workers: int, *all_views: View) -> Fusion | None:
    """For statistics of the first view, then all views channel by channel: the second read finds them in cache."""
    x = all_views[0]
    outer, channels, inner = x.shape
    by_columns = as_columns((x,))
    group = _group(x, SHORT_RUN, caches.sizes()[0] // (2 * outer * inner * x.itemsize), workers)
    one_tile = tile(x, 1)
    if not by_columns:
        # with few channels a task per channel would leave threads without work: there a channel is split between them
        return Fusion(False, one_tile, group) if workers == 1 or channels >= 2 * workers else None
    if not as_columns(all_views) or fold((x,)) > 1 or outer > tiles.CHUNK_ROWS:
        return None
    # all rows of a tile must stay, and there must be tiles to share. Not a matter of threads: what is fused decides
    # tile by tile, what is not for all channels, which of them need float64
    bytes_kept = outer * one_tile * sum(v.itemsize for v in all_views)
    fits = bytes_kept <= caches.sizes()[0] and channels * inner >= 4 * one_tile
    return Fusion(True, one_tile, group) if fits else None


@dataclass(frozen=True, slots=True)
class Backward:
    """How the input gradient comes about: fused, or sums first and then everything again."""

    fusion: Fusion | None
    sums: Statistics


@lru_cache(4096)
def backward(workers: int, gradients: View, x: View, result: View) -> Backward:
    """For the three gradients."""
    return Backward(fusion(workers, x, gradients, result), _reading((x, gradients, result), x, workers))
