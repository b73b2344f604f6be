"""The running statistics of a layer, and everything that moves them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nbbn import checks, forks
from nbbn.arrays import Array, any_array, assign, full, on_device
from nbbn.averaging import weight_of_step, weights_of_steps
from nbbn.backends import RunningUpdate
from nbbn.checks import NonFinite
from nbbn.drift import Drift, drift, independent_values
from nbbn.moments import Moments, hosted
from nbbn.pending import PendingUpdate
from nbbn.population import gather
from nbbn.statistics import BoolArray, batch_stats, move, nonfinite_channels, refuse_nonfinite


class RunningStatistics:
    """What `BatchNorm` knows about its data: arguments checked before, attributes documented there."""

    weight: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_skipped: npt.NDArray[np.int64]

    def __init__(
        self,
        num_features: int,
        dtype: np.dtype[Any],
        track_running_stats: bool,
        *,
        like: Array | None,
        axis: int | None,
        eps: float,
        momentum: float | None,
        debias: bool,
        nonfinite: NonFinite,
    ):
        self.num_features = num_features
        self.axis = axis
        self.eps = eps
        self.momentum = momentum
        self.debias = debias
        self.nonfinite: NonFinite = nonfinite
        self.track_running_stats = track_running_stats
        self.running_mean = full(num_features, 0.0, dtype, like) if track_running_stats else None
        self.running_var = full(num_features, 1.0, dtype, like) if track_running_stats else None
        self.num_batches_tracked = 0
        self.num_skipped = np.zeros(num_features, np.int64)
        self._frozen = False
        self._pending: PendingUpdate | None = None

    def hold_updates(self) -> PendingUpdate:
        """A ``with`` block in which training calls keep their statistics back, to be used once or not at all.

        Inside, training calls normalize with their own batch, as ever, and the running statistics stand still.
        Afterwards ``pending.commit()`` makes ONE update from all values together (one population, not an average of
        averages; `num_batches_tracked` grows by 1) and ``pending.drop()`` forgets them. Neither: nothing changes.

        For gradient accumulation (statistics of the whole batch from micro-batches), and for steps that may be skipped,
        as in mixed precision.

        Returns
        -------
        PendingUpdate
            Use it in ``with ... as pending``.

        Raises
        ------
        ValueError
            If the layer keeps no running statistics.
        RuntimeError
            When the block is entered: if the layer is in such a block already.

        Notes
        -----
        An exception that leaves the block drops. Calls in evaluation mode, or of a frozen layer, add nothing. The
        policy for NaN batches holds for each call: "raise" raises there, "skip" leaves the channel of that micro-batch
        out. `recalibrate` and `load_state_dict` take effect at once, and a later commit moves on from there. For all
        layers of a network use `contextlib.ExitStack`.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1)
        >>> for x, step_is_good in [(np.array([[1.0], [3.0]]), True), (np.array([[1e9], [-1e9]]), False)]:
        ...     with bn.hold_updates() as pending:
        ...         y = bn(x)
        ...     if step_is_good:
        ...         pending.commit()
        >>> bn.running_mean, bn.num_batches_tracked
        (array([0.2], dtype=float32), 1)
        """
        if not self.track_running_stats:
            raise ValueError("hold_updates: expected a layer with running statistics, got track_running_stats=False")
        return PendingUpdate(self)

    def drift(
        self,
        x: Array,
        *,
        where: BoolArray | None = None,
        significance: float = 0.01,
        effective_count: float | Array | None = None,
        running_count: float | None = None,
    ) -> Drift:
        """How far a batch is from the running statistics, and what that does to the output: see `nbbn.drift`.

        Parameters
        ----------
        x : array of shape (..., C, ...)
            A batch of inputs of this layer.
        where : bool array, optional
            Broadcasts to `x`; statistics leave False elements (padding) out.
        significance : float
            As in `nbbn.drift`.
        effective_count : number or array of shape (C,), optional
            How many independent values there are per channel. The default is the number of samples, the length of the
            first axis (of the second where the first is the channel axis): pixels of one image are much alike, and
            counting them as independent calls nearly every batch different. Pass ``x.size // C`` where they are not.
        running_count : number, optional
            As in `nbbn.drift`: give it where `x` is larger than the batches that were trained with.

        Returns
        -------
        Drift
            With `weight` in its `output_error`, if the layer has one.

        Raises
        ------
        TypeError, ValueError
            As `batch_stats` and `nbbn.drift`; if the layer keeps no running statistics.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> rng = np.random.default_rng(0)
        >>> bn = nbbn.BatchNorm(3).recalibrate([rng.normal(size=(1000, 3))])
        >>> moved = rng.normal(size=(200, 3)) + np.array([0.0, 1.0, 0.0])
        >>> bn.drift(moved).worst(1), bn.drift(moved).significant
        (array([1]), array([False,  True, False]))
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("drift: expected a layer with running statistics, got track_running_stats=False")
        given, x = x, checks.data("x", x)
        channel = checks.channel_axis(x, self.axis)
        checks.number_of_channels(x, channel, self.num_features)
        stats = hosted(batch_stats(given, axis=self.axis, where=where))
        if effective_count is None:
            effective_count = independent_values(x, channel, stats.count)
        return drift(
            self.running_mean,
            self.running_var,
            stats,
            eps=self.eps,
            weight=self.weight,
            significance=significance,
            effective_count=effective_count,
            running_count=running_count,
        )

    def recalibrate(
        self, batches: Iterable[Array], *, where: Iterable[BoolArray] | None = None, progress: bool = False
    ) -> Self:
        """Replace the running statistics by the exact population statistics of an iterable of batches.

        One merged population, not an average of averages: batches may differ in size. `running_var` becomes the
        population variance (ddof=0) and `num_batches_tracked` the number of batches (empty ones left out).

        Parameters
        ----------
        batches : iterable of arrays
            Inputs of this layer, read once, one at a time.
        where : iterable of bool arrays, optional
            One mask for each batch, in the same order, that broadcasts to it: False elements (padding) are left out.
        progress : bool
            Show a progress bar, on standard error. Needs `rich`.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            If `batches` is not an iterable of arrays; a single array is not: pass ``[x]``.
        ValueError
            If a channel has no value at all, a batch has another number of channels, there are more or fewer masks than
            batches, or the layer keeps no running statistics.
        RuntimeError
            If the layer is frozen: its statistics never move.
        FloatingPointError
            With ``nonfinite="raise"``, if the population is not finite; with "skip", if some channel of it is not
            finite in any batch.
        ModuleNotFoundError
            With ``progress=True``, if `rich` is not installed.

        Warns
        -----
        NonFiniteWarning
            With ``nonfinite="skip"``, if channels of some batches were left out; `num_skipped` says how many of each.

        Notes
        -----
        If anything raises, the iterable included, the layer is as it was. If one generator makes both inputs and masks,
        ``a, b = itertools.tee(pairs)`` and pass ``(x for x, _ in a), where=(m for _, m in b)``: they are read in step.
        Where training goes on with `debias` or ``momentum=None``, the next batch is number `num_batches_tracked` + 1.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1).recalibrate(np.split(np.arange(6.0)[:, None], [1, 3]))
        >>> bn.running_mean, bn.running_var.round(4), bn.num_batches_tracked
        (array([2.5], dtype=float32), array([2.9167], dtype=float32), 3)
        >>> padded = [np.array([[1.0], [3.0], [0.0]]), np.array([[5.0], [0.0], [0.0]])]
        >>> bn.recalibrate(padded, where=[x != 0 for x in padded]).running_mean
        array([3.], dtype=float32)
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("recalibrate: expected a layer with running statistics, got track_running_stats=False")
        if self._frozen:
            raise RuntimeError("recalibrate: expected a layer that is not frozen; call unfreeze() first")
        running_mean, _ = self._running()
        skip = self.nonfinite == "skip"
        population = gather(
            batches, where, channels=self.num_features, axis=self.axis, skip_nonfinite=skip, progress=progress
        )
        mean, var = population.stored(running_mean.dtype, finite=self.nonfinite != "propagate")
        with forks.state:
            self._replace({"running_mean": mean, "running_var": var}, population.batches, population.left_out)
        population.warn()
        return self

    # --- what the layer and its pending updates call ------------------------------------------------------------------

    def _hold(self, pending: PendingUpdate | None) -> None:
        """Give the statistics of training calls to `pending` from now on; None: to the running ones again."""
        if pending is not None and self._pending is not None:
            raise RuntimeError("hold_updates: expected no such block around this one, got a layer that is in one")
        self._pending = pending

    def _momentum(self) -> float | Array:
        """Of the next update: one for all channels, or one for each if they have had different numbers of updates."""
        momentum = checks.optional_momentum(self.momentum, None)  # both may have been assigned to
        step = checks.whole_number("num_batches_tracked", self.num_batches_tracked, least=0) + 1
        if (self.debias or momentum is None) and self.num_skipped.any():
            return weights_of_steps(momentum, self.debias, np.maximum(step - self.num_skipped, 1))
        return weight_of_step(momentum, self.debias, step)

    def _running(self) -> tuple[Array, Array]:
        running = checks.running_pair(self.running_mean, self.running_var, self.num_features)
        assert running is not None  # a layer without has nothing to move
        return running

    def _check_running(self, x: Array, *parameters: Array | None) -> None:
        """That the running arrays can be written, and are no part of what a training call reads."""
        given = {
            name: None if array is None else any_array(name, array)
            for name, array in zip(("weight", "bias"), parameters, strict=True)
        }
        for name, array in zip(("running_mean", "running_var"), self._running(), strict=True):
            checks.disjoint(name, array, x=x, **given)

    def _update(self, stats: Moments, name: str) -> int:
        """One update of the running statistics by `stats`, called `name` in errors; how many channels were skipped."""
        running = self._running()
        with forks.state:
            if self.nonfinite == "raise":
                refuse_nonfinite(name, stats, RunningUpdate(*running, 0.0, 1, False))

            def write() -> int:
                skipped = move(running, stats, self._momentum(), 1, self.nonfinite == "skip")
                self._count(stats, skipped)
                if self.nonfinite == "skip":  # left out of every call of a held update
                    self.num_skipped += hosted(stats).count == 0
                return skipped

            return self._all_or_nothing(running, write)

    def _replace(self, values: Mapping[str, Array], batches: int, skipped: npt.NDArray[np.int64]) -> None:
        """Overwrite these arrays and the counters."""
        arrays = {name: any_array(name, getattr(self, name)) for name in values}

        def write() -> int:
            for name, array in arrays.items():
                assign(array, values[name])
            self.num_batches_tracked = batches
            self.num_skipped[:] = skipped
            return batches

        self._all_or_nothing(arrays.values(), write)

    def _all_or_nothing(self, arrays: Iterable[Array], write: Callable[[], int]) -> int:
        """Let `write` change these arrays and the counters; if anything is raised, Ctrl-C included, undo it.

        What is on a device is not copied for that: what is launched there is not interrupted.
        """
        before = [(array, array.copy()) for array in arrays if not on_device(array)]
        tracked, skipped = self.num_batches_tracked, self.num_skipped.copy()
        try:
            return write()
        except BaseException:
            for array, values in before:
                array[:] = values
            self.num_batches_tracked = tracked
            self.num_skipped[:] = skipped
            raise

    def _count(self, stats: Moments, skipped: int) -> None:
        self.num_batches_tracked += 1
        if skipped:
            self.num_skipped += nonfinite_channels(stats, RunningUpdate(*self._running(), 0.0, 1, True))
