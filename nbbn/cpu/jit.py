"""Compiler options and the cache of compiled kernels, in one place."""

import hashlib
import inspect
import os
import pickle
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit, types
from numba.core import caching, config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys

from nbbn.cpu import threads
from nbbn.cpu.inner import Inner, KernelCompiler

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

_PACKAGE = Path(__file__).resolve().parent.parent


# Counters start as np.int64(0): a literal 0 is a type of its own to Numba, and what it is passed to compiles again.


def formula(function):
    """Compile a scalar formula; it becomes part of the kernels that call it."""
    return Inner(function)


def elementwise(function):
    """Compile a loop in which every element stands alone: strict IEEE, the same bits wherever it runs."""
    return Inner(function)


#: What became of kernels in this process: how many were found compiled, compiled, and saved, and in which folders.
tally = {"loaded": 0, "compiled": 0, "saved": 0}
folders_used: set[Path] = set()


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
            parallel=dict(_PRANGE_ONLY) if parallel else False,
            pipeline_class=KernelCompiler,
        )(function)
        self._compiled._cache = _Cache(function, "parallel" if parallel else "serial")
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
            tally["compiled" if result is None else "loaded"] += 1
            if result is None:
                result = kernel._compiler.compile(signature, None)
                kernel._cache.save_overload(signature, result)
            else:
                kernel._cache_hits[signature] += 1
                kernel.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
            kernel.add_overload(result)


def _without_compiler(*args):
    raise RuntimeError(
        "nbbn's CPU kernels need Numba's compiler, which NUMBA_DISABLE_JIT turns off: unset it, or run on the "
        'reference, with nbbn.use_backend("numpy")'
    )


class KernelPair:
    """One kernel compiled twice from the same source: serial for little work, parallel for much."""

    def __init__(self, function, reads):
        self.__doc__ = function.__doc__
        self.serial = Kernel(function, reads, parallel=False)
        self.parallel = Kernel(function, reads, parallel=True)

    def __call__(self, parallel, *args):
        """Run on `args`, on several threads if `parallel` and if it is safe to."""
        if not parallel:
            return self.serial(*args)
        with threads.turn() as free:
            return (self.parallel if free else self.serial)(*args)


def kernel(*, reads):
    """Compile an entry point: a loop over independent tasks (`prange`) and what must follow it.

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


# Numba stamps a cached kernel with the file that holds it and with nothing else: an edited helper, another
# option, a debug build would run stale code. And its index file is shared by all writers, so that two
# processes starting at once can swap entries (numba issues 4807 and 10128). Here each entry is a file of its
# own, named by everything it depends on and replaced atomically.


@cache
def _stamp():
    """Digest of all that a compiled kernel depends on besides its signature and the processor."""
    digest = hashlib.sha256()
    for path in [_PACKAGE / "formulas.py", *sorted(_PACKAGE.glob("cpu/*.py"))]:  # all that kernels are made of
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    settings = (config.BOUNDSCHECK, config.OPT, config.DEBUGINFO_DEFAULT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE)
    digest.update(repr((numba.__version__, llvmlite.__version__, sys.version_info[:3], *settings)).encode())
    return digest.hexdigest()[:16]


@cache
def _folders():
    """Where compiled kernels may lie: all are looked into, the first that can be written to takes new ones."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    roots = (config.CACHE_DIR, str(_PACKAGE / "__pycache__"), user_cache)
    return [Path(root) / "nbbn-kernels" / _stamp() for root in roots if root]


class _Locator(caching._CacheLocator):
    def __init__(self, variant):
        self._variant = variant

    def ensure_cache_path(self):
        """Nothing to do: `_Entries.save` makes the folder."""

    def get_cache_path(self):
        return str(_folders()[0])

    def get_source_stamp(self):
        return _stamp()

    def get_disambiguator(self):
        return self._variant


class _Implementation(caching.CompileResultCacheImpl):
    def __init__(self, function, variant):
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(variant)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, "")

    def reduce(self, result):
        """What is saved of a kernel: all but environments of inlined functions that hold nothing.

        Loading one imports the module that its function is from: for `np.finfo`, that is half of SciPy.
        """
        *rest, environments = super().reduce(result)
        return (*rest, tuple(environment for environment in environments if environment.consts))


class _Entries:
    """One file an entry: a digest of what follows, then (key, data); its name holds the digest of the key."""

    def __init__(self, base):
        self._base = base

    def _name(self, key):
        return f"{self._base}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.nbc"

    def load(self, key):
        for folder in _folders():
            try:
                content = (folder / self._name(key)).read_bytes()
            except OSError:
                continue
            if hashlib.sha256(content[32:]).digest() != content[:32]:  # cut short, or a bit flipped
                continue
            stored, data = pickle.loads(content[32:])
            if stored == repr(key):
                folders_used.add(folder)
                return data
        return None

    def save(self, key, data):
        content = caching.dumps((repr(key), data))
        for folder in _folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / self._name(key), hashlib.sha256(content).digest() + content)
                folders_used.add(folder)
                tally["saved"] += 1
                return
            except OSError:  # not writable, or full: try the next; without any, every process compiles anew
                continue

    def flush(self):
        for folder in _folders():
            for path in folder.glob(f"{self._base}-*.nbc"):
                path.unlink(missing_ok=True)


def _write(path, content):
    """Write a file at once: others see all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # what root compiles into an image, its users may load
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


class _Cache(caching.FunctionCache):
    def __init__(self, function, variant):
        self._name = repr(function)
        self._py_func = function
        self._impl = _Implementation(function, variant)
        self._cache_path = self._impl.locator.get_cache_path()
        self._cache_file = _Entries(self._impl.filename_base)
        self.enable()

    def load_overload(self, sig, target_context):
        """Load a kernel, or None; what Numba does, but for 0.2 to 0.4 s of getting ready to compile before it.

        (It installs all functions that it knows, and imports SciPy's linear algebra where there is SciPy.) What a
        compiled kernel needs to run is the memory manager.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)
