# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, step 2: warps the Sentinel-1 images onto the 10 m UTM grid of the Sentinel-2 images of their folder.

    python -m sarwmix.sen12_align_s1_to_s2 --raw_root RAW --out DIR --workers 8

RAW holds S1list.json, <folder>/<image>_corrected_{VH,VV}.tif (linear σ⁰ in degrees of longitude and latitude, 0 = no
data) and <folder>/S2_<date>_B04.tif, the first of which is the reference grid. The program writes
DIR/<folder>/<image>.tif with two bands, described VH and VV, float32, linear σ⁰, 0 = no data; and last DIR/align.csv
with the outcome of every image of the list.

Resampling. The network subtracts images of different dates, so they must be registered to a fraction of a pixel.
`bilinear` on linear σ⁰, the default, is exact; σ⁰ is a power, so its weighted mean is a power too, unlike a mean of dB.
It smooths the speckle slightly, and averages more neighbours where the source is finer than 10 m. `nearest` keeps every
value and its speckle, and displaces it by up to half a pixel. `average` is the mean of all source pixels that touch a
pixel, for sources that are much finer.

Each channel is warped separately with an exact transformation. Warped together, GDAL treats a pixel as missing only if
it is missing in both channels, and zeros would be averaged into their neighbours. A pixel is 0 where the source pixel
under its centre has no data; with `average`, where all source pixels that it touches have no data.
"""

import logging
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

try:
    from osgeo import gdal, osr
except ImportError:
    gdal = osr = None  # `align` reports it

from common.command_line import Parser, positive_int
from common.errors import DataError, data_error, listed
from common.files import atomic_path, check_room, claimed, sha256_of, write_atomically
from common.packages import load
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.listing import CHANNELS, EVERY
from sarwmix.plausibility import check_linear
from sarwmix.prepare.completeness import completeness, published
from sarwmix.prepare.sen12_index import ALIGN, ALIGNED, S1_LIST, SIDE, STEP, read_s1_list

log = logging.getLogger(__name__)

RESAMPLING = {"bilinear": "GRA_Bilinear", "nearest": "GRA_NearestNeighbour", "average": "GRA_Average"}  # GDAL's names
UNITS = ("linear", "dB")
LOST = "nonfinite"  # tag of an aligned image: number of NaN and infinite pixels in its two sources
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
FEWEST = 1000  # pixels with data needed to distinguish linear values from dB
MOST_PIXELS = 2**26  # of a source; a damaged header may claim more


class Dropped(Exception):
    """An image cannot be aligned. reason: one of a few fixed phrases; detail: the file and its fault."""

    def __init__(self, reason, detail):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Grid:
    """The georeference of an image: size in pixels, GDAL's six coefficients, coordinate system as WKT."""

    width: int
    height: int
    transform: tuple
    crs: str

    @property
    def bounds(self):
        """(left, bottom, right, top) of a north-up grid."""
        left, step_x, _, top, _, step_y = self.transform
        return left, top + self.height * step_y, left + self.width * step_x, top

    @property
    def is_north_up(self):
        _, step_x, skew_x, _, skew_y, step_y = self.transform
        return step_x > 0 > step_y and skew_x == skew_y == 0

    def is_same(self, other):
        same_system = osr.SpatialReference(self.crs).IsSame(osr.SpatialReference(other.crs)) == 1
        return same_system and replace(self, crs=other.crs) == other


# ---- Reading -------------------------------------------------------------------------------------


@contextmanager
def _gdal():
    """In the block, GDAL raises RuntimeError, prints nothing and looks for no sidecar files."""
    raised, options = gdal.GetUseExceptions(), {name: gdal.GetConfigOption(name) for name in GDAL_OPTIONS}
    gdal.UseExceptions()
    gdal.PushErrorHandler("CPLQuietErrorHandler")
    for name, value in GDAL_OPTIONS.items():
        gdal.SetConfigOption(name, value)
    try:
        yield
    finally:
        for name, value in options.items():
            gdal.SetConfigOption(name, value)
        gdal.PopErrorHandler()
        if not raised:
            gdal.DontUseExceptions()


def _open(path):
    """Opens a GeoTIFF as a GDAL dataset. Other formats are refused, because they may refer to further files."""
    return gdal.OpenEx(str(path), gdal.OF_RASTER, allowed_drivers=["GTiff"])


def _grid_of(dataset):
    """The Grid of a GDAL dataset, or None if it has no georeference."""
    transform, system = dataset.GetGeoTransform(can_return_null=True), dataset.GetSpatialRef()
    if transform is None or system is None:
        return None
    return Grid(dataset.RasterXSize, dataset.RasterYSize, tuple(transform), system.ExportToWkt())


def read_channel(path, channel, name):
    """Reads one channel of a raw image: ((H, W) float32 in the units of the file, 0 for no data; Grid).

    The whole file is read, because a warp of a truncated file may return zeros without an error. name: of the file in
    messages. Raises Dropped.
    """
    try:
        dataset = _open(path)
        wide, high = dataset.RasterXSize, dataset.RasterYSize
        if wide * high > MOST_PIXELS:
            raise Dropped("corrupt", f"{name} claims to have {wide}x{high} pixels")
        band = _band_of(dataset, channel, name)
        if gdal.DataTypeIsComplex(band.DataType):
            raise Dropped("corrupt", f"{name} holds complex values, not backscatter")
        values, nodata = band.ReadAsArray().astype(np.float32), band.GetNoDataValue()
    except RuntimeError as error:
        raise Dropped("corrupt", f"{name} cannot be read ({_in_one_line(error, path)})") from error
    grid = _grid_of(dataset)
    if grid is None:
        raise Dropped("no position", f"{name} does not say where it lies")
    if nodata is not None:
        values[values == np.float32(nodata)] = 0
    return values, grid


def _band_of(dataset, channel, name):
    """The only band of a dataset, or the one described as `channel`. Raises Dropped for a band of another channel."""
    bands = [dataset.GetRasterBand(number) for number in range(1, dataset.RasterCount + 1)]
    described = [band.GetDescription().strip().upper() for band in bands]
    matching = [band for band, text in zip(bands, described) if text == channel]
    if not matching and len(bands) == 1 and described[0] not in CHANNELS:
        matching = bands
    if len(matching) != 1:
        raise Dropped(
            "wrong channel",
            f"{name} has bands described as {', '.join(text or 'nothing' for text in described)}, not one as {channel}",
        )
    return matching[0]


def _in_one_line(error, path):
    """GDAL's message without the path of the file; the caller adds the path relative to the raw data."""
    return " ".join(re.sub(rf"[`']?{re.escape(str(path))}(['`:,]* ?)", "", str(error)).split()) or "unknown"


def to_linear(values, units, path):
    """Converts a channel to linear σ⁰. Returns (values, 0 for no data; the number of NaN and infinite pixels).

    Raises DataError if the values contradict `units`: backscatter in dB is almost always negative, linear backscatter
    almost never.
    """
    lost = ~np.isfinite(values)
    known = values[~lost & (values != 0)]
    if known.size >= FEWEST:
        below = np.count_nonzero(known < 0)
        if units == "linear" and below > known.size / 2:
            raise DataError(f"{path}: is mostly negative, so it looks like dB, not like linear sigma0; give --units dB")
        if units == "dB" and not below:
            raise DataError(
                f"{path}: is never negative, so it looks like linear sigma0, not like dB; give --units linear"
            )
    if units == "dB":
        with np.errstate(over="ignore"):
            values = np.where(values == 0, 0, 10 ** (values / 10))
        lost |= ~np.isfinite(values)
    return np.where(lost, np.float32(0), values), int(np.count_nonzero(lost))


def find_reference(raw, folder):
    """Finds the reference grid of a folder: the first B04 file, by name, that can be opened and is georeferenced.

    Returns (name, Grid, remarks); name and Grid are None if there is no such file. remarks: one line for each B04 file
    that cannot be used or has another grid.
    """
    name, grid, remarks = None, None, []
    for path in sorted((raw / folder).glob("S2_*_B04.tif")):
        where = f"{folder}/{path.name}"
        try:
            found = _grid_of(_open(path))
        except RuntimeError as error:
            remarks.append(f"{where} cannot be read ({_in_one_line(error, path)})")
            continue
        if found is None or not found.is_north_up:
            remarks.append(f"{where} {'does not say where it lies' if found is None else 'is not north-up'}")
        elif grid is None:
            name, grid = path.name, found
        elif not found.is_same(grid):
            remarks.append(f"{where} has another grid than {name}, which is used")
    return name, grid, remarks


# ---- Warping -------------------------------------------------------------------------------------


def warp(values, source, target, resampling="bilinear"):
    """Warps (H, W) float32 from Grid `source` to the north-up Grid `target`. 0 is no data in both."""
    memory = gdal.GetDriverByName("MEM").Create("", source.width, source.height, 1, gdal.GDT_Float32)
    memory.SetGeoTransform(source.transform)
    memory.SetProjection(source.crs)
    memory.GetRasterBand(1).WriteArray(values)
    # errorThreshold 0 transforms every pixel exactly, without interpolating positions.
    warped = gdal.Warp(
        "",
        memory,
        format="MEM",
        srcSRS=source.crs,
        dstSRS=target.crs,
        outputBounds=target.bounds,
        width=target.width,
        height=target.height,
        resampleAlg=getattr(gdal, RESAMPLING[resampling]),
        errorThreshold=0,
        srcNodata=0,
        dstNodata=0,
    )
    return warped.ReadAsArray()


def align_image(image, raw, out, reference, resampling, units):
    """Writes out/<folder>/<image>.tif, unless it exists. Returns the number of NaN and infinite pixels of its sources.

    reference: the Grid, or the reason why there is none. Raises Dropped for an image that cannot be aligned, DataError
    for one in other units or with values that backscatter cannot have.
    """
    shown = f"{image.folder}/{image.name}"
    if not set(CHANNELS) <= set(image.polarisations):
        raise Dropped("single polarisation", f"{shown} has {' and '.join(image.polarisations)} only")
    path = out / image.folder / f"{image.name}.tif"
    if isinstance(reference, Grid):
        kept = stored(path, reference)
        if kept is not None:
            return kept
    names = {channel: f"{shown}_corrected_{channel}.tif" for channel in CHANNELS}
    missing = [name for name in names.values() if not (raw / name).is_file()]
    if missing:
        raise Dropped("missing file", f"{' and '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist")
    read = [read_channel(raw / name, channel, name) for channel, name in names.items()]
    linear = [to_linear(values, units, raw / name) for (values, _), name in zip(read, names.values())]
    check_linear([values for values, _ in linear], lambda channel: raw / names[channel])
    lost = sum(count for _, count in linear)
    if not isinstance(reference, Grid):
        raise Dropped("no reference", reference)
    sources = [(values, grid) for (values, _), (_, grid) in zip(linear, read)]
    if not any(values.any() for values, _ in sources):
        remark = f", {lost} pixels are NaN or infinite" if lost else ""
        raise Dropped("all zero", f"{shown} has no data in either channel{remark}")
    try:
        warped = np.stack([warp(values, grid, reference, resampling) for values, grid in sources])
        overlaps = warped.any() or any(
            warp(np.ones_like(values), grid, reference, "nearest").any() for values, grid in sources
        )
    except RuntimeError as error:
        raise Dropped("no position", f"{shown} cannot be warped ({' '.join(str(error).split())})") from error
    if not overlaps:
        raise Dropped("no overlap", f"{shown} lies outside the reference grid")
    if not warped.any():
        raise Dropped("all zero", f"{shown} has no data within the reference grid")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aligned(path, warped, reference, lost)
    return lost


# ---- Files ---------------------------------------------------------------------------------------


def write_aligned(path, values, grid, lost):
    """Writes values (2, H, W), VH, VV, on a Grid as a GeoTIFF. Reads them back before the file is renamed to `path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_as_geotiff(values, grid, lost))
        written = _open(temporary)
        if not (_is_aligned(written, grid) and np.array_equal(written.ReadAsArray(), values)):
            raise DataError(f"{path}: does not hold what was written; check the disk, or choose another --out")


def _as_geotiff(values, grid, lost):
    """The bytes of the GeoTIFF. It is made in memory: GDAL may only print, not raise, the error of a full disk."""
    name = "/vsimem/aligned.tif"
    target = gdal.GetDriverByName("GTiff").Create(
        name, grid.width, grid.height, len(CHANNELS), gdal.GDT_Float32, ["INTERLEAVE=BAND"]
    )
    target.SetGeoTransform(grid.transform)
    target.SetProjection(grid.crs)
    target.SetMetadata({LOST: str(lost)})
    for number, channel in enumerate(CHANNELS, start=1):
        band = target.GetRasterBand(number)
        band.SetDescription(channel)
        band.SetNoDataValue(0)
        band.WriteArray(values[number - 1])
    target = band = None  # GDAL writes the file when the last reference is gone
    file = gdal.VSIFOpenL(name, "rb")
    content = bytes(gdal.VSIFReadL(1, gdal.VSIStatL(name).size, file))
    gdal.VSIFCloseL(file)
    gdal.Unlink(name)
    return content


def stored(path, grid):
    """The number of NaN and infinite pixels recorded in an aligned image; None if there is no image on this Grid."""
    if not path.exists():
        return None
    try:
        dataset = _open(path)
    except RuntimeError:
        return None
    return int(dataset.GetMetadataItem(LOST)) if _is_aligned(dataset, grid) and dataset.GetMetadataItem(LOST) else None


def _is_aligned(dataset, grid):
    names = tuple(dataset.GetRasterBand(number).GetDescription() for number in range(1, dataset.RasterCount + 1))
    found = _grid_of(dataset)
    return names == CHANNELS and found is not None and found.is_same(grid)


# ---- Folders -------------------------------------------------------------------------------------


def align_folder(images, raw, out, resampling, units):
    """Aligns the images of one folder.

    Returns (its rows of align.csv, size of the reference (width, height) or None, remarks on the references).
    """
    folder = images[0].folder
    with _gdal():
        name, grid, remarks = find_reference(raw, folder)
        none = f"{folder} has no S2_*_B04.tif that can be used" + (f": {remarks[0]}" if remarks else "")
        rows = []
        for image in images:
            try:
                lost = align_image(image, raw, out, grid or none, resampling, units)
                rows.append((folder, image.name, "aligned", "", "", name, lost))
            except Dropped as dropped:
                rows.append((folder, image.name, "dropped", dropped.reason, dropped.detail, name or "", ""))
    return rows, (grid.width, grid.height) if grid else None, remarks


def align(raw, out, s1_list=None, resampling="bilinear", units="linear", size=SIDE, workers=Workers()):
    """Aligns all images of the list (default: the one in `raw`) into `out`, distributing folders over workers.

    size: expected side of the references, pixels, for the estimate of disk space; other sizes are logged. align.csv is
    written last, so that an interrupted run is continued. Raises DataError.
    """
    raw, out = Path(raw), Path(out)
    s1_list = Path(s1_list or raw / S1_LIST)
    folders, digest = workers.on_main(_read_input, raw, s1_list)
    record = {"program": ALIGN, "resampling": resampling, "units": units, "s1_list_sha256": digest}
    with claimed(workers, out, record, last=ALIGNED.name, name=STEP) as complete:
        if not complete:
            workers.on_main(_begin, out, folders, s1_list, size)
            work = partial(align_folder, raw=raw, out=out, resampling=resampling, units=units)
            found = workers.map(work, folders.values(), "folders")
            workers.on_main(_finish, out, list(folders), found, size)
        workers.on_main(_report, out)


def _read_input(raw, s1_list):
    load("osgeo.gdal", "warping images")
    if not raw.is_dir():
        raise DataError(
            f"--raw_root {raw}: there is no such folder; give the one that holds {S1_LIST} and the folders of images"
        )
    return {folder: images for folder, images in read_s1_list(s1_list).items() if images}, sha256_of(s1_list)


def _begin(out, folders, s1_list, size):
    missing = sum(
        not (out / image.folder / f"{image.name}.tif").exists() for images in folders.values() for image in images
    )
    check_room([("--out", out, missing * len(CHANNELS) * size**2 * np.float32().itemsize)])
    write_atomically(out / S1_LIST, lambda file: file.write(s1_list.read_bytes()))


def _finish(out, folders, found, size):
    rows = [row for part, _, _ in found for row in part]
    dropped = [row for row in rows if row[2] == "dropped"]
    if len(dropped) == len(rows):
        raise data_error(
            f"none of the {len(rows)} images can be aligned",
            [f"{row[4]} ({row[3]})" for row in dropped],
            "check --raw_root",
        )
    sides = {folder: side for folder, (_, side, _) in zip(folders, found)}
    others = [f"{folder} is {side[0]}x{side[1]}" for folder, side in sides.items() if side not in (None, (size, size))]
    remarks = [remark for _, _, remarks in found for remark in remarks]
    for what, lines in (("other sizes than --size", others), ("remarks on references", remarks)):
        if lines:
            log.warning("%d %s: %s", len(lines), what, listed(lines))
    ALIGNED.write(out, rows)


def _report(out):
    """Logs the counts of align.csv."""
    rows = ALIGNED.read(out)
    dropped = Counter(row["reason"] for row in rows if row["status"] == "dropped")
    dataset = published("sen12flood", (row["image"] for row in rows))
    log.info(
        "%s: %d of %d images aligned; the list: %s",
        out,
        len(rows) - dropped.total(),
        len(rows),
        completeness(dataset, EVERY, len(rows), "images"),
    )
    if dropped:
        log.info(
            "%d dropped: %s. %s names them; if their files are restored, remove it and run again to align them too",
            dropped.total(),
            ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())),
            out / ALIGNED.name,
        )


# ---- Program -------------------------------------------------------------------------------------


def add_warping_flags(group):
    group.add_argument(
        "--resampling",
        choices=RESAMPLING,
        default="bilinear",
        help="bilinear: exact to a fraction of a pixel; nearest: keeps values and speckle; average: for sources finer "
        "than 10 m",
    )
    group.add_argument(
        "--units",
        choices=UNITS,
        default="linear",
        help="units of the files; the aligned images are linear sigma0. 0 is no data in both",
    )


def get_args_parser():
    parser = Parser(
        "Warp the Sentinel-1 images of SEN12-FLOOD onto the 10 m grid of the Sentinel-2 image of their folder.", ALIGN
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--raw_root",
        "--raw-root",
        type=Path,
        required=True,
        help=f"folder that holds {S1_LIST} and the folders of images, as unzipped",
    )
    group.add_argument("--out", type=Path, required=True, help="folder to write, new, empty, or to be continued")
    group.add_argument(
        "--s1_list", "--s1-list", type=Path, help=f"the list of images, if it is not {S1_LIST} in --raw_root"
    )
    add_workers_flag(group)
    group = parser.add_argument_group("warping")
    add_warping_flags(group)
    group.add_argument(
        "--size",
        type=positive_int,
        default=SIDE,
        help="expected side of the references, pixels of 10 m; other sizes are aligned as well, and reported",
    )
    return parser


def main(argv=None):
    def work(args, workers):
        align(args.raw_root, args.out, args.s1_list, args.resampling, args.units, args.size, workers)

    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
