"""Bessel's correction of a variance that is already an average: between the conventions of frameworks."""

import numpy as np

from nbbn import checks
from nbbn.arrays import Array, numpy_array, returned


def sample_to_population_var(var: Array, n: int) -> Array:
    r"""Undo Bessel's correction of variances that were taken over n values each.

    Parameters
    ----------
    var : array of any shape
        Sample variances (ddof=1), or a running average of them, such as PyTorch's `running_var`. float32 or float64.
    n : int
        Values per channel in every batch: N H W for images; at least 2.

    Returns
    -------
    array of the shape and dtype of var
        Population variances (ddof=0), as Keras, Flax and ONNX average them. A copy.

    Raises
    ------
    TypeError
        If `var` is not a float32 or float64 array.
    ValueError
        If `n` is not an integer >= 2.

    Notes
    -----
    .. math:: \mathrm{var}_0 = \mathrm{var}_1 \cdot (n - 1) / n

    Exact where every batch had n values and the start value of the running variance is forgotten; before, what
    is left of it, (1 - momentum)^t of 1, is scaled as well.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.sample_to_population_var(np.array([2.0]), n=4)
    array([1.5])
    """
    n = checks.whole_number("n", n, least=2)
    return _scaled(var, n - 1, n)


def population_to_sample_var(var: Array, n: int) -> Array:
    r"""Apply Bessel's correction to variances that were taken over n values each.

    Parameters
    ----------
    var : array of any shape
        Population variances (ddof=0), or a running average of them: Keras's `moving_variance`, Flax's `var`. float32
        or float64.
    n : int
        Values per channel in every batch: N H W for images; at least 2.

    Returns
    -------
    array of the shape and dtype of var
        Sample variances (ddof=1), as PyTorch averages them. A copy.

    Raises
    ------
    TypeError
        If `var` is not a float32 or float64 array.
    ValueError
        If `n` is not an integer >= 2.

    Notes
    -----
    .. math:: \mathrm{var}_1 = \mathrm{var}_0 \cdot n / (n - 1)

    Exact where every batch had n values and the start value is forgotten: see `sample_to_population_var`.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.population_to_sample_var(np.array([1.5]), n=4)
    array([2.])
    """
    n = checks.whole_number("n", n, least=2)
    return _scaled(var, n, n - 1)


def _scaled(var: Array, numerator: int, denominator: int) -> Array:
    values = checks.floats("var", numpy_array("var", var))
    with np.errstate(all="ignore"):
        scaled = np.asarray(values * np.float64(numerator / denominator), values.dtype)
    result: Array = returned(scaled, None, var)
    return result
