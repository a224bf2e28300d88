# SPDX-License-Identifier: MIT
"""Power cuts, full and failing disks: file systems in files that are mounted here. Part of the campaign; needs root.

A power cut is a file system that is shut down without its log being written (EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN), with
all that was not synced lost, and mounted again.
"""

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import Run, finish, noting_saves
from tests.helpers.resumed import differences, unloadable
from tests.helpers.runs import log_of, scalars
from util.checkpoint import LATEST, load_checkpoint, load_latest

pytestmark = pytest.mark.slow

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # ioctl of ext4 and of xfs, and its argument
FILE_SYSTEMS = {  # (mkfs, options of mount)
    "ext4": ("mkfs.ext4 -q", "loop,errors=remount-ro"),
    "ext4, data=writeback": ("mkfs.ext4 -q", "loop,data=writeback,noauto_da_alloc,commit=300"),
    "xfs": ("mkfs.xfs -q", "loop"),
}
CRASHES = 35  # on each file system
LIMIT = 20  # seconds within which a run on a failing disk must have ended


@pytest.fixture
def mounted(campaign, mounting_alone, tmp_path):
    """mounted(kind) → a context with (folder, crash): a new file system, and a function that cuts its power."""
    if not campaign:
        pytest.skip("mounts file systems; run with --campaign")
    if os.geteuid():
        pytest.skip("needs root, to mount file systems")

    def run(command, *words):
        return subprocess.run([*command.split(), *map(str, words)], capture_output=True, text=True)

    @contextmanager
    def mount(kind):
        make, options = FILE_SYSTEMS[kind]
        if not shutil.which(make.split()[0]):
            pytest.skip(f"{make.split()[0]} is not installed")
        image, folder = tmp_path / "image", tmp_path / "disk"
        image.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        with open(image, "wb") as file:
            file.truncate(400 * 2**20)
        assert run(make, image).returncode == 0

        def attach():
            result = run("mount -o", options, image, folder)
            if result.returncode:
                pytest.skip(f"cannot mount here: {result.stderr.strip()}")

        def detach():
            for _ in range(100):  # until the last process has let go of it
                if run("umount", folder).returncode == 0:
                    return
                time.sleep(0.1)
            raise AssertionError("cannot unmount")

        class Disk:
            path = folder

            def fail(self):
                descriptor = os.open(folder, os.O_RDONLY)
                fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
                os.close(descriptor)

            def restart(self):
                detach()
                attach()

            def stumble(self):
                """An error of the disk, after which ext4 is read-only."""
                device = Path(run("findmnt -no SOURCE", folder).stdout.strip()).name
                Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

        attach()
        try:
            yield Disk()
        finally:
            run("umount -l", folder)

    with mounting_alone():
        yield mount


def place(state):
    return (state["epoch"] + 1, (state.get("progress") or {"step": 0})["step"])


def saves(path):
    """The places of the saves that were over, from `noting_saves`."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split())) for line in lines]


def steps_shown(state):
    """The steps of TensorBoard's scalars up to a place of a run of 6 steps an epoch and a line every 2 steps."""
    epoch, step = place(state)
    return {
        int((e + s / 6) * 1000) for e in range(epoch + 1) for s in (2, 4, 6) if (e, s) <= (epoch, step) or e < epoch
    }


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_after_a_power_cut_all_that_was_saved_is_there(jobs, whole, mounted, tmp_path, count, kind):
    rng, crashes, number = random.Random(kind), 0, 0
    while crashes < CRASHES:
        with mounted(kind) as disk:
            run = disk.path / "out" / "deep" / "run"
            notes = tmp_path / "saves"
            notes.unlink(missing_ok=True)
            flags = (jobs["main_pretrain"], "--output_dir", run, "--resume auto --save_every_steps 1 --num_workers")
            flags += (rng.choice((0, 0, 2)),)
            for _ in range(8):
                number += 1
                started = Run("main_pretrain", flags, tmp_path / f"output_{number}", hurt=(noting_saves, notes))
                if crashes >= CRASHES or started.is_over(rng.uniform(0.3, 3.0)):
                    break
                disk.fail()
                if rng.random() < 0.5:
                    started.kill()
                status = started.wait(LIMIT)
                said = started.text()  # it may have come to its end at this moment
                assert "Traceback" not in said and (status or "Training time" in said), said[-2000:]
                disk.restart()
                crashes += 1
                bad = unloadable(run) if run.exists() else []
                assert count(f"power cuts, {kind}: all checkpoints load", not bad), bad
                state, path = load_latest(run) if run.exists() else (None, None)
                saved = saves(notes)
                kept = not saved or state is not None and place(state) >= saved[-1] and path.name == LATEST
                assert count(f"power cuts, {kind}: the last save is there", kept), (saved, state and place(state))
                if state is not None:
                    logged = [entry["epoch"] for entry in log_of(run)] if (run / "log.txt").exists() else []
                    epochs = list(range(state["epoch"] + 1))
                    assert count(f"power cuts, {kind}: log.txt is whole", logged[: len(epochs)] == epochs), logged
                    shown = set(scalars(run)) if steps_shown(state) else set()
                    whole_events = shown >= steps_shown(state)
                    assert count(f"power cuts, {kind}: TensorBoard is whole", whole_events), (shown, place(state))
            else:
                started = Run("main_pretrain", flags, tmp_path / "output_last")
            assert started.wait(120) == 0, started.text()[-2000:]
            same = differences(whole["main_pretrain"][0], run)
            assert count(f"runs with power cuts, {kind}: as if there had been none", same == []), same


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_an_exported_model_is_there_after_a_power_cut(whole, mounted, tmp_path, count, kind):
    with mounted(kind) as disk:
        source, folder = whole["main_finetune"][0] / "checkpoint_best.pth", disk.path / "new" / "model"
        finish("main_finetune", ("--export", folder, "--finetune", source), tmp_path / "output")
        disk.fail()
        disk.restart()
        exported = load_checkpoint(folder)["model"]
        good = all(torch.equal(value, exported[name]) for name, value in load_checkpoint(source)["model"].items())
        assert count("power cuts after an export: the model is whole", good and (folder / "README.md").stat().st_size)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["fails", "is read-only"])
def test_on_a_failing_disk_a_run_ends_and_goes_on_when_it_is_mended(
    jobs, whole, mounted, tmp_path, count, fault, workers
):
    for attempt in range(5):
        with mounted("ext4") as disk:
            run = disk.path / "run"
            flags = (jobs["main_pretrain"], "--output_dir", run, "--resume auto --save_every_steps 2")
            flags += ("--log_freq 1 --num_workers", workers)
            more = "--epochs 40 --save_epochs 40"
            started = Run("main_pretrain", (flags, more), tmp_path / f"output_{attempt}")
            until = time.monotonic() + 60
            while not (run / "checkpoint_previous.pth").exists() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(attempt / 7)
            disk.fail() if fault == "fails" else disk.stumble()
            status = started.wait(LIMIT)
            good = status in (1, 2) and "Traceback" not in started.text() and len(started.lines()) == 1
            assert count(f"disks that fail under a run, {workers} loader processes: one line", good), (
                status,
                started.text()[-2000:],
            )
            disk.restart()
            assert load_latest(run)[0] is not None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("writer", ["run", "tensorboard"])
def test_a_full_disk_under_one_of_the_files_is_one_line(jobs, mounted, tmp_path, count, writer, workers):
    with mounted("ext4") as disk:
        places = {"run": tmp_path / "run", "tensorboard": tmp_path / "run" / "tensorboard", writer: disk.path / "here"}
        with open(disk.path / "fill", "wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(2**16))
            file.truncate(file.tell() - (6 * 2**20 if writer == "run" else 2**14))
        flags = (jobs["main_pretrain"], "--output_dir", places["run"], "--log_dir", places["tensorboard"])
        flags += ("--resume auto --save_every_steps 1 --log_freq 1 --num_workers", workers)
        full = Run("main_pretrain", (flags, "--epochs 40 --save_epochs 40"), tmp_path / "output")
        status = full.wait(120)
        good = status in (1, 2) and len(full.lines()) == 1 and "No space left on device" in full.text()
        assert count(f"full disks, {workers} loader processes: one line", good), (status, full.text()[-2000:])
        assert "inline_container" not in full.text() and "Traceback" not in full.text()
        (disk.path / "fill").unlink()
        finish("main_pretrain", (flags, "--epochs 40 --save_epochs 40 --stop_epoch 2"), tmp_path / "again")
