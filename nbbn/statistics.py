"""Statistics of a batch, and what they do to running statistics."""

import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nbbn import backends, checks, placement, quick
from nbbn.arrays import Array, any_array, assign, empty, in_host_memory, on_device
from nbbn.averaging import weights_of_steps
from nbbn.backends import RunningUpdate
from nbbn.checks import NonFinite
from nbbn.moments import Moments, hosted, placed, views

BoolArray = npt.NDArray[np.bool_]


class NonFiniteWarning(RuntimeWarning):
    """A batch had NaN or infinite statistics and `nonfinite="skip"` kept them out of the running arrays."""


def batch_stats(x: Array, *, axis: int | None = 1, where: BoolArray | None = None) -> Moments:
    r"""Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : array of shape (..., C, ...)
        float32, float64, float16, bfloat16 (`ml_dtypes`), any integer dtype or bool; at least 2 dimensions (1 with
        ``axis=None``), any strides. Units: any.
    axis : int or None
        The channel axis; statistics are taken over all others. None: the whole array is one channel.
    where : bool array, optional
        Broadcasts to `x`; False elements (padding) are left out.

    Returns
    -------
    Moments
        Of C channels, float64. `Moments.var` gives variances. Empty channels have count 0.

    Raises
    ------
    TypeError
        If `x` is not a NumPy array of a supported dtype, or `where` is not boolean.
    ValueError
        If `x` has no channel axis, `axis` is out of range, or `where` does not broadcast to `x`.

    Notes
    -----
    .. math:: \bar x_c = \frac1n \sum_i x_{ci}, \qquad M_{2,c} = \sum_i (x_{ci} - \bar x_c)^2

    in one pass: sums of deviations from an origin near the mean, chunk by chunk, merged by Chan, Golub & LeVeque
    (1979). For float32 data the variance has a relative error below 2e-6 for :math:`|\bar x| / \sigma` up to 1e6;
    sums of integers of up to 16 bits are exact. The result does not depend on the number of threads.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> m = nbbn.batch_stats(x)
    >>> m.mean, m.var()
    (array([ 2., 10.]), array([1., 0.]))
    >>> nbbn.batch_stats(x, where=np.array([[True], [False]])).mean
    array([ 1., 10.])
    """
    if where is None:
        stats = quick.moments(x, axis)
        if stats is None and backends.warm is not None:
            stats = backends.warm.moments(x, axis)
        if stats is not None:
            return stats
    x = checks.data("x", x)
    channel = checks.channel_axis(x, axis)
    mask = checks.mask(where, x)
    return placement.moments(x, channel, mask)


def ema_update(
    running_mean: Array,
    running_var: Array,
    stats: Moments,
    momentum: float = checks.DEFAULT_MOMENTUM,
    *,
    decay: float | None = None,
    ddof: int = 1,
    nonfinite: NonFinite = "propagate",
    step: int | npt.NDArray[np.integer] | None = None,
) -> None:
    r"""Move running statistics towards those of a batch, in place.

    Parameters
    ----------
    running_mean, running_var : arrays of shape (C,)
        float32 or float64, contiguous, writable. Changed in place.
    stats : Moments
        Statistics of the batch. Channels without values (count 0) leave the running arrays alone.
    momentum : float
        Weight of the NEW batch, in [0, 1] (PyTorch's convention). 0 changes nothing, 1 replaces.
    decay : float, optional
        Weight of the OLD value, ``1 - momentum`` (what Keras, Flax and ONNX call momentum). Instead of `momentum`.
    ddof : {0, 1}
        Which batch variance goes in: 1 the sample variance (PyTorch), 0 the population variance (Keras, Flax, ONNX).
    nonfinite : {"propagate", "skip", "raise"}
        What a channel whose batch mean or variance is NaN or infinite (in the precision of the running array)
        does: "propagate" stores it, "skip" keeps that channel's old values and warns, "raise" raises.
    step : int or integer array of shape (C,), optional
        The number of this update, counted from 1: corrects the average for its start (see Notes). An array where
        channels have had different numbers of updates: with ``nonfinite="skip"`` a skipped channel has had one
        fewer, so begin with ones and count ``steps += np.isfinite(stats.m2)`` after each call.

    Raises
    ------
    TypeError
        If `stats` is not a `Moments`, a running array has another dtype, or `step` holds no integers.
    ValueError
        If both `momentum` and `decay` are given or out of range, a running array has not C values, is read-only,
        not contiguous or overlaps the other one, a batch has values but no more than `ddof` of them, or a `step`
        is less than 1.
    FloatingPointError
        With ``nonfinite="raise"``; nothing has changed then.

    Warns
    -----
    NonFiniteWarning
        With ``nonfinite="skip"``, after everything is written; says how many channels were skipped.

    Notes
    -----
    .. math:: \mathrm{running} \leftarrow \mathrm{running} + \mathrm{momentum} \cdot (\mathrm{batch} - \mathrm{running})

    computed in float64 (Ioffe & Szegedy 2015, section 3.1). After t batches the start (0 and 1, usually) still weighs
    :math:`(1 - \mathrm{momentum})^t`: a third after 10 batches with momentum 0.1. With ``step=t`` the momentum is

    .. math:: m_t = \frac{\mathrm{momentum}}{1 - (1 - \mathrm{momentum})^t}

    instead, which makes the running arrays the average with the start taken out,
    :math:`(\mathrm{running}_t - (1 - \mathrm{momentum})^t \, \mathrm{start}) / (1 - (1 - \mathrm{momentum})^t)`: Adam's
    correction (Kingma & Ba 2015, algorithm 1) held directly. Step 1 replaces them, whatever they held (so never begin
    at 1 with statistics you want to keep: go on counting where they stopped); after many steps it is the plain average.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> mean, var = np.array([5.0]), np.array([1.0])
    >>> nbbn.ema_update(mean, var, nbbn.batch_stats(np.array([[6.0], [8.0]])), decay=0.9)
    >>> mean.round(6), var.round(6)
    (array([5.2]), array([1.1]))

    With the correction two batches count nearly the same (10/19 for the later one), and the start not at all:

    >>> mean, var = np.zeros(1), np.ones(1)
    >>> for t, x in enumerate([np.array([[6.0], [8.0]]), np.array([[7.0], [9.0]])], start=1):
    ...     nbbn.ema_update(mean, var, nbbn.batch_stats(x), step=t)
    >>> mean.round(4), var.round(4)
    (array([7.5263]), array([2.]))
    """
    if not isinstance(stats, Moments):
        raise TypeError(f"stats: expected Moments, got {type(stats).__name__}")
    channels = stats.count.shape[0]
    checks.same_place(checks.running("running_mean", running_mean, channels), stats=any_array("stats", stats.count))
    running = checks.running_pair(running_mean, running_var, channels)
    assert running is not None  # running_mean is an array: checked just before
    rate = checks.momentum(momentum, decay)
    ddof = checks.delta_degrees_of_freedom(ddof)
    policy = checks.nonfinite(nonfinite)
    checks.same_place(running[0], running_var=running[1])
    if policy != "propagate" or not on_device(running[0]):  # "propagate" reads nothing back from a device
        checks.enough_values(in_host_memory(stats.count), ddof)
    weight: float | Array = rate
    if step is not None:
        weight = weights_of_steps(rate, True, checks.steps(step, stats.count.shape[0]))
    if policy == "raise":
        refuse_nonfinite("stats", stats, RunningUpdate(*running, rate, ddof, False))
    warn_skipped(move(running, stats, weight, ddof, policy == "skip"), stats)


def move(running: tuple[Array, Array], stats: Moments, momentum: float | Array, ddof: int, skip: bool) -> int:
    """`ema_update` of checked arguments, with a momentum for all channels or one for each; how many were skipped."""
    update = RunningUpdate(*running, momentum if isinstance(momentum, float) else 1.0, ddof, skip)
    if isinstance(momentum, float):
        return move_running(stats, update)
    count, mean, m2 = views(stats)
    values = in_host_memory(stats.count)
    skipped = 0
    for weight in np.unique(momentum):  # channels without values are left alone: all but those of this weight
        part = empty(count.shape, count.dtype, count)
        assign(part, np.where(momentum == weight, values, 0))
        skipped += backends.serving(count).ema(part, mean, m2, replace(update, momentum=float(weight)))
    return skipped


def move_running(stats: Moments, update: RunningUpdate) -> int:
    """Moving averages of every channel with values; returns the number of channels skipped."""
    count, mean, m2 = views(stats)
    return backends.serving(count).ema(count, mean, m2, update)


# --- the policy for batches that are not finite ---


def refuse_nonfinite(name: str, stats: Moments, update: RunningUpdate | None) -> None:
    """`nonfinite="raise"`: look at the statistics, in the precision they would be stored in, before writing."""
    stats = hosted(stats)
    bad = np.flatnonzero(nonfinite_channels(stats, update))
    if bad.size:
        c = int(bad[0])
        mean, var = _as_stored(stats, update)
        raise FloatingPointError(
            f"{name}: expected finite batch statistics (nonfinite='raise'), got mean {mean[c]} and variance {var[c]} "
            f"in channel {c} ({bad.size} of {stats.count.size} channels are not finite); nothing was changed"
        )


def nonfinite_channels(stats: Moments, update: RunningUpdate | None) -> BoolArray:
    """Which channels have values but no finite statistics, in the precision they would be stored in."""
    stats = hosted(stats)
    mean, var = _as_stored(stats, update)
    bad: BoolArray = ~(np.isfinite(mean) & np.isfinite(var)) & (stats.count > 0)
    return bad


def _as_stored(stats: Moments, update: RunningUpdate | None) -> tuple[Array, Array]:
    if update is None:
        return stats.mean, stats.var()
    with np.errstate(all="ignore"):
        return stats.mean.astype(update.running_mean.dtype), stats.var(update.ddof).astype(update.running_var.dtype)


def without(stats: Moments, channels: BoolArray) -> Moments:
    """The same statistics with nothing in some channels, in the same memory."""
    here = hosted(stats)
    rest = Moments(*(np.where(channels, 0, field) for field in (here.count, here.mean, here.m2)))
    return placed(rest, views(stats)[0])


def warn_skipped(skipped: int, stats: Moments, stacklevel: int = 3) -> None:
    """`nonfinite="skip"`: say how many channels were kept."""
    if skipped:
        warnings.warn(
            f"{skipped} of {stats.count.shape[0]} channels had NaN or infinite batch statistics; "
            "their running statistics do not take it in",
            NonFiniteWarning,
            stacklevel=stacklevel,
        )
