# SPDX-License-Identifier: MIT
"""BigEarthNet v1: folders and Zarr stores, 43 to 19 classes, split lists, and what is said about faulty ones."""

import logging
import warnings

import numpy as np
import pytest
import rasterio
import torch
import zarr
from torch.utils.data import DataLoader

from sarwmix.bigearthnetv1 import BigEarthNetv1
from tests.helpers.dataset_fixtures import (
    V1_CLASSES,
    classes_of,
    fails_with,
    needs_samples,
    s1_name,
    s2_name,
    sample_path,
    write_csv,
    write_v1,
    write_v1_patch,
    write_v1_zarr,
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "v1").mkdir()
    return write_v1(tmp_path / "v1")


@pytest.fixture(params=[2, 3])
def store(request, tmp_path):
    return write_v1_zarr(tmp_path / "v1.zarr", request.param)


def fails(*parts, **arguments):
    fails_with(lambda: BigEarthNetv1(**arguments), *parts)


def classes(data):
    return [classes_of(labels) for _, labels in data]


# ---- Values --------------------------------------------------------------------------------------


def check_items(data):
    assert data.ids.tolist() == [s1_name(k) for k in range(3)]
    for k, (sar, labels) in enumerate(data):
        assert sar.shape == (2, 120, 120) and sar.dtype == torch.float32
        assert (sar[0] == -20 - k).all() and (sar[1] == -10 - k).all()
        assert labels.shape == (19,) and labels.dtype == torch.float32
        assert classes_of(labels) == V1_CLASSES[k]


def test_items_of_folders(root):
    check_items(BigEarthNetv1(root, "all"))


def test_items_of_zarr_equal_those_of_folders(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = BigEarthNetv1(store, "all")
        check_items(data)
        data.check_files()
    assert data.check_units()["mean"] == [-21, -11]


REAL_CLASSES = [  # by sorted name, from their 43-class labels by hand
    (2, 6),  # non-irrigated arable land; agriculture with natural vegetation
    (2, 4),  # non-irrigated arable land; pastures
    (4,),  # pastures
    (9, 10, 13, 15, 17),  # coniferous, mixed forest; transitional woodland/shrub; peatbogs; water bodies
    (5, 6, 8, 13),  # complex cultivation; agriculture with natural vegetation; broad-leaved; transitional woodland
    (2, 9, 10),  # non-irrigated arable land; coniferous, mixed forest
]


@needs_samples
def test_real_samples():
    data = BigEarthNetv1(sample_path("benv1"), "all")
    assert len(data) == 6 and data.ids.tolist() == sorted(data.ids.tolist())
    data.check_files()
    for i in range(6):
        sar, labels = data[i]
        for channel, path in enumerate(data.files(i)):
            with rasterio.open(path) as file:
                np.testing.assert_array_equal(sar[channel].numpy(), file.read(1))
        assert classes_of(labels) == REAL_CLASSES[i]
    report = data.check_units()
    assert report["mean"][0] < report["mean"][1] < 0 and report["nonfinite"] == 0


@pytest.mark.parametrize("inner", [True, False])
def test_the_folder_of_patches_or_the_one_that_holds_it(tmp_path, inner):
    (tmp_path / "BigEarthNet-S1-v1.0").mkdir()
    write_v1(tmp_path / "BigEarthNet-S1-v1.0")
    write_csv(tmp_path / "benv1_val.csv", [[s2_name(1), s1_name(1)]])
    data = BigEarthNetv1(tmp_path if not inner else tmp_path / "BigEarthNet-S1-v1.0", "val")
    assert classes(data) == [V1_CLASSES[1]]


def test_unlabelled_patches_stay_or_are_dropped_and_counted(root, store, caplog):
    for where in (root, store):
        caplog.clear()
        assert len(BigEarthNetv1(where, "all")) == 3
        with caplog.at_level(logging.INFO):
            data = BigEarthNetv1(where, "all", keep_unlabelled=False)
        assert data.ids.tolist() == [s1_name(0), s1_name(1)] and classes(data) == V1_CLASSES[:2]
        assert "dropped 1 of 3 patches" in caplog.text
        assert data.describe()["class_counts"]["Inland waters"] == 1
        assert BigEarthNetv1(where, "all").describe()["class_counts"] is None
    only = write_csv(root / "only.csv", [[s2_name(2), s1_name(2)]])
    fails("none of the 1 patches has a 19-class label", root=root, metadata=only, keep_unlabelled=False)


# ---- Split lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0)])
def test_official_lists_of_s2_names_are_mapped_by_the_json_files(root, order):
    path = write_csv(root / "train.csv", [[s2_name(k)] for k in order])
    data = BigEarthNetv1(root, "train", metadata=path)
    assert data.ids.tolist() == [s1_name(k) for k in order]
    assert data.where(1) == "train.csv:2"


@pytest.mark.parametrize(
    ("header", "row", "id_col"),
    [
        (None, lambda k: [s2_name(k), s1_name(k)], None),
        (None, lambda k: [s2_name(k), s1_name(k)], 1),
        (["s2", "s1"], lambda k: [s2_name(k), s1_name(k)], None),
        (["", "s2", "s1"], lambda k: [k, s2_name(k), s1_name(k)], None),  # pandas' index
        (["", "s2", "s1"], lambda k: [k, s2_name(k), s1_name(k)], 2),
        (None, lambda k: [s1_name(k)], None),
        (["name"], lambda k: [s1_name(k)], None),
        (["a", "b", "c"], lambda k: [s1_name(k), s2_name(k), "x"], None),
        (None, lambda k: [s1_name(k), s2_name(k)], 0),
        (None, lambda k: [s1_name(k), s2_name(k)], 1),  # names asked for by their S2 partner
    ],
)
def test_lists_with_and_without_header(root, header, row, id_col):
    path = write_csv(root / "mine.csv", ([header] if header else []) + [row(k) for k in (2, 0)])
    data = BigEarthNetv1(root, metadata=path, id_col=id_col)
    assert data.ids.tolist() == [s1_name(2), s1_name(0)]
    assert data.where(0) == f"mine.csv:{2 if header else 1}"


def test_several_lists_of_s2_names_read_the_metadata_once(root, caplog):
    lists = [write_csv(root / f"{k}.csv", [[s2_name(k)]]) for k in (2, 0)]
    with caplog.at_level(logging.INFO):
        data = BigEarthNetv1(root, metadata=lists)
    assert data.ids.tolist() == [s1_name(2), s1_name(0)] and [data.where(i) for i in range(2)] == ["2.csv:1", "0.csv:1"]
    assert caplog.text.count("reading the metadata of 3 patches") == 1


def test_default_lists_and_their_union(root, store):
    for where in (root, store.parent):  # in the folder, or beside the store
        for name, k in (("train", 2), ("val", 0)):
            write_csv(where / f"benv1_{name}.csv", [[s2_name(k), s1_name(k)]])
    for where in (root, store):
        assert BigEarthNetv1(where, "validation").ids.tolist() == [s1_name(0)]
        both = BigEarthNetv1(where)
        assert both.ids.tolist() == [s1_name(2), s1_name(0)]
        assert [both.where(i).endswith(f"benv1_{n}.csv:1") for i, n in enumerate(("train", "val"))] == [True, True]
        fails("split all lacks 1 of its lists", "benv1_test.csv", root=where, split="all")
    both = BigEarthNetv1(root, metadata=[root / "benv1_val.csv", root / "benv1_train.csv"])
    assert both.ids.tolist() == [s1_name(0), s1_name(2)]


def test_without_lists_every_patch_is_taken_and_said_so(root, caplog):
    (root / "notes").mkdir()
    with caplog.at_level(logging.INFO):
        data = BigEarthNetv1(root)
    assert len(data) == 3 and "no split lists" in caplog.text and data.where(2) == f"v1/{s1_name(2)}"
    fails("benv1_train.csv", "--metadata", root=root, split="train")


# ---- Faults --------------------------------------------------------------------------------------


def test_what_does_not_exist_or_is_empty(root, tmp_path):
    fails("nowhere", "--data_path", root=tmp_path / "nowhere")
    fails("none.csv", "cannot be read", root=root, metadata=root / "none.csv")
    fails("unknown split 'dev'", root=root, split="dev")
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_group("sentinel2")
    fails("other.zarr", "no group sentinel1", root=tmp_path / "other.zarr")
    head = write_csv(root / "head.csv", [["s1"]])
    fails("head.csv", "no S1 or S2 patch name", "--id_col", root=root, metadata=head)


def test_s2_names_of_no_patch_are_counted_and_located(root):
    path = write_csv(root / "mine.csv", [[s2_name(k)] for k in range(8)])
    fails("5 of 8 S2 names belong to none of the 3 patches", f"{s2_name(3)} (mine.csv:4)", root=root, metadata=path)
    write_v1_patch(root, 3, labels=["Pastures"])
    metadata = root / s1_name(3) / f"{s1_name(3)}_labels_metadata.json"
    metadata.write_text(metadata.read_text().replace(s2_name(3), s2_name(0)))
    fails(s1_name(0), s1_name(3), "both belong to", s2_name(0), root=root, metadata=path)


def test_faulty_rows_are_counted_and_located(root):
    good = [s2_name(0), s1_name(0)]
    path = write_csv(root / "twice.csv", [good, [s2_name(1), s1_name(1)], good])
    fails("1 of 3 rows repeat an id", f"{s1_name(0)} (twice.csv:1 and twice.csv:3)", root=root, metadata=path)
    path = write_csv(root / "bad.csv", [good, [s2_name(1), "S1A_IW_GRDH/../x_1_2"], [s2_name(2), "S1A_5"], ["x", ""]])
    fails("3 of 4 rows have no S1 patch name", "'S1A_IW_GRDH/../x_1_2' (bad.csv:2)", "'S1A_5' (bad.csv:3)",
          "'' (bad.csv:4)", root=root, metadata=path)  # fmt: skip
    path = write_csv(root / "s2.csv", [[s2_name(0)], ["S2B_../.."]])
    fails("1 of 2 rows have no S2 patch name", "(s2.csv:2)", root=root, metadata=path)


def test_faulty_labels_are_found_before_training(root):
    path, reason = root / s1_name(1) / f"{s1_name(1)}_labels_metadata.json", "unknown label 'Sea'"
    path.write_text('{"labels": ["Pastures", "Sea"]}')
    fails("1 of 3 patches have labels that cannot be read", str(path), reason, root=root, split="all",
          keep_unlabelled=False)  # fmt: skip
    data = BigEarthNetv1(root, "all")
    fails_with(data.check_files, "1 of 3 patches", str(path), reason)
    data.check_files(start=0, step=2)
    fails_with(lambda: data[1], str(path), reason)


def test_check_files_of_folders(root):
    data = BigEarthNetv1(root, "all")
    (root / data.files(1)[0]).unlink()
    fails_with(data.check_files, "1 of 3 samples", f"{s1_name(1)} VH (v1/{s1_name(1)})")


@pytest.mark.parametrize("lost", ["array", "chunk"])
def test_check_files_of_zarr(store, lost):
    data = BigEarthNetv1(store, "all")
    array = store / "sentinel1" / s1_name(1) / "VV"
    remove = [path for path in sorted(array.rglob("*"), reverse=True) if lost == "array" or "json" not in path.name]
    for path in remove:
        if path.name not in (".zarray", ".zattrs") or lost == "array":
            path.rmdir() if path.is_dir() else path.unlink()
    fails_with(data.check_files, "1 of 3 samples", f"{s1_name(1)} VV")
    fails_with(lambda: data[1], str(array))


def test_misshapen_zarr_arrays_are_named(store):
    data = BigEarthNetv1(store, "all")
    group = zarr.open_group(store / "sentinel1" / s1_name(1), mode="a")
    group.create_array("VH", shape=(60, 60), dtype="float32", overwrite=True)[:] = -20
    fails_with(lambda: data[1], data.files(1)[0], "60x60")


@pytest.mark.parametrize("found, put", [("chunk_shape", "dhunk_shape"), ("float32", "gloat32"), ("regular", "segular")])
def test_damaged_metadata_of_an_array_is_named(tmp_path, found, put):
    data = BigEarthNetv1(write_v1_zarr(tmp_path / "v1.zarr", 3), "all")
    path = tmp_path / "v1.zarr" / "sentinel1" / s1_name(1) / "VV" / "zarr.json"
    assert found in path.read_text()
    path.write_text(path.read_text().replace(found, put))
    fails_with(lambda: data[1], str(path.parent), "copy it again")


def test_nan_in_zarr(store):
    group = zarr.open_group(store / "sentinel1" / s1_name(1), mode="a")
    group["VH"][0, :] = np.nan
    assert BigEarthNetv1(store, "all")[1][0].isnan().sum() == 120
    group["VH"][1, :] = np.nan
    fails_with(lambda: BigEarthNetv1(store, "all")[1], f"{s1_name(1)}/VH", "1.67%", "--max_nonfinite")


# ---- Workers -------------------------------------------------------------------------------------


def test_two_workers_read_a_store_that_the_trainer_has_read_before(store):
    data = BigEarthNetv1(store, "all")
    expected = torch.stack([sar for sar, _ in data])
    batches = list(DataLoader(data, batch_size=1, num_workers=2))
    assert torch.equal(torch.cat([sar for sar, _ in batches]), expected)
    assert [classes_of(labels[0]) for _, labels in batches] == V1_CLASSES
