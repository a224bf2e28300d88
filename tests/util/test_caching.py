# SPDX-License-Identifier: MIT
"""--data_cache: where a packed store goes, what that is decided by, and one copy in memory for the ranks of a node."""

import hashlib
import logging
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import main_pretrain
import util.caching
from common.errors import UsageError
from sarwmix.packed import PackedDataset
from tests.helpers.forked import signalled_at_step, start_ranks
from tests.helpers.runs import argv
from tests.helpers.stores import loader_flags, packed
from util.caching import RankMemory, available_memory, choose_cache, control_group_room, fill_cache, memory_of
from util.datasets import SamplesWithIds, build_loader, check_data
from util.distributed import Launch, Ranks

pytestmark = pytest.mark.slow

ALONE = Ranks(Launch(), torch.device("cpu"))
GB = 10**9
GPU = RankMemory("node", 1, 200 * GB, 80 * GB)
TINY = argv("--model mixmim_tiny --input_size 32 --epochs 1 --warmup_epochs 0")


@pytest.fixture(scope="module")
def store(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "store"
    return packed(folder, "benv2", simulated, "--splits train val")


# ---- The decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places, need, step, kind",
    [
        ([GPU], 60 * GB, 20 * GB, "device"),
        ([GPU], 60 * GB, 20 * GB + 1, "ram"),
        ([GPU, replace(GPU, gpu=79 * GB)], 60 * GB, 20 * GB, "ram"),  # one rank's GPU has less
        ([GPU], 100 * GB, 20 * GB, "ram"),
        ([GPU], 101 * GB, 20 * GB, "none"),
        ([GPU] * 8, 100 * GB, 20 * GB, "ram"),  # one copy for all of them
        ([GPU, replace(GPU, processes=2)], 90 * GB, 20 * GB, "none"),  # two that cannot share
        ([GPU, replace(GPU, node="other")], 90 * GB, 20 * GB, "ram"),  # two nodes, with a copy each
        ([GPU, replace(GPU, node="other", memory=100 * GB)], 90 * GB, 20 * GB, "none"),
        ([replace(GPU, gpu=None)], GB, 0, "none"),
    ],
)
def test_where_a_store_goes(places, need, step, kind):
    found, why = choose_cache(places, need, lambda: step)
    assert found == kind
    if places[0].gpu:
        assert f"{need / GB:.1f} GB" in why and (f"{min(place.gpu for place in places) / GB:.1f} GB" in why)


# ---- What is free --------------------------------------------------------------------------------


def limits(folder, limit, usage, stat, version):
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {stat}\n")


@pytest.mark.parametrize(
    "version, line, base", [(2, "0::/job/step", "."), (1, "7:cpu,memory:/job/step\n3:cpu:/\n0::/", "memory")]
)
def test_limits_of_containers_and_batch_systems_count(tmp_path, version, line, base):
    """The least of what a group and those above it leave; files that can be dropped are not counted as taken."""
    (tmp_path / "proc").write_text(line + "\n")
    room = lambda: control_group_room(tmp_path / "proc", tmp_path / "groups")  # noqa: E731
    assert room() is None
    base = tmp_path / "groups" / base
    limits(base / "job", 100, 60, 10, version)
    assert room() == 50
    limits(base / "job" / "step", 90, 20, 0, version)
    assert room() == 50
    limits(base / "job" / "step", 40, 20, 0, version)
    assert room() == 20
    limits(base / "job", "max" if version == 2 else 2**63 - 4096, 60, 10, version)
    limits(base / "job" / "step", 40, 50, 0, version)
    assert room() == 0


def test_the_lesser_of_machine_and_limit_is_free(monkeypatch):
    monkeypatch.setattr(util.caching, "control_group_room", lambda: 12345)
    assert available_memory() == 12345
    monkeypatch.setattr(util.caching, "control_group_room", lambda: None)
    assert available_memory() > 12345 and memory_of(torch.device("cpu")).gpu is None


# ---- What is done --------------------------------------------------------------------------------


def flags(**changes):
    run = dict(check_files="all", model="mixmim_tiny", amp="off", input_size=128, grad_checkpointing=False)
    return loader_flags(**{**run, "data_cache": "auto", "mean": (-19.2, -12.5), "std": (5.5, 5.0), **changes})


@pytest.mark.parametrize(
    "place, said",
    [
        (replace(GPU, gpu=None), "are read from disk; on a CPU this is as fast"),
        (replace(GPU, gpu=10**6), "are in memory, one copy for the ranks of a node"),
        (replace(GPU, gpu=10**6, memory=10**6), "are read from disk: 0.0 GB are more than 0.5 of the 0.0 GB"),
        (GPU, "are on the GPU: 0.0 GB and about"),
    ],
)
def test_batches_are_the_same_wherever_they_come_from(store, monkeypatch, caplog, place, said):
    caplog.set_level(logging.INFO)
    expected = list(build_loader(SamplesWithIds(PackedDataset(store, "train")), flags(), ALONE))
    monkeypatch.setattr(util.caching, "memory_of", lambda device: place)
    dataset = PackedDataset(store, "train")
    check_data(dataset, flags(), ALONE)
    found = list(build_loader(SamplesWithIds(dataset), flags(), ALONE))
    assert f"--data_cache auto: the images of split train {said}" in caplog.text
    assert dataset.source.on_device == (place is GPU)
    assert len(found) == len(expected) > 1
    for (ids, images, labels), (own, theirs, label) in zip(found, expected):
        assert torch.equal(ids, own) and torch.equal(labels, label) and all(map(torch.equal, images, theirs))


def test_what_is_read_once_is_not_kept(store, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(util.caching, "memory_of", lambda device: GPU)
    dataset = PackedDataset(store, "val")
    check_data(dataset, flags(), ALONE, read_once=True)
    assert "data_cache" not in caplog.text and not dataset.source.on_device
    check_data(dataset, flags(data_cache="device"), ALONE, read_once=True)
    assert dataset.source.on_device


def test_other_data_is_left_alone_without_a_word(simulated, program, tmp_path):
    flags = argv("--batch_size 8 --num_workers 0 --save_epochs 99 --data_path", simulated, "--output_dir", tmp_path)
    status, out, _ = program(main_pretrain, *TINY, *flags)
    assert status == 0 and "data_cache" not in out.split("flags:", 1)[1].split("\n", 1)[1]


def test_memory_that_cannot_be_shared_is_an_error_or_a_warning(store, monkeypatch, caplog):
    monkeypatch.setattr(util.caching.os, "readlink", lambda path: "/memfd:of another program")
    dataset = PackedDataset(store, "train")
    with pytest.raises(
        UsageError, match="--data_cache ram: .* the ranks do not see each other's processes; choose another"
    ):
        fill_cache(dataset, "ram", ALONE)
    monkeypatch.setattr(util.caching, "memory_of", lambda device: replace(GPU, gpu=0))
    fill_cache(dataset, "auto", ALONE)
    assert "no memory can be shared" in caplog.text and len(dataset.images([0])) == 1


def noting_memory(path):
    """Write the inodes of the memory that this process shares, and a digest of the images in it, into a file; be killed in training."""
    share = util.caching.share_memory

    def noting(dataset, *args):
        share(dataset, *args)
        with open("/proc/self/maps") as file:
            inodes = [line.split()[4] for line in file if "/memfd:images" in line]
        path.write_text(f"{' '.join(inodes)} {digest(dataset)}")

    util.caching.share_memory = noting
    signalled_at_step(2, signal.SIGKILL)


def digest(dataset):
    (images,) = dataset.images(np.arange(len(dataset)))
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_two_ranks_share_one_copy_and_nothing_of_it_is_left(store, tmp_path):
    """Each reads a half; and both are killed."""
    before = set(os.listdir("/dev/shm"))
    flags = argv("--data_cache ram --split train --batch_size 4 --num_workers 1 --data_path", store)
    runs = start_ranks(
        "main_pretrain",
        (*TINY, *flags, "--output_dir", tmp_path / "run"),
        tmp_path / "output",
        hurt={rank: (noting_memory, tmp_path / f"memory_{rank}") for rank in range(2)},
    )
    assert [run.wait() for run in runs] == [-signal.SIGKILL] * 2, runs[0].text()
    one, other = ((tmp_path / f"memory_{rank}").read_text() for rank in range(2))
    assert one == other and re.fullmatch(rf"\d+ {digest(PackedDataset(store, 'train'))}", one)
    assert "split train is in the memory of the node: 0.00 GB" in runs[0].text()
    assert not [name for name in os.listdir("/dev/shm") if name not in before and "images" in name]
