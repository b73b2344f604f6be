"""The picture: one panel a part. Drawn without pyplot, so no window system and no global state is involved."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nbbn.demo.finetuning import FineTuning
from nbbn.demo.inference import ForgottenEval
from nbbn.demo.running import Convergence, Noise
from nbbn.demo.speed import Speed

# One meaning a colour in all panels (Okabe & Ito's palette: told apart by colour-blind readers too).
GOOD, BAD, OTHER, QUIET = "#0072B2", "#D55E00", "#009E73", "#707070"
MOMENTUM_COLORS = {0.1: "#CC79A7", 0.01: "#E69F00", None: "#56B4E9"}

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "nbbn",
}

_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}%")
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def save(
    output: Path, forgotten: ForgottenEval, converging: Convergence, noisy: Noise, tuned: FineTuning, timed: Speed
) -> None:
    """Draw all panels and save them, 1800 by 1100 pixels, in the format of the suffix of `output`."""
    with rc_context(_STYLE):  # type: ignore[arg-type]
        layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14)
        figure = Figure(figsize=(12, 1100 / 150), dpi=150, layout=layout)
        figure.suptitle("Batch normalization at inference, measured with nbbn", fontsize=17, fontweight="bold")
        panels = figure.subplots(2, 3).flat
        _examples(panels[0], forgotten)
        _forgotten_eval(panels[1], forgotten)
        _convergence(panels[2], converging)
        _noise(panels[3], noisy)
        _fine_tuning(panels[4], tuned)
        _speed(panels[5], timed)
        figure.supxlabel(
            "a small convolutional network in NumPy with nbbn.BatchNorm, trained on scikit-learn's handwritten digits",
            fontsize=9.5,
            color=QUIET,
        )
        figure.savefig(output)


def _examples(axes: Axes, result: ForgottenEval) -> None:
    axes.set_title("a  One image at a time")
    axes.set_axis_off()
    per_row, row_height = 5, 2.6
    columns = (result.example_images, result.example_labels, result.example_evaluation, result.example_alone)
    for i, (image, label, evaluation, alone) in enumerate(zip(*columns, strict=True)):
        x, y = i % per_row, -row_height * (i // per_row)
        axes.imshow(image, cmap="gray_r", extent=(x, x + 0.86, y, y + 0.86))
        for name, answer, below in (("eval()", evaluation, 0.22), ("its own\nstatistics", alone, 0.6)):
            color = GOOD if answer == label else BAD
            axes.text(x + 0.43, y - below, str(answer), ha="center", va="center", fontweight="bold", color=color)
            if x == 0:
                axes.text(-0.15, y - below, name, ha="right", va="center", color=QUIET, fontsize=9, linespacing=0.95)
    for name, color, left in (("right answer", GOOD, 0.0), ("wrong answer", BAD, 2.5)):
        axes.text(left, y - 1.3, name, color=color, fontweight="bold", fontsize=9.5)
    axes.set_xlim(-1.3, per_row)
    axes.set_ylim(y - 1.35, 0.9)
    axes.set_anchor("NW")


def _forgotten_eval(axes: Axes, result: ForgottenEval) -> None:
    axes.set_title("b  The forgotten eval()")
    sizes = result.batch_sizes
    axes.axhline(result.evaluation, color=GOOD)
    axes.errorbar(sizes, result.shuffled, result.shuffled_std, color=BAD, marker="o", markersize=5, capsize=2)
    axes.plot(sizes, result.sorted, color=OTHER, marker="s", markersize=5)
    axes.axhline(result.most_frequent_class, color=QUIET, linestyle=":", linewidth=1.5)
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, sizes)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.set_xlabel("batch size")
    axes.set_ylabel("test accuracy")
    label = _labeller(axes)
    label("evaluation mode", sizes[0], result.evaluation + 0.025, GOOD)
    middle = len(sizes) // 2
    label("batch statistics,\nshuffled images", sizes[middle - 1], result.shuffled[middle - 1] - 0.05, BAD, va="top")
    label("sorted by digit", sizes[middle], result.sorted[middle] + 0.05, OTHER, ha="right")
    label("most frequent digit", sizes[-1], result.most_frequent_class - 0.025, QUIET, ha="right", va="top")


def _convergence(axes: Axes, result: Convergence) -> None:
    axes.set_title("c  Running statistics converge")
    for track in result.tracks:
        color = MOMENTUM_COLORS[track.momentum]
        batches = np.arange(1, len(track.mean_error) + 1)
        name = "cumulative (None)" if track.momentum is None else f"momentum {track.momentum:g}"
        axes.plot(batches, track.var_error, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(batches, track.mean_error, color=color, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(track.mean_error.min() for track in result.tracks) / 5)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.set_xlabel(f"training batches of {result.batch_size}")
    axes.set_ylabel("RMS error over channels")
    axes.plot([], [], color=QUIET, linewidth=0.8, label=r"thin: running variance, in $\sigma^2$")
    axes.legend(loc="lower left", title=r"running mean, in $\sigma$", alignment="left", title_fontsize=9)


def _noise(axes: Axes, result: Noise) -> None:
    axes.set_title(f"d  Their noise at momentum {result.momentum:g}")
    sizes, color = result.batch_sizes, MOMENTUM_COLORS.get(result.momentum, QUIET)
    for name, face, measured, uncertainty, predicted in (
        (r"running variance, in $\sigma^2$", "white", result.var, result.var_uncertainty, result.var_predicted),
        (r"running mean, in $\sigma$", color, result.mean, result.mean_uncertainty, result.mean_predicted),
    ):
        axes.plot(sizes, predicted, color=QUIET, linewidth=1.2)
        axes.errorbar(
            sizes, measured, uncertainty, label=name, linestyle="none", marker="o", markersize=7, markerfacecolor=face,
            color=color,
        )  # fmt: skip
    axes.plot([], [], color=QUIET, linewidth=1.2, label="predicted")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis, sizes)
    lowest, highest = result.mean_predicted.min(), result.var_predicted.max()
    axes.set_ylim(lowest / 1.5, highest * 1.5)
    ticks = [tick for tick in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if lowest / 1.5 < tick < highest * 1.5]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("batch size")
    axes.set_ylabel("standard error")
    axes.legend(loc="upper right")


def _fine_tuning(axes: Axes, result: FineTuning) -> None:
    axes.set_title("e  Fine-tuning on faded images")
    batches = np.arange(result.batches + 1)
    axes.plot(batches, result.frozen_curve, color=GOOD)
    axes.plot(batches, result.left_training_curve, color=BAD)
    start, end = result.left_training.old, result.recalibrated.old
    x = 1.06 * result.batches
    axes.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": OTHER, "linewidth": 2})
    axes.set_xlim(0, 1.12 * result.batches)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.set_xlabel("batches of faded images")
    axes.set_ylabel("accuracy on the old images")
    label = _labeller(axes)
    label("freeze()", 0.03 * result.batches, result.frozen_curve[0] + 0.025, GOOD)
    middle = result.batches // 2
    label("left in\ntraining mode", middle, result.left_training_curve[middle] - 0.06, BAD, ha="right", va="top")
    if end - start > 0.3:  # room between the curves, else below both
        label("recalibrate()", x - 0.02 * result.batches, (start + end) / 2, OTHER, ha="right", va="center")
    else:
        label("recalibrate()", x, start - 0.03, OTHER, ha="right", va="top")


def _speed(axes: Axes, result: Speed) -> None:
    axes.set_title(f"f  Speed here, {result.on_threads}")
    rows = np.arange(len(result.timings))
    theirs, ours = (np.array([1e3 * getattr(t, who) for t in result.timings]) for who in ("numpy", "nbbn"))
    axes.barh(rows - 0.19, theirs, 0.36, color="#b8b8b8", label="NumPy")
    axes.barh(rows + 0.19, ours, 0.36, color=GOOD, label="nbbn")
    for row, t in zip(rows, result.timings, strict=True):
        text = rf" {t.numpy / t.nbbn:.1f}$\times$, {t.gigabytes_per_second:.1f} GB/s"
        axes.text(1e3 * t.nbbn, row + 0.19, text, va="center", color=GOOD, fontweight="bold", fontsize=9)
    axes.set_yticks(rows, [t.operation.replace(" ", "\n") for t in result.timings])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(theirs.max(), ours.max()))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms for " + r" $\times$ ".join(map(str, result.shape)) + " float32")
    axes.legend(loc="best")


def _plain_ticks(axis: Axis, values: Sequence[int]) -> None:
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_PLAIN)


def _labeller(axes: Axes) -> Callable[..., Text]:
    """Text beside a curve, in its colour."""
    return lambda text, x, y, color, **options: axes.text(
        x, y, text, color=color, fontsize=9.5, fontweight="bold", **options
    )
