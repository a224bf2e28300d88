# SPDX-License-Identifier: MIT
"""The protocol of all datasets of Sentinel-1 images. docs/ADDING_A_DATASET.md has an example."""

import copy
import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import data_error
from sarwmix.layouts import whereabouts
from sarwmix.listing import CHANNELS, UNITS, in_threads
from sarwmix.moments import Moments
from sarwmix.plausibility import FIRST_LOOK, judge


class RadarDataset(Dataset):
    """Base class of all datasets. Item i is (image, label), or (first image, second image, label) for pairs of images.

    Images are (2, S, S) float32 tensors in dB, in the order of CHANNELS. The label is (K,) float32, 1 for each class
    that is present; if `task` is "multiclass" or "flood", the number of the one class as a 0-d int64 tensor; if it is
    "segmentation", a mask (`sarwmix.masks`).

    A subclass sets CLASSES, MEAN and STD, reads its list of samples into a `Listing`, hands it to `__init__`, and
    implements `files` and `read_image`. It sets the other attributes where they differ from the defaults here, and
    raises DataError for data that cannot be used.

    root: folder of the data. split: one of SPLITS. metadata: paths of the files that list the samples.
    Attributes: ids (N,) str, the name of each sample; listing; left_out, the number of samples that --skip_missing left
    out, or None; nonfinite, if there is a FLOOR_DB, a multiprocessing.Value that counts the pixels it replaced.
    """

    CHANNELS, UNITS = CHANNELS, UNITS
    CLASSES = ()  # names, in the order of the columns of `label_table`
    MEAN = STD = None  # (VH, VV) in dB, with which images are standardised by default
    FLOOR_DB = None  # value of pixels without backscatter or data; None: such pixels are NaN
    task = "multilabel"  # or "multiclass", "flood": each sample is of one class; "segmentation": each pixel
    size = None  # S, pixels a side
    images_per_sample = 1
    stored_splits = None  # names of the splits that the list of samples states; None: those of the class
    is_packed = False  # whether `codes` and `images` give whole batches
    left_out = None

    def __init__(self, root, split, metadata, listing):
        self.root, self.split, self.metadata = Path(root), split, metadata
        self.listing, self.ids = listing, listing.ids
        if self.FLOOR_DB is not None:
            self.nonfinite = multiprocessing.Value("q", 0)

    # ---- Items -----------------------------------------------------------------------------------

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return *(self.image(i, which) for which in range(self.images_per_sample)), self.labels(i)

    def files(self, i):
        """Paths of the files of sample i."""
        raise NotImplementedError

    def read_image(self, i, which=0):
        """Reads image `which` of sample i: (2, S, S) float32 array in dB, NaN for no data. Raises DataError."""
        raise NotImplementedError

    def image(self, i, which=0):
        """Image `which` of sample i as in the item: (2, S, S) float32. Does not read labels."""
        image = self.read_image(i, which)
        if self.FLOOR_DB is not None:
            empty = np.isnan(image)
            self.count_nonfinite(np.count_nonzero(empty))
            image[empty] = self.FLOOR_DB
        return torch.from_numpy(image)

    def count_nonfinite(self, pixels):
        """Adds to `nonfinite`, which forked DataLoader workers share."""
        if pixels:
            with self.nonfinite.get_lock():
                self.nonfinite.value += int(pixels)

    def label_rows(self, rows):
        """Rows of `label_table`; rows: an index, a slice or an array."""
        return self.listing.labels[rows]

    def labels(self, rows):
        """Labels as in the items: of one sample, or of a batch (B,) of rows."""
        labels = torch.from_numpy(self.label_rows(rows))
        return labels.float() if self.task == "multilabel" else labels.argmax(-1)

    # ---- All samples -----------------------------------------------------------------------------

    @property
    def groups(self):
        """(N,) str: samples of one group show one place or acquisition, and must not be in different splits."""
        return self.ids

    @property
    def image_names(self):
        """(N, images_per_sample) str: the name of each image. Images of the same name are the same image."""
        return self.ids[:, None]

    def georeference(self):
        """DataFrame of `sarwmix.raster.GRID`, a row per sample: where its image lies; None if that is not known."""

    def label_table(self):
        """(N, K) uint8, 1 in the column of each class that is present."""
        return self.label_rows(slice(None))

    def where(self, i):
        """Where sample i is named, for messages: "train.csv:312" (1-based), "metadata.parquet: row 17" (0-based)."""
        return self.listing.where(i)

    def subset(self, rows):
        """This dataset with some of its samples. rows: indices or a boolean mask."""
        part = copy.copy(self)
        part._select(rows)
        return part

    def portable(self, rows):
        """As `subset`, but picklable: without the counter, which only forked processes can share."""
        part = self.subset(rows)
        vars(part).pop("nonfinite", None)
        return part

    def _select(self, rows):
        self.listing = self.listing.take(rows)
        self.ids = self.listing.ids

    def describe(self):
        """What a run records about its data, as plain values. class_counts is None if labels are read per item."""
        labels = self.listing.labels
        return {
            "name": type(self).__name__,
            "root": str(self.root),
            "metadata": [str(path) for path in self.metadata],
            "split": self.split,
            "samples": len(self),
            "class_counts": None if labels is None else dict(zip(self.CLASSES, labels.sum(0, dtype=int).tolist())),
            "fingerprint": hashlib.sha256("\n".join(self.ids.tolist()).encode()).hexdigest(),
        } | ({} if self.left_out is None else {"left_out": self.left_out})

    # ---- Checks before training ------------------------------------------------------------------

    def require(self):
        """Raises DataError if a package that reading needs is not installed."""

    def lacking(self, i):
        """What of sample i does not exist, as names for a message; empty if the sample is complete."""
        return [path for path in self.files(i) if not os.path.exists(path)]

    def whereabouts(self, i, name):
        """For a message: where `name` of `lacking(i)` was looked for, and in which folder samples can be restored."""
        return f"{whereabouts(name)}; restore them in {self.root}"

    def missing(self, start=0, step=1):
        """The samples, of every step-th from `start`, that are not complete: a list of indices.

        Ranks share the work with start=rank, step=world size; so does `check_files`.
        """
        return [i for i, _ in self._incomplete(start, step)]

    def _incomplete(self, start, step):
        """[(sample, what it lacks)] of the samples that are not complete."""
        rows = range(len(self))[start::step]
        return [(i, lost) for i, lost in zip(rows, in_threads(self.lacking, rows)) if lost]

    def check_files(self, start=0, step=1):
        """Raises DataError if samples, of every step-th from `start`, are not complete: count and first five."""
        missing = self._incomplete(start, step)
        if missing:
            i, lost = missing[0]
            raise data_error(
                f"{len(missing)} of {len(range(len(self))[start::step])} samples lack data (--skip_missing leaves them "
                "out, --skip_bad when they are packed)",
                [f"{self.ids[i]} {' and '.join(lost)} ({self.where(i)})" for i, lost in missing],
                f"{self.whereabouts(i, lost[0])}, or remove these rows",
            )

    def check_units(self, expected=None, samples=32):
        """Checks the values of up to `samples` evenly spaced samples. Raises DataError if they cannot be dB.

        expected: (mean, std) with which the images will be standardised; values far from them are logged as a warning
        (`sarwmix.plausibility`). Returns {"mean", "std", "min", "max": [VH, VV] in dB, "nonfinite": pixels}; pixels
        without a finite value, or of FLOOR_DB, count in none of the first four.
        """
        rows = np.unique(np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int))
        total, nonfinite = Moments(self.FLOOR_DB), 0
        for i in rows:
            for which in range(self.images_per_sample):
                image = self.read_image(i, which)
                nonfinite += image.size - np.count_nonzero(np.isfinite(image))
                total.add(image)
        figures, kind = total.summary(), "images" if self.images_per_sample == 1 else "pairs"
        judge(f"{self.root}: {len(rows)} {kind} of split '{self.split}'", figures, expected, total.histogram_dict())
        return {name: figures[name] for name in FIRST_LOOK} | {"nonfinite": int(nonfinite)}
