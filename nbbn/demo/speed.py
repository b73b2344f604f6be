"""Part f: this machine's speed, against the textbook formulas in NumPy on the same bytes and output memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import nbbn
from nbbn.demo.network import Array

SHAPE = (32, 64, 56, 56)
EPS = 1e-5
MOMENTUM = 0.1
_AXES = (0, 2, 3)


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians in seconds. `gigabytes_per_second` counts every large array that is read or written once.

    `scatter` is nbbn's interquartile range as a fraction of its median.
    """

    operation: str
    numpy: float
    nbbn: float
    gigabytes_per_second: float
    scatter: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Part f: one timing per operation."""

    shape: tuple[int, ...]
    threads: int
    rounds: int
    timings: list[Timing]

    @property
    def on_threads(self) -> str:
        """Such as "1 thread"."""
        return f"{self.threads} thread" + ("s" if self.threads > 1 else "")


class _Operation(NamedTuple):
    """The same work twice. `arrays` is how many arrays of the shape of x it must read or write."""

    name: str
    arrays: int
    numpy: Callable[[], tuple[Array, ...]]
    nbbn: Callable[[], tuple[Array, ...]]


def speed(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE, rounds: int = 21) -> Speed:
    """Time each operation on float32 data, one call of NumPy and one of nbbn in turn, results compared first."""
    x = rng.normal(1, 2, shape).astype(np.float32)
    timings = []
    for operation in _operations(x, rng):
        _check(operation)
        seconds = [(_seconds(operation.numpy), _seconds(operation.nbbn)) for _ in range(rounds)]
        numpy, ours = map(statistics.median, zip(*seconds, strict=True))
        low, _, high = statistics.quantiles([s for _, s in seconds])
        rate = operation.arrays * x.nbytes / ours / 1e9
        timings.append(Timing(operation.name, numpy, ours, rate, (high - low) / ours))
    return Speed(shape, nbbn.get_num_threads(), rounds, timings)


def _operations(x: Array, rng: np.random.Generator) -> list[_Operation]:
    channels, count = x.shape[1], x.size // x.shape[1]
    grad_out = rng.standard_normal(x.shape, np.float32)
    weight, bias = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
    batch = nbbn.batch_stats(x)
    mean, var = batch.mean.astype(np.float32), batch.var().astype(np.float32)
    out, scratch = np.empty_like(x), np.empty_like(x)

    def column(values: Array) -> Array:
        return values.reshape(1, -1, 1, 1)

    def fresh_running() -> tuple[Array, Array]:
        return np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def numpy_statistics() -> tuple[Array, ...]:
        m = x.mean(_AXES, keepdims=True)
        return m.ravel(), x.var(_AXES, mean=m)

    def numpy_normalize(m: Array, v: Array) -> Array:
        np.subtract(x, column(m), out=out)
        np.multiply(out, column(weight / np.sqrt(v + np.float32(EPS))), out=out)
        return np.add(out, column(bias), out=out)

    def numpy_training() -> tuple[Array, ...]:
        running_mean, running_var = fresh_running()
        m, v = numpy_statistics()
        numpy_normalize(m, v)
        running_mean += MOMENTUM * (m - running_mean)
        running_var += MOMENTUM * (v * (count / (count - 1)) - running_var)
        return out, running_mean, running_var

    def numpy_backward() -> tuple[Array, ...]:
        inv_std = 1 / np.sqrt(var + np.float32(EPS))
        x_hat = np.subtract(x, column(mean), out=scratch)
        x_hat *= column(inv_std)
        grad_bias = grad_out.sum(_AXES)
        grad_weight = np.einsum("nchw,nchw->c", grad_out, x_hat)
        x_hat *= column(grad_weight / count)
        grad_x = np.subtract(grad_out, x_hat, out=out)
        grad_x -= column(grad_bias / count)
        grad_x *= column(weight * inv_std)
        return grad_x, grad_weight, grad_bias

    def nbbn_statistics() -> tuple[Array, ...]:
        m = nbbn.batch_stats(x)
        return m.mean, m.var()

    def nbbn_training() -> tuple[Array, ...]:
        running = fresh_running()
        nbbn.batch_norm(x, *running, weight, bias, training=True, momentum=MOMENTUM, eps=EPS, out=out)
        return out, *running

    return [
        _Operation("statistics", 1, numpy_statistics, nbbn_statistics),
        _Operation("training forward", 2, numpy_training, nbbn_training),
        _Operation(
            "evaluation forward",
            2,
            lambda: (numpy_normalize(mean, var),),
            lambda: (nbbn.batch_norm(x, mean, var, weight, bias, eps=EPS, out=out),),
        ),
        _Operation(
            "backward",
            3,
            numpy_backward,
            lambda: nbbn.batch_norm_backward(grad_out, x, mean, var, weight, eps=EPS, out=out),
        ),
    ]


def _check(operation: _Operation) -> None:
    """Both ways must agree before they are timed (this also compiles); results share memory, hence the copies."""
    expected = [result.copy() for result in operation.numpy()]
    for ours, theirs in zip(operation.nbbn(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=operation.name)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
