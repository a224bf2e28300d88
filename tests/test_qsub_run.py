# SPDX-License-Identifier: MIT
"""scripts/qsub_run.sh without PBS: what it starts, how it hands on SIGTERM, and when it submits the next job."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

BOUND = 60
MPIRUN, QSUB = "mpirun.json", "qsub.json"       # what the fake commands were started with
# A fake command: writes down its arguments and its environment, then does its work.
FAKE = f"""#!{sys.executable} -S
import json, os, signal, sys, time
from pathlib import Path
here, output = Path({{here!r}}), Path(os.environ["OUTPUT"])
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
# A rank for the real mpirun, instead of Python: saves at SIGUSR1, and takes no notice of SIGTERM.
RANK = """#!/bin/bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
trap 'touch "$OUTPUT/checkpoint.pth"; exit 138' USR1
trap '' TERM
touch "{here}/running.$OMPI_COMM_WORLD_RANK"
for _ in {{1..1000}}; do sleep 0.05; done
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def job(tmp_path):
    """job(work of mpirun, work of qsub, **variables) → the job of a run in "out, put", begun long ago, as PBS starts it."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    output = tmp_path / "out, put"
    output.mkdir()
    (output / "checkpoint.pth").touch()
    os.utime(output / "checkpoint.pth", (1e9, 1e9))

    def start(mpirun="", qsub="print('12.pbs')", **variables):
        for name, work in (("mpirun", mpirun), ("qsub", qsub)):
            if work is not None:
                executable(tmp_path / "bin" / name, FAKE.format(here=str(tmp_path), work=f"note('{name}.json')\n{work}"))
        env = {name: value for name, value in os.environ.items() if name not in ("DATASET", "RESUBMIT", "WALLTIME_MIN")}
        env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "PBS_O_WORKDIR": str(tmp_path), "DATA_PATH": "/data, all/v2",
                "OUTPUT": str(output), **variables}
        return subprocess.Popen(["bash", tmp_path / "scripts" / "qsub_run.sh"], cwd="/", env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def end(job):
    """Exit status and the lines it printed."""
    lines = job.communicate(timeout=BOUND)[0].splitlines()
    return job.returncode, lines


def only_line(lines, *words):
    return len(lines) == 1 and all(word in lines[0] for word in ("qsub_run.sh: ", *words))


def wait_for(*paths):
    deadline = time.monotonic() + BOUND
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.01)


def test_the_run_is_started_with_the_recipe_and_the_walltime(job, tmp_path):
    assert end(job())[0] == 0
    words, _ = json.loads((tmp_path / MPIRUN).read_text())
    assert words[:6] == ["-np", "8", "--bind-to", "none", ".venv/bin/python", "main_pretrain.py"]
    flags = dict(zip(words[6:-1:2], words[7::2]))
    assert words[-1] == "--norm_pix_loss" and flags == {
        "--dataset": "benv2", "--data_path": "/data, all/v2", "--output_dir": str(tmp_path / "out, put"), "--resume": "auto",
        "--walltime": "1435", "--model": "mixmim_base", "--batch_size": "256", "--epochs": "1024", "--stop_epoch": "64",
        "--warmup_epochs": "40", "--blr": "1.5e-4", "--weight_decay": "0.05", "--mask_ratio": "0.5"}
    from main_pretrain import parse_flags
    assert parse_flags(words[6:]).walltime == 1435


def test_stopped_at_the_walltime_the_next_job_gets_the_same_variables(job, tmp_path):
    status, lines = end(job(STOPPED, RESUBMIT="3", WALLTIME_MIN="90", DATASET="benv1"))
    assert status == 0 and only_line(lines, "resubmitted as 12.pbs", "2 more")
    words, env = json.loads((tmp_path / QSUB).read_text())
    assert words == ["-v", "DATA_PATH,OUTPUT,DATASET,WALLTIME_MIN,RESUBMIT", "scripts/qsub_run.sh"]
    assert {name: env[name] for name in words[1].split(",")} == {
        "DATA_PATH": "/data, all/v2", "OUTPUT": str(tmp_path / "out, put"), "DATASET": "benv1", "WALLTIME_MIN": "90", "RESUBMIT": "2"}
    assert env["PWD"] == str(tmp_path)
    assert sorted(os.listdir(tmp_path / "out, put")) == ["checkpoint.pth", "run.json"]


def test_variables_that_are_not_set_are_handed_on_as_their_defaults(job, tmp_path):
    assert end(job(STOPPED, RESUBMIT="1"))[0] == 0
    _, env = json.loads((tmp_path / QSUB).read_text())
    assert (env["DATASET"], env["WALLTIME_MIN"], env["RESUBMIT"]) == ("benv2", "1435", "0")


@pytest.mark.parametrize("work, resubmit, status, reason", [
    ("save('finished')", "5", 0, "the run is finished"),
    (STOPPED, None, 0, "RESUBMIT is 0"),
    (STOPPED, "0", 0, "RESUBMIT is 0"),
    ("", "5", 0, "nothing new was saved"),
    ("(output / 'checkpoint.pth').unlink()", "5", 0, "nothing new was saved"),
    ("save('failed: …'); sys.exit(1)", "5", 1, "ended with status 1"),
    ("save('running'); sys.exit(2)", "5", 2, "ended with status 2"),
    ("save('stopped: SIGUSR1'); sys.exit(138)", "5", 138, "ended with status 138"),        # not asked for through this script
], ids=["finished", "no RESUBMIT", "RESUBMIT=0", "no progress", "no checkpoint", "failed", "usage", "SIGUSR1"])
def test_no_job_follows(job, tmp_path, work, resubmit, status, reason):
    ended, lines = end(job(work, **({"RESUBMIT": resubmit} if resubmit else {})))
    assert ended == status and only_line(lines, "not resubmitted, because", reason) and not (tmp_path / QSUB).exists()


def test_sigterm_is_handed_on_and_waited_for(job, tmp_path):
    running = job(SLOW, RESUBMIT="1")
    for sign in ("running", "signalled"):
        wait_for(tmp_path / sign)
        running.send_signal(signal.SIGTERM)
    status, lines = end(running)
    assert status == 143 and only_line(lines, "resubmitted as 12.pbs", "0 more")


def test_sigterm_without_progress_keeps_its_status(job, tmp_path):
    work = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(138)); note('running'); time.sleep(60)"
    running = job(work, RESUBMIT="1")         # as mpirun ends when a run is still starting up
    wait_for(tmp_path / "running")
    running.send_signal(signal.SIGTERM)
    status, lines = end(running)
    assert status == 143 and only_line(lines, "not resubmitted, because nothing new was saved")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_the_real_mpirun_gives_the_ranks_time_at_sigterm(job, tmp_path):
    """Also where PBS sends it to all processes of the job, mpirun among them."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    executable(python, RANK.format(python=sys.executable, here=tmp_path))
    running = job(mpirun=None, RESUBMIT="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                  OMPI_MCA_rmaps_base_oversubscribe="1")
    wait_for(*(tmp_path / f"running.{rank}" for rank in range(8)))
    processes = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()]
    for pid in (*processes, running.pid):
        os.kill(pid, signal.SIGTERM)
    status, lines = end(running)
    assert len(processes) == 1 and status == 143 and "resubmitted as 12.pbs" in lines[-1]


@pytest.mark.parametrize("code, status", [(0, 1), (143, 143)])
def test_a_qsub_that_fails_is_one_line(job, code, status):
    ended, lines = end(job(f"{STOPPED}; sys.exit({code})", "sys.exit('qsub: no such queue\\nask your administrator')", RESUBMIT="1"))
    assert ended == status and only_line(lines, "error", "qsub: no such queue ask your administrator")


@pytest.mark.parametrize("name, value", [("RESUBMIT", "many"), ("RESUBMIT", "-1"), ("RESUBMIT", "08"), ("WALLTIME_MIN", "24:00:00"),
                                         ("WALLTIME_MIN", "0")])
def test_a_number_that_is_none_is_refused_before_anything(job, tmp_path, name, value):
    status, lines = end(job(**{name: value}))
    assert status == 2 and only_line(lines, f"error: {name}={value}") and not (tmp_path / MPIRUN).exists()


def test_without_set_up_it_says_what_to_run(job, tmp_path):
    (tmp_path / ".venv" / "bin" / "python").unlink()
    status, lines = end(job())
    assert status == 2 and only_line(lines, "error", "bash scripts/setup.sh") and not (tmp_path / MPIRUN).exists()
