# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, Sentinel-1: pairs of images of one place, and whether the second shows a flood.

Source: Rambour et al., SEN12-FLOOD: a SAR and multispectral dataset for flood detection, 2020; pairs: SAR-W-MixMAE,
IEEE JSTARS 2026.
"""

import logging
import re
from functools import cached_property

import numpy as np
import torch

from common.errors import DataError, data_error, listed, quoted
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.dataset import RadarDataset
from sarwmix.geotiff import check_nonfinite
from sarwmix.listing import (
    PAIR,
    PARTS,
    PATCH,
    Listing,
    as_paths,
    check_root,
    check_split,
    in_threads,
    join_listings,
    place_name,
    read_csv_rows,
    refuse_duplicates,
)
from sarwmix.plausibility import FLOOR_DB, check_linear

# A name has only single underscores, because "__" separates names, no "/" and no leading ".".
_NAME = r"[A-Za-z0-9-][A-Za-z0-9.-]*(?:_[A-Za-z0-9.-]+)*"
_PAIR_FILE = re.compile(rf"({_NAME}__{_NAME}__{_NAME})__([01])\.npy")

log = logging.getLogger(__name__)


class FloodDataset(RadarDataset):
    """Pairs of Sentinel-1 images: item i is (img1, img2, label), images (2, S, S) float32 in dB, order VH, VV.

    label: 0-d int64, 1 if img2 shows a flood. The files hold linear σ⁰; values that are not positive or not finite
    become FLOOR_DB. root has one of two layouts:
      train/ and test/ with <folder>__<first>__<second>__<label>.npy, (2, 2, S, S) float32: image, channel, row, column;
      images/<folder>/<name>.npy, (2, S, S) float32; pairs_train.csv and pairs_test.csv (folder,first,second,label).
    split: train, val, test, train_val, all. val is a share `val_fraction` of the training folders, drawn from `seed`
    and removed from train.
    metadata: one or several CSV lists of folders, one per row, no header: the split consists of the pairs of these
    folders in all parts; train and val divide them if val_fraction > 0.
    max_nonfinite: share of NaN and infinite pixels above which reading an image fails. `nonfinite.value` counts such
    pixels of all items, over all DataLoader workers, which must be started by the default method of multiprocessing.
    Raises DataError for data that cannot be used; `check_files` and `check_units` look at the images.
    """

    CLASSES, task, images_per_sample = ("no flood", "flood"), "flood", 2
    MEAN, STD = BigEarthNetv1.MEAN, BigEarthNetv1.STD  # the published run starts from a BigEarthNet v1 checkpoint
    FLOOR_DB = FLOOR_DB

    def __init__(self, root, split="train", metadata=None, val_fraction=0.0, seed=0, max_nonfinite=0.01):
        root, split = check_root(root), check_split(split)
        if not 0 <= val_fraction < 1:
            raise DataError(f"--val_fraction {val_fraction}: must be at least 0 and below 1")
        if split == "val" and not val_fraction and not metadata:
            raise DataError(
                f"{root}: has no validation split; give --val_fraction, or select on --val_split test as the "
                "publication does"
            )
        self.max_nonfinite, self._one_file_each = max_nonfinite, _is_store(root)
        listed_as = "pairs_{}.csv" if self._one_file_each else "{}"
        parts = dict.fromkeys("train" if part == "val" else part for part in PARTS["all" if metadata else split])
        sources = [root / listed_as.format(part) for part in parts]
        if metadata:
            sources = [path for path in sources if path.exists()] or sources
        read = _read_list if self._one_file_each else _read_folder
        listing = join_listings([read(path) for path in sources])
        refuse_duplicates(listing, "pairs are repeated", f"remove the repeated ones from {root}")
        super().__init__(root, split, as_paths(metadata) if metadata else sources, listing)
        if metadata:
            known = set(self.groups.tolist())
            self._select(np.isin(self.groups, _read_folders(self.metadata, root, known)))
        if len(self) == 0:
            raise DataError(
                f"{_names(self.metadata)}: no pair of split '{split}'; choose another split, or restore the pairs"
            )
        self._select(drawn_for(split, self.groups, val_fraction, seed, _names(self.metadata)))

    @property
    def groups(self):
        """(N,) str: the folder of each pair; a folder shows one place."""
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
        """S, the side of every image, from the file of the first pair. Raises DataError if it cannot be used."""
        return self._open(0, 0)[1].shape[-1]

    def files(self, i):
        """Paths of the file of pair i, or of its two images."""
        folder, *names = self.ids[i].split("__")
        if self._one_file_each:
            return [f"{self.root}/images/{folder}/{name}.npy" for name in names]
        return [f"{self.root}/{self.where(i)}"]

    def read_image(self, i, which=0):
        path, array = self._open(i, which)
        if array.shape[-1] != self.size:
            raise DataError(
                f"{path}: is {array.shape[-1]}x{array.shape[-1]} pixels, but {self.files(0)[0]} {self.size}x"
                f"{self.size}; all images must be of one size{self._named(i)}"
            )
        if not self._one_file_each:
            path, array = f"{path} image {which + 1}", array[which]
        values = np.array(array)
        check_nonfinite(values, path, self.max_nonfinite)
        check_linear(values, lambda channel: path)
        image = to_db(values).numpy()
        image[~np.isfinite(values)] = np.nan
        return image

    def check_files(self, start=0, step=1):
        """Raises DataError if files, of every step-th from `start`, cannot be used: the count and the first five.

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
                f"copy the files to {self.root} again, or remove their pairs; --skip_missing leaves out those that "
                "do not exist",
            )

    def _array(self, path):
        return _open_array(path, 3 if self._one_file_each else 4)

    def _open(self, i, which):
        """Opens the file of image `which` of pair i: (path, memory-mapped array). Raises DataError with the path."""
        path = self.files(i)[which if self._one_file_each else 0]
        try:
            return path, self._array(path)
        except DataError as error:
            raise DataError(f"{path}: {error}; copy it again, or remove its pairs{self._named(i)}") from error

    def _fault(self, path):
        """What is wrong with a file, or None."""
        try:
            side = self._array(path).shape[-1]
        except DataError as error:
            return str(error)
        try:
            wanted = self.size
        except DataError:  # of the first pair, whose file another call reports
            return None
        return None if side == wanted else f"is {side}x{side} pixels, not {wanted}x{wanted} as the first pair"

    def _named(self, i):
        """For messages that name the file of pair i: its line in the list, if there is a list."""
        return f" ({self.where(i)})" if self._one_file_each else ""


def to_db(values):
    """10·log10 of a float32 array of linear σ⁰, as a tensor; FLOOR_DB where σ⁰ is not positive or not finite."""
    values = torch.from_numpy(values)
    return torch.where((values > 0) & (values < np.inf), 10 * torch.log10(values), FLOOR_DB)


def _is_store(root):
    """Whether there is a file per image, not a file per pair. Raises DataError if both exist, or neither."""
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
    """Memory-maps a .npy file of shape ([2,] 2, S, S). Raises DataError with the fault, but without the path."""
    try:
        with np.errstate(over="ignore"):  # a damaged header may claim more pixels than an integer can hold
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError("does not exist") from None
    except EOFError:
        raise DataError("is empty") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    except Exception as error:  # NumPy's parser of headers raises errors of many types
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
    """The Listing of the pair files in a folder, sorted by name."""
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
    return _listing(
        [name for name, _ in pairs], [label for _, label in pairs], f"{path.name}/", np.array(names, dtype=str)
    )


def _read_list(path):
    """The Listing of the pairs in a CSV list, whose header names PAIR."""
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
    return _listing(names, labels, f"{path.name}:", np.array(lines, np.int64))


def _listing(names, labels, place, lines):
    labels = np.eye(2, dtype=np.uint8)[[int(label) for label in labels]]
    return Listing(np.array(names, dtype=str), labels, (place,), line=lines)


def _names(paths):
    return ", ".join(map(str, paths))


def _read_folders(lists, root, known):
    """The folders of these lists that are in `known`, the folders with pairs. Logs the others."""
    folders, bad = {}, []
    for path in lists:
        for line, row in read_csv_rows(path):
            name, where = row[0].strip(), f"{place_name(path, root)}:{line}"
            if len(row) == 1 and re.fullmatch(_NAME, name):
                folders.setdefault(name, where)
            else:
                bad.append(f"{quoted(','.join(row))} ({where})")
    if bad:
        raise data_error(f"{_names(lists)}: {len(bad)} rows are not the name of one folder", bad, "correct the rows")
    absent = [f"{name} ({where})" for name, where in folders.items() if name not in known]
    if len(absent) == len(folders):
        raise DataError(
            f"{_names(lists)}: none of the {len(folders)} listed folders has a pair in {root}; correct the list, or "
            "give another with --metadata"
        )
    if absent:
        log.info("%d of %d listed folders have no pair: %s", len(absent), len(folders), listed(absent))
    return [name for name in folders if name in known]


def folders_of(ids):
    """(N,) str: the folder of each pair of these ids."""
    return np.array([name.partition("__")[0] for name in ids.tolist()], dtype=str)


def drawn_for(split, groups, val_fraction, seed, source):
    """(N,) bool: whether each sample is in the split, if a share of the folders, at least one, is drawn for "val".

    The draw is a function of the names of the folders and the seed. Raises DataError, which names `source`, if no
    folder is left to train on.
    """
    if not val_fraction or split not in ("train", "val"):
        return np.ones(len(groups), bool)
    folders = np.unique(groups)
    count = max(1, round(val_fraction * len(folders)))
    if count >= len(folders):
        raise DataError(
            f"{source}: --val_fraction {val_fraction} of {len(folders)} folders leaves nothing to train on; "
            "lower it, or add folders"
        )
    held_out = np.isin(groups, np.random.default_rng(seed).permutation(folders)[:count])
    return held_out if split == "val" else ~held_out
