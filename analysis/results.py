# SPDX-License-Identifier: MIT
"""Results of finetunings, read from whatever is left of them: console logs, run folders, log.txt, tables made from these.

    results, skipped = read_results(["logs", "output/finetune_a", "corrected.csv"])

What is in a file is found out by looking into it. Several ways of leaving the same result are understood:

- a console log, of `main_finetune.py` or of the released code: the last complete table under "Best Results Summary";
- a run folder, which holds run.json: its eval_<test split>.json; where a run had no test split, the best epoch of its log.txt;
- log.txt of a finetuning, a JSON object an epoch: its best epoch, by macro average precision, or by accuracy (floods);
- a CSV table, as `write_table` makes it and people correct it.
"""

import argparse
import csv
import fnmatch
import io
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from analysis.console_log import (
    FLOOD,
    MULTILABEL,
    NoResult,
    NotALog,
    as_number,
    as_shares,
    is_training_log,
    lines_of,
    parse,
    read_text,
)
from common.command_line import Parser
from common.errors import DataError, data_error, quoted
from common.files import write_csv

RECORD, LOG = "run.json", "log.txt"
RUN_FILES = (
    RECORD,
    LOG,
    "eval_*.json",
    "train_ids.csv",
    "*.sha256",
)  # that a run folder is read by, or that tell nothing
STARTS = ("pretrained", "random")
PRETRAINING = "mask_ratio"  # a flag of pretraining alone
LONGEST_HEADER = 1000  # letters of the first line of a table
NUMBERED = re.compile(r"checkpoint[-_](\d+)\.pth$")
FACTS = ("log", "start", "checkpoint", "pretraining_epochs", "share", "seed", "epoch", "split")


@dataclass
class Result:
    """What one finetuning came to. None is what its log does not say.

    source: file or run folder. start: "pretrained" or "random"; checkpoint: that it started from, after pretraining_epochs.
    share: of the training labels, in (0, 1]. epoch: of the best result, as it stands in the log. split: that the metrics are of.
    metrics: those of MULTILABEL or of FLOOD, in [0, 1] or None. malformed: lines of the source that looked like data and
    could not be read. output_dir: as the run was given it.
    """

    source: str
    start: str | None = None
    checkpoint: str | None = None
    pretraining_epochs: int | None = None
    share: float | None = None
    seed: int | None = None
    epoch: int | None = None
    split: str | None = None
    metrics: dict = field(default_factory=dict)
    malformed: int = 0
    output_dir: str | None = None

    @property
    def task(self):
        """MULTILABEL or FLOOD: the metrics that can be in it, with the names to show them by."""
        return FLOOD if any(name in FLOOD for name in self.metrics) else MULTILABEL


@dataclass(frozen=True)
class Skipped:
    """A file or run folder without a result, and why."""

    path: str
    reason: str
    malformed: int = 0


# ---- One file, one folder ------------------------------------------------------------------------


def _epochs_named(checkpoint):
    """64 of checkpoint_64.pth or checkpoint-64.pth; None of any other name."""
    found = NUMBERED.search(checkpoint or "")
    return int(found[1]) if found else None


def _as_share(value):
    """A share in (0, 1] of a number, which is a percentage if it is above 1. Raises ValueError."""
    value = float(value)
    value = value / 100 if value > 1 else value
    if not 0 < value <= 1:
        raise ValueError(f"{value:g} is not a share")
    return value


def _as_whole(value):
    """A whole number, also of "64.0", as spreadsheets write it. Raises ValueError."""
    number = float(value)
    if not number.is_integer() or number < 0:
        raise ValueError(f"{value} is not a whole number")
    return int(number)


def _facts_in(flags):
    """What flags say of a run; whatever is not as it must be they do not say."""
    share, seed = flags.get("train_fraction"), flags.get("seed")
    return {
        "share": share if isinstance(share, (int, float)) and 0 < share <= 1 else None,
        "seed": seed if isinstance(seed, int) else None,
        "output_dir": str(flags.get("output_dir") or "") or None,
    }


def _metrics_in(entry, prefix=""):
    """The metrics of an evaluation's dict, {} if there are none."""
    for task, leader in ((MULTILABEL, "ap_macro"), (FLOOD, "accuracy")):
        if f"{prefix}{leader}" in entry:
            values = {name: entry.get(f"{prefix}{name}") for name in task}
            return {
                name: value if isinstance(value, (int, float)) and 0 <= value <= 1 else None
                for name, value in values.items()
            }
    return {}


def _leading(metrics):
    """The metric by which results are ordered, missing values last."""
    value = metrics["ap_macro" if "ap_macro" in metrics else "accuracy"]
    return -math.inf if value is None else value


def read_console_log(path):
    """The Result of a console log. Raises NoResult."""
    return _console_result(path, read_text(path))


def _console_result(path, text):
    lines = lines_of(text)
    log = parse(lines)
    if log.summary is None:
        if not is_training_log(lines):
            raise NotALog("nothing in it is of a training log", log.malformed)
        raise NoResult(
            "pretraining log" if PRETRAINING in log.flags else "no Best Results Summary: not finished", log.malformed
        )
    best = log.summary
    return Result(
        str(path),
        best["start"],
        best["checkpoint"],
        best["epochs"] or _epochs_named(best["checkpoint"]),
        epoch=best["epoch"],
        split=best["split"],
        metrics=best["metrics"],
        malformed=log.malformed,
        **_facts_in(best["flags"]),
    )


def read_epoch_log(path):
    """The Result of a finetuning's log.txt: of its best epoch; an epoch that stands there twice counts as the later says.

    Lines that are no entries, or without the metrics that are known here, count as malformed. Raises NoResult.
    """
    return _epoch_result(path, read_text(path))


def _epoch_result(path, text):
    epochs, malformed, pretraining = {}, 0, False
    for line in filter(str.strip, text.splitlines()):
        try:
            entry = dict(json.loads(line))
            epoch = int(entry["epoch"])
        except (ValueError, KeyError, TypeError, OverflowError):
            malformed += 1
            continue
        metrics = _metrics_in(entry, "test_")
        if metrics:
            epochs[epoch] = Result(str(path), epoch=epoch, split=entry.get("evaluated_split"), metrics=metrics)
        elif any(name.startswith("test_") for name in entry):
            malformed += 1
        else:
            pretraining = True
    if not epochs:
        raise NoResult("pretraining log" if pretraining else "no epoch with test_ap_macro or test_accuracy", malformed)
    best = max(epochs.values(), key=lambda result: _leading(result.metrics))
    best.malformed = malformed
    return best


def _read_json(path):
    try:
        return dict(json.loads(read_text(path)))
    except NoResult as error:
        raise NoResult(f"{path.name}: {error}") from None
    except (ValueError, TypeError):
        raise NoResult(f"{path.name}: not a JSON object; the file is damaged", malformed=1) from None


def read_run_folder(path):
    """The Result of a run of main_finetune.py, of what its folder holds. Raises NoResult."""
    path = Path(path)
    record = _read_json(path / RECORD)
    parts = [
        part for part in (*record.get("earlier", []), record) if isinstance(part.get("flags"), dict)
    ]  # of a continued run
    if not parts:
        raise NoResult(f"{RECORD}: has no flags; not a run folder")
    flags = parts[-1]["flags"]
    if PRETRAINING in flags:
        raise NoResult("run folder of a pretraining")
    split = flags.get("test_split", "test")
    if split == "none":
        result = read_epoch_log(path / LOG)
    else:
        name = f"eval_{split}.json"
        if not (path / name).is_file():
            raise NoResult(f"no {name}: {record.get('outcome', 'not finished')}")
        found = _read_json(path / name)
        result = Result(
            str(path), epoch=found.get("epoch"), split=found.get("split", split), metrics=_metrics_in(found)
        )
        if not result.metrics:
            raise NoResult(f"{name}: has neither ap_macro nor accuracy", malformed=1)
    # A part that continued the run need not say again what it started from.
    origin = next((part["initialised_from"] for part in parts if isinstance(part.get("initialised_from"), dict)), {})
    named = next((part["flags"]["finetune"] for part in parts if isinstance(part["flags"].get("finetune"), str)), None)
    checkpoint = origin.get("checkpoint") or named or None
    epochs = origin.get("epochs")
    return replace(
        result,
        source=str(path),
        start="pretrained" if checkpoint else "random" if named == "" else None,
        checkpoint=checkpoint,
        pretraining_epochs=epochs if isinstance(epochs, int) else _epochs_named(checkpoint),
        **_facts_in(flags),
    )


# ---- Tables --------------------------------------------------------------------------------------


def is_table(text):
    """Whether a text is a CSV table of results."""
    header = next(csv.reader(text[:LONGEST_HEADER].splitlines()[:1]), [])
    return "log" in header and any(name in header for name in (*MULTILABEL, *FLOOD))


def read_table(path):
    """The Results of a CSV table as `write_table` makes it; columns may be missing, and others are passed over.

    The malformed rows are counted in the first Result. Raises NoResult.
    """
    return _table_results(path, read_text(path))


def _table_results(path, text):
    if not is_table(text):
        raise NotALog("not a table with a column log and columns of metrics")
    results, malformed = [], 0
    try:
        for row in csv.DictReader(io.StringIO(text)):
            try:
                results.append(
                    _result_of_row(
                        {name: value.strip() for name, value in row.items() if name and value and value.strip()}
                    )
                )
            except (ValueError, KeyError):
                malformed += 1
    except csv.Error:  # a quote that never ends
        malformed += 1
    if not results:
        raise NoResult("a table without a readable row", malformed)
    results[0].malformed = malformed
    return results


def _result_of_row(row):
    """row: the cells that are filled. Raises ValueError, KeyError."""
    if row.get("start") not in (None, *STARTS):
        raise ValueError(f"{row['start']} is not one of {STARTS}")
    metrics = as_shares({name: as_number(row[name]) for name in (*MULTILABEL, *FLOOD) if name in row})
    task = MULTILABEL if any(name in MULTILABEL for name in metrics) else FLOOD
    metrics = {name: metrics.get(name) for name in task}
    if all(value is None for value in metrics.values()):
        raise ValueError("a row without metrics")
    whole = {name: _as_whole(row[name]) if name in row else None for name in ("pretraining_epochs", "seed", "epoch")}
    return Result(
        row["log"],
        row.get("start"),
        row.get("checkpoint"),
        share=_as_share(row["share"]) if "share" in row else None,
        split=row.get("split"),
        metrics=metrics,
        **whole,
    )


def write_table(path, results):
    """Results as a CSV table that `read_table` reads. Raises DataError naming --output if it cannot be written."""
    names = [name for name in (*MULTILABEL, *FLOOD) if any(name in result.metrics for result in results)]
    rows = [
        [result.source, *(getattr(result, fact) for fact in FACTS[1:]), *map(result.metrics.get, names)]
        for result in results
    ]
    write_rows(path, [*FACTS, *names], rows)


def write_rows(path, header, rows):
    """A CSV file of a program's --output. Raises DataError if it cannot be written."""
    try:
        write_csv(path, header, rows)
    except OSError as error:
        raise DataError(f"--output {path}: {error.strerror}; choose a place that can be written") from None


# ---- Many ----------------------------------------------------------------------------------------


def find_logs(paths, pattern="*"):
    """[(path, whether it was named)] of the files in question and run folders, each once. Raises DataError.

    paths: files and folders. A folder is searched with all that lie in it, except hidden ones; the pattern, as of a shell,
    is for the names of the files and run folders found there. The files by which a run folder is read are not listed too.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: does not exist; name logs, run folders, or folders that hold them")
        named = [(path, True)] if path.is_file() else []
        for entry, by_name in named or _search(path, pattern):
            found.setdefault(entry.resolve(), (entry, by_name))
    return list(found.values())


def _search(folder, pattern):
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        place, is_run = Path(place), RECORD in files
        if is_run and (place == folder or fnmatch.fnmatch(place.name, pattern)):
            yield place, place == folder
        for name in sorted(files):
            own = is_run and any(fnmatch.fnmatch(name, part) for part in RUN_FILES)
            if not (own or name.startswith(".")) and fnmatch.fnmatch(name, pattern) and (place / name).is_file():
                yield place / name, False


def _read(path, named):
    """The Results of a file or run folder. Raises NoResult; NotALog for a table that was not named, as it repeats others."""
    if path.is_dir():
        return [read_run_folder(path)]
    text = read_text(path)
    if is_table(text):
        if not named:
            raise NotALog("a table, which counts only where it is named")
        return _table_results(path, text)
    epochs = any(line.startswith("{") and '"epoch"' in line for line in text.splitlines())
    return [(_epoch_result if epochs and "Best Results Summary" not in text else _console_result)(path, text)]


def read_results(paths, pattern="*"):
    """([Result], [Skipped]) of files, run folders, and folders that are searched as `find_logs` says. Raises DataError.

    In a search, tables and files that are no logs are passed over. A run counts once: where its folder is found, its console
    log is skipped (known by output_dir, start, share and seed), and so is log.txt where a console log has its result.
    """
    results, skipped = [], []
    for path, named in find_logs(paths, pattern):
        try:
            results += _read(path, named)
        except NoResult as error:
            if named or not isinstance(error, NotALog):
                skipped.append(Skipped(str(path), str(error), error.malformed))
    return _once(results, skipped)


def _once(results, skipped):
    def run(result):
        return result.output_dir, result.share, result.seed, *result.task

    folders = {run(result): result for result in results if result.output_dir and Path(result.source).is_dir()}
    consoles = [result.output_dir for result in results if result.output_dir and Path(result.source).is_file()]
    kept = []
    for result in results:
        path, twin, reason = Path(result.source), folders.get(run(result)), None
        # The log of a part that went on may not say what the run had started from.
        if (
            twin
            and path.is_file()
            and (result.start is None or (result.start, result.checkpoint) == (twin.start, twin.checkpoint))
        ):
            alike = all(_alike(value, twin.metrics.get(name)) for name, value in result.metrics.items())
            reason = f"log of the run folder {twin.source}{'' if alike else ', which has other figures: a log of an earlier run?'}"
        elif path.name == LOG and any(_lies_at(path.parent, output_dir) for output_dir in consoles):
            reason = "of a run whose console log is read"
        if reason:
            skipped.append(Skipped(result.source, reason, result.malformed))
        else:
            kept.append(result)
    return kept, skipped


def _alike(one, other):
    """Whether two metrics are the same but for the four digits that a log shows."""
    return one == other or None not in (one, other) and math.isclose(one, other, abs_tol=6e-5)


def _lies_at(folder, output_dir):
    """Whether a folder can be an --output_dir, which may be relative to a place that is not known."""
    parts = tuple(part for part in Path(output_dir).parts if part not in ("/", ".."))
    return bool(parts) and folder.resolve().parts[-len(parts) :] == parts


# ---- What the programs that start from results share ---------------------------------------------


def log_parser(module, description, nargs="+"):
    """The parser of a program that reads logs; its errors are one line."""
    parser = Parser(description, module)
    parser.add_argument(
        "logs", nargs=nargs, help="logs, run folders, and folders to search for these, with all folders in them"
    )
    parser.add_argument(
        "--pattern",
        default="*",
        metavar="GLOB",
        help="names of the files and run folders to take in folders that are searched, as '*.log'",
    )
    return parser


def add_name_flags(parser):
    """Flags for what the names of logs alone know."""
    for flag, what, example in (
        ("--epochs_from", "the epochs of pretraining", r"finetune_(\d+)_"),
        ("--share_from", "the share of the training labels (above 1: in percent)", r"_(\d+)p\.log"),
    ):
        parser.add_argument(
            flag,
            type=_pattern,
            metavar="REGEX",
            help=f"take {what} from the path of a log: the one group of this regular expression, as '{example}', where it "
            f"is found last; it wins over what the log says",
        )


def _pattern(text):
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text}: no regular expression ({error})") from None
    if pattern.groups != 1:
        raise argparse.ArgumentTypeError(
            f"{text}: has {pattern.groups} groups; put one pair of parentheses around the number"
        )
    return pattern


def _take_from_names(results, args):
    for flag, fact, convert in (("epochs_from", "pretraining_epochs", _as_whole), ("share_from", "share", _as_share)):
        pattern = getattr(args, flag)
        for result in results:
            found = [match[1] for match in pattern.finditer(result.source)] if pattern else []
            if not found or flag == "epochs_from" and result.start == "random":
                continue
            text = found[-1]  # folders may have names like those of their logs
            try:
                setattr(result, fact, convert(text))
            except (ValueError, TypeError):  # TypeError: an optional group
                raise DataError(
                    f"--{flag} {pattern.pattern}: finds {quoted(text)} in {result.source}; it must find a number"
                ) from None
            if flag == "epochs_from":
                result.start = "pretrained"


def results_of(args):
    """([Result], [Skipped]) of the flags of `log_parser` and `add_name_flags`. Raises DataError, also if there is no result."""
    results, skipped = read_results(args.logs, args.pattern)
    remedy = "name console logs or run folders of finished finetunings"
    if not results and skipped:
        raise data_error(
            f"{args.logs[0]}: no result in {len(skipped)} logs",
            [f"{skip.path} ({skip.reason})" for skip in skipped],
            remedy,
        )
    if not results:
        raise DataError(f"{args.logs[0]}: holds no log of a finetuning; {remedy}")
    _take_from_names(results, args)
    return results, skipped


def percent(share):
    return f"{share * 100:.4g} %"


def account(results, skipped):
    """What was read, as lines to print."""
    malformed = sum(item.malformed for item in (*results, *skipped))
    return [
        f"{len(results) + len(skipped)} logs read: {len(results)} results; {len(skipped)} left out; malformed lines: {malformed}",
        *(f"- {skip.path}: {skip.reason}" for skip in skipped),
    ]
