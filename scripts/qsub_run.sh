#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The main job under PBS Pro, one process per GPU, on one node or several. As it stands for ABCI; other sites change settings.
#   bash scripts/qsub_run.sh --site_group GROUP --data_path DIR …      on a login node: submits itself
#   qsub -P GROUP -v DATA_PATH=DIR,… scripts/qsub_run.sh               the same, with the resources named below
#   bash scripts/qsub_run.sh --data_path DIR …                         in an interactive job: runs at once
# A run that is stopped, by the walltime or by SIGTERM, saves first, and goes on when it is submitted again, or by itself:
#   RESUBMIT       how many more jobs may follow (default: 0). None does after an error, nor if nothing new was saved
#   NODES          default: 1
#   WALLTIME       H:MM:SS (default: 24:00:00); the run ends five minutes before
#   SITE_GROUP     group that pays (qsub -P); "none" where a site has no groups
#   SITE_QUEUE     default: rt_HF
#   SITE_NCPUS     cores of a node (default: 192)
#   SITE_GPU       kind of its GPUs, which tells their number before a job has begun: H200 (default), A100 or V100
#   SITE_MODULES   environment modules to load, separated by spaces (default: none)
# Settings of a site can stand in scripts/site.sh, or the file that SITE names; scripts/site.example.sh is one for ABCI.
# --dry_run prints what would be submitted or run. qdel sends SIGTERM too: with RESUBMIT, delete the job that follows as well.
# Exit status: that of the run, 143 after SIGTERM, 0 at the walltime; 1 if the next job could not be submitted; 2 if this one
# cannot be started.
#PBS -N sarwmix
#PBS -q rt_HF
#PBS -l select=1:ncpus=192:mpiprocs=8
#PBS -l walltime=24:00:00
#PBS -j oe
set -euo pipefail

# PBS runs a copy of this file, from elsewhere, and says where it was submitted.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "$root/scripts/runner.sh" ]; then
    root=${PBS_O_WORKDIR:-$PWD}
    cd "$root"
fi
[ -f "$root/scripts/runner.sh" ] || { echo "qsub_run.sh: error: $root is not the checkout; submit this from its root" >&2; exit 2; }
# shellcheck source=scripts/runner.sh
. "$root/scripts/runner.sh"
program=qsub_run.sh
SETTINGS+=(RESUBMIT NODES WALLTIME SITE SITE_GROUP SITE_QUEUE SITE_NCPUS SITE_GPU SITE_MODULES)
read_flags "$@"
enter_checkout
SITE=${SITE:-}
if [ -z "$SITE" ] && [ -f scripts/site.sh ]; then SITE=scripts/site.sh; fi
if [ -n "$SITE" ]; then
    [ -f "$SITE" ] || die "SITE=$SITE: there is no such file; copy scripts/site.example.sh"
    # shellcheck source=scripts/site.example.sh
    . "$SITE"
fi
RESUBMIT=${RESUBMIT:-0} NODES=${NODES:-1} WALLTIME=${WALLTIME:-24:00:00} SITE_GROUP=${SITE_GROUP:-} SITE_QUEUE=${SITE_QUEUE:-rt_HF}
SITE_NCPUS=${SITE_NCPUS:-192} SITE_GPU=${SITE_GPU:-H200} SITE_MODULES=${SITE_MODULES:-}
whole RESUBMIT 0
whole NODES 1
whole SITE_NCPUS 1
one_of SITE_GPU H200 A100 V100
[[ $WALLTIME =~ ^([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])$ ]] || die "WALLTIME=$WALLTIME: must be hours, minutes and seconds, as 24:00:00"
minutes=$((10#${BASH_REMATCH[1]} * 60 + 10#${BASH_REMATCH[2]} - 5))
[ $minutes -gt 0 ] || die "WALLTIME=$WALLTIME: must be more than five minutes, which are kept for saving"
settle
if [ -z "${PBS_JOBID:-}" ] || [ "$RESUBMIT" -gt 0 ]; then
    [ -n "$SITE_GROUP" ] || die "SITE_GROUP is missing: the group that pays for jobs, or 'none' where a site has no groups"
fi

# ---- the nodes, and the GPUs of each: as they are in a job, as they should be before it
if [ -n "${PBS_JOBID:-}" ]; then
    [ -r "${PBS_NODEFILE:-}" ] || die "PBS_NODEFILE=${PBS_NODEFILE:-}: cannot be read; start this in a job of PBS"
    mapfile -t hosts < <(awk 'NF && !seen[$1]++ {print $1}' "$PBS_NODEFILE")
    find_gpus
    [ "$gpus" -gt 0 ] || die "nvidia-smi shows no GPU on $(uname -n); ask for a queue with GPUs (SITE_QUEUE), or load their driver's module (SITE_MODULES)"
else
    mapfile -t hosts < <(seq -f 'NODE%g' "$NODES")
    case $SITE_GPU in
        H200) gpus=8 gpu_mb=143771 ;; A100) gpus=8 gpu_mb=40960 ;; V100) gpus=4 gpu_mb=16384 ;;
    esac
    gpu_name=$SITE_GPU
fi
nodes=${#hosts[@]}
ranks=$((nodes * gpus))
recipe "$ranks"
python=$root/.venv/bin/python
command=(mpirun -np "$ranks" --host "$(printf "%s:$gpus," "${hosts[@]}" | sed 's/,$//')" --map-by "ppr:$gpus:node" --bind-to none)
if [ "$nodes" -gt 1 ]; then      # ranks elsewhere do not have this job's environment, nor its list of nodes
    command+=(-x MASTER_ADDR -x PBS_JOBID -x PATH)
    if [ -n "${LD_LIBRARY_PATH:-}" ]; then command+=(-x LD_LIBRARY_PATH); fi
fi
command+=("$python" "$main" "${flags[@]}")
if [ "$TASK_TYPE" != test ]; then command+=(--walltime "$minutes"); fi
command+=("${extra[@]}")

# ---- submitting, at first by hand and then by the job before. qsub takes the values of -v from the environment, whatever
# characters they have.
names=()
if [ ${#extra[@]} -gt 0 ]; then EXTRA=${extra[*]@Q}; fi
for name in "${SETTINGS[@]}"; do
    if [ -n "${!name:-}" ]; then
        export "${name?}"
        names+=("$name")
    fi
done
group=()
if [ "$SITE_GROUP" != none ]; then group=(-P "$SITE_GROUP"); fi
submission=(qsub -N "sarwmix-$TASK_TYPE" "${group[@]}" -q "$SITE_QUEUE" -l "select=$NODES:ncpus=$SITE_NCPUS:mpiprocs=$gpus" -l "walltime=$WALLTIME"
            -v "$(IFS=,; echo "${names[*]}")" scripts/qsub_run.sh)

if [ -n "$dry_run" ]; then
    if [ -z "${PBS_JOBID:-}" ]; then
        pairs=()
        for name in "${names[@]}"; do pairs+=("$name=${!name}"); done
        show env "${pairs[@]}" "${submission[@]}"
        echo "# and in the job:"
    fi
    describe "$ranks" "$nodes"
    show "${command[@]}"
    exit
fi
if [ -z "${PBS_JOBID:-}" ]; then
    command -v qsub >/dev/null || die "there is no qsub; submit from a login node of a cluster with PBS, or use scripts/run_local.sh"
    exec "${submission[@]}"
fi

# ---- the run. At SIGTERM, mpirun (Open MPI 4) kills the ranks within 2 s and returns 1; a longer odls_base_sigkill_timeout
# delays the ranks' own SIGTERM by as much. SIGUSR1 it hands on at once, and waits. PBS may send SIGTERM to all processes of
# a job, so mpirun is started with it blocked; ranks have it unblocked again.
if [ -n "$SITE_MODULES" ]; then
    set +u
    # shellcheck disable=SC1091      # the site's
    command -v module >/dev/null || . /etc/profile.d/modules.sh
    # shellcheck disable=SC2086      # a list
    module load $SITE_MODULES
    set -u
fi
command -v mpirun >/dev/null || die "there is no mpirun; name your site's Open MPI module in SITE_MODULES, or see INSTALL.md"
[ -x "$python" ] || die "there is no .venv in $root; set it up with: bash scripts/setup.sh"
export MASTER_ADDR=${hosts[0]}
blocked='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execvp(sys.argv[1], sys.argv[1:])'
saved_at() { stat -Lc %Y "$run_folder/checkpoint.pth" 2>/dev/null || echo 0; }

before=$(saved_at)
describe "$ranks" "$nodes"
show "${command[@]}"
mkdir -p "$(dirname "$log")"
"$python" -c "$blocked" "${command[@]}" >> "$log" 2>&1 &
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
elif [ "$TASK_TYPE" = test ] || grep -qs '^ "outcome": "finished"' "$run_folder/run.json"; then      # not that of an earlier part, which is further in
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
