# SPDX-License-Identifier: MIT
"""Images of one's own: a folder of GeoTIFFs of VV and VH, and a table of labels, splits and groups, all optional."""

import logging
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DataError, data_error, listed, quoted
from sarwmix.dataset import RadarDataset
from sarwmix.geotiff import load_rasterio
from sarwmix.listing import (
    PARTS,
    Listing,
    as_paths,
    check_root,
    check_split,
    drawn_by_group,
    in_threads,
    join_listings,
    place_name,
    read_columns,
    refuse_duplicates,
)
from sarwmix.raster import GRID, Image, Reading, find_images

METADATA = ("metadata.csv", "metadata.parquet")  # in the folder of the images
GROUPS = ("group", "scene")  # names of the column of groups
COLUMNS = ("id", "label", "labels", "mask", "split", *GROUPS)
SEPARATOR = ";"  # of several labels

log = logging.getLogger(__name__)


class Chips(RadarDataset):
    """Square images of one size, in GeoTIFFs of VV and VH (`sarwmix.raster`) under the folder `root`.

    Item i is (image, label): (2, S, S) float32 in dB, order VH, VV; the label is the number of the class, or (K,)
    float32 where images have several labels.
    metadata: CSV or parquet files with a row per image, and the columns `id`, the path of the image below root or its
    name; `label`, one class, or `labels`, several separated by ";"; `split`, train, val or test; `group` or `scene`,
    the place of the image. All but id are optional, and a label may be empty. Without metadata, all images of the
    folder are used, without labels.
    CLASSES are the labels in the files, sorted. classes: others instead, such as those of a checkpoint.
    draw: (val_fraction, test_fraction, seed); without a column `split`, the shares of the groups that make up val and
    test. reading: how values are read. supervised: leaves out images without a label. Raises DataError for data that
    cannot be used.
    """

    MEAN = STD = None  # images of one's own have statistics of their own

    def __init__(
        self, root, split="train_val", metadata=None, reading=Reading(), draw=(0.0, 0.0, 0), supervised=False,
        classes=None
    ):  # fmt: skip
        root, split = check_root(root), check_split(split)
        self.reading = reading
        metadata, table = self._read_list(root, split, metadata)
        folder, found = self._find_images(root, table)
        table = table or Table(Listing(np.array(list(found)), None, (f"{root}/",)))
        refuse_duplicates(
            table.listing, remedy="remove the repeated rows, or give as id the path of each image below the folder"
        )
        ids = table.listing.ids
        self._paths = _paths_of(ids, found, (root, folder))
        _refuse_same_files(self._paths, table.listing)
        self._groups = ids if table.groups is None else np.where(table.groups == "", ids, table.groups)
        labels = self._labelled(root, table, classes, supervised)
        super().__init__(root, split, metadata, replace(table.listing, labels=labels))
        where = ", ".join(map(str, metadata)) or str(root)
        if table.splits is not None:
            self.stored_splits = [name for name in PARTS["all"] if name in table.splits]
        self._select(self._of_split(table, draw, where))
        if supervised:
            self._leave_out_unlabelled(where)

    # What the constructor does, for subclasses that do it in another way. `root` and `split` are those of a dataset,
    # checked; the attributes of `RadarDataset` are not there before `_of_split`.

    def _read_list(self, root, split, metadata):
        """(paths of the metadata, their Table or None). Raises DataError."""
        metadata = as_paths(metadata) if metadata else [root / name for name in METADATA if (root / name).exists()]
        if [path.name for path in metadata] == list(METADATA):
            raise DataError(f"{root}: holds {' and '.join(METADATA)}; name one of them with --metadata")
        return metadata, read_tables(metadata, root) if metadata else None

    def _find_images(self, root, table):
        """(the folder of the images, {name: files} of those that are there). Raises DataError."""
        return root, dict(find_images([root]))

    def _labelled(self, root, table, classes, supervised):
        """Sets CLASSES and the task. Returns the labels, (N, K) uint8. Raises DataError."""
        self.task = table.task
        self.CLASSES = tuple(classes) if classes is not None else class_names(table.labels or ())
        return self._encoded(table, supervised)

    def _of_split(self, table, draw, where):
        """(N,) bool: the rows of the split, by the column split or by a draw. Raises DataError if there are none."""
        drawn = draw[0] or draw[1]
        if table.splits is None:
            if drawn and table.groups is None:
                log.warning(
                    "%s has no column group: splits are drawn image by image, so neighbouring images may be in train "
                    "and in test",
                    where,
                )
            return drawn_by_group(self.split, self._groups, *draw, where)
        if drawn:
            log.warning("--val_fraction and --test_fraction are not used: %s has a column split", where)
        if table.groups is not None:
            _warn_of_shared_groups(table.splits, self._groups, where)
        keep = np.isin(table.splits, PARTS[self.split])
        if not keep.any():
            counts = ", ".join(f"{name} {count}" for name, count in Counter(table.splits.tolist()).items())
            raise DataError(
                f"{where}: no row of split '{self.split}' (rows: {counts}); choose another split, or correct the "
                "column split"
            )
        return keep

    def _encoded(self, table, supervised):
        """Labels as (N, K) uint8. Raises DataError for labels that are none of CLASSES, where they are needed."""
        number = {name: k for k, name in enumerate(self.CLASSES)}
        labels = np.zeros((len(table.listing.ids), len(self.CLASSES)), np.uint8)
        unknown = []
        for i, names in enumerate(table.labels or ()):
            for name in names:
                if name in number:
                    labels[i, number[name]] = 1
                else:
                    unknown.append(i)
        if unknown and supervised:
            raise data_error(
                f"{len(unknown)} labels are not among the {len(number)} classes "
                f"({', '.join(self.CLASSES[:5])}{', …' if len(number) > 5 else ''})",
                [f"{quoted(';'.join(table.labels[i]))} ({table.listing.where(i)})" for i in unknown],
                "correct the rows, or give the metadata of the data that the model was trained on",
            )
        return labels

    def _leave_out_unlabelled(self, where):
        keep = self.listing.labels.any(1)
        if not keep.any():
            raise DataError(
                f"{where}: none of the {len(keep)} images of split '{self.split}' has a label; give a column label "
                "or labels with --metadata; only pretraining, --embed, --predict and sarwmix.prepare.statistics do "
                "not need labels"
            )
        if len(self.CLASSES) < 2:
            raise DataError(
                f"{where}: all images have the label {quoted(self.CLASSES[0])}; at least two classes are needed"
            )
        self._select(keep)

    def _select(self, rows):
        super()._select(rows)
        self._paths, self._groups = self._paths[rows], self._groups[rows]

    @property
    def groups(self):
        return self._groups

    @cached_property
    def size(self):
        """S, the side of the first image. Raises DataError if it cannot be read."""
        first = next((paths for paths in self._paths if all(Path(path).is_file() for path in paths)), self._paths[0])
        return self._find("the first image", first).height

    def files(self, i):
        return list(self._paths[i])

    def require(self):
        load_rasterio()

    def read_image(self, i, which=0):
        image = self._find(str(self.ids[i]), self._paths[i], self.where(i))
        if image.height != image.width or image.height != self.size:
            raise DataError(
                f"{image.bands[0].path}: is {image.height}x{image.width} pixels, but images must be square and of one "
                f"size, {self.size}x{self.size} as the first; cut them with sarwmix.tile, or remove it from the table "
                f"({self.where(i)})"
            )
        try:
            return image.read(listed=False)
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error

    def _find(self, name, paths, where=None):
        try:
            return Image.find(name, paths, self.reading, listed=False)
        except DataError as error:
            raise DataError(f"{error} ({where})" if where else str(error)) from error

    def georeference(self):
        """DataFrame of `sarwmix.raster.GRID`, a row per image, the scene being its group; None if no image has one."""

        def row(i):
            return self._find(str(self.ids[i]), self._paths[i], self.where(i)).grid_row(self._groups[i])

        table = pd.DataFrame(in_threads(row, range(len(self))), columns=GRID)
        return table if (table.crs != "").any() else None

    def describe(self):
        return super().describe() | {"reading": asdict(self.reading)}


def class_names(labels):
    """The classes of all samples, sorted, as numbers if all of them are. labels: the names of each sample."""
    names = sorted({name for sample in labels for name in sample})
    return tuple(sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,9}", name) for name in names) else names)


def _paths_of(ids, found, folders):
    """(N,) object: the tuple of files of each id. A file that does not exist is looked for as it is named.

    found: {name: files}. folders: those that paths may be relative to; the last one is that of the images.
    """
    by_name, by_path = dict(found), {}
    for files in found.values():
        for file in map(Path, files):
            relative = {file.relative_to(folder) for folder in folders}
            by_path |= {str(path): files for path in relative}
            for key in {file.name, file.stem, *map(str, relative), *(str(path.with_suffix("")) for path in relative)}:
                # A name that several files have names none of them; a path is always one file's.
                by_name[key] = files if by_name.get(key, files) == files else None
    by_name |= by_path
    paths = np.empty(len(ids), object)
    paths[:] = [by_name.get(name) or (str(folders[-1] / name),) for name in ids.tolist()]
    return paths


def _warn_of_shared_groups(splits, groups, where):
    """Warns of groups that are in train and in another split."""
    train = splits == "train"
    shared = sorted(set(groups[train].tolist()) & set(groups[~train].tolist()))
    if shared:
        log.warning(
            "%s: %d groups are in train and in another split, so neighbouring images are trained on and tested on: %s",
            where,
            len(shared),
            listed(shared),
        )


def _refuse_same_files(paths, listing):
    """Raises DataError if rows name the same image in different ways, as "a" and "sub/a.tif"."""
    keys = [tuple(map(os.path.abspath, files)) for files in paths.tolist()]
    if len(set(keys)) == len(keys):
        return
    first, repeated = {}, []
    for i, key in enumerate(keys):
        k = first.setdefault(key, i)
        if k != i:
            repeated.append(f"{listing.ids[k]} ({listing.where(k)}) and {listing.ids[i]} ({listing.where(i)})")
    raise data_error(f"{len(repeated)} of {len(keys)} rows repeat an image", repeated, "remove the repeated rows")


# ---- Tables --------------------------------------------------------------------------------------


@dataclass
class Table:
    """The rows of metadata files. listing: without labels. None: there is no such column.

    labels: [(name, …), …]. splits, groups, masks: (N,) str. task: "multiclass" for one label each, else "multilabel".
    """

    listing: Listing
    labels: list | None = None
    splits: np.ndarray | None = None
    groups: np.ndarray | None = None
    task: str = "multilabel"
    masks: np.ndarray | None = None


def read_tables(paths, root):
    """Reads metadata files as one table. Raises DataError."""
    frames = [_read_table(path, place_name(path, root)) for path in paths]
    kinds = {tuple(name for name in ("label", "labels", "mask", "split") if name in columns) for columns, _ in frames}
    if len(kinds) > 1:
        raise DataError(f"{', '.join(map(str, paths))}: have different columns; give files of the same columns")
    known = [name for name in COLUMNS if all(name in columns for columns, _ in frames)]
    names = {name: np.concatenate([columns[name] for columns, _ in frames]) for name in known}
    listing = join_listings([listing for _, listing in frames])
    label = next((name for name in ("labels", "label") if name in names), None)
    if "label" in names and "labels" in names:
        raise DataError(f"{paths[0]}: has a column label and a column labels; remove one of them")
    if len(listing.ids) == 0:
        raise DataError(f"{', '.join(map(str, paths))}: has no rows; add a row for each image")
    labels = None
    if label == "label":
        several = [i for i, name in enumerate(names["label"].tolist()) if SEPARATOR in name]
        if several:
            raise data_error(
                f"{len(several)} rows name several classes in the column label",
                [f"{quoted(str(names['label'][i]))} ({listing.where(i)})" for i in several],
                "name the column labels, or write one class in each row",
            )
        labels = [(name,) if name else () for name in names["label"].tolist()]
    elif label:
        labels = [tuple(filter(None, map(str.strip, text.split(SEPARATOR)))) for text in names["labels"].tolist()]
    splits = names.get("split")
    if splits is not None:
        splits = np.where(splits == "validation", "val", splits)
        unknown = [i for i, name in enumerate(splits.tolist()) if name not in PARTS["all"]]
        if unknown:
            raise data_error(
                f"{len(unknown)} of {len(splits)} rows have an unknown split",
                [f"{quoted(str(splits[i]))} ({listing.where(i)})" for i in unknown],
                "it must be train, val or test; or remove the column, and give --val_fraction and --test_fraction",
            )
    groups = next((names[name] for name in GROUPS if name in names), None)
    task = "multiclass" if label == "label" else "multilabel"
    return Table(listing, labels, splits, groups, task, names.get("mask"))


def _read_table(path, place):
    """({column: (N,) str}, Listing without labels) of a CSV or parquet file. Raises DataError."""
    columns, place, lines = read_columns(path, place, COLUMNS)
    if "id" not in columns:
        raise DataError(
            f"{path}: has no column id (columns: {', '.join(map(quoted, columns)) or 'none'}); name the column of the "
            "paths or names of the images id"
        )
    columns = {name: np.array(columns[name], dtype=str) for name in COLUMNS if name in columns}
    listing = Listing(columns["id"], None, (place,), line=np.array(lines, np.int64))
    empty = [listing.where(i) for i, name in enumerate(columns["id"].tolist()) if not name]
    if empty:
        raise data_error(f"{path}: {len(empty)} rows have no id", empty, "correct the rows")
    return columns, listing
