"""`PendingUpdate`: what training calls would have done to the running statistics, kept back until it is decided."""

from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from nbbn import forks
from nbbn.moments import Moments, hosted
from nbbn.statistics import nonfinite_channels, refuse_nonfinite, warn_skipped, without

if TYPE_CHECKING:
    from nbbn.running import RunningStatistics


class PendingUpdate:
    """The statistics of training calls inside ``with bn.hold_updates() as pending:``, merged, and not yet used.

    After the block, `commit` makes one update of the running statistics from all of them together, `drop` forgets
    them. If you do neither, nothing ever changes. An exception that leaves the block drops.

    Made by `BatchNorm.hold_updates`, not by hand.

    Parameters
    ----------
    layer : BatchNorm
        The layer whose updates are held.

    Attributes
    ----------
    stats : Moments
        Of all values of all training calls so far, as if they had been one batch.
    batches : int
        Number of those calls (empty batches left out).
    state : {"new", "collecting", "held", "committed", "dropped"}
        Where it stands.

    Examples
    --------
    Two micro-batches, one update from all 6 values:

    >>> import numpy as np, nbbn
    >>> bn = nbbn.BatchNorm(1, momentum=0.5)
    >>> with bn.hold_updates() as pending:
    ...     for x in (np.array([[0.0], [2.0]]), np.array([[4.0], [6.0], [8.0], [10.0]])):
    ...         y = bn(x)
    >>> bn.running_mean, bn.num_batches_tracked
    (array([0.], dtype=float32), 0)
    >>> pending
    PendingUpdate(2 batches, 6 values per channel, held: nothing changes before commit())
    >>> pending.commit()
    >>> bn.running_mean, bn.num_batches_tracked
    (array([2.5], dtype=float32), 1)
    """

    def __init__(self, layer: "RunningStatistics"):
        self.stats = Moments.zeros(layer.num_features)
        self.batches = 0
        self.state = "new"
        self._layer = layer

    def __enter__(self) -> "PendingUpdate":
        if self.state != "new":
            raise RuntimeError(f"hold_updates: expected a block of its own for each call, got one that is {self.state}")
        self._layer._hold(self)
        self.state = "collecting"
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._layer._hold(None)
        self.state = "held"
        if kind is not None:
            self.drop()

    def commit(self) -> None:
        """Update the running statistics once, from all values together; counts as one batch.

        Without a training call in the block there is nothing to do, and nothing is done.

        Raises
        ------
        RuntimeError
            Inside the block, a second time, after `drop`, or if the layer is frozen by now.
        FloatingPointError
            With ``nonfinite="raise"``, if the statistics are not finite in the precision of the running arrays;
            nothing has changed then.

        Warns
        -----
        NonFiniteWarning
            With ``nonfinite="skip"``, in the same case; the channels are skipped.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1, momentum=1.0)
        >>> with bn.hold_updates() as pending:
        ...     y = bn(np.array([[1.0], [3.0]]))
        >>> pending.commit()
        >>> bn.running_mean
        array([2.], dtype=float32)
        """
        self._expect_held("commit")
        if self.batches and self._layer._frozen:
            raise RuntimeError("commit: expected a layer that is not frozen; call unfreeze() first")
        skipped = self._layer._update(self.stats, "stats") if self.batches else 0
        self.state = "committed"
        warn_skipped(skipped, self.stats)

    def drop(self) -> None:
        """Forget the statistics: the running ones stay as they are. Dropping again does no harm.

        Raises
        ------
        RuntimeError
            Inside the block, or after `commit`.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(1)
        >>> with bn.hold_updates() as pending:
        ...     y = bn(np.array([[1.0], [3.0]]))
        >>> pending.drop()
        >>> bn.running_mean, bn.num_batches_tracked
        (array([0.], dtype=float32), 0)
        """
        if self.state != "dropped":
            self._expect_held("drop")
            self.state = "dropped"

    def _add(self, stats: Moments) -> int:
        """Take in the statistics of one training call; returns how many channels are left out, not being finite."""
        left_out = 0
        if self._layer.nonfinite == "raise":
            refuse_nonfinite("x", stats, None)
        if self._layer.nonfinite == "skip":
            bad = nonfinite_channels(stats, None)
            left_out = int(bad.sum())
            stats = without(stats, bad) if left_out else stats
        with forks.state:
            self.stats, self.batches = self.stats + stats, self.batches + 1
        return left_out

    def __reduce__(self) -> NoReturn:
        raise TypeError("PendingUpdate: it belongs to its layer and cannot be copied or pickled; copy .stats")

    def _expect_held(self, action: str) -> None:
        advice = {
            "new": "use it as `with bn.hold_updates() as pending:`",
            "collecting": "leave the `with` block first",
            "committed": "its update has been made; hold_updates() begins another",
            "dropped": "its statistics are forgotten; hold_updates() begins another",
        }
        if self.state != "held":
            raise RuntimeError(
                f"{action}: expected an update that is held, got one that is {self.state}: {advice[self.state]}"
            )

    def __repr__(self) -> str:
        count = hosted(self.stats).count
        values = f"{count.min()}" if count.min() == count.max() else f"{count.min()} to {count.max()}"
        undecided = ": nothing changes before commit()" if self.state in ("collecting", "held") else ""
        batches = f"{self.batches} batch" + ("" if self.batches == 1 else "es")
        return f"PendingUpdate({batches}, {values} values per channel, {self.state}{undecided})"
