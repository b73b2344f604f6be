"""Launching: a kernel with its grid is configured once for each place, and then launched without Numba's help.

Numba looks at the type of every argument of every launch and packs it by itself: 25 integers take it as long as
everything else that a call of this package does. Where it is asked for (`NBBN_CUDA_CORE_LAUNCH=1`) and the releases are
those that this was written for, a kernel that Numba has compiled, loaded and launched once is launched after that by
cuda.core, as Numba would do it. Not by default: it has never run on a GPU.
"""

import os
import threading
import warnings
from importlib import import_module, metadata
from typing import Any, NamedTuple

from numba import cuda

from nbbn.cuda import memory
from nbbn.cuda.jit import SIMULATED

#: Releases of numba-cuda whose `launch` was read: it packs integers in 8 bytes, and calls cuda.core with nothing else.
KNOWN_RELEASES = ("0.30.",)


class Place(NamedTuple):
    """Where a call runs: device (None: the only one there is) and stream."""

    device: int | None
    stream: int


def place_of(library: Any, owner: Any, device: int | None) -> Place:
    """Where a call runs: on the device of its first array, on that array's stream."""
    return Place(memory.number_of(device), library.stream(owner, device))


def configured(kernel: Any, blocks: int, threads: int, stream: int) -> Any:
    """What launches a kernel when called with its arguments. Without Numba's advice on grids below 128 blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, memory.queue_of(stream)]


class Launch:
    """A kernel and its grid."""

    __slots__ = ("_ready", "blocks", "kernel", "threads")

    def __init__(self, kernel: Any, blocks: int, threads: int):
        self.kernel, self.blocks, self.threads = kernel, blocks, threads
        self._ready: dict[Place, Any] = {}

    def __call__(self, place: Place, *arguments: Any) -> None:
        """Launch with integers and floats, once the place's device is the current one."""
        ready = self._ready.get(place)
        with memory.there(place.device):
            if ready is None:
                self._first(place, arguments)
            else:
                ready(*arguments)

    def is_ready(self, place: Place) -> bool:
        """Whether it was launched there before."""
        return SIMULATED or place in self._ready

    def load(self, place: Place, *arguments: Any) -> None:
        """Compile for such arguments and load, if that was not done before; launch nothing."""
        with memory.there(place.device):
            self.kernel.compile(tuple(map(self.kernel.typeof_pyval, arguments)))

    def _first(self, place: Place, arguments: tuple[Any, ...]) -> None:
        by_numba = configured(self.kernel, self.blocks, self.threads, place.stream)
        by_numba(*arguments)
        self._ready[place] = direct(self.kernel, by_numba, self.blocks, self.threads) or by_numba


def direct(kernel: Any, by_numba: Any, blocks: int, threads: int) -> Any:
    """What launches a kernel that was launched here before; None where that is not known to work."""
    if SIMULATED or not _is_known():
        return None
    try:
        core: Any = import_module("cuda.core")
        configuration, launch = core.LaunchConfig, core.launch
        (compiled,) = kernel.overloads.values()
        loaded = compiled._codelibrary.get_cufunc().kernel
        stream = by_numba.stream
    except (ImportError, AttributeError, ValueError):
        return None
    grid = configuration(grid=blocks, block=threads)

    def run(*arguments: Any) -> None:
        if not getattr(_thread, "is_ready", False):
            cuda.current_context()  # makes it the current one of this thread
            _thread.is_ready = True
        launch(stream, grid, loaded, *arguments)

    return run


_thread = threading.local()


def _is_known() -> bool:
    if os.environ.get("NBBN_CUDA_CORE_LAUNCH") != "1":
        return False
    try:
        return metadata.version("numba-cuda").startswith(KNOWN_RELEASES)
    except metadata.PackageNotFoundError:  # found on the path, not installed
        return False
