import itertools

import numpy as np
import oracle
import pytest

import nbbn
from nbbn.layout import canonical

BASE = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.float64).reshape(2, 3, 4, 5, 6)

NO_COPY = {
    "C order": (BASE, 1),
    "channels last": (BASE, -1),
    "channels first": (BASE, 0),
    "channels in the middle": (BASE, 3),
    "Fortran order": (np.asfortranarray(BASE), 1),
    "Fortran order, last axis": (np.asfortranarray(BASE), 4),
    "channels-last memory": (np.ascontiguousarray(np.moveaxis(BASE, 1, -1)).transpose(0, 4, 1, 2, 3), 1),
    "every second sample": (BASE[::2], 1),
    "reversed samples": (BASE[::-1], 1),
    "some channels": (BASE[:, 1:], 1),
    "every second channel": (BASE[:, ::2], 1),
    "reversed channels": (BASE[:, ::-1], 1),
    "a transposed matrix": (BASE.reshape(24, 30).T, 1),
    "one channel": (BASE[:, 1:2], 1),
    "one channel of its own": (BASE.reshape(2, 1, -1), 1),
    "axes of length 1": (BASE.reshape(2, 1, 3, 4, 1, 30), 2),
    "repeated samples": (np.broadcast_to(BASE[0], (7, 3, 4, 5, 6)), 1),
    "one array, one channel": (BASE, None),
    "one Fortran array, one channel": (np.asfortranarray(BASE), None),
    "rows of a matrix, one channel": (BASE.reshape(24, 30)[::2], None),
}
COPY = {
    "cropped images": (BASE[..., 1:-1, 1:-1], 1),
    "every second column": (BASE[..., ::2], 1),
    "reversed columns": (BASE[..., ::-1], 1),
    "scattered features": (BASE.reshape(24, 30)[:, ::2], 1),
}


@pytest.mark.parametrize("name", NO_COPY)
def test_a_view_where_the_strides_allow_one(name):
    x, axis = NO_COPY[name]
    view = canonical(x, None if axis is None else axis % x.ndim).view(x)
    assert view is not None
    assert np.shares_memory(view, x)
    assert view.shape[1] == (1 if axis is None else x.shape[axis])
    assert view.size == x.size
    if axis is not None:
        for c in range(x.shape[axis]):
            assert sorted(view[:, c].ravel()) == sorted(np.take(x, c, axis).ravel())


@pytest.mark.parametrize("name", COPY)
def test_a_copy_where_they_do_not(name):
    x, axis = COPY[name]
    order = canonical(x, axis)
    assert order.view(x) is None
    copied = order.view_or_copy(x)
    assert copied.flags.c_contiguous
    assert not np.shares_memory(copied, x)


@pytest.mark.parametrize("name", [*NO_COPY, *COPY])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_do_not_depend_on_the_layout(backend, name, dtype):
    x, axis = {**NO_COPY, **COPY}[name]
    x = (np.array(x, copy=None) / 100).astype(dtype) if dtype == np.float32 else x / 100 if x.flags.owndata else x
    m = nbbn.batch_stats(x, axis=axis)
    count, mean, var = oracle.stats(x, axis)
    assert (m.count == count).all()
    np.testing.assert_allclose(m.mean, mean.astype(float), rtol=1e-6)
    np.testing.assert_allclose(m.var(), var.astype(float), rtol=2e-6)
    y = nbbn.batch_norm(x, training=True, axis=axis)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(y, oracle.normalize(x, mean, var, axis=axis).astype(float), atol=2e-5)
    masked = nbbn.batch_stats(x, axis=axis, where=x > x.mean())
    np.testing.assert_allclose(masked.count, oracle.stats(x, axis, x > x.mean())[0])
    gradient = nbbn.batch_norm_backward(x, x, m.mean, m.var(), axis=axis)
    expected = oracle.backward(x, x, m.mean, m.var(), axis=axis)
    np.testing.assert_allclose(gradient[0], expected[0].astype(float), atol=2e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_results_keep_the_layout_of_x(order, axis):
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32).transpose(order)
    y = nbbn.batch_norm(x, training=True, axis=axis)
    assert y.strides == x.strides


def test_misaligned_data(backend):
    raw = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    buffer = np.zeros(raw.nbytes + 1, np.uint8)
    x = buffer[1:].view(np.float32).reshape(raw.shape)
    x[...] = raw
    assert not x.flags.aligned
    assert (
        nbbn.normalize(x, np.zeros(6), np.ones(6)).tobytes() == nbbn.normalize(raw, np.zeros(6), np.ones(6)).tobytes()
    )
    nbbn.normalize(raw, np.zeros(6), np.ones(6), out=x, eps=0.0)
    assert (x == raw).all()


def test_read_only_and_memory_mapped_input(backend, tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    frozen = x.copy()
    frozen.flags.writeable = False
    for given in (mapped, frozen):
        assert (nbbn.batch_stats(given) == nbbn.batch_stats(x)).all()
        y = nbbn.batch_norm(given, training=True)
        assert type(y) is np.ndarray
        assert y.flags.writeable
