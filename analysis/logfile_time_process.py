# SPDX-License-Identifier: MIT
"""Tabulates how long trainings took, from their console logs.

    python -m analysis.logfile_time_process logs --gpus 8 --output times.csv

A log of a continued training has several parts, each of which begins with its flags. The duration of a part is its
"Training time" or, if it did not finish, the time from its first clock to its last. Pauses between parts do not count.
"""

import re

import pandas as pd
from tabulate import tabulate

from analysis import runs
from analysis.programs import log_parser, write_table
from common.command_line import positive_int
from common.errors import data_error

HOUR, DAY = 3600, 86400
# The first lines of a training: of our programs, and of those derived from MAE.
BEGINNING = re.compile("|".join((runs.JSON_FLAGS.pattern, runs.NAMESPACE.pattern, "job dir: ", r"\| distributed init")))


def parts_of(lines):
    """The lines of each part of a log. A beginning after an epoch or after a "Training time" starts another part."""
    parts, trained = [[]], False
    for line in lines:
        if trained and BEGINNING.search(line[1]):
            parts.append([])
            trained = False
        trained = trained or bool(runs.EPOCH.search(line[1]) or runs.TRAINING_TIME.search(line[1]))
        parts[-1].append(line)
    return parts


def elapsed(clocks):
    """Seconds from the first to the last of successive times of day (seconds since midnight).

    A step back by more than an hour is the next day; a smaller one is another rank's line, or the end of summer time.
    A gap of more than 23 hours is therefore underestimated.
    """
    now = latest = 0.0
    for before, clock in zip(clocks, clocks[1:]):
        now += (clock - before + HOUR) % DAY - HOUR
        latest = max(latest, now)
    return latest


def training_time(lines):
    """(seconds, how they were determined) of the lines of a log. Raises NoResult if there is no time in it."""
    total, said, by_clock = 0.0, 0, 0
    for part in parts_of(lines):
        times = [match.groups("0") for _, text in part if (match := runs.TRAINING_TIME.search(text))]
        clocks = [seconds for seconds, _ in part if seconds is not None]
        if times:
            total += sum(
                int(days) * DAY + int(hours) * HOUR + int(minutes) * 60 + int(seconds)
                for days, hours, minutes, seconds in times
            )
            said += len(times)
        elif len(clocks) > 1:
            total += elapsed(clocks)
            by_clock += 1
    ways = [
        (said, "Training time" if said == 1 else f"sum of {said} Training times"),
        (by_clock, "first to last clock" if by_clock == 1 else f"sum of {by_clock} parts, first to last clock"),
    ]
    if not (said or by_clock):
        raise runs.NoResult("neither a Training time nor clocks")
    return total, " + ".join(way for count, way in ways if count)


def read_times(paths, pattern):
    """([(path, seconds, how they were determined)], [(path, reason)] of logs without a time). Raises DataError.

    Run folders contain no console log. In searched folders, files that are no logs are ignored.
    """
    times, without = [], []
    for path, named in runs.find_inputs(paths, pattern):
        try:
            if path.is_dir():
                raise runs.NotALog("a run folder, which keeps no clock; name its console log")
            lines = runs.lines_of(runs.read_text(path))
            if not runs.is_training_log(lines):
                raise runs.NotALog("holds no line of a training's console log")
            times.append((str(path), *training_time(lines)))
        except runs.NoResult as error:
            if named or not isinstance(error, runs.NotALog):
                without.append((str(path), str(error)))
    return times, without


def shown(seconds):
    """H:MM:SS, of any number of hours."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def main(argv=None):
    parser = log_parser("logfile_time_process", __doc__.splitlines()[0])
    parser.add_argument("--gpus", type=positive_int, metavar="N", help="also print GPU-hours, for this number of GPUs")
    parser.add_argument("--output", metavar="CSV", help="also write the table here")
    args = parser.parse_args(argv)
    with parser.input_errors():
        times, without = read_times(args.logs, args.pattern)
        if not times:
            found = [f"{path} ({reason})" for path, reason in without]
            raise data_error(
                f"{args.logs[0]}: no training time in {len(found)} logs", found, "name console logs of trainings"
            )
        gpus = [args.gpus] if args.gpus else []
        header = ["log", "time", "hours", *(["GPU-hours"] if gpus else []), "from"]
        rows = [
            [path, shown(seconds), *(f"{seconds / HOUR * n:.3f}" for n in (1, *gpus)), way]
            for path, seconds, way in times
        ]
        if args.output:
            table = [[round(seconds), *row] for (_, seconds, _), row in zip(times, rows)]
            write_table(pd.DataFrame(table, columns=["seconds", *header]), args.output)
    align = ["left", *["right"] * (len(header) - 2), "left"]
    print(tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=align))
    total = sum(seconds for _, seconds, _ in times)
    print(
        f"\nTotal of {len(times)} logs: {shown(total)}, {total / HOUR:.2f} hours"
        + "".join(f"; on {n} GPUs {total / HOUR * n:.2f} GPU-hours" for n in gpus)
    )
    if without:
        print(f"{len(without)} logs without a time:", *(f"- {path}: {reason}" for path, reason in without), sep="\n")


if __name__ == "__main__":
    main()
