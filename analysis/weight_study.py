# SPDX-License-Identifier: MIT
"""The study of the polarization weights: what encoders pretrained with each kind of weights are worth, as a table and a figure.

    python -m analysis.weight_study output/weight_study --output weight_study.png --table weight_study.csv

It reads a folder of runs, as scripts/weight_study.sh makes it: pretraining runs with a probe.json of `analysis.probe` in them, and
flood classifiers finetuned from them. Runs that share a seed share their initialisation and the order of their samples, so
kinds are compared seed by seed with plain MixMAE, which has no weights.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from analysis.compare_runs import write_table
from analysis.figures import dot_plot, write_figure
from common.command_line import Parser

PROBE = {"ap_macro": "probe: AP macro", "ap_micro": "probe: AP micro", "f1_macro": "probe: F1 macro"}
FLOOD = {"accuracy": "flood: accuracy", "f1": "flood: F1"}
KINDS = [
    ("none", "token"),
    ("none", "pixel"),
    ("shared_avg", "token"),
    ("shared_avg", "pixel"),
    ("per_channel", "token"),
    ("per_channel", "pixel"),
    ("random", ""),
]
PLAIN, RANDOM = "none", "random"
# Flags of pretraining that all runs of a study share.
SHARED = (
    "dataset",
    "data_path",
    "split",
    "model",
    "input_size",
    "epochs",
    "stop_epoch",
    "batch_size",
    "lr",
    "mask_ratio",
    "norm_pix_loss",
    "weight_domain",
    "weight_clip",
    "exp_scale",
)


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"{path}: cannot be read as what a run leaves; remove that run, or let scripts/weight_study.sh do it again"
        ) from None


def read_run(folder):
    """(row, flags of its pretraining or None) of a run of the study; (None, None) of a run that is not finished, or of another kind."""
    record = read_json(folder / "run.json")
    try:
        flags = record["flags"]
        if "weight_mode" in flags:
            if not (folder / "probe.json").exists():
                return None, None
            origin, shown = flags, PROBE
            figures = next(
                result for result in read_json(folder / "probe.json")["results"] if result["method"] == "linear"
            )
        elif flags.get("dataset") == "sen12flood" and (folder / "eval_test.json").exists():
            origin, shown = (record["initialised_from"] or {"flags": None})["flags"], FLOOD
            figures = read_json(folder / "eval_test.json")
        else:
            return None, None
        kind = (RANDOM, "") if origin is None else (origin["weight_mode"], origin["weight_level"])
        row = {
            "weight_mode": kind[0],
            "weight_level": kind[1],
            "seed": flags["seed"],
            **{name: figures[key] for key, name in shown.items()},
        }
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{folder}: is no run of the study (no {str(error) or 'linear probe'}); remove it from there"
        ) from None
    return row, origin and {name: origin.get(name) for name in SHARED}


def read_study(folder):
    """The runs in a folder: a DataFrame with weight_mode, weight_level, seed, a column for each metric; NaN where a run has none.

    Raises ValueError where there are none, or where they were pretrained with other flags than their weights and seeds.
    """
    rows, first = [], None
    for path in sorted(Path(folder).glob("*/run.json")):
        row, shared = read_run(path.parent)
        if row is None:
            continue
        rows.append(row)
        if shared is None:
            continue
        first = first or (path.parent, shared)
        other = [f"{name} {shared[name]} and {first[1][name]}" for name in SHARED if shared[name] != first[1][name]]
        if other:
            raise ValueError(
                f"{path.parent} and {first[0]} are of two studies ({', '.join(other)}); give each a folder of its own"
            )
    if not rows:
        raise ValueError(f"{folder}: no run of a study is there; scripts/weight_study.sh makes one")
    frame = pd.DataFrame(rows).groupby(["weight_mode", "weight_level", "seed"], as_index=False).mean()
    order = {kind: place for place, kind in enumerate(KINDS)}
    places = [order[kind] for kind in zip(frame["weight_mode"], frame["weight_level"])]
    return frame.assign(_place=places).sort_values(["_place", "seed"]).drop(columns="_place").reset_index(drop=True)


def label_of(mode, level):
    return {RANDOM: "random initialisation", PLAIN: "none: plain MixMAE"}.get(mode, f"{mode}, {level}")


def groups_of(frame):
    """[(label, its rows)] in the order of the frame."""
    return [(label_of(*kind), rows) for kind, rows in frame.groupby(["weight_mode", "weight_level"], sort=False)]


def metrics_of(frame):
    return [name for name in (*PROBE.values(), *FLOOD.values()) if name in frame]


def spread(values):
    """ "mean ± standard deviation" over seeds, "–" where a run has no figure."""
    values = values.dropna()
    return "–" if not len(values) else f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def difference(rows, plain, metric):
    """Mean difference from plain MixMAE over the seeds both have, with the half-width of its 95 % interval (Student's t)."""
    pairs = rows.set_index("seed")[metric].sub(plain.set_index("seed")[metric]).dropna()
    if not len(pairs):
        return "–"
    if len(pairs) == 1:
        return f"{pairs.iloc[0]:+.3f}"
    return f"{pairs.mean():+.3f} ± {stats.t.ppf(0.975, len(pairs) - 1) * pairs.std() / np.sqrt(len(pairs)):.3f}"


def tables(frame):
    """(means over seeds, differences from plain MixMAE or an empty frame): two DataFrames of text, a row for each kind."""
    groups, metrics = groups_of(frame), metrics_of(frame)
    means = [
        {"weights": label, "seeds": len(rows), **{name: spread(rows[name]) for name in metrics}}
        for label, rows in groups
    ]
    plain = frame[frame["weight_mode"] == PLAIN].drop_duplicates("seed")
    differences = [
        {"difference from none": label, **{name: difference(rows, plain, name) for name in metrics}}
        for label, rows in groups
        if len(plain) and rows["weight_mode"].iloc[0] != PLAIN
    ]
    return pd.DataFrame(means), pd.DataFrame(differences)


def draw_study(frame, note):
    labels, groups = zip(*groups_of(frame))
    return dot_plot(labels, groups, metrics_of(frame), "Kinds of polarization weights", note)


def main():
    parser = Parser(__doc__.splitlines()[0], "analysis.weight_study")
    parser.add_argument("folder", help="of the runs of one study")
    parser.add_argument("--output", metavar="FILE", required=True, help="figure, .png or .svg; both are written")
    parser.add_argument("--table", metavar="CSV", required=True, help="table to write, a row for each kind and seed")
    parser.add_argument("--note", default="", metavar="TEXT", help="line under the figure's title: data, model, epochs")
    args = parser.parse_args()
    try:
        frame = read_study(args.folder)
        write_figure(draw_study(frame, args.note), args.output)
        write_table(frame, args.table, "--table")
    except ValueError as error:
        parser.error(str(error))
    means, differences = tables(frame)
    print("Mean and standard deviation over seeds:\n")
    print(tabulate(means, headers="keys", tablefmt="pipe", showindex=False, disable_numparse=True))
    if len(differences):
        print("\nDifference from plain MixMAE, seed by seed: mean and half-width of its 95 % interval\n")
        print(tabulate(differences, headers="keys", tablefmt="pipe", showindex=False, disable_numparse=True))


if __name__ == "__main__":
    main()
