"""Memory and lanes as kernels see them: instructions on a device, plain Python with checks in the simulator."""

from numba import float32, float64

from nbbn.cuda.jit import SIMULATED
from nbbn.cuda.storage import KINDS

if SIMULATED:
    from nbbn.cuda import simulated as _implementation
else:
    from nbbn.cuda import intrinsics as _implementation  # type: ignore[no-redef]

LOAD = _implementation.LOAD
STORE = _implementation.STORE
load_float32 = _implementation.load_float32
load_float64 = _implementation.load_float64
load_int64 = _implementation.load_int64
load_mask = _implementation.load_mask
load_shared_result = _implementation.load_shared_result
load_shared_count = _implementation.load_shared_count
store_float32 = _implementation.store_float32
store_float64 = _implementation.store_float64
store_int64 = _implementation.store_int64
store_int32 = _implementation.store_int32
take_ticket = _implementation.take_ticket
add = _implementation.add
subtract = _implementation.subtract
multiply = _implementation.multiply
fma = _implementation.fma
magnitude = _implementation.magnitude
finite_or_zero = _implementation.finite_or_zero
cut = _implementation.cut
total = _implementation.total
narrow = _implementation.narrow
wide = _implementation.wide


def arithmetic_of(*names):
    """Whether float32 holds every value of these kinds; what to compute in then, and what turns lanes into that."""
    is_narrow = all(KINDS[name].narrow for name in names)
    return is_narrow, float32 if is_narrow else float64, narrow if is_narrow else wide
