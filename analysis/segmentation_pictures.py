# SPDX-License-Identifier: MIT
"""Draws what a segmentation model makes of labelled images: image, label, prediction and error, side by side.

    python -m analysis.segmentation_pictures --finetune output/water --data_path DIR --split test --picture errors.png

All images of the split are predicted, and some are drawn: those at equal steps in the order of their accuracy, from the
worst to the best. Takes all flags of `main_finetune.py --eval`.
"""

import re
import sys

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.patches import Patch

from analysis.figures import ORANGE, PURPLE, bare_image, image_grid, write_figure
from analysis.programs import add_picture_flag
from common.command_line import positive_int
from common.errors import DataError
from engine_segment import probabilities
from evaluation import build_trained, open_checkpoint, windows_of
from finetune_flags import build_parser, check_flags
from pretrained import SEGMENTATION, build_preparation, task_of
from util.configuration import can_write, need
from util.datasets import build_dataset, drop_missing
from util.distributed import start_ranks
from util.quicklook import RANGES, false_colour, grey
from util.scene_pictures import FRAME, PLAIN, UNKNOWN, class_colours
from util.sliding import blended

TITLES = ("image (VV, VH)", "label", "prediction", "error")
WRONG = "#C2187A"  # unlike the colours of classes
FAINT = 0.55  # of white in the image below the errors
MOST_LETTERS = 30  # of the name beside an image
MOST_COLUMNS, LINE = 7, 0.2  # of the legend; inches of a line of it


def predicted_classes(model, prepare, image, config, device):
    """(S, S) numbers of the most probable classes of an image (2, S, S) in dB."""
    image = image.to(device)
    with torch.no_grad():
        found = blended(image, lambda windows: probabilities(model, prepare, windows, config.amp), windows_of(config))
    return found.nan_to_num(0).argmax(0).cpu().numpy()


def spread_by_accuracy(dataset, predict, count):
    """[(accuracy, sample, classes (S, S))] of `count` samples at equal steps in the order of their accuracy."""
    found = []
    for i in range(len(dataset)):
        image, mask = dataset[i]
        mask, classes = mask.numpy(), predict(image)
        counts = mask < len(dataset.CLASSES)
        if counts.any():
            found.append((float((mask == classes)[counts].mean()), i, classes))
    found.sort(key=lambda row: row[:2])
    steps = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[k] for k in steps]


def error_kinds(names):
    """{label: colour} of the kinds of errors of these classes."""
    return {f"missed {names[1]}": ORANGE, f"false {names[1]}": PURPLE} if len(names) == 2 else {"wrong": WRONG}


def error_picture(image, mask, classes, names):
    """(S, S, 3) colours of the errors on a faint image. image: (2, S, S) dB. mask, classes: (S, S)."""
    low, _ = RANGES["VV"]
    shown = grey(np.nan_to_num(image[1], nan=low), "VV") * (1 - FAINT) + FAINT
    counts = mask < len(names)
    wrong = counts & (mask != classes)
    where = [wrong & (mask == 1), wrong & (mask == 0)] if len(names) == 2 else [wrong]
    for colour, pixels in zip(error_kinds(names).values(), where):
        shown[pixels] = rgb(colour)
    shown[~counts] = UNKNOWN
    return shown


def short(name):
    """The last parts of the name of a sample, as many as there is room for beside its image."""
    parts = re.split(r"(?<=[_/])", name)
    while len(parts) > 1 and len("".join(parts)) > MOST_LETTERS:
        del parts[0]
    return "".join(parts)[-MOST_LETTERS:]


def rgb(colour):
    return [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]


@rc_context(PLAIN)
def draw(dataset, chosen, note):
    """A Figure with a row for each of `chosen`, of `spread_by_accuracy`."""
    names, colours = dataset.CLASSES, class_colours(dataset.CLASSES) / 255
    labels = [*names, *error_kinds(names), "ignored, no data"]
    columns = min(len(labels), MOST_COLUMNS)
    lines = -(-len(labels) // columns)
    figure, axes = image_grid(len(chosen), len(TITLES), head=0.62 + LINE * lines, left=0.42)
    for number, ((accuracy, i, classes), row) in enumerate(zip(chosen, axes)):
        image, mask = (part.numpy() for part in dataset[i])
        known = np.isfinite(image).all(0)[..., None]
        palette = np.vstack([colours, UNKNOWN])
        panels = (
            np.where(known, false_colour(np.nan_to_num(image)), UNKNOWN),
            palette[np.minimum(mask, len(names))],
            np.where(known, palette[classes], UNKNOWN),
            error_picture(image, mask, classes, names),
        )
        for axis, panel, title in zip(row, panels, TITLES):
            bare_image(axis, panel, "" if number else title)
        row[0].set_ylabel(f"{accuracy:.1%} correct\n{short(str(dataset.ids[i]))}", fontsize=7.5, labelpad=3)
    shown = [*colours, *error_kinds(names).values(), UNKNOWN]
    handles = [Patch(fc=colour, ec=FRAME, lw=0.5, label=label) for label, colour in zip(labels, shown)]
    look = {"frameon": False, "fontsize": 9, "columnspacing": 1.4, "handlelength": 1.6}
    figure.legend(handles=handles, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, 1), **look)
    figure.text(
        0.5,
        1 - (0.22 + LINE * lines) / figure.get_figheight(),
        note,
        ha="center",
        va="center",
        fontsize=9,
        color="0.35",
    )
    return figure


def main(argv=None):
    parser = build_parser("[flags] --finetune RUN --data_path DIR --picture FILE", None)
    parser.prog, parser.description = "python -m analysis.segmentation_pictures", __doc__.splitlines()[0]
    add_picture_flag(parser, "--picture")
    parser.add_argument("--count", type=positive_int, default=4, metavar="N", help="images to draw")
    flags = parser.parse_checked(["--eval", *(sys.argv[1:] if argv is None else argv)], check_flags)
    with parser.input_errors():
        there = flags.picture.parent.is_dir() and can_write(flags.picture)
        need(there, f"--picture {flags.picture}: cannot be written there; name a file in a folder that can be written")
        ranks = start_ranks(flags)
        checkpoint, config, classes = open_checkpoint(flags, ranks)
        if task_of(config) is not SEGMENTATION:
            raise DataError(f"{checkpoint.path}: is not a segmentation model; name a run on masks or sen1floods11")
        dataset = drop_missing(build_dataset(config, supervised=True, classes=classes), config)
        model = build_trained(config, checkpoint).to(ranks.device).eval()
        prepare = build_preparation(config).to(ranks.device)
        chosen = spread_by_accuracy(
            dataset, lambda image: predicted_classes(model, prepare, image, config, ranks.device), config.count
        )
        note = f"{len(chosen)} of {len(dataset)} images of split {config.split}, from the worst to the best"
        write_figure(draw(dataset, chosen, note), config.picture, "--picture", colours=256)


if __name__ == "__main__":
    main()
