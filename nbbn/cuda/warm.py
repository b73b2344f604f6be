"""The shortest way through a call on a device: what a call with the same geometries decided is looked up, not decided.

A call is known by the library, geometry, alignment and device of every array, and by its options. Everything that the
long way checks follows from these, except whether what is written overlaps what else is used: that is looked at each
time, and wherever address ranges so much as meet, the long way decides. It also serves what is not known: the answer is
None, and nothing has been written.
"""

from typing import Any

from nbbn import backends
from nbbn.arrays import has_cuda_memory
from nbbn.cuda import remembered
from nbbn.cuda.arguments import NOT_RUNNING
from nbbn.cuda.launcher import place_of
from nbbn.cuda.libraries import library_of
from nbbn.cuda.memory import number_of
from nbbn.cuda.storage import WIDEST
from nbbn.moments import Moments, holding
from nbbn.quick import harmless, is_plain_eps

#: Calls remembered at most: then all are forgotten.
MOST = 4096

_known: dict[Any, Any] = {}


def normalize(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, residual: Any, activation: Any, out: Any
) -> Any:
    """The affine step."""
    seen = _look((x, mean, var, weight, bias, residual), out, (x,))
    if seen is None or not _are_plain(eps, axis, activation):
        return None
    key, (at, mean_at, var_at, weight_at, bias_at, residual_at, out_at) = seen
    recipe = _find(("normalize", axis, activation, *key), remembered.evaluation,
                   x, mean, var, weight, bias, residual, out, axis, activation)  # fmt: skip
    if not recipe:
        return None
    y, out_at = (out, out_at) if out is not None else recipe.result.make()
    place = place_of(recipe.library, x, recipe.device)
    recipe.affine(place, at, residual_at or at, out_at, mean_at, var_at, 1.0, weight_at, bias_at, eps, recipe.floor)
    return y


def forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any,
    axis: Any, ddof: Any, residual: Any, activation: Any, out: Any, need_stats: bool,
) -> tuple[Any, Moments | None] | None:  # fmt: skip
    """`batch_norm` without a mask, where batches that are not finite propagate: result, statistics if asked for."""
    if training is True:
        return train(
            x, running_mean, running_var, weight, bias, momentum, eps, axis, ddof, residual, activation, out, need_stats
        )
    if training is not False or need_stats or not harmless(momentum, ddof):
        return None
    y = normalize(x, running_mean, running_var, weight, bias, eps, axis, residual, activation, out)
    return None if y is None else (y, None)


def train(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: Any, eps: Any, axis: Any, ddof: Any,
    residual: Any, activation: Any, out: Any, need_stats: bool,
) -> tuple[Any, Moments | None] | None:  # fmt: skip
    """Statistics, normalization and moving averages; the statistics themselves if asked for."""
    seen = _look((x, weight, bias, residual), out, (x,), (running_mean, running_var))
    if seen is None or not _are_plain(eps, axis, activation) or not harmless(momentum, ddof):
        return None
    key, (at, weight_at, bias_at, residual_at, out_at, mean_at, var_at) = seen
    recipe = _find(("train", axis, activation, *key), remembered.training,
                   x, running_mean, running_var, weight, bias, residual, out, axis, activation)  # fmt: skip
    if not recipe:
        return None
    y, out_at = (out, out_at) if out is not None else recipe.result.make()
    owners, addresses = recipe.fields.make(need_stats)
    place = place_of(recipe.library, x, recipe.device)
    recipe.train(
        place, at, residual_at or at, out_at, addresses, weight_at, bias_at, eps, recipe.floor,
        NOT_RUNNING if running_mean is None else (mean_at, var_at, momentum, ddof),
    )  # fmt: skip
    return y, holding(*owners) if need_stats else None


def moments(x: Any, axis: Any) -> Moments | None:
    """Statistics."""
    seen = _look((x,), None, ())
    if seen is None or not (axis is None or type(axis) is int):
        return None
    key, (at, _) = seen
    recipe = _find(("moments", axis, *key), remembered.summary, x, axis)
    if not recipe:
        return None
    owners, addresses = recipe.fields.make(True)
    place = place_of(recipe.library, x, recipe.device)
    recipe.statistics(place, at, addresses, NOT_RUNNING)
    return holding(*owners)


def backward(
    grad_out: Any, x: Any, mean: Any, var: Any, weight: Any, eps: Any, axis: Any, out: Any
) -> tuple[Any, Any, Any] | None:
    """The three gradients, in training."""
    seen = _look((x, grad_out, mean, var, weight), out, (x, grad_out))
    if seen is None or not _are_plain(eps, axis, None):
        return None
    key, (at, grad_at, mean_at, var_at, weight_at, out_at) = seen
    recipe = _find(("backward", axis, *key), remembered.backward, grad_out, x, mean, var, weight, out, axis)
    if not recipe:
        return None
    grad_x, out_at = (out, out_at) if out is not None else recipe.result.make()
    grad_weight, of_weight = recipe.parameter.make()
    grad_bias, of_bias = recipe.parameter.make()
    _kept, totals = recipe.totals.make()
    place = place_of(recipe.library, x, recipe.device)
    recipe.gradients(place, grad_at, at, out_at, (totals, mean_at, var_at, weight_at, eps), (of_weight, of_bias))
    return grad_x, grad_weight, grad_bias


def _are_plain(eps: Any, axis: Any, activation: Any) -> bool:
    """Whether these options need no check."""
    if not is_plain_eps(eps) or not (axis is None or type(axis) is int):
        return False
    return activation is None or (type(activation) is str and activation == "relu")


_OURS = frozenset({None, "cuda"})


def _look(
    read: tuple[Any, ...], out: Any, may_be: tuple[Any, ...], moved: tuple[Any, ...] = ()
) -> tuple[tuple[Any, ...], list[int]] | None:
    """Key and addresses of `read`, `out`, `moved`; None if the long way must look.

    Nothing that is written shares memory with anything else, except that `out` may be one of `may_be` itself.
    """
    if backends.forced() not in _OURS:
        return None
    key: list[Any] = []
    addresses: list[int] = []
    spans: list[tuple[int, int]] = []
    in_place = out is not None and any(out is other for other in may_be)
    for place, value in enumerate((*read, out, *moved)):
        if value is None:
            key.append(None)
            addresses.append(0)
            continue
        library = library_of(value)
        if not library.is_plain or not has_cuda_memory(value):
            return None
        try:
            address, whole, number = library.describe("", value)
        except TypeError:  # the long way says what is wrong
            return None
        key += library, whole, address % WIDEST, number_of(number)
        addresses.append(address)
        if not (in_place and place == len(read)):  # what `out` is stands among what is read
            spans.append((address + whole.low, address + whole.high))
    if (out is not None or moved) and not _are_apart(spans):
        return None
    return tuple(key), addresses


def _are_apart(spans: list[tuple[int, int]]) -> bool:
    end = 0
    for start, stop in sorted(spans):
        if start < end:
            return False
        end = stop
    return True


def _find(key: tuple[Any, ...], make: Any, *arguments: Any) -> Any:
    """What is remembered for a key; False or None for what the long way must do."""
    found = _known.get(key)
    if found is None:
        try:
            found = make(*arguments) or False
        except (TypeError, ValueError):  # the long way says what is wrong
            return None
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = found
    return found
