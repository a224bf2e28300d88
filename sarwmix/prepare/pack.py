# SPDX-License-Identifier: MIT
"""Packs a dataset of any layout into a packed store (format: `sarwmix.packed_store`), or verifies a store.

    python -m sarwmix.prepare.pack --dataset benv2 --data_path DIR --out STORE --workers 16
    mpirun -np 4 python -m sarwmix.prepare.pack --dataset benv2 --data_path DIR --out STORE
    python -m sarwmix.prepare.pack --verify STORE

Parts are independent, and each is written atomically: after an interruption, the same command writes the missing parts.
The result is byte for byte the same for any number of interruptions, ranks and processes.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.command_line import Parser, positive_int
from common.errors import DataError, data_error
from common.files import check_room, claimed, write_csv, write_json
from common.workers import add_workers_flag, run_command
from sarwmix.chips import class_names
from sarwmix.listing import EVERY, PARTS
from sarwmix.packed_store import (
    BAD,
    DTYPES,
    IMAGES,
    MANIFEST,
    SAMPLES,
    STORED_SPLITS,
    VERSION,
    is_packed,
    label_columns,
    verify,
)
from sarwmix.prepare.distinct_images import DistinctImages, ImageRange
from sarwmix.prepare.store_writer import (
    RECORD,
    PartFile,
    finish,
    images_per_part,
    read_report,
    sample_table,
    store_facts,
    write_images,
)
from sarwmix.registry import DATASETS, add_chips_flags, add_source_flags, open_dataset, source_options

log = logging.getLogger(__name__)

# ---- Plan ----------------------------------------------------------------------------------------


@dataclass
class Source:
    """The N samples of one split, with K labels and k images each, and their M distinct images."""

    split: str
    ids: np.ndarray  # (N,)
    labels: np.ndarray  # (N, K) uint8
    rows: np.ndarray  # (N, k), indices of `names`
    names: np.ndarray  # (M,)
    ranges: list  # of ImageRange, one for each part
    groups: np.ndarray | None = None  # (N,), where ids do not tell them
    grid: pd.DataFrame | None = None  # of `sarwmix.raster.GRID`

    def checksum(self):
        """SHA-256 of the samples and their labels."""
        return hashlib.sha256("\n".join(self.ids.tolist()).encode() + self.labels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Part(PartFile):
    """One part file and its images."""

    split: str
    images: ImageRange


def open_sources(args, splits):
    """Opens all splits. Returns (Sources, `store_facts`, `joint_order` of the samples). Raises DataError."""
    sources, known = [], {}
    datasets = [open_split(args, split) for split in splits]
    if len({dataset.task for dataset in datasets}) > 1:
        raise DataError(
            "--metadata: the tables of the splits have different columns of labels; give tables of the same columns"
        )
    if args.dataset == "chips" and len({dataset.CLASSES for dataset in datasets}) > 1:  # of several tables
        classes = class_names([dataset.CLASSES for dataset in datasets])
        datasets = [open_split(args, split, classes) for split in splits]
    for split, dataset in zip(splits, datasets):
        images = DistinctImages(dataset)
        known = store_facts(args.dataset, dataset, dataset.size)
        per_part = images_per_part(args.part_mb, known["shape"], args.dtype)
        ranges = [images.part(start, start + per_part) for start in range(0, len(images), per_part)]
        own = (dataset.groups, dataset.georeference()) if args.dataset == "chips" else ()
        sources.append(Source(split, dataset.ids, dataset.label_table(), images.rows, images.names, ranges, *own))
    names = np.concatenate([source.ids for source in sources])
    unique, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        raise data_error(
            f"{args.data_path}: {np.count_nonzero(counts > 1)} samples are in several splits",
            unique[counts > 1].tolist(),
            "give other lists with --metadata, --val_metadata and --test_metadata, or other --splits",
        )
    return sources, known, joint_order(args, names)


def open_split(args, split, classes=None):
    """The dataset of a split, with its own metadata. classes: of chips, instead of those of its table."""
    metadata = {"val": args.val_metadata, "test": args.test_metadata}.get(split) or args.metadata
    options = source_options(args) | {"classes": classes}
    return open_dataset(args.dataset, args.data_path, "all" if split == EVERY else split, metadata, **options)


def parts_of(sources):
    """The Parts of all Sources, numbered from 0."""
    ranges = [(source.split, images) for source in sources for images in source.ranges]
    return [Part(number, split, images) for number, (split, images) in enumerate(ranges)]


def joint_order(args, ids):
    """(N,) position of each sample if several splits are read as one: its position in the unpacked dataset.

    Only the metadata of BigEarthNet v2 can interleave splits; others are concatenated in the order of packing.
    """
    if args.dataset == "benv2" and not (args.val_metadata or args.test_metadata):
        for split in ("all", "train_val"):
            try:
                whole = open_dataset(args.dataset, args.data_path, split, args.metadata, **source_options(args))
            except DataError:
                continue  # the list of the test split may be missing
            place = {name: i for i, name in enumerate(whole.ids.tolist())}
            if all(name in place for name in ids.tolist()):
                return np.array([place[name] for name in ids.tolist()], np.int64)
    return np.arange(len(ids))


# ---- Parts ---------------------------------------------------------------------------------------


def write_part(part, out, dtype, shape, floor_db, skip_bad):
    """Reads, codes and writes the images of a part. Returns its report.

    The report is also written beside the part and marks the part as finished, unless there are bad images and not
    skip_bad. A bad image keeps its place and is filled with NaN.
    """
    done = read_report(out / part.report, out / part.file)
    if done is not None:
        return done
    bad, unread, images = [], [], np.full((len(part.images), *shape), np.nan, np.float32)
    for m in range(len(part.images)):
        try:
            image = part.images.read(m)
            if image.shape != shape:
                raise DataError(
                    f"{part.images.name(m)}: has the shape {image.shape}, not {shape} as the first image; take it "
                    "out of the lists"
                )
        except DataError as error:
            bad.append((part.images.name(m), str(error)))
            unread.append(m)
            continue
        images[m] = image
    name = f"{part.images.name(0)} and {len(part.images) - 1} more"
    report = write_images(out / part.file, part.split, images, dtype, floor_db, name, unread) | {"bad": bad}
    if skip_bad or not bad:
        write_json(out / part.report, report)
    return report


# ---- Tables --------------------------------------------------------------------------------------


def make_tables(sources, positions, reports, columns):
    """{IMAGES, SAMPLES: DataFrame}, of the samples without bad images. columns: `label_columns`."""
    bad = {name for report in reports for name, _ in report["bad"]}
    before = np.cumsum([0] + [len(source.names) for source in sources])
    ids, labels = (np.concatenate(parts) for parts in zip(*((source.ids, source.labels) for source in sources)))
    rows = np.concatenate([source.rows + first for source, first in zip(sources, before)])
    splits = np.repeat([source.split for source in sources], [len(source.ids) for source in sources])
    good = np.concatenate([[name not in bad for name in source.names.tolist()] for source in sources])[rows].all(1)
    samples = {"id": ids[good], "split": splits[good], "position": positions[good]}
    grid = None
    if all(source.groups is not None for source in sources):
        samples["group"] = np.concatenate([source.groups for source in sources])[good]
    if all(source.grid is not None for source in sources):
        grid = pd.concat([source.grid for source in sources])[good]
    images = {
        "name": np.concatenate([source.names for source in sources]),
        "nonfinite": np.concatenate([report["nonfinite"] for report in reports]).astype(np.int64),
    }
    table = sample_table(samples, rows[good], dict(zip(columns, labels[good].T)), grid)
    return {IMAGES: pd.DataFrame(images), SAMPLES: table}


def pack(args, splits, workers):
    """Packs a dataset. Raises DataError."""
    out = Path(args.out)
    sources, known, positions = workers.on_main(open_sources, args, splits)
    parts = parts_of(sources)
    record = {
        "generator": "sarwmix.prepare.pack",
        "version": VERSION,
        **known,
        "dtype": args.dtype,
        "part_mb": args.part_mb,
        "max_nonfinite": args.max_nonfinite,
        "samples": [[source.split, source.checksum()] for source in sources],
        "order": hashlib.sha256(positions.tobytes()).hexdigest(),
    }
    with claimed(workers, out, record, last=MANIFEST, name=RECORD) as complete:
        if not complete:
            size = int(np.prod(known["shape"])) * np.dtype(args.dtype).itemsize
            missing = sum(len(part.images) for part in parts if not (out / part.file).exists())
            workers.on_main(check_room, [("--out", out, missing * size)])
            reports = workers.map(
                partial(
                    write_part,
                    out=out,
                    dtype=args.dtype,
                    shape=tuple(known["shape"]),
                    floor_db=known["floor_db"],
                    skip_bad=args.skip_bad,
                ),
                parts,
                "parts",
            )
            workers.on_main(refuse_bad, reports, args.skip_bad, out)
            columns = label_columns(args.dataset, known["classes"])
            tables = make_tables(sources, positions, reports, columns)
            kind = DATASETS[args.dataset]
            expected = None if kind.MEAN is None else (kind.MEAN, kind.STD)
            workers.on_main(finish, out, tables, reports, known, args.dtype, expected)
        workers.on_main(lambda: [path.unlink() for path in out.glob("part_*.json")])


def refuse_bad(reports, skip_bad, out):
    """Raises DataError for bad images, which are then listed in bad.csv; with skip_bad, only if all images are bad."""
    bad, count = (
        [row for report in reports for row in report["bad"]],
        sum(len(report["nonfinite"]) for report in reports),
    )
    if bad and not (skip_bad and len(bad) < count):
        write_csv(out / BAD, ("image", "reason"), bad)
        raise data_error(
            f"{len(bad)} of {count} images cannot be used, all of them listed in {out / BAD}",
            [reason for _, reason in bad],
            "restore them and run again, which writes only their parts, or leave them out with --skip_bad",
        )
    if bad:
        log.warning(
            "%d of %d images cannot be used; they and their samples are left out: %s", len(bad), count, out / BAD
        )


# ---- Program -------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        "Pack a dataset of any layout into a store for fast training, or verify a store.",
        "sarwmix.prepare.pack",
        usage="[flags] --dataset NAME --data_path DIR --out STORE",
    )
    parser.add_argument(
        "--verify", metavar="STORE", help="check every file of this store against its checksum, and pack nothing"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(DATASETS), help="name of the dataset")
    add_source_flags(group)
    group.add_argument("--val_metadata", nargs="+", metavar="FILE", help="as --metadata, for the split val")
    group.add_argument("--test_metadata", nargs="+", metavar="FILE", help="as --metadata, for the split test")
    group.add_argument(
        "--splits",
        nargs="+",
        choices=STORED_SPLITS,
        metavar="SPLIT",
        help="splits to pack: train, val, test; or every, for a folder of benv1 without lists (default: train val "
        "test; sen12flood: train test; chips: those of their table, else every)",
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out images that cannot be used, instead of ending with an error"
    )
    add_chips_flags(parser, draws=False)
    group = parser.add_argument_group("store")
    group.add_argument("--out", metavar="STORE", help="folder to write, new or empty")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="uint16",
        help="uint16: affine for each part and channel, error about 0.001 dB; float16: error up to 0.016 dB; "
        "float32: exact, twice the size",
    )
    group.add_argument(
        "--part_mb",
        type=positive_int,
        default=128,
        metavar="MIB",
        help="largest size of a part, MiB; a process needs 3 to 5 times as much memory",
    )
    add_workers_flag(group)
    return parser


def check_flags(args):
    """The splits to pack. Raises DataError for flags that are missing or contradict each other."""
    for name in ("dataset", "data_path", "out"):
        if getattr(args, name) is None:
            raise DataError(f"--{name} is missing")
    if DATASETS[args.dataset].task == "segmentation":
        raise DataError(
            f"--dataset {args.dataset}: a packed store holds no masks; train from the files, or for pretraining pack "
            "the folder of the images with --dataset chips"
        )
    if is_packed(args.data_path):
        raise DataError(f"--data_path {args.data_path}: is a packed store already")
    splits = list(dict.fromkeys(args.splits or default_splits(args)))
    if EVERY in splits and (args.dataset not in ("benv1", "chips") or len(splits) > 1):
        raise DataError("--splits every: only for --dataset benv1 and chips, and alone")
    return splits


def default_splits(args):
    """The splits that a dataset has. Raises DataError for chips that cannot be listed."""
    if args.dataset != "chips":
        return ("train", "test") if args.dataset == "sen12flood" else ("train", "val", "test")
    dataset = open_dataset("chips", args.data_path, "all", args.metadata, **source_options(args))
    named = [name for name in ("val", "test") if getattr(args, f"{name}_metadata")]
    stored = dataset.stored_splits or (["train"] if named else [])
    return [name for name in PARTS["all"] if name in (*stored, *named)] or (EVERY,)


def work(args, workers):
    if args.verify:
        log.info("%s: all %d files match their checksums", args.verify, verify(args.verify, workers))
        return
    pack(args, workers.on_main(check_flags, args), workers)


def main(argv=None):
    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
