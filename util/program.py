# SPDX-License-Identifier: MIT
"""The flags that the main programs share, and contradictions between them."""

import os
import shutil
import sys

import torch

from common.command_line import Range, count, non_negative, positive, positive_int, seed
from util.checkpoint import check_torch
from util.configuration import need
from util.distributed import detect_launch
from util.misc import code_version
from util.stopping import add_stopping_flags

# Flags that may differ between the ranks of a run. The data may have another path on each host: their fingerprints are
# compared.
OF_A_RANK = ("local_rank", "device", "num_workers", "data_path")
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def add_schedule_flags(parser, *, batch_size, epochs, warmup_epochs, blr, min_lr):
    """Flags of the optimiser and the learning-rate schedule, with a recipe's defaults."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=positive_int, default=batch_size, help="samples per rank and micro-batch")
    group.add_argument(
        "--accum_iter",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches per optimiser step; global batch = batch_size × accum_iter × ranks",
    )
    group.add_argument(
        "--epochs", type=positive_int, default=epochs, help="epochs of training; the learning-rate schedule spans them"
    )
    group.add_argument(
        "--stop_epoch",
        type=positive_int,
        metavar="N",
        help="stop the run after this many epochs; the schedule still spans --epochs (default: --epochs)",
    )
    group.add_argument("--warmup_epochs", type=non_negative, default=warmup_epochs, help="epochs of linear warm-up")
    group.add_argument("--lr", type=positive, help="learning rate (default: blr × global batch / 256)")
    group.add_argument(
        "--blr", type=non_negative, default=blr, help="base learning rate, for a global batch of 256 images"
    )
    group.add_argument("--min_lr", type=non_negative, default=min_lr, help="learning rate at the end of the schedule")
    group.add_argument(
        "--weight_decay",
        type=non_negative,
        default=0.05,
        help="AdamW weight decay; none on biases and 1-D parameters",
    )
    group.add_argument(
        "--clip_grad", type=positive, metavar="NORM", help="clip the gradient to this norm (default: no clipping)"
    )
    group.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; fp16 scales the loss (default: bf16 on CUDA, fp16 on GPUs without bf16, off on a CPU)",
    )
    return group


def add_run_flags(parser, *, output_dir, finetune):
    """Flags of a run: where it writes, how it starts, continues and ends. finetune: default and help of --finetune."""
    group = parser.add_argument_group("run", "where it writes, and how it starts, continues and ends")
    group.add_argument(
        "--output_dir", default=output_dir, metavar="DIR", help="folder of the run: checkpoints, log.txt and run.json"
    )
    group.add_argument("--finetune", metavar="PATH", **finetune)
    group.add_argument(
        "--resume",
        default="",
        metavar="auto|PATH",
        help="continue a run exactly, from the checkpoint or run folder PATH; auto: from --output_dir, or start a new "
        "run if it holds no checkpoint",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run in --output_dir")
    add_stopping_flags(group)
    group.add_argument(
        "--start_epoch", type=count, default=0, metavar="N", help="first epoch, counted from 0; --resume sets it"
    )
    group.add_argument(
        "--seed", type=seed, default=0, help="seed of the initialisation, the sample order, flips and masks"
    )
    group.add_argument(
        "--log_dir", metavar="DIR", help="folder of the TensorBoard events (default: OUTPUT_DIR/tensorboard)"
    )
    group.add_argument(
        "--log_freq", type=positive_int, default=20, metavar="N", help="steps between two log lines on the console"
    )
    return group


def add_speed_flags(parser):
    """Flags that change the time and the memory a run takes, and at most the last bits of its results."""
    group = parser.add_argument_group("device, speed and memory")
    group.add_argument("--device", default="auto", help="device to compute on: auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--num_workers",
        type=count,
        metavar="N",
        help="loader processes per rank (default: the CPU cores of a rank, at most 10)",
    )
    group.add_argument(
        "--pin_mem",
        action="store_true",
        default=True,
        help="load batches into page-locked memory, from which copies to a GPU are faster (the default)",
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", help="load batches into memory that is not page-locked"
    )
    group.add_argument(
        "--compile",
        choices=("auto", *COMPILE_MODES),
        metavar="MODE",
        help=f"compile the blocks in this mode of torch.compile: {', '.join(COMPILE_MODES)}; auto: time eager and "
        "compiled steps before training and use the faster; a continued run keeps this choice (default: auto on CUDA, "
        "off on a CPU)",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="recompute the forward pass of each block in the backward pass: less memory, a quarter more time",
    )
    return group


def compiles(config):
    """Whether --compile names a mode of torch.compile; auto may still choose one."""
    return config.compile not in (None, "auto", "off")


def apply_speed_flags(model, config):
    """Executes a model (see `Executable.execute_with`) as the flags say, eagerly for --compile auto. Returns it."""
    model.execute_with(config.grad_checkpointing, config.compile if compiles(config) else None)
    return model


def add_distributed_flags(parser):
    """Flags for starting many ranks; under a launcher none is needed."""
    group = parser.add_argument_group(
        "several GPUs or machines",
        "start the program with torchrun, mpirun, mpiexec or srun, which set the number of ranks; these flags are "
        "seldom needed",
    )
    group.add_argument(
        "--world_size",
        type=positive_int,
        metavar="N",
        help="expected number of ranks; end with an error if the launcher started another number",
    )
    group.add_argument(
        "--local_rank", type=count, metavar="N", help="GPU of this rank on its node (default: from the launcher)"
    )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="end with an error if the variables of Open MPI are not set"
    )
    group.add_argument(
        "--dist_url", default="env://", metavar="URL", help="where the ranks meet: env:// or tcp://HOST:PORT"
    )
    group.add_argument(
        "--port",
        type=Range(int, at_least=1, at_most=65535),
        metavar="N",
        help="port where the ranks meet (default: MASTER_PORT, else from the job id, else a free one)",
    )
    group.add_argument(
        "--dist_timeout",
        type=positive,
        default=10,
        metavar="MIN",
        help="minutes without an answer after which a rank is taken for lost",
    )
    return group


def check_one_command(flags, ranks):
    """Refuses ranks that were started by different commands, or on different code. Raises UsageError on all of them."""
    given = {f"--{name}": value for name, value in vars(flags).items() if name not in OF_A_RANK}
    ranks.require_alike(
        {
            "the program": os.path.basename(sys.argv[0]),
            "the code": code_version(),
            "PyTorch": str(torch.__version__),
            "the output folder": os.path.abspath(flags.output_dir),
            **given,
        }
    )


def check_common_flags(flags, needs_data=True):
    """Refuses shared flags that contradict each other, before any work. Raises UsageError."""
    check_torch()
    last = flags.stop_epoch or flags.epochs
    need(
        last <= flags.epochs,
        f"--stop_epoch {last}: must be between 1 and --epochs {flags.epochs}, which the schedule spans",
    )
    need(
        flags.warmup_epochs <= flags.epochs,
        f"--warmup_epochs {flags.warmup_epochs:g}: more than --epochs {flags.epochs}",
    )
    need(
        flags.start_epoch < last,
        f"--start_epoch {flags.start_epoch}: must be below {last}, the number of epochs of the run",
    )
    need(
        not (flags.resume and flags.overwrite),
        "--resume and --overwrite contradict each other: one continues the run in --output_dir, the other removes it",
    )
    need(
        not (flags.resume and flags.start_epoch),
        "--resume and --start_epoch contradict each other: the checkpoint states the epoch",
    )
    need(
        not (flags.resume not in ("", "auto") and flags.finetune),
        "--resume PATH and --finetune contradict each other: one continues a run, the other starts one from weights",
    )
    need(
        not (flags.statistics and (flags.mean or flags.std)),
        "--statistics contradicts --mean and --std: both say how to standardise; leave one out",
    )
    launch = detect_launch()
    need(
        not flags.dist_on_itp or launch.launcher == "Open MPI",
        "--dist_on_itp: Open MPI's variables are not set; start with mpirun, or leave the flag out",
    )
    need(
        flags.world_size in (None, launch.world_size),
        f"--world_size {flags.world_size} contradicts the launcher ({launch.launcher}, {launch.world_size}); leave the "
        f"flag out",
    )
    for flag, path in (("resume", flags.resume if flags.resume != "auto" else ""), ("finetune", flags.finetune)):
        need(not path or os.path.exists(path), f"--{flag} {path}: there is no such checkpoint")
    need(
        not compiles(flags) or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
        f"--compile {flags.compile}: needs a C++ compiler, and there is no g++ or clang++; install one, name it in "
        "CXX, or leave the flag out",
    )
    need(
        not needs_data or flags.data_path is not None,
        "--data_path is missing: the folder of the data; 'python -m sarwmix.simulate' writes simulated data to try",
    )
