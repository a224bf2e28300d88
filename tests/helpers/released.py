# SPDX-License-Identifier: MIT
"""The layout of the released checkpoints, and stand-ins for them: the files themselves are not needed by the tests."""

import argparse

import torch

import models_mixmim_ft
from models_mixmim import mixmim_base


def layout(dim, depths, heads, windows, decoder=None, classes=None, grid=32, cells=16, mlp_ratio=4):
    """name -> (shape, dtype) of a released checkpoint, in its order: of pretraining with a decoder (width, blocks), of
    finetuning with a head for so many classes."""
    entries = {}

    def tensor(name, *shape, dtype=torch.float32):
        entries[name] = (shape, dtype)

    def norm(name, width):
        tensor(f"{name}.weight", width)
        tensor(f"{name}.bias", width)

    def linear(name, n_in, n_out):
        tensor(f"{name}.weight", n_out, n_in)
        tensor(f"{name}.bias", n_out)

    def block(name, width, table=None):
        norm(f"{name}.norm1", width)
        if table:
            w, h = table
            tensor(f"{name}.attn.relative_position_bias_table", (2 * w - 1) ** 2, h)
            tensor(f"{name}.attn.relative_position_index", w * w, w * w, dtype=torch.int64)
        linear(f"{name}.attn.qkv", width, 3 * width)
        linear(f"{name}.attn.proj", width, width)
        norm(f"{name}.norm2", width)
        linear(f"{name}.mlp.fc1", width, mlp_ratio * width)
        linear(f"{name}.mlp.fc2", mlp_ratio * width, width)

    if decoder:
        tensor("mask_token", 1, 1, decoder[0])
    tensor("absolute_pos_embed", 1, grid * grid, dim)
    if decoder:
        tensor("decoder_pos_embed", 1, cells, decoder[0])
    tensor("patch_embed.proj.weight", dim, 2, 4, 4)
    tensor("patch_embed.proj.bias", dim)
    norm("patch_embed.norm", dim)
    for stage in range(4):
        width = dim * 2**stage
        for b in range(depths[stage]):
            block(f"layers.{stage}.blocks.{b}", width, (windows[stage], heads[stage]))
        if stage < 3:
            tensor(f"layers.{stage}.downsample.reduction.weight", 2 * width, 4 * width)
            norm(f"layers.{stage}.downsample.norm", 4 * width)
    norm("norm", 8 * dim)
    if decoder:
        width, blocks = decoder
        linear("decoder_embed", 8 * dim, width)
        for b in range(blocks):
            block(f"decoder_blocks.{b}", width)
        norm("decoder_norm", width)
        linear("decoder_pred", width, 32 * 32 * 2)
    if classes:
        linear("head", 8 * dim, classes)
    return entries


BASE = dict(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), windows=(8, 8, 8, 4))


def write_released(path, **kind):
    """A stand-in for a released mixmim_base checkpoint: names, shapes, a Namespace, an optimizer state, random values.

    kind: decoder or classes, as in `layout`. Returns its state dict.
    """
    generator = torch.Generator().manual_seed(0)
    own = mixmim_base() if "decoder" in kind else models_mixmim_ft.mixmim_base(num_classes=kind["classes"])
    weights = {}
    for name, (shape, dtype) in layout(**BASE, **kind).items():
        if dtype == torch.int64 or name.endswith("pos_embed"):
            weights[name] = own.state_dict()[name]  # fixed, so equal in every checkpoint
        else:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights[name] = centre + 0.05 * torch.randn(shape, generator=generator)
    moments = {name: torch.zeros_like(weights["norm.bias"]) for name in ("exp_avg", "exp_avg_sq")}
    args = argparse.Namespace(
        model="mixmim_base",
        input_size=128,
        batch_size=128,
        epochs=50,
        accum_iter=1,
        lr=None,
        blr=5e-4,
        data_path="/data",
        device="cuda",
        distributed=True,
        gpu=0,
        dist_url="env://",
        nb_classes=1000,
        mask_ratio=0.5,
        norm_pix_loss=True,
        resume="",
        world_size=8,
    )
    torch.save(
        {
            "model": weights,
            "optimizer": {
                "state": {0: {"step": torch.tensor(5.0), **moments}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0], "lr_scale": 0.5}],
            },
            "epoch": 49,
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
            "args": args,
        },
        path,
    )
    return weights
