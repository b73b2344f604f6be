"""Part h: one NaN batch, and data that shifted: kept out, found, repaired."""

import copy
import warnings
from dataclasses import dataclass

import numpy as np

import nbbn
from nbbn.demo.digits import Digits
from nbbn.demo.finetuning import CONTRAST
from nbbn.demo.network import Array, Network, accuracy
from nbbn.demo.training import BATCH


@dataclass(frozen=True, slots=True)
class Poisoned:
    """Accuracy after one training batch with one NaN pixel: statistics take it in, or leave it out; then repaired."""

    before: float
    propagated: float
    skipped: float
    repaired: float
    broken_channels: int
    channels: int
    skipped_channels: int


@dataclass(frozen=True, slots=True)
class ShiftedLayer:
    """Channels of a layer that `drift` calls significant, on images like those trained with and on shifted ones.

    Output error: of all channels together, root mean square, as predicted and as measured on the shifted images.
    """

    channels: int
    significant: int
    significant_shifted: int
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Repaired:
    """Part h."""

    poisoned: Poisoned
    layers: list[ShiftedLayer]
    shifted: float
    recalibrated: float


def repair(trained: Network, digits: Digits) -> Repaired:
    """Poison copies of the network with one batch; look for drift on shifted images; recalibrate both."""
    shifted = CONTRAST * digits.test_images
    layers = [_drift(trained, index, digits.test_images, shifted) for index in range(len(trained.norms))]
    adapted = copy.deepcopy(trained).recalibrate(_batches(CONTRAST * digits.train_images))
    return Repaired(
        poisoned=_poisoned(trained, digits),
        layers=layers,
        shifted=_accuracy(trained, shifted, digits.test_labels),
        recalibrated=_accuracy(adapted, shifted, digits.test_labels),
    )


def _poisoned(trained: Network, digits: Digits) -> Poisoned:
    bad = digits.train_images[:BATCH].copy()
    bad[0, 0, 0, 0] = np.nan
    propagating, skipping = copy.deepcopy(trained), copy.deepcopy(trained)
    for norm in skipping.norms:
        norm.nonfinite = "skip"
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", nbbn.NonFiniteWarning)  # what it would say is in the table
        for network in (propagating, skipping):
            network.train()(bad)
    running = (norm.state_dict() for norm in propagating.norms)
    reports = [nbbn.check_running_stats(state["running_mean"], state["running_var"]) for state in running]
    after = [_accuracy(network, digits.test_images, digits.test_labels) for network in (propagating, skipping)]
    propagating.recalibrate(_batches(digits.train_images))
    return Poisoned(
        before=_accuracy(trained, digits.test_images, digits.test_labels),
        propagated=after[0],
        skipped=after[1],
        repaired=_accuracy(propagating, digits.test_images, digits.test_labels),
        broken_channels=sum(len({finding.channel for finding in report.findings}) for report in reports),
        channels=sum(norm.num_features for norm in trained.norms),
        skipped_channels=sum(int((norm.num_skipped > 0).sum()) for norm in skipping.norms),
    )


def _drift(network: Network, index: int, images: Array, shifted: Array) -> ShiftedLayer:
    norm = network.norms[index]
    usual, x = (network.norm_input(batch, index) for batch in (images, shifted))
    # the batches trained with were smaller: the running statistics have noise of their own
    worth = BATCH * (2 - (norm.momentum or 1.0)) / (norm.momentum or 1.0)
    found = norm.drift(x, running_count=worth)
    training = copy.deepcopy(norm).train()
    return ShiftedLayer(
        channels=norm.num_features,
        significant=int(norm.drift(usual, running_count=worth).significant.sum()),
        significant_shifted=int(found.significant.sum()),
        predicted=_rms(found.output_error),
        measured=_rms(training(x) - norm(x)),
    )


def _accuracy(network: Network, images: Array, labels: Array) -> float:
    with np.errstate(invalid="ignore"):
        return accuracy(network.eval()(images), labels)


def _batches(images: Array) -> list[Array]:
    return np.array_split(images, len(images) // BATCH)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
