"""Arguments of kernels: views and per-channel arrays as addresses, strides and flags."""

from functools import lru_cache
from typing import Any

from nbbn.cuda import formulas, launch
from nbbn.cuda.launch import Layout, Rows
from nbbn.cuda.storage import WIDEST


@lru_cache(4096)
def find_plan(shape, places, multiprocessors, reduces):
    """The launch for views of one shape; `places`: of each the address modulo 16, both strides and the kind."""
    outer, channel_count, inner = shape
    kinds = [kind for _, _, _, kind in places]
    most = min(min(kind.most_lanes for kind in kinds), WIDEST // max(kind.itemsize for kind in kinds))
    rows = channel_rows = most
    packed = True
    for offset, row, channel, kind in places:
        steps = (offset, row if outer > 1 else 0)
        rows = min(rows, launch.alignment(kind.itemsize, most, steps))
        all_steps = (*steps, channel if channel_count > 1 else 0)
        channel_rows = min(channel_rows, launch.alignment(kind.itemsize, most, all_steps))
        packed = packed and (channel_count == 1 or channel == inner * kind.itemsize)
    itemsize = max(kind.itemsize for kind in kinds)
    layout = Layout(outer, channel_count, inner, itemsize, rows, channel_rows, packed)
    return launch.plan(layout, launch.Device(multiprocessors), reduces)


def places_of(*arrays):
    """Address and both strides of every array."""
    return tuple(p for array in arrays for p in (array.address, *strides_of(array)))


def row_places_of(*arrays):
    """Address and stride along outer of every array, whose rows are packed."""
    return tuple(p for array in arrays for p in (array.address, strides_of(array)[0]))


def shares_of(plan):
    """How many blocks share a channel."""
    return plan.parts if isinstance(plan, Rows) else plan.splits


def tile_of(plan):
    return plan.channels, plan.across, plan.deep, plan.tiles, plan.splits


def strides_of(array):
    """Steps along outer and channels, in values."""
    itemsize = array.kind.itemsize
    outer, channel, _ = array.strides
    return outer // itemsize, channel // itemsize


_WIDE = {
    "mean": formulas.WIDE_MEAN,
    "var": formulas.WIDE_VAR,
    "weight": formulas.WIDE_WEIGHT,
    "bias": formulas.WIDE_BIAS,
}


def parameters_of(**arrays) -> Any:
    """The arrays, contiguous, and the flags that say which are float64."""
    flags = 0
    for key, array in arrays.items():
        if array is not None and array.dtype.char == "d":
            flags |= _WIDE[key]
    packed = (a if a is None or a.flags.c_contiguous else a.contiguous() for a in arrays.values())
    return tuple(packed), flags


def running_of(update) -> Any:
    """Addresses of the running arrays, momentum, ddof, and flags."""
    if update is None:
        return (0, 0, 0.0, 0), 0
    (running_mean, running_var), flags = parameters_of(mean=update.running_mean, var=update.running_var)
    flags |= formulas.HAS_RUNNING | (formulas.SKIP_NONFINITE if update.skip_nonfinite else 0)
    return (running_mean.address, running_var.address, float(update.momentum), update.ddof), flags
