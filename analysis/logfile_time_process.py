# SPDX-License-Identifier: MIT
"""How long trainings took, by their console logs.

    python -m analysis.logfile_time_process logs --gpus 8 --output times.csv

A log that was continued has several parts, each begun by its flags. A finished part says its "Training time"; of another
it is the time from its first clock to its last, whatever pauses were between the parts.
"""

import re

from tabulate import tabulate

from analysis.console_log import (
    EPOCH,
    JSON_FLAGS,
    NAMESPACE,
    TRAINING_TIME,
    NoResult,
    NotALog,
    is_training_log,
    lines_of,
    read_text,
)
from analysis.results import find_logs, log_parser, write_rows
from common.errors import DataError, data_error

HOUR, DAY = 3600, 86400
# What a program logs before anything else: ours, and those made after MAE.
BEGINNING = re.compile("|".join((JSON_FLAGS.pattern, NAMESPACE.pattern, "job dir: ", r"\| distributed init")))


def parts_of(lines):
    """The lines of each training in a log: a beginning after an epoch, or after the end, starts another."""
    parts, trained = [[]], False
    for line in lines:
        if trained and BEGINNING.search(line[1]):
            parts.append([])
            trained = False
        trained = trained or bool(EPOCH.search(line[1]) or TRAINING_TIME.search(line[1]))
        parts[-1].append(line)
    return parts


def elapsed(clocks):
    """Seconds between the first and the last of some times of day (seconds since midnight) that follow each other.

    Back by more than an hour is the next day; less is another rank's line, or the clock put back in autumn. So a gap of more
    than 23 hours cannot be told from a shorter one.
    """
    now = latest = 0.0
    for before, clock in zip(clocks, clocks[1:]):
        now += (clock - before + HOUR) % DAY - HOUR
        latest = max(latest, now)
    return latest


def training_time(lines):
    """(seconds, how that is known) of the lines of a log. Raises NoResult if it does not say."""
    total, said, by_clock = 0.0, 0, 0
    for part in parts_of(lines):
        times = [match.groups("0") for _, text in part if (match := TRAINING_TIME.search(text))]
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
        raise NoResult("neither a Training time nor clocks")
    return total, " + ".join(way for count, way in ways if count)


def read_times(paths, pattern):
    """([(path, seconds, how that is known)], [(path, reason)] of logs that do not say). Raises DataError.

    Run folders keep no console log; of folders that are searched, files that are no logs are passed over.
    """
    times, without = [], []
    for path, named in find_logs(paths, pattern):
        try:
            if path.is_dir():
                raise NotALog("a run folder, which keeps no clock; name its console log")
            lines = lines_of(read_text(path))
            if not is_training_log(lines):
                raise NotALog("nothing in it is of a training's console log")
            times.append((str(path), *training_time(lines)))
        except NoResult as error:
            if named or not isinstance(error, NotALog):
                without.append((str(path), str(error)))
    return times, without


def shown(seconds):
    """H:MM:SS, of any number of hours."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def main(argv=None):
    parser = log_parser("analysis.logfile_time_process", __doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, metavar="N", help="also state GPU-hours, of trainings on this many GPUs")
    parser.add_argument("--output", metavar="CSV", help="also write the table here")
    args = parser.parse_args(argv)
    try:
        if args.gpus is not None and args.gpus < 1:
            raise DataError(f"--gpus {args.gpus}: must be at least 1; leave it out for trainings without a GPU")
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
            write_rows(
                args.output, ["seconds", *header], [[round(seconds), *row] for (_, seconds, _), row in zip(times, rows)]
            )
    except DataError as error:
        parser.error(str(error))
    print(
        tabulate(
            rows,
            header,
            tablefmt="pipe",
            disable_numparse=True,
            colalign=["left", *["right"] * (len(header) - 2), "left"],
        )
    )
    total = sum(seconds for _, seconds, _ in times)
    print(
        f"\nTotal of {len(times)} logs: {shown(total)}, {total / HOUR:.2f} hours"
        + "".join(f"; on {n} GPUs {total / HOUR * n:.2f} GPU-hours" for n in gpus)
    )
    if without:
        print(f"{len(without)} logs without a time:", *(f"- {path}: {reason}" for path, reason in without), sep="\n")


if __name__ == "__main__":
    main()
