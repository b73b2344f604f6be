"""State dicts under PyTorch's, Keras's and Flax's names: written; read with everything checked before it is used."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nbbn import checks
from nbbn.arrays import FLOATS, Array, has_cuda_memory, in_host_memory

#: Ours, then every name it goes by: PyTorch's (which are ours), Keras's, Flax's.
NAMES = {
    "weight": ("weight", "gamma", "scale"),
    "bias": ("bias", "beta"),
    "running_mean": ("running_mean", "moving_mean", "mean"),
    "running_var": ("running_var", "moving_variance", "var"),
    "num_batches_tracked": ("num_batches_tracked",),
    "num_skipped": ("num_skipped",),
}

#: Those that count batches; the last one is ours alone.
COUNTS = frozenset(("num_batches_tracked", "num_skipped"))


#: Whose names a state dict is written under.
Style = Literal["torch", "keras", "flax"]

#: The names that only Keras uses, by ours.
_KERAS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

#: Flax's collections of variables, and its names within them.
_FLAX = {
    "params": {"weight": "scale", "bias": "bias"},
    "batch_stats": {"running_mean": "mean", "running_var": "var"},
}

#: What Keras 2 writes behind every name in a file.
_KERAS_SUFFIX = ":0"


def write(arrays: dict[str, Array], counts: dict[str, Array], style: Style, prefix: str) -> dict[str, Any]:
    """A layer's arrays under the names of a framework; `counts`, such as of batches, go with PyTorch's only.

    Raises
    ------
    TypeError
        If `prefix` is not a string.
    ValueError
        If `style` is none that we know.
    """
    _check_prefix(prefix)
    if not isinstance(style, str) or style not in get_args(Style):
        raise ValueError(f"style: expected one of {get_args(Style)}, got {style!r}")
    if style == "flax":
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"prefix: expected the path of a module, such as 'bn1/', for style='flax', got {prefix!r}")
        path = [part for part in prefix.split("/") if part]
        collections = {
            collection: {theirs: arrays[ours] for ours, theirs in names.items() if ours in arrays}
            for collection, names in _FLAX.items()
        }
        return {collection: _nested(path, found) for collection, found in collections.items() if found}
    if style == "keras":
        return {prefix + _KERAS[name]: array for name, array in arrays.items()}
    return {prefix + name: array for name, array in (arrays | counts).items()}


def default_eps(state: Mapping[str, Any], prefix: str) -> float:
    """What the framework whose names these are adds to the variance by default: state dicts do not say."""
    keras = {f"{prefix}{name}" for name in _KERAS.values()}
    return 1e-3 if any(key.removesuffix(_KERAS_SUFFIX) in keras for key in state) else 1e-5


def read(state: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """The entries that begin with `prefix`, under our names, as NumPy arrays (not yet copies).

    Nested mappings count as flat ones whose names are joined by "/"; Flax's collections in front do not count.

    Raises
    ------
    TypeError
        If `state` is not a mapping, or a value is not an array of numbers.
    ValueError
        If an entry has no name we know, or one quantity comes under two names.
    """
    _check_prefix(prefix)
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to arrays, got {type(state).__name__}")
    found: dict[str, Array] = {}
    for path, value in _flat(state):
        collection, _, below = path.partition("/")
        key = below if collection in _FLAX else path
        if not key.startswith(prefix):
            continue
        theirs = key[len(prefix) :].removesuffix(_KERAS_SUFFIX)
        ours = next((name for name, aliases in NAMES.items() if theirs in aliases), None)
        if ours is None:
            known = ", ".join(alias for aliases in NAMES.values() for alias in aliases)
            raise ValueError(f"state_dict: expected names among {known} (prefix {prefix!r}), got {key!r}")
        if ours in found:
            raise ValueError(f"state_dict: expected {ours} once, got it under two names, one of them {key!r}")
        found[ours] = _as_array(key, value)
    if not found:
        raise ValueError(f"state_dict: expected entries that begin with {prefix!r}, got {list(state)[:8]}")
    return found


def per_channel(name: str, value: Array, array: Array) -> Array:
    """What will be stored in the layer's `array`: a value of any real dtype that it can hold."""
    if value.shape != array.shape:
        raise ValueError(
            f"state_dict[{name!r}]: expected {array.size} values (shape {array.shape}), got shape {value.shape}"
        )
    with np.errstate(all="ignore"):
        stored = value.astype(array.dtype)
    if (np.isinf(stored) & ~np.isinf(value)).any():
        raise ValueError(
            f"state_dict[{name!r}]: expected values that {array.dtype} can hold, got {np.abs(value).max()}"
        )
    return stored


def batch_count(value: Array) -> int:
    """The loaded `num_batches_tracked`, checked."""
    if value.size != 1 or value.dtype.kind not in "iu" or value.item() < 0:
        raise ValueError(f"state_dict['num_batches_tracked']: expected one integer >= 0, got {value!r}")
    return int(value.item())


def skipped_counts(value: Array | None, channels: int, batches: int) -> npt.NDArray[np.int64]:
    """The loaded `num_skipped`, checked: how many of `batches` each channel skipped; none where nothing is known."""
    if value is None:
        return np.zeros(channels, np.int64)
    if value.dtype.kind not in "iu":
        raise TypeError(f"state_dict['num_skipped']: expected an array of integers, got dtype {value.dtype}")
    if value.shape != (channels,):
        raise ValueError(
            f"state_dict['num_skipped']: expected {channels} values, one per channel, got shape {value.shape}"
        )
    if value.size and not 0 <= value.min() <= value.max() <= batches:
        raise ValueError(
            f"state_dict['num_skipped']: expected counts from 0 to num_batches_tracked, {batches}, "
            f"got {value.min()} to {value.max()}"
        )
    return value.astype(np.int64)


def layer_dtype(found: Mapping[str, Array]) -> np.dtype[Any]:
    """float64 if anything loaded is, else float32."""
    wide = any(a.dtype == np.float64 for name, a in found.items() if name not in COUNTS)
    return FLOATS[1] if wide else FLOATS[0]


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string, got {prefix!r}")


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; of nested mappings the names joined by "/"."""
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names as keys, got {key!r}")
        if not isinstance(value, Mapping):
            yield key, value
            continue
        for below, leaf in _flat(value):
            yield f"{key}/{below}", leaf


def _nested(path: list[str], leaves: dict[str, Array]) -> dict[str, Any]:
    return leaves if not path else {path[0]: _nested(path[1:], leaves)}


def _as_array(key: str, value: Any) -> Array:
    checks.not_requiring_grad(f"state_dict[{key!r}]", value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"state_dict[{key!r}]: expected a plain array, got a masked one")
    try:
        array = in_host_memory(value) if has_cuda_memory(value) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"state_dict[{key!r}]: expected an array in host memory, got {type(value)}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"state_dict[{key!r}]: expected an array of real numbers, got dtype {array.dtype}")
    return array
