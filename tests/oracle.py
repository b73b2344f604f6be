"""The textbook in extended precision: slow, short, and independent of the package."""

import numpy as np

WIDE = np.longdouble


def over(x, axis):
    """The axes that statistics are taken over."""
    return tuple(range(x.ndim)) if axis is None else tuple(a for a in range(x.ndim) if a != axis % x.ndim)


def expand(values, x, axis):
    """Per-channel values, shaped to broadcast against x."""
    if axis is None:
        return np.asarray(values, WIDE).reshape((1,) * x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(values, WIDE).reshape(shape)


def stats(x, axis=1, where=True):
    """count, mean, population variance per channel."""
    x = x.astype(WIDE)
    axes = over(x, axis)
    where = np.broadcast_to(where, x.shape)
    count = np.atleast_1d(where.sum(axis=axes))
    divisor = np.maximum(count, 1)
    mean = np.atleast_1d(np.where(where, x, 0).sum(axis=axes)) / divisor
    deviation = np.where(where, x - expand(mean, x, axis), 0)
    # second pass on the mean as well: longdouble sums of 1e6-sized values round too
    mean = mean + np.atleast_1d(deviation.sum(axis=axes)) / divisor
    deviation = np.where(where, x - expand(mean, x, axis), 0)
    return count, mean, np.atleast_1d((deviation**2).sum(axis=axes)) / divisor


def normalize(x, mean, var, weight=None, bias=None, eps=1e-5, axis=1, residual=None, relu=False):
    y = (x.astype(WIDE) - expand(mean, x, axis)) / np.sqrt(expand(var, x, axis) + WIDE(eps))
    if weight is not None:
        y = y * expand(weight, x, axis)
    if bias is not None:
        y = y + expand(bias, x, axis)
    if residual is not None:
        y = y + residual
    return np.maximum(y, 0) if relu else y


def backward(grad, x, mean, var, weight=None, eps=1e-5, axis=1, training=True):
    grad, axes = grad.astype(WIDE), over(x, axis)
    inv_std = 1 / np.sqrt(expand(var, x, axis) + WIDE(eps))
    x_hat = (x.astype(WIDE) - expand(mean, x, axis)) * inv_std
    grad_bias, grad_weight = grad.sum(axis=axes), (grad * x_hat).sum(axis=axes)
    scale = inv_std if weight is None else inv_std * expand(weight, x, axis)
    if training:
        n = x.size // np.size(grad_bias)
        grad = grad - expand(grad_bias / n, x, axis) - x_hat * expand(grad_weight / n, x, axis)
    return grad * scale, np.atleast_1d(grad_weight), np.atleast_1d(grad_bias)
