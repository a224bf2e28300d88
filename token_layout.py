# SPDX-License-Identifier: MIT
"""Index algebra of tokens: images as patches, the order of the tokens in each stage, and who attends to whom.

Windows are not shifted, so the tokens that attend to each other are stored side by side for a whole stage: the L tokens
are cut into groups of n, and attention is plain attention within a group. A group is a window. Where one
window is the whole stage and half of the cells are masked, a group is the half that comes from one image: half the work
and no additive mask.
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
    """A permutation of tokens: `order(x)` is x[:, index] for x of shape (B, L, C)."""

    index: torch.Tensor  # (L,)
    inverse: torch.Tensor  # (L,), for the backward pass

    @classmethod
    def of(cls, index):
        return cls(index, index.argsort())

    def __call__(self, x):
        return _Gather.apply(x, self.index, self.inverse)

    def to(self, device):
        """Copies the indices to a device without synchronising, so that no training step waits for the one before."""
        return Order(self.index.to(device, non_blocking=True), self.inverse.to(device, non_blocking=True))


@dataclass(frozen=True)
class StageLayout:
    """The order and the groups of one stage's L tokens, the same for every image of a batch."""

    entry: Order  # from raster order, or from the 4L tokens of the stage before: those to be merged lie side by side
    position: torch.Tensor  # (A, n) raster position in the window of each group's tokens; A = 1: all groups are alike
    same_image: torch.Tensor | None  # (A, 1, n, n) additive mask of 0 and −inf; None: nothing to mask

    def to(self, device):
        """Copies the layout to a device without synchronising."""
        same_image = None if self.same_image is None else self.same_image.to(device, non_blocking=True)
        return StageLayout(self.entry.to(device), self.position.to(device, non_blocking=True), same_image)


def stage_layouts(grids, windows, mask=None):
    """The layouts of all stages for one mask, on the CPU.

    grids, windows: side in tokens, per stage. mask: (coarse cells,) bool on the CPU, True = cell taken from the partner
    image, or None. Returns (list of StageLayout, Order from the last stage's order to raster order).
    """
    layouts, slot = [], None  # slot: (L,) raster position → place in the order of the stage before
    for grid, window in zip(grids, windows):
        order, position, same_image = _group_tokens(grid, window, mask)
        if slot is None:
            entry = order
        else:  # the 2×2 tokens of the finer grid below each token, in Swin's order
            row, column = order // grid, order % grid
            corners = [(2 * row + r) * 2 * grid + 2 * column + c for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            entry = slot[torch.stack(corners, dim=1)].flatten()
        layouts.append(StageLayout(Order.of(entry), position, same_image))
        slot = order.argsort()
    return layouts, Order.of(slot)


def _group_tokens(grid, window, mask):
    """(order (L,): place in the stage → raster position, position (A, n), same_image or None) of one stage.

    The shapes depend on the number of masked cells only, which is fixed unless --range_mask_ratio varies it.
    """
    raster = torch.arange(grid * grid).view(grid // window, window, grid // window, window)
    tokens = raster.transpose(1, 2).reshape(-1, window * window)  # (windows, w²)
    position = torch.arange(window * window)[None]
    if mask is None or bool(mask.all()) or not bool(mask.any()):  # all tokens come from one image
        return tokens.flatten(), position, None
    cells = int(mask.numel() ** 0.5)
    if (grid // cells) % window == 0:  # a window lies in one cell
        return tokens.flatten(), position, None
    fine = F.interpolate(mask.view(1, 1, cells, cells).float(), size=(grid, grid), mode="nearest")
    from_partner = fine.flatten().bool()[tokens]  # (windows, w²)
    if len(tokens) == 1 and 2 * int(mask.sum()) == mask.numel():  # one window holds all cells, half of them masked
        position = from_partner.long().argsort(dim=1, stable=True)  # own tokens, then the partner's
        return tokens.gather(1, position).flatten(), position.view(2, -1), None
    same = from_partner[:, :, None] == from_partner[:, None, :]
    same_image = torch.zeros(same.shape).masked_fill_(~same, float("-inf"))[:, None]
    return tokens.flatten(), position.expand(len(tokens), -1), same_image
