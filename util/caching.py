# SPDX-License-Identifier: MIT
"""--data_cache: whether the images of a packed store go to the GPU, to memory that the ranks of a node share, or stay on the disk.

Shared memory is an anonymous file (memfd_create(2)) that one rank of a node makes and the others open through /proc. It has no
name, lies in no folder, is not bounded by the size of /dev/shm, and is freed with the last process that holds it, however
that ends.
"""

import logging
import mmap
import os
import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UsageError

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5  # of a node's free memory that --data_cache auto takes at most


# ---- What is free --------------------------------------------------------------------------------


def _number(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def control_group_room(proc=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Bytes that the limits of containers and batch systems leave this process, pages that can be dropped included; None: no limit."""
    rooms = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < 2**60:  # version 1 has a huge number for "no limit"
                rooms.append(most - used + _droppable(folder / "memory.stat"))
            if folder == base:
                break
    return max(0, min(rooms)) if rooms else None


def _droppable(path):
    """Bytes of files in memory that were not used lately."""
    try:
        counts = dict(line.split() for line in path.read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def available_memory():
    """Bytes that this process can still take: of the machine, and within the limits that are set for it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    room = control_group_room()
    return free if room is None else min(free, room)


@dataclass(frozen=True)
class Place:
    """Where a rank is, and what is free there. memory: bytes of its node; gpu: bytes of its GPU, None on a CPU."""

    node: str
    processes: int  # ranks with the same can open each other's files in /proc
    memory: int
    gpu: int | None


def place_of(device):
    """The Place of this rank."""
    node = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Place(
        f"{platform.node()} {node}",
        os.stat("/proc/self/ns/pid").st_ino,
        available_memory(),
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )


# ---- The decision --------------------------------------------------------------------------------


def _copies(places):
    """The most copies in memory that a node would hold: one for all ranks that can share it."""
    return max(
        len({place.processes for place in places if place.node == node}) for node in {place.node for place in places}
    )


def choose_cache(places, need, step):
    """What --data_cache auto means: ("device", "ram" or "none", why). The same on all ranks, as `places` is: the Place of each.

    need: bytes of the images. step(): as `step_memory.step_bytes`.
    """
    gpu, memory = (
        min((place.gpu for place in places if place.gpu is not None), default=None),
        min(place.memory for place in places),
    )
    if gpu is None:
        return "none", "read from disk, which on a CPU is as fast once the system holds them in memory"
    step = step()
    short = f"{need / 1e9:.1f} GB and about {step / 1e9:.1f} GB for a step"
    if need + step <= gpu:
        return "device", f"on the GPU: {short}, of {gpu / 1e9:.1f} GB that are free there"
    taken = need * _copies(places)
    if taken <= MEMORY_SHARE * memory:
        return "ram", (
            f"in memory, one copy for the ranks of a node: {taken / 1e9:.1f} GB of {memory / 1e9:.1f} GB that are free; on the GPU "
            f"{gpu / 1e9:.1f} GB are free, less than {short}"
        )
    return "none", (
        f"read from disk: {need / 1e9:.1f} GB are more than {MEMORY_SHARE:g} of the {memory / 1e9:.1f} GB of memory that are free, and "
        f"on the GPU {gpu / 1e9:.1f} GB are free, less than {short}"
    )


def fill_cache(dataset, cache, ranks, step=lambda: 0):
    """Put the images of a packed split where --data_cache says, on all ranks together.

    cache: "none", "ram", "device" or "auto". step(): as `step_memory.step_bytes`, for "auto" on a GPU. Raises UsageError if
    "ram" or "device" is given and memory is short.
    """
    if cache == "none":
        return
    need, places = dataset.cache_bytes(), ranks.gather(place_of(ranks.device))
    asked = cache
    if asked == "auto":
        cache, why = choose_cache(places, need, step)
        log.info("--data_cache auto: the images of split %s are %s", dataset.split, why)
    else:
        _check_room(dataset, cache, need, places)
    started = time.monotonic()
    try:
        if cache == "device":
            ranks.together(lambda: dataset.cache(ranks.device))
        elif cache == "ram":
            share_memory(dataset, need, ranks, places)
        else:
            return
    except OSError as error:
        if asked != "auto":
            raise UsageError(f"--data_cache {cache}: {error}; choose another, which 'none' always is") from None
        log.warning(
            "--data_cache auto: no memory can be shared (%s); the images of split %s are read from disk",
            error,
            dataset.split,
        )
        return
    log.info(
        "split %s is in the memory of %s: %.2f GB, %.1f s",
        dataset.split,
        ranks.device if cache == "device" else "the node",
        need / 1e9,
        time.monotonic() - started,
    )


def _check_room(dataset, cache, need, places):
    if cache == "device" and places[0].gpu is not None:
        free, copies = min(place.gpu for place in places), 1
    else:
        free, copies = min(place.memory for place in places), _copies(places) if cache == "ram" else len(places)
    if need * copies > free:
        raise UsageError(
            f"--data_cache {cache}: split '{dataset.split}' takes {need / 1e9:.1f} GB{f' in each of {copies} copies' if copies > 1 else ''}, "
            f"and {free / 1e9:.1f} GB are free; choose another --data_cache, which 'none' always is"
        )


# ---- One copy for the ranks of a node ------------------------------------------------------------


def share_memory(dataset, need, ranks, places):
    """Read a packed split into memory that the ranks share that can; each reads a part of it. Raises OSError on all ranks."""
    own = places[ranks.rank]
    group = [rank for rank, place in enumerate(places) if (place.node, place.processes) == (own.node, own.processes)]
    name = f"images_{secrets.token_hex(8)}"
    file = ranks.together(lambda: _new_file(name, need) if ranks.rank == group[0] else None)
    try:
        path, name = ranks.gather((f"/proc/{os.getpid()}/fd/{file}", name))[group[0]]
        memory = ranks.together(lambda: _mapped(path, name, need))
        ranks.together(lambda: dataset.cache(memory=memory, share=(group.index(ranks.rank), len(group))))
    finally:
        if file is not None:
            os.close(file)


def _new_file(name, size):
    """A file that no folder holds, in memory that is taken at once, so that its lack is an error here and not a signal later."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        os.close(file)
        raise
    return file


def _mapped(path, name, size):
    if not os.readlink(path).startswith(f"/memfd:{name}"):
        raise FileNotFoundError(f"{path} is another file: the ranks do not see each other's processes")
    file = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)
