"""Every kernel compiles for sm_80 and sm_90, and the machine code is what was designed. No GPU is needed."""

import json
from functools import cache
from pathlib import Path

import numba
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'nbbn[cuda]'")
if numba.config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

import ptx
from numba import cuda, float32

from nbbn.cuda import (
    affine_columns,
    affine_rows,
    channels,
    gradient_sums,
    gradients_rows,
    input_gradient,
    masked,
    moments_columns,
    moments_rows,
    simd,
    train_rows,
)
from nbbn.cuda.jit import device
from nbbn.cuda.storage import KINDS

TABLE = Path(__file__).with_name("registers.json")
LANES = {"float32": 4, "float16": 8, "bfloat16": 8, "float64": 2}
VECTOR = {
    "float32": "v4", "float16": "v4", "bfloat16": "v4", "float64": "v2", "int16": "v2", "int32": "v4", "uint8 8": "v2",
    "uint8 16": "v4",
}  # fmt: skip

#: name: (how to make the kernel for a kind and a number of lanes, whether it stores data)
FAMILIES = {
    "moments rows": (moments_rows.source, False),
    "moments columns": (moments_columns.source, False),
    "affine rows": (lambda kind, lanes: affine_rows.source(kind, kind, kind, lanes), True),
    "affine columns": (lambda kind, lanes: affine_columns.source(kind, kind, kind, lanes), True),
    "train rows": (lambda kind, lanes: train_rows.source(kind, kind, kind, lanes), True),
    "gradient sums rows": (lambda kind, lanes: gradient_sums.rows_source(kind, kind, lanes), False),
    "gradient sums columns": (lambda kind, lanes: gradient_sums.columns_source(kind, kind, lanes), False),
    "gradients rows": (lambda kind, lanes: gradients_rows.source(kind, kind, kind, lanes), True),
    "input gradient rows": (lambda kind, lanes: input_gradient.rows_source(kind, kind, kind, lanes), True),
    "input gradient columns": (lambda kind, lanes: input_gradient.columns_source(kind, kind, kind, lanes), True),
}
CASES = [(family, kind, lanes) for family in FAMILIES for kind, lanes in LANES.items()]
CASES += [(family, "float32", 1) for family in FAMILIES]
CASES += [
    ("moments rows", "uint8", 1), ("moments columns", "int64", 1), ("moments rows", "uint8", 16),
    ("moments columns", "uint8", 8), ("moments rows", "int16", 4), ("moments columns", "int32", 4),
]  # fmt: skip
SINGLE = {
    "ema": channels.ema_source,
    "merge": channels.merge_source,
    "remove": channels.remove_source,
    "variances": channels.variances_source,
    "masked": masked.source("float32"),
}

#: Registers may differ by this many from the table: another release of the compiler, not another kernel.
TOLERANCE = 12


@cache
def table():
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def check_registers(name, architecture, compiled):
    if compiled.registers is None:
        pytest.skip("no ptxas here: compiled to PTX only")
    expected = table()[name][f"sm_{architecture[0]}{architecture[1]}"]
    assert abs(compiled.registers - expected) <= TOLERANCE, f"{compiled.registers} registers, {expected} in the table"
    # 512 threads of a block, the most that is launched, must fit in 65,536 registers
    assert compiled.registers <= 128


# each kernel for one of the two, and the one that matters most for both: compiling is what takes the time
ARCHITECTURES = ((8, 0), (9, 0))
CHOSEN = [
    (case, architecture)
    for n, case in enumerate(CASES)
    for architecture in (ARCHITECTURES if case[1:] == ("float32", 4) else [ARCHITECTURES[n % 2]])
]


@pytest.mark.parametrize(("case", "architecture"), CHOSEN)
def test_kernels(case, architecture):
    family, kind, lanes = case
    make, stores = FAMILIES[family]
    compiled = ptx.compile_kernel(make(kind, lanes), architecture)
    vector = (VECTOR.get(kind) or VECTOR[f"{kind} {lanes}"]) if lanes > 1 else None
    assert ptx.faults(compiled, vector, KINDS[kind].narrow_sums, stores) == []
    check_registers(f"{family} {kind} {lanes}", architecture, compiled)


def test_normalization_reads_integers_as_wide_as_it_stores():
    """Four bytes at once beside 16 of float32."""
    compiled = ptx.compile_kernel(affine_rows.source("uint8", "float32", "float32", 4), (9, 0))
    assert ptx.faults(compiled, None, True, False) == []
    hot = [loop for loop in ptx.loops(compiled.ptx) if any("st.global.v4.f32" in line for line in loop)]
    assert hot
    assert all(any("ld.global.u32" in line for line in loop) for loop in hot)
    assert not any("ld.global.u8" in line for loop in hot for line in loop)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SINGLE)
def test_kernels_with_one_thread_per_channel(name, architecture):
    compiled = ptx.compile_kernel(SINGLE[name], architecture)
    assert ptx.faults(compiled, None, False, True) == []
    check_registers(name, architecture, compiled)


# --- the checks themselves: each must see the bug it is there for --------------------------------------------------

LOAD, STORE = simd.LOAD["float32", 4], simd.STORE["float32", 4]
LOAD_ONE, STORE_ONE = simd.LOAD["float32", 1], simd.STORE["float32", 1]


def _good(x, y, n):
    for k in range(cuda.threadIdx.x * 4, n, cuda.blockDim.x * 4):
        STORE(y, k, simd.multiply(LOAD(x, k), float32(2.0)))


@device
def _doubled_in_float64(value):
    return float32(value * 0.1)  # 0.1 is a float64


def _float64_constant(x, y, n):
    for k in range(cuda.threadIdx.x * 4, n, cuda.blockDim.x * 4):
        a = LOAD(x, k)
        STORE(y, k, (_doubled_in_float64(a[0]), a[1], a[2], a[3]))


def _scalar_loads(x, y, n):
    for k in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        STORE_ONE(y, k, LOAD_ONE(x, k))


def _local_array(x, y, n):
    kept = cuda.local.array(64, float32)
    for k in range(cuda.threadIdx.x * 4, n, cuda.blockDim.x * 4):
        a = LOAD(x, k)
        kept[k % 64] = a[0]
        STORE(y, k, (kept[(k + n) % 64], a[1], a[2], a[3]))


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (_good, None),
        (_float64_constant, "float64 in a float32 loop"),
        (_scalar_loads, "no v4 load in a loop"),
        (_local_array, "local memory"),
    ],
)
def test_planted_bugs_are_seen(kernel, fault):
    found = ptx.faults(ptx.compile_kernel(kernel, (9, 0)), "v4", True, True)
    if fault is None:
        assert found == []
    else:
        assert any(fault in text for text in found)
