"""Running statistics on a device: what moves, repairs, diagnoses and saves them gives what it gives in host memory."""

import threading
import warnings

import device_arrays
import numpy as np
import pytest

import nbbn
import nbbn.cuda
from nbbn.backends import RunningUpdate
from nbbn.cuda.device import view

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal([1, -2, 3], [1, 2, 0.5], (n, 3)).astype(np.float32) for n in (40, 7, 33)]
put = device_arrays.put


def pair(**options):
    """The same layer in both memories."""
    return nbbn.BatchNorm(3, **options), nbbn.BatchNorm(3, like=put(BATCHES[0]), **options)


def assert_same(host, device):
    for name in ("running_mean", "running_var"):
        there = getattr(device, name)
        assert type(there) is device_arrays.Array
        np.testing.assert_allclose(there.get(), getattr(host, name), rtol=2e-6)
    assert host.num_batches_tracked == device.num_batches_tracked
    assert (host.num_skipped == device.num_skipped).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"debias": True}, {"nonfinite": "raise"}, {"momentum": None, "nonfinite": "skip"}],
)
def test_training(options):
    host, device = pair(**options)
    for x in BATCHES:
        y = host(x)
        np.testing.assert_allclose(device(put(x)).get(), y, rtol=0, atol=5e-6)
    assert_same(host, device)


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}, {}])
def test_channels_that_were_skipped_count_for_themselves(options):
    host, device = pair(nonfinite="skip", **options)
    for i, x in enumerate(BATCHES):
        x = x.copy()
        x[0, i] = np.nan
        with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3"):
            host(x)
        with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3"):
            device(put(x))
    assert host.num_skipped.tolist() == [1, 1, 1]
    assert_same(host, device)


def test_momentum_is_asked_for_once(monkeypatch):
    """Between two questions another thread may have skipped a batch."""
    layer = nbbn.BatchNorm(3, like=put(BATCHES[0]), nonfinite="skip", debias=True)
    layer.num_batches_tracked = 2
    momentum = nbbn.BatchNorm._momentum

    def then_another_thread_skips(self):
        found = momentum(self)
        self.num_skipped[1] = 1
        return found

    monkeypatch.setattr(nbbn.BatchNorm, "_momentum", then_another_thread_skips)
    layer(put(BATCHES[0]))
    assert layer.num_batches_tracked == 3


def test_threads_on_one_stream_count_what_they_skip_apart(monkeypatch):
    """Another thread asks between the launch that skips and the count that is read."""
    bad = BATCHES[0].copy()
    bad[0, 1] = np.nan
    counts, threads = [], []
    read = nbbn.cuda.read_skipped

    def move():
        update = RunningUpdate(*(view("running", put(np.ones(3))) for _ in range(2)), 0.1, 1, True)
        counts.append(nbbn.cuda.ema(*(view("stats", values) for values in statistics), update))

    def read_later(*arguments):
        if not threads:
            threads.append(threading.Thread(target=move))
            threads[0].start()
            threads[0].join(0.5)
        return read(*arguments)

    made = nbbn.batch_stats(put(bad))
    statistics = made.count, made.mean, made.m2
    monkeypatch.setattr(nbbn.cuda, "read_skipped", read_later)
    move()
    threads[0].join()
    assert counts == [1, 1]


def test_raise_leaves_everything_as_it_was():
    host, device = pair(nonfinite="raise")
    device(put(BATCHES[0]))
    host(BATCHES[0])
    bad = BATCHES[1].copy()
    bad[3, 1] = np.inf
    with pytest.raises(FloatingPointError, match="x: expected finite"):
        device(put(bad))
    assert_same(host, device)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}])
def test_held_updates(options):
    host, device = pair(**options)
    batches = [x.copy() for x in BATCHES]
    if options:
        batches[1][0, 2] = np.nan
    for layer, move in ((host, lambda x: x), (device, put)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nbbn.NonFiniteWarning)
            with layer.hold_updates() as pending:
                for x in batches:
                    layer(move(x))
        assert "held" in repr(pending)
        pending.commit()
    assert host.num_batches_tracked == 1
    assert_same(host, device)


def test_recalibrate_and_drift():
    host, device = pair()
    host.recalibrate(BATCHES)
    assert device.recalibrate(map(put, BATCHES)) is device
    assert_same(host, device)
    moved = BATCHES[0] + np.array([0, 1, 0], np.float32)
    expected, found = host.drift(moved), device.drift(put(moved))
    np.testing.assert_allclose(found.output_error, expected.output_error, rtol=1e-4, atol=1e-6)
    assert (found.significant == expected.significant).all()
    report = nbbn.check_running_stats(device.running_mean, device.running_var, stats=nbbn.batch_stats(put(BATCHES[0])))
    assert report.ok


def test_state_dicts_go_both_ways():
    host, device = pair()
    device(put(BATCHES[0]))
    host.load_state_dict(device.state_dict(prefix="bn."), prefix="bn.")
    assert_same(host, device)
    host(BATCHES[1])
    device.load_state_dict(host.state_dict())
    assert_same(host, device)


def test_folding_is_for_host_memory():
    with pytest.raises(TypeError, match=r"conv_w: expected an array in host memory, got .* on a CUDA device"):
        nbbn.fuse_conv_bn_weights(
            put(np.ones((3, 2, 1, 1), np.float32)), None, np.zeros(3), np.ones(3), 1e-5, None, None
        )
