"""p-values: exact by simulation, accurate against SciPy, few false alarms, and enough power."""

import numpy as np
import pytest

import nbbn
from nbbn.significance import holm, incomplete_gamma


def stats_of(x):
    """One `Moments` whose channels are all of (batches, values, channels): as many drift tests as batches."""
    return nbbn.Moments(
        np.full(x.shape[0] * x.shape[2], x.shape[1]), x.mean(1).ravel(), (x.var(1) * x.shape[1]).ravel()
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8, 300])
def test_p_values_are_uniform_without_drift(n):
    """The share of p-values below a level is that level, within 4 standard errors: exact, not only safe."""
    x = np.random.default_rng(n).normal(3, 2, (8000, n, 1))
    found = nbbn.drift(np.full(8000, 3.0), np.full(8000, 4.0), stats_of(x))
    for p in (found.p_mean, found.p_var):
        for level in (0.5, 0.05, 0.002):
            assert abs((p < level).mean() - level) < 4 * np.sqrt(level * (1 - level) / p.size)


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 64])
def test_false_alarms_in_any_channel_stay_below_the_level(n):
    """16 channels: of 1500 batches without drift 5% raise an alarm, within 4 standard errors."""
    rng, level, batches, alarms = np.random.default_rng(n), 0.05, 1500, 0
    for _ in range(batches):
        x = rng.normal(size=(n, 16))
        stats = nbbn.Moments(np.full(16, n), x.mean(0), n * x.var(0))
        alarms += nbbn.drift(np.zeros(16), np.ones(16), stats, significance=level).significant.any()
    error = 4 * np.sqrt(level * (1 - level) / batches)
    assert alarms / batches < level + error
    assert alarms / batches > level - error, "Holm's bound is nearly reached by independent tests"


def test_a_real_shift_is_found_and_a_small_batch_is_not_called_one():
    rng = np.random.default_rng(0)
    shift, spread = np.zeros(16), np.ones(16)
    shift[3], spread[7] = 0.5, 1.5
    hits = np.zeros(16)
    for _ in range(200):
        x = rng.normal(size=(128, 16)) * spread + shift
        hits += nbbn.drift(np.zeros(16), np.ones(16), nbbn.batch_stats(x)).significant
    # mean: P(|N(0.5 sqrt(128), 1)| > 3.4) = 0.99 for the strictest of Holm's levels, 0.01 / 32; variance: more still
    assert hits[3] >= 0.95 * 200
    assert hits[7] >= 0.95 * 200
    assert hits[[c for c in range(16) if c not in (3, 7)]].sum() <= 0.01 * 200 + 4 * np.sqrt(0.01 * 200)

    small = rng.normal(size=(8, 16))
    found = nbbn.drift(np.zeros(16), np.ones(16), nbbn.batch_stats(small))
    assert np.abs(found.z).max() > 0.5, "it looks different"
    assert np.abs(found.log_var_ratio).max() > 0.5
    assert not found.significant.any()
    assert "0 significant, 16 within the noise of 8 values" in repr(found)


@pytest.mark.slow
def test_alike_pixels_do_not_make_a_batch_of_images_significant():
    rng, alarms, naive = np.random.default_rng(0), 0, 0
    bn = nbbn.BatchNorm(4, dtype=np.float64)
    for _ in range(200):  # half the variance between images, half within: variance 1
        x = (rng.normal(size=(8, 4, 1, 1)) + rng.normal(size=(8, 4, 6, 6))) / np.sqrt(2)
        alarms += bn.drift(x).significant.any()
        naive += bn.drift(x, effective_count=8 * 36).significant.any()
    assert alarms <= 0.01 * 200 + 4 * np.sqrt(0.01 * 200)
    assert naive > 100


@pytest.mark.slow
@pytest.mark.parametrize(("trained_with", "tested_with", "momentum"), [(64, 1024, 0.1), (8, 500, 0.1), (32, 1000, 0.5)])
def test_noise_of_the_running_statistics_is_not_drift(trained_with, tested_with, momentum):
    """Level 0.01, 16 channels: at most 0.03 of 1000 networks raise an alarm (within 4 standard errors)."""
    rng, level, networks = np.random.default_rng(0), 0.01, 1000
    mean, var = np.zeros((networks, 16)), np.ones((networks, 16))

    def sample(n):  # Gaussian values: their mean and m2 are independent, normal and chi-square
        shape = (networks, 16)
        return np.full(16, n), rng.normal(0, n**-0.5, shape), rng.chisquare(n - 1, shape)

    for _ in range(100):
        _, batch_mean, batch_m2 = sample(trained_with)
        mean += momentum * (batch_mean - mean)
        var += momentum * (batch_m2 / (trained_with - 1) - var)
    count, batch_mean, batch_m2 = sample(tested_with)
    worth = trained_with * (2 - momentum) / momentum
    alarms = naive = 0
    for k in range(networks):
        stats = nbbn.Moments(count, batch_mean[k], batch_m2[k])
        alarms += nbbn.drift(mean[k], var[k], stats, running_count=worth, significance=level).significant.any()
        naive += nbbn.drift(mean[k], var[k], stats, significance=level).significant.any()
    assert alarms / networks < 3 * level + 4 * np.sqrt(3 * level / networks)
    assert naive / networks > 0.15


def test_running_count_by_hand():
    stats = nbbn.Moments(np.array([30]), np.array([0.5]), np.array([30.0]))
    found = nbbn.drift(np.zeros(1), np.ones(1), stats, running_count=60)
    assert found.effective_count == pytest.approx([20])
    assert found.p_mean == pytest.approx([0.025347318677468264])  # two-sided 0.5 * sqrt(20) sigma
    assert nbbn.drift(np.zeros(1), np.ones(1), stats, running_count=np.inf).effective_count == 30


@pytest.mark.parametrize("a", [0.5, 3.5, 60.0, 199.0, 201.0, 1e4, 1e7, 5e11])
def test_incomplete_gamma_against_scipy(a):
    special = pytest.importorskip("scipy.special")
    checked = 0
    for k in (-30, -9, -5, -2, -0.5, -1e-3, 0, 1e-9, 0.1, 1, 3, 8, 15, 30):
        x = a + k * np.sqrt(a)
        if x <= 0 or (a > 1e4 and k < -3):  # SciPy 1.17 loses those: 1.7e-11 for 9.9e-10 at a = 5e11, k = -6
            continue
        lower, upper = incomplete_gamma(a, x)
        q = special.gammaincc(a, x)
        if q > 1e-250:
            assert upper == pytest.approx(q, rel=1e-9)
            checked += 1
        p = special.gammainc(a, x)
        if p > 1e-250:
            assert lower == pytest.approx(p, rel=1e-9)
            checked += 1
    assert checked >= 8


def test_incomplete_gamma_of_one_and_two_is_elementary():
    for x in (1e-9, 0.3, 1.9, 5.0, 40.0, 700.0):
        assert incomplete_gamma(1.0, x) == pytest.approx((-np.expm1(-x), np.exp(-x)), rel=1e-13)
        assert incomplete_gamma(2.0, x)[1] == pytest.approx((1 + x) * np.exp(-x), rel=1e-13)
    assert incomplete_gamma(2.0, 0.0) == (0.0, 1.0)
    assert incomplete_gamma(2.0, np.inf) == (1.0, 0.0)


def test_tails_of_many_values_are_those_of_a_normal_distribution():
    """Where SciPy does not serve: Cornish-Fisher says the two tails differ from the normal one by O(1 / sqrt(a))."""
    a, k = 5e11, 6.0
    below, above = incomplete_gamma(a, a - k * np.sqrt(a))[0], incomplete_gamma(a, a + k * np.sqrt(a))[1]
    assert (below + above) / 2 == pytest.approx(9.865876450376946e-10, rel=1e-8)
    assert abs(below / above - 1) < k**3 / np.sqrt(a)


def test_holm_by_hand():
    p = np.array([0.3, 0.01, np.nan, 0.02, 0.04])
    np.testing.assert_allclose(holm(p), [0.3, 0.04, np.nan, 0.06, 0.08])
    assert holm(np.array([])).size == 0
