#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The main job on this machine: set up, then pretrain.
#   bash scripts/run_local.sh                       on simulated scenes: a few minutes on two CPU cores
#   bash scripts/run_local.sh DATA_PATH [FLAGS …]   on BigEarthNet, by the published recipe, on every GPU of the machine
# DATA_PATH: the folder that holds BigEarthNet-S1 and metadata.parquet. FLAGS go to main_pretrain.py after the recipe's
# and win over them (for example --dataset benv1 --batch_size 64). Run it again to continue a run that was stopped.
#   OUTPUT=DIR   where to write (default: output)        RANKS=N   processes (default: one per GPU)
set -euo pipefail
started=$SECONDS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}
if [ -n "$data" ]; then
    shift
    [ -d "$data" ] || { echo "run_local.sh: error: $data: there is no such folder; give the folder that holds BigEarthNet-S1" >&2; exit 2; }
    data=$(cd "$data" && pwd)
fi
cd "$root"
bash scripts/setup.sh
python=$root/.venv/bin/python
OUTPUT=${OUTPUT:-output}
gpus=$("$python" -W ignore -c 'import torch; print(torch.cuda.device_count())')
RANKS=${RANKS:-$((gpus > 1 ? gpus : 1))}

launch=()
if [ "$RANKS" -gt 1 ]; then
    launch=(mpirun -np "$RANKS" --bind-to none)
    if [ "$(id -u)" = 0 ]; then launch+=(--allow-run-as-root); fi
    if [ "$gpus" -lt "$RANKS" ]; then launch+=(--oversubscribe); fi
fi

if [ -n "$data" ]; then
    # 256 images × 8 ranks in the papers; here the same global batch of 2048 from as many ranks as there are.
    batch=256
    accumulate=$((2048 / (batch * RANKS) > 0 ? 2048 / (batch * RANKS) : 1))
    "${launch[@]}" "$python" main_pretrain.py --data_path "$data" --output_dir "$OUTPUT/pretrain" --resume auto \
        --model mixmim_base --batch_size $batch --accum_iter $accumulate --epochs 1024 --stop_epoch 64 --warmup_epochs 40 \
        --blr 1.5e-4 --weight_decay 0.05 --mask_ratio 0.5 --norm_pix_loss "$@"
else
    scenes=$OUTPUT/simulated
    run=$OUTPUT/pretrain_simulated
    "$python" -m sarwmix.simulate --out "$scenes" --patches 1280 --seed 0 --val_fraction 0.1 --test_fraction 0.1
    "${launch[@]}" "$python" main_pretrain.py --data_path "$scenes" --output_dir "$run" --overwrite \
        --model mixmim_tiny --batch_size 8 --epochs 11 --warmup_epochs 0.4 --lr 4e-4 --clip_grad 1 --log_freq 48 --save_epochs 1 4 11
    "$python" -m analysis.logfile_reader --log "$run/log.txt" --output "$run/loss.png"
    "$python" main_pretrain.py --data_path "$scenes" --split test --output_dir "$run" --inference_samples 4 \
        --inference "$run"/checkpoint_{1,4,11}.pth
    echo
    echo "Done in $((SECONDS - started)) s. Look at:"
    echo "  $run/reconstruction_11.png                 what the model makes of the cells it did not see"
    echo "  $run/inference/reconstructions_1.png       the same for held-out scenes, after 1, 4 and 11 epochs"
    echo "  $run/loss.png                              the loss, falling"
    echo "  $run/checkpoint.pth                        the pretrained encoder"
fi
