# SPDX-License-Identifier: MIT
"""Random crops of image tensors and their masks, as a function of (seed, epoch, sample id)."""

import math

import torch
import torch.nn.functional as F

from util.sampling import random_bits

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of MAE (arXiv 2111.06377) and MixMAE (arXiv 2205.13137)
STREAM = 1  # of `random_bits`


def draw_crops(seed, epoch, ids, scale=SCALE, ratio=RATIO):
    """One crop per sample, all (B,) float32 on the device of `ids`: left, top, width, height as shares of the image's
    sides.

    The area is uniform in `scale`, as a share of the image. The aspect ratio width/height is log-uniform in the part of
    `ratio` in which a crop of this area fits into a square image, and the position is uniform. torchvision instead
    draws area and ratio again until they fit, which a batch on a GPU would have to wait for.
    """
    bits = (random_bits(seed, epoch, ids, STREAM, k) for k in range(4))
    area, shape, x, y = ((b & 0xFFFFFF).float() / 2**24 for b in bits)  # each uniform in [0, 1)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = area.log().clamp(min=math.log(ratio[0])), (-area.log()).clamp(max=math.log(ratio[1]))
    shape = torch.exp(low + (high - low) * shape)
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    return x * (1 - width), y * (1 - height), width, height


def random_crop(images, size, seed, epoch, ids):
    """Crop size × size pixels of each image, at a uniformly random place.

    images: (B, C, H, W) of at least this size. ids: (B,) int64, the samples' ids in their dataset. Returns
    (B, C, size, size), which is the same place for images and masks of the same ids.
    """
    inside = torch.arange(size, device=images.device)
    rows, columns = (
        (random_bits(seed, epoch, ids, STREAM, k) & 0xFFFFFF).mul(side - size + 1).bitwise_right_shift(24)[:, None]
        + inside
        for k, side in zip((3, 2), images.shape[-2:])
    )  # (B, size) each
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(images, size, seed, epoch, ids, scale=SCALE, mode="bilinear"):
    """Crop each image at random and resize the crop to size × size pixels.

    images: (B, C, H, W). ids: (B,) int64, the samples' ids in their dataset. scale: smallest and largest area of a
    crop, as shares of the image. mode: "bilinear", or "nearest" for masks. Returns (B, C, size, size).

    The interpolation of images is bilinear, as in the resizing of whole images. Bicubic, as in MAE, overshoots beside
    the bright point targets of radar images and creates values that are darker than all of their neighbours, which the
    polarization weights would emphasise. Where a crop shrinks, several samples per pixel are averaged.
    """
    largest = max(images.shape[-2:]) * min(1, math.sqrt(scale[1] * RATIO[1]))  # side of a crop, pixels
    oversampling = max(1, math.ceil(largest / size)) if mode == "bilinear" else 1
    place = (torch.arange(size * oversampling, device=images.device) + 0.5) / (size * oversampling)  # (S,)
    left, top, width, height = (share[:, None] for share in draw_crops(seed, epoch, ids, scale))
    x, y = 2 * (left + width * place) - 1, 2 * (top + height * place) - 1  # (B, S), in −1 … 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B, S, S, 2)
    crops = F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)
    return F.avg_pool2d(crops, oversampling) if oversampling > 1 else crops
