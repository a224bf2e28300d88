# SPDX-License-Identifier: MIT
"""The images of four public sets as they are published, for `sarwmix.prepare.public_sets`: found, and read as dB."""

import re
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError, data_error
from sarwmix.geotiff import load_rasterio
from sarwmix.masks import Sen1Floods11
from sarwmix.raster import Image, Reading

PORTO_ALEGRE, ETCI, OPERA, SEN1FLOODS11 = "porto_alegre", "etci2021", "opera_rtc", "sen1floods11"
DECIBELS, RELATIVE = "dB", "relative"  # what values are
PORTO_FOLDERS = {  # (place, before or after the flood): folder
    ("porto_alegre", "before"): "porto_alegre_s1_preflood",
    ("porto_alegre", "after"): "porto_alegre_s1",
    ("canoas", "before"): "canoas/s1_no_flood",
    ("canoas", "after"): "canoas/s1",
}
PORTO_DB = 30.0  # the digital numbers 0 to 255 are -30 to 0 dB
PNG_END = b"IEND\xaeB`\x82"  # the last chunk of a file
BURST = re.compile(r"OPERA_L2_RTC-S1_(T\d{3}-\d{6}-IW\d)_.*_V[VH]\.tif")
# Tiles whose flood labels are wrong: up to 87 % of their pixels are labelled along the edge of the footprint.
BAD_LABELS = frozenset(
    f"nebraska_20170213t002121_{tile}" for tile in ("x-5_y-10", "x-7_y-10", "x-8_y-7", "x-8_y-8", "x-8_y-9", "x-8_y-10")
)


# ---- Images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicImage:
    """An image of a public set. paths: its file, or those of VH and VV. group: its place or scene.

    gains: (factor, offset) of VH and of VV, from digital numbers to values; of ETCI 2021 alone, known after a first
    look at all images of the scene.
    """

    source: str
    name: str
    group: str
    paths: tuple
    gains: tuple | None = None

    @property
    def values(self):
        return RELATIVE if self.source == ETCI else DECIBELS

    def read(self):
        """(2, H, W) float32, order VH, VV, in dB (or `relative`); NaN for no data. Raises DataError."""
        return SETS[self.source].read(self)


class PublicSet(NamedTuple):
    """How a set is found, find(folder) → [PublicImage], and read, read(PublicImage) → (2, H, W) float32.

    side: of its images in pixels; None if that differs. about: for help.
    """

    find: object
    read: object
    side: int | None
    about: str


def read_png(path, side, bands):
    """The values of an 8-bit PNG of side × side pixels, (n, side, side) uint8. bands: the numbers n that are accepted.

    Raises DataError.
    """
    rasterio = load_rasterio()
    try:
        if PNG_END not in Path(path).read_bytes():  # GDAL reads a truncated file, as zeros
            raise DataError(f"{path}: is truncated, or no PNG; copy it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, driver="PNG") as file:
                if file.shape != (side, side):
                    raise _wrong_size(path, file.height, file.width, side)
                palette = rasterio.enums.ColorInterp.palette in file.colorinterp
                if palette or file.count not in bands or file.dtypes[0] != "uint8":
                    raise DataError(
                        f"{path}: has {file.count} bands of {file.dtypes[0]}{' and a palette' if palette else ''}, but "
                        f"{' or '.join(map(str, bands))} of uint8 are needed; restore the file as it was published"
                    )
                return file.read()
    except (rasterio.errors.RasterioError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{path}: cannot be read, it is missing, corrupt or not a PNG ({reason}); copy it again"
        ) from error


def _wrong_size(path, height, width, side):
    return DataError(
        f"{path}: is {height}x{width} pixels, but images of this set are {side}x{side}; copy it again, or remove it"
    )


# ---- Porto Alegre --------------------------------------------------------------------------------


def find_porto_alegre(folder):
    """All images are of one group: those of Canoas overlap those of Porto Alegre."""
    found = []
    for (place, time), name in PORTO_FOLDERS.items():
        files = sorted((folder / name).glob("*.png"))
        if not files:
            raise DataError(
                f"{folder / name}: holds no PNG; --{PORTO_ALEGRE} takes the folder that holds "
                f"{', '.join(PORTO_FOLDERS.values())}"
            )
        for file in files:
            cell = re.fullmatch(r".*?_(\d+_\d+)", file.stem)
            name = f"{place}_{cell[1] if cell else file.stem}_{time}"
            found.append(PublicImage(PORTO_ALEGRE, name, PORTO_ALEGRE, (str(file),)))
    return found


def read_porto_alegre(image):
    """Red is VV and green VH; −30 dB is −30 or less."""
    red, green = read_png(image.paths[0], SETS[PORTO_ALEGRE].side, (3, 4))[:2]
    return (np.stack([green, red]) / 255 * PORTO_DB - PORTO_DB).astype(np.float32)


# ---- ETCI 2021 -----------------------------------------------------------------------------------


def find_etci(folder):
    files = {
        channel: {
            (path.parents[1], path.stem.removesuffix(f"_{channel}")): str(path)
            for path in folder.rglob(f"tiles/{channel}/*_{channel}.png")
        }
        for channel in ("vh", "vv")
    }
    _refuse_single(*files.values())
    return [
        PublicImage(ETCI, name, tiles.parent.name, (vh, files["vv"][tiles, name]))
        for (tiles, name), vh in sorted(files["vh"].items())
    ]


def read_etci_numbers(image):
    """The digital numbers of VH and VV, (2, side, side) uint8. Raises DataError."""
    channels = []
    for path in image.paths:
        bands = read_png(path, SETS[ETCI].side, (1, 3))
        if (bands != bands[0]).any():
            raise DataError(f"{path}: its bands differ, but they are equal in ETCI 2021; restore the file")
        channels.append(bands[0])
    return np.stack(channels)


def read_etci(image):
    """Digital numbers by their gains; 0 is no data."""
    numbers = read_etci_numbers(image)
    factor, offset = np.array(image.gains).T[..., None, None]
    return np.where(numbers > 0, numbers * factor + offset, np.nan).astype(np.float32)


def count_numbers(image):
    """How often each digital number occurs in VH and VV, (2, 256) int64."""
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in read_etci_numbers(image)])


def gains_of(counts, mean, std, scene):
    """((factor, offset) of VH, of VV) that give the numbers above 0 of a scene this mean and standard deviation.

    counts: (2, 256), of the whole scene. mean, std: of VH and VV. Raises DataError for a channel of one value.
    """
    numbers, gains = np.arange(1, 256), []
    for channel, weights, aim, spread in zip(("VH", "VV"), counts[:, 1:], mean, std):
        if np.count_nonzero(weights) < 2:
            raise DataError(
                f"{scene}: {channel} of all its images has fewer than two values; leave it out with --exclude"
            )
        middle = np.average(numbers, weights=weights)
        factor = spread / np.sqrt(np.average((numbers - middle) ** 2, weights=weights))
        gains.append((float(factor), float(aim - factor * middle)))
    return tuple(gains)


def label_of(image):
    """The path of the flood label of an image, which need not exist."""
    return Path(image.paths[0]).parents[1] / "flood_label" / f"{image.name}.png"


def read_label(image):
    """The pixels that are labelled as water, flood or permanent, (1, side, side) uint8: 0 or 1. Raises DataError."""
    return (read_png(label_of(image), SETS[ETCI].side, (1, 3))[:1] > 0).astype(np.uint8)


# ---- OPERA and Sen1Floods11 ----------------------------------------------------------------------


def find_opera(folder):
    files = {channel: {} for channel in ("VH", "VV")}
    for path in sorted(folder.rglob("OPERA_L2_RTC-S1_*_V[VH].tif")):
        if BURST.fullmatch(path.name):
            name, channel = path.stem[:-3], path.stem[-2:]
            if name in files[channel]:
                raise DataError(f"{files[channel][name]} and {path}: are of one name; remove one of them")
            files[channel][name] = str(path)
    _refuse_single(*files.values())
    return [
        PublicImage(OPERA, name, BURST.fullmatch(Path(vh).name)[1], (vh, files["VV"][name]))
        for name, vh in files["VH"].items()
    ]


def find_sen1floods11(folder):
    data = Sen1Floods11(folder, "all")
    return [
        PublicImage(SEN1FLOODS11, name, group, tuple(map(str, data.files(i))))
        for i, (name, group) in enumerate(zip(data.ids.tolist(), data.groups.tolist()))
    ]


def read_tif(image, units):
    found, side = Image.find(image.name, image.paths, Reading(units)), SETS[image.source].side
    if side and (found.height, found.width) != (side, side):
        raise _wrong_size(image.paths[0], found.height, found.width, side)
    return found.read(listed=False)


def _refuse_single(vh, vv):
    """Raises DataError for files of one polarisation alone. vh, vv: {name: path}."""
    single = [str((vh | vv)[key]) for key in sorted(vh.keys() ^ vv.keys())]
    if single:
        raise data_error(
            f"{len(single)} images have VH or VV alone", single, "restore the other files, or remove these"
        )


SETS = {
    PORTO_ALEGRE: PublicSet(
        find_porto_alegre, read_porto_alegre, 512, "pairs before and after the flood of Porto Alegre, 2024: 8-bit PNG"
    ),
    OPERA: PublicSet(
        find_opera, partial(read_tif, units="linear"), None, "crops of OPERA RTC-S1: GeoTIFFs of linear γ⁰, 30 m"
    ),
    SEN1FLOODS11: PublicSet(
        find_sen1floods11, partial(read_tif, units="dB"), 512, "hand-labelled chips of Sen1Floods11: GeoTIFFs in dB"
    ),
    ETCI: PublicSet(find_etci, read_etci, 256, "tiles of ETCI 2021: 8-bit PNG without an absolute scale"),
}
