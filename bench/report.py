"""The results of one run of `compare.py`: a JSON file, and how to find one's way in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Report = dict[str, Any]


def load(path: Path) -> Report:
    return json.loads(path.read_text(encoding="utf-8"))


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def newest(folder: Path = RESULTS) -> Path | None:
    """The results measured last, by the date in them: a checkout does not keep the dates of files."""
    return max(folder.glob("*.json"), key=lambda path: load(path)["date"], default=None)


def digest(report: Report) -> str:
    """Tells whether a plot was drawn from this report; the same for any line ends and spaces in the file."""
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def operations(report: Report) -> list[str]:
    return list(dict.fromkeys(entry["operation"] for entry in report["results"]))


def peers(report: Report) -> dict[str, str]:
    """Everyone that nbbn was compared with: name and label."""
    measured = {name for entry in report["results"] for name in entry["ratios"]}
    return {name: label for name, label in report["labels"].items() if name in measured and not name.startswith("nbbn")}


def times(ratio: float) -> str:
    """A ratio in two digits: 27x, 4.8x, 0.85x."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:#.2g}x"


def conditions(report: Report) -> str:
    """Machine and versions, for a caption."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    threads = f"{about['cores']} cores, {about['threads']} threads ({about['threading_layer']})"
    return f"{about['cpu']}, {threads}, {about['system']}; {versions}"
