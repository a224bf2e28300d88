# SPDX-License-Identifier: MIT
"""Writes the images of four public sets as tiles of VV and VH in dB, to pretrain on (docs/YOUR_DATA.md).

    python -m sarwmix.prepare.public_sets --out DIR --porto_alegre DIR --opera_rtc DIR
    python -m sarwmix.prepare.public_sets --out DIR --porto_alegre DIR --opera_rtc DIR --etci2021 DIR --masks DIR

DIR holds <set>/<tile>.tif, float32 with the bands VV and VH, and metadata.csv (id, group, source, values), which is
written last. --dataset chips reads it. After an interruption, the same command begins again; the result is byte for
byte the same for any number of processes.

The values of ETCI 2021 are not absolute: they are linear in dB, with a scale of their own in each scene and channel.
Each channel of each scene is mapped linearly to a stated mean and standard deviation, and its tiles are marked as
`relative` in the column `values`. Neither weights from linear backscatter nor means of linear power make sense there.
"""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from common.command_line import Parser, Range, finite, positive, positive_int
from common.errors import DataError, UsageError, data_error, listed, quoted
from common.files import claimed, write_csv
from common.workers import add_workers_flag, run_command
from sarwmix.geotiff import write_geotiff
from sarwmix.listing import check_root
from sarwmix.masks import IMAGES as IMAGE_FOLDER
from sarwmix.masks import LEGEND, Sen1Floods11
from sarwmix.masks import MASKS as MASK_FOLDER
from sarwmix.moments import Moments
from sarwmix.packed_store import MOST_SIDE
from sarwmix.prepare.public_images import BAD_LABELS, ETCI, SETS, count_numbers, gains_of, label_of, read_label

METADATA, RECORD = "metadata.csv", "public_sets.json"
VERSION = 1  # of the output; to be raised if the tiles of given images change
MOST_ENLARGED = 2  # largest factor by which the side of an image is enlarged

log = logging.getLogger(__name__)


# ---- Tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Side of tiles in pixels, and the share of pixels without data above which a tile is left out."""

    size: int
    max_nodata: float

    def read(self, image):
        """The values of an image, at least `size` pixels high and wide: see `enlarged`. Raises DataError."""
        values = image.read()
        shorter = min(values.shape[1:])
        if shorter * MOST_ENLARGED < self.size:
            raise DataError(
                f"{image.paths[0]}: is {values.shape[1]}x{values.shape[2]} pixels, too few for tiles of --size "
                f"{self.size}; choose a smaller --size"
            )
        return values if shorter >= self.size else enlarged(values, self.size / shorter)

    def tiles(self, values):
        """Yields (row, column, tile) of an image, side by side; the rest at its right and lower edge is not used."""
        high, wide = (n // self.size for n in values.shape[1:])
        for row in range(0, high * self.size, self.size):
            for column in range(0, wide * self.size, self.size):
                yield row, column, values[:, row : row + self.size, column : column + self.size]


def enlarged(image_db, factor):
    """An image in dB, (2, H, W) float32, with `factor` times as many pixels on each side, bilinear in linear power.

    Pixels without data do not count; there is no data where they have more than half of the weight.
    """
    power = 10 ** (image_db.astype(np.float64) / 10)
    data = np.isfinite(power)
    stack = torch.from_numpy(np.concatenate([np.where(data, power, 0), data]))[None]
    size = [round(side * factor) for side in image_db.shape[1:]]
    total, weight = (
        functional.interpolate(stack, size, mode="bilinear", align_corners=False)[0].numpy().reshape(2, 2, *size)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight >= 0.5, 10 * np.log10(total / weight), np.nan).astype(np.float32)


def write_values(folder, name, values, kind):
    """Writes (2, H, W) float32, order VH, VV, as <name>.tif with the bands VV and VH, into a folder that is made."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tif"
    write_geotiff(path, values[::-1], ("VV", "VH"), {"UNITS": kind}, nodata=np.nan, compress="deflate")


class Written(NamedTuple):
    """What became of an image: rows of METADATA, tiles that were left out, and whether it has any data."""

    rows: list
    left_out: int
    has_data: bool


def write_tiles(image, out, cut):
    """Writes the tiles of an image. Returns Written. Raises DataError."""
    values, rows, left_out = cut.read(image), [], 0
    if np.isnan(values).all():
        return Written([], 0, False)
    for row, column, tile in cut.tiles(values):
        if np.isnan(tile).any(0).mean() > cut.max_nodata:
            left_out += 1
            continue
        name = f"{image.name}_r{row:04d}_c{column:04d}"
        write_values(out / image.source, name, tile, image.values)
        rows.append((name, image.group, image.source, image.values))
    return Written(rows, left_out, True)


def write_masked(image, out):
    """Writes a whole image of ETCI 2021 and its mask. Returns Written, without a tile if there are no data."""
    values, label = image.read(), read_label(image)
    if np.isnan(values).any(0).all():
        return Written([], 0, False)
    write_values(out / IMAGE_FOLDER, image.name, values, image.values)
    (out / MASK_FOLDER).mkdir(exist_ok=True)
    write_geotiff(out / MASK_FOLDER / f"{image.name}.tif", label, compress="deflate")
    return Written([(image.name, image.group, image.source, image.values)], 0, True)


# ---- All sets ------------------------------------------------------------------------------------


def find_all(folders):
    """The PublicImages in {set: folder}. Raises DataError."""
    found = []
    for source, folder in folders.items():
        if not Path(folder).is_dir():
            raise DataError(f"--{source} {folder}: there is no such folder; correct the path")
        images = SETS[source].find(check_root(folder))
        if not images:
            raise DataError(f"--{source} {folder}: holds none of the {SETS[source].about}; correct the path")
        found += images
    twice = [name for name, number in Counter(image.name for image in found).items() if number > 1]
    if twice:
        raise data_error(
            f"{len(twice)} images have the name of another", twice, "remove the files that are there twice"
        )
    return found


def without(images, exclude):
    """The images without those that `exclude` names by image or group. Raises DataError."""
    known = {name for image in images for name in (image.name, image.group)}
    unknown = [quoted(name) for name in exclude if name not in known]
    if unknown:
        raise data_error(
            f"--exclude: {len(unknown)} names are those of no image and no group",
            unknown,
            f"correct them; groups are {listed(sorted({image.group for image in images}), 20)}",
        )
    kept = [image for image in images if image.name not in exclude and image.group not in exclude]
    if not kept:
        raise DataError("--exclude: leaves no image; name fewer")
    if exclude:
        log.info("--exclude: %d of %d images are left out", len(images) - len(kept), len(images))
    return kept


def moments_of(image, cut):
    """The Moments of an image, as a dict."""
    moments = Moments()
    moments.add(cut.read(image))
    return moments.to_dict()


def aim_of(images, cut, args, workers):
    """Mean and standard deviation, ((VH, VV), (VH, VV)), that ETCI 2021 is mapped to. Raises DataError."""
    if args.etci_mean:
        return tuple(args.etci_mean), tuple(args.etci_std)
    total = Moments()
    for part in workers.map(partial(moments_of, cut=cut), images, "images measured"):
        total.merge(Moments.from_dict(part))
    figures = total.summary()
    if None in figures["mean"]:
        raise DataError("the sets beside etci2021 have no data, or are excluded; give --etci_mean and --etci_std")
    return tuple(figures["mean"]), tuple(figures["std"])


def with_gains(images, aim, workers):
    """Images of ETCI 2021 with the gains of their scenes. Raises DataError."""
    counts = defaultdict(lambda: np.zeros((2, 256), np.int64))
    for image, found in zip(images, workers.map(count_numbers, images, "ETCI 2021 images measured")):
        counts[image.group] += found
    gains = {scene: gains_of(found, *aim, scene) for scene, found in counts.items()}
    return [replace(image, gains=gains[image.group]) for image in images]


def record_of(images):
    """What decides the content of an output folder, as plain values."""
    files = [
        (image.source, image.name, image.gains, [os.path.getsize(path) for path in image.paths]) for image in images
    ]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    counts = Counter(image.source for image in images)
    return {"generator": "sarwmix.prepare.public_sets", "version": VERSION, "images": counts, "sha256": digest}


def write_folder(flag, out, images, write, workers, content):
    """Writes images into `out` by write(image, out) → Written, and METADATA. Raises DataError if there is nothing.

    flag: how the user named the folder. content: what decides it, besides the images.
    """
    out, sources = Path(out), dict.fromkeys(image.source for image in images)
    with claimed(workers, out, record_of(images) | content, last=METADATA, name=RECORD, flag=flag) as complete:
        if complete:
            return
        results = workers.map(partial(write, out=out), images, "images")
        rows = [row for result in results for row in result.rows]
        if not rows:
            raise DataError(
                f"{flag} {out}: no tile has enough data; choose a smaller --size, or raise --max_nodata, and another "
                f"{flag}"
            )
        for source in sources:
            of_set = [result for image, result in zip(images, results) if image.source == source]
            log.info(
                "%s: %s: %d images, %d tiles; left out: %d images without any data, %d tiles with too little",
                out,
                source,
                len(of_set),
                sum(len(result.rows) for result in of_set),
                sum(not result.has_data for result in of_set),
                sum(result.left_out for result in of_set),
            )
        workers.on_main(write_csv, out / METADATA, ("id", "group", "source", "values"), rows)


def write_masks(out, images, workers):
    """Writes the images of ETCI 2021 whose labels are there and right, for `sarwmix.masks.Masks`. Raises DataError."""
    labelled = [image for image in images if label_of(image).exists() and image.name not in BAD_LABELS]
    if not labelled:
        raise DataError(f"--masks: no image of --{ETCI} has a label, flood_label/<image>.png; leave --masks out")
    log.info("--masks: %d of %d images of etci2021 have labels that are used", len(labelled), len(images))
    write_folder("--masks", out, labelled, write_masked, workers, {"classes": Sen1Floods11.CLASSES})
    workers.on_main(write_csv, Path(out) / LEGEND, ("value", "name"), list(enumerate(Sen1Floods11.CLASSES)))


# ---- Program -------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        "Write the images of public sets as tiles of VV and VH in dB, to pretrain on.", "sarwmix.prepare.public_sets"
    )
    group = parser.add_argument_group("sets", "folders of the sets, as published; give at least one")
    for name, public_set in SETS.items():
        group.add_argument(f"--{name}", metavar="DIR", help=public_set.about)
    group.add_argument(
        "--exclude",
        nargs="+",
        metavar="NAME",
        help="images or groups (places, scenes, countries) to leave out, such as those of a later test",
    )
    group = parser.add_argument_group("values of ETCI 2021")
    group.add_argument(
        "--etci_mean",
        nargs=2,
        type=finite,
        metavar=("VH", "VV"),
        help="mean in dB that each channel of each scene is scaled to (default: the mean of the other sets)",
    )
    group.add_argument(
        "--etci_std", nargs=2, type=positive, metavar=("VH", "VV"), help="standard deviation in dB, likewise"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    group.add_argument(
        "--size",
        type=positive_int,
        default=128,
        metavar="PIXELS",
        help="side of the tiles; images of OPERA that are smaller are enlarged, in linear power",
    )
    group.add_argument(
        "--max_nodata",
        type=Range(float, at_least=0, at_most=0.5),
        default=0.5,
        metavar="SHARE",
        help="share of pixels without data above which a tile is left out",
    )
    group.add_argument(
        "--masks",
        metavar="DIR",
        help="also write the whole images of ETCI 2021 that have flood labels, for --dataset masks",
    )
    add_workers_flag(group)
    return parser


def check(args):
    """Raises UsageError for flags that are missing or contradict each other."""
    given = [name for name in SETS if getattr(args, name)]
    if not given:
        raise UsageError(f"no set is given; name its folder with {', '.join(f'--{name}' for name in SETS)}")
    if bool(args.etci_mean) != bool(args.etci_std):
        raise UsageError("--etci_mean and --etci_std must be given together")
    if ETCI not in given and (args.etci_mean or args.masks):
        raise UsageError(
            f"{'--masks' if args.masks else '--etci_mean'}: is only for ETCI 2021; name its folder with --{ETCI}"
        )
    if given == [ETCI] and not args.etci_mean:
        raise UsageError(
            f"--{ETCI}: its values have no absolute scale; give the mean and standard deviation that they get with "
            "--etci_mean and --etci_std, or another set from which they are measured"
        )
    for name in given:
        if args.size > (SETS[name].side or MOST_SIDE):
            raise UsageError(f"--size {args.size}: is more than the {SETS[name].side or MOST_SIDE} pixels of --{name}")
    if args.masks:
        out, masks = Path(args.out).absolute(), Path(args.masks).absolute()
        if out.is_relative_to(masks) or masks.is_relative_to(out):
            raise UsageError("--masks and --out: one lies in the other; choose another --masks")


def work(args, workers):
    folders = {name: getattr(args, name) for name in SETS if getattr(args, name)}
    found = workers.on_main(find_all, folders)
    images, cut = without(found, args.exclude or ()), Cut(args.size, args.max_nodata)
    relative = [image for image in found if image.source == ETCI]
    if relative:
        aim = aim_of([image for image in images if image.source != ETCI], cut, args, workers)
        means, stds = (", ".join(f"{value:.2f}" for value in values) for values in aim)
        log.info("etci2021: VH and VV of each scene get the mean %s and std %s dB", means, stds)
        relative = with_gains(relative, aim, workers)
        known = {image.name: image for image in relative}
        images = [known.get(image.name, image) for image in images]
    write = partial(write_tiles, cut=cut)
    write_folder("--out", args.out, images, write, workers, {"size": cut.size, "max_nodata": cut.max_nodata})
    if args.masks:
        write_masks(args.masks, relative, workers)
    if any(image.source == ETCI for image in images):
        log.info(
            "etci2021 has no absolute dB: pretrain on these tiles with --weight_mode none and --max_nonfinite %g, and "
            "do not average them in linear power",
            cut.max_nodata,
        )


def main(argv=None):
    parser = get_args_parser()
    parser.parse_checked(argv, check)
    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
