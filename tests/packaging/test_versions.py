"""The bounds of pyproject.toml, the committed pins and the lowest versions hold to each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
TOOLS = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    found = {canonicalize_name(package): version for package, version in pairs}
    assert len(found) == len(lines), "each package is pinned once"
    return found


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda each: each.name)
def test_the_lowest_version_is_the_lower_bound(dependency: Requirement) -> None:
    (bound,) = (each.version for each in dependency.specifier if each.operator == ">=")
    lowest = pins("constraints-lowest.txt")[canonicalize_name(dependency.name)]
    assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", lowest), f"{dependency}, tried at {lowest}"


@pytest.mark.parametrize("dependency", [*DEPENDENCIES, *TOOLS], ids=lambda each: each.name)
def test_the_pin_lies_within_the_bounds(dependency: Requirement) -> None:
    assert dependency.specifier.contains(pins("constraints.txt")[canonicalize_name(dependency.name)])


def test_the_page_of_versions_names_both_ends() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    pinned, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for dependency in DEPENDENCIES:
        name = canonicalize_name(dependency.name)
        assert f"| {dependency.name} | {lowest[name]} | {pinned[name]} |" in page
