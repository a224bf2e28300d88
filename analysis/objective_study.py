# SPDX-License-Identifier: MIT
"""Compares objectives of pretraining by what their frozen encoders tell on simulated and real radar.

    python -m analysis.objective_study --output output/study                     # on simulated scenes and floods
    python -m analysis.objective_study --output output/study --data_path DIR --flood_path DIR --water DIR \\
        --arms norm_pix statistics mine="--norm_pix_loss --mask_ratio 0.75" --seeds 0 1 2 \\
        --table study.csv --picture study.png -- --epochs 64 --batch_size 64

An encoder is pretrained for each arm and seed, and evaluated frozen, by logistic regression: land cover, floods, water,
and tiles with a class. Untrained encoders and baselines without an encoder are in every table. Settings are chosen on
validation data, and each test is made once. What follows "--" are flags of main_pretrain.py for every pretraining. A
study that was stopped goes on where it was. Arms are compared seed by seed.
"""

import os
import shlex
import sys
from itertools import chain

import pandas as pd

from analysis.figures import write_figure
from analysis.jobs import is_due, run_study
from analysis.objective_arms import ARMS, arm, contrasts
from analysis.objective_bootstrap import draws_table
from analysis.objective_picture import draw_study
from analysis.objective_results import (
    ARM,
    TASK,
    compare,
    contrast_table,
    health_table,
    read_health,
    read_results,
    tally,
    task_table,
)
from analysis.objective_runs import jobs_of, keep_record, open_tasks, plan
from analysis.objective_tasks import add_task_flags
from analysis.programs import picture, show_table, write_table
from common.command_line import Parser, positive_int, seed
from common.errors import UsageError
from models_mixmim import SIZES


def build_parser():
    parser = Parser(__doc__.splitlines()[0], "analysis.objective_study")
    add_task_flags(parser)
    group = parser.add_argument_group("pretrainings", "flags of main_pretrain.py follow behind --")
    group.add_argument(
        "--arms",
        type=arm,
        nargs="+",
        default=list(ARMS.values()),
        metavar="ARM",
        help=f"objectives: {', '.join(ARMS)}, or NAME=FLAGS with flags of main_pretrain.py (default: all that are "
        "named here)",
    )
    group.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="an encoder for each")
    group.add_argument("--model", choices=tuple(SIZES), help="(default: mixmim_tiny on simulated scenes, else its own)")
    group.add_argument("--statistics", metavar="FILE", help="mean and standard deviation, as of main_pretrain.py")
    group.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="commands at a time")
    group.add_argument(
        "--tasks_only", action="store_true", help="pretrain nothing; evaluate the encoders that are there"
    )
    group.add_argument("--dry_run", action="store_true", help="print the commands that are left, and write nothing")
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="DIR", help="folder of the runs and results of one study")
    group.add_argument("--table", metavar="CSV", help="table to write: a row for each arm, seed, task and metric")
    group.add_argument(
        "--picture", type=picture, metavar="FILE", help="figure to write, .png or .svg; both are written"
    )
    return parser


def planned_for(arms, results):
    """The planned Contrasts of the arms that have results; with --tasks_only, some may lack an encoder."""
    there = set(results[ARM])
    return contrasts([a.name for a in arms if a.name in there])


def report(study, tasks, results, contents):
    """Prints the tables."""
    arms = study.args.arms
    show_table(
        "Arms", pd.DataFrame([(a.name, a.label, " ".join(a.flags)) for a in arms], columns=[ARM, "what", "flags"])
    )
    planned = planned_for(arms, results)
    table = compare(results, planned)
    for task in tasks:
        part = results[results[TASK] == task.name]
        show_table(f"{task.name}: mean and standard deviation over seeds", task_table(part, study))
        show_table(
            f"{task.name}: differences seed by seed; smallest visible is the half-width of the 95 % interval "
            "(Student's t)",
            contrast_table(table[table[TASK] == task.name]),
        )
        if task.real:
            print("\nThe intervals are of chance in training alone: other places may give other differences.")
    print(f"\n{tally(table)}")
    drawn = draws_table(contents, planned, study.args.seeds)
    if len(drawn):
        show_table("Real images: differences, mean over seeds, with the tested places drawn again 1000 times", drawn)
    show_table(
        "Pretrainings, last epoch: mean and standard deviation over seeds", health_table(read_health(study), study)
    )


def run(study, parser):
    """Does what is left to do. Returns the tasks."""
    args = study.args
    with parser.input_errors():
        if not args.tasks_only:
            keep_record(study)
    run_study([study.before], 1)
    with parser.input_errors():
        tasks = open_tasks(study)
        if not tasks:
            raise UsageError("no task has data; give --flood_path, --water or --tiles")
        jobs = jobs_of(study, tasks)
    run_study(jobs, args.jobs, max(1, len(os.sched_getaffinity(0)) // args.jobs))
    return tasks


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args = parser.parse_args(words[:end])
    with parser.input_errors():
        study = plan(args, words[end + 1 :])
        if args.dry_run:
            made = not any(map(is_due, study.before))
            jobs = [study.before, *jobs_of(study, open_tasks(study) if made else None)]
            for step in filter(is_due, chain.from_iterable(jobs)):
                print(shlex.join(step.command))
            return
    tasks = run(study, parser)
    with parser.input_errors():
        results, contents = read_results(study, tasks)
        if args.table:
            write_table(results, args.table, "--table")
        if args.picture:
            write_figure(draw_study(results, study), args.picture, "--picture")
    report(study, tasks, results, contents)


if __name__ == "__main__":
    main()
