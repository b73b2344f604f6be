"""Every operation, case and peer under pytest-benchmark: `pytest bench`.

For a number to publish use `compare.py`: here each peer has its turn alone, and the machine drifts between turns.
"""

import time
from functools import lru_cache

import pytest
from cases import CASES, Case
from inputs import Inputs
from operations import OPERATIONS, Operation, UnsupportedError, prepare, settings
from peers import PEERS

#: Seconds a benchmark may take, about; that bounds its rounds.
BUDGET = 0.5

#: Seconds a round takes at least: shorter calls are repeated.
ROUND = 1e-3

#: Case by case, so that inputs (413 MB for the largest) are built once.
PAIRS = [(case, operation) for case in CASES for operation in OPERATIONS if operation.takes(case)]


@pytest.fixture(scope="module", autouse=True)
def _settings():
    with settings():
        yield


@lru_cache(maxsize=1)
def inputs(case: Case) -> Inputs:
    return Inputs(case)


@lru_cache(maxsize=1)
def checked_calls(case: Case, operation: Operation):
    return prepare(operation, inputs(case))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("case", "operation"), PAIRS, ids=[f"{o.name}-{c.id}" for c, o in PAIRS])
def test_speed(benchmark, case, operation, peer):
    try:
        call = checked_calls(case, operation).get(peer)
    except (UnsupportedError, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    if call is None:
        pytest.skip(f"{peer} is not installed or does not serve {operation.name} of {case}")
    benchmark.group = f"{operation.name} {case}"
    benchmark.extra_info["bytes"] = operation.least_bytes(inputs(case))

    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    iterations = max(1, round(ROUND / seconds))
    rounds = min(max(3, int(BUDGET / (iterations * seconds))), 50)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
