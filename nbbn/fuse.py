"""Folding batch normalization into the convolution or linear layer before it, and what that costs in digits."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn import checks
from nbbn.arrays import Array, returned
from nbbn.folding import Folding, digits
from nbbn.moments import Moments


class IllConditionedWarning(RuntimeWarning):
    """A channel loses more than half of its digits by folding, or depends on `eps` more than on its data."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FoldingError:
    """What folding costs, per channel; prints as a table of the worst.

    Attributes
    ----------
    error : float64 array of shape (C,)
        Expected root mean square change of the output, in its units.
    mean_over_std : float64 array of shape (C,)
        ``|running_mean - conv_b| / sqrt(running_var + eps)``: how many digits cancel against the folded bias.
    ill_conditioned : bool array of shape (C,)
        By the rule in `fuse_conv_bn_weights`.
    """

    error: Array
    mean_over_std: Array
    ill_conditioned: Array

    def worst(self, k: int = 5) -> Array:
        """Indices of the `k` channels with the largest error, worst first."""
        return np.argsort(-self.error, kind="stable")[: checks.whole_number("k", k, least=0)]

    def __repr__(self) -> str:
        lines = ["channel     error  |mean|/std  ill-conditioned"]
        lines += [
            f"{c:>7}  {self.error[c]:8.1e}  {self.mean_over_std[c]:10.3g}  {'yes' if self.ill_conditioned[c] else 'no'}"
            for c in self.worst()
        ]
        total = f"{self.error.size} channels, {np.count_nonzero(self.ill_conditioned)} of them ill-conditioned"
        return "\n".join([f"{total}; the largest errors:", *lines])


def fuse_conv_bn_weights(
    conv_w: Array,
    conv_b: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float,
    weight: Array | None = None,
    bias: Array | None = None,
    transpose: bool = False,
) -> tuple[Array, Array]:
    r"""Weight and bias of one convolution that does what a convolution and the normalization after it do.

    Parameters
    ----------
    conv_w : array of shape (C, in / groups, ...)
        Weight of the convolution, in PyTorch's order. float32, float64, float16 or bfloat16 (`ml_dtypes`).
    conv_b : array of shape (C,), optional
        Its bias; None: absent.
    running_mean, running_var : arrays of shape (C,)
        Of the normalization, in evaluation. Of any of these dtypes.
    eps : float
        Added to the variance inside the square root; >= 0.
    weight, bias : arrays of shape (C,), optional
        Scale (gamma) and offset (beta); absent means 1 and 0.
    transpose : bool
        Whether it is a transposed convolution: `conv_w` of shape (in, C / groups, ...), any number of groups.

    Returns
    -------
    conv_w : array of the shape and dtype of conv_w
    conv_b : array of shape (C,)
        Of the dtype of `conv_b`, of `conv_w` without one. Both are new arrays, computed in float64, rounded once.

    Raises
    ------
    TypeError
        If an argument is not a NumPy array of these dtypes.
    ValueError
        If a per-channel array does not have C values, statistics are not finite, ``running_var + eps`` is not
        positive, or a result is too large for its dtype.

    Warns
    -----
    IllConditionedWarning
        If the result is to be used with care: see Notes.

    Notes
    -----
    .. math:: w' = w \cdot s, \qquad b' = (b - \mathrm{mean}) \cdot s + \mathrm{bias}, \qquad
              s = \mathrm{weight} / \sqrt{\mathrm{var} + \mathrm{eps}}

    (Jacob et al. 2018, section 3.2; positional arguments as in ``torch.nn.utils.fusion``.) In exact arithmetic nothing
    changes. Stored in a dtype with the unit roundoff u, b' is off by up to u times itself, which is about
    |mean| / std in units of the output: a large mean takes digits from every output. The warning names channels with

    - ``|running_mean - conv_b| / sqrt(running_var + eps) > 1 / sqrt(u)``: more than half of the digits are lost
      (float32: from 4096 on, bfloat16: 16), or
    - ``running_var < eps``: the scale is that of eps, not of the data; a runtime with another eps differs.

    `folding_error` estimates how far the output moves. Keras keeps the output channels last: pass
    ``numpy.moveaxis(kernel, -1, 0)`` and move them back.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> w, mean, var = np.array([[[1.0, 2.0]]]), np.array([3.0]), np.array([4.0])
    >>> nbbn.fuse_conv_bn_weights(w, None, mean, var, 0.0, weight=np.array([6.0]))
    (array([[[3., 6.]]]), array([-9.]))
    """
    folding = Folding.of("conv", conv_w, conv_b, running_mean, running_var, eps, weight, bias, transpose)
    return _fused(folding, conv_w)


def fuse_linear_bn_weights(
    linear_w: Array,
    linear_b: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float,
    weight: Array | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    r"""Weight and bias of one linear layer that does what a linear layer and the normalization after it do.

    Parameters
    ----------
    linear_w : array of shape (C, in)
        Weight of the linear layer (``y = x @ linear_w.T + linear_b``, PyTorch's order).
    linear_b : array of shape (C,), optional
        Its bias; None: absent.
    running_mean, running_var : arrays of shape (C,)
        Of the normalization, in evaluation.
    eps : float
        Added to the variance inside the square root; >= 0.
    weight, bias : arrays of shape (C,), optional
        Scale (gamma) and offset (beta); absent means 1 and 0.

    Returns
    -------
    linear_w : array of the shape and dtype of linear_w
    linear_b : array of shape (C,)
        As in `fuse_conv_bn_weights`.

    Raises
    ------
    TypeError, ValueError
        As `fuse_conv_bn_weights`.

    Warns
    -----
    IllConditionedWarning
        By the rule in `fuse_conv_bn_weights`, whose formula this is.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> rng = np.random.default_rng(0)
    >>> x, w, b = rng.random((5, 3)), rng.random((2, 3)), rng.random(2)
    >>> mean, var = np.array([1.0, 2.0]), np.array([0.5, 0.25])
    >>> fused_w, fused_b = nbbn.fuse_linear_bn_weights(w, b, mean, var, 1e-5)
    >>> np.allclose(x @ fused_w.T + fused_b, nbbn.normalize(x @ w.T + b, mean, var))
    True
    """
    folding = Folding.of("linear", linear_w, linear_b, running_mean, running_var, eps, weight, bias, False)
    return _fused(folding, linear_w)


def folding_error(
    conv_w: Array,
    conv_b: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float,
    weight: Array | None = None,
    bias: Array | None = None,
    transpose: bool = False,
    *,
    dtype: npt.DTypeLike | None = None,
    input_stats: Moments | None = None,
) -> FoldingError:
    r"""How far folding moves the output, because folded weight and bias are rounded to a dtype.

    Parameters
    ----------
    conv_w : array of shape (C, in / groups, ...)
        Weight of the convolution, or of shape (C, in) of a linear layer.
    conv_b : array of shape (C,), optional
        Its bias; None: absent.
    running_mean, running_var : arrays of shape (C,)
        Of the normalization, in evaluation.
    eps : float
        Added to the variance inside the square root; >= 0.
    weight, bias : arrays of shape (C,), optional
        Scale (gamma) and offset (beta); absent means 1 and 0.
    transpose : bool
        As in `fuse_conv_bn_weights`.
    dtype : dtype, optional
        What the folded layer shall be kept in: float32, float64, float16 or bfloat16. None: that of `conv_w`.
    input_stats : Moments, optional
        Of the input of the convolution, per input channel: makes the estimate sharper.

    Returns
    -------
    FoldingError
        Per channel ``error``, ``mean_over_std``, ``ill_conditioned``; ``worst(k)``; prints as a table.

    Raises
    ------
    TypeError, ValueError
        As `fuse_conv_bn_weights`, except that what is too large for `dtype` has an infinite error.

    Notes
    -----
    The rounding errors dw, db of the folded parameters are known exactly; they move the output by
    :math:`\sum_k dw_k x_k + db`. For inputs x with means m and variances v that are not correlated, its mean square is

    .. math:: \Big(\sum_k dw_k m_k + db\Big)^2 + \sum_k dw_k^2 v_k .

    Without `input_stats` the running statistics say how large x is: the mean square q of every input is taken from
    the second moment of the output of the convolution, var + (mean - b)^2, over :math:`\sum_k w_k^2`, at least the
    median of all channels (depthwise: as it is), which gives :math:`db^2 + q \sum_k dw_k^2`. Over all channels that is
    right within a factor of 2 where weights have both signs; a single one may be luckier, or up to 4 times worse. It
    is too small where inputs share a large mean that the weights of every channel cancel. Rounding in the convolution
    itself is not counted: that layer has it folded or not.

    Examples
    --------
    A mean of 1000 standard deviations is harmless to fold in float32, not in float16:

    >>> import numpy as np, nbbn
    >>> layer = np.ones((1, 4)) / 3, None, np.array([1000.0]), np.array([1.0]), 1e-5
    >>> print(nbbn.folding_error(*layer, dtype=np.float32))
    1 channels, 0 of them ill-conditioned; the largest errors:
    channel     error  |mean|/std  ill-conditioned
          0   2.3e-05       1e+03  no
    >>> nbbn.folding_error(*layer, dtype=np.float16).ill_conditioned
    array([ True])
    """
    folding = Folding.of("conv", conv_w, conv_b, running_mean, running_var, eps, weight, bias, transpose)
    target = folding.weight_dtype if dtype is None else _target(dtype)
    if input_stats is not None and not isinstance(input_stats, Moments):
        raise TypeError(f"input_stats: expected Moments, got {type(input_stats).__name__}")
    return FoldingError(
        folding.error(target, input_stats), folding.mean_over_std, folding.far(target) | folding.vanishing
    )


def _target(dtype: Any) -> np.dtype[Any]:
    try:
        target: np.dtype[Any] = np.dtype(dtype)
        digits(target)
    except (TypeError, KeyError):
        raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype!r}") from None
    return target


def _fused(folding: Folding, like: Any) -> tuple[Array, Array]:
    w, b = folding.rounded("weight", folding.weight_dtype), folding.rounded("bias", folding.bias_dtype)
    _warn(folding)
    return returned(w, None, like), returned(b, None, like)


def _warn(folding: Folding) -> None:
    far, vanishing = folding.far(folding.bias_dtype), folding.vanishing
    reasons = []
    if far.any():
        c = int(np.argmax(folding.mean_over_std))
        reasons.append(
            f"{np.count_nonzero(far)} lose more than half of the digits of {folding.bias_dtype} "
            f"(|mean|/std {folding.mean_over_std[c]:.3g} in channel {c})"
        )
    if vanishing.any():
        c = int(np.argmax(vanishing))
        reasons.append(f"{np.count_nonzero(vanishing)} have a variance below eps (the first is channel {c})")
    if reasons:
        warnings.warn(
            f"of {far.size} channels, {' and '.join(reasons)}; see nbbn.folding_error",
            IllConditionedWarning,
            stacklevel=4,
        )
