# SPDX-License-Identifier: MIT
"""How a packed store codes values in dB.

float32 is exact; float16 rounds, by up to 0.008 dB between 16 and 32 dB; uint16 is affine, with a scale and an offset
for each part and channel, from its least to its greatest value, so that nothing is clipped and the error is at most
half a step (about 0.001 dB over 100 dB). NaN stands for no data and for values that are not finite; its uint16 code is
NO_DATA.
"""

import numpy as np
import torch

DTYPES = ("uint16", "float16", "float32")
NO_DATA, CODES = 65535, 65534  # of uint16: the code without a value, and the greatest with one


def encode(images, dtype):
    """Codes images in dB, (n, 2, S, S) float32. Returns (codes (n, 2, S, S) of `dtype`, scale (2,), offset (2,)).

    A value is code · scale + offset; values that are not finite become NaN, or NO_DATA.
    """
    finite = np.isfinite(images)
    if dtype != "uint16":
        return np.where(finite, images, np.nan).astype(dtype), [1.0, 1.0], [0.0, 0.0]
    codes, scale, offset = np.full(images.shape, NO_DATA, np.uint16), [], []
    for channel in range(2):
        good = finite[:, channel]
        values = images[:, channel][good].astype(np.float64)
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        low, step = np.float32(low), np.float32((high - low) / CODES) or np.float32(1)  # rounded as a reader has them
        codes[:, channel][good] = np.clip(np.rint((values - np.float64(low)) / np.float64(step)), 0, CODES).astype(
            np.uint16
        )
        scale.append(float(step))
        offset.append(float(low))
    return codes, scale, offset


def as_tensor(codes):
    """Codes as a tensor of the same bits. uint16 becomes int16, as PyTorch supports few operations on uint16."""
    return torch.from_numpy(codes.view(np.int16) if codes.dtype == np.uint16 else codes)


def decode(codes, scale, offset):
    """Decodes an `as_tensor` on its device: (n, 2, S, S) float32 in dB. scale, offset: (n, 2, 1, 1) float32."""
    if codes.dtype != torch.int16:
        return codes.float()
    values = (codes.int() & 0xFFFF).float()
    empty = values == NO_DATA
    # Separate operations, not a fused one, so that the bits equal those of ImageSource.batch on the CPU.
    return values.mul_(scale).add_(offset).masked_fill_(empty, torch.nan)
