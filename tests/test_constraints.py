"""The versions of constraints-lowest.txt, on which `make test-lowest` runs, are the lower bounds of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def versions(name):
    """Package -> version of a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pins}


LOWEST, NEWEST = versions("constraints-lowest.txt"), versions("constraints.txt")
NEEDED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["analysis"])]
TOOLS = [item for item in map(Requirement, EXTRAS["dev"]) if item.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", [item for item in NEEDED if item.name != "torch"], ids=str)
def test_the_lower_bound_is_what_is_tested(requirement):
    (bound,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    assert LOWEST[canonicalize_name(requirement.name)] == bound


@pytest.mark.parametrize("name", ["torch", *(item.name for item in TOOLS)])
def test_torch_and_the_tools_are_the_same_in_both(name):
    assert LOWEST[canonicalize_name(name)] == NEWEST[canonicalize_name(name)]


@pytest.mark.parametrize("requirement", [*NEEDED, *TOOLS], ids=str)
def test_the_versions_are_within_the_bounds(requirement):
    for pinned in (LOWEST, NEWEST):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
