# SPDX-License-Identifier: MIT
"""SEN12-FLOOD as downloaded, in miniature, and the preparation programs run on it."""

import csv
import hashlib
import json
import os
import signal
import subprocess

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform_bounds

from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import write_tif
from tests.helpers.runs import argv

try:
    from sarwmix.sen12_align_s1_to_s2 import align
    from sarwmix.sen12_align_s1_to_s2 import main as align_main

    needs_gdal = []
except ImportError:
    needs_gdal = pytest.mark.skip("GDAL's Python binding is not installed")

    def align(*_, **__):
        """For the tests of the steps that follow, and their fixtures: they need aligned images, and are skipped."""
        pytest.skip("GDAL's Python binding is not installed")

    align_main = align

S = 128


LATLON = rasterio.CRS.from_epsg(4326)


SOUTH, NORTH = (
    (32737, 256000.0, 9868000.0),
    (32631, 498000.0, 5432100.0),
)  # EPSG, easting and northing of the upper left corner


TEN_METRES = 0.0000898  # degrees


def image_name(k, kind="D"):
    return f"S1A_IW_GRDH_1S{kind}V_201901{k + 1:02d}T031123_201901{k + 1:02d}T031148_014805_01B9FF_DC8A"


def utm_grid(where=SOUTH, size=S):
    epsg, left, top = where
    return rasterio.CRS.from_epsg(epsg), rasterio.Affine(10, 0, left, 0, -10, top)


def latlon_grid(where=SOUTH, degrees=TEN_METRES, margin=6, size=S):
    """(transform, shape) of a grid in degrees that covers the reference and `margin` pixels more."""
    crs, pixels = utm_grid(where)
    left, top = pixels.c, pixels.f
    west, south, east, north = transform_bounds(crs, LATLON, left, top - 10 * size, left + 10 * size, top)
    shape = [int(np.ceil(extent / degrees)) + 2 * margin for extent in (north - south, east - west)]
    return rasterio.Affine(degrees, 0, west - margin * degrees, 0, -degrees, north + margin * degrees), tuple(shape)


def write_reference(root, folder, where=SOUTH, size=S, date="2019-01-05"):
    crs, pixels = utm_grid(where)
    return write_tif(
        root / folder / f"S2_{date}_B04.tif", np.full((size, size), 900, np.uint16), crs=crs, transform=pixels
    )


def write_channel(root, folder, name, channel, values, pixels, **options):
    return write_tif(
        root / folder / f"{name}_corrected_{channel}.tif",
        values.astype(np.float32),
        crs=LATLON,
        transform=pixels,
        **options,
    )


def speckle(seed, shape, mean):
    return (mean * np.random.default_rng(seed).gamma(4.4, 1 / 4.4, shape)).astype(np.float32)


def write_image(root, folder, name, vh=None, vv=None, where=SOUTH):
    """Both channels on a grid in degrees; speckle about 0.02 and 0.1 unless given."""
    pixels, shape = latlon_grid(where)
    for channel, values, mean in (("VH", vh, 0.02), ("VV", vv, 0.1)):
        seed = int(hashlib.sha256(f"{folder}{name}{channel}".encode()).hexdigest()[:8], 16)
        write_channel(root, folder, name, channel, speckle(seed, shape, mean) if values is None else values, pixels)


def write_list(root, folders):
    """S1list.json of {folder: [(name, flooded)]}."""
    root.mkdir(parents=True, exist_ok=True)
    content = {
        folder: {
            "count": len(entries),
            **{str(n): {"filename": name, "FLOODING": flooded} for n, (name, flooded) in enumerate(entries, start=1)},
        }
        for folder, entries in folders.items()
    }
    (root / "S1list.json").write_text(json.dumps(content))


def write_raw(root, folders):
    """A whole data set from {folder: (flooded, flooded, …)}; returns {folder: [names]}."""
    entries = {
        folder: [(image_name(k), flooded) for k, flooded in enumerate(states)] for folder, states in folders.items()
    }
    write_list(root, entries)
    for folder in folders:
        write_reference(root, folder)
        for name, _ in entries[folder]:
            write_image(root, folder, name)
    return {folder: [name for name, _ in part] for folder, part in entries.items()}


def read(path):
    with rasterio.open(path) as file:
        return file.read()


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def kill_midway(command, ready):
    """Start a command in a session of its own, and kill all of it with SIGKILL as soon as ready() holds."""
    process = subprocess.Popen(
        argv(command), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not ready():
            try:
                assert False, f"ended with {process.wait(0.002)} before it could be killed"
            except subprocess.TimeoutExpired:
                continue
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def truncate(root, name, size=None):
    path = root / "0001" / f"{name}_corrected_VV.tif"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2 if size is None else size)


def overwrite(path, rows, channels=(1, 2), value=0):
    """Set the first `rows` pixels, counted along the rows, of an aligned image."""
    with rasterio.open(path, "r+") as file:
        for channel in channels:
            values = file.read(channel)
            values.ravel()[:rows] = value
            file.write(values, channel)


def folder_list(path, *names):
    path.write_text("".join(f"{name}\n" for name in names))
    return path
