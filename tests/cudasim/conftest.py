"""Tests on Numba's CUDA simulator, in a process of their own: `NUMBA_ENABLE_CUDASIM=1 pytest tests/cudasim`."""

import os

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    import device_arrays
    import simulator

    simulator.install()
    device_arrays.register()
else:
    collect_ignore_glob = ["test_*.py"]
