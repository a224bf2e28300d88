# SPDX-License-Identifier: MIT
"""What the environment of a notebook, of another installation or of a terminal does to the programs, and packages that are missing."""

import os
import subprocess
import sys

import pytest

from common.startup import missing_package, settle_environment
from tests.helpers import ROOT
from tests.helpers.runs import argv

pytestmark = pytest.mark.slow

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def start(*words, **env):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, text=True, capture_output=True, timeout=300, env={**os.environ, **env}
    )


def test_a_figure_needs_no_backend_and_no_library_the_files_of_another():
    env = {**NOTEBOOK, "PROJ_LIB": "/opt/conda/share/proj", "PROJ_DATA": "/opt", "GDAL_DATA": "/opt", "HOME": "/root"}
    settle_environment(env)
    assert env == {"MPLBACKEND": "agg", "HOME": "/root", "GOMP_SPINCOUNT": "1000"}
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
        env = dict(chosen)
        settle_environment(env)
        assert env == {**chosen, "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """16 patches, simulated where PROJ's variables lead to the folder of another installation, an empty one."""
    folder = tmp_path_factory.mktemp("startup")
    command = argv("-m sarwmix.simulate --out", folder / "scenes", "--patches 16 --test_fraction 0 --workers 1")
    result = start(*command, PROJ_LIB=str(folder), PROJ_DATA=str(folder))
    assert result.returncode == 0, result.stderr
    return folder / "scenes"


def test_pretraining_in_a_notebook_without_utf8_mpi_or_gdal(scenes, tmp_path):
    """A whole run, as `!python main_pretrain.py` starts it, where neither mpi4py nor osgeo can be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mpi4py'] = sys.modules['osgeo'] = None\n")
    small = (
        "--model mixmim_tiny --input_size 64 --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu"
    )
    command = argv("main_pretrain.py --data_path", scenes, "--output_dir", tmp_path / "run", small)
    env = {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", **NOTEBOOK}
    result = start(*command, **env)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert r"8 images \xd7 1 micro-batches" in result.stdout and (tmp_path / "run" / "reconstruction_1.png").exists()


@pytest.mark.parametrize(
    "words",
    (["main_pretrain.py"], ["main_finetune.py", "--help"], ["-m", "sarwmix.prepare.pack"], ["-m", "benchmarks.step"]),
)
def test_outside_of_the_environment_a_line_says_how_to_enter_it(words):
    result = start("-S", *words)  # without the installed packages
    name = " ".join(["python", *words] if words[0] == "-m" else words[:1])
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{name}: error: the package ") and "scripts/setup.sh" in result.stderr
    assert ".venv/bin/activate" in result.stderr


def test_a_python_that_is_too_old_is_told_so():
    result = start(
        "-c",
        "import sys; sys.argv, sys.version_info, sys.version = ['-m'], (3, 9, 2), '3.9.2 (main)'; import common.startup",
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "Python 3.11 or newer is needed" in result.stderr and "3.9.2" in result.stderr


def test_only_packages_of_others_count_as_missing():
    def line(name):
        return missing_package(ModuleNotFoundError("No module", name=name))

    assert "the package torch is missing" in line("torch.nn") and "INSTALL.md" in line("osgeo")
    assert line("util.nothing") is None and line("main_pretrain") is None and line("sqlite3") is None
    assert line(None) is None
    assert missing_package(ImportError("libcudart.so.12: cannot open", name="torch")) is None


def test_where_no_program_of_ours_runs_nothing_is_changed():
    """As in a notebook that imports the packages."""
    code = "import os, sys; hook = sys.excepthook; import sarwmix, util; print(os.environ['MPLBACKEND'], sys.excepthook is hook, sys.stdout.errors)"
    assert (
        start("-c", code, PYTHONIOENCODING="utf-8:strict", **NOTEBOOK).stdout
        == f"{NOTEBOOK['MPLBACKEND']} True strict\n"
    )
