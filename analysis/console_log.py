# SPDX-License-Identifier: MIT
"""Console logs of trainings, of these programs or of the released code: their lines, flags, and tables of the best results.

A log is read as far as it can be read. Lines may lack their clock, and may have what mpirun, srun or a shell put before it;
bytes may be damaged. What looks like data and cannot be read is counted as malformed.
"""

import json
import math
import re
from dataclasses import dataclass

# Of an evaluation: as checkpoints and JSON name the metrics, and as tables and axes show them.
MULTILABEL = {
    "ap_macro": "AP macro",
    "ap_micro": "AP micro",
    "f1_macro": "F1 macro",
    "f1_micro": "F1 micro",
    "precision_macro": "precision macro",
    "precision_micro": "precision micro",
}
FLOOD = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}

HEAD = 64  # bytes by which a file that is no text shows it; further on one may be damage
FOREIGN = 3  # lines of others that may stand before and between the rows of a table
MOST_FLAGS = 300  # lines of a Namespace, should its end be missing

# The clock without a fraction: how Python prints a time of exactly 0 µs.
CLOCK = re.compile(r"\[([01]\d|2[0-3]):([0-5]\d):([0-5]\d(?:\.\d{1,6})?)\] ?")
RANK = re.compile(r"\s*\[\S*,(\d+)\]<std(?:out|err)>: ?")  # mpirun --tag-output
JSON_FLAGS = re.compile(r"\bflags: (\{.*)")
NAMESPACE = re.compile(r"\bNamespace\((.*)")
NAMESPACE_FLAG = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,()]+)""")
START = re.compile(
    r"initialised from (?P<ours>.+?)(?: \(epochs: (?P<epochs>\d+)\))?, with a new head"
    r"|Load pre-trained checkpoint from: (?P<theirs>\S+)"
)
NO_START = "random initialisation"
SPLIT = re.compile(r"the figures are of split (\w+)")
SUMMARY = re.compile(r"Best Results Summary\W*(?:Epoch\W*(\d+))?", re.IGNORECASE)
EPOCH = re.compile(r"\bEpoch:? *\[?\d+")
TRAINING_TIME = re.compile(r"Training time (?:(\d+) days?, )?(\d+):([0-5]\d):([0-5]\d)")

TABLE_LINE = re.compile(r"\s*(?:\S+: )?([|+].*)")
BORDER = re.compile(r"[-+|:=\s]+")
FAMILIES = {
    "ap": r"average precision|\bm?ap\b",
    "f1": r"\bf1",
    "precision": r"\bprecision\b",
    "recall": r"\brecall\b",
    "accuracy": r"\bacc(uracy)?\b",
}  # the first that fits counts
AVERAGE = re.compile("macro|micro")
MISSING = ("", "-", "–", "—", "nan", "none", "n/a")


class NoResult(ValueError):
    """A file or folder holds no result; the message is why. malformed: its lines that looked like data and were not."""

    def __init__(self, reason, malformed=0):
        super().__init__(reason)
        self.malformed = malformed


class NotALog(NoResult):
    """The file is nothing that a training writes."""


# ---- Lines ---------------------------------------------------------------------------------------


def read_text(path):
    """A file's text, damaged bytes replaced. Raises NotALog if it is binary, NoResult if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(HEAD)
            if b"\0" in content:  # a checkpoint of gigabytes, perhaps
                raise NotALog("not a text file")
            content += file.read()
    except OSError as error:
        raise NoResult(error.strerror) from None
    return content.decode("utf-8-sig", "replace")


def lines_of(text):
    """[(seconds since midnight or None, what follows the clock)] of each line; where mpirun says whose it is, rank 0's only."""
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
    """Whether anything in them is as a training writes it."""
    signs = (TRAINING_TIME, SUMMARY, EPOCH, JSON_FLAGS, NAMESPACE)
    return any(seconds is not None or any(sign.search(text) for sign in signs) for seconds, text in lines)


# ---- Tables --------------------------------------------------------------------------------------


def _cells(text):
    """The cells of a line of a pipe, grid or psql table: [] of a border, None if it is no line of a table."""
    line = TABLE_LINE.fullmatch(text)
    if line is None:
        return None
    if BORDER.fullmatch(line[1]):
        return []
    return [cell.replace("**", "").strip() for cell in line[1].strip().strip("|").split("|")]


def _rows_after(texts):
    """The rows of the first table, borders left out."""
    rows, foreign = [], 0
    for text in texts:
        cells = _cells(text)
        if cells is None:
            foreign += bool(text.strip())
        if foreign > FOREIGN or SUMMARY.search(text):
            break
        if cells:
            rows.append(cells)
    return rows


def _metric(label):
    """The metric that a label speaks of ("F1 Score macro" → f1_macro), or None."""
    label = re.sub(r"[\W_]+", " ", label.lower())
    family = next((name for name, words in FAMILIES.items() if re.search(words, label)), None)
    average = AVERAGE.search(label)
    return f"{family}_{average[0]}" if family and average else family


def as_number(cell):
    """A cell's value; None where it says that there is none. Raises ValueError."""
    if cell.lower() in MISSING:
        return None
    value = float(cell.rstrip("% "))
    if not math.isfinite(value):
        raise ValueError(f"{cell} is not finite")
    return value


def as_shares(metrics, percent=False):
    """{metric: value in [0, 1] or None}; values in percent, as any above 1 shows, are divided by 100. Raises ValueError."""
    known = [value for value in metrics.values() if value is not None]
    scale = 100 if percent or any(value > 1 for value in known) else 1
    if not all(0 <= value <= scale for value in known):
        raise ValueError("a metric is not between 0 and 1, nor a percentage")
    return {name: None if value is None else value / scale for name, value in metrics.items()}


def read_table_of_metrics(rows):
    """({metric: value in [0, 1] or None}, number of malformed rows) of a table's rows of cells, the header first.

    Metrics may be rows and averages columns, or the other way round, or both stand in one label.
    """
    if not rows:
        return {}, 0
    header, *body = rows
    words = re.compile("|".join((*FAMILIES.values(), AVERAGE.pattern)), re.IGNORECASE)
    # What stands left of the labels is an index.
    labels = next((c for c in range(len(header)) if any(c < len(row) and words.search(row[c]) for row in body)), -1)
    metrics, malformed = {}, 0
    for row in body:
        if len(row) < len(header):
            malformed += any(map(words.search, row))
            continue
        readable = True
        for name, cell in list(zip(header, row))[labels + 1 :]:
            key = _metric(f"{row[labels]} {name}" if labels >= 0 else name)
            if key in MULTILABEL or key in FLOOD:
                try:
                    metrics.setdefault(key, as_number(cell))
                except ValueError:
                    readable = False
        malformed += not readable
    task = MULTILABEL if any(name in MULTILABEL for name in metrics) else FLOOD
    metrics = {name: value for name, value in metrics.items() if name in task}
    try:
        return as_shares(metrics, any("%" in cell for row in rows for cell in row)), malformed
    except ValueError:
        return {}, malformed + 1


# ---- Flags, and the whole log --------------------------------------------------------------------


def _value(text):
    """The string, number or None that a value is printed as; anything else as it is printed."""
    if text == "None":
        return None
    if text[:1] in ("'", '"'):
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _namespace(texts):
    """The flags of `Namespace(a=1, b='c')`, which may take a line for each of them."""
    flags = {}
    for text in texts:
        flags |= {name: _value(value.strip()) for name, value in NAMESPACE_FLAG.findall(text)}
        if text.rstrip().endswith(")"):
            break
    return flags


@dataclass
class ConsoleLog:
    """What a console log says. flags: the last ones; summary: the best results, None if there are none.

    summary: {"start", "checkpoint", "epochs", "flags", "split", "epoch", "metrics"}, the first three as of `analysis.results.Result`.
    """

    flags: dict
    summary: dict | None
    malformed: int


def _start_of(flags, explicit):
    """{"start", "checkpoint", "epochs"} as far as the flag --finetune says it; explicit: whether '' was asked for."""
    finetune = flags.get("finetune")
    if finetune:
        return {"start": "pretrained", "checkpoint": str(finetune), "epochs": None}
    return {"start": "random", "checkpoint": None, "epochs": None} if finetune == "" and explicit else {}


def parse(lines):
    """The ConsoleLog of `lines_of` a text. Of several summaries the last complete one counts: after better epochs, or of
    runs that continued in the same file."""
    state, summary, malformed = {"start": None, "checkpoint": None, "epochs": None, "flags": {}, "split": None}, None, 0
    for at, (_, text) in enumerate(lines):
        if found := JSON_FLAGS.search(text):
            try:
                flags = dict(json.loads(found[1]))
            except (ValueError, TypeError):
                malformed += 1
                continue
            # Ours has no default for --finetune, so that '' was asked for; a continued run may leave it out, and is what it was.
            state |= {"flags": flags, **_start_of(flags, explicit=True)}
        elif found := NAMESPACE.search(text):
            flags = _namespace([found[1], *(text for _, text in lines[at + 1 : at + MOST_FLAGS])])
            state |= {"flags": flags, **_start_of(flags, explicit=not flags.get("resume"))}
        elif found := START.search(text):
            state |= {
                "start": "pretrained",
                "checkpoint": found["ours"] or found["theirs"],
                "epochs": int(found["epochs"]) if found["epochs"] else None,
            }
        elif text.strip() == NO_START and not state["flags"]:  # with flags, they say it
            state |= {"start": "random", "checkpoint": None, "epochs": None}
        elif found := SPLIT.search(text):
            state["split"] = found[1]
        elif found := SUMMARY.search(text):
            metrics, odd = read_table_of_metrics(_rows_after(text for _, text in lines[at + 1 :]))
            malformed += odd or not metrics or found[1] is None
            if metrics and (summary is None or len(metrics) >= len(summary["metrics"])):
                summary = {**state, "epoch": int(found[1]) if found[1] else None, "metrics": metrics}
    return ConsoleLog(state["flags"], summary, malformed)
