# SPDX-License-Identifier: MIT
"""Draw reconstructions again, or those of several runs side by side, from what `main_pretrain.py --inference` saved.

    python -m analysis.compare_reconstructions --input a/inference/reconstructions.npz b/inference/reconstructions.npz \\
        --output compared.png --samples 0 3
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from analysis.compare_runs import short_names
from analysis.figures import write_figure
from common.command_line import Parser
from sarwmix.quicklook import draw_reconstructions

IMAGES, MASK = ("original", "predicted", "completed"), "visible"


def read_reconstructions(paths):
    """(sample names, {title: result}) of some .npz files, which must be of the same samples. Raises ValueError.

    Titles are those of the checkpoints; where two runs have the same, the folder of the run stands before each.
    """
    files = [read_file(path) for path in paths]
    names = files[0][0]
    for path, (ids, _) in zip(paths, files):
        if ids != names:
            raise ValueError(f"{path}: of other samples than {paths[0]}; use the same data and --inference_samples")
    titles = [title for _, results in files for title in results]
    if len(set(titles)) == len(titles):
        return names, {title: result for _, results in files for title, result in results.items()}
    places = [Path(path).resolve().parent for path in paths]
    runs = short_names([place.parent if place.name == "inference" else place for place in places])
    if len(set(runs)) < len(runs):
        raise ValueError(
            f"{paths[-1]}: is in one folder with another input, and has the same checkpoints; name each once"
        )
    return names, {
        f"{run}/{title}": result for run, (_, results) in zip(runs, files) for title, result in results.items()
    }


def read_file(path):
    """(sample names, {title: result}) of one file. Raises ValueError."""
    try:
        with open(path, "rb") as file, np.load(file) as content:
            arrays = dict(content)
        ids, results = arrays.pop("ids").tolist(), {}
        for key, array in arrays.items():
            title, part = key.rsplit("/", 1)
            results.setdefault(title, {})[part] = array
        for result in results.values():
            side = result[MASK].shape[-2:]
            if result[MASK].shape != (1, 1, *side) or any(
                result[part].shape != (len(ids), 2, *side) for part in IMAGES
            ):
                raise ValueError(result[MASK].shape)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or 'cannot be read'}; name a reconstructions.npz") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        raise ValueError(
            f"{path}: not a file that main_pretrain.py --inference saved, or damaged; make it again"
        ) from None
    if not ids or not results:
        raise ValueError(f"{path}: holds no reconstructions; make it again with main_pretrain.py --inference")
    return ids, results


def main():
    parser = Parser(__doc__.splitlines()[0], "analysis.compare_reconstructions")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="NPZ", help="reconstructions.npz of one or several runs"
    )
    parser.add_argument(
        "--samples", nargs="+", type=int, metavar="I", help="rows to draw, counted from 0; without, all"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="picture to write, .png or .svg; both are written"
    )
    args = parser.parse_args()
    try:
        names, results = read_reconstructions(args.input)
        rows = args.samples or list(range(len(names)))
        if not all(0 <= row < len(names) for row in rows):
            raise ValueError(
                f"--samples {' '.join(map(str, rows))}: there are {len(names)}, counted from 0; choose among them"
            )
        chosen = {
            title: {part: values if part == MASK else values[rows] for part, values in result.items()}
            for title, result in results.items()
        }
        write_figure(draw_reconstructions(chosen, [names[row] for row in rows]), args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
