# SPDX-License-Identifier: MIT
"""Checkpoints that other programs wrote, and what is found in a checkpoint's place."""

import json
import logging
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import pretrained
from common.errors import UsageError
from models_mixmim import ENCODERS, mixmim_tiny, size_of
from models_mixmim_ft import SIZES
from util.checkpoint import initialise, load_checkpoint

PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.", "module._orig_mod.", "model.backbone.", "net.")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return mixmim_tiny(img_size=64).state_dict()


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def refused(path, *words):
    with pytest.raises(UsageError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and all(word in message for word in words), message


# what a file holds, made of the weights → what the log says of it
FORMS = {
    **{
        f"{prefix} under model": (
            lambda w, prefix=prefix: {"model": prefixed(w, prefix), "epoch": 3},
            f"{prefix.split('.')[-2]}.'",
        )
        for prefix in PREFIXES
    },
    "a compiled block": (
        lambda w: {"model": {name.replace(".blocks.0.", ".blocks.0._orig_mod."): x for name, x in w.items()}},
        "'_orig_mod.'",
    ),
    "state_dict": (lambda w: {"state_dict": w, "optimizer": {}, "args": {"model": "vit"}}, "under 'state_dict'"),
    "the weights alone": (lambda w: w, "at the top"),
    "the weights and a number": (lambda w: {**prefixed(w, "module."), "epoch": 7}, "'module.'"),
    "Lightning": (
        lambda w: {
            "state_dict": {**prefixed(w, "model."), "criterion.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.4.0",
            "epoch": 9,
            "hyper_parameters": {"lr": 1e-3},
        },
        "not used, because the model does not have them: 'criterion.weight'",
    ),
    "DeepSpeed": (lambda w: {"module": w, "global_steps": 4}, "under 'module'"),
    "EMA alone": (lambda w: {"state_dict_ema": w}, "under 'state_dict_ema'"),
    "another EMA alone": (lambda w: {"ema_state_dict": prefixed(w, "module.")}, "under 'ema_state_dict'"),
    "an averaged model": (
        lambda w: {"model_ema": {**prefixed(w, "module."), "n_averaged": torch.tensor(5)}},
        "not used, because the model does not have them: 'n_averaged'",
    ),
    "model and EMA": (
        lambda w: {"model": w, "model_ema": {name: x + 1 for name, x in w.items()}},
        "under 'model_ema', are not used",
    ),
    "a model and its average in one dict": (
        lambda w: {"model": {**w, **prefixed(w, "model_ema.")}},
        "not used, because the model does not have them: 'model_ema.",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_one_reading_of_a_file_is_taken_and_said(form, weights, tmp_path, caplog):
    make, said = FORMS[form]
    torch.save(make(weights), tmp_path / "x.pth")
    state = load_checkpoint(tmp_path / "x.pth")
    assert same(state["model"], weights)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(str(tmp_path / "x.pth")) and said in line, line
    assert ("args" in state, "epoch" in state) == (
        False,
        " under model" in form,
    )  # those of another program mean other things


def test_a_file_of_ours_is_read_without_a_remark(weights, tmp_path, caplog):
    torch.save({"model": weights, "epoch": 3, "args": {"model": "mixmim_tiny"}}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth")["args"] == {"model": "mixmim_tiny"} and not caplog.records


def test_weights_as_safetensors_are_read_whatever_their_file_is_called(weights, tmp_path):
    for name in ("other.safetensors", "x.pth"):
        save_file(weights, tmp_path / name)
        assert same(load_checkpoint(tmp_path / name)["model"], weights)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda w: {"model": {**prefixed(w, "student."), **prefixed(w, "teacher.")}},
            ["2 models", "'student.'", "'teacher.'"],
        ),
        (lambda w: {"state_dict": w, "model_state_dict": w}, ["'state_dict', 'model_state_dict'", "under 'model'"]),
        (
            lambda w: {"model": {**w, "patch_embed._orig_mod.proj.bias": w["patch_embed.proj.bias"]}},
            ["two weights for 'patch_embed.proj.bias'"],
        ),
        (
            lambda w: {"state_dict": {"conv1.weight": torch.ones(1)}},
            ["'state_dict' has no patch_embed.proj.weight, but 'conv1.weight'"],
        ),
        (
            lambda w: {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)},
            ["no 'model', but 'conv1.weight', 'fc.bias'"],
        ),
        (lambda w: {}, ["no 'model', but nothing"]),
    ],
)
def test_where_there_is_not_one_reading_the_error_names_what_is_there(make, words, weights, tmp_path):
    torch.save(make(weights), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", *words)


def test_names_of_another_architecture_are_named(weights):
    with pytest.raises(
        UsageError,
        match=r"x.pth: does not fit this model: it lacks mask_token, .* more, and it has weights that the model lacks, cls_token",
    ):
        initialise(mixmim_tiny(img_size=64), {"model": {"cls_token": torch.ones(1)}}, "x.pth")


def test_a_head_beside_the_encoder_is_the_classifiers(tmp_path):
    classifier = SIZES["mixmim_tiny"](img_size=64, num_classes=19).state_dict()
    parts = {name if name.startswith("head.") else f"backbone.{name}": value for name, value in classifier.items()}
    torch.save({"state_dict": parts}, tmp_path / "x.pth")
    model, prepare = pretrained.load(tmp_path / "x.pth", "benv2")
    assert same(model.state_dict(), classifier) and prepare.input_size == 64


def test_tables_that_are_not_learned_are_computed_where_they_are_missing(weights, caplog):
    source, model = mixmim_tiny(img_size=64), mixmim_tiny(img_size=64)
    source.load_state_dict(weights)
    fixed = [name for name in weights if name.endswith(("relative_position_index", "pos_embed"))]
    assert len(fixed) == 7
    assert initialise(model, {"model": {name: x for name, x in weights.items() if name not in fixed}}, "x.pth") == []
    assert same(model.state_dict(), weights)
    assert "x.pth: lacks absolute_pos_embed, and 6 more; these are computed" in caplog.text
    x, mask = torch.randn(2, 2, 64, 64), torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1)
    assert torch.equal(model(x, mask=mask)[1], source(x, mask=mask)[1])


def test_the_size_of_a_model_is_seen_in_its_weights(weights):
    assert size_of(weights) == "mixmim_tiny" and size_of({}) is None
    for size, encoder in ENCODERS.items():
        blocks = [
            f"layers.{stage}.blocks.{k}.norm1.bias"
            for stage, depth in enumerate(encoder["depths"])
            for k in range(depth)
        ]
        kernel = torch.empty(encoder["embed_dim"], 2, 4, 4)
        assert (
            size_of({"patch_embed.proj.weight": kernel, **dict.fromkeys(blocks), "layers.0.downsample.norm.bias": None})
            == size
        )
        assert size_of({"patch_embed.proj.weight": kernel, **dict.fromkeys(blocks[1:])}) is None
        assert size_of({"patch_embed.proj.weight": kernel[1:], **dict.fromkeys(blocks)}) is None


def test_a_class_that_is_not_allowed_is_named(weights, tmp_path, monkeypatch):
    for name in ("lightning", "lightning.fabric", "lightning.fabric.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("AttributeDict", (dict,), {"__module__": "lightning.fabric.data"})
    sys.modules["lightning.fabric.data"].AttributeDict = kind
    torch.save({"state_dict": prefixed(weights, "model."), "hyper_parameters": kind(lr=1e-3)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "refused", "lightning.fabric.data.AttributeDict", "save only the weights")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", ["Git LFS", "git lfs pull"]),
        (b"<!DOCTYPE html>\n<html>", ["a web page", "/resolve/"]),
        (b"\n  <html lang=en>", ["a web page"]),
    ],
)
def test_what_stands_in_a_checkpoints_place_is_called_by_its_name(content, words, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", *words)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"args": {}, "input": {}, "epoch": 0}))
    (tmp_path / "folder" / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="folder/model.safetensors: a"):
        load_checkpoint(tmp_path / "folder")
