"""Mixed calls from 4 threads for a long time: the same bits at the end as at the beginning, flat memory, no thread.

`python tests/soak.py 600` does it for 600 seconds, prints what it measured, and ends with 1 if something is wrong.
"""

import gc
import itertools
import os
import pickle
import random
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import nbbn

THREADS, PHASES = 4, 20

#: Less memory for each call, on average, than the smallest block that malloc hands out (32 bytes with its header), and
#: fewer Python objects than if one kind of call leaked one each time: nothing is kept that grows with calls.
BYTES_PER_CALL = 16
#: What a process that leaks nothing may differ by from one phase to another: 4 threads' free lists and stacks.
NOISE_BYTES, NOISE_BLOCKS = 8 << 20, 500

# --- the calls: each returns what it computed, as bytes or text -------------------------------------------------------


def dtypes():
    names = [np.float32, np.float64, np.float16]
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        return names
    return [*names, ml_dtypes.bfloat16]


def layouts(values):
    """The same values, channels on axis 1: contiguous, channels last, spaced, reversed, read-only at an odd address."""
    yield values
    yield np.ascontiguousarray(np.moveaxis(values, 1, -1)).swapaxes(1, -1).swapaxes(2, -1)
    spaced = np.zeros((2 * values.shape[0], *values.shape[1:]), values.dtype)
    spaced[::2] = values
    yield spaced[::2]
    yield values[::-1, :, ::-1]
    raw = bytearray(values.nbytes + 1)
    raw[1:] = values.tobytes()
    odd = np.frombuffer(raw, values.dtype, values.size, 1).reshape(values.shape)
    odd.flags.writeable = False
    yield odd


def as_bytes(*results):
    return b"|".join(r.tobytes() if isinstance(r, (np.ndarray, np.generic)) else repr(r).encode() for r in results)


def of_moments(m):
    return as_bytes(m.count, m.mean, m.m2)


def functions(x, weight, bias):
    """All functions on one array."""
    mask = np.arange(x.shape[0])[:, None, None, None] % 3 > 0
    m = nbbn.batch_stats(x, where=mask)
    running = np.zeros(4, np.float32), np.ones(4, np.float64)
    out = np.empty_like(x)
    nbbn.batch_norm(x, *running, weight, bias, True, residual=x, activation="relu", out=out)
    y, used = nbbn.batch_norm(x, *running, weight, bias, return_stats=True)
    nbbn.ema_update(*running, m, decay=0.9, step=3)
    z = nbbn.normalize(x, m.mean, m.var(), weight, bias)
    gradients = nbbn.batch_norm_backward(z, x, used.mean, used.var(), weight)
    constant = nbbn.batch_norm_backward(y, x, *running, training=False)
    return as_bytes(m.mean, m.m2, out, y, z, *gradients, *constant, *running) + of_moments((m + used) - m)


def integers(x):
    m = nbbn.batch_stats(x)
    return of_moments(m) + as_bytes(nbbn.normalize(x, m.mean, m.var()))


def layer(x, **options):
    """A layer's life."""
    bn = nbbn.BatchNorm(4, **options)
    results = [bn(x), bn.backward(x)]
    with bn.hold_updates() as pending:
        results.append(bn(x[1:]))
    pending.commit() if bn.track_running_stats else pending.drop()
    results += [bn.eval()(x), bn.backward(x), bn.freeze().train()(x)]
    bn = pickle.loads(pickle.dumps(bn.unfreeze().recalibrate([x, x[:2], x[:0]])))
    again = nbbn.BatchNorm.from_state_dict(bn.state_dict(style="keras", prefix="a/"), "a/", axis=bn.axis)
    report = bn.drift(x)
    return as_bytes(*results, *bn.state_dict().values(), report, report.worst(2), again.running_var, again)


def tools(x, weight, bias):
    m = nbbn.batch_stats(x.astype(np.float64))
    running = m.mean + 0.25, m.var() * 2
    convolution = np.linspace(-1, 1, 4 * 3 * 5).reshape(4, 3, 5), bias, *running, 1e-5, weight, bias
    folded, error = nbbn.fuse_conv_bn_weights(*convolution), nbbn.folding_error(*convolution, dtype=np.float16)
    found = nbbn.check_running_stats(*running, weight, bias, stats=m)
    return as_bytes(*folded, error, found, nbbn.drift(*running, m, weight=weight), nbbn.expected_noise(0.1, 32))


def errors(x):
    """What is refused, each after some work."""
    poisoned = x.astype(np.float32)
    poisoned[1, 2] = np.nan
    strict = nbbn.BatchNorm(4, nonfinite="raise")
    strict(x)

    def batches():
        yield x
        raise KeyError("no more")

    calls = (
        lambda: nbbn.batch_stats(x.astype(complex)),
        lambda: nbbn.normalize(x, np.zeros(3), np.ones(4)),
        lambda: nbbn.batch_norm(x[:1, :, :1, :1], training=True),
        lambda: nbbn.batch_norm(x, np.zeros(4), np.ones(4), training=True, out=x[::-1]),
        lambda: strict(poisoned),
        lambda: strict.backward(x),
        lambda: strict.recalibrate(batches()),
        lambda: strict.load_state_dict({"weight": np.ones(5)}),
        lambda: nbbn.batch_norm_backward(x, x[1:], np.zeros(4), np.ones(4)),
    )
    said = []
    for call in calls:
        try:
            call()
        except (TypeError, ValueError, KeyError, FloatingPointError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    assert len(said) == len(calls), said
    return as_bytes(said, *strict.state_dict().values())


def reference(x):
    with nbbn.use_backend("numpy"):
        return of_moments(nbbn.batch_stats(x)) + as_bytes(nbbn.batch_norm(x, training=True))


def threaded(x, numbers):
    """Large enough for two threads, however many there are to be."""
    nbbn.set_num_threads(next(numbers))
    m = nbbn.batch_stats(x)
    return of_moments(m) + as_bytes(nbbn.batch_norm(x, training=True), *nbbn.batch_norm_backward(x, x, m.mean, m.var()))


def all_calls():
    """Name and call of every kind."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((2, 4))
    skipping = np.where(np.arange(6)[:, None, None, None] == 2, np.nan, 1.0) * rng.standard_normal((6, 4, 5, 3))
    calls = {}
    for dtype in dtypes():
        values = rng.standard_normal((6, 4, 5, 3)).astype(dtype)
        for number, x in enumerate(layouts(values)):
            calls[f"functions {np.dtype(dtype)} {number}"] = lambda x=x: functions(x, weight, bias)
        calls[f"layer {np.dtype(dtype)}"] = lambda x=values: layer(x, debias=True)
    for dtype in (np.uint8, np.int32, np.bool_):
        x = rng.integers(0, 2 if dtype is np.bool_ else 100, (6, 4, 5, 3)).astype(dtype)
        calls[f"integers {np.dtype(dtype)}"] = lambda x=x: integers(x)
    x = rng.standard_normal((6, 4, 5, 3))
    numbers = itertools.cycle((1, 2))
    large = rng.standard_normal((24, 4, 64, 64)).astype(np.float32)
    calls |= {
        "layer float64, channels last": lambda: layer(np.moveaxis(x, 1, -1), axis=-1, momentum=None, dtype="f8"),
        "layer that skips": lambda: layer(skipping, nonfinite="skip"),
        "tools": lambda: tools(x, weight, bias),
        "errors": lambda: errors(x),
        "reference": lambda: reference(x),
        "threaded, rows": lambda: threaded(large, numbers),
        "threaded, columns": lambda: threaded(large.reshape(-1, 4), numbers),
    }
    return calls


# --- running and measuring --------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was measured: after each phase, when all threads had ended, seconds, calls, memory, Python's blocks."""

    kinds: int
    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    threads_left: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def growth(self, what):
        """What the least-squares line through the phases after the first quarter grows by, from first to last."""
        warm = len(self.calls) // 4
        calls, values = np.array(self.calls[warm:], float), np.array(what[warm:], float)
        return float(np.polyfit(calls - calls[0], values, 1)[0] * (calls[-1] - calls[0])), int(calls[-1] - calls[0])

    def problems(self):
        """What is not as it should be."""
        found = [f"wrong result: {name}" for name in self.wrong[:10]]
        if any(self.threads_left):
            found.append(f"threads left: {self.threads_left}")
        grown, calls = self.growth(self.memory)
        if grown > max(NOISE_BYTES, BYTES_PER_CALL * calls):
            found.append(f"memory grew by {grown:.0f} bytes in {calls} calls")
        grown, calls = self.growth(self.blocks)
        if grown > max(NOISE_BLOCKS, calls / self.kinds / 2):
            found.append(f"Python's objects grew by {grown:.0f} in {calls} calls")
        return found

    def __str__(self):
        (grown, calls), (objects, _) = self.growth(self.memory), self.growth(self.blocks)
        return (
            f"{self.calls[-1]} calls of {self.kinds} kinds from {THREADS} threads in {self.seconds[-1]:.0f} s, "
            f"{len(self.wrong)} with other bits than the first; memory {self.memory[0] / 1e6:.1f} MB after the first "
            f"phase, {self.memory[-1] / 1e6:.1f} MB after the last, slope after warm-up {grown / calls:+.3f} bytes and "
            f"{objects / calls:+.5f} objects per call; threads left {max(self.threads_left)}"
        )


def soak(seconds, calls=None, phases=PHASES, least=20):
    """Run for so long, and at least so many calls in each phase; later results must be the first one, bit for bit."""
    calls = all_calls() if calls is None else calls
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", nbbn.NonFiniteWarning)
        warnings.simplefilter("ignore", nbbn.IllConditionedWarning)
        expected = {name: call() for name, call in calls.items()}
        report, done, start = Report(len(calls)), itertools.count(), time.monotonic()
        _run_phase(calls, expected, report, done, start + min(1, seconds), least)
        tasks = _threads()  # with Numba's own
        for phase in range(1, phases + 1):
            _run_phase(calls, expected, report, done, start + seconds * phase / phases, least)
            gc.collect()
            report.threads_left.append(_threads() - tasks)
            report.seconds.append(time.monotonic() - start)
            report.calls.append(next(done))
            report.memory.append(_resident())
            report.blocks.append(sys.getallocatedblocks())
        for name, call in calls.items():
            if call() != expected[name]:
                report.wrong.append(f"{name}, at the end")
    return report


def _run_phase(calls, expected, report, done, until, least):
    def work(seed):
        choice, names, turns = random.Random(seed), list(calls), itertools.count()
        while next(turns) < least / THREADS or time.monotonic() < until:
            name = choice.choice(names)
            try:
                if calls[name]() != expected[name]:
                    report.wrong.append(name)
            except Exception as error:
                report.wrong.append(f"{name}: {error!r}")
            next(done)

    threads = [threading.Thread(target=work, args=(f"{len(report.calls)} {n}",)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _threads():
    """Of this process, as the system counts them, which sees a thread for a moment after it has ended."""
    numbers = []
    for _ in range(10):
        numbers.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.01)
    return min(numbers)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    result = soak(float(sys.argv[1]) if len(sys.argv) > 1 else 600)
    print(result)
    sys.exit("\n".join(result.problems()) or 0)
