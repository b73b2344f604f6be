"""Every operation, shape and peer under pytest-benchmark: `pytest bench`.

For a number to publish use `compare.py`: here each peer has its turn alone, and the machine drifts between turns.
"""

import time
from functools import lru_cache

import pytest
from inputs import SHAPES, Inputs, Shape
from operations import OPERATIONS, PEERS, Operation, peers_of, prepare

#: Seconds a benchmark may take, about; that bounds its rounds.
BUDGET = 0.5

#: Seconds a round takes at least: shorter calls are repeated.
ROUND = 1e-3

#: Shape by shape, so that inputs (413 MB for the largest) are built once.
PAIRS = [(shape, operation) for shape in SHAPES for operation in OPERATIONS]


@lru_cache(maxsize=1)
def inputs(shape: Shape) -> Inputs:
    return Inputs(shape)


@lru_cache(maxsize=1)
def checked_calls(shape: Shape, operation: Operation):
    return prepare(operation, inputs(shape))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("shape", "operation"), PAIRS, ids=[f"{o.name}-{s.id}" for s, o in PAIRS])
def test_speed(benchmark, shape, operation, peer):
    if peer not in peers_of(operation):
        pytest.skip(f"{peer} is not installed or has no {operation.name}")
    call = checked_calls(shape, operation)[peer]
    benchmark.group = f"{operation.name} {shape}"
    benchmark.extra_info["bytes"] = operation.least_bytes(inputs(shape))

    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    iterations = max(1, round(ROUND / seconds))
    rounds = min(max(3, int(BUDGET / (iterations * seconds))), 50)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
