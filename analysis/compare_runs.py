# SPDX-License-Identifier: MIT
"""A table of finetuned runs, best first, from what they left: eval_<split>.json and run.json.

    python -m analysis.compare_runs --runs output/pretrained_seed0 output/random_seed0 … [--split test] [--output table.csv]

Runs whose flags differ in their seeds alone also get a row with the mean and the standard deviation over them.
"""
import argparse
import json
from pathlib import Path

import pandas as pd
from tabulate import tabulate

MULTILABEL = {"ap_macro": "AP macro", "ap_micro": "AP micro", "f1_macro": "F1 macro", "f1_micro": "F1 micro"}
FLOOD = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
# Flags that may differ between runs of one kind: seeds, and where things lie or how they are computed.
FREE = ("seed", "draw_seed", "output_dir", "log_dir", "overwrite", "resume", "num_workers", "log_freq", "port", "check_files",
        "compile", "grad_checkpointing")


def read_run(folder, split):
    """(a row of the table, the key of its kind) of one run. Raises ValueError naming the file that cannot be used."""
    folder = Path(folder)
    record, metrics = (_read(folder / name) for name in ("run.json", f"eval_{split}.json"))
    try:
        flags, names = record["flags"], FLOOD if "accuracy" in metrics else MULTILABEL
        row = {"run": folder.name, "start": flags["finetune"] or "random", "training samples": record["data"]["train"]["samples"],
               "epoch": metrics["epoch"], **{shown: metrics[name] for name, shown in names.items()}}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a run of main_finetune.py (no {error})") from None
    return row, json.dumps({name: value for name, value in flags.items() if name not in FREE}, sort_keys=True)


def _read(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist; name the output folders of finetuned runs, and a split they were evaluated on") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; the run was not finished, or the file is damaged") from None


def table_of_runs(runs):
    """runs: (row, key) of each. Returns (DataFrame of the runs, best first; DataFrame of means over seeds, maybe empty)."""
    frame = pd.DataFrame([row for row, _ in runs])
    metrics = [name for name in (*MULTILABEL.values(), *FLOOD.values()) if name in frame]
    means = []
    for _, rows in frame.groupby(pd.Series([key for _, key in runs]), sort=False):
        if len(rows) > 1:
            text = {name: f"{rows[name].mean():.4f} ± {rows[name].std():.4f}" for name in metrics}
            means.append({"mean of": f"{len(rows)} seeds", "start": rows["start"].iloc[0], "training samples": rows["training samples"].iloc[0],
                          "_order": rows[metrics[0]].mean(), **text})
    means = pd.DataFrame(means)
    if len(means):
        means = means.sort_values("_order", ascending=False).drop(columns="_order")
    return frame.sort_values(metrics[0], ascending=False), means


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="DIR", help="output folders of finetuned runs, of one task")
    parser.add_argument("--split", default="test", help="split whose figures are compared (default: test)")
    parser.add_argument("--output", metavar="CSV", help="also write the rows of the runs here")
    args = parser.parse_args()
    try:
        runs = [read_run(folder, args.split) for folder in args.runs]
        if len({tuple(row) for row, _ in runs}) > 1:
            raise ValueError("--runs: floods and many labels have no metrics in common; compare them apart")
        frame, means = table_of_runs(runs)
        if args.output:
            frame.to_csv(args.output, index=False)
    except (OSError, ValueError) as error:
        parser.exit(2, f"compare_runs: error: {error}\n")
    for part in (frame, means):
        if len(part):
            print(tabulate(part, headers="keys", tablefmt="pipe", floatfmt=".4f", showindex=False, missingval="–"), end="\n\n")


if __name__ == "__main__":
    main()
