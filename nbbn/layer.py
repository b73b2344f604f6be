"""`BatchNorm`: the layer. Parameters, running statistics and the mode that decides which statistics are used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn import checks, forks, state
from nbbn.arrays import Array, any_array, copied, full, on_device
from nbbn.checks import NonFinite
from nbbn.functional import batch_norm, batch_norm_backward, forward
from nbbn.moments import Moments
from nbbn.running import RunningStatistics
from nbbn.statistics import refuse_nonfinite, warn_skipped


@dataclass(frozen=True, slots=True)
class _Forward:
    """What `backward` needs of the last forward call. `x` is the caller's array, not a copy."""

    x: Array
    mean: Array
    var: Array
    training: bool
    frozen: bool


class BatchNorm(RunningStatistics):
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
        Parameters and running statistics are of this array's kind and on its device: NumPy, PyTorch, CuPy, Numba.
    nonfinite : {"propagate", "skip", "raise"}
        What NaN or infinite batch statistics do to the running ones: see `ema_update`. "skip" counts, in
        `num_skipped`, and a channel that skipped a batch has seen one fewer in ``momentum=None`` and `debias`.
    debias : bool
        Correct the moving average for its start at 0 and 1, as `ema_update` does with ``step=``: good statistics after
        few batches. Not with ``momentum=None``, which has no such bias. Leave it off to reproduce a framework's
        numbers. For fine-tuning, load the count of batches too: without one, the first batch would replace the loaded
        statistics, so loading them is an error.

    Attributes
    ----------
    weight, bias : arrays of shape (C,) or None
        Scale (gamma) and offset (beta).
    running_mean, running_var : arrays of shape (C,) or None
        Start at 0 and 1. `running_var` holds the sample variance (ddof=1), as in PyTorch.
    num_batches_tracked : int
        Training batches that went into the running statistics.
    num_skipped : int64 array of shape (C,)
        How many of them each channel was left out of, not being finite (``nonfinite="skip"``).
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
    the running statistics and the counters all as they were, or all as they were to be.

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

    bias: Array | None
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
        debias: bool = False,
    ):
        num_features = checks.whole_number("num_features", num_features, least=1)
        eps = checks.epsilon(eps)
        rate = checks.optional_momentum(momentum, decay)
        self.affine = checks.flag("affine", affine)
        track_running_stats = checks.flag("track_running_stats", track_running_stats)
        axis = checks.optional_integer("axis", axis)
        nonfinite = checks.nonfinite(nonfinite)
        debias = checks.flag("debias", debias)
        if axis is None and num_features != 1:
            raise ValueError(f"num_features: expected 1 with axis=None (one channel), got {num_features}")
        if rate is None and debias:
            raise ValueError("debias: expected False beside momentum=None (that average has no bias), got True")
        dtype = checks.parameter_dtype(dtype)
        if like is not None:
            any_array("like", like)

        super().__init__(
            num_features,
            dtype,
            track_running_stats,
            like=like,
            axis=axis,
            eps=eps,
            momentum=rate,
            debias=debias,
            nonfinite=nonfinite,
        )
        self.weight = full(num_features, 1.0, dtype, like) if affine else None
        self.bias = full(num_features, 0.0, dtype, like) if affine else None
        self.grad_weight = None
        self.grad_bias = None
        self._training = True
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

        Notes
        -----
        After a call that raises, whatever it raises, there is nothing for `backward` to differentiate.
        """
        self._forward = None  # of a call that raises, `backward` shall not give the gradients of the one before
        view = checks.data("x", x)
        channel = checks.channel_axis(view, self.axis)
        checks.number_of_channels(view, channel, self.num_features)
        moves = self._training and not self._frozen
        return (
            self._normalize_with_batch(x, view, moves) if moves or not self.track_running_stats else self._evaluate(x)
        )

    def _normalize_with_batch(self, x: Array, view: Array, moves: bool) -> Array:
        tracks = moves and self.track_running_stats and view.size > 0
        pending = self._pending if tracks else None
        at_once = tracks and pending is None and self.nonfinite != "raise" and on_device(view)
        done = self._train_and_move(x) if at_once else None
        if done is not None:
            y, stats, skipped = done
            self._forward = _Forward(x, stats.mean, stats.var(), True, self._frozen)
        else:  # statistics first: what they do to the running ones is a step of its own, as a whole or not at all
            if tracks:
                self._check_running(view, self.weight, self.bias)
            y, stats, skipped = self._train(x, None, None, checks.DEFAULT_MOMENTUM, "propagate")
            last = _Forward(x, stats.mean, stats.var(), True, self._frozen)
            if tracks:
                skipped = self._update(stats, "x") if pending is None else pending._add(stats)
            elif self.nonfinite == "raise":
                refuse_nonfinite("x", stats, None)
            self._forward = last
        warn_skipped(skipped, stats, stacklevel=4)
        return y

    def _train_and_move(self, x: Array) -> tuple[Array, Moments, int] | None:
        """Statistics of the batch and their update of the running ones, together; None if one launch cannot do that."""
        with forks.state:
            momentum = self._momentum()
            if not isinstance(momentum, float):
                return None
            y, stats, skipped = self._train(x, self.running_mean, self.running_var, momentum, self.nonfinite)
            self._count(stats, skipped)
        return y, stats, skipped

    def _train(
        self, x: Array, mean: Array | None, var: Array | None, momentum: float, nonfinite: NonFinite
    ) -> tuple[Array, Moments, int]:
        y, stats, skipped = forward(
            x, mean, var, self.weight, self.bias, training=True, momentum=momentum, eps=self.eps, axis=self.axis,
            nonfinite=nonfinite, need_stats=True,
        )  # fmt: skip
        assert stats is not None  # asked for
        return y, stats, skipped

    def _evaluate(self, x: Array) -> Array:
        assert self.running_mean is not None  # evaluation has running statistics
        assert self.running_var is not None
        with forks.state:
            mean, var = copied(self.running_mean), copied(self.running_var)
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
            If there was no forward call, or the last one raised (a batch that ``nonfinite="raise"`` refused).
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
        last = self._forward
        if last is None:
            raise RuntimeError(
                "backward: expected a forward call before that did not raise, got none; call the layer on an input"
            )
        grad_x, grad_weight, grad_bias = batch_norm_backward(
            grad_out, last.x, last.mean, last.var, self.weight, eps=self.eps, axis=self.axis, training=last.training
        )
        learns = self.affine and not last.frozen
        self.grad_weight = grad_weight if learns else None
        self.grad_bias = grad_bias if learns else None
        return grad_x

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self, *, style: state.Style = "torch", prefix: str = "") -> dict[str, Any]:
        """Copies of parameters and running statistics, under the names of the framework they shall go to.

        Parameters
        ----------
        style : {"torch", "keras", "flax"}
            Whose names: see Returns.
        prefix : str
            In front of every name, such as ``"bn1."`` (PyTorch) or ``"bn1/"`` (Keras, and Flax, where it is the path
            of the module within each collection).

        Returns
        -------
        dict of str to array
            As far as the layer has them: ``weight``, ``bias``, ``running_mean``, ``running_var``,
            ``num_batches_tracked`` (PyTorch; also ``num_skipped``, which it does not know, where channels were or may
            be skipped); ``gamma``, ``beta``, ``moving_mean``, ``moving_variance`` (Keras, in the order of its
            ``set_weights``);
            ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``
            (Flax's collections). `load_state_dict` reads all of them.

        Raises
        ------
        TypeError, ValueError
            If `style` or `prefix` is none.

        Notes
        -----
        Values are those of the layer: Keras and Flax average the population variance, PyTorch and this layer the
        sample variance, n/(n-1) times as large: see `sample_to_population_var`. Tell the framework `eps` too.

        Examples
        --------
        >>> import nbbn
        >>> list(nbbn.BatchNorm(1).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        >>> list(nbbn.BatchNorm(1).state_dict(style="keras", prefix="bn1/"))
        ['bn1/gamma', 'bn1/beta', 'bn1/moving_mean', 'bn1/moving_variance']
        """
        counts: dict[str, Array] = {}
        with forks.state:
            arrays = {name: copied(array) for name, array in self._arrays().items()}
            if self.track_running_stats:
                counts["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
            if self.track_running_stats and (self.nonfinite == "skip" or self.num_skipped.any()):
                counts["num_skipped"] = self.num_skipped.copy()
        return state.write(arrays, counts, style, prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> "BatchNorm":
        """Take parameters and running statistics from a state dict, all or nothing.

        Parameters
        ----------
        state_dict : mapping of str to array
            With PyTorch's names (``weight, bias, running_mean, running_var``), Keras's (``gamma, beta, moving_mean,
            moving_variance``) or Flax's (``scale, bias, mean, var``, also nested in its collections, whose paths
            are joined by ``/``). ``num_batches_tracked`` may be absent, but not with ``debias=True`` or
            ``momentum=None``, which weigh the next batch by it; ``num_skipped`` may always be.
        prefix : str
            What the names begin with, such as ``"backbone.bn1."``; other entries are left alone.

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
        found = state.read(state_dict, prefix)
        needs_count = self.track_running_stats and (self.debias or self.momentum is None)
        if needs_count and "num_batches_tracked" not in found:
            raise ValueError(
                "state_dict: expected num_batches_tracked for a layer with debias=True or momentum=None (without it "
                "the next batch would replace the loaded statistics), got none; add how many batches they come from"
            )
        count = state.batch_count(found.pop("num_batches_tracked", np.array(self.num_batches_tracked)))
        num_skipped = state.skipped_counts(found.pop("num_skipped", None), self.num_features, count)
        mine = self._arrays()
        if found.keys() != mine.keys():
            raise ValueError(f"state_dict: expected {sorted(mine)} for this layer, got {sorted(found)}")
        for name, array in mine.items():
            checks.running(name, array, self.num_features)
        values = {name: state.per_channel(name, found[name], any_array(name, array)) for name, array in mine.items()}
        with forks.state:
            self._replace(values, count, num_skipped)
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
        names = found.keys() - state.COUNTS
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
        """For copy and pickle: all but the input of the last forward call, and what holds updates back."""
        return self.__dict__ | {"_forward": None, "_pending": None}

    def __repr__(self) -> str:
        mode = "frozen" if self._frozen else "training" if self._training else "evaluation"
        extra = "" if self.affine else ", affine=False"
        extra += ", debias=True" if self.debias else ""
        extra += "" if self.nonfinite == "propagate" else f", nonfinite={self.nonfinite!r}"
        tracked = (
            f"num_batches_tracked={self.num_batches_tracked}" if self.track_running_stats else "no running statistics"
        )
        return (
            f"BatchNorm({self.num_features}, eps={self.eps:g}, momentum={_short(self.momentum)}, axis={self.axis}"
            f"{extra}, mode={mode}, {tracked}{', updates held' if self._pending is not None else ''})"
        )


def _short(momentum: float | None) -> str:
    return "None" if momentum is None else f"{momentum:g}"
