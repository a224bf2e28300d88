# SPDX-License-Identifier: MIT
"""The event file, read as TensorBoard reads it."""

import io
import os
import resource
import signal
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.events import EventFile, warn_of_damage


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_scalars_and_images_come_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    events = EventFile(tmp_path / "new" / "folder")
    events.add_scalar("train_loss", 0.5, 1000)
    events.add_image("reconstruction", pixels, 1)
    events.flush()
    found = read(tmp_path / "new" / "folder")
    assert [(event.step, event.value) for event in found.Scalars("train_loss")] == [(1000, 0.5)]
    (image,) = found.Images("reconstruction")
    assert image.step == 1 and np.array_equal(np.array(Image.open(io.BytesIO(image.encoded_image_string))), pixels)
    events.close()


def test_what_is_added_can_be_read_before_anything_is_flushed(tmp_path):
    events = EventFile(tmp_path)
    events.add_scalar("lr", 1e-3, 5)
    assert read(tmp_path).Scalars("lr")[0].step == 5


def test_a_later_file_hides_what_an_earlier_one_says_from_its_step_on(tmp_path):
    first = EventFile(tmp_path)
    for step in (1, 2, 3):
        first.add_scalar("train_loss", step, step)
    first.close()
    second = EventFile(tmp_path, purge_step=3)
    second.add_scalar("train_loss", 30, 3)
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("train_loss")] == [(1, 1), (2, 2), (3, 30)]
    assert first.path != second.path


@pytest.mark.parametrize("seconds", [0, -86_400], ids=["in the same second", "a day earlier"])
def test_a_continued_run_is_shown_where_its_clock_is_behind(tmp_path, monkeypatch, seconds):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(os, "getpid", lambda: 999)
    first = EventFile(tmp_path)
    for step in (1, 2, 3):
        first.add_scalar("train_loss", step, step)
    first.close()
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    monkeypatch.setattr(os, "getpid", lambda: 1000)  # "1000" is sorted before "999"
    for value in (30, 300):
        again = EventFile(tmp_path, purge_step=3)
        again.add_scalar("train_loss", value, 3)
        again.close()
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("train_loss")] == [(1, 1), (2, 2), (3, 300)]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda content: b"", "empty; TensorBoard shows its first 0 events"),
        (lambda content: bytes(len(content)), "damaged; TensorBoard shows its first 0 events"),
        (lambda content: content[:-5], "damaged; TensorBoard shows its first 3 events"),
        (lambda content: content + bytes(100), "damaged; TensorBoard shows its first 4 events"),
    ],
    ids=["empty", "zeros", "cut off", "zeros at its end"],
)
def test_damaged_event_files_are_noticed_and_what_follows_them_is_shown(tmp_path, caplog, damage, said):
    first = EventFile(tmp_path)
    for step in (1, 2, 3):
        first.add_scalar("train_loss", step, step)
    first.close()
    warn_of_damage(tmp_path)
    assert not caplog.records
    first.path.write_bytes(damage(first.path.read_bytes()))
    warn_of_damage(tmp_path)
    (record,) = caplog.records
    assert str(first.path) in record.getMessage() and said in record.getMessage()
    second = EventFile(tmp_path, purge_step=4)
    second.add_scalar("train_loss", 4, 4)
    assert read(tmp_path).Scalars("train_loss")[-1].step == 4


def test_a_full_disk_raises_where_an_event_is_added_and_closing_does_not(tmp_path):
    events, limit = EventFile(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(events.path), limit[1]))
    try:
        with pytest.raises(OSError) as found:
            events.add_scalar("train_loss", 1, 1)
        events.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert found.value.filename == str(events.path) and "File too large" in str(found.value)
