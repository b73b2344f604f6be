"""The picture of one run of `compare.py`: how many times faster than each peer, per operation and shape."""

from pathlib import Path

from inputs import Shape
from report import Report, conditions, digest, entries, operations, peers, shapes, times

#: One colour per peer, told apart in grey and by colour-blind readers too (Okabe & Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
INK, FAINT, SHADE = "#333333", "#d9d9d9", "#f2f2f2"

#: The speed-up over NumPy that nbbn set out to reach.
AIM = 4


def draw(report: Report, path: Path) -> None:
    """Dots on a logarithmic scale: a panel per operation, a row per shape, a colour per peer.

    Whiskers are quartiles. The digest of the report goes into the file, for `publish.py --check`.
    """
    from matplotlib.figure import Figure  # here: tables and checks need no matplotlib

    panels, rows, rivals = operations(report), shapes(report), peers(report)
    height = 1.5 + (0.14 + 0.22 * len(rivals)) * len(rows)
    figure = Figure(figsize=(13, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, operation in zip(axes, panels, strict=True):
        _draw_scale(axis, operation, len(rows))
        for number, name in enumerate(rivals):
            shift = 0.7 / len(rivals) * (number - (len(rivals) - 1) / 2)
            _draw_peer(axis, report, operation, name, COLOURS[number % len(COLOURS)], shift)
    axes[0].set_yticks(range(len(rows)), [str(Shape.parse(row)) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    _draw_limits(axes, report)
    if len(rivals) > 1:
        dots = {dot.get_label(): dot for axis in axes for dot in axis.get_legend_handles_labels()[0]}
        figure.legend(handles=dots.values(), loc="outside upper right", ncols=len(rivals), frameon=False)

    title = f"Times nbbn is faster than {' and '.join(rivals.values())}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, weight="bold", color=INK)
    caption = (
        f"float32, medians and quartiles of {report['rounds']} rounds; grey: nbbn is slower; dashed: {AIM}x. "
        f"{report['date'][:10]}, {conditions(report)}"
    )
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=INK)
    figure.savefig(path, dpi=130, metadata={"Source": digest(report)})


def _draw_scale(axis, operation, rows):
    axis.set_title(operation, loc="left", fontsize=11, color=INK)
    axis.set_xscale("log")
    axis.axvline(1, color=INK, linewidth=1)
    axis.axvline(AIM, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.hlines(range(rows), 0, 1, transform=axis.get_yaxis_transform(), color=FAINT, linewidth=0.6, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
    axis.tick_params(axis="both", which="both", length=0, labelcolor=INK, labelsize=9)


def _draw_peer(axis, report, operation, name, colour, shift):
    measured = entries(report)
    found = [
        (row + shift, measured[operation, shape]["ratios"][name])
        for row, shape in enumerate(shapes(report))
        if name in measured.get((operation, shape), {"ratios": {}})["ratios"]
    ]
    if not found:
        return
    from matplotlib.patheffects import withStroke

    heights = [y for y, _ in found]
    medians = [ratio["median"] for _, ratio in found]
    lower, upper = ([ratio[quartile] for _, ratio in found] for quartile in ("lower", "upper"))
    axis.hlines(heights, lower, upper, color=colour, alpha=0.45, linewidth=4)
    axis.scatter(medians, heights, s=34, color=colour, zorder=4, label=report["labels"][name])
    halo = [withStroke(linewidth=3, foreground="white")]  # keeps a label readable where it crosses a line
    for height, ratio in found:
        axis.annotate(
            times(ratio["median"]), (ratio["upper"], height),
            xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=INK, path_effects=halo, zorder=3,
        )  # fmt: skip


def _draw_limits(axes, report):
    """The same scale for all panels, in powers of the aim, with room for the labels."""
    ratios = [entry["ratios"][name] for entry in report["results"] for name in peers(report) if name in entry["ratios"]]
    least = min([0.6, *(ratio["lower"] for ratio in ratios)]) / 1.3
    most = max([2 * AIM, *(ratio["upper"] for ratio in ratios)]) * 2.8
    powers = [power for power in range(-6, 7) if least <= AIM**power <= most]
    for axis in axes:
        axis.set_xlim(least, most)
        axis.set_xticks([AIM**power for power in powers], [_power_label(power) for power in powers])
        axis.minorticks_off()
        axis.axvspan(least, 1, color=SHADE, zorder=-1)


def _power_label(power):
    return f"{AIM**power}x" if power >= 0 else f"1/{AIM**-power}x"
