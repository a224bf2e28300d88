# SPDX-License-Identifier: MIT
"""The finetuning program: what it leaves, resuming, ranks, evaluation, released checkpoints, and wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

import main_finetune
import pretrained
from models_mixmim import mixmim_tiny, size_of
from sarwmix.bigearthnet import CLASSES
from sarwmix.bigearthnetv2 import BigEarthNetv2
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import needs_samples, sample_path, write_v1, write_v2
from tests.helpers.forked import finish, finish_ranks
from tests.helpers.released import write_released
from tests.helpers.runs import argv, completed, launch_alike, log_of, mpirun, refused, same_states, scalars
from util.checkpoint import load_checkpoint
from util.checkpoint_input import LoadedCheckpoint

pytestmark = pytest.mark.slow

TINY = (
    "--model mixmim_tiny --input_size 64 --batch_size 6 --num_workers 0 --warmup_epochs 1 --lr 2e-3 "
    "--log_freq 1 --device cpu"
)
RUN = (TINY, "--dataset benv2 --epochs 3 --drop_path 0.2")
SPLITS = {"train": 24, "validation": 11, "test": 13}  # primes, where evaluation is spread over ranks


@pytest.fixture(scope="module")
def data(simulated, tmp_path_factory):
    """Flags of the 48 simulated patches, dealt anew to three splits."""
    frame = pd.read_parquet(simulated / "metadata.parquet").sample(frac=1, random_state=0)
    frame["split"] = [split for split, count in SPLITS.items() for _ in range(count)]
    path = tmp_path_factory.mktemp("metadata") / "dealt.parquet"
    frame.to_parquet(path)
    return ("--data_path", simulated, "--metadata", path)


@pytest.fixture
def finetune(program, data, tmp_path):
    """finetune(*flags) → (exit status, stdout, stderr) of the program on these data, with its output in tmp_path."""
    return lambda *flags: program(main_finetune, data, "--num_workers 0 --output_dir", tmp_path, flags)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """A pretraining checkpoint of the tiny model, for input 64; its weights are those of initialisation."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("pretraining") / "pretrained.pth"
    torch.save(
        {
            "model": mixmim_tiny(img_size=64).state_dict(),
            "epoch": 7,
            "args": {"model": "mixmim_tiny", "input_size": 64, "dataset": "benv2", "norm_pix_loss": True},
            "input": {
                "channels": ["VH", "VV"],
                "units": "dB",
                "input_size": 64,
                "mean": [-19.1966, -12.5144],
                "std": [5.4501, 5.0019],
            },
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def finished(data, pretraining, tmp_path_factory):
    """A run of three epochs from a pretraining checkpoint, and its console output."""
    folder = tmp_path_factory.mktemp("finished")
    result = launch_alike(
        [sys.executable, "main_finetune.py", data, RUN, "--finetune", pretraining, "--output_dir", folder]
    )
    return folder, result


# ---- What it leaves behind -----------------------------------------------------------------------


def test_files_and_log_of_a_run(finished):
    folder, _ = finished
    assert {name for name in os.listdir(folder) if not name.endswith(".sha256")} == {
        "checkpoint.pth",
        "checkpoint_previous.pth",
        "checkpoint_best.pth",
        "checkpoint_best_mbr.pth",
        "checkpoint_best_default.pth",
        "log.txt",
        "run.json",
        "eval_test.json",
        "tensorboard",
    }
    entries = log_of(folder)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert {"train_loss", "train_lr", "test_loss", "test_ap_macro", "test_f1_micro", "n_parameters"} <= set(entries[0])
    assert entries[0]["evaluated_split"] == "val" and entries[-1]["train_loss"] < entries[0]["train_loss"]
    record = json.loads((folder / "run.json").read_text())
    assert {name: part["samples"] for name, part in record["data"].items()} == {"train": 24, "val": 11, "test": 13}
    assert scalars(folder, "test_ap_macro") == {
        (epoch + 1) * 1000: pytest.approx(entry["test_ap_macro"]) for epoch, entry in enumerate(entries)
    }


def test_the_console_ends_with_the_summary_table(finished):
    folder, result = finished
    lines = [line[18:] for line in result.stdout.splitlines()]
    assert all(line[0] == "[" and line[9] == "." and line[16:18] == "] " for line in result.stdout.splitlines())
    best = load_checkpoint(folder / "checkpoint_best.pth")["epoch"]
    assert lines[-6] == f"Best Results Summary: Epoch {best}"
    assert any(line.startswith("Training time 0:") for line in lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-5:]]
    assert cells[0] == ["Metric", "Macro", "Micro"]
    assert [row[0] for row in cells[2:]] == ["Average Precision", "F1 Score", "Precision"]
    metrics = json.loads((folder / "eval_test.json").read_text())
    assert cells[2][1:] == [f"{metrics['ap_macro']:.4f}", f"{metrics['ap_micro']:.4f}"] and metrics["epoch"] == best
    assert "initialised from" in result.stdout and "with a new head" in result.stdout and result.stderr == ""
    absent = [name for name, count in zip(CLASSES, metrics["per_class"]["support"]) if count == 0]
    assert absent and any(f"{len(absent)} classes do not occur" in line and absent[0] in line for line in lines)


def test_checkpoints_say_how_to_feed_them_and_what_was_selected(finished):
    folder, _ = finished
    state = load_checkpoint(folder / "checkpoint.pth")
    assert {"model", "optimizer", "epoch", "scaler", "args", "input", "metrics", "selection"} <= set(state)
    assert state["input"] == {
        "channels": ["VH", "VV"],
        "units": "dB",
        "input_size": 64,
        "mean": [-19.1966, -12.5144],
        "std": [5.4501, 5.0019],
        "classes": list(CLASSES),
    }
    assert state["data"] == {"train": {"samples": 24, "simulated": True}, "val": {"samples": 11, "simulated": True}}
    for rule, entry in state["selection"].items():
        held = load_checkpoint(folder / f"checkpoint_{rule}.pth")
        assert held["epoch"] == entry["epoch"]
        assert entry["metrics"]["ap_macro"] == log_of(folder)[entry["epoch"]]["test_ap_macro"]


def test_the_recipe_reaches_the_optimizer(finished):
    groups = load_checkpoint(finished[0] / "checkpoint.pth")["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == pytest.approx([0.7**k for k in range(6, 0, -1)])  # five blocks: ids 0 … 5
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert all(group["betas"] == (0.9, 0.999) for group in groups)
    for group in groups:
        assert group["lr"] == pytest.approx(groups[-1]["lr"] * group["lr_scale"] / groups[-1]["lr_scale"])


# ---- Starting and going on -----------------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(finished, data, pretraining, tmp_path, program):
    flags = (data, RUN, "--finetune", pretraining, "--output_dir", tmp_path, "--resume auto")
    completed(program(main_finetune, flags, "--stop_epoch 2"))
    completed(program(main_finetune, flags))
    for name in ("checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_default.pth", "checkpoint_best_mbr.pth"):
        assert same_states(load_checkpoint(finished[0] / name), load_checkpoint(tmp_path / name)), name
    clock = ("train_samples_per_s",)
    assert [{key: value for key, value in entry.items() if key not in clock} for entry in log_of(finished[0])] == [
        {key: value for key, value in entry.items() if key not in clock} for entry in log_of(tmp_path)
    ]
    for key, value in json.loads((finished[0] / "eval_test.json").read_text()).items():
        assert key == "checkpoint" or json.loads((tmp_path / "eval_test.json").read_text())[key] == value
    refused(program(main_finetune, flags, "--layer_decay 0.8"), "--layer_decay 0.8 (was 0.7)")


def initial_weights(*flags):
    """The weights that the program begins to train with."""
    flags = main_finetune.parse_flags(argv(flags, "--lr 1e-3"))
    checkpoint = LoadedCheckpoint.load(flags.finetune, size_of) if flags.finetune else None
    config = main_finetune.configure(flags, checkpoint, None, {})
    return main_finetune.build_training(config, torch.device("cpu"), checkpoint).model.state_dict()


def test_a_new_head_nearly_zero_on_the_pretrained_encoder(pretraining, data):
    weights, own = load_checkpoint(pretraining)["model"], initial_weights(data, RUN, "--finetune", pretraining)
    assert all(torch.equal(own[name], weights[name]) for name in own if not name.startswith("head."))
    assert 1e-5 < own["head.weight"].std() < 3e-5 and (own["head.bias"] == 0).all()
    again = initial_weights(data, RUN, "--finetune ''")
    assert not torch.equal(again["patch_embed.proj.weight"], weights["patch_embed.proj.weight"])
    assert 1e-5 < again["head.weight"].std() < 3e-5


def test_a_frozen_encoder_stays_as_it_was(pretraining, tmp_path, finetune):
    completed(finetune(RUN, "--finetune", pretraining, "--freeze_encoder"))
    state, before = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(pretraining)["model"]
    assert all(
        torch.equal(value, before[name]) for name, value in state["model"].items() if not name.startswith("head.")
    )
    assert state["model"]["head.weight"].abs().max() > 1e-3 and len(state["optimizer"]["state"]) == 2
    assert state["args"]["drop_path"] == 0


def test_a_fraction_of_the_labels_is_drawn_saved_and_reported(data, tmp_path, finetune):
    drawn = {}
    for share in (0.25, 0.5):
        folder = tmp_path / str(share)
        status, out, _ = finetune(RUN, "--finetune '' --output_dir", folder, "--epochs 1 --train_fraction", share)
        assert status == 0 and f"of {int(24 * share)} drawn" in out and "random initialisation" in out
        drawn[share] = pd.read_csv(folder / "train_ids.csv")["id"].tolist()
        assert (
            json.loads((folder / "run.json").read_text())["data"]["train"]["samples"] == len(drawn[share]) == 24 * share
        )
        assert load_checkpoint(folder / "checkpoint.pth")["args"]["train_fraction"] == share
    train = BigEarthNetv2(data[1], "train", data[3]).ids.tolist()
    assert set(drawn[0.25]) < set(drawn[0.5]) < set(train)
    assert drawn[0.5] == [name for name in train if name in drawn[0.5]]
    completed(
        finetune(
            RUN, "--finetune '' --output_dir", tmp_path / "other", "--epochs 1 --train_fraction 0.25 --draw_seed 1"
        )
    )
    assert pd.read_csv(tmp_path / "other" / "train_ids.csv")["id"].tolist() != drawn[0.25]


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup 0.8",
        "--cutmix 1.0 --mixup_mode pair",
        "--cutmix_minmax 0.2 0.6 --smoothing 0.1",
        "--mixup 0.8 --mixup_mode elem --accum_iter 2",
        "--amp bf16",
    ],
)
def test_variants_train(tmp_path, flags, finetune):
    status, out, err = finetune(RUN, "--finetune ''", flags)
    losses = [entry["train_loss"] for entry in log_of(tmp_path)]
    assert (status, err) == (0, "") and losses[2] < losses[0]
    assert "warning" not in out.replace("warning: ", "", 6).lower()


# ---- Evaluation ----------------------------------------------------------------------------------


def evaluated(folder, split="test"):
    return json.loads((folder / f"eval_{split}.json").read_text())


def test_eval_equals_the_evaluation_of_the_run_and_scikit_learn(finished, data, tmp_path, finetune):
    checkpoint = finished[0] / "checkpoint_best.pth"
    predictions = tmp_path / "predictions.csv"
    status, _, err = finetune("--eval --finetune", checkpoint, "--batch_size 6 --predictions", predictions)
    assert (status, err) == (0, "")
    ours, theirs = evaluated(tmp_path), evaluated(finished[0])
    assert all(ours[key] == theirs[key] for key in theirs if key != "checkpoint")

    dataset = BigEarthNetv2(data[1], "test", data[3])
    frame = pd.read_csv(predictions)
    assert frame.columns.tolist() == [
        "id",
        *(f"label: {name}" for name in CLASSES),
        *(f"probability: {name}" for name in CLASSES),
    ]
    assert frame["id"].tolist() == dataset.ids.tolist()
    labels, probabilities = frame.iloc[:, 1:20].to_numpy(), frame.iloc[:, 20:].to_numpy()
    assert np.array_equal(labels, dataset.label_table())
    occurring = labels.any(0)
    assert ours["ap_macro"] == pytest.approx(
        average_precision_score(labels[:, occurring], probabilities[:, occurring], average="macro"), rel=1e-5
    )
    assert ours["ap_micro"] == pytest.approx(average_precision_score(labels, probabilities, average="micro"), rel=1e-5)
    assert ours["f1_macro"] == pytest.approx(
        f1_score(labels[:, occurring], probabilities[:, occurring] > 0.5, average="macro", zero_division=0), rel=1e-5
    )

    model, prepare = pretrained.load(checkpoint)
    with torch.no_grad():
        single = model(prepare(dataset.image(4)[None])[0]).double().sigmoid()
    np.testing.assert_allclose(probabilities[4], single[0], atol=1e-6)


def test_one_rank_and_two_evaluate_alike(finished, data, tmp_path):
    flags = (data, "--eval --finetune", finished[0] / "checkpoint_best.pth", "--batch_size 3 --num_workers 0")
    for name, start, more in (("one", finish, ()), ("two", finish_ranks, ()), ("main", finish_ranks, "--no_dist_eval")):
        start(
            "main_finetune",
            (flags, more, "--output_dir", tmp_path / name, "--predictions", tmp_path / f"{name}.parquet"),
            tmp_path / f"{name}_output",
        )
    assert evaluated(tmp_path / "one") == evaluated(tmp_path / "two") == evaluated(tmp_path / "main")
    assert evaluated(tmp_path / "one")["samples"] == 13
    frames = [pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "two", "main")]
    assert len(frames[0]) == 13 and frames[0].equals(frames[1]) and frames[0].equals(frames[2])


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_under_mpirun_a_contradiction_is_one_line(finished, data, tmp_path):
    flags = (data, "--eval --finetune", finished[0] / "checkpoint_best.pth", "--input_size 128 --output_dir")
    command = mpirun(sys.executable, "main_finetune.py", flags, tmp_path / "run")
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    ours = [line for line in result.stderr.splitlines() if line.startswith("main_finetune.py:")]
    assert result.returncode == 2 and len(ours) == 1 and "--input_size 128 (the checkpoint: 64)" in ours[0], (
        result.stderr
    )


def test_two_ranks_train_like_one_process_that_accumulates(data, pretraining, tmp_path):
    flags = (data, RUN, "--batch_size 4 --finetune", pretraining, "--mixup 0.8")
    finish("main_finetune", (flags, "--accum_iter 2 --output_dir", tmp_path / "alone"), tmp_path / "output")
    runs = finish_ranks("main_finetune", (flags, "--output_dir", tmp_path / "ranks"), tmp_path / "rank")
    assert "".join(run.text() for run in runs).count("Best Results Summary") == 1
    for one, two in zip(log_of(tmp_path / "alone"), log_of(tmp_path / "ranks")):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=2e-6)
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-4)


def test_features_are_written_with_ids_groups_and_labels(finished, pretraining, data, tmp_path, finetune):
    for path in (tmp_path / "features.npz", tmp_path / "features.parquet"):
        completed(finetune("--embed", path, "--split val --finetune", pretraining))
    dataset = BigEarthNetv2(data[1], "val", data[3])
    arrays, frame = np.load(tmp_path / "features.npz"), pd.read_parquet(tmp_path / "features.parquet")
    assert arrays["ids"].tolist() == frame["id"].tolist() == dataset.ids.tolist()
    assert arrays["classes"].tolist() == list(CLASSES)
    assert np.array_equal(arrays["labels"], dataset.label_table())
    assert arrays["groups"][0] == dataset.ids[0].rsplit("_", 3)[0]
    assert np.array_equal(frame.filter(like="feature ").to_numpy(), arrays["features"])
    encoder, prepare = mixmim_tiny(img_size=64), pretrained.load(pretraining)[1]
    encoder.load_state_dict(load_checkpoint(pretraining)["model"])
    with torch.no_grad():
        expected = encoder.eval().encode(prepare(dataset.image(7)[None])[0]).mean(1)[0]
    np.testing.assert_allclose(arrays["features"][7], expected, atol=1e-5)
    completed(finetune("--embed", tmp_path / "tuned.npz", "--split val --finetune", finished[0] / "checkpoint.pth"))
    assert not np.allclose(np.load(tmp_path / "tuned.npz")["features"], arrays["features"])


# ---- Export --------------------------------------------------------------------------------------


def test_an_exported_classifier_gives_identical_outputs(finished, tmp_path, program, finetune):
    checkpoint, folder = finished[0] / "checkpoint_best.pth", tmp_path / "shared"
    status, out, err = finetune("--eval --finetune", checkpoint, "--export", folder, "--output_dir", tmp_path / "a")
    assert (status, err) == (0, "") and sorted(os.listdir(folder)) == [
        "README.md",
        "config.json",
        "model.pt2",
        "model.safetensors",
    ]
    x = torch.randn(2, 2, 120, 120) * 5 - 15
    (one, prepare_one), (two, prepare_two) = pretrained.load(checkpoint), pretrained.load(folder)
    with torch.no_grad():
        assert torch.equal(one(prepare_one(x)[0]), two(prepare_two(x)[0]))
    completed(finetune("--eval --finetune", folder, "--output_dir", tmp_path / "b"))
    assert {**evaluated(tmp_path / "a"), "checkpoint": ""} == {**evaluated(tmp_path / "b"), "checkpoint": ""}

    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert config["input"] == load_checkpoint(checkpoint)["input"] and config["recipe"]["lr"] == 2e-3
    assert config["metrics"]["test"]["ap_macro"] == evaluated(tmp_path / "a")["ap_macro"] and "val" in config["metrics"]
    assert config["measured_on"]["test"] == {"samples": 13, "simulated": True}
    assert "Data: val 11 simulated samples, test 13 simulated samples." in card
    said = ("multi-label classifier", "VH and VV", "64×64", "-19.1966", "18. Marine waters", "| lr ")
    assert all(text in card for text in (*said, f"{evaluated(tmp_path / 'a')['ap_macro']:.4f}"))
    refused(program(main_finetune, "--export", folder, "--finetune", checkpoint), "not an empty folder")


def test_an_exported_encoder_has_no_decoder_and_can_be_finetuned(pretraining, tmp_path, program, finetune):
    folder = tmp_path / "encoder"
    completed(program(main_finetune, "--export", folder, "--finetune", pretraining))
    state = load_checkpoint(folder)
    assert not [name for name in state["model"] if "decoder" in name or name == "mask_token"]
    assert "classes" not in state["input"]
    assert "features" in (folder / "README.md").read_text()
    for source in (folder, pretraining):
        completed(finetune(RUN, "--finetune", source, "--output_dir", tmp_path / source.stem, "--epochs 1"))
    one, two = (load_checkpoint(tmp_path / source.stem / "checkpoint.pth") for source in (folder, pretraining))
    assert same_states(one, two)


@pytest.mark.parametrize(
    "damage, said", [("missing", "config.json is missing"), ("truncated", "damaged"), ("foreign", "damaged")]
)
def test_a_damaged_export_is_one_line(pretraining, tmp_path, program, damage, said):
    folder = tmp_path / "encoder"
    completed(program(main_finetune, "--export", folder, "--finetune", pretraining))
    if damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    else:
        (folder / "config.json").write_text("[]")
    refused(program(main_finetune, "--export", tmp_path / "again", "--finetune", folder), said)
    assert not (tmp_path / "again").exists()


# ---- Released checkpoints (stand-ins of the same names, shapes and pickled classes) --------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    weights = {
        name: write_released(folder / f"{name}.pth", **kind)
        for name, kind in (
            ("pretrain", {"decoder": (512, 8)}),
            ("finetune", {"classes": 19}),
            ("flood", {"classes": 2}),
        )
    }
    yield folder, weights
    shutil.rmtree(folder)


def test_released_finetuned_weights_evaluate_with_the_datasets_statistics(released, tmp_path, program):
    folder, weights = released
    write_v1(tmp_path / "v1")
    flags = ("--eval --split all --finetune", folder / "finetune.pth", "--output_dir", tmp_path, "--num_workers 0")
    data = ("--dataset benv1 --data_path", tmp_path / "v1", "--predictions", tmp_path / "p.csv")
    status, out, err = program(main_finetune, flags, data)
    assert (status, err) == (0, "") and "5.0019" not in out
    assert "from --dataset benv1" in out and "dropped 1 of 3 patches" in out
    model, prepare = pretrained.load(folder / "finetune.pth", "benv1")
    assert prepare.std.flatten().tolist() == pytest.approx([3.1672, 2.9644])
    assert all(torch.equal(value, weights["finetune"][name]) for name, value in model.state_dict().items())
    image = torch.tensor([-20.0, -10.0]).view(1, 2, 1, 1).expand(1, 2, 120, 120)
    with torch.no_grad():
        expected = model(prepare(image)[0]).double().sigmoid()
    np.testing.assert_allclose(pd.read_csv(tmp_path / "p.csv").iloc[0, 20:].to_numpy(float), expected[0], atol=1e-5)
    refused(program(main_finetune, flags, "--data_path", tmp_path / "v1"), "--dataset is missing")


def test_released_pretraining_weights_start_a_run_also_at_another_size(released, tmp_path):
    folder, weights = released
    write_v2(tmp_path / "v2")
    flags = ("--dataset benv2 --data_path", tmp_path / "v2", "--finetune", folder / "pretrain.pth")
    for size, resampled in ((128, False), (64, True)):
        own, name = initial_weights(flags, "--input_size", size), "layers.2.blocks.17.mlp.fc1.weight"
        assert torch.equal(own[name], weights["pretrain"][name])
        table = own["layers.3.blocks.0.attn.relative_position_bias_table"]
        assert (table.shape[0] == 9) == resampled == (own["absolute_pos_embed"].shape[1] == 256)


def test_a_released_flood_model_is_fed_as_it_was_trained_and_its_head_is_replaced_elsewhere(
    released, tmp_path, program
):
    folder, weights = released
    model, prepare = pretrained.load(folder / "flood.pth", "sen12flood")
    assert model.patch_cut == "released" and prepare.input_size == 512 and model.head.out_features == 2
    assert (
        pretrained.load(folder / "flood.pth", "sen12flood", patch_cut="vhvv", force_input=True)[0].patch_cut == "vhvv"
    )
    write_v2(tmp_path / "v2")
    flags = ("--dataset benv2 --data_path", tmp_path / "v2", "--finetune", folder / "flood.pth")
    result = program(main_finetune, flags, "--eval --output_dir", tmp_path)
    refused(result, "classifies 2 classes, but --dataset benv2 has 19")
    own = initial_weights(flags)
    assert own["head.weight"].shape == (19, 1024) and torch.equal(own["norm.weight"], weights["flood"]["norm.weight"])


# ---- Wrong and contradictory input ---------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--dataset benv3", "--dataset"),
        ("--finetune ''", "--dataset is missing"),
        ("--dataset benv2", "--finetune is missing"),
        ("--dataset benv2 --finetune absent.pth", "absent.pth: there is no such checkpoint"),
        ("--dataset benv2 --finetune '' --nb_classes 43", "--nb_classes 43"),
        ("--dataset benv2 --finetune '' --input_size 100", "--input_size"),
        ("--dataset sen12flood --finetune '' --input_size 200", "--input_size 200"),
        ("--dataset benv2 --finetune '' --train_fraction 0", "--train_fraction 0"),
        ("--dataset benv2 --finetune '' --train_fraction 1.5", "--train_fraction 1.5"),
        ("--dataset benv2 --finetune '' --layer_decay 0", "--layer_decay 0"),
        ("--dataset benv2 --finetune '' --mixup 0.8 --batch_size 5", "--batch_size 5: must be even"),
        ("--dataset benv2 --finetune '' --smoothing 1", "--smoothing 1"),
        ("--dataset benv2 --finetune '' --mixup_prob 2", "--mixup_prob 2"),
        ("--dataset benv2 --finetune '' --cutmix_minmax 0.8 0.2", "--cutmix_minmax"),
        ("--dataset benv2 --finetune '' --val_fraction 0.1", "--val_fraction"),
        ("--dataset benv2 --finetune '' --split test", "--split test"),
        ("--dataset benv2 --finetune '' --std 0 1", "--std 0: must be above 0"),
        ("--dataset benv2 --finetune '' --predictions p.csv", "--predictions"),
        ("--dataset benv2 --finetune '' --batch_size 64", "--batch_size 64: the 24 samples"),
        ("--dataset benv2 --eval", "--finetune PATH"),
        ("--eval --finetune {checkpoint} --predictions p.xlsx", "--predictions p.xlsx"),
        ("--eval --finetune {checkpoint} --predictions absent/p.csv", "absent"),
        ("--eval --finetune {checkpoint} --split training", "--split"),
        ("--eval --finetune {checkpoint} --input_size 128", "--input_size 128 (the checkpoint: 64)"),
        ("--eval --finetune {checkpoint} --mean -18 -12", "--mean -18.0 -12.0 (the checkpoint: -19.1966 -12.5144)"),
        ("--eval --finetune {checkpoint} --model mixmim_base", "--model mixmim_base (the checkpoint: mixmim_tiny)"),
        ("--eval --finetune {checkpoint} --dataset sen12flood", "classifies 19 classes"),
        ("--eval --finetune {pretraining}", "has no head"),
        ("--embed features.txt --finetune {pretraining}", "--embed features.txt"),
        ("--eval --finetune {checkpoint} --output_dir {checkpoint}/run", "cannot be written there"),
        ("--eval --finetune {checkpoint} --output_dir {checkpoint}", "is a file; choose a folder"),
        ("--export {checkpoint} --finetune {checkpoint}", "not an empty folder"),
        ("--export {checkpoint}/x --finetune {checkpoint}", "cannot be written there"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing(
    finished, pretraining, tmp_path, monkeypatch, flags, said, finetune
):
    monkeypatch.chdir(tmp_path)
    paths = {"checkpoint": finished[0] / "checkpoint_best.pth", "pretraining": pretraining}
    refused(finetune("--output_dir", tmp_path / "run", flags.format(**paths)), said)
    assert os.listdir(tmp_path) == []


def test_forcing_a_contradiction_is_possible_and_said(finished, tmp_path, finetune):
    flags = ("--eval --finetune", finished[0] / "checkpoint_best.pth", "--input_size 128 --mean -18 -12 --force_input")
    out = completed(finetune(flags))
    assert "forced --input_size 128 (the checkpoint: 64)" in out and "forced --mean -18.0 -12.0" in out
    assert evaluated(tmp_path)["loss"] != evaluated(finished[0])["loss"]


def test_a_checkpoint_fed_otherwise_or_of_other_classes_is_refused(finished, tmp_path, finetune):
    state = load_checkpoint(finished[0] / "checkpoint_best.pth")
    for key, value, said in (
        ("channels", ["VV", "VH"], "trained on VV, VH in dB"),
        ("units", "linear", "in linear"),
        ("classes", list(reversed(CLASSES)), "classifies 19 classes"),
    ):
        torch.save({**state, "input": {**state["input"], key: value}}, tmp_path / "other.pth")
        refused(finetune("--eval --finetune", tmp_path / "other.pth"), "other.pth", said)


def test_training_on_what_is_tested_is_refused(data, tmp_path, program, finetune):
    flags = ("--data_path", data[1], RUN, "--finetune '' --output_dir", tmp_path / "run")
    refused(finetune(flags, "--split train_val"), "11 of 11 samples of split 'val'", "--val_metadata")
    frame = pd.read_parquet(data[3]).drop(columns="split")
    frame.to_csv(tmp_path / "whole.csv", index=False)
    refused(program(main_finetune, flags, "--metadata", tmp_path / "whole.csv"), "48 of 48 samples", "--val_metadata")
    for split in SPLITS:
        pd.read_parquet(data[3]).query("split == @split").drop(columns="split").to_csv(
            tmp_path / f"{split}.csv", index=False
        )
    names = zip(("--metadata", "--val_metadata", "--test_metadata"), SPLITS)
    lists = [(flag, tmp_path / f"{split}.csv") for flag, split in names]
    completed(program(main_finetune, flags, "--epochs 1", lists))


def test_a_best_checkpoint_of_another_run_is_not_reported(finished, pretraining, tmp_path, finetune):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    state = load_checkpoint(folder / "checkpoint_best.pth")
    torch.save({**state, "epoch": 77}, folder / "checkpoint_best.pth")
    (folder / "checkpoint_best.pth.sha256").unlink()
    result = finetune(RUN, "--finetune", pretraining, "--output_dir", folder, "--resume auto")
    refused(result, "holds epoch 77", "--eval")


# ---- A stored result, against accidents ----------------------------------------------------------


class Stripes(torch.utils.data.Dataset):
    """Images with stripes of three kinds, the labels, that no other code of the project has a part in."""

    CLASSES, MEAN, STD = CLASSES, [-20.0, -12.0], [5.0, 4.0]

    def __init__(self, start, count):
        self.start, self.count, self.split = start, count, "golden"
        self.ids = self.groups = np.array([f"{start + i}" for i in range(count)])

    def __len__(self):
        return self.count

    def label_table(self):
        numbers, classes = np.arange(self.start, self.start + self.count)[:, None], np.arange(19)
        return ((numbers >> classes % 5) % 2 * (classes < 5)).astype(np.uint8)

    def __getitem__(self, i):
        row, column = np.mgrid[:120, :120] / 120
        labels = self.label_table()[i]
        noise = np.random.default_rng(self.start + i).normal(0, 1, (2, 120, 120))
        waves = sum(labels[k] * np.sin(2 * np.pi * (3 + 2 * k) * (row if k % 2 else column)) for k in range(5))
        image = np.stack([-20 + 2 * waves, -12 - 2 * waves]) + noise
        return torch.from_numpy(image.astype(np.float32)), torch.from_numpy(labels.astype(np.float32))

    def describe(self):
        return {"fingerprint": str(self.start), "samples": self.count}


def test_golden_metrics_of_a_finetuning(tmp_path, finetune, monkeypatch):
    """Update tests/helpers/golden_finetune.json only with a reason: SARWMIX_UPDATE_GOLDEN=1 python -m pytest tests -k golden."""
    splits = {"train": Stripes(1, 96), "val": Stripes(101, 37), "test": Stripes(201, 37)}
    monkeypatch.setattr(main_finetune, "build_splits", lambda args: splits)
    monkeypatch.setattr(main_finetune, "check_data", lambda dataset, *_, **__: dataset.describe())
    # PyTorch releases differ in the numbers that their truncated normal draws, and in none else that this uses.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, std: torch.nn.init.uniform_(tensor, -std, std))
    status, _, err = finetune(RUN, "--data_path - --finetune '' --epochs 4 --batch_size 8")
    assert (status, err) == (0, "")
    names = ("ap_macro", "ap_micro", "f1_macro", "f1_micro", "loss")
    figures = {
        "train_loss": [round(entry["train_loss"], 6) for entry in log_of(tmp_path)],
        **{name: round(evaluated(tmp_path)[name], 6) for name in names},
    }
    stored = ROOT / "tests" / "helpers" / "golden_finetune.json"
    if os.environ.get("SARWMIX_UPDATE_GOLDEN"):
        stored.write_text(json.dumps(figures, indent=1) + "\n")
    expected = json.loads(stored.read_text())
    assert figures["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-4)
    assert figures == {
        name: pytest.approx(value, rel=2e-2) if name != "train_loss" else figures[name]
        for name, value in expected.items()
    }


# ---- Real samples --------------------------------------------------------------------------------


@needs_samples
def test_real_v1_labels_reach_the_predictions_under_their_names(released, tmp_path, program):
    root = sample_path("benv1", "BigEarthNet-S1-v1.0")
    flags = ("--eval --split all --dataset benv1 --data_path", root, "--finetune", released[0] / "finetune.pth")
    output = ("--num_workers 0 --output_dir", tmp_path, "--predictions", tmp_path / "p.csv")
    status, _, err = program(main_finetune, flags, output)
    assert (status, err) == (0, "")
    frame = pd.read_csv(tmp_path / "p.csv").set_index("id")
    assert len(frame) == 6
    renamed = {
        "Non-irrigated arable land": "Arable land",
        "Discontinuous urban fabric": "Urban fabric",
        "Continuous urban fabric": "Urban fabric",
        "Sea and ocean": "Marine waters",
        "Water bodies": "Inland waters",
        "Transitional woodland/shrub": "Transitional woodland, shrub",
        "Water courses": "Inland waters",
        "Peatbogs": "Inland wetlands",
        "Inland marshes": "Inland wetlands",
    }
    checked = 0
    for patch in frame.index:
        names = json.loads(Path(root, patch, f"{patch}_labels_metadata.json").read_text())["labels"]
        present = {name for name in CLASSES if frame.loc[patch, f"label: {name}"]}
        known = {renamed.get(name, name) for name in names if name in CLASSES or name in renamed}
        assert known <= present and len(present) <= len(names), (names, present)
        checked += len(known)
    assert checked >= 6


@needs_samples
def test_real_v1_patches_finetune(tmp_path, program):
    root = sample_path("benv1", "BigEarthNet-S1-v1.0")
    names = sorted(path.name for path in root.glob("S1*"))
    flags = []
    for flag, part in (("--metadata", names[:2]), ("--val_metadata", names[2:4]), ("--test_metadata", names[4:])):
        flags += [flag, tmp_path / f"{flag}.csv"]
        flags[-1].write_text("".join(f"x,{name}\n" for name in part))
    flags += ["--dataset benv1 --data_path", root, "--finetune '' --output_dir", tmp_path / "run"]
    status, out, err = program(main_finetune, TINY, "--epochs 2 --batch_size 2", flags)
    assert (status, err) == (0, "") and len(log_of(tmp_path / "run")) == 2 and "Best Results Summary" in out
