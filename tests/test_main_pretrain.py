# SPDX-License-Identifier: MIT
"""The pretraining program from flags to checkpoints: results, resuming, ranks, and what it says to wrong input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import main_pretrain
from batch_preparation import PretrainingPreparation
from engine_pretrain import reconstruct
from models_mixmim import mixmim_tiny
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import needs_samples, sample_path
from tests.helpers.forked import finish, finish_ranks, taking_graphs_only
from tests.helpers.runs import argv, completed, launch, log_of, mpirun, refused, same_states, scalars
from util.checkpoint import load_checkpoint
from util.optimization import StepRecord

TINY = (
    "--model mixmim_tiny --input_size 64 --batch_size 8 --num_workers 0 --warmup_epochs 1 --lr 1e-3 "
    "--log_freq 1 --device cpu"
)
FOUR = "--epochs 4 --drop_path 0.2"


@pytest.fixture
def pretrain(program, simulated, tmp_path):
    """pretrain(*flags) → (exit status, stdout, stderr) of the program on the simulated patches, with its output in tmp_path."""
    return lambda *flags: program(main_pretrain, "--data_path", simulated, "--output_dir", tmp_path, TINY, flags)


# ---- What it leaves behind -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(simulated, tmp_path_factory):
    """A run of four epochs and its console output."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ("--data_path", simulated, "--output_dir", folder, TINY, FOUR, "--save_epochs 2 4")
    result = launch([sys.executable, "main_pretrain.py", flags])
    return folder, result


def test_files_of_a_run(finished):
    folder, result = finished
    names = set(os.listdir(folder))
    checkpoints = {"checkpoint.pth", "checkpoint_previous.pth", "checkpoint_2.pth", "checkpoint_4.pth"}
    assert names == {
        *checkpoints,
        *(f"{name}.sha256" for name in checkpoints),
        "log.txt",
        "run.json",
        "reconstruction_2.png",
        "reconstruction_4.png",
        "tensorboard",
    }
    check = argv("sha256sum --check --quiet", [f"{name}.sha256" for name in checkpoints])
    assert subprocess.run(check, cwd=folder).returncode == 0
    entries = log_of(folder)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    assert entries[-1]["train_loss"] < entries[0]["train_loss"] and entries[0]["train_lr"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert record["flags"]["model"] == "mixmim_tiny" and record["data"]["samples"] == 48 and record["world_size"] == 1
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert list(scalars(folder)) == [int((epoch + (step + 1) / 6) * 1000) for epoch in range(4) for step in range(6)]
    assert scalars(folder, "lr")[4000] < scalars(folder, "lr")[1000] == pytest.approx(1e-3 * 5 / 6)


def test_console_of_a_run(finished):
    _, result = finished
    lines = result.stdout.splitlines()
    assert all(line[0] == "[" and line[9] == "." and line[16:18] == "] " for line in lines)
    assert "global batch 8 = 8 images × 1 micro-batches × 1 ranks; lr 0.001 (--lr)" in result.stdout
    step = next(line for line in lines if "step 6/6" in line)
    assert all(word in step for word in ("loss", "lr", "grad", "samples/s", "ETA", "memory"))
    assert "Training time 0:" in lines[-1]
    assert "warning" not in result.stdout.lower() and result.stderr == ""


def test_checkpoint_says_how_to_feed_it(finished):
    folder, _ = finished
    state = load_checkpoint(folder / "checkpoint.pth")
    assert {"model", "optimizer", "epoch", "scaler", "args", "input"} <= set(state)
    assert state["epoch"] == 3 and type(state["args"]) is dict and state["args"]["batch_size"] == 8
    assert state["input"] == {
        "channels": ["VH", "VV"],
        "units": "dB",
        "input_size": 64,
        "mean": [-19.1966, -12.5144],
        "std": [5.4501, 5.0019],
    }
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert sorted(decays) == [0.0, 0.05]


# ---- Resuming, ranks, accumulation ---------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(finished, simulated, tmp_path, program):
    """With the commands that a user gives; tests/test_resume.py has all the places where a run may be stopped."""
    flags = ("--data_path", simulated, "--output_dir", tmp_path, TINY, FOUR, "--save_epochs 2 4")
    run = subprocess.Popen(
        argv(sys.executable, "main_pretrain.py", flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in run.stdout:
        if "Epoch [1/4] step 3/6" in line:
            run.send_signal(signal.SIGTERM)
    assert run.wait() == 143 and "stopped: SIGTERM: ended in epoch 1, step " in run.stderr.read()
    assert not (tmp_path / ".lock").exists()
    completed(program(main_pretrain, flags, "--resume auto"))
    assert same_states(load_checkpoint(finished[0] / "checkpoint.pth"), load_checkpoint(tmp_path / "checkpoint.pth"))
    assert [entry["train_loss"] for entry in log_of(finished[0])] == [entry["train_loss"] for entry in log_of(tmp_path)]
    assert scalars(finished[0]) == scalars(tmp_path)


def test_going_back_to_an_earlier_checkpoint_cuts_the_log(finished, tmp_path, pretrain):
    whole, _ = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    status, out, err = pretrain(FOUR, "--resume", tmp_path / "checkpoint_2.pth")
    assert status == 0 and "2 lines from epoch 2 on are removed" in out
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [0, 1, 2, 3]
    assert same_states(load_checkpoint(whole / "checkpoint.pth"), load_checkpoint(tmp_path / "checkpoint.pth"))


def test_the_comparison_of_states_can_fail(finished):
    folder, _ = finished
    state = load_checkpoint(folder / "checkpoint.pth")
    state["optimizer"]["state"][0]["exp_avg"][..., 0] += 1e-7
    assert not same_states(state, load_checkpoint(folder / "checkpoint.pth"))


@pytest.mark.parametrize(
    "flag",
    [
        "--lr 2e-3",
        "--mask_ratio 0.25",
        "--batch_size 4",
        "--accum_iter 2",
        "--epochs 5",
        "--split train",
        "--seed 1",
        "--model mixmim_base",
    ],
)
def test_resume_as_another_run_is_refused(finished, tmp_path, flag, pretrain):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    refused(pretrain(FOUR, "--resume auto", flag), flag.split()[0], "differ from those of the run")
    assert same_states(load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(finished[0] / "checkpoint.pth"))


@pytest.mark.slow
def test_two_ranks_equal_one_process_that_accumulates(simulated, tmp_path):
    flags = ("--data_path", simulated, TINY, "--batch_size 4 --epochs 4 --save_epochs 4 --drop_path 0.1")
    flags += ("--clip_grad 1.0 --norm_pix_loss",)
    finish("main_pretrain", (flags, "--accum_iter 2 --output_dir", tmp_path / "alone"), tmp_path / "output")
    runs = finish_ranks("main_pretrain", (flags, "--output_dir", tmp_path / "ranks"), tmp_path / "rank")
    assert "4 images × 1 micro-batches × 2 ranks" in runs[0].text()
    assert not any("warning" in run.text().lower() for run in runs)
    alone, ranks = (np.array(list(scalars(tmp_path / name).values())) for name in ("alone", "ranks"))
    assert len(alone) == 24  # 4 epochs of 48 // 8 steps
    difference = np.abs(alone - ranks).max() / alone.max()
    print(f"largest relative difference of the loss over 24 steps: {difference:.1e}")
    assert difference < 2e-6
    weights = [load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("alone", "ranks")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_torchrun_trains_and_ends_cleanly(simulated, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 main_pretrain.py"
    flags = ("--data_path", simulated, TINY, "--epochs 1 --output_dir", tmp_path)
    result = launch([sys.executable, torchrun, flags])
    assert "× 2 ranks" in result.stdout and len(log_of(tmp_path)) == 1
    assert json.loads((tmp_path / "run.json").read_text())["launcher"] == "torchrun"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_under_mpirun_bad_input_ends_all_ranks_with_one_line(simulated, tmp_path):
    folder = tmp_path / "scenes"
    shutil.copytree(simulated, folder)
    band = truncated_band(folder)
    flags = ("--data_path", folder, "--output_dir", tmp_path / "run", TINY, "--batch_size 4 --epochs 1")
    command = mpirun(sys.executable, "main_pretrain.py", flags)
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    ours = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py: error:")]
    assert result.returncode == 2 and len(ours) == 1 and band.name in ours[0], result.stderr
    assert "Traceback" not in result.stderr and "Aborted" not in result.stderr, result.stderr


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_on_a_cpu_stays_close(finished, tmp_path, amp, pretrain):
    completed(pretrain("--epochs 4 --stop_epoch 1 --drop_path 0.2 --amp", amp))
    assert log_of(tmp_path)[0]["train_loss"] == pytest.approx(log_of(finished[0])[0]["train_loss"], rel=0.02)


# ---- Faster, or with less memory -----------------------------------------------------------------


def test_grad_checkpointing_gives_the_same_losses(finished, tmp_path, pretrain):
    """To the last bit, drop path included."""
    completed(pretrain(FOUR, "--stop_epoch 1 --grad_checkpointing"))
    assert log_of(tmp_path)[0]["train_loss"] == log_of(finished[0])[0]["train_loss"]


@pytest.mark.parametrize("real", [False, True])
def test_a_compiled_run_gives_the_same_losses(finished, simulated, tmp_path, campaign, real):
    """Within rounding; and pictures, which are not compiled, and checkpoints are as ever. In a usual run graphs are taken as for
    compiling, and then executed without making code of them."""
    if real and not campaign:
        pytest.skip("a minute of compiling; run with --campaign")
    flags = ("--data_path", simulated, "--output_dir", tmp_path, TINY, FOUR, "--stop_epoch 1 --save_epochs 1")
    flags += ("--compile default",)
    run = finish("main_pretrain", flags, tmp_path / "output", hurt=None if real else (taking_graphs_only,))
    assert "recompile" not in run.text()
    assert list(scalars(tmp_path).values()) == pytest.approx(list(scalars(finished[0]).values())[:6], rel=1e-4)
    assert (tmp_path / "reconstruction_1.png").exists()
    assert list(load_checkpoint(tmp_path / "checkpoint.pth")["model"]) == list(mixmim_tiny().state_dict())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_compiled_and_with_checkpointing_on_two_ranks(simulated, tmp_path, campaign):
    if not campaign:
        pytest.skip("two minutes of compiling; run with --campaign")
    flags = ("main_pretrain.py --data_path", simulated, TINY, "--batch_size 4 --epochs 2 --drop_path 0.1")
    launch([sys.executable, flags, "--accum_iter 2 --output_dir", tmp_path / "plain"])
    launch(mpirun(sys.executable, flags, "--compile default --grad_checkpointing --output_dir", tmp_path / "compiled"))
    plain, compiled = (list(scalars(tmp_path / name).values()) for name in ("plain", "compiled"))
    assert len(plain) == 12 and compiled == pytest.approx(plain, rel=1e-4)


def test_compile_needs_a_compiler(tmp_path, monkeypatch, pretrain):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(pretrain("--compile default"), "--compile default: needs a C++ compiler")


# ---- Starting from weights, looking at reconstructions -------------------------------------------


def test_finetune_starts_from_weights_of_another_input_size(finished, tmp_path, pretrain):
    status, out, _ = pretrain("--input_size 128 --epochs 4 --stop_epoch 1 --finetune", finished[0] / "checkpoint.pth")
    assert status == 0 and "resampled: " in out and "absolute_pos_embed" in out
    assert log_of(tmp_path)[0]["train_loss"] < log_of(finished[0])[0]["train_loss"]


def test_the_folder_of_a_run_is_continued_from_its_latest_checkpoint(finished, tmp_path, pretrain):
    flags = (FOUR, "--output_dir", tmp_path / "run", "--resume")
    out = completed(pretrain(flags, finished[0]))
    assert f"continuing {finished[0] / 'checkpoint.pth'} after epoch 3" in out and "are already done" in out
    (tmp_path / "empty").mkdir()
    refused(pretrain(flags, tmp_path / "empty"), "empty: a folder without a checkpoint")


def test_inference_draws_several_checkpoints_of_the_same_samples(finished, simulated, tmp_path, program):
    checkpoints = [finished[0] / "checkpoint_2.pth", finished[0] / "checkpoint_4.pth"]
    flags = ("--data_path", simulated, "--output_dir", tmp_path, "--inference_samples 6 --inference", checkpoints)
    status, _, err = program(main_pretrain, flags)
    assert (status, err) == (0, "")
    assert sorted(os.listdir(tmp_path / "inference")) == [
        "reconstructions.npz",
        "reconstructions_1.png",
        "reconstructions_2.png",
    ]
    arrays = np.load(tmp_path / "inference" / "reconstructions.npz")
    two, four = "checkpoint_2", "checkpoint_4"
    assert np.array_equal(arrays[f"{two}/original"], arrays[f"{four}/original"])
    assert not np.array_equal(arrays[f"{two}/predicted"], arrays[f"{four}/predicted"])
    shown = arrays[f"{two}/visible"][0, 0] > 0.5
    assert np.array_equal(arrays[f"{two}/completed"][..., shown], arrays[f"{two}/original"][..., shown])


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--input_size 128", "--input_size 128 (the checkpoint: 64)"),
        ("--norm_pix_loss", "--norm_pix_loss True (the checkpoint: False)"),
        (
            "--std 3 3 --model mixmim_base",
            "--model mixmim_base (the checkpoint: mixmim_tiny), --std 3.0 3.0 (the checkpoint: 5.4501 5.0019)",
        ),
    ],
)
def test_inference_refuses_flags_that_contradict_the_checkpoint(finished, simulated, tmp_path, program, flags, said):
    look = ("--data_path", simulated, "--output_dir", tmp_path / "look", "--inference", finished[0] / "checkpoint.pth")
    refused(program(main_pretrain, look, flags), said)
    assert not (tmp_path / "look").exists()
    if "--input_size" in flags:
        assert f"forced {said}" in completed(program(main_pretrain, look, flags, "--force_input"))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_is_in_db_and_a_perfect_prediction_gives_the_original(norm_pix_loss):
    model = mixmim_tiny(img_size=64, norm_pix_loss=norm_pix_loss)
    prepare = PretrainingPreparation(64, (-19.0, -12.0), (5.0, 4.0))
    images = -15 + 5 * torch.randn(2, 2, 64, 64)
    mask = torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1)
    model.forward = lambda x, weights, mask, target: (None, model.standardised(x)[0], mask)
    result = reconstruct(model, prepare, images, mask)
    torch.testing.assert_close(result["predicted"], images, rtol=0, atol=1e-4)
    torch.testing.assert_close(result["completed"], images, rtol=0, atol=1e-4)
    assert result["visible"][0, 0, ::32, ::32].tolist() == [[0, 1], [1, 0]]


# ---- A stored loss, against accidents ------------------------------------------------------------


def test_golden_losses_of_20_steps(tmp_path, pretrain, monkeypatch):
    """Update tests/helpers/golden_pretrain.json only with a reason: SARWMIX_UPDATE_GOLDEN=1 python -m pytest tests -k golden."""

    class Waves(torch.utils.data.Dataset):
        """160 images that no other code of the project has a part in."""

        ids, MEAN, STD = np.arange(160), None, None

        def __len__(self):
            return 160

        def image(self, i):
            row, column = np.mgrid[:120, :120] / 120
            wave = np.sin(2 * np.pi * ((1 + i % 5) * row + (1 + i % 7) * column) + i)
            return torch.from_numpy(np.stack([-20 + 5 * wave, -12 + 4 * wave * row]).astype(np.float32))

    monkeypatch.setattr(main_pretrain, "build_dataset", lambda flags: Waves())
    monkeypatch.setattr(main_pretrain, "check_data", lambda *_: {"fingerprint": "waves"})
    # PyTorch releases differ in the numbers that their truncated normal draws, and in none else that this uses.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, std: torch.nn.init.uniform_(tensor, -std, std))
    completed(
        pretrain(
            "--data_path - --epochs 1 --save_epochs 5 --warmup_epochs 0.25 --norm_pix_loss", "--mean -20 -12 --std 5 4"
        )
    )
    losses = list(scalars(tmp_path).values())
    stored = ROOT / "tests" / "helpers" / "golden_pretrain.json"
    if os.environ.get("SARWMIX_UPDATE_GOLDEN"):
        stored.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    assert losses == pytest.approx(json.loads(stored.read_text()), rel=2e-4)


# ---- Wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--model mixmim_giant", "--model"),
        ("--weight_mode vv", "--weight_mode"),
        ("--dataset benv3", "--dataset"),
        ("--amp fp8", "--amp"),
        ("--epoch 3", "--epoch"),
        ("--batch_size many", "--batch_size"),
        ("--batch_size 7", "--batch_size 7: must be even"),
        ("--batch_size 0", "--batch_size 0"),
        ("--batch_size 64", "--batch_size 64: the 48 samples"),
        ("--accum_iter 0", "--accum_iter 0"),
        ("--input_size 100", "--input_size"),
        ("--input_size 224", "--input_size"),
        ("--mask_ratio 1.5", "--mask_ratio 1.5"),
        ("--range_mask_ratio 0.6", "--range_mask_ratio 0.6"),
        ("--drop_path 1", "--drop_path 1"),
        ("--crop_scale 0.5 0.2", "--crop_scale 0.5 0.2"),
        ("--crop_scale 0 1", "--crop_scale 0: must be above 0"),
        ("--weight_clip 0", "--weight_clip 0"),
        ("--compile fast", "--compile"),
        ("--mean -19", "--mean"),
        ("--std 5 0", "--std 0: must be above 0"),
        ("--lr -1", "--lr -1"),
        ("--clip_grad 0", "--clip_grad 0"),
        ("--stop_epoch 9 --epochs 4", "--stop_epoch 9"),
        ("--warmup_epochs 9 --epochs 4", "--warmup_epochs 9"),
        ("--start_epoch 4 --epochs 4", "--start_epoch 4"),
        ("--save_epochs 0", "--save_epochs 0"),
        ("--num_workers -1", "--num_workers -1"),
        ("--port 70000", "--port 70000"),
        ("--device tpu", "--device tpu"),
        ("--world_size 4", "--world_size 4"),
        ("--dist_on_itp", "--dist_on_itp"),
        ("--resume absent.pth", "--resume absent.pth"),
        ("--finetune absent.pth", "--finetune absent.pth"),
        ("--resume auto --overwrite", "--overwrite"),
        ("--resume auto --start_epoch 1", "--start_epoch"),
        ("--inference", "--inference"),
        ("--inference absent.pth", "absent.pth"),
        ("--inference_samples 3 --inference x.pth", "--inference_samples 3"),
        ("--data_path absent", "absent"),
        ("--metadata absent.csv", "absent.csv"),
        ("--max_nonfinite 2", "--max_nonfinite 2"),
        ("--output_dir /proc/version/run", "--output_dir /proc/version/run"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(tmp_path, pretrain, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    refused(pretrain("--output_dir run", flags), said)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left, left


def test_a_full_disk_anywhere_is_one_line(finished, tmp_path, monkeypatch, pretrain):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "reconstruction_4.png")

    monkeypatch.setattr(main_pretrain, "write_atomically", full)
    result = pretrain(FOUR, "--save_epochs 4 --resume", tmp_path / "checkpoint_2.pth")
    refused(result, "No space left", status=1)
    # Pictures come before the checkpoint of their epoch.
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_a_missing_data_path_is_one_line(program):
    refused(program(main_pretrain), "--data_path is missing")


def truncated_band(folder):
    band = sorted((folder / "BigEarthNet-S1").rglob("*_VH.tif"))[3]
    band.write_bytes(band.read_bytes()[:-2000])
    return band


def test_a_broken_patch_that_a_loader_process_reads_is_named_in_one_line(simulated, tmp_path, pretrain):
    shutil.copytree(simulated, tmp_path / "scenes")
    band = truncated_band(tmp_path / "scenes")
    flags = ("--data_path", tmp_path / "scenes", "--output_dir", tmp_path / "run", "--epochs 1 --num_workers 2")
    result = pretrain(flags)
    refused(result, band.name.removesuffix("_VH.tif"))
    assert "GDAL" not in result[1] and not (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(finished, tmp_path, monkeypatch, pretrain):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    add = StepRecord.add
    monkeypatch.setattr(StepRecord, "add", lambda self, step, loss, norm: add(self, step, loss * float("nan"), norm))
    result = pretrain(FOUR, "--resume", tmp_path / "checkpoint_2.pth")
    refused(result, "epoch 2, step 0: loss nan; sample ids ", status=1)
    for name, good in (("checkpoint.pth", "checkpoint_2.pth"), ("checkpoint_previous.pth", "checkpoint_4.pth")):
        assert same_states(load_checkpoint(finished[0] / good), load_checkpoint(tmp_path / name))


def test_weights_that_are_not_finite_are_not_continued(finished, tmp_path, pretrain):
    state = load_checkpoint(finished[0] / "checkpoint_2.pth")
    state["model"]["decoder_pred.bias"][0] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    result = pretrain("--output_dir", tmp_path / "run", FOUR, "--resume", tmp_path / "broken.pth")
    refused(result, "broken.pth: damaged", "'decoder_pred.bias' is not finite")


# ---- Real samples --------------------------------------------------------------------------------


def without_warnings(result):
    status, out, err = result
    assert status == 0 and "warning" not in out.lower() and err == "", out + err
    return out


@needs_samples
def test_real_v1_patches_pretrain_without_warnings(tmp_path, pretrain):
    data = sample_path("benv1", "BigEarthNet-S1-v1.0")
    out = without_warnings(pretrain("--dataset benv1 --data_path", data, "--batch_size 2 --epochs 2"))
    assert "6 samples" in out and len(log_of(tmp_path)) == 2


@needs_samples
def test_real_v2_patches_pretrain_without_warnings(tmp_path, pretrain):
    """The v2 sample with its neighbours from v1, which have the same files in other folders, listed in a CSV dump."""
    patches = [
        *sample_path("benv2", "BigEarthNet-S1").glob("*/*"),
        *sample_path("benv1", "BigEarthNet-S1-v1.0").glob("S1*"),
    ]
    rows = ["patch_id,labels,split,country,s1_name"]
    for k, patch in enumerate(patches):
        scene = tmp_path / "data" / "BigEarthNet-S1" / patch.name.rsplit("_", 3)[0]
        scene.mkdir(parents=True, exist_ok=True)
        (scene / patch.name).symlink_to(patch)
        rows.append(f"S2_{k},\"['Arable land' 'Pastures']\",train,Austria,{patch.name}")
    (tmp_path / "data" / "benv2_train.csv").write_text("\n".join(rows) + "\n")
    out = without_warnings(pretrain("--data_path", tmp_path / "data", "--split train --batch_size 2 --epochs 2"))
    assert "7 samples" in out and len(log_of(tmp_path)) == 2


@needs_samples
def test_one_real_v2_patch_trains_unmixed(tmp_path, pretrain):
    (patch,) = sample_path("benv2", "BigEarthNet-S1").glob("*/*")
    (tmp_path / "one.csv").write_text(f"labels,s1_name\n\"['Pastures']\",{patch.name}\n")
    flags = ("--data_path", sample_path("benv2"), "--metadata", tmp_path / "one.csv")
    without_warnings(pretrain(flags, "--batch_size 1 --mask_ratio 0 --epochs 2"))
