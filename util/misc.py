# SPDX-License-Identifier: MIT
"""Logged flags, durations, memory, and the record of what a run was."""

import ctypes
import datetime
import json
import logging
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3): when to shrink the heap, and from which size on to map memory


def log_flags(args):
    """One line with all flags as JSON, so that a log says what it is of."""
    log.info("flags: %s", json.dumps(vars(args), sort_keys=True))


def duration(seconds):
    """H:MM:SS."""
    return str(datetime.timedelta(seconds=int(seconds)))


def peak_memory(device):
    """The most memory taken so far, in bytes: of the GPU by tensors, or of the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory():
    """Have this process keep the memory that it frees, for the next step, instead of giving it back to the system.

    A training step on a CPU allocates gigabytes in pieces so large that glibc maps and unmaps each; the system then has
    to hand out and clear every page of them again, in every step. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, -1)


def _commit():
    """The checkout's commit, with "+changes" if files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if commit.returncode == 0 else None


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(ranks):
    """Versions, devices, launcher and commit of this run, for run.json."""
    device = ranks.device
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "torchvision", "timm", "numpy", "rasterio", "zarr", "mpi4py")
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "launcher": ranks.launch.launcher,
        "world_size": ranks.world_size,
    }
