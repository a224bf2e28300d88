# SPDX-License-Identifier: MIT
"""Tabulates the best results of all finetuning logs of a folder, best first.

    python -m analysis.logfile_reader logs output --output table.csv

Reads console logs of these programs and of the released code, run folders, and tables; see analysis/runs.py. Facts that
the logs lack can be added to the CSV by hand. This program and those that draw accept the CSV in place of the logs.
"""

import math
from os.path import commonpath, relpath
from pathlib import Path

from tabulate import tabulate

from analysis import runs
from analysis.programs import account, add_name_flags, log_parser, percent, results_of, write_table
from analysis.runs import FLOOD, METRICS, MULTICLASS, MULTILABEL, SEGMENTATION

TITLES = (
    (MULTILABEL, "BigEarthNet, many labels"),
    (MULTICLASS, "One label"),
    (FLOOD, "Floods"),
    (SEGMENTATION, "Segmentation"),
)


def best_first(results, task, sort_by):
    """The results of a task, best first, missing values last. sort_by: a metric; if not of the task, its first."""
    name = sort_by if sort_by in task else next(iter(task))

    def key(result):
        value = result.metrics.get(name)
        return -math.inf if value is None else value

    return sorted((result for result in results if result.task == task), key=key, reverse=True)


def table_of(results, task):
    """A pipe table of results of one task. Sources are named from the folder that contains all of them."""
    paths = [Path(result.source).absolute() for result in results]
    folder = commonpath([path.parent for path in paths])
    rows = [
        (
            relpath(path, folder),
            result.start,
            result.pretraining_epochs,
            None if result.share is None else percent(result.share),
            result.seed,
            result.epoch,
            result.split,
            *(None if result.metrics.get(metric) is None else f"{result.metrics[metric]:.4f}" for metric in task),
        )
        for path, result in zip(paths, results)
    ]
    return tabulate(
        rows,
        ["log", "start", "pretraining epochs", "share", "seed", "epoch", "split", *task.values()],
        tablefmt="pipe",
        missingval="–",
        disable_numparse=True,
    )


def main(argv=None):
    parser = log_parser("logfile_reader", __doc__.splitlines()[0])
    add_name_flags(parser)
    parser.add_argument(
        "--sort_by",
        choices=METRICS,
        metavar="METRIC",
        help=f"one of {', '.join(METRICS)} (default: ap_macro; floods: accuracy)",
    )
    parser.add_argument(
        "--output", metavar="CSV", help="also write the results here, those of both tasks into one table"
    )
    args = parser.parse_args(argv)
    with parser.input_errors():
        results, skipped = results_of(args)
        parts = [(title, task, best_first(results, task, args.sort_by)) for task, title in TITLES]
        if args.output:
            write_table(runs.table_of([result for _, _, part in parts for result in part]), args.output)
    for title, task, part in parts:
        if part:
            print(f"{title}\n\n{table_of(part, task)}\n")
    print(*account(results, skipped), sep="\n")


if __name__ == "__main__":
    main()
