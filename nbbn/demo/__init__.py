"""The demonstration: a small network on handwritten digits, and what its normalization layers do, measured.

Importing it needs the extra ``nbbn[demo]``: scikit-learn, matplotlib and rich.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn requires it

import nbbn
from nbbn.demo import digits, finetuning, folding, inference, picture, repair, report, running, speed, training
from nbbn.demo.network import Network, accuracy

Result = TypeVar("Result")


def run(seed: int, output: Path | None) -> None:
    """Train, measure every part, print the tables and save the picture.

    Parameters
    ----------
    seed : int
        Of all random numbers.
    output : Path or None
        Where the picture goes, in the format of its suffix; None: no picture.
    """
    start = time.perf_counter()
    console = Console()
    rng = np.random.default_rng(seed)
    data = digits.load(rng)
    console.print(
        f"[bold]nbbn demo[/bold]: {len(data.train_images)} handwritten digits to train on, {len(data.test_images)} to "
        f"test on, seed {seed}",
        highlight=False,
    )

    def part(title: str, measure: Callable[[], Result], describe: Callable[[Result], tuple[Table, str]]) -> Result:
        with console.status(title):
            result = measure()
        report.show(console, title, *describe(result))
        return result

    with _one_thread():
        network = _trained(console, data, rng)
        last_norm_inputs = network.norm_input(data.train_images, len(network.norms) - 1)
        part(
            "a  Evaluation mode: a batch, and one image at a time",
            lambda: inference.one_at_a_time(network, data.test_images, data.test_labels),
            report.one_at_a_time,
        )
        forgotten = part(
            "b  The forgotten eval(): accuracy with the batch's own statistics",
            lambda: inference.forgotten_eval(network, data.test_images, data.test_labels, rng),
            report.forgotten_eval,
        )
        converging = part(
            "c  Running statistics of a fixed layer, on their way to the population's",
            lambda: running.convergence(last_norm_inputs, rng),
            report.convergence,
        )
        noisy = part(
            "d  The noise that stays in them",
            lambda: running.noise(last_norm_inputs, rng),
            report.noise,
        )
        tuned = part(
            "e  Fine-tuning on faded images, parameters fixed",
            lambda: finetuning.fine_tuning(network, data, rng),
            report.fine_tuning,
        )
    timed = part("f  Speed on this machine", lambda: speed.speed(rng), report.speed)
    with _one_thread():
        part(
            "g  Folded into the layers before: the normalization is gone",
            lambda: folding.folding(network, data.test_images),
            report.folding,
        )
        part(
            "h  One NaN batch, and data that shifted: kept out, found, repaired",
            lambda: repair.repair(network, data),
            report.repair,
        )

    console.print()
    if output is not None:
        picture.save(output, forgotten, converging, noisy, tuned, timed)
        console.print(f"picture: {output}", highlight=False, soft_wrap=True)
    console.print(f"finished in {time.perf_counter() - start:.0f} s", highlight=False)


def _trained(console: Console, data: digits.Digits, rng: np.random.Generator) -> Network:
    network = Network(rng)
    total = training.steps(len(data.train_images))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} batches"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("compiling kernels", total=total)
        training.train(
            network,
            data.train_images,
            data.train_labels,
            rng,
            after_step=lambda loss: progress.update(task, advance=1, description=f"training, loss {loss:.3f}"),
        )
    reached = accuracy(network(data.test_images), data.test_labels)
    console.print(f"accuracy on the test images in evaluation mode: {100 * reached:.1f} %", highlight=False)
    return network


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is enough for a network this small, and spares compiling every kernel twice.

    So it is for the matrix products: two threads on busy cores wait for each other (training 17 s, not 1 s).
    """
    before = nbbn.get_num_threads()
    nbbn.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        nbbn.set_num_threads(before)
