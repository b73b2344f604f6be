"""Updates that are held: micro-batches merged into one, steps that are skipped, and every way to get it wrong."""

import contextlib
import copy
import pickle

import numpy as np
import pytest

import nbbn
from nbbn import BatchNorm


def data(n=64, channels=3, seed=0):
    return np.random.default_rng(seed).normal(2, 3, (n, channels)).astype(np.float32)


def snapshot(bn):
    return {name: value.tobytes() for name, value in bn.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}, {"momentum": 1.0}])
def test_micro_batches_make_one_update_of_the_whole_batch(backend, options):
    x = data(n=60)
    whole, parts = BatchNorm(3, **options), BatchNorm(3, **options)
    for bn in (whole, parts):
        bn(data(seed=7))
    whole(x)
    before = snapshot(parts)
    with parts.hold_updates() as pending:
        for part in np.split(x, [2, 20, 59 - 9]):
            y = parts(part)
            np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
            expected = nbbn.batch_norm(part, training=True)
            assert (y == expected).all(), "its own statistics normalize it"
            assert parts.backward(part).shape == part.shape
    assert snapshot(parts) == before
    assert (pending.batches, pending.stats.count.tolist()) == (4, [60] * 3)
    np.testing.assert_allclose(pending.stats.mean, x.astype(np.longdouble).mean(0).astype(float), rtol=1e-6)
    np.testing.assert_allclose(pending.stats.var(), x.astype(np.longdouble).var(0).astype(float), rtol=2e-6)
    pending.commit()
    assert whole.num_batches_tracked == parts.num_batches_tracked == 2
    np.testing.assert_allclose(parts.running_mean, whole.running_mean, rtol=2e-6)
    np.testing.assert_allclose(parts.running_var, whole.running_var, rtol=4e-6)


def test_dropped_and_undecided_updates_change_nothing(backend):
    bn = BatchNorm(3)
    bn(data())
    before = snapshot(bn)
    with bn.hold_updates() as pending:
        bn(data(seed=1))
    assert "held: nothing changes before commit()" in repr(pending)
    pending.drop()
    pending.drop()
    assert "dropped)" in repr(pending)
    with bn.hold_updates():
        bn(data(seed=2))
    assert snapshot(bn) == before
    bn(data(seed=1))
    assert snapshot(bn) != before, "afterwards, training calls update at once again"


def test_an_exception_in_the_block_drops():
    bn = BatchNorm(3)
    before = snapshot(bn)
    pending = bn.hold_updates()

    def step():
        with pending:
            bn(data())
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        step()
    assert (pending.state, snapshot(bn)) == ("dropped", before)
    with pytest.raises(RuntimeError, match="commit: expected an update that is held, got one that is dropped"):
        pending.commit()
    bn(data())
    assert bn.num_batches_tracked == 1


def test_what_cannot_be_done():
    bn = BatchNorm(3)
    unused = bn.hold_updates()
    for action in (unused.commit, unused.drop):
        with pytest.raises(
            RuntimeError, match=r"got one that is new: use it as `with bn.hold_updates\(\) as pending:`"
        ):
            action()
    with bn.hold_updates() as pending:
        assert "updates held" in repr(bn)
        assert "collecting" in repr(pending)
        bn(data())
        for action in (pending.commit, pending.drop):
            with pytest.raises(RuntimeError, match="that is collecting: leave the `with` block first"):
                action()
        with pytest.raises(RuntimeError, match="hold_updates: expected no such block around this one"), unused:
            pass
        with (
            pytest.raises(RuntimeError, match="expected a block of its own for each call, got one that is coll"),
            pending,
        ):
            pass
    assert "updates held" not in repr(bn)
    assert pending.batches == 1, "none of this ended the block"
    pending.commit()
    after = snapshot(bn)
    for action in (pending.commit, pending.drop):
        with pytest.raises(RuntimeError, match="that is committed: its update has been made"):
            action()
    with pytest.raises(RuntimeError, match="got one that is committed"), pending:
        pass
    assert snapshot(bn) == after
    with unused:
        bn(data())
    unused.commit()
    assert bn.num_batches_tracked == 2
    with pytest.raises(ValueError, match="hold_updates: expected a layer with running statistics"):
        BatchNorm(3, track_running_stats=False).hold_updates()


def test_frozen_meanwhile():
    bn = BatchNorm(3)
    with bn.hold_updates() as pending:
        bn(data())
        bn.freeze()
        bn(data())
    assert pending.batches == 1
    before = snapshot(bn)
    with pytest.raises(RuntimeError, match=r"commit: expected a layer that is not frozen; call unfreeze\(\) first"):
        pending.commit()
    assert snapshot(bn) == before
    bn.unfreeze()
    pending.commit()
    assert bn.num_batches_tracked == 1


def test_a_pending_update_is_not_copied():
    bn = nbbn.BatchNorm(2)
    with bn.hold_updates() as pending:
        bn(np.arange(6.0).reshape(3, 2))
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copied(pending)
    pending.commit()
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(("name", "value"), [("momentum", value) for value in (5, np.nan, True, "x")])
def test_what_is_assigned_to_a_layer_is_checked_when_it_is_used(name, value):
    bn = nbbn.BatchNorm(2)
    x = np.arange(6.0).reshape(3, 2)
    with bn.hold_updates() as pending:
        bn(x)
    setattr(bn, name, value)
    for use in (lambda: bn(x), pending.commit):
        with pytest.raises((TypeError, ValueError), match=name):
            use()
    assert bn.running_var.tolist() == [1, 1]
    assert bn.num_batches_tracked == 0


def test_nothing_held_is_nothing_done(backend):
    bn = BatchNorm(3)
    before = snapshot(bn)
    with bn.hold_updates() as pending:
        bn(np.empty((0, 3), np.float32))
        bn.eval()(data())
        bn.freeze().train()(data())
    pending.commit()
    assert (pending.batches, snapshot(bn)) == (0, before)


def test_not_a_number_in_a_micro_batch(backend):
    good, bad = data(), data(seed=1)
    bad[3, 1] = np.nan
    expected = BatchNorm(3)
    expected(np.concatenate([good, data(seed=1)]))
    alone = BatchNorm(3)
    alone(good)

    bn = BatchNorm(3, nonfinite="skip")
    with bn.hold_updates() as pending:
        bn(good)
        with pytest.warns(nbbn.NonFiniteWarning, match="1 of 3 channels"):
            bn(bad)
    assert pending.stats.count.tolist() == [128, 64, 128]
    assert "64 to 128 values per channel" in repr(pending)
    pending.commit()
    np.testing.assert_allclose(bn.running_mean[[0, 2]], expected.running_mean[[0, 2]], rtol=1e-6)
    assert bn.running_mean[1] == alone.running_mean[1]
    assert bn.num_skipped.tolist() == [0, 0, 0], "it has seen one batch, if half of it"

    with bn.hold_updates() as pending:
        for _ in range(2):
            with pytest.warns(nbbn.NonFiniteWarning):
                bn(bad)
    kept = bn.running_mean[1]
    pending.commit()
    assert bn.running_mean[1] == kept
    assert (bn.num_batches_tracked, bn.num_skipped.tolist()) == (2, [0, 1, 0])

    strict = BatchNorm(3, nonfinite="raise")
    with strict.hold_updates() as pending:
        strict(good)
        with pytest.raises(FloatingPointError):
            strict(bad)
    assert pending.stats.count.tolist() == [64] * 3
    assert strict.num_batches_tracked == 0

    plain = BatchNorm(3)
    with plain.hold_updates() as pending:
        plain(good)
        plain(bad)
    pending.commit()
    assert np.isnan(plain.running_mean).tolist() == [False, True, False]


HUGE = np.array([[1e30], [-1e30]], np.float32)  # its variance fits float64, not the float32 of the running arrays


def test_what_only_overflows_when_it_is_stored():
    strict, lenient = BatchNorm(1, nonfinite="raise"), BatchNorm(1, nonfinite="skip")
    with strict.hold_updates() as refused, lenient.hold_updates() as skipped:
        strict(HUGE)
        lenient(HUGE)
    before = snapshot(strict)
    with pytest.raises(FloatingPointError, match="stats: expected finite batch statistics"):
        refused.commit()
    assert (snapshot(strict), refused.state) == (before, "held")
    with pytest.raises(nbbn.NonFiniteWarning):  # warnings are errors here: all is done before
        skipped.commit()
    assert skipped.state == "committed"
    assert (lenient.running_var[0], lenient.num_batches_tracked, lenient.num_skipped[0]) == (1, 1, 1)


def test_read_only_statistics_are_found_at_commit():
    bn = BatchNorm(3)
    with bn.hold_updates() as pending:
        bn(data())
    bn.running_var.flags.writeable = False
    before = snapshot(bn)
    with pytest.raises(ValueError, match="running_var: expected a writable array"):
        pending.commit()
    assert snapshot(bn) == before


def test_copies_of_the_layer_hold_nothing_back():
    bn = BatchNorm(3)
    with bn.hold_updates() as pending:
        for other in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
            other(data())
            assert other.num_batches_tracked == 1
    assert pending.batches == 0


def test_all_layers_of_a_network():
    layers = [BatchNorm(3) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(bn.hold_updates()) for bn in layers]
        for bn in layers:
            bn(data())
    assert [bn.num_batches_tracked for bn in layers] == [0, 0, 0]
    for pending in held:
        pending.commit()
    assert [bn.num_batches_tracked for bn in layers] == [1, 1, 1]


def test_without_a_layer_moments_are_what_is_pending(backend):
    """The recipe of the README for those who call functions."""
    x, mean, var = data(), np.zeros(3, np.float32), np.ones(3, np.float32)
    total = nbbn.Moments.zeros(3)
    for part in np.split(x, [10, 30]):
        _, stats = nbbn.batch_norm(part, training=True, return_stats=True)
        total += stats
    nbbn.ema_update(mean, var, total)
    bn = BatchNorm(3)
    bn(x)
    np.testing.assert_allclose(mean, bn.running_mean, rtol=1e-6)
    np.testing.assert_allclose(var, bn.running_var, rtol=2e-6)
