# SPDX-License-Identifier: MIT
"""A lock file that keeps two runs out of one folder, on one host or on several."""

import fcntl
import os
import socket
from pathlib import Path

from common.errors import UsageError

LOCK = ".lock"


class FolderLock:
    """The lock of a folder: the file `.lock` in it, which names its holder (`host pid 123`) and is empty when free.

    The kernel's lock (flock) ends with its holder, however that ends. The name covers file systems without locks, and
    network file systems on which a host knows its own locks only. The package filelock is not used: its lock names no
    holder, and forked loader processes inherit it, so that it outlives a killed run.
    """

    def __init__(self, folder):
        self.path, self._file = Path(folder) / LOCK, None

    def acquire(self, owner, any_host=False):
        """Takes the lock. Returns the dead process that it was taken over from, or "".

        owner: how the user named the folder ("--out DIR"), for messages. any_host: takes over from a process of another
        host too, unless the file system knows better; for folders that two runs may write without harm. Raises
        UsageError if another run holds the lock, or may hold it; OSError if the lock file cannot be written.
        """
        here, has_locks = socket.gethostname(), self._open(owner)
        holder = self._holder()
        if holder and not any_host and not (has_locks and holder.startswith(f"{here} ")):
            self._file.close()
            raise UsageError(
                f"{owner} is locked by {holder}, which cannot be checked from {here}; if that run is gone, remove "
                f"{self.path}"
            )
        self.clear()
        self._file.write(f"{here} pid {os.getpid()}\n")
        self._file.flush()
        return holder

    def clear(self):
        """Empties the lock file, so that any host can take the lock after this process has ended."""
        self._file.truncate(0)

    def release(self):
        """Unlocks the folder, if it is locked."""
        if self._file and not self._file.closed:
            self.clear()
            self._file.close()

    def _open(self, owner):
        """Opens and locks the file. Returns whether the file system has locks."""
        while True:
            self._file, has_locks = open(self.path, "a+", encoding="utf-8"), True
            # A forked loader process would hold the lock while it lives, which may be longer than a killed run does.
            os.register_at_fork(after_in_child=self._file.close)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with self._file:
                    raise UsageError(
                        f"{owner} is in use by another run ({self._holder() or 'starting up'}); wait for it or choose "
                        f"another folder"
                    ) from None
            except OSError:
                has_locks = False
            if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return has_locks
            self._file.close()  # its last holder has removed it in the meantime

    def _holder(self):
        self._file.seek(0)
        return self._file.read().strip()
