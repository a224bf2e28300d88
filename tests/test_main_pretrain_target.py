# SPDX-License-Identifier: MIT
"""Pretraining on a multilooked target and with speckle in the input, and the check of what a model has learned."""

import shutil
import sys

import numpy as np
import pytest
import torch

import main_pretrain
from batch_preparation import PretrainingPreparation
from engine_pretrain import best_constant_loss, check_health, complaints, reconstruct
from models_mixmim import mixmim_tiny
from pretrained import load_encoder
from tests.helpers.runs import completed, launch, log_of, refused, same_states
from util.checkpoint import load_checkpoint
from util.speckle import multilook

TINY = (
    "--model mixmim_tiny --input_size 64 --batch_size 8 --num_workers 0 --warmup_epochs 1 --lr 1e-3 --epochs 2 "
    "--log_freq 3 --device cpu"
)
TARGET = "--target multilook --norm_pix_loss --weight_mode shared_intensity --speckle_looks 4"
MEAN, STD = (-19.0, -12.0), (5.0, 4.0)


@pytest.fixture
def pretrain(program, simulated):
    return lambda *flags: program(main_pretrain, "--data_path", simulated, TINY, flags)


@pytest.fixture(scope="module")
def finished(simulated, tmp_path_factory):
    """A run of two epochs, with the default of --looks."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ("--data_path", simulated, TINY, TARGET, "--output_dir", folder)
    assert launch([sys.executable, "main_pretrain.py", flags]).returncode == 0
    return folder


# ---- Target and speckle --------------------------------------------------------------------------


def test_a_run_states_its_target_and_its_encoder_is_like_any_other(finished):
    state = load_checkpoint(finished / "checkpoint.pth")
    assert (state["args"]["target"], state["args"]["looks"], state["args"]["speckle_looks"]) == ("multilook", 8, 4)
    assert state["run"]["looks"] == 8 and len(state["model"]["decoder_pred.bias"]) == 32
    encoder, prepare = load_encoder(finished / "checkpoint.pth")
    maps = encoder.forward_intermediates(prepare(torch.full((1, 2, 64, 64), -15.0))[0])
    assert [m.shape[1] for m in maps] == [32, 64, 128, 256]


def test_a_run_continues_bit_for_bit(finished, tmp_path, pretrain):
    flags = (TARGET, "--output_dir", tmp_path)
    completed(pretrain(flags, "--stop_epoch 1"))
    completed(pretrain(flags, "--resume auto"))
    assert same_states(load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(finished / "checkpoint.pth"))
    whole, parts = (
        [{k: v for k, v in e.items() if k != "train_samples_per_s"} for e in log_of(f)] for f in (finished, tmp_path)
    )
    assert whole == parts


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--looks 4", "--looks 4 (was 8)"),
        ("--target pixels", "--looks None (was 8)"),
        ("--speckle_looks 2", "--speckle_looks 2 (was 4)"),
    ],
)
def test_another_target_is_another_run(finished, tmp_path, pretrain, flags, said):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    refused(pretrain(TARGET, flags, "--output_dir", tmp_path, "--resume auto"), said)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--looks 8", "--looks 8: has no effect on the target pixels; add --target multilook"),
        ("--looks 8 --target pixels", "--looks 8"),
        ("--target multilook --looks 3", "--looks"),
        ("--speckle_looks 0", "--speckle_looks 0"),
        ("--target db", "--target"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, pretrain, flags, said):
    refused(pretrain(flags, "--output_dir", tmp_path / "run"), said)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_target_start_with_a_new_prediction_head(finished, tmp_path, pretrain):
    out = completed(pretrain("--stop_epoch 1 --output_dir", tmp_path, "--finetune", finished / "checkpoint.pth"))
    assert "with a new prediction head, as --looks is 1" in out
    assert load_checkpoint(tmp_path / "checkpoint.pth")["args"]["looks"] is None


def test_pictures_show_the_target_beside_the_original(finished, tmp_path, pretrain):
    look = ("--output_dir", tmp_path, "--inference_samples 4 --inference", finished / "checkpoint.pth")
    completed(pretrain(look))
    arrays = np.load(tmp_path / "inference" / "reconstructions.npz")
    original, target, predicted = (arrays[f"checkpoint/{name}"] for name in ("original", "target", "predicted"))
    expected = multilook(torch.from_numpy(original), 8)
    np.testing.assert_allclose(target[..., ::8, ::8], expected, atol=1e-4)
    for blocks in (target, predicted):  # one value for each 8×8 pixels
        np.testing.assert_array_equal(blocks, blocks[..., ::8, ::8].repeat(8, -1).repeat(8, -2))
    refused(pretrain(look, "--target multilook --looks 4"), "--looks 4 (the checkpoint: 8)")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_the_target_in_db(norm_pix_loss):
    model, images = mixmim_tiny(img_size=64, norm_pix_loss=norm_pix_loss, looks=4), -15 + 5 * torch.randn(2, 2, 64, 64)
    prepare, mask = PretrainingPreparation(64, MEAN, STD, looks=4), torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1)
    model.forward = lambda x, weights, mask, target: (None, model.standardised(target)[0], mask)
    result = reconstruct(model, prepare, images, mask)
    torch.testing.assert_close(result["predicted"], result["target"], rtol=0, atol=1e-4)
    torch.testing.assert_close(result["target"][..., ::4, ::4], multilook(images, 4), rtol=0, atol=1e-4)


# ---- What a model has learned --------------------------------------------------------------------


@pytest.mark.parametrize("looks", [1, 8])
@pytest.mark.parametrize("weight_level", ["token", "pixel"])
def test_the_best_constant_has_the_lowest_loss_of_all(weight_level, looks):
    torch.manual_seed(0)
    model = mixmim_tiny(img_size=64, weight_level=weight_level, looks=looks)
    target = 2 + torch.randn(4, 2, 64 // looks, 64 // looks) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    weights, pred = torch.exp(torch.rand(4, 2, 64, 64)), torch.zeros(4, 4, 2 * (32 // looks) ** 2)
    least, best = best_constant_loss(model, target, weights, pred), pred.clone().requires_grad_(False)
    constants = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([constants], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = model.forward_loss(target, best + constants.repeat(pred.shape[-1] // 2), weights)
        value.backward()
        return value

    optimizer.step(loss)
    assert least == pytest.approx(loss().item(), rel=1e-4) and constants.abs().min() > 1


def test_features_that_are_alike_are_told_from_those_that_differ():
    prepare, mask = PretrainingPreparation(64, MEAN, STD), torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1)
    model, images = mixmim_tiny(img_size=64), -15 + 5 * torch.randn(4, 2, 64, 64)
    tokens = torch.randn(4, 1, 256).expand(-1, 4, -1)  # of four images, each with four equal tokens
    seen = {}
    for name, features in (("images", tokens), ("places", tokens.transpose(0, 1)), ("none", torch.ones(4, 4, 256))):
        model.encode = lambda x, mask=None: features
        seen[name] = check_health(model, prepare, images, mask)
    assert seen["images"]["check_between"] == pytest.approx(1) and seen["images"]["check_variance"] > 0.5
    assert seen["places"]["check_between"] == pytest.approx(0, abs=1e-9) and seen["places"]["check_variance"] > 0.5
    assert seen["none"]["check_variance"] == pytest.approx(0, abs=1e-9)
    assert [any("collapsed" in line for line in complaints(health)) for health in seen.values()] == [False, True, True]


def test_a_collapse_is_warned_of_with_what_to_try(tmp_path, pretrain, monkeypatch):
    monkeypatch.setattr(main_pretrain, "FEWEST_STEPS", 10)
    out = completed(pretrain("--lr 0.3 --output_dir", tmp_path))
    (line,) = [line for line in out.splitlines() if "no better than a constant" in line]
    assert "warning" in line and "--lr" in line
    assert all(entry["check_loss"] > entry["check_constant"] > 0 for entry in log_of(tmp_path))


def test_the_check_does_not_change_the_training(finished, tmp_path, pretrain, monkeypatch):
    monkeypatch.setattr(main_pretrain.Pretraining, "check", lambda self, done, kept: {})
    completed(pretrain(TARGET, "--output_dir", tmp_path))
    assert same_states(load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(finished / "checkpoint.pth"))
