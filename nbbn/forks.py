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
    threads = sys.modules.get("nbbn.cpu.threads")  # not loaded: nothing can be under way there
    for lock in (state, *(threads.HELD_BY_FORK if threads else ())):
        lock.acquire()
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)
