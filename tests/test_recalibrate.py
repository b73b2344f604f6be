"""`recalibrate`: masks, progress, NaN batches, against NumPy in extended precision and scikit-learn."""

import itertools

import numpy as np
import pytest

import nbbn
from nbbn import BatchNorm


def uneven(sizes=(1, 2, 64, 3, 500), channels=3, seed=0, loc=1000.0):
    rng = np.random.default_rng(seed)
    return [(loc + rng.normal(k, 1 + k, (n, channels))).astype(np.float32) for k, n in enumerate(sizes)]


def snapshot(bn):
    return {name: value.tobytes() for name, value in bn.state_dict().items()}


def test_uneven_batches_are_one_population(backend):
    batches = uneven()
    wide = np.concatenate(batches).astype(np.longdouble)
    bn = BatchNorm(3, dtype=np.float64).recalibrate(iter(batches))
    np.testing.assert_allclose(bn.running_mean, wide.mean(0).astype(float), rtol=1e-9)
    np.testing.assert_allclose(bn.running_var, wide.var(0).astype(float), rtol=2e-6)
    averages = np.mean([b.mean(0, dtype=float) for b in batches], 0)
    assert (abs(bn.running_mean - averages) > 0.5).all(), "an average of averages is something else"


def test_agrees_with_scikit_learn():
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    batches = uneven(loc=5.0)
    for batch in batches:
        scaler.partial_fit(batch.astype(np.float64))
    bn = BatchNorm(3, dtype=np.float64).recalibrate(batches)
    np.testing.assert_allclose(bn.running_mean, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, scaler.var_, rtol=2e-6)


def test_padding_is_left_out(backend):
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (n, 2, t)).astype(np.float32) for n, t in ((4, 9), (7, 5), (1, 30))]
    lengths = [rng.integers(1, b.shape[2] + 1, b.shape[0]) for b in batches]
    masks = [
        (np.arange(b.shape[2]) < n[:, None])[:, None] for b, n in zip(batches, lengths, strict=True)
    ]  # shape (N, 1, T)
    values = np.concatenate(
        [x[:, :length] for b, n in zip(batches, lengths, strict=True) for x, length in zip(b, n, strict=True)], axis=1
    ).astype(np.longdouble)
    for batch, mask in zip(batches, masks, strict=True):
        batch[~np.broadcast_to(mask, batch.shape)] = np.nan
    a, b = itertools.tee(zip(batches, masks, strict=True))
    for bn in (
        BatchNorm(2).recalibrate(batches, where=masks),
        BatchNorm(2).recalibrate((x for x, _ in a), where=(m for _, m in b)),
    ):
        np.testing.assert_allclose(bn.running_mean, values.mean(1).astype(float), rtol=1e-6)
        np.testing.assert_allclose(bn.running_var, values.var(1).astype(float), rtol=3e-6)
        assert bn.num_batches_tracked == 3


def ones(*shape):
    return np.ones(shape, np.float32)


def failing():
    yield np.array([[True, True, True]])
    raise OSError("disk")


@pytest.mark.parametrize(
    ("batches", "where", "error", "message"),
    [
        ([ones(4, 3)] * 2, [np.array(True)], ValueError, "where: expected a mask for each batch, got none for batch 1"),
        ([ones(4, 3)] * 2, [np.array(True), None], ValueError, "got none for batch 1"),
        ([ones(4, 3)], [np.array(True)] * 2, ValueError, "got more masks than the 1 batches"),
        ([ones(4, 3)], np.array([True]), TypeError, r"where: expected an iterable of masks.* pass \[where\]"),
        ([ones(4, 3)], True, TypeError, "where: expected an iterable of masks"),
        ([ones(4, 3)], [ones(4, 3)], TypeError, "where: expected dtype bool, got float32"),
        ([ones(4, 3)] * 2, failing(), OSError, "disk"),
        ([ones(4, 3)], [np.array([[True, False, True]])], ValueError, "at least one value .*, got none in channel 1"),
        ([(ones(4, 3), 1)], None, TypeError, r"got a tuple in batch 0; .*\(batch\[0\] for batch in batches\)"),
    ],
)
def test_bad_masks_change_nothing(batches, where, error, message):
    bn = BatchNorm(3)
    bn(uneven()[2])
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        bn.recalibrate(batches, where=where)
    assert snapshot(bn) == before


def test_progress_goes_to_standard_error_and_changes_no_number(capsys):
    pytest.importorskip("rich")
    batches = uneven()
    quiet = BatchNorm(3).recalibrate(batches)
    assert capsys.readouterr() == ("", "")
    for source in (batches, iter(batches)):
        bn = BatchNorm(3).recalibrate(source, progress=True)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "recalibrate" in printed.err
        assert snapshot(bn) == snapshot(quiet)
    with pytest.raises(TypeError, match="progress: expected True or False"):
        bn.recalibrate(batches, progress=1)
    with pytest.raises(OSError, match="disk"):
        bn.recalibrate(failing(), progress=True)
    assert snapshot(bn) == snapshot(quiet)


def test_nan_batches_with_each_policy(backend):
    batches = uneven()
    spoilt = [b.copy() for b in batches]
    spoilt[2][5, 1] = np.nan
    spoilt[3][0, 1] = np.inf
    poisoned = BatchNorm(3).recalibrate(spoilt)
    assert np.isfinite(poisoned.running_mean).tolist() == [True, False, True]
    bn = BatchNorm(3, nonfinite="raise")
    before = snapshot(bn)
    with pytest.raises(FloatingPointError, match="in 1 of 3 channels; nothing was changed"):
        bn.recalibrate(spoilt)
    assert snapshot(bn) == before

    bn = BatchNorm(3, nonfinite="skip")
    with pytest.warns(nbbn.NonFiniteWarning, match=r"1 of 3 channels .* \(up to 2 of 5\)") as caught:
        bn.recalibrate(spoilt)
    assert caught[0].filename == __file__
    clean = BatchNorm(3).recalibrate(batches)
    rest = BatchNorm(3).recalibrate(batches[:2] + batches[4:])
    assert bn.running_mean[[0, 2]].tolist() == clean.running_mean[[0, 2]].tolist()
    assert (bn.running_mean[1], bn.running_var[1]) == (rest.running_mean[1], rest.running_var[1])
    assert (bn.num_batches_tracked, bn.num_skipped.tolist()) == (5, [0, 2, 0])


def test_a_channel_that_is_never_finite_cannot_be_skipped():
    bn = BatchNorm(2, nonfinite="skip")
    before = snapshot(bn)
    x = ones(4, 2)
    x[0, 1] = np.nan
    with pytest.raises(FloatingPointError, match="in 1 of 2 channels in each of 2 batches; nothing was changed"):
        bn.recalibrate([x, x])
    assert snapshot(bn) == before
    with pytest.raises(FloatingPointError, match="expected finite"):  # float32 cannot hold this variance
        bn.recalibrate([np.array([[1e30, 1], [-1e30, 1]], np.float32)])
    assert snapshot(bn) == before


def test_a_second_recalibration_forgets_earlier_skips():
    bn = BatchNorm(3, nonfinite="skip")
    bn.num_skipped[:] = 7
    assert bn.recalibrate(uneven()).num_skipped.tolist() == [0, 0, 0]
