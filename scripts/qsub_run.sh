#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The main job under PBS Pro, one process per GPU, on one node or several. The defaults are for ABCI.
#   bash scripts/qsub_run.sh --site_group GROUP --data_path DIR …      on a login node: submits itself
#   qsub -P GROUP -v DATA_PATH=DIR,… scripts/qsub_run.sh               the same, with the resources named below
#   bash scripts/qsub_run.sh --data_path DIR …                         in an interactive job: runs at once
# A run that is stopped by the walltime or by SIGTERM saves first. It continues when it is submitted again; RESUBMIT does so.
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
say() { echo "$program: $*"; }

# PBS runs a copy of this file in another folder. PBS_O_WORKDIR is the folder of the submission.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "$root/scripts/runner.sh" ]; then
    root=${PBS_O_WORKDIR:-$PWD}
    start=$root
fi
[ -f "$root/scripts/runner.sh" ] || { echo "qsub_run.sh: error: $root is not the checkout; submit this from its root" >&2; exit 2; }
cd "$root"
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
decide $program "$start" "$@"
if [ -n "$SITE" ]; then
    set -a
    # shellcheck source=scripts/site.example.sh
    . "$SITE"
    set +a
fi
decide job . "${dry_run[@]}"

if [ -z "${PBS_JOBID:-}" ]; then
    command -v qsub >/dev/null || die "there is no qsub; submit from a login node of a cluster with PBS, or use scripts/run_local.sh"
    exec "${submission[@]}"
fi

# ---- the run. At SIGTERM, mpirun (Open MPI 4) kills the ranks within 2 s and returns 1; a longer odls_base_sigkill_timeout
# delays the ranks' own SIGTERM by as much. It forwards SIGUSR1 at once, and waits. PBS may send SIGTERM to all processes of
# a job, so mpirun is started with SIGTERM blocked; the ranks unblock it.
if [ -n "${SITE_MODULES:-}" ]; then
    set +u
    # shellcheck disable=SC1091      # the site's
    command -v module >/dev/null || . /etc/profile.d/modules.sh
    # shellcheck disable=SC2086      # a list
    module load $SITE_MODULES
    set -u
fi
command -v mpirun >/dev/null || die "there is no mpirun; name your site's Open MPI module in SITE_MODULES, or see INSTALL.md"
[ -x .venv/bin/python ] || die "there is no .venv in $root; set it up with: bash scripts/setup.sh"
export MASTER_ADDR=$master
blocked='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execvp(sys.argv[1], sys.argv[1:])'
saved_at() { stat -Lc %Y "$run_folder/checkpoint.pth" 2>/dev/null || echo 0; }

before=$(saved_at)
printf '%s\n' "${said[@]}"
mkdir -p "$(dirname "$log")"
.venv/bin/python -c "$blocked" "${command[@]}" >> "$log" 2>&1 &
mpirun=$!
signalled='' interrupted=yes
trap 'signalled=yes interrupted=yes; kill -USR1 "$mpirun" 2>/dev/null || true' TERM
while [ -n "$interrupted" ]; do       # a signal ends the `wait`, not mpirun
    interrupted='' status=0
    wait "$mpirun" || status=$?
done
trap '' TERM
if [ -n "$signalled" ] && [ "$status" = 138 ]; then status=143; fi       # SIGUSR1 was ours
if [ "$status" != 0 ]; then tail -n 5 "$log"; fi

# ---- the next job
if [ "$status" != 0 ] && [ "$status" != 143 ]; then
    say "not resubmitted, because the run ended with status $status"
elif [ "$task" = test ] || grep -qs '^ "outcome": "finished"' "$run_folder/run.json"; then      # not that of an earlier part, which is further in
    say "not resubmitted, because the run is finished"
elif [ "$RESUBMIT" = 0 ]; then
    say "not resubmitted, because RESUBMIT is 0"
elif [ "$(saved_at)" -le "$before" ]; then
    say "not resubmitted, because nothing new was saved in $run_folder/checkpoint.pth"
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
