"""Which kernel serves a call, and how much it takes at a time: pure functions of shapes, strides and cache sizes.

`views` are canonical (outer, channels, inner) arrays; absent ones are None.
"""

from typing import Any

from nbbn.cpu import caches, threads, tiles

#: Bytes of memory in one run that channels are taken together for: what is read once, and what is read twice.
LONG_RUN, SHORT_RUN = 65536, 4096


def as_columns(*views: Any) -> bool:
    """Whether the columns family serves these views: short rows, many of them, and those of all channels in one run.

    Alternated at 7 x 7, the rows family takes statistics of 2, 4, 8, 16 samples in 0.83, 0.88, 1.04, 1.33 of the time,
    training in 0.68, 0.70, 0.81, 0.95, backward in 0.33, 0.39, 0.54, 0.76; statistics at 4 x 4 in twice the time.
    """
    outer, _, inner = views[0].shape
    return _side_by_side(views) and (inner < 32 or (outer > 8 and inner < tiles.ROWS_FROM))


def affine_as_columns(*views: Any) -> bool:
    """The same for the affine step alone, which has fewer sums to lose: 0.34 to 0.54 of the time up to 16 samples."""
    outer, _, inner = views[0].shape
    return _side_by_side(views) and (inner < 16 or (outer > 31 and inner < tiles.ROWS_FROM))


def _side_by_side(views: Any) -> bool:
    inner = views[0].shape[2]
    return all(v is None or v.strides[1] == inner * v.itemsize or v.shape[1] == 1 for v in views)


def parallel(x: Any) -> bool:
    """Whether there is work for a second thread."""
    return threads.worth_it(x.size)


def fused(parallel: bool, *views: Any) -> bool:
    """Whether to take statistics and normalize channel by channel, so that the second read finds it in cache."""
    x = views[0]
    outer, channels, inner = x.shape
    if not as_columns(x):
        # with few channels a task per channel would leave threads without work: there a channel is split between them
        return not parallel or channels >= 2 * threads.get_num_threads()
    if not as_columns(*views) or fold(x) > 1 or outer > tiles.CHUNK_ROWS:
        return False
    # all rows of a tile must stay, and there must be tiles to share. Not a matter of threads: what is fused decides
    # tile by tile, what is not for all channels, which of them need float64
    tile = tiles.tile_columns(channels * inner, inner)
    bytes_kept = outer * tile * sum(v.itemsize for v in views if v is not None)
    return bool(bytes_kept <= caches.sizes()[0] and channels * inner >= 4 * tile)


def group_read_once(x: Any) -> int:
    """How many channels to take together, so that about LONG_RUN bytes lie side by side."""
    return _group(x, LONG_RUN, x.shape[1])


def group_read_twice(x: Any) -> int:
    """The same for SHORT_RUN bytes, as long as they stay in half of the second-level cache until the second read."""
    outer, _, inner = x.shape
    return _group(x, SHORT_RUN, caches.sizes()[0] // (2 * outer * inner * x.itemsize))


def _group(x: Any, run: int, most: int) -> int:
    wanted = -(-run // (x.shape[2] * x.itemsize))
    return int(max(1, min(wanted, most, x.shape[1] // (4 * threads.get_num_threads()))))


def fold(*views: Any) -> int:
    """How many rows to take as one: their memory must be one piece."""
    if not all(v is None or v.flags.c_contiguous for v in views):
        return 1
    return int(tiles.rows_as_one(*views[0].shape))


def tile(x: Any, fold: int) -> int:
    """Columns a tile of statistics; rows taken as one are one tile."""
    _, channels, inner = x.shape
    return int(fold * channels * inner if fold > 1 else tiles.tile_columns(channels * inner, inner))
