"""Serial kernels that look at memory and prepare channels, or do all there is to do: see `nbbn.cpu.plain`.

Parameters that are absent are empty arrays.
"""

import numpy as np

from nbbn.cpu import columns, rows
from nbbn.cpu.affine import normalize_row
from nbbn.cpu.channels import (
    channel_scale,
    channel_shift,
    fill_coefficients,
    fill_narrow,
    move,
    variance_formula,
)
from nbbn.cpu.jit import formula, serial_kernel
from nbbn.cpu.memory import run
from nbbn.cpu.overlap import disjoint, same_place
from nbbn.cpu.scratch import greater, lesser, scratch_rows
from nbbn.cpu.tiles import expand

#: Columns worked on together, about: more take longer to prepare than they save.
SMALL_TILE = 256

# --- memory -----------------------------------------------------------------------------------------------------------


@formula
def is_result(out, x):
    """Whether `out` is `x` or memory of its own."""
    return same_place(out, x) or disjoint(out, x)


@formula
def is_parameter(values, size, out):
    """Whether there are `size` values, or none, in memory apart from `out`."""
    return (values.size == size or not values.size) and disjoint(out, values)


@formula
def fits(x, out, size, mean, var, weight, bias):
    """Whether there are `size` values of every parameter and `out` is `x` or memory of its own."""
    if mean.size != size or var.size != size or not is_result(out, x):
        return False
    if not disjoint(out, mean) or not disjoint(out, var):
        return False
    return is_parameter(weight, size, out) and is_parameter(bias, size, out)


@formula
def alone(running, x, out, size, weight, bias):
    """Whether a running array has `size` values and shares no memory with anything else."""
    if running.size != size:
        return False
    return disjoint(running, x) and disjoint(running, out) and disjoint(running, weight) and disjoint(running, bias)


@formula
def fits_training(x, out, size, running_mean, running_var, weight, bias):
    """The same for training: the running arrays, if there are any, are good to be written."""
    if not is_result(out, x) or not is_parameter(weight, size, out) or not is_parameter(bias, size, out):
        return False
    if not running_mean.size and not running_var.size:
        return True
    if not alone(running_mean, x, out, size, weight, bias) or not alone(running_var, x, out, size, weight, bias):
        return False
    return disjoint(running_mean, running_var)


# --- the affine step --------------------------------------------------------------------------------------------------


@formula
def coefficients_serve(mean, var, weight, bias, eps, narrow):
    """Fill mean, scale, shift of every channel; False if some channel needs float64."""
    served = True
    for c in range(mean.size):
        scale, shift = channel_scale(var[c], weight, c, eps), channel_shift(bias, c)
        served &= fill_narrow(np.float64(mean[c]), scale, shift, narrow, c)
    return served


@formula
def write_rows(x, out, narrow):
    """out = (x - mean) * scale + shift, by rows."""
    outer, channels, inner = x.shape
    floor = x.dtype.type(-np.inf)
    for o in range(outer):
        for c in range(channels):
            ready = narrow[0, c], narrow[1, c], narrow[2, c]
            normalize_row(run(out, o, c, 0, inner), (run(x, o, c, 0, inner),), ready, floor, False, False)


@formula
def write_columns(x, out, narrow):
    """The same by columns, several rows at a time if they are short."""
    outer, channels, inner = x.shape
    floor = x.dtype.type(-np.inf)
    width = channels * inner
    fold = greater(1, lesser(outer, SMALL_TILE // width))
    expanded = scratch_rows(3, fold * width, floor)
    for k in range(3):
        expand(narrow[k], expanded[k], 0, inner)
    ready = expanded[0], expanded[1], expanded[2]
    for o in range(0, outer, fold):
        size = lesser(fold, outer - o) * width
        normalize_row(run(out, o, 0, 0, size), (run(x, o, 0, 0, size),), ready, floor, False, False)


@serial_kernel(reads=("x", "out", "mean", "var", "weight", "bias"))
def prepare_normalize(x, out, mean, var, weight, bias, eps, wide, narrow, narrow_serves):
    """What `channels.coefficients` fills and returns, after whether memory `fits`; `x` and `out` as bytes."""
    if not fits(x, out, wide.shape[1], mean, var, weight, bias):
        return False, False
    all_served = True
    for c in range(mean.size):
        kinds = np.float64(mean[c]), np.float64(var[c])
        narrow_serves[c] = fill_coefficients(*kinds, weight, bias, c, eps, wide, narrow, c)
        all_served &= narrow_serves[c]
    return True, all_served


@serial_kernel(reads=("x", "mean", "var", "weight", "bias"))
def normalize_rows(x, out, mean, var, weight, bias, eps):
    """out = (x - mean) / sqrt(var + eps) * weight + bias, by rows; or False."""
    narrow = scratch_rows(3, x.shape[1], x.dtype.type(0))
    if not fits(x, out, x.shape[1], mean, var, weight, bias) or not coefficients_serve(
        mean, var, weight, bias, eps, narrow
    ):
        return False
    write_rows(x, out, narrow)
    return True


@serial_kernel(reads=("x", "mean", "var", "weight", "bias"))
def normalize_columns(x, out, mean, var, weight, bias, eps):
    """The same by columns."""
    narrow = scratch_rows(3, x.shape[1], x.dtype.type(0))
    if not fits(x, out, x.shape[1], mean, var, weight, bias) or not coefficients_serve(
        mean, var, weight, bias, eps, narrow
    ):
        return False
    write_columns(x, out, narrow)
    return True


# --- training ---------------------------------------------------------------------------------------------------------


@formula
def variances(x, m2, ddof):
    """m2 / (count - ddof) of every channel."""
    result = scratch_rows(1, m2.size, 0.0)[0]
    for c in range(m2.size):
        result[c] = variance_formula(x.shape[0] * x.shape[2], m2[c], ddof)
    return result


@formula
def update(running_mean, running_var, mean, var, momentum):
    """Moving averages of every channel, if there are any."""
    for c in range(running_mean.size):
        move(running_mean, running_var, c, mean[c], var[c], momentum)


@serial_kernel(reads=("x", "weight", "bias"))
def train_rows(x, out, running_mean, running_var, weight, bias, eps, momentum, ddof, group, count, mean, m2):
    """Statistics, normalization with them, moving averages, by rows; or False."""
    if not fits_training(x, out, x.shape[1], running_mean, running_var, weight, bias):
        return False
    chunks, groups = rows.parts(x, group)
    part_origin = scratch_rows(chunks, x.shape[1], 0.0)
    part_mean = scratch_rows(chunks, x.shape[1], 0.0)
    part_m2 = scratch_rows(chunks, x.shape[1], 0.0)
    for task in range(chunks * groups):
        rows.part_moments(x, task, groups, group, part_origin, part_mean, part_m2)
    rows.merge_parts(x, part_mean, part_m2, mean, m2)
    narrow = scratch_rows(3, x.shape[1], x.dtype.type(0))
    if not coefficients_serve(mean, variances(x, m2, 0), weight, bias, eps, narrow):
        return False
    write_rows(x, out, narrow)
    count[:] = x.shape[0] * x.shape[2]
    update(running_mean, running_var, mean, variances(x, m2, ddof), momentum)
    return True


@serial_kernel(reads=("x", "weight", "bias"))
def train_columns(x, out, running_mean, running_var, weight, bias, eps, momentum, ddof, fold, tile, count, mean, m2):
    """The same by columns."""
    if not fits_training(x, out, x.shape[1], running_mean, running_var, weight, bias):
        return False
    chunks, tiles = columns.parts(x, fold, tile)
    part_mean = scratch_rows(chunks, x.shape[1], 0.0)
    part_m2 = scratch_rows(chunks, x.shape[1], 0.0)
    for task in range(chunks * tiles):
        columns.part_moments(x, task, tiles, fold, tile, part_mean, part_m2)
    columns.merge_parts(x, fold, part_mean, part_m2, mean, m2)
    narrow = scratch_rows(3, x.shape[1], x.dtype.type(0))
    if not coefficients_serve(mean, variances(x, m2, 0), weight, bias, eps, narrow):
        return False
    write_columns(x, out, narrow)
    count[:] = x.shape[0] * x.shape[2]
    update(running_mean, running_var, mean, variances(x, m2, ddof), momentum)
    return True
