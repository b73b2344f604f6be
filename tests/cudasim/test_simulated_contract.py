"""The contract on simulated CUDA kernels: every layout, kind of storage and operation, against the reference."""

from dataclasses import replace

import device_arrays
import numpy as np
import pytest
import simulator

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


def test_backward_into_wider_values():
    """The sums are taken by columns, the input gradient by rows: with 8 bytes a value they are long."""
    shape = (3, 4, 100)
    x, values = data(shape, "float16")
    grad, gradients = data(shape, "float16", 0.0, seed=1)
    count, mean, m2 = reference_moments(values)
    results = place(np.zeros(shape)), place(np.zeros(4)), place(np.zeros(4))
    wanted = np.empty(shape), np.empty(4), np.empty(4)
    cuda.backward(grad, x, place(mean), place(m2 / count), None, 1e-3, True, *results)
    reference.backward(gradients, values, mean, m2 / count, None, 1e-3, True, *wanted)
    close(host(results[0]), wanted[0], 1e-6 * (1 + np.abs(wanted[0])))


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


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3, 1040), (40, 7, 16), (48, 16, 1)])
def test_other_kinds(kind, shape):
    check_training(shape, kind)
    check_backward(shape, kind, True)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "bool"])
@pytest.mark.parametrize("shape", [(2, 2, 608), (30, 16, 1), (30, 5, 1)])
def test_integers(kind, shape):
    integers = np.random.default_rng(0).integers(0, 2 if kind == "bool" else 200, shape).astype(kind)
    x, results = place(integers), empty_moments(shape[1])
    cuda.moments(x, None, *results)
    wanted = reference_moments(integers)
    assert (host(results[0]) == wanted[0]).all()
    np.testing.assert_allclose(host(results[1]), wanted[1], rtol=1e-15)
    np.testing.assert_allclose(host(results[2]), wanted[2], rtol=1e-13)
    out, expected = place(np.zeros(shape, np.float32)), np.empty(shape)
    cuda.affine(x, results[1], place(wanted[2] / wanted[0]), None, None, 0.0, None, False, out)
    reference.affine(integers, wanted[1], wanted[2] / wanted[0], None, None, 0.0, None, False, expected)
    close(host(out), expected, 1e-6 * (1 + np.abs(expected)))


def test_mixed_kinds_in_one_call():
    x, values = data((3, 4, 130), "float16")
    residual, added = data((3, 4, 130), "float32", 0.0, seed=1)
    for out_kind in ("float32", "float64", "bfloat16"):
        out, expected = place(np.zeros((3, 4, 130)), out_kind), np.empty((3, 4, 130))
        cuda.affine(x, place(np.full(4, 3.0)), place(np.ones(4)), None, None, 0.0, residual, False, out)
        reference.affine(values, np.full(4, 3.0), np.ones(4), None, None, 0.0, added, False, expected)
        close(host(out), expected, (EPS[out_kind] + 1e-6) * (1 + np.abs(expected) + np.abs(added)))


@pytest.mark.parametrize("shape", [(2, 2, 3000), (600, 2, 1)])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda z: z + np.float32(1e6), id="mean a million standard deviations off"),
        pytest.param(lambda z: z * np.float32(0) + np.float32(0.1), id="constant"),
        pytest.param(lambda z: z * np.float32(1e-40), id="denormal"),
        pytest.param(lambda z: z * np.float32(1e37), id="squares overflow float32"),
        pytest.param(lambda z: np.where(np.abs(z) > 3, z * np.float32(1e6), 0).astype(np.float32), id="spikes"),
        pytest.param(lambda z: np.sort(z.ravel()).reshape(z.shape), id="drifting"),
    ],
)
def test_hard_data(shape, make):
    z = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    values = make(z)
    x, results = place(values), empty_moments(shape[1])
    cuda.moments(x, None, *results)
    count, mean, m2 = reference_moments(values)
    got_m2 = host(results[2])
    close(got_m2, m2, 2e-6 * m2)
    std = np.sqrt(m2 / count)
    close(host(results[1]), mean, 1e-6 * std + 1e-300)
    if m2.any():
        out, expected = place(np.zeros_like(values)), np.empty(shape)
        cuda.affine(x, results[1], place(got_m2 / count), None, None, 0.0, None, False, out)
        reference.affine(values, mean, m2 / count, None, None, 0.0, None, False, expected)
        close(host(out), expected, 2e-6 * (1 + np.abs(expected)))


@pytest.mark.parametrize("shape", [(2, 3, 1200), (300, 3, 1)])
def test_nonfinite_data_stays_in_its_channel(shape):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    values[1, 0, 0], values[1, 1, 0] = np.nan, np.inf
    results = empty_moments(3)
    cuda.moments(place(values), None, *results)
    mean, m2 = host(results[1]), host(results[2])
    assert np.isnan(mean[0])
    assert mean[1] == np.inf
    assert not np.isfinite(m2[:2]).any()
    assert np.isfinite([mean[2], m2[2]]).all()

    running = RunningUpdate(place(np.zeros(3, np.float32)), place(np.ones(3, np.float32)), 0.5, 1, True)
    again = empty_moments(3)
    assert cuda.train(place(values), None, None, 1e-5, None, False, place(values), *again, running) == 2
    assert cuda.ema(*again, running) == 2
    assert host(running.running_mean)[:2].tolist() == [0, 0]
    for momentum, expected in ((0.0, [5, 6, 7]), (1.0, mean.astype(np.float32))):
        update = replace(running, running_mean=place(np.array([5, 6, 7], np.float32)), momentum=momentum)
        assert cuda.ema(*again, replace(update, skip_nonfinite=False)) == 0
        np.testing.assert_array_equal(host(update.running_mean), np.float32(expected))


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(3, 2, 2500), (333, 6, 1), (50, 4, 49)])
def test_the_same_bits_in_any_order_of_threads_and_blocks(shape, kind):
    x, _ = data(shape, kind)
    grad, _ = data(shape, kind, 0.0, seed=1)
    seen = set()
    for order in simulator.ORDERS:
        with simulator.order(order):
            results = empty_moments(shape[1])
            cuda.moments(x, None, *results)
            mean, var = results[1], place(host(results[2]) / host(results[0]))
            gradients = place(np.zeros(shape), kind), place(np.zeros(shape[1])), place(np.zeros(shape[1]))
            cuda.backward(grad, x, mean, var, None, 1e-3, True, *gradients)
            seen.add(b"".join(host(a).tobytes() for a in (*results, *gradients)))
    assert len(seen) == 1


def test_merge_and_remove():
    def record(*values):
        return place(np.array(values[0], np.int64)), *(place(np.array(v, float)) for v in values[1:])

    a, b = record([0, 2, 3], [0, 1, 5], [0, 2, 8]), record([4, 0, 1], [2, 0, 9], [3, 0, 0])
    both, rest = empty_moments(3), empty_moments(3)
    cuda.merge(*a, *b, *both)
    assert [host(field).tolist() for field in both] == [[4, 2, 4], [2, 1, 6], [3, 2, 8 + 16 * 3 / 4]]
    cuda.remove(*both, *b, *rest)
    for got, wanted in zip(rest, a, strict=True):
        np.testing.assert_allclose(host(got), host(wanted), atol=1e-14)


def test_strided_views_and_in_place():
    big = np.random.default_rng(0).standard_normal((6, 8, 300)).astype(np.float32)
    for values in (big[::2, 1:6], big[:, ::-2, 3:], big[::-1, :, :40]):
        owner = device_arrays.put(big)
        owner.values = owner.values[::2, 1:6] if values.shape == (3, 5, 300) else owner.values
        if values.shape == (6, 4, 297):
            owner.values = owner.values[:, ::-2, 3:]
        if values.shape == (6, 8, 40):
            owner.values = owner.values[::-1, :, :40]
        x, results = device.view("x", owner), empty_moments(values.shape[1])
        cuda.moments(x, None, *results)
        count, mean, m2 = reference_moments(values)
        close(host(results[2]), m2, 2e-6 * m2)
        expected = np.empty(values.shape)
        reference.affine(values, mean, m2 / count, None, None, 0.0, None, False, expected)
        cuda.affine(x, place(mean), place(m2 / count), None, None, 0.0, None, False, x)
        close(host(x), expected, 2e-6 * (1 + np.abs(expected)))
