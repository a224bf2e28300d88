# SPDX-License-Identifier: MIT
"""Segmentation: the pretrained encoder, a feature pyramid on its four stages, and the class of every pixel.

Sources: feature pyramid, Lin et al., arXiv 1612.03144 (torchvision's); head, the semantic branch of Panoptic FPN,
Kirillov et al., arXiv 1901.02446, section 3; a norm on each feature map, as of Swin in dense prediction, arXiv
2103.14030.
"""

from collections import OrderedDict

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from models_mixmim import ENCODERS, MixMIMEncoder

GROUPS = 8  # of the group norms


class PyramidHead(nn.Module):
    """Feature maps of four strides, 4 to 32 → logits at stride 4.

    in_channels: of each map. channels: of the pyramid, a multiple of 8.
    """

    def __init__(self, in_channels, num_classes, channels=128):
        super().__init__()
        self.norms = nn.ModuleList(map(LayerNorm2d, in_channels[:-1]))  # the last map comes after the encoder's norm
        self.pyramid = FeaturePyramidNetwork(list(in_channels), channels)
        self.branches = nn.ModuleList(  # of level i: i times a convolution and twice the size, or one convolution
            nn.ModuleList(self._convolution(channels) for _ in range(max(1, i))) for i in range(len(in_channels))
        )
        self.predict = nn.Conv2d(channels, num_classes, 1)

    @staticmethod
    def _convolution(channels):
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, channels), nn.ReLU()
        )

    def forward(self, maps):
        """Maps (B, Cᵢ, H/4·2⁻ⁱ, W/4·2⁻ⁱ) → logits (B, num_classes, H/4, W/4)."""
        maps = [norm(x) for norm, x in zip(self.norms, maps)] + list(maps[len(self.norms) :])
        levels = self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        total = 0
        for i, (branch, x) in enumerate(zip(self.branches, levels.values())):
            for convolution in branch:
                x = convolution(x)
                if i:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + x
        return self.predict(total)


class MixMIMSegmenter(MixMIMEncoder):
    """Encoder, feature pyramid and a class for each pixel.

    head_channels: of the pyramid. encoder: arguments of MixMIMEncoder; ValueError for an impossible img_size.
    """

    def __init__(self, num_classes=2, head_channels=128, **encoder):
        super().__init__(**encoder)
        self.head = PyramidHead(self.out_channels, num_classes, head_channels)
        self.apply(self._init_weights)

    def forward_features(self, x):
        """(B, 2, H, W), standardised VH, VV → (B, C₄), the mean over the tokens after the last norm."""
        return self.forward_intermediates(x)[-1].mean((2, 3))

    def forward(self, x):
        """(B, 2, H, W), standardised VH, VV → logits (B, num_classes, H, W); bilinear from a quarter of the resolution.

        Raises ValueError unless H and W are multiples of 32.
        """
        logits = self.head(self.forward_intermediates(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def mixmim_tiny(**kwargs):
    """1.9 M parameters with 2 classes. Not a size of the papers."""
    return MixMIMSegmenter(**{**ENCODERS["mixmim_tiny"], "head_channels": 64, **kwargs})


def mixmim_base(**kwargs):
    """88.8 M parameters with 2 classes."""
    return MixMIMSegmenter(**{**ENCODERS["mixmim_base"], **kwargs})


def mixmim_large(**kwargs):
    """197.2 M parameters with 2 classes."""
    return MixMIMSegmenter(**{**ENCODERS["mixmim_large"], **kwargs})


def mixmim_huge(**kwargs):
    """657.5 M parameters with 2 classes."""
    return MixMIMSegmenter(**{**ENCODERS["mixmim_huge"], **kwargs})


SIZES = {make.__name__: make for make in (mixmim_tiny, mixmim_base, mixmim_large, mixmim_huge)}
