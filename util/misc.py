# SPDX-License-Identifier: MIT
"""Logging of flags and durations, memory, and the description of the environment in run.json."""

import ctypes
import datetime
import hashlib
import json
import logging
import platform
import resource
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = ("*.py", "common/*.py", "util/*.py", "sarwmix/**/*.py")  # of what runs in a training

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt(3)


def log_flags(args):
    """Logs all flags as JSON in one line."""
    log.info("flags: %s", json.dumps(vars(args), sort_keys=True))


def duration(seconds):
    """Seconds as H:MM:SS."""
    return str(datetime.timedelta(seconds=int(seconds)))


def peak_memory(device):
    """Peak memory in bytes: of tensors on the GPU, or on a CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory():
    """Makes malloc keep freed memory for reuse instead of returning it to the system.

    A training step on a CPU allocates gigabytes in large blocks. By default, glibc maps and unmaps each block, and the
    system clears its pages again in every step. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, -1)


def code_version():
    """A checksum of this program's source files."""
    root, found = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root)}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _commit():
    """The checkout's commit, with "+changes" if files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10)
    try:
        commit = git(["git", "rev-parse", "HEAD"])
        changes = git(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if commit.returncode == 0 else None


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device):
    """The name of a GPU, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def environment(ranks):
    """Versions, devices, launcher and commit of this run, for run.json."""
    device, packages = ranks.device, ("torch", "torchvision", "timm", "numpy", "rasterio", "zarr", "mpi4py")
    on_gpu = device.type == "cuda"
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "device": device_name(device),
        "cuda": torch.version.cuda if on_gpu else None,
        "launcher": ranks.launch.launcher,
        "world_size": ranks.world_size,
    }
