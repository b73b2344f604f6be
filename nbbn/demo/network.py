"""A small convolutional network in NumPy. Its normalization, forward and backward, is `nbbn.BatchNorm`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import nbbn

Array = npt.NDArray[Any]

#: How a normalization layer is applied to its input: as a rule, by calling it.
Normalize = Callable[[nbbn.BatchNorm, Array], Array]

CLASSES = 10


def call(norm: nbbn.BatchNorm, x: Array) -> Array:
    """Normalize as the layer's mode says."""
    return norm(x)


def with_batch_statistics(norm: nbbn.BatchNorm, x: Array) -> Array:
    """Normalize as a layer in training mode would, at any batch size, and leave the running statistics alone."""
    m = nbbn.batch_stats(x)
    return nbbn.normalize(x, m.mean, m.var(), norm.weight, norm.bias, eps=norm.eps)


class Linear:
    """``y = x @ weight + bias`` on flattened images; without bias where a normalization follows."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, dtype: npt.DTypeLike, bias: bool = False):
        self.weight = _he_normal(inputs, outputs, rng, dtype)
        self.bias = np.zeros(outputs, dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        """Images of any shape (N, ...) to (N, outputs)."""
        self._shape, self._x = x.shape, x.reshape(len(x), -1)
        y = self._x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, grad_out: Array) -> Array:
        """Gradient with respect to the last input; keeps those of the parameters."""
        self.grad_weight = self._x.T @ grad_out
        self.grad_bias = None if self.bias is None else grad_out.sum(0)
        return (grad_out @ self.weight.T).reshape(self._shape)

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """Every parameter with its gradient."""
        yield self.weight, self.grad_weight
        if self.bias is not None and self.grad_bias is not None:
            yield self.bias, self.grad_bias


class Convolution:
    """3x3 convolution of (N, C, H, W), zero-padded, without bias: a matrix product over patches (im2col).

    The product has its channels last in memory; the result is a view of it as (N, C, H, W). `nbbn` reads and
    writes that layout as it is.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, rng: np.random.Generator, dtype: npt.DTypeLike):
        self.weight = _he_normal(9 * inputs, outputs, rng, dtype)
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        self._shape = x.shape
        s = self.stride
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::s, ::s]
        n, _, height, width = windows.shape[:4]
        self._patches = windows.transpose(0, 2, 3, 4, 5, 1).reshape(n * height * width, -1)
        return (self._patches @ self.weight).reshape(n, height, width, -1).transpose(0, 3, 1, 2)

    def backward(self, grad_out: Array) -> Array:
        """Gradient with respect to the last input; keeps that of the weight."""
        n, channels, height, width = self._shape
        s = self.stride
        flat = grad_out.transpose(0, 2, 3, 1).reshape(-1, grad_out.shape[1])
        self.grad_weight = self._patches.T @ flat
        grad_patches = (flat @ self.weight.T).reshape(n, *grad_out.shape[2:], 3, 3, channels)
        padded = np.zeros((n, height + 2, width + 2, channels), grad_out.dtype)
        for i in range(3):
            for j in range(3):
                padded[:, i : i + height : s, j : j + width : s] += grad_patches[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1].transpose(0, 3, 1, 2)

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """The weight with its gradient."""
        yield self.weight, self.grad_weight


class Network:
    """Two convolutions and a hidden layer, each followed by batch normalization and ReLU; then ten logits.

    The normalization layers see (N, 16, 8, 8), (N, 32, 4, 4) and (N, 64).
    """

    def __init__(self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32):
        self.linears: list[Convolution | Linear] = [
            Convolution(1, 16, 1, rng, dtype),
            Convolution(16, 32, 2, rng, dtype),
            Linear(32 * 4 * 4, 64, rng, dtype),
        ]
        self.norms = [nbbn.BatchNorm(channels, dtype=dtype) for channels in (16, 32, 64)]
        self.head = Linear(64, CLASSES, rng, dtype, bias=True)

    def __call__(self, x: Array, normalize: Normalize = call) -> Array:
        """Logits of shape (N, 10); `normalize` says how the normalization layers are applied."""
        self._active = []
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = normalize(norm, linear(x))
            self._active.append(x > 0)
            x = np.maximum(x, 0, out=x)
        return self.head(x)

    def backward(self, grad_logits: Array) -> None:
        """Gradients of all parameters, kept by the layers."""
        grad = self.head.backward(grad_logits)
        for linear, norm, active in zip(self.linears[::-1], self.norms[::-1], self._active[::-1], strict=True):
            grad = linear.backward(norm.backward(grad * active))

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """Every parameter with its gradient."""
        for linear in (*self.linears, self.head):
            yield from linear.parameters()
        for norm in self.norms:
            for parameter, gradient in ((norm.weight, norm.grad_weight), (norm.bias, norm.grad_bias)):
                if parameter is not None and gradient is not None:
                    yield parameter, gradient

    def train(self) -> "Network":
        """Put the normalization layers into training mode."""
        for norm in self.norms:
            norm.train()
        return self

    def eval(self) -> "Network":
        """Put the normalization layers into evaluation mode."""
        for norm in self.norms:
            norm.eval()
        return self

    def freeze(self) -> "Network":
        """Freeze the normalization layers."""
        for norm in self.norms:
            norm.freeze()
        return self

    def norm_input(self, x: Array, index: int) -> Array:
        """What normalization layer `index` is given for these images; deeper layers are not run."""
        for linear, norm in zip(self.linears[:index], self.norms, strict=False):
            x = np.maximum(norm(linear(x)), 0)
        return self.linears[index](x)

    def recalibrate(self, batches: Iterable[Array]) -> "Network":
        """Exact statistics for every normalization layer, each on what the repaired layers before it put out."""
        batches = list(batches)
        self.eval()
        for index, norm in enumerate(self.norms):
            norm.recalibrate(self.norm_input(batch, index) for batch in batches)
        return self

    def running_statistics(self) -> list[Array]:
        """Copies of all running means and variances."""
        states = [norm.state_dict() for norm in self.norms]
        return [state[name] for state in states for name in ("running_mean", "running_var")]


def accuracy(logits: Array, labels: Array) -> float:
    """Fraction of images whose largest logit is that of their label."""
    return float(np.mean(logits.argmax(1) == labels))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean cross-entropy of the softmax, and its gradient with respect to the logits."""
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    grad = np.exp(log_probability)
    grad[rows, labels] -= 1
    return float(-log_probability[rows, labels].mean()), grad / len(labels)


def _he_normal(inputs: int, outputs: int, rng: np.random.Generator, dtype: npt.DTypeLike) -> Array:
    """Weights of variance 2 / inputs (He et al. 2015), which ReLU networks keep their scale with."""
    return rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(dtype)
