# SPDX-License-Identifier: MIT
"""Reads Sentinel-1 images of any origin as VH and VV in dB: GeoTIFFs with both bands, or with one band each.

Polarisations come from the descriptions of the bands, the name of a file of one band, or `--bands`; never from the
order of bands alone. Units are stated by `--units`. Pixels are no data where a tag, a mask or alpha band, NaN or
`--nodata` says so, and where linear backscatter is not positive.
"""

import os
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.command_line import finite, positive
from common.errors import DataError, data_error
from sarwmix.geotiff import MOST_PIXELS, POLARISATIONS, check_nonfinite, load_rasterio, opened_geotiff
from sarwmix.layouts import SUFFIXES
from sarwmix.listing import CHANNELS
from sarwmix.plausibility import check_decibels, check_linear

READ_AS = ("dB", "linear", "amplitude")
NOMINAL_CALIBRATION = 1 / 500  # amplitude per digital number: the order of the calibration tables of IW GRDH products
NEAR = 0.01  # pixels: the largest distance of two grids that count as one
GRID = ("scene", "row", "column", "crs", *"abcdef")  # columns of a table of georeferences; a … f of the transform
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(POLARISATIONS)})(?![A-Za-z0-9])", re.IGNORECASE)
_CALIBRATE = "calibrate it to σ⁰ or γ⁰ and geocode it (SNAP, pyroSAR, or take RTC products; docs/YOUR_DATA.md)"


# ---- How values are read -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How the values of files are read.

    units: of READ_AS, after the factor `scale`. bands: names of the bands of a file, or of the files of an image, in
    order; None: from descriptions and names. nodata: a further value of pixels without data. uncalibrated: whether
    digital numbers are taken for amplitude. max_nonfinite: share of pixels without data above which reading a whole
    image fails.
    """

    units: str = "dB"
    bands: tuple | None = None
    nodata: float | None = None
    scale: float | None = None
    uncalibrated: bool = False
    max_nonfinite: float = 1.0

    def to_db(self, values):
        """Values in the units of `units`, float → dB, float32; NaN where there is no backscatter."""
        if self.units == "dB":
            return values.astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            decibels = (10 if self.units == "linear" else 20) * np.log10(values)
        return np.where(values > 0, decibels, np.nan).astype(np.float32)

    def check(self, values, name):
        """Raises DataError if values (2, …) of `units`, NaN for no data, cannot be backscatter; `name` is the image."""
        finite_pixels = np.count_nonzero(np.isfinite(values))
        if not finite_pixels:
            return

        def named(channel):
            return name

        if self.units == "dB":
            check_decibels(values, named, "use --units linear, or --units amplitude")
        elif np.count_nonzero(values < 0) > finite_pixels / 2:
            raise DataError(f"{name}: is mostly negative, so it is in dB, but is read as {self.units}; use --units dB")
        else:
            linear = values if self.units == "linear" else np.square(values)
            check_linear(np.where(np.isfinite(linear), np.maximum(linear, 0), np.nan), named)


def add_reading_flags(group, units=None):
    """Adds the flags of Reading. units: the default of --units; None: it is required."""
    group.add_argument(
        "--units",
        choices=READ_AS,
        required=units is None,
        default=units,
        help="units of the values, which are calibrated to σ⁰ or γ⁰: dB, linear power or amplitude",
    )
    group.add_argument(
        "--bands",
        nargs="+",
        metavar="NAME",
        help="VV, VH or another name for each band of a file, in order, or for each file of an image given as "
        "VV.tif,VH.tif; needed if neither the descriptions of the bands nor the file names identify VV and VH",
    )
    group.add_argument(
        "--nodata",
        type=finite,
        metavar="VALUE",
        help="value of pixels without data, besides NaN and the no-data tags and masks of the files",
    )
    group.add_argument(
        "--scale",
        type=positive,
        metavar="FACTOR",
        help="factor from the values of the files to --units; 0.1 for values of 10 × dB",
    )
    group.add_argument(
        "--uncalibrated",
        action="store_true",
        help="read the digital numbers of an uncalibrated product as amplitude, times --scale (default with this flag: "
        "1/500, about the calibration of IW GRDH; values may be wrong by some dB)",
    )


def reading_of(args):
    """The Reading of the flags. Raises DataError for bands that cannot be meant."""
    bands = None if args.bands is None else tuple(name.upper() for name in args.bands)
    if bands is not None and sorted(name for name in bands if name in CHANNELS) != sorted(CHANNELS):
        raise DataError(f"--bands {' '.join(args.bands)}: VV and VH are needed in it, once each")
    if args.uncalibrated and args.units != "amplitude":
        raise DataError("--uncalibrated: digital numbers are amplitude; use --units amplitude")
    return Reading(args.units, bands, args.nodata, args.scale, args.uncalibrated, getattr(args, "max_nonfinite", 1.0))


# ---- Files of an image ---------------------------------------------------------------------------


def polarisation_in(text):
    """The one polarisation that a text names as a word of its own, in capitals, or None."""
    found = {match.upper() for match in _TOKEN.findall(text or "")}
    return found.pop() if len(found) == 1 else None


def find_images(paths, without=()):
    """Finds the images in paths of files and folders: [(name, (path, …))], sorted by path; one file each, or two.

    Two files are one image if their paths differ in the polarisation in their names alone (…_VV.tif, …_VH.tif), or if
    they are given as "VV.tif,VH.tif". Names are those of the files without polarisation and suffix, with the names of
    folders where needed to be different. without: absolute paths of files and folders that hold no images. Raises
    DataError for files that do not exist and for two images of one name.
    """
    groups, explicit, without = {}, [], set(without)
    for path in map(str, paths):
        if not os.path.exists(path) and "," in path:
            explicit.append(tuple(path.split(",")))
            continue
        for file in geotiffs_in(path):
            if without and not without.isdisjoint(_with_folders(file)):
                continue
            name = os.path.basename(file)
            token = polarisation_in(os.path.splitext(name)[0])
            key = _TOKEN.sub("*", file) if token and len(_TOKEN.findall(name)) == 1 else file
            groups.setdefault(key, set()).add(file)
    images = sorted([tuple(sorted(files)) for files in groups.values()] + explicit)
    for files in images:
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise DataError(f"{missing[0] or ','.join(files)}: there is no such file; correct the path")
    return list(zip(different_names(images), images))


def files_of(text, folder):
    """The files of the one image that a cell of a table names, with paths relative to `folder`: (path, …), one or two.

    text: the path of a file; "VV.tif,VH.tif"; or the path of a file of one polarisation, whose partner has the same
    path but for VV and VH, in its name or in those of folders too. Files of text need not exist.
    """
    whole = os.path.join(folder, text)
    if "," in text and not os.path.exists(whole):
        return tuple(os.path.join(folder, part.strip()) for part in text.split(","))
    above, name = os.path.split(text)
    if len(_TOKEN.findall(name)) == 1 and polarisation_in(os.path.splitext(name)[0]) in CHANNELS:
        for partner in (os.path.join(above, _TOKEN.sub(_other, name)), _TOKEN.sub(_other, text)):
            if os.path.isfile(os.path.join(folder, partner)):
                return tuple(sorted((whole, os.path.join(folder, partner))))
    return (whole,)


def _other(match):
    """VH for VV and VV for VH, in the case of the letters; other polarisations as they are."""
    text = match[0]
    if text.upper() not in CHANNELS:
        return text
    last = "H" if text[1] in "Vv" else "V"
    return text[0] + (last.lower() if text[1].islower() else last)


def _with_folders(file):
    """The absolute path of a file, and those of the folders that it is in."""
    path = Path(os.path.abspath(file))
    return map(str, (path, *path.parents))


def geotiffs_in(path):
    """The GeoTIFFs below a folder, by their suffix; a file itself. Raises DataError if there is none."""
    if not os.path.isdir(path):
        return [path]
    found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise DataError(
            f"{path}: holds no GeoTIFF (.tif, .tiff); give another folder, or convert other formats first "
            "(docs/YOUR_DATA.md)"
        )
    return found


def different_names(images):
    """A name for each tuple of files: the least that is common and different from those of the others."""
    depth, names = 0, []
    while True:
        names = [_name_of(files[0], depth) for files in images]
        counts = Counter(names)
        repeated = [name for name, count in counts.items() if count > 1]
        if not repeated:
            return names
        depth += 1
        if depth > 16:
            files = [" and ".join(paths[0] for paths, own in zip(images, names) if own == name) for name in repeated]
            raise data_error(
                f"{len(repeated)} names of images are not unique", files, "give each file once, or rename them"
            )


def bare_path(path):
    """A path without its suffix and the polarisations in it, which both files of an image have: "sub/x_VV.tif" is
    "sub/x".
    """
    parts = Path(path).with_suffix("").parts
    return "/".join(filter(None, (_bare(part) if _TOKEN.search(part) else part for part in parts)))


def _bare(name):
    """A name without polarisations, and without what joins them to it."""
    return re.sub(r"[-_. ]*\*", "", _TOKEN.sub("*", name)).strip("-_. ")


def _name_of(path, depth):
    parts = Path(os.path.abspath(path)).with_suffix("").parts
    stem = _bare(parts[-1])
    folders = list(parts[1:-1])
    kept = folders[len(folders) - depth :] if depth else []
    return "_".join([*kept, *([stem] if stem else folders[-1:] if not kept else [])]) or parts[-1]


# ---- An image ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """One polarisation of an image: band `number`, from 1, of a file; values are multiplied by scale, plus offset."""

    path: str
    number: int
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Image:
    """An image of VH and VV on disk, of height × width pixels.

    bands: (Band of VH, of VV). crs: "EPSG:32633" or WKT, "" if unknown. transform: (a, b, c, d, e, f), of the affine
    map from (column, row) to coordinates.
    """

    name: str
    bands: tuple
    height: int
    width: int
    crs: str
    transform: tuple
    reading: Reading = field(default=Reading())

    @classmethod
    def find(cls, name, paths, reading, listed=True):
        """The Image in one file or two. Raises DataError with the path and the remedy if it cannot be one.

        listed: whether to look for sidecar files (.msk, .aux.xml), which lists the folder.
        """
        with ExitStack() as stack:
            sources = [stack.enter_context(opened_geotiff(path, listed)) for path in paths]
            for source in sources:
                _check_type(source, reading)
            found = _name_bands(sources, paths, reading)
            chosen = [found[channel] for channel in CHANNELS]
            first, grids = chosen[0][0], [grid_of(source) for source, _ in chosen]
            if not same_grid(*grids):
                raise DataError(
                    f"{chosen[0][0].name} and {chosen[1][0].name}: differ in size or georeference; warp one onto the "
                    "grid of the other (gdalwarp)"
                )
            bands = tuple(
                Band(source.name, number, source.scales[number - 1], source.offsets[number - 1])
                for source, number in chosen
            )
            return cls(name, bands, first.height, first.width, *grids[0][1:], reading)

    @contextmanager
    def opened(self, listed=True):
        """Yields read(row, column, height, width), the values of a window: (2, height, width) float32 in dB.

        Pixels without data, and those outside of the image, are NaN. `read` raises DataError for values that cannot be
        backscatter in the stated units.
        """
        with ExitStack() as stack:
            paths = dict.fromkeys(band.path for band in self.bands)
            sources = {path: stack.enter_context(opened_geotiff(path, listed)) for path in paths}
            yield lambda *window: self._read(sources, *window)

    def _read(self, sources, row, column, height, width):
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + height, self.height), min(column + width, self.width)
        values = np.full((2, height, width), np.nan, np.float64 if self.reading.units != "dB" else np.float32)
        if bottom > top and right > left:
            inside = np.s_[top - row : bottom - row, left - column : right - column]
            for channel, band in zip(values, self.bands):
                channel[inside] = self._window(sources[band.path], band, ((top, bottom), (left, right)))
        self.reading.check(values, self.bands[0].path)
        return self.reading.to_db(values)

    def _window(self, source, band, window):
        """The values of a band in `units`, NaN for no data."""
        raw = source.read(band.number, window=window)
        empty = source.read_masks(band.number, window=window) == 0
        for number in set(range(1, source.count + 1)) - set(
            _data_bands(source)
        ):  # GDAL's mask has alpha of 8 bits only
            empty |= source.read(number, window=window) == 0
        if self.reading.nodata is not None:
            empty |= raw == self.reading.nodata
        values = raw.astype(np.float64)
        if (band.scale, band.offset) != (1.0, 0.0):
            values = values * band.scale + band.offset
        factor = self.reading.scale or (NOMINAL_CALIBRATION if self.reading.uncalibrated else 1.0)
        values = values * factor if factor != 1 else values
        values[empty | ~np.isfinite(values)] = np.nan
        if self.reading.uncalibrated:
            values[values == 0] = np.nan  # the border of a product
        return values

    def read(self, listed=True):
        """The whole image, as a window. Raises DataError also for too many pixels, or too many without data."""
        if self.height * self.width > MOST_PIXELS:
            raise DataError(
                f"{self.bands[0].path}: is {self.height}x{self.width} pixels, a scene; cut it with sarwmix.tile"
            )
        with self.opened(listed) as read:
            values = read(0, 0, self.height, self.width)
        check_nonfinite(values, self.bands[0].path, self.reading.max_nonfinite)
        return values

    def grid_row(self, scene, row=0, column=0):
        """The values of GRID for the window whose first pixel is (row, column)."""
        a, b, c, d, e, f = self.transform
        corner = (a, b, a * column + b * row + c, d, e, d * column + e * row + f)
        return (scene, row, column, self.crs, *corner)


def grid_of(source):
    """(size, crs, transform) of an open file. The crs is "" without a georeference; then the transform is of pixels."""
    epsg = source.crs.to_epsg() if source.crs else None
    crs = f"EPSG:{epsg}" if epsg else source.crs.to_wkt() if source.crs else ""
    return source.shape, crs, tuple(source.transform)[:6]


def same_grid(one, other):
    """Whether two grids, of `grid_of`, agree to NEAR of a pixel."""
    if one[:2] != other[:2]:
        return False
    (height, width), (first, second) = one[0], (np.reshape(grid[2], (2, 3)) for grid in (one, other))
    return (np.abs(second - first) @ (width, height, 1)).max() <= NEAR * np.abs(first[:, :2]).max()


def _name_bands(sources, paths, reading):
    """{polarisation: (open file, number of its band)} of VH and VV. Raises DataError."""
    slots = [(source, number) for source in sources for number in _data_bands(source)]
    said = [_stated(source, number, path) for source, path in zip(sources, paths) for number in _data_bands(source)]
    where = " and ".join(map(str, paths))
    if reading.bands is not None:
        if len(slots) == 1 and said[0] in CHANNELS and sorted(reading.bands) == sorted(CHANNELS):
            raise _incomplete(where, said)
        if len(reading.bands) != len(slots):
            raise DataError(
                f"{where}: has {len(slots)} bands, but --bands names {len(reading.bands)}; name each of them, in order"
            )
        wrong = [
            f"band {k} is {name} by its description or file name, not {given}"
            for k, (name, given) in enumerate(zip(said, reading.bands), start=1)
            if name in POLARISATIONS and name != given
        ]
        if wrong:
            raise DataError(f"{where}: {wrong[0]}; correct --bands")
        said = list(reading.bands)
    for channel in CHANNELS:
        if said.count(channel) > 1:
            raise DataError(
                f"{where}: {said.count(channel)} bands are described as {channel}; copy the wanted ones to a file of "
                "their own (gdal_translate -b N)"
            )
    if not set(CHANNELS) <= set(said):
        raise _incomplete(where, said)
    return {channel: slots[said.index(channel)] for channel in CHANNELS}


def _incomplete(where, said):
    """The DataError about bands of which not one is VH and one VV."""
    known = [name for name in said if name]
    if len(said) > 1 and len(known) < len(said):
        unnamed = f"{where}: has {len(said)} bands, and neither their descriptions nor its name say which is VV or VH"
        example = "VV VH" + " other" * (len(said) - 2)
        return DataError(f"{unnamed}; name them in order with --bands {example}, if this is their order")
    if known and known[0] in CHANNELS:
        other = CHANNELS[1 - CHANNELS.index(known[0])]
        return DataError(
            f"{where}: holds only {known[0]}, and {other} is needed, too; give both files, with names that differ "
            "only in VV and VH, or as VV.tif,VH.tif"
        )
    return DataError(
        f"{where}: holds {', '.join(known) or 'one band of an unknown kind'}, but VV and VH are needed; give both "
        "files, with names that differ only in VV and VH, or as VV.tif,VH.tif with --bands VV VH"
    )


def _data_bands(source):
    """Numbers of the bands that are no alpha band."""
    alpha = load_rasterio().enums.ColorInterp.alpha
    return [number for number, kind in enumerate(source.colorinterp, start=1) if kind != alpha]


def _stated(source, number, path):
    """The polarisation that a description, or the name of a file of one band, states; or None."""
    described = polarisation_in(source.descriptions[number - 1])
    return described or (polarisation_in(Path(path).stem) if len(_data_bands(source)) == 1 else None)


def _check_type(source, reading):
    """Refuses complex values, and integers without a statement of what they are. Raises DataError."""
    name, path = source.dtypes[0], source.name
    if name.startswith("complex"):
        raise DataError(f"{path}: holds complex values, like an SLC product; detect them, then {_CALIBRATE}")
    if name.startswith("float") or reading.uncalibrated:
        return
    if source.gcps[0] and not source.crs:
        raise DataError(
            f"{path}: holds {name} with {len(source.gcps[0])} ground control points and no coordinate system, like a "
            f"measurement file of an uncalibrated GRD product; {_CALIBRATE}, or insist with --units amplitude "
            "--uncalibrated"
        )
    if reading.scale is None and set(zip(source.scales, source.offsets)) == {(1.0, 0.0)}:
        means = {
            "dB": "but dB are fractions: --scale 0.1 reads dB times 10",
            "linear": "but linear backscatter is a fraction: give the value of one unit with --scale",
        }.get(reading.units, f"digital numbers of an unknown scale: {_CALIBRATE}, use --scale, or --uncalibrated")
        raise DataError(f"{path}: holds {name}, {means}; see docs/YOUR_DATA.md")
