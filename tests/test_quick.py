"""The short way of plain arrays: the same bits as the long one, and the same errors.

Every test runs twice: small arrays are served as such, and as if they were large.
"""

import numpy as np
import pytest

import nbbn
from nbbn import backends, quick
from nbbn.cpu import plain

SHAPES = [
    (64, 64),
    (2, 1),
    (5, 3),
    (200, 3),
    (4, 6, 7, 7),
    (1, 8, 16, 16),
    (3, 300),
    (2, 2, 128),
    (9, 40, 12, 12),
    (300, 1),
    (20, 1, 40),
]
LONG_WAY = np.int64(1)  # not an int


@pytest.fixture(autouse=True, params=["small", "large"])
def size(request, monkeypatch):
    if request.param == "large":
        monkeypatch.setattr(plain, "_is_small", lambda x: False)
    return request.param


def arrays(shape, dtype, precision, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 3 + 100).astype(dtype)
    mean, bias = rng.standard_normal((2, shape[1])).astype(precision)
    var, weight = rng.uniform(0.5, 2, (2, shape[1])).astype(precision)
    return x, mean, var, weight, bias


def took_the_short_way(monkeypatch):
    """A list that grows with every answer of the short way."""
    answers = []
    for name in ("evaluate", "train", "moments", "backward"):
        real = getattr(quick, name)

        def noted(*arguments, real=real):
            answer = real(*arguments)
            if answer is not None:
                answers.append(answer)
            return answer

        monkeypatch.setattr(quick, name, noted)
    return answers


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits(shape, dtype, precision, monkeypatch):
    answers = took_the_short_way(monkeypatch)
    x, mean, var, weight, bias = arrays(shape, dtype, precision)
    for parameters in ((), (weight,), (weight, bias), (None, bias)):
        short = nbbn.batch_norm(x, mean, var, *parameters)
        assert (short == nbbn.batch_norm(x, mean, var, *parameters, axis=LONG_WAY)).all()
        assert (short == nbbn.normalize(x, mean, var, *parameters)).all()
    assert (nbbn.batch_stats(x) == nbbn.batch_stats(x, axis=LONG_WAY)).all()

    running, other = (mean.copy(), var.copy()), (mean.copy(), var.copy())
    y, stats = nbbn.batch_norm(x, *running, weight, bias, True, return_stats=True)
    z, other_stats = nbbn.batch_norm(x, *other, weight, bias, True, return_stats=True, axis=LONG_WAY)
    assert (y == z).all()
    assert (stats == other_stats).all()
    assert all((a == b).all() for a, b in zip(running, other, strict=True))
    assert len(answers) >= 9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 300), (40, 24, 7, 7), (2, 64, 900)])
def test_same_bits_backward(shape, dtype, monkeypatch):
    answers = took_the_short_way(monkeypatch)
    x, mean, var, weight, _ = arrays(shape, dtype, np.float32)
    gradient = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    exact = nbbn.batch_stats(x)
    for statistics in ((exact.mean, exact.var()), (mean, var)):
        for parameters in ((), (weight,)):
            answers.clear()
            short = nbbn.batch_norm_backward(gradient, x, *statistics, *parameters)
            assert len(answers) == 1
            long = nbbn.batch_norm_backward(gradient, x, *statistics, *parameters, axis=LONG_WAY)
            assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(short, long, strict=True))
    assert len(answers) == 1
    for out in (gradient, x):
        given = gradient.copy(), x.copy()
        assert nbbn.batch_norm_backward(*given, mean, var, weight, out=given[out is x])[0] is given[out is x]
        assert (given[out is x] == short[0]).all()
    assert len(answers) == 3


def test_the_last_axis_by_its_negative_number(monkeypatch):
    answers = took_the_short_way(monkeypatch)
    x, mean, var, weight, bias = arrays((6, 5, 3, 4), np.float32, np.float32)
    for axis, same in ((-1, np.int64(3)), (-4, np.int64(0))):
        parameters = [np.resize(v, x.shape[axis]) for v in (mean, np.abs(var) + 1, weight, bias)]
        y = nbbn.batch_norm(x, *parameters, axis=axis)
        assert (y == nbbn.batch_norm(x, *parameters, axis=same)).all()
    assert len(answers) == 2


@pytest.mark.parametrize("kinds", [1, 2, 12])  # each mix compiles kernels of its own
def test_any_mix_of_precisions_trains(kinds):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    dtypes = [np.float64 if kinds >> k & 1 else np.float32 for k in range(4)]
    values = [np.full(3, value, dtype) for value, dtype in zip((0.5, 2, 1.5, -1), dtypes, strict=True)]
    other = [value.copy() for value in values]
    y = nbbn.batch_norm(x, *values, training=True)
    assert (y == nbbn.batch_norm(x, *other, training=True, axis=LONG_WAY)).all()
    assert all((a == b).all() for a, b in zip(values, other, strict=True))


def test_in_place_and_into_out(monkeypatch):
    answers = took_the_short_way(monkeypatch)
    x, mean, var, weight, bias = arrays((6, 4, 5), np.float32, np.float32)
    expected = nbbn.batch_norm(x, mean, var, weight, bias)
    out = np.empty_like(x)
    assert nbbn.batch_norm(x, mean, var, weight, bias, out=out) is out
    assert (out == expected).all()
    assert nbbn.batch_norm(x, mean, var, weight, bias, out=x) is x
    assert (x == expected).all()
    assert len(answers) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.ones((4, 3), np.float32)[:, ::-1]},
        {"x": np.asfortranarray(np.ones((4, 3), np.float32))},
        {"mean": np.zeros(6, np.float32)[::2]},
        {"weight": np.ones(3, np.float32)[::-1]},
        {"mean": np.zeros(3, np.float32).view(np.recarray)},
        {"eps": 0},
    ],
)
def test_what_is_unusual_goes_the_long_way_and_is_right(change, monkeypatch):
    answers = took_the_short_way(monkeypatch)
    call = {"x": np.ones((4, 3), np.float32), "mean": np.zeros(3), "var": np.ones(3), **change}
    y = nbbn.normalize(**call)
    with nbbn.use_backend("numpy"):
        assert np.allclose(y, nbbn.normalize(**call), rtol=1e-6)
    assert not answers


def test_only_large_arrays_go_the_short_way_with_what_needs_float64(size, monkeypatch):
    answers = took_the_short_way(monkeypatch)
    call = {"x": np.ones((4, 3), np.float32), "mean": np.array([1e31, 0, 0]), "var": np.ones(3)}
    y = nbbn.normalize(**call)
    with nbbn.use_backend("numpy"):
        assert np.allclose(y, nbbn.normalize(**call), rtol=1e-6)
    assert len(answers) == (size == "large")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_never_small(dtype, monkeypatch):
    dtype = getattr(pytest.importorskip("ml_dtypes"), dtype, np.float16)
    answers = took_the_short_way(monkeypatch)
    x, mean, var, weight, bias = arrays((40, 4), dtype, np.float32)
    running, other = (mean.copy(), var.copy()), (mean.copy(), var.copy())
    for axis, moving in ((1, running), (LONG_WAY, other)):
        done = [
            nbbn.batch_norm(x, mean, var, weight, bias, axis=axis),
            nbbn.batch_norm(x, *moving, weight, bias, True, axis=axis),
            nbbn.batch_stats(x, axis=axis).m2,
            *nbbn.batch_norm_backward(x, x, mean, var, axis=axis),
        ]
        assert len(answers) == 4
        if axis == 1:
            expected = done
    assert [a.dtype for a in done] == [dtype, dtype, np.float64, dtype, np.float32, np.float32]
    assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(done, expected, strict=True))
    assert all((a == b).all() for a, b in zip(running, other, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"running_mean": np.zeros(4, np.float32)},
        {"running_var": np.ones((1, 3), np.float32)},
        {"weight": np.ones((3, 1), np.float32)},
        {"bias": np.ones(2)},
        {"weight": np.ones(0, np.float32)},
        {"eps": -1.0},
        {"momentum": 2.0},
        {"ddof": 3},
        {"axis": 2},
        {"out": np.ones((4, 3), np.int32)},
        {"nonfinite": np.array(["propagate"])},
        {"running_var": None},
        {"activation": "gelu"},
    ],
)
def test_errors_are_those_of_the_long_way(change, training):
    call = {
        "x": np.ones((4, 3), np.float32), "running_mean": np.zeros(3, np.float32),
        "running_var": np.ones(3, np.float32), "training": training, **change,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError)) as short:
        nbbn.batch_norm(**call)
    with pytest.raises((TypeError, ValueError)) as long:
        nbbn.batch_norm(**{"axis": LONG_WAY, **call})
    assert str(short.value) == str(long.value).replace("np.int64(1)", "1")
    assert type(short.value) is type(long.value)


@pytest.mark.parametrize(
    "change",
    [
        {"grad_out": np.ones((4, 2), np.float32)},
        {"grad_out": [[1.0]]},
        {"mean": np.zeros(4, np.float32)},
        {"weight": np.ones(2, np.float32)},
        {"eps": -1.0},
        {"axis": 2},
        {"out": np.ones((4, 3), np.int32)},
        {"training": 1},
    ],
)
def test_errors_of_backward_are_those_of_the_long_way(change):
    x = np.ones((4, 3), np.float32)
    call = {"grad_out": x, "x": x, "mean": np.zeros(3), "var": np.ones(3), **change}
    with pytest.raises((TypeError, ValueError)) as short:
        nbbn.batch_norm_backward(**call)
    with pytest.raises((TypeError, ValueError)) as long:
        nbbn.batch_norm_backward(**{"axis": LONG_WAY, **call})
    assert str(short.value) == str(long.value).replace("np.int64(1)", "1")


def test_overlapping_memory_is_noticed_in_backward():
    memory = np.ones(60, np.float32)
    x, gradient = memory[:12].reshape(4, 3), memory[20:32].reshape(4, 3)
    values = np.zeros(3), np.ones(3)
    for start, name in ((2, "x"), (22, "grad_out")):
        with pytest.raises(ValueError, match=f"overlaps {name}"):
            nbbn.batch_norm_backward(gradient, x, *values, out=memory[start : start + 12].reshape(4, 3))
    with pytest.raises(ValueError, match="overlaps weight"):
        nbbn.batch_norm_backward(gradient, x, *values, memory[45:48], out=memory[40:52].reshape(4, 3))
    assert (memory == 1).all()


def test_gradients_too_large_for_the_precision_of_the_weight_become_infinite():
    x = np.array([[1.0], [2.0]])
    gradient = np.full((2, 1), 1e300)
    for axis in (1, LONG_WAY):
        results = nbbn.batch_norm_backward(gradient, x, np.ones(1), np.ones(1), np.ones(1, np.float32), axis=axis)
        assert np.isinf(results[2]).all()


def test_overlapping_memory_is_noticed():
    memory = np.ones(40, np.float32)
    x, out = memory[:12].reshape(4, 3), memory[2:14].reshape(4, 3)
    with pytest.raises(ValueError, match="overlaps x"):
        nbbn.batch_norm(x, np.zeros(3), np.ones(3), out=out)
    with pytest.raises(ValueError, match="overlaps running_mean"):
        nbbn.batch_norm(memory[20:32].reshape(4, 3), out[0], np.ones(3), out=out)
    with pytest.raises(ValueError, match="overlaps"):
        nbbn.batch_norm(x, memory[:3], memory[20:23], training=True)
    with pytest.raises(ValueError, match="overlaps weight"):
        nbbn.batch_norm(x, memory[30:33], memory[20:23], memory[31:34], training=True)
    assert (memory == 1).all()


def test_read_only_running_arrays_are_refused():
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var: expected a writable array"):
        nbbn.batch_norm(np.ones((4, 3), np.float32), mean, var, training=True)
    assert (mean == 0).all()
    assert nbbn.batch_norm(np.ones((4, 3), np.float32), mean, var).shape == (4, 3)


def test_misaligned_running_arrays_are_refused():
    mean = np.frombuffer(bytearray(13), np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="running_mean: expected an aligned array"):
        nbbn.batch_norm(np.ones((4, 3), np.float32), mean, np.ones(3, np.float32), training=True)
    assert (mean == 0).all()


def test_the_reference_has_no_short_way(monkeypatch):
    answers = took_the_short_way(monkeypatch)
    x, mean, var, *_ = arrays((4, 3), np.float32, np.float32)
    with nbbn.use_backend("numpy"):
        assert backends.current().plain is None
        nbbn.batch_norm(x, mean, var, training=True)
        nbbn.batch_norm(x, mean, var)
        nbbn.batch_stats(x)
    assert not answers
