# SPDX-License-Identifier: MIT
"""A table of finetuned runs, best first, from what they left: eval_<split>.json and run.json.

    python -m analysis.compare_runs --runs output/pretrained_seed0 output/random_seed0 … [--split test] [--output table.csv]
    python -m analysis.compare_runs --runs output/seeds/* --figure seeds.png

Runs whose flags differ in their seeds alone also get a row with the mean and the standard deviation over them; in the figure
they are the dots of one row, and a bar is their mean.
"""

import json
import textwrap
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from analysis.console_log import FLOOD, MULTILABEL
from analysis.figures import dot_plot, write_figure
from common.command_line import Parser
from common.files import write_text

SHOWN = {name: MULTILABEL[name] for name in ("ap_macro", "ap_micro", "f1_macro", "f1_micro")}
# Flags that may differ between runs of one kind: seeds; where a run lies and how it goes on; where and how it is computed, not
# what. Of accum_iter and ranks the product counts, which the global batch tells. At another data_path there may be other data.
FREE = (
    "seed",
    "draw_seed",
    "output_dir",
    "log_dir",
    "overwrite",
    "resume",
    "save_every_steps",
    "save_every_minutes",
    "walltime",
    "log_freq",
    "accum_iter",
    "device",
    "num_workers",
    "pin_mem",
    "data_cache",
    "check_files",
    "dist_eval",
    "compile",
    "grad_checkpointing",
    "world_size",
    "local_rank",
    "dist_on_itp",
    "dist_url",
    "port",
    "dist_timeout",
)
WIDE = 44  # characters of a line of a row's label


def read_run(folder, split):
    """(a row of the table, its kind: the flags and facts that are not free) of one run. Raises ValueError naming what cannot be used."""
    folder = Path(folder)
    record, metrics = (_read(folder / name) for name in ("run.json", f"eval_{split}.json"))
    try:
        # A run that was continued starts from what its first part did.
        flags = {**record["flags"], "finetune": record.get("earlier", [record])[0]["flags"]["finetune"]}
        names = FLOOD if "accuracy" in metrics else SHOWN
        row = {
            "run": folder.name,
            "start": flags["finetune"] or "random",
            "training samples": record["data"]["train"]["samples"],
            "epoch": metrics["epoch"],
            **{shown: _score(metrics[name]) for name, shown in names.items()},
        }
        kind = {name: value for name, value in flags.items() if name not in FREE and value is not None}
        return row, {**kind, "global_batch": record["global_batch"]}
    except KeyError as error:
        raise ValueError(f"{folder}: not a run of main_finetune.py (no {error}); name its --output_dir") from None
    except (TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{folder}: its run.json or eval_{split}.json is not what main_finetune.py writes; name its --output_dir"
        ) from None


def _score(value):
    """A metric, NaN where it is undefined. Raises TypeError."""
    return float("nan") if value is None else value + 0.0


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: does not exist; name the output folders of finetuned runs, and a split they were evaluated on"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the output folders of finetuned runs") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; the run was not finished, or the file is damaged") from None


def group_by_kind(runs):
    """runs: (row, kind) of each. Returns [(kind, DataFrame of its runs)], the kind with the best mean of the first metric first."""
    frame = pd.DataFrame([row for row, _ in runs])
    keys = pd.Series([json.dumps(kind, sort_keys=True) for _, kind in runs])
    groups = [(json.loads(key), rows) for key, rows in frame.groupby(keys, sort=False)]
    first = metrics_of(frame)[0]
    return sorted(groups, key=lambda group: group[1][first].fillna(0).mean(), reverse=True)


def metrics_of(frame):
    return [name for name in (*SHOWN.values(), *FLOOD.values()) if name in frame]


def table_of_runs(runs):
    """runs: (row, kind) of each. Returns (DataFrame of the runs, best first; DataFrame of means over seeds, maybe empty)."""
    frame = pd.DataFrame([row for row, _ in runs])
    metrics = metrics_of(frame)
    means = [
        {
            "mean of": f"{len(rows)} seeds",
            "start": rows["start"].iloc[0],
            "training samples": rows["training samples"].iloc[0],
            **{
                name: f"{rows[name].mean():.4f} ± {rows[name].std():.4f}" if rows[name].notna().all() else None
                for name in metrics
            },
        }
        for _, rows in group_by_kind(runs)
        if len(rows) > 1
    ]
    return frame.sort_values(metrics[0], ascending=False), pd.DataFrame(means)


def short_names(paths):
    """The shortest ends of some paths that tell them apart, as many parts of each."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def describe_kinds(kinds):
    """What each kind has that not all of them have, in a few words: ["random initialisation, lr 0.001", …]."""
    columns = []
    for name in dict.fromkeys(name for kind in kinds for name in kind):
        values = [kind.get(name, "unset") for kind in kinds]
        if any(value != values[0] for value in values):
            texts = sorted({value for value in values if value and isinstance(value, str)})
            short = dict(zip(texts, short_names(texts) if texts else ()))
            columns.append(
                [_words(name, short.get(value, value) if isinstance(value, str) else value) for value in values]
            )
    return [", ".join(words) for words in zip(*columns)]


def _words(name, value):
    if name == "finetune":
        return f"from {value}" if value else "random initialisation"
    parts = value if isinstance(value, list) else [value]
    return " ".join([name, *(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)])


def draw_runs(runs):
    """A dot plot with a row for each kind, the best on top. runs: (row, kind) of each. Returns a Figure."""
    groups = group_by_kind(runs)
    metrics = metrics_of(groups[0][1])
    labels = [textwrap.fill(label, WIDE) for label in describe_kinds([kind for kind, _ in groups])]
    if len(groups) == 1:
        labels = [f"{len(runs)} seeds" if len(runs) > 1 else runs[0][0]["run"]]
    return dot_plot(labels, [rows for _, rows in groups], metrics)


def write_table(frame, path, flag):
    """A DataFrame as CSV, in place only when it is whole. Raises ValueError, naming the flag, if it cannot be written."""
    try:
        write_text(path, frame.to_csv(index=False))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}; name a file in a folder that can be written") from None


def main():
    parser = Parser(__doc__.splitlines()[0], "analysis.compare_runs")
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="DIR", help="output folders of finetuned runs, of one task"
    )
    parser.add_argument("--split", default="test", help="split whose figures are compared")
    parser.add_argument("--output", metavar="CSV", help="also write the rows of the runs here")
    parser.add_argument("--figure", metavar="FILE", help="also draw them, .png or .svg; both are written")
    args = parser.parse_args()
    try:
        runs = [read_run(folder, args.split) for folder in args.runs]
        if len({tuple(row) for row, _ in runs}) > 1:
            raise ValueError("--runs: floods and many labels have no metrics in common; compare them apart")
        frame, means = table_of_runs(runs)
        if args.figure:
            write_figure(draw_runs(runs), args.figure, "--figure")
        if args.output:
            write_table(frame, args.output, "--output")
    except ValueError as error:
        parser.error(str(error))
    for part in (frame, means):
        if len(part):
            part = part.astype(object).where(part.notna(), None)
            print(
                tabulate(part, headers="keys", tablefmt="pipe", floatfmt=".4f", showindex=False, missingval="–"),
                end="\n\n",
            )


if __name__ == "__main__":
    main()
