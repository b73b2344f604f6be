"""The speeds nbbn set out to reach, and what a report says about each.

A row counts by its worst figure: one shape below the aim, and it is missed. Above 1x the peer is slower. A row
without figures (peer or dtype not measured) is neither met nor missed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cases import Case
from report import Report

Figures = dict[str, float]

#: Values below which a call is small: its cost is that of being called, and small shapes have rows of their own.
SMALL = 262_144


@dataclass(frozen=True)
class Target:
    """`figures` of a report, and the least or the most that each may be."""

    what: str
    figures: Callable[[Report], Figures]
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    @property
    def aim(self) -> str:
        return f">= {self.least:g}{self.unit}" if self.most is None else f"<= {self.most:g}{self.unit}"

    def worst(self, report: Report) -> tuple[str, float] | None:
        """Where it is furthest from the aim, and the figure there."""
        figures = self.figures(report).items()
        choose = max if self.most is not None else min
        return choose(figures, key=lambda item: item[1], default=None)

    def fulfils(self, figure: float) -> bool:
        return figure >= self.least if self.most is None else figure <= self.most

    def met(self, report: Report) -> bool | None:
        worst = self.worst(report)
        return None if worst is None else self.fulfils(worst[1])


# --- figures of the main part ---------------------------------------------------------------------------------------

Filter = Callable[[Case, Report, Report], bool]


def ratio(operation: str | tuple[str, ...], contender: str, *filters: Filter, dtype: str = "float32"):
    """Medians of a contender's ratio on the cases that pass all filters. "ceiling" is the faster of the two."""

    def figures(report: Report) -> Figures:
        found = {}
        for entry in report["results"]:
            case = Case.parse(entry["case"])
            name = entry["ceiling"] if contender == "ceiling" else contender
            wanted = entry["operation"] in operation and case.dtype == dtype and name in entry["ratios"]
            if wanted and all(passes(case, entry, report) for passes in filters):
                found[f"{entry['operation']} {case}"] = entry["ratios"][name]["median"]
        return found

    return figures


def beyond_cache(case: Case, entry: Report, report: Report) -> bool:
    """Whether the result is larger than the last-level cache."""
    itemsize = {"float16": 2, "bfloat16": 2, "float64": 8}.get(case.dtype, 4)
    return entry["values"] * itemsize > report["machine"]["last_level_cache"]


def not_small(case: Case, entry: Report, report: Report) -> bool:
    return entry["values"] >= SMALL


def channels_first(case: Case, entry: Report, report: Report) -> bool:
    return case.axis == 1


def channels_last(case: Case, entry: Report, report: Report) -> bool:
    return case.axis == -1


def ten_megabytes(case: Case, entry: Report, report: Report) -> bool:
    return entry["values"] * 4 >= 10e6


def only(*ids: str) -> Filter:
    return lambda case, entry, report: case.id in ids


# --- figures of the other parts ---------------------------------------------------------------------------------


def import_ratio(report: Report) -> Figures:
    startup = report["startup"]
    return {"import nbbn": startup["import"]["ratio"]["median"]} if startup else {}


def first_call(kind: str):
    def figures(report: Report) -> Figures:
        calls: Iterable[Report] = report["startup"].get("first_calls", [])
        return {f"{call['function']}, {call['dtype']}": call[kind] for call in calls}

    return figures


def extra_memory(report: Report) -> Figures:
    return {f"{e['operation']} {Case.parse(e['case'])}": e["peak_extra_bytes"] / 1e6 for e in report["memory"]}


# --- the table ------------------------------------------------------------------------------------------------------

_HALF = tuple(
    Target(
        f"{dtype}, result beyond caches: elements a second against float32",
        ratio(("statistics", "training", "evaluation"), "nbbn-float32", beyond_cache, dtype=dtype),
        1.6,
    )
    for dtype in ("float16", "bfloat16")
)

#: Where both can, results go to memory allocated before. PyTorch's backward pass and oneDNN cannot: there both
#: sides return new arrays. "Every shape" is meant; other rows leave out what is small.
TARGETS = (
    Target("evaluation, result beyond caches: share of stream", ratio("evaluation", "ceiling", beyond_cache), 0.90),
    Target("evaluation, result beyond caches: PyTorch", ratio("evaluation", "torch", beyond_cache), 1.2),
    Target("evaluation, every shape: PyTorch", ratio("evaluation", "torch"), 1.0),
    Target("training, channels-first: share of stream", ratio("training", "ceiling", channels_first, not_small), 0.60),
    Target("training, channels-first: PyTorch", ratio("training", "torch", channels_first, not_small), 5.0),
    Target("training, channels-first: oneDNN blocked", ratio("training", "onednn", channels_first, not_small), 1.3),
    Target("training, channels-last: share of stream", ratio("training", "ceiling", channels_last, not_small), 0.50),
    Target("training, channels-last, every shape: PyTorch", ratio("training", "torch", channels_last), 1.3),
    Target(
        "training, channels-last, result beyond caches: PyTorch",
        ratio("training", "torch", channels_last, beyond_cache),
        1.6,
    ),
    Target("backward, every shape: PyTorch", ratio("backward", "torch-new"), 2.0),
    Target("backward, result beyond caches: PyTorch", ratio("backward", "torch-new", beyond_cache), 3.0),
    Target("statistics: share of read", ratio("statistics", "ceiling", not_small), 0.85),
    Target("statistics: x.mean + x.var of NumPy", ratio("statistics", "numpy", not_small), 10.0),
    Target("evaluation, from 10 MB: NumPy", ratio("evaluation", "numpy", ten_megabytes), 8.0),
    Target("training, from 10 MB: NumPy", ratio("training", "numpy", ten_megabytes), 12.0),
    *_HALF,
    Target("uint8 statistics: NumPy", ratio("statistics", "numpy", dtype="uint8"), 25.0),
    Target("uint8 to float32: share of stream", ratio("evaluation", "ceiling", dtype="uint8"), 0.8),
    Target("(64, 64), evaluation: PyTorch", ratio("evaluation", "torch", only("64x64")), 2.0),
    Target("(64, 64), training: PyTorch", ratio("training", "torch", only("64x64")), 2.0),
    Target("one image (1, 64, 56, 56), evaluation: PyTorch", ratio("evaluation", "torch", only("1x64x56x56")), 1.2),
    Target("import nbbn, against numba and numpy", import_ratio, most=1.15),
    Target("first call in a process, compiled before", first_call("cached"), most=0.3, unit=" s"),
    Target("first call ever, per function and dtype", first_call("uncached"), most=4.0, unit=" s"),
    Target("extra memory at 206 MB, with out=", extra_memory, most=5.0, unit=" MB"),
)


def outcome(report: Report, target: Target) -> tuple[str, str, str]:
    """Met, missed (in how many of its figures) or not measured; the worst figure; where that is."""
    worst = target.worst(report)
    if worst is None:
        return "not measured", "-", "-"
    figures = target.figures(report).values()
    short = sum(not target.fulfils(figure) for figure in figures)
    word = "met" if not short else "missed" if len(figures) == 1 else f"missed in {short} of {len(figures)}"
    return word, f"{worst[1]:.3g}{target.unit}", worst[0]


def markdown(report: Report) -> str:
    """All targets as a table."""
    lines = ["| target | aim | | worst | where |", "|---|---:|---|---:|---|"]
    for target in TARGETS:
        word, figure, where = outcome(report, target)
        lines.append(f"| {target.what} | {target.aim} | {word} | {figure} | {where} |")
    return "\n".join(lines)


def summary(report: Report) -> str:
    """How many targets are met, and all that are not."""
    measured = [target for target in TARGETS if target.met(report) is not None]
    missed = [target for target in measured if not target.met(report)]
    count = f"{len(measured) - len(missed)} of {len(measured)} targets met"
    if not missed:
        return f"{count}."
    words = [f"{t.what} (aim {t.aim}, worst {outcome(report, t)[1]})" for t in missed]
    return f"{count}. Missed: {'; '.join(words)}."
