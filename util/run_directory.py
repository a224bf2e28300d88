# SPDX-License-Identifier: MIT
"""The output directory of a run: one run at a time, nothing overwritten unasked, logs that match the checkpoint."""

import json
import logging
import os
import signal
import tempfile
from pathlib import Path

from common.errors import Stopped, UsageError, reason_of
from common.files import HALF_WRITTEN, write_atomically
from common.lock import FolderLock
from common.ranks import on_main
from common.sealed_file import SealedFile
from util.checkpoint import LATEST, PREVIOUS, go_on_from, save_checkpoint
from util.events import EventFile
from util.stopping import SIGNALS, catch

LOG, RECORD = "log.txt", "run.json"
SELECTED = "checkpoint_best*.pth"
CHECKPOINTS = (LATEST, PREVIOUS, "checkpoint_[0-9]*.pth", SELECTED)
# What our programs write; --overwrite removes this, the TensorBoard events, and nothing else.
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
    """The output directory of a run, held by rank 0 from `open` to the end of its `with` block.

    Every rank calls the same methods, and only rank 0 does anything.

    What fails on rank 0 is raised on every rank: UsageError if the folder cannot be made, another run holds it, it
    holds a run already and neither resume nor overwrite is asked for, or a file cannot be written. writer: an
    EventFile, from `begin` on, on rank 0.
    """

    def __init__(self, path, ranks):
        self.path, self.ranks, self.writer, self._handlers = Path(path), ranks, None, {}
        self._lock = FolderLock(path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None or isinstance(error, Stopped) and error.on_all_ranks:
            self.ranks.on_main(self._end, error)  # mpirun kills the others soon after the first rank has ended
        else:
            self._end(error)

    def _end(self, error):
        if self.writer:
            outcome = "stopped" if isinstance(error, Stopped) else "failed"
            self._record_end("finished" if error is None else f"{outcome}: {reason_of(error)}")
        self.close()

    @on_main
    def save(self, state, entry=None, names=()):
        """Makes `state` the latest checkpoint.

        At an epoch's end with a line for log.txt, and also under `names`, if given.

        The logs are written first: lines without their checkpoint are cut off when the run continues, and a line that
        is missing would be missing for ever.
        """
        self.writer.flush()
        if entry is not None:
            with open(self.path / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        save_checkpoint(self.path, state, names)

    def close(self):
        """Close the logs and free the folder for another run."""
        if self.writer:
            self.writer.close()
        self._lock.release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    @on_main
    def open(self, resume=False, overwrite=False):
        """Locks the folder. Nothing else in it is touched before `begin`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            gone = self._lock.acquire(f"--output_dir {self.path}")
        except OSError as error:
            raise UsageError(
                f"--output_dir {self.path}: {error.strerror}; choose a folder that can be written"
            ) from None
        if gone:
            log.warning("taking over the lock of %s: that process is gone", gone)
        self._handlers = catch(
            self._on_signal, set(SIGNALS) - {signal.SIGINT}
        )  # Ctrl-C unwinds the program, as elsewhere
        earlier = self._own_files()
        if earlier and not (resume or overwrite):
            self.close()
            raise UsageError(
                f"--output_dir {self.path} already holds a run ({earlier[0].name}); continue it with "
                f"--resume auto, or choose another folder (--overwrite would delete that run)"
            )

    def _on_signal(self, number, _):
        """Outside of training (`util.stopping`) a signal finds nothing to save: free the folder and end, status 128 +
        number.

        Nothing is unwound, as an exception at any place of the program could leave it waiting for its own threads; and
        nothing is lost, as files are put in place whole.
        """
        self._lock.clear()
        os.write(2, f"ended by {signal.Signals(number).name}; continue with --resume auto\n".encode())
        os._exit(128 + number)

    def _own_files(self):
        return sorted(path for pattern in OWN_FILES for path in self.path.glob(pattern))

    @on_main
    def begin(self, record, start, steps, log_dir=None, overwrite=False):
        """Clears an earlier run away (overwrite), or cuts its logs back to the start.

        Writes run.json, opens TensorBoard.

        record: what the run is. start: `util.training.Start`; steps: of an epoch.
        """
        log_dir = log_dir or self.path / "tensorboard"
        try:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=log_dir).close()
        except OSError as error:
            raise UsageError(f"--log_dir {log_dir}: {error.strerror}; choose a folder that can be written") from None
        if overwrite:
            for path in (*self._own_files(), *Path(log_dir).glob("events.out.tfevents.*")):
                path.unlink()
        for path in self.path.glob(HALF_WRITTEN):
            path.unlink()
        if start.source is not None:
            go_on_from(start.source, self.path, SELECTED)
        self._cut_log(start.epoch)
        before = self._read_record()
        if before:
            record = {**record, "earlier": [*before.pop("earlier", []), before]}
        self._write_record({**record, "outcome": "running"})
        self.writer = EventFile(log_dir, purge_step=int((start.epoch + start.step / steps) * 1000) + 1)

    def _read_record(self):
        path = self.path / RECORD
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            log.warning("%s: cannot be read (%s), and is written anew", path, error)
            return {}

    def _write_record(self, record):
        write_atomically(self.path / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode()))

    def _record_end(self, outcome):
        """Say in run.json how the run ended. It has ended one way or another, so a full disk is no error any more."""
        try:
            self._write_record({**self._read_record(), "outcome": outcome})
        except OSError as error:
            log.warning("%s: could not be written (%s)", self.path / RECORD, error)

    def _cut_log(self, start_epoch):
        path = self.path / LOG
        if not path.exists():
            return
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        kept = [line for line in lines if _epoch_of(line, path) < start_epoch]
        if len(kept) < len(lines):
            log.info("log.txt: %d lines from epoch %d on are cut off", len(lines) - len(kept), start_epoch)
        write_atomically(path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))


def _epoch_of(line, path):
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s: a line that is not a log entry is dropped: %.60s", path, line)
        return float("inf")
