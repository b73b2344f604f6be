"""Compare nbbn, call by call, with every installed peer and with what the machine's memory allows.

    python bench/compare.py [--output DIR] [--rounds N] [--shapes 32x64x56x56 32x56x56x64-last ...]

prints a Markdown table and writes everything measured to DIR/<machine>.json, for `bench/publish.py`. A shared
machine drifts by a factor of two within minutes, so nothing is compared across rounds: in each round all contenders
are timed one right after the other, in random order, and a ratio is the median over the rounds of the ratio within
a round.
"""

import argparse
import os
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import cpuinfo
import numba
import numpy as np
from ceilings import ceiling, ceiling_name
from inputs import SHAPES, Inputs, Shape
from llvmlite import binding
from operations import OPERATIONS, PEERS, Operation, prepare, versions
from report import RESULTS, Report, peers, save

import nbbn

#: Seconds a sample takes at least: short calls are repeated, far above the resolution of the clock.
SAMPLE = 2e-3

#: Seconds of untimed calls before a sample: they bring the contender's own threads awake and its own data into
#: cache, and meanwhile the idle threads of the one before, which spin for some milliseconds, go to sleep. Resting
#: instead would time how long the system takes to wake a thread: 6 ms on a machine with a busy neighbour.
WARM_UP = 10e-3

# --- measuring --------------------------------------------------------------------------------------------------


def measure(operation: Operation, given: Inputs, rounds: int) -> Report:
    """One entry of the results: seconds of every contender, and their ratios to nbbn's."""
    contenders: dict[str, Callable[[], object]] = dict(prepare(operation, given))
    contenders[ceiling_name(operation)] = ceiling(operation, given)
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # in a fixed order everyone would always follow the same predecessor
        for name in order:
            samples[name].append(_sample(contenders[name], repeats[name]))
    return {
        "operation": operation.name,
        "shape": given.shape.id,
        "bytes": operation.least_bytes(given),
        "ceiling": ceiling_name(operation),
        "seconds": {name: _quartiles(values) for name, values in samples.items()},
        "ratios": ratios(samples),
    }


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Quartiles over the rounds of everyone's time by nbbn's in the same round: above 1, nbbn is faster."""
    nbbn_seconds = np.array(samples["nbbn"])
    return {name: _quartiles(np.array(values) / nbbn_seconds) for name, values in samples.items() if name != "nbbn"}


def _repeats(call: Callable[[], object]) -> int:
    """Calls a sample, from the second of two calls: the first may compile and touches all memory."""
    call()
    start = time.perf_counter()
    call()
    return max(1, round(SAMPLE / (time.perf_counter() - start)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call."""
    ready = time.perf_counter() + WARM_UP
    call()
    while time.perf_counter() < ready:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    names = ("lower", "median", "upper")
    return {name: float(f"{q:.4g}") for name, q in zip(names, np.percentile(values, [25, 50, 75]), strict=True)}


# --- what was measured, where -----------------------------------------------------------------------------------


def compare(shapes: Sequence[Shape], rounds: int, command: str) -> Report:
    results = []
    for shape in shapes:
        given = Inputs(shape)
        for operation in OPERATIONS:
            print(f"{operation.name} of {shape}", file=sys.stderr)
            results.append(measure(operation, given, rounds))
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": command,
        "rounds": rounds,
        "machine": machine(),  # after the results: the first parallel call decides on the threading layer
        "versions": versions() | {"numba": numba.__version__, "python": platform.python_version()},
        "labels": {name: peer.label for name, peer in PEERS.items()},
        "results": results,
    }


def machine() -> Report:
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = "not started"
    return {
        # the name that LLVM compiles for says more than the brand of a virtual machine
        "cpu": f"{cpuinfo.get_cpu_info().get('brand_raw', platform.machine())} ({binding.get_host_cpu_name()})",
        "cores": os.cpu_count(),
        "threads": nbbn.get_num_threads(),
        "threading_layer": layer,
        "system": platform.system(),
    }


def machine_slug(about: Report) -> str:
    """A file name for this machine: letters, digits and dashes."""
    words = f"{about['cpu']} {about['cores']} cores {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def markdown(report: Report) -> str:
    """The long table: every operation and shape, median and quartiles."""
    rivals = peers(report)
    titles = ["operation", "shape", "MB moved", "nbbn ms", "GB/s", "share of ceiling"]
    titles += [f"times {label}" for label in rivals.values()]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    for entry in report["results"]:
        seconds, ratios = entry["seconds"]["nbbn"], entry["ratios"]
        cells = [
            entry["operation"],
            str(Shape.parse(entry["shape"])),
            f"{entry['bytes'] / 1e6:.3g}",
            _with_quartiles({key: 1e3 * value for key, value in seconds.items()}),
            f"{entry['bytes'] / seconds['median'] / 1e9:.3g}",
            f"{entry['ceiling']} {_with_quartiles(ratios[entry['ceiling']])}",
            *(_with_quartiles(ratios[p]) if p in ratios else "-" for p in rivals),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_quartiles(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['lower']:.3g} to {values['upper']:.3g})"


# --- command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare nbbn with its peers, call by call.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for <machine>.json")
    parser.add_argument("--rounds", type=int, default=15, help="samples of every contender (default: 15)")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="+", default=SHAPES, help="such as 32x64x56x56 or 32x56x56x64-last"
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {chosen.rounds}")

    # what it takes to measure this again; where the results went does not matter
    command = ["python", "bench/compare.py", "--rounds", str(chosen.rounds)]
    if chosen.shapes is not SHAPES:
        command += ["--shapes", *(shape.id for shape in chosen.shapes)]
    report = compare(chosen.shapes, chosen.rounds, shlex.join(command))
    path = chosen.output / f"{machine_slug(report['machine'])}.json"
    save(report, path)
    print(markdown(report))
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
