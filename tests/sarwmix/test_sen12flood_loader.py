# SPDX-License-Identifier: MIT
"""SEN12-FLOOD pairs: band order and units, both layouts, splits by folders, and what is said about faulty data."""

import json
import logging
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import DataError
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.dataset_fixtures import fails_with, write_csv

HEADER = ["folder", "first", "second", "label"]
S = 128
PAIRS = {  # part → (folder, first, second, label); image "a<k>" is a constant of its own
    "train": [
        ("0001", "a0", "a1", 0),
        ("0001", "a0", "a2", 1),
        ("0001", "a1", "a2", 1),
        ("0002", "a3", "a4", 0),
        ("0003", "a5", "a6", 1),
        ("0004", "a7", "a8", 0),
    ],
    "test": [("1", "a9", "b-0.x", 1)],
}


def linear(name, size=S):
    """(2, size, size): another constant for each channel of each image."""
    k = 10 if name == "b-0.x" else int(name[1:])
    return np.stack(
        [np.full((size, size), 0.01 * (k + 1), np.float32), np.full((size, size), 0.2 + 0.05 * k, np.float32)]
    )


def decibels(name):
    return 10 * np.log10(linear(name)[:, 0, 0].astype(float))


def write_pair(root, part, pair, images=None):
    folder, first, second, label = pair
    (root / part).mkdir(parents=True, exist_ok=True)
    images = np.stack([linear(first), linear(second)]) if images is None else images
    path = root / part / f"{folder}__{first}__{second}__{label}.npy"
    np.save(path, images)
    return path


def write_image(root, folder, name, image=None):
    (root / "images" / folder).mkdir(parents=True, exist_ok=True)
    np.save(root / "images" / folder / f"{name}.npy", linear(name) if image is None else image)
    return root / "images" / folder / f"{name}.npy"


@pytest.fixture
def curated(tmp_path):
    for part, pairs in PAIRS.items():
        for pair in pairs:
            write_pair(tmp_path / "curated", part, pair)
    return tmp_path / "curated"


@pytest.fixture
def store(tmp_path):
    for part, pairs in PAIRS.items():
        for folder, first, second, _ in pairs:
            write_image(tmp_path / "store", folder, first)
            write_image(tmp_path / "store", folder, second)
        write_csv(tmp_path / "store" / f"pairs_{part}.csv", [HEADER, *pairs])
    return tmp_path / "store"


@pytest.fixture(params=["curated", "store"])
def root(request):
    return request.getfixturevalue(request.param)


def fails(*parts, call=FloodDataset, **options):
    fails_with(lambda: call(**options), *parts)


# ---- Items ---------------------------------------------------------------------------------------


def test_items_are_db_in_the_order_vh_vv(root):
    data = FloodDataset(root)
    assert len(data) == 6 and data.size == S and data.split == "train" and data.UNITS == "dB"
    for i, (_, first, second, label) in enumerate(PAIRS["train"]):
        *images, found = data[i]
        for image, name in zip(images, (first, second)):
            assert image.shape == (2, S, S) and image.dtype == torch.float32
            torch.testing.assert_close(
                image, torch.tensor(decibels(name), dtype=torch.float32).view(2, 1, 1).expand(2, S, S)
            )
        assert found.dtype == torch.int64 and found.shape == () and found == label
        assert torch.equal(torch.stack([data.image(i, 0), data.image(i, 1)]), torch.stack(images))
    assert data[0][0][0, 0, 0] == pytest.approx(-20) and data[0][0][1, 0, 0] == pytest.approx(-6.9897, abs=1e-4)
    assert data.nonfinite.value == 0


def test_rows_and_columns_stay_where_they_are(curated, store):
    ramp = np.arange(1, 4 * S * S + 1, dtype=np.float32).reshape(2, 2, S, S)
    write_pair(curated, "test", PAIRS["test"][0], ramp)
    write_image(store, "1", "a9", ramp[0])
    write_image(store, "1", "b-0.x", np.asfortranarray(ramp[1]))
    for root in (curated, store):
        first, second, _ = FloodDataset(root, "test")[0]
        np.testing.assert_allclose(torch.stack([first, second]), 10 * np.log10(ramp), rtol=1e-6)


def test_both_layouts_give_the_same(curated, store):
    for split, options in (("train", {}), ("test", {}), ("all", {}), ("val", {"val_fraction": 0.5})):
        one, other = FloodDataset(curated, split, **options), FloodDataset(store, split, **options)
        assert one.ids.tolist() == other.ids.tolist() and one.groups.tolist() == other.groups.tolist()
        assert one.describe()["fingerprint"] == other.describe()["fingerprint"]
        assert one.check_units() == other.check_units()
        for a, b in zip(one, other):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_what_is_not_positive_or_not_finite_is_minus_60_db_and_counted(root):
    bad = linear("a9")
    bad[0, 0, :6] = 0, -1, np.nan, np.inf, -np.inf, 1e-7
    if (root / "images").exists():
        write_image(root, "1", "a9", bad)
    else:
        write_pair(root, "test", PAIRS["test"][0], np.stack([bad, linear("b-0.x")]))
    data = FloodDataset(root, "test")
    image = data[0][0]
    assert image[0, 0, :5].tolist() == [-60] * 5 and image[0, 0, 5] == pytest.approx(-70, abs=1e-4)
    assert torch.equal(image[0, 1:].unique(), image[0, 1, :1]) and torch.equal(image[1].unique(), image[1, 0, :1])
    assert data.nonfinite.value == 3
    data[0]
    assert data.nonfinite.value == 6 == data.subset([0]).nonfinite.value
    assert data.check_units()["nonfinite"] == 3 and data.nonfinite.value == 6
    share = 3 / (2 * S * S)
    fails(
        "a9",
        f"{share:.2%} of the pixels",
        "--max_nonfinite",
        call=lambda: FloodDataset(root, "test", max_nonfinite=share / 2)[0],
    )


def test_two_workers_count_non_finite_pixels_together(store):
    for folder, first, *_ in PAIRS["train"]:
        image = linear(first)
        image[1, 5, :7] = np.nan
        write_image(store, folder, first, image)
    data = FloodDataset(store)
    batches = list(DataLoader(data, batch_size=2, num_workers=2))
    assert data.nonfinite.value == 7 * 7  # six first images, and a1 where it is the second
    for k in (0, 1):
        assert torch.equal(torch.cat([batch[k] for batch in batches]), torch.stack([item[k] for item in data]))
    assert torch.cat([batch[2] for batch in batches]).tolist() == [0, 1, 1, 0, 1, 0]


# ---- Records -------------------------------------------------------------------------------------


def test_names_labels_and_places(curated, store):
    files, lists = FloodDataset(curated, "all"), FloodDataset(store, "all")
    for data in (files, lists):
        assert data.ids.tolist() == [f"{f}__{a}__{b}" for f, a, b, _ in PAIRS["train"] + PAIRS["test"]]
        assert data.groups.tolist() == ["0001"] * 3 + ["0002", "0003", "0004", "1"]
        table = data.label_table()
        assert table.dtype == np.uint8 and table.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]
    assert files.where(1) == "train/0001__a0__a2__1.npy" and files.where(6) == "test/1__a9__b-0.x__1.npy"
    assert lists.where(1) == "pairs_train.csv:3" and lists.where(6) == "pairs_test.csv:2"
    assert files.metadata == [curated / "train", curated / "test"]
    assert lists.metadata == [store / "pairs_train.csv", store / "pairs_test.csv"]


def test_subset(root):
    data = FloodDataset(root)
    for rows in ([4, 1], np.array([False, True, False, False, True, False])):
        part = data.subset(rows)
        assert sorted(part.ids.tolist()) == ["0001__a0__a2", "0003__a5__a6"]
        assert part.label_table().tolist() == [[0, 1]] * 2
        assert part.nonfinite is data.nonfinite and len(data) == 6
    assert torch.equal(data.subset([4])[0][1], data[4][1]) and data.subset([4]).where(0) == data.where(4)


def test_describe_is_json(root):
    record = json.loads(json.dumps(FloodDataset(root).describe()))
    assert record["name"] == "FloodDataset" and record["root"] == str(root) and record["split"] == "train"
    assert record["samples"] == 6 and record["class_counts"] == {"no flood": 3, "flood": 3}
    assert len(record["metadata"]) == 1
    assert record["fingerprint"] != FloodDataset(root, "test").describe()["fingerprint"]


def test_check_units(store):
    image = linear("a9")
    image[0, :64], image[1, 0, 0] = 0.1, np.nan
    write_image(store, "1", "a9", image)
    report = FloodDataset(store, "test").check_units()
    (vh1, vv1), (vh2, vv2) = decibels("a9"), decibels("b-0.x")
    assert report["mean"] == pytest.approx(
        [(-10 + vh1 + 2 * vh2) / 4, (vv1 * (S * S - 1) + vv2 * S * S) / (2 * S * S - 1)]
    )
    vh = np.array([-10, vh1, vh2, vh2])
    assert report["std"] == pytest.approx([vh.std(), abs(vv2 - vv1) / 2], abs=1e-4)
    assert report["min"] == pytest.approx([-10, vv1], abs=1e-5) and report["max"] == pytest.approx([vh2, vv2], abs=1e-5)
    assert report["nonfinite"] == 1
    assert FloodDataset(store, "all").check_units(samples=1)["mean"][0] == pytest.approx(
        np.mean([-20, decibels("a1")[0]])
    )
    for name in ("a9", "b-0.x"):
        write_image(store, "1", name, 10 * np.log10(linear(name)) - np.float32(5))
    fails("a9.npy", "mostly negative", "looks like dB", "10**(dB/10)", call=FloodDataset(store, "test").check_units)


# ---- Splits --------------------------------------------------------------------------------------


def test_validation_takes_whole_training_folders(root):
    whole = FloodDataset(root, "train_val", val_fraction=0.5)
    assert len(whole) == 6
    drawn = set()
    for seed in range(8):
        train, val = (FloodDataset(root, split, val_fraction=0.5, seed=seed) for split in ("train", "validation"))
        assert len(set(val.groups)) == 2 and not set(val.groups) & set(train.groups) and val.split == "val"
        assert sorted([*train.ids, *val.ids]) == sorted(whole.ids)
        drawn.add(tuple(sorted(set(val.groups))))
    assert len(drawn) > 1
    assert len(set(FloodDataset(root, "val", val_fraction=0.01).groups)) == 1
    assert FloodDataset(root, "test", val_fraction=0.5).ids.tolist() == ["1__a9__b-0.x"]


def test_validation_folders_do_not_depend_on_the_order_of_the_list(store):
    before = set(FloodDataset(store, "val", val_fraction=0.5, seed=3).groups)
    write_csv(store / "pairs_train.csv", [HEADER, *PAIRS["train"][::-1]])
    assert set(FloodDataset(store, "val", val_fraction=0.5, seed=3).groups) == before


def test_lists_of_folders_make_up_the_split(root, tmp_path, caplog):
    one = write_csv(tmp_path / "sen12_train.csv", [["0003"], ["1"], ["0003"]])
    two = write_csv(tmp_path / "more.csv", [["0001"], ["0077"]])
    for split in ("train", "val", "test", "all"):
        assert FloodDataset(root, split, metadata=one).ids.tolist() == ["0003__a5__a6", "1__a9__b-0.x"]
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        data = FloodDataset(root, "test", metadata=[one, str(two)])
    assert set(data.groups) == {"0001", "0003", "1"} and data.metadata == [one, two]
    assert "1 of 4 listed folders have no pair: 0077" in caplog.text and "more.csv:2" in caplog.text
    train, val = (FloodDataset(root, split, [one, two], val_fraction=0.3) for split in ("train", "val"))
    assert len(set(val.groups)) == 1 and set(train.groups) | set(val.groups) == {"0001", "0003", "1"}
    assert not set(train.groups) & set(val.groups)


def test_a_part_that_is_not_asked_for_may_be_absent(root, tmp_path):
    for path in (root / "test").glob("*"):
        path.unlink()
    (root / "test").rmdir() if (root / "test").exists() else (root / "pairs_test.csv").unlink()
    assert len(FloodDataset(root)) == 6
    assert len(FloodDataset(root, metadata=write_csv(tmp_path / "folders.csv", [["0001"]]))) == 3
    fails("test", "cannot be", root=root, split="test")
    fails("test", "cannot be", root=root, split="all")


# ---- Faults --------------------------------------------------------------------------------------


def test_what_cannot_be_a_dataset(root, tmp_path):
    fails("nowhere", "--data_path", root=tmp_path / "nowhere")
    fails("neither", "train/", "pairs_train.csv", "--data_path", root=tmp_path)
    fails("unknown split 'dev'", root=root, split="dev")
    fails("--val_fraction", "--val_split test", root=root, split="val")
    fails("--val_fraction 1.5", "below 1", root=root, val_fraction=1.5)
    fails("--val_fraction 0.9 of 4 folders", "nothing to train on", root=root, val_fraction=0.9)
    (root / "train").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    fails("both", "images", "train", root=root)


def test_lists_of_folders_that_cannot_be_used(root, tmp_path):
    fails("none.csv", "cannot be read", root=root, metadata=tmp_path / "none.csv")
    lists = write_csv(tmp_path / "bad.csv", [["0001"], ["../x"], ["0002", "0003"], [".hidden"]])
    fails("bad.csv", "3 rows", "'../x' (", ":2)", "'0002,0003' (", ":3)", root=root, metadata=lists)
    fails("other.csv", "none of the 2", root=root, metadata=write_csv(tmp_path / "other.csv", [["0009"], ["8"]]))


def test_file_names_that_do_not_parse(curated):
    for name in (
        "0001__a0__a1__2.npy",
        "0001__a0__a1.npy",
        "0001__a0____1.npy",
        "a b__c__d__1.npy",
        "x.npy",
        "1__.._a__b__1.npy.npy",
    ):
        (curated / "train" / name).write_bytes(b"")
    fails(
        "6 of 12 files",
        "0001__a0__a1__2.npy",
        "<folder>__<first image>__<second image>__<label 0 or 1>.npy",
        "and 1 more",
        "rename",
        root=curated,
    )


def test_other_files_among_the_pairs_are_left_alone(curated):
    for name in ("README.txt", ".0001__a0__a1__0.npy", "0001__a0__a1__0.npy.tmp"):
        (curated / "train" / name).write_text("")
    assert len(FloodDataset(curated)) == 6


@pytest.mark.parametrize(
    "row",
    [
        ("../..", "a", "b", "1"),
        ("0001", ".a", "b", "1"),
        ("0001", "a/b", "c", "1"),
        ("0001", "a", "b", "2"),
        ("0001", "", "b", "1"),
        ("0001", "a", "b"),
        ("0001", "a__b", "c", "0"),
        ("0001", "a\nb", "c", "0"),
    ],
)
def test_rows_that_do_not_parse(store, row):
    write_csv(store / "pairs_train.csv", [HEADER, *PAIRS["train"], row])
    fails("pairs_train.csv", "1 of 7 rows", "(pairs_train.csv:8)", "label 0 or 1", root=store)


def test_lists_without_header_or_rows(store):
    write_csv(store / "pairs_train.csv", PAIRS["train"])
    fails("pairs_train.csv", "no column folder, first, second, label", "'0001'", root=store)
    write_csv(store / "pairs_train.csv", [HEADER[:3], *[row[:3] for row in PAIRS["train"]]])
    fails("pairs_train.csv", "no column label", root=store)
    write_csv(store / "pairs_train.csv", [HEADER])
    fails("pairs_train.csv", "no pair of split 'train'", root=store)
    (store / "pairs_train.csv").write_text("")
    fails("pairs_train.csv", "no column", root=store)


def test_columns_are_found_by_name(store):
    write_csv(
        store / "pairs_train.csv",
        [
            ["label", "second", "more", "folder", "first"],
            *[(label, b, "x", folder, a) for folder, a, b, label in PAIRS["train"]],
        ],
    )
    data = FloodDataset(store)
    assert data.ids[1] == "0001__a0__a2" and data[1][2] == 1


def test_repeated_pairs(curated, store):
    write_csv(store / "pairs_train.csv", [HEADER, *PAIRS["train"], ("0001", "a0", "a2", 0)])
    fails("1 of 7 pairs are repeated", "0001__a0__a2 (pairs_train.csv:3 and pairs_train.csv:8)", "remove", root=store)
    write_pair(curated, "test", ("0003", "a5", "a6", 0))
    fails(
        "1 of 8 pairs",
        "0003__a5__a6 (train/0003__a5__a6__1.npy and test/0003__a5__a6__0.npy)",
        root=curated,
        split="all",
    )


def test_files_that_are_missing_or_foreign(curated):
    data = FloodDataset(curated)
    paths = [curated / data.where(i) for i in range(6)]
    whole = paths[1].read_bytes()
    paths[1].unlink()
    paths[2].write_bytes(b"")
    paths[3].write_bytes(whole[:5000])
    np.save(paths[4], np.ones((2, 2, S, S)))
    with open(paths[5], "wb") as file:
        np.savez(file, a=np.ones(3))
    faults = [
        "does not exist",
        "is empty",
        "truncated",
        "holds float64 of shape (2, 2, 128, 128), not float32 of (2, 2, S, S)",
        ".npz",
    ]
    fails(
        "5 of 6 image files", *[f"{data.where(i)} " for i in range(1, 6)], *faults, str(curated), call=data.check_files
    )
    data.check_files(start=0, step=6)
    fails("2 of 3 image files", call=lambda: data.check_files(start=0, step=2))
    for i, fault in enumerate(faults, start=1):
        fails(str(paths[i]), fault, "copy it again", call=lambda i=i: data[i])
    np.save(paths[1], np.array([{}], dtype=object), allow_pickle=True)
    paths[2].write_bytes(b"\x93NUMPY\x01\x00\x40\x00{'descr': '<f4', (" + b" " * 100)
    for i in (1, 2):
        fails(str(paths[i]), "no .npy file", call=lambda i=i: data[i])


def test_images_that_are_missing_are_named_once_with_their_row(store):
    FloodDataset(store, "all").check_files()
    (store / "images" / "0001" / "a2.npy").unlink()
    fails(
        "1 of 9 image files",
        "images/0001/a2.npy does not exist (pairs_train.csv:3)",
        call=FloodDataset(store).check_files,
    )
    fails("a2.npy", "does not exist", "(pairs_train.csv:4)", call=lambda: FloodDataset(store)[2])


@pytest.mark.parametrize("shape", [(3, S, S), (2, S, 2 * S), (2, 100, 100), (S, S), (2, 0, 0), ()])
def test_images_of_another_shape(store, shape):
    path = write_image(store, "0001", "a0", np.ones(shape, np.float32))
    fails(str(path), f"shape {shape}", "(2, S, S)", "multiple of 128", call=lambda: FloodDataset(store).size)
    fails("1 of 9 image files", "images/0001/a0.npy holds", call=FloodDataset(store).check_files)


def test_all_images_have_one_size(store):
    path = write_image(store, "0003", "a6", linear("a6", 2 * S))
    fails(str(path), "256x256", "128x128", "one size", call=lambda: FloodDataset(store)[4])
    fails(
        "1 of 9 image files", "images/0003/a6.npy is 256x256 pixels, not 128x128", call=FloodDataset(store).check_files
    )
    for name in ("a5", "a6"):
        write_image(store, "0003", name, linear(name, 2 * S))
    write_csv(store / "folders.csv", [["0003"]])
    data = FloodDataset(store, metadata=store / "folders.csv")
    assert data.size == 256 and data[0][1].shape == (2, 256, 256)


def test_errors_come_back_from_workers(store):
    data = FloodDataset(store)
    (store / "images" / "0002" / "a4.npy").unlink()
    message = ""
    try:
        list(DataLoader(data, batch_size=2, num_workers=2))
    except DataError as error:
        message = str(error)
        traceback.clear_frames(error.__traceback__)  # else a cycle keeps the loader, and its end then waits 10 s
    assert "a4.npy: does not exist" in message and "pairs_train.csv:5" in message
