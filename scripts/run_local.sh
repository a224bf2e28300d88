#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The main job on this machine: set up, then pretrain; on simulated scenes also finetune, evaluate and compare.
#   bash scripts/run_local.sh                       on simulated scenes: minutes on two CPU cores
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
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$("$python" -W ignore -c 'import torch; print(torch.cuda.device_count())'); fi
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
    tuned=$OUTPUT/finetune_simulated
    "$python" -m sarwmix.simulate --out "$scenes" --patches 1280 --scene_side 4 --seed 0 --val_fraction 0.05 --test_fraction 0.2
    "${launch[@]}" "$python" main_pretrain.py --data_path "$scenes" --output_dir "$run" --overwrite \
        --model mixmim_tiny --batch_size 8 --epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64 --save_epochs 1 4 11
    "$python" -m analysis.logfile_reader --log "$run/log.txt" --output "$run/loss.png"
    "$python" main_pretrain.py --data_path "$scenes" --split test --output_dir "$run" --inference_samples 4 \
        --inference "$run"/checkpoint_{1,4,11}.pth

    # A tenth of the labels: from the pretrained encoder and from random initialisation, side by side and alike.
    finetune_from() {  # name, checkpoint
        OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) "${launch[@]}" "$python" main_finetune.py --dataset benv2 --data_path "$scenes" --finetune "$2" \
            --train_fraction 0.1 --output_dir "$tuned/$1" --overwrite --model mixmim_tiny --batch_size 8 --epochs 24 --warmup_epochs 3 \
            --lr 2e-3 --log_freq 12 --num_workers 0 2>&1 | sed -u "s/^/$1: /"
    }
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    finetune_from pretrained "$run/checkpoint.pth" & pretrained=$!
    finetune_from random "" & random=$!
    wait $pretrained
    wait $random

    echo
    echo "Held-out scenes, from a tenth of the labels:"
    "$python" -m analysis.compare_runs --runs "$tuned/pretrained" "$tuned/random"
    echo "Done in $((SECONDS - started)) s. Look at:"
    echo "  $run/reconstruction_11.png                 what the model makes of the cells it did not see"
    echo "  $run/inference/reconstructions_1.png       the same for held-out scenes, after 1, 4 and 11 epochs"
    echo "  $run/loss.png                              the loss, falling"
    echo "  $run/checkpoint.pth                        the pretrained encoder"
    echo "  $tuned/pretrained/checkpoint_best.pth    the classifier, with its figures in eval_test.json beside it"
fi
