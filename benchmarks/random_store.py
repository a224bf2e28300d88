# SPDX-License-Identifier: MIT
"""Writes packed stores of random images, for the report and for tests.

Pixels are independent draws from a normal distribution with the mean and standard deviation of the dataset. Labels are
random too. Reading, training and evaluation take as long as on the dataset itself, but nothing can be learned.
"""

from functools import partial
from pathlib import Path

import numpy as np

from common.workers import Workers
from sarwmix.prepare.distinct_images import DistinctImages
from sarwmix.prepare.pack import Source, make_tables, parts_of, write_part
from sarwmix.prepare.store_writer import finish, store_facts
from sarwmix.registry import DATASETS

PART_IMAGES = 512
DATES = 4  # images per place of SEN12-FLOOD; the first is paired with each of the others
LABEL_SHARE = 0.15  # probability that a sample of BigEarthNet has a class


class RandomImages:
    """Random images with the interface that `sarwmix.prepare.pack` needs of a dataset.

    image_names: (N, k). The name and the seed determine an image.
    """

    def __init__(self, kind, image_names, size, seed):
        self.kind, self.image_names, self.size, self.seed = kind, image_names, size, seed

    def portable(self, rows):
        return RandomImages(self.kind, self.image_names[rows], self.size, self.seed)

    def read_image(self, i, which):
        kind, name = DATASETS[self.kind], self.image_names[i, which]
        image = np.random.default_rng([self.seed, *name.encode()]).standard_normal(
            (2, self.size, self.size), dtype=np.float32
        )
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (kind.MEAN, kind.STD))
        return image * std + mean


def sample_names(kind, split, count):
    """(ids (count,), image names (count, k)) in the format of the dataset."""
    if DATASETS[kind].task != "flood":
        scene = "S1A_IW_GRDH_1SDV_20000101T"
        ids = np.array([f"{scene}{i // 1000:06d}_{split.upper()}_{i % 1000}_0" for i in range(count)])
        return ids, ids[:, None]
    places = [(f"{split}-{i // (DATES - 1):04d}", 1 + i % (DATES - 1)) for i in range(count)]
    return (
        np.array([f"{place}__d0__d{date}" for place, date in places]),
        np.array([[f"{place}/d0", f"{place}/d{date}"] for place, date in places]),
    )


def draw_labels(kind, count, rng):
    """Random labels (count, K) uint8. Every sample has a label, and floods have exactly one."""
    classes = len(DATASETS[kind].CLASSES)
    labels = rng.random((count, classes)) < (LABEL_SHARE if DATASETS[kind].task != "flood" else 0)
    labels[np.arange(count), np.arange(count) % classes] = True
    return labels.astype(np.uint8)


def write_random_store(out, kind, splits, size=120, seed=0, workers=Workers()):
    """Writes a packed store of dataset `kind` with {split: samples} into a new folder. Returns its path."""
    out, rng, sources = Path(out), np.random.default_rng(seed), []
    out.mkdir(parents=True)
    for split, count in splits.items():
        ids, names = sample_names(kind, split, count)
        images = DistinctImages(RandomImages(kind, names, size, seed))
        ranges = [images.part(start, start + PART_IMAGES) for start in range(0, len(images), PART_IMAGES)]
        sources.append(Source(split, ids, draw_labels(kind, count, rng), images.rows, images.names, ranges))
    known = store_facts(kind, DATASETS[kind], size)
    write = partial(
        write_part, out=out, dtype="uint16", shape=(2, size, size), floor_db=known["floor_db"], skip_bad=False
    )
    reports = workers.map(write, parts_of(sources), "parts")
    tables = make_tables(sources, np.arange(sum(splits.values())), reports, known["classes"])
    finish(out, tables, reports, known, "uint16", (DATASETS[kind].MEAN, DATASETS[kind].STD))
    for path in out.glob("part_*.json"):
        path.unlink()
    return out
