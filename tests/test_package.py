"""What importing does, what is public, what is documented, and that no stale kernel is ever run."""

import doctest
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbbn

MODULES = [m.name for m in pkgutil.walk_packages(nbbn.__path__, "nbbn.") if not m.name.endswith("__main__")]
PUBLIC = {name: getattr(nbbn, name) for name in nbbn.__all__}
METHODS = {
    f"{cls.__name__}.{name}": member
    for cls in (nbbn.BatchNorm, nbbn.Drift, nbbn.Moments, nbbn.PendingUpdate)
    for name, member in inspect.getmembers(cls, callable)
    if not name.startswith("_")
}


def python(code, folder=None, **environment):
    """Run code in a process of its own, started in `folder`: what lies there is imported first."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=300
    )


def test_import_pulls_in_no_cuda_and_no_optional_library():
    run = python(
        "import sys, numba, numpy; before = set(sys.modules); import nbbn; new = set(sys.modules) - before;"
        "optional = {'torch', 'jax', 'cupy', 'dask', 'sklearn', 'matplotlib', 'rich', 'scipy', 'numba_cuda'};"
        "print(sorted(optional & new), [m for m in new if m.startswith('numba.cuda')])"
    )
    assert run.stdout.split() == ["[]", "[]"], run.stdout + run.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs an optional library: {error.name}")
    before = nbbn.get_num_threads()
    result = doctest.testmod(module)
    nbbn.set_num_threads(before)
    assert result.failed == 0


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_public_docstrings_are_complete(name):
    member = {**PUBLIC, **METHODS}[name]
    text = inspect.getdoc(member)
    assert text
    if inspect.isclass(member) and issubclass(member, Warning):
        return
    assert ">>> " in text, "an example that runs"
    signature = inspect.signature(member)
    names = [p for p in signature.parameters if p not in ("self", "cls")]
    assert ("Parameters" in text) == bool(names)
    for parameter in names:
        assert parameter.lstrip("*") in text.partition("Parameters")[2], f"{parameter} is not described"
    if not inspect.isclass(member) and signature.return_annotation not in (None, "None"):
        assert "Returns" in text or "Iterator" in str(signature.return_annotation)
    arithmetic = {"batch_stats", "normalize", "ema_update", "batch_norm", "batch_norm_backward"}
    if name in arithmetic:
        for part in ("Raises", "Notes", ".. math::", "shape (C,)" if name != "batch_stats" else "shape (..., C, ...)"):
            assert part in text
        assert "Ioffe & Szegedy" in text or "Chan" in text, "the source"


def test_version_and_type_marker():
    from importlib.metadata import version

    assert version("nbbn") == nbbn.__version__
    assert (Path(nbbn.__file__).parent / "py.typed").exists()


def test_show_config_says_what_a_bug_report_needs(capsys):
    nbbn.show_config()
    text = capsys.readouterr().out
    for word in (
        "nbbn",
        "numba",
        "llvmlite",
        "numpy",
        "python",
        "cpu",
        "threads",
        "threading layer",
        "backends",
        "gpu",
    ):
        assert word in text


def test_set_num_threads_leaves_numba_alone(threads):
    import numba

    before = numba.get_num_threads()
    nbbn.set_num_threads(1)
    nbbn.batch_stats(np.zeros((200_000, 2), np.float32))
    assert numba.get_num_threads() == before
    assert nbbn.get_num_threads() == 1


# --- the cache of compiled kernels ----------------------------------------------------------------------------------

CALL = """
import numpy as np, nbbn, nbbn.cpu.channels as c
m = nbbn.Moments(np.array([2]), np.array([2.0]), np.array([2.0]))
print((m + m).mean[0], sum(c.merge._compiled.stats.cache_hits.values()))
"""


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package that a subprocess can import and a test may edit."""
    source = Path(nbbn.__file__).parent
    shutil.copytree(source, tmp_path / "lib" / "nbbn", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"folder": tmp_path / "lib", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    return tmp_path / "lib" / "nbbn", environment


def test_kernels_are_cached_and_an_edited_helper_makes_them_stale(copied_package):
    package, environment = copied_package
    assert python(CALL, **environment).stdout.split() == ["2.0", "0"]
    assert python(CALL, **environment).stdout.split() == ["2.0", "1"], "the second process loads"
    formulas = package / "formulas.py"
    stat = formulas.stat()
    edited = formulas.read_text().replace("mean = mean_a + delta", "mean = 1.0 + mean_a + delta")
    assert edited != formulas.read_text()
    formulas.write_text(edited)
    os.utime(formulas, (stat.st_atime, stat.st_mtime))
    run = python(CALL, **environment, PYTHONDONTWRITEBYTECODE="1")
    assert run.stdout.split() == ["3.0", "0"], run.stderr


def test_without_a_writable_place_kernels_compile_every_time(copied_package):
    package, environment = copied_package
    (package / "__pycache__").write_text("a file where a folder would be")
    blocked = package / "blocked"
    blocked.write_text("")
    environment |= {"NUMBA_CACHE_DIR": str(blocked), "XDG_CACHE_HOME": str(blocked), "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        run = python(CALL, **environment)
        assert run.stdout.split() == ["2.0", "0"], run.stderr


def test_kernels_in_a_place_that_cannot_be_written_are_used(copied_package, tmp_path):
    """As in an image: compiled when it was built, run by someone who may only read."""
    package, environment = copied_package
    environment["NUMBA_CACHE_DIR"] = ""
    python(CALL, **environment)
    assert list((package / "__pycache__").rglob("*.nbc"))
    user_cache = tmp_path / "user"
    for path in [package / "__pycache__", *(package / "__pycache__").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    run = python(CALL, **environment, XDG_CACHE_HOME=str(user_cache), PYTHONDONTWRITEBYTECODE="1")
    assert run.stdout.split() == ["2.0", "1"], run.stderr
    assert not user_cache.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:]])
def test_a_damaged_cache_entry_is_compiled_again(copied_package, damage):
    _, environment = copied_package
    python(CALL, **environment)
    entries = list(Path(environment["NUMBA_CACHE_DIR"]).rglob("*.nbc"))
    assert entries
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
    run = python(CALL, **environment)
    assert run.stdout.split() == ["2.0", "0"], run.stderr


def test_threads_that_meet_a_new_kernel_together(copied_package):
    _, environment = copied_package
    code = """
import threading, numpy as np, nbbn
x = np.arange(12, dtype=np.float32).reshape(4, 3)
barrier, results = threading.Barrier(4), []
def work():
    barrier.wait()
    results.append(nbbn.batch_stats(x).mean.tolist())
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(results == [[4.5, 5.5, 6.5]] * 4)
"""
    run = python(code, **environment)
    assert run.stdout.split() == ["True"], run.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_idle_openmp_threads_sleep_soon_unless_the_user_says_otherwise(settings, expected, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # the benchmarks' tests may have set it for this process
    code = """
import os, numpy as np, nbbn, numba
before = dict(os.environ)
nbbn.batch_stats(np.zeros((200_000, 2), np.float32))
assert dict(os.environ) == before
print(numba.threading_layer())
"""
    run = python(code, OMP_DISPLAY_ENV="verbose", **settings)
    assert run.returncode == 0, run.stderr
    if run.stdout.split() != ["omp"] or "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("the threading layer is not GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{expected}'" in run.stderr


THREADS = """
import threading, numpy as np, nbbn
x = np.arange(600_000, dtype=np.float32).reshape(-1, 2) % 7
expected, ok = nbbn.batch_stats(x), []
def work():
    for _ in range(20):
        ok.append(bool((nbbn.batch_stats(x) == expected).all()))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(ok), all(ok))
"""

FORK = """
import multiprocessing, sys, numpy as np, nbbn
def mean(n):
    return nbbn.batch_stats(np.full((n, 2), 3.0, np.float32)).mean.tolist()
if __name__ == "__main__":
    mean(200_000)
    print(nbbn.get_num_threads() > 0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map_async(mean, [200_000] * 4).get(60) == [[3.0, 3.0]] * 4)
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_python_threads_and_forked_workers(layer, tmp_path):
    """Numba's workqueue aborts the process in the first case, GNU OpenMP kills the children in the second."""
    run = python(THREADS, NUMBA_THREADING_LAYER=layer)
    if "No threading layer could be loaded" in run.stderr:
        pytest.skip(f"this machine has no {layer}")
    assert run.stdout.split() == ["80", "True"], run.stderr
    script = tmp_path / "fork.py"
    script.write_text(FORK)
    run = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", NUMBA_THREADING_LAYER=layer)
    assert run.stdout.split() == ["True", "True"], run.stderr


def test_asking_for_the_number_of_threads_starts_none():
    code = "import nbbn, numba; nbbn.get_num_threads(); print(nbbn.cpu.threads._layer)"
    assert python(code).stdout.split() == ["None"]
