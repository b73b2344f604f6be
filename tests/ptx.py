"""Compile kernels to PTX and assemble them without a GPU, and say what is wrong with what came out."""

import re
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

_FLOATS = {"momentum", "eps", "divisor", "floor"}


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and what the assembler said (None: there is none here)."""

    ptx: str
    registers: int | None
    local_bytes: int | None


def compile_kernel(function, architecture):
    """PTX of a kernel, all of whose arguments are integers or float64, for (8, 0) or (9, 0)."""
    import numba.cuda.dispatcher as dispatcher
    from numba import cuda, float64, int64

    # device functions ask for the current device while compiling: answer for it where there is no driver
    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=architecture)
    try:
        arguments = tuple(float64 if name in _FLOATS else int64 for name in signature(function).parameters)
        ptx, _ = cuda.compile_ptx(function, arguments, cc=architecture)
    finally:
        dispatcher.get_current_device = before
    return Compiled(ptx, *assemble(ptx, architecture))


def assembler():
    """The assembler from the pip wheels, else one on the PATH, else None."""
    for folder in map(Path, sys.path):
        for found in (*folder.glob("nvidia/cu*/bin/ptxas"), *folder.glob("nvidia/cuda_nvcc/bin/ptxas")):
            return str(found)
    return shutil.which("ptxas")


def assemble(ptx, architecture):
    """Registers a thread, and bytes of local memory (stack and spills)."""
    program = assembler()
    if program is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"-arch=sm_{architecture[0]}{architecture[1]}"
        run = subprocess.run(
            [program, name, "-v", str(source), "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True
        )
    if run.returncode:
        raise RuntimeError(run.stderr)
    said = run.stderr
    local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)))
    return int(re.findall(r"Used (\d+) registers", said)[0]), local


def loops(ptx):
    """The instructions of every innermost loop: from a label to the last branch back to it, without one inside."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line[:-1]: n for n, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
    spans = set()
    for n, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if target and labels.get(target[1], n) < n:
            spans.add((labels[target[1]], n))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[start : end + 1] for start, end in sorted(inner)]


def faults(compiled, vector, is_narrow, stores):
    """What is wrong: `vector` is the wide access it was designed for ("v4", "v2", None), `stores` whether it writes."""
    ptx = compiled.ptx
    found = []
    if compiled.local_bytes:
        found.append(f"{compiled.local_bytes} bytes of local memory")
    if re.search(r"\.local\b", ptx):
        found.append("local memory in PTX")
    hot = [loop for loop in loops(ptx) if any(re.search(r"\bld\.global\.v\d", line) for line in loop)]
    if vector:
        if not any(f"ld.global.{vector}." in line for loop in hot for line in loop):
            found.append(f"no {vector} load in a loop")
        if stores and not any(f"st.global.{vector}." in line for loop in hot for line in loop):
            found.append(f"no {vector} store in a loop")
        if is_narrow:
            wide = [line for loop in hot for line in loop if ".f64" in line]
            if wide:
                found.append(f"float64 in a float32 loop: {wide[0]}")
    # nvvm keeps calls to functions that it does not know: they would fail at the first launch
    if re.search(r"\.extern \.func", ptx):
        found.append("a call to a function that nobody has")
    return found
