# SPDX-License-Identifier: MIT
"""What an evaluation leaves: tables in the log, metrics as JSON, predictions and features with the ids of their
samples.

A dataset here is anything with ids (N,), CLASSES, label_table() → (N, K) and, for features, groups (N,).
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
    """A pipe table, line by line."""
    for line in tabulate(rows, headers, tablefmt="pipe", disable_numparse=True).splitlines():
        log.info("%s", line)


def scalars(metrics):
    """The metrics that are single numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def shown(value):
    return "–" if value is None else f"{value:.4f}"


def log_metrics(metrics, classes):
    """A table per class, with the classes that are undefined; of floods, the counts. metrics: as of `util.metrics`."""
    if "confusion" in metrics:
        counts = metrics["confusion"]
        log_table(
            [("no flood", counts["tn"], counts["fp"]), ("flood", counts["fn"], counts["tp"])],
            ["label", "predicted no flood", "predicted flood"],
        )
        return
    per_class = metrics["per_class"]
    rows = zip(
        classes, per_class["support"], *(map(shown, per_class[name]) for name in ("ap", "f1", "precision", "recall"))
    )
    log_table(list(rows), ["class", "samples", "AP", "F1", "precision", "recall"])
    if metrics["undefined"]:
        log.warning(
            "%d classes do not occur in this split and are left out of the macro means: %s",
            len(metrics["undefined"]),
            ", ".join(classes[k] for k in metrics["undefined"]),
        )


def log_headline(headline, metrics):
    """The summary that log readers look for. headline: row → names of its metrics: macro and micro, or one alone."""
    headers = ["Metric", "Macro", "Micro"] if "ap_macro" in metrics else ["Metric", "Value"]
    log_table([(name, *(shown(metrics[key]) for key in keys)) for name, keys in headline.items()], headers)


def write_metrics(path, metrics, **where):
    """Metrics as JSON, with `where` they are of: checkpoint, dataset, split, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps({**where, **metrics}, indent=1).encode()))
    log.info("wrote %s", path)


def write_frame(path, frame):
    """A pandas DataFrame as .csv or .parquet, whole or not at all."""

    def write(file):
        if Path(path).suffix == ".parquet":
            frame.to_parquet(file, index=False)
        else:
            file.write(frame.to_csv(index=False).encode())

    write_atomically(path, write)
    log.info("wrote %s: %d rows", path, len(frame))


def write_predictions(path, dataset, probabilities):
    """One row per sample: id, then label and probability of each class."""
    labels = dataset.label_table()
    columns = {"id": dataset.ids}
    columns |= {f"label: {name}": labels[:, k] for k, name in enumerate(dataset.CLASSES)}
    columns |= {f"probability: {name}": probabilities[:, k].numpy() for k, name in enumerate(dataset.CLASSES)}
    write_frame(path, pd.DataFrame(columns))


def write_features(path, dataset, features):
    """Features with ids, groups (what lies side by side: acquisition or folder) and labels, all 0 of a sample without a
    label."""
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
        columns = {"id": dataset.ids, "group": dataset.groups}
        columns |= {f"label: {name}": labels[:, k] for k, name in enumerate(dataset.CLASSES)}
        columns |= {f"feature {k}": column for k, column in enumerate(features.T)}
        write_frame(path, pd.DataFrame(columns))
        return
    write_atomically(
        path,
        lambda file: np.savez(
            file,
            ids=dataset.ids,
            groups=dataset.groups,
            labels=labels,
            features=features,
            classes=np.array(dataset.CLASSES),
        ),
    )
    log.info("wrote %s: %d samples × %d features", path, *features.shape)
