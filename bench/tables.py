"""Tables of a report: the main one, with losses where they belong, and the apart ones."""

from collections.abc import Iterable, Sequence

import targets
from cases import Case
from report import Report, conditions, operations, peers, times


def document(report: Report) -> str:
    """Everything measured, with quartiles: the file beside the JSON."""
    parts = ["# Speed, in full", explanation(report)]
    parts += ["## Targets", targets.markdown(report)]
    for operation in operations(report):
        parts += [f"## {operation}", full(report, operation)]
    parts += ["## Losses", losses(report)]
    if report["host"]:
        parts += ["## Cost of a call", "Microseconds, on next to no work.", host(report)]
    if report["startup"]:
        parts += ["## Import and compilation", startup(report)]
    if report["memory"]:
        parts += ["## Extra memory", "Peak during one call with `out=`, measured.", memory(report)]
    return "\n\n".join(parts) + "\n"


def explanation(report: Report) -> str:
    return (
        f"Measured {report['date'][:10]} with `{report['command']}` on {conditions(report)}. In each of up to "
        f"{report['rounds']} rounds all contenders take turns; a figure is the median over the rounds of the ratio "
        "within a round. Everyone reads the same bytes, and every result is checked before it is timed. A peer that "
        "always returns new memory (PyTorch's `F.batch_norm` and backward pass, oneDNN, JAX) is compared with nbbn "
        "without `out=`, all others with results in memory allocated before. **Below 1x nbbn is the slower one.**"
    )


# --- throughput -------------------------------------------------------------------------------------------------


def main(report: Report, cases: Sequence[str]) -> str:
    """A row an operation and case: GB/s, share of the ceiling, and the ratio to every peer. Losses are bold."""
    rivals = peers(report)
    header = ["operation", "x", "GB/s", "of ceiling", *rivals.values()]
    rows = []
    for entry in report["results"]:
        if entry["case"] in cases:
            ratios = (entry["ratios"].get(name) for name in rivals)
            cells = ("" if r is None else _bold_loss(r["median"]) for r in ratios)
            rows.append([entry["operation"], str(Case.parse(entry["case"])), _speed(entry), _share(entry), *cells])
    rows.sort(key=lambda row: operations(report).index(row[0]))
    return table(header, rows, left=2)


def full(report: Report, operation: str) -> str:
    """All cases of an operation, with quartiles."""
    # nbbn's other ways are columns too: what new memory costs, and what half precision gains
    others = {name: label for name, label in report["labels"].items() if name != "nbbn"}
    chosen = [entry for entry in report["results"] if entry["operation"] == operation]
    others = {name: label for name, label in others.items() if any(name in entry["ratios"] for entry in chosen)}
    limits = [name for name in ("read", "stream", "copy") if any(name in entry["ratios"] for entry in chosen)]
    header = ["x", "MB moved", "rounds", "nbbn ms", "GB/s", *limits, *others.values()]
    rows = []
    for entry in chosen:
        milliseconds = {key: 1e3 * value for key, value in entry["seconds"]["nbbn"].items()}
        rows.append(
            [
                str(Case.parse(entry["case"])),
                f"{entry['bytes'] / 1e6:.3g}",
                str(entry["rounds"]),
                _with_quartiles(milliseconds),
                _speed(entry),
                *(_with_quartiles(entry["ratios"].get(name)) for name in (*limits, *others)),
            ]
        )
    return table(header, rows)


def losses(report: Report, shown: Sequence[str] = ()) -> str:
    """In how many comparisons a peer is faster, and which: the worst first, without those of cases shown already."""
    compared = [
        (entry["ratios"][name]["median"], entry, label)
        for entry in report["results"]
        for name, label in peers(report).items()
        if name in entry["ratios"]
    ]
    lost = sorted((item for item in compared if item[0] < 1), key=lambda item: item[0])
    rest = [item for item in lost if item[1]["case"] not in shown]
    count = f"nbbn is slower in {len(lost)} of {len(compared)} comparisons"
    words = [f"{e['operation']} {Case.parse(e['case'])} {label} {times(ratio)}" for ratio, e, label in rest]
    if not rest:
        return f"{count}{', all of them above' if lost and shown else ''}."
    return f"{count}{'; on shapes not above: ' if shown else ': '}{'; '.join(words)}."


def _bold_loss(ratio: float) -> str:
    return f"**{times(ratio)}**" if ratio < 1 else times(ratio)


def _speed(entry: Report) -> str:
    return f"{entry['bytes'] / entry['seconds']['nbbn']['median'] / 1e9:.3g}"


def _share(entry: Report) -> str:
    return f"{entry['ratios'][entry['ceiling']]['median']:.0%}"


def _with_quartiles(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.3g} ({values['lower']:.3g} to {values['upper']:.3g})"


# --- the parts apart ----------------------------------------------------------------------------------------------


def host(report: Report) -> str:
    names = [name for name in report["labels"] if any(name in entry["seconds"] for entry in report["host"])]
    header = ["operation", "x", *(report["labels"][name] for name in names)]
    rows = []
    for entry in report["host"]:
        microseconds = (_microseconds(entry["seconds"].get(name)) for name in names)
        rows.append([entry["operation"], str(Case.parse(entry["case"])), *microseconds])
    return table(header, rows, left=2)


def _microseconds(seconds: dict[str, float] | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds['median']:.3g}"


def startup(report: Report) -> str:
    """Import, first calls and kernels."""
    measured = report["startup"]
    calls = [[c["function"], c["dtype"], f"{c['uncached']:.2f}", f"{c['cached']:.3f}"] for c in measured["first_calls"]]
    header = ["first call in a process", "dtype", "nothing compiled before, s", "compiled before, s"]
    return f"{startup_sentence(report)}\n\n{table(header, calls, left=2)}"


def startup_sentence(report: Report) -> str:
    measured = report["startup"]
    seconds, kernels = measured["import"]["seconds"], measured["kernels"]
    return (
        f"`import nbbn` takes {seconds['nbbn']['median']:.2f} s, {measured['import']['ratio']['median']:.2f} times "
        f"`import numba, numpy`. All functions on all layouts, in {', '.join(kernels['dtypes'])}, are "
        f"{kernels['number']} compiled kernels, "
        f"{kernels['bytes'] / 1e6:.0f} MB on disk."
    )


def memory(report: Report) -> str:
    rows = [
        [e["operation"], str(Case.parse(e["case"])), f"{e['peak_extra_bytes'] / 1e6:.2f}"] for e in report["memory"]
    ]
    return table(["operation", "x", "MB"], rows, left=2)


def apart(report: Report) -> str:
    """Import, compilation, host overhead and memory in a few sentences, as far as they were measured."""
    parts = []
    if report["startup"]:
        calls = report["startup"]["first_calls"]
        cached, uncached = (sorted(call[kind] for call in calls) for kind in ("cached", "uncached"))
        parts.append(
            f"{startup_sentence(report)} A first call takes {_range(uncached)} s where nothing was compiled before, "
            f"{_range(cached)} s in later processes."
        )
    costs = {
        entry["operation"]: f"{entry['operation']} {_microseconds(entry['seconds']['nbbn'])} us"
        + (f" (PyTorch {_microseconds(entry['seconds']['torch'])})" if "torch" in entry["seconds"] else "")
        for entry in report["host"]
        if entry["case"] == "64x64"
    }
    if costs:
        parts.append(f"A call on (64, 64): {', '.join(costs.values())}.")
    if report["memory"]:
        most = max(entry["peak_extra_bytes"] for entry in report["memory"])
        parts.append(f"Extra memory on 206 MB with `out=`: at most {most / 1e6:.1f} MB, in any operation and layout.")
    return " ".join(parts)


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.2g} to {values[-1]:.2g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; all columns but the first `left` are numbers."""
    line = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join([f"| {' | '.join(header)} |", line, *(f"| {' | '.join(row)} |" for row in rows)])
