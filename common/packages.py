# SPDX-License-Identifier: MIT
"""Packages that a machine can do without, as long as nothing needs them: imported where they are used, or one line."""

from importlib import import_module

from common.errors import DataError

PACK_ELSEWHERE = ", or pack the data on a machine that has it: python -m sarwmix.prepare.pack"


def load(module, work, otherwise=""):
    """The module of this name. Raises DataError if its package is absent or broken.

    work: what needs it ("reading GeoTIFFs"); otherwise: a way without it, for the end of the message.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # the latter where a library that it needs cannot be loaded
        package = {"osgeo": "gdal"}.get(module.partition(".")[0], module.partition(".")[0])
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        fault = "which is not installed" if absent else f"which cannot be imported ({' '.join(str(error).split())})"
        raise DataError(f"{work} needs {package}, {fault}; pip install {package}{otherwise}") from error
