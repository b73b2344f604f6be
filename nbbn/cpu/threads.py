"""How many threads a kernel may use, and how they wait for work."""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numba
from numba.core.compiler_lock import global_compiler_lock

#: Values below which a second thread costs more than it saves. Giving work to a thread that is awake takes 2 to
#: 4 us, to one that sleeps 50 to 400 us on a virtual machine; one core normalizes this many float32 in about 100 us.
PARALLEL_FROM = 262_144

#: How often an idle OpenMP thread looks for work before it sleeps (about 150 us). GNU OpenMP's own 300,000 keep a
#: thread awake for milliseconds: two of them on one core, or any other busy process, and a call costs a whole
#: scheduler slice. Measured on 2 cores, (1, 64, 56, 56) evaluation: 8.0 ms with the default beside a busy process, 0.6
#: with 10,000, 0.3 with 3,000; but with 3,000 on a quiet machine calls of (32, 64, 28, 28) take 140 or 460 us.
SPINS = 10_000

#: Most values in a row that are worked on by one thread because the others came late: a few milliseconds of work, so
#: that threads which another library kept busy are soon asked again.
LONGEST_PAUSE = 8_000_000

_chosen: int | None = None
_layer: str | None = None  # Numba's threading layer, once it is started
_forked = False  # whether this process is a fork in which the threading layer does not work
_pretended: bool | None = None  # see `pretend`
_forks_in_main = True  # whether the last fork was made by the main thread
_alone = 0  # how many calls are still to be run on one thread, if they are for at most `_too_little` values
_too_little = 0
_pause = 1  # how many there were the last time
_running = 0  # parallel kernels under TBB now, more or less: counting them takes no lock
_starting = threading.RLock()
_turn = threading.RLock()

#: What a fork waits for (`nbbn.forks`); who holds one takes only later ones. Workqueue threads that are at work, and
#: a compiler, are never seen again in the child, which would wait for them for ever.
HELD_BY_FORK = (_turn, _starting, global_compiler_lock)


def set_num_threads(n: int) -> None:
    global _chosen
    _chosen = n


def get_num_threads() -> int:
    if _pretended is not None:
        return 2 if _pretended else 1
    if _chosen is not None:
        return _chosen
    # asking Numba starts its threads, after which OpenMP does not survive a fork: not before there is work
    return numba.get_num_threads() if _layer is not None else max_num_threads()


def max_num_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)


def limit() -> AbstractContextManager[None]:
    """Run kernels with the chosen number of threads and leave Numba's own setting as it was."""
    return _UNLIMITED if _chosen is None or _forked else _limit(_chosen)


_UNLIMITED = nullcontext()


@contextmanager
def _limit(n: int) -> Iterator[None]:
    start()
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(n)
        yield
    finally:
        numba.set_num_threads(before)


def worth(size: int) -> int:
    """How many threads pay for this many values, and are there."""
    if _pretended is not None:
        return 2 if _pretended else 1
    return get_num_threads() if size >= PARALLEL_FROM and not _forked else 1


def alone(size: int) -> bool:
    """Whether to leave the other threads alone in this call, because they came late for as much work."""
    global _alone
    if _alone > 0 and size <= _too_little:
        _alone -= 1
        return _pretended is None
    return False


def single() -> AbstractContextManager[None]:
    """Run parallel kernels on this thread: a serial one may not be compiled yet."""
    return _limit(1)


def note(late: bool, size: int) -> None:
    """Remember whether a thread came when all was done: for so little work, do not wait for it in the next calls."""
    global _alone, _pause, _too_little
    if _pretended is not None:
        return
    if late:
        _pause = max(1, min(2 * _pause, LONGEST_PAUSE // size))
        _alone, _too_little = _pause, size
    else:
        _pause = 1


@contextmanager
def pretend(parallel: bool) -> Iterator[None]:
    """Choose kernels as if all work, or none, were worth two threads: small arrays reach every kernel."""
    global _pretended
    _pretended = parallel
    try:
        yield
    finally:
        _pretended = None


def turn() -> AbstractContextManager[bool]:
    """Whether a parallel kernel may run now.

    Numba's workqueue layer aborts the process when two Python threads run parallel kernels: there they take turns,
    and who finds it taken runs the serial kernel, with the same result.
    """
    start()
    if _layer == "workqueue":
        return _take_turn()
    return _counted() if _layer == "tbb" else _FREE


_FREE = nullcontext(True)


@contextmanager
def _counted() -> Iterator[bool]:
    global _running
    _running += 1
    try:
        yield True
    finally:
        _running -= 1


@contextmanager
def _take_turn() -> Iterator[bool]:
    free = _turn.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _turn.release()


def start() -> None:
    """Start Numba's threads, once; idle OpenMP threads shall sleep soon, unless the user says otherwise.

    libgomp reads its settings when it is loaded, which Numba does at the first parallel call. The setting is taken
    back right after: what is loaded later has its own defaults.
    """
    global _layer
    if _layer is not None:
        return
    with _starting:
        if _layer is None:
            mine = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
            if mine:
                os.environ["GOMP_SPINCOUNT"] = str(SPINS)
            try:
                numba.get_num_threads()  # loads the threading layer
            finally:
                if mine:
                    del os.environ["GOMP_SPINCOUNT"]
            _layer = numba.threading_layer()


def _before_fork() -> None:
    global _forks_in_main
    _forks_in_main = threading.current_thread() is threading.main_thread()


def _after_fork_in_child() -> None:
    """In a forked child, kernels run serially where the layer does not work there.

    GNU OpenMP ends a child that uses it when the parent did before. Workqueue hangs in a child whose threads take
    turns. TBB cannot stop its threads for a fork in another than the main thread, or while they are at work.
    """
    global _forked, _running
    broken = _layer in ("omp", "workqueue") or (_layer == "tbb" and (_running != 0 or not _forks_in_main))
    _forked, _running = _forked or broken, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
