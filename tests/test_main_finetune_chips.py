# SPDX-License-Identifier: MIT
"""Images of one's own through the main programs: five classes, tiles of a scene, probabilities, features and maps."""

import json
import re

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from rasterio.warp import transform_bounds

import main_finetune
from pretrained import load
from sarwmix.prepare import tile
from sarwmix.simulate import scenes
from tests.helpers.forked import Run, finish_ranks
from tests.helpers.runs import argv, refusal

pytestmark = pytest.mark.slow

SMALL = "--model mixmim_tiny --input_size 32 --batch_size 8 --num_workers 0 --device cpu"
TRAIN = (SMALL, "--dataset chips --units linear --val_fraction 0.2 --test_fraction 0.2 --warmup_epochs 1 --lr 1e-3")
STATISTICS = "--mean -17.5 -11 --std 4.8 5"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Scenes and chips of five classes, a finetuned classifier, and tiles of the first scene."""
    root = tmp_path_factory.mktemp("own")
    scenes.main(argv("--out", root / "data", "--scenes 10 --side 512 --chip_size 32 --workers 1"))
    tile.main(
        argv(
            root / "data" / "scenes" / "S1A_IW_GRDH_1SDV_20000101T000000.tif",
            "--units linear --size 64 --workers 1 --out",
            root / "tiles",
        )
    )
    flags = (TRAIN, STATISTICS, "--epochs 6 --finetune '' --data_path", root / "data" / "chips")
    completed("main_finetune", flags, root / "classifier")
    return root


def completed(program, flags, out):
    run = Run(program, argv(flags, "--output_dir", out), out.with_suffix(".txt"))
    assert run.wait() == 0, run.text()[-3000:]
    return run.text()


def test_five_classes_are_learned(own):
    found = json.loads((own / "classifier" / "eval_test.json").read_text())
    assert found["accuracy"] > 0.4 and found["samples"] > 40  # chance is 0.2
    assert set(found["per_class"]) == {"f1", "precision", "recall", "support"} and len(found["per_class"]["f1"]) == 5
    rows = re.findall(r"\| (.+?) +\| (\d+) +\| (\d+) +\| (\d+) +\|", (own / "classifier.txt").read_text())
    counts = {name: tuple(map(int, numbers)) for name, *numbers in rows}
    samples, groups = counts.pop("samples"), counts.pop("groups")
    assert len(counts) == 5 and tuple(map(sum, zip(*counts.values()))) == samples and samples[2] == found["samples"]
    assert sum(groups) == 10 and min(groups) > 0
    model, prepare = load(own / "classifier" / "checkpoint_best.pth")
    assert model.head.out_features == 5 and prepare.describe()["mean"] == [-17.5, -11.0]


def test_two_ranks_evaluate_as_one(own, tmp_path):
    flags = ("--eval --units linear --data_path", own / "data" / "chips", SMALL, "--finetune", own / "classifier")
    completed("main_finetune", flags, tmp_path / "one")
    finish_ranks("main_finetune", argv(flags, "--output_dir", tmp_path / "two"), tmp_path / "ranks")
    one, two = (json.loads((tmp_path / name / "eval_test.json").read_text()) for name in ("one", "two"))
    assert "is drawn as in training" in (tmp_path / "one.txt").read_text()
    assert one == two and one["accuracy"] == json.loads((own / "classifier" / "eval_test.json").read_text())["accuracy"]


def test_probabilities_and_maps_of_a_scene(own, tmp_path):
    flags = (SMALL, "--dataset chips --data_path", own / "tiles", "--finetune", own / "classifier")
    for name in ("p.csv", "p.parquet", "p.tif"):
        completed("main_finetune", (flags, "--predict", tmp_path / name), tmp_path / "run")
    frame, table = pd.read_csv(tmp_path / "p.csv"), geopandas.read_parquet(tmp_path / "p.parquet")
    columns = [name for name in frame if name.startswith("probability: ")]
    assert len(frame) == 64 and len(columns) == 5 and np.allclose(frame[columns].sum(axis=1), 1)
    assert (frame["predicted"] == frame[columns].idxmax(axis=1).str.removeprefix("probability: ")).all()
    np.testing.assert_allclose(table[columns], frame[columns], atol=1e-6)
    with (
        rasterio.open(tmp_path / "p.tif") as file,
        rasterio.open(next((own / "data" / "scenes").glob("*000000.tif"))) as scene,
    ):
        assert file.bounds == scene.bounds and file.shape == (8, 8) and file.descriptions[0] == "farmland"
        np.testing.assert_allclose(file.read(1).ravel(), frame[columns[0]], atol=1e-6)
        bounds = transform_bounds(scene.crs, "EPSG:4326", *scene.bounds)
    assert np.allclose(table.total_bounds, bounds, atol=1e-3) and table.crs.to_epsg() == 4326


def test_a_run_is_not_continued_with_other_labels(own, tmp_path):
    names, flags = pd.read_csv(own / "data" / "chips" / "metadata.csv"), (own / "data" / "chips", SMALL)
    for name in ("a", "b"):
        names.replace({"label": {"water": "aqua"} if name == "b" else {}}).to_csv(tmp_path / f"{name}.csv", index=False)
    run = ("--dataset chips --units linear --data_path", flags, STATISTICS, "--finetune '' --val_fraction 0.2")
    run = (*run, "--test_split none --epochs 2 --warmup_epochs 0 --resume auto")
    completed("main_finetune", (*run, "--stop_epoch 1 --metadata", tmp_path / "a.csv"), tmp_path / "run")
    again = Run("main_finetune", argv(run, "--metadata", tmp_path / "b.csv", "--output_dir", tmp_path / "run"), tmp_path / "out")  # fmt: skip
    assert again.wait() == 2 and "these flags differ from those of the run" in again.text()


def test_an_export_knows_its_classes(own, tmp_path):
    completed("main_finetune", ("--finetune", own / "classifier", "--export", tmp_path / "model"), tmp_path / "x")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# mixmim_tiny, single-label classifier, chips" in card and "softmax gives probabilities" in card
    assert "4. water" in card and "logits.softmax(1)" in card
    model, prepare = load(tmp_path / "model")
    program = torch.export.load(tmp_path / "model" / "model.pt2").module()
    images = torch.randn(3, 2, 40, 40) * 4 + torch.tensor([-18.0, -11.0]).view(2, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(prepare(images)[0]), atol=1e-5, rtol=0)


def test_pretraining_on_tiles_and_features_of_them(own, tmp_path):
    start = (SMALL, "--dataset chips --data_path", own / "tiles")
    text = completed("main_pretrain", (start, "--epochs 1 --warmup_epochs 0 --lr 5e-4 --save_epochs"), tmp_path / "run")
    assert "64 samples of chips, split train_val" in text and f"from --data_path {own / 'tiles'}" in text
    flags = (start, "--finetune", tmp_path / "run")
    for name in ("e.parquet", "e.npz"):
        completed("main_finetune", (flags, "--embed", tmp_path / name), tmp_path / "x")
    completed("main_finetune", (flags, "--embed", tmp_path / "e.tif"), tmp_path / "x")
    completed("main_finetune", (flags, "--embed_bands all --embed", tmp_path / "all.tif"), tmp_path / "x")
    table, arrays = geopandas.read_parquet(tmp_path / "e.parquet"), np.load(tmp_path / "e.npz")
    assert len(table) == 64 and table.geometry.is_valid.all() and (table["id"] == arrays["ids"]).all()
    with rasterio.open(tmp_path / "e.tif") as pca, rasterio.open(tmp_path / "all.tif") as everything:
        assert pca.count == 3 and everything.count == arrays["features"].shape[1]
        np.testing.assert_allclose(everything.read()[:, 1, 2], arrays["features"][10], atol=1e-5)


def test_what_is_missing_is_one_line(own, tmp_path, capsys):
    chips = (
        "--dataset chips --units linear --data_path",
        own / "data" / "chips",
        SMALL,
        "--output_dir",
        tmp_path / "run",
    )
    said = {
        "--mean and --std are missing": (*chips, "--finetune ''  --val_fraction 0.2 --test_split none"),
        "no split 'val'": (*chips, STATISTICS, "--finetune ''"),
        "--nb_classes 7": (*chips, STATISTICS, "--finetune '' --nb_classes 7 --val_fraction 0.2 --test_split none"),
    }
    for text, flags in said.items():
        run = Run("main_finetune", argv(flags), tmp_path / "out.txt")
        assert run.wait() == 2 and text in run.text(), (text, run.text()[-500:])
        run.output.unlink()
    assert not (tmp_path / "run").exists()
    assert "must end in" in refusal(main_finetune.parse_flags, (chips, "--finetune . --predict p.npz"), capsys)
    (tmp_path / "p.tif").mkdir()
    folder = (chips, "--finetune . --predict", tmp_path / "p.tif")
    same = (chips, "--finetune . --embed", tmp_path / "x.parquet", "--predict", tmp_path / "x.parquet")
    assert "is also the file of --embed" in refusal(main_finetune.parse_flags, same, capsys)
    for path in (own / "data" / "chips" / "metadata.csv", next((own / "data" / "chips").glob("*.tif"))):
        lost = refusal(main_finetune.parse_flags, (chips, "--finetune . --predict", path), capsys)
        assert f"--predict {path}: is a file of the data" in lost
    assert "p.tif: is a folder" in refusal(main_finetune.parse_flags, folder, capsys)
