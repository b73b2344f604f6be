"""Threads, versions and what else a bug report needs."""

import platform
import sys
from importlib import metadata, util
from types import ModuleType

import llvmlite
import numba
import numpy as np
from llvmlite import binding

from nbbn import checks
from nbbn.backends import available_backends

#: The instruction sets that decide how fast the kernels are.
_FEATURES = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "neon", "sve")


def set_num_threads(n: int) -> None:
    """Use at most `n` threads in nbbn's kernels; results do not depend on it.

    Parameters
    ----------
    n : int
        From 1 to the number of threads Numba started with (``NUMBA_NUM_THREADS``, by default all cores).

    Raises
    ------
    ValueError
        If `n` is not an integer in that range.

    Notes
    -----
    Applies to nbbn only: Numba's own ``set_num_threads``, for kernels of yours, is left as it is.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.set_num_threads(1)
    >>> nbbn.get_num_threads()
    1
    """
    n = checks.whole_number("n", n, least=1)
    most = _threads().max_num_threads()
    if n > most:
        raise ValueError(f"n: expected at most {most} threads (NUMBA_NUM_THREADS), got {n}")
    _threads().set_num_threads(n)


def get_num_threads() -> int:
    """Threads that nbbn's kernels use at most.

    Returns
    -------
    int
        What `set_num_threads` set, else Numba's setting.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.get_num_threads() >= 1
    True
    """
    return int(_threads().get_num_threads())


def show_config() -> None:
    """Print versions, CPU features, threads, threading layer and GPU: what a bug report needs.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.show_config()  # doctest: +ELLIPSIS
    nbbn            ...
    """
    for name, value in describe().items():
        print(f"{name:<16}{value}")


def describe() -> dict[str, str]:
    """The lines of `show_config`."""
    llvm = ".".join(map(str, binding.llvm_version_info))
    return {
        "nbbn": _own_version(),
        "numba": f"{numba.__version__} (llvmlite {llvmlite.__version__}, LLVM {llvm})",
        "numpy": np.__version__,
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "cpu": f"{binding.get_host_cpu_name()}: {', '.join(_cpu_features()) or 'no vector extension known here'}",
        "threads": f"{get_num_threads()} of {_threads().max_num_threads()}",
        "threading layer": _threading_layer(),
        "backends": ", ".join(available_backends()),
        "gpu": _gpu(),
        "optional": ", ".join(_optional_versions()) or "none installed",
    }


def _own_version() -> str:
    try:
        return metadata.version("nbbn")
    except metadata.PackageNotFoundError:  # run from a source tree
        from nbbn import __version__

        return f"{__version__} (not installed)"


def _gpu() -> str:
    """The device, or what is missing for one; asking initializes the driver, where there is one."""
    from nbbn.cuda import requirements

    return requirements.describe()


def _threads() -> ModuleType:
    """The module; importing it imports all kernels, a third of what `import numba` takes, so not before it is used."""
    from nbbn.cpu import threads

    return threads


def _cpu_features() -> list[str]:
    host = binding.get_host_cpu_features()
    return [name for name in _FEATURES if host.get(name)]


def _threading_layer() -> str:
    try:
        return str(numba.threading_layer())
    except ValueError:  # decided at the first parallel call
        return f"not started (NUMBA_THREADING_LAYER={numba.config.THREADING_LAYER})"


def _optional_versions() -> list[str]:
    names = ("torch", "jax", "cupy", "dask", "scikit-learn", "matplotlib", "tbb", "numba-cuda")
    modules = {"scikit-learn": "sklearn", "numba-cuda": "numba_cuda"}
    present = (name for name in names if _is_installed(modules.get(name, name)))
    found = []
    for name in present:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} (version unknown)")
    return found


def _is_installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ValueError:  # imported, but in a way that left no trace of where from
        return True
