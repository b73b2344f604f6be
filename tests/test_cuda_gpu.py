"""On a real GPU: the same contract, with CuPy's and PyTorch's arrays. `python bench/gpu.py`, or `pytest -m gpu`."""

import numpy as np
import oracle
import pytest

import nbbn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in nbbn.available_backends(), reason="no CUDA device, or no numba-cuda"),
    # warnings of other libraries' releases are not ours to fix on a machine where nothing can be installed
    pytest.mark.filterwarnings("default"),
]

SHAPES = [
    (8, 64, 56, 56), (64, 256, 7, 7), (16384, 64), (3, 5, 1023), (1, 1, 100_003), (7, 3, 129), (33, 40, 2, 2),
    (2, 1000), (1024, 1, 28, 28), (5, 3, 224, 224),
]  # fmt: skip
KINDS = ["float32", "float64", "float16", "bfloat16"]
EPS = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class CuPy:
    """Arrays of CuPy."""

    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, values, kind=None):
        if kind == "bfloat16":
            pytest.skip("bfloat16 is tested with PyTorch")
        return self.cupy.asarray(values if kind is None else values.astype(kind))

    def get(self, array):
        return self.cupy.asnumpy(array)


class Torch:
    """Tensors of PyTorch."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")

    def put(self, values, kind=None):
        tensor = self.torch.from_numpy(np.ascontiguousarray(values)).cuda()
        return tensor if kind is None else tensor.to(getattr(self.torch, kind))

    def get(self, array):
        array = array.float() if array.dtype == self.torch.bfloat16 else array
        return array.cpu().numpy()


@pytest.fixture(params=[CuPy, Torch], ids=["cupy", "torch"])
def library(request):
    return request.param()


def data(shape, seed=0, mean=3.0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32) + np.float32(mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_evaluation_backward(library, shape, kind):
    x, grad = library.put(data(shape), kind), library.put(data(shape, 1, 0.0), kind)
    values, gradients = library.get(x).astype(np.float64), library.get(grad).astype(np.float64)
    channels = shape[1]
    weight, bias = np.random.default_rng(2).standard_normal((2, channels)).astype(np.float32)
    running = library.put(np.zeros(channels, np.float32)), library.put(np.ones(channels, np.float32))
    there = library.put(weight), library.put(bias)
    y, stats = nbbn.batch_norm(x, *running, *there, training=True, return_stats=True)
    count, mean, var = (np.asarray(a, np.float64) for a in oracle.stats(values))
    host = stats.to_numpy()
    assert type(y) is type(x)
    assert (host.count == count).all()
    assert (np.abs(host.mean - mean) <= 1e-6 * np.sqrt(var)).all()
    assert (np.abs(host.var() - var) <= 2e-6 * var).all()
    slack = EPS[kind] * 2 + 3e-6 * (kind != "float64") + 1e-12
    expected = np.asarray(oracle.normalize(values, mean, var, weight, bias), np.float64)
    assert (np.abs(library.get(y) - expected) <= slack * (2 + np.abs(expected))).all()
    np.testing.assert_allclose(library.get(running[0]), 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(library.get(running[1]), 0.9 + 0.1 * var * count / (count - 1), rtol=1e-5)

    evaluated = library.get(nbbn.batch_norm(x, *running, *there))
    expected = oracle.normalize(values, library.get(running[0]), library.get(running[1]), weight, bias)
    assert (np.abs(evaluated - np.asarray(expected, np.float64)) <= slack * (2 + np.abs(expected))).all()

    dx, dw, db = nbbn.batch_norm_backward(grad, x, stats.mean, stats.var(), there[0])
    expected = [np.asarray(a, np.float64) for a in oracle.backward(gradients, values, mean, var, weight)]
    scale = 1 + np.abs(weight).max() / np.sqrt(var + 1e-5).min()
    assert (np.abs(library.get(dx) - expected[0]) <= scale * slack * (2 + np.abs(expected[0]))).all()
    for got, wanted in zip((dw, db), expected[1:], strict=True):
        assert (np.abs(library.get(got) - wanted) <= 2e-6 * np.sqrt(count) * (2 + np.abs(wanted))).all()


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (65536, 64), (64, 512, 7, 7), (8, 2, 200_000)])
def test_the_same_bits_every_run(library, shape):
    x = library.put(data(shape))
    first = nbbn.batch_norm(x, training=True, return_stats=True)
    for _ in range(20):
        y, stats = nbbn.batch_norm(x, training=True, return_stats=True)
        assert (stats.to_numpy() == first[1].to_numpy()).all()
        assert library.get(y).tobytes() == library.get(first[0]).tobytes()


@pytest.mark.parametrize("shape", [(8, 3, 50_000), (40_000, 5)])
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + np.float32(1e6),
        lambda z: z * np.float32(0) + np.float32(0.1),
        lambda z: z * np.float32(1e-40),
        lambda z: z * np.float32(1e37),
    ],
    ids=["far mean", "constant", "denormal", "huge"],
)
def test_hard_data(library, shape, change):
    values = change(data(shape, mean=0.0))
    stats = nbbn.batch_stats(library.put(values)).to_numpy()
    _, mean, var = (np.asarray(a, np.float64) for a in oracle.stats(values))
    assert (np.abs(stats.var() - var) <= 2e-6 * var).all()
    assert (np.abs(stats.mean - mean) <= 1e-6 * np.sqrt(var)).all()


def test_channels_last_and_views(library):
    x = data((16, 20, 20, 48))
    there = library.put(x)
    expected = np.asarray(oracle.normalize(x, *oracle.stats(x, -1)[1:], axis=-1), np.float64)
    np.testing.assert_allclose(library.get(nbbn.batch_norm(there, axis=-1, training=True)), expected, atol=5e-6)
    np.testing.assert_allclose(
        library.get(nbbn.batch_norm(there[:, 2:-2, ::2], axis=-1, training=True)),
        nbbn.batch_norm(x[:, 2:-2, ::2], axis=-1, training=True), atol=5e-6,
    )  # fmt: skip
    mask = np.random.default_rng(0).random((16, 20, 20, 1)) < 0.5
    masked = nbbn.batch_stats(there, axis=-1, where=library.put(mask)).to_numpy()
    np.testing.assert_allclose(masked.m2, nbbn.batch_stats(x, axis=-1, where=mask).m2, rtol=1e-6)


def test_layer_and_moments(library):
    x = data((16, 24, 14, 14))
    there = library.put(x)
    layers = nbbn.BatchNorm(24), nbbn.BatchNorm(24, like=there)
    for _ in range(3):
        np.testing.assert_allclose(library.get(layers[1](there)), layers[0](x), atol=5e-6)
        np.testing.assert_allclose(library.get(layers[1].backward(there)), layers[0].backward(x), atol=5e-5)
    np.testing.assert_allclose(library.get(layers[1].running_var), layers[0].running_var, rtol=1e-5)
    parts = nbbn.batch_stats(there[:5]) + nbbn.batch_stats(there[5:])
    whole = nbbn.batch_stats(there).to_numpy()
    np.testing.assert_allclose(parts.to_numpy().m2, whole.m2, rtol=2e-6)
    np.testing.assert_allclose(
        library.get((parts - nbbn.batch_stats(there[:5])).std()), x[5:].std((0, 2, 3)), rtol=1e-5
    )


def test_errors(library):
    x = library.put(data((4, 3, 5)))
    with pytest.raises(TypeError, match="mean: expected an array on CUDA device"):
        nbbn.normalize(x, np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="overlaps x"):
        nbbn.batch_norm(x[:3], training=True, out=x[1:])
    bad = data((4, 3, 5))
    bad[0, 1, 0] = np.nan
    mean, var = library.put(np.zeros(3, np.float32)), library.put(np.ones(3, np.float32))
    with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3"):
        nbbn.batch_norm(library.put(bad), mean, var, training=True, nonfinite="skip")
    with pytest.raises(FloatingPointError):
        nbbn.batch_norm(library.put(bad), mean, var, training=True, nonfinite="raise")
    assert np.isfinite(library.get(mean)).all()


# --- PyTorch: its own results, streams, graphs, large tensors -------------------------------------------------------


@pytest.fixture
def torch():
    return Torch().torch


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_agreement_with_pytorch(torch, kind, channels_last):
    dtype = getattr(torch, kind)
    x = torch.randn(32, 64, 28, 28, device="cuda").to(dtype) + 1
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.rand(64, device="cuda") + 0.5, torch.randn(64, device="cuda")
    mine = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    theirs = mine[0].clone(), mine[1].clone()
    y = nbbn.batch_norm(x, *mine, weight, bias, True)
    expected = torch.nn.functional.batch_norm(x, *theirs, weight, bias, True)
    assert y.stride() == x.stride()
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[kind]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"weight: expected values.*weight.detach\(\)"):
        nbbn.batch_norm(x, *mine, weight.requires_grad_(), bias, True)


def test_the_current_stream_is_used(torch):
    side = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda")
    nbbn.batch_norm(a, training=True)  # compiled, and loaded
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(side):
            b = a
            for _ in range(8):  # long enough for a kernel on another stream to come too early
                b = (b @ a) * 1e-2
            y = nbbn.batch_norm(b, training=True)
            expected = torch.nn.functional.batch_norm(b, None, None, training=True)
        side.synchronize()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_graph_capture(torch):
    x = torch.randn(64, 32, 28, 28, device="cuda")
    out = torch.empty_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compile, and make this stream's workspace, before the capture
        for _ in range(3):
            nbbn.batch_norm(x, training=True, out=out)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        nbbn.batch_norm(x, training=True, out=out)
    x.mul_(3).add_(1)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, torch.nn.functional.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2**15 + 1, 4, 2**14), (2**29 + 1, 4)], ids=["rows", "columns"])
def test_more_than_2_to_the_31_elements(torch, shape):
    elements = int(np.prod(shape))
    if torch.cuda.mem_get_info()[0] < 5 * elements:
        pytest.skip("not enough memory")
    assert elements > 2**31
    x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    x[-1] += 8  # the far end counts, and is normalized
    y, stats = nbbn.batch_norm(x, training=True, return_stats=True)
    assert (stats.to_numpy().count == elements // 4).all()
    mean, var = (torch.from_numpy(a.astype(np.float32)).cuda() for a in (stats.to_numpy().mean, stats.to_numpy().var()))
    assert (mean.abs() < 1e-2).all()
    assert ((var - 1).abs() < 1e-2).all()
    view = [1, 4] + [1] * (len(shape) - 2)
    for part in (slice(0, 2), slice(shape[0] // 2, shape[0] // 2 + 2), slice(-2, None)):
        expected = (x[part].float() - mean.view(view)) / torch.sqrt(var.view(view) + 1e-5)
        torch.testing.assert_close(y[part].float(), expected, rtol=2e-3, atol=2e-3)


def test_short_set_for_the_sanitizer():
    """A few launches of every kernel: what compute-sanitizer watches. With Numba's own arrays, nothing else loaded."""
    from numba import cuda

    for shape in ((3, 4, 1500), (3, 2, 20_000), (64, 3, 49), (300, 64)):
        x = cuda.to_device(data(shape))
        y, stats = nbbn.batch_norm(x, training=True, return_stats=True)
        expected = nbbn.batch_norm(data(shape), training=True)
        np.testing.assert_allclose(y.copy_to_host(), expected, atol=5e-6)
        dx, *_ = nbbn.batch_norm_backward(x, x, stats.mean, stats.var())
        host = nbbn.batch_stats(data(shape))
        wanted = nbbn.batch_norm_backward(data(shape), data(shape), host.mean, host.var())[0]
        np.testing.assert_allclose(dx.copy_to_host(), wanted, atol=5e-5)
        assert ((stats + stats).to_numpy().count == 2 * host.count).all()
        layer = nbbn.BatchNorm(shape[1], like=x).eval()
        np.testing.assert_allclose(layer(x).copy_to_host(), data(shape), atol=1e-4)
        assert list(layer.state_dict()) == list(nbbn.BatchNorm(1).state_dict())
