"""What the terminal shows: for each part a table and one sentence, which says what the measured values say."""

import math

from rich import box
from rich.console import Console
from rich.table import Table

from nbbn.demo.finetuning import CONTRAST, FineTuning
from nbbn.demo.folding import DTYPES, FoldedNetwork
from nbbn.demo.inference import ForgottenEval, OneAtATime
from nbbn.demo.repair import Repaired
from nbbn.demo.running import Convergence, Noise, Track
from nbbn.demo.speed import Speed

#: Batches after which part c is tabulated, as far as it ran.
_MILESTONES = (1, 10, 100, 300, 1000)


def show(console: Console, part: str, table: Table, sentence: str) -> None:
    """Print one part."""
    console.print()
    console.print(f"[bold]{part}[/bold]", highlight=False)
    console.print(table, highlight=False)
    console.print(sentence, highlight=False, style="cyan")


def one_at_a_time(result: OneAtATime) -> tuple[Table, str]:
    """Table and sentence of part a."""
    table = _table("", "one batch", "one at a time", "different")
    for i, layer in enumerate(result.layers, 1):
        values = f"{layer.values:,} values"
        name = f"norm layer {i}, (N, {', '.join(map(str, layer.shape))})"
        table.add_row(name, values, values, f"{layer.different_values:,} bit patterns")
    accuracies = (_percent(result.batch_accuracy), _percent(result.single_accuracy))
    table.add_row("accuracy of the network", *accuracies, f"{result.different_answers} answers")

    different = sum(layer.different_values for layer in result.layers)
    layers = f"differ in {different:,} bit patterns" if different else "return the same bits"
    answers = f"and {result.different_answers or 'no'} answers of the network change"
    sentence = (
        f"In evaluation mode the normalization layers {layers} for an image alone and among {result.images}, {answers}"
    )
    if result.logit_difference and not different:
        sentence += (
            f" (the logits, up to {result.largest_logit:.0f}, differ by up to {result.logit_difference:.0e}: NumPy's "
            "matrix product sums in another order for another number of rows)"
        )
    return table, sentence + "."


def forgotten_eval(result: ForgottenEval) -> tuple[Table, str]:
    """Table and sentence of part b."""
    table = _table("batch size", "batch statistics, shuffled", "batch statistics, sorted by digit", "evaluation mode")
    for size, mean, std, by_digit in zip(
        result.batch_sizes, result.shuffled, result.shuffled_std, result.sorted, strict=True
    ):
        shuffled = f"{_percent(mean)} ± {100 * std:.1f}"
        table.add_row(str(size), shuffled, _percent(by_digit), _percent(result.evaluation))

    first, last = result.batch_sizes[0], result.batch_sizes[-1]
    good = [b for b, a in zip(result.batch_sizes, result.shuffled, strict=True) if a >= result.evaluation - 0.01]
    needs = f"it takes batches of {good[0]}" if good else f"not even batches of {last} suffice"
    answers = "the same answer" if result.different_answers_alone == 1 else f"{result.different_answers_alone} answers"
    reach = "only" if result.sorted[-1] < result.evaluation - 0.01 else "no less than"
    unchanged = "did not move" if result.running_statistics_unchanged else "MOVED, which must not happen"
    sentence = (
        f"Without eval(), images that come one by one all get {answers}: {_percent(result.shuffled[0])} are right at "
        f"batch size {first} (the most frequent digit makes up {_percent(result.most_frequent_class)}); {needs} to "
        f"come within 1 point of evaluation mode, and images sorted by digit reach {reach} "
        f"{_percent(result.sorted[-1])} in batches of {last}; the trained running statistics {unchanged}. "
        "(Batch size 1 goes around the layer, which refuses to train on one value per channel.)"
    )
    return table, sentence


def convergence(result: Convergence) -> tuple[Table, str]:
    """Table and sentence of part c."""
    batches = [t for t in _MILESTONES if t <= len(result.tracks[0].mean_error)]
    table = _table("momentum", f"after batches of {result.batch_size}:", *map(str, batches))
    for track in result.tracks:
        table.add_row(_momentum(track), "mean off by", *(_percent(track.mean_error[t - 1]) for t in batches))
        table.add_row("", "variance off by", *(_percent(track.var_error[t - 1]) for t in batches))
        table.add_row(
            "", "start value left in mean", *(_percent(track.start_left[t - 1]) for t in batches), end_section=True
        )

    slowest = min((t for t in result.tracks if t.momentum is not None), key=lambda t: t.momentum or 0)
    middle, end = batches[len(batches) // 2], batches[-1]
    early, late = (min(result.tracks, key=lambda track: track.mean_error[t - 1]) for t in (middle, end))
    closest = (
        f"after {middle} and {end} batches {_named(early)} is"
        if early is late
        else f"after {middle} batches {_named(early)}, after {end} {_named(late)} is"
    )
    start_left = (_percent(slowest.start_left[middle - 1]), _percent(slowest.start_left_expected[middle - 1]))
    sentence = (
        f"After {middle} batches momentum {slowest.momentum} still has {start_left[0]} of the initial value in its "
        f"running mean (expected: {start_left[1]}); {closest} closest to the population mean, in the end off by "
        f"{_percent(late.mean_error[end - 1])} of a standard deviation."
    )
    return table, sentence


def noise(result: Noise) -> tuple[Table, str]:
    """Table and sentence of part d."""
    table = _table("batch size", "mean: measured", "predicted", "variance: measured", "predicted")
    for size, *values in zip(
        result.batch_sizes,
        result.mean, result.mean_uncertainty, result.mean_predicted,
        result.var, result.var_uncertainty, result.var_predicted,
        strict=True,
    ):  # fmt: skip
        mean, mean_uncertainty, mean_predicted, var, var_uncertainty, var_predicted = (100 * v for v in values)
        table.add_row(
            str(size),
            f"{mean:.2f} ± {mean_uncertainty:.2f} %",
            f"{mean_predicted:.2f} %",
            f"{var:.2f} ± {var_uncertainty:.2f} %",
            f"{var_predicted:.2f} %",
        )
    off = max(
        float(abs(measured / predicted - 1).max())
        for measured, predicted in ((result.mean, result.mean_predicted), (result.var, result.var_predicted))
    )
    sentence = (
        f"At momentum {result.momentum:g} and batches of {result.batch_sizes[0]} the running mean keeps an error of "
        f"{_percent(result.mean[0])} of a standard deviation, the running variance of {_percent(result.var[0])} of "
        f"itself; with batches of {result.batch_sizes[-1]} it is {_percent(result.mean[-1])} and "
        f"{_percent(result.var[-1])}, and the formulas predict all of it to within {math.ceil(100 * off)} %."
    )
    return table, sentence


def fine_tuning(result: FineTuning) -> tuple[Table, str]:
    """Table and sentence of part e."""
    table = _table("accuracy in evaluation mode", "old images", "faded images")
    for name, accuracies in (
        ("before", result.before),
        (f"after {result.batches} faded batches, left in training mode", result.left_training),
        ("... then recalibrated on old images", result.recalibrated),
        (f"after {result.batches} faded batches, freeze()", result.frozen),
    ):
        table.add_row(name, _percent(accuracies.old), _percent(accuracies.faded))
    unchanged = "did not move by a bit" if result.frozen_unchanged else "MOVED, which must not happen"
    missing = round((result.before.old - result.recalibrated.old) * result.images)
    repaired = "exactly where it was"
    if missing:
        repaired = f"{_percent(result.recalibrated.old)} ({abs(missing)} of {result.images} images "
        repaired += "fewer)" if missing > 0 else "more)"
    sentence = (
        "Moving statistics adapt to the new images and forget the old ones: "
        f"no parameter changed, yet {result.batches} batches at {CONTRAST:.0%} contrast moved running means by up to "
        f"{result.largest_shift:.1f} standard deviations and accuracy from {_percent(result.before.old)} to "
        f"{_percent(result.left_training.old)} on the old images (and from {_percent(result.before.faded)} to "
        f"{_percent(result.left_training.faded)} on the faded ones); frozen statistics {unchanged}, and recalibrate() "
        f"takes the old images back to {repaired}."
    )
    return table, sentence


def speed(result: Speed) -> tuple[Table, str]:
    """Table and sentence of part f."""
    table = _table(f"{result.shape} float32", "NumPy", "nbbn", "ratio", "nbbn moves")
    for timing in result.timings:
        table.add_row(
            timing.operation,
            f"{1e3 * timing.numpy:.2f} ms",
            f"{1e3 * timing.nbbn:.2f} ms",
            f"{timing.numpy / timing.nbbn:.1f} x",
            f"{timing.gigabytes_per_second:.1f} GB/s",
        )
    ratios = [timing.numpy / timing.nbbn for timing in result.timings]
    slower = [t.operation for t, ratio in zip(result.timings, ratios, strict=True) if ratio < 1]
    sentence = (
        f"On this machine nbbn takes {1 / max(ratios):.0%} to {1 / min(ratios):.0%} of NumPy's time, on "
        f"{result.on_threads} against NumPy's one (medians of {result.rounds} calls in turn)"
    )
    if slower:
        sentence += f"; it is SLOWER for: {', '.join(slower)}"
    scatter = max(timing.scatter for timing in result.timings)
    if scatter > 0.5:
        sentence += f"; the times scatter by {scatter:.0%}: something else may be using the processor"
    return table, sentence + "."


def folding(result: FoldedNetwork) -> tuple[Table, str]:
    """Table and sentence of part g."""
    columns = [column for dtype in DTYPES for column in (f"{dtype}: expected", "measured")]
    table = _table("norm layer", "|mean|/std", *columns)
    for i, layer in enumerate(result.layers, 1):
        values = [f"{v[dtype]:.1e}" for dtype in DTYPES for v in (layer.expected, layer.measured)]
        table.add_row(str(i), f"up to {layer.largest_mean_over_std:.1f}", *values)

    ratios = [layer.measured[dtype] / layer.expected[dtype] for layer in result.layers for dtype in DTYPES]
    worst = {dtype: max(layer.measured[dtype] for layer in result.layers) for dtype in DTYPES}
    sentence = (
        f"Without its normalization layers the network differs by at most {result.logit_difference:.0e} in a logit and "
        f"in {result.different_answers or 'no'} of {result.images} answers; rounding the folded weights moves the "
        f"outputs of a layer by {worst['float32']:.0e} in float32 and would by {worst['float16']:.0e} in float16 "
        f"(root mean square), {min(ratios):.1f} to {max(ratios):.1f} times what folding_error() expects."
    )
    return table, sentence


def repair(result: Repaired) -> tuple[Table, str]:
    """Table and sentence of part h."""
    bad = result.poisoned
    table = _table("", "accuracy", "channels", "train/eval gap", "measured")
    table.add_row("as trained", _percent(bad.before))
    table.add_row("after one NaN pixel", _percent(bad.propagated), f"{bad.broken_channels} not finite")
    table.add_row("... with skip", _percent(bad.skipped), f"{bad.skipped_channels} skipped")
    table.add_row("... recalibrated", _percent(bad.repaired), end_section=True)
    table.add_row("on faded images", _percent(result.shifted))
    for i, layer in enumerate(result.layers, 1):
        moved = f"{layer.significant_shifted} of {layer.channels} moved"
        table.add_row(f"norm layer {i}", "", moved, f"{layer.predicted:.3f}", f"{layer.measured:.3f}")
    table.add_row("... recalibrated", _percent(result.recalibrated))

    alarms = sum(layer.significant for layer in result.layers)
    off = max(abs(layer.measured / layer.predicted - 1) for layer in result.layers)
    found = sum(layer.significant_shifted for layer in result.layers)
    channels = sum(layer.channels for layer in result.layers)
    sentence = (
        f"One NaN pixel in one training batch makes {bad.broken_channels} of {bad.channels} running means and "
        f'variances NaN, and accuracy {_percent(bad.propagated)}; with nonfinite="skip" it is {_percent(bad.skipped)}, '
        f"and recalibrate() brings the poisoned network back to {_percent(bad.repaired)}. On faded images drift() "
        f"finds that {found} of {channels} channels moved (on images like those trained with: {alarms or 'none'}) and "
        f"predicts the gap between the outputs in training and evaluation mode to {off:.0e}; recalibrated on them, "
        f"accuracy on faded images goes from {_percent(result.shifted)} to {_percent(result.recalibrated)}."
    )
    return table, sentence


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:z.1f} %"


def _momentum(track: Track) -> str:
    return "None" if track.momentum is None else f"{track.momentum:g}"


def _named(track: Track) -> str:
    return "the cumulative average" if track.momentum is None else f"momentum {track.momentum:g}"
