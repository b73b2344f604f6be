"""Whatever interrupts a call, at whatever point: running arrays and counters are all old or all new.

Faults are injected: an exception at every point where Python may deliver it, real signals at random times, results
that do not fit in memory, iterables and mappings that raise.
"""

import contextlib
import dis
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import nbbn
from nbbn import forks

FILES = (str(Path(nbbn.__file__).parent), contextlib.__file__)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3, 4)).astype(np.float32)
POISONED = np.where(np.arange(72).reshape(X.shape) == 7, np.nan, X).astype(np.float32)
V = np.abs(RNG.standard_normal((4, 3))).astype(np.float32)
LONG = np.int64(1)  # not an int: the long way (nbbn.quick)


# --- an exception at every point --------------------------------------------------------------------------------------

_BACKWARDS = {dis.opmap[name] for name in ("JUMP_BACKWARD",)}


def interrupted(action, error, at):
    """Run `action`, raising `error` at point number `at` of nbbn; returns how many there were before the end.

    The points are those where Python runs signal handlers, and where anything can fail: before and after each call,
    of Python and of C, and at the end of each turn of a loop. (Not between the body of `with lock` and the release:
    nothing fails there, and no handler runs.)
    """
    number = 0

    def point():
        nonlocal number
        number += 1
        if number == at:
            raise error

    def profile(frame, event, argument):
        releases = event == "c_call" and argument.__name__ == "__exit__"
        if frame.f_code.co_filename.startswith(FILES) and not releases:
            point()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] in _BACKWARDS:
            point()
        return trace

    before = sys.gettrace(), sys.getprofile()
    with contextlib.suppress(error):
        sys.settrace(trace)
        sys.setprofile(profile)
        try:
            action()
        finally:
            sys.setprofile(before[1])
            sys.settrace(before[0])
    return number


class Functional:
    """Arrays that a function updates."""

    def __init__(self, call):
        self.running = V[0].copy(), V[1].copy()
        self._call = call

    def run(self):
        self._call(*self.running)

    def state(self):
        return tuple(array.tobytes() for array in self.running)


class Layered:
    """A layer, some batches old, with gradients of the last."""

    def __init__(self, call, **options):
        self.layer = nbbn.BatchNorm(3, **options)
        self.layer(X)
        self.layer.backward(X)
        self._call = call

    def run(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nbbn.NonFiniteWarning)
            self._call(self.layer)

    def state(self):
        held = {name: value.tobytes() for name, value in self.layer.state_dict().items()}
        gradients = self.layer.grad_weight, self.layer.grad_bias
        return held, tuple(None if g is None else g.tobytes() for g in gradients)


def failing(error, call):
    """A call that fails by itself."""

    def run(bn):
        with contextlib.suppress(error):
            call(bn)

    return run


LOADED = {name: np.full(3, 5.0) for name in ("weight", "bias", "running_mean", "running_var")}
OUT = np.empty((6, 3, 8), np.float32)[..., ::2]
UPDATES = {
    "batch_norm, the short way": lambda: Functional(lambda m, v: nbbn.batch_norm(X, m, v, training=True)),
    "batch_norm": lambda: Functional(lambda m, v: nbbn.batch_norm(X, m, v, training=True, axis=LONG, out=OUT)),
    "batch_norm, where": lambda: Functional(lambda m, v: nbbn.batch_norm(X, m, v, training=True, where=X > -1)),
    "batch_norm, raise": lambda: Functional(lambda m, v: nbbn.batch_norm(X, m, v, training=True, nonfinite="raise")),
    "ema_update": lambda: Functional(lambda m, v: nbbn.ema_update(m, v, nbbn.batch_stats(X))),
    "training": lambda: Layered(lambda bn: bn(X)),
    "training, cumulative": lambda: Layered(lambda bn: bn(X), momentum=None),
    "training, skip": lambda: Layered(lambda bn: bn(POISONED), nonfinite="skip"),
    "training, float64": lambda: Layered(lambda bn: bn(X), dtype=np.float64),
    "backward": lambda: Layered(lambda bn: bn.backward(2 * X)),
    "recalibrate": lambda: Layered(lambda bn: bn.recalibrate([X, X[:2]])),
    "load_state_dict": lambda: Layered(lambda bn: bn.load_state_dict(LOADED | {"num_batches_tracked": np.array(9)})),
}
UNCHANGED = {
    "evaluation": lambda: Layered(lambda bn: bn.eval()(X)),
    "state_dict": lambda: Layered(lambda bn: bn.state_dict()),
    "failed training": lambda: Layered(failing(FloatingPointError, lambda bn: bn(POISONED)), nonfinite="raise"),
    "failed recalibration": lambda: Layered(failing(ValueError, lambda bn: bn.recalibrate([X, X[:, :2]]))),
    "failed load": lambda: Layered(failing(ValueError, lambda bn: bn.load_state_dict({"weight": V[0]}))),
}


def check_every_point(make, error, changes):
    old, done = make(), make()
    done.run()
    expected = [old.state(), done.state()] if changes else [old.state()]
    assert (old.state() != done.state()) == changes
    interrupted(make().run, error, -1)  # from Python 3.12 on, loops are seen only from the second time on
    total = interrupted(make().run, error, -1)
    assert total > 20
    seen = set()
    for at in range(1, total + 1):
        case = make()
        interrupted(case.run, error, at)
        assert case.state() in expected, f"half-written by an exception at point {at} of {total}"
        seen.add(expected.index(case.state()))
        assert not forks.state._is_owned(), f"locked for ever by an exception at point {at}"
    case = make()
    case.run()
    assert case.state() == done.state(), "and everything still works"
    assert seen == ({0, 1} if changes else {0}), "both sides of the moment of writing"
    return total


# a generator that is thrown away where a fault strikes can only report it
ignores_generators = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ignores_generators
@pytest.mark.parametrize("name", UPDATES)
def test_an_interrupt_at_every_point_changes_all_or_nothing(name):
    print(check_every_point(UPDATES[name], KeyboardInterrupt, changes=True), "faults")


@pytest.mark.parametrize("name", ["ema_update", "training"])
def test_an_interrupt_of_the_reference_changes_all_or_nothing(name):
    with nbbn.use_backend("numpy"):
        print(check_every_point(UPDATES[name], KeyboardInterrupt, changes=True), "faults")


@ignores_generators
@pytest.mark.parametrize("name", UNCHANGED)
def test_an_interrupt_at_every_point_changes_nothing(name):
    print(check_every_point(UNCHANGED[name], KeyboardInterrupt, changes=False), "faults")


@ignores_generators
@pytest.mark.parametrize("name", ["batch_norm", "training", "load_state_dict"])
def test_no_memory_at_every_point_changes_all_or_nothing(name):
    print(check_every_point(UPDATES[name], MemoryError, changes=True), "faults")


# --- Ctrl-C at any time -----------------------------------------------------------------------------------------------


def test_real_interrupts_at_random_times():
    """In kernels on several threads, too: nothing is lost between two batches.

    In a process of its own: an interrupt in the middle of Numba's `_launch_threads` leaves a lock of Numba's held, for
    which threads that come later would wait for ever.
    """
    code = "import test_atomicity; test_atomicity.interrupt_at_random_times()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "after the update" in done.stdout


def interrupt_at_random_times():
    x = RNG.standard_normal((2000, 3, 64)).astype(np.float32)
    clean = [nbbn.BatchNorm(3) for _ in range(2)]
    clean[1](x)
    expected = [{k: v.tobytes() for k, v in bn.state_dict().items()} for bn in clean]
    chance, seen = random.Random(1), [0, 0]

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(150):
            bn = nbbn.BatchNorm(3)
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 8e-4))
                bn(x)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            state = {k: v.tobytes() for k, v in bn.state_dict().items()}
            seen[expected.index(state)] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sum(seen) == 150
    print(f"{seen[0]} before, {seen[1]} after the update")


# --- no memory, and arguments that raise ------------------------------------------------------------------------------


def test_results_that_do_not_fit_in_memory(backend):
    """A batch that takes no memory itself: one number repeated. Its result would need 800 petabytes."""
    x = np.broadcast_to(np.float32(1), (2**56, 3))
    mean, var = V[0].copy(), V[1].copy()
    bn = nbbn.BatchNorm(3)
    bn(X)
    before = bn.state_dict()
    for call in (
        lambda: nbbn.batch_norm(x, mean, var, training=True),
        lambda: nbbn.batch_norm(x, mean, var),
        lambda: nbbn.normalize(x, mean, var),
        lambda: nbbn.batch_norm_backward(x, x, mean, var),
        lambda: bn(x),
        lambda: bn.eval()(x),
    ):
        with pytest.raises(MemoryError):
            call()
    assert (mean == V[0]).all()
    assert (var == V[1]).all()
    assert all((value == before[name]).all() for name, value in bn.state_dict().items())
    with pytest.raises(RuntimeError, match="a forward call before that did not raise"):
        bn.backward(X)


class Broken(BaseException):
    """Not even an `Exception`."""


def raising(number, error):
    for _ in range(number):
        yield X
    raise error


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, StopAsyncIteration, Broken, GeneratorExit])
def test_iterables_that_raise(number, error):
    case = Layered(lambda bn: bn.recalibrate(raising(number, error)))
    before = case.state()
    with pytest.raises(error):
        case.run()
    assert case.state() == before


class BrokenMapping(dict):
    def __init__(self, values, at):
        super().__init__(values)
        self._at = at

    def items(self):
        for number, item in enumerate(super().items()):
            if number == self._at:
                raise Broken
            yield item


@pytest.mark.parametrize("at", range(4))
def test_mappings_that_raise(at):
    case = Layered(lambda bn: bn.load_state_dict(BrokenMapping(LOADED, at)))
    before = case.state()
    with pytest.raises(Broken):
        case.run()
    assert case.state() == before


def test_warnings_as_errors_come_after_everything_is_written():
    bn, same = nbbn.BatchNorm(3, nonfinite="skip"), nbbn.BatchNorm(3, nonfinite="skip")
    with pytest.warns(nbbn.NonFiniteWarning):
        same(POISONED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(nbbn.NonFiniteWarning):
            bn(POISONED)
    assert all((value == bn.state_dict()[name]).all() for name, value in same.state_dict().items())
    assert bn.num_batches_tracked == 1
