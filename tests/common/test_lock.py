# SPDX-License-Identifier: MIT
"""The lock of a folder: one holder at a time, on one machine and on several; dead holders, damaged and odd lock files.

Another machine is a process for which the kernel's locks are not in the way and whose boot id is another.
"""

import multiprocessing
import os
import time

import pytest

from common import lock
from common.errors import TrainingError, UsageError
from common.lock import LOCK, FolderLock, read_holder

HERE = f"{os.uname().nodename} pid {os.getpid()}"


def lock_file(name, boot=None):
    return f"{name}\n{lock._boot() if boot is None else boot} 0123abcd\n"


def be_another_machine(number=1, locks=False):
    """This process is on a machine of its own, which knows its own kernel locks only, or has none."""
    lock._boot = lambda: f"{number:08x}"
    lock._is_locked = lambda path: False if locks else None


@pytest.fixture
def on_another_machine(monkeypatch):
    """A function after which this process is on another machine, until the test ends."""
    monkeypatch.setattr(lock, "_boot", lock._boot)
    monkeypatch.setattr(lock, "_is_locked", lock._is_locked)
    return be_another_machine


@pytest.fixture
def hurried(monkeypatch):
    """A holder without a sign of life is dead after a moment."""
    monkeypatch.setattr(lock, "TAKE_OVER", 0.4)
    monkeypatch.setattr(lock, "CREATION", 0.2)


def test_the_file_names_its_holder_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "4711.pbs \x1b[31m")
    held = FolderLock(tmp_path)
    assert held.acquire("--out") == ""
    assert read_holder(tmp_path / LOCK).name == f"{HERE} job 4711.pbs??[31m"
    with pytest.raises(UsageError, match=f"--out is in use by another run .{HERE} job 4711.*; wait for it or choose"):
        FolderLock(tmp_path).acquire("--out")
    held.check()
    held.release()
    held.release()
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).acquire("--out")


@pytest.mark.parametrize(
    "content, any_host",
    [
        (lock_file(f"{os.uname().nodename} pid 1"), False),
        (lock_file("another-container pid 4711 job 12"), False),  # of this machine, by its boot id
        (f"{os.uname().nodename} pid 4711\n", False),  # as older versions wrote it
        (lock_file("node17 pid 4711", "0f"), True),
        ("", True),
    ],
)
def test_a_dead_holder_of_this_machine_is_not_waited_for(tmp_path, content, any_host):
    (tmp_path / LOCK).write_text(content)
    held = FolderLock(tmp_path)
    assert held.acquire("--out", any_host) == (content.split("\n")[0] or "an unknown run")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK] and HERE in (tmp_path / LOCK).read_text()
    held.release()


@pytest.mark.parametrize(
    "content",
    [b"", b"  \n", bytes(200), b"\xff\xfe", b"A" * 10**6, b"\x1b]0;pwn\x07\x1b[31mred\n", b"node17 pid 4711\n"]
    + [lock_file("node17 pid 4711", "0f").encode()],
    ids=["empty", "blank", "zeros", "no text", "a megabyte", "escapes", "another machine, older", "another machine"],
)
def test_damaged_files_and_other_machines_are_watched_and_then_taken_over(tmp_path, hurried, content):
    (tmp_path / LOCK).write_bytes(content)
    began = time.monotonic()
    held = FolderLock(tmp_path)
    assert held.acquire("--out") == ("node17 pid 4711" if b"node17" in content else "an unknown run")
    assert time.monotonic() - began >= (0.4 if b"node17" in content else 0.2)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    held.release()


def test_whoever_gives_a_sign_of_life_is_not_dead(tmp_path, monkeypatch, hurried, on_another_machine):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    held = FolderLock(tmp_path)
    held.acquire("--out")
    on_another_machine()
    with pytest.raises(UsageError, match=f"in use by another run .{HERE}"):
        FolderLock(tmp_path).acquire("--out")
    held.check()
    held.release()


def test_a_lock_that_is_released_while_it_is_watched_is_taken(tmp_path, monkeypatch, hurried, on_another_machine):
    held, found = FolderLock(tmp_path), []
    held.acquire("--out")
    on_another_machine()
    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(held.release()))
    assert FolderLock(tmp_path).acquire("--out") == "" and found


def test_a_run_that_was_suspended_notices_that_another_has_taken_over(tmp_path, hurried, on_another_machine):
    suspended, other = FolderLock(tmp_path), FolderLock(tmp_path)
    suspended.acquire("--out")
    on_another_machine()
    assert other.acquire("--out") == HERE
    with pytest.raises(TrainingError, match=f"{LOCK}: {HERE} has taken over this folder.*writes nothing more there"):
        suspended.check()
    suspended.release()
    other.check()
    other.release()


def test_a_lock_that_was_removed_by_hand_is_made_anew(tmp_path, caplog):
    held = FolderLock(tmp_path)
    held.acquire("--out")
    (tmp_path / LOCK).unlink()
    held.check()
    assert "was removed" in caplog.text and HERE in (tmp_path / LOCK).read_text()
    with pytest.raises(UsageError, match="in use"):
        FolderLock(tmp_path).acquire("--out")
    held.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_refused_and_not_followed(tmp_path, kind):
    (tmp_path / "elsewhere").write_text("mine")
    match kind:
        case "link":
            (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
        case "folder":
            (tmp_path / LOCK).mkdir()
        case "pipe":
            os.mkfifo(tmp_path / LOCK)
    with pytest.raises(UsageError, match=rf"\{LOCK}: is not a plain file, .*; remove it"):
        FolderLock(tmp_path).acquire("--out")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_claim_that_a_killed_run_left_is_taken_over_too(tmp_path):
    (tmp_path / LOCK).write_text(lock_file("dead pid 1"))
    holder = read_holder(tmp_path / LOCK)
    removal = holder.remove
    os_unlink, os.unlink = os.unlink, None  # as if it were killed before it removes the lock
    try:
        with pytest.raises(TypeError):
            removal()
    finally:
        os.unlink = os_unlink
    (claim,) = (path for path in tmp_path.iterdir() if path.name != LOCK)
    claim.unlink()
    claim.write_text(lock_file("dead pid 2"))
    assert FolderLock(tmp_path).acquire("--out") == "dead pid 1"
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


# ---- Races ---------------------------------------------------------------------------------------

RIVALS = 4


def compete(folder, number, rounds, barrier, results, dead):
    """A process on a machine of its own: takes part in each round, and holds what it gets until the next one."""
    be_another_machine(number, locks=dead)
    lock.TAKE_OVER = 0.3
    lock.HEARTBEAT = 0.02
    for k in range(rounds):
        held = FolderLock(folder / str(k))
        barrier.wait()
        try:
            held.acquire("--out")
            got = True
        except UsageError:
            got = False
        results.put((k, got))
        barrier.wait()
        held.release()


@pytest.mark.parametrize("dead", [False, True], ids=["free", "of a dead run"])
def test_of_several_machines_one_gets_a_lock(tmp_path, campaign, count, dead):
    rounds = (10, 100)[campaign]
    for k in range(rounds):
        (tmp_path / str(k)).mkdir()
        if dead:
            (tmp_path / str(k) / LOCK).write_text(lock_file("node17 pid 4711", "0f"))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(RIVALS), context.Queue()
    rivals = [
        context.Process(target=compete, args=(tmp_path, n, rounds, barrier, results, dead)) for n in range(RIVALS)
    ]
    for rival in rivals:
        rival.start()
    winners = [0] * rounds
    for _ in range(rounds * RIVALS):
        k, got = results.get(timeout=60)
        winners[k] += got
    for rival in rivals:
        rival.join()
    what = (
        "locks that a dead run left, for which machines race: one gets it" if dead else "locks raced for: one gets it"
    )
    assert all([count(what, number == 1) for number in winners]), winners
    assert not list(tmp_path.rglob(f"{LOCK}*"))
