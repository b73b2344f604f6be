"""`BatchNorm` under any sequence of calls, good and bad, against a model in plain NumPy."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import nbbn

ARRAYS = ("weight", "bias", "running_mean", "running_var")
NAMES = {
    "PyTorch": dict(zip(ARRAYS, ARRAYS, strict=True)),
    "Keras": dict(zip(ARRAYS, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True)),
    "Flax": dict(zip(ARRAYS, ("scale", "bias", "mean", "var"), strict=True)),
}


class Model:
    """Batch normalization as a textbook has it, in float64; channels last."""

    def __init__(self, channels, affine, track, momentum, eps, nonfinite):
        self.channels, self.affine, self.track = channels, affine, track
        self.momentum, self.eps, self.nonfinite = momentum, eps, nonfinite
        self.arrays = {}
        if affine:
            self.arrays |= {"weight": np.ones(channels), "bias": np.zeros(channels)}
        if track:
            self.arrays |= {"running_mean": np.zeros(channels), "running_var": np.ones(channels)}
        self.count, self.training, self.frozen, self.last = 0, True, False, None

    def normalize(self, x, mean, var):
        y = (x - mean) / np.sqrt(var + self.eps)
        return y * self.arrays["weight"] + self.arrays["bias"] if self.affine else y

    def forward(self, x):
        """The result, or the class of the error."""
        trains = self.training and not self.frozen
        if not trains and self.track:
            mean, var = self.arrays["running_mean"].copy(), self.arrays["running_var"].copy()
            self.last = x, mean, var, False
            return self.normalize(x, mean, var)
        if len(x) == 1:
            return ValueError
        if len(x) == 0:
            self.last = x, np.zeros(self.channels), np.full(self.channels, np.nan), True
            return x
        mean, var = x.mean(0), x.var(0)
        finite = np.isfinite(mean) & np.isfinite(var)
        if self.nonfinite == "raise" and not finite.all():
            return FloatingPointError
        if trains and self.track:
            self.count += 1
            rate = 1 / self.count if self.momentum is None else self.momentum
            moves = finite if self.nonfinite == "skip" else np.ones(self.channels, bool)
            for name, new in (("running_mean", mean), ("running_var", x.var(0, ddof=1))):
                old = self.arrays[name]
                moved = old if rate == 0 else new if rate == 1 else old + rate * (new - old)
                self.arrays[name] = np.where(moves, moved, old)
        self.last = x, mean, var, True
        return self.normalize(x, mean, var)

    def backward(self, g):
        x, mean, var, through = self.last
        inv_std = 1 / np.sqrt(var + self.eps)
        x_hat = (x - mean) * inv_std
        scaled = g * self.arrays["weight"] if self.affine else g
        if through and len(x):
            dx = (scaled - scaled.mean(0) - x_hat * (scaled * x_hat).mean(0)) * inv_std
        else:
            dx = scaled * inv_std
        return dx, (g * x_hat).sum(0), g.sum(0)


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= 1e-6 * (1 + np.abs(b) + np.abs(b[np.isfinite(b)]).max(initial=0))
    return a.shape == b.shape and bool((near | (~np.isfinite(a) & ~np.isfinite(b))).all())


class Machine(RuleBasedStateMachine):
    @initialize(
        channels=st.integers(1, 4),
        affine=st.booleans(),
        track=st.sampled_from([True, True, True, False]),
        momentum=st.sampled_from([0.1, None, 0.0, 1.0, 0.5]),
        eps=st.sampled_from([1e-5, 1e-3]),
        nonfinite=st.sampled_from(["propagate", "skip", "raise"]),
        first=st.booleans(),
    )
    def start(self, channels, affine, track, momentum, eps, nonfinite, first):
        if momentum is None and nonfinite == "skip":
            nonfinite = "raise"
        self.model = Model(channels, affine, track, momentum, eps, nonfinite)
        # float64, so that tolerances need no thought; the channel axis first or last
        options = {"axis": 0 if first else -1, "dtype": np.float64, "nonfinite": nonfinite}
        self.layer = nbbn.BatchNorm(channels, eps, momentum, affine, track, **options)
        self.first = first
        self.frozen_backward = False

    def data(self, rows, seed, channels=None):
        """An array for the model (rows, channels), and the same for the layer."""
        channels = channels or self.model.channels
        x = np.random.default_rng(seed).normal(seed % 3, 1 + seed % 2, (rows, channels))
        return x, np.ascontiguousarray(x.T) if self.first else x

    def snapshot(self):
        return pickle.dumps([self.layer.state_dict(), self.layer.training, self.layer.frozen])

    def refused(self, error, call):
        before = self.snapshot()
        with pytest.raises(error):
            call()
        assert self.snapshot() == before

    # --- modes ----------------------------------------------------------------------------------------------------

    @rule(mode=st.booleans())
    def train(self, mode):
        assert self.layer.train(mode) is self.layer
        self.model.training = mode

    @rule()
    def eval(self):
        self.layer.eval()
        self.model.training = False

    @rule()
    def freeze(self):
        if self.model.track:
            self.layer.freeze()
            self.model.frozen = True
        else:
            self.refused(ValueError, self.layer.freeze)

    @rule()
    def unfreeze(self):
        self.layer.unfreeze()
        self.model.frozen = False

    # --- forward and backward -------------------------------------------------------------------------------------

    @rule(
        rows=st.sampled_from([0, 1, 2, 3, 7, 40]),
        seed=st.integers(0, 99),
        poison=st.sampled_from([None] * 9 + [np.nan]),
    )
    def forward(self, rows, seed, poison):
        x, given = self.data(rows, seed)
        if poison is not None and rows:
            x[-1, 0] = given.flat[given.shape[1] - 1 if self.first else -self.model.channels] = poison
        with np.errstate(all="ignore"):
            expected = self.model.forward(x)
        if isinstance(expected, type):
            self.model.last = None
            return self.refused(expected, lambda: self.layer(given))
        skips = self.model.nonfinite == "skip" and poison is not None and rows
        moved = skips and self.model.last[3] and self.model.track and self.model.training and not self.model.frozen
        if moved:
            with pytest.warns(nbbn.NonFiniteWarning, match="1 of"):
                y = self.layer(given)
        else:
            y = self.layer(given)
        self.frozen_backward = self.model.frozen
        assert close(y.T if self.first else y, expected)
        return None

    @rule(seed=st.integers(0, 99))
    def backward(self, seed):
        if self.model.last is None:
            self.refused(RuntimeError, lambda: self.layer.backward(self.data(3, seed)[1]))
            return
        g, given = self.data(len(self.model.last[0]), seed)
        with np.errstate(all="ignore"):
            dx, dw, db = self.model.backward(g)
        got = self.layer.backward(given)
        assert close(got.T if self.first else got, dx)
        if self.model.affine and not self.frozen_backward:
            assert close(self.layer.grad_weight, dw)
            assert close(self.layer.grad_bias, db)
        else:
            assert self.layer.grad_weight is self.layer.grad_bias is None

    @rule(bad=st.sampled_from(["channels", "list", "complex", "one axis"]), seed=st.integers(0, 99))
    def bad_forward(self, bad, seed):
        _, x = self.data(4, seed)
        x, error = {
            "channels": (self.data(4, seed, self.model.channels + 1)[1], ValueError),
            "list": (x.tolist(), TypeError),
            "complex": (x.astype(complex), TypeError),
            "one axis": (x[0], ValueError),
        }[bad]
        self.model.last = None
        self.refused(error, lambda: self.layer(x))

    @precondition(lambda self: self.model.last is not None)
    @rule(seed=st.integers(0, 99))
    def bad_backward(self, seed):
        _, g = self.data(len(self.model.last[0]) + 1, seed)
        self.refused(ValueError, lambda: self.layer.backward(g))

    # --- state ----------------------------------------------------------------------------------------------------

    @rule(seed=st.integers(0, 99), names=st.sampled_from(list(NAMES)), count=st.sampled_from([None, 0, 7]))
    def load(self, seed, names, count):
        values = {name: np.random.default_rng(seed).random(self.model.channels) for name in self.model.arrays}
        if not values:
            return
        given = {NAMES[names][name]: value.astype(np.float64) for name, value in values.items()}
        if self.model.momentum is None and count is None:
            count = 3  # a cumulative average does not load statistics without one
        if count is not None and self.model.track:  # a layer without statistics does not hand it on
            given["num_batches_tracked"] = np.array(count)
            self.model.count = count
        assert self.layer.load_state_dict(given) is self.layer
        self.model.arrays = {name: value.copy() for name, value in values.items()}
        for value in given.values():
            value += 1  # what was loaded is a copy
        self.model.last = None

    @rule(bad=st.sampled_from(["missing", "unknown", "size", "text", "twice", "count"]), seed=st.integers(0, 99))
    def bad_load(self, bad, seed):
        values = {name: np.random.default_rng(seed).random(self.model.channels) for name in self.model.arrays}
        if not values:
            return
        last = next(reversed(values))
        if bad == "missing":
            del values[last]
        elif bad == "unknown":
            values["momentum"] = np.ones(1)
        elif bad == "size":
            values[last] = np.ones(self.model.channels + 1)
        elif bad == "text":
            values[last] = np.array(["a"] * self.model.channels)
        elif bad == "twice":
            values[NAMES["Keras"][last]] = values[last]
        else:
            values["num_batches_tracked"] = np.array(-1)
        self.refused((ValueError, TypeError), lambda: self.layer.load_state_dict(values))

    @rule(sizes=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
    def recalibrate(self, sizes, seed):
        pairs = [self.data(size, seed + k) for k, size in enumerate(sizes)]
        call = lambda: self.layer.recalibrate(given for _, given in pairs)  # noqa: E731
        if not self.model.track:
            self.refused(ValueError, call)
        elif self.model.frozen:
            self.refused(RuntimeError, call)
        elif not sum(sizes):
            self.refused(ValueError, call)
        else:
            call()
            whole = np.concatenate([x for x, _ in pairs])
            self.model.arrays |= {"running_mean": whole.mean(0), "running_var": whole.var(0)}
            self.model.count = sum(size > 0 for size in sizes)

    @rule(at=st.integers(0, 3), seed=st.integers(0, 99), wrong=st.booleans())
    def bad_recalibrate(self, at, seed, wrong):
        def batches():
            for _ in range(at):
                yield self.data(5, seed)[1]
            if wrong:
                yield self.data(5, seed, self.model.channels + 1)[1]
            raise KeyError("no more")

        self.refused((KeyError, ValueError, RuntimeError), lambda: self.layer.recalibrate(batches()))

    @rule(how=st.sampled_from(["pickle", "deepcopy", "from_state_dict"]))
    def replace(self, how):
        """By a copy, which has all but the last forward call."""
        old, m = self.layer, self.model
        if how == "pickle":
            self.layer = pickle.loads(pickle.dumps(old))
        elif how == "deepcopy":
            self.layer = copy.deepcopy(old)
        elif m.arrays:
            options = {"axis": old.axis, "momentum": m.momentum, "eps": m.eps, "nonfinite": m.nonfinite}
            self.layer = nbbn.BatchNorm.from_state_dict(old.state_dict(), **options).train(m.training)
            if m.frozen:
                self.layer.freeze()
        else:
            return
        m.last = None
        for name in m.arrays:
            assert not np.shares_memory(getattr(old, name), getattr(self.layer, name))

    @precondition(lambda self: self.model.affine)
    @rule(factor=st.sampled_from([0.5, 2.0, -1.0, 0.0]))
    def step(self, factor):
        """A parameter changed in place, as training does."""
        self.layer.weight *= factor
        self.model.arrays["weight"] = self.model.arrays["weight"] * factor

    # --- what is always so ----------------------------------------------------------------------------------------

    @invariant()
    def same(self):
        if not hasattr(self, "model"):
            return
        m, bn = self.model, self.layer
        assert (bn.training, bn.frozen) == (m.training, m.frozen)
        state = bn.state_dict()
        counts = ["num_batches_tracked", "num_skipped"] if m.nonfinite == "skip" else ["num_batches_tracked"]
        assert set(state) == {*m.arrays, *(counts if m.track else [])}
        for name, value in m.arrays.items():
            assert close(state[name], value), name
            assert state[name].dtype == np.float64
        assert bn.num_batches_tracked == m.count
        assert f"mode={'frozen' if m.frozen else 'training' if m.training else 'evaluation'}" in repr(bn)


def explore(examples, steps):
    quiet = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Machine, settings=quiet)


def test_any_sequence_of_calls_as_the_model():
    explore(60, 30)


@pytest.mark.nightly
def test_any_long_sequence_of_calls_as_the_model():
    explore(1500, 60)
