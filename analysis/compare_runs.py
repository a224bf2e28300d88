# SPDX-License-Identifier: MIT
"""Tabulates finetuned runs, best first, from their eval_<split>.json and run.json.

    python -m analysis.compare_runs --runs output/pretrained_seed0 output/random_seed0 … [--split test] [--output a.csv]
    python -m analysis.compare_runs --runs output/seeds/* --figure seeds.png

Runs whose flags differ only in their seeds are of one kind. The table has a row with the mean and standard deviation of
each kind; the figure has a row for each kind, with a dot for each run and a bar at the mean.
"""

import json
import textwrap

import pandas as pd
from tabulate import tabulate

from analysis.figures import dot_plot, write_figure
from analysis.programs import picture, short_names, write_table
from analysis.runs import MAIN_METRICS, METRICS, NoResult, RunFolder, task_of
from common.command_line import Parser
from common.errors import DataError

# Flags in which runs of one kind may differ: seeds; where a run is stored and how it continues; where and how it is
# computed. Of accum_iter and ranks only the product matters, the global batch. Another data_path may hold other data.
FREE = set(
    "seed draw_seed output_dir log_dir overwrite resume save_every_steps save_every_minutes walltime log_freq "
    "accum_iter device num_workers pin_mem data_cache check_files dist_eval compile grad_checkpointing world_size "
    "local_rank dist_on_itp dist_url port dist_timeout".split()
)
WIDE = 44  # characters of a line of a row's label


def read_run(folder, split):
    """(row of the table, kind: the flags that are not free, and the global batch) of a run. Raises DataError."""
    try:
        run = RunFolder(folder)
        metrics = run.read(f"eval_{split}.json")
        finetune = run.finetune
        names = task_of(metrics) if "accuracy" in metrics else MAIN_METRICS
        row = {
            "run": run.path.name,
            "start": finetune or "random",
            "training samples": run.record["data"]["train"]["samples"],
            "epoch": metrics["epoch"],
            # NaN is undefined
            **{METRICS[name]: float("nan") if metrics[name] is None else metrics[name] + 0.0 for name in names},
        }
        flags = {**run.flags, "finetune": finetune}  # a continued run may not name its start again
        kind = {name: value for name, value in flags.items() if name not in FREE and value is not None}
        return row, {**kind, "global_batch": run.record["global_batch"]}
    except NoResult as error:
        raise DataError(
            f"{folder}/{error}; name the --output_dir of finished runs of main_finetune.py, and a split that they "
            "were evaluated on"
        ) from None
    except KeyError as error:
        raise DataError(f"{folder}: not a run of main_finetune.py (no {error}); name its --output_dir") from None
    except TypeError:
        raise DataError(
            f"{folder}: its run.json or eval_{split}.json is not what main_finetune.py writes; name its --output_dir"
        ) from None


def group_by_kind(runs):
    """[(kind, DataFrame of its runs)], ordered by the mean of the first metric. runs: [(row, kind)] of `read_run`."""
    frame = pd.DataFrame([row for row, _ in runs])
    keys = pd.Series([json.dumps(kind, sort_keys=True) for _, kind in runs])
    groups = [(json.loads(key), rows) for key, rows in frame.groupby(keys, sort=False)]
    first = metrics_of(frame)[0]
    return sorted(groups, key=lambda group: group[1][first].fillna(0).mean(), reverse=True)


def metrics_of(frame):
    return [label for label in METRICS.values() if label in frame]


def mean_and_std(values):
    """Mean and standard deviation as text; None if a value is undefined."""
    return f"{values.mean():.4f} ± {values.std():.4f}" if values.notna().all() else None


def table_of_runs(runs):
    """(DataFrame of the runs, best first; DataFrame of means over seeds, maybe empty). runs: [(row, kind)]."""
    frame = pd.DataFrame([row for row, _ in runs])
    metrics = metrics_of(frame)
    means = [
        {
            "mean of": f"{len(rows)} seeds",
            **rows[["start", "training samples"]].iloc[0],
            **{name: mean_and_std(rows[name]) for name in metrics},
        }
        for _, rows in group_by_kind(runs)
        if len(rows) > 1
    ]
    return frame.sort_values(metrics[0], ascending=False), pd.DataFrame(means)


def describe_kinds(kinds):
    """What distinguishes each kind from the others: ["random initialisation, lr 0.001", …]."""
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
    """A dot plot with a row for each kind, the best on top. runs: [(row, kind)] of `read_run`. Returns a Figure."""
    groups = group_by_kind(runs)
    metrics = metrics_of(groups[0][1])
    labels = [textwrap.fill(label, WIDE) for label in describe_kinds([kind for kind, _ in groups])]
    if len(groups) == 1:
        labels = [f"{len(runs)} seeds" if len(runs) > 1 else runs[0][0]["run"]]
    return dot_plot(labels, [rows for _, rows in groups], metrics)


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.compare_runs")
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="DIR", help="output folders of finetuned runs, of one task"
    )
    parser.add_argument("--split", default="test", help="split whose metrics are compared")
    parser.add_argument("--output", metavar="CSV", help="also write the rows of the runs here")
    parser.add_argument("--figure", type=picture, metavar="FILE", help="also draw them, .png or .svg; both are written")
    args = parser.parse_args(argv)
    with parser.input_errors():
        runs = [read_run(folder, args.split) for folder in args.runs]
        if len({tuple(row) for row, _ in runs}) > 1:
            raise DataError("--runs: floods and multi-label runs have no metrics in common; compare them separately")
        frame, means = table_of_runs(runs)
        if args.figure:
            write_figure(draw_runs(runs), args.figure, "--figure")
        if args.output:
            write_table(frame, args.output)
    for part in (frame, means):
        if len(part):
            part = part.astype(object).where(part.notna(), None)
            print(tabulate(part, "keys", "pipe", floatfmt=".4f", showindex=False, missingval="–"), end="\n\n")


if __name__ == "__main__":
    main()
