# SPDX-License-Identifier: MIT
"""Reads zips that may be damaged or malicious: the whole directory is checked before anything is read or written."""

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

from common.errors import DataError, data_error, quoted, reason_of
from common.files import atomic_path

MAX_ENTRIES = 200_000
MAX_BYTES = 200 * 10**9  # of all members together, as their directory entries state
MAX_RATIO = 200  # largest ratio of unpacked to packed bytes, for members of more than RATIO_FROM unpacked bytes
RATIO_FROM = 8 * 2**20  # an empty image of 1 MB is a thousand times larger than its member
CHUNK = 2**20
LONGEST_NAME, LONGEST_PATH = 240, 3000  # bytes; file systems allow 255 and 4096, the folder and a suffix included
HEADER = 30  # least number of bytes before the name and the data of a member
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flag bits
PATCHED = 0x20  # flag bit of data that are a difference from another file
AGAIN = "download it again, and compare its size with what the source states"
# Exceptions of zipfile for a file that is not a zip, or is damaged.
BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error)
_quoted = partial(quoted, most=200)  # names of images with their folders have some 110 characters


def open_archive(path, max_entries=MAX_ENTRIES, max_bytes=MAX_BYTES, max_ratio=MAX_RATIO):
    """Opens a zip and checks its directory. Returns an Archive, which is to be closed (`with`).

    max_entries, max_bytes, max_ratio: upper bounds of members, bytes in all, and unpacked bytes per packed byte of a
    large member. Raises DataError, with the zip and the first five members that cannot be trusted: names that lead
    elsewhere, clash or hold control characters; links and devices; encrypted or unusually packed members; impossible
    sizes.
    """
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; give the zip as it was downloaded") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror or error}); give the zip as it was downloaded"
        ) from None
    except BROKEN as error:
        raise DataError(f"{path}: is not a zip, or is cut off or damaged ({reason_of(error)[:200]}); {AGAIN}") from None
    try:
        return Archive(path, file, _checked(path, file, max_entries, max_bytes, max_ratio))
    except DataError:
        file.close()
        raise


def packing_fault(path):
    """Describes why a zip of uncompressed members may need more memory than its size; None if it cannot."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (*BROKEN, OSError) as error:
        return str(error)
    packed = [info.filename for info in entries if info.compress_type != zipfile.ZIP_STORED]
    if packed or sum(info.file_size for info in entries) > Path(path).stat().st_size:
        return f"its {packed[0] if packed else 'content'} is compressed, which PyTorch never does"
    return None


class Archive:
    """An open zip whose directory has been checked.

    members: {name with "/" between its parts: zipfile.ZipInfo} of its files, in the order of the directory.
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
        """The content of a small member. Raises DataError as `extract` does, and for more than `most` bytes."""
        size = self.members[name].file_size
        if size > most:
            raise DataError(
                f"{self.path}: member {_quoted(name)} has {size} bytes, far more than such a file has; {AGAIN}"
            )
        return b"".join(self._chunks(name))

    def pending(self, chosen, out):
        """The entries of {path relative to the folder `out`: member} without a file of the member's size."""
        return {
            target: name
            for target, name in chosen.items()
            if not (out / target).is_file() or (out / target).stat().st_size != self.members[name].file_size
        }

    def extract(self, chosen, out):
        """Writes {path relative to the folder `out`: member}; files that exist with the right size are kept.

        A file under its final name is complete and has the checksum that the zip states. Raises DataError, with the zip
        and the member, for damaged data and for another number of bytes than stated; never writes more than stated.
        """
        for target, name in self.pending(chosen, out).items():
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(out / target) as temporary, open(temporary, "wb") as file:
                for chunk in self._chunks(name):
                    file.write(chunk)

    def _chunks(self, name):
        """The bytes of a member in pieces, at most as many as its directory entry states."""
        stated = self.members[name].file_size
        info = copy.copy(self.members[name])
        info.file_size += 2 * CHUNK  # zipfile stops silently at the stated size
        total = 0
        try:
            with self._file.open(info) as member:
                while chunk := member.read(CHUNK):
                    total += len(chunk)
                    if total > stated:
                        break
                    yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path}: member {_quoted(name)} is damaged ({reason_of(error)[:200]}); {AGAIN}"
            ) from None
        if total != stated:
            raise DataError(
                f"{self.path}: member {_quoted(name)} holds {'more' if total > stated else 'fewer'} than the {stated} "
                f"bytes that it states; do not trust this zip, {AGAIN}"
            )


def _checked(path, file, max_entries, max_bytes, max_ratio):
    """{name: ZipInfo} of the files of a zip. Raises DataError unless its whole directory can be trusted."""
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
    """Describes why a member cannot be trusted; None if it can."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip has no file modes
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
    if len(name.encode(errors="replace")) > LONGEST_PATH or any(
        len(part.encode(errors="replace")) > LONGEST_NAME for part in _parts(info)
    ):
        return "has a name that is too long for a file system"
    if stat.S_ISLNK(kind):
        return "is a symbolic link"
    if kind not in (0, stat.S_IFDIR if _is_folder(info) else stat.S_IFREG):
        return "is neither a plain file nor a folder"
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & PATCHED:
        return f"is compressed by a method that this program does not read ({info.compress_type})"
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        return "is not packed, but has another size in the zip"
    if info.file_size > max(RATIO_FROM, max_ratio * info.compress_size):
        return f"unpacks {info.compress_size} bytes to {info.file_size}, more than {max_ratio} times as many"
    return None


def _clashes(entries):
    """Names that occur twice, or as a file and as a folder. In sorted order a folder precedes its content."""
    named = sorted((_parts(info), _is_folder(info)) for info in entries)
    found = []
    for (first, is_folder), (second, also) in pairwise(named):
        if first == second and is_folder == also:
            found.append(f"{_quoted('/'.join(first))} occurs twice")
        elif second[: len(first)] == first and not is_folder:
            found.append(f"{_quoted('/'.join(first))} is a file and a folder")
    return found


def _overlaps(entries, end):
    """Members that share bytes with another or lie outside the file. end: offset of the end of all members."""
    found, free = [], 0
    for info in sorted(entries, key=lambda info: info.header_offset):
        if info.header_offset < free:
            found.append(f"{_quoted(info.orig_filename)} overlaps another, or lies outside the zip")
        free = max(free, info.header_offset + HEADER + info.compress_size)
        if free > end:
            found.append(f"{_quoted(info.orig_filename)} reaches beyond the members of the zip")
    return found
