"""Compiler options in one place, and the one import of `numba.cuda`.

Kernels take addresses and sizes as integers, nothing else: converting an array object costs a launch more than all the
integers together, and one compiled kernel serves every library's arrays.
"""

from numba import cuda
from numba.core import config

#: Whether kernels run in Numba's simulator (`NUMBA_ENABLE_CUDASIM=1`): plain Python on host memory.
SIMULATED = bool(config.ENABLE_CUDASIM)


#: So that the largest block, 512 threads, can always be launched. No kernel needs more (tests/registers.json).
MOST_REGISTERS = 128


def device(function):
    """Compile a function that kernels call; in the simulator it is what it is."""
    return function if SIMULATED else cuda.jit(device=True)(function)


def kernel(function):
    """Compile an entry point, at its first launch.

    No `fastmath`: it would flush denormals and take NaN and infinity for impossible.
    """
    return cuda.jit(function) if SIMULATED else cuda.jit(max_registers=MOST_REGISTERS)(function)
