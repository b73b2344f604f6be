"""Print, as constraints for pip, the lowest versions that pyproject.toml allows, of the package and its tests."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["demo"] + extras["images"] + extras["test"]:
    bound = re.match(r"([\w-]+)>=([\d.]+)", requirement)
    if bound:
        print(f"{bound[1]}=={bound[2]}")
