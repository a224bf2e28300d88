# SPDX-License-Identifier: MIT
"""Images with a class for each pixel: masks of one's own, and the hand-labelled part of Sen1Floods11."""

import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import DataError, data_error, listed, quoted
from sarwmix.chips import Chips, Table
from sarwmix.geotiff import read_values
from sarwmix.listing import (
    IGNORED,
    PARTS,
    Listing,
    as_paths,
    in_threads,
    join_listings,
    place_name,
    read_columns,
    read_csv_rows,
)
from sarwmix.raster import Reading, bare_path, find_images, geotiffs_in

UNKNOWN = 254  # in a mask that is being looked at: a value without a class
LOWEST, HIGHEST = -32768, 65535  # values that masks may have
IMAGES, MASKS = "images", "masks"  # folders
LEGEND, IGNORE = "classes.csv", "ignore"  # the table of the classes, and the name in it of values that do not count
STRIP = 64  # rows of an image that are read at a time to see whether it has data

log = logging.getLogger(__name__)


# ---- Classes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Legend:
    """What the values of masks stand for. values: {value: name of its class, or IGNORE}. source: what says so."""

    values: dict
    source: str

    @property
    def classes(self):
        """The names of the classes, in order."""
        return tuple(name for name in self.values.values() if name != IGNORE)

    def numbers(self, classes):
        """(HIGHEST − LOWEST + 1,) uint8: the number of the class in `classes` of each value, IGNORED or UNKNOWN.

        Raises DataError for a class that is not among them.
        """
        other = [name for name in self.classes if name not in classes]
        if other:
            raise DataError(
                f"{self.source}: the class {quoted(other[0])} is not among the {len(classes)} classes of the model "
                f"({listed(classes)}); rename it to one of them, or to {IGNORE}"
            )
        numbers = np.full(HIGHEST - LOWEST + 1, UNKNOWN, np.uint8)
        for value, name in self.values.items():
            numbers[value - LOWEST] = IGNORED if name == IGNORE else classes.index(name)
        return numbers


def read_legend(path):
    """The Legend in a CSV file with the columns value and name, a row per value. Raises DataError."""
    columns, place, lines = read_columns(path, path.name, ("value", "name"))
    lacking = [name for name in ("value", "name") if name not in columns]
    if lacking:
        raise DataError(f"{path}: has no column {lacking[0]}; its header must be value,name")
    values, names = {}, set()
    for text, name, line in zip(columns["value"], columns["name"], lines):
        where = f"{path}:{line}"
        if not re.fullmatch(r"[+-]?\d{1,9}", text) or not LOWEST <= int(text) <= HIGHEST:
            raise DataError(
                f"{where}: the value {quoted(text)} is not a whole number from {LOWEST} to {HIGHEST}; write the "
                "value that the pixels of the class have in the masks"
            )
        if not name:
            raise DataError(f"{where}: the value {text} has no name; name its class, or write {IGNORE}")
        if not name.isprintable():
            raise DataError(
                f"{where}: the name {quoted(name)} has control characters; write letters, which maps can hold"
            )
        if int(text) in values:
            raise DataError(f"{where}: the value {text} is there twice; remove one of the rows")
        if name in names:
            raise DataError(f"{where}: the name {quoted(name)} is there twice; give each class one value and one name")
        values[int(text)] = name
        names |= {name} - {IGNORE}
    if not 2 <= len(names) < UNKNOWN:
        raise DataError(
            f"{path}: names {len(names)} classes, but there must be from 2 to {UNKNOWN - 1}; write a row value,name "
            "for each class of the masks"
        )
    return Legend(values, str(path))


# ---- Masks of one's own --------------------------------------------------------------------------


class Survey(NamedTuple):
    """What is found in a mask, and in its image, when a dataset is opened."""

    counts: np.ndarray  # (K + 1,) int64: pixels of each class, and of none
    usable: bool = True  # whether a pixel of a class has data, or it cannot be told as a file is missing
    unknown: tuple = ()  # values without a class
    size: str | None = None  # for a message, if mask and image differ in size


class Masks(Chips):
    """Square images of one size in GeoTIFFs of VV and VH, as of Chips, and a mask of the same size for each.

    Item i is (image, mask): (2, S, S) float32 in dB, order VH, VV; (S, S) uint8, the number of the class of each pixel,
    or IGNORED for a pixel that does not count, or at which VH or VV has no data.
    root: a folder with images/, or the images themselves; masks are GeoTIFFs of one band and whole numbers. The file of
    a mask stands in the column `mask` of the metadata, relative to root; where there is no such column, it has the path
    in masks/ that the image has in images/ (polarisation and suffix aside). The metadata are those of Chips; ids are
    names, or paths below root or images/. No file in masks/ or in the column `mask` is an image.
    classes.csv in root, with the columns value and name, says which value is which class; the order of its rows is that
    of CLASSES. Values of the name "ignore" (any number of them), no-data values and NaN do not count.
    classes: those of a checkpoint, whose numbers the classes of classes.csv then have, by name.
    supervised: needs masks and classes.csv. All masks of the split are read: an unknown value, or another size than the
    image's, is an error; images that have no pixel of a class with data are left out, with a warning. Missing files are
    left to `check_files` (or --skip_missing), and their pixels count nowhere. Otherwise masks are not read, and those
    of the items are of IGNORED alone.
    reading: as of Chips, but any share of pixels without data is accepted, as they do not count.
    pixel_counts: (N, K + 1) int64, the pixels of each class and, last, those that do not count, by the mask alone; None
    if not supervised. Raises DataError for data that cannot be used.
    """

    CLASSES, task = (), "segmentation"
    MEAN = STD = None
    pixel_counts = _held = None

    def __init__(
        self, root, split="train_val", metadata=None, reading=Reading(), draw=(0.0, 0.0, 0), supervised=False,
        classes=None
    ):  # fmt: skip
        self.supervised = supervised
        super().__init__(root, split, metadata, replace(reading, max_nonfinite=1.0), draw, supervised, classes)

    # ---- Opening ---------------------------------------------------------------------------------

    def _find_images(self, root, table):
        folder = root / IMAGES if (root / IMAGES).is_dir() else root
        masks = [] if table is None or table.masks is None else filter(None, table.masks.tolist())
        found = dict(find_images([folder], [os.path.abspath(root / path) for path in (MASKS, *masks)]))
        if not found:
            raise DataError(f"{folder}: holds masks, but no images; put the GeoTIFFs of VV and VH into {root / IMAGES}")
        return folder, found

    def _labelled(self, root, table, classes, supervised):
        legend = self._read_legend(root)
        self.CLASSES = tuple(classes) if classes is not None else legend.classes if legend else ()
        self._masks = np.full(len(self._paths), "", object)
        if supervised:
            if legend is None:
                raise DataError(
                    f"{root / LEGEND}: is missing; write a table value,name of the classes, a row for each value of "
                    f"the masks, with the name {IGNORE} for values that do not count"
                )
            self._source, self._numbers = legend.source, legend.numbers(self.CLASSES)
            self._masks[:] = self._find_masks(root, table)
        return np.zeros((len(self._paths), len(self.CLASSES)), np.uint8)

    def _read_legend(self, root):
        """The Legend, or None if there is none. Raises DataError."""
        return read_legend(root / LEGEND) if (root / LEGEND).exists() else None

    def _find_masks(self, root, table):
        """[path of the mask of each image], "" where the table names none. Files need not exist. Raises DataError."""
        if table.masks is not None:
            return [name and str(root / name) for name in table.masks.tolist()]
        folder, images = root / MASKS, root / IMAGES if (root / IMAGES).is_dir() else root
        if not folder.is_dir():
            raise DataError(
                f"{root}: has neither a folder {MASKS}, with a mask of the name of each image, nor a column mask in "
                "its metadata; give one of them"
            )
        found = defaultdict(list)
        for path in geotiffs_in(folder):
            found[bare_path(Path(path).relative_to(folder))].append(path)
        names = [bare_path(os.path.relpath(files[0], images)) for files in self._paths.tolist()]
        several = [" and ".join(found[name]) for name in dict.fromkeys(names) if len(found.get(name, ())) > 1]
        if several:
            raise data_error(f"{len(several)} images have several masks", several, "remove all but one")
        return [found[name][0] if name in found else f"{folder / name}.tif" for name in names]

    def _leave_out_unlabelled(self, where):
        surveys = in_threads(self._survey, range(len(self)))
        wrong = [f"{self._masks[i]} ({listed(map(str, s.unknown))})" for i, s in enumerate(surveys) if s.unknown]
        if wrong:
            raise data_error(
                f"{len(wrong)} of {len(self)} masks hold values that {self._source} does not name",
                wrong,
                f"add a row for each, with the name of its class or {IGNORE}, or correct the masks",
            )
        wrong = [f"{self._masks[i]} {s.size}" for i, s in enumerate(surveys) if s.size]
        if wrong:
            raise data_error(
                f"{len(wrong)} of {len(self)} masks have another size than their image",
                wrong,
                "cut image and mask alike",
            )
        self.pixel_counts = np.stack([survey.counts for survey in surveys])
        self.listing = replace(self.listing, labels=(self.pixel_counts[:, :-1] > 0).astype(np.uint8))
        keep = np.array([survey.usable for survey in surveys])
        if not keep.any():
            raise DataError(
                f"{where}: none of the {len(keep)} images of split '{self.split}' has a mask with a pixel of a class "
                f"where the image has data; correct the masks, or what {self._source} calls {IGNORE}"
            )
        if not keep.all():
            log.warning(
                "%d of %d images of split '%s' are left out, as no pixel with data has a class in their masks, the "
                "first is %s",
                np.count_nonzero(~keep),
                len(keep),
                self.split,
                self.ids[np.argmin(keep)],
            )
            self._select(keep)

    def _survey(self, i):
        """The Survey of sample i. Raises DataError for files that cannot be read."""
        counts = np.zeros(len(self.CLASSES) + 1, np.int64)
        if not self._masks[i]:
            return Survey(counts, usable=False)
        if not os.path.exists(self._masks[i]):
            return Survey(counts)
        values, mask = self._read_mask(i)
        unknown = mask == UNKNOWN
        if unknown.any():
            return Survey(counts, unknown=tuple(np.unique(values[unknown]).tolist()))
        found = np.bincount(mask.ravel(), minlength=IGNORED + 1)
        counts[:-1], counts[-1] = found[: len(self.CLASSES)], found[IGNORED]
        if not all(map(os.path.exists, self._paths[i])):
            return Survey(counts)
        image = self._find(str(self.ids[i]), self._paths[i], self.where(i))
        if mask.shape != (image.height, image.width):
            return Survey(counts, size=_unequal(mask, image.height, image.width))
        try:
            return Survey(counts, usable=has_data(image, mask != IGNORED))
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error

    def _select(self, rows):
        super()._select(rows)
        self._masks = self._masks[rows]
        if self.pixel_counts is not None:
            self.pixel_counts = self.pixel_counts[rows]
        if self._held is not None:
            raise RuntimeError("the samples are held in memory already")

    # ---- Items -----------------------------------------------------------------------------------

    def held_bytes(self):
        """The memory that `hold` takes."""
        return len(self) * self.size**2 * (2 * 4 + 1)

    def hold(self):
        """Reads all samples, and keeps them in memory, which forked loader processes share. Raises DataError."""
        self._held = in_threads(self.__getitem__, range(len(self)))

    def __getitem__(self, i):
        if self._held is not None:
            return self._held[i]
        image, mask = self.image(i), self.labels(i)
        mask[~torch.isfinite(image).all(0)] = IGNORED
        return image, mask

    def files(self, i):
        return super().files(i) + ([self._masks[i]] if self.supervised else [])

    def labels(self, i):
        """The mask of sample i as in its file, (S, S) uint8; of IGNORED alone if not supervised. Raises DataError."""
        if not self.supervised:
            return torch.full((self.size, self.size), IGNORED, dtype=torch.uint8)
        values, mask = self._read_mask(i)
        if mask.shape != (self.size, self.size):
            raise DataError(
                f"{self._masks[i]}: {_unequal(mask, self.size, self.size)}; cut image and mask alike ({self.where(i)})"
            )
        unknown = mask == UNKNOWN
        if unknown.any():
            raise DataError(
                f"{self._masks[i]}: holds the value {values[unknown][0]}, which {self._source} does not name; restore "
                f"the mask ({self.where(i)})"
            )
        return torch.from_numpy(mask)

    def _read_mask(self, i):
        """The mask of sample i: (values (H, W) of the file, numbers of classes, IGNORED or UNKNOWN (H, W) uint8)."""
        path = self._masks[i]
        values, nodata = read_values(path)
        if values.dtype.kind not in "iuf":
            raise DataError(f"{path}: holds {values.dtype}, but a mask must hold whole numbers ({self.where(i)})")
        mask = self._encode(values.astype(np.float64 if values.dtype.kind == "f" else np.int64))
        if nodata is not None and np.isfinite(nodata):
            (number,) = self._encode(np.array([nodata]))
            if number < UNKNOWN:
                raise DataError(
                    f"{path}: its no-data value, {nodata:g}, is the class {quoted(self.CLASSES[number])} in "
                    f"{self._source}; call the value {IGNORE} there, or take the tag out of the masks (gdal_edit.py "
                    f"-unsetnodata) ({self.where(i)})"
                )
            mask[values == nodata] = IGNORED
        return values, mask

    def _encode(self, values):
        """Values of masks, int64 or float64 → the number of the class, IGNORED or UNKNOWN, uint8."""
        known = (values >= LOWEST) & (values <= HIGHEST) & (values == np.floor(values))
        numbers = self._numbers[np.where(known, values, LOWEST).astype(np.int64) - LOWEST]
        numbers[~known] = UNKNOWN
        numbers[np.isnan(values)] = IGNORED
        return numbers

    def describe(self):
        """As of Chips; class_counts and ignored_pixels are numbers of pixels, the latter only if supervised."""
        found = super().describe() | {"class_counts": None}
        if self.pixel_counts is None:
            return found
        *counts, ignored = self.pixel_counts.sum(0).tolist()
        return found | {"class_counts": dict(zip(self.CLASSES, counts)), "ignored_pixels": ignored}


def _unequal(mask, height, width):
    """For a message: the size of a mask, and that of its image."""
    return f"is {mask.shape[0]}x{mask.shape[1]} pixels, its image {height}x{width}"


def has_data(image, wanted):
    """Whether one of the wanted pixels, (H, W) bool, has VH and VV in an Image. Reads no more of it than is needed."""
    with image.opened(listed=False) as read:
        for top in range(0, image.height, STRIP):
            part = wanted[top : top + STRIP]
            if part.any() and (np.isfinite(read(top, 0, *part.shape)).all(0) & part).any():
                return True
    return False


# ---- Sen1Floods11 --------------------------------------------------------------------------------


class Sen1Floods11(Masks):
    """The hand-labelled chips of Sen1Floods11 (Bonafilia, Tellman, Anderson and Issenberg, CVPR Workshops 2020).

    Item i is (image, mask), as of Masks; image of 512×512 pixels, σ⁰ in dB. Values of the masks: 0 no water, 1 water,
    −1 not labelled.
    root: the folder that holds S1Hand/<id>_S1Hand.tif and LabelHand/<id>_LabelHand.tif, ids such as Ghana_103272; or
    the folder v1.1, or that above it, which hold it as data/flood_events/HandLabeled. The lists of the splits are
    looked for in splits/flood_handlabeled of v1.1: flood_{train,valid,test}_data.csv, and for the split all
    flood_bolivia_data.csv, too, which is held out; rows <id>_S1Hand.tif,<id>_LabelHand.tif, without a header.
    metadata: such lists instead, all of whose rows are used, whatever the split. Without any list, all chips are there,
    and val and test are drawn by group (`draw`). The group of a chip is its country.
    """

    CLASSES = ("no water", "water")
    VALUES = Legend({0: "no water", 1: "water", -1: IGNORE}, "Sen1Floods11 (-1, 0, 1)")
    HAND = "data/flood_events/HandLabeled"
    LISTS = "splits/flood_handlabeled"
    NAMES = {"train": "train", "val": "valid", "test": "test"}
    CHIP = re.compile(r"([A-Za-z-]+_\d+)_S1Hand\.tif")

    def _read_list(self, root, split, metadata):
        top = next((path for path in (root, root / "v1.1") if (path / self.HAND).is_dir()), None)
        self._folder = root if top is None else top / self.HAND
        if not (self._folder / "S1Hand").is_dir():
            raise DataError(
                f"{root}: holds neither S1Hand nor {self.HAND}/S1Hand; give the folder of S1Hand and LabelHand, or "
                "v1.1 of the dataset"
            )
        metadata = as_paths(metadata) if metadata else self._lists(split, top or self._top())
        if metadata:
            listing = join_listings([self._read_split(path, place_name(path, root)) for path in metadata])
        else:
            files = sorted(path.name for path in (self._folder / "S1Hand").iterdir())
            ids = np.array([match[1] for match in map(self.CHIP.fullmatch, files) if match], dtype=str)
            listing = Listing(ids, None, (f"{self._folder / 'S1Hand'}/",))
        if len(listing.ids) == 0:
            raise DataError(
                f"{', '.join(map(str, metadata)) or self._folder / 'S1Hand'}: names no chip; restore the files "
                "<id>_S1Hand.tif of the dataset"
            )
        groups = np.array([name.partition("_")[0] for name in listing.ids.tolist()], dtype=str)
        masks = [str(self._folder.relative_to(root) / "LabelHand" / f"{name}_LabelHand.tif") for name in listing.ids]
        return metadata, Table(listing, groups=groups, masks=np.array(masks))

    def _top(self):
        """The folder v1.1 in which the folder of the chips lies; None if it lies in another."""
        folder = self._folder.absolute()
        return folder.parents[2] if folder.parts[-3:] == Path(self.HAND).parts else None

    def _lists(self, split, top):
        """Paths of the official lists of a split; [] if there are none at all. Raises DataError."""
        folder = top and top / self.LISTS
        if folder is None or not folder.is_dir():
            return []
        found = [folder / f"flood_{self.NAMES[part]}_data.csv" for part in PARTS[split]]
        bolivia = folder / "flood_bolivia_data.csv"
        return found + ([bolivia] if split == "all" and bolivia.exists() else [])

    def _read_split(self, path, place):
        """The Listing of an official list, without labels. Raises DataError."""
        rows = [(line, [cell.strip() for cell in row]) for line, row in read_csv_rows(path)]
        names = [self.CHIP.fullmatch(row[0]) for _, row in rows]
        wrong = [
            f"{place}:{line} {quoted(','.join(row))}"
            for (line, row), name in zip(rows, names)
            if not name or row[1:] != [f"{name[1]}_LabelHand.tif"]
        ]
        if wrong:
            raise data_error(
                f"{path}: {len(wrong)} of {len(rows)} rows are not <id>_S1Hand.tif,<id>_LabelHand.tif",
                wrong,
                "give lists as flood_train_data.csv of the dataset",
            )
        ids = np.array([name[1] for name in names], dtype=str)
        return Listing(ids, None, (f"{place}:",), line=np.array([line for line, _ in rows], np.int64))

    def _find_images(self, root, table):
        folder = self._folder / "S1Hand"
        return folder, {name: (str(folder / f"{name}_S1Hand.tif"),) for name in table.listing.ids.tolist()}

    def _read_legend(self, root):
        return self.VALUES

    def _of_split(self, table, draw, where):
        if not self.metadata:
            return super()._of_split(table, draw, where)
        if draw[0] or draw[1]:
            log.warning("--val_fraction and --test_fraction are not used: the split is that of %s", where)
        return np.ones(len(self), bool)
