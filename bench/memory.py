"""Memory that a call needs on top of its arguments, measured: the peak of the process during the call.

A process of its own an operation: it warms up on a small input (kernels, threads), fills the large one, and has the
system forget the peak so far (`/proc/self/clear_refs`, Linux only). What counts is the peak after one call with
`out=` less what was resident before.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case

#: 206 MB each.
CASES = (Case((64, 64, 112, 112)), Case((64, 112, 112, 64), axis=-1))

OPERATIONS = ("statistics", "training", "evaluation", "backward")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """Peak extra bytes of every operation; nothing where the system cannot tell."""
    if not _CLEAR.exists():
        return []
    found = []
    for case in cases:
        for operation in OPERATIONS:
            command = [sys.executable, __file__, operation, case.id]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr}")
            found.append({"operation": operation, "case": case.id, "peak_extra_bytes": int(run.stdout)})
    return found


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes at the peak of a call, less those before it. In this very process."""
    _CLEAR.write_text("5")  # the peak is from now on
    before = _kilobytes("VmRSS")
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def _call(operation: str, case: Case):
    import nbbn

    x, out = np.ones(case.dims, case.dtype), np.ones(case.dims, case.dtype)
    x[::2] = 2
    weight, bias, mean, var = np.ones((4, case.channels), np.float32)
    keywords = {"axis": case.axis, "out": out}
    return {
        "statistics": lambda: nbbn.batch_stats(x, axis=case.axis),
        "training": lambda: nbbn.batch_norm(x, mean, var, weight, bias, training=True, **keywords),
        "evaluation": lambda: nbbn.batch_norm(x, mean, var, weight, bias, **keywords),
        "backward": lambda: nbbn.batch_norm_backward(x, x, mean, var, weight, **keywords),
    }[operation]


def _kilobytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def main(operation: str, case: Case) -> int:
    _call(operation, Case((2, *case.dims[1:]), case.axis, case.dtype))()
    return peak_extra(_call(operation, case))


if __name__ == "__main__":
    print(main(sys.argv[1], Case.parse(sys.argv[2])))
