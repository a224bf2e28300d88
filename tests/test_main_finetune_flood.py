# SPDX-License-Identifier: MIT
"""The finetuning program on pairs of flood images."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import main_finetune
import pretrained
from sarwmix.sen12flood_loader import FloodDataset
from sarwmix.simulate.flood import Parameters, simulate_floods
from tests.helpers.forked import finish, finish_ranks
from tests.helpers.runs import completed, launch_alike, log_of, refused, same_states
from util.checkpoint import load_checkpoint
from util.head_fit import fit_head

pytestmark = pytest.mark.slow

RUN = (
    "--dataset sen12flood --model mixmim_tiny --batch_size 4 --num_workers 0 --warmup_epochs 1 "
    "--lr 2e-3 --log_freq 1 --device cpu --epochs 2 --finetune ''"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight places of 128×128 pixels, two of them for testing, with six pairs each or five."""
    folder = tmp_path_factory.mktemp("floods") / "store"
    simulate_floods(folder, Parameters(folders=8, size=128, seed=2))
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, launch_alike([sys.executable, "main_finetune.py --data_path", data, RUN, "--output_dir", folder])


@pytest.fixture
def finetune(program, data, tmp_path):
    """finetune(*flags) → (exit status, stdout, stderr) of the program on these pairs, with its output in tmp_path."""
    return lambda *flags: program(main_finetune, "--data_path", data, "--num_workers 0 --output_dir", tmp_path, flags)


def evaluated(folder, split="test"):
    return json.loads((folder / f"eval_{split}.json").read_text())


def test_a_run_selects_by_accuracy_on_the_test_split_and_says_so(finished):
    folder, result = finished
    assert "test metrics are optimistic; --val_fraction" in result.stdout
    assert "Best Results Summary: Epoch" in result.stdout
    assert all(name in result.stdout for name in ("| Accuracy", "| Recall", "predicted no flood"))
    entries = log_of(folder)
    best = max(entries, key=lambda entry: entry["test_accuracy"])
    assert evaluated(folder)["epoch"] == best["epoch"] and evaluated(folder)["accuracy"] == best["test_accuracy"]
    assert not (folder / "checkpoint_best_mbr.pth").exists()
    state = load_checkpoint(folder / "checkpoint_best.pth")
    assert state["input"]["classes"] == ["no flood", "flood"] and state["input"]["input_size"] == 128
    assert state["args"]["patch_cut"] == "vhvv" and state["input"]["std"] == [3.1672, 2.9644]


def test_counts_precision_and_predictions_agree(finished, data, tmp_path, finetune):
    flags = ("--eval --finetune", finished[0] / "checkpoint_best.pth", "--predictions", tmp_path / "p.csv")
    status, _, err = finetune(flags, "--batch_size 3")
    assert (status, err) == (0, "")
    frame, metrics = pd.read_csv(tmp_path / "p.csv"), evaluated(tmp_path)
    dataset = FloodDataset(data, "test")
    assert frame["id"].tolist() == dataset.ids.tolist()
    assert frame["label: flood"].tolist() == dataset.label_table()[:, 1].tolist()
    said = frame["probability: flood"] > 0.5
    counts = metrics["confusion"]
    assert counts["tp"] == (said & (frame["label: flood"] == 1)).sum()
    assert counts["fp"] == (said & (frame["label: flood"] == 0)).sum()
    assert metrics["accuracy"] == pytest.approx((said == frame["label: flood"]).mean())
    assert sum(counts.values()) == len(dataset)
    np.testing.assert_allclose(frame["probability: flood"] + frame["probability: no flood"], 1, atol=1e-6)

    model, prepare = pretrained.load(finished[0] / "checkpoint_best.pth")
    first, second, _ = dataset[3]
    with torch.no_grad():
        single = model(prepare(first[None])[0], prepare(second[None])[0]).softmax(1)[0, 1].item()
    assert frame["probability: flood"][3] == pytest.approx(single, abs=1e-5)


def test_whole_folders_are_held_out_for_validation(data, tmp_path, finetune):
    status, out, err = finetune(RUN, "--val_fraction 0.3 --patch_op max --patch_cut released --mixup 0.5")
    assert (status, err) == (0, "") and "optimistic" not in out
    record = json.loads((tmp_path / "run.json").read_text())["data"]
    train, val, test = (record[name]["samples"] for name in ("train", "val", "test"))
    assert (train + val, test) == (len(FloodDataset(data, "train")), len(FloodDataset(data, "test"))) and val > 0
    assert log_of(tmp_path)[0]["evaluated_split"] == "val"
    flags = ("--eval --finetune", tmp_path / "checkpoint.pth", "--output_dir", tmp_path / "eval")
    completed(finetune(flags, "--split val --batch_size 4"))
    assert evaluated(tmp_path / "eval", "val")["loss"] == log_of(tmp_path)[-1]["test_loss"]
    assert evaluated(tmp_path / "eval", "val")["samples"] == val
    model, _ = pretrained.load(tmp_path / "checkpoint.pth")
    assert (model.patch_op, model.patch_cut) == ("max", "released")
    refused(finetune(flags, "--patch_op avg"), "--patch_op avg (the checkpoint: max)")


def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, finetune):
    completed(finetune(RUN, "--resume auto --stop_epoch 1"))
    completed(finetune(RUN, "--resume auto"))
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        assert same_states(load_checkpoint(finished[0] / name), load_checkpoint(tmp_path / name)), name


def test_a_fitted_head_is_that_of_the_features_and_a_continued_run_keeps_the_flag(data, tmp_path, finetune):
    flags = (RUN, "--warmup_epochs 0 --lr 1e-12 --stop_epoch 1")
    out = completed(finetune(flags, "--head_init fitted"))
    assert "--head_init fitted: before training, the head classifies" in out
    checkpoint = tmp_path / "checkpoint.pth"
    completed(finetune("--embed", tmp_path / "f.npz", "--split train --finetune", checkpoint))
    features = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    labels = torch.from_numpy(FloodDataset(data, "train").label_table()[:, 1].astype(np.int64))
    weight, bias = fit_head(features, labels, 2)
    model = load_checkpoint(checkpoint)["model"]
    logits = features @ model["head.weight"].T + model["head.bias"]
    torch.testing.assert_close(logits, features @ weight.T + bias, atol=1e-3, rtol=0)
    refused(finetune(RUN, "--warmup_epochs 0 --lr 1e-12 --resume auto"), "--head_init None (was fitted)")
    completed(finetune(RUN, "--warmup_epochs 0 --lr 1e-12 --resume auto --head_init fitted"))


def test_one_rank_and_two_fit_the_same_head(data, tmp_path):
    flags = ("--data_path", data, RUN, "--warmup_epochs 0 --lr 1e-12 --stop_epoch 1 --head_init fitted --output_dir")
    finish("main_finetune", (flags, tmp_path / "one", "--batch_size 4"), tmp_path / "alone")
    finish_ranks("main_finetune", (flags, tmp_path / "two", "--batch_size 2"), tmp_path / "rank")
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    torch.testing.assert_close(one["head.weight"], two["head.weight"], atol=0.02, rtol=0)
    torch.testing.assert_close(one["head.bias"], two["head.bias"], atol=0.02, rtol=0)


def test_one_rank_and_two_evaluate_alike(finished, data, tmp_path):
    flags = ("--data_path", data, "--eval --finetune", finished[0] / "checkpoint.pth", "--batch_size 2 --num_workers 0")
    finish("main_finetune", (flags, "--output_dir", tmp_path / "one"), tmp_path / "alone")
    finish_ranks("main_finetune", (flags, "--output_dir", tmp_path / "two"), tmp_path / "rank")
    assert evaluated(tmp_path / "one") == evaluated(tmp_path / "two")


def test_pixels_without_data_are_counted(data, tmp_path, finetune):
    shutil.copytree(data, tmp_path / "store")
    path = next((tmp_path / "store" / "images" / "0001").iterdir())
    image = np.load(path)
    image[0, :3, :5] = np.nan
    np.save(path, image)
    flags = ("--data_path", tmp_path / "store", "--output_dir", tmp_path / "run", "--epochs 1 --num_workers 1")
    out = completed(finetune(RUN, flags))
    assert "non-finite pixels were filled so far: with -60 dB" in out
    assert log_of(tmp_path / "run")[0]["filled_pixels"] % 15 == 0 < log_of(tmp_path / "run")[0]["filled_pixels"]


def test_features_of_pairs_and_their_export(finished, data, tmp_path, program, finetune):
    checkpoint = finished[0] / "checkpoint_best.pth"
    completed(finetune("--embed", tmp_path / "f.npz", "--finetune", checkpoint))
    arrays = np.load(tmp_path / "f.npz")
    assert arrays["features"].shape == (len(FloodDataset(data, "test")), 256)
    assert arrays["groups"].tolist() == FloodDataset(data, "test").groups.tolist()
    completed(program(main_finetune, "--export", tmp_path / "shared", "--finetune", checkpoint))
    x = torch.randn(2, 1, 2, 256, 256)
    with torch.no_grad():
        assert torch.equal(*(pretrained.load(path)[0](*x) for path in (checkpoint, tmp_path / "shared")))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "pair classifier" in card and "patch_cut vhvv" in card and "1. flood" in card


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--val_split val", "--val_fraction"),
        ("--metadata {folders}", "--val_metadata"),
        ("--input_size 192", "--input_size 192"),
        ("--dataset benv2 --head_init fitted", "--head_init fitted: only for --dataset sen12flood"),
        ("--val_fraction 0.99", "--val_fraction 0.99"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, flags, said, finetune):
    (tmp_path / "folders.csv").write_text("0001\n0002\n")
    flags = flags.format(folders=tmp_path / "folders.csv")
    refused(finetune(RUN, "--output_dir", tmp_path / "run", flags), said)
    assert not (tmp_path / "run").exists()
