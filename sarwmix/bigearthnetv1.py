# SPDX-License-Identifier: MIT
"""BigEarthNet v1 (BigEarthNet-MM), Sentinel-1: patch folders with JSON files, or a Zarr group per patch."""

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from common.errors import DataError, data_error
from common.files import read_json
from common.packages import PACK_ELSEWHERE, load
from sarwmix.bigearthnet import CLASSES, CLC43, SIZE, BigEarthNet, PatchFolders, every_patch, labelled, multi_hot
from sarwmix.geotiff import MOST_PIXELS, check_nonfinite
from sarwmix.layouts import S1_START, Layout, find_layout, places_of_lists
from sarwmix.listing import (
    CHANNELS,
    Listing,
    as_paths,
    check_names,
    check_root,
    check_split,
    in_threads,
    join_listings,
    place_name,
    read_csv_rows,
    split_lists,
)

INNER = "BigEarthNet-S1-v1.0"
S2_START = re.compile(r"S2[A-Z]_")
S2_NAMES = re.compile(r"S2[A-Z](?:_[A-Za-z0-9-]+){3,}"), "S2 patch"

log = logging.getLogger(__name__)


class BigEarthNetv1(BigEarthNet):
    """BigEarthNet v1: item i is (sar (2, 120, 120) float32 dB, order VH, VV; labels (19,) float32 multi-hot).

    root: the folder of patch folders, or the folder that contains BigEarthNet-S1-v1.0 (other layouts: `find_layout`);
    or a Zarr store (format 2 or 3) with groups sentinel1/<patch> of arrays VH and VV and the attribute `labels`.
    split: train, val (or validation), test, train_val, all. metadata: one or several lists of patches, all of which are
    used; by default benv1_{train,val,test}.csv in root, or beside it if root is the patches' folder or store.
    Lists are the official ones (S2 names, or S2 and S1 names, no header) or CSVs with the S1 names in column id_col
    (0-based; by default the second column, else the first with such names). For S2 names all JSON files are read;
    lists with S1 names open faster. Without lists, the splits all and train_val are all patches that exist, sorted.
    keep_unlabelled: keeps patches without a 19-class label or without a JSON file, for pretraining; labels are then
    read per item. False drops them, for supervised training, and reads all labels first.
    max_nonfinite: fraction of NaN, infinite and no-data pixels above which reading a band fails.
    Raises DataError for lists and labels that cannot be used; `check_files` and `check_units` look at the images.
    Source: Sumbul et al., BigEarthNet-MM, IEEE GRSM 2021.
    """

    MEAN = (-19.2309, -12.5951)
    STD = (3.1672, 2.9644)  # what the released v1 checkpoints were trained with; measured elsewhere: about 5.46, 5.12

    def __init__(self, root, split="train_val", metadata=None, id_col=None, keep_unlabelled=True, max_nonfinite=0.01):
        root, split = check_root(root), check_split(split)
        store = open_store(root)
        metadata = _default_lists(root, store, split) if metadata is None else as_paths(metadata)
        if metadata:
            by_s2_name = cache(lambda: patches_by_s2_name(store))  # called only if a list has S2 names
            listing = join_listings([
                _by_s1_name(*read_list(path, place_name(path, root), id_col), store, by_s2_name) for path in metadata
            ])  # fmt: skip
        else:
            listing = every_patch(store)
            log.info("%s: no split lists: split %s is every patch, %d", root, split, len(listing.ids))
        if not keep_unlabelled:
            listing.labels, absent = _read_all_labels(store, listing.ids.tolist(), logging.WARNING)
            listing = labelled(listing, store.folder, absent)
        super().__init__(root, split, metadata, store, listing, max_nonfinite)

    def check_files(self, start=0, step=1):
        """As in the base class. Also reads the labels of these samples, unless they have been read."""
        super().check_files(start, step)
        if self.listing.labels is None:
            _read_all_labels(self.store, self.ids[start::step].tolist())

    def label_rows(self, rows):
        if self.listing.labels is not None:
            return super().label_rows(rows)
        rows = np.arange(len(self))[rows]
        return np.stack(in_threads(self._read_labels, rows)) if rows.ndim else self._read_labels(rows)

    def _read_labels(self, i):
        try:
            labels = self.store.labels(str(self.ids[i]))
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error
        return np.zeros(len(CLASSES), np.uint8) if labels is None else labels


# ---- Stores of patches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The JSON file or the attributes of a patch. path: for messages. Methods raise DataError for wrong content."""

    path: str
    content: dict

    def label_names(self):
        """The 43-class names, a list."""
        names = self.content.get("labels")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self.path}: has no list of labels; copy it again, or remove its patch")
        return names

    def labels(self):
        """(19,) uint8, 1 for each of the 19 classes present."""
        names = self.label_names()
        try:
            return multi_hot(names, CLC43)
        except DataError as error:
            raise DataError(
                f"{self.path}: {error}; use the 43-class names in datasets/bigearthnet_classes.csv"
            ) from None

    def s2_name(self):
        """Name of the Sentinel-2 patch of the same place."""
        name = self.content.get("corresponding_s2_patch")
        if not isinstance(name, str):
            raise DataError(f"{self.path}: has no corresponding_s2_patch; copy it again, or give a list with S1 names")
        return name


class FolderStore(PatchFolders):
    """Patch folders in a Layout: <patch>/<patch>_{VH,VV}.tif and <patch>/<patch>_labels_metadata.json."""

    def metadata(self, patch):
        """The Metadata of a patch, from its JSON file."""
        path = f"{self._layout.folder_of(patch)}/{patch}_labels_metadata.json"
        return Metadata(path, _read_object(path))

    def labels(self, patch):
        """Labels of a patch, (19,) uint8; None if its JSON file or the labels in it are missing. Raises DataError."""
        try:
            metadata = self.metadata(patch)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError) and self._can_lack_metadata(patch):
                return None
            raise
        return None if metadata.content.get("labels") is None else metadata.labels()

    def has(self, patch):
        """Whether the folder of a patch exists."""
        return os.path.isdir(self._layout.folder_of(patch))

    def _can_lack_metadata(self, patch):
        """Whether a patch without metadata is valid, not damaged."""
        return True


class ZarrStore(FolderStore):
    """A Zarr store in a folder: groups sentinel1/<patch> with arrays VH and VV and attributes.

    Attributes are JSON files in formats 2 and 3 and are read as such, because the zarr package would take 20 minutes
    for the whole dataset. Arrays are read with the package.
    """

    def __init__(self, root):
        super().__init__(Layout(root / "sentinel1", acquisitions=False))

    def path(self, patch, channel):
        return f"{self.folder}/{patch}/{channel}"

    def grid_row(self, patch):
        """None: a Zarr store does not say where its patches lie."""

    def metadata(self, patch):
        path = f"{self.folder}/{patch}/zarr.json"
        if os.path.exists(path):
            return Metadata(path, _object(path, _read_object(path).get("attributes", {})))
        path = f"{self.folder}/{patch}/.zattrs"
        return Metadata(path, _read_object(path))

    def _can_lack_metadata(self, patch):
        # In format 2, attributes are a separate file.
        return os.path.exists(f"{self.folder}/{patch}/.zgroup") or not self.has(patch)

    def missing(self, patch):
        return [channel for channel in CHANNELS if not _has_chunk(self.path(patch, channel))]

    def require(self):
        _zarr()

    def bands(self, patch, max_nonfinite):
        return [_read_array(self.path(patch, channel), max_nonfinite) for channel in CHANNELS]


def _zarr():
    return load("zarr", "reading a Zarr store", PACK_ELSEWHERE)


def _has_chunk(path):
    """Whether the array at this path exists and has a chunk. An array without chunks reads as its fill value."""
    try:
        names = set(os.listdir(path))
    except OSError:
        return False
    return bool(names & {"zarr.json", ".zarray"}) and bool(names - {"zarr.json", ".zarray", ".zattrs"})


def _read_array(path, max_nonfinite):
    """Reads an array as float32. Raises DataError with the path if that fails or too many pixels are not finite."""
    zarr = _zarr()
    try:
        array = zarr.open_array(path, mode="r")
        held = f"{array.dtype} of shape {array.shape}"
        usable = array.dtype.kind == "f" and array.size <= MOST_PIXELS
        values = array[:].astype(np.float32, copy=False) if usable else None
    except Exception as error:  # the package raises errors of many types for damaged metadata
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a Zarr array ({reason}); copy it again") from error
    if values is None:
        raise DataError(f"{path}: holds {held}, not float32 of {SIZE}x{SIZE}; copy it again")
    check_nonfinite(values, path, max_nonfinite)
    return values


def open_store(root):
    """The ZarrStore or FolderStore under a folder. Raises DataError for a Zarr store without patches."""
    if any((root / marker).exists() for marker in ("zarr.json", ".zgroup", ".zmetadata", "sentinel1")):
        if not (root / "sentinel1").is_dir():
            raise DataError(f"{root}: this Zarr store has no group sentinel1; check --data_path")
        return ZarrStore(root)
    layout = find_layout(root, INNER, acquisitions=False)
    return FolderStore(layout or Layout(root / INNER if (root / INNER).is_dir() else root, acquisitions=False))


def _read_object(path):
    return _object(path, read_json(path, "copy it again, or remove its patch"))


def _object(path, content):
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object; copy it again, or remove its patch")
    return content


def _of_each(read, patches):
    """[read(patch) for all patches], with the DataError in place of the result where it is raised."""

    def attempt(patch):
        try:
            return read(patch)
        except DataError as error:
            return error

    return in_threads(attempt, patches)


def _read_all_labels(store, patches, level=logging.INFO):
    """Returns (labels (N, 19) uint8, 0 for patches without labels; (N,) bool, whether a patch does not exist).

    level: log level for patches without labels. Raises DataError with the number of unreadable labels and the first
    five.
    """
    labels = _of_each(store.labels, patches)
    problems = [str(label) for label in labels if isinstance(label, DataError)]
    if problems:
        raise data_error(
            f"{len(problems)} of {len(patches)} patches have labels that cannot be read",
            problems,
            "restore them, or take these patches out of the lists",
        )
    absent = np.array([label is None and not store.has(patch) for patch, label in zip(patches, labels)])
    unsaid = [patch for patch, label, gone in zip(patches, labels, absent) if label is None and not gone]
    if unsaid:
        log.log(
            level, "%s: %d of %d patches have no labels, the first is %s; restore the JSON files of those with labels",
            store.folder, len(unsaid), len(patches), unsaid[0],
        )  # fmt: skip
    nothing = np.zeros(len(CLASSES), np.uint8)
    return np.array([nothing if label is None else label for label in labels], np.uint8), absent


# ---- Lists of patches ----------------------------------------------------------------------------


def _default_lists(root, store, split):
    """Paths of the lists of the split; [] if there are no lists and the split does not need them. Raises DataError."""
    for folder in places_of_lists(root, root if isinstance(store, ZarrStore) else store.folder, INNER):
        if any((folder / f"benv1_{part}.csv").exists() for part in ("train", "val", "test", "train_val")):
            lists = split_lists(folder, "benv1", split)
            missing = [str(path) for path in lists if not path.exists()]
            if missing:
                raise data_error(f"split {split} lacks {len(missing)} of its lists", missing, "copy them there")
            return lists
    if split in ("all", "train_val"):
        return []
    path = root / f"benv1_{split}.csv"
    raise DataError(f"{path}: no such file; put the official split lists there, or name one with --metadata")


def read_list(path, place, id_col=None):
    """Reads a split list. Returns (Listing, whether its names are S2 names). place: its name in messages.

    Raises DataError for a list that cannot be read, has no patches, or has invalid names.
    """
    lines, names, are_s2 = _read_names(path, id_col)
    if not names:
        raise DataError(f"{path}: lists no patch; copy the list again")
    check_names(names, lambda i: f"{place}:{lines[i]}", *(S2_NAMES if are_s2 else ()))
    return Listing(np.array(names, dtype=str), None, (f"{place}:",), line=np.array(lines, np.int64)), are_s2


def patches_by_s2_name(store, unreadable=None):
    """{S2 name: S1 name} of all patches, read from their metadata, because names cannot be derived from each other.

    unreadable: a list to which DataErrors of unreadable metadata are added; None raises the first one.
    """
    patches = store.patches()
    log.info("%s: reading the metadata of %d patches for their S2 names", store.folder, len(patches))
    pairs = {}
    for patch, s2_name in zip(patches, _of_each(lambda patch: store.metadata(patch).s2_name(), patches)):
        if isinstance(s2_name, DataError):
            if unreadable is None:
                raise s2_name
            unreadable.append(s2_name)
        elif s2_name in pairs:
            raise DataError(
                f"{store.folder}: {pairs[s2_name]} and {patch} both belong to {s2_name}; give a list with S1 names"
            )
        else:
            pairs[s2_name] = patch
    return pairs


def _by_s1_name(listing, are_s2, store, by_s2_name):
    """Converts a listing to S1 names. by_s2_name: a function that returns {S2 name: S1 name} of all patches."""
    if not are_s2:
        return listing
    pairs, names = by_s2_name(), listing.ids.tolist()
    lost = [f"{name} ({listing.where(i)})" for i, name in enumerate(names) if name not in pairs]
    if lost:
        raise data_error(
            f"{len(lost)} of {len(names)} S2 names belong to none of the {len(pairs)} patches",
            lost,
            f"copy the missing patches to {store.folder}, remove these rows, or give lists with S1 names and "
            "--skip_missing, which leaves out the missing patches",
        )
    return replace(listing, ids=np.array([pairs[name] for name in names], dtype=str))


def _read_names(path, id_col):
    """Reads a split list. Returns (1-based lines, names, whether they are S2 names)."""
    # Tuples, because the garbage collector would visit half a million lists repeatedly.
    rows = [(line, tuple(row)) for line, row in read_csv_rows(path)]
    column = _name_column(path, rows[:2], id_col)
    if rows and not any(S1_START.match(cell) or S2_START.match(cell) for cell in _cells(rows[0])):
        rows = rows[1:]  # a header, because no cell is a name
    short = [f"{path.name}:{line}" for line, row in rows if len(row) <= column]
    if short:
        raise data_error(
            f"{path}: {len(short)} of {len(rows)} rows have no column {column}", short, "correct the rows, or --id_col"
        )
    names = [row[column].strip() for _, row in rows]
    return [line for line, _ in rows], names, bool(names) and bool(S2_START.match(names[0]))


def _cells(numbered_row):
    return [cell.strip() for cell in numbered_row[1]]


def _name_column(path, first_rows, id_col):
    """The column of the patch names: id_col, else the column with S1 names, else S2 names, in the first two rows."""
    if id_col is not None:
        if id_col < 0:
            raise DataError(f"{path}: has no column {id_col}; --id_col counts from 0")
        return id_col
    for start in (S1_START, S2_START):
        for row in map(_cells, first_rows):
            for column in sorted(range(len(row)), key=lambda k: k != 1):  # the second column first
                if start.match(row[column]):
                    return column
    if first_rows:
        raise DataError(f"{path}: no S1 or S2 patch name in its first two rows; give their column with --id_col")
    return 0
