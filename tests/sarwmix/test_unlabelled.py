# SPDX-License-Identifier: MIT
"""Patches without labels: pretraining, features and statistics take them; finetuning and evaluation leave them out, or refuse."""

import json
import logging

import numpy as np
import pandas as pd
import pytest

import main_finetune
import main_pretrain
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.prepare import pack, statistics
from sarwmix.registry import open_dataset
from tests.helpers.dataset_fixtures import (
    fails_with,
    s1_name,
    v2_frame,
    write_csv,
    write_v1,
    write_v1_zarr,
    write_v2,
    write_v2_lmdb,
)
from tests.helpers.runs import argv

pytestmark = pytest.mark.slow

TINY = argv("--model mixmim_tiny --input_size 64 --batch_size 2 --num_workers 0 --device cpu")
TRAIN = argv(*TINY, "--warmup_epochs 0 --lr 1e-3 --epochs 1 --save_epochs")


def relabelled(root, labels, rows=range(4), form="parquet"):
    """The metadata with other labels in these rows, as a parquet file or a CSV dump; ...: without the column."""
    frame = v2_frame()
    for row in rows if labels is not ... else ():
        frame.at[row, "labels"] = labels
    frame = frame.drop(columns="labels") if labels is ... else frame
    path = root / f"other.{form}"
    frame.to_parquet(path) if form == "parquet" else frame.to_csv(path)
    return path


def unlabelled_v1(root):
    for path in write_v1(root).rglob("*.json"):
        path.unlink()
    return root


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("labels", [[], None, ...])
def test_version_2_without_labels(labels, form, tmp_path):
    root = write_v2(tmp_path)
    path = relabelled(root, labels, form=form)
    data = BigEarthNetv2(root, "all", path)
    assert data.ids.tolist() == [s1_name(k) for k in range(4)] and data.label_table().shape == (4, 19)
    assert not data.label_table().any() and not data[1][1].any() and data[1][0][0, 0, 0] == -21
    fails_with(
        lambda: BigEarthNetv2(root, "all", path, keep_unlabelled=False),
        path.name,
        "no column labels" if labels is ... else "none of the 4 patches has a 19-class label",
    )


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("labels", [[], None])
def test_some_of_version_2_without_labels(labels, form, tmp_path, caplog):
    root = write_v2(tmp_path)
    path = relabelled(root, labels, (0, 2), form)
    with caplog.at_level(logging.INFO):
        assert BigEarthNetv2(root, "all", path).label_table().any(1).tolist() == [False, True, False, True]
        data = BigEarthNetv2(root, "all", path, keep_unlabelled=False)
    assert data.ids.tolist() == [s1_name(1), s1_name(3)] and data.label_table().any(1).all()
    assert "2 of 4 patches have no label, and stay" in caplog.text and "dropped 2 of 4 patches" in caplog.text
    other = relabelled(root, ["Sea"], (1,), form)
    fails_with(lambda: BigEarthNetv2(root, "all", other, keep_unlabelled=False), "1 of 4 rows", "unknown label 'Sea'")
    assert BigEarthNetv2(root, "all", other).label_table().any(1).tolist() == [True, False, True, True]
    assert "1 of 4 rows have labels that cannot be read: unknown label 'Sea'" in caplog.text


@pytest.mark.parametrize("kind", ["folders", "lmdb"])
def test_version_2_without_metadata(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = write_v2(tmp_path) if kind == "folders" else write_v2_lmdb(tmp_path)
    (root / "metadata.parquet").unlink()
    data = BigEarthNetv2(root, "all")
    assert data.ids.tolist() == [s1_name(k) for k in range(4)] and not data.label_table().any()
    assert data[1][0][0, 0, 0] == -21 and "all 4 patches are taken, without labels" in caplog.text
    fails_with(lambda: BigEarthNetv2(root, "train_val"), "metadata.parquet", "--split all takes all patches without it")
    fails_with(lambda: BigEarthNetv2(root, "all", keep_unlabelled=False), "metadata.parquet", "copy the dataset's")


@pytest.mark.parametrize("kind", ["folders", "zarr 2", "zarr 3"])
def test_version_1_without_labels(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    if kind == "folders":
        root = write_v1(tmp_path)
        files = [root / s1_name(k) / f"{s1_name(k)}_labels_metadata.json" for k in (0, 1)]
        files[0].unlink()
        files[1].write_text("{}")
    else:
        root = write_v1_zarr(tmp_path / "v1.zarr", int(kind[-1]))
        files = [root / "sentinel1" / s1_name(k) / (".zattrs" if kind == "zarr 2" else "zarr.json") for k in (0, 1)]
        if kind == "zarr 2":
            files[0].unlink()
        else:
            files[0].write_text(json.dumps({**json.loads(files[0].read_text()), "attributes": {}}))
    data = BigEarthNetv1(root, "all")
    data.check_files()
    assert data.label_table().any(1).tolist() == [False, kind != "folders", False] and not data[0][1].any()
    if kind == "folders":
        fails_with(
            lambda: BigEarthNetv1(root, "all", keep_unlabelled=False), "none of the 3 patches has a 19-class label"
        )
        return
    assert BigEarthNetv1(root, "all", keep_unlabelled=False).ids.tolist() == [s1_name(1)]
    assert [
        record.levelname for record in caplog.records if "1 of 3 patches have no labels" in record.getMessage()
    ] == ["INFO", "WARNING"]


def test_a_zarr_group_without_its_metadata_is_damaged(tmp_path):
    root = write_v1_zarr(tmp_path / "v1.zarr", 3)
    (root / "sentinel1" / s1_name(1) / "zarr.json").unlink()
    fails_with(BigEarthNetv1(root, "all").check_files, s1_name(1), "cannot be read as JSON")


# ---- Programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["benv1", "benv2"])
def test_what_needs_no_labels_does_without(dataset, tmp_path, program):
    root = tmp_path / "data"
    if dataset == "benv1":
        flags = ["--dataset", "benv1", "--data_path", unlabelled_v1(root)]
    else:
        flags = ["--dataset", "benv2", "--data_path", write_v2(root), "--metadata", relabelled(root, ...)]
    splits = ["--splits", "every" if dataset == "benv1" else "train"]
    count = 3 if dataset == "benv1" else 4

    status, _, err = program(main_pretrain, *TRAIN, *flags, "--split", "train_val", "--output_dir", tmp_path / "run")
    assert (status, err) == (0, "")
    use = argv(*TINY[2:], *flags, "--split all --finetune", tmp_path / "run" / "checkpoint.pth")
    use += ["--output_dir", tmp_path / "eval"]
    status, log, err = program(main_finetune, *use, "--embed", tmp_path / "features.npz")
    assert (status, err) == (0, "") and "have no label, all their labels are 0" not in log
    features = np.load(tmp_path / "features.npz")
    assert len(features["ids"]) == count and features["labels"].shape == (count, 19) and not features["labels"].any()
    assert np.isfinite(features["features"]).all() and features["features"].std(0).any()

    words = [str(word) for word in (*flags, "--workers", 1)]
    statistics.main(argv(words, "--split all --out", tmp_path / "statistics.json"))
    assert json.loads((tmp_path / "statistics.json").read_text())["samples"] == count
    pack.main(argv(words, splits, "--out", tmp_path / "store"))
    assert len(PackedDataset(tmp_path / "store", "train_val")) == (3 if dataset == "benv1" else 2)
    fails_with(
        lambda: open_dataset(dataset, tmp_path / "store", "train_val", supervised=True),
        "store",
        "has a label",
        "pretraining",
    )


def test_what_needs_labels_refuses(tmp_path, program):
    root = write_v2(tmp_path / "data")
    for labels, words in ((..., "no column labels"), ([], "none of the 2 patches has a 19-class label")):
        flags = ("--dataset", "benv2", "--data_path", root, "--metadata", relabelled(root, labels), "--finetune", "")
        status, _, err = program(main_finetune, *TRAIN[:-1], *flags, "--output_dir", tmp_path / "run")
        assert status == 2 and "other.parquet" in err and words in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_some_unlabelled_samples_are_embedded_but_not_evaluated(tmp_path, program):
    root = write_v2(tmp_path / "data")
    flags = ("--dataset", "benv2", "--data_path", root, "--metadata", relabelled(root, [], (0,)))
    train = argv("--split train_val --val_split test --batch_size 1 --output_dir", tmp_path / "run")
    assert program(main_finetune, *TRAIN[:-1], *flags, *train, "--finetune", "")[0] == 0
    use = argv(*TINY[2:], *flags, "--split all --finetune", tmp_path / "run" / "checkpoint_best.pth")
    use += ["--output_dir", tmp_path / "eval"]
    status, log, _ = program(main_finetune, *use, "--embed", tmp_path / "features.parquet")
    frame = pd.read_parquet(tmp_path / "features.parquet")
    labels = frame[[name for name in frame if name.startswith("label: ")]].to_numpy()
    assert status == 0 and labels.any(1).tolist() == [False, True, True, True] and "1 of 4 samples have no label" in log
    status, log, _ = program(main_finetune, *use, "--eval", "--embed", tmp_path / "labelled.npz")
    assert status == 0 and "dropped 1 of 4 patches" in log and len(np.load(tmp_path / "labelled.npz")["ids"]) == 3
    assert json.loads((tmp_path / "eval" / "eval_all.json").read_text())["samples"] == 3


def test_lists_of_csv_may_leave_labels_out(tmp_path):
    root = write_v2(tmp_path)
    path = write_csv(root / "names.csv", [["s1_name"], [s1_name(2)], [s1_name(0)]])
    assert BigEarthNetv2(root, metadata=path).ids.tolist() == [s1_name(2), s1_name(0)]
    path = write_csv(root / "no_header.csv", [[s1_name(2)], [s1_name(0)]])
    fails_with(lambda: BigEarthNetv2(root, metadata=path, id_col=0), "no_header.csv: has no header", s1_name(2))
