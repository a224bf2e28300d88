# SPDX-License-Identifier: MIT
"""The LMDB of BigEarthNet v2, as its authors publish it: key = name of a patch, value = safetensors of its bands."""

import os
import threading

from safetensors import SafetensorError
from safetensors.numpy import load

from common.errors import DataError
from common.packages import PACK_ELSEWHERE
from common.packages import load as load_package
from sarwmix.bigearthnet import Store
from sarwmix.geotiff import check_nonfinite
from sarwmix.listing import CHANNELS

DATA = "data.mdb"
MOST_BYTES = 2**22  # of a patch; all its bands together have fewer than 2**19

_opened = {}  # {folder: (process id, environment)}: LMDB must be opened once per process, and not be used after a fork
_opening = threading.Lock()


def _lmdb():
    return load_package("lmdb", "reading an LMDB", PACK_ELSEWHERE)


def is_lmdb(folder):
    """Whether this folder is an LMDB. lock.mdb may be absent, because nobody writes to it."""
    return (folder / DATA).is_file()


class LmdbStore(Store):
    """Patches in an LMDB: the float32 arrays VH and VV of each value, 120x120, in dB. Other entries are ignored."""

    def __init__(self, folder):
        super().__init__(folder)
        self._real = os.path.realpath(folder)

    def path(self, patch, channel):
        return f"{self.folder}:{patch}/{channel}"

    def missing(self, patch):
        there = self._get(patch, lambda value: value is not None)  # a view: the value is not read
        return [] if there else list(CHANNELS)

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
        """{name: array} of a patch. Raises DataError, which names LMDB and key."""
        value = self._get(patch, self._copied)
        if value is None:
            raise DataError(f"{self.folder}: has no key {patch}; copy the LMDB again, or remove the patch's row")
        try:
            return load(value)
        except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy does not have
            raise DataError(
                f"{self.folder}: the value of key {patch} cannot be read as safetensors ({' '.join(str(error).split())}); "
                "copy the LMDB again, or remove the patch's row"
            ) from None

    @staticmethod
    def _copied(view):
        # Reading mapped pages beyond the end of the file would kill the process.
        if view is not None and len(view) > MOST_BYTES:
            raise _lmdb().CorruptedError(f"a value of {len(view):,} bytes")
        return view if view is None else bytes(view)

    def _get(self, patch, take):
        """Returns take(view of the value of a patch, or None if there is none). Raises DataError, which names LMDB and key."""
        try:
            with _environment(self._real).begin(buffers=True) as transaction:
                return take(transaction.get(patch.encode()))
        except _lmdb().Error as error:
            raise DataError(
                f"{self._real}/{DATA}: is damaged where key {patch} is looked for ({error}); copy it again"
            ) from None


def _environment(folder):
    """The LMDB, opened when this process first needs it. Raises DataError if it cannot be read."""
    with _opening:
        process, environment = _opened.get(folder, (None, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()  # the copy of the parent's environment, which LMDB would count as opened by this process
            environment = _open(folder)
            _opened[folder] = os.getpid(), environment
        return environment


def _open(folder):
    lmdb, data = _lmdb(), f"{folder}/{DATA}"
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
