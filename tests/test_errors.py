"""Every row of the error table, and that nothing is half-written."""

import types

import numpy as np
import pytest

import nbbn

X = np.random.default_rng(0).standard_normal((6, 3, 4)).astype(np.float32)
ONES = np.ones(3, np.float32)


def call(**changes):
    """batch_norm with good arguments, changed; checks that nothing was written when it raises."""
    arguments = {
        "x": X.copy(),
        "running_mean": np.zeros(3, np.float32),
        "running_var": ONES.copy(),
        "weight": ONES,
        "bias": ONES,
        "training": True,
    } | changes
    before = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    try:
        return nbbn.batch_norm(**arguments)
    except Exception:
        for name, value in before.items():
            if isinstance(value, np.ndarray):
                assert arguments[name].tobytes() == value.tobytes(), f"{name} was changed by a call that failed"
        raise


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


PAIR = np.zeros(6, np.float32)
SHARED = np.zeros((7, 3, 4), np.float32)

CASES = [
    ({"x": X[:1, :, :1]}, ValueError, r"expected more than 1 value per channel when training, got input shape \(1, 3, 1\)"),
    ({"training": False, "running_mean": None}, ValueError, "expected both arrays in evaluation"),
    ({"training": False, "running_mean": None, "running_var": None}, ValueError, "got None"),
    ({"running_mean": None}, ValueError, "running_mean: expected both running arrays or neither"),
    ({"running_var": None}, ValueError, "running_var: expected both running arrays or neither"),
    ({"running_mean": np.zeros(4, np.float32)}, ValueError, "running_mean: expected 3 values.*got 4 values"),
    ({"running_var": np.zeros((1, 3), np.float32)}, ValueError, r"running_var: expected 3 values.*shape \(1, 3\)"),
    ({"weight": np.ones(2)}, ValueError, "weight: expected 3 values.*got 2 values"),
    ({"bias": np.ones(5)}, ValueError, "bias: expected 3 values.*got 5 values"),
    ({"weight": [1, 1, 1]}, TypeError, "weight: expected a NumPy array, got list"),
    ({"weight": np.ones(3, np.int64)}, TypeError, "weight: expected dtype float32 or float64, got int64"),
    ({"x": np.float32(3)}, TypeError, "x: expected a NumPy array, got numpy.float32"),
    ({"x": X[:, 0, 0]}, ValueError, r"x: expected at least 2 dimensions.*got shape \(6,\)"),
    ({"x": np.array(1.0), "axis": None}, ValueError, "x: expected at least 1 dimension"),
    ({"axis": 3}, ValueError, "axis: expected -3 <= axis < 3 for x of shape"),
    ({"axis": -4}, IndexError, "got -4"),
    ({"axis": 1.0}, TypeError, "axis: expected an integer or None, got 1.0"),
    ({"axis": (0, 1)}, TypeError, "axis"),
    ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    ({"eps": np.nan}, ValueError, "eps"),
    ({"eps": np.inf}, ValueError, "eps"),
    ({"eps": None}, TypeError, "eps: expected a number, got None"),
    ({"eps": ONES}, TypeError, "eps"),
    ({"momentum": 1.1}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.1"),
    ({"momentum": np.nan}, ValueError, "momentum"),
    ({"momentum": None}, TypeError, "momentum"),
    ({"momentum": True}, TypeError, "momentum"),
    ({"decay": -0.1}, ValueError, "decay: expected a number in"),
    ({"decay": 0.9, "momentum": 0.1}, ValueError, "expected one of them"),
    ({"decay": 0.9, "momentum": 0.2}, ValueError, "expected one of them"),
    ({"ddof": 2}, ValueError, "ddof: expected 0 .* or 1"),
    ({"x": X.astype(complex)}, TypeError, "x: expected float32.*integers or bool, got complex128"),
    ({"x": X.astype(object)}, TypeError, "x: expected float32.*integers or bool, got object"),
    ({"x": X.astype(str)}, TypeError, "x: expected float32"),
    ({"x": np.zeros((4, 3), [("a", np.float32)])}, TypeError, "x: expected float32"),
    ({"x": X.astype("datetime64[s]")}, TypeError, "x: expected float32"),
    ({"x": X.tolist()}, TypeError, r"x: expected a NumPy array, got list; pass numpy.asarray\(x\)"),
    ({"x": X.astype(np.int32)}, TypeError, r"x: expected float32.*in training, got int32; pass x.astype"),
    ({"x": X.astype(np.uint8)}, TypeError, "in training, got uint8"),
    ({"x": X > 0}, TypeError, "in training, got bool"),
    ({"x": X.astype(np.longdouble)}, TypeError, "x: expected float32"),
    ({"x": X.astype(">f4")}, TypeError, "x: expected native byte order"),
    ({"x": np.ma.masked_array(X, X > 0)}, TypeError, "x: expected a plain array, got a masked array.*where=~numpy.ma.getmaskarray"),
    ({"running_mean": read_only(ONES)}, ValueError, "running_mean: expected a writable array"),
    ({"running_var": read_only(ONES)}, ValueError, "running_var: expected a writable array"),
    ({"running_mean": np.zeros(3, np.float16)}, TypeError, "running_mean: expected dtype float32 or float64, got float16"),
    ({"running_mean": np.zeros(3, int)}, TypeError, "running_mean: expected dtype"),
    ({"running_mean": PAIR[::2]}, ValueError, "running_mean: expected a contiguous array"),
    ({"running_mean": PAIR[:3], "running_var": PAIR[2:5]}, ValueError, "running_var: expected memory of its own"),
    ({"running_mean": PAIR[:3], "running_var": PAIR[:3]}, ValueError, "overlaps running_mean"),
    ({"x": SHARED[:6], "running_mean": SHARED[0, 0, :3]}, ValueError, "running_mean: expected memory of its own.*overlaps x"),
    ({"running_mean": PAIR[:3], "weight": PAIR[:3]}, ValueError, "running_mean: .* overlaps weight"),
    ({"where": np.ones((6, 3, 4))}, TypeError, "where: expected dtype bool, got float64"),
    ({"where": np.ones((5, 1, 1), bool)}, ValueError, r"where: expected a shape that broadcasts to that of x, \(6, 3, 4\)"),
    ({"where": np.ones((1, 6, 3, 4), bool)}, ValueError, "where: expected a shape"),
    ({"where": [True]}, TypeError, "where: expected a NumPy array"),
    ({"where": np.zeros((6, 3, 4), bool)}, ValueError, "where: expected more than 1 value per channel when training, got 0"),
    ({"where": np.arange(72).reshape(6, 3, 4) == 4}, ValueError, "where: expected more than 1 value per channel"),
    ({"residual": X[:5]}, ValueError, r"residual: expected the shape of x, \(6, 3, 4\), got \(5, 3, 4\)"),
    ({"residual": ONES}, ValueError, "residual"),
    ({"residual": X.astype(complex)}, TypeError, "residual"),
    ({"activation": "gelu"}, ValueError, "activation: expected one of .*'relu'.*got 'gelu'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of .*'skip'.*got 'ignore'"),
    ({"nonfinite": None}, ValueError, "nonfinite"),
    ({"training": 1}, TypeError, "training: expected True or False, got 1"),
    ({"return_stats": "yes"}, TypeError, "return_stats"),
    ({"out": X[:5].copy()}, ValueError, r"out: expected the shape of x, \(6, 3, 4\), got \(5, 3, 4\)"),
    ({"out": read_only(X)}, ValueError, "out: expected a writable array"),
    ({"out": X.astype(int)}, TypeError, "out: expected dtype float32.*got int64"),
    ({"out": X.tolist()}, TypeError, "out: expected a NumPy array"),
    ({"x": SHARED[:6], "out": SHARED[1:]}, ValueError, "out: expected x itself or memory of its own, got .* overlaps x"),
    ({"x": SHARED[:6], "out": SHARED[5::-1]}, ValueError, "overlaps x"),
    ({"out": np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), (6, 3, 4), (8, 4, 4))}, ValueError, "one element of memory"),
    ({"axis": True}, TypeError, "axis: expected an integer or None, got True"),
    ({"eps": 10**400}, ValueError, "eps"),
    ({"eps": np.complex128(1 + 2j)}, TypeError, "eps: expected a number"),
    ({"momentum": 0.1 + 0j}, TypeError, "momentum: expected a number"),
    ({"ddof": np.array([0, 1])}, ValueError, "ddof"),
    ({"ddof": np.array([1])}, ValueError, "ddof"),
    ({"activation": np.array(["relu"])}, ValueError, "activation"),
    ({"residual": SHARED[:6], "out": SHARED[:6]}, ValueError, "overlaps residual"),
    ({"out": SHARED[:6], "weight": SHARED[0, 0, :3]}, ValueError, "overlaps weight"),
    ({"out": SHARED[:6], "running_mean": SHARED[0, 0, :3]}, ValueError, "overlaps out"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_training(backend, changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


TRAINING_ONLY = {"running_mean", "running_var", "where"}
EVALUATION = [c for c in CASES if not TRAINING_ONLY & c[0].keys() and "1 value" not in c[2] and "training" not in c[2]]


@pytest.mark.parametrize(("changes", "error", "message"), EVALUATION)
def test_evaluation(changes, error, message):
    with pytest.raises(error, match=message):
        call(**{"training": False, **changes})


def test_good_arguments_pass():
    assert call().shape == X.shape
    assert call(training=False, running_mean=read_only(ONES), running_var=read_only(ONES)).shape == X.shape
    assert (
        call(training=np.bool_(True), eps=np.float32(1e-3), momentum=0, axis=np.int64(-2), ddof=np.int8(0)) is not None
    )
    interleaved = np.zeros((12, 3, 4), np.float32)
    assert call(x=interleaved[::2] + X, out=interleaved[1::2]) is not None


def test_evaluation_refuses_out_over_the_running_statistics():
    with pytest.raises(ValueError, match="overlaps running_mean"):
        call(training=False, out=SHARED[:6], running_mean=SHARED[0, 0, :3])


def test_arrays_of_other_libraries():
    def fake(module, **attributes):
        return type("Tensor", (), {"__module__": module, **attributes})()

    for array, message in [
        (fake("torch", requires_grad=True, numpy=None), r"x: .*torch.Tensor that requires grad; pass x.detach\(\)"),
        (
            fake("torch", requires_grad=False, numpy=None, device="mps:0"),
            "x: expected a tensor on the CPU or .* on mps:0",
        ),
        (fake("torch"), "x: expected a NumPy array, got torch.Tensor"),
        (fake("jaxlib._jax"), "x: expected a NumPy array, got jaxlib._jax.Tensor"),
        (types.SimpleNamespace(), "types.SimpleNamespace"),
    ]:
        for function in (
            nbbn.batch_stats,
            lambda x: nbbn.normalize(x, ONES, ONES),
            lambda x: nbbn.batch_norm(x, ONES, ONES),
        ):
            with pytest.raises(TypeError, match=message):
                function(array)


@pytest.mark.skipif("cuda" in nbbn.available_backends(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("module", "attributes"),
    [
        ("cupy", {"__cuda_array_interface__": {}}),
        ("torch", {"is_cuda": True}),
        ("numba.cuda.cudadrv", {"__cuda_array_interface__": {}}),
    ],
)
def test_arrays_on_a_cuda_device(module, attributes):
    x = type("Tensor", (), {"__module__": module, **attributes})()
    for call in (
        lambda: nbbn.batch_stats(x),
        lambda: nbbn.batch_norm(X, ONES, x),
        lambda: nbbn.BatchNorm(3, like=x),
        lambda: nbbn.use_backend("cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"CUDA: .*(not installed|driver).*pip install 'nbbn\[cuda\]'"):
            call()


BACKWARD = [
    ({"grad_out": X[:5]}, ValueError, r"grad_out: expected the shape of x, \(6, 3, 4\), got \(5, 3, 4\)"),
    ({"grad_out": X.astype(int)}, TypeError, "grad_out"),
    ({"x": X.astype(int)}, TypeError, "x: expected float32.*in backward, got int64"),
    ({"mean": np.ones(2)}, ValueError, "mean: expected 3 values.*got 2"),
    ({"var": None}, TypeError, "var: expected a NumPy array, got NoneType"),
    ({"eps": -1}, ValueError, "eps"),
    ({"training": None}, TypeError, "training"),
    ({"axis": 7}, ValueError, "axis"),
    ({"out": SHARED[1:], "x": SHARED[:6]}, ValueError, "overlaps x"),
    ({"out": SHARED[1:], "grad_out": SHARED[:6]}, ValueError, "overlaps grad_out"),
    ({"out": SHARED[1:], "var": SHARED[2, 0, :3]}, ValueError, "overlaps var"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BACKWARD)
def test_backward(changes, error, message):
    with pytest.raises(error, match=message):
        nbbn.batch_norm_backward(**({"grad_out": X, "x": X, "mean": ONES, "var": ONES} | changes))


def test_ema_update():
    stats = nbbn.batch_stats(X)
    single = nbbn.batch_stats(X[:1, :, :1])
    mean, var = np.full(3, 0.5), np.full(3, 0.25)
    for arguments, options, error, message in [
        ((mean, var, X), {}, TypeError, "stats: expected Moments, got ndarray"),
        ((mean, None, stats), {}, ValueError, "running_var: expected both"),
        ((None, var, stats), {}, TypeError, "running_mean: expected a NumPy array, got NoneType"),
        ((mean, mean, stats), {}, ValueError, "overlaps running_mean"),
        ((mean, np.ones(4), stats), {}, ValueError, "running_var: expected 3 values.*got 4"),
        ((mean, var, stats, 2.0), {}, ValueError, "momentum: expected a number in"),
        ((mean, var, stats), {"momentum": 0.5, "decay": 0.5}, ValueError, "expected one of them"),
        ((mean, var, stats), {"ddof": 3}, ValueError, "ddof"),
        ((mean, var, stats), {"nonfinite": "x"}, ValueError, "nonfinite"),
        ((mean, var, single), {}, ValueError, "stats: expected more than 1 value.* with ddof=1, got 1 in channel 0"),
    ]:
        with pytest.raises(error, match=message):
            nbbn.ema_update(*arguments, **options)
        assert (mean == 0.5).all()
        assert (var == 0.25).all()
    nbbn.ema_update(mean, var, single, ddof=0)
    assert (var < 0.25).all()


def test_backends_and_threads():
    assert nbbn.available_backends()[:2] == ("numpy", "cpu")
    with pytest.raises(ValueError, match="'numpy', 'cpu', 'cuda', got 'gpu'"), nbbn.use_backend("gpu"):
        pass
    for bad in ([], "bogus"):
        with pytest.raises(ValueError, match="name: expected one of"):
            nbbn.use_backend(bad)
    for bad in (0, -1, 1.5, "2", None, True, 10_000):
        with pytest.raises(ValueError, match="n: expected"):
            nbbn.set_num_threads(bad)


def test_use_backend_nests_and_ends():
    from nbbn import backends

    assert backends.current().name == "cpu"
    with nbbn.use_backend("numpy"):
        assert backends.current().name == "numpy"
        with nbbn.use_backend("cpu"):
            assert backends.current().name == "cpu"
        assert backends.current().name == "numpy"
    with pytest.raises(KeyError), nbbn.use_backend("numpy"):
        raise KeyError
    assert backends.current().name == "cpu"
