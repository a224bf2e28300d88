# SPDX-License-Identifier: MIT
"""The output directory of a run: one run at a time, nothing overwritten unasked, logs that match the checkpoint."""
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from util.checkpoint import LATEST, PREVIOUS, write_atomically
from util.errors import UsageError

LOCK, LOG, RECORD = ".lock", "log.txt", "run.json"
# What a program of ours writes; --overwrite removes this and nothing else.
OWN_FILES = (LOG, RECORD, LATEST, PREVIOUS, "checkpoint_*.pth", "reconstruction_*.png", ".*.tmp")

log = logging.getLogger(__name__)


class RunDirectory:
    """The output directory, locked for this process (rank 0) until `close`.

    Raises UsageError if it cannot be made, if another run holds it, or if it holds a run already and neither `resume`
    nor `overwrite` is set. Nothing is removed before `clear`.
    """

    def __init__(self, path, resume=False, overwrite=False):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "a+")
        except OSError as error:
            raise UsageError(f"--output_dir {path}: {error.strerror}; choose a folder that can be written") from None
        self._acquire()
        if self.own_files() and not (resume or overwrite):
            self.close()
            raise UsageError(f"--output_dir {path} already holds a run ({self.own_files()[0].name}); continue it with "
                             f"--resume auto, replace it with --overwrite, or choose another folder")

    def _acquire(self):
        here = socket.gethostname()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            self._lock.close()
            raise UsageError(f"--output_dir {self.path} is in use by another run ({holder or 'starting up'}); wait for it or "
                             f"choose another folder") from None
        holder = self._holder()
        # The kernel gives a lock back when its holder dies, but on some network file systems only hosts know of their own.
        if holder and not holder.startswith(f"{here} "):
            self._lock.close()
            raise UsageError(f"--output_dir {self.path} is locked by {holder}, which cannot be checked from {here}; if that "
                             f"run is gone, remove {self.path / LOCK}")
        if holder:
            log.warning("taking over the lock of %s: that process is gone", holder)
        self._lock.truncate(0)
        self._lock.write(f"{here} pid {os.getpid()}\n")
        self._lock.flush()

    def _holder(self):
        self._lock.seek(0)
        return self._lock.read().strip()

    def own_files(self):
        return sorted(path for pattern in OWN_FILES for path in self.path.glob(pattern))

    def clear(self, log_dir=None):
        """Remove what an earlier run left: its logs, records, checkpoints and pictures, and its TensorBoard events."""
        for path in self.own_files():
            path.unlink()
        for events in Path(log_dir).glob("events.out.tfevents.*") if log_dir else ():
            events.unlink()

    def cut_log(self, epochs):
        """Drop the lines of log.txt from epoch `epochs` (0-based) on, which a continued run will write again."""
        path = self.path / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            kept = [line for line in lines if _epoch_of(line, path) < epochs]
            if len(kept) < len(lines):
                log.info("log.txt: %d lines after epoch %d are cut off", len(lines) - len(kept), epochs - 1)
            write_atomically(path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))

    def append_log(self, entry):
        """One JSON object on a line of log.txt."""
        with open(self.path / LOG, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def write_record(self, record):
        """run.json: what this run was. A continued run keeps the records of its earlier parts under "earlier"."""
        path = self.path / RECORD
        if path.exists():
            before = json.loads(path.read_text())
            record = {**record, "earlier": [*before.pop("earlier", []), before]}
        write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))

    def close(self):
        if not self._lock.closed:
            self._lock.truncate(0)
            self._lock.close()


def _epoch_of(line, path):
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s: a line that is not a log entry is dropped: %.60s", path, line)
        return float("inf")
