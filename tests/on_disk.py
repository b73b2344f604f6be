"""What the tests of the commands on files share: running one, data, and what NumPy says about it."""

import json

import numpy as np

from nbbn.__main__ import main


def stats(capsys, *arguments):
    code = main(["stats", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def expected(x, axis):
    """In extended precision, and with exact minima."""
    x = x.astype(np.longdouble).reshape(1, -1) if axis is None else np.moveaxis(x.astype(np.longdouble), axis, 0)
    x = x.reshape(len(x), -1)
    return x.shape[1], x.mean(1), x.std(1), x.min(1), x.max(1)


def matches(record, x, axis):
    n, mean, std, least, most = expected(x, axis)
    assert record["count"] == [n] * len(mean)
    np.testing.assert_allclose(record["mean"], mean.astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(record["std"], std.astype(float), rtol=1e-6)
    np.testing.assert_allclose(record["var"], (std**2).astype(float), rtol=2e-6)
    np.testing.assert_allclose(np.divide(record["m2"], n), record["var"], rtol=1e-12)
    assert (record["min"], record["max"]) == (least.tolist(), most.tolist())


def values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(100, 20, shape)
    return x > 100 if dtype is bool else x.astype(dtype)
