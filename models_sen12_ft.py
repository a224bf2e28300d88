# SPDX-License-Identifier: MIT
"""Flood classifier of image pairs: both images through one encoder, patch by patch, and the difference of their
features.

Names and shapes of the parameters are those of the released flood checkpoint. Source: SAR-W-MixMAE, IEEE JSTARS 2026.
"""

import torch

from models_mixmim import CHANNELS, ENCODERS
from models_mixmim_ft import MixMIMClassifier

PATCH_CUTS, PATCH_OPS = ("vhvv", "released"), ("avg", "max")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} '{value}' is unknown; choose {' or '.join(choices)}")


class MixMIMFloodPair(MixMIMClassifier):
    """Two logits (no flood, flood) from two images of one place.

    patch_cut: how images are cut into patches. "vhvv": a patch consists of VH and VV. "released": as in the released
    code, which views (B, 2, n, n, S, S) as (B·n², 2, S, S) without moving the channel axis, so that the inputs are
    pairs of VH patches, then pairs of VV patches; its checkpoint was trained in this way. patch_op: the default of
    `forward`. encoder: arguments of MixMIMEncoder; img_size is the side of the patches. Raises ValueError for an
    unknown choice.
    """

    def __init__(self, patch_cut="vhvv", patch_op="avg", num_classes=2, **encoder):
        _check_choice("patch_cut", patch_cut, PATCH_CUTS)
        _check_choice("patch_op", patch_op, PATCH_OPS)
        super().__init__(num_classes, **encoder)
        self.patch_cut, self.patch_op = patch_cut, patch_op

    def cut(self, images):
        """(B, 2, H, W) → (B·n, 2, img_size, img_size) patches, image after image, each in raster order.

        Raises ValueError unless H and W are multiples of img_size.
        """
        B, C, H, W = images.shape
        S = self.img_size
        if C != CHANNELS or H % S or W % S:
            raise ValueError(f"images of shape {tuple(images.shape)}; (B, 2, H, W) is needed, H and W multiples of {S}")
        patches = images.view(B, C, H // S, S, W // S, S)
        order = (0, 2, 4, 1, 3, 5) if self.patch_cut == "vhvv" else (0, 1, 2, 4, 3, 5)
        return patches.permute(order).reshape(-1, C, S, S)

    def forward_features(self, img1, img2, patch_op=None):
        """Images (B, 2, H, W) → (B, C₄): |f(img1) − f(img2)| per patch, its mean (avg) or maximum over the patches."""
        if img1.shape != img2.shape:
            raise ValueError(f"images of shapes {tuple(img1.shape)} and {tuple(img2.shape)}; a pair has equal ones")
        patch_op = patch_op or self.patch_op
        _check_choice("patch_op", patch_op, PATCH_OPS)
        features = super().forward_features(self.cut(torch.cat([img1, img2])))  # (2·B·n, C₄)
        first, second = features.view(2, img1.shape[0], -1, self.num_features)
        change = (first - second).abs()  # (B, n, C₄)
        return change.mean(1) if patch_op == "avg" else change.amax(1)

    def forward(self, img1, img2, patch_op=None):
        """Two images of one place, each (B, 2, H, W), standardised VH, VV → logits (B, 2): no flood, flood."""
        return self.head(self.forward_features(img1, img2, patch_op))


def mixmim_tiny(**kwargs):
    """1.5 M parameters. Not a size of the papers."""
    return MixMIMFloodPair(**{**ENCODERS["mixmim_tiny"], **kwargs})


def mixmim_base(**kwargs):
    """86.9 M parameters."""
    return MixMIMFloodPair(**{**ENCODERS["mixmim_base"], **kwargs})


def mixmim_large(**kwargs):
    """195.2 M parameters."""
    return MixMIMFloodPair(**{**ENCODERS["mixmim_large"], **kwargs})


def mixmim_huge(**kwargs):
    """655.2 M parameters."""
    return MixMIMFloodPair(**{**ENCODERS["mixmim_huge"], **kwargs})


SIZES = {make.__name__: make for make in (mixmim_tiny, mixmim_base, mixmim_large, mixmim_huge)}
