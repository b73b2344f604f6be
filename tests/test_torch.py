"""Against PyTorch on the CPU: an installation of its own, never needed to use nbbn."""

import numpy as np
import pytest

import nbbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the comparison with it is skipped")

SHAPES = [(32, 5), (8, 5, 30), (8, 5, 9, 11), (4, 70, 7, 7), (3, 5, 4, 5, 6), (2, 3, 40, 40)]
DTYPES = [np.float32, np.float64]


def tolerance(dtype, terms):
    """Rounding of a sum of that many terms, twice: once for each of us."""
    return 4 * float(np.finfo(dtype).eps) * np.sqrt(terms)


def inputs(shape, dtype, layout):
    rng = np.random.default_rng(7)
    x, grad = (rng.standard_normal((2, *shape)) * 2 + 0.5).astype(dtype)
    if layout == "channels last":
        x, grad = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, grad))
    weight, bias = rng.standard_normal((2, shape[1])).astype(dtype)
    return x, grad, weight, bias


def module(shape, dtype, weight, bias, **options):
    cls = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[
        len(shape)
    ]
    bn = cls(shape[1], affine=weight is not None, dtype=getattr(torch, np.dtype(dtype).name), **options)
    if weight is not None:
        with torch.no_grad():
            bn.weight.copy_(torch.from_numpy(weight))
            bn.bias.copy_(torch.from_numpy(bias))
    return bn


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward(shape, dtype, layout, affine, training):
    x, grad, weight, bias = inputs(shape, dtype, layout)
    if not affine:
        weight = bias = None
    theirs = module(shape, dtype, weight, bias)
    ours = nbbn.BatchNorm(shape[1], affine=affine, dtype=dtype)
    if affine:
        ours.weight[:], ours.bias[:] = weight, bias
    rng = np.random.default_rng(3)
    ours.running_mean[:], ours.running_var[:] = rng.standard_normal(shape[1]), rng.random(shape[1]) + 0.5
    theirs.running_mean.copy_(torch.from_numpy(ours.running_mean))
    theirs.running_var.copy_(torch.from_numpy(ours.running_var))
    theirs.train(training)
    ours.train(training)

    tx = torch.from_numpy(x.copy(order="K")).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.from_numpy(grad.copy(order="K")))
    y = ours(x)
    dx = ours.backward(grad)

    n = x.size // shape[1]
    bound = tolerance(dtype, n)
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=bound, atol=bound)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=bound, atol=4 * bound)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol=bound, atol=bound)
    np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol=bound)
    if affine:
        np.testing.assert_allclose(ours.grad_weight, theirs.weight.grad.numpy(), rtol=bound, atol=bound * np.sqrt(n))
        np.testing.assert_allclose(ours.grad_bias, theirs.bias.grad.numpy(), rtol=bound, atol=bound * np.sqrt(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
def test_running_statistics_over_twenty_batches(momentum, dtype):
    theirs = module((1, 5), dtype, None, None, momentum=momentum)
    ours = nbbn.BatchNorm(5, affine=False, momentum=momentum, dtype=dtype)
    rng = np.random.default_rng(11)
    for n in range(2, 22):
        x = rng.normal(3, 2, (n, 5)).astype(dtype)
        theirs(torch.from_numpy(x))
        ours(x)
        np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol=tolerance(dtype, 20 * n))
        np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol=tolerance(dtype, 20 * n))
    assert ours.num_batches_tracked == int(theirs.num_batches_tracked)


@pytest.mark.parametrize("training", [True, False])
def test_the_functional_call_moves_over_unchanged(training):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 4, 6)).astype(np.float32)
    ours = [*rng.standard_normal((1, 4)).astype(np.float32), *rng.random((1, 4)).astype(np.float32)]
    ours += [*rng.standard_normal((2, 4)).astype(np.float32)]
    theirs = [torch.from_numpy(a.copy()) for a in ours]
    y = nbbn.batch_norm(x, *ours, training, 0.3, 1e-3)
    expected = torch.nn.functional.batch_norm(torch.from_numpy(x), *theirs, training, 0.3, 1e-3)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)


def test_state_dicts_both_ways():
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    theirs(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
    ours = nbbn.BatchNorm.from_state_dict(theirs.state_dict(), prefix="1.")
    assert (ours.running_mean == theirs[1].running_mean.numpy()).all()
    assert ours.num_batches_tracked == 1
    back = {name: torch.from_numpy(value) for name, value in ours.state_dict().items()}
    fresh = torch.nn.BatchNorm1d(3)
    fresh.load_state_dict(back)
    assert (fresh.running_var == theirs[1].running_var).all()
    whole = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    prefixed = {name: torch.from_numpy(value) for name, value in ours.state_dict(prefix="1.").items()}
    assert set(whole.load_state_dict(prefixed, strict=False).missing_keys) == {"0.weight", "0.bias"}
    assert all((whole.state_dict()[name] == theirs.state_dict()[name]).all() for name in prefixed)
    with pytest.raises(TypeError, match="requires grad"):
        nbbn.BatchNorm(3).load_state_dict(dict(theirs[1].named_parameters()) | dict(theirs[1].named_buffers()))


def test_the_readme_s_claim_about_large_means():
    """PyTorch folds the mean into a float32 bias; a mean rounded to float32 loses digits before anyone computes."""
    x = (np.random.default_rng(0).standard_normal((4096, 16)) + 1e6).astype(np.float32)
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    exact = (x - mean) / np.sqrt(var + 1e-5)

    def error(y):
        return np.max(np.abs(y - exact) / (1 + np.abs(exact)))

    narrow = [a.astype(np.float32) for a in (mean, var)]
    batch_norm = torch.nn.functional.batch_norm
    assert error(batch_norm(torch.from_numpy(x), None, None, training=True).numpy()) > 0.1
    assert error(nbbn.batch_norm(x, training=True)) < 2e-7
    assert error(batch_norm(torch.from_numpy(x), *map(torch.from_numpy, narrow)).numpy()) > 1e-2
    assert error(nbbn.batch_norm(x, *narrow)) > 1e-2, "float32 running statistics cannot hold the digits"
    layer = nbbn.BatchNorm(16, dtype=np.float64).recalibrate([x]).eval()
    assert error(layer(x)) < 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), (1,), (5, 6)])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d grouped", "transposed"])
def test_folding_is_that_of_pytorch(kind, absent, dtype):
    from torch.nn.utils import fusion

    shape = {"linear": (6, 5), "conv1d": (6, 5, 3), "conv2d grouped": (6, 2, 3, 3), "transposed": (5, 6, 3, 3)}[kind]
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(dtype)
    b, mean, weight, bias = rng.standard_normal((4, 6)).astype(dtype)
    arguments = [w, b, mean, rng.uniform(0.1, 3, 6).astype(dtype), 1e-5, weight, bias]
    arguments = [None if i in absent else a for i, a in enumerate(arguments)]
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    if kind == "linear":
        for i, start in ((5, torch.ones(6)), (6, torch.zeros(6))):  # PyTorch's linear one cannot do without
            tensors[i] = start.to(tensors[0].dtype) if tensors[i] is None else tensors[i]
        ours, theirs = nbbn.fuse_linear_bn_weights(*arguments), fusion.fuse_linear_bn_weights(*tensors)
    else:
        transpose = kind == "transposed"
        ours = nbbn.fuse_conv_bn_weights(*arguments, transpose)
        theirs = fusion.fuse_conv_bn_weights(*tensors, transpose=transpose)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        # PyTorch rounds every step: at most 5 of them, of terms up to 10
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=5 * np.finfo(dtype).eps, atol=50 * np.finfo(dtype).eps)


def test_a_folded_grouped_transposed_convolution_is_both_layers():
    rng = np.random.default_rng(1)
    w, x = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((8, 3, 3, 3), (2, 8, 5, 5)))
    b, mean, weight, bias = rng.standard_normal((4, 6))
    var = rng.uniform(0.1, 3, 6)

    def convolved(w, b):
        return torch.nn.functional.conv_transpose2d(x, w, torch.from_numpy(b), stride=2, groups=2).numpy()

    fused_w, fused_b = nbbn.fuse_conv_bn_weights(w.numpy(), b, mean, var, 1e-5, weight, bias, transpose=True)
    expected = nbbn.normalize(convolved(w, b), mean, var, weight, bias)
    np.testing.assert_allclose(convolved(torch.from_numpy(fused_w), fused_b), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_in_host_memory_without_a_copy(dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    x = torch.from_numpy(inputs((8, 5, 30), np.float32, "channels first")[0]).to(dtype)
    mean, var, weight = torch.zeros(5), torch.ones(5), torch.full((5,), 2.0)
    y, stats = nbbn.batch_norm(x, mean, var, weight, training=True, return_stats=True)
    assert type(y) is torch.Tensor
    assert y.dtype == dtype
    expected = torch.nn.functional.batch_norm(x.double(), None, None, weight.double(), training=True)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-6)
    torch.testing.assert_close(mean, torch.from_numpy(stats.mean.copy()).float() * 0.1)
    assert nbbn.normalize(x, mean, var, out=x) is x, "in place, in the tensor's own memory"
    dx, dw, _ = nbbn.batch_norm_backward(x, x, mean, var, weight)
    assert (type(dx), dw.dtype) == (torch.Tensor, torch.float32)

    bn = nbbn.BatchNorm(5, like=x)
    assert type(bn(x)) is torch.Tensor
    assert type(bn.running_mean) is torch.Tensor
    assert type(bn.eval()(x)) is torch.Tensor
    assert bn.load_state_dict(bn.state_dict()) is bn
    with pytest.raises(TypeError, match=r"weight: .*requires grad; pass weight.detach\(\)"):
        nbbn.batch_norm(x, mean, var, weight.requires_grad_())
    with pytest.raises(TypeError, match="on the CPU or a CUDA device, got one on meta"):
        nbbn.batch_stats(torch.zeros(3, 3, device="meta"))
