# SPDX-License-Identifier: MIT
"""How the charts of this folder look, and how they are written: PNG and SVG, in colours that colour-blind people can tell apart.

Pictures of radar images have a style of their own, `sarwmix.quicklook`.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from common.files import atomic_path

# Okabe and Ito's colours. Lines also differ in marker or dashes, so that they can be told apart in grey.
GREY, ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY = (
    "#999999",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_chart(width, height):
    """An empty figure of this size in inches."""
    figure = Figure((width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def entitle(figure, title, note=""):
    """A title on the left, with a grey note under it. Returns the figure."""
    figure.suptitle(f"{title}\n" if note else title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if note:
        below = figure.transFigure + ScaledTranslation(0, -22 / 72, figure.dpi_scale_trans)
        figure.text(0.01, 1, note, ha="left", va="top", fontsize=9, color="dimgrey", transform=below)
    return figure


def bare(axis):
    """Without the lines on top and on the right, with a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9", lw=0.7)
    axis.set_axisbelow(True)
    return axis


def dot_plot(labels, groups, metrics, title="", note=""):
    """A panel for each metric, a row for each group of runs: a dot for each run, a bar at the mean of several. Returns a Figure.

    labels: of the groups, from the top. groups: a DataFrame each, a row for each run, the metrics in its columns, NaN where a run
    has none; a mean stands only where all have it.
    """
    lines = max(label.count("\n") + 1 for label in labels)
    figure = new_chart(10, 1.2 + (0.5 if title else 0) + len(groups) * max(0.4, 0.19 * lines))
    if title:
        entitle(figure, title, note)
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics):
        bare(axis)
        for place, rows in enumerate(groups):
            (dots,) = axis.plot(
                rows[metric], [place] * len(rows), "o", ms=6, mfc="none", mec=BLUE, mew=1.3, label="a run"
            )
            if len(rows) > 1:
                (mean,) = axis.plot(
                    rows[metric].mean(skipna=False),
                    place,
                    "|",
                    ms=17,
                    mew=2.2,
                    color=VERMILION,
                    label="mean over seeds",
                )
        axis.set_xlabel(metric)
        axis.margins(x=0.12)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(groups)), labels)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    if any(len(rows) > 1 for rows in groups):
        figure.legend(
            handles=[dots, mean],
            loc="outside lower right" if title else "outside upper right",
            ncols=2,
            frameon=False,
            fontsize=9,
            markerscale=0.8,
        )
    return figure


def write_figure(figure, path, flag="--output"):
    """Write a figure as PNG and SVG, whichever of the two `path` names; returns both paths, each in place only when it is whole.

    Text stays text in the SVG, so that it can be searched and edited. Raises ValueError, naming the flag, if it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{flag} {path}: its name must end in .png or .svg; both are written")
    written = [path.with_suffix(kind) for kind in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sarwmix"}):
        for target in written:
            options = {"metadata": {"Date": None}} if target.suffix == ".svg" else {}
            try:
                with atomic_path(target) as temporary:
                    figure.savefig(temporary, format=target.suffix[1:], **options)
            except OSError as error:
                raise ValueError(
                    f"{flag} {target}: {error.strerror}; name a file in a folder that can be written"
                ) from None
    return written
