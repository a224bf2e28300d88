# SPDX-License-Identifier: MIT
"""The table of pairs of images of one's own: its rows, its images, their places and names. Opens no image."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError, data_error, quoted
from sarwmix.listing import read_columns
from sarwmix.prepare.sen12_index import SPLITS
from sarwmix.raster import different_names, files_of

NEEDED, OPTIONAL = ("before", "after", "label"), ("split", "group")
MOST_LETTERS = 100  # of a name; file systems allow 255 bytes


@dataclass(frozen=True)
class Pair:
    """A row of the table. first, second: numbers of its images. label: "0" or "1". split, group: None if not stated."""

    first: int
    second: int
    label: str
    split: str | None
    group: str | None
    place: str  # in the table: "pairs.csv:3"


@dataclass(frozen=True)
class PairTable:
    """The pairs of a table, and its distinct images: paths ((path, …), …), one or two files each; names (str, …)."""

    path: Path
    pairs: tuple
    paths: tuple
    names: tuple

    @property
    def has_splits(self):
        return self.pairs[0].split is not None

    def files(self, number):
        """The files of an image as text, "a_VH.tif,a_VV.tif", relative to the folder of the table if they lie in it."""
        folder, *paths = (Path(os.path.abspath(path)) for path in (self.path.parent, *self.paths[number]))
        return ",".join(str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in paths)


# ---- Reading -------------------------------------------------------------------------------------


def read_pairs(path, ordered):
    """Reads a table of pairs, CSV or parquet. Raises DataError, which names the rows, for one that cannot be used.

    ordered: whether the order of the two files of an image has a meaning, as with --bands.
    """
    path = Path(path)
    columns, place, lines = read_columns(path, path.name, (*NEEDED, *OPTIONAL))
    places = [f"{place}{line}" for line in lines]
    lacking = [name for name in NEEDED if name not in columns]
    if lacking:
        raise DataError(
            f"{path}: has no column {', '.join(lacking)} (columns: {', '.join(map(quoted, columns)) or 'none'}); a row "
            "per pair has the columns before, after and label, and may have split and group"
        )
    if not places:
        raise DataError(f"{path}: has no rows; add a row for each pair")
    columns = {name: [""] * len(places) for name in OPTIONAL} | columns
    _check_cells(path, columns, places)
    number, found, pairs = {}, [], []
    for k, place in enumerate(places):
        images = []
        for name in ("before", "after"):
            paths = files_of(columns[name][k], path.parent)
            key = tuple(map(os.path.realpath, paths))
            key = key if ordered else tuple(sorted(key))
            if key not in number:
                number[key] = len(found)
                found.append(paths)
            images.append(number[key])
        pairs.append(Pair(*images, columns["label"][k], *(columns[name][k] or None for name in OPTIONAL), place))
    _check_pairs(path, pairs)
    several = Counter(file for key in number for file in set(key))
    several = [file for file, count in several.items() if count > 1]
    if several:
        raise data_error(
            f"{path}: {len(several)} files are named in several combinations",
            several,
            "name an image by the same files, in the same order, in each row",
        )
    return PairTable(path, tuple(pairs), tuple(found), tuple(_plain(different_names(found))))


def _check_cells(path, columns, places):
    """Raises DataError for cells that are empty or no label or split."""
    rules = [(name, lambda text: text != "", "is empty", "name a file in each row") for name in NEEDED[:2]]
    rules.append(("label", ("0", "1").__contains__, "is no label", "it must be 1 (flood in the second image) or 0"))
    stated = {name: any(columns[name]) for name in OPTIONAL}
    if stated["split"]:
        remedy = "it must be train or test; validation is drawn in training (--val_fraction of main_finetune.py)"
        rules.append(("split", SPLITS.__contains__, "is no split", remedy))
    if stated["group"]:
        rules.append(("group", lambda text: text != "", "is empty", "name the place in each row, or in none"))
    for name, holds, what, remedy in rules:
        bad = [f"{quoted(text)} ({place})" for text, place in zip(columns[name], places) if not holds(text)]
        if bad:
            raise data_error(f"{path}: column {name} {what} in {len(bad)} of {len(places)} rows", bad, remedy)


def _check_pairs(path, pairs):
    """Raises DataError for repeated pairs, pairs of one image, and images of several groups."""
    single = [pair.place for pair in pairs if pair.first == pair.second]
    if single:
        raise data_error(f"{path}: before and after are the same image in {len(single)} rows", single, "correct them")
    place, repeated, group = {}, [], {}
    for pair in pairs:
        before = place.setdefault((pair.first, pair.second), pair.place)
        if before != pair.place:
            repeated.append(f"{before} and {pair.place}")
    if repeated:
        raise data_error(f"{path}: {len(repeated)} rows repeat a pair", repeated, "remove the repeated rows")
    several = [
        f"{pair.place} ({quoted(pair.group)}, before {quoted(group[image])})"
        for pair in pairs
        for image in (pair.first, pair.second)
        if group.setdefault(image, pair.group) != pair.group
    ]
    if several:
        raise data_error(
            f"{path}: {len(several)} images are in several groups", several, "an image shows one place; correct them"
        )


# ---- Places and names ----------------------------------------------------------------------------


def groups_of(table, grids):
    """The place of each pair, a list of names of folders.

    It is that of the column group. Without it, pairs that share an image, or whose images lie on one grid, are of one
    place, which has the name of the first of its images. grids: for each image, what equal grids have in common, or
    None. Raises DataError for a place in both splits.
    """
    pairs = table.pairs
    if pairs[0].group is not None:
        keys = [pair.group for pair in pairs]
        names = dict(zip(dict.fromkeys(keys), _plain(dict.fromkeys(keys))))
    else:
        roots = list(range(len(table.paths)))

        def root(k):
            while roots[k] != k:
                roots[k] = k = roots[roots[k]]
            return k

        first = {}
        for k, grid in enumerate(grids):
            if grid is not None:
                roots[root(k)] = root(first.setdefault(grid, k))
        for pair in pairs:
            roots[root(pair.second)] = root(pair.first)
        keys = [root(pair.first) for pair in pairs]
        names = {}
        for key, pair in zip(keys, pairs):
            names.setdefault(key, table.names[pair.first])
    if pairs[0].split is not None:
        found = Counter(key for key, _ in {(key, pair.split) for key, pair in zip(keys, pairs)})
        both = [names[key] for key, count in found.items() if count > 1]
        if both:
            raise data_error(
                f"{table.path}: {len(both)} places are in both splits",
                sorted(both),
                "images of one place must be in one split (those of one group, or without the column group those that "
                "share an image or a grid); correct the column split",
            )
    return [names[key] for key in keys]


def _plain(names):
    """Names of files or folders for FloodDataset, all different, also where the case of letters does not count."""
    used, plain = set(), []
    for name in names:
        text = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        text = re.sub("_+", "_", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).lstrip("._").rstrip("_")[:MOST_LETTERS]
        text = stem = text.rstrip("_") or "image"
        number = 1
        while text.lower() in used:
            number += 1
            text = f"{stem}-{number}"
        used.add(text.lower())
        plain.append(text)
    return plain
