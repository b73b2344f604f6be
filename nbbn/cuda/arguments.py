"""Arguments of kernels: views and per-channel arrays as addresses, strides and flags."""

from typing import Any

from nbbn.cuda import formulas, launch
from nbbn.cuda.geometry import Geometry
from nbbn.cuda.launch import Layout, Plan, Rows
from nbbn.cuda.storage import WIDEST


def find_plan(views: tuple[tuple[Geometry, int], ...], device: launch.Device, reduces: bool) -> Plan:
    """The launch for canonical views of one shape: of each the geometry, and the address modulo 16."""
    return launch.plan(layout_of(views), device, reduces)


def layout_of(views: tuple[tuple[Geometry, int], ...]) -> Layout:
    """What plans need to know of canonical views of one shape."""
    outer, channel_count, inner = views[0][0].shape
    kinds = [whole.kind for whole, _ in views]
    most = min(min(kind.most_lanes for kind in kinds), WIDEST // max(kind.itemsize for kind in kinds))
    rows = channel_rows = most
    is_packed = True
    for (whole, offset), kind in zip(views, kinds, strict=True):
        row, channel, _ = whole.strides
        steps = (offset, row if outer > 1 else 0)
        rows = min(rows, launch.alignment(kind.itemsize, most, steps))
        all_steps = (*steps, channel if channel_count > 1 else 0)
        channel_rows = min(channel_rows, launch.alignment(kind.itemsize, most, all_steps))
        is_packed = is_packed and (channel_count == 1 or channel == inner * kind.itemsize)
    itemsize = max(kind.itemsize for kind in kinds)
    return Layout(outer, channel_count, inner, itemsize, rows, channel_rows, is_packed, len(views))


def shares_of(plan: Plan) -> int:
    """How many blocks share a channel."""
    return plan.parts if isinstance(plan, Rows) else plan.splits


def tile_of(plan: launch.Columns) -> tuple[int, ...]:
    return plan.channels, plan.across, plan.deep, plan.tiles, plan.splits


def steps_of(whole: Geometry) -> tuple[int, int]:
    """Steps along outer and channels, in values."""
    outer, channel, _ = whole.strides
    return outer // whole.itemsize, channel // whole.itemsize


_WIDE = {
    "mean": formulas.WIDE_MEAN,
    "var": formulas.WIDE_VAR,
    "weight": formulas.WIDE_WEIGHT,
    "bias": formulas.WIDE_BIAS,
}
_GIVEN = {"weight": formulas.HAS_WEIGHT, "bias": formulas.HAS_BIAS}


def flags_of(**arrays: Any) -> int:
    """Which of weight and bias there are, and which arrays are float64."""
    flags = 0
    for key, array in arrays.items():
        if array is not None:
            flags |= _GIVEN.get(key, 0) | (_WIDE[key] if array.dtype.char == "d" else 0)
    return flags


def gradient_flags(dtype: Any) -> int:
    """Whether parameter gradients are float64."""
    return formulas.WIDE_GRADIENT if dtype.char == "d" else 0


def packed(*arrays: Any) -> list[Any]:
    """The arrays, contiguous: what comes from a library may be a view with strides."""
    return [a if a is None or a.flags.c_contiguous else a.contiguous() for a in arrays]


def running_flags(update: Any) -> int:
    """Whether there are running arrays, whether they are float64, and what to do with batches that are not finite."""
    if update is None:
        return 0
    flags = formulas.HAS_RUNNING | flags_of(mean=update.running_mean, var=update.running_var)
    return flags | (formulas.SKIP_NONFINITE if update.skip_nonfinite else 0)


#: Addresses of running arrays that are not there, momentum, ddof.
NOT_RUNNING = (0, 0, 0.0, 0)


def running_of(update: Any) -> tuple[Any, ...]:
    """Addresses of the running arrays, which are contiguous, momentum and ddof."""
    if update is None:
        return NOT_RUNNING
    return update.running_mean.address, update.running_var.address, float(update.momentum), update.ddof
