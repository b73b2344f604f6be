"""Statistics of a batch, and what they do to running statistics."""

import warnings

import numpy as np
import numpy.typing as npt

from nbbn import backends, checks, placement, quick
from nbbn.arrays import Array, any_array, in_host_memory, on_device
from nbbn.backends import RunningUpdate
from nbbn.checks import NonFinite
from nbbn.moments import Moments, views

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

    Raises
    ------
    TypeError
        If `stats` is not a `Moments` or a running array has another dtype.
    ValueError
        If both `momentum` and `decay` are given or out of range, a running array has not C values, is read-only,
        not contiguous or overlaps the other one, or a batch has values but no more than `ddof` of them.
    FloatingPointError
        With ``nonfinite="raise"``; nothing has changed then.

    Warns
    -----
    NonFiniteWarning
        With ``nonfinite="skip"``, after everything is written; says how many channels were skipped.

    Notes
    -----
    .. math:: \mathrm{running} \leftarrow \mathrm{running} + \mathrm{momentum} \cdot (\mathrm{batch} - \mathrm{running})

    computed in float64 (Ioffe & Szegedy 2015, section 3.1).

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> mean, var = np.array([5.0]), np.array([1.0])
    >>> nbbn.ema_update(mean, var, nbbn.batch_stats(np.array([[6.0], [8.0]])), decay=0.9)
    >>> mean.round(6), var.round(6)
    (array([5.2]), array([1.1]))
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
    update = RunningUpdate(*running, rate, ddof, policy == "skip")
    if policy == "raise":
        refuse_nonfinite("stats", stats, update)
    warn_skipped(move_running(stats, update), stats)


def move_running(stats: Moments, update: RunningUpdate) -> int:
    """Moving averages of every channel with values; returns the number of channels skipped."""
    count, mean, m2 = views(stats)
    return backends.serving(count).ema(count, mean, m2, update)


# --- the policy for batches that are not finite ---


def refuse_nonfinite(name: str, stats: Moments, update: RunningUpdate | None) -> None:
    """`nonfinite="raise"`: look at the statistics, in the precision they would be stored in, before writing."""
    stats = stats if type(stats.mean) is np.ndarray else stats.to_numpy()
    mean, var = stats.mean, stats.var(0)
    with np.errstate(over="ignore", invalid="ignore"):
        if update is not None:
            mean, var = mean.astype(update.running_mean.dtype), stats.var(update.ddof).astype(update.running_var.dtype)
        bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)) & (stats.count > 0))
    if bad.size:
        c = int(bad[0])
        raise FloatingPointError(
            f"{name}: expected finite batch statistics (nonfinite='raise'), got mean {mean[c]} and variance {var[c]} "
            f"in channel {c} ({bad.size} of {stats.count.size} channels are not finite); nothing was changed"
        )


def warn_skipped(skipped: int, stats: Moments, stacklevel: int = 3) -> None:
    """`nonfinite="skip"`: say how many channels were kept."""
    if skipped:
        warnings.warn(
            f"{skipped} of {stats.count.shape[0]} channels had NaN or infinite batch statistics; "
            "their running statistics were kept",
            NonFiniteWarning,
            stacklevel=stacklevel,
        )
