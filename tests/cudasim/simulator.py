"""A deterministic scheduler for Numba's CUDA simulator, with the warp primitives and the checks it lacks.

Each thread of a block is a greenlet that runs until it waits at a barrier or ends, in an order that the test chooses.
What a device leaves undefined is an error here: threads that wait at different barriers, shuffles that some lane of
the warp does not take part in, and shared memory that one thread writes and another reads or writes without a barrier
in between. Memory of nbbn's kernels is checked by `nbbn.cuda.simulated`: bounds, alignment, and NaN where nobody wrote.
"""

import sys
from collections import deque
from contextlib import contextmanager
from contextvars import copy_context

import greenlet
import numpy as np

WARP = 32


class RaceError(RuntimeError):
    """Two threads met in shared memory without a barrier between them."""


class DeadlockError(RuntimeError):
    """Threads wait at different barriers, or some have ended."""


class _Shared:
    """A shared array that knows who touched each element since the last barrier."""

    def __init__(self, block, shape, dtype):
        self._block = block
        self._values = np.empty(shape, dtype)
        self._values.view(np.uint8)[...] = 0xFF  # NaN as any float
        self._written = {}  # index -> (barriers passed, thread)
        self._read = {}  # index -> (barriers passed, thread or None for several)

    def _check(self, index):
        if not 0 <= index < self._values.size:
            raise IndexError(f"shared array of {self._values.size}: index {index}")

    def __getitem__(self, index):
        self._check(index)
        epoch, me = self._block.epoch, self._block.current.number
        when, who = self._written.get(index, (-1, me))
        if when == epoch and who != me:
            raise RaceError(f"thread {me} reads shared[{index}] that thread {who} wrote, without a barrier in between")
        when, who = self._read.get(index, (-1, me))
        self._read[index] = (epoch, me if when != epoch or who == me else None)
        return self._values[index]

    def __setitem__(self, index, value):
        self._check(index)
        epoch, me = self._block.epoch, self._block.current.number
        for touched in (self._written, self._read):
            when, who = touched.get(index, (-1, me))
            if when == epoch and who != me:
                raise RaceError(f"thread {me} writes shared[{index}] that thread {who} used, without a barrier before")
        self._written[index] = (epoch, me)
        self._values[index] = value


class _Thread:
    def __init__(self, number, function):
        self.number = number
        self.greenlet = greenlet.greenlet(function)
        self.greenlet.gr_context = copy_context()  # NumPy's settings for errors are the context's


class _Block:
    """Runs one block of threads to its end."""

    def __init__(self, function, arguments, index, grid, size, order):
        self.index, self.grid, self.size = index, grid, size
        self.epoch = 0
        self.shared = {}
        self.slots = {}
        self.waiting = {}
        self.main = greenlet.getcurrent()
        self.current = None
        self.threads = [_Thread(n, lambda: function(*arguments)) for n in order(range(size))]

    def run(self):
        ready = deque(self.threads)
        alive = {thread.number for thread in self.threads}
        while alive:
            while ready:
                self.current = ready.popleft()
                self.current.greenlet.switch()
                if self.current.greenlet.dead:
                    alive.discard(self.current.number)
            for key, threads in list(self.waiting.items()):
                kind, where = key
                # an ended thread does not arrive: as on a device, where that is undefined for barriers in a warp
                needed = self.size if kind == "block" else min(WARP, self.size - WARP * where)
                if len(threads) == needed:
                    del self.waiting[key]
                    self.epoch += kind == "block"
                    ready.extend(threads)
            if not ready and alive:
                raise DeadlockError(f"threads wait at {sorted((k, len(v)) for k, v in self.waiting.items())}")

    def arrive(self, key):
        self.waiting.setdefault(key, []).append(self.current)
        me = self.current
        self.main.switch()
        assert self.current is me

    def exchange(self, value, pick):
        """Every lane of the warp brings a value and takes another lane's."""
        warp, lane = divmod(self.current.number, WARP)
        slots = self.slots.setdefault(warp, {})
        slots[lane] = value
        self.arrive(("warp", warp))
        result = slots[pick(lane)]
        self.arrive(("warp", warp))
        return result


class _Place:
    """threadIdx and the like: only x is used here."""

    def __init__(self, read):
        self._read = read

    @property
    def x(self):
        return self._read(_running())


_block = None


def _running():
    if _block is None:
        raise RuntimeError("no simulated kernel is running")
    return _block


def _shared_array(shape, dtype):
    block = _running()
    frame = sys._getframe(1)
    key = frame.f_code, frame.f_lineno
    if key not in block.shared:
        block.shared[key] = _Shared(block, shape, np.dtype(str(dtype)))
    return block.shared[key]


def _barrier():
    _running().arrive(("block", None))


def _barrier_or(value):
    block = _running()
    votes = block.shared.setdefault("votes", {})
    votes[block.current.number] = bool(value)
    _barrier()
    result = any(votes.values())
    _barrier()
    return int(result)


class _SharedNamespace:
    array = staticmethod(_shared_array)


def _ascending(numbers):
    return list(numbers)


#: How the threads of a block, and the blocks of a grid, take turns.
ORDERS = {
    "ascending": _ascending,
    "descending": lambda numbers: list(numbers)[::-1],
    "shuffled": lambda numbers: [int(n) for n in np.random.default_rng(7).permutation(len(numbers))],
}

_order = _ascending


@contextmanager
def order(name):
    """Threads and blocks take turns in this order."""
    global _order
    before, _order = _order, ORDERS[name]
    try:
        yield
    finally:
        _order = before


def _launch(function, grid, size, arguments):
    global _block
    if not (1 <= size <= 1024 and grid >= 1):
        raise ValueError(f"launch of {grid} blocks of {size} threads")
    with np.errstate(all="ignore"):
        for index in _order(range(grid)):
            _block = _Block(function, arguments, index, grid, size, _order)
            try:
                _block.run()
            finally:
                _block = None


def install():
    """Put this scheduler in the place of Numba's, once per process."""
    from numba import cuda
    from numba.core import config
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    assert config.ENABLE_CUDASIM, "set NUMBA_ENABLE_CUDASIM=1 before Numba is imported"

    def configure(self, configuration):
        blocks, threads, *_ = configuration
        return lambda *arguments: _launch(self.fn, blocks, threads, arguments)

    FakeCUDAKernel.__getitem__ = configure
    cuda.threadIdx = _Place(lambda block: block.current.number)
    cuda.blockIdx = _Place(lambda block: block.index)
    cuda.blockDim = _Place(lambda block: block.size)
    cuda.gridDim = _Place(lambda block: block.grid)
    cuda.grid = lambda axes: _running().index * _running().size + _running().current.number
    cuda.shared = _SharedNamespace
    cuda.syncthreads = _barrier
    cuda.syncthreads_or = _barrier_or
    cuda.threadfence = lambda: None
    cuda.shfl_sync = lambda mask, value, source: _running().exchange(value, lambda lane: source)
    cuda.shfl_xor_sync = lambda mask, value, mask_: _running().exchange(value, lambda lane: lane ^ mask_)
