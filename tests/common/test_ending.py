# SPDX-License-Identifier: MIT
"""However a main program ends, it says why in one line, with its status, and leaves no process behind."""

import errno
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import util.datasets
from common.console import LOG, _ClockFormatter
from common.ending import describe, leave, run_program
from common.errors import UsageError, reason_of
from tests.helpers import ROOT
from tests.helpers.forked import (
    Run,
    failing_in,
    finish,
    hanging_in,
    hanging_in_evaluation,
    signalled_at_step,
    start_ranks,
    with_few_descriptors,
)
from tests.helpers.resumed import differences
from tests.helpers.runs import same_states
from util.checkpoint import LATEST, load_checkpoint

pytestmark = pytest.mark.slow

BOUND = 60  # seconds within which a job must have ended
FETCH = "torch.utils.data._utils.fetch:_MapDatasetFetcher.fetch"  # of a micro-batch, in a loader process where there are some
STEP, SAVE = "util.run:optimizer_step", "util.run_directory:save_checkpoint"
OURS, FULL = "a fault of ours", OSError(errno.ENOSPC, "No space left on device")
NO_SHM = RuntimeError("unable to allocate shared memory(shm) for file </torch_9_1>: No space left on device (28)")
NO_FILES = OSError(errno.EMFILE, "Too many open files")
GPU = RuntimeError("CUDA error: an illegal memory access was encountered")
DENIED = PermissionError(errno.EACCES, "Permission denied", "run")
NO_COMPILER = TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")
PICTURE, FORWARD = "main_pretrain:draw_reconstructions", "models_mixmim:MixMIM.forward"
EVENTS = "tensorboard.summary.writer.record_writer:RecordWriter.write"
# Where something fails → (program, what the one line says, function that raises, error, calls of it before)
FAULTS = {
    "a bug in the loader": ("main_pretrain", "KeyError: ", FETCH, KeyError(OURS), 3),
    "no room for batches": ("main_pretrain", "--shm-size", FETCH, NO_SHM, 3),
    "too many open files": ("main_finetune", "ulimit -n", FETCH, NO_FILES, 3),
    "the log": ("main_pretrain", "the log: No space left on device", "logging:StreamHandler.flush", FULL, 12),
    "a bug in the step": ("main_finetune", "KeyError: ", STEP, KeyError(OURS), 2),
    "the GPU": ("main_pretrain", "the GPU of rank", STEP, GPU, 2),
    "the evaluation": ("main_finetune", "ZeroDivisionError: ", "evaluation:predict", ZeroDivisionError(OURS)),
    "a save": ("main_pretrain", "PermissionError: ", SAVE, DENIED, 1),
    "the picture": ("main_pretrain", "ValueError: ", PICTURE, ValueError(OURS)),
    "the event file": ("main_pretrain", "events.out.tfevents", EVENTS, FULL, 4),
    "the compiler": ("main_pretrain", "--compile off", FORWARD, NO_COMPILER, 2),
}
FLAGS = {"a save": "--save_every_steps 2"}
# Of a run without --campaign:
USUAL = ("a bug in the loader", "no room for batches", "the evaluation", "the event file", "the log", "the picture")


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_ends_the_program_and_its_loaders(jobs, tmp_path, campaign, count, fault, workers):
    program, said, *hurt = FAULTS[fault]
    if not campaign and (workers == 0 or fault not in USUAL):
        pytest.skip("in a campaign")
    flags = (jobs[program], FLAGS.get(fault, ()), "--num_workers", workers, "--output_dir", tmp_path / "run")
    run = Run(program, flags, tmp_path / "output", hurt=(failing_in, *hurt))
    status, lines = run.wait(BOUND), run.lines()
    good = status == 1 and lines[-1].startswith(f"{program}.py: error: ") and said in lines[-1]
    if "the traceback" not in lines[-1]:
        good = good and len(lines) == 1
    assert count("exceptions after which all processes end", good), run.text()
    assert not children_of(run.process.pid)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_on_one_rank_ends_all(jobs, tmp_path, campaign, count, fault, workers):
    program, said, *hurt = FAULTS[fault]
    if not campaign and (workers == 0 or fault not in ("a bug in the loader", "the picture")):
        pytest.skip("in a campaign")
    only_main = fault in ("a save", "the picture", "the event file", "the log")
    hurts = {0 if only_main else 1: (failing_in, *hurt)}
    flags = (jobs[program], FLAGS.get(fault, ()), "--accum_iter 1 --num_workers", workers)
    runs = start_ranks(program, (flags, "--output_dir", tmp_path / "run"), tmp_path / "output", hurt=hurts)
    statuses = [run.wait(BOUND) for run in runs]
    lines = [line for run in runs for line in run.lines() if line.startswith(f"{program}.py: ")]
    good = statuses == [1, 1] and sum(said in line for line in lines) == 1
    assert count("exceptions on one rank after which all ranks end", good), "\n".join(run.text() for run in runs)


def test_few_descriptors_are_one_line_although_loader_processes_are_half_made(jobs, tmp_path):
    flags = (jobs["main_pretrain"], "--num_workers 6 --output_dir", tmp_path / "run")
    run = Run("main_pretrain", flags, tmp_path / "output", hurt=(with_few_descriptors, 24))
    assert run.wait(BOUND) == 1, run.text()
    assert "reached the limit of" in run.lines()[-1] and "Traceback" not in run.text()
    assert "Exception ignored" not in run.text()


# ---- Waiting for data ----------------------------------------------------------------------------


def test_a_loader_that_gives_nothing_is_an_error(jobs, tmp_path):
    flags = (jobs["main_pretrain"], "--num_workers 2 --data_timeout 0.02 --output_dir", tmp_path / "run")
    run = Run("main_pretrain", flags, tmp_path / "output", hurt=(hanging_in, FETCH, 3))
    assert run.wait(BOUND) == 1 and len(run.lines()) == 1, run.text()
    assert "received no batch in time" in run.lines()[0] and "--data_timeout" in run.lines()[0]


@pytest.mark.parametrize(
    "program, hurt, place",
    [
        # Two processes give three micro-batches each, and a step takes two.
        ("main_pretrain", (hanging_in, FETCH, 3), "epoch 0, step 3/6"),
        ("main_finetune", (hanging_in, FETCH, 4), "epoch 0, step 4/6"),
        ("main_finetune", (hanging_in_evaluation, FETCH, 1), "the evaluation of epoch 0"),
    ],
    ids=["pretraining", "finetuning", "evaluation"],
)
def test_a_signal_is_acted_on_while_a_batch_is_waited_for(jobs, whole, tmp_path, program, hurt, place):
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--resume auto")
    run = Run(program, (flags, "--num_workers 2"), tmp_path / "stopped", hurt=(*hurt, 1, signal.SIGTERM))
    assert run.wait(BOUND) == 143, run.text()
    assert run.lines() == [
        f"{program}.py: stopped: SIGTERM: ended in {place}, and the state is saved; continue with --resume auto"
    ]
    finish(program, flags, tmp_path / "continued")
    assert differences(whole[program][0], tmp_path / "run") == []


def test_before_the_first_step_there_is_something_to_save_too(jobs, whole, tmp_path):
    flags = (jobs["main_pretrain"], "--output_dir", tmp_path / "run", "--resume auto")
    hurt = (hanging_in, FETCH, 0, 1, signal.SIGHUP)
    run = Run("main_pretrain", (flags, "--num_workers 2"), tmp_path / "stopped", hurt=hurt)
    assert run.wait(BOUND) == 128 + signal.SIGHUP, run.text()
    finish("main_pretrain", flags, tmp_path / "continued")
    assert same_states(*(load_checkpoint(folder / LATEST) for folder in (whole["main_pretrain"][0], tmp_path / "run")))


def test_one_of_two_ranks_that_waits_ends_at_a_signal_and_the_other_finds_it_gone(jobs, tmp_path):
    flags = (jobs["main_pretrain"], "--accum_iter 1 --num_workers 1 --output_dir", tmp_path / "run")
    hurt = {1: (hanging_in, FETCH, 3, 1, signal.SIGTERM)}
    runs = start_ranks("main_pretrain", flags, tmp_path / "output", hurt=hurt)
    statuses = [run.wait(BOUND) for run in runs]
    assert statuses == [1, 143], [run.text() for run in runs]
    assert runs[1].lines()[0].startswith("main_pretrain.py: stopped: SIGTERM: rank 1 ended while it waited for a batch")
    assert "another rank, or the connection to it, is lost" in runs[0].lines()[0]


def test_a_temporary_folder_with_a_long_path_is_refused_before_loading(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    monkeypatch.setattr(util.datasets.tempfile, "tempdir", str(folder))
    with pytest.raises(UsageError, match=f"^TMPDIR={folder}: .*at most 75; set TMPDIR=/tmp, or .* --num_workers 0$"):
        util.datasets.check_temporary_folder()
    monkeypatch.setattr(util.datasets.tempfile, "tempdir", "/" + 74 * "x")
    util.datasets.check_temporary_folder()


def test_the_longest_temporary_folder_allowed_works():
    """A socket can be bound where multiprocessing would put it, and not in a folder with one more letter."""
    code = (
        "import multiprocessing.connection, multiprocessing.util, os, sys, tempfile\n"
        "base = tempfile.mkdtemp(dir='/tmp')\n"
        "for extra in (0, 1):\n"
        "    folder = os.path.join(base, 'x' * (int(sys.argv[1]) + extra - len(base) - 1)); os.mkdir(folder)\n"
        "    process = multiprocessing.current_process(); process._config.pop('tempdir', None); tempfile.tempdir = folder\n"
        "    try: multiprocessing.connection.Listener(family='AF_UNIX').close(); print('bound')\n"
        "    except OSError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(util.datasets.LONGEST_TMPDIR)], capture_output=True, text=True, cwd=ROOT
    )
    assert said.stdout.splitlines() == ["bound", "AF_UNIX path too long"], said.stderr


# ---- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU], ids=lambda which: which.name)
def test_other_signals_that_end_a_job_save_as_sigterm_does(jobs, tmp_path, which):
    flags = (jobs["main_pretrain"], "--output_dir", tmp_path / "run")
    run = Run("main_pretrain", flags, tmp_path / "output", hurt=(signalled_at_step, 3, which))
    assert run.wait(BOUND) == 128 + which, run.text()
    assert run.lines() == [
        f"main_pretrain.py: stopped: {which.name}: ended in epoch 0, step 3/6, and the state is saved; continue with --resume auto"
    ]
    assert load_checkpoint(tmp_path / "run" / LATEST)["progress"]["step"] == 3


# ---- What the line says --------------------------------------------------------------------------


def test_an_error_of_a_loader_process_is_told_by_its_last_line():
    wrapped = torch._utils.ExceptionWrapper
    try:
        raise KeyError("a fault of ours")
    except KeyError:
        wrapper = wrapped(where="in DataLoader worker process 0")
    with pytest.raises(KeyError) as found:
        wrapper.reraise()
    assert "a fault of ours" in reason_of(found.value) and "Traceback" not in reason_of(found.value)
    assert reason_of(ValueError()) == "ValueError"


def test_output_that_cannot_be_written_at_the_end_is_a_failure(monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    statuses = []
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(os, "_exit", statuses.append)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # as _exit() returns here
        patch.setattr(sys, "stdout", SimpleNamespace(flush=full))
        leave(0)
    assert statuses == [1]
    assert capsys.readouterr().err == "main.py: error: the output could not be written (No space left on device)\n"


def test_a_line_cannot_steer_the_terminal_and_can_always_be_written(capsys, caplog):
    def fail():
        raise UsageError("folder '\x1b[31mred\x07\ud800': is red; give a green one")

    assert run_program(fail, "main.py") == 2
    assert capsys.readouterr().err == r"main.py: error: folder '\x1b[31mred\x07\ud800': is red; give a green one" + "\n"
    record = logging.makeLogRecord({"levelno": logging.INFO, "msg": "a table\nof two lines \x1b[0m"})
    assert _ClockFormatter().format(record).endswith("a table\nof two lines \\x1b[0m")


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.EPIPE, "Broken pipe", LOG), "because the program that reads it has ended"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --batch_size"),
        (MemoryError(), "lower --batch_size"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."
            ),
            "--ipc=host",
        ),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "--num_workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower --num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lower --num_workers"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), "nvidia-smi"),
        (TorchDynamoException("CppCompileError: C++ compile error"), "--compile off"),
    ],
)
def test_known_causes(error, said):
    status, line = describe(error, rank=3)
    assert status == 1 and said in line and "rank 3" in line and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("the shared value of the file"),
        OSError(errno.EACCES, os.strerror(errno.EACCES), "x"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),  # of a loader's queue, for example
    ],
)
def test_other_errors_have_no_known_cause(error):
    assert describe(error) is None


def test_a_package_that_is_missed_late_is_one_line_too(monkeypatch, capsys):
    def main():
        import a_package_that_nobody_has  # noqa: F401

    monkeypatch.setattr(sys, "argv", ["main_pretrain.py"])
    assert run_program(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("main_pretrain.py: error: the package a_package_that_nobody_has is missing in ")
    assert said.count("\n") == 1
