#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Pretraining by the published recipe on one node of 8 GPUs, under PBS Pro. Submit it from the root of the checkout:
#   qsub -v DATA_PATH=/path/to/BigEarthNet-v2,OUTPUT=/path/to/run,RESUBMIT=5 scripts/qsub_run.sh
# The run saves and ends shortly before the walltime, or at SIGTERM, and the job then submits the next one, which goes on
# with it. Submitted by hand, it goes on just the same. Adapt the resource lines to your site: the next job has them from
# here, as it has no other flags of qsub than -v.
#   DATA_PATH      folder that holds BigEarthNet-S1
#   OUTPUT         folder of the run
#   DATASET        benv2 (default) or benv1
#   RESUBMIT       how many more jobs may follow (default: 0). None does after an error, nor if nothing new was saved.
#   WALLTIME_MIN   whole minutes until the run has ended (default: 1435); a little less than the walltime below
# qdel sends SIGTERM too: with RESUBMIT, delete the job that follows as well. Exit status: that of the run, 143 after
# SIGTERM, 0 at the walltime; 1 if the next job could not be submitted; 2 if this one cannot be started.
#PBS -N sarwmix-pretrain
#PBS -l select=1:ncpus=96:ngpus=8:mpiprocs=8
#PBS -l walltime=24:00:00
#PBS -j oe
set -euo pipefail

say() { echo "qsub_run.sh: $*"; }
die() { say "error: $*" >&2; exit 2; }

cd "${PBS_O_WORKDIR:?submit this with qsub, from the root of the checkout}"
: "${DATA_PATH:?give -v DATA_PATH=folder that holds BigEarthNet-S1}" "${OUTPUT:?give -v OUTPUT=folder of the run}"
export DATA_PATH OUTPUT DATASET=${DATASET:-benv2} RESUBMIT=${RESUBMIT:-0} WALLTIME_MIN=${WALLTIME_MIN:-1435}
[[ $RESUBMIT =~ ^(0|[1-9][0-9]{0,3})$ ]] || die "RESUBMIT=$RESUBMIT: give a whole number, how many more jobs may follow"
[[ $WALLTIME_MIN =~ ^[1-9][0-9]{0,5}$ ]] || die "WALLTIME_MIN=$WALLTIME_MIN: give whole minutes, above 0"
command -v mpirun >/dev/null || die "there is no mpirun; load your site's Open MPI module, or see INSTALL.md"
[ -x .venv/bin/python ] || die "there is no .venv in $PWD; set it up with: bash scripts/setup.sh"

# ---- the run. At SIGTERM, mpirun (Open MPI 4) kills the ranks within 2 s and returns 1; a longer odls_base_sigkill_timeout
# delays the ranks' own SIGTERM by as much. SIGUSR1 it hands on at once, and waits. PBS may send SIGTERM to all processes of
# a job, so mpirun is started with it blocked; ranks have it unblocked again.
blocked='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execvp(sys.argv[1], sys.argv[1:])'
saved_at() { stat -Lc %Y "$OUTPUT/checkpoint.pth" 2>/dev/null || echo 0; }

before=$(saved_at)
.venv/bin/python -c "$blocked" mpirun -np 8 --bind-to none .venv/bin/python main_pretrain.py --dataset "$DATASET" \
    --data_path "$DATA_PATH" --output_dir "$OUTPUT" --resume auto --walltime "$WALLTIME_MIN" --model mixmim_base --batch_size 256 \
    --epochs 1024 --stop_epoch 64 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --mask_ratio 0.5 --norm_pix_loss &
mpirun=$!
signalled='' interrupted=yes
trap 'signalled=yes interrupted=yes; kill -USR1 "$mpirun" 2>/dev/null || true' TERM
while [ -n "$interrupted" ]; do       # a signal ends the `wait`, not mpirun
    interrupted='' status=0
    wait "$mpirun" || status=$?
done
trap '' TERM
if [ -n "$signalled" ] && [ "$status" = 138 ]; then status=143; fi       # SIGUSR1 was ours

# ---- the next job
if [ "$status" != 0 ] && [ "$status" != 143 ]; then
    say "not resubmitted, because the run ended with status $status"
elif grep -qs '^ "outcome": "finished"' "$OUTPUT/run.json"; then          # not that of an earlier part, which is further in
    say "not resubmitted, because the run is finished"
elif [ "$RESUBMIT" = 0 ]; then
    say "not resubmitted, because RESUBMIT is 0"
elif [ "$(saved_at)" -le "$before" ]; then
    say "not resubmitted, because nothing new was saved in $OUTPUT/checkpoint.pth"
else
    RESUBMIT=$((RESUBMIT - 1))
    # Names without values: qsub then takes these from the environment, whatever characters they have.
    if job=$(qsub -v DATA_PATH,OUTPUT,DATASET,WALLTIME_MIN,RESUBMIT scripts/qsub_run.sh 2>&1); then
        say "resubmitted as $job, $RESUBMIT more may follow"
    else
        say "error: not resubmitted, because qsub failed: ${job//$'\n'/ }" >&2
        if [ "$status" = 0 ]; then status=1; fi
    fi
fi
exit "$status"
