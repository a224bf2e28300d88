# SPDX-License-Identifier: MIT
"""When a run saves in mid-epoch, and when it ends early: by the clock, by --walltime, by a signal."""

import collections
import contextlib
import os
import signal
import time

from common.command_line import non_negative, positive, positive_int
from common.errors import Interrupted, Stopped

# What a rank asks for. Higher numbers are the exit status of the signal it received (128 + its number).
NOTHING, SAVE, WALLTIME = 0, 1, 2
# At these a run saves and ends. mpirun forwards SIGUSR1 and SIGUSR2, and ends all ranks at any of the others; a
# terminal that is closed sends SIGHUP; batch systems send SIGUSR2 or SIGXCPU, if told to, some time before the walltime
# is over.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
PATIENCE = 5  # seconds that a signal waits for a batch
DISK_SPEED = 50e6  # bytes/s assumed of a save until one was timed
RECENT = 16  # checks whose distance tells how long the next step may take


def add_stopping_flags(group):
    """Flags that say when a run saves in mid-epoch, and when it ends early."""
    group.add_argument(
        "--save_every_steps",
        type=positive_int,
        metavar="N",
        help="also save after every N steps within an epoch (default: only by time)",
    )
    group.add_argument(
        "--save_every_minutes",
        type=non_negative,
        default=15,
        metavar="MIN",
        help="also save within an epoch, this many minutes after the last save; 0: only at the end of each epoch",
    )
    group.add_argument(
        "--walltime",
        type=positive,
        metavar="MIN",
        help="save and end, with exit status 0, before the program has run for this many minutes; continue with "
        "--resume auto",
    )


def process_age():
    """Seconds since this process was started, its imports included."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19])  # in clock ticks since the machine was; see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def catch(handler, signals):
    """Handles these signals, except those that are ignored: nohup ignores SIGHUP, a script its background Ctrl-C.

    Returns the handlers before.
    """
    return {number: signal.signal(number, handler) for number in signals if signal.getsignal(number) != signal.SIG_IGN}


class Stopping:
    """Saves and ends a run between two steps, where all ranks call the same methods.

    Within the `with` block, SIGNALS wait for the next `check`. A signal that arrives while the process waits for a
    batch (`waiting_for_data`), or before, waits PATIENCE seconds for it. Then a single process raises Interrupted
    there, and checks; one of several ranks ends alone, as it cannot save without the others. A second Ctrl-C does not
    wait. A signal or a clock of one rank counts for all: they agree on it in the background, one check later than it
    came.

    config: save_every_steps, save_every_minutes, walltime (minutes). state_bytes: the size of a checkpoint, as far as
    known.
    """

    _active = None  # the one whose `with` block the process is in

    def __init__(self, config, ranks, state_bytes):
        self.every_steps = config.save_every_steps
        self.every_seconds = config.save_every_minutes * 60 or None
        self.ranks = ranks
        self._ends_at = None
        if config.walltime is not None:
            self._ends_at = time.monotonic() - process_age() + 60 * config.walltime
        self._signal, self._handlers, self._waiting = None, {}, False
        self._longest_save = state_bytes / DISK_SPEED
        self._saved = self._checked = time.monotonic()
        self._distances = collections.deque(maxlen=RECENT)

    def __enter__(self):
        self._handlers = {
            **catch(self._on_signal, SIGNALS),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self._on_alarm),
        }
        Stopping._active = self
        return self

    def __exit__(self, *_):
        Stopping._active = None
        signal.alarm(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self, where, save=None, steps=None):
        """Calls save() if that is due, and raises Stopped, on all ranks alike, if the run is to end.

        where: the place in the run, for people. save: None where everything is saved already. steps: those of the run
        so far, where --save_every_steps counts; None elsewhere.
        """
        due = bool(self.every_steps) and steps is not None and steps % self.every_steps == 0
        wish = self.ranks.agree(self._wish())
        ends = wish >= WALLTIME
        if save is not None and (ends or due or wish == SAVE):
            self.timed(save)
        if ends:
            reason = "--walltime is nearly over" if wish == WALLTIME else signal.Signals(wish - 128).name
            raise Stopped(
                f"{reason}: ended in {where}, and the state is saved; continue with --resume auto",
                0 if wish == WALLTIME else wish,
            )

    def timed(self, save):
        """Calls save(), and notes how long it takes."""
        started = time.monotonic()
        save()
        self._saved = time.monotonic()
        self._longest_save = max(self._longest_save, self._saved - started)
        self._checked += self._saved - started  # it is not part of a step
        self.ranks.forget_agreement()  # what was wished for before

    @staticmethod
    @contextlib.contextmanager
    def waiting_for_data():
        """Whoever takes a batch from its loader does so in this block. Signals concern the whole process."""
        stopping = Stopping._active
        if stopping is None:
            yield
            return
        stopping._waiting = True
        if stopping._signal is not None:
            signal.alarm(PATIENCE)
        try:
            yield
        finally:
            stopping._waiting = False

    def _on_signal(self, number, _):
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
        if self._waiting:
            signal.alarm(PATIENCE)

    def _on_alarm(self, *_):
        if not self._waiting or self._signal is None:
            return
        if self.ranks.world_size == 1:
            raise Interrupted
        name = signal.Signals(self._signal).name
        raise Stopped(
            f"{name}: rank {self.ranks.rank} ended while it waited for a batch, as the other ranks wait for it; this "
            "state was not saved: --resume auto continues from the last checkpoint",
            128 + self._signal,
            on_all_ranks=False,
        )

    def _wish(self):
        now = time.monotonic()
        self._distances.append(now - self._checked)
        self._checked = now
        if self._signal is not None:
            return 128 + self._signal
        # There may be two more steps, as ranks agree one check later, and then a save.
        if self._ends_at is not None and now + 2 * (max(self._distances) + self._longest_save) > self._ends_at:
            return WALLTIME
        if self.every_seconds is not None and now - self._saved >= self.every_seconds:
            return SAVE
        return NOTHING
