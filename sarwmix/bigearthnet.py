# SPDX-License-Identifier: MIT
"""What BigEarthNet v1 and v2 share: the class table, multi-hot labels, reading lists, the base Dataset.

Classes: the 43 CORINE Land Cover level-3 classes and the 19-class nomenclature of Sumbul et al., BigEarthNet-MM, IEEE
GRSM 2021; datasets/README.md.
"""

import copy
import csv
import hashlib
import logging
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import DataError, data_error, quoted
from sarwmix.geotiff import load_rasterio, read_band
from sarwmix.layouts import whereabouts
from sarwmix.moments import Tally
from sarwmix.plausibility import FIRST_LOOK, check_decibels, judge

CLASS_TABLE = Path(__file__).parent.parent / "datasets" / "bigearthnet_classes.csv"
CHANNELS, SIZE = ("VH", "VV"), 120
SPLITS = ("train", "val", "test", "train_val", "all")
THREADS = 32  # for file systems whose every answer takes a millisecond, not for cores
AT_ONCE = 5e-5  # seconds: an answer that comes sooner comes from memory, and threads would only be in each other's way

S1_NAME = re.compile(r"S1[A-Z](?:_[A-Za-z0-9-]+){3,}")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_EMPTY_LIST = re.compile(r"\[[\s,]*\]")

log = logging.getLogger(__name__)

# ---- Classes and labels --------------------------------------------------------------------------


def _read_class_table():
    """(the 19 class names in official order, {43-class name: index of its 19-class name, or None if dropped})."""
    with open(CLASS_TABLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {int(row["ben19_id"]): row["ben19"] for row in rows if row["ben19"]}
    clc43 = {row["clc43"]: int(row["ben19_id"]) if row["ben19"] else None for row in rows}
    return tuple(names[i] for i in sorted(names)), clc43


CLASSES, CLC43 = _read_class_table()
BEN19 = {name: index for index, name in enumerate(CLASSES)}


def multi_hot(names, nomenclature=BEN19):
    """(19,) uint8, 1 for each class named. nomenclature: BEN19, or CLC43, some of whose classes have no 19-class one.

    Raises DataError for a name that is not in the nomenclature.
    """
    row = np.zeros(len(CLASSES), np.uint8)
    for name in names:
        if name not in nomenclature:
            raise DataError(f"unknown label {quoted(name)}")
        if nomenclature[name] is not None:
            row[nomenclature[name]] = 1
    return row


def parse_labels(text):
    """Names in a printed list: Python's ['a', 'b'] or numpy's ['a' 'b'], over any number of lines.

    Names may contain commas. Raises DataError for anything else.
    """
    if not _EMPTY_LIST.fullmatch(_QUOTED.sub("", text).strip()):
        raise DataError(f"not a printed list of quoted names {quoted(text)}")
    return [single or double for single, double in _QUOTED.findall(text)]


# ---- Lists ---------------------------------------------------------------------------------------


@dataclass
class Listing:
    """Samples in the order of the metadata or lists that name them, and where each was named.

    ids (N,) str; labels (N, 19) uint8, or None when they are read later; line (N,), in the file of index file (N,),
    whose printed form, up to the line, is places[file]. A listing made from folders has no lines.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    places: tuple
    file: np.ndarray | None = None
    line: np.ndarray | None = None

    def where(self, i):
        """Where row i was named: "benv2_train.csv:312" (1-based line), "metadata.parquet: row 17" (0-based row)."""
        place = self.places[0 if self.file is None else self.file[i]]
        return f"{place}{self.ids[i] if self.line is None else self.line[i]}"

    def take(self, rows):
        """The listing of these rows alone; rows: indices or a boolean mask."""
        parts = [None if x is None else x[rows] for x in (self.ids, self.labels, self.file, self.line)]
        return Listing(parts[0], parts[1], self.places, *parts[2:])


def join_listings(listings):
    """One listing out of several, each of one file, in this order."""
    labels = [listing.labels for listing in listings]
    return Listing(
        np.concatenate([listing.ids for listing in listings]),
        None if labels[0] is None else np.concatenate(labels),
        tuple(listing.places[0] for listing in listings),
        np.concatenate([np.full(len(listing.ids), k, np.int16) for k, listing in enumerate(listings)]),
        np.concatenate([listing.line for listing in listings]),
    )


def place_name(path, root):
    """How messages call a list: by its path inside the root, or as it was given."""
    path, root = Path(path), Path(root)
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def read_csv_rows(path):
    """(1-based line a record starts at, its cells) for every record that is not blank.

    Raises DataError, which names the file, if it does not exist, is not UTF-8 or is not a CSV. A quotation mark without
    its other half is an error, as the rest of the file would be taken for one cell.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader, line = csv.reader(_without_nul(file), strict=True), 1
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1  # a quoted cell may span lines
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV file ({error}); check the path and the file") from error


def _without_nul(lines):
    """The lines of a text file. Raises csv.Error for the character NUL, which a crash may leave many of in a file."""
    for line in lines:
        if "\0" in line:
            raise csv.Error("line contains NUL")
        yield line


def check_names(names, where, pattern=S1_NAME, kind="S1 patch"):
    """DataError listing the names that cannot be patch names: too few parts, or characters that could leave the folder.

    where: row -> where it was named.
    """
    bad = [i for i, name in enumerate(names) if not (name and len(name) <= 100 and pattern.fullmatch(name))]
    if bad:
        raise data_error(
            f"{len(bad)} of {len(names)} rows have no {kind} name",
            [f"{quoted(names[i])} ({where(i)})" for i in bad],
            "correct the rows, or say with --id_col which column (0-based) holds the S1 names",
        )


def check_root(root):
    """The folder as a Path. Raises DataError if it does not exist."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the dataset's folder with --data_path")
    return root


def check_split(split):
    """The split under its own name: "validation" is "val". Raises DataError for an unknown one."""
    split = "val" if split == "validation" else split
    if split not in SPLITS:
        raise DataError(f"unknown split {quoted(split)}; choose one of {', '.join(SPLITS)}")
    return split


def as_paths(files):
    """A list of paths, from one path or several."""
    return [Path(files)] if isinstance(files, (str, os.PathLike)) else [Path(file) for file in files]


def split_lists(folder, prefix, split):
    """Paths of the CSV files a split consists of: <prefix>_train.csv, _val, _test, and _train_val if it is there."""
    if split == "all":
        return split_lists(folder, prefix, "train_val") + split_lists(folder, prefix, "test")
    path = folder / f"{prefix}_{split}.csv"
    if split == "train_val" and not path.exists():
        return split_lists(folder, prefix, "train") + split_lists(folder, prefix, "val")
    return [path]


def acquisitions_of(ids):
    """(N,) str: the acquisition of each patch of these ids."""
    return np.array([name.rsplit("_", 3)[0] for name in ids.tolist()], dtype=str)


def in_threads(function, items):
    """Results of `function` for every item, in order. Many at a time once the file system lets it wait."""
    chunks = iter(
        [items[k : k + 256] for k in range(0, len(items), 256)]
    )  # a future per item would cost more than its work
    results = []
    for chunk in chunks:
        started = time.perf_counter()
        results += map(function, chunk)
        if time.perf_counter() - started > AT_ONCE * len(chunk):
            break
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(lambda chunk: list(map(function, chunk)), chunks):
            results += part
    return results


def labelled(listing, source, unknown=False):
    """The rows of a listing that have a label, or whose labels are `unknown` (a mask): those of patches that are missing.

    Raises DataError, which names the `source` of the labels, if there are none.
    """
    keep = listing.labels.any(axis=1) | unknown
    log.info("dropped %d of %d patches, which have no 19-class label", np.count_nonzero(~keep), len(keep))
    if not keep.any():
        raise DataError(
            f"{source}: none of the {len(keep)} patches has a 19-class label; give data with labels: pretraining, --embed "
            "and sarwmix.prepare.statistics alone do without them"
        )
    return listing.take(keep)


def refuse_duplicates(listing):
    """Raises DataError if an id is listed twice: count, and where the first five are."""
    names = listing.ids.tolist()
    if len(set(names)) == len(names):
        return
    first, repeated = {}, []
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            repeated.append(f"{name} ({listing.where(first[name])} and {listing.where(i)})")
    raise data_error(f"{len(repeated)} of {len(names)} rows repeat an id", repeated, "remove the repeated rows")


# ---- Where the images are ------------------------------------------------------------------------


class Store:
    """The images of patches under one folder: files, one for each channel. Other kinds override all but `image`."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, patch, channel):
        """Where one channel of a patch is, as messages show it."""
        raise NotImplementedError

    def missing(self, patch):
        """The channels of a patch that are not there, or empty. Looks, and reads nothing."""
        return [channel for channel in CHANNELS if not _has_content(self.path(patch, channel))]

    def whereabouts(self, patch, channel):
        """For a message: where a channel that is missing was looked for, and what is there instead."""
        return whereabouts(self.path(patch, channel))

    def require(self):
        """Raises DataError if a package that reading needs is not installed."""
        load_rasterio()

    def bands(self, patch, max_nonfinite):
        """[VH, VV] of a patch, (H, W) float32 dB. Raises DataError, which names what cannot be read."""
        return [read_band(self.path(patch, channel), max_nonfinite, channel, integers=False) for channel in CHANNELS]

    def image(self, patch, max_nonfinite):
        """(2, 120, 120) float32 dB. Raises DataError, which names what cannot be read, has another size or is not dB."""
        bands = self.bands(patch, max_nonfinite)
        for channel, band in zip(CHANNELS, bands):
            if band.shape != (SIZE, SIZE):
                raise DataError(
                    f"{self.path(patch, channel)}: is {'x'.join(map(str, band.shape))} pixels, not {SIZE}x{SIZE}; "
                    "restore the patch, or remove its row"
                )
        image = np.stack(bands)
        check_decibels(image, lambda channel: self.path(patch, channel))
        return image


class PatchFolders(Store):
    """A folder of GeoTIFFs in a Layout."""

    def __init__(self, layout):
        super().__init__(layout.folder)
        self._layout = layout

    def path(self, patch, channel):
        return f"{self._layout.folder_of(patch)}/{patch}_{channel}{self._layout.suffix}"


def _has_content(path):
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


# ---- The dataset ---------------------------------------------------------------------------------


class BigEarthNet(Dataset):
    """Sentinel-1 patches with 19-class labels: what BigEarthNetv1 and BigEarthNetv2 do alike.

    An item is (sar, labels): (2, 120, 120) float32 in dB, order VH, VV; (19,) float32, 1 for each class present.
    Item i is the sample named `ids[i]`; the order is that of the metadata. NaN in the files stays in the items.
    """

    CHANNELS, UNITS = CHANNELS, "dB"
    CLASSES = CLASSES
    SIZE = SIZE
    left_out = None  # samples that were left out because their images are missing, where that was asked for

    def __init__(self, root, split, store, listing, max_nonfinite):
        refuse_duplicates(listing)
        self.root, self.split, self.max_nonfinite = Path(root), split, max_nonfinite
        self.ids = listing.ids
        self._store, self._listing = store, listing

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image = self.image(i)
        try:
            return image, torch.from_numpy(self._labels(i).astype(np.float32))
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error

    def image(self, i):
        """The image of item i alone, (2, 120, 120) float32 dB, where labels are not needed and may cost a read."""
        try:
            return torch.from_numpy(self._store.image(str(self.ids[i]), self.max_nonfinite))
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error

    def read_image(self, i, which=0):
        """The image of item i as an array, (2, 120, 120) float32 dB, NaN for no data."""
        return self.image(i).numpy()

    def where(self, i):
        """Where sample i was named: "benv2_train.csv:312" (1-based line), "metadata.parquet: row 17" (0-based row)."""
        return self._listing.where(i)

    def require(self):
        """Raises DataError if a package that reading needs is not installed."""
        self._store.require()

    @property
    def groups(self):
        """(N,) str: the acquisition of each sample. Patches of one acquisition lie side by side."""
        return acquisitions_of(self.ids)

    @property
    def size(self):
        """Side of the images, in pixels."""
        return self.SIZE

    @property
    def image_names(self):
        """(N, 1) str: of the one image of each sample."""
        return self.ids[:, None]

    def label_table(self):
        """(N, 19) uint8, the labels of all samples. Read at the start, unless patches without a label were kept."""
        if self._listing.labels is None:
            return np.stack(in_threads(self._labels, range(len(self))))
        return self._listing.labels

    def subset(self, rows):
        """This dataset with some of its samples alone; rows: indices or a boolean mask."""
        part = copy.copy(self)
        part._listing = self._listing.take(rows)
        part.ids = part._listing.ids
        return part

    def portable(self, rows):
        """These samples alone, as can be sent to a process that runs already."""
        return self.subset(rows)

    def files(self, i):
        """Where sample i is, one for each of CHANNELS: paths of files, or names in a Zarr store or an LMDB."""
        return [self._store.path(str(self.ids[i]), channel) for channel in CHANNELS]

    def describe(self):
        """What a run records about its data; can be written as JSON. class_counts is None while labels are unread."""
        labels = self._listing.labels
        return {
            "name": type(self).__name__,
            "root": str(self.root),
            "metadata": [str(path) for path in self.metadata],
            "split": self.split,
            "samples": len(self),
            "class_counts": None if labels is None else dict(zip(CLASSES, labels.sum(0, dtype=int).tolist())),
            "fingerprint": hashlib.sha256("\n".join(self.ids.tolist()).encode()).hexdigest(),
        } | ({} if self.left_out is None else {"left_out": self.left_out})

    def missing(self, start=0, step=1):
        """Those of every step-th sample from `start` whose images are missing or empty: their positions.

        Ranks share the work with start=rank, step=world size.
        """
        return [i for i, _ in self._incomplete(range(len(self))[start::step])]

    def _incomplete(self, rows):
        """[(sample, its channels that are missing or empty)]."""
        found = in_threads(lambda i: self._store.missing(str(self.ids[i])), rows)
        return [(i, lost) for i, lost in zip(rows, found) if lost]

    def check_files(self, start=0, step=1):
        """Raises DataError if images of every step-th sample from `start` are missing or empty: count, first five.

        Ranks share the work with start=rank, step=world size.
        """
        rows = range(len(self))[start::step]
        missing = self._incomplete(rows)
        if missing:
            i, lost = missing[0]
            raise data_error(
                f"{len(missing)} of {len(rows)} samples lack data (--skip_missing leaves them out, --skip_bad when they are packed)",
                [f"{self.ids[i]} {' and '.join(lost)} ({self.where(i)})" for i, lost in missing],
                f"{self._store.whereabouts(str(self.ids[i]), lost[0])}; restore them in {self._store.folder}, or remove these rows",
            )

    def check_units(self, expected=None, samples=32):
        """{"mean", "std", "min", "max": [VH, VV] in dB, "nonfinite": pixels} of up to `samples` evenly spaced samples.

        expected: (mean, std) that they will be standardised with. Raises DataError for values that cannot be dB, and
        warns of those that may not be (`sarwmix.plausibility`).
        """
        rows = np.unique(np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int))
        total = Tally()
        for i in rows:
            total.add(self.read_image(i))
        figures = total.summary()
        judge(f"{self.root}: {len(rows)} images of split '{self.split}'", figures, expected, total.histogram_dict())
        return {name: figures[name] for name in FIRST_LOOK} | {
            "nonfinite": sum(figures["nodata"] + figures["infinite"])
        }

    def _labels(self, i):
        """(19,) uint8 of sample i."""
        return self._listing.labels[i]
