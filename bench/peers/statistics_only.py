"""Libraries that have statistics only: scikit-learn's `StandardScaler` and numbagg.

Both want a matrix with one row a sample or a channel: they serve what is one without a copy, float32.
"""

import warnings

import numpy as np
from inputs import Inputs

from peers.table import Call, Peer


def scikit_learn(given: Inputs) -> Call | None:
    from sklearn.preprocessing import StandardScaler

    if given.dtype != np.float32 or (given.axis != -1 and given.x.ndim != 2):
        return None
    samples = given.x.reshape(-1, given.channels)

    def call():  # a new one each time: the next `partial_fit` would merge
        scaler = StandardScaler().partial_fit(samples)
        return scaler.mean_, scaler.var_

    return call


def numbagg_(given: Inputs) -> Call | None:
    import numbagg

    if given.dtype != np.float32:
        return None
    if given.axis == -1 or given.x.ndim == 2:
        matrix, axis = given.x.reshape(-1, given.channels), 0
    elif given.x.shape[0] == 1:
        matrix, axis = given.x.reshape(given.channels, -1), 1
    else:
        return None

    def call():
        return numbagg.nanmean(matrix, axis=axis), numbagg.nanvar(matrix, axis=axis, ddof=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compiles
        call()
    return call


SCIKIT_LEARN = Peer("scikit-learn", "sklearn", "scikit-learn", {"statistics": scikit_learn})
NUMBAGG = Peer("numbagg", "numbagg", "numbagg", {"statistics": numbagg_})
