"""The picture of one run of `compare.py`: throughput against size, a panel per operation, a line per library."""

from pathlib import Path

from cases import LADDER, Case
from report import Report, conditions, digest, operations

#: Colour, marker and stroke by contender: told apart in grey and by colour-blind readers too (Okabe & Ito). nbbn is
#: black and thick, and dotted where it returns new memory, as oneDNN, JAX and PyTorch's backward pass always do.
LINES = {
    "nbbn": ("#000000", "o", "-"),
    "nbbn-new": ("#000000", None, ":"),
    "torch": ("#d55e00", "s", "-"),
    "torch-new": ("#d55e00", "s", "-"),
    "onednn": ("#cc79a7", "D", "-"),
    "jax": ("#009e73", "^", "-"),
    "onnxruntime": ("#e69f00", "v", "-"),
    "numpy": ("#0072b2", "P", "-"),
    "sklearn": ("#56b4e9", "X", "-"),
    "numbagg": ("#999999", "p", "-"),
}

#: Fewer points are no line, unless there are no more: scikit-learn and numbagg serve one or two of them.
LEAST_POINTS = 3

INK, FAINT, CEILING = "#333333", "#e3e3e3", "#777777"


def draw(report: Report, path: Path) -> None:
    """Lines on two logarithmic scales, with quartiles as shades; the digest of the report goes into the file."""
    from matplotlib.figure import Figure  # here: tables and checks need no matplotlib

    panels = operations(report)
    ladder = [entry for entry in report["results"] if Case.parse(entry["case"]) in LADDER] or report["results"]
    figure = Figure(figsize=(13, 4.9), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, operation in zip(axes, panels, strict=True):
        _draw_panel(axis, report, [entry for entry in ladder if entry["operation"] == operation])
        axis.set_title(operation, loc="left", fontsize=11, color=INK)
    axes[0].set_ylabel("GB/s, bytes that must move", color=INK)
    handles = {line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=handles.values(), loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    caption = (
        "x: bytes of the input, float32, 64 channels, channels-first. Medians and quartiles; dashed: a kernel that "
        "does nothing but move the bytes. oneDNN, JAX and PyTorch's backward pass return new memory: compare with "
        f"the dotted line.\n{report['date'][:10]}, {conditions(report)}"
    )
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color=INK)
    figure.savefig(path, dpi=130, metadata={"Source": digest(report)})


def _draw_panel(axis, report, entries):
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(which="major", color=FAINT, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(which="both", length=0, labelcolor=INK, labelsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: _bytes(value))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    entries = sorted(entries, key=lambda entry: entry["values"])
    ceilings = [entry | {"seconds": {"ceiling": entry["seconds"][entry["ceiling"]]}} for entry in entries]
    _draw_line(axis, ceilings, "ceiling", "what the memory allows", CEILING, None, linestyle=(0, (4, 2)), linewidth=1.6)
    for name, (colour, marker, stroke) in LINES.items():
        # one line a library: with memory allocated before where it can, else as it does
        if name == "torch-new" and any("torch" in entry["seconds"] for entry in entries):
            continue
        label = report["labels"].get("torch" if name == "torch-new" else name, name)
        style = {"linewidth": 2.8, "zorder": 5} if name == "nbbn" else {"linewidth": 1.4, "zorder": 3}
        _draw_line(axis, entries, name, label, colour, marker, linestyle=stroke, **style)


def _draw_line(axis, entries, name, label, colour, marker, **style):
    points = [entry for entry in entries if name in entry["seconds"]]
    if len(points) < min(LEAST_POINTS, len(entries)):
        return
    sizes = [4 * entry["values"] for entry in points]
    speeds = {
        quartile: [entry["bytes"] / entry["seconds"][name][quartile] / 1e9 for entry in points]
        for quartile in ("lower", "median", "upper")
    }
    axis.plot(sizes, speeds["median"], color=colour, marker=marker, markersize=4.5, label=label, **style)
    axis.fill_between(sizes, speeds["upper"], speeds["lower"], color=colour, alpha=0.12, linewidth=0)


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
