# SPDX-License-Identifier: MIT
"""pyproject.toml, requirements.txt and common/packages.py say the same, and the programs import what they say."""

import ast
import re
import sys
import tomllib

import pytest

from common.packages import EXTRAS, PACKAGES, VERSIONS, how_to_install, package_of
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PROJECT["project"]["dependencies"]
OPTIONAL = PROJECT["project"]["optional-dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
BY_HAND = {"torch", "torchvision", "gdal", "mpi4py"}  # left out of requirements.txt, which says why
FOLDERS = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists())
PROGRAM_FILES = [
    path
    for path in (*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")))
    if "tests" not in path.relative_to(ROOT).parts
]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def by_name(requirements):
    """{name: requirement} of packages of others."""
    return {name_of(line): line for line in requirements if name_of(line) != PROJECT["project"]["name"]}


CORE = by_name(DEPENDENCIES)
EXTRA = by_name(line for extra in OPTIONAL.values() for line in extra)


def test_requirements_are_the_dependencies_and_the_extras():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    everything = {name: line for name, line in {**CORE, **EXTRA}.items() if name not in BY_HAND}
    assert by_name(filter(None, lines)) == everything


def test_no_package_is_both_needed_and_optional():
    assert not CORE.keys() & EXTRA.keys()


def test_every_module_and_package_is_found():
    assert SETUPTOOLS["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    assert [name for name in SETUPTOOLS["packages"]["find"]["include"] if "." not in name] == FOLDERS
    nested = {path.parent.parent.name for folder in FOLDERS for path in (ROOT / folder).glob("*/__init__.py")}
    assert {f"{name}.*" for name in nested} == {n for n in SETUPTOOLS["packages"]["find"]["include"] if "." in n}


def test_errors_name_extras_that_have_the_package():
    assert all(package in by_name(OPTIONAL[extra]) for package, extra in EXTRAS.items())
    assert EXTRA.keys() - by_name(OPTIONAL["test"]).keys() == EXTRAS.keys()
    assert package_of("osgeo.gdal") == "gdal" and package_of("rasterio.warp") == "rasterio"
    assert how_to_install("rasterio.warp") == "pip install rasterio"
    assert how_to_install("sklearn") == "pip install scikit-learn, or pip install -e '.[analysis]' in the checkout"
    assert how_to_install("osgeo") == "pip install gdal==$(gdal-config --version), or run scripts/setup.sh"
    assert VERSIONS.keys() <= EXTRAS.keys() and set(PACKAGES.values()) <= EXTRAS.keys()


def imported_with_the_module(tree):
    """Top-level names that a module imports when it is imported, outside of functions and of `try`."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_every_installation_has(path):
    ours = {*FOLDERS, *(file.stem for file in ROOT.glob("*.py"))}
    found = set(imported_with_the_module(ast.parse(path.read_text()))) - ours - set(sys.stdlib_module_names)
    assert {package_of(name) for name in found} <= CORE.keys()
