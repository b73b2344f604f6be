"""The scheduler and the simulated memory see the bugs they are there for, in kernels of their own and in nbbn's."""

import inspect

import device_arrays
import numpy as np
import pytest
import simulator
import test_simulated_contract as contract
from numba import cuda, float32, float64

from nbbn.cuda import (
    affine_rows,
    gradients_rows,
    input_gradient,
    moments_columns,
    moments_rows,
    reduce,
    simd,
    tiles,
    train_rows,
)

LOAD, STORE = simd.LOAD["float32", 1], simd.STORE["float32", 1]


def run(function, *arguments, threads=64, blocks=1):
    cuda.jit(function)[blocks, threads](*arguments)


def memory(n=64):
    array = device_arrays.put(np.arange(n, dtype=np.float32))
    return array, array.values.ctypes.data


def _through_shared_memory(x, synchronize):
    shared = cuda.shared.array(64, float32)
    shared[cuda.threadIdx.x] = LOAD(x, cuda.threadIdx.x)[0]
    if synchronize:
        cuda.syncthreads()
    STORE(x, cuda.threadIdx.x, (shared[63 - cuda.threadIdx.x],))


@pytest.mark.parametrize("order", simulator.ORDERS)
def test_a_missing_barrier_is_seen_whatever_the_order(order):
    array, x = memory()
    with simulator.order(order):
        run(_through_shared_memory, x, True)
        assert (array.get() == np.arange(64)[::-1]).all()
        with pytest.raises(simulator.RaceError, match="without a barrier"):
            run(_through_shared_memory, x, False)


def _half_at_the_barrier(x):
    if cuda.threadIdx.x < 32:
        cuda.syncthreads()


def _half_in_the_shuffle(x):
    if cuda.threadIdx.x % 2:
        STORE(x, cuda.threadIdx.x, (cuda.shfl_xor_sync(0xFFFFFFFF, float32(1), 1),))


def test_mismatched_barriers_are_seen():
    _, x = memory()
    for kernel in (_half_at_the_barrier, _half_in_the_shuffle):
        with pytest.raises(simulator.DeadlockError):
            run(kernel, x)


def test_bad_addresses_are_seen():
    array, x = memory()
    wide = simd.LOAD["float32", 4]
    for kernel, error in [
        (lambda x: LOAD(x, 64), IndexError),
        (lambda x: STORE(x, -1, (float32(0),)), IndexError),
        (lambda x: wide(x, 62), ValueError),
        (lambda x: wide(x, 64), IndexError),
        (lambda x: LOAD(12345, 0), IndexError),
    ]:
        with pytest.raises(error):
            run(kernel, x, threads=1)
    del array
    with pytest.raises(IndexError, match="not in device memory"):
        run(lambda x: LOAD(x, 0), x, threads=1)


def test_different_precisions_do_not_mix():
    with pytest.raises(TypeError, match=r"float32.*float64"):
        simd.add((np.float32(1),), (float64(1),))


def mutated(function, before, after):
    """The function with a bug in its source."""
    text = inspect.getsource(function)
    assert before in text
    names = dict(vars(inspect.getmodule(function)))
    exec(text.replace(before, after, 1).replace("@device\n", ""), names)
    return names[function.__name__]


def test_a_barrier_missing_in_the_backward_launch_is_seen(monkeypatch):
    broken = mutated(input_gradient.share_coefficients, "    cuda.syncthreads()\n", "")
    monkeypatch.setattr(gradients_rows, "share_coefficients", broken)
    with pytest.raises(simulator.RaceError):
        contract.check_backward((3, 4, 1500), "float32", True)


@pytest.mark.parametrize(
    ("module", "function", "before", "after", "shape"),
    [
        pytest.param(
            moments_rows, reduce.block_sums, "    cuda.syncthreads()\n    first = slots[0]", "    first = slots[0]",
            (1, 1, 5001), id="missing barrier",
        ),
        pytest.param(
            moments_rows, reduce.block_sums, "thread % WARP == 0", "thread % WARP == thread // WARP", (1, 1, 5001),
            id="any lane will do",
        ),
        pytest.param(
            moments_rows, reduce.block_sums, "slots[thread // WARP * 2 + 1]", "slots[thread // WARP * 2 - 1]",
            (1, 1, 5001), id="wrong slot",
        ),
        pytest.param(moments_rows, reduce.advance, "        o += 1\n", "", (3, 4, 1500), id="end of a row"),
        pytest.param(
            moments_rows, reduce.sum_over_parts, "range(cuda.threadIdx.x, parts", "range(cuda.threadIdx.x, parts - 1",
            (1, 1, 9001), id="last part left out",
        ),
        pytest.param(
            moments_columns, tiles.channel_sums, "k * inner + 1,", "k * inner + 2,", (64, 3, 49),
            id="a column left out",
        ),
        pytest.param(
            train_rows, affine_rows.coefficients_of_block, "    cuda.syncthreads()\n", "", (3, 4, 1500),
            id="missing barrier before the coefficients",
        ),
        pytest.param(
            moments_columns, tiles.sum_over_splits, "            cuda.syncthreads()\n", "            pass\n",
            (64, 3, 49), id="missing barrier between groups",
        ),
    ],
)  # fmt: skip
def test_bugs_planted_in_the_kernels_are_seen(monkeypatch, module, function, before, after, shape, request):
    monkeypatch.setattr(module, function.__name__, mutated(function, before, after))
    if request.node.callspec.id == "any lane will do":  # every lane has the sum: not a bug, and not taken for one
        contract.test_moments_and_training(shape)
        return
    with pytest.raises((AssertionError, simulator.RaceError, IndexError)):
        contract.test_moments_and_training(shape)


def test_a_wrong_lane_is_seen(monkeypatch):
    broken = mutated(reduce.warp_sum, "value += cuda.shfl_xor_sync(ALL, value, offset)",
                     "value += cuda.shfl_sync(ALL, value, offset)")  # fmt: skip
    monkeypatch.setattr(reduce, "warp_sum", broken)
    with pytest.raises((AssertionError, simulator.RaceError)):
        contract.test_moments_and_training((1, 1, 5001))


def test_a_barrier_missing_between_two_sums_is_seen(monkeypatch):
    broken = mutated(reduce.block_sums, "    cuda.syncthreads()  #", "    #")
    monkeypatch.setattr(moments_rows, "block_sums", broken)
    with pytest.raises(simulator.RaceError):  # the second one follows where the first lost digits
        contract.test_hard_data((1, 1, 600), lambda z: z * np.float32(1e-40))
