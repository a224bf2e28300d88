# SPDX-License-Identifier: MIT
"""Reading a zip that may be damaged, or made to do harm: nothing is written unless all of its directory is in order."""

import copy
import hashlib
import re
import stat
import struct
import zipfile
import zlib
from functools import partial
from itertools import pairwise
from pathlib import Path

from common.errors import DataError, data_error
from common.files import put_in_place

MAX_ENTRIES = 200_000
MAX_BYTES = 200 * 10**9  # of all members together, as they state it
MAX_RATIO = 200  # bytes of a member to bytes that it takes in the zip, where it has more than
RATIO_FROM = 8 * 2**20  # bytes: an empty image of 1 MB may well be a thousand times larger than its member
CHUNK = 2**20
HEADER = 30  # bytes before the name and the data of a member, at least
ENCRYPTED = 0x1 | 0x40 | 0x2000
PATCH = 0x20  # flag of data that are a difference from another file
AGAIN = "download it again, and compare its size with what the source states"


def open_archive(path, max_entries=MAX_ENTRIES, max_bytes=MAX_BYTES, max_ratio=MAX_RATIO):
    """Open a zip and check its directory. Returns Archive, which is to be closed (`with`).

    max_entries, max_bytes, max_ratio: more members, bytes in all, or bytes of a large member per byte in the zip are refused.
    Raises DataError, which names the zip and the first five members that cannot be trusted: names that lead elsewhere,
    clash or hold control characters; links and devices; encrypted or unusually packed ones; sizes that cannot be.
    """
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; give the zip as it was downloaded") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror or error}); give the zip as it was downloaded"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
        raise DataError(f"{path}: is not a zip, or is cut off or damaged ({_one_line(error)}); {AGAIN}") from None
    try:
        return Archive(path, file, _checked(path, file, max_entries, max_bytes, max_ratio))
    except DataError:
        file.close()
        raise


class Archive:
    """An open zip with a directory that has been checked.

    members: {name with "/" between its parts: zipfile.ZipInfo} of the files in it, in the order of the directory.
    """

    def __init__(self, path, file, members):
        self.path, self._file, self.members = Path(path), file, members

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def fingerprint(self):
        """SHA-256 of the directory: names, sizes and checksums of all members."""
        lines = (f"{info.orig_filename}\0{info.file_size}\0{info.CRC:08x}\n" for info in self._file.infolist())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, name, most=64 * 2**20):
        """Content of a small member, bytes. Raises DataError as `extract` does, and for more than `most` bytes."""
        if self.members[name].file_size > most:
            raise DataError(
                f"{self.path}: member {_quoted(name)} has {self.members[name].file_size} bytes, far more than such a file "
                f"has; {AGAIN}"
            )
        return b"".join(self._chunks(name))

    def pending(self, chosen, out):
        """What of {relative path under the folder `out`: member} is not there yet with the size of its member."""

        def is_there(path, size):
            return path.is_file() and path.stat().st_size == size

        return {
            target: name for target, name in chosen.items() if not is_there(out / target, self.members[name].file_size)
        }

    def extract(self, chosen, out):
        """Write {relative path under the folder `out`: member}; what is there with the right size stays.

        A file with its final name is whole, and has the checksum that the zip states. Raises DataError, naming the zip and
        the member, for damaged data and for more or fewer bytes than stated; no more than those are ever written.
        """
        for target, name in self.pending(chosen, out).items():
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            put_in_place(out / target, partial(self._write, name))

    def _write(self, name, path):
        try:
            with open(path, "wb") as file:
                for chunk in self._chunks(name):
                    file.write(chunk)
        except DataError:
            path.unlink()
            raise

    def _chunks(self, name):
        """The bytes of a member in pieces. Their number has been held against the ratio allowed, so that one bound is enough."""
        stated = self.members[name].file_size
        info = copy.copy(self.members[name])
        info.file_size += 2 * CHUNK  # zipfile stops in silence at the size that it knows
        total = 0
        try:
            with self._file.open(info) as member:
                while chunk := member.read(CHUNK):
                    total += len(chunk)
                    if total > stated:
                        break
                    yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: member {_quoted(name)} is damaged ({_one_line(error)}); {AGAIN}") from None
        if total != stated:
            raise DataError(
                f"{self.path}: member {_quoted(name)} holds {'more' if total > stated else 'fewer'} than the {stated} "
                f"bytes that it states; do not trust this zip, {AGAIN}"
            )


def _checked(path, file, max_entries, max_bytes, max_ratio):
    """{name: ZipInfo} of the files of a zip, when all of its directory can be trusted."""
    entries = file.infolist()
    if len(entries) > max_entries:
        raise DataError(f"{path}: has {len(entries)} members, more than the {max_entries} allowed; {AGAIN}")
    stated = sum(info.file_size for info in entries)
    if stated > max_bytes:
        raise DataError(f"{path}: its members have {stated} bytes in all, more than the {max_bytes} allowed; {AGAIN}")
    bad = [f"{_quoted(info.orig_filename)} {fault}" for info in entries if (fault := _fault(info, max_ratio))]
    bad = bad or _clashes(entries) or _overlaps(entries, file.start_dir)
    if bad:
        raise data_error(f"{path}: nothing was extracted, {len(bad)} members cannot be trusted", bad, AGAIN)
    return {"/".join(_parts(info)): info for info in entries if not _is_folder(info)}


def _is_folder(info):
    return info.orig_filename.endswith("/")


def _parts(info):
    return tuple(part for part in info.orig_filename.split("/") if part not in ("", "."))


def _fault(info, max_ratio):
    """Why a member by itself cannot be trusted, or None."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)  # where there are modes; 0 elsewhere
    if not name.isprintable():
        return "has control characters in its name"
    if "\\" in name or re.match("[A-Za-z]:", name):
        return "is named by a Windows path"
    if name.startswith("/"):
        return "has an absolute path"
    if ".." in name.split("/"):
        return "leads out of its folder"
    if not _parts(info):
        return "has no name"
    if stat.S_ISLNK(kind):
        return "is a symbolic link"
    if kind not in (0, stat.S_IFDIR if _is_folder(info) else stat.S_IFREG):
        return "is neither a plain file nor a folder"
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & PATCH:
        return f"is packed by a method that is not read here ({info.compress_type})"
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        return "is not packed, but has another size in the zip"
    if info.file_size > max(RATIO_FROM, max_ratio * info.compress_size):
        return f"unpacks {info.compress_size} bytes to {info.file_size}, more than {max_ratio} times as many"
    return None


def _clashes(entries):
    """Names that come twice, or are those of a file and of a folder. In sorted order what lies in a folder follows it."""
    named = sorted((_parts(info), _is_folder(info)) for info in entries)
    found = []
    for (first, is_folder), (second, also) in pairwise(named):
        if first == second and is_folder == also:
            found.append(f"{_quoted('/'.join(first))} comes twice")
        elif second[: len(first)] == first and not is_folder:
            found.append(f"{_quoted('/'.join(first))} is a file and a folder")
    return found


def _overlaps(entries, end):
    """Members that share bytes with the one before or lie outside the file, in the order of their place in it; end: of all."""
    found, free = [], 0
    for info in sorted(entries, key=lambda info: info.header_offset):
        if info.header_offset < free:
            found.append(f"{_quoted(info.orig_filename)} overlaps another, or lies outside the zip")
        free = max(free, info.header_offset + HEADER + info.compress_size)
        if free > end:
            found.append(f"{_quoted(info.orig_filename)} reaches beyond the members of the zip")
    return found


def _quoted(name):
    """A name as it can stand in a one-line message; names of images, with their folders, have some 110 characters."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _one_line(error):
    return " ".join(str(error).split())[:200]
