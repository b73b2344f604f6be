"""The backend contract, and which backend serves a call."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from nbbn.arrays import Array, empty, on_device

#: Every backend this version has, and the module that is it. Imported when first needed.
_MODULES = {"numpy": "nbbn.reference", "cpu": "nbbn.cpu", "cuda": "nbbn.cuda"}

#: `nbbn.cuda.warm`, once an array on a device was seen: the short way of calls on such arrays.
warm: Any = None

_forced: ContextVar[str | None] = ContextVar("nbbn_backend", default=None)


@dataclass(frozen=True, slots=True)
class RunningUpdate:
    """What a training call does to the running arrays: both are written in place."""

    running_mean: Array
    running_var: Array
    momentum: float
    ddof: int
    skip_nonfinite: bool


class Backend(Protocol):
    """What a backend module exports.

    `x`, `out`, `residual`, `where`, `grad_*x` are canonical (outer, channels, inner) views, no axis of which is
    empty: the last axis has unit stride, or, where inner is 1 and there are several channels, the channel axis has
    (`where` may have any strides). Everything else is a flat per-channel array. All
    results are preallocated by the caller. A backend checks nothing and decides no policy.
    """

    name: str

    #: The short way for plain arrays (`nbbn.quick`), if the backend has one.
    plain: "Plain | None"

    def moments(self, x: Array, where: Array | None, count: Array, mean: Array, m2: Array) -> None:
        """Write count, mean and m2 of every channel (0, 0, 0 where nothing is selected)."""

    def affine(
        self,
        x: Array,
        mean: Array,
        var: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        residual: Array | None,
        relu: bool,
        out: Array,
    ) -> None:
        """Write act((x - mean) / sqrt(var + eps) * weight + bias + residual); `out` may be `x`."""

    def train(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        residual: Array | None,
        relu: bool,
        out: Array,
        count: Array,
        mean: Array,
        m2: Array,
        update: RunningUpdate | None,
    ) -> int:
        """`moments`, `affine` with them, `ema`, in one call; returns the number of channels skipped."""

    def backward(
        self,
        grad_out: Array,
        x: Array,
        mean: Array,
        var: Array,
        weight: Array | None,
        eps: float,
        training: bool,
        grad_x: Array,
        grad_weight: Array,
        grad_bias: Array,
    ) -> None:
        """Write the three gradients; `grad_x` may be `grad_out` or `x`, the others are float64."""

    def ema(self, count: Array, mean: Array, m2: Array, update: RunningUpdate) -> int:
        """Moving averages of every channel with values; returns the number of channels skipped."""

    def merge(
        self,
        count_a: Array,
        mean_a: Array,
        m2_a: Array,
        count_b: Array,
        mean_b: Array,
        m2_b: Array,
        count: Array,
        mean: Array,
        m2: Array,
    ) -> None:
        """Write the moments of both sets together."""

    def remove(
        self,
        count_all: Array,
        mean_all: Array,
        m2_all: Array,
        count_b: Array,
        mean_b: Array,
        m2_b: Array,
        count: Array,
        mean: Array,
        m2: Array,
    ) -> None:
        """Write the moments of the whole without part b."""


class Plain(Protocol):
    """What a backend with a short way has besides: arrays are contiguous, of one float dtype, and checked here.

    `normalize`, `train` and `backward` decline, having written nothing of the caller's, if memory overlaps, a number
    of values differs, or it is not theirs to do.
    """

    def normalize(
        self, x: Array, out: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float
    ) -> bool:
        """`affine` without residual and activation."""

    def moments(self, x: Array, count: Array, mean: Array, m2: Array) -> None:
        """As `Backend.moments`."""

    def train(
        self,
        x: Array,
        out: Array,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        momentum: float,
        ddof: int,
        count: Array,
        mean: Array,
        m2: Array,
    ) -> bool:
        """`Backend.train` without residual and activation; parameters and running arrays share a dtype."""

    def backward(
        self,
        grad_out: Array,
        x: Array,
        mean: Array,
        var: Array,
        weight: Array | None,
        eps: float,
        grad_x: Array,
        dtype: np.dtype[Any],
    ) -> Array | None:
        """`Backend.backward` in training: gradients of weight and bias in `dtype`, as the rows of one array.

        None where `normalize` would answer False.
        """


def current() -> Backend:
    """The backend for NumPy arrays: the forced one, else the CPU kernels."""
    return _load(_forced.get() or "cpu")


def serving(x: Array) -> Backend:
    """The backend for a checked array: where the array is decides."""
    forced = _forced.get()
    if on_device(x):
        if forced not in (None, "cuda"):
            raise TypeError(
                f"expected arrays in host memory inside use_backend({forced!r}), got one on a CUDA device; "
                "nothing is transferred silently"
            )
        return cast(Backend, cuda())
    if forced == "cuda":
        raise TypeError(
            "expected arrays on a CUDA device inside use_backend('cuda'), got one in host memory; "
            "nothing is transferred silently"
        )
    return _load(forced or "cpu")


def forced() -> str | None:
    """The backend that `use_backend` chose."""
    return _forced.get()


def cuda() -> Any:
    """The CUDA backend; `RuntimeError` says what is missing where it cannot run."""
    missing = _missing_for_cuda()
    if missing is not None:
        raise RuntimeError(f"CUDA: {missing}")
    global warm
    backend = _load("cuda")
    if warm is None:
        warm = import_module("nbbn.cuda.warm")
    return backend


@cache
def _missing_for_cuda() -> str | None:
    # imported when the first array on a device, or a question about one, arrives
    from nbbn.cuda import requirements

    return requirements.missing()


@cache
def _load(name: str) -> Backend:
    return cast(Backend, import_module(_MODULES[name]))


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine.

    Returns
    -------
    tuple of str
        ``"numpy"`` is the float64 reference, ``"cpu"`` the compiled kernels, ``"cuda"`` those for arrays on a GPU.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.available_backends()[:2]
    ('numpy', 'cpu')
    """
    return tuple(name for name in _MODULES if name != "cuda" or _missing_for_cuda() is None)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run the calls inside a ``with`` block on one backend.

    The choice belongs to the current thread or asynchronous task and ends with the block.

    Calling it without ``with`` chooses nothing.

    Parameters
    ----------
    name : {"numpy", "cpu", "cuda"}
        ``"numpy"`` is the float64 reference (slow, for checking), ``"cpu"`` the compiled kernels. Arrays on a CUDA
        device go to ``"cuda"`` anyway; inside ``use_backend("cuda")`` an array in host memory is an error.

    Returns
    -------
    context manager

    Raises
    ------
    ValueError
        If the name is not that of a backend.
    RuntimeError
        If the backend does not work here: says what is missing.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [3.0]])
    >>> with nbbn.use_backend("numpy"):
    ...     nbbn.batch_stats(x).mean
    array([2.])
    """
    if not isinstance(name, str) or name not in _MODULES:
        raise ValueError(f"name: expected one of {_known()}, got {name!r}")
    if name == "cuda":
        cuda()
    return _use(name)


@contextmanager
def _use(name: str) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _known() -> str:
    return ", ".join(repr(name) for name in _MODULES)


def empty_moments(channels: int, like: Array | None = None) -> tuple[Array, Array, Array]:
    """Uninitialized count, mean and m2 for a backend to fill, in the memory that `like` is in."""
    if like is not None and on_device(like):
        counts, *floats = (empty((channels,), np.dtype(kind), like) for kind in (np.int64, np.float64, np.float64))
        return counts, floats[0], floats[1]
    return np.empty(channels, np.int64), np.empty(channels), np.empty(channels)
