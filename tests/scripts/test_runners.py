# SPDX-License-Identifier: MIT
"""The runner scripts: the commands for the machines they are made for (--dry_run), what they refuse, logs and signals."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common.launchers import torchrun
from main_pretrain import parse_flags
from tests.helpers import ROOT

pytestmark = pytest.mark.slow

GPUS = {"8 × H200": ["NVIDIA H200, 143771"] * 8, "2 × RTX 4090": ["NVIDIA GeForce RTX 4090, 24564"] * 2, "CPU": []}


@pytest.fixture
def dry_run(tmp_path):
    """dry_run(script, GPUs, *flags, nodes=(names), **variables) → the finished process, on a machine with nothing else."""

    def start(script, gpus, *flags, nodes=None, **variables):
        bin_folder = tmp_path / "bin"
        shutil.rmtree(bin_folder, ignore_errors=True)
        bin_folder.mkdir()
        for name in ("bash", "dirname", "date", "nproc", "sed", "python3"):
            (bin_folder / name).symlink_to(shutil.which(name))
        if GPUS[gpus]:
            (bin_folder / "nvidia-smi").write_text("#!/bin/bash\nprintf '%s\\n' " + shlex.join(GPUS[gpus]) + "\n")
            (bin_folder / "nvidia-smi").chmod(0o755)
        (tmp_path / "no_settings.sh").touch()
        env = {"PATH": str(bin_folder), "HOME": str(tmp_path), "SITE": str(tmp_path / "no_settings.sh"), **variables}
        if nodes:
            (tmp_path / "nodes").write_text("".join(f"{node}\n" for node in nodes))
            env |= {"PBS_JOBID": "7.pbs", "PBS_NODEFILE": str(tmp_path / "nodes")}
        return subprocess.run(
            ["bash", ROOT / "scripts" / script, "--dry_run", *flags],
            cwd=tmp_path,
            env=env,
            text=True,
            capture_output=True,
            timeout=60,
        )

    return start


def words_of(result):
    """The words of the one command that a dry run printed."""
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (command,) = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return shlex.split(command)


def test_pretraining_on_one_machine(dry_run):
    words = words_of(dry_run("run_local.sh", "2 × RTX 4090", "--data_path", "data", "--", "--clip_grad", "1"))
    place = words.index("main_pretrain.py")
    assert words[:place] == [*torchrun(2), ".venv/bin/python"]  # there is no mpirun
    args = parse_flags(words[place + 1 :])
    assert (args.batch_size, args.accum_iter, args.clip_grad) == (256, 4, 1)
    assert args.data_path.startswith("../") and args.data_path.endswith("/data")  # from where it is started


def test_pretraining_in_a_job_of_two_nodes(dry_run):
    words = words_of(dry_run("qsub_run.sh", "8 × H200", "--data_path", "/data/benv2", nodes=["g1", "g2"]))
    place = words.index("main_pretrain.py")
    assert words[:5] == ["mpirun", "-np", "16", "--host", "g1:8,g2:8"]
    assert words[place - 1] == str(ROOT / ".venv" / "bin" / "python")
    args = parse_flags(words[place + 1 :])
    assert (args.batch_size, args.accum_iter, args.walltime) == (128, 1, 1435)


def test_settings_of_a_site_come_from_a_file_and_flags_win(dry_run, tmp_path):
    text = (ROOT / "scripts" / "site.example.sh").read_text()
    (tmp_path / "site.sh").write_text(
        text.replace("SITE_GROUP:=", "SITE_GROUP:=ours").replace("SITE_GPU:=H200", "SITE_GPU:=V100")
    )
    flags = ("--data_path", "/d", "--site", "site.sh", "--site_queue", "rt_V", "--", "--log_dir", "a 'b'")
    result = dry_run("qsub_run.sh", "CPU", *flags)
    submission, command = (shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#"))
    assert " -P ours -q rt_V -l select=1:ncpus=192:mpiprocs=4 " in shlex.join(submission)
    assert command[-2:] == ["--log_dir", "a 'b'"]


def test_without_data_the_whole_way_on_simulated_scenes_is_shown(dry_run):
    result = dry_run("run_local.sh", "CPU")
    assert result.returncode == 0, result.stderr
    programs = [" ".join(shlex.split(line)) for line in result.stdout.splitlines()]
    for part in (
        "sarwmix.simulate",
        "main_pretrain.py",
        "exponential_2_n_training",
        "--inference",
        "main_finetune.py",
        "compare_runs",
    ):
        assert any(part in line for line in programs), part


@pytest.mark.parametrize("script", ["run_local.sh", "qsub_run.sh", "sbatch_run.sh"])
def test_help_and_refusals_reach_the_user(dry_run, script):
    shown = dry_run(script, "CPU", "--help")
    assert (
        shown.returncode == 0
        and shown.stdout.startswith("Pretrains, finetunes or tests")
        and "DATA_PATH" in shown.stdout
    )
    refused = dry_run(script, "8 × H200", "--model", "base", SITE_GROUP="g")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith(f"{script}: error: DATA_PATH is missing") and refused.stderr.count("\n") == 1


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    env = {"PATH": os.environ["PATH"], "PYTHON": "python3.99"}
    result = subprocess.run(
        ["bash", tmp_path / "scripts" / "run_local.sh"], cwd=tmp_path, env=env, text=True, capture_output=True
    )
    assert result.returncode == 2 and result.stderr.startswith("run_local.sh: error: no python3.99 found; install")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean():
    result = subprocess.run(
        ["shellcheck", "-x", *sorted((ROOT / "scripts").glob("*.sh"))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


# A program instead of Python's: says what it was started with, and takes SIGTERM as a reason to save.
PROGRAM = f"""#!/bin/bash
if [ "$1" = -m ]; then exec {sys.executable} "$@"; fi
trap 'echo saved; exit 143' TERM
echo "started $*"
touch running
for _ in {{1..1000}}; do sleep 0.05; done
"""


def small_checkout(folder, program):
    """A checkout in which nothing is set up, with an empty folder of data. program: the text of .venv/bin/python."""
    for name in ("common", "scripts", "util"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "scripts" / "setup.sh").write_text("true\n")
    (folder / "data").mkdir()
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(program)
    python.chmod(0o755)


def test_two_ranks_without_mpirun_are_started_by_torchrun(tmp_path):
    small_checkout(
        tmp_path, f'#!/bin/bash\nif [ "$2" = util.runner ]; then exec {sys.executable} "$@"; fi\necho "$@"\n'
    )
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "mkdir", "tee"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        ["bash", tmp_path / "scripts" / "run_local.sh", "--data_path", "data", "--ranks", "2"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    shown, started = result.stdout.splitlines()[-2:]
    assert shown == f".venv/bin/python {started}"
    assert started.startswith(f"{' '.join(torchrun(2)[1:])} .venv/bin/python main_pretrain.py ")


def test_a_run_on_this_machine_is_logged_and_gets_the_signals(tmp_path):
    small_checkout(tmp_path, PROGRAM)
    run = subprocess.Popen(
        ["bash", tmp_path / "scripts" / "run_local.sh", "--data_path", "data", "--ranks", "1"],
        cwd=tmp_path,
        text=True,
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    (log,) = (tmp_path / "output" / "logs").glob("pretrain_benv2_base_per_channel_token_seed0_2*.log")
    assert run.returncode == 143 and said.endswith("saved\n")
    started, saved = log.read_text().splitlines()
    assert started.startswith("started main_pretrain.py --dataset benv2 --data_path data ") and saved == "saved"
