# SPDX-License-Identifier: MIT
"""SEN12-FLOOD: drops the pairs whose images lack data, and writes the others as --dataset sen12flood reads them.

    python -m sarwmix.sen12_prune_partial_pairs --aligned DIR --pairs PAIRS --out OUT --workers 8
    python -m sarwmix.sen12_prune_partial_pairs --out OUT --verify

A pair is kept if both images were aligned, are size × size pixels, and have in both channels a share of pixels without
data below --max_zeros. What is written is float32, VH before VV, linear σ⁰, 0 = no data:
  --layout images   OUT/images/<folder>/<image>.npy, (2, S, S), each image that a kept pair uses, once, and
                    OUT/pairs_{train,test}.csv (folder,first,second,label);
  --layout npy      OUT/{train,test}/<folder>__<first>__<second>__<label>.npy, (2, 2, S, S): image, channel, row,
  column.
OUT/dropped.csv says of every image and pair that is not there why; OUT/checksums.csv has the SHA-256 of each file; and
OUT/preparation.json, written last, the parameters and counts.
"""

import argparse
import logging
from collections import Counter
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tabulate import tabulate

from common.command_line import Parser, positive_int, positive_share
from common.errors import DataError, data_error
from common.files import check_room, claimed, file_fault, read_json, save_array, sha256_of, write_json
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.listing import CHANNELS, PATCH
from sarwmix.prepare.sen12_index import (
    ALIGN,
    ALIGNED,
    CANDIDATES,
    CHECKSUMS,
    DROPPED,
    IMAGES,
    KEPT,
    LAYOUTS,
    PREPARE,
    PRUNE,
    SIDE,
    SPLITS,
    STEP,
    read_step,
)
from sarwmix.sen12_data_prep import read_aligned

log = logging.getLogger(__name__)

LAST = "preparation.json"
CLASSES = ("no flood", "flood")
LISTS = ("s1_list", "train_list", "test_list")


# ---- Curation ------------------------------------------------------------------------------------


def judge(row, size, max_zeros):
    """(reason, detail) why an image, a row of images.csv, cannot be in a pair; None if it can."""
    if (int(row["height"]), int(row["width"])) != (size, size):
        return "wrong size", f"{row['image']} is {row['width']}x{row['height']} pixels, not {size}x{size}"
    empty = [(channel, float(row[f"zeros_{channel.lower()}"])) for channel in CHANNELS]
    found = [
        f"{channel} of {row['image']} {share:.1%} zeros".replace("%", " %")
        for channel, share in empty
        if share >= max_zeros
    ]
    return ("too many zeros", " and ".join(found)) if found else None


def curate(candidates, images, dropped, size, max_zeros):
    """(kept rows of pairs.csv, rows of dropped.csv) from the tables of the step before, as it wrote them.

    dropped.csv: what was dropped before; images that are unfit, then fit images without a kept pair; unfit pairs.
    """
    lost = {(row["folder"], row["first"], row["second"]) for row in dropped if row["kind"] == "pair"}
    unfit = {(row["folder"], row["image"]): why for row in images if (why := judge(row, size, max_zeros))}
    kept, pairs = [], []
    for row in candidates:
        folder, first, second = key = (row["folder"], row["first"], row["second"])
        why = [unfit[folder, name] for name in (first, second) if (folder, name) in unfit]
        if key in lost:
            continue
        if why:
            pairs.append(("pair", *key, why[0][0], " and ".join(detail for _, detail in why)))
        else:
            kept.append(row)
    used = {(row["folder"], row[which]) for row in kept for which in ("first", "second")}
    single = [
        (row["folder"], row["image"]) for row in images if (row["folder"], row["image"]) not in used | unfit.keys()
    ]
    before = [tuple(row.values()) for row in dropped]
    return kept, [
        *(row for row in before if row[0] == "image"),
        *(("image", *key, "", *why) for key, why in unfit.items()),
        *(("image", *key, "", "in no pair", "no pair with it is kept") for key in single),
        *(row for row in before if row[0] == "pair"),
        *pairs,
    ]


# ---- Writing -------------------------------------------------------------------------------------


def files_of(kept, layout):
    """{path in the dataset: (folder, names of the images it holds)} of kept rows of pairs.csv, in sorted order."""
    if layout == "images":
        files = {
            f"images/{row['folder']}/{row[which]}.npy": (row["folder"], (row[which],))
            for row in kept
            for which in ("first", "second")
        }
    else:
        files = {
            f"{row['split']}/{row['folder']}__{row['first']}__{row['second']}__{row['label']}.npy": (
                row["folder"],
                (row["first"], row["second"]),
            )
            for row in kept
        }
    return dict(sorted(files.items()))


def unfinished(path):
    """Where the file of a dataset lies until all of its folder is there: train/x.npy → .train/x.npy.

    FloodDataset takes what is in train/ and test/ for all pairs there are. With images/, the lists of pairs come last.
    """
    return path if path.startswith("images/") else f".{path}"


def write_folder(files, aligned, out, size):
    """Write the files of one folder: [(path in the dataset, (folder, names))]. Returns rows of checksums.csv.

    A file that is there already, under either name, has its final content, and stays.
    """

    @cache
    def read(folder, name):
        values = read_aligned(aligned / folder / f"{name}.tif")
        if values.shape != (len(CHANNELS), size, size):
            raise DataError(
                f"{aligned / folder / name}.tif: is not the image that was measured; run python -m {PREPARE} again"
            )
        return values

    rows = []
    for path, (folder, names) in files:
        target = _there(out, path) or out / unfinished(path)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            images = [read(folder, name) for name in names]
            save_array(target, np.stack(images) if len(images) > 1 else images[0])
        rows.append((path, sha256_of(target)))
    return rows


def _there(out, path):
    """Where a file of the dataset lies already, or None."""
    return next((out / name for name in (path, unfinished(path)) if (out / name).exists()), None)


def prune(aligned, pairs, out, max_zeros=0.25, size=SIDE, layout="images", workers=Workers()):
    """Write the final dataset into `out`, the folders spread over workers. aligned, pairs: what the steps before wrote.

    preparation.json comes last: what was interrupted is continued. Returns False if everything was there already.
    Raises DataError.
    """
    aligned, pairs, out = Path(aligned), Path(pairs), Path(out)
    record, candidates, kept, dropped = workers.on_main(_select, aligned, pairs, max_zeros, size, layout)
    files = files_of(kept, layout)
    with claimed(workers, out, record, last=LAST, name=STEP) as complete:
        if not complete:
            workers.on_main(_check_room, out, files, size)
            folders = [
                list(group)
                for _, group in groupby(
                    sorted(files.items(), key=lambda entry: entry[1]), key=lambda entry: entry[1][0]
                )
            ]
            found = workers.map(partial(write_folder, aligned=aligned, out=out, size=size), folders, "folders")
            workers.on_main(_finish, out, record, candidates, kept, dropped, [row for rows in found for row in rows])
        workers.on_main(_report, out)
    return not complete


def _select(aligned, pairs, max_zeros, size, layout):
    """(record of the step, candidate rows, kept rows, rows of dropped.csv)."""
    before = read_step(pairs, PREPARE)
    dropped = DROPPED.read(pairs)
    made_from = before.get("aligned")
    if not isinstance(made_from, dict) or made_from.get("align_sha256") != sha256_of(aligned / ALIGNED.name):
        raise DataError(
            f"--pairs {pairs} was not made from --aligned {aligned}; run python -m {PREPARE} again, with an --out of "
            "its own"
        )
    candidates = CANDIDATES.read(pairs)
    kept, dropped = curate(candidates, IMAGES.read(pairs), dropped, size, max_zeros)
    if not kept:
        reasons = Counter(row[4] for row in dropped if row[0] == "pair")
        raise data_error(
            f"none of the {len(candidates)} pairs can be kept",
            [f"{count} {reason}" for reason, count in reasons.most_common()],
            "correct --size, or raise --max_zeros",
        )
    record = {"program": PRUNE, "layout": layout, "size": size, "max_zeros": max_zeros, "pairs": before}
    parameters_of(record, pairs / STEP)
    return record, candidates, kept, dropped


def _check_room(out, files, size):
    images = sum(len(names) for path, (_, names) in files.items() if not _there(out, path))
    check_room([("--out", out, images * len(CHANNELS) * size**2 * np.float32().itemsize)])


def _finish(out, record, candidates, kept, dropped, checksums):
    for split in SPLITS:
        if record["layout"] == "images":
            KEPT[split].write(
                out, [[row[name] for name in KEPT[split].columns] for row in kept if row["split"] == split]
            )
            checksums.append((KEPT[split].name, sha256_of(out / KEPT[split].name)))
        elif not (out / split).exists():
            (out / f".{split}").mkdir(exist_ok=True)  # a split without any pair
            (out / f".{split}").rename(out / split)
    DROPPED.write(out, dropped)
    CHECKSUMS.write(out, sorted(checksums))
    counts = {}
    for split in SPLITS:
        mine = [row for row in kept if row["split"] == split]
        flooded = sum(row["label"] == "1" for row in mine)
        counts[split] = {
            "candidates": sum(row["split"] == split for row in candidates),
            "kept": len(mine),
            "no flood": len(mine) - flooded,
            "flood": flooded,
        }
    reasons = {
        f"{kind}s": dict(sorted(Counter(row[4] for row in dropped if row[0] == kind).items()))
        for kind in ("image", "pair")
    }
    write_json(
        out / LAST,
        {
            "program": PRUNE,
            "parameters": parameters_of(record, out / STEP),
            "counts": counts,
            "dropped": reasons,
            "checksums_sha256": sha256_of(out / CHECKSUMS.name),
        },
    )


def parameters_of(record, path):
    """All that decides the content of a dataset, of this step and those before: {name: plain value}.

    Path: of the record.
    """
    try:
        pairs = record["pairs"]
        step = pairs["aligned"]["step"]
        return {
            "layout": record["layout"],
            "size": record["size"],
            "max_zeros": record["max_zeros"],
            "resampling": step["resampling"],
            "units": step["units"],
            **{f"{name}_sha256": pairs[f"{name}_sha256"] for name in LISTS},
        }
    except (LookupError, TypeError):
        raise DataError(
            f"{path}: does not say how the data were made; run the steps of the preparation again"
        ) from None


def _report(out):
    """Log what preparation.json says."""
    said = _read_last(out)
    table = [(split, *counts.values()) for split, counts in said["counts"].items()]
    table.append(("all", *(sum(column) for column in list(zip(*table))[1:])))
    log.info("%s: pairs\n%s", out, tabulate(table, ("split", "candidates", "kept", *CLASSES), tablefmt="pipe"))
    for kind, reasons in said["dropped"].items():
        log.info(
            "%d %s dropped%s%s",
            sum(reasons.values()),
            kind,
            ": " if reasons else "",
            ", ".join(f"{count} {reason}" for reason, count in reasons.items()),
        )
    for split, counts in said["counts"].items():
        if not counts["kept"]:
            log.warning("no pair of split %s is kept", split)


# ---- Looking at a dataset that is there ----------------------------------------------------------


def verify(out, workers=Workers()):
    """Compare every file of a dataset with its checksum.

    Returns their number. Raises DataError: count and first five.
    """
    out = Path(out)
    rows = workers.on_main(_listed, out)
    faults = [fault for fault in workers.map(partial(file_fault, out), rows, "files") if fault]
    listed = {file for file, _ in rows}
    faults += [f"{name} is not listed" for name in workers.on_main(_arrays, out) if name not in listed]
    if faults:
        raise data_error(
            f"{out}: {len(faults)} of {len(rows)} files differ from {CHECKSUMS.name}",
            faults,
            "copy them again, or prepare the dataset again",
        )
    return len(rows)


def _read_last(out):
    """What preparation.json says. Raises DataError if it is not there, or damaged."""
    said = read_json(out / LAST, f"the dataset is not complete, run python -m {PRUNE} to its end")
    if not isinstance(said, dict) or not {"counts", "dropped", "checksums_sha256"} <= said.keys():
        raise DataError(f"{out / LAST}: does not say what was prepared; remove it, and run python -m {PRUNE} again")
    return said


def _listed(out):
    said = _read_last(out)
    rows = CHECKSUMS.read(out)
    if sha256_of(out / CHECKSUMS.name) != said["checksums_sha256"]:
        raise DataError(
            f"{out / CHECKSUMS.name}: is not as it was written; copy it again, or prepare the dataset again"
        )
    return [(row["file"], row["sha256"]) for row in rows]


def _arrays(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.npy"))


def is_complete(out, wanted):
    """Whether the dataset `out` is complete.

    Raises DataError if it was begun with other parameters than {name: value} `wanted`.
    """
    out = Path(out)
    if not (out / STEP).exists():
        if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise DataError(
                f"--out {out} is not empty and was not begun by this program; choose another --out, or empty it"
            )
        return False
    there = parameters_of(read_step(out, PRUNE), out / STEP)
    other = [f"{name} {there[name]}, not {value}" for name, value in wanted.items() if there[name] != value]
    if other:
        raise data_error(f"--out {out} was made with other parameters", other, "choose another --out, or remove it")
    return (out / LAST).exists()


# ---- Program -------------------------------------------------------------------------------------


def image_side(text):
    """An argparse type: the side of square images that can be cut into patches."""
    side = positive_int(text)
    if side % PATCH:
        raise argparse.ArgumentTypeError(f"must be a multiple of {PATCH}, the side of the patches the model cuts")
    return side


def add_curation_flags(group):
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="images",
        help="images: each image once, with lists of pairs; npy: a file per pair, about seven times as large",
    )
    group.add_argument(
        "--max_zeros",
        "--max-zeros",
        type=positive_share,
        default=0.25,
        help="share of pixels without data from which on a channel of an image is too empty",
    )
    group.add_argument(
        "--size", type=image_side, default=SIDE, help="side that images must have, pixels of 10 m, a multiple of 128"
    )


def get_args_parser():
    parser = Parser(
        "Drop the pairs of SEN12-FLOOD whose images lack data, and write the others for --dataset sen12flood.", PRUNE
    )
    group = parser.add_argument_group("files")
    group.add_argument("--aligned", type=Path, help=f"folder that {ALIGN} wrote")
    group.add_argument("--pairs", type=Path, help=f"folder that {PREPARE} wrote")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write, new, empty, or to be continued",
    )
    add_workers_flag(group)
    add_curation_flags(parser.add_argument_group("curation"))
    group = parser.add_argument_group("looking at --out instead of writing it")
    group.add_argument("--verify", action="store_true", help="compare all files with their checksums")
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        if args.verify and (args.aligned or args.pairs):
            parser.error("--verify goes without --aligned and --pairs")
        if args.verify:
            log.info("%s: %d files are as they were written", args.out, verify(args.out, workers))
        elif not (args.aligned and args.pairs):
            parser.error("--aligned and --pairs are needed, or --verify")
        elif not prune(args.aligned, args.pairs, args.out, args.max_zeros, args.size, args.layout, workers):
            log.info("%s: complete already, nothing to do", args.out)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
