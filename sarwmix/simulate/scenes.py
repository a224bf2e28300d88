# SPDX-License-Identifier: MIT
"""Simulates Sentinel-1 scenes, and labelled chips of them, to try `sarwmix.tile`, `--dataset chips` and `masks`.

    python -m sarwmix.simulate.scenes --out DIR --scenes 1 --side 2048
    python -m sarwmix.simulate.scenes --out DIR --scenes 8 --side 1024 --chip_size 64 --masks

writes DIR/scenes/<scene>.tif, with the bands VV and VH as linear σ⁰ or dB, 10 m, UTM, and with --chip_size also
DIR/chips/<scene>_<row>_<column>.tif and DIR/chips/metadata.csv (id, label, group), whose labels are five kinds of land
cover. With --masks, DIR/masks holds all chips of the scenes, side by side, and a mask of the kind of each pixel:
images/ and masks/ with files of the same names, classes.csv and metadata.csv (id, group); DIR/scene_masks/<scene>.tif
is the mask of a whole scene. DIR/scenes.csv lists the scenes, and is written last. The data cannot be mistaken for
measurements: acquisitions are dated 2000, and each file is tagged.
"""

import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.command_line import Parser, Range, count
from common.errors import DataError
from common.files import claimed, write_csv
from common.packages import load
from common.workers import Workers
from sarwmix.geotiff import write_geotiff
from sarwmix.simulate.landcover import FORESTS, LANDSCAPES, PARCELLED, WATER, LandCover
from sarwmix.simulate.patches import FIRST_DATE, PIXEL, REVISIT, TILES, add_output_flags, run_generator, simulate_scene

C = LandCover
VERSION = 1  # of the generator; to be raised if the images of given parameters change
STREAM = 4  # separates the random numbers from those of the other generators with the same seed
KINDS = {  # classes of chips
    "water": WATER,
    "forest": FORESTS,
    "farmland": PARCELLED,
    "town": (C.URBAN, C.INDUSTRY),
    "open land": (C.GRASSLAND, C.MOOR, C.TRANSITIONAL, C.BEACH, C.INLAND_WETLAND, C.COASTAL_WETLAND),
}
LEAST_SHARE = 0.6  # of its class in a chip
CHIPS_PER_CLASS = 8  # of a scene, at most
METADATA = "metadata.csv"  # of the chips
LEGEND, NO_CLASS = "classes.csv", 255  # of masks: the table of the classes, and the value of pixels of none
SCENES, CHIPS, SCENE_MASKS, MASKS = "scenes", "chips", "scene_masks", "masks"  # folders
LIST = "scenes.csv"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameters:
    """The parameters that decide the content."""

    scenes: int = 1
    side: int = 2048
    units: str = "linear"
    chip_size: int | None = None
    seed: int = 0
    masks: bool = False

    def record(self):
        """What decides the content of a folder, as plain values; without masks it is that of before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "masks" or value}


def scene_name(index):
    return f"S1A_IW_GRDH_1SDV_{FIRST_DATE + index * REVISIT:%Y%m%dT%H%M%S}"


def chip_name(scene, row, column):
    return f"{scene}_{row:05d}_{column:05d}"


def write_image(path, image_db, units, crs, corner):
    """Writes an image, (2, H, W) float32 in dB, order VH, VV, as a GeoTIFF with the bands VV and VH, atomically.

    corner: (x, y) of its upper left corner, m.
    """
    values = image_db[::-1] if units == "dB" else 10 ** (image_db[::-1] / 10)
    write_bands(path, values.astype(np.float32), (crs, corner), ("VV", "VH"), UNITS=units)


def write_mask(path, land_cover, crs, corner):
    """Writes the number in KINDS of each pixel, NO_CLASS for none, as `write_image`. land_cover: (H, W) uint8."""
    numbers = np.full(len(C), NO_CLASS, np.uint8)
    for number, classes in enumerate(KINDS.values()):
        numbers[list(classes)] = number
    write_bands(path, numbers[land_cover][None], (crs, corner), nodata=NO_CLASS)


def write_bands(path, values, place, names=(), nodata=None, **tags):
    """Writes bands, (n, H, W), as a GeoTIFF, atomically.

    place: crs, and (x, y) of the upper left corner, m. names: of the bands. nodata: value without data. tags: of the
    file.
    """
    rasterio, (crs, (x, y)) = load("rasterio", "writing GeoTIFFs"), place
    transform = rasterio.Affine(PIXEL, 0, x, 0, -PIXEL, y)
    write_geotiff(path, values, names, {"SIMULATED": "yes"} | tags, crs=crs, transform=transform, nodata=nodata)


def all_chips(scene, side, size):
    """[(name, row, column)] of the chips of size × size pixels that lie side by side in a scene of side × side."""
    starts = range(0, side - size + 1, size)
    return [(chip_name(scene, row, column), row, column) for row in starts for column in starts]


def choose_chips(land_cover, size, rng):
    """[(class name, row, column)] of chips of size × size pixels on a grid; land_cover: (H, W) uint8."""
    high, wide = (n // size for n in land_cover.shape)
    cells = land_cover[: high * size, : wide * size].reshape(high, size, wide, size)
    chosen = []
    for name, classes in KINDS.items():
        found = np.argwhere(np.isin(cells, classes).mean((1, 3)) >= LEAST_SHARE)
        for row, column in sorted(rng.permutation(found)[:CHIPS_PER_CLASS].tolist()):
            chosen.append((name, row * size, column * size))
    return chosen


def write_scene(index, out, parameters):
    """Simulates a scene and writes it and its chips under `out`. Returns rows of METADATA."""
    name, (_, epsg, west, north) = scene_name(index), TILES[index % len(TILES)]
    landscape = list(LANDSCAPES)[index % len(LANDSCAPES)]
    image, land_cover = simulate_scene((parameters.seed, STREAM, index), 1, 1, parameters.side, landscape)
    crs = load("rasterio", "writing GeoTIFFs").CRS.from_epsg(epsg)
    corner = west, north - index // len(TILES) * parameters.side * PIXEL
    write_image(out / SCENES / f"{name}.tif", image, parameters.units, crs, corner)
    rows, size = [], parameters.chip_size

    def cut(row, column):
        place = corner[0] + column * PIXEL, corner[1] - row * PIXEL
        return np.s_[..., row : row + size, column : column + size], place

    if size:
        for kind, row, column in choose_chips(land_cover, size, np.random.default_rng((parameters.seed, index))):
            chip, (window, place) = chip_name(name, row, column), cut(row, column)
            write_image(out / CHIPS / f"{chip}.tif", image[window], parameters.units, crs, place)
            rows.append((chip, kind, name))
    if parameters.masks:
        write_mask(out / SCENE_MASKS / f"{name}.tif", land_cover, crs, corner)
        for chip, row, column in all_chips(name, parameters.side, size):
            window, place = cut(row, column)
            write_image(out / MASKS / "images" / f"{chip}.tif", image[window], parameters.units, crs, place)
            write_mask(out / MASKS / "masks" / f"{chip}.tif", land_cover[window], crs, place)
    return rows


def write_mask_tables(folder, parameters):
    """Writes the tables of the masks: their classes, and the scene of each."""
    write_csv(folder / LEGEND, ("value", "name"), [*enumerate(KINDS), (NO_CLASS, "ignore")])
    scenes = map(scene_name, range(parameters.scenes))
    chips = [(name, scene) for scene in scenes for name, *_ in all_chips(scene, parameters.side, parameters.chip_size)]
    write_csv(folder / METADATA, ("id", "group"), chips)


def simulate_scenes(out, parameters, workers=Workers()):
    """Writes scenes, and chips, into the folder `out`, distributed over workers. Raises DataError for other content."""
    out = Path(out)
    with workers.together():
        load("rasterio", "writing GeoTIFFs")
        if parameters.chip_size and parameters.chip_size > parameters.side:
            raise DataError(f"--chip_size {parameters.chip_size}: is more than --side {parameters.side}")
        if parameters.masks and not parameters.chip_size:
            raise DataError("--masks: needs --chip_size, the side of the images that have them")
    record = {"generator": "sarwmix.simulate.scenes", "version": VERSION, "parameters": parameters.record()}
    with claimed(workers, out, record, last=LIST) as complete:
        if complete:
            return
        masks = [SCENE_MASKS, f"{MASKS}/images", f"{MASKS}/masks"] if parameters.masks else []
        for folder in (SCENES, *([CHIPS] if parameters.chip_size else []), *masks):
            (out / folder).mkdir(parents=True, exist_ok=True)
        rows = workers.map(partial(write_scene, out=out, parameters=parameters), range(parameters.scenes), "scenes")
        chips = [row for part in rows for row in part]
        if parameters.chip_size:
            workers.on_main(write_csv, out / CHIPS / METADATA, ("id", "label", "group"), chips)
        if parameters.masks:
            workers.on_main(write_mask_tables, out / MASKS, parameters)
        names = [(f"{SCENES}/{scene_name(index)}.tif", len(part)) for index, part in enumerate(rows)]
        workers.on_main(write_csv, out / LIST, ("file", "chips"), names)
    log.info("%s: %d scenes and %d chips written", out, parameters.scenes, len(chips))


def get_args_parser():
    parser = Parser("Write simulated Sentinel-1 scenes, and labelled chips of them.", "sarwmix.simulate.scenes")
    add_output_flags(parser)
    group = parser.add_argument_group("content")
    group.add_argument(
        "--scenes", type=Range(int, at_least=1, at_most=1000), default=Parameters.scenes, help="number of scenes"
    )
    group.add_argument(
        "--side",
        type=Range(int, at_least=64, at_most=4096),
        default=Parameters.side,
        help="side of a scene, pixels of 10 m",
    )
    group.add_argument(
        "--units", choices=("linear", "dB"), default=Parameters.units, help="units of the values, which are σ⁰"
    )
    group.add_argument(
        "--chip_size",
        type=Range(int, at_least=16, at_most=1024),
        metavar="PIXELS",
        help="also write labelled chips of this side: up to eight of each of five classes from each scene",
    )
    group.add_argument(
        "--masks",
        action="store_true",
        help="also write all chips with a mask of these five classes, for --dataset masks, and a mask of each scene",
    )
    group.add_argument("--seed", type=count, default=Parameters.seed, help="seed of all random numbers")
    return parser


def main(argv=None):
    run_generator(get_args_parser(), Parameters, simulate_scenes, argv)


if __name__ == "__main__":
    main()
