# SPDX-License-Identifier: MIT
"""Scenes cut into tiles: values, places, no data, the same bytes for any way of making them, and real images."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.windows import Window

from common.workers import Workers
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import verify
from sarwmix.prepare.tile import Cut, main
from sarwmix.registry import open_dataset
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import needs_samples, sample_path, write_tif
from tests.helpers.runs import argv, digests, launch, mpirun, refusal

RNG = np.random.default_rng(1)
GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5400000)}
FLAGS = "--units dB --size 32 --workers 1 --dtype float32"


def scene(path, high=100, wide=70, **options):
    """A scene of VV and VH whose every pixel is different. Returns its values, order VH, VV."""
    values = RNG.normal(0, 2, (2, high, wide)).astype(np.float32) + np.array([-11, -18], np.float32)[:, None, None]
    write_tif(path, values, ("VV", "VH"), **{**GRID, **options})
    return values[::-1]


def run(*flags):
    main(argv(FLAGS, flags))


@pytest.mark.parametrize("length, stride, starts", [
    (128, 32, [0, 32, 64, 96]), (130, 32, [0, 32, 64, 96, 128]), (31, 32, [0]), (64, 16, [0, 16, 32]), (65, 16, [0, 16, 32, 48]),
])  # fmt: skip
def test_where_tiles_begin(length, stride, starts):
    assert list(Cut(32, stride, 0.25).starts(length)) == starts


def test_tiles_are_the_scene_and_know_their_place(tmp_path):
    values = scene(tmp_path / "S1A_IW_a.tif")
    run(tmp_path / "S1A_IW_a.tif", "--out", tmp_path / "store")
    data = PackedDataset(tmp_path / "store", "all")
    assert data.ids.tolist() == [f"S1A_IW_a_r{row:05d}_c{column:05d}" for row in (0, 32, 64) for column in (0, 32)]
    grid = data.georeference()
    for i, (row, column) in enumerate(zip(grid.row, grid.column)):
        np.testing.assert_array_equal(data.read_image(i), values[:, row : row + 32, column : column + 32])
        assert (grid.c[i], grid.f[i], grid.a[i], grid.e[i]) == (300000 + 10 * column, 5400000 - 10 * row, 10, -10)
    assert set(grid.scene) == {"S1A_IW_a"} and set(grid.crs) == {"EPSG:32633"} == set(data.georeference().crs)
    assert set(data.groups) == {"S1A_IW_a"} and data.CLASSES == () and verify(tmp_path / "store", Workers()) == 5
    part = data.subset([4, 1])
    assert part.georeference().column.tolist() == [0, 32] and part[0][1].shape == (0,)
    np.testing.assert_allclose(data.MEAN, [values[k, :96, :64].mean() for k in (0, 1)], atol=1e-3)


def test_no_data_decides_which_tiles_are_kept(tmp_path):
    values = scene(tmp_path / "a.tif", 64, 64, nodata=-99)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        holes = file.read()
        holes[0, :32, :8], holes[:, 32:, :9] = -99, np.nan  # 25 % of one band, and more than that
        file.write(holes)
    run(tmp_path / "a.tif", "--out", tmp_path / "store")
    data = PackedDataset(tmp_path / "store", "all")
    assert [name[-13:] for name in data.ids] == ["r00000_c00000", "r00000_c00032", "r00032_c00032"]
    assert np.isnan(data.read_image(0)[1, :, :8]).all() and (data.read_image(0)[0] == values[0, :32, :32]).all()
    run(tmp_path / "a.tif", "--out", tmp_path / "strict", "--max_nodata 0")
    assert len(PackedDataset(tmp_path / "strict", "all")) == 2
    run(tmp_path / "a.tif", "--out", tmp_path / "dense", "--stride 16")
    assert len(PackedDataset(tmp_path / "dense", "all")) == 7


def test_scenes_of_every_kind_in_one_store(tmp_path):
    for name in ("b_VV", "b_VH"):
        write_tif(
            tmp_path / f"{name}.tif", np.full((40, 40), 10 ** (-1.2 if "VV" in name else -1.9), np.float32), **GRID
        )
    scene_values = scene(tmp_path / "a.tif", 32, 32, crs=None)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write(10 ** (file.read() / 10))
    write_tif(tmp_path / "empty.tif", np.full((2, 64, 64), np.nan, np.float32), ("VV", "VH"), **GRID)
    main(argv("--units linear --size 32 --workers 1 --split train --out", tmp_path / "store", tmp_path))
    data = PackedDataset(tmp_path / "store", "train")
    assert data.ids.tolist() == ["a_r00000_c00000", "b_r00000_c00000"]
    np.testing.assert_allclose(data.read_image(0), scene_values, atol=1e-3)
    np.testing.assert_allclose(data.read_image(1)[:, 0, 0], [-19, -12], atol=1e-3)
    assert data.georeference().crs.tolist() == ["", "EPSG:32633"]


CASES = {
    "linear values": (lambda p: scene(p / "a.tif") is not None and rewrite(p / "a.tif", lambda x: 10 ** (x / 10)), "", "looks linear"),
    "swapped bands": (lambda p: write_tif(p / "a.tif", np.stack([np.full((64, 64), v, np.float32) for v in (-19, -12)]), ("VV", "VH")), "", "swapped"),
    "one band": (lambda p: write_tif(p / "a_VV.tif", np.full((64, 64), -12, np.float32)), "", "holds only VV"),
    "no data": (lambda p: write_tif(p / "a.tif", np.full((2, 64, 64), np.nan, np.float32), ("VV", "VH")), "", "none of 4 tiles"),
    "a large stride": (lambda p: scene(p / "a.tif"), "--stride 33", "--stride 33: is more than --size 32"),
    "bands": (lambda p: scene(p / "a.tif"), "--bands VV", "--bands VV: VV and VH are needed"),
    "uncalibrated dB": (lambda p: scene(p / "a.tif"), "--uncalibrated", "--units amplitude"),
}  # fmt: skip


def rewrite(path, change):
    with rasterio.open(path, "r+") as file:
        file.write(change(file.read()))


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_tiled_is_one_line(tmp_path, capsys, case):
    make, flags, said = CASES[case]
    make(tmp_path)
    assert said in refusal(main, (tmp_path, FLAGS, flags or (), "--out", tmp_path / "store"), capsys)
    left = {path.name for path in tmp_path.glob("store/*")}
    assert not left or case in ("linear values", "swapped bands") and left == {"packing.json"}


def test_bad_scenes_are_left_out_on_request(tmp_path, capsys):
    scene(tmp_path / "a.tif")
    write_tif(tmp_path / "b_VV.tif", np.full((64, 64), -12, np.float32))
    scene(tmp_path / "c.tif", 400, 64, compress="deflate")
    content = bytearray((tmp_path / "c.tif").read_bytes())
    content[len(content) * 30 // 100 : len(content) * 35 // 100] = bytes(
        len(content) * 35 // 100 - len(content) * 30 // 100
    )  # some of its rows
    (tmp_path / "c.tif").write_bytes(content)
    message = refusal(main, (FLAGS, tmp_path, "--out", tmp_path / "store"), capsys)
    assert (
        "1 of 3 scenes cannot be used" in message and "holds only VV" in message and not (tmp_path / "store").exists()
    )
    run(tmp_path, "--out", tmp_path / "store", "--skip_bad")
    assert set(pd.read_csv(tmp_path / "store" / "bad.csv")["image"]) == {"b", "c"}
    assert {"a_r00000_c00000", "c_r00000_c00000"} <= set(PackedDataset(tmp_path / "store", "all").ids)


# ---- Bytes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_ranks_and_kills_do_not_change_a_byte(tmp_path):
    for name in "abc":
        scene(tmp_path / f"{name}.tif", 400, 300)
    flags = argv("-m sarwmix.tile", tmp_path, "--units dB --size 32 --part_mb 1")
    one, killed = tmp_path / "one", tmp_path / "killed"
    main([*flags[2:], "--out", str(one), "--workers", "1"])
    assert len(list(one.glob("part_*.bin"))) == 2
    launch(mpirun(sys.executable, flags, "--out", tmp_path / "ranks", "--workers 1"))
    launch([sys.executable, flags, "--out", tmp_path / "two", "--workers 2"])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *argv(flags[2:], "--out", killed, "--workers 1")], cwd=ROOT
    )
    assert process.wait() == -9 and list(killed.glob("part_*.bin")) and not (killed / "manifest.json").exists()
    main([*flags[2:], "--out", str(killed), "--workers", "1"])
    for name in ("two", "ranks", "killed"):
        assert digests(one) == digests(tmp_path / name), name
    store = json.loads((one / "manifest.json").read_text())
    assert store["images"] == 3 * 12 * 9 and store["dataset"] == "chips"


# Kills itself when it writes its next part file.
KILLED = """
import os, sys
import sarwmix.prepare.store_writer as writer
from sarwmix.prepare.tile import main
write, done = writer.write_atomically, []
def killing(path, content):
    write(path, content)
    os.kill(os.getpid(), 9)
writer.write_atomically = killing
main(sys.argv[1:])
"""


def test_a_large_scene_is_read_in_windows(tmp_path):
    """A sparse scene of 20,000 × 3,000 pixels, with one block of data."""
    with rasterio.open(
        tmp_path / "large.tif", "w", driver="GTiff", width=3000, height=20000, count=2, dtype="float32",
        nodata=-9999, tiled=True, blockxsize=512, blockysize=512, compress="deflate", SPARSE_OK=True, **GRID
    ) as file:  # fmt: skip
        for number, (name, value) in enumerate((("VV", -12), ("VH", -19)), start=1):
            file.set_band_description(number, name)
            file.write(np.full((512, 512), value, np.float32), number, window=Window(1024, 10240, 512, 512))
    run(tmp_path / "large.tif", "--out", tmp_path / "store", "--size 128")
    data = open_dataset("chips", tmp_path / "store", "train_val")
    assert (
        len(data) == 16
        and data.georeference().row.min() == 10240
        and data.read_image(0)[:, 0, 0].tolist() == [-19, -12]
    )


# ---- Real images ---------------------------------------------------------------------------------


@needs_samples
def test_real_images_of_two_files_in_linear_power(tmp_path):
    """Statistics and places of OPERA RTC-S1 images equal those that rasterio and NumPy give."""
    folder = sample_path("opera_rtc_s1/dist_s1_cropped")
    paths = sorted(folder.rglob("*20220101*.tif")) or sorted(folder.rglob("*_VH.tif"))[:3]
    paths = sorted({str(path).replace("_VH.tif", f"_{name}.tif") for path in paths for name in ("VH", "VV")})
    main(argv("--units linear --size 100 --workers 1 --out", tmp_path / "store", paths))
    data = PackedDataset(tmp_path / "store", "all")
    assert len(data) == len(paths) // 2
    for channel, name in enumerate(("VH", "VV")):
        values = []
        for path in paths:
            if path.endswith(f"_{name}.tif"):
                with rasterio.open(path) as file:
                    power = file.read(1).astype(float)
                    values.append(10 * np.log10(power[power > 0]))
                    assert file.transform.c in data.georeference().c.tolist()
        assert abs(np.concatenate(values).mean() - data.MEAN[channel]) < 1e-3


@needs_samples
def test_real_chips_with_no_data(tmp_path, caplog):
    with caplog.at_level("INFO"):
        main(
            argv(
                "--units dB --size 256 --workers 1 --out", tmp_path / "store", sample_path("sen1floods11_chips/S1Hand")
            )
        )
    assert "Paraguay_34417" in caplog.text and "no tile with enough data" in caplog.text
    data = PackedDataset(tmp_path / "store", "all")
    assert len(data) == 48 and set(data.georeference().crs) == {"EPSG:4326"}
