"""The exact statistics of an iterable of batches: what `BatchNorm.recalibrate` gathers before it writes anything."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nbbn import checks
from nbbn.arrays import Array
from nbbn.moments import Moments, hosted
from nbbn.statistics import BoolArray, NonFiniteWarning, batch_stats, nonfinite_channels, without


@dataclass(frozen=True, slots=True)
class Population:
    """What was gathered: statistics, the number of batches with values, how many of them each channel was left out of.

    `left_out` is 0 unless channels of batches that are not finite were to be skipped.
    """

    stats: Moments
    batches: int
    left_out: npt.NDArray[np.int64]

    def stored(self, dtype: np.dtype[Any], finite: bool) -> tuple[Array, Array]:
        """Mean and population variance in the precision of the running arrays.

        Raises
        ------
        ValueError
            If a channel has no value.
        FloatingPointError
            With `finite`, if they are not finite or all that a channel had was left out.
        """
        empty = self.stats.count == 0
        if (empty & (self.left_out == 0)).any():
            which = "" if empty.all() else f" in channel {int(np.argmax(empty))}"
            raise ValueError(
                f"batches: expected at least one value per channel, got none{which} in {self.batches} batches"
            )
        with np.errstate(all="ignore"):
            mean, var = self.stats.mean.astype(dtype), self.stats.var().astype(dtype)
        if finite and not (np.isfinite(mean).all() and np.isfinite(var).all()):  # the variance of nothing is NaN
            bad = ~(np.isfinite(mean) & np.isfinite(var))
            raise FloatingPointError(
                f"batches: expected finite statistics, got NaN or infinity in {int(bad.sum())} of {bad.size} channels"
                + (f" in each of {self.batches} batches" if empty.any() else "")
                + "; nothing was changed"
            )
        return mean, var

    def warn(self, stacklevel: int = 3) -> None:
        """Say what was left out, if anything."""
        channels = np.count_nonzero(self.left_out)
        if channels:
            warnings.warn(
                f"{channels} of {self.left_out.size} channels had NaN or infinite statistics in some batch "
                f"(up to {self.left_out.max()} of {self.batches}), which was left out of them",
                NonFiniteWarning,
                stacklevel=stacklevel,
            )


def gather(
    batches: Iterable[Array],
    where: Iterable[BoolArray] | None,
    *,
    channels: int,
    axis: int | None,
    skip_nonfinite: bool,
    progress: bool,
) -> Population:
    """Merge the statistics of all batches into those of one population, one batch in memory at a time."""
    checks.batches("batches", batches, "arrays", "[x]")
    if where is not None:
        checks.batches("where", where, "masks, one for each batch", "[where]")
    if checks.flag("progress", progress):
        batches = _with_progress_bar(batches)
    stats, number, left_out = Moments.zeros(channels), 0, np.zeros(channels, np.int64)
    for i, (x, mask) in enumerate(_pairs(batches, where)):
        batch = _statistics(x, mask, axis, i)
        if batch.count.size != channels:
            raise ValueError(f"batches: expected {channels} channels, got {batch.count.size} in batch {i}")
        number += 1 if batch.count.any() else 0  # an empty batch does not count in training either
        if skip_nonfinite:
            bad = nonfinite_channels(batch, None)
            left_out += bad
            batch = without(batch, bad) if bad.any() else batch
        stats += batch
    return Population(stats, number, left_out)


def _statistics(x: Any, mask: Any, axis: int | None, i: int) -> Moments:
    if isinstance(x, tuple):
        raise TypeError(
            f"batches: expected an array, got a tuple in batch {i}; if the first of it is the input, pass "
            "(batch[0] for batch in batches)"
        )
    return hosted(batch_stats(x, axis=axis, where=mask))


def _pairs(batches: Iterable[Array], where: Iterable[BoolArray] | None) -> Iterator[tuple[Array, BoolArray | None]]:
    if where is None:
        for x in batches:
            yield x, None
        return
    masks, missing, i = iter(where), object(), 0
    for i, x in enumerate(batches, 1):
        mask = next(masks, missing)
        if mask is missing or mask is None:
            raise ValueError(f"where: expected a mask for each batch, got none for batch {i - 1}")
        yield x, cast(BoolArray, mask)
    if next(masks, missing) is not missing:
        raise ValueError(f"where: expected a mask for each batch, got more masks than the {i} batches")


def _with_progress_bar(batches: Iterable[Array]) -> Iterable[Array]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress=True needs rich: pip install rich", name=error.name) from error
    # on stderr, as progress bars are: stdout is for results
    return track(batches, description="recalibrate", console=Console(stderr=True))
