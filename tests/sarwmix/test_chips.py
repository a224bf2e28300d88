# SPDX-License-Identifier: MIT
"""Images of one's own: tables, classes, splits by group, statistics, packed alike, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import rasterio

from sarwmix.chips import Chips
from sarwmix.packed import PackedDataset
from sarwmix.prepare import pack, statistics
from sarwmix.raster import Reading
from sarwmix.registry import open_dataset
from tests.helpers.dataset_fixtures import fails_with, write_csv, write_tif
from tests.helpers.runs import argv, refusal

NAMES = [f"chip{k}" for k in range(6)]
LABELS = ["wood", "water", "town", "wood", "", "water"]


def write_chips(root, size=40, **options):
    """Six chips of constants: VH −20 − k, VV −10 − k."""
    for k, name in enumerate(NAMES):
        values = np.stack([np.full((size, size), value - k, np.float32) for value in (-10, -20)])
        grid = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 1000 * k, 0, -10, 0)}
        write_tif(root / f"{name}.tif", values, ("VV", "VH"), **{**grid, **options})
    return root


def write_table(root, rows=None, header=("id", "label", "group"), name="metadata.csv"):
    rows = rows or [(n, label, f"g{k // 2}") for k, (n, label) in enumerate(zip(NAMES, LABELS))]
    write_csv(root / name, [header, *rows])
    return root / name


@pytest.fixture
def root(tmp_path):
    write_table(write_chips(tmp_path / "data"))
    return tmp_path / "data"


def test_items_and_classes(root):
    data = Chips(root, "all")
    assert data.ids.tolist() == NAMES and data.CLASSES == ("town", "water", "wood") and data.task == "multiclass"
    image, label = data[1]
    assert image[:, 3, 3].tolist() == [-21, -11] and label.item() == 1 and data.size == 40
    assert [data[k][1].item() for k in (0, 2, 3)] == [2, 0, 2] and data.where(1) == "metadata.csv:3"
    assert data.labels(np.array([0, 1])).tolist() == [2, 1] and data.groups.tolist() == [
        "g0",
        "g0",
        "g1",
        "g1",
        "g2",
        "g2",
    ]
    assert data.describe()["class_counts"] == {"town": 1, "water": 2, "wood": 2}
    labelled = Chips(root, "all", supervised=True)
    assert labelled.ids.tolist() == [n for n in NAMES if n != "chip4"] and labelled.check_files() is None
    assert Chips(root, "all", classes=("wood", "ice", "water", "town"))[1][1].item() == 2
    fails_with(
        lambda: Chips(root, "all", classes=("wood", "water"), supervised=True), "'town' (metadata.csv:4)", "2 classes"
    )


def test_ids_are_names_or_paths(root):
    (root / "sub").mkdir()
    (root / "chip1.tif").rename(root / "sub" / "chip1.tif")
    for one in ("chip1", "sub/chip1.tif", "sub/chip1", "chip1.tif"):
        table = write_table(root, [(one, "a"), ("chip2", "b")], ("id", "label"), "other.csv")
        assert Chips(root, "all", table)[0][0][0, 0, 0] == -21
    (root / "sub" / "chip0.tif").write_bytes((root / "chip0.tif").read_bytes())
    table = write_table(root, [("chip0", "a"), ("sub/chip0", "b")], ("id", "label"), "other.csv")
    data = Chips(root, "all", table)
    assert data.missing() == [0]  # its name is that of two files
    fails_with(data.check_files, "chip0", "other.csv:2")


def test_several_labels_and_parquet(root):
    rows = [("chip0", "a; b"), ("chip1", ""), ("chip2", "b")]
    data = Chips(root, "all", write_table(root, rows, ("id", "labels"), "several.csv"))
    assert data.CLASSES == ("a", "b") and data.task == "multilabel"
    assert data.label_table().tolist() == [[1, 1], [0, 0], [0, 1]] and data[0][1].tolist() == [1, 1]
    frame = pd.DataFrame({"id": ["chip0", "chip2"], "labels": [["a", "b"], ["b"]], "split": ["train", "validation"]})
    frame.to_parquet(root / "several.parquet")
    data = Chips(root, "val", root / "several.parquet")
    assert data.ids.tolist() == ["chip2"] and data.where(0) == "several.parquet: row 1"
    numbers = write_table(root, [("chip0", "10"), ("chip1", "9"), ("chip2", "-1")], ("id", "label"), "numbers.csv")
    assert Chips(root, "all", numbers).CLASSES == ("-1", "9", "10")


def test_splits_are_drawn_by_group(root):
    parts = {split: Chips(root, split, draw=(0.34, 0.34, 3)) for split in ("train", "val", "test")}
    groups = {split: set(data.groups.tolist()) for split, data in parts.items()}
    assert [len(part) for part in groups.values()] == [1, 1, 1] and len(set.union(*groups.values())) == 3
    assert set(Chips(root, "train_val", draw=(0.34, 0.34, 3)).groups) == groups["train"] | groups["val"]
    assert len(Chips(root, "all", draw=(0.34, 0.34, 3))) == 6 and len(Chips(root, "train")) == 6
    draws = {Chips(root, "test", draw=(0, 0.34, seed)).groups[0] for seed in range(9)}
    assert draws == {"g0", "g1", "g2"}
    fails_with(lambda: Chips(root, "test"), "no split 'test'", "column split", "--test_fraction")
    fails_with(lambda: Chips(root, "train", draw=(0.4, 0.9, 0)), "leave nothing to train on")


def test_a_folder_without_a_table(tmp_path):
    root = write_chips(tmp_path / "data")
    data = Chips(root, "train_val")
    assert (
        data.ids.tolist() == NAMES and data.CLASSES == () and data[0][1].shape == (0,) and len(data.label_table()) == 6
    )
    fails_with(lambda: Chips(root, supervised=True), "none of the 6 images", "has a label", "--metadata")
    grid = data.georeference()
    assert grid.c.tolist() == [1000 * k for k in range(6)] and grid.scene.tolist() == NAMES
    assert Chips(write_chips(tmp_path / "plain", crs=None), "all").georeference() is None


def test_images_of_two_files_in_linear_power(tmp_path):
    for name, value in (("VV", 0.1), ("VH", 0.01)):
        write_tif(tmp_path / f"x_{name}.tif", np.full((32, 32), value, np.float32))
    data = Chips(tmp_path, "all", reading=Reading("linear"))
    np.testing.assert_allclose(data[0][0][:, 0, 0], [-20, -10], atol=1e-5)
    assert data.ids.tolist() == ["x"] and len(data.files(0)) == 2


@pytest.mark.parametrize("divided", [False, True])
def test_a_packed_store_is_the_same(root, tmp_path, divided):
    if divided:
        splits = ["train", "train", "val", "val", "test", "test"]
        write_table(root, [(n, label, s) for n, label, s in zip(NAMES, LABELS, splits)], ("id", "label", "split"))
    pack.main(argv("--dataset chips --data_path", root, "--out", tmp_path / "store", "--dtype float32 --workers 1"))
    draw = (0, 0, 0) if divided else (0.34, 0.34, 1)
    for split in ("train", "val", "test", "train_val", "all"):
        files = open_dataset("chips", root, split, draw=draw)
        store = open_dataset("chips", tmp_path / "store", split, draw=draw)
        assert store.ids.tolist() == files.ids.tolist() and store.task == "multiclass" and store.size == 40
        assert store.label_table().tolist() == files.label_table().tolist() and store.CLASSES == files.CLASSES
        assert (store.read_image(0) == files.read_image(0)).all() and store.groups.tolist() == files.groups.tolist()
        pd.testing.assert_frame_equal(store.georeference(), files.georeference())
    store = PackedDataset(tmp_path / "store", "all", classes=("wood", "snow", "water", "town"))
    assert store[2][1].item() == 3 and store.CLASSES[1] == "snow"
    fails_with(
        lambda: PackedDataset(tmp_path / "store", "all", supervised=True, classes=("wood", "town")), "water", "wood"
    )
    mean = -20 - np.mean([0, 1] if divided else range(6))
    assert store.MEAN == pytest.approx([mean, mean + 10])


def test_splits_of_several_tables_are_packed_with_all_classes(root, tmp_path, capsys):
    tables = [
        write_table(root, rows, ("id", "label", "split"), f"{split}.csv")
        for split, rows in {
            "train": [("chip0", "wood", "train"), ("chip1", "water", "train")],
            "val": [("chip2", "town", "val"), ("chip3", "wood", "val")],
        }.items()
    ]
    flags = ("--dataset chips --workers 1 --data_path", root, "--metadata", tables[0], "--val_metadata")
    pack.main(argv(flags, tables[1], "--out", tmp_path / "store"))
    store = PackedDataset(tmp_path / "store", "all")
    assert store.CLASSES == ("town", "water", "wood") and [store[k][1].item() for k in range(4)] == [2, 1, 0, 2]
    several = write_table(root, [("chip2", "a;b", "val")], ("id", "labels", "split"), "several.csv")
    said = refusal(pack.main, (flags, several, "--out", tmp_path / "other"), capsys)
    assert "different columns of labels" in said and not (tmp_path / "other").exists()


def test_groups_in_several_splits_are_warned_of(root, caplog):
    rows = [(name, split, group) for name, split, group in zip(NAMES, ["train", "val", "test"] * 2, "xxyyzw")]
    Chips(root, "val", write_table(root, rows, ("id", "split", "group")))
    assert "2 groups are in train and in another split" in caplog.text and caplog.text.strip().endswith("x, y")


def test_classes_may_have_the_names_of_columns(root, tmp_path):
    names = ["a", "id", "split", "row", "image_0", "group"]
    write_table(root, list(zip(NAMES, names)), ("id", "label"))
    pack.main(argv("--dataset chips --data_path", root, "--out", tmp_path / "store", "--workers 1"))
    files, store = (open_dataset("chips", path, "all") for path in (root, tmp_path / "store"))
    assert store.ids.tolist() == NAMES and [store.CLASSES[store[k][1].item()] for k in range(6)] == names
    pd.testing.assert_frame_equal(store.georeference(), files.georeference())


@pytest.mark.parametrize("kind", ["Int64", "string", "boolean", "float32"])
def test_missing_labels_of_every_kind_of_parquet(root, kind):
    labels = pd.array([True, None] * 3, dtype="boolean").astype(kind)
    pd.DataFrame({"id": NAMES, "label": labels}).to_parquet(root / "kinds.parquet")
    data = Chips(root, "all", root / "kinds.parquet")
    assert data.CLASSES in (("1",), ("True",)) and data.label_table().tolist() == [[1], [0]] * 3


def test_statistics_of_chips(root, tmp_path, capsys):
    statistics.main(argv("--dataset chips --split all --data_path", root, "--out", tmp_path / "s.json", "--workers 1"))
    found = pd.read_json(tmp_path / "s.json", typ="series")
    assert found["mean"] == pytest.approx([-22.5, -12.5]) and found["images"] == 6
    other = ("--dataset benv2 --data_path", root, "--units linear")
    assert "--units" in refusal(statistics.main, other, capsys) and "--dataset chips" in refusal(
        statistics.main, other, capsys
    )


CASES = {
    "no column id": ([("chip0", "a")], ("name", "label"), "has no column id"),
    "label and labels": ([("chip0", "a", "b")], ("id", "label", "labels"), "a column label and a column labels"),
    "an unknown split": ([("chip0", "dev")], ("id", "split"), "unknown split"),
    "an id twice": ([("chip0", "a"), ("chip0", "b")], ("id", "label"), "repeat an id"),
    "an empty id": ([("", "a")], ("id", "label"), "have no id"),
    "no rows": ([()], ("id", "label"), "has no rows"),
    "a split in capitals": ([("chip0", "Train")], ("id", "split"), "unknown split: 'Train' (wrong.csv:2)"),
    "an image twice": ([("chip0", "a"), ("./chip0.tif", "b")], ("id", "label"), "rows repeat an image: chip0 (wrong"),
    "several in one": ([("chip0", "a;b")], ("id", "label"), "name the column labels"),
    "ragged": ([("chip0",)], ("id", "label"), "do not have the 2 cells of the header"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_table_is_one_line(root, case):
    rows, header, said = CASES[case]
    path = root / "wrong.csv"
    write_csv(path, [header, *[row for row in rows if row]])
    fails_with(lambda: Chips(root, "all", path), "wrong.csv", said)


def test_wrong_images_are_one_line(root):
    write_tif(root / "chip3.tif", np.zeros((2, 32, 40), np.float32) - 15, ("VV", "VH"))
    data = Chips(root, "all")
    fails_with(lambda: data[3], "chip3.tif", "32x40", "sarwmix.tile", "metadata.csv:5")
    write_tif(root / "chip3.tif", np.zeros((2, 40, 40), np.float32) + 0.1, ("VV", "VH"))
    fails_with(lambda: data[3], "looks linear", "--units linear", "metadata.csv:5")
    values = np.full((2, 40, 40), -15, np.float32)
    values[:, :3] = np.nan
    write_tif(root / "chip3.tif", values, ("VV", "VH"))
    assert np.isnan(data.read_image(3)).sum() == 240
    strict = Chips(root, "all", reading=Reading(max_nonfinite=0.01))
    fails_with(lambda: strict[3], "chip3.tif", "--max_nonfinite")
    fails_with(lambda: Chips(root / "none"), "no such folder")
    write_table(root, [("chip0", "a"), ("chip1", "a")], ("id", "label"))
    fails_with(lambda: Chips(root, "all", supervised=True), "at least two classes are needed")
