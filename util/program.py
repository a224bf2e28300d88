# SPDX-License-Identifier: MIT
"""What the main programs share: flags and how they are read."""

import os
import shutil

from common.errors import UsageError
from util.checkpoint import check_torch
from util.distributed import detect_launch
from util.stopping import add_pause_flags

COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def add_schedule_flags(parser, *, batch_size, epochs, warmup_epochs, blr, min_lr):
    """Flags of the optimiser and the learning-rate schedule, with a recipe's defaults."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=int, default=batch_size, help="samples per rank and micro-batch")
    group.add_argument(
        "--accum_iter",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches whose gradients are summed for one step; global batch = batch_size × accum_iter × ranks",
    )
    group.add_argument("--epochs", type=int, default=epochs, help="epochs the learning-rate schedule spans")
    group.add_argument(
        "--stop_epoch",
        type=int,
        metavar="N",
        help="stop after this many epochs; the schedule still spans --epochs (default: --epochs)",
    )
    group.add_argument("--warmup_epochs", type=float, default=warmup_epochs, help="epochs of linear warm-up")
    group.add_argument("--lr", type=float, help="learning rate (default: blr × global batch / 256)")
    group.add_argument("--blr", type=float, default=blr, help="base learning rate, per 256 images of a global batch")
    group.add_argument("--min_lr", type=float, default=min_lr, help="learning rate at the end of the schedule")
    group.add_argument(
        "--weight_decay", type=float, default=0.05, help="AdamW weight decay; none on biases and 1-D parameters"
    )
    group.add_argument(
        "--clip_grad", type=float, metavar="NORM", help="clip gradients to this norm (default: no clipping)"
    )
    group.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; fp16 scales the loss (default: bf16 on CUDA, fp16 on GPUs without bf16, off on a CPU)",
    )
    return group


def add_run_flags(parser, *, output_dir):
    """Flags of a run: where it writes, how it goes on. A program adds --finetune, how it starts."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir, metavar="DIR", help="checkpoints, log.txt and run.json")
    group.add_argument("--log_dir", metavar="DIR", help="TensorBoard events (default: OUTPUT_DIR/tensorboard)")
    group.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    group.add_argument(
        "--resume",
        default="",
        metavar="auto|PATH",
        help="continue a run exactly: from PATH, or 'auto' from output_dir if there is something to continue",
    )
    add_pause_flags(group)
    group.add_argument(
        "--start_epoch", type=int, default=0, metavar="N", help="epoch to start at, 0-based; --resume sets it"
    )
    group.add_argument("--seed", type=int, default=0, help="of the initialisation, the sample order, flips and masks")
    group.add_argument("--log_freq", type=int, default=20, metavar="N", help="steps between console lines")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--num_workers",
        type=int,
        metavar="N",
        help="loader processes per rank (default: the CPU cores of a rank, at most 10)",
    )
    group.add_argument(
        "--pin_mem",
        action="store_true",
        default=True,
        help="page-locked batches for faster copies to a GPU (the default)",
    )
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")
    return group


def add_speed_flags(parser):
    """Flags that change the time and the memory a run takes, and of its results the last bits at most."""
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--compile",
        choices=("auto", *COMPILE_MODES),
        metavar="MODE",
        help=f"compile the blocks in this mode of torch.compile: {', '.join(COMPILE_MODES)}; or auto: time eager and compiled "
        f"steps before training, and take the faster way; a continued run keeps it (default: auto on CUDA, off on a CPU)",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute each block's forward pass twice instead of keeping what is in it: less memory, a quarter more time",
    )
    return group


def compiles(args):
    """Whether --compile names a mode of torch.compile; auto may find one yet."""
    return args.compile not in (None, "auto", "off")


def apply_speed_flags(model, args):
    """Have a model (see `MixMIMEncoder.execute_with`) run as the flags say, eager for --compile auto. Returns it."""
    model.execute_with(args.grad_checkpointing, args.compile if compiles(args) else None)
    return model


def add_distributed_flags(parser):
    """Flags for starting many ranks; under a launcher none is needed."""
    group = parser.add_argument_group(
        "distributed", "ranks are found from the variables of mpirun, mpiexec, torchrun or srun"
    )
    group.add_argument(
        "--world_size", type=int, metavar="N", help="ranks expected: an error if the launcher started others"
    )
    group.add_argument(
        "--local_rank", type=int, metavar="N", help="GPU of this rank on its node (default: from the launcher)"
    )
    group.add_argument("--dist_on_itp", action="store_true", help="insist on Open MPI's variables")
    group.add_argument("--dist_url", default="env://", metavar="URL", help="rendezvous, env:// or tcp://HOST:PORT")
    group.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="rendezvous port (default: MASTER_PORT, or made from the job id, or a free one)",
    )
    group.add_argument(
        "--dist_timeout",
        type=float,
        default=10,
        metavar="MIN",
        help="minutes after which ranks give up on one that does not answer",
    )
    return group


def check_common_flags(args):
    """Refuse values and pairs of shared flags that cannot be meant, before any work. Raises UsageError."""

    def need(ok, message):
        if not ok:
            raise UsageError(message)

    check_torch()
    for name, least in (
        ("batch_size", 1),
        ("accum_iter", 1),
        ("epochs", 1),
        ("log_freq", 1),
        ("start_epoch", 0),
        ("seed", 0),
        ("warmup_epochs", 0),
        ("weight_decay", 0),
        ("min_lr", 0),
        ("blr", 0),
    ):
        need(getattr(args, name) >= least, f"--{name} {getattr(args, name)}: must be at least {least}")
    for name in ("lr", "clip_grad", "dist_timeout", "data_timeout", "walltime"):
        value = getattr(args, name)
        need(value is None or value > 0, f"--{name} {value}: must be above 0")
    need(
        args.save_every_steps is None or args.save_every_steps >= 1,
        f"--save_every_steps {args.save_every_steps}: must be at least 1",
    )
    need(args.save_every_minutes >= 0, f"--save_every_minutes {args.save_every_minutes:g}: must be at least 0")
    need(args.num_workers is None or args.num_workers >= 0, f"--num_workers {args.num_workers}: must be at least 0")
    need(args.port is None or 0 < args.port < 65536, f"--port {args.port}: must be between 1 and 65535")
    if args.stop_epoch is None:
        args.stop_epoch = args.epochs
    need(
        1 <= args.stop_epoch <= args.epochs,
        f"--stop_epoch {args.stop_epoch}: must be between 1 and --epochs {args.epochs}, which the schedule spans",
    )
    need(args.warmup_epochs <= args.epochs, f"--warmup_epochs {args.warmup_epochs:g}: more than --epochs {args.epochs}")
    need(
        args.start_epoch < args.stop_epoch,
        f"--start_epoch {args.start_epoch}: there is no epoch left before {args.stop_epoch}",
    )
    need(
        not (args.resume and args.overwrite),
        "--resume and --overwrite contradict each other: one continues the run in --output_dir, the other removes it",
    )
    need(
        not (args.resume and args.start_epoch),
        "--resume and --start_epoch contradict each other: a resumed run knows its epoch",
    )
    need(
        not (args.resume not in ("", "auto") and args.finetune),
        "--resume PATH and --finetune contradict each other: one continues a run, the other starts one from weights",
    )
    launch = detect_launch()
    need(
        not args.dist_on_itp or launch.launcher == "Open MPI",
        "--dist_on_itp: Open MPI's variables are not set; start with mpirun, or leave the flag out",
    )
    need(
        args.world_size in (None, launch.world_size),
        f"--world_size {args.world_size} contradicts the launcher "
        f"({launch.launcher}, {launch.world_size}); leave the flag out",
    )
    for flag, path in (("resume", args.resume if args.resume != "auto" else ""), ("finetune", args.finetune)):
        need(not path or os.path.exists(path), f"--{flag} {path}: there is no such checkpoint")
    need(
        not compiles(args) or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
        f"--compile {args.compile}: needs a C++ compiler, and there is no g++ or clang++; install one, name it in CXX, or leave the flag out",
    )
    need(0 <= args.drop_path < 1, f"--drop_path {args.drop_path}: must be at least 0 and below 1")
    need(0 <= args.max_nonfinite <= 1, f"--max_nonfinite {args.max_nonfinite}: a share between 0 and 1 is needed")
    need(not args.std or min(args.std) > 0, f"--std {args.std and ' '.join(map(str, args.std))}: must be above 0")
    need(
        args.data_path is not None,
        "--data_path is missing: the folder of the data; 'python -m sarwmix.simulate' makes some to try",
    )
