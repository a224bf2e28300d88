# SPDX-License-Identifier: MIT
"""The files of a packed store: all images of a dataset one after the other in a few large files, for fast training.

    manifest.json       dataset, shape, coding, units, channel order, classes, statistics, checksums of all files
    part_00000.bin …    images, contiguous (n, 2, S, S), little-endian, without a header; a part belongs to one split
    images.parquet      name, and nonfinite: the number of its pixels without a finite value
    samples.parquet     id, split, position (among the samples of several splits read as one), image_0 (and image_1 of a
                        pair): rows of images.parquet; one column of 0/1 per class (`label_columns`); of chips also
                        group and, where they are known, scene, row, column, crs and a … f, the transform of each image
    statistics.json     mean, std, range, counts and histogram of each split, before coding
    bad.csv             images that were left out, and why

`sarwmix.prepare.pack` writes it, `sarwmix.packed.PackedDataset` reads it.

How values in dB are coded: float32 is exact; float16 rounds, by up to 0.008 dB between 16 and 32 dB; uint16 is
affine, with a scale and an offset for each part and channel, from its least to its greatest value, so that nothing is
clipped and the error is at most half a step (about 0.001 dB over 100 dB). NaN stands for no data and for values that
are not finite; its uint16 code is NO_DATA.
"""

import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.errors import DataError, data_error
from common.files import file_fault, read_json, sha256_of
from sarwmix.listing import EVERY, PARTS

MANIFEST, SAMPLES, IMAGES = "manifest.json", "samples.parquet", "images.parquet"
STATISTICS, BAD = "statistics.json", "bad.csv"
FORMAT, VERSION = "sarwmix packed store", 1
STORED_SPLITS = (*PARTS["all"], EVERY)
DTYPES = ("uint16", "float16", "float32")
NO_DATA, CODES = 65535, 65534  # of uint16: the code without a value, and the greatest with one
MOST_SIDE = 2**13  # pixels of an image
_PART = re.compile(r"part_\d{5}\.bin")  # in the folder itself, wherever a manifest comes from


def is_packed(root):
    """Whether a folder holds a packed store, be it unfinished or damaged."""
    return any((Path(root) / name).exists() for name in (MANIFEST, SAMPLES, "part_00000.bin"))


def label_columns(dataset, classes):
    """The columns of SAMPLES that hold the labels of these classes. Classes of chips may be named as other columns."""
    return [f"label: {name}" if dataset == "chips" else name for name in classes]


def manifest_checksum(manifest):
    """SHA-256 of all other entries of a manifest."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(root):
    """Reads the manifest of a store. Raises DataError if it is absent, damaged or of another version."""
    path = Path(root) / MANIFEST
    if not path.exists():
        raise DataError(f"{path}: does not exist, so the packed store is not finished; run sarwmix.prepare.pack again")
    again = "copy it again, or pack the data again"
    manifest = read_json(path, again)
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_checksum(manifest):
        raise DataError(f"{path}: is damaged; {again}")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DataError(f"{path}: is not a packed store of version {VERSION}; pack the data again")
    try:
        sound = _is_sound(manifest)
    except (LookupError, TypeError, ValueError, AttributeError):  # an entry is absent, or of another type
        sound = False
    if not sound:
        raise DataError(f"{path}: contradicts itself, so it was not written by sarwmix.prepare.pack; {again}")
    return manifest


def _is_sound(manifest):
    """Whether a manifest has all entries that reading needs, and the size of every part is that of its images."""
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
            isinstance(manifest["classes"], list) and all(isinstance(name, str) for name in manifest["classes"]),
            manifest["classes"] or manifest["dataset"] == "chips",
            manifest.get("task", "multiclass") == "multiclass",
            isinstance(manifest["dataset"], str),
            isinstance(manifest["floor_db"], float | None),
            manifest["splits"].keys() == manifest["statistics"].keys(),
        )
    )


def verify(root, workers):
    """Checks every file of a store against its checksum. Raises DataError: the count and the first five that differ."""
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


def read_table(root, name, manifest, columns=None):
    """Reads a parquet file of a store. Raises DataError if it is absent or differs from its checksum."""
    path = Path(root) / name
    try:
        if sha256_of(path) == manifest["files"][name]:
            return pd.read_parquet(path, columns=columns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again, or pack the data again") from error
    except ValueError:
        pass  # not a table, although its checksum is right
    raise DataError(f"{path}: is damaged; copy it again, or pack the data again")


class Parts:
    """The part files of a store, memory-mapped when first read. An image is addressed by its row in images.parquet.

    shape: (2, S, S) of an image; dtype: of its codes.
    """

    def __init__(self, root, manifest):
        self.root, self.parts = Path(root), manifest["parts"]
        self.shape, self.dtype = tuple(manifest["shape"]), np.dtype(manifest["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0] + [part["images"] for part in self.parts])
        self._scale, self._offset = (
            np.array([part[name] for part in self.parts], np.float32)[:, :, None, None] for name in ("scale", "offset")
        )
        self._mapped = {}

    def __len__(self):
        return len(self.parts)

    def __getstate__(self):
        return {**self.__dict__, "_mapped": {}}  # a process maps the files itself

    def fault(self, number):
        """What is wrong with the size of a part file, or None."""
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

    def each(self, rows):
        """Yields the codes of one image after the other, (2, S, S) views of the files. Raises DataError."""
        parts = self._part_of(rows)
        for part, row in zip(parts.tolist(), (rows - self._starts[parts]).tolist()):
            yield self._map(part)[row]

    def _part_of(self, rows):
        return np.searchsorted(self._starts, rows, "right") - 1

    def _map(self, number):
        if number not in self._mapped:
            fault = self.fault(number)
            if fault:
                raise DataError(f"{self.root}: {fault}; copy the store again")
            part = self.parts[number]
            # A plain array, because indexing a memmap makes a new memmap, which is slow.
            self._mapped[number] = np.asarray(
                np.memmap(self.root / part["file"], self.dtype, "r", shape=(part["images"], *self.shape))
            )
        return self._mapped[number]


# ---- Codes ----------------------------------------------------------------------------------------


def encode(images, dtype):
    """Codes images in dB, (n, 2, S, S) float32. Returns (codes (n, 2, S, S) of `dtype`, scale (2,), offset (2,)).

    A value is code · scale + offset; values that are not finite become NaN, or NO_DATA.
    """
    finite = np.isfinite(images)
    if dtype != "uint16":
        return np.where(finite, images, np.nan).astype(dtype), [1.0, 1.0], [0.0, 0.0]
    codes, scale, offset = np.full(images.shape, NO_DATA, np.uint16), [], []
    for channel in range(2):
        good = finite[:, channel]
        values = images[:, channel][good].astype(np.float64)
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        low, step = np.float32(low), np.float32((high - low) / CODES) or np.float32(1)  # rounded as a reader has them
        codes[:, channel][good] = np.clip(np.rint((values - np.float64(low)) / np.float64(step)), 0, CODES).astype(
            np.uint16
        )
        scale.append(float(step))
        offset.append(float(low))
    return codes, scale, offset


def as_tensor(codes):
    """Codes as a tensor of the same bits. uint16 becomes int16, as PyTorch supports few operations on uint16."""
    return torch.from_numpy(codes.view(np.int16) if codes.dtype == np.uint16 else codes)


def decode(codes, scale, offset):
    """Decodes an `as_tensor` on its device: (n, 2, S, S) float32 in dB. scale, offset: (n, 2, 1, 1) float32."""
    if codes.dtype != torch.int16:
        return codes.float()
    values = (codes.int() & 0xFFFF).float()
    empty = values == NO_DATA
    # Separate operations, not a fused one, so that the bits equal those of ImageSource.batch on the CPU.
    return values.mul_(scale).add_(offset).masked_fill_(empty, torch.nan)
