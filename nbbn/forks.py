"""A fork waits for what must not be cut in two.

A forked child has a copy of all memory and one thread. What another thread had half done at that moment stays so: a
lock that nobody will release, statistics of which one half is new. The locks here are taken before a fork, so that
nothing is under way, and released in both processes after it.
"""

import os
from collections.abc import Callable
from typing import Protocol, TypeVar


class _Lock(Protocol):
    def acquire(self) -> object: ...
    def release(self) -> object: ...


_L = TypeVar("_L", bound=_Lock)

_locks: list[tuple[int, _Lock]] = []


def held_by_fork(make: Callable[[], _L], rank: int) -> _L:
    """A new lock. Who holds one may take those of a higher rank, and a fork takes all of them in that order."""
    lock = make()
    _locks.append((rank, lock))
    _locks.sort(key=lambda entry: entry[0])
    return lock


def _acquire() -> None:
    for _, lock in _locks:
        lock.acquire()


def _release() -> None:
    for _, lock in reversed(_locks):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)
