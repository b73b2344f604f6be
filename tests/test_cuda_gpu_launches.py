"""On a real GPU: how kernels are launched, and JAX's arrays. `python bench/gpu.py`, or `pytest -m gpu`."""

import threading

import numpy as np
import oracle
import pytest
from test_cuda_gpu import EPS, Torch, data, pytestmark  # noqa: F401

import nbbn


@pytest.fixture
def torch():
    return Torch().torch


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_one_launch_agrees_with_two(torch, monkeypatch, kind):
    """Small channels: the same order of sums either way, so the same bits."""
    from nbbn.cuda import launch, warm

    real = nbbn.cuda.properties(0)
    x, grad = (torch.randn(16, 24, 24, 24, device="cuda").to(getattr(torch, kind)) for _ in range(2))
    results = []
    for l2_bytes in (real.l2_bytes, 0):
        warm._known.clear()
        monkeypatch.setattr(nbbn.cuda, "properties", lambda _, n=l2_bytes: launch.Device(real.multiprocessors, n))
        y, stats = nbbn.batch_norm(x, training=True, return_stats=True)
        gradients = nbbn.batch_norm_backward(grad, x, stats.mean, stats.var())
        results.append([y, stats.mean, stats.m2, *gradients])
    warm._known.clear()
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("by_core", ["", "1"])
def test_launches_from_another_thread(torch, monkeypatch, by_core):
    """A thread that has launched nothing yet has no current context."""
    monkeypatch.setenv("NBBN_CUDA_CORE_LAUNCH", by_core)
    x = torch.randn(8 + len(by_core), 64, 14, 14, device="cuda")  # a geometry that no launch remembers
    expected = [nbbn.batch_norm(x, training=True) for _ in range(3)][-1]
    found = []
    thread = threading.Thread(target=lambda: found.append(nbbn.batch_norm(x, training=True)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_jax(kind):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no CUDA")
    jnp = jax.numpy
    values = data((8, 12, 30, 30))
    x = jnp.asarray(values).astype(kind)
    weight = jnp.linspace(0.5, 1.5, 12)
    for _ in range(3):
        late = jax.jit(lambda a: (a * 2).astype(kind))(x)  # not computed yet when it is passed on
        y, stats = nbbn.batch_norm(late, None, None, weight, training=True, return_stats=True)
        assert isinstance(y, jax.Array)
        assert y.dtype == x.dtype
        assert y.devices() == x.devices()
        z = jax.jit(lambda a: a + 1)(y)  # JAX reads it at once
        expected = oracle.normalize(np.asarray(late, np.float64), *oracle.stats(np.asarray(late, np.float64))[1:])
        expected = expected * np.asarray(weight, np.float64).reshape(1, 12, 1, 1) + 1
        slack = 4 * EPS[kind] + 3e-6
        assert (np.abs(np.asarray(z, np.float64) - expected) <= slack * (2 + np.abs(expected))).all()
    dx, dw, db = nbbn.batch_norm_backward(x, late, stats.mean, stats.var(), weight)
    assert all(isinstance(a, jax.Array) for a in (dx, dw, db))
    host = stats.to_numpy()
    wanted = nbbn.batch_norm_backward(
        np.asarray(x, np.float32), np.asarray(late, np.float32), host.mean, host.var(), np.asarray(weight)
    )
    np.testing.assert_allclose(np.asarray(dw), wanted[1], rtol=1e-4, atol=1e-2)
    with pytest.raises(TypeError, match="out: expected an array that can be updated in place, got a JAX array"):
        nbbn.batch_norm(x, training=True, out=y)
