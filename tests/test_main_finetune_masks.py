# SPDX-License-Identifier: MIT
"""Segmentation through the main program: training, two ranks, resuming, the map of a scene, and wrong flags."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch

import finetune_flags
import main_finetune
from analysis import segmentation_pictures
from analysis.runs import read_results
from pretrained import load
from sarwmix.masks import Masks
from sarwmix.simulate import scenes
from tests.helpers.dataset_fixtures import needs_samples, sample_path
from tests.helpers.forked import Run, finish, finish_ranks, signalled_at_step, signalled_in
from tests.helpers.resumed import differences
from tests.helpers.runs import argv, refusal
from util.checkpoint import load_checkpoint
from util.sliding import Windows, blended

pytestmark = pytest.mark.slow

STATISTICS = "--mean -17.5 -11 --std 5 5"
SMALL = "--dataset masks --num_workers 0 --device cpu --batch_size 4"
TRAIN = (SMALL, STATISTICS, "--model mixmim_tiny --input_size 32 --drop_path 0 --lr 2e-3 --warmup_epochs 0 --crops 2")
SPLITS = "--val_fraction 0.25 --test_fraction 0.25"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Four simulated scenes, their chips with masks of water and land, and a model trained on them."""
    root = tmp_path_factory.mktemp("masks")
    scenes.main(argv("--out", root / "data", "--scenes 4 --side 128 --chip_size 48 --masks --units dB --workers 1"))
    masks = root / "data" / "masks"
    rows = pd.read_csv(masks / "classes.csv")
    names = np.where(rows["name"] == "water", "water", np.where(rows["name"] == "ignore", "ignore", "land"))
    for path in (masks / "masks").glob("*.tif"):  # two classes: land is 1, water 0
        with rasterio.open(path, "r+") as file:
            values = file.read(1)
            water = values == rows["value"][rows["name"] == "water"].item()
            file.write(np.where(values == 255, 255, np.where(water, 0, 1)).astype(np.uint8), 1)
    assert {"water", "land"} <= set(names)
    (masks / "classes.csv").write_text("value,name\n0,water\n1,land\n255,ignore\n")
    train(root, root / "model", "--epochs 3 --dice 0.5")
    return root


def train(root, out, flags, **how):
    return finish(
        "main_finetune",
        argv(TRAIN, SPLITS, "--finetune '' --data_path", root / "data" / "masks", flags, "--output_dir", out),
        out.with_suffix(".txt"),
        **how,
    )


def found_in(folder, split="test"):
    return json.loads((folder / f"eval_{split}.json").read_text())


def test_a_run_reports_the_figures_of_segmentation(own):
    found = found_in(own / "model")
    confusion = np.array(found["confusion_matrix"])
    assert found["pixels"] == confusion.sum() and found["samples"] == 4 and set(found["per_class"]) >= {"iou", "f1"}
    assert found["pixels"] + found["ignored_pixels"] == 4 * 48**2
    assert found["accuracy"] == np.trace(confusion) / confusion.sum()
    lines = [json.loads(line) for line in (own / "model" / "log.txt").read_text().splitlines()]
    best = max(lines, key=lambda line: line["test_iou_macro"])
    assert best["epoch"] == found["epoch"] and len(lines) == 3
    (result,), _ = read_results([own / "model"])
    assert result.metrics["iou_macro"] == found["iou_macro"] and result.start == "random"
    (result,), _ = read_results([own / "model.txt"])
    assert result.metrics["iou_macro"] == pytest.approx(found["iou_macro"], abs=1e-4)


def test_two_ranks_evaluate_as_one(own, tmp_path):
    flags = (SMALL, "--eval --split all --data_path", own / "data" / "masks", "--finetune", own / "model")
    flags = argv(flags, "--batch_size 3 --predictions", tmp_path / "p.csv")
    finish("main_finetune", [*flags, "--output_dir", str(tmp_path / "one")], tmp_path / "one.txt")
    one, table = found_in(tmp_path / "one", "all"), (tmp_path / "p.csv").read_bytes()
    finish_ranks("main_finetune", [*flags, "--output_dir", str(tmp_path / "two")], tmp_path / "two.txt")
    assert one == found_in(tmp_path / "two", "all") and one["samples"] == 16
    assert table == (tmp_path / "p.csv").read_bytes()
    frame = pd.read_csv(tmp_path / "p.csv")
    confusion = np.array(one["confusion_matrix"])
    assert (
        frame["pixels: water"].sum() == confusion[0].sum() and frame["predicted: land"].sum() == confusion[:, 1].sum()
    )
    assert frame["iou: water"].between(0, 1).any()


def test_two_ranks_train_as_one_that_accumulates(own, tmp_path):
    flags = argv(TRAIN, SPLITS, "--finetune '' --epochs 1 --test_split none --data_path", own / "data" / "masks")
    flags += argv("--batch_size 2")
    finish_ranks("main_finetune", [*flags, "--output_dir", str(tmp_path / "two")], tmp_path / "two.txt")
    finish("main_finetune", [*flags, "--accum_iter", "2", "--output_dir", str(tmp_path / "one")], tmp_path / "one.txt")
    one, two = (json.loads((tmp_path / name / "log.txt").read_text()) for name in ("one", "two"))
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
    assert one["test_iou_macro"] == pytest.approx(two["test_iou_macro"], abs=2e-3)


def test_a_killed_run_goes_on_to_the_same_bits(own, tmp_path):
    flags = argv(TRAIN, SPLITS, "--finetune '' --epochs 2 --test_split none --data_path", own / "data" / "masks")
    whole = [*flags, "--output_dir", str(tmp_path / "whole")]
    finish("main_finetune", whole, tmp_path / "whole.txt")
    part = [*flags, "--resume", "auto", "--output_dir", str(tmp_path / "part")]
    first = Run("main_finetune", part, tmp_path / "part.txt", hurt=(signalled_at_step, 6, signal.SIGTERM))
    assert first.wait() != 0
    finish("main_finetune", part, tmp_path / "part.txt")
    assert not differences(tmp_path / "whole", tmp_path / "part")
    other = Run("main_finetune", [*part, "--crops", "3"], tmp_path / "other.txt")
    assert other.wait() == 2 and "crops" in other.text()


def test_a_scene_is_mapped_as_its_windows_are_predicted(own, tmp_path):
    scene = next((own / "data" / "scenes").glob("*.tif"))
    for values in ("classes", "probabilities"):
        flags = ("--predict", scene, "--output_map", tmp_path / f"{values}.tif", "--map_values", values, "--device cpu")
        flags = argv("--finetune", own / "model", flags, "--output_dir", tmp_path / "x")
        finish("main_finetune", flags, tmp_path / "log.txt")
    model, prepare = load(own / "model" / "checkpoint_best.pth")
    with rasterio.open(scene) as file:
        image, grid = torch.from_numpy(file.read()[::-1].copy()), (file.transform, file.crs, file.shape)
    with torch.no_grad():
        expected = blended(image, lambda x: model(prepare(x)[0]).softmax(1), Windows(32)).numpy()
    with rasterio.open(tmp_path / "probabilities.tif") as file:
        assert (file.transform, file.crs, file.shape) == grid and file.descriptions == ("water", "land")
        np.testing.assert_allclose(file.read(), expected, atol=1e-4)
    with rasterio.open(tmp_path / "classes.tif") as file:
        sure = np.abs(expected[0] - expected[1]) > 1e-3
        assert np.array_equal(file.read(1)[sure], expected.argmax(0)[sure]) and file.nodata == 255
    assert (tmp_path / "classes.png").stat().st_size > 1000


def test_scenes_of_a_folder_are_mapped_each(own, tmp_path):
    flags = argv("--finetune", own / "model", "--predict", own / "data" / "scenes", "--device cpu --overlap 0")
    flags += argv("--output_map", tmp_path / "map.tif", "--output_dir", tmp_path / "x")
    finish_ranks("main_finetune", flags, tmp_path / "log.txt")
    assert len(list(tmp_path.glob("map_*.tif"))) == 4


def test_a_map_that_is_ended_leaves_nothing(own, tmp_path):
    flags = argv("--finetune", own / "model", "--predict", own / "data" / "scenes", "--device cpu")
    flags += argv("--output_map", tmp_path / "map.tif", "--output_dir", tmp_path / "x")
    hurt = (signalled_in, "util.scene_maps:_Target.add", signal.SIGTERM, 2)
    assert Run("main_finetune", flags, tmp_path / "log.txt", hurt=hurt).wait() == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_results_replace_no_file_of_the_data(own, tmp_path):
    legend = own / "data" / "masks" / "classes.csv"
    before = legend.read_bytes()
    flags = ("--eval --finetune", own / "model", "--data_path", own / "data" / "masks", "--predictions", legend)
    assert "is a file of the data" in failed(flags, tmp_path) and legend.read_bytes() == before


def test_errors_are_drawn(own, tmp_path):
    flags = argv(SMALL, "--data_path", own / "data" / "masks", "--finetune", own / "model", "--count 2 --split test")
    segmentation_pictures.main([*flags, "--output_dir", str(tmp_path / "x"), "--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_an_exported_program_gives_logits_of_pixels(own, tmp_path):
    flags = argv("--finetune", own / "model", "--export", tmp_path / "model", "--output_dir", tmp_path / "x")
    finish("main_finetune", flags, tmp_path / "log.txt")
    program = torch.export.load(tmp_path / "model" / "model.pt2").module()
    model, prepare = load(tmp_path / "model")
    images = torch.randn(3, 2, 32, 32) * 5 - 15
    images[0, 0, 3, 4] = torch.nan
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(prepare(images)[0]), atol=1e-4, rtol=1e-4)


def test_an_encoder_is_taken_over_frozen_or_not(own, tmp_path):
    """From a classifier's checkpoint, as from any: all of the encoder, and none of the head."""
    train(own, tmp_path / "frozen", "--epochs 1 --freeze_encoder --test_split none --finetune " + str(own / "model"))
    before, after = (
        load_checkpoint(folder / name)["model"]
        for folder, name in ((own / "model", "checkpoint_best.pth"), (tmp_path / "frozen", "checkpoint.pth"))
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if not name.startswith("head.")}


def test_a_class_that_is_not_trained_on_is_named(own, caplog):
    data = Masks(own / "data" / "masks", "all", supervised=True, classes=("water", "ice", "land"))
    main_finetune.warn_of_absent_classes(data)
    assert [record.getMessage() for record in caplog.records] == ["no training sample of 1 classes: ice"]


# ---- What cannot be meant ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset masks --finetune '' --data_path . --mixup 0.5 --batch_size 4", "not available for segmentation"),
        ("--dataset benv2 --finetune '' --data_path . --dice 1", "--dice: --dataset benv2 has no masks"),
        ("--dataset masks --finetune '' --data_path . --crop_scale 0.5 0.1", "smaller one first"),
        ("--dataset masks --finetune '' --data_path . --overlap 0.9", "--overlap"),
        ("--finetune . --output_map m.tif", "--output_map: needs --predict SCENE"),
        ("--finetune . --predict s.tif --output_map m.png", "must end in .tif"),
        ("--finetune . --predict s.tif --output_map no/m.tif", "there is no such folder"),
        ("--finetune . --predict . --output_map ./m.tif", "lies in the folder of the scenes"),
    ],
)
def test_flags_that_contradict(flags, message, capsys):
    assert message in refusal(finetune_flags.parse_flags, flags, capsys)


def failed(flags, tmp_path):
    run = Run("main_finetune", argv(flags, "--device cpu --output_dir", tmp_path / "x"), tmp_path / "out.txt")
    assert run.wait() == 2
    *_, line = run.lines()
    return line


def test_uses_that_do_not_fit(own, tmp_path):
    scene = next((own / "data" / "scenes").glob("*.tif"))
    line = failed(("--finetune", own / "model", "--predict", tmp_path / "p.csv", "--data_path", own), tmp_path)
    assert "is a segmentation model; --predict names the scene" in line
    line = failed(("--finetune", own / "model", "--embed", tmp_path / "f.npz", "--data_path", own), tmp_path)
    assert "use --dataset chips" in line
    copy = tmp_path / "scene.tif"
    copy.write_bytes(scene.read_bytes())
    line = failed(("--finetune", own / "model", "--predict", copy, "--output_map", copy), tmp_path)
    assert "is the scene itself" in line and copy.read_bytes() == scene.read_bytes()
    line = failed(("--finetune", own / "model", "--units linear --predict", scene, "--output_map", tmp_path / "m.tif"), tmp_path)  # fmt: skip
    assert "use --units dB" in line and not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda mask: mask[:40], "another size than their image"),
        (lambda mask: np.full_like(mask, 7), "does not name"),
    ],
)
def test_wrong_masks_are_one_line(own, tmp_path, damage, message):
    root = tmp_path / "masks"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for k, path in enumerate(sorted((own / "data" / "masks" / "images").glob("*.tif"))[:6]):
        (root / "images" / path.name).write_bytes(path.read_bytes())
        with rasterio.open(own / "data" / "masks" / "masks" / path.name) as file:
            mask, profile = file.read(1), file.profile
        mask = damage(mask) if k == 2 else mask
        with rasterio.open(root / "masks" / path.name, "w", **profile | {"height": len(mask)}) as file:
            file.write(mask, 1)
    (root / "classes.csv").write_text("value,name\n0,water\n1,land\n")
    assert message in failed((TRAIN, "--val_fraction 0.4 --test_split none --finetune '' --data_path", root), tmp_path)


def test_masks_that_are_all_ignored_are_one_line(own, tmp_path):
    legend = own / "data" / "masks" / "classes.csv"
    before = legend.read_text()
    try:
        legend.write_text("value,name\n0,ignore\n1,ignore\n2,water\n3,land\n")
        line = failed((TRAIN, SPLITS, "--finetune '' --data_path", own / "data" / "masks"), tmp_path)
    finally:
        legend.write_text(before)
    assert "none of the" in line


@needs_samples
def test_real_chips_are_learned_from(tmp_path):
    chips = sample_path("sen1floods11_chips")
    flags = ("--dataset sen1floods11 --data_path", chips, STATISTICS, "--val_fraction 0.3 --test_fraction 0.3")
    flags = argv(flags, "--model mixmim_tiny --input_size 64 --crops 2 --batch_size 4 --epochs 1 --warmup_epochs 0")
    flags += argv("--finetune '' --overlap 0 --num_workers 0 --device cpu --output_dir", tmp_path / "run")
    finish("main_finetune", flags, tmp_path / "log.txt")
    found = found_in(tmp_path / "run")
    assert 0 <= found["iou_macro"] <= 1 and found["pixels"] + found["ignored_pixels"] == found["samples"] * 512**2


def test_a_bad_scene_does_not_keep_the_others_from_their_maps(own, tmp_path):
    (tmp_path / "scenes").mkdir()
    for k, path in enumerate(sorted((own / "data" / "scenes").glob("*.tif"))[:3]):
        with rasterio.open(path) as file:
            values, profile, names = file.read(), file.profile, file.descriptions
        values = values if k else 10 ** (values / 10)  # the first is linear
        with rasterio.open(tmp_path / "scenes" / f"s{k}.tif", "w", **profile) as file:
            file.write(values)
            file.descriptions = names
    line = failed(("--finetune", own / "model", "--predict", tmp_path / "scenes", "--output_map", tmp_path / "m.tif"), tmp_path)  # fmt: skip
    assert "1 of 3 scenes cannot be mapped: " in line and "s0.tif" in line
    assert sorted(path.name for path in tmp_path.glob("*.tif")) == ["m_s1.tif", "m_s2.tif"]
