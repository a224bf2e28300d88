# SPDX-License-Identifier: MIT
"""Multi-label classifier: the pretrained encoder, the mean over its tokens, one linear layer.

Names and shapes of the parameters are those of the released finetuned checkpoints. Source: SAR-W-MixMAE, arXiv
2503.01181.
"""

from torch import nn

from models_mixmim import ENCODERS, MixMIMEncoder


class MixMIMClassifier(MixMIMEncoder):
    """Encoder and linear head. encoder: arguments of MixMIMEncoder; ValueError for an impossible img_size."""

    def __init__(self, num_classes=19, **encoder):
        super().__init__(**encoder)
        self.head = nn.Linear(self.num_features, num_classes)
        self.apply(self._init_weights)

    def forward_features(self, x):
        """(B, 2, img_size, img_size), standardised VH, VV → (B, C₄), the mean over the tokens after the last norm.

        Raises ValueError for another shape.
        """
        self.check_input(x)
        return self.encode(x).mean(1)

    def forward(self, x):
        """(B, 2, img_size, img_size) → logits (B, num_classes)."""
        return self.head(self.forward_features(x))


def mixmim_tiny(**kwargs):
    """1.5 M parameters. Not a size of the papers."""
    return MixMIMClassifier(**{**ENCODERS["mixmim_tiny"], **kwargs})


def mixmim_base(**kwargs):
    """86.9 M parameters with 19 classes; 1024 features."""
    return MixMIMClassifier(**{**ENCODERS["mixmim_base"], **kwargs})


def mixmim_large(**kwargs):
    """195.2 M parameters with 19 classes; 1536 features."""
    return MixMIMClassifier(**{**ENCODERS["mixmim_large"], **kwargs})


def mixmim_huge(**kwargs):
    """655.3 M parameters with 19 classes; 2816 features."""
    return MixMIMClassifier(**{**ENCODERS["mixmim_huge"], **kwargs})


SIZES = {make.__name__: make for make in (mixmim_tiny, mixmim_base, mixmim_large, mixmim_huge)}
