# SPDX-License-Identifier: MIT
"""Logistic regression on frozen features, its penalty chosen on samples that are not tested on.

N samples with D features and K labels, 0 or 1. Labels of tested samples are no argument of what chooses or fits.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import rankdata

from analysis.probe import scikit_learn
from common.errors import DataError
from util.metrics import multilabel_metrics

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # C, the inverse strength of the L2 penalty
FOLDS = 5  # of the groups of training samples, at most
ITERATIONS = 200


class Samples(NamedTuple):
    """What is learned from. features (N, D), labels (N, K) uint8, groups (N,) str."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def take(self, rows):
        return Samples(self.features[rows], self.labels[rows], self.groups[rows])


def group_folds(groups, source):
    """[(rows to fit, rows held out)] that leave every group out once, in FOLDS parts or fewer. Raises DataError."""
    count = min(FOLDS, len(np.unique(groups)))
    if count < 2:
        raise DataError(f"{source}: all training samples are of one group, and none can be held out; give more")
    return list(scikit_learn("model_selection").GroupKFold(count).split(groups, groups=groups))


def likelihood(probabilities, labels):
    """The mean log-likelihood of the labels (N, K); defined where all are equal, too."""
    p = np.where(labels > 0, probabilities, 1 - probabilities)
    return float(np.log(np.maximum(p, 1e-7)).mean())


def average_precision(probabilities, labels):
    """AP, macro over the labels that occur."""
    return multilabel_metrics(torch.from_numpy(probabilities), torch.from_numpy(labels))["ap_macro"]


class PenaltyPath:
    """Logistic regressions of one binary label on standardised features, from the strongest penalty to the weakest.

    features: (N, D) float32. labels: (N,) bool. models: a weight (D,) and a bias for each of PENALTIES. Each begins
    where the one before it ended. Labels that are all equal give an infinite bias.
    """

    def __init__(self, features, labels, penalties=PENALTIES):
        if labels.all() or not labels.any():
            bias = np.inf if labels.all() else -np.inf
            self.models = [(np.zeros(features.shape[1], np.float32), bias)] * len(penalties)
            return
        mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        std[std == 0] = 1
        x = ((features - mean) / std).astype(np.float32)
        model = scikit_learn("linear_model").LogisticRegression(max_iter=ITERATIONS, warm_start=True)
        self.models = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fit that would take more iterations
            for penalty in penalties:
                weight = model.set_params(C=penalty).fit(x, labels).coef_[0] / std
                self.models.append((weight.astype(np.float32), float(model.intercept_[0] - mean @ weight)))

    def logits(self, k, features):
        """(…) of features (…, D), by the model of the k-th penalty."""
        weight, bias = self.models[k]
        return features @ weight + np.float32(bias)

    def probabilities(self, k, features):
        """(…) float64 of features (…, D), as `logits`."""
        return expit(self.logits(k, features).astype(np.float64))


def probabilities_of(samples, queries, penalties=PENALTIES):
    """Probabilities (penalties, M, K) of the queries (M, D), by a model of the samples for each label and penalty."""
    paths = [PenaltyPath(samples.features, label == 1, penalties) for label in samples.labels.T]
    return np.stack(
        [np.stack([path.probabilities(k, queries) for path in paths], axis=1) for k in range(len(penalties))]
    )


def chosen_penalty(samples, folds, score):
    """The first of PENALTIES with the highest score(probabilities, labels) of all rows that the folds hold out."""
    parts = [probabilities_of(samples.take(fit), samples.features[held]) for fit, held in folds]
    labels = samples.labels[np.concatenate([held for _, held in folds])]
    return PENALTIES[int(np.argmax([score(found, labels) for found in np.concatenate(parts, axis=1)]))]


def predicted(samples, queries, folds, score):
    """(the chosen penalty, probabilities (M, K) of the queries (M, D)), fitted to all samples."""
    penalty = chosen_penalty(samples, folds, score)
    return penalty, probabilities_of(samples, queries, (penalty,))[0]


def area(scores, labels):
    """Area under the ROC curve of scores (M,) for labels (M,), 0 or 1; NaN if there is one label alone."""
    positive = np.asarray(labels) == 1
    has, lacks = np.count_nonzero(positive), np.count_nonzero(~positive)
    if not has or not lacks:
        return np.nan
    return float((rankdata(scores)[positive].sum() - has * (has + 1) / 2) / (has * lacks))
