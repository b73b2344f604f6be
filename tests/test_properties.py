"""Properties that hold for every input: hypothesis looks for one that breaks them."""

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nbbn

#: Values with a spread of a few magnitudes and none so small that squares vanish beside the others.
VALUES = st.floats(-1000, 1000).map(lambda v: round(v, 3))


@st.composite
def matrices(draw, least_rows=0, channels=None):
    rows = draw(st.integers(least_rows, 60))
    return draw(hnp.arrays(np.float64, (rows, channels or draw(st.integers(1, 4))), elements=VALUES))


@st.composite
def batches(draw, number):
    channels = draw(st.integers(1, 4))
    return [draw(matrices(channels=channels)) for _ in range(number)]


def assert_close(a, b, scale):
    """Equal counts; means and m2 to 1e-12 of the data's own scale."""
    assert (a.count == b.count).all()
    n = np.maximum(a.count, 1)
    assert (np.abs(a.mean - b.mean) <= 1e-12 * scale).all()
    assert (np.abs(a.m2 - b.m2) <= 1e-12 * (a.m2 + n * scale * np.sqrt(a.m2 / n) * 1e-3 + 1e-12 * scale**2)).all()


def scale_of(*arrays):
    return max([1.0] + [float(np.abs(a).max()) for a in arrays if a.size])


@given(batches(3))
def test_merge_is_associative_and_commutative(parts):
    a, b, c = map(nbbn.batch_stats, parts)
    scale = scale_of(*parts)
    assert_close((a + b) + c, a + (b + c), scale)
    assert_close(a + b, b + a, scale)


@given(matrices(least_rows=1), st.data())
def test_splitting_does_not_matter(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=6)))
    total = sum(map(nbbn.batch_stats, np.split(x, cuts)), nbbn.Moments.zeros(x.shape[1]))
    assert_close(total, nbbn.batch_stats(x), scale_of(x))


@given(batches(2))
def test_what_was_added_can_be_removed(parts):
    a, b = map(nbbn.batch_stats, parts)
    rest = (a + b) - b
    whole = (a + b).m2 + 1
    assert (rest.count == a.count).all()
    some = a.count > 0
    ratio = (a + b).count[some] / a.count[some]
    assert (np.abs(rest.mean - a.mean)[some] <= 1e-11 * scale_of(*parts) * ratio).all()
    assert (np.abs(rest.m2 - a.m2) <= 1e-9 * whole).all()


@given(
    matrices(least_rows=2),
    st.sampled_from([0.25, 0.5, 2.0, -1.0, -8.0]),
    st.sampled_from([0.0, 1.0, -512.0, 4096.0]),
)
def test_statistics_follow_a_scale_and_a_shift(x, factor, shift):
    """Powers of two and whole shifts, so that the transformed data is as exact as possible."""
    a, b = nbbn.batch_stats(x), nbbn.batch_stats(x * factor + shift)
    scale = scale_of(x, x * factor + shift)
    assert (np.abs(b.mean - (a.mean * factor + shift)) <= 1e-12 * scale).all()
    tolerance = 1e-11 * a.m2 * factor**2 + 1e-13 * scale * len(x) * np.sqrt(a.var() * factor**2 + 1e-12 * scale**2)
    assert (np.abs(b.m2 - a.m2 * factor**2) <= tolerance).all()


@st.composite
def tensors(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))), axis


@given(tensors(), st.randoms(use_true_random=False))
def test_the_layout_does_not_matter(tensor, random):
    """The same numbers channels-first, channels-last, in any order of axes, strided and reversed."""
    x, axis = tensor
    expected = nbbn.batch_stats(x, axis=axis)
    mean, var = expected.mean, expected.var()
    y = nbbn.normalize(x, mean, var, axis=axis)

    order = list(range(x.ndim))
    random.shuffle(order)
    note(f"order {order}")
    permuted = np.ascontiguousarray(x.transpose(order))
    spaced = np.full([2 * n for n in x.shape], np.nan, np.float32)[tuple(slice(None, None, 2) for _ in x.shape)]
    spaced[...] = x
    flipped = np.ascontiguousarray(x[tuple(slice(None, None, -1) for _ in x.shape)])[
        tuple(slice(None, None, -1) for _ in x.shape)
    ]
    for layout, where in (
        (permuted, order.index(axis % x.ndim)),
        (spaced, axis),
        (flipped, axis),
        (np.asfortranarray(x), axis),
    ):
        m = nbbn.batch_stats(layout, axis=where)
        assert (m.count == expected.count).all()
        scale = np.abs(x).max() + 1e-30
        assert (np.abs(m.mean - expected.mean) <= 1e-6 * np.sqrt(var) + 1e-14 * scale).all()
        assert (np.abs(m.m2 - expected.m2) <= 2e-6 * expected.m2 + 1e-14 * scale**2).all()
        z = nbbn.normalize(layout, mean, var, axis=where)
        assert (z == (y.transpose(order) if layout is permuted else y)).all()


@given(tensors())
def test_the_compiled_backend_agrees_with_the_reference(tensor):
    x, axis = tensor
    with nbbn.use_backend("numpy"):
        expected = nbbn.batch_stats(x, axis=axis)
        y = nbbn.normalize(x, expected.mean, expected.var(), axis=axis)
    got = nbbn.batch_stats(x, axis=axis)
    assert (got.count == expected.count).all()
    assert (np.abs(got.mean - expected.mean) <= 1e-6 * expected.std() + 1e-300).all()
    assert (np.abs(got.m2 - expected.m2) <= 2e-6 * expected.m2 + 1e-300).all()
    z = nbbn.normalize(x, expected.mean, expected.var(), axis=axis)
    assert (np.abs(z - y) <= 2e-6 * (1 + np.abs(y))).all()


@pytest.mark.parametrize("shape", [(5000, 64), (9, 4, 130, 130), (40, 30, 7, 7), (2, 100_000)])
def test_same_bits_for_one_and_two_threads(shape, threads):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    results = set()
    for n in (1, threads):
        nbbn.set_num_threads(n)
        y, m = nbbn.batch_norm(x, training=True, return_stats=True)
        results.add((y.tobytes(), m.mean.tobytes(), m.m2.tobytes()))
    assert len(results) == 1
