# SPDX-License-Identifier: MIT
"""Images with masks: how masks and classes are found, what counts, statistics, and what is refused; Sen1Floods11."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch

from common.errors import UsageError
from sarwmix.masks import IGNORED, Masks, Sen1Floods11
from sarwmix.prepare import pack, statistics
from sarwmix.raster import Reading
from sarwmix.registry import DATASETS, OWN, leave_out, open_dataset
from tests.helpers.dataset_fixtures import fails_with, needs_samples, sample_path, write_csv, write_tif
from tests.helpers.runs import argv, refusal
from util.caching import RankMemory, hold_in_memory

SIDE = 32
NAMES = ["a", "b", "c", "d"]
CLASSES = [("value", "name"), (7, "wood"), (1, "water"), (0, "ignore"), (-3, "ignore")]
GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)}


def image(k=0):
    """VV −10 − k, VH −20 − k."""
    return np.stack([np.full((SIDE, SIDE), value - k, np.float32) for value in (-10, -20)])


def mask(*rows, dtype=np.int16):
    """Rows of these values from the top, and wood below."""
    values = np.full((SIDE, SIDE), 7, dtype)
    values[: len(rows)] = np.array(rows, dtype)[:, None]
    return values


@pytest.fixture
def root(tmp_path):
    """Images a to d, whose masks have no, one, two and three rows of water, and one of a value that is ignored."""
    root = tmp_path / "data"
    for k, name in enumerate(NAMES):
        write_tif(root / "images" / f"{name}.tif", image(k), ("VV", "VH"), **GRID)
        write_tif(root / "masks" / f"{name}.tif", mask(0, *[1] * k), **GRID)
    write_csv(root / "classes.csv", CLASSES)
    return root


def test_items_and_counts(root):
    data = Masks(root, supervised=True)
    assert data.ids.tolist() == NAMES and data.CLASSES == ("wood", "water") and data.task == "segmentation"
    assert data.size == SIDE and data.MEAN is None and Masks.CLASSES == ()
    values, labels = data[2]
    assert values.dtype == torch.float32 and values[:, 5, 5].tolist() == [-22, -12]
    assert labels.dtype == torch.uint8 and labels[:4, 9].tolist() == [IGNORED, 1, 1, 0]
    assert (data.labels(2) == labels).all()
    assert data.pixel_counts.dtype == np.int64
    assert data.pixel_counts.tolist() == [[SIDE * (31 - k), SIDE * k, SIDE] for k in range(4)]
    assert data.label_table().tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]
    record = data.describe()
    assert record["class_counts"] == {"wood": SIDE * 118, "water": SIDE * 6} and record["ignored_pixels"] == 4 * SIDE
    assert [path.rpartition("data/")[2] for path in data.files(1)] == ["images/b.tif", "masks/b.tif"]
    assert data.check_files() is None and data.check_units()["nonfinite"] == 0
    assert data.georeference().crs.tolist() == ["EPSG:32633"] * 4
    part = data.subset([3, 1])
    assert part.pixel_counts.tolist() == data.pixel_counts[[3, 1]].tolist() and part.ids.tolist() == ["d", "b"]
    assert part[0][1][:5, 0].tolist() == [IGNORED, 1, 1, 1, 0] and part.where(0).endswith("d")
    assert part.describe()["class_counts"]["water"] == 4 * SIDE and part.groups.tolist() == ["d", "b"]


def test_without_supervision_masks_are_not_needed(root):
    shutil.rmtree(root / "masks")
    (root / "classes.csv").unlink()
    data = Masks(root, "all")
    assert data.ids.tolist() == NAMES and data.CLASSES == () and data.pixel_counts is None
    values, labels = data[1]
    assert values[1, 0, 0] == -11 and labels.shape == (SIDE, SIDE) and (labels == IGNORED).all()
    assert data.label_table().shape == (4, 0) and len(data.files(0)) == 1 and data.check_files() is None
    record = data.describe()
    assert record["class_counts"] is None and "ignored_pixels" not in record
    assert Masks(root, classes=("x", "y")).CLASSES == ("x", "y")


def test_classes_of_a_checkpoint(root):
    data = Masks(root, supervised=True, classes=("ice", "water", "wood"))
    assert data.CLASSES == ("ice", "water", "wood") and data[1][1][:3, 0].tolist() == [IGNORED, 1, 2]
    assert data.pixel_counts[1].tolist() == [0, SIDE, SIDE * 30, SIDE]
    fails_with(
        lambda: Masks(root, supervised=True, classes=("water", "ice")),
        "classes.csv",
        "'wood' is not among",
        "water, ice",
    )
    assert Masks(root, classes=("water", "ice")).CLASSES == ("water", "ice")


def test_two_files_for_each_image_in_folders(tmp_path):
    for k, name in enumerate(("east/x", "west/x")):
        for band, value in zip(("VV", "VH"), (0.1, 0.01)):
            write_tif(tmp_path / "images" / f"{name}_{band}.tif", np.full((SIDE, SIDE), value / 10**k, np.float32))
        write_tif(tmp_path / "masks" / f"{name}.tiff", mask(1, *[1] * k))
    write_csv(tmp_path / "classes.csv", CLASSES)
    data = Masks(tmp_path, "all", reading=Reading("linear"), supervised=True)
    assert data.ids.tolist() == ["east_x", "west_x"] and len(data.files(0)) == 3
    np.testing.assert_allclose(data[1][0][:, 0, 0], [-30, -20], atol=1e-5)
    assert data.pixel_counts[:, 1].tolist() == [SIDE, 2 * SIDE]
    write_csv(tmp_path / "metadata.csv", [("id", "scene", "split"), ("west/x_VV.tif", "s", "val")])
    data = Masks(tmp_path, "val", reading=Reading("linear"), supervised=True)
    assert data.pixel_counts[:, 1].tolist() == [2 * SIDE] and data.groups.tolist() == ["s"]


def test_a_column_of_masks(root):
    """Masks anywhere, of the names of images, are no images; the same mask may be that of two."""
    (root / "images").rename(root / "radar")
    (root / "masks").rename(root / "truth")
    rows = [("id", "mask", "group"), *((f"radar/{n}.tif", f"truth/{n}.tif", f"g{n > 'b'}") for n in NAMES[:3])]
    write_csv(root / "metadata.csv", [*rows, ("radar/d", "./truth/c.tif", "gTrue")])
    data = Masks(root, "train", supervised=True, draw=(0.5, 0, 0))
    assert set(data.groups) in ({"gFalse"}, {"gTrue"}) and len(data) == 2
    data = Masks(root, "all", supervised=True)
    assert data.pixel_counts[:, 1].tolist() == [0, SIDE, 2 * SIDE, 2 * SIDE] and data[3][0][0, 0, 0] == -23
    write_csv(root / "metadata.csv", [*rows, ("radar/d", "", "gTrue")])
    assert Masks(root, "all", supervised=True).ids.tolist() == [f"radar/{name}.tif" for name in "abc"]
    assert len(Masks(root, "all")) == 4
    (root / "metadata.csv").unlink()
    fails_with(lambda: Masks(root, "all", supervised=True), "neither a folder masks", "column mask")


def test_images_beside_the_folder_of_masks(root):
    for path in (root / "images").iterdir():
        path.rename(root / path.name)
    (root / "images").rmdir()
    assert Masks(root, supervised=True).ids.tolist() == NAMES
    for path in root.glob("*.tif"):
        path.unlink()
    fails_with(lambda: Masks(root), "holds masks, but no images")


@pytest.mark.parametrize(
    "values, options, counts",
    [
        (mask(-3, 1), {}, [30, 1, 1]),
        (mask(200, 1, dtype=np.uint8), {"nodata": 200}, [30, 1, 1]),
        (mask(-5, 1), {"nodata": -5}, [30, 1, 1]),
        (mask(0, 1, dtype=np.int8), {}, [30, 1, 1]),
        (mask(0, 1, dtype=np.uint32), {}, [30, 1, 1]),
        (mask(np.nan, 1, dtype=np.float32), {}, [30, 1, 1]),
        (mask(-3.4e38, 1, dtype=np.float32), {"nodata": -3.4e38}, [30, 1, 1]),
    ],
    ids=str,
)
def test_types_and_values_that_do_not_count(root, values, options, counts):
    write_tif(root / "masks" / "a.tif", values, **options)
    data = Masks(root, supervised=True)
    assert (data.pixel_counts[0] / SIDE).tolist() == counts and data[0][1][:3, 0].tolist() == [IGNORED, 1, 0]


def test_pixels_without_data_do_not_count(root, caplog):
    values = image()
    values[0, :2], values[1, 2:4] = np.nan, np.nan
    write_tif(root / "images" / "b.tif", values, ("VV", "VH"))
    write_tif(root / "images" / "c.tif", np.full_like(values, np.nan), ("VV", "VH"))
    labelled = np.zeros((SIDE, SIDE), np.int16)
    labelled[:4] = 1
    write_tif(root / "images" / "d.tif", values, ("VV", "VH"))
    write_tif(root / "masks" / "d.tif", labelled)
    data = Masks(root, supervised=True, reading=Reading(max_nonfinite=0.0))
    assert data.ids.tolist() == ["a", "b"] and "2 of 4 images" in caplog.text and "the first is c" in caplog.text
    assert data[1][1][:6, 3].tolist() == [IGNORED] * 4 + [0, 0] and data.labels(1)[1, 3] == 1
    assert data.pixel_counts[1].tolist() == [30 * SIDE, SIDE, SIDE] and torch.isnan(data[1][0]).sum() == 4 * SIDE


def test_masks_that_are_ignored_everywhere(root, caplog):
    write_tif(root / "masks" / "b.tif", mask(*[0] * SIDE))
    data = Masks(root, supervised=True)
    assert data.ids.tolist() == ["a", "c", "d"] and data.pixel_counts[:, 1].tolist() == [0, 2 * SIDE, 3 * SIDE]
    assert "1 of 4 images" in caplog.text
    for name in NAMES:
        write_tif(root / "masks" / f"{name}.tif", mask(*[0] * SIDE))
    fails_with(lambda: Masks(root, supervised=True), "none of the 4 images", "'train_val'", "classes.csv")


def test_missing_files_are_left_to_the_check(root):
    (root / "masks" / "b.tif").unlink()
    data = Masks(root, supervised=True)
    assert data.ids.tolist() == NAMES and data.pixel_counts[1].tolist() == [0, 0, 0]
    fails_with(data.check_files, "1 of 4 samples", "masks/b.tif", "--skip_missing")
    fails_with(lambda: data[1], "masks/b.tif: does not exist")
    part = leave_out(data, data.missing())
    assert part.ids.tolist() == ["a", "c", "d"] and part.describe()["left_out"] == 1
    write_csv(root / "metadata.csv", [("id",), ("a",), ("sub/x",)])
    shutil.copy(root / "masks" / "a.tif", root / "masks" / "x.tif")
    data = Masks(root, supervised=True)
    assert data.missing() == [1]
    fails_with(data.check_files, "images/sub/x", "metadata.csv:3")


def test_wrong_masks_are_one_line(root):
    def refused(values, *said, name="a", **options):
        write_tif(root / "masks" / f"{name}.tif", values, **options)
        fails_with(lambda: Masks(root, supervised=True), *said)

    data = Masks(root, supervised=True)
    refused(np.zeros((SIDE, SIDE + 1), np.int16), "1 of 4 masks", "masks/a.tif is 32x33", "image 32x32", "cut image")
    fails_with(lambda: data[0], "masks/a.tif", "32x33")
    refused(mask(2, 300), "1 of 4 masks", "masks/a.tif (2, 300)", "classes.csv", "ignore")
    fails_with(lambda: data[0], "masks/a.tif", "value 2", "classes.csv")
    refused(mask(1.5, 1, dtype=np.float32), "masks/a.tif (1.5)")
    refused(mask(70000, dtype=np.int32), "masks/a.tif (70000)")
    refused(mask(1), "no-data value, 7", "'wood'", "classes.csv", "-unsetnodata", nodata=7)
    refused(np.zeros((SIDE, SIDE), np.complex64), "masks/a.tif", "whole numbers")
    refused(np.zeros((2, SIDE, SIDE), np.uint8), "masks/a.tif", "2 bands", "-b N")
    (root / "masks" / "a.tif").write_bytes(b"II*\0 no mask")
    fails_with(lambda: Masks(root, supervised=True), "masks/a.tif", "corrupt")
    (root / "masks" / "a.tif").unlink()
    write_tif(root / "masks" / "a.tif", mask())
    write_tif(root / "masks" / "a.tiff", mask())
    fails_with(lambda: Masks(root, supervised=True), "several masks", "a.tif and", "a.tiff")
    (root / "masks" / "a.tiff").unlink()
    write_tif(root / "images" / "a.tif", image()[:, :, :8], ("VV", "VH"))
    fails_with(lambda: Masks(root, supervised=True), "image 32x8")
    write_tif(root / "images" / "a.tif", 10 ** (image() / 10), ("VV", "VH"))
    fails_with(lambda: Masks(root, supervised=True), "images/a.tif", "--units linear", "images/a")


TABLES = {
    "is missing": None,
    "has no column name": [("value", "class"), (1, "a")],
    "classes.csv:3: the value 1 is there twice": [("value", "name"), (1, "a"), (1, "b")],
    "classes.csv:3: the name 'a' is there twice": [("value", "name"), (1, "a"), (2, "a")],
    "classes.csv:2: the value '1.5' is not a whole number": [("value", "name"), (1.5, "a"), (2, "b")],
    "classes.csv:2: the value '70000' is not a whole number": [("value", "name"), (70000, "a"), (2, "b")],
    "classes.csv:3: the value 2 has no name": [("value", "name"), (1, "a"), (2, "")],
    r"classes.csv:3: the name 'b\x1b[31m' has control characters": [("value", "name"), (1, "a"), (2, "b\x1b[31m")],
    r"classes.csv:3: the name 'b\nc' has control characters": [("value", "name"), (1, "é 水"), (2, "b\nc")],
    "names 1 classes": [("value", "name"), (1, "a"), (2, "ignore")],
    "names 254 classes": [("value", "name"), *((k, f"c{k}") for k in range(254))],
}


@pytest.mark.parametrize("said", TABLES)
def test_a_wrong_table_of_classes_is_one_line(root, said):
    (root / "classes.csv").unlink()
    if TABLES[said] is not None:
        write_csv(root / "classes.csv", TABLES[said])
    fails_with(lambda: Masks(root, supervised=True), "classes.csv", said)


def test_programs(root, tmp_path, capsys):
    flags = ("--dataset masks --data_path", root, "--workers 1")
    statistics.main(argv(flags, "--split all --out", tmp_path / "s.json"))
    found = pd.read_json(tmp_path / "s.json", typ="series")
    assert found["mean"] == pytest.approx([-21.5, -11.5]) and found["images"] == 4
    said = refusal(pack.main, (flags, "--out", tmp_path / "store"), capsys)
    assert "--dataset masks: a packed store holds no masks" in said and "--dataset chips" in said
    pack.main(argv("--dataset chips --workers 1 --data_path", root / "images", "--out", tmp_path / "store"))
    fails_with(lambda: open_dataset("masks", tmp_path / "store", "all"), "packed store of chips")
    assert OWN == ("chips", "masks", "sen1floods11") and [DATASETS[name].MEAN for name in OWN] == [None] * 3


# ---- Sen1Floods11 --------------------------------------------------------------------------------

CHIPS = {"Ghana_1": "train", "Ghana_2": "train", "Sri-Lanka_3": "valid", "USA_4": "test", "Bolivia_5": "bolivia"}
HAND, LISTS = Sen1Floods11.HAND, Sen1Floods11.LISTS


def row(name):
    return f"{name}_S1Hand.tif", f"{name}_LabelHand.tif"


@pytest.fixture
def bucket(tmp_path):
    """The folder above v1.1, in the layout of the bucket."""
    top = tmp_path / "bucket" / "v1.1"
    for k, name in enumerate(CHIPS):
        first, second = row(name)
        write_tif(top / HAND / "S1Hand" / first, image(k), ("VV", "VH"), nodata=np.nan)
        values = np.ones((SIDE, SIDE), np.int16)
        values[0], values[1] = -1, 0
        write_tif(top / HAND / "LabelHand" / second, values.T)
    (top / LISTS).mkdir(parents=True)
    for part in dict.fromkeys(CHIPS.values()):
        write_csv(top / LISTS / f"flood_{part}_data.csv", [row(name) for name in CHIPS if CHIPS[name] == part])
    return top.parent


@pytest.mark.parametrize("folder", ["", "v1.1", f"v1.1/{HAND}"])
def test_lists_of_sen1floods11(bucket, folder):
    def ids(split, **options):
        return open_dataset("sen1floods11", bucket / folder, split, **options).ids.tolist()

    names = list(CHIPS)
    assert ids("train") == names[:2] and ids("val") == names[2:3] and ids("test") == names[3:4]
    assert ids("train_val") == names[:3] and ids("all") == names
    bolivia = bucket / "v1.1" / LISTS / "flood_bolivia_data.csv"
    assert ids("train", metadata=[bolivia]) == ids("test", metadata=[bolivia]) == names[4:]
    data = open_dataset("sen1floods11", bucket / folder, "test", supervised=True)
    assert data.CLASSES == ("no water", "water") and data[0][0][:, 0, 0].tolist() == [-23, -13]
    assert data[0][1][0, :4].tolist() == [IGNORED, 0, 1, 1] and data.groups.tolist() == ["USA"]
    assert data.pixel_counts.tolist() == [[SIDE, 30 * SIDE, SIDE]] and data.where(0).endswith("flood_test_data.csv:1")
    shuffled = open_dataset(
        "sen1floods11", bucket / folder, "test", supervised=True, classes=["water", "x", "no water"]
    )
    assert shuffled[0][1][0, :3].tolist() == [IGNORED, 2, 0]


def test_sen1floods11_without_lists(bucket, caplog):
    root = bucket / "v1.1" / HAND
    assert len(Sen1Floods11(root, "train", draw=(0.5, 0, 0))) == 2 and "not used" in caplog.text
    shutil.rmtree(bucket / "v1.1" / "splits")
    parts = {split: Sen1Floods11(root, split, draw=(0.25, 0.25, 0)) for split in ("train", "val", "test")}
    assert sorted(name for data in parts.values() for name in data.ids) == sorted(CHIPS)
    countries = [set(data.groups.tolist()) for data in parts.values()]
    assert [len(groups) for groups in countries] == [2, 1, 1] and len(set.union(*countries)) == 4
    shutil.rmtree(root / "LabelHand")
    assert len(Sen1Floods11(root, "all")) == 5
    data = Sen1Floods11(root, "all", supervised=True)
    fails_with(data.check_files, "5 of 5 samples", "Bolivia_5_LabelHand.tif")


def test_wrong_folders_and_lists_of_sen1floods11_are_one_line(bucket, tmp_path):
    fails_with(lambda: Sen1Floods11(tmp_path), "holds neither S1Hand", "v1.1")
    lists = bucket / "v1.1" / LISTS
    (lists / "flood_valid_data.csv").unlink()
    fails_with(lambda: Sen1Floods11(bucket, "val"), "flood_valid_data.csv", "check the path")
    for wrong in (("Ghana_1", "Ghana_1"), row("Ghana_1")[:1], (row("Ghana_1")[0], row("Ghana_2")[1])):
        write_csv(tmp_path / "x.csv", [row("Ghana_2"), wrong])
        fails_with(lambda: Sen1Floods11(bucket, "val", tmp_path / "x.csv"), "1 of 2 rows", f"x.csv:2 '{wrong[0]}")
    write_csv(tmp_path / "x.csv", [])
    fails_with(lambda: Sen1Floods11(bucket, "val", tmp_path / "x.csv"), "x.csv: names no chip")
    write_csv(tmp_path / "x.csv", [row("Ghana_2")] * 2)
    fails_with(lambda: Sen1Floods11(bucket, "val", tmp_path / "x.csv"), "repeat an id", "x.csv:2")
    write_csv(tmp_path / "x.csv", [row("Peru_9")])
    fails_with(Sen1Floods11(bucket, "val", tmp_path / "x.csv").check_files, "S1Hand/Peru_9_S1Hand.tif")


@needs_samples
def test_real_chips_of_sen1floods11(caplog):
    root = sample_path("sen1floods11_chips")
    data = Sen1Floods11(root, "all", supervised=True)
    assert len(data) == 11 and "2 of 13 images" in caplog.text and "Paraguay_34417" not in data.ids
    assert data.size == 512 and set(data.groups) >= {"Bolivia", "Sri-Lanka", "USA"}
    values, labels = data[0]  # Bolivia, of which 3 % have no data
    assert -22 < values[0].nanmean() < values[1].nanmean() < -6 and torch.isnan(values).any()
    assert torch.bincount(labels.ravel(), minlength=256)[[0, 1, IGNORED]].tolist() == [148433, 9575, 104136]
    water, land = (values[1][labels == number].mean() for number in (1, 0))
    assert water < land - 3  # dB
    assert data.check_files() is None and len(Sen1Floods11(root, "all")) == 13


def test_samples_held_in_memory_are_the_same(root):
    dataset = Masks(root, "all", supervised=True)
    places = [RankMemory("a", 1, 10**9, None), RankMemory("b", 1, dataset.held_bytes() - 1, None)]
    ranks = SimpleNamespace(gather=lambda _: places, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="--data_cache ram"):  # on the node that has less memory
        hold_in_memory(dataset, "ram", ranks)
    before = [dataset[i] for i in range(len(dataset))]
    dataset.hold()
    for path in (root / "images").glob("*.tif"):
        path.unlink()
    assert dataset.held_bytes() == sum(image.nbytes + mask.nbytes for image, mask in before)
    for one, other in zip(before, [dataset[i] for i in range(len(dataset))], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    with pytest.raises(RuntimeError):
        dataset.subset([0])
