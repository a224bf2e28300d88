# SPDX-License-Identifier: MIT
"""Writing files so that nothing half-written ever has its final name, and folders that one run at a time may fill."""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from common.errors import DataError

LOCK = ".lock"
RESERVE = 256 * 2**20  # bytes that a file system should have left over


def put_in_place(path, write):
    """Have write(temporary path) make a file beside `path`; when it is on the disk, give it its name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # what an interrupted run left; GDAL would try to open it
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_array(path, array):
    """A .npy file, in place only when it is whole."""

    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, NumPy would append .npy to that of the temporary file
            np.save(file, array)

    put_in_place(path, write)


def write_csv(path, header, rows):
    """A CSV file with this header (None: without), in place only when it is whole."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows] if header else rows)

    put_in_place(path, write)


def write_json(path, value):
    """A JSON file, in place only when it is whole."""
    put_in_place(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def read_json(path, remedy):
    """The content of a JSON file, with a byte order mark or without. Raises DataError, which names it and ends with the remedy."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: too many brackets within each other
        raise DataError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error


def sha256_of(path):
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fault(folder, expected):
    """What is wrong with a file of a folder, or None. expected: (its path in the folder, SHA-256 of its content)."""
    name, checksum = expected
    try:
        return None if sha256_of(Path(folder) / name) == checksum else f"{name} differs"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


# ---- Room ----------------------------------------------------------------------------------------


def room_at(folder):
    """(the nearest folder that exists at or above `folder`, bytes that are free there)."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return there, shutil.disk_usage(there).free


def check_room(needs):
    """DataError, naming folder, need and room, if the file systems of these folders cannot take what is to be written.

    needs: [(flag, folder that need not exist yet, bytes)]. Folders of one file system share its room.
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
                f"{' and '.join(names)}: about {need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB "
                "are free; make room, or choose another disk"
            )


# ---- Folders -------------------------------------------------------------------------------------


@contextmanager
def claimed(crew, out, record, last, name="simulation.json", flag="--out"):
    """Hold the folder `out`, so that no other run fills it too. Yields whether it is complete: the file `last` is there.

    record: what decides its content, plain values, kept in the file `name`. A folder with the same record is finished, or
    continued; one that is not there is made. flag: how the user named the folder. Raises DataError on every rank of
    `crew` for any other content and for a folder that another run holds, and touches nothing then.
    """
    with ExitStack() as stack:
        yield crew.on_main(lambda: stack.enter_context(_claimed(Path(out), record, last, name, flag)))


@contextmanager
def _claimed(out, record, last, name, flag):
    if out.exists() and not out.is_dir():
        raise DataError(f"{flag} {out} is not a folder; choose another {flag}")
    new = not _has_record(out, record, name, flag)
    if not new and (out / last).exists():
        yield True
        return
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, flag):
        if new and not _has_record(out, record, name, flag):  # another run may have just begun it
            write_json(out / name, record)
        yield (out / last).exists()


def _has_record(out, record, name, flag):
    """Whether `out` has this record; otherwise it has no content at all. Raises DataError."""
    content = {entry.name for entry in out.iterdir()} - {f".{name}.tmp", LOCK} if out.exists() else set()
    if not content:
        return False
    try:
        found = json.loads((out / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        raise DataError(
            f"{flag} {out} is not empty and was not begun by this program; choose another {flag}, or empty it"
        ) from None
    if found != json.loads(json.dumps(record)):
        raise DataError(
            f"{flag} {out} was made with other parameters ({out / name}); choose another {flag}, or remove it"
        )
    return True


@contextmanager
def _locked(out, flag):
    path = out / LOCK
    while True:
        lock = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another run"
            lock.close()
            raise DataError(
                f"{flag} {out} is being written by {holder}; wait for it, or choose another {flag}"
            ) from None
        except OSError:
            pass  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()  # the last holder removed it in the meantime
    try:
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        lock.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
