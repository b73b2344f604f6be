"""Non-temporal stores: the same bits as ordinary ones, every element written and no other, at any alignment."""

import re

import numpy as np
import pytest
from llvmlite import binding
from numba.core import types
from numba.np import numpy_support

import nbbn
from nbbn.cpu import caches, columns_forward, jit, plain_kernels, rows, rows_backward
from nbbn.cpu.storage import HALF

POISON = 12345.0


def at_offset(values, offset):
    """A copy of `values` that begins `offset` elements after a cache line, in memory full of poison."""
    memory = np.full(values.size + 64, POISON, values.dtype)
    start = (-memory.ctypes.data % 64) // values.itemsize + offset
    view = memory[start : start + values.size].reshape(values.shape)
    view[...] = values
    return memory, start, view


@pytest.fixture(params=[False, True], ids=["ordinary", "non-temporal"])
def streaming(request, monkeypatch):
    monkeypatch.setattr(caches, "streams", lambda *arrays: request.param)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(2, 1, 200), (1, 3, 1), (3, 2, 131), (5, 7), (40, 17)])
@pytest.mark.parametrize("offset", range(16))
def test_writes_all_and_nothing_else(streaming, dtype, shape, offset):
    x = np.random.default_rng(offset).standard_normal(shape).astype(dtype)
    channels = shape[1]
    mean, var = np.linspace(-1, 1, channels), np.linspace(0.5, 2, channels)
    expected = nbbn.normalize(x, mean, var, axis=np.int64(1))
    memory, start, out = at_offset(np.full(shape, POISON, dtype), offset)
    nbbn.normalize(x, mean, var, out=out, axis=np.int64(1))  # not an int: the long way (nbbn.quick)
    assert (out == expected).all()
    assert (memory[:start] == POISON).all()
    assert (memory[start + x.size :] == POISON).all()


@pytest.mark.parametrize("size", range(0, 100))
def test_every_length(streaming, size):
    x = np.random.default_rng(size).standard_normal((3, 2, 128 + size)).astype(np.float32)
    gradient = x[::-1].copy()
    running = np.zeros(2, np.float32), np.ones(2, np.float32)
    y = nbbn.batch_norm(x, *running, training=True, axis=np.int64(1))
    m = nbbn.batch_stats(x)
    with nbbn.use_backend("numpy"):
        expected = nbbn.normalize(x, m.mean, m.var())
        expected_gradient = nbbn.batch_norm_backward(gradient, x, m.mean, m.var())[0]
    assert np.allclose(y, expected, rtol=1e-6, atol=1e-6)
    grad_x = nbbn.batch_norm_backward(gradient, x, m.mean, m.var(), axis=np.int64(1))[0]
    assert np.allclose(grad_x, expected_gradient, rtol=1e-5, atol=1e-6)


def test_large_results_stream_and_results_in_place_never_do(monkeypatch):
    monkeypatch.setattr(caches, "sizes", lambda: (512 << 10, 2560))
    x, out = np.zeros(257, np.float32), np.zeros(257, np.float32)  # 2056 bytes, and four fifths are 2048
    assert caches.streams(out, x)
    assert caches.streams(out, x, None)
    assert not caches.streams(x, x)
    assert not caches.streams(out, x, out)
    assert not caches.streams(out[:256], x[:256])
    assert caches.streams(out[:256], x[:256], x[:1]), "every input counts"
    assert not caches.streams(out[:256], x[:1].astype(np.uint8))


def test_sizes_of_caches_are_plausible():
    second, last = caches.sizes()
    assert 64 << 10 <= second <= last < 4 << 30


# --- the instructions -------------------------------------------------------------------------------------------------

FEATURES = binding.get_host_cpu_features()
needs_avx2 = pytest.mark.skipif(
    not (FEATURES.get("avx2") and FEATURES.get("fma")), reason="instructions of x86 processors with AVX2 and FMA"
)

PACKED_FMA = r"vfn?madd\d+ps\s+.*%[yz]mm"
PACKED_STREAM = r"vmovnt\w+\s+%[yz]mm"


def assembly(pair, *arguments):
    """What a kernel is compiled to: anew, because code from the cache cannot be looked at."""
    fresh = jit.Kernel(pair._compiled.py_func, (), parallel=False)
    fresh._reads = pair._reads
    signature = tuple(jit._type(a, reads) for a, reads in zip(arguments, fresh._reads, strict=True))
    fresh._compiled.add_overload(fresh._compiled._compiler.compile(signature, None))
    return fresh._compiled.inspect_asm(fresh._compiled.signatures[0])


def arguments_of_normalize(dtype):
    x = np.zeros((1, 1, 1), dtype)
    coefficients = np.zeros((3, 1))
    narrow = coefficients.astype(np.float32)
    return 1, x, None, x.copy(), coefficients, narrow, np.ones(1, bool), np.float32(0), True


@needs_avx2
def test_normalization_has_packed_fma_and_packed_non_temporal_stores():
    code = assembly(rows.normalize.serial, *arguments_of_normalize(np.float32))
    assert re.search(PACKED_FMA, code)
    assert re.search(PACKED_STREAM, code)


@needs_avx2
@pytest.mark.skipif(not FEATURES.get("f16c"), reason="instructions for half precision")
def test_half_precision_is_converted_in_registers():
    code = assembly(rows.normalize.serial, *arguments_of_normalize(HALF))
    assert re.search(r"vcvtph2ps\s+.*%[yz]mm", code)
    assert re.search(r"vcvtps2ph\s+.*%[yz]mm", code)
    assert re.search(r"vmovnt\w+\s+%[xyz]mm", code)


@needs_avx2
def test_columns_and_gradients_have_them_too():
    x, c, floor = np.zeros((1, 1, 1), np.float32), np.zeros(1, np.float32), np.float32(0)
    for code in (
        assembly(columns_forward.normalize.serial, 1, x, None, x.copy(), 1, c, c, c, floor, True),
        assembly(rows_backward.apply.serial, 1, x, x, c, c, c, c, True, x.copy()),
    ):
        assert re.search(PACKED_FMA, code)
        assert re.search(PACKED_STREAM, code)


@needs_avx2
def test_statistics_have_packed_fma_and_small_calls_no_non_temporal_stores():
    x, wide = np.zeros((1, 1, 1), np.float32), np.zeros(1)
    assert re.search(PACKED_FMA, assembly(rows.moments.serial, 1, x, 1, wide, wide))
    code = assembly(plain_kernels.normalize_rows, x, x.copy(), wide, wide, wide, wide, 1e-5)
    assert re.search(PACKED_FMA, code)
    assert not re.search("vmovnt", code)


def test_halves_are_told_from_integers():
    assert numpy_support.from_dtype(HALF) != types.uint16
