"""The arithmetic of folding: checked arguments, folded weight and bias in float64, rounding and its effect."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nbbn import checks
from nbbn.arrays import Array, numpy_array
from nbbn.moments import Moments

#: Distance from 1 to the next larger number.
_SPACING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def digits(dtype: np.dtype[Any]) -> float:
    """The unit roundoff u: rounding changes a number by at most u times itself."""
    return _SPACING[dtype.name] / 2


@dataclass(frozen=True, slots=True)
class Folding:
    """A layer and its normalization folded, all in float64. Rows: one of all weights of each output channel, (C, K)."""

    name: str
    rows: Array
    fused_rows: Array
    fused_bias: Array
    mean_over_std: Array
    vanishing: Array
    output_square: Array
    inputs_per_group: int
    shape: tuple[int, ...]
    transpose: bool
    weight_dtype: np.dtype[Any]
    bias_dtype: np.dtype[Any]

    @classmethod
    def of(
        cls, name: Literal["conv", "linear"], w: Any, b: Any, mean: Any, var: Any, eps: Any, weight: Any, bias: Any,
        transpose: Any,
    ) -> "Folding":  # fmt: skip
        """Check the arguments, of the layer called `name`, and fold."""
        w = checks.float_data(f"{name}_w", numpy_array(f"{name}_w", w), "as weights")
        transpose = checks.flag("transpose", transpose)
        eps = checks.epsilon(eps)
        mean = _values("running_mean", mean, None)
        channels = mean.size
        var = _values("running_var", var, channels)
        weight = np.ones(channels) if weight is None else _values("weight", weight, channels)
        bias = np.zeros(channels) if bias is None else _values("bias", bias, channels)
        bias_dtype = (
            w.dtype if b is None else checks.float_data(f"{name}_b", numpy_array(f"{name}_b", b), "as bias").dtype
        )
        b = np.zeros(channels) if b is None else _values(f"{name}_b", b, channels)
        _usable(mean, var, eps)
        _fits(name, w, channels, transpose)
        rows = _as_rows(w.astype(np.float64), channels, transpose)
        for parameter, values in (("weight", weight), ("bias", bias), (f"{name}_w", rows), (f"{name}_b", b)):
            _finite(parameter, values)
        with np.errstate(all="ignore"):  # what grows too large is refused by `rounded`, and an infinite `error`
            std = np.sqrt(var + eps)
            scale = weight / std
            fused_rows, fused_bias = rows * scale[:, None], (b - mean) * scale + bias
            mean_over_std, output_square = np.abs(mean - b) / std, var + (mean - b) ** 2
        return cls(
            name=name,
            rows=rows,
            fused_rows=fused_rows,
            fused_bias=fused_bias,
            mean_over_std=mean_over_std,
            vanishing=var < eps,
            output_square=output_square,
            inputs_per_group=w.shape[0] * w.shape[1] // channels if transpose else w.shape[1],
            shape=w.shape,
            transpose=transpose,
            weight_dtype=w.dtype,
            bias_dtype=bias_dtype,
        )

    def rounded(self, what: Literal["weight", "bias"], dtype: np.dtype[Any]) -> Array:
        """The folded weight, in the shape it came in, or bias; refused where `dtype` cannot hold it."""
        values = self.fused_rows if what == "weight" else self.fused_bias[:, None]
        result = _round(values, dtype)
        lost = ~np.isfinite(result.astype(np.float64)).all(axis=1)
        if lost.any():
            c = int(np.argmax(lost))
            raise ValueError(
                f"{self.name}_{what[0]}: expected folded values that {dtype} can hold, "
                f"got {np.abs(values[c]).max():.3g} in channel {c}"
            )
        return result[:, 0] if what == "bias" else _from_rows(result, self.shape, self.transpose)

    def far(self, dtype: np.dtype[Any]) -> Array:
        """Channels whose mean takes more than half of the digits."""
        return np.asarray(self.mean_over_std > digits(dtype) ** -0.5)

    def error(self, dtype: np.dtype[Any], input_stats: Moments | None) -> Array:
        """Root mean square of what rounding to `dtype` adds to the output: the formula is `nbbn.folding_error`'s."""
        with np.errstate(all="ignore"):
            d_rows, d_bias = _rounding(self.fused_rows, dtype), _rounding(self.fused_bias, dtype)
            d_square = (d_rows**2).sum(axis=1)
            if input_stats is None:
                result = np.sqrt(d_bias**2 + d_square * self._input_square())
            else:
                mean, var = self._inputs(input_stats)
                result = np.sqrt(((d_rows * mean).sum(axis=1) + d_bias) ** 2 + (d_rows**2 * var).sum(axis=1))
        return np.where(np.isnan(result), np.inf, result)

    def _input_square(self) -> Array:
        """Mean square of the inputs of each channel, from what the convolution made of them.

        A channel whose weights cancel says too little: the median of all that read the same inputs is the least for
        it (of independent such sums, 0.45 of their mean). Depthwise, every channel has an input of its own.
        """
        size = (self.rows**2).sum(axis=1)
        square: Array = np.divide(self.output_square, size, out=np.zeros_like(size), where=size > 0)
        if self.inputs_per_group == 1 or not (size > 0).any():
            return square
        return np.asarray(np.maximum(square, np.median(square[size > 0])))

    def _inputs(self, stats: Moments) -> tuple[Array, Array]:
        """Mean and variance of what each weight is multiplied by, as rows."""
        channels, groups = len(self.rows), stats.count.size // self.inputs_per_group
        if groups * self.inputs_per_group != stats.count.size or not groups or channels % groups:
            raise ValueError(
                f"input_stats: expected {self.inputs_per_group} channels for each group of the convolution, "
                f"got {stats.count.size}"
            )
        taps = self.rows.shape[1] // self.inputs_per_group
        mean, var = (
            values.reshape(groups, self.inputs_per_group).repeat(channels // groups, 0).repeat(taps, 1)
            for values in (stats.mean, stats.var())
        )
        return mean, var


def _round(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def _rounding(values: Array, dtype: np.dtype[Any]) -> Array:
    """By how much `values` change; where that is nothing, because they are float64, what computing them has lost."""
    if dtype == np.float64:
        return digits(dtype) * values
    return np.asarray(_round(values, dtype).astype(np.float64) - values)


def _values(name: str, value: Any, channels: int | None) -> Array:
    """Per-channel values of any floating dtype, in float64."""
    array = checks.float_data(name, numpy_array(name, value), "per channel")
    if array.ndim != 1 or channels not in (None, array.size):
        number = "one value per channel" if channels is None else f"{channels} values, one per channel"
        raise ValueError(f"{name}: expected {number}, as in running_mean, got shape {array.shape}")
    if not array.size:
        raise ValueError(f"{name}: expected at least one channel, got shape {array.shape}")
    return array.astype(np.float64)


def _finite(name: str, values: Array) -> None:
    """Of rows, or single values, for each channel."""
    fine = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not fine.all():
        c = int(np.argmin(fine))
        found = np.ravel(values[c])
        raise ValueError(f"{name}: expected finite values, got {found[~np.isfinite(found)][0]} in channel {c}")


def _usable(mean: Array, var: Array, eps: float) -> None:
    """Folding what is broken would hide it in the weights."""
    for name, values, fine in (
        ("running_mean", mean, np.isfinite(mean)),
        ("running_var", var, np.isfinite(var) & (var >= 0) & (var + eps > 0)),
    ):
        if not fine.all():
            c = int(np.argmin(fine))
            expected = "finite values" if name == "running_mean" else f"finite values >= 0, and > 0 with eps={eps:g}"
            raise ValueError(
                f"{name}: expected {expected}, got {values[c]} in channel {c}; see nbbn.check_running_stats"
            )


def _fits(name: str, w: Array, channels: int, transpose: bool) -> None:
    if w.ndim < 2 or (name == "linear" and w.ndim != 2):
        dimensions = "2 dimensions" if name == "linear" else "at least 2 dimensions"
        raise ValueError(f"{name}_w: expected {dimensions}, got shape {w.shape}")
    if not transpose and w.shape[0] != channels:
        raise ValueError(f"{name}_w: expected {channels} output channels along axis 0, got shape {w.shape}")
    if transpose:
        groups, rest = divmod(channels, w.shape[1]) if w.shape[1] else (0, 1)
        if rest or not groups or w.shape[0] % groups:
            raise ValueError(
                f"conv_w: expected shape (in, {channels} / groups, ...) for a transposed convolution with {channels} "
                f"output channels, got {w.shape}"
            )


def _as_rows(w: Array, channels: int, transpose: bool) -> Array:
    """All weights of one output channel side by side, group by group of its inputs."""
    if not transpose:
        return w.reshape(channels, -1)
    groups = channels // w.shape[1]
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).swapaxes(1, 2).reshape(channels, -1)


def _from_rows(rows: Array, shape: tuple[int, ...], transpose: bool) -> Array:
    if not transpose:
        return rows.reshape(shape)
    groups = len(rows) // shape[1]
    return rows.reshape(groups, shape[1], shape[0] // groups, -1).swapaxes(1, 2).reshape(shape)
