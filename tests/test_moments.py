import pickle

import numpy as np
import pytest

import nbbn

M = nbbn.Moments


def sample(*batch):
    return nbbn.batch_stats(np.array(batch, float)[:, None])


def test_more_values_than_can_be_counted():
    half = nbbn.Moments(np.array([2**62]), np.ones(1), np.ones(1))
    with pytest.raises(OverflowError, match="at most"):
        half + half


def test_batches_of_any_size_in_any_order_are_one_population(backend):
    x = np.random.default_rng(0).standard_normal((1000, 5)) * [1, 10, 0.1, 1, 1] + [0, 5, 100, -3, 1e3]
    whole = nbbn.batch_stats(x)
    for cuts in ([1, 2, 3], [500], [0, 999], range(0, 1000, 7), [333, 334, 900]):
        parts = np.split(x, cuts)
        for ordered in (parts, parts[::-1]):
            total = sum(map(nbbn.batch_stats, ordered), M.zeros(5))
            assert (total.count == 1000).all()
            np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-12)
            np.testing.assert_allclose(total.m2, whole.m2, rtol=1e-12)


def test_zeros_is_the_identity(backend):
    m = sample(1, 2, 9)
    assert (m + M.zeros(1) == m).all()
    assert (M.zeros(1) + m == m).all()
    assert (m - M.zeros(1) == m).all()
    assert (sum([m, m]) == m + m).all()
    assert (m - m == M.zeros(1)).all()


def test_removing_a_part(backend):
    window = sample(1, 2, 9, 4) - sample(1, 2)
    np.testing.assert_allclose([window.count[0], window.mean[0], window.m2[0]], [2, 6.5, 12.5])
    with pytest.raises(ValueError, match="got 3 values of 2 in channel 0"):
        sample(1, 2) - sample(1, 2, 3)


def test_var_and_std():
    m = sample(1, 2, 6)
    assert m.var()[0] == pytest.approx(14 / 3)
    assert m.std(ddof=1)[0] == pytest.approx(7**0.5)
    one = sample(5)
    assert one.var() == 0
    assert np.isnan(one.var(ddof=1))
    assert np.isnan(M.zeros(2).std()).all()
    for bad in (2, -1, 0.5, True, None, "1"):
        with pytest.raises(ValueError, match="ddof: expected 0"):
            m.var(ddof=bad)


def test_immutable():
    m = sample(1, 2)
    for name in ("count", "mean", "m2"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(m, name)[0] = 1
        with pytest.raises(AttributeError):
            setattr(m, name, np.zeros(1))
    source = np.ones(1)
    record = M(np.array([2]), source, np.ones(1))
    source[0] = 9
    assert record.mean == 1


def test_equality_is_that_of_arrays():
    a = M(np.array([2, 2]), np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    b = M(np.array([2, 2]), np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert (a == b).tolist() == [True, False]
    assert (a != b).tolist() == [False, True]
    assert a != 3
    assert a.__eq__("text") is NotImplemented
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_pickle_copy_and_repr():
    m = sample(1, 2, 9)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copied = pickle.loads(pickle.dumps(m, protocol))
        assert (copied == m).all()
        assert not copied.mean.flags.writeable
    assert (m.to_numpy() == m).all()
    assert not np.shares_memory(m.to_numpy().mean, m.mean)
    assert repr(m) == "Moments(count=[3], mean=[4.], m2=[38.])"
    assert len(repr(M.zeros(5000))) < 120


def test_fields_are_checked():
    i, f = np.array([2]), np.array([1.0])
    for fields, error in [
        (([2], f, f), TypeError),
        ((f, f, f), TypeError),
        ((i, i, f), TypeError),
        ((i, f, np.zeros(2)), ValueError),
        ((-i, f, f), ValueError),
        ((i, f, -f), ValueError),
        ((i[:, None], f[:, None], f[:, None]), ValueError),
        ((np.array(2), np.array(1.0), np.array(1.0)), ValueError),
        ((np.array([2**63 + 5], np.uint64), f, f), ValueError),
    ]:
        with pytest.raises(error):
            M(*fields)
    for bad in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match="channels: expected an integer"):
            M.zeros(bad)


def test_only_moments_of_the_same_channels_combine():
    m = sample(1, 2)
    for operation in (m.merge, m.__add__, m.__sub__, m.__eq__):
        with pytest.raises(ValueError, match="expected 1 channels, got 2"):
            operation(M.zeros(2))
    with pytest.raises(TypeError, match="other: expected Moments, got float"):
        m.merge(1.0)
    for bad in (1, None, "x"):
        with pytest.raises(TypeError):
            m + bad
        if bad != 0:
            with pytest.raises(TypeError):
                bad + m
        with pytest.raises(TypeError):
            m - bad


def test_infinite_and_nan_parts(backend):
    with np.errstate(all="raise"):
        total = sample(1, np.inf) + sample(2, 3)
        assert total.mean == np.inf
        assert np.isnan(total.m2)
        assert np.isnan((sample(1, np.nan) + sample(2, 3)).mean)
