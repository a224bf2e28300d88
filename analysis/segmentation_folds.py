# SPDX-License-Identifier: MIT
"""Folds that leave one group out, for `analysis.segmentation_study`: their images, and the lists that name them."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError, listed
from common.files import write_csv

POSITION = re.compile(r"_r?(\d+)_c?(\d+)$")  # at the end of ids, as of sarwmix.tile: first row and column, pixels
LONGEST = 50  # of the name of a folder, characters
PARTS = 4  # of a group that is both trained and validated on
LISTS = "sen1floods11"  # the dataset that is divided by lists, and not by a column split


class Fold(NamedTuple):
    """Rows of a dataset, (n,) int64 each, in its order. name: of the group that is tested on."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def learned(self):
        """The rows that are not tested on, which the baselines learn from."""
        return np.sort(np.concatenate([self.train, self.val]))


def folds_of(dataset, positive):
    """A Fold for each group of a dataset, sorted by their names.

    Validation is on the next group in this order that has a pixel of the class number `positive`, the first group
    following the last. Of two groups it is on a quarter of the one that is trained on: the images are divided into four
    parts that are contiguous, from one side to the other where their places are known, otherwise by id, and the part
    whose share of the class is nearest to that of the group is taken. Raises DataError for fewer than two groups, for
    groups of one image each, and where nothing could be validated on.
    """
    names = sorted(set(dataset.groups.tolist()))
    if len(names) < 2:
        raise DataError(f"{dataset.root}: all images are of one group, so none can be left out; give them two or more")
    if len(names) == len(dataset):
        raise DataError(
            f"{dataset.root}: every image is a group of its own; name its scene, or place, in a column group"
        )
    rows = {name: np.flatnonzero(dataset.groups == name) for name in names}
    found = {name: dataset.pixel_counts[rows[name], positive].sum() for name in names}
    having, needed = [name for name in names if found[name]], min(3, len(names))
    if len(having) < needed:
        raise DataError(
            f"{dataset.root}: {len(having)} of {len(names)} groups have pixels of the class "
            f"{dataset.CLASSES[positive]}, and {needed} must, to test, validate and train on; choose another --positive"
        )
    folds = []
    for i, name in enumerate(names):
        if len(names) == 2:
            (other,) = set(names) - {name}
            if len(rows[other]) < PARTS:
                raise DataError(
                    f"{dataset.root}: the group {other} has {len(rows[other])} images, but at least {PARTS} are "
                    "needed to train and validate on; cut the scene into smaller images"
                )
            val = quarter_of(dataset, rows[other], positive)
            folds.append(Fold(name, np.setdiff1d(rows[other], val), val, rows[name]))
            continue
        others = names[i + 1 :] + names[:i]
        chosen = next(group for group in others if found[group])
        train = np.sort(np.concatenate([rows[group] for group in others if group != chosen]))
        folds.append(Fold(name, train, rows[chosen], rows[name]))
    return folds


def quarter_of(dataset, rows, positive):
    """The rows of a contiguous quarter of the images, the one with the most typical share of the class; sorted."""
    places = places_of(dataset)
    if places is None:
        order = np.argsort(dataset.ids[rows], kind="stable")
    else:
        along = np.ptp(places[rows], axis=0).argmax()  # the longer side is cut, so that the border is short
        order = np.lexsort((places[rows, 1 - along], places[rows, along]))
    counts = dataset.pixel_counts[rows].astype(float)
    whole = counts[:, positive].sum() / counts[:, :-1].sum()
    parts = np.array_split(rows[order], PARTS)

    def distance(part):
        pixels = dataset.pixel_counts[part, :-1].sum()
        return abs(dataset.pixel_counts[part, positive].sum() / pixels - whole) if pixels else np.inf

    return np.sort(min(parts, key=distance))


def places_of(dataset):
    """(N, 2) float: where each image lies, by its georeference or, as of sarwmix.tile, its id; None if unknown."""
    table = dataset.georeference()
    if table is not None and (table.crs != "").all():
        places = table[["f", "c"]].to_numpy(float)
        if len(np.unique(places, axis=0)) > 1:
            return places
    found = [POSITION.search(name) for name in dataset.ids.tolist()]
    return np.array([[int(match[1]), int(match[2])] for match in found], float) if all(found) else None


# ---- Lists ---------------------------------------------------------------------------------------


def slugs_of(names):
    """{name of a group: the name of its folder}, which is no link as "..". Raises DataError if two are the same."""
    slugs = {name: re.sub(r"[^\w.-]+|^\.+", "_", name)[:LONGEST] for name in names}
    if len(set(map(str.lower, slugs.values()))) < len(slugs):
        raise DataError(
            f"{listed(slugs)}: groups differ in special characters, in case or after {LONGEST} characters alone; "
            "rename them"
        )
    return slugs


def list_paths(dataset_name, folder):
    """{"train", "val", "test": path of the list of a fold}; for masks it is one table with a column split."""
    if dataset_name == LISTS:
        return {part: Path(folder) / f"{part}.csv" for part in ("train", "val", "test")}
    return dict.fromkeys(("train", "val", "test"), Path(folder) / "metadata.csv")


def write_lists(dataset, fold, dataset_name, folder):
    """Writes the lists of a fold, those of `list_paths`."""
    paths = list_paths(dataset_name, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if dataset_name == LISTS:
        for part, path in paths.items():
            names = dataset.ids[getattr(fold, part)].tolist()
            write_csv(path, None, [(f"{name}_S1Hand.tif", f"{name}_LabelHand.tif") for name in names])
        return
    rows = [
        (dataset.ids[i], os.path.relpath(dataset.files(i)[-1], dataset.root), part, dataset.groups[i])
        for part in paths
        for i in getattr(fold, part)
    ]
    write_csv(paths["train"], ("id", "mask", "split", "group"), rows)
