# SPDX-License-Identifier: MIT
"""Functions in separate processes with a time limit, and a report whose parts run in this way one after the other.

A process is forked from this one, which must have imported what is needed but must not have computed anything: neither
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

SPARE = 0.15  # of a part's time: between what it plans with and the moment at which it is killed

_context = multiprocessing.get_context("fork")


def _run(function, args, log, session):
    """The body of a process: what it prints goes into a file; an exception is printed there, and status 1."""
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
    multiprocessing.util._exit_function()  # as at the end of a program: processes that it started are waited for
    os._exit(status or 0)


class Apart:
    """function(*args) in a process of its own; what it returns is its exit status (None: 0).

    log: file that its output is added to. session: it and all it starts can be ended together, by `end`.
    """

    def __init__(self, function, *args, log, session=False):
        self.log, self.session = Path(log), session
        self.process = _context.Process(target=_run, args=(function, args, str(log), session))
        self.process.start()

    def wait(self, seconds=None):
        """The exit status, negative for a signal, or None if it is not over within this time."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self):
        """Kill it, and with `session` what is left of what it started, which may have outlived it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL) if self.session else self.process.kill()
        except ProcessLookupError:
            if self.process.is_alive():  # it has no session yet
                self.process.kill()
        self.process.join()

    def last_line(self):
        """The last line of its output, which says most of what went wrong."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1].strip() if lines else ""


# ---- Parts of a report ---------------------------------------------------------------------------


class LeftOut(Exception):
    """A part cannot be done on this machine; says why."""


@dataclass(frozen=True)
class Part:
    """One part of the report. function(found, settings, seconds).

    Share: of the time, relative to those of the others.
    """

    name: str
    title: str
    share: float
    function: callable


class Found:
    """What a part has found so far: on disk, and on the console, as soon as it is known."""

    def __init__(self, path, console):
        self.path, self.console, self.state = path, console, {"found": []}

    def add(self, text, **figures):
        """A finding: a line for people, and its figures for the JSON."""
        self.state["found"].append({"text": text, **figures})
        self.write()
        os.write(self.console, f"   {text}\n".encode())

    def keep(self, path):
        """Take in the JSON that a benchmark has written."""
        self.state.setdefault("data", {})[path.stem] = json.loads(path.read_text())
        self.write()

    def write(self):
        write_json(self.path, self.state)


def run_function(function, path, console, settings, seconds):
    """A part, in its own process."""
    found = Found(path, console)
    try:
        function(found, settings, seconds)
    except LeftOut as reason:
        found.state["left_out"] = str(reason)
    found.write()


def run_part(part, out, settings, seconds):
    """Run a part for so many seconds at most. Returns its row of the report: name, status, reason, what was found."""
    path, started = out / f"{part.name}.part.json", time.monotonic()
    log = out / f"{part.name}.log"
    log.unlink(missing_ok=True)
    console = os.dup(1)
    process = Apart(run_function, part.function, path, console, settings, seconds * (1 - SPARE), log=log, session=True)
    try:
        status = process.wait(seconds)
    finally:
        process.end()
        os.close(console)
    row = {
        "part": part.name,
        "title": part.title,
        "status": "ok",
        "reason": "",
        "seconds": time.monotonic() - started,
        "found": [],
    }
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
    """Seconds of the first of some parts: its share of what is left."""
    return max(0.0, seconds) * parts[0].share / sum(part.share for part in parts)


def run_parts(parts, out, settings, ends, write):
    """Run parts one after the other until the monotonic time `ends`; write(rows) after each. Returns their rows."""
    rows = []
    for number, part in enumerate(parts):
        seconds = split_time(parts[number:], ends - time.monotonic())
        print(f"\n== {part.name}: {part.title} ({seconds:.0f} s at most) ==", flush=True)
        rows.append(run_part(part, out, settings, seconds))
        print(
            f"-- {': '.join(filter(None, (rows[-1]['status'], rows[-1]['reason'])))}, {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
        write(rows)
    return rows
