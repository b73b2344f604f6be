"""Plain arrays, contiguous and of one float dtype: one kernel looks at all memory and prepares what channels need.

Checks and preparations array by array take 30 to 100 us: twenty times the work itself at (64, 64), and as long as it
at a million values. So kernels look at memory themselves, and answer False, having written nothing of the caller's,
whenever an argument is not as they want it; the long way then does what is to be done, or says what is wrong. Of
small arrays the same kernel does the rest too. Arithmetic and its order are always those of the large kernels: results
are the same, bit for bit.
"""

from functools import lru_cache

import numpy as np
from numpy import empty, may_share_memory

from nbbn.cpu import caches, channels, columns, core, plain_backward, plain_kernels, plan, rows

#: Values above which there is work for a second thread, so that the large kernels take over.
SMALL = 262_143

# what most parameters are: no kernel of its own for those that are absent
_NOTHING = {kind: empty(0, kind) for kind in "fd"}


def normalize(x, out, mean, var, weight, bias, eps):
    w = _NOTHING["f"] if weight is None else weight
    b = _NOTHING["f"] if bias is None else bias
    if _is_small(x):
        affine, _, _ = _plans(x.shape, x.dtype)
        kernel = plain_kernels.normalize_columns if affine.by_columns else plain_kernels.normalize_rows
        return kernel(x, out, mean, var, w, b, eps)
    ready = core.coefficients(x.shape[1], core.arithmetic(x))
    fits, all_served = plain_kernels.prepare_normalize(_bytes(x), _bytes(out), mean, var, w, b, eps, *ready)
    if fits:
        core.affine(x, None, False, out, all_served, *ready)
    return fits


def train(x, out, running_mean, running_var, weight, bias, eps, momentum, ddof, count, mean, m2):
    if _is_small(x):
        given = _of_one_kind(running_mean, running_var, weight, bias)
        _, how, _ = _plans(x.shape, x.dtype)
        if how.by_columns:
            sizes = how.fold, how.tile
            return plain_kernels.train_columns(x, out, *given, eps, momentum, ddof, *sizes, count, mean, m2)
        return plain_kernels.train_rows(x, out, *given, eps, momentum, ddof, how.group, count, mean, m2)
    if not _fits_training(x, out, running_mean, running_var, weight, bias):
        return False
    w = core.NOTHING if weight is None else weight.astype(core.FLOAT64)
    b = core.NOTHING if bias is None else bias.astype(core.FLOAT64)
    core.train(x, w, b, eps, None, False, out, count, mean, m2)
    if running_mean is not None:
        channels.ema(running_mean, running_var, count, mean, m2, momentum, ddof, False)
    return True


def _fits_training(x, out, running_mean, running_var, weight, bias):
    """What the kernel of small arrays finds out: here it would take half a second to compile, to save microseconds."""
    size, shared = x.shape[1], may_share_memory
    if shared(out, x) and not caches.same_place(out, x):
        return False
    for values in (weight, bias):
        if values is not None and (values.size != size or shared(values, out)):
            return False
    if running_mean is None:
        return True
    for values in (running_mean, running_var):
        if values.size != size or shared(values, x) or shared(values, out):
            return False
        if (weight is not None and shared(values, weight)) or (bias is not None and shared(values, bias)):
            return False
    return not shared(running_mean, running_var)


def moments(x, count, mean, m2):
    if not _is_small(x):
        core.moments(x, count, mean, m2)
        return
    _, how, _ = _plans(x.shape, x.dtype)
    count.fill(x.shape[0] * x.shape[2])
    if how.by_columns:
        columns.moments.serial(1, x, how.fold, how.tile, mean, m2)
    else:
        rows.moments.serial(1, x, how.group, mean, m2)


def backward(grad_out, x, mean, var, weight, eps, grad_x, dtype):
    size = x.shape[1]
    results = empty((2, size), dtype)
    given = mean, var, _NOTHING[dtype.char] if weight is None else weight, eps
    if _is_small(x) and dtype == x.dtype and mean.dtype == var.dtype and mean.dtype in (dtype, core.FLOAT64):
        _, _, how = _plans(x.shape, x.dtype)
        sums = how.sums
        if sums.by_columns:
            served = plain_backward.by_columns(grad_out, x, grad_x, *given, sums.fold, sums.tile, results)
        else:
            served = plain_backward.by_rows(grad_out, x, grad_x, *given, sums.group, results)
        return results if served else None
    # one by one: taking the rows of one array apart takes twice as long
    wide_mean, inv_std, scale, high = empty(size), empty(size), empty(size), empty(size, core.arithmetic(x))
    of_channels = wide_mean, high, inv_std, scale
    if not plain_backward.prepare(_bytes(grad_out), _bytes(x), _bytes(grad_x), *given, *of_channels):
        return None
    of_parameters = empty(size), empty(size)
    core.backward(grad_out, x, *of_channels, grad_x, *of_parameters)
    plain_backward.rounded(*of_parameters, results)
    return results


def _is_small(x):
    return x.size <= SMALL and x.dtype.char in "fd"


def _bytes(array):
    """The same memory: one type, so one compiled kernel, for all."""
    return array.view(np.uint8)


def _of_one_kind(*parameters):
    """Empty arrays of the dtype of the others instead of None."""
    kind = "f"
    for values in parameters:
        if values is not None:
            kind = values.dtype.char
    return tuple(_NOTHING[kind] if values is None else values for values in parameters)


@lru_cache(1024)
def _plans(shape, dtype):
    """What `nbbn.cpu.plan` says of such arrays, on one thread: normalization, statistics, backward."""
    x = plan.view(empty(shape, dtype))
    return plan.affine(x, x), plan.statistics(1, x), plan.backward(1, x, x, x)
