# SPDX-License-Identifier: MIT
"""Polarization weights of the reconstruction loss."""

import torch

WEIGHT_MODES = ("per_channel", "shared_avg", "shared_intensity", "none")
_EPS = 1e-6


def _percentile(x, q):
    """The q-th percentile over the last axis, interpolated linearly, kept as an axis of 1 (any number of values)."""
    place = q / 100 * (x.shape[-1] - 1)
    low = int(place)
    ordered = x.sort(dim=-1).values
    return torch.lerp(ordered[..., low : low + 1], ordered[..., min(low + 1, x.shape[-1] - 1) :][..., :1], place - low)


def compute_weights(sar_db, mode="per_channel", exp_scale=1.0, clip=100.0):
    """Polarization weights: dark backscatter (water, smooth ground) weighs more.

        x = 10**(sar_db/10);  x~ = (x − min)/(max − min + 1e-6)   per image and channel, over its pixels
        w = exp(exp_scale·(1 − x~))                               in [1, e**exp_scale]

    sar_db: (..., 2, H, W), dB, order VH, VV. mode: "per_channel", each channel by its own weight; "shared_avg", both by
    the mean of the two weights; "shared_intensity", both by the weight of the mean x of VH and VV; "none", 1
    everywhere. clip: percentile at which x is clipped per image and channel before the min–max; 100 as in the papers,
    less keeps one bright target from squeezing all other weights towards e.
    Returns the same shape, float32. Raises ValueError for an unknown mode or a clip outside (0, 100].
    Source: SAR-W-MixMAE, IGARSS 2025 (arXiv 2503.01181), whose weight is "shared_intensity"; JSTARS 19 (2026) for the
    others.
    """
    if mode not in WEIGHT_MODES:
        raise ValueError(f"weight mode '{mode}' is unknown; choose one of {', '.join(WEIGHT_MODES)}")
    if not 0 < clip <= 100:
        raise ValueError(f"weight clip {clip}: a percentile above 0 and up to 100 is needed")
    if mode == "none":
        return torch.ones_like(sar_db, dtype=torch.float32)
    x = torch.pow(10.0, sar_db.float() / 10).flatten(-2)  # (..., 2, H·W)
    if mode == "shared_intensity":
        x = x.mean(-2, keepdim=True)  # (..., 1, H·W)
    if clip < 100:
        x = torch.minimum(x, _percentile(x, clip))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    weights = torch.exp(exp_scale * (1 - (x - low) / (high - low + _EPS)))
    if mode == "shared_avg":
        weights = weights.mean(-2, keepdim=True)
    return weights.expand(*sar_db.shape[:-2], -1).reshape(sar_db.shape)
