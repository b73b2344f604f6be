"""From a measurement to the README: what is published is what was measured, losses and missed targets included."""

import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # as in test_bench.py

import compare  # noqa: E402
import publish  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
import targets  # noqa: E402
from cases import Case  # noqa: E402
from operations import OPERATIONS  # noqa: E402
from peers import PEERS  # noqa: E402
from targets import Target  # noqa: E402
from timing import Effort  # noqa: E402

CASES = [Case((4, 3, 5, 7)), Case((4, 5, 7, 3), axis=-1)]

OTHER_PARTS = {
    "startup": {
        "import": {
            "seconds": {name: {"lower": 0.3, "median": 0.4, "upper": 0.5} for name in ("numba, numpy", "nbbn")},
            "ratio": {"lower": 1.0, "median": 1.1, "upper": 1.2},
        },
        "first_calls": [
            {"function": "batch_stats", "dtype": "float32", "uncached": 3.5, "cached": 0.2},
            {"function": "normalize", "dtype": "float32", "uncached": 4.5, "cached": 0.1},
        ],
        "kernels": {"number": 27, "bytes": 2_500_000, "dtypes": ["float32"]},
    },
    "memory": [{"operation": "training", "case": "64x64x112x112", "peak_extra_bytes": 40_000}],
}


@pytest.fixture(scope="module")
def measured():
    peers = {name: PEERS[name] for name in ("nbbn", "nbbn-new", "numpy")}  # what every installation has
    found = compare.compare(CASES, Effort(2, 60, 2), "a test", ("throughput", "host"), peers)
    return found | deepcopy(OTHER_PARTS)


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
    """The results and a README with its section, in a folder of their own; document and picture beside the results."""
    shutil.copytree(published_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "results" / "machine.json", tmp_path / "README.md"


def check(results, readme):
    publish.main([str(results), "--readme", str(readme), "--check"])


def changed(measured, operation, name, **values):
    """The report with other figures in one entry."""
    copy = deepcopy(measured)
    entry = next(entry for entry in copy["results"] if entry["operation"] == operation)
    entry["ratios"][name] = entry["ratios"].get(name, {}) | values
    return copy


# --- what is measured -------------------------------------------------------------------------------------------


def test_every_operation_and_case_is_measured_against_every_peer_and_its_ceilings(measured):
    assert len(measured["results"]) == len(CASES) * len(OPERATIONS)
    for entry in measured["results"]:
        limits = {"read"} if entry["operation"] == "statistics" else {"stream", "copy", "nbbn-new"}
        assert set(entry["ratios"]) == {"numpy"} | limits
    assert {(entry["operation"], entry["case"]) for entry in measured["host"]} >= {
        ("evaluation", "1x1"),
        ("training", "64x64"),
    }
    assert "numpy" in measured["versions"]
    assert measured["machine"]["last_level_cache"] > 0


def test_what_nbbn_refuses_is_left_out_with_a_word(monkeypatch, capsys):
    refusing = compare.PEERS["nbbn"]

    def refuse(given):
        def call():
            raise TypeError("float16: not yet")

        return call

    peers = {"nbbn": replace(refusing, calls=dict.fromkeys(refusing.calls, refuse))}
    assert compare.entries([Case((4, 3), dtype="float16")], Effort(1), peers) == []
    assert "left out: statistics of (4, 3) float16: float16: not yet" in capsys.readouterr().err


def test_the_command_in_a_report_measures_the_same_again(monkeypatch, tmp_path, measured):
    commands = []
    monkeypatch.setattr(
        compare, "compare", lambda cases, effort, command, parts, dtypes: commands.append(command) or measured
    )
    compare.main(["--output", str(tmp_path)])
    compare.main(["--output", str(tmp_path), "--rounds", "3", "--cases", "4x3", "4x3-last-uint8", "--only", "host"])
    compare.main(["--output", str(tmp_path), "--dtypes", "float32"])
    assert commands == [
        "python bench/compare.py",
        "python bench/compare.py --rounds 3 --cases 4x3 4x3-last-uint8 --only host",
        "python bench/compare.py --dtypes float32",
    ]
    assert report.load(next(tmp_path.glob("*.json"))) == measured
    assert next(tmp_path.glob("*.md")).read_text() == tables.document(measured)


# --- tables and targets -----------------------------------------------------------------------------------------


def test_the_document_shows_every_measurement(measured):
    text = tables.document(measured)
    assert text.count("| (4, 5, 7, 3) channels-last |") == len(OPERATIONS)
    for word in (
        "27 compiled kernels",
        "| batch_stats | float32 | 3.50 | 0.200 |",
        "| 0.04 |",
        "| evaluation | (1, 1) |",
    ):
        assert word in text


def test_losses_are_bold_in_the_main_table_and_named_elsewhere(measured):
    lost = changed(measured, "training", "numpy", median=0.123)
    assert "| **0.12x** |" in tables.main(lost, ["4x3x5x7"])
    assert "training (4, 3, 5, 7) NumPy 0.12x" in tables.losses(lost)
    assert "training (4, 3, 5, 7) NumPy 0.12x" not in tables.losses(lost, ["4x3x5x7"])
    assert "0.12x" not in tables.losses(changed(measured, "training", "numpy", median=1.2))


def test_a_target_counts_by_its_worst_figure(measured):
    target = Target("training", targets.ratio("training", "numpy"), least=5)
    good = deepcopy(measured)
    for entry in good["results"]:
        entry["ratios"]["numpy"]["median"] = 7.0
    assert target.met(good)
    bad = changed(good, "training", "numpy", median=4.9)
    assert not target.met(bad)
    assert targets.outcome(bad, target) == ("missed in 1 of 2", "4.9x", "training (4, 3, 5, 7)")
    assert target.met(changed(good, "evaluation", "numpy", median=1.0)), "another operation"
    unmeasured = Target("JAX", targets.ratio("training", "jax"), least=5)
    assert unmeasured.met(good) is None
    assert targets.outcome(good, unmeasured)[0] == "not measured"


def test_targets_of_layout_size_and_dtype_look_at_those_cases_only(measured):
    large = deepcopy(measured)
    large["machine"]["last_level_cache"] = 4 * 420 - 1  # below the result of these cases
    figures = targets.ratio("training", "numpy", targets.channels_last, targets.beyond_cache)
    assert list(figures(large)) == ["training (4, 5, 7, 3) channels-last"]
    large["machine"]["last_level_cache"] += 1
    assert figures(large) == {}
    assert targets.ratio("training", "numpy", targets.not_small)(measured) == {}
    assert targets.ratio("training", "numpy", dtype="float16")(measured) == {}


def test_a_share_of_the_ceiling_is_that_of_the_faster_kernel(measured):
    entry = deepcopy(next(entry for entry in measured["results"] if entry["operation"] == "training"))
    entry["ceiling"] = "copy"
    figures = targets.ratio("training", "ceiling")(measured | {"results": [entry]})
    assert list(figures.values()) == [entry["ratios"]["copy"]["median"]]


def test_startup_and_memory_have_most_not_least(measured):
    outcomes = {target.what: targets.outcome(measured, target)[0] for target in targets.TARGETS}
    assert outcomes["first call ever, per function and dtype"] == "missed in 1 of 2"
    assert outcomes["first call in a process, compiled before"] == "met"
    assert outcomes["extra memory at 206 MB, with out="] == "met"
    assert outcomes["import nbbn, against numba and numpy"] == "met"
    without = measured | {"startup": {}, "memory": []}
    assert all(targets.TARGETS[-k].met(without) is None for k in (1, 2, 3, 4))


def test_missed_targets_are_named(measured):
    text = targets.summary(measured)
    assert "first call ever, per function and dtype (aim <= 4 s, worst 4.5 s)" in text
    assert "compiled before (aim" not in text


# --- into the README --------------------------------------------------------------------------------------------


def test_publish_writes_the_section_and_leaves_the_rest_alone(published):
    results, readme = published
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{publish.BEGIN}\n")
    assert text.endswith(f"\n{publish.END}\n\nThe rest.\n")
    assert "(results/machine.png)" in text
    assert "(results/machine.md)" in text
    assert "`a test`" in text
    operations = [operation.name for operation in OPERATIONS]
    words = ("NumPy", "(4, 5, 7, 3) channels-last", "**Losses.**", "**Targets.**", "27 compiled kernels", *operations)
    assert all(word in text for word in words)
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


def test_a_document_of_other_results_is_found(published, measured):
    results, readme = published
    upper = measured["results"][0]["ratios"]["numpy"]["upper"]  # the README shows medians only
    report.save(changed(measured, "statistics", "numpy", upper=upper + 1), results)
    with pytest.raises(SystemExit, match=r"machine.md: missing, or not made from machine.json"):
        check(results, readme)


def test_a_picture_of_other_results_is_found(published, measured):
    results, readme = published
    report.save(measured | {"labels": measured["labels"] | {"cupy": "CuPy"}}, results)  # in no table
    with pytest.raises(SystemExit, match=r"machine.png: missing, or not drawn from machine.json"):
        check(results, readme)


@pytest.mark.parametrize("suffix", [".png", ".md"])
def test_a_missing_file_is_found(published, suffix):
    results, readme = published
    results.with_suffix(suffix).unlink()
    with pytest.raises(SystemExit, match=rf"machine{suffix}: missing"):
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
    dates = {"b": "2026-01-02T00:00+00:00", "a": "2026-01-03T00:00+00:00", "c": "2025-12-31T00:00+00:00"}
    for name, date in dates.items():
        report.save(measured | {"date": date}, tmp_path / f"{name}.json")
    assert report.newest(tmp_path).name == "a.json"


def test_the_readme_of_this_repository_is_the_one_of_its_newest_results():
    results = report.newest()
    if results is None:
        pytest.skip("no results in bench/results yet")
    if not publish.README.exists() or publish.BEGIN not in publish.README.read_text(encoding="utf-8"):
        pytest.skip("the README has no section on speed yet")
    assert publish.stale(results, publish.README) is None
