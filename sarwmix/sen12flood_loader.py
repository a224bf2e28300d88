# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, Sentinel-1: pairs of images of one place, and whether the second shows a flood.

Source: Rambour et al., SEN12-FLOOD: a SAR and multispectral dataset for flood detection, 2020; the pairs are those of
SAR-W-MixMAE, IEEE JSTARS 2026.
"""

import copy
import hashlib
import logging
import multiprocessing
import os
import re
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import DataError, data_error, quoted
from sarwmix.bigearthnet import (
    Listing,
    as_paths,
    check_root,
    check_split,
    in_threads,
    join_listings,
    place_name,
    read_csv_rows,
)
from sarwmix.geotiff import check_nonfinite
from sarwmix.moments import Tally
from sarwmix.plausibility import FIRST_LOOK, FLOOR_DB, check_linear, judge
from sarwmix.sen12_index import PAIR

PATCH = 128  # side of the patches that the model cuts
PARTS = {"train": ("train",), "val": ("train",), "train_val": ("train",), "test": ("test",), "all": ("train", "test")}

# One underscore at a time and none at an end, so that "__" can only stand between names; no "/", and no "." in front.
_NAME = r"[A-Za-z0-9-][A-Za-z0-9.-]*(?:_[A-Za-z0-9.-]+)*"
_PAIR_FILE = re.compile(rf"({_NAME}__{_NAME}__{_NAME})__([01])\.npy")

log = logging.getLogger(__name__)


class FloodDataset(Dataset):
    """Pairs of Sentinel-1 images: item i is (img1, img2, label), images (2, S, S) float32 in dB, order VH, VV; S = `size`.

    label: 0-d int64, 1 if img2 shows a flood. The files hold linear σ⁰; what is not positive or not finite becomes
    FLOOR_DB. root holds either layout:
      train/ and test/ with <folder>__<first>__<second>__<label>.npy, (2, 2, S, S) float32: image, VH and VV, row, column;
      images/<folder>/<name>.npy, (2, S, S) float32, with pairs_train.csv and pairs_test.csv (folder,first,second,label).
    split: train, val, test, train_val, all. val is the share `val_fraction` of the training folders, whole ones, drawn
    from `seed`; it is left out of train.
    metadata: one or several CSV lists of folders, one per row, no header: the split then consists of these folders,
    wherever their pairs lie; train and val divide them if val_fraction > 0.
    max_nonfinite: share of NaN and infinite pixels above which reading an image fails. `nonfinite.value` counts those
    that items held, over all DataLoader workers; workers must be started as multiprocessing does by default.
    Raises DataError for data that cannot be used; `check_files` and `check_units` look at the images.
    """

    CHANNELS, UNITS = ("VH", "VV"), "dB"
    MEAN, STD = (-19.2309, -12.5951), (3.1672, 2.9644)  # of BigEarthNet v1: the published run starts from its weights
    CLASSES = ("no flood", "flood")
    FLOOR_DB = FLOOR_DB
    left_out = None  # pairs that were left out because their images are missing, where that was asked for

    def __init__(self, root, split="train", metadata=None, val_fraction=0.0, seed=0, max_nonfinite=0.01):
        self.root, self.split, self.max_nonfinite = check_root(root), check_split(split), max_nonfinite
        if not 0 <= val_fraction < 1:
            raise DataError(f"--val_fraction {val_fraction}: must be at least 0 and below 1")
        if self.split == "val" and not val_fraction and metadata is None:
            raise DataError(
                f"{root}: has no validation split; give --val_fraction, or select on --val_split test as the "
                "publication does"
            )
        self._store = _is_store(self.root)
        self._listing = self._read_pairs(PARTS[self.split] if metadata is None else PARTS["all"], metadata is not None)
        self._refuse_duplicates()
        if metadata is None:
            self.metadata = [self._source(part) for part in PARTS[self.split]]
        else:
            self.metadata = as_paths(metadata)
            listed = _read_folders(self.metadata, self.root, known=set(self.groups.tolist()))
            self._keep(np.isin(self.groups, listed))
        if len(self) == 0:
            raise DataError(
                f"{_names(self.metadata)}: no pair of split '{self.split}'; choose another split, or restore the pairs"
            )
        if self.split in ("train", "val") and val_fraction:
            held_out = np.isin(self.groups, draw_folders(self.groups, val_fraction, seed, _names(self.metadata)))
            self._keep(held_out if self.split == "val" else ~held_out)
        self.nonfinite = multiprocessing.Value("q", 0)

    def __len__(self):
        return len(self._listing.ids)

    def __getitem__(self, i):
        return *self.images(i), torch.tensor(int(self._listing.labels[i]))

    @property
    def ids(self):
        """(N,) str: "<folder>__<first>__<second>" of each pair."""
        return self._listing.ids

    @property
    def groups(self):
        """(N,) str: the folder of each pair, which is the place it shows."""
        return folders_of(self.ids)

    @property
    def image_names(self):
        """(N, 2) str: "<folder>/<name>" of the two images of each pair."""
        names = [name.split("__") for name in self.ids.tolist()]
        return np.array(
            [[f"{folder}/{first}", f"{folder}/{second}"] for folder, first, second in names], dtype=str
        ).reshape(-1, 2)

    @cached_property
    def size(self):
        """S, the side of every image, as the file of the first pair has it. Raises DataError if that cannot be used."""
        return self._open(self.files(0)[0], 0).shape[-1]

    def images(self, i):
        """(img1, img2) of pair i, each (2, S, S) float32 dB."""
        images = []
        for _, values in self._linear(i):
            lost = values.size - np.count_nonzero(np.isfinite(values))
            if lost:
                with self.nonfinite.get_lock():
                    self.nonfinite.value += lost
            images.append(to_db(values))
        return tuple(images)

    def read_image(self, i, which):
        """One image of pair i alone: (2, S, S) float32 dB, NaN where the file has no finite value. which: 0 or 1."""
        ((_, values),) = self._linear(i, which)
        db = to_db(values).numpy()
        db[~np.isfinite(values)] = np.nan
        return db

    def files(self, i):
        """Paths of the file of pair i, or of its two images."""
        folder, *names = self.ids[i].split("__")
        if self._store:
            return [f"{self.root}/images/{folder}/{name}.npy" for name in names]
        return [f"{self.root}/{self.where(i)}"]

    def where(self, i):
        """Where pair i was named: "pairs_train.csv:17" (1-based line), or the path of its file inside the root."""
        if self._store:
            return self._listing.where(i)
        return f"{self._listing.places[self._listing.file[i]]}{self.ids[i]}__{self._listing.labels[i]}.npy"

    def label_table(self):
        """(N, 2) uint8, the labels of all pairs, 1 in the column of the class."""
        return np.eye(len(self.CLASSES), dtype=np.uint8)[self._listing.labels]

    def subset(self, rows):
        """This dataset with some of its pairs alone, and the same count `nonfinite`; rows: indices or a boolean mask."""
        part = copy.copy(self)
        part._keep(rows)
        return part

    def portable(self, rows):
        """These pairs alone, as can be sent to a process that runs already, where nothing counts `nonfinite`."""
        part = self.subset(rows)
        part.nonfinite = None
        return part

    def describe(self):
        """What a run records about its data; can be written as JSON."""
        return {
            "name": type(self).__name__,
            "root": str(self.root),
            "metadata": [str(path) for path in self.metadata],
            "split": self.split,
            "samples": len(self),
            "class_counts": dict(zip(self.CLASSES, self.label_table().sum(0, dtype=int).tolist())),
            "fingerprint": hashlib.sha256("\n".join(self.ids.tolist()).encode()).hexdigest(),
        } | ({} if self.left_out is None else {"left_out": self.left_out})

    def missing(self, start=0, step=1):
        """Those of every step-th pair from `start` of which a file is not there: their positions."""
        rows = range(len(self))[start::step]
        whole = in_threads(lambda i: all(map(os.path.exists, self.files(i))), rows)
        return [i for i, there in zip(rows, whole) if not there]

    def check_files(self, start=0, step=1):
        """Raises DataError if every step-th file from `start` is missing, empty or of another form: count, first five.

        Ranks share the work with start=rank, step=world size.
        """
        first_row = {}
        for i in range(len(self)):
            for path in self.files(i):
                first_row.setdefault(path, i)
        files = list(first_row)[start::step]
        bad = [(path, fault) for path, fault in zip(files, in_threads(self._fault, files)) if fault]
        if bad:
            raise data_error(
                f"{len(bad)} of {len(files)} image files cannot be used",
                [f"{place_name(path, self.root)} {fault}{self._named(first_row[path])}" for path, fault in bad],
                f"copy the files to {self.root} again, or remove their pairs; --skip_missing leaves those out that do not exist",
            )

    def check_units(self, expected=None, samples=32):
        """{"mean", "std", "min", "max": [VH, VV] in dB, "nonfinite": pixels} of up to `samples` evenly spaced pairs.

        Pixels that are not finite or have no backscatter (FLOOR_DB) are left out. expected: (mean, std) that they will be
        standardised with. Raises DataError for values that cannot be right, and warns of those that may not be
        (`sarwmix.plausibility`).
        """
        rows = np.unique(np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int))
        total, lost = Tally(FLOOR_DB), 0
        for i in rows:
            for _, values in self._linear(i):
                lost += int(values.size - np.count_nonzero(np.isfinite(values)))
                total.add(to_db(values).numpy())
        figures = total.summary()
        judge(f"{self.root}: {len(rows)} pairs of split '{self.split}'", figures, expected, total.histogram_dict())
        return {name: figures[name] for name in FIRST_LOOK} | {"nonfinite": lost}

    # ---- Files -----------------------------------------------------------------------------------

    def _linear(self, i, *which):
        """[(what messages call it, (2, S, S) float32 linear)] of both images of pair i, or of those asked for.

        Raises DataError, which names what cannot be read, or cannot be linear backscatter.
        """
        arrays = [self._open(path, i) for path in self.files(i)]
        for path, array in zip(self.files(i), arrays):
            if array.shape[-1] != self.size:
                raise DataError(
                    f"{path}: is {array.shape[-1]}x{array.shape[-1]} pixels, but {self.files(0)[0]} {self.size}x"
                    f"{self.size}; all images must be of one size{self._named(i)}"
                )
        if self._store:
            images = list(zip(self.files(i), arrays))
        else:
            images = [(f"{self.files(i)[0]} image {k}", array) for k, array in enumerate(arrays[0], start=1)]
        images = [(source, np.array(array)) for source, array in (images[k] for k in which or (0, 1))]
        for source, values in images:
            check_nonfinite(values, source, self.max_nonfinite)
            check_linear(values, lambda channel: source)
        return images

    def _open(self, path, i):
        """The array of a file of pair i, mapped rather than read. Raises DataError, which names the file."""
        try:
            return _open_array(path, 3 if self._store else 4)
        except DataError as error:
            raise DataError(f"{path}: {error}; copy it again, or remove its pairs{self._named(i)}") from error

    def _fault(self, path):
        """What is wrong with a file, or None."""
        try:
            side = _open_array(path, 3 if self._store else 4).shape[-1]
        except DataError as error:
            return str(error)
        try:
            return (
                None if side == self.size else f"is {side}x{side} pixels, not {self.size}x{self.size} as the first pair"
            )
        except DataError:
            return None  # the first pair is at fault itself, and the rank that has it says so

    def _named(self, i):
        """For messages that name the file already: the line of a pair list that asks for it."""
        return f" ({self.where(i)})" if self._store else ""

    # ---- Pairs -----------------------------------------------------------------------------------

    def _keep(self, rows):
        self._listing = self._listing.take(rows)

    def _source(self, part):
        """Path of the list, or the folder, that says what is in a part."""
        return self.root / (f"pairs_{part}.csv" if self._store else part)

    def _read_pairs(self, parts, as_there):
        """Listing of the pairs of these parts; as_there: one that is not there has none."""
        sources = [self._source(part) for part in parts]
        if as_there:
            sources = [path for path in sources if path.exists()] or sources
        read = _read_list if self._store else _read_folder
        return join_listings([read(path) for path in sources])

    def _refuse_duplicates(self):
        names, first = self.ids.tolist(), {}
        repeated = [
            f"{name} ({self.where(first[name])} and {self.where(i)})"
            for i, name in enumerate(names)
            if first.setdefault(name, i) != i
        ]
        if repeated:
            raise data_error(
                f"{self.root}: {len(repeated)} of {len(names)} pairs are repeated", repeated, "remove the repeated ones"
            )


def to_db(values):
    """Linear σ⁰, NumPy float32 of any shape → 10·log10 as a tensor; FLOOR_DB where it is not positive or not finite."""
    values = torch.from_numpy(values)
    return torch.where((values > 0) & (values < np.inf), 10 * torch.log10(values), FLOOR_DB)


def _is_store(root):
    """Whether each image is stored once, with pair lists; otherwise there is a file per pair. Raises DataError if unclear."""
    store = [name for name in ("images", "pairs_train.csv", "pairs_test.csv") if (root / name).exists()]
    curated = [name for name in ("train", "test") if (root / name).is_dir()]
    if bool(store) == bool(curated):
        found = f"both {', '.join(store)} and {', '.join(curated)}" if store else "neither"
        raise DataError(
            f"{root}: holds {found} of the layouts train/ and test/ with pair files, or images/ with pairs_train.csv "
            "and pairs_test.csv; give the folder of one with --data_path"
        )
    return bool(store)


def _open_array(path, dimensions):
    """A memory-mapped .npy file of the shape ([2,] 2, S, S). Raises DataError that says what is wrong, without the name."""
    try:
        with np.errstate(over="ignore"):  # of a header that claims to have more pixels than can be counted
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError("does not exist") from None
    except EOFError:
        raise DataError("is empty") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    except Exception as error:  # of a damaged header, NumPy's parser raises whatever comes to pass
        raise DataError("is corrupt, truncated or no .npy file") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError("is an .npz archive, not a .npy file")
    leading = (2,) * (dimensions - 2)
    square = array.size and array.shape == (*leading, *array.shape[-1:] * 2)
    if array.dtype != np.float32 or not square or array.shape[-1] % PATCH:
        wanted = f"({', '.join(map(str, leading))}, S, S)"
        raise DataError(
            f"holds {array.dtype} of shape {array.shape}, not float32 of {wanted} with S a multiple of {PATCH}"
        )
    return array


def _read_folder(path):
    """Listing of the pair files in a folder, by name."""
    try:
        names = sorted(
            entry.name for entry in path.iterdir() if entry.suffix == ".npy" and not entry.name.startswith(".")
        )
    except OSError as error:
        raise DataError(
            f"{path}: cannot be listed ({error.strerror}); copy the pair files there, or choose another split"
        ) from error
    parsed = [_PAIR_FILE.fullmatch(name) for name in names]
    bad = [name for name, match in zip(names, parsed) if not match]
    if bad:
        raise data_error(
            f"{path}: {len(bad)} of {len(names)} files are not named <folder>__<first image>__<second image>__"
            "<label 0 or 1>.npy",
            [quoted(name) for name in bad],
            "rename or remove them",
        )
    pairs = [match.groups() for match in parsed]
    return _listing([name for name, _ in pairs], [label for _, label in pairs], f"{path.name}/", range(len(pairs)))


def _read_list(path):
    """Listing of the pairs in a CSV list with a header that names PAIR."""
    rows = read_csv_rows(path)
    header = [name.strip() for name in next(rows, (0, ()))[1]]
    lacking = [name for name in PAIR if name not in header]
    if lacking:
        raise DataError(
            f"{path}: has no column {', '.join(lacking)} (columns: {', '.join(map(quoted, header)) or 'none'}); "
            f"restore its header, {','.join(PAIR)}"
        )
    columns = [header.index(name) for name in PAIR]
    lines, names, labels, bad = [], [], [], []
    for line, row in rows:
        cells = [row[k].strip() for k in columns] if len(row) == len(header) else row
        pair = "__".join(cells[:3])
        if len(row) != len(header) or not _PAIR_FILE.fullmatch(f"{pair}__{cells[3]}.npy"):
            bad.append(f"{quoted(','.join(row))} ({path.name}:{line})")
        lines.append(line)
        names.append(pair)
        labels.append(cells[-1])
    if bad:
        raise data_error(
            f"{path}: {len(bad)} of {len(lines)} rows are no names (letters, digits, '.', '-', single '_') with "
            "label 0 or 1",
            bad,
            "correct the rows",
        )
    return _listing(names, labels, f"{path.name}:", lines)


def _listing(names, labels, place, lines):
    labels = np.array([int(label) for label in labels], np.uint8)
    return Listing(np.array(names, dtype=str), labels, (place,), line=np.array(lines, np.int64))


def _names(paths):
    return ", ".join(map(str, paths))


def _read_folders(lists, root, known):
    """Names of the folders in lists of them that are `known`, those with pairs; logs the others."""
    listed, bad = {}, []
    for path in lists:
        for line, row in read_csv_rows(path):
            name, where = row[0].strip(), f"{place_name(path, root)}:{line}"
            if len(row) == 1 and re.fullmatch(_NAME, name):
                listed.setdefault(name, where)
            else:
                bad.append(f"{quoted(','.join(row))} ({where})")
    if bad:
        raise data_error(f"{_names(lists)}: {len(bad)} rows are not the name of one folder", bad, "correct the rows")
    absent = [f"{name} ({where})" for name, where in listed.items() if name not in known]
    if len(absent) == len(listed):
        raise DataError(
            f"{_names(lists)}: none of the {len(listed)} listed folders has a pair in {root}; correct the list, or "
            "give another with --metadata"
        )
    if absent:
        log.info(
            "%d of %d listed folders have no pair: %s%s",
            len(absent),
            len(listed),
            ", ".join(absent[:5]),
            f", and {len(absent) - 5} more" if len(absent) > 5 else "",
        )
    return [name for name in listed if name in known]


def folders_of(ids):
    """(N,) str: the folder of each pair of these ids."""
    return np.array([name.partition("__")[0] for name in ids.tolist()], dtype=str)


def draw_folders(groups, share, seed, source):
    """The validation folders: a share of all, at least one, that depends on their names and the seed alone.

    Raises DataError, which names the `source` of the pairs, if that leaves none to train on.
    """
    folders = np.unique(groups)
    count = max(1, round(share * len(folders)))
    if count >= len(folders):
        raise DataError(
            f"{source}: --val_fraction {share} of {len(folders)} folders leaves nothing to train on; "
            "lower it, or add folders"
        )
    return np.random.default_rng(seed).permutation(folders)[:count]
