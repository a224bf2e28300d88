# SPDX-License-Identifier: MIT
"""What PBS Pro and Slurm need to be told: settings of scripts/qsub_run.sh and scripts/sbatch_run.sh, submission, start.

Imports only the standard library, so that it runs before anything is installed.
"""

import os
import re
import shlex
from pathlib import Path

from common.errors import UsageError
from common.launchers import LOST_HOST_FLAGS
from util.recipe import SETTINGS, Gpus, Setting

NODES = {"H200": Gpus(8, "H200", 143771), "A100": Gpus(8, "A100", 40960), "V100": Gpus(4, "V100", 16384)}
SECONDS_TO_SAVE = 300  # before the end of a job, at which it is told to save and end
GPU = Setting("H200", (*NODES,), "GPUs of a node, which determine the ranks and the batch before the job starts")
MODULES = Setting("", None, "environment modules to load, separated by spaces")


def settings_of_jobs(resubmit):
    """The settings of a recipe, and those that both systems have. resubmit: the help of RESUBMIT."""
    return {
        **SETTINGS,
        "RESUBMIT": Setting("0", 0, resubmit),
        "NODES": Setting("1", 1, "nodes per job"),
        "WALLTIME": Setting("24:00:00", None, "H:MM:SS; the run saves and ends five minutes earlier"),
        "SITE": Setting("", None, "file with the settings of the site (default: scripts/site.sh if it exists)"),
    }


def minutes_of(walltime):
    """The time limit of a run in minutes: that of its job, "H:MM:SS", less five for saving. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])", walltime)
    if not match:
        raise UsageError(f"WALLTIME={walltime}: must be hours, minutes and seconds, such as 24:00:00")
    minutes = int(match[1]) * 60 + int(match[2]) - SECONDS_TO_SAVE // 60
    if minutes <= 0:
        raise UsageError(
            f"WALLTIME={walltime}: must be more than five minutes, because the last five are reserved for saving"
        )
    return minutes


class Pbs:
    """PBS Pro: qsub, and mpirun in the job."""

    script = "qsub_run.sh"
    job_id = "PBS_JOBID"
    queue = "SITE_QUEUE"  # the setting that chooses nodes with GPUs
    settings = {
        **settings_of_jobs("number of follow-up jobs; none follows an error, or a job that saved nothing new"),
        "SITE_GROUP": Setting("", None, 'group that is charged (qsub -P); "none" if the site has no groups'),
        "SITE_QUEUE": Setting("rt_HF", None, "queue of the jobs"),
        "SITE_NCPUS": Setting("192", 1, "CPU cores of a node"),
        "SITE_GPU": GPU,
        "SITE_MODULES": MODULES,
    }

    def check(self, values, in_job):
        """Raises UsageError for settings with which no job can be submitted."""
        if not values["SITE_GROUP"] and (not in_job or values["RESUBMIT"] != "0"):
            raise UsageError(
                "SITE_GROUP is missing: the group that is charged for jobs, or 'none' if the site has no groups"
            )

    def gpus_of_node(self, values):
        """The Gpus of a node, as the settings state them."""
        return NODES[values["SITE_GPU"]]

    def hosts(self, env):
        """The hosts of the current job. Raises UsageError if their list is missing."""
        file = env.get("PBS_NODEFILE", "")
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError:
            raise UsageError(f"PBS_NODEFILE={file}: cannot be read; start this in a job of PBS") from None
        return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))

    def launch(self, hosts, gpus, values, env):
        """The command prefix that starts a rank on each GPU of the hosts."""
        command = ["mpirun", "-np", str(len(hosts) * gpus.count)]
        command += ["--host", ",".join(f"{host}:{gpus.count}" for host in hosts)]
        command += ["--map-by", f"ppr:{gpus.count}:node", "--bind-to", "none"]
        if len(hosts) > 1:  # ranks on other nodes do not inherit the environment of this job
            command += LOST_HOST_FLAGS
            library_path = ["LD_LIBRARY_PATH"] if env.get("LD_LIBRARY_PATH") else []
            for name in ("MASTER_ADDR", "PBS_JOBID", "PATH", *library_path):
                command += ["-x", name]
        return command

    def submission(self, values, gpus, handed_on):
        """The command that submits a job. handed_on: {setting: text}, which the job reads from its environment."""
        select = f"select={values['NODES']}:ncpus={values['SITE_NCPUS']}:mpiprocs={gpus.count}"
        command = ["qsub", "-N", f"sarwmix-{values['TASK_TYPE']}"]
        command += [] if values["SITE_GROUP"] == "none" else ["-P", values["SITE_GROUP"]]
        command += ["-q", values["SITE_QUEUE"], "-l", select, "-l", f"walltime={values['WALLTIME']}"]
        # qsub takes the values of -v from the environment, so that they may contain any character.
        return [*command, "-v", ",".join(handed_on), f"scripts/{self.script}"]


class Slurm:
    """Slurm: sbatch, and srun in the job."""

    script = "sbatch_run.sh"
    job_id = "SLURM_JOB_ID"
    queue = "SITE_PARTITION"
    settings = {
        **settings_of_jobs(
            "how often the job may be requeued to continue, by itself or by Slurm; it does not requeue itself after "
            "an error, or if it saved nothing new"
        ),
        "SITE_ACCOUNT": Setting("", None, "account that is charged (sbatch --account), if the site requires one"),
        "SITE_PARTITION": Setting("", None, "partition of the jobs (default: the site's)"),
        "SITE_GPU": GPU,
        "SITE_GPUS": Setting("", 1, "GPUs of a node (default: 8, and 4 for V100)"),
        "SITE_GRES": Setting(
            "", None, "name of the GPUs at the site, such as gpu:h200:8 (sbatch --gres; default: --gpus-per-node)"
        ),
        "SITE_CPUS": Setting("8", 1, "CPU cores for each GPU"),
        "SITE_CONSTRAINT": Setting("", None, "features that nodes must have (sbatch --constraint)"),
        "SITE_SBATCH": Setting("", None, "more flags of sbatch, quoted as for a shell: --qos gpu --mem 0"),
        "SITE_MODULES": MODULES,
    }

    def check(self, values, in_job):
        """Raises UsageError for settings with which no job can be submitted."""
        try:
            shlex.split(values["SITE_SBATCH"])
        except ValueError as error:
            raise UsageError(
                f"SITE_SBATCH={values['SITE_SBATCH']}: cannot be read ({error}); quote it as for a shell"
            ) from None

    def gpus_of_node(self, values):
        """The Gpus of a node, as the settings state them."""
        gpus = NODES[values["SITE_GPU"]]
        return gpus._replace(count=int(values["SITE_GPUS"] or gpus.count))

    def hosts(self, env):
        """A place for each host of the current job; srun knows their names. Raises UsageError without their number."""
        nodes = env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or ""
        if not re.fullmatch("[1-9][0-9]{0,5}", nodes):
            raise UsageError(f"SLURM_JOB_NUM_NODES={nodes}: must be a number of nodes; start this in a job of Slurm")
        return [os.uname().nodename] * int(nodes)

    def launch(self, hosts, gpus, values, env):
        """The command prefix that starts a rank on each GPU of the hosts."""
        cores = env.get("SLURM_CPUS_PER_TASK") or values["SITE_CPUS"]  # srun does not take it from the job
        command = ["srun", "--export=ALL", "--nodes", str(len(hosts)), "--ntasks", str(len(hosts) * gpus.count)]
        return [*command, "--ntasks-per-node", str(gpus.count), "--cpus-per-task", cores]

    def submission(self, values, gpus, handed_on):
        """The command that submits a job, which inherits the environment of sbatch, the settings in it."""
        command = ["sbatch", "--job-name", f"sarwmix-{values['TASK_TYPE']}"]
        for flag, name in (("--account", "ACCOUNT"), ("--partition", "PARTITION"), ("--constraint", "CONSTRAINT")):
            command += [flag, values[f"SITE_{name}"]] if values[f"SITE_{name}"] else []
        command += ["--nodes", values["NODES"], "--ntasks-per-node", str(gpus.count)]
        command += ["--cpus-per-task", values["SITE_CPUS"]]
        command += ["--gres", values["SITE_GRES"]] if values["SITE_GRES"] else ["--gpus-per-node", str(gpus.count)]
        # To the shell of the job alone (B:), which hands it on to srun.
        command += ["--time", values["WALLTIME"], "--requeue", "--signal", f"B:USR1@{SECONDS_TO_SAVE}"]
        command += ["--open-mode", "append", "--export", "ALL", *shlex.split(values["SITE_SBATCH"])]
        return [*command, f"scripts/{self.script}"]


SYSTEMS = {system.script: system for system in (Pbs(), Slurm())}
