# SPDX-License-Identifier: MIT
"""The picture of a scene beside a map of its tiles or pixels: what is drawn where, and what is refused."""

import numpy as np
import pytest
import rasterio

from analysis import scene_map
from analysis.scene_map import MOST_PIXELS
from sarwmix.geotiff import opened_geotiff
from sarwmix.raster import Image, Reading
from tests.helpers.dataset_fixtures import write_tif
from tests.helpers.runs import argv, refusal
from util.scene_pictures import CLASS_TAG, class_colours, draw_map, overview, read_map

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
    values = rng.normal(-12, 2, (2, 2 * MOST_PIXELS, 7)).astype(np.float32)
    values[:, 0, :3] = np.nan
    values[:, 1, 0] = np.nan
    write_tif(tmp_path / "s.tif", values, ("VV", "VH"), **GRID)
    found = overview(Image.find("s", [tmp_path / "s.tif"], Reading()), MOST_PIXELS)
    assert found.side == 2 and found.picture().shape == (2, MOST_PIXELS, 4)
    power = np.pad(10 ** (values[::-1].astype(float) / 10), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    expected = 10 * np.log10(np.nanmean(power.reshape(2, MOST_PIXELS, 2, 4, 2), (2, 4)))
    np.testing.assert_allclose(found.picture(), expected, atol=1e-4)


def drawn(image, path):
    with opened_geotiff(path) as file:
        return draw_map(overview(image, MOST_PIXELS), image.transform, read_map(file, MOST_PIXELS))


def test_components_and_classes_are_drawn_at_their_place(scene, tmp_path):
    image = Image.find("scene", [scene], Reading())
    names = [f"principal component {k}" for k in (1, 2, 3)]
    rising = np.arange(6.0).reshape(2, 3)
    figure = drawn(image, maps(tmp_path, names, [rising, -rising, rising]))
    (left,), (right,) = (axis.images for axis in figure.axes[:2])
    assert left.get_extent() == [0, 96, 64, 0] == right.get_extent()
    shown = right.get_array()
    assert shown[0, 0].tolist() == [0, 1, 0] and shown[1, 2].tolist() == [1, 0, 1]
    assert left.get_array()[32, 20].sum() < left.get_array()[32, 80].sum()
    classes = np.stack([rising > 2, rising <= 2]).astype(np.float32)
    classes[:, 0, 0] = np.nan
    figure = drawn(image, maps(tmp_path, ["water", "land"], classes))
    shown = figure.axes[1].images[0].get_array()
    assert not np.allclose(shown[0, 0], shown[0, 1]) and np.allclose(shown[0, 1], shown[0, 2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["water", "land", "no data"]


def test_a_map_is_drawn_on_the_grid_of_a_rotated_scene(tmp_path):
    turned = rasterio.Affine(8, 6, 300000, 6, -8, 5400000)
    values = np.full((2, 64, 96), -10, np.float32)
    path = write_tif(tmp_path / "s.tif", values, ("VV", "VH"), crs="EPSG:32633", transform=turned)
    image = Image.find("s", [path], Reading())
    part = rasterio.Affine(16, 12, 300000 + 8 * 32 + 6 * 16, 12, -16, 5400000 + 6 * 32 - 8 * 16)
    classes = write_tif(tmp_path / "m.tif", np.ones((8, 16), np.uint8), crs="EPSG:32633", transform=part, nodata=255)
    figure = drawn(image, classes)
    np.testing.assert_allclose(figure.axes[1].images[0].get_extent(), [32, 64, 32, 16], atol=1e-6)
    assert figure.axes[1].get_xlim() == (0, 96) and figure.axes[1].get_ylim() == (64, 0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class 1"]


def test_a_map_of_classes_is_read_coarsely(tmp_path):
    values = np.zeros((60, 80), np.uint8)
    values[:, 40:], values[:20, :20] = 1, 255
    path = write_tif(tmp_path / "m.tif", values, nodata=255, **GRID)
    with rasterio.open(path, "r+") as file:
        file.update_tags(1, **{CLASS_TAG.format(0): "water", CLASS_TAG.format(1): "land", CLASS_TAG.format(2): "ice"})
    with opened_geotiff(path) as file:
        found = read_map(file, 8)
    assert found.names == ["water", "land", "ice"] and found.transform == (100, 0, 300000, 0, -100, 5400000)
    expected = np.repeat([[0] * 4 + [1] * 4], 6, 0)
    expected[:2, :2] = -1
    np.testing.assert_array_equal(found.classes, expected)


def test_colours_of_classes():
    names = ["Inland waters", "Marine waters", "flood", "no water", "Mixed forest", "Coniferous forest", "a", "b"]
    colours = class_colours(names).astype(int)
    red, green, blue = colours[:3].T
    assert (blue > red + 60).all() and (blue > green).all()
    assert len(np.unique(class_colours([*names, *(f"kind {k}" for k in range(40))]), axis=0)) == 48
    assert colours[3].min() > 150 and colours[4, 1] > max(colours[4, 0], colours[4, 2])
    apart = np.abs(colours[:, None] - colours).sum(-1) + 1000 * np.eye(len(names))
    assert apart.min() > 60


def test_a_figure_is_written_and_wrong_maps_are_one_line(scene, tmp_path, capsys):
    path = maps(tmp_path, ["water", "land"], np.random.default_rng(0).random((2, 2, 3)))
    flags = argv(scene, "--units dB --map", path, "--output", tmp_path / "out.png")
    scene_map.main(flags)
    assert (tmp_path / "out.png").stat().st_size > 5_000
    assert "there is no such file" in refusal(scene_map.main, [tmp_path / "none.tif", *flags[1:]], capsys)
    assert "does not exist" in refusal(
        scene_map.main, (scene, "--units dB --map", tmp_path / "none.tif", "--output x.png"), capsys
    )
    empty = maps(tmp_path, ["water"], np.full((1, 2, 3), np.nan))
    assert "no pixel has a value" in refusal(scene_map.main, (scene, "--units dB --output x.png --map", empty), capsys)
    thin = write_tif(tmp_path / "thin.tif", np.full((2, 2, 1200), -10, np.float32), ("VV", "VH"), **GRID)
    flags = (thin, "--units dB --output", tmp_path / "thin.png", "--map", maps(tmp_path, ["a"], np.ones((1, 2, 3))))
    scene_map.main(argv(flags))
    other = write_tif(
        tmp_path / "other.tif", np.zeros((2, 2, 3), np.float32), crs="EPSG:32634", transform=GRID["transform"]
    )
    assert "another coordinate system" in refusal(
        scene_map.main, (scene, "--units dB --map", other, "--output x.png"), capsys
    )


@pytest.mark.parametrize("flags, width", [("", 1425), ("--panel 3", 945)])
def test_the_size_of_a_figure(scene, tmp_path, flags, width):
    path = maps(tmp_path, ["water", "land"], np.random.default_rng(0).random((2, 2, 3)))
    scene_map.main(
        argv(scene, "--units dB --map", path, "--output", tmp_path / "out.png", argv(flags) if flags else ())
    )
    assert int.from_bytes((tmp_path / "out.png").read_bytes()[16:20], "big") == width
