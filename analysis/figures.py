# SPDX-License-Identifier: MIT
"""The style of the charts of this folder, with colours for colour-blind readers, and their output as PNG and SVG.

Figures of radar images have a style of their own, `util.quicklook`.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from analysis.programs import writing
from common.files import atomic_path
from util.quicklook import new_chart

# Colours of Okabe and Ito. Lines also differ in marker or dashes, so that they differ in greyscale.
GREY, ORANGE, BLUE, GREEN = "#999999", "#E69F00", "#0072B2", "#009E73"
VERMILION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")

COVERED = (0.88, 0.88, 0.88)  # of cells that a model does not see, in false-colour images
PAGE, DOTS = 8.0, 200  # width of a page in inches, and pixels an inch; a web page shows about 100 of them
GAP = 0.06  # between images, inches


def page_figure(height):
    """An empty figure as wide as a page. height: inches."""
    figure = Figure((PAGE, height), dpi=DOTS, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def image_grid(rows, columns, head, left=0.0, right=0.0):
    """A figure as wide as a page with a grid of square axes: (figure, axes (rows, columns)).

    head, left, right: margins for titles and labels, inches.
    """
    side = (PAGE - left - right + GAP) / columns - GAP
    height = head + rows * (side + GAP) - GAP
    figure = page_figure(height)
    places = {"left": left / PAGE, "right": 1 - right / PAGE, "bottom": 0, "top": 1 - head / height}
    grid = {**places, "wspace": GAP / side, "hspace": GAP / side}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)


def bare_image(axis, pixels, title="", **options):
    """Shows an image without ticks and frame. options: of `Axes.imshow`. Returns the AxesImage."""
    image = axis.imshow(pixels, **{"interpolation": "nearest", "aspect": "auto", **options})
    axis.set(xticks=[], yticks=[])
    axis.set_frame_on(False)
    axis.set_title(title, fontsize=9.5, pad=4)
    return image


def entitle(figure, title, note=""):
    """Adds a title on the left, with a grey note below it. Returns the figure."""
    figure.suptitle(f"{title}\n" if note else title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if note:
        below = figure.transFigure + ScaledTranslation(0, -22 / 72, figure.dpi_scale_trans)
        figure.text(0.01, 1, note, ha="left", va="top", fontsize=9, color="dimgrey", transform=below)
    return figure


def bare(axis):
    """Removes the upper and the right spine, and adds a light grid. Returns the axis."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9", lw=0.7)
    axis.set_axisbelow(True)
    return axis


def mark_epochs(axes, marks):
    """Draws a vertical line at each of these epochs in all axes, named above the first of them."""
    for mark in marks:
        for axis in axes:
            axis.axvline(mark, color="0.4", lw=1, ls=":", zorder=1)
        axes[0].annotate(
            f"epoch {mark}",
            (mark, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="0.3",
        )


def dot_plot(labels, groups, metrics, title="", note=""):
    """A panel for each metric with a row for each group of runs: dots are runs, a bar is their mean. Returns a Figure.

    labels: of the groups, from the top. groups: a DataFrame each, with a row for each run and a column for each metric,
    NaN where undefined; the mean is drawn only if all runs have the metric.
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
                mean = rows[metric].mean(skipna=False)
                (bar,) = axis.plot(mean, place, "|", ms=17, mew=2.2, color=VERMILION, label="mean over seeds")
        axis.set_xlabel(metric)
        axis.margins(x=0.12)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(groups)), labels)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    if any(len(rows) > 1 for rows in groups):
        figure.legend(
            handles=[dots, bar],
            loc="outside lower right" if title else "outside upper right",
            ncols=2,
            frameon=False,
            fontsize=9,
            markerscale=0.8,
        )
    return figure


def write_figure(figure, path, flag="--output", colours=None):
    """Writes a figure as PNG and SVG, atomically, whichever of the two `path` names. Returns both paths.

    colours: of the palette of the PNG; 256 make pictures of speckle a third of the size. None: no palette.
    Text stays text in the SVG, so that it can be searched and edited. Raises DataError, naming the flag, if a file
    cannot be written.
    """
    written = [Path(path).with_suffix(kind) for kind in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sarwmix"}):
        for target in written:
            options = {"metadata": {"Date": None}} if target.suffix == ".svg" else {}
            with writing(target, flag), atomic_path(target) as temporary:
                figure.savefig(temporary, format=target.suffix[1:], **options)
                if colours and target.suffix == ".png":
                    reduce_colours(temporary, colours)
    return written


def reduce_colours(path, number):
    """Gives a PNG a palette of at most 256 colours, the means of clusters of its colours."""
    from PIL import Image  # of Pillow, which matplotlib needs

    with Image.open(path) as picture:
        kind = {"method": Image.Quantize.MEDIANCUT, "kmeans": 1, "dither": Image.Dither.NONE}
        reduced = picture.convert("RGB").quantize(number, **kind)
    reduced.save(path, format="png", optimize=True)
