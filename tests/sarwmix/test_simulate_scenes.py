# SPDX-License-Identifier: MIT
"""Simulated scenes and chips: the same for any number of processes, labels that hold, and marks of what they are."""

import resource

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


@pytest.mark.parametrize(
    "flags, said", [("--side 64 --chip_size 65", "more than --side"), ("--scenes 0", "at least 1")]
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, said):
    assert said in refusal(main, argv("--out", tmp_path / "out", flags), capsys)
