"""Pin what CI installs: `python3.11 .ci/pin.py` writes constraints.txt, beside this file.

The newest versions that go together, of everything that pyproject.toml's extras for tests and development bring with
them, and of what builds the package. Run it with the oldest Python that is supported: what installs there does so on
newer ones (a wheel for each: `.ci/versions` finds out). Then run `.ci/run` and look at the difference.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# What .ci/run installs, to the version, with all that comes along: through PIP_CONSTRAINT. Linux, Python 3.11 to 3.13.
# Written by `python3.11 .ci/pin.py`; see there.
"""


def main() -> None:
    """Ask pip what it would install, install nothing, and write it down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    torch = next(r for r in project["project"]["optional-dependencies"]["bench"] if r.startswith("torch=="))
    wanted = [f"{ROOT}[dev,test,test-cuda]", torch, *project["build-system"]["requires"]]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = json.loads(subprocess.run([*command, *wanted], check=True, capture_output=True, text=True).stdout)
    found = (package["metadata"] for package in report["install"])
    # a local version, such as torch's +cpu, belongs to an index, not to us
    pins = {p["name"].lower().replace("_", "-"): p["version"].partition("+")[0] for p in found}
    del pins["nbbn"]
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    (ROOT / ".ci" / "constraints.txt").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
