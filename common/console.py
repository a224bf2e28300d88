# SPDX-License-Identifier: MIT
"""The console log of all programs."""

import datetime
import logging
import sys

from common.errors import printable

LOG = "the log"  # what an OSError names in place of a file


class _ClockFormatter(logging.Formatter):
    """Lines that begin with `[HH:MM:SS.ffffff] `, which log readers expect."""

    def format(self, record):
        clock = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"[{clock}] {level}{printable(super().format(record))}"


class _FailingHandler(logging.StreamHandler):
    """Raises OSError where a line cannot be written. logging would print a traceback and go on."""

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, LOG) from None
        super().handleError(record)


def setup_logging(level=logging.INFO, stream=None, force=False):
    """Logs to `stream` (default: stderr) from this level on, Python's warnings included. A line that cannot be written
    raises OSError.

    force: replaces the handlers that the root logger has; without it, they stay as they are.
    """
    handler = _FailingHandler(stream)
    handler.setFormatter(_ClockFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=force)
    logging.captureWarnings(True)
