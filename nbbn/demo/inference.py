"""Parts a and b: single images in evaluation mode, and what happens when eval() is forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbbn.demo.network import CLASSES, Array, Network, accuracy, with_batch_statistics

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class LayerOutputs:
    """Outputs of one normalization layer, for the same inputs as one batch and one image at a time."""

    shape: tuple[int, ...]
    values: int
    different_values: int


@dataclass(frozen=True, slots=True)
class OneAtATime:
    """Part a: the network in evaluation mode, on all test images as one batch and on each alone."""

    images: int
    layers: list[LayerOutputs]
    batch_accuracy: float
    single_accuracy: float
    different_answers: int
    largest_logit: float
    logit_difference: float


@dataclass(frozen=True, slots=True)
class ForgottenEval:
    """Part b: accuracy with the statistics of the batch, per batch size, against evaluation mode."""

    batch_sizes: tuple[int, ...]
    shuffled: Array
    shuffled_std: Array
    sorted: Array
    evaluation: float
    most_frequent_class: float
    different_answers_alone: int
    running_statistics_unchanged: bool
    example_images: Array
    example_labels: Array
    example_evaluation: Array
    example_alone: Array


def one_at_a_time(network: Network, images: Array, labels: Array) -> OneAtATime:
    """Compare bits of the normalization layers' outputs, and the answers of the whole network."""
    layers = []
    for index, norm in enumerate(network.norms):
        x = network.norm_input(images, index)
        together = norm(x)
        alone = np.concatenate([norm(x[i : i + 1]) for i in range(len(x))])
        layers.append(LayerOutputs(x.shape[1:], x.size, int(np.count_nonzero(_bits(together) != _bits(alone)))))
    together = network(images)
    alone = np.concatenate([network(images[i : i + 1]) for i in range(len(images))])
    return OneAtATime(
        images=len(images),
        layers=layers,
        batch_accuracy=accuracy(together, labels),
        single_accuracy=accuracy(alone, labels),
        different_answers=int(np.count_nonzero(together.argmax(1) != alone.argmax(1))),
        largest_logit=float(np.abs(together).max()),
        logit_difference=float(np.abs(together - alone).max()),
    )


def forgotten_eval(
    network: Network,
    images: Array,
    labels: Array,
    rng: np.random.Generator,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    shuffles: int = 4,
) -> ForgottenEval:
    """Accuracy with batch statistics on shuffled test images, and on test images sorted by digit."""
    before = network.running_statistics()
    alone = _answers(network, images, 1)

    def accuracies(order: Array) -> list[float]:
        answers = [alone[order] if size == 1 else _answers(network, images[order], size) for size in batch_sizes]
        return [float(np.mean(answer == labels[order])) for answer in answers]

    shuffled = np.array([accuracies(rng.permutation(len(images))) for _ in range(shuffles)])
    by_digit = np.array(accuracies(np.argsort(labels, kind="stable")))
    after = network.running_statistics()
    shown = np.array([np.flatnonzero(labels == digit)[0] for digit in range(CLASSES)])
    return ForgottenEval(
        batch_sizes=tuple(batch_sizes),
        shuffled=shuffled.mean(0),
        shuffled_std=shuffled.std(0, ddof=1),
        sorted=by_digit,
        evaluation=accuracy(network(images), labels),
        most_frequent_class=float(np.bincount(labels).max() / len(labels)),
        different_answers_alone=len(np.unique(alone)),
        running_statistics_unchanged=all(
            np.array_equal(_bits(a), _bits(b)) for a, b in zip(before, after, strict=True)
        ),
        example_images=images[shown, 0],
        example_labels=labels[shown],
        example_evaluation=network(images[shown]).argmax(1),
        example_alone=alone[shown],
    )


def _answers(network: Network, images: Array, size: int) -> Array:
    """Digits answered with batch statistics, in consecutive batches of `size`; it divides the number of images."""
    batches = np.split(images, len(images) // size)
    logits = [network(batch, with_batch_statistics) for batch in batches]
    return np.array(np.concatenate(logits).argmax(1))


def _bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")
