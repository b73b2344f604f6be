"""Drift: the predicted change of the output against the measured one, p-values against simulation and SciPy."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

import nbbn

WIDE = np.longdouble


def moved(channels=4, seed=0, shape=(50,), dtype=np.float64, mean=0.0, std=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(shape[0], channels, *shape[1:]))
    per_channel = (1, channels) + (1,) * (len(shape) - 1)
    x = x * np.broadcast_to(std, channels).reshape(per_channel) + np.broadcast_to(mean, channels).reshape(per_channel)
    return x.astype(dtype)


def trained(channels, rng, dtype, **options):
    bn = nbbn.BatchNorm(channels, dtype=dtype, **options)
    bn.running_mean[:], bn.running_var[:] = rng.normal(size=channels), rng.uniform(0.1, 4, channels)
    if bn.affine:
        bn.weight[:], bn.bias[:] = rng.normal(size=(2, channels))
    return bn


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(50,), (6, 5, 5)])
def test_output_error_is_what_switching_the_mode_changes(backend, shape, affine, eps):
    rng = np.random.default_rng(1)
    bn = trained(4, rng, np.float64, affine=affine, eps=eps)
    x = moved(shape=shape, mean=[0, 1, -3, 0.2], std=[1, 0.1, 2, 5])
    predicted = bn.drift(x).output_error
    evaluated = bn.eval()(x)
    change = (bn.train()(x) - evaluated).astype(WIDE)
    measured = np.sqrt((change**2).mean(axis=tuple(a for a in range(x.ndim) if a != 1)))
    np.testing.assert_allclose(predicted, measured.astype(float), rtol=1e-12)


def test_output_error_in_float32_agrees_to_rounding_of_the_output():
    rng = np.random.default_rng(1)
    bn = trained(64, rng, np.float32)
    x = moved(64, shape=(16, 8, 8), dtype=np.float32, mean=rng.normal(size=64))
    predicted = bn.drift(x).output_error
    evaluated = bn.eval()(x)
    change = bn.train()(x).astype(WIDE) - evaluated
    measured = np.sqrt((change**2).mean(axis=(0, 2, 3))).astype(float)
    # each of the two outputs is within 2e-6 * (1 + |y|): what the package promises
    bound = 4e-6 * (1 + np.abs(evaluated).max(axis=(0, 2, 3)))
    assert (np.abs(predicted - measured) <= bound).all()


def test_with_a_mask_the_change_is_that_of_the_selected_values(backend):
    rng = np.random.default_rng(2)
    bn, x, where = trained(3, rng, np.float64), moved(3, shape=(8, 20)), np.arange(20) < rng.integers(1, 20, (8, 1, 1))
    found = bn.drift(x, where=where)
    y = nbbn.batch_norm(x, None, None, bn.weight, bn.bias, training=True, where=where)
    change = np.where(where, y - bn.eval()(x), 0).astype(WIDE)
    measured = np.sqrt((change**2).sum(axis=(0, 2)) / where.sum())
    np.testing.assert_allclose(found.output_error, measured.astype(float), rtol=1e-12)
    assert (found.effective_count == 8).all()


def test_output_error_does_not_cancel():
    var = 1 + 2.0**-30
    stats = nbbn.Moments(np.array([64]), np.zeros(1), np.array([64 * var]))
    found = nbbn.drift(np.zeros(1), np.ones(1), stats, eps=0.0)
    exact = np.sqrt(WIDE(var)) - 1  # sigma (1 - 1 / sigma)
    np.testing.assert_allclose(found.output_error, float(exact), rtol=1e-9)


def test_textbook_formulas():
    x = moved(mean=[0, 1, -3, 0.2], std=[1, 0.1, 2, 5])
    mean, var = np.array([0.0, 0.5, -3, 1]), np.array([1.0, 4.0, 0.25, 20])
    found = nbbn.drift(mean, var, nbbn.batch_stats(x))
    wide = x.astype(WIDE)
    batch_mean, batch_var = wide.mean(0), wide.var(0)
    np.testing.assert_allclose(found.z, ((batch_mean - mean) / np.sqrt(var)).astype(float), rtol=1e-12)
    np.testing.assert_allclose(found.log_var_ratio, np.log(batch_var / var).astype(float), rtol=1e-12)
    # KL(N(m, v) || N(mean, var)), as in textbooks
    kl = np.log(np.sqrt(var / batch_var)) + (batch_var + (batch_mean - mean) ** 2) / (2 * var) - 0.5
    np.testing.assert_allclose(found.kl, kl.astype(float), rtol=1e-10)


def test_kl_by_integration():
    stats = nbbn.Moments(np.array([10]), np.array([0.7]), np.array([3.0]))
    t = np.linspace(-12, 12, 200_001)
    p = np.exp(-((t - 0.7) ** 2) / 0.6) / np.sqrt(0.6 * np.pi)
    q = np.exp(-(t**2) / 4) / np.sqrt(4 * np.pi)
    integral = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0)) * (t[1] - t[0])
    np.testing.assert_allclose(nbbn.drift(np.zeros(1), np.full(1, 2.0), stats).kl, integral, rtol=1e-9)


# --- what is not a number, what is constant, what is not there ------------------------------------------------------


def test_poisoned_channels_come_first_and_are_no_noise():
    x = moved(5, shape=(40,))
    x[0, 1], x[0, 2] = np.nan, np.inf
    mean, var = np.zeros(5), np.ones(5)
    mean[3] = np.nan
    found = nbbn.drift(mean, var, nbbn.batch_stats(x))
    assert found.significant.tolist() == [False, True, True, True, False]
    assert set(found.worst(3).tolist()) == {1, 2, 3}
    assert "nan" in repr(found)
    assert np.isfinite(found.output_error[[0, 4]]).all()


def test_constant_channels():
    constant = nbbn.Moments(np.full(3, 10), np.array([2.0, 2.0, 2.0]), np.array([0.0, 0.0, 4.0]))
    found = nbbn.drift(np.array([2.0, 3.0, 2.0]), np.zeros(3), constant)
    assert (found.z[0], found.log_var_ratio[0], found.kl[0], found.output_error[0]) == (0, 0, 0, 0)
    assert found.significant.tolist() == [False, True, True]
    assert found.z[1] == -np.inf
    assert found.kl[2] == np.inf
    assert found.output_error[1] == pytest.approx(1 / np.sqrt(1e-5))
    dead = nbbn.drift(np.zeros(1), np.ones(1), nbbn.Moments(np.array([20]), np.zeros(1), np.zeros(1)))
    assert (dead.log_var_ratio[0], dead.kl[0], dead.p_var[0], dead.significant[0]) == (-np.inf, np.inf, 0, True)


def test_channels_without_values_have_not_moved():
    found = nbbn.drift(np.ones(2), np.ones(2), nbbn.Moments(np.array([0, 9]), np.zeros(2), np.zeros(2)))
    assert np.isnan([found.z[0], found.output_error[0], found.kl[0]]).all()
    assert not found.significant[0]
    assert repr(nbbn.drift(np.zeros(0), np.zeros(0), nbbn.Moments.zeros(0))).startswith("Drift of 0 channels: 0 sign")


def test_one_value_has_a_mean_and_no_variance():
    found = nbbn.drift(np.zeros(1), np.ones(1), nbbn.Moments(np.array([1]), np.array([9.0]), np.zeros(1)))
    assert found.p_var == 1
    assert found.p_mean == pytest.approx(2.257177e-19, rel=1e-6)  # two-sided 9 sigma


# --- what users see ---------------------------------------------------------------------------------------------------


def test_the_table_shows_the_worst_channels_first():
    stats = nbbn.Moments(np.full(30, 100), np.arange(30) / 5, np.full(30, 100.0))
    found = nbbn.drift(np.zeros(30), np.ones(30), stats)
    lines = repr(found).splitlines()
    assert lines[0].startswith("Drift of 30 channels:")
    assert [int(line.split()[0]) for line in lines[2:12]] == found.worst(10).tolist() == list(range(29, 19, -1))
    assert lines[2].endswith("*")
    assert lines[12].startswith("... 20 more channels")
    assert found.worst(99).size == 30
    assert found.worst(0).size == 0
    with pytest.raises(ValueError, match="k: expected an integer >= 0, got -1"):
        found.worst(-1)
    again = pickle.loads(pickle.dumps(found))
    assert repr(again) == repr(found)
    with pytest.raises(ValueError, match="read-only"):
        found.z[0] = 1


def test_the_plot_shows_every_channel_once():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = nbbn.BatchNorm(6).drift(moved(6, shape=(100,), mean=[0, 0, 3, 0, 0, 3]))
    _, ax = pyplot.subplots()
    assert found.plot(ax) is ax
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in ax.patches}
    assert sorted(bars) == list(range(6))
    np.testing.assert_allclose([bars[c].get_height() for c in range(6)], found.output_error)
    assert bars[2].get_facecolor() == bars[5].get_facecolor() != bars[0].get_facecolor()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["noise (4)", "significant (2)"]
    pyplot.close("all")


@pytest.mark.parametrize(
    ("missing", "call"), [("matplotlib", "found.plot()"), ("rich", "bn.recalibrate([x], progress=True)")]
)
def test_without_an_optional_library_the_error_says_which(missing, call):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import numpy as np, nbbn
bn, x = nbbn.BatchNorm(2), np.ones((4, 2), np.float32)
found = bn.drift(x)
try:
    {call}
except ModuleNotFoundError as error:
    print(error, (bn.running_mean == 0).all())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip().endswith(f"needs {missing}: pip install {missing} True"), run.stderr


def test_the_layer_s_drift_changes_nothing_and_counts_samples():
    bn = nbbn.BatchNorm(3)
    before = {name: value.tobytes() for name, value in bn.state_dict().items()}
    x = moved(3, shape=(5, 4, 4), dtype=np.float32)
    assert (bn.drift(x).effective_count == 5).all()
    assert (bn.freeze().drift(x, effective_count=80).effective_count == 80).all()
    assert (nbbn.drift(bn.running_mean, bn.running_var, nbbn.batch_stats(x)).effective_count == 80).all()
    assert {name: value.tobytes() for name, value in bn.state_dict().items()} == before
    rows = nbbn.BatchNorm(3, axis=0)
    assert (rows.drift(np.ascontiguousarray(x.swapaxes(0, 1))).effective_count == 5).all()
    assert nbbn.BatchNorm(1, axis=None).drift(x).effective_count == 5
    with pytest.raises(ValueError, match="drift: expected a layer with running statistics"):
        nbbn.BatchNorm(3, track_running_stats=False).drift(x)
    with pytest.raises(ValueError, match="x: expected 3 channels"):
        bn.drift(moved(4))


GOOD = {"running_mean": np.zeros(2), "running_var": np.ones(2), "stats": nbbn.batch_stats(np.eye(5)[:, :2])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stats": np.ones(2)}, TypeError, r"stats: expected Moments, got ndarray; pass nbbn.batch_stats\(x\)"),
        ({"running_mean": np.zeros(3)}, ValueError, "running_mean: expected 2 values"),
        (
            {"running_var": np.array([1.0, -1.0])},
            ValueError,
            r"running_var: expected values >= 0, got -1.0 in channel 1",
        ),
        ({"weight": np.zeros(3)}, ValueError, "weight: expected 2 values"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"significance": 1.0}, ValueError, "significance: expected a number between 0 and 1, got 1.0"),
        ({"significance": "high"}, TypeError, "significance"),
        ({"running_count": 0}, ValueError, "running_count: expected a number > 0, got 0"),
        ({"running_count": np.nan}, ValueError, "running_count: expected a number > 0, got nan"),
        ({"running_count": np.ones(2)}, TypeError, "running_count: expected a number"),
        ({"effective_count": 6}, ValueError, "effective_count: expected numbers from 0 to the count"),
        ({"effective_count": np.array([1.0, np.nan])}, ValueError, "effective_count"),
        ({"effective_count": np.ones(3)}, ValueError, r"effective_count: expected one number or 2, .* got \(3,\)"),
        ({"effective_count": True}, TypeError, "effective_count: expected a number"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        nbbn.drift(**(GOOD | change))
