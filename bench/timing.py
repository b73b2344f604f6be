"""Timing: all contenders of a case take turns, call by call.

A shared machine drifts by a factor of two within minutes, so nothing is compared across rounds: in each round all
contenders are timed one right after the other, in random order, and a ratio is the median over the rounds of the
ratio within a round. Libraries' ways to wait are made equal in `peers`.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ceilings import ceilings
from inputs import Inputs
from operations import Operation, prepare
from peers import PEERS, Peer

#: Seconds a sample takes at least: short calls are repeated, far above the resolution of the clock.
SAMPLE = 2e-3

#: Seconds of untimed calls before a sample: they bring the contender's own threads awake and its own data into
#: cache, and meanwhile the idle threads of the one before go to sleep. Resting instead would time how long the
#: system takes to wake a thread: 6 ms on a machine with a busy neighbour.
WARM_UP = 10e-3


@dataclass(frozen=True)
class Effort:
    """Rounds for an entry: `rounds`, or what fits into `seconds`, but never fewer than `least`."""

    rounds: int = 15
    seconds: float = 5.0
    least: int = 5


def measure(
    operation: Operation, given: Inputs, effort: Effort, peers: Mapping[str, Peer] = PEERS, with_ceilings: bool = True
) -> dict[str, Any]:
    """One entry of the results: seconds of every contender, and ratios within rounds."""
    contenders: dict[str, Callable[[], object]] = dict(prepare(operation, given, peers))
    limits = ceilings(operation, given) if with_ceilings else {}
    contenders |= limits
    samples = _take_turns(contenders, effort)
    seconds = {name: quartiles(values) for name, values in samples.items()}
    entry = {
        "operation": operation.name,
        "case": given.case.id,
        "values": given.x.size,
        "bytes": operation.least_bytes(given),
        "rounds": len(samples["nbbn"]),
        "seconds": seconds,
        "ratios": ratios(samples, {name: rival(peers, samples, name) for name in samples if name != "nbbn"}),
    }
    return entry | ({"ceiling": min(limits, key=lambda name: seconds[name]["median"])} if limits else {})


def rival(peers: Mapping[str, Peer], samples: Mapping[str, object], name: str) -> str:
    """Who of nbbn's ways `name` is compared with; a ceiling, and a result that no one allocates, with the first."""
    against = peers[name].against if name in peers else "nbbn"
    return against if against in samples else "nbbn"


def ratios(samples: Mapping[str, Sequence[float]], rivals: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Quartiles over the rounds of everyone's time by that of its rival in the same round: above 1, nbbn is faster."""
    return {name: quartiles(np.array(samples[name]) / np.array(samples[ours])) for name, ours in rivals.items()}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    names = ("lower", "median", "upper")
    return {name: float(f"{q:.4g}") for name, q in zip(names, np.percentile(values, [25, 50, 75]), strict=True)}


def _take_turns(contenders: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + effort.seconds
    for done in range(effort.rounds):
        if done >= effort.least and time.perf_counter() > end:
            break
        shuffle(order)  # in a fixed order everyone would always follow the same predecessor
        for name in order:
            samples[name].append(_sample(contenders[name], repeats[name]))
    return samples


def _repeats(call: Callable[[], object]) -> int:
    """Calls a sample, from the fastest of three after the first, which may compile and touches all memory."""
    call()
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < SAMPLE:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return max(1, round(SAMPLE / min(seconds)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call."""
    ready = time.perf_counter() + WARM_UP
    call()
    while time.perf_counter() < ready:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
