# SPDX-License-Identifier: MIT
"""Pictures of radar images as people know them: σ⁰ in dB, in grey, each channel in its own range."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RANGES = {"VH": (-28.0, -8.0), "VV": (-22.0, 0.0)}  # dB shown from black to white
HIDDEN = (0.16, 0.24, 0.36)  # colour of cells that the model does not see


def grey(sar_db, channel, visible=None):
    """(H, W) dB → (H, W, 3) in [0, 1]; with `visible` (H, W), 0 where a pixel was hidden."""
    low, high = RANGES[channel]
    image = np.clip((np.asarray(sar_db, dtype=np.float32) - low) / (high - low), 0, 1)[..., None].repeat(3, axis=-1)
    if visible is not None:
        image = np.where(np.asarray(visible)[..., None] > 0.5, image, np.array(HIDDEN, dtype=np.float32))
    return image


def false_colour(sar_db):
    """(2, H, W) dB, VH and VV → (H, W, 3): red VV, green VH, blue VV/VH, the usual composite."""
    vh, vv = (np.asarray(channel, dtype=np.float32) for channel in sar_db)
    bands = [(vv, *RANGES["VV"]), (vh, *RANGES["VH"]), (vv - vh, 1.0, 14.0)]
    return np.stack([np.clip((band - low) / (high - low), 0, 1) for band, low, high in bands], axis=-1)


def new_chart(width, height):
    """An empty figure; width and height in inches."""
    figure = Figure((width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_figure(rows, columns, cell=1.7, left=0.0, top=0.0, right=0.0, bottom=0.0):
    """A figure with a grid of bare axes: (figure, axes (rows, columns)). cell and the margins: inches."""
    width, height = columns * cell + left + right, rows * cell + top + bottom
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw=dict(
            left=left / width,
            right=1 - right / width,
            bottom=bottom / height,
            top=1 - top / height,
            wspace=0.04,
            hspace=0.04,
        ),
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    return figure, axes


def draw_reconstructions(results, names=None, note=""):
    """Original, visible cells and reconstructions of the same images, VH left and VV right, one image a row.

    results: dict title → result of `engine_pretrain.reconstruct`, all of the same images and mask; the first gives the
    original. One result is drawn as the image with its hidden cells filled in, and as the prediction of every cell;
    of several, the prediction of every cell. names: of the images. note: a line below the heading. Returns a Figure.
    """
    first = next(iter(results.values()))
    panels = [("original", first["original"], None)]
    targets = [result["target"] for result in results.values() if "target" in result]
    panels += [("target, averaged", target, None) for target in _distinct(targets)]
    panels.append(("visible", first["original"], first["visible"][0, 0]))
    if len(results) == 1:
        panels += [
            ("hidden cells predicted", first["completed"], None),
            ("every cell predicted", first["predicted"], None),
        ]
    else:
        panels += [(title.replace("/", "\n"), result["predicted"], None) for title, result in results.items()]
    images = len(first["original"])
    figure, axes = new_figure(images, 2 * len(panels), left=0.25 if names else 0, top=0.8)
    for side, (channel, c) in enumerate((("VH", 0), ("VV", 1))):
        for k, (title, values, visible) in enumerate(panels):
            column = axes[:, side * len(panels) + k]
            column[0].set_title(title, fontsize=8, pad=3)
            for row, axis in enumerate(column):
                axis.imshow(grey(values[row, c], channel, visible), interpolation="nearest")
        low, high = RANGES[channel]
        figure.text(
            (side + 0.5) / 2,
            1 - 0.15 / figure.get_figheight(),
            f"{channel}, {low:g} … {high:g} dB",
            ha="center",
            va="center",
            fontsize=10,
            weight="bold",
        )
    for row, name in enumerate(names or ()):
        axes[row, 0].set_ylabel("_".join(name.split("_")[-3:]), fontsize=7, labelpad=3)  # tile and place of a patch
    if note:
        figure.text(0.5, 1 - 0.36 / figure.get_figheight(), note, ha="center", va="center", fontsize=7.5, color="0.35")
    return figure


def _distinct(arrays):
    kept = []
    for array in arrays:
        if not any(np.array_equal(array, other) for other in kept):
            kept.append(array)
    return kept


def pixels(figure):
    """A figure as an array (H, W, 3) uint8, for TensorBoard."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
