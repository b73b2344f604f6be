"""Part e: fine-tuning on shifted data with the layers left in training mode, and what protects and repairs them."""

import copy
from dataclasses import dataclass

import numpy as np

from nbbn.demo.digits import Digits
from nbbn.demo.network import Array, Network, accuracy
from nbbn.demo.training import BATCH

#: Contrast of the shifted images: ink that faded to a quarter.
CONTRAST = np.float32(0.25)


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Accuracy in evaluation mode on the old test images and on the same images, faded."""

    old: float
    faded: float


@dataclass(frozen=True, slots=True)
class FineTuning:
    """Part e: accuracy on old images before and after each batch, and on both kinds at the end.

    `largest_shift` is the furthest that a running mean moved, in running standard deviations before.
    """

    images: int
    batches: int
    left_training_curve: Array
    frozen_curve: Array
    before: Accuracies
    left_training: Accuracies
    frozen: Accuracies
    recalibrated: Accuracies
    largest_shift: float
    frozen_unchanged: bool


def fine_tuning(trained: Network, digits: Digits, rng: np.random.Generator, batches: int = 40) -> FineTuning:
    """Run faded images forward through two copies of the network; no parameter changes in either.

    One copy has its normalization layers left in training mode, in the other they are frozen. Afterwards the
    first is recalibrated on old training images.
    """
    left_training, frozen = copy.deepcopy(trained), copy.deepcopy(trained).freeze()
    faded = [
        CONTRAST * digits.train_images[rng.choice(len(digits.train_images), BATCH, replace=False)]
        for _ in range(batches)
    ]
    left_training_curve = _curve(left_training, faded, digits)
    frozen_curve = _curve(frozen, faded, digits)
    before, corrupted, kept = (network.running_statistics() for network in (trained, left_training, frozen))
    shifts = [
        (np.abs(new - old) / np.sqrt(var)).max()
        for old, var, new in zip(before[::2], before[1::2], corrupted[::2], strict=True)
    ]
    end = _accuracies(left_training, digits)
    left_training.recalibrate(np.array_split(digits.train_images, len(digits.train_images) // BATCH))
    return FineTuning(
        images=len(digits.test_images),
        batches=batches,
        left_training_curve=left_training_curve,
        frozen_curve=frozen_curve,
        before=_accuracies(trained, digits),
        left_training=end,
        frozen=_accuracies(frozen, digits),
        recalibrated=_accuracies(left_training, digits),
        largest_shift=float(max(shifts)),
        frozen_unchanged=all(np.array_equal(a, b) for a, b in zip(before, kept, strict=True)),
    )


def _curve(network: Network, batches: list[Array], digits: Digits) -> Array:
    """Accuracy on old test images before and after each forward pass in training mode."""
    curve = [accuracy(network.eval()(digits.test_images), digits.test_labels)]
    for batch in batches:
        network.train()(batch)
        curve.append(accuracy(network.eval()(digits.test_images), digits.test_labels))
    return np.array(curve)


def _accuracies(network: Network, digits: Digits) -> Accuracies:
    network.eval()
    old, faded = (
        accuracy(network(images), digits.test_labels) for images in (digits.test_images, CONTRAST * digits.test_images)
    )
    return Accuracies(old, faded)
