# SPDX-License-Identifier: MIT
"""TensorBoard event files, written synchronously.

torch.utils.tensorboard.SummaryWriter passes events to a thread. If that thread fails, for example on a full disk, a
later `flush` blocks forever. A run has few events, so they are written in the calling thread, where errors are raised.
"""

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

_files = itertools.count()  # of this process


class EventFile:
    """A new event file in a folder, for scalars and images. Raises OSError, which names the file, if writing fails.

    purge_step: TensorBoard ignores the events of earlier files in the folder from this step on.
    """

    def __init__(self, folder, purge_step=None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self.path = Path(folder) / name
        self._file = open(self.path, "xb")
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
