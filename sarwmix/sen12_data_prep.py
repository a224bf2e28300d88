# SPDX-License-Identifier: MIT
"""SEN12-FLOOD: all candidate pairs of the list with their split, and how much data the aligned images hold.

    python -m sarwmix.sen12_data_prep --aligned DIR --out PAIRS --workers 8
    python -m sarwmix.sen12_data_prep --list_only --s1_list S1list.json --out PAIRS

PAIRS/pairs.csv has every pair of the list, in the order of acquisition; PAIRS/images.csv every aligned image with its
size, the share of pixels without data of each channel, and the NaN and infinite pixels of its sources;
PAIRS/dropped.csv, written last, the images that could not be aligned and the pairs lost with them. Nothing is judged
here: that is the next step's, sarwmix.sen12_prune_partial_pairs.
"""

import logging
import re
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tabulate import tabulate

from common.command_line import Parser
from common.errors import DataError, data_error, quoted
from common.files import claimed, sha256_of
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.geotiff import read_band
from sarwmix.listing import CHANNELS
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
    pairs,
    read_s1_list,
    read_step,
    split_of,
)

log = logging.getLogger(__name__)


# ---- Images --------------------------------------------------------------------------------------


def read_aligned(path):
    """An aligned image: (2, H, W) float32, VH, VV, linear σ⁰, 0 for no data. Raises DataError, which names the file."""
    try:
        values = np.stack([read_band(path, max_nonfinite=1, band=channel) for channel in CHANNELS])
    except DataError as error:
        raise DataError(f"{error}; or remove it and {ALIGNED.name}, and run python -m {ALIGN} again") from error
    values[~np.isfinite(values)] = 0
    return values


def measure_folder(images, aligned):
    """Rows of images.csv for the images of one folder: [(Image, NaN and infinite pixels of its sources)]."""
    rows = []
    for image, lost in images:
        values = read_aligned(aligned / image.folder / f"{image.name}.tif")
        empty = [np.count_nonzero(channel == 0) / channel.size for channel in values]
        rows.append((image.folder, image.name, int(image.flooded), *values.shape[1:], *empty, lost))
    return rows


# ---- Lists ---------------------------------------------------------------------------------------


def read_folder_list(path):
    """The folders that a list names, one per row, without header. Raises DataError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a list of folders ({error}); check the path and the file") from None
    named = [(number, line.strip().strip('"')) for number, line in enumerate(lines, start=1) if line.strip()]
    bad = [f"{quoted(name)} (line {number})" for number, name in named if not re.fullmatch(r"[A-Za-z0-9-]+", name)]
    if not named:
        raise DataError(f"{path}: names no folder; give one per row")
    if bad:
        raise data_error(
            f"{path}: {len(bad)} of {len(named)} rows are not the name of one folder", bad, "give one folder per row"
        )
    return [name for _, name in named]


def read_splits(train_list, test_list, known):
    """{"train", "test": names of folders} of two lists, for `split_of`.

    Raises DataError for a folder in both; logs unknown ones.
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
        _tell(f"folders of {path} are not in the list of images", absent)
    return lists


def candidate_pairs(folders, splits):
    """Rows of pairs.csv for {folder: [Image]}. splits: folder → split, or None for a folder that is left out."""
    return [
        (split, folder, images[a].name, images[b].name, label)
        for folder, images in folders.items()
        if (split := splits[folder])
        for a, b, label in pairs([image.flooded for image in images])
    ]


def lost_pairs(candidates, dropped):
    """Rows of dropped.csv for the pairs with an image in `dropped`: {(folder, image): (reason, …)}."""
    rows = []
    for _, folder, first, second, _ in candidates:
        lost = [(name, dropped[folder, name][0]) for name in (first, second) if (folder, name) in dropped]
        if lost:
            rows.append(
                ("pair", folder, first, second, lost[0][1], " and ".join(f"{name} ({reason})" for name, reason in lost))
            )
    return rows


def _tell(what, names):
    if names:
        log.info(
            "%d %s: %s%s",
            len(names),
            what,
            ", ".join(names[:5]),
            f", and {len(names) - 5} more" if len(names) > 5 else "",
        )


# ---- The step ------------------------------------------------------------------------------------


def prepare(out, aligned=None, s1_list=None, train_list=None, test_list=None, workers=Workers()):
    """Write pairs.csv, images.csv and dropped.csv into `out`, the folders spread over workers.

    aligned: what sarwmix.sen12_align_s1_to_s2 wrote; without, pairs.csv alone, from s1_list (default: the list in
    `aligned`). train_list, test_list: files that name the folders of each split; without, `split_of` does. Returns
    False if everything was there already. Raises DataError.
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
            there = [
                (image, int(state[key]["nonfinite"]))
                for image in images
                if (key := (image.folder, image.name)) not in dropped
            ]
            by_folder = [list(group) for _, group in groupby(there, key=lambda entry: entry[0].folder)]
            found = workers.map(partial(measure_folder, aligned=aligned), by_folder, "folders")
            workers.on_main(IMAGES.write, out, [row for rows in found for row in rows])
            rows = [("image", folder, name, "", *why) for (folder, name), why in dropped.items()]
            workers.on_main(DROPPED.write, out, rows + lost)
    _report(folders, splits, candidates, lost)
    return not complete


def _read_input(aligned, s1_list, train_list, test_list):
    """({folder: [Image]}, {folder: split or None}, {(folder, image): row of align.csv}, record of the step)."""
    folders = read_s1_list(s1_list)
    lists = read_splits(train_list, test_list, folders) if train_list else None
    splits = {folder: split_of(folder, lists) for folder in folders}
    _tell("folders are in neither list, and are left out", [folder for folder, split in splits.items() if not split])
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
    """Log what is in each split."""
    lost = {row[1:4] for row in lost}
    table = []
    for split in SPLITS:
        mine, rows = (
            [folder for folder in folders if splits[folder] == split],
            [row for row in candidates if row[0] == split],
        )
        images = [image for folder in mine for image in folders[folder]]
        table.append(
            (
                split,
                len(mine),
                len(images),
                sum(image.flooded for image in images),
                len(rows),
                sum(row[-1] for row in rows),
                sum(row[1:4] in lost for row in rows),
            )
        )
    table.append(("all", *(sum(column) for column in list(zip(*table))[1:])))
    header = ("split", "folders", "images", "flooded images", "pairs", "flooded pairs", "lost in alignment")
    log.info("candidate pairs:\n%s", tabulate(table, header, tablefmt="pipe"))


# ---- Program -------------------------------------------------------------------------------------


def add_list_flags(group):
    group.add_argument("--train_list", "--train-list", type=Path, help="folders for training, one per row, no header")
    group.add_argument(
        "--test_list", "--test-list", type=Path, help="folders for test, likewise; folders of neither list are left out"
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
    note = "Without these lists, folders with names of one or two digits are for test."
    add_list_flags(parser.add_argument_group("splits", note))
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        if args.list_only and (args.aligned or not args.s1_list):
            parser.error("--list_only needs --s1_list, and goes without --aligned")
        if not args.list_only and not args.aligned:
            parser.error("--aligned is needed, or --list_only with --s1_list")
        if bool(args.train_list) != bool(args.test_list):
            parser.error("--train_list and --test_list go together")
        if not prepare(args.out, args.aligned, args.s1_list, args.train_list, args.test_list, workers):
            log.info("%s: complete already, nothing to do", args.out)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
