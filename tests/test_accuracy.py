"""The numbers that the documentation promises, on inputs chosen to break them."""

import numpy as np
import oracle
import pytest

import nbbn

RATIOS = [0.0, 1.0, 1e3, 1e6]  # |mean| / std

# shape, axis: both kernel families, folded and not, one chunk and several, lengths around the block sizes
SHAPES = [
    ((64, 3), 1),
    ((1025, 5), 1),
    ((513, 700), 1),
    ((40000, 7), 1),
    ((9, 30, 7, 7), 1),
    ((4, 6, 3, 3), 1),
    ((8, 3, 40, 40), 1),
    ((2, 3, 1023), 1),
    ((2, 3, 1024), 1),
    ((3, 2, 1025), 1),
    ((1, 2, 65537), 1),
    ((5, 9, 11, 4), -1),
    ((700, 3), 0),
    ((17, 19), None),
    ((100003,), None),
]


def hard_input(shape, ratio, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + ratio).astype(dtype)


def assert_statistics(m, x, axis, where=True):
    count, mean, var = oracle.stats(x, axis, where)
    std = np.sqrt(var)
    assert (m.count == count).all()
    assert (np.abs(m.mean - mean) <= 1e-6 * std + 1e-300).all()
    assert (np.abs(m.var() - var) <= 2e-6 * var).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_statistics_and_output(backend, shape, axis, ratio):
    x = hard_input(shape, ratio)
    m = nbbn.batch_stats(x, axis=axis)
    assert_statistics(m, x, axis)
    _, mean, var = oracle.stats(x, axis)
    expected = oracle.normalize(x, mean, var, axis=axis)
    bound = 2e-6 * (1 + np.abs(expected))
    assert (np.abs(nbbn.normalize(x, m.mean, m.var(), axis=axis) - expected) <= bound).all()
    y, stats = nbbn.batch_norm(x, training=True, axis=axis, return_stats=True)
    assert (np.abs(y - expected) <= bound).all()
    assert (stats == m).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "axis"), [((700, 33), 1), ((6, 5, 300), 1), ((90, 8, 5), -1), ((5000,), None)])
def test_masked_statistics(backend, shape, axis, ratio):
    x = hard_input(shape, ratio)
    where = np.random.default_rng(1).random(shape) < 0.6
    x[~where] = 1e30
    assert_statistics(nbbn.batch_stats(x, axis=axis, where=where), x, axis, where)


@pytest.mark.parametrize("ratio", [0.0, 1e6])
@pytest.mark.parametrize("layout", ["rows", "columns", "one row"])
def test_every_length(backend, layout, ratio):
    for length in range(2, 71):
        shape = {"rows": (1, 3, 128 + length), "columns": (length, 3), "one row": (1, 2, length)}[layout]
        x = hard_input(shape, ratio, seed=length)
        m = nbbn.batch_stats(x)
        assert_statistics(m, x, 1)
        _, mean, var = oracle.stats(x, 1)
        expected = oracle.normalize(x, mean, var)
        y = nbbn.normalize(x, m.mean, m.var())
        assert (np.abs(y - expected) <= 2e-6 * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, 1e6 + 0.1, -3e38, 3e38, 1e-45, 1e-39, np.pi])
@pytest.mark.parametrize("shape", [(1000, 3), (3, 2, 5000), (7, 4, 5, 5)])
def test_constants_have_exactly_no_variance(backend, shape, value):
    x = np.full(shape, value, np.float32)
    m = nbbn.batch_stats(x)
    assert (m.mean == np.float64(np.float32(value))).all()
    assert (m.m2 == 0).all()
    bias = np.arange(shape[1], dtype=np.float32) - 0.3
    y = nbbn.normalize(x, m.mean, m.var(), None, bias)
    assert (y == bias.reshape((-1,) + (1,) * (len(shape) - 2))).all()


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-30, 1e-19, 1e-12, 1e12, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(1000, 3), (3, 2, 5000), (7, 4, 5, 5)])
def test_denormal_and_huge_values(backend, shape, scale):
    x = (np.random.default_rng(5).standard_normal(shape) * 5 * scale).astype(np.float32)
    m = nbbn.batch_stats(x)
    assert_statistics(m, x, 1)
    _, mean, var = oracle.stats(x, 1)
    expected = oracle.normalize(x, mean, var, eps=0.0)
    bound = 2e-6 * (1 + np.abs(expected))
    assert (np.abs(nbbn.normalize(x, m.mean, m.var(), eps=0.0) - expected) <= bound).all()
    assert (np.abs(nbbn.batch_norm(x, training=True, eps=0.0) - expected) <= bound).all()


@pytest.mark.parametrize("shape", [(4000, 3), (3, 2, 5000)])
def test_outliers_trends_and_ties(backend, shape):
    rng = np.random.default_rng(3)
    n = shape[0] * int(np.prod(shape[2:]))
    inputs = {
        "first value far away": np.concatenate([[1e7], rng.standard_normal(n - 1)]),
        "last value far away": np.concatenate([rng.standard_normal(n - 1), [-1e7]]),
        "sorted": np.sort(rng.standard_normal(n)) * 100,
        "two far clusters": np.where(np.arange(n) < n // 2, -1e6, 1e6) + rng.standard_normal(n),
        "heavy tails": rng.standard_cauchy(n),
        "one ulp": np.where(np.arange(n) % 7 == 0, np.nextafter(np.float32(1), np.float32(2)), np.float32(1)),
    }
    for values in inputs.values():
        columns = [np.roll(values, c) for c in range(shape[1])]
        x = np.moveaxis(np.stack(columns).reshape(shape[1], shape[0], *shape[2:]), 0, 1).astype(np.float32)
        assert_statistics(nbbn.batch_stats(x), x, 1)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_a_hundred_million_values_in_one_channel(ratio):
    n = 100_000_000
    x = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    x += np.float32(ratio)
    shift = np.float64(x[0])
    parts = np.array_split(x, 100)
    mean = shift + np.sum([(p - shift).sum(dtype=np.float64) for p in parts]) / n
    var = np.sum([((p.astype(np.float64) - mean) ** 2).sum() for p in parts]) / n
    m = nbbn.batch_stats(x, axis=None)
    assert m.count == n
    assert abs(m.mean[0] - mean) <= 1e-6 * np.sqrt(var)
    assert abs(m.var()[0] - var) <= 2e-6 * var


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "axis"), [((500, 3), 1), ((6, 5, 13, 13), 1), ((8, 9, 9, 4), -1), ((2, 3, 3000), 1)])
def test_float64(backend, shape, axis, ratio):
    x = hard_input(shape, ratio, np.float64)
    m = nbbn.batch_stats(x, axis=axis)
    _, mean, var = oracle.stats(x, axis)
    assert (np.abs(m.mean - mean) <= 1e-15 * (np.abs(mean) + np.sqrt(var)) * 8).all()
    # a mean rounded to float64 is uncertain by eps * ratio standard deviations, and merges see that once each
    assert (np.abs(m.var() - var) <= (1e-12 + np.finfo(float).eps * ratio) * var).all()
    expected = oracle.normalize(x, mean, var, axis=axis)
    y = nbbn.normalize(x, m.mean, m.var(), axis=axis)
    # the mean is one float64: its rounding is all that is left
    bound = 1e-14 * (1 + np.abs(expected)) + 4 * np.finfo(float).eps * ratio
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "axis"), [((500, 3), 1), ((6, 5, 13, 13), 1), ((8, 9, 9, 4), -1), ((2, 3, 3000), 1)])
def test_backward_with_a_large_mean(backend, shape, axis, ratio):
    x = hard_input(shape, ratio)
    grad = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    m = nbbn.batch_stats(x, axis=axis)
    _, mean, var = oracle.stats(x, axis)
    for training in (True, False):
        expected = oracle.backward(grad, x, mean, var, axis=axis, training=training)
        got = nbbn.batch_norm_backward(grad, x, m.mean, m.var(), axis=axis, training=training)
        n = x.size // m.count.size
        for value, wanted, bound in zip(got, expected, [4e-6, 4e-7 * n, 4e-7 * n], strict=True):
            assert (np.abs(value - wanted) <= bound * (1 + np.abs(wanted))).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(500, 3), (6, 5, 13, 13)])
def test_backward_of_tiny_and_huge_values(backend, shape, scale):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(shape) * scale).astype(np.float32)
    grad = rng.standard_normal(shape).astype(np.float32)
    m = nbbn.batch_stats(x)
    got = nbbn.batch_norm_backward(grad, x, m.mean, m.var(), eps=0.0)[0]
    expected = oracle.backward(grad, x, m.mean, m.var(), eps=0.0)[0]
    assert (np.abs(got - expected) <= 4e-6 * (1 + np.abs(expected * scale)) / scale).all()


@pytest.mark.parametrize("shape", [(64, 2048), (512, 640), (2000, 64), (32, 8, 2000), (3, 4, 5000)])
@pytest.mark.parametrize("kind", ["sparse", "two values", "late"])
def test_repeated_values(shape, kind):
    """Equal values round the same way each time: errors add up instead of averaging out."""
    rng = np.random.default_rng(11)
    if kind == "sparse":
        x = np.maximum(rng.standard_normal(shape) - 1, 0)
    else:
        x = np.where(rng.random(shape) < 0.9, 1.2345678, 0)
    if kind == "late":
        x[: max(1, shape[0] // 60)] = 0
    x = x.astype(np.float32)
    assert_statistics(nbbn.batch_stats(x), x, 1)
