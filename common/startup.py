# SPDX-License-Identifier: MIT
"""What every program does before it imports anything else, so that nothing in its environment ends it.

The main programs and the packages of `python -m` import this module first. Where another program imports them, nothing happens.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders of another installation, which its shell or its batch job exported; rasterio and GDAL find their own.
OF_OTHERS = ("PROJ_DATA", "PROJ_LIB", "GDAL_DATA", "GDAL_DRIVER_PATH")
ENTER = "set up the environment with 'bash scripts/setup.sh' and enter it with 'source .venv/bin/activate'"


def is_program():
    """Whether this process is one of our programs: a main program, or what `python -m` is about to run."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return (
        sys.argv[:1] == ["-m"]
        or bool(file)
        and Path(file).resolve() in (ROOT / "main_pretrain.py", ROOT / "main_finetune.py")
    )


def settle_environment(env=os.environ):
    """Select Matplotlib's file backend, whatever a notebook exported, and leave PROJ and GDAL to the libraries that bring them."""
    env["MPLBACKEND"] = "agg"
    for name in OF_OTHERS:
        env.pop(name, None)


def missing_package(error):
    """One line, with the remedy, about an import that failed for want of a package of others; None about any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if (
        not package
        or package in sys.stdlib_module_names
        or (ROOT / package).is_dir()
        or (ROOT / f"{package}.py").exists()
    ):
        return None
    remedy = "INSTALL.md says what it needs and how it is installed" if package in ("mpi4py", "osgeo") else ENTER
    return f"the package {package} is missing in {sys.executable}; {remedy}"


def _report(kind, error, trace):
    """A sys.excepthook to which a missing package is one line and exit status 2."""
    line = missing_package(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
        return
    words = sys.orig_argv
    name = f"python -m {words[words.index('-m') + 1]}" if "-m" in words[:-1] else os.path.basename(sys.argv[0])
    sys.stderr.write(f"{name}: error: {line}\n")
    raise SystemExit(2)


if is_program():
    if sys.version_info < (3, 11):  # noqa: UP036 (it may be started with any)
        sys.stderr.write(
            f"error: Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}; {ENTER}\n"
        )
        sys.exit(2)
    settle_environment()
    sys.excepthook = _report
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: what its encoding lacks is no error
