# SPDX-License-Identifier: MIT
"""What the scripts are told to start: GPUs, ranks and hosts, the submission to PBS and Slurm, and what is refused."""

import shlex
from functools import partial

import pytest

from common.errors import UsageError
from common.launchers import LOST_HOST_FLAGS, mpirun, torchrun
from tests.helpers import ROOT
from util import runner
from util.batch_systems import SYSTEMS
from util.recipe import Gpus

H200 = Gpus(8, "NVIDIA H200", 143771)
AS_ROOT = mpirun(2, 2)[5:]
PBS, SLURM = SYSTEMS["qsub_run.sh"], SYSTEMS["sbatch_run.sh"]
pbs_job, slurm_job = partial(runner.job, PBS), partial(runner.job, SLURM)


@pytest.mark.parametrize(
    "listed, visible, expected",
    [
        ("NVIDIA H200, 143771\n" * 8, None, H200),
        ("A, 40960\nB, 24564 MiB\n", None, Gpus(2, "B", 24564)),
        ("A, [N/A]\nB, 24564\n\n", None, Gpus(1, "B", 24564)),
        ("NVIDIA H200, 143771\n" * 8, "2,5", H200._replace(count=2)),
        ("NVIDIA H200, 143771\n" * 8, "", H200._replace(count=0)),
        ("NVIDIA H200, 143771\n" * 8, "-1", H200._replace(count=0)),
        ("", None, Gpus()),
    ],
)
def test_the_gpus_that_cuda_shows(listed, visible, expected):
    assert runner.count_gpus(listed, visible) == expected


@pytest.fixture
def answer(monkeypatch):
    """answer(function, flags, gpus, **variables): the lines that a dry run prints."""
    monkeypatch.chdir(ROOT)

    def start(function, flags, gpus=H200, **variables):
        monkeypatch.setattr(runner, "find_gpus", lambda env: gpus)
        monkeypatch.setattr(runner.shutil, "which", lambda name: f"/bin/{name}")
        text = function(".", ["--dry_run", "--data_path", "/d", *shlex.split(flags)], variables)
        printed, ended = text.rsplit("; ", 1)
        assert printed.startswith("printf '%s\\n' ") and ended == "exit"
        return shlex.split(printed)[2:]

    return start


@pytest.mark.parametrize(
    "gpus, flags, launch",
    [
        (H200, "", ["mpirun", "-np", "8", "--bind-to", "none", *AS_ROOT]),
        (Gpus(2, "", 24564), "--ranks 4", ["mpirun", "-np", "4", "--bind-to", "none", *AS_ROOT, "--oversubscribe"]),
        (H200, "--ranks 1", []),
        (Gpus(), "", []),
    ],
)
def test_a_run_on_this_machine_has_a_rank_per_gpu(answer, gpus, flags, launch):
    *said, command = answer(runner.run_local, f"{flags} -- --clip_grad 1 --log_dir 'a b'", gpus)
    words = shlex.split(command)
    assert words[: len(launch) + 2] == [*launch, ".venv/bin/python", "main_pretrain.py"]
    assert words[-4:] == ["--clip_grad", "1", "--log_dir", "a b"]
    assert len(said) == 3 and all(line.startswith("# ") for line in said) and "global batch 2048 =" in said[1]
    assert said[0].endswith(gpus.name or "the CPU") and "output/logs/pretrain_benv2_base_" in said[2]


def test_without_mpi_the_ranks_of_this_machine_are_started_by_torchrun():
    assert runner.run_local(".", ["--ranks", "1"], {}).splitlines()[1:3] == ["launch=()", "without_mpi=()"]
    assert f"without_mpi=({shlex.join(torchrun(2))})" in runner.run_local(".", ["--ranks", "2"], {})


def test_no_batch_is_told_of_a_test(answer):
    assert len(answer(runner.run_local, "--task_type test")) == 3


@pytest.mark.parametrize(
    "gpus, nodes, placed, batch",
    [
        (H200, ["g1"] * 8, "-np 8 --host g1:8 --map-by ppr:8:node", "256 images × 1 accumulation × 8 ranks"),
        (H200, ["g1", "", "g2"], "-np 16 --host g1:8,g2:8 --map-by ppr:8:node", "128 images × 1 accumulation × 16"),
        (Gpus(4, "", 16160), ["v1"], "-np 4 --host v1:4 --map-by ppr:4:node", "128 images × 4 accumulations × 4 ranks"),
    ],
)
def test_a_job_places_a_rank_on_each_gpu_of_its_nodes(answer, tmp_path, gpus, nodes, placed, batch):
    (tmp_path / "nodes").write_text("".join(f"{node}\n" for node in nodes))
    variables = {"PBS_JOBID": "7.pbs", "PBS_NODEFILE": str(tmp_path / "nodes"), "LD_LIBRARY_PATH": "/opt", "PWD": "/co"}
    *said, command = answer(pbs_job, "", gpus, **variables)
    several = ""
    if "g2" in nodes:
        several = shlex.join(LOST_HOST_FLAGS) + " -x MASTER_ADDR -x PBS_JOBID -x PATH -x LD_LIBRARY_PATH "
    assert command.startswith(f"mpirun {placed} --bind-to none {several}/co/.venv/bin/python main_pretrain.py ")
    assert command.endswith(" --walltime 1435") and batch in said[1]


def test_before_the_job_the_submission_is_shown_and_what_it_will_run(answer):
    flags = "--site_group gab1 --nodes 2 --task_type=finetune --data_path '/data/b 2' -- --clip_grad 1"
    submission, remark, *_, command = answer(pbs_job, flags, EXTRA="--clip_grad 1")
    words = shlex.split(submission)
    place = words.index("qsub")
    handed_on = dict(pair.split("=", 1) for pair in words[1:place])
    assert words[0] == "env" and remark == "# and in the job:"
    assert shlex.join(words[place:-2]) == (
        "qsub -N sarwmix-finetune -P gab1 -q rt_HF -l select=2:ncpus=192:mpiprocs=8 -l walltime=24:00:00 -v"
    )
    assert words[-2:] == [",".join(handed_on), "scripts/qsub_run.sh"]
    assert (handed_on["DATA_PATH"], handed_on["EXTRA"], handed_on["SITE_GPU"]) == ("/data/b 2", "--clip_grad 1", "H200")
    assert command.startswith("mpirun -np 16 --host NODE1:8,NODE2:8 ") and command.endswith(" --clip_grad 1")
    assert " -P " not in answer(pbs_job, "--site_group none")[0]


def test_a_job_of_slurm_before_and_in_it(answer):
    submission, remark, *said, command = answer(slurm_job, "--nodes 2 --site_partition gpu --site_gpu V100")
    words = shlex.split(submission)
    assert words[0] == "env" and "SITE_PARTITION=gpu" in words and remark == "# and in the job:"
    assert "sbatch --job-name sarwmix-pretrain --partition gpu --nodes 2 --ntasks-per-node 4 " in submission
    assert command.startswith("srun --export=ALL --nodes 2 --ntasks 8 --ntasks-per-node 4 --cpus-per-task 8 ")
    assert said[0] == "# 2 nodes, 8 ranks on V100"
    *said, command = answer(slurm_job, "", Gpus(2, "", 24564), SLURM_JOB_ID="7", SLURM_NNODES="4")
    assert len(said) == 3 and "srun --export=ALL --nodes 4 --ntasks 8 --ntasks-per-node 2 " in command


@pytest.mark.parametrize(
    "name, value",
    [
        ("RESUBMIT", "many"),
        ("RESUBMIT", "-1"),
        ("RESUBMIT", "08"),
        ("WALLTIME", "1435"),
        ("WALLTIME", "0:05:00"),
        ("NODES", "0"),
        ("SITE_GPU", "T4"),
        ("PBS_NODEFILE", "absent"),
    ],
)
def test_a_setting_of_a_job_that_cannot_be_meant_is_refused(answer, name, value):
    with pytest.raises(UsageError, match=f"^{name}={value}: "):
        answer(pbs_job, "", **{"SITE_GROUP": "g", "PBS_JOBID": "7.pbs", name: value})


@pytest.mark.parametrize("variables", [{}, {"PBS_JOBID": "7.pbs", "RESUBMIT": "1"}])
def test_a_group_is_asked_for_before_a_job_is_submitted(answer, variables):
    with pytest.raises(UsageError, match="SITE_GROUP is missing"):
        answer(pbs_job, "", **variables)


def test_a_file_of_the_site_must_be_there(answer):
    with pytest.raises(UsageError, match="SITE=absent: there is no such file"):
        answer(partial(runner.site, PBS), "", SITE="absent")


@pytest.mark.parametrize(
    "script, settings",
    [("run_local.sh", runner.LOCAL), *((system.script, system.settings) for system in SYSTEMS.values())],
)
def test_help_names_every_setting(script, settings, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = runner.help_of(script, settings)
    assert lines[0].startswith("Pretrains, finetunes or tests")
    assert {line.split()[0] for line in lines if line[:2] == "  "} >= {*settings}
