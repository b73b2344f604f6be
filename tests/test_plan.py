"""Which kernel serves a call: every way of cutting arrays up gives the same results; and the way that is taken."""

import ml_dtypes
import numpy as np
import pytest

import nbbn
from nbbn.cpu import caches, plan, threads

# on both sides of every switch between the families: (outer, channels, inner)
SHAPES = [
    (outer, channels, inner)
    for outer in (16, 17, 31, 32)
    for inner in (15, 16, 23, 24, 31, 32, 35, 36, 47, 48, 55, 56)
    for channels in ((3, 150) if inner in (24, 36, 56) else (3,))
] + [(9, 24, 127), (9, 24, 128), (9, 24, 256), (513, 64, 9), (40, 256, 40)]


def everything(x, gradient, parallel):
    """Results of all operations; an axis that is not an int takes the long way, on one thread or as if on two."""
    axis = np.int64(1)
    weight, bias = np.linspace(0.5, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    with threads.pretend(parallel):
        stats = nbbn.batch_stats(x, axis=axis)
        given = stats.mean, stats.var(), weight
        return (
            stats.mean,
            stats.m2,
            nbbn.normalize(x, *given, bias, axis=axis),
            nbbn.batch_norm(x, None, None, weight, bias, training=True, axis=axis),
            *nbbn.batch_norm_backward(gradient, x, *given, axis=axis),
            *nbbn.batch_norm_backward(gradient, x, *given, axis=axis, training=False),
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_gives_the_results_of_the_reference_on_any_number_of_threads(shape):
    rng = np.random.default_rng(sum(shape))
    x, gradient = (rng.standard_normal(shape).astype(np.float32) + np.float32(k) for k in (3, 0))
    one, two = everything(x, gradient, False), everything(x, gradient, True)
    with nbbn.use_backend("numpy"):
        expected = everything(x, gradient, False)
    size = np.sqrt(x.size / x.shape[1])  # of sums over a channel
    for got, same, wanted in zip(one, two, expected, strict=True):
        assert got.tobytes() == same.tobytes()
        bound = 2e-5 * (size if wanted.ndim == 1 else 1.0) + 2e-5 * np.abs(wanted)
        assert (np.abs(got - wanted) <= bound).all()


@pytest.fixture
def usual_caches(monkeypatch):
    monkeypatch.setattr(caches, "sizes", lambda: (512 << 10, 32 << 20))


def views(*shape, copies=2, dtype=np.float32):
    return (plan.View(shape, (shape[1] * shape[2] * 4, shape[2] * 4, 4), np.dtype(dtype).itemsize),) * copies


@pytest.mark.parametrize(
    ("shape", "training", "backward"),
    [
        ((32, 64, 784), "channels", "channels"),
        ((64, 64, 3136), "channels", "channels"),
        ((32, 512, 196), None, "channels"),  # in reach of the caches: reading all of it again is as fast
        ((64, 1024, 196), "channels", "channels"),
        ((128, 128, 196), None, None),  # short pieces
        ((256, 256, 196), None, "channels"),
        ((64, 512, 49), None, None),
        ((64, 512, 25), "tiles", "tiles"),
        ((64, 4096, 1), "tiles", "tiles"),
        ((65536, 64, 1), None, None),  # no tile of all rows stays in the second-level cache
    ],
)
def test_where_a_channel_is_read_twice_while_it_is_in_cache(usual_caches, shape, training, backward):
    names = {None: None, True: "tiles", False: "channels"}
    for wanted, fused in (
        (training, plan.fusion.__wrapped__(2, *views(*shape))),
        (backward, plan.backward.__wrapped__(2, *views(*shape, copies=3)).fusion),
    ):
        assert names[fused and fused.by_columns] == wanted


def test_few_channels_are_split_between_threads(usual_caches):
    assert plan.fusion.__wrapped__(1, *views(32, 3, 50176)) is not None
    assert plan.fusion.__wrapped__(2, *views(32, 3, 50176)) is None
    assert plan.fusion.__wrapped__(2, *views(32, 4, 50176)) is not None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_at_the_switches(dtype):
    for shape in ((17, 3, 47), (17, 3, 48), (32, 3, 35), (32, 3, 36), (17, 3, 56)):
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        y = nbbn.batch_norm(x, None, None, training=True)
        with nbbn.use_backend("numpy"):
            expected = nbbn.batch_norm(x, None, None, training=True).astype(np.float32)
        step = np.float32(ml_dtypes.finfo(dtype).eps)
        assert (np.abs(y.astype(np.float32) - expected) <= step * (1e-3 + np.abs(expected))).all()
