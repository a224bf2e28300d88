#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Pretrains, finetunes or tests under PBS Pro, with one process per GPU, on one node or several. The defaults are for ABCI.
#   bash scripts/qsub_run.sh --site_group GROUP --data_path DIR …      on a login node: submits itself
#   qsub -P GROUP -v DATA_PATH=DIR,… scripts/qsub_run.sh               the same, with the resources named below
#   bash scripts/qsub_run.sh --data_path DIR …                         in an interactive job: runs at once
# A run that is stopped by the walltime or by SIGTERM saves first. It continues when it is submitted again; with
# RESUBMIT the job does so itself.
# Settings of a site can be in scripts/site.sh, or in the file that SITE names; scripts/site.example.sh is one for ABCI.
# --dry_run prints what would be submitted or run. qdel sends SIGTERM too: with RESUBMIT, delete the next job as well.
# Exit status: that of the run; 143 after SIGTERM; 0 at the walltime; 1 if the next job could not be submitted; 2 if this job
# cannot be started.
#PBS -N sarwmix
#PBS -q rt_HF
#PBS -l select=1:ncpus=192:mpiprocs=8
#PBS -l walltime=24:00:00
#PBS -j oe

# shellcheck disable=SC2154      # `decide` sets the variables
set -euo pipefail
start=$(pwd -P) program=qsub_run.sh

# PBS runs a copy of this file in another folder. PBS_O_WORKDIR is the folder of the submission.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "$root/scripts/runner.sh" ]; then
    root=${PBS_O_WORKDIR:-$PWD}
    start=$root
fi
[ -f "$root/scripts/runner.sh" ] || { echo "$program: error: $root is not the checkout; submit this from its root" >&2; exit 2; }
cd "$root"
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
decide_job "$start" "$@"

if [ -z "${PBS_JOBID:-}" ]; then
    command -v qsub >/dev/null || die "there is no qsub; submit from a login node of a cluster with PBS, or use scripts/run_local.sh"
    exec "${submission[@]}"
fi

# ---- the run. At SIGTERM, mpirun (Open MPI 4) kills the ranks within 2 s and returns 1; a longer odls_base_sigkill_timeout
# delays the ranks' own SIGTERM by as much. It forwards SIGUSR1 at once, and waits. PBS may send SIGTERM to all processes of
# a job, so mpirun is started with SIGTERM blocked; the ranks unblock it.
prepare_job mpirun "name your site's Open MPI module in SITE_MODULES, or see INSTALL.md"
export MASTER_ADDR=$master
blocked='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execvp(sys.argv[1], sys.argv[1:])'
run_job .venv/bin/python -c "$blocked" "${command[@]}"

# ---- the next job
reason=$(why_not)
if [ -n "$reason" ]; then
    say "not resubmitted, because $reason"
else
    RESUBMIT=$((RESUBMIT - 1))
    if job=$("${submission[@]}" 2>&1); then
        say "resubmitted as $job, $RESUBMIT more may follow"
    else
        say "error: not resubmitted, because qsub failed: ${job//$'\n'/ }" >&2
        if [ "$status" = 0 ]; then status=1; fi
    fi
fi
exit "$status"
