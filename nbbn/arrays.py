"""What kind of array is this? Optional libraries are recognised without importing them."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: What statistics, parameters and running arrays are kept in.
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# comparing dtypes takes three times as long as comparing their characters
_FLOAT_CHARS = frozenset(dtype.char for dtype in FLOATS)
_INTEGER_CHARS = frozenset("?bBhHiIlLqQ")


def numpy_array(name: str, value: Any) -> Array:
    """`value` if it is a NumPy array that can be computed with, else an error that says what to do.

    `TypeError`, but `RuntimeError` for an array on a CUDA device: the array is fine, what it needs is missing.
    """
    if type(value) is np.ndarray and value.dtype.isnative:  # nearly always
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked array; pass {name}.data and where=~{name}.mask")
    if isinstance(value, np.ndarray):
        array = np.ndarray.view(value, np.ndarray)  # whatever a subclass says of itself
        if not array.dtype.isnative:
            raise TypeError(
                f"{name}: expected native byte order, got dtype {array.dtype.str!r}; "
                f"pass {name}.astype({name}.dtype.newbyteorder('='))"
            )
        return array
    if _on_cuda_device(value):
        raise RuntimeError(
            f"{name}: expected an array in host memory, got {_kind(value)} on a CUDA device; this version of nbbn "
            f"has no CUDA kernels and transfers nothing by itself: pass {name}.{_TO_HOST.get(_library(value), 'get()')}"
        )
    raise TypeError(f"{name}: expected a NumPy array, got {_kind(value)}{_advice(name, value)}")


def is_float(array: Array) -> bool:
    """Whether the array holds float32 or float64."""
    return array.dtype.char in _FLOAT_CHARS


def _kind(value: Any) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


_TO_HOST = {"torch": "cpu().numpy()", "cupy": "get()", "numba": "copy_to_host()"}


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _on_cuda_device(value: Any) -> bool:
    if _library(value) == "torch":  # its CPU tensors have the attribute too, and raise
        return bool(getattr(value, "is_cuda", False))
    try:
        return hasattr(value, "__cuda_array_interface__")
    except Exception:  # what an attribute raises is not what is wrong with the argument
        return False


def _advice(name: str, value: Any) -> str:
    module = _library(value)
    if module == "torch":
        if getattr(value, "requires_grad", False):
            return f" that requires grad; this version takes {name}.detach().cpu().numpy()"
        return f"; this version takes {name}.cpu().numpy()"
    if module in {"jax", "jaxlib"}:
        return f"; this version takes numpy.asarray({name})"
    if isinstance(value, list | tuple | int | float | np.generic):
        return f"; pass numpy.asarray({name})"
    return ""


def is_data_float(dtype: np.dtype[Any]) -> bool:
    """Whether this is a dtype of floating data: float32, float64, float16, or bfloat16 (of any library)."""
    return dtype.char in _FLOAT_CHARS or dtype.char == "e" or dtype.name == "bfloat16"


def is_data_integer(dtype: np.dtype[Any]) -> bool:
    """Whether this is bool or an integer dtype."""
    return dtype.char in _INTEGER_CHARS


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of what is computed from data of `dtype`, unless the caller brings an array for it."""
    return FLOATS[0] if is_data_integer(dtype) else dtype


def parameter_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of sums over a channel that go with data of `dtype`: sums of many halves would overflow a half."""
    return dtype if dtype.char in _FLOAT_CHARS else FLOATS[0]
