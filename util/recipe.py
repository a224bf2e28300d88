# SPDX-License-Identifier: MIT
"""The published recipes: converts a few settings to the flags of a main program.

A setting is an environment variable or a flag of the same name in lower case, which takes precedence: MODEL=large,
--model large. Flags of the main program can follow after --, and take precedence over the recipe's. Imports only the
standard library, so that it runs before anything is installed.
"""

import difflib
import os
import re
import shlex
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import UsageError
from util.step_memory import fits


class Setting(NamedTuple):
    """A setting of a recipe."""

    default: str  # "" for none
    allowed: object  # tuple of values, smallest integer, or None for any text
    help: str  # the text in --help


SETTINGS = {
    "TASK_TYPE": Setting(
        "pretrain",
        ("pretrain", "finetune", "test"),
        "what the run does; finetune ends with an evaluation on the test split",
    ),
    "DATASET": Setting(
        "benv2",
        ("benv1", "benv2", "sen12flood", "chips"),
        "BigEarthNet, SEN12-FLOOD (not for pretraining), or your own images",
    ),
    "DATA_PATH": Setting("", None, "folder of the data"),
    "MODEL": Setting("base", ("base", "large", "huge", "tiny"), "size of the model"),
    "EPOCH": Setting("64", 1, "epoch after which pretraining stops; finetuning starts from its checkpoint_EPOCH.pth"),
    "WEIGHT_MODE": Setting(
        "per_channel", ("per_channel", "shared_avg", "shared_intensity", "none"), "kind of polarization weights"
    ),
    "WEIGHT_LEVEL": Setting("token", ("token", "pixel"), "one weight for each token, or for each pixel"),
    "MODELS_PATH": Setting("output", None, "folder of all runs, and of their logs in logs/"),
    "CHECKPOINT": Setting("", None, 'checkpoint to finetune or test (default: that of the recipe); "random": none'),
    "PRETRAINED_ON": Setting(
        "",
        None,
        "dataset of the pretraining run to start from (default: DATASET; benv1 for sen12flood, as published); with "
        "CHECKPOINT, the dataset whose statistics standardise floods",
    ),
    "SEED": Setting("0", 0, "seed of the run"),
    "BATCH_SIZE": Setting(
        "", 1, "images per rank and micro-batch (default: from the published global batch and the memory of the GPU)"
    ),
    "ACCUM_ITER": Setting("", 1, "micro-batches per step (default: from the published global batch)"),
    "EXTRA": Setting("", None, "flags of the main program, as after --, quoted as for a shell"),
}
PATHS = ("DATA_PATH", "MODELS_PATH", "CHECKPOINT", "SITE")


# ---- Reading settings ----------------------------------------------------------------------------


class Request(NamedTuple):
    """The settings and flags that a user gave."""

    values: dict  # {setting: text}
    extra: list  # flags of the main program
    help: bool  # --help
    dry_run: bool  # --dry_run


def read_settings(settings, argv, env, start="."):
    """The Request of a command line and of environment variables. Raises UsageError.

    Relative paths are relative to the folder `start`.
    """
    values = {name: env[name] for name in settings if env.get(name)}
    place = argv.index("--") if "--" in argv else len(argv)
    words, extra = list(argv[:place]), list(argv[place + 1 :])
    asked = set()
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--dry_run"):
            asked.add(word)
            continue
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            raise UsageError(
                f"{word}: is not a flag; give settings as --data_path DIR, and flags of the main program after --"
            )
        if flag[2:].upper() not in settings:
            nearest = difflib.get_close_matches(flag[2:].upper().replace("-", "_"), settings, 1)
            meant = f" (did you mean --{nearest[0].lower()}?)" if nearest else ""
            raise UsageError(
                f"{word}: there is no such flag here{meant}; see --help, and give flags of the main program after --"
            )
        if not equals and not words:
            raise UsageError(f"{word}: a value is missing")
        values[flag[2:].upper()] = value if equals else words.pop(0)
    for name in PATHS:
        value = values.get(name, "")
        if value and value != "random" and not os.path.isabs(value):
            values[name] = os.path.relpath(os.path.join(start, value))
    if not extra:
        try:
            extra = shlex.split(values.get("EXTRA", ""))
        except ValueError as error:
            raise UsageError(f"EXTRA={values['EXTRA']}: cannot be read ({error}); quote it as for a shell") from None
    return Request(values, extra, bool(asked & {"-h", "--help"}), "--dry_run" in asked)


def settled(settings, given):
    """{setting: text} with defaults, "" for none. Raises UsageError for a value that is not allowed."""
    values = {name: given.get(name) or setting.default for name, setting in settings.items()}
    for name, setting in settings.items():
        value, allowed = values[name], setting.allowed
        if isinstance(allowed, tuple) and value not in allowed:
            raise UsageError(f"{name}={value}: must be one of: {' '.join(allowed)}")
        is_number = re.fullmatch(r"0|[1-9][0-9]{0,6}", value)
        if isinstance(allowed, int) and value and not (is_number and int(value) >= allowed):
            raise UsageError(f"{name}={value}: must be a whole number of at least {allowed}")
    return values


def check(values, extra, dry_run):
    """Raises UsageError for settings that contradict each other and, except in a dry run, for a missing data folder."""
    task, checkpoint, data = values["TASK_TYPE"], values["CHECKPOINT"], values["DATA_PATH"]
    if not data:
        raise UsageError("DATA_PATH is missing: the folder of the data, as a variable or as --data_path DIR")
    if not dry_run and not os.path.exists(data):
        raise UsageError(f"DATA_PATH={data}: there is no such folder")
    if task == "pretrain" and values["DATASET"] == "sen12flood":
        raise UsageError("DATASET=sen12flood: is for finetuning; pretrain with benv1 or benv2")
    if task == "pretrain" and checkpoint:
        raise UsageError(
            f"CHECKPOINT={checkpoint}: is for TASK_TYPE=finetune and test; to pretrain from weights, give "
            f"-- --finetune {checkpoint}"
        )
    if task == "test" and checkpoint == "random":
        raise UsageError("CHECKPOINT=random: only TASK_TYPE=finetune starts from random initialisation")
    for flag in extra:
        if re.match("--(batch_size|accum_iter)(=|$)", flag):
            raise UsageError(
                f"{flag}: give it before --, because the recipe computes --batch_size and --accum_iter together"
            )


# ---- The recipes ---------------------------------------------------------------------------------


class Gpus(NamedTuple):
    """The GPUs of a node."""

    count: int = 0
    name: str = ""
    mb: int = 0  # memory of the smallest, MiB


@dataclass(frozen=True)
class Recipe:
    """A main program, its flags, its output folder, and its batch: images × accumulation steps on each of the ranks."""

    program: str
    flags: list
    folder: str
    batch: int
    accumulate: int
    ranks: int


def deal_batch(values, ranks, gpus):
    """(batch size, accumulation steps) of each rank, which give the published global batch.

    Micro-batches have the published size, or a smaller one if that does not fit the GPU; without a GPU, an eighth of
    the published size. Raises UsageError if `ranks` do not divide the global batch.
    """
    own_batch, own_accumulation = int(values["BATCH_SIZE"] or 0), int(values["ACCUM_ITER"] or 0)
    task, images = values["TASK_TYPE"], 1  # images per sample
    if task == "pretrain":
        whole, batch = 2048, 256
    elif values["DATASET"] == "sen12flood":
        whole, batch, images = 128, 16, 32  # two images of 16 patches
    else:
        whole, batch = 1024, 128
    if not gpus.count:
        batch //= 8
    model = f"mixmim_{values['MODEL']}"
    while batch > 2 and (batch * ranks > whole or (gpus.count and not fits(model, batch * images, gpus.mb))):
        batch //= 2
    batch = own_batch or batch
    accumulate = own_accumulation or max(1, whole // (batch * ranks))
    if task != "test" and not own_batch and not own_accumulation and batch * ranks * accumulate != whole:
        raise UsageError(
            f"the published global batch of {whole} cannot be divided among {ranks} ranks; start 1, 2, 4, 8 or 16, "
            "or choose BATCH_SIZE (and ACCUM_ITER)"
        )
    return batch, accumulate


def pretraining_folder(values):
    """The folder of the pretraining run with these settings, from which finetuning starts."""
    name = "{MODELS_PATH}/pretrain_{PRETRAINED_ON}_{MODEL}_{WEIGHT_MODE}_{WEIGHT_LEVEL}_seed{SEED}"
    return name.format(**values)


def recipe(values, ranks, gpus, dry_run=False):
    """The Recipe of settings with defaults. Raises UsageError for a missing checkpoint, except in a dry run."""
    v = values
    task, dataset, checkpoint = v["TASK_TYPE"], v["DATASET"], v["CHECKPOINT"]
    pretrained_on = v["PRETRAINED_ON"] or ("benv1" if dataset == "sen12flood" else dataset)
    batch, accumulate = deal_batch(v, ranks, gpus)
    origin = "" if pretrained_on == dataset else f"{pretrained_on}_"
    start = f"{origin}{v['WEIGHT_MODE']}_{v['WEIGHT_LEVEL']}_seed{v['SEED']}_epoch{v['EPOCH']}"
    if checkpoint:
        start = f"{re.sub('[.]pth$', '', os.path.basename(checkpoint))}_seed{v['SEED']}"
    name = f"{dataset}_{v['MODEL']}_{start}"
    pretrained = pretraining_folder({**v, "PRETRAINED_ON": pretrained_on})
    if task == "pretrain":
        program, folder = "main_pretrain.py", pretrained
        more = (
            f"--accum_iter {accumulate} --epochs 1024 --stop_epoch {v['EPOCH']} --warmup_epochs 40 --blr 1.5e-4 "
            "--min_lr 0 --weight_decay 0.05 --mask_ratio 0.5 --norm_pix_loss "
            f"--weight_mode {v['WEIGHT_MODE']} --weight_level {v['WEIGHT_LEVEL']}"
        ).split()
    else:
        program, folder = "main_finetune.py", f"{v['MODELS_PATH']}/{task}_{name}"
        if task == "finetune":
            source, remedy = checkpoint or f"{pretrained}/checkpoint_{v['EPOCH']}.pth", "pretrain"
            more = (
                f"--accum_iter {accumulate} --epochs 50 --warmup_epochs 5 --blr 5e-4 --min_lr 1e-6 --weight_decay 0.05 "
                "--layer_decay 0.7 --drop_path 0.1"
            ).split()
        else:
            source, remedy = checkpoint or f"{v['MODELS_PATH']}/finetune_{name}/checkpoint_best.pth", "finetune"
            more = "--eval --split test".split()
        if source == "random":
            source = ""
        elif not dry_run and not os.path.exists(source):
            raise UsageError(f"{source}: there is no such checkpoint; {remedy} first, or name one with CHECKPOINT")
        more += ["--finetune", source]
    if task == "finetune" and dataset == "sen12flood" and pretrained_on == "benv2" and checkpoint:
        # Runs of this project store their statistics; released files and random weights do not.
        more += "--mean -19.1966 -12.5144 --std 5.4501 5.0019".split()
    flags = ["--dataset", dataset, "--data_path", v["DATA_PATH"], "--model", f"mixmim_{v['MODEL']}"]
    flags += ["--seed", v["SEED"], "--batch_size", str(batch), *more, "--output_dir", folder]
    if task != "test":
        flags += ["--resume", "auto"]
    return Recipe(program, flags, folder, batch, accumulate, ranks)
