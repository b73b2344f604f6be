"""Compiled kernels on disk: never stale, shared by processes that start at once, and done without where it must be.

Numba stamps a cached kernel with the file that holds it and with nothing else: an edited helper, another option, a
debug build would run stale code. And its index file is shared by all writers, so that two processes starting at once
can swap entries (numba issues 4807 and 10128). Here each entry is a file of its own, named by everything it depends on
and replaced atomically.
"""

import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
import numba
from numba.core import caching, config
from numba.core.runtime import rtsys

_PACKAGE = Path(__file__).resolve().parent.parent

#: Kernels of other sources, or other versions, that nobody has loaded for so long are removed.
KEPT_DAYS = 30

#: What became of kernels in this process: how many were found compiled, compiled, and saved, and in which folders.
tally = {"loaded": 0, "compiled": 0, "saved": 0}
folders_used: set[Path] = set()


@cache
def _stamp():
    """Digest of all that a compiled kernel depends on besides its signature and the processor.

    None where the sources cannot be read, as in a zip file: then nothing is saved.
    """
    digest = hashlib.sha256()
    for path in [_PACKAGE / "formulas.py", *sorted(_PACKAGE.glob("cpu/*.py"))]:  # all that kernels are made of
        try:
            digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
        except OSError:
            return None
    settings = (config.BOUNDSCHECK, config.OPT, config.DEBUGINFO_DEFAULT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE)
    digest.update(repr((numba.__version__, llvmlite.__version__, sys.version_info[:3], *settings)).encode())
    return digest.hexdigest()[:16]


@cache
def _folders():
    """Where compiled kernels may lie: all are looked into, the first that can be written to takes new ones."""
    stamp = _stamp()
    if stamp is None:
        return []
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    roots = (config.CACHE_DIR, str(_PACKAGE / "__pycache__"), user_cache)
    return [Path(root) / "nbbn-kernels" / stamp for root in roots if root]


class _Locator(caching._CacheLocator):
    def __init__(self, variant):
        self._variant = variant

    def ensure_cache_path(self):
        """Nothing to do: `_Entries.save` makes the folder."""

    def get_cache_path(self):
        return ""  # `Entries` knows

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
                _mark_used(folder)
                return data
        return None

    def save(self, key, data):
        content = caching.dumps((repr(key), data))
        for folder in _folders():
            try:
                if not folder.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    _remove_old(folder.parent)
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


def _mark_used(folder):
    """Tell `_remove_old` of a process that runs from here."""
    if folder not in folders_used:
        folders_used.add(folder)
        with suppress(OSError):  # read-only: nobody will remove anything there either
            os.utime(folder)


def _remove_old(root):
    """Remove folders of kernels not used for a month; who still wanted one would compile anew."""
    for folder in root.iterdir():
        try:
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody else just did
            continue


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


class Cache(caching.FunctionCache):
    """What Numba asks for a kernel's compiled forms: of one function, `variant` tells serial from parallel."""

    def __init__(self, function, variant):
        self._name = repr(function)
        self._py_func = function
        self._impl = _Implementation(function, variant)
        self._cache_path = ""  # for Numba's statistics only
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
