# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, step 4: drops the pairs whose images lack data, and writes the others for --dataset sen12flood.

    python -m sarwmix.sen12_prune_partial_pairs --aligned DIR --pairs PAIRS --out OUT --workers 8
    python -m sarwmix.sen12_prune_partial_pairs --out OUT --verify

A pair is kept if both images were aligned, are size × size pixels, and have a share of pixels without data below
--max_zeros in both channels. The arrays are float32, VH before VV, linear σ⁰, 0 = no data:
  --layout images   OUT/images/<folder>/<image>.npy, (2, S, S), one file for each image of the kept pairs, and
                    OUT/pairs_{train,test}.csv (folder,first,second,label);
  --layout npy      OUT/{train,test}/<folder>__<first>__<second>__<label>.npy, (2, 2, S, S): image, channel, row,
                    column.
OUT/dropped.csv lists the reason for every dropped image and pair; OUT/checksums.csv has the SHA-256 of each file;
OUT/preparation.json, written last, has the parameters and counts.
"""

import logging
from collections import Counter
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np

from common.command_line import Parser, Range, positive_share
from common.errors import DataError, data_error
from common.files import check_room, claimed, file_fault, read_json, save_array, sha256_of, write_json
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.listing import CHANNELS, EVERY, PATCH
from sarwmix.prepare.completeness import counts_beside, published
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
    table_with_sums,
)
from sarwmix.sen12_data_prep import read_aligned

log = logging.getLogger(__name__)

LAST = "preparation.json"
LISTS = ("s1_list", "train_list", "test_list")


# ---- Curation ------------------------------------------------------------------------------------


def judge(row, size, max_zeros):
    """Why an image cannot be in a pair, as (reason, detail); None if it can. row: of images.csv."""
    if (int(row["height"]), int(row["width"])) != (size, size):
        return "wrong size", f"{row['image']} is {row['width']}x{row['height']} pixels, not {size}x{size}"
    zeros = {channel: float(row[f"zeros_{channel.lower()}"]) for channel in CHANNELS}
    found = [
        f"{channel} of {row['image']} {100 * share:.1f} % zeros"
        for channel, share in zeros.items()
        if share >= max_zeros
    ]
    return ("too many zeros", " and ".join(found)) if found else None


def curate(candidates, images, dropped, size, max_zeros):
    """Selects pairs, given the tables of the previous step. Returns (kept rows of pairs.csv, rows of dropped.csv).

    Order of dropped.csv: images dropped by the previous step, unfit images, fit images without a kept pair; pairs
    dropped by the previous step, unfit pairs.
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
    """The files of the dataset for kept rows of pairs.csv: {path: (folder, names of its images)}, sorted by path."""
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
    """The temporary path of a file, until all files of its split are written: train/x.npy → .train/x.npy.

    FloodDataset assumes that train/ and test/ hold all pairs. In images/, files have their final path at once, because
    the lists of pairs are written last.
    """
    return path if path.startswith("images/") else f".{path}"


def write_folder(files, aligned, out, size):
    """Writes the files of one folder: [(path in the dataset, (folder, names))]. Returns their rows of checksums.csv.

    A file that exists, at its temporary or final path, is complete and is kept.
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
        target = _written(out, path)
        if target is None:
            target = out / unfinished(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            images = [read(folder, name) for name in names]
            save_array(target, np.stack(images) if len(images) > 1 else images[0])
        rows.append((path, sha256_of(target)))
    return rows


def _written(out, path):
    """The path, final or temporary, at which a file of the dataset exists; None if it does not."""
    return next((out / name for name in (path, unfinished(path)) if (out / name).exists()), None)


def prune(aligned, pairs, out, max_zeros=0.25, size=SIDE, layout="images", workers=Workers()):
    """Writes the final dataset into `out`, distributing folders over workers.

    aligned, pairs: the folders that the previous steps wrote. preparation.json is written last, so that an interrupted
    run is continued. Raises DataError.
    """
    aligned, pairs, out = Path(aligned), Path(pairs), Path(out)
    record, candidates, kept, dropped = workers.on_main(_select, aligned, pairs, max_zeros, size, layout)
    files = files_of(kept, layout)
    with claimed(workers, out, record, last=LAST, name=STEP) as complete:
        if not complete:
            workers.on_main(_check_room, out, files, size)
            by_folder = sorted(files.items(), key=lambda entry: entry[1])
            folders = [list(group) for _, group in groupby(by_folder, key=lambda entry: entry[1][0])]
            found = workers.map(partial(write_folder, aligned=aligned, out=out, size=size), folders, "folders")
            workers.on_main(_finish, out, record, candidates, kept, dropped, [row for rows in found for row in rows])
        workers.on_main(_report, out, published("sen12flood", (row["first"] for row in kept)))


def _select(aligned, pairs, max_zeros, size, layout):
    """Returns (record of the step, candidate rows, kept rows, rows of dropped.csv). Raises DataError."""
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
    images = sum(len(names) for path, (_, names) in files.items() if not _written(out, path))
    check_room([("--out", out, images * len(CHANNELS) * size**2 * np.float32().itemsize)])


def _finish(out, record, candidates, kept, dropped, checksums):
    for split in SPLITS:
        if record["layout"] == "images":
            KEPT[split].write(
                out, [[row[name] for name in KEPT[split].columns] for row in kept if row["split"] == split]
            )
            checksums.append((KEPT[split].name, sha256_of(out / KEPT[split].name)))
        elif not (out / split).exists():
            (out / f".{split}").mkdir(exist_ok=True)  # it does not exist if the split has no pair
            (out / f".{split}").rename(out / split)
    DROPPED.write(out, dropped)
    CHECKSUMS.write(out, sorted(checksums))
    counts = {}
    for split in SPLITS:
        labels = Counter(row["label"] for row in kept if row["split"] == split)
        counts[split] = {
            "candidates": sum(row["split"] == split for row in candidates),
            "kept": labels.total(),
            "no flood": labels["0"],
            "flood": labels["1"],
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
    """The parameters of all steps that decide the content of a dataset: {name: plain value}. path: of the record."""
    try:
        pairs = record["pairs"]
        step = pairs["aligned"]["step"]
        return {
            **{name: record[name] for name in ("layout", "size", "max_zeros")},
            **{name: step[name] for name in ("resampling", "units")},
            **{f"{name}_sha256": pairs[f"{name}_sha256"] for name in LISTS},
        }
    except (LookupError, TypeError):
        raise DataError(
            f"{path}: does not say how the data were made; run the steps of the preparation again"
        ) from None


def _report(out, dataset):
    """Logs the counts of preparation.json. dataset: as in `sarwmix.prepare.completeness.counts_beside`."""
    summary = _read_last(out)
    log.info("%s: pairs\n%s", out, table_with_sums(summary["counts"]))
    kept = sum(counts["kept"] for counts in summary["counts"].values())
    log.info("%s: kept %s", out, counts_beside(dataset, {("candidate pairs", EVERY): kept}))
    for kind, reasons in summary["dropped"].items():
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        log.info("%d %s dropped%s%s", sum(reasons.values()), kind, ": " if reasons else "", listed)
    for split, counts in summary["counts"].items():
        if not counts["kept"]:
            log.warning("no pair of split %s is kept", split)


# ---- Verification --------------------------------------------------------------------------------


def verify(out, workers=Workers()):
    """Compares every file of a dataset with its checksum.

    Returns the number of files. Raises DataError with the number of faults and the first five.
    """
    out = Path(out)
    rows, arrays = workers.on_main(_read_checksums, out)
    faults = [fault for fault in workers.map(partial(file_fault, out), rows, "files") if fault]
    listed = {file for file, _ in rows}
    faults += [f"{name} is not listed" for name in arrays if name not in listed]
    if faults:
        raise data_error(
            f"{out}: {len(faults)} of {len(rows)} files differ from {CHECKSUMS.name}",
            faults,
            "copy them again, or prepare the dataset again",
        )
    return len(rows)


def _read_last(out):
    """Reads preparation.json. Raises DataError if it is missing or damaged."""
    summary = read_json(out / LAST, f"the dataset is not complete, run python -m {PRUNE} to its end")
    if not isinstance(summary, dict) or not {"counts", "dropped", "checksums_sha256"} <= summary.keys():
        raise DataError(f"{out / LAST}: does not say what was prepared; remove it, and run python -m {PRUNE} again")
    return summary


def _read_checksums(out):
    """Returns ([(path in the dataset, SHA-256)] of checksums.csv, the paths of all .npy files that exist)."""
    expected = _read_last(out)["checksums_sha256"]
    rows = CHECKSUMS.read(out)
    if sha256_of(out / CHECKSUMS.name) != expected:
        raise DataError(
            f"{out / CHECKSUMS.name}: is not as it was written; copy it again, or prepare the dataset again"
        )
    arrays = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.npy"))
    return [(row["file"], row["sha256"]) for row in rows], arrays


def is_complete(out, wanted):
    """Whether the dataset `out` is complete. wanted: {name: value} of its parameters.

    Raises DataError if it was begun with other parameters.
    """
    out = Path(out)
    if not (out / STEP).exists():
        if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise DataError(
                f"--out {out} is not empty and does not hold output of this program; choose another --out, or empty it"
            )
        return False
    found = parameters_of(read_step(out, PRUNE), out / STEP)
    other = [f"{name} {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]
    if other:
        raise data_error(f"--out {out} was made with other parameters", other, "choose another --out, or remove it")
    return (out / LAST).exists()


# ---- Program -------------------------------------------------------------------------------------


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
        help="share of pixels without data at which a channel of an image is rejected",
    )
    group.add_argument(
        "--size",
        type=Range(int, at_least=1, multiple_of=PATCH),
        default=SIDE,
        help="required side of images, pixels of 10 m; the model cuts patches of 128",
    )


def get_args_parser():
    parser = Parser(
        "Drop the pairs of SEN12-FLOOD whose images lack data, and write the others for --dataset sen12flood.", PRUNE
    )
    group = parser.add_argument_group("files")
    group.add_argument("--aligned", type=Path, help=f"folder that {ALIGN} wrote")
    group.add_argument("--pairs", type=Path, help=f"folder that {PREPARE} wrote")
    group.add_argument("--out", type=Path, required=True, help="folder to write, new, empty, or to be continued")
    add_workers_flag(group)
    add_curation_flags(parser.add_argument_group("curation"))
    group = parser.add_argument_group("check --out instead of writing it")
    group.add_argument("--verify", action="store_true", help="compare all files with their checksums")
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        if args.verify and (args.aligned or args.pairs):
            parser.error("--verify cannot be used with --aligned and --pairs")
        if args.verify:
            log.info("%s: all %d files match their checksums", args.out, verify(args.out, workers))
        elif not (args.aligned and args.pairs):
            parser.error("--aligned and --pairs are needed, or --verify")
        else:
            prune(args.aligned, args.pairs, args.out, args.max_zeros, args.size, args.layout, workers)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
