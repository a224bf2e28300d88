# SPDX-License-Identifier: MIT
"""TensorBoard event files, written synchronously.

torch.utils.tensorboard.SummaryWriter passes events to a thread. If that thread fails, for example on a full disk, a
later `flush` blocks forever. A run has few events, so they are written in the calling thread, where errors are raised.
"""

import contextlib
import itertools
import logging
import os
import re
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from common.files import make_folder, sync

PREFIX = "events.out.tfevents."
_files = itertools.count()  # of this process

log = logging.getLogger(__name__)


class EventFile:
    """A new event file in a folder, for scalars and images. Raises OSError, which names the file, if writing fails.

    purge_step: TensorBoard ignores the events of earlier files in the folder from this step on. It reads files in the
    order of their names, which begin with a time in seconds. So that a clock that is behind does not hide the new file,
    its name states a later second than those of the others.
    """

    def __init__(self, folder, purge_step=None):
        make_folder(folder)
        second = max([int(time.time()), *(found + 1 for found in _seconds(folder))])
        self.path = Path(folder) / f"{PREFIX}{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self._file = open(self.path, "xb")
        sync(folder)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2", step=purge_step)
        if purge_step is not None:
            self._add(session_log=SessionLog(status=SessionLog.START), step=purge_step)

    def add_scalar(self, tag, value, step):
        self._add(summary=summary.scalar(tag, value), step=step)

    def add_image(self, tag, pixels, step):
        """pixels: (H, W, 3) uint8."""
        self._add(summary=summary.image(tag, pixels, dataformats="HWC"), step=step)

    def flush(self):
        """Write all events to the disk (fsync)."""
        self._named(lambda: os.fsync(self._file.fileno()))

    def close(self):
        with contextlib.suppress(OSError):  # the error was raised when the event was added
            self._file.close()

    def _add(self, **content):
        self._named(lambda: self._records.write(Event(wall_time=time.time(), **content).SerializeToString()))
        self._named(self._file.flush)

    def _named(self, write):
        try:
            return write()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def event_files(folder):
    """The event files in a folder, in the order in which TensorBoard reads them."""
    return sorted(path for path in Path(folder).glob(f"{PREFIX}*") if path.is_file())


def warn_of_damage(folder):
    """Logs a warning for each event file in a folder that is empty or damaged, as a crash of the machine leaves it."""
    for path in event_files(folder):
        events, fault = _readable_events(path)
        if fault or not events:
            log.warning(
                "%s: %s; TensorBoard shows its first %d events; the later ones are lost. log.txt has the losses of "
                "all epochs",
                path,
                fault or "empty",
                events,
            )


def _readable_events(path):
    """(the number of intact events at the beginning of an event file, a description of what follows or "")."""
    events = 0
    try:
        reader = PyRecordReader_New(str(path))
        while True:
            reader.GetNext()
            events += 1
    except errors.OutOfRangeError:
        return events, ""
    except errors.DataLossError:
        return events, "damaged"
    except (OSError, errors.OpError) as error:
        return events, f"cannot be read ({error})"


def _seconds(folder):
    """The seconds in the names of the event files in a folder."""
    names = (re.match(rf"{re.escape(PREFIX)}(\d{{10}})\.", path.name) for path in event_files(folder))
    return [int(name[1]) for name in names if name]
