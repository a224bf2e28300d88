# SPDX-License-Identifier: MIT
"""Draws the reconstructions of one run again, or of several runs side by side.

    python -m analysis.compare_reconstructions --input a/inference/reconstructions.npz b/inference/reconstructions.npz
    \\
        --output compared.png --samples 0 3

The inputs are files that `main_pretrain.py --inference` saved. The images are drawn as false-colour composites (red VV,
green VH, blue VV/VH).
"""

import re
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from analysis.figures import COVERED, bare_image, image_grid, write_figure
from analysis.programs import add_picture_flag, short_names
from common.command_line import Parser, count
from common.errors import DataError
from util.quicklook import false_colour

IMAGES, MASK = ("original", "predicted", "completed"), "visible"
# Exceptions that reading a damaged or foreign file raises.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, EOFError, NotImplementedError, BadZipFile, zlib.error)


def read_reconstructions(paths):
    """(sample names, {title: result}) of .npz files of the same samples. Raises DataError.

    Titles are the names of the checkpoints, with the run folder in front if two runs have the same.
    """
    files = [read_file(path) for path in paths]
    names = files[0][0]
    for path, (ids, _) in zip(paths, files):
        if ids != names:
            raise DataError(f"{path}: of other samples than {paths[0]}; use the same data and --inference_samples")
    titles = [title for _, results in files for title in results]
    if len(set(titles)) == len(titles):
        return names, {title: result for _, results in files for title, result in results.items()}
    places = [Path(path).resolve().parent for path in paths]
    runs = short_names([place.parent if place.name == "inference" else place for place in places])
    if len(set(runs)) < len(runs):
        raise DataError(
            f"{paths[-1]}: is in one folder with another input, and has the same checkpoints; name each once"
        )
    return names, {
        f"{run}/{title}": result for run, (_, results) in zip(runs, files) for title, result in results.items()
    }


def read_file(path):
    """(sample names, {title: result}) of one file. Raises DataError."""
    try:
        with open(path, "rb") as file, np.load(file) as content:
            arrays = dict(content)
        ids, results = arrays.pop("ids").tolist(), {}
        for key, array in arrays.items():
            title, part = key.rsplit("/", 1)
            results.setdefault(title, {})[part] = array
        for result in results.values():
            side = result[MASK].shape[-2:]
            shapes = [result[part].shape for part in (MASK, *IMAGES)]
            if shapes != [(1, 1, *side), *[(len(ids), 2, *side)] * len(IMAGES)]:
                raise ValueError(shapes)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}; name a reconstructions.npz") from None
    except DAMAGE:
        raise DataError(
            f"{path}: not a file that main_pretrain.py --inference saved, or damaged; make it again"
        ) from None
    if not ids or not results:
        raise DataError(f"{path}: holds no reconstructions; make it again with main_pretrain.py --inference")
    return ids, results


def titled(title):
    """The title of a panel: "checkpoint_11" is "after 11 epochs"; the run folder, if any, is on a line above."""
    run, _, name = title.rpartition("/")
    epoch = re.fullmatch(r"checkpoint_(\d+)", name)
    if epoch:
        name = f"after {int(epoch[1])} epoch{'s' if int(epoch[1]) != 1 else ''}"
    return "\n".join(filter(None, (run, name)))


def draw_comparison(results):
    """Original, visible cells and every cell as predicted, in false colour, an image a row. Returns a Figure.

    results: {title: result} of `read_reconstructions`.
    """
    first = next(iter(results.values()))
    panels = {"original": false_colour_of(first["original"])}
    panels["visible"] = np.where(first[MASK][0, 0, ..., None] > 0.5, panels["original"], COVERED)
    panels |= {titled(title): false_colour_of(result["predicted"]) for title, result in results.items()}
    head = 0.12 + 0.16 * max(title.count("\n") + 1 for title in panels)
    figure, axes = image_grid(len(panels["original"]), len(panels), head)
    for column, (title, images) in zip(axes.T, panels.items()):
        for row, (axis, image) in enumerate(zip(column, images)):
            bare_image(axis, image, title if row == 0 else "")
    return figure


def false_colour_of(images):
    """(N, 2, H, W) dB → (N, H, W, 3): red VV, green VH, blue VV/VH."""
    return np.stack([false_colour(image) for image in images])


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.compare_reconstructions")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="NPZ", help="reconstructions.npz of one or several runs"
    )
    parser.add_argument(
        "--samples", nargs="+", type=count, metavar="I", help="rows to draw, counted from 0 (default: all)"
    )
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        names, results = read_reconstructions(args.input)
        rows = args.samples or list(range(len(names)))
        if max(rows) >= len(names):
            raise DataError(f"--samples {max(rows)}: there are {len(names)}, counted from 0; choose among them")
        chosen = {
            title: {part: values if part == MASK else values[rows] for part, values in result.items()}
            for title, result in results.items()
        }
        write_figure(draw_comparison(chosen), args.output, colours=256)


if __name__ == "__main__":
    main()
