# SPDX-License-Identifier: MIT
"""The shell scripts where they must refuse: nothing is installed here."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def bare_machine(tmp_path, *commands):
    """A checkout with only what setup.sh reads, and a PATH with only these commands: (folder, environment)."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("bash", "dirname", "cat", "sha256sum", "id", "head", *commands):
        (bin_folder / name).symlink_to(shutil.which(name))
    return tmp_path, {**os.environ, "PATH": str(bin_folder)}


def set_up(folder, env):
    result = subprocess.run(["bash", "scripts/setup.sh"], cwd=folder, env=env, capture_output=True, text=True)
    assert not (folder / ".venv").exists()
    return result.returncode, result.stderr.splitlines()


def test_without_apt_the_missing_packages_are_named(tmp_path):
    folder, env = bare_machine(tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {Path(sys.executable).resolve()} \"$@\"\n")
    python.chmod(0o755)
    status, lines = set_up(folder, {**env, "PYTHON": str(python)})
    assert status == 2 and len(lines) == 1
    assert all(word in lines[0] for word in ("openmpi-bin", "libgdal-dev", "apt-get install", "INSTALL.md"))


def test_without_python_or_with_an_old_one_it_says_so(tmp_path):
    folder, env = bare_machine(tmp_path)
    status, lines = set_up(folder, {**env, "PYTHON": "python3.99"})
    assert status == 2 and len(lines) == 1 and "python3.99" in lines[0]
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    status, lines = set_up(folder, {**env, "PYTHON": str(old)})
    assert status == 2 and len(lines) == 1 and "older than 3.11" in lines[0]


def test_run_local_refuses_a_missing_folder_before_anything(tmp_path):
    result = subprocess.run(["bash", ROOT / "scripts" / "run_local.sh", "--data_path", "no/such/folder"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "no/such/folder" in result.stderr
