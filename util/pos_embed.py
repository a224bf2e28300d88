# SPDX-License-Identifier: MIT
"""Fixed sin-cos position embeddings, and resampling of position-dependent weights for another input size."""

import math

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple


def get_2d_sincos_pos_embed(dim, grid):
    """Fixed 2-D position embedding of a square grid, tokens in raster order.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin(pos·ω), cos(pos·ω)] with ω_i = 10000^(−i/(dim/4)), i = 0 … dim/4 − 1.

    dim: channels, a multiple of 4. grid: side of the grid in tokens. Returns (1, grid², dim), float32.
    Raises ValueError if dim is not a multiple of 4. Source: MAE, arXiv 2111.06377, appendix A.1.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos embedding needs a multiple of 4 channels, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2)
    column = line[None, :, :].expand(grid, grid, dim // 2)
    row = line[:, None, :].expand(grid, grid, dim // 2)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, dim).float()


def _is_square(number):
    return number > 0 and math.isqrt(number) ** 2 == number


def fit_position_weights(state, target):
    """Resample the position-dependent entries of a state dict for a model of another input size.

    Position embeddings are resampled on their grid and relative position bias tables on their grid of offsets
    (bicubic), if their shapes differ from the target's. Entries with another number of heads or channels are left
    unchanged, and `load_state_dict` refuses them. `relative_position_index` holds no weights and is taken from the
    target.

    state, target: state dicts. Returns (a new dict, list of the names that were resampled).
    """
    fitted, resampled = {}, []
    for name, value in state.items():
        wanted = target.get(name)
        if wanted is None or wanted.shape == value.shape:
            fitted[name] = value
        elif name.endswith("relative_position_index"):
            fitted[name] = wanted
        elif (
            name.endswith("pos_embed")
            and value.ndim == 3
            and value.shape[::2] == wanted.shape[::2]
            and _is_square(value.shape[1])
        ):
            grid = math.isqrt(wanted.shape[1])
            fitted[name] = resample_abs_pos_embed(value, [grid, grid], num_prefix_tokens=0)
            resampled.append(name)
        elif (
            name.endswith("relative_position_bias_table")
            and value.ndim == 2
            and value.shape[1] == wanted.shape[1]
            and _is_square(value.shape[0])
        ):
            window = (math.isqrt(wanted.shape[0]) + 1) // 2
            fitted[name] = resize_rel_pos_bias_table_simple(value, (window, window), wanted.shape)
            resampled.append(name)
        else:
            fitted[name] = value
    return fitted, resampled
