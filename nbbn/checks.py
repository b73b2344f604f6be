"""Argument checks. Every message names the argument, the value received and what was expected."""

import math
import operator
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from numpy.exceptions import AxisError

from nbbn.arrays import FLOATS, Array, any_array, geometry, is_data_float, is_data_integer, is_float, on_device

#: The default of every `momentum` parameter. An object of its own, so that `momentum=` given beside `decay=`
#: is noticed even when it is 0.1.
DEFAULT_MOMENTUM = float("0.1")

Activation = Literal["relu"] | None
NonFinite = Literal["propagate", "skip", "raise"]

NONFINITE = ("propagate", "skip", "raise")
ACTIVATIONS = (None, "relu")


def data(name: str, value: Any) -> Array:
    """An array of values: floating, integer or bool."""
    array = any_array(name, value)
    if not (is_data_float(array.dtype) or is_data_integer(array.dtype)):
        raise TypeError(f"{name}: expected float32, float64, float16, bfloat16, integers or bool, got {array.dtype}")
    return array


def float_data(name: str, value: Any, purpose: str) -> Array:
    """An array of floating values."""
    array = data(name, value)
    if not is_data_float(array.dtype):
        raise TypeError(
            f"{name}: expected float32, float64, float16 or bfloat16 {purpose}, got {array.dtype}; "
            f"pass {name}.astype(numpy.float32)"
        )
    return array


def channel_axis(x: Array, axis: Any) -> int | None:
    """The channel axis as a non-negative number; None means that the whole array is one channel."""
    if axis is None:
        if x.ndim < 1:
            raise ValueError("x: expected at least 1 dimension with axis=None, got 0")
        return None
    number = integer("axis", axis)
    if x.ndim < 2:
        raise ValueError(
            f"x: expected at least 2 dimensions, a channel axis and a batch axis, got shape {x.shape}; "
            "axis=None treats the whole array as one channel"
        )
    if not -x.ndim <= number < x.ndim:
        raise AxisError(f"axis: expected -{x.ndim} <= axis < {x.ndim} for x of shape {x.shape}, got {number}")
    return number % x.ndim


def channels_of(x: Array, axis: int | None) -> int:
    return 1 if axis is None else int(x.shape[axis])


def floats(name: str, value: Any) -> Array:
    """A float32 or float64 array of any shape."""
    array = any_array(name, value)
    if not is_float(array):
        raise TypeError(f"{name}: expected dtype float32 or float64, got {array.dtype}")
    return array


def per_channel(name: str, value: Any, channels: int) -> Array:
    """A 1-d float array with one value per channel."""
    array = floats(name, value)
    if array.shape != (channels,):
        got = f"{array.size} values" if array.ndim == 1 else f"shape {array.shape}"
        raise ValueError(f"{name}: expected {channels} values, one per channel (shape ({channels},)), got {got}")
    return array


def vector(name: str, value: Any) -> Array:
    """A 1-d float array: its length is the number of channels."""
    array = floats(name, value)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, one value per channel, got shape {array.shape}")
    return array


def optional_per_channel(name: str, value: Any, channels: int) -> Array | None:
    return None if value is None else per_channel(name, value, channels)


def running(name: str, value: Any, channels: int) -> Array:
    """A per-channel array that will be written."""
    array = per_channel(name, value, channels)
    if not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array (it is updated in place), got a read-only one")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous array (it is updated in place), got strides {array.strides}")
    if not array.flags.aligned:
        raise ValueError(f"{name}: expected an aligned array (it is updated in place), got a misaligned one")
    return array


def running_pair(running_mean: Any, running_var: Any, channels: int) -> tuple[Array, Array] | None:
    """Both running arrays, or None if neither is given."""
    if running_mean is None and running_var is None:
        return None
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            raise ValueError(f"{name}: expected both running arrays or neither, got None beside the other one")
    mean, var = running("running_mean", running_mean, channels), running("running_var", running_var, channels)
    disjoint("running_var", var, running_mean=mean)
    return mean, var


def disjoint(name: str, written: Array, **others: Array | None) -> None:
    """`written` shares no memory with the others."""
    for other_name, other in others.items():
        if other is None:
            continue
        first, second = geometry(written), geometry(other)
        if np.may_share_memory(first, second) and _overlaps(first, second):
            raise ValueError(f"{name}: expected memory of its own, got memory that overlaps {other_name}")


def output(out: Any, x: Array, **read: Array | None) -> Array | None:
    """`out` fits `x` and overlaps nothing that is read, except exactly `x` itself."""
    if out is None:
        return None
    array = any_array("out", out)
    if not is_data_float(array.dtype):
        raise TypeError(f"out: expected dtype float32, float64, float16 or bfloat16, got {array.dtype}")
    same_shape("out", array, x)
    if not array.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    same_place(x, out=array)
    if not _every_element_has_its_own_memory(geometry(array)):
        raise ValueError(
            f"out: expected one element of memory per value, got strides {array.strides} for {array.shape}"
        )
    for name, other in (("x", x), *read.items()):
        if other is None:
            continue
        first, second = geometry(array), geometry(other)
        if not np.may_share_memory(first, second):
            continue
        if not (name in IN_PLACE and _is_exactly(first, second)) and _overlaps(first, second):
            allowed = " or ".join(sorted({"x", *(IN_PLACE & read.keys())}))
            raise ValueError(f"out: expected {allowed} itself or memory of its own, got memory that overlaps {name}")
    return array


#: Inputs that `out` may be: every element of theirs is read before it is written.
IN_PLACE = frozenset({"x", "grad_out"})


def same_place(x: Array, **others: Array | None) -> None:
    """All on the device of `x`, or all in host memory: nothing is transferred silently."""
    for name, other in others.items():
        if other is None or (type(other) is np.ndarray and type(x) is np.ndarray):
            continue
        expected, got = _place(x), _place(other)
        if expected != got:
            raise TypeError(f"{name}: expected an array {expected}, as x is, got one {got}")


def _place(array: Array) -> str:
    if not on_device(array):
        return "in host memory"
    number = array.device  # None: a library that does not say, so the current one
    return f"on CUDA device {number or 0}"


def same_shape(name: str, array: Array, x: Array) -> None:
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {array.shape}")


def residual_like(residual: Any, x: Array) -> Array | None:
    if residual is None:
        return None
    array = data("residual", residual)
    same_shape("residual", array, x)
    return array


def mask(where: Any, x: Array) -> Array | None:
    """A boolean array that broadcasts to `x`."""
    if where is None:
        return None
    array = any_array("where", where)
    if array.dtype != np.bool_:
        raise TypeError(f"where: expected dtype bool, got {array.dtype}")
    # not np.broadcast_shapes, which ends at 32 dimensions where arrays have up to 64
    pairs = zip(array.shape[::-1], x.shape[::-1], strict=False)
    if array.ndim > x.ndim or not all(m in (1, n) for m, n in pairs):
        raise ValueError(f"where: expected a shape that broadcasts to that of x, {x.shape}, got {array.shape}")
    return array


def activation(value: Any) -> bool:
    """Whether to apply ReLU."""
    if value is not None and not (isinstance(value, str) and value == "relu"):
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {value!r}")
    return value is not None


def epsilon(value: Any) -> float:
    number = _real("eps", value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {value!r}")
    return number


def at_least(name: str, value: Any, least: float) -> float:
    number = _real(name, value)
    if not least <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= {least:g}, got {value!r}")
    return number


def momentum(value: Any, decay: Any) -> float:
    """The weight of the new batch, from whichever of the two names was used."""
    if decay is None:
        return _fraction("momentum", value)
    if value is not DEFAULT_MOMENTUM:
        raise ValueError(f"momentum, decay: expected one of them (decay = 1 - momentum), got {value!r} and {decay!r}")
    return 1.0 - _fraction("decay", decay)


def steps(value: Any, channels: int) -> npt.NDArray[np.int64]:
    """Numbers of updates, counted from 1: one for all channels or one for each."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = min(value, np.iinfo(np.int64).max)
    array = np.asarray(value)
    if isinstance(value, bool | list | tuple) or array.dtype.kind not in "iu":
        raise TypeError(f"step: expected an integer or an array of integers, got {value!r}")
    if array.shape not in ((), (channels,)):
        raise ValueError(f"step: expected one integer or {channels}, one per channel, got shape {array.shape}")
    if array.size and array.min() < 1:
        raise ValueError(f"step: expected integers >= 1 (the first update is number 1), got {array.min()}")
    most = np.uint64(2**63 - 1)  # as good as for ever
    numbers: npt.NDArray[np.int64] = np.minimum(array.astype(np.uint64), most).astype(np.int64)
    return numbers


def delta_degrees_of_freedom(value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value not in (0, 1):
        raise ValueError(f"ddof: expected 0 (population variance) or 1 (sample variance), got {value!r}")
    return int(value)


def nonfinite(value: Any) -> NonFinite:
    if not isinstance(value, str) or value not in NONFINITE:
        raise ValueError(f"nonfinite: expected one of {NONFINITE}, got {value!r}")
    return cast(NonFinite, value)


def whole_number(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def more_than_one_value(x: Array, channels: int) -> None:
    """Training needs a spread: the variance of one value is 0 and every output would be `bias`."""
    if x.size == channels:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input shape {x.shape}; "
            "use evaluation mode (running statistics) for single samples"
        )


def selected_values(count: Array) -> None:
    """The same for what a mask leaves."""
    if (count < 2).any():
        c = int(np.argmax(count < 2))
        raise ValueError(
            f"where: expected more than 1 value per channel when training, got {count[c]} selected in channel {c}"
        )


def enough_values(count: Array, ddof: int) -> None:
    """A channel with values must have a variance; one without any is left alone."""
    too_few = (count > 0) & (count <= ddof)
    if too_few.any():
        c = int(np.argmax(too_few))
        raise ValueError(
            f"stats: expected more than {ddof} value(s) per channel with ddof={ddof}, got {count[c]} in channel {c}"
        )


def _fraction(name: str, value: Any) -> float:
    number = _real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return number


def _real(name: str, value: Any) -> float:
    unsuitable = isinstance(value, bool | np.bool_ | str | bytes | complex | np.complexfloating)
    if unsuitable or (isinstance(value, np.ndarray) and (value.ndim or value.dtype.kind not in "fiu")):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def _is_exactly(a: Array, b: Array) -> bool:
    if a is b:
        return True
    if a.ctypes.data != b.ctypes.data or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(s == t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)


def _every_element_has_its_own_memory(array: Array) -> bool:
    """Whether each axis steps over all that the axes inside it reach (true of all but stride tricks)."""
    if array.flags.c_contiguous or not array.size:
        return True
    reach = array.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += stride * (n - 1)
    return True


def _overlaps(a: Array, b: Array) -> bool:
    """Whether two arrays whose address ranges meet have an element in common."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def not_requiring_grad(name: str, value: Any) -> None:
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(f"{name}: expected values, got a tensor that requires grad; pass {name}.detach()")


def optional_momentum(value: Any, decay: Any) -> float | None:
    """As `momentum`, and None for the cumulative average."""
    return None if value is None and decay is None else momentum(value, decay)


def optional_integer(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value)


def integer(name: str, value: Any) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name}: expected an integer or None, got {value!r}")


def number_of_channels(x: Array, axis: int | None, channels: int) -> None:
    got = channels_of(x, axis)
    if got != channels:
        raise ValueError(f"x: expected {channels} channels along axis {axis}, got {got} (shape {x.shape})")


def parameter_dtype(value: Any) -> np.dtype[Any]:
    """The precision of parameters: float32 or float64."""
    try:
        dtype: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in FLOATS:  # None would equal float64, NumPy's default
        raise TypeError(f"dtype: expected float32 or float64, got {value!r}")
    return dtype


def batches(name: str, value: Any, expected: str, advice: str) -> None:
    """Something to iterate over, and not one array: its first axis would be taken for the batches."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__iter__"):
        raise TypeError(
            f"{name}: expected an iterable of {expected}, got {type(value).__name__}; for one array pass {advice}"
        )


def level(name: str, value: Any) -> float:
    """A probability that is neither 0 nor 1."""
    number = _real(name, value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """A number > 0, infinity included."""
    number = _real(name, value)
    if not number > 0.0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def effective_count(value: Any, count: Array) -> Array:
    """How many independent values there are among `count`, as float64; one number stands for all channels."""
    if value is None:
        return count.astype(np.float64)
    array = np.asarray(value)
    if isinstance(value, bool | list | tuple) or array.dtype.kind not in "fiu":
        raise TypeError(f"effective_count: expected a number or an array of numbers, got {value!r}")
    if array.shape not in ((), count.shape):
        raise ValueError(f"effective_count: expected one number or {count.size}, one per channel, got {array.shape}")
    each = np.broadcast_to(array, count.shape).astype(np.float64)
    most = count if array.ndim else count.max(initial=0)  # one number need not fit the channel with the fewest
    if not ((each >= 0) & (each <= most)).all():
        raise ValueError(f"effective_count: expected numbers from 0 to the count of values, {count}, got {value!r}")
    return np.minimum(each, count)


# --- all arguments of a call, in the order in which errors are raised -------------------------------------------------


def of_normalize(
    x: Array, channels: int, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, residual: Any, activated: Any,
    out: Any,
) -> tuple[Array, Array, Array | None, Array | None, float, Array | None, bool, Array | None]:  # fmt: skip
    """Those of `normalize` after `x` and `axis`: in the same order, the activation as whether there is one."""
    mean, var = per_channel("mean", mean, channels), per_channel("var", var, channels)
    weight, bias = optional_per_channel("weight", weight, channels), optional_per_channel("bias", bias, channels)
    eps = epsilon(eps)
    residual = residual_like(residual, x)
    relu = activation(activated)
    same_place(x, mean=mean, var=var, weight=weight, bias=bias, residual=residual)
    out = output(out, x, residual=residual, mean=mean, var=var, weight=weight, bias=bias)
    return mean, var, weight, bias, eps, residual, relu, out


def written_in_training(
    x: Array, channels: int, running_mean: Any, running_var: Any, out: Any, weight: Array | None, bias: Array | None,
    residual: Array | None, where: Array | None,
) -> tuple[tuple[Array, Array] | None, Array | None]:  # fmt: skip
    """The running arrays and `out`, which share memory with nothing else; `out` may be `x`."""
    pair = running_pair(running_mean, running_var, channels)
    out = output(out, x, residual=residual, weight=weight, bias=bias, where=where)
    if pair is not None:
        same_place(x, running_mean=pair[0], running_var=pair[1])
        for name, written in zip(("running_mean", "running_var"), pair, strict=True):
            disjoint(name, written, x=x, weight=weight, bias=bias, residual=residual, where=where, out=out)
    return pair, out


def of_backward(
    x: Array, channels: int, grad_out: Any, mean: Any, var: Any, weight: Any, eps: Any, training: Any, out: Any
) -> tuple[Array, Array, Array, Array | None, float, bool, Array | None]:
    """Those of `batch_norm_backward` after `x` and `axis`, in the order of the parameters here."""
    grad_out = float_data("grad_out", grad_out, "in backward")
    same_shape("grad_out", grad_out, x)
    mean, var = per_channel("mean", mean, channels), per_channel("var", var, channels)
    weight = optional_per_channel("weight", weight, channels)
    eps = epsilon(eps)
    training = flag("training", training)
    same_place(x, grad_out=grad_out, mean=mean, var=var, weight=weight)
    out = output(out, x, grad_out=grad_out, mean=mean, var=var, weight=weight)
    return grad_out, mean, var, weight, eps, training, out
