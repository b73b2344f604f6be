"""The short way on a device: it does what the long way does, or nothing."""

import device_arrays
import numpy as np
import pytest

import nbbn
from nbbn import backends
from nbbn.cuda import libraries, warm

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (6, 3, 5, 4)).astype(np.float32)
put = device_arrays.put


@pytest.fixture(autouse=True)
def nothing_remembered():
    nbbn.batch_stats(put(X))  # loads the backend
    assert backends.warm is warm
    warm._known.clear()


def parameters(dtype=np.float32):
    return [put(RNG.standard_normal(3).astype(dtype)) for _ in range(2)]


def running(dtype=np.float32):
    return put(np.zeros(3, dtype)), put(np.ones(3, dtype))


def same(*pairs):
    for got, wanted in pairs:
        assert type(got) is type(wanted)
        assert got.get().dtype == wanted.get().dtype
        assert got.get().strides == wanted.get().strides
        assert got.get().tobytes() == wanted.get().tobytes()


@pytest.mark.parametrize("axis", [1, -1, None])
@pytest.mark.parametrize("order", ["C", "F"])
def test_training_has_the_same_bits(axis, order):
    channels = 1 if axis is None else X.shape[axis]
    x, residual = put(np.asarray(X, order=order)), put(np.asarray(X[::-1].copy(), order=order))
    weight, bias = (put(RNG.standard_normal(channels).astype(np.float32)) for _ in range(2))
    for _ in range(2):  # the second time it is remembered
        mean, var = put(np.zeros(channels)), put(np.ones(channels))
        again = put(np.zeros(channels)), put(np.ones(channels))
        y, stats = warm.train(x, mean, var, weight, bias, 0.3, 1e-3, axis, 0, residual, "relu", None, True)
        expected, wanted = nbbn.batch_norm(
            x, *again, weight, bias, True, 0.3, 1e-3, axis=axis, ddof=0, residual=residual, activation="relu",
            return_stats=True,
        )  # fmt: skip
        same((y, expected), (mean, again[0]), (var, again[1]), (stats.m2, wanted.m2), (stats.count, wanted.count))
        assert len(warm._known) == 1


def test_what_changes_from_call_to_call_is_not_remembered():
    x, (mean, var), (again_mean, again_var) = put(X), running(), running()
    for momentum, eps, ddof in ((0.1, 1e-5, 1), (0.5, 1e-2, 0), (0.0, 0.0, 1), (1.0, 1e-5, 1)):
        y, _ = warm.train(x, mean, var, None, None, momentum, eps, 1, ddof, None, None, None, False)
        expected = nbbn.batch_norm(x, again_mean, again_var, None, None, True, momentum, eps, ddof=ddof)
        same((y, expected), (mean, again_mean), (var, again_var))
    assert len(warm._known) == 1
    other = put(2 * X + 1)  # elsewhere
    same((warm.train(other, None, None, None, None, 0.1, 1e-5, 1, 1, None, None, None, False)[0],
          nbbn.batch_norm(other, training=True)))  # fmt: skip


def test_what_calls_are_known_by():
    """Geometry, alignment and dtype of every array, and options: each of these is another call."""
    flat = put(X.reshape(6, 3, 20))
    cases = [
        (put(X), 1), (put(X.astype(np.float64)), 1), (put(X), 0), (put(X[:5]), 1), (flat[..., :18], 1),
        (flat[..., 1:19], 1), (flat[..., 2:], 1), (flat[:, ::2], 1), (flat[::-1, :2], 1),
    ]  # fmt: skip
    for x, axis in cases:
        same((warm.moments(x, axis).m2, nbbn.batch_stats(x, axis=axis).m2))
        y, _ = warm.train(x, None, None, None, None, 0.1, 1e-5, axis, 1, None, None, None, False)
        same((y, nbbn.batch_norm(x, axis=axis, training=True)))


def test_arrays_of_two_libraries_are_two_calls(monkeypatch):
    """Geometry and device do not tell them apart; results are of the library that the arrays are of."""

    class Other(device_arrays.Array):
        """An array of another library."""

    class Library(device_arrays.Library):
        def empty(self, shape, dtype, number):
            made = device_arrays.empty(shape, dtype)
            return Other(made.memory, made.values)

    Other.__module__ = "other"
    monkeypatch.setitem(libraries.LIBRARIES, "other", Library())
    x = put(X)
    others = Other(x.memory, x.values)
    for _ in range(2):
        for array in (x, others):
            y, _ = warm.train(array, None, None, None, None, 0.1, 1e-5, 1, 1, None, None, None, False)
            assert type(y) is type(array)


def test_evaluation_and_backward():
    x, grad, (weight, bias) = put(X), put(np.sin(X)), parameters()
    mean, var = put(X.mean((0, 2, 3), np.float64)), put(X.var((0, 2, 3)))
    integers = put(X.astype(np.int16))
    for _ in range(2):
        y = warm.normalize(x, mean, var, weight, None, 1e-5, 1, x, "relu", None)
        same((y, nbbn.normalize(x, mean, var, weight, residual=x, activation="relu")))
        y = warm.normalize(integers, mean, var, weight, bias, 1e-5, 1, None, None, None)
        same((y, nbbn.normalize(integers, mean, var, weight, bias)))
        for w in (weight, None):
            got = warm.backward(grad, x, mean, var, w, 1e-5, 1, None)
            same(*zip(got, nbbn.batch_norm_backward(grad, x, mean, var, w), strict=True))
    for out in (put(X), put(np.zeros_like(X))):
        got = warm.backward(grad, x, mean, var, None, 1e-5, 1, out)
        assert got[0] is out
    in_place = put(np.sin(X))
    got = warm.backward(in_place, x, mean, var, None, 1e-5, 1, in_place)
    same(*zip(got, nbbn.batch_norm_backward(grad, x, mean, var), strict=True))


def test_forward_chooses():
    x, (mean, var) = put(X), running()
    given = x, mean, var, None, None
    for _ in range(2):
        y, stats = warm.forward(*given, False, 0.1, 1e-5, 1, 1, None, None, None, False)
        assert stats is None
        same((y, nbbn.batch_norm(*given)))
        y, stats = warm.forward(*given, True, 0.0, 1e-5, 1, 1, None, None, None, True)
        same((y, nbbn.batch_norm(*given, True, 0.0)), (stats.mean, nbbn.batch_stats(x).mean))
    for training, momentum, need_stats in ((1, 0.1, False), (False, 2.0, False), (False, 0.1, True)):
        assert warm.forward(*given, training, momentum, 1e-5, 1, 1, None, None, None, need_stats) is None
    assert warm.forward(x, None, None, None, None, False, 0.1, 1e-5, 1, 1, None, None, None, False) is None


def test_in_place():
    x, expected = put(X), nbbn.batch_norm(put(X), training=True)
    for _ in range(2):
        x.values[...] = X
        y, _ = warm.train(x, None, None, None, None, 0.1, 1e-5, 1, 1, None, None, x, False)
        assert y is x
        same((y, expected))


def test_whatever_may_overlap_is_for_the_long_way():
    big = put(np.concatenate([X, X]))
    x, mean, var = big[:6], put(np.zeros(3)), put(np.ones(3))
    both = put(np.zeros((2, 3)))
    for out, running, weight, residual in (
        (big[1:7], (mean, var), None, None),
        (big[5:11], (mean, var), None, None),
        (None, (mean, mean), None, None),
        (None, (both[0], both[1]), both[1], None),
        (x, (mean, var), None, x),
        (big[6:], (mean, var), None, big[6:]),
    ):
        before = big.get(), mean.get(), both.get()
        assert warm.train(x, *running, weight, None, 0.1, 1e-5, 1, 1, residual, None, out, False) is None
        for array, kept in zip((big, mean, both), before, strict=True):
            assert (array.get() == kept).all()
    # in place, nothing else may share its memory either, however often the geometry was seen
    inside = [device_arrays.Array(big.memory, big.values[0, 0, 0, :3]), put(np.ones(3, np.float32))]
    for values in (inside, inside[::-1]):
        ones = [put(np.ones(3, np.float32)) for _ in values]
        assert warm.normalize(x, *ones, None, None, 1e-5, 1, None, None, x) is x
        assert warm.normalize(x, *values, None, None, 1e-5, 1, None, None, x) is None
        assert warm.train(x, *values, None, None, 0.1, 1e-5, 1, 1, None, None, x, False) is None
    assert warm.train(x, None, None, None, None, 0.1, 1e-5, 1, 1, put(X), None, x, False) is not None
    assert warm.train(x, None, None, None, None, 0.1, 1e-5, 1, 1, x, None, x, False) is None
    grad = put(np.concatenate([X, X]))
    for gradient, read, possible in ((grad[6:], grad[:6], True), (grad[5:11], grad[:6], False)):
        got = warm.backward(gradient, read, mean, var, None, 1e-5, 1, gradient)
        assert (got is not None) is possible
    # known and apart once, but not for ever
    y = big[6:]
    assert warm.train(x, None, None, None, None, 0.1, 1e-5, 1, 1, None, None, y, False) is not None
    assert warm.train(x, None, None, None, None, 0.1, 1e-5, 1, 1, None, None, big[5:11], False) is None


class Refusing(device_arrays.Array):
    """Raises what a tensor that requires grad raises."""

    @property
    def __cuda_array_interface__(self):
        raise TypeError("requires grad")


Refusing.__module__ = device_arrays.__name__


@pytest.mark.parametrize(
    "change",
    [
        {"x": X}, {"x": [1.0]}, {"x": None}, {"x": put(X.astype(int))}, {"x": put(X.astype(complex))},
        {"x": put(X[:0])},
        {"x": put(X[:1, :, :1, :1])}, {"axis": 4}, {"axis": 1.0}, {"axis": True}, {"eps": -1.0}, {"eps": 1},
        {"eps": float("nan")}, {"momentum": 1.5}, {"momentum": 1}, {"ddof": 2}, {"ddof": True}, {"activation": "tanh"},
        {"activation": []}, {"weight": put(np.ones(4))}, {"weight": np.ones(3)}, {"weight": put(np.ones((3, 1)))},
        {"mean": None}, {"mean": put(np.ones(6))[::2]}, {"mean": put(np.ones(3, np.float16))},
        {"residual": put(X[:5])}, {"out": put(X.astype(int))}, {"out": put(X[0])},
        {"weight": Refusing(None, np.ones(3))}, {"weight": put(np.ones(6))[::2]},
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_a_look_is_for_the_long_way(change):
    mean, var = running()
    given = {
        "x": put(X), "mean": mean, "var": var, "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5, "axis": 1,
        "ddof": 1, "residual": None, "activation": None, "out": None, "need_stats": True,
    } | change  # fmt: skip
    for _ in range(2):
        assert warm.train(*given.values()) is None
    assert (mean.get() == 0).all()
    with nbbn.use_backend("cpu"):
        assert warm.moments(put(X), 1) is None


def test_memory_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(warm, "MOST", 3)
    for n in range(2, 7):
        warm.moments(put(X[:n]), 1)
        assert len(warm._known) <= 3


def test_public_functions_take_the_short_way(monkeypatch):
    """And say of errors what they said before: these are the long way's."""
    taken = []
    for name in ("forward", "normalize", "moments", "backward"):
        original = getattr(warm, name)
        monkeypatch.setattr(warm, name, lambda *a, name=name, original=original: (taken.append(name), original(*a))[1])
    x, (mean, var) = put(X), running()
    y = nbbn.batch_norm(x, mean, var, training=True)
    assert taken == ["forward"]
    stats = nbbn.batch_stats(x)
    nbbn.normalize(x, mean, var)
    nbbn.batch_norm_backward(y, x, stats.mean, stats.var())
    assert taken == ["forward", "moments", "normalize", "backward"]
    assert {key[0] for key in warm._known} == {"train", "moments", "normalize", "backward"}
    taken.clear()
    nbbn.batch_norm(x, training=True, where=put(X > 0))
    nbbn.batch_norm(x, mean, var, training=True, nonfinite="skip")
    nbbn.batch_norm(x, training=True, decay=0.5)
    assert taken == []
    layer = nbbn.BatchNorm(3, like=x)
    layer.backward(layer(x))
    assert taken == ["forward", "backward"]
    with pytest.raises(ValueError, match="weight: expected 3 values"):
        nbbn.batch_norm(x, weight=put(np.ones(4)), training=True)
