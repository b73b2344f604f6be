"""Forward: evaluation, options, bit-for-bit promises."""

import numpy as np
import oracle
import pytest

import nbbn

DTYPES = [np.float32, np.float64]


def inputs(shape, axis=1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    channels = 1 if axis is None else shape[axis]
    x, residual = (rng.standard_normal((2, *shape)) * 3 + 1).astype(dtype)
    mean, weight, bias = rng.standard_normal((3, channels)).astype(dtype)
    return x, residual, mean, rng.random(channels).astype(dtype) + dtype(0.1), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 3), (5, 600), (4, 6, 7, 7), (3, 4, 300), (2, 3, 5, 6, 7)])
def test_one_sample_with_its_own_statistics_is_exactly_bias(backend, shape, dtype):
    x, _, _, _, weight, bias = inputs((1, shape[1]), dtype=dtype)
    m = nbbn.batch_stats(x)
    y = nbbn.normalize(x, m.mean, m.var(), weight, bias)
    assert y.tobytes() == bias.tobytes()
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        nbbn.batch_norm(x, training=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", [(3,), (1,), (64,), (600,), (5, 7, 7), (2, 1000), (4, 3, 3, 3), (600, 3)])
def test_evaluation_of_a_row_does_not_depend_on_its_batch(backend, sample, dtype):
    x, residual, mean, var, weight, bias = inputs((64, *sample), dtype=dtype)
    for extra in ({}, {"activation": "relu"}):
        arguments = (mean, var, weight, bias)
        whole = nbbn.batch_norm(x, *arguments, residual=residual, **extra)
        for i in (0, 1, 31, 63):
            rows = slice(i, i + 1)
            alone = nbbn.batch_norm(x[rows], *arguments, residual=residual[rows], **extra)
            assert alone.tobytes() == whole[rows].tobytes()
        part = nbbn.batch_norm(x[7:50:3], *arguments, residual=residual[7:50:3], **extra)
        assert part.tobytes() == whole[7:50:3].tobytes()


@pytest.mark.parametrize("sample", [(3,), (5, 7, 7), (2, 1000)])
def test_evaluation_gives_the_same_bits_in_every_layout(backend, sample):
    x, residual, mean, var, weight, bias = inputs((16, *sample))
    expected = nbbn.batch_norm(x, mean, var, weight, bias, residual=residual)
    for layout in (np.asfortranarray, lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)):
        got = nbbn.batch_norm(layout(x), mean, var, weight, bias, residual=layout(residual))
        assert (got == expected).all()
        mixed = nbbn.batch_norm(layout(x), mean, var, weight, bias, residual=residual, out=np.empty_like(x))
        assert (mixed == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((30, 4), 1), ((2, 3, 200), 1), ((6, 5, 5, 8), -1), ((9, 7), 0), ((50,), None)]
)
def test_options(backend, shape, axis, affine, with_residual, relu, dtype):
    x, residual, mean, var, weight, bias = inputs(shape, axis, dtype)
    options = {
        "weight": weight if affine in ("both", "weight") else None,
        "bias": bias if affine in ("both", "bias") else None,
        "eps": 0.01,
        "axis": axis,
        "residual": residual if with_residual else None,
    }
    y = nbbn.normalize(x, mean, var, activation="relu" if relu else None, **options)
    expected = oracle.normalize(x, mean, var, relu=relu, **options)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert (np.abs(y - expected) <= 16 * np.finfo(dtype).eps * (1 + np.abs(expected))).all()
    trained, stats = nbbn.batch_norm(
        x, training=True, activation="relu" if relu else None, return_stats=True, **options
    )
    expected = oracle.normalize(x, stats.mean, stats.var(), relu=relu, **options)
    assert (np.abs(trained - expected) <= 16 * np.finfo(dtype).eps * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("shape", [(30, 4), (2, 3, 200), (6, 5, 5, 8), (3000, 40), (4, 40, 700)])
@pytest.mark.parametrize("training", [False, True])
def test_in_place_gives_the_same_bits(backend, shape, training):
    x, residual, mean, var, weight, bias = inputs(shape)
    for extra in ({}, {"residual": residual, "activation": "relu"}):
        expected = nbbn.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, **extra)
        y = x.copy()
        assert nbbn.batch_norm(y, mean.copy(), var.copy(), weight, bias, training, out=y, **extra) is y
        assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("training", [False, True])
def test_out_of_any_layout_and_precision(backend, training):
    x, _, mean, var, weight, bias = inputs((6, 5, 7, 9))
    expected = nbbn.batch_norm(x, mean.copy(), var.copy(), weight, bias, training)
    block = np.full((12, 5, 7, 18), np.nan, np.float32)
    outs = [
        np.full((6, 5, 7, 9), np.nan, np.float32, order="F"),
        block[::2, :, :, ::2],
        np.full((9, 6, 7, 5), np.nan, np.float32).transpose(1, 3, 2, 0),
        np.full((6, 5, 7, 9), np.nan, np.float64),
    ]
    for out in outs:
        assert nbbn.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, out=out) is out
        np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
    assert np.isnan(block[1::2]).all()
    assert np.isnan(block[..., 1::2]).all()


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), 1), ((6, 5, 300), 1), ((4, 3, 3, 5), -1), ((40, 3), 0), ((70,), None)]
)
def test_relu_keeps_nan_and_cuts_everything_below_zero(backend, shape, axis):
    x, _, mean, var, _, _ = inputs(shape, axis)
    x.flat[3] = np.nan
    x.flat[5] = -np.inf
    y = nbbn.normalize(x, mean, var, activation="relu", axis=axis)
    assert np.isnan(y).sum() == 1
    assert np.isnan(y.flat[3])
    assert y.flat[5] == 0
    assert np.nanmin(y) == 0


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 300)])
def test_eps_zero_and_variance_zero_are_ieee(backend, shape):
    x = np.zeros(shape, np.float32)
    x[0], x[1] = 1, -1
    y = nbbn.normalize(x, np.zeros(3), np.zeros(3), eps=0.0)
    assert (y[0] == np.inf).all()
    assert (y[1] == -np.inf).all()
    assert np.isnan(y[2:]).all()
    assert (nbbn.normalize(x, np.zeros(3), np.full(3, np.inf)) == 0).all()


def test_a_float64_mean_is_used_in_full_for_float32_data(backend):
    x = np.array([[1e6], [1e6 + 0.0625]], np.float32)
    mean = np.array([1e6 + 0.03])
    y = nbbn.normalize(x, mean, np.array([1.0]), eps=0.0)
    np.testing.assert_allclose(y[:, 0], [-0.03, 0.0325], rtol=1e-6)


def test_threads_do_not_change_a_bit(threads):
    for shape in ((100_000, 3), (40, 8, 70, 70), (2, 3, 100_000), (3000, 600), (7, 300_001), (300, 64, 7, 7)):
        x, residual, mean, var, weight, bias = inputs(shape)
        results = []
        for n in (1, threads):
            nbbn.set_num_threads(n)
            assert nbbn.get_num_threads() == n
            m = nbbn.batch_stats(x)
            running = mean.copy(), var.copy()
            y = nbbn.batch_norm(x, *running, weight, bias, True, residual=residual)
            gradients = nbbn.batch_norm_backward(residual, x, m.mean, m.var(), weight)
            masked = nbbn.batch_stats(x, where=x > 0)
            results.append([a.tobytes() for a in (m.mean, m.m2, *running, y, *gradients, masked.mean, masked.m2)])
        assert results[0] == results[-1]


def test_threads_do_not_change_a_bit_where_kernels_must_choose(threads):
    """One channel that needs float64 arithmetic; an output that the columns family cannot write."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(2, 3, 60_000)).astype(np.float32)
    wide[:, 0] *= 1e37
    narrow = rng.normal(3, 1, (6000, 2, 32)).astype(np.float32)
    for x, out in ((wide, None), (narrow, np.empty((6000, 4, 32), np.float32)[:, ::2])):
        results = []
        for n in (1, threads):
            nbbn.set_num_threads(n)
            y, m = nbbn.batch_norm(x, training=True, return_stats=True, out=out)
            results.append((y.tobytes(), m.mean.tobytes(), m.m2.tobytes()))
            assert (m == nbbn.batch_stats(x)).all()
        assert results[0] == results[-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 300])
def test_extreme_parameters_are_ieee(backend, dtype, inner):
    def one(x, mean, var, weight=1.0, eps=0.0):
        x = np.repeat(np.array(x, dtype)[:, None, None], inner, 2)
        y = nbbn.normalize(x, np.array([mean]), np.array([var]), np.array([weight]), eps=eps)
        assert (y == y[:, :, :1]).all() or np.isnan(y).any()
        return y[:, 0, 0].tolist()

    assert one([-2.0, 2.0], np.inf, 1.0) == [-np.inf, -np.inf]
    assert one([-2.0, 0.0, 2.0], 0.1, 0.0) == [-np.inf, -np.inf, np.inf]
    assert one([-2.0, 2.0], 0.1, 1.0, weight=np.inf) == [-np.inf, np.inf]
    assert one([-3e38], 3e38, 1e60) == pytest.approx([-6e8], rel=1e-6)
    assert np.isnan(one([1.0], np.nan, 1.0)).all()
    assert np.isnan(one([1.0], 0.0, -1.0)).all()


@pytest.mark.parametrize("inner", [1, 300])
def test_backward_of_extreme_gradients(backend, inner):
    rng = np.random.default_rng(0)
    x0, g0 = rng.standard_normal((2, 40, 1, inner)).astype(np.float32)
    expected = nbbn.batch_norm_backward(g0, x0, np.zeros(1), np.ones(1), eps=0.0)
    for x_scale, g_scale in ((1e10, 1e28), (1e-15, 1e-28), (1.0, 1e-40), (1e-10, 1e10)):
        x, g = (x0 * np.float64(x_scale)).astype(np.float32), (g0 * np.float64(g_scale)).astype(np.float32)
        var = np.array([x_scale**2])
        grad_x, grad_weight, _ = nbbn.batch_norm_backward(g, x, np.zeros(1), var, eps=0.0)
        tolerance = 1e-5 if g_scale > 1e-38 else 1e-3  # denormal gradients have few digits to begin with
        np.testing.assert_allclose(grad_weight / g_scale, expected[1], rtol=tolerance)
        np.testing.assert_allclose(
            grad_x.astype(float) * (x_scale / g_scale), expected[0], rtol=tolerance, atol=tolerance
        )
    for mean, var in (([1e300], [1.0]), ([0.0], [1e-320])):
        nbbn.batch_norm_backward(g0, x0, np.array(mean), np.array(var), eps=0.0)  # no warning: they are errors here
    g0[0, 0, 0] = np.inf
    for training in (True, False):
        with np.errstate(all="ignore"):
            weight_gradient = nbbn.batch_norm_backward(g0, x0, np.array([0.1]), np.ones(1), training=training)[1]
        assert np.isinf(weight_gradient).all()


def test_out_is_returned_whatever_its_class(tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    mapped = np.memmap(tmp_path / "y", np.float32, "w+", shape=x.shape)
    assert nbbn.batch_norm(x, training=True, out=mapped) is mapped
    assert nbbn.normalize(x, np.zeros(3), np.ones(3), out=mapped) is mapped
    assert nbbn.batch_norm_backward(x, x, np.zeros(3), np.ones(3), out=mapped)[0] is mapped
    column = x[:, :1].copy()
    assert nbbn.normalize(column, np.zeros(1), np.ones(1), out=column[:, ::-1]) is not None


def test_ghost_batches_as_documented(backend):
    """Parts of 7, 7 and 6: output, running statistics and gradients are those of three batches, one after the other."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(2, 3, (20, 3, 4)), rng.normal(size=(20, 3, 4))
    weight, bias = rng.normal(size=(2, 3))
    mean, var, y = np.zeros(3), np.ones(3), np.empty_like(x)
    ghosts = [
        nbbn.batch_norm(part, mean, var, weight, bias, training=True, return_stats=True, out=out)[1]
        for part, out in zip(np.array_split(x, 3), np.array_split(y, 3), strict=True)
    ]
    expected_mean, expected_var = np.zeros(3, oracle.WIDE), np.ones(3, oracle.WIDE)
    for rows, ghost in zip((slice(0, 7), slice(7, 14), slice(14, 20)), ghosts, strict=True):
        count, batch_mean, batch_var = oracle.stats(x[rows])
        expected_mean += oracle.WIDE(0.1) * (batch_mean - expected_mean)
        expected_var += oracle.WIDE(0.1) * (batch_var * count / (count - 1) - expected_var)
        expected = oracle.normalize(x[rows], batch_mean, batch_var, weight, bias)
        np.testing.assert_allclose(y[rows], expected.astype(float), rtol=1e-12, atol=1e-12)
        gradients = nbbn.batch_norm_backward(g[rows], x[rows], ghost.mean, ghost.var(), weight)
        for ours, theirs in zip(
            gradients, oracle.backward(g[rows], x[rows], batch_mean, batch_var, weight), strict=True
        ):
            np.testing.assert_allclose(ours, theirs.astype(float), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean, expected_mean.astype(float), rtol=1e-12)
    np.testing.assert_allclose(var, expected_var.astype(float), rtol=1e-12)
    population = sum(ghosts, nbbn.Moments.zeros(3))
    np.testing.assert_allclose(population.var(), oracle.stats(x)[2].astype(float), rtol=1e-12)
