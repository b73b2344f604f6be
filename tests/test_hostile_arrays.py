"""Arrays that nobody expects: empty, repeated, reversed, misaligned, foreign, lying, read-only, huge, not finite."""

import itertools
import os

import numpy as np
import pytest

import nbbn

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3, 4)).astype(np.float32)
P = np.abs(RNG.standard_normal((5, 3))).astype(np.float32) + 0.5
MASK = np.arange(X.size).reshape(X.shape) % 3 > 0

#: Every public function on data, as a function of x alone, with the axis that has the channels.
CALLS = {
    "batch_stats": lambda x: nbbn.batch_stats(x).mean,
    "batch_stats, where": lambda x: nbbn.batch_stats(x, where=MASK).m2,
    "normalize": lambda x: nbbn.normalize(x, *P[:4]),
    "normalize, residual": lambda x: nbbn.normalize(x, *P[:4], residual=x, activation="relu"),
    "training": lambda x: nbbn.batch_norm(x, *P.copy()[:4], training=True),
    "evaluation": lambda x: nbbn.batch_norm(x, *P[:4]),
    "backward": lambda x: nbbn.batch_norm_backward(x, X, *P[:3])[0],
    "backward, evaluation": lambda x: nbbn.batch_norm_backward(X, x, *P[:3], training=False)[1],
}


def agree(a, b):
    """Within what is promised of float32 data, or neither finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= 1e-5 * (1 + np.abs(b))
    return bool((near | (~np.isfinite(a) & ~np.isfinite(b))).all())


# --- empty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_zero_size_in_every_axis(backend, dtype):
    shapes = [s for s in itertools.product((0, 1, 2), repeat=3) if 0 in s]
    for shape, axis in itertools.product(shapes, (0, 1, 2, None)):
        x, channels = np.zeros(shape, dtype), 1 if axis is None else shape[axis]
        v = np.full((4, channels), 7, np.float32)
        for m in (nbbn.batch_stats(x, axis=axis), nbbn.batch_stats(x, axis=axis, where=np.ones(shape, bool))):
            assert m.count.tolist() == [0] * channels
            assert (m + m).mean.tolist() == (m - m).m2.tolist() == [0.0] * channels
        y, m = nbbn.batch_norm(x, *v, axis=axis, return_stats=True)
        assert y.shape == nbbn.normalize(x, *v, axis=axis).shape == shape
        if dtype != np.uint8:
            for option in ({}, {"nonfinite": "raise"}, {"nonfinite": "skip"}, {"where": np.zeros(shape, bool)}):
                assert nbbn.batch_norm(x, *v, training=True, axis=axis, **option).shape == shape
            for training in (True, False):
                gradients = nbbn.batch_norm_backward(x, x, *v[:3], axis=axis, training=training)
                assert [g.shape for g in gradients] == [shape, (channels,), (channels,)]
                assert not gradients[1].any()
                assert not gradients[2].any()
        assert (v == 7).all()


# --- strides ----------------------------------------------------------------------------------------------------------


def at_odd_address(array, offset=1):
    """The same numbers where no number of that size should be."""
    memory = np.empty(array.nbytes + offset, np.uint8)
    view = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def reversed_memory(x):
    return np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]


LAYOUTS = {
    "repeated batch": np.broadcast_to(X[:1], X.shape),
    "repeated inner": np.broadcast_to(X[..., :1], X.shape),
    "repeated channels": np.broadcast_to(X[:, :1], X.shape),
    "one number": np.broadcast_to(np.float32(2), X.shape),
    "all axes reversed": reversed_memory(X),
    "sliding windows": np.lib.stride_tricks.sliding_window_view(X.reshape(-1)[:11], (3, 4), axis=(0, 0))[:6],
    "overlapping rows": np.lib.stride_tricks.as_strided(X, X.shape, (4, 8, 4), writeable=False),
    "misaligned": at_odd_address(X),
    "misaligned by 2": at_odd_address(X, 2),
    "field of records": np.zeros(X.shape, [("pad", "u1"), ("x", "f4")])["x"],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_as_an_ordinary_copy(layout, call):
    x = LAYOUTS[layout]
    before = x.tobytes()
    expected = CALLS[call](x.copy())
    assert agree(CALLS[call](x), expected)
    with nbbn.use_backend("numpy"):
        assert agree(CALLS[call](x), expected)
    assert x.tobytes() == before


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("make", [lambda p: np.broadcast_to(p[:1], p.shape), lambda p: p[::-1], at_odd_address])
def test_any_strides_of_parameters(number, make):
    odd = [make(p) if k == number else p for k, p in enumerate(P[:4])]
    plain = [p.copy() for p in odd]
    assert (nbbn.normalize(X, *odd) == nbbn.normalize(X, *plain)).all()
    assert (nbbn.batch_norm_backward(X, X, *odd[:3])[0] == nbbn.batch_norm_backward(X, X, *plain[:3])[0]).all()
    if number < 2:
        with pytest.raises(ValueError, match=r"running_(mean|var): expected (a writable|a contiguous|an aligned)"):
            nbbn.batch_norm(X, *odd, training=True)


@pytest.mark.parametrize("out", [at_odd_address(X), reversed_memory(X), np.zeros((6, 3, 8), np.float32)[..., ::2]])
def test_any_strides_of_out(out):
    expected = nbbn.normalize(X, *P[:4])
    assert nbbn.normalize(X, *P[:4], out=out) is out
    assert (out == expected).all()
    out[...] = X
    assert nbbn.normalize(out, *P[:4], out=out) is out
    assert (out == expected).all()


def test_out_that_overlaps_its_input_anywhere():
    """Every shift: the memory itself is in place, apart is fine, anything between is refused and nothing written."""
    size = X.size
    memory = np.empty(3 * size, np.float32)
    for shift in range(-size, size + 1):
        memory[:] = np.nan
        x = memory[size : 2 * size].reshape(X.shape)
        x[...] = X
        out = memory[size + shift : 2 * size + shift].reshape(X.shape)
        if 0 < abs(shift) < size:
            before = memory.tobytes()
            for long in (1, np.int64(1)):
                with pytest.raises(ValueError, match="out: expected x itself or memory of its own"):
                    nbbn.normalize(x, *P[:4], axis=long, out=out)
                with pytest.raises(ValueError, match="out: expected"):
                    nbbn.batch_norm_backward(X, x, *P[:3], axis=long, out=out)
            assert memory.tobytes() == before
        else:
            assert (nbbn.normalize(x, *P[:4], out=out) == nbbn.normalize(X, *P[:4])).all()


# --- byte order -------------------------------------------------------------------------------------------------------


def swapped(array):
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("name", ["x", "mean", "var", "weight", "bias", "residual", "out"])
def test_foreign_byte_order_is_refused_by_name(backend, name):
    arguments = dict(zip(("mean", "var", "weight", "bias"), P, strict=False)) | {"x": X, "residual": X, "out": X.copy()}
    arguments[name] = swapped(arguments[name])
    with pytest.raises(TypeError, match=f"{name}: expected native byte order"):
        nbbn.normalize(**arguments)
    with pytest.raises(TypeError, match="running_var: expected native byte order"):
        nbbn.batch_norm(X, P[0].copy(), swapped(P[1]), training=True)


# --- what is not an array, says that it is, or is more than one -----------------------------------------------------


class Interface:
    """Something with an attribute that answers, or raises, whatever one likes."""

    def __init__(self, **answers):
        self._answers = answers

    def __getattr__(self, name):
        answer = self.__dict__["_answers"].get(name, AttributeError(name))
        if isinstance(answer, BaseException):
            raise answer
        return answer


FAR = {"shape": (2**40,), "typestr": "<f4", "data": (16, False), "version": 3}


@pytest.mark.parametrize(
    "value",
    [
        Interface(__array_interface__=FAR),
        Interface(__array_interface__=KeyError("none")),
        Interface(__array_struct__=3),
        Interface(__array__=lambda *a, **k: X),
        Interface(__dlpack__=lambda: None),
        Interface(__cuda_array_interface__=KeyError("none")),
        Interface(__cuda_array_interface__=RuntimeError("requires grad")),
        Interface(dtype=np.dtype(np.float32), shape=(6, 3), flags=None),
    ],
)
def test_no_interface_is_believed(value):
    for name in ("x", "mean", "out", "residual"):
        with pytest.raises(TypeError, match=f"{name}: expected a NumPy array, got .*Interface"):
            nbbn.normalize(**({"x": X, "mean": P[0], "var": P[1]} | {name: value}))


@pytest.mark.parametrize("answer", [{}, 3, None, FAR])
def test_lying_cuda_arrays_are_never_read(answer):
    value = Interface(__cuda_array_interface__=answer)
    for name in ("x", "mean", "out", "residual"):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=name):
            nbbn.normalize(**({"x": X, "mean": P[0], "var": P[1]} | {name: value}))


class Liar(np.ndarray):
    """A subclass that says wrong things of itself, and minds being looked at."""

    armed = False
    dtype = property(lambda self: np.dtype(np.float64))
    shape = property(lambda self: (10**6, 3))
    strides = property(lambda self: (0, 0))
    size = property(lambda self: 3 * 10**6)
    ndim = property(lambda self: 2)
    flags = property(lambda self: None)
    __array_interface__ = property(lambda self: FAR)

    def view(self, *arguments):
        return self

    def __array_finalize__(self, other):
        if Liar.armed:
            raise ZeroDivisionError

    def __array_ufunc__(self, *arguments, **options):
        raise ZeroDivisionError

    __array_function__ = __array_ufunc__


@pytest.fixture
def liar(monkeypatch):
    def make(array):
        monkeypatch.setattr(Liar, "armed", False)
        liar = np.ndarray.__new__(Liar, array.shape, array.dtype.str)
        np.ndarray.__setitem__(liar, Ellipsis, array)
        monkeypatch.setattr(Liar, "armed", True)
        return liar

    return make


@pytest.mark.parametrize("call", CALLS)
def test_what_subclasses_say_of_themselves_does_not_count(backend, liar, call):
    y = CALLS[call](liar(X))
    assert type(y) is np.ndarray
    assert agree(y, CALLS[call](X))
    with pytest.raises(TypeError, match="expected native byte order"):
        CALLS[call](liar(swapped(X)))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrices_and_records():
    expected = nbbn.batch_norm(X[:, :, 0], *P.copy()[:4], training=True)
    for odd in (np.matrix(X[:, :, 0]), X[:, :, 0].view(np.recarray)):
        y, m = nbbn.batch_norm(odd, *P.copy()[:4], training=True, return_stats=True)
        assert type(y) is np.ndarray
        assert y.shape == (6, 3)
        assert (y == expected).all()
        assert m.mean.shape == (3,)
    with pytest.raises(ValueError, match=r"mean: expected 3 values.*shape \(1, 3\)"):
        nbbn.normalize(X, np.matrix(P[0]), P[1])


@pytest.mark.parametrize("name", ["x", "mean", "var", "weight", "bias", "residual", "out"])
def test_masked_arrays_are_refused_by_name(name):
    arguments = dict(zip(("mean", "var", "weight", "bias"), P, strict=False)) | {"x": X, "residual": X, "out": X.copy()}
    arguments[name] = np.ma.MaskedArray(arguments[name], mask=False)
    with pytest.raises(TypeError, match=f"{name}: expected a plain array, got a masked array"):
        nbbn.normalize(**arguments)


def test_files_as_arrays(tmp_path):
    X.tofile(tmp_path / "x")
    P[:2].tofile(tmp_path / "p")
    expected = nbbn.normalize(X, *P[:2])

    def file(name, mode, shape):
        return np.memmap(tmp_path / name, np.float32, mode, shape=shape)

    read, copied = (file("x", mode, X.shape) for mode in ("r", "c"))
    assert (nbbn.normalize(read, *P[:2]) == expected).all()
    with pytest.raises(ValueError, match="out: expected a writable array"):
        nbbn.normalize(read, *P[:2], out=read)
    assert nbbn.normalize(copied, *P[:2], out=copied) is copied
    assert (copied == expected).all()
    assert (tmp_path / "x").read_bytes() == X.tobytes(), "copy on write reaches no file"
    with pytest.raises(ValueError, match="running_mean: expected a writable array"):
        nbbn.batch_norm(X, *file("p", "r", (2, 3)), training=True)
    running, old = file("p", "r+", (2, 3)), P[:2].copy()
    nbbn.batch_norm(X, *running, training=True)
    nbbn.batch_norm(X, *old, training=True)
    running.flush()
    assert (tmp_path / "p").read_bytes() == old.tobytes()


@pytest.mark.parametrize("axis", [31, 63, -1, 0, None])
def test_64_dimensions(axis):
    shape = (1,) * 31 + (2,) + (1,) * 31 + (3,)
    x = np.arange(6, dtype=np.float32).reshape(shape)
    channels = 1 if axis is None else shape[axis]
    m = nbbn.batch_stats(x, axis=axis)
    assert m.count.tolist() == [6 // channels] * channels
    assert m.mean.mean() == 2.5
    where = nbbn.batch_stats(x, axis=axis, where=np.ones(shape, bool))
    assert (where.mean == m.mean).all()
    assert (nbbn.batch_stats(x, axis=axis, where=np.ones((1,) * 64, bool)).count == m.count).all()
    y = nbbn.batch_norm(x, training=True, axis=axis)
    assert y.shape == shape
    assert agree(y, nbbn.normalize(np.asfortranarray(x), m.mean, m.var(), axis=axis))
    assert nbbn.batch_norm_backward(x, x, m.mean, m.var(), axis=axis)[0].shape == shape


# --- numbers that are hardly numbers ----------------------------------------------------------------------------------

SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-310, 1e-45, 1.1e-38, 3.4e38, -3.4e38, 1.7e308, -1.7e308]
PLACES = ["x", "mean", "var", "weight", "bias", "running_mean", "running_var", "eps", "momentum", "grad_out"]


def everything(place, special, shape, dtype, axis):
    """Results of all functions with one special number at one place, or the errors they raise."""
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    grad = x[::-1].copy()
    p = {k: np.ones(shape[1], dtype) for k in ("mean", "var", "weight", "bias", "running_mean", "running_var")}
    eps, momentum = 1e-5, 0.1
    with np.errstate(all="ignore"):
        if place in ("x", "grad_out"):
            (x if place == "x" else grad)[(1,) * (len(shape) - 1)] = special
        elif place == "eps":
            eps = special
        elif place == "momentum":
            momentum = special
        else:
            p[place][1] = special
    given = p["weight"], p["bias"]
    running = p["running_mean"], p["running_var"]
    m = nbbn.batch_stats(x, axis=axis)
    results = [m.mean, m.m2]
    for call in (
        lambda: nbbn.normalize(x, p["mean"], p["var"], *given, eps=eps, axis=axis),
        lambda: nbbn.batch_norm(x, *running, *given, True, momentum, eps, axis=axis),
        lambda: nbbn.batch_norm(x, *running, *given, False, momentum, eps, axis=axis),
        lambda: nbbn.batch_norm_backward(grad, x, p["mean"], p["var"], p["weight"], eps=eps, axis=axis),
    ):
        try:
            y = call()
            results += y if isinstance(y, tuple) else [y]
        except ValueError as error:
            results.append(np.array([len(str(error))]))
    return [*results, *running]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 150)])
@pytest.mark.parametrize("place", PLACES)
def test_special_numbers_anywhere_as_in_the_reference(place, shape, dtype):
    for special, axis in itertools.product(SPECIAL, (1, np.int64(1))):
        got = everything(place, special, shape, dtype, axis)
        with nbbn.use_backend("numpy"):
            expected = everything(place, special, shape, dtype, axis)
        assert len(got) == len(expected)
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            largest = np.abs(b[np.isfinite(b)], dtype=np.float64).max(initial=0)
            if largest < np.finfo(dtype).max / 1000:  # near the end of the range, what overflows on the way differs
                assert agree(a, b), (special, type(axis), number)


@pytest.mark.parametrize("momentum", [0.0, -0.0, 5e-324, 1.0])
def test_momentum_at_its_ends(backend, momentum):
    mean, var = np.array([np.nan, -0.0, 5e-45], np.float32), np.array([np.inf, 0.0, 1.0], np.float32)
    before = mean.tobytes(), var.tobytes()
    m = nbbn.batch_stats(X)
    nbbn.ema_update(mean, var, m, momentum)
    if momentum == 0:
        assert (mean.tobytes(), var.tobytes()) == before
    if momentum == 1:
        assert (mean == m.mean.astype(np.float32)).all()
        assert (var == m.var(1).astype(np.float32)).all()


# --- more than 2**31 elements ----------------------------------------------------------------------------------------


def has_memory(gigabytes):
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > gigabytes << 30
    except (ValueError, OSError):
        return False


@pytest.mark.slow
def test_more_than_2_to_31_bytes():
    """Indices that do not fit in 32 bits: what lies beyond is found. Pages nobody wrote to cost no memory."""
    if not has_memory(4):
        pytest.skip("needs 4 GB")
    n = 2**31 // 3 + 5
    x = np.zeros((3, n), np.uint8)
    x[2, -4:] = 200
    m = nbbn.batch_stats(x, axis=0)
    assert m.count.tolist() == [n] * 3
    assert m.mean.tolist() == [0, 0, 800 / n]
    assert abs(m.m2[2] / (4 * 200.0**2 - 800.0**2 / n) - 1) < 1e-12
    columns = nbbn.batch_stats(x.reshape(-1)[: 3 * n // 4 * 4].reshape(-1, 4))
    assert columns.mean.sum() * (3 * n // 4) == pytest.approx(200 * (4 - 3 * n % 4), rel=1e-12)


@pytest.mark.nightly
def test_more_than_2_to_31_halves():
    """Statistics, training in place, and the last row of both families."""
    if not has_memory(10):
        pytest.skip("needs 10 GB")
    n = 2**31 // 4 + 8
    for shape in ((2, 2, n), (n, 4)):
        x = np.zeros(shape, np.float16)
        x[-1] = 4
        first = x[-1].astype(np.float32).copy()
        m = nbbn.batch_stats(x)
        values = x.size // shape[1]
        assert m.count.tolist() == [values] * shape[1]
        expected = first.reshape(shape[1], -1).sum(axis=1, dtype=np.float64) / values
        np.testing.assert_allclose(m.mean, expected, rtol=1e-12)
        y = nbbn.batch_norm(x, training=True, out=x)
        assert y is x
        top, low = (4 - m.mean[0]) / np.sqrt(m.var()[0] + 1e-5), -m.mean[0] / np.sqrt(m.var()[0] + 1e-5)
        assert (x[-1] == np.float16(top)).all()
        assert (x[0] == np.float16(low)).all()
        del x, y
