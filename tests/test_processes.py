"""Threads, forks and new processes under every threading layer of Numba: nothing aborts, hangs or is wrong.

`python tests/situations.py` runs all situations under all layers, of nbbn beside a plain Numba kernel; the table of
what became of them is in the README.
"""

import json
import os
import subprocess
import sys

import numba
import pytest
import situations

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_the_table_in_the_readme_is_what_was_found():
    found = json.loads(situations.RESULTS_FILE.read_text())
    assert situations.in_readme(situations.README.read_text())[1] == situations.table(found)
    outcomes = [(name, layer) for name in found["outcomes"] for layer in found["outcomes"][name]]
    assert outcomes == [(name, layer) for name in situations.SITUATIONS for layer in situations.LAYERS]
    assert {found["outcomes"][name][layer]["nbbn"] for name, layer in outcomes} == {"correct"}
    alone = {found["outcomes"][name][layer].get("numba", "correct") for name, layer in outcomes}
    # what is to be prevented did happen, beside it: workqueue's abort, OpenMP's end of a child
    assert {"killed by SIGABRT", "child killed by SIGTERM"} < alone


def assert_correct(result):
    if result == "not installed":
        pytest.skip("this machine has not this threading layer")
    assert result == "correct"


@pytest.mark.slow
@pytest.mark.parametrize("layer", situations.LAYERS)
def test_threads(layer):
    assert_correct(situations.outcome(layer, "nbbn", *situations.IN_THREADS))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue"])  # TBB's forks: every night
def test_forks(layer):
    names = [name for name in situations.IN_FORKS if name != "fork_while_compiling"]
    assert_correct(situations.outcome(layer, "nbbn", *names, timeout=600))


def test_what_forks_need_of_numba_is_there():
    """Its locks have these names in every version that we support; without them a fork may hang (`nbbn.forks`)."""
    from numba.np.ufunc import parallel

    numba.get_num_threads()
    assert parallel._backend_init_process_lock is not None
    before = parallel._backend_init_process_lock
    with parallel._backend_init_thread_lock:
        assert situations.in_fork(lambda: parallel._backend_init_process_lock is None)
    assert parallel._backend_init_process_lock is before


@pytest.mark.slow
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
