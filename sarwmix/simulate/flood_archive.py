# SPDX-License-Identifier: MIT
"""Simulates the archive of SEN12-FLOOD, to try and test its preparation, from the zip to pairs.

    python -m sarwmix.simulate.flood_archive --out DIR --folders 8 --seed 0 --workers 2

writes DIR/SEN12FLOOD.zip with SEN12FLOOD/S1list.json and for each folder <name>_corrected_{VH,VV}.tif (float32, linear
σ⁰, EPSG:4326, about 10 m) and S2_<date>_B04.tif (uint16, UTM, 10 m), the grid onto which the preparation warps the
images. As in the real archive, some images are faulty; DIR/faults.json lists them. The data cannot be mistaken for
measurements: the acquisitions are dated 2000, before the launch of the satellites, and each file is tagged.
"""

import binascii
import logging
import math
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np

try:
    import rasterio
    from rasterio.warp import Resampling, reproject, transform, transform_bounds
except ImportError:
    rasterio = None  # `simulate_raw_floods` reports it

from common.command_line import Parser
from common.files import atomic_path, claimed, write_json
from common.packages import load
from common.workers import Workers
from sarwmix.prepare.sen12_index import S1_LIST
from sarwmix.simulate.flood import (
    FIRST_DATE,
    NEXT_PLACE,
    REVISIT,
    Parameters,
    add_content_flags,
    draw_place,
    flooded_dates,
    observe_place,
    plan_places,
)
from sarwmix.simulate.landcover import LandCover, hashed
from sarwmix.simulate.patches import PIXEL, add_output_flags, run_generator, write_raster
from sarwmix.simulate.radar import BANDS, PSF_REACH

log = logging.getLogger(__name__)

C = LandCover
VERSION = 1  # of the generator; to be raised if the images of given parameters change
STREAM = 3  # separates the random numbers from those of the other generators with the same seed
NAME, ZIP, FAULTS = "SEN12FLOOD", "SEN12FLOOD.zip", "faults.json"
LATLON = rasterio and rasterio.CRS.from_epsg(4326)
DEGREES = 0.0000898  # side of a pixel of the Sentinel-1 images: 10 m along a meridian
EDGE = 4  # pixels of 10 m by which they extend beyond the grid of the Sentinel-2 image
MARGIN = 24  # of the simulation beyond that grid: EDGE, and the rotation of the meridian against the grid's north
ZONES = (32735, 32736, 32737)  # southern Africa, 24° to 42° east
WEST, NORTH, SPACING, WIDE, HIGH = 300020, 8699980, 20000, 20, 40  # m, m, m; columns and rows of folders in each zone
S2_DATES = (timedelta(days=2), timedelta(days=32))

# Reflectance × 10,000 of each class in the red band of Sentinel-2.
RED = {
    C.URBAN: 1500,
    C.INDUSTRY: 1900,
    C.ARABLE: 1250,
    C.PERMANENT: 900,
    C.PASTURE: 750,
    C.COMPLEX: 1000,
    C.AGRI_NATURAL: 800,
    C.AGROFOREST: 700,
    C.BROADLEAVED: 300,
    C.CONIFEROUS: 260,
    C.MIXED: 280,
    C.GRASSLAND: 900,
    C.MOOR: 600,
    C.TRANSITIONAL: 550,
    C.BEACH: 2600,
    C.INLAND_WETLAND: 500,
    C.COASTAL_WETLAND: 550,
    C.INLAND_WATER: 350,
    C.SEA: 250,
}
RED_FLOOD, RED_PARCELS, RED_NOISE = 950, 0.5, 25  # muddy flood water; relative range between parcels; noise

# The kinds of faults, one image each. The unusable ones come first, so that they are in different folders.
SINGLE, PARTIAL, CORRUPT, MISSING, GAP, NONFINITE = KINDS = (
    "single_polarisation",
    "partial_cover",
    "corrupt",
    "missing",
    "small_gap",
    "nonfinite",
)
COVERED, GAP_SHARE, NONFINITE_PIXELS = 0.55, 0.1, 5


@dataclass(frozen=True)
class RawParameters(Parameters):
    """The parameters that decide the content of the folder. keep_tree: keeps the files of the zip beside it."""

    keep_tree: bool = False


def plan_faults(places, images):
    """Assigns faults to images: {kind: (name of the folder, number of the image in the order of acquisition)}.

    The training folders get one fault each, in their order, then a second one and so on, the latest images first; at
    most half of the images of a folder are faulty. Folders of two images get none, because no pair would be left.
    """
    trains = [place.name for place in places if place.split == "train"]
    room = images // 2 if images > 2 else 0
    free = [(folder, images - 1 - turn) for turn in range(room) for folder in trains]
    return dict(zip(KINDS, free))


# ---- Grids, dates and names ----------------------------------------------------------------------


def corner(index):
    """(EPSG code, easting, northing) of the upper left corner of folder `index`, different for the first thousands."""
    row, rest = divmod(index, len(ZONES) * WIDE)
    zone, column = divmod(rest, WIDE)
    return ZONES[zone], WEST + column * SPACING, NORTH - row % HIGH * SPACING


def grid(index, size, reach=0):
    """(CRS, transform, bounds in m) of the Sentinel-2 image of a folder, extended by `reach` pixels on every side."""
    epsg, west, north = corner(index)
    west, north, side = west - reach * PIXEL, north + reach * PIXEL, (size + 2 * reach) * PIXEL
    return (
        rasterio.CRS.from_epsg(epsg),
        rasterio.Affine(PIXEL, 0, west, 0, -PIXEL, north),
        (west, north - side, west + side, north),
    )


def acquisitions(place, images):
    """The acquisition times of a folder, list of datetime."""
    return [FIRST_DATE + place.index * NEXT_PLACE + date * REVISIT for date in range(images)]


def product_name(place, date, start, polarisation="D"):
    """A name in the form of Sentinel-1 products: start, end, orbit, data take, checksum."""
    name = f"S1A_IW_GRDH_1S{polarisation}V_{start:%Y%m%dT%H%M%S}_{start + timedelta(seconds=25):%Y%m%dT%H%M%S}"
    name += f"_{date + 1:06d}_{place.index + 1:06X}"
    return f"{name}_{binascii.crc_hqx(name.encode(), 0):04X}"


# ---- Images --------------------------------------------------------------------------------------


def simulate_raw_place(place, parameters):
    """Simulates a folder on its UTM grid, extended by MARGIN pixels on every side: S = size + 2·MARGIN.

    Returns (geography, sigma0, water): Geography of S + 2·PSF_REACH; float32 (images, 2, S, S), linear, order VH, VV;
    bool (images, S, S), flooded. Equal arguments give equal results.
    """
    rng = np.random.default_rng((parameters.seed, STREAM, VERSION, place.index))
    geography = draw_place(rng, parameters.size + 2 * MARGIN)
    return geography, *observe_place(rng, geography, parameters.images, place.floods)


def to_latlon(sigma0, index, size):
    """Warps (2, S, S) from the extended UTM grid to degrees. Returns ((2, H, W) float32, transform)."""
    crs, pixels, _ = grid(index, size, MARGIN)
    wanted_crs, _, wanted = grid(index, size, EDGE)
    west, south, east, north = transform_bounds(wanted_crs, LATLON, *wanted)
    high, wide = math.ceil((north - south) / DEGREES), math.ceil((east - west) / DEGREES)
    geotransform = rasterio.Affine(DEGREES, 0, west, 0, -DEGREES, north)
    image = np.zeros((2, high, wide), np.float32)
    reproject(
        sigma0,
        image,
        src_crs=crs,
        src_transform=pixels,
        dst_crs=LATLON,
        dst_transform=geotransform,
        dst_nodata=0,
        resampling=Resampling.bilinear,
        tolerance=0,
    )
    return image, geotransform


def red_band(rng, geography, water):
    """The red band of Sentinel-2 of a place without its margins: (size, size) uint16, reflectance × 10,000."""
    inner = slice(PSF_REACH + MARGIN, -PSF_REACH - MARGIN)
    cover, parcel = geography.land_cover[inner, inner], geography.parcel[inner, inner]
    red = np.array([RED[cover] for cover in LandCover], np.float32)[cover]
    red *= 1 + RED_PARCELS * (hashed(parcel, 51) - 0.5) * np.isin(cover, (C.ARABLE, C.PASTURE, C.COMPLEX, C.PERMANENT))
    red[water[MARGIN:-MARGIN, MARGIN:-MARGIN]] = RED_FLOOD
    return np.clip(red + RED_NOISE * rng.standard_normal(red.shape), 1, 10000).astype(np.uint16)


def damage(image, kind):
    """The image (2, H, W), modified in place, with the fault `kind` if that is a fault of its pixels."""
    _, high, wide = image.shape
    if kind == PARTIAL:  # the edge of the swath
        image = image[:, :, : round(COVERED * wide)]
    if kind == GAP:
        image[:, high // 3 : high // 3 + round(GAP_SHARE * high)] = 0
    if kind == NONFINITE:
        at = np.linspace(0.25, 0.75, NONFINITE_PIXELS)
        image[:, (at * high).astype(int), (at * wide).astype(int)] = np.nan
    return image


# ---- Files ---------------------------------------------------------------------------------------


def write_folder(place, root, parameters, faults):
    """Simulates a folder and writes it under root. Returns its entries of (S1list.json, S2list.json, faults.json)."""
    folder = root / place.name
    folder.mkdir(parents=True, exist_ok=True)
    geography, sigma0, water = simulate_raw_place(place, parameters)
    flooded = flooded_dates(parameters.images, place.floods)
    starts = acquisitions(place, parameters.images)
    wrong = {date: kind for kind, (name, date) in faults.items() if name == place.name}
    entries = []
    for date, start in enumerate(starts):
        kind = wrong.get(date)
        name = product_name(place, date, start, "S" if kind == SINGLE else "D")
        image, geotransform = to_latlon(sigma0[date], place.index, parameters.size)
        for band, values in zip(BANDS, damage(image, kind)):
            if kind != MISSING and (band, kind) != ("VH", SINGLE):
                with atomic_path(folder / f"{name}_corrected_{band}.tif") as temporary:
                    write_raster(temporary, values, LATLON, geotransform, "linear")
                    if (band, kind) == ("VV", CORRUPT):
                        os.truncate(temporary, temporary.stat().st_size // 2)
        entries.append(
            {"date": f"{start:%Y-%m-%d}", "FLOODING": flooded[date], "orbit": "DESCENDING", "filename": name}
        )
    optical = []
    for when in (starts[0] + after for after in S2_DATES):
        latest = sum(start <= when for start in starts) - 1
        rng = np.random.default_rng((parameters.seed, STREAM, VERSION, place.index, when.toordinal()))
        red, (crs, pixels, _) = red_band(rng, geography, water[latest]), grid(place.index, parameters.size)
        # The preparation reads only the red band, B04.
        for band, image in (("B04", red), ("B02", red[:16, :16] // 2), ("B08", red[:16, :16] * 2)):
            with atomic_path(folder / f"S2_{when:%Y-%m-%d}_{band}.tif") as temporary:
                write_raster(temporary, image, crs, pixels, "reflectance x 10000")
        optical.append({"date": f"{when:%Y-%m-%d}", "FLOODING": flooded[latest], "filename": f"S2_{when:%Y-%m-%d}"})
    area = _outline(place.index, parameters.size)
    # In the real list, some folders are not numbered in the order of acquisition; here, every second one is not.
    return (
        _listed(place.name, entries[::-1] if place.index % 2 else entries, area),
        _listed(place.name, optical, area),
        {kind: {"folder": place.name, "filename": entries[date]["filename"]} for date, kind in wrong.items()},
    )


def _outline(index, size):
    """The area of a folder as a GeoJSON polygon, degrees."""
    crs, _, (west, south, east, north) = grid(index, size)
    longitudes, latitudes = transform(crs, LATLON, (west, west, east, east, west), (north, south, south, north, north))
    return {"type": "Polygon", "coordinates": [[[round(x, 6), round(y, 6)] for x, y in zip(longitudes, latitudes)]]}


def _listed(folder, entries, area):
    """The entry of a folder in the lists, with the last number first, as in the real lists."""
    numbered = {str(number): entry for number, entry in enumerate(entries, start=1)}
    return {"count": len(entries), **dict(reversed(numbered.items())), "folder": folder, "geo": area, "urls": []}


def write_zip(path, root):
    """Zips the folder `root`. Equal files give equal zips."""
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for member in (root, *sorted(root.rglob("*"))):
                name = f"{member.relative_to(root.parent).as_posix()}{'/' if member.is_dir() else ''}"
                info = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))
                info.create_system = 3  # Unix, which defines external_attr
                info.external_attr = (0o40755 if member.is_dir() else 0o100644) << 16
                if member.is_dir():
                    archive.writestr(info, b"")
                    continue
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, member.stat().st_size
                with open(member, "rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)


def simulate_raw_floods(out, parameters, workers=Workers()):
    """Writes a dataset of RawParameters into the folder `out`, distributing places over workers.

    The zip is written last; an interrupted run is repeated, and writes the same files. Raises DataError if `out` has
    other content, or if there are too few or too many folders for the splits.
    """
    with workers.together():
        load("rasterio", "writing GeoTIFFs")  # before the folder is begun
    out = Path(out)
    root = out / NAME
    places = workers.on_main(plan_places, parameters)
    faults = plan_faults(places, parameters.images)
    record = {
        "SIMULATED": "yes",
        "generator": "sarwmix.simulate.flood_archive",
        "version": VERSION,
        "units": "linear",
        "parameters": asdict(parameters),
    }
    with claimed(workers, out, record, last=ZIP) as complete:
        if not complete:
            found = workers.map(
                partial(write_folder, root=root, parameters=parameters, faults=faults), places, "folders"
            )
            workers.on_main(_write_lists, out, root, found)
            log.info("%s: %d folders written", out, parameters.folders)
        if not parameters.keep_tree:
            workers.on_main(shutil.rmtree, root, ignore_errors=True)


def _write_lists(out, root, found):
    radar, optical, faulty = zip(*found)
    write_json(root / S1_LIST, {entry["folder"]: entry for entry in radar})
    write_json(root / "S2list.json", {entry["folder"]: entry for entry in optical})
    at = {kind: where for part in faulty for kind, where in part.items()}
    write_json(out / FAULTS, {kind: at[kind] for kind in KINDS if kind in at})
    if len(at) < len(KINDS):
        log.warning(
            "%d of %d kinds of faulty images have no place; give more --folders or --images for them",
            len(KINDS) - len(at),
            len(KINDS),
        )
    write_zip(out / ZIP, root)


def get_args_parser():
    parser = Parser(
        "Write a simulated archive of SEN12-FLOOD, to try its preparation.", "sarwmix.simulate.flood_archive"
    )
    add_output_flags(parser)
    group = parser.add_argument_group("intermediate files")
    group.add_argument("--keep_tree", action="store_true", help=f"also keep the files of the zip in DIR/{NAME}")
    add_content_flags(parser)
    return parser


def main(argv=None):
    run_generator(get_args_parser(), RawParameters, simulate_raw_floods, argv)


if __name__ == "__main__":
    main()
