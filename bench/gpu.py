"""Everything that needs a GPU, in one command of at most ten minutes: `python bench/gpu.py`.

Runs the tests marked gpu, compute-sanitizer on a short set of them where it is installed, compares what nbbn's plans
choose with what they do not, and runs a benchmark against PyTorch, cuDNN, CuPy's formula and a copy on the device.
Writes bench/results/<gpu>.json and <gpu>.md. What is missing (a GPU, a library, a tool) is reported as skipped;
nothing has to be installed but NumPy, Numba and pytest.

Times are medians of CUDA events around repeated calls, on sets of buffers that take turns and together are larger
than the second-level cache three times over; GB/s are bytes that must move, each array once. "host" is the time a
call takes to return, without waiting for the device.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_contenders import (  # noqa: E402
    AT_ONCE,
    CASES,
    OPERATIONS,
    TRAFFIC,
    cache_size,
    contenders,
    host_calls,
    launched_by_numba,
    make_inputs,
)

import nbbn  # noqa: E402
from nbbn.config import describe  # noqa: E402

STEPS = ("tests", "sanitizer", "choices", "benchmark")
TESTS = ("tests/test_cuda_gpu.py", "tests/test_cuda_gpu_launches.py")
SANITIZED = "tests/test_cuda_gpu.py::test_short_set_for_the_sanitizer"


#: Warnings of whatever releases are there must not fail the tests; nothing is written into the tree.
QUIET = ["-W", "default", "-p", "no:cacheprovider"]


class Steps:
    """What was done, and what was not and why."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.results: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds left of all."""
        return self.end - time.monotonic()

    def note(self, name: str, outcome: Any) -> None:
        """Keep and show it."""
        self.results[name] = outcome
        print(f"{name:<14} {outcome}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="time for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results are written")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps to run")
    options = parser.parse_args()
    wanted = options.only
    steps = Steps(options.seconds)
    about = describe()
    has_gpu = "cuda" in nbbn.available_backends()
    for name, value in about.items():
        print(f"{name:<16}{value}")
    failed = False
    if "tests" in wanted:
        failed |= run_tests(steps, has_gpu, min(0.45 * options.seconds, steps.left()))
    if "sanitizer" in wanted:
        failed |= run_sanitizer(steps, has_gpu)
    entries: list[dict[str, Any]] = []
    if "choices" in wanted:
        run_choices(steps, has_gpu)
    if "benchmark" in wanted:
        entries = run_benchmark(steps, has_gpu)
    if has_gpu:
        write(options.out, about, steps.results, entries)
    return int(failed)


def run_tests(steps: Steps, has_gpu: bool, seconds: float) -> bool:
    """The tests marked gpu; without a GPU they say themselves that they are skipped. True if they failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS, *QUIET]
    status, text = _run(command, seconds)
    lines = text.strip().splitlines()
    summary = lines[-1] if lines else "no output"
    steps.note("tests", summary if has_gpu else f"skipped, no GPU: {summary}")
    for line in lines:
        if re.match(r"(FAILED|ERROR)\b", line):
            print("  " + line[:300])
    return status not in (0, 5)


def run_sanitizer(steps: Steps, has_gpu: bool) -> bool:
    """memcheck and racecheck on a few launches of every kernel. True if one found something."""
    program = shutil.which("compute-sanitizer") or _first("/usr/local/cuda*/bin/compute-sanitizer")
    if not has_gpu or program is None:
        steps.note("sanitizer", "skipped, " + ("no compute-sanitizer" if has_gpu else "no GPU"))
        return False
    failed = False
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", SANITIZED]
        status, text = _run([*command, *QUIET], min(75, max(20, steps.left() - 120)))
        found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
        steps.note(tool, f"exit {status}: {found[-1] if found else text.strip()[-200:]}")
        failed |= status == 9
    return failed


def run_choices(steps: Steps, has_gpu: bool) -> None:
    """nbbn against itself: one launch and two, and what a call costs the host by each way."""
    torch = _import("torch")
    if not has_gpu or torch is None or not torch.cuda.is_available():
        steps.note("choices", "skipped, " + ("no PyTorch with CUDA" if has_gpu else "no GPU"))
        return
    for shape in AT_ONCE:
        sets = [make_inputs(torch, shape, False, "float32") for _ in range(6)]
        for operation in ("training", "backward"):
            _, call = next(contenders(torch, operation, sets[0]))
            times: dict[str, list[float]] = {"one launch": [], "two": []}
            for _ in range(3):  # taking turns
                for name, l2_bytes in (("one launch", None), ("two", 0)):
                    with cache_size(l2_bytes):
                        times[name].append(measure(torch, call, sets, 0.05, 5)[0])
            micros = {name: round(1e6 * sorted(t)[1], 2) for name, t in times.items()}
            steps.note(f"{operation} {'x'.join(map(str, shape))}", f"{micros} us")
    calls = host_calls(make_inputs(torch, (8, 64, 14, 14), False, "float32"))
    host: dict[str, list[float]] = {}
    for _ in range(5):
        for by_numba in (True, False):
            with launched_by_numba(by_numba):
                for name, call in calls.items():
                    label = f"{name}, {'by Numba' if by_numba else 'directly'}"
                    host.setdefault(label, []).append(_until_it_returns(torch, call))
    steps.note("host", {name: f"{1e6 * sorted(t)[2]:.1f} us" for name, t in host.items()})


def _until_it_returns(torch: Any, call: Any) -> float:
    """Seconds until a call returns, the queue never full: the median of 100."""
    times = []
    for k in range(105):
        if k % 5 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[5:])[50]


def run_benchmark(steps: Steps, has_gpu: bool) -> list[dict[str, Any]]:
    """Entries of the results, until the time is up."""
    torch = _import("torch")
    if not has_gpu or torch is None or not torch.cuda.is_available():
        steps.note("benchmark", "skipped, " + ("no PyTorch with CUDA" if has_gpu else "no GPU"))
        return []
    entries: list[dict[str, Any]] = []
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for shape, last, dtype in CASES:
        if steps.left() < 20:
            steps.note("benchmark", f"out of time after {len(entries)} entries")
            return entries
        given = make_inputs(torch, shape, last, dtype)
        one = given.x.numel() * given.x.element_size()
        sets = [given] + [
            make_inputs(torch, shape, last, dtype) for _ in range(min(15, max(1, -(-3 * cache // (2 * one)))))
        ]
        copy = measure(torch, lambda s: s.out.copy_(s.x), sets)
        for operation in OPERATIONS:
            entry: dict[str, Any] = {
                "shape": shape, "channels_last": last, "dtype": dtype, "operation": operation,
                "bytes": TRAFFIC[operation] * one, "sets": len(sets),
                "copy_GB/s": TRAFFIC["copy"] * one / copy[0] / 1e9,
                "seconds": {}, "host_seconds": {}, "skipped": {},
            }  # fmt: skip
            calls = contenders(torch, operation, given)
            while True:
                name = "?"
                try:
                    name, call = next(calls)
                    entry["seconds"][name], entry["host_seconds"][name] = measure(torch, call, sets)
                except StopIteration:
                    break
                except Exception as error:  # a library that cannot do this must not stop the others
                    entry["skipped"][name] = f"{type(error).__name__}: {str(error)[:200]}"
                    if name == "?":
                        break
            entries.append(entry)
            print(row(entry), flush=True)
        del given, sets
        torch.cuda.empty_cache()
    steps.note("benchmark", f"{len(entries)} entries")
    return entries


def measure(torch: Any, call: Any, sets: list[Any], seconds: float = 0.12, samples: int = 9) -> tuple[float, float]:
    """(seconds a call on the device, seconds until a call returns): medians, buffers taking turns."""
    for given in sets[:3]:
        call(given)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(sets[0])
    torch.cuda.synchronize()
    repeats = max(len(sets), min(200, int(seconds / samples / max(1e-6, time.perf_counter() - start))))
    device, host = [], []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for k in range(repeats):
            call(sets[k % len(sets)])
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end) / 1e3 / repeats)
        before = time.perf_counter()
        for k in range(8):  # few, so that the queue never fills
            call(sets[k % len(sets)])
        host.append((time.perf_counter() - before) / 8)
        torch.cuda.synchronize()
    return sorted(device)[samples // 2], sorted(host)[samples // 2]


HEAD = (
    "| operation | x | nbbn us | nbbn GB/s | of copy | PyTorch | cuDNN | CuPy formula "
    "| host us, nbbn | host us, PyTorch |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row(entry: dict[str, Any]) -> str:
    """One line of the table; columns of others: their time by ours, below 1x nbbn is the slower one."""
    mine = entry["seconds"].get("nbbn")
    what = f"{entry['operation']} | {entry['shape']}" + (" channels-last" if entry["channels_last"] else "")
    what += "" if entry["dtype"] == "float32" else f" {entry['dtype']}"
    if mine is None:
        return f"| {what} | failed: {entry['skipped'].get('nbbn', 'not run')} | | | | | | | |"
    rate = entry["bytes"] / mine / 1e9
    others = [entry["seconds"].get(name) for name in ("PyTorch", "cuDNN", "CuPy formula")]
    ratios = " | ".join("" if t is None else f"{t / mine:.2f}x" for t in others)
    host = [entry["host_seconds"].get(name) for name in ("nbbn", "PyTorch")]
    hosts = " | ".join("" if t is None else f"{t * 1e6:.1f}" for t in host)
    return f"| {what} | {mine * 1e6:.1f} | {rate:.0f} | {rate / entry['copy_GB/s']:.0%} | {ratios} | {hosts} |"


def write(folder: Path, about: dict[str, str], outcomes: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Results as JSON, and as a table for people."""
    name = re.sub(r"[^a-z0-9]+", "-", about["gpu"].partition(",")[0].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    libraries = {}
    for library in ("torch", "cupy", "numba_cuda"):
        module = _import(library)
        libraries[library] = getattr(module, "__version__", None)
    result = {"about": about, "libraries": libraries, "steps": outcomes, "entries": entries}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"# {about['gpu']}", "", "By `python bench/gpu.py`; ratios above 1x: nbbn is faster.", "", HEAD]
    lines += [row(entry) for entry in entries]
    lines += ["", *(f"- {step}: {outcome}" for step, outcome in outcomes.items())]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"written: {folder / name}.json and .md")


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return 124, f"{said}\ntimed out after {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


def _first(pattern: str) -> str | None:
    found = sorted(Path("/").glob(pattern.lstrip("/")))
    return str(found[-1]) if found else None


if __name__ == "__main__":
    sys.exit(main())
