"""The contract on simulated CUDA kernels: every layout, kind of storage and operation, against the reference."""

import device_arrays
import numpy as np
import pytest

import nbbn.cuda as cuda
from nbbn import reference
from nbbn.backends import RunningUpdate
from nbbn.cuda import device

# canonical (outer, channels, inner) shapes: rows (shared by blocks, odd, one, misaligned), columns (inner 1, 7x7, odd)
ROWS = [(3, 4, 1500), (1, 1, 5001), (2, 3, 129), (5, 2, 260), (9, 1, 1024), (1, 2, 128)]
COLUMNS = [(300, 5, 1), (64, 3, 49), (7, 260, 1), (1, 3, 1), (33, 40, 4), (20, 6, 50), (2, 1, 3)]
EPS = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def place(values, kind=None):
    """A NumPy array on the simulated device, as the backend takes it."""
    if kind == "bfloat16":
        return device.view("x", device_arrays.put(values, bfloat16=True))
    return device.view("x", device_arrays.put(np.asarray(values, kind)))


def host(array):
    return array.owner.get()


def data(shape, kind, mean=3.0, seed=0):
    """Values as stored in that kind, on the device and as float64."""
    x = place(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) + np.float32(mean), kind)
    return x, host(x).astype(np.float64)


def empty_moments(channels):
    return place(np.zeros(channels, np.int64)), place(np.full(channels, np.nan)), place(np.full(channels, np.nan))


def reference_moments(x, where=None):
    results = np.empty(x.shape[1], np.int64), np.empty(x.shape[1]), np.empty(x.shape[1])
    reference.moments(x, where, *results)
    return results


def close(got, wanted, bound):
    np.testing.assert_array_compare(np.less_equal, np.abs(got - wanted), np.broadcast_to(bound, np.shape(got)))


@pytest.mark.parametrize("shape", ROWS + COLUMNS)
def test_moments_and_training(shape):
    check_training(shape, "float32")


def check_training(shape, kind):
    x, values = data(shape, kind)
    channels = shape[1]
    residual, added = data(shape, kind, 0.0, seed=1)
    weight, bias = np.random.default_rng(2).standard_normal((2, channels))
    count, mean, m2 = reference_moments(values)
    results = empty_moments(channels)
    cuda.moments(x, None, *results)
    got_count, got_mean, got_m2 = map(host, results)
    assert (got_count == count).all()
    std = np.sqrt(m2 / count)
    close(got_mean, mean, 1e-6 * std)
    close(got_m2, m2, 2e-6 * m2)

    update = RunningUpdate(place(np.zeros(channels, np.float32)), place(np.ones(channels)), 0.25, 0, False)
    out, again = place(np.zeros(shape), kind), empty_moments(channels)
    assert cuda.train(x, place(weight), place(bias.astype(np.float32)), 1e-3, residual, True, out, *again, update) == 0
    for first, second in zip(results, again, strict=True):
        assert (host(first) == host(second)).all(), "the same bits"
    expected = np.empty(shape)
    reference.affine(values, mean, m2 / count, weight, bias.astype(np.float32), 1e-3, added, True, expected)
    scale = 1 + np.abs(expected) + np.abs(added)
    close(host(out), expected, scale * (2 * EPS[kind] + 3e-6 * (kind != "float64") + 1e-12))
    close(host(update.running_mean), 0.25 * mean, 1e-6)
    close(host(update.running_var), 1 + 0.25 * (m2 / count - 1), 1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 1500), (2, 3, 129), (300, 5, 1), (64, 3, 49)])
def test_backward(shape, training):
    check_backward(shape, "float32", training)


def check_backward(shape, kind, training, mean=3.0):
    x, values = data(shape, kind, mean)
    grad, gradients = data(shape, kind, 0.0, seed=1)
    weight = np.random.default_rng(2).standard_normal(shape[1])
    count, mean, m2 = reference_moments(values)
    var = m2 / count
    results = place(np.zeros(shape), kind), place(np.zeros(shape[1])), place(np.zeros(shape[1]))
    wanted = np.empty(shape), np.empty(shape[1]), np.empty(shape[1])
    for w in (weight, None):
        on_device = None if w is None else place(w)
        cuda.backward(grad, x, place(mean), place(var), on_device, 1e-3, training, *results)
        reference.backward(gradients, values, mean, var, w, 1e-3, training, *wanted)
        scale = 1 + np.max((1 if w is None else np.abs(w)) / np.sqrt(var + 1e-3))  # terms this large cancel
        bound = 16 * (2.0**-24 if kind != "float64" else 2.0**-53)
        close(host(results[0]), wanted[0], (scale * bound + EPS[kind]) * (1 + np.abs(wanted[0])))
        for got, exact in zip(results[1:], wanted[1:], strict=True):
            close(host(got), exact, bound * np.sqrt(count) * (1 + np.abs(exact)))


@pytest.mark.parametrize("shape", [(3, 2, 3000), (40, 7, 1)])
def test_masked_moments(shape):
    x, values = data(shape, "float32")
    where = np.random.default_rng(4).random(shape) < 0.5
    where[:, 0] = False
    results = empty_moments(shape[1])
    cuda.moments(x, place(where), *results)
    wanted = reference_moments(values, where)
    assert (host(results[0]) == wanted[0]).all()
    np.testing.assert_allclose(host(results[1]), wanted[1], rtol=1e-12)
    np.testing.assert_allclose(host(results[2]), wanted[2], rtol=1e-12)
    broadcast = place(where[:, :, :1]).broadcast_to(shape)
    cuda.moments(x, broadcast, *results)
    wanted = reference_moments(values, np.broadcast_to(where[:, :, :1], shape))
    np.testing.assert_allclose(host(results[2]), wanted[2], rtol=1e-12)
