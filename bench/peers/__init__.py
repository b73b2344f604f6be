"""Libraries to compare with: the one table that tests, benchmarks and comparison read.

To add a peer, write a module like its neighbours (import the library inside its functions: it is optional) and enter
its `Peer` below. Tables, plots and checks follow.

Fairness, in one place:

- **The same bytes.** Everyone reads the same values; PyTorch and ONNX Runtime the very same memory. What a library
  needs in a format of its own (JAX's aligned buffers, oneDNN's blocked layout) is converted before the clock starts.
- **The same memory for results.** Who can write to memory allocated before is compared with nbbn given `out=`. Who
  always allocates its result (`F.batch_norm`, oneDNN, JAX) is compared with nbbn without `out=`: `against`. Fresh
  memory costs page faults, more than the arithmetic for large results, and both sides pay them.
- **The same threads**, all that nbbn uses; JAX and XLA take all cores and cannot be told otherwise while running.
- **The same way to wait.** Idle threads of one library that spin take a core away from the next. There may be several
  OpenMP runtimes in the process: PyTorch's wheel brings its own libgomp, scikit-learn's another, Numba takes the
  system's (or PyTorch's if that was there first: they share a name). nbbn makes its own sleep after 3,000 looks, about
  50 us; `WAITING` asks the same of all of them. That costs no one anything within a sample, where calls follow each
  other in a few us: PyTorch took the same time with 3,000 and with its default of 300,000, from (64, 64) to
  (32, 64, 56, 56). ONNX Runtime's pool is told not to spin. XLA's pool has no such setting; the untimed calls before
  each sample (`timing.WARM_UP`) outlast it.
"""

import os
from collections.abc import Mapping

from peers import (
    jax_xla,
    nbbn_itself,
    numpy_textbook,
    onednn,
    onnx_runtime,
    pytorch,
    statistics_only,
)
from peers.table import Build, Call, Peer, versions

#: What every OpenMP runtime that is loaded from here on finds in its environment.
WAITING = {"GOMP_SPINCOUNT": "3000"}

for _name, _value in WAITING.items():
    os.environ.setdefault(_name, _value)

#: The first two are what all others are compared with.
PEERS: Mapping[str, Peer] = {
    "nbbn": nbbn_itself.WITH_OUT,
    "nbbn-new": nbbn_itself.NEW_RESULT,
    "nbbn-float32": nbbn_itself.FLOAT32,
    "numpy": numpy_textbook.PEER,
    "torch": pytorch.WITH_OUT,
    "torch-new": pytorch.NEW_RESULT,
    "onednn": onednn.PEER,
    "jax": jax_xla.PEER,
    "onnxruntime": onnx_runtime.PEER,
    "sklearn": statistics_only.SCIKIT_LEARN,
    "numbagg": statistics_only.NUMBAGG,
}

__all__ = ["PEERS", "WAITING", "Build", "Call", "Peer", "versions"]
