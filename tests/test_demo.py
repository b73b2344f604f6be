"""The demo, on reduced settings: its network is right, its claims hold, and its command line says what is wrong."""

import dataclasses
import io
import struct
import subprocess
import sys

import numpy as np
import pytest

import nbbn
from nbbn.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from nbbn import demo
from nbbn.demo import digits, finetuning, folding, inference, picture, repair, report, running, speed, training
from nbbn.demo.network import Network, cross_entropy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with demo._one_thread():
        yield


@pytest.fixture(scope="module")
def data():
    return digits.load(np.random.default_rng(0))


def train(data, seed, epochs):
    rng = np.random.default_rng(seed)
    return training.train(Network(rng), data.train_images, data.train_labels, rng, epochs)


@pytest.fixture(scope="module")
def network(data):
    return train(data, 0, epochs=4)


@pytest.fixture(scope="module")
def results(data, network):
    """Every part by the name of its report, at less than full size."""
    rng = np.random.default_rng(1)
    pool = network.norm_input(data.train_images, 2)
    return {
        "one_at_a_time": inference.one_at_a_time(network, data.test_images, data.test_labels),
        "forgotten_eval": inference.forgotten_eval(
            network, data.test_images, data.test_labels, rng, (1, 4, 32, 256), shuffles=2
        ),
        "convergence": running.convergence(pool, rng, batches=400),
        "noise": running.noise(pool, rng, (4, 16, 64), repetitions=200),
        "fine_tuning": finetuning.fine_tuning(network, data, rng, batches=30),
        "speed": speed.speed(rng, shape=(8, 4, 8, 8), rounds=3),
        "folding": folding.folding(network, data.test_images),
        "repair": repair.repair(network, data),
    }


# --- the network ----------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    network = Network(rng, np.float64)
    images, labels = rng.random((6, 1, 8, 8)), rng.integers(10, size=6)

    def loss():
        return cross_entropy(network(images), labels)[0]

    with nbbn.use_backend("numpy"):  # the float64 reference: what is tested here is the network around it
        network.backward(cross_entropy(network(images), labels)[1])
        parameters = [(parameter, gradient.copy()) for parameter, gradient in network.parameters()]
        assert len(parameters) == 3 + 2 + 6  # of linear maps, head, normalization
        for parameter, gradient in parameters:
            direction = rng.standard_normal(parameter.shape)
            original, step = parameter.copy(), 1e-6
            losses = []
            for sign in (1, -1):
                parameter[...] = original + sign * step * direction
                losses.append(loss())
            parameter[...] = original
            numerical = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), numerical, rtol=1e-5, atol=1e-8)


def test_training_learns_and_is_the_same_for_a_seed(data, network):
    assert np.mean(network(data.test_images).argmax(1) == data.test_labels) > 0.95
    first, again, other = (train(data, seed, epochs=1) for seed in (3, 3, 4))
    for a, b in zip(first.running_statistics(), again.running_statistics(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.head.weight, again.head.weight)
    assert not np.array_equal(first.head.weight, other.head.weight)


def test_everything_is_float32(data, network):
    assert all(parameter.dtype == np.float32 for parameter, _ in network.parameters())
    assert all(gradient.dtype == np.float32 for _, gradient in network.parameters())
    assert network(data.test_images[:2]).dtype == np.float32


# --- the claims -----------------------------------------------------------------------------------------------------


def test_single_images_in_evaluation_mode(results):
    result = results["one_at_a_time"]
    assert [layer.different_values for layer in result.layers] == [0, 0, 0]
    assert result.different_answers == 0
    assert result.single_accuracy == result.batch_accuracy > 0.95


def test_batch_statistics_are_chance_at_batch_size_1(results):
    result = results["forgotten_eval"]
    assert result.different_answers_alone == 1
    assert result.shuffled[0] == result.sorted[0] <= result.most_frequent_class
    assert result.shuffled_std[0] == 0
    assert (np.diff(result.shuffled) > 0).all()
    assert result.shuffled[-1] > result.evaluation - 0.02
    assert result.sorted[1] < 0.3
    assert result.running_statistics_unchanged


def test_convergence(results):
    fast, slow, cumulative = results["convergence"].tracks
    assert [track.momentum for track in (fast, slow, cumulative)] == [0.1, 0.01, None]
    # the start fades as momentum says; noise of the batches comes on top
    np.testing.assert_allclose(fast.start_left, fast.start_left_expected, atol=0.05)
    np.testing.assert_allclose(slow.start_left, slow.start_left_expected, atol=0.02)
    assert slow.mean_error[99] > 3 * fast.mean_error[99]
    assert cumulative.mean_error[-1] < min(fast.mean_error[-1], slow.mean_error[-1])
    assert cumulative.var_error[-1] < 0.05


def test_noise_is_what_the_formulas_predict(results):
    result = results["noise"]
    np.testing.assert_allclose(result.mean, result.mean_predicted, rtol=0.06)
    np.testing.assert_allclose(result.var, result.var_predicted, rtol=0.06)
    np.testing.assert_array_less(np.abs(result.mean - result.mean_predicted), 4 * result.mean_uncertainty)
    np.testing.assert_array_less(np.abs(result.var - result.var_predicted), 4 * result.var_uncertainty)


def test_fine_tuning_corrupts_freeze_protects_recalibrate_repairs(results):
    result = results["fine_tuning"]
    assert result.frozen_unchanged
    assert (result.frozen_curve == result.before.old).all()
    assert result.frozen == result.before
    assert result.left_training.old < result.before.old - 0.1
    assert result.left_training.faded > result.before.faded + 0.3
    assert abs(result.recalibrated.old - result.before.old) < 0.01


def test_one_nan_is_kept_out_or_repaired_and_a_shift_is_found(results, network):
    result = results["repair"]
    poisoned = result.poisoned
    assert poisoned.broken_channels == poisoned.channels == poisoned.skipped_channels
    assert poisoned.propagated < 0.15, "every answer is the same"
    assert poisoned.skipped == poisoned.before > 0.95
    assert abs(poisoned.repaired - poisoned.before) < 0.02
    for layer in result.layers:
        assert layer.significant <= layer.channels // 8, "false alarms"
        assert layer.significant_shifted > layer.channels // 2
        assert abs(layer.measured / layer.predicted - 1) < 1e-5
    assert result.shifted < 0.7 < 0.9 < result.recalibrated
    assert all(np.isfinite(statistics).all() for statistics in network.running_statistics()), "copies were poisoned"


def test_folding_costs_what_is_expected(results):
    result = results["folding"]
    assert result.different_answers == 0
    assert result.logit_difference < 1e-4
    for layer in result.layers:
        for dtype, roundoff in (("float32", 2.0**-24), ("float16", 2.0**-11)):
            assert 0.5 < layer.measured[dtype] / layer.expected[dtype] < 2
            assert 0.1 < layer.measured[dtype] / roundoff < 10  # the channels are well-conditioned


def test_parts_leave_the_trained_network_alone(data, network, results):
    assert not any(norm.frozen or norm.training for norm in network.norms)
    assert results["fine_tuning"].before.old == np.mean(network(data.test_images).argmax(1) == data.test_labels)
    steps = training.steps(len(data.train_images), epochs=4)
    assert [norm.num_batches_tracked for norm in network.norms] == [steps] * 3


def test_speed_refuses_to_time_results_that_differ():
    differ = speed._Operation("sum", 1, lambda: (np.ones(3),), lambda: (np.ones(3) + 0.1,))
    with pytest.raises(AssertionError, match="sum"):
        speed._check(differ)


# --- report and picture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100])
def test_report_fits_the_terminal(results, width):
    console = Console(width=width, record=True, file=io.StringIO())
    for name, result in results.items():
        report.show(console, name, *getattr(report, name)(result))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.rstrip().endswith("…") for line in lines)


def test_sentences_follow_the_values(results):
    def sentence(name, **changes):
        return getattr(report, name)(dataclasses.replace(results[name], **changes))[1]

    assert "did not move" in sentence("forgotten_eval")
    assert "MOVED" in sentence("forgotten_eval", running_statistics_unchanged=False)
    assert "not even batches of 256" in sentence("forgotten_eval", evaluation=1.5)
    assert "MOVED" in sentence("fine_tuning", frozen_unchanged=False)
    assert "exactly where it was" in sentence("fine_tuning", recalibrated=results["fine_tuning"].before)
    slow = [dataclasses.replace(timing, numpy=1e-3, nbbn=2e-3) for timing in results["speed"].timings]
    assert "SLOWER for: statistics" in sentence("speed", timings=slow)
    fast = [dataclasses.replace(timing, numpy=2e-3, nbbn=1e-3) for timing in results["speed"].timings]
    assert "SLOWER" not in sentence("speed", timings=fast)


def test_picture(results, tmp_path):
    path = tmp_path / "demo.png"
    picture.save(path, *(results[name] for name in list(results)[1:6]))
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">2I", header[16:]) == (1800, 1100)


# --- the command line -----------------------------------------------------------------------------------------------


def test_info_prints_the_configuration(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nbbn ")
    assert "numba" in out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert "python -m nbbn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["bake"], "invalid choice"),
        (["info", "--seed", "1"], "unrecognized"),
        (["demo", "--seed", "-1"], "--seed: expected an integer >= 0, got '-1'"),
        (["demo", "--seed", "x"], "--seed: expected an integer >= 0, got 'x'"),
        (["demo", "--output", "/no/such/folder/demo.png"], "cannot write /no/such/folder/demo.png: No such file"),
        (["demo", "--output", "demo.docx"], "cannot write demo.docx: expected a name that ends in .png"),
    ],
)
def test_invalid_usage_exits_2_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("the demo was started"))
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_is_a_folder(tmp_path, capsys):
    folder = tmp_path / "demo.png"
    folder.mkdir()
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--output", str(folder)])
    assert exit.value.code == 2
    assert "Is a directory" in capsys.readouterr().err


def test_demo_is_called_with_what_was_asked(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments))
    kept = tmp_path / "kept.svg"
    kept.write_text("before")
    assert main(["demo", "--seed", "7", "--output", str(tmp_path / "new.PNG")]) == 0
    assert main(["demo", "--output", str(kept)]) == 0
    assert main(["demo", "--no-picture"]) == 0
    assert calls == [(7, tmp_path / "new.PNG"), (0, kept), (0, None)]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.svg"]  # looking whether it can be written left nothing
    assert kept.read_text() == "before"


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "rich"])
def test_missing_packages_are_one_line_and_exit_2(missing):
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from nbbn.__main__ import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['demo', '--no-picture']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "the demo needs scikit-learn, matplotlib and rich: pip install scikit-learn matplotlib rich\n"
