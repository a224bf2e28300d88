# SPDX-License-Identifier: MIT
"""Speckle of radar images: averaged away from a target, or added to an input.

Backscatter is averaged, and speckle multiplies it, in linear power, 10**(dB/10).
"""

import torch
import torch.nn.functional as F

from util.sampling import random_bits

STREAM = 2  # of `random_bits`
_BITS = 24  # of a uniform number


def multilook(sar_db, looks):
    """Averages backscatter over looks × looks pixels, in linear power.

    sar_db: (B, C, H, W), dB; H and W are multiples of looks. Returns (B, C, H/looks, W/looks), dB, float32.
    """
    return 10 * F.avg_pool2d(torch.pow(10.0, sar_db.float() / 10), looks).log10()


def gamma_speckle(ids, shape, looks, seed, epoch):
    """Multiplicative speckle of an intensity image of `looks` independent looks: gamma distributed, of mean 1 and
    variance 1/looks, independent in each value.

    ids: (B,) int64, the samples' ids in their dataset, of which with seed and epoch it is a function. shape: of one
    image. Returns (B, *shape), float32, on the device of `ids`, computed without synchronising.
    Source: Goodman, Some fundamental properties of speckle, J. Opt. Soc. Am. 66 (1976); a look is exponentially
    distributed, so that the mean of L looks is −Σ ln uᵢ / L with uᵢ uniform in (0, 1).
    """
    values = torch.arange(torch.Size(shape).numel(), device=ids.device)
    total = torch.zeros(len(ids), len(values), device=ids.device)
    for k in range(looks):
        if k % 2 == 0:
            bits = random_bits(seed, epoch, ids[:, None], STREAM, k // 2, values)
        uniform = ((bits >> (_BITS * (k % 2))) & (2**_BITS - 1)).float().add_(0.5) / 2**_BITS
        total -= uniform.log()
    return (total / looks).view(-1, *shape)


def add_speckle(sar_db, looks, seed, epoch, ids):
    """Multiplies backscatter by `gamma_speckle`. sar_db: (B, C, H, W), dB. Returns the same shape, dB."""
    return sar_db + 10 * gamma_speckle(ids, sar_db.shape[1:], looks, seed, epoch).log10()
