"""What the CUDA backend needs of this machine, and how to get it."""

from importlib import util

from numba.core import config

INSTALL = "pip install 'nbbn[cuda]' for CUDA 13, 'nbbn[cuda12]' for CUDA 12"


def missing() -> str | None:
    """What is missing to run CUDA kernels here, as a sentence; None if nothing is."""
    if config.ENABLE_CUDASIM:
        return None
    if util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed ({INSTALL})"
    from numba import cuda

    if getattr(cuda, "implementation", None) != "NVIDIA":
        return f"numba.cuda is Numba's deprecated one, numba-cuda was not found by it; reinstall it ({INSTALL})"
    if not cuda.is_available():
        error = cuda.cuda_error() if hasattr(cuda, "cuda_error") else None
        said = f"; numba-cuda says: {' '.join(str(error).split())}" if error else ""
        return (
            "no usable CUDA driver was found: install NVIDIA's driver (nvidia-smi must list a GPU), and in a container "
            f"run it with --gpus all; libraries: {INSTALL}{said}"
        )
    return None


def check() -> None:
    """Raise `RuntimeError` if something is missing."""
    sentence = missing()
    if sentence is not None:
        raise RuntimeError(f"CUDA: {sentence}")


def describe() -> str:
    """The current device in one line, or what is missing."""
    sentence = missing()
    if sentence is not None:
        return f"not usable: {sentence}"
    if config.ENABLE_CUDASIM:
        return "Numba's simulator"
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    major, minor = device.compute_capability
    return (
        f"{name}, sm_{major}{minor}, {device.MULTIPROCESSOR_COUNT} multiprocessors, {device.L2_CACHE_SIZE >> 20} MB L2"
    )
