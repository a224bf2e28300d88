# SPDX-License-Identifier: MIT
"""Prepares the process before a program imports anything else: the environment, the Python version, error reports.

The main programs and the packages of `python -m` import this module first. It does nothing where another program
imports them.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Data folders of another installation, exported by a shell or batch job; rasterio and GDAL find their own.
FOREIGN_FOLDERS = ("PROJ_DATA", "PROJ_LIB", "GDAL_DATA", "GDAL_DRIVER_PATH")
SPINS = "1000"  # loops of libgomp, for which a thread waits actively before it sleeps
ENTER = "set up the environment with 'bash scripts/setup.sh' and enter it with 'source .venv/bin/activate'"


def is_program():
    """Whether this process runs a main program, or a module by `python -m`."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return (
        sys.argv[:1] == ["-m"]
        or bool(file)
        and Path(file).resolve() in (ROOT / "main_pretrain.py", ROOT / "main_finetune.py")
    )


def settle_environment(env=os.environ):
    """Selects Matplotlib's file backend and removes the variables that point PROJ and GDAL to another installation.

    Also limits how long PyTorch's threads wait actively for each other, unless the user has: on cores that other
    programs use, a step is many times slower otherwise (docs/PERFORMANCE.md).
    """
    env["MPLBACKEND"] = "agg"
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", SPINS)
    for name in FOREIGN_FOLDERS:
        env.pop(name, None)


def missing_package(error):
    """One line with the remedy, if an import failed because a third-party package is missing; else None."""
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
    """A sys.excepthook that reports a missing package in one line, with exit status 2."""
    line = missing_package(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
        return
    words = sys.orig_argv
    name = f"python -m {words[words.index('-m') + 1]}" if "-m" in words[:-1] else os.path.basename(sys.argv[0])
    sys.stderr.write(f"{name}: error: {line}\n")
    raise SystemExit(2)


if is_program():
    if sys.version_info < (3, 11):  # noqa: UP036 (any Python may start it)
        sys.stderr.write(
            f"error: Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}; {ENTER}\n"
        )
        sys.exit(2)
    settle_environment()
    sys.excepthook = _report
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr, so that every character can be printed
