# SPDX-License-Identifier: MIT
"""The commands of `analysis.objective_study`: data, pretrainings and evaluations, and which of them are left to do."""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import main_pretrain
from analysis import jobs
from analysis.jobs import Step
from analysis.objective_arms import ARMS, RANDOM
from analysis.objective_tasks import baselines_path, is_there, names_of, open_task, result_path, stated_by, task_words
from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = [sys.executable, str(ROOT / "main_pretrain.py")]
EVALUATE = [sys.executable, "-m", "analysis.objective_tasks"]
SCENES = "--patches 1280 --scene_side 4 --seed 0 --val_fraction 0.05 --test_fraction 0.2".split()
FLOODS = "--folders 60 --size 256 --seed 0".split()
SIMULATED, SIMULATED_MODEL = "simulated", "mixmim_tiny"  # folder of the scenes, and what is pretrained on them
SIMULATED_FLAGS = "--batch_size 8 --epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64".split()
# Flags of main_pretrain.py that the study sets, or that its arms differ in.
OURS = {"--dataset", "--data_path", "--model", "--statistics", "--seed", "--output_dir", "--resume", "--inference"}
OURS |= {word for arm in ARMS.values() for word in arm.flags if word.startswith("--")}


class Study(NamedTuple):
    """What is to be done.

    args: flags of the study, those of simulated data filled in. words: flags of main_pretrain.py for all pretrainings.
    before: Steps that make the data. epochs: of the checkpoints that are compared.
    """

    args: object
    words: list
    before: list
    epochs: int

    def run_folder(self, arm, number):
        return Path(self.args.output) / "runs" / f"{arm}_seed{number}"

    def checkpoint(self, arm, number):
        return self.run_folder(arm, number) / f"checkpoint_{self.epochs}.pth"

    def pretraining(self, arm, number):
        """The words for main_pretrain.py of a pretraining."""
        args, given = self.args, ["--dataset", self.args.dataset, "--data_path", self.args.data_path]
        for name in ("model", "statistics"):
            given += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
        folder = str(self.run_folder(arm.name, number))
        return [*given, *self.words, *arm.flags, "--seed", str(number), "--output_dir", folder, "--resume", "auto"]

    def encoders(self):
        """[(arm, seed, checkpoint)] to evaluate, seed by seed; with --tasks_only those that are there.

        After the first arm of a seed comes random, with the checkpoint whose model and input it has.
        """
        found = []
        for number in self.args.seeds:
            paths = [(arm.name, number, self.checkpoint(arm.name, number)) for arm in self.args.arms]
            if self.args.tasks_only:
                paths = [entry for entry in paths if entry[2].exists()]
            found += [*paths[:1], *((RANDOM, *entry[1:]) for entry in paths[:1]), *paths[1:]]
        return found


# ---- Planning ------------------------------------------------------------------------------------


def plan(args, words):
    """The Study of the flags and of the words for main_pretrain.py. Raises UsageError."""
    check_words(words)
    for name, values in (("arms", [arm.name for arm in args.arms]), ("seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f"--{name}: one is named twice; name each once")
    given, before = vars(args), []
    simulates = not args.data_path and (not args.tasks_only or Path(args.output, SIMULATED).is_dir())
    if simulates and args.dataset != "benv2":
        raise UsageError(f"--dataset {args.dataset}: give --data_path; only benv2 is simulated")
    if simulates:
        given, before = simulated(args)
        words = [*SIMULATED_FLAGS, *words]
    study = Study(argparse.Namespace(**given), words, before, 0)
    if args.tasks_only:
        study = study._replace(epochs=last_epochs(study), before=[])
        if not names_of(study.args):
            raise UsageError("no task has data; give one of --data_path, --flood_path, --water and --tiles")
        return study
    for arm in args.arms:
        flags = main_pretrain.parse_flags(study.pretraining(arm, args.seeds[0]))
    if flags.stop_epoch not in flags.save_epochs:
        raise UsageError(f"--save_epochs, behind --: the last epoch, {flags.stop_epoch}, must be among them; add it")
    return study._replace(epochs=flags.stop_epoch)


def check_words(words):
    """Raises UsageError for flags behind "--" that the study sets."""
    ours = [word for word in words if word.partition("=")[0] in OURS]
    if ours:
        raise UsageError(
            f"{ours[0]}, behind --: the study or its arms set it; leave it out there, or give it to an arm of your "
            "own, --arms NAME=FLAGS"
        )


def simulated(args):
    """(flags by name with the folders of simulated data and the model, Steps that simulate)."""
    scenes, floods = f"{args.output}/{SIMULATED}", args.flood_path or f"{args.output}/simulated_floods"
    make = [sys.executable, "-m"]
    before = [Step([*make, "sarwmix.simulate", "--out", scenes, *SCENES], f"{scenes}/metadata.parquet")]
    if not args.flood_path:
        step = Step([*make, "sarwmix.simulate.flood", "--out", floods, *FLOODS], f"{floods}/pairs_test.csv")
        before.append(step)
    return {
        **vars(args),
        "data_path": scenes,
        "flood_path": floods,
        "model": args.model or SIMULATED_MODEL,
    }, before


def last_epochs(study):
    """The number of epochs of the checkpoints that --tasks_only compares, the highest that is there."""
    names = [
        path.name
        for arm in study.args.arms
        for number in study.args.seeds
        for path in study.run_folder(arm.name, number).glob("checkpoint_*.pth")
    ]
    found = [int(match[1]) for match in (re.fullmatch(r"checkpoint_(\d+)\.pth", name) for name in names) if match]
    if not found:
        raise UsageError(f"--tasks_only: {study.args.output}/runs has no checkpoint of these arms and seeds; pretrain")
    return max(found)


def keep_record(study):
    """Notes what all runs of the study share. Raises DataError for a folder with another study."""
    args = study.args
    record = {name: getattr(args, name) for name in ("dataset", "data_path", "model", "statistics")}
    flags = {arm.name: list(arm.flags) for arm in args.arms}
    jobs.keep_record(args.output, {**record, "flags": study.words}, "arms", flags)


# ---- Commands ------------------------------------------------------------------------------------


def open_tasks(study):
    """The tasks whose data are given. Raises DataError, UsageError."""
    return [open_task(name, study.args, study.words) for name in names_of(study.args)]


def lacks(study, tasks, encoder):
    """Whether a result of an encoder, of `Study.encoders`, is not there. tasks: None if they cannot be opened yet."""
    arm, number, path = encoder
    if tasks is None or not path.exists():
        return True
    identity = stated_by(arm, number, path)
    return not all(
        is_there(result_path(study.args.output, task.name, arm, number), {"encoder": identity, "data": task.data})
        for task in tasks
    )


def jobs_of(study, tasks):
    """Jobs, lists of Steps that are left: the baselines, and the pretraining and the evaluation of each encoder.

    tasks: of `open_tasks`, None if they cannot be opened yet, as their data are not there.
    """
    args, found = study.args, []
    words = ["--output", args.output, *task_words(args)]
    read = ["--", *study.words] if study.words else []
    if tasks is None or not all(is_there(baselines_path(args.output, t.name), {"data": t.data}) for t in tasks):
        found.append([Step([*EVALUATE, "--baselines", *words, *read])])
    by_name = {arm.name: arm for arm in args.arms}
    for encoder in study.encoders():
        arm, number, path = encoder
        steps = []
        if arm != RANDOM and not args.tasks_only:
            steps.append(Step([*PRETRAIN, *study.pretraining(by_name[arm], number)], str(path)))
        if lacks(study, tasks, encoder):
            who = ["--arm", arm, "--seed", str(number), "--checkpoint", str(path)]
            steps.append(Step([*EVALUATE, *who, *words, *read]))
        found = [*found[:-1], found[-1] + steps] if arm == RANDOM else [*found, steps]
    return found
