"""Compiler options and the cache of compiled kernels, in one place."""

import hashlib
import inspect
import os
import pickle
import tempfile
import threading
from functools import cache, partial
from pathlib import Path

import numba
from numba import njit, types
from numba.core import caching, config

#: What a sum may do that strict IEEE order forbids; NaN and Inf keep their meaning (no "nnan", "ninf").
_REASSOCIATE = {"reassoc", "contract", "arcp", "nsz"}
#: Functions that only other compiled functions call: no way in from Python or C, a fifth less to compile.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

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
    return njit(nogil=True, error_model="numpy", **_INNER)(function)


def elementwise(function):
    """Compile a loop in which every element stands alone: strict IEEE, the same bits wherever it runs."""
    return njit(nogil=True, error_model="numpy", **_INNER)(function)


def reduction(function):
    """Compile a loop that sums: the compiler may reorder the sum, in one fixed way per length."""
    return njit(nogil=True, error_model="numpy", fastmath=_REASSOCIATE, **_INNER)(function)


class Kernel:
    """An entry point, compiled for the precisions it meets and for nothing else.

    Numba would compile anew for every mix of C-contiguous, strided and read-only arrays. Here all 3-d arrays are
    taken as "any layout" (rows of them are contiguous: `simd.run`) and those that are only read as read-only, so
    that one compiled kernel a precision serves them all.
    """

    def __init__(self, function, reads, parallel):
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._reads = [name in reads for name in inspect.signature(function).parameters]
        # a fresh dict each time: Numba takes the keys out
        self._compiled = njit(nogil=True, error_model="numpy", parallel=dict(_PRANGE_ONLY) if parallel else False)(
            function
        )
        if _cache_root() is not None:  # else there is no place to write: compile anew in every process
            self._compiled._cache = _Cache(function, "parallel" if parallel else "serial")
        self._compiled._can_compile = False  # not by itself: see `_compile`

    def __call__(self, *args):
        """Run on `args`; compile first if this mix of precisions is new."""
        try:
            return self._compiled(*args)
        except (TypeError, RuntimeError):  # no kernel for these precisions yet, or another thread is compiling one
            self._compile(args)
        return self._compiled(*args)

    def _compile(self, args):
        """Compile for the types of `args`, unless another thread just did."""
        signature = tuple(_type(a, reads) for a, reads in zip(args, self._reads, strict=True))
        with _compiling:
            if signature in self._compiled.overloads:
                return
            self._compiled.disable_compile(False)
            try:
                self._compiled.compile(signature)
            finally:
                self._compiled._can_compile = False


class KernelPair:
    """One kernel compiled twice from the same source: serial for little work, parallel for much."""

    def __init__(self, function, reads):
        self.__doc__ = function.__doc__
        self.serial = Kernel(function, reads, parallel=False)
        self.parallel = Kernel(function, reads, parallel=True)

    def __call__(self, parallel, *args):
        """Run on `args`, on several threads if `parallel`."""
        return (self.parallel if parallel else self.serial)(*args)


def kernel(*, reads):
    """Compile an entry point: a loop over independent tasks (`prange`) and what must follow it.

    `reads` names the arrays that are only read.
    """
    return partial(KernelPair, reads=reads)


def serial_kernel(*, reads):
    """Compile an entry point that never has enough to do for a second thread."""
    return partial(Kernel, reads=reads, parallel=False)


_compiling = threading.RLock()


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
    """Digest of all that a compiled kernel depends on besides its signature."""
    digest = hashlib.sha256()
    for path in [_PACKAGE / "formulas.py", *sorted(_PACKAGE.glob("cpu/*.py"))]:  # all that kernels are made of
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    settings = (numba.__version__, config.BOUNDSCHECK, config.OPT, config.DEBUGINFO_DEFAULT, config.LOOP_VECTORIZE)
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


@cache
def _cache_root():
    """The first writable place for compiled kernels, or None."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for root in (config.CACHE_DIR, str(_PACKAGE / "__pycache__"), user_cache):
        if not root:
            continue
        path = Path(root) / "nbbn-kernels" / _stamp()
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError:
            continue
        return str(path)
    return None


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    def __init__(self, variant):
        self._variant = variant

    def get_cache_path(self):
        return _cache_root()

    def get_source_stamp(self):
        return _stamp()

    def get_disambiguator(self):
        return self._variant


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, function, variant):
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(variant)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, "")


class _Entries:
    """A folder with one file an entry: (key, data), found by the digest of the key."""

    def __init__(self, folder, base):
        self._folder, self._base = Path(folder), base

    def _path(self, key):
        return self._folder / f"{self._base}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.nbc"

    def load(self, key):
        try:
            stored, data = pickle.loads(self._path(key).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):  # not there, or cut short: compile
            return None
        return data if stored == repr(key) else None

    def save(self, key, data):
        content = caching.dumps((repr(key), data))
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)  # what root compiles into an image, its users may load
            os.replace(temporary, self._path(key))
        except OSError:  # the disk is full or went read-only: the kernel runs all the same
            return

    def flush(self):
        for path in self._folder.glob(f"{self._base}-*.nbc"):
            path.unlink(missing_ok=True)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    def __init__(self, function, variant):
        folder = _cache_root()
        self._name = repr(function)
        self._py_func = function
        self._impl = _Implementation(function, variant)
        self._cache_path = folder
        self._cache_file = _Entries(folder, self._impl.filename_base)
        self.enable()
