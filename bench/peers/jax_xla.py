"""JAX: each operation one `jit`, compiled by XLA before the clock starts. Results are always new arrays.

float32 only, XLA's default. It could reuse an input's memory (`donate_argnums`), but then the next call would have
none; so it is compared with nbbn without `out=`.
"""

import numpy as np
from inputs import EPS, MOMENTUM, Inputs

from peers.table import Call, Peer


def _timed(function, given: Inputs, *arrays) -> Call | None:
    """`function` compiled, on `arrays` in buffers of XLA's own; returns when the results are there."""
    import jax

    if given.dtype != np.float32:
        return None
    compiled = jax.jit(function)
    buffers = [jax.device_put(array, jax.devices("cpu")[0]) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*buffers))


def _along(given: Inputs):
    """A function that lays a per-channel array along the channel axis of x."""
    import jax.numpy as jnp

    return lambda per_channel: jnp.expand_dims(per_channel, given.axes)


def statistics(given: Inputs) -> Call | None:
    def function(x):
        return x.mean(given.axes), x.var(given.axes)

    return _timed(function, given, given.x)


def training(given: Inputs) -> Call | None:
    import jax

    along, unbiased = _along(given), given.count / (given.count - 1)

    def function(x, weight, bias, running_mean, running_var):
        mean, var = x.mean(given.axes), x.var(given.axes)
        scale = weight * jax.lax.rsqrt(var + EPS)
        y = (x - along(mean)) * along(scale) + along(bias)
        running_mean = running_mean + MOMENTUM * (mean - running_mean)
        running_var = running_var + MOMENTUM * (var * unbiased - running_var)
        return y, running_mean, running_var

    return _timed(function, given, given.x, given.weight, given.bias, given.running_mean, given.running_var)


def evaluation(given: Inputs) -> Call | None:
    import jax

    along = _along(given)

    def function(x, weight, bias, mean, var):
        scale = weight * jax.lax.rsqrt(var + EPS)
        return ((x - along(mean)) * along(scale) + along(bias),)

    return _timed(function, given, given.x, given.weight, given.bias, given.running_mean, given.running_var)


def backward(given: Inputs) -> Call | None:
    """The written formula, from the statistics that the others get too; `jax.vjp` would compute them again."""
    import jax

    along = _along(given)

    def function(grad_out, x, weight, mean, var):
        inv_std = jax.lax.rsqrt(var + EPS)
        x_hat = (x - along(mean)) * along(inv_std)
        grad_bias, grad_weight = grad_out.sum(given.axes), (grad_out * x_hat).sum(given.axes)
        centred = grad_out - along(grad_bias / given.count)
        grad_x = along(weight * inv_std) * (centred - x_hat * along(grad_weight / given.count))
        return grad_x, grad_weight, grad_bias

    return _timed(function, given, given.grad_out, given.x, given.weight, given.batch_mean, given.batch_var)


PEER = Peer(
    "JAX",
    "jax",
    "jax",
    {"statistics": statistics, "training": training, "evaluation": evaluation, "backward": backward},
    against="nbbn-new",
)
