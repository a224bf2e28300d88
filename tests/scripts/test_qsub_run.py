# SPDX-License-Identifier: MIT
"""A job of scripts/qsub_run.sh without PBS: what it starts, how it hands on SIGTERM, and when it submits the next job."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.jobs import BOUND, RUN, SLOW, STOPPED, begin_checkout, executable, start_job, wait_for

pytestmark = pytest.mark.slow

MPIRUN, QSUB = "mpirun.json", "qsub.json"  # what the fake commands were started with
# A rank for the real mpirun, instead of Python: saves at SIGUSR1, and takes no notice of SIGTERM.
RANK = """#!/bin/bash
if [[ "$1" = -[cm] ]]; then exec {python} "$@"; fi
trap 'touch "$RUN_FOLDER/checkpoint.pth"; exit 138' USR1
trap '' TERM
touch "{here}/running.$OMPI_COMM_WORLD_RANK"
for _ in {{1..1000}}; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """job(work of mpirun, work of qsub, **variables) → the job of a run, as PBS starts it."""
    copy = begin_checkout(tmp_path, "qsub_run.sh")
    (tmp_path / "nodes").write_text("localhost\n" * 8)

    def start(mpirun="", qsub="print('12.pbs')", **variables):
        env = {"PBS_O_WORKDIR": str(tmp_path), "PBS_JOBID": "11.pbs", "PBS_NODEFILE": str(tmp_path / "nodes")}
        works = {"mpirun": mpirun, "qsub": qsub}
        return start_job(copy, tmp_path, works, {**env, "SITE_GROUP": "group", **variables})

    return start


def end(job):
    """Exit status and the lines it printed, without those that say what is started."""
    lines = job.communicate(timeout=BOUND)[0].splitlines()
    return job.returncode, [line for line in lines if not line.startswith(("# ", "mpirun -np 8 "))]


def only_line(lines, *words):
    return len(lines) == 1 and all(word in lines[0] for word in ("qsub_run.sh: ", *words))


def test_the_run_is_started_with_the_recipe_and_the_walltime(job, tmp_path):
    assert end(job("print('a line of the run')"))[0] == 0
    words, env = json.loads((tmp_path / MPIRUN).read_text())
    python = str(tmp_path / ".venv" / "bin" / "python")
    assert words[:9] == ["-np", "8", "--host", "localhost:8", "--map-by", "ppr:8:node", "--bind-to", "none", python]
    assert words[9] == "main_pretrain.py" and env["MASTER_ADDR"] == "localhost" and env["PWD"] == str(tmp_path)
    assert words[10:14] == ["--dataset", "benv2", "--data_path", "data, all"]
    assert words[-6:] == ["--output_dir", f"out, put/{RUN}", "--resume", "auto", "--walltime", "1435"]
    (log,) = (tmp_path / "out, put" / "logs").iterdir()
    assert log.read_text() == "a line of the run\n" and log.name.startswith(f"{RUN}_2")


def test_stopped_at_the_walltime_the_next_job_gets_the_same_settings(job, tmp_path):
    status, lines = end(job(STOPPED, RESUBMIT="3", WALLTIME="1:35:00", EXTRA="--clip_grad 1 --log_dir 'a b'"))
    assert status == 0 and only_line(lines, "resubmitted as 12.pbs", "2 more")
    words, env = json.loads((tmp_path / QSUB).read_text())
    resources = "-l select=1:ncpus=192:mpiprocs=8 -l walltime=1:35:00"
    assert words[:10] == f"-N sarwmix-pretrain -P group -q rt_HF {resources}".split()
    assert words[10] == "-v" and words[12:] == ["scripts/qsub_run.sh"]
    handed_on = {name: env[name] for name in words[11].split(",")}
    assert handed_on == {
        "TASK_TYPE": "pretrain",
        "DATASET": "benv2",
        "DATA_PATH": "data, all",
        "MODEL": "base",
        "EPOCH": "64",
        "WEIGHT_MODE": "per_channel",
        "WEIGHT_LEVEL": "token",
        "MODELS_PATH": "out, put",
        "SEED": "0",
        "EXTRA": "--clip_grad 1 --log_dir 'a b'",
        "RESUBMIT": "2",
        "NODES": "1",
        "WALLTIME": "1:35:00",
        "SITE_GROUP": "group",
        "SITE_QUEUE": "rt_HF",
        "SITE_NCPUS": "192",
        "SITE_GPU": "H200",
    }
    assert env["PWD"] == str(tmp_path)
    assert sorted(os.listdir(tmp_path / "out, put" / RUN)) == ["checkpoint.pth", "run.json"]
    first, _ = json.loads((tmp_path / MPIRUN).read_text())
    assert end(job(STOPPED, **handed_on))[0] == 0 and json.loads((tmp_path / MPIRUN).read_text())[0] == first
    assert first[-6:] == ["--walltime", "90", "--clip_grad", "1", "--log_dir", "a b"]


@pytest.mark.parametrize(
    "work, resubmit, status, reason",
    [
        ("save('finished')", "5", 0, "the run is finished"),
        (STOPPED, None, 0, "RESUBMIT is 0"),
        (STOPPED, "0", 0, "RESUBMIT is 0"),
        ("", "5", 0, "nothing new was saved"),
        ("(output / 'checkpoint.pth').unlink()", "5", 0, "nothing new was saved"),
        ("save('failed: …'); sys.exit(1)", "5", 1, "ended with status 1"),
        ("save('running'); sys.exit(2)", "5", 2, "ended with status 2"),
        ("save('stopped: SIGUSR1'); sys.exit(138)", "5", 138, "ended with status 138"),  # not sent by this script
    ],
    ids=["finished", "no RESUBMIT", "RESUBMIT=0", "no progress", "no checkpoint", "failed", "usage", "SIGUSR1"],
)
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
    running = job(work, RESUBMIT="1")  # as mpirun ends when a run is still starting up
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
    allowed = ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe")
    running = job(mpirun=None, RESUBMIT="1", **{f"OMPI_{name}": "1" for name in allowed})
    wait_for(*(tmp_path / f"running.{rank}" for rank in range(8)))
    found = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout
    processes = [int(pid) for pid in found.split()]
    for pid in (*processes, running.pid):
        os.kill(pid, signal.SIGTERM)
    status, lines = end(running)
    assert len(processes) == 1 and status == 143 and "resubmitted as 12.pbs" in lines[-1]


@pytest.mark.parametrize("code, status", [(0, 1), (143, 143)])
def test_a_qsub_that_fails_is_one_line(job, code, status):
    refusal = "sys.exit('qsub: no such queue\\nask your administrator')"
    ended, lines = end(job(f"{STOPPED}; sys.exit({code})", refusal, RESUBMIT="1"))
    assert ended == status and only_line(lines, "error", "qsub: no such queue ask your administrator")


@pytest.mark.parametrize("name, value", [("WALLTIME", "0:05:00"), ("PBS_NODEFILE", "absent"), ("DATA_PATH", "absent")])
def test_a_setting_that_cannot_be_meant_is_refused_before_anything(job, tmp_path, name, value):
    status, lines = end(job(**{name: value}))
    assert status == 2 and only_line(lines, f"error: {name}={value}") and not (tmp_path / MPIRUN).exists()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda at: (at / ".venv" / "bin" / "python").unlink(), ("bash scripts/setup.sh",)),
        (lambda at: executable(at / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n"), ("shows no GPU", "SITE_MODULES")),
    ],
    ids=["no set-up", "no GPU"],
)
def test_what_is_missing_on_the_node_is_named(job, tmp_path, spoil, words):
    spoil(tmp_path)
    status, lines = end(job())
    assert status == 2 and only_line(lines, "error", *words) and not (tmp_path / MPIRUN).exists()


def test_modules_of_the_site_are_loaded_before_mpirun_is_looked_for(job, tmp_path):
    (tmp_path / "scripts" / "site.sh").write_text(': "${SITE_MODULES:=mpi/4 cuda}"\nmodule() { echo "$*" > loaded; }\n')
    assert end(job())[0] == 0
    assert (tmp_path / "loaded").read_text() == "load mpi/4 cuda\n"
