# SPDX-License-Identifier: MIT
"""Computes the commands of scripts/run_local.sh and scripts/qsub_run.sh, for this machine or for PBS Pro.

    python -m util.runner run_local.sh START FLAGS…

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
from itertools import takewhile
from pathlib import Path

from common.errors import UsageError
from common.launchers import LOST_HOST_FLAGS, mpirun
from util.recipe import SETTINGS, Gpus, Setting, check, read_settings, recipe, settled

LOCAL = {**SETTINGS, "RANKS": Setting("", 1, "processes (default: one per GPU)")}
PBS = {
    **SETTINGS,
    "RESUBMIT": Setting("0", 0, "number of follow-up jobs; none follows an error, or a job that saved nothing new"),
    "NODES": Setting("1", 1, "nodes per job"),
    "WALLTIME": Setting("24:00:00", None, "H:MM:SS; the run ends five minutes before"),
    "SITE": Setting("", None, "file with the settings of the site (default: scripts/site.sh if it exists)"),
    "SITE_GROUP": Setting("", None, 'group that is charged (qsub -P); "none" if the site has no groups'),
    "SITE_QUEUE": Setting("rt_HF", None, "queue of the jobs"),
    "SITE_NCPUS": Setting("192", 1, "cores of a node"),
    "SITE_GPU": Setting(
        "H200", ("H200", "A100", "V100"), "GPUs of a node, by which their number is known before the job starts"
    ),
    "SITE_MODULES": Setting("", None, "environment modules to load, separated by spaces"),
}
NODES = {"H200": Gpus(8, "H200", 143771), "A100": Gpus(8, "A100", 40960), "V100": Gpus(4, "V100", 16384)}


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
        "Settings, each a variable or a flag of the same name in lower case, which takes precedence: MODEL=large, "
        "--model large."
    )
    for name, (default, allowed, text) in settings.items():
        choices = f" [{', '.join(allowed)}]" if isinstance(allowed, tuple) else ""
        head.append(f"  {name:<15}{text}{choices}{f' (default: {default})' if default else ''}")
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
    """Shell code that sets ranks and command; with a command also said and log, for the demonstration launch, dry_run
    and models."""
    request = read_settings(LOCAL, argv, env, start)
    if request.help:
        return print_and_exit(help_of("run_local.sh", LOCAL))
    values, gpus = settled(LOCAL, request.values), find_gpus(env)
    ranks = int(values["RANKS"] or max(1, gpus.count))
    launch = mpirun(ranks, gpus.count)
    if not request.values.keys() - {"MODELS_PATH", "RANKS"}:
        dry_run = "yes" if request.dry_run else ""
        return assign(ranks=str(ranks), launch=launch, dry_run=dry_run, models=values["MODELS_PATH"], command=[])
    check(values, request.extra, request.dry_run)
    made = recipe(values, ranks, gpus, request.dry_run)
    log = log_of(made, values["MODELS_PATH"])
    command = [*launch, ".venv/bin/python", made.program, *made.flags, *request.extra]
    said = [*describe(made, values["TASK_TYPE"], 1, gpus, log), shlex.join(command)]
    if request.dry_run:
        return print_and_exit(said)
    return assign(ranks=str(ranks), command=command, said=said, log=log)


# ---- qsub_run.sh ---------------------------------------------------------------------------------


def site(start, argv, env):
    """Shell code that exports the given settings, which the file of the site may read, and sets SITE and dry_run."""
    request = read_settings(PBS, argv, env, start)
    if request.help:
        return print_and_exit(help_of("qsub_run.sh", PBS))
    values = dict(request.values)
    if request.extra:
        values["EXTRA"] = shlex.join(request.extra)
    path = values.get("SITE") or ("scripts/site.sh" if os.path.isfile("scripts/site.sh") else "")
    if path and not os.path.isfile(path):
        raise UsageError(f"SITE={path}: there is no such file; copy scripts/site.example.sh")
    return f"{export({**values, 'SITE': path})}\n{assign(dry_run=['--dry_run'] if request.dry_run else [])}"


def minutes_of(walltime):
    """The time limit of a run in minutes: that of its job, "H:MM:SS", less five for saving. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])", walltime)
    if not match:
        raise UsageError(f"WALLTIME={walltime}: must be hours, minutes and seconds, as 24:00:00")
    minutes = int(match[1]) * 60 + int(match[2]) - 5
    if minutes <= 0:
        raise UsageError(f"WALLTIME={walltime}: must be more than five minutes, which are kept for saving")
    return minutes


def nodes_of_job(env):
    """(hosts, Gpus of each) of the current job. Raises UsageError if the list of nodes or a GPU is missing."""
    file = env.get("PBS_NODEFILE", "")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UsageError(f"PBS_NODEFILE={file}: cannot be read; start this in a job of PBS") from None
    gpus = find_gpus(env)
    if not gpus.count:
        raise UsageError(
            f"nvidia-smi shows no GPU on {os.uname().nodename}; ask for a queue with GPUs (SITE_QUEUE), or load their "
            "driver's module (SITE_MODULES)"
        )
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split())), gpus


def job(start, argv, env):
    """Shell code that exports the settings, for qsub -v, and sets task, run_folder, master, command, submission, said
    and log."""
    request = read_settings(PBS, argv, env, start)
    values, in_job = settled(PBS, request.values), bool(env.get("PBS_JOBID"))
    minutes = minutes_of(values["WALLTIME"])
    check(values, request.extra, request.dry_run)
    if not values["SITE_GROUP"] and (not in_job or values["RESUBMIT"] != "0"):
        raise UsageError("SITE_GROUP is missing: the group that pays for jobs, or 'none' where a site has no groups")
    if in_job:
        hosts, gpus = nodes_of_job(env)
    else:
        hosts, gpus = [f"NODE{n + 1}" for n in range(int(values["NODES"]))], NODES[values["SITE_GPU"]]
    made = recipe(values, len(hosts) * gpus.count, gpus, request.dry_run)
    command = ["mpirun", "-np", str(made.ranks), "--host", ",".join(f"{host}:{gpus.count}" for host in hosts)]
    command += ["--map-by", f"ppr:{gpus.count}:node", "--bind-to", "none"]
    if len(hosts) > 1:  # ranks on other nodes do not inherit the environment of this job
        command += LOST_HOST_FLAGS
        for name in ("MASTER_ADDR", "PBS_JOBID", "PATH", *(["LD_LIBRARY_PATH"] if env.get("LD_LIBRARY_PATH") else [])):
            command += ["-x", name]
    command += [f"{env.get('PWD') or os.getcwd()}/.venv/bin/python", made.program, *made.flags]
    if values["TASK_TYPE"] != "test":
        command += ["--walltime", str(minutes)]
    command += request.extra
    # qsub takes the values of -v from the environment, so that they may contain any character.
    handed_on = {name: value for name, value in values.items() if value}
    select = f"select={values['NODES']}:ncpus={values['SITE_NCPUS']}:mpiprocs={gpus.count}"
    submission = ["qsub", "-N", f"sarwmix-{values['TASK_TYPE']}"]
    submission += [] if values["SITE_GROUP"] == "none" else ["-P", values["SITE_GROUP"]]
    submission += ["-q", values["SITE_QUEUE"], "-l", select, "-l", f"walltime={values['WALLTIME']}"]
    submission += ["-v", ",".join(handed_on), "scripts/qsub_run.sh"]
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
    what, start, *words = sys.argv[1:] if argv is None else argv
    answer = {"run_local.sh": run_local, "qsub_run.sh": site, "job": job}[what]
    try:
        sys.stdout.write(f"{answer(start, words, os.environ)}\n")
    except UsageError as error:
        script = "run_local.sh" if answer is run_local else "qsub_run.sh"
        sys.stderr.write(f"{script}: error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
