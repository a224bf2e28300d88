# SPDX-License-Identifier: MIT
"""The packed store: all images of a dataset one after the other in a few large files, for training at full speed.

    manifest.json       what it is: dataset, shape, coding, units, channel order, classes, statistics, checksums of all files
    part_00000.bin …    images, contiguous (n, 2, S, S), little-endian, without a header; a part belongs to one split
    images.parquet      name, and nonfinite: the number of its pixels without a finite value
    samples.parquet     id, split, position (among the samples of several splits read as one), image_0 (and image_1 of a pair):
                        rows of images.parquet; one column of 0/1 per class
    statistics.json     mean, std, range, counts and histogram of each split, before coding
    bad.csv             images that were left out, and why

Values are dB. Coding float32 is exact; float16 rounds (by up to 0.008 dB between 16 and 32 dB); uint16 is affine, with a
scale and an offset for each part and channel, from its least to its greatest value, so that nothing is clipped and the
error is at most half a step (about 0.001 dB over 100 dB). NaN stands for no data and for values that are not finite, in
uint16 as the code NO_DATA. `sarwmix.prepare.pack` writes it.
"""

import copy
import hashlib
import json
import logging
import math
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from common.errors import DataError, data_error
from common.files import file_fault, read_json, sha256_of
from sarwmix.bigearthnet import acquisitions_of, check_root, check_split
from sarwmix.plausibility import judge
from sarwmix.sen12flood_loader import draw_folders, folders_of

MANIFEST, SAMPLES, IMAGES, STATISTICS, BAD = (
    "manifest.json",
    "samples.parquet",
    "images.parquet",
    "statistics.json",
    "bad.csv",
)
FORMAT, VERSION = "sarwmix packed store", 1
DTYPES = ("uint16", "float16", "float32")
STAGED = 1024  # images that are on their way to a GPU at a time
BLOCK = 16  # images that are decoded at a time
MOST_SIDE = 2**13  # pixels of an image
_PART = re.compile(r"part_\d{5}\.bin")  # in the folder itself, wherever a manifest comes from
NO_DATA, CODES = 65535, 65534  # of uint16: the code without a value, and the greatest with one
PARTS = {
    "train": ("train",),
    "val": ("val",),
    "test": ("test",),
    "train_val": ("train", "val", "every"),
    "all": ("train", "val", "test", "every"),
}  # "every": a dataset that had no lists

log = logging.getLogger(__name__)


# ---- Coding --------------------------------------------------------------------------------------


def encode(images, dtype):
    """dB images as they are stored: (codes (n, 2, S, S) of `dtype`, scale (2,), offset (2,)).

    images: (n, 2, S, S) float32; what is not finite becomes NaN, or NO_DATA. A value is code · scale + offset.
    """
    finite = np.isfinite(images)
    if dtype != "uint16":
        return np.where(finite, images, np.nan).astype(dtype), [1.0, 1.0], [0.0, 0.0]
    codes, scale, offset = np.full(images.shape, NO_DATA, np.uint16), [], []
    for channel in range(2):
        good = finite[:, channel]
        values = images[:, channel][good].astype(np.float64)
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        low, step = np.float32(low), np.float32((high - low) / CODES) or np.float32(1)  # what a reader computes with
        codes[:, channel][good] = np.clip(np.rint((values - np.float64(low)) / np.float64(step)), 0, CODES).astype(
            np.uint16
        )
        scale.append(float(step))
        offset.append(float(low))
    return codes, scale, offset


def as_tensor(codes):
    """Codes as a tensor of the same bits; those of uint16 as int16, as PyTorch can do little with uint16."""
    return torch.from_numpy(codes.view(np.int16) if codes.dtype == np.uint16 else codes)


def decode(codes, scale, offset):
    """dB from codes of `as_tensor`, on the device they lie on: (n, 2, S, S) float32. scale, offset: (n, 2, 1, 1) float32."""
    if codes.dtype != torch.int16:
        return codes.float()
    values = (codes.int() & 0xFFFF).float()
    empty = values == NO_DATA
    # One after the other, and not fused, so that the bits are those of Images.read.
    return values.mul_(scale).add_(offset).masked_fill_(empty, torch.nan)


# ---- The store -----------------------------------------------------------------------------------


def is_packed(root):
    """Whether a folder holds a packed store, or what an unfinished or damaged one has left."""
    return any((Path(root) / name).exists() for name in (MANIFEST, SAMPLES, "part_00000.bin"))


def manifest_checksum(manifest):
    """SHA-256 of everything else that a manifest says."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(root):
    """The manifest of a store. Raises DataError if it is absent, damaged or of another version."""
    path = Path(root) / MANIFEST
    if not path.exists():
        raise DataError(f"{path}: does not exist, so the packed store is not finished; run sarwmix.prepare.pack again")
    again = "copy it again, or pack the data again"
    manifest = read_json(path, again)
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_checksum(manifest):
        raise DataError(f"{path}: is damaged; {again}")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DataError(f"{path}: is no packed store of version {VERSION}; pack the data again")
    try:
        sound = _is_sound(manifest)
    except (LookupError, TypeError, ValueError, AttributeError):  # something is not there, or of another kind
        sound = False
    if not sound:
        raise DataError(f"{path}: contradicts itself, so it was not written by sarwmix.prepare.pack; {again}")
    return manifest


def _is_sound(manifest):
    """Whether a manifest says all that reading needs, and of every part the size that its images take."""
    channels, *sides = manifest["shape"]
    each = channels * math.prod(sides) * np.dtype(manifest["dtype"]).itemsize
    parts = manifest["parts"]
    return all(
        (
            manifest["dtype"] in DTYPES,
            channels == 2 and len(sides) == 2 and 0 < sides[0] == sides[1] <= MOST_SIDE,
            parts and all(_PART.fullmatch(part["file"]) for part in parts),
            all(part["images"] > 0 and part["bytes"] == part["images"] * each for part in parts),
            all(np.asarray(part[name], np.float32).shape == (2,) for part in parts for name in ("scale", "offset")),
            manifest["images"] == sum(part["images"] for part in parts),
            manifest["images_per_sample"] in (1, 2),
            manifest["files"].keys() == {SAMPLES, IMAGES, STATISTICS, BAD},
            manifest["classes"] and all(isinstance(name, str) for name in manifest["classes"]),
            isinstance(manifest["dataset"], str),
            isinstance(manifest["floor_db"], float | None),
            manifest["splits"].keys() == manifest["statistics"].keys(),
        )
    )


def verify(root, workers):
    """Check every file of a store against its checksum. Raises DataError: count and the first five that differ."""
    manifest = workers.on_main(read_manifest, root)
    expected = {**manifest["files"], **{part["file"]: part["sha256"] for part in manifest["parts"]}}
    faults = [fault for fault in workers.map(partial(file_fault, root), sorted(expected.items()), "files") if fault]
    if faults:
        raise data_error(
            f"{root}: {len(faults)} of {len(expected)} files are not what was written",
            faults,
            "copy them again, or remove them with manifest.json and run sarwmix.prepare.pack again",
        )
    return len(expected)


def _read_table(root, name, manifest, columns=None):
    path = Path(root) / name
    try:
        if sha256_of(path) == manifest["files"][name]:
            return pd.read_parquet(path, columns=columns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again, or pack the data again") from error
    except ValueError:
        pass  # no such table, whatever the checksums say
    raise DataError(f"{path}: is damaged; copy it again, or pack the data again")


class Images:
    """The images of a store, memory-mapped, by row. nonfinite (M,): pixels of each without a value."""

    def __init__(self, root, manifest, nonfinite):
        self.root, self.parts, self.nonfinite = Path(root), manifest["parts"], nonfinite
        self.shape, self.dtype = tuple(manifest["shape"]), np.dtype(manifest["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0] + [part["images"] for part in self.parts])
        self._scale, self._offset = (
            np.array([part[name] for part in self.parts], np.float32)[:, :, None, None] for name in ("scale", "offset")
        )
        self._mapped, self._mapping = {}, threading.Lock()

    @property
    def bytes_each(self):
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def fault(self, number):
        """What is wrong with the file of a part, as far as its size tells, or None."""
        part = self.parts[number]
        try:
            size = (self.root / part["file"]).stat().st_size
        except OSError as error:
            return f"{part['file']}: {error.strerror}"
        return None if size == part["bytes"] else f"{part['file']} has {size} bytes, not {part['bytes']}"

    def coding(self, rows):
        """(scale, offset) of images, each (n, 2, 1, 1) float32."""
        parts = self._part_of(rows)
        return self._scale[parts], self._offset[parts]

    def gather(self, rows, out):
        """Put the codes of images into the array `out` (n, 2, S, S), in the order of `rows` (n,). Returns it."""
        for target, codes in zip(out, self.each(rows)):
            target[...] = codes
        return out

    def read(self, rows):
        """dB of images: tensor (n, 2, S, S) float32, in the order of `rows` (n,)."""
        if self.dtype != np.uint16:
            return as_tensor(self.gather(rows, np.empty((len(rows), *self.shape), self.dtype))).float()
        images, (scale, offset) = np.empty((len(rows), *self.shape), np.float32), self.coding(rows)
        for start in range(0, len(rows), BLOCK):  # so few that they stay in the CPU's cache from one line to the next
            block = slice(start, start + BLOCK)
            codes = self.gather(rows[block], np.empty(images[block].shape, self.dtype))
            images[block] = codes
            images[block] *= scale[block]
            images[block] += offset[block]
            if self.nonfinite[rows[block]].any():
                images[block][codes == NO_DATA] = np.nan
        return torch.from_numpy(images)

    def each(self, rows):
        """The codes of one image after the other, (2, S, S), as they lie in the files. Raises DataError."""
        parts = self._part_of(rows)
        for part, row in zip(parts.tolist(), (rows - self._starts[parts]).tolist()):
            yield self._map(part)[row]

    def _part_of(self, rows):
        return np.searchsorted(self._starts, rows, "right") - 1

    def _map(self, number):
        if number not in self._mapped:
            with self._mapping:
                fault = self.fault(number)
                if fault:
                    raise DataError(f"{self.root}: {fault}; copy the store again")
                part = self.parts[number]
                # As a plain array: a memmap makes a new memmap of everything that is taken from it.
                self._mapped[number] = np.asarray(
                    np.memmap(self.root / part["file"], self.dtype, "r", shape=(part["images"], *self.shape))
                )
        return self._mapped[number]

    def __getstate__(self):
        return {**self.__dict__, "_mapped": {}, "_mapping": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _mapping=threading.Lock())


class ImagesInMemory(Images):
    """Some of the images of a store, read into memory.

    memory: a buffer for them, None for one of its own. share (k, n): of n processes that share the buffer, this is the k-th
    from 0, which reads its part of the images; the others' are there when they are done.
    """

    def __init__(self, images, rows, memory=None, share=(0, 1)):
        self.__dict__.update(images.__dict__)
        self._rows = rows  # sorted
        shape, (own, of) = (len(rows), *self.shape), share
        self._codes = (
            np.empty(shape, self.dtype) if memory is None else np.frombuffer(memory, self.dtype).reshape(shape)
        )
        part = slice(len(rows) * own // of, len(rows) * (own + 1) // of)
        images.gather(rows[part], self._codes[part])

    def each(self, rows):
        yield from map(self._codes.__getitem__, np.searchsorted(self._rows, rows).tolist())


class ImagesOnDevice(Images):
    """Some of the images of a store, in the memory of a GPU; `read` gives batches that lie there."""

    def __init__(self, images, rows, device):
        self.__dict__.update(images.__dict__)
        self._rows, self._codes = rows, None  # sorted
        for start in range(0, len(rows), STAGED):
            part = rows[start : start + STAGED]
            codes = as_tensor(images.gather(part, np.empty((len(part), *self.shape), self.dtype)))
            if self._codes is None:
                self._codes = torch.empty((len(rows), *self.shape), dtype=codes.dtype, device=device)
            self._codes[start : start + STAGED] = codes.to(device)

    def read(self, rows):
        device = self._codes.device
        slots = torch.from_numpy(np.searchsorted(self._rows, rows)).to(device, non_blocking=True)
        scale, offset = (torch.from_numpy(x).to(device, non_blocking=True) for x in self.coding(rows))
        return decode(self._codes.index_select(0, slots), scale, offset)


class PackedDataset(Dataset):
    """A split of a packed store: items, ids, labels and order are those of the dataset that was packed.

    Item i is (image, labels) or (image, image, label), as in the dataset that was packed: images (2, S, S) float32 dB.
    dataset: what the store must be of, or None for whatever it is. supervised: samples without a label are left out.
    val_fraction, seed: of SEN12-FLOOD, as in FloodDataset. `codes` and `decode` give whole batches.
    Raises DataError for a store that is unfinished, damaged or of another dataset, or has nothing of the split.
    """

    CHANNELS, UNITS = ("VH", "VV"), "dB"

    def __init__(self, root, split="train", dataset=None, supervised=False, val_fraction=0.0, seed=0):
        self.root, self.split = check_root(root), check_split(split)
        self.manifest = read_manifest(root)
        if dataset not in (None, self.manifest["dataset"]):
            raise DataError(
                f"{root}: is a packed store of {self.manifest['dataset']}; say --dataset {self.manifest['dataset']}, or give "
                f"the folder of {dataset}"
            )
        self.CLASSES, self.floor_db = tuple(self.manifest["classes"]), self.manifest["floor_db"]
        self.metadata = [self.root / SAMPLES]
        self._pairs = self.manifest["images_per_sample"] == 2
        self._images = Images(
            self.root, self.manifest, _read_table(root, IMAGES, self.manifest, ["nonfinite"])["nonfinite"].to_numpy()
        )
        self.nonfinite = Count()
        self._select(_read_table(root, SAMPLES, self.manifest), supervised, val_fraction, seed)

    def _select(self, table, supervised, val_fraction, seed):
        split, images = self.split, [f"image_{k}" for k in range(1 + self._pairs)]
        lacking = [name for name in ("id", "split", "position", *images, *self.CLASSES) if name not in table]
        if lacking:
            raise DataError(f"{self.root / SAMPLES}: has no column {lacking[0]}; copy it again, or pack the data again")
        rows = table[images].to_numpy(np.int64)
        if (
            len(self._images.nonfinite) != self.manifest["images"]
            or (rows < 0).any()
            or (rows >= self.manifest["images"]).any()
        ):
            raise DataError(
                f"{self.root / SAMPLES}: names other images than those that the parts hold; copy the store again"
            )
        wanted = PARTS["train" if self._pairs and val_fraction and split == "val" else split]
        table = table[table["split"].isin(wanted)]
        if len(table) == 0:
            raise DataError(
                f"{self.root}: has no sample of split '{split}' (it has "
                f"{', '.join(f'{name} {count}' for name, count in self.manifest['splits'].items())}); choose another split"
                + (", or give --val_fraction" if self._pairs and split == "val" else "")
            )
        if len(wanted) > 1:
            table = table.sort_values("position", kind="stable")
        self.ids = table["id"].to_numpy(dtype=str)
        self._rows = table[images].to_numpy(np.int64)
        self._labels = table[list(self.CLASSES)].to_numpy(np.uint8)
        self._number = table.index.to_numpy()
        if supervised and not self._labels.any(1).all():
            keep = self._labels.any(1)
            if not keep.any():
                raise DataError(
                    f"{self.root}: none of the {len(keep)} samples of split '{split}' has a label; give data with labels: "
                    "pretraining and --embed alone do without them"
                )
            log.info("dropped %d of %d samples, which have no label", np.count_nonzero(~keep), len(keep))
            self._keep(keep)
        if self._pairs and val_fraction and split in ("train", "val"):
            held_out = np.isin(self.groups, draw_folders(self.groups, val_fraction, seed, str(self.root)))
            self._keep(held_out if split == "val" else ~held_out)

    def _keep(self, rows):
        self.ids, self._rows, self._labels, self._number = (
            x[rows] for x in (self.ids, self._rows, self._labels, self._number)
        )

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return *(image[0] for image in self.images([i])), self.labels([i])[0]

    def image(self, i):
        """The image of sample i, or the first of two, (2, S, S) float32 dB."""
        return self.images([i])[0][0]

    @property
    def size(self):
        """Side of the images, in pixels."""
        return self.manifest["shape"][-1]

    @property
    def groups(self):
        """(N,) str: what samples must not share between splits: the acquisition, or the folder, of each."""
        return folders_of(self.ids) if self._pairs else acquisitions_of(self.ids)

    def label_table(self):
        """(N, K) uint8, 1 in the columns of the classes of each sample."""
        return self._labels

    def labels(self, ids):
        """Labels of samples, as a batch of items has them: (B, 19) float32, or (B,) int64 for floods."""
        labels = torch.from_numpy(self._labels[np.asarray(ids)])
        return labels.argmax(1) if self._pairs else labels.float()

    def subset(self, rows):
        """This dataset with some of its samples alone; rows: indices or a boolean mask."""
        part = copy.copy(self)
        part._keep(rows)
        return part

    def where(self, i):
        """Where sample i is named: "samples.parquet: row 17" (0-based)."""
        return f"{SAMPLES}: row {self._number[i]}"

    def describe(self):
        """What a run records about its data; can be written as JSON."""
        return {
            "name": f"{type(self).__name__} of {self.manifest['dataset']}",
            "root": str(self.root),
            "metadata": [str(path) for path in self.metadata],
            "split": self.split,
            "samples": len(self),
            "class_counts": dict(zip(self.CLASSES, self._labels.sum(0, dtype=int).tolist())),
            "fingerprint": hashlib.sha256("\n".join(self.ids.tolist()).encode()).hexdigest(),
            "dtype": self.manifest["dtype"],
            "manifest": self.manifest["sha256"],
        }

    def check_files(self, start=0, step=1):
        """Raises DataError if every step-th part from `start` is missing or of another size: count, first five.

        `verify` also looks at their content.
        """
        parts = len(self._images.parts)
        faults = [fault for fault in map(self._images.fault, range(parts)[start::step]) if fault]
        if faults:
            raise data_error(
                f"{self.root}: {len(faults)} of {parts} parts cannot be used", faults, "copy the store again"
            )

    def check_units(self, expected=None):
        """{"mean", "std", "min", "max", …} by the store's own statistics, of the splits that this one consists of.

        expected: (mean, std) that they will be standardised with. Raises DataError for values that cannot be dB, and
        warns of those that may not be (`sarwmix.plausibility`).
        """
        figures = {
            name: self.manifest["statistics"][name] for name in PARTS[self.split] if name in self.manifest["statistics"]
        }
        whole = file_fault(self.root, (STATISTICS, self.manifest["files"][STATISTICS])) is None
        histograms = (
            read_json(self.root / STATISTICS, "copy the store again") if whole else {}
        )  # training can do without
        for name in figures:
            judge(f"{self.root}: split '{name}'", figures[name], expected, histograms.get(name, {}).get("histogram"))
        return figures

    # ---- Whole batches ---------------------------------------------------------------------------

    def images(self, ids):
        """dB images of a batch: a tuple of one or two tensors (B, 2, S, S) float32, on the CPU or the device of the cache.

        ids: (B,) positions in this split.
        """
        return tuple(self._finish(self._images.read(rows), rows) for rows in self._rows[ids].T)

    def codes(self, ids, empty=torch.empty):
        """As `images`, but as they are stored, for `decode` on another device; empty(shape, dtype=…): what they are put into."""
        batch = []
        for rows in self._rows[ids].T:
            codes = empty((len(rows), *self._images.shape), dtype=as_tensor(np.empty(0, self._images.dtype)).dtype)
            self._images.gather(rows, codes.numpy().view(self._images.dtype))
            batch.append(codes)
        return tuple(batch)

    def decode(self, codes, ids):
        """dB images from `codes` of the same ids, on the device that these lie on."""
        images = []
        for batch, rows in zip(codes, self._rows[ids].T):
            scale, offset = (torch.from_numpy(x).to(batch.device, non_blocking=True) for x in self._images.coding(rows))
            images.append(self._finish(decode(batch, scale, offset), rows))
        return tuple(images)

    def _finish(self, images, rows):
        """In images of floods NaN becomes the floor, as in FloodDataset, and is counted in `nonfinite`."""
        lost = 0 if self.floor_db is None else int(self._images.nonfinite[rows].sum())
        if lost:
            images.masked_fill_(images.isnan(), self.floor_db)
            self.nonfinite.add(lost)
        return images

    def cache(self, device=None, memory=None, share=(0, 1)):
        """Read the images of this split into memory, or into that of `device`; batches then come from there.

        memory, share: of `ImagesInMemory`, for processes that share one copy.
        """
        rows = np.unique(self._rows)
        self._images = (
            ImagesInMemory(self._images, rows, memory, share)
            if device is None
            else ImagesOnDevice(self._images, rows, device)
        )

    @property
    def on_device(self):
        """Whether batches lie on the device of the cache."""
        return isinstance(self._images, ImagesOnDevice)

    def cache_bytes(self):
        """Bytes that `cache` takes."""
        return len(np.unique(self._rows)) * self._images.bytes_each


class Count:
    """A number that several threads add to."""

    def __init__(self):
        self.value, self._lock = 0, threading.Lock()

    def add(self, number):
        with self._lock:
            self.value += number

    def __getstate__(self):
        return self.value

    def __setstate__(self, value):
        self.value, self._lock = value, threading.Lock()
