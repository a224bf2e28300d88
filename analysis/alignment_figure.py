# SPDX-License-Identifier: MIT
"""Draws the aligned Sentinel-1 images of one SEN12-FLOOD folder beside the Sentinel-2 image that they are aligned to.

    python -m analysis.alignment_figure --raw_root WORK/raw --aligned WORK/aligned --folder 0002 --output alignment.png

Needs the folders that scripts/prepare_sen12flood.sh keeps with --keep_intermediate. Field borders, shores and roads
must lie at the same place in all panels. The circles mark the same pixels in all panels.
"""

from pathlib import Path

import numpy as np

from analysis.figures import ORANGE, bare_image, image_grid, write_figure
from analysis.programs import add_picture_flag
from common.command_line import Parser
from common.errors import DataError
from sarwmix.geotiff import read_band
from sarwmix.listing import CHANNELS
from sarwmix.prepare.sen12_index import ALIGNED, S1_LIST, read_s1_list
from sarwmix.sen12_data_prep import read_aligned
from util.quicklook import HIDDEN, grey

MOST = 5  # acquisitions in a figure
MARKS = ((0.25, 0.3), (0.7, 0.25), (0.45, 0.55), (0.2, 0.8), (0.75, 0.75))  # shares of height and width


def to_grey(sigma0, channel):
    """(H, W) linear σ⁰ → (H, W, 3) grey; pixels without data have the colour HIDDEN."""
    known = sigma0 > 0
    image = grey(10 * np.log10(np.where(known, sigma0, 1e-6)), channel)
    return np.where(known[..., None], image, np.array(HIDDEN, np.float32))


def stretch(band):
    """(H, W) reflectance → (H, W, 3) grey between its 2nd and 98th percentile; pixels without data are HIDDEN."""
    known = np.isfinite(band)
    low, high = np.percentile(band[known], (2, 98)) if known.any() else (0, 1)
    image = np.clip((band - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, axis=-1)
    return np.where(known[..., None], image, np.array(HIDDEN, np.float32))


def draw_alignment(reference, images):
    """A Figure with B04 and, in a column for each acquisition, VH and VV.

    reference: (H, W) reflectance. images: [(title, (2, H, W) linear σ⁰)].
    """
    figure, axes = image_grid(2, 1 + len(images), head=0.6)
    bare_image(axes[0, 0], stretch(reference), "Sentinel-2 B04,\nreference grid\n")
    for column, (title, values) in zip(axes[:, 1:].T, images):
        for c, (axis, channel) in enumerate(zip(column, CHANNELS)):
            bare_image(axis, to_grey(values[c], channel), "" if c else title)
    for axis, name in zip(axes[:, 1], CHANNELS):
        style = {"va": "top", "fontsize": 10, "weight": "bold", "color": "white"}
        box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 2}
        axis.text(0.04, 0.95, name, transform=axis.transAxes, **style, bbox=box)
    axes[1, 0].axis("off")
    legend = "circles: the same\npixels in all panels\n\nblue: no data"
    axes[1, 0].text(0.5, 0.5, legend, transform=axes[1, 0].transAxes, ha="center", va="center", fontsize=9)
    rows, columns = np.transpose(MARKS) * np.array(reference.shape)[:, None]
    for axis in [axes[0, 0], *axes[:, 1:].flat]:
        axis.plot(columns, rows, "o", ms=9, mfc="none", mec=ORANGE, mew=1.2)
    return figure


def read_folder(raw, aligned, folder):
    """(B04 (H, W), [(title, (2, H, W) linear σ⁰)]) of at most MOST acquisitions, evenly spaced. Raises DataError."""
    rows = [row for row in ALIGNED.read(aligned) if row["folder"] == folder and row["status"] == "aligned"]
    if not rows:
        raise DataError(f"--folder {folder}: has no aligned image in {aligned / ALIGNED.name}; choose another")
    known = {image.name: image for image in read_s1_list(aligned / S1_LIST).get(folder, ())}
    lost = [row["image"] for row in rows if row["image"] not in known]
    if lost:
        raise DataError(
            f"{aligned / S1_LIST}: lacks {folder}/{lost[0]}, which {ALIGNED.name} has; run python -m {ALIGNED.program} "
            "again"
        )
    images = []
    for row in [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, MOST).astype(int))]:
        image, values = known[row["image"]], read_aligned(aligned / folder / f"{row['image']}.tif")
        state = "flooded" if image.flooded else "not flooded"
        empty = (values == 0).mean((1, 2)).max()
        images.append((f"{image.start:%Y-%m-%d}\n{state}\n{empty:.1%} without data", values))
    return read_band(raw / folder / rows[0]["reference"], max_nonfinite=1), images


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.alignment_figure")
    parser.add_argument(
        "--raw_root", type=Path, required=True, help="folder that holds S1list.json and the folders of images"
    )
    parser.add_argument("--aligned", type=Path, required=True, help="folder that sarwmix.sen12_align_s1_to_s2 wrote")
    parser.add_argument("--folder", required=True, help="name of the folder to draw")
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        write_figure(draw_alignment(*read_folder(args.raw_root, args.aligned, args.folder)), args.output, colours=40)


if __name__ == "__main__":
    main()
