"""What a report says about the machine it was measured on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import cpuinfo
import numba
from llvmlite import binding
from peers import WAITING

import nbbn

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

#: Where the system does not say: that of a common desktop processor.
_USUAL_CACHE = 32 * 2**20


def describe() -> dict[str, Any]:
    """Call it after the measurements: the first parallel call decides on the threading layer."""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = "not started"
    return {
        # the name that LLVM compiles for says more than the brand of a virtual machine
        "cpu": f"{cpuinfo.get_cpu_info().get('brand_raw', platform.machine())} ({binding.get_host_cpu_name()})",
        "cores": os.cpu_count(),
        "threads": nbbn.get_num_threads(),
        "threading_layer": layer,
        "last_level_cache": last_level_cache(),
        "environment": {name: os.environ.get(name) for name in WAITING},
        "system": platform.system(),
    }


def last_level_cache(folder: Path = _CACHES) -> int:
    """Bytes of the largest cache."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=_USUAL_CACHE)


def slug(about: dict[str, Any]) -> str:
    """A file name for this machine: letters, digits and dashes."""
    words = f"{about['cpu']} {about['cores']} cores {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
