"""Situations in which threads and processes meet, and what becomes of them: nbbn, or a plain Numba kernel.

`python tests/situations.py` runs them all, each in a process of its own, and writes what became of them to
`situations.json` and the table in the README. For all of it, TBB must be installed (`pip install tbb`).
`python tests/situations.py LAYER SUBJECT NAME...` runs some in this one, and prints a line for each that ended well.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np

LAYERS = ("omp", "tbb", "workqueue")
PATIENCE = 300  # seconds, after which something hangs; whoever measures on this machine may stop us for a minute

RESULTS_FILE = Path(__file__).with_name("situations.json")
README = Path(__file__).parents[1] / "README.md"

X = np.arange(600_000, dtype=np.float32).reshape(-1, 2) % 7  # enough for two threads

# --- what is called ---------------------------------------------------------------------------------------------------


def numba_results():
    """A parallel kernel as one writes it with Numba alone."""
    return (float(_plain_kernel()(X)),)


@cache
def _plain_kernel():
    from numba import njit, prange

    @njit(parallel=True, nogil=True)
    def total(x):
        result = 0.0
        for i in prange(x.shape[0]):
            result += x[i, 0]
        return result

    return total


def nbbn_results():
    """Something of every kernel, as bytes: the same bits every time."""
    import nbbn

    running = np.zeros(2, np.float32), np.ones(2, np.float32)
    m = nbbn.batch_stats(X)
    y = nbbn.batch_norm(X, *running, training=True, residual=X)
    z = nbbn.normalize(X, *running)
    dx, dw, db = nbbn.batch_norm_backward(X, y, m.mean, m.var())
    rows = nbbn.batch_norm(X.reshape(2, 2, -1), training=True)
    total = m + nbbn.batch_stats(X[:9])
    return tuple(a.tobytes() for a in (m.mean, m.m2, y, z, dx, dw, db, rows, total.mean, *running))


RESULTS = {"nbbn": nbbn_results, "numba": numba_results}
results = nbbn_results


def all_right(expected, times=1):
    return all(results() == expected for _ in range(times))


def in_threads(number, function):
    """Whether `function`, called at once by so many threads, says True in each; what it raises is raised."""
    answers, errors, barrier = [], [], threading.Barrier(number)

    def work():
        barrier.wait()
        try:
            answers.append(function())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers == [True] * number


def in_fork(function):
    """Whether `function` says True in a forked child, which has half of our patience."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(PATIENCE // 2)
            code = 0 if function() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildProcessError(f"child killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if os.WEXITSTATUS(status) != 0:
        raise ChildProcessError(f"child ended with {os.WEXITSTATUS(status)}")
    return True


def in_pool(method, expected):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map_async(_in_pool, [(RESULTS_NAME, expected)] * 4).get(PATIENCE)


def _in_pool(arguments):
    name, expected = arguments
    return RESULTS[name]() == expected


RESULTS_NAME = "nbbn"


class Busy:
    """Other threads that do something, over and over."""

    def __init__(self, number, function):
        self._stop, self.wrong = threading.Event(), []

        def work():
            while not self._stop.is_set():
                if not function():
                    self.wrong.append(function)

        self._threads = [threading.Thread(target=work) for _ in range(number)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()


# --- situations: each says whether all was well ----------------------------------------------------------------------


def many_threads():
    """8 threads call everything at once, the first time too"""
    answers = []
    return (
        in_threads(8, lambda: answers.append(results()) or True)
        and all_of([a == answers[0] for a in answers])
        and (in_threads(8, lambda: all_right(answers[0], 5)))
    )


def all_of(values):
    return list(values) == [True] * len(list(values))


def threads_that_choose():
    """threads call while others change the number of threads"""
    expected = results()
    if results is numba_results:
        import numba

        choose = numba.set_num_threads
    else:
        import nbbn

        choose = nbbn.set_num_threads
    numbers = itertools.cycle((1, 2))
    with Busy(2, lambda: choose(next(numbers)) or time.sleep(1e-4) or True):
        right = in_threads(4, lambda: all_right(expected, 10))
    choose(2)
    return right


def one_layer():
    """8 threads train one layer, two read it"""
    import nbbn

    bn, x = nbbn.BatchNorm(2, momentum=None), X[:500]
    linked = nbbn.BatchNorm(2, momentum=1.0)
    scales = [np.float32(2.0**k) for k in range(8)]
    of_one = nbbn.batch_stats(x)

    def train():
        for scale in scales * 5:
            bn(x * scale)
            linked(x * scale)
        return True

    def read():
        """Mean and variance are always of the same batch."""
        state = linked.state_dict()
        if not state["num_batches_tracked"]:
            return True
        scale = state["running_mean"] / of_one.mean
        return bool(np.allclose(state["running_var"], of_one.var(1) * scale**2, rtol=1e-5))

    busy = Busy(2, read)
    with busy:
        right = in_threads(8, train)
    mean = np.mean([scale * of_one.mean for scale in scales], axis=0)  # of all batches, in any order
    return (
        right
        and not busy.wrong
        and bn.num_batches_tracked == 320
        and bool(np.allclose(bn.running_mean, mean, rtol=1e-4))
    )


def fork_pool():
    """multiprocessing, fork, after a first call"""
    return all_of(in_pool("fork", results()))


def forkserver_pool():
    """multiprocessing, forkserver"""
    return all_of(in_pool("forkserver", results()))


def spawn_pool():
    """multiprocessing, spawn"""
    return all_of(in_pool("spawn", results()))


def fork_before():
    """os.fork before a first call"""
    return in_fork(lambda: bool(results())) and all_right(results())


def fork_in_thread():
    """os.fork in a thread, after a first call"""
    expected = results()
    return in_threads(1, lambda: in_fork(lambda: all_right(expected, 3))) and all_right(expected)


def fork_twice():
    """os.fork in the child of a fork"""
    expected = results()
    return in_fork(lambda: all_right(expected) and in_fork(lambda: all_right(expected)))


def fork_while_busy():
    """os.fork while other threads compute, 20 times; threads in the child"""
    expected = results()
    with Busy(2, lambda: all_right(expected)):
        return all_of([in_fork(lambda: in_threads(2, lambda: all_right(expected))) for _ in range(20)])


def fork_while_compiling():
    """os.fork while another thread compiles"""
    expected = results()
    if results is numba_results:
        from numba import njit

        def compile_one():
            return njit(lambda a, b: np.sort(a) + b)(X[0], 1) is not None
    else:
        from nbbn.cpu import channels, jit

        def compile_one():
            fresh = jit.Kernel(channels.merge._compiled.py_func, (), parallel=False)
            a = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
            fresh._compiled._cache.load_overload = lambda *a: None
            fresh._compiled._cache.save_overload = lambda *a: None
            return fresh(*a, *a, *a) is None

    with Busy(1, compile_one):
        right = []
        for _ in range(8):
            time.sleep(0.05)
            right.append(in_fork(lambda: all_right(expected) and compile_one()))
        return all_of(right)


def fork_while_asking():
    """os.fork while other threads ask for the number of threads, 100 times; the child asks too"""
    expected = results()
    if results is numba_results:
        from numba import get_num_threads
    else:
        from nbbn import get_num_threads
    with Busy(2, lambda: get_num_threads() > 0):
        right = all_of([in_fork(lambda: get_num_threads() > 0) for _ in range(100)])
    return right and all_right(expected)


def fork_while_training():
    """os.fork while other threads train a layer, 20 times; the child trains it on"""
    import nbbn

    # so many channels that most of the time is spent on running statistics: forks without a lock do cut them in two
    x = np.stack([np.linspace(1, 2, 40_000, dtype=np.float32)] * 2) * np.float32([[1], [3]])
    bn = nbbn.BatchNorm(x.shape[1], momentum=1.0)
    of_one, scales = nbbn.batch_stats(x), itertools.cycle([np.float32(2.0**k) for k in range(8)])
    bn(x)

    def train():
        bn(x * next(scales))
        return True

    def whole():
        scale = bn.running_mean / of_one.mean
        same = np.ptp(scale) <= 1e-5 * scale[0] and np.allclose(bn.running_var, of_one.var(1) * scale**2, rtol=1e-5)
        before = bn.num_batches_tracked
        bn(x)
        return bool(same) and bn.num_batches_tracked == before + 1

    with Busy(3, train):
        return all_of([in_fork(whole) for _ in range(20)])


def exit_while_busy():
    """the process ends while daemon threads compute"""
    expected = results()
    for _ in range(3):
        threading.Thread(target=lambda: all_right(expected, 10**6), daemon=True).start()
    time.sleep(0.3)
    return True


IN_THREADS = {f.__name__: f for f in (many_threads, threads_that_choose, one_layer)}
IN_FORKS = {
    f.__name__: f
    for f in (fork_before, fork_pool, fork_in_thread, fork_twice, fork_while_busy, fork_while_asking,
              fork_while_compiling, fork_while_training)
}  # fmt: skip
IN_OTHERS = {f.__name__: f for f in (forkserver_pool, spawn_pool, exit_while_busy)}
SITUATIONS = IN_THREADS | IN_FORKS | IN_OTHERS
OF_LAYERS = {"one_layer", "fork_while_training"}  # BatchNorm's, not Numba's

# --- running them ---------------------------------------------------------------------------------------------------


def outcome(layer, subject, *names, timeout=PATIENCE, **environment):
    """What became of these situations in a new process: "correct", or the first thing that went wrong."""
    command = [sys.executable, __file__, layer, subject, *names]
    options = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2", **environment}
    if layer == "tbb":  # where pip installs it, Numba does not find it inside a virtual environment
        found = [str(Path(sys.prefix, "lib")), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        options["LD_LIBRARY_PATH"] = os.pathsep.join(found)
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        # a group of its own: what hangs is ended with all its children; files, not pipes, which orphans keep open
        process = subprocess.Popen(
            command, stdout=printed, stderr=errors, env=os.environ | options, start_new_session=True
        )
        late = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        printed.seek(0)
        errors.seek(0)
        out, err = printed.read(), errors.read()
    if late:
        return "hangs" if len(names) == 1 else f"hangs in {next(name for name in names if name not in out.split())}"
    if "No threading layer could be loaded" in err:
        return "not installed"
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    if process.returncode or [word for word in out.split() if word in names] != list(names):
        return (err.strip().splitlines() or [f"ended with {process.returncode}"])[-1].removeprefix(
            "ChildProcessError: "
        )
    return "correct"


def run(layer, subject, names):
    global results, RESULTS_NAME
    results, RESULTS_NAME = RESULTS[subject], subject
    for name in names:
        if not SITUATIONS[name]():
            sys.exit(f"{name}: wrong result")
        print(name, flush=True)
    import numba

    # without a call in this process that is large enough there is none
    used = layer if set(names) <= {*OF_LAYERS, "fork_before"} else numba.threading_layer()
    if used != layer:
        sys.exit(f"ran under {used}, not {layer}")


def all_outcomes():
    """Of every situation under every layer, of nbbn and of Numba alone, with what it was run on."""
    import numba

    outcomes = {}
    for name in SITUATIONS:
        outcomes[name] = {}
        for layer in LAYERS:
            outcomes[name][layer] = {"nbbn": outcome(layer, "nbbn", name)}
            if name not in OF_LAYERS:
                outcomes[name][layer]["numba"] = outcome(layer, "numba", name, timeout=100)
        print(name, json.dumps(outcomes[name]), flush=True)
    versions = {"python": platform.python_version(), "numba": numba.__version__, "numpy": np.__version__}
    return {"date": time.strftime("%Y-%m-%d"), "system": platform.system(), **versions, "outcomes": outcomes}


def table(results):
    """The README's table."""
    versions = f"Python {results['python']}, Numba {results['numba']}, NumPy {results['numpy']}, {results['system']}"
    lines = [f"Run {results['date']} by `python tests/situations.py`: {versions}, 2 threads.", ""]
    lines.append(f"| situation | {' | '.join(f'{layer} | {layer}, Numba alone' for layer in LAYERS)} |")
    lines.append("|---" * (1 + 2 * len(LAYERS)) + "|")
    for name, of_layers in results["outcomes"].items():
        cells = [of_layers[layer].get(subject, "") for layer in LAYERS for subject in RESULTS]
        cells = [cell if cell in ("correct", "") else f"**{cell}**" for cell in cells]
        lines.append(f"| {SITUATIONS[name].__doc__} | {' | '.join(cells)} |")
    return "\n".join(lines)


MARKS = "<!-- situations:begin -->\n", "\n<!-- situations:end -->"


def in_readme(text):
    """Where the table is: before, itself, after."""
    before, _, rest = text.partition(MARKS[0])
    block, _, after = rest.partition(MARKS[1])
    return before + MARKS[0], block, MARKS[1] + after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        found = all_outcomes()
        RESULTS_FILE.write_text(json.dumps(found, indent=1) + "\n")
        before, _, after = in_readme(README.read_text())
        README.write_text(before + table(found) + after)
