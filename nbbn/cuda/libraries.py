"""Array libraries: how to look at their arrays on a device, and how to make new ones. None is imported here."""

import sys
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np

from nbbn.cuda.geometry import Geometry, geometry
from nbbn.cuda.jax_arrays import Jax
from nbbn.cuda.storage import BFLOAT16, packed


class Library(Protocol):
    """What is asked of an array library."""

    #: Whether its arrays need nothing before a kernel reads them, nor after it wrote them.
    is_plain: bool
    #: Whether its arrays can be pickled.
    pickles: bool

    def describe(self, name: str, value: Any) -> tuple[int, Geometry, int | None]:
        """Address, geometry, device number (None: unknown)."""

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int | None) -> Any:
        """A new array in C order."""

    def address(self, made: Any) -> int:
        """Where an array begins that `empty` made."""

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        """A view with the axes in another order."""

    def broadcast(self, value: Any, shape: tuple[int, ...]) -> Any:
        """A view of that shape."""

    def contiguous(self, value: Any) -> Any:
        """A copy in C order."""

    def assign(self, target: Any, source: Any) -> None:
        """Copy values, of the same library and number of elements, into an array of any strides."""

    def fill(self, target: Any, values: np.ndarray) -> None:
        """Copy values from host memory."""

    def to_host(self, value: Any) -> np.ndarray:
        """Copy values to host memory; waits for them."""

    def stream(self, value: Any, device: int | None) -> int:
        """The stream that the caller's work on this array is queued on."""

    def finished(self, value: Any) -> Any:
        """What the caller gets for an array that `empty` made, once all work on it is queued."""


_known: dict[type, Library] = {}


def library_of(value: Any) -> Library:
    """The library whose array this is; any other with a CUDA array interface is served by Numba's arrays."""
    found = _known.get(type(value))
    if found is None:
        found = _known[type(value)] = LIBRARIES.get(type(value).__module__.partition(".")[0], LIBRARIES["numba"])
    return found


def _interface(name: str, value: Any) -> tuple[int, Geometry]:
    """What every CUDA array says of itself."""
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: expected a plain array, got a masked one on a CUDA device")
    address, read_only = interface["data"]
    shape = tuple(interface["shape"])
    typestr = interface["typestr"]
    dtype: Any = BFLOAT16 if "bfloat16" in str(getattr(value, "dtype", "")) else np.dtype(typestr)
    if dtype is not BFLOAT16 and not dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {dtype.str!r}")
    strides = interface.get("strides") or packed(shape, dtype.itemsize)
    return int(address or 0), geometry(shape, tuple(strides), dtype, not read_only)


class _Own:
    """A library whose `empty` makes what callers get."""

    is_plain = True
    pickles = True

    def address(self, made: Any) -> int:
        return self.describe("", made)[0]  # type: ignore[attr-defined]

    def finished(self, value: Any) -> Any:
        return value


class _Numba(_Own):
    """numba.cuda's own arrays, and those of libraries not known here."""

    pickles = False

    def describe(self, name: str, value: Any) -> Any:
        return *_interface(name, value), None

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int | None) -> Any:
        from numba import cuda

        if dtype is BFLOAT16:
            raise TypeError("x: expected CuPy or PyTorch arrays for bfloat16: Numba's arrays cannot hold the result")
        return cuda.device_array(shape, dtype)

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        if order == tuple(range(len(order))):
            return value
        # its own `transpose` copies
        from numba.cuda.cudadrv.devicearray import DeviceNDArray

        whole = self._own(value)
        shape, strides = (tuple(sizes[a] for a in order) for sizes in (whole.shape, whole.strides))
        return DeviceNDArray(shape, strides, whole.dtype, gpu_data=whole.gpu_data)

    def _own(self, value: Any) -> Any:
        """Any library's array as one of Numba's, over the same memory."""
        from numba import cuda

        return value if hasattr(value, "gpu_data") else cuda.as_cuda_array(value, sync=False)

    def broadcast(self, value: Any, shape: tuple[int, ...]) -> Any:
        return self._refuse()

    def contiguous(self, value: Any) -> Any:
        from numba import cuda

        whole = self._own(value)
        if not whole.is_c_contiguous():
            self._refuse()
        copy = cuda.device_array(whole.shape, whole.dtype)
        copy.copy_to_device(whole)
        return copy

    def _refuse(self) -> Any:
        raise ValueError(
            "expected strides that kernels can read (a contiguous array, or slices of its first axes) of an array of "
            "this library, got others; pass a contiguous copy"
        )

    def assign(self, target: Any, source: Any) -> None:
        self._refuse()

    def fill(self, target: Any, values: np.ndarray) -> None:
        self._own(target).copy_to_device(values)

    def to_host(self, value: Any) -> np.ndarray:
        from numba import cuda

        cuda.synchronize()  # the value may have been computed on any stream
        return np.asarray(self._own(value).copy_to_host())

    def stream(self, value: Any, device: int | None) -> int:
        # the interface: 1 is the default stream, 2 that of this thread, which numba.cuda calls the same
        return int(value.__cuda_array_interface__.get("stream") or 0)


class _CuPy(_Own):
    def describe(self, name: str, value: Any) -> Any:
        memory, dtype = value.data, value.dtype
        if dtype.kind == "V" and dtype.name == "bfloat16":
            dtype = BFLOAT16
        return memory.ptr, geometry(value.shape, value.strides, dtype, True), value.device.id

    def address(self, made: Any) -> int:
        return made.data.ptr

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int | None) -> Any:
        cupy = sys.modules["cupy"]
        if dtype is BFLOAT16:
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        if device is None or device == cupy.cuda.runtime.getDevice():
            return cupy.empty(shape, dtype)
        with cupy.cuda.Device(device):
            return cupy.empty(shape, dtype)

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        return value.transpose(order)

    def broadcast(self, value: Any, shape: tuple[int, ...]) -> Any:
        return sys.modules["cupy"].broadcast_to(value, shape)

    def contiguous(self, value: Any) -> Any:
        return value.copy(order="C")

    def assign(self, target: Any, source: Any) -> None:
        target[...] = source.reshape(target.shape)

    def fill(self, target: Any, values: np.ndarray) -> None:
        target.set(values)

    def to_host(self, value: Any) -> np.ndarray:
        return np.asarray(value.get())

    def stream(self, value: Any, device: int | None) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)


class _Torch(_Own):
    def describe(self, name: str, value: Any) -> Any:
        if value.requires_grad:
            raise TypeError(f"{name}: expected values, got a torch.Tensor that requires grad; pass {name}.detach()")
        if value.layout is not _torch().strided or value.is_neg():
            raise TypeError(f"{name}: expected a plain strided tensor, got layout {value.layout}")
        return value.data_ptr(), _of_tensor(value.shape, value.stride(), value.dtype), value.get_device()

    def address(self, made: Any) -> int:
        return made.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int | None) -> Any:
        return _torch().empty(shape, dtype=_dtype_of_torch(dtype), device=_device_of_torch(device or 0))

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        return value.permute(order)

    def broadcast(self, value: Any, shape: tuple[int, ...]) -> Any:
        return value.expand(shape)

    def contiguous(self, value: Any) -> Any:
        return value.contiguous().clone() if value.is_contiguous() else value.contiguous()

    def assign(self, target: Any, source: Any) -> None:
        target.copy_(source.view(target.shape))

    def fill(self, target: Any, values: np.ndarray) -> None:
        target.copy_(sys.modules["torch"].from_numpy(values))

    def to_host(self, value: Any) -> np.ndarray:
        return np.asarray(value.cpu().numpy())

    def stream(self, value: Any, device: int | None) -> int:
        return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)


@cache
def _torch() -> Any:
    return sys.modules["torch"]


@cache
def _dtype_of_torch(dtype: Any) -> Any:
    return getattr(_torch(), dtype.name)


@cache
def _device_of_torch(device: int) -> Any:
    return _torch().device("cuda", device)


@lru_cache(4096)
def _of_tensor(shape: Any, steps: tuple[int, ...], dtype: Any) -> Geometry:
    """The geometry of a tensor: strides in values."""
    name = str(dtype).rpartition(".")[2]
    stored: Any = BFLOAT16 if name == "bfloat16" else np.dtype({"half": "float16"}.get(name, name))
    return geometry(tuple(shape), tuple(step * stored.itemsize for step in steps), stored, True)


#: By the first part of the name of the module that an array's type is from.
LIBRARIES: dict[str, Library] = {"numba": _Numba(), "cupy": _CuPy(), "torch": _Torch()}
# memory of this package belongs to JAX's side: only that needs any
LIBRARIES["jax"] = LIBRARIES["jaxlib"] = LIBRARIES["nbbn"] = Jax()
