# SPDX-License-Identifier: MIT
"""S1list.json of SEN12-FLOOD: order, pairs and splits, faulty lists; the tables that the steps leave for each other."""

import json

import pytest

from common.errors import DataError
from sarwmix.prepare.sen12_index import CANDIDATES, Image, pairs, parse_s1_list, read_s1_list, read_step, split_of
from tests.helpers.dataset_fixtures import fails_with, needs_samples, one_line, sample_path


def name(start, kind="SDV"):
    return f"S1A_IW_GRDH_1{kind}_{start}_20190101T000025_014805_01B9FF_DC8A"


def entry(start, flooded=False, kind="SDV"):
    return {"filename": name(start, kind), "FLOODING": flooded, "date": "2019-01-01"}


def test_images_come_in_the_order_of_acquisition_whatever_their_number():
    content = {
        "2": {"count": 1, "1": entry("20190201T000000")},
        "0002": {
            "2": entry("20190103T000000", True),
            "1": entry("20190103T000001"),
            "3": entry("20181231T235959"),
            "count": 3,
            "folder": "0002",
            "geo": {},
        },
    }
    folders = parse_s1_list(content, "list")
    assert list(folders) == ["0002", "2"]
    assert [(f"{image.start:%Y-%m-%dT%H:%M:%S}", image.flooded) for image in folders["0002"]] == [
        ("2018-12-31T23:59:59", False),
        ("2019-01-03T00:00:00", True),
        ("2019-01-03T00:00:01", False),
    ]
    assert folders["2"] == [Image("2", name("20190201T000000"), False)]


@pytest.mark.parametrize(
    "kind, polarisations", (("SDV", ("VH", "VV")), ("SSV", ("VV",)), ("SDH", ("HH", "HV")), ("SSH", ("HH",)))
)
def test_polarisations_are_those_of_the_product(kind, polarisations):
    assert Image("1", name("20190101T000000", kind), False).polarisations == polarisations


@pytest.mark.parametrize(
    "flooded, expected",
    (
        ([], []),
        ([False], []),
        ([True, True], []),
        ([False, False], [(0, 1, 0)]),
        ([False, True], [(0, 1, 1)]),
        ([True, False], [(1, 0, 1)]),
        ([False, True, False], [(0, 1, 1), (0, 2, 0), (2, 1, 1)]),
    ),
)
def test_a_flooded_image_is_the_second_one(flooded, expected):
    assert pairs(flooded) == expected


def test_splits_by_name_or_by_lists():
    assert [split_of(folder) for folder in ("1", "68", "0001", "0335", "123", "a1")] == [
        "test",
        "test",
        "train",
        "train",
        "train",
        "train",
    ]
    lists = {"train": ["1"], "test": ["0001"]}
    assert [split_of(folder, lists) for folder in ("1", "0001", "2")] == ["train", "test", None]


@pytest.mark.parametrize(
    "entries, words",
    (
        ({"1": {"filename": name("20190101T000000") + "_", "FLOODING": False}}, "DC8A_"),  # no name for a pair file
        ({"1": {"filename": name("20190101T000000") + "__A", "FLOODING": False}}, "DC8A__A"),
        ({"1": "text"}, "0007 entry 1 (None)"),
    ),
)
def test_entries_that_cannot_be_used_are_named(entries, words):
    fails_with(lambda: parse_s1_list({"0007": entries}, "RAW/S1list.json"), "RAW/S1list.json", "1 entries", words)


def test_files_that_are_no_list_are_named(tmp_path):
    path = tmp_path / "S1list.json"
    for text, words in (("{", "--s1_list"), ("{}", "no folders")):
        path.write_text(text)
        fails_with(lambda: read_s1_list(path), str(path), words)


@needs_samples
def test_the_real_list():
    folders = read_s1_list(sample_path("sen12flood", "S1list.json"))
    images = [image for images in folders.values() for image in images]
    assert (len(folders), len(images), sum(image.flooded for image in images)) == (335, 3957, 1374)
    assert sum(image.polarisations == ("VV",) for image in images) == 15
    assert sum(image.polarisations == ("VH", "VV") for image in images) == 3942
    found = {folder: pairs([image.flooded for image in images]) for folder, images in folders.items()}
    assert sum(map(len, found.values())) == 20583
    for split, places, count in (("train", 267, 16816), ("test", 68, 3767)):
        mine = [folder for folder in folders if split_of(folder) == split]
        assert (len(mine), sum(len(found[folder]) for folder in mine)) == (places, count)


# ---- What a step leaves for the next -------------------------------------------------------------


def test_tables_come_back_as_text(tmp_path):
    CANDIDATES.write(tmp_path, [("train", "0001", "a", "b", 1)])
    assert (tmp_path / "pairs.csv").read_text() == "split,folder,first,second,label\ntrain,0001,a,b,1\n"
    assert CANDIDATES.read(tmp_path) == [
        {"split": "train", "folder": "0001", "first": "a", "second": "b", "label": "1"}
    ]


@pytest.mark.parametrize("text", ("", "split,folder\n", "split,folder,first,second,label\ntrain,1\n", "\0"))
def test_other_tables_are_named_with_the_program_to_run(text, tmp_path):
    (tmp_path / "pairs.csv").write_text(text)
    fails_with(lambda: CANDIDATES.read(tmp_path), "pairs.csv", "python -m sarwmix.sen12_data_prep")


def test_a_missing_table_or_another_record_are_named(tmp_path):
    with pytest.raises(DataError) as error:
        CANDIDATES.read(tmp_path)
    one_line(error, "pairs.csv: does not exist", "python -m sarwmix.sen12_data_prep")
    for text in (None, "{", "[]", json.dumps({"program": "sarwmix.other"})):
        if text is not None:
            (tmp_path / "step.json").write_text(text)
        with pytest.raises(DataError) as error:
            read_step(tmp_path, "sarwmix.sen12_data_prep")
        one_line(error, "step.json", "python -m sarwmix.sen12_data_prep")
