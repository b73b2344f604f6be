"""Batch normalization statistics, done right and at the speed of memory, on the arrays people already have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbbn.backends import available_backends, use_backend
from nbbn.bessel import population_to_sample_var, sample_to_population_var
from nbbn.config import get_num_threads, set_num_threads, show_config
from nbbn.drift import Drift, drift
from nbbn.functional import batch_norm, batch_norm_backward, normalize
from nbbn.layer import BatchNorm
from nbbn.moments import Moments
from nbbn.pending import PendingUpdate
from nbbn.statistics import NonFiniteWarning, batch_stats, ema_update

if TYPE_CHECKING:
    from nbbn.fuse import IllConditionedWarning, folding_error, fuse_conv_bn_weights, fuse_linear_bn_weights
    from nbbn.health import check_running_stats
    from nbbn.noise import expected_noise

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Drift",
    "IllConditionedWarning",
    "Moments",
    "NonFiniteWarning",
    "PendingUpdate",
    "available_backends",
    "batch_norm",
    "batch_norm_backward",
    "batch_stats",
    "check_running_stats",
    "drift",
    "ema_update",
    "expected_noise",
    "folding_error",
    "fuse_conv_bn_weights",
    "fuse_linear_bn_weights",
    "get_num_threads",
    "normalize",
    "population_to_sample_var",
    "sample_to_population_var",
    "set_num_threads",
    "show_config",
    "use_backend",
]

#: What is used once a model, not once a call, is imported when it is asked for: a sixth of the time of the import.
_LATER = {
    "IllConditionedWarning": "nbbn.fuse",
    "check_running_stats": "nbbn.health",
    "expected_noise": "nbbn.noise",
    "folding_error": "nbbn.fuse",
    "fuse_conv_bn_weights": "nbbn.fuse",
    "fuse_linear_bn_weights": "nbbn.fuse",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LATER.keys())
