# SPDX-License-Identifier: MIT
"""A simulated SEN12-FLOOD as it is downloaded: for trying and testing the preparation, from the zip to pairs.

    python -m sarwmix.simulate.flood_archive --out DIR --folders 8 --seed 0 --workers 2

writes DIR/SEN12FLOOD.zip, and in it SEN12FLOOD/S1list.json and for each folder <name>_corrected_{VH,VV}.tif (float32,
linear σ⁰, EPSG:4326, about 10 m) and S2_<date>_B04.tif (uint16, UTM, 10 m), the grid that the preparation warps the
others onto. What does not work with real data is in it too: the images in DIR/faults.json. Nothing can be taken for
measured data: the acquisitions are dated 2000, before the satellites flew, and each file is tagged.
"""

import binascii
import logging
import math
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
    rasterio = None  # `simulate_raw_floods` says so

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
from sarwmix.simulate.patches import PIXEL, add_output_flags, run_generator
from sarwmix.simulate.radar import BANDS, PSF_REACH

log = logging.getLogger(__name__)

C = LandCover
VERSION = 1  # of the generator: another one gives other images for the same parameters
STREAM = 3  # apart from what the other generators draw from the same seed
NAME, ZIP, FAULTS = "SEN12FLOOD", "SEN12FLOOD.zip", "faults.json"
LATLON = rasterio and rasterio.CRS.from_epsg(4326)
DEGREES = 0.0000898  # side of a pixel of the Sentinel-1 images: 10 m along a meridian
EDGE = 4  # pixels of 10 m that they reach beyond the grid of the Sentinel-2 image
MARGIN = 24  # of the simulation beyond that grid: EDGE, and what the meridian turns from the grid's north
ZONES = (32735, 32736, 32737)  # southern Africa, 24° to 42° east
WEST, NORTH, SPACING, WIDE, HIGH = 300020, 8699980, 20000, 20, 40  # m, m, m; columns and rows of folders in each zone
S2_DATES = (timedelta(days=2), timedelta(days=32))

# Red band of Sentinel-2, reflectance × 10,000, of each class; of muddy flood water; and how much parcels differ.
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
RED_FLOOD, RED_PARCELS, RED_NOISE = 950, 0.5, 25

# What is wrong with some images, one each. Those that cannot be used come first, so that they go to different folders.
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
    """All that decides what is left in the folder. keep_tree: the files stay beside the zip."""

    keep_tree: bool = False


def plan_faults(places, images):
    """{kind: (name of the folder, number of the image in the order of acquisition)}, as far as there is room.

    The first training folders get one each, then a second one and so on, at most half of their images, the latest
    first. Folders of two images have no room: without one of them no pair would be left.
    """
    trains = [place.name for place in places if place.split == "train"]
    room = images // 2 if images > 2 else 0
    free = [(folder, images - 1 - turn) for turn in range(room) for folder in trains]
    return dict(zip(KINDS, free))


# ---- Where and when ------------------------------------------------------------------------------


def corner(index):
    """(EPSG code, easting, northing) of the upper left corner of folder `index`. After some thousand they repeat."""
    row, rest = divmod(index, len(ZONES) * WIDE)
    zone, column = divmod(rest, WIDE)
    return ZONES[zone], WEST + column * SPACING, NORTH - row % HIGH * SPACING


def grid(index, size, reach=0):
    """(CRS, transform, bounds) of the Sentinel-2 image of a folder, `reach` pixels larger on every side; m."""
    epsg, west, north = corner(index)
    west, north, side = west - reach * PIXEL, north + reach * PIXEL, (size + 2 * reach) * PIXEL
    return (
        rasterio.CRS.from_epsg(epsg),
        rasterio.Affine(PIXEL, 0, west, 0, -PIXEL, north),
        (west, north - side, west + side, north),
    )


def acquisitions(place, images):
    """When the images of a folder were taken, list of datetime."""
    return [FIRST_DATE + place.index * NEXT_PLACE + date * REVISIT for date in range(images)]


def product_name(place, date, start, polarisation="D"):
    """A name as the products of Sentinel-1 have it: start, end, orbit, data take, checksum."""
    name = f"S1A_IW_GRDH_1S{polarisation}V_{start:%Y%m%dT%H%M%S}_{start + timedelta(seconds=25):%Y%m%dT%H%M%S}"
    name += f"_{date + 1:06d}_{place.index + 1:06X}"
    return f"{name}_{binascii.crc_hqx(name.encode(), 0):04X}"


# ---- Images --------------------------------------------------------------------------------------


def simulate_raw_place(place, parameters):
    """One folder on its UTM grid, with MARGIN more pixels on every side, S = size + 2·MARGIN.

    Returns (geography, sigma0, water): Geography of S + 2·PSF_REACH; float32 (images, 2, S, S), linear, order VH, VV;
    bool (images, S, S), flooded. Equal arguments give equal results.
    """
    rng = np.random.default_rng((parameters.seed, STREAM, VERSION, place.index))
    geography = draw_place(rng, parameters.size + 2 * MARGIN)
    return geography, *observe_place(rng, geography, parameters.images, place.floods)


def to_latlon(sigma0, index, size):
    """Warp (2, S, S) from the UTM grid with its margin to degrees.

    Returns ((2, H, W) float32, transform of the pixels).
    """
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
    """What Sentinel-2 sees in the red of the inner part of a place: (size, size) uint16, reflectance × 10,000."""
    inner = slice(PSF_REACH + MARGIN, -PSF_REACH - MARGIN)
    cover, parcel = geography.land_cover[inner, inner], geography.parcel[inner, inner]
    red = np.array([RED[cover] for cover in LandCover], np.float32)[cover]
    red *= 1 + RED_PARCELS * (hashed(parcel, 51) - 0.5) * np.isin(cover, (C.ARABLE, C.PASTURE, C.COMPLEX, C.PERMANENT))
    red[water[MARGIN:-MARGIN, MARGIN:-MARGIN]] = RED_FLOOD
    return np.clip(red + RED_NOISE * rng.standard_normal(red.shape), 1, 10000).astype(np.uint16)


def damage(image, geotransform, kind):
    """(image (2, H, W), transform) with the fault `kind` that shows in the pixels.

    Any other leaves them as they are.
    """
    _, high, wide = image.shape
    if kind == PARTIAL:  # the swath ends here
        image = image[:, :, : round(COVERED * wide)]
    if kind == GAP:
        image[:, high // 3 : high // 3 + round(GAP_SHARE * high)] = 0
    if kind == NONFINITE:
        at = np.linspace(0.25, 0.75, NONFINITE_PIXELS)
        image[:, (at * high).astype(int), (at * wide).astype(int)] = np.nan
    return image, geotransform


# ---- Files ---------------------------------------------------------------------------------------


def write_raster(path, image, crs, geotransform, units, cut=False):
    """A GeoTIFF of one band (H, W). cut: only half of the file."""
    with atomic_path(path) as temporary:
        with rasterio.open(
            temporary,
            "w",
            driver="GTiff",
            width=image.shape[1],
            height=image.shape[0],
            count=1,
            dtype=image.dtype,
            crs=crs,
            transform=geotransform,
        ) as file:
            file.update_tags(SIMULATED="yes", UNITS=units)
            file.write(image, 1)
        if cut:
            with open(temporary, "r+b") as file:
                file.truncate(temporary.stat().st_size // 2)


def write_folder(place, root, parameters, faults):
    """Simulate one folder and write it under root. Returns its entries of (S1list.json, S2list.json, faults.json)."""
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
        image, geotransform = damage(*to_latlon(sigma0[date], place.index, parameters.size), kind)
        for band, values in zip(BANDS, image):
            if kind != MISSING and (band, kind) != ("VH", SINGLE):
                write_raster(
                    folder / f"{name}_corrected_{band}.tif",
                    values,
                    LATLON,
                    geotransform,
                    "linear",
                    cut=(band, kind) == ("VV", CORRUPT),
                )
        entries.append(
            {"date": f"{start:%Y-%m-%d}", "FLOODING": flooded[date], "orbit": "DESCENDING", "filename": name}
        )
    optical = []
    for when in (starts[0] + after for after in S2_DATES):
        latest = sum(start <= when for start in starts) - 1
        rng = np.random.default_rng((parameters.seed, STREAM, VERSION, place.index, when.toordinal()))
        _write_optical(folder, when, place.index, red_band(rng, geography, water[latest]))
        optical.append({"date": f"{when:%Y-%m-%d}", "FLOODING": flooded[latest], "filename": f"S2_{when:%Y-%m-%d}"})
    area = _outline(place.index, parameters.size)
    # In the real list some folders are not numbered in the order of acquisition: here every second one.
    return (
        _listed(place.name, entries[::-1] if place.index % 2 else entries, area),
        _listed(place.name, optical, area),
        {kind: {"folder": place.name, "filename": entries[date]["filename"]} for date, kind in wrong.items()},
    )


def _write_optical(folder, when, index, red):
    """The bands of Sentinel-2 of one date. Only the red one is read; the others are there to be left out."""
    crs, pixels, _ = grid(index, len(red))
    for band, image in (("B04", red), ("B02", red[:16, :16] // 2), ("B08", red[:16, :16] * 2)):
        write_raster(folder / f"S2_{when:%Y-%m-%d}_{band}.tif", image, crs, pixels, "reflectance x 10000")


def _outline(index, size):
    """GeoJSON polygon of the area of a folder, degrees."""
    crs, _, (west, south, east, north) = grid(index, size)
    longitudes, latitudes = transform(crs, LATLON, (west, west, east, east, west), (north, south, south, north, north))
    return {"type": "Polygon", "coordinates": [[[round(x, 6), round(y, 6)] for x, y in zip(longitudes, latitudes)]]}


def _listed(folder, entries, area):
    """What the lists say of a folder; the last number comes first, as in the real ones."""
    numbered = {str(number): entry for number, entry in enumerate(entries, start=1)}
    return {"count": len(entries), **dict(reversed(numbered.items())), "folder": folder, "geo": area, "urls": []}


def write_zip(path, root):
    """Everything under root, with the name of that folder, as a zip; equal files make equal zips."""
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for member in (root, *sorted(root.rglob("*"))):
                name = f"{member.relative_to(root.parent).as_posix()}{'/' if member.is_dir() else ''}"
                info = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))
                info.create_system = 3  # the system whose modes follow
                info.external_attr = (0o40755 if member.is_dir() else 0o100644) << 16
                if member.is_dir():
                    archive.writestr(info, b"")
                    continue
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, member.stat().st_size
                with open(member, "rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)


def simulate_raw_floods(out, parameters, workers=Workers()):
    """Write a dataset of RawParameters under the folder `out`, the places spread over workers.

    The zip comes last: what was interrupted is not complete, and running again writes the same files. Returns False if
    everything was there already. Raises DataError when `out` holds something else, or the folders are too few or too
    many for the splits.
    """

    def plan():
        load("rasterio", "writing GeoTIFFs")  # before the folder is begun
        return plan_places(parameters)

    out = Path(out)
    root = out / NAME
    places = workers.on_main(plan)
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
        if not parameters.keep_tree:
            workers.on_main(shutil.rmtree, root, ignore_errors=True)
    return not complete


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
        "Write a simulated SEN12-FLOOD as it is downloaded, for trying its preparation.",
        "sarwmix.simulate.flood_archive",
    )
    add_output_flags(parser)
    group = parser.add_argument_group("intermediate files")
    group.add_argument("--keep_tree", action="store_true", help=f"keep the files of the zip in DIR/{NAME} too")
    add_content_flags(parser)
    return parser


def main(argv=None):
    run_generator(get_args_parser(), RawParameters, simulate_raw_floods, "folders", argv)


if __name__ == "__main__":
    main()
