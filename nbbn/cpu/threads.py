"""How many threads a kernel may use, and how they wait for work."""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numba

#: Values below which a second thread costs more than it saves: starting one takes 2 to 4 us with OpenMP and TBB,
#: in which one core handles about this many.
PARALLEL_FROM = 65536

#: How often an idle OpenMP thread looks for work before it sleeps (about 50 us). GNU OpenMP's own 300,000 keep a
#: thread awake for milliseconds: two of them on one core, or any other busy process, and a call costs a whole
#: scheduler slice. Measured on 2 cores, (1, 64, 56, 56) evaluation: 8.0 ms with the default, 0.1 to 0.3 ms with
#: 3,000 whether another process is busy or not; from 0 to 1,000 large calls lose up to a half on a quiet machine.
SPINS = 3000

_chosen: int | None = None
_started = False
_starting = threading.Lock()


def set_num_threads(n: int) -> None:
    global _chosen
    _chosen = n


def get_num_threads() -> int:
    if _chosen is not None:
        return _chosen
    start()
    return numba.get_num_threads()


def max_num_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)


def limit() -> AbstractContextManager[None]:
    """Run kernels with the chosen number of threads and leave Numba's own setting as it was."""
    return _UNLIMITED if _chosen is None else _limit(_chosen)


_UNLIMITED = nullcontext()


@contextmanager
def _limit(n: int) -> Iterator[None]:
    start()
    before = numba.get_num_threads()
    numba.set_num_threads(n)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def start() -> None:
    """Start Numba's threads, once; idle OpenMP threads shall sleep soon, unless the user says otherwise.

    libgomp reads its settings when it is loaded, which Numba does at the first parallel call. The setting is taken
    back right after: what is loaded later has its own defaults.
    """
    global _started
    if _started:
        return
    with _starting:
        if not _started:
            mine = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
            if mine:
                os.environ["GOMP_SPINCOUNT"] = str(SPINS)
            try:
                numba.get_num_threads()  # loads the threading layer
            finally:
                if mine:
                    del os.environ["GOMP_SPINCOUNT"]
            _started = True
