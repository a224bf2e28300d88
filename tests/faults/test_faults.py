# SPDX-License-Identifier: MIT
"""Kills at random points, flipped bits, full disks, ranks that die: what is left, and whether the run goes on.

A usual run injects a few faults of each kind; `--campaign` those of the table in docs/RELIABILITY.md. All are drawn from
seeds, though where a kill falls in a run depends on the machine's speed as well.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from common.errors import UsageError
from common.sealed_file import SealedFile
from tests.helpers import ROOT
from tests.helpers.forked import (
    Run,
    failing_at_step,
    failing_files,
    finish,
    signalled_at_step,
    start_ranks,
    with_a_bad_loss_at_step,
    with_other_code,
    without_room_from_step,
)
from tests.helpers.resumed import differences, unloadable
from tests.helpers.runs import mpirun, same_states
from util.checkpoint import LATEST, PREVIOUS, load_checkpoint, load_latest, save_checkpoint

pytestmark = pytest.mark.slow
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
PROGRAMS = ("main_pretrain", "main_finetune")


# ---- Blows at random moments ---------------------------------------------------------------------

LONGEST = 2.5  # seconds after its start at which a run is hit at the latest; it takes about as long to finish


def hit_again_and_again(program, flags, folder, hits, blow, rng, count, what):
    """Start a run, hit it at a random moment, continue it, and so on. Returns how many runs a blow reached."""
    flags = (flags, "--output_dir", folder / "run", "--resume auto --save_every_steps 1 --num_workers")
    flags += (rng.choice((0, 0, 2)),)
    reached = 0
    for number in range(hits):
        run = Run(program, flags, folder / f"output_{number}")
        if run.is_over(rng.uniform(0.05, LONGEST)):
            assert run.wait() == 0, run.text()
            break
        run.kill(blow)
        status = run.wait(60)
        if status == 0:  # it was finished in the meantime
            break
        assert status == -blow or blow == signal.SIGTERM and status == 143, run.text()  # 143: the run had begun
        reached += 1
        if (folder / "run").exists():
            bad = unloadable(folder / "run")
            assert count(f"checkpoints loadable after {what}", not bad), bad
    return reached


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "blow, blows", [(signal.SIGKILL, (4, 100)), (signal.SIGTERM, (2, 10))], ids=["SIGKILL", "SIGTERM"]
)
def test_hit_at_random_it_ends_as_if_nothing_had_happened(jobs, whole, tmp_path, campaign, count, program, blow, blows):
    """blows: how many of them, in a usual run and in a campaign."""
    rng, left = random.Random(f"{program} {blow}"), blows[campaign]
    attempt = 0
    while left:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        reached = hit_again_and_again(program, jobs[program], folder, min(left, 12), blow, rng, count, blow.name)
        flags = (jobs[program], "--output_dir", folder / "run", "--resume auto")
        ended = Run(program, flags, folder / "last")
        survived = ended.wait() == 0 and differences(whole[program][0], folder / "run") == []
        for _ in range(reached):
            count(f"{blow.name} survived, {program}.py", survived)
        assert survived, ended.text()
        assert not list((folder / "run").glob(".*.tmp"))
        shutil.rmtree(folder)
        left, attempt = left - reached, attempt + 1


# ---- Saving --------------------------------------------------------------------------------------

STATES = [{"model": {"w": torch.full((5000,), float(epoch))}, "epoch": epoch} for epoch in range(4)]
NAMES = ("checkpoint_best.pth", "checkpoint_3.pth")


def save_and_die(folder, fatal, before):
    """In a process of its own: save, and die at the `fatal`-th call into the operating system, before or after its effect."""
    calls = [0]

    def deadly(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == fatal and before:
                os._exit(9)
            try:
                return function(*args, **kwargs)
            finally:
                if calls[0] == fatal:
                    os._exit(9)

        return call

    from common.sealed_file import _HashedWriter

    _HashedWriter.write = deadly(_HashedWriter.write)
    for name in ("replace", "link", "unlink", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    save_checkpoint(folder, STATES[3], NAMES)
    os._exit(0)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_point_of_a_save_there_is_a_good_checkpoint(tmp_path, count, before):
    """Under every name there is the old one or the new one, whole; and the next save works."""
    fatal, status = 0, 9
    while status == 9:
        fatal += 1
        folder = tmp_path / str(fatal)
        folder.mkdir()
        for state in STATES[:3]:
            save_checkpoint(folder, state, NAMES[:1])
        child = os.fork()
        if child == 0:
            save_and_die(folder, fatal, before)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        epochs = {path.name: load_checkpoint(path)["epoch"] for path in folder.glob("checkpoint*.pth")}
        good = (
            epochs[LATEST] in (2, 3)
            and epochs[PREVIOUS] in (1, 2)
            and epochs[NAMES[0]] in (2, 3)
            and load_latest(folder)[0]["epoch"] == epochs[LATEST]
        )
        save_checkpoint(folder, STATES[3])
        good = good and load_latest(folder)[0]["epoch"] == 3 and load_checkpoint(folder / PREVIOUS)["epoch"] in (2, 3)
        good = good and not list(folder.glob(f".*.{os.getpid()}.tmp"))
        assert count("points of a save at which it may be killed", good), (fatal, epochs)
        shutil.rmtree(folder)
    assert status == 0 and fatal > 25


def test_a_flipped_bit_is_seen(whole, tmp_path, campaign, count):
    """In a checkpoint, or in its checksum; in a campaign, of a real run."""
    if campaign:
        state = load_checkpoint(whole["main_pretrain"][0] / LATEST)
    else:
        state = {"model": {"w": torch.randn(20000)}, "epoch": 3}
    save_checkpoint(tmp_path, state)
    rng, path = random.Random(0), tmp_path / LATEST
    load_checkpoint(path)
    for number in range(400 if campaign else 40):
        victim = SealedFile(path).sidecar if number % 20 == 19 else path
        # The last characters of a sidecar are the name of the file, which tells nothing.
        place = rng.randrange(64 if victim == SealedFile(path).sidecar else victim.stat().st_size)
        with open(victim, "r+b") as file:
            file.seek(place)
            good = file.read(1)[0]
            file.seek(place)
            file.write(bytes([good ^ 1 << rng.randrange(8)]))
        try:
            load_checkpoint(path)
            seen = False
        except UsageError as error:
            seen = LATEST in str(error) and "\n" not in str(error)
        assert count("flipped bits seen in a checkpoint", seen), (victim, place)
        with open(victim, "r+b") as file:
            file.seek(place)
            file.write(bytes([good]))
    load_checkpoint(path)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_is_one_line_and_nothing_is_lost(jobs, whole, tmp_path, count, program):
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--save_every_steps 4 --resume auto")
    ended = Run(program, flags, tmp_path / "full", hurt=(without_room_from_step, 9, 10 * 2**20))
    status, said = ended.wait(), ended.lines()
    good = status != 0 and len(said) == 1 and "could not be written" in said[0] and "--resume auto" in said[0]
    assert count("full disks answered with one line", good), ended.text()
    assert not unloadable(tmp_path / "run") and not list((tmp_path / "run").glob(".*.tmp"))
    assert "after epoch 0 and 2 of 6 steps" in finish(program, flags, tmp_path / "continued").text()
    assert differences(whole[program][0], tmp_path / "run") == []


# Kind of file → (program, pattern of its name, how many are written before the disk fails)
FILES = {
    "the event file": ("main_pretrain", "events.out.tfevents.*", 0),
    "log.txt": ("main_pretrain", "log.txt", 1),
    "the rewritten log.txt": ("main_pretrain", ".log.txt.*.tmp", 0),
    "run.json": ("main_pretrain", ".run.json.*.tmp", 0),
    "a checkpoint": ("main_pretrain", ".checkpoint.pth.*.tmp", 2),
    "a checksum": ("main_finetune", ".checkpoint.pth.sha256.*.tmp", 3),
    "a picture": ("main_pretrain", ".reconstruction_*.tmp", 0),
    "the metrics": ("main_finetune", ".eval_test.json.*.tmp", 0),
    "the drawn samples": ("main_finetune", ".train_ids.csv.*.tmp", 0),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("kind", FILES)
def test_whichever_file_cannot_be_written_it_is_one_line(jobs, whole, tmp_path, campaign, count, kind, number, workers):
    if not campaign and (workers == 0 or number == errno.EIO or kind not in ("log.txt", "a picture")):
        pytest.skip("in a campaign")
    program, pattern, calls = FILES[kind]
    flags = (
        jobs[program],
        "--output_dir",
        tmp_path / "run",
        "--save_every_steps 4 --resume auto --num_workers",
        workers,
    )
    if kind == "the drawn samples":
        flags = (*flags, "--train_fraction 0.9")
    if kind == "the rewritten log.txt":
        finish(program, (flags, "--stop_epoch 1"), tmp_path / "begun")
    ended = Run(program, flags, tmp_path / "full", hurt=(failing_files, pattern, number, calls))
    status, said = ended.wait(BOUND), ended.lines()
    good = status in (1, 2) and len(said) == 1 and os.strerror(number) in said[0] and "--resume auto" in said[0]
    assert count("files that cannot be written: one line", good), ended.text()
    assert not unloadable(tmp_path / "run") and not list((tmp_path / "run").glob(".*.tmp"))
    finish(program, flags, tmp_path / "continued")
    if kind != "the drawn samples":
        same = differences(whole[program][0], tmp_path / "run") == []
        assert count("files that cannot be written: continued bit for bit", same)


# ---- Ranks ---------------------------------------------------------------------------------------

ONE_BATCH = "--accum_iter 1"
GONE = (
    "main_pretrain.py: rank {} ends because another rank, or the connection to it, is lost; the message of that "
    "rank, if there is one, gives the reason"
)
BOUND = 60  # seconds within which all ranks must have ended


def ends_of_ranks(runs):
    """(exit statuses, what they said besides the log) of ranks that must end by themselves."""
    deadline = time.monotonic() + BOUND
    statuses = [run.wait(max(1, deadline - time.monotonic())) for run in runs]
    return statuses, [line for run in runs for line in run.lines()]


OF_TWO_RUNS = {
    "flags": (
        ("--seed 4 --lr 5e-3 --norm_pix_loss", None),
        ("--norm_pix_loss is None on rank 0, True on rank 1", "--lr is 0.001 on rank 0, 0.005 on rank 1"),
    ),
    "folder": (("--output_dir elsewhere", None), ("the output folder is ", "/elsewhere' on rank 1")),
    "code": (((), (with_other_code,)), ("the code is ", "'0123456789ab' on rank 1")),
    "data": (("--split train", None), ("--split is 'train_val' on rank 0, 'train' on rank 1",)),
    "checkpoint": (("--finetune ''", None), ("--finetune is ",)),
}


@pytest.mark.parametrize("case", OF_TWO_RUNS)
def test_ranks_of_two_runs_that_meet_are_refused_by_name_and_value(jobs, whole, tmp_path, campaign, count, case):
    if not campaign and case not in ("flags", "code"):
        pytest.skip("in a campaign")
    (flags, hurt), said = OF_TWO_RUNS[case]
    common = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run")
    if case == "checkpoint":
        common = (common, "--finetune", whole["main_pretrain"][0] / "checkpoint_1.pth")
    runs = start_ranks("main_pretrain", common, tmp_path / "output", own={1: flags}, hurt={1: hurt})
    statuses = [run.wait(BOUND) for run in runs]
    lines = [line for run in runs for line in run.lines()]
    good = statuses == [2, 2] and len(lines) == 2 and all(text in line for line in lines for text in said)
    assert count("ranks of two runs: refused on both", good), (statuses, lines)
    assert "the ranks belong to different runs: " in lines[0] and not (tmp_path / "run").exists()


def test_ranks_that_read_other_data_are_refused(jobs, simulated, tmp_path, count):
    """With one command: a folder whose content differs from host to host."""
    frame = pd.read_parquet(simulated / "metadata.parquet")
    copy = shutil.copytree(simulated, tmp_path / "other")
    frame.iloc[:-1].to_parquet(copy / "metadata.parquet")
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run")
    runs = start_ranks("main_pretrain", flags, tmp_path / "output", own={1: ("--data_path", copy)})
    good = [run.wait(BOUND) for run in runs] == [2, 2]
    good = good and all("data_path (its samples) is " in run.lines()[-1] for run in runs)
    assert count("ranks of two runs: refused on both", good), [run.text() for run in runs]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(jobs, tmp_path, count, rank):
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run", "--save_every_steps 1")
    runs = start_ranks("main_pretrain", flags, tmp_path / "output", hurt={rank: (signalled_at_step, 4, signal.SIGKILL)})
    statuses, said = ends_of_ranks(runs)
    good = statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    assert count("lost ranks that end the others", good), (statuses, said)
    assert said == [GONE.format(1 - rank)]
    assert not unloadable(tmp_path / "run")


def test_a_rank_that_hangs_ends_the_others_in_time(jobs, tmp_path, count):
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run", "--dist_timeout 0.1")
    runs = start_ranks("main_pretrain", flags, tmp_path / "output", hurt={1: (signalled_at_step, 4, signal.SIGSTOP)})
    try:
        status = runs[0].wait(BOUND)
        assert count("lost ranks that end the others", status == 1), runs[0].text()
        assert runs[0].lines() == [GONE.format(0)]
    finally:
        runs[1].kill()
        runs[1].wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_out_of_memory_says_so_and_all_end(jobs, tmp_path, count, rank):
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run")
    runs = start_ranks(
        "main_pretrain",
        flags,
        tmp_path / "output",
        hurt={rank: (failing_at_step, 4, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))},
    )
    statuses, said = ends_of_ranks(runs)
    assert count("lost ranks that end the others", statuses == [1, 1]), (statuses, said)
    assert sum(f"rank {rank} is out of memory" in line for line in said) == 1 and len(said) <= 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bad_loss_on_one_rank_stops_all_of_them_with_one_line(jobs, tmp_path, count, program):
    flags = (jobs[program], ONE_BATCH, "--output_dir", tmp_path / "run", "--save_every_steps 2")
    runs = start_ranks(program, flags, tmp_path / "output", hurt={1: (with_a_bad_loss_at_step, 9)})
    statuses, said = ends_of_ranks(runs)
    good = statuses == [1, 1] and len(said) == 1 and "stopped: epoch 1, step 2: loss nan; sample ids " in said[0]
    assert count("losses that are not finite, on one rank", good), (statuses, said)
    state = load_checkpoint(tmp_path / "run" / LATEST)
    assert (state["epoch"], state["progress"]["step"]) == (0, 2)
    assert all(value.isfinite().all() for value in state["model"].values())


def wrapper(tmp_path, *hurt):
    """A Python file that does to rank 1 what `forked` can do, and then runs the pretraining program."""
    path = tmp_path / "hurt.py"
    path.write_text(
        f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        f"import torch, main_pretrain\nfrom tests.helpers import forked\nfrom common.ending import run_program\n"
        f"sys.argv[0] = 'main_pretrain.py'\n"
        f"if os.environ['OMPI_COMM_WORLD_RANK'] == '1': forked.{hurt[0]}({', '.join(map(str, hurt[1:]))})\n"
        f"sys.exit(run_program(main_pretrain.main))\n"
    )
    return path


@needs_mpirun
@pytest.mark.parametrize(
    "hurt, said",
    [
        (("signalled_at_step", 4, "signal.SIGKILL"), None),
        (("failing_at_step", 4, "KeyError('a fault of ours')"), "error: KeyError: 'a fault of ours' (on rank 1"),
        (("with_a_bad_loss_at_step", 4), "epoch 0, step 3: loss nan"),
    ],
    ids=["killed", "bug", "loss"],
)
def test_under_mpirun_all_ranks_end_with_one_message(jobs, tmp_path, count, hurt, said):
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run")
    result = subprocess.run(
        mpirun(sys.executable, wrapper(tmp_path, *hurt), flags),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=BOUND,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ours = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py:")]
    good = [said in line for line in ours] == [True] if said else "signal 9" in result.stderr
    good = good and result.returncode != 0
    assert count("lost ranks that end the others", good), result.stderr
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "hurt.py")]).returncode == 1  # nobody is left


@needs_mpirun
def test_a_signal_to_mpirun_reaches_the_ranks_and_is_waited_for(jobs, tmp_path, count):
    """SIGUSR1, which scripts/qsub_run.sh makes of SIGTERM: at SIGTERM mpirun ends the ranks itself, within a second."""
    flags = (jobs["main_pretrain"], ONE_BATCH, "--output_dir", tmp_path / "run", "--epochs 1000 --log_freq 1")
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.Popen(
            mpirun(sys.executable, "main_pretrain.py", flags),
            cwd=ROOT,
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + BOUND
        while "Epoch [1/" not in (tmp_path / "output").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        status = job.wait(BOUND)
    text = (tmp_path / "output").read_text()
    good = status == 128 + signal.SIGUSR1 and text.count("SIGUSR1: ended in epoch") == 1
    assert count("signals to mpirun after which all was saved", good), text
    assert load_checkpoint(tmp_path / "run" / LATEST)["epoch"] >= 0


# ---- Two runs in one folder ----------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--resume auto", "--overwrite"])
def test_of_runs_started_together_in_one_folder_exactly_one_runs(jobs, whole, tmp_path, campaign, count, flag):
    for attempt in range(10 if campaign else 1):
        folder = tmp_path / str(attempt)
        flags = (jobs["main_pretrain"], "--output_dir", folder, flag)
        runs = [Run("main_pretrain", flags, tmp_path / f"{attempt}_{number}") for number in range(4)]
        ends = [(run.wait(), run.lines()) for run in runs]
        finished = sum(status == 0 for status, _ in ends)
        refused = sum(status == 2 and len(lines) == 1 and "in use by another run" in lines[0] for status, lines in ends)
        good = finished >= 1 and finished + refused == 4
        good = good and differences(whole["main_pretrain"][0], folder) == []
        assert count("runs started together of which one runs at a time", good), ends


def test_run_json_says_how_a_run_ended_or_that_nobody_knows(jobs, tmp_path):
    flags = (jobs["main_pretrain"], "--output_dir", tmp_path / "run", "--resume auto")
    killed = Run("main_pretrain", flags, tmp_path / "killed", hurt=(signalled_at_step, 3, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "running"
    (tmp_path / "run" / "run.json").write_text("{ damaged")
    assert "run.json: cannot be read" in finish("main_pretrain", flags, tmp_path / "output").text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "finished"


def test_the_comparison_of_runs_can_fail(whole):
    state = load_checkpoint(whole["main_pretrain"][0] / LATEST)
    other = {**state, "model": {**state["model"], "norm.bias": state["model"]["norm.bias"] + 1e-9}}
    assert same_states(state, state) and not same_states(state, other)
