"""What is installed by name: one tested set, within the ranges of setup.py, which end where it was tested."""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


def requirements():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return [Requirement(line) for line in re.findall(r"""^ +["'](\w+>=.*)["'],$""", text, flags=re.MULTILINE)]


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {r.name: r for line in lines if line and not line.startswith("#") for r in [Requirement(line)]}


def test_every_library_has_one_tested_version_within_its_range():
    tested = constraints()
    assert len(requirements()) >= 13
    for required in requirements():
        operators = sorted(one.operator for one in required.specifier)
        assert operators == ["<", ">="], f"{required}: no range"
        (exact,) = tested[required.name].specifier
        assert exact.operator == "==" and exact.version in required.specifier, required


def test_what_is_installed_is_within_the_ranges():
    for required in requirements():
        if required.marker is None or required.marker.evaluate():
            found = importlib.metadata.version(required.name)
            assert SpecifierSet(str(required.specifier), prereleases=True).contains(found), (required, found)
