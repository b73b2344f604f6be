"""`drift`: how far a batch is from the running statistics, and what that does to the output."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn import checks
from nbbn.arrays import Array, in_host_memory
from nbbn.moments import Moments, hosted
from nbbn.significance import holm, mean_p_value, variance_p_value

Floats = npt.NDArray[np.float64]

#: Rows of the printed table.
_ROWS = 10


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Drift:
    """What `drift` found, per channel; prints as a table, the channels with the largest `output_error` first.

    Parameters
    ----------
    z : float64 array of shape (C,)
        Shift of the mean in running standard deviations, ``(batch mean - running mean) / sqrt(running var)``.
    log_var_ratio : float64 array of shape (C,)
        ``log(batch var / running var)``, with the population variance (ddof=0) of the batch: the one that normalizes it
        in training.
    kl : float64 array of shape (C,)
        Kullback-Leibler divergence of Gaussians, batch || running, in nats: ``(exp(r) - 1 - r + z**2) / 2`` with r the
        `log_var_ratio`.
    output_error : float64 array of shape (C,)
        RMS over the batch of (output in training mode - output in evaluation mode), in units of the output.
    p_mean, p_var : float64 arrays of shape (C,)
        Probability of a shift, or of a ratio, at least this unlikely if the batch came from the running distribution.
    significant : bool array of shape (C,)
        Which channels moved more than noise explains, by the adjusted p-values, or are not finite.
    effective_count : float64 array of shape (C,)
        Number of independent values that the p-values assume, noise of the running statistics included.
    significance : float
        The level: the chance that any channel at all is called significant though none has moved.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.random.default_rng(0).normal(size=(200, 3)) * np.array([1.0, 1.0, 3.0]) + np.array([0.0, 0.4, 0.0])
    >>> nbbn.drift(np.zeros(3), np.ones(3), nbbn.batch_stats(x))
    Drift of 3 channels: 2 significant, 1 within the noise of 200 values (level 0.01 for all channels together)
    channel         z  var ratio        kl  output error    p mean     p var
          2    -0.135       8.55      2.71          1.93     0.057  6.1e-238  *
          1      0.44      0.997    0.0968          0.44   4.9e-10      0.96  *
          0   -0.0633       1.03   0.00219        0.0647      0.37      0.72
    """

    z: Floats
    log_var_ratio: Floats
    kl: Floats
    output_error: Floats
    p_mean: Floats
    p_var: Floats
    significant: npt.NDArray[np.bool_]
    effective_count: Floats
    significance: float

    def worst(self, k: int = 5) -> npt.NDArray[np.intp]:
        """The k channels with the largest `output_error`, worst first.

        Parameters
        ----------
        k : int
            How many, at most: there may be fewer channels.

        Returns
        -------
        integer array of shape (min(k, C),)
            Channel numbers; those whose error is not a number come first.

        Raises
        ------
        ValueError
            If `k` is negative or not an integer.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> stats = nbbn.Moments(np.full(3, 9), np.array([0.5, -2.0, 1.0]), np.full(3, 9.0))
        >>> nbbn.drift(np.zeros(3), np.ones(3), stats).worst(2)
        array([1, 2])
        """
        k = checks.whole_number("k", k, least=0)
        size = np.where(np.isnan(self.output_error), np.inf, self.output_error)
        return np.argsort(-size, kind="stable")[:k]

    def plot(self, ax: Any = None) -> Any:
        """Draw `output_error` channel by channel, significant channels in a colour of their own.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure if absent. Needs `matplotlib`.

        Returns
        -------
        matplotlib Axes

        Raises
        ------
        ModuleNotFoundError
            If `matplotlib` is not installed.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> stats = nbbn.Moments(np.full(3, 9), np.array([0.5, -2.0, 1.0]), np.full(3, 9.0))
        >>> nbbn.drift(np.zeros(3), np.ones(3), stats).plot().get_ylabel()
        'output error'
        """
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib", name=error.name) from error
        if ax is None:
            _, ax = pyplot.subplots()
        channels = np.arange(self.z.size)
        for chosen, color, label in ((~self.significant, "0.7", "noise"), (self.significant, "C3", "significant")):
            ax.bar(channels[chosen], self.output_error[chosen], color=color, label=f"{label} ({chosen.sum()})")
        ax.set_xlabel("channel")
        ax.set_ylabel("output error")
        ax.legend()
        return ax

    def __repr__(self) -> str:
        return "\n".join([self._summary(), *self._table()])

    def _summary(self) -> str:
        channels, found, count = self.z.size, int(self.significant.sum()), self.effective_count
        values = "as many values as they have"
        if channels and count.min() == count.max():
            values = f"{count[0]:.6g} value" + ("" if count[0] == 1 else "s")
        return (
            f"Drift of {channels} channel{'' if channels == 1 else 's'}: {found} significant, {channels - found} "
            f"within the noise of {values} (level {self.significance:g} for all channels together)"
        )

    def _table(self) -> list[str]:
        with np.errstate(all="ignore"):
            ratio = np.exp(self.log_var_ratio)
        lines = [f"{'channel':>7}{'z':>10}{'var ratio':>11}{'kl':>10}{'output error':>14}{'p mean':>10}{'p var':>10}"]
        for c in self.worst(_ROWS):
            star = "  *" if self.significant[c] else ""
            lines.append(
                f"{c:7d}{self.z[c]:10.3g}{ratio[c]:11.3g}{self.kl[c]:10.3g}{self.output_error[c]:14.3g}"
                f"{self.p_mean[c]:10.2g}{self.p_var[c]:10.2g}{star}"
            )
        if self.z.size > _ROWS:
            rest = self.worst(self.z.size)[_ROWS:]
            lines.append(f"... {rest.size} more channels, {int(self.significant[rest].sum())} of them significant")
        return lines


def drift(
    running_mean: Array,
    running_var: Array,
    stats: Moments,
    *,
    eps: float = 1e-5,
    weight: Array | None = None,
    significance: float = 0.01,
    effective_count: float | Array | None = None,
    running_count: float | None = None,
) -> Drift:
    r"""How far a batch is from running statistics, and by how much training and evaluation mode differ on it.

    Parameters
    ----------
    running_mean, running_var : arrays of shape (C,)
        float32 or float64; not written.
    stats : Moments
        Of the batch (`batch_stats`), or of many batches merged.
    eps : float
        Of the layer: added to both variances in `output_error`; >= 0.
    weight : array of shape (C,), optional
        Scale (gamma) of the layer, by which differences of the normalized output reach the output. Absent means 1;
        the bias cancels.
    significance : float
        Chance, between 0 and 1, that any channel is called significant though the batch comes from the running
        distribution.
    effective_count : number or array of shape (C,), optional
        How many independent values the batch has per channel; at most, and by default, ``stats.count``. Neighbouring
        pixels and time steps are alike, so images have fewer: the number of images is the safe choice (that of
        `BatchNorm.drift`).
    running_count : number, optional
        How many independent values the running statistics are worth: N (2 - momentum) / momentum for a moving average
        of batches of N, the size of the population after `recalibrate`. Absent: they are taken as exact, which is good
        enough for batches no larger than those that were trained with.

    Returns
    -------
    Drift
        Per channel: `z`, `log_var_ratio`, `kl`, `output_error`, `p_mean`, `p_var`, `significant`; prints as a table.

    Raises
    ------
    TypeError
        If `stats` is not a `Moments` or an array is of another dtype.
    ValueError
        If an array has not C values, a running variance is negative, or a number is out of range.

    Notes
    -----
    With batch statistics :math:`\mu, \sigma^2` (ddof=0) and running ones :math:`\mu_r, \sigma_r^2`,
    :math:`s = \sqrt{\sigma^2 + \mathrm{eps}}` and :math:`s_r` likewise, outputs in the two modes differ by
    :math:`w [(x - \mu)(1/s - 1/s_r) - (\mu - \mu_r)/s_r]`. The first part has mean zero over the batch, so

    .. math:: \mathrm{output\_error} = |w| \sqrt{\sigma^2 (1/s - 1/s_r)^2 + (\mu - \mu_r)^2 / s_r^2}

    exactly: what ``rms(train(x) - eval(x))`` would measure, activations left out.

    *Significance.* If n independent Gaussian values came from the running distribution, :math:`z \sqrt n` would be
    standard normal and :math:`n \sigma^2 / \sigma_r^2` chi-square with n - 1 degrees of freedom; both p-values are
    two-sided. The 2 C of them are adjusted by Holm's method (1979): the chance of one false alarm among all channels is
    at most `significance`. What that leaves out:

    - Running statistics have noise of their own. Taken as exact, with momentum 0.1, 16 channels and batches of the size
      trained with, a level of 0.01 is 0.015 in simulation; with 16 times as many values 0.23, and what is found then
      is the noise of the running statistics. With m = `running_count` n becomes n m / (n + m), which is right for the
      mean and roughly for the variance: 0.01 is then 0.014 at most for m = 1200, 0.035 for m = 150, 0.12 for m = 24.
    - Heavy tails (kurtosis k) make variances noisier than Gaussian ones: pass the count times 2 / (k - 1).
    - Significant is not large. With many values any difference is found; `output_error` says whether it matters.

    A channel without values, or one that is constant in batch and running statistics alike, has not moved.

    Examples
    --------
    8 values that look different and need not be, and 800 that are:

    >>> import numpy as np, nbbn
    >>> x = np.random.default_rng(6).normal(size=(8, 1))
    >>> few = nbbn.drift(np.zeros(1), np.ones(1), nbbn.batch_stats(x))
    >>> few.z.round(2), few.p_mean.round(2), few.significant
    (array([0.58]), array([0.1]), array([False]))
    >>> many = nbbn.drift(np.zeros(1), np.ones(1), nbbn.batch_stats(np.tile(x, (100, 1))))
    >>> many.z.round(2), many.p_mean.round(2), many.significant
    (array([0.58]), array([0.]), array([ True]))
    """
    if not isinstance(stats, Moments):
        raise TypeError(f"stats: expected Moments, got {type(stats).__name__}; pass nbbn.batch_stats(x)")
    stats = hosted(stats)
    channels = stats.count.size
    mean = in_host_memory(checks.per_channel("running_mean", running_mean, channels)).astype(np.float64)
    var = in_host_memory(checks.per_channel("running_var", running_var, channels)).astype(np.float64)
    if (var < 0).any():
        c = int(np.argmax(var < 0))
        raise ValueError(f"running_var: expected values >= 0, got {var[c]} in channel {c}")
    given = checks.optional_per_channel("weight", weight, channels)
    scale = None if given is None else in_host_memory(given)
    eps = checks.epsilon(eps)
    level = checks.level("significance", significance)
    count = checks.effective_count(effective_count, stats.count)
    if running_count is not None:
        worth = checks.positive("running_count", running_count)
    with np.errstate(all="ignore"):  # what is not finite is reported, not warned about
        if running_count is not None:
            count = count / (1 + count / worth)
        batch_var = stats.var()
        delta = np.where(stats.count > 0, stats.mean - mean, np.nan)
        z = _ratio(delta, np.sqrt(var), 0.0)
        ratio = _ratio(batch_var, var, 1.0)
        log_ratio = np.log(ratio)
        kl = 0.5 * (np.where((ratio > 0) & (ratio < np.inf), ratio - 1 - log_ratio, np.inf) + z * z)
        error = _output_error(delta, batch_var, var, eps)
        if scale is not None:
            error = error * np.abs(scale)
        p_mean, p_var = mean_p_value(z, count), variance_p_value(ratio, count)
        moved = _holds_below(level, p_mean, p_var)
    kl[np.isnan(ratio)] = np.nan
    unknown = ~(np.isfinite(delta) & np.isfinite(batch_var) & np.isfinite(mean) & np.isfinite(var)) & (stats.count > 0)
    fields = (
        z,
        log_ratio,
        kl,
        error,
        p_mean,
        p_var,
        moved | unknown,
        count,
    )
    for field in fields:
        field.flags.writeable = False
    return Drift(*fields, significance=level)


def independent_values(x: Array, channel: int | None, count: npt.NDArray[np.int64]) -> Floats:
    """The safe guess of how many values of a batch are independent: as many as there are samples.

    However alike the values of one sample are, the mean over a batch is at least as good as that of one value of each.
    """
    samples = x.shape[1] if channel == 0 else x.shape[0]
    return np.minimum(count, samples).astype(np.float64)


def _ratio(a: Floats, b: Floats, neither: float) -> Floats:
    """a / b, and `neither` where both are 0: a constant channel that stays constant."""
    quotient: Floats = np.where((a == 0) & (b == 0), neither, a / b)
    return quotient


def _output_error(delta: Floats, batch_var: Floats, var: Floats, eps: float) -> Floats:
    train, evaluation = np.sqrt(batch_var + eps), np.sqrt(var + eps)
    # 1 / train - 1 / evaluation, without cancelling where they are close
    spread = (var - batch_var) / (train + evaluation) / (train * evaluation)
    error: Floats = np.hypot(np.sqrt(batch_var) * spread, delta / evaluation)
    return error


def _holds_below(level: float, p_mean: Floats, p_var: Floats) -> npt.NDArray[np.bool_]:
    """Which channels have an adjusted p-value at or below the level; NaN is no evidence."""
    below: npt.NDArray[np.bool_] = holm(np.concatenate([p_mean, p_var])) <= level
    return below[: p_mean.size] | below[p_mean.size :]
