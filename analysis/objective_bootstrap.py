# SPDX-License-Identifier: MIT
"""Differences between arms of `analysis.objective_study` if other places had been tested on, by drawing them again."""

import numpy as np
import pandas as pd

from analysis.objective_places import iou
from analysis.objective_probes import area
from analysis.segmentation_baselines import COUNTS

DRAWS, SEED = 1000, 0
UNITS = {"water": ("groups", "IoU"), "tiles": ("tiles", "AUC")}  # task → (what is drawn, what is measured)


def draws_of_water(results):
    """(DRAWS,) differences of IoU, mean over seeds, whole groups drawn with replacement.

    results: [(result, result of the other arm)], one for each seed.
    """
    names = list(results[0][0]["groups"])
    counts = np.array(  # (seeds, 2, groups, COUNTS)
        [[[list(map(r["groups"][name].get, COUNTS)) for name in names] for r in pair] for pair in results], float
    )
    drawn = np.random.default_rng(SEED).integers(0, len(names), (DRAWS, len(names)))
    found = iou(counts[:, :, drawn].sum(3))  # (seeds, 2, DRAWS)
    return (found[:, 0] - found[:, 1]).mean(0)


def draws_of_tiles(results):
    """As `draws_of_water`, of the mean AUC over groups; tiles are drawn with replacement within each group."""
    groups = [name for name, part in results[0][0]["groups"].items() if len(set(part["labels"])) == 2]
    generator, differences = np.random.default_rng(SEED), np.full(DRAWS, 0.0 if groups else np.nan)
    for name in groups:
        labels = np.array(results[0][0]["groups"][name]["labels"])
        scores = [[np.array(r["groups"][name]["scores"]) for r in pair] for pair in results]
        for k in range(DRAWS):
            rows = generator.integers(0, len(labels), len(labels))
            one, other = (np.mean([area(pair[i][rows], labels[rows]) for pair in scores]) for i in (0, 1))
            differences[k] += (one - other) / len(groups)
    return differences


def draws_table(contents, planned, seeds):
    """A row of text for each main Contrast and real task: the 95 % interval (percentiles) of the draws.

    contents: of `objective_results.read_results`. Draws without a positive pixel, or with tiles of one kind alone, are
    left out.
    """
    rows = []
    for task, (unit, metric) in UNITS.items():
        for contrast in (c for c in planned if c.main):
            keys = [[(task, arm, number) for arm in contrast.pairs[0]] for number in seeds]
            results = [[contents[key] for key in pair] for pair in keys if set(pair) <= set(contents)]
            if not results:
                continue
            draws = (draws_of_water if task == "water" else draws_of_tiles)(results)
            draws = draws[np.isfinite(draws)]
            if not len(draws):
                continue
            low, high = np.percentile(draws, [2.5, 97.5])
            excludes = "yes" if low > 0 or high < 0 else "no"
            interval = f"{low:+.3f} to {high:+.3f}"
            rows.append((task, contrast.label, metric, unit, f"{draws.mean():+.3f}", interval, excludes))
    columns = ["task", "contrast", "metric", "drawn again", "mean", "95 % interval", "distinguishable"]
    return pd.DataFrame(rows, columns=columns)
