"""`Moments`: the one record of batch statistics."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nbbn import backends, checks
from nbbn.arrays import Array, any_array, assign, empty, fill, in_host_memory, numpy_array, on_device


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    r"""Count, mean and sum of squared deviations per channel: statistics that merge exactly.

    Parameters
    ----------
    count : int64 array of shape (C,)
        Number of values seen, per channel.
    mean : float64 array of shape (C,)
        Their mean, in the units of the data; 0 where nothing was seen.
    m2 : float64 array of shape (C,)
        Sum of squared deviations from the mean, :math:`\sum_i (x_i - \bar x)^2`, in squared units.

    Raises
    ------
    TypeError
        If a field is not a NumPy array of integers (count) or floats (mean, m2).
    ValueError
        If the fields do not have the same shape (C,), or a count or an m2 is negative.

    Notes
    -----
    ``a + b`` is what one pass over both batches would have given (Chan, Golub & LeVeque 1979)::

        count = count_a + count_b
        mean  = mean_a + (mean_b - mean_a) * count_b / count
        m2    = m2_a + m2_b + (mean_b - mean_a)**2 * count_a * count_b / count

    Fields are read-only. ``==`` compares channel by channel, as arrays do; there is no hash. Pickled and copied they
    stay on a device where their library's arrays can be pickled (PyTorch, CuPy), and come back in host memory else.

    Examples
    --------
    Batches of any size, in any order, from any number of workers:

    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [2.0], [3.0], [10.0]])
    >>> parts = nbbn.batch_stats(x[:3]) + nbbn.batch_stats(x[3:])
    >>> parts
    Moments(count=[4], mean=[4.], m2=[50.])
    >>> parts.var(), parts.var(ddof=1)
    (array([12.5]), array([16.66666667]))
    >>> parts == nbbn.batch_stats(x)
    array([ True])
    """

    count: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, kinds, dtype in (("count", "iu", np.int64), ("mean", "f", np.float64), ("m2", "f", np.float64)):
            given = numpy_array(name, getattr(self, name))
            if given.dtype.kind not in kinds:
                expected = "integers" if kinds == "iu" else "floats"
                raise TypeError(f"{name}: expected an array of {expected}, got dtype {given.dtype}")
            if given.ndim != 1:
                raise ValueError(f"{name}: expected 1 dimension, one value per channel, got shape {given.shape}")
            if given.shape != self.count.shape:
                raise ValueError(f"{name}: expected {self.count.size} values, as in count, got {given.size}")
            if name != "mean" and (given < 0).any():
                raise ValueError(f"{name}: expected values >= 0, got {given.min()}")
            if name == "count" and (given > np.iinfo(np.int64).max).any():
                raise ValueError(f"count: expected values that int64 can hold, got {given.max()}")
            object.__setattr__(self, name, _read_only(np.array(given, dtype)))

    @classmethod
    def zeros(cls, channels: int) -> "Moments":
        """Moments of nothing: the identity of ``+``.

        Parameters
        ----------
        channels : int
            Number of channels C, at least 0.

        Returns
        -------
        Moments
            With count, mean and m2 all 0.

        Raises
        ------
        ValueError
            If `channels` is negative or not an integer.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> batches = (np.full((n, 2), 3.0) for n in (5, 1, 8))
        >>> sum(map(nbbn.batch_stats, batches), nbbn.Moments.zeros(2))
        Moments(count=[14 14], mean=[3. 3.], m2=[0. 0.])
        """
        channels = checks.whole_number("channels", channels, least=0)
        return cls(np.zeros(channels, np.int64), np.zeros(channels), np.zeros(channels))

    def var(self, ddof: int = 0) -> npt.NDArray[np.float64]:
        """Variance per channel, ``m2 / (count - ddof)``.

        Parameters
        ----------
        ddof : {0, 1}
            0 is the population (biased) variance, 1 the sample (unbiased) one.

        Returns
        -------
        float64 array of shape (C,)
            In squared units of the data; NaN where ``count <= ddof``.

        Raises
        ------
        ValueError
            If `ddof` is neither 0 nor 1.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> nbbn.batch_stats(np.array([[1.0], [3.0]])).var(ddof=1)
        array([2.])
        """
        ddof = checks.delta_degrees_of_freedom(ddof)
        if type(self.count) is not np.ndarray:
            return self._on_device(ddof, root=False)
        result = np.full(self.count.shape, np.nan)
        np.divide(self.m2, self.count - ddof, out=result, where=self.count > ddof)
        return result

    def std(self, ddof: int = 0) -> npt.NDArray[np.float64]:
        """Standard deviation per channel, the square root of `var`.

        Parameters
        ----------
        ddof : {0, 1}
            As in `var`.

        Returns
        -------
        float64 array of shape (C,)
            In units of the data; NaN where ``count <= ddof``.

        Raises
        ------
        ValueError
            If `ddof` is neither 0 nor 1.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> nbbn.batch_stats(np.array([[1.0], [3.0]])).std()
        array([1.])
        """
        if type(self.count) is not np.ndarray:
            return self._on_device(checks.delta_degrees_of_freedom(ddof), root=True)
        return np.sqrt(self.var(ddof))

    def _on_device(self, ddof: int, root: bool) -> npt.NDArray[np.float64]:
        """Variance, or its root, computed where the fields are."""
        count, m2 = any_array("count", self.count), any_array("m2", self.m2)
        result = empty(count.shape, m2.dtype, count)
        backends.cuda().variances(count, m2, ddof, root, result)
        return result.owner  # type: ignore[attr-defined, no-any-return]

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both batches together; the same as ``self + other``.

        Parameters
        ----------
        other : Moments
            Of the same number of channels.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError
            If `other` is not a `Moments`.
        ValueError
            If the numbers of channels differ.
        OverflowError
            If there are more than 2**63 - 1 values together.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> a, b = np.array([[1.0], [2.0]]), np.array([[6.0]])
        >>> nbbn.batch_stats(a).merge(nbbn.batch_stats(b)).mean
        array([3.])
        """
        self._same_channels(other)
        if type(self.count) is not type(other.count):
            # the identity of + has no values to bring to the other one's memory
            for nothing, something in ((self, other), (other, self)):
                if type(nothing.count) is np.ndarray and not nothing.count.any():
                    return something
        self._same_place(other)
        both = self._combined(other, "merge")
        if type(both.count) is np.ndarray and both.count.size and both.count.min() < 0:
            raise OverflowError("other: expected at most 2**63 - 1 values together, got more")
        return both

    def __add__(self, other: "Moments") -> "Moments":
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> "Moments":
        """``0 + m``: what `sum` begins with when it is given no start."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __sub__(self, other: "Moments") -> "Moments":
        """Take out a part that was merged in (sliding windows, leave-one-out).

        Raises `ValueError` if the part has more values than the whole in some channel. Digits cancel where the
        part is most of the whole: what is left has an error relative to the whole.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        self._same_channels(other)
        self._same_place(other)
        if type(self.count) is np.ndarray and (other.count > self.count).any():
            c = int(np.argmax(other.count > self.count))
            raise ValueError(
                f"other: expected a part of what it is taken from, got {other.count[c]} values of {self.count[c]} "
                f"in channel {c}"
            )
        return self._combined(other, "remove")

    def __eq__(self, other: object) -> npt.NDArray[np.bool_]:  # type: ignore[override]
        if not isinstance(other, Moments):
            return NotImplemented
        self._same_channels(other)
        if type(self.count) is not np.ndarray or type(other.count) is not np.ndarray:
            raise TypeError("==: expected Moments in host memory, got some on a CUDA device; compare m.to_numpy()")
        same: npt.NDArray[np.bool_] = (self.count == other.count) & (self.mean == other.mean) & (self.m2 == other.m2)
        return same

    def __ne__(self, other: object) -> npt.NDArray[np.bool_]:  # type: ignore[override]
        return ~(self == other) if isinstance(other, Moments) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        if type(self.count) is np.ndarray:
            return Moments, (self.count, self.mean, self.m2)
        if not any_array("count", self.count).library.pickles:  # type: ignore[attr-defined]
            return self.to_numpy().__reduce__()
        return _restored, (self.count, self.mean, self.m2)

    def __repr__(self) -> str:
        shown = self if type(self.count) is np.ndarray else self.to_numpy()
        with np.printoptions(threshold=6, edgeitems=3):
            return f"Moments(count={shown.count}, mean={shown.mean}, m2={shown.m2})"

    def to_numpy(self) -> "Moments":
        """A copy in host memory.

        Returns
        -------
        Moments
            With NumPy fields; a copy even if they were in host memory before.

        Examples
        --------
        >>> import nbbn
        >>> nbbn.Moments.zeros(1).to_numpy()
        Moments(count=[0], mean=[0.], m2=[0.])
        """
        return Moments(*(in_host_memory(values) for values in (self.count, self.mean, self.m2)))

    def _same_channels(self, other: "Moments") -> None:
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected Moments, got {type(other).__name__}")
        if other.count.shape[0] != self.count.shape[0]:
            raise ValueError(f"other: expected {self.count.shape[0]} channels, got {other.count.shape[0]}")

    def _same_place(self, other: "Moments") -> None:
        checks.same_place(any_array("count", self.count), other=any_array("count", other.count))

    def _combined(self, other: "Moments", operation: Literal["merge", "remove"]) -> "Moments":
        """What a backend makes of both, which are in one place."""
        first, second = views(self), views(other)
        result = backends.empty_moments(self.count.shape[0], first[0])
        getattr(backends.serving(first[0]), operation)(*first, *second, *result)
        return wrap(*result)


def wrap(count: Array, mean: Array, m2: Array) -> Moments:
    """A `Moments` that takes over freshly computed arrays, without copying or checking them again."""
    return holding(_read_only(count), _read_only(mean), _read_only(m2))


def holding(count: Any, mean: Any, m2: Any) -> Moments:
    """A `Moments` of these fields as they are."""
    moments = object.__new__(Moments)
    for name, values in (("count", count), ("mean", mean), ("m2", m2)):
        object.__setattr__(moments, name, values)
    return moments


def views(moments: Moments) -> tuple[Array, Array, Array]:
    """Count, mean and m2 as a backend takes them."""
    return (
        any_array("count", moments.count),
        any_array("mean", moments.mean),
        any_array("m2", moments.m2),
    )


def hosted(moments: Moments) -> Moments:
    """The same in host memory: copied, after waiting, if they are on a device."""
    return moments if type(moments.count) is np.ndarray else moments.to_numpy()


def placed(moments: Moments, like: Array) -> Moments:
    """Statistics in host memory, in the memory that `like` is in."""
    if not on_device(like):
        return moments
    fields = backends.empty_moments(moments.count.size, like)
    for target, values in zip(fields, (moments.count, moments.mean, moments.m2), strict=True):
        assign(target, values)
    return wrap(*fields)


def zeros(channels: int, like: Array) -> Moments:
    """`Moments.zeros` in the memory that `like` is in."""
    if not on_device(like):
        return Moments.zeros(channels)
    fields = backends.empty_moments(channels, like)
    for values in fields:
        fill(values, 0)
    return wrap(*fields)


def _restored(count: Any, mean: Any, m2: Any) -> Moments:
    """What was pickled: arrays of a library that knows how to pickle them."""
    return wrap(any_array("count", count), any_array("mean", mean), any_array("m2", m2))


def _read_only(array: Array) -> Any:
    if on_device(array):  # the library's own array; there is no read-only one
        return array.owner  # type: ignore[attr-defined]
    array.flags.writeable = False
    return array
