# SPDX-License-Identifier: MIT
"""Atomic writing, reading with one-line errors, free space, and exclusive output folders."""

import csv
import errno
import hashlib
import json
import logging
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.lock import LOCK, FolderLock

log = logging.getLogger(__name__)

RESERVE = 256 * 2**20  # bytes that stay free on a file system
HALF_WRITTEN = ".*.[0-9]*.tmp"  # temporary files of `atomic_path`, as a killed run leaves them


# ---- Atomic writing ------------------------------------------------------------------------------


@contextmanager
def temporary_beside(path):
    """Yields a path of this process beside `path`, on the same file system. A file there is removed after the block."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a killed process may have had the same id
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync(path):
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path):
    """Makes a folder and its parents, and flushes the names of the new ones to the disk."""
    path = Path(path).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


@contextmanager
def atomic_path(path):
    """Yields a temporary path. At the end of the block the file there is flushed to the disk and renamed to `path`.

    Killed at any moment, `path` holds either what it held before or all of the new content. An exception (disk full, …)
    leaves `path` as it was. An OSError that names no file is raised with this path, and so is that of NumPy for an
    array that was written in part, which does not say why: the disk is full.
    """
    try:
        with temporary_beside(path) as temporary:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        sync(Path(path).parent)
    except OSError as error:
        number = errno.ENOSPC if error.errno is None and "requested and" in str(error) else error.errno
        if error.filename is None and number is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def write_atomically(path, write):
    """Writes a file by write(file), opened in binary mode; see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_text(path, text):
    """Writes a UTF-8 text file; see `atomic_path`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """Writes a JSON file; see `atomic_path`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_csv(path, header, rows):
    """Writes a CSV file with this header, or without one (None); see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows] if header else rows)


def save_array(path, array):
    """Writes a .npy file; see `atomic_path`."""
    write_atomically(path, lambda file: np.save(file, array))


def remove_half_written(folder):
    """Removes the temporary files that a killed run left in a folder and below it."""
    for path in Path(folder).rglob(HALF_WRITTEN):
        path.unlink()


# ---- Reading -------------------------------------------------------------------------------------


def read_json(path, remedy):
    """The content of a JSON file, with or without a byte order mark. Raises DataError with the remedy."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nesting that is too deep
        raise DataError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error


def sha256_of(path):
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fault(folder, expected):
    """Describes the fault of a file in a folder, or None. expected: (path in the folder, SHA-256 of its content)."""
    name, checksum = expected
    try:
        return None if sha256_of(Path(folder) / name) == checksum else f"{name} differs"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


# ---- Free space ----------------------------------------------------------------------------------


def room_at(folder):
    """(the nearest folder that exists at or above `folder`, free bytes there)."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return there, shutil.disk_usage(there).free


def check_room(needs):
    """Raises DataError, with folders, need and free space, if a file system has too little space for the output.

    needs: [(flag, folder, which need not exist yet, bytes)]. Folders on one file system share its space.
    """
    by_device = {}
    for flag, folder, need in needs:
        there, free = room_at(folder)
        by_device.setdefault(there.stat().st_dev, []).append((f"{flag} {folder}", need, free))
    for wanted in by_device.values():
        names, sizes, frees = zip(*wanted)
        need, free = sum(sizes), min(frees)
        if need + RESERVE > free:
            raise DataError(
                f"{' and '.join(names)}: about {need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free; "
                "make room, or choose another disk"
            )


# ---- Exclusive output folders --------------------------------------------------------------------


@contextmanager
def claimed(workers, out, record, last, name="simulation.json", flag="--out"):
    """Holds the folder `out` against other runs. Yields whether it is complete, which is when the file `last` exists.

    record: the parameters that decide its content, plain values, kept in the file `name`. A folder with the same record
    is continued; a missing folder is made; a complete one is logged. flag: how the user named the folder. Raises
    InputError on every rank of `workers`, and changes nothing, for any other content and for a folder that another run
    holds.
    """
    with ExitStack() as stack:
        complete = workers.on_main(stack.enter_context, _claimed(Path(out), record, last, name, flag))
        if complete:
            log.info("%s: already complete, nothing to do", out)
        yield complete


@contextmanager
def _claimed(out, record, last, name, flag):
    if out.exists() and not out.is_dir():
        raise DataError(f"{flag} {out} is not a folder; choose another {flag}")
    new = not _has_record(out, record, name, flag)
    if not new and (out / last).exists():
        yield True
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out)
    lock.acquire(f"{flag} {out}", any_host=True)  # runs write the same content, atomically
    try:
        if new and not _has_record(out, record, name, flag):  # another run may have created it in the meantime
            write_json(out / name, record)
        else:
            remove_half_written(out)
        yield (out / last).exists()
    finally:
        lock.release()


def _has_record(out, record, name, flag):
    """Whether `out` has this record; if not, it is empty or missing. Raises DataError for any other content."""
    if not out.exists() or not any(
        not path.name.startswith(LOCK) and not path.match(HALF_WRITTEN) for path in out.iterdir()
    ):
        return False
    try:
        found = json.loads((out / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        raise DataError(
            f"{flag} {out} is not empty and does not hold output of this program; choose another {flag}, or empty it"
        ) from None
    if found != json.loads(json.dumps(record)):
        raise DataError(
            f"{flag} {out} was made with other parameters ({out / name}); choose another {flag}, or remove it"
        )
    return True
