"""Debiased and cumulative averages, and channels that skipped batches, against the averages written out."""

import copy
import decimal

import numpy as np
import pytest

import nbbn
from nbbn import BatchNorm
from nbbn.averaging import debiased_momentum

EPS32 = np.finfo(np.float32).eps


def batches(number, channels=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(5, 2, (8 + k % 3, channels)).astype(dtype) for k in range(number)]


def corrected(values, momentum, start):
    """Adam's way: a moving average from `start`, the start's weight taken out, divided by the weight that is left."""
    average = np.full_like(values[0], start, np.longdouble)
    decay = 1 - np.longdouble(momentum)
    for value in values:
        average = decay * average + np.longdouble(momentum) * value
    left = decay ** len(values)
    return (average - left * start) / (1 - left)


def statistics(data):
    """Means and sample variances, in extended precision."""
    wide = [x.astype(np.longdouble) for x in data]
    return [x.mean(0) for x in wide], [x.var(0, ddof=1) for x in wide]


@pytest.mark.parametrize("momentum", [1.0, 0.5, 0.1, 1e-3, 1e-9])
def test_a_debiased_average_is_the_plain_one_without_its_start(backend, momentum):
    data = batches(7, dtype=np.float64)
    mean, var = np.full(3, 1e6), np.full(3, np.nan)  # forgotten exactly: nothing of these is left
    for t, x in enumerate(data, 1):
        nbbn.ema_update(mean, var, nbbn.batch_stats(x), momentum, step=t)
        means, variances = statistics(data[:t])
        # the written-out form itself cancels for a small momentum: decay**t is that close to 1
        tolerance = max(1e-13, 4 * np.finfo(np.longdouble).eps / momentum)
        np.testing.assert_allclose(mean, corrected(means, momentum, 0).astype(float), rtol=tolerance)
        np.testing.assert_allclose(var, corrected(variances, momentum, 1).astype(float), rtol=tolerance)


@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 10**9])
@pytest.mark.parametrize("momentum", [1e-300, 1e-12, 2.0**-30, 0.1, 0.25, 0.999])
def test_the_weight_keeps_its_digits(momentum, step):
    with decimal.localcontext(decimal.Context(prec=800)):
        m = decimal.Decimal(momentum)
        exact = float(m / (1 - (1 - m) ** step))
    assert debiased_momentum(momentum, step) == pytest.approx(exact, rel=1e-12)
    assert step > 1 or debiased_momentum(momentum, step) == 1.0


def test_after_many_steps_it_is_the_plain_average():
    assert debiased_momentum(0.1, 400) == 0.1
    assert debiased_momentum(0.0, 1) == debiased_momentum(0.0, 5) == 0.0
    plain, debiased = BatchNorm(3), BatchNorm(3, debias=True)
    gaps = []
    for x in batches(200):
        plain(x)
        debiased(x)
        gaps.append(np.abs(plain.running_mean - debiased.running_mean).max())
    assert gaps[0] > 3
    assert gaps[-1] < 8 * EPS32 * 5


@pytest.mark.parametrize("step", [1, 4, np.array([1, 2, 3])])
def test_momentum_zero_and_a_step_change_nothing(backend, step):
    mean, var = np.array([0.1, np.nan, -0.0], np.float32), np.array([0.3, 2, np.inf], np.float32)
    before = mean.tobytes(), var.tobytes()
    nbbn.ema_update(mean, var, nbbn.batch_stats(batches(1)[0]), momentum=0, step=step)
    nbbn.ema_update(mean, var, nbbn.batch_stats(batches(1)[0]), decay=1.0, step=step)
    assert (mean.tobytes(), var.tobytes()) == before


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_steps_of_their_own_for_each_channel(backend, dtype):
    stats, steps = nbbn.batch_stats(batches(1, channels=5)[0]), np.array([3, 1, 7, 3, 1], dtype)
    mean, var = np.arange(5.0), np.arange(5.0) + 1
    expected = mean.copy(), var.copy()
    nbbn.ema_update(mean, var, stats, 0.2, step=steps, ddof=0)
    for c, t in enumerate(steps.tolist()):
        m = 0.2 / (1 - 0.8**t)
        expected[0][c] += m * (stats.mean[c] - expected[0][c])
        expected[1][c] += m * (stats.var()[c] - expected[1][c])
    np.testing.assert_allclose((mean, var), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (0, ValueError, r"step: expected integers >= 1 .* got 0"),
        (np.array([1, -2, 3]), ValueError, r"step: .* got -2"),
        (np.array([1, 2]), ValueError, r"step: expected one integer or 3, one per channel, got shape \(2,\)"),
        (1.0, TypeError, "step: expected an integer"),
        (True, TypeError, "step: expected an integer"),
        ([1, 2, 3], TypeError, "step: expected an integer"),
        ("one", TypeError, "step: expected an integer"),
    ],
)
def test_bad_steps(step, error, message):
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(error, match=message):
        nbbn.ema_update(mean, var, nbbn.batch_stats(batches(1)[0]), step=step)
    assert (mean == 0).all()
    assert (var == 1).all()


def test_raise_with_steps_of_their_own_changes_no_channel(backend):
    x = batches(1)[0]
    x[0, 2] = np.nan
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(FloatingPointError, match="channel 2"):
        nbbn.ema_update(mean, var, nbbn.batch_stats(x), step=np.array([1, 2, 3]), nonfinite="raise")
    assert (mean == 0).all()
    assert (var == 1).all()


def test_counting_steps_by_hand_as_documented(backend):
    data = batches(6)
    data[0][0, 1] = data[3][2, 1] = np.inf
    mean, var, steps = np.zeros(3, np.float32), np.ones(3, np.float32), np.ones(3, np.int64)
    bn = BatchNorm(3, debias=True, nonfinite="skip")
    for k, x in enumerate(data):
        stats = nbbn.batch_stats(x)
        if k in (0, 3):
            with pytest.warns(nbbn.NonFiniteWarning):
                nbbn.ema_update(mean, var, stats, step=steps, nonfinite="skip")
            with pytest.warns(nbbn.NonFiniteWarning):
                bn(x)
        else:
            nbbn.ema_update(mean, var, stats, step=steps, nonfinite="skip")
            bn(x)
        steps += np.isfinite(stats.m2)
    assert steps.tolist() == [7, 5, 7]
    assert bn.num_skipped.tolist() == [0, 2, 0]
    np.testing.assert_array_equal(bn.running_mean, mean)
    np.testing.assert_array_equal(bn.running_var, var)


# --- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("poisoned", [(), (0,), (2, 3), (0, 1, 4)])
@pytest.mark.filterwarnings("ignore::nbbn.NonFiniteWarning")
def test_a_skipped_batch_is_as_if_it_had_not_been(backend, momentum, poisoned):
    """Channel 1 misses some batches, channel 2 one of its own: each averages those that it has seen."""
    data = batches(6)
    spoilt = copy.deepcopy(data)
    for k in poisoned:
        spoilt[k][1, 1] = np.nan
    spoilt[5][0, 2] = -np.inf
    bn = BatchNorm(3, momentum=momentum, debias=momentum is not None, nonfinite="skip")
    for x in spoilt:
        y = bn(x)
        bad = ~np.isfinite(x).all(0)
        assert np.isnan(y[:, bad]).all()
        np.testing.assert_allclose(y[:, ~bad].std(0), 1, rtol=1e-4)
        assert bn.backward(np.ones_like(x)).shape == x.shape
    assert bn.num_batches_tracked == 6
    assert bn.num_skipped.tolist() == [0, len(poisoned), 1]
    for c, seen in enumerate([range(6), [k for k in range(6) if k not in poisoned], range(5)]):
        means, variances = statistics([data[k][:, [c]] for k in seen])
        mean = np.mean(means) if momentum is None else corrected(means, momentum, 0)
        var = np.mean(variances) if momentum is None else corrected(variances, momentum, 1)
        np.testing.assert_allclose(bn.running_mean[c], float(np.squeeze(mean)), rtol=8 * EPS32)
        np.testing.assert_allclose(bn.running_var[c], float(np.squeeze(var)), rtol=8 * EPS32)


def test_all_channels_skipped_and_a_fixed_momentum(backend):
    bn = BatchNorm(2, nonfinite="skip")
    before = bn.running_mean.tobytes(), bn.running_var.tobytes()
    with pytest.warns(nbbn.NonFiniteWarning, match="2 of 2 channels"):
        bn(np.full((4, 2), np.nan, np.float32))
    assert (bn.running_mean.tobytes(), bn.running_var.tobytes()) == before
    assert (bn.num_batches_tracked, bn.num_skipped.tolist()) == (1, [1, 1])
    with pytest.warns(nbbn.NonFiniteWarning):  # finite, but float32 cannot hold the variance
        bn(np.array([[1e30, 1], [-1e30, 2]], np.float32))
    assert bn.num_skipped.tolist() == [2, 1]
    bn.eval()(np.full((4, 2), np.nan, np.float32))
    bn.freeze().train()(np.full((4, 2), np.nan, np.float32))
    assert bn.num_skipped.tolist() == [2, 1]


def test_other_policies_count_no_skips(backend):
    x = np.full((4, 2), np.nan, np.float32)
    bn = BatchNorm(2)
    bn(x)
    assert np.isnan(bn.running_mean).all()
    assert bn.num_skipped.tolist() == [0, 0]
    bn = BatchNorm(2, nonfinite="raise")
    with pytest.raises(FloatingPointError):
        bn(x)
    assert (bn.num_batches_tracked, bn.num_skipped.tolist()) == (0, [0, 0])


@pytest.mark.filterwarnings("ignore::nbbn.NonFiniteWarning")
@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}])
def test_a_loaded_layer_goes_on_where_it_stopped(options):
    data = batches(8)
    data[1][0, 0] = np.nan
    bn = BatchNorm(3, nonfinite="skip", **options)
    for x in data[:4]:
        bn(x)
    state = {f"net.{name}": value for name, value in bn.state_dict().items()}
    assert state["net.num_skipped"].tolist() == [1, 0, 0]
    loaded = BatchNorm.from_state_dict(state | {"fc.weight": 3}, "net.", nonfinite="skip", **options)
    copied = copy.deepcopy(bn)
    for x in data[4:]:
        for layer in (bn, loaded, copied):
            layer(x)
    for other in (loaded, copied):
        assert {k: v.tobytes() for k, v in other.state_dict().items()} == {
            k: v.tobytes() for k, v in bn.state_dict().items()
        }


def test_state_dicts_of_other_frameworks_have_no_counters():
    state = BatchNorm(3).state_dict()
    assert "num_skipped" not in state
    bn = BatchNorm(3, nonfinite="skip")
    bn.num_skipped[:], bn.num_batches_tracked = 2, 5
    assert bn.load_state_dict(state).num_skipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}])
def test_loading_without_a_count_would_lose_what_was_loaded(options):
    one = np.ones(3)
    keras = {"gamma": one, "beta": one, "moving_mean": 3 * one, "moving_variance": one}
    for load in (BatchNorm(3, **options).load_state_dict, lambda d: BatchNorm.from_state_dict(d, **options)):
        with pytest.raises(ValueError, match=r"expected num_batches_tracked .* add how many batches"):
            load(keras)
    bn = BatchNorm.from_state_dict(keras | {"num_batches_tracked": np.array(1000)}, **options)
    bn(batches(1)[0])
    assert (abs(bn.running_mean - 3) < 0.5).all()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.array([0.5, 0, 0]), TypeError, "integers"),
        (np.array([1, 0]), ValueError, "expected 3 values"),
        (np.array([1, 0, 6]), ValueError, "from 0 to num_batches_tracked, 5, got 0 to 6"),
        (np.array([-1, 0, 0]), ValueError, "got -1 to 0"),
    ],
)
def test_bad_counters_change_nothing(value, error, message):
    bn = BatchNorm(3, nonfinite="skip")
    bn(batches(1)[0])
    before = {name: array.tobytes() for name, array in bn.state_dict().items()}
    state = bn.state_dict() | {"num_batches_tracked": np.array(5), "num_skipped": value, "weight": np.zeros(3)}
    with pytest.raises(error, match=message):
        bn.load_state_dict(state)
    assert {name: array.tobytes() for name, array in bn.state_dict().items()} == before


@pytest.mark.filterwarnings("ignore::nbbn.NonFiniteWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_policies_when_channels_have_had_different_numbers_of_updates(backend, poison):
    """The layer then normalizes first and averages after: no policy may depend on that."""
    x = batches(1, seed=3)[0]
    bad = x.copy()
    bad[0, 0] = poison
    bn = BatchNorm(3, debias=True, nonfinite="skip")
    bn(bad)
    state = bn.state_dict()
    strict = BatchNorm.from_state_dict(state, debias=True, nonfinite="raise")
    before = strict.running_mean.tobytes(), strict.running_var.tobytes()
    with pytest.raises(FloatingPointError):
        strict(bad)
    with pytest.raises(RuntimeError, match="forward call"):
        strict.backward(bad)
    assert (strict.running_mean.tobytes(), strict.running_var.tobytes(), strict.num_batches_tracked) == (*before, 1)
    strict(x)
    assert strict.running_mean[0] == pytest.approx(x[:, 0].mean(), rel=1e-6), "its first batch"
    weight = debiased_momentum(0.1, 2)
    expected = bad[:, 1].mean() * (1 - weight) + weight * x[:, 1].mean()
    assert strict.running_mean[1] == pytest.approx(expected, rel=1e-6)


def test_debias_shows_in_the_repr_and_good_statistics_come_early():
    assert "debias=True" in repr(BatchNorm(3, debias=True))
    assert "debias" not in repr(BatchNorm(3))
    plain, debiased = BatchNorm(3), BatchNorm(3, debias=True)
    for x in batches(3):
        plain(x)
        debiased(x)
    assert (plain.running_mean < 2).all()
    assert (abs(debiased.running_mean - 5) < 1.5).all()
