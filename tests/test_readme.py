"""The front door: its example runs, its commands are those that CI runs, its tables name what exists."""

import doctest
import re
from pathlib import Path

import pytest

import nbbn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert (names["y1"] == names["bn"](names["batch"])[:1]).all()
    assert (names["population"].count == 39 * 64).all()
    assert names["bn"].running_mean == pytest.approx([3] * 64, abs=0.3)


def test_the_sessions_are_what_python_prints():
    sessions = "".join(re.findall(r"```pycon\n(.*?)```", README, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "README.md", "README.md", 0)
    assert len(test.examples) > 5
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_ci_runs_the_two_commands():
    (commands,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for line in commands.splitlines():
        for part in line.partition("#")[0].split("&&"):
            assert part.strip() in ci


def test_what_it_names_exists():
    table = README.partition("## What is in it")[2].partition("## ")[0]
    for name in re.findall(r"^\| `(\w+)", table, re.MULTILINE):
        assert name in nbbn.__all__
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
