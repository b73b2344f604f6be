"""What kernels allocate they free: every operation, in every family, alone and on two threads."""

import numpy as np
import pytest
from numba.core.runtime import _nrt_python, rtsys

import nbbn
from nbbn.cpu.inner import Inner
from nbbn.cpu.jit import serial_kernel
from nbbn.cpu.scratch import scratch

#: Small and large, rows and columns, fused and not.
CASES = [
    ((8, 64, 28, 28), 1),
    ((1, 64, 28, 28), 1),
    ((16, 3, 64, 64), 1),
    ((64, 512, 7, 7), 1),
    ((8, 512, 7, 7), 1),
    ((64, 64), 1),
    ((2048, 256), 1),
    ((300_000, 2), 1),
    ((8, 28, 28, 64), -1),
    ((4, 14, 14, 64), -1),
    ((64, 14, 14, 64), -1),
]


@pytest.fixture
def kept():
    """A function that says how many allocations a call has not freed."""
    nbbn.batch_stats(np.ones((4, 4), np.float32))  # Numba's memory management begins with the first kernel
    before = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()

    def count(call):
        result = call()  # what is kept from the first call on is no leak
        earlier = rtsys.get_allocation_stats()
        result = call()
        later = rtsys.get_allocation_stats()
        del result
        return (later.mi_alloc - earlier.mi_alloc) - (later.mi_free - earlier.mi_free)

    yield count
    if not before:
        _nrt_python.memsys_disable_stats()


@pytest.fixture(params=[1, 2])
def workers(request):
    before = nbbn.get_num_threads()
    nbbn.set_num_threads(request.param)
    yield request.param
    nbbn.set_num_threads(before)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_kernels_free_what_they_allocate(kept, workers, shape, axis):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[(0,) * x.ndim] = 1e20  # one channel needs the careful ways as well
    w = np.ones(shape[axis], np.float32)
    mean, var = w.copy(), w.copy()
    out = np.empty_like(x)
    calls = {
        "statistics": lambda: nbbn.batch_stats(x, axis=axis),
        "evaluation": lambda: nbbn.batch_norm(x, mean, var, w, w, axis=axis, out=out),
        "evaluation with a residual": lambda: nbbn.normalize(x, w, w, axis=axis, residual=x, out=out),
        "training": lambda: nbbn.batch_norm(x, mean, var, w, w, True, axis=axis, out=out),
        "backward": lambda: nbbn.batch_norm_backward(x, x, w, w, w, axis=axis, out=out),
        "masked": lambda: nbbn.batch_stats(x[:64], axis=axis, where=x[:64] > 0),
    }
    assert {name: kept(call) for name, call in calls.items()} == dict.fromkeys(calls, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int64])
@pytest.mark.parametrize(("shape", "axis"), [((8, 64, 28, 28), 1), ((8, 28, 28, 64), -1)])
def test_of_every_kind_of_storage(kept, dtype, shape, axis):
    x = np.random.default_rng(0).integers(0, 9, shape).astype(dtype)
    w = np.ones(64)
    assert kept(lambda: nbbn.batch_stats(x, axis=axis)) == 0
    assert kept(lambda: nbbn.normalize(x, w, w, axis=axis)) == 0


def test_an_array_handed_to_who_counts_no_references_is_an_error():
    """It would never be freed; nothing else would tell."""

    def made(n):
        return scratch(n, 0.0)

    make = Inner(made)

    def use(n):
        return make(n)[0] * 0.0 + n

    used = Inner(use)

    @serial_kernel(reads=())
    def outermost(result):
        result[0] = used(3)

    with pytest.raises(Exception, match="made returns arrays: name it in _ALLOCATORS"):
        outermost(np.zeros(1))
