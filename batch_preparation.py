# SPDX-License-Identifier: MIT
"""From a batch of dB images to the model's input: the only place where that is done."""

import torch
import torch.nn.functional as F
from torch import nn

from sarwmix.listing import CHANNELS, UNITS
from sarwmix.plausibility import check_batch
from sarwmix.weighting import WEIGHT_MODES, compute_weights
from util.crop import random_flips

WEIGHT_DOMAINS = ("linear", "standardized")


class BatchPreparation(nn.Module):
    """Resize, flip, weigh and standardise a batch, in this order, on the device it lies on.

    input_size: side of the model's input in pixels. mean, std: dB, in the order of CHANNELS. seed: of the flips.
    weight_mode, exp_scale, weight_clip: as in `compute_weights`. weight_domain: "linear", weights from backscatter as
    the papers say; "standardized", the standardised values are taken for dB, as the released code does.
    Pixels that are NaN or infinite (no data) become the channel's mean, and are counted in `filled`.
    Batches that cannot be dB of Sentinel-1 are refused, where no ids are given: datasets look at what they read themselves.
    On a GPU that is the first batch only, as a look has to wait for it.
    Raises ValueError for an unknown choice or statistics that cannot be.
    """

    CHANNELS, UNITS = CHANNELS, UNITS

    def __init__(
        self,
        input_size,
        mean,
        std,
        seed=0,
        weight_mode="per_channel",
        weight_domain="linear",
        exp_scale=1.0,
        weight_clip=100.0,
    ):
        super().__init__()
        if len(mean) != len(self.CHANNELS) or len(std) != len(self.CHANNELS) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: two values each (VH, VV) are needed, std above 0")
        for name, value, choices in (("mode", weight_mode, WEIGHT_MODES), ("domain", weight_domain, WEIGHT_DOMAINS)):
            if value not in choices:
                raise ValueError(f"weight {name} '{value}' is unknown; choose one of {', '.join(choices)}")
        self.input_size, self.seed = input_size, seed
        self.weight_mode, self.weight_domain = weight_mode, weight_domain
        self.exp_scale, self.weight_clip = exp_scale, weight_clip
        self._looked = False
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def describe(self):
        """How the input is prepared, for a checkpoint: plain values only."""
        return {
            "channels": list(self.CHANNELS),
            "units": self.UNITS,
            "input_size": self.input_size,
            "mean": [round(value, 6) for value in self.mean.flatten().tolist()],
            "std": [round(value, 6) for value in self.std.flatten().tolist()],
        }

    def fill(self, sar_db):
        """Replace no-data pixels by the channel's mean and count them; before resizing, which would spread them."""
        finite = sar_db.isfinite()
        self.filled += finite.numel() - finite.sum()
        return torch.where(finite, sar_db, self.mean)

    def resize(self, images):
        """(B, 2, h, w) → (B, 2, input_size, input_size), bilinear; antialiased only when it shrinks."""
        size = (self.input_size, self.input_size)
        if images.shape[-2:] == size:
            return images
        shrinks = images.shape[-2] > size[0] or images.shape[-1] > size[1]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)

    def standardize(self, sar_db):
        """dB → (x − mean)/std per channel."""
        return (sar_db - self.mean) / self.std

    def to_db(self, x):
        """The inverse of `standardize`."""
        return x * self.std + self.mean

    def weights(self, sar_db):
        """Pixel weights of resized dB images (B, 2, H, W); None for weight mode "none"."""
        if self.weight_mode == "none":
            return None
        taken_for_db = sar_db if self.weight_domain == "linear" else self.standardize(sar_db)
        return compute_weights(taken_for_db, self.weight_mode, self.exp_scale, self.weight_clip)

    @torch.no_grad()
    def forward(self, sar_db, ids=None, epoch=None):
        """(B, 2, h, w) float, dB → (x, weights), both (B, 2, input_size, input_size), float32.

        x is standardised; weights is None for weight mode "none". With ids (B,) int64 and the epoch, the images are
        flipped at random as in training; without, they are not. Raises ValueError for another number of channels, and
        DataError, which is one, for images that cannot be dB.
        """
        if sar_db.ndim != 4 or sar_db.shape[1] != len(self.CHANNELS):
            raise ValueError(f"batch of shape {tuple(sar_db.shape)}; (B, 2, h, w) with VH, VV is needed")
        with torch.autocast(sar_db.device.type, enabled=False):
            sar_db = self.fill(sar_db.float())
            if ids is None and (sar_db.device.type == "cpu" or not self._looked):
                check_batch(
                    sar_db.transpose(0, 1).cpu().numpy(), (self.mean.flatten().tolist(), self.std.flatten().tolist())
                )
                self._looked = True
            sar_db = self.resize(sar_db)
            if ids is not None:
                sar_db = random_flips(sar_db, self.seed, epoch, ids)
            return self.standardize(sar_db), self.weights(sar_db)
