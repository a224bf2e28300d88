# SPDX-License-Identifier: MIT
"""Results per image as maps: GeoTIFFs with a pixel per tile, and tables with the outline of each image.

A georeference is a DataFrame with a row per image: scene, row, column, crs ("EPSG:32633", WKT or "") and a … f, the
affine map from (column, row) in pixels to coordinates.
"""

import logging
import re
from collections import namedtuple
from math import gcd
from pathlib import Path

import numpy as np

from common.errors import DataError, UsageError
from common.files import write_atomically
from common.packages import load

AFFINE = list("abcdef")
LATLON = "EPSG:4326"
MOST_PIXELS = 2**28  # of a map
LEAST_STRIDE = 16  # a map of tiles that are nearer to each other than a 16th of their side is refused

log = logging.getLogger(__name__)

# The tiles of one scene on a grid. samples: their numbers; rows, columns: their places on the map of this shape.
Grid = namedtuple("Grid", "scene crs transform shape samples rows columns")


def grids_of(georeference, size, flag):
    """The Grid of each scene. size: side of the tiles, pixels. Raises UsageError, naming the flag, if there is none."""
    if georeference is None:
        raise UsageError(
            f"{flag}: the images have no coordinates, which a map needs; give tiles of sarwmix.tile, or another file "
            "type"
        )
    grids = [_grid_of(scene, table, size, flag) for scene, table in georeference.groupby("scene", sort=True)]
    if len(grids) == len(georeference) > 1:
        raise UsageError(
            f"{flag}: each of the {len(grids)} images is a scene of its own, with a map of one pixel; name their "
            "scenes in a column group, or use another file type"
        )
    return grids


def _grid_of(scene, table, size, flag):
    first = table.iloc[0]
    same = np.allclose(table[["a", "b", "d", "e"]], first[["a", "b", "d", "e"]].astype(float), rtol=1e-6, atol=0)
    matrix = np.array([[first.a, first.b], [first.d, first.e]], float)
    if not same or (table.crs != first.crs).any() or not np.linalg.det(matrix):
        raise UsageError(f"{flag}: the images of {scene} differ in pixel size or coordinate system; use .parquet")
    # Distances from the first tile in pixels; those of a grid are multiples of the stride.
    apart = (table[["c", "f"]].to_numpy(float) - [first.c, first.f]) @ np.linalg.inv(matrix).T
    places = np.rint(apart).astype(int)
    stride = gcd(*places.ravel().tolist()) or size
    if np.abs(apart - places).max() > 0.05 or stride * LEAST_STRIDE < size:
        raise UsageError(
            f"{flag}: the images of {scene} do not lie on a regular grid, which a map needs, with a step of at least "
            f"a {LEAST_STRIDE}th of their side; use .parquet"
        )
    places -= places.min(0)
    column, row = (np.rint(apart).astype(int)).min(0)
    columns, rows = (places // stride).T
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    if shape[0] * shape[1] > MOST_PIXELS:
        raise UsageError(f"{flag}: a map of {scene} would have {shape[0]}x{shape[1]} pixels; use .parquet")
    # A pixel of the map has the side of the stride, and the centre of its tile.
    offset = np.array([column, row]) + (size - stride) / 2
    c, f = matrix @ offset + [first.c, first.f]
    a, b, d, e = (matrix * stride).ravel()
    return Grid(scene, first.crs, (a, b, c, d, e, f), shape, table.index.to_numpy(), rows, columns)


def write_maps(path, grids, values, names):
    """Writes values (N, K) as GeoTIFFs of K float32 bands with these names, one for each scene; NaN for no tile.

    With several scenes, the name of each is put into that of its file. Each file is written atomically.
    """
    rasterio, path = load("rasterio", "writing maps"), Path(path)
    for grid, target in zip(grids, map_paths(path, [grid.scene for grid in grids])):
        bands = np.full((values.shape[1], *grid.shape), np.nan, np.float32)
        bands[:, grid.rows, grid.columns] = np.asarray(values, np.float32)[grid.samples].T
        # In memory first: where the disk is full, GDAL may leave a damaged file and say nothing.
        with rasterio.MemoryFile() as memory:
            with memory.open(
                driver="GTiff",
                height=grid.shape[0],
                width=grid.shape[1],
                count=len(bands),
                dtype="float32",
                crs=grid.crs or None,
                transform=rasterio.Affine(*grid.transform),
                nodata=np.nan,
                compress="deflate",
                BIGTIFF="IF_SAFER",
            ) as file:
                for number, name in enumerate(names, start=1):
                    file.set_band_description(number, name)
                file.write(bands)
            content = memory.getbuffer()
            write_atomically(target, lambda file, content=content: file.write(content))
        log.info("wrote %s: %d bands of %dx%d pixels, one for each tile", target, len(bands), *grid.shape)


def map_paths(path, scenes):
    """The path of the map of each scene, all different; "_" stands for what a name of a file cannot hold."""
    path, paths = Path(path), {}
    if len(scenes) == 1:
        return [path]
    for scene in scenes:
        name, number = re.sub(r"[/\\\0]", "_", scene), 1
        target = path.with_name(f"{path.stem}_{name}{path.suffix}")
        while target in paths:
            number += 1
            target = path.with_name(f"{path.stem}_{name}-{number}{path.suffix}")
        paths[target] = scene
    return list(paths)


def principal_components(features, count=3):
    """The first principal components (N, count) float32 of features (N, C), and the share of variance of each.

    The sign of a component is that which makes its largest loading positive. With fewer features or samples than
    `count`, the remaining components are 0.
    """
    centred = np.asarray(features, np.float64) - np.mean(features, 0, dtype=np.float64)
    variance, loadings = np.linalg.eigh(centred.T @ centred)
    variance, loadings = variance[::-1][:count], loadings[:, ::-1][:, :count]
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(0), range(loadings.shape[1])])
    result = np.zeros((len(features), count), np.float32)
    result[:, : loadings.shape[1]] = centred @ loadings
    return result, np.maximum(variance, 0) / max(np.square(centred).sum(), 1e-30)


# ---- Outlines ------------------------------------------------------------------------------------


def with_outlines(frame, georeference, size):
    """The frame with the georeference and the outline of each image, in longitude and latitude: a GeoDataFrame.

    size: side of the images in pixels. Without the package geopandas, a DataFrame without outlines, with a warning.
    """
    frame = frame.assign(**{name: georeference[name].to_numpy() for name in georeference})
    try:
        geopandas = load("geopandas", "writing outlines")
    except DataError as error:
        log.warning("%s; the table has no outlines", error)
        return frame
    import shapely

    corners = outlines(georeference, size)
    shapes = np.full(len(frame), None, object)
    known = np.isfinite(corners).all((1, 2))
    shapes[known] = shapely.polygons(corners[known])
    return geopandas.GeoDataFrame(frame, geometry=shapes, crs=LATLON)


def outlines(georeference, size):
    """The corners (N, 5, 2) of images in longitude and latitude, the first twice; NaN without a coordinate system.

    Across the antimeridian, longitudes go on beyond 180. An image around a pole has no outline: NaN.
    """
    warp = load("rasterio.warp", "writing outlines")
    square = np.array([[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]], float) * size  # (column, row)
    a, b, c, d, e, f = (georeference[name].to_numpy(float)[:, None] for name in AFFINE)
    x, y = (p * square[:, 0] + q * square[:, 1] + r for p, q, r in ((a, b, c), (d, e, f)))
    corners = np.full((len(georeference), 5, 2), np.nan)
    crs = georeference.crs.to_numpy(str)
    for name in filter(None, np.unique(crs)):
        some = crs == name
        longitude, latitude = warp.transform(name, LATLON, x[some].ravel(), y[some].ravel())
        corners[some] = np.stack([longitude, latitude], -1).reshape(-1, 5, 2)
    corners[~np.isfinite(corners).all((1, 2))] = np.nan
    longitude = corners[:, :, 0]
    longitude[np.ptp(longitude, 1) > 180] %= 360
    corners[np.ptp(longitude, 1) > 180] = np.nan
    return corners
