# SPDX-License-Identifier: MIT
"""Draws a scene beside a map of its tiles: the features or classes that main_finetune.py --embed or --predict wrote.

    python -m analysis.scene_map scene.tif --units linear --map features.tif --output map.png

The scene is a false-colour composite (red VV, green VH, blue VV/VH). Three bands named "principal component" are shown
as red, green and blue; other bands are classes, of which each tile has the colour of the most probable one.
"""

from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from analysis.figures import COLOURS, GREY, new_chart, write_figure
from analysis.programs import add_picture_flag
from common.command_line import Parser
from common.errors import DataError
from sarwmix.geotiff import load_rasterio, opened_geotiff
from sarwmix.raster import Image, add_reading_flags, find_images, reading_of
from util.quicklook import HIDDEN, false_colour

MOST_PIXELS = 520  # of a side of the picture of a scene
COMPONENT = "principal component"
LENGTHS = (100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # of a scale bar, m


def overview(image):
    """A scene averaged in linear power over squares, (2, h, w) in dB, NaN for no data; and their side in pixels."""
    side = max(1, -(-max(image.height, image.width) // MOST_PIXELS))
    high, wide = image.height // side, image.width // side
    if not high * wide:
        raise DataError(
            f"{image.bands[0].path}: of {image.height}x{image.width} pixels is too narrow to be drawn; give a scene "
            f"whose sides differ less, by a factor below {MOST_PIXELS}"
        )
    result = np.full((2, high, wide), np.nan, np.float32)
    with image.opened() as read:
        for row in range(high):
            power = 10 ** (read(row * side, 0, side, wide * side).astype(np.float64) / 10)
            squares = power.reshape(2, side, wide, side)
            known = np.isfinite(squares)
            count, total = known.sum((1, 3)), np.where(known, squares, 0).sum((1, 3))
            result[:, row] = np.where(count, 10 * np.log10(total / np.maximum(count, 1) + 1e-12), np.nan)
    return result, side


def extent(transform, shape):
    """(left, right, bottom, top) of an image of this shape in coordinates. Rotated grids are drawn upright."""
    a, _, c, _, e, f = transform
    return c, c + a * shape[1], f + e * shape[0], f


def to_colours(bands):
    """(3, H, W) → (H, W, 3) in [0, 1], each band between its 2nd and 98th percentile; (H, W) mask of known pixels."""
    known = np.isfinite(bands).all(0)
    low, high = (np.percentile(bands[:, known], q, axis=1)[:, None, None] for q in (2, 98))
    return np.clip((bands - low) / np.maximum(high - low, 1e-9), 0, 1).transpose(1, 2, 0), known


def read_map(path):
    """(bands (K, H, W), their names, transform, crs) of a map. Raises DataError."""
    with opened_geotiff(path) as file:
        names = [name or f"band {k}" for k, name in enumerate(file.descriptions, start=1)]
        return file.read(), names, tuple(file.transform)[:6], file.crs


def draw_map(image, bands, names, transform, crs):
    """A Figure of a scene (Image) and a map beside it."""
    picture, side = overview(image)
    a, b, c, d, e, f = image.transform
    scene_extent = extent((a * side, b, c, d, e * side, f), picture.shape[1:])
    components = len(bands) == 3 and all(name.startswith(COMPONENT) for name in names)
    high, wide = (4.6 * side / max(picture.shape[1:]) for side in picture.shape[1:])
    figure = new_chart(2 * wide + 0.15, high + (0.35 if components else 0.7))
    left, right = figure.subplots(1, 2)
    known = np.isfinite(picture).all(0)
    colours = np.where(known[..., None], false_colour(np.where(known, picture, -30)), np.array(HIDDEN))
    left.imshow(colours, extent=scene_extent, interpolation="nearest")
    left.set_title("scene: red VV, green VH, blue VV/VH", fontsize=10)
    if components:
        shown, known = to_colours(bands)
        right.set_title("features: principal components 1, 2, 3", fontsize=10)
    else:
        best, known = np.argmax(np.nan_to_num(bands, nan=-1), 0), np.isfinite(bands).all(0)
        palette = [*COLOURS, GREY] * (len(bands) // 7 + 1)
        shown = np.array([_rgb(colour) for colour in palette])[best]
        right.set_title("most probable class of each tile", fontsize=10)
        handles = [Patch(color=palette[k], label=names[k]) for k in np.unique(best[known])]
        figure.legend(handles=handles, loc="outside lower right", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    right.imshow(
        np.where(known[..., None], shown, np.array(HIDDEN)),
        extent=extent(transform, bands.shape[1:]),
        interpolation="nearest",
    )
    for axis in (left, right):
        axis.set_xlim(scene_extent[:2])
        axis.set_ylim(scene_extent[2:])
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    if crs is not None and crs.is_projected:
        _scale_bar(left, scene_extent)
    return figure


def _rgb(colour):
    return [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]


def _scale_bar(axis, scene_extent):
    """A bar of about a fifth of the width, with its length; for coordinates in metres."""
    left, right, bottom, top = scene_extent
    length = max((n for n in LENGTHS if n <= (right - left) / 4), default=LENGTHS[0])
    x, y = left + 0.04 * (right - left), bottom + 0.05 * (top - bottom)
    axis.plot([x, x + length], [y, y], color="black", lw=5, solid_capstyle="butt")
    axis.plot([x, x + length], [y, y], color="white", lw=3, solid_capstyle="butt")
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length} m"
    box = {"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 2}
    axis.text(x, y + 0.025 * (top - bottom), text, color="white", fontsize=9, va="bottom", bbox=box)


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.scene_map")
    parser.add_argument("scene", nargs="+", metavar="SCENE", help="the scene, in one file or two, as of sarwmix.tile")
    add_reading_flags(parser)
    parser.add_argument("--map", type=Path, required=True, metavar="FILE", help="GeoTIFF of --embed or --predict")
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        load_rasterio()
        images = find_images(args.scene)
        if len(images) > 1:
            raise DataError(f"{len(images)} scenes are given; give one, with the map of its tiles")
        image = Image.find(*images[0], reading_of(args))
        bands, names, transform, crs = read_map(args.map)
        if not np.isfinite(bands).all(0).any():
            raise DataError(f"--map {args.map}: no pixel has a value; give a map that --embed or --predict wrote")
        if crs is not None and image.crs and load_rasterio().CRS.from_user_input(image.crs) != crs:
            raise DataError(
                f"--map {args.map}: has another coordinate system than the scene; give the map of this scene"
            )
        write_figure(draw_map(image, bands, names, transform, crs), args.output)


if __name__ == "__main__":
    main()
