# SPDX-License-Identifier: MIT
"""Random flips of image tensors, as a function of (seed, epoch, sample id).

A sample is flipped alike whoever loads it: the number of workers and of ranks, the batch it falls in and the place
where a run was stopped do not matter, and no random state has to be saved.
"""

import torch


def _int64(value):
    """An unsigned 64-bit constant as the signed integer of the same bits, which is what torch.int64 holds."""
    return value - 2**64 if value >= 2**63 else value


def _scramble(z):
    """The finalizer of SplitMix64 on int64 tensors (Steele, Lea, Flood: Fast splittable PRNGs, OOPSLA 2014)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _int64(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _int64(0x94D049BB133111EB)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def random_bits(seed, epoch, ids):
    """64 random bits per sample, int64, on the device of `ids` (int64, any shape) and without waiting for it."""
    step = _int64(0x9E3779B97F4A7C15)
    state = torch.full((), seed, dtype=torch.int64, device=ids.device)
    for value in (epoch, ids):
        state = _scramble(state * step + value)
    return _scramble(state + step)


def random_flips(x, seed, epoch, ids):
    """Flip each image left–right and top–bottom, each with probability ½.

    x: (B, C, H, W). ids: (B,) int64, the samples' ids in their dataset. Returns (B, C, H, W).
    """
    bits = random_bits(seed, epoch, ids)
    for bit, axis in ((0, -1), (1, -2)):
        flip = ((bits >> bit) & 1).bool()[:, None, None, None]
        x = torch.where(flip, x.flip(axis), x)
    return x
