# SPDX-License-Identifier: MIT
"""Writes the files of a packed store (`sarwmix.packed_store`), for the programs that make one."""

import json
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from common.errors import DataError
from common.files import atomic_path, sha256_of, write_atomically, write_csv, write_json
from sarwmix.moments import Moments
from sarwmix.packed_store import (
    BAD,
    FORMAT,
    IMAGES,
    MANIFEST,
    NO_DATA,
    SAMPLES,
    STATISTICS,
    VERSION,
    as_tensor,
    decode,
    encode,
    manifest_checksum,
)
from sarwmix.plausibility import find_fault, judge
from sarwmix.prepare.completeness import log_completeness, published
from sarwmix.prepare.statistics import log_moments

log = logging.getLogger(__name__)

RECORD = "packing.json"


def store_facts(name, dataset, size):
    """The entries of a manifest that describe a dataset, given as an object or its class. size: side of the images."""
    task = {} if dataset.task in ("multilabel", "flood") else {"task": dataset.task}  # the others are known by shape
    return {
        "dataset": name,
        **task,
        "channels": list(dataset.CHANNELS),
        "units": dataset.UNITS,
        "shape": [len(dataset.CHANNELS), size, size],
        "classes": list(dataset.CLASSES),
        "floor_db": dataset.FLOOR_DB,
        "images_per_sample": dataset.images_per_sample,
    }


def images_per_part(part_mb, shape, dtype):
    """The number of images of a part of at most `part_mb` MiB; at least 1."""
    return max(1, int(part_mb * 2**20 / (np.prod(shape) * np.dtype(dtype).itemsize)))


@dataclass(frozen=True)
class PartFile:
    """The names of the file of a part and of its report, by its number."""

    number: int

    @property
    def file(self):
        return f"part_{self.number:05d}.bin"

    @property
    def report(self):
        return f"part_{self.number:05d}.json"


# ---- Parts ---------------------------------------------------------------------------------------


def write_images(path, split, images, dtype, floor_db, name, unread=()):
    """Codes the images of a part, (n, 2, S, S) float32 in dB, NaN for no data, and writes them. Returns its report.

    name: of the images in messages. unread: the numbers of images that are not counted. Raises DataError for images
    that cannot be backscatter.
    """
    total = Moments(floor_db)
    for m, image in enumerate(images):
        if m not in unread:
            total.add(image)
    fault = find_fault(total.summary())
    if fault:
        raise DataError(f"{name}: {fault}")
    codes, scale, offset = encode(images, dtype)
    write_atomically(path, codes.astype(codes.dtype.newbyteorder("<"), copy=False).tofile)
    return {
        "part": {
            "file": path.name,
            "split": split,
            "images": len(codes),
            "bytes": codes.nbytes,
            "sha256": sha256_of(path),
            "scale": scale,
            "offset": offset,
        },
        "largest_error_db": largest_error(images, codes, scale, offset),
        "nonfinite": (~np.isfinite(images)).sum((1, 2, 3)).tolist(),
        "tally": total.to_dict(),
    }


def read_report(path, file):
    """The report of a finished part, whose "part" may be None if it has no image; or None."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if report["part"] is None or file.stat().st_size == report["part"]["bytes"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def largest_error(images, codes, scale, offset):
    """The largest |decoded − original| of a part, in dB."""
    scale, offset = (torch.tensor(values, dtype=torch.float32).view(1, 2, 1, 1) for values in (scale, offset))
    worst = 0.0
    for start in range(0, len(images), 256):  # limits the memory
        decoded = decode(as_tensor(codes[start : start + 256]), scale, offset).numpy()
        error = np.abs(decoded - images[start : start + 256])
        worst = max(worst, float(np.max(error, where=np.isfinite(error), initial=0)))
    return worst


# ---- Tables and manifest -------------------------------------------------------------------------


def write_statistics(out, reports, floor_db):
    """Writes statistics.json: {split: statistics and histogram}. Returns {split: Moments}."""
    totals = {}
    for report in reports:
        totals.setdefault(report["part"]["split"], Moments(floor_db)).merge(Moments.from_dict(report["tally"]))
    write_json(
        out / STATISTICS,
        {split: {**total.summary(), "histogram": total.histogram_dict()} for split, total in totals.items()},
    )
    return totals


def finish(out, tables, reports, known, dtype, expected=None):
    """Writes all files except the parts; the manifest last.

    tables: {SAMPLES, IMAGES: DataFrame}. reports: of the parts, with "bad", [(image, reason)]. known: `store_facts`.
    expected: (mean, std) of the dataset, for warnings.
    """
    write_csv(out / BAD, ("image", "reason"), [row for report in reports for row in report["bad"]])
    for name, table in tables.items():
        with atomic_path(out / name) as temporary:
            table.to_parquet(temporary, index=False)
    counts = tables[SAMPLES]["split"].value_counts()
    totals = write_statistics(out, reports, known["floor_db"])
    splits = {split: int(counts.get(split, 0)) for split in totals}
    dataset = published(known["dataset"], tables[SAMPLES]["id"])
    for split, total in totals.items():
        log_completeness(log, f"split {split}", dataset, split, splits[split], added=True)
        log_moments(total, known["channels"])
        judge(f"{out}: split '{split}'", total.summary(), expected, total.histogram_dict())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **known,
        "dtype": dtype,
        "no_data": NO_DATA if dtype == "uint16" else "NaN",
        "largest_error_db": max(report["largest_error_db"] for report in reports),
        "splits": splits,
        "samples": sum(splits.values()),
        "images": sum(report["part"]["images"] for report in reports),
        "nonfinite": int(sum(sum(report["nonfinite"]) for report in reports)),
        "statistics": {split: total.summary() for split, total in totals.items()},
        "files": {name: sha256_of(out / name) for name in (SAMPLES, IMAGES, STATISTICS, BAD)},
        "parts": [report["part"] for report in reports],
    }
    write_json(out / MANIFEST, {**manifest, "sha256": manifest_checksum(manifest)})
    log.info(
        "%s: %d images in %d parts, %.2f GB, %s; rounding changes a value by at most %.4f dB",
        out,
        manifest["images"],
        len(reports),
        sum(part["bytes"] for part in manifest["parts"]) / 1e9,
        dtype,
        manifest["largest_error_db"],
    )


def sample_table(samples, images, labels, grid=None):
    """The table SAMPLES: columns of `samples` (id, split, position, …), image rows, labels, georeference.

    images: (N, k) rows of IMAGES. labels: {class: column}. grid: DataFrame of `sarwmix.raster.GRID`, or None.
    """
    columns = samples | {f"image_{k}": column for k, column in enumerate(images.T)} | labels
    table = pd.DataFrame(columns)
    return table if grid is None else pd.concat([table, grid.reset_index(drop=True)], axis=1)
