"""What is found in running statistics, and what is not."""

import numpy as np
import pytest

import nbbn


def problems(report):
    return {(finding.channel, finding.problem) for finding in report.findings}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_everything_impossible_is_found_in_its_channel_and_nothing_else(dtype):
    tiny = np.finfo(dtype).tiny
    mean = np.array([0.5, np.nan, 2, 3, 4, 5, -np.inf, 7, 8], dtype)
    var = np.array([1.5, 1.5, np.nan, -1e-6, 0, tiny / 2, np.inf, tiny, 1e-5], dtype)
    report = nbbn.check_running_stats(mean, var)
    assert problems(report) == {
        (1, "mean not finite"),
        (2, "variance not finite"),
        (3, "variance negative"),
        (4, "variance vanishes"),
        (5, "variance vanishes"),
        (6, "mean not finite"),
        (6, "variance not finite"),
    }
    assert [f.channel for f in report.findings] == [1, 2, 3, 4, 5, 6, 6]
    assert not report
    assert not report.ok
    healthy = nbbn.check_running_stats(mean[[0, 8]], var[[0, 8]])
    assert healthy
    assert healthy.ok
    assert healthy.findings == ()
    assert str(healthy) == "running statistics of 2 channels: nothing wrong found"


def test_never_updated_needs_parameters_that_moved():
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    weight, bias = np.ones(4, np.float32), np.zeros(4, np.float32)
    assert nbbn.check_running_stats(mean, var, weight, bias)  # a new layer
    weight[1], bias[2] = 0.9, 0.1
    assert problems(nbbn.check_running_stats(mean, var, weight, bias)) == {(1, "never updated"), (2, "never updated")}
    assert problems(nbbn.check_running_stats(mean, var, bias=bias)) == {(2, "never updated")}
    mean[1], var[2] = 1e-6, 1 + 1e-6  # updated, if only just
    assert nbbn.check_running_stats(mean, var, weight, bias)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 4096])
def test_a_healthy_layer_is_not_flagged_by_samples_of_any_size(size):
    """20,000 Gaussian channels: chance must not pass for a problem (expected: fewer than 0.02 findings)."""
    rng = np.random.default_rng(size)
    channels = 20_000 if size < 100 else 500
    center, spread = rng.normal(0, 5, channels), rng.uniform(0.1, 10, channels)
    x = center + spread * rng.standard_normal((size, channels))
    stats = nbbn.batch_stats(x.reshape(size, -1), axis=1)
    report = nbbn.check_running_stats(center, spread**2, stats=stats)
    assert report, report


def test_wild_differences_are_found():
    x = np.random.default_rng(0).normal(3.0, 2.0, (1000, 6))
    stats = nbbn.batch_stats(x)
    mean, var = stats.mean.copy(), stats.var().copy()
    mean[1] += 4 * 2.0
    mean[2] += 2 * 2.0  # drift, not wild
    var[3] *= 20
    var[4] /= 20
    var[5] *= 5  # drift
    report = nbbn.check_running_stats(mean, var, stats=stats)
    assert problems(report) == {
        (1, "mean far from sample"),
        (3, "variance far from sample"),
        (4, "variance far from sample"),
    }
    assert "in the sample" in str(report)
    pixels = nbbn.batch_stats(np.random.default_rng(0).integers(0, 256, (50, 2)).astype(np.float64))
    scaled = nbbn.check_running_stats(pixels.mean / 255, pixels.var() / 255**2, stats=pixels)
    assert problems(scaled) == {(0, "variance far from sample"), (1, "variance far from sample")}


def test_constant_channels_and_samples_that_say_nothing():
    mean, var = np.zeros(3), np.array([0.0, 0.0, 1.0])
    x = np.zeros((10, 3))
    x[:, 1] = np.arange(10)
    report = nbbn.check_running_stats(mean, var, stats=nbbn.batch_stats(x))
    assert problems(report) == {(1, "variance vanishes"), (2, "variance far from sample")}
    assert nbbn.check_running_stats(mean[2:], var[2:], stats=nbbn.Moments.zeros(1))
    x[0, 2] = np.nan
    assert nbbn.check_running_stats(mean[2:], var[2:], stats=nbbn.batch_stats(x[:, 2:]))


def test_eps_is_the_scale_below_which_differences_do_not_show():
    x = np.random.default_rng(1).normal(0, 1e-6, (100, 1))
    mean, var = np.zeros(1), np.full(1, 1e-9)
    assert nbbn.check_running_stats(mean, var, stats=nbbn.batch_stats(x))
    assert not nbbn.check_running_stats(mean, var, stats=nbbn.batch_stats(x), eps=0.0)


def test_the_table_names_channels_and_stays_short():
    var = np.full(300, -1.0)
    text = str(nbbn.check_running_stats(np.zeros(300), var))
    assert " ".join(text.split()) == (
        "problem channels which such as variance negative 300 of 300 0, 1, 2, 3, 4, ... -1"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.zeros((2, 1)), np.ones(2)), {}, ValueError, "running_mean: expected 1 dimension"),
        ((np.zeros(2), np.ones(3)), {}, ValueError, "running_var: expected 2 values, one per channel"),
        ((np.zeros(2), np.ones(2), np.ones(1)), {}, ValueError, "weight: expected 2 values"),
        ((np.zeros(2), np.ones(2), None, np.ones(1)), {}, ValueError, "bias: expected 2 values"),
        ((np.zeros(2), np.ones(2, np.int64)), {}, TypeError, "running_var: expected dtype float32 or float64"),
        ((np.zeros(2), np.ones(2)), {"eps": -1}, ValueError, "eps: expected a finite number >= 0"),
        ((np.zeros(2), np.ones(2)), {"stats": np.zeros(2)}, TypeError, r"stats: expected Moments .* got ndarray"),
        ((np.zeros(2), np.ones(2)), {"stats": nbbn.Moments.zeros(3)}, ValueError, "stats: expected 2 channels"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nbbn.check_running_stats(*arguments, **options)
