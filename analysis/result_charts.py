# SPDX-License-Identifier: MIT
"""Charts of finetuning results: results gathered into series, panels for the metrics, axes in powers of two."""

from dataclasses import dataclass
from statistics import fmean

from matplotlib.ticker import NullLocator
from tabulate import tabulate

from analysis.figures import bare, entitle, new_chart
from analysis.runs import FLOOD, MAIN_METRICS, MULTICLASS, SEGMENTATION
from common.errors import DataError

KINDS = (  # title and panels of a task; other results are of many labels
    (FLOOD, "floods", ("accuracy", "f1")),
    (MULTICLASS, "one label", ("accuracy", "f1_macro")),
    (SEGMENTATION, "segmentation", ("iou_macro", "f1_macro")),
)
CLOSEST = 0.35  # octaves between tick labels
LETTERS = 13  # characters of a legend per inch


@dataclass(frozen=True)
class Spread:
    """A metric over the runs of one kind."""

    mean: float
    low: float
    high: float
    runs: int

    def __str__(self):
        return f"{self.mean:.4f}" if self.runs == 1 else f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def spread(results, metric):
    """The Spread of a metric over results; None if no result has it."""
    values = [result.metrics[metric] for result in results if result.metrics.get(metric) is not None]
    return Spread(fmean(values), min(values), max(values), len(values)) if values else None


def gather(results, fact, descending=False):
    """{value of an attribute of Result: [results]}, sorted by value, None last."""
    groups = {}
    for result in results:
        groups.setdefault(getattr(result, fact), []).append(result)
    known = sorted(groups.keys() - {None}, reverse=descending)
    return {value: groups[value] for value in (*known, *(groups.keys() & {None}))}


def metrics_to_draw(results):
    """{metric: label} of the panels. Raises DataError unless all results are of one task and one split."""
    titles = {id(task): title for task, title, _ in KINDS}
    tasks = {titles.get(id(result.task), "many labels"): result for result in results}
    splits = {f"split {result.split}": result for result in results if result.split}
    for kinds in (tasks, splits):
        if len(kinds) > 1:
            raise DataError(
                f"{next(iter(kinds.values())).source}: holds {', other logs hold '.join(kinds)}; draw each in a figure "
                "of its own, see --pattern"
            )
    task = results[0].task
    panels = next((panels for kind, _, panels in KINDS if kind is task), MAIN_METRICS)
    names = [name for name in panels if spread(results, name)]
    if not names:
        raise DataError(f"{results[0].source}: has none of the metrics that are drawn; choose other logs")
    return {name: task[name] for name in names}


def panel_grid(metrics):
    """(Figure, {metric: axis}) with a panel for each metric, two in a row. metrics: {metric: label}."""
    columns, rows = min(len(metrics), 2), (len(metrics) + 1) // 2
    figure = new_chart(5.2 * columns, 2.9 * rows + 1.1)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis, name in zip(axes, metrics.values()):
        bare(axis).set_ylabel(name)
        axis.tick_params(labelsize=9)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    return figure, dict(zip(metrics, axes))


def finish(figure, axes, x_label, title, note):
    """Labels the x axis of the lowest panels, and adds a title and one legend for all panels. Returns the figure."""
    axes = list(axes.values())
    for axis in axes[-2:]:
        axis.set_xlabel(x_label)
        axis.tick_params(labelbottom=True)
    figure.align_ylabels(axes)
    legend = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    longest = max(map(len, legend)) + 8  # 8: about the width of a handle and a gap
    columns = int(LETTERS * figure.get_figwidth()) // longest
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=min(len(legend), max(columns, 1)),
        frameon=False,
        fontsize=9,
        handlelength=3,
    )
    return entitle(figure, title, note)


def draw_series(axis, metric, groups, **style):
    """Draws a line through the means of a metric, with whiskers from minimum to maximum of several runs.

    groups: {x: [results]}. style: keyword arguments of `Axes.plot`.
    """
    found = {x: value for x, results in groups.items() if (value := spread(results, metric))}
    if found:
        axis.plot(list(found), [value.mean for value in found.values()], **style)
    several = {x: value for x, value in found.items() if value.runs > 1}
    if several:
        below = [value.mean - value.low for value in several.values()]
        above = [value.high - value.mean for value in several.values()]
        axis.errorbar(
            list(several),
            [value.mean for value in several.values()],
            [below, above],
            fmt="none",
            ecolor=style["color"],
            capsize=4,
            lw=1.2,
            zorder=1.9,
        )


def octaves(axis, values, show=str):
    """Makes the x axis logarithmic to base 2, with ticks at these values except those whose labels would overlap."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(values) / 2**0.3, max(values) * 2**0.3)
    kept = []
    for value in sorted(values, reverse=True):
        if not kept or kept[-1] / value >= 2**CLOSEST:
            kept.append(value)
    axis.set_xticks(kept, [show(value) for value in kept])
    axis.xaxis.set_minor_locator(NullLocator())


def note_on(groups):
    """The note that says what a point is. groups: the results of each point and line."""
    fewest, most = (choose(map(len, groups)) for choose in (min, max))
    if most == 1:
        return "one run each"
    return f"mean of {most if fewest == most else f'{fewest} to {most}'} runs, with their minimum and maximum"


def print_points(rows, headers, metrics):
    """Prints the points of a figure as a pipe table. rows: [(cells, results of a point)]. metrics: {metric: label}."""
    table = [
        (*cells, len(results), *(str(spread(results, name) or "–") for name in metrics)) for cells, results in rows
    ]
    print(tabulate(table, [*headers, "runs", *metrics.values()], tablefmt="pipe", disable_numparse=True), end="\n\n")


def left_out(results, reason):
    """Lines to print about results that are not drawn."""
    names = [f"- {result.source}" for result in results]
    return [f"{len(results)} results are not drawn: {reason}", *names] if results else []
