# SPDX-License-Identifier: MIT
"""The trainings of `analysis.segmentation_study`, as commands, and what they share."""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import finetune_flags
from analysis import jobs
from analysis.jobs import Step
from analysis.segmentation_folds import folds_of, list_paths, slugs_of
from common.errors import DataError, UsageError
from common.files import write_json
from models_mixmim import size_of
from sarwmix.moments import Moments
from util.checkpoint_input import CHANNELS, STATISTICS, UNITS, LoadedCheckpoint, shown
from util.datasets import build_dataset, drop_missing

RANDOM = "random"
PROGRAM = [sys.executable, str(Path(__file__).resolve().parents[1] / "main_finetune.py")]
TESTED, PREDICTIONS, MEASURED = "eval_test.json", "predictions.csv", "statistics.json"
# Flags of main_finetune.py that the study sets.
OURS = (
    "dataset data_path metadata val_metadata test_metadata split val_split test_split val_fraction test_fraction "
    "finetune resume seed output_dir log_dir overwrite eval predictions predict output_map embed export".split()
)


class Run(NamedTuple):
    """A training. fold: a Fold. start: random, or the name of an encoder. folder: of the run."""

    fold: object
    start: str
    seed: int
    folder: Path


class Study(NamedTuple):
    """What is to be done.

    args: flags of the study. words: flags of main_finetune.py, as they are typed. inputs: {seed: {flag: value}}, the
    model and the input of random initialisation where the words do not say them; None where they are to be measured.
    slugs: {name of a group: that of its folder}.
    """

    args: object
    words: list
    dataset: object
    positive: int
    folds: list
    slugs: dict
    inputs: dict

    @property
    def starts(self):
        return [RANDOM, *dict(self.args.encoders)]

    def fold_folder(self, fold):
        return Path(self.args.output) / "folds" / self.slugs[fold.name]

    def runs(self):
        """All Runs, seed by seed."""
        runs = Path(self.args.output) / "runs"
        return [
            Run(fold, start, number, runs / f"{self.slugs[fold.name]}_{start}_{number}")
            for number in self.args.seeds
            for fold in self.folds
            for start in self.starts
        ]


def encoder(text):
    """The argparse type of NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not path or not re.fullmatch(r"[\w.-]+", name) or name == RANDOM:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, NAME of letters, digits, _ . - and not {RANDOM}")
    return name, path


def path_of(template, number):
    """The path of an encoder of this seed."""
    return template.replace("{seed}", str(number))


# ---- Planning ------------------------------------------------------------------------------------


def plan(args, words):
    """The Study of the flags of the study and the words for main_finetune.py. Raises DataError, UsageError."""
    parser = finetune_flags.build_parser()
    given, usual = parser.parse_args(words), parser.parse_args([])
    ours = [name for name in OURS if getattr(given, name) != getattr(usual, name)]
    if ours:
        raise UsageError(f"--{ours[0]}, after --: the study sets it; leave it out there")
    for name, values in (("encoders", [name for name, _ in args.encoders]), ("seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f"--{name}: one is named twice; name each once")
    for path in (path_of(template, number) for _, template in args.encoders for number in args.seeds):
        if not os.path.exists(path):
            raise UsageError(f"--encoders: {path}: there is no such checkpoint")
    data = ["--dataset", args.dataset, "--data_path", args.data_path, "--finetune", ""]
    flags = parser.parse_args([*data, *words, "--output_dir", f"{args.output}/runs"])
    flags = finetune_flags.check_flags(flags)
    dataset = drop_missing(build_dataset(flags, "all", args.metadata, supervised=True), flags)
    if dataset.is_packed:
        raise DataError(f"--data_path {args.data_path}: is a packed store; give the images that it was made of")
    if args.positive not in dataset.CLASSES:
        raise DataError(f"--positive {args.positive}: the classes are {', '.join(dataset.CLASSES)}; name one of them")
    positive = dataset.CLASSES.index(args.positive)
    folds = folds_of(dataset, positive)
    return Study(args, words, dataset, positive, folds, slugs_of([fold.name for fold in folds]), inputs_of(args, flags))


def inputs_of(args, flags):
    """The `inputs` of a Study: those of the first encoder. Raises UsageError for a checkpoint that does not fit."""
    given = {name for name in ("model", "input_size", *STATISTICS) if getattr(flags, name) is not None}
    if not args.encoders:
        return dict.fromkeys(args.seeds, {} if given.issuperset(STATISTICS) else None)
    paths = {number: path_of(args.encoders[0][1], number) for number in args.seeds}
    stated = {path: LoadedCheckpoint.load(path, size_of).started_from(flags) for path in set(paths.values())}
    return {
        number: {name: value for name, value in stated[path].items() if name not in given}
        for number, path in paths.items()
    }


def keep_record(study):
    """Makes the folder of the study and notes what its runs share. Raises DataError if it holds something else.

    Seeds and encoders may be added to a study.
    """
    args = study.args
    named = "\n".join(f"{name} {group}" for name, group in zip(study.dataset.ids, study.dataset.groups))
    record = {
        "dataset": args.dataset,
        "data_path": args.data_path,
        "images": hashlib.sha256(named.encode()).hexdigest(),
        "positive": args.positive,
        "flags": study.words,
    }
    jobs.keep_record(args.output, record, "encoders", dict(args.encoders))


# ---- Commands ------------------------------------------------------------------------------------


def start_words(study, run):
    """Flags of the weights and of the input of a run: the same input for random weights as for the first encoder."""
    if run.start != RANDOM:
        return ["--finetune", path_of(dict(study.args.encoders)[run.start], run.seed)]
    inputs = study.inputs[run.seed]
    if inputs is None:
        return ["--finetune", "", "--statistics", str(study.fold_folder(run.fold) / MEASURED)]
    return ["--finetune", "", *(w for name, value in inputs.items() for w in (f"--{name}", *str(shown(value)).split()))]


def steps_of(study, run):
    """The Steps of a run: its training, and with --tile_share what it predicts for each tested image."""
    args, folder = study.args, str(run.folder)
    lists = list_paths(args.dataset, study.fold_folder(run.fold))
    data = [*PROGRAM, "--dataset", args.dataset, "--data_path", args.data_path, *study.words]
    words = ["--metadata", lists["train"], "--val_metadata", lists["val"], "--test_metadata", lists["test"]]
    words += [*start_words(study, run), "--seed", run.seed, "--output_dir", folder, "--resume", "auto"]
    steps = [Step([*data, *map(str, words)], f"{folder}/{TESTED}")]
    if args.tile_share is not None:
        words = ["--metadata", lists["test"], "--split", "test", "--eval", "--predictions", f"{folder}/{PREDICTIONS}"]
        words += ["--finetune", f"{folder}/checkpoint_best.pth", "--output_dir", f"{folder}/eval"]
        steps.append(Step([*data, *map(str, words)], f"{folder}/{PREDICTIONS}"))
    return steps


def write_statistics(study, fold):
    """Measures the training images of a fold, for --statistics."""
    total = Moments(study.dataset.FLOOR_DB)
    for i in fold.train:
        total.add(study.dataset.read_image(i))
    figures = total.summary()
    content = {"units": UNITS, "channels": CHANNELS, **{name: figures[name] for name in STATISTICS}}
    write_json(study.fold_folder(fold) / MEASURED, content)
