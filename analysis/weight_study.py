# SPDX-License-Identifier: MIT
"""Tabulates and draws the study of the polarization weights: the quality of encoders pretrained with each kind.

    python -m analysis.weight_study output/weight_study --output weight_study.png --table weight_study.csv

Reads the folder of runs that scripts/weight_study.sh makes: pretraining runs, each with a probe.json of
`analysis.probe`, and flood classifiers finetuned from them. Runs with the same seed share their initialisation and the
order of their samples, so each kind is compared seed by seed with plain MixMAE, which has no weights.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from analysis.figures import dot_plot, write_figure
from analysis.programs import add_picture_flag, write_table
from analysis.runs import FLOOD, MULTILABEL, NoResult, RunFolder
from common.command_line import Parser
from common.errors import DataError

PROBE_METRICS = {name: f"probe: {MULTILABEL[name]}" for name in ("ap_macro", "ap_micro", "f1_macro")}
FLOOD_METRICS = {name: f"flood: {FLOOD[name]}" for name in ("accuracy", "f1")}
PLAIN, RANDOM = "none", "random"
KINDS = [*product((PLAIN, "shared_avg", "per_channel"), ("token", "pixel")), (RANDOM, "")]  # in the order of the table
# Flags of pretraining that are the same in all runs of a study.
SHARED = (
    "dataset data_path split model input_size epochs stop_epoch batch_size lr mask_ratio norm_pix_loss weight_domain "
    "weight_clip exp_scale".split()
)


def read_run(folder):
    """(row, flags of its pretraining or None) of a run of the study; (None, None) of an unfinished or another run."""
    try:
        run = RunFolder(folder)
        if "weight_mode" in run.flags:
            if not (folder / "probe.json").exists():
                return None, None
            origin, labels = run.flags, PROBE_METRICS
            metrics = next(found for found in run.read("probe.json")["results"] if found["method"] == "linear")
        elif run.flags.get("dataset") == "sen12flood" and (folder / "eval_test.json").exists():
            origin, labels = run.origin.get("flags"), FLOOD_METRICS
            metrics = run.read("eval_test.json")
        else:
            return None, None
        kind = (RANDOM, "") if origin is None else (origin["weight_mode"], origin["weight_level"])
        row = {"weight_mode": kind[0], "weight_level": kind[1], "seed": run.flags["seed"]}
        row |= {label: metrics[name] for name, label in labels.items()}
    except NoResult as error:
        raise DataError(f"{folder}/{error}; remove that run, or let scripts/weight_study.sh do it again") from None
    except (KeyError, TypeError, StopIteration) as error:
        raise DataError(
            f"{folder}: is no run of the study (no {str(error) or 'linear probe'}); remove it from there"
        ) from None
    return row, origin and {name: origin.get(name) for name in SHARED}


def read_study(folder):
    """The runs in a folder: a DataFrame with weight_mode, weight_level, seed and the metrics, NaN if absent.

    Raises DataError if there are none, or if they were pretrained with flags that differ in more than weights and seed.
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
            raise DataError(
                f"{path.parent} and {first[0]} are of two studies ({', '.join(other)}); give each a folder of its own"
            )
    if not rows:
        raise DataError(f"{folder}: no run of a study is there; scripts/weight_study.sh makes one")
    frame = pd.DataFrame(rows).groupby(["weight_mode", "weight_level", "seed"], as_index=False).mean()
    places = [(KINDS.index((row.weight_mode, row.weight_level)), row.seed) for row in frame.itertuples()]
    return frame.iloc[sorted(range(len(frame)), key=places.__getitem__)].reset_index(drop=True)


def label_of(mode, level):
    return {RANDOM: "random initialisation", PLAIN: "none: plain MixMAE"}.get(mode, f"{mode}, {level}")


def groups_of(frame):
    """[(label, its rows)] in the order of the frame."""
    return [(label_of(*kind), rows) for kind, rows in frame.groupby(["weight_mode", "weight_level"], sort=False)]


def metrics_of(frame):
    return [name for name in (*PROBE_METRICS.values(), *FLOOD_METRICS.values()) if name in frame]


def spread(values):
    """Mean and standard deviation over seeds, as text; "–" without values."""
    values = values.dropna()
    return "–" if not len(values) else f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def paired(rows, plain, metric):
    """(mean difference over common seeds, half-width of its 95 % interval by Student's t); NaN where undefined."""
    pairs = rows.set_index("seed")[metric].sub(plain.set_index("seed")[metric]).dropna()
    if len(pairs) < 2:
        return pairs.mean(), np.nan
    return pairs.mean(), stats.t.ppf(0.975, len(pairs) - 1) * pairs.std() / np.sqrt(len(pairs))


def difference(rows, plain, metric):
    """`paired` as text; "–" without a common seed."""
    mean, half = paired(rows, plain, metric)
    return "–" if np.isnan(mean) else f"{mean:+.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")


def tables(frame):
    """(means over seeds, differences from plain MixMAE, maybe empty): DataFrames of text with a row for each kind."""
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


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.weight_study")
    parser.add_argument("folder", help="folder of the runs of one study")
    add_picture_flag(parser)
    parser.add_argument("--table", metavar="CSV", required=True, help="table to write, a row for each kind and seed")
    parser.add_argument("--note", default="", metavar="TEXT", help="line under the figure's title: data, model, epochs")
    args = parser.parse_args(argv)
    with parser.input_errors():
        frame = read_study(args.folder)
        write_figure(draw_study(frame, args.note), args.output)
        write_table(frame, args.table, "--table")
    means, differences = tables(frame)
    print("Mean and standard deviation over seeds:\n")
    print(tabulate(means, headers="keys", tablefmt="pipe", showindex=False, disable_numparse=True))
    if len(differences):
        print("\nDifference from plain MixMAE, seed by seed: mean and half-width of its 95 % interval\n")
        print(tabulate(differences, headers="keys", tablefmt="pipe", showindex=False, disable_numparse=True))


if __name__ == "__main__":
    main()
