# SPDX-License-Identifier: MIT
"""The distinct images of a dataset, for packing and statistics: an image of several samples counts once."""

import numpy as np


class DistinctImages:
    """The distinct images of a dataset, in the order in which its samples first name them.

    names (M,) str; rows (N, images_per_sample) int64: the images of each sample, as indices of names.
    """

    def __init__(self, dataset):
        names = dataset.image_names  # (N, k)
        self._dataset = dataset
        unique, first, inverse = np.unique(names.ravel(), return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.names = unique[order]
        self.rows = np.argsort(order)[inverse].reshape(names.shape)
        self._sample, self._which = np.divmod(first[order], names.shape[1])

    def __len__(self):
        return len(self.names)

    def part(self, start, stop):
        """The images start … stop − 1 as an ImageRange, which is small enough to send to another process."""
        return ImageRange(self._dataset, self._sample[start:stop], self._which[start:stop])


class ImageRange:
    """Some of the images of a dataset, by their number m."""

    def __init__(self, dataset, samples, which):
        needed, self._sample = np.unique(samples, return_inverse=True)
        self._dataset, self._which = dataset.portable(needed), which

    def __len__(self):
        return len(self._sample)

    def name(self, m):
        """The name of image m."""
        return str(self._dataset.image_names[self._sample[m], self._which[m]])

    def read(self, m):
        """Reads image m: (2, H, W) float32 in dB, NaN for no data. Raises DataError."""
        return self._dataset.read_image(self._sample[m], self._which[m])
