# SPDX-License-Identifier: MIT
"""The Python examples of docs/USING_A_MODEL.md that are marked so: each is run as it stands, on tiny models with random weights.

Those for packages that are not installed with this project are skipped without them.
"""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import RetinaNet

import main_finetune
import models_mixmim
import models_mixmim_seg
from pretrained import load
from sarwmix.raster import Image, Reading, find_images
from sarwmix.simulate.scenes import Parameters, simulate_scenes
from tests.test_docs import blocks

PAGE = "docs/USING_A_MODEL.md"
EXAMPLES = [block.text for block in blocks(PAGE, "python") if block.mark]
WORDS = ("level.shape", "FeaturesOnly", "RetinaNet", "terratorch", "torchgeo", "export.load")  # one in each example
LAST = "layers.3.blocks.0.mlp.fc2.weight"  # of the encoder
CHANNELS, STRIDES = [32, 64, 128, 256], [4, 8, 16, 32]  # of mixmim_tiny


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """An encoder where the page has its run, in the current folder; the weights, by name."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return write_checkpoint("output/maps/encoder", models_mixmim.SIZES["mixmim_tiny"]())


def write_checkpoint(folder, model, **stated):
    """Writes a checkpoint as trainings on masks do. Returns the state dict."""
    stated = {"channels": ["VH", "VV"], "units": "dB", "input_size": 128, "mean": [-18, -11], "std": [4, 4.5], **stated}
    args = {"dataset": "masks", "model": "mixmim_tiny"}
    if "classes" in stated:
        args |= {"task": "segmentation", "nb_classes": len(stated["classes"])}
    weights = model.state_dict()
    Path(folder).mkdir(parents=True)
    torch.save({"model": weights, "epoch": 0, "args": args, "input": stated}, Path(folder, "checkpoint.pth"))
    return weights


def run(word):
    """The names that the example with this word leaves."""
    (code,) = [text for text in EXAMPLES if word in text]
    for package in re.findall(r"^from (terratorch|torchgeo)", code, re.MULTILINE):
        pytest.importorskip(package)
    names = {"__name__": "example"}
    exec(compile(code, f"{PAGE}: {word}", "exec"), names)
    return names


def test_every_example_is_run():
    assert [sum(word in text for text in EXAMPLES) for word in WORDS] == [1] * len(EXAMPLES)


def has_weights(encoder, weights):
    return torch.equal(encoder.state_dict()[LAST], weights[LAST])


def test_feature_maps(encoder):
    names = run("level.shape")
    assert has_weights(names["encoder"], encoder) and [level.shape[1] for level in names["maps"]] == CHANNELS
    x = names["prepare"](torch.tensor([-18.0, -6.5]).view(1, 2, 1, 1).expand(1, 2, 64, 96))[0]
    assert x.shape == (1, 2, 64, 96) and torch.equal(x[0, :, 0, 0], torch.tensor([0.0, 1.0]))  # VH first, as it is


def test_encoders_of_any_dataset_give_feature_maps(encoder):
    path = Path("output/maps/encoder/checkpoint.pth")
    state = torch.load(path)
    torch.save(state | {"args": state["args"] | {"dataset": "benv2"}}, path)
    assert [level.shape[1] for level in run("level.shape")["maps"]] == CHANNELS


def test_timm(encoder):
    backbone = run("FeaturesOnly")["backbone"]
    assert has_weights(backbone.encoder, encoder)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == (CHANNELS, STRIDES)
    found = [tuple(level.shape) for level in backbone(torch.zeros(1, 2, 64, 64))]
    assert found == [(1, c, 64 // s, 64 // s) for c, s in zip(CHANNELS, STRIDES)]


def test_torchvision(encoder):
    names = run("RetinaNet")
    assert isinstance(names["detector"], RetinaNet) and has_weights(names["encoder"], encoder)
    assert all(loss.isfinite() for loss in names["losses"].values())
    assert all(weight.grad is not None for weight in names["encoder"].parameters() if weight.requires_grad)
    assert set(names["detector"].eval()(names["images"])[0]) == {"boxes", "scores", "labels"}


def test_terratorch(encoder):
    names = run("terratorch")
    names["logits"].sum().backward()
    (backbone,) = [part for part in names["model"].modules() if isinstance(part, names["sarwmix"])]
    assert has_weights(backbone.encoder, encoder) and backbone.encoder.patch_embed.proj.weight.grad is not None


def test_torchgeo_samples_what_is_read_here(encoder):
    """The features are those of the tiles as this project reads them."""
    simulate_scenes("output/linear", Parameters(side=256))
    names = run("torchgeo")
    ((name, files),) = find_images(["output/linear/scenes"])
    with Image.find(name, files, Reading("linear")).opened() as read:
        scene = torch.as_tensor(read(0, 0, 256, 256))
    tiles = [scene[:, row : row + 128, column : column + 128] for row in (0, 128) for column in (0, 128)]
    model, prepare = load("output/maps/encoder")
    with torch.no_grad():
        expected = model.forward_features(prepare(torch.stack(tiles))[0])
    distance = torch.cdist(names["features"], expected)  # its order of tiles is another
    assert names["features"].shape == expected.shape and distance.min(0).values.max() < 1e-3
    assert sorted(distance.argmin(0).tolist()) == [0, 1, 2, 3]


def test_an_exported_model(encoder, program):
    model = models_mixmim_seg.SIZES["mixmim_tiny"](num_classes=3)
    write_checkpoint("output/maps/model", model, classes=["water", "forest", "town"])
    flags = "--export output/maps/exported --finetune output/maps/model"
    assert program(main_finetune, flags)[0] == 0
    names = run("export.load")
    model, prepare = load("output/maps/model")
    with torch.no_grad():
        expected = model(prepare(names["sar_db"])[0]).softmax(1)
    assert expected.shape == (4, 3, 128, 128)
    torch.testing.assert_close(names["probabilities"], expected, atol=1e-5, rtol=0)
