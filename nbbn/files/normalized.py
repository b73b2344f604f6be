"""Writing a normalized array, a piece at a time: all of it or nothing."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

import nbbn
from nbbn.arrays import result_dtype
from nbbn.files.arrays import ArrayFile, pieces
from nbbn.files.blocks import Cut
from nbbn.moments import Moments


def write(
    file: ArrayFile, cut: Cut, moments: Moments, eps: float, output: Path, advance: Callable[[int], object]
) -> None:
    """Write ``(x - mean) / sqrt(var + eps)`` as ``.npy``, in the order of memory and, for floats, the dtype of `file`.

    Raises
    ------
    UnreadableError
        If `file` cannot be read to its end.
    OSError
        If `output` cannot be written. In both cases, and if the process is told to end, `output` is as it was.
    """
    mean, var = moments.mean, moments.var()
    dtype = result_dtype(file.dtype.newbyteorder("="))
    with _all_or_nothing(output) as target:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": file.fortran_order,
            "shape": file.shape,
        }
        np.lib.format.write_array_header_1_0(target, header)
        results = np.empty(min(cut.limit, math.prod(file.shape)), dtype)
        for piece, x in pieces(file, cut, range(len(cut))):
            channels = slice(piece.first_channel, piece.first_channel + piece.channels)
            y = results[: x.size].reshape(x.shape)
            nbbn.normalize(x, mean[channels], var[channels], eps=eps, out=y)
            target.write(y.data)
            advance(x.nbytes)


@contextmanager
def _all_or_nothing(output: Path) -> Iterator[IO[bytes]]:
    """A file beside `output` that takes its place when everything is written, and is removed if it never is."""
    beside = output.with_name(f".{output.name}.{os.getpid()}.part")
    with _ended_like_any_error():
        try:
            with beside.open("xb") as target:
                yield target
            beside.replace(output)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def _ended_like_any_error() -> Iterator[None]:
    """Let SIGTERM raise, as the interrupt key does; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
