# SPDX-License-Identifier: MIT
"""Tasks of `analysis.objective_study` on images with masks: segmentation of pixels, and detection in tiles.

Every group of images is tested on once, by what was learned from the others; folds are those of
`analysis.segmentation_folds`. The penalty is chosen on the validation images of a fold, and the model is then fitted to
its training and validation images, from which the baselines learn, too.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from analysis.objective_encoders import PATCH, of_all, token_features, window_features
from analysis.objective_images import record_of
from analysis.objective_probes import PENALTIES, PenaltyPath, Samples, area, likelihood, predicted
from analysis.segmentation_baselines import COUNTS, baselines, counts_of, truth_of
from analysis.segmentation_folds import folds_of
from common.errors import DataError
from sarwmix.listing import IGNORED

PER_IMAGE, TO_CHOOSE = 400, 2000  # tokens of an image that are learned from, and by which a penalty is chosen


def iou(counts):
    """Intersection over union of COUNTS (…, 4); NaN without a positive pixel."""
    hits, taken, has, _ = np.moveaxis(np.asarray(counts, float), -1, 0)
    return np.where(has > 0, hits / np.maximum(taken + has - hits, 1), np.nan)


def token_labels(mask, positive, shape):
    """(known, label), each (h, w) bool: tokens most of whose pixels have a class, and half of these are positive.

    mask: (H, W), or less than the h·4 × w·4 pixels of the tokens; the others count as IGNORED.
    """
    mask = F.pad(mask, (0, shape[1] * PATCH - mask.shape[1], 0, shape[0] * PATCH - mask.shape[0]), value=IGNORED)
    shares = [F.avg_pool2d(part[None].float(), PATCH)[0].numpy() for part in (mask != IGNORED, mask == positive)]
    return shares[0] > 0.5, (shares[1] >= 0.5 * shares[0]) & (shares[0] > 0)


def pixel_logits(logits, size):
    """Logits of tokens (h, w) → of pixels (H, W), bilinear."""
    grid = torch.from_numpy(np.asarray(logits, np.float32))[None, None]
    return F.interpolate(grid, scale_factor=PATCH, mode="bilinear", align_corners=False)[0, 0, : size[0], : size[1]]


class Water:
    """The class of each pixel: a logistic regression on the tokens of all four stages.

    dataset: of masks. positive: the number of the class. The penalty has the highest IoU of validation tokens.
    """

    name, real = "water", True
    METRICS = ("IoU", "IoU, mean over groups")

    def __init__(self, dataset, positive):
        self.dataset, self.positive, self.folds = dataset, positive, folds_of(dataset, positive)
        self.data = {"images": record_of(dataset), "positive": positive}

    def evaluate(self, frozen):
        def tokens_of(image):
            return token_features(frozen, image)

        drawn = [self.draw(tokens_of, i) for i in range(len(self.dataset))]
        counts, penalties = np.zeros((len(self.dataset), len(COUNTS)), np.int64), {}
        for fold in self.folds:
            k, path = self.fitted(fold, drawn)
            penalties[fold.name] = PENALTIES[k]
            for i in fold.test:
                counts[i] = self.tested(i, lambda image: path.logits(0, tokens_of(image)))
        return self.result(counts) | {"penalty": penalties}

    def draw(self, tokens_of, i):
        """(features (n, D), labels (n,)) of up to TO_CHOOSE tokens of an image, in random order."""
        image, mask = self.dataset[i]
        features = tokens_of(image)
        known, label = token_labels(mask, self.positive, features.shape[:2])
        rows = np.random.default_rng(i).permutation(np.flatnonzero(known))[:TO_CHOOSE]
        return features.reshape(-1, features.shape[-1])[rows], label.ravel()[rows]

    @staticmethod
    def fitted(fold, drawn):
        """(number of the chosen penalty, PenaltyPath of it alone, fitted to all images but the tested ones)."""

        def joined(rows, most):
            return [np.concatenate([drawn[i][part][:most] for i in rows]) for part in (0, 1)]

        features, truth = joined(fold.val, TO_CHOOSE)
        path, scores = PenaltyPath(*joined(fold.train, PER_IMAGE)), []
        for k in range(len(PENALTIES)):
            scores.append(float(iou(counts_of(path.logits(k, features) > 0, truth))))
        k = int(np.argmax(np.nan_to_num(scores)))
        return k, PenaltyPath(*joined(fold.learned, PER_IMAGE), PENALTIES[k : k + 1])

    def tested(self, i, logits_of):
        """COUNTS of an image. logits_of: image (2, H, W) → logits of its tokens (h, w)."""
        image, mask = self.dataset[i]
        counted = (mask != IGNORED).numpy()
        taken = (pixel_logits(logits_of(image), mask.shape) > 0).numpy()
        return counts_of(taken[counted], (mask == self.positive).numpy()[counted])

    def result(self, counts):
        """The result of COUNTS (N, 4) of all images, each as tested."""
        groups = {fold.name: counts[fold.test].sum(0) for fold in self.folds}
        of_groups = iou(list(groups.values()))
        values = float(iou(counts.sum(0))), float(np.nanmean(of_groups))
        return {
            "metrics": dict(zip(self.METRICS, values)),
            "groups": {name: dict(zip(COUNTS, found.tolist())) for name, found in groups.items()},
        }

    def baselines(self):
        table, results = baselines(self.dataset, self.folds, self.positive), {}
        order = pd.Index(self.dataset.ids)
        for method, rows in table.groupby("method", sort=False):
            results[method] = self.result(rows.set_index("id").loc[order, COUNTS].to_numpy(np.int64))
        return results


class Tiles:
    """Whether a tile holds a class: mean features of the tile, a logistic regression.

    dataset: of masks. positive: the number of the class. share: of a tile from which it is of the class; tiles with
    less, but some, count nowhere. The penalty has the highest likelihood of validation tiles.
    """

    name, real = "tiles", True

    def __init__(self, dataset, positive, share):
        self.dataset, self.positive, self.share = dataset, positive, share
        self.folds = folds_of(dataset, positive)
        self.data = {"images": record_of(dataset), "positive": positive, "share": share}
        counts = dataset.pixel_counts
        self.truth = truth_of(counts[:, positive], counts[:, :-1].sum(1), share)  # (N,), 1, 0 or NaN
        self.METRICS = ("AUC", *(f"AUC, {fold.name}" for fold in self.folds))
        for fold in self.folds:
            if not {0.0, 1.0} <= set(self.truth[fold.train].tolist()):
                raise DataError(
                    f"{dataset.root}: without {fold.name} there are no tiles both with {share:g} of the class or more "
                    "and without any to train on; lower --tile_share"
                )

    def evaluate(self, frozen):
        features = of_all(self.dataset, lambda images: window_features(frozen, images).mean(1))[:, 0]
        scores, penalties = np.full(len(features), np.nan), {}
        for fold in self.folds:
            penalties[fold.name], scores[fold.test] = self.detected(fold, features)
        return self.result(scores) | {"penalty": penalties}

    def detected(self, fold, features):
        """(the chosen penalty, probabilities of the tested tiles)."""
        learned = fold.learned[np.isfinite(self.truth[fold.learned])]
        samples = Samples(features[learned], self.truth[learned, None].astype(np.uint8), self.dataset.groups[learned])
        held = np.isin(learned, fold.val)
        folds = [(np.flatnonzero(~held), np.flatnonzero(held))]
        penalty, probabilities = predicted(samples, features[fold.test], folds, likelihood)
        return penalty, probabilities[:, 0]

    def result(self, scores):
        """The result of scores (N,) of all tiles, each as tested."""
        known, parts = np.isfinite(self.truth) & np.isfinite(scores), {}
        for fold in self.folds:
            rows = fold.test[known[fold.test]]
            parts[fold.name] = {"scores": scores[rows].tolist(), "labels": self.truth[rows].tolist()}
        areas = [area(**part) for part in parts.values()]
        values = [float(np.nanmean(areas)) if np.isfinite(areas).any() else np.nan, *areas]
        return {"metrics": dict(zip(self.METRICS, values)), "groups": parts}

    def baselines(self):
        table = baselines(self.dataset, self.folds, self.positive, self.share)
        kept = table["method"].str.startswith("threshold") | (table["method"] == "histogram of the image")
        order = pd.Index(self.dataset.ids)
        return {
            method: self.result(rows.set_index("id").loc[order, "score"].to_numpy(float))
            for method, rows in table[kept].groupby("method", sort=False)
        }
