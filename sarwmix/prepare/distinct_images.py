# SPDX-License-Identifier: MIT
"""The images that the samples of a dataset are made of, each once: what is packed and what statistics are taken of."""

import numpy as np


class DistinctImages:
    """The distinct images of a dataset, in the order in which its samples first name them.

    names (M,) str; rows (N, k) int64: which of them each sample consists of. A sample of BigEarthNet is one image, one of
    SEN12-FLOOD two, and an image is in many pairs.
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
        """The images start … stop − 1 as a list of a kind, small enough to be sent to another process."""
        return ImageRange(self._dataset, self._sample[start:stop], self._which[start:stop])


class ImageRange:
    """Some of the images of a dataset, one after the other."""

    def __init__(self, dataset, samples, which):
        needed, self._sample = np.unique(samples, return_inverse=True)
        self._dataset, self._which = dataset.portable(needed), which

    def __len__(self):
        return len(self._sample)

    def name(self, m):
        """What image m is called."""
        return str(self._dataset.image_names[self._sample[m], self._which[m]])

    def read(self, m):
        """Image m, (2, H, W) float32 in dB, NaN where the file has no data or no finite value. Raises DataError."""
        return self._dataset.read_image(self._sample[m], self._which[m])
