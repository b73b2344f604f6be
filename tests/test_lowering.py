"""What formulas compile to does what their Python does: variables kept as values, elements of arrays, operators."""

import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from nbbn.cpu.inner import Inner
from nbbn.cpu.jit import serial_kernel


def compiled(function):
    """`function` as a formula, and something compiled to call it with."""
    formula = Inner(function)

    @njit
    def call(*arguments):
        return formula(*arguments)

    return call


def assigned_on_one_way(n):
    value = 1
    if n > 3:
        value = n * n
    return value


def assigned_on_both_ways(n):
    if n % 2:
        half, rest = n // 2, 1.5
    else:
        half, rest = n, 0.5
    return half + rest


def read_in_a_loop(n):
    start = n + 1
    total = 0
    for i in range(n):
        for k in range(i):
            if k == 3:
                continue
            total += start * k
        if total > 1000:
            break
    return total - start


def carried_around_a_loop(n):
    before, now = 0, 1
    i = 0
    while i < n:
        before, now = now, before + now
        i += 1
    return before


def assigned_anew_in_every_turn(n):
    last = -1
    for i in range(n):
        square = i * i
        if square % 3 == 1:
            last = square
    return last


def returned_early(n):
    for i in range(n):
        found = i * 7
        if found % 5 == 4:
            return found
    return -n


def a_condition_kept(n):
    small = n < 4
    total = 0.0
    for i in range(n):
        if small or i % 2:
            total += i / 2
    return total if not small else -total


def a_tuple_kept(n):
    pair = (n, n + 2)
    total = 0
    for i in range(3):
        a, b = pair
        pair = (b, a + i)
        total += pair[0] * pair[1]
    return total


def assigned_and_read_on_one_way(n):
    if n > 3:
        kept = n * 2
    total = 1
    if n > 3:
        total += kept
    return total


def assigned_in_the_first_turn(n):
    total = 0
    for i in range(n):
        if i == 0:
            first = n + 5
        total += first * i
    return total


FUNCTIONS = [
    assigned_and_read_on_one_way,
    assigned_in_the_first_turn,
    assigned_on_one_way,
    assigned_on_both_ways,
    read_in_a_loop,
    carried_around_a_loop,
    assigned_anew_in_every_turn,
    returned_early,
    a_condition_kept,
    a_tuple_kept,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_variables(function):
    call = compiled(function)
    for n in range(12):
        assert call(n) == function(n), n


def operators(a, b):
    total = a + b
    total += a
    total -= b * a
    total *= 2
    less = a < b
    return total, less, a <= b, a > b, a >= b, a == b, a != b, -a, a / (b + 9), abs(a)


@pytest.mark.parametrize(
    "kinds", [(int, int), (float, float), (int, float), (np.float32, np.float32), (float, np.int32)]
)
def test_operators(kinds):
    call = compiled(operators)
    for pair in [(1, 2), (-3, 2), (5, 5), (0, -1)]:
        arguments = [kind(value) for kind, value in zip(kinds, pair, strict=True)]
        got, expected = call(*arguments), operators(*arguments)
        assert got == pytest.approx(expected)
        assert [type(v) is bool for v in got] == [isinstance(v, bool | np.bool_) for v in expected]


def of_an_array(x):
    return x.shape, x.strides, x.size, x.itemsize


def diagonal(x, y, at):
    """Reads and writes by numbers of several types, alone and in tuples, constant and not."""
    y[0, 0, 0] = x[0, 0, 0]
    for i in range(x.shape[0]):
        y[i, 0, at] = x[i, 0, at]
        y[i, i, i] = x[i, i, i]
        y[0, i, at] += x[0, at, i]
    return y[0, 0, 0]


ARRAYS = {
    "contiguous": lambda a: a.copy(),
    "a part": lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1],
    "reversed": lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "transposed": lambda a: a.transpose(2, 1, 0).copy().transpose(2, 1, 0),
    "columns first": np.asfortranarray,
}


DTYPES = [np.float32, np.float64, np.int8, np.uint16, np.int64, np.bool_]


@pytest.mark.parametrize(
    ("made", "dtype"), [(made, np.float32) for made in ARRAYS] + [("a part", dtype) for dtype in DTYPES[1:]]
)
def test_elements(made, dtype):
    plain = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 50, (4, 5, 6)).astype(dtype)
    x = ARRAYS[made](plain)
    assert compiled(of_an_array)(x) == of_an_array(x)
    call = compiled(diagonal)
    for at in (2, np.int32(2), np.uint8(2)):
        got, expected = (ARRAYS[made](plain[::-1]) for _ in range(2))
        assert call(x, got, at) == diagonal(x, expected, at)
        np.testing.assert_array_equal(got, expected)
        if got.base is not None:  # and nothing around it
            np.testing.assert_array_equal(got.base, expected.base)


def from_the_end(x, row):
    """Constants may be negative."""
    row[-1] = 7.0
    x[-1, 0] = row[-2]
    x[0, -2] += row[-1]
    return x[-1, -1] + row[-1]


def test_from_the_end():
    x, row = np.random.default_rng(0).random((3, 4)), np.arange(5.0)
    y, other = x.copy(), row.copy()
    assert compiled(from_the_end)(x, row) == from_the_end(y, other)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(row, other)


def rows_and_numbers(x):
    """Of one and two dimensions, and what is no number: a row."""
    total = 0.0
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            total += row[j] - x[i, j] + x[i][j]
            row[j] = total
    return total


def test_rows():
    call = compiled(rows_and_numbers)
    x = np.random.default_rng(0).random((3, 4))
    y = x.copy()
    assert call(x) == rows_and_numbers(y)
    np.testing.assert_array_equal(x, y)


def test_kernels_leave_the_references_to_their_arrays():
    @serial_kernel(reads=("x",))
    def twice(x, result):
        for i in range(x.size):
            result[i] = 2 * x[i]

    x, result = np.arange(4.0), np.zeros(4)
    before = sys.getrefcount(x), sys.getrefcount(result)
    for _ in range(3):
        twice(x, result)
    assert (sys.getrefcount(x), sys.getrefcount(result)) == before
    np.testing.assert_array_equal(result, 2 * x)


@pytest.mark.parametrize("index", ["4", "i - 6", "i"])
def test_checked_bounds_find_what_is_not_in_the_array(index, tmp_path):
    (tmp_path / "beyond.py").write_text(
        f"""
import numpy as np
from nbbn.cpu.jit import formula, serial_kernel

@formula
def beyond(x, i):
    return x[{index}]

@serial_kernel(reads=("x",))
def outermost(x, i, result):
    result[0] = beyond(x, i)

outermost(np.ones(4), 5, np.zeros(1))
"""
    )
    environment = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "beyond.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert "IndexError" in done.stderr
