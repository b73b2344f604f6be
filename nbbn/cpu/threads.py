"""How many threads a kernel may use."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


def limit() -> AbstractContextManager[None]:
    """Run kernels with the chosen number of threads and leave Numba's own setting as it was."""
    return _UNLIMITED if _chosen is None else _limit(_chosen)


_UNLIMITED = nullcontext()


@contextmanager
def _limit(n: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(n)
    try:
        yield
    finally:
        numba.set_num_threads(before)
