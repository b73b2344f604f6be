"""With which weight a batch enters the running statistics: plain, debiased and cumulative averages."""

import math

import numpy as np
import numpy.typing as npt

from nbbn.arrays import Array


def debiased_momentum(momentum: float, step: int) -> float:
    r"""The weight of batch number `step` (from 1) in a moving average that has forgotten where it started.

    .. math:: m_t = \frac{m}{1 - (1 - m)^t}

    Proof that :math:`r_t = r_{t-1} + m_t (b_t - r_{t-1})` is Adam's corrected average (Kingma & Ba 2015, algorithm 1
    and section 3). Let :math:`d = 1 - m` and :math:`a_t = d a_{t-1} + m b_t` start at :math:`a_0 = 0`; corrected, it
    is :math:`r_t = a_t / (1 - d^t)`. Put that in: :math:`r_t (1 - d^t) = d (1 - d^{t-1}) r_{t-1} + m b_t`, and
    because :math:`d (1 - d^{t-1}) = (1 - d^t) - m`, dividing by :math:`1 - d^t` gives the line above.
    :math:`m_1 = 1`: whatever the array held before the first batch is gone, so this also holds for an average that
    starts at one, whose correction is :math:`(a_t - d^t) / (1 - d^t)`.

    >>> [round(debiased_momentum(0.1, t), 4) for t in (1, 2, 10, 100)]
    [1.0, 0.5263, 0.1535, 0.1]
    >>> debiased_momentum(1e-300, 4)  # the limit: the plain average of the batches
    0.25
    """
    if momentum == 0.0 or momentum == 1.0 or step == 1:
        return 1.0 if momentum > 0.0 else 0.0
    # 1 - (1 - m)**t would lose all digits of a small m
    return min(1.0, momentum / -math.expm1(step * math.log1p(-momentum)))


def weight_of_step(momentum: float | None, debias: bool, step: int) -> float:
    """The momentum of update number `step`; None is the cumulative average, in which all weigh the same."""
    if momentum is None:
        return 1.0 / step
    return debiased_momentum(momentum, step) if debias else momentum


def weights_of_steps(momentum: float | None, debias: bool, steps: npt.NDArray[np.int64]) -> float | Array:
    """The same for every channel: one number if all are at the same step, which one fused call can use."""
    distinct, place = np.unique(steps, return_inverse=True)
    weights = [weight_of_step(momentum, debias, int(step)) for step in distinct]
    return weights[0] if len(weights) == 1 else np.array(weights)[place]
