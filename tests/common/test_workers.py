# SPDX-License-Identifier: MIT
"""Work spread over processes and MPI ranks, and errors in one line from whichever of them they happen on."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from common.errors import DataError
from common.workers import Workers
from tests.helpers import ROOT
from tests.helpers.runs import mpirun

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from common.command_line import Parser
from common.workers import add_workers_flag, run_command
from common.errors import DataError

def square(number):
    if number == {bad}:
        raise DataError(f"item {{number}}: cannot be squared; take it out")
    return number ** 2

def work(args, workers):
    values = workers.map(square, range(7), "numbers")
    print(f"rank {{workers.rank}} of {{workers.world_size}}: {{values}} {{workers.on_main(lambda: workers.rank)}}", flush=True)

if __name__ == "__main__":
    parser = Parser("Squares.", "squares")
    add_workers_flag(parser)
    run_command(parser, work)
"""


def start(tmp_path, *flags, bad=-1, ranks=False):
    script = tmp_path / "squares.py"
    script.write_text(PROGRAM.format(bad=bad))
    command = [sys.executable, str(script), *flags]
    return subprocess.run(
        mpirun(*command) if ranks else command,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# ---- Workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 2, 50))
def test_results_come_in_order_from_any_number_of_processes(workers):
    assert Workers(workers).map(abs, range(-9, 1), "numbers") == list(range(9, -1, -1))


def test_no_work_is_no_result():
    assert Workers(2).map(abs, [], "numbers") == []


def test_what_fails_in_a_process_is_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        Workers(2).map(int, ["1", "x", "2"], "words")


@pytest.mark.parametrize("workers", (1, 2))
def test_ranks_share_the_work_and_all_have_the_results(tmp_path, workers):
    result = start(tmp_path, "--workers", str(workers), ranks=True)
    assert result.returncode == 0, result.stderr
    squares = "[0, 1, 4, 9, 16, 25, 36]"
    for rank in (0, 1):  # mpirun may put both on one line
        assert f"rank {rank} of 2: {squares} 0" in result.stdout


@pytest.mark.parametrize("bad", (0, 1))  # the work of rank 0, of rank 1
def test_an_error_on_one_rank_ends_all_and_is_reported_once(tmp_path, bad):
    result = start(tmp_path, "--workers", "1", bad=bad, ranks=True)
    assert result.returncode == 2 and "rank" not in result.stdout
    assert result.stderr.count(f"squares: error: item {bad}: cannot be squared; take it out") == 1


def test_an_error_in_a_process_is_one_line(tmp_path):
    result = start(tmp_path, "--workers", "2", bad=3)
    assert result.returncode == 2
    assert result.stderr == "python -m squares: error: item 3: cannot be squared; take it out\n"


@pytest.mark.parametrize("ranks", (False, True))
def test_a_wrong_flag_is_one_line(tmp_path, ranks):
    result = start(tmp_path, "--workers", "0", ranks=ranks)
    assert result.returncode == 2 and result.stderr.count("squares: error: --workers 0: must be at least 1") == 1


@pytest.mark.parametrize(
    "env, connected, size",
    [
        ({}, 1, 1),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 2, 2),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2"},
            1,
            "MPICH started 2 processes, and MPI connects 1 of them; use the mpirun",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            1,
            "Slurm started 2 processes, and MPI connects 1",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None, "mpi4py, .* cannot be loaded"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": "/"}, None, 1),  # a batch script without srun
        ({"PMIX_RANK": "1"}, 2, 2),
        ({"PMIX_RANK": "1"}, 1, "PMIx started several processes, and MPI connects 1"),
        ({"PMIX_RANK": "0"}, 1, 1),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, 2, "must be integers"),
    ],
)
def test_ranks_of_every_launcher_are_found_or_refused(monkeypatch, env, connected, size):
    """connected: how many processes MPI sees; None: it is not installed."""
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    world = SimpleNamespace(Get_size=lambda: connected, Get_rank=lambda: 0)
    monkeypatch.setitem(sys.modules, "mpi4py", connected and SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world)))
    if isinstance(size, int):
        assert Workers.start(3).world_size == size
    else:
        with pytest.raises(DataError, match=size):
            Workers.start(3)
