"""What `gpu.py` compares: nbbn, PyTorch's own kernels, cuDNN, CuPy's textbook formula, and a copy on the device.

And nbbn with itself: training and backward in one launch and in two, calls with and without what is remembered of
them, launches by Numba and without it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EPS, MOMENTUM = 1e-5, 0.1

#: (name, shape as N, C, *spatial, channels-last memory, dtype)
CASES = [
    ((32, 64, 56, 56), False, "float32"),
    ((64, 64, 112, 112), False, "float32"),
    ((64, 256, 28, 28), False, "float32"),
    ((128, 512, 14, 14), False, "float32"),
    ((256, 512, 7, 7), False, "float32"),
    ((64, 256, 56, 56), True, "float32"),
    ((256, 512, 14, 14), True, "float32"),
    ((1048576, 64), False, "float32"),
    ((64, 64, 112, 112), False, "float16"),
    ((64, 256, 56, 56), True, "float16"),
    ((64, 64, 112, 112), False, "bfloat16"),
    ((4096, 1, 112, 112), False, "float32"),
    ((64, 64), False, "float32"),
]

OPERATIONS = ("statistics", "training", "evaluation", "backward")

#: Shapes that one launch serves on most devices: a channel per block, and little work.
AT_ONCE = [
    ((64, 256, 28, 28), False, "float32"),
    ((128, 512, 14, 14), False, "float32"),
    ((8, 32, 24, 24), False, "float32"),
]

#: Arrays of x's size that must be read and written, each once.
TRAFFIC = {"statistics": 1, "training": 2, "evaluation": 2, "backward": 3, "copy": 2}


@dataclass
class Inputs:
    """One set of buffers; several take turns so that nothing is found in the second-level cache."""

    x: Any
    grad: Any
    out: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    mean: Any
    var: Any


def make_inputs(torch: Any, shape: tuple[int, ...], last: bool, dtype: str) -> Inputs:
    """Random values on the device."""

    def values() -> Any:
        tensor = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
        return tensor.to(memory_format=torch.channels_last) if last else tensor

    x, channels = values(), shape[1]
    weight, bias = torch.rand(channels, device="cuda") + 0.5, torch.randn(channels, device="cuda")
    axes = tuple(a for a in range(len(shape)) if a != 1)
    var, mean = torch.var_mean(x.float(), axes, correction=0)
    return Inputs(
        x, values(), torch.empty_like(x), weight, bias, torch.zeros_like(weight), torch.ones_like(weight), mean, var
    )


def contenders(torch: Any, operation: str, given: Inputs) -> Iterator[tuple[str, Callable[[Inputs], object]]]:
    """Everyone who can do this: name, and what does it to one set of buffers."""
    import nbbn

    aten = torch.ops.aten
    axes = tuple(a for a in range(given.x.ndim) if a != 1)

    if operation == "statistics":
        yield "nbbn", lambda s: nbbn.batch_stats(s.x)
        yield "PyTorch", lambda s: torch.var_mean(s.x, axes, correction=0)
    elif operation == "training":
        yield (
            "nbbn",
            lambda s: nbbn.batch_norm(
                s.x, s.running_mean, s.running_var, s.weight, s.bias, True, MOMENTUM, EPS, out=s.out
            ),
        )
        yield (
            "PyTorch",
            lambda s: aten.native_batch_norm(s.x, s.weight, s.bias, s.running_mean, s.running_var, True, MOMENTUM, EPS),
        )
        yield (
            "cuDNN",
            lambda s: aten.cudnn_batch_norm(s.x, s.weight, s.bias, s.running_mean, s.running_var, True, MOMENTUM, EPS),
        )
    elif operation == "evaluation":
        yield (
            "nbbn",
            lambda s: nbbn.batch_norm(s.x, s.running_mean, s.running_var, s.weight, s.bias, eps=EPS, out=s.out),
        )
        yield (
            "PyTorch",
            lambda s: aten.native_batch_norm(
                s.x, s.weight, s.bias, s.running_mean, s.running_var, False, MOMENTUM, EPS
            ),
        )
    else:
        yield "nbbn", lambda s: nbbn.batch_norm_backward(s.grad, s.x, s.mean, s.var, s.weight, eps=EPS, out=s.out)
        yield "PyTorch", lambda s: aten.native_batch_norm_backward(
            s.grad, s.x, s.weight, s.running_mean, s.running_var, s.mean, torch.rsqrt(s.var + EPS), True, EPS,
            [True, True, True],
        )  # fmt: skip
        saved = aten.cudnn_batch_norm(
            given.x, given.weight, given.bias, given.running_mean, given.running_var, True, MOMENTUM, EPS
        )
        yield (
            "cuDNN",
            lambda s: aten.cudnn_batch_norm_backward(
                s.x, s.grad, s.weight, s.running_mean, s.running_var, saved[1], saved[2], EPS, saved[3]
            ),
        )
    yield from _cupy(operation, given)


def _cupy(operation: str, given: Inputs) -> Iterator[tuple[str, Callable[[Inputs], object]]]:
    """The formula as everyone writes it, on the same memory."""
    import cupy

    if given.x.dtype.itemsize == 2 and "bfloat16" in str(given.x.dtype):
        return
    axes = tuple(a for a in range(given.x.ndim) if a != 1)
    shape = (1, -1, *[1] * (given.x.ndim - 2))

    def seen(tensor: Any) -> Any:
        return cupy.asarray(tensor)

    def evaluation(s: Inputs) -> Any:
        scale = seen(s.weight) / cupy.sqrt(seen(s.running_var) + EPS)
        shifted = seen(s.x) - seen(s.running_mean).reshape(shape)
        return shifted * scale.reshape(shape) + seen(s.bias).reshape(shape)

    def training(s: Inputs) -> Any:
        x = seen(s.x)
        mean, var = x.mean(axes, dtype="float32"), x.var(axes, dtype="float32")
        scale = seen(s.weight) / cupy.sqrt(var + EPS)
        return (x - mean.reshape(shape)) * scale.reshape(shape) + seen(s.bias).reshape(shape)

    if operation == "evaluation":
        yield "CuPy formula", evaluation
    elif operation == "training":
        yield "CuPy formula", training
    elif operation == "statistics":
        yield "CuPy formula", lambda s: (seen(s.x).mean(axes, dtype="float32"), seen(s.x).var(axes, dtype="float32"))


@contextmanager
def cache_size(l2_bytes: int | None) -> Iterator[None]:
    """Plans for a second-level cache of another size within: 0 forbids single launches; None: as it is."""
    import nbbn.cuda
    from nbbn.cuda import warm

    before = nbbn.cuda.properties

    def properties(device: int | None) -> Any:
        real = before(device)
        return real if l2_bytes is None else type(real)(real.multiprocessors, l2_bytes)

    warm._known.clear()
    nbbn.cuda.properties = properties  # type: ignore[assignment]
    try:
        yield
    finally:
        nbbn.cuda.properties = before
        warm._known.clear()


@contextmanager
def launched_by_numba(wanted: bool) -> Iterator[None]:
    """Whether Numba packs the arguments of every launch within, or only of the first."""
    from nbbn.cuda import launcher, recipes, warm

    def forget() -> None:
        warm._known.clear()
        for made in (recipes.statistics, recipes.affine, recipes.training, recipes.gradient_totals, recipes.gradients):
            made.cache_clear()

    before = launcher._is_known
    forget()
    launcher._is_known = lambda: not wanted
    try:
        yield
    finally:
        launcher._is_known = before
        forget()


def host_calls(given: Inputs) -> dict[str, Callable[[], object]]:
    """Training, by the public function and by what remembers calls."""
    import nbbn
    from nbbn.cuda import warm

    s = given
    arrays = s.x, s.running_mean, s.running_var, s.weight, s.bias
    return {
        "public": lambda: nbbn.batch_norm(*arrays, True, MOMENTUM, EPS, out=s.out),
        "remembered": lambda: warm.train(*arrays, MOMENTUM, EPS, 1, 1, None, None, s.out, False),
    }
