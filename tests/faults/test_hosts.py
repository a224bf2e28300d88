# SPDX-License-Identifier: MIT
"""Two hosts: network namespaces on this machine, each with a host name and an address of its own. Part of the campaign.

Needs root, `ip` and the right to make namespaces.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common.launchers import LOST_HOST_FLAGS
from tests.helpers import ROOT
from tests.helpers.resumed import SMALL
from tests.helpers.runs import argv, log_of, same_states
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

ADDRESSES = {1: "10.77.0.1", 2: "10.77.0.2"}
# Under Open MPI: how a daemon is started on a host, which network is used, and how soon a dead one is noticed.
MPIRUN = (
    "mpirun --allow-run-as-root -np 2 --host node1:1,node2:1 --map-by ppr:1:node --bind-to none "
    "--mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 -x OMP_NUM_THREADS -x PYTHONPATH"
)
LIMIT = 60  # seconds after which a job whose link was cut must have ended


def ip(*words):
    subprocess.run(["ip", *argv(*words)], check=True, capture_output=True)


def remove_namespaces(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def namespaces(folder):
    """The hosts: a switch and two namespaces connected to it."""
    tag = f"sarw{os.getpid()}"
    switch, names = f"{tag}s", {number: f"{tag}h{number}" for number in ADDRESSES}
    try:
        try:
            ip("netns add", switch)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        ip("netns exec", switch, "ip link add br0 type bridge")
        ip("netns exec", switch, "ip link set br0 up")
        for number, name in names.items():
            ip("netns add", name)
            ip(f"link add eth{number} netns {name} type veth peer name port{number} netns {switch}")
            ip(f"netns exec {switch} ip link set port{number} master br0 up")
            ip(f"netns exec {name} ip addr add {ADDRESSES[number]}/24 dev eth{number}")
            ip(f"netns exec {name} ip link set eth{number} up")
            ip(f"netns exec {name} ip link set lo up")
        table = "127.0.0.1 localhost\n" + "".join(f"{address} node{n}\n" for n, address in ADDRESSES.items())
        (folder / "hosts").write_text(table)
        # In its namespaces a host sees its own name, and the table of names.
        (folder / "on").write_text(
            f'#!/bin/bash\nn=${{1#node}}; shift\nexec ip netns exec {tag}h$n unshare -u -m bash -c "hostname node$n; '
            f'mount --bind {folder}/hosts /etc/hosts; exec \\"\\$@\\"" _ "$@"\n'
        )
        # What mpirun calls in place of ssh: [flags] host command
        (folder / "agent").write_text(
            f'#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nhost=$1; shift; exec {folder}/on $host bash -c "$*"\n'
        )
        for script in ("on", "agent"):
            (folder / script).chmod(0o755)

        def start(number, command, output, **env):
            return subprocess.Popen(
                [folder / "on", f"node{number}", *argv(command)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                stdout=open(output, "w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        start.agent = folder / "agent"
        start.link = lambda number, state: ip(f"netns exec {names[number]} ip link set eth{number} {state}")
        yield start
    finally:
        remove_namespaces([*names.values(), switch])


@pytest.fixture(scope="module")
def hosts(campaign, mounting_alone, tmp_path_factory):
    """hosts(number, command, env) → the process of a command on host `node<number>`; hosts.link(number, up or down)."""
    if not campaign:
        pytest.skip("hosts in namespaces; run with --campaign")
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip (iproute2)")
    with mounting_alone(), namespaces(tmp_path_factory.mktemp("hosts")) as start:
        yield start


def torchrun(number, rendezvous):
    return f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank {number - 1} {rendezvous}"


def slurm(number):
    return {
        "SLURM_PROCID": str(number - 1),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(number - 1),
        "SLURM_NTASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def start_job(hosts, launcher, flags, folder, times=""):
    """The processes of a job on both hosts. Their output is in folder/<launcher><times>.<host>."""

    def output(number):
        return folder / f"{launcher}{times}.{number}"

    program = argv("main_pretrain.py", flags, "--output_dir", folder / launcher)
    if launcher in ("mpirun", "PBS"):
        env, more = {}, ()
        if launcher == "PBS":
            (folder / "nodes").write_text("node1\nnode2\n")
            env = {"PBS_NODEFILE": str(folder / "nodes"), "PBS_JOBID": "12.server"}
            more = "-x PBS_NODEFILE -x PBS_JOBID"
        command = argv(MPIRUN, LOST_HOST_FLAGS, "--mca plm_rsh_agent", hosts.agent, more, sys.executable, program)
        return [hosts(1, command, output(1), **env)]
    jobs = []
    for number in ADDRESSES:
        env, words = {}, ()
        if launcher == "torchrun":
            words = torchrun(number, f"--master_addr {ADDRESSES[1]} --master_port 29511")
        elif launcher == "c10d":
            words = torchrun(number, "--rdzv_backend c10d --rdzv_id 7 --rdzv_endpoint node1:29512")
        elif launcher == "Slurm":
            env = slurm(number)
        else:
            env = {"RANK": str(number - 1), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29533"}
        jobs.append(hosts(number, argv(sys.executable, words, program), output(number), **env))
    return jobs


def end_of(jobs, seconds):
    """The exit statuses of processes, None for those that have not ended in time, which are killed."""
    until, statuses = time.monotonic() + seconds, []
    for job in jobs:
        try:
            statuses.append(job.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            statuses.append(None)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    return statuses


def said(folder, launcher):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob(f"{launcher}*.[12]")))


@pytest.fixture(scope="module")
def alone(hosts, simulated, tmp_path_factory):
    """(flags, folder of the run of one process that accumulates as two ranks share the work)."""
    folder = tmp_path_factory.mktemp("alone")
    flags = argv("--data_path", simulated, SMALL, "--batch_size 4 --save_epochs 2 --epochs")
    job = hosts(
        1, [sys.executable, "main_pretrain.py", *flags, "2", *argv("--accum_iter 2 --output_dir", folder)], "/dev/null"
    )
    assert job.wait(120) == 0
    return flags, folder


LAUNCHERS = ("torchrun", "c10d", "Slurm", "mpirun", "PBS")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_train_what_one_process_does(hosts, alone, tmp_path, count, launcher):
    if launcher in ("mpirun", "PBS") and not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed")
    flags, folder = alone
    statuses = end_of(start_job(hosts, launcher, (flags, "2"), tmp_path), 150)
    assert count("two hosts, by launcher: losses as of one process", set(statuses) == {0}), said(tmp_path, launcher)
    one, two = ([entry["train_loss"] for entry in log_of(run)] for run in (folder, tmp_path / launcher))
    assert one == pytest.approx(two, rel=2e-6)
    assert json.loads((tmp_path / launcher / "run.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("launcher", ("environment", "torchrun", "mpirun"))
def test_where_a_link_is_cut_all_end_and_the_run_goes_on(hosts, alone, tmp_path, count, launcher, capsys):
    if launcher == "mpirun" and not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed")
    patience = 2 if launcher == "mpirun" else 0.25  # minutes; mpirun notices before the ranks do
    flags = (alone[0], "12 --stop_epoch 12 --save_every_steps 2 --resume auto --dist_timeout", patience)
    whole = start_job(hosts, launcher, flags, tmp_path)
    assert set(end_of(whole, 150)) == {0}, said(tmp_path, launcher)
    (tmp_path / launcher).rename(tmp_path / "whole")
    jobs = start_job(hosts, launcher, flags, tmp_path, "cut")
    until = time.monotonic() + 60
    while not (tmp_path / launcher / "checkpoint_previous.pth").exists() and time.monotonic() < until:
        time.sleep(0.05)
    hosts.link(2, "down")
    cut = time.monotonic()
    try:
        statuses = end_of(jobs, LIMIT)
    finally:
        hosts.link(2, "up")
    with capsys.disabled():
        print(f"\n{launcher}: statuses {statuses} {time.monotonic() - cut:.0f} s after the cut")
    good = all(statuses) and (launcher == "torchrun" or "Traceback" not in said(tmp_path, launcher))  # it prints one
    assert count("cut links after which all have ended", good), (statuses, said(tmp_path, launcher))
    outcome = json.loads((tmp_path / launcher / "run.json").read_text())["outcome"]
    assert "gloo" not in outcome and outcome != "finished", outcome
    jobs = start_job(hosts, launcher, flags, tmp_path, "again")
    assert set(end_of(jobs, 150)) == {0}, said(tmp_path, launcher)
    states = [load_checkpoint(tmp_path / run / "checkpoint.pth") for run in ("whole", launcher)]
    assert count("cut links after which the run goes on bit for bit", same_states(*states))
