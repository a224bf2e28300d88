# SPDX-License-Identifier: MIT
"""Datasets from a packed store (`sarwmix.packed_store`), and whole batches of their images."""

import logging
from dataclasses import replace

import numpy as np
import torch

from common.errors import DataError, data_error
from common.files import file_fault, read_json
from sarwmix.dataset import RadarDataset
from sarwmix.listing import EVERY, PARTS, Listing, acquisitions_of, check_root, check_split, drawn_by_group
from sarwmix.packed_store import (
    IMAGES,
    NO_DATA,
    SAMPLES,
    STATISTICS,
    Parts,
    as_tensor,
    decode,
    label_columns,
    read_manifest,
    read_table,
)
from sarwmix.plausibility import judge
from sarwmix.raster import GRID
from sarwmix.sen12flood_loader import drawn_for, folders_of

STAGED = 1024  # images that are copied to a GPU at a time
BLOCK = 16  # images that are decoded at a time on a CPU, so few that they stay in its cache

log = logging.getLogger(__name__)


class ImageSource:
    """Batches of images of a store, by row: from its files, or from a copy of some images in memory or on a GPU.

    parts: the files. nonfinite (M,): the number of pixels without a value of every image. rows (n,), sorted, and codes
    (n, 2, S, S), an array or a tensor on any device: the copy; None to read from the files.
    """

    def __init__(self, parts, nonfinite, rows=None, codes=None):
        self.parts, self.nonfinite = parts, nonfinite
        self._rows, self._codes = rows, codes

    @property
    def on_device(self):
        """Whether the copy is a tensor, on the device of which batches are made."""
        return isinstance(self._codes, torch.Tensor)

    def in_memory(self, rows, memory=None, share=(0, 1)):
        """A source with a copy of these images, sorted, in memory.

        memory: a buffer for the copy; None allocates one. share (k, n): if n processes share the buffer, process k
        fills its part of it, and the copy is complete when all of them have.
        """
        shape, (own, of) = (len(rows), *self.parts.shape), share
        if memory is None:
            codes = np.empty(shape, self.parts.dtype)
        else:
            codes = np.frombuffer(memory, self.parts.dtype).reshape(shape)
        part = slice(len(rows) * own // of, len(rows) * (own + 1) // of)
        self._gather(rows[part], codes[part])
        return ImageSource(self.parts, self.nonfinite, rows, codes)

    def in_device_memory(self, rows, device):
        """A source with a copy of these images, sorted, in the memory of a device."""
        copy = torch.empty((len(rows), *self.parts.shape), dtype=self._tensor_dtype, device=device)
        for start in range(0, len(rows), STAGED):
            copy[start : start + STAGED] = self.codes(rows[start : start + STAGED]).to(device)
        return ImageSource(self.parts, self.nonfinite, rows, copy)

    def codes(self, rows, pin_memory=False):
        """The codes of images, an `as_tensor` (n, 2, S, S) on the CPU or the device of the copy. For `batch`."""
        if self.on_device:
            slots = torch.from_numpy(np.searchsorted(self._rows, rows)).to(self._codes.device, non_blocking=True)
            return self._codes.index_select(0, slots)
        codes = torch.empty((len(rows), *self.parts.shape), dtype=self._tensor_dtype, pin_memory=pin_memory)
        self._gather(rows, codes.numpy().view(self.parts.dtype))
        return codes

    def batch(self, rows, device=None, codes=None):
        """Images in dB, (n, 2, S, S) float32, in the order of `rows` (n,), NaN for no data.

        device: where to; by default the CPU, or the device of the copy. codes: those of `codes(rows)`, if they are
        read. The bits do not depend on the device.
        """
        if codes is None:
            if self.parts.dtype == np.uint16 and not self.on_device and device in (None, torch.device("cpu")):
                return self._decoded_on_cpu(rows)
            codes = self.codes(rows)
        codes = codes if device is None else codes.to(device, non_blocking=True)
        scale, offset = (torch.from_numpy(x).to(codes.device, non_blocking=True) for x in self.parts.coding(rows))
        return decode(codes, scale, offset)

    def _decoded_on_cpu(self, rows):
        """As `decode`, but faster: in place, block by block, and NO_DATA only for images that have some."""
        images, (scale, offset) = np.empty((len(rows), *self.parts.shape), np.float32), self.parts.coding(rows)
        for start in range(0, len(rows), BLOCK):
            block = slice(start, start + BLOCK)
            codes = self._gather(rows[block], np.empty(images[block].shape, self.parts.dtype))
            images[block] = codes
            images[block] *= scale[block]
            images[block] += offset[block]
            if self.nonfinite[rows[block]].any():
                images[block][codes == NO_DATA] = np.nan
        return torch.from_numpy(images)

    def _gather(self, rows, out):
        """Copies the codes of images into the array `out` (n, 2, S, S), and returns it."""
        if self._codes is None:
            images = self.parts.each(rows)
        else:
            images = map(self._codes.__getitem__, np.searchsorted(self._rows, rows).tolist())
        for target, codes in zip(out, images):
            target[...] = codes
        return out

    @property
    def _tensor_dtype(self):
        return as_tensor(np.empty(0, self.parts.dtype)).dtype


class PackedDataset(RadarDataset):
    """A split of a packed store.

    Ids, labels and order are those of the dataset that was packed; so are images, within the rounding of the dtype.

    dataset: the name that the store must have been packed of, or None for any. supervised: leaves out samples without a
    label. draw: (val_fraction, test_fraction, seed), as in Chips and FloodDataset. classes: of chips, as in Chips.
    `images` gives whole batches.
    Raises DataError for a store that is unfinished, damaged or of another dataset, or has no sample of the split.
    """

    is_packed = True

    def __init__(
        self, root, split="train", dataset=None, supervised=False, draw=(0.0, 0.0, 0), classes=None
    ):  # fmt: skip
        root, split = check_root(root), check_split(split)
        self.manifest = read_manifest(root)
        if dataset not in (None, self.manifest["dataset"]):
            raise DataError(
                f"{root}: is a packed store of {self.manifest['dataset']}; use --dataset {self.manifest['dataset']}, "
                f"or give the folder of {dataset}"
            )
        self.CLASSES, self.FLOOR_DB = tuple(self.manifest["classes"]), self.manifest["floor_db"]
        self.images_per_sample, self.size = self.manifest["images_per_sample"], self.manifest["shape"][-1]
        self.task = self.manifest.get("task", "flood" if self.images_per_sample == 2 else "multilabel")
        self._groups = self._grid = None
        nonfinite = read_table(root, IMAGES, self.manifest, ["nonfinite"])["nonfinite"].to_numpy()
        self.source = ImageSource(Parts(root, self.manifest), nonfinite)
        chips = self.manifest["dataset"] == "chips"
        undivided = chips and set(self.manifest["splits"]) == {EVERY}
        draws_val = bool(draw[0]) and self.task == "flood"
        stored = (EVERY,) if undivided else _stored("train" if draws_val and split == "val" else split)
        listing, self._rows = self._read_samples(root, split, stored)
        super().__init__(root, split, [root / SAMPLES], listing)
        if chips:
            self._set_statistics()
        if undivided:
            self._select(drawn_by_group(split, self.groups, *draw, str(root)))
        elif chips and (draw[0] or draw[1]):
            log.warning("--val_fraction and --test_fraction are not used: %s has splits", root)
        if classes is not None and tuple(classes) != self.CLASSES:
            self._use_classes(tuple(classes), supervised)
        if supervised and not self.label_table().any(1).all():
            keep = self.label_table().any(1)
            if not keep.any():
                raise DataError(
                    f"{root}: none of the {len(keep)} samples of split '{split}' has a label; give data with labels; "
                    "only pretraining and --embed do not need them"
                )
            log.info("dropped %d of %d samples, which have no label", np.count_nonzero(~keep), len(keep))
            self._select(keep)
        if self.task == "flood":
            self._select(drawn_for(split, self.groups, draw[0], draw[2], str(root)))

    def _read_samples(self, root, split, stored):
        """(Listing, rows (N, images_per_sample) of the images of each sample) of the stored splits of `split`.

        Raises DataError.
        """
        table = read_table(root, SAMPLES, self.manifest)
        images = [f"image_{k}" for k in range(self.images_per_sample)]
        classes = label_columns(self.manifest["dataset"], self.CLASSES)
        lacking = [name for name in ("id", "split", "position", *images, *classes) if name not in table]
        if lacking:
            raise DataError(f"{root / SAMPLES}: has no column {lacking[0]}; copy it again, or pack the data again")
        rows, count = table[images].to_numpy(np.int64), self.manifest["images"]
        if len(self.source.nonfinite) != count or (rows < 0).any() or (rows >= count).any():
            raise DataError(f"{root / SAMPLES}: does not name the images that the parts hold; copy the store again")
        table = table[table["split"].isin(stored)]
        if len(table) == 0:
            raise DataError(
                f"{root}: has no sample of split '{split}' (it has "
                f"{', '.join(f'{name} {count}' for name, count in self.manifest['splits'].items())}); choose another "
                "split" + (", or give --val_fraction" if self.task == "flood" and split == "val" else "")
            )
        if len(_stored(split)) > 1:
            table = table.sort_values("position", kind="stable")
        labels = table[classes].to_numpy(np.uint8, copy=True)  # writable, as PyTorch wants it
        listing = Listing(table["id"].to_numpy(dtype=str), labels, (f"{SAMPLES}: row ",), line=table.index.to_numpy())
        if "group" in table:
            self._groups = table["group"].to_numpy(dtype=str)
        if set(GRID) <= set(table.columns):
            self._grid = table[list(GRID)]
        return listing, table[images].to_numpy(np.int64)

    def _set_statistics(self):
        """Sets MEAN and STD to those of the images that training sees."""
        known = self.manifest["statistics"]
        figures = known.get("train") or known.get(EVERY) or next(iter(known.values()))
        if None not in figures["mean"]:
            self.MEAN, self.STD = ([round(value, 4) for value in figures[name]] for name in ("mean", "std"))

    def _use_classes(self, classes, supervised):
        """Arranges the labels by other classes. Raises DataError if samples have labels that are not among them."""
        labels = self.listing.labels
        other = [name for k, name in enumerate(self.CLASSES) if name not in classes and labels[:, k].any()]
        if other and supervised:
            raise DataError(
                f"{self.root}: has the classes {', '.join(other[:5])}, but the model was trained on "
                f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}; choose the data it was trained on"
            )
        column, empty = {name: labels[:, k] for k, name in enumerate(self.CLASSES)}, np.zeros(len(labels), np.uint8)
        arranged = np.stack([column.get(name, empty) for name in classes], 1)
        self.listing, self.CLASSES = replace(self.listing, labels=arranged), classes

    def _select(self, rows):
        super()._select(rows)
        self._rows = self._rows[rows]
        self._groups = None if self._groups is None else self._groups[rows]
        self._grid = None if self._grid is None else self._grid.iloc[rows]

    def georeference(self):
        known = self._grid is not None and (self._grid.crs != "").any()
        return self._grid.reset_index(drop=True) if known else None

    def read_image(self, i, which=0):
        return self.source.batch(self._rows[[i], which])[0].cpu().numpy()

    @property
    def groups(self):
        """(N,) str: the acquisition of each patch, or the folder of each pair."""
        if self._groups is not None:
            return self._groups
        return folders_of(self.ids) if self.task == "flood" else acquisitions_of(self.ids)

    @property
    def image_names(self):
        return read_table(self.root, IMAGES, self.manifest, ["name"])["name"].to_numpy(dtype=str)[self._rows]

    def files(self, i):
        raise NotImplementedError("the images of a packed store have no files of their own")

    def describe(self):
        return super().describe() | {
            "name": f"{type(self).__name__} of {self.manifest['dataset']}",
            "dtype": self.manifest["dtype"],
            "manifest": self.manifest["sha256"],
        }

    def missing(self, start=0, step=1):
        return []

    def check_files(self, start=0, step=1):
        """Raises DataError if a part, of every step-th from `start`, is missing or of another size: count, first five.

        `packed_store.verify` also checks the content.
        """
        parts = self.source.parts
        faults = [fault for fault in map(parts.fault, range(len(parts))[start::step]) if fault]
        if faults:
            raise data_error(
                f"{self.root}: {len(faults)} of {len(parts)} parts cannot be used", faults, "copy the store again"
            )

    def check_units(self, expected=None, samples=None):
        """{split: its figures in the store's own statistics} for the stored splits of this one; see `RadarDataset`."""
        known = self.manifest["statistics"]
        figures = {name: known[name] for name in _stored(self.split) if name in known}
        whole = file_fault(self.root, (STATISTICS, self.manifest["files"][STATISTICS])) is None
        # Training does not need the histograms, so that a damaged file is no error.
        histograms = read_json(self.root / STATISTICS, "copy the store again") if whole else {}
        for name in figures:
            judge(f"{self.root}: split '{name}'", figures[name], expected, histograms.get(name, {}).get("histogram"))
        return figures

    # ---- Whole batches ---------------------------------------------------------------------------

    def images(self, ids, device=None, codes=None):
        """Images of a batch as in the items: a tuple of one or two tensors (B, 2, S, S) float32.

        ids: (B,) indices of samples. device, codes: as in `ImageSource.batch`; codes from the method of this class.
        """
        rows = self._rows[ids].T
        return tuple(
            self._filled(self.source.batch(row, device, code), row)
            for row, code in zip(rows, codes or [None] * len(rows))
        )

    def codes(self, ids, pin_memory=False):
        """The codes of the same images, for `images` on another device: codes in pinned memory are copied faster."""
        return tuple(self.source.codes(rows, pin_memory) for rows in self._rows[ids].T)

    def _filled(self, images, rows):
        """Replaces NaN by FLOOR_DB and counts it, as `RadarDataset.image` does."""
        lost = 0 if self.FLOOR_DB is None else self.source.nonfinite[rows].sum()
        if lost:
            images.masked_fill_(images.isnan(), self.FLOOR_DB)
            self.count_nonfinite(lost)
        return images

    def cache(self, device=None, memory=None, share=(0, 1)):
        """Copies the images of this split into the memory of `device`, or into memory; batches then come from there.

        memory, share: as in `ImageSource.in_memory`.
        """
        rows = np.unique(self._rows)
        if device is None:
            self.source = self.source.in_memory(rows, memory, share)
        else:
            self.source = self.source.in_device_memory(rows, device)

    def cache_bytes(self):
        """Bytes that `cache` needs."""
        parts = self.source.parts
        return len(np.unique(self._rows)) * int(np.prod(parts.shape)) * parts.dtype.itemsize


def _stored(split):
    """The splits of a store that make up a split."""
    return (*PARTS[split], EVERY) if split in ("train_val", "all") else PARTS[split]
