# SPDX-License-Identifier: MIT
"""MixMIM with a window-attention encoder, for two-channel (VH, VV) radar patches.

From leaf to root: token layouts → attention → block → blocks → stage → encoder → MixMIM (encoder + decoder + loss).
An independent implementation from the papers: MixMAE/MixMIM (arXiv 2205.13137), Swin (arXiv 2103.14030),
MAE (arXiv 2111.06377) and SAR-W-MixMAE (arXiv 2503.01181). Parameter names and shapes are those of the released
SAR-W-MixMAE checkpoints.

Notation in shapes: B batch, L tokens of a stage, C channels, h heads, d = C/h, n tokens that attend to each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.pos_embed import get_2d_sincos_pos_embed

CHANNELS = 2  # VH, VV
PATCH = 4  # pixels of an encoder token at stage 1, a side
STRIDE = 32  # pixels of an output token, and of a mask cell, a side


# ---- Token layouts: in which order a stage keeps its tokens, and who attends to whom -------------


@dataclass
class StageLayout:
    """How one stage keeps its L tokens, the same for every image of a batch.

    Windows are not shifted, so the tokens that attend to each other can lie side by side for a whole stage: L is cut
    into groups of n, and attention is plain attention within a group. A group is a window, or, where every mask splits
    the window in two equal halves, the half that came from one image: half the work and no additive mask.
    """

    entry: torch.Tensor  # (L,) or, after a merging, (4L,): where each slot's token(s) lie before the stage
    entry_inverse: torch.Tensor  # its inverse, for the backward pass
    position: torch.Tensor  # (A, n) place in the window of each group's tokens; A = 1: all groups alike
    same_image: torch.Tensor | None  # (A, 1, n, n) additive, 0 or −inf; None: nothing to keep apart


def _group_tokens(grid, window, mask):
    """The order of one stage's tokens: (order (L,): slot → raster position, position (A, n), same_image or None).

    The shapes depend on how many cells are masked, not on which, so that every step of a training has the same.
    """
    raster = torch.arange(grid * grid).view(grid // window, window, grid // window, window)
    windows = raster.transpose(1, 2).reshape(-1, window * window)  # (windows, w²)
    position = torch.arange(window * window)[None]
    if mask is None or bool(mask.all()) or not bool(mask.any()):
        return windows.flatten(), position, None
    cells = int(mask.numel() ** 0.5)
    if (grid // cells) % window == 0:  # a window lies in one cell
        return windows.flatten(), position, None
    from_partner = (
        F.interpolate(mask.view(1, 1, cells, cells).float(), size=(grid, grid), mode="nearest")
        .flatten()
        .bool()[windows]
    )
    if len(windows) == 1 and 2 * int(mask.sum()) == mask.numel():  # one window holds all cells
        position = from_partner.long().argsort(dim=1, stable=True)  # own tokens, then the partner's
        return windows.gather(1, position).flatten(), position.view(2, -1), None
    same = from_partner[:, :, None] == from_partner[:, None, :]
    same_image = torch.zeros(same.shape).masked_fill_(~same, float("-inf"))[:, None]
    return windows.flatten(), position.expand(len(windows), -1), same_image


def stage_layouts(grids, windows, mask=None):
    """Layouts of all stages for one mask, on the CPU.

    grids, windows: side in tokens, per stage. mask: (coarse cells,) bool on the CPU, True = taken from the partner
    image, or None. Returns (list of StageLayout, (L,) order that brings the last stage's tokens back to raster order).
    """
    layouts, previous_slot = [], None
    for grid, window in zip(grids, windows):
        order, position, same_image = _group_tokens(grid, window, mask)
        if previous_slot is None:
            entry = order
        else:  # patch merging reads the 2×2 tokens of the finer grid below each token, in Swin's order
            row, column = order // grid, order % grid
            corners = [(2 * row + r) * 2 * grid + 2 * column + c for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            entry = previous_slot[torch.stack(corners, dim=1)].flatten()
        layouts.append(StageLayout(entry, entry.argsort(), position, same_image))
        previous_slot = order.argsort()
    return layouts, previous_slot


def _sent(t, device):
    """A small tensor on the device, which is not waited for: otherwise every step would wait for the one before it."""
    return t.to(device, non_blocking=True)


class _Reorder(torch.autograd.Function):
    """x[:, order] for a permutation. Its gradient is a gather too; that of indexing would be a scatter with sums."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


# ---- Encoder -------------------------------------------------------------------------------------


def attention_variants(device_type):
    """The ways in which `attend` can compute, the usual one on this type of device ("cpu", "cuda") first.

    "fused": PyTorch's scaled_dot_product_attention. "plain": a product, a softmax and a product, which torch.compile fuses
    with what stands around them. On a CPU no fused kernel gives a learned bias its gradient, and for sequences of 16 to 64
    tokens they are slower in training than the four operations they stand for.
    """
    return ("plain", "fused") if device_type == "cpu" else ("fused", "plain")


def attend(q, k, v, bias=None, variant=None):
    """softmax(q kᵀ/√d + bias) v (1706.03762, eq. 1). q, k, v: (…, n, d); bias: broadcast to (…, n, n), or None.

    variant: of `attention_variants`; None is the usual one. They differ in rounding only.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if (variant or attention_variants(q.device.type)[0]) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention among all tokens of a sequence. variant: of `attend`."""

    variant = None

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        """(B, L, C) → (B, L, C)."""
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, h, L, d)
        return self.proj(attend(q, k, v, variant=self.variant).transpose(1, 2).reshape(B, L, C))


class WindowAttention(Attention):
    """The same within groups of tokens, with Swin's learned relative position bias (2103.14030, eq. 4)."""

    def __init__(self, dim, window, num_heads):
        super().__init__(dim, num_heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        place = torch.arange(window * window)
        row, column = place // window, place % window
        offset = (
            (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
        )  # (w², w²)
        self.register_buffer("relative_position_index", offset)

    def forward(self, x, bias_index, same_image):
        """x (B, L, C) in the stage's order; bias_index (A, n, n); same_image (A, 1, n, n) or None. Returns (B, L, C)."""
        B, L, C = x.shape
        A, n, _ = bias_index.shape
        h = self.num_heads
        # Groups with a bias of their own lie on the head axis, so that the bias is broadcast over the batch, not copied.
        q, k, v = (
            self.qkv(x).view(-1, A, n, 3, h, C // h).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        )  # (B·L/(A·n), A·h, n, d)
        bias = F.embedding(bias_index, self.relative_position_bias_table).permute(0, 3, 1, 2)  # (A, h, n, n)
        if same_image is not None:
            bias = bias + same_image
        x = attend(q, k, v, bias.reshape(1, A * h, n, n), self.variant)
        return self.proj(x.view(-1, A, h, n, C // h).transpose(2, 3).reshape(B, L, C))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)), both with stochastic depth per sample."""

    def __init__(self, dim, attention, mlp_ratio, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, *grouping):
        """x (B, L, C); grouping: what the attention needs besides. Returns (B, L, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), *grouping))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(nn.ModuleList):
    """Blocks on the same tokens, one after the other; what torch.compile makes one graph of.

    grad_checkpointing: keep a block's input only, and do its forward pass again in the backward pass (1604.06174).
    """

    grad_checkpointing = False

    def forward(self, x, *grouping):
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *grouping, use_reentrant=False)
            else:
                x = block(x, *grouping)
        return x


def as_autocast(x):
    """x in the type of autocast where that is on. It leaves sums with float32 alone, and so would keep the sums x + f(x)
    of a stage in float32, or not, by what came before the stage."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class PatchMerging(nn.Module):
    """2×2 tokens → one of twice the channels (2103.14030, section 3.1); also brings them into the next stage's order."""

    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x, layout):
        B, L, C = x.shape
        return self.reduction(self.norm(_Reorder.apply(x, layout.entry, layout.entry_inverse).view(B, L // 4, 4 * C)))


class Stage(nn.Module):
    """The blocks on one grid. `downsample`, None in the last stage, is the merging that follows them."""

    def __init__(self, dim, window, depth, num_heads, mlp_ratio, drop_path, downsample):
        super().__init__()
        self.blocks = Blocks(
            Block(dim, WindowAttention(dim, window, num_heads), mlp_ratio, drop_path[i]) for i in range(depth)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x, layout):
        index = self.blocks[0].attn.relative_position_index  # (w², w²), alike in all blocks
        bias_index = index[layout.position[:, :, None], layout.position[:, None, :]]  # (A, n, n)
        return self.blocks(x, bias_index, layout.same_image)


class MixMIMEncoder(nn.Module):
    """The hierarchical encoder that pretraining and every downstream model share.

    img_size: input side in pixels, a multiple of 32 whose four grids (img_size/4, /8, /16, /32 tokens) the windows
    divide; a window larger than its grid shrinks to the grid. Raises ValueError otherwise.
    """

    def __init__(
        self,
        img_size=128,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_sizes=(8, 8, 8, 4),
        mlp_ratio=4.0,
        drop_path_rate=0.0,
    ):
        super().__init__()
        if img_size < STRIDE or img_size % STRIDE:
            raise ValueError(f"img_size {img_size}: the input side must be a multiple of {STRIDE} pixels")
        self.img_size = img_size
        self.grids = [img_size // PATCH // 2**i for i in range(len(depths))]
        self.windows = [min(window, grid) for window, grid in zip(window_sizes, self.grids)]
        for grid, window in zip(self.grids, self.windows):
            if grid % window:
                raise ValueError(
                    f"img_size {img_size}: its grid of {grid}×{grid} tokens cannot be cut into windows "
                    f"of {window}×{window}; 32, 64, 128, 256, 384 and 512 can"
                )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = dims[-1]
        self.absolute_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(embed_dim, self.grids[0]), requires_grad=False)
        self.patch_embed = PatchEmbed(img_size, PATCH, CHANNELS, embed_dim, norm_layer=nn.LayerNorm)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(depths)
        self.layers = nn.ModuleList(
            Stage(dims[i], self.windows[i], depths[i], num_heads[i], mlp_ratio, rates[i].tolist(), i < len(depths) - 1)
            for i in range(len(depths))
        )
        self.norm = nn.LayerNorm(self.num_features)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    @property
    def attention_variants(self):
        """Of `execute_with`, the usual one where the model lies first."""
        return attention_variants(self.absolute_pos_embed.device.type)

    def execute_with(self, grad_checkpointing=False, compile_mode=None, attention=None):
        """How to compute, not what: time, memory and last bits change. Undoes what an earlier call has set.

        grad_checkpointing: as in `Blocks`. compile_mode: of torch.compile; None is eager execution. attention: of
        `attention_variants`; None is the usual one.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.variant = attention
            if isinstance(module, Blocks):
                module.grad_checkpointing = grad_checkpointing
                module._compiled_call_impl = None  # where nn.Module.compile puts what is called instead
                if compile_mode is not None:
                    module.compile(mode=compile_mode, dynamic=False)
        if compile_mode is not None:
            # All blocks share one code object, which is compiled for each stage, for training and for evaluation. DDP's own
            # splitting of graphs is not needed, as every stage is a graph, and it cannot split one that recomputes.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.optimize_ddp = False

    def encode(self, x, mask=None):
        """Encode a batch of images, mixed beforehand if there is a mask.

        x: (B, 2, H, W), standardised. mask: (L,) bool on the CPU, or None: with a mask, a token attends only to tokens
        of its window that came from the same image. Returns (B, L, C₄), L = (H/32)² in raster order, after the norm.
        """
        layouts, to_raster = stage_layouts(self.grids, self.windows, mask)
        layouts = [
            StageLayout(*(None if t is None else _sent(t, x.device) for t in vars(layout).values()))
            for layout in layouts
        ]
        x = as_autocast(self.patch_embed(x) + self.absolute_pos_embed)
        x = _Reorder.apply(x, layouts[0].entry, layouts[0].entry_inverse)
        for i, stage in enumerate(self.layers):
            x = stage(x, layouts[i])
            if stage.downsample is not None:
                x = stage.downsample(x, layouts[i + 1])
        return _Reorder.apply(self.norm(x), _sent(to_raster, x.device), _sent(to_raster.argsort(), x.device))


# ---- MixMIM: mixed input, decoder, weighted reconstruction loss ----------------------------------


def _at_least_fp32(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class MixMIM(MixMIMEncoder):
    """Masked autoencoder on mixed images (2205.13137), with pixel weights in its loss (2503.01181).

    norm_pix_loss: the target of each token is standardised by its own mean and variance. weight_level: "token": the
    weights are averaged over each token and channel; "pixel": each pixel has its own. range_mask_ratio: a random mask
    covers a share of mask_ratio + U(0, range_mask_ratio) of the cells.
    Raises ValueError for an unknown weight_level or an impossible img_size.
    """

    def __init__(
        self,
        img_size=128,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        range_mask_ratio=0.0,
        norm_pix_loss=False,
        weight_level="token",
        **encoder,
    ):
        super().__init__(img_size, mlp_ratio=mlp_ratio, **encoder)
        if weight_level not in ("token", "pixel"):
            raise ValueError(f"weight_level '{weight_level}' is unknown; choose token or pixel")
        self.norm_pix_loss, self.weight_level, self.range_mask_ratio = norm_pix_loss, weight_level, range_mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            get_2d_sincos_pos_embed(decoder_embed_dim, self.grids[-1]), requires_grad=False
        )
        self.decoder_embed = nn.Linear(self.num_features, decoder_embed_dim)
        self.decoder_blocks = Blocks(
            Block(decoder_embed_dim, Attention(decoder_embed_dim, decoder_num_heads), mlp_ratio)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, STRIDE * STRIDE * CHANNELS)
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def num_cells(self):
        """Mask cells of an image: L = (H/32)²."""
        return self.grids[-1] ** 2

    def draw_mask(self, mask_ratio, generator=None):
        """A random mask (1, L, 1), float on the CPU: 1 in int(L·r) cells, r = mask_ratio + U(0, range_mask_ratio)."""
        ratio = mask_ratio + self.range_mask_ratio * torch.rand((), generator=generator).item()
        mask = torch.zeros(self.num_cells)
        mask[torch.randperm(self.num_cells, generator=generator)[: int(self.num_cells * ratio)]] = 1
        return mask.view(1, -1, 1)

    def patchify(self, images):
        """(B, 2, H, W) → (B, L, 32·32·2): row in patch, column in patch, channel, the channel fastest."""
        B, C, H, _ = images.shape
        g = H // STRIDE
        return images.view(B, C, g, STRIDE, g, STRIDE).permute(0, 2, 4, 3, 5, 1).reshape(B, g * g, -1)

    def unpatchify(self, patches):
        """The inverse of `patchify`: (B, L, 32·32·2) → (B, 2, H, W)."""
        B, L, _ = patches.shape
        g = int(L**0.5)
        x = patches.view(B, g, g, STRIDE, STRIDE, CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, CHANNELS, g * STRIDE, g * STRIDE)

    def mix(self, x, mask):
        """Replace the masked cells of each image by those of its partner, image B−1−i. x (B, 2, H, W), mask (1, L, 1)."""
        g = self.grids[-1]
        cells = _sent(mask.view(1, 1, g, g).bool(), x.device)
        return torch.where(cells.repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3), x.flip(0), x)

    def forward_encoder(self, x, mask):
        """(B, 2, H, W), mask (1, L, 1) → latent (B, L, C₄) of the mixed images.

        The method mixes after the patch embedding; that embeds every 4×4 patch by itself, and a mask cell is made of
        whole patches, so mixing the pixels is the same and touches a quarter of the memory.
        """
        return self.encode(self.mix(x, mask), mask.flatten().bool().cpu())

    def forward_decoder(self, z, mask):
        """Latent (B, L, C₄) of mixed images → prediction (B, L, 32·32·2) of every cell of every image.

        Each mixed image is decoded twice, once with the tokens of either image and mask tokens for the other's.
        """
        z = self.decoder_embed(z)
        mask = mask.to(z)
        mask_token = self.mask_token.to(z)
        z = torch.cat([z * (1 - mask) + mask_token * mask, z * mask + mask_token * (1 - mask)]) + self.decoder_pos_embed
        z = self.decoder_blocks(as_autocast(z))
        own, partner = self.decoder_pred(self.decoder_norm(z)).chunk(2)
        return own * mask + partner.flip(0) * (1 - mask)

    def target(self, x):
        """What is to be predicted: (B, L, 32·32·2) with the mean and the standard deviation taken off each token.

        Returns (target, mean, std); mean 0 and std 1 without norm_pix_loss, else (B, L, 1), the variance unbiased.
        """
        target = self.patchify(_at_least_fp32(x))
        if not self.norm_pix_loss:
            return target, 0.0, 1.0
        mean = target.mean(-1, keepdim=True)
        std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (target - mean) / std, mean, std

    def forward_loss(self, x, pred, weights=None):
        """The polarization-weighted squared error (2503.01181), a scalar in float32.

        x, weights: (B, 2, H, W), weights None means 1; pred (B, L, 32·32·2).
        """
        with torch.autocast(x.device.type, enabled=False):
            B, L, _ = pred.shape
            error = (_at_least_fp32(pred) - self.target(x)[0]).square()
            if weights is None:
                return error.mean()
            if self.weight_level == "pixel":
                return (self.patchify(_at_least_fp32(weights)) * error).mean()
            token_weights = F.avg_pool2d(_at_least_fp32(weights), STRIDE).flatten(2).transpose(1, 2)  # (B, L, 2)
            return (token_weights * error.view(B, L, -1, CHANNELS).mean(2)).mean()

    def forward(self, x, weights=None, mask_ratio=0.5, mask=None):
        """One pretraining pass.

        x: (B, 2, H, W), standardised VH, VV. weights: like x, or None for 1. mask: (1, L, 1), 1 = cell taken from the
        partner image B−1−i; drawn at mask_ratio if not given. B must be even unless the mask is empty, as the middle
        image would be mixed with itself: ValueError.
        Returns loss (scalar, float32), pred (B, L, 32·32·2) of every cell in its own image, mask (1, L, 1).
        """
        if x.shape[1:] != (CHANNELS, self.img_size, self.img_size):
            raise ValueError(
                f"input of shape {tuple(x.shape)}; this model takes (B, 2, {self.img_size}, {self.img_size})"
            )
        if mask is None:
            mask = self.draw_mask(mask_ratio)
        if mask.numel() != self.num_cells:
            raise ValueError(f"mask of shape {tuple(mask.shape)}; this model takes (1, {self.num_cells}, 1)")
        mask = mask.view(1, -1, 1)
        if len(x) % 2 and bool(mask.any()):
            raise ValueError(
                f"batch of {len(x)}: image i is mixed with image B−1−i, so an odd batch would mix its middle "
                f"image with itself; drop one image or use an even batch size"
            )
        z = self.forward_encoder(x, mask)
        mask = _sent(mask.float(), x.device)
        pred = self.forward_decoder(z, mask)
        return self.forward_loss(x, pred, weights), pred, mask


# ---- Sizes ---------------------------------------------------------------------------------------

# What tells the sizes apart: the encoder, which every downstream model shares.
ENCODERS = {
    "mixmim_tiny": dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    "mixmim_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "mixmim_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "mixmim_huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88)),
}


def size_of(weights):
    """The size (key of ENCODERS) of the encoder with these weights, by width and number of blocks; None if it is none of them."""
    kernel = weights.get("patch_embed.proj.weight")
    blocks = {tuple(name.split(".")[1:4:2]) for name in weights if name.startswith("layers.") and ".blocks." in name}
    depths = tuple(sum(stage == str(k) for stage, _ in blocks) for k in range(4))
    return next(
        (
            size
            for size, encoder in ENCODERS.items()
            if kernel is not None and kernel.ndim and (len(kernel), depths) == (encoder["embed_dim"], encoder["depths"])
        ),
        None,
    )


def mixmim_tiny(**kwargs):
    """2.7 M parameters: for a CPU, tests and demonstrations. Not a size of the papers."""
    decoder = dict(decoder_embed_dim=192, decoder_depth=2, decoder_num_heads=6)
    return MixMIM(**{**ENCODERS["mixmim_tiny"], **decoder, **kwargs})


def mixmim_base(**kwargs):
    """113.7 M parameters."""
    return MixMIM(**{**ENCODERS["mixmim_base"], **kwargs})


def mixmim_large(**kwargs):
    """222.3 M parameters."""
    return MixMIM(**{**ENCODERS["mixmim_large"], **kwargs})


def mixmim_huge(**kwargs):
    """683.0 M parameters."""
    return MixMIM(**{**ENCODERS["mixmim_huge"], **kwargs})


SIZES = {
    "mixmim_tiny": mixmim_tiny,
    "mixmim_base": mixmim_base,
    "mixmim_large": mixmim_large,
    "mixmim_huge": mixmim_huge,
}
