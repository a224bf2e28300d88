# SPDX-License-Identifier: MIT
"""Runs to stop and continue, and comparisons of how they end."""

import json
import operator

import pandas as pd
import pytest

from common.errors import UsageError
from tests.helpers.forked import finish, noting_samples
from tests.helpers.runs import log_of, same_states, scalars
from util.checkpoint import load_checkpoint

# Both train for 2 epochs of 6 steps.
SMALL = (
    "--model mixmim_tiny --input_size 64 --num_workers 0 --warmup_epochs 1 --lr 1e-3 --log_freq 2 "
    "--device cpu --drop_path 0.3 --clip_grad 1"
)
PRETRAIN = (SMALL, "--batch_size 4 --accum_iter 2 --epochs 2 --save_epochs 1 --range_mask_ratio 0.2")
FINETUNE = (SMALL, "--dataset benv2 --finetune '' --batch_size 2 --accum_iter 2 --epochs 2 --mixup 0.8 --cutmix 1.0")


@pytest.fixture(scope="module")
def jobs(simulated, tmp_path_factory):
    """{program: its flags}, on the 48 simulated patches; for finetuning they are dealt anew to three splits."""
    frame = pd.read_parquet(simulated / "metadata.parquet").sample(frac=1, random_state=0)
    frame["split"] = ["train"] * 24 + ["validation"] * 11 + ["test"] * 13
    metadata = tmp_path_factory.mktemp("metadata") / "dealt.parquet"
    frame.to_parquet(metadata)
    return {
        "main_pretrain": ("--data_path", simulated, PRETRAIN),
        "main_finetune": ("--data_path", simulated, "--metadata", metadata, FINETUNE),
    }


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """{program: (folder, samples in the order they were trained on)} of runs that nothing happened to."""
    results = {}
    for program, flags in jobs.items():
        folder = tmp_path_factory.mktemp(program)
        hurt = (noting_samples, folder / "samples")
        finish(program, (flags, "--output_dir", folder / "run"), folder / "output", hurt=hurt)
        results[program] = folder / "run", (folder / "samples").read_text()
    return results


def unloadable(folder):
    """Checkpoints under their final names that cannot be loaded: what is said of them."""
    bad = []
    for path in folder.glob("checkpoint*.pth"):
        try:
            load_checkpoint(path)
        except UsageError as error:
            bad.append(str(error))
    return bad


def differences(one, other):
    """What of two runs is not bitwise the same: names of files, and of parts of them."""
    found = []
    for path in sorted(one.glob("checkpoint*.pth")):
        states = load_checkpoint(path), load_checkpoint(other / path.name)
        if path.name != "checkpoint_previous.pth" and not same_states(*states):
            found.append(path.name)
    clock = "train_samples_per_s"
    if [{**entry, clock: 0} for entry in log_of(one)] != [{**entry, clock: 0} for entry in log_of(other)]:
        found.append("log.txt")
    found += [name for name in ("train_loss", "lr") if scalars(one, name) != scalars(other, name)]
    for path in one.glob("eval_*.json"):
        results = (json.loads((folder / path.name).read_text()) for folder in (one, other))
        if operator.ne(*({**result, "checkpoint": ""} for result in results)):
            found.append(path.name)
    pictures = one.glob("reconstruction_*.png")
    return found + [path.name for path in pictures if path.read_bytes() != (other / path.name).read_bytes()]
