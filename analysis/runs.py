# SPDX-License-Identifier: MIT
"""Reads the results of training runs: run folders, console logs, log.txt, and CSV tables of results.

    results, skipped = read_results(["logs", "output/finetune_a", "corrected.csv"])

The kind of an input is detected from its content. Its result is

- of a run folder, which contains run.json: eval_<test split>.json; without a test split, the best epoch of its log.txt;
- of a console log of `main_finetune.py` or of the released code: the last complete table after "Best Results Summary";
- of log.txt, one JSON object per epoch: the epoch with the best macro average precision, or accuracy for floods;
- of a CSV table of `table_of`, perhaps corrected by hand: each of its rows.

Console lines may lack the clock and may have a prefix of mpirun, srun or a shell. Unreadable lines are skipped and
counted.
"""

import csv
import fnmatch
import io
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from common.errors import DataError

# Metrics of an evaluation: key in checkpoints and JSON → label in tables and on axes.
MULTILABEL = {
    "ap_macro": "AP macro",
    "ap_micro": "AP micro",
    "f1_macro": "F1 macro",
    "f1_micro": "F1 micro",
    "precision_macro": "precision macro",
    "precision_micro": "precision micro",
}
MULTICLASS = {
    "accuracy": "accuracy",
    "f1_macro": "F1 macro",
    "precision_macro": "precision macro",
    "recall_macro": "recall macro",
}
FLOOD = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
SEGMENTATION = {"iou_macro": "mean IoU", "f1_macro": "F1 macro", "accuracy": "accuracy"}
METRICS = MULTILABEL | MULTICLASS | FLOOD | SEGMENTATION
MAIN_METRICS = ("ap_macro", "ap_micro", "f1_macro", "f1_micro")  # of MULTILABEL, as in the published tables

RECORD, LOG = "run.json", "log.txt"
OWN_FILES = (RECORD, LOG, "eval_*.json", "train_ids.csv", "*.sha256")  # of a run folder; not inputs of their own
PRETRAINING = "mask_ratio"  # a flag of pretraining only
STARTS = ("pretrained", "random")
FACTS = ("start", "checkpoint", "pretraining_epochs", "share", "seed", "epoch", "split")  # columns of a CSV table
MISSING = ("", "-", "–", "—", "nan", "none", "n/a")

LONGEST_HEADER = 1000  # characters of the first line of a CSV table
HEAD = 64  # bytes in which a binary file has a zero byte; a zero byte after them may be damage to a log
FOREIGN = 3  # lines of other programs that may interrupt a table
MOST_LINES = 300  # of a table or a Namespace, if its end is missing

# The clock of a console line; Python omits the fraction of a time of exactly 0 µs.
CLOCK = re.compile(r"\[([01]\d|2[0-3]):([0-5]\d):([0-5]\d(?:\.\d{1,6})?)\] ?")
RANK = re.compile(r"\s*\[\S*,(\d{1,9})\]<std(?:out|err)>: ?")  # mpirun --tag-output
JSON_FLAGS = re.compile(r"\bflags: (\{.*)")
NAMESPACE = re.compile(r"\bNamespace\((.*)")
NAMESPACE_FLAG = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,()]+)""")
START = re.compile(
    r"initialised from (?P<ours>.+?)(?: \(epochs: (?P<epochs>\d{1,9})\))?, with a new head"
    r"|Load pre-trained checkpoint from: (?P<theirs>\S+)"
)
RANDOM_START = "random initialisation"
SPLIT = re.compile(r"the figures are of split (\w+)")
SUMMARY = re.compile(r"Best Results Summary\W*(?:Epoch\W*(\d{1,9}))?", re.IGNORECASE)
EPOCH = re.compile(r"\bEpoch:? *\[?\d+")
TRAINING_TIME = re.compile(r"Training time (?:(\d{1,9}) days?, )?(\d{1,9}):([0-5]\d):([0-5]\d)")
TABLE_ROW = re.compile(r"\s*(?:\S+: )?\|(.*)")
# First cell of a row → metric; others are its own name.
TABLE_LABELS = {"average precision": "ap", "f1 score": "f1"}
TABLE_LABELS |= {label.lower(): name for name, label in (MULTICLASS | SEGMENTATION).items()}
NUMBERED = re.compile(r"checkpoint[-_](\d{1,9})\.pth$")


class NoResult(ValueError):
    """A file or folder contains no result; the message is the reason. malformed: number of its unreadable lines."""

    def __init__(self, reason, malformed=0):
        super().__init__(reason)
        self.malformed = malformed


class NotALog(NoResult):
    """The file is not one that a training writes."""


def task_of(names):
    """MULTILABEL, MULTICLASS, FLOOD or SEGMENTATION, by the names of some metrics; MULTILABEL if they do not tell."""
    if "iou_macro" in names:
        return SEGMENTATION
    if "accuracy" in names and ("f1_macro" in names or "recall_macro" in names):
        return MULTICLASS
    return FLOOD if any(name in FLOOD for name in names) else MULTILABEL


@dataclass
class Result:
    """The result of one finetuning. None: its source does not say.

    source: file or run folder. start: "pretrained" or "random". checkpoint: of the pretraining, after
    pretraining_epochs. share: of the training labels, in (0, 1]. epoch: of the best result, as logged. split: that was
    evaluated. metrics: those of its task, in [0, 1] or None. malformed: number of unreadable
    lines in the source. output_dir: as given to the run.
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
        """MULTILABEL, MULTICLASS, FLOOD or SEGMENTATION."""
        return task_of(self.metrics)


@dataclass(frozen=True)
class Skipped:
    """A file or run folder without a result, and the reason."""

    path: str
    reason: str
    malformed: int = 0


# ---- Values --------------------------------------------------------------------------------------


def finite(value):
    """A finite float. Raises ValueError, TypeError or OverflowError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number


def whole(value):
    """A non-negative int, also of "64.0", as spreadsheets write it. Raises ValueError, TypeError or OverflowError."""
    number = finite(value)
    if number < 0 or not number.is_integer():
        raise ValueError(f"{value} is not a whole number")
    return int(number)


def share_of(value):
    """A share in (0, 1] of a number; numbers above 1 are percentages. Raises ValueError or TypeError."""
    number = float(value)
    number = number / 100 if number > 1 else number
    if not 0 < number <= 1:
        raise ValueError(f"{value} is not a share")
    return number


def metric_of(cell, most=1):
    """The number in a cell of a table, in [0, most]; None if the cell says that there is none. Raises ValueError."""
    if cell.lower() in MISSING:
        return None
    number = finite(cell.rstrip("% "))
    if not 0 <= number <= most:
        raise ValueError(f"{cell} is not between 0 and {most}")
    return number


def metrics_in(entry, prefix=""):
    """The metrics among the values of an evaluation; {} if it has none. Values that are not in [0, 1] become None."""
    names = [name.removeprefix(prefix) for name in entry if name.startswith(prefix)]
    task = task_of(names) if "ap_macro" in names or "accuracy" in names else {}

    def valid(value):
        return value if isinstance(value, (int, float)) and 0 <= value <= 1 else None

    return {name: valid(entry.get(f"{prefix}{name}")) for name in task}


def epochs_named(checkpoint):
    """64 of checkpoint_64.pth or checkpoint-64.pth; None of another name."""
    found = NUMBERED.search(checkpoint or "")
    return int(found[1]) if found else None


def facts_in(flags):
    """The facts of a Result that the flags of a run state."""
    share, seed = flags.get("train_fraction"), flags.get("seed")
    return {
        "share": share if isinstance(share, (int, float)) and 0 < share <= 1 else None,
        "seed": seed if isinstance(seed, int) else None,
        "output_dir": str(flags.get("output_dir") or "") or None,
    }


def start_from(checkpoint, epochs=None):
    """The facts of a Result about its start: a checkpoint, "" for random initialisation, anything else if unknown."""
    if not isinstance(checkpoint, str):
        return {}
    if not checkpoint:
        return {"start": "random", "checkpoint": None, "pretraining_epochs": None}
    epochs = epochs if isinstance(epochs, int) else epochs_named(checkpoint)
    return {"start": "pretrained", "checkpoint": checkpoint, "pretraining_epochs": epochs}


# ---- Console logs --------------------------------------------------------------------------------


def read_text(path):
    """The text of a file, damaged bytes replaced. Raises NotALog if it is binary, NoResult if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(HEAD)
            if b"\0" in content:  # perhaps a checkpoint of gigabytes
                raise NotALog("not a text file")
            content += file.read()
    except OSError as error:
        raise NoResult(error.strerror) from None
    return content.decode("utf-8-sig", "replace")


def lines_of(text):
    """[(seconds since midnight or None, text after the clock)] of the lines; of those that mpirun tags, rank 0's."""
    lines = []
    for line in text.splitlines():
        rank = RANK.match(line)
        if rank and int(rank[1]):
            continue
        line = line[rank.end() :] if rank else line
        clock = CLOCK.search(line)
        seconds = int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else None
        lines.append((seconds, line[clock.end() :] if clock else line))
    return lines


def is_training_log(lines):
    """Whether any of `lines_of` a text is one that a training writes."""
    signs = (TRAINING_TIME, SUMMARY, EPOCH, JSON_FLAGS, NAMESPACE)
    return any(seconds is not None or any(sign.search(text) for sign in signs) for seconds, text in lines)


def following(lines, at):
    """The texts of the lines after the one at index `at`, as many as a table or a Namespace may have."""
    return [text for _, text in lines[at + 1 : at + MOST_LINES]]


def read_summary(texts):
    """({metric: value in [0, 1] or None}, number of malformed rows) of the first table in the lines after a summary.

    The table has the columns Metric, Macro and Micro, or Metric and Value for floods. Other columns are ignored.
    """
    header, metrics, malformed, foreign = None, {}, 0, 0
    for text in texts:
        row = TABLE_ROW.fullmatch(text)
        foreign += bool(row is None and text.strip())
        if foreign > FOREIGN or SUMMARY.search(text):
            break
        if row is None:
            continue
        label, *cells = (cell.strip().lower() for cell in row[1].rstrip().rstrip("|").split("|"))
        if header is None:
            header = cells
            continue
        name = TABLE_LABELS.get(label, label)
        keys = [name if column == "value" else f"{name}_{column}" for column in header]
        try:
            found = {key: metric_of(cell) for key, cell in zip(keys, cells, strict=True) if key in METRICS}
            metrics = {**found, **metrics}
        except ValueError:
            malformed += any(key in METRICS for key in keys)
    return metrics, malformed


def _value(text):
    """The string or number that Python prints as `text`; anything else as printed, None of "None"."""
    if text[:1] in ("'", '"'):
        return text[1:-1]
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text


def _namespace(texts):
    """The flags of `Namespace(a=1, b='c')`, which may extend over several lines."""
    flags = {}
    for text in texts:
        flags |= {name: _value(value.strip()) for name, value in NAMESPACE_FLAG.findall(text)}
        if text.rstrip().endswith(")"):
            break
    return flags


def read_console_log(text, source):
    """The Result of a console log. Raises NoResult.

    Of several summaries the last complete one counts: a run may print one at each better epoch, and a continued run
    may append to the same file.
    """
    lines = lines_of(text)
    flags, facts, best, malformed = {}, {}, None, 0
    for at, (_, line) in enumerate(lines):
        ours, theirs = JSON_FLAGS.search(line), NAMESPACE.search(line)
        if ours or theirs:
            try:
                flags = dict(json.loads(ours[1])) if ours else _namespace([theirs[1], *following(lines, at)])
            except (ValueError, TypeError, RecursionError):
                malformed += 1
                continue
            facts |= facts_in(flags)
            # '' is the default of --finetune in the released code, so there a continued run does not say how it began.
            if ours or flags.get("finetune") or not flags.get("resume"):
                facts |= start_from(flags.get("finetune"))
        elif found := START.search(line):
            facts |= start_from(found["ours"] or found["theirs"], found["epochs"] and int(found["epochs"]))
        elif line.strip() == RANDOM_START and not flags:  # otherwise the flags say it
            facts |= start_from("")
        elif found := SPLIT.search(line):
            facts["split"] = found[1]
        elif found := SUMMARY.search(line):
            metrics, odd = read_summary(following(lines, at))
            malformed += odd or not metrics or found[1] is None
            if metrics and (best is None or len(metrics) >= len(best.metrics)):
                best = Result(source, epoch=found[1] and int(found[1]), metrics=metrics, **facts)
    if best:
        return replace(best, malformed=malformed)
    if not is_training_log(lines):
        raise NotALog("holds no line of a training log", malformed)
    raise NoResult("pretraining log" if PRETRAINING in flags else "no Best Results Summary: not finished", malformed)


# ---- Run folders and log.txt ---------------------------------------------------------------------


def log_entries(lines):
    """(epoch, entry) of each line of a log.txt that is not blank; (None, {}) of a line that cannot be read."""
    for line in filter(str.strip, lines):
        try:
            entry = dict(json.loads(line))
            yield whole(entry["epoch"]), entry
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            yield None, {}


def read_epoch_log(text, source):
    """The Result of a finetuning's log.txt: of its best epoch. A later line on the same epoch replaces an earlier one.

    Lines without metrics that are known here count as malformed, except those of pretraining. Raises NoResult.
    """
    results, malformed, pretraining = {}, 0, False
    for epoch, entry in log_entries(text.splitlines()):
        metrics = metrics_in(entry, "test_")
        if metrics:
            results[epoch] = Result(source, epoch=epoch, split=entry.get("evaluated_split"), metrics=metrics)
        elif not entry or any(name.startswith("test_") for name in entry):
            malformed += 1
        else:
            pretraining = True
    if not results:
        raise NoResult("pretraining log" if pretraining else "no epoch with test_ap_macro or test_accuracy", malformed)

    def leading(result):
        value = result.metrics[next(iter(result.task))]
        return -math.inf if value is None else value

    return replace(max(results.values(), key=leading), malformed=malformed)


class RunFolder:
    """A folder that a main program wrote. Raises NoResult if it has no readable run.json with flags.

    record: the content of run.json. flags: those of the last part of the run, if it was continued.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.record = self.read(RECORD)
        self.flags = self.record.get("flags")
        if not isinstance(self.flags, dict):
            raise NoResult(f"{RECORD}: has no flags; not a run folder")
        earlier = self.record.get("earlier")
        parts = [*(earlier if isinstance(earlier, list) else []), self.record]
        self.parts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("flags"), dict)]

    def read(self, name):
        """The JSON object in the file of this name. Raises NoResult."""
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            raise NoResult(f"{name}: does not exist") from None
        except OSError as error:
            raise NoResult(f"{name}: {error.strerror}") from None
        except (ValueError, TypeError, RecursionError):
            raise NoResult(f"{name}: not a JSON object; the file is damaged", malformed=1) from None

    @cached_property
    def finetune(self):
        """The flag --finetune of the first part that has it: a checkpoint, "" for random initialisation; else None."""
        found = (part["flags"].get("finetune") for part in self.parts)
        return next((checkpoint for checkpoint in found if isinstance(checkpoint, str)), None)

    @cached_property
    def origin(self):
        """The checkpoint that the run started from: {"checkpoint", "epochs", "flags"}; {} without a record of it."""
        found = (part.get("initialised_from") for part in self.parts)
        return next((origin for origin in found if isinstance(origin, dict)), {})

    def result(self):
        """The Result of a finetuning. Raises NoResult."""
        if PRETRAINING in self.flags:
            raise NoResult("run folder of a pretraining")
        split = self.flags.get("test_split", "test")
        if split == "none":
            result = read_epoch_log(read_text(self.path / LOG), str(self.path))
        else:
            name = f"eval_{split}.json"
            if not (self.path / name).is_file():
                raise NoResult(f"no {name}: {self.record.get('outcome', 'not finished')}")
            found = self.read(name)
            result = Result(
                str(self.path), epoch=found.get("epoch"), split=found.get("split", split), metrics=metrics_in(found)
            )
            if not result.metrics:
                raise NoResult(f"{name}: has neither ap_macro nor accuracy", malformed=1)
        start = start_from(self.origin.get("checkpoint") or self.finetune, self.origin.get("epochs"))
        return replace(result, **start, **facts_in(self.flags))


# ---- CSV tables ----------------------------------------------------------------------------------


def is_table(text):
    """Whether a text is a CSV table of results."""
    header = next(csv.reader(text[:LONGEST_HEADER].splitlines()[:1]), [])
    return "log" in header and any(name in header for name in METRICS)


def read_table(text):
    """The Results of a CSV file of `table_of`; columns may be missing, and other columns are ignored.

    Metrics and shares above 1 are percentages. The malformed rows are counted in the first Result. Raises NoResult.
    """
    results, malformed = [], 0
    try:
        for row in csv.DictReader(io.StringIO(text)):
            try:
                filled = {name: value.strip() for name, value in row.items() if name and value and value.strip()}
                results.append(_result_of_row(filled))
            except (ValueError, KeyError):
                malformed += 1
    except csv.Error:  # a quote without an end
        malformed += 1
    if not results:
        raise NoResult("a table without a readable row", malformed)
    results[0].malformed = malformed
    return results


def _result_of_row(row):
    """row: the cells that are not empty. Raises ValueError or KeyError."""
    if row.get("start") not in (None, *STARTS):
        raise ValueError(f"{row['start']} is not one of {STARTS}")
    metrics = {name: metric_of(row[name], most=100) for name in METRICS if name in row}
    known = [value for value in metrics.values() if value is not None]
    if not known:
        raise ValueError("a row without metrics")
    scale = 100 if max(known) > 1 else 1
    return Result(
        row["log"],
        row.get("start"),
        row.get("checkpoint"),
        share=share_of(row["share"]) if "share" in row else None,
        split=row.get("split"),
        metrics={name: None if metrics.get(name) is None else metrics[name] / scale for name in task_of(metrics)},
        **{name: whole(row[name]) for name in ("pretraining_epochs", "seed", "epoch") if name in row},
    )


def table_of(results):
    """Results as a DataFrame, whose CSV file `read_table` reads."""
    names = [name for name in METRICS if any(name in result.metrics for result in results)]
    rows = [
        [result.source, *(getattr(result, fact) for fact in FACTS), *map(result.metrics.get, names)]
        for result in results
    ]
    return pd.DataFrame(rows, columns=["log", *FACTS, *names], dtype=object)


# ---- Many ----------------------------------------------------------------------------------------


def find_inputs(paths, pattern="*"):
    """[(path, whether it was named)] of the inputs, files and run folders, each once. Raises DataError.

    Folders are searched recursively, without hidden entries; the shell pattern selects by the names of the files and
    run folders found there. Files that belong to a run folder are not listed.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: does not exist; name logs, run folders, or folders that contain them")
        for entry, named in [(path, True)] if path.is_file() else _search(path, pattern):
            found.setdefault(entry.resolve(), (entry, named))
    return list(found.values())


def _search(folder, pattern):
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        place, is_run = Path(place), RECORD in files
        if is_run and (place == folder or fnmatch.fnmatch(place.name, pattern)):
            yield place, place == folder
        for name in sorted(files):
            own = is_run and any(fnmatch.fnmatch(name, part) for part in OWN_FILES)
            if not (own or name.startswith(".")) and fnmatch.fnmatch(name, pattern) and (place / name).is_file():
                yield place / name, False


def read_input(path, named=True):
    """The Results of a file or run folder. Raises NoResult; NotALog for a table that was not named: it repeats logs."""
    if path.is_dir():
        return [RunFolder(path).result()]
    text = read_text(path)
    if is_table(text):
        if not named:
            raise NotALog("a table, which counts only where it is named")
        return read_table(text)
    epochs = any(line.startswith("{") and '"epoch"' in line for line in text.splitlines())
    reader = read_epoch_log if epochs and "Best Results Summary" not in text else read_console_log
    return [reader(text, str(path))]


def read_results(paths, pattern="*"):
    """([Result], [Skipped]) of the inputs that `find_inputs` lists. Raises DataError.

    In a searched folder, tables and files that are no logs are ignored. A run counts once: the console log of a run
    folder that is listed too is skipped (matched by output_dir, start, share and seed), and so is a log.txt if the
    console log of its run is listed.
    """
    results, skipped = [], []
    for path, named in find_inputs(paths, pattern):
        try:
            results += read_input(path, named)
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
        # The log of a continued part may not say what the run started from.
        unknown = result.start is None
        same_start = twin and (unknown or (result.start, result.checkpoint) == (twin.start, twin.checkpoint))
        if same_start and path.is_file():
            same = all(_same(value, twin.metrics.get(name)) for name, value in result.metrics.items())
            reason = f"log of the run folder {twin.source}"
            reason += "" if same else ", which has other figures: a log of an earlier run?"
        elif path.name == LOG and any(_is_at(path.parent, output_dir) for output_dir in consoles):
            reason = "of a run whose console log is read"
        if reason:
            skipped.append(Skipped(result.source, reason, result.malformed))
        else:
            kept.append(result)
    return kept, skipped


def _same(one, other):
    """Whether two metrics agree to the four digits that a log shows."""
    return one == other or None not in (one, other) and math.isclose(one, other, abs_tol=6e-5)


def _is_at(folder, output_dir):
    """Whether a folder can be an --output_dir, which may be relative to an unknown folder."""
    parts = tuple(part for part in Path(output_dir).parts if part not in ("/", ".."))
    return bool(parts) and folder.resolve().parts[-len(parts) :] == parts
