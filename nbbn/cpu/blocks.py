"""Sums over one contiguous run of values: the innermost loops, and how a channel is cut into blocks.

Statistics take two passes over a block that stays in the first-level cache: its mean in the storage
precision, then sums of deviations from that mean. Blocks merge in float64 (`formulas.merge`). The deviations
are small and nearly exact whatever the mean is, so float32 data gets float64-like statistics at float32 speed.

The cut into blocks and chunks depends on the shape alone, never on the number of threads: any number of
threads gives the same bits.
"""

from nbbn.cpu.jit import formula, reduction

#: Values a block: two passes over 4 kB of float32 stay in any first-level cache. 256 to 4,096 measured within
#: 15 % of each other (AVX2, 32x64x56x56); longer blocks add rounding error, shorter ones merges.
BLOCK = 1024

#: Values a chunk, the unit of parallel work within one channel: 256 kB of float32, half of a common L2.
CHUNK = 65536


@formula
def chunk_grid(outer, inner):
    """(rows a chunk, columns a chunk, chunks along outer, chunks along inner) of one channel."""
    columns = min(inner, CHUNK)
    rows = max(1, CHUNK // columns)
    return rows, columns, -(-outer // rows), -(-inner // columns)


@formula
def chunk_bounds(chunk, outer, inner):
    """Rows [o0, o1) and columns [i0, i1) of chunk number `chunk` of a channel."""
    rows, columns, _, along_inner = chunk_grid(outer, inner)
    o0 = (chunk // along_inner) * rows
    i0 = (chunk % along_inner) * columns
    return o0, min(o0 + rows, outer), i0, min(i0 + columns, inner)


@reduction
def sum_of(values):
    total = values.dtype.type(0)
    for i in range(values.size):
        total += values[i]
    return total


@reduction
def sums_of_deviations(values, origin):
    """Sums of d and of d * d, d = value - origin, in the precision of `origin`."""
    total = type(origin)(0)
    squares = type(origin)(0)
    for i in range(values.size):
        deviation = values[i] - origin
        total += deviation
        squares += deviation * deviation
    return total, squares


@reduction
def sums_of_gradient(gradients, values, mean):
    """Sums of g and of g * (x - mean), in the precision of `mean`."""
    total = type(mean)(0)
    products = type(mean)(0)
    for i in range(values.size):
        total += gradients[i]
        products += gradients[i] * (values[i] - mean)
    return total, products
