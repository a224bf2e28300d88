# SPDX-License-Identifier: MIT
"""The map of a scene: a GeoTIFF on its grid with the class of each pixel, or the probabilities, and a picture of it.

Scenes are larger than memory, so the map is written strip by strip into a temporary file, which gets its name at the
end. GDAL may leave a damaged file on a full disk and say nothing; therefore checksums of what was written are compared
with what the closed file holds.
"""

import logging
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch

from common.errors import TrainingError, UsageError, reason_of
from common.files import atomic_path
from common.packages import load
from util.misc import duration
from util.scene_pictures import CLASS_TAG, Overview, class_colours, draw_map, read_map
from util.sliding import blended_rows

VALUES = ("classes", "probabilities")
NO_DATA = 255  # of a map of classes
BLOCK = 512  # side of the blocks of a map; of its coarsest overview, at most
CACHE_BYTES = 64 * 2**20  # of blocks of files; GDAL would take 5 % of the memory
MOST_PIXELS = 900  # of a side of the picture of a scene
LOG_SECONDS = 30.0
SUFFIXES = (".tif", ".tiff")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a map holds. pixels: {class: pixels of which it is the most probable}. no_data: pixels without data."""

    pixels: dict
    no_data: int
    seconds: float


def check_map(path, classes, values="classes"):
    """Raises UsageError if a map with these names of classes cannot be written at `path`. For use before any work."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a map is a GeoTIFF; give a name that ends in .tif")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it, or choose another path")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; choose another path")
    if values not in VALUES:
        raise UsageError(f"{path}: a map of {values} is not known; choose from {', '.join(VALUES)}")
    if not 1 <= len(classes) <= NO_DATA:
        raise UsageError(f"{path}: a map has 1 to {NO_DATA} classes, and the model has {len(classes)}")


def map_scene(image, predict, path, classes, windows, values="classes"):
    """Writes the map of a scene, and beside it <stem>.png with both. Returns a Summary.

    image: of `sarwmix.raster`, or what has name, height, width, crs, transform and opened(). predict: as for
    `util.sliding.blended_rows`. classes: names. windows: a Windows. values: "classes", one uint8 band with the number
    of the most probable class, NO_DATA, colours and names; or "probabilities", a float32 band per class, NaN for no
    data. Pixels without data in VH or VV have none in the map. Memory is that of a row of windows and one of blocks.
    Raises UsageError if the map cannot be written; an existing map then stays as it is. Raises TrainingError for
    probabilities that are not finite.
    """
    path, started = Path(path), time.monotonic()
    check_map(path, classes, values)
    if not image.crs:
        log.warning("%s: has no coordinate system, so its map has none either", image.name)
    cache = load("rasterio", "writing maps").Env(GDAL_CACHEMAX=CACHE_BYTES)
    with _written(path), cache, atomic_path(path) as temporary:
        target = _Target(temporary, path, image, classes, values)
        scene = Overview(image.height, image.width, MOST_PIXELS)
        counts = _map_rows(image, predict, windows, target, scene)
        found = target.finish()
    picture = path.with_suffix(".png")
    with _written(picture, f"; the map {path} is complete"), atomic_path(picture) as temporary:
        draw_map(scene, image.transform, found, MOST_PIXELS / 150).savefig(temporary, format="png")
    pixels = dict(zip(classes, counts.tolist()))
    no_data = int(counts[NO_DATA])
    result = Summary(pixels, no_data, time.monotonic() - started)
    shares = [f"{name} {n / max(1, sum(pixels.values())):.1%}" for name, n in pixels.items()]
    log.info(
        "wrote %s: %dx%d pixels in %.0f s; %s; %.1f%% without data",
        path,
        image.height,
        image.width,
        result.seconds,
        ", ".join(shares),
        100 * no_data / counts.sum(),
    )
    return result


def _map_rows(image, predict, windows, target, scene):
    """Predicts a scene into a _Target and its Overview. Returns the pixels of each class number (256,), NO_DATA too."""
    counts, known_rows, started = np.zeros(256, np.int64), {}, time.monotonic()
    logged = started

    def noted(row, column, height, width):
        values = read(row, column, height, width)
        inside = values[:, : image.height - row, : image.width]
        scene.add(row, inside)
        known_rows.update(enumerate(np.isfinite(inside).all(0), start=row))
        return values

    with image.opened() as read, target.opened():
        for row, probabilities in blended_rows(noted, image.height, image.width, predict, windows):
            rows = probabilities.shape[1]
            known = np.stack([known_rows.pop(place) for place in range(row, row + rows)])
            counts += target.add(probabilities, known, image.name)
            now, done = time.monotonic(), row + rows
            if now - logged > LOG_SECONDS:
                logged, left = now, (now - started) / done * (image.height - done)
                log.info("%s: row %d of %d, ETA %s", image.name, done, image.height, duration(left))
    return counts


@contextmanager
def _written(path, note=""):
    """Turns errors of writing in the block into a UsageError that names `path`."""
    rasterio = load("rasterio", "writing maps")
    failures = rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError, OSError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            yield
    except failures as error:  # some of GDAL's own are not made RasterioErrors
        reason = " ".join((getattr(error, "strerror", None) or reason_of(error.__cause__ or error)).split())
        raise UsageError(
            f"{path}: could not be written ({reason}; disk full?); make room, or choose another path{note}"
        ) from error


class _Target:
    """The GeoTIFF of a map, written from top to bottom in whole rows of blocks.

    A block that is written in parts would be compressed, and stored, again and again.
    """

    def __init__(self, temporary, path, image, classes, values):
        """temporary: where to write. path: for messages."""
        self.temporary, self.path, self.image, self.classes = temporary, path, image, classes
        self.of_classes = values == "classes"
        bands = 1 if self.of_classes else len(classes)
        self.rows = np.empty((bands, BLOCK, image.width), np.uint8 if self.of_classes else np.float32)
        self.filled, self.checksums = 0, []
        self.names = [f"class: {_numbered(classes)}"] if self.of_classes else list(classes)

    @contextmanager
    def opened(self):
        """Creates the file, and closes it after the block with all that was added.

        Errors of writing name this file at once: a scene that is open would take errors of rasterio for its own.
        """
        rasterio = load("rasterio", "writing maps")
        with _written(self.path):
            self.file = rasterio.open(self.temporary, "w", **self._options(rasterio))
            for number, name in enumerate(self.names, start=1):
                self.file.set_band_description(number, name)
            if self.of_classes:
                colours = [(*colour, 255) for colour in class_colours(self.classes).tolist()]
                self.file.write_colormap(1, dict(enumerate(colours)) | {NO_DATA: (0, 0, 0, 0)})
                self.file.update_tags(1, **{CLASS_TAG.format(k): name for k, name in enumerate(self.classes)})
        try:
            yield
            self._flush()
        except BaseException:
            with suppress(rasterio.errors.RasterioError, OSError):
                self.file.close()
            raise
        with _written(self.path):
            self.file.close()

    def _options(self, rasterio):
        image, (bands, _, width) = self.image, self.rows.shape
        placed = tuple(image.transform) != (1, 0, 0, 0, 1, 0)
        return {
            "driver": "GTiff",
            "height": image.height,
            "width": width,
            "count": bands,
            "dtype": self.rows.dtype,
            "crs": image.crs or None,
            "transform": rasterio.Affine(*image.transform) if placed else None,
            "nodata": NO_DATA if self.of_classes else np.nan,
            "tiled": True,
            "blockxsize": BLOCK,
            "blockysize": BLOCK,
            "interleave": "band",
            "compress": "deflate",
            "predictor": 1 if self.of_classes else 3,  # numbers of classes have no order
            "num_threads": "all_cpus",
            "BIGTIFF": "IF_SAFER",
        }

    def add(self, probabilities, known, name):
        """Adds rows: a tensor of probabilities (K, rows, W), and where there are data (rows, W).

        Returns the pixels of each class number (256,). Raises TrainingError, with the name of the scene.
        """
        if len(probabilities) != len(self.classes):
            raise UsageError(
                f"{self.path}: the model has {len(probabilities)} classes, and {len(self.classes)} are named; name each"
            )
        classes = np.where(known, _most_probable(probabilities).cpu().numpy(), np.uint8(NO_DATA))
        if not np.isfinite(probabilities.sum(0).cpu().numpy()[known]).all():
            raise TrainingError(f"{name}: the model gives probabilities that are not finite; train it again")
        values = classes[None] if self.of_classes else np.where(known, probabilities.cpu().numpy(), np.nan)
        while values.shape[1]:
            part = values[:, : BLOCK - self.filled]
            self.rows[:, self.filled : self.filled + part.shape[1]] = part
            self.filled, values = self.filled + part.shape[1], values[:, part.shape[1] :]
            if self.filled == BLOCK:
                self._flush()
        return np.bincount(classes.ravel(), minlength=256)

    def _window(self, number):
        """The rows of blocks with this number."""
        top = number * BLOCK
        return (top, min(top + BLOCK, self.image.height)), (0, self.image.width)

    def _flush(self):
        if self.filled:
            rows, self.filled = self.rows[:, : self.filled], 0
            with _written(self.path):
                self.file.write(rows, window=self._window(len(self.checksums)))
            self.checksums.append(_checksum(rows))

    def finish(self):
        """Adds overviews to the closed file and checks all of it. Returns its Map, as coarse as its picture."""
        rasterio = load("rasterio", "writing maps")
        factors = [2**k for k in range(1, 32) if max(self.image.height, self.image.width) > BLOCK * 2 ** (k - 1)]
        if factors:
            kind = rasterio.enums.Resampling.mode if self.of_classes else rasterio.enums.Resampling.average
            with rasterio.open(self.temporary, "r+") as file:
                file.build_overviews(factors, kind)
        with rasterio.open(self.temporary) as file:
            whole = list(file.descriptions) == self.names and file.overviews(1) == factors
            for number, checksum in enumerate(self.checksums):
                whole = whole and _checksum(file.read(window=self._window(number))) == checksum
            if not (whole and all(_has_blocks(file, level, factor) for level, factor in enumerate(factors))):
                raise OSError("the file does not hold what was written")
            found = read_map(file, MOST_PIXELS)
        for level in range(len(factors)):  # blocks are compressed with a checksum, which reading compares
            with rasterio.open(self.temporary, overview_level=level) as file:
                for _, window in file.block_windows(1):
                    file.read(window=window)
        return found


def _most_probable(probabilities):
    """(K, …) → the number of the class, uint8, the first of several; argmax takes 4 to 13 times as long on a CPU."""
    highest, number = probabilities[0].clone(), torch.zeros_like(probabilities[0], dtype=torch.uint8)
    for k, values in enumerate(probabilities[1:], start=1):
        number.masked_fill_(values > highest, k)
        torch.maximum(highest, values, out=highest)
    return number


def _numbered(classes):
    return ", ".join(f"{number} {name}" for number, name in enumerate(classes))


def _checksum(rows):
    return zlib.crc32(np.ascontiguousarray(rows))


def _has_blocks(file, level, factor):
    """Whether all blocks of an overview are in the file; GDAL reads one that is missing as no data."""
    down, across = (ceil(ceil(side / factor) / BLOCK) for side in file.shape)
    return all(
        file.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=band, ovr=level)
        for band in file.indexes
        for row in range(down)
        for column in range(across)
    )
