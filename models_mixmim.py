# SPDX-License-Identifier: MIT
"""MixMIM with a window-attention encoder, for two-channel (VH, VV) radar patches.

From leaf to root: attention → block → stage → encoder → MixMIM (encoder, decoder and loss) → sizes.
An independent implementation from the papers: MixMAE/MixMIM (arXiv 2205.13137), Swin (arXiv 2103.14030),
MAE (arXiv 2111.06377) and SAR-W-MixMAE (arXiv 2503.01181). Names and shapes of the parameters are those of the
released SAR-W-MixMAE checkpoints.

Shapes: B batch, L tokens of a stage, C channels, h heads, d = C/h; L is cut into groups of n tokens that attend to each
other, of which A have layouts of their own (token_layout.py).
"""

from collections import deque

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, gen_relative_position_index, resample_abs_pos_embed
from torch import nn

from execution import Blocks, Executable, as_autocast, attend
from token_layout import patchify, stage_layouts, unpatchify
from util.pos_embed import get_2d_sincos_pos_embed

CHANNELS = 2  # VH, VV
PATCH = 4  # pixels a side of a token at stage 1
STRIDE = 32  # pixels a side of an output token, and of a mask cell


# ---- Encoder -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention within groups of tokens.

    window: side of the windows in tokens; adds Swin's relative position bias (2103.14030, eq. 4). None: no bias.
    """

    variant = None  # of `attend`

    def __init__(self, dim, num_heads, window=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            self.register_buffer("relative_position_index", gen_relative_position_index((window, window)))  # (w², w²)

    def forward(self, x, bias_index=None, same_image=None):
        """x (B, L, C) in the order of the stage → (B, L, C).

        bias_index: (A, n, n) rows of the bias table; None: one group of all tokens, without bias. same_image:
        (A, 1, n, n) additive mask, or None.
        """
        B, L, C = x.shape
        A, n = (1, L) if bias_index is None else bias_index.shape[:2]
        h = self.num_heads
        # The A groups lie on the head axis, so that their biases are broadcast over the batch and not copied.
        qkv = self.qkv(x).view(-1, A, n, 3, h, C // h).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(2, 3)  # each (B·L/(A·n), A·h, n, d)
        bias = None
        if bias_index is not None:
            bias = F.embedding(bias_index, self.relative_position_bias_table).permute(0, 3, 1, 2)  # (A, h, n, n)
            bias = (bias if same_image is None else bias + same_image).reshape(1, A * h, n, n)
        x = attend(q, k, v, bias, self.variant)
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

    def forward(self, x, bias_index=None, same_image=None):
        x = x + self.drop_path(self.attn(self.norm1(x), bias_index, same_image))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Merges 2×2 tokens into one of twice the channels (2103.14030, section 3.1), in the order of the next stage."""

    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x, layout):
        B, _, C = x.shape
        return self.reduction(self.norm(layout.entry(x).view(B, -1, 4 * C)))  # (B, L/4, 2C)


class Stage(nn.Module):
    """The blocks on one grid. The encoder calls `downsample`, the merging that follows; None in the last stage."""

    def __init__(self, dim, window, num_heads, mlp_ratio, drop_path, downsample):
        super().__init__()
        self.blocks = Blocks(Block(dim, Attention(dim, num_heads, window), mlp_ratio, rate) for rate in drop_path)
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x, layout):
        index = self.blocks[0].attn.relative_position_index  # (w², w²), the same in all blocks
        bias_index = index[layout.position[:, :, None], layout.position[:, None, :]]  # (A, n, n)
        return self.blocks(x, bias_index, layout.same_image)


class MixMIMEncoder(Executable):
    """The hierarchical encoder that pretraining and all downstream models share.

    embed_dim: channels at stage 1, doubled by each further stage. depths, num_heads, window_sizes: per stage. img_size:
    side of the input in pixels, a multiple of 32. The windows must divide the four grids of img_size/4, /8,
    /16 and /32 tokens a side; a window larger than its grid shrinks to the grid. Raises ValueError for other sizes.
    Attributes: out_channels and strides, of the feature maps of `forward_intermediates`.
    """

    def __init__(
        self, embed_dim, depths, num_heads, img_size=128, window_sizes=(8, 8, 8, 4), mlp_ratio=4.0, drop_path_rate=0.0
    ):
        super().__init__()
        if img_size < STRIDE or img_size % STRIDE:
            raise ValueError(f"img_size {img_size}: the input side must be a multiple of {STRIDE} pixels")
        self.img_size, self.mlp_ratio = img_size, mlp_ratio
        self.grids = [img_size // PATCH // 2**i for i in range(len(depths))]
        self.windows = [min(window, grid) for window, grid in zip(window_sizes, self.grids)]
        for grid, window in zip(self.grids, self.windows):
            if grid % window:
                raise ValueError(
                    f"img_size {img_size}: its grid of {grid}×{grid} tokens cannot be cut into windows "
                    f"of {window}×{window}; 32, 64, 128, 256, 384 and 512 can"
                )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features, self.out_channels = dims[-1], dims
        self.strides = [PATCH * 2**i for i in range(len(depths))]  # pixels a side of a token
        self.absolute_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(embed_dim, self.grids[0]), requires_grad=False)
        self.patch_embed = PatchEmbed(
            img_size, PATCH, CHANNELS, embed_dim, norm_layer=nn.LayerNorm, strict_img_size=False
        )
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(depths)
        self.layers = nn.ModuleList(
            Stage(dims[i], self.windows[i], num_heads[i], mlp_ratio, rates[i].tolist(), downsample=i < len(depths) - 1)
            for i in range(len(depths))
        )
        self.norm = nn.LayerNorm(self.num_features)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "relative_position_bias_table"):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def check_input(self, x):
        """Raises ValueError unless x is (B, 2, img_size, img_size)."""
        if x.shape[1:] != (CHANNELS, self.img_size, self.img_size):
            raise ValueError(
                f"input of shape {tuple(x.shape)}; this model takes (B, 2, {self.img_size}, {self.img_size})"
            )

    def layouts(self, mask, size, device):
        """`stage_layouts` for images of size (H, W), on a device: (list of StageLayout, list of Order to raster)."""
        grids = [(size[0] // stride, size[1] // stride) for stride in self.strides]
        layouts, to_raster = stage_layouts(grids, self.windows, mask)
        return [layout.to(device) for layout in layouts], [order.to(device) for order in to_raster]

    def _stages(self, x, layouts):
        """Yields the tokens of each stage, (B, L, C) in its order; those of the last one after the last norm."""
        position, grid = self.absolute_pos_embed, [n // PATCH for n in x.shape[-2:]]
        if grid != [self.grids[0]] * 2:
            position = resample_abs_pos_embed(position, grid, num_prefix_tokens=0)
        x = layouts[0].entry(as_autocast(self.patch_embed(x) + position))  # (B, (H/4)·(W/4), C₁)
        for i, stage in enumerate(self.layers):
            x = stage(x, layouts[i])
            yield x if stage.downsample is not None else self.norm(x)
            if stage.downsample is not None:
                x = stage.downsample(x, layouts[i + 1])

    def encode(self, x, mask=None):
        """Encodes a batch of images, or of mixed images if there is a mask.

        x: (B, 2, H, W), standardised. mask: (L,) bool on the CPU: tokens attend only to tokens of their window that
        come from the same image; None: to all. Returns (B, L, C₄), L = (H/32)² in raster order, after the last norm.
        """
        layouts, to_raster = self.layouts(mask, x.shape[-2:], x.device)
        (tokens,) = deque(self._stages(x, layouts), maxlen=1)
        return to_raster[-1](tokens)

    def forward_intermediates(self, x):
        """Feature maps of images of any size: (B, 2, H, W), standardised → four (B, Cᵢ, H/4·2⁻ⁱ, W/4·2⁻ⁱ).

        Each is in raster order, after the blocks of stage i; the last one after the last norm, as in `encode`. H and W
        may differ from img_size: position embeddings are resampled, and windows that reach beyond a grid attend to what
        is in it. Raises ValueError for an empty batch, and unless H and W are multiples of 32.
        """
        B, C, H, W = x.shape
        if C != CHANNELS or H % STRIDE or W % STRIDE or not x.numel():
            raise ValueError(
                f"images of shape {tuple(x.shape)}; (B, 2, H, W) is needed, one or more, H and W multiples of {STRIDE}"
            )
        layouts, to_raster = self.layouts(None, (H, W), x.device)
        tokens = (order(tokens) for order, tokens in zip(to_raster, self._stages(x, layouts)))
        return [t.transpose(1, 2).reshape(B, -1, H // s, W // s) for t, s in zip(tokens, self.strides)]


# ---- MixMIM: mixed input, decoder, weighted reconstruction loss ----------------------------------


def _at_least_fp32(x):
    return x.float() if x.element_size() < 4 else x


class MixMIM(MixMIMEncoder):
    """Masked autoencoder on mixed images (2205.13137) with pixel weights in its loss (2503.01181).

    norm_pix_loss: standardise the target of each token by its own mean and variance. weight_level: "token": the weights
    are averaged over each token and channel; "pixel": each pixel of the target has its own. range_mask_ratio: a random
    mask covers a share of mask_ratio + U(0, range_mask_ratio) of the cells. looks: pixels a side that are averaged into
    one pixel of the target, a power of two up to 32; 1: the target is the image. encoder: arguments of MixMIMEncoder.
    P below is the number of values of a token in the target, 2·(32/looks)².
    Raises ValueError for an unknown weight_level, impossible looks or an impossible img_size.
    """

    def __init__(
        self,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        range_mask_ratio=0.0,
        norm_pix_loss=False,
        weight_level="token",
        looks=1,
        **encoder,
    ):
        super().__init__(**encoder)
        if looks < 1 or STRIDE % looks:
            raise ValueError(f"looks {looks}: must divide the {STRIDE} pixels of a token")
        if weight_level not in ("token", "pixel"):
            raise ValueError(f"weight_level '{weight_level}' is unknown; choose token or pixel")
        self.norm_pix_loss, self.weight_level, self.range_mask_ratio = norm_pix_loss, weight_level, range_mask_ratio
        self.looks, self.cell = looks, STRIDE // looks  # pixels a side of a token in the target
        dim, grid = decoder_embed_dim, self.grids[-1]
        self.num_cells = grid**2  # mask cells of an image, L = (H/32)²
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(dim, grid), requires_grad=False)
        self.decoder_embed = nn.Linear(self.num_features, dim)
        self.decoder_blocks = Blocks(
            Block(dim, Attention(dim, decoder_num_heads), self.mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, self.cell**2 * CHANNELS)
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def patchify(self, images):
        """Images at the resolution of the target → (B, L, P): row in token, column in token, channel."""
        return patchify(images, self.cell)

    def unpatchify(self, patches):
        """The inverse of `patchify`: (B, L, P) → (B, 2, H/looks, W/looks)."""
        return unpatchify(patches, self.cell)

    def draw_mask(self, mask_ratio, generator=None):
        """A random mask (1, L, 1), float on the CPU: 1 in int(L·r) cells, r = mask_ratio + U(0, range_mask_ratio)."""
        ratio = mask_ratio + self.range_mask_ratio * torch.rand((), generator=generator).item()
        mask = torch.zeros(self.num_cells)
        mask[torch.randperm(self.num_cells, generator=generator)[: int(self.num_cells * ratio)]] = 1
        return mask.view(1, -1, 1)

    def mix(self, x, mask):
        """Replaces the masked cells of image i by those of its partner, image B−1−i. x (B, 2, H, W), mask (1, L, 1)."""
        g = self.grids[-1]
        cells = mask.view(1, 1, g, g).bool().to(x.device, non_blocking=True)
        return torch.where(cells.repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3), x.flip(0), x)

    def forward_encoder(self, x, mask):
        """(B, 2, H, W), mask (1, L, 1) → latent (B, L, C₄) of the mixed images.

        The paper mixes after the patch embedding. That embeds each 4×4 patch by itself and a mask cell consists of
        whole patches, so mixing the pixels gives the same and moves less memory.
        """
        return self.encode(self.mix(x, mask), mask.flatten().bool().cpu())

    def forward_decoder(self, z, mask):
        """Latent (B, L, C₄) of mixed images → prediction (B, L, P) of every cell of every image.

        Each mixed image is decoded twice: the tokens of one image, and mask tokens in place of the other's.
        """
        z = self.decoder_embed(z)
        mask = mask.to(z)
        mask_token = self.mask_token.to(z)
        z = torch.cat([z * (1 - mask) + mask_token * mask, z * mask + mask_token * (1 - mask)]) + self.decoder_pos_embed
        z = self.decoder_blocks(as_autocast(z))  # (2B, L, C)
        own, partner = self.decoder_pred(self.decoder_norm(z)).chunk(2)  # each (B, L, P)
        return own * mask + partner.flip(0) * (1 - mask)

    def standardised(self, target):
        """(values, mean, std) of images (B, 2, H/looks, W/looks): values = (patchify(target) − mean)/std, (B, L, P).

        mean, std: (B, L, 1) of each token, with the unbiased variance; 0 and 1 without norm_pix_loss.
        """
        target = self.patchify(_at_least_fp32(target))
        if not self.norm_pix_loss:
            return target, 0.0, 1.0
        mean = target.mean(-1, keepdim=True)
        std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (target - mean) / std, mean, std

    def forward_loss(self, target, pred, weights=None):
        """The polarization-weighted squared error (2503.01181) of all cells, a scalar in float32.

        target: (B, 2, H/looks, W/looks). weights: (B, 2, H, W), averaged as the target is; None means 1.
        pred: (B, L, P), each cell predicted where it was hidden.
        """
        with torch.autocast(target.device.type, enabled=False):
            B, L, _ = pred.shape
            error = (_at_least_fp32(pred) - self.standardised(target)[0]).square()
            if weights is None:
                return error.mean()
            if self.weight_level == "pixel":
                weights = _at_least_fp32(weights)
                weights = F.avg_pool2d(weights, self.looks) if self.looks > 1 else weights
                return (self.patchify(weights) * error).mean()
            token_weights = F.avg_pool2d(_at_least_fp32(weights), STRIDE).flatten(2).transpose(1, 2)  # (B, L, 2)
            return (token_weights * error.view(B, L, -1, CHANNELS).mean(2)).mean()

    def forward(self, x, weights=None, mask_ratio=0.5, mask=None, target=None):
        """One pretraining pass.

        x: (B, 2, H, W), standardised VH, VV. weights: like x, or None for 1. mask: (1, L, 1), 1 = cell taken from the
        partner image B−1−i; drawn at mask_ratio if not given. target: what is to be predicted,
        (B, 2, H/looks, W/looks), standardised; by default x, which needs looks 1. Returns loss (scalar, float32),
        pred (B, L, P) of every cell in its own image, mask (1, L, 1). Raises ValueError for other shapes, and for an
        odd B unless the mask is empty, as the middle image would be mixed with itself.
        """
        self.check_input(x)
        target = x if target is None else target
        if [n * self.looks for n in target.shape[-2:]] != list(x.shape[-2:]):
            raise ValueError(f"target of {target.shape[-2]} pixels a side; {x.shape[-2] // self.looks} are needed")
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
        mask = mask.float().to(x.device, non_blocking=True)
        pred = self.forward_decoder(z, mask)
        return self.forward_loss(target, pred, weights), pred, mask


# ---- Sizes ---------------------------------------------------------------------------------------

ENCODERS = {  # shared by pretraining and all downstream models
    "mixmim_tiny": dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    "mixmim_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "mixmim_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "mixmim_huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88)),
}


def size_of(weights):
    """The key of ENCODERS whose width and numbers of blocks these weights (a state dict) have, or None."""
    kernel = weights.get("patch_embed.proj.weight")
    blocks = {tuple(name.split(".")[1:4:2]) for name in weights if name.startswith("layers.") and ".blocks." in name}
    depths = tuple(sum(stage == str(k) for stage, _ in blocks) for k in range(4))
    width = len(kernel) if kernel is not None and kernel.ndim else None
    return next((size for size, e in ENCODERS.items() if (e["embed_dim"], e["depths"]) == (width, depths)), None)


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


SIZES = {make.__name__: make for make in (mixmim_tiny, mixmim_base, mixmim_large, mixmim_huge)}
