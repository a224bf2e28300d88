# SPDX-License-Identifier: MIT
"""Jobs of scripts/qsub_run.sh and scripts/sbatch_run.sh with stand-ins for the commands of PBS and Slurm."""

import os
import shutil
import subprocess
import sys
import time

from tests.helpers import ROOT

BOUND = 60  # seconds that a job may take
RUN = "pretrain_benv2_base_per_channel_token_seed0"
# A fake command: writes down its arguments and its environment, then does its work.
FAKE = f"""#!{sys.executable} -S
import json, os, signal, sys, time
from pathlib import Path
here, output = Path({{here!r}}), Path(os.environ["RUN_FOLDER"])
def note(name):
    (here / "staged").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
    os.rename(here / "staged", here / name)
def save(outcome, earlier="failed: earlier"):
    (output / "checkpoint.pth").touch()
    (output / "run.json").write_text(json.dumps({{{{"earlier": [{{{{"outcome": earlier}}}}], "outcome": outcome}}}}, indent=1))
def save_and_end(number, _):
    save("stopped: SIGUSR1")
    os._exit(128 + number)
{{work}}
"""
STOPPED = "save('stopped: --walltime is nearly over', earlier='finished')"
# Saves and ends at the second signal: so it can be seen that the first one is waited for.
SLOW = """
def first(*_):
    signal.signal(signal.SIGUSR1, save_and_end)
    note("signalled")
signal.signal(signal.SIGUSR1, first)
note("running")
time.sleep(60)
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def begin_checkout(folder, script):
    """Makes a checkout with .venv, eight GPUs, data in "data, all" and a run in "out, put", begun long ago.

    Returns the copy of the script from which a batch system starts it, in another folder.
    """
    for name in ("common", "scripts", "util"):
        shutil.copytree(ROOT / name, folder / name)
    copy = folder / "spool" / "jobs" / "12.SC"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / script, copy)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / "data, all").mkdir()
    output = folder / "out, put" / RUN
    output.mkdir(parents=True)
    (output / "checkpoint.pth").touch()
    os.utime(output / "checkpoint.pth", (1e9, 1e9))
    gpus = "for i in 1 2 3 4 5 6 7 8; do echo NVIDIA H200, 143771; done"
    executable(folder / "bin" / "nvidia-smi", f"#!/bin/sh\n{gpus}\n")
    return copy


def start_job(copy, folder, works, variables):
    """Starts the copy of a script as a batch system does. works: {fake command: its work}, None for no such command."""
    for name, work in works.items():
        if work is not None:
            executable(folder / "bin" / name, FAKE.format(here=str(folder), work=f"note('{name}.json')\n{work}"))
    env = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "DATA_PATH": "data, all",
        "MODELS_PATH": "out, put",
        "RUN_FOLDER": str(folder / "out, put" / RUN),
        **variables,
    }
    return subprocess.Popen(
        ["bash", copy], cwd="/", env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(*paths):
    deadline = time.monotonic() + BOUND
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.01)
