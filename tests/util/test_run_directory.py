# SPDX-License-Identifier: MIT
"""The output directory: one run at a time, nothing overwritten unasked, logs cut to the resumed epoch."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from common import lock
from common.errors import TrainingError, UsageError
from util.distributed import Launch, Ranks
from util.run_directory import RunDirectory
from util.training import Start

ALONE = Ranks(Launch(), torch.device("cpu"))
HOLD = (
    "import sys, time, torch; from util.distributed import Launch, Ranks; from util.run_directory import RunDirectory\n"
    "run = RunDirectory(sys.argv[1], Ranks(Launch(), torch.device('cpu'))); run.open(); print('held', flush=True); time.sleep(100)"
)


def run(path, epochs, start_epoch=0, resume=False, overwrite=False):
    """A run that saves some epochs."""
    directory = RunDirectory(path, ALONE)
    directory.open(resume, overwrite)
    directory.begin({"what": f"from {start_epoch}"}, Start(start_epoch), steps=1, overwrite=overwrite)
    for epoch in range(start_epoch, epochs):
        directory.save(
            {"model": {}, "epoch": epoch}, {"train_loss": 1.0, "epoch": epoch}, (f"checkpoint_{epoch + 1}.pth",)
        )
    directory.close()


def refused(path, match, **kwargs):
    with pytest.raises(UsageError, match=match) as error:
        RunDirectory(path, ALONE).open(**kwargs)
    assert "\n" not in str(error.value)


def epochs_logged(path):
    return [json.loads(line)["epoch"] for line in (path / "log.txt").read_text().splitlines()]


def test_a_directory_with_a_run_is_refused_and_left_as_it_was(tmp_path):
    run(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    refused(tmp_path, "already holds a run.*--resume auto.*--overwrite")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run(tmp_path, 3)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "my_checkpoint.pth").write_text("mine too")
    run(tmp_path, 1, overwrite=True)
    assert epochs_logged(tmp_path) == [0] and not (tmp_path / "checkpoint_3.pth").exists()
    assert (tmp_path / "notes.md").exists() and (tmp_path / "my_checkpoint.pth").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_continued_run_cuts_the_log_back_and_keeps_the_earlier_record(tmp_path):
    run(tmp_path, 4)
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"train_loss": 1.0, "epo')  # killed while writing
    (tmp_path / ".checkpoint.pth.4711.tmp").write_text("half")
    run(tmp_path, 3, start_epoch=2, resume=True)
    assert not list(tmp_path.glob(".*.tmp"))
    assert epochs_logged(tmp_path) == [0, 1, 2]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["what"] == "from 2" and [part["what"] for part in record["earlier"]] == ["from 0"]


def test_epochs_that_the_log_lacks_are_named_if_the_run_was_in_this_folder(tmp_path, caplog):
    run(tmp_path / "old", 3)
    (tmp_path / "old" / "log.txt").write_text('{"train_loss": 1.0, "epoch": 1}\n')
    for folder, warnings in (("old", 1), ("new", 0)):
        caplog.clear()
        with RunDirectory(tmp_path / folder, ALONE) as directory:
            directory.open(resume=True)
            directory.begin({}, Start(3, source=tmp_path / "old" / "checkpoint_3.pth"), steps=1)
        assert caplog.text.count("has no line for 2 finished epochs: 0, 2") == warnings


def test_two_runs_in_one_directory_exactly_one_gets_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refused(tmp_path, f"in use by another run .*pid {holder.pid}")
        refused(tmp_path, "in use by another run", overwrite=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunDirectory(tmp_path, ALONE).open()  # a killed holder leaves its name, but not the lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_outside_of_training_frees_the_folder(tmp_path, number):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(number)
    assert holder.wait() == 128 + number
    assert holder.stderr.read() == f"ended by {number.name}; continue with --resume auto\n"
    with RunDirectory(tmp_path, ALONE) as second:
        second.open()


def test_loader_processes_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path):
    fork = HOLD.replace("print('held'", "import os; os.fork() or time.sleep(100); print('held'")
    holder = subprocess.Popen(
        [sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunDirectory(tmp_path, ALONE) as second:
            second.open()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_run_that_another_machine_has_taken_over_writes_nothing_more(tmp_path, monkeypatch):
    """As it may be after it was suspended for minutes."""
    suspended, other = RunDirectory(tmp_path, ALONE), RunDirectory(tmp_path, ALONE)
    monkeypatch.setattr(lock, "TAKE_OVER", 0.2)
    with pytest.raises(TrainingError, match="has taken over this folder"), suspended:
        suspended.open()
        suspended.begin({"what": "suspended"}, Start(0), steps=1)
        monkeypatch.setattr(lock, "_is_locked", lambda path: None)
        monkeypatch.setattr(lock, "_boot", lambda: "0f")
        with other:
            other.open(resume=True)
            other.begin({"what": "other"}, Start(0), steps=1)
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            suspended.save({"model": {}, "epoch": 0}, {"epoch": 0})
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before if now.get(path) != before[path]} == {"run.json", ".lock"}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["what"] == "other" and record["outcome"].startswith("failed: ")


def test_a_folder_that_cannot_be_made_is_one_line():
    refused("/proc/version/run", "--output_dir /proc/version/run")


@pytest.mark.parametrize(
    "log_dir, reason", [("{}/file/logs", "Not a directory"), ("/proc", "No such file or directory")]
)
def test_a_log_folder_that_cannot_be_written_is_told_before_an_earlier_run_is_removed(tmp_path, log_dir, reason):
    run(tmp_path / "run", 2)
    (tmp_path / "file").touch()
    directory = RunDirectory(tmp_path / "run", ALONE)
    directory.open(overwrite=True)
    with pytest.raises(
        UsageError, match=f"--log_dir {log_dir.format(tmp_path)}: {reason}; choose a folder that can be written"
    ):
        directory.begin({}, Start(0), steps=1, log_dir=log_dir.format(tmp_path), overwrite=True)
    directory.close()
    assert epochs_logged(tmp_path / "run") == [0, 1] and (tmp_path / "run" / "checkpoint_2.pth").exists()
