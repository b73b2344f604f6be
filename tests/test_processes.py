"""Threads, forks and new processes under every threading layer of Numba: nothing aborts, hangs or is wrong.

`python tests/situations.py` prints the table of all situations and layers, of nbbn beside a plain Numba kernel.
"""

import os
import subprocess
import sys

import pytest
import situations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def assert_correct(result):
    if result == "not installed":
        pytest.skip("this machine has not this threading layer")
    assert result == "correct"


@pytest.mark.parametrize("layer", situations.LAYERS)
def test_threads(layer):
    assert_correct(situations.outcome(layer, "nbbn", *situations.IN_THREADS))


@pytest.mark.parametrize("layer", ["omp", "workqueue"])  # TBB's forks: every night
def test_forks(layer):
    names = [name for name in situations.IN_FORKS if name != "fork_while_compiling"]
    assert_correct(situations.outcome(layer, "nbbn", *names, timeout=300))


def test_other_processes_and_a_busy_end():
    assert_correct(situations.outcome("omp", "nbbn", *situations.IN_OTHERS))


@pytest.mark.nightly
@pytest.mark.parametrize("layer", situations.LAYERS)
@pytest.mark.parametrize("name", situations.SITUATIONS)
def test_each_in_a_process_of_its_own(layer, name):
    assert_correct(situations.outcome(layer, "nbbn", name))


COLD = """
import numpy as np, nbbn
x = np.arange(12, dtype=np.float32).reshape(4, 3)
print(nbbn.batch_stats(x).mean.tolist(), nbbn.normalize(x, np.zeros(3), np.ones(3), eps=0.0).sum())
"""


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(20))
def test_8_processes_at_once_on_an_empty_cache(number, tmp_path):
    options = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command, pipe = [sys.executable, "-c", COLD], subprocess.PIPE
    processes = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=options) for _ in range(8)]
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.strip() == "[4.5, 5.5, 6.5] 66.0", err
