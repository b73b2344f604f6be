"""Normalization, forward and backward: documentation, then check, place, run. No arithmetic."""

from typing import Literal, overload

from nbbn import backends, checks, placement, quick
from nbbn.arrays import Array, empty, in_host_memory, parameter_dtype, returned
from nbbn.backends import RunningUpdate
from nbbn.checks import Activation, NonFinite
from nbbn.moments import Moments
from nbbn.statistics import BoolArray, move_running, refuse_nonfinite, warn_skipped


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int | None = 1,
    residual: Array | None = None,
    activation: Activation = None,
    out: Array | None = None,
) -> Array:
    r"""Normalize with given statistics.

    Parameters
    ----------
    x : array of shape (..., C, ...)
        float32, float64, float16, bfloat16 (`ml_dtypes`), any integer dtype or bool.
    mean, var : arrays of shape (C,)
        float32 or float64. A float64 mean is used in full, also for float32 `x`.
    weight, bias : arrays of shape (C,), optional
        Scale (gamma) and offset (beta); absent means 1 and 0.
    eps : float
        Added to the variance inside the square root; >= 0.
    axis : int or None
        The channel axis; None: the whole array is one channel.
    residual : array of the shape of x, optional
        Added before the activation.
    activation : {None, "relu"}
        Applied last.
    out : array of the shape of x, optional
        float32, float64, float16 or bfloat16; may be `x` itself (in place), else must not overlap any input.

    Returns
    -------
    array of the shape of x
        `out`, or a new array: of the dtype of `x`, float32 for integers and bool.

    Raises
    ------
    TypeError
        If an argument is not a NumPy array of a supported dtype.
    ValueError
        If a per-channel array does not have C values, `eps` < 0, a shape differs, or `out` overlaps an input.

    Notes
    -----
    .. math:: y = \mathrm{act}\left(\frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}}
              \cdot \mathrm{weight} + \mathrm{bias} + \mathrm{residual}\right)

    (Ioffe & Szegedy 2015, algorithm 1.) A row comes out the same, bit for bit, alone and in any batch.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [3.0]])
    >>> nbbn.normalize(x, np.array([2.0]), np.array([4.0]), eps=0.0)
    array([[-0.5],
           [ 0.5]])
    """
    if residual is None and activation is None:
        y = quick.evaluate(x, mean, var, weight, bias, eps, axis, out)
        if y is not None:
            return y
    if backends.warm is not None:
        short: Array | None = backends.warm.normalize(x, mean, var, weight, bias, eps, axis, residual, activation, out)
        if short is not None:
            return short
    given_x, x = x, checks.data("x", x)
    channel = checks.channel_axis(x, axis)
    channels = checks.channels_of(x, channel)
    given = mean, var, weight, bias, eps, residual, activation, out
    mean, var, weight, bias, eps, residual, relu, target = checks.of_normalize(x, channels, *given)
    y = placement.normalize(x, channel, mean, var, weight, bias, eps, residual, relu, target)
    return returned(y, out, given_x)  # type: ignore[no-any-return]


_PROPAGATE: NonFinite = "propagate"  # the object that is the default: no comparison with what may be an array


@overload
def batch_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    axis: int | None = ...,
    decay: float | None = ...,
    ddof: int = ...,
    where: BoolArray | None = ...,
    residual: Array | None = ...,
    activation: Activation = ...,
    nonfinite: NonFinite = ...,
    return_stats: Literal[False] = ...,
    out: Array | None = ...,
) -> Array: ...
@overload
def batch_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    axis: int | None = ...,
    decay: float | None = ...,
    ddof: int = ...,
    where: BoolArray | None = ...,
    residual: Array | None = ...,
    activation: Activation = ...,
    nonfinite: NonFinite = ...,
    return_stats: Literal[True],
    out: Array | None = ...,
) -> tuple[Array, Moments]: ...
def batch_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = checks.DEFAULT_MOMENTUM,
    eps: float = 1e-5,
    *,
    axis: int | None = 1,
    decay: float | None = None,
    ddof: int = 1,
    where: BoolArray | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    nonfinite: NonFinite = _PROPAGATE,
    return_stats: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Moments]:
    r"""Batch normalization; positional arguments as in ``torch.nn.functional.batch_norm``.

    Training: statistics of this batch, normalize with them, update the running arrays in place (when given), in
    one pass over memory where a channel fits in cache. Evaluation: normalize with the running arrays, which must
    be given and are never written.

    Parameters
    ----------
    x : array of shape (..., C, ...)
        float32, float64, float16 or bfloat16 (`ml_dtypes`); in evaluation integers and bool too.
    running_mean, running_var : arrays of shape (C,), optional in training
        float32 or float64. Training updates them in place; evaluation reads them.
    weight, bias : arrays of shape (C,), optional
        Scale (gamma) and offset (beta), used identically in both modes; absent means 1 and 0.
    training : bool
        Which statistics normalize: those of this batch (True) or the running ones (False).
    momentum : float
        Weight of the NEW batch in the running arrays, in [0, 1] (PyTorch's convention).
    eps : float
        Added to the variance inside the square root; >= 0.
    axis : int or None
        The channel axis; None: the whole array is one channel.
    decay : float, optional
        Weight of the OLD value, ``1 - momentum``. Instead of `momentum`.
    ddof : {0, 1}
        Which batch variance goes into `running_var`: 1 the sample variance (PyTorch), 0 the population variance
        (Keras, Flax, ONNX). The batch itself is always normalized with the population variance.
    where : bool array, optional
        Broadcasts to `x`; statistics leave False elements out. Every element is still normalized. (For statistics
        and inference: `batch_norm_backward` has no mask.)
    residual : array of the shape of x, optional
        Added before the activation.
    activation : {None, "relu"}
        Applied last.
    nonfinite : {"propagate", "skip", "raise"}
        What NaN or infinite batch statistics do to the running arrays: see `ema_update`. "raise" looks before it
        writes, which costs a second pass over `x`. On a GPU both read a few bytes back, and wait for them.
    return_stats : bool
        Also return the `Moments` of this batch (in evaluation too, where they cost an extra pass).
    out : array of the shape of x, optional
        float32, float64, float16 or bfloat16; may be `x` itself (in place), else must not overlap any other
        argument.

    Returns
    -------
    y : array of the shape of x
        `out`, or a new array: of the dtype of `x`, float32 for integers and bool.
    stats : Moments
        Only with ``return_stats=True``.

    Raises
    ------
    TypeError
        If an argument is not a NumPy array of a supported dtype (training: floating).
    ValueError
        If training sees only one value per channel, evaluation has no running arrays, a per-channel array does
        not have C values, a number is out of range, or memory overlaps.
    FloatingPointError
        With ``nonfinite="raise"``; nothing has been written then.

    Warns
    -----
    NonFiniteWarning
        With ``nonfinite="skip"``, after everything is written; says how many channels were skipped.

    Notes
    -----
    .. math:: y = \mathrm{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \mathrm{eps}}}
              \cdot \mathrm{weight} + \mathrm{bias} + \mathrm{residual}\right), \qquad
              \mathrm{running} \leftarrow \mathrm{running} + \mathrm{momentum} \cdot (\mathrm{batch} - \mathrm{running})

    (Ioffe & Szegedy 2015, algorithms 1 and 2.) An empty batch gives an empty result and changes nothing.

    Ghost (virtual) batches (Hoffer, Hubara & Soudry 2017) are a loop over parts of the batch, which need no copies: the
    last example. There is no argument for it, because the backward pass needs the statistics of each part, and one
    call would have to hide which axis is cut and what becomes of an uneven rest.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [3.0]], dtype=np.float32)
    >>> mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    >>> nbbn.batch_norm(x, mean, var, training=True, eps=0.0)
    array([[-1.],
           [ 1.]], dtype=float32)
    >>> mean, var
    (array([0.2], dtype=float32), array([1.1], dtype=float32))
    >>> nbbn.batch_norm(x[:1], mean, var)  # evaluation: a batch of one is fine
    array([[0.7627666]], dtype=float32)

    Ghost batches: 2 parts (`numpy.array_split` makes sizes that differ by at most 1), each with statistics and an
    update of the running ones of its own, in order; then the backward pass.

    >>> x, y = np.array([[1.0], [3.0], [4.0], [6.0], [8.0]]), np.empty((5, 1))
    >>> parts = [np.array_split(a, 2) for a in (x, y)]
    >>> ghosts = [nbbn.batch_norm(p, mean, var, training=True, return_stats=True, out=q)[1] for p, q in zip(*parts)]
    >>> y.ravel().round(2)
    array([-1.34,  0.27,  1.07, -1.  ,  1.  ])
    >>> for p, m in zip(parts[0], ghosts):
    ...     dx, dweight, dbias = nbbn.batch_norm_backward(np.ones_like(p), p, m.mean, m.var())
    """
    plain = where is None and residual is None and activation is None and decay is None and return_stats is False
    if plain and training is False and nonfinite is _PROPAGATE and quick.harmless(momentum, ddof):
        quick_y = quick.evaluate(x, running_mean, running_var, weight, bias, eps, axis, out)
        if quick_y is not None:
            return quick_y
    return_stats = checks.flag("return_stats", return_stats)
    y, stats, skipped = forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, axis=axis, decay=decay, ddof=ddof,
        where=where, residual=residual, activation=activation, nonfinite=nonfinite, need_stats=return_stats, out=out,
    )  # fmt: skip
    if stats is not None:
        warn_skipped(skipped, stats)
    return (y, stats) if return_stats and stats is not None else y


def forward(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    axis: int | None,
    nonfinite: NonFinite,
    decay: float | None = None,
    ddof: int = 1,
    where: BoolArray | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    need_stats: bool = False,
    out: Array | None = None,
) -> tuple[Array, Moments | None, int]:
    """What `batch_norm` does, without the warning: result, statistics, number of channels skipped.

    Statistics may be None unless asked for. `BatchNorm` brings its own state up to date before it warns.
    """
    plain = where is None and residual is None and activation is None and decay is None
    if plain and training is True and nonfinite is _PROPAGATE:
        done = quick.train(x, running_mean, running_var, weight, bias, momentum, eps, axis, ddof, out, need_stats)
        if done is not None:
            return *done, 0
    if backends.warm is not None and where is None and decay is None and nonfinite is _PROPAGATE:
        done = backends.warm.forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, axis, ddof, residual, activation, out,
            need_stats,
        )  # fmt: skip
        if done is not None:
            return *done, 0
    training = checks.flag("training", training)
    given_x, x = x, checks.float_data("x", x, "in training") if training else checks.data("x", x)
    channel = checks.channel_axis(x, axis)
    channels = checks.channels_of(x, channel)
    weight = checks.optional_per_channel("weight", weight, channels)
    bias = checks.optional_per_channel("bias", bias, channels)
    rate = checks.momentum(momentum, decay)
    ddof = checks.delta_degrees_of_freedom(ddof)
    eps = checks.epsilon(eps)
    mask = checks.mask(where, x)
    residual = checks.residual_like(residual, x)
    relu = checks.activation(activation)
    policy = checks.nonfinite(nonfinite)
    checks.same_place(x, weight=weight, bias=bias, residual=residual, where=mask)
    given = out

    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "running_mean, running_var: expected both arrays in evaluation (training=False), got None; "
                "pass training=True to use the statistics of this batch"
            )
        mean = checks.per_channel("running_mean", running_mean, channels)
        var = checks.per_channel("running_var", running_var, channels)
        checks.same_place(x, running_mean=mean, running_var=var)
        out = checks.output(out, x, residual=residual, weight=weight, bias=bias, running_mean=mean, running_var=var)
        batch = placement.moments(x, channel, mask) if need_stats else None  # before `out`, which may be x
        y = placement.normalize(x, channel, mean, var, weight, bias, eps, residual, relu, out)
        return returned(y, given, given_x), batch, 0

    running, out = checks.written_in_training(x, channels, running_mean, running_var, out, weight, bias, residual, mask)
    update = None if running is None else RunningUpdate(*running, rate, ddof, policy == "skip")
    if x.size == 0:
        return returned(empty(x.shape, x.dtype, x), given, given_x), placement.moments(x, channel, None), 0
    checks.more_than_one_value(x, channels)

    if mask is None and policy != "raise":
        y, stats, skipped = placement.train(x, channel, weight, bias, eps, residual, relu, out, update)
    else:  # what must be looked at before anything is written
        stats = placement.moments(x, channel, mask)
        if mask is not None:
            checks.selected_values(in_host_memory(stats.count))
        if policy == "raise":
            refuse_nonfinite("x", stats, update)
        mean, var = checks.per_channel("mean", stats.mean, channels), checks.per_channel("var", stats.var(), channels)
        y = placement.normalize(x, channel, mean, var, weight, bias, eps, residual, relu, out)
        skipped = 0 if update is None else move_running(stats, update)
    return returned(y, given, given_x), stats, skipped


def batch_norm_backward(
    grad_out: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int | None = 1,
    training: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    r"""Gradients of batch normalization.

    Parameters
    ----------
    grad_out : array of the shape of x
        Gradient of the loss with respect to the output.
    x : array of shape (..., C, ...)
        The input of the forward call; float32, float64, float16 or bfloat16.
    mean, var : arrays of shape (C,)
        The statistics that normalized it: of the batch (population variance) for a training call, the running
        ones for evaluation.
    weight : array of shape (C,), optional
        Scale (gamma) of the forward call.
    eps : float
        As in the forward call.
    axis : int or None
        As in the forward call.
    training : bool
        True differentiates through the batch statistics of all elements (not of a masked forward call); False
        treats `mean` and `var` as constants (evaluation, frozen layers).
    out : array of the shape of x, optional
        Where to put `grad_x`; floating. May be `grad_out` or `x` itself, else must not overlap any input.

    Returns
    -------
    grad_x : array of the shape of x
        `out`, or a new array of the dtype of `x`.
    grad_weight, grad_bias : arrays of shape (C,)
        In the dtype of `weight`; where there is none in that of `x`, float32 for half precision.

    Raises
    ------
    TypeError
        If an argument is not a NumPy array of a supported dtype.
    ValueError
        If shapes or numbers of channels differ, `eps` < 0, or `out` overlaps an input.

    Notes
    -----
    With :math:`\hat x = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \mathrm{eps}}` and n values per channel:

    .. math::
        \mathrm{grad_b} = \sum g, \qquad \mathrm{grad_w} = \sum g \hat x, \qquad
        \mathrm{grad_x} = \frac{\mathrm{weight}}{\sqrt{\mathrm{var} + \mathrm{eps}}}
        \left(g - \frac{\mathrm{grad_b}}{n} - \hat x \frac{\mathrm{grad_w}}{n}\right)

    (Ioffe & Szegedy 2015, section 3); without the two last terms for ``training=False``.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [3.0], [8.0]])
    >>> m = nbbn.batch_stats(x)
    >>> g = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dw, db = nbbn.batch_norm_backward(g, x, m.mean, m.var())
    >>> dx.ravel().round(3), dw.round(3), db
    (array([ 0.109, -0.152,  0.044]), array([-1.019]), array([1.]))
    """
    done = quick.backward(grad_out, x, mean, var, weight, eps, axis, out) if training is True else None
    if done is None and training is True and backends.warm is not None:
        done = backends.warm.backward(grad_out, x, mean, var, weight, eps, axis, out)
    if done is not None:
        return done
    given_x, x = x, checks.float_data("x", x, "in backward")
    channel = checks.channel_axis(x, axis)
    channels = checks.channels_of(x, channel)
    given = grad_out, mean, var, weight, eps, training, out
    grad_out, mean, var, weight, eps, training, target = checks.of_backward(x, channels, *given)
    dtype = parameter_dtype(x.dtype) if weight is None else weight.dtype
    grad_x, grad_weight, grad_bias = placement.backward(
        grad_out, x, channel, mean, var, weight, eps, training, target, dtype
    )
    return returned(grad_x, out, given_x), returned(grad_weight, None, given_x), returned(grad_bias, None, given_x)
