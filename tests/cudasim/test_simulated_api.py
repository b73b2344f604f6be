"""The public functions on arrays in simulated device memory: what goes in, what comes out, what is refused."""

import pickle

import device_arrays
import numpy as np
import pytest

import nbbn
from nbbn.cuda import libraries

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (6, 3, 5, 4)).astype(np.float32)
put = device_arrays.put


def ones(n=3, dtype=np.float32):
    return put(np.ones(n, dtype))


def test_training_and_evaluation_as_on_the_cpu():
    weight, bias = RNG.standard_normal((2, 3)).astype(np.float32)
    host = {
        "running_mean": np.zeros(3, np.float32),
        "running_var": np.ones(3, np.float32),
        "weight": weight,
        "bias": bias,
    }
    there = {name: put(array) for name, array in host.items()}
    for training in (True, False):
        expected, stats = nbbn.batch_norm(X, **host, training=training, return_stats=True)
        y, moments = nbbn.batch_norm(put(X), **there, training=training, return_stats=True)
        assert type(y) is device_arrays.Array
        assert y.shape == X.shape
        np.testing.assert_allclose(y.get(), expected, rtol=0, atol=3e-6)
        np.testing.assert_allclose(moments.to_numpy().m2, stats.m2, rtol=1e-6)
        for name in host:
            np.testing.assert_allclose(there[name].get(), host[name], rtol=1e-6)
    out = put(X)
    assert nbbn.batch_norm(out, training=True, out=out) is out
    np.testing.assert_allclose(out.get(), nbbn.batch_norm(X, training=True), rtol=0, atol=3e-6)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layouts(axis, order):
    x = np.asarray(X, order=order)
    expected = nbbn.batch_norm(x, axis=axis, training=True)
    y = nbbn.batch_norm(put(x), axis=axis, training=True)
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=5e-6)
    owner = put(np.repeat(x, 2, axis=3))
    cropped = owner[..., ::2]  # no kernel reads these strides: a copy is made on the device
    np.testing.assert_allclose(nbbn.batch_norm(cropped, axis=axis, training=True).get(), expected, rtol=0, atol=5e-6)
    out = put(np.zeros((*x.shape[:3], 8), np.float32))
    result = out[..., ::2]
    nbbn.batch_norm(put(x), axis=axis, training=True, out=result)
    np.testing.assert_allclose(out.values[..., ::2], expected, rtol=0, atol=5e-6)
    assert (out.values[..., 1::2] == 0).all()


def test_moments_live_on_the_device():
    parts = [put(X[:2]), put(X[2:])]
    total = sum(map(nbbn.batch_stats, parts), nbbn.Moments.zeros(3))
    assert type(total.mean) is device_arrays.Array
    whole = nbbn.batch_stats(X)
    host = total.to_numpy()
    np.testing.assert_allclose(host.m2, whole.m2, rtol=1e-6)
    np.testing.assert_allclose(total.var(ddof=1).get(), whole.var(ddof=1), rtol=1e-6)
    np.testing.assert_allclose(total.std().get(), whole.std(), rtol=1e-6)
    rest = (total - nbbn.batch_stats(parts[0])).to_numpy()
    np.testing.assert_allclose(rest.mean, nbbn.batch_stats(X[2:]).mean, rtol=1e-6)
    assert "count=[120 120 120]" in repr(total)
    with pytest.raises(TypeError, match="on a CUDA device"):
        total == total  # noqa: B015
    with pytest.raises(TypeError, match=r"other: expected an array on CUDA device 0.*in host memory"):
        total + whole
    for first, second in ((total, whole), (whole, total)):
        with pytest.raises(TypeError, match="other: expected an array"):
            first - second
    assert (nbbn.batch_stats(put(np.empty((0, 3), np.float32))).to_numpy() == nbbn.Moments.zeros(3)).all()
    masked = nbbn.batch_stats(put(X), where=put(np.arange(5).reshape(5, 1) < 3)).to_numpy()
    np.testing.assert_allclose(masked.mean, X[:, :, :3].mean(axis=(0, 2, 3)), rtol=1e-6)


def test_layer():
    layers = nbbn.BatchNorm(3), nbbn.BatchNorm(3, like=put(X))
    assert type(layers[1].weight) is device_arrays.Array
    for _ in range(2):
        y, there = layers[0](X), layers[1](put(X))
        np.testing.assert_allclose(there.get(), y, rtol=0, atol=3e-6)
        dx, there = layers[0].backward(np.sin(X)), layers[1].backward(put(np.sin(X)))
        np.testing.assert_allclose(there.get(), dx, rtol=0, atol=3e-6)
    for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
        got, expected = getattr(layers[1], name).get(), getattr(layers[0], name)
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=3e-5)
    assert layers[1].num_batches_tracked == 2
    for layer, batches in zip(layers, ([X], [put(X[:2]), put(X[2:])]), strict=True):
        layer.recalibrate(batches).eval()
    np.testing.assert_allclose(layers[1](put(X)).get(), layers[0](X), rtol=0, atol=3e-6)
    np.testing.assert_allclose(layers[1].backward(put(X)).get(), layers[0].backward(X), rtol=0, atol=3e-6)
    layers[1].load_state_dict(layers[0].state_dict())
    assert (layers[1].running_var.get() == layers[0].running_var).all()
    assert type(layers[1].state_dict()["weight"]) is device_arrays.Array


def test_policies_for_batches_that_are_not_finite():
    bad = X.copy()
    bad[0, 1, 0, 0] = np.nan
    mean, var = put(np.zeros(3, np.float32)), ones()
    with pytest.raises(FloatingPointError, match="channel 1"):
        nbbn.batch_norm(put(bad), mean, var, training=True, nonfinite="raise")
    assert (mean.get() == 0).all()
    with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3 channels"):
        nbbn.batch_norm(put(bad), mean, var, training=True, nonfinite="skip")
    assert mean.get()[1] == 0
    assert mean.get()[0] != 0
    nbbn.batch_norm(put(bad), mean, var, training=True)
    assert np.isnan(mean.get()[1])


def test_what_is_refused():
    x = put(X)
    for call, error, message in [
        (lambda: nbbn.normalize(x, np.zeros(3), ones()), TypeError, "mean: expected an array on CUDA device 0, as x"),
        (lambda: nbbn.normalize(X, np.zeros(3), ones()), TypeError, "var: expected an array in host memory, as x"),
        (
            lambda: nbbn.batch_norm(x, np.zeros(3), np.ones(3), training=True),
            TypeError,
            "running_mean: expected",
        ),
        (lambda: nbbn.batch_norm(x, training=True, out=X), TypeError, "out: expected an array on CUDA device 0"),
        (
            lambda: nbbn.batch_norm(x, training=True, where=X > 0),
            TypeError,
            "where: expected an array on CUDA",
        ),
        (lambda: nbbn.batch_norm_backward(X, x, ones(), ones()), TypeError, "grad_out: expected an array on CUDA"),
        (lambda: nbbn.ema_update(ones(), ones(), nbbn.batch_stats(X)), TypeError, "stats: expected an array on CUDA"),
        (lambda: nbbn.normalize(x, ones(4), ones()), ValueError, "mean: expected 3 values.*got 4"),
        (lambda: nbbn.batch_norm(put(X[:1, :, :1, :1]), training=True), ValueError, "more than 1 value per channel"),
        (lambda: nbbn.batch_norm(x[:4], training=True, out=x[1:5]), ValueError, "overlaps x"),
        (lambda: nbbn.batch_norm(put(X.astype(int)), training=True), TypeError, "got int64"),
        (lambda: nbbn.batch_stats(put(X.astype(complex))), TypeError, "got complex128"),
    ]:
        with pytest.raises(error, match=message):
            call()
    running = ones()
    with pytest.raises(ValueError, match="overlaps running_mean"):
        nbbn.batch_norm(x, running, running, training=True)
    with nbbn.use_backend("cpu"), pytest.raises(TypeError, match="inside use_backend"):
        nbbn.batch_stats(x)
    with nbbn.use_backend("cuda"), pytest.raises(TypeError, match="expected arrays on a CUDA device"):
        nbbn.batch_stats(X)
    assert nbbn.available_backends() == ("numpy", "cpu", "cuda")


def test_read_only_results_are_refused():
    class ReadOnly(device_arrays.Array):
        @property
        def __cuda_array_interface__(self):
            interface = super().__cuda_array_interface__
            return interface | {"data": (interface["data"][0], True)}

    ReadOnly.__module__ = device_arrays.__name__
    x = put(X)
    frozen = ReadOnly(x.memory, x.values)
    np.testing.assert_allclose(nbbn.batch_norm(frozen, training=True).get().mean(), 0, atol=1e-6)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        nbbn.batch_norm(put(X), training=True, out=frozen)


def test_bfloat16_without_a_dtype_of_numpy():
    x = put(X, bfloat16=True)
    assert x.dtype is libraries.BFLOAT16
    y = nbbn.batch_norm(x, training=True)
    assert y.dtype is libraries.BFLOAT16
    np.testing.assert_allclose(y.get(), nbbn.batch_norm(x.get(), training=True), atol=2e-2)


def test_pickling_needs_no_check_of_device_memory():
    restored = pickle.loads(pickle.dumps(nbbn.batch_stats(put(X)).to_numpy()))
    assert (restored.count == 120).all()
