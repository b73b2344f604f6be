"""How many threads a kernel may use."""

from collections.abc import Iterator
from contextlib import contextmanager

import numba

#: Values below which a second thread costs more than it saves: starting one takes 2 to 4 us with OpenMP and TBB,
#: in which one core handles about this many.
PARALLEL_FROM = 65536

_chosen: int | None = None


def set_num_threads(n: int) -> None:
    global _chosen
    _chosen = n


def get_num_threads() -> int:
    return numba.get_num_threads() if _chosen is None else _chosen


def max_num_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)


@contextmanager
def limit() -> Iterator[None]:
    """Run kernels with the chosen number of threads and leave Numba's own setting as it was."""
    before = numba.get_num_threads()
    if _chosen is None or _chosen == before:
        yield
        return
    numba.set_num_threads(_chosen)
    try:
        yield
    finally:
        numba.set_num_threads(before)
