# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, step 3: lists all candidate pairs with their split, and measures the missing data of aligned images.

    python -m sarwmix.sen12_data_prep --aligned DIR --out PAIRS --workers 8
    python -m sarwmix.sen12_data_prep --list_only --s1_list S1list.json --out PAIRS

PAIRS/pairs.csv lists every pair, in the order of acquisition; PAIRS/images.csv lists every aligned image with its size,
the share of pixels without data in each channel, and the number of NaN and infinite pixels in its sources;
PAIRS/dropped.csv, written last, lists the images that could not be aligned and the pairs that contain them. The next
step, sarwmix.sen12_prune_partial_pairs, decides which pairs are kept.
"""

import logging
import re
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from common.command_line import Parser
from common.errors import DataError, data_error, listed, quoted
from common.files import claimed, sha256_of
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.geotiff import read_band
from sarwmix.listing import CHANNELS, read_csv_rows
from sarwmix.prepare.sen12_index import (
    ALIGN,
    ALIGNED,
    CANDIDATES,
    DROPPED,
    IMAGES,
    PREPARE,
    S1_LIST,
    SPLITS,
    STEP,
    log_list,
    pairs,
    read_s1_list,
    read_step,
    split_of,
    table_with_sums,
)

log = logging.getLogger(__name__)


# ---- Images --------------------------------------------------------------------------------------


def read_aligned(path):
    """Reads an aligned image: (2, H, W) float32, VH, VV, linear σ⁰, 0 for no data. Raises DataError with the path."""
    try:
        values = np.stack([read_band(path, max_nonfinite=1, band=channel) for channel in CHANNELS])
    except DataError as error:
        raise DataError(f"{error}; or remove it and {ALIGNED.name}, and run python -m {ALIGN} again") from error
    values[~np.isfinite(values)] = 0
    return values


def measure_folder(images, aligned):
    """Rows of images.csv for one folder. images: [(Image, number of NaN and infinite pixels in its sources)]."""
    rows = []
    for image, lost in images:
        values = read_aligned(aligned / image.folder / f"{image.name}.tif")
        empty = [np.count_nonzero(channel == 0) / channel.size for channel in values]
        rows.append((image.folder, image.name, int(image.flooded), *values.shape[1:], *empty, lost))
    return rows


# ---- Lists ---------------------------------------------------------------------------------------


def read_folder_list(path):
    """Reads a list of folders: one name per row, without header. Raises DataError."""
    cells = [(line, ",".join(row).strip()) for line, row in read_csv_rows(path)]
    named = [(line, name) for line, name in cells if name]
    bad = [f"{quoted(name)} (line {line})" for line, name in named if not re.fullmatch(r"[A-Za-z0-9-]+", name)]
    if not named:
        raise DataError(f"{path}: names no folder; give one per row")
    if bad:
        raise data_error(
            f"{path}: {len(bad)} of {len(named)} rows are not the name of one folder", bad, "give one folder per row"
        )
    return [name for _, name in named]


def read_splits(train_list, test_list, known):
    """Reads two lists of folders: {"train": names, "test": names}, for `split_of`.

    Raises DataError for a folder in both lists. Logs folders that are not in `known`.
    """
    lists = {"train": read_folder_list(train_list), "test": read_folder_list(test_list)}
    both = sorted(set(lists["train"]) & set(lists["test"]))
    if both:
        raise data_error(
            f"{len(both)} folders are in both {train_list} and {test_list}", both, "a folder belongs to one split"
        )
    for path, names in ((train_list, lists["train"]), (test_list, lists["test"])):
        absent = sorted(set(names) - set(known))
        if len(absent) == len(set(names)):
            raise data_error(
                f"{path}: none of its {len(absent)} folders is in the list of images", absent, "correct it"
            )
        if absent:
            log.info("%d folders of %s are not in the list of images: %s", len(absent), path, listed(absent))
    return lists


def candidate_pairs(folders, splits):
    """Rows of pairs.csv for {folder: [Image]}. splits: {folder: split, or None to leave the folder out}."""
    return [
        (split, folder, images[a].name, images[b].name, label)
        for folder, images in folders.items()
        if (split := splits[folder])
        for a, b, label in pairs([image.flooded for image in images])
    ]


def lost_pairs(candidates, dropped):
    """Rows of dropped.csv for the pairs that contain a dropped image. dropped: {(folder, image): (reason, detail)}."""
    rows = []
    for _, folder, first, second, _ in candidates:
        lost = [(name, dropped[folder, name][0]) for name in (first, second) if (folder, name) in dropped]
        if lost:
            detail = " and ".join(f"{name} ({reason})" for name, reason in lost)
            rows.append(("pair", folder, first, second, lost[0][1], detail))
    return rows


# ---- The step ------------------------------------------------------------------------------------


def prepare(out, aligned=None, s1_list=None, train_list=None, test_list=None, workers=Workers()):
    """Writes pairs.csv, images.csv and dropped.csv into `out`, distributing folders over workers.

    aligned: the folder that sarwmix.sen12_align_s1_to_s2 wrote; without it, only pairs.csv is written. s1_list: default
    is the list in `aligned`. train_list, test_list: files with the folders of each split; default is the rule of
    `split_of`. Raises DataError.
    """
    out, aligned = Path(out), aligned and Path(aligned)
    s1_list = Path(s1_list or aligned / S1_LIST)
    folders, splits, state, record = workers.on_main(_read_input, aligned, s1_list, train_list, test_list)
    candidates = candidate_pairs(folders, splits)
    images = [image for folder in folders if splits[folder] for image in folders[folder]]
    dropped = {
        key: (row["reason"], row["detail"])
        for key, row in state.items()
        if splits.get(key[0]) and row["status"] == "dropped"
    }
    lost = lost_pairs(candidates, dropped)
    with claimed(workers, out, record, last=DROPPED.name if aligned else CANDIDATES.name, name=STEP) as complete:
        if not complete:
            workers.on_main(CANDIDATES.write, out, candidates)
        if not complete and aligned:
            keyed = [((image.folder, image.name), image) for image in images]
            measured = [(image, int(state[key]["nonfinite"])) for key, image in keyed if key not in dropped]
            by_folder = [list(group) for _, group in groupby(measured, key=lambda entry: entry[0].folder)]
            found = workers.map(partial(measure_folder, aligned=aligned), by_folder, "folders")
            workers.on_main(IMAGES.write, out, [row for rows in found for row in rows])
            rows = [("image", folder, name, "", *why) for (folder, name), why in dropped.items()]
            workers.on_main(DROPPED.write, out, rows + lost)
    _report(folders, splits, candidates, lost)
    log_list(s1_list, folders, own_splits=bool(train_list))


def _read_input(aligned, s1_list, train_list, test_list):
    """({folder: [Image]}, {folder: split or None}, {(folder, image): row of align.csv}, record of the step)."""
    folders = read_s1_list(s1_list)
    lists = read_splits(train_list, test_list, folders) if train_list else None
    splits = {folder: split_of(folder, lists) for folder in folders}
    unlisted = [folder for folder, split in splits.items() if not split]
    if unlisted:
        log.info("%d folders are in neither list, and are left out: %s", len(unlisted), listed(unlisted))
    record = {
        "program": PREPARE,
        "s1_list_sha256": sha256_of(s1_list),
        "train_list_sha256": train_list and sha256_of(train_list),
        "test_list_sha256": test_list and sha256_of(test_list),
    }
    if aligned is None:
        return folders, splits, {}, record | {"aligned": None}
    state = {(row["folder"], row["image"]): row for row in ALIGNED.read(aligned)}
    unsure = [" ".join(key) for key, row in state.items() if (row["status"] == "aligned") != bool(row["nonfinite"])]
    if unsure:
        raise data_error(
            f"{aligned / ALIGNED.name}: {len(unsure)} rows do not say whether the image was aligned",
            unsure,
            f"remove it, and run python -m {ALIGN} again",
        )
    unknown = [
        f"{folder} {image.name}"
        for folder, images in folders.items()
        for image in images
        if (folder, image.name) not in state
    ]
    if unknown:
        raise data_error(
            f"{s1_list}: {len(unknown)} of its images are not in {aligned / ALIGNED.name}",
            unknown,
            f"give the list that python -m {ALIGN} was run with",
        )
    record |= {"aligned": {"step": read_step(aligned, ALIGN), "align_sha256": sha256_of(aligned / ALIGNED.name)}}
    return folders, splits, state, record


def _report(folders, splits, candidates, lost):
    """Logs the counts of each split."""
    lost, table = {row[1:4] for row in lost}, {}
    for split in SPLITS:
        mine = [folder for folder in folders if splits[folder] == split]
        images = [image for folder in mine for image in folders[folder]]
        rows = [row for row in candidates if row[0] == split]
        table[split] = {
            "folders": len(mine),
            "images": len(images),
            "flooded images": sum(image.flooded for image in images),
            "pairs": len(rows),
            "flooded pairs": sum(row[-1] for row in rows),
            "lost in alignment": sum(row[1:4] in lost for row in rows),
        }
    log.info("candidate pairs:\n%s", table_with_sums(table))


# ---- Program -------------------------------------------------------------------------------------


def add_list_flags(group):
    group.add_argument("--train_list", "--train-list", type=Path, help="folders for training, one per row, no header")
    group.add_argument(
        "--test_list", "--test-list", type=Path, help="folders for test; folders of neither list are left out"
    )


def get_args_parser():
    parser = Parser("Make all candidate pairs of SEN12-FLOOD, and measure the aligned images.", PREPARE)
    group = parser.add_argument_group("files")
    group.add_argument("--aligned", type=Path, help=f"folder that {ALIGN} wrote")
    group.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    group.add_argument(
        "--s1_list", "--s1-list", type=Path, help=f"the list of images, if it is not the copy of {S1_LIST} in --aligned"
    )
    group.add_argument(
        "--list_only", "--list-only", action="store_true", help="only pairs.csv, from --s1_list, without images"
    )
    add_workers_flag(group)
    note = "Without these lists, folders with names of one or two digits belong to the test split."
    add_list_flags(parser.add_argument_group("splits", note))
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        if args.list_only and (args.aligned or not args.s1_list):
            parser.error("--list_only needs --s1_list, and cannot be used with --aligned")
        if not args.list_only and not args.aligned:
            parser.error("--aligned is needed, or --list_only with --s1_list")
        if bool(args.train_list) != bool(args.test_list):
            parser.error("--train_list and --test_list must be given together")
        prepare(args.out, args.aligned, args.s1_list, args.train_list, args.test_list, workers)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
