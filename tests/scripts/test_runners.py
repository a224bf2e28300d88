# SPDX-License-Identifier: MIT
"""The runner scripts: the commands for the machines they are made for (--dry_run), what they refuse, logs and signals."""

import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from main_finetune import parse_flags as finetuning_flags
from main_pretrain import parse_flags as pretraining_flags
from tests.helpers import ROOT

GPUS = {
    "8 × H200": ["NVIDIA H200, 143771"] * 8,
    "8 × A100": ["NVIDIA A100-SXM4-40GB, 40960"] * 8,
    "4 × V100": ["Tesla V100-SXM2-16GB, 16160"] * 4,
    "2 × RTX 4090": ["NVIDIA GeForce RTX 4090, 24564"] * 2,
    "CPU": [],
}


@pytest.fixture
def dry_run(tmp_path):
    """dry_run(script, GPUs, *flags, nodes=(names), **variables) → the finished process, on a machine with nothing else."""

    def start(script, gpus, *flags, nodes=None, **variables):
        bin_folder = tmp_path / "bin"
        shutil.rmtree(bin_folder, ignore_errors=True)
        bin_folder.mkdir()
        for name in (
            "bash",
            "dirname",
            "basename",
            "realpath",
            "date",
            "sed",
            "awk",
            "seq",
            "xargs",
            "printf",
            "id",
            "uname",
            "nproc",
        ):
            (bin_folder / name).symlink_to(shutil.which(name))
        if GPUS[gpus]:
            (bin_folder / "nvidia-smi").write_text("#!/bin/bash\nprintf '%s\\n' " + shlex.join(GPUS[gpus]) + "\n")
            (bin_folder / "nvidia-smi").chmod(0o755)
        (tmp_path / "no_settings.sh").touch()
        env = {"PATH": str(bin_folder), "HOME": str(tmp_path), "SITE": str(tmp_path / "no_settings.sh"), **variables}
        if nodes:
            (tmp_path / "nodes").write_text("".join(f"{node}\n" for node in nodes))
            env |= {"PBS_JOBID": "7.pbs", "PBS_NODEFILE": str(tmp_path / "nodes")}
        return subprocess.run(
            ["bash", ROOT / "scripts" / script, "--dry_run", *flags],
            cwd=tmp_path,
            env=env,
            text=True,
            capture_output=True,
            timeout=60,
        )

    return start


def words_of(result):
    """The words of the one command that a dry run printed."""
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (command,) = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return shlex.split(command)


def split_at_main(words):
    """(what starts it, the main program, its flags)"""
    place = next(i for i, word in enumerate(words) if word.startswith("main_"))
    return words[:place], words[place], words[place + 1 :]


def refused(result, *parts):
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1, result
    assert all(part in result.stderr for part in parts), result.stderr


AS_ROOT = ["--allow-run-as-root"] if os.getuid() == 0 else []


@pytest.mark.parametrize(
    "gpus, launch, batch, accumulate",
    [
        ("8 × H200", ["mpirun", "-np", "8", "--bind-to", "none", *AS_ROOT], 256, 1),
        ("4 × V100", ["mpirun", "-np", "4", "--bind-to", "none", *AS_ROOT], 128, 4),
        ("2 × RTX 4090", ["mpirun", "-np", "2", "--bind-to", "none", *AS_ROOT], 256, 4),
        ("CPU", [], 32, 64),
    ],
)
def test_pretraining_on_one_machine_keeps_the_published_batch(dry_run, gpus, launch, batch, accumulate):
    started, main, flags = split_at_main(words_of(dry_run("run_local.sh", gpus, "--data_path", "/data/benv2")))
    assert started == [*launch, ".venv/bin/python"] and main == "main_pretrain.py"
    args = pretraining_flags(flags)
    assert (args.batch_size, args.accum_iter, args.amp) == (batch, accumulate, None)  # which the program settles
    assert batch * accumulate * max(1, len(GPUS[gpus])) == 2048
    assert (args.data_path, args.model, args.epochs, args.stop_epoch, args.warmup_epochs, args.blr) == (
        "/data/benv2",
        "mixmim_base",
        1024,
        64,
        40,
        1.5e-4,
    )
    assert (
        args.norm_pix_loss
        and args.resume == "auto"
        and args.output_dir == "output/pretrain_benv2_base_per_channel_token_seed0"
    )


@pytest.mark.parametrize(
    "gpus, nodes, placed, batch, accumulate",
    [
        ("8 × H200", ["g1"] * 8, ["-np", "8", "--host", "g1:8", "--map-by", "ppr:8:node"], 256, 1),
        ("8 × H200", ["g1", "g2"], ["-np", "16", "--host", "g1:8,g2:8", "--map-by", "ppr:8:node"], 128, 1),
        ("8 × A100", ["g1"], ["-np", "8", "--host", "g1:8", "--map-by", "ppr:8:node"], 256, 1),
        ("4 × V100", ["v1"], ["-np", "4", "--host", "v1:4", "--map-by", "ppr:4:node"], 128, 4),
    ],
)
def test_pretraining_in_a_job_of_one_node_or_two(dry_run, gpus, nodes, placed, batch, accumulate):
    result = dry_run("qsub_run.sh", gpus, "--data_path", "/data/benv2", nodes=nodes, LD_LIBRARY_PATH="/opt/mpi")
    started, main, flags = split_at_main(words_of(result))
    environment = (
        ["-x", "MASTER_ADDR", "-x", "PBS_JOBID", "-x", "PATH", "-x", "LD_LIBRARY_PATH"] if len(set(nodes)) > 1 else []
    )
    assert started == ["mpirun", *placed, "--bind-to", "none", *environment, str(ROOT / ".venv" / "bin" / "python")]
    args = pretraining_flags(flags)
    assert main == "main_pretrain.py" and (args.batch_size, args.accum_iter, args.amp, args.walltime) == (
        batch,
        accumulate,
        None,
        1435,
    )
    assert args.batch_size * args.accum_iter * int(placed[1]) == 2048


def test_before_the_job_the_submission_is_shown_and_what_it_will_run(dry_run):
    result = dry_run(
        "qsub_run.sh",
        "CPU",
        "--site_group",
        "gab1",
        "--nodes",
        "2",
        "--data_path",
        "/data/b 2",
        "--task_type=finetune",
        "--weight_mode",
        "none",
        "--",
        "--clip_grad",
        "1",
    )
    assert result.returncode == 0, result.stderr
    submission, command = (shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#"))
    place = submission.index("qsub")
    handed_on = dict(pair.split("=", 1) for pair in submission[1:place])
    names = submission[-2].split(",")
    assert (
        submission[place:-2]
        == [
            "qsub",
            "-N",
            "sarwmix-finetune",
            "-P",
            "gab1",
            "-q",
            "rt_HF",
            "-l",
            "select=2:ncpus=192:mpiprocs=8",
            "-l",
            "walltime=24:00:00",
            "-v",
        ]
        and submission[-1] == "scripts/qsub_run.sh"
    )
    assert names == list(handed_on) and handed_on["DATA_PATH"] == "/data/b 2" and handed_on["WEIGHT_MODE"] == "none"
    assert shlex.split(handed_on["EXTRA"]) == ["--clip_grad", "1"]
    started, main, flags = split_at_main(command)
    assert started[:5] == ["mpirun", "-np", "16", "--host", "NODE1:8,NODE2:8"] and main == "main_finetune.py"
    assert flags[-2:] == ["--clip_grad", "1"]


def finetuned(words, monkeypatch):
    """The flags of a finetuning command, as if its checkpoint were there."""
    monkeypatch.setattr("util.program.os.path.exists", lambda path: True)
    started, main, flags = split_at_main(words)
    assert main == "main_finetune.py"
    return finetuning_flags(flags)


def test_finetuning_starts_from_the_pretraining_of_the_same_settings(dry_run, monkeypatch):
    words = words_of(
        dry_run(
            "run_local.sh",
            "2 × RTX 4090",
            TASK_TYPE="finetune",
            DATA_PATH="/data/benv1",
            DATASET="benv1",
            MODEL="large",
            EPOCH="128",
            WEIGHT_MODE="shared_avg",
            WEIGHT_LEVEL="pixel",
            SEED="3",
            MODELS_PATH="/models",
        )
    )
    args = finetuned(words, monkeypatch)
    assert args.finetune == "/models/pretrain_benv1_large_shared_avg_pixel_seed3/checkpoint_128.pth"
    assert args.output_dir == "/models/finetune_benv1_large_shared_avg_pixel_seed3_epoch128"
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr, args.layer_decay, args.drop_path, args.seed) == (
        50,
        5,
        5e-4,
        1e-6,
        0.7,
        0.1,
        3,
    )
    assert args.batch_size * args.accum_iter * 2 == 1024 and args.model == "mixmim_large"


@pytest.mark.parametrize(
    "flags, start, folder, mean",
    [
        (
            [],
            "output/pretrain_benv1_base_per_channel_token_seed0/checkpoint_64.pth",
            "finetune_sen12flood_base_benv1_per_channel_token_seed0_epoch64",
            None,
        ),
        (
            ["--pretrained_on", "benv2"],
            "output/pretrain_benv2_base_per_channel_token_seed0/checkpoint_64.pth",
            "finetune_sen12flood_base_benv2_per_channel_token_seed0_epoch64",
            None,
        ),
        (
            ["--checkpoint", "/m/benv1_pretrain_checkpoint_64.pth"],
            "/m/benv1_pretrain_checkpoint_64.pth",
            "finetune_sen12flood_base_benv1_pretrain_checkpoint_64_seed0",
            None,
        ),
        (
            ["--checkpoint", "/m/benv2_pretrain_checkpoint_64.pth", "--pretrained_on", "benv2"],
            "/m/benv2_pretrain_checkpoint_64.pth",
            "finetune_sen12flood_base_benv2_pretrain_checkpoint_64_seed0",
            [-19.1966, -12.5144],
        ),
        (
            ["--checkpoint", "random", "--pretrained_on", "benv2"],
            "",
            "finetune_sen12flood_base_random_seed0",
            [-19.1966, -12.5144],
        ),
        (["--checkpoint", "random"], "", "finetune_sen12flood_base_random_seed0", [-19.2309, -12.5951]),
    ],
)
def test_floods_start_from_benv1_unless_told_otherwise(dry_run, monkeypatch, flags, start, folder, mean):
    """mean: None where that of the checkpoint is taken, or v1's."""
    result = dry_run(
        "run_local.sh",
        "8 × H200",
        "--task_type",
        "finetune",
        "--dataset",
        "sen12flood",
        "--data_path",
        "/data/f",
        *flags,
    )
    args = finetuned(words_of(result), monkeypatch)
    assert (args.finetune, args.output_dir, args.mean) == (start, f"output/{folder}", mean)
    assert args.batch_size * args.accum_iter * 8 == 128


def test_testing_evaluates_what_was_finetuned(dry_run, monkeypatch):
    result = dry_run(
        "run_local.sh",
        "CPU",
        "--task_type",
        "test",
        "--data_path",
        "/data/benv2",
        "--checkpoint",
        "random",
        "--seed",
        "2",
    )
    refused(result, "CHECKPOINT=random")
    args = finetuned(
        words_of(dry_run("run_local.sh", "CPU", "--task_type", "test", "--data_path", "/data/benv2", "--seed", "2")),
        monkeypatch,
    )
    assert (
        args.eval
        and args.split == "test"
        and args.output_dir == "output/test_benv2_base_per_channel_token_seed2_epoch64"
    )
    assert args.finetune == "output/finetune_benv2_base_per_channel_token_seed2_epoch64/checkpoint_best.pth"
    assert not args.resume and args.walltime is None


@pytest.mark.parametrize(
    "model, gpus, batch, accumulate",
    [
        ("huge", "4 × V100", 8, 64),
        ("huge", "8 × A100", 128, 2),
        ("large", "2 × RTX 4090", 128, 8),
        ("huge", "8 × H200", 256, 1),
        ("tiny", "CPU", 32, 64),
    ],
)
def test_larger_models_take_smaller_micro_batches_of_the_same_global_one(dry_run, model, gpus, batch, accumulate):
    args = pretraining_flags(
        split_at_main(words_of(dry_run("run_local.sh", gpus, "--data_path", "/d", "--model", model)))[2]
    )
    assert (args.batch_size, args.accum_iter) == (batch, accumulate)


def test_batches_of_ones_own_and_visible_gpus(dry_run):
    args = pretraining_flags(
        split_at_main(
            words_of(dry_run("run_local.sh", "CPU", "--data_path", "/d", "--batch_size", "96", "--ranks", "3"))
        )[2]
    )
    assert (args.batch_size, args.accum_iter) == (96, 7)
    words = words_of(dry_run("run_local.sh", "8 × H200", "--data_path", "/d", CUDA_VISIBLE_DEVICES="2,5"))
    assert words[:3] == ["mpirun", "-np", "2"] and "--oversubscribe" not in words
    assert "--oversubscribe" in words_of(dry_run("run_local.sh", "2 × RTX 4090", "--data_path", "/d", "--ranks", "4"))
    assert (
        words_of(dry_run("run_local.sh", "8 × H200", "--data_path", "/d", CUDA_VISIBLE_DEVICES=""))[0]
        == ".venv/bin/python"
    )


def test_relative_paths_are_meant_from_where_it_is_started(dry_run, tmp_path):
    words = words_of(dry_run("run_local.sh", "CPU", "--data_path", "data", "--models_path", "models"))
    named = dict(zip(words, words[1:]))
    assert (ROOT / named["--data_path"]).resolve() == tmp_path / "data"
    assert (
        ROOT / named["--output_dir"]
    ).resolve() == tmp_path / "models" / "pretrain_benv2_base_per_channel_token_seed0"


@pytest.mark.parametrize("script", ["run_local.sh", "qsub_run.sh"])
@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--model", "base"], ["DATA_PATH is missing"]),
        (["--data_path", "/d", "--model", "giant"], ["MODEL=giant", "base large huge tiny"]),
        (["--data_path", "/d", "--task_type", "train"], ["TASK_TYPE=train"]),
        (["--data_path", "/d", "--dataset", "sen12flood"], ["sen12flood", "pretrain with benv1 or benv2"]),
        (["--data_path", "/d", "--weight_mode", "both"], ["WEIGHT_MODE=both"]),
        (["--data_path", "/d", "--epoch", "0"], ["EPOCH=0"]),
        (["--data_path", "/d", "--checkpoint", "c.pth"], ["CHECKPOINT=", "c.pth", "--finetune"]),
        (["--data_path"], ["--data_path: a value is missing"]),
        (["/d"], ["/d: is no flag"]),
        (["--clip_grad", "1"], ["--clip_grad", "after --"]),
        (["--data_path", "/d", "--", "--batch_size", "3"], ["--batch_size: give it before --"]),
    ],
)
def test_what_cannot_be_meant_is_one_line(dry_run, script, flags, parts):
    refused(dry_run(script, "8 × H200", *flags, SITE_GROUP="g"), f"{script}: error: ", *parts)


def test_ranks_that_the_published_batch_cannot_be_dealt_to(dry_run):
    refused(dry_run("run_local.sh", "8 × H200", "--data_path", "/d", "--ranks", "3"), "2048", "3 ranks", "BATCH_SIZE")


def test_a_group_is_asked_for_before_submitting(dry_run):
    refused(dry_run("qsub_run.sh", "CPU", "--data_path", "/d"), "SITE_GROUP is missing")
    result = dry_run("qsub_run.sh", "CPU", "--data_path", "/d", "--site_group", "none")
    assert result.returncode == 0 and " -P " not in result.stdout


def test_settings_of_a_site_come_from_a_file_and_flags_win(dry_run, tmp_path):
    text = (ROOT / "scripts" / "site.example.sh").read_text()
    (tmp_path / "site.sh").write_text(
        text.replace("SITE_GROUP:=", "SITE_GROUP:=ours").replace("SITE_GPU:=H200", "SITE_GPU:=V100")
    )
    shown = dry_run("qsub_run.sh", "CPU", "--data_path", "/d", "--site", "site.sh", "--site_queue", "rt_V").stdout
    assert " -P ours -q rt_V -l select=1:ncpus=192:mpiprocs=4 " in shown


def test_without_data_the_whole_way_on_simulated_scenes_is_shown(dry_run):
    result = dry_run("run_local.sh", "CPU")
    assert result.returncode == 0, result.stderr
    programs = [" ".join(shlex.split(line)) for line in result.stdout.splitlines()]
    for part in (
        "sarwmix.simulate",
        "main_pretrain.py",
        "exponential_2_n_training",
        "--inference",
        "main_finetune.py",
        "compare_runs",
    ):
        assert any(part in line for line in programs), part


@pytest.mark.parametrize("script", ["run_local.sh", "qsub_run.sh"])
def test_help_names_every_setting(dry_run, script):
    text = dry_run(script, "CPU", "--help").stdout
    names = [
        name
        for line in (ROOT / "scripts" / "runner.sh").read_text().split("SETTINGS=(")[1].split(")")[0].split()
        for name in line.split()
    ]
    for name in (
        *names,
        *(
            ("RANKS",)
            if script == "run_local.sh"
            else ("RESUBMIT", "NODES", "WALLTIME", "SITE", "SITE_GROUP", "SITE_MODULES")
        ),
    ):
        assert name in text, name


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean():
    result = subprocess.run(
        ["shellcheck", "-x", *sorted((ROOT / "scripts").glob("*.sh"))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


# A program instead of Python: says what it was started with, and takes SIGTERM as a reason to save.
PROGRAM = """#!/bin/bash
trap 'echo saved; exit 143' TERM
echo "started $*"
touch running
for _ in {1..1000}; do sleep 0.05; done
"""


def test_a_run_on_this_machine_is_logged_and_gets_the_signals(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("true\n")
    (tmp_path / "data").mkdir()
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM)
    program.chmod(0o755)
    run = subprocess.Popen(
        ["bash", tmp_path / "scripts" / "run_local.sh", "--data_path", "data", "--ranks", "1"],
        cwd=tmp_path,
        text=True,
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    (log,) = (tmp_path / "output" / "logs").glob("pretrain_benv2_base_per_channel_token_seed0_2*.log")
    assert run.returncode == 143 and said.endswith("saved\n")
    started, saved = log.read_text().splitlines()
    assert started.startswith("started main_pretrain.py --dataset benv2 --data_path data ") and saved == "saved"
