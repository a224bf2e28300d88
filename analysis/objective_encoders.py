# SPDX-License-Identifier: MIT
"""Frozen encoders and their features, for `analysis.objective_study`.

Images are in dB, order VH, VV; NaN pixels count as the mean. B images, C₄ channels of the last stage.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import main_pretrain
from batch_preparation import PixelPreparation, Weighting
from common.errors import DataError
from common.sealed_file import SealedFile
from models_mixmim import PATCH, MixMIMEncoder, size_of
from pretrained import load_encoder
from util.checkpoint_input import LoadedCheckpoint

BATCH = 32  # images, or windows, that are encoded at a time


class Frozen(NamedTuple):
    """An encoder that is not trained further, and the preparation of its input.

    identity: tells its weights from those of others.
    """

    encoder: MixMIMEncoder
    prepare: PixelPreparation
    identity: str


def identity_of(path):
    """SHA-256 of a checkpoint, from the file beside it where there is one, which loading compares."""
    return SealedFile(path).checksum()


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def trained(path, dataset):
    """The Frozen encoder of a checkpoint. dataset: what it was pretrained on. Raises UsageError."""
    return Frozen(*load_encoder(path, dataset, device()), identity_of(path))


def untrained_identity(path, seed):
    """The identity of `untrained`: the model and the input, and not the weights of the checkpoint."""
    config = _flags_of(path)
    return f"untrained, seed {seed}, {config.model}, input {config.input_size}, {config.mean}, {config.std}"


def untrained(path, seed):
    """A Frozen encoder as pretraining with this seed begins with it; model and input are those of a checkpoint.

    Raises DataError for a checkpoint that does not state the flags of its pretraining.
    """
    config = _flags_of(path)
    torch.manual_seed(seed)
    encoder = main_pretrain.build_model(config).eval()
    prepare = PixelPreparation(config.input_size, config.mean, config.std, weighting=Weighting("none")).eval()
    return Frozen(encoder.to(device()), prepare.to(device()), untrained_identity(path, seed))


def _flags_of(path):
    """The flags of the pretraining that wrote a checkpoint, with the input that it states. Raises DataError."""
    checkpoint = LoadedCheckpoint.load(path, size_of)
    config = {"looks": None, **checkpoint.flags(), **checkpoint.stated()}  # older checkpoints lack it
    if not {"model", "input_size", "mean", "std", "norm_pix_loss", "weight_level"} <= set(config):
        raise DataError(f"{path}: does not state the flags of its pretraining; name one of main_pretrain.py")
    return argparse.Namespace(**config)


# ---- Features ------------------------------------------------------------------------------------


@torch.no_grad()
def whole_features(frozen, images):
    """(B, 2, H, W) → (B, C₄): the mean over the tokens of resized images, as main_finetune.py --embed gives it."""
    prepare = frozen.prepare
    images = images.to(prepare.mean.device).float()
    x = prepare.standardize(prepare.resize(prepare.fill(images, counted=False)))
    return frozen.encoder.encode(x).mean(1).cpu()


def windows_of(frozen, images):
    """(B, 2, H, W) → standardised windows (B, n, 2, S, S) of the input size S, in raster order, and (rows, columns).

    Images are padded with the mean on the right and below.
    """
    side, x = frozen.encoder.img_size, frozen.prepare(images.to(frozen.prepare.mean.device))[0]
    B, C, H, W = x.shape
    x = F.pad(x, (0, -W % side, 0, -H % side))
    rows, columns = (n // side for n in x.shape[-2:])
    x = x.view(B, C, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, rows * columns, C, side, side), (rows, columns)


@torch.no_grad()
def window_features(frozen, images):
    """(B, 2, H, W) → (B, n, C₄): the mean over the tokens of each window, at the resolution of the image."""
    x, _ = windows_of(frozen, images)
    parts = [frozen.encoder.encode(part).mean(1) for part in x.flatten(0, 1).split(BATCH)]
    return torch.cat(parts).view(*x.shape[:2], -1).cpu()


@torch.no_grad()
def token_features(frozen, image):
    """An image (2, H, W) → (h, w, ΣCᵢ) float32: the maps of the four stages, the coarser ones by nearest neighbours.

    h, w: of the stride of the first stage, 4, and of the padded image.
    """
    x, (rows, columns) = windows_of(frozen, image[None])
    side = frozen.encoder.img_size // PATCH
    parts = []
    for part in x[0].split(BATCH):
        maps = frozen.encoder.forward_intermediates(part)
        parts.append(torch.cat([F.interpolate(m, size=(side, side), mode="nearest") for m in maps], dim=1))
    x = torch.cat(parts).view(rows, columns, -1, side, side).permute(0, 3, 1, 4, 2)
    return x.reshape(rows * side, columns * side, -1).cpu().numpy()


def of_all(dataset, describe):
    """(N, images of a sample, …) float32: describe(images (B, 2, H, W)) of all images, each distinct one read once."""
    names, first, place = np.unique(dataset.image_names, return_index=True, return_inverse=True)
    each = dataset.images_per_sample
    parts = np.array_split(first, -(-len(first) // BATCH))
    found = [
        np.asarray(describe(torch.stack([dataset.image(k // each, k % each) for k in part.tolist()])), np.float32)
        for part in parts
    ]
    return np.concatenate(found)[place.reshape(len(dataset), each)]
