# SPDX-License-Identifier: MIT
"""Computes the exact mean, standard deviation and histogram of a dataset's backscatter in dB, in one pass.

    python -m sarwmix.prepare.statistics --dataset benv2 --data_path DIR --split train --out statistics.json --workers 8

All pixels have the same weight: the result is not a mean over files. Count, mean and sum of squared deviations of the
parts are merged as in Chan, Golub and LeVeque (1979), always in the same order, so that the result does not depend on
the number of processes.
"""

import logging
from functools import partial
from pathlib import Path

from tabulate import tabulate

from common.command_line import Parser
from common.errors import DataError, data_error
from common.files import write_json
from common.workers import add_workers_flag, run_command
from sarwmix.listing import SPLITS, UNITS
from sarwmix.moments import Moments
from sarwmix.packed_store import STATISTICS, is_packed
from sarwmix.plausibility import judge
from sarwmix.prepare.distinct_images import DistinctImages
from sarwmix.registry import (
    DATASETS,
    add_chips_flags,
    add_skip_missing_flag,
    add_source_flags,
    is_simulated,
    leave_out,
    log_amount,
    open_dataset,
    source_options,
)

CHUNK = 256  # images of a part

log = logging.getLogger(__name__)


def moments_of(images, floor_db):
    """Returns (the Moments of the readable images, as a dict; the errors of the others, one line each)."""
    total, bad = Moments(floor_db), []
    for m in range(len(images)):
        try:
            total.add(images.read(m))
        except DataError as error:
            bad.append(str(error))
    return total.to_dict(), bad


def chunks_of(dataset):
    """The distinct images of a dataset, in parts for other processes."""
    images = DistinctImages(dataset)
    return [images.part(start, start + CHUNK) for start in range(0, len(images), CHUNK)]


def measure(chunks, floor_db, workers):
    """The Moments of all images of these parts. Raises DataError with the number and the first five of bad images."""
    results = workers.map(partial(moments_of, floor_db=floor_db), chunks, f"parts of {CHUNK} images")
    bad = [line for _, lines in results for line in lines]
    if bad:
        raise data_error(
            f"{len(bad)} of {sum(map(len, chunks))} images cannot be read",
            bad,
            "restore them, or take them out of the lists; --skip_missing leaves out those that are missing",
        )
    total = Moments(floor_db)
    for part, _ in results:
        total.merge(Moments.from_dict(part))
    return total


def log_moments(total, channels):
    """Logs a table with a column for each channel."""

    def shown(value):
        return "none" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    rows = [[name, *map(shown, values)] for name, values in total.summary().items()]
    table = tabulate(rows, ["dB", *channels], disable_numparse=True, colalign=("left", "right", "right"))
    log.info("\n%s", table)


def get_args_parser():
    parser = Parser(
        "Compute the exact mean, standard deviation and histogram of a dataset's backscatter, in dB, per channel.",
        "sarwmix.prepare.statistics",
        usage="[flags] --dataset NAME --data_path DIR",
    )
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(DATASETS), required=True, help="name of the dataset")
    add_source_flags(group)
    add_skip_missing_flag(group)
    group.add_argument("--split", choices=SPLITS, default="train", help="part of the data to measure")
    add_chips_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="FILE", help="JSON file to write; without it, only the table is logged")
    add_workers_flag(group)
    return parser


def work(args, workers):
    def prepare():
        if not args.data_path:
            raise DataError("--data_path is missing: the folder of the data")
        if is_packed(args.data_path):
            raise DataError(
                f"--data_path {args.data_path}: is a packed store, whose statistics are in its {STATISTICS}; give "
                "the data that it was made of"
            )
        dataset = open_dataset(args.dataset, args.data_path, args.split, args.metadata, **source_options(args))
        if args.skip_missing:
            dataset = leave_out(dataset, dataset.missing())
        log_amount(args.dataset, dataset, is_simulated(dataset), args.include_snow_cloud)
        return chunks_of(dataset), len(dataset)

    kind = DATASETS[args.dataset]
    chunks, samples = workers.on_main(prepare)
    total = measure(chunks, kind.FLOOR_DB, workers)
    log_moments(total, kind.CHANNELS)
    expected = None if kind.MEAN is None else (kind.MEAN, kind.STD)
    judge(f"{args.data_path}: split '{args.split}'", total.summary(), expected, total.histogram_dict())
    if args.out:
        report = {
            "dataset": args.dataset,
            "split": args.split,
            "samples": samples,
            "images": sum(map(len, chunks)),
            "units": UNITS,
            "channels": list(kind.CHANNELS),
            **total.summary(),
            "histogram": total.histogram_dict(),
        }
        workers.on_main(write_json, Path(args.out), report)
        log.info("wrote %s", args.out)


def main(argv=None):
    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
