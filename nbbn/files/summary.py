"""Statistics of files: moments and range per channel, merged piece by piece and file by file."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

import nbbn
from nbbn.arrays import Array
from nbbn.files import images
from nbbn.files.arrays import ArrayFile, UnreadableError, pieces, problems_named
from nbbn.files.blocks import PIECES_PER_JOB, Cut
from nbbn.moments import Moments

#: Values side by side in which minima are taken before channels are told apart.
_WIDE = 4096

#: Values of a channel side by side from which on that is not worth while.
_LONG = 256


@dataclass(frozen=True, slots=True)
class Summary:
    """Moments, smallest and largest value per channel (inf and -inf where there is none, or nobody asked)."""

    moments: Moments
    least: Array
    most: Array

    @classmethod
    def empty(cls, channels: int) -> "Summary":
        """Of nothing."""
        return cls(Moments.zeros(channels), np.full(channels, np.inf), np.full(channels, -np.inf))

    @classmethod
    def of(cls, x: Array, with_range: bool) -> "Summary":
        """Of values (outer, channels, inner), at least one."""
        moments = nbbn.batch_stats(x)
        if with_range:
            return cls(moments, *extremes(x))
        return cls(moments, np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf))

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(
            self.moments + other.moments, np.minimum(self.least, other.least), np.maximum(self.most, other.most)
        )

    def placed(self, first: int, channels: int) -> "Summary":
        """The same as channels `first`, `first` + 1, ... of `channels`."""
        if len(self.least) == channels:
            return self
        whole = Summary.empty(channels)
        part = slice(first, first + len(self.least))
        count, mean, m2 = np.zeros(channels, np.int64), np.zeros(channels), np.zeros(channels)
        count[part], mean[part], m2[part] = self.moments.count, self.moments.mean, self.moments.m2
        whole.least[part], whole.most[part] = self.least, self.most
        return Summary(Moments(count, mean, m2), whole.least, whole.most)


def extremes(x: Array) -> tuple[Array, Array]:
    """Smallest and largest value per channel of (outer, channels, inner), in float64; NaN if there is one."""
    least, most = (_extreme(ufunc, x).astype(np.float64) for ufunc in (np.minimum, np.maximum))
    return least, most


def _extreme(ufunc: np.ufunc, x: Array) -> Array:
    """NumPy compares long rows with vector instructions and short ones value by value: those are taken together."""
    outer, channels, inner = x.shape
    together = min(outer, _WIDE // (channels * inner))
    if together < 2 or inner >= _LONG:
        return np.asarray(ufunc.reduce(ufunc.reduce(x, axis=2), axis=0))
    whole = outer - outer % together
    wide = ufunc.reduce(x[:whole].reshape(-1, together * channels * inner), axis=0)
    result = ufunc.reduce(ufunc.reduce(wide.reshape(together, channels, inner), axis=2), axis=0)
    return result if whole == outer else np.asarray(ufunc(result, _extreme(ufunc, x[whole:])))


# --- jobs: what threads take from a queue ---------------------------------------------------------------------------


class Job(NamedTuple):
    """Part of the work on one source; `size` is how much, in bytes."""

    source: str
    size: int
    run: Callable[[], Summary]


def of_array(file: ArrayFile, axis: int | None, with_range: bool) -> Iterator[Job]:
    """The jobs whose summaries, added up in order, are the statistics of an array on disk."""
    cut = file.cut(axis)
    step = PIECES_PER_JOB if file.seekable else max(1, len(cut))
    for first in range(0, max(1, len(cut)), step):
        chosen = range(first, min(first + step, len(cut)))
        end = cut[chosen.stop].start if chosen.stop < len(cut) else math.prod(file.shape)
        size = (end - cut[first].start) * file.dtype.itemsize if chosen else 0
        yield Job(file.name, size, partial(_of_pieces, file, cut, chosen, with_range))


def of_image(path: Path, with_range: bool) -> Job:
    """The one job of an image."""
    with problems_named():
        return Job(str(path), path.stat().st_size, partial(_of_image, path, with_range))


def _of_pieces(file: ArrayFile, cut: Cut, chosen: range, with_range: bool) -> Summary:
    total = Summary.empty(cut.channels)
    for piece, x in pieces(file, cut, chosen):
        total += Summary.of(x, with_range).placed(piece.first_channel, cut.channels)
    return total


def _of_image(path: Path, with_range: bool) -> Summary:
    values = images.pixels(path)
    return Summary.of(values.reshape(-1, values.shape[2], 1), with_range)


# --- all sources ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Total:
    """What all sources that could be read are together, their names, and what is wrong with the others."""

    summary: Summary | None = None
    read: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, source: str, summary: Summary | UnreadableError) -> None:
        """One source more, as a whole or not at all."""
        if isinstance(summary, UnreadableError):
            self.failed[source] = str(summary)
        elif self.summary is not None and len(self.summary.least) != len(summary.least):
            self.failed[source] = (
                f"expected {len(self.summary.least)} channels, as in {self.read[0]}, got {len(summary.least)}"
            )
        else:
            self.summary = summary if self.summary is None else self.summary + summary
            self.read.append(source)


def total_of(jobs: Iterable[Job], advance: Callable[[int], object] = lambda size: None) -> Total:
    """Add up the jobs of all sources; the jobs of a source stand together. Calls ``advance(size)`` after each."""
    total = Total()
    with closing(_results(jobs)) as all_results:
        for source, results in groupby(all_results, key=lambda result: result[0].source):
            summary: Summary | UnreadableError | None = None
            for job, result in results:
                if summary is None or isinstance(result, UnreadableError):
                    summary = result
                elif isinstance(summary, Summary):
                    summary += result
                advance(job.size)
            assert summary is not None  # a group has at least one element
            total.add(source, summary)
    return total


def _results(jobs: Iterable[Job]) -> Generator[tuple[Job, Summary | UnreadableError]]:
    """Results in the order of the jobs, worked on by as many threads as nbbn may use; each kernel uses one.

    Reading, decoding and kernels leave Python's lock alone, so that one thread reads while another computes.
    """
    workers = nbbn.get_num_threads()
    nbbn.set_num_threads(1)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[tuple[Job, Future[Summary | UnreadableError]]] = deque()
        for job in jobs:
            waiting.append((job, pool.submit(copy_context().run, _attempt, job)))
            if len(waiting) >= 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        nbbn.set_num_threads(workers)


def _attempt(job: Job) -> Summary | UnreadableError:
    try:
        return job.run()
    except UnreadableError as error:
        return error
