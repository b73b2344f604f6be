"""Predicted noise of running statistics, against simulation."""

import numpy as np
import pytest

import nbbn

#: Independent layers simulated side by side, as channels.
LAYERS = 4000


def measured(momentum, values, steps, draw):
    """Standard error of running mean and variance over many layers after `steps` updates, without nbbn's code.

    The average starts at the truth, 0 and 1: what is measured is noise, not the start.
    """
    rng = np.random.default_rng(values * steps)
    mean, var = np.zeros(LAYERS), np.ones(LAYERS)
    for t in range(1, steps + 1):
        rate = 1 / t if momentum is None else momentum
        x = draw(rng, (values, LAYERS))
        mean += rate * (x.mean(0) - mean)
        var += rate * (x.var(0, ddof=1) - var)
    return np.sqrt(np.mean(mean**2)), np.sqrt(np.mean((var - 1) ** 2))


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def uniform(rng, shape):
    return rng.uniform(-np.sqrt(3), np.sqrt(3), shape)


def laplace(rng, shape):
    return rng.laplace(0, np.sqrt(0.5), shape)


@pytest.mark.parametrize(
    ("momentum", "values", "steps", "step", "draw", "kurtosis"),
    [
        (0.1, 16, 60, None, gaussian, 3.0),  # the start has the weight 0.9**120 in the square: settled
        (0.1, 16, 4, 4, gaussian, 3.0),
        (0.5, 2, 12, None, gaussian, 3.0),
        (1.0, 64, 1, None, gaussian, 3.0),
        (None, 8, 20, 20, gaussian, 3.0),
        (0.2, 8, 40, None, uniform, 1.8),
        (0.2, 8, 40, None, laplace, 6.0),
    ],
)
def test_noise_is_that_of_a_simulation(momentum, values, steps, step, draw, kurtosis):
    noise = nbbn.expected_noise(momentum, values, step=step, kurtosis=kurtosis)
    mean, var = measured(momentum, values, steps, draw)
    # an RMS over n values has the relative standard error sqrt((k - 1) / (4 n)), k the kurtosis of these: 3 for the
    # running mean, about 1.1% (4 of these: 4.5%); at most 15 for variances of two values, 3%
    assert mean == pytest.approx(noise.mean, rel=0.045)
    assert var == pytest.approx(noise.var, rel=0.045 if values > 2 else 0.12)


def test_decay_is_one_minus_momentum():
    assert nbbn.expected_noise(decay=0.75, batch_values=9) == nbbn.expected_noise(0.25, 9)
    with pytest.raises(ValueError, match="momentum, decay: expected one of them"):
        nbbn.expected_noise(0.1, 9, decay=0.9)


def test_limits():
    assert nbbn.expected_noise(0.0, 4) == (0, 0)  # never moves
    assert nbbn.expected_noise(1.0, 4) == nbbn.expected_noise(None, 4, step=1)  # one batch
    late, settled = nbbn.expected_noise(0.1, 32, step=200), nbbn.expected_noise(0.1, 32)
    assert late == pytest.approx(settled, rel=1e-12)
    # values that are -1 and 1 with probability 1/2 have the least kurtosis, 1: s**2 of two of them is 0 or 2
    assert nbbn.expected_noise(1.0, 2, kurtosis=1.0).var == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0.1,), {}, ValueError, "batch_values: expected an integer >= 2, got None"),
        ((0.1, 1), {}, ValueError, "batch_values: expected an integer >= 2, got 1"),
        ((0.1, 2.5), {}, ValueError, "batch_values: expected an integer >= 2, got 2.5"),
        ((1.1, 4), {}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.1"),
        ((0.1, 4), {"step": 0}, ValueError, "step: expected an integer >= 1, got 0"),
        ((None, 4), {}, ValueError, "step: expected a number of updates with momentum=None"),
        ((0.1, 4), {"kurtosis": 0.9}, ValueError, "kurtosis: expected a finite number >= 1, got 0.9"),
        ((0.1, 4), {"kurtosis": np.nan}, ValueError, "kurtosis: expected a finite number >= 1, got nan"),
        ((0.1, 4), {"kurtosis": "3"}, TypeError, "kurtosis: expected a number, got '3'"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nbbn.expected_noise(*arguments, **options)
