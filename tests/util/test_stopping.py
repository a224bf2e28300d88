# SPDX-License-Identifier: MIT
"""When a run saves in mid-epoch and when it ends, by a clock that the tests set."""

import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import util.stopping
from common.errors import Stopped
from util.distributed import Launch, Ranks
from util.stopping import Stopping, process_age

ALONE = Ranks(Launch(), torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """clock.now: what `time.monotonic` says; the process is then 100 s old at 0."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(util.stopping.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(util.stopping, "process_age", lambda: 100.0)
    return clock


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is not ignored, as it is where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopping(every_steps=None, every_minutes=0, walltime=None, state_bytes=0):
    return Stopping(
        SimpleNamespace(save_every_steps=every_steps, save_every_minutes=every_minutes, walltime=walltime),
        ALONE,
        state_bytes,
    )


def steps_of_a_run(under_test, clock, seconds=10, epochs=2, steps=8, save_seconds=0):
    """The steps, counted over the run, after which a run saves whose steps all take this long; and where it ended."""
    saved = []

    def save(place):
        saved.append(place)
        clock.now += save_seconds

    try:
        for epoch in range(epochs):
            for done in range(1, steps):
                clock.now += seconds
                place = epoch * steps + done
                under_test.check(f"epoch {epoch}, step {done}/{steps}", partial(save, place), place)
            clock.now += seconds
            under_test.timed(partial(save, f"epoch {epoch}"))
            under_test.check(f"epoch {epoch + 1}, step 0/{steps}")
    except Stopped as error:
        return saved, str(error)
    return saved, None


def test_by_default_only_the_clock_and_the_end_of_an_epoch_save(clock):
    assert steps_of_a_run(stopping(), clock) == (["epoch 0", "epoch 1"], None)


def test_saves_by_steps_are_counted_over_the_run(clock):
    assert steps_of_a_run(stopping(every_steps=3), clock)[0] == [3, 6, "epoch 0", 9, 12, 15, "epoch 1"]


def test_saves_by_time_are_counted_from_the_last_save(clock):
    assert steps_of_a_run(stopping(every_minutes=0.5), clock)[0] == [3, 6, "epoch 0", 11, 14, "epoch 1"]


def test_the_walltime_leaves_room_for_two_more_steps_and_two_saves(clock):
    saved, said = steps_of_a_run(
        stopping(walltime=5), clock
    )  # 300 s, of which 100 had passed; 180 + 2 · 10 is not after them
    assert (saved, said) == (["epoch 0", "epoch 1"], None)
    clock.now = 0.0
    saved, said = steps_of_a_run(stopping(walltime=4), clock)  # 130 + 2 · 10 > 140
    assert saved == ["epoch 0", 13] and said.startswith("--walltime is nearly over: ended in epoch 1, step 5/8")
    clock.now = 0.0
    saved, said = steps_of_a_run(stopping(walltime=4), clock, save_seconds=10)  # 110 + 2 · (10 + 10) > 140
    assert saved == ["epoch 0", 10] and "epoch 1, step 2/8" in said
    clock.now = 0.0
    saved, _ = steps_of_a_run(stopping(walltime=4, state_bytes=int(1.5e9)), clock)  # 30 s, until it is known better
    assert saved == [7]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_next_pause_and_then_ends_the_run(number, status):
    before, saved = signal.getsignal(number), []
    under_test = stopping()
    with (
        pytest.raises(Stopped, match=f"{number.name}: ended in epoch 0, step 1/8, and the state is saved") as end,
        under_test,
    ):
        signal.raise_signal(number)
        assert saved == []
        under_test.check("epoch 0, step 1/8", partial(saved.append, "state"), 1)
    assert saved == ["state"] and end.value.status == status and signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stopping():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping() as under_test:
        signal.raise_signal(signal.SIGINT)
        under_test.check("epoch 1, step 0/8")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_where_all_is_saved_nothing_is_saved_again(clock):
    with stopping() as under_test, pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
        under_test.check("epoch 1, step 0/8")


def test_the_age_of_this_process():
    assert 0 < process_age() < 24 * 3600
