# SPDX-License-Identifier: MIT
"""Runs the trainings of the study of the polarization weights; scripts/weight_study.sh starts this.

    python -m analysis.weight_study_runs START FLAGS…

Relative paths are relative to the folder START. Imports only the standard library, so that a dry run needs no set-up.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import chain
from typing import NamedTuple

from common.errors import UsageError
from util.recipe import SETTINGS, Setting, check, pretraining_folder, read_settings, settled
from util.runner import help_of

SCRIPT = "weight_study.sh"
PYTHON = ".venv/bin/python"
STUDY = {
    **SETTINGS,
    "MODELS_PATH": Setting("output/weight_study", None, "folder of all runs, and of their logs in logs/"),
    "KINDS": Setting(
        "none/token shared_avg/token shared_avg/pixel per_channel/token per_channel/pixel",
        None,
        "WEIGHT_MODE/WEIGHT_LEVEL, separated by spaces; without weights both levels are the same loss",
    ),
    "SEEDS": Setting("0 1 2", None, "separated by spaces"),
    "FLOOD_PATH": Setting("", None, "pairs for the flood classifier (default: none is trained)"),
    "JOBS": Setting("1", 1, "kinds and seeds at a time, on all GPUs or cores"),
    "RANKS": Setting("", 1, "processes of each (default: one per GPU)"),
}
SIMULATED = {"MODEL": "tiny", "EPOCH": "11", "DATASET": "benv2", "BATCH_SIZE": "8"}
SCENES = "--patches 1280 --scene_side 4 --seed 0 --val_fraction 0.05 --test_fraction 0.2".split()
FLOODS = "--folders 60 --size 256 --seed 0".split()
PRETRAINING = "--epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64".split()
FLOOD_TRAINING = "--epochs 8 --warmup_epochs 1 --lr 1e-3 --val_fraction 0.2".split()


class Step(NamedTuple):
    """A command. unless: a file; if it exists when the step is due, the step is skipped."""

    command: list
    unless: str = ""


class Study(NamedTuple):
    """The steps of a study."""

    before: list  # steps that run first, in order
    jobs: list  # lists of steps; several lists run at a time, each in order
    after: list  # steps that run last


def plan(values, extra, simulated):
    """The Study of settings with defaults. extra: flags for pretraining. simulated: makes the data first."""
    v, before, flooding = dict(values), [], []
    models = v["MODELS_PATH"]
    if simulated:
        v |= {**SIMULATED, "DATA_PATH": f"{models}/simulated", "FLOOD_PATH": f"{models}/simulated_floods"}
        extra, flooding = [*PRETRAINING, *extra], FLOOD_TRAINING
        before = [
            Step([PYTHON, "-m", "sarwmix.simulate", "--out", v["DATA_PATH"], *SCENES]),
            Step([PYTHON, "-m", "sarwmix.simulate.flood", "--out", v["FLOOD_PATH"], *FLOODS]),
        ]
    batch = ["--batch_size", v["BATCH_SIZE"], "--accum_iter", v["ACCUM_ITER"] or "1"] if v["BATCH_SIZE"] else []

    def training(task, dataset, data, flags):
        words = ["bash", "scripts/run_local.sh", "--task_type", task, "--dataset", dataset, "--data_path", data]
        words += ["--models_path", models, "--model", v["MODEL"], "--epoch", v["EPOCH"]]
        return Step([*words, *(["--ranks", v["RANKS"]] if v["RANKS"] else []), *flags])

    def floods(flags):
        if not v["FLOOD_PATH"]:
            return []
        flags = ["--pretrained_on", v["DATASET"], *flags, *batch, "--", *flooding]
        return [training("finetune", "sen12flood", v["FLOOD_PATH"], flags)]

    def job(kind, seed):
        mode, _, level = kind.partition("/")
        weights = ["--weight_mode", mode, "--weight_level", level, "--seed", seed]
        pretraining = training("pretrain", v["DATASET"], v["DATA_PATH"], [*weights, *batch, "--", *extra])
        kind_and_seed = {"PRETRAINED_ON": v["DATASET"], "WEIGHT_MODE": mode, "WEIGHT_LEVEL": level, "SEED": seed}
        return [pretraining, *probe(pretraining_folder({**v, **kind_and_seed}), v), *floods(weights)]

    jobs = []
    for seed in v["SEEDS"].split():
        jobs += [job(kind, seed) for kind in v["KINDS"].split()]
        jobs.append(floods(["--checkpoint", "random", "--seed", seed]))
    table = [PYTHON, "-m", "analysis.weight_study", models, "--output", f"{models}/weight_study.png"]
    return Study(before, jobs, [Step([*table, "--table", f"{models}/weight_study.csv"])])


def probe(folder, values):
    """Steps that probe the features of a pretraining run linearly, and leave probe.json in its folder."""
    done, data = f"{folder}/probe.json", ["--dataset", values["DATASET"], "--data_path", values["DATA_PATH"]]
    train, test = f"{folder}/train.npz", f"{folder}/test.npz"
    checkpoint = f"{folder}/checkpoint_{values['EPOCH']}.pth"
    steps = [
        Step([PYTHON, "main_finetune.py", "--embed", f, "--split", split, *data, "--finetune", checkpoint], done)
        for split, f in (("train", train), ("test", test))
    ]
    words = [PYTHON, "-m", "analysis.probe", "--train", train, "--test", test, "--allow_shared_groups"]
    return [*steps, Step([*words, "--method", "linear", "--output", done], done)]


def run_jobs(jobs, at_a_time, env=None):
    """Runs jobs, lists of steps, several at a time. If a step fails, ends all others and exits with its status."""
    waiting, running = [iter(job) for job in jobs][::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop()
                step = next((step for step in job if not (step.unless and os.path.exists(step.unless))), None)
                if step:
                    process = subprocess.Popen(step.command, env=env)
                    running[process.pid] = process, job
            if running:
                pid, status = os.wait()
                process, job = running.pop(pid)
                code = process.returncode = os.waitstatus_to_exitcode(status)
                if code:
                    sys.exit(code if code > 0 else 128 - code)
                waiting.append(job)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():  # a training saves before it ends
            process.wait()


def run(study, at_a_time):
    """Sets up the environment and runs a Study."""
    env = {**os.environ, "EXTRA": ""}
    if at_a_time > 1:
        env["OMP_NUM_THREADS"] = str(math.ceil(len(os.sched_getaffinity(0)) / at_a_time))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    run_jobs([[Step(["bash", "scripts/setup.sh"]), *study.before]], 1, env)
    run_jobs(study.jobs, at_a_time, env)
    run_jobs([study.after], 1, env)


def main(argv=None):
    started = time.monotonic()
    start, *words = sys.argv[1:] if argv is None else argv
    try:
        request = read_settings(STUDY, words, os.environ, start)
        if request.help:
            print("\n".join(help_of(SCRIPT, STUDY)))
            return
        values = settled(STUDY, request.values)
        simulated = not values["DATA_PATH"]
        check({**values, "DATA_PATH": values["DATA_PATH"] or "simulated"}, request.extra, request.dry_run or simulated)
    except UsageError as error:
        sys.stderr.write(f"{SCRIPT}: error: {error}\n")
        sys.exit(2)
    study = plan(values, request.extra, simulated)
    if request.dry_run:
        for step in chain(study.before, *study.jobs, study.after):
            if not os.path.exists(step.unless):
                print(shlex.join(step.command))
        return
    try:
        run(study, int(values["JOBS"]))
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"Done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
