# SPDX-License-Identifier: MIT
"""The contents of S1list.json of SEN12-FLOOD: images in the order of acquisition, pairs, splits. Opens no image.

Also the files that the steps of the preparation exchange.

Source: Rambour et al., SEN12-FLOOD, 2020 (the list); SAR-W-MixMAE, IEEE JSTARS 2026 (pairs and splits).
"""

import csv
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path

from tabulate import tabulate

from common.errors import DataError, data_error, quoted
from common.files import read_json, write_csv
from sarwmix.listing import EVERY, PAIR
from sarwmix.prepare.completeness import counts_beside, published

log = logging.getLogger(__name__)

S1_LIST = "S1list.json"
SIDE = 512  # pixels of 10 m, of every aligned image
SPLITS = ("train", "test")
LAYOUTS = ("images", "npy")  # of the final dataset: a file per image and lists of pairs, or a file per pair
TEST_FOLDER = re.compile(r"\d{1,2}")
_FOLDER = re.compile(r"[A-Za-z0-9-]{1,32}")
_IMAGE = re.compile(r"S1[A-Z]_[A-Z0-9]{2}_[A-Z]{4}_1S([SD][VH])_(\d{8}T\d{6})_[A-Za-z0-9_]{1,60}")


@dataclass(frozen=True)
class Image:
    """One acquisition of one folder. flooded: on or after the first flood date of the folder."""

    folder: str
    name: str
    flooded: bool

    @property
    def start(self):
        """Start of the acquisition, datetime UTC, from the name."""
        return datetime.strptime(_IMAGE.fullmatch(self.name)[2], "%Y%m%dT%H%M%S")

    @property
    def polarisations(self):
        """The polarisations, from the product type in the name: ("VH", "VV") for 1SDV, ("VV",) for 1SSV."""
        kind = _IMAGE.fullmatch(self.name)[1]
        return {"DV": ("VH", "VV"), "SV": ("VV",), "DH": ("HH", "HV"), "SH": ("HH",)}[kind]


def read_s1_list(path):
    """Reads an S1list.json: {folder: [Image, in the order of acquisition]}, folders sorted by name.

    Raises DataError with the path and the first five entries that cannot be used.
    """
    return parse_s1_list(read_json(path, "copy it again, or give another with --s1_list"), path)


def parse_s1_list(content, path):
    """As `read_s1_list`, from the parsed JSON. path: of the file in messages."""
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no folders; give the S1list.json of SEN12-FLOOD with --s1_list")
    folders, bad = {}, []
    for folder, entries in sorted(content.items()):
        if not _FOLDER.fullmatch(folder) or not isinstance(entries, dict):
            bad.append(f"folder {quoted(folder)}")
            continue
        images = []
        for number, entry in entries.items():
            if number.isdigit():
                name = entry.get("filename") if isinstance(entry, dict) else None
                if isinstance(name, str) and _is_image(name) and isinstance(entry.get("FLOODING"), bool):
                    images.append(Image(folder, name, entry["FLOODING"]))
                else:
                    bad.append(f"{folder} entry {number} ({quoted(name)})")
        names = [image.name for image in images]
        bad += [f"{folder} {name} twice" for name in sorted(set(names)) if names.count(name) > 1]
        if entries.get("count", len(images)) != len(images):
            bad.append(f"{folder} has {len(images)} images, but count {quoted(entries['count'])}")
        folders[folder] = sorted(images, key=lambda image: (image.start, image.name))
    if bad:
        raise data_error(
            f"{path}: {len(bad)} entries cannot be used",
            bad,
            "copy it again; each entry needs the filename of a Sentinel-1 product and FLOODING true or false",
        )
    return folders


def _is_image(name):
    """Whether it is the name of a product, and can be part of the name of a pair file, which "__" separates."""
    match = _IMAGE.fullmatch(name)
    try:
        return bool(
            match and "__" not in name and not name.endswith("_") and datetime.strptime(match[2], "%Y%m%dT%H%M%S")
        )
    except ValueError:
        return False


def pairs(flooded):
    """All pairs of a sequence of images: [(index of the first, index of the second, label)].

    flooded: bool per image, in the order of acquisition. Two images form a pair unless both are flooded. The flooded
    one is second, else the later one. label: 1 if the second is flooded.
    """
    found = []
    for a, b in combinations(range(len(flooded)), 2):
        if not flooded[a]:
            found.append((a, b, int(flooded[b])))
        elif not flooded[b]:
            found.append((b, a, 1))
    return found


def split_of(folder, lists=None):
    """The split of a folder, "train" or "test"; None for a folder that is in none of `lists`.

    lists: {"train": names, "test": names}; without it, folders with names of one or two digits belong to test.
    """
    if lists is None:
        return "test" if TEST_FOLDER.fullmatch(folder) else "train"
    return next((split for split, folders in lists.items() if folder in folders), None)


def log_list(place, folders, own_splits):
    """Logs the counts of a list, {folder: [Image]}, in one line beside those of the complete list.

    own_splits: the folders are not divided by the published rule, so that only the whole is compared.
    """
    images = [image for part in folders.values() for image in part]
    found = {
        ("images", EVERY): len(images),
        ("flooded images", EVERY): sum(image.flooded for image in images),
        ("images of one polarisation", EVERY): sum(len(image.polarisations) == 1 for image in images),
    }
    parts = {split: [folder for folder in folders if split_of(folder) == split] for split in SPLITS}
    parts = {EVERY: list(folders)} if own_splits else parts
    found |= {("folders", split): len(names) for split, names in parts.items()}
    for split, names in parts.items():
        flooded = ([image.flooded for image in folders[folder]] for folder in names)
        found["candidate pairs", split] = sum(map(len, map(pairs, flooded)))
    log.info("%s: %s", place, counts_beside(published("sen12flood", (image.name for image in images)), found))


# ---- Files that a step of the preparation writes for the next ------------------------------------

STEP = "step.json"  # the parameters that decide the content of a step's folder
ALIGN, PREPARE, PRUNE = (f"sarwmix.sen12_{name}" for name in ("align_s1_to_s2", "data_prep", "prune_partial_pairs"))


# The valid cells of each column; other columns hold any text. Names are used as file names.
CELLS = {
    column: re.compile(pattern)
    for columns, pattern in (
        (("split",), "train|test"),
        (("kind",), "image|pair"),
        (("status",), "aligned|dropped"),
        (("label", "flooded"), "[01]"),
        (("folder",), _FOLDER.pattern),
        (("image", "first", "second"), r"(?!\.)[A-Za-z0-9_.-]{0,100}"),
        (("height", "width"), r"\d{1,9}"),
        (("nonfinite",), r"\d*"),
        (("zeros_vh", "zeros_vv"), r"\d(\.\d+)?(e-\d+)?"),
    )
    for column in columns
}


@dataclass(frozen=True)
class Table:
    """A CSV file with a header of these columns. program: the module that writes it ("sarwmix.…")."""

    name: str
    program: str
    columns: tuple

    def write(self, folder, rows):
        write_csv(Path(folder) / self.name, self.columns, rows)

    def read(self, folder):
        """Reads the file: [{column: text}]. Raises DataError if it is missing, another file, or has invalid cells."""
        path = Path(folder) / self.name
        try:
            with open(path, newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file, strict=True)) or [[]]
        except FileNotFoundError:
            raise DataError(f"{path}: does not exist; run python -m {self.program} to its end first") from None
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(
                f"{path}: cannot be read as a CSV file ({error}); remove it, and run python -m {self.program} again"
            ) from None
        if header != list(self.columns) or any(len(row) != len(header) for row in rows):
            raise DataError(
                f"{path}: is not a table of {','.join(self.columns)}; remove it, and run python -m {self.program} again"
            )
        bad = [
            f"{column} {quoted(cell)} (row {number})"
            for number, row in enumerate(rows, start=1)
            for column, cell in zip(header, row)
            if column in CELLS and not CELLS[column].fullmatch(cell)
        ]
        if bad:
            raise data_error(
                f"{path}: {len(bad)} cells are damaged", bad, f"remove it, and run python -m {self.program} again"
            )
        return [dict(zip(header, row)) for row in rows]


ALIGNED = Table("align.csv", ALIGN, ("folder", "image", "status", "reason", "detail", "reference", "nonfinite"))
CANDIDATES = Table("pairs.csv", PREPARE, ("split", *PAIR))
IMAGES = Table(
    "images.csv", PREPARE, ("folder", "image", "flooded", "height", "width", "zeros_vh", "zeros_vv", "nonfinite")
)
DROPPED = Table("dropped.csv", PREPARE, ("kind", "folder", "first", "second", "reason", "detail"))
KEPT = {split: Table(f"pairs_{split}.csv", PRUNE, PAIR) for split in SPLITS}
CHECKSUMS = Table("checksums.csv", PRUNE, ("file", "sha256"))


def table_with_sums(counts):
    """A printed table of {split: {column: count}}, with a last row of the sums."""
    rows = [(split, *columns.values()) for split, columns in counts.items()]
    rows.append(("all", *map(sum, list(zip(*rows))[1:])))
    return tabulate(rows, ("split", *counts["train"]), tablefmt="pipe")


def read_step(folder, program):
    """Reads the parameters with which `program` filled a folder. Raises DataError if another program or none did."""
    path = Path(folder) / STEP
    record = read_json(path, f"give the folder that python -m {program} wrote")
    if not isinstance(record, dict) or record.get("program") != program:
        raise DataError(f"{path}: is not of {program}; give the folder that python -m {program} wrote")
    return record
