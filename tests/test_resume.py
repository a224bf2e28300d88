# SPDX-License-Identifier: MIT
"""A run that was stopped anywhere and continued is, to the last bit, the run that was not stopped."""

import itertools
import json
import shutil
import signal

import pytest
import torch

from common.sealed_file import SealedFile
from sarwmix.prepare import pack
from tests.helpers.forked import (
    Run,
    failing_at_step,
    finish,
    finish_ranks,
    noting_samples,
    signalled_at_step,
    signalled_in_evaluation,
    start_ranks,
    with_a_clock_behind,
)
from tests.helpers.resumed import PRETRAIN, differences
from tests.helpers.runs import argv, digests, same_states, scalars
from util.checkpoint import load_checkpoint
from util.sampling import DROP_PATH_STREAM, MASK_STREAM, MIXUP_STREAM, Place

pytestmark = pytest.mark.slow

TWO_RANKS = "--accum_iter 1"
BOTH = pytest.mark.parametrize("program", ["main_pretrain", "main_finetune"])


def at_step(number, which=signal.SIGTERM):
    return signalled_at_step, number, which


def stop_and_continue(program, flags, folder, hurt, status=143, more=()):
    """A run that is stopped by what happens to it, and continued. Returns the last line it said when it was stopped."""
    flags = (flags, "--output_dir", folder / "run", "--resume auto", more)
    stopped = Run(program, flags, folder / "stopped", hurt=(noting_samples, folder / "samples", *hurt))
    assert stopped.wait() == status, stopped.text()
    finish(program, flags, folder / "continued", hurt=(noting_samples, folder / "samples"))
    return stopped.lines()[-1]


# ---- The same run --------------------------------------------------------------------------------


@pytest.mark.parametrize("step, workers", [(1, 0), (6, 0), (9, 2)])
@BOTH
def test_stopped_by_sigterm_at_a_step(jobs, whole, tmp_path, program, step, workers):
    said = stop_and_continue(program, jobs[program], tmp_path, at_step(step), more=("--num_workers", workers))
    evaluating = program == "main_finetune" and step % 6 == 0
    place = "the evaluation of epoch 0" if evaluating else f"epoch {step // 6}, step {step % 6}/6"
    assert (
        said == f"{program}.py: stopped: SIGTERM: ended in {place}, and the state is saved; continue with --resume auto"
    )
    assert differences(whole[program][0], tmp_path / "run") == []
    assert (tmp_path / "samples").read_text() == whole[program][1]
    outcomes = [part["outcome"] for part in json.loads((tmp_path / "run" / "run.json").read_text())["earlier"]]
    assert outcomes == [f"stopped: {said.split('stopped: ')[1]}"]


def test_in_fp16_the_scale_of_the_loss_goes_on_too(jobs, tmp_path):
    flags = (jobs["main_pretrain"], "--amp fp16")
    finish("main_pretrain", (flags, "--output_dir", tmp_path / "whole"), tmp_path / "output")
    stop_and_continue("main_pretrain", flags, tmp_path, at_step(9))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["scaler"]["_growth_tracker"] > 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_from_a_packed_store_whose_batches_threads_make(jobs, whole, simulated, tmp_path):
    flags = (
        "--dataset benv2 --data_path",
        simulated,
        "--out",
        tmp_path / "store",
        "--dtype float32 --splits train val",
    )
    pack.main(argv("--workers 1", flags))
    flags = ("--data_path", tmp_path / "store", PRETRAIN)
    stop_and_continue("main_pretrain", flags, tmp_path, at_step(9), more="--num_workers 2 --data_cache ram")
    assert scalars(whole["main_pretrain"][0]) == scalars(tmp_path / "run")
    assert (tmp_path / "samples").read_text() == whole["main_pretrain"][1]


def test_continued_on_a_host_whose_clock_is_a_day_behind(jobs, whole, tmp_path):
    """TensorBoard too shows the whole run."""
    flags = (jobs["main_pretrain"], "--output_dir", tmp_path / "run", "--resume auto")
    assert Run("main_pretrain", flags, tmp_path / "stopped", hurt=at_step(9)).wait() == 143
    finish("main_pretrain", flags, tmp_path / "continued", hurt=(with_a_clock_behind, 86_400))
    assert differences(whole["main_pretrain"][0], tmp_path / "run") == []


def test_stopped_by_ctrl_c(jobs, whole, tmp_path):
    assert "SIGINT: ended in epoch 1, step 2/6" in stop_and_continue(
        "main_pretrain", jobs["main_pretrain"], tmp_path, at_step(8, signal.SIGINT), status=130
    )
    assert differences(whole["main_pretrain"][0], tmp_path / "run") == []


@BOTH
def test_killed_in_mid_epoch_it_goes_on_from_the_last_save(jobs, whole, tmp_path, program):
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--save_every_steps 4 --resume auto")
    killed = Run(program, flags, tmp_path / "killed", hurt=at_step(11, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    # Saved after step 4, at the end of the epoch, step 6, and after step 8.
    assert "after epoch 0 and 2 of 6 steps" in finish(program, flags, tmp_path / "continued").text()
    assert differences(whole[program][0], tmp_path / "run") == []


@pytest.mark.parametrize("batch, place", [(3, "the evaluation of epoch 0"), (14, "the final evaluation")])
def test_stopped_in_an_evaluation(jobs, whole, tmp_path, batch, place):
    hurt = (signalled_in_evaluation, batch, signal.SIGTERM)  # validation takes 2 × 6 batches
    assert f"ended in {place}" in stop_and_continue("main_finetune", jobs["main_finetune"], tmp_path, hurt)
    assert differences(whole["main_finetune"][0], tmp_path / "run") == []
    assert (tmp_path / "samples").read_text() == whole["main_finetune"][1]


@BOTH
def test_the_walltime_ends_a_run_with_status_0(jobs, whole, tmp_path, program):
    # A walltime that is over at the first pause: after each start one step is taken.
    said = stop_and_continue(program, jobs[program], tmp_path, (), status=0, more="--walltime 1e-3")
    assert "--walltime is nearly over: ended in epoch 0, step 1/6" in said
    assert "ended in epoch 0, step 2/6" in (tmp_path / "continued").read_text()
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--resume auto --walltime 60")
    finish(program, flags, tmp_path / "last")
    assert differences(whole[program][0], tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "finished"


@BOTH
def test_two_ranks_stop_together_and_go_on(jobs, whole, tmp_path, program):
    """A signal to one of them is enough. One process that accumulates is continued by two ranks as well."""
    flags = (jobs[program], TWO_RANKS, "--resume auto --output_dir")
    finish_ranks(program, (flags, tmp_path / "whole"), tmp_path / "output")
    stopped = start_ranks(program, (flags, tmp_path / "run"), tmp_path / "stopped", hurt={1: at_step(8)})
    assert [rank.wait() for rank in stopped] == [143, 143], stopped[0].text()
    (said,) = stopped[0].lines()
    assert "SIGTERM: ended in epoch 1, step 3/6" in said and not stopped[1].lines()
    finish_ranks(program, (flags, tmp_path / "run"), tmp_path / "continued")
    assert differences(tmp_path / "whole", tmp_path / "run") == []

    alone = (jobs[program], "--output_dir", tmp_path / "alone")
    assert Run(program, alone, tmp_path / "alone.txt", hurt=at_step(8)).wait() == 143
    finish_ranks(program, (flags, tmp_path / "alone"), tmp_path / "by two")
    before, after = (scalars(folder) for folder in (whole[program][0], tmp_path / "alone"))
    assert before.keys() == after.keys() and list(after.values()) == pytest.approx(list(before.values()), rel=2e-6)


def test_three_ranks_sum_in_the_order_that_they_had_before_the_stop(jobs, tmp_path):
    """With two the order does not matter, as a + b is b + a."""
    flags = (jobs["main_pretrain"], TWO_RANKS, "--batch_size 2 --resume auto --output_dir")
    for folder, hurt, status in (("whole", {}, 0), ("run", {2: at_step(5)}, 143), ("run", {}, 0)):
        ranks = start_ranks("main_pretrain", (flags, tmp_path / folder), tmp_path / "output", 3, hurt)
        assert [rank.wait() for rank in ranks] == [status] * 3, ranks[0].text()
    assert differences(tmp_path / "whole", tmp_path / "run") == []


# ---- Controls: if a piece of the state were lost, these tests would notice -----------------------


@pytest.fixture(scope="module")
def stopped(jobs, tmp_path_factory):
    """{program: folder} of runs stopped in epoch 1, after 3 of 6 steps."""
    folders = {}
    for program, flags in jobs.items():
        folder = tmp_path_factory.mktemp(f"stopped_{program}")
        flags = (flags, "--output_dir", folder / "run")
        assert Run(program, flags, folder / "output", hurt=at_step(9)).wait() == 143
        folders[program] = folder / "run"
    return folders


def without_moments(state):
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()


def with_a_younger_optimizer(state):
    for entry in state["optimizer"]["state"].values():
        entry["step"] -= 1


def without_one_bit(state):
    weight = state["model"]["layers.0.blocks.0.mlp.fc1.weight"]
    weight.view(torch.int32)[3, 5] ^= 1


def one_step_back(state):
    state["progress"].update(step=2, losses=state["progress"]["losses"][:2])


def without_progress(state):
    del state["progress"]


def with_other_losses(state):
    state["progress"]["losses"][1] += 1e-3


def without_selection(state):
    state["selection"] = {}


def without_the_count_of_filled_pixels(state):
    state["filled"] = 7


@pytest.mark.parametrize(
    "program, change, noticed",
    [
        ("main_pretrain", None, []),
        ("main_pretrain", without_moments, ["checkpoint.pth", "log.txt", "train_loss"]),
        ("main_pretrain", with_a_younger_optimizer, ["checkpoint.pth", "log.txt", "train_loss"]),
        ("main_pretrain", without_one_bit, ["checkpoint.pth"]),
        ("main_pretrain", one_step_back, ["checkpoint.pth", "log.txt", "train_loss"]),
        ("main_pretrain", without_progress, ["checkpoint.pth", "log.txt", "train_loss"]),
        ("main_pretrain", with_other_losses, ["log.txt"]),
        ("main_pretrain", without_the_count_of_filled_pixels, ["checkpoint.pth", "log.txt"]),
        ("main_finetune", None, []),
        ("main_finetune", without_moments, ["checkpoint.pth", "log.txt", "train_loss"]),
        ("main_finetune", without_selection, ["checkpoint.pth", "eval_test.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", "unchanged" if value is None else None),
)
def test_a_lost_piece_of_state_is_noticed(jobs, whole, stopped, tmp_path, program, change, noticed):
    shutil.copytree(stopped[program], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    if change is not None:
        state = load_checkpoint(checkpoint)
        change(state)
        torch.save(state, checkpoint)
        SealedFile(checkpoint).sidecar.unlink()
    finish(program, (jobs[program], "--output_dir", tmp_path / "run", "--resume auto"), tmp_path / "output")
    found = differences(whole[program][0], tmp_path / "run")
    assert set(noticed) <= set(found) and bool(noticed) == bool(found), found


def drawing_otherwise(stream):
    """The seeds of a random stream count how often they are asked for, and no longer depend on the place in the run."""
    seed, calls = Place.seed, itertools.count()
    Place.seed = lambda self, run, which: next(calls) if which == stream else seed(self, run, which)


@pytest.mark.parametrize(
    "program, stream",
    [("main_pretrain", DROP_PATH_STREAM), ("main_pretrain", MASK_STREAM), ("main_finetune", MIXUP_STREAM)],
)
def test_a_random_stream_that_depends_on_the_process_is_noticed(jobs, stopped, whole, tmp_path, program, stream):
    """Drop path, masks and mixup are drawn anew in a process that goes on: other numbers than without a stop."""
    shutil.copytree(stopped[program], tmp_path / "run")
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--resume auto")
    finish(program, flags, tmp_path / "output", hurt=(drawing_otherwise, stream))
    assert "checkpoint.pth" in differences(whole[program][0], tmp_path / "run")


# ---- Other beginnings ----------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_for_good(jobs, whole, stopped, tmp_path):
    """The run goes on from the one before, which stays, whatever is killed then, until there are two good ones again."""
    program, flags = "main_pretrain", (jobs["main_pretrain"], "--output_dir", tmp_path / "run", "--resume auto")
    shutil.copytree(stopped[program], tmp_path / "run")
    latest = tmp_path / "run" / "checkpoint.pth"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    killed = Run(program, flags, tmp_path / "killed", hurt=at_step(2, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    assert "checkpoint.pth: damaged: its checksum differs from that in checkpoint.pth.sha256" in killed.text()
    assert "continuing" in killed.text() and "checkpoint_previous.pth after epoch 0" in killed.text()
    assert load_checkpoint(latest)["epoch"] == 0 and "progress" not in load_checkpoint(latest)
    finish(program, flags, tmp_path / "output")
    assert differences(whole[program][0], tmp_path / "run") == []


def test_when_the_last_two_are_damaged_a_kept_one_will_do(jobs, whole, tmp_path):
    program, flags = "main_pretrain", (jobs["main_pretrain"], "--output_dir", tmp_path, "--resume auto")
    shutil.copytree(whole[program][0], tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    assert "checkpoint_1.pth after epoch 0" in finish(program, flags, tmp_path / "output").text()
    assert differences(whole[program][0], tmp_path) == []


def test_a_run_goes_on_in_another_folder(jobs, whole, stopped, tmp_path):
    """Also if it is killed before it saved anything there."""
    program, source = "main_pretrain", stopped["main_pretrain"] / "checkpoint.pth"
    before = digests(stopped[program])
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--resume")
    killed = Run(program, (flags, source), tmp_path / "killed", hurt=at_step(1, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    finish(program, (flags, "auto"), tmp_path / "output")
    assert digests(stopped[program]) == before
    one, other = (load_checkpoint(folder / "checkpoint.pth") for folder in (whole[program][0], tmp_path / "run"))
    assert same_states(one, other)


def test_what_was_selected_comes_along_into_another_folder_or_is_missed_at_once(jobs, whole, tmp_path):
    program, source = "main_finetune", tmp_path / "source"
    flags = (jobs[program], "--output_dir")
    assert Run(program, (flags, source), tmp_path / "stopped", hurt=at_step(9)).wait() == 143
    finish(program, (flags, tmp_path / "run", "--resume", source / "checkpoint.pth"), tmp_path / "continued")
    folders = (whole[program][0], tmp_path / "run")
    one, other = (json.loads((folder / "eval_test.json").read_text()) for folder in folders)
    assert {**one, "checkpoint": ""} == {**other, "checkpoint": ""}
    (source / "checkpoint_best_mbr.pth").unlink()
    refused = Run(program, (flags, tmp_path / "refused", "--resume", source / "checkpoint.pth"), tmp_path / "output")
    assert refused.wait() == 2 and not list((tmp_path / "refused").glob("[!.]*"))
    (said,) = refused.lines()
    assert "checkpoint_best_mbr.pth, which holds the selected epoch 0, is not beside it" in said


def test_with_another_torch_it_goes_on_and_says_that_bits_may_differ(stopped, jobs, tmp_path):
    shutil.copytree(stopped["main_pretrain"], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    state = load_checkpoint(checkpoint)
    state["bits"]["torch"] = "1.13"
    torch.save(state, checkpoint)
    SealedFile(checkpoint).sidecar.unlink()
    flags = (jobs["main_pretrain"], "--output_dir", tmp_path / "run", "--resume auto")
    run = finish("main_pretrain", flags, tmp_path / "output")
    assert f"the run continues with torch {torch.__version__} (was 1.13)" in run.text()


OUT_OF_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
)
DISK_FULL = OSError(28, "No space left on device", "events.out")


@pytest.mark.parametrize(
    "program, error, said",
    [
        ("main_finetune", OUT_OF_MEMORY, "rank 0 is out of memory"),
        ("main_pretrain", DISK_FULL, "events.out: No space left on device; saved checkpoints are intact"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_failure_is_one_line_and_the_run_goes_on_afterwards(jobs, whole, tmp_path, program, error, said):
    flags = (jobs[program], "--output_dir", tmp_path / "run", "--save_every_steps 1 --resume auto")
    failed = Run(program, flags, tmp_path / "failed", hurt=(failing_at_step, 9, error))
    assert failed.wait() == 1 and len(failed.lines()) == 1 and said in failed.lines()[0], failed.text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"].startswith("failed: ")
    assert "after epoch 0 and 2 of 6 steps" in finish(program, flags, tmp_path / "continued").text()
    assert differences(whole[program][0], tmp_path / "run") == []
