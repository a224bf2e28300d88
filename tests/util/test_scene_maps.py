# SPDX-License-Identifier: MIT
"""Maps of scenes: values, grid, no data, overviews, colours, pictures; and nothing half-written, on a full disk too."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from matplotlib.image import imread

from common.errors import Interrupted, TrainingError, UsageError
from sarwmix.raster import Image, Reading
from tests.helpers.dataset_fixtures import one_line, write_tif
from util import scene_maps
from util.scene_maps import NO_DATA, map_scene
from util.scene_pictures import CLASS_TAG, class_colours
from util.sliding import Windows

GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5400000)}
NAMES = ["water", "forest", "town"]
WINDOWS = Windows(64, 0.25, batch=4)


def predict(images):
    """Three classes by VV alone."""
    vv = torch.nan_to_num(images[:, 1], nan=0.0)
    return torch.softmax(torch.stack([-(vv + 16), vv * 0, vv + 8], 1), 1)


def backscatter(height=150, width=610):
    """VV, VH in dB: noise that every class of `predict` is in, with no data in VV and in VH."""
    values = np.random.default_rng(0).uniform(-20, -4, (2, height, width)).astype(np.float32)
    values[0, :70, :70] = values[1, -9:, -3:] = np.nan
    return values


def write_scene(tmp_path, values=None, **grid):
    values = backscatter() if values is None else values
    path = write_tif(tmp_path / "scene.tif", values, ("VV", "VH"), **(grid or GRID))
    return Image.find("scene", [path], Reading()), values


def expected_of(values):
    """(probabilities, classes) of the pixels, without data NaN and NO_DATA."""
    found = predict(torch.from_numpy(values[::-1].copy())[None])[0].numpy()
    known = np.isfinite(values).all(0)
    return np.where(known, found, np.nan), np.where(known, found.argmax(0), NO_DATA)


def test_classes_lie_on_the_grid_of_the_scene(tmp_path, caplog):
    image, values = write_scene(tmp_path)
    with caplog.at_level("INFO", "util.scene_maps"):
        summary = map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    _, classes = expected_of(values)
    with rasterio.open(tmp_path / "m.tif") as file:
        np.testing.assert_array_equal(file.read(1), classes)
        assert file.crs.to_epsg() == 32633 and file.transform == GRID["transform"] and file.nodata == NO_DATA
        assert file.descriptions == ("class: 0 water, 1 forest, 2 town",)
        assert [file.tags(1)[CLASS_TAG.format(k)] for k in range(3)] == NAMES
        assert [file.colormap(1)[k][:3] for k in range(3)] == [tuple(c) for c in class_colours(NAMES).tolist()]
        assert file.block_shapes == [(512, 512)] and file.compression.value == "DEFLATE" and file.overviews(1) == [2]
    counts = np.bincount(classes.ravel(), minlength=256)
    assert summary.pixels == dict(zip(NAMES, counts)) and summary.no_data == counts[NO_DATA] == 70 * 70 + 27
    assert "m.tif: 150x610 pixels" in caplog.text and f"water {counts[0] / counts[:3].sum():.1%}" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"scene.tif", "m.tif", "m.png"}
    assert imread(tmp_path / "m.png").std() > 0.1


def test_probabilities_are_bands(tmp_path):
    image, values = write_scene(tmp_path, backscatter(600, 530))
    summary = map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS, "probabilities")
    probabilities, classes = expected_of(values)
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.descriptions == tuple(NAMES) and np.isnan(file.nodata) and file.overviews(3) == [2]
        np.testing.assert_allclose(file.read(), probabilities, atol=1e-6)
        np.testing.assert_allclose(
            file.read(3, out_shape=(300, 265))[100, 100], probabilities[2, 200:202, 200:202].mean(), atol=1e-5
        )
    assert summary.pixels["town"] == (classes == 2).sum() and (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    "grid",
    (
        {"crs": "EPSG:32633", "transform": rasterio.Affine(8, 6, 300000, 6, -8, 5400000)},  # rotated
        {"transform": rasterio.Affine(10, 0, 5, 0, -10, 7)},  # no coordinate system
        {"nodata": -9999.0},  # nothing at all
    ),
)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_other_georeferences_are_kept(tmp_path, grid, caplog):
    values = np.where(np.isnan(backscatter()), -9999, backscatter()) if "nodata" in grid else None
    image, values = write_scene(tmp_path, values, **grid)
    map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    with rasterio.open(tmp_path / "scene.tif") as scene, rasterio.open(tmp_path / "m.tif") as file:
        assert file.crs == scene.crs and file.transform == scene.transform
        np.testing.assert_array_equal(file.read(1), expected_of(np.where(values == -9999, np.nan, values))[1])
    assert (tmp_path / "m.png").exists()
    assert ("has no coordinate system" in caplog.text) == ("crs" not in grid)


def test_a_scene_in_two_files_that_is_smaller_than_a_window(tmp_path):
    values = backscatter(30, 20)
    values[:] = -12 - np.arange(20) / 3
    for band, name in zip(values, ("VV", "VH")):
        write_tif(tmp_path / f"s_{name}.tif", band, **GRID)
    image = Image.find("s", [tmp_path / "s_VV.tif", tmp_path / "s_VH.tif"], Reading())
    map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    with rasterio.open(tmp_path / "m.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected_of(values)[1])
        assert file.overviews(1) == []


def test_a_scene_without_data_has_an_empty_map(tmp_path):
    image, _ = write_scene(tmp_path, np.full((2, 80, 70), np.nan, np.float32))
    assert map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS).no_data == 80 * 70


def test_names_of_classes_are_no_formulas(tmp_path):
    image, _ = write_scene(tmp_path, **GRID)
    map_scene(image, predict, tmp_path / "m.tif", ["$\\frac$", "_b", "$"], WINDOWS)
    assert (tmp_path / "m.png").exists()


# ---- What does not come about --------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", (KeyboardInterrupt, SystemExit, Interrupted, RuntimeError))
def test_a_map_that_is_interrupted_leaves_what_was_there(tmp_path, error):
    image, _ = write_scene(tmp_path)
    (tmp_path / "m.tif").write_bytes(b"before")
    before, calls = files(tmp_path), []

    def fails(images):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return predict(images)

    with pytest.raises(error):
        map_scene(image, fails, tmp_path / "m.tif", NAMES, WINDOWS)
    assert len(calls) == 5 and files(tmp_path) == before


@pytest.mark.parametrize("room", (100, 100_000, 1_000_000, 2_900_000))
def test_a_full_disk_is_noticed(tmp_path, room):
    """The file may have this many bytes, of about 3 MB: the first blocks fail, later ones, or the overviews."""
    image, _ = write_scene(tmp_path, backscatter(600, 520))
    before, (soft, hard) = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(UsageError) as found:
            map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS, "probabilities")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(found, str(tmp_path / "m.tif"), "disk full?")
    assert files(tmp_path) == before


@pytest.mark.parametrize("values", scene_maps.VALUES)
def test_blocks_that_are_lost_in_silence_are_noticed(tmp_path, monkeypatch, values):
    image, _ = write_scene(tmp_path)
    before, flush = files(tmp_path), scene_maps._Target._flush

    def loses(self):
        rows = self.rows.copy()
        self.rows[0, : self.filled // 2] = 0
        flush(self)
        self.checksums[-1] = scene_maps._checksum(rows[:, : image.height])

    monkeypatch.setattr(scene_maps._Target, "_flush", loses)
    with pytest.raises(UsageError) as found:
        map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS, values)
    one_line(found, str(tmp_path / "m.tif"), "does not hold what was written", "disk full?")
    assert files(tmp_path) == before


def test_a_picture_that_does_not_fit_leaves_the_map(tmp_path, monkeypatch):
    image, _ = write_scene(tmp_path)
    monkeypatch.setattr(
        scene_maps, "draw_map", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UsageError) as found:
        map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    one_line(found, "m.png: could not be written (No space left", f"the map {tmp_path / 'm.tif'} is complete")
    assert set(files(tmp_path)) == {"scene.tif", "m.tif"}


def test_what_cannot_be_mapped_is_one_line(tmp_path):
    image, _ = write_scene(tmp_path)
    many = [f"c{k}" for k in range(256)]
    for path, classes, values, said in (
        ("m.png", NAMES, "classes", "ends in .tif"),
        ("none/m.tif", NAMES, "classes", "there is no folder"),
        ("m.tif", many, "classes", "1 to 255 classes, and the model has 256"),
        ("m.tif", NAMES, "logits", "choose from classes, probabilities"),
        ("m.tif", NAMES[:2], "classes", "the model has 3 classes, and 2 are named"),
    ):
        with pytest.raises(UsageError) as found:
            map_scene(image, predict, tmp_path / path, classes, WINDOWS, values)
        one_line(found, path, said)
    with pytest.raises(TrainingError, match="scene: .* not finite"):
        map_scene(image, lambda images: predict(images) * torch.nan, tmp_path / "m.tif", NAMES, WINDOWS)
    gone = replace(image, bands=tuple(replace(band, path=str(tmp_path / "gone.tif")) for band in image.bands))
    with pytest.raises(ValueError, match="gone.tif: does not exist"):
        map_scene(gone, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    assert set(files(tmp_path)) == {"scene.tif"}


def test_progress_is_logged(tmp_path, monkeypatch, caplog):
    image, _ = write_scene(tmp_path)
    monkeypatch.setattr(scene_maps, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO", "util.scene_maps"):
        map_scene(image, predict, tmp_path / "m.tif", NAMES, WINDOWS)
    assert "scene: row 48 of 150, ETA 0:00:0" in caplog.text
