"""How threads share the tasks of a parallel loop: each has a range of its own, and who is done takes from the others.

Ranges follow each other in memory, as prefetchers like it. But a thread may come late: one that sleeps takes 50 to
400 us to wake, one whose core another process has takes a scheduler slice. With ranges alone all would wait for it,
and who waits longer than it spins falls asleep too, and comes late to the next call: (16, 64, 28, 28) took 255 us a
call for hundreds of calls, then 55. Here nobody waits for work to be done; that someone came when all was done is
told to the caller (`threads.note`). What a task computes depends on its number only, never on who takes it.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbbn.cpu.jit import formula
from nbbn.cpu.lines import fence
from nbbn.cpu.memory import pointer_to
from nbbn.cpu.scratch import zeros

#: 64-bit numbers a cache line: counters of different threads shall not share one.
_APART = 8

_I64 = ir.IntType(64)


@intrinsic
def _fetch_and_increment(typingctx, counters, i):
    """counters[i] before it is incremented, by one thread at a time."""

    def codegen(context, builder, signature, arguments):
        counter = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1], _I64)
        return builder.atomic_rmw("add", counter, _I64(1), "monotonic")

    return types.int64(counters, types.intp), codegen


@intrinsic
def _fetch(typingctx, counters, i):
    """counters[i] as it is now."""

    def codegen(context, builder, signature, arguments):
        counter = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1], _I64)
        return builder.load_atomic(counter, "monotonic", 8)

    return types.int64(counters, types.intp), codegen


@formula
def shared(workers):
    """Nothing yet: tasks taken of each range, and workers who have begun, and who ended before all had begun."""
    return zeros(_APART * (workers + 2), np.int64(0))


@formula
def next_task(worker, taken, tasks, task):
    """What falls to a worker after `task` (-1: first): of its own range as long as there are any, then of the others'.

    -1: there are none left, and what this worker wrote is seen by all.
    """
    workers = taken.size // _APART - 2
    begun = taken.size - 2 * _APART
    if task < 0:
        _fetch_and_increment(taken, begun)
    whose = worker
    for _ in range(workers):
        first = tasks * whose // workers
        size = tasks * (whose + 1) // workers - first
        if _fetch(taken, _APART * whose) < size:
            k = _fetch_and_increment(taken, _APART * whose)
            if k < size:
                return first + k
        whose = whose + 1 if whose + 1 < workers else 0
    fence()
    if _fetch(taken, begun) < workers:
        _fetch_and_increment(taken, taken.size - _APART)
    return -1


@formula
def someone_was_late(taken):
    """Whether all was done before all workers had begun."""
    return taken[taken.size - _APART] > 0
