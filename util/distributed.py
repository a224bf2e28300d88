# SPDX-License-Identifier: MIT
"""Distributed training: detects the launcher, joins the process group, and wraps the model in DDP."""

import datetime
import hashlib
import inspect
import os
import socket

import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel

from common import launchers
from common.errors import UsageError, listed
from common.launchers import Launch  # noqa: F401 (callers need it for Ranks)
from common.ranks import RankGroup
from util.misc import keep_freed_memory


def detect_launch(env=os.environ):
    """The Launch of this process (see `common.launchers`). Raises UsageError if its variables cannot be used."""
    try:
        launch = launchers.detect_launch(env)
    except launchers.LaunchError as error:
        raise UsageError(str(error)) from None
    if not launch.world_size:
        raise UsageError(
            f"{launch.launcher} gives the rank, {launch.rank}, but not the number of ranks: start all ranks with "
            "mpirun, torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return launch


def job_port(env=os.environ):
    """A port between 20000 and 59999, derived from the id of the batch job; None outside of one."""
    job = env.get("PBS_JOBID") or env.get("SLURM_JOB_ID")
    return 20000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 40000 if job else None


def _free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def rendezvous(launch, port=None, env=os.environ):
    """The address and port of rank 0, at which the ranks connect.

    Sources of the address, in this order: MASTER_ADDR, the first line of $PBS_NODEFILE, under MPI a broadcast of rank 0
    with mpi4py, this node if it holds all ranks, the first of Slurm's list of nodes. Sources of the port: --port,
    MASTER_PORT, the job id, the broadcast of a free port, 29500. Raises UsageError if no source gives an address.
    """
    address = env.get("MASTER_ADDR")
    if not address and env.get("PBS_NODEFILE"):
        try:
            with open(env["PBS_NODEFILE"]) as nodes:
                address = nodes.readline().strip()
        except OSError as error:
            raise UsageError(f"PBS_NODEFILE {env['PBS_NODEFILE']}: {error.strerror}; set MASTER_ADDR instead") from None
    if not env.get("MASTER_PORT", "0").isdigit():
        raise UsageError(f"MASTER_PORT={env['MASTER_PORT']} is not a port number; correct or unset it")
    port = port or int(env.get("MASTER_PORT", "0")) or job_port(env)
    one_node = launch.local_size == launch.world_size
    lacks = ""
    if launch.launcher in launchers.MPI and not (address and port):
        try:
            from mpi4py import MPI

            if MPI.COMM_WORLD.Get_size() == launch.world_size:
                here = "127.0.0.1" if one_node else socket.gethostname()
                address, port = MPI.COMM_WORLD.bcast((address or here, port or _free_port()))
            else:
                lacks = f", as mpi4py is built for another MPI than that of {launch.launcher}"
        except ImportError as error:
            lacks = f", as mpi4py cannot be loaded ({error})"
    if not address and one_node:
        address = "127.0.0.1"
    if not address and launch.launcher == "Slurm":
        address = launchers.first_host(
            env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
        )
    if not address:
        raise UsageError(
            f"{launch.launcher} gives the number of ranks, {launch.world_size}, but not their hosts{lacks}: set "
            "MASTER_ADDR to the host of rank 0"
        )
    return address, port or 29500


class Ranks(RankGroup):
    """The ranks of a training, connected by torch.distributed. With one process, every call is the identity."""

    def __init__(self, launch, device, side=None):
        self.launch, self.device = launch, device
        self.rank, self.world_size = launch.rank, launch.world_size
        self._side, self._agreement = side, None  # a gloo group, whose collectives do not synchronise with a GPU

    def mean(self, tensor):
        """Averages a tensor on the device over ranks, in place. Returns it."""
        if self.world_size > 1:
            td.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def gather(self, value):
        """The picklable values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        td.all_gather_object(values, value, group=self._side)
        return values

    def require_alike(self, values):
        """Raises UsageError on every rank, with the names and values, if the ranks were given different values.

        values: {name: plain value}, the same names on every rank.
        """
        given = self.gather({name: repr(value) for name, value in values.items()})
        differing = []
        for name in dict.fromkeys(name for of_rank in given for name in of_rank):
            found = [of_rank.get(name, "missing") for of_rank in given]
            other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
            if other is not None:
                differing.append(f"{name} is {found[0][:80]} on rank 0, {found[other][:80]} on rank {other}")
        if differing:
            raise UsageError(
                f"the ranks belong to different runs: {listed(differing)}; start all ranks with one command and the "
                "same code, or give each run its own --port"
            )

    def agree(self, wish):
        """The maximum of the integers that the ranks passed to the previous call; 0 at the first. Equal on all ranks.

        The integers of this call are exchanged in the background, so that no rank waits. With one process, returns
        `wish`.
        """
        if self.world_size == 1:
            return wish
        answer = self.forget_agreement()
        wishes = torch.tensor(wish)
        self._agreement = wishes, td.all_reduce(wishes, td.ReduceOp.MAX, group=self._side, async_op=True)
        return answer

    def forget_agreement(self):
        """Resets `agree`, so that its next call returns 0. Returns what that call would have returned."""
        if self._agreement is None:
            return 0
        wishes, exchange = self._agreement
        exchange.wait()
        self._agreement = None
        return int(wishes)

    def close(self):
        if self.world_size > 1 and td.is_initialized():
            self.forget_agreement()
            td.destroy_process_group()


def pick_device(name, local_rank):
    """The torch.device of --device; "auto" is CUDA if there is a GPU, else the CPU. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                "--device cuda: this PyTorch sees no GPU; use --device cpu, or install PyTorch for your CUDA"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"--device cuda:{index}: this node has {torch.cuda.device_count()} GPUs; start at most one rank for "
                "each GPU"
            )
        return torch.device("cuda", index)
    return device


def start_ranks(args):
    """Joins the process group that the launcher started, with NCCL on GPUs and gloo on CPUs. Returns Ranks.

    args: device, local_rank, dist_url, port, dist_timeout (minutes). Raises UsageError if joining fails.
    """
    launch = detect_launch()
    local_rank = launch.local_rank if args.local_rank is None else args.local_rank
    device = pick_device(args.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it computes no gradient of a learned bias
    else:
        keep_freed_memory()
        if launch.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    side = None
    if launch.world_size > 1:
        timeout = datetime.timedelta(minutes=args.dist_timeout)
        if launch.launcher != "torchrun" and args.dist_url == "env://":
            address, port = rendezvous(launch, args.port)
            os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        try:
            td.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=args.dist_url,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            side = td.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            where = args.dist_url
            if where == "env://":
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UsageError(
                f"rank {launch.rank} of {launch.world_size} ({launch.launcher}) could not join the others at "
                f"{where}: {str(error).splitlines()[0]}; see --port, --dist_url and MASTER_ADDR"
            ) from None
    return Ranks(launch, device, side)


def distribute(model, ranks, warm_up_loss):
    """Wraps the model in DDP, which averages gradients over ranks. Returns the model itself for one rank.

    warm_up_loss(model) → the loss of any input. After its first backward pass, DDP reassigns gradients to buckets,
    which changes the order of summation over three or more ranks. This function runs that pass, so that a continued run
    has the same buckets, and the same bits, as an uninterrupted one.
    """
    if ranks.world_size == 1:
        return model
    # The buffers are constant, so DDP need not broadcast them at every step. PyTorch 2.15 renames the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    model = DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
    warm_up_loss(model).backward()
    model.zero_grad(set_to_none=True)
    return model
