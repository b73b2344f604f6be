"""oneDNN through PyTorch, in the blocked layout it is made for: 8 or 16 channels side by side.

`to_mkldnn` alone keeps (N, C, H, W), for which oneDNN has only its slowest kernels. What networks give it are
results of its convolutions, and those are blocked: so x goes through a convolution with the identity first, which
changes the layout and no value. That is not timed. Results are always new tensors. Its backward pass wants the
variance where the native one wants 1 / std.
"""

import numpy as np
from inputs import EPS, MOMENTUM, Array, Inputs

from peers import pytorch
from peers.table import Call, Peer


def blocked(array: Array):
    import torch

    x = torch.from_numpy(array)
    channels = x.shape[1]
    identity = torch.eye(channels).reshape(channels, channels, 1, 1)
    return torch.mkldnn_convolution(x.to_mkldnn(), identity.to_mkldnn(), None, [0, 0], [1, 1], [1, 1], 1)


def serves(given: Inputs) -> bool:
    import torch

    pictures = len(given.case.dims) == 4 and given.axis == 1 and given.dtype == np.float32
    # with other numbers of channels it would be timed on padding: one channel is stored as eight
    return pictures and given.channels % 8 == 0 and torch.backends.mkldnn.is_available()


def training(given: Inputs) -> Call | None:
    import torch

    if not serves(given):
        return None
    x = blocked(given.x)
    weight, bias, running_mean, running_var = pytorch.vectors(given)

    def call():
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
        return y, running_mean, running_var

    return call


def evaluation(given: Inputs) -> Call | None:
    import torch

    if not serves(given):
        return None
    x = blocked(given.x)
    weight, bias, running_mean, running_var = pytorch.vectors(given)

    def call():
        return (torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, False, MOMENTUM, EPS),)

    return call


def backward(given: Inputs) -> Call | None:
    import torch

    if not serves(given):
        return None
    x, grad_out = blocked(given.x), blocked(given.grad_out)
    weight, _, running_mean, running_var = pytorch.vectors(given)
    mean, var = (torch.from_numpy(a).to_mkldnn() for a in (given.batch_mean, given.batch_var))

    def call():
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, running_mean, running_var, mean, var, True, EPS, [True, True, True]
        )

    return call


PEER = Peer(
    "oneDNN, blocked",
    "torch",
    "torch",
    {"training": training, "evaluation": evaluation, "backward": backward},
    against="nbbn-new",
    read=pytorch.read,
    setting=pytorch.setting,
)
