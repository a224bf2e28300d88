# SPDX-License-Identifier: MIT
"""Pictures of errors: which pixels are drawn as what, and the names beside them."""

import numpy as np
import pytest
import torch

import models_mixmim_seg
from analysis import segmentation_pictures
from analysis.figures import ORANGE, PURPLE
from analysis.segmentation_pictures import WRONG, error_kinds, error_picture, rgb, short
from sarwmix.listing import IGNORED
from sarwmix.simulate.scenes import KINDS, Parameters, simulate_scenes
from tests.helpers.runs import argv, refusal

IMAGE = np.full((2, 2, 2), -10, np.float32)


@pytest.mark.parametrize(
    "names, colours",
    [(("no water", "water"), (PURPLE, ORANGE)), (("water", "forest", "town"), (WRONG, WRONG))],
)
def test_colours_of_errors(names, colours):
    mask, classes = np.array([[0, 1], [1, IGNORED]]), np.array([[1, 0], [1, 1]])
    picture = error_picture(IMAGE, mask, classes, names)
    assert [picture[0, k].tolist() for k in (0, 1)] == [pytest.approx(rgb(colour)) for colour in colours]
    assert np.ptp(picture[1, 0]) == 0 and 0.5 < picture[1, 0, 0] < 1  # right: the image, in grey
    assert picture[1, 1].tolist() == [1, 1, 1]  # does not count
    assert set(error_kinds(names).values()) == set(colours)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("Ghana_103272", "Ghana_103272"),
        ("S1A_IW_GRDH_1SDV_20000101T013000_00512_00384", "20000101T013000_00512_00384"),
        ("north/lakes/2019_0501_tile_000123", "lakes/2019_0501_tile_000123"),
        ("x" * 50, "x" * 30),
    ],
)
def test_names_are_cut_between_their_parts(name, shown):
    assert short(name) == shown


def test_a_picture_is_drawn(tmp_path, capsys):
    simulate_scenes(tmp_path / "data", Parameters(side=128, chip_size=64, masks=True, units="dB"))
    stated = {"channels": ["VH", "VV"], "units": "dB", "input_size": 128, "mean": [-18, -11], "std": [4, 4.5]}
    args = {"dataset": "masks", "model": "mixmim_tiny", "task": "segmentation", "nb_classes": len(KINDS)}
    weights = models_mixmim_seg.SIZES["mixmim_tiny"](num_classes=len(KINDS)).state_dict()
    state = {"model": weights, "epoch": 0, "args": args, "input": {**stated, "classes": list(KINDS)}}
    torch.save(state, tmp_path / "checkpoint.pth")
    flags = ("--finetune", tmp_path / "checkpoint.pth", "--data_path", tmp_path / "data/masks", "--split all --count 3")
    segmentation_pictures.main(argv(flags, "--picture", tmp_path / "errors.png"))
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    lost, *_ = (tmp_path / "data/masks/masks").iterdir()
    lost.unlink()
    segmentation_pictures.main(argv(flags, "--skip_missing --picture", tmp_path / "others.png"))
    assert (tmp_path / "others.png").exists()
    line = refusal(segmentation_pictures.main, (flags, "--picture", tmp_path / "no" / "p.png"), capsys)
    assert "--picture" in line and "folder that can be written" in line
