"""What CI installs is pinned: everything that the extras name, and all that comes along."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
PINS = dict(
    line.split("==")
    for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def direct():
    """The requirements of what CI installs, and what builds it."""
    torch = [r for r in EXTRAS["bench"] if r.startswith("torch==")]
    named = [r for extra in ("demo", "images", "test", "dev", "cuda", "test-cuda") for r in EXTRAS[extra]]
    for text in named + torch + PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        if requirement.name != "nbbn":
            yield requirement


def test_every_pin_is_one_version():
    assert len(PINS) > 40
    for name, version in PINS.items():
        assert name == canonicalize_name(name)
        assert re.fullmatch(r"\d+(\.\d+)*", version), f"{name}: {version}"


def test_pins_cover_and_fit_what_pyproject_names():
    for requirement in direct():
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_pins_cover_what_comes_along():
    """As far as it is installed here."""
    todo, seen = list(direct()), set()
    while todo:
        requirement = todo.pop()
        if requirement.name in seen:
            continue
        seen.add(requirement.name)
        assert canonicalize_name(requirement.name) in PINS, f"{requirement.name} is not pinned: python .ci/pin.py"
        try:
            needs = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        extras = "", *requirement.extras
        todo += [
            need
            for need in map(Requirement, needs)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    assert {"llvmlite", "pluggy"} < seen


def test_the_lowest_versions_are_those_of_pyproject():
    command = [sys.executable, ROOT / ".ci" / "lowest.py"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert {"numba==0.61", "numpy==2.0", "pytest==8"} <= set(lines)
    assert {line.partition("==")[0] for line in lines} >= {
        r.name for r in direct() if r.name in ("hypothesis", "pillow")
    }
