#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The papers' study of the polarization weights: pretrain with each kind of weights and each seed, then see what the encoder is
# worth, by a linear probe of its frozen features and by a flood classifier finetuned from it. Ends with a table and a figure.
#   bash scripts/weight_study.sh                                         on simulated scenes and floods
#   bash scripts/weight_study.sh --data_path DIR --flood_path DIR …      on BigEarthNet and SEN12-FLOOD, by the published recipes
# Run it again to go on: what is finished is not done again. --dry_run prints the commands. Flags after -- go to pretraining.
#   KINDS          WEIGHT_MODE/WEIGHT_LEVEL, separated by spaces (default: none/token, and the others at both levels; without
#                  weights both levels are the same loss)
#   SEEDS          default: "0 1 2"
#   FLOOD_PATH     pairs for the flood classifier (default: none is trained)
#   JOBS           kinds and seeds at a time (default: 1, on all GPUs or cores)
#   RANKS          processes of each (default: one per GPU)
set -euo pipefail
started=$SECONDS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/runner.sh
. "$root/scripts/runner.sh"
SETTINGS+=(KINDS SEEDS FLOOD_PATH JOBS RANKS)
read_flags "$@"
enter_checkout
KINDS=${KINDS:-none/token shared_avg/token shared_avg/pixel per_channel/token per_channel/pixel} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-1}
MODELS_PATH=${MODELS_PATH:-output/weight_study} FLOOD_PATH=${FLOOD_PATH:-} EXTRA=''
python=.venv/bin/python
whole JOBS 1
if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=$((($(nproc) + JOBS - 1) / JOBS)); fi

# A signal, or the failure of one run, ends the others.
end_children() {
    local pids
    mapfile -t pids < <(jobs -p)
    if [ ${#pids[@]} -gt 0 ]; then kill "${pids[@]}" 2>/dev/null || true; fi
}
trap end_children EXIT
run() {
    if [ -n "$dry_run" ]; then show "$@"; return; fi
    "$@" &
    wait $!      # and not in the foreground, where a signal would wait for it
}
local_run() {  # task, dataset, data, flags …
    run bash scripts/run_local.sh --task_type "$1" --dataset "$2" --data_path "$3" --models_path "$MODELS_PATH" --model "$MODEL" --epoch "$EPOCH" \
        ${RANKS:+--ranks "$RANKS"} "${@:4}"
}

if [ -z "$dry_run" ]; then bash scripts/setup.sh; fi
pretraining=("${extra[@]}") flooding=()
if [ -z "${DATA_PATH:-}" ]; then
    DATA_PATH=$MODELS_PATH/simulated FLOOD_PATH=$MODELS_PATH/simulated_floods MODEL=tiny EPOCH=11 DATASET=benv2 BATCH_SIZE=8
    pretraining=(--epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64 "${extra[@]}")
    flooding=(--epochs 8 --warmup_epochs 1 --lr 1e-3 --val_fraction 0.2)
    run "$python" -m sarwmix.simulate --out "$DATA_PATH" --patches 1280 --scene_side 4 --seed 0 --val_fraction 0.05 --test_fraction 0.2
    run "$python" -m sarwmix.simulate.flood --out "$FLOOD_PATH" --folders 60 --size 256 --seed 0
fi
settle
batch=()
if [ -n "${BATCH_SIZE:-}" ]; then batch=(--batch_size "$BATCH_SIZE" --accum_iter "${ACCUM_ITER:-1}"); fi

probe() {  # folder of a pretraining run: a linear probe of its features, into probe.json
    if [ -e "$1/probe.json" ]; then return; fi
    local split
    for split in train test; do
        run "$python" main_finetune.py --embed "$1/$split.npz" --split $split --dataset "$DATASET" --data_path "$DATA_PATH" --finetune "$1/checkpoint_$EPOCH.pth"
    done
    run "$python" -m analysis.probe --train "$1/train.npz" --test "$1/test.npz" --allow_shared_groups --method linear --output "$1/probe.json"
}

study() {  # kind, seed
    trap end_children EXIT
    local mode=${1%/*} level=${1#*/}
    local weights=(--weight_mode "$mode" --weight_level "$level" --seed "$2" "${batch[@]}")
    if [ "$mode" != random ]; then
        local_run pretrain "$DATASET" "$DATA_PATH" "${weights[@]}" -- "${pretraining[@]}"
        probe "$MODELS_PATH/pretrain_${DATASET}_${MODEL}_${mode}_${level}_seed$2"
    fi
    if [ -n "$FLOOD_PATH" ] && [ "$mode" != random ]; then
        local_run finetune sen12flood "$FLOOD_PATH" --pretrained_on "$DATASET" "${weights[@]}" -- "${flooding[@]}"
    elif [ -n "$FLOOD_PATH" ]; then
        local_run finetune sen12flood "$FLOOD_PATH" --checkpoint random --pretrained_on "$DATASET" --seed "$2" "${batch[@]}" -- "${flooding[@]}"
    fi
}

for seed in $SEEDS; do
    for kind in $KINDS random; do
        if [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; then wait -n; fi
        study "$kind" "$seed" &
        if [ -n "$dry_run" ]; then wait $!; fi
    done
done
while [ -n "$(jobs -p)" ]; do wait -n; done
run "$python" -m analysis.weight_study "$MODELS_PATH" --output "$MODELS_PATH/weight_study.png" --table "$MODELS_PATH/weight_study.csv"
if [ -z "$dry_run" ]; then echo "Done in $((SECONDS - started)) s"; fi
