# SPDX-License-Identifier: MIT
"""Draw reconstructions again, or those of several runs side by side, from what `main_pretrain.py --inference` saved.

    python -m analysis.compare_reconstructions --input a/inference/reconstructions.npz b/inference/reconstructions.npz \\
        --output compared.png --samples 0 3
"""
import argparse
import zipfile

import numpy as np

from sarwmix.quicklook import draw_reconstructions


def read_reconstructions(paths):
    """(sample names, {title: result}) of some .npz files, which must be of the same samples. Raises ValueError."""
    names, results = None, {}
    for path in paths:
        try:
            arrays = np.load(path)
            ids = arrays["ids"].tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise ValueError(f"{path}: not a file that main_pretrain.py --inference saved") from None
        if names not in (None, ids):
            raise ValueError(f"{path}: of other samples than {paths[0]}; use the same data and --inference_samples")
        names = ids
        for key in arrays.files:
            if key != "ids":
                title, part = key.rsplit("/", 1)
                results.setdefault(title, {})[part] = arrays[key]
    return names, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="NPZ", help="reconstructions.npz of one or several runs")
    parser.add_argument("--samples", nargs="+", type=int, metavar="I", help="rows to draw, counted from 0 (default: all)")
    parser.add_argument("--output", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args()
    try:
        names, results = read_reconstructions(args.input)
        rows = args.samples or range(len(names))
        if not all(0 <= row < len(names) for row in rows):
            raise ValueError(f"--samples: there are {len(names)}, counted from 0")
        chosen = {title: {part: values if part == "visible" else values[list(rows)] for part, values in result.items()}
                  for title, result in results.items()}
        draw_reconstructions(chosen, [names[row] for row in rows]).savefig(args.output)
    except ValueError as error:
        parser.exit(2, f"compare_reconstructions: error: {error}\n")


if __name__ == "__main__":
    main()
