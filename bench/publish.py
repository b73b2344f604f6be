"""Put the results of `compare.py` into the README and a plot.

    python bench/publish.py [RESULTS.json] [--readme README.md]           write the README's section and the plot
    python bench/publish.py [RESULTS.json] [--readme README.md] --check   exit 1 if either is not from RESULTS.json

Without RESULTS.json: the newest one in bench/results. Nothing between the two markers in the README is written by
hand.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from inputs import Shape
from plot import draw
from report import RESULTS, Report, conditions, digest, entries, load, newest, operations, peers, shapes, times

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def publish(results: Path, readme: Path) -> None:
    """Write the README's section and the plot beside the results."""
    report = load(results)
    text = replaced(readme.read_text(encoding="utf-8"), section(report, _link(results, readme)))
    draw(report, results.with_suffix(".png"))
    readme.write_text(text, encoding="utf-8")


def stale(results: Path, readme: Path) -> str | None:
    """What does not agree with the results, and how to mend it; None if everything does."""
    report, text = load(results), readme.read_text(encoding="utf-8")
    mend = f"run python bench/publish.py {results.name}, which writes it anew"
    if replaced(text, section(report, _link(results, readme))) != text:
        return f"{readme.name}: the section on speed is not the one of {results.name}; {mend}"
    picture = results.with_suffix(".png")
    if not picture.exists() or digest(report).encode() not in picture.read_bytes():
        return f"{picture.name}: missing, or not drawn from {results.name}; {mend}"
    return None


def replaced(readme: str, new_section: str) -> str:
    """The README's text with a new section between the markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README: expected a line {BEGIN} and after it a line {END}, got a text without them")
    return f"{head}{begin}\n{new_section}\n{end}{tail}"


def section(report: Report, picture: str) -> str:
    """The text between the markers: nbbn against each peer, and against the machine."""
    rivals, measured = peers(report), entries(report)
    parts = [
        f"![Times nbbn is faster than {' and '.join(rivals.values())}, by operation and shape]({picture})",
        f"float32 on {conditions(report)}. In each of {report['rounds']} rounds all contenders take turns; a figure "
        "is the median over the rounds of the ratio within a round. Results are checked against each other before "
        "they are timed, and go to memory allocated beforehand. Below 1x nbbn is the slower one.",
    ]
    for name, label in rivals.items():
        ratios = {key: entry["ratios"][name] for key, entry in measured.items() if name in entry["ratios"]}
        cells = {key: times(ratio["median"]) for key, ratio in ratios.items()}
        parts += [f"**Speed-up over {label}**", _table(report, cells)]
    parts += [
        "**Speed, and share of what the memory allows.** Bytes are those that must move, each array once. The share "
        "is of the speed of a kernel that does nothing but move them (for statistics: only reads them).",
        _table(report, {key: _throughput(entry) for key, entry in measured.items()}),
        f"Measured {report['date'][:10]} with `{report['command']}`; all figures with their quartiles are in the JSON "
        "file beside the picture.",
    ]
    return "\n\n".join(parts)


def _table(report: Report, cells: dict[tuple[str, str], str]) -> str:
    columns = operations(report)
    lines = [f"| shape | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for shape in shapes(report):
        row = " | ".join(cells.get((operation, shape), "-") for operation in columns)
        lines.append(f"| {Shape.parse(shape)} | {row} |")
    return "\n".join(lines)


def _throughput(entry: Report) -> str:
    speed = entry["bytes"] / entry["seconds"]["nbbn"]["median"] / 1e9
    return f"{speed:.3g} GB/s, {entry['ratios'][entry['ceiling']]['median']:.0%}"


def _link(results: Path, readme: Path) -> str:
    return Path(os.path.relpath(results.with_suffix(".png"), readme.parent)).as_posix()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put the results of compare.py into the README and a plot.")
    parser.add_argument("results", type=Path, nargs="?", default=newest(), help="default: the newest in bench/results")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README or plot are stale")
    chosen = parser.parse_args(arguments)
    if chosen.results is None:
        parser.error("no results in bench/results: run python bench/compare.py first")
    try:
        if not chosen.check:
            publish(chosen.results, chosen.readme)
        elif problem := stale(chosen.results, chosen.readme):
            sys.exit(problem)
    except ValueError as error:  # no markers
        sys.exit(str(error))


if __name__ == "__main__":
    main()
