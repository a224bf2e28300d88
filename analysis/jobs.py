# SPDX-License-Identifier: MIT
"""The commands of a study, several at a time, and the record of what a study is."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.files import make_folder, read_json, write_json

RECORD = "study.json"


class Step(NamedTuple):
    """A command. unless: a file; if it exists when the step is due, the step is skipped."""

    command: list
    unless: str = ""


def is_due(step):
    return not (step.unless and os.path.exists(step.unless))


def run_jobs(jobs, at_a_time, env=None):
    """Runs jobs, lists of steps, several at a time. If a step fails, ends all others and exits with its status."""
    waiting, running = [iter(job) for job in jobs][::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop()
                step = next(filter(is_due, job), None)
                if step:
                    process = subprocess.Popen(step.command, env=env)
                    running[process.pid] = process, job
            if running:
                pid, status = os.wait()
                process, job = running.pop(pid)
                code = process.returncode = os.waitstatus_to_exitcode(status)
                if code:
                    sys.exit(code if code > 0 else 128 - code)
                waiting.append(job)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():  # a training saves before it ends
            process.wait()


def run_study(jobs, at_a_time, threads=1):
    """`run_jobs` of a program, so many threads each; exits on SIGTERM and Ctrl-C when the steps have ended."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        run_jobs(jobs, at_a_time, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    except KeyboardInterrupt:
        sys.exit(130)


def keep_record(folder, record, name, entries):
    """Makes the folder of a study, and notes in it what its runs share. Raises DataError if it holds something else.

    record: plain values, which stay the same. name, entries: {key: value} to which others may be added later.
    """
    path, remedy = Path(folder) / RECORD, "choose another folder"
    if not path.exists() and path.parent.is_dir() and any(path.parent.iterdir()):
        raise DataError(f"--output {folder}: is not empty, and holds no study; {remedy}")
    found = read_json(path, remedy) if path.exists() else {**record, name: {}}
    known = found.pop(name, {})
    if found != record:
        other = next((key for key in record if found.get(key) != record[key]), "flags")
        raise DataError(f"--output {folder}: holds a study with other {other} ({path}); {remedy}")
    for key, value in entries.items():
        if known.setdefault(key, value) != value:
            raise DataError(f"--output {folder}: its {name} {key} is {known[key]} ({path}); {remedy}")
    make_folder(path.parent)
    write_json(path, {**record, name: known})
