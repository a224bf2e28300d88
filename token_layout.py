# SPDX-License-Identifier: MIT
"""Index algebra of tokens: images as patches, the order of the tokens in each stage, and who attends to whom.

Windows are not shifted, so the tokens that attend to each other are stored side by side for a whole stage: the L tokens
are cut into groups of n, and attention is plain attention within a group. A group is a window. Where one
window is the whole stage and half of the cells are masked, a group is the half that comes from one image: half the work
and no additive mask. A grid that windows do not divide is padded at the right and below; nobody attends to padding.
Source: MixMAE, arXiv 2205.13137 (attention within one image); Swin, arXiv 2103.14030 (windows, patch merging).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def patchify(images, side):
    """(B, C, H, H) → (B, L, side·side·C): row in patch, column in patch, channel, the channel fastest.

    L = (H/side)².
    """
    B, C, H, _ = images.shape
    g = H // side
    return images.view(B, C, g, side, g, side).permute(0, 2, 4, 3, 5, 1).reshape(B, g * g, -1)


def unpatchify(patches, side):
    """The inverse of `patchify`: (B, L, side·side·C) → (B, C, H, H)."""
    B, L, _ = patches.shape
    g = int(L**0.5)
    x = patches.view(B, g, g, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, g * side, g * side)


class _Gather(torch.autograd.Function):
    """x[:, index] for a permutation. The gradient is a gather as well; that of indexing is a scatter with sums."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


@dataclass(frozen=True)
class Order:
    """An order of tokens: `order(x)` is x[:, index] for x of shape (B, L, C)."""

    index: torch.Tensor  # (L,)
    inverse: torch.Tensor | None  # (L,), for the backward pass; None where padding is added or removed

    @classmethod
    def of(cls, index, padded=False):
        return cls(index, None if padded else index.argsort())

    def __call__(self, x):
        return x.index_select(1, self.index) if self.inverse is None else _Gather.apply(x, self.index, self.inverse)

    def to(self, device):
        """Copies the indices to a device without synchronising, so that no training step waits for the one before."""
        inverse = None if self.inverse is None else self.inverse.to(device, non_blocking=True)
        return Order(self.index.to(device, non_blocking=True), inverse)


@dataclass(frozen=True)
class StageLayout:
    """The order and the groups of one stage's L tokens, with padding, the same for every image of a batch."""

    entry: Order  # from raster order, or from the 4L tokens of the stage before: those to be merged lie side by side
    position: torch.Tensor  # (A, n) raster position in the window of each group's tokens; A = 1: all groups are alike
    same_image: torch.Tensor | None  # (A, 1, n, n) additive mask of 0 and −inf; None: all tokens are of one image

    def to(self, device):
        """Copies the layout to a device without synchronising."""
        same_image = None if self.same_image is None else self.same_image.to(device, non_blocking=True)
        return StageLayout(self.entry.to(device), self.position.to(device, non_blocking=True), same_image)


def stage_layouts(grids, windows, mask=None):
    """The layouts of all stages for one mask, on the CPU.

    grids: (rows, columns) in tokens, per stage. windows: their sides. mask: (coarse cells,) bool on the CPU, True =
    cell taken from the partner image, or None; only for square grids that windows divide. Returns (list of StageLayout,
    list of the Order from each stage's order to raster order).
    """
    layouts, exits, slot, padded = [], [], None, False  # slot: raster position → place in the order of the stage before
    for (rows, columns), window in zip(grids, windows):
        order, position, same_image = _group_tokens(rows, columns, window, mask)
        real = order >= 0
        padded |= not bool(real.all())
        order = order.clamp(min=0)  # padding holds copies of a token, which nobody attends to
        if slot is None:
            entry = order
        else:  # the 2×2 tokens of the finer grid below each token, in Swin's order
            row, column = order // columns, order % columns
            corners = [(2 * row + r) * 2 * columns + 2 * column + c for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            entry = slot[torch.stack(corners, dim=1)].flatten()
        layouts.append(StageLayout(Order.of(entry, padded), position, same_image))
        slot = torch.empty(rows * columns, dtype=torch.int64)
        slot[order[real]] = torch.arange(len(order))[real]
        exits.append(Order.of(slot, padded))
    return layouts, exits


def _group_tokens(rows, columns, window, mask):
    """(order (L,): place in the stage → raster position, −1 for padding; position (A, n); same_image or None) of one
    stage.

    The shapes depend on the number of masked cells only, which is fixed unless --range_mask_ratio varies it.
    """
    raster = torch.arange(rows * columns).view(rows, columns)
    raster = F.pad(raster, (0, -columns % window, 0, -rows % window), value=-1)
    raster = raster.view(raster.shape[0] // window, window, raster.shape[1] // window, window)
    tokens = raster.transpose(1, 2).reshape(-1, window * window)  # (windows, w²)
    position = torch.arange(window * window)[None]
    if bool((tokens < 0).any()):
        if mask is not None:
            raise ValueError(f"a grid of {rows}×{columns} tokens is padded to windows of {window}: it cannot be masked")
        return tokens.flatten(), position.expand(len(tokens), -1), _unless((tokens >= 0)[:, None, :])
    if mask is None or bool(mask.all()) or not bool(mask.any()):  # all tokens come from one image
        return tokens.flatten(), position, None
    cells = int(mask.numel() ** 0.5)
    if (rows // cells) % window == 0:  # a window lies in one cell
        return tokens.flatten(), position, None
    fine = F.interpolate(mask.view(1, 1, cells, cells).float(), size=(rows, columns), mode="nearest")
    from_partner = fine.flatten().bool()[tokens]  # (windows, w²)
    if len(tokens) == 1 and 2 * int(mask.sum()) == mask.numel():  # one window holds all cells, half of them masked
        position = from_partner.long().argsort(dim=1, stable=True)  # own tokens, then the partner's
        return tokens.gather(1, position).flatten(), position.view(2, -1), None
    same_image = _unless(from_partner[:, :, None] == from_partner[:, None, :])
    return tokens.flatten(), position.expand(len(tokens), -1), same_image


def _unless(allowed):
    """(A, n or 1, n) bool → (A, 1, n, n) additive mask: 0 where a token may attend to another, else −inf."""
    A, _, n = allowed.shape
    return torch.zeros(A, n, n).masked_fill_(~allowed, float("-inf"))[:, None]
