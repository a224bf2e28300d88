# SPDX-License-Identifier: MIT
"""Imports optional packages where they are used. A missing package is a one-line error."""

from importlib import import_module

from common.errors import DataError

PACK_ELSEWHERE = ", or pack the data on a machine that has it: python -m sarwmix.prepare.pack"


def load(module, work, otherwise=""):
    """Imports and returns a module. Raises DataError if its package is missing or broken.

    work: what needs it ("reading GeoTIFFs"). otherwise: an alternative, for the end of the message.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError, OSError: a shared library cannot be loaded
        top = module.partition(".")[0]
        package = {"osgeo": "gdal"}.get(top, top)
        absent = isinstance(error, ModuleNotFoundError) and error.name == top
        fault = "which is not installed" if absent else f"which cannot be imported ({' '.join(str(error).split())})"
        raise DataError(f"{work} needs {package}, {fault}; pip install {package}{otherwise}") from error
