"""The benchmarks' own parts: results are checked before timing, and what is timed is what it says."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # scripts beside each other, as `python bench/compare.py` sees them; not in the wheel

import ceilings  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import operations  # noqa: E402
import startup  # noqa: E402
import timing  # noqa: E402
from cases import CASES, Case  # noqa: E402
from inputs import Inputs  # noqa: E402
from peers import PEERS, Peer  # noqa: E402
from timing import Effort  # noqa: E402

#: Both layouts, several blocks and one, dense: (N, C), and a single image.
TINY = [Case((4, 3, 5, 7)), Case((4, 5, 7, 3), axis=-1), Case((9, 4)), Case((1, 3, 40, 50))]
OTHER_DTYPES = [
    Case((4, 8, 5, 7), dtype="float16"),
    Case((4, 5, 7, 8), -1, "bfloat16"),
    Case((4, 8, 5, 7), dtype="uint8"),
]

OPERATIONS = {operation.name: operation for operation in operations.OPERATIONS}


@pytest.fixture(params=TINY, ids=lambda case: case.id)
def given(request):
    return Inputs(request.param)


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS)
def operation(request):
    return request.param


@pytest.fixture
def ours():
    """Fewer peers: what every installation has."""
    return {name: PEERS[name] for name in ("nbbn", "nbbn-new", "numpy")}


# --- cases and inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *TINY, *OTHER_DTYPES], ids=lambda case: case.id)
def test_a_case_is_read_back_from_its_name(case):
    assert Case.parse(case.id) == case


@pytest.mark.parametrize("text", ["", "5", "4x0", "4x-1", "4xx5", "4x5-first", "4x5-last-last", "4x5-int8"])
def test_a_malformed_case_is_refused(text):
    with pytest.raises(ValueError, match=r"case: expected|invalid literal"):
        Case.parse(text)


def test_sizes_go_from_kilobytes_to_200_megabytes():
    sizes = [4 * np.prod(case.dims) for case in CASES if case.dtype == "float32"]
    assert min(sizes) < 20e3
    assert max(sizes) > 200e6
    assert len(set(CASES)) == len(CASES)


def test_inputs_are_the_same_for_everyone_and_every_time(given):
    again = Inputs(given.case)
    for name in ("x", "grad_out", "weight", "bias", "running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(given, name), getattr(again, name))
        assert getattr(given, name).dtype == np.float32
    assert given.x.shape == given.case.dims
    assert given.count * given.channels == given.x.size


@pytest.mark.parametrize("case", OTHER_DTYPES, ids=lambda case: case.id)
def test_bytes_are_those_of_input_and_result(case):
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    given = Inputs(case)
    assert given.x.dtype.name == case.dtype
    assert given.running_mean.dtype == given.running_var.dtype == np.float32
    values, itemsize = given.x.size, given.dtype.itemsize
    result = 4 if case.dtype == "uint8" else 2
    assert OPERATIONS["statistics"].least_bytes(given) == values * itemsize
    assert OPERATIONS["evaluation"].least_bytes(given) == values * (itemsize + result)
    assert OPERATIONS["evaluation"].takes(case)
    assert not OPERATIONS["backward"].takes(case)


def test_one_value_per_channel_is_nothing_to_train_on():
    takes = {name for name, operation in OPERATIONS.items() if operation.takes(Case((1, 1)))}
    assert takes == {"statistics", "evaluation"}


# --- peers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [*TINY, Case((4, 16, 6, 6)), *OTHER_DTYPES], ids=lambda case: case.id)
def test_every_installed_peer_agrees_and_writes_to_no_input(operation, case, peer):
    if not PEERS[peer].installed:
        pytest.skip(f"{PEERS[peer].module} is not installed")
    if not operation.takes(case):
        pytest.skip("not an operation for that dtype")
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    given, before = Inputs(case), Inputs(case)
    table = {"nbbn": PEERS["nbbn"], peer: PEERS[peer]}
    with warnings.catch_warnings(), operations.settings(table):
        warnings.simplefilter("ignore")  # of libraries that are not ours
        try:
            calls = operations.prepare(operation, given, table)
        except operations.UnsupportedError as error:
            pytest.skip(str(error))
        for call in calls.values():
            call()
    for name, array in vars(given).items():
        if isinstance(array, np.ndarray):
            np.testing.assert_array_equal(array, getattr(before, name), err_msg=name)


def test_nbbn_and_numpy_have_every_operation_and_agree(operation, given, ours):
    assert set(operations.prepare(operation, given, ours)) >= {"nbbn", "numpy"}


#: Mistakes that textbooks warn of, and the result that must give each away.
MISTAKES = {
    "statistics": ("var", lambda mean, var: (mean, var * 36 / 35)),
    "training": ("running_mean", lambda y, mean, var: (y, mean + 1e-3, var)),
    "evaluation": ("y", lambda y: (y * (1 + 1e-5),)),
    "backward": ("grad_x", lambda grad_x, weight, bias: (np.where(grad_x > 1, np.nan, grad_x), weight, bias)),
}


def test_a_wrong_peer_is_found_before_it_is_timed(operation, ours):
    result, spoil = MISTAKES[operation.name]
    right = PEERS["numpy"].calls[operation.name]
    wrong = replace(PEERS["numpy"], calls={operation.name: lambda given: lambda: spoil(*right(given)())})
    with pytest.raises(AssertionError, match=rf"{operation.name} .*: {result} of numpy differs"):
        operations.prepare(operation, Inputs(Case((4, 3, 3, 3))), ours | {"numpy": wrong})


@pytest.mark.parametrize(("dtype", "eps"), [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_half_precision_may_differ_by_its_own_rounding_and_no_more(dtype, eps):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    given = Inputs(Case((4, 3, 5, 7), dtype=dtype))
    evaluation = OPERATIONS["evaluation"]
    right = np.linspace(-1, 1, given.x.size).astype(given.dtype)

    def peer(answer):
        return Peer(dtype, "numpy", "numpy", {"evaluation": lambda given: lambda: (answer,)})

    close = (right.astype(np.float32) * (1 + eps / 2)).astype(given.dtype)
    operations.prepare(evaluation, given, {"nbbn": peer(right), "other": peer(close)})
    far = (right.astype(np.float32) * (1 + 3 * eps)).astype(given.dtype)
    with pytest.raises(AssertionError, match="y of other differs"):
        operations.prepare(evaluation, given, {"nbbn": peer(right), "other": peer(far)})


def test_what_nbbn_does_not_support_is_told_from_a_mistake(operation, given, ours):
    def refuse():
        raise TypeError("x: not yet")

    without = replace(PEERS["nbbn"], calls=dict.fromkeys(OPERATIONS, lambda given: refuse))
    with pytest.raises(operations.UnsupportedError, match="not yet"):
        operations.prepare(operation, given, ours | {"nbbn": without})


def test_a_peer_that_is_absent_or_does_not_serve_the_case_is_left_out(operation, given, ours):
    absent = Peer("Absent", "no_such_library_for_nbbn", "none", dict.fromkeys(OPERATIONS, pytest.fail))
    unwilling = Peer("Unwilling", "json", "none", dict.fromkeys(OPERATIONS, lambda given: None))
    more = {"absent": absent, "partial": replace(unwilling, calls={}), "unwilling": unwilling}
    assert set(operations.build(operation, given, ours | more)) == set(operations.build(operation, given, ours))


def test_who_allocates_is_compared_with_who_allocates():
    def rival(name, samples):
        return timing.rival(PEERS, samples, name)

    samples = dict.fromkeys([*PEERS, "stream"])
    assert {rival(name, samples) for name in ("torch-new", "onednn", "jax")} == {"nbbn-new"}
    assert {rival(name, samples) for name in ("torch", "numpy", "onnxruntime", "stream", "nbbn-new")} == {"nbbn"}
    assert rival("jax", {"nbbn": 0, "jax": 0}) == "nbbn", "statistics leave nothing to allocate"


# --- timing and ceilings ----------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    nbbn, peer = np.array([1.0, 2.0, 10.0]), np.array([2.0, 8.0, 30.0])  # medians 2 and 8
    assert timing.ratios({"nbbn": nbbn, "peer": peer}, {"peer": "nbbn"})["peer"]["median"] == 3


def test_a_slow_case_gets_fewer_rounds_for_everyone(operation, ours):
    entry = timing.measure(operation, Inputs(Case((9, 4))), Effort(rounds=9, seconds=0.0, least=2), ours)
    assert entry["rounds"] == 2
    limits = {"read"} if operation.name == "statistics" else {"stream", "copy"}
    assert entry["ceiling"] in limits
    assert set(entry["ratios"]) >= {"numpy"} | limits
    assert set(entry["seconds"]) == {"nbbn", *entry["ratios"]}
    for values in [*entry["seconds"].values(), *entry["ratios"].values()]:
        assert 0 < values["lower"] <= values["median"] <= values["upper"]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 150_001])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_ceilings_touch_every_byte(monkeypatch, size, dtype):
    monkeypatch.setattr("nbbn.get_num_threads", lambda: 1)  # the same source as for more, compiled faster
    x = np.random.default_rng(0).integers(1, 100, size).astype(dtype)
    if dtype == np.float32:
        assert ceilings.read(x)() == x[: size // 2 * 2].view(np.int64).sum()
    for kernel in (ceilings.copy, ceilings.stream):
        out = ceilings._aligned(size, np.dtype(np.float32))
        kernel([x], out)()
        np.testing.assert_array_equal(out, x)
        if dtype == np.float32:
            kernel([x, 2 * x], out)()
            np.testing.assert_array_equal(out, 3 * x)


def test_non_temporal_stores_need_an_aligned_result():
    room = ceilings._aligned(32, np.dtype(np.float32))
    with pytest.raises(ValueError, match="multiple of 64"):
        ceilings.stream([room[1:17]], room[1:17])


def test_the_suite_for_pytest_benchmark_runs():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", str(BENCH), "-k", "evaluation-64x64-numpy"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout


# --- the other parts --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="the system does not tell the peak of memory")
def test_extra_memory_is_what_a_call_needs_at_its_peak():
    assert memory.peak_extra(lambda: None) < 1e6
    # the system counts resident pages of each thread in batches
    assert 18e6 < memory.peak_extra(lambda: np.ones(20_000_000, np.uint8).sum()) < 25e6


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="the system does not tell the peak of memory")
def test_memory_is_measured_in_a_process_of_its_own():
    (entry, *rest) = memory.measure((Case((4, 8, 28, 28)),))
    assert entry["peak_extra_bytes"] >= 0
    assert [e["operation"] for e in rest] == ["training", "evaluation", "backward"]


def test_first_calls_are_measured_uncompiled_and_compiled(monkeypatch):
    monkeypatch.setattr(startup, "CALLS", {"ema_update": startup.CALLS["ema_update"]})
    (entry,) = startup.first_calls(["float32", "float16"], (9, 4))
    assert (entry["function"], entry["dtype"]) == ("ema_update", "float32")
    assert entry["uncached"] > 0
    assert entry["cached"] > 0


def test_compiled_kernels_are_counted(monkeypatch):
    monkeypatch.setattr(startup, "_WARM_UP", "import nbbn, numpy as np; m = nbbn.Moments.zeros(3); m + m")
    counted = startup.kernels(["float32"])
    assert counted["number"] == 1
    assert counted["bytes"] > 1000


def test_import_times_are_ratios_within_a_round():
    measured = startup.imports(rounds=1)
    ratio = measured["seconds"]["nbbn"]["median"] / measured["seconds"]["numba, numpy"]["median"]
    assert measured["ratio"]["median"] == pytest.approx(ratio, rel=1e-2)


def test_a_measured_process_that_fails_is_not_taken_for_a_figure():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        startup._python("1 / 0", {})


def test_the_name_of_a_machine_is_a_file_name():
    about = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4, "threads": 2}
    assert machine.slug(about) == "intel-r-xeon-r-cpu-2-20ghz-4-cores-2-threads"


def test_the_largest_cache_counts(tmp_path):
    for number, size in enumerate(("32K", "512K", "32M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache(tmp_path) == 32 * 2**20
    assert machine.last_level_cache(tmp_path / "absent") > 0
