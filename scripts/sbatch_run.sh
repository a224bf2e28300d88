#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Pretrains, finetunes or tests under Slurm, with one process per GPU, on one node or several.
#   bash scripts/sbatch_run.sh --data_path DIR --site_partition NAME --site_account NAME …      on a login node: submits itself
#   bash scripts/sbatch_run.sh --data_path DIR …                                               in a job: runs at once
# Five minutes before its time is over, the run saves and ends. With --resubmit N the job then requeues itself and continues, up to
# N times. Without it, the run continues when it is submitted again. A job that Slurm requeues, after a node failed or it was
# preempted, continues, too.
# Settings of a site can be in scripts/site.sh, or in the file that SITE names; scripts/site.example.sh shows how.
# --dry_run prints what would be submitted or run. To end a job after it has saved, and not to requeue it:
# scancel --batch --signal TERM JOB
# Exit status: that of the run; 143 after SIGTERM; 0 at the end of the time; 1 if the job could not be requeued; 2 if this job
# cannot be started.
#SBATCH --job-name=sarwmix
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append

# shellcheck disable=SC2154      # `decide_job` sets the variables
set -euo pipefail
start=$(pwd -P) program=sbatch_run.sh

# Slurm runs a copy of this file in another folder. SLURM_SUBMIT_DIR is the folder of the submission.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "$root/scripts/runner.sh" ]; then
    root=${SLURM_SUBMIT_DIR:-$PWD}
    start=$root
fi
[ -f "$root/scripts/runner.sh" ] || { echo "$program: error: $root is not the checkout; submit this from its root" >&2; exit 2; }
cd "$root"
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
decide_job "$start" "$@"

if [ -z "${SLURM_JOB_ID:-}" ]; then
    command -v sbatch >/dev/null || die "there is no sbatch; submit from a login node of a cluster with Slurm, or use scripts/run_local.sh"
    exec "${submission[@]}"
fi

# ---- the run. srun hands SIGUSR1 on to the ranks; at SIGTERM it would end them. Slurm sends SIGTERM to the ranks too, except
# where only the shell is named (--batch).
prepare_job srun "load your site's module of Slurm (SITE_MODULES)"
run_job "${command[@]}"

# ---- once more
requeued=${SLURM_RESTART_COUNT:-0} asked=$RESUBMIT
RESUBMIT=$((asked > requeued ? asked - requeued : 0))
reason=$(why_not)
if [ "$reason" = "RESUBMIT is 0" ] && [ "$asked" != 0 ]; then reason="RESUBMIT is $asked, and it was requeued $requeued times"; fi
if [ "$status" = 143 ]; then reason='it was told to end'; fi
if [ -n "$reason" ]; then
    say "not requeued, because $reason"
else
    say "requeued, $((RESUBMIT - 1)) more may follow"      # first, since `scontrol requeue` ends this job
    if ! answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
        say "error: not requeued, because scontrol failed: ${answer//$'\n'/ }" >&2
        if [ "$status" = 0 ]; then status=1; fi
    fi
fi
exit "$status"
