# SPDX-License-Identifier: MIT
"""Candidate pairs of SEN12-FLOOD, their splits, and how much of each aligned image there is."""

import sys

import numpy as np
import pytest

from common.errors import DataError
from sarwmix.sen12_data_prep import main, prepare
from tests.helpers.dataset_fixtures import fails_with, needs_samples, one_line, sample_path
from tests.helpers.runs import argv, digests, launch, mpirun, refusal
from tests.helpers.sen12 import (
    S,
    align,
    folder_list,
    image_name,
    kill_midway,
    overwrite,
    rows_of,
    truncate,
    write_image,
    write_list,
    write_raw,
)

pytestmark = pytest.mark.slow

PROGRAM = "sarwmix.sen12_data_prep"
FOLDERS = {"0001": (False, True, False), "0002": (False, False), "0003": (True, True), "7": (False, True)}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The alignment of FOLDERS. Of 0001, image 1 is corrupt; of 7, image 1 lacks 100 pixels of VH and 40 of VV."""
    folder = tmp_path_factory.mktemp("prepare")
    names = write_raw(folder / "raw", FOLDERS)
    truncate(folder / "raw", names["0001"][1])
    align(folder / "raw", folder / "aligned", size=S)
    overwrite(folder / "aligned" / "7" / f"{names['7'][1]}.tif", 40)
    overwrite(folder / "aligned" / "7" / f"{names['7'][1]}.tif", 100, (1,))
    return folder / "aligned"


@pytest.fixture(scope="module")
def prepared(aligned):
    prepare(aligned.parent / "pairs", aligned)
    return aligned.parent / "pairs"


def shown(path):
    """Rows of pairs.csv with the numbers of the images."""
    numbers = {image_name(k): k for k in range(10)}
    return [
        (row["split"], row["folder"], numbers[row["first"]], numbers[row["second"]], row["label"])
        for row in rows_of(path)
    ]


def test_pairs_are_all_of_the_list_with_splits_by_name(prepared):
    assert shown(prepared / "pairs.csv") == [
        ("train", "0001", 0, 1, "1"),
        ("train", "0001", 0, 2, "0"),
        ("train", "0001", 2, 1, "1"),
        ("train", "0002", 0, 1, "0"),
        ("test", "7", 0, 1, "1"),
    ]


def test_images_are_measured(prepared):
    rows = rows_of(prepared / "images.csv")
    assert [(row["folder"], row["image"], row["flooded"]) for row in rows] == [
        ("0001", image_name(0), "0"),
        ("0001", image_name(2), "0"),
        ("0002", image_name(0), "0"),
        ("0002", image_name(1), "0"),
        ("0003", image_name(0), "1"),
        ("0003", image_name(1), "1"),
        ("7", image_name(0), "0"),
        ("7", image_name(1), "1"),
    ]
    assert {(row["height"], row["width"], row["nonfinite"]) for row in rows} == {(str(S), str(S), "0")}
    assert [(float(row["zeros_vh"]), float(row["zeros_vv"])) for row in rows[:-1]] == [(0, 0)] * 7
    assert (float(rows[-1]["zeros_vh"]), float(rows[-1]["zeros_vv"])) == (100 / S**2, 40 / S**2)


def test_dropped_images_and_the_pairs_lost_with_them_are_recorded(prepared):
    image, *pairs = rows_of(prepared / "dropped.csv")
    assert (image["kind"], image["folder"], image["first"], image["second"], image["reason"]) == (
        "image",
        "0001",
        image_name(1),
        "",
        "corrupt",
    )
    assert f"0001/{image_name(1)}_corrected_VV.tif" in image["detail"]
    assert [tuple(row.values()) for row in pairs] == [
        ("pair", "0001", image_name(0), image_name(1), "corrupt", f"{image_name(1)} (corrupt)"),
        ("pair", "0001", image_name(2), image_name(1), "corrupt", f"{image_name(1)} (corrupt)"),
    ]


def test_non_finite_pixels_count_as_zeros(tmp_path):
    names = write_raw(tmp_path / "raw", {"0001": (False, True)})["0001"]
    align(tmp_path / "raw", tmp_path / "aligned", size=S)
    overwrite(tmp_path / "aligned" / "0001" / f"{names[0]}.tif", 64, (2,), np.nan)
    overwrite(tmp_path / "aligned" / "0001" / f"{names[0]}.tif", 32, (2,), np.inf)
    prepare(tmp_path / "pairs", tmp_path / "aligned")
    row = rows_of(tmp_path / "pairs" / "images.csv")[0]
    assert (float(row["zeros_vh"]), float(row["zeros_vv"])) == (0, 64 / S**2)


def test_the_count_of_non_finite_pixels_of_the_sources_is_handed_on(tmp_path):
    names = write_raw(tmp_path / "raw", {"0001": (False, True)})["0001"]
    values = np.full((150, 150), 0.1, np.float32)
    values[70, 70:75] = np.nan
    write_image(tmp_path / "raw", "0001", names[1], vv=values)
    align(tmp_path / "raw", tmp_path / "aligned", size=S)
    prepare(tmp_path / "pairs", tmp_path / "aligned")
    assert [row["nonfinite"] for row in rows_of(tmp_path / "pairs" / "images.csv")] == ["0", "5"]


def test_an_aligned_image_that_is_damaged_is_named_with_the_remedy(aligned, tmp_path):
    (tmp_path / "copy").mkdir()
    launch(["cp", "-r", aligned, tmp_path / "copy"])
    (tmp_path / "copy" / "aligned" / "0002" / f"{image_name(1)}.tif").write_bytes(b"broken")
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "pairs", tmp_path / "copy" / "aligned")
    one_line(error, f"0002/{image_name(1)}.tif", "align.csv", "sarwmix.sen12_align_s1_to_s2")
    assert not (tmp_path / "pairs" / "dropped.csv").exists()


# ---- Lists ---------------------------------------------------------------------------------------


def test_explicit_lists_replace_the_rule(aligned, tmp_path, caplog):
    train, test = (
        folder_list(tmp_path / "train.csv", "7", "0002", "9999"),
        folder_list(tmp_path / "test.csv", "0001", '"0003"'),
    )
    with caplog.at_level("INFO"):
        prepare(tmp_path / "pairs", aligned, train_list=train, test_list=test)
    assert {(row[0], row[1]) for row in shown(tmp_path / "pairs" / "pairs.csv")} == {
        ("test", "0001"),
        ("train", "0002"),
        ("train", "7"),
    }
    assert f"1 folders of {train} are not in the list of images: 9999" in caplog.text
    assert "in neither" not in caplog.text


def test_folders_of_neither_list_are_left_out_and_reported(aligned, tmp_path, caplog):
    train, test = folder_list(tmp_path / "train.csv", "0002"), folder_list(tmp_path / "test.csv", "7")
    with caplog.at_level("INFO"):
        prepare(tmp_path / "pairs", aligned, train_list=train, test_list=test)
    assert "2 folders are in neither list, and are left out: 0001, 0003" in caplog.text
    assert {row["folder"] for row in rows_of(tmp_path / "pairs" / "images.csv")} == {"0002", "7"}
    assert rows_of(tmp_path / "pairs" / "dropped.csv") == []
    assert [row[1] for row in shown(tmp_path / "pairs" / "pairs.csv")] == ["0002", "7"]


@pytest.mark.parametrize(
    "train, test, words",
    (
        (("0001", "7"), ("7",), "1 folders are in both"),
        (("8", "9"), ("7",), "none of its 2 folders"),
        ((), ("7",), "names no folder"),
        (("0001,x",), ("7",), "'0001,x' (line 1)"),
        (("../0001",), ("7",), "line 1"),
    ),
)
def test_lists_that_cannot_be_used_are_refused(train, test, words, aligned, tmp_path):
    train, test = folder_list(tmp_path / "train.csv", *train), folder_list(tmp_path / "test.csv", *test)
    fails_with(lambda: prepare(tmp_path / "pairs", aligned, train_list=train, test_list=test), "train.csv", words)
    assert not (tmp_path / "pairs").exists()


def test_the_list_alone_gives_the_pairs(aligned, prepared, tmp_path, caplog):
    with caplog.at_level("INFO"):
        main(argv("--list_only --s1_list", aligned / "S1list.json", "--out", tmp_path / "pairs"))
    assert (tmp_path / "pairs" / "pairs.csv").read_bytes() == (prepared / "pairs.csv").read_bytes()
    assert digests(tmp_path / "pairs").keys() == {"pairs.csv", "step.json"}
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines() if line.startswith("|")
    ]
    assert table[0] == ["split", "folders", "images", "flooded images", "pairs", "flooded pairs", "lost in alignment"]
    assert table[2:] == [
        ["train", "3", "7", "3", "4", "2", "0"],
        ["test", "1", "2", "1", "1", "1", "0"],
        ["all", "4", "9", "4", "5", "3", "0"],
    ]
    assert "3 of 267 folders for train, 1 of 68 folders for test, 4 of 16,816 candidate pairs for train" in caplog.text


def test_the_table_says_what_was_lost(aligned, tmp_path, caplog):
    with caplog.at_level("INFO"):
        prepare(tmp_path / "pairs", aligned)
    assert [line.split("|")[-2].strip() for line in caplog.text.splitlines() if line.startswith("| ")] == [
        "lost in alignment",
        "2",
        "0",
        "2",
    ]


@needs_samples
def test_the_real_list_has_the_published_number_of_pairs(tmp_path):
    prepare(tmp_path, s1_list=sample_path("sen12flood", "S1list.json"))
    rows = rows_of(tmp_path / "pairs.csv")
    assert [sum(row["split"] == split for row in rows) for split in ("train", "test")] == [16816, 3767]
    assert len({tuple(sorted((row["first"], row["second"]))) + (row["folder"],) for row in rows}) == 20583


# ---- Running again -------------------------------------------------------------------------------


def test_killed_midway_and_run_again_it_leaves_the_same(aligned, prepared, tmp_path):
    out = tmp_path / "pairs"
    command = [sys.executable, "-m", PROGRAM, "--aligned", aligned, "--out", out, "--workers", "2"]
    kill_midway(command, (out / "pairs.csv").exists)
    assert not (out / "dropped.csv").exists()
    launch(command)
    assert digests(out) == digests(prepared)


def test_ranks_and_processes_leave_the_same(aligned, prepared, tmp_path):
    launch(mpirun(sys.executable, "-m", PROGRAM, "--aligned", aligned, "--out", tmp_path / "pairs", "--workers", "2"))
    assert digests(tmp_path / "pairs") == digests(prepared)


def test_complete_pairs_are_left_alone(aligned, prepared, caplog):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    with caplog.at_level("INFO"):
        main(argv("--aligned", aligned, "--out", prepared))
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_another_alignment_or_other_lists_are_refused(aligned, prepared, tmp_path):
    launch(["cp", "-r", aligned, tmp_path])
    with open(tmp_path / "aligned" / "align.csv", "a", encoding="utf-8") as file:
        file.write("9,x,aligned,,,,0\n")
    lists = {
        "train_list": folder_list(tmp_path / "train.csv", "0001"),
        "test_list": folder_list(tmp_path / "test.csv", "7"),
    }
    for source, others in ((tmp_path / "aligned", {}), (aligned, lists)):
        fails_with(lambda: prepare(prepared, source, **others), "--out", "other parameters")


def test_an_alignment_that_is_not_complete_or_of_another_list_is_refused(aligned, tmp_path):
    launch(["cp", "-r", aligned, tmp_path])
    write_list(tmp_path / "other", {"0001": [(image_name(5), False)]})
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "pairs", aligned, s1_list=tmp_path / "other" / "S1list.json")
    one_line(error, "1 of its images are not in", image_name(5))
    (tmp_path / "aligned" / "align.csv").unlink()
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "pairs", tmp_path / "aligned")
    one_line(error, "align.csv: does not exist", "python -m sarwmix.sen12_align_s1_to_s2")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    "flags, words",
    (
        ([], "--aligned is needed"),
        (["--list_only"], "--s1_list"),
        (["--list_only", "--s1_list", "x", "--aligned", "y"], "--aligned"),
        (["--aligned", "x", "--train_list", "y"], "--test_list"),
        (["--aligned", "/no/such"], "/no/such"),
        (["--colour", "red"], "--colour"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert words in refusal(main, [*flags, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
