# SPDX-License-Identifier: MIT
"""Draws a scene, the features of its tiles, its water, and what a pretrained model predicts of a crop.

    python -m analysis.summary_figure scene.tif --units linear --features features.tif --map classes.tif \\
        --checkpoint output/pretrain_simulated/checkpoint.pth --output summary.png

The scene and the crop are false-colour composites (red VV, green VH, blue VV/VH). features.tif comes from
`main_finetune.py --embed`, classes.tif from `main_finetune.py --predict … --output_map`.
"""

import re
from math import ceil
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle

from analysis.figures import COVERED, DOTS, PAGE, bare_image, page_figure, write_figure
from analysis.overview_figure import PIXELS, load_model
from analysis.programs import add_picture_flag
from analysis.scene_map import read_scene_map
from common.command_line import Parser, Range, count, seed
from common.errors import DataError
from engine_pretrain import reconstruct
from sarwmix.geotiff import load_rasterio
from sarwmix.raster import Image, add_reading_flags, find_images, reading_of
from util.quicklook import RANGES, false_colour, grey
from util.scene_pictures import COMPONENT, UNKNOWN, overview, to_colours

MOST_PIXELS = {"scene": 760, "map": 380}  # of the longer side of a scene in the figure
WATER, NOT = {"water", "waters"}, {"no", "non", "not"}  # words in the names of classes of water, and of others
BLUE = (0.13, 0.44, 0.79)  # of water
PALE = 0.45  # of white in the backscatter below the water
SIDE, GAP, HEAD = 3.62, 0.09, 0.25  # of the scene; between panels; of a title, inches
MASK_RATIO = 0.5


# ---- Pictures ------------------------------------------------------------------------------------


def scene_picture(scene):
    """(H, W, 3) false colours of an Overview; pixels without data are white."""
    picture = scene.picture()
    known = np.isfinite(picture).all(0)[..., None]
    return np.where(known, false_colour(np.nan_to_num(picture, nan=RANGES["VH"][0])), UNKNOWN)


def water_picture(scene, found):
    """(H, W, 3): VH backscatter of an Overview in pale grey, with the pixels of water of a Map in blue.

    Raises DataError if the map has no class of water.
    """
    words = [set(re.findall("[a-z]+", name.lower())) for name in found.names]
    classes = [k for k, own in enumerate(words) if own & WATER and not own & NOT]
    if not classes:
        raise DataError(f"--map: none of its classes is water ({', '.join(found.names)}); give a map with water")
    vh = np.nan_to_num(scene.picture()[0], nan=RANGES["VH"][0])
    rows, columns = (
        np.minimum(np.arange(there) * here // there, here - 1) for here, there in zip(found.classes.shape, vh.shape)
    )
    water = np.isin(found.classes, classes)[np.ix_(rows, columns)]
    return np.where(water[..., None], BLUE, grey(vh, "VH") * (1 - PALE) + PALE)


def cut(image, side):
    """(2, n·S, m·S) → windows (n·m, 2, S, S), row by row. side: S."""
    high, wide = (length // side for length in image.shape[1:])
    return image.reshape(2, high, side, wide, side).transpose(1, 3, 0, 2, 4).reshape(-1, 2, side, side)


def joined(windows, wide):
    """(n·m, C, S, S) → (C, n·S, m·S): the inverse of `cut`; wide: m."""
    number, channels, side, _ = windows.shape
    parts = windows.reshape(number // wide, wide, channels, side, side).transpose(2, 0, 3, 1, 4)
    return parts.reshape(channels, number // wide * side, wide * side)


def reconstruction(model, prepare, crop, number):
    """(visible, predicted), (H, W, 3) false colours of a crop (2, H, W) in dB of several windows of the model.

    Each window is mixed with the next, under a mask of its own. number: the seed of the masks.
    """
    side, generator = prepare.input_size, torch.Generator().manual_seed(number)
    windows = torch.from_numpy(cut(crop, side))
    found = [
        reconstruct(model, prepare, torch.stack(pair), model.draw_mask(MASK_RATIO, generator))
        for pair in zip(windows, windows.roll(-1, 0))
    ]
    visible, original, predicted = (
        joined(torch.cat([result[part][:1] for result in found]).numpy(), crop.shape[2] // side)
        for part in ("visible", "original", "predicted")
    )
    return np.where(visible[0][..., None] > 0.5, false_colour(original), COVERED), false_colour(predicted)


# ---- The figure ----------------------------------------------------------------------------------


def draw_summary(panels, place, extents, size):
    """A Figure: the scene on the left, and on the right features, water, and what is visible and predicted of a crop.

    panels: {title: (H, W, 3)} of these five. place: (row, column, side) of the crop. extents: {title: (left, right,
    bottom, top)} in pixels of the scene, of the panels that show all of it. size: (height, width) of the scene.
    """
    small = (SIDE - HEAD) / 2
    width = SIDE + 2 * (small + GAP)
    figure = page_figure((SIDE + HEAD) * PAGE / width)
    scale = PAGE / width  # of all lengths, so that the figure has the width of a page

    def add(x, y, side, title):
        box = (x / width, y * scale / figure.get_figheight(), side / width, side * scale / figure.get_figheight())
        smooth = "antialiased" if len(panels[title]) > side * DOTS else "nearest"
        axis = figure.add_axes(box)
        bare_image(axis, panels[title], title, extent=extents.get(title), interpolation=smooth, aspect="equal")
        if title in extents:
            axis.set(xlim=(0, size[1]), ylim=(size[0], 0))
        return axis

    titles = iter(panels)
    left = add(0, 0, SIDE, next(titles))
    row, column, side = place
    frame = {"fill": False, "edgecolor": "white", "linewidth": 1.8}
    left.add_patch(Rectangle((column, row), side, side, **{**frame, "edgecolor": "black", "linewidth": 3.2}))
    left.add_patch(Rectangle((column, row), side, side, **frame))
    for y in (small + HEAD, 0):
        for x in (SIDE + GAP, SIDE + 2 * GAP + small):
            add(x, y, small, next(titles))
    return figure


def extent_of(scene):
    """(left, right, bottom, top) of an Overview, in pixels of the scene; its last squares may be cut."""
    rows, columns = scene.picture().shape[1:]
    return 0, columns * scene.side, rows * scene.side, 0


def features_picture(image, found):
    """(colours (H, W, 3), extent in pixels of the scene) of a Map of features, continued to the edges of the scene."""
    ours, theirs = (np.array([place[:3], place[3:6], (0, 0, 1)]) for place in (image.transform, found.transform))
    to_scene = np.linalg.inv(ours) @ theirs
    (left, top), (step, down) = to_scene[:2, 2], to_scene.diagonal()[:2]
    colours, known = to_colours(found.bands)
    colours = np.where(known[..., None], colours, UNKNOWN)
    rows, columns = known.shape
    before = [max(0, ceil(edge / size)) for edge, size in ((top, down), (left, step))]
    after = [
        max(0, ceil((length - edge) / size) - number)
        for length, edge, size, number in ((image.height, top, down, rows), (image.width, left, step, columns))
    ]
    colours = np.pad(colours, (*zip(before, after), (0, 0)), mode="edge")
    left, top = left - before[1] * step, top - before[0] * down
    return colours, (left, left + colours.shape[1] * step, top + colours.shape[0] * down, top)


def place_of(args, image, side):
    """(row, column, side) of the crop. Raises DataError if it is not within the scene."""
    side *= args.windows
    row, column = args.place or ((image.height - side) // 2, (image.width - side) // 2)
    if min(row, column) < 0 or row + side > image.height or column + side > image.width:
        raise DataError(
            f"--place {row} {column}: a crop of {side}×{side} pixels there is not within the scene of "
            f"{image.height}×{image.width}; give another place, or fewer --windows"
        )
    return row, column, side


def summarise(args, image):
    """The figure of the files of the flags. Raises DataError and UsageError."""
    features, classes = (
        read_scene_map(path, flag, image, MOST_PIXELS["map"])
        for path, flag in ((args.features, "--features"), (args.map, "--map"))
    )
    if features.bands is None or not all(name.startswith(COMPONENT) for name in features.names):
        raise DataError(f"--features {args.features}: has no {COMPONENT}; give a map of main_finetune.py --embed")
    model, prepare = load_model(args.checkpoint)
    row, column, side = place = place_of(args, image, PIXELS)
    with image.opened() as read:
        visible, predicted = reconstruction(model, prepare, read(row, column, side, side), args.seed)
    scene, coarse = (overview(image, MOST_PIXELS[size]) for size in ("scene", "map"))
    colours, covered = features_picture(image, features)
    panels = {
        "Scene (VV, VH)": scene_picture(scene),
        "Features": colours,
        "Water": water_picture(coarse, classes),
        "Visible to the model": visible,
        "Predicted": predicted,
    }
    extents = dict(zip(panels, (extent_of(scene), covered, extent_of(coarse))))
    return draw_summary(panels, place, extents, (image.height, image.width))


def build_parser():
    parser = Parser(__doc__.splitlines()[0], "analysis.summary_figure")
    parser.add_argument("scene", nargs="+", metavar="SCENE", help="the scene, in one file or two, as of sarwmix.tile")
    add_reading_flags(parser)
    parser.add_argument(
        "--features",
        type=Path,
        required=True,
        metavar="FILE",
        help="features of tiles of the scene, from main_finetune.py --embed",
    )
    parser.add_argument(
        "--map",
        type=Path,
        required=True,
        metavar="FILE",
        help="classes of the pixels of the scene, from main_finetune.py --output_map; one of them is water",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of a pretraining, input size 128")
    parser.add_argument(
        "--place",
        nargs=2,
        type=count,
        metavar=("ROW", "COLUMN"),
        help="upper left pixel of the crop that is reconstructed (default: the crop is in the middle)",
    )
    parser.add_argument(
        "--windows",
        type=Range(int, at_least=2, at_most=16),
        default=6,
        metavar="N",
        help="the crop has N×N windows of the model's input size",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the masks")
    add_picture_flag(parser)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.input_errors():
        load_rasterio()
        images = find_images(args.scene)
        if len(images) > 1:
            raise DataError(f"{len(images)} scenes are given; give one, with its maps")
        figure = summarise(args, Image.find(*images[0], reading_of(args)))
        print("wrote", *write_figure(figure, args.output, colours=256))


if __name__ == "__main__":
    main()
