"""NumPy's settings for floating-point errors change nothing, whatever the values: results are IEEE's, silently."""

import warnings

import numpy as np
import pytest

import nbbn

RNG = np.random.default_rng(0)
X = np.concatenate([RNG.standard_normal((12, 4)), np.array([[1e30, 1e-30, -0.0, 7.0], [-3e38, 1e-40, 0.0, 7.0]])])
X = X.astype(np.float32) * np.array([1, 1e-38, 1, 1], np.float32)
BROKEN = np.where(X == 7, np.inf, X).astype(np.float32)
TINY, HUGE = np.array([1e-310, 1e300, 0.0, 1.0]), np.array([1e300, 1e-300, 5e-324, 1e10])
RUNNING = {"ordinary": (np.zeros(4), np.ones(4)), "tiny": (np.ones(4), TINY), "huge": (HUGE, HUGE)}


def stats():
    return nbbn.Moments(
        np.array([3, 1, 0, 10**15]), np.array([1e300, 0.0, 0.0, -1e300]), np.array([5e-324, 0, 0, 1e308])
    )


def layer(x, **options):
    bn = nbbn.BatchNorm(4, **options)
    bn(x)
    dx = bn.backward(X)
    return (bn.running_mean, bn.running_var, bn.eval()(x), dx, bn.grad_weight, bn.grad_bias)


def recalibrated(**options):
    bn = nbbn.BatchNorm(4, **options).recalibrate([X, X[:3]])
    return bn.running_mean, bn.running_var


def updated(mean, var, **options):
    running = mean.copy(), var.copy()
    nbbn.ema_update(*running, nbbn.batch_stats(X), **options)
    return running


def trained(dtype, **options):
    running = np.zeros(4, dtype), np.ones(4, dtype)
    return (nbbn.batch_norm(X, *running, training=True, **options), *running)


def found(mean, var, **options):
    report = nbbn.drift(mean, var, stats(), **options)
    return report.z, report.kl, report.output_error, report.p_mean, report.p_var, report.significant, repr(report)


def folded(mean, var, **options):
    w = np.array([1e-300, 1.0, 1e300, 0.0])[:, None]
    error = nbbn.folding_error(w, None, mean, var, 1e-320, np.full(4, 1e10), **options)
    return error.error, error.mean_over_std, error.ill_conditioned, repr(error)


def loaded(values):
    bn = nbbn.BatchNorm(4).load_state_dict(dict.fromkeys(("weight", "bias", "running_mean", "running_var"), values))
    return tuple(bn.state_dict().values())


CALLS = {
    "batch_stats": lambda: [(m.mean, m.m2, m.var(), m.std(1)) for m in map(nbbn.batch_stats, (X, BROKEN))],
    "merge": lambda: [(m.mean, m.m2) for m in (stats() + stats(), stats() - stats(), stats() + nbbn.batch_stats(X))],
    "normalize": lambda: [nbbn.normalize(X, *running) for running in RUNNING.values()],
    "ema_update": lambda: [updated(*running) for running in RUNNING.values()],
    "batch_norm": lambda: [trained(dtype, ddof=ddof) for dtype in ("f4", "f8") for ddof in (0, 1)],
    "layer": lambda: [layer(x) for x in (X, BROKEN)],
    "layer, raise": lambda: layer(X, nonfinite="raise", dtype=np.float64),
    "layer, skip": lambda: layer(X, nonfinite="skip"),
    "layer, skipping": lambda: layer(BROKEN, nonfinite="skip", dtype="f8"),
    "layer, average": lambda: layer(X, momentum=None),
    "recalibrate": lambda: [recalibrated(), recalibrated(nonfinite="skip", dtype="f8")],
    "load_state_dict": lambda: loaded(np.array([1e-310, 1e-42, 0.0, 1e38])),
    "drift": lambda: [found(*running, weight=HUGE, running_count=1e-310) for running in RUNNING.values()],
    "folding_error": lambda: [folded(m, np.minimum(v, 1e300)) for m, v in RUNNING.values()],
    "folding_error, float16": lambda: [folded(*running, dtype="f2") for running in RUNNING.values()],
    "check_running_stats": lambda: [repr(nbbn.check_running_stats(*r, stats=stats())) for r in RUNNING.values()],
    "to population": lambda: nbbn.sample_to_population_var(TINY, 3),
    "to sample": lambda: nbbn.population_to_sample_var(HUGE * 1.7e8, 2),
    "expected_noise": lambda: nbbn.expected_noise(1e-300, 10**9, step=1),
}  # fmt: skip


def as_bytes(results):
    if isinstance(results, np.ndarray):
        return results.tobytes()
    return [as_bytes(r) for r in results] if isinstance(results, (list, tuple)) else results


@pytest.mark.parametrize("name", CALLS)
def test_the_same_whatever_the_settings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nbbn.NonFiniteWarning)
        with np.errstate(all="ignore"):
            expected = as_bytes(CALLS[name]())
        for settings in ("warn", "raise"):
            with np.errstate(all=settings):
                assert as_bytes(CALLS[name]()) == expected
