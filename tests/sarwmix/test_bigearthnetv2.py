# SPDX-License-Identifier: MIT
"""BigEarthNet v2: band order, labels however they are printed, splits, and what is said about faulty metadata."""

import json
import logging
import pickle
import threading
import traceback

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader

from common.errors import DataError
from sarwmix import listing
from sarwmix.bigearthnet import CLASSES, CLC43, parse_labels
from sarwmix.bigearthnetv2 import SNOW_CLOUD, BigEarthNetv2
from tests.helpers.dataset_fixtures import (
    AGRICULTURE,
    V2_CLASSES,
    classes_of,
    fails_with,
    needs_samples,
    one_line,
    s1_name,
    sample_path,
    v2_frame,
    write_csv,
    write_tif,
    write_v2,
    write_v2_patch,
)

HEADER = ["patch_id", "labels", "split", "country", "s1_name"]


@pytest.fixture
def root(tmp_path):
    return write_v2(tmp_path)


def fails(*parts, **arguments):
    fails_with(lambda: BigEarthNetv2(**arguments), *parts)


def rows_of(*labels, split="train"):
    """CSV rows of samples 0, 1, … with these printed labels."""
    return [[f"S2A_{k}", text, split, "Austria", s1_name(k)] for k, text in enumerate(labels)]


# ---- Values --------------------------------------------------------------------------------------


def test_items_are_vh_then_vv_with_their_labels(root):
    data = BigEarthNetv2(root, split="all")
    assert data.ids.tolist() == [s1_name(k) for k in range(4)]
    for k, (sar, labels) in enumerate(data):
        assert sar.shape == (2, 120, 120) and sar.dtype == torch.float32
        assert (sar[0] == -20 - k).all() and (sar[1] == -10 - k).all()
        assert labels.shape == (19,) and labels.dtype == torch.float32 and set(labels.tolist()) <= {0.0, 1.0}
        assert classes_of(labels) == V2_CLASSES[k]
    assert data.CHANNELS == ("VH", "VV") and data.UNITS == "dB"


@pytest.mark.parametrize(
    ("split", "samples"),
    [("train", [0, 3]), ("val", [1]), ("validation", [1]), ("test", [2]), ("train_val", [0, 1, 3]), ("all", range(4))],
)
def test_splits_keep_the_order_of_the_metadata(root, split, samples):
    assert BigEarthNetv2(root, split=split).ids.tolist() == [s1_name(k) for k in samples]


@needs_samples
def test_a_real_sample_equals_rasterio(tmp_path):
    name = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_70_48"
    listed = write_csv(tmp_path / "one.csv", [["s1_name", "labels"], [name, "['Mixed forest' 'Pastures']"]])
    data = BigEarthNetv2(sample_path("benv2"), metadata=listed)
    sar, labels = data[0]
    for channel, path in enumerate(data.files(0)):
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(sar[channel].numpy(), file.read(1))
    assert classes_of(labels) == (4, 10)
    assert sar[0].mean() < sar[1].mean() < 0  # cross-polarised backscatter is the weaker one
    assert data.check_units()["mean"] == pytest.approx(sar.mean((1, 2)).tolist(), rel=1e-5)


@needs_samples
def test_the_official_parquet_is_read():
    data = BigEarthNetv2(sample_path("benv2"), split="all")
    assert len(data) == 18
    assert data.label_table().any(1).all()


def test_snow_and_cloud_patches_come_after_the_others_of_their_split(root):
    v2_frame().iloc[[2, 3]].to_parquet(root / "metadata.parquet")
    v2_frame().iloc[[1, 0]].to_parquet(root / SNOW_CLOUD)
    assert BigEarthNetv2(root, "all").ids.tolist() == [s1_name(k) for k in (2, 3)]
    for split, samples in (
        ("all", (2, 3, 1, 0)),
        ("train", (3, 0)),
        ("val", (1,)),
        ("test", (2,)),
        ("train_val", (3, 1, 0)),
    ):
        data = BigEarthNetv2(root, split, include_snow_cloud=True)
        assert data.ids.tolist() == [s1_name(k) for k in samples]
        assert [classes_of(data[i][1]) for i in range(len(data))] == [V2_CLASSES[k] for k in samples]
    data = BigEarthNetv2(root, "train", include_snow_cloud=True)
    assert [data.where(i) for i in range(2)] == ["metadata.parquet: row 1", f"{SNOW_CLOUD}: row 1"]
    assert data.describe()["metadata"] == [str(root / name) for name in ("metadata.parquet", SNOW_CLOUD)]


def test_snow_and_cloud_patches_that_cannot_be_added(root):
    fails(str(root / SNOW_CLOUD), "does not exist", "--include_snow_cloud", root=root, include_snow_cloud=True)
    v2_frame().iloc[[1]].to_parquet(root / SNOW_CLOUD)
    fails("1 of 4 rows repeat an id", f"{s1_name(1)} (metadata.parquet: row 1 and {SNOW_CLOUD}: row 0)", root=root,
          include_snow_cloud=True)  # fmt: skip
    fails("--include_snow_cloud", "--metadata", root=root, metadata=root / "metadata.parquet", include_snow_cloud=True)


@needs_samples
def test_the_official_snow_and_cloud_patches():
    data = BigEarthNetv2(sample_path("benv2"), "all", include_snow_cloud=True)
    assert len(data) == 24 and data.where(18) == f"{SNOW_CLOUD}: row 0" and data.label_table().any(1).all()
    parts = [BigEarthNetv2(sample_path("benv2"), part, include_snow_cloud=True) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 24 and all(part.where(len(part) - 1).startswith(SNOW_CLOUD) for part in parts)


def test_class_table():
    assert len(CLASSES) == 19 and CLASSES[6] == AGRICULTURE and CLASSES[18] == "Marine waters"
    assert len(CLC43) == 43 and sum(target is None for target in CLC43.values()) == 11
    assert CLASSES[CLC43["Sparsely vegetated areas"]] == "Natural grassland and sparsely vegetated areas"


# ---- CSV dumps -----------------------------------------------------------------------------------

PRINTED = {
    "python": f"['Arable land', '{AGRICULTURE}', 'Transitional woodland, shrub']",
    "numpy": f"['Arable land'\n '{AGRICULTURE}'\n 'Transitional woodland, shrub']",
    "numpy one line": f"['Arable land' '{AGRICULTURE}' 'Transitional woodland, shrub']",
    "double quotes": f'["Arable land", "{AGRICULTURE}", "Transitional woodland, shrub"]',
    "python lines": f"[ 'Arable land',\r\n '{AGRICULTURE}',\r\n 'Transitional woodland, shrub', ]",
}


@pytest.mark.parametrize("style", PRINTED)
def test_labels_with_commas_in_every_printed_style(root, style):
    path = write_csv(root / "my.csv", [HEADER, *rows_of(PRINTED[style], "['Mixed forest']")])
    data = BigEarthNetv2(root, metadata=path)
    assert classes_of(data[0][1]) == (2, 6, 13) and classes_of(data[1][1]) == (10,)
    assert data.where(0) == "my.csv:2"
    assert data.where(1) == f"my.csv:{3 + PRINTED[style].count(chr(10))}"  # the line of the file, not of the record


def test_what_numpy_prints_is_read():
    names = [AGRICULTURE, "Beaches, dunes, sands", "Moors, heathland and sclerophyllous vegetation"]
    assert parse_labels(str(np.array(names, dtype=object))) == names
    assert parse_labels(str(names)) == names
    assert parse_labels("[]") == []


@pytest.mark.parametrize("as_arrays", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_pandas_dumps_with_and_without_index_column(root, as_arrays, index):
    frame = v2_frame()
    if as_arrays:
        frame["labels"] = frame["labels"].map(lambda names: np.array(names, dtype=object))
    frame.to_csv(root / "dump.csv", index=index)
    data = BigEarthNetv2(root, split="all", metadata=root / "dump.csv")
    assert data.ids.tolist() == [s1_name(k) for k in range(4)]
    assert [classes_of(data[k][1]) for k in range(4)] == V2_CLASSES


def test_id_col_names_the_column_if_the_header_does_not(root):
    rows = rows_of("['Mixed forest']")
    path = write_csv(root / "my.csv", [["a", "labels", "split", "b", "c"], *rows])
    assert BigEarthNetv2(root, metadata=path, id_col=4).ids.tolist() == [s1_name(0)]
    fails("my.csv", "no column s1_name", "--id_col", root=root, metadata=path)
    fails("my.csv", "no column 9", "0 to 4", root=root, metadata=path, id_col=9)
    fails("1 of 1 rows have no S1 patch name", "'Austria' (my.csv:2)", root=root, metadata=path, id_col=3)


def test_split_lists_in_the_root(root):
    (root / "metadata.parquet").unlink()
    frame = v2_frame()
    for name, split in (("train", "train"), ("val", "validation")):
        frame[frame["split"] == split].drop(columns="split").to_csv(root / f"benv2_{name}.csv", index=False)
    assert BigEarthNetv2(root, "val").ids.tolist() == [s1_name(1)]
    both = BigEarthNetv2(root, "train_val")
    assert both.ids.tolist() == [s1_name(k) for k in (0, 3, 1)]
    assert [both.where(i) for i in range(3)] == ["benv2_train.csv:2", "benv2_train.csv:3", "benv2_val.csv:2"]
    fails(str(root), "metadata.parquet", "benv2_test.csv", root=root, split="all")

    frame.iloc[[3, 1]].to_csv(root / "benv2_train_val.csv")
    assert BigEarthNetv2(root, "train_val").ids.tolist() == [s1_name(3), s1_name(1)]


def test_a_csv_is_filtered_by_its_split_column_if_it_has_one(root, caplog):
    path = root / "dump.csv"
    v2_frame().to_csv(path)
    assert BigEarthNetv2(root, "test", metadata=path).ids.tolist() == [s1_name(2)]
    v2_frame().drop(columns="split").to_csv(path)
    with caplog.at_level(logging.INFO):
        assert len(BigEarthNetv2(root, "test", metadata=path)) == 4
    assert "no split column" in caplog.text


def test_several_files_and_a_byte_order_mark(root):
    first = write_csv(root / "a.csv", [HEADER, *rows_of("['Mixed forest']")])
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())
    second = write_csv(root / "b.csv", [HEADER, [], rows_of("['Pastures']", "['Pastures']")[1]])
    data = BigEarthNetv2(root, metadata=[first, second])
    assert [data.where(i) for i in range(2)] == ["a.csv:2", "b.csv:3"]
    assert [classes_of(data[i][1]) for i in range(2)] == [(10,), (4,)]


# ---- Faults --------------------------------------------------------------------------------------


def test_what_does_not_exist(root, tmp_path):
    fails("nowhere", "--data_path", root=root / "nowhere")
    fails("none.parquet", "cannot be read", root=root, metadata=root / "none.parquet")
    fails("none.csv", "cannot be read", root=root, metadata=root / "none.csv")
    fails("unknown split 'dev'", "train_val", root=root, split="dev")
    (tmp_path / "bare").mkdir()
    fails("metadata.parquet", "benv2_train.csv", "benv2_val.csv", root=tmp_path / "bare")
    v2_frame().to_parquet(tmp_path / "bare" / "metadata.parquet")
    fails("BigEarthNet-S1", "no such folder", root=tmp_path / "bare")


def test_empty_metadata(root):
    head = write_csv(root / "head.csv", [HEADER])
    fails("head.csv", "no row of split 'train'", root=root, split="train", metadata=head)
    v2_frame().iloc[[0, 3]].to_parquet(root / "metadata.parquet")
    fails("metadata.parquet", "no row of split 'val'", "train 2", "another split", root=root, split="val")


@pytest.mark.parametrize("column", ["labels", "s1_name"])
def test_missing_column(root, column):
    v2_frame().drop(columns=column).to_parquet(root / "metadata.parquet")
    fails("metadata.parquet", f"no column {column}", "'patch_id'", root=root, keep_unlabelled=False)
    v2_frame().drop(columns=column).to_csv(root / "dump.csv")
    fails("dump.csv", f"no column {column}", root=root, metadata=root / "dump.csv", keep_unlabelled=False)


def test_duplicate_ids_are_counted_and_located(root):
    rows = rows_of("['Pastures']", "['Pastures']", "['Pastures']")
    path = write_csv(root / "my.csv", [HEADER, *rows, rows[1], *[rows[0]] * 6])
    name = s1_name(1)
    fails("7 of 10 rows repeat an id", f"{name} (my.csv:3 and my.csv:5)", "my.csv:2 and my.csv:6", "and 2 more",
          "remove the repeated rows", root=root, metadata=path)  # fmt: skip


def test_unknown_labels_are_counted_and_located(root):
    path = write_csv(root / "my.csv", [HEADER, *rows_of("['Pastures']", "['Sea']", "['Pastures' 'Sea']", "Pastures")])
    fails("3 of 4 rows", "unknown label 'Sea' (my.csv:3)", "unknown label 'Sea' (my.csv:4)",
          "not a printed list of quoted names 'Pastures' (my.csv:5)", "bigearthnet_classes.csv",
          root=root, metadata=path, keep_unlabelled=False)  # fmt: skip
    frame = v2_frame()
    frame.at[2, "labels"] = ["Pastures", "Bare rock"]
    frame.at[3, "labels"] = ["Sea"]
    frame.to_parquet(root / "metadata.parquet")
    fails(
        "2 of 4 rows", "unknown label 'Bare rock' (metadata.parquet: row 2)", "(metadata.parquet: row 3)",
        root=root, keep_unlabelled=False,
    )  # fmt: skip


def test_labels_of_many_rows(tmp_path):
    rng = np.random.default_rng(0)
    lists = [rng.choice(CLASSES, rng.integers(1, 6)).tolist() for _ in range(40)]  # a name may stand there twice
    frame = pd.DataFrame(
        {"s1_name": [f"S1A_IW_GRDH_{i}" for i in range(400)], "labels": [lists[k] for k in rng.integers(0, 40, 400)]}
    )
    expected = np.array([[name in names for name in CLASSES] for names in frame["labels"]])
    (tmp_path / "BigEarthNet-S1").mkdir()
    frame.to_parquet(tmp_path / "metadata.parquet", row_group_size=150)
    frame.to_csv(tmp_path / "dump.csv")
    for name in ("metadata.parquet", "dump.csv"):
        np.testing.assert_array_equal(BigEarthNetv2(tmp_path, metadata=tmp_path / name).label_table(), expected)


@pytest.mark.parametrize("different", [200, 300])  # fewer and more than a byte can tell apart
def test_many_unknown_labels_are_counted_and_located(root, different):
    frame = pd.DataFrame({"s1_name": [f"S1A_IW_GRDH_{i}" for i in range(different)]})
    frame["labels"] = [["Pastures", f"Sea {i}"] for i in range(different)]
    frame.at[7, "labels"], frame.at[8, "labels"] = ["Pastures"], []
    frame.to_parquet(root / "metadata.parquet")
    fails(f"{different - 2} of {different} rows", "unknown label 'Sea 0' (metadata.parquet: row 0)",
          f"unknown label 'Sea 4' (metadata.parquet: row 4), and {different - 7} more",
          root=root, keep_unlabelled=False)  # fmt: skip
    frame.iloc[6:10].to_parquet(root / "metadata.parquet")
    fails(
        "2 of 4 rows", "unknown label 'Sea 6' (metadata.parquet: row 0)", "'Sea 9' (metadata.parquet: row 3)",
        root=root, keep_unlabelled=False,
    )  # fmt: skip


def test_unknown_splits_are_counted_and_located(root):
    frame = v2_frame()
    frame.loc[[1, 3], "split"] = ["dev", None]
    frame.to_parquet(root / "metadata.parquet")
    fails("2 of 4 rows have an unknown split", "'dev' (metadata.parquet: row 1)", "row 3", "validation", root=root)
    frame.to_csv(root / "dump.csv")
    fails("'dev' (dump.csv:3)", "'' (dump.csv:5)", root=root, metadata=root / "dump.csv", split="all")


@pytest.mark.parametrize(
    "name", ["S1A_57_48", "S1A_IW/../x_1_2_3", "../S1A_IW_1_2_3", "S1A_IW_..", "", "S2A_M_x_1_2_3", "S1A_a_b_c_d\ne"]
)
def test_malformed_names_are_counted_and_located(root, name):
    rows = rows_of("['Pastures']", "['Pastures']")
    rows[1][4] = name
    path = write_csv(root / "my.csv", [HEADER, *rows])
    fails("1 of 2 rows have no S1 patch name", "(my.csv:3)", "--id_col", root=root, metadata=path)
    frame = v2_frame()
    frame.loc[2, "s1_name"] = name or None
    frame.to_parquet(root / "metadata.parquet")
    fails("1 of 4 rows have no S1 patch name", "(metadata.parquet: row 2)", root=root)


def test_ragged_rows_are_counted_and_located(root):
    path = write_csv(root / "my.csv", [HEADER, *rows_of("['Pastures']"), ["S2A_1", "['Pastures']", "train"]])
    fails("my.csv: 1 of 2 rows", "5 cells", "my.csv:3", root=root, metadata=path)


def test_check_files_names_the_missing_half(root):
    data = BigEarthNetv2(root, "all")
    data.check_files()
    vh, vv = data.files(1)
    (root / vv).unlink()
    (root / data.files(3)[0]).write_bytes(b"")
    with pytest.raises(DataError) as error:
        data.check_files()
    one_line(error, "2 of 4 samples", f"{s1_name(1)} VV (metadata.parquet: row 1)", f"{s1_name(3)} VH (", str(root))
    data.check_files(start=0, step=2)  # samples 0 and 2 are whole
    fails_with(lambda: data.check_files(start=1, step=2), "2 of 2 samples")


def test_check_files_shows_five_of_many(tmp_path):
    (tmp_path / "BigEarthNet-S1").mkdir()
    names = [s1_name(k) for k in range(8)]
    path = write_csv(tmp_path / "m.csv", [["s1_name", "labels"], *[[name, "['Pastures']"] for name in names]])
    with pytest.raises(DataError) as error:
        BigEarthNetv2(tmp_path, metadata=path).check_files()
    one_line(error, "8 of 8 samples", f"{names[4]} VH and VV (m.csv:6)", "and 3 more")
    assert names[5] not in str(error.value)


def test_check_units(root):
    write_v2_patch(root, 0, vh=np.where(np.arange(14400).reshape(120, 120) < 144, np.nan, -24.0).astype(np.float32))
    report = BigEarthNetv2(root, "all").check_units()
    vh = np.repeat([-24.0, -21, -22, -23], [14400 - 144, 14400, 14400, 14400])
    assert report["mean"] == pytest.approx([vh.mean(), -11.5]) and report["std"] == pytest.approx([vh.std(), 1.25**0.5])
    assert report["min"] == [-24, -13] and report["max"] == [-21, -10] and report["nonfinite"] == 144
    assert len({json.dumps(BigEarthNetv2(root, "all").check_units(samples=n)) for n in (1, 2, 4)}) == 3

    for k in range(4):
        write_v2_patch(root, k, vv=0.1)
    fails_with(
        lambda: BigEarthNetv2(root, "all").check_units(),
        "VV is never negative",
        "looks linear",
        "10*log10",
        "--dataset",
        "_VV.tif",
    )


def test_faulty_images_are_named_with_their_row(root):
    data = BigEarthNetv2(root, "all")
    vh, vv = data.files(2)
    write_tif(root / vv, np.zeros((119, 120), np.float32))
    fails_with(lambda: data[2], vv, "119x120", "not 120x120", "metadata.parquet: row 2")
    (root / vh).write_bytes(b"II*\0")
    fails_with(lambda: data[2], vh, "truncated", "metadata.parquet: row 2")
    write_tif(root / data.files(3)[0], np.full((120, 120), np.nan, np.float32))
    fails_with(lambda: data[3], data.files(3)[0], "--max_nonfinite")
    assert BigEarthNetv2(root, "all", max_nonfinite=1.0)[3][0][0].isnan().all()


# ---- Records and workers -------------------------------------------------------------------------


def test_describe_is_json_and_follows_the_ids(root):
    record = json.loads(json.dumps(BigEarthNetv2(root, "train_val").describe()))
    assert record["name"] == "BigEarthNetv2" and record["split"] == "train_val" and record["samples"] == 3
    assert record["metadata"] == [str(root / "metadata.parquet")]
    assert record["class_counts"]["Mixed forest"] == 1 and sum(record["class_counts"].values()) == 4
    v2_frame().iloc[[0, 1, 3]].to_csv(root / "same.csv")
    v2_frame().iloc[[1, 0, 3]].to_csv(root / "other.csv")
    prints = [BigEarthNetv2(root, metadata=root / n).describe()["fingerprint"] for n in ("same.csv", "other.csv")]
    assert record["fingerprint"] == prints[0] != prints[1]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_workers_give_the_same_batches(root, start):
    data = BigEarthNetv2(root, "all")
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    batches = list(loader)
    assert torch.equal(torch.cat([sar for sar, _ in batches]), torch.stack([sar for sar, _ in data]))
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.stack([labels for _, labels in data]))


def test_errors_come_back_from_workers(root):
    data = BigEarthNetv2(root, "all")
    (root / data.files(2)[1]).unlink()
    message = ""
    try:
        list(DataLoader(data, batch_size=2, num_workers=2))
    except DataError as error:
        message = str(error)
        traceback.clear_frames(error.__traceback__)  # else a cycle keeps the loader, and its end then waits 10 s
    assert data.files(2)[1] in message and "does not exist" in message and "metadata.parquet: row 2" in message
    copy = pickle.loads(pickle.dumps(DataError("a: b")))
    assert type(copy) is DataError and str(copy) == "a: b"


def test_the_pickle_holds_arrays_not_objects(root):
    few, many = (BigEarthNetv2(root, split) for split in ("val", "all"))
    per_sample = (len(pickle.dumps(many)) - len(pickle.dumps(few))) / 3
    assert per_sample < 4 * len(s1_name(0)) + 64


@pytest.mark.parametrize("at_once", [0.0, 60.0])
def test_in_threads_keeps_the_order_and_the_first_error(at_once, monkeypatch):
    """Whether the file system is quick, so that nothing is handed to threads, or slow."""
    monkeypatch.setattr(listing, "AT_ONCE", at_once)
    threads = set()

    def square(i):
        threads.add(threading.get_ident())
        if i == 900:
            raise ValueError("900")
        return i * i

    assert listing.in_threads(square, range(700)) == [i * i for i in range(700)]
    assert (len(threads) > 1) == (at_once == 0)
    with pytest.raises(ValueError, match="900"):
        listing.in_threads(square, range(2000))
