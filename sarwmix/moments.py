# SPDX-License-Identifier: MIT
"""Mean, standard deviation, range and histogram of pixel values per channel, accumulated and merged exactly."""

import numpy as np

LOWEST, HIGHEST, BIN = -80.0, 40.0, 0.1  # dB, of the histogram; one more bin on each side counts the values beyond
BINS = round((HIGHEST - LOWEST) / BIN)


class Moments:
    """Statistics of the pixels of images in dB, for each of two channels.

    floor_db: value of pixels without backscatter, which count as no data; None if there is none.
    Attributes, (2,) each: count, the number of pixels in the statistics; mean and m2 (sum of squared deviations from
    the mean), float64; lowest; highest; nodata (NaN or floor_db) and infinite, the numbers of other pixels. histogram
    is (2, BINS + 2).
    """

    FIELDS = ("count", "mean", "m2", "lowest", "highest", "nodata", "infinite", "histogram")

    def __init__(self, floor_db=None):
        self.floor_db = floor_db
        self.count, self.nodata, self.infinite = np.zeros((3, 2), np.int64)
        self.mean, self.m2 = np.zeros((2, 2))
        self.lowest, self.highest = np.full(2, np.inf), np.full(2, -np.inf)
        self.histogram = np.zeros((2, BINS + 2), np.int64)

    def add(self, image):
        """Adds an image, (2, H, W) float32 in dB."""
        for channel, values in enumerate(image.reshape(2, -1)):
            lost = (
                np.isnan(values) if self.floor_db is None else np.isnan(values) | (values == np.float32(self.floor_db))
            )
            infinite = np.isinf(values)
            self.nodata[channel] += np.count_nonzero(lost)
            self.infinite[channel] += np.count_nonzero(infinite)
            good = values[~(lost | infinite)].astype(np.float64)
            if good.size:
                mean = good.mean()
                self._join(channel, good.size, mean, np.square(good - mean).sum(), good.min(), good.max())
                bins = np.clip(np.floor((good - LOWEST) / BIN), -1, BINS).astype(np.int64) + 1
                self.histogram[channel] += np.bincount(bins, minlength=BINS + 2)

    def merge(self, other):
        """Adds everything that another Moments has counted."""
        for channel in range(2):
            if other.count[channel]:
                self._join(
                    channel, *(getattr(other, name)[channel] for name in ("count", "mean", "m2", "lowest", "highest"))
                )
        self.nodata += other.nodata
        self.infinite += other.infinite
        self.histogram += other.histogram

    def _join(self, channel, count, mean, m2, lowest, highest):
        # Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979, eq. 2.1
        total = self.count[channel] + count
        apart = mean - self.mean[channel]
        self.m2[channel] += m2 + apart**2 * (self.count[channel] * (count / total))
        self.mean[channel] += apart * (count / total)
        self.count[channel] = total
        self.lowest[channel] = min(self.lowest[channel], lowest)
        self.highest[channel] = max(self.highest[channel], highest)

    def summary(self):
        """{"mean", "std", "min", "max": in dB, "pixels", "nodata", "infinite": counts}, each a list over the channels.

        std is the population standard deviation. Mean, std and range are None for a channel without pixels.
        """
        some = self.count > 0
        std = np.sqrt(self.m2 / np.maximum(self.count, 1))
        figures = {"mean": self.mean, "std": std, "min": self.lowest, "max": self.highest}
        figures = {name: [float(x) if ok else None for x, ok in zip(values, some)] for name, values in figures.items()}
        return figures | {
            "pixels": self.count.tolist(),
            "nodata": self.nodata.tolist(),
            "infinite": self.infinite.tolist(),
        }

    def histogram_dict(self):
        """The histogram as plain values; bin i counts pixels in [lowest + i·width, lowest + (i + 1)·width) dB."""
        return {
            "lowest": LOWEST,
            "width": BIN,
            "below": self.histogram[:, 0].tolist(),
            "above": self.histogram[:, -1].tolist(),
            "counts": self.histogram[:, 1:-1].tolist(),
        }

    def to_dict(self):
        """All attributes as plain values, from which `from_dict` restores the same object; floats are kept exactly."""
        return {"floor_db": self.floor_db, **{name: getattr(self, name).tolist() for name in self.FIELDS}}

    @classmethod
    def from_dict(cls, values):
        moments = cls(values["floor_db"])
        for name in cls.FIELDS:
            setattr(moments, name, np.array(values[name], getattr(moments, name).dtype))
        return moments
