# SPDX-License-Identifier: MIT
"""--data_cache: keeps the images of a packed store on the GPU, in memory that the ranks of a node share, or on disk.

Shared memory is an anonymous file (memfd_create(2)) that one rank of a node creates and the others open through /proc.
It is not limited by the size of /dev/shm, and is freed when the last process that holds it ends.
"""

import logging
import mmap
import os
import platform
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UsageError

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5  # largest share of a node's free memory that --data_cache auto uses


# ---- Free memory ---------------------------------------------------------------------------------


def _number(path):
    """The number in a file; None if there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def control_group_room(proc=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Bytes that control groups allow this process to allocate, including reclaimable pages; None without a limit."""
    rooms = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:  # version 1
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            base, limit, usage = root, "memory.max", "memory.current"
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < 2**60:  # version 1 states "no limit" as a huge number
                rooms.append(most - used + _reclaimable(folder / "memory.stat"))
            if folder == base:
                break
    return max(0, min(rooms)) if rooms else None


def _reclaimable(path):
    """Bytes of cached files that were not used recently."""
    try:
        counts = dict(line.split() for line in path.read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def available_memory():
    """Bytes that the machine and the control groups allow this process to allocate."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    room = control_group_room()
    return free if room is None else min(free, room)


@dataclass(frozen=True)
class RankMemory:
    """The free memory of a rank, in bytes."""

    node: str
    processes: int  # id of the process namespace; ranks in the same one can open each other's files in /proc
    memory: int  # of its node
    gpu: int | None  # of its GPU; None on a CPU


def memory_of(device):
    """The RankMemory of this rank."""
    node = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return RankMemory(
        f"{platform.node()} {node}",
        os.stat("/proc/self/ns/pid").st_ino,
        available_memory(),
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )


# ---- The decision --------------------------------------------------------------------------------


def _copies(places):
    """The largest number of copies on a node: one for each group of ranks that can share it."""
    groups = {(place.node, place.processes) for place in places}
    return max(Counter(node for node, _ in groups).values())


def choose_cache(places, need, step):
    """The choice of --data_cache auto: ("device", "ram" or "none", the reason). It is the same on all ranks.

    places: the RankMemory of all ranks. need: bytes of the images. step(): bytes of a training step.
    """
    gpu = min((place.gpu for place in places if place.gpu is not None), default=None)
    memory = min(place.memory for place in places)
    if gpu is None:
        return "none", "read from disk; on a CPU this is as fast as a cache, once the system holds them in memory"
    step = step()
    short = f"{need / 1e9:.1f} GB and about {step / 1e9:.1f} GB for a step"
    if need + step <= gpu:
        return "device", f"on the GPU: {short}, of {gpu / 1e9:.1f} GB that are free there"
    taken = need * _copies(places)
    if taken <= MEMORY_SHARE * memory:
        return "ram", (
            f"in memory, one copy for the ranks of a node: {taken / 1e9:.1f} GB of {memory / 1e9:.1f} GB that are "
            f"free; on the GPU {gpu / 1e9:.1f} GB are free, less than {short}"
        )
    return "none", (
        f"read from disk: {need / 1e9:.1f} GB are more than {MEMORY_SHARE:g} of the {memory / 1e9:.1f} GB of memory "
        f"that are free, and on the GPU {gpu / 1e9:.1f} GB are free, less than {short}"
    )


def fill_cache(dataset, cache, ranks, step=lambda: 0):
    """Fills the cache of a packed split. All ranks must call this.

    cache: "none", "ram", "device" or "auto". step(): bytes of a training step (`step_memory.step_bytes`), for "auto" on
    a GPU. Raises UsageError if there is not enough memory for "ram" or "device".
    """
    if cache == "none":
        return
    need, places = dataset.cache_bytes(), ranks.gather(memory_of(ranks.device))
    asked = cache
    if asked == "auto":
        cache, why = choose_cache(places, need, step)
        log.info("--data_cache auto: the images of split %s are %s", dataset.split, why)
    else:
        _check_room(dataset, cache, need, places)
    started = time.monotonic()
    try:
        if cache == "device":
            with ranks.together():
                dataset.cache(ranks.device)
        elif cache == "ram":
            share_memory(dataset, need, ranks, places)
        else:
            return
    except OSError as error:
        if asked != "auto":
            raise UsageError(f"--data_cache {cache}: {error}; choose another; 'none' always works") from None
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
    """Raises UsageError if the images do not fit the free memory."""
    if cache == "device" and places[0].gpu is not None:
        free, copies = min(place.gpu for place in places), 1
    else:
        free, copies = min(place.memory for place in places), _copies(places) if cache == "ram" else len(places)
    if need * copies > free:
        each = f" in each of {copies} copies" if copies > 1 else ""
        raise UsageError(
            f"--data_cache {cache}: split '{dataset.split}' takes {need / 1e9:.1f} GB{each}, and {free / 1e9:.1f} GB "
            "are free; choose another --data_cache; 'none' always works"
        )


def hold_in_memory(dataset, cache, ranks):
    """Keeps a split with masks in the memory of every rank, for --data_cache ram, or auto if there is room.

    Each image is cropped several times in an epoch, and reading takes longer than a crop. All ranks must call this.
    Raises UsageError if there is not enough memory for "ram".
    """
    if cache == "none":
        return
    need, places = dataset.held_bytes(), ranks.gather(memory_of(ranks.device))
    copies = max(Counter(place.node for place in places).values())
    free = min(place.memory for place in places)
    if cache == "auto" and need * copies > MEMORY_SHARE * free:
        log.info(
            "--data_cache auto: split %s is read from its files: %.1f GB for each rank do not fit into %g of the "
            "%.1f GB of memory that are free",
            dataset.split,
            need / 1e9,
            MEMORY_SHARE,
            free / 1e9,
        )
        return
    _check_room(dataset, "ram", need * copies, [min(places, key=lambda place: place.memory)])
    with ranks.together():
        dataset.hold()


# ---- One copy for the ranks of a node ------------------------------------------------------------


def share_memory(dataset, need, ranks, places):
    """Reads a packed split into shared memory. Each rank of a group reads a part. Raises OSError on all ranks."""
    own = places[ranks.rank]
    group = [rank for rank, place in enumerate(places) if (place.node, place.processes) == (own.node, own.processes)]
    name = f"images_{secrets.token_hex(8)}"
    with ranks.together():
        file = _new_file(name, need) if ranks.rank == group[0] else None
    try:
        path, name = ranks.gather((f"/proc/{os.getpid()}/fd/{file}", name))[group[0]]
        with ranks.together():
            memory = _mapped(path, name, need)
        with ranks.together():
            dataset.cache(memory=memory, share=(group.index(ranks.rank), len(group)))
    finally:
        if file is not None:
            os.close(file)


def _new_file(name, size):
    """An anonymous file in memory. It is allocated at once: later, a lack of memory would be a signal, not an error."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        os.close(file)
        raise
    return file


def _mapped(path, name, size):
    """Maps the anonymous file `name` of another process into memory. Raises OSError if `path` is another file."""
    if not os.readlink(path).startswith(f"/memfd:{name}"):
        raise FileNotFoundError(f"{path} is a different file here: the ranks do not see each other's processes")
    file = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)
