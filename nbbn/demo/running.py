"""Parts c and d: how running statistics converge, and how noisy they stay, on the inputs of one fixed layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import nbbn
from nbbn.demo.network import Array

#: Momentum values of part c; None is the cumulative average.
MOMENTA = (0.1, 0.01, None)


@dataclass(frozen=True, slots=True)
class Track:
    """One layer's running statistics after each batch: RMS error over channels, and what is left of the start."""

    momentum: float | None
    mean_error: Array
    var_error: Array
    start_left: Array
    start_left_expected: Array


@dataclass(frozen=True, slots=True)
class Convergence:
    """Part c: tracks of three layers that saw the same batches. Errors in units of sigma and of sigma squared."""

    batch_size: int
    tracks: list[Track]


@dataclass(frozen=True, slots=True)
class Noise:
    """Part d: standard errors per batch size, RMS over channels, in units of sigma (mean) and sigma**2 (variance).

    `*_uncertainty` is the standard error of the measured value itself.
    """

    momentum: float
    batch_sizes: tuple[int, ...]
    repetitions: int
    mean: Array
    mean_uncertainty: Array
    mean_predicted: Array
    var: Array
    var_uncertainty: Array
    var_predicted: Array


def convergence(pool: Array, rng: np.random.Generator, batches: int = 1000, batch_size: int = 32) -> Convergence:
    """Feed fresh layers batches drawn from `pool`, of shape (N, C), with replacement.

    The distance that is left of the way from the initial mean (0) to the population's is the projection of the
    error on that way. Expected: ``(1 - momentum)**t`` for an exponential average, 0 for the cumulative one.
    """
    population = nbbn.batch_stats(pool)
    mean, var = population.mean, population.var()
    drawn = [pool[rng.integers(len(pool), size=batch_size)] for _ in range(batches)]
    tracks = []
    for momentum in MOMENTA:
        layer = nbbn.BatchNorm(pool.shape[1], momentum=momentum)
        track = Track(momentum, *np.empty((4, batches)))
        for t, x in enumerate(drawn):
            layer(x)
            state = layer.state_dict()
            error = state["running_mean"] - mean
            track.mean_error[t] = _rms(error / np.sqrt(var))
            track.var_error[t] = _rms(state["running_var"] / var - 1)
            track.start_left[t] = error @ (0 - mean) / (mean @ mean)
            track.start_left_expected[t] = 0.0 if momentum is None else (1 - momentum) ** (t + 1)
        tracks.append(track)
    return Convergence(batch_size, tracks)


def noise(
    pool: Array,
    rng: np.random.Generator,
    batch_sizes: Sequence[int] = (4, 16, 64, 256),
    momentum: float = 0.1,
    repetitions: int = 300,
) -> Noise:
    """Standard error of the running statistics once they have forgotten where they started.

    Predicted by `nbbn.expected_noise` for independent draws with the kurtosis of the pool.
    Repetitions are side by side as further channels.
    """
    population = nbbn.batch_stats(pool)
    mean, var = population.mean, population.var()
    kurtosis = float((((pool - mean) ** 4).mean(0) / var**2).mean())
    # they start at the population's values, so only their variance has to settle: to 1e-4 of itself
    settle = int(np.ceil(np.log(1e-4) / np.log((1 - momentum) ** 2)))
    rows = []
    for size in batch_sizes:
        running_mean, running_var = np.tile(mean, repetitions), np.tile(var, repetitions)
        for _ in range(settle):
            x = pool[rng.integers(len(pool), size=(size, repetitions))].reshape(size, -1)
            nbbn.ema_update(running_mean, running_var, nbbn.batch_stats(x), momentum)
        mean_errors = (running_mean.reshape(repetitions, -1) - mean) / np.sqrt(var)
        var_errors = running_var.reshape(repetitions, -1) / var - 1
        predicted = nbbn.expected_noise(momentum, size, kurtosis=kurtosis)
        rows.append(
            (
                *_rms_with_uncertainty(mean_errors),
                predicted.mean,
                *_rms_with_uncertainty(var_errors),
                predicted.var,
            )
        )
    return Noise(momentum, tuple(batch_sizes), repetitions, *np.array(rows).T)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _rms_with_uncertainty(errors: Array) -> tuple[float, float]:
    """RMS of all errors, of shape (repetitions, C), and its standard error; only repetitions are independent."""
    squares = (errors**2).mean(1)
    rms = np.sqrt(squares.mean())
    return float(rms), float(squares.std(ddof=1) / np.sqrt(len(squares)) / (2 * rms))
