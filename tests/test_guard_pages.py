"""No kernel touches a byte that is not its own: see `guards`, which runs in a process that may die of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect as Linux has it")

#: A share of the cases every time, all of them every night: `pytest -m nightly`.
GROUPS = [("lengths", 7), ("alignments float32", 29), ("alignments float16", 61), ("alignments uint8", 67)]


def guarded(group, share, log, **environment):
    """Run a group; a line with what happened and, if it went wrong, at which case."""
    log.write_bytes(bytes(4096))
    group, *arguments = group.split(" ", 1)
    command = [sys.executable, Path(__file__).with_name("guards.py"), log, group, str(share), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=3600)
    where = log.read_bytes()[:256].decode().strip(" \0")
    if run.returncode < 0:
        return f"{signal.Signals(-run.returncode).name} at {where}"
    return run.stdout.strip() if run.returncode == 0 else f"{where}\n{run.stderr[-2000:]}"


def assert_ran(result, least):
    assert result.isdigit(), result
    assert int(result) >= least
    print(f"{result} cases")


@pytest.mark.parametrize("kind", ["read after", "write before"])
def test_the_pages_kill(kind, tmp_path):
    assert guarded(f"planted {kind}", 1, tmp_path / "log") == f"SIGSEGV at planted: {kind}"


@pytest.mark.slow
@pytest.mark.parametrize(("group", "share"), GROUPS, ids=lambda value: str(value).replace(" ", "-"))
def test_some_of_every_layout_length_and_alignment(group, share, tmp_path):
    assert_ran(guarded(group, share, tmp_path / "log"), 3000)


def test_misaligned_arrays(tmp_path):
    assert_ran(guarded("misaligned", 1, tmp_path / "log"), 128)


@pytest.mark.nightly
@pytest.mark.parametrize("group", [group for group, _ in GROUPS], ids=lambda value: value.replace(" ", "-"))
def test_every_layout_length_and_alignment(group, tmp_path):
    assert_ran(guarded(group, 1, tmp_path / "log"), 100_000)
