"""JAX's arrays on a device: read and made there, awaited, never written."""

import gc
import pickle
import sys

import device_arrays
import fake_jax
import numpy as np
import pytest
from fake_jax import put

import nbbn
import nbbn.cuda
from nbbn.cuda import dlpack, jax_arrays, launcher

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (6, 3, 5, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def jax(monkeypatch):
    """A process in which JAX was imported; what happens to memory and streams is noted."""
    monkeypatch.setitem(sys.modules, "jax", fake_jax.MODULE)
    fake_jax.EVENTS.clear()
    monkeypatch.setattr(nbbn.cuda, "synchronize", lambda stream: fake_jax.EVENTS.append(("awaited", stream)))


def test_training_evaluation_and_backward():
    weight = RNG.standard_normal(3).astype(np.float32)
    y, stats = nbbn.batch_norm(put(X), None, None, put(weight), training=True, return_stats=True)
    assert type(y) is fake_jax.Array
    assert fake_jax.EVENTS == [("awaited", jax_arrays.STREAM), "taken"]
    expected, host = nbbn.batch_norm(X, None, None, weight, training=True, return_stats=True)
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=3e-6)
    # float64, which JAX would round: not JAX's arrays, but on the device, for every library that can look there
    assert type(stats.mean) is jax_arrays.DeviceMemory
    assert stats.mean.__cuda_array_interface__["typestr"] == "<f8"
    np.testing.assert_allclose(stats.to_numpy().m2, host.m2, rtol=1e-6)
    np.testing.assert_allclose((stats + nbbn.batch_stats(put(X))).to_numpy().mean, host.mean, rtol=1e-7)
    assert "count=[120 120 120]" in repr(stats)

    evaluated = nbbn.batch_norm(put(X), put(host.mean.astype(np.float32)), put(host.var().astype(np.float32)))
    np.testing.assert_allclose(evaluated.get(), nbbn.batch_norm(X, training=True), rtol=0, atol=1e-5)
    gradients = nbbn.batch_norm_backward(put(np.sin(X)), put(X), stats.mean, stats.var(), put(weight))
    wanted = nbbn.batch_norm_backward(np.sin(X), X, host.mean, host.var(), weight)
    for got, value in zip(gradients, wanted, strict=True):
        assert type(got) is fake_jax.Array
        np.testing.assert_allclose(got.get(), value, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_layouts(axis):
    expected = nbbn.batch_norm(X, axis=axis, training=True)
    y = nbbn.batch_norm(put(X), axis=axis, training=True)
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=5e-6)
    turned = np.asarray(X, order="F")  # what JAX may choose for an array that it computes
    y = nbbn.batch_norm(put(turned), axis=axis, training=True, residual=put(X))
    np.testing.assert_allclose(y.get(), expected + X, rtol=0, atol=5e-6)


def test_masks_and_what_is_empty():
    mask = np.arange(5).reshape(5, 1) < 3
    stats = nbbn.batch_stats(put(X), where=put(mask))
    assert fake_jax.EVENTS == [("awaited", jax_arrays.STREAM)]
    np.testing.assert_allclose(stats.to_numpy().mean, X[:, :, :3].mean(axis=(0, 2, 3)), rtol=1e-6)
    assert (nbbn.batch_stats(put(X[:0])).to_numpy() == nbbn.Moments.zeros(3)).all()
    assert nbbn.batch_norm(put(X[:0]), training=True).shape == (0, 3, 5, 4)


def test_bfloat16():
    x = put(X, bfloat16=True)
    y = nbbn.batch_norm(x, training=True)
    assert type(y) is fake_jax.Array
    np.testing.assert_allclose(y.get(), nbbn.batch_norm(x.get(), training=True), atol=2e-2)


def test_nothing_is_awaited_that_is_not_of_jax():
    nbbn.batch_norm(device_arrays.put(X), training=True)
    assert fake_jax.EVENTS == []
    nbbn.batch_norm(device_arrays.put(X), None, None, put(np.ones(3, np.float32)), training=True)
    assert fake_jax.EVENTS == [("awaited", 0)]  # the stream of x, which the kernels read the weight on


@pytest.mark.parametrize("options", [{"nonfinite": "raise"}, {"where": True}, {"training": False}])
def test_calls_of_several_operations_await_each(monkeypatch, options):
    """JAX takes no memory over that a kernel may still write, whichever operation launched it."""
    launched = launcher.Launch.__call__
    note = lambda *arguments: (fake_jax.EVENTS.append("launched"), launched(*arguments))  # noqa: E731
    monkeypatch.setattr(launcher.Launch, "__call__", note)
    options = {"training": True, "return_stats": True} | options
    if "where" in options:
        options["where"] = put(X > -9)
    mean, var = device_arrays.put(np.zeros(3, np.float32)), device_arrays.put(np.ones(3, np.float32))
    nbbn.batch_norm(put(X), mean, var, **options)
    taken = fake_jax.EVENTS.index("taken")
    events = fake_jax.EVENTS[:taken]
    assert events.count("launched") > 1
    assert events[-1] == ("awaited", jax_arrays.STREAM)
    assert fake_jax.EVENTS[taken:] == ["taken"]


def test_statistics_that_are_combined_are_awaited():
    """They lie in memory that is used again without a word to the stream."""
    first, second = nbbn.batch_stats(put(X)), nbbn.batch_stats(put(X[:2]))
    for operation in (lambda: first + second, lambda: first - second, first.var):
        fake_jax.EVENTS.clear()
        operation()
        assert fake_jax.EVENTS == [("awaited", jax_arrays.STREAM)]


def test_statistics_are_pickled_in_host_memory():
    stats = nbbn.batch_stats(put(X))
    assert (pickle.loads(pickle.dumps(stats)) == stats.to_numpy()).all()


def test_running_arrays_of_another_library_move():
    mean, var = device_arrays.put(np.zeros(3, np.float32)), device_arrays.put(np.ones(3, np.float32))
    nbbn.batch_norm(put(X), mean, var, training=True)
    np.testing.assert_allclose(mean.get(), 0.1 * X.mean((0, 2, 3)), rtol=1e-6)
    layer = nbbn.BatchNorm(3, like=mean)
    assert type(layer(put(X))) is fake_jax.Array
    assert type(layer.backward(put(X))) is fake_jax.Array


def test_what_is_refused():
    ones = put(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="out: expected an array that can be updated in place, got a JAX array"):
        nbbn.batch_norm(put(X), training=True, out=put(X))
    with pytest.raises(ValueError, match="running_mean: expected a writable array"):
        nbbn.batch_norm(put(X), ones, put(np.ones(3, np.float32)), training=True)
    with pytest.raises(TypeError, match=r"like: expected .* updated in place, got a JAX array; pass one"):
        nbbn.BatchNorm(3, like=put(X))
    sharded = fake_jax.Array(None, X, devices=2)
    with pytest.raises(TypeError, match="x: expected an array on one device, got one sharded over 2"):
        nbbn.batch_stats(sharded)
    with pytest.raises(TypeError, match="got complex64"):
        nbbn.batch_stats(put(X.astype(np.complex64)))
    with pytest.raises(TypeError, match="mean: expected an array on CUDA device 0"):
        nbbn.normalize(put(X), np.zeros(3), ones)


def test_memory_is_given_back():
    dlpack.free()
    before = len(dlpack._handed_over)
    y = nbbn.batch_norm(put(X), training=True)
    assert len(dlpack._handed_over) == before + 1
    del y
    gc.collect()
    dlpack.free()
    assert len(dlpack._handed_over) == before
