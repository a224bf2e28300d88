# SPDX-License-Identifier: MIT
"""A lock file that keeps two runs out of one folder, on one host or on several."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import stat
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import TrainingError, UsageError

LOCK = ".lock"
HEARTBEAT = 15.0  # seconds between two signs of life of a holder
TAKE_OVER = 180.0  # seconds without one, after which a holder on another host counts as dead
CREATION = 5.0  # seconds that an empty lock file may belong to a run that is just creating it
MOST_BYTES = 500  # of a lock file that are read
NAMED = re.compile(r"([!-~]+ pid \d+(?: job [!-~]+)?)\n(?:([0-9a-f-]+) )?")  # who, and on which machine

log = logging.getLogger(__name__)


class FolderLock:
    """The lock of a folder: the file `.lock` in it, which names its holder and exists while the folder is held.

    The file is created exclusively (O_EXCL), so that of several runs that start together one gets the lock, on network
    file systems too. A run that is killed leaves it. Whether its holder lives is decided by the kernel's lock (flock)
    on it, which ends with its holder: blocked, the holder lives; free, a holder on this machine is dead. A host may
    know its own kernel locks only, so a holder on another machine is watched: it touches the file every HEARTBEAT
    seconds, and counts as dead after TAKE_OVER seconds without a touch. The process that watches counts them by its own
    clock, so the clocks of the hosts need not agree.

    The package filelock is not used: its lock names no holder, and forked loader processes inherit it, so that it
    outlives a killed run.
    """

    def __init__(self, folder):
        self.path = Path(folder) / LOCK
        self._file = self._ended = None
        self._content = b""

    def acquire(self, owner, any_host=False):
        """Takes the lock. Returns the name of the dead holder that it was taken over from, or "".

        owner: how the user named the folder ("--out DIR"), for messages. any_host: a holder on another machine
        counts as dead without being watched, unless the kernel knows that it lives; for folders that two runs may write
        without harm. Raises UsageError if another run holds the lock, or the lock is not a plain file; OSError if it
        cannot be created.
        """
        dead, until = "", time.monotonic() + 3 * TAKE_OVER  # of waiting, at most
        while not self._create_own():
            holder = read_holder(self.path)
            is_dead = None if holder is None else holder.is_dead(any_host)
            if is_dead is None:  # the lock was released, or has another holder now
                continue
            if not is_dead or time.monotonic() > until:
                raise UsageError(
                    f"{owner} is in use by another run ({holder.name or 'which is starting'}); wait for it or choose "
                    "another folder"
                )
            if holder.remove():
                dead = holder.name or "an unknown run"
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(self._ended,), daemon=True).start()
        return dead

    def check(self):
        """Raises TrainingError if another run holds the lock now.

        That happens when this process was suspended for longer than TAKE_OVER, or its lock file was removed by hand. A
        lock file that is only missing is created anew.
        """
        holder = read_holder(self.path)
        if holder is None and self._create_own():
            log.warning("%s was removed, although this run uses the folder; it is created again", self.path)
        elif holder is None or holder.content != self._content:
            now = holder.name if holder else "another run"
            raise TrainingError(
                f"{self.path}: {now} has taken over this folder, because this run did not renew its lock for "
                f"{TAKE_OVER:.0f} s or the lock was removed; this run ends and writes nothing more there"
            )

    def release(self):
        """Unlocks the folder, if it is locked."""
        if self._ended is None:
            return
        if self.is_held():
            with suppress(OSError):  # a lock that is left behind is that of a dead run
                self.path.unlink()
        self._ended.set()
        self._ended = None
        self._file.close()

    def is_held(self):
        """Whether the lock file is there and ours, as far as that can be found out."""
        try:
            holder = read_holder(self.path)
        except (OSError, UsageError):
            return False
        return self._ended is not None and holder is not None and holder.content == self._content

    def _beat(self, ended):
        """Touches the lock file from time to time, so that other machines see that its holder lives."""
        while not ended.wait(HEARTBEAT):
            with suppress(OSError, ValueError):  # a failing disk, which whatever writes next reports; a closed file
                os.utime(self._file.fileno())

    def _create_own(self):
        """Creates the lock file and writes our name into it. Returns whether it is ours."""
        self._content = _content()
        file = _create(self.path, self._content)
        if file is None:
            return False
        holder = read_holder(self.path)
        if holder is None or holder.content != self._content:  # another run considered the empty file abandoned
            file.close()
            return False
        if self._file is not None:
            self._file.close()
        self._file = file
        return True


@dataclass(frozen=True)
class Holder:
    """What a lock file says.

    name: of its holder, printable; "" if the content is not that of a lock: a run is just creating it, or a crash of
    the machine has damaged it. boot: the boot id of the holder's machine, or "". touched: inode and time of change.
    """

    path: Path
    content: bytes
    name: str
    boot: str
    touched: tuple

    def is_dead(self, any_host=False):
        """Whether the holder is dead; None if the lock has become free, or that of another holder.

        May wait for TAKE_OVER seconds to see a sign of life.
        """
        lives = _is_locked(self.path) if self.content else None  # its creator is about to lock an empty file
        if lives:
            return False
        if not self.name and not any_host:
            return self._is_silent_for(CREATION)
        is_here = self.boot == _boot() if self.boot else self.name.startswith(f"{socket.gethostname()} ")
        if any_host or is_here and lives is not None:
            return True
        log.info(
            "%s: held by %s, whose process cannot be checked from here; waiting up to %.0f s for it to renew the lock",
            self.path,
            self.name,
            TAKE_OVER,
        )
        return self._is_silent_for(TAKE_OVER)

    def remove(self):
        """Removes the lock file of this dead holder. Returns False if somebody else does, or has done so.

        Only the process that has created the claim, a file named after the holder, may remove the lock, and it reads
        the lock again first: otherwise a slow process could remove the lock of a run that has taken over in the
        meantime.
        """
        claim = self.path.with_name(f"{self.path.name}.{hashlib.sha256(self.content).hexdigest()[:12]}")
        file = _create(claim, _content())
        if file is None:
            other = read_holder(claim)
            if other is not None and other.is_dead():  # killed while it held the claim
                other.remove()
            else:
                time.sleep(0.01)
            return False
        try:
            if read_holder(self.path) != self:
                return False
            self.path.unlink()
            return True
        finally:
            claim.unlink(missing_ok=True)
            file.close()

    def _is_silent_for(self, seconds):
        """Watches the lock file. Returns whether nobody touches it for so long; None if it is another one, or gone."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1, seconds / 10))
            now = read_holder(self.path)
            if now != self:
                return None if now is None or now.content != self.content else False
        return True


def read_holder(path):
    """The Holder of a lock file; None if there is none. Raises UsageError if it is not a plain file, and OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise _unfit(path) from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _unfit(path)
        content = os.read(descriptor, MOST_BYTES)
    finally:
        os.close(descriptor)
    named = NAMED.match(content.decode(errors="replace"))
    name, boot = (named[1], named[2] or "") if named else ("", "")
    return Holder(Path(path), content, name, boot, (found.st_ino, found.st_mtime_ns))


def _unfit(path):
    return UsageError(
        f"{path}: is not a plain file, which the lock of a run must be; remove it, if no run uses the folder"
    )


def _boot():
    """The id of this start of this machine, which its containers share."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _content():
    """What this process writes into a lock file: who it is, in a line for people; its machine, and a unique token."""
    job = os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID")
    in_job = f" job {re.sub('[^!-~]', '?', job)[:100]}" if job else ""
    return f"{socket.gethostname()} pid {os.getpid()}{in_job}\n{_boot()} {uuid.uuid4().hex}\n".encode()


def _create(path, content):
    """Creates a file that must not exist yet, locks it, and then writes its content. None if it exists."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    file = open(descriptor, "r+b", buffering=0)
    # A forked loader process would hold the lock while it lives, which may be longer than a killed run does.
    os.register_at_fork(after_in_child=file.close)
    with suppress(OSError):  # a file system without kernel locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write(content)
    os.fsync(descriptor)  # after a crash of the machine, an empty file would be waited for
    return file


def _is_locked(path):
    """Whether the kernel knows that a process holds the lock of a file; None if the file system has no such locks."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two runs that look do not see each other
        except BlockingIOError:
            return True
        except OSError:
            return None
    return False
