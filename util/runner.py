# SPDX-License-Identifier: MIT
"""Computes the commands of scripts/run_local.sh, qsub_run.sh and sbatch_run.sh: for this machine, PBS Pro and Slurm.

    python -m util.runner run_local.sh START FLAGS…
    python -m util.runner qsub_run.sh START FLAGS…         and then, with the variables that this sets: qsub_run.sh:job

Relative paths are relative to the folder START. The output is shell code that the script evaluates: it prints and exits
(--help, --dry_run), or sets variables. Imports only the standard library, so that it runs before anything is installed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from itertools import takewhile
from pathlib import Path

from common.errors import UsageError
from common.launchers import mpirun, torchrun
from util.batch_systems import SYSTEMS, minutes_of
from util.recipe import SETTINGS, Gpus, Setting, check, read_settings, recipe, settled

LOCAL = {**SETTINGS, "RANKS": Setting("", 1, "processes (default: one per GPU)")}


# ---- Shell code ----------------------------------------------------------------------------------


def assign(**values):
    """Shell code that sets variables to a string, or to an array for a list."""
    return "\n".join(
        f"{name}={shlex.quote(value) if isinstance(value, str) else f'({shlex.join(value)})'}"
        for name, value in values.items()
    )


def export(values):
    """Shell code that exports variables."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def print_and_exit(lines):
    return f"printf '%s\\n' {shlex.join(lines)}; exit"


def help_of(script, settings):
    """Lines of --help: the comment at the head of the script, and the settings."""
    lines = (Path("scripts") / script).read_text(encoding="utf-8").splitlines()[2:]
    head = [line[2:] for line in takewhile(lambda line: line.startswith("# "), lines)]
    head.append(
        "Settings: each is an environment variable (MODEL=large) or a flag of the same name in lower case (--model "
        "large), which takes precedence."
    )
    for name, (default, allowed, text) in settings.items():
        choices = f" [{', '.join(allowed)}]" if isinstance(allowed, tuple) else ""
        head.append(f"  {name:<16}{text}{choices}{f' (default: {default})' if default else ''}")
    return [*head, "Flags of the main program can follow after --, and take precedence over the recipe's."]


# ---- The machine ---------------------------------------------------------------------------------


def count_gpus(listed, visible=None):
    """The Gpus in lines "name, memory in MiB" of nvidia-smi. visible: CUDA_VISIBLE_DEVICES, or None if unset."""
    found = [line.split(",", 1) for line in listed.splitlines() if re.search(r",.*\d", line)]
    sizes = [int(re.sub(r"\D", "", memory)) for _, memory in found]
    count = len(found)
    if visible is not None:
        count = 0 if visible.startswith("-") else len(re.findall("[^,]*,|[^,]+$", visible))
    return Gpus(count, found[-1][0] if found else "", min(sizes, default=0))


def find_gpus(env=os.environ):
    """The Gpus of this machine that CUDA can use; none if nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return Gpus()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, stdout=subprocess.PIPE, text=True)
    return Gpus() if result.returncode else count_gpus(result.stdout, env.get("CUDA_VISIBLE_DEVICES"))


def plural(count, what):
    return f"{count} {what}{'' if count == 1 else 's'}"


def describe(made, task, nodes, gpus, log):
    """Lines that describe a run, as shell comments, so that the output of a dry run can be pasted."""
    lines = [f"# {plural(nodes, 'node')}, {plural(made.ranks, 'rank')} on {gpus.name or 'the CPU'}"]
    if task != "test":
        lines.append(
            f"# global batch {made.batch * made.accumulate * made.ranks} = {plural(made.batch, 'image')} × "
            f"{plural(made.accumulate, 'accumulation')} × {plural(made.ranks, 'rank')}"
        )
    return [*lines, f"# log: {log}"]


def log_of(made, models):
    """The path of the console log of a run."""
    return f"{models}/logs/{os.path.basename(made.folder)}_{time.strftime('%Y%m%d-%H%M%S')}.log"


# ---- run_local.sh --------------------------------------------------------------------------------


def run_local(start, argv, env):
    """Shell code that sets ranks, launch, without_mpi and command; with a command also said and log, for the
    demonstration dry_run and models.

    launch starts the ranks with mpirun, without_mpi with torchrun. The script decides, as its set-up may install MPI.
    """
    request = read_settings(LOCAL, argv, env, start)
    if request.help:
        return print_and_exit(help_of("run_local.sh", LOCAL))
    values, gpus = settled(LOCAL, request.values), find_gpus(env)
    ranks = int(values["RANKS"] or max(1, gpus.count))
    launch, without_mpi = mpirun(ranks, gpus.count), torchrun(ranks) if ranks > 1 else []
    if request.dry_run and shutil.which("mpirun") is None:
        launch = without_mpi
    starts = {"ranks": str(ranks), "launch": launch, "without_mpi": without_mpi}
    if not request.values.keys() - {"MODELS_PATH", "RANKS"}:
        dry_run = "yes" if request.dry_run else ""
        return assign(**starts, dry_run=dry_run, models=values["MODELS_PATH"], command=[])
    check(values, request.extra, request.dry_run)
    made = recipe(values, ranks, gpus, request.dry_run)
    log = log_of(made, values["MODELS_PATH"])
    command = [".venv/bin/python", made.program, *made.flags, *request.extra]
    said = describe(made, values["TASK_TYPE"], 1, gpus, log)
    if request.dry_run:
        return print_and_exit([*said, shlex.join([*launch, *command])])
    return assign(**starts, command=command, said=said, log=log)


# ---- qsub_run.sh and sbatch_run.sh ---------------------------------------------------------------


def site(system, start, argv, env):
    """Shell code that exports the given settings, which the file of the site may read, and sets SITE and dry_run."""
    request = read_settings(system.settings, argv, env, start)
    if request.help:
        return print_and_exit(help_of(system.script, system.settings))
    values = dict(request.values)
    if request.extra:
        values["EXTRA"] = shlex.join(request.extra)
    path = values.get("SITE") or ("scripts/site.sh" if os.path.isfile("scripts/site.sh") else "")
    if path and not os.path.isfile(path):
        raise UsageError(f"SITE={path}: there is no such file; copy scripts/site.example.sh")
    return f"{export({**values, 'SITE': path})}\n{assign(dry_run=['--dry_run'] if request.dry_run else [])}"


def nodes_of_job(system, env):
    """(hosts, Gpus of each) of the current job. Raises UsageError if the list of nodes or a GPU is missing."""
    hosts, gpus = system.hosts(env), find_gpus(env)
    if not gpus.count:
        raise UsageError(
            f"nvidia-smi shows no GPU on {os.uname().nodename}; ask for nodes with GPUs ({system.queue}), or load "
            "their driver's module (SITE_MODULES)"
        )
    return hosts, gpus


def job(system, start, argv, env):
    """Shell code that exports the settings, for the next job, and sets task, run_folder, master, command, submission,
    said and log."""
    request = read_settings(system.settings, argv, env, start)
    values, in_job = settled(system.settings, request.values), bool(env.get(system.job_id))
    minutes = minutes_of(values["WALLTIME"])
    check(values, request.extra, request.dry_run)
    system.check(values, in_job)
    if in_job:
        hosts, gpus = nodes_of_job(system, env)
    else:
        hosts, gpus = [f"NODE{n + 1}" for n in range(int(values["NODES"]))], system.gpus_of_node(values)
    made = recipe(values, len(hosts) * gpus.count, gpus, request.dry_run)
    command = system.launch(hosts, gpus, values, env)
    command += [f"{env.get('PWD') or os.getcwd()}/.venv/bin/python", made.program, *made.flags]
    if values["TASK_TYPE"] != "test":
        command += ["--walltime", str(minutes)]
    command += request.extra
    handed_on = {name: value for name, value in values.items() if value}
    submission = system.submission(values, gpus, handed_on)
    log = log_of(made, values["MODELS_PATH"])
    said = [*describe(made, values["TASK_TYPE"], len(hosts), gpus, log), shlex.join(command)]
    if request.dry_run:
        pairs = [f"{name}={value}" for name, value in handed_on.items()]
        before = [] if in_job else [shlex.join(["env", *pairs, *submission]), "# and in the job:"]
        return print_and_exit([*before, *said])
    settings = assign(
        task=values["TASK_TYPE"],
        run_folder=made.folder,
        master=hosts[0],
        command=command,
        submission=submission,
        said=said,
        log=log,
    )
    return f"{export(handed_on)}\n{settings}"


def main(argv=None):
    script, start, *words = sys.argv[1:] if argv is None else argv
    script, _, step = script.partition(":")
    answer = run_local if script == "run_local.sh" else partial(job if step else site, SYSTEMS[script])
    try:
        sys.stdout.write(f"{answer(start, words, os.environ)}\n")
    except UsageError as error:
        sys.stderr.write(f"{script}: error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
