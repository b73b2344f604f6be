"""Device memory of this package's own, and the streams that kernels are launched on; host memory in the simulator."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from nbbn.cuda.jit import SIMULATED


def allocate(size: int) -> Any:
    """At least one byte, uninitialized, on the current device, at an address divisible by 256."""
    return _simulated(max(1, size)) if SIMULATED else cuda.device_array(max(1, size), np.uint8)


def zeros(count: int) -> Any:
    """As many int32 zeros."""
    if SIMULATED:
        memory = _simulated(4 * count)
        memory[:] = 0
        return memory
    return cuda.to_device(np.zeros(count, np.int32))


def address_of(memory: Any) -> int:
    return int(memory.ctypes.data if SIMULATED else memory.__cuda_array_interface__["data"][0])


def _simulated(size: int) -> Any:
    from nbbn.cuda.simulated import MEMORY

    return MEMORY.allocate(size)


def to_device(memory: Any, values: np.ndarray) -> None:
    """Copy values from host memory into the beginning of what `allocate` made."""
    source = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    target = memory[: source.size]
    if SIMULATED:
        target[:] = source
    else:
        target.copy_to_device(source)


def to_host(memory: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of the beginning of what `allocate` made, once all work on the device is done."""
    if not SIMULATED:
        cuda.synchronize()
        memory = memory.copy_to_host()
    count = int(np.prod(shape))
    return np.array(memory[: count * dtype.itemsize]).view(dtype).reshape(shape)


@lru_cache(256)
def queue_of(stream: int) -> Any:
    """The stream as numba.cuda launches on it."""
    return 0 if SIMULATED or not stream else cuda.external_stream(stream)


def synchronize(stream: int) -> None:
    """Wait until everything queued on the stream is done."""
    if SIMULATED:
        return
    if stream:
        queue_of(stream).synchronize()
    else:
        cuda.synchronize()


def number_of(device: int | None) -> int | None:
    """The device itself: where there are several, None is the one that is current now, and another one later."""
    return cuda.get_current_device().id if device is None and not is_only_one_device() else device


_HERE: AbstractContextManager[Any] = nullcontext()


def there(device: int | None) -> AbstractContextManager[Any]:
    """Work on that device within, where there are several."""
    if device is None or is_only_one_device() or device == cuda.get_current_device().id:
        return _HERE
    return cuda.gpus[device]


@lru_cache(1)
def is_only_one_device() -> bool:
    return SIMULATED or len(cuda.gpus) == 1
