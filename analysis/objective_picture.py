# SPDX-License-Identifier: MIT
"""The figure of `analysis.objective_study`: a panel for each task, a dot for each encoder, the same seed joined."""

from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D

from analysis.figures import BLUE, PAGE, VERMILION, bare
from analysis.objective_arms import ARMS, RANDOM, TARGETS, VARIATIONS, name_of
from analysis.objective_results import ARM, METRIC, SEED, TASK, VALUE, order_of
from util.quicklook import new_chart

STYLES = dict(zip(TARGETS, (("o", VERMILION), ("s", BLUE))))  # marker and colour of each target
PLAIN, BASELINE = ("^", "0.25"), ("D", "0.25")  # of other encoders, and of baselines
APART, PAIRED, SINGLE = 0.22, 1.2, 0.62  # from the middle of a row to a target; heights of rows, a third of an inch
HEADS = 1.5  # of the legend and the axis, inches
DEFAULT = "default"  # name of the variation without flags


class Row(NamedTuple):
    """A row of the figure. arms: {name of an arm or baseline: (marker, colour)}, one or two."""

    label: str
    arms: dict


def rows_of(names, study):
    """The Rows of arms and baselines: both targets of a variation are in one row. names: in order."""
    rows = []
    for variation, (label, _) in VARIATIONS.items():
        arms = {name_of(target, variation): style for target, style in STYLES.items()}
        rows.append(Row(label or DEFAULT, {name: style for name, style in arms.items() if name in names}))
    own = {arm.name for arm in study.args.arms}
    for name in names:
        if name not in ARMS:
            label = "random initialisation" if name == RANDOM else name
            rows.append(Row(label, {name: PLAIN if name in own or name == RANDOM else BASELINE}))
    return [row for row in rows if row.arms]


def places_of(rows):
    """The middle of each row, from the top, and the sum of their heights."""
    heights = [PAIRED if len(row.arms) > 1 else SINGLE for row in rows]
    ends = np.cumsum(heights)
    return ends - np.array(heights) / 2, ends[-1]


def kind_of(row):
    """The style of the other encoders or of baselines; None of the arms of TARGETS."""
    style = next(iter(row.arms.values()))
    return style if style in (PLAIN, BASELINE) else None


def draw_row(axis, row, place, values):
    """Draws the dots of a row, their mean, and lines that join the same seed. values: a Series by (arm, seed)."""
    found = {}
    for number, (name, (marker, colour)) in enumerate(row.arms.items()):
        part = values.get(name)
        if part is None:
            continue
        y = place + (APART * (2 * number - 1) if len(row.arms) > 1 else 0)
        found[name] = part, y
        if len(part) > 1:
            axis.plot([part.mean()] * 2, [y - 0.15, y + 0.15], color=colour, lw=2.4, zorder=2)
        axis.plot(part, [y] * len(part), marker, ms=5, mfc="white", mec=colour, mew=1.3, ls="", zorder=3)
    if len(found) > 1:
        (one, above), (other, below) = found.values()
        for number in one.index.intersection(other.index):
            axis.plot([one[number], other[number]], [above, below], color="0.6", lw=0.8, zorder=1)


def draw_study(results, study):
    """The figure: a panel for the first metric of each task. results: of `read_results`."""
    first = results.groupby(TASK, sort=False)[METRIC].first()
    rows = rows_of(order_of(results, study), study)
    places, height = places_of(rows)
    columns = min(len(first), 2)
    lines = -(-len(first) // columns)
    figure = new_chart(PAGE, lines * (height / 3 + 0.5) + HEADS - 0.7)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    for axis, (task, metric) in zip(axes.flat, first.items()):
        part = results[(results[TASK] == task) & (results[METRIC] == metric)]
        values = {name: found.set_index(SEED)[VALUE].dropna() for name, found in part.groupby(ARM)}
        for row, place in zip(rows, places):
            draw_row(axis, row, place, values)
        bare(axis).set_xlabel(f"{task.replace('_', ' ')}: {metric}", fontsize=9.5)
        axis.grid(visible=False, axis="y")
        axis.tick_params(labelsize=9)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.margins(x=0.06)
        axis.locator_params(axis="x", nbins=5)
        for k, edge in enumerate(places[:-1] + np.diff(places) / 2):
            axis.axhline(edge, color="0.9" if kind_of(rows[k]) == kind_of(rows[k + 1]) else "0.5", lw=0.7, zorder=0)
        axis.set_yticks(places, [row.label for row in rows])
        axis.set_ylim(height, 0)
    figure.legend(handles=legend_of(rows), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def legend_of(rows):
    """Handles for what is drawn in the rows."""
    styles = [style for row in rows for style in row.arms.values()]
    handles = [dot(*style, f"{target}: {TARGETS[target][0]}") for target, style in STYLES.items() if style in styles]
    handles += [
        dot(*style, label) for style, label in ((PLAIN, "other encoders"), (BASELINE, "baselines")) if style in styles
    ]
    handles.append(Line2D([], [], color="0.25", marker="|", ms=11, mew=2.4, ls="", label="mean over seeds"))
    if any(len(row.arms) > 1 for row in rows):
        handles.append(Line2D([], [], color="0.6", lw=0.8, label="the same seed"))
    return handles


def dot(marker, colour, label):
    return Line2D([], [], marker=marker, ms=5, mfc="white", mec=colour, mew=1.3, ls="", label=label)
