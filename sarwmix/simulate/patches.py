# SPDX-License-Identifier: MIT
"""Simulated Sentinel-1 patches in the layout of BigEarthNet v2, for trying, testing and demonstrating the programs.

    python -m sarwmix.simulate --out DIR --patches 1500 --seed 0 --workers 2

writes DIR/BigEarthNet-S1/<scene>/<s1_name>/<s1_name>_{VH,VV}.tif (float32, dB, 10 m, UTM) and DIR/metadata.parquet.
Patches of a scene lie side by side; a scene belongs to one split as a whole. Nothing can be taken for measured data:
the country is "Simulated", the acquisitions are dated 2000, before the satellite flew, and each file is tagged.
"""

import logging
import math
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.command_line import Parser
from common.errors import DataError
from common.files import atomic_path, claimed
from common.packages import load
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.simulate.landcover import LANDSCAPES, LandCover, draw_geography
from sarwmix.simulate.radar import BANDS, PSF_REACH, observe

log = logging.getLogger(__name__)

SCENE_PIXELS = 1200  # side of a scene at most
VERSION = 1  # of the generator: another one gives other images for the same parameters
PIXEL = 10.0  # m
LABEL_SHARE = 0.03  # a class that covers less of a patch is not one of its labels
FIRST_DATE, REVISIT = datetime(2000, 1, 1), timedelta(minutes=15)
# Where scenes are put: Sentinel-2 tiles of 10,980 pixels, with the UTM coordinates of their upper left corner.
TILES = (
    ("33UUP", 32633, 300000, 5400000),
    ("29UPU", 32629, 600000, 5900040),
    ("35VPK", 32635, 600000, 7000020),
    ("29SND", 32629, 499980, 4400040),
)
TILE_PIXELS = 10980
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
    """One simulated scene of patches_high × patches_wide patches of size × size pixels of 10 m.

    seed: an integer or a sequence of integers, ≥ 0. landscape: a key of LANDSCAPES; drawn at random if None.
    Returns (sigma0_db, land_cover): float32 (2, H, W), σ⁰ in dB, order VH, VV; uint8 (H, W), the BigEarthNet class
    index. Equal arguments give equal results. Raises KeyError for an unknown landscape.
    """
    rng = np.random.default_rng(seed)
    geography = draw_geography(rng, tuple(n * size + 2 * PSF_REACH for n in (patches_high, patches_wide)), landscape)
    inner = slice(PSF_REACH, -PSF_REACH)
    return observe(rng, geography), geography.land_cover[inner, inner].copy()


def check_ranges(parameters, **ranges):
    """ValueError, naming the flag, for a parameter that is not within its range (least, most)."""
    for name, (least, most) in ranges.items():
        if not least <= getattr(parameters, name) <= most:
            raise ValueError(f"--{name} {getattr(parameters, name)}: must be from {least} to {most}")


@dataclass(frozen=True)
class Parameters:
    """All that decides the content of a simulated dataset."""

    patches: int
    seed: int = 0
    size: int = 120
    scene_side: int = 8
    val_fraction: float = 0.25
    test_fraction: float = 0.25

    def __post_init__(self):
        """Raises ValueError, naming the flag, for values that cannot be."""
        check_ranges(self, patches=(1, 10**7), seed=(0, 2**63 - 1), size=(16, 1024), scene_side=(1, 32))
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be from 0 to below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"--val_fraction {self.val_fraction} and --test_fraction {self.test_fraction} "
                "leave nothing to train on: their sum must be below 1"
            )


@dataclass(frozen=True)
class Scene:
    """What one scene is called, where it lies and how many of its side × side patches are wanted."""

    index: int
    patches: int
    side: int
    split: str
    landscape: str
    tile: int  # index into TILES
    row: int  # of its first patch in the tile, in patches
    col: int


def plan_scenes(parameters):
    """The scenes of a dataset, list of Scene. At least ten where there are enough patches, so that splits can differ.

    Raises DataError when there are fewer scenes than splits.
    """
    fits = max(1, SCENE_PIXELS // parameters.size)
    side = min(parameters.scene_side, max(1, math.isqrt(parameters.patches // 10)), fits)
    count = math.ceil(parameters.patches / side**2)
    per_row = (TILE_PIXELS // parameters.size + 1) // (side + 1)  # a gap of one patch between scenes
    places = min(count, len(TILES) * per_row**2)  # after that, scenes come back to the same places
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
    for index in range(count):
        place = index % places
        split = str(split_of_place[place])
        # Steps of the golden ratio rather than chance: even a few scenes of a split have the landscapes in proportion.
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


def write_scene(scene, out, parameters):
    """Simulate one scene and write its patches under out. Returns rows of (tile and position, date, split, labels)."""
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
        for band, image in zip(BANDS, sigma0_db):
            path = folder / f"{name}_{band}.tif"
            path.unlink(missing_ok=True)  # GDAL would open what an interrupted run left, and fail
            with rasterio.open(
                path,
                "w",
                driver="GTiff",
                width=size,
                height=size,
                count=1,
                dtype="float32",
                crs=crs,
                transform=rasterio.Affine(PIXEL, 0, corner[0], 0, -PIXEL, corner[1]),
            ) as file:
                file.set_band_description(1, band)  # before the pixels: afterwards GDAL writes the header twice
                file.update_tags(SIMULATED="yes", UNITS="dB")
                file.write(image[window], 1)
        rows.append((place, date, scene.split, _labels(land_cover[window]).tolist()))
    return rows


def _write_metadata(path, rows):
    from sarwmix.bigearthnet import CLASSES  # it brings torch along, seconds that each spawned worker can save

    columns = {name: [] for name in METADATA_SCHEMA.names}
    for place, date, split, labels in rows:
        tile, position = place.split("_", 1)
        for name, value in zip(
            columns,
            (
                f"S2A_MSIL2A_{date}_N9999_R022_T{tile}_{position}",
                sorted(CLASSES[i] for i in labels),
                split,
                "Simulated",
                f"S1A_IW_GRDH_1SDV_{date}_{place}",
                f"S2A_MSIL2A_{date}_{position}",
                False,
                False,
            ),
        ):
            columns[name].append(value)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, METADATA_SCHEMA), temporary)


def simulate_dataset(out, parameters, workers=Workers()):
    """Write a dataset of `parameters` under the folder `out`, the scenes spread over workers.

    metadata.parquet comes last: what was interrupted is not complete, and running again writes the same files.
    Returns False if everything was there already. Raises DataError when `out` holds something else, or the patches are
    too few for the splits.
    """

    def plan():
        load("rasterio", "writing GeoTIFFs")  # before the folder is begun
        return plan_scenes(parameters)

    out, scenes = Path(out), workers.on_main(plan)
    record = {"generator": "sarwmix.simulate", "version": VERSION, "parameters": asdict(parameters)}
    with claimed(workers, out, record, last="metadata.parquet") as complete:
        if complete:
            return False
        rows = workers.map(partial(write_scene, out=out, parameters=parameters), scenes, "scenes")
        workers.on_main(_write_metadata, out / "metadata.parquet", [row for part in rows for row in part])
    return True


def add_output_flags(parser):
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    add_workers_flag(group)


def get_args_parser():
    parser = Parser("Write simulated Sentinel-1 patches in the layout of BigEarthNet v2.", "sarwmix.simulate")
    add_output_flags(parser)
    group = parser.add_argument_group("content")
    group.add_argument("--patches", type=int, required=True, help="number of patches, all splits together")
    group.add_argument("--seed", type=int, default=Parameters.seed, help="of everything random; ≥ 0")
    group.add_argument(
        "--size", type=int, default=Parameters.size, help="side of a patch, pixels of 10 m; the programs read 120"
    )
    group.add_argument(
        "--scene_side",
        type=int,
        default=Parameters.scene_side,
        help="side of a scene, patches, at most; smaller for few or large patches",
    )
    group = parser.add_argument_group("splits, by whole scenes")
    group.add_argument("--val_fraction", type=float, default=Parameters.val_fraction, help="share of validation, 0…1")
    group.add_argument("--test_fraction", type=float, default=Parameters.test_fraction, help="share of test, 0…1")
    return parser


def run_generator(parser, parameters_of, write, unit, argv=None):
    """The program of a generator: its flags, then write(out, parameters, workers) → whether there was something to do.

    parameters_of(**flags) raises ValueError for what cannot be. unit: what the first flag of the content counts.
    """

    def work(args, workers):
        flags = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
        try:
            parameters = parameters_of(**flags)
        except ValueError as error:
            parser.error(str(error))
        wrote = write(args.out, parameters, workers)
        log.info("%s: %s", args.out, f"{flags[unit]} {unit} written" if wrote else "complete already, nothing to do")

    run_command(parser, work, argv)


def main(argv=None):
    run_generator(get_args_parser(), Parameters, simulate_dataset, "patches", argv)


if __name__ == "__main__":
    main()
