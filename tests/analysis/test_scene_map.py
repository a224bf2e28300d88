# SPDX-License-Identifier: MIT
"""The picture of a scene beside a map of its tiles: what is drawn where, and what is refused."""

import numpy as np
import pytest
import rasterio

from analysis import scene_map
from analysis.scene_map import MOST_PIXELS, draw_map, overview, read_map
from sarwmix.raster import Image, Reading
from tests.helpers.dataset_fixtures import write_tif
from tests.helpers.runs import argv, refusal

GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5400000)}


@pytest.fixture
def scene(tmp_path):
    """A scene whose left half is 10 dB darker, with a corner without data."""
    values = np.full((2, 64, 96), [[[-8]], [[-15]]], np.float32)
    values[:, :, :48] -= 10
    values[:, :8, :8] = np.nan
    return write_tif(tmp_path / "scene.tif", values, ("VV", "VH"), **GRID)


def maps(tmp_path, names, values):
    values = np.asarray(values, np.float32)
    grid = {**GRID, "transform": rasterio.Affine(320, 0, 300000, 0, -320, 5400000)}
    return write_tif(tmp_path / "map.tif", values, names, **grid)


def test_an_overview_is_averaged_in_power(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(-12, 2, (2, 2 * MOST_PIXELS, 8)).astype(np.float32)
    write_tif(tmp_path / "s.tif", values, ("VV", "VH"), **GRID)
    found, side = overview(Image.find("s", [tmp_path / "s.tif"], Reading()))
    assert side == 2 and found.shape == (2, MOST_PIXELS, 4)
    power = 10 ** (values[::-1].astype(float) / 10)
    expected = 10 * np.log10(power.reshape(2, MOST_PIXELS, 2, 4, 2).mean((2, 4)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_components_and_classes_are_drawn_at_their_place(scene, tmp_path):
    image = Image.find("scene", [scene], Reading())
    names = [f"principal component {k}" for k in (1, 2, 3)]
    rising = np.arange(6.0).reshape(2, 3)
    figure = draw_map(image, *read_map(maps(tmp_path, names, [rising, -rising, rising])))
    (left,), (right,) = (axis.images for axis in figure.axes[:2])
    assert left.get_extent() == [300000, 300960, 5399360, 5400000] == right.get_extent()
    shown = right.get_array()
    assert shown[0, 0].tolist() == [0, 1, 0] and shown[1, 2].tolist() == [1, 0, 1]
    assert left.get_array()[32, 20].sum() < left.get_array()[32, 80].sum()
    classes = np.stack([rising > 2, rising <= 2]).astype(np.float32)
    classes[:, 0, 0] = np.nan
    figure = draw_map(image, *read_map(maps(tmp_path, ["water", "land"], classes)))
    shown = figure.axes[1].images[0].get_array()
    assert not np.allclose(shown[0, 0], shown[0, 1]) and np.allclose(shown[0, 1], shown[0, 2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["water", "land"]


def test_a_figure_is_written_and_wrong_maps_are_one_line(scene, tmp_path, capsys):
    path = maps(tmp_path, ["water", "land"], np.random.default_rng(0).random((2, 2, 3)))
    flags = argv(scene, "--units dB --map", path, "--output", tmp_path / "out.png")
    scene_map.main(flags)
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "there is no such file" in refusal(scene_map.main, [tmp_path / "none.tif", *flags[1:]], capsys)
    assert "does not exist" in refusal(
        scene_map.main, (scene, "--units dB --map", tmp_path / "none.tif", "--output x.png"), capsys
    )
    empty = maps(tmp_path, ["water"], np.full((1, 2, 3), np.nan))
    assert "no pixel has a value" in refusal(scene_map.main, (scene, "--units dB --output x.png --map", empty), capsys)
    thin = write_tif(tmp_path / "thin.tif", np.full((2, 2, 1200), -10, np.float32), ("VV", "VH"), **GRID)
    flags = (thin, "--units dB --output x.png --map", maps(tmp_path, ["water"], np.ones((1, 2, 3))))
    assert "thin.tif: of 2x1200 pixels is too narrow" in refusal(scene_map.main, flags, capsys)
    other = write_tif(
        tmp_path / "other.tif", np.zeros((2, 2, 3), np.float32), crs="EPSG:32634", transform=GRID["transform"]
    )
    assert "another coordinate system" in refusal(
        scene_map.main, (scene, "--units dB --map", other, "--output x.png"), capsys
    )
