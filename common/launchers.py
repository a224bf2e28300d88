# SPDX-License-Identifier: MIT
"""The rank of this process and the number of ranks, from the environment variables of mpirun, torchrun, srun, …"""

import os
import re
from dataclasses import dataclass

# Launcher → names of its variables for rank, world size, rank on this node, ranks on this node; the first that is set
# counts. The order matters: mpirun and torchrun in a Slurm job set their own variables beside those of Slurm.
LAUNCHERS = {
    "Open MPI": (
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "torchrun": (("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "MVAPICH": (
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    "MPICH": (
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),  # and Intel MPI
    "Slurm": (("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",), ()),
    "PMIx": (("PMIX_RANK",), (), (), ()),
}
MPI = ("Open MPI", "MVAPICH", "MPICH")  # launchers whose ranks mpi4py can connect
# SLURM_STEP_ID outside of srun: of the batch script, and of the shell of an interactive allocation.
NOT_SRUN = ("batch", "interactive", "extern", "4294967290", "4294967291", "4294967292")


class LaunchError(ValueError):
    """The variables of a launcher cannot be used. One line: which, and the remedy."""


class OutsideSrun(LaunchError):
    """A single process in a Slurm job of several tasks that srun did not start."""


@dataclass(frozen=True)
class Launch:
    """This process among its ranks. world_size: 0 if the launcher does not state it."""

    launcher: str = "single process"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def _first(env, names):
    """(name, value) of the first variable that is set; (None, None) without one."""
    return next(((name, env[name]) for name in names if name in env), (None, None))


def _integers(launcher, **values):
    try:
        return [int(value) for value in values.values()]
    except ValueError:
        raise LaunchError(
            f"{launcher}'s variables {', '.join(values)} must be integers: {', '.join(map(repr, values.values()))}"
        ) from None


def detect_launch(env=os.environ):
    """The Launch by the first launcher whose variables are set; without any, a single process.

    Raises LaunchError for variables that contradict each other, and OutsideSrun.
    """
    unknown = None
    for launcher, names in LAUNCHERS.items():
        if launcher == "MPICH" and _srun_says_the_same(env):
            continue
        if launcher == "Slurm" and _outside_of_srun(env):
            _refuse_many_tasks(env)
            continue
        (rank_name, rank), (size_name, size) = _first(env, names[0]), _first(env, names[1])
        if rank is None:
            continue
        if size is None:
            # Open MPI sets PMIX_RANK=0 in the children of a process that uses MPI without mpirun.
            alone = rank == "0" and (launcher != "PMIx" or env.get("OMPI_MCA_ess") == "singleton")
            if not alone and re.fullmatch("[0-9]{1,9}", rank):
                unknown = Launch(launcher, int(rank), 0)
            continue
        local_name, local = _first(env, names[2])
        rank, size, local_rank = _integers(
            launcher, **{rank_name: rank, size_name: size, local_name or "local rank": local or 0}
        )
        if not 0 <= rank < size:
            raise LaunchError(
                f"{rank_name}={rank} and {size_name}={size} contradict each other; unset them, or start all ranks with "
                f"one launcher"
            )
        return Launch(launcher, rank, size, local_rank, _ranks_here(launcher, rank, size, local_rank, env))
    return unknown or Launch()


def _ranks_here(launcher, rank, world_size, local_rank, env):
    """The number of ranks on this node. If no variable states it: all, unless the rank and the local rank differ."""
    if launcher == "Slurm":
        return _tasks_here(world_size, env)
    name, value = _first(env, LAUNCHERS[launcher][3])
    if name:
        return _integers(launcher, **{name: value})[0]
    return world_size if launcher == "torchrun" or local_rank == rank else 1


def _tasks_here(world_size, env):
    """The number of Slurm tasks on this node. "4(x2),1" means four tasks on each of two nodes, and one on a third."""
    if _first(env, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"))[1] == "1":
        return world_size
    name, counts = _first(env, ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"))
    (node,) = _integers("Slurm", SLURM_NODEID=env.get("SLURM_NODEID", 0))
    for part in (counts or "1").split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part.strip())
        if not match:
            raise LaunchError(
                f"{name}={counts[:40]!r} cannot be read; it must give the tasks per node, such as 4(x2): unset it, "
                "and set MASTER_ADDR"
            )
        tasks, node = int(match[1]), node - int(match[2] or 1)
        if node < 0:
            break
    return min(tasks, world_size)


def _srun_says_the_same(env):
    """Whether srun --mpi=pmi2 set PMI_RANK. The variables of Slurm then state the same, and more."""
    return (
        "SLURM_STEP_ID" in env
        and not _outside_of_srun(env)
        and env.get("PMI_RANK") == env.get("SLURM_PROCID")
        and env.get("PMI_SIZE") == _first(env, LAUNCHERS["Slurm"][1])[1]
    )


def _outside_of_srun(env):
    """Whether this process is not a task of srun: a batch script, the shell of salloc, or no Slurm job.

    A batch script has SLURM_PROCID=0, like the first task of srun, but no SLURM_STEP_ID.
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is not None:
        return step in NOT_SRUN
    if "SLURM_PROCID" not in env:
        return True
    return env["SLURM_PROCID"] == "0" and any(
        name in env for name in ("SLURM_SUBMIT_DIR", "SLURM_TASK_PID", "SLURMD_NODENAME")
    )


def _refuse_many_tasks(env):
    """Raises OutsideSrun if the Slurm job has several tasks."""
    name, tasks = _first(env, ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"))
    if tasks and tasks != "1":
        shown = tasks if re.fullmatch("[0-9]{1,9}", tasks) else repr(tasks[:40])
        raise OutsideSrun(
            f"this Slurm job has {name}={shown} tasks, and this process was not started by srun: start it with srun, "
            f"or, to use a single process, with srun -n 1"
        )


def launched_rank(env=os.environ):
    """The rank of this process; 0 if the variables of the launcher cannot be used."""
    try:
        return detect_launch(env).rank
    except LaunchError:
        return 0


def first_host(nodes):
    """The first host of a node list of Slurm: "gpu[03-07,12],cpu1" → "gpu03"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first).strip()


# Flags of mpirun (Open MPI 4): a host that does not answer counts as lost after half a minute, not after eight.
LOST_HOST_FLAGS = (
    "--mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 4".split()
)


def torchrun(ranks):
    """The command prefix that starts several ranks on this machine without MPI."""
    run = [".venv/bin/python", "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc_per_node", str(ranks), "--no-python"]


def mpirun(ranks, slots):
    """The command prefix that starts several ranks on this machine; empty for one rank. slots: GPUs or cores."""
    if ranks == 1:
        return []
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", "-np", str(ranks), "--bind-to", "none", *as_root, *(["--oversubscribe"] if slots < ranks else [])]
