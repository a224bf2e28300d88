# SPDX-License-Identifier: MIT
"""How a main program ends: one line that says why, an exit status, and no process left behind."""

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

import torch.distributed as td

from common.errors import Stopped, TrainingError, UsageError, reason_of
from common.launchers import launched_rank
from common.startup import missing_package

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# How gloo and NCCL word it when another rank is gone.
LOST_RANK_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")

# Failures whose reason lies outside of the code: how the libraries word them → what happened, and what to do. The first that
# matches counts.
CAUSES = (
    (
        r"MemoryError|CUDA out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory",
        "rank {rank} is out of memory ({reason}); lower --batch_size, and raise --accum_iter by as much to keep the "
        "global batch; a packed store on the GPU leaves it with --data_cache ram",
    ),
    (
        r"shared memory ?(\(shm\)|limit|object)|unable to (write to|resize|open|mmap).*/torch_|killed by signal: Bus error",
        "the loader processes of rank {rank} have no room in /dev/shm, which holds {shm} MB ({reason}); give a container more with "
        "--shm-size=8g or --ipc=host, or load without processes: --num_workers 0",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "rank {rank} may not open more than {files} files ({reason}); raise the limit with 'ulimit -n 4096', or lower --num_workers",
    ),
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)",
        "a loader process of rank {rank} died ({reason}), perhaps for want of memory; lower --num_workers",
    ),
    (
        r"DataLoader timed out",
        "rank {rank} received no batch in time ({reason}); check that the file system of --data_path responds, try --num_workers 0, or "
        "allow more time with --data_timeout",
    ),
    (
        r"^(torch\._inductor|torch\._dynamo|triton)\.",
        "the model could not be compiled on rank {rank} ({reason}); use --compile off, or see that a C++ compiler and the headers of Python "
        "are installed (build-essential, python3-dev)",
    ),
    (
        r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|CUDA driver error",
        "the GPU of rank {rank} failed ({reason}); see whether nvidia-smi still shows it and what dmesg says of it, then go on with "
        "--resume auto. CUDA_LAUNCH_BLOCKING=1 shows which operation failed",
    ),
)


def fail(line, status):
    """One line on stderr, its line breaks folded; the status to exit with."""
    sys.stderr.write(" ".join(str(line).split()) + "\n")
    sys.stderr.flush()
    return status


def leave(status):
    """End the process. After a failure nothing is waited for: a thread that reads from a file system without an answer, a
    collective under way whose thread would abort with the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    sys.exit(0)


def run_program(main, *input_errors):
    """Call main() and return an exit status: 0; 2 for bad input (UsageError or `input_errors`); 1 when training cannot go on;
    128 + the number of a signal that asked a run to end.

    Each failure is reported in one line, by the rank it happened on; before that line stands a traceback where the fault may be
    the program's own. No loader process is left. Under a launcher a failure ends the process here, see `leave`.
    """
    hook = sys.unraisablehook

    def main_alone():
        try:
            main()
        except BaseException:
            sys.unraisablehook = lambda _: None  # what half-made objects say when the exception lets go of them
            raise
        finally:
            end_loaders()  # before an exception lets go of them: PyTorch would wait five seconds for each that does not answer

    try:
        status = _outcome(main_alone, input_errors)
    finally:
        sys.unraisablehook = hook
    if status and td.is_initialized():
        leave(status)
    return status


def end_loaders():
    """End all loader processes. They ignore SIGTERM, with which Python would end them before it waits for them."""
    loaders = [process for process in multiprocessing.active_children() if process.daemon]
    if not loaders:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise an error
    for process in loaders:
        process.kill()
    for process in loaders:
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _outcome(main, input_errors):
    name, rank = os.path.basename(sys.argv[0]), launched_rank()

    def say(error, line, status):
        """The line from the one rank that it happened on, or that is to speak for all; the status on every rank."""
        return fail(f"{name}: {line}", status) if getattr(error, "reported_by", rank) == rank else status

    try:
        main()
        return 0
    except (UsageError, *input_errors) as error:
        return say(error, f"error: {reason_of(error)}", 2)
    except (TrainingError, Stopped) as error:
        if getattr(error, "on_all_ranks", True):
            error.reported_by = 0
            if isinstance(error, Stopped) and td.is_initialized():
                td.destroy_process_group()
        return say(error, f"stopped: {error}", getattr(error, "status", 1))
    except KeyboardInterrupt:
        return fail(f"{name}: interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            return say(
                error,
                f"error: {error.filename or 'output'}: {error.strerror}; the checkpoints are intact. Make room or mend the "
                f"disk, then continue with --resume auto",
                1,
            )
        package = missing_package(error)
        if package:
            return say(error, f"error: {package}", 2)
        known = known_cause(error, rank)
        if known:
            return say(error, f"error: {known}", 1)
        if (
            td.is_initialized()
            and isinstance(error, RuntimeError)
            and any(sign in str(error) for sign in LOST_RANK_SIGNS)
        ):
            time.sleep(2)  # the launcher reports who ends first, which should be the rank that knows why
            return say(error, f"rank {rank} ends because another rank is gone; that one's message says why", 1)
        if getattr(error, "reported_by", rank) == rank:
            traceback.print_exc()
        return say(
            error,
            f"error: {type(error).__name__}: {reason_of(error)} (on rank {rank}; the traceback above shows where). "
            f"Saved checkpoints are intact: --resume auto continues a training from the last one",
            1,
        )


def known_cause(error, rank):
    """What happened and what to do, in one line, where the reason is one of CAUSES; else None."""
    words = f"{type(error).__module__}.{type(error).__name__}: {error}"
    for signs, line in CAUSES:
        if re.search(signs, words):
            return line.format(
                rank=rank,
                reason=reason_of(error)[:160],
                shm=_shm_megabytes(),
                files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )
    return None


def _shm_megabytes():
    with contextlib.suppress(OSError):
        status = os.statvfs("/dev/shm")
        return status.f_blocks * status.f_frsize // 2**20
    return 0
