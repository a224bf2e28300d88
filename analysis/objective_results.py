# SPDX-License-Identifier: MIT
"""The results of `analysis.objective_study`: from what runs leave to tables.

A row of the results is of a task, an arm, a seed (none for baselines) and a metric.
"""

import numpy as np
import pandas as pd

from analysis.objective_arms import RANDOM
from analysis.objective_tasks import AGAIN, baselines_path, result_path
from analysis.paired import half_width, spread
from analysis.runs import log_entries
from common.errors import DataError
from common.files import read_json

TASK, ARM, SEED, METRIC, VALUE = "task", "arm", "seed", "metric", "value"
COMPARED = {"tiles": 1}  # metrics of a task that are compared, if not all
HEALTH = ("check_loss", "check_constant", "check_between")
LOG = "log.txt"


# ---- Reading -------------------------------------------------------------------------------------


def read_results(study, tasks):
    """(results, contents): a DataFrame, and {(task, arm, seed): what its file holds}. Raises DataError.

    Baselines come last, with seed None.
    """
    rows, contents = [], {}
    for task in tasks:
        for arm, number, _ in study.encoders():
            path = result_path(study.args.output, task.name, arm, number)
            contents[task.name, arm, number] = content = read_json(path, AGAIN)
            rows += rows_of(path, content, (task.name, arm, number))
        path = baselines_path(study.args.output, task.name)
        for method, content in read_json(path, AGAIN).get("methods", {}).items():
            rows += rows_of(path, content, (task.name, method, None))
    return pd.DataFrame(rows, columns=[TASK, ARM, SEED, METRIC, VALUE]).astype({SEED: "Int64", VALUE: float}), contents


def rows_of(path, content, key):
    """Rows of the metrics in a result. Raises DataError."""
    try:
        return [(*key, name, value) for name, value in content["metrics"].items()]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: is no result of a task; {AGAIN}") from None


def read_health(study):
    """A row of ARM, SEED and HEALTH of the last epoch of each pretraining; NaN for what its log.txt does not state."""
    rows = []
    for arm, number, path in study.encoders():
        log = path.with_name(LOG)
        if arm == RANDOM or not log.is_file():
            continue
        entries = [entry for epoch, entry in log_entries(log.read_text(errors="replace").splitlines()) if entry]
        last = entries[-1] if entries else {}
        rows.append((arm, number, *(number_in(last.get(name)) for name in HEALTH)))
    return pd.DataFrame(rows, columns=[ARM, SEED, *HEALTH])


def number_in(value):
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else np.nan


# ---- Tables --------------------------------------------------------------------------------------


def order_of(results, study):
    """The arms and methods of results: arms, random, baselines."""
    arms = [*(arm.name for arm in study.args.arms), RANDOM]
    found = dict.fromkeys(results[ARM])
    return [name for name in arms if name in found] + [name for name in found if name not in arms]


def task_table(results, study):
    """Mean and standard deviation over seeds of the results of one task, as text, a row for each arm and baseline."""
    metrics = list(dict.fromkeys(results[METRIC]))
    wide = wide_table(results)
    rows = []
    for name in order_of(results, study):
        part = wide[wide[ARM] == name]
        seeds = part[SEED].notna().sum() or "–"
        rows.append({ARM: name, "seeds": seeds, **{metric: spread(part[metric]) for metric in metrics}})
    return pd.DataFrame(rows)


def wide_table(results):
    """Results of one task with a row for each arm and seed, and a column for each metric."""
    rows = [
        {ARM: arm, SEED: number, **dict(zip(part[METRIC], part[VALUE]))}
        for (arm, number), part in results.groupby([ARM, SEED], sort=False, dropna=False)
    ]
    return pd.DataFrame(rows).astype({SEED: "Int64"})


def health_table(health, study):
    """Means over seeds, as text, a row for each arm; "–" where a log does not say."""
    names = [arm.name for arm in study.args.arms if arm.name in set(health[ARM])]
    rows = []
    for name in names:
        part = health[health[ARM] == name]
        ratio = part["check_loss"] / part["check_constant"]
        values = {"loss ÷ that of a constant": ratio, "variance between images": part["check_between"]}
        rows.append({ARM: name, "seeds": len(part), **{label: spread(found) for label, found in values.items()}})
    return pd.DataFrame(rows)


# ---- Contrasts -----------------------------------------------------------------------------------


def differences_of(values, contrast):
    """The differences (a Series) of a Contrast. values: a Series by (arm, seed), of one metric."""
    each = [values.get(one, empty()).sub(values.get(other, empty())).dropna() for one, other in contrast.pairs]
    if contrast.pooled:
        return pd.concat(each)
    table = pd.concat(each, axis=1).dropna()
    return table.mean(axis=1)


def empty():
    return pd.Series(dtype=float, index=pd.Index([], dtype="Int64"))


def compare(results, planned):
    """Every planned Contrast of every metric: task, contrast, metric, n, mean, half (of its 95 % interval), seen.

    seen: whether the interval excludes 0; None where there is no interval.
    """
    rows = []
    for (task, metric), part in compared(results).groupby([TASK, METRIC], sort=False):
        values = part.dropna(subset=[SEED]).set_index([ARM, SEED])[VALUE]
        for contrast in planned:
            found = differences_of(values, contrast)
            if len(found):
                half = half_width(found)
                seen = None if np.isnan(half) else bool(abs(found.mean()) > half)
                rows.append((task, contrast.label, metric, len(found), found.mean(), half, seen))
    return pd.DataFrame(rows, columns=[TASK, "contrast", METRIC, "n", "mean", "half", "seen"])


def compared(results):
    """The results of the metrics that are compared."""
    parts = []
    for task, part in results.groupby(TASK, sort=False):
        metrics = list(dict.fromkeys(part[METRIC]))[: COMPARED.get(task)]
        parts.append(part[part[METRIC].isin(metrics)])
    return pd.concat(parts)


def contrast_table(table):
    """Rows of `compare` as text."""
    words = {None: "–", True: "yes", False: "no"}
    return pd.DataFrame(
        {
            "contrast": table["contrast"],
            METRIC: table[METRIC],
            "n": table["n"],
            "difference": [f"{mean:+.3f}" for mean in table["mean"]],
            "smallest visible": ["–" if np.isnan(half) else f"{half:.3f}" for half in table["half"]],
            "distinguishable": [words[seen] for seen in table["seen"]],
        }
    )


def tally(table):
    """A line: how many intervals exclude 0, and how many would by chance."""
    known = table["seen"].notna()
    return (
        f"{int(table.loc[known, 'seen'].astype(bool).sum())} of {known.sum()} intervals exclude 0; if no arm differed "
        f"from another, 5 % of independent ones, {0.05 * known.sum():.1f}, would."
    )
