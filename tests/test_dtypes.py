"""Half precision, integers and bool: converted in registers, exact where the issue is counting."""

import ml_dtypes
import numpy as np
import oracle
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

import nbbn
from nbbn.cpu import caches, storage

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype(np.float16), BFLOAT16]
INTEGERS = [np.dtype(c) for c in "?bBhHiIlLqQ"]

#: A byte, a bool and a long integer stand for all where time matters: each dtype compiles kernels of its own.
FEW = [*HALVES, *(np.dtype(c) for c in "?Bq")]
EVERY = [*FEW, *(pytest.param(d, marks=pytest.mark.slow) for d in INTEGERS if d not in FEW)]

#: One shape per kernel family, and one that folds rows.
SHAPES = [((5, 3, 300), 1), ((20, 6, 7, 7), 1), ((300, 3), 1)]


def full_range(dtype, shape):
    """Random values over all that the dtype holds, both ends among them."""
    rng = np.random.default_rng(1)
    if dtype.kind == "b":
        return rng.random(shape) < 0.3
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        x = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
        x.flat[0], x.flat[-1] = limits.min, limits.max
        return x
    return (rng.standard_normal(shape) * 3 + 2).astype(dtype)


def exactly(x):
    """`x` in extended precision, every value as it is."""
    return x.astype(np.float64).astype(oracle.WIDE) if x.dtype == BFLOAT16 else x.astype(oracle.WIDE)


def half_ulp(dtype):
    """Largest relative error of rounding to `dtype`."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def assert_one_rounding(y, expected, slack=0.0):
    """Within one unit in the last place: float32 arithmetic rounds twice on its way (and for halves once more)."""
    tiny = float(ml_dtypes.finfo(y.dtype).smallest_subnormal)
    error = np.abs(exactly(y) - expected)
    assert (error <= 2 * half_ulp(y.dtype) * np.abs(expected) + tiny + slack).all()


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_statistics(backend, dtype, shape, axis):
    x = full_range(dtype, shape)
    count, mean, var = oracle.stats(exactly(x), axis)
    m = nbbn.batch_stats(x, axis=axis)
    bound = 2e-7 if dtype in HALVES else 1e-14
    assert (m.count == count).all()
    assert (np.abs(m.mean - mean) <= bound * np.sqrt(var) + np.abs(mean) * 2**-52).all()
    assert (np.abs(m.var() - var) <= bound * var).all()


@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.uint8), np.dtype(np.int64), np.dtype(bool)], ids=str)
def test_masked_statistics(backend, dtype):
    x = full_range(dtype, (40, 6, 30))
    where = np.random.default_rng(2).random(x.shape) < 0.5
    _, mean, var = oracle.stats(exactly(x), 1, where)
    m = nbbn.batch_stats(x, where=where)
    assert (np.abs(m.mean - mean) <= 2e-7 * np.sqrt(var)).all()
    assert (np.abs(m.var() - var) <= 4e-7 * var).all()


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_sums_of_integers_that_float64_does_not_hold_are_exact(dtype, shape, axis):
    """Neighbours of 2**62: as float64 they would all be the same number."""
    x = np.random.default_rng(3).integers(0, 9, shape).astype(dtype)
    reference = nbbn.batch_stats(x, axis=axis)
    shifted = nbbn.batch_stats(x + dtype(2**62), axis=axis)
    assert (shifted.mean == 2.0**62 + reference.mean).all()
    if shape[0] < 100:  # more rows are several chunks, and a float64 mean of each has lost what they differ in
        assert np.allclose(shifted.m2, reference.m2, rtol=1e-14, atol=0)


def test_long_channels_of_bytes():
    """More values than 32-bit sums of squares can hold."""
    x = np.full((2, 1, 400_000), 255, np.uint8)
    x[1] = 0
    m = nbbn.batch_stats(x)
    assert m.mean[0] == 127.5
    assert m.m2[0] == pytest.approx(800_000 * 127.5**2, rel=1e-15)


# --- normalization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_normalize(backend, dtype, shape, axis):
    x = full_range(dtype, shape)
    m = nbbn.batch_stats(x, axis=axis)
    rng = np.random.default_rng(4)
    weight, bias = rng.uniform(0.5, 2, m.mean.size), rng.uniform(-1, 1, m.mean.size)
    y = nbbn.normalize(x, m.mean, m.var(), weight, bias, axis=axis)
    assert y.dtype == (dtype if dtype in HALVES else np.float32)
    # the bias cancels with the rest somewhere: there an error of one rounding of either is what is left
    slack = 4 * half_ulp(np.dtype(np.float32))
    assert_one_rounding(y, oracle.normalize(exactly(x), m.mean, m.var(), weight, bias, axis=axis), slack)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 8192), (2048, 32), (16, 64, 8, 8)])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_half_passes_unchanged(backend, dtype, shape, streaming, monkeypatch):
    monkeypatch.setattr(caches, "streams", lambda *arrays: streaming)
    x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(shape)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    with np.errstate(all="ignore"):
        y = nbbn.normalize(x, zeros, ones, eps=0.0)
        nan = np.isnan(x.astype(np.float32))
        assert np.isnan(y.astype(np.float32))[nan].all()
    assert (y.view(np.uint16) == x.view(np.uint16))[~nan].all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_and_backward(backend, dtype, shape, axis):
    x, gradient = full_range(dtype, shape), full_range(dtype, shape) * dtype.type(0.5)
    _, mean, var = oracle.stats(exactly(x), axis)
    running_mean, running_var = np.zeros(mean.size), np.ones(mean.size)
    y = nbbn.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, axis=axis)
    assert y.dtype == dtype
    assert_one_rounding(y, oracle.normalize(exactly(x), mean, var, axis=axis), 1e-6)
    assert np.allclose(running_mean, mean.astype(float), rtol=1e-6)
    grad_x, grad_weight, grad_bias = nbbn.batch_norm_backward(
        gradient, x, mean.astype(float), var.astype(float), axis=axis
    )
    expected = oracle.backward(exactly(gradient), exactly(x), mean, var, axis=axis)
    assert grad_x.dtype == dtype
    assert grad_weight.dtype == grad_bias.dtype == np.float32  # a sum of many halves would overflow a half
    assert_one_rounding(grad_x, expected[0], 1e-5)
    assert np.allclose(grad_weight, expected[1].astype(float), rtol=1e-4, atol=1e-3)
    assert np.allclose(grad_bias, expected[2].astype(float), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
def test_out_of_another_dtype(backend, dtype):
    x = full_range(np.dtype(np.uint8), (4, 3, 200))
    out = np.empty(x.shape, dtype)
    mean, var = np.array([100.0, 120.0, 140.0]), np.array([5000.0, 5500.0, 6000.0])
    assert nbbn.batch_norm(x, mean, var, out=out) is out
    assert_one_rounding(out, oracle.normalize(exactly(x), mean, var), 1e-6)


def test_residual_of_another_dtype(backend):
    x = full_range(np.dtype(np.float16), (4, 3, 200))
    residual = full_range(np.dtype(np.int8), x.shape)
    y = nbbn.normalize(x, np.zeros(3), np.ones(3), residual=residual, eps=0.0)
    assert_one_rounding(y, exactly(x) + exactly(residual), 1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_])
def test_integers_do_not_train(dtype):
    x = np.ones((4, 3), dtype)
    with pytest.raises(TypeError, match=rf"x: expected float32.*in training, got {np.dtype(dtype)}"):
        nbbn.batch_norm(x, training=True)
    with pytest.raises(TypeError, match="grad_out: expected float32"):
        nbbn.batch_norm_backward(x, np.ones((4, 3)), np.zeros(3), np.ones(3))
    with pytest.raises(TypeError, match=r"x: expected float32.*in backward"):
        nbbn.batch_norm_backward(np.ones((4, 3)), x, np.zeros(3), np.ones(3))
    with pytest.raises(TypeError, match="out: expected dtype float32"):
        nbbn.normalize(np.ones((4, 3)), np.zeros(3), np.ones(3), out=x)


@pytest.mark.parametrize("dtype", [np.longdouble, np.complex64, np.dtype("U1"), np.dtype("M8[s]"), object])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="x: expected float32"):
        nbbn.batch_stats(np.empty((2, 2), dtype))


# --- the conversions that serve processors without instructions for halves ------------------------------------------


@intrinsic
def _half_to_float_in_software(typingctx, bits):
    def codegen(context, builder, signature, arguments):
        return storage.half_to_float_bits(builder, arguments[0])

    return types.float32(types.uint16), codegen


@intrinsic
def _float_to_half_in_software(typingctx, value):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(storage.float_to_half_bits(builder, arguments[0]), ir.IntType(16))

    return types.uint16(types.float32), codegen


@njit
def _widen(bits, values):
    for i in range(bits.size):
        values[i] = _half_to_float_in_software(bits[i])


@njit
def _narrow(values, bits):
    for i in range(bits.size):
        bits[i] = _float_to_half_in_software(values[i])


def test_half_to_float_without_instructions():
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(bits.size, np.float32)
    _widen(bits, values)
    assert np.array_equal(values, bits.view(np.float16).astype(np.float32), equal_nan=True)


def test_float_to_half_without_instructions():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[:-1] + finite[1:]) / 2
    edges = np.float32([65519.996, 65520, 1e30, -1e30, np.inf, -np.inf, np.nan, 2**-25, 2**-26, 1e-40, 0.0, -0.0])
    some = np.random.default_rng(5).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(9e9)), edges, some]
    )
    bits = np.empty(values.size, np.uint16)
    _narrow(values, bits)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(bits.view(np.float16), expected, equal_nan=True)
    assert (np.signbit(bits.view(np.float16)) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, np.float16])
@pytest.mark.parametrize("layout", ["columns", "rows", "drifting rows"])
def test_values_whose_beginning_tells_nothing_of_the_rest(dtype, layout):
    """The origin is far from the mean: the second, careful pass."""
    x = np.ones((1000, 4) if layout == "columns" else (2, 1, 4096), dtype)
    if layout == "columns":
        x[:20] = 0
    elif layout == "rows":
        x[:, :, ::16] = 0
    else:
        x[0, 0, :1024] = 0
    _, mean, var = oracle.stats(exactly(x), 1)
    m = nbbn.batch_stats(x)
    assert np.allclose(m.mean, mean.astype(float), rtol=1e-14)
    assert np.allclose(m.var(), var.astype(float), rtol=1e-6 if dtype == np.float16 else 1e-13)


@pytest.mark.parametrize("shape", [(1000, 4), (2, 4, 300)])
@pytest.mark.parametrize(("dtype", "largest"), [(np.uint64, 2**64 - 1), (np.int64, 2**63 - 1)])
def test_the_largest_integers(shape, dtype, largest):
    x = np.full(shape, largest - 4, dtype)
    x[..., ::3] = largest
    x[::3] = largest - 2
    relative = (x - dtype(largest - 4)).astype(np.float64)
    assert np.allclose(nbbn.batch_stats(x).m2.sum(), nbbn.batch_stats(relative).m2.sum(), rtol=0.5)
    if shape[0] < 100:  # one chunk; its origin is up to 2048 off, the largest float64 that converts
        assert np.allclose(nbbn.batch_stats(x).m2, nbbn.batch_stats(relative).m2, rtol=1e-8)


@pytest.mark.parametrize("shape", [(1, 2, 37), (37, 2), (300, 3)])
def test_every_nan_stays_one_in_bfloat16(shape):
    """Rounding by adding to the bits would carry some NaNs into a zero."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000, 0x7FC00000], np.uint32)
    x = np.resize(nans, shape).view(np.float32)
    out = np.zeros(shape, bfloat16)
    nbbn.normalize(x, np.zeros(shape[1]), np.ones(shape[1]), out=out)
    assert np.isnan(out.astype(np.float32)).all()
    with np.errstate(invalid="ignore"):
        halves = x.astype(np.float16)
    nbbn.normalize(halves, np.zeros(shape[1]), np.ones(shape[1]), out=out)
    assert np.isnan(out.astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(2, 2, 37), (300, 3), (5, 64)])
def test_bfloat16_meets_other_dtypes_place_by_place(shape):
    """Long vectors of bfloat16 results are computed in another order: everything that goes into them must follow."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(3)
    x, residual = rng.standard_normal((2, *shape)).astype(np.float32)
    mean, var = rng.standard_normal(shape[1]), rng.uniform(1, 2, shape[1])
    for x_dtype, residual_dtype in [(bfloat16, np.float32), (np.float32, bfloat16), (np.float16, np.float64)]:
        given, addend, out = x.astype(x_dtype), residual.astype(residual_dtype), np.empty(shape, bfloat16)
        nbbn.normalize(given, mean, var, residual=addend, out=out)
        with nbbn.use_backend("numpy"):
            exact = nbbn.normalize(given.astype(np.float64), mean, var, residual=addend.astype(np.float64))
        assert (np.abs(out.astype(float) - exact) <= 2.0**-8 * np.abs(exact) + 1e-6).all()
