# SPDX-License-Identifier: MIT
"""The output directory of a run: locked by one run, overwritten only on request, logs that match the checkpoint."""

import json
import logging
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from common.ending import outcome_of
from common.errors import Stopped, UsageError, listed, quoted
from common.files import HALF_WRITTEN, make_folder, sync, write_atomically
from common.lock import FolderLock
from common.ranks import on_main
from common.sealed_file import SealedFile
from util.checkpoint import LATEST, PREVIOUS, go_on_from, save_checkpoint
from util.events import EventFile, event_files, warn_of_damage
from util.stopping import SIGNALS, catch

LOG, RECORD = "log.txt", "run.json"
SELECTED = "checkpoint_best*.pth"
CHECKPOINTS = (LATEST, PREVIOUS, "checkpoint_[0-9]*.pth", SELECTED)
# Files that our programs write. --overwrite removes these and the TensorBoard events.
OWN_FILES = (
    LOG,
    RECORD,
    *CHECKPOINTS,
    *(SealedFile(name).sidecar.name for name in CHECKPOINTS),
    "reconstruction_*.png",
    "train_ids.csv",
    "eval_*.json",
)

log = logging.getLogger(__name__)


class RunDirectory:
    """The output directory of a run, locked by rank 0 from `open` to the end of its `with` block.

    Every rank calls the same methods, and rank 0 runs them. Errors of rank 0 are raised on every rank. Raises
    UsageError if the folder cannot be made, another run has locked it, it contains a run and neither resume nor
    overwrite is given, or a file cannot be written. writer: an EventFile on rank 0, after `begin`.
    """

    def __init__(self, path, ranks):
        self.path, self.ranks, self.writer, self._handlers = Path(path), ranks, None, {}
        self._lock = FolderLock(path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None or isinstance(error, Stopped) and error.on_all_ranks:
            self.ranks.on_main(self._end, error)  # mpirun kills the other ranks when the first has ended
        else:
            self._end(error)

    def _end(self, error):
        if self.writer and self._lock.is_held():  # else run.json is that of another run
            self._record_end("finished" if error is None else outcome_of(error))
        self.close()

    @on_main
    def save(self, state, entry=None, names=()):
        """Saves `state` as the latest checkpoint and under `names`. entry: the line of log.txt, at the end of an epoch.

        The logs are written to the disk first, because a run that continues removes lines without a checkpoint but
        cannot restore missing ones. Raises TrainingError if another run has taken over the folder.
        """
        self._lock.check()
        self.writer.flush()
        if entry is not None:
            with open(self.path / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            sync(self.path)
        save_checkpoint(self.path, state, names)

    def close(self):
        """Closes the logs and unlocks the folder."""
        if self.writer:
            self.writer.close()
        self._lock.release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    @on_main
    def open(self, resume=False, overwrite=False):
        """Locks the folder. Changes nothing else in it before `begin`."""
        try:
            make_folder(self.path)
            gone = self._lock.acquire(f"--output_dir {self.path}")
        except OSError as error:
            raise UsageError(
                f"--output_dir {self.path}: {error.strerror}; choose a folder that can be written"
            ) from None
        if gone:
            log.warning("taking over the lock of %s: that process has ended", gone)
        self._handlers = catch(self._on_signal, set(SIGNALS) - {signal.SIGINT})  # Ctrl-C raises KeyboardInterrupt
        earlier = self._own_files()
        odd = [path.name for path in earlier if not path.is_file()]
        if odd or earlier and not (resume or overwrite):
            self.close()
        if odd:
            raise UsageError(
                f"--output_dir {self.path}: {listed(odd)} in it is not a plain file; remove it, or choose another "
                "folder"
            )
        if earlier and not (resume or overwrite):
            raise UsageError(
                f"--output_dir {self.path} already holds a run ({earlier[0].name}); continue it with "
                f"--resume auto, or choose another folder (--overwrite would delete that run)"
            )

    def _on_signal(self, number, _):
        """Handles a signal outside of training (`util.stopping`): exits with status 128 + number.

        There is nothing to save. Exits without an exception, which could leave the program waiting for its threads, and
        without touching the disk, which may be what hangs: the lock stays behind, as after SIGKILL. No file is damaged,
        because all are written atomically.
        """
        with suppress(OSError):
            os.write(2, f"ended by {signal.Signals(number).name}; continue with --resume auto\n".encode())
        os._exit(128 + number)

    def _own_files(self):
        return sorted(path for path in self.path.iterdir() if any(map(path.match, OWN_FILES)))  # dangling links too

    @on_main
    def begin(self, record, start, steps, log_dir=None, overwrite=False):
        """Removes an earlier run (overwrite) or truncates its logs to the start; writes run.json and opens TensorBoard.

        record: the content of run.json. start: `util.training.Start`. steps: per epoch.
        """
        log_dir = log_dir or self.path / "tensorboard"
        try:
            make_folder(log_dir)
            tempfile.TemporaryFile(dir=log_dir).close()
        except OSError as error:
            raise UsageError(f"--log_dir {log_dir}: {error.strerror}; choose a folder that can be written") from None
        if overwrite:
            for path in (*self._own_files(), *event_files(log_dir)):
                path.unlink()
        for path in self.path.glob(HALF_WRITTEN):
            if not path.is_dir():
                path.unlink()
        if start.source is not None:
            go_on_from(start.source, self.path, SELECTED)
            warn_of_damage(log_dir)
        self._cut_log(start)
        before = self._read_record()
        if before:
            record = {**record, "earlier": [*before.pop("earlier", []), before]}
        self._write_record({**record, "outcome": "running"})
        self.writer = EventFile(log_dir, purge_step=int((start.epoch + start.step / steps) * 1000) + 1)

    def _read_record(self):
        """The content of run.json; {} without one, and with a warning for one that cannot be read."""
        path = self.path / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(record, indent=1)  # may fail for nesting that is read
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            log.warning("%s: cannot be read (%s); it is written again", path, error)
            return {}
        if not isinstance(record, dict) or not isinstance(record.get("earlier", []), list):
            log.warning("%s: is not the record of a run; it is written again", path)
            return {}
        return record

    def _write_record(self, record):
        write_atomically(self.path / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode()))

    def _record_end(self, outcome):
        """Writes the outcome to run.json. A failure is only a warning, because the run has ended."""
        try:
            self._write_record({**self._read_record(), "outcome": outcome})
        except OSError as error:
            log.warning("%s: could not be written (%s)", self.path / RECORD, error)

    def _cut_log(self, start):
        """Keeps the lines of log.txt of epochs before the start, one of each. Warns of those that a run of this folder
        lacks."""
        path = self.path / LOG
        lines = []
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        entries = [(_epoch_of(line, path), line) for line in lines]
        before = [(epoch, line) for epoch, line in entries if epoch < start.epoch]
        if len(before) < len(lines):
            log.info("log.txt: %d lines from epoch %d on are removed", len(lines) - len(before), start.epoch)
        kept = dict(before)  # the last line of each epoch
        if len(kept) < len(before):
            log.warning("%s: %d epochs were logged twice; the last line of each is kept", path, len(before) - len(kept))
        missing = [epoch for epoch in range(start.epoch) if epoch not in kept]
        if missing and start.source is not None and start.source.parent.samefile(self.path):
            log.warning("%s: has no line for %d finished epochs: %s", path, len(missing), listed(map(str, missing)))
        if lines or path.is_symlink():
            write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in kept.values()).encode()))


def _epoch_of(line, path):
    """The epoch of a line of log.txt; infinity, with a warning, for a line that cannot be read."""
    try:
        epoch = json.loads(line)["epoch"]
        if type(epoch) is int and epoch >= 0:
            return epoch
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    log.warning("%s: a line that is not a log entry is dropped: %s", path, quoted(line, 60))
    return float("inf")
