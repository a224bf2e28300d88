# SPDX-License-Identifier: MIT
"""How much of a published dataset is there: the table of counts, the phrases, and the programs that log them."""

import csv
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from sarwmix.bigearthnetv2 import SNOW_CLOUD, BigEarthNetv2
from sarwmix.listing import EVERY
from sarwmix.packed import PackedDataset
from sarwmix.prepare import benv1_to_zarr, benv2_csv, completeness, pack, statistics
from sarwmix.prepare.completeness import COMPLETE, COUNTS_TABLE, complete_count, counts_beside, published
from sarwmix.prepare.sen12_index import log_list, read_s1_list
from sarwmix.registry import DATASETS, log_amount
from sarwmix.simulate.patches import main as simulate
from tests.helpers.dataset_fixtures import needs_samples, s1_name, sample_path, v2_frame, write_v1, write_v2
from tests.helpers.floods import write_floods
from tests.helpers.runs import argv
from tests.helpers.stores import loader_flags
from util.datasets import check_data
from util.distributed import Launch, Ranks

ALONE = Ranks(Launch(), torch.device("cpu"))
MEASURED, SIMULATED = s1_name(1), "S1A_IW_GRDH_1SDV_20000101T001500_33UUP_3_4"


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def small(monkeypatch):
    """Complete datasets of a few samples: of v2 3 of 10 are in no split list, of v1 2 of 6."""
    counts = {
        "benv2": {"patches": {"train": 4, "val": 2, "test": 1, EVERY: 10}},
        "benv1": {"patches": {"train": 2, "val": 1, "test": 1, EVERY: 6}},
        "sen12flood": {"candidate pairs": {"train": 4, "test": 3}, "folders": {"train": 2, "test": 1}},
    }
    monkeypatch.setattr(completeness, "COMPLETE", counts)


def lines(caplog, start=""):
    """(level, text) of the lines that start so; clears the log."""
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return [(level, text) for level, text in found if text.startswith(start)]


# ---- The table -----------------------------------------------------------------------------------


def test_the_published_numbers():
    assert complete_count("benv2", "all") == 480_038 and complete_count("benv2", "train_val") == 360_213
    assert complete_count("benv2", EVERY) - complete_count("benv2", "all") == 69_450
    assert complete_count("benv1", "all") == 519_284 and complete_count("benv1", EVERY) == 590_326
    assert complete_count("sen12flood", "all") == complete_count("sen12flood", EVERY) == 20_583
    assert complete_count("sen12flood", EVERY, what="folders") == 335
    assert (
        complete_count("sen12flood", "val") is complete_count("chips", "train") is complete_count(None, "all") is None
    )


def test_every_number_has_a_source():
    with open(COUNTS_TABLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and int(row["count"]) > 0 for row in rows)
    assert len({(row["dataset"], row["what"], row["split"]) for row in rows}) == len(rows)
    assert {row["dataset"] for row in rows} == COMPLETE.keys() <= DATASETS.keys()


# ---- Phrases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset, split, found, phrase",
    [
        ("benv2", "train", 1024, "1,024 of 237,871 patches (0.4 % of the complete split)"),
        ("benv2", "train", 0, "0 of 237,871 patches (0.0 % of the complete split)"),
        ("benv2", "train", 2, "2 of 237,871 patches (less than 0.1 % of the complete split)"),
        ("benv2", "train", 237_870, "237,870 of 237,871 patches (99.9 % of the complete split)"),
        ("benv2", "train", 237_871, "237,871 patches, complete"),
        ("benv2", "all", 480_038, "480,038 patches, complete"),
        ("benv2", "all", 500_000, "500,000 of 549,488 patches (90.9 % of the complete dataset)"),
        ("benv2", "all", 549_488, "549,488 patches, complete"),
        ("benv2", "all", 549_489, "549,489 patches, more than the 549,488 of the complete dataset"),
        (
            "benv2",
            "val",
            122_343,
            "122,343 patches, more than the 122,342 of the complete split, which leaves out patches with snow, cloud or "
            "shadow",
        ),
        ("sen12flood", "test", 3768, "3,768 candidate pairs, more than the 3,767 of the complete split"),
        ("sen12flood", "val", 12, "12 candidate pairs"),
        (None, "train", 1024, "1,024 samples"),
    ],
)
def test_completeness(dataset, split, found, phrase):
    assert completeness.completeness(dataset, split, found) == phrase


def test_counts_side_by_side():
    found = {("folders", "train"): 267, ("folders", "test"): 60, ("images", EVERY): 4000}
    assert counts_beside("sen12flood", found) == (
        "267 folders for train, 60 of 68 folders for test, 4,000 instead of 3,957 images"
    )
    assert counts_beside("sen12flood", {("folders", EVERY): 335}) == "335 folders: complete"
    assert counts_beside(None, {("folders", EVERY): 335}) == "335 folders"


def test_simulated_names_have_no_complete_dataset():
    assert published("benv2", [MEASURED, "patch"]) == "benv2" and published("benv2", [MEASURED, SIMULATED]) is None


# ---- Before training -----------------------------------------------------------------------------


def split_of(size, split="train", packed_as=(), metadata=("metadata.parquet",)):
    packed_of = {"manifest": {"splits": dict.fromkeys(packed_as, size)}} if packed_as else {}
    return type("Split", (SimpleNamespace,), {"__len__": lambda self: size})(
        split=split, metadata=metadata, is_packed=bool(packed_as), **packed_of
    )


@pytest.mark.parametrize(
    "name, dataset, snow, level, text",
    [
        ("benv2", split_of(1), False, "INFO", "data: benv2 train: 1 of 4 patches (25.0 % of the complete split)"),
        ("benv2", split_of(4), False, "INFO", "data: benv2 train: 4 patches, complete"),
        ("benv2", split_of(5), False, "WARNING", "data: benv2 train: 5 patches, more than the 4 of the complete split"),
        ("benv2", split_of(7), True, "INFO", "data: benv2 train: 7 patches, more than the 4 of the complete split"),
        ("benv2", split_of(8), True, "WARNING", "data: benv2 train: 8 patches, more than the 4 of the complete split"),
        ("benv2", split_of(7, packed_as=("train",)), False, "INFO", "data: benv2 train: 7 patches, more than the 4"),
        ("benv2", split_of(8, packed_as=("train",)), False, "WARNING", "data: benv2 train: 8 patches, more than"),
        (
            "benv2",
            split_of(11, "all"),
            True,
            "WARNING",
            "data: benv2 all: 11 patches, more than the 10 of the complete",
        ),
        ("benv1", split_of(4, "all", metadata=[]), False, "INFO", "data: benv1 all: 4 of 6 patches (66.6 %"),
        ("benv1", split_of(6, "train_val", (EVERY,)), False, "INFO", "data: benv1 train_val: 6 patches, complete"),
        ("sen12flood", split_of(5), False, "WARNING", "data: sen12flood train: 5 candidate pairs, more than the 4"),
    ],
)
def test_a_split_is_compared(small, caplog, name, dataset, snow, level, text):
    count = log_amount(name, dataset, False, snow)
    (found,) = lines(caplog, text)
    assert found[0] == level and ("check whether the lists repeat" in found[1]) == (level == "WARNING")
    assert count == complete_count(name, EVERY if name == "benv1" else dataset.split, len(dataset))


@pytest.mark.parametrize(
    "name, dataset, simulated",
    [("benv2", split_of(3), True), ("chips", split_of(3), False), ("sen12flood", split_of(3, "val"), False)],
)
def test_nothing_is_said_of_simulated_images_and_ones_own(small, caplog, name, dataset, simulated):
    assert log_amount(name, dataset, simulated) is None and not lines(caplog)


def checked(dataset, name):
    """The record that `check_data` returns for run.json, as it is written."""
    flags = loader_flags(dataset=name, check_files="all", mean=(-20, -10), std=(5, 5), input_size=128)
    return json.loads(json.dumps(check_data(dataset, flags, ALONE)))


def test_a_run_records_the_number_of_the_complete_split(small, tmp_path, caplog):
    record = checked(BigEarthNetv2(write_v2(tmp_path), "train"), "benv2")
    assert (record["samples"], record["complete"]) == (2, 4)
    assert lines(caplog, "data: ") == [("INFO", "data: benv2 train: 2 of 4 patches (50.0 % of the complete split)")]
    pack.main(argv("--dataset benv2 --workers 1 --data_path", tmp_path, "--out", tmp_path / "store"))
    assert [text for _, text in lines(caplog, "split ")] == [
        "split train: 2 of 4 patches (50.0 % of the complete split)",
        "split val: 1 of 2 patches (50.0 % of the complete split)",
        "split test: 1 patches, complete",
    ]
    assert checked(PackedDataset(tmp_path / "store", "test"), "benv2")["complete"] == 1
    assert lines(caplog, "data: ") == [("INFO", "data: benv2 test: 1 patches, complete")]


def test_simulated_patches_are_recorded_without_it(small, tmp_path, caplog):
    simulate(argv("--patches 8 --workers 1 --out", tmp_path / "simulated"))
    lines(caplog)
    record = checked(BigEarthNetv2(tmp_path / "simulated", "all"), "benv2")
    assert record["simulated"] and "complete" not in record and not lines(caplog, "data: ")
    benv2_csv.main(argv("--metadata", tmp_path / "simulated" / "metadata.parquet", "--out", tmp_path / "lists"))
    assert [text.rpartition(": ")[2].split()[1:] for _, text in lines(caplog, str(tmp_path))] == [["samples"]] * 4


# ---- Preparation ---------------------------------------------------------------------------------


def test_lists_of_v2(small, tmp_path, caplog):
    frame = v2_frame().assign(s2v1_name="x", contains_cloud_or_shadow=False)
    frame.iloc[:3].to_parquet(tmp_path / "metadata.parquet")
    frame.iloc[3:].to_parquet(tmp_path / SNOW_CLOUD)
    flags = argv("--metadata", tmp_path / "metadata.parquet", "--out")
    benv2_csv.main([*flags, str(tmp_path / "clear")])
    assert lines(caplog, str(tmp_path / "clear" / "benv2_test.csv"))[0][1].endswith(".csv: 1 patches, complete")
    completeness.COMPLETE["benv2"]["patches"]["train"] = 1
    benv2_csv.main([*flags, str(tmp_path / "snow"), "--include_snow_cloud"])
    assert [(level, text.split(": ")[1]) for level, text in lines(caplog, str(tmp_path / "snow" / "benv2_train."))] == [
        (
            "INFO",
            "2 patches, more than the 1 of the complete split, which leaves out patches with snow, cloud or shadow",
        )
    ]


def test_conversion_of_v1(small, tmp_path, caplog):
    write_v1(tmp_path)
    flags = argv("--workers 1 --root", tmp_path, "--out")
    benv1_to_zarr.main([*flags, str(tmp_path / "whole")])
    assert lines(caplog, "no split lists")[0][1].endswith("is written: 3 of 6 patches (50.0 % of the complete dataset)")
    (tmp_path / "two.csv").write_text(f"{s1_name(0)}\n{s1_name(1)}\n")
    benv1_to_zarr.main([*flags, str(tmp_path / "some"), "--val", str(tmp_path / "two.csv")])
    ((level, text),) = lines(caplog, str(tmp_path / "some" / "benv1_val.csv"))
    assert level == "WARNING" and "2 of 2 listed patches: 2 patches, more than the 1 of the complete split" in text


def test_statistics_say_what_they_measure(small, tmp_path, caplog):
    statistics.main(argv("--dataset benv2 --split val --workers 1 --data_path", write_v2(tmp_path)))
    assert lines(caplog, "data: ") == [("INFO", "data: benv2 val: 1 of 2 patches (50.0 % of the complete split)")]


@needs_samples
def test_the_real_list_of_floods_is_complete(caplog):
    folders = read_s1_list(sample_path("sen12flood", "S1list.json"))
    log_list("the list", folders, own_splits=False)
    log_list("the list", folders, own_splits=True)
    images = "3,957 images, 1,374 flooded images, 15 images of one polarisation"
    pairs = "16,816 candidate pairs for train, 3,767 candidate pairs for test"
    assert [text for _, text in lines(caplog)] == [
        f"the list: {images}, 267 folders for train, 68 folders for test, {pairs}: complete",
        f"the list: {images}, 335 folders, 20,583 candidate pairs: complete",
    ]
    log_list("the list", dict(list(folders.items())[:-1]), own_splits=True)
    assert "334 of 335 folders" in caplog.text and "complete" not in caplog.text


def test_packed_floods(small, tmp_path, caplog):
    write_floods(tmp_path / "floods")
    pack.main(argv("--dataset sen12flood --workers 1 --data_path", tmp_path / "floods", "--out", tmp_path / "store"))
    found = lines(caplog, "split ")
    assert found[0][0] == "WARNING" and "split train: 6 candidate pairs, more than the 4 of the complete" in found[0][1]
    assert found[1] == ("INFO", "split test: 3 candidate pairs, complete")
