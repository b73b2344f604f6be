import copy
import pickle

import numpy as np
import pytest

import nbbn
from nbbn import BatchNorm


def data(n=64, channels=3, seed=0, loc=2.0, scale=3.0):
    return np.random.default_rng(seed).normal(loc, scale, (n, channels)).astype(np.float32)


def snapshot(bn):
    return {name: value.tobytes() for name, value in bn.state_dict().items()}


def test_training_normalizes_with_the_batch_and_moves_the_running_statistics(backend):
    bn, x = BatchNorm(3, momentum=0.25), data()
    y = bn(x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-4)
    np.testing.assert_allclose(bn.running_mean, 0.25 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, 0.75 + 0.25 * x.var(0, ddof=1), rtol=1e-5)
    assert bn.num_batches_tracked == 1


def test_evaluation_uses_running_statistics_and_never_writes(backend):
    bn = BatchNorm(3)
    for seed in range(20):
        bn(data(seed=seed))
    before = snapshot(bn.eval())
    x = data(seed=99)
    y = bn(x)
    assert (y == nbbn.normalize(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)).all()
    assert (bn(x[:1]) == y[:1]).all()
    bn(np.full_like(x, np.nan))
    bn.backward(x)
    assert snapshot(bn) == before


def test_freeze_survives_train(backend):
    bn = BatchNorm(3)
    bn(data())
    before, x = snapshot(bn), data(seed=1, loc=50)
    expected = bn.eval()(x)
    for frozen in (bn.freeze(), bn.train(), bn.train(True), bn.eval().train()):
        assert frozen is bn
        assert bn.frozen
        assert bn(x).tobytes() == expected.tobytes()
        bn(x[:1])
        bn.backward(x[:1])
        assert snapshot(bn) == before
        assert bn.grad_weight is bn.grad_bias is None
    assert bn.training
    bn.unfreeze()(x)
    assert snapshot(bn) != before
    assert bn.backward(x) is not None
    assert bn.grad_weight.shape == (3,)


def test_frozen_layers_refuse_to_recalibrate_and_untracked_ones_to_freeze():
    bn = BatchNorm(3).freeze()
    with pytest.raises(RuntimeError, match="unfreeze"):
        bn.recalibrate([data()])
    untracked = BatchNorm(3, track_running_stats=False)
    with pytest.raises(ValueError, match="freeze: expected a layer with running statistics"):
        untracked.freeze()
    with pytest.raises(ValueError, match="recalibrate: expected a layer with running statistics"):
        untracked.recalibrate([data()])


def test_without_running_statistics_the_batch_normalizes_in_evaluation_too(backend):
    bn, x = BatchNorm(3, track_running_stats=False), data()
    assert (bn(x) == bn.eval()(x)).all()
    assert bn.running_mean is bn.running_var is None
    assert bn.num_batches_tracked == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(x[:1])


def test_cumulative_average(backend):
    bn = BatchNorm(3, momentum=None)
    batches = [data(seed=s, n=8 + s) for s in range(5)]
    for batch in batches:
        bn(batch)
    np.testing.assert_allclose(bn.running_mean, np.mean([b.mean(0) for b in batches], 0), rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, np.mean([b.var(0, ddof=1) for b in batches], 0), rtol=1e-5)
    assert bn.num_batches_tracked == 5


def test_a_failed_or_empty_training_call_changes_nothing():
    bn = BatchNorm(3, nonfinite="raise")
    before = snapshot(bn)
    poisoned = data()
    poisoned[3, 1] = np.nan
    for x, error in [
        (data()[:1], ValueError),
        (data(channels=4), ValueError),
        (poisoned, FloatingPointError),
        (data().astype(int), TypeError),
        ([[1.0]], TypeError),
        (np.float32(1), TypeError),
    ]:
        bn.eval()(data())
        with pytest.raises(error):
            bn.train()(x)
        assert snapshot(bn) == before
        with pytest.raises(RuntimeError, match="expected a forward call before that did not raise"):
            bn.backward(data())  # not the gradients of the call before
    assert bn(np.empty((0, 3), np.float32)).shape == (0, 3)
    assert snapshot(bn) == before
    with pytest.raises(RuntimeError, match="backward: expected a forward call"):
        BatchNorm(3).backward(data())


def test_one_value_per_channel_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel when training, got input shape \(1, 3\); use eval"
    ):
        BatchNorm(3)(data(n=1))
    assert BatchNorm(3)(np.ones((1, 3, 2, 2), np.float32)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
@pytest.mark.parametrize("affine", [True, False])
def test_backward_matches_finite_differences(backend, mode, affine):
    rng = np.random.default_rng(0)
    bn = BatchNorm(3, dtype=np.float64, affine=affine, eps=1e-3)
    bn(rng.normal(1, 2, (50, 3, 2)))
    if affine:
        bn.weight[:], bn.bias[:] = rng.normal(size=(2, 3))
    getattr(bn, mode)()
    x, g = rng.normal(1, 2, (6, 3, 2)), rng.normal(size=(6, 3, 2))
    state = bn.state_dict()

    def loss(x, weight=None, bias=None):
        probe = BatchNorm.from_state_dict(state, eps=1e-3, affine=affine)
        if weight is not None:
            probe.weight[:], probe.bias[:] = weight, bias
        getattr(probe, mode)()
        return (probe(x) * g).sum()

    def numeric(f, values, h=1e-5):
        result = np.zeros_like(values)
        for i in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[i] = h
            result[i] = (f(values + step) - f(values - step)) / (2 * h)
        return result

    bn(x)
    np.testing.assert_allclose(bn.backward(g), numeric(loss, x), rtol=1e-6, atol=1e-8)
    if affine and mode != "freeze":
        np.testing.assert_allclose(bn.grad_weight, numeric(lambda w: loss(x, w, bn.bias), bn.weight.copy()), rtol=1e-6)
        np.testing.assert_allclose(bn.grad_bias, numeric(lambda b: loss(x, bn.weight, b), bn.bias.copy()), rtol=1e-6)
    else:
        assert bn.grad_weight is bn.grad_bias is None


def test_backward_uses_the_statistics_of_its_forward_call(backend):
    bn, x = BatchNorm(3).eval(), data()
    bn(x)
    expected = bn.backward(x)
    bn.running_var[:] = 100
    assert (bn.backward(x) == expected).all()
    bn.train()
    assert (bn.backward(x) == expected).all(), "the mode of the forward call counts"


def test_recalibrate_is_the_population_of_uneven_batches(backend):
    x = data(n=101)
    bn = BatchNorm(3)
    bn(data(seed=5))
    assert bn.recalibrate(iter(np.split(x, [1, 2, 60]))) is bn
    np.testing.assert_allclose(bn.running_mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, x.var(0), rtol=1e-6)
    assert bn.num_batches_tracked == 4


def failing():
    yield data()
    raise OSError("disk")


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (failing(), OSError),
        ([], ValueError),
        ([np.empty((0, 3), np.float32)], ValueError),
        ([data(), data(channels=2)], ValueError),
        ([data(), [1, 2]], TypeError),
    ],
)
def test_a_recalibration_that_fails_half_way_changes_nothing(batches, error):
    bn = BatchNorm(3)
    before = snapshot(bn)
    with pytest.raises(error):
        bn.recalibrate(batches)
    assert snapshot(bn) == before


def test_recalibrate_wants_batches_and_counts_those_with_values():
    x = data()
    for bad in (x, None, 3):
        with pytest.raises(TypeError, match=r"batches: expected an iterable of arrays, got .*pass \[x\]"):
            BatchNorm(3).recalibrate(bad)
    assert BatchNorm(3).recalibrate([x, x[:0], x]).num_batches_tracked == 2


@pytest.mark.parametrize(
    "call", [lambda bn: bn.recalibrate([data()]), lambda bn: bn.load_state_dict(BatchNorm(3).state_dict())]
)
def test_read_only_statistics_are_found_before_anything_is_written(call):
    bn = BatchNorm(3)
    bn(data())
    bn.running_var.flags.writeable = False
    before = snapshot(bn)
    with pytest.raises(ValueError, match="running_var: expected a writable array"):
        call(bn)
    assert snapshot(bn) == before


def test_copies_leave_the_last_input_behind():
    bn = BatchNorm(3)
    bn(data(n=10_000))
    assert len(pickle.dumps(bn)) < 2000
    for copied in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert snapshot(copied) == snapshot(bn)
        copied(data(seed=3))
    assert bn.backward(data(n=10_000)) is not None


def test_recalibrate_and_nan():
    poisoned = np.full((4, 3), np.nan, np.float32)
    with pytest.raises(FloatingPointError):
        BatchNorm(3, nonfinite="skip").recalibrate([poisoned])
    assert np.isnan(BatchNorm(3).recalibrate([poisoned]).running_mean).all()


def test_state_dict_round_trip_and_copies():
    bn = BatchNorm(3)
    bn(data())
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    other = BatchNorm(3)
    assert other.load_state_dict(state) is other
    assert snapshot(other) == snapshot(bn)
    state["weight"][:] = 7
    assert (bn.weight == 1).all()
    assert (other.weight == 1).all()
    loaded = BatchNorm.from_state_dict(
        {f"net.bn.{k}": v for k, v in bn.state_dict().items()} | {"net.fc": 0}, "net.bn."
    )
    assert snapshot(loaded) == snapshot(bn)
    assert loaded.training


@pytest.mark.parametrize(
    "names", [("gamma", "beta", "moving_mean", "moving_variance"), ("scale", "bias", "mean", "var")]
)
def test_keras_and_flax_names(names):
    values = [np.arange(3, dtype=np.float32) + k for k in range(4)]
    bn = BatchNorm.from_state_dict(dict(zip(names, values, strict=True)))
    for mine, value in zip((bn.weight, bn.bias, bn.running_mean, bn.running_var), values, strict=True):
        assert (mine == value).all()
    assert bn.eps == (1e-3 if "gamma" in names else 1e-5)
    assert BatchNorm.from_state_dict(dict(zip(names, values, strict=True)), eps=0.5).eps == 0.5


def test_which_options_a_state_dict_implies():
    statistics = {"running_mean": np.zeros(2), "running_var": np.ones(2)}
    bn = BatchNorm.from_state_dict(statistics)
    assert (bn.affine, bn.track_running_stats, bn.running_mean.dtype) == (False, True, np.float64)
    bn = BatchNorm.from_state_dict({"weight": np.zeros(2, np.float32), "bias": np.ones(2, np.float32)})
    assert (bn.affine, bn.track_running_stats, bn.weight.dtype) == (True, False, np.float32)


GOOD = {k: np.ones(3) for k in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (3, TypeError, "expected a mapping"),
        ({1: np.ones(3)}, TypeError, "expected names as keys"),
        ({}, ValueError, "expected entries"),
        (GOOD | {"foo": np.ones(3)}, ValueError, "'foo'"),
        (GOOD | {"gamma": np.ones(3)}, ValueError, "two names"),
        ({k: v for k, v in GOOD.items() if k != "bias"}, ValueError, "expected .*bias"),
        (GOOD | {"bias": np.ones(4)}, ValueError, r"state_dict\['bias'\]: expected 3 values"),
        (GOOD | {"bias": np.ones((1, 3))}, ValueError, "shape"),
        (GOOD | {"bias": np.ones(3, complex)}, TypeError, "real numbers"),
        (GOOD | {"bias": "abc"}, TypeError, "real numbers"),
        (GOOD | {"bias": np.full(3, 1e300)}, ValueError, "values that float32 can hold"),
        (GOOD | {"bias": np.ma.ones(3)}, TypeError, "masked"),
        (GOOD | {"bias": [[1], [1, 2]]}, TypeError, "expected an array"),
        (GOOD | {"num_batches_tracked": np.array(-1)}, ValueError, "one integer >= 0"),
        (GOOD | {"num_batches_tracked": np.array(0.5)}, ValueError, "one integer >= 0"),
    ],
)
def test_bad_state_dicts_change_nothing(state, error, message):
    bn = BatchNorm(3)
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        bn.load_state_dict(state)
    assert snapshot(bn) == before
    if isinstance(state, dict) and state and all(isinstance(k, str) for k in state):
        with pytest.raises((TypeError, ValueError)):
            BatchNorm.from_state_dict(state, affine=True, dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features: expected an integer >= 1, got 0"),
        ({"num_features": 2.5}, ValueError, "num_features"),
        ({"eps": -1}, ValueError, "eps: expected a finite number >= 0, got -1"),
        ({"eps": "small"}, TypeError, "eps"),
        ({"momentum": 1.5}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"momentum": 0.1, "decay": 0.9}, ValueError, "momentum, decay"),
        ({"momentum": None, "decay": 0.9}, ValueError, "momentum, decay"),
        ({"decay": -0.1}, ValueError, "decay: expected a number in"),
        ({"affine": 1}, TypeError, "affine: expected True or False, got 1"),
        ({"axis": 1.5}, TypeError, "axis: expected an integer or None"),
        ({"axis": None}, ValueError, "num_features: expected 1 with axis=None"),
        ({"dtype": np.float16}, TypeError, "dtype: expected float32 or float64"),
        ({"like": [1.0]}, TypeError, "like: expected a NumPy array, got list"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"debias": True, "momentum": None}, ValueError, "debias: .* beside momentum=None .*, got True"),
        ({"debias": 1}, TypeError, "debias: expected True or False, got 1"),
        ({"dtype": None}, TypeError, "dtype"),
        ({"dtype": "foo"}, TypeError, "dtype"),
    ],
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**({"num_features": 3} | options))
    with pytest.raises(TypeError, match="mode: expected True or False"):
        BatchNorm(3).train("yes")


def test_decay_and_axis():
    x = np.moveaxis(data(n=30).reshape(10, 3, 3), 1, -1)
    a, b = BatchNorm(3, momentum=0.25, axis=-1), BatchNorm(3, decay=0.75, axis=2)
    assert (a(x) == b(x)).all()
    assert snapshot(a) == snapshot(b)
    whole = BatchNorm(1, axis=None, like=x)
    np.testing.assert_allclose(whole(x).std(), 1, rtol=1e-4)


def test_repr_says_mode_and_settings():
    bn = BatchNorm(3, momentum=None, affine=False, nonfinite="raise")
    assert "mode=training" in repr(bn)
    assert "mode=evaluation" in repr(bn.eval())
    assert "mode=frozen" in repr(bn.freeze())
    for part in (
        "BatchNorm(3",
        "eps=1e-05",
        "momentum=None",
        "axis=1",
        "affine=False",
        "'raise'",
        "num_batches_tracked=0",
    ):
        assert part in repr(bn)
    assert "\n" not in repr(bn)
    assert "no running statistics" in repr(BatchNorm(3, track_running_stats=False))
