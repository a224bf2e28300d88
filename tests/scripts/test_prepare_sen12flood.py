# SPDX-License-Identifier: MIT
"""scripts/prepare_sen12flood.sh from a simulated archive to data that the loader reads, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest

import main_finetune
from sarwmix.prepare import pack
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers import ROOT
from tests.helpers.runs import digests, launch
from tests.helpers.sen12 import kill_midway

pytest.importorskip("osgeo.gdal", reason="GDAL's Python binding is not installed")
SCRIPT = ROOT / "scripts" / "prepare_sen12flood.sh"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A folder whose name has a space, with "my flood.zip" and the same files unzipped in SEN12FLOOD; 128 pixels, faults in them."""
    folder = tmp_path_factory.mktemp("prepare") / "my data"
    launch(
        [
            sys.executable,
            "-m",
            "sarwmix.simulate.flood_archive",
            "--out",
            folder,
            "--folders",
            4,
            "--size",
            128,
            "--keep_tree",
        ]
    )
    (folder / "SEN12FLOOD.zip").rename(folder / "my flood.zip")
    return folder


def prepare(folder, *flags, env=None, status=0):
    """Run the script in a folder; returns its output and its messages."""
    result = subprocess.run(
        ["bash", SCRIPT, *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout, result.stderr


SMALL = ("--size", 128, "--workers", 2)


@pytest.fixture(scope="module")
def made(archive):
    """What the script makes of the zip, named by relative paths with spaces."""
    output, messages = prepare(archive, "--zip", "my flood.zip", "--work", "my work", "--out", "my out", *SMALL)
    return archive / "my out", output, messages


def test_from_the_zip_to_the_loader(made, archive):
    out, output, messages = made
    faults = json.loads((archive / "faults.json").read_text())
    dropped = (out / "dropped.csv").read_text()
    for kind, reason in (
        ("single_polarisation", "single polarisation"),
        ("partial_cover", "too many zeros"),
        ("corrupt", "corrupt"),
        ("missing", "missing file"),
    ):
        assert f"image,{faults[kind]['folder']},{faults[kind]['filename']},,{reason}," in dropped
    for kind in ("small_gap", "nonfinite"):
        assert f"image,{faults[kind]['folder']},{faults[kind]['filename']}," not in dropped
    said = json.loads((out / "preparation.json").read_text())
    for split in ("train", "test"):
        data = FloodDataset(out, split)
        data.check_files()
        data.check_units()
        assert data.size == 128 and len(data) == said["counts"][split]["kept"] > 0
    assert (said["counts"]["train"]["candidates"], said["counts"]["test"]["candidates"]) == (16, 5)
    assert (
        "my\\ out" in output
        and "python main_finetune.py --dataset sen12flood" in output
        and "| kept |" in messages.replace("   ", " ")
    )


def test_a_classifier_is_trained_on_it_and_on_a_packed_store_of_it(made, tmp_path, program):
    pack.main(
        [
            "--dataset",
            "sen12flood",
            "--data_path",
            str(made[0]),
            "--dtype",
            "float32",
            "--out",
            str(tmp_path / "store"),
            "--workers",
            "1",
        ]
    )
    logs = []
    for name, data in (("files", made[0]), ("packed", tmp_path / "store")):
        status, _, err = program(
            main_finetune,
            "--dataset",
            "sen12flood",
            "--finetune",
            "",
            "--model",
            "mixmim_tiny",
            "--batch_size",
            2,
            "--epochs",
            1,
            "--warmup_epochs",
            0,
            "--num_workers",
            0,
            "--data_path",
            data,
            "--output_dir",
            tmp_path / name,
        )
        assert status == 0, err
        logs.append(json.loads((tmp_path / name / "log.txt").read_text()))
    assert logs[0]["train_loss"] == logs[1]["train_loss"] and logs[0]["test_accuracy"] == logs[1]["test_accuracy"]
    assert (tmp_path / "files" / "checkpoint_best.pth").exists()


def test_only_the_work_is_removed(made, archive):
    assert (archive / "my flood.zip").exists() and (archive / "SEN12FLOOD" / "S1list.json").exists()
    assert list((archive / "my work").iterdir()) == []


def test_again_there_is_nothing_to_do(made, archive):
    before = {path: path.stat().st_mtime_ns for path in made[0].rglob("*")}
    output, messages = prepare(archive, "--zip=my flood.zip", "--work", "my work", "--out", "my out", *SMALL)
    assert "complete already, nothing to do" in output and messages == ""
    assert {path: path.stat().st_mtime_ns for path in made[0].rglob("*")} == before and list(
        (archive / "my work").iterdir()
    ) == []


@pytest.mark.parametrize(
    "change, words",
    (
        (["--max-zeros", "0.3"], "max_zeros"),
        (["--layout", "npy"], "layout"),
        (["--resampling", "nearest"], "resampling"),
        (["--size", "256"], "size"),
        (["--units", "dB"], "units"),
        (["--s1-list", "other.json"], "s1_list"),
    ),
)
def test_again_with_other_parameters_is_refused(change, words, made, archive):
    before = digests(made[0])
    (archive / "other.json").write_text("{}")
    output, messages = prepare(
        archive, "--zip", "my flood.zip", "--work", "my work", "--out", "my out", *SMALL, *change, status=2
    )
    assert messages.count("\n") == 1 and "other parameters" in messages and words in messages
    assert digests(made[0]) == before and not list((archive / "my work").iterdir())


def test_unzipped_data_on_two_ranks_give_the_same_and_stay(made, archive, tmp_path):
    raw = digests(archive / "SEN12FLOOD")
    flags = (
        "--raw-root",
        "SEN12FLOOD",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out",
        "--size",
        128,
        "--ranks",
        2,
    )
    prepare(archive, *flags, "--keep-intermediate")
    assert digests(tmp_path / "out") == digests(made[0]) and digests(archive / "SEN12FLOOD") == raw
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"aligned", "pairs"}
    output, _ = prepare(archive, *flags)  # the wish to keep them is gone
    assert "nothing to do" in output and not list((tmp_path / "work").iterdir())
    assert digests(archive / "SEN12FLOOD") == raw


def test_a_raw_root_in_the_work_folder_stays(archive, tmp_path):
    """As --zip would have left it: then it is the user's."""
    launch(
        [
            sys.executable,
            "-m",
            "sarwmix.prepare.sen12_unzip",
            "--zip",
            archive / "my flood.zip",
            "--out",
            tmp_path / "work" / "raw",
        ]
    )
    raw = digests(tmp_path / "work" / "raw")
    prepare(tmp_path, "--raw-root", "work/raw", "--work", "work", "--out", "out", *SMALL)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["raw"] and digests(
        tmp_path / "work" / "raw"
    ) == raw


def test_launch_replaces_the_launcher_and_lists_and_layout_are_handed_on(archive, tmp_path):
    (tmp_path / "launcher").write_text('#!/bin/sh\necho "$@" >> "$LOG"\nshift\nexec "$@"\n')
    (tmp_path / "launcher").chmod(0o755)
    (tmp_path / "train.csv").write_text("0003\n1\n")
    (tmp_path / "test.csv").write_text("0002\n")
    prepare(
        tmp_path,
        "--zip",
        archive / "my flood.zip",
        "--work",
        "work",
        "--out",
        "out",
        *SMALL,
        "--layout",
        "npy",
        "--train-list",
        "train.csv",
        "--test_list",
        "test.csv",
        env={"LAUNCH": f"{tmp_path / 'launcher'} -x", "LOG": str(tmp_path / "log")},
    )
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split("sarwmix.")[1].split()[0] for line in lines] == [
        "prepare.sen12_unzip",
        "sen12_align_s1_to_s2",
        "sen12_data_prep",
        "sen12_prune_partial_pairs",
    ]
    assert all(line.startswith("-x ") and line.endswith("--workers 2") for line in lines)
    assert {*FloodDataset(tmp_path / "out", "train").groups} == {"0003", "1"}
    assert {*FloodDataset(tmp_path / "out", "test").groups} == {"0002"}
    assert not (tmp_path / "out" / "images").exists()


def test_killed_midway_and_run_again_it_leaves_the_same(made, archive, tmp_path):
    flags = ["--zip", archive / "my flood.zip", "--work", tmp_path / "work", "--out", tmp_path / "out", *SMALL]
    kill_midway(["bash", SCRIPT, *flags], lambda: len(list(tmp_path.glob("work/aligned/*/*.tif"))) >= 2)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path, *flags)
    assert digests(tmp_path / "out") == digests(made[0]) and not list((tmp_path / "work").iterdir())


def test_stopped_while_removing_it_removes_the_rest(made, archive, tmp_path):
    for name in (".removing-raw", "aligned", "mine"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "file").write_text("")
    (tmp_path / "work" / "aligned" / "step.json").write_text("{}")
    output, _ = prepare(archive, "--zip", "my flood.zip", "--work", tmp_path / "work", "--out", "my out", *SMALL)
    assert "nothing to do" in output and [path.name for path in (tmp_path / "work").iterdir()] == ["mine"]


def test_too_little_room_is_found_before_anything_is_written(archive, tmp_path):
    output, messages = prepare(
        archive,
        "--zip",
        "my flood.zip",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out",
        "--size",
        128000,
        status=2,
    )
    assert (
        "make room" in messages.splitlines()[-1]
        and not (tmp_path / "work").exists()
        and not (tmp_path / "out").exists()
    )


ZIP, WORK = ["--zip", "my flood.zip"], ["--work", "w", "--out", "o"]


@pytest.mark.parametrize(
    "flags, words",
    (
        ([], "--zip, or --raw-root"),
        ([*ZIP, *WORK, "--raw-root", "SEN12FLOOD"], "give one of them"),
        ([*ZIP, "--work", "w"], "--out is needed"),
        ([*ZIP, "--out", "o"], "--work is needed"),
        ([*WORK, "--zip"], "--zip needs a value"),
        ([*WORK, "--zip="], "--zip needs a value"),
        ([*WORK, "--zip", "none.zip"], "none.zip"),
        ([*WORK, "--raw-root", "none"], "none: there is no such folder"),
        ([*ZIP, *WORK, "--s1-list", "none.json"], "none.json"),
        ([*ZIP, *WORK, "--colour", "red"], "--colour"),
        ([*ZIP, *WORK, "red"], "red: is no flag"),
        ([*ZIP, *WORK, "--layout", "zarr"], "images npy"),
        ([*ZIP, *WORK, "--resampling", "cubic"], "bilinear nearest average"),
        ([*ZIP, *WORK, "--units", "power"], "linear dB"),
        ([*ZIP, *WORK, "--size", "big"], "--size big"),
        ([*ZIP, *WORK, "--ranks", "0"], "--ranks 0"),
        ([*ZIP, *WORK, "--workers", "-1"], "--workers -1"),
        ([*ZIP, *WORK, "--max_zeros", "2"], "--max_zeros 2"),
        ([*ZIP, *WORK, "--size", "200"], "multiple of 128"),
        ([*ZIP, *WORK, "--train-list", "faults.json"], "go together"),
        ([*ZIP, *WORK, "--test-list", "faults.json"], "go together"),
        ([*ZIP, "--work", "o/w", "--out", "o"], "lies in --out"),
        ([*ZIP, "--work", "w", "--out", "w/pairs/o"], "which is filled and removed"),
        ([*ZIP, "--work", "w", "--out", "SEN12FLOOD"], "not empty"),
        (["--raw-root", "SEN12FLOOD", "--work", "SEN12FLOOD/w", "--out", "o"], "lies in --raw-root"),
        (["--raw-root", "SEN12FLOOD/0001", *WORK], "--s1-list"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(flags, words, archive):
    output, messages = prepare(archive, *flags, status=2)
    assert output == "" and messages.count("\n") == 1 and words in messages
    assert not (archive / "w").exists() and not (archive / "o").exists()


def test_help_names_every_flag(tmp_path):
    output, messages = prepare(tmp_path, "--help")
    assert messages == "" and output.startswith("SEN12-FLOOD from its archive")
    for flag in (
        "--zip",
        "--raw-root",
        "--work",
        "--out",
        "--layout",
        "--resampling",
        "--units",
        "--max_zeros",
        "--size",
        "--s1-list",
        "--train-list",
        "--test-list",
        "--keep-intermediate",
        "--workers",
        "--ranks",
        "LAUNCH",
    ):
        assert flag in output
