"""Compare nbbn, call by call, with every installed peer and with what the machine's memory allows.

    python bench/compare.py [--output DIR] [--rounds N] [--seconds S] [--cases 32x64x56x56 64x64-float16 ...]
                            [--only throughput host startup memory]

writes everything measured to DIR/<machine>.json and every table to DIR/<machine>.md, and prints what became of the
targets. `bench/publish.py` puts it into the README. Four things are kept apart: throughput, what a call costs on
next to nothing (host), import and compilation (startup), extra memory.
"""

import argparse
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import machine
import memory
import numba
import startup
import tables
import targets
import timing
from cases import CASES, DTYPES, Case
from inputs import Inputs
from operations import OPERATIONS, UnsupportedError, say, settings
from peers import PEERS, Peer, versions
from report import RESULTS, Report, save
from timing import Effort

PARTS = ("throughput", "host", "startup", "memory")

#: Calls with next to no work, and those whose cost for them is worth knowing.
SMALLEST = (Case((1, 1)), Case((64, 64)))
HOSTS = ("nbbn", "nbbn-new", "torch", "torch-new")


def compare(
    cases: Sequence[Case],
    effort: Effort,
    command: str,
    parts: Sequence[str] = PARTS,
    peers: Mapping[str, Peer] = PEERS,
    dtypes: Sequence[str] = DTYPES,
) -> Report:
    few = {name: peer for name, peer in peers.items() if name in HOSTS}
    with settings(peers):
        throughput = entries(cases, effort, peers) if "throughput" in parts else []
        host = entries(SMALLEST, effort, few, with_ceilings=False) if "host" in parts else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": command,
        "rounds": effort.rounds,
        "machine": machine.describe(),
        "versions": versions(peers) | {"numba": numba.__version__, "python": platform.python_version()},
        "labels": {name: peer.label for name, peer in peers.items()},
        "against": {name: peer.against for name, peer in peers.items()},
        "results": throughput,
        "host": host,
        "startup": startup.measure(dtypes) if "startup" in parts else {},
        "memory": memory.measure() if "memory" in parts else [],
    }


def entries(
    cases: Sequence[Case], effort: Effort, peers: Mapping[str, Peer], with_ceilings: bool = True
) -> list[Report]:
    """All operations on all cases, as far as this version of nbbn and what is installed go."""
    found = []
    for case in cases:
        try:
            given = Inputs(case)
        except ModuleNotFoundError as error:
            say(f"left out: {case}: {error}")
            continue
        for operation in OPERATIONS:
            if not operation.takes(case):
                continue
            say(f"{operation.name} of {case}")
            try:
                found.append(timing.measure(operation, given, effort, peers, with_ceilings))
            except UnsupportedError as error:
                say(f"left out: {error}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    usual = Effort()
    parser = argparse.ArgumentParser(description="Compare nbbn with its peers, call by call.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for <machine>.json and .md")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="samples of every contender (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=usual.seconds, help="for one operation and case; ends it early (default: 5)"
    )
    parser.add_argument(
        "--cases", type=Case.parse, nargs="+", default=CASES, help="such as 32x64x56x56 or 32x56x56x64-last-float16"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure (default: all)")
    parser.add_argument(
        "--dtypes", choices=DTYPES, nargs="+", default=DTYPES, help="for import and compilation (default: all)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {chosen.rounds}")

    effort = Effort(chosen.rounds, chosen.seconds, min(usual.least, chosen.rounds))
    report = compare(chosen.cases, effort, _command(chosen, usual), chosen.only, dtypes=chosen.dtypes)
    path = chosen.output / f"{machine.slug(report['machine'])}.json"
    save(report, path)
    path.with_suffix(".md").write_text(tables.document(report), encoding="utf-8")
    print(targets.markdown(report))
    say(f"written: {path} and {path.with_suffix('.md').name}")


def _command(chosen: argparse.Namespace, usual: Effort) -> str:
    """What it takes to measure this again; where the results went does not matter."""
    words = ["python", "bench/compare.py"]
    words += ["--rounds", str(chosen.rounds)] if chosen.rounds != usual.rounds else []
    words += ["--seconds", f"{chosen.seconds:g}"] if chosen.seconds != usual.seconds else []
    words += ["--cases", *(case.id for case in chosen.cases)] if chosen.cases is not CASES else []
    words += ["--only", *chosen.only] if chosen.only is not PARTS else []
    words += ["--dtypes", *chosen.dtypes] if chosen.dtypes is not DTYPES else []
    return shlex.join(words)


if __name__ == "__main__":
    main()
