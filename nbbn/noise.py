"""How noisy running statistics are: what a momentum and a batch size let them know."""

import math
from typing import NamedTuple

from nbbn import checks


class ExpectedNoise(NamedTuple):
    """Standard errors of running statistics.

    Attributes
    ----------
    mean : float
        Of the running mean, in standard deviations of the channel.
    var : float
        Of the running variance, relative to the variance of the channel.
    """

    mean: float
    var: float


def expected_noise(
    momentum: float | None = checks.DEFAULT_MOMENTUM,
    batch_values: int | None = None,
    *,
    decay: float | None = None,
    step: int | None = None,
    kurtosis: float = 3.0,
) -> ExpectedNoise:
    r"""Standard error that running statistics have, or keep, because batches are small.

    Parameters
    ----------
    momentum : float or None
        Weight of the NEW batch, in [0, 1] (PyTorch's convention). None: the average over all batches.
    batch_values : int
        Independent values per channel in a batch, at least 2: N for x of shape (N, C). For images at most N H W,
        and fewer, as neighbouring pixels are alike: then the noise is larger than said here.
    decay : float, optional
        Weight of the OLD value, ``1 - momentum``. Instead of `momentum`.
    step : int, optional
        Number of updates so far, at least 1. None: after so many that the noise no longer changes (which an average
        over all batches never reaches: there it must be given).
    kurtosis : float
        Of the values in a channel, at least 1: fourth central moment over squared variance. 3 is Gaussian's; behind
        a ReLU it is larger. Matters for `var` only.

    Returns
    -------
    ExpectedNoise
        ``mean``, in standard deviations of the channel, and ``var``, relative to its variance.

    Raises
    ------
    TypeError, ValueError
        If a number is of the wrong kind or out of range, both `momentum` and `decay` are given, or `step` is missing
        with ``momentum=None``.

    Notes
    -----
    With B values per batch, momentum m, t updates, and the sample variance (ddof=1) averaged,

    .. math::
        \mathrm{mean}^2 = \frac{f}{B}, \qquad
        \mathrm{var}^2 = \frac{f}{B} \left(\mathrm{kurtosis} - \frac{B - 3}{B - 1}\right), \qquad
        f = \frac{m}{2 - m} \left(1 - (1 - m)^{2t}\right)

    (Kenney & Keeping 1951, section 7.7, for one batch; a geometric series for the average), or f = 1/t for the
    average over all batches. For a Gaussian channel the bracket is 2B / (B - 1). Values and batches are taken to be
    independent draws from one population: noise is what remains when nothing drifts. The start value is no noise:
    it keeps the weight (1 - m)^t. Where that is divided out (bias correction), divide these by 1 - (1 - m)^t too.

    Examples
    --------
    Batches of 16 with PyTorch's default: the running variance stays wrong by 8%, whatever the number of batches.

    >>> import nbbn
    >>> noise = nbbn.expected_noise(0.1, 16)
    >>> f"{noise.mean:.3f} standard deviations, {noise.var:.1%} of the variance"
    '0.057 standard deviations, 8.4% of the variance'
    >>> round(nbbn.expected_noise(decay=0.99, batch_values=16).var, 3)
    0.026
    """
    rate = checks.optional_momentum(momentum, decay)
    values = checks.whole_number("batch_values", batch_values, least=2)
    updates = None if step is None else checks.whole_number("step", step, least=1)
    fourth = checks.at_least("kurtosis", kurtosis, 1.0)
    if rate is None:
        if updates is None:
            raise ValueError(
                "step: expected a number of updates with momentum=None, whose noise never settles, got None"
            )
        forgetting = 1.0 / updates
    else:
        settled = 1.0 if updates is None else 1.0 - (1.0 - rate) ** (2 * updates)
        forgetting = rate / (2.0 - rate) * settled
    per_value = forgetting / values
    return ExpectedNoise(math.sqrt(per_value), math.sqrt(per_value * max(0.0, fourth - (values - 3) / (values - 1))))
