# SPDX-License-Identifier: MIT
"""BigEarthNet v1 and v2: classes, multi-hot labels, stores of patches, and the base class of the two datasets.

Classes: the 43 CORINE Land Cover level-3 classes and the 19-class nomenclature of Sumbul et al., BigEarthNet-MM, IEEE
GRSM 2021; see datasets/README.md. LMDB: of the authors of version 2 (Clasen et al., reBEN, arXiv 2407.03653); the key
is the name of a patch, the value the safetensors of its bands.
"""

import csv
import logging
import os
import re
import stat
import threading
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from common.errors import DataError, quoted
from common.packages import PACK_ELSEWHERE, load
from sarwmix.dataset import RadarDataset
from sarwmix.geotiff import check_nonfinite, load_rasterio, opened_geotiff, read_band
from sarwmix.layouts import S1_START, content_of, whereabouts
from sarwmix.listing import CHANNELS, Listing, acquisitions_of, check_names, in_threads, refuse_duplicates
from sarwmix.plausibility import check_decibels
from sarwmix.raster import GRID, grid_of

CLASS_TABLE = Path(__file__).parent.parent / "datasets" / "bigearthnet_classes.csv"
SIZE = 120  # pixels a side of a patch
LMDB_FILE = "data.mdb"  # in the folder of an LMDB
MOST_BYTES = 2**22  # of a patch in an LMDB; all its bands together have fewer than 2**19

_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_EMPTY_LIST = re.compile(r"\[[\s,]*\]")

log = logging.getLogger(__name__)

# ---- Classes and labels --------------------------------------------------------------------------


def _read_class_table():
    """Returns (the 19 class names in official order, {43-class name: index of its 19-class name, None if dropped})."""
    with open(CLASS_TABLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {int(row["ben19_id"]): row["ben19"] for row in rows if row["ben19"]}
    clc43 = {row["clc43"]: int(row["ben19_id"]) if row["ben19"] else None for row in rows}
    return tuple(names[i] for i in sorted(names)), clc43


CLASSES, CLC43 = _read_class_table()
BEN19 = {name: index for index, name in enumerate(CLASSES)}


def multi_hot(names, nomenclature=BEN19):
    """Encodes class names as (19,) uint8, 1 for each named class.

    nomenclature: BEN19, or CLC43, some of whose classes belong to none of the 19. Raises DataError for an unknown name.
    """
    row = np.zeros(len(CLASSES), np.uint8)
    for name in names:
        if name not in nomenclature:
            raise DataError(f"unknown label {quoted(name)}")
        if nomenclature[name] is not None:
            row[nomenclature[name]] = 1
    return row


def parse_labels(text):
    """Parses a printed list of names: Python's ['a', 'b'] or numpy's ['a' 'b'], over any number of lines.

    Names may contain commas. Raises DataError for other text.
    """
    if not _EMPTY_LIST.fullmatch(_QUOTED.sub("", text).strip()):
        raise DataError(f"not a printed list of quoted names {quoted(text)}")
    return [single or double for single, double in _QUOTED.findall(text)]


def labelled(listing, source, unknown=False):
    """The rows of a listing that have a label. Raises DataError, which names `source`, if no row has a label.

    unknown: mask of rows to keep although their labels are unknown, because their patches are missing.
    """
    keep = listing.labels.any(axis=1) | unknown
    log.info("dropped %d of %d patches, which have no 19-class label", np.count_nonzero(~keep), len(keep))
    if not keep.any():
        raise DataError(
            f"{source}: none of the {len(keep)} patches has a 19-class label; give data with labels; only "
            "pretraining, --embed and sarwmix.prepare.statistics do not need them"
        )
    return listing.take(keep)


# ---- Stores of images ----------------------------------------------------------------------------


class Store:
    """The images of patches under one folder, a file for each channel. Other formats override all but `image`."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, patch, channel):
        """The path of one channel of a patch, also for messages."""
        raise NotImplementedError

    def missing(self, patch):
        """The channels of a patch that do not exist or are empty. Reads no content."""
        return [channel for channel in CHANNELS if not _has_content(self.path(patch, channel))]

    def whereabouts(self, patch, channel):
        """For a message: the path of a missing channel, and what exists there instead."""
        return whereabouts(self.path(patch, channel))

    def grid_row(self, patch):
        """The values of `sarwmix.raster.GRID` of a patch, the scene being its acquisition; None if not known."""

    def require(self):
        """Raises DataError if a package that reading needs is not installed."""
        load_rasterio()

    def bands(self, patch, max_nonfinite):
        """Reads a patch: [VH, VV], each (H, W) float32 in dB. Raises DataError with the path of an unreadable band."""
        return [read_band(self.path(patch, channel), max_nonfinite, channel, integers=False) for channel in CHANNELS]

    def image(self, patch, max_nonfinite):
        """Reads a patch: (2, 120, 120) float32 in dB. Raises DataError if it cannot be used."""
        bands = self.bands(patch, max_nonfinite)
        for channel, band in zip(CHANNELS, bands):
            if band.shape != (SIZE, SIZE):
                raise DataError(
                    f"{self.path(patch, channel)}: is {'x'.join(map(str, band.shape))} pixels, not {SIZE}x{SIZE}; "
                    "restore the patch, or remove its row"
                )
        image = np.stack(bands)
        check_decibels(image, lambda channel: self.path(patch, channel))
        return image


class PatchFolders(Store):
    """A folder of GeoTIFFs in a Layout."""

    def __init__(self, layout):
        super().__init__(layout.folder)
        self._layout = layout

    def patches(self):
        """Sorted names of all patches that exist."""
        names = _names_in(self.folder)
        if self._layout.acquisitions:
            names = [name for acquisition in names for name in _names_in(f"{self.folder}/{acquisition}")]
        return sorted(names)

    def path(self, patch, channel):
        return f"{self._layout.folder_of(patch)}/{patch}_{channel}{self._layout.suffix}"

    def grid_row(self, patch):
        with opened_geotiff(self.path(patch, CHANNELS[0]), listed=False) as source:
            _, crs, transform = grid_of(source)
        return (acquisitions_of(np.array([patch]))[0], 0, 0, crs, *transform)


def _names_in(folder):
    """Names of the folders in a folder that have names of patches or acquisitions."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if S1_START.match(entry.name) and entry.is_dir()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check --data_path") from error


def every_patch(store):
    """The Listing of all patches that exist, sorted by name, without labels. Raises DataError if there are none."""
    names = store.patches()
    place = f"{store.folder.name}/"
    if not names:
        raise DataError(
            f"{store.folder}: holds no patch folders (S1A_… or S1B_…); {content_of(store.folder)}; check --data_path"
        )
    check_names(names, lambda i: f"{place}{names[i]}")
    return Listing(np.array(names, dtype=str), None, (place,))


def _has_content(path):
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


# ---- The LMDB of version 2 ----------------------------------------------------------------------

_opened = {}  # {folder: (process id, environment)}; LMDB must be opened once per process, and not used after a fork
_opening = threading.Lock()


def _lmdb():
    return load("lmdb", "reading an LMDB", PACK_ELSEWHERE)


def is_lmdb(folder):
    """Whether this folder is an LMDB. lock.mdb may be absent, because the LMDB is only read."""
    return (folder / LMDB_FILE).is_file()


class LmdbStore(Store):
    """Patches in an LMDB: the float32 arrays VH and VV of each value, 120x120, in dB. Other entries are ignored."""

    def __init__(self, folder):
        super().__init__(folder)
        self._real = os.path.realpath(folder)

    def path(self, patch, channel):
        return f"{self.folder}:{patch}/{channel}"

    def missing(self, patch):
        exists = self._get(patch, lambda value: value is not None)  # a view: the value is not read
        return [] if exists else list(CHANNELS)

    def patches(self):
        """Sorted names of all patches in the LMDB."""
        try:
            with _environment(self._real).begin() as transaction, transaction.cursor() as cursor:
                names = [key.decode(errors="replace") for key in cursor.iternext(values=False)]
        except _lmdb().Error as error:
            raise DataError(f"{self._real}/{LMDB_FILE}: is damaged ({error}); copy it again") from None
        return sorted(name for name in names if S1_START.match(name))

    def require(self):
        _lmdb()

    def whereabouts(self, patch, channel):
        return f"{self.folder} has no key {patch}"

    def bands(self, patch, max_nonfinite):
        arrays, found = self._arrays(patch), []
        for channel in CHANNELS:
            path = self.path(patch, channel)
            if channel not in arrays:
                raise DataError(
                    f"{path}: is not there, only {', '.join(sorted(arrays)) or 'nothing'}; "
                    "copy the LMDB again, or remove the patch's row"
                )
            band = arrays[channel]
            if band.dtype != "float32":
                raise DataError(f"{path}: is {band.dtype}, not float32; copy the LMDB again, or remove the patch's row")
            check_nonfinite(band, path, max_nonfinite)
            found.append(band)
        return found

    def _arrays(self, patch):
        """Reads a patch: {name: array}. Raises DataError, which names LMDB and key."""
        value = self._get(patch, self._copied)
        if value is None:
            raise DataError(f"{self.folder}: has no key {patch}; copy the LMDB again, or remove the patch's row")
        try:
            return load_arrays(value)
        except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy does not have
            raise DataError(
                f"{self.folder}: the value of key {patch} cannot be read as safetensors "
                f"({' '.join(str(error).split())}); copy the LMDB again, or remove the patch's row"
            ) from None

    @staticmethod
    def _copied(view):
        # Reading mapped pages beyond the end of the file would kill the process.
        if view is not None and len(view) > MOST_BYTES:
            raise _lmdb().CorruptedError(f"a value of {len(view):,} bytes")
        return view if view is None else bytes(view)

    def _get(self, patch, take):
        """Returns take(view of the value of a patch, or None). Raises DataError, which names LMDB and key."""
        try:
            with _environment(self._real).begin(buffers=True) as transaction:
                return take(transaction.get(patch.encode()))
        except _lmdb().Error as error:
            raise DataError(
                f"{self._real}/{LMDB_FILE}: is damaged where key {patch} is looked for ({error}); copy it again"
            ) from None


def _environment(folder):
    """The LMDB, opened when this process first needs it. Raises DataError if it cannot be read."""
    with _opening:
        process, environment = _opened.get(folder, (None, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()  # of the parent process; LMDB would count it as opened by this one
            environment = _open(folder)
            _opened[folder] = os.getpid(), environment
        return environment


def _open(folder):
    lmdb, data = _lmdb(), f"{folder}/{LMDB_FILE}"
    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"{data}: cannot be read as an LMDB ({error}); copy it again") from None
    # Reading mapped pages beyond the end of the file would kill the process.
    size, need = os.path.getsize(data), (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < need:
        environment.close()
        raise DataError(f"{data}: is truncated, {size:,} bytes of {need:,}; copy it again")
    return environment


# ---- The dataset ---------------------------------------------------------------------------------


class BigEarthNet(RadarDataset):
    """Sentinel-1 patches with 19-class labels: base class of BigEarthNetv1 and BigEarthNetv2.

    Item i is (image, labels): (2, 120, 120) float32 in dB, order VH, VV; (19,) float32, 1 for each class that is
    present. Samples are in the order of the metadata. NaN in the files is kept.
    max_nonfinite: fraction of NaN, infinite and no-data pixels above which reading a band fails.
    """

    CLASSES, SIZE, size = CLASSES, SIZE, SIZE

    def __init__(self, root, split, metadata, store, listing, max_nonfinite):
        refuse_duplicates(listing)
        super().__init__(root, split, metadata, listing)
        self.store, self.max_nonfinite = store, max_nonfinite

    def read_image(self, i, which=0):
        try:
            return self.store.image(str(self.ids[i]), self.max_nonfinite)
        except DataError as error:
            raise DataError(f"{error} ({self.where(i)})") from error

    @property
    def groups(self):
        """(N,) str: the acquisition of each sample. Patches of one acquisition are neighbours."""
        return acquisitions_of(self.ids)

    def georeference(self):
        rows = in_threads(lambda i: self.store.grid_row(str(self.ids[i])), range(len(self)))
        table = None if None in rows else pd.DataFrame(rows, columns=GRID)
        return table if table is not None and (table.crs != "").any() else None

    def files(self, i):
        """Paths of sample i, one for each of CHANNELS: of files, or within a Zarr store or an LMDB."""
        return [self.store.path(str(self.ids[i]), channel) for channel in CHANNELS]

    def require(self):
        self.store.require()

    def lacking(self, i):
        return self.store.missing(str(self.ids[i]))

    def whereabouts(self, i, name):
        return f"{self.store.whereabouts(str(self.ids[i]), name)}; restore them in {self.store.folder}"
