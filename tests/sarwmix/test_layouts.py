# SPDX-License-Identifier: MIT
"""Where the images of BigEarthNet lie, in other layouts than the official ones, and what is done about missing ones."""

import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main_pretrain
from sarwmix import layouts
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.prepare import pack, statistics
from sarwmix.registry import leave_out
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.dataset_fixtures import (
    fails_with,
    s1_name,
    s2_name,
    v2_frame,
    write_csv,
    write_v1,
    write_v1_patch,
    write_v2,
    write_v2_lmdb,
)
from tests.helpers.floods import write_floods
from tests.helpers.runs import argv, refusal
from util.datasets import drop_missing
from util.distributed import Launch, Ranks

pytestmark = pytest.mark.slow

V2, V1 = "BigEarthNet-S1", "BigEarthNet-S1-v1.0"


def move(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def rename_all(root, suffix):
    for path in list(root.rglob("*.tif")):
        path.rename(path.with_suffix(suffix))


def flatten(images):
    """Take the folders of acquisitions away."""
    for acquisition in list(images.iterdir()):
        for patch in list(acquisition.iterdir()):
            patch.rename(images / patch.name)
        acquisition.rmdir()


def group(images):
    """Put patches into folders of acquisitions."""
    for patch in list(images.glob("S1*")):
        move(patch, images / patch.name.rsplit("_", 3)[0] / patch.name)


def twice(root, name):
    (root / name).rename(root / "again")
    move(root / "again", root / name / name)


# What is done to a folder that holds the images in one called `name`, and what is then given as --data_path.
BOTH = {
    "official": lambda root, name: root,
    "extracted twice": lambda root, name: twice(root, name) or root,
    "extracted twice, the outer folder": lambda root, name: twice(root, name) or root / name,
    "one level deeper": lambda root, name: move(root / name, root / "reBEN" / name) or root,
    "one level deeper, twice": lambda root, name: move(root / name, root / "reBEN" / name / name) or root,
    ".tiff": lambda root, name: rename_all(root, ".tiff") or root,
    ".TIF": lambda root, name: rename_all(root, ".TIF") or root,
    ".TIFF": lambda root, name: rename_all(root, ".TIFF") or root,
    "the folder of images, lists beside it": lambda root, name: root / name,
    "the folder of images by another name": lambda root, name: move(root / name, root / "s1") or root / "s1",
}
ONLY_V2 = {
    "without acquisitions": lambda root, name: flatten(root / name) or root,
    "without acquisitions, .TIF, the folder itself": lambda root, name: (
        flatten(root / name) or rename_all(root, ".TIF") or root / name
    ),
    "lists in the folder of images": lambda root, name: (
        move(root / "metadata.parquet", root / name / "metadata.parquet") or root / name
    ),
    "lists beside a deeper folder": lambda root, name: (
        move(root / name, root / "reBEN" / name)
        or move(root / "metadata.parquet", root / "reBEN" / "metadata.parquet")
        or root
    ),
}
ONLY_V1 = {"with acquisitions": lambda root, name: group(root / name) or root}


@pytest.mark.parametrize("layout", [*BOTH, *ONLY_V2])
def test_images_of_version_2_are_found(layout, tmp_path):
    root = {**BOTH, **ONLY_V2}[layout](write_v2(tmp_path / "data"), V2)
    data = BigEarthNetv2(root, "all")
    data.check_files()
    assert data.ids.tolist() == [s1_name(k) for k in range(4)]
    assert [(image[0, 0, 0], image[1, 0, 0]) for image, _ in data] == [(-20 - k, -10 - k) for k in range(4)]
    assert all(Path(path).is_file() for path in data.files(3)) and data.label_table().any(1).all()


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("layout", [*BOTH, *ONLY_V1])
def test_images_of_version_1_are_found(layout, lists, tmp_path):
    write_v1(tmp_path / "data" / V1)
    if lists:
        write_csv(tmp_path / "data" / "benv1_train.csv", [[s2_name(k), s1_name(k)] for k in (1, 0)])
    data = BigEarthNetv1({**BOTH, **ONLY_V1}[layout](tmp_path / "data", V1), "train" if lists else "all")
    data.check_files()
    assert data.ids.tolist() == [s1_name(k) for k in ((1, 0) if lists else (0, 1, 2))]
    assert [int(image[0, 0, 0]) + 20 for image, _ in data] == [-int(name.rsplit("_", 2)[1][1:]) for name in data.ids]
    assert data.label_table()[:2].any(1).all()


def test_the_official_layout_goes_before_others(tmp_path, caplog):
    root = write_v2(tmp_path)
    shutil.copytree(root / V2, root / "old" / V2)
    shutil.copytree(root / V2, root / V2 / V2)
    write_v2_lmdb(root)
    with caplog.at_level(logging.INFO):
        assert BigEarthNetv2(root, "all").files(0)[0].startswith(f"{root}/{V2}/S1A")
    assert "the images are read from" not in caplog.text
    shutil.rmtree(root / V2)
    assert BigEarthNetv2(root, "all").files(0)[0].startswith(f"{root}/lmdb:")
    shutil.rmtree(root / "lmdb")
    with caplog.at_level(logging.INFO):
        BigEarthNetv2(root, "all")
    assert f"the images are read from {root}/old/{V2}/<acquisition>/<patch>/<patch>_VH.tif" in caplog.text


def test_several_layouts_are_refused(tmp_path):
    root = write_v2(tmp_path)
    shutil.copytree(root / V2, root / "a" / V2)
    move(root / V2, root / "b" / V2)
    fails_with(
        lambda: BigEarthNetv2(root), "holds images in 2 layouts", f"{root}/a/{V2}/", f"{root}/b/{V2}/", "--data_path"
    )
    assert len(BigEarthNetv2(root / "b", "all", root / "metadata.parquet")) == 4
    shutil.rmtree(root / "a")
    flatten(root / "b" / V2)
    for k, suffix in ((0, ".TIF"), (1, ".tiff"), (2, ".TIFF"), (3, ".TIFF")):
        rename_all(root / "b" / V2 / s1_name(k), suffix)
    fails_with(lambda: BigEarthNetv2(root), "holds images in 3 layouts", "_VH.TIF,", "_VH.tiff")


def test_messages_show_what_is_there_instead(tmp_path):
    root = write_v2(tmp_path)
    data = BigEarthNetv2(root, "all")
    path = Path(data.files(1)[0])
    path.rename(path.with_suffix(".jp2"))
    fails_with(
        data.check_files,
        "1 of 4 samples lack data",
        "--skip_missing",
        "--skip_bad",
        f"looked for {path}, but {path.parent} holds {path.stem}.jp2, {s1_name(1)}_VV.tif and no {path.name}",
    )
    shutil.rmtree(path.parent.parent)
    fails_with(data.check_files, f"looked for {path}, but {root / V2} holds", f"and no {path.parent.parent.name}")
    path = Path(data.files(0)[1])
    path.write_bytes(b"")
    fails_with(data.check_files, "2 of 4", f"{path} is empty")
    move(root / V2, root / "images")
    for acquisition in (root / "images").iterdir():
        acquisition.rename(root / "images" / acquisition.name.replace("S1A_IW_GRDH", "no"))
    fails_with(lambda: BigEarthNetv2(root), f"{root / V2}: no such folder", "holds the folders images;", "--data_path")
    fails_with(lambda: BigEarthNetv1(root, "all"), str(root), "holds no patch folders", "holds the folders images;")


def test_detecting_a_layout_looks_into_a_few_folders_only(tmp_path, monkeypatch):
    for k in range(200):
        name = f"S1A_IW_GRDH_1SDV_20170611T165043_33UUP_{k}_0"
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_VH.TIF").write_bytes(b"")
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    monkeypatch.setattr(layouts, "LISTED", 50)
    found = layouts.find_layout(tmp_path, V2, acquisitions=True)
    assert found == layouts.Layout(tmp_path, False, ".TIF") and len(looked) < 12


# ---- Missing ones --------------------------------------------------------------------------------


def test_missing_samples_are_left_out_and_counted(tmp_path, caplog):
    data = BigEarthNetv2(write_v2(tmp_path), "all")
    for path in (data.files(1)[0], data.files(2)[1]):
        os.unlink(path)
    assert data.missing() == [1, 2] and data.missing(start=1, step=2) == [1]
    part = leave_out(data, [1, 2])
    assert part.ids.tolist() == [s1_name(0), s1_name(3)] and part[1][0][0, 0, 0] == -23
    assert "2 of 4 samples of split 'all' are left out" in caplog.text and s1_name(1) in caplog.text
    metadata = tmp_path / "some.parquet"
    v2_frame().iloc[[0, 3]].to_parquet(metadata)
    assert part.describe()["fingerprint"] == BigEarthNetv2(tmp_path, "all", metadata).describe()["fingerprint"]
    assert part.describe()["left_out"] == part.subset([0]).describe()["left_out"] == 2
    assert "left_out" not in data.describe()
    assert leave_out(part, part.missing()).describe()["left_out"] == 0
    shutil.rmtree(tmp_path / V2)
    fails_with(lambda: leave_out(data, data.missing()), "4 of 4 samples lack data")


def test_missing_patches_of_version_1(tmp_path):
    write_v1(tmp_path)
    listed = write_csv(tmp_path / "mine.csv", [[s1_name(k)] for k in range(4)])  # the last one was never copied
    for keep_unlabelled, samples in ((True, (0, 1, 2)), (False, (0, 1))):
        data = BigEarthNetv1(tmp_path, metadata=listed, keep_unlabelled=keep_unlabelled)
        fails_with(data.check_files, "samples lack data", f"{s1_name(3)} VH and VV (mine.csv:4)", f"holds {s1_name(0)}")
        part = leave_out(data, data.missing())
        part.check_files()
        assert part.ids.tolist() == [s1_name(k) for k in samples] and part.left_out == 1


def test_missing_images_of_floods(tmp_path):
    data = FloodDataset(write_floods(tmp_path), "train")
    (tmp_path / "images" / "0001" / "d0.npy").unlink()
    fails_with(data.check_files, "1 of 6 image files", "does not exist", "--skip_missing")
    part = leave_out(data, data.missing())
    part.check_files()
    assert part.ids.tolist() == ["0001__d1__d2", *(name for name in data.ids if name.startswith("0002"))]
    assert part.describe()["left_out"] == 2 and part.size == 128 and len(part[0]) == 3


TINY = argv(
    "--model mixmim_tiny --input_size 64 --batch_size 2 --num_workers 0 --warmup_epochs 0 --lr 1e-3 --epochs 2 --device cpu "
    "--split all --save_epochs"
)


def test_training_on_a_part_of_a_dataset(tmp_path, program):
    root, out = write_v2(tmp_path / "v2"), tmp_path / "run"
    path = Path(BigEarthNetv2(root, "all").files(1)[0])
    path.rename(tmp_path / "away.tif")
    flags = (*TINY, "--data_path", root, "--output_dir", out)
    status, _, err = program(main_pretrain, *flags)
    assert status == 2 and "1 of 4 samples lack data (--skip_missing" in err and not out.exists()
    status, log, err = program(main_pretrain, *flags, "--skip_missing", "--stop_epoch", 1)
    assert (status, err) == (0, "") and "warning: 1 of 4 samples of split 'all' are left out" in log
    assert "GDAL" not in log
    data = json.loads((out / "run.json").read_text())["data"]
    assert data["samples"] == 3 and data["left_out"] == 1
    (tmp_path / "away.tif").rename(path)
    status, _, err = program(main_pretrain, *flags, "--skip_missing", "--resume", "auto")
    assert status == 2 and "data_path (its samples)" in err
    path.unlink()
    assert program(main_pretrain, *flags, "--skip_missing", "--resume", "auto")[0] == 0


class RanksInThreads(Ranks):
    """One of two ranks, which are threads of this process."""

    def __init__(self, rank, barrier, board):
        super().__init__(Launch("torchrun", rank, 2, rank, 2), torch.device("cpu"))
        self.barrier, self.board = barrier, board

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(60)
        values = list(self.board)
        self.barrier.wait(60)
        return values


def test_ranks_share_the_work_and_leave_out_the_same_samples(tmp_path, monkeypatch):
    root, looked = write_v2(tmp_path), []
    names = [Path(BigEarthNetv2(root, "all").files(k)[0]).parent for k in range(4)]
    shutil.rmtree(names[0])  # for rank 0 to find
    shutil.rmtree(names[3])  # for rank 1
    missing = BigEarthNetv2.missing
    monkeypatch.setattr(BigEarthNetv2, "missing", lambda self, *share: looked.append(share) or missing(self, *share))
    barrier, board = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as pool:
        data, flags = BigEarthNetv2(root, "all"), SimpleNamespace(skip_missing=True)
        work = [pool.submit(drop_missing, data, flags, RanksInThreads(k, barrier, board)) for k in (0, 1)]
        left = [job.result().ids.tolist() for job in work]
    assert left == [[s1_name(1), s1_name(2)]] * 2 and sorted(looked) == [(0, 2), (1, 2)]


def test_packing_and_measuring_a_part_of_a_dataset(tmp_path, caplog, capsys, program):
    root = write_v2(tmp_path / "v2")
    os.unlink(BigEarthNetv2(root, "all").files(3)[0])
    source = ["--dataset", "benv2", "--data_path", str(root), "--workers", "1"]
    with caplog.at_level(logging.DEBUG):
        pack.main(argv(source, "--skip_bad --out", tmp_path / "store"))
        assert "--skip_missing" in refusal(statistics.main, [*source, "--split", "all"], capsys)
        statistics.main(argv(source, "--split all --skip_missing --out", tmp_path / "statistics.json"))
    assert not [record for record in caplog.records if record.name.startswith("rasterio")] and "GDAL" not in caplog.text
    assert json.loads((tmp_path / "statistics.json").read_text())["samples"] == 3
    assert PackedDataset(tmp_path / "store", "all").ids.tolist() == [s1_name(k) for k in range(3)]
    status, _, err = program(
        main_pretrain, *TINY, "--data_path", tmp_path / "store", "--skip_missing", "--output_dir", tmp_path / "run"
    )
    assert status == 2 and "--skip_missing: --data_path" in err and "packed store" in err


def test_json_files_may_begin_with_a_byte_order_mark(tmp_path):
    folder = write_v1_patch(tmp_path, 0, labels=["Pastures"])
    path = folder / f"{s1_name(0)}_labels_metadata.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    listed = write_csv(tmp_path / "mine.csv", [[s2_name(0)]])
    assert np.flatnonzero(BigEarthNetv1(tmp_path, metadata=listed, keep_unlabelled=False)[0][1]).tolist() == [4]
