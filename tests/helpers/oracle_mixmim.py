# SPDX-License-Identifier: MIT
"""A second, deliberately plain MixMIM pretraining forward, for models_mixmim.py to agree with.

Written to be checked against the papers line by line and for nothing else: no window views, no fused attention, no
shared tricks. Tokens are always in raster order (index = row*grid + column), windows are lists of token numbers, and
the embedding, the position index, softmax, LayerNorm, mixing and unmixing are spelled out. It owns no parameters: it
reads those of the model by their state-dict names, so that gradients of both routes are taken at the same tensors.

Papers: MixMAE (arXiv 2205.13137), Swin (2103.14030), MAE (2111.06377), SAR-W-MixMAE (2503.01181).
"""

import math
from dataclasses import dataclass

import torch

CHANNELS = 2  # VH, VV
EMBED_PATCH = 4  # pixels per side of a stage-1 token
CELL = 32  # pixels per side of a mask cell, which is a stage-4 token and a predicted patch
LN_EPS = 1e-5


@dataclass(frozen=True)
class OracleConfig:
    """The constructor arguments of MixMIM that change what is computed in evaluation mode."""

    img_size: int = 128
    embed_dim: int = 128
    depths: tuple = (2, 2, 18, 2)
    num_heads: tuple = (4, 8, 16, 32)
    window_sizes: tuple = (8, 8, 8, 4)
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = False
    weight_level: str = "token"


# ---- Elementary layers ---------------------------------------------------------------------------


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p, name, x):
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # biased, over the features of one token
    return (x - mean) / torch.sqrt(variance + LN_EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(p, name, x):
    hidden = linear(p, f"{name}.fc1", x)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU, the exact one
    return linear(p, f"{name}.fc2", hidden)


def attention(p, name, x, heads, bias=None, allowed=None):
    """Swin eq. (4), SoftMax(Q K^T / sqrt(d) + B) V, head by head, over all tokens of x (B, N, C).

    bias: (heads, N, N). allowed: (N, N) bool, query i may look at key j; None allows all.
    """
    C = x.shape[-1]
    d = C // heads
    qkv = linear(p, f"{name}.qkv", x)  # (B, N, 3C): all heads of Q, then of K, then of V
    outputs = []
    for h in range(heads):
        q = qkv[:, :, h * d : (h + 1) * d]
        k = qkv[:, :, C + h * d : C + (h + 1) * d]
        v = qkv[:, :, 2 * C + h * d : 2 * C + (h + 1) * d]
        scores = q @ k.transpose(1, 2) / math.sqrt(d)  # (B, N, N), row = query
        if bias is not None:
            scores = scores + bias[h]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        e = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        outputs.append(e / e.sum(dim=-1, keepdim=True) @ v)
    return linear(p, f"{name}.proj", torch.cat(outputs, dim=-1))


# ---- Positions and windows -----------------------------------------------------------------------


def sincos_embedding(dim, grid):
    """MAE's 2-D sin-cos embedding (grid*grid, dim), float64: the first half encodes the column, the second the row."""
    quarter = dim // 4
    table = torch.zeros(grid * grid, dim, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 10000 ** (-i / quarter)
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for part, value in enumerate(values):
                    table[row * grid + column, part * quarter + i] = value
    return table


def relative_position_index(w):
    """Row of the bias table for (query i, key j) of a w*w window, Swin section 3.2: offsets query - key, shifted to >= 0."""
    index = torch.zeros(w * w, w * w, dtype=torch.int64)
    for i in range(w * w):
        for j in range(w * w):
            row_offset = i // w - j // w
            column_offset = i % w - j % w
            index[i, j] = (row_offset + w - 1) * (2 * w - 1) + (column_offset + w - 1)
    return index


def windows(grid, w, columns=None):
    """The token numbers of every non-overlapping w*w window, themselves in raster order within the window.

    columns: of a grid that is not square. Windows that reach beyond the grid hold what is in it.
    """
    columns, found = columns or grid, []
    for top in range(0, grid, w):
        for left in range(0, columns, w):
            rows = range(top, min(top + w, grid))
            found.append([row * columns + column for row in rows for column in range(left, min(left + w, columns))])
    return found


def mask_at(mask, cells, grid):
    """The mask of the cells*cells coarse cells at each token of a grid*grid stage (nearest neighbour), a list of 0/1."""
    tokens_per_cell = grid // cells
    return [
        int(mask[0, (row // tokens_per_cell) * cells + column // tokens_per_cell, 0])
        for row in range(grid)
        for column in range(grid)
    ]


def merge(x, grid, columns=None):
    """Swin patch merging before its LayerNorm: four neighbours side by side, (B, grid*grid, C) -> (B, grid*grid/4, 4C)."""
    B, _, C = x.shape
    image = x.reshape(B, grid, columns or grid, C)
    neighbours = [image[:, row::2, column::2, :] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return torch.cat(neighbours, dim=-1).reshape(B, -1, 4 * C)


# ---- Encoder: MixMAE, "mixed training inputs" and "hierarchical encoder" -------------------------


def embed(p, images):
    """4*4 pixels, all channels, -> one token by one matrix product; then LayerNorm. (B, 2, H, W) -> (B, (H/4)^2, C)."""
    B, _, H, W = images.shape
    kernel = p["patch_embed.proj.weight"]
    kernel = kernel.reshape(kernel.shape[0], -1)  # (C, 2*4*4), inner order channel, row, column
    tokens = []
    for top in range(0, H, EMBED_PATCH):
        for left in range(0, W, EMBED_PATCH):
            pixels = images[:, :, top : top + EMBED_PATCH, left : left + EMBED_PATCH].reshape(B, -1)
            tokens.append(pixels @ kernel.T + p["patch_embed.proj.bias"])
    return layer_norm(p, "patch_embed.norm", torch.stack(tokens, dim=1))


def mix(x, token_mask):
    """Token l of mixed image b comes from image B-1-b where the mask is 1, from image b where it is 0."""
    B = x.shape[0]
    m = torch.tensor(token_mask, dtype=x.dtype)[:, None]  # (tokens, 1)
    return torch.stack([x[b] * (1 - m) + x[B - 1 - b] * m for b in range(B)])


def encoder_block(p, name, x, grid, w, heads, token_mask, columns=None):
    columns = columns or grid
    table = p[f"{name}.attn.relative_position_bias_table"]  # ((2w-1)^2, heads)
    bias = table[relative_position_index(w)].permute(2, 0, 1)  # (heads, w*w, w*w)
    normed = layer_norm(p, f"{name}.norm1", x)
    attended = torch.zeros_like(x)
    for members in windows(grid, w, columns):
        source = torch.tensor([token_mask[t] for t in members])
        same_image = source[:, None] == source[None, :]
        place = [t // columns % w * w + t % columns % w for t in members]  # in the window
        attended[:, members] = attention(
            p, f"{name}.attn", normed[:, members], heads, bias[:, place][:, :, place], same_image
        )
    x = x + attended
    return x + mlp(p, f"{name}.mlp", layer_norm(p, f"{name}.norm2", x))


def encode(p, config, images, mask):
    """(B, 2, H, W) -> (B, L, 8*embed_dim), tokens of the mixed images after the final LayerNorm."""
    cells = config.img_size // CELL
    grid = config.img_size // EMBED_PATCH
    x = mix(embed(p, images), mask_at(mask, cells, grid))
    x = x + fixed_embedding(p, "absolute_pos_embed", config.embed_dim, grid)
    for stage in range(4):
        w = min(config.window_sizes[stage], grid)
        token_mask = mask_at(mask, cells, grid)
        for block in range(config.depths[stage]):
            x = encoder_block(p, f"layers.{stage}.blocks.{block}", x, grid, w, config.num_heads[stage], token_mask)
        if stage < 3:
            x = layer_norm(p, f"layers.{stage}.downsample.norm", merge(x, grid))
            x = linear(p, f"layers.{stage}.downsample.reduction", x)
            grid //= 2
    return layer_norm(p, "norm", x)


def feature_maps(p, config, images):
    """(B, 2, H, W) -> the maps (B, C, h, w) after the blocks of each stage, the last one after the final LayerNorm.

    H and W may differ from img_size: the embedding is resampled, bicubic and antialiased.
    """
    rows, columns = (n // EMBED_PATCH for n in images.shape[2:])
    side = config.img_size // EMBED_PATCH
    x, position = embed(p, images), p["absolute_pos_embed"]
    if (rows, columns) != (side, side):
        image = position.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        image = torch.nn.functional.interpolate(image, (rows, columns), mode="bicubic", antialias=True)
        position = image.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
    x, maps = x + position, []
    for stage in range(4):
        w = min(config.window_sizes[stage], config.img_size // EMBED_PATCH // 2**stage)
        unmasked = [0] * (rows * columns)
        for block in range(config.depths[stage]):
            name = f"layers.{stage}.blocks.{block}"
            x = encoder_block(p, name, x, rows, w, config.num_heads[stage], unmasked, columns)
        maps.append((x if stage < 3 else layer_norm(p, "norm", x)).reshape(len(x), rows, columns, -1))
        if stage < 3:
            x = layer_norm(p, f"layers.{stage}.downsample.norm", merge(x, rows, columns))
            x = linear(p, f"layers.{stage}.downsample.reduction", x)
            rows, columns = rows // 2, columns // 2
    return [image.permute(0, 3, 1, 2) for image in maps]


def fixed_embedding(p, name, dim, grid):
    """The stored embedding, once seen to be the sin-cos one: it was rounded to float32, so its last bits are the model's."""
    stored = p[name]
    expected = sincos_embedding(dim, grid)[None]
    assert (stored.double() - expected).abs().max() < 1e-5, f"{name} is not the sin-cos embedding"
    return stored


# ---- Decoder: MixMAE, "dual reconstruction" ------------------------------------------------------


def decode(p, config, z, mask):
    """(B, L, C4) -> (2B, L, 2048): first the sequences that keep the cells of image b, then those of its partner."""
    z = linear(p, "decoder_embed", z)
    m = mask[0].to(z.dtype)  # (L, 1)
    keeps_own = z * (1 - m) + p["mask_token"] * m
    keeps_partner = z * m + p["mask_token"] * (1 - m)
    x = torch.cat([keeps_own, keeps_partner], dim=0)
    x = x + fixed_embedding(p, "decoder_pos_embed", config.decoder_embed_dim, config.img_size // CELL)
    for block in range(config.decoder_depth):  # plain ViT blocks: every token of a sequence sees every other
        name = f"decoder_blocks.{block}"
        x = x + attention(p, f"{name}.attn", layer_norm(p, f"{name}.norm1", x), config.decoder_num_heads)
        x = x + mlp(p, f"{name}.mlp", layer_norm(p, f"{name}.norm2", x))
    return linear(p, "decoder_pred", layer_norm(p, "decoder_norm", x))


def unmix(rec, mask):
    """Each hidden cell of each image from the sequence that saw the rest of that image. (2B, L, n) -> (B, L, n)."""
    B, L = rec.shape[0] // 2, rec.shape[1]
    images = []
    for b in range(B):
        cells = []
        for cell in range(L):
            if mask[0, cell, 0] == 1:  # hidden from sequence b, whose kept cells are those of image b
                cells.append(rec[b, cell])
            else:  # the kept partner cells of mixed image B-1-b are those of image b
                cells.append(rec[B + (B - 1 - b), cell])
        images.append(torch.stack(cells))
    return torch.stack(images)


# ---- Loss: SAR-W-MixMAE, the polarization-weighted reconstruction loss ---------------------------


def cut(images):
    """(B, 2, H, W) -> (B, L, 32, 32, 2): cells in raster order, then row, column, channel inside the cell."""
    _, _, H, W = images.shape
    cells = []
    for top in range(0, H, CELL):
        for left in range(0, W, CELL):
            cells.append(images[:, :, top : top + CELL, left : left + CELL].permute(0, 2, 3, 1))
    return torch.stack(cells, dim=1)


def weighted_loss(config, pred, images, weights):
    B, L, _ = pred.shape
    target = cut(images)
    weights = torch.ones_like(target) if weights is None else cut(weights)
    if config.norm_pix_loss:  # MAE section 4: every patch by its own statistics, here over both channels together
        values = target.reshape(B, L, -1)
        count = values.shape[-1]
        mean = values.mean(dim=-1, keepdim=True)
        variance = ((values - mean) ** 2).sum(dim=-1, keepdim=True) / (count - 1)
        target = ((values - mean) / torch.sqrt(variance + 1e-6)).reshape(target.shape)
    squared_error = (pred.reshape(target.shape) - target) ** 2
    if config.weight_level == "pixel":
        return (weights * squared_error).mean()
    if config.weight_level == "token":
        total = 0
        for channel in range(CHANNELS):
            W = weights[..., channel].mean(dim=(2, 3))  # (B, L)
            error = squared_error[..., channel].mean(dim=(2, 3))
            total = total + (W * error).sum()
        return total / (B * L * CHANNELS)
    raise ValueError(config.weight_level)


def oracle_forward(params, config, x, weights, mask):
    """Loss and unmixed prediction (B, L, 2048) of images x (B, 2, H, W) under a mask (1, L, 1) of zeros and ones.

    params: name -> tensor, as from named_parameters(). weights: like x, or None for 1. Drop path is not modelled.
    """
    assert x.shape[0] % 2 == 0 or not mask.any(), "the middle image of an odd batch has no partner"
    pred = unmix(decode(params, config, encode(params, config, x, mask), mask), mask)
    return weighted_loss(config, pred, x, weights), pred
