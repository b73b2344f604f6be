"""Every backend module exports the contract, and gives the same answers to the same cases."""

import inspect
from importlib import import_module

import numpy as np
import oracle
import pytest

from nbbn import backends
from nbbn.backends import Backend, RunningUpdate, empty_moments

#: The third, nbbn.cuda, runs the same cases on device arrays: tests/cudasim, tests/test_cuda_gpu.py.
MODULES = sorted(set(backends._MODULES.values()) - {"nbbn.cuda"})
FUNCTIONS = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")]

# canonical (outer, channels, inner) shapes: rows, columns, folded columns with a tail, chunks, single rows
SHAPES = [
    (1, 1, 1), (2, 1, 1), (1, 5, 1), (7, 3, 1), (700, 3, 1), (1100, 5, 1), (600, 600, 1), (33000, 2, 1),
    (4, 3, 9), (70, 30, 49), (3, 2, 95), (3, 2, 96), (5, 3, 1025), (2, 2, 70000), (1, 1, 140001), (130, 2, 600),
]  # fmt: skip


@pytest.fixture(params=MODULES)
def module(request):
    return import_module(request.param)


def arrays(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, grad, residual = (rng.standard_normal(shape).astype(dtype) + dtype(k) for k in (3, 0, 0))
    weight, bias = rng.standard_normal((2, shape[1]))
    return x, grad, residual, weight, bias


def tolerance(dtype, expected):
    return 16 * np.finfo(dtype).eps * (1 + np.abs(expected))


@pytest.mark.parametrize("name", backends._MODULES.values())
def test_the_contract_is_exported(name):
    module = import_module(name)
    assert len(FUNCTIONS) == 7
    for function in FUNCTIONS:
        wanted = [p for p in inspect.signature(getattr(Backend, function)).parameters if p != "self"]
        assert list(inspect.signature(getattr(module, function)).parameters) == wanted, function
    assert isinstance(module.name, str)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_affine_train(module, shape, dtype):
    x, _, residual, weight, bias = arrays(shape, dtype)
    count, mean, m2 = empty_moments(shape[1])
    module.moments(x, None, count, mean, m2)
    n, wanted_mean, wanted_var = oracle.stats(x)
    assert (count == n).all()
    assert (np.abs(mean - wanted_mean) <= 1e-6 * np.sqrt(wanted_var)).all()
    assert (np.abs(m2 - n * wanted_var) <= 2e-6 * n * wanted_var).all()

    for added, relu in ((None, False), (residual, True)):
        out = np.full_like(x, np.nan)
        module.affine(x, mean, m2 / count, weight, bias, 1e-3, added, relu, out)
        expected = oracle.normalize(x, mean, m2 / count, weight, bias, 1e-3, residual=added, relu=relu)
        assert (np.abs(out - expected) <= tolerance(dtype, expected)).all()

        trained = np.full_like(x, np.nan)
        fresh = empty_moments(shape[1])
        running = RunningUpdate(np.zeros(shape[1]), np.ones(shape[1]), 0.25, 0, False)
        assert module.train(x, weight, bias, 1e-3, added, relu, trained, *fresh, running) == 0
        for a, b in zip(fresh, (count, mean, m2), strict=True):
            assert (a == b).all()
        assert (trained == out).all(), "one fused call gives the same bits as the steps"
        np.testing.assert_allclose(running.running_mean, 0.25 * mean, rtol=1e-14, atol=1e-300)
        np.testing.assert_allclose(running.running_var, 1 + 0.25 * (m2 / count - 1), rtol=1e-14)

        in_place = x.copy()
        module.train(in_place, weight, bias, 1e-3, added, relu, in_place, *empty_moments(shape[1]), None)
        assert (in_place == out).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_moments(module, shape, dtype):
    x = arrays(shape, dtype)[0]
    where = np.random.default_rng(4).random(shape) < 0.5
    where[:, 0] = False
    count, mean, m2 = empty_moments(shape[1])
    module.moments(np.where(where, x, np.nan), where, count, mean, m2)
    n, wanted_mean, wanted_var = oracle.stats(x, where=where)
    assert (count == n).all()
    assert (count[0], mean[0], m2[0]) == (0, 0, 0)
    assert (np.abs(mean - wanted_mean) <= 1e-6 * np.sqrt(wanted_var)).all()
    assert (np.abs(m2 - n * wanted_var) <= 2e-6 * n * wanted_var).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(module, shape, dtype, training):
    x, grad, _, weight, _ = arrays(shape, dtype)
    _, mean, var = (np.asarray(a, np.float64) for a in oracle.stats(x))
    n = x.size // shape[1]
    for w in (weight, None):
        results = np.full_like(x, np.nan), np.full(shape[1], np.nan), np.full(shape[1], np.nan)
        module.backward(grad, x, mean, var, w, 1e-3, training, *results)
        expected = oracle.backward(grad, x, mean, var, w, 1e-3, training=training)
        scale = 1 + np.max((1 if w is None else np.abs(w)) / np.sqrt(var + 1e-3))  # terms this large cancel
        for got, wanted, bound in zip(results, expected, (scale, np.sqrt(n), np.sqrt(n)), strict=True):
            assert (np.abs(got - wanted) <= bound * tolerance(dtype, wanted)).all()
        for target in ("grad", "x"):
            inputs = {"grad": grad.copy(), "x": x.copy()}
            out = inputs[target]
            module.backward(inputs["grad"], inputs["x"], mean, var, w, 1e-3, training, out, *results[1:])
            assert (out == results[0]).all(), f"in place on {target}"


def test_ema_merge_remove(module):
    def record(*values):
        return np.array(values[0], np.int64), np.array(values[1], float), np.array(values[2], float)

    a, b = record([0, 2, 3], [0, 1, 5], [0, 2, 8]), record([4, 0, 1], [2, 0, 9], [3, 0, 0])
    both = empty_moments(3)
    module.merge(*a, *b, *both)
    assert both[0].tolist() == [4, 2, 4]
    assert both[1].tolist() == [2, 1, 6]
    assert both[2].tolist() == [3, 2, 8 + 16 * 3 / 4]
    rest = empty_moments(3)
    module.remove(*both, *b, *rest)
    for got, wanted in zip(rest, a, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-14)

    running = RunningUpdate(np.zeros(3, np.float32), np.ones(3, np.float32), 0.5, 1, True)
    batch = record([4, 0, 4], [2, 9, np.nan], [3, 9, 1])
    assert module.ema(*batch, running) == 1
    assert running.running_mean.tolist() == [1, 0, 0]
    assert running.running_var.tolist() == [1, 1, 1]


def test_strided_views(module):
    big = np.random.default_rng(0).standard_normal((6, 8, 300)).astype(np.float32)
    for x in (big[::2, 1:6], big[:, ::-2, 3:], big[::-1, :, :40]):
        got, wanted = empty_moments(x.shape[1]), empty_moments(x.shape[1])
        module.moments(x, None, *got)
        module.moments(x.copy(), None, *wanted)
        np.testing.assert_allclose(got[2], wanted[2], rtol=1e-6)
        out = np.full((x.shape[0], 2 * x.shape[1], x.shape[2]), np.nan, np.float32)
        module.affine(x, got[1], got[2] / got[0], None, None, 0.0, None, False, out[:, ::2])
        expected = oracle.normalize(x, got[1], got[2] / got[0], eps=0.0)
        assert (np.abs(out[:, ::2] - expected) <= tolerance(np.float32, expected)).all()
        assert np.isnan(out[:, 1::2]).all()
