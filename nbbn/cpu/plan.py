"""Which kernel serves a call, and how much it takes at a time: pure functions of shapes, strides and cache sizes.

They are asked at every call and remember their answers: what they ask for is `View`s, and the number of threads.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from nbbn.cpu import caches, threads, tiles

#: Bytes of memory in one run that channels are taken together for: what is read once, and what is read twice.
LONG_RUN, SHORT_RUN = 65536, 4096

#: Bytes of a row, at least and enough, and of the rows of a group of channels, for which reading a group twice is
#: better than two passes over memory: short pieces far apart are what memory is slowest at. Alternated, two passes take
#: 0.9 to 1.5 of the time at 28 x 28; at 10 x 10 and below 0.6 to 1.0. At 14 x 14, training and backward: groups of 4 kB
#: 0.9, 1.2 (13 MB) and 1.1, 1.3 (51 MB), of 0.8 to 1.5 kB 0.6, 0.85 (8 MB) and 0.8, 1.2 (51 MB).
ROW, LONG_ROW, PIECE = 512, 1024, 3072


class Switch(NamedTuple):
    """Values a row from which the rows family serves, with at most `few` samples, and with more."""

    few: int
    from_few: int
    from_many: int


# Alternated at 5 x 5, 6 x 6, 7 x 7, 8 x 8, rows take of the time of columns, with 16 samples and with 64 to 1024:
STATISTICS = Switch(16, 24, 48)  # 0.70 0.58 0.57 0.41; 1.1 to 2.2, 0.9 to 1.4, 0.9 to 1.1, 0.6 to 1.0
GRADIENTS = Switch(16, 32, 56)  # sums: 1.3 0.84 0.84 0.57; 1.4 to 2.2, 1.1 to 1.4, 0.9 to 1.5, 0.7 to 1.1
AFFINE = Switch(31, 16, 36)  # 0.34 to 0.54 of the time; 1.2 to 2.5, 0.8 to 1.0, 0.5 to 0.8, 0.4 to 0.7
GRADIENT = Switch(31, 32, 36)  # fused by columns 0.8, 1.0; 0.8 to 1.0, 1.1 to 1.5, 1.1 to 1.4


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
    return _reading((x,), x, workers, STATISTICS)


def _reading(all_views: tuple[View, ...], x: View, workers: int, switch: Switch) -> Statistics:
    folded = fold(all_views)
    columns = as_columns(all_views, switch)
    return Statistics(columns, folded, tile(x, folded), _group(x, LONG_RUN, x.shape[1], workers))


def as_columns(all_views: tuple[View, ...], switch: Switch) -> bool:
    """Whether the columns family serves these views: short rows, those of all channels of a sample in one run."""
    outer, _, inner = all_views[0].shape
    side_by_side = all(v.strides[1] == inner * v.itemsize or v.shape[1] == 1 for v in all_views)
    return side_by_side and inner < (switch.from_few if outer <= switch.few else switch.from_many)


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
    """For the affine step."""
    return Affine(as_columns(all_views, AFFINE), fold(all_views))


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
    if as_columns(all_views[:1], STATISTICS):
        return _by_tile(all_views, STATISTICS, AFFINE)
    return _by_channel(workers, all_views, reasons_needed=2)


def _by_channel(workers: int, all_views: tuple[View, ...], reasons_needed: int) -> Fusion | None:
    """If the rows are long, or of these many of two reasons: pieces are long, and the second pass comes from memory."""
    x = all_views[0]
    outer, channels, inner = x.shape
    row = inner * x.itemsize
    # with few channels a task per channel would leave threads without work: there a channel is split between them
    if row < ROW or (workers > 1 and channels < 2 * workers):
        return None
    group = _group(x, SHORT_RUN, caches.sizes()[0] // (2 * outer * row), workers)
    reasons = (group * row >= PIECE) + _far_beyond_caches(all_views)
    return Fusion(False, 0, group) if row >= LONG_ROW or reasons >= reasons_needed else None


def _by_tile(all_views: tuple[View, ...], reading: Switch, writing: Switch) -> Fusion | None:
    x = all_views[0]
    outer, channels, inner = x.shape
    one_tile = tile(x, 1)
    if not (as_columns(all_views, reading) and as_columns(all_views, writing)):
        return None
    if fold((x,)) > 1 or outer > tiles.CHUNK_ROWS:
        return None
    # all rows of a tile must stay, and there must be tiles to share. Not a matter of threads: what is fused decides
    # tile by tile, what is not for all channels, which of them need float64
    bytes_kept = outer * one_tile * sum(v.itemsize for v in all_views)
    fits = bytes_kept <= caches.sizes()[0] and channels * inner >= 4 * one_tile
    return Fusion(True, one_tile, 0) if fits else None


def _far_beyond_caches(all_views: tuple[View, ...]) -> bool:
    """Whether nothing of the arrays is in a cache when it is read again."""
    return sum(prod(v.shape) * v.itemsize for v in all_views) > 2 * caches.sizes()[1]


@dataclass(frozen=True, slots=True)
class Backward:
    """How the input gradient comes about: fused, or sums first and then everything again."""

    fusion: Fusion | None
    sums: Statistics
    write: Affine


@lru_cache(4096)
def backward(workers: int, gradients: View, x: View, result: View) -> Backward:
    """For the three gradients."""
    all_views = x, gradients, result
    if as_columns((x,), GRADIENTS):
        fused = _by_tile(all_views, GRADIENTS, GRADIENT)
    else:
        fused = _by_channel(workers, all_views, reasons_needed=1)
    write = Affine(as_columns(all_views, GRADIENT), fold(all_views))
    return Backward(fused, _reading(all_views, x, workers, GRADIENTS), write)
