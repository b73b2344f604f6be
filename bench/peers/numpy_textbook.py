"""NumPy: the formulas of the textbook.

In the dtype of x, and statistics of half precision in float32, since sums in it overflow or stop growing. The last
step writes to memory allocated before, as nbbn does; the temporaries before that are the formula's own.
"""

import numpy as np
from inputs import EPS, MOMENTUM, Array, Inputs

from peers.table import Call, Peer


def _sum_dtype(x: Array) -> type | None:
    return np.float32 if x.dtype.itemsize == 2 else None


def statistics(given: Inputs) -> Call:
    x, axes, dtype = given.x, given.axes, _sum_dtype(given.x)

    def call():
        return x.mean(axes, dtype=dtype), x.var(axes, dtype=dtype)

    return call


def training(given: Inputs) -> Call:
    x, axes, dtype, out = given.x, given.axes, _sum_dtype(given.x), given.empty_result()
    running_mean, running_var = (given.broadcast(a.copy()) for a in (given.running_mean, given.running_var))
    weight, bias = given.broadcast(given.weight), given.broadcast(given.bias)
    unbiased = given.count / (given.count - 1)

    def call():
        mean = x.mean(axes, keepdims=True, dtype=dtype)
        var = x.var(axes, keepdims=True, dtype=dtype)
        np.add((x - mean) / np.sqrt(var + EPS) * weight, bias, out=out, casting="unsafe")
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * unbiased
        return out, running_mean, running_var

    return call


def evaluation(given: Inputs) -> Call:
    x, out = given.x, given.empty_result()
    mean, var = given.broadcast(given.running_mean), given.broadcast(given.running_var)
    weight, bias = given.broadcast(given.weight), given.broadcast(given.bias)

    def call():
        np.add((x - mean) / np.sqrt(var + EPS) * weight, bias, out=out, casting="unsafe")
        return (out,)

    return call


def backward(given: Inputs) -> Call:
    x, grad_out, axes, out = given.x, given.grad_out, given.axes, given.empty_result()
    mean, var = given.broadcast(given.batch_mean), given.broadcast(given.batch_var)
    weight, count = given.broadcast(given.weight), given.count

    def call():
        inv_std = 1 / np.sqrt(var + EPS)
        x_hat = (x - mean) * inv_std
        grad_bias = grad_out.sum(axes, keepdims=True)
        grad_weight = (grad_out * x_hat).sum(axes, keepdims=True)
        np.multiply(weight * inv_std, grad_out - grad_bias / count - x_hat * (grad_weight / count), out=out)
        return out, grad_weight, grad_bias

    return call


PEER = Peer(
    "NumPy",
    "numpy",
    "numpy",
    {"statistics": statistics, "training": training, "evaluation": evaluation, "backward": backward},
)
