# SPDX-License-Identifier: MIT
"""Ends a program with a one-line message, an exit status, and no process left running."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from common.console import LOG
from common.errors import InputError, Stopped, TrainingError, printable, reason_of
from common.launchers import launched_rank
from common.startup import missing_package


@dataclass(frozen=True)
class Kind:
    """The messages that differ between kinds of programs. input_errors: exceptions that count as InputError."""

    memory: str
    go_on: str
    input_errors: tuple = ()


TRAINING = Kind(
    memory="lower --batch_size and raise --accum_iter by the same factor, which keeps the global batch; --data_cache "
    "ram keeps a packed store off the GPU",
    go_on="saved checkpoints are intact: --resume auto continues a training from the last one",
)
PREPARATION = Kind(memory="use fewer --workers", go_on="run it again to continue", input_errors=(OSError,))

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
LOST_RANK = r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|NCCL"  # of gloo and NCCL

LOST = "another rank, or the connection to it, is lost; the message of that rank, if there is one, gives the reason"

# (type, or regular expression for "module.Type: message"; exit status; line). The first row that matches applies.
FAILURES = (
    (InputError, 2, "error: {reason}"),
    (TrainingError, 1, "stopped: {error}"),
    (KeyboardInterrupt, 130, "interrupted; {kind.go_on}"),
    (
        rf"^builtins\.OSError: \[Errno ({'|'.join(map(str, DISK_FAULTS))})\]",
        1,
        "error: {file}: {strerror}; saved checkpoints are intact. Free space or repair the disk, then continue with "
        "--resume auto",
    ),
    (
        rf"^builtins\.BrokenPipeError: .*'{LOG}'$",
        1,
        "error: rank {rank} cannot write its log, because the program that reads it has ended; {kind.go_on}",
    ),
    (
        r"MemoryError|CUDA out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory",
        1,
        "error: rank {rank} is out of memory ({reason}); {kind.memory}",
    ),
    (
        r"shared memory ?(\(shm\)|limit|object)|unable to (write to|resize|open|mmap).*/torch_"
        r"|killed by signal: Bus error",
        1,
        "error: the loader processes of rank {rank} need more shared memory than /dev/shm has, {shm} MB ({reason}); "
        "start a container with --shm-size=8g or --ipc=host, or load without processes: --num_workers 0",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        1,
        "error: rank {rank} reached the limit of {files} open files ({reason}); raise the limit with 'ulimit -n "
        "4096', or lower --num_workers",
    ),
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)",
        1,
        "error: a loader process of rank {rank} died ({reason}), perhaps because memory ran out; lower --num_workers",
    ),
    (
        r"DataLoader timed out",
        1,
        "error: rank {rank} received no batch in time ({reason}); check that the file system of --data_path responds, "
        "try --num_workers 0, or allow more time with --data_timeout",
    ),
    (
        r"^(torch\._inductor|torch\._dynamo|triton)\.",
        1,
        "error: the model could not be compiled on rank {rank} ({reason}); use --compile off, or install a C++ "
        "compiler and the headers of Python (build-essential, python3-dev)",
    ),
    (
        r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|CUDA driver error",
        1,
        "error: the GPU of rank {rank} failed ({reason}); check it with nvidia-smi and dmesg, then continue with "
        "--resume auto. CUDA_LAUNCH_BLOCKING=1 shows which operation failed",
    ),
    (
        BrokenProcessPool,
        1,
        "error: a worker process was killed, perhaps because memory ran out; run again with fewer --workers",
    ),
)


def run_program(main, name=None, kind=TRAINING, abort=None):
    """Calls main(). Reports a failure in one line, on the rank it happened on, and returns the exit status.

    The status is 0; 2 for bad input; 1 when the program cannot go on; 128 + the number of a signal that ended it. A
    failure that is not in FAILURES is reported with its traceback. No loader process survives. In a process group of
    PyTorch a failure ends the process here; see `leave`.
    name: the program in messages (default: its file). abort(): ends the other ranks, which do not know of a failure.
    """
    hook = sys.unraisablehook
    try:
        _call(main)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status = _report(error, name or os.path.basename(sys.argv[0]), kind, abort)
    finally:
        sys.unraisablehook = hook
    if status and _process_group():
        leave(status)
    return status


def leave(status):
    """Ends the process. After a failure, it does not wait for threads, which may be blocked by a file system or a
    collective operation."""
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or 1
        _write(f"{os.path.basename(sys.argv[0])}: error: the output could not be written ({error.strerror})")
    if status:
        os._exit(status)
    sys.exit(0)


def describe(error, kind=TRAINING, rank=0):
    """(exit status, line) of an exception, by the table FAILURES; None for one that is not in it."""
    words = f"{type(error).__module__}.{type(error).__name__}: {error}"
    for sign, status, line in ((kind.input_errors, 2, "error: {reason}"), *FAILURES):
        if re.search(sign, words) if isinstance(sign, str) else isinstance(error, sign):
            return status, line.format(
                error=error,
                reason=reason_of(error) if status == 2 else reason_of(error)[:160],
                kind=kind,
                rank=rank,
                file=getattr(error, "filename", None) or "output",
                strerror=getattr(error, "strerror", None),
                shm=_shm_megabytes(),
                files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )
    return None


def outcome_of(error):
    """How a run ended with an exception, in one line, for its record."""
    if isinstance(error, Stopped):
        return f"stopped: {reason_of(error)}"
    return f"failed: {LOST if _process_group() and _is_lost_rank(error) else reason_of(error)}"


def _is_lost_rank(error):
    return isinstance(error, RuntimeError) and re.search(LOST_RANK, str(error)) is not None


def _write(line):
    with contextlib.suppress(OSError):  # of a terminal or a disk that is gone
        sys.stderr.write(f"{printable(line)}\n")
        sys.stderr.flush()


def _call(main):
    try:
        main()
    except BaseException:
        sys.unraisablehook = lambda _: None  # messages of partly constructed objects that the exception releases
        raise
    finally:
        _end_loaders()  # before the exception releases them, because PyTorch waits five seconds for each


def _end_loaders():
    """Kills all loader processes. They ignore SIGTERM, which Python would send at exit."""
    loaders = [process for process in multiprocessing.active_children() if process.daemon]
    if not loaders:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for process in loaders:
        process.kill()
    for process in loaders:
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _process_group():
    """torch.distributed, if this process has imported it and is a rank of a process group; else None."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def _report(error, name, kind, abort):
    """Writes the line of a failure to stderr, on the rank that is to report it. Returns the exit status."""
    rank, package, group = launched_rank(), missing_package(error), _process_group()
    is_known_to_all = hasattr(error, "reported_by")
    if isinstance(error, TrainingError) or isinstance(error, Stopped) and error.on_all_ranks:
        error.reported_by = 0
    reports = getattr(error, "reported_by", rank) == rank
    if isinstance(error, Stopped):
        status, line = error.status, f"stopped: {error}"
        if error.on_all_ranks and group:
            group.destroy_process_group()
    elif package:
        status, line = 2, f"error: {package}"
    elif known := describe(error, kind, rank):
        status, line = known
    elif group and _is_lost_rank(error):
        time.sleep(2)  # the launcher reports the rank that ends first, which should be the rank with the cause
        status, line = 1, f"rank {rank} ends because {LOST}"
    else:
        if reports:
            traceback.print_exc()
        status = 1
        line = (
            f"error: {type(error).__name__}: {reason_of(error)} (on rank {rank}; the traceback above shows where); "
            f"{kind.go_on}"
        )
    if reports:
        _write(f"{name}: {' '.join(line.split())}")
    if abort and not is_known_to_all and not isinstance(error, (InputError, KeyboardInterrupt, *kind.input_errors)):
        abort()
    return status


def _shm_megabytes():
    with contextlib.suppress(OSError):
        status = os.statvfs("/dev/shm")
        return status.f_blocks * status.f_frsize // 2**20
    return 0
