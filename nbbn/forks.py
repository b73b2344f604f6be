"""A fork waits for what must not be cut in two.

A forked child has a copy of all memory and one thread. What another thread had half done at that moment stays so: a
lock that nobody will release, statistics of which one half is new. So a fork takes these locks before, when nothing is
under way, and releases them in both processes after.
"""

import os
import sys
import threading
from typing import Any

#: Held while a layer's state is written, or read to be used as one. One for all layers, because it is held for
#: microseconds; one that its holder may take again, because a signal handler may run a layer as well.
state = threading.RLock()

_held: list[Any] = []


def _acquire() -> None:
    # not loaded: nothing can be under way there
    threads, numba = sys.modules.get("nbbn.cpu.threads"), _numba()
    for lock in (
        state,
        *(threads.HELD_BY_FORK if threads else ()),
        *([numba._backend_init_thread_lock] if numba else ()),
    ):
        lock.acquire()
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()


def _renew_in_child() -> None:
    """Give the child a lock of its own for what Numba guards with one that parent and children share.

    Numba takes it whenever it is asked for the number of threads. If a thread of the parent holds it at the moment of
    the fork, the child's copy is marked as held: the child takes it once more and then never lets it go, and everything
    stands still, the parent first. So it does when a child is killed while holding it.
    """
    numba = _numba()
    if numba:
        numba._backend_init_process_lock = None  # made again when it is needed
    _release()


def _numba() -> Any:
    return sys.modules.get("numba.np.ufunc.parallel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_renew_in_child)
