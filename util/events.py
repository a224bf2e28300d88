# SPDX-License-Identifier: MIT
"""TensorBoard's event file, written at once.

torch.utils.tensorboard.SummaryWriter hands events to a thread. When that thread fails (a full disk), a later `flush` waits for
it for ever. A run has few events, so here they are written by whoever adds them, and what fails raises there.
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
    """A new event file in a folder, for scalars and images. Raises OSError naming the file where it cannot be written.

    purge_step: TensorBoard hides what earlier files of the folder say of this step and later ones.
    """

    def __init__(self, folder, purge_step=None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = (
            Path(folder)
            / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        )
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
        """Put what was added onto the disk."""
        self._named(lambda: os.fsync(self._file.fileno()))

    def close(self):
        with contextlib.suppress(OSError):  # it was raised where the event was added
            self._file.close()

    def _add(self, **content):
        self._named(lambda: self._records.write(Event(wall_time=time.time(), **content).SerializeToString()))
        self._named(self._file.flush)

    def _named(self, write):
        try:
            return write()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
