# SPDX-License-Identifier: MIT
"""Launchers' variables, the rendezvous, and what ranks agree on."""
import os
import socket
import subprocess
import sys

import pytest
import torch

from util.distributed import Launch, Ranks, detect_launch, job_port, pick_device, rendezvous
from util.errors import UsageError

OMPI = dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2")
TORCHRUN = dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
SLURM = dict(SLURM_PROCID="5", SLURM_NTASKS="6", SLURM_LOCALID="1", SLURM_NTASKS_PER_NODE="2(x3)")


@pytest.mark.parametrize("env, expected", [
    ({}, Launch("single process", 0, 1, 0, 1)),
    (OMPI, Launch("Open MPI", 3, 8, 1, 2)),
    (TORCHRUN, Launch("torchrun", 2, 4, 0, 2)),
    (SLURM, Launch("Slurm", 5, 6, 1, 2)),
    ({**SLURM, **TORCHRUN}, Launch("torchrun", 2, 4, 0, 2)),
    ({**SLURM, **TORCHRUN, **OMPI}, Launch("Open MPI", 3, 8, 1, 2)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch("Slurm", 0, 1, 0, 1)),
])
def test_launchers_in_their_order(env, expected):
    assert detect_launch(env) == expected


@pytest.mark.parametrize("env", [{**TORCHRUN, "RANK": "4"}, {**OMPI, "OMPI_COMM_WORLD_RANK": "x"}])
def test_contradictory_variables_are_refused(env):
    with pytest.raises(UsageError):
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
    with pytest.raises(UsageError, match="PBS_NODEFILE"):
        rendezvous(launch, None, {"PBS_NODEFILE": str(tmp_path / "absent")})


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
from util.errors import UsageError
ranks = start_ranks(SimpleNamespace(device="cpu", local_rank=None, dist_url="env://", port=None, dist_timeout=1))
assert ranks.gather(ranks.rank) == [0, 1]
assert ranks.mean(torch.tensor([float(ranks.rank)])).item() == 0.5
assert ranks.on_main(lambda: "from 0" if ranks.is_main else 1 / 0) == "from 0"
def fails():
    if ranks.rank == 1:
        raise UsageError("only here")
for work in (fails, fails):
    try:
        ranks.together(work)
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
    ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS], text=True, stdout=subprocess.PIPE,
                              env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                                   **dict(zip(names.split(), (str(rank), "2", str(rank))))}) for rank in range(2)]
    assert [process.communicate(timeout=120)[0].split()[-1] for process in ranks] == ["0", "1"]
    assert [process.returncode for process in ranks] == [0, 0]
