# SPDX-License-Identifier: MIT
"""The main programs as real processes that start in a moment, and can be hurt at a chosen point.

A server that has imported them already forks one for each run, so that hundreds of runs can be killed and continued. The
process does what `python main_pretrain.py …` does after its imports, with one thread, so that bits can be compared.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch

from tests.helpers import ROOT
from tests.helpers.runs import argv

PROGRAMS = ("main_pretrain", "main_finetune")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.forked", *PROGRAMS])


def _run(program, flags, output, env, hurt):
    """The body of the process: the program's output goes to a file, and its exit status is that of the process."""
    os.environ.update(env)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as without a server
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    sys.argv = [f"{program}.py", *flags]
    torch.set_num_threads(1)
    from common.ending import run_program

    main = importlib.import_module(program).main
    if hurt is not None:
        hurt[0](*hurt[1:])
    try:
        status = run_program(main)
    except SystemExit as end:
        status = end.code
    multiprocessing.util._exit_function()  # as at the end of a program: loader processes are waited for
    os._exit(status or 0)


class Run:
    """A run of a program, "main_pretrain" or "main_finetune". hurt: (function, arguments …) called in it before main()."""

    def __init__(self, program, flags, output, env=None, hurt=None):
        self.output = Path(output)
        self.process = _context.Process(target=_run, args=(program, argv(flags), str(output), env or {}, hurt))
        self.process.start()

    def wait(self, seconds=300):
        """The exit status, negative for a signal; a run that does not end in time is killed, and that is a failure."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"no end within {seconds} s: {self.text()[-2000:]}")
        return self.process.exitcode

    def is_over(self, seconds):
        """Whether it ends within this time."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.process.pid, number)

    def text(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def lines(self):
        """What it said besides its log: the lines that do not begin with a clock."""
        return [line for line in self.text().splitlines() if line and line[0] != "["]


def finish(program, flags, output, env=None, hurt=None):
    """Run a program to its good end."""
    run = Run(program, flags, output, env, hurt)
    assert run.wait() == 0, run.text()[-3000:]
    return run


def start_ranks(program, flags, output, world_size=2, hurt=None, own=None):
    """Runs of all ranks of a job, as torchrun would start them, but with nobody to end those that are left behind.

    hurt: {rank: (function, arguments …)}. own: {rank: flags of its own, besides those of all}.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = []
    for rank in range(world_size):
        env = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        env = {name: str(value) for name, value in env.items()}
        runs.append(Run(program, (flags, (own or {}).get(rank, ())), f"{output}.{rank}", env, (hurt or {}).get(rank)))
    return runs


def finish_ranks(program, flags, output, world_size=2):
    """Run a job of several ranks to its good end. Returns their runs."""
    runs = start_ranks(program, flags, output, world_size)
    assert [run.wait() for run in runs] == [0] * world_size, "\n".join(run.text()[-3000:] for run in runs)
    return runs


# ---- What may happen to a run, called in its process ---------------------------------------------


def _at_step(number, act):
    """Have act() called in the middle of a step, the `number`-th that this process takes, counted from 1."""
    from util.optimization import StepRecord

    taken, add = [0], StepRecord.add

    def counting(self, *args):
        taken[0] += 1
        if taken[0] == number:
            act()
        add(self, *args)

    StepRecord.add = counting


def signalled_at_step(number, which):
    _at_step(number, lambda: os.kill(os.getpid(), which))


def failing_at_step(number, error):
    def fail():
        raise error

    _at_step(number, fail)


def without_room_from_step(number, most_bytes):
    """From a step on no file can have more than so many bytes, as if the disk were full there."""
    _at_step(number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)))


def signalled_in_evaluation(number, which):
    """A signal during the batch of this number, counted from 1, of the first evaluation."""
    import engine_finetune

    seen, prepare = [0], engine_finetune.prepare_images

    def counting(prepare_batch, images, device, ids=None, epoch=None):
        seen[0] += ids is None
        if seen[0] == number and ids is None:
            os.kill(os.getpid(), which)
        return prepare(prepare_batch, images, device, ids, epoch)

    engine_finetune.prepare_images = counting


def noting_samples(path, then=None, *args):
    """Write the epoch and the ids of each batch that is trained on into a file; also do something else."""
    from batch_preparation import BatchPreparation

    arrange = BatchPreparation.arrange

    def noting(self, sar_db, ids, epoch):
        if ids is not None:
            with open(path, "a") as file:
                file.write(f"{epoch}: {' '.join(map(str, ids.tolist()))}\n")
        return arrange(self, sar_db, ids, epoch)

    BatchPreparation.arrange = noting
    if then is not None:
        then(*args)


def failing_files(pattern, number, calls=0):
    """Files whose names match cannot be opened for writing, after so many were: the disk is full (ENOSPC) or broken (EIO)."""
    import builtins

    opened, really_open = [0], open

    def failing_open(file, mode="r", *args, **kwargs):
        if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax") and fnmatch(os.path.basename(file), pattern):
            opened[0] += 1
            if opened[0] > calls:
                raise OSError(number, os.strerror(number), os.fspath(file))
        return really_open(file, mode, *args, **kwargs)

    builtins.open = failing_open


def with_a_clock_behind(seconds):
    """The clock of this process."""
    now = time.time
    time.time = lambda: now() - seconds


def with_other_code():
    """The program's source files are others than those of the other ranks."""
    import util.program

    util.program.code_version = lambda: "0123456789ab"


def noting_saves(path):
    """Write the place of each save that is over, epoch and step, into a file."""
    import util.run_directory

    save = util.run_directory.save_checkpoint

    def noting(folder, state, names=()):
        save(folder, state, names)
        with open(path, "a") as file:
            file.write(f"{state['epoch'] + 1} {(state.get('progress') or {'step': 0})['step']}\n")

    util.run_directory.save_checkpoint = noting


def with_a_bad_loss_at_step(number):
    """The loss of this rank, at a step counted from 1, is not a number."""
    from util.optimization import StepRecord

    taken, add = [0], StepRecord.add

    def spoiling(self, step, loss, grad_norm):
        taken[0] += 1
        add(self, step, loss * (float("nan") if taken[0] == number else 1), grad_norm)

    StepRecord.add = spoiling


# ---- anywhere in the program


def _replace(place, make):
    """Put make(function) in the place of a function, "module:name" or "module:Class.name"."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, make(getattr(owner, name)))


def _before(place, act, calls):
    """Have act() called before a function, each time after it was called so many times in a process."""

    def make(function):
        done = [0]

        def call(*args, **kwargs):
            done[0] += 1
            if done[0] > calls:
                act()
            return function(*args, **kwargs)

        return call

    _replace(place, make)


def failing_in(place, error, calls=0):
    """A function raises, after it was called so many times."""

    def fail():
        raise error

    _before(place, fail, calls)


def signalled_in(place, which, calls=0):
    """A signal comes before a function, after it was called so many times."""
    _before(place, lambda: os.kill(os.getpid(), which), calls)


def hanging_in(place, calls=0, patience=1, signal_parent=None):
    """A function does not return; the parent process may then be sent a signal, when it has used up what was loaded before."""
    import util.stopping

    util.stopping.PATIENCE = patience

    def hang():
        time.sleep(2)
        if signal_parent is not None:
            os.kill(os.getppid(), signal_parent)
        time.sleep(1000)

    _before(place, hang, calls)


def hanging_in_evaluation(place, *args):
    """As `hanging_in`, from the moment an evaluation begins."""
    _before("evaluation:build_test_loader", lambda: hanging_in(place, *args), 0)


def taking_graphs_only():
    """torch.compile takes graphs of forward and backward as ever, and executes them as they are."""
    import models_mixmim

    compiled = models_mixmim.Blocks.compile
    models_mixmim.Blocks.compile = lambda self, mode, dynamic: compiled(self, backend="aot_eager", dynamic=dynamic)


def with_few_descriptors(count):
    """So many more files than now can be open, and no more."""
    limit = len(os.listdir("/proc/self/fd")) + count
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
