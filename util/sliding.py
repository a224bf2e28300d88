# SPDX-License-Identifier: MIT
"""Segments images that are larger than the window of a model: windows that overlap, blended into one result.

Windows lie on a grid; the last of an axis is shifted back to end at the edge of the image. Where they overlap, the
probabilities are averaged with weights that fall linearly towards the edges of each window, where a model sees the
least of the surroundings (the overlap-tile strategy of Ronneberger et al. 2015, U-Net, with blending in place of
cropping).
"""

from dataclasses import dataclass

import torch

from common.errors import UsageError

MOST_OVERLAP = 0.75  # beyond, a pixel would be predicted more than 16 times
ANY_DB = -15.0  # of the window that asks a model for its classes, where the image has no data to ask with


@dataclass(frozen=True)
class Windows:
    """size: side of a window, pixels. overlap: of neighbours, as a share of the size. batch: windows in a batch.

    Raises UsageError for values that cannot be meant.
    """

    size: int
    overlap: float = 0.25
    batch: int = 16

    def __post_init__(self):
        if self.size < 1 or self.batch < 1:
            raise UsageError(f"windows of size {self.size} in batches of {self.batch}: give numbers of at least 1")
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise UsageError(f"overlap {self.overlap:g}: is a share of the window; give one from 0 to {MOST_OVERLAP}")

    @property
    def step(self):
        """Pixels from one window to the next."""
        return max(1, round(self.size * (1 - self.overlap)))

    def starts(self, length):
        """The first pixels of the windows along an axis of this length. A shorter axis has one window, at 0."""
        last = max(length - self.size, 0)
        return [*range(0, last, self.step), last]

    def weights(self, device=None):
        """The weight (size,) float32 of the pixels along an axis: above 0, a ramp over the overlap at both ends, 1."""
        ramp = torch.arange(1, self.size + 1, device=device) / (self.size - self.step + 1)
        return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)


def blended_rows(read, height, width, predict, windows):
    """Yields (row, probabilities (K, rows, width) float32) of an image of height × width, strip by strip from the top.

    read(row, column, height, width) → (2, height, width) float32 in dB, array or tensor, NaN for no data and outside
    of the image; each row is read once, from the top. predict((N, 2, size, size) tensor, as read) → probabilities
    (N, K, size, size) on any device, where the result is too. Windows without data are not predicted, and pixels that
    no other window covers are NaN. Memory is that of one row of windows, whatever the height.
    """
    blend, strip, advance = _Blend(windows, predict), None, 0
    rows = windows.starts(height)
    for row, following in zip(rows, [*rows[1:], height]):
        if strip is None:
            strip = torch.as_tensor(read(0, 0, windows.size, max(width, windows.size)))
        else:  # what is left of the strip before, and new rows below
            new = torch.as_tensor(read(row + windows.size - advance, 0, advance, strip.shape[2]))
            strip = torch.cat([strip[:, advance:], new], 1)
        blend.add(strip)
        advance = following - row
        yield row, blend.take(advance)[:, :, :width]


def blended(image, predict, windows):
    """Probabilities (K, H, W) of an image (2, H, W) in dB, NaN for no data; see `blended_rows`.

    predict is called with windows on the device of the image.
    """
    height, width = image.shape[1:]

    def read(row, column, rows, columns):
        missing = max(row + rows - height, 0), max(column + columns - width, 0)
        part = image[:, row : row + rows, column : column + columns]
        return torch.nn.functional.pad(part, (0, missing[1], 0, missing[0]), value=torch.nan)

    return torch.cat([part for _, part in blended_rows(read, height, width, predict, windows)], 1)


class _Blend:
    """The sums of a strip: of weighted probabilities (K, size, width), and of weights (size, width)."""

    def __init__(self, windows, predict):
        self.windows, self.predict, self.total = windows, predict, None

    def _begin(self, like, width):
        """Makes the sums, for strips of this width and probabilities like these (N, K, size, size)."""
        axis = self.windows.weights(like.device)
        self.weight = axis[:, None] * axis
        self.total = torch.zeros(like.shape[1], self.windows.size, width, device=like.device)
        self.mass = torch.zeros(self.windows.size, width, device=like.device)

    @torch.no_grad()
    def add(self, strip):
        """Predicts the windows of a strip (2, size, width) that hold data, and adds them."""
        size, most = self.windows.size, self.windows.batch
        known = torch.isfinite(strip).any(0).any(0).cpu()
        columns = [column for column in self.windows.starts(strip.shape[2]) if known[column : column + size].any()]
        for some in [columns[start : start + most] for start in range(0, len(columns), most)]:
            found = self.predict(torch.stack([strip[:, :, column : column + size] for column in some])).float()
            if self.total is None:
                self._begin(found, strip.shape[2])
            for column, probabilities in zip(some, found):
                self.total[:, :, column : column + size] += probabilities * self.weight
                self.mass[:, column : column + size] += self.weight
        if self.total is None:  # a strip without data, above all others: how many classes, and on which device?
            self._begin(self.predict(strip.new_full((1, 2, size, size), ANY_DB)), strip.shape[2])

    @torch.no_grad()
    def take(self, rows):
        """The probabilities (K, rows, width) of the first rows, to which nothing more is added; moves on by as many."""
        result = self.total[:, :rows] / self.mass[:rows]  # 0 / 0 where no window has data
        for sums in (self.total, self.mass):
            rest = sums[..., rows:, :].clone()
            sums[..., : rest.shape[-2], :] = rest
            sums[..., rest.shape[-2] :, :] = 0
        return result
