# SPDX-License-Identifier: MIT
"""The shell scripts where they must refuse: nothing is installed here."""

import shutil
import subprocess

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


COMMANDS = ("bash", "dirname", "cat", "sha256sum", "head", "sed", "mkdir", "cp")
# An interpreter whose venv is a copy of itself, in which a PyTorch works, and pip installs whatever is asked for.
PYTHON = """#!/bin/bash
if [ "$1" = -m ] || [ "$2" = -m ]; then echo "python $*" >> calls; fi
case "$*" in
    *ensurepip*) exit "${NO_VENV:-0}" ;;
    *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *mpi4py*|*GDAL==*) [ "$1" = -m ] && exit "${NO_COMPILING:-0}"; exit 1 ;;
    *osgeo*) exit 1 ;;
esac
"""


class Machine:
    """A checkout with only what setup.sh reads, and a PATH with few commands; what is started of them stands in `calls`."""

    def __init__(self, folder, uid=1000):
        (folder / "scripts").mkdir()
        (folder / "bin").mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        shutil.copy(ROOT / "requirements.txt", folder)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for name in COMMANDS:
            (folder / "bin" / name).symlink_to(shutil.which(name))
        self.folder, self.env = folder, {"PATH": str(folder / "bin"), "PYTHON": str(folder / "bin" / "python3")}
        self.add("python3", PYTHON)
        self.add("id", f"#!/bin/bash\necho {uid}\n")

    def add(self, name, text):
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def set_up(self, *words, **variables):
        """(exit status, lines on stderr, commands that were started)"""
        (self.folder / "calls").unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", "scripts/setup.sh", *words],
            cwd=self.folder,
            env={**self.env, **variables},
            capture_output=True,
            text=True,
        )
        calls = self.folder / "calls"
        return result.returncode, result.stderr.splitlines(), calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def installed(calls):
    """The words of what pip was asked for."""
    return [
        word
        for call in calls
        if " pip " in call
        for word in call.split()
        if word == "requirements.txt" or "==" in word or "mpi4py>" in word
    ]


def test_without_root_mpi_and_gdal_are_left_out(machine):
    status, lines, calls = machine.set_up()
    assert status == 0 and len(lines) == 1 and installed(calls) == ["requirements.txt"]
    assert all(
        word in lines[0]
        for word in ("warning:", "openmpi-bin", "libgdal-dev", "Pretraining", "apt-get install", "INSTALL.md")
    )
    assert machine.set_up() == (0, [], [])  # all that can be done is done
    machine.add("mpirun", "#!/bin/bash\necho 'mpirun (Open MPI) 4.1.4'\n")
    machine.add("gdal-config", "#!/bin/bash\necho 3.6.2\n")
    assert installed(machine.set_up()[2]) == ["requirements.txt", "mpi4py>=4.0", "mpi4py>=4.0", "GDAL==3.6.2"]


def test_the_minimal_set_up_needs_neither_root_nor_system_packages(machine):
    machine.add("apt-get", '#!/bin/bash\necho "apt-get $*" >> calls\n')
    machine.add("id", "#!/bin/bash\necho 0\n")
    machine.add("mpirun", "#!/bin/bash\necho 'mpirun (Open MPI) 4.1.4'\n")
    machine.add("gdal-config", "#!/bin/bash\necho 3.6.2\n")
    status, lines, calls = machine.set_up("--minimal")
    assert status == 0 and lines == [] and installed(calls) == [] and "pip" in calls[-1] and "-r" in calls[-1]
    assert not any("apt-get" in call for call in calls)
    assert machine.set_up("--minimal") == machine.set_up("--keep_minimal") == (0, [], [])
    (machine.folder / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert installed(machine.set_up("--keep_minimal")[2]) == [] and machine.set_up("--minimal") == (0, [], [])
    calls = machine.set_up()[2]  # completes it
    assert (
        "apt-get update -qq" in calls
        and installed(calls)[0] == "requirements.txt"
        and "GDAL==3.6.2" in installed(calls)
    )


@pytest.mark.parametrize("flag", ["--minimal", "--keep_minimal"])
def test_after_the_full_set_up_the_minimal_one_does_nothing(machine, flag):
    assert installed(machine.set_up(*(["--keep_minimal"] if flag == "--keep_minimal" else []))[2]) == [
        "requirements.txt"
    ]
    assert machine.set_up(flag) == machine.set_up() == (0, [], [])


def test_what_could_not_be_compiled_is_tried_again(machine):
    machine.add("gdal-config", "#!/bin/bash\necho 3.6.2\n")
    for _ in range(2):
        status, lines, calls = machine.set_up(NO_COMPILING="1")
        assert status == 0 and "GDAL's binding could not be compiled" in lines[-1] and "GDAL==3.6.2" in installed(calls)


@pytest.mark.parametrize("works", (True, False))
def test_as_root_all_system_packages_are_installed(tmp_path, works):
    machine = Machine(tmp_path, uid=0)
    makes = "for name in mpirun mpicc gdal-config g++; do cp bin/id bin/$name; done" if works else "exit 100"
    machine.add("env", '#!/bin/bash\nshift\n"$@"\n')
    machine.add("apt-get", f'#!/bin/bash\necho "apt-get $*" >> calls\nif [ "$1" = install ]; then {makes}; fi\n')
    status, lines, calls = machine.set_up()
    assert status == 0
    assert calls[:2] == [
        "apt-get update -qq",
        "apt-get install -y -qq openmpi-bin libopenmpi-dev gdal-bin libgdal-dev build-essential",
    ]
    assert len(lines) == (not works) and ("GDAL==0" in installed(calls)) == works
    assert (machine.set_up()[2] == []) == works  # apt-get is tried again, as its server may be back


def test_what_python_lacks_ends_it(machine):
    status, lines, calls = machine.set_up(NO_VENV="1")
    assert status == 2 and len(lines) == 1 and "python3-venv" in lines[0] and calls == []
    status, lines, _ = machine.set_up(PYTHON="python3.99")
    assert status == 2 and len(lines) == 1 and "python3.99" in lines[0]
    machine.add("old", "#!/bin/sh\nexit 1\n")
    status, lines, _ = machine.set_up(PYTHON=str(machine.folder / "bin" / "old"))
    assert status == 2 and len(lines) == 1 and "older than 3.11" in lines[0] and not (machine.folder / ".venv").exists()


def test_help_and_unknown_words_install_nothing(machine):
    assert machine.set_up("--help") == machine.set_up("-h") == (0, [], [])
    status, lines, calls = machine.set_up("--upgrade")
    assert status == 2 and lines == ["[setup] error: --upgrade: there is no such argument; see --help"] and calls == []
    assert not (machine.folder / ".venv").exists()


def test_run_local_refuses_a_missing_folder_before_anything(tmp_path):
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "run_local.sh", "--data_path", "no/such/folder"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "no/such/folder" in result.stderr
