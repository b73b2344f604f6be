"""Every kernel between two pages that kill who touches them: run by `test_guard_pages` in a process of its own.

Every array that a call reads or writes (data, parameters, running arrays, results, statistics, working arrays) lies
in pages of its own, with a page that can be neither read nor written directly before and after. It ends exactly where
the second begins, or begins a few bytes after the first ends; the bytes left between are filled with a pattern, and so
is every result before it is written. One byte read or written beyond the pages is SIGSEGV; one byte written between is
found in the pattern; an element read there or never written makes the result wrong.

`python guards.py LOG GROUP N` runs every Nth case of a group; says in the file LOG which one it is at, and prints how
many there were.
"""

import ctypes
import itertools
import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

import nbbn
from nbbn import backends, layout, placement, quick
from nbbn import cpu as cpu
from nbbn.cpu import caches, core, threads
from nbbn.cpu import plain as plain_arrays

PAGE = mmap.PAGESIZE
PAGES = 16
PATTERN = 0xFF  # NaN in every floating dtype, the largest value of unsigned integers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """PAGES of memory between two forbidden ones."""

    def __init__(self):
        self._map = mmap.mmap(-1, (PAGES + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for address in (base, base + (PAGES + 1) * PAGE):
            if _libc.mprotect(address, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = np.frombuffer(self._map, np.uint8, PAGES * PAGE, PAGE)
        self._used = slice(0, PAGES * PAGE)
        self._clear()

    def _clear(self):
        self.bytes[self._used] = PATTERN

    def array(self, like, place):
        """An array of the shape, strides and dtype of `like`, all of it PATTERN.

        `place` None: its last byte is the last one; a number: so many bytes after the first.
        """
        low, high = np.lib.array_utils.byte_bounds(like)
        size = high - low if like.size else 0
        begin = PAGES * PAGE - size if place is None else place
        assert 0 <= begin <= PAGES * PAGE - size, "larger than the pages"
        self._clear()
        first = begin + (like.__array_interface__["data"][0] - low if like.size else 0)
        self._used = slice(max(0, begin - 256), begin + size + 256)
        self.first, self.strides = first, like.strides
        return np.ndarray(like.shape, like.dtype, self._map, PAGE + first, like.strides)

    def holds_only(self, array):
        """Whether every byte here outside of `array` is still PATTERN."""
        expected = np.full(PAGES * PAGE, PATTERN, np.uint8)
        np.ndarray(array.shape, array.dtype, expected, self.first, self.strides)[...] = array
        used = self._used
        return bool((self.bytes[used] == expected[used]).all())


class Arenas:
    """As many as one call needs, used again for the next."""

    def __init__(self):
        self._all, self._next, self.place = [], 0, None
        self.arrays = []

    def restart(self, place):
        self._next, self.place = 0, place
        self.arrays.clear()

    def like(self, like):
        if self._next == len(self._all):
            self._all.append(Arena())
        arena = self._all[self._next]
        self._next += 1
        size = like.itemsize
        array = arena.array(like, None if self.place is None else self.place // size * size)
        self.arrays.append((arena, array))
        return array

    def copy(self, values):
        array = self.like(values)
        array[...] = values
        return array

    def check(self):
        for arena, array in self.arrays:
            if not arena.holds_only(array):
                raise AssertionError(f"written outside of an array of shape {array.shape} {array.dtype}")


ARENAS = Arenas()


class GuardedNumPy:
    """NumPy as the modules of nbbn see it, with new arrays in arenas."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64):
        return ARENAS.like(np.empty(shape, dtype))

    def zeros(self, shape, dtype=np.float64):
        return ARENAS.copy(np.zeros(shape, dtype))


class Streaming:
    """Whether results are written with non-temporal stores, whatever their size."""

    now = False


def install():
    """Put every array that nbbn makes into an arena."""
    guarded = GuardedNumPy()
    for module in (backends, layout, placement, cpu, core):
        module.np = guarded
    quick.empty = plain_arrays.empty = guarded.empty
    caches.streams = lambda *arrays: Streaming.now


# --- layouts: from a number of values along the innermost axis to an array, and its channel axis ---------------------


LAYOUTS = {
    "rows and columns of (N, C, L)": lambda n, t: (np.empty((3, 2, n), t), 1),
    "(N, C)": lambda n, t: (np.empty((5, n), t), 1),
    "(N, C), rows folded": lambda n, t: (np.empty((n + 17, 3), t), 1),
    "channels last": lambda n, t: (np.empty((2, n, 3), t), -1),
    "channels first in memory": lambda n, t: (np.empty((3, n), t), 0),
    "Fortran order": lambda n, t: (np.empty((4, 2, n), t, order="F"), 1),
    "every other of a batch": lambda n, t: (np.empty((5, 2, n), t)[::2], 1),
    "batch backwards": lambda n, t: (np.empty((3, 2, n), t)[::-1], 1),
    "channels cropped": lambda n, t: (np.empty((3, 4, n), t)[:, 1:3], 1),
    "channels backwards": lambda n, t: (np.empty((3, 3, n), t)[:, ::-1], 1),
    "one channel": lambda n, t: (np.empty((3, 1, n), t), 1),
    "the whole array": lambda n, t: (np.empty(n, t), None),
    "inner axis strided (copied)": lambda n, t: (np.empty((2, 3, 2 * n), t)[..., ::2], 1),
}


@lru_cache(2)
def case_of(name, length, dtype):
    """Ordinary data of a layout, parameters, and what the reference makes of them."""
    like, axis = LAYOUTS[name](length, dtype)
    rng = np.random.default_rng(length)
    values = rng.integers(0, 200, like.shape) if dtype.kind == "u" else rng.standard_normal(like.shape)
    x = like
    x[...] = values
    channels = 1 if axis is None else x.shape[axis]
    f = rng.standard_normal((6, channels)).astype(np.float32)
    f[1] = np.abs(f[1]) + 0.5
    return x, axis, f


# --- operations: guarded arrays in; results, and how the reference computes what they should be ---------------------


def plain(values):
    return np.array(values, order="C")


def moments_of(m):
    return [m.count, m.mean, m.m2]


def statistics(x, axis, f, long):
    return moments_of(nbbn.batch_stats(ARENAS.copy(x), axis=long)), lambda: moments_of(
        nbbn.batch_stats(plain(x), axis=axis)
    )


def masked_statistics(x, axis, f, long):
    where = np.random.default_rng(1).random(x.shape) < 0.5
    return moments_of(nbbn.batch_stats(ARENAS.copy(x), axis=long, where=ARENAS.copy(where))), lambda: moments_of(
        nbbn.batch_stats(plain(x), axis=axis, where=where)
    )


def result_like(x):
    return ARENAS.like(np.empty_like(x, dtype=np.float32 if x.dtype.kind == "u" else None, order="K"))


def normalized(x, axis, f, long):
    out = result_like(x)
    nbbn.normalize(ARENAS.copy(x), *map(ARENAS.copy, f[:4]), axis=long, out=out)
    return [out], lambda: [nbbn.normalize(plain(x), *f[:4], axis=axis)]


def normalized_in_place(x, axis, f, long):
    y = ARENAS.copy(x)
    nbbn.normalize(y, *map(ARENAS.copy, f[:2]), axis=long, out=y)
    return [y], lambda: [nbbn.normalize(plain(x), *f[:2], axis=axis)]


def normalized_with_residual(x, axis, f, long):
    residual, options = ARENAS.copy(x), {"activation": "relu"}
    y = nbbn.normalize(ARENAS.copy(x), *map(ARENAS.copy, f[:2]), axis=long, residual=residual, **options)
    return [y], lambda: [nbbn.normalize(plain(x), *f[:2], axis=axis, residual=plain(x), **options)]


def trained(x, axis, f, long):
    if x.size <= f.shape[1]:
        return [], list
    out, running, options = result_like(x), [*map(ARENAS.copy, f[:2])], {"training": True, "return_stats": True}
    y, m = nbbn.batch_norm(ARENAS.copy(x), *running, *map(ARENAS.copy, f[2:4]), axis=long, out=out, **options)

    def expected():
        old = [v.copy() for v in f[:2]]
        y, m = nbbn.batch_norm(plain(x), *old, f[2], f[3], axis=axis, **options)
        return [y, *moments_of(m), *old]

    return [y, *moments_of(m), *running], expected


def gradients(training):
    def operation(x, axis, f, long):
        g, out = ARENAS.copy(x[::-1]), result_like(x)
        guarded = g, ARENAS.copy(x), *map(ARENAS.copy, f[:3])
        got = nbbn.batch_norm_backward(*guarded, axis=long, training=training, out=out)
        return list(got), lambda: list(
            nbbn.batch_norm_backward(plain(x[::-1]), plain(x), *f[:3], axis=axis, training=training)
        )

    return operation


def merged(x, axis, f, long):
    with nbbn.use_backend("numpy"):
        m = nbbn.batch_stats(plain(x), axis=axis)
    part, other = (nbbn.moments.wrap(*map(ARENAS.copy, moments_of(m))) for _ in range(2))
    total = part + other
    rest = total - other
    return moments_of(total) + moments_of(rest), lambda: moments_of(m + m) + moments_of(m)


FLOATING = {
    "batch_norm training": trained,
    "backward of training": gradients(True),
    "backward of evaluation": gradients(False),
    "normalize in place": normalized_in_place,
}
OPERATIONS = {
    "batch_stats": statistics,
    "batch_stats with where": masked_statistics,
    "normalize": normalized,
    "normalize with residual": normalized_with_residual,
    "merge and remove": merged,
    **FLOATING,
}


EXPECTED = {}  # of the last case: the next differs in where arrays lie, mostly


def run(report, name, layout_name, length, dtype, place, short, streaming):
    report(f"{name}, {layout_name}, length {length}, {dtype}, place {place}, short way {short}, streaming {streaming}")
    x, axis, f = case_of(layout_name, length, dtype)
    ARENAS.restart(place)
    Streaming.now = streaming
    long = axis if short or axis is None else np.int64(axis)  # not an int: the long way (nbbn.quick)
    got, reference = OPERATIONS[name](x, axis, f, long)
    ARENAS.check()
    case = name, layout_name, length, dtype
    if case not in EXPECTED:
        EXPECTED.clear()
        with nbbn.use_backend("numpy"):
            EXPECTED[case] = [np.array(a, np.float64) for a in reference()]
    digits = 2.0**-9 if dtype.itemsize == 2 else 2e-5
    for a, b in zip(got, EXPECTED[case], strict=True):
        scale = 1 + np.abs(b).max(initial=0)
        if a.shape != b.shape or not (np.abs(a.astype(np.float64) - b) <= digits * scale).all():
            raise AssertionError(f"wrong, or not all written: {a.ravel()[:9]}, expected {b.ravel()[:9]}")


def operations_for(dtype):
    return [name for name in OPERATIONS if dtype.kind == "f" or name not in FLOATING]


def every_length(report):
    """Every layout and length, flush with the page after and with the page before; float32."""
    t = np.dtype(np.float32)
    for layout_name, length, name in itertools.product(LAYOUTS, range(201), operations_for(t)):
        writes = "stats" not in name and "merge" not in name
        for place in (None, 0):
            for streaming in (False, True) if writes else (False,):
                yield run, (report, name, layout_name, length, t, place, False, streaming)
            if "where" not in name:
                yield run, (report, name, layout_name, length, t, place, True, False)


def every_alignment(report, dtype):
    """Every beginning from 0 to 63 bytes after a page, and every length."""
    layouts = "rows and columns of (N, C, L)", "(N, C)"
    for place, name in itertools.product(range(0, 64, dtype.itemsize), operations_for(dtype)):
        for length, layout_name, streaming in itertools.product(range(201), layouts, (False, True)):
            yield run, (report, name, layout_name, length, dtype, place, False, streaming)


def misaligned(report):
    """Arrays at odd addresses: NumPy copies them, nothing else may read them."""
    for place in range(64):
        for t in (np.dtype(np.float32), np.dtype(np.float64)):
            report(f"misaligned {t} at {place}")
            arena = Arena()
            x = arena.array(np.empty((4, 3), t), place)
            x[...] = np.arange(12).reshape(4, 3)
            assert nbbn.batch_stats(x).mean.tolist() == [4.5, 5.5, 6.5]
            nbbn.normalize(x, np.zeros(3), np.ones(3), eps=0.0, out=x)
            assert (x == np.arange(12).reshape(4, 3)).all()
            assert arena.holds_only(x)
            yield None, ()


def planted(report, kind):
    """What the pages are there for: `kind` says which wrong access to make."""
    arena = Arena()
    report(f"planted: {kind}")
    x = arena.array(np.empty(10, np.float32), 0 if "before" in kind else None)
    address = x.__array_interface__["data"][0] + (-1 if "before" in kind else x.nbytes)
    if "read" in kind:
        ctypes.string_at(address, 1)
    else:
        ctypes.memset(address, 0, 1)
    yield None, ()


def main(log, group, share, *arguments):
    page = mmap.mmap(os.open(log, os.O_RDWR), PAGE)

    def report(text):
        page[:256] = text.encode().ljust(256)[:256]

    if group == "planted":
        cases = planted(report, *arguments)
    else:
        install()
        threads.set_num_threads(1)
        cases = {
            "lengths": lambda: every_length(report),
            "alignments": lambda dtype: every_alignment(report, np.dtype(dtype)),
            "misaligned": lambda: misaligned(report),
        }[group](*arguments)
    number = 0
    with np.errstate(all="ignore"):
        for function, rest in itertools.islice(cases, 0, None, int(share)):
            if function is not None:
                function(*rest)
            number += 1
    print(number)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except AssertionError as error:
        sys.exit(f"{Path(sys.argv[1]).read_bytes().decode().rstrip(chr(0)).strip()}: {error}")
