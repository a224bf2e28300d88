# SPDX-License-Identifier: MIT
"""Starting the programs on one or two ranks, and reading and comparing what runs left."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ROOT


def launch(command, env=None):
    """Run a command to its good end, with one thread per process unless env says otherwise."""
    result = subprocess.run(
        [str(word) for word in command],
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
    return [str(word) for word in ("mpirun", "-np", 2, *as_root, "--oversubscribe", "--bind-to", "none", *command)]


def refusal(main, flags, capsys):
    """The one line with which a program refuses its flags, or what they name, and ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1, message
    return message


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
