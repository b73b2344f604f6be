"""Statistics of the selected values only (`where=`), for any layout: gather into blocks, then as always.

The selected values of each channel are gathered, in memory order, into a block buffer; a full buffer goes
through the same block statistics as everything else.
"""

import numpy as np
from numba import prange

from nbbn.cpu.blocks import CHUNK
from nbbn.cpu.channels import merge_formula as merge
from nbbn.cpu.jit import formula, kernel
from nbbn.cpu.rows import box_moments
from nbbn.cpu.scratch import greater, lesser, scratch_rows, zeros
from nbbn.cpu.sharing import next_task, shared, someone_was_late

#: Values a buffer, and channels a task: 16 buffers of 512 float32 are 32 kB, and 16 channels side by side are
#: one cache line, so that channels-last data is read once.
BUFFER = 512
GROUP = 16


@formula
def flush(buffers, k, size, count, mean, m2):
    """Merge the first `size` values of buffer k into the running moments."""
    block = scratch_rows(3, 1, 0.0)
    box_moments(buffers, (np.int64(0), np.int64(1), np.int64(0), size), k, k + 1, 0, block[0], block[1], block[2])
    return merge(count, mean, m2, size, block[1, 0], block[2, 0])


@formula
def group_moments(x, where, o0, o1, c0, c1, count, mean, m2):
    """Moments of the selected values of channels [c0, c1) in outer rows [o0, o1), written to count[c], ..."""
    buffers = np.empty((1, c1 - c0, BUFFER), x.dtype)
    sizes = zeros(c1 - c0, np.int64(0))
    for c in range(c0, c1):
        count[c], mean[c], m2[c] = 0, 0.0, 0.0
    for o in range(o0, o1):
        for c in range(c0, c1):
            k = c - c0
            size = sizes[k]
            for i in range(x.shape[2]):
                if where[o, c, i]:
                    buffers[0, k, size] = x[o, c, i]
                    size += 1
                    if size == BUFFER:
                        count[c], mean[c], m2[c] = flush(buffers, k, size, count[c], mean[c], m2[c])
                        size = 0
            sizes[k] = size
    for c in range(c0, c1):
        if sizes[c - c0]:
            count[c], mean[c], m2[c] = flush(buffers, c - c0, sizes[c - c0], count[c], mean[c], m2[c])


@kernel(reads=("x", "where"))
def moments(workers, x, where, count, mean, m2):
    """count[c], mean[c], m2[c] over the elements of x where `where` is True; both 3-d, of any strides."""
    outer, channels, inner = x.shape
    groups = -(-channels // GROUP)
    rows = greater(1, CHUNK // inner)
    chunks = -(-outer // rows)
    part_count = scratch_rows(chunks, channels, np.int64(0))
    part_mean = scratch_rows(chunks, channels, 0.0)
    part_m2 = scratch_rows(chunks, channels, 0.0)
    tasks = chunks * groups
    taken = shared(workers)
    for worker in prange(workers):
        task = next_task(np.int64(worker), taken, tasks, np.int64(-1))
        while task >= 0:
            k, g = divmod(task, groups)
            o0 = k * rows
            o1 = lesser(o0 + rows, outer)
            c0 = g * GROUP
            c1 = lesser(c0 + GROUP, channels)
            group_moments(x, where, o0, o1, c0, c1, part_count[k], part_mean[k], part_m2[k])
            task = next_task(np.int64(worker), taken, tasks, task)
    for c in range(channels):
        count[c], mean[c], m2[c] = 0, 0.0, 0.0
        for k in range(chunks):
            part = (part_count[k, c], part_mean[k, c], part_m2[k, c])
            count[c], mean[c], m2[c] = merge(count[c], mean[c], m2[c], part[0], part[1], part[2])
    return someone_was_late(taken)
