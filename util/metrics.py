# SPDX-License-Identifier: MIT
"""Metrics of multi-label classification (average precision, F1, precision), of one class per image, of floods, and of
segmentation.

Undefined values:
- A class without a positive label in the set has no average precision and no recall. It is excluded from all three
  macro means, which therefore cover the same classes; its values per class are None, and it is listed under
  "undefined". Counting it as 0 would make the score depend on the classes that the set contains. The micro means cover
  all (sample, class) pairs, including those of such a class.
- A class that occurs but is never predicted has no precision either. This is an error of the model and counts as 0.
- Without a flooded sample, recall and F1 of the flood class are None; without a predicted one, its precision is 0.

All values are exact, not binned: every distinct probability is a threshold of the average precision, and samples of
equal probability (for example of a saturated sigmoid) pass it together, as in scikit-learn. torchmetrics divides in
float32, so values are accurate to about 1e-7. All are plain floats, ints or None, and can be written as JSON.
"""

from statistics import fmean

import torch
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_average_precision,
    binary_confusion_matrix,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

THRESHOLD = 0.5  # a label is predicted where its probability is greater; at 0.5 itself it is not


def _check(probabilities, labels):
    """Raises ValueError for an empty set, probabilities outside of [0, 1], and labels other than 0 and 1."""
    if not labels.numel():
        raise ValueError("no sample to evaluate: the set is empty")
    # torchmetrics interprets other values, including NaN, as logits and applies a sigmoid to all of them.
    if not (probabilities.is_floating_point() and bool(((probabilities >= 0) & (probabilities <= 1)).all())):
        raise ValueError(
            "probabilities must be floats from 0 to 1 and not NaN; apply a sigmoid or a softmax to logits first"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError("labels must be 0 or 1")


def multilabel_metrics(probabilities, labels):
    """Average precision, F1 and precision over classes (macro), over all pairs (micro), and per class.

    probabilities: (N, K) floats in [0, 1], K ≥ 2. labels: (N, K), 0 or 1, of any type, on the same device.
    Returns a dict: "ap_macro", "ap_micro", "f1_macro", "f1_micro", "precision_macro", "precision_micro" in [0, 1];
    "per_class": {"ap", "f1", "precision", "recall": lists of K floats or None, "support": list of K positive labels};
    "undefined": the indices of the classes without a positive label.
    Raises ValueError for other shapes or values, an empty set, and a set without any positive label.
    """
    if probabilities.ndim != 2 or probabilities.shape != labels.shape or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}: "
            "both must be (samples, classes), with two classes or more"
        )
    _check(probabilities, labels)
    labels = labels.long()
    support = labels.sum(0).tolist()
    if not any(support):
        raise ValueError(f"none of the {len(labels)} samples has a positive label: there is nothing to evaluate")

    settings = dict(num_labels=len(support), threshold=THRESHOLD, validate_args=False)
    per_class = {
        "ap": [
            binary_average_precision(probabilities[:, k], labels[:, k], validate_args=False).item() if count else None
            for k, count in enumerate(support)
        ]
    }
    for name, metric in (
        ("f1", multilabel_f1_score),
        ("precision", multilabel_precision),
        ("recall", multilabel_recall),
    ):
        values = metric(probabilities, labels, average="none", **settings).tolist()
        per_class[name] = [value if count else None for value, count in zip(values, support)]
    macro = {name: fmean(value for value in values if value is not None) for name, values in per_class.items()}
    return {
        "ap_macro": macro["ap"],
        "ap_micro": binary_average_precision(probabilities.flatten(), labels.flatten(), validate_args=False).item(),
        "f1_macro": macro["f1"],
        "f1_micro": multilabel_f1_score(probabilities, labels, average="micro", **settings).item(),
        "precision_macro": macro["precision"],
        "precision_micro": multilabel_precision(probabilities, labels, average="micro", **settings).item(),
        "per_class": {**per_class, "support": support},
        "undefined": [k for k, count in enumerate(support) if not count],
    }


def multiclass_metrics(probabilities, labels):
    """Accuracy, macro F1 and, per class, F1, precision and recall, where each sample is of exactly one class.

    probabilities: (N, K) floats in [0, 1], K ≥ 2; the prediction is the largest. labels: (N,), from 0 to K − 1, of any
    type, on the same device. Returns a dict: "accuracy", "f1_macro", "precision_macro", "recall_macro" in [0, 1];
    "per_class": {"f1", "precision", "recall": lists of K floats or None, "support": list of the samples of each class};
    "undefined": the indices of classes without a sample, which macro means leave out. Raises ValueError
    for other shapes or values and an empty set.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}: (samples, classes), with "
            "two classes or more, and (samples,) are needed"
        )
    classes, labels = probabilities.shape[1], labels.long()
    outside = (labels < 0) | (labels >= classes)
    _check(probabilities, outside)
    if bool(outside.any()):
        raise ValueError(f"labels must be from 0 to {classes - 1}")
    predicted, support = probabilities.argmax(1), labels.bincount(minlength=classes).tolist()
    settings = dict(num_classes=classes, average="none", validate_args=False)
    per_class = {}
    for name, metric in (
        ("f1", multiclass_f1_score),
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
    ):
        values = metric(predicted, labels, **settings).tolist()
        per_class[name] = [value if count else None for value, count in zip(values, support)]
    macro = {
        f"{name}_macro": fmean(value for value in values if value is not None) for name, values in per_class.items()
    }
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        **macro,
        "per_class": {**per_class, "support": support},
        "undefined": [k for k, count in enumerate(support) if not count],
    }


def flood_metrics(probabilities, labels):
    """Accuracy, and precision, recall and F1 of the flood class.

    probabilities: (N, 2) floats in [0, 1]: no flood, flood. The prediction is the larger one, no flood if they are
    equal. labels: (N,), 1 = flood, of any type, on the same device. Returns a dict: "accuracy", "precision", "recall",
    "f1" in [0, 1] or None, "confusion": {"tn", "fp", "fn", "tp"}, in samples. Raises ValueError for other shapes or
    values and an empty set.
    """
    if labels.ndim != 1 or probabilities.shape != (len(labels), 2):
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}: "
            "(samples, 2) and (samples,) are needed"
        )
    _check(probabilities, labels)
    labels, predicted = labels.long(), probabilities.argmax(1)
    tn, fp, fn, tp = binary_confusion_matrix(predicted, labels).flatten().tolist()
    flooded = tp + fn > 0
    return {
        "accuracy": binary_accuracy(predicted, labels).item(),
        "precision": binary_precision(predicted, labels).item(),
        "recall": binary_recall(predicted, labels).item() if flooded else None,
        "f1": binary_f1_score(predicted, labels).item() if flooded else None,
        "confusion": {"tn": tn, "fp": fp, "fn": fn, "tp": tp},
    }


def segmentation_metrics(confusion):
    """Mean IoU, macro F1, precision and recall, accuracy and, per class, the same, over all pixels that count.

    confusion: (K, K) integers, the pixels of class i that are taken for class k, K ≥ 2. Returns a dict: "iou_macro",
    "f1_macro", "precision_macro", "recall_macro", "accuracy" in [0, 1]; "per_class": {"iou", "f1", "precision",
    "recall": lists of K floats or None, "support": list of the pixels of each class}; "undefined": the indices of
    classes without a pixel, which macro means leave out; "confusion_matrix": as a list of rows. IoU: pixels that have a
    class and are taken for it, as a share of those that have it or are taken for it. Raises ValueError for another
    shape, and if no pixel counts.
    """
    counts = torch.as_tensor(confusion).tolist()
    classes = range(len(counts))
    if len(counts) < 2 or any(len(row) != len(counts) for row in counts):
        raise ValueError("confusion must be (classes, classes), with two classes or more")
    support, taken = [sum(row) for row in counts], [sum(row[k] for row in counts) for k in classes]
    if not sum(support):
        raise ValueError("no pixel to evaluate: all of them are ignored")
    hits = [counts[k][k] for k in classes]
    per_class = {
        "iou": [hit / (n + m - hit) if n else None for hit, n, m in zip(hits, support, taken)],
        "f1": [2 * hit / (n + m) if n else None for hit, n, m in zip(hits, support, taken)],
        "precision": [hit / max(m, 1) if n else None for hit, n, m in zip(hits, support, taken)],
        "recall": [hit / n if n else None for hit, n in zip(hits, support)],
    }
    return {
        **{f"{name}_macro": fmean(v for v in values if v is not None) for name, values in per_class.items()},
        "accuracy": sum(hits) / sum(support),
        "per_class": {**per_class, "support": support},
        "undefined": [k for k in classes if not support[k]],
        "confusion_matrix": counts,
    }
