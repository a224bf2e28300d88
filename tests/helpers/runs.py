# SPDX-License-Identifier: MIT
"""Starting the programs on one or two ranks, and reading and comparing what runs left."""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ROOT


class Argv(list):
    """Words of a command line, which `argv` takes as they are."""


def argv(*parts):
    """The words of a command line. A string is split as a shell splits it, other lists and tuples are flattened, and
    anything else, such as a Path or a number, is one word."""
    line = Argv()
    for part in parts:
        if isinstance(part, Argv):
            line += part
        elif isinstance(part, str):
            line += shlex.split(part) or [part]  # an empty string is a word, too
        elif isinstance(part, Iterable):
            line += argv(*part)
        else:
            line.append(str(part))
    return line


def launch(command, env=None):
    """Run a command to its good end, with one thread per process unless env says otherwise."""
    result = subprocess.run(
        argv(command),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def launch_alike(command):
    """Run a command with as many threads as this process has: sums, and so results, depend on it in the last bits."""
    return launch(command, {"OMP_NUM_THREADS": str(torch.get_num_threads())})


def mpirun(*command):
    """The command on two ranks; the test is skipped without Open MPI or mpi4py."""
    if shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("Open MPI or mpi4py is not installed")
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return argv("mpirun -np 2", as_root, "--oversubscribe --bind-to none", command)


def refusal(main, flags, capsys):
    """The one line with which a program refuses its flags, or what they name, and ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main(argv(flags))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1, message
    return message


def is_refused(result, *said, status=2):
    """Whether a program, (exit status, stdout, stderr), ended with this status and one line that holds all these texts."""
    ended, _, err = result
    return (
        ended == status
        and len(err.splitlines()) == 1
        and "Traceback" not in err
        and "\x1b" not in err
        and all(text in err for text in said)
    )


def refused(result, *said, status=2):
    assert is_refused(result, *said, status=status), result


def completed(result):
    """What a program, (exit status, stdout, stderr), wrote to stdout; it ended with status 0."""
    assert result[0] == 0, result
    return result[1]


def digests(folder):
    """{path: SHA-256} of all files under a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scalars(folder, name="train_loss"):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def same_states(one, other, skip=("args",)):
    """Whether two checkpoints are bitwise equal, all but `skip`."""

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return equal(*({key: value for key, value in state.items() if key not in skip} for state in (one, other)))


def check_processes_change_nothing(module, flags, expected, out):
    """`python -m module` with two processes writes the files of the folder `expected`, logs, and prints nothing."""
    command = [sys.executable, "-m", module, *argv("--out", out, flags, "--workers 2")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ETA" in result.stderr and result.stdout == ""
    assert digests(out) == digests(expected)
