# SPDX-License-Identifier: MIT
"""The picture of a scene, its features, its water and a reconstruction: what is drawn where, and what is refused."""

import numpy as np
import pytest
import rasterio
import torch

from analysis import summary_figure
from analysis.figures import COVERED
from analysis.overview_figure import load_model
from analysis.summary_figure import BLUE, build_parser, cut, features_picture, joined, reconstruction, summarise
from models_mixmim import mixmim_tiny
from sarwmix.raster import Image, Reading
from tests.helpers.dataset_fixtures import write_tif
from tests.helpers.runs import argv, refusal
from util.quicklook import false_colour
from util.scene_pictures import CLASS_TAG, Map

SIDE = 320  # of the scene


def grid(size):
    return {"crs": "EPSG:32633", "transform": rasterio.Affine(size, 0, 300000, 0, -size, 5400000)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{flag: file} of a scene whose left half is water, and the checkpoint of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("summary")
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (2, SIDE, SIDE)).astype(np.float32) + np.array([-8, -15], np.float32)[:, None, None]
    values[:, :, : SIDE // 2] -= 10
    found = {"scene": write_tif(folder / "scene.tif", values, ("VV", "VH"), **grid(10))}
    names = [f"principal component {k}" for k in (1, 2, 3)]
    found["--features"] = write_tif(folder / "f.tif", rng.random((3, 5, 5)).astype(np.float32), names, **grid(640))
    classes = np.ones((SIDE, SIDE), np.uint8)
    classes[:, : SIDE // 2] = 2
    found["--map"] = write_tif(folder / "m.tif", classes, nodata=255, **grid(10))
    with rasterio.open(found["--map"], "r+") as file:
        names = ("no water", "town", "water")
        file.update_tags(1, **{CLASS_TAG.format(k): name for k, name in enumerate(names)})
    torch.manual_seed(0)
    found["--checkpoint"] = folder / "c.pth"
    torch.save({"model": mixmim_tiny().state_dict(), "args": {"model": "mixmim_tiny"}}, found["--checkpoint"])
    return found


def flags_of(files, *more, **other):
    named = [word for flag, path in {**files, **other}.items() if flag != "scene" for word in (flag, path)]
    return argv(files["scene"], "--units dB", named, *more)


def test_the_panels(files):
    args = build_parser().parse_args(flags_of(files, "--windows 2 --place 10 30 --output x.png"))
    figure = summarise(args, Image.find("scene", [files["scene"]], Reading()))
    titles = ["Scene (VV, VH)", "Features", "Water", "Visible to the model", "Predicted"]
    assert [axis.get_title() for axis in figure.axes] == titles
    scene, features, water, visible, predicted = (axis.images[0].get_array() for axis in figure.axes)
    assert scene.shape == (SIDE, SIDE, 3) and scene[:, :150].mean() < scene[:, 170:].mean()
    assert (water[:, :160] == BLUE).all() and (np.ptp(water[:, 160:], axis=-1) < 1e-6).all()
    assert features.shape[0] >= 5 and visible.shape == predicted.shape == (256, 256, 3)
    assert 0.2 < (visible == COVERED).all(-1).mean() < 0.8
    box = figure.axes[0].patches[-1]
    assert box.get_xy() == (30, 10) and box.get_width() == box.get_height() == 256
    assert all(axis.get_xlim() == (0, SIDE) and axis.get_ylim() == (SIDE, 0) for axis in figure.axes[:3])


def test_windows_are_joined_as_they_were_cut(files):
    crop = np.random.default_rng(0).normal(-12, 2, (2, 256, 384)).astype(np.float32)
    windows = cut(crop, 128)
    assert windows.shape == (6, 2, 128, 128) and (windows[1] == crop[:, :128, 128:256]).all()
    assert (joined(windows, 3) == crop).all()
    visible, _ = reconstruction(*load_model(str(files["--checkpoint"])), crop, 0)
    shown = (visible != COVERED).any(-1)
    np.testing.assert_allclose(visible[shown], false_colour(crop)[shown], atol=1e-4)
    cells = shown.reshape(8, 32, 12, 32).transpose(0, 2, 1, 3).reshape(8, 12, -1)
    assert (cells == cells[..., :1]).all() and not (shown[:128, :128] == shown[:128, 128:256]).all()


def test_features_are_continued_to_the_edges_of_the_scene(files):
    image = Image.find("scene", [files["scene"]], Reading())
    transform = (320.0, 0.0, 300160.0, 0.0, -320.0, 5399840.0)  # tiles of 32 pixels, from pixel 16 on
    found = Map(np.random.default_rng(0).random((3, 9, 9)), np.zeros((9, 9)), [], transform, None)
    colours, extent = features_picture(image, found)
    assert colours.shape == (11, 11, 3) and extent == pytest.approx((-16, 336, 336, -16))
    assert (colours[0] == colours[1]).all() and (colours[:, -1] == colours[:, -2]).all()


def test_the_figure_is_written_and_wrong_files_are_one_line(files, tmp_path, capsys):
    output = ("--windows 2 --output", tmp_path / "s.png")
    summary_figure.main(flags_of(files, *output))
    assert (tmp_path / "s.png").stat().st_size > 10_000 and (tmp_path / "s.svg").exists()
    land = write_tif(tmp_path / "land.tif", np.zeros((8, 8), np.uint8), **grid(400))
    for other, words in (
        ({"--map": land}, "none of its classes is water (class 0)"),
        ({"--features": files["--map"]}, "has no principal component"),
        ({"--map": tmp_path / "no.tif"}, "no.tif"),
        ({"--checkpoint": tmp_path / "no.pth"}, "no.pth"),
    ):
        assert words in refusal(summary_figure.main, flags_of(files, *output, **other), capsys)
    assert "--place 100 0: a crop of 256×256 pixels there is not within" in refusal(
        summary_figure.main, flags_of(files, "--place 100 0", *output), capsys
    )
    elsewhere = {"crs": "EPSG:32634", "transform": grid(10)["transform"]}
    other = write_tif(tmp_path / "other.tif", np.zeros((8, 8), np.uint8), **elsewhere)
    line = refusal(summary_figure.main, flags_of(files, *output, **{"--map": other}), capsys)
    assert "another coordinate system" in line
