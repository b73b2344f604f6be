"""Part g: the normalization layers folded into the maps before them, and what rounding that costs."""

import copy
from dataclasses import dataclass

import numpy as np

import nbbn
from nbbn.demo.network import Array, Network

DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class FoldedLayer:
    """Change of one layer's output, root mean square over images and channels: by `nbbn.folding_error`, and found."""

    expected: dict[str, float]
    measured: dict[str, float]
    largest_mean_over_std: float


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """Part g: every layer, and the answers of the network that has no normalization layers any more (float32)."""

    images: int
    layers: list[FoldedLayer]
    different_answers: int
    logit_difference: float


def folding(network: Network, images: Array) -> FoldedNetwork:
    """Fold a copy of the network; compare each layer in exact arithmetic (float64), the whole as it runs."""
    folded = copy.deepcopy(network)
    layers, offsets = [], {}
    x = images
    for linear, norm, target, gone in zip(network.linears, network.norms, folded.linears, folded.norms, strict=True):
        assert norm.running_mean is not None  # all layers track statistics
        assert norm.running_var is not None
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        layer = linear.weight.T.astype(np.float64), None, *statistics
        weight, bias = nbbn.fuse_linear_bn_weights(*layer)  # one row per output channel: so is a convolution here

        exact = copy.deepcopy(linear)
        exact.weight = weight.T
        y = exact(x.astype(np.float64))
        expected, measured = {}, {}
        for dtype in DTYPES:
            exact.weight = weight.T.astype(dtype).astype(np.float64)
            offset = bias.astype(dtype) - bias
            change = exact(x.astype(np.float64)) - y + _column(offset, y)
            expected[dtype] = _rms(nbbn.folding_error(*layer, dtype=dtype).error)
            measured[dtype] = _rms(change)
        far = nbbn.folding_error(*layer).mean_over_std.max()
        layers.append(FoldedLayer(expected, measured, float(far)))

        target.weight = np.ascontiguousarray(weight.T, np.float32)
        offsets[id(gone)] = bias.astype(np.float32)
        x = np.maximum(norm(linear(x)), 0)

    before = network(images)
    after = folded(images, lambda gone, z: z + _column(offsets[id(gone)], z))
    return FoldedNetwork(
        images=len(images),
        layers=layers,
        different_answers=int(np.count_nonzero(before.argmax(1) != after.argmax(1))),
        logit_difference=float(np.abs(before - after).max()),
    )


def _column(values: Array, z: Array) -> Array:
    """One value per channel, to broadcast against (N, C, ...)."""
    return values.reshape(-1, *[1] * (z.ndim - 2))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))
