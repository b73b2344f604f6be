"""Compiled kernels on disk: stale ones, places that cannot be written, processes that start together, warming up."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import nbbn
from nbbn import warmup
from nbbn.cpu import saved, threads

PACKAGE = Path(nbbn.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in [PACKAGE / "formulas.py", *PACKAGE.glob("cpu/*.py")])

CALL = """
import numpy as np, nbbn
m = nbbn.Moments(np.array([2]), np.array([2.0]), np.array([2.0]))
mean = (m + m).mean[0]
from nbbn.cpu import saved
print(mean, saved.tally["compiled"], saved.tally["loaded"])
"""


def start(code, **environment):
    """A process of its own, that imports nothing from where the tests were started."""
    environment = {key: value for key, value in (os.environ | environment).items() if value is not None}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd="/", env=environment)


def printed(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out.split()


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "nbbn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "nbbn"


@pytest.fixture
def empty(copied, tmp_path):
    """An environment with an empty place for kernels, and a package that has none beside it."""
    (tmp_path / "cache").mkdir()
    return {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(copied.parent)}


@pytest.mark.parametrize("edited", SOURCES)
def test_editing_any_file_that_kernels_are_made_of_makes_them_stale(copied, monkeypatch, edited):
    """That another stamp means another kernel is tested end to end in `test_package`."""
    monkeypatch.setattr(saved, "_PACKAGE", copied)
    before = saved._stamp.__wrapped__()
    assert before == saved._stamp.__wrapped__()
    (copied / edited).write_text((copied / edited).read_text() + "#\n")
    assert saved._stamp.__wrapped__() not in (before, None)


def test_kernels_are_made_of_no_other_file(copied, monkeypatch):
    """Compiled code must come from the files that are looked at: nothing else of the package is imported there."""
    for path in (copied / "cpu").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("from nbbn", "import nbbn")):
                assert line.startswith(("from nbbn.cpu", "from nbbn import formulas")), f"{path.name}: {line}"


@pytest.mark.parametrize("home", [None, "/dev/null"])
def test_no_place_to_write_and_no_home(copied, home):
    (copied / "__pycache__").write_text("a file where a folder would be")
    options = {"NUMBA_CACHE_DIR": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONDONTWRITEBYTECODE": "1"}
    process = start(CALL, PYTHONPATH=str(copied.parent), HOME=home, **options)
    assert printed(process) == ["2.0", "1", "0"]


def test_processes_that_start_at_once_on_an_empty_cache(empty, tmp_path):
    for process in [start(CALL, **empty) for _ in range(8)]:
        assert printed(process)[0] == "2.0"
    assert printed(start(CALL, **empty)) == ["2.0", "0", "1"], "the ninth compiles nothing"
    files = (tmp_path / "cache").rglob("*")
    assert not [path for path in files if path.is_file() and path.suffix != ".nbc"], "nothing left over"


def test_package_in_a_zip_file(tmp_path, copied):
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as archive:
        for path in copied.rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    shutil.rmtree(copied)
    environment = {"PYTHONPATH": str(tmp_path / "lib.zip"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert printed(start("import nbbn; print(nbbn.__file__)" + CALL, **environment))[1:] == ["2.0", "1", "0"]


def test_without_the_compiler_the_error_names_the_way_out():
    code = """
import numpy as np, nbbn
try:
    nbbn.batch_stats(np.ones((4, 3)))
except RuntimeError as error:
    print("NUMBA_DISABLE_JIT" in str(error) and 'nbbn.use_backend("numpy")' in str(error))
with nbbn.use_backend("numpy"):
    print(nbbn.batch_stats(np.ones((4, 3))).mean.tolist() == [1, 1, 1])
"""
    assert printed(start(code, NUMBA_DISABLE_JIT="1", PYTHONPATH=str(PACKAGE.parent))) == ["True", "True"]


def test_kernels_that_nobody_used_for_a_month_are_removed(empty, tmp_path):
    month = time.time() - 31 * 86400
    kernels = tmp_path / "cache" / "nbbn-kernels"
    for name, when in (("old", month), ("recent", month + 2 * 86400)):
        (kernels / name).mkdir(parents=True)
        os.utime(kernels / name, (when, when))
    printed(start(CALL, **empty))
    left = {path.name for path in kernels.iterdir()}
    assert "old" not in left
    assert "recent" in left
    assert len(left) == 2


def test_loading_marks_kernels_as_used(empty, tmp_path):
    printed(start(CALL, **empty))
    (folder,) = (tmp_path / "cache" / "nbbn-kernels").iterdir()
    os.utime(folder, (1, 1))
    printed(start(CALL, **empty))
    assert folder.stat().st_mtime > 1


# --- python -m nbbn warmup --------------------------------------------------------------------------------------------

#: The command, with only what every dtype shares to compile.
WARMUP = """
import sys
from nbbn import __main__, warmup
warmup.SHAPES = ()
sys.exit(__main__.main(["warmup"]))
"""


def test_warmup_compiles_saves_and_says_where(empty, tmp_path):
    first = " ".join(printed(start(WARMUP, **empty)))
    number = len(list((tmp_path / "cache").rglob("*.nbc")))
    assert first.startswith(f"{number} kernels compiled, 0 were there: ")
    assert f"MB in {tmp_path / 'cache'}" in first
    assert " ".join(printed(start(WARMUP, **empty))).startswith(f"all {number} kernels were there: ")


def test_warmup_that_can_save_nothing_fails(copied):
    (copied / "__pycache__").write_text("")
    options = {"NUMBA_CACHE_DIR": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONDONTWRITEBYTECODE": "1"}
    process = start(WARMUP, PYTHONPATH=str(copied.parent), **options)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "could not be saved" in err
    assert "NUMBA_CACHE_DIR" in err


def test_warmup_covers_every_dtype_it_is_asked_for():
    one, two = (len(list(warmup.calls(dtypes))) for dtypes in (["uint8"], ["uint8", "float16"]))
    shared = len(list(warmup.calls([])))
    assert two - shared == 2 * (one - shared) > 0


def test_small_work_can_pretend_to_be_worth_threads():
    for parallel in (True, False):
        with threads.pretend(parallel):
            assert threads.worth(1) == 1 + parallel
    assert threads.worth(1) == 1


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    steps = [lambda: None] * 20
    assert warmup._shown(steps) is steps
    assert list(warmup._lines(steps)) == steps
    assert capsys.readouterr().out.count("%") == 10


@pytest.mark.slow
def test_after_the_warmup_calls_compile_nothing():
    """For float32; both layouts, long and short rows, few and many channels, little work and enough for threads."""
    for call in warmup.calls(["float32"]):
        with np.errstate(all="ignore"):
            call()
    before = dict(saved.tally)
    for shape in ((9, 4), (70000, 4), (2, 3, 300), (2, 40, 300, 20), (4, 1, 300, 300), (64, 64, 7, 7), (128, 64, 7, 7)):
        for axis in (1, -1):
            x = np.ones(shape, np.float32)
            v = np.ones((4, x.shape[axis]), np.float32)
            nbbn.batch_stats(x, axis=axis)
            nbbn.batch_norm(x, *v, axis=axis, residual=x, activation="relu")
            nbbn.batch_norm(x, *v, training=True, axis=axis)
            for training in (True, False):
                nbbn.batch_norm_backward(x, x, v[0], v[1], v[2], axis=axis, training=training)
    assert saved.tally == before
