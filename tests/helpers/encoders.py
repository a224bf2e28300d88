# SPDX-License-Identifier: MIT
"""Checkpoints of tiny pretrainings that did not happen, and images with masks to evaluate them on."""

import numpy as np
import torch

import main_pretrain
from tests.helpers.dataset_fixtures import write_csv, write_tif

SIDE = 32  # of the input and of the images


def tiny_flags(seed=0):
    words = f"--data_path d --model mixmim_tiny --input_size {SIDE} --batch_size 2 --lr 1e-3 --seed {seed}"
    return main_pretrain.configure(main_pretrain.parse_flags(words.split()))


def tiny_checkpoint(path, seed=0):
    """Writes a checkpoint whose weights are those that a pretraining of this seed starts with."""
    config = tiny_flags(seed)
    training = main_pretrain.build_training(config, torch.device("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": training.model.state_dict(), "args": vars(config), "epoch": 0}
    torch.save(state | {"input": training.prepare.describe()}, path)
    return path


def scene(wet, level=-10):
    """VV and VH of `level` and level − 7 dB over land, 10 dB less over the first rows, which are wet; some noise."""
    values = np.stack([np.full((SIDE, SIDE), v, np.float32) for v in (level, level - 7)])
    values[:, :wet] -= 10
    return values + np.random.default_rng(wet).normal(0, 0.1, values.shape).astype(np.float32)


def masked_images(folder, groups):
    """A folder of --dataset masks. groups: {name: [rows of water in each of its images]}."""
    rows = [("id", "group")]
    for group, images in groups.items():
        for k, wet in enumerate(images):
            name = f"{group}{k}"
            mask = (np.arange(SIDE) < wet).repeat(SIDE).reshape(SIDE, SIDE).astype(np.int16)
            write_tif(folder / "images" / f"{name}.tif", scene(wet), ("VV", "VH"))
            write_tif(folder / "masks" / f"{name}.tif", mask)
            rows.append((name, group))
    write_csv(folder / "classes.csv", [("value", "name"), (0, "land"), (1, "water")])
    write_csv(folder / "metadata.csv", rows)
    return folder
