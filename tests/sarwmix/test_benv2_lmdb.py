# SPDX-License-Identifier: MIT
"""BigEarthNet v2 from the dataset authors' LMDB: where it may lie, values, workers, and what is said about faulty ones."""

import os
import pickle
import shutil

import lmdb
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch.utils.data import DataLoader

from sarwmix.bigearthnetv2 import BigEarthNetv2
from tests.helpers.dataset_fixtures import (
    V2_CLASSES,
    classes_of,
    fails_with,
    needs_samples,
    s1_name,
    s2_name,
    sample_path,
    v2_frame,
    write_csv,
    write_lmdb,
    write_v2,
    write_v2_lmdb,
    write_v2_patch,
)

BAND = np.full((120, 120), -20, np.float32)


@pytest.fixture
def root(tmp_path):
    return write_v2_lmdb(tmp_path)


def with_patch(folder, value):
    """A dataset of one patch, whose value in the LMDB this is."""
    folder.mkdir()
    write_lmdb(folder / "lmdb", {s1_name(0): value})
    v2_frame().iloc[:1].to_parquet(folder / "metadata.parquet")
    return BigEarthNetv2(folder)


# ---- Values --------------------------------------------------------------------------------------


def check_items(data):
    assert data.ids.tolist() == [s1_name(k) for k in range(4)]
    for k, (sar, labels) in enumerate(data):
        assert sar.shape == (2, 120, 120) and sar.dtype == torch.float32
        assert (sar[0] == -20 - k).all() and (sar[1] == -10 - k).all()
        assert classes_of(labels) == V2_CLASSES[k]


def test_items_and_names(root):
    assert not (root / "lmdb" / "lock.mdb").exists()
    data = BigEarthNetv2(root, "all")
    check_items(data)
    data.check_files()
    assert data.check_units()["mean"] == [-21.5, -11.5]
    assert data.files(1) == [f"{root}/lmdb:{s1_name(1)}/VH", f"{root}/lmdb:{s1_name(1)}/VV"]
    assert data.where(1) == "metadata.parquet: row 1"
    assert sorted(path.name for path in (root / "lmdb").iterdir()) == ["data.mdb"]  # reading leaves nothing behind


def test_the_lmdb_itself_with_its_metadata_in_it_or_beside_it(root):
    check_items(BigEarthNetv2(root / "lmdb", "all"))
    shutil.move(root / "metadata.parquet", root / "lmdb")
    check_items(BigEarthNetv2(root / "lmdb", "all"))
    (root / "lmdb" / "metadata.parquet").unlink()
    fails_with(lambda: BigEarthNetv2(root / "lmdb", "test"), "metadata.parquet", "benv2_test.csv", "or beside it")
    v2_frame().iloc[2:3].to_csv(root / "benv2_test.csv")
    assert BigEarthNetv2(root / "lmdb", "test").ids.tolist() == [s1_name(2)]


def test_the_lmdb_as_current_folder(root, monkeypatch):
    monkeypatch.chdir(root / "lmdb")
    check_items(BigEarthNetv2(".", "all"))


def test_folders_are_read_where_there_are_both(tmp_path):
    write_v2_lmdb(tmp_path)
    write_v2(tmp_path)
    write_v2_patch(tmp_path, 0, vh=-30.0)
    data = BigEarthNetv2(tmp_path, "all")
    assert (data[0][0][0] == -30).all() and data.files(0)[0].endswith("_VH.tif")
    assert (BigEarthNetv2(tmp_path / "lmdb", "all")[0][0][0] == -20).all()


def test_several_lmdbs_or_none(root):
    write_v2_lmdb(root, "other")
    fails_with(lambda: BigEarthNetv2(root), "holds 2 LMDBs", "lmdb, other", "--data_path")
    for name in ("lmdb", "other"):
        (root / name / "data.mdb").unlink()
    fails_with(lambda: BigEarthNetv2(root), "no such folder", "data.mdb", "--data_path")


@needs_samples
def test_the_real_lmdb_equals_the_real_geotiffs(tmp_path):
    name = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_70_48"
    listed = write_csv(tmp_path / "one.csv", [["s1_name", "labels"], [name, "['Mixed forest']"]])
    stored = BigEarthNetv2(sample_path("benv2", "lmdb"), metadata=listed)
    stored.check_files()
    assert torch.equal(stored[0][0], BigEarthNetv2(sample_path("benv2"), metadata=listed)[0][0])
    assert stored[0][0].std() > 1
    assert len(BigEarthNetv2(sample_path("benv2", "lmdb"), "all")) == 18  # of the metadata beside it
    other = write_csv(tmp_path / "other.csv", [["s1_name", "labels"], [s1_name(0), "['Pastures']"]])
    fails_with(BigEarthNetv2(sample_path("benv2", "lmdb"), metadata=other).check_files, "1 of 1 samples lack data")


# ---- Faults --------------------------------------------------------------------------------------


def test_missing_keys_are_counted_and_located(root):
    v2_frame().assign(s1_name=[s1_name(k) for k in (0, 5, 2, 6)]).to_parquet(root / "metadata.parquet")
    data = BigEarthNetv2(root, "all")
    fails_with(
        data.check_files,
        "2 of 4 samples lack data",
        f"{s1_name(5)} VH and VV (metadata.parquet: row 1)",
        s1_name(6),
        str(root / "lmdb"),
    )
    data.check_files(start=0, step=2)
    fails_with(lambda: data.check_files(start=1, step=2), "2 of 2 samples")
    fails_with(
        lambda: data[1], f"{root}/lmdb", f"no key {s1_name(5)}", "remove the patch's row", "metadata.parquet: row 1"
    )


@pytest.mark.parametrize(
    "value, words",
    (
        (b"no safetensors", ("key S1A", "cannot be read as safetensors")),
        (save({"VH": BAND, "VV": BAND}).replace(b"F32", b"F8_E4M3", 1), ("key S1A", "cannot be read as safetensors")),
        ({"VH": BAND}, ("/VV: is not there, only VH",)),
        ({"VV": BAND, "B02": BAND}, ("/VH: is not there, only B02, VV",)),
        ({"VH": BAND, "VV": BAND.astype(np.float64)}, ("/VV: is float64, not float32",)),
        ({"VH": BAND.astype(np.int32), "VV": BAND}, ("/VH: is int32, not float32",)),
        ({"VH": BAND[:60], "VV": BAND}, ("/VH: is 60x120 pixels, not 120x120",)),
        ({"VH": BAND, "VV": BAND[None]}, ("/VV: is 1x120x120 pixels",)),
    ),
)
def test_faulty_values_name_lmdb_and_key(tmp_path, value, words):
    data = with_patch(tmp_path / "one", value)
    data.check_files()  # the key is there, and it does not look further
    fails_with(lambda: data[0], str(tmp_path / "one" / "lmdb"), s1_name(0), *words, "row", "metadata.parquet: row 0")


def test_too_many_nonfinite_pixels(tmp_path):
    band = BAND.copy()
    band[:2] = np.nan  # 1.67 %
    data = with_patch(tmp_path / "one", {"VH": BAND, "VV": band})
    fails_with(lambda: data[0], f"lmdb:{s1_name(0)}/VV", "1.67%", "--max_nonfinite")
    assert BigEarthNetv2(tmp_path / "one", max_nonfinite=0.02)[0][0].isnan().sum() == 240


@pytest.mark.parametrize(
    "size, words",
    (
        (0, "cannot be read as an LMDB"),
        (100, "cannot be read as an LMDB"),
        (8192, "is truncated"),
        (300_000, "is truncated"),
        (-4096, "is truncated"),
    ),
)
def test_a_truncated_lmdb_is_an_error_and_not_a_crash(root, size, words):
    path = root / "lmdb" / "data.mdb"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    data = BigEarthNetv2(root, "all")
    fails_with(data.check_files, str(path), words, "copy it again")
    fails_with(lambda: data[3], str(path), words)


# ---- Processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_workers_read_an_lmdb_that_the_trainer_has_read_before(root, start):
    data = BigEarthNetv2(root, "all")
    expected = torch.stack([sar for sar, _ in data])
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat([sar for sar, _ in loader]), expected)
    check_items(data)


def test_it_is_opened_when_first_read_once_per_process_and_not_pickled(root, monkeypatch):
    opened, real = [], lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *args, **flags: opened.append(flags) or real(*args, **flags))
    train, val = BigEarthNetv2(root, "train"), BigEarthNetv2(root / "lmdb", "val")
    copy = pickle.loads(pickle.dumps(train))
    assert opened == []
    for data in (train, val, copy, pickle.loads(pickle.dumps(train))):  # a process may not open an LMDB twice
        data.check_files()
        data[0]
    assert len(opened) == 1
    assert opened[0] == dict(readonly=True, lock=False, readahead=False, meminit=False, create=False)


def test_other_keys_are_left_alone(root):
    assert s2_name(0) not in BigEarthNetv2(root, "all").ids
    assert len(BigEarthNetv2(root, "all")) == 4
