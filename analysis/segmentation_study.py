# SPDX-License-Identifier: MIT
"""Compares encoders by segmentation of places that were not trained on: every group of images is left out once.

    python -m analysis.segmentation_study --dataset sen1floods11 --data_path DIR --output output/study \\
        --positive water --encoders published=a_{seed}.pth statistics=b_{seed}.pth --seeds 0 1 2 \\
        --table study.csv --picture study.png -- --epochs 50

A model is trained for each group, start and seed; one of the starts is random initialisation. Thresholds and logistic
regression (`analysis.segmentation_baselines`) are tested on the same images. What follows "--" are flags of
main_finetune.py for every training. A study that was stopped goes on where it was. Seeds are those of the pretraining
and of the finetuning: starts are compared seed by seed. The intervals are of chance in training, not in the choice of
places.
"""

import shlex
import sys
from itertools import chain, combinations
from pathlib import Path

import pandas as pd

from analysis.figures import dot_plot, write_figure
from analysis.jobs import is_due, run_study
from analysis.programs import picture, show_table, write_table
from analysis.segmentation_baselines import baselines
from analysis.segmentation_folds import write_lists
from analysis.segmentation_results import (
    AUC,
    IOU,
    METHOD,
    differences,
    group_table,
    indistinct,
    means,
    metrics_of,
    read_baselines,
    read_images,
    read_pixels,
    results_of,
    summary_of,
)
from analysis.segmentation_runs import (
    MEASURED,
    PREDICTIONS,
    TESTED,
    encoder,
    keep_record,
    plan,
    steps_of,
    write_statistics,
)
from common.command_line import Parser, positive_int, positive_share, seed

DATASETS = ("masks", "sen1floods11")


def prepare(study):
    """Writes lists and statistics. Returns the results of the baselines, kept in a table. Raises DataError."""
    keep_record(study)
    for fold in study.folds:
        folder = study.fold_folder(fold)
        write_lists(study.dataset, fold, study.args.dataset, folder)
        if None in study.inputs.values() and not (folder / MEASURED).exists():
            write_statistics(study, fold)
    share = study.args.tile_share
    path = Path(study.args.output) / ("baselines.csv" if share is None else f"baselines_{share:g}.csv")
    if not path.exists():
        write_table(baselines(study.dataset, study.folds, study.positive, share), path)
    return read_baselines(path)


def report(study, results):
    """Prints the tables of the results, and which differences are within chance."""
    summary = summary_of(results)
    others = summary[~summary[METHOD].isin(study.starts)]
    best = {name: others.loc[others[name].idxmax(), METHOD] for name in (IOU, AUC) if name in others}
    pairs = [(b, a) for a, b in combinations(study.starts, 2)] + [
        (start, other) for other in dict.fromkeys(best.values()) for start in study.starts
    ]
    show_table(
        f"{study.args.positive}, each group tested on once: mean and standard deviation over seeds", means(summary)
    )
    show_table(
        "Differences, seed by seed: mean and half-width of its 95 % interval (Student's t)",
        pd.DataFrame([differences(results, summary, *pair) for pair in pairs]),
    )
    print()
    for name, other in best.items():
        print(f"{other} is the baseline with the highest {name} on the tested images themselves, which favours it.")
    doubtful = [line for pair in pairs for line in indistinct(summary, *pair)]
    print("\n".join(doubtful or ["No interval contains 0."]))
    print("The intervals are of chance in training alone: other places may give other differences.")
    show_table("IoU of each group, mean over seeds", group_table(results))


def draw(study, results):
    """The figure: a row for each method, with a dot for each seed."""
    summary = summary_of(results)
    labels, groups = zip(*summary.groupby(METHOD, sort=False))
    return dot_plot(labels, groups, metrics_of(summary), f"Segmentation of {study.args.positive}, by groups left out")


def build_parser():
    parser = Parser(__doc__.splitlines()[0], "analysis.segmentation_study")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, required=True, help="images with masks")
    group.add_argument("--data_path", required=True, metavar="DIR", help="folder of the data, as for main_finetune.py")
    group.add_argument("--metadata", nargs="+", metavar="FILE", help="lists of all images (default: those of the data)")
    group.add_argument("--positive", required=True, metavar="CLASS", help="class whose IoU is compared, such as water")
    group.add_argument(
        "--tile_share",
        type=positive_share,
        metavar="SHARE",
        help="also compare how well images with this share of the class are separated from images without it (ROC AUC)",
    )
    group = parser.add_argument_group("trainings", "flags of main_finetune.py follow after --")
    group.add_argument(
        "--encoders",
        type=encoder,
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="checkpoints to start from, besides random initialisation; {seed} in a path stands for the seed",
    )
    group.add_argument(
        "--seeds",
        type=seed,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds; each encoder is trained once with each",
    )
    group.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N", help="trainings at a time, each with one thread"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="print the commands that are left to do, and write nothing"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="DIR", help="folder of the lists and runs of one study")
    group.add_argument(
        "--table",
        metavar="CSV",
        help="table to write: a row for each method, seed and group, and for all groups together",
    )
    group.add_argument(
        "--picture", type=picture, metavar="FILE", help="figure to write, .png or .svg; both are written"
    )
    return parser


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args = parser.parse_args(words[:end])
    with parser.input_errors():
        study = plan(args, words[end + 1 :])
        jobs = [steps_of(study, run) for run in study.runs()]
        if args.dry_run:
            for step in filter(is_due, chain.from_iterable(jobs)):
                print(shlex.join(step.command))
            return
        print(f"{len(study.dataset)} images in {len(study.folds)} groups, {len(jobs)} trainings", flush=True)
        tested = prepare(study)
    run_study(jobs, args.jobs)
    with parser.input_errors():
        pixels = read_pixels(study.runs(), TESTED, study.positive)
        images = None
        if args.tile_share is not None:
            images = read_images(study.runs(), PREDICTIONS, args.positive)
        results = results_of(pixels, images, tested, args.tile_share)
        if args.table:
            write_table(results, args.table, "--table")
        if args.picture:
            write_figure(draw(study, results), args.picture, "--picture")
    report(study, results)


if __name__ == "__main__":
    main()
