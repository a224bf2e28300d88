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
from util.maps import grids_of, principal_components, with_outlines, write_maps

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
    titles = {"ap": "AP", "iou": "IoU", "f1": "F1", "precision": "precision", "recall": "recall"}
    columns = {title: map(shown, per_class[name]) for name, title in titles.items() if name in per_class}
    counted = "pixels" if "iou" in per_class else "samples"
    log_table(list(zip(classes, per_class["support"], *columns.values())), ["class", counted, *columns])
    if "ignored_pixels" in metrics:
        log.info("%d pixels are evaluated, %d are ignored", metrics["pixels"], metrics["ignored_pixels"])
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
    """Writes a pandas DataFrame, or a GeoDataFrame as GeoParquet, as .csv or .parquet, atomically."""

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


def write_confusions(path, dataset, confusion):
    """Writes a row per image: id, pixels of each class, those that are taken for it, and the IoU of each class.

    confusion: (N, K, K) pixels of class i that are taken for class k. The IoU of a class that an image neither has nor
    is taken for is empty.
    """
    confusion = confusion.numpy()
    has, taken, hits = confusion.sum(2), confusion.sum(1), confusion.diagonal(axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):
        iou = hits / (has + taken - hits)
    columns = {"id": dataset.ids}
    for title, values in (("pixels", has), ("predicted", taken), ("iou", iou)):
        columns |= {f"{title}: {name}": column for name, column in zip(dataset.CLASSES, values.T)}
    write_frame(path, pd.DataFrame(columns))


def write_probabilities(path, dataset, probabilities, classes):
    """Writes probabilities (N, K) of K classes: a row per sample with id, the most probable class and all
    probabilities, as .csv or .parquet, the latter with the outline of the image where it is known; or, as .tif, maps
    with a band per class.
    """
    values = probabilities.numpy()
    if Path(path).suffix == ".tif":
        write_maps(path, grids_of(dataset.georeference(), dataset.size, "--predict"), values, classes)
        return
    columns = {"id": dataset.ids, "predicted": np.array(classes, dtype=str)[values.argmax(1)]}
    columns |= {f"probability: {name}": column for name, column in zip(classes, values.T)}
    _write_georeferenced(path, pd.DataFrame(columns), dataset)


def _write_georeferenced(path, frame, dataset):
    """Writes a table of the samples; a parquet file with their georeference and outlines, where they are known."""
    georeference = dataset.georeference() if Path(path).suffix == ".parquet" else None
    write_frame(path, frame if georeference is None else with_outlines(frame, georeference, dataset.size))


def write_features(path, dataset, features, bands="pca"):
    """Writes features with ids, groups (acquisitions or folders) and labels, as .npz or .parquet, the latter with the
    outline of the image where it is known; or, as .tif, maps of all features or, with bands "pca", of their first three
    principal components.

    The labels of a sample without a label are all 0.
    """
    if Path(path).suffix == ".tif":
        values, names = features.numpy(), [f"feature {k}" for k in range(features.shape[1])]
        if bands == "pca":
            values, shares = principal_components(values)
            log.info("principal components: %s of the variance", ", ".join(f"{share:.1%}" for share in shares))
            names = [f"principal component {k}" for k in (1, 2, 3)]
        write_maps(path, grids_of(dataset.georeference(), dataset.size, "--embed"), values, names)
        return
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
        _write_georeferenced(path, pd.DataFrame(columns), dataset)
        return
    arrays = {"ids": dataset.ids, "groups": dataset.groups, "labels": labels, "features": features}
    write_atomically(path, lambda file: np.savez(file, **arrays, classes=np.array(dataset.CLASSES)))
    log.info("wrote %s: %d samples × %d features", path, *features.shape)
