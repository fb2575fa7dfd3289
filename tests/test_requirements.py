"""What pip may install: versions that were published with malware are excluded, and the pinned ones are inside."""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_lightning_versions_with_malware_are_excluded(version):
    ranges = [each.specifier for each in REQUIREMENTS if normal(each.name) in ("lightning", "pytorch-lightning")]
    assert ranges
    assert not any(each.contains(version) for each in ranges)
    assert all(each.contains("2.6.1") and each.contains("2.6.4") for each in ranges)


def test_every_pinned_version_is_inside_its_range():
    versions = pinned()
    assert versions["lightning"] not in ("2.6.2", "2.6.3")
    found = {each.name: versions[normal(each.name)] for each in REQUIREMENTS if normal(each.name) in versions}
    assert len(found) > 20
    assert all(each.specifier.contains(found[each.name]) for each in REQUIREMENTS if each.name in found)


def test_no_version_of_datasets_that_runs_code_of_a_data_set_is_inside():
    (datasets,) = (each for each in REQUIREMENTS if each.name == "datasets")
    assert not datasets.specifier.contains("3.6.0")


DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "faiss": "faiss-cpu"}
"""What provides a package, where its name is another one."""


def imported():
    """The packages that the product imports, from ``src``, ``callbacks`` and ``datamodules``."""
    for folder, _, names in os.walk(ROOT / "src" / "liveselect", followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module


def test_every_package_that_the_product_imports_is_declared():
    packages = {name.partition(".")[0] for name in imported()} - sys.stdlib_module_names - {"liveselect"}
    assert {"torch", "lightning", "fsspec"} <= packages
    assert {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in packages} <= {n.name for n in REQUIREMENTS}
