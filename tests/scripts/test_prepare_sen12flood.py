# SPDX-License-Identifier: MIT
"""scripts/prepare_sen12flood.sh as a user runs it: on two ranks, from another folder, with spaces in its paths."""

import subprocess

import pytest

from sarwmix.prepare import sen12flood
from sarwmix.sen12flood_loader import FloodDataset
from sarwmix.simulate import flood_archive
from tests.helpers import ROOT
from tests.helpers.runs import argv, digests, mpirun

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "prepare_sen12flood.sh"


def run(folder, *flags):
    return subprocess.run(["bash", SCRIPT, *flags], cwd=folder, capture_output=True, text=True, timeout=300)


def test_from_the_zip_to_the_loader_on_two_ranks_and_again(tmp_path):
    pytest.importorskip("osgeo.gdal", reason="GDAL's Python binding is not installed")
    mpirun()  # skips the test where there is none
    folder = tmp_path / "my data"
    flood_archive.main(argv("--out", folder, "--folders 3 --size 128 --workers 1"))
    flags = ("--zip", "SEN12FLOOD.zip", "--work", "my work", "--out=my out", "--size", "128")
    first = run(folder, *flags, "--ranks", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    steps = [line.split()[1] for line in first.stdout.splitlines() if line.startswith("[prepare] ") and "/4 " in line]
    assert steps == ["1/4", "2/4", "3/4", "4/4"]
    assert f"--data_path '{folder}/my out' --finetune" in first.stdout
    assert "| kept |" in first.stderr.replace("   ", " ") and len(FloodDataset(folder / "my out", "train")) > 0
    one = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--size", "128", "--workers", "1"]
    sen12flood.main(argv("--zip", folder / "SEN12FLOOD.zip", one))
    assert digests(tmp_path / "out") == digests(folder / "my out")
    again = run(folder, *flags)
    assert (again.returncode, again.stderr) == (0, "") and "already complete, nothing to do" in again.stdout
    refused = run(folder, *flags, "--max-zeros", "0.3", "--ranks", "2")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "other parameters" in refused.stderr


def test_help_names_every_flag(tmp_path):
    shown = run(tmp_path, "--help")
    assert (
        shown.stderr == ""
        and shown.stdout.startswith("Prepares SEN12-FLOOD, from its archive")
        and "LAUNCH" in shown.stdout
    )
    own = {"-h", "--help", "--relative_to", "--as_rank"}
    for action in sen12flood.get_args_parser()._actions:
        assert own & {*action.option_strings} or any(flag in shown.stdout for flag in action.option_strings), action
