# SPDX-License-Identifier: MIT
"""Lists of samples: where each sample is named, CSV files, splits, and the checks that all datasets share.

Imports no torch, so that worker processes of the preparation programs start quickly.
"""

import csv
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError, data_error, quoted

CHANNELS, UNITS = ("VH", "VV"), "dB"  # of every image, in this order
PAIR = ("folder", "first", "second", "label")  # columns of a list of pairs of SEN12-FLOOD
PATCH = 128  # side of the patches that the flood model cuts, pixels
IGNORED = 255  # of the pixels of a mask that do not count, in training and in metrics

# The splits that a program may ask for, and the parts of the data that each consists of.
PARTS = {"train": ("train",), "val": ("val",), "test": ("test",)}
PARTS |= {"train_val": ("train", "val"), "all": ("train", "val", "test")}
SPLITS = tuple(PARTS)
EVERY = "every"  # split of a dataset that has no lists
DRAW_STREAM = 5  # separates the random numbers of `drawn_by_group` from those of others with the same seed

S1_NAME = re.compile(r"S1[A-Z](?:_[A-Za-z0-9-]+){3,}")  # of a patch of BigEarthNet

THREADS = 32  # hides the latency of network file systems, about a millisecond per request; more than there are cores
AT_ONCE = 5e-5  # seconds per item below which the answers come from memory, where threads only cost time
CHUNK = 256  # items per task of a thread: one task per item would cost more than the work


@dataclass
class Listing:
    """Samples in the order of the files that name them, and where each one is named.

    ids (N,) str; labels (N, K) uint8, or None if they are read later. Sample i is named in file number file[i], at
    line[i], a line number or a file name; places[k] is the printed form of file k, up to the line. A listing made from
    a single place has file None, one made from folders has line None.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    places: tuple
    file: np.ndarray | None = None
    line: np.ndarray | None = None

    def where(self, i):
        """Where sample i is named: "benv2_train.csv:312" (1-based line), "metadata.parquet: row 17" (0-based row)."""
        place = self.places[0 if self.file is None else self.file[i]]
        return f"{place}{self.ids[i] if self.line is None else self.line[i]}"

    def take(self, rows):
        """The listing of some samples. rows: indices or a boolean mask."""
        parts = [None if x is None else x[rows] for x in (self.ids, self.labels, self.file, self.line)]
        return Listing(parts[0], parts[1], self.places, *parts[2:])


def join_listings(listings):
    """Joins listings of one file each, in this order."""
    labels = [listing.labels for listing in listings]
    return Listing(
        np.concatenate([listing.ids for listing in listings]),
        None if labels[0] is None else np.concatenate(labels),
        tuple(listing.places[0] for listing in listings),
        np.concatenate([np.full(len(listing.ids), k, np.int16) for k, listing in enumerate(listings)]),
        np.concatenate([listing.line for listing in listings]),
    )


def acquisitions_of(ids):
    """(N,) str: the acquisition of each of these patches of BigEarthNet."""
    return np.array([name.rsplit("_", 3)[0] for name in ids.tolist()], dtype=str)


# ---- Checks --------------------------------------------------------------------------------------


def refuse_duplicates(listing, problem="rows repeat an id", remedy="remove the repeated rows"):
    """Raises DataError if an id is listed twice: the count, and where the first five are named."""
    names = listing.ids.tolist()
    if len(set(names)) == len(names):
        return
    first, repeated = {}, []
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            repeated.append(f"{name} ({listing.where(first[name])} and {listing.where(i)})")
    raise data_error(f"{len(repeated)} of {len(names)} {problem}", repeated, remedy)


def check_names(names, where, pattern=S1_NAME, kind="S1 patch"):
    """Raises DataError for names of another form: too few parts, or characters that could leave the folder.

    where: function from a row to where it is named.
    """
    bad = [i for i, name in enumerate(names) if not (name and len(name) <= 100 and pattern.fullmatch(name))]
    if bad:
        raise data_error(
            f"{len(bad)} of {len(names)} rows have no {kind} name",
            [f"{quoted(names[i])} ({where(i)})" for i in bad],
            "correct the rows, or give the 0-based column of the S1 names with --id_col",
        )


def check_root(root):
    """The folder of a dataset as a Path. Raises DataError if it does not exist."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the dataset's folder with --data_path")
    return root


def check_split(split):
    """The name of a split, "val" for "validation". Raises DataError for an unknown one."""
    split = "val" if split == "validation" else split
    if split not in SPLITS:
        raise DataError(f"unknown split {quoted(split)}; choose one of {', '.join(SPLITS)}")
    return split


# ---- Files ---------------------------------------------------------------------------------------


def read_csv_rows(path):
    """Yields (1-based line on which a record starts, its cells) for every record that is not blank.

    Raises DataError, which names the file, if it does not exist, is not UTF-8 or is not a CSV. An unmatched quotation
    mark is an error, because the rest of the file would be read as one cell.
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


def read_columns(path, name, known):
    """Reads a table with a header, CSV or parquet: ({column: [text]}, place, [line]); row i is named {place}{line[i]}.

    name: of the file in messages. known: columns that may stand there once only. Cells of parquet become text: "" for
    none, "1" for 1.0, "a;b" for a list. Raises DataError for a file that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        import pandas as pd

        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be read as a parquet file ({reason}); check the file") from error
        frame = frame.astype(object).where(frame.notna(), None)  # of all kinds of missing values
        header, rows = [str(column) for column in frame], frame.to_numpy(object).tolist()
        rows, place = [(k, [_as_text(value) for value in row]) for k, row in enumerate(rows)], f"{name}: row "
    else:
        rows = [(line, [cell.strip() for cell in row]) for line, row in read_csv_rows(path)]
        header, rows, place = rows[0][1] if rows else [], rows[1:], f"{name}:"
    ragged = [f"{place}{line}" for line, row in rows if len(row) != len(header)]
    if ragged:
        raise data_error(
            f"{path}: {len(ragged)} rows do not have the {len(header)} cells of the header",
            ragged,
            'correct the rows; a cell with a comma in it is written in quotation marks, "VV.tif,VH.tif"',
        )
    twice = [column for column in known if header.count(column) > 1]
    if twice:
        raise DataError(f"{path}: has two columns {twice[0]}; remove one of them")
    return {column: [row[k] for _, row in rows] for k, column in enumerate(header)}, place, [line for line, _ in rows]


def _as_text(value):
    """A cell of a parquet file as text."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return ";".join(map(str, value))
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _without_nul(lines):
    """Yields the lines of a text file. Raises csv.Error for NUL characters, which a crash may leave in a file."""
    for line in lines:
        if "\0" in line:
            raise csv.Error("line contains NUL")
        yield line


def place_name(path, root):
    """The name of a list in messages: its path relative to the root, or as it was given."""
    path, root = Path(path), Path(root)
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def as_paths(files):
    """A list of paths, from one path or several."""
    return [Path(files)] if isinstance(files, (str, os.PathLike)) else [Path(file) for file in files]


def split_lists(folder, prefix, split):
    """Paths of the CSV files of a split: <prefix>_{train,val,test}.csv, and <prefix>_train_val.csv if it exists."""
    if split == "all":
        return split_lists(folder, prefix, "train_val") + split_lists(folder, prefix, "test")
    path = folder / f"{prefix}_{split}.csv"
    if split == "train_val" and not path.exists():
        return split_lists(folder, prefix, "train") + split_lists(folder, prefix, "val")
    return [path]


def in_threads(function, items):
    """[function(item) for item in items]. Uses threads as soon as the file system takes noticeable time to answer."""
    chunks = iter([items[k : k + CHUNK] for k in range(0, len(items), CHUNK)])
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


def drawn_by_group(split, groups, val_fraction, test_fraction, seed, source):
    """(N,) bool: whether each sample is in the split, if shares of the groups, at least one each, are drawn for val and
    test.

    groups: (N,) str; samples of one group are in one split. The draw is a function of the names of the groups and the
    seed. Raises DataError, which names `source`, for a split that is not drawn, or if no group is left to train on.
    """
    if split == "all":
        return np.ones(len(groups), bool)
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if split == name and not fraction:
            raise DataError(
                f"{source}: is not divided into splits and has no split '{name}'; add a column split, or draw one "
                f"with --{name}_fraction"
            )
    names = np.unique(groups)
    held, part = {}, np.random.default_rng([seed, DRAW_STREAM]).permutation(names)
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        count = max(1, round(fraction * len(names))) if fraction else 0
        held[name], part = part[:count], part[count:]
    if not len(part):
        raise DataError(
            f"{source}: --val_fraction {val_fraction:g} and --test_fraction {test_fraction:g} of {len(names)} groups "
            "leave nothing to train on; lower them, add groups or, to evaluate, use --split all"
        )
    held["train"] = part
    return np.isin(groups, np.concatenate([held[name] for name in PARTS[split]]))
