"""Folders of images, read with Pillow: 8-bit, as RGB."""

import os
from pathlib import Path

import numpy as np

from nbbn.arrays import Array
from nbbn.files.arrays import UnreadableError, problems_named

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

#: Pillow's modes of images whose values have 8 bits, or are black and white.
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES


def inside(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, in the order of their names; other files are left alone."""

    def failed(error: OSError) -> None:
        raise UnreadableError(error.strerror or str(error))

    paths = [
        Path(here, name) for here, _, names in os.walk(folder, onerror=failed) for name in names if is_image(Path(name))
    ]
    if not paths:
        raise UnreadableError(f"a folder without images ({', '.join(SUFFIXES)})")
    return sorted(paths)


def pixels(path: Path) -> Array:
    """The image, uint8 of shape (height, width, 3): grey is repeated, transparency left out, of several the first."""
    from PIL import Image

    with problems_named(), Image.open(path) as image:
        if image.mode not in _EIGHT_BITS:
            raise UnreadableError(f"expected 8 bits per value, got mode {image.mode}: save it as .npy instead")
        return np.asarray(image.convert("RGB"))
