# SPDX-License-Identifier: MIT
"""Our plain re-implementation of the original approach, as the baseline of the benchmarks.

It computes the same numbers as our model without optimisations. Tokens are in raster order, and every block partitions
them into windows and reverses the partition. Attention is a product, a softmax and a product; every block looks up the
bias and builds the mask. Images are mixed after the patch embedding. Each sample is read from two GeoTIFFs, and is
resized, flipped, weighted and standardised on its own. AdamW has PyTorch's defaults, a GPU computes in fp16 with loss
scaling, and the loss is read after every step. Written from the papers (2205.13137, 2103.14030, 2503.01181). It uses
the parameters of a `MixMIM`, so that tests can compare both (tests/benchmarks/test_benchmarks.py).
"""

import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from models_mixmim import CHANNELS, STRIDE
from sarwmix.weighting import compute_weights


def window_partition(x, window):
    """(B, H, W, C) → (B·windows, window², C)."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, C)


def window_reverse(windows, window, H, W):
    """The inverse of `window_partition`."""
    B = len(windows) // (H * W // window // window)
    x = windows.view(B, H // window, W // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


def attention(layer, x, mask=None):
    """Attention within windows, x (W, n, C). mask: (W, n, 1), the image that each token comes from; or None."""
    W, n, C = x.shape
    h = layer.num_heads
    q, k, v = layer.qkv(x).reshape(W, n, 3, h, C // h).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q * (C // h) ** -0.5 @ k.transpose(-2, -1)
    if hasattr(layer, "relative_position_bias_table"):
        bias = layer.relative_position_bias_table[layer.relative_position_index.view(-1)].view(n, n, h)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    if mask is not None:
        same_image = mask * mask.transpose(1, 2) + (1 - mask) * (1 - mask).transpose(1, 2)  # (W, n, n)
        scores = scores - (1 - same_image).unsqueeze(1) * torch.finfo(scores.dtype).max
    x = F.softmax(scores, dim=-1) @ v
    return layer.proj(x.transpose(1, 2).reshape(W, n, C))


def encoder_block(block, x, grid, window, mask):
    """One encoder block on tokens (B, L, C) in raster order. mask: (1, L, 1)."""
    B, L, C = x.shape
    windows = window_partition(block.norm1(x).view(B, grid, grid, C), window)
    of_partner = window_partition(mask.expand(B, -1, -1).reshape(B, grid, grid, 1), window)
    attended = window_reverse(attention(block.attn, windows, of_partner), window, grid, grid)
    x = x + block.drop_path(attended.view(B, L, C))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def merge(layer, x, grid):
    """Patch merging of tokens (B, L, C) in raster order → (B, L/4, 2C)."""
    B, L, C = x.shape
    x = x.view(B, grid, grid, C)
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return layer.reduction(layer.norm(x.view(B, L // 4, 4 * C)))


class ReferenceMixMIM(nn.Module):
    """The plain computation of a `MixMIM`, with the parameters, inputs and outputs of that model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, weights=None, mask_ratio=0.5, mask=None):
        mask = (self.model.draw_mask(mask_ratio) if mask is None else mask).to(x.device)
        pred = self.decode(self.encode(x, mask), mask)
        return self.loss(x, pred, weights), pred, mask

    def encode(self, x, mask):
        m, side = self.model, int(mask.numel() ** 0.5)
        masks = [F.interpolate(mask.view(1, 1, side, side), size=(grid, grid)).view(1, -1, 1) for grid in m.grids]
        x = m.patch_embed(x)
        x = x * (1 - masks[0]) + x.flip(0) * masks[0]
        x = x + m.absolute_pos_embed
        for stage, grid, window, stage_mask in zip(m.layers, m.grids, m.windows, masks):
            for block in stage.blocks:
                x = encoder_block(block, x, grid, window, stage_mask)
            if stage.downsample is not None:
                x = merge(stage.downsample, x, grid)
        return m.norm(x)

    def decode(self, z, mask):
        m = self.model
        z = m.decoder_embed(z)
        token = m.mask_token.expand(*z.shape[:2], -1)
        z = torch.cat([z * (1 - mask) + token * mask, z * mask + token * (1 - mask)]) + m.decoder_pos_embed
        for block in m.decoder_blocks:
            z = z + attention(block.attn, block.norm1(z))
            z = z + block.mlp(block.norm2(z))
        rec = m.decoder_pred(m.decoder_norm(z))
        B = len(rec) // 2
        return rec[:B] * mask + rec[B:].flip(0) * (1 - mask)

    def loss(self, x, pred, weights):
        target = self.model.patchify(x)
        if self.model.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = (pred - target) ** 2
        if weights is None:
            return error.mean()
        weights = self.model.patchify(weights)
        if self.model.weight_level == "token":
            B, L, _ = weights.shape
            weights = weights.view(B, L, STRIDE * STRIDE, CHANNELS).mean(2, keepdim=True)
            weights = weights.expand(-1, -1, STRIDE * STRIDE, -1).reshape(B, L, -1)
        return (weights * error).mean()


def reference_optimizer(model, lr=1e-4, weight_decay=0.05):
    """AdamW with the default implementation of PyTorch; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def reference_loss(model, x, weights, mask, amp):
    """The loss of prepared images, a tensor with gradient. amp: as of --amp."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    with torch.autocast(x.device.type, dtype, enabled=amp != "off"):
        return model(x, weights, mask=mask)[0]


def reference_step(model, optimizer, scaler, x, weights, mask, amp):
    """One training step on prepared images. amp: as of --amp. Returns the loss, a number.

    Like the original approach, it computes the norm of the gradients, reads the loss and synchronises with the GPU.
    """
    loss = reference_loss(model, x, weights, mask, amp)
    value = loss.item()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.norm(torch.stack([torch.norm(p.grad.detach(), 2.0) for p in model.parameters() if p.grad is not None]), 2.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return value


class ReferenceSamples(Dataset):
    """Samples (x, weights) of a dataset, each read from two GeoTIFFs and prepared on the CPU."""

    def __init__(self, dataset, input_size=128):
        self.dataset = dataset
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.MEAN, dataset.STD))
        self.size = (input_size, input_size)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image = F.interpolate(self.dataset.image(i)[None], size=self.size, mode="bilinear", align_corners=False)[0]
        for axis in (-1, -2):
            if random.random() < 0.5:
                image = image.flip(axis)
        return (image - self.mean) / self.std, compute_weights(image)
