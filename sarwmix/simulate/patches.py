# SPDX-License-Identifier: MIT
"""Simulates Sentinel-1 patches in the layout of BigEarthNet v2, to try, test and demonstrate the programs.

    python -m sarwmix.simulate --out DIR --patches 1500 --seed 0 --workers 2

writes DIR/BigEarthNet-S1/<scene>/<s1_name>/<s1_name>_{VH,VV}.tif (float32, dB, 10 m, UTM) and DIR/metadata.parquet.
Patches of a scene are adjacent; all of them belong to one split. The data cannot be mistaken for measurements: the
country is "Simulated", the acquisitions are dated 2000, before the launch of the satellite, and each file is tagged.
"""

import logging
import math
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.command_line import Parser, Range, count, rate
from common.errors import DataError
from common.files import atomic_path, claimed
from common.packages import load
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.simulate.landcover import LANDSCAPES, LandCover, draw_geography
from sarwmix.simulate.radar import BANDS, PSF_REACH, observe

log = logging.getLogger(__name__)

SCENE_PIXELS = 1200  # largest side of a scene
VERSION = 1  # of the generator; to be raised if the images of given parameters change
PIXEL = 10.0  # m
LABEL_SHARE = 0.03  # smallest share of a patch that a class must cover to be one of its labels
FIRST_DATE, REVISIT = datetime(2000, 1, 1), timedelta(minutes=15)
# Sentinel-2 tiles in which scenes are placed: name, EPSG code, UTM coordinates of the upper left corner.
TILES = (
    ("33UUP", 32633, 300000, 5400000),
    ("29UPU", 32629, 600000, 5900040),
    ("35VPK", 32635, 600000, 7000020),
    ("29SND", 32629, 499980, 4400040),
)
TILE_PIXELS = 10980  # side of a tile
METADATA_SCHEMA = pa.schema(
    [
        ("patch_id", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("country", pa.string()),
        ("s1_name", pa.string()),
        ("s2v1_name", pa.string()),
        ("contains_seasonal_snow", pa.bool_()),
        ("contains_cloud_or_shadow", pa.bool_()),
    ]
)


def simulate_scene(seed, patches_high, patches_wide, size=120, landscape=None):
    """Simulates a scene of patches_high × patches_wide patches of size × size pixels of 10 m.

    seed: an integer or a sequence of integers, ≥ 0. landscape: a key of LANDSCAPES; drawn at random if None.
    Returns (sigma0_db, land_cover): float32 (2, H, W), σ⁰ in dB, order VH, VV; uint8 (H, W), the BigEarthNet class
    index. Equal arguments give equal results. Raises KeyError for an unknown landscape.
    """
    rng = np.random.default_rng(seed)
    geography = draw_geography(rng, tuple(n * size + 2 * PSF_REACH for n in (patches_high, patches_wide)), landscape)
    inner = slice(PSF_REACH, -PSF_REACH)
    return observe(rng, geography), geography.land_cover[inner, inner].copy()


@dataclass(frozen=True)
class Parameters:
    """The parameters that decide the content of a simulated dataset."""

    patches: int
    seed: int = 0
    size: int = 120
    scene_side: int = 8
    val_fraction: float = 0.25
    test_fraction: float = 0.25


@dataclass(frozen=True)
class Scene:
    """The plan of one scene."""

    index: int
    patches: int  # number of its side × side patches to write
    side: int
    split: str
    landscape: str
    tile: int  # index into TILES
    row: int  # of its first patch in the tile, in patches
    col: int


def plan_scenes(parameters):
    """Plans the scenes of a dataset: list of Scene; at least ten if there are enough patches, so that splits differ.

    Raises DataError if there are too few scenes for the splits.
    """
    if parameters.val_fraction + parameters.test_fraction >= 1:
        raise DataError(
            f"--val_fraction {parameters.val_fraction} and --test_fraction {parameters.test_fraction} "
            "leave nothing to train on: their sum must be below 1"
        )
    fits = max(1, SCENE_PIXELS // parameters.size)
    side = min(parameters.scene_side, max(1, math.isqrt(parameters.patches // 10)), fits)
    scene_count = math.ceil(parameters.patches / side**2)
    per_row = (TILE_PIXELS // parameters.size + 1) // (side + 1)  # a gap of one patch between scenes
    places = min(scene_count, len(TILES) * per_row**2)  # further scenes reuse these places
    held_out = [("validation", parameters.val_fraction), ("test", parameters.test_fraction)]
    numbers = [(split, max(1, round(share * places))) for split, share in held_out if share > 0]
    if sum(number for _, number in numbers) >= places:
        raise DataError(
            f"--patches {parameters.patches}: too few for the splits asked for; "
            "give more patches, or --val_fraction 0 --test_fraction 0"
        )
    names = [split for split, number in numbers for _ in range(number)]
    names += ["train"] * (places - len(names))
    split_of_place = np.random.default_rng((parameters.seed, VERSION)).permutation(names)
    frequency = np.cumsum([weight for weight, _ in LANDSCAPES.values()])
    scenes, members = [], {split: 0 for split in set(names)}
    for index in range(scene_count):
        place = index % places
        split = str(split_of_place[place])
        # Steps of the golden ratio give even a few scenes of a split the landscapes in proportion.
        landscape = list(LANDSCAPES)[np.searchsorted(frequency, (0.1 + 0.618034 * members[split]) % 1 * frequency[-1])]
        members[split] += 1
        block, tile = divmod(place, len(TILES))
        row, col = (n * (side + 1) for n in divmod(block, per_row))
        patches = min(side**2, parameters.patches - index * side**2)
        scenes.append(Scene(index, patches, side, split, landscape, tile, row, col))
    return scenes


def _labels(land_cover):
    """Indices of the classes that cover at least LABEL_SHARE of a patch."""
    return np.flatnonzero(np.bincount(land_cover.ravel(), minlength=len(LandCover)) >= LABEL_SHARE * land_cover.size)


def write_raster(path, image, crs, transform, units, band=None):
    """Writes one band (H, W) as a GeoTIFF with the tags SIMULATED and UNITS. band: its description, or None."""
    with load("rasterio", "writing GeoTIFFs").open(
        path,
        "w",
        driver="GTiff",
        width=image.shape[1],
        height=image.shape[0],
        count=1,
        dtype=image.dtype,
        crs=crs,
        transform=transform,
    ) as file:
        if band:
            file.set_band_description(1, band)  # before the pixels: afterwards GDAL writes the header twice
        file.update_tags(SIMULATED="yes", UNITS=units)
        file.write(image, 1)


def write_scene(scene, out, parameters):
    """Simulates a scene and writes its patches under `out`. Returns [(tile and position, date, split, labels)]."""
    rasterio = load("rasterio", "writing GeoTIFFs")
    size, (tile, epsg, west, north) = parameters.size, TILES[scene.tile]
    seed = parameters.seed, scene.index
    sigma0_db, land_cover = simulate_scene(seed, scene.side, scene.side, size, scene.landscape)
    date = f"{FIRST_DATE + scene.index * REVISIT:%Y%m%dT%H%M%S}"
    scene_name = f"S1A_IW_GRDH_1SDV_{date}"
    crs = rasterio.CRS.from_epsg(epsg)
    rows = []
    for patch in range(scene.patches):
        row, col = divmod(patch, scene.side)
        window = np.s_[row * size : (row + 1) * size, col * size : (col + 1) * size]
        place = f"{tile}_{scene.col + col}_{scene.row + row}"
        name = f"{scene_name}_{place}"
        folder = out / "BigEarthNet-S1" / scene_name / name
        folder.mkdir(parents=True, exist_ok=True)
        corner = west + (scene.col + col) * size * PIXEL, north - (scene.row + row) * size * PIXEL
        transform = rasterio.Affine(PIXEL, 0, corner[0], 0, -PIXEL, corner[1])
        for band, image in zip(BANDS, sigma0_db):
            path = folder / f"{name}_{band}.tif"
            path.unlink(missing_ok=True)  # GDAL would open the file of an interrupted run, and fail
            write_raster(path, image[window], crs, transform, "dB", band)
        rows.append((place, date, scene.split, _labels(land_cover[window]).tolist()))
    return rows


def _write_metadata(path, rows):
    from sarwmix.bigearthnet import CLASSES  # here, because it imports torch, which spawned workers do not need

    records = []
    for place, date, split, labels in rows:
        tile, position = place.split("_", 1)
        records.append(
            {
                "patch_id": f"S2A_MSIL2A_{date}_N9999_R022_T{tile}_{position}",
                "labels": sorted(CLASSES[i] for i in labels),
                "split": split,
                "country": "Simulated",
                "s1_name": f"S1A_IW_GRDH_1SDV_{date}_{place}",
                "s2v1_name": f"S2A_MSIL2A_{date}_{position}",
                "contains_seasonal_snow": False,
                "contains_cloud_or_shadow": False,
            }
        )
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(records, METADATA_SCHEMA), temporary)


def simulate_dataset(out, parameters, workers=Workers()):
    """Writes a dataset of `parameters` into the folder `out`, distributing scenes over workers.

    metadata.parquet is written last; an interrupted run is repeated, and writes the same files. Raises DataError if
    `out` has other content, or if there are too few patches for the splits.
    """
    with workers.together():
        load("rasterio", "writing GeoTIFFs")  # before the folder is begun
    out, scenes = Path(out), workers.on_main(plan_scenes, parameters)
    record = {"generator": "sarwmix.simulate", "version": VERSION, "parameters": asdict(parameters)}
    with claimed(workers, out, record, last="metadata.parquet") as complete:
        if complete:
            return
        rows = workers.map(partial(write_scene, out=out, parameters=parameters), scenes, "scenes")
        workers.on_main(_write_metadata, out / "metadata.parquet", [row for part in rows for row in part])
    log.info("%s: %d patches written", out, parameters.patches)


def add_output_flags(parser):
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    add_workers_flag(group)


def get_args_parser():
    parser = Parser("Write simulated Sentinel-1 patches in the layout of BigEarthNet v2.", "sarwmix.simulate")
    add_output_flags(parser)
    group = parser.add_argument_group("content")
    group.add_argument(
        "--patches",
        type=Range(int, at_least=1, at_most=10**7),
        required=True,
        help="number of patches, all splits together",
    )
    group.add_argument("--seed", type=count, default=Parameters.seed, help="seed of all random numbers")
    group.add_argument(
        "--size",
        type=Range(int, at_least=16, at_most=1024),
        default=Parameters.size,
        help="side of a patch, pixels of 10 m; the programs read 120",
    )
    group.add_argument(
        "--scene_side",
        type=Range(int, at_least=1, at_most=32),
        default=Parameters.scene_side,
        help="largest side of a scene, patches; scenes of few or large patches are smaller",
    )
    group = parser.add_argument_group("splits, by whole scenes")
    group.add_argument(
        "--val_fraction", type=rate, default=Parameters.val_fraction, help="share of the patches in the split val"
    )
    group.add_argument(
        "--test_fraction", type=rate, default=Parameters.test_fraction, help="share of the patches in the split test"
    )
    return parser


def run_generator(parser, kind, write, argv=None):
    """Runs the program of a generator: parses the flags and calls write(out, parameters, workers).

    kind: dataclass of the parameters; its fields are flags of the parser.
    """

    def work(args, workers):
        write(args.out, kind(**{field.name: getattr(args, field.name) for field in fields(kind)}), workers)

    run_command(parser, work, argv)


def main(argv=None):
    run_generator(get_args_parser(), Parameters, simulate_dataset, argv)


if __name__ == "__main__":
    main()
