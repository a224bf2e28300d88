# SPDX-License-Identifier: MIT
"""The packed store: coding, content equal to what was packed, restart, checks, and the batches that training gets."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import main_finetune
import main_pretrain
from common.errors import DataError, UsageError
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import CODES, NO_DATA, as_tensor, decode, encode
from sarwmix.prepare import benv1_to_zarr, pack, statistics
from sarwmix.registry import open_dataset
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import (
    fails_with,
    needs_samples,
    s1_name,
    sample_path,
    write_csv,
    write_tif,
    write_v1,
    write_v1_zarr,
    write_v2,
    write_v2_lmdb,
)
from tests.helpers.floods import write_floods
from tests.helpers.runs import argv, digests, launch, log_of, mpirun, refusal
from tests.helpers.stores import loader_flags, packed
from util.datasets import ImagesWithIds, SamplesWithIds, build_loader, build_test_loader, fill_cache
from util.distributed import Launch, Ranks

ALONE = Ranks(Launch(), torch.device("cpu"))
TINY = argv("--model mixmim_tiny --epochs 1 --warmup_epochs 0 --num_workers 0")


def refused(capsys, *flags):
    """The one line by which sarwmix.prepare.pack refuses these flags."""
    return refusal(pack.main, ["--workers", 1, *flags], capsys)


def decoded(codes, scale, offset):
    return decode(
        as_tensor(codes), *(torch.tensor(x, dtype=torch.float32).view(1, 2, 1, 1) for x in (scale, offset))
    ).numpy()


def same_samples(one, other, tolerance=0.0):
    """Whether two datasets have the same ids, labels, groups and items, in the same order."""
    assert one.ids.tolist() == other.ids.tolist() and one.groups.tolist() == other.groups.tolist()
    assert (one.label_table() == other.label_table()).all()
    for i in range(len(one)):
        for a, b in zip(one[i], other[i], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def stores(simulated, tmp_path_factory):
    """{dtype: packed store of the simulated patches, in small parts}."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        dtype: packed(folder / dtype, "benv2", simulated, "--splits train val --part_mb 1 --dtype", dtype)
        for dtype in ("uint16", "float16", "float32")
    }


# ---- Coding --------------------------------------------------------------------------------------


def test_uint16_is_affine_over_the_range_and_within_half_a_step():
    images = (
        np.random.default_rng(0)
        .uniform([[[-70.0]], [[-40.0]]], [[[10.0]], [[25.0]]], (6, 2, 30, 30))
        .astype(np.float32)
    )
    codes, scale, offset = encode(images, "uint16")
    assert codes.dtype == np.uint16 and codes[:, 0].min() == codes[:, 1].min() == 0 and codes[:, 0].max() == CODES
    assert scale == pytest.approx([80 / CODES, 65 / CODES], rel=2e-3) and offset == pytest.approx([-70, -40], abs=0.1)
    error = np.abs(decoded(codes, scale, offset) - images).max((0, 2, 3))
    assert (error <= np.array(scale) * 0.51).all() and (error > np.array(scale) * 0.3).all()


def test_what_is_not_finite_becomes_nan_and_does_not_stretch_the_range():
    images = np.full((1, 2, 2, 2), -20, np.float32)
    images[0, 0, 0] = np.nan, np.inf
    images[0, 1, 1] = -np.inf, -10
    codes, scale, offset = encode(images, "uint16")
    assert codes[0, 0, 0].tolist() == [NO_DATA, NO_DATA] and scale[1] == pytest.approx(10 / CODES)
    for dtype in ("uint16", "float16", "float32"):
        back = decoded(*encode(images, dtype))
        assert np.isnan(back[0, 0, 0]).all() and np.isnan(back[0, 1, 1, 0])
        assert back[0, 0, 1].tolist() == [-20, -20] and back[0, 1, 1, 1] == pytest.approx(-10, abs=1e-3)


@pytest.mark.parametrize("value", (-20.0, 0.0, np.nan))
def test_constant_and_empty_images_survive(value):
    images = np.full((2, 2, 4, 4), value, np.float32)
    np.testing.assert_array_equal(decoded(*encode(images, "uint16")), images)


def test_floats_are_rounded_as_their_type_says():
    images = np.random.default_rng(0).normal(-20, 6, (3, 2, 20, 20)).astype(np.float32)
    np.testing.assert_array_equal(decoded(*encode(images, "float32")), images)
    np.testing.assert_array_equal(decoded(*encode(images, "float16")), images.astype(np.float16).astype(np.float32))


# ---- Content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", (("float32", 0), ("float16", 0.0157), ("uint16", 0.0007)))
def test_a_store_has_the_samples_of_the_folders(simulated, stores, dtype, tolerance):
    for split in ("train", "val", "train_val"):
        same_samples(PackedDataset(stores[dtype], split), BigEarthNetv2(simulated, split), tolerance)
    manifest = json.loads((stores[dtype] / "manifest.json").read_text())
    assert manifest["channels"] == ["VH", "VV"] and manifest["units"] == "dB" and manifest["dtype"] == dtype
    assert manifest["images"] == 48
    assert manifest["largest_error_db"] <= tolerance and len(manifest["parts"]) >= 3
    size = {"float32": 4}.get(dtype, 2) * 2 * 120 * 120
    assert sum((stores[dtype] / part["file"]).stat().st_size for part in manifest["parts"]) == 48 * size


def test_statistics_are_those_of_the_files(simulated, stores):
    dataset = BigEarthNetv2(simulated, "val")
    pixels = np.stack([dataset.image(i).numpy() for i in range(len(dataset))], 1).reshape(2, -1).astype(np.float64)
    found = json.loads((stores["uint16"] / "statistics.json").read_text())["val"]
    assert found["mean"] == pytest.approx(pixels.mean(1)) and found["std"] == pytest.approx(pixels.std(1))
    assert PackedDataset(stores["uint16"], "val").check_units()["val"]["mean"] == found["mean"]


def test_lmdb_and_folders_give_the_same_store(v2, tmp_path):
    write_v2_lmdb(tmp_path)
    a, b = packed(tmp_path / "a", "benv2", v2), packed(tmp_path / "b", "benv2", tmp_path / "lmdb")
    assert digests(a) == digests(b)
    same_samples(PackedDataset(a, "all"), BigEarthNetv2(v2, "all"), 1e-5)


@pytest.mark.parametrize("layout", ("folders", "zarr"))
def test_v1_keeps_unlabelled_patches_for_pretraining_only(tmp_path, layout):
    source = write_v1(tmp_path / "v1") if layout == "folders" else write_v1_zarr(tmp_path / "v1.zarr", 3)
    lists = [
        write_csv(tmp_path / f"{name}.csv", [[s1_name(k)] for k in rows])
        for name, rows in (("train", (2, 0)), ("val", (1,)))
    ]
    flags = ("--splits train val --dtype float32 --metadata", lists[0], "--val_metadata", lists[1])
    store = packed(tmp_path / "store", "benv1", source, *flags)
    same_samples(PackedDataset(store, "train"), BigEarthNetv1(source, "train", lists[:1]))
    assert PackedDataset(store, "train", supervised=True).ids.tolist() == [s1_name(0)]
    assert open_dataset("benv1", store, "train", supervised=True)[0][1].sum() == 2


def test_a_folder_without_lists_is_packed_as_every(tmp_path):
    store = packed(tmp_path / "store", "benv1", write_v1(tmp_path / "v1"), "--splits every")
    assert len(PackedDataset(store, "all")) == len(PackedDataset(store, "train_val")) == 3
    with pytest.raises(DataError, match="no sample of split 'train'"):
        PackedDataset(store, "train")


@pytest.mark.parametrize("layout", ("images", "pairs"))
def test_floods_are_packed_image_by_image(tmp_path, layout):
    root = write_floods(tmp_path / "floods")
    dataset = FloodDataset(root, "all")
    if layout == "pairs":
        for part in ("train", "test"):
            (tmp_path / "pairs" / part).mkdir(parents=True)
        for i, name in enumerate(dataset.ids.tolist()):
            folder, first, second = name.split("__")
            label, part = int(dataset[i][2]), "test" if folder == "7" else "train"
            both = np.stack([np.load(root / "images" / folder / f"{image}.npy") for image in (first, second)])
            np.save(tmp_path / "pairs" / part / f"{name}__{label}.npy", both)
        root = tmp_path / "pairs"
    store = packed(tmp_path / "store", "sen12flood", root, "--dtype float32")
    assert json.loads((store / "manifest.json").read_text())["images"] == 9  # each image once, and is in two pairs
    for split in ("train", "test", "all"):
        same_samples(PackedDataset(store, split), FloodDataset(root, split))
    found, expected = PackedDataset(store, "train"), FloodDataset(root, "train")
    for dataset in (found, expected):
        assert [
            dataset[i] for i in range(len(dataset))
        ] and dataset.nonfinite.value == 4  # one in d2, in two pairs of two folders
    for split in ("train", "val"):
        same_samples(
            PackedDataset(store, split, draw=(0.5, 0.0, 3)), FloodDataset(root, split, val_fraction=0.5, seed=3)
        )
    assert found.size == 128


def test_statistics_are_not_taken_of_a_store(stores, capsys):
    flags = ["--dataset", "benv2", "--data_path", stores["uint16"]]
    assert "statistics.json; give the data that it was made of" in refusal(statistics.main, flags, capsys)


def test_parts_of_a_split(stores):
    whole = PackedDataset(stores["uint16"], "train")
    part = whole.subset([5, 2])
    assert part.ids.tolist() == whole.ids[[5, 2]].tolist() and torch.equal(part.image(0), whole.image(5))
    assert torch.equal(part[1][1], whole[2][1]) and part.where(0) == "samples.parquet: row 5" and len(whole) > 2


@needs_samples
def test_real_v2_samples_from_folder_and_lmdb(tmp_path):
    name = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_70_48"
    metadata = tmp_path / "metadata.parquet"
    pd.DataFrame({"s1_name": [name], "labels": [["Pastures"]], "split": ["train"]}).to_parquet(metadata)
    stores = [
        packed(tmp_path / kind, "benv2", path, "--splits train --dtype float32 --metadata", metadata)
        for kind, path in (("folder", sample_path("benv2")), ("lmdb", sample_path("benv2", "lmdb")))
    ]
    assert digests(stores[0]) == digests(stores[1])
    same_samples(PackedDataset(stores[0], "train"), BigEarthNetv2(sample_path("benv2"), "train", metadata))


@needs_samples
def test_real_v1_samples_from_folders_and_by_way_of_zarr(tmp_path):
    source = sample_path("benv1", "BigEarthNet-S1-v1.0")
    benv1_to_zarr.main(argv("--root", source, "--out", tmp_path / "zarr", "--workers 1"))
    for name, path in (("folders", source), ("zarr", tmp_path / "zarr" / "benv1.zarr")):
        store = packed(tmp_path / name / "store", "benv1", path, "--splits every --dtype float32")
        same_samples(PackedDataset(store, "all"), BigEarthNetv1(source, "all"))
    assert len(PackedDataset(store, "all")) == 6


# ---- Restart and spread --------------------------------------------------------------------------

PACK = argv("-m sarwmix.prepare.pack --dataset benv2 --splits train val --part_mb 1 --dtype uint16")


@pytest.mark.parametrize("seen", ("packing.json", "part_00000.json"))
def test_killed_and_run_again_it_is_the_same(simulated, stores, tmp_path, seen):
    out = tmp_path / "out"
    command = [sys.executable, *PACK, "--data_path", str(simulated), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (out / seen).exists() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    launch(command)
    assert digests(out) == digests(stores["uint16"])


def test_ranks_and_processes_make_the_same_store(simulated, stores, tmp_path):
    launch(mpirun(sys.executable, *PACK, "--data_path", simulated, "--out", tmp_path / "ranks", "--workers", "2"))
    assert digests(tmp_path / "ranks") == digests(stores["uint16"])


def test_floods_are_packed_and_measured_by_ranks_too(tmp_path):
    root = write_floods(tmp_path / "floods")
    flags = ("--dataset sen12flood --data_path", root, "--out")
    for program, out in (("pack --part_mb 1 --workers 2", "ranks"), ("statistics --workers 1", "train.json")):
        launch(mpirun(sys.executable, *argv(f"-m sarwmix.prepare.{program}", *flags, tmp_path / out)))
    assert digests(tmp_path / "ranks") == digests(packed(tmp_path / "alone", "sen12flood", root, "--part_mb 1"))
    measured = json.loads((tmp_path / "train.json").read_text())
    stored = json.loads((tmp_path / "alone" / "statistics.json").read_text())["train"]
    assert measured["images"] == 6
    assert all(measured[name] == pytest.approx(stored[name]) for name in ("mean", "std", "pixels", "nodata"))


def test_a_finished_store_is_left_alone_and_other_flags_are_refused(simulated, stores, capsys, caplog):
    before = {path: path.stat().st_mtime_ns for path in stores["uint16"].iterdir()}
    flags = "--splits train val --part_mb 1"
    with caplog.at_level("INFO"):
        packed(stores["uint16"], "benv2", simulated, flags)
    assert "already complete" in caplog.text
    other = argv(flags, "--dataset benv2 --dtype float16 --data_path", simulated, "--out", stores["uint16"])
    assert "other parameters" in refused(capsys, *other)
    assert {path: path.stat().st_mtime_ns for path in stores["uint16"].iterdir()} == before


def test_bad_images_are_all_named_and_can_be_skipped(tmp_path, capsys):
    root = write_v2(tmp_path / "v2")
    flags = ["--dataset", "benv2", "--data_path", root, "--dtype", "float32", "--out", tmp_path / "out"]
    good = {path: path.read_bytes() for path in root.rglob("*.tif")}
    broken, holed = next(root.rglob(f"{s1_name(0)}_VH.tif")), next(root.rglob(f"{s1_name(2)}_VV.tif"))
    broken.write_bytes(good[broken][:500])
    write_tif(holed, np.where(np.arange(14400).reshape(120, 120) < 200, np.nan, -10).astype(np.float32))
    message = refused(capsys, *flags)
    assert "2 of 4 images cannot be used" in message and broken.name in message and "--skip_bad" in message
    assert pd.read_csv(tmp_path / "out" / "bad.csv").image.tolist() == [s1_name(0), s1_name(2)]
    fails_with(lambda: PackedDataset(tmp_path / "out", "train"), "manifest.json: does not exist", "not finished")
    pack.main(argv("--skip_bad", flags))
    assert PackedDataset(tmp_path / "out", "all").ids.tolist() == [s1_name(1), s1_name(3)]
    assert PackedDataset(tmp_path / "out", "all").image(1)[0, 0, 0] == -23
    with pytest.raises(DataError, match="no sample of split 'test'"):
        PackedDataset(tmp_path / "out", "test")
    flags[-1] = tmp_path / "again"
    refused(capsys, *flags)
    for path, content in good.items():
        path.write_bytes(content)
    pack.main(list(map(str, flags)))  # does only the parts that had bad images
    assert digests(tmp_path / "again") == digests(packed(tmp_path / "undisturbed", "benv2", root, "--dtype float32"))


# ---- Damage and misuse ---------------------------------------------------------------------------


def test_every_flipped_bit_is_found(stores, tmp_path, capsys):
    rng, files = (
        np.random.default_rng(0),
        sorted(path.name for path in stores["uint16"].iterdir() if path.name != "packing.json"),
    )
    store = tmp_path / "store"
    store.mkdir()
    for path in stores["uint16"].iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    pack.main(argv("--verify", store))
    for name in files * 4:
        content = (store / name).read_bytes()
        damaged, place = bytearray(content), rng.integers(len(content))
        damaged[place] ^= 1 << rng.integers(8)
        (store / name).write_bytes(damaged)
        message = refused(capsys, "--verify", store)
        assert name in message, (name, place)
        if not name.endswith(".bin") and name not in ("statistics.json", "bad.csv"):
            with pytest.raises(DataError, match=name):
                PackedDataset(store, "train")
        (store / name).write_bytes(content)
    (store / "part_00001.bin").unlink()
    assert "1 of" in refused(capsys, "--verify", store)


def test_a_truncated_part_is_noticed_before_training(stores, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for path in stores["uint16"].iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    part = store / "part_00000.bin"
    part.write_bytes(part.read_bytes()[:-1])
    dataset = PackedDataset(store, "train")
    for use in (dataset.check_files, lambda: dataset.image(0)):
        fails_with(use, "part_00000.bin has", "copy the store again")


def test_the_wrong_store_is_refused(stores):
    for arguments, words in (
        ({"dataset": "benv1", "split": "train"}, ("is a packed store of benv2", "--dataset benv2")),
        ({"dataset": "benv2", "split": "test"}, ("no sample of split 'test'", "train 36, val 12")),
        ({"dataset": "benv2", "split": "train", "metadata": ["x.csv"]}, ("has fixed splits", "--metadata")),
    ):
        fails_with(lambda: open_dataset(root=stores["uint16"], **arguments), *words)


@pytest.mark.parametrize(
    "flags, words",
    (
        ([], "--dataset is missing"),
        (["--dataset", "benv2"], "--data_path is missing"),
        (["--dataset", "benv2", "--data_path", "V2"], "--out"),
        (["--dataset", "benv2", "--data_path", "nowhere", "--out", "OUT"], "nowhere"),
        (["--dataset", "benv3"], "benv3"),
        (["--dataset", "benv2", "--data_path", "STORE", "--out", "OUT"], "packed store already"),
        (["--dataset", "benv2", "--data_path", "V2", "--out", "OUT", "--splits", "every"], "--splits every"),
        (["--dataset", "benv2", "--data_path", "V2", "--out", "OUT", "--part_mb", "0"], "--part_mb 0"),
        (["--dataset", "benv2", "--data_path", "V2", "--out", "OUT", "--metadata", "CSV"], "in several splits"),
        (["--verify", "nowhere"], "nowhere/manifest.json"),
    ),
)
def test_wrong_flags_are_one_line_and_nothing_is_written(flags, words, v2, stores, tmp_path, capsys):
    rows = write_csv(tmp_path / "rows.csv", [("s1_name", "labels"), (s1_name(0), "['Pastures']")])
    known = {"V2": v2, "STORE": stores["uint16"], "OUT": tmp_path / "out", "CSV": rows}
    assert words in refused(capsys, *(known.get(flag, flag) for flag in flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "dataset, value, words",
    (
        ("benv2", 0.05, "VH is never negative, so it looks linear"),
        ("sen12flood", -15.0, "VH is mostly negative, so it looks like dB"),
    ),
)
def test_data_in_other_units_are_refused(tmp_path, capsys, dataset, value, words):
    if dataset == "benv2":
        for path in write_v2(tmp_path / "data").rglob("*_VH.tif"):
            write_tif(path, value)
    else:
        for path in write_floods(tmp_path / "data").rglob("*.npy"):
            np.save(path, np.full((2, 128, 128), value, np.float32))
    assert words in refused(capsys, "--dataset", dataset, "--data_path", tmp_path / "data", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_full_disk_is_foreseen(v2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.files.shutil.disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "are needed, and 0.0 GB are free" in refused(
        capsys, "--dataset", "benv2", "--data_path", v2, "--out", tmp_path / "out"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packing.json"]


# ---- Batches -------------------------------------------------------------------------------------


def cached(path, split="train", data_cache="none", **_):
    """A packed split, in the cache that the flags ask for."""
    dataset = PackedDataset(path, split)
    if data_cache != "none":
        fill_cache(dataset, data_cache, ALONE)
    return dataset


def batches(loader, epochs=2):
    for loader.batch_sampler.epoch in range(epochs):
        yield from loader


def decoding_on_a_device(loader):
    """The loader of a packed store, as it is for a GPU: threads read codes, which are decoded later."""
    loader.loader.decode_in_threads, loader.loader.pin_memory = False, False
    return loader


def same_batch(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else same_batch(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "changes", ({}, {"num_workers": 2}, {"data_cache": "ram", "num_workers": 2}, {"data_cache": "device"})
)
@pytest.mark.parametrize("wrap", (ImagesWithIds, SamplesWithIds))
def test_batches_are_those_of_the_folders(simulated, stores, changes, wrap):
    expected = batches(build_loader(wrap(BigEarthNetv2(simulated, "train")), loader_flags(), ALONE))
    found = build_loader(wrap(cached(stores["float32"], **changes)), loader_flags(**changes), ALONE)
    for batch, *others in zip(expected, batches(found), list(batches(decoding_on_a_device(found))), strict=True):
        assert all(same_batch(batch, other) for other in others)


@pytest.mark.parametrize("changes", ({}, {"num_workers": 3}, {"data_cache": "ram"}))
def test_evaluation_sees_every_sample_in_order(simulated, stores, changes):
    expected = list(build_test_loader(BigEarthNetv2(simulated, "val"), loader_flags(), ALONE))
    found = list(build_test_loader(cached(stores["float32"], "val", **changes), loader_flags(**changes), ALONE))
    assert [len(batch[0]) for batch in found] == [8, 4]
    assert all(same_batch(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ("uint16", "float16", "float32"))
def test_decoding_elsewhere_gives_the_same_bits(stores, dtype):
    """What a GPU is sent, and what it makes of it, tried on the CPU."""
    dataset, ids = PackedDataset(stores[dtype], "train_val"), [40, 3, 3, 17]
    codes = dataset.codes(ids)
    assert codes[0].dtype == {"uint16": torch.int16}.get(dtype, getattr(torch, dtype))
    assert torch.equal(dataset.images(ids, codes=codes)[0], dataset.images(ids)[0])
    dataset.cache()
    assert torch.equal(dataset.codes(ids)[0], codes[0])


def test_missing_pixels_are_decoded_alike_everywhere(tmp_path):
    root = write_v2(tmp_path / "v2")
    holed = np.full((120, 120), -12, np.float32)
    holed[5, :60] = np.nan
    write_tif(next(root.rglob(f"{s1_name(1)}_VV.tif")), holed)
    store = packed(tmp_path / "store", "benv2", root)
    dataset, ids = PackedDataset(store, "all"), [0, 1, 2]
    (expected,) = dataset.images(ids)
    assert np.flatnonzero(np.isnan(expected.numpy())).tolist() == [(2 * 1 + 1) * 14400 + 600 + x for x in range(60)]
    assert torch.equal(dataset.images(ids, codes=dataset.codes(ids))[0].nan_to_num(99), expected.nan_to_num(99))
    for device in (None, "cpu"):
        held = PackedDataset(store, "all")
        held.cache(device)
        assert torch.equal(held.images(ids)[0].nan_to_num(99), expected.nan_to_num(99))


def test_pairs_come_as_two_images(tmp_path):
    root = write_floods(tmp_path / "floods")
    store = packed(tmp_path / "store", "sen12flood", root, "--dtype float32")
    for cache in ("none", "ram"):
        loaders = [
            build_loader(SamplesWithIds(dataset), loader_flags(batch_size=3, data_cache=kind), ALONE)
            for dataset, kind in ((FloodDataset(root), "none"), (cached(store, data_cache=cache), cache))
        ]
        assert all(same_batch(a, b) for a, b in zip(*map(list, map(batches, loaders)), strict=True))


def test_a_cache_that_does_not_fit_is_refused(stores, monkeypatch):
    dataset = PackedDataset(stores["uint16"], "train")
    assert dataset.cache_bytes() == 36 * 2 * 14400 * 2
    monkeypatch.setattr(PackedDataset, "cache_bytes", lambda self: 10**15)
    with pytest.raises(UsageError, match="--data_cache ram: split 'train' takes 1000000.0 GB"):
        fill_cache(dataset, "ram", ALONE)


def test_a_cache_of_a_later_split_that_does_not_fit_ends_a_run_before_it_starts(program, stores, tmp_path, monkeypatch):
    size = PackedDataset.cache_bytes
    monkeypatch.setattr(PackedDataset, "cache_bytes", lambda self: size(self) * (10**9 if self.split == "val" else 1))
    flags = argv("--dataset benv2 --test_split none --model mixmim_tiny --batch_size 4 --data_cache ram --output_dir")
    flags += [tmp_path / "out", "--data_path", stores["uint16"], "--finetune", ""]
    status, _, err = program(main_finetune, *flags)
    assert status == 2 and "--data_cache ram: split 'val' takes" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_thread_reaches_training(stores, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for path in stores["uint16"].iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    loader = build_loader(ImagesWithIds(PackedDataset(store, "train")), loader_flags(num_workers=2), ALONE)
    (store / "part_00000.bin").unlink()
    with pytest.raises(DataError, match="part_00000.bin"):
        list(batches(loader))


# ---- The main programs ---------------------------------------------------------------------------


def test_pretraining_from_a_store_is_pretraining_from_the_folders(program, simulated, stores, tmp_path):
    logs = {}
    for name, path, *more in (
        ("folders", simulated),
        ("float32", stores["float32"]),
        ("uint16", stores["uint16"]),
        ("device", stores["uint16"], "--data_cache", "device"),
    ):
        flags = argv("--split train --batch_size 4 --lr 1e-3 --data_path", path, "--output_dir", tmp_path / name)
        status, _, err = program(main_pretrain, *TINY, *flags, *more)
        assert status == 0, err
        logs[name] = log_of(tmp_path / name)[0]["train_loss"]
    assert logs["float32"] == logs["folders"] and logs["device"] == logs["uint16"]
    assert logs["uint16"] != logs["folders"] and logs["uint16"] == pytest.approx(logs["folders"], rel=1e-3)
    assert json.loads((tmp_path / "uint16" / "run.json").read_text())["data"]["dtype"] == "uint16"


def test_pretraining_from_an_lmdb_is_pretraining_from_the_folders(program, v2, tmp_path):
    write_v2_lmdb(tmp_path / "data")
    for name, path in (("folders", v2), ("lmdb", tmp_path / "data" / "lmdb")):
        flags = argv("--split all --batch_size 2 --num_workers 2 --data_path", path, "--output_dir", tmp_path / name)
        status, _, err = program(main_pretrain, *TINY, *flags)
        assert status == 0, err
    assert log_of(tmp_path / "folders")[0]["train_loss"] == log_of(tmp_path / "lmdb")[0]["train_loss"]


def test_finetuning_floods_from_a_store(program, tmp_path):
    root, logs = write_floods(tmp_path / "floods"), {}
    store = packed(tmp_path / "store", "sen12flood", root, "--dtype float32")
    for name, path in (("files", root), ("store", store)):
        flags = argv("--dataset sen12flood --batch_size 3 --data_path", path, "--output_dir", tmp_path / name)
        status, _, err = program(main_finetune, *TINY, *flags, "--finetune", "")
        assert status == 0, err
        logs[name] = {key: value for key, value in log_of(tmp_path / name)[0].items() if key != "train_samples_per_s"}
    assert logs["files"] == logs["store"] and logs["store"]["filled_pixels"] == 6


@pytest.mark.parametrize(
    "module, more", ((main_pretrain, ()), (main_finetune, ("--dataset", "benv2", "--finetune", "")))
)
def test_a_cache_needs_a_store(program, simulated, tmp_path, module, more):
    status, _, err = program(
        module, "--data_path", simulated, "--data_cache", "ram", "--output_dir", tmp_path / "out", *more
    )
    assert status == 2
    assert err.splitlines()[-1].startswith(f"{module.__name__}.py: error: --data_cache ram: --data_path {simulated}")
    assert not (tmp_path / "out").exists()


def test_a_store_is_self_contained(stores, tmp_path):
    """Moved elsewhere it is read as before, and nothing in it tells where it was made."""
    text = b"".join(path.read_bytes() for path in stores["uint16"].glob("*.json"))
    assert str(Path(stores["uint16"]).parent).encode() not in text and b"/tmp" not in text
