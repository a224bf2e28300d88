# SPDX-License-Identifier: MIT
"""The preparation of a batch of dB images as model input, the same for all programs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sarwmix.listing import CHANNELS, IGNORED, UNITS
from sarwmix.plausibility import check_batch
from sarwmix.weighting import WEIGHT_MODES, compute_weights
from util.crop import random_crop, random_resized_crop
from util.sampling import random_bits
from util.speckle import add_speckle, multilook

WEIGHT_DOMAINS = ("linear", "standardized")


@dataclass(frozen=True)
class Weighting:
    """How the pixel weights are computed. mode, exp_scale, clip: as in `compute_weights`.

    domain: "linear", from backscatter, as in the papers; "standardized", the standardised values are taken for dB, as
    in the released code. Raises ValueError for an unknown choice.
    """

    mode: str = "per_channel"
    domain: str = "linear"
    exp_scale: float = 1.0
    clip: float = 100.0

    def __post_init__(self):
        for name, choices in (("mode", WEIGHT_MODES), ("domain", WEIGHT_DOMAINS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"weight {name} '{getattr(self, name)}' is unknown; choose one of {', '.join(choices)}"
                )


def random_flips(x, seed, epoch, ids):
    """Flip each image left–right and top–bottom, each with probability ½.

    x: (B, C, H, W). ids: (B,) int64, the samples' ids in their dataset. Returns (B, C, H, W).
    """
    bits = random_bits(seed, epoch, ids)
    for bit, axis in ((0, -1), (1, -2)):
        flip = ((bits >> bit) & 1).bool()[:, None, None, None]
        x = torch.where(flip, x.flip(axis), x)
    return x


class BatchPreparation(nn.Module):
    """Resize or crop, flip, weigh and standardise a batch, in this order, on its device.

    input_size: side of the model's input in pixels. mean, std: dB, in the order of CHANNELS. seed: of flips and crops.
    crop_scale: smallest and largest area of a random crop in training, as shares of the image; None: whole images.
    Pixels that are NaN or infinite (no data) become the channel's mean, and are counted in `filled`.
    Without ids, as in evaluation, batches that cannot be Sentinel-1 in dB are refused; datasets check what they read
    for training. On a GPU only the first batch is checked, as the check synchronises. Raises ValueError for impossible
    statistics or crops.
    """

    CHANNELS, UNITS = CHANNELS, UNITS
    RESIZES = True  # whether images become input_size × input_size in evaluation
    COUNTS_ALL = True  # whether `filled` counts pixels in evaluation too

    def __init__(self, input_size, mean, std, seed=0, weighting=Weighting(), crop_scale=None):
        super().__init__()
        if len(mean) != len(self.CHANNELS) or len(std) != len(self.CHANNELS) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: two values each (VH, VV) are needed, std above 0")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale {tuple(crop_scale)}: two shares above 0 and up to 1 are needed, in this order"
            )
        self.input_size, self.seed, self.weighting, self.crop_scale = input_size, seed, weighting, crop_scale
        self._checked = False
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

    def fill(self, sar_db, counted=True):
        """Replace no-data pixels by the channel's mean and count them, unless told not to.

        Done before resizing, which would spread them.
        """
        finite = sar_db.isfinite()
        if counted:
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
        how = self.weighting
        if how.mode == "none":
            return None
        taken_for_db = sar_db if how.domain == "linear" else self.standardize(sar_db)
        return compute_weights(taken_for_db, how.mode, how.exp_scale, how.clip)

    def check_shape(self, sar_db):
        """Raises ValueError unless a batch is (B, 2, h, w)."""
        if sar_db.ndim != 4 or sar_db.shape[1] != len(self.CHANNELS):
            raise ValueError(f"batch of shape {tuple(sar_db.shape)}; (B, 2, h, w) with VH, VV is needed")

    @torch.no_grad()
    def forward(self, sar_db, ids=None, epoch=None):
        """(B, 2, h, w) float, dB → (x, weights), both (B, 2, input_size, input_size), float32.

        x is standardised; weights is None for weight mode "none". ids (B,) int64 and epoch: augment the images, as in
        training; without them the images are only resized. Raises ValueError for another number of channels, and
        DataError for images that cannot be in dB.
        """
        with torch.autocast(sar_db.device.type, enabled=False):
            sar_db = self.arrange(sar_db, ids, epoch)
            return self.standardize(sar_db), self.weights(sar_db)

    def arrange(self, sar_db, ids, epoch):
        """The images of a batch, filled, resized or cropped, and flipped: (B, 2, input_size, input_size), dB."""
        self.check_shape(sar_db)
        sar_db = self.fill(sar_db.float(), counted=self.COUNTS_ALL or ids is not None)
        if ids is None and (sar_db.device.type == "cpu" or not self._checked):
            statistics = self.mean.flatten().tolist(), self.std.flatten().tolist()
            check_batch(sar_db.transpose(0, 1).cpu().numpy(), statistics)
            self._checked = True
        if ids is None or self.crop_scale is None:
            sar_db = self.resize(sar_db)
        else:
            sar_db = random_resized_crop(sar_db, self.input_size, self.seed, epoch, ids, self.crop_scale)
        return sar_db if ids is None else random_flips(sar_db, self.seed, epoch, ids)


class PretrainingPreparation(BatchPreparation):
    """The preparation for pretraining: also the target of the reconstruction, where that is not the input.

    looks: pixels a side that are averaged, in linear power, into one pixel of the target; 1: none. speckle_looks: in
    training, the input is multiplied by speckle of this many looks, and the target is not; None: it is not. Weights are
    those of the images without this speckle. Other arguments as of BatchPreparation. Only training counts `filled`.
    """

    COUNTS_ALL = False

    def __init__(self, *args, looks=1, speckle_looks=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.looks, self.speckle_looks = looks, speckle_looks

    @torch.no_grad()
    def forward(self, sar_db, ids=None, epoch=None):
        """(B, 2, h, w) float, dB → (x, weights, target): x and weights as of BatchPreparation.

        target: (B, 2, input_size/looks, input_size/looks), standardised float32; None where it is x.
        """
        with torch.autocast(sar_db.device.type, enabled=False):
            sar_db = self.arrange(sar_db, ids, epoch)
            x, target = self.standardize(sar_db), None
            if self.looks > 1:
                target = self.standardize(multilook(sar_db, self.looks))
            if self.speckle_looks is not None and ids is not None:
                target = x if target is None else target
                x = self.standardize(add_speckle(sar_db, self.speckle_looks, self.seed, epoch, ids))
            return x, self.weights(sar_db), target


class PixelPreparation(BatchPreparation):
    """The preparation for segmentation: images keep their pixels, and masks are cropped and flipped with them.

    In training, input_size × input_size pixels are cropped at random, at the resolution of the image unless there is a
    crop_scale. Smaller images are padded by the mean, and their masks by IGNORED. In evaluation nothing is cropped or
    resized, values are not checked, as datasets do so, and what is filled is not counted: windows overlap, and reach
    beyond images. Arguments as of BatchPreparation.
    """

    IGNORED, RESIZES = IGNORED, False

    @torch.no_grad()
    def forward(self, sar_db, masks=None, ids=None, epoch=None):
        """(B, 2, h, w) float, dB → (x, masks): standardised float32, and uint8 masks (B, h, w), or None.

        With ids (B,) int64 and epoch, as in training, both are of input_size; without, as they are. Raises ValueError
        for another number of channels.
        """
        self.check_shape(sar_db)
        with torch.autocast(sar_db.device.type, enabled=False):
            x = self.standardize(self.fill(sar_db.float(), counted=ids is not None))
            return (x, masks) if ids is None else self.augment(x, masks, ids, epoch)

    def augment(self, x, masks, ids, epoch):
        """Random crops and flips of standardised images and their masks."""
        short = [max(0, self.input_size - n) for n in x.shape[-2:]]
        x = F.pad(x, (0, short[1], 0, short[0]))
        masks = F.pad(masks, (0, short[1], 0, short[0]), value=IGNORED)[:, None]
        how = self.input_size, self.seed, epoch, ids
        if self.crop_scale is None:
            x, masks = random_crop(x, *how), random_crop(masks, *how)
        else:
            x = random_resized_crop(x, *how, self.crop_scale)
            masks = random_resized_crop(masks.float(), *how, self.crop_scale, mode="nearest").to(masks.dtype)
        return random_flips(x, self.seed, epoch, ids), random_flips(masks, self.seed, epoch, ids)[:, 0]
