"""Put the results of `compare.py` into the README, a document of tables and a picture.

    python bench/publish.py [RESULTS.json] [--readme README.md]           write the README's section, .md and .png
    python bench/publish.py [RESULTS.json] [--readme README.md] --check   exit 1 if any is not from RESULTS.json

Without RESULTS.json: the newest one in bench/results. Nothing between the two markers in the README is written by
hand.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tables
import targets
from plot import draw
from report import RESULTS, Report, digest, load, newest

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

#: The rows of the README's table, chosen for what networks use and before anything was measured; the document has
#: all, and losses on other shapes are named below the table.
CASES = (
    "64x64",
    "1x64x56x56",
    "32x64x56x56",
    "64x64x112x112",
    "64x256x28x28",
    "32x512x14x14",
    "64x512x7x7",
    "32x56x56x64-last",
    "32x14x14x512-last",
)


def publish(results: Path, readme: Path) -> None:
    """Write the README's section, and beside the results the document and the picture."""
    report = load(results)
    text = replaced(readme.read_text(encoding="utf-8"), section(report, results, readme))
    draw(report, results.with_suffix(".png"))
    results.with_suffix(".md").write_text(tables.document(report), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")


def stale(results: Path, readme: Path) -> str | None:
    """What does not agree with the results, and how to mend it; None if everything does."""
    report, text = load(results), readme.read_text(encoding="utf-8")
    mend = f"run python bench/publish.py {results.name}, which writes it anew"
    if replaced(text, section(report, results, readme)) != text:
        return f"{readme.name}: the section on speed is not the one of {results.name}; {mend}"
    document = results.with_suffix(".md")
    if not document.exists() or document.read_text(encoding="utf-8") != tables.document(report):
        return f"{document.name}: missing, or not made from {results.name}; {mend}"
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


def section(report: Report, results: Path, readme: Path) -> str:
    """The text between the markers: nbbn against each peer and against the machine, and what was aimed for."""
    measured = {entry["case"] for entry in report["results"]}
    shown = [case for case in CASES if case in measured] or sorted(measured)
    document = _link(results.with_suffix(".md"), readme)
    parts = [
        f"![Throughput against size, by operation and library]({_link(results.with_suffix('.png'), readme)})",
        tables.explanation(report),
        "GB/s are bytes that must move, each array once; the ceiling is a kernel that does nothing but move them (for "
        f"statistics: only reads them). All cases, dtypes and quartiles: [{Path(document).name}]({document}).",
        tables.main(report, shown),
        f"**Losses.** {tables.losses(report, shown)}",
        f"**Targets.** {targets.summary(report)}",
        tables.apart(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _link(path: Path, readme: Path) -> str:
    return Path(os.path.relpath(path, readme.parent)).as_posix()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put the results of compare.py into the README and a picture.")
    parser.add_argument("results", type=Path, nargs="?", default=newest(), help="default: the newest in bench/results")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is stale")
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
