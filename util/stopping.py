# SPDX-License-Identifier: MIT
"""What may come between two steps: a checkpoint that is due, or the end of a run that was asked to end."""

import collections
import contextlib
import os
import signal
import time

from common.errors import Interrupted, Stopped

# What a rank wishes for. Above these: the exit status of the signal it received (128 + its number).
NOTHING, SAVE, WALLTIME = 0, 1, 2
# At which a run saves and ends. mpirun hands on SIGUSR1 and SIGUSR2, and ends all ranks at any of the others; a terminal that is
# closed sends SIGHUP; batch systems send SIGUSR2 or SIGXCPU, if told to, some time before the walltime is over.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
PATIENCE = 5  # seconds that a signal waits for a batch to come
DISK_SPEED = 50e6  # bytes/s that a save is taken for until one was timed
RECENT = 16  # pauses whose distance tells how long the next step may take


def add_pause_flags(group):
    """Flags that say when a run saves in mid-epoch, and when it ends early."""
    group.add_argument(
        "--save_every_steps",
        type=int,
        metavar="N",
        help="also save after every N steps, in mid-epoch (default: by time alone)",
    )
    group.add_argument(
        "--save_every_minutes",
        type=float,
        default=15,
        metavar="MIN",
        help="also save when this long has passed since the last save; 0: at the end of an epoch only",
    )
    group.add_argument(
        "--walltime",
        type=float,
        metavar="MIN",
        help="save and end, with status 0, before this many minutes have passed since the program was started; "
        "continue with --resume auto",
    )


def process_age():
    """Seconds since this process was started, its imports included."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19])  # in clock ticks since the machine was; see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def catch(handler, signals):
    """Handle these signals, but those that are ignored: nohup ignores SIGHUP, a script's background Ctrl-C. Returns the handlers before."""
    return {number: signal.signal(number, handler) for number in signals if signal.getsignal(number) != signal.SIG_IGN}


class Pauses:
    """Between steps, all ranks call the same methods; within the `with` block SIGNALS wait for the next pause.

    A signal that comes while a batch is waited for (`waiting_for_data`), or before, waits PATIENCE seconds for it. Then a single
    process raises Interrupted there, and pauses; one of several ranks ends alone, as it cannot save without the others.

    args: save_every_steps, save_every_minutes, walltime (minutes). state_bytes: the size of a checkpoint, as far as known.
    A signal or a clock of one rank counts for all: they agree on it in the background, one pause later than it came.
    A second Ctrl-C does not wait.
    """

    _active = None  # the one whose `with` block the process is in

    def __init__(self, args, ranks, state_bytes):
        self.every_steps = args.save_every_steps
        self.every_seconds = args.save_every_minutes * 60 or None
        self.ranks = ranks
        self._ends_at = None if args.walltime is None else time.monotonic() - process_age() + 60 * args.walltime
        self._signal, self._handlers, self._waiting = None, {}, False
        self._longest_save = state_bytes / DISK_SPEED
        self._saved = self._paused = time.monotonic()
        self._distances = collections.deque(maxlen=RECENT)

    def __enter__(self):
        self._handlers = {
            **catch(self._on_signal, SIGNALS),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self._on_alarm),
        }
        Pauses._active = self
        return self

    def __exit__(self, *_):
        Pauses._active = None
        signal.alarm(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

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
            f"{name}: rank {self.ranks.rank} ended while it waited for a batch, as the other ranks wait for it; this state was not "
            f"saved: --resume auto continues from the last checkpoint",
            128 + self._signal,
            on_all_ranks=False,
        )

    @staticmethod
    @contextlib.contextmanager
    def waiting_for_data():
        """What takes a batch from its loader does so in this block, wherever it is: signals concern the whole process."""
        pauses = Pauses._active
        if pauses is None:
            yield
            return
        pauses._waiting = True
        if pauses._signal is not None:
            signal.alarm(PATIENCE)
        try:
            yield
        finally:
            pauses._waiting = False

    def save(self, work):
        """Do the work of saving, and take its time."""
        started = time.monotonic()
        work()
        self._saved = time.monotonic()
        self._longest_save = max(self._longest_save, self._saved - started)
        self._paused += self._saved - started  # it is not part of a step
        self.ranks.forget_agreement()  # what was wished for before

    def between_steps(self, epoch, steps, save):
        """What `run_steps` calls between two steps: saves what is due, and ends the run if that was asked for.

        steps: of an epoch. save(progress): saves in the middle of this epoch, progress as of `run_steps`. What it raises, and
        Stopped, is raised on all ranks alike.
        """

        def between(done, progress):
            due = bool(self.every_steps) and (epoch * steps + done) % self.every_steps == 0
            self.pause(f"epoch {epoch}, step {done}/{steps}", lambda: save(progress()), due)

        return between

    def pause(self, where, work=None, due=False):
        """Have work() save if that is due, and end if that was asked for. work None: everything is saved already.

        where: the place in the run, for people. Raises Stopped, on all ranks alike, when the run is to end.
        """
        wish = self.ranks.agree(self._wish())
        ends = wish >= WALLTIME
        if work is not None and (ends or due or wish == SAVE):
            self.save(work)
        if ends:
            reason = "--walltime is nearly over" if wish == WALLTIME else signal.Signals(wish - 128).name
            raise Stopped(
                f"{reason}: ended in {where}, and all is saved; go on with --resume auto",
                0 if wish == WALLTIME else wish,
            )

    def _wish(self):
        now = time.monotonic()
        self._distances.append(now - self._paused)
        self._paused = now
        if self._signal is not None:
            return 128 + self._signal
        # There may be two more steps, as ranks agree one pause later, and then a save.
        if self._ends_at is not None and now + 2 * (max(self._distances) + self._longest_save) > self._ends_at:
            return WALLTIME
        if self.every_seconds is not None and now - self._saved >= self.every_seconds:
            return SAVE
        return NOTHING
