"""What cannot be right about running statistics, found before they are used."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from nbbn import checks
from nbbn.arrays import Array, in_host_memory
from nbbn.moments import Moments, hosted
from nbbn.statistics import BoolArray

#: How far from a sample counts as wildly different: means in standard deviations, variances as a ratio; and how many
#: standard errors of the sample come on top. What drifts is a fraction of these; what was never updated, swapped or
#: scaled by 255 is far beyond.
FAR_MEAN, FAR_VAR, STANDARD_ERRORS = 3.0, 10.0, 5.0

#: Values below which a sample says nothing about a variance: with 8, chance alone exceeds the limit in fewer than 1
#: of 1e6 Gaussian channels (chi-squared with 7 degrees of freedom, below 7/144), with 3 in 1 of 2000.
LEAST_VALUES = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with one channel.

    Attributes
    ----------
    channel : int
        Its index.
    problem : str
        A short name: the same for every channel with this problem.
    value : str
        What was found.
    """

    channel: int
    problem: str
    value: str


@dataclass(frozen=True, slots=True, repr=False)
class RunningStatsReport:
    """What `check_running_stats` found: true if nothing; prints as a table.

    Attributes
    ----------
    channels : int
        How many there are.
    findings : tuple of Finding
        Channel by channel.
    """

    channels: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        if self.ok:
            return f"running statistics of {self.channels} channels: nothing wrong found"
        by_problem: defaultdict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            by_problem[finding.problem].append(finding)
        rows = [("problem", "channels", "which", "such as")]
        for problem, found in by_problem.items():
            which = ", ".join(str(f.channel) for f in found[:5]) + (", ..." if len(found) > 5 else "")
            rows.append((problem, f"{len(found)} of {self.channels}", which, found[0].value))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def check_running_stats(
    running_mean: Array,
    running_var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    stats: Moments | None = None,
    eps: float = 1e-5,
) -> RunningStatsReport:
    r"""Find running statistics that cannot be right.

    Parameters
    ----------
    running_mean, running_var : arrays of shape (C,)
        float32 or float64. Only read.
    weight, bias : arrays of shape (C,), optional
        The parameters: where they have moved from 1 and 0, the statistics should have moved too.
    stats : Moments, optional
        Of a sample of the layer's inputs (``batch_stats(x)``), to compare with. The larger the sample, the more it
        tells.
    eps : float
        Added to the variance inside the square root; >= 0.

    Returns
    -------
    RunningStatsReport
        True if nothing was found (as `.ok`), with a list of `.findings`; prints as a table.

    Raises
    ------
    TypeError
        If an array is not float32 or float64, or `stats` is not a `Moments`.
    ValueError
        If the arrays do not have the same number of values, or `eps` < 0.

    Notes
    -----
    Per channel, what is found:

    - ``mean not finite``, ``variance not finite``: NaN or infinity; one such batch is enough, and it stays.
    - ``variance negative``: no average of variances is; arithmetic on the state dict, or swapped arrays.
    - ``variance vanishes``: zero or denormal: the channel is dead (or was for so long that the average decayed), and
      the layer multiplies whatever comes by up to weight / sqrt(eps). Not found where `stats` is as constant.
    - ``never updated``: exactly 0 and 1, the start values, with a weight or bias that has moved.
    - ``mean far from sample``, ``variance far from sample``: with n values in the sample, mean m and variance v,

      .. math::
          |\mathrm{running\_mean} - m| > \left(3 + \frac{5}{\sqrt n}\right)
              \sqrt{\max(\mathrm{running\_var}, v) + \mathrm{eps}}, \qquad
          \left|\log \frac{\mathrm{running\_var} + \mathrm{eps}}{v + \mathrm{eps}}\right|
              > \log 10 + 5 \sqrt{\frac{2}{n - 1}}

      (the second from 8 values on): 3 standard deviations and a factor of 10 beyond five standard errors of the
      sample, if its values are independent and Gaussian. Smaller differences may matter: that is drift.

    A channel with one of the first four is not compared with the sample.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> mean, var = np.array([0.1, np.nan, 0.0]), np.array([2.0, 1.0, -1e-3])
    >>> report = nbbn.check_running_stats(mean, var)
    >>> report.ok
    False
    >>> print(report)
    problem            channels  which  such as
    mean not finite    1 of 3    1      nan
    variance negative  1 of 3    2      -0.001
    >>> bn = nbbn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(20.0, 1.0, (100, 3))
    >>> print(nbbn.check_running_stats(bn.running_mean, bn.running_var, stats=nbbn.batch_stats(x)))
    problem               channels  which    such as
    mean far from sample  3 of 3    0, 1, 2  0, in the sample 19.898
    """
    mean = in_host_memory(checks.vector("running_mean", running_mean))
    var = in_host_memory(checks.per_channel("running_var", running_var, mean.size))
    parameters = (
        checks.optional_per_channel(name, value, mean.size) for name, value in (("weight", weight), ("bias", bias))
    )
    weight, bias = (None if value is None else in_host_memory(value) for value in parameters)
    if stats is not None and not isinstance(stats, Moments):
        raise TypeError(f"stats: expected Moments (nbbn.batch_stats of a sample), got {type(stats).__name__}")
    stats = None if stats is None else hosted(stats)
    if stats is not None and stats.count.size != mean.size:
        raise ValueError(f"stats: expected {mean.size} channels, as in running_mean, got {stats.count.size}")
    eps = checks.epsilon(eps)
    with np.errstate(all="ignore"):
        constant, far_mean, far_var = _against_sample(mean, var, stats, eps)
        broken = {
            "mean not finite": ~np.isfinite(mean),
            "variance not finite": ~np.isfinite(var),
            "variance negative": np.isfinite(var) & (var < 0),
            "variance vanishes": (var >= 0) & (var < np.finfo(var.dtype).tiny) & ~constant,
        }
        usable = ~np.logical_or.reduce(list(broken.values()))
        suspect = {
            "never updated": (mean == 0) & (var == 1) & (_moved(weight, 1, mean.size) | _moved(bias, 0, mean.size)),
            "mean far from sample": far_mean,
            "variance far from sample": far_var,
        }
    masks = broken | {problem: mask & usable for problem, mask in suspect.items()}
    found = [(int(c), problem) for problem, mask in masks.items() for c in np.flatnonzero(mask)]
    with np.errstate(all="ignore"):
        findings = [Finding(c, name, _value(c, name, mean, var, stats)) for c, name in sorted(found, key=_channel)]
    return RunningStatsReport(mean.size, tuple(findings))


def _moved(parameter: Array | None, start: int, channels: int) -> BoolArray:
    return np.zeros(channels, bool) if parameter is None else np.asarray(parameter != start)


def _against_sample(
    mean: Array, var: Array, sample: Moments | None, eps: float
) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Which channels are constant in the sample; whose mean, whose variance is far from it."""
    if sample is None:
        nowhere = np.zeros(mean.size, bool)
        return nowhere, nowhere, nowhere
    mean, var = mean.astype(np.float64), var.astype(np.float64)
    n, sample_var = sample.count, sample.var()  # NaN, so never far, where there is nothing
    widest = np.sqrt(np.maximum(var, sample_var) + eps)
    far_mean = np.abs(mean - sample.mean) > (FAR_MEAN + STANDARD_ERRORS / np.sqrt(n)) * widest
    log_ratio = np.abs(np.log((var + eps) / (sample_var + eps)))
    far_var = (n >= LEAST_VALUES) & (log_ratio > np.log(FAR_VAR) + STANDARD_ERRORS * np.sqrt(2 / (n - 1)))
    return (n > 1) & (sample.m2 == 0), far_mean, far_var


def _value(c: int, problem: str, mean: Array, var: Array, sample: Moments | None) -> str:
    """What the running statistics say, and the sample where it is compared with."""
    if problem == "never updated":
        return "mean 0, variance 1"
    of_mean = problem.startswith("mean")
    value = f"{mean[c] if of_mean else var[c]:.5g}"
    if sample is None or not problem.endswith("sample"):
        return value
    return f"{value}, in the sample {sample.mean[c] if of_mean else sample.var()[c]:.5g}"


def _channel(found: tuple[int, str]) -> int:
    return found[0]
