"""How a kernel is launched: frozen plans, from a pure function of shape, storage, alignment and device.

What is read twice should be in the second-level cache the second time, so its size decides whether one block may take
a whole channel, statistics and normalization in one launch.

Nothing here has been measured on a device yet: the constants are reckoned from what is known of sm_80 and sm_90, and
say so. Plans do not depend on values, so the order of every sum is fixed and results have the same bits every run.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Self

from nbbn.cuda.storage import WIDEST

#: Threads a block of the rows family. Reckoned: 70 to 96 registers a thread let 2 or 3 such blocks run on a
#: multiprocessor of sm_80 to sm_90, which with 4 loads of 16 bytes in flight each is 32 to 48 kB, about
#: twice what latency times bandwidth asks for (3.3 TB/s * 0.7 us / 132 multiprocessors = 17 kB).
ROW_THREADS = 256

#: Most threads a block of the columns family: few blocks, so that few parts are left to add up.
COLUMN_THREADS = 512

#: Most columns a thread: shared memory has room for no wider tiles (`nbbn.cuda.tiles.columns_of_tile`).
COLUMN_LANES = 8

#: Bytes of a row from which the rows family serves it: a warp's load of 512 bytes is whole then.
LONG_ROW = 512

#: Blocks a multiprocessor has to choose from.
WAVES = 4

#: Vectors a thread takes at least before a channel is split between blocks: the unrolled loop runs twice.
LEAST_VECTORS = 8

#: Most blocks that share a channel: what the last one adds up.
MOST_PARTS = 512


#: Most threads a block that has a channel for itself, where channels are few: more loads in flight.
ALONE_THREADS = 512

#: Share of the multiprocessors' time that is used, at least, where each block takes a whole channel. Reckoned: what
#: idles then is less than the third reading that two launches cost an array larger than the cache.
LEAST_USE = 0.9

#: Share of the cache that the channels in work may take. Reckoned: between the two readings of a value its block reads
#: the whole channel and writes half of the result on average, so 2/3 would be all.
CACHE_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Device:
    """What plans need to know of a device."""

    multiprocessors: int
    l2_bytes: int

    @classmethod
    def of(cls, device: object) -> Self:
        """From a device object of numba.cuda."""
        return cls(int(device.MULTIPROCESSOR_COUNT), int(device.L2_CACHE_SIZE))  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Rows:
    """A channel is a set of long rows; `parts` blocks share it."""

    lanes: int
    parts: int
    threads: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Columns:
    """Channels lie side by side: a block takes a tile of whole channels, and `splits` blocks share the rows.

    `across` threads read one row of the tile, the others further rows; what is left over to whole warps idles.
    """

    lanes: int
    channels: int  # whole channels in a tile
    across: int
    deep: int
    tiles: int
    splits: int
    threads: int
    blocks: int


Plan = Rows | Columns


@dataclass(frozen=True, slots=True)
class Layout:
    """A canonical view: sizes, strides in values (inner is contiguous), and how it is aligned.

    `alignment` is the largest power of two, in values, that divides the address and the strides of every array
    of a launch, and at most 16 bytes of the widest of them.
    """

    outer: int
    channels: int
    inner: int
    itemsize: int
    row_alignment: int  # of rows of whole channels: address and outer stride
    channel_alignment: int  # of one channel's rows: address, outer and channel stride
    packed: bool  # whether a row's channels follow each other without a gap
    arrays: int = 1  # views that are read


def alignment(itemsize: int, most_lanes: int, places: tuple[int, ...]) -> int:
    """Values that loads may take at once, given addresses and strides in bytes."""
    step = gcd(WIDEST, *places)
    return max(1, min(most_lanes, step // itemsize))


@lru_cache(4096)
def plan(layout: Layout, device: Device, reduces: bool) -> Plan:
    """The launch for a view; `reduces`: statistics, else every value stands alone."""
    columns = _columns(layout, device, reduces)
    return _rows(layout, device, reduces) if columns is None else columns


def in_one_launch(layout: Layout, statistics: Plan, device: Device) -> bool:
    """Whether sums and what follows from them are one launch: a block has a channel for itself, in the cache."""
    return isinstance(statistics, Rows) and statistics.parts == 1 and _stays_in_cache(layout, device)


def _stays_in_cache(layout: Layout, device: Device) -> bool:
    """Whether the channels that are worked on at one time fit, a block on each multiprocessor."""
    at_one_time = min(layout.channels, device.multiprocessors) * layout.arrays
    return at_one_time * layout.outer * layout.inner * layout.itemsize <= CACHE_SHARE * device.l2_bytes


def _fills_with_channels(layout: Layout, device: Device) -> bool:
    """Whether whole channels leave no multiprocessor idle for long."""
    turns = _ceil(layout.channels, device.multiprocessors)
    return layout.channels >= LEAST_USE * turns * device.multiprocessors


def _rows(layout: Layout, device: Device, reduces: bool) -> Rows:
    lanes = _power_of_two(gcd(layout.channel_alignment, layout.inner))
    vectors = layout.outer * layout.inner // lanes
    wanted = _ceil(WAVES * device.multiprocessors, layout.channels)
    parts = max(1, min(wanted, vectors // (LEAST_VECTORS * ROW_THREADS)))
    most = ROW_THREADS
    if reduces:
        parts = min(parts, MOST_PARTS)
        # the same order of sums whether or not normalization follows in the same launch
        if _fills_with_channels(layout, device) and _stays_in_cache(layout, device):
            parts = 1
        if parts == 1 and layout.channels < 2 * device.multiprocessors:
            most = ALONE_THREADS
    else:  # at most 64 vectors a thread: many short blocks level out what multiprocessors are given
        parts = max(parts, vectors // (64 * ROW_THREADS))
    threads = min(most, _ceil(_ceil(vectors, parts), 32) * 32)
    return Rows(lanes, parts, threads, layout.channels * parts)


def _columns(layout: Layout, device: Device, reduces: bool) -> Columns | None:
    if layout.inner * layout.itemsize >= LONG_ROW or not (layout.packed or layout.inner == 1):
        return None
    lanes = min(COLUMN_LANES, _power_of_two(gcd(layout.row_alignment, layout.channels * layout.inner)))
    group = lanes // gcd(lanes, layout.inner)  # channels that fill whole vectors
    widest = COLUMN_THREADS // 2 * lanes
    if group * layout.inner > widest:
        return None
    channels = min(widest // (group * layout.inner), _ceil(layout.channels, group)) * group
    tiles = _ceil(layout.channels, channels)
    if tiles > 1:  # tiles of about the same size
        channels = _ceil(_ceil(layout.channels, tiles), group) * group
        tiles = _ceil(layout.channels, channels)
    across = channels * layout.inner // lanes
    deep = max(1, min(COLUMN_THREADS // across, layout.outer))
    threads = _ceil(across * deep, 32) * 32
    wanted = max(1, (1 if reduces else WAVES) * device.multiprocessors // tiles)
    splits = max(1, min(wanted, layout.outer // (deep * LEAST_VECTORS)))
    return Columns(lanes, channels, across, deep, tiles, splits, threads, tiles * splits)


def _power_of_two(number: int) -> int:
    """The largest power of two that divides `number`."""
    return number & -number


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
