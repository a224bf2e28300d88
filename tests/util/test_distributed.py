# SPDX-License-Identifier: MIT
"""Launchers' variables, the rendezvous, and what ranks agree on."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.errors import UsageError
from util.distributed import Launch, Ranks, detect_launch, job_port, pick_device, rendezvous

pytestmark = pytest.mark.slow

OMPI = dict(
    OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2"
)
TORCHRUN = dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
SLURM = dict(SLURM_PROCID="5", SLURM_NTASKS="6", SLURM_LOCALID="1", SLURM_NTASKS_PER_NODE="2(x3)")
MPICH = dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")  # Intel MPI sets the same
STEP = dict(SLURM_JOB_ID="9", SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_LOCALID="1")
BATCH = dict(
    SLURM_JOB_ID="9",
    SLURM_SUBMIT_DIR="/home",
    SLURM_PROCID="0",
    SLURM_LOCALID="0",
    SLURM_TASKS_PER_NODE="4",
    SLURM_NNODES="1",
)


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, Launch("single process", 0, 1, 0, 1)),
        (OMPI, Launch("Open MPI", 3, 8, 1, 2)),
        (TORCHRUN, Launch("torchrun", 2, 4, 0, 2)),
        (SLURM, Launch("Slurm", 5, 6, 1, 2)),
        ({**SLURM, **TORCHRUN}, Launch("torchrun", 2, 4, 0, 2)),
        ({**SLURM, **TORCHRUN, **OMPI}, Launch("Open MPI", 3, 8, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch("Slurm", 0, 1, 0, 1)),
        (MPICH, Launch("MPICH", 3, 4, 1, 2)),
        (dict(PMI_RANK="1", PMI_SIZE="2"), Launch("MPICH", 1, 2, 0, 1)),
        (
            dict(MV2_COMM_WORLD_RANK="1", MV2_COMM_WORLD_SIZE="2", MV2_COMM_WORLD_LOCAL_RANK="1"),
            Launch("MVAPICH", 1, 2, 1, 2),
        ),
        ({**MPICH, **TORCHRUN}, Launch("torchrun", 2, 4, 0, 2)),
        # Slurm, where the number of tasks has another name, and the tasks of each node are written in each way
        ({**STEP, "SLURM_NPROCS": "2", "SLURM_NTASKS_PER_NODE": "2"}, Launch("Slurm", 1, 2, 1, 2)),
        (
            {
                **STEP,
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_TASKS_PER_NODE": "8",
            },
            Launch("Slurm", 1, 2, 1, 2),
        ),
        ({**STEP, "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}, Launch("Slurm", 1, 2, 1, 2)),
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, Launch("Slurm", 1, 8, 1, 4)),
        (
            {**STEP, "SLURM_NTASKS": "9", "SLURM_TASKS_PER_NODE": "3(x2),2,1", "SLURM_NODEID": "2"},
            Launch("Slurm", 1, 9, 1, 2),
        ),
        # srun --mpi=pmi2; MPICH's mpiexec in a batch script, on this node, and on others through srun
        (
            {**STEP, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "PMI_RANK": "1", "PMI_SIZE": "2"},
            Launch("Slurm", 1, 2, 1, 2),
        ),
        ({**BATCH, "SLURM_NTASKS": "4", **MPICH}, Launch("MPICH", 3, 4, 1, 2)),
        ({**STEP, "SLURM_NTASKS": "2", **MPICH}, Launch("MPICH", 3, 4, 1, 2)),
        ({**BATCH, "SLURM_NTASKS": "4", **OMPI}, Launch("Open MPI", 3, 8, 1, 2)),
        ({**BATCH, "SLURM_NTASKS": "1"}, Launch()),
        (BATCH, Launch()),  # a whole node, and no number of tasks
        (dict(PMIX_RANK="0", OMPI_MCA_ess="singleton"), Launch()),  # started by a process that uses MPI by itself
        (dict(RANK="0"), Launch()),
    ],
)
def test_launchers_in_their_order(env, expected):
    assert detect_launch(env) == expected


@pytest.mark.parametrize(
    "env, said",
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4 contradict"),
        ({**OMPI, "OMPI_COMM_WORLD_RANK": "x"}, "must be integers: 'x'"),
        ({**STEP, "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE='two' cannot be read"),
        (
            {**BATCH, "SLURM_NTASKS": "4"},
            "SLURM_NTASKS=4 tasks, and this process was not started by srun: start it with srun",
        ),
        (
            {"SLURM_JOB_ID": "9", "SLURM_NPROCS": "4"},
            "SLURM_NPROCS=4 tasks, .* start it with srun",
        ),  # in the shell of salloc
        (
            {
                **STEP,
                "SLURM_PROCID": "0",
                "SLURM_STEP_ID": "4294967290",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "4",
            },
            "start it with srun",
        ),
        (
            dict(PMIX_RANK="0", PMIX_NAMESPACE="x"),
            "PMIx gives the rank, 0, but not the number of ranks: start all ranks with",
        ),
        (dict(RANK="1"), "torchrun gives the rank, 1, but not the number of ranks"),
    ],
)
def test_variables_that_do_not_tell_are_refused(env, said):
    with pytest.raises(UsageError, match=said):
        detect_launch(env)


def test_rendezvous_in_the_order_of_precedence(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("node01\nnode02\n")
    launch = detect_launch(SLURM)
    everything = {"MASTER_ADDR": "a", "MASTER_PORT": "1234", "PBS_NODEFILE": str(nodes), "PBS_JOBID": "77.server"}
    assert rendezvous(launch, None, everything) == ("a", 1234)
    assert rendezvous(launch, 99, everything) == ("a", 99)
    pbs = {name: everything[name] for name in ("PBS_NODEFILE", "PBS_JOBID")}
    assert rendezvous(launch, None, pbs) == ("node01", job_port(pbs))
    assert 20000 <= job_port(pbs) < 60000 and job_port(pbs) != job_port({"PBS_JOBID": "78.server"})
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        rendezvous(launch, None, {})
    assert rendezvous(launch, 5, {"SLURM_JOB_NODELIST": "gpu[03-07,12],cpu1"}) == ("gpu03", 5)
    assert rendezvous(launch, 5, {"SLURM_STEP_NODELIST": "rack2-a,rack3-b", "SLURM_JOB_NODELIST": "rack1-c"}) == (
        "rack2-a",
        5,
    )
    with pytest.raises(UsageError, match="PBS_NODEFILE"):
        rendezvous(launch, None, {"PBS_NODEFILE": str(tmp_path / "absent")})


def test_where_mpi_does_not_connect_the_ranks_one_node_is_enough(monkeypatch):
    """As where mpi4py is built for another MPI than that of mpiexec: each rank is alone in its own."""
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_size=lambda: 1))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    assert rendezvous(Launch("MPICH", 1, 2, 1, 2), None, {}) == ("127.0.0.1", 29500)
    with pytest.raises(
        UsageError,
        match="number of ranks, 4, but not their hosts, as mpi4py is built for another MPI .*set MASTER_ADDR",
    ):
        rendezvous(Launch("MPICH", 3, 4, 1, 2), None, {})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert rendezvous(Launch("Open MPI", 1, 2, 1, 2), None, {}) == ("127.0.0.1", 29500)
    with pytest.raises(UsageError, match="as mpi4py cannot be loaded"):
        rendezvous(Launch("Open MPI", 3, 4, 1, 2), None, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_devices():
    assert pick_device("auto", 0) == torch.device("cpu")
    for name in ("cuda", "cuda:0", "tpu", "meta"):
        with pytest.raises(UsageError, match=f"--device {name.split(':')[0]}"):
            pick_device(name, 0)


def test_one_rank_needs_no_group():
    ranks = Ranks(Launch(), torch.device("cpu"))
    assert ranks.gather("x") == ["x"] and ranks.on_main(lambda: 3) == 3
    assert ranks.mean(torch.ones(2)).tolist() == [1, 1]


TWO_RANKS = """
import torch
from types import SimpleNamespace
from util.distributed import start_ranks
from common.errors import UsageError
ranks = start_ranks(SimpleNamespace(device="cpu", local_rank=None, dist_url="env://", port=None, dist_timeout=1))
assert ranks.gather(ranks.rank) == [0, 1]
assert ranks.mean(torch.tensor([float(ranks.rank)])).item() == 0.5
assert ranks.on_main(lambda: "from 0" if ranks.is_main else 1 / 0) == "from 0"
for _ in range(2):
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise UsageError("only here")
    except UsageError as error:
        assert str(error) == "only here" and error.reported_by == 1
    else:
        raise AssertionError("rank %d did not hear of it" % ranks.rank)
ranks.close()
print(ranks.launch.launcher, ranks.rank, flush=True)
"""


@pytest.mark.parametrize("names", ["RANK WORLD_SIZE LOCAL_RANK", "SLURM_PROCID SLURM_NTASKS SLURM_LOCALID"])
def test_two_ranks_meet_and_share_failures(names):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            text=True,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **dict(zip(names.split(), (str(rank), "2", str(rank)))),
            },
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0].split()[-1] for process in ranks] == ["0", "1"]
    assert [process.returncode for process in ranks] == [0, 0]
