"""Cutting an array on disk into pieces that are contiguous in the file and whole in memory."""

import math
from dataclasses import dataclass
from typing import NamedTuple

#: Bytes that are read at once: they stay in the caches between reading and computing, and the calls between are few.
BLOCK_BYTES = 4 << 20

#: Pieces that one job takes, one after the other.
PIECES_PER_JOB = 16


class Piece(NamedTuple):
    """Values [start, start + size) of the file: `outer` rows of `channels` channels, from `first_channel` on."""

    start: int
    outer: int
    first_channel: int
    channels: int
    inner: int

    @property
    def size(self) -> int:
        """Number of values."""
        return self.outer * self.channels * self.inner


@dataclass(frozen=True, slots=True)
class Cut:
    """How (outer, channels, inner) values in a file are cut into pieces of at most `limit`, in the file's order.

    Whole rows where one fits, else whole channels of a row, else parts of a channel.
    """

    outer: int
    channels: int
    inner: int
    limit: int

    @property
    def _rows(self) -> int:
        return max(1, self.limit // max(1, self.channels * self.inner))

    @property
    def _channels(self) -> int:
        return min(self.channels, max(1, self.limit // max(1, self.inner)))

    @property
    def _inner(self) -> int:
        return min(self.inner, self.limit)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """Number of pieces along each axis."""
        if not self.outer * self.channels * self.inner:
            return 0, 0, 0
        return (
            math.ceil(self.outer / self._rows),
            math.ceil(self.channels / self._channels),
            math.ceil(self.inner / self._inner),
        )

    def __len__(self) -> int:
        return math.prod(self._grid)

    def __getitem__(self, index: int) -> Piece:
        _, across, along = self._grid
        rest, k = divmod(index, along)
        i, j = divmod(rest, across)
        row, channel, position = i * self._rows, j * self._channels, k * self._inner
        return Piece(
            start=(row * self.channels + channel) * self.inner + position,
            outer=min(self._rows, self.outer - row),
            first_channel=channel,
            channels=min(self._channels, self.channels - channel),
            inner=min(self._inner, self.inner - position),
        )
