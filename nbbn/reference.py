"""The reference backend: batch normalization in plain NumPy and float64.

Written to be read beside a textbook, and the oracle that the compiled backends are tested against. Views are
canonical, (outer, channels, inner); per-channel arrays are flat. `nbbn.backends.Backend` is the contract.

Shapes below: N outer, C channels, L inner, n = N * L values per channel.
"""

import numpy as np

from nbbn import formulas

name = "numpy"
plain = None  # nothing here is in a hurry


def moments(x, where, count, mean, m2):
    """count, mean and sum of squared deviations of each channel."""
    x = x.astype(np.float64)  # (N, C, L)
    if where is None:
        where = np.ones((1, 1, 1), np.bool_)
    where = np.broadcast_to(where, x.shape)  # (N, C, L)
    with np.errstate(all="ignore"):
        count[:] = where.sum(axis=(0, 2))  # (C,)
        # deviations from one value of the channel first: the sum of large equal numbers would round
        first = np.take_along_axis(_channels_first(x), _channels_first(where).argmax(axis=1)[:, None], axis=1)
        origin = np.where(np.isfinite(first[:, 0]) & (count > 0), first[:, 0], 0.0)  # (C,)
        deviation = np.where(where, x - origin[:, None], 0.0)
        divisor = np.maximum(count, 1)
        mean[:] = origin + deviation.sum(axis=(0, 2)) / divisor
        deviation = np.where(where, x - mean[:, None], 0.0)
        # the second term is what rounding of the mean left over (see `formulas.from_deviations`)
        m2[:] = (deviation**2).sum(axis=(0, 2)) - deviation.sum(axis=(0, 2)) ** 2 / divisor
    m2[m2 < 0.0] = 0.0


def affine(x, mean, var, weight, bias, eps, residual, relu, out):
    """Out = act((x - mean) / sqrt(var + eps) * weight + bias + residual)."""
    with np.errstate(all="ignore"):
        deviation = x.astype(np.float64) - _column(mean)  # (N, C, L)
        y = deviation / np.sqrt(_column(var) + eps)
        if weight is not None:
            y = y * _column(weight)
        if bias is not None:
            y = y + _column(bias)
        if residual is not None:
            y = y + residual
        if relu:
            y = np.where(y < 0.0, 0.0, y)  # a NaN stays one
        out[...] = y


def train(x, weight, bias, eps, residual, relu, out, count, mean, m2, update):
    """Statistics of this batch, normalize with them, update the running arrays."""
    moments(x, None, count, mean, m2)
    affine(x, mean, m2 / count, weight, bias, eps, residual, relu, out)
    return 0 if update is None else ema(count, mean, m2, update)


def backward(grad_out, x, mean, var, weight, eps, training, grad_x, grad_weight, grad_bias):
    """Gradients of `affine` (training: through the batch statistics; else they are constants)."""
    grad_out = grad_out.astype(np.float64)  # (N, C, L)
    with np.errstate(all="ignore"):
        inv_std = 1.0 / np.sqrt(np.asarray(var, np.float64) + eps)  # (C,)
        x_hat = (x.astype(np.float64) - _column(mean)) * inv_std[:, None]  # (N, C, L)
        grad_bias[:] = grad_out.sum(axis=(0, 2))
        grad_weight[:] = (grad_out * x_hat).sum(axis=(0, 2))
        scale = inv_std if weight is None else inv_std * weight
        if not training:
            grad_x[...] = grad_out * scale[:, None]
            return
        n = x.shape[0] * x.shape[2]
        mean_grad = grad_bias / n  # (C,)
        mean_grad_x_hat = grad_weight / n  # (C,)
        grad_x[...] = (grad_out - mean_grad[:, None] - x_hat * mean_grad_x_hat[:, None]) * scale[:, None]


def ema(count, mean, m2, update):
    """running += momentum * (batch - running), channel by channel; returns how many were skipped."""
    skipped = 0
    running_mean, running_var = update.running_mean.copy(), update.running_var.copy()
    with np.errstate(all="ignore"):
        for c in np.flatnonzero(count):
            batch_var = formulas.variance(int(count[c]), float(m2[c]), update.ddof)
            stored = running_mean.dtype.type(mean[c]), running_var.dtype.type(batch_var)
            if update.skip_nonfinite and not np.isfinite(stored).all():
                skipped += 1
                continue
            running_mean[c] = formulas.moving_average(float(running_mean[c]), float(mean[c]), update.momentum)
            running_var[c] = formulas.moving_average(float(running_var[c]), batch_var, update.momentum)
    # in one step: an interrupt leaves all channels of both old, or all new
    update.running_mean[:], update.running_var[:] = running_mean, running_var
    return skipped


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b, count, mean, m2):
    """Moments of both sets together, channel by channel."""
    _per_channel(formulas.merge, (count_a, mean_a, m2_a, count_b, mean_b, m2_b), (count, mean, m2))


def remove(count_all, mean_all, m2_all, count_b, mean_b, m2_b, count, mean, m2):
    """Moments of the whole without part b, channel by channel."""
    _per_channel(formulas.remove, (count_all, mean_all, m2_all, count_b, mean_b, m2_b), (count, mean, m2))


def _per_channel(formula, arguments, results):
    for c, values in enumerate(zip(*(a.tolist() for a in arguments), strict=True)):
        for result, value in zip(results, formula(*values), strict=True):
            result[c] = value


def _column(values):
    """(C,) as (C, 1) float64, to broadcast against (N, C, L)."""
    return np.asarray(values, np.float64)[:, None]


def _channels_first(x):
    """(N, C, L) as (C, N * L)."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
