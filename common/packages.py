# SPDX-License-Identifier: MIT
"""Imports optional packages where they are used. A missing package is a one-line error."""

from importlib import import_module

from common.errors import DataError

PACK_ELSEWHERE = ", or pack the data on a machine that has it: python -m sarwmix.prepare.pack"
# Module → the package that holds it, where the names differ.
PACKAGES = {"osgeo": "gdal", "sklearn": "scikit-learn"}
# Package that not every installation has → the extra of pyproject.toml that installs it.
EXTRAS = {
    "gdal": "gdal",
    "geopandas": "maps",
    "lmdb": "lmdb",
    "mpi4py": "mpi",
    "scikit-learn": "analysis",
    "zarr": "zarr",
}
# Package → its version in a pip command, where any other does not work.
VERSIONS = {"gdal": "==$(gdal-config --version)"}


def package_of(module):
    """The name under which pip knows the package of a module: "osgeo.gdal" → "gdal"."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def how_to_install(module):
    """The remedy for a missing module: "pip install lmdb, or pip install -e '.[lmdb]' in the checkout"."""
    package = package_of(module)
    remedy = f"pip install {package}{VERSIONS.get(package, '')}"
    if package in VERSIONS:
        return f"{remedy}, or run scripts/setup.sh"
    return remedy + (f", or pip install -e '.[{EXTRAS[package]}]' in the checkout" if package in EXTRAS else "")


def load(module, work, otherwise=""):
    """Imports and returns a module. Raises DataError if its package is missing or broken.

    work: what needs it ("reading GeoTIFFs"). otherwise: an alternative, for the end of the message.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError, OSError: a shared library cannot be loaded
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        fault = "which is not installed" if absent else f"which cannot be imported ({' '.join(str(error).split())})"
        raise DataError(f"{work} needs {package_of(module)}, {fault}; {how_to_install(module)}{otherwise}") from error
