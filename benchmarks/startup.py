# SPDX-License-Identifier: MIT
"""How long it takes until a run computes: import, index of the whole dataset, model, checkpoint, first batch.

    python -m benchmarks.startup --out output/benchmarks

Makes, in --out, metadata of as many patches as the datasets have (names and labels, no images), empty patch folders, some
simulated patches and a checkpoint; the folder is removed at the end. Imports are timed as whole processes, from start to
exit; everything else within this one. Files are warm: they come from the page cache, not from a disk, so that what reads or
looks for many of them takes longer where they are not. Three rows are for comparison: a table that is asked row by row, a walk
through the folders, and the look for every file that --check_files none leaves out. The latter two are also extrapolated, in
proportion, to the whole dataset. Writes startup.json and prints a table; asserts nothing.
"""

import logging
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import main_pretrain
from benchmarks.report import benchmark_parser, in_turns, report, shown, spread
from common.files import sha256_of, write_csv, write_json
from common.sealed_file import SealedFile
from sarwmix import packed
from sarwmix.bigearthnet import CHANNELS, CLASSES
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import IMAGES, OFFICIAL, BigEarthNetv2
from sarwmix.prepare import pack
from sarwmix.prepare.benv2_csv import COLUMNS
from sarwmix.simulate.patches import METADATA_SCHEMA, Parameters, simulate_dataset
from util.checkpoint import LATEST, load_checkpoint, restore, save_checkpoint
from util.datasets import ImagesWithIds, build_loader
from util.distributed import Launch, Ranks

ROWS_V2, ROWS_V1 = 549_488, 590_326  # patches of BigEarthNet v2 (metadata.parquet) and v1
SCENE_SIDE = 70  # patches; the dataset has about 5,000 of an acquisition
DIFFERENT_LABELS = 3_000  # lists of labels; the dataset has a few thousand
PART_IMAGES = 2_330  # of a packed store by default
PROCESSES = {
    "python alone": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import main_pretrain": ("-c", "import main_pretrain"),
    "import main_finetune": ("-c", "import main_finetune"),
    "main_pretrain.py --help": ("main_pretrain.py", "--help"),
}


# ---- What is read --------------------------------------------------------------------------------


def metadata_rows(count, seed):
    """Rows of the official columns of v2, with names and labels as long and as repetitive as the dataset's, but simulated."""
    rng = np.random.default_rng(seed)
    lists = [sorted(rng.choice(CLASSES, size, replace=False).tolist()) for size in rng.integers(1, 7, DIFFERENT_LABELS)]
    share = 1 / np.arange(1, DIFFERENT_LABELS + 1)
    labels = rng.choice(DIFFERENT_LABELS, count, p=share / share.sum()).tolist()
    splits = rng.choice(("train", "validation", "test"), count, p=(0.5, 0.25, 0.25)).tolist()
    rows = []
    for i in range(count):
        scene, patch = divmod(i, SCENE_SIDE**2)
        column, row = divmod(patch, SCENE_SIDE)
        date, tile = f"2000{1 + scene // 28 % 12:02d}{1 + scene % 28:02d}T165043", f"{29 + scene % 7}UUP"
        rows.append(
            (
                f"S2A_MSIL2A_{date}_N9999_R022_T{tile}_{column:02d}_{row:02d}",
                lists[labels[i]],
                splits[i],
                "Simulated",
                f"S1A_IW_GRDH_1SDV_{date}_{tile}_{column}_{row}",
                f"S2A_MSIL2A_{date}_{column}_{row}",
                False,
                False,
            )
        )
    return rows


def write_v2(folder, rows):
    """metadata.parquet and dump.csv of these rows, beside a folder without images. Returns `folder`."""
    (folder / IMAGES).mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(COLUMNS, map(list, zip(*rows)))), METADATA_SCHEMA), folder / OFFICIAL)
    write_csv(folder / "dump.csv", COLUMNS, rows)
    return folder


def write_v1(folder, rows):
    """The three split lists of these patches (S2 name, S1 name), beside no images. Returns `folder`."""
    folder.mkdir()
    for split, part in zip(("train", "val", "test"), (rows[::2], rows[1::4], rows[3::4])):
        write_csv(
            folder / f"benv1_{split}.csv",
            None,
            [(row[COLUMNS.index("s2v1_name")], row[COLUMNS.index("s1_name")]) for row in part],
        )
    return folder


def write_packed_index(folder, dataset):
    """The tables and the manifest of a packed store of all these samples, without its parts. Returns `folder`."""
    folder.mkdir()
    count = np.arange(len(dataset))
    splits = np.array(("train", "val", "test"))[count % 3]
    pack.write_table(folder / packed.IMAGES, {"name": dataset.ids, "nonfinite": np.zeros_like(count)})
    pack.write_table(
        folder / packed.SAMPLES,
        {
            "id": dataset.ids,
            "split": splits,
            "position": count,
            "image_0": count,
            **dict(zip(CLASSES, dataset.label_table().T)),
        },
    )
    for name in (packed.STATISTICS, packed.BAD):
        (folder / name).write_text("")
    side, parts = BigEarthNetv2.SIZE, []
    for start in range(0, len(count), PART_IMAGES):
        images = min(PART_IMAGES, len(count) - start)
        parts.append(
            {
                "file": f"part_{len(parts):05d}.bin",
                "images": images,
                "bytes": images * 2 * side**2 * 2,
                "scale": [1, 1],
                "offset": [0, 0],
                "sha256": "",
            }
        )
    manifest = {
        "format": packed.FORMAT,
        "version": packed.VERSION,
        "dataset": "benv2",
        "dtype": "uint16",
        "shape": [2, side, side],
        "classes": list(CLASSES),
        "floor_db": None,
        "images_per_sample": 1,
        "images": len(count),
        "parts": parts,
        "splits": {name: int((splits == name).sum()) for name in ("train", "val", "test")},
        "statistics": dict.fromkeys(("train", "val", "test"), {}),
        "files": {
            name: sha256_of(folder / name) for name in (packed.SAMPLES, packed.IMAGES, packed.STATISTICS, packed.BAD)
        },
    }
    write_json(folder / packed.MANIFEST, manifest | {"sha256": packed.manifest_checksum(manifest)})
    return folder


def write_folders(folder, rows):
    """A folder for each of these patches, with two files of a byte, and their metadata. Returns the dataset."""
    write_v2(folder, rows)
    dataset = BigEarthNetv2(folder, "all")
    for i in range(len(dataset)):
        vh, vv = map(Path, dataset.files(i))
        vh.parent.mkdir(parents=True)
        vh.write_bytes(b"-")
        vv.write_bytes(b"-")
    return dataset


# ---- What is timed -------------------------------------------------------------------------------


def run_process(*arguments):
    """A Python process in the repository, from its start to its exit."""
    subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.DEVNULL
    )


def table_row_by_row(folder):
    """How a table is read that is asked row by row: the paths of both channels of every patch."""
    paths = []
    for _, row in pd.read_csv(folder / "dump.csv").iterrows():
        name = row["s1_name"]
        patch = os.path.join(folder, IMAGES, "_".join(name.split("_")[:-3]), name)
        paths.append([os.path.join(patch, f"{name}_{channel}.tif") for channel in CHANNELS])
    return paths


def walk(folder):
    """What a program looks at that finds its patches by a walk."""
    return [path for path, _, files in os.walk(folder) if files]


def timed(args, variants):
    """(name, count, seconds of each round) of callables that take turns. variants: {name: (count, callable)}."""
    seconds = in_turns({name: variant for name, (_, variant) in variants.items()}, args.rounds, args.seed)
    return [(name, count, seconds[name]) for name, (count, _) in variants.items()]


def time_processes(args, _):
    return timed(args, {name: (None, partial(run_process, *arguments)) for name, arguments in PROCESSES.items()})


def time_first_batch(args, folder):
    """From a loader's construction to its first batch, its processes or threads included."""
    scenes, store = folder / "patches", folder / "store"
    simulate_dataset(scenes, Parameters(args.patches, seed=args.seed, val_fraction=0, test_fraction=0))
    pack.main(["--dataset", "benv2", "--data_path", str(scenes), "--splits", "train", "--out", str(store)])
    flags = main_pretrain.parse_flags(
        ["--data_path", str(scenes), "--split", "train", "--batch_size", str(args.batch_size)]
    )
    ranks, begun = Ranks(Launch(), torch.device("cpu")), []  # loaders end after all are timed

    def first_batch(dataset):
        begun.append(iter(build_loader(ImagesWithIds(dataset), flags, ranks)))
        next(begun[-1])

    return timed(
        args,
        {
            "first batch, GeoTIFF": (args.batch_size, partial(first_batch, BigEarthNetv2(scenes, "train"))),
            "first batch, packed store": (args.batch_size, partial(first_batch, packed.PackedDataset(store, "train"))),
        },
    )


def time_index(args, folder):
    """All samples of metadata that name every patch; then a table that is asked row by row."""
    rows = metadata_rows(max(args.rows, args.rows_v1), args.seed)
    v2, v1 = write_v2(folder / "v2", rows[: args.rows]), write_v1(folder / "v1", rows[: args.rows_v1])
    del rows  # the garbage collector would visit them in all that follows
    store = write_packed_index(folder / "packed", BigEarthNetv2(v2, "all"))
    found = timed(
        args,
        {
            "index of v2, metadata.parquet": (args.rows, lambda: BigEarthNetv2(v2, "all")),
            "index of v2, CSV dump": (args.rows, lambda: BigEarthNetv2(v2, "all", metadata=v2 / "dump.csv")),
            "index of v2, packed store": (args.rows, lambda: packed.PackedDataset(store, "all")),
            "index of v1, split lists": (args.rows_v1, lambda: BigEarthNetv1(v1, "all")),
        },
    )
    reference = "reference: pandas.read_csv, iterrows, os.path.join"
    return [
        *found,
        (reference, args.rows, in_turns({reference: lambda: table_row_by_row(v2)}, 1)[reference]),
    ]  # once: it takes long


def time_folders(args, folder):
    """A walk through patch folders, and the look for every file, with what both would take for the whole dataset."""
    dataset = write_folders(folder / "folders", metadata_rows(args.folders, args.seed))
    found = timed(
        args,
        {
            "reference: os.walk of all patch folders": (args.folders, lambda: walk(folder / "folders")),
            "check_files: each file of all patches": (args.folders, dataset.check_files),
        },
    )
    return found + [
        (f"{name}, extrapolated from {count:,}", args.rows, [value * args.rows / count for value in seconds])
        for name, count, seconds in found
    ]


def time_model(args, folder):
    """Flags, model, optimizer; then a checkpoint of them with its moments, read, held against its checksum, and put to use."""
    argv = ["--data_path", str(folder), "--model", args.model, "--output_dir", str(folder), "--lr", "1e-4"]
    flags, cpu = main_pretrain.parse_flags(argv), torch.device("cpu")
    found = timed(
        args,
        {
            "flags, with the model's shapes checked": (None, lambda: main_pretrain.parse_flags(argv)),
            f"{args.model} on the CPU, initialised": (None, lambda: main_pretrain.build_model(flags)),
            f"{args.model}, preparation and AdamW": (None, lambda: main_pretrain.build_training(flags, cpu)),
        },
    )
    training, path = main_pretrain.build_training(flags, cpu), folder / LATEST
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()  # which makes the moments
    training.optimizer.zero_grad()
    save_checkpoint(folder, training.state(0, flags, {}, 0))

    def resume():
        restore(load_checkpoint(path), path, training.model, training.optimizer, training.scaler)

    size = f"{path.stat().st_size / 1e9:.2f} GB"
    return found + timed(
        args,
        {
            f"checkpoint of {size}: its checksum alone": (None, lambda: SealedFile(path).is_intact()),
            f"checkpoint of {size}: read, with its checksum": (None, lambda: load_checkpoint(path)),
            f"checkpoint of {size}: read, put into model and AdamW": (None, resume),
        },
    )


# Those that start processes come first: to fork one is slow when this one has grown large.
PARTS = {
    "processes": time_processes,
    "first_batch": time_first_batch,
    "folders": time_folders,
    "index": time_index,
    "model": time_model,
}


# ---- Report --------------------------------------------------------------------------------------


def measure(args):
    """[one row of the table as a dict]: what, count (of samples, rows or folders, or None), seconds of each round, their spread."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        found = [row for name, part in PARTS.items() if name in args.parts for row in part(args, Path(folder))]
    return [{"what": what, "count": count, "seconds": seconds, **spread(seconds)} for what, count, seconds in found]


def get_args_parser():
    parser = benchmark_parser("startup", "Seconds until a run computes, step by step.")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument("--rows", type=int, default=ROWS_V2, help="patches in the metadata of v2")
    parser.add_argument("--rows_v1", type=int, default=ROWS_V1, help="patches in the lists of v1")
    parser.add_argument(
        "--folders", type=int, default=20_000, help="patch folders to walk, from which --rows are extrapolated"
    )
    parser.add_argument("--patches", type=int, default=256, help="simulated patches that first batches are drawn from")
    parser.add_argument("--batch_size", type=int, default=64, help="samples of a first batch")
    parser.add_argument("--model", default="mixmim_base", choices=tuple(main_pretrain.SIZES), help="size of the model")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, of which the median is shown")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    logging.disable(logging.WARNING)  # what the programs report of their progress
    try:
        rows = measure(args)
    finally:
        logging.disable(logging.NOTSET)
    for row in rows:
        row["shown"] = shown(row)
    report("startup", args, rows, {"what": "what", "count": "of", "shown": "seconds, median (quartiles, or extremes)"})


if __name__ == "__main__":
    main()
