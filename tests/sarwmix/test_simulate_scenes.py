# SPDX-License-Identifier: MIT
"""Simulated scenes and chips: the same for any number of processes, labels that hold, and marks of what they are."""

import resource
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import rasterio

from common.workers import Workers
from sarwmix.raster import Reading
from sarwmix.registry import is_simulated, open_dataset
from sarwmix.simulate.scenes import CHIPS_PER_CLASS, KINDS, Parameters, main, simulate_scenes, write_image
from tests.helpers.runs import argv, digests, refusal


def test_an_image_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    image, (soft, hard) = np.zeros((2, 8, 8), np.float32), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OSError):
            write_image(tmp_path / "x.tif", image, "dB", "EPSG:32633", (0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_scenes_and_chips(tmp_path):
    simulate_scenes(tmp_path / "a", Parameters(scenes=3, side=256, chip_size=32))
    simulate_scenes(tmp_path / "b", Parameters(scenes=3, side=256, chip_size=32), Workers(2))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    table = pd.read_csv(tmp_path / "a" / "chips" / "metadata.csv")
    assert set(table["label"]) <= set(KINDS) and table.groupby(["group", "label"]).size().max() <= CHIPS_PER_CLASS
    (path, *_) = sorted((tmp_path / "a" / "scenes").glob("*.tif"))
    with (
        rasterio.open(path) as scene,
        rasterio.open(next((tmp_path / "a" / "chips").glob(f"{path.stem}_*.tif"))) as chip,
    ):
        assert scene.descriptions == ("VV", "VH") and scene.tags()["SIMULATED"] == "yes" and scene.shape == (256, 256)
        window = scene.window(*chip.bounds)
        assert (scene.read(window=window) == chip.read()).all() and chip.crs == scene.crs
    data = open_dataset("chips", tmp_path / "a" / "chips", "all", reading=Reading("linear"))
    assert is_simulated(data) and len(data) == len(table) and -35 < data[0][0][0].mean() < -8
    simulate_scenes(tmp_path / "a", Parameters(scenes=3, side=256, chip_size=32))  # complete


def test_masks(tmp_path):
    parameters = Parameters(scenes=2, side=100, chip_size=32)
    simulate_scenes(tmp_path / "plain", parameters)
    simulate_scenes(tmp_path / "a", replace(parameters, masks=True))
    simulate_scenes(tmp_path / "b", replace(parameters, masks=True), Workers(2))
    written, plain = digests(tmp_path / "a"), digests(tmp_path / "plain")
    assert written == digests(tmp_path / "b")
    assert all(written[name] == plain[name] for name in plain if name != "simulation.json")
    assert "masks" not in (tmp_path / "plain" / "simulation.json").read_text()
    data = open_dataset("masks", tmp_path / "a" / "masks", "all", supervised=True, reading=Reading("linear"))
    assert len(data) == 2 * 3 * 3 and data.size == 32 and data.CLASSES == tuple(KINDS) and is_simulated(data)
    assert len(set(data.groups)) == 2 and data.describe()["ignored_pixels"] == 0
    scene = data.groups[5]
    with (
        rasterio.open(tmp_path / "a" / "scene_masks" / f"{scene}.tif") as mask,
        rasterio.open(tmp_path / "a" / "scenes" / f"{scene}.tif") as image,
    ):
        assert mask.shape == (100, 100) and mask.nodata == 255 and mask.transform == image.transform
        assert data.ids[5] == f"{scene}_00032_00064"
        assert (data[5][1].numpy() == mask.read(1)[32:64, 64:96]).all()
        np.testing.assert_allclose(data[5][0][1], 10 * np.log10(image.read(1)[32:64, 64:96]), atol=1e-4)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--side 64 --chip_size 65", "more than --side"),
        ("--scenes 0", "at least 1"),
        ("--masks", "--masks: needs --chip_size"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, said):
    assert said in refusal(main, argv("--out", tmp_path / "out", flags), capsys)
