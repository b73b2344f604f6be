"""What the first call costs: import, loading compiled kernels, compiling them, and how many there are.

Everything runs in processes of its own, on a copy of the package without any compiled kernel, with folders of its
own for new ones.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from cases import DTYPES
from operations import OPERATIONS, say
from timing import quartiles

import nbbn

ROUNDS = 15

#: Processes that each first call is measured in: one alone may come at a bad moment.
PROCESSES = 3

IMPORTS = {"numba, numpy": "import numba, numpy", "nbbn": "import nbbn"}

#: One call of each public function that compiles something, and the operation that has its dtypes.
CALLS = {
    "batch_stats": ("nbbn.batch_stats(x)", "statistics"),
    "normalize": ("nbbn.normalize(x, v[0], v[1], out=y)", "evaluation"),
    "batch_norm, evaluation": ("nbbn.batch_norm(x, *v, out=y)", "evaluation"),
    "batch_norm, training": ("nbbn.batch_norm(x, *v, training=True, out=y)", "training"),
    "batch_norm_backward": ("nbbn.batch_norm_backward(x, x, v[0], v[1], out=y)", "backward"),
    "ema_update": ("nbbn.ema_update(v[0], v[1], stats)", None),
    "Moments +": ("stats + stats", None),
}

_TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"

_GIVEN = """
import numpy as np, nbbn, time
if "{dtype}" == "bfloat16":
    import ml_dtypes
dtype = np.dtype("{dtype}")
x = np.ones({dims}, dtype)
y = np.ones({dims}, np.float32 if dtype.kind == "u" else dtype)
v = np.ones((4, x.shape[1]), np.float32)
stats = nbbn.Moments(np.full(x.shape[1], 2), np.ones(x.shape[1]), np.ones(x.shape[1]))
try:
    start = time.perf_counter()
    {call}
    print(time.perf_counter() - start)
except TypeError:
    if dtype in (np.float32, np.float64):
        raise
    print("unsupported")
"""


_WARM_UP = "import sys; from nbbn import __main__; sys.exit(__main__.main({arguments}))"


def measure(
    dtypes: Sequence[str] = DTYPES, dims: tuple[int, ...] = (32, 64, 28, 28), rounds: int = ROUNDS
) -> dict[str, Any]:
    """Import times, first calls and the number of kernels."""
    return {"import": imports(rounds), "first_calls": first_calls(dtypes, dims), "kernels": kernels(dtypes)}


def imports(rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of each import in a new process, taking turns, and the ratio within a round."""
    samples = {name: [] for name in IMPORTS}
    with _fresh_package() as environment:
        for _ in range(rounds):
            for name, code in IMPORTS.items():
                samples[name].append(float(_python(_TIMED.format(code), environment)))
    base, ours = samples.values()
    ratio = [mine / theirs for mine, theirs in zip(ours, base, strict=True)]
    return {"seconds": {name: quartiles(values) for name, values in samples.items()}, "ratio": quartiles(ratio)}


def first_calls(dtypes: Sequence[str], dims: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds of each function's first call, nothing compiled before, and again in the next process: medians."""
    takes = {operation.name: operation.dtypes for operation in OPERATIONS}
    found = []
    with _fresh_package() as environment:
        for function, (call, operation) in CALLS.items():
            for dtype in dtypes:
                if dtype not in (takes[operation] if operation else ("float32",)):
                    continue
                say(f"first call of {function}, {dtype}")
                code = _GIVEN.format(dtype=dtype, dims=dims, call=call)
                seconds = [_first_and_second(code, environment) for _ in range(PROCESSES)]
                if "unsupported" not in seconds[0]:
                    uncached, cached = (median(map(float, each)) for each in zip(*seconds, strict=True))
                    found.append(
                        {"function": function, "dtype": dtype, "uncached": _round(uncached), "cached": _round(cached)}
                    )
    return found


def _first_and_second(code: str, environment: dict[str, str]) -> tuple[str, str]:
    """What `code` prints in a process that compiles, and in one that finds everything compiled."""
    with TemporaryDirectory() as cache:
        first, second = (_python(code, environment | {"NUMBA_CACHE_DIR": cache}) for _ in range(2))
    return first, second


def kernels(dtypes: Sequence[str]) -> dict[str, Any]:
    """How many kernels `python -m nbbn warmup` compiles, and their bytes on disk."""
    with _fresh_package() as environment, TemporaryDirectory() as cache:
        say(f"all kernels, {', '.join(dtypes)}")
        arguments = ["warmup", *(word for dtype in dtypes for word in ("--dtype", dtype))]
        _python(_WARM_UP.format(arguments=arguments), environment | {"NUMBA_CACHE_DIR": cache})
        files = list(Path(cache).rglob("*.nbc"))
        size = sum(file.stat().st_size for file in files)
        return {"number": len(files), "bytes": size, "dtypes": list(dtypes)}


@contextmanager
def _fresh_package() -> Iterator[dict[str, str]]:
    """Environment of a process that imports a copy of nbbn with Python's bytecode, as installed, and no kernels."""
    with TemporaryDirectory() as folder:
        source = Path(nbbn.__file__).parent
        shutil.copytree(source, Path(folder) / "nbbn", ignore=shutil.ignore_patterns("__pycache__"))
        environment = os.environ | {"PYTHONPATH": folder, "XDG_CACHE_HOME": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        _python("import nbbn, nbbn.cpu", environment)  # Python compiles its own files
        yield environment


def _python(code: str, environment: Any) -> str:
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    if run.returncode:
        if "ModuleNotFoundError: No module named 'ml_dtypes'" in run.stderr:
            return "unsupported"
        raise RuntimeError(f"a measured process failed:\n{code}\n{run.stderr}")
    return run.stdout.strip()


def _round(seconds: float) -> float:
    return float(f"{seconds:.4g}")
