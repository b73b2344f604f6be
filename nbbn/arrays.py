"""What kind of array is this, on which device, and how to make one like it? Nothing optional is imported here.

NumPy arrays are what they are; arrays of PyTorch and JAX in host memory become NumPy arrays over the same memory;
arrays on a CUDA device become `nbbn.cuda.device.DeviceArray`: their geometry and address.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

#: A NumPy array, or a `DeviceArray`, which answers the same questions about shape, strides, dtype and flags.
Array = npt.NDArray[Any]

#: What statistics, parameters and running arrays are kept in.
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

#: First parts of the names of modules that JAX's arrays are from.
_JAX = frozenset({"jax", "jaxlib"})

# comparing dtypes takes three times as long as comparing their characters
_FLOAT_CHARS = frozenset(dtype.char for dtype in FLOATS)
_INTEGER_CHARS = frozenset("?bBhHiIlLqQ")


def any_array(name: str, value: Any) -> Array:
    """`value`, wherever it is, if it is an array that can be computed with, else an error that says what to do."""
    if type(value) is np.ndarray and value.dtype.isnative:  # nearly always
        return value
    if on_device(value):
        return value  # type: ignore[no-any-return]
    if has_cuda_memory(value):
        try:
            view = _device_view()
        except RuntimeError as error:
            raise RuntimeError(f"{name}: got {_kind(value)} on a CUDA device; {error}") from None
        return view(name, value)
    return numpy_array(name, value)


@cache
def _device_view() -> Callable[[str, Any], Array]:
    """What makes a view of an array on a device, or an error that says what is missing for that."""
    from nbbn import backends

    backends.cuda()
    from nbbn.cuda import device

    return device.view  # type: ignore[return-value]


def numpy_array(name: str, value: Any) -> Array:
    """`value` if it is, or can be seen without a copy as, a NumPy array; else `TypeError`."""
    if type(value) is np.ndarray and value.dtype.isnative:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected a plain array, got a masked array; pass numpy.ma.getdata({name}), and to batch_stats or "
            f"batch_norm where=~numpy.ma.getmaskarray({name})"
        )
    if isinstance(value, np.ndarray):
        array = np.ndarray.view(value, np.ndarray)  # whatever a subclass says of itself
        if not array.dtype.isnative:
            raise TypeError(
                f"{name}: expected native byte order, got dtype {array.dtype.str!r}; "
                f"pass {name}.astype({name}.dtype.newbyteorder('='))"
            )
        return array
    if on_device(value) or has_cuda_memory(value):
        kind = _kind(value.owner if on_device(value) else value)
        raise TypeError(f"{name}: expected an array in host memory, got {kind} on a CUDA device")
    library = _library(value)
    if library == "torch" and hasattr(value, "numpy"):
        return _torch_in_host_memory(name, value)
    if library in _JAX and hasattr(value, "__array__"):
        return np.asarray(value)  # read-only, over the same memory
    advice = f"; pass numpy.asarray({name})" if isinstance(value, list | tuple | int | float | np.generic) else ""
    raise TypeError(f"{name}: expected a NumPy array, got {_kind(value)}{advice}")


def _torch_in_host_memory(name: str, value: Any) -> Array:
    """A PyTorch tensor as a NumPy array over the same memory."""
    if value.requires_grad:
        raise TypeError(f"{name}: expected values, got a torch.Tensor that requires grad; pass {name}.detach()")
    if str(value.device) != "cpu":
        raise TypeError(f"{name}: expected a tensor on the CPU or a CUDA device, got one on {value.device}")
    if str(value.dtype) != "torch.bfloat16":
        return value.numpy()  # type: ignore[no-any-return]
    return value.view(sys.modules["torch"].uint16).numpy().view(_bfloat16(name))  # type: ignore[no-any-return]


def _bfloat16(name: str) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name}: expected float32, float64 or float16 of PyTorch on the CPU, got bfloat16, which needs ml_dtypes; "
            "pip install ml_dtypes"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def on_device(array: Any) -> bool:
    """Whether this is a view of memory on a CUDA device."""
    return hasattr(type(array), "shadow")  # asking the array itself can be slow


def geometry(array: Array) -> Array:
    """A NumPy array of that shape, strides and address, to compare memory with; never to be read."""
    return getattr(array, "shadow", array)


def empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """A new array in the memory that `like` is in."""
    return like.empty(shape, dtype) if on_device(like) else np.empty(shape, dtype)  # type: ignore[attr-defined]


def returned(computed: Array, out: Any, like: Any) -> Any:
    """What the caller gets: the `out` he brought, else `computed` as the kind of array that `like` is."""
    if out is not None:
        return out
    if on_device(computed):
        return computed.library.finished(computed.owner)  # type: ignore[attr-defined]
    if type(like) is np.ndarray:
        return computed
    library = _library(like)
    if library == "torch":
        torch = sys.modules["torch"]
        if computed.dtype.name == "bfloat16":
            return torch.from_numpy(computed.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(computed)
    if library in _JAX:
        return sys.modules["jax"].numpy.asarray(computed)
    return computed


def full(channels: int, value: float, dtype: np.dtype[Any], like: Any) -> Any:
    """A per-channel array of one value, of the kind that `like` is and on its device."""
    values = np.full(channels, value, dtype)
    if like is None:
        return values
    if _library(like) in _JAX:
        advice = "one of CuPy or PyTorch" if _jax_is_on_cuda(like) else "a NumPy array"
        raise TypeError(f"like: expected an array that can be updated in place, got a JAX array; pass {advice}")
    model = any_array("like", like)
    if on_device(model):
        array = model.empty((channels,), dtype)  # type: ignore[attr-defined]
        array.library.fill(array.owner, values)
        return array.owner
    return returned(values, None, like)


def copied(values: Any) -> Any:
    """A copy of a per-channel array, of its kind."""
    if type(values) is np.ndarray:
        return values.copy()
    array = any_array("array", values)
    if on_device(array):
        return array.contiguous().owner  # type: ignore[attr-defined]
    return returned(array.copy(), None, values)


def in_host_memory(values: Any) -> Array:
    """A per-channel array of any kind as a NumPy array; copied if it was on a device, which waits for it."""
    array = any_array("array", values)
    return array.to_host() if on_device(array) else array  # type: ignore[attr-defined]


def assign(target: Any, values: Array) -> None:
    """Store values from host memory in a per-channel array of any kind."""
    array = any_array("array", target)
    if on_device(array):
        array.library.fill(array.owner, np.ascontiguousarray(values, array.dtype))  # type: ignore[attr-defined]
    else:
        array[:] = values


def fill(array: Array, value: float) -> None:
    """Set every element of a per-channel array that is already viewed."""
    if on_device(array):
        array.library.fill(array.owner, np.full(array.shape, value, array.dtype))  # type: ignore[attr-defined]
    else:
        array[...] = value


def is_float(array: Array) -> bool:
    """Whether the array holds float32 or float64."""
    return array.dtype.char in _FLOAT_CHARS


def _kind(value: Any) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


_libraries: dict[type, str] = {}


def _library(value: Any) -> str:
    cls = type(value)
    found = _libraries.get(cls)
    if found is None:
        found = _libraries[cls] = cls.__module__.partition(".")[0]
    return found


def has_cuda_memory(value: Any) -> bool:
    """Whether this is a library's array on a CUDA device."""
    library = _library(value)
    if library == "cupy":  # asking for the interface makes it
        return hasattr(type(value), "__cuda_array_interface__")
    if library == "torch":  # its CPU tensors have the attribute too, and raise
        return bool(getattr(value, "is_cuda", False))
    if library in _JAX:  # its bfloat16 arrays have no such interface
        return _jax_is_on_cuda(value)
    try:
        return hasattr(value, "__cuda_array_interface__")
    except Exception:  # what an attribute raises is not what is wrong with the argument
        return False


def _jax_is_on_cuda(value: Any) -> bool:
    devices = getattr(value, "devices", None)
    try:
        return devices is not None and any(device.platform in {"gpu", "cuda"} for device in devices())
    except TypeError:  # a tracer, whose values are nowhere
        return False


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
