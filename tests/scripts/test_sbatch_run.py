# SPDX-License-Identifier: MIT
"""A job of scripts/sbatch_run.sh without Slurm: its submission, what it starts, and when it is requeued."""

import json
import shlex
import signal

import pytest

from tests.helpers.jobs import BOUND, RUN, SLOW, STOPPED, begin_checkout, executable, start_job, wait_for

pytestmark = pytest.mark.slow

SRUN, SBATCH, SCONTROL = "srun.json", "sbatch.json", "scontrol.json"  # what the fake commands were started with


@pytest.fixture
def job(tmp_path):
    """job(work of srun, work of scontrol, **variables) → the job of a run, as Slurm starts it.

    A variable that is None is not set.
    """
    copy = begin_checkout(tmp_path, "sbatch_run.sh")

    def start(srun="", scontrol="", **variables):
        env = {"SLURM_JOB_ID": "11", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(tmp_path), **variables}
        works = {"srun": srun, "scontrol": scontrol, "sbatch": "print('Submitted batch job 12')"}
        return start_job(copy, tmp_path, works, {name: value for name, value in env.items() if value is not None})

    return start


def end(job):
    """Exit status and the lines it printed, without those that say what is started."""
    lines = job.communicate(timeout=BOUND)[0].splitlines()
    return job.returncode, [line for line in lines if not line.startswith(("# ", "srun "))]


def only_line(lines, *words):
    return len(lines) == 1 and all(word in lines[0] for word in ("sbatch_run.sh: ", *words))


def words_of(tmp_path, command):
    return json.loads((tmp_path / command).read_text())[0]


def test_the_run_is_started_with_the_recipe_and_the_walltime(job, tmp_path):
    ended = end(job("print('a line of the run')", SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="12"))
    assert ended[0] == 0 and only_line(ended[1], "not requeued, because RESUBMIT is 0")
    words, env = json.loads((tmp_path / SRUN).read_text())
    assert shlex.join(words[:9]) == ("--export=ALL --nodes 2 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 12")
    assert words[9:11] == [str(tmp_path / ".venv" / "bin" / "python"), "main_pretrain.py"]
    assert words[11:15] == ["--dataset", "benv2", "--data_path", "data, all"] and env["PWD"] == str(tmp_path)
    assert words[words.index("--batch_size") + 1] == "128"
    assert words[-6:] == ["--output_dir", f"out, put/{RUN}", "--resume", "auto", "--walltime", "1435"]
    (log,) = (tmp_path / "out, put" / "logs").iterdir()
    assert log.read_text() == "a line of the run\n" and log.name.startswith(f"{RUN}_2")


SITE = """
: "${SITE_PARTITION:=gpu long}" "${SITE_ACCOUNT:=ours}" "${SITE_GRES:=gpu:a100:4}" "${SITE_GPU:=A100}" "${SITE_GPUS:=4}"
: "${SITE_CONSTRAINT:=ib&nvme}" "${SITE_CPUS:=16}" "${SITE_SBATCH:=--mem 0 --comment 'a b'}"
"""


def test_outside_of_a_job_it_submits_itself_with_the_settings_of_the_site(job, tmp_path):
    (tmp_path / "scripts" / "site.sh").write_text(SITE)
    extra = "--clip_grad 1 --log_dir 'a b'"
    given = {"RESUBMIT": "3", "WALLTIME": "1:35:00", "NODES": "2", "EXTRA": extra, "SITE_CPUS": "20"}
    assert end(job(SLURM_JOB_ID=None, **given)) == (0, ["Submitted batch job 12"])
    words, env = json.loads((tmp_path / SBATCH).read_text())
    assert words == [
        *("--job-name", "sarwmix-pretrain", "--account", "ours", "--partition", "gpu long", "--constraint", "ib&nvme"),
        *("--nodes", "2", "--ntasks-per-node", "4", "--cpus-per-task", "20", "--gres", "gpu:a100:4"),
        *("--time", "1:35:00", "--requeue", "--signal", "B:USR1@300", "--open-mode", "append", "--export", "ALL"),
        *("--mem", "0", "--comment", "a b", "scripts/sbatch_run.sh"),
    ]
    assert {name: env[name] for name in given} == given and env["DATA_PATH"] == "data, all"
    assert env["PWD"] == str(tmp_path) and not (tmp_path / SRUN).exists()
    handed_on = {name: value for name, value in env.items() if name in given or name.startswith("SITE_")}
    assert end(job(**handed_on))[0] == 0  # the job, which has these variables
    assert words_of(tmp_path, SRUN)[-6:] == ["--walltime", "90", *shlex.split(extra)]


def test_without_settings_the_site_decides(job, tmp_path):
    assert end(job(SLURM_JOB_ID=None))[0] == 0
    words = words_of(tmp_path, SBATCH)
    assert words[2:10] == shlex.split("--nodes 1 --ntasks-per-node 8 --cpus-per-task 8 --gpus-per-node 8")
    assert not {"--account", "--partition", "--constraint", "--gres"} & set(words)


def test_stopped_at_the_walltime_it_is_requeued(job, tmp_path):
    status, lines = end(job(STOPPED, RESUBMIT="3", SLURM_RESTART_COUNT="1"))
    assert status == 0 and only_line(lines, "requeued, 1 more may follow")
    assert words_of(tmp_path, SCONTROL) == ["requeue", "11"] and not (tmp_path / SBATCH).exists()


def test_at_sigusr1_the_run_is_waited_for_and_requeued(job, tmp_path):
    running = job(SLOW, RESUBMIT="1")
    for sign in ("running", "signalled"):
        wait_for(tmp_path / sign)
        running.send_signal(signal.SIGUSR1)
    status, lines = end(running)
    assert status == 0 and only_line(lines, "requeued, 0 more") and words_of(tmp_path, SCONTROL) == ["requeue", "11"]


def test_at_sigterm_it_saves_and_is_not_requeued(job, tmp_path):
    running = job(SLOW, RESUBMIT="1")
    for sign in ("running", "signalled"):
        wait_for(tmp_path / sign)
        running.send_signal(signal.SIGTERM)
    status, lines = end(running)
    assert status == 143 and only_line(lines, "not requeued, because it was told to end")
    assert not (tmp_path / SCONTROL).exists()


@pytest.mark.parametrize(
    "work, variables, status, reason",
    [
        ("save('finished')", {"RESUBMIT": "5"}, 0, "the run is finished"),
        (STOPPED, {}, 0, "RESUBMIT is 0"),
        (STOPPED, {"RESUBMIT": "2", "SLURM_RESTART_COUNT": "2"}, 0, "RESUBMIT is 2, and it was requeued 2 times"),
        (STOPPED, {"RESUBMIT": "2", "SLURM_RESTART_COUNT": "7"}, 0, "RESUBMIT is 2, and it was requeued 7 times"),
        ("", {"RESUBMIT": "5"}, 0, "nothing new was saved"),
        ("save('failed: …'); sys.exit(1)", {"RESUBMIT": "5"}, 1, "ended with status 1"),
        ("save('running'); sys.exit(2)", {"RESUBMIT": "5"}, 2, "ended with status 2"),
        ("save('stopped: SIGTERM'); sys.exit(143)", {"RESUBMIT": "5"}, 143, "told to end"),  # Slurm told the ranks
    ],
    ids=["finished", "no RESUBMIT", "RESUBMIT used", "more by Slurm", "no progress", "failed", "usage", "SIGTERM"],
)
def test_it_is_not_requeued(job, tmp_path, work, variables, status, reason):
    ended, lines = end(job(work, **variables))
    assert ended == status and only_line(lines, "not requeued, because", reason)
    assert not (tmp_path / SCONTROL).exists()


def test_a_scontrol_that_fails_is_one_line_more(job):
    refusal = "sys.exit('Requeue is disabled\\nfor job 11')"
    status, lines = end(job(STOPPED, refusal, RESUBMIT="1"))
    assert status == 1 and only_line(lines[1:], "error", "scontrol failed: Requeue is disabled for job 11")


@pytest.mark.parametrize(
    "name, value",
    [("WALLTIME", "0:05:00"), ("SLURM_JOB_NUM_NODES", "two"), ("DATA_PATH", "absent"), ("SITE_SBATCH", "'--mem 0")],
)
def test_a_setting_that_cannot_be_meant_is_refused_before_anything(job, tmp_path, name, value):
    status, lines = end(job(**{name: value}))
    assert status == 2 and only_line(lines, f"error: {name}={value}") and not (tmp_path / SRUN).exists()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda at: (at / ".venv" / "bin" / "python").unlink(), ("bash scripts/setup.sh",)),
        (lambda at: executable(at / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n"), ("shows no GPU", "SITE_PARTITION")),
    ],
    ids=["no set-up", "no GPU"],
)
def test_what_is_missing_on_the_node_is_named(job, tmp_path, spoil, words):
    spoil(tmp_path)
    status, lines = end(job())
    assert status == 2 and only_line(lines, "error", *words) and not (tmp_path / SRUN).exists()


def test_modules_of_the_site_are_loaded(job, tmp_path):
    (tmp_path / "scripts" / "site.sh").write_text(': "${SITE_MODULES:=cuda gcc}"\nmodule() { echo "$*" > loaded; }\n')
    assert end(job())[0] == 0
    assert (tmp_path / "loaded").read_text() == "load cuda gcc\n"
