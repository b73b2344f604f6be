"""The data: the handwritten digits that scikit-learn ships (1797 images of 8x8 pixels; UCI, Alpaydin & Kaynak 1998)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

Array = npt.NDArray[Any]

#: 512, so that every batch size of the demo divides the test set; the other 1285 images are for training.
TEST_IMAGES = 512


@dataclass(frozen=True, slots=True)
class Digits:
    """Images of shape (N, 1, 8, 8), float32 in [0, 1], and their labels 0 to 9, of shape (N,)."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load(rng: np.random.Generator) -> Digits:
    """All images, split at random into training and test set."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = rng.permutation(len(images))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])
