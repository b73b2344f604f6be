"""Compiler options, and when what is compiled: in one place."""

import gc
import inspect
from contextlib import contextmanager
from functools import partial
from typing import Any

import numba
from numba import njit, types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from nbbn.cpu import saved, threads
from nbbn.cpu.inner import Inner, KernelCompiler, makes_arrays

#: Only the loops written as `prange`. Numba would also make parallel regions of `a[:] = 0` and `np.zeros` on
#: per-channel arrays; each costs microseconds, or a scheduler slice (8 ms seen) when another process has a core.
_PRANGE_ONLY = {
    "prange": True,
    "reduction": False,
    "inplace_binop": False,
    "setitem": False,
    "numpy": False,
    "stencil": False,
    "fusion": False,
    "comprehension": False,
}

# Counters start as np.int64(0): a literal 0 is a type of its own to Numba, and what it is passed to compiles again.


def formula(function):
    """Compile what only kernels call, strict IEEE; it becomes part of them."""
    return Inner(function)


class Kernel:
    """An entry point, compiled for the precisions it meets and for nothing else.

    Numba would compile anew for every mix of C-contiguous, strided and read-only arrays. Here all 3-d arrays are
    taken as "any layout" (rows of them are contiguous: `memory.run`) and those that are only read as read-only, so
    that one compiled kernel a precision serves them all.
    """

    def __init__(self, function, reads, parallel):
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._reads = [name in reads for name in inspect.signature(function).parameters]
        # a fresh dict each time: Numba takes the keys out
        self._compiled: Any = _without_compiler
        if config.DISABLE_JIT:
            return
        self._compiled = njit(
            nogil=True,
            error_model="numpy",
            no_cfunc_wrapper=True,
            parallel=dict(_PRANGE_ONLY) if parallel else False,
            pipeline_class=KernelCompiler,
            _nrt=parallel or makes_arrays(function),
        )(function)
        self._compiled._cache = saved.Cache(function, "parallel" if parallel else "serial")
        self._compiled._can_compile = False  # not by itself: see `_compile`

    def __call__(self, *args):
        """Run on `args`; compile first if this mix of precisions is new."""
        try:
            return self._compiled(*args)
        except TypeError:  # no kernel for these precisions yet
            self._compile(args)
        return self._compiled(*args)

    def _compile(self, args):
        """Add a kernel for the types of `args`, loaded or compiled, unless another thread just did.

        What Numba's own `compile` does, which would need `_can_compile`: then other threads, calling kernels that
        are there, would start to compile as well.
        """
        kernel = self._compiled
        signature = tuple(_type(a, reads) for a, reads in zip(args, self._reads, strict=True))
        with global_compiler_lock:
            if signature in kernel.overloads:
                return
            result = kernel._cache.load_overload(signature, kernel.targetctx)
            saved.tally["compiled" if result is None else "loaded"] += 1
            if result is None:
                with _without_collections():
                    result = kernel._compiler.compile(signature, None)
                kernel._cache.save_overload(signature, result)
            else:
                kernel._cache_hits[signature] += 1
                kernel.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
            kernel.add_overload(result)


@contextmanager
def _without_collections():
    """No search for garbage meanwhile: a compiler makes a million objects, and a tenth of its time would go there."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def _without_compiler(*args):
    raise RuntimeError(
        "nbbn's CPU kernels need Numba's compiler, which NUMBA_DISABLE_JIT turns off: unset it, or run on the "
        'reference, with nbbn.use_backend("numpy")'
    )


class KernelPair:
    """One kernel compiled twice from the same source: serial for little work, parallel for much.

    Its first parameter is the number of workers, its second an array of all values; it returns whether one of them
    was late (`sharing`).
    """

    def __init__(self, function, reads):
        self.__doc__ = function.__doc__
        self.serial = Kernel(function, reads, parallel=False)
        self.parallel = Kernel(function, reads, parallel=True)

    def __call__(self, workers, *args):
        """Run on `args`, on so many threads if it is safe to."""
        if workers == 1:
            self.serial(1, *args)
            return
        size = args[0].size
        with threads.turn() as free:
            if not free:
                self.serial(1, *args)
            elif threads.alone(size):
                with threads.single():
                    self.parallel(1, *args)
            else:
                threads.note(self.parallel(workers, *args), size)


def kernel(*, reads):
    """Compile an entry point: a loop over workers (`prange`), who share independent tasks, and what must follow it.

    `reads` names the arrays that are only read.
    """
    return partial(KernelPair, reads=reads)


def serial_kernel(*, reads):
    """Compile an entry point that never has enough to do for a second thread."""
    return partial(Kernel, reads=reads, parallel=False)


def _type(value, reads):
    kind = numba.typeof(value)
    if not isinstance(kind, types.Array):
        return kind
    return types.Array(kind.dtype, kind.ndim, "A" if kind.ndim == 3 else "C", readonly=reads)
