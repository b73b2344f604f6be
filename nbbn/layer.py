"""`BatchNorm`: the layer. Parameters, running statistics and the mode that decides which statistics are used."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn import backends, checks, forks, state
from nbbn.arrays import Array, numpy_array
from nbbn.backends import RunningUpdate
from nbbn.checks import NonFinite
from nbbn.functional import batch_norm, batch_norm_backward, forward
from nbbn.moments import Moments
from nbbn.statistics import batch_stats, refuse_nonfinite, warn_skipped


@dataclass(frozen=True, slots=True)
class _Forward:
    """What `backward` needs of the last forward call. `x` is the caller's array, not a copy."""

    x: Array
    mean: Array
    var: Array
    training: bool
    frozen: bool


class BatchNorm:
    r"""Batch normalization that remembers: training, evaluation and frozen modes over the same parameters.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance inside the square root; >= 0.
    momentum : float or None
        Weight of the NEW batch in the running statistics, in [0, 1]. None: the average over all batches,
        each with the same weight (``1 / num_batches_tracked``).
    affine : bool
        Whether there are `weight` (starts at 1) and `bias` (starts at 0).
    track_running_stats : bool
        False keeps no running statistics: the batch's own normalize in evaluation too, as in PyTorch.
    axis : int or None
        The channel axis; None: the whole array is one channel.
    decay : float, optional
        Weight of the OLD value, ``1 - momentum``. Instead of `momentum`.
    dtype : dtype
        Of parameters and running statistics: float32 or float64, whatever `x` is.
    like : array, optional
        Parameters are of this array's kind and on its device (this version: NumPy).
    nonfinite : {"propagate", "skip", "raise"}
        What NaN or infinite batch statistics do to the running ones: see `ema_update`. An average over all batches
        (``momentum=None``) cannot skip: a skipped one would count as if it had the old values.

    Attributes
    ----------
    weight, bias : arrays of shape (C,) or None
        Scale (gamma) and offset (beta).
    running_mean, running_var : arrays of shape (C,) or None
        Start at 0 and 1. `running_var` holds the sample variance (ddof=1), as in PyTorch.
    num_batches_tracked : int
        Training batches that went into the running statistics.
    training, frozen : bool
        The mode: set by `train`, `eval`, `freeze`, `unfreeze`.
    grad_weight, grad_bias : arrays of shape (C,) or None
        Filled by `backward`, None before it and on frozen layers.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.

    Notes
    -----
    ===========  ==================  ====================  =================  ====================
    mode         normalizes with     running statistics    needs              parameter gradients
    ===========  ==================  ====================  =================  ====================
    training     this batch          move by `momentum`    > 1 value/channel  yes
    evaluation   running statistics  never written         any batch          yes
    frozen       running statistics  never written         any batch          none
    ===========  ==================  ====================  =================  ====================

    `freeze` wins over `train`: a frozen layer inside a model that is put into training mode stays frozen.

    Any number of threads may call one layer. Every batch moves the running statistics as a whole (mean, variance and
    counter, one batch after the other, in the order in which they finish), and evaluation and `state_dict` see them
    between two batches. `backward` belongs to the last forward call of any thread: keep a forward call and its
    `backward` in one thread, with a layer of its own or a lock. An exception, Ctrl-C included, leaves the parameters,
    the running statistics and the counter all as they were, or all as they were to be.

    Source: Ioffe & Szegedy (2015), algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> rng = np.random.default_rng(0)
    >>> bn = nbbn.BatchNorm(3)
    >>> for _ in range(100):
    ...     y = bn(rng.normal(5.0, 2.0, size=(64, 3)).astype(np.float32))
    >>> bn.running_mean.round(0), bn.running_var.round(0)
    (array([5., 5., 5.], dtype=float32), array([4., 4., 4.], dtype=float32))
    >>> bn.eval()(np.full((1, 3), 5.0, np.float32)).shape  # one sample: running statistics
    (1, 3)
    >>> bn
    BatchNorm(3, eps=1e-05, momentum=0.1, axis=1, mode=evaluation, num_batches_tracked=100)
    """

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    grad_weight: Array | None
    grad_bias: Array | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = checks.DEFAULT_MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int | None = 1,
        decay: float | None = None,
        dtype: npt.DTypeLike = np.float32,
        like: Array | None = None,
        nonfinite: NonFinite = "propagate",
    ):
        self.num_features = checks.whole_number("num_features", num_features, least=1)
        self.eps = checks.epsilon(eps)
        self.momentum = checks.optional_momentum(momentum, decay)
        self.affine = checks.flag("affine", affine)
        self.track_running_stats = checks.flag("track_running_stats", track_running_stats)
        self.axis = checks.optional_integer("axis", axis)
        self.nonfinite: NonFinite = checks.nonfinite(nonfinite)
        if axis is None and num_features != 1:
            raise ValueError(f"num_features: expected 1 with axis=None (one channel), got {num_features}")
        if self.momentum is None and nonfinite == "skip":
            raise ValueError("nonfinite: expected 'propagate' or 'raise' beside momentum=None, got 'skip'")
        if like is not None:
            numpy_array("like", like)
        dtype = checks.parameter_dtype(dtype)

        self.weight = np.ones(num_features, dtype) if affine else None
        self.bias = np.zeros(num_features, dtype) if affine else None
        self.running_mean = np.zeros(num_features, dtype) if track_running_stats else None
        self.running_var = np.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.grad_weight = None
        self.grad_bias = None
        self._training = True
        self._frozen = False
        self._forward: _Forward | None = None

    # --- modes ------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether `train` was called last (or neither `train` nor `eval`). A frozen layer evaluates all the same."""
        return self._training

    @property
    def frozen(self) -> bool:
        """Whether `freeze` is in force."""
        return self._frozen

    def train(self, mode: bool = True) -> "BatchNorm":
        """Training mode: batch statistics normalize and move the running ones.

        Parameters
        ----------
        mode : bool
            False is the same as `eval`, as in PyTorch.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            If `mode` is not a bool.

        Examples
        --------
        >>> import nbbn
        >>> nbbn.BatchNorm(1).train().training
        True
        """
        self._training = checks.flag("mode", mode)
        return self

    def eval(self) -> "BatchNorm":
        """Evaluation mode: running statistics normalize, nothing is written.

        Returns
        -------
        BatchNorm
            The layer itself.

        Examples
        --------
        >>> import nbbn
        >>> nbbn.BatchNorm(1).eval().training
        False
        """
        return self.train(False)

    def freeze(self) -> "BatchNorm":
        """Behave as in evaluation whatever `train` says, until `unfreeze`; leave no parameter gradients.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        ValueError
            If the layer keeps no running statistics: there is nothing to freeze.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1).freeze().train()
        >>> y = bn(np.array([[1.0], [9.0]]))
        >>> bn.running_mean  # has not moved
        array([0.], dtype=float32)
        """
        if not self.track_running_stats:
            raise ValueError("freeze: expected a layer with running statistics, got track_running_stats=False")
        self._frozen = True
        return self

    def unfreeze(self) -> "BatchNorm":
        """Undo `freeze`: `train` and `eval` decide again.

        Returns
        -------
        BatchNorm
            The layer itself.

        Examples
        --------
        >>> import nbbn
        >>> nbbn.BatchNorm(1).freeze().unfreeze().frozen
        False
        """
        self._frozen = False
        return self

    # --- forward and backward -----------------------------------------------------------------------------------

    def __call__(self, x: Array) -> Array:
        """Normalize `x`; in training mode, move the running statistics.

        Parameters
        ----------
        x : array of shape (..., C, ...)
            As in `batch_norm`. Kept (not copied) for `backward`: do not change it before.

        Returns
        -------
        array of the shape of x
            Of its dtype; float32 for integers (evaluation only).

        Raises
        ------
        TypeError
            If `x` is not a NumPy array of a supported dtype.
        ValueError
            If `x` has not C channels, or training sees only one value per channel.
        FloatingPointError
            With ``nonfinite="raise"``; nothing has changed then.
        """
        x = checks.data("x", x)
        channel = checks.channel_axis(x, self.axis)
        checks.number_of_channels(x, channel, self.num_features)
        moves = self._training and not self._frozen
        return self._normalize_with_batch(x, moves) if moves or not self.track_running_stats else self._evaluate(x)

    def _normalize_with_batch(self, x: Array, moves: bool) -> Array:
        running = None
        if moves and self.track_running_stats:
            running = checks.running_pair(self.running_mean, self.running_var, self.num_features)
            assert running is not None  # the layer tracks statistics
            for name, array in zip(("running_mean", "running_var"), running, strict=True):
                checks.disjoint(name, array, x=x, weight=self.weight, bias=self.bias)
        y, stats, _ = forward(
            x, None, None, self.weight, self.bias, training=True, momentum=checks.DEFAULT_MOMENTUM, eps=self.eps,
            axis=self.axis, nonfinite="propagate", need_stats=True,
        )  # fmt: skip
        assert stats is not None  # asked for
        last = _Forward(x, stats.mean, stats.var(), True, self._frozen)
        skipped = 0
        if running is not None and x.size:
            skipped = self._move(*running, stats)
        elif self.nonfinite == "raise":
            refuse_nonfinite("x", stats, None)
        self._forward = last
        warn_skipped(skipped, stats, stacklevel=4)
        return y

    def _move(self, mean: Array, var: Array, stats: Moments) -> int:
        """Move the running statistics by one batch and count it; returns how many channels were skipped."""
        with forks.state:
            tracked = self.num_batches_tracked + 1
            rate = 1.0 / tracked if self.momentum is None else self.momentum
            update = RunningUpdate(mean, var, rate, 1, self.nonfinite == "skip")
            if self.nonfinite == "raise":
                refuse_nonfinite("x", stats, update)

            def write() -> int:
                skipped = backends.current().ema(stats.count, stats.mean, stats.m2, update)
                self.num_batches_tracked = tracked
                return skipped

            return self._all_or_nothing((mean, var), write)

    def _all_or_nothing(self, arrays: Iterable[Array], write: Callable[[], int]) -> int:
        """Let `write` change these arrays and the counter; if anything is raised, Ctrl-C included, undo it."""
        before = [(array, array.copy()) for array in arrays]
        tracked = self.num_batches_tracked
        try:
            return write()
        except BaseException:
            for array, values in before:
                array[:] = values
            self.num_batches_tracked = tracked
            raise

    def _evaluate(self, x: Array) -> Array:
        with forks.state:
            assert self.running_mean is not None  # evaluation has running statistics
            assert self.running_var is not None
            mean, var = self.running_mean.copy(), self.running_var.copy()
        y = batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps, axis=self.axis)
        self._forward = _Forward(x, mean, var, False, self._frozen)
        return y

    def backward(self, grad_out: Array) -> Array:
        """Gradient with respect to the input of the last forward call; sets `grad_weight` and `grad_bias`.

        They are replaced by every call, not added to as PyTorch does.

        Parameters
        ----------
        grad_out : array of the shape of that input
            Gradient with respect to its output.

        Returns
        -------
        array of the shape and dtype of x

        Raises
        ------
        RuntimeError
            If there was no forward call.
        TypeError, ValueError
            If `grad_out` is not an array of the right shape.

        Notes
        -----
        Through the batch statistics after a training forward; with constant statistics after an evaluation one:
        see `batch_norm_backward`. A frozen layer, or one without parameters, leaves no parameter gradients.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(2)
        >>> y = bn(np.array([[1.0, 2.0], [3.0, 7.0]]))
        >>> dx = bn.backward(np.ones_like(y))
        >>> bn.grad_bias
        array([2., 2.], dtype=float32)
        """
        if self._forward is None:
            raise RuntimeError("backward: expected a forward call before, got none; call the layer on an input first")
        last = self._forward
        grad_x, grad_weight, grad_bias = batch_norm_backward(
            grad_out, last.x, last.mean, last.var, self.weight, eps=self.eps, axis=self.axis, training=last.training
        )
        learns = self.affine and not last.frozen
        self.grad_weight = grad_weight if learns else None
        self.grad_bias = grad_bias if learns else None
        return grad_x

    # --- running statistics -------------------------------------------------------------------------------------

    def recalibrate(self, batches: Iterable[Array]) -> "BatchNorm":
        """Replace the running statistics by the exact population statistics of an iterable of batches.

        One merged population, not an average of averages: batches may differ in size. `running_var` becomes the
        population variance (ddof=0) and `num_batches_tracked` the number of batches (empty ones left out).

        Parameters
        ----------
        batches : iterable of arrays
            Inputs of this layer, read once, one at a time.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            If `batches` is not an iterable of arrays; a single array is not: pass ``[x]``.
        ValueError
            If there is no value at all, a batch has another number of channels, or the layer keeps no running
            statistics.
        RuntimeError
            If the layer is frozen: its statistics never move.
        FloatingPointError
            With ``nonfinite="raise"`` or ``"skip"``, if the population is not finite.

        Notes
        -----
        If anything raises, the iterable included, the layer is as it was.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1).recalibrate(np.split(np.arange(6.0)[:, None], [1, 3]))
        >>> bn.running_mean, bn.running_var.round(4), bn.num_batches_tracked
        (array([2.5], dtype=float32), array([2.9167], dtype=float32), 3)
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("recalibrate: expected a layer with running statistics, got track_running_stats=False")
        if self._frozen:
            raise RuntimeError("recalibrate: expected a layer that is not frozen; call unfreeze() first")
        checks.running_pair(self.running_mean, self.running_var, self.num_features)
        checks.batches(batches)
        total = Moments.zeros(self.num_features)
        number = 0
        for batch in batches:
            stats = batch_stats(batch, axis=self.axis)
            if stats.count.size != self.num_features:
                raise ValueError(
                    f"batches: expected {self.num_features} channels, got {stats.count.size} in batch {number}"
                )
            total += stats
            number += 1 if stats.count.any() else 0  # an empty batch does not count in training either
        if not total.count.any():
            raise ValueError(f"batches: expected at least one value per channel, got none in {number} batches")
        dtype = self.running_mean.dtype
        with np.errstate(over="ignore"):
            mean, var = total.mean.astype(dtype), total.var().astype(dtype)
        if self.nonfinite != "propagate" and not (np.isfinite(mean).all() and np.isfinite(var).all()):
            raise FloatingPointError(
                f"batches: expected finite statistics (nonfinite={self.nonfinite!r}), got NaN or infinity; "
                "nothing was changed"
            )
        with forks.state:
            self._replace({"running_mean": mean, "running_var": var}, number)
        return self

    def _replace(self, values: Mapping[str, Array], number: int) -> None:
        """Overwrite these arrays and the counter."""
        arrays = {name: array for name, array in self._arrays().items() if name in values}

        def write() -> int:
            for name, array in arrays.items():
                array[:] = values[name]
            self.num_batches_tracked = number
            return number

        self._all_or_nothing(arrays.values(), write)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict of str to array
            ``weight``, ``bias``, ``running_mean``, ``running_var``, ``num_batches_tracked``, as far as the layer
            has them.

        Examples
        --------
        >>> import nbbn
        >>> list(nbbn.BatchNorm(1).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        with forks.state:
            result = {name: array.copy() for name, array in self._arrays().items()}
            if self.track_running_stats:
                result["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> "BatchNorm":
        """Take parameters and running statistics from a state dict, all or nothing.

        Parameters
        ----------
        state_dict : mapping of str to array
            With PyTorch's names (``weight, bias, running_mean, running_var``), Keras's (``gamma, beta, moving_mean,
            moving_variance``) or Flax's (``scale, bias, mean, var``). ``num_batches_tracked`` may be absent.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            If a value is not an array of real numbers.
        ValueError
            If a name is unknown, missing, or superfluous for this layer, or a size differs. Nothing has changed.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> one = np.ones(1)
        >>> keras = {"gamma": one, "beta": one, "moving_mean": 3 * one, "moving_variance": one}
        >>> nbbn.BatchNorm(1).load_state_dict(keras).running_mean
        array([3.], dtype=float32)
        """
        found = state.read(state_dict)
        count = state.batch_count(found.pop("num_batches_tracked", np.array(self.num_batches_tracked)))
        mine = self._arrays()
        if found.keys() != mine.keys():
            raise ValueError(f"state_dict: expected {sorted(mine)} for this layer, got {sorted(found)}")
        for name, array in mine.items():
            checks.running(name, array, self.num_features)
        values = {name: state.per_channel(name, found[name], array) for name, array in mine.items()}
        with forks.state:
            self._replace(values, count)
        self._forward = None
        return self

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "", **options: Any) -> "BatchNorm":
        """A new layer from a state dict; whether it is affine and tracks statistics follows from the names.

        Parameters
        ----------
        state_dict : mapping of str to array
            Names as in `load_state_dict`, each after `prefix`; other entries are left alone.
        prefix : str
            Such as ``"backbone.bn1."``.
        **options
            Other arguments of `BatchNorm`. State dicts hold neither `eps` nor `momentum` nor `axis`: give those
            the model was trained with. Without it, `eps` is the default of the framework whose names these are
            (PyTorch and Flax 1e-5, Keras 1e-3).

        Returns
        -------
        BatchNorm
            In training mode, as every new layer.

        Raises
        ------
        TypeError, ValueError
            As `load_state_dict`.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> d = {"bn.running_mean": np.array([1.0, 2.0]), "bn.running_var": np.ones(2), "fc.weight": np.eye(2)}
        >>> nbbn.BatchNorm.from_state_dict(d, "bn.").running_mean
        array([1., 2.])
        """
        found = state.read(state_dict, prefix)
        names = found.keys() - {"num_batches_tracked"}
        if not names:
            raise ValueError(f"state_dict: expected parameters or running statistics after {prefix!r}, got neither")
        options.setdefault("affine", "weight" in names or "bias" in names)
        options.setdefault("track_running_stats", "running_mean" in names or "running_var" in names)
        options.setdefault("dtype", state.layer_dtype(found))
        options.setdefault("eps", state.default_eps(state_dict, prefix))
        layer = cls(max(found[name].size for name in names), **options)
        return layer.load_state_dict(found)

    def _arrays(self) -> dict[str, Array]:
        candidates = {name: getattr(self, name) for name in ("weight", "bias", "running_mean", "running_var")}
        return {name: array for name, array in candidates.items() if array is not None}

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all but the input of the last forward call."""
        return self.__dict__ | {"_forward": None}

    def __repr__(self) -> str:
        mode = "frozen" if self._frozen else "training" if self._training else "evaluation"
        extra = "" if self.affine else ", affine=False"
        extra += "" if self.nonfinite == "propagate" else f", nonfinite={self.nonfinite!r}"
        tracked = (
            f"num_batches_tracked={self.num_batches_tracked}" if self.track_running_stats else "no running statistics"
        )
        return (
            f"BatchNorm({self.num_features}, eps={self.eps:g}, momentum={_short(self.momentum)}, axis={self.axis}"
            f"{extra}, mode={mode}, {tracked})"
        )


def _short(momentum: float | None) -> str:
    return "None" if momentum is None else f"{momentum:g}"
