# SPDX-License-Identifier: MIT
"""Results as maps: where pixels lie, several scenes, what has no grid, components, and outlines."""

import resource

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.warp import transform

from common.errors import UsageError
from sarwmix.raster import GRID
from util.maps import grids_of, outlines, principal_components, with_outlines, write_maps

SIZE = 32


def table(places, scene="a", crs="EPSG:32633", pixel=10.0):
    """A georeference of tiles whose first pixels are (row, column)."""
    rows = [(scene, r, c, crs, pixel, 0.0, 300000 + pixel * c, 0.0, -pixel, 5400000 - pixel * r) for r, c in places]
    return pd.DataFrame(rows, columns=GRID)


def test_a_map_has_a_pixel_per_tile(tmp_path):
    georeference = table([(32, 64), (32, 0), (96, 32)])  # the first row and column of tiles are empty
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_maps(tmp_path / "m.tif", grids_of(georeference, SIZE, "--embed"), values, ["x", "y"])
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.shape == (3, 3) and file.descriptions == ("x", "y") and file.crs.to_epsg() == 32633
        assert tuple(file.transform)[:6] == (320, 0, 300000, 0, -320, 5400000 - 320)
        expected = np.full((3, 3), np.nan)
        expected[0, 2], expected[0, 0], expected[2, 1] = 0, 2, 4
        np.testing.assert_array_equal(file.read(1), expected)


def test_pixels_of_overlapping_tiles_have_the_centres_of_the_tiles(tmp_path):
    georeference = table([(0, 0), (0, 16), (16, 16)])
    (grid,) = grids_of(georeference, SIZE, "--embed")
    assert grid.shape == (2, 2) and grid.transform == (160, 0, 300000 + 80, 0, -160, 5400000 - 80)
    x, y = rasterio.transform.xy(rasterio.Affine(*grid.transform), 1, 1)
    assert (x, y) == (300000 + 10 * (16 + 16), 5400000 - 10 * (16 + 16))  # the centre of the last tile


def test_scenes_have_a_map_each(tmp_path):
    georeference = pd.concat([table([(0, 0)]), table([(0, 0), (0, 32)], "b", "EPSG:4326", 1e-4)], ignore_index=True)
    write_maps(tmp_path / "m.tif", grids_of(georeference, SIZE, "--embed"), np.arange(3.0)[:, None], ["x"])
    assert {path.name for path in tmp_path.iterdir()} == {"m_a.tif", "m_b.tif"}
    with rasterio.open(tmp_path / "m_b.tif") as file:
        assert file.read(1).tolist() == [[1, 2]]


def test_outlines_across_the_antimeridian_and_around_a_pole():
    rows = [("a", 0, 0, crs, 100, 0, c, 0, -100, f) for crs, c, f in
            (("EPSG:32660", 832400, 1e5), ("EPSG:32660", 500000, 1e5), ("EPSG:3413", -1600, 1600))]  # fmt: skip
    corners = outlines(pd.DataFrame(rows, columns=GRID), SIZE)
    longitude = corners[0, :, 0]
    assert longitude.min() < 180 < longitude.max() and np.ptp(longitude) < 0.1 and np.ptp(corners[1, :, 0]) < 0.1
    assert np.isnan(corners[2]).all()
    x, y = transform("EPSG:4326", "EPSG:32660", longitude, corners[0, :, 1])
    np.testing.assert_allclose(x, 832400 + np.array([0, 0, 3200, 3200, 0]), atol=0.01)
    np.testing.assert_allclose(y, 1e5 - np.array([0, 3200, 3200, 0, 0]), atol=0.01)


def test_names_of_scenes_with_slashes(tmp_path):
    parts = [table([(0, 0), (0, 32)], scene) for scene in ("a/b", "../c", "a_b")]
    grids = grids_of(pd.concat(parts, ignore_index=True), SIZE, "--embed")
    write_maps(tmp_path / "m.tif", grids, np.arange(6.0)[:, None], ["x"])
    found = {}
    for path in tmp_path.iterdir():
        with rasterio.open(path) as file:
            found[path.name] = file.read(1).ravel().tolist()
    assert found == {"m_.._c.tif": [2, 3], "m_a_b.tif": [0, 1], "m_a_b-2.tif": [4, 5]}


def test_scenes_of_one_image_each_are_refused():
    parts = [table([(0, 0)], scene) for scene in "ab"]
    with pytest.raises(UsageError, match="--embed: each of the 2 images .* column group"):
        grids_of(pd.concat(parts, ignore_index=True), SIZE, "--embed")


def test_a_map_that_does_not_fit_on_the_disk_is_not_written(tmp_path):
    grids = grids_of(table([(0, 0), (0, 32)]), SIZE, "--embed")
    write_maps(tmp_path / "m.tif", grids, np.zeros((2, 1)), ["x"])
    before, (soft, hard) = (tmp_path / "m.tif").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OSError) as found:
            write_maps(tmp_path / "m.tif", grids, np.ones((2, 1)), ["x"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.filename == str(tmp_path / "m.tif")
    assert (tmp_path / "m.tif").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_has_no_grid_is_refused():
    for georeference, said in (
        (None, "have no coordinates"),
        (table([(0, 0), (33, 0), (0, 31)]), "do not lie on a regular grid"),
        (pd.concat([table([(0, 0)]), table([(0, 32)], crs="EPSG:4326")], ignore_index=True), "coordinate system"),
        (pd.concat([table([(0, 0)]), table([(0, 32)], pixel=20.0)], ignore_index=True), "pixel size"),
    ):
        with pytest.raises(UsageError, match=f"--embed: .*{said}"):
            grids_of(georeference, SIZE, "--embed")


def test_principal_components():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    features = 5 + rng.normal(size=(50, 3)) * [9, 3, 1] @ directions
    found, shares = principal_components(features)
    assert found.shape == (50, 3) and shares.sum() == pytest.approx(1) and shares[0] > 0.8
    centred = features - features.mean(0)
    np.testing.assert_allclose(found @ found.T, centred @ centred.T, atol=1e-3)
    np.testing.assert_allclose(principal_components(features[:, ::-1])[0], found, atol=1e-4)
    assert (principal_components(features[:, :2])[0][:, 2] == 0).all()


def test_outlines_are_where_the_images_lie():
    georeference = pd.concat([table([(0, 0)]), table([(0, 0)], "b", "")], ignore_index=True)
    corners = outlines(georeference, SIZE)
    longitude, latitude = transform("EPSG:32633", "EPSG:4326", [300000, 300320], [5400000, 5399680])
    np.testing.assert_allclose(corners[0, [0, 2]], np.stack([longitude, latitude], 1), atol=1e-9)
    assert np.isnan(corners[1]).all()
    frame = with_outlines(pd.DataFrame({"id": ["x", "y"]}), georeference, SIZE)
    assert frame.geometry[0].bounds == pytest.approx((longitude[0], latitude[1], longitude[1], latitude[0]), abs=2e-4)
    assert frame.geometry[1] is None and frame.crs.to_epsg() == 4326 and frame.scene.tolist() == ["a", "b"]
