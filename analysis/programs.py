# SPDX-License-Identifier: MIT
"""Common parts of the programs of this folder: flags, input of logs, and output files."""

import argparse
import re
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate

from analysis.runs import read_results, share_of, whole
from common import files
from common.command_line import Parser
from common.errors import DataError, data_error, quoted

# ---- Input: logs ---------------------------------------------------------------------------------


def log_parser(module, description, nargs="+"):
    """The parser of a program that reads logs."""
    parser = Parser(description, f"analysis.{module}")
    parser.add_argument("logs", nargs=nargs, help="logs, run folders, and folders to search for them recursively")
    parser.add_argument(
        "--pattern",
        default="*",
        metavar="GLOB",
        help="in searched folders: names of files and run folders, such as '*.log'",
    )
    return parser


def add_name_flags(parser):
    """Adds flags for facts that only the names of logs contain."""
    for flag, what, example in (
        ("--epochs_from", "the epochs of pretraining", r"finetune_(\d+)_"),
        ("--share_from", "the share of the training labels (above 1: in percent)", r"_(\d+)p\.log"),
    ):
        parser.add_argument(
            flag,
            type=_pattern,
            metavar="REGEX",
            help=f"take {what} from the path of a log, instead of from its content: the group in the last match of "
            f"this regular expression, such as '{example}'",
        )


def _pattern(text):
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression ({error})") from None
    if pattern.groups != 1:
        raise argparse.ArgumentTypeError(f"has {pattern.groups} groups; put one pair of parentheses around the number")
    return pattern


def results_of(args):
    """([Result], [Skipped]) of the flags of `log_parser` and `add_name_flags`. Raises DataError without results."""
    results, skipped = read_results(args.logs, args.pattern)
    remedy = "name console logs or run folders of finished finetunings"
    if not results and skipped:
        reasons = [f"{skip.path} ({skip.reason})" for skip in skipped]
        raise data_error(f"{args.logs[0]}: no result in {len(skipped)} logs", reasons, remedy)
    if not results:
        raise DataError(f"{args.logs[0]}: holds no log of a finetuning; {remedy}")
    for result in results:
        if args.epochs_from and result.start != "random":
            epochs = _number_in(result.source, "--epochs_from", args.epochs_from, whole)
            if epochs is not None:
                result.start, result.pretraining_epochs = "pretrained", epochs
        if args.share_from:
            result.share = _number_in(result.source, "--share_from", args.share_from, share_of) or result.share
    return results, skipped


def _number_in(source, flag, pattern, convert):
    """The number that the last match of the pattern finds in a path, None without a match. Raises DataError."""
    found = [match[1] for match in pattern.finditer(source)]
    if not found:
        return None
    try:
        return convert(found[-1])
    except (ValueError, TypeError):  # TypeError: an optional group that is absent
        raise DataError(
            f"{flag} {pattern.pattern}: finds {quoted(found[-1])} in {source}; it must find a number"
        ) from None


def percent(share):
    return f"{share * 100:.4g} %"


def account(results, skipped):
    """Lines to print: how many logs were read, and why others were left out."""
    malformed = sum(item.malformed for item in (*results, *skipped))
    return [
        f"{len(results) + len(skipped)} logs read: {len(results)} results; {len(skipped)} left out; "
        f"malformed lines: {malformed}",
        *(f"- {skip.path}: {skip.reason}" for skip in skipped),
    ]


def short_names(paths):
    """The shortest ends of the paths that are all different, with the same number of parts."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


# ---- Output --------------------------------------------------------------------------------------


def picture(text):
    """The argparse type of a figure's path."""
    if Path(text).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError("its name must end in .png or .svg; both are written")
    return Path(text)


def add_picture_flag(parser, flag="--output"):
    parser.add_argument(
        flag, required=True, type=picture, metavar="FILE", help="figure to write, .png or .svg; both are written"
    )


@contextmanager
def writing(path, flag, remedy="name a file in a folder that can be written"):
    """Turns an OSError into a DataError that names the flag and the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{flag} {path}: {error.strerror}; {remedy}") from None


def write_text(text, path, flag="--output"):
    """Writes a text file atomically. Raises DataError."""
    with writing(path, flag):
        files.write_text(path, text)


def write_table(frame, path, flag="--output"):
    """Writes a DataFrame as CSV, atomically. Raises DataError."""
    write_text(frame.to_csv(index=False), path, flag)


def show_table(title, frame):
    """Prints a DataFrame of text as a pipe table below a title."""
    print(f"\n{title}\n")
    print(tabulate(frame, headers="keys", tablefmt="pipe", showindex=False, disable_numparse=True))
