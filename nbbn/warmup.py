"""Compile everything beforehand: ``python -m nbbn warmup``.

`calls` is the one list of what there is to compile: small calls of every public function that together need every
kernel. What is counted from it is the number of kernels that a process can meet.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

import nbbn

#: One shape for each way in which arrays are cut up: few and many columns, long rows of few and of many channels.
SHAPES = ((40, 4), (40, 4096), (3, 2, 200), (3, 8, 1100))

#: What parameters and running arrays are kept in.
PRECISIONS = (np.float32, np.float64)

#: The channel axis of calls that shall not go the short way of plain arrays (`nbbn.quick`), which takes only an int.
LONG_WAY: Any = np.int64(1)

#: A mean that float32 arithmetic cannot serve: the same kernels with float64 coefficients.
HUGE = 1e31


def calls(dtypes: Iterable[str]) -> Iterator[Callable[[], Any]]:
    """Small calls of all functions on all dtypes."""
    for precision in PRECISIONS:
        yield partial(_per_channel, precision)
    for dtype in map(_dtype, dtypes):
        if dtype is not None:
            for shape in SHAPES:
                for parallel in (False, True):
                    for call in (_statistics, _selected, _evaluation, _training, _backward):
                        yield partial(_pretending, parallel, call, np.ones(shape, dtype))
                if dtype in PRECISIONS:
                    yield partial(_short_way, np.ones(shape, dtype))


def _dtype(name: str) -> np.dtype[Any] | None:
    """The dtype, or None: bfloat16 exists only where ml_dtypes is installed."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _pretending(parallel: bool, call: Callable[[Any], None], x: Any) -> None:
    """Run one call; a function that does not take this dtype has nothing to compile for it."""
    from nbbn.cpu import threads

    try:
        with threads.pretend(parallel):
            call(x)
    except TypeError:
        if x.dtype in PRECISIONS:
            raise


def _per_channel(precision: Any) -> None:
    moments = nbbn.Moments(np.array([2]), np.array([2.0]), np.array([2.0]))
    (moments + moments) - moments
    nbbn.ema_update(np.zeros(1, precision), np.ones(1, precision), moments)
    _preparations(precision)


def _preparations(precision: Any) -> None:
    """What looks at memory and prepares channels for the large kernels of plain arrays, and rounds their gradients."""
    from nbbn.cpu import plain_backward, plain_kernels

    x, values, eps = np.zeros((1, 1, 1), np.uint8), np.ones((4, 1), precision), 1e-5
    plain_backward.rounded(np.ones(1), np.ones(1), np.empty((2, 1), precision))
    for kind in PRECISIONS:
        mean, var = values[:2].astype(kind)
        for arithmetic in PRECISIONS:
            ready = np.empty((3, 1)), np.empty((3, 1), arithmetic), np.empty(1, bool)
            plain_kernels.prepare_normalize(x, x, mean, var, *values[2:], eps, *ready)
            high = np.empty(1, arithmetic)
            wide, *others = np.empty((3, 1))
            plain_backward.prepare(x, x, x, mean, var, values[2], eps, wide, high, *others)


def _statistics(x: Any) -> None:
    nbbn.batch_stats(x, axis=LONG_WAY)


def _selected(x: Any) -> None:
    nbbn.batch_stats(x, where=np.ones(x.shape, bool), axis=LONG_WAY)


def _evaluation(x: Any) -> None:
    for mean in (0.0, HUGE):
        means, ones = np.full(x.shape[1], mean), np.ones(x.shape[1])
        y = nbbn.normalize(x, means, ones, axis=LONG_WAY)
        nbbn.normalize(x, means, ones, residual=y, axis=LONG_WAY)


def _training(x: Any) -> None:
    y = nbbn.batch_norm(x, None, None, training=True, axis=LONG_WAY)
    nbbn.batch_norm(x, None, None, training=True, residual=y, axis=LONG_WAY)


def _short_way(x: Any) -> None:
    """Small arrays, with parameters of their own precision and of the other."""
    for precision in PRECISIONS:
        mean, var, weight, bias = np.ones((4, x.shape[1]), precision)
        nbbn.batch_norm(x, mean, var, weight, bias)
        nbbn.batch_norm(x, mean, var, weight, bias, training=True)
        nbbn.normalize(x, mean, var)
        for kind in PRECISIONS:
            nbbn.batch_norm_backward(x, x, mean.astype(kind), var.astype(kind), weight)


def _backward(x: Any) -> None:
    for mean in (0.0, HUGE):
        for training in (True, False):
            nbbn.batch_norm_backward(
                x, x, np.full(x.shape[1], mean), np.ones(x.shape[1]), axis=LONG_WAY, training=training
            )


# --- the command ----------------------------------------------------------------------------------------------------


def run(dtypes: Sequence[str]) -> int:
    """Compile and save, with a progress bar on a terminal; 0, or 1 if nothing could be saved."""
    from nbbn.cpu import saved

    start = time.perf_counter()
    with np.errstate(all="ignore"):
        for call in _shown(list(calls(dtypes))):
            call()
    loaded, compiled = saved.tally["loaded"], saved.tally["compiled"]
    if missing := compiled - saved.tally["saved"]:
        print(
            f"{missing} of {compiled} compiled kernels could not be saved: no folder can be written to. "
            "Set NUMBA_CACHE_DIR to one that can, here and where the kernels shall be used",
            file=sys.stderr,
        )
        return 1
    size = sum(file.stat().st_size for folder in saved.folders_used for file in folder.glob("*.nbc"))
    done = f"{compiled} kernels compiled, {loaded} were there" if compiled else f"all {loaded} kernels were there"
    where = ", ".join(map(str, sorted(saved.folders_used)))
    print(f"{done}: {time.perf_counter() - start:.1f} s, {size / 1e6:.1f} MB in {where}")
    return 0


def _shown(steps: Sequence[Callable[[], Any]]) -> Iterable[Callable[[], Any]]:
    """The steps, and on a terminal how far they are: with rich a bar, else a line for every tenth."""
    if not sys.stdout.isatty():
        return steps
    try:
        from rich.progress import track
    except ImportError:
        return _lines(steps)
    return track(steps, description="compiling kernels")


def _lines(steps: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    for number, step in enumerate(steps):
        if number % -(-len(steps) // 10) == 0:
            print(f"compiling kernels: {100 * number // len(steps)} %", flush=True)
        yield step
