# SPDX-License-Identifier: MIT
"""The results of `analysis.segmentation_study`: from what runs and baselines leave to tables.

Counts of pixels and scores of images are those of `analysis.segmentation_baselines`. A row of the results is of a
method, a seed (none for baselines) and a group, or of the group "", which is all of them together.
"""

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_auroc

from analysis.paired import difference, paired, spread
from analysis.segmentation_baselines import COLUMNS, COUNTS, HAS, HITS, PIXELS, TAKEN, truth_of
from common.errors import DataError
from common.files import read_json

METHOD, SEED, GROUP, ALL = "method", "seed", "group", ""
IOU, AUC = "IoU", "AUC"
AGAIN = "remove the folder of this run, and start the study again"


# ---- Reading -------------------------------------------------------------------------------------


def read_pixels(runs, name, positive):
    """A row of method, seed, group and COUNTS for each run, from its eval_test.json. Raises DataError."""
    rows = []
    for run in runs:
        content = read_json(run.folder / name, AGAIN)
        try:
            confusion = np.array(content["confusion_matrix"], np.int64)
            hits, taken, has = confusion[positive, positive], confusion[:, positive].sum(), confusion[positive].sum()
        except (KeyError, TypeError, ValueError, IndexError):
            raise DataError(f"{run.folder / name}: has no confusion matrix with this class; {AGAIN}") from None
        rows.append((run.start, run.seed, run.fold.name, hits, taken, has, confusion.sum()))
    return _with_seeds(pd.DataFrame(rows, columns=[METHOD, SEED, GROUP, *COUNTS]))


def read_images(runs, name, positive):
    """A row of method, seed, group, id, HAS, PIXELS and score for each run and image. Raises DataError."""
    frames = []
    for run in runs:
        try:
            table = pd.read_csv(run.folder / name, dtype={"id": str})
            has, taken = (table[f"{kind}: {positive}"] for kind in ("pixels", "predicted"))
            pixels = table.filter(regex="^pixels: ").sum(axis=1)
            frame = pd.DataFrame(
                {"id": table["id"], HAS: has, PIXELS: pixels, "score": taken / pixels.where(pixels > 0)}
            )
        except (OSError, ValueError, KeyError):
            raise DataError(f"{run.folder / name}: is no table of --predictions with this class; {AGAIN}") from None
        frames.append(frame.assign(**{METHOD: run.start, SEED: run.seed, GROUP: run.fold.name}))
    return _with_seeds(pd.concat(frames, ignore_index=True))


def read_baselines(path):
    """The table of `analysis.segmentation_baselines.baselines`, with empty seeds. Raises DataError."""
    text = {"id": str, METHOD: str, GROUP: str}
    try:
        types = dict.fromkeys(COLUMNS, float) | text
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])[COLUMNS]
    except (OSError, ValueError, KeyError):
        raise DataError(f"{path}: is no table of baselines; remove it, and start the study again") from None
    return _with_seeds(table.assign(**{SEED: None}))


def _with_seeds(frame):
    return frame.astype({SEED: "Int64"})


# ---- Figures -------------------------------------------------------------------------------------


def auc_of(images, share):
    """Area under the ROC curve, images with a share of the class against those without any; NaN if undefined."""
    truth = truth_of(images[HAS], images[PIXELS], share)
    scores = images["score"].to_numpy(float)
    known = np.isfinite(truth) & np.isfinite(scores)
    if len(np.unique(truth[known])) < 2:
        return np.nan
    return binary_auroc(torch.from_numpy(scores[known]), torch.from_numpy(truth[known]).long()).item()


def results_of(pixels, images, tested, share):
    """The results: method, seed, group, COUNTS, IoU, and AUC if `share` is given.

    pixels, images: of `read_pixels` and `read_images`. tested: of `read_baselines`. The IoU of a group without a
    pixel of the class is NaN.
    """
    keys = [METHOD, SEED, GROUP]
    counted = pd.concat([pixels, tested[tested[HITS].notna()][[*keys, *COUNTS]]])
    counted = pd.concat([counted, counted.assign(**{GROUP: ALL})])
    results = counted.groupby(keys, sort=False, dropna=False)[COUNTS].sum().reset_index()
    union = results[TAKEN] + results[HAS] - results[HITS]
    results[IOU] = (results[HITS] / union.where(results[HAS] > 0)).astype(float)
    if share is not None:
        scored = pd.concat([images, tested])[[*keys, HAS, PIXELS, "score"]]
        scored = pd.concat([scored, scored.assign(**{GROUP: ALL})])
        rows = [(*key, auc_of(part, share)) for key, part in scored.groupby(keys, sort=False, dropna=False)]
        results = results.merge(_with_seeds(pd.DataFrame(rows, columns=[*keys, AUC])), how="outer", on=keys, sort=False)
        order = {name: k for k, name in enumerate(dict.fromkeys([*pixels[METHOD], *tested[METHOD]]))}
        results = results.sort_values(METHOD, key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return results


def summary_of(results):
    """A row for each method and seed: IoU and AUC of all groups together, and their means over groups."""
    rows = []
    for (method, number), part in results.groupby([METHOD, SEED], sort=False, dropna=False):
        row = {METHOD: method, SEED: number}
        for name in [name for name in (IOU, AUC) if name in results]:
            row[name] = part.loc[part[GROUP] == ALL, name].iloc[0]
            row[f"{name}, mean over groups"] = part.loc[part[GROUP] != ALL, name].mean()
        rows.append(row)
    return _with_seeds(pd.DataFrame(rows))


def metrics_of(summary):
    return [name for name in summary if name not in (METHOD, SEED)]


def means(summary):
    """Mean and standard deviation over seeds, as text, a row for each method."""
    return pd.DataFrame(
        [
            {
                METHOD: name,
                "seeds": rows[SEED].notna().sum() or "–",
                **{m: spread(rows[m]) for m in metrics_of(summary)},
            }
            for name, rows in summary.groupby(METHOD, sort=False)
        ]
    )


def _pair(summary, method, other):
    """The rows of two methods; a baseline, which has no seeds, has one row for each seed of the first."""
    rows, plain = (summary[summary[METHOD] == name] for name in (method, other))
    if plain[SEED].isna().all():
        plain = plain.loc[plain.index.repeat(len(rows))].assign(**{SEED: rows[SEED].to_numpy()})
    return rows, plain


def differences(results, summary, method, other):
    """A row of text: method − other, seed by seed, and the number of groups in which its mean IoU is higher."""
    rows, plain = _pair(summary, method, other)
    groups = results[results[GROUP] != ALL].pivot_table(IOU, GROUP, METHOD, aggfunc="mean")
    groups = groups.reindex(columns=[method, other]).dropna()
    return {
        "difference": f"{method} − {other}",
        **{name: difference(rows, plain, name) for name in metrics_of(summary)},
        "groups with a higher IoU": f"{(groups[method] > groups[other]).sum()} of {len(groups)}",
    }


def indistinct(summary, method, other):
    """Lines about the figures by which two methods cannot be told apart: the interval contains 0, or there is none."""
    rows, plain = _pair(summary, method, other)
    within, alone = [], []
    for name in metrics_of(summary):
        mean, half = paired(rows, plain, name)
        if np.isnan(half) and not np.isnan(mean):
            alone.append(name)
        elif abs(mean) <= half:
            within.append(name)
    reasons = ((within, "the interval contains 0"), (alone, "there is no interval of one seed"))
    return [
        f"{method} and {other} cannot be distinguished by {'; '.join(names)}: {reason}."
        for names, reason in reasons
        if names
    ]


def group_table(results):
    """IoU of each group, mean over seeds, as text: a row for each group, a column for each method."""
    rows = []
    for group, part in results[(results[GROUP] != ALL) & results[PIXELS].notna()].groupby(GROUP):
        counts = part.iloc[0]
        row = {GROUP: group, "pixels": f"{int(counts[PIXELS])}", "share": f"{counts[HAS] / counts[PIXELS]:.3f}"}
        values = part.groupby(METHOD, sort=False)[IOU].mean()
        rows.append(row | {name: "–" if np.isnan(v) else f"{v:.3f}" for name, v in values.items()})
    return pd.DataFrame(rows)
