"""PyTorch's native kernels, on tensors that share NumPy's memory.

Channels-last arrays are seen as `torch.channels_last` tensors, (N, C, H, W) with the strides of (N, H, W, C): the
layout that PyTorch has kernels of its own for. Batch norm's backward pass has no way to write to given memory
(its `.out` is the allocating one and a copy). Nothing here records gradients, as nbbn does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from inputs import EPS, MOMENTUM, Array, Inputs

import nbbn
from peers.table import Call, Peer


def tensor(array: Array, given: Inputs):
    """The same memory; the channel axis second."""
    import torch

    if given.dtype.name == "bfloat16" and array.dtype == given.dtype:  # not known to PyTorch by that NumPy dtype
        shared = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        shared = torch.from_numpy(array)
    return shared.movedim(-1, 1) if given.axis == -1 else shared


def vectors(given: Inputs) -> list:
    """Weight, bias, running mean and variance; copies, since training writes to the last two."""
    import torch

    arrays = given.weight, given.bias, given.running_mean, given.running_var
    return [torch.from_numpy(array.copy()) for array in arrays]


def statistics(given: Inputs) -> Call:
    import torch

    x = tensor(given.x, given)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    if given.dtype.kind == "u":  # no variance of integers: what one has to write then
        return lambda: torch.var_mean(x.float(), axes, correction=0)[::-1]
    return lambda: torch.var_mean(x, axes, correction=0)[::-1]


def training(given: Inputs) -> Call:
    import torch

    x, out = tensor(given.x, given), tensor(given.empty_result(), given)
    weight, bias, running_mean, running_var = vectors(given)
    save_mean, save_invstd = torch.empty(given.channels), torch.empty(given.channels)

    def call():
        torch.ops.aten.native_batch_norm.out(
            x, weight, bias, running_mean, running_var, True, MOMENTUM, EPS,
            out=out, save_mean=save_mean, save_invstd=save_invstd,
        )  # fmt: skip
        return out, running_mean, running_var

    return call


def training_new(given: Inputs) -> Call:
    import torch

    x = tensor(given.x, given)
    weight, bias, running_mean, running_var = vectors(given)

    def call():
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
        return y, running_mean, running_var

    return call


def evaluation(given: Inputs) -> Call:
    import torch

    x, out = tensor(given.x, given), tensor(given.empty_result(), given)
    weight, bias, running_mean, running_var = vectors(given)
    nothing = torch.empty(0), torch.empty(0)

    def call():
        torch.ops.aten.native_batch_norm.out(
            x, weight, bias, running_mean, running_var, False, MOMENTUM, EPS,
            out=out, save_mean=nothing[0], save_invstd=nothing[1],
        )  # fmt: skip
        return (out,)

    def call_on_integers():  # batch norm takes floats only; in place is the cheapest way there
        out.copy_(x)
        torch.ops.aten.native_batch_norm.out(
            out, weight, bias, running_mean, running_var, False, MOMENTUM, EPS,
            out=out, save_mean=nothing[0], save_invstd=nothing[1],
        )  # fmt: skip
        return (out,)

    return call_on_integers if given.dtype.kind == "u" else call


def evaluation_new(given: Inputs) -> Call:
    import torch

    x = tensor(given.x, given)
    weight, bias, running_mean, running_var = vectors(given)
    integers = given.dtype.kind == "u"

    def call():
        values = x.float() if integers else x
        return (torch.nn.functional.batch_norm(values, running_mean, running_var, weight, bias, False, MOMENTUM, EPS),)

    return call


def backward_new(given: Inputs) -> Call:
    import torch

    x, grad_out = tensor(given.x, given), tensor(given.grad_out, given)
    weight, _, running_mean, running_var = vectors(given)
    mean, inv_std = torch.from_numpy(given.batch_mean), torch.from_numpy(1 / np.sqrt(given.batch_var + np.float32(EPS)))

    def call():
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, running_mean, running_var, mean, inv_std, True, EPS, [True, True, True]
        )

    return call


def read(answer: tuple, given: Inputs) -> list[Array]:
    """Arrays with the axes of x; half precision is widened, which is exact."""
    dense = [result.to_dense() if result.is_mkldnn else result for result in answer]
    whole = [r.movedim(1, -1) if given.axis == -1 and r.ndim > 1 else r for r in dense]
    return [_array(result) for result in whole]


def _array(result) -> Array:
    """As an array of its own dtype: the check allows for its precision."""
    import torch

    if result.dtype == torch.bfloat16:
        from ml_dtypes import bfloat16

        return result.float().numpy().astype(bfloat16)
    return result.numpy()


@contextmanager
def setting() -> Iterator[None]:
    """nbbn's number of threads, and no bookkeeping for gradients."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(nbbn.get_num_threads())
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


WITH_OUT = Peer(
    "PyTorch",
    "torch",
    "torch",
    {"statistics": statistics, "training": training, "evaluation": evaluation},
    read=read,
    setting=setting,
)
NEW_RESULT = replace(
    WITH_OUT,
    label="PyTorch, new result",
    calls={"training": training_new, "evaluation": evaluation_new, "backward": backward_new},
    against="nbbn-new",
)
