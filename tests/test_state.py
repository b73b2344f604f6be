"""State dicts out and in, under the names of three frameworks, and the variance convention between them."""

import numpy as np
import pytest

import nbbn
from nbbn import BatchNorm

#: Names and nesting as the frameworks document them: torch.nn.BatchNorm2d.state_dict(), the order and names of
#: keras.layers.BatchNormalization().weights, flax.linen.BatchNorm().init().
FRAMEWORKS = {
    "torch": lambda w, b, m, v: {"weight": w, "bias": b, "running_mean": m, "running_var": v},
    "keras": lambda w, b, m, v: {"gamma": w, "beta": b, "moving_mean": m, "moving_variance": v},
    "flax": lambda w, b, m, v: {"params": {"scale": w, "bias": b}, "batch_stats": {"mean": m, "var": v}},
}


def layer(**options):
    bn = BatchNorm(3, **options)
    for i, array in enumerate((bn.weight, bn.bias, bn.running_mean, bn.running_var)):
        if array is not None:
            array[:] = np.arange(1, 4) + 10 * i
    return bn


def arrays(bn):
    return [a for a in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if a is not None]


def flat(tree, path=""):
    """Names joined by '/', as flax.traverse_util.flatten_dict(tree, sep='/') gives them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize("style", FRAMEWORKS)
def test_names_and_order_are_the_framework_s(style):
    bn = layer()
    written = bn.state_dict(style=style)
    expected = FRAMEWORKS[style](*arrays(bn))
    if style == "torch":
        assert written.pop("num_batches_tracked").dtype == np.int64
    assert [name for name, _ in flat(written)] == [name for name, _ in flat(expected)]
    for (_, ours), (_, theirs) in zip(flat(written), flat(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert not np.shares_memory(ours, theirs)


@pytest.mark.parametrize("style", FRAMEWORKS)
@pytest.mark.parametrize("prefix", ["", "net.bn1.", "block/bn1/"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": np.float64}])
def test_round_trip(style, prefix, options):
    if style == "flax" and prefix == "net.bn1.":
        prefix = "net.bn1/"  # a path
    bn = layer(**options)
    state = bn.state_dict(style=style, prefix=prefix)
    if prefix:
        other = BatchNorm(3).state_dict(style=style, prefix="other/")
        state = {k: state.get(k, {}) | other[k] for k in other} if style == "flax" else state | other
    back = BatchNorm.from_state_dict(state, prefix)
    assert (back.affine, back.track_running_stats) == (bn.affine, bn.track_running_stats)
    assert [a.tobytes() for a in arrays(back)] == [a.tobytes() for a in arrays(bn)]
    loaded = BatchNorm(3, **options).load_state_dict(state, prefix)
    assert [a.tobytes() for a in arrays(loaded)] == [a.tobytes() for a in arrays(bn)]


def test_flat_flax_and_keras_2_names():
    bn = layer()
    flattened = dict(flat(bn.state_dict(style="flax", prefix="a/b/")))
    assert list(flattened) == [
        "params/a/b/scale", "params/a/b/bias", "batch_stats/a/b/mean", "batch_stats/a/b/var",
    ]  # fmt: skip
    nnx = {"scale": bn.weight, "bias": bn.bias, "mean": bn.running_mean, "var": bn.running_var}
    keras_2 = {f"bn/{name}:0": value for name, value in bn.state_dict(style="keras").items()}
    for state, prefix, eps in ((flattened, "a/b/", 1e-5), (nnx, "", 1e-5), (keras_2, "bn/", 1e-3)):
        back = BatchNorm.from_state_dict(state, prefix)
        assert [a.tobytes() for a in arrays(back)] == [a.tobytes() for a in arrays(bn)]
        assert back.eps == eps


def test_a_prefix_that_fits_nothing_changes_nothing():
    bn = layer()
    before = [a.tobytes() for a in arrays(bn)]
    with pytest.raises(ValueError, match=r"entries that begin with 'bn2\.'"):
        bn.load_state_dict(bn.state_dict(prefix="bn1."), "bn2.")
    assert [a.tobytes() for a in arrays(bn)] == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"style": "onnx"}, ValueError, r"style: expected one of \('torch', 'keras', 'flax'\), got 'onnx'"),
        ({"style": None}, ValueError, "style: expected one of"),
        ({"prefix": 1}, TypeError, "prefix: expected a string, got 1"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        layer().state_dict(**options)


# --- the variance that goes into the running average ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_variances_of_the_two_conventions(dtype):
    rng = np.random.default_rng(0)
    running = {ddof: np.zeros(5, dtype) for ddof in (0, 1)}  # no start value: the average of the data alone
    for _ in range(50):
        stats = nbbn.batch_stats(rng.normal(1, 3, (7, 5)))
        for ddof, var in running.items():
            nbbn.ema_update(np.zeros(5, dtype), var, stats, ddof=ddof)
    population, sample = running[0], running[1]
    # each of 50 updates rounds once, and what is left of them adds up to less than 1 / momentum of them
    rtol = 10 * np.finfo(dtype).eps
    for converted, expected in (
        (nbbn.sample_to_population_var(sample, 7), population),
        (nbbn.population_to_sample_var(population, 7), sample),
    ):
        assert converted.dtype == dtype
        np.testing.assert_allclose(converted, expected, rtol=rtol)
    assert not np.allclose(population, sample, rtol=0.1)


@pytest.mark.parametrize("convert", [nbbn.sample_to_population_var, nbbn.population_to_sample_var])
def test_bessel_refuses(convert):
    for n in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="n: expected an integer >= 2"):
            convert(np.ones(3), n)
    with pytest.raises(TypeError, match="var: expected dtype float32 or float64, got int64"):
        convert(np.ones(3, np.int64), 4)
