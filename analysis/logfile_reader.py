# SPDX-License-Identifier: MIT
"""Tabulate the best results of all finetuning logs of a folder, best first.

    python -m analysis.logfile_reader logs output --output table.csv

Reads console logs of these programs and of the released code, run folders, and tables; see analysis/results.py. What the
table does not know can be written into the CSV by hand, which this and the programs that draw read in place of the logs.
"""

import math
from os.path import commonpath, relpath
from pathlib import Path

from tabulate import tabulate

from analysis.console_log import FLOOD, MULTILABEL
from analysis.results import account, add_name_flags, log_parser, percent, results_of, write_table
from common.errors import DataError

TITLES = ((MULTILABEL, "BigEarthNet, many labels"), (FLOOD, "Floods"))


def short_names(results):
    """The sources, without the folder that all of them lie in."""
    folder = commonpath([Path(result.source).absolute().parent for result in results])
    return [relpath(Path(result.source).absolute(), folder) for result in results]


def best_first(results, task, sort_by):
    """The results of a task in order; those without a value last. sort_by: a metric of it, or its first."""
    name = sort_by if sort_by in task else next(iter(task))

    def key(result):
        value = result.metrics.get(name)
        return -math.inf if value is None else value

    return sorted((result for result in results if result.task == task), key=key, reverse=True)


def table_of(results, task):
    """A pipe table of results of one task."""
    rows = [
        (
            name,
            result.start,
            result.pretraining_epochs,
            None if result.share is None else percent(result.share),
            result.seed,
            result.epoch,
            result.split,
            *(None if result.metrics.get(metric) is None else f"{result.metrics[metric]:.4f}" for metric in task),
        )
        for name, result in zip(short_names(results), results)
    ]
    return tabulate(
        rows,
        ["log", "start", "pretraining epochs", "share", "seed", "epoch", "split", *task.values()],
        tablefmt="pipe",
        missingval="–",
        disable_numparse=True,
    )


def main(argv=None):
    parser = log_parser("analysis.logfile_reader", __doc__.splitlines()[0])
    add_name_flags(parser)
    parser.add_argument(
        "--sort_by",
        choices=(*MULTILABEL, *FLOOD),
        metavar="METRIC",
        help=f"one of {', '.join((*MULTILABEL, *FLOOD))} (default: ap_macro; floods: accuracy)",
    )
    parser.add_argument(
        "--output", metavar="CSV", help="also write the results here, those of both tasks into one table"
    )
    args = parser.parse_args(argv)
    try:
        results, skipped = results_of(args)
        parts = [(title, task, best_first(results, task, args.sort_by)) for task, title in TITLES]
        if args.output:
            write_table(args.output, [result for _, _, part in parts for result in part])
    except DataError as error:
        parser.error(str(error))
    for title, task, part in parts:
        if part:
            print(f"{title}\n\n{table_of(part, task)}\n")
    print(*account(results, skipped), sep="\n")


if __name__ == "__main__":
    main()
