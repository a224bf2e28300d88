# SPDX-License-Identifier: MIT
"""Tasks of `analysis.objective_study` on labelled images and pairs: land cover and floods.

A task is opened once, and evaluates encoders: `evaluate(frozen)` and `baselines()` give results, dicts with "metrics"
and what else is kept. Nothing is chosen on test data.
"""

import numpy as np
import torch

from analysis.objective_encoders import of_all, whole_features, window_features
from analysis.objective_probes import (
    Samples,
    area,
    average_precision,
    group_folds,
    likelihood,
    predicted,
)
from analysis.segmentation_baselines import quantiles_of
from util.metrics import multilabel_metrics


def record_of(*datasets):
    """What a result states about its data, plain values."""
    kept = ("root", "samples", "class_counts", "fingerprint")
    return [{name: value for name, value in dataset.describe().items() if name in kept} for dataset in datasets]


def image_quantiles(images):
    """Images (B, 2, H, W) → (B, 26) quantiles in dB of VH, then of VV."""
    return np.stack([quantiles_of(image.numpy()) for image in images])


class LandCover:
    """Several labels of an image: mean features of the image, a logistic regression for each label.

    train, test: datasets with labels. The penalty has the highest AP macro on groups of training images left out.
    """

    name, real = "land_cover", False
    METRICS = ("AP macro", "F1 macro")

    def __init__(self, train, test):
        self.train, self.test, self.data = train, test, {"splits": record_of(train, test)}
        self.folds = group_folds(train.groups, train.root)

    def tested(self, features, queries):
        """The result of features (N, D) of the training images and of the tested ones."""
        samples = Samples(features, self.train.label_table(), self.train.groups)
        penalty, probabilities = predicted(samples, queries, self.folds, average_precision)
        metrics = multilabel_metrics(torch.from_numpy(probabilities), torch.from_numpy(self.test.label_table()))
        return {"metrics": dict(zip(self.METRICS, (metrics["ap_macro"], metrics["f1_macro"]))), "penalty": penalty}

    def evaluate(self, frozen):
        return self.tested(
            *(of_all(d, lambda images: whole_features(frozen, images))[:, 0] for d in (self.train, self.test))
        )

    def baselines(self):
        return {"quantiles": self.tested(*(of_all(data, image_quantiles)[:, 0] for data in (self.train, self.test)))}


class Floods:
    """Whether the second image of a pair shows a flood: |f1 − f2| of patches, its mean, a logistic regression.

    train, test: FloodDatasets. The penalty has the highest likelihood on folders of training pairs left out.
    """

    name, real = "floods", False
    METRICS = ("AUC", "accuracy")

    def __init__(self, train, test):
        self.train, self.test, self.data = train, test, {"splits": record_of(train, test)}
        self.folds = group_folds(train.groups, train.root)

    def tested(self, features, queries):
        """The result of features (N, D) of the training pairs and of the tested ones."""
        samples = Samples(features, self.train.label_table()[:, 1:], self.train.groups)
        penalty, probabilities = predicted(samples, queries, self.folds, likelihood)
        truth, scores = self.test.label_table()[:, 1], probabilities[:, 0]
        values = area(scores, truth), float(np.mean((scores > 0.5) == (truth == 1)))
        return {"metrics": dict(zip(self.METRICS, values)), "penalty": penalty}

    def evaluate(self, frozen):
        return self.tested(*self._differences(lambda images: window_features(frozen, images), np.abs))

    def baselines(self):
        def level(images):
            return images[:, 1].mean((1, 2))[:, None, None].numpy()

        return {
            "difference of quantiles": self.tested(
                *self._differences(lambda images: image_quantiles(images)[:, None], np.abs)
            ),
            "mean change of VV": self.tested(*self._differences(level, np.asarray)),
        }

    def _differences(self, describe, of_difference):
        """For both splits (N, D): the mean over patches of a function of the difference of what describes each patch.

        describe: images (B, 2, H, W) → (B, patches, D).
        """
        for data in (self.train, self.test):
            found = of_all(data, describe)  # (N, 2, patches, D)
            yield of_difference(found[:, 1] - found[:, 0]).mean(1)
