"""The benchmarks' own parts: results are checked before timing, and what is published is what was measured."""

import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # scripts beside each other, as `python bench/compare.py` sees them; not in the wheel

import ceilings  # noqa: E402
import compare  # noqa: E402
import operations  # noqa: E402
import publish  # noqa: E402
import report  # noqa: E402
from inputs import SHAPES, Inputs, Shape  # noqa: E402

#: Both layouts, several blocks and one, and dense: (N, C).
TINY = [Shape((4, 3, 5, 7)), Shape((4, 5, 7, 3), axis=-1), Shape((9, 4)), Shape((1, 3, 40, 50))]

OPERATIONS = {operation.name: operation for operation in operations.OPERATIONS}


@pytest.fixture(params=TINY, ids=lambda shape: shape.id)
def given(request):
    return Inputs(request.param)


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS)
def operation(request):
    return request.param


# --- the table --------------------------------------------------------------------------------------------------


def test_nbbn_and_numpy_have_every_operation_and_agree(operation, given):
    assert set(operations.prepare(operation, given)) >= {"nbbn", "numpy"}


#: Mistakes that textbooks warn of, and the result that must give each away.
MISTAKES = {
    "statistics": ("var", lambda mean, var: (mean, var * 36 / 35)),
    "training": ("running_mean", lambda y, mean, var: (y, mean + 1e-3, var)),
    "evaluation": ("y", lambda y: (y * (1 + 1e-5),)),
    "backward": ("grad_x", lambda grad_x, weight, bias: (np.where(grad_x > 1, np.nan, grad_x), weight, bias)),
}


def test_a_wrong_peer_is_found_before_it_is_timed(operation):
    result, spoil = MISTAKES[operation.name]
    right = operations.PEERS["numpy"].calls[operation.name]
    wrong = replace(
        operations.PEERS["numpy"], calls={operation.name: lambda given: lambda: spoil(*right(given)())}
    )  # fmt: skip
    with pytest.raises(AssertionError, match=rf"{operation.name} .*: {result} of numpy differs"):
        operations.prepare(operation, Inputs(Shape((4, 3, 3, 3))), operations.PEERS | {"numpy": wrong})


def test_a_peer_that_is_not_installed_or_lacks_the_operation_is_left_out(operation):
    absent = operations.Peer("Absent", {name: pytest.fail for name in OPERATIONS})
    table = operations.PEERS | {"no_such_library_for_nbbn": absent, "json": operations.Peer("Partial", {})}
    assert operations.peers_of(operation, table) == operations.peers_of(operation)


def test_inputs_are_the_same_for_everyone_and_every_time(given):
    again = Inputs(given.shape)
    for name in ("x", "grad_out", "weight", "bias", "running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(given, name), getattr(again, name))
        assert getattr(given, name).dtype == np.float32
    assert given.x.shape == given.shape.dims
    assert given.count * given.channels == given.x.size


def test_no_call_writes_to_the_inputs(operation, given):
    before = Inputs(given.shape)
    for call in operations.prepare(operation, given).values():
        call()
    for name, array in vars(given).items():
        if isinstance(array, np.ndarray):
            np.testing.assert_array_equal(array, getattr(before, name), err_msg=name)


@pytest.mark.parametrize("shape", SHAPES + tuple(TINY), ids=lambda shape: shape.id)
def test_a_shape_is_read_back_from_its_name(shape):
    assert Shape.parse(shape.id) == shape


@pytest.mark.parametrize("text", ["", "5", "4x0", "4x-1", "4xx5", "4x5-first", "4x5-last-last"])
def test_a_malformed_shape_is_refused(text):
    with pytest.raises(ValueError, match=r"shape|invalid literal"):
        Shape.parse(text)


def test_ceilings_touch_every_byte(monkeypatch):
    monkeypatch.setattr("nbbn.get_num_threads", lambda: 1)  # the same source as for more, compiled faster
    given = Inputs(Shape((3, 1, 50_000)))  # more than one chunk, and a remainder
    np.testing.assert_allclose(ceilings.read(given.x.ravel()), given.x.sum(), rtol=1e-4)
    out = np.empty_like(given.x.ravel())
    ceilings.stream([given.x.ravel()], out)
    np.testing.assert_array_equal(out, given.x.ravel())
    ceilings.stream([given.x.ravel(), given.grad_out.ravel()], out)
    np.testing.assert_array_equal(out, (given.x + given.grad_out).ravel())


# --- from measuring to the README -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return compare.compare([Shape((4, 3, 5, 7)), Shape((4, 5, 7, 3), axis=-1)], rounds=2, command="a test")


@pytest.fixture(scope="module")
def published_once(measured, tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("published")
    results, readme = folder / "results" / "machine.json", folder / "README.md"
    report.save(measured, results)
    readme.write_text(f"# Title\n\n{publish.BEGIN}\n{publish.END}\n\nThe rest.\n")
    publish.main([str(results), "--readme", str(readme)])
    return folder


@pytest.fixture
def published(published_once, tmp_path):
    """The results and a README with its section, in a folder of their own; the plot lies beside the results."""
    shutil.copytree(published_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "results" / "machine.json", tmp_path / "README.md"


def check(results, readme):
    publish.main([str(results), "--readme", str(readme), "--check"])


def test_every_operation_and_shape_is_measured_against_every_peer_and_its_ceiling(measured):
    assert len(measured["results"]) == 2 * len(OPERATIONS)
    for entry in measured["results"]:
        assert entry["ceiling"] == ("read" if entry["operation"] == "statistics" else "stream")
        assert set(entry["ratios"]) == {"numpy", entry["ceiling"]}
        assert set(entry["seconds"]) == {"nbbn", *entry["ratios"]}
        for values in [*entry["seconds"].values(), *entry["ratios"].values()]:
            assert 0 < values["lower"] <= values["median"] <= values["upper"]


def test_the_long_table_shows_every_measurement(measured):
    assert len(compare.markdown(measured).splitlines()) == 2 + len(measured["results"])


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    nbbn, peer = np.array([1.0, 2.0, 10.0]), np.array([2.0, 8.0, 30.0])  # medians 2 and 8
    assert compare.ratios({"nbbn": nbbn, "peer": peer})["peer"]["median"] == 3


def test_publish_writes_the_section_and_leaves_the_rest_alone(published):
    results, readme = published
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{publish.BEGIN}\n")
    assert text.endswith(f"\n{publish.END}\n\nThe rest.\n")
    assert "(results/machine.png)" in text
    assert "`a test`" in text
    assert all(word in text for word in ("NumPy", "(4, 5, 7, 3) channels-last", *OPERATIONS))
    assert results.with_suffix(".png").stat().st_size > 10_000
    check(results, readme)


def test_publishing_twice_changes_nothing(published):
    results, readme = published
    before = readme.read_bytes()
    publish.main([str(results), "--readme", str(readme)])
    assert readme.read_bytes() == before


def test_a_figure_changed_by_hand_is_found(published):
    results, readme = published
    readme.write_text(readme.read_text().replace("GB/s", "TB/s", 1))
    with pytest.raises(SystemExit, match=r"README.md: the section on speed is not the one of machine.json"):
        check(results, readme)


def test_another_measurement_makes_the_readme_stale(published, measured):
    results, readme = published
    report.save(measured | {"date": "2000-01-01T12:00+00:00"}, results)
    with pytest.raises(SystemExit, match=r"README.md"):
        check(results, readme)


def test_a_plot_of_other_results_is_found(published, measured):
    results, readme = published
    entry = deepcopy(measured["results"][0])
    entry["ratios"]["numpy"]["upper"] += 1  # the README shows medians only
    report.save(measured | {"results": [entry, *measured["results"][1:]]}, results)
    with pytest.raises(SystemExit, match=r"machine.png: missing, or not drawn from machine.json"):
        check(results, readme)


def test_a_missing_plot_is_found(published):
    results, readme = published
    results.with_suffix(".png").unlink()
    with pytest.raises(SystemExit, match=r"machine.png: missing"):
        check(results, readme)


@pytest.mark.parametrize("text", ["", publish.BEGIN, f"{publish.END} {publish.BEGIN}"])
def test_a_readme_without_markers_is_refused_and_left_alone(published, text):
    results, readme = published
    readme.write_text(text)
    for flags in ([], ["--check"]):
        with pytest.raises(SystemExit, match=r"expected a line <!-- speed:begin -->"):
            publish.main([str(results), "--readme", str(readme), *flags])
    assert readme.read_text() == text


def test_the_newest_results_are_the_ones_measured_last(measured, tmp_path):
    assert report.newest(tmp_path) is None
    for name, date in (
        ("b", "2026-01-02T00:00+00:00"),
        ("a", "2026-01-03T00:00+00:00"),
        ("c", "2025-12-31T00:00+00:00"),
    ):
        report.save(measured | {"date": date}, tmp_path / f"{name}.json")
    assert report.newest(tmp_path).name == "a.json"


def test_the_name_of_a_machine_is_a_file_name():
    about = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4, "threads": 2}
    assert compare.machine_slug(about) == "intel-r-xeon-r-cpu-2-20ghz-4-cores-2-threads"


def test_the_readme_of_this_repository_is_the_one_of_its_newest_results():
    results = report.newest()
    if results is None:
        pytest.skip("no results in bench/results yet")
    if not publish.README.exists() or publish.BEGIN not in publish.README.read_text(encoding="utf-8"):
        pytest.skip("the README has no section on speed yet")
    assert publish.stale(results, publish.README) is None
