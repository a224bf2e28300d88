# SPDX-License-Identifier: MIT
"""How the charts of this folder look, and how they are written: PNG and SVG, in colours that colour-blind people can tell apart.

Pictures of radar images have a style of their own, `sarwmix.quicklook`.
"""
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

# Okabe and Ito's colours. Lines also differ in marker or dashes, so that they can be told apart in grey.
GREY, ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY = "#999999", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
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


def write_figure(figure, path):
    """Write a figure as PNG and SVG, whichever of the two `path` names; returns both paths. Raises ValueError, OSError.

    Text stays text in the SVG, so that it can be searched and edited.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--output {path}: its name must end in .png or .svg; both are written")
    written = [path.with_suffix(kind) for kind in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sarwmix"}):
        for target in written:
            figure.savefig(target, **({"metadata": {"Date": None}} if target.suffix == ".svg" else {}))
    return written
