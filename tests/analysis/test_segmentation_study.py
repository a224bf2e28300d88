# SPDX-License-Identifier: MIT
"""The study of segmentation by groups left out: folds and lists, baselines, commands, and tables from what runs leave."""

import importlib.util
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis import segmentation_runs, segmentation_study
from analysis.jobs import Step
from analysis.segmentation_baselines import baselines, best_bin, bins_of, local_mean, otsu, truth_of
from analysis.segmentation_folds import folds_of, slugs_of, write_lists
from analysis.segmentation_results import auc_of, results_of
from sarwmix.masks import Masks, Sen1Floods11
from sarwmix.moments import BIN, LOWEST
from tests.helpers.dataset_fixtures import fails_with, write_csv, write_tif
from tests.helpers.runs import argv, refusal

SIDE = 16
COUNTRIES = {
    "Ghana": 1,
    "India": 0,
    "Peru": 2,
    "Spain": 3,
}  # rows of water in each of their images; that of India is dry
WET = (0, 1, 2, 3, 3, 4, 6, 7)  # rows of water in the columns of a scene
TRAINING = "-- --model mixmim_tiny --input_size 64 --epochs 1 --warmup_epochs 0"


def image(water):
    """VV −10 and VH −17 dB over land, VV −20 and VH −27 over the first rows, which are water. VV, VH."""
    values = np.stack([np.full((SIDE, SIDE), level, np.float32) for level in (-10, -17)])
    values[:, :water] -= 10
    return values


def water(rows):
    return (np.arange(SIDE) < rows).repeat(SIDE).reshape(SIDE, SIDE).astype(np.int16)


@pytest.fixture
def chips(tmp_path):
    """Three chips of each country; the first of each is dry."""
    for country, rows in COUNTRIES.items():
        for k in range(3):
            name = f"{country}_{k}"
            write_tif(tmp_path / "data" / "S1Hand" / f"{name}_S1Hand.tif", image(rows * (k > 0)), ("VV", "VH"))
            write_tif(tmp_path / "data" / "LabelHand" / f"{name}_LabelHand.tif", water(rows * (k > 0)))
    return tmp_path / "data"


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of 2×8 images; the columns of the first have WET rows of water, the second has a row of it everywhere."""
    rows = [("id", "mask", "group")]
    for scene in "ab":
        for k in range(16):
            name, wet = f"{scene}_r{k % 2 * SIDE:05d}_c{k // 2 * SIDE:05d}", WET[k // 2] if scene == "a" else 1
            write_tif(tmp_path / "two" / "images" / f"{name}.tif", image(wet), ("VV", "VH"))
            write_tif(tmp_path / "two" / "labels" / f"{name}.tif", water(wet))
            rows.append((name, f"labels/{name}.tif", scene))
    write_csv(tmp_path / "two" / "classes.csv", [("value", "name"), (0, "land"), (1, "water")])
    write_csv(tmp_path / "two" / "metadata.csv", rows)
    return tmp_path / "two"


# ---- Folds ---------------------------------------------------------------------------------------


def test_every_group_is_tested_and_the_next_with_water_validates(chips):
    data = Sen1Floods11(chips, "all", supervised=True)
    folds = folds_of(data, 1)
    groups = [[sorted(set(data.groups[part].tolist())) for part in fold[1:]] for fold in folds]
    assert groups == [
        [["India", "Spain"], ["Peru"], ["Ghana"]],
        [["Ghana", "Spain"], ["Peru"], ["India"]],
        [["Ghana", "India"], ["Spain"], ["Peru"]],
        [["India", "Peru"], ["Ghana"], ["Spain"]],
    ]
    assert all(sorted([*fold.learned, *fold.test]) == list(range(12)) for fold in folds)
    fails_with(lambda: folds_of(data.subset(data.groups == "Peru"), 1), "one group")
    fails_with(lambda: folds_of(data.subset([0, 3, 6]), 1), "column group")
    dry = data.subset(np.isin(data.groups, ["India", "Peru"]))
    fails_with(lambda: folds_of(dry, 1), "1 of 2 groups have pixels of the class water, and 2 must")


def test_of_two_scenes_a_typical_quarter_of_the_other_validates(scenes):
    data = Masks(scenes, "all", supervised=True)
    on_a, on_b = folds_of(data, 1)
    assert (on_a.name, set(data.groups[on_a.test])) == ("a", {"a"}) and set(data.groups[on_a.learned]) == {"b"}
    # The mean of WET is 3.25; of the pairs of columns, 4 and 5, with 3.5, are the nearest.
    assert data.ids[on_b.val].tolist() == [f"a_r{r:05d}_c{c * SIDE:05d}" for c in (4, 5) for r in (0, SIDE)]
    assert not set(on_b.val) & set(on_b.train) and len(on_b.train) == 12


def test_lists_give_the_folds_back(chips, scenes, tmp_path):
    data = Sen1Floods11(chips, "all", supervised=True)
    fold = folds_of(data, 1)[0]
    write_lists(data, fold, "sen1floods11", tmp_path / "f")
    assert (tmp_path / "f" / "val.csv").read_text().splitlines()[0] == "Peru_0_S1Hand.tif,Peru_0_LabelHand.tif"
    for part in ("train", "val", "test"):
        again = Sen1Floods11(chips, part, [tmp_path / "f" / f"{part}.csv"], supervised=True)
        assert again.ids.tolist() == data.ids[getattr(fold, part)].tolist()
    data = Masks(scenes, "all", supervised=True)
    fold = folds_of(data, 1)[1]
    write_lists(data, fold, "masks", tmp_path / "m")
    for part in ("train", "val", "test"):
        again = Masks(scenes, part, [tmp_path / "m" / "metadata.csv"], supervised=True)
        rows = getattr(fold, part)
        assert again.ids.tolist() == data.ids[rows].tolist() and again.groups.tolist() == data.groups[rows].tolist()
        assert (again.pixel_counts == data.pixel_counts[rows]).all()


# ---- Baselines -----------------------------------------------------------------------------------


def test_otsu_by_hand():
    # Three values at 0 and one at 256: every edge between them divides them, and the lowest is at 1.
    assert otsu(np.array([0, 0, 0, 256.0])) == 1
    # 0, 0, 100, 256: {0, 0, 100} and {256} differ by 222.7 with weights 3·1, {0, 0} and {100, 256} by 178 with 2·2.
    assert otsu(np.array([0, 0, 100, 256.0])) == 101
    assert otsu(np.array([0, 0, 60, 256.0])) == 61
    assert otsu(np.array([0, 0, 200, 256.0])) == 1
    assert otsu(np.full(5, -7.5)) == -7.5


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")
def test_otsu_as_in_scikit_image():
    from skimage.filters import threshold_otsu

    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(-20, 2, 3000), draw.normal(-10, 2, 7000)])
    assert abs(otsu(values) - threshold_otsu(values)) <= np.ptp(values) / 256


def test_local_means_are_of_power_and_leave_out_no_data():
    db = np.full((7, 7), -10.0)
    db[3, 3], db[0, 0] = 10 * np.log10(2.5), np.nan
    mean = local_mean(db, 5)
    assert mean[3, 3] == pytest.approx(10 * np.log10((24 * 0.1 + 2.5) / 25))
    assert np.isnan(mean[0, 0]) and mean[0, 6] == pytest.approx(-10)


def test_the_best_threshold_by_hand():
    values, truth = np.array([-30.0, -20, -15, -10, -5]), np.array([1, 1, 0, 1, 0])
    histogram = np.stack([np.bincount(bins_of(values[truth == k]), minlength=1202) for k in (0, 1)])
    best = LOWEST + best_bin(histogram) * BIN  # up to −10 dB: 3 of 4 are right; up to −20 dB: 2 of 3
    assert best == pytest.approx(-9.9)


def test_baselines_of_chips(chips):
    data = Sen1Floods11(chips, "all", supervised=True)
    table = baselines(data, folds_of(data, 1), 1, 0.1)
    counts = table.groupby(["method", "group"])[["hits", "taken", "has", "pixels"]].sum()
    assert counts.loc[("threshold, VV", "Peru")].tolist() == [64, 64, 64, 768]
    assert counts.loc[("Otsu, VH", "Spain")].tolist() == [96, 96, 96, 768]
    assert counts.loc[("all positive", "Ghana")].tolist() == [32, 768, 32, 768]
    assert counts.loc[("logistic regression of pixels", "India"), "has"] == 0
    assert set(table.groupby("method").size()) == {12}
    found = table[(table.method == "Otsu, VV") & (table.id == "Peru_2")]
    assert found["score"].tolist() == [2 / 16]
    image_level = table[table.method == "histogram of the image"]
    assert image_level["hits"].isna().all() and image_level["score"].between(0, 1).all()


def test_what_an_image_counts_as_and_the_area_under_the_curve():
    has, pixels = [0, 1, 10, 0, 30], [100, 100, 100, 0, 100]
    assert truth_of(has, pixels, 0.1).tolist() == pytest.approx([0, np.nan, 1, np.nan, 1], nan_ok=True)
    images = pd.DataFrame({"has": [0, 0, 5, 5], "pixels": 10, "score": [0.1, 0.5, 0.5, 0.9]})
    assert auc_of(images, 0.5) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert np.isnan(auc_of(images[:2], 0.5))


# ---- Commands ------------------------------------------------------------------------------------


def commands(chips, tmp_path, capsys, *more):
    words = argv("--dataset sen1floods11 --data_path", chips, "--positive water --output", tmp_path / "out", *more)
    segmentation_study.main(words)
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def after(flag, words, count=1):
    return words[words.index(flag) + 1 :][:count]


def test_a_dry_run_prints_what_is_left(chips, tmp_path, capsys, monkeypatch):
    for seed in (4, 5):
        (tmp_path / f"e_{seed}.pth").touch()

    def load(path, _):
        stated = {"model": "mixmim_tiny", "input_size": 64, "mean": [-18, -11], "std": [5, 4]}
        return SimpleNamespace(started_from=lambda flags: stated)

    monkeypatch.setattr(segmentation_runs, "LoadedCheckpoint", SimpleNamespace(load=load))
    done = tmp_path / "out" / "runs" / "India_mine_5"
    done.mkdir(parents=True)
    (done / "eval_test.json").touch()
    encoders = f"--encoders mine={tmp_path}/e_{{seed}}.pth --seeds 4 5 --dry_run"
    lines = commands(chips, tmp_path, capsys, encoders, "-- --epochs 3 --warmup_epochs 0 --model mixmim_tiny")
    assert len(lines) == 2 * 4 * 2 - 1
    random, pretrained = lines[:2]
    assert after("--finetune", random) == [""] and after("--finetune", pretrained) == [f"{tmp_path}/e_4.pth"]
    assert after("--mean", random, 2) == ["-18", "-11"] and after("--std", random, 2) == ["5", "4"]
    assert after("--input_size", random) == ["64"] and random.count("--model") == 1
    assert "--mean" not in pretrained and after("--epochs", pretrained) == ["3"]
    assert after("--seed", lines[-1]) == ["5"] and after("--resume", lines[-1]) == ["auto"]
    folder = f"{tmp_path}/out/folds/Ghana"
    assert [after(f"--{part}metadata", random)[0] for part in ("", "val_", "test_")] == [
        f"{folder}/{part}.csv" for part in ("train", "val", "test")
    ]
    assert not (tmp_path / "out" / "folds").exists()
    # Without an encoder, the training images are measured; with --tile_share, each run predicts the tested images.
    lines = commands(chips, tmp_path, capsys, "--seeds 4 --tile_share 0.1 --dry_run", TRAINING)
    assert len(lines) == 8 and after("--statistics", lines[0]) == [f"{folder}/statistics.json"]
    assert after("--finetune", lines[1]) == [f"{tmp_path}/out/runs/Ghana_random_4/checkpoint_best.pth"]
    assert after("--metadata", lines[1]) == [f"{folder}/test.csv"] and "--eval" in lines[1]


def test_folders_of_groups_lie_in_the_study():
    slugs = slugs_of(["..", "a/b", ".c", "é 水", "d" * 300])
    assert list(slugs.values()) == ["_", "a_b", "_c", "é_水", "d" * 50]
    fails_with(lambda: slugs_of(["a b", "a/b", "c"]), "a b, a/b, c", "rename them")


@pytest.mark.parametrize(
    "more, words",
    [
        (("--positive ice --dry_run", TRAINING), ("--positive ice", "no water, water")),
        (("--dry_run", TRAINING, "--seed 3"), ("--seed", "the study sets it")),
        (("--encoders mine=nowhere.pth --dry_run", TRAINING), ("nowhere.pth", "no such checkpoint")),
        (("--encoders random=x.pth --dry_run", TRAINING), ("NAME=PATH",)),
        (("--seeds 1 1 --dry_run", TRAINING), ("--seeds", "twice")),
        ((TRAINING,), ("out", "is not empty")),
    ],
)
def test_wrong_flags_are_one_line(chips, tmp_path, capsys, more, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    flags = ("--dataset sen1floods11 --data_path", chips, "--positive water --output", tmp_path / "out", *more)
    line = refusal(segmentation_study.main, flags, capsys)
    assert all(word in line for word in words), line


# ---- Results -------------------------------------------------------------------------------------


def test_the_study_from_lists_to_tables(chips, tmp_path, capsys, monkeypatch):
    """Runs are faked: random initialisation takes a row too much for water in seed 0, two rows in seed 1."""
    monkeypatch.setattr(segmentation_study, "run_study", fake_runs)
    table, figure = tmp_path / "t.csv", tmp_path / "t.png"
    flags = argv("--dataset sen1floods11 --data_path", chips, "--positive water --output", tmp_path / "out")
    flags += argv("--seeds 0 1 --tile_share 0.1 --table", table, "--picture", figure, TRAINING)
    segmentation_study.main(flags)
    text = capsys.readouterr().out
    frame = pd.read_csv(table, keep_default_na=False, na_values={"IoU": "", "AUC": ""})
    found = frame[frame["method"] == "random"].set_index(["seed", "group"])
    # 12 rows of water in 12 images; 1 or 2 rows too many in each.
    assert found["IoU"]["0", ""] == pytest.approx(12 / 24) and found["IoU"]["1", ""] == pytest.approx(12 / 36)
    assert found["IoU"]["1", "Spain"] == pytest.approx(6 / 12) and np.isnan(found["IoU"]["0", "India"])
    assert found["AUC"]["0", ""] == 1
    assert "| random                        | 2       | 0.417 ± 0.118 |" in text
    # Otsu is right everywhere: −0.5 and −2/3 have the mean −0.583, and 12.706 standard errors of 0.118/√2.
    assert "| random − Otsu, VV | -0.583 ± 1.059 |" in text and "| 0 of 3" in text
    assert "random and Otsu, VV cannot be distinguished by IoU; IoU, mean over groups; AUC" in text
    assert "the interval contains 0." in text and "chance in training alone" in text
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.with_suffix(".svg").exists()
    statistics = json.loads((tmp_path / "out" / "folds" / "Ghana" / "statistics.json").read_text())
    # Spain and India: 6 of 96 rows are water.
    assert statistics["mean"] == pytest.approx([-17 - 10 / 16, -10 - 10 / 16])
    # Again, nothing is measured twice; with other flags, it is another study.
    monkeypatch.setattr(segmentation_study, "baselines", None)
    segmentation_study.main(flags)
    line = refusal(segmentation_study.main, [*flags, "--lr", "0.1"], capsys)
    assert "holds a study with other flags" in line
    monkeypatch.setattr(segmentation_study, "run_study", lambda *_: None)
    (tmp_path / "out" / "runs" / "Peru_random_1" / "eval_test.json").write_text("{}")
    line = refusal(segmentation_study.main, flags, capsys)
    assert "Peru_random_1/eval_test.json" in line and "remove the folder of this run" in line


def fake_runs(jobs, at_a_time):
    assert at_a_time == 1
    for training, prediction in jobs:
        assert isinstance(training, Step) and training.command[-1] == "auto"
        (seed,) = after("--seed", training.command)
        (data,) = after("--data_path", training.command)
        names = pd.read_csv(after("--test_metadata", training.command)[0], header=None)[0].str.removesuffix(
            "_S1Hand.tif"
        )
        has = np.array([COUNTRIES[name[:-2]] * (name[-1] != "0") for name in names]) * SIDE
        taken = has + (1 + int(seed)) * SIDE
        confusion = [[int((SIDE**2 - taken).sum()), int((taken - has).sum())], [0, int(has.sum())]]
        folder = segmentation_study.Path(training.unless).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval_test.json").write_text(json.dumps({"confusion_matrix": confusion}))
        columns = {"pixels: no water": SIDE**2 - has, "pixels: water": has}
        columns |= {"predicted: no water": SIDE**2 - taken, "predicted: water": taken}
        pd.DataFrame({"id": names, **columns}).to_csv(prediction.unless, index=False)


def test_results_of_several_starts_are_in_their_order():
    keys = ["method", "seed", "group", "hits", "taken", "has", "pixels"]
    pixels = pd.DataFrame([("random", 0, "x", 1, 2, 3, 9), ("b", 0, "x", 2, 2, 2, 9)], columns=keys)
    tested = pd.DataFrame([("a", None, "x", 0, 0, 2, 9)], columns=keys)
    frames = [frame.astype({"seed": "Int64"}) for frame in (pixels, tested)]
    results = results_of(frames[0], None, frames[1], None)
    assert results.loc[results.group == "", "method"].tolist() == ["random", "b", "a"]
    assert results.loc[results.group == "x", "IoU"].tolist() == [1 / 4, 1, 0]
