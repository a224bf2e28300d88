# SPDX-License-Identifier: MIT
"""Writes the results of an evaluation: tables in the log, metrics as JSON, predictions and features per sample.

dataset: an object with ids (N,), CLASSES, label_table() → (N, K) and, for features, groups (N,).
"""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from common.files import write_atomically

log = logging.getLogger(__name__)


def log_table(rows, headers):
    """Logs a pipe table, line by line."""
    for line in tabulate(rows, headers, tablefmt="pipe", disable_numparse=True).splitlines():
        log.info("%s", line)


def scalars(metrics):
    """The metrics that are single numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def shown(value):
    """A metric as text; "–" for an undefined one."""
    return "–" if value is None else f"{value:.4f}"


def log_metrics(metrics, classes):
    """Logs the metrics per class, or the confusion matrix of floods. metrics: from `util.metrics`."""
    if "confusion" in metrics:
        counts = metrics["confusion"]
        log_table(
            [("no flood", counts["tn"], counts["fp"]), ("flood", counts["fn"], counts["tp"])],
            ["label", "predicted no flood", "predicted flood"],
        )
        return
    per_class = metrics["per_class"]
    columns = [map(shown, per_class[name]) for name in ("ap", "f1", "precision", "recall")]
    log_table(
        list(zip(classes, per_class["support"], *columns)), ["class", "samples", "AP", "F1", "precision", "recall"]
    )
    if metrics["undefined"]:
        log.warning(
            "%d classes do not occur in this split and are left out of the macro means: %s",
            len(metrics["undefined"]),
            ", ".join(classes[k] for k in metrics["undefined"]),
        )


def log_headline(headline, metrics):
    """Logs the summary that log readers parse. headline: {row: names of its metrics, (macro, micro) or one}."""
    headers = ["Metric", "Macro", "Micro"] if "ap_macro" in metrics else ["Metric", "Value"]
    log_table([(name, *(shown(metrics[key]) for key in keys)) for name, keys in headline.items()], headers)


def write_metrics(path, metrics, **where):
    """Writes metrics as JSON, with the entries of `where`: checkpoint, dataset, split, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps({**where, **metrics}, indent=1).encode()))
    log.info("wrote %s", path)


def write_frame(path, frame):
    """Writes a pandas DataFrame as .csv or .parquet, atomically."""

    def write(file):
        if Path(path).suffix == ".parquet":
            frame.to_parquet(file, index=False)
        else:
            file.write(frame.to_csv(index=False).encode())

    write_atomically(path, write)
    log.info("wrote %s: %d rows", path, len(frame))


def _label_columns(classes, labels):
    return {f"label: {name}": column for name, column in zip(classes, labels.T)}


def write_predictions(path, dataset, probabilities):
    """Writes a row per sample: id, then label and probability of each class."""
    labels = dataset.label_table()
    columns = {"id": dataset.ids} | _label_columns(dataset.CLASSES, labels)
    columns |= {f"probability: {name}": probabilities[:, k].numpy() for k, name in enumerate(dataset.CLASSES)}
    write_frame(path, pd.DataFrame(columns))


def write_features(path, dataset, features):
    """Writes features with ids, groups (acquisitions or folders) and labels, as .npz or .parquet.

    The labels of a sample without a label are all 0.
    """
    features, labels = features.numpy(), dataset.label_table()
    unlabelled = np.count_nonzero(~labels.any(1))
    if 0 < unlabelled < len(labels):
        log.warning(
            "%s: %d of %d samples have no label, all their labels are 0; --eval with --embed leaves them out",
            path,
            unlabelled,
            len(labels),
        )
    if Path(path).suffix == ".parquet":
        columns = {"id": dataset.ids, "group": dataset.groups} | _label_columns(dataset.CLASSES, labels)
        columns |= {f"feature {k}": column for k, column in enumerate(features.T)}
        write_frame(path, pd.DataFrame(columns))
        return
    arrays = {"ids": dataset.ids, "groups": dataset.groups, "labels": labels, "features": features}
    write_atomically(path, lambda file: np.savez(file, **arrays, classes=np.array(dataset.CLASSES)))
    log.info("wrote %s: %d samples × %d features", path, *features.shape)
