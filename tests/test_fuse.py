"""Folding: against extended precision, and what it says about its own error against what is measured."""

import warnings

import numpy as np
import pytest

import nbbn

WIDE = np.longdouble


def case(channels=6, inputs=5, kernel=(3,), dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((channels, inputs, *kernel)).astype(dtype)
    b, mean, bias = rng.standard_normal((3, channels)).astype(dtype)
    var, weight = rng.uniform(0.1, 3, (2, channels)).astype(dtype)
    return w, b, mean, var, 1e-5, weight, bias


def textbook(w, b, mean, var, eps, weight, bias, channel_axis=0):
    w, mean, var = w.astype(WIDE), mean.astype(WIDE), var.astype(WIDE)
    scale = (1 if weight is None else weight.astype(WIDE)) / np.sqrt(var + WIDE(eps))
    shape = [1] * w.ndim
    shape[channel_axis] = -1
    b = 0 if b is None else b.astype(WIDE)
    return w * scale.reshape(shape), (b - mean) * scale + (0 if bias is None else bias.astype(WIDE))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("absent", [(), (1,), (5,), (6,), (1, 5, 6)])
def test_conv_and_linear_in_extended_precision(dtype, absent):
    for kernel in ((3,), (3, 3), (1, 2, 2), ()):
        arguments = [None if i in absent else a for i, a in enumerate(case(kernel=kernel, dtype=dtype))]
        fuse = nbbn.fuse_conv_bn_weights if kernel else nbbn.fuse_linear_bn_weights
        fused, expected = fuse(*arguments), textbook(*arguments)
        for ours, exact in zip(fused, expected, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == exact.shape
            # rounded once: half a unit in the last place of the result, and what float64 loses before, 4 roundings of
            # terms no larger than 20 here
            spacing = np.maximum(np.abs(exact), np.finfo(dtype).tiny) * np.finfo(dtype).eps
            assert (np.abs(ours - exact) <= 0.5 * spacing + 20 * 4 * 2.0**-53).all()


def test_parameters_of_another_precision_and_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    w, b, mean, var, eps, weight, bias = case()
    half = nbbn.fuse_conv_bn_weights(w.astype(bfloat16), None, mean, var.astype(np.float64), eps, weight, bias)
    assert [a.dtype for a in half] == [bfloat16, bfloat16]
    mixed = nbbn.fuse_conv_bn_weights(w.astype(np.float16), b.astype(np.float64), mean, var, eps, weight, bias)
    assert [a.dtype for a in mixed] == [np.float16, np.float64]
    exact = textbook(w.astype(bfloat16), None, mean, var, eps, weight, bias)
    for ours, expected in zip(half, exact, strict=True):
        np.testing.assert_allclose(ours.astype(float), expected.astype(float), rtol=2.0**-8)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_transposed_convolutions_of_any_number_of_groups(groups):
    """Taps of size 1: the convolution is a matrix product for each group."""
    channels, inputs = 6, 12
    rng = np.random.default_rng(groups)
    w = rng.standard_normal((inputs, channels // groups, 1))
    _, b, mean, var, eps, weight, bias = case(channels, dtype=np.float64)
    x = rng.standard_normal((7, inputs))

    def convolved(w, b):
        parts = zip(np.split(x, groups, 1), np.split(w[..., 0], groups), strict=True)
        return np.concatenate([part @ kernel for part, kernel in parts], axis=1) + b

    fused = nbbn.fuse_conv_bn_weights(w, b, mean, var, eps, weight, bias, transpose=True)
    expected = nbbn.normalize(convolved(w, b), mean, var, weight, bias, eps=eps)
    np.testing.assert_allclose(convolved(*fused), expected, rtol=1e-12, atol=1e-12)
    assert fused[0].shape == w.shape


def test_nothing_is_written_and_results_are_new():
    arguments = case()
    before = [np.array(a) for a in arguments]
    fused = nbbn.fuse_conv_bn_weights(*arguments)
    assert all((a == b).all() for a, b in zip(before, arguments, strict=True))
    assert not any(np.shares_memory(f, a) for f in fused for a in arguments if isinstance(a, np.ndarray))


# --- how far off it is ----------------------------------------------------------------------------------------------


def measured(w, b, mean, var, eps, weight, bias, x, dtype):
    """RMS change of the output, per channel: exact arithmetic on folded parameters that were rounded to `dtype`."""
    exact_w, exact_b = textbook(w, b, mean, var, eps, weight, bias)
    difference, offset = (a.astype(float).astype(dtype).astype(WIDE) - a for a in (exact_w, exact_b))
    change = x.astype(WIDE) @ difference.T + offset
    return np.sqrt((change**2).mean(0)).astype(float)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("center", [0, 1, 30, 1e3, 1e5])
@pytest.mark.parametrize("rectified", [False, True])
def test_the_estimate_is_what_is_measured(dtype, center, rectified):
    """Well and ill-conditioned: `center` is the mean of the inputs, in standard deviations of theirs."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    if dtype == "float16" and center > 1e4:
        pytest.skip("float16 ends at 65504")
    rng = np.random.default_rng(3)
    channels, inputs = 64, 72
    w, b, *_, weight, bias = case(channels, inputs, (), np.float64)
    x = rng.standard_normal((4000, inputs))
    x = center + (np.maximum(x, 0) if rectified else x)
    z = nbbn.batch_stats(x @ w.T + b)
    layer = w, b, z.mean, z.var(), 1e-5, weight, bias
    actual = measured(*layer, x, np.dtype(dtype))
    blind = nbbn.folding_error(*layer, dtype=dtype)
    assert 1 / 2 < np.sqrt(np.mean(blind.error**2) / np.mean(actual**2)) < 2
    assert (actual < 4 * blind.error).all()
    sharp = nbbn.folding_error(*layer, dtype=dtype, input_stats=nbbn.batch_stats(x)).error
    # inputs are independent: what is left are correlations of 4000 draws, 1/sqrt(4000) each, over 72 inputs
    np.testing.assert_allclose(sharp, actual, rtol=0.15)
    if dtype == "float32":
        assert (blind.ill_conditioned.mean() > 0.5) == (center >= 1e4)


def test_inputs_with_a_large_mean_need_input_stats():
    """What the estimate without them documents: weights that cancel hide how large the inputs are."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 32))
    w -= w.mean(axis=1, keepdims=True)  # every channel cancels what its inputs have in common
    x = 1e4 + rng.standard_normal((1000, 32))
    z = nbbn.batch_stats(x @ w.T)
    layer = w, None, z.mean, z.var(), 1e-5, None, None
    actual = measured(*layer, x, np.float32)
    assert np.median(nbbn.folding_error(*layer, dtype=np.float32).error / actual) < 0.01
    sharper = nbbn.folding_error(*layer, dtype=np.float32, input_stats=nbbn.batch_stats(x)).error
    np.testing.assert_allclose(sharper, actual, rtol=0.1)


@pytest.mark.parametrize(("transpose", "shape"), [(False, (6, 2, 3)), (True, (8, 3, 3))])
def test_input_stats_reach_the_weights_of_their_channel(transpose, shape):
    """Grouped: only the input channels of its group move an output."""
    w = np.random.default_rng(0).standard_normal(shape)
    inputs = shape[0] if transpose else 2 * shape[1]
    layer = w, None, np.zeros(6), np.ones(6), 1e-5, None, None, transpose
    for channel in range(inputs):
        mean = np.zeros(inputs)
        mean[channel] = 1e3
        stats = nbbn.Moments(np.full(inputs, 10), mean, np.zeros(inputs))
        error = nbbn.folding_error(*layer, dtype=np.float32, input_stats=stats).error
        reached = error > 0
        assert reached.tolist() == [c // 3 == channel // (inputs // 2) for c in range(6)]
        scale = 1 / np.sqrt(1 + WIDE(1e-5))
        difference = (w * scale).astype(np.float32) - w * scale
        taps = difference[channel] if transpose else difference[channel // 2 * 3 : channel // 2 * 3 + 3, channel % 2]
        np.testing.assert_allclose(error[reached], np.abs(taps.sum(1)).astype(float) * 1e3, rtol=1e-6)


def test_one_broken_channel_leaves_the_estimates_of_the_others():
    """And depthwise, every channel is told by itself."""
    w, b, mean, var, eps, weight, bias = case(dtype=np.float64)
    sane = nbbn.folding_error(w, b, mean, var, eps, weight, bias, dtype=np.float32).error
    var[2] = 1e12
    broken = nbbn.folding_error(w, b, mean, var, eps, weight, bias, dtype=np.float32).error
    others = np.arange(6) != 2
    np.testing.assert_allclose(broken[others], sane[others], rtol=0.5)
    depthwise = w[:, :1], b, mean, var, eps, weight, bias
    alone = [
        nbbn.folding_error(*(a if a is eps else a[c : c + 1] for a in depthwise), dtype=np.float32) for c in range(6)
    ]
    together = nbbn.folding_error(*depthwise, dtype=np.float32)
    assert together.error.tolist() == [one.error[0] for one in alone]


def test_float64_has_an_error_too():
    arguments = case(dtype=np.float64)
    error = nbbn.folding_error(*arguments).error
    assert (error > 1e-17).all()
    assert (error < 1e-14).all()


def test_what_a_dtype_cannot_hold():
    w, b, mean, var, eps, weight, bias = case(dtype=np.float16)
    mean[2] = 60000
    var[2] = 0.1
    with pytest.raises(ValueError, match=r"conv_b: expected folded values that float16 can hold, got .* in channel 2"):
        nbbn.fuse_conv_bn_weights(w, b, mean, var, eps, weight, bias)
    error = nbbn.folding_error(w, b, mean, var, eps, weight, bias)
    assert np.isinf(error.error).tolist() == [c == 2 for c in range(6)]
    assert error.worst(1).tolist() == [2]
    assert "1 of them ill-conditioned" in str(error)
    w[4, 0, 0], var[4] = 60000, 1e-4
    with pytest.raises(ValueError, match="conv_w: expected folded values that float16 can hold"):
        nbbn.fuse_conv_bn_weights(w, b, np.zeros_like(mean), var, eps, weight, bias)


def test_what_float64_cannot_hold():
    """The arithmetic itself is beyond float64: refused as well, and NumPy's settings for errors change nothing."""
    w, b, mean, var, eps, weight, bias = case(dtype=np.float64)
    small = w * 1e-310, b, mean * 1e-310, var, eps, weight * 1e-3, bias
    for settings in ("warn", "raise"):
        with np.errstate(all=settings):
            for large in (
                {0: w * 1e300, 3: var * 1e-300},
                {2: mean * 1e300, 3: var * 1e-300},
                {5: weight * 1e307, 3: var * 1e-30},
            ):
                given = [large.get(i, a) for i, a in enumerate((w, b, mean, var, 0.0, weight, bias))]
                with pytest.raises(
                    ValueError, match=r"conv_[wb]: expected folded values that float64 can hold, got inf"
                ):
                    nbbn.fuse_conv_bn_weights(*given)
                assert np.isinf(nbbn.folding_error(*given, dtype=np.float32).error).any()
            nbbn.fuse_conv_bn_weights(*small)


# --- the warning ----------------------------------------------------------------------------------------------------


def test_the_rule_of_the_warning():
    w, b, mean, var, eps, weight, bias = case(dtype=np.float32)
    b[:], var[:] = 0, 1
    mean[:] = 4095  # half of the digits of float32: 2**12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbbn.fuse_conv_bn_weights(w, b, mean, var, eps, weight, bias)
        b[3] = 1e6  # a bias that the mean cancels is no harm
        mean[3] = 1e6
        nbbn.fuse_conv_bn_weights(w, b, mean, var, eps, weight, bias)
    mean[1], mean[4] = 4097, -5000
    with pytest.warns(
        nbbn.IllConditionedWarning, match=r"of 6 channels, 2 lose .* float32 .*5e\+03 in channel 4"
    ) as got:
        nbbn.fuse_conv_bn_weights(w, b, mean, var, eps, weight, bias)
    assert got[0].filename == __file__
    mean[:], var[5] = 0, 0.9e-5
    with pytest.warns(nbbn.IllConditionedWarning, match=r"1 have a variance below eps \(the first is channel 5\)"):
        nbbn.fuse_linear_bn_weights(w[..., 0], b * 0, mean, var, eps, weight, bias)
    flagged = nbbn.folding_error(w, b * 0, mean, var, eps, weight, bias).ill_conditioned
    assert flagged.tolist() == [False] * 5 + [True]
    assert nbbn.folding_error(w, b * 0, mean + 50, var, eps, dtype=np.float16).ill_conditioned.all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {0: np.zeros((4, 5, 3))},
            ValueError,
            r"conv_w: expected 6 output channels .* got shape \(4, 5, 3\)",
        ),
        ({0: np.zeros(6)}, ValueError, "conv_w: expected at least 2 dimensions"),
        ({0: np.zeros((6, 5, 3), int)}, TypeError, "conv_w: expected float32, float64, float16 or bfloat16"),
        ({0: [[1.0]]}, TypeError, "conv_w: expected a NumPy array, got list"),
        ({1: np.zeros(5)}, ValueError, r"conv_b: expected 6 values, one per channel, .* got shape \(5,\)"),
        ({2: np.zeros((6, 1))}, ValueError, "running_mean: expected one value per channel"),
        ({3: np.ones(5)}, ValueError, "running_var: expected 6 values"),
        (
            {3: np.array([1, 1, -1, 1, 1, 1.0])},
            ValueError,
            r"running_var: .* >= 0.*-1.0 in channel 2",
        ),
        ({3: np.zeros(6), 4: 0.0}, ValueError, r"running_var: .*> 0 with eps=0, got 0.0 in channel 0"),
        ({2: np.full(6, np.nan)}, ValueError, r"running_mean: expected finite.*see nbbn.check_running_stats"),
        ({4: -1.0}, ValueError, "eps: expected a finite number >= 0"),
        ({5: np.ones(5)}, ValueError, "weight: expected 6 values"),
        ({5: np.array([1, 1, np.inf, 1, 1, 1])}, ValueError, "^weight: expected finite values, got inf in channel 2"),
        ({6: np.array([1, np.nan, 1, 1, 1, 1])}, ValueError, "^bias: expected finite values, got nan in channel 1"),
        ({1: np.full(6, -np.inf)}, ValueError, "^conv_b: expected finite values, got -inf in channel 0"),
        ({0: np.full((6, 5), np.inf)}, ValueError, "^conv_w: expected finite values, got inf in channel 0"),
        (
            {0: np.zeros((0, 5, 3)), 2: np.zeros(0)},
            ValueError,
            r"running_mean: expected at least one channel, got shape",
        ),
        ({6: np.ones(5)}, ValueError, "bias: expected 6 values"),
        ({7: True}, ValueError, r"conv_w: expected shape \(in, 6 / groups, ...\) for a transposed convolution"),
        ({7: 1}, TypeError, "transpose: expected True or False"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = [changes.get(i, a) for i, a in enumerate((*case(), False))]
    for function in (nbbn.fuse_conv_bn_weights, nbbn.folding_error):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match=r"linear_w: expected 2 dimensions, got shape \(6, 5, 3\)"):
        nbbn.fuse_linear_bn_weights(*case())
    for dtype in (np.int32, "float23", np.complex64):
        with pytest.raises(TypeError, match="dtype: expected float32, float64, float16 or bfloat16"):
            nbbn.folding_error(*case(), dtype=dtype)
    with pytest.raises(TypeError, match="input_stats: expected Moments"):
        nbbn.folding_error(*case(), input_stats=np.ones(5))
    with pytest.raises(ValueError, match="input_stats: expected 5 channels for each group of the convolution, got 6"):
        nbbn.folding_error(*case(), input_stats=nbbn.Moments.zeros(6))
