# SPDX-License-Identifier: MIT
"""Reads one band of a GeoTIFF, with errors that name the file, and writes GeoTIFFs."""

import logging
import os
import warnings
from contextlib import contextmanager
from functools import cache

import numpy as np

from common.errors import DataError
from common.files import write_atomically
from common.packages import PACK_ELSEWHERE, load

POLARISATIONS = ("VH", "VV", "HH", "HV")
CACHE_BYTES = 64 * 2**20  # of blocks of files, in each process; GDAL would take 5 % of the memory
MOST_PIXELS = 2**26  # of an image; a damaged header may claim more


def check_nonfinite(values, source, max_nonfinite):
    """Raises DataError, which names `source`, if more than `max_nonfinite` of the values are NaN or infinite."""
    fraction = (values.size - np.count_nonzero(np.isfinite(values))) / max(values.size, 1)
    if fraction > max_nonfinite:
        raise DataError(
            f"{source}: {fraction:.2%} of the pixels are NaN, infinite or no data, more than the {max_nonfinite:.2%} "
            "allowed; remove its row from the list, or raise --max_nonfinite"
        )


@cache
def load_rasterio():
    """The package rasterio, with its log silenced, which repeats its exceptions."""
    rasterio = load("rasterio", "reading GeoTIFFs", PACK_ELSEWHERE)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    return rasterio


@contextmanager
def opened_geotiff(path, listed=True, georeferenced=True):
    """Yields an open GeoTIFF of rasterio. Raises DataError, with the path, for errors of rasterio in the block too.

    listed: whether GDAL looks for sidecar files, for which it lists the folder, slow on a parallel file system.
    georeferenced: whether it reads the coordinate system, which takes longer than a small image.
    """
    rasterio = load_rasterio()
    options = {"GDAL_CACHEMAX": CACHE_BYTES} | ({} if listed else {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"})
    sources = {} if georeferenced else {"GEOREF_SOURCES": "NONE"}
    try:
        with warnings.catch_warnings(), rasterio.Env(**options):
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, driver="GTiff", **sources) as src:
                yield src
    except (rasterio.errors.RasterioError, OSError, UnicodeDecodeError) as error:  # the last of a damaged description
        if not os.path.exists(path):
            raise DataError(f"{path}: does not exist; copy it here, or remove its row from the list") from None
        if kind := _other_format(path):
            raise DataError(f"{path}: {kind}") from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{path}: cannot be read, it is corrupt, truncated or not a GeoTIFF ({reason}); copy it again"
        ) from error


def _other_format(path):
    """For a message: what a file is that is no GeoTIFF, and the remedy; None if that is not known."""
    if os.path.isdir(path):
        return "is a folder, of a SAFE product perhaps; give calibrated and geocoded GeoTIFFs (docs/YOUR_DATA.md)"
    with open(path, "rb") as file:
        head = file.read(8)
    known = {
        b"CDF": "NetCDF",
        b"\x89HDF": "HDF5 or NetCDF",
        b"\x89PNG": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"PK\x03\x04": "ZIP",
        b"SIMPLE": "FITS",
    }
    for sign, name in known.items():
        if head.startswith(sign):
            return f"is a {name} file, not a GeoTIFF; convert it (gdal_translate) to a GeoTIFF with the bands VV and VH"
    return None


def _band_number(src, path, band):
    """1-based number of the band: the only one, or the one whose description is `band`."""
    names = [(description or "").strip().upper() for description in src.descriptions]
    if src.count == 1:
        if band and names[0] in POLARISATIONS and names[0] != band:
            raise DataError(f"{path}: holds {names[0]} by its band description, not {band}; restore the right file")
        return 1
    if not band:
        raise DataError(f"{path}: has {src.count} bands, and one is needed; write it alone (gdal_translate -b N)")
    matching = [number for number, name in enumerate(names, start=1) if name == band]
    if len(matching) != 1:
        raise DataError(
            f"{path}: has {src.count} bands, and {len(matching)} of them are described as {band} "
            f"(descriptions: {', '.join(name or 'none' for name in names)}); store one band per file, or describe them"
        )
    return matching[0]


def read_values(path, band=None):
    """The values of one band of a GeoTIFF, (H, W) of the type of the file, and its no-data value, or None.

    band: as of `read_band`. Raises DataError with the path if the file cannot be read, or has several bands.
    """
    with opened_geotiff(path, listed=False, georeferenced=False) as src:
        number = _band_number(src, path, band)
        if src.width * src.height > MOST_PIXELS:
            raise DataError(f"{path}: claims to have {src.height}x{src.width} pixels, so it is damaged; copy it again")
        return src.read(number), src.nodatavals[number - 1]


def read_band(path, max_nonfinite=0.01, band=None, integers=True):
    """Reads one band of a GeoTIFF, in the units of the file: (H, W) float32. No-data pixels are NaN.

    max_nonfinite: fraction of NaN, infinite and no-data pixels above which reading fails. Below it, they are kept, and
    the preparation of batches replaces them.
    band: name of the band ("VH"). A file with several bands is read only if exactly one of them has this description;
    bands are never selected by position.
    integers: whether integer types are accepted. Values in dB are not integers, but counts, or dB times a factor, are.
    Raises DataError with the path if the file is missing, unreadable, corrupt or truncated, or has several bands, too
    many pixels, another type or too many non-finite pixels; also if rasterio is not installed.
    """
    values, nodata = read_values(path, band)
    if np.iscomplexobj(values):
        raise DataError(f"{path}: holds complex values; give detected backscatter (float32)")
    if not integers and values.dtype.kind != "f":
        raise DataError(
            f"{path}: holds {values.dtype}, but dB are fractions; give 10*log10 of the backscatter as float32"
        )
    values = values.astype(np.float32, copy=False)
    if nodata is not None:
        values[values == np.float32(nodata)] = np.nan
    check_nonfinite(values, path, max_nonfinite)
    return values


def write_geotiff(path, values, names=(), tags=None, **profile):
    """Writes bands, (n, H, W), as a GeoTIFF, atomically.

    names: descriptions of the bands. tags: {name: text} of the file. profile: other options of rasterio (crs,
    transform, nodata, compress, …). Raises DataError without rasterio.
    """
    rasterio, (count, height, width) = load("rasterio", "writing GeoTIFFs"), values.shape
    options = {"count": count, "height": height, "width": width, "dtype": values.dtype, **profile}
    # In memory first: where the disk is full, GDAL may leave a damaged file and say nothing.
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(driver="GTiff", **options) as file:
            for number, name in enumerate(names, start=1):
                file.set_band_description(number, name)
            file.update_tags(**(tags or {}))
            file.write(values)
        write_atomically(path, lambda file: file.write(memory.getbuffer()))
