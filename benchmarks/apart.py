# SPDX-License-Identifier: MIT
"""Runs functions in separate processes with a time limit, and the parts of a report one after the other.

Each process is forked from this one. This process imports what they need but must not compute anything, because neither
CUDA nor threads survive a fork.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from common.files import write_json

SPARE = 0.15  # share of a part's time limit that it does not plan with

_context = multiprocessing.get_context("fork")


def _run(function, args, log, session):
    """The body of a process. Its output goes to the file `log`; so does the traceback of an exception (status 1)."""
    if session:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        status = function(*args)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    multiprocessing.util._exit_function()  # as at the end of a program: waits for child processes
    os._exit(status or 0)


class Apart:
    """Runs function(*args) in its own process. The return value is the exit status (None: 0).

    log: file that the output is appended to. session: `end` also kills the processes that it started.
    """

    def __init__(self, function, *args, log, session=False):
        self.log, self.session = Path(log), session
        self.process = _context.Process(target=_run, args=(function, args, str(log), session))
        self.process.start()

    def wait(self, seconds=None):
        """Returns the exit status, negative for a signal; None if the process is still running after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self):
        """Kills the process. With `session`, kills the processes that it started too, even if it has ended."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL) if self.session else self.process.kill()
        except ProcessLookupError:
            if self.process.is_alive():  # it has not called setsid yet
                self.process.kill()
        self.process.join()

    def last_line(self):
        """The last line of the output, which usually states the error."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1].strip() if lines else ""


# ---- Parts of a report ---------------------------------------------------------------------------


class LeftOut(Exception):
    """A part cannot run on this machine. The message is the reason."""


@dataclass(frozen=True)
class Part:
    """One part of the report: function(found, settings, seconds). share: of the time, relative to other parts."""

    name: str
    title: str
    share: float
    function: callable


class Found:
    """The findings of a part, which are written to disk and to the console at once."""

    def __init__(self, path, console):
        self.path, self.console, self.state = path, console, {"found": []}

    def add(self, text, **figures):
        """Adds a finding: a line of text, and its figures for the JSON."""
        self.state["found"].append({"text": text, **figures})
        self.write()
        os.write(self.console, f"   {text}\n".encode())

    def keep(self, path):
        """Includes the JSON that a benchmark wrote."""
        self.state.setdefault("data", {})[path.stem] = json.loads(path.read_text())
        self.write()

    def write(self):
        write_json(self.path, self.state)


def run_function(function, path, console, settings, seconds):
    """Runs a part; the body of its process."""
    found = Found(path, console)
    try:
        function(found, settings, seconds)
    except LeftOut as reason:
        found.state["left_out"] = str(reason)
    found.write()


def run_part(part, out, settings, seconds):
    """Runs a part for at most `seconds`. Returns its row of the report: name, status, reason, findings."""
    path, log, started = out / f"{part.name}.part.json", out / f"{part.name}.log", time.monotonic()
    log.unlink(missing_ok=True)
    console = os.dup(1)
    process = Apart(run_function, part.function, path, console, settings, seconds * (1 - SPARE), log=log, session=True)
    try:
        status = process.wait(seconds)
    finally:
        process.end()
        os.close(console)
    row = {"part": part.name, "title": part.title, "status": "ok", "reason": ""}
    row |= {"seconds": time.monotonic() - started, "found": []}
    if path.exists():
        row |= json.loads(path.read_text())
        path.unlink()
    if status is None:
        row |= {"status": "failed", "reason": f"not over within its {seconds:.0f} s"}
    elif status:
        row |= {"status": "failed", "reason": f"status {status}: {process.last_line()}"[:300]}
    elif "left_out" in row:
        row |= {"status": "left out", "reason": row.pop("left_out")}
    return row


def split_time(parts, seconds):
    """The time limit of the first of these parts: its share of the remaining seconds."""
    return max(0.0, seconds) * parts[0].share / sum(part.share for part in parts)


def run_parts(parts, out, settings, ends, write):
    """Runs parts in order until the monotonic time `ends`, and calls write(rows) after each. Returns their rows."""
    rows = []
    for number, part in enumerate(parts):
        seconds = split_time(parts[number:], ends - time.monotonic())
        print(f"\n== {part.name}: {part.title} ({seconds:.0f} s at most) ==", flush=True)
        row = run_part(part, out, settings, seconds)
        rows.append(row)
        print(f"-- {': '.join(filter(None, (row['status'], row['reason'])))}, {row['seconds']:.0f} s", flush=True)
        write(rows)
    return rows
