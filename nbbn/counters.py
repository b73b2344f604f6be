"""`num_skipped` in state dicts: the one entry that no framework has."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

NAME = "num_skipped"


def split(state: Mapping[str, Any], prefix: str = "") -> tuple[Mapping[str, Any], Any]:
    """The other entries, and what there is under our name after `prefix`, or None."""
    key = f"{prefix}{NAME}"
    if not isinstance(state, Mapping) or key not in state:
        return state, None
    return {name: value for name, value in state.items() if name != key}, state[key]


def checked(value: Any, channels: int, batches: int) -> npt.NDArray[np.int64]:
    """How many of `batches` each channel skipped; none where nothing is known."""
    if value is None:
        return np.zeros(channels, np.int64)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"state_dict[{NAME!r}]: expected an array of integers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise ValueError(f"state_dict[{NAME!r}]: expected {channels} values, one per channel, got shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() <= batches:
        raise ValueError(
            f"state_dict[{NAME!r}]: expected counts from 0 to num_batches_tracked, {batches}, got {array.min()} to "
            f"{array.max()}"
        )
    return array.astype(np.int64)
