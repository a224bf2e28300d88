# SPDX-License-Identifier: MIT
"""Baselines of `analysis.segmentation_study` that need no network: thresholds of backscatter, and logistic regression.

Pixels of low backscatter are taken for the positive class, as open water is dark. All learn from the images of a fold
that are not tested on. Values are in dB; HITS, TAKEN, HAS and PIXELS count the pixels of an image that have a class.
"""

import numpy as np
import pandas as pd
from scipy.ndimage import uniform_filter

from analysis.probe import PENALTY, linear_probabilities, scikit_learn
from sarwmix.listing import IGNORED
from sarwmix.moments import BIN, BINS, LOWEST

HITS, TAKEN, HAS, PIXELS = "hits", "taken", "has", "pixels"  # positive and taken for it, taken, positive, all
COUNTS = [HITS, TAKEN, HAS, PIXELS]
COLUMNS = ["method", "group", "id", *COUNTS, "score"]  # score: of the image, the higher the more positive
OTSU_BINS = 256
SMOOTH, WIDE = 5, 9  # sides of local means, pixels
SIGNALS = ("VV", "VH", f"VV, {SMOOTH}×{SMOOTH} mean", f"VH, {SMOOTH}×{SMOOTH} mean")
PER_IMAGE = 200  # pixels of an image that logistic regression learns from
QUANTILES = np.array([1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99]) / 100
LOWEST_POWER = 1e-9


# ---- Signals -------------------------------------------------------------------------------------


def local_mean(db, side):
    """The mean of side × side pixels in linear power, in dB, of an image (H, W) in dB; NaN pixels count nowhere."""
    known = np.isfinite(db)
    power = np.where(known, 10 ** (np.where(known, db, 0).astype(np.float64) / 10), 0)
    mean, share = (uniform_filter(part, side, mode="nearest") for part in (power, known.astype(np.float64)))
    level = 10 * np.log10(np.maximum(mean, LOWEST_POWER) / np.maximum(share, 0.5 / side**2))
    return np.where(known, level, np.nan)


def signals_of(image):
    """The SIGNALS of an image (2, H, W) in dB, order VH, VV: (4, H, W)."""
    vh, vv = image
    return np.stack([vv, vh, local_mean(vv, SMOOTH), local_mean(vh, SMOOTH)])


def pixel_features(image):
    """(H, W, 4): VV and VH of a pixel, and their means over 9×9 pixels, dB. image: (2, H, W) in dB, order VH, VV."""
    vh, vv = image
    return np.stack([vv, vh, local_mean(vv, WIDE), local_mean(vh, WIDE)], axis=-1)


def quantiles_of(image):
    """(26,): the QUANTILES of each channel of an image (2, H, W) in dB; 0 for a channel without data."""
    return np.concatenate(
        [np.quantile(known if known.size else [0.0], QUANTILES) for known in (c[np.isfinite(c)] for c in image)]
    )


def otsu(values):
    """The threshold, an edge of 256 bins, of values (n,) with the largest variance between the classes on its sides.

    Source: Otsu, A threshold selection method from gray-level histograms, IEEE Transactions on Systems, Man, and
    Cybernetics 9(1), 1979. Of equal thresholds it is the lowest; of equal values it is the value, and none is below.
    """
    lowest, highest = values.min(), values.max()
    if lowest == highest:
        return float(lowest)
    counts, edges = np.histogram(values.astype(np.float64), OTSU_BINS)
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    return float(edges[1 + np.argmax(below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2)])


def bins_of(values):
    """The bin of each value in dB: from 0, below all thresholds, to BINS + 1; those of `sarwmix.moments`."""
    return np.clip(np.floor((values - LOWEST) / BIN), -1, BINS).astype(np.int64) + 1


def best_bin(histogram):
    """The bin at and below which to take pixels for positive, for the highest IoU. histogram: (2, bins), of the others
    and of positive pixels.
    """
    hits, taken = np.cumsum(histogram[1]), np.cumsum(histogram.sum(0))
    return int(np.argmax(hits / np.maximum(taken + histogram[1].sum() - hits, 1)))


def counts_of(taken, positive):
    """COUNTS of an image. taken, positive: (n,) bool, of the pixels that count."""
    return [np.count_nonzero(taken & positive), np.count_nonzero(taken), np.count_nonzero(positive), positive.size]


# ---- All images ----------------------------------------------------------------------------------


class Survey:
    """What the baselines need to know of the N images of a dataset, which are read once.

    otsu: (N, 4 signals, 4 COUNTS). histograms: (N, 4 signals, 2, bins) int32. features: [(n, 4)] of some pixels of each
    image, positive: [(n,) bool]. quantiles: (N, 26) dB. has, pixels: (N,).
    """

    def __init__(self, dataset, positive):
        count, signals = len(dataset), len(SIGNALS)
        self.otsu = np.zeros((count, signals, len(COUNTS)), np.int64)
        self.histograms = np.zeros((count, signals, 2, BINS + 2), np.int32)
        self.features, self.positive, self.quantiles = [], [], np.zeros((count, 2 * len(QUANTILES)))
        self.has, self.pixels = np.zeros((2, count), np.int64)
        for i in range(count):
            image, mask = (part.numpy() for part in dataset[i])
            counted = (mask != IGNORED) & np.isfinite(image).all(0)
            truth = mask[counted] == positive
            self.has[i], self.pixels[i] = np.count_nonzero(truth), truth.size
            for k, signal in enumerate(signals_of(image)):
                known = signal[np.isfinite(signal)]
                self.otsu[i, k] = counts_of(signal[counted] < (otsu(known) if known.size else -np.inf), truth)
                place = bins_of(signal[counted]) + (BINS + 2) * truth
                self.histograms[i, k] = np.bincount(place, minlength=2 * (BINS + 2)).reshape(2, -1)
            drawn = np.random.default_rng(i).permutation(truth.size)[:PER_IMAGE]
            self.features.append(pixel_features(image)[counted][drawn])
            self.positive.append(truth[drawn])
            self.quantiles[i] = quantiles_of(image)

    def thresholds(self, fold, signal):
        """(n, 4) COUNTS of the tested images, by the threshold with the highest IoU on the others."""
        best = best_bin(self.histograms[fold.learned, signal].sum(0, dtype=np.int64))
        below = self.histograms[fold.test, signal, :, : best + 1].sum(-1, dtype=np.int64)
        return np.stack([below[:, 1], below.sum(1), self.has[fold.test], self.pixels[fold.test]], axis=1)

    def everything(self, fold):
        """(n, 4) COUNTS of the tested images, all pixels taken for positive."""
        has, pixels = self.has[fold.test], self.pixels[fold.test]
        return np.stack([has, pixels, has, pixels], axis=1)

    def regression(self, fold, dataset, positive):
        """(n, 4) COUNTS of the tested images, by a logistic regression on `pixel_features`."""
        make = scikit_learn("pipeline").make_pipeline
        scale, regression = (
            scikit_learn("preprocessing").StandardScaler,
            scikit_learn("linear_model").LogisticRegression,
        )
        features = np.concatenate([self.features[i] for i in fold.learned])
        truth = np.concatenate([self.positive[i] for i in fold.learned])
        if truth.all() or not truth.any():
            taken_all = self.everything(fold)
            return taken_all if truth.all() else taken_all * [0, 0, 1, 1]
        model, counts = make(scale(), regression(max_iter=1000)).fit(features, truth), []
        for i in fold.test:
            image, mask = (part.numpy() for part in dataset[i])
            counted = (mask != IGNORED) & np.isfinite(image).all(0)
            pixels = pixel_features(image)[counted]
            counts.append(
                counts_of(model.predict(pixels) if len(pixels) else np.zeros(0, bool), mask[counted] == positive)
            )
        return np.array(counts)

    def detection(self, fold, share):
        """(n,) probabilities that the tested images hold the class, by a logistic regression on their quantiles."""
        truth = truth_of(self.has, self.pixels, share)
        known = fold.learned[np.isfinite(truth[fold.learned])]
        if not len(known):
            return np.full(len(fold.test), np.nan)
        labels = truth[known, None].astype(np.uint8)
        return linear_probabilities(self.quantiles[known], labels, self.quantiles[fold.test], PENALTY)[0][:, 0]


def truth_of(has, pixels, share):
    """(N,) float: 1 for images with this share of positive pixels or more, 0 for those without any, otherwise NaN."""
    has, pixels = np.asarray(has, float), np.asarray(pixels, float)
    return np.where((pixels > 0) & (has == 0), 0.0, np.where((pixels > 0) & (has >= share * pixels), 1.0, np.nan))


def baselines(dataset, folds, positive, share=None):
    """A DataFrame of COLUMNS, a row for each method and tested image. share: of `truth_of`, None for no detection."""
    survey, frames = Survey(dataset, positive), []
    for fold in folds:
        results = {f"Otsu, {name}": survey.otsu[fold.test, k] for k, name in enumerate(SIGNALS)}
        results |= {f"threshold, {name}": survey.thresholds(fold, k) for k, name in enumerate(SIGNALS)}
        results["logistic regression of pixels"] = survey.regression(fold, dataset, positive)
        results["all positive"] = survey.everything(fold)
        for method, counts in results.items():
            frame = pd.DataFrame(counts, columns=COUNTS)
            frame["score"] = frame[TAKEN] / frame[PIXELS].where(frame[PIXELS] > 0)
            frames.append(frame.assign(method=method, group=fold.name, id=dataset.ids[fold.test]))
        if share is not None:
            score = survey.detection(fold, share)
            frame = pd.DataFrame({HAS: survey.has[fold.test], PIXELS: survey.pixels[fold.test], "score": score})
            frames.append(frame.assign(method="histogram of the image", group=fold.name, id=dataset.ids[fold.test]))
    return pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS)
