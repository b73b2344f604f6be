import warnings

import numpy as np
import oracle
import pytest

import nbbn


def moments(*batches):
    return nbbn.batch_stats(np.array(batches, float)[:, None])


def test_textbook_numbers(backend):
    mean, var = np.array([5.0]), np.array([1.0])
    nbbn.ema_update(mean, var, moments(6, 8), decay=0.9)
    assert mean == pytest.approx([5.2], abs=1e-12)

    mean, var = np.zeros(1), np.ones(1)
    seen = []
    for batch_mean in (4.2, 3.8, 4.1):
        nbbn.ema_update(mean, var, moments(batch_mean - 1, batch_mean + 1), momentum=0.1)
        seen.append(mean[0])
    assert seen == pytest.approx([0.42, 0.758, 1.0922], abs=1e-12)


def test_start_up_from_zero_with_constant_batches(backend):
    mean, var = np.zeros(1), np.ones(1)
    for n in range(1, 51):
        nbbn.ema_update(mean, var, moments(3, 5), decay=0.9)
        assert mean[0] == pytest.approx(4 * (1 - 0.9**n), rel=1e-12)
        if n in (10, 50):
            assert mean[0] == pytest.approx({10: 2.605, 50: 3.979}[n], abs=5e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_momentum_ends_are_exact(backend, dtype):
    mean, var = np.array([0.1, np.nan], dtype), np.array([0.3, np.inf], dtype)
    before = mean.tobytes(), var.tobytes()
    batch = nbbn.batch_stats(np.array([[1.0, 0.1], [4.0, 0.7]]))
    nbbn.ema_update(mean, var, batch, momentum=0)
    nbbn.ema_update(mean, var, batch, decay=1.0)
    assert (mean.tobytes(), var.tobytes()) == before
    nbbn.ema_update(mean, var, batch, momentum=1)
    assert mean.tobytes() == batch.mean.astype(dtype).tobytes()
    assert var.tobytes() == batch.var(ddof=1).astype(dtype).tobytes()


def test_momentum_zero_ignores_a_nan_batch(backend):
    mean, var = np.array([0.5]), np.array([0.25])
    nbbn.ema_update(mean, var, moments(np.nan, 1), momentum=0.0)
    assert (mean, var) == ([0.5], [0.25])


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof_decides_which_variance_is_stored(backend, ddof):
    mean, var = np.zeros(1), np.zeros(1)
    nbbn.ema_update(mean, var, moments(1, 2, 6), momentum=1, ddof=ddof)
    assert var == pytest.approx([np.var([1, 2, 6], ddof=ddof)], rel=1e-14)


def test_channels_without_values_keep_their_running_statistics(backend):
    mean, var = np.full(2, 7.0), np.full(2, 3.0)
    x = np.array([[1.0, 1.0], [2.0, 5.0]])
    nbbn.ema_update(mean, var, nbbn.batch_stats(x, where=np.array([[False, True]])), momentum=1)
    assert mean.tolist() == [7, 3]
    assert var.tolist() == [3, 8]


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", [(30, 4), (5, 4, 9), (3, 4, 3000), (70000, 4)])
def test_a_bad_value_stays_in_its_channel(backend, shape, bad):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    good = nbbn.batch_stats(x)
    x[(1, 2) + (0,) * (len(shape) - 2)] = bad
    m = nbbn.batch_stats(x)
    assert np.isfinite(m.mean).tolist() == [True, True, False, True]
    assert np.isnan(m.m2).tolist() == [False, False, True, False]
    assert np.isnan(m.mean[2]) if np.isnan(bad) else m.mean[2] == bad
    np.testing.assert_allclose(m.m2[[0, 1, 3]], good.m2[[0, 1, 3]], rtol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", ["fused", "masked", "moments"])
def test_nonfinite_policies(backend, bad, way):
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    clean = nbbn.batch_stats(x)
    x[3, 1] = bad

    def update(policy):
        mean, var = np.full(3, 0.5, np.float32), np.full(3, 2.0, np.float32)
        if way == "moments":
            nbbn.ema_update(mean, var, nbbn.batch_stats(x), momentum=1, nonfinite=policy)
        else:
            where = np.ones((20, 1), bool) if way == "masked" else None
            nbbn.batch_norm(x, mean, var, training=True, momentum=1, nonfinite=policy, where=where)
        return mean, var

    mean, var = update("propagate")
    assert np.isfinite(mean).tolist() == np.isfinite(var).tolist() == [True, False, True]

    with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3 channels"):
        mean, var = update("skip")
    assert (mean[1], var[1]) == (0.5, 2.0)
    np.testing.assert_allclose(mean[[0, 2]], clean.mean[[0, 2]], atol=1e-6)

    with pytest.raises(FloatingPointError, match=r"channel 1 \(1 of 3 channels"):
        update("raise")


def test_raise_changes_nothing(backend):
    x = np.array([[1.0, 2.0], [3.0, np.nan]], np.float32)
    mean, var, out = np.full(2, 0.5, np.float32), np.full(2, 2.0, np.float32), x.copy()
    for target in (None, out):
        with pytest.raises(FloatingPointError):
            nbbn.batch_norm(
                x if target is None else out, mean, var, training=True, nonfinite="raise", out=target
            )  # fmt: skip
    assert (mean == 0.5).all()
    assert (var == 2.0).all()
    assert out.tobytes() == x.tobytes()
    y = nbbn.batch_norm(x[:, :1].copy(), training=True, nonfinite="raise")
    assert np.isfinite(y).all()


def test_values_that_only_overflow_when_stored_are_not_finite(backend):
    x = np.array([[1e30], [-1e30]], np.float32)  # variance 2e60: finite as float64, not as float32
    assert np.isfinite(nbbn.batch_stats(x).var()).all()
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    with pytest.warns(nbbn.NonFiniteWarning):
        nbbn.ema_update(mean, var, nbbn.batch_stats(x), nonfinite="skip")
    assert var == 1
    with pytest.raises(FloatingPointError):
        nbbn.ema_update(mean, var, nbbn.batch_stats(x), nonfinite="raise")
    wide = np.ones(1)
    nbbn.ema_update(np.zeros(1), wide, nbbn.batch_stats(x), nonfinite="raise")
    assert wide > 1e58


def test_a_poisoned_running_value_is_not_the_batch_s_fault(backend):
    mean, var = np.array([np.nan]), np.array([np.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbbn.ema_update(mean, var, moments(1, 3), nonfinite="skip")
        nbbn.ema_update(mean, var, moments(1, 3), momentum=1, nonfinite="skip")
    assert (mean, var) == ([2], [2])


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 0)])
def test_empty_batches(backend, shape):
    x = np.empty(shape, np.float32)
    m = nbbn.batch_stats(x)
    assert m.count.tolist() == m.mean.tolist() == m.m2.tolist() == [0, 0, 0]
    assert np.isnan(m.var()).all()
    mean, var = np.full(3, 5.0), np.full(3, 4.0)
    nbbn.ema_update(mean, var, m)
    y, stats = nbbn.batch_norm(x, mean, var, training=True, return_stats=True)
    assert (y.shape, y.dtype, stats.count.sum()) == (shape, x.dtype, 0)
    assert nbbn.batch_norm(x, mean, var).shape == shape
    grad, grad_weight, grad_bias = nbbn.batch_norm_backward(x, x, mean, var)
    assert (grad.shape, grad_weight.tolist(), grad_bias.tolist()) == (shape, [0, 0, 0], [0, 0, 0])
    assert (mean == 5).all()
    assert (var == 4).all()


def test_no_channels(backend):
    x = np.empty((4, 0), np.float32)
    assert nbbn.batch_stats(x).count.shape == (0,)
    assert nbbn.normalize(x, np.empty(0), np.empty(0)).shape == (4, 0)


@pytest.mark.parametrize("mask_shape", [(6, 4, 50), (6, 1, 50), (1, 1, 50), (6, 1, 1), (50,), (1, 4, 1), ()])
def test_masks_broadcast(backend, mask_shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4, 50)).astype(np.float32)
    where = rng.random(mask_shape) < 0.7
    where = np.asarray(where)
    where.flat[:1] = True
    m = nbbn.batch_stats(x, where=where)
    count, mean, var = oracle.stats(x, where=where)
    assert (m.count == count).all()
    np.testing.assert_allclose(m.mean, mean.astype(float), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(m.m2, (var * count).astype(float), rtol=2e-6)


def test_a_mask_changes_statistics_and_not_which_elements_are_normalized(backend):
    x = np.random.default_rng(0).standard_normal((8, 3, 20)).astype(np.float32)
    where = np.arange(20) < 12
    mean, var = np.zeros(3), np.ones(3)
    y, stats = nbbn.batch_norm(x, mean, var, training=True, where=where, return_stats=True, momentum=1)
    valid = nbbn.batch_stats(np.ascontiguousarray(x[:, :, :12]))
    assert stats.count.tolist() == [96] * 3
    np.testing.assert_allclose(stats.m2, valid.m2, rtol=1e-6)
    np.testing.assert_allclose(mean, valid.mean, atol=1e-7)
    np.testing.assert_allclose(var, valid.var(ddof=1), rtol=1e-6)
    expected = oracle.normalize(x, valid.mean, valid.var())
    np.testing.assert_allclose(y, expected.astype(float), atol=1e-5)


def test_evaluation_can_return_the_batch_s_own_statistics(backend):
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    mean, var = np.zeros(3), np.ones(3)
    y, stats = nbbn.batch_norm(x, mean, var, return_stats=True, out=x.copy())
    assert (stats == nbbn.batch_stats(x)).all()
    assert (y == nbbn.batch_norm(x, mean, var)).all()
    z, stats_in_place = nbbn.batch_norm(x, mean, var, return_stats=True, out=x)
    assert z is x
    assert (stats_in_place == stats).all()


def test_a_warning_that_is_an_error_comes_after_everything_is_consistent():
    x = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    x[0, 0] = np.nan
    bn = nbbn.BatchNorm(2, nonfinite="skip")
    with pytest.raises(nbbn.NonFiniteWarning, match="1 of 2 channels"):
        bn(x)
    assert bn.num_batches_tracked == 1
    assert bn.running_mean[0] == 0
    assert bn.running_mean[1] != 0
    assert bn.backward(np.ones_like(x)).shape == x.shape


def test_the_error_names_the_argument(backend):
    for call, name in [
        (lambda x: nbbn.ema_update(np.zeros(1), np.ones(1), nbbn.batch_stats(x), nonfinite="raise"), "stats"),
        (lambda x: nbbn.batch_norm(x, np.zeros(1), np.ones(1), training=True, nonfinite="raise"), "x"),
    ]:
        with pytest.raises(FloatingPointError, match=f"^{name}: expected finite batch statistics"):
            call(np.array([[1.0], [np.nan]]))


def test_means_near_the_top_of_float64_merge(backend):
    a = nbbn.Moments(np.array([3]), np.array([1.5e308]), np.array([0.0]))
    b = nbbn.Moments(np.array([1]), np.array([-1.5e308]), np.array([0.0]))
    assert (a + b).mean == pytest.approx([0.75e308])
