"""Long mixed use: `soak` says what is measured; here it is run, and shown to find what it looks for."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soak

import nbbn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

X = np.arange(48, dtype=np.float32).reshape(6, 8)


def short(call):
    calls = {"planted": call, "sound": lambda: soak.of_moments(nbbn.batch_stats(X))}
    return soak.soak(0, calls, phases=8, least=800)


def test_nothing_is_found_where_nothing_is_wrong():
    report = short(lambda: soak.as_bytes(nbbn.batch_norm(X, training=True)))
    assert report.calls[-1] > 8 * 800
    assert report.problems() == []


def test_results_that_are_kept_are_found():
    kept = []
    problems = short(lambda: kept.append(nbbn.batch_norm(np.tile(X, (100, 1)), training=True)) or b"").problems()
    assert [problem.partition(" grew")[0] for problem in problems] == ["memory", "Python's objects"]


def test_small_objects_that_are_kept_are_found():
    kept = []
    problems = short(lambda: kept.append(object()) or b"").problems()
    assert problems[-1].startswith("Python's objects grew by")


def test_a_drift_is_found():
    running = np.zeros(8, np.float32), np.ones(8, np.float32)  # from call to call
    problems = short(lambda: soak.as_bytes(nbbn.batch_norm(X, *running, training=True), *running)).problems()
    assert {"wrong result: planted", "wrong result: planted, at the end"} >= set(problems) >= {"wrong result: planted"}


def test_one_wrong_bit_in_a_thousand_calls_is_found():
    number = itertools.count()
    report = short(lambda: b"other" if next(number) % 1000 == 999 else b"same")
    assert set(report.wrong) == {"planted"}


def test_threads_that_are_left_are_found():
    end, number = threading.Event(), itertools.count()

    def call():
        if next(number) % 500 == 499:
            threading.Thread(target=end.wait).start()
        return b""

    problems = short(call).problems()
    end.set()
    assert any(problem.startswith("threads left: ") for problem in problems)


@pytest.mark.nightly
def test_ten_minutes():
    """In a process of its own: its memory is its own."""
    command = [sys.executable, Path(soak.__file__), "600"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
