# SPDX-License-Identifier: MIT
"""Simulates flood sequences as pairs for FloodDataset, to try, test and demonstrate the programs.

    python -m sarwmix.simulate.flood --out DIR --folders 24 --seed 0 --workers 2

writes DIR/images/<folder>/<name>.npy ((2, S, S) float32, linear σ⁰, VH, VV) and DIR/pairs_{train,test}.csv. A folder
shows one place at several dates. The data cannot be mistaken for measurements: the acquisitions are dated 2000, before
the launch of the satellite, and simulation.json marks the folder.
"""

import logging
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from common.command_line import Parser, Range, count, rate
from common.errors import DataError
from common.files import claimed, save_array
from common.workers import Workers
from sarwmix.listing import PATCH
from sarwmix.prepare.sen12_index import KEPT, pairs
from sarwmix.simulate.landcover import FORESTS, LANDSCAPES, WATER, LandCover, draw_geography, fractal
from sarwmix.simulate.patches import add_output_flags, run_generator
from sarwmix.simulate.radar import PSF_REACH, observe

log = logging.getLogger(__name__)

C = LandCover
VERSION = 1  # of the generator; to be raised if the images of given parameters change
STREAM = 2  # separates the random numbers from those of sarwmix.simulate with the same seed
SHARE = (0.1, 0.35)  # range of the share of the land that a flood covers at its peak
MOST = 0.7  # largest share of the land without forest that a flood covers
NEVER_FLOODED = 3  # every third folder, so that the later image of a pair is not always flooded
FIRST_DATE, REVISIT, NEXT_PLACE = datetime(2000, 1, 1), timedelta(days=12), timedelta(minutes=15)
TEST_FOLDERS = 99  # largest number of test folders, whose names have one or two digits


@dataclass(frozen=True)
class Parameters:
    """The parameters that decide the content of a simulated dataset."""

    folders: int
    seed: int = 0
    size: int = 512
    images: int = 4
    test_fraction: float = 0.25


@dataclass(frozen=True)
class Place:
    """The plan of one folder."""

    index: int
    name: str
    split: str
    floods: bool


def plan_places(parameters):
    """The folders of a dataset: list of Place, training first. Raises DataError if a split is too small or large."""
    tests = max(1, round(parameters.test_fraction * parameters.folders)) if parameters.test_fraction else 0
    if tests >= parameters.folders:
        raise DataError(f"--folders {parameters.folders}: too few for a test split; give more, or --test_fraction 0")
    if tests > TEST_FOLDERS:
        raise DataError(
            f"--test_fraction {parameters.test_fraction}: would need {tests} test folders, but their names of one or "
            f"two digits allow {TEST_FOLDERS}; give a smaller share"
        )
    trains = parameters.folders - tests
    named = [("train", n, f"{n + 1:04d}") for n in range(trains)] + [("test", n, f"{n + 1}") for n in range(tests)]
    return [
        Place(index, name, split, n % NEVER_FLOODED != NEVER_FLOODED - 1)
        for index, (split, n, name) in enumerate(named)
    ]


# ---- Places and floods ---------------------------------------------------------------------------


def flood_level(rng, geography):
    """The water level at which each pixel is flooded, (H, W) float32 without unit; infinite if it is never flooded.

    Low, flat land near rivers and lakes is flooded first, towns later. Permanent water is not flooded. Forest is not
    flooded either, because in C band the canopy hides the water below.
    """
    cover, height = geography.land_cover, geography.elevation
    inland = cover == C.INLAND_WATER
    distance = ndimage.distance_transform_edt(~inland) if inland.any() else np.zeros(cover.shape)
    slope = np.hypot(*np.gradient(ndimage.uniform_filter(height, 9), 10.0))
    level = (height - height.mean()) / (height.std() + 1e-6) + np.log1p(distance / 15)
    level += 0.5 * slope / (slope.mean() + 1e-6) + 0.12 * fractal(rng, cover.shape, largest=40, slope=2.6)
    level += rng.uniform(0.3, 1.0) * np.isin(cover, (C.URBAN, C.INDUSTRY))
    level[np.isin(cover, (*WATER, *FORESTS))] = np.inf
    return level.astype(np.float32)


def under_water(geography, water):
    """The Geography with open water in the mask `water` (H, W). Buildings, hedges, roads and targets in it vanish."""
    land_cover, building, alignment = geography.land_cover.copy(), geography.building.copy(), geography.alignment.copy()
    land_cover[water], building[water], alignment[water] = C.INLAND_WATER, 0, 0
    rows, cols = geography.target_rows, geography.target_cols
    dry = ~water[rows, cols]
    return replace(
        geography,
        land_cover=land_cover,
        building=building,
        alignment=alignment,
        hedge=geography.hedge & ~water,
        paved=geography.paved & ~water,
        target_rows=rows[dry],
        target_cols=cols[dry],
    )


def draw_place(rng, size):
    """The Geography of a place of size × size pixels of 10 m, with a border of PSF_REACH that its image lacks."""
    inland = [name for name, (_, land) in LANDSCAPES.items() if land.sea == (0, 0)]  # floods come from rivers
    return draw_geography(rng, (size + 2 * PSF_REACH,) * 2, rng.choice(inland))


def observe_place(rng, geography, images, floods):
    """Images a Geography at several dates. Returns (sigma0, water) as `simulate_place` does."""
    level = flood_level(rng, geography)
    inner = slice(PSF_REACH, -PSF_REACH)
    land, open_land = np.count_nonzero(~np.isin(geography.land_cover, WATER)), level[np.isfinite(level)]
    share = min(rng.uniform(*SHARE) * land / max(open_land.size, 1), MOST)  # of the land without forest
    sigma0, water = [], []
    for under_flood in flooded_dates(images, floods):
        flooded = np.zeros(level.shape, bool)
        if under_flood:
            if open_land.size:
                flooded = level < np.quantile(open_land, share)
            share *= rng.uniform(0.75, 1)
        sigma0.append(10 ** (observe(rng, under_water(geography, flooded)) / 10))
        water.append(flooded[inner, inner])
    return np.stack(sigma0).astype(np.float32), np.stack(water)


def simulate_place(seed, size, images, floods):
    """Simulates a place of size × size pixels of 10 m at `images` dates, which differ in speckle, season, wind, crops.

    The first half of the dates is dry (of an odd number, the larger half). If `floods`, the others are flooded, and the
    water recedes slowly. seed: an integer or a sequence of integers, ≥ 0. Equal arguments give equal results.
    Returns (sigma0, water): float32 (images, 2, size, size), linear, order VH, VV; bool (images, size, size), flooded.
    """
    rng = np.random.default_rng(seed)
    return observe_place(rng, draw_place(rng, size), images, floods)


def flooded_dates(images, floods):
    """Whether a place is flooded, for each of its dates: a list of bool."""
    return [floods and date >= images - images // 2 for date in range(images)]


# ---- Files ---------------------------------------------------------------------------------------


def write_place(place, out, parameters):
    """Simulates one folder and writes its images under `out`. Returns its rows of the list of pairs."""
    sigma0, _ = simulate_place(
        (parameters.seed, STREAM, VERSION, place.index), parameters.size, parameters.images, place.floods
    )
    folder = out / "images" / place.name
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        f"S1A_IW_GRDH_1SDV_{FIRST_DATE + place.index * NEXT_PLACE + date * REVISIT:%Y%m%dT%H%M%S}"
        for date in range(parameters.images)
    ]
    for name, image in zip(names, sigma0):
        save_array(folder / f"{name}.npy", image)
    flooded = flooded_dates(parameters.images, place.floods)
    return [(place.name, names[a], names[b], label) for a, b, label in pairs(flooded)]


def simulate_floods(out, parameters, workers=Workers()):
    """Writes a dataset of `parameters` into the folder `out`, distributing places over workers.

    The lists of pairs are written last; an interrupted run is repeated, and writes the same files. Raises DataError if
    `out` has other content, or if there are too few or too many folders for the splits.
    """
    out, places = Path(out), workers.on_main(plan_places, parameters)
    record = {
        "SIMULATED": "yes",
        "generator": "sarwmix.simulate.flood",
        "version": VERSION,
        "units": "linear",
        "parameters": asdict(parameters),
    }
    with claimed(workers, out, record, last=KEPT["test"].name) as complete:
        if complete:
            return
        found = workers.map(partial(write_place, out=out, parameters=parameters), places, "folders")
        for split, table in KEPT.items():
            rows = [row for place, part in zip(places, found) if place.split == split for row in part]
            workers.on_main(table.write, out, rows)
    log.info("%s: %d folders written", out, parameters.folders)


def add_content_flags(parser):
    group = parser.add_argument_group("content")
    group.add_argument(
        "--folders",
        type=Range(int, at_least=1, at_most=9999),
        required=True,
        help="number of places, train and test together; every third is never flooded",
    )
    group.add_argument("--seed", type=count, default=Parameters.seed, help="seed of all random numbers")
    group.add_argument(
        "--size",
        type=Range(int, at_least=PATCH, at_most=1024, multiple_of=PATCH),
        default=Parameters.size,
        help="side of an image, pixels of 10 m",
    )
    group.add_argument(
        "--images",
        type=Range(int, at_least=2, at_most=30),
        default=Parameters.images,
        help="dates of each place; the later half is flooded",
    )
    group.add_argument("--test_fraction", type=rate, default=Parameters.test_fraction, help="share of test folders")


def get_args_parser():
    parser = Parser(
        "Write simulated Sentinel-1 flood sequences as pairs for --dataset sen12flood.", "sarwmix.simulate.flood"
    )
    add_output_flags(parser)
    add_content_flags(parser)
    return parser


def main(argv=None):
    run_generator(get_args_parser(), Parameters, simulate_floods, argv)


if __name__ == "__main__":
    main()
