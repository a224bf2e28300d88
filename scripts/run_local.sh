#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Pretrains, finetunes or tests on this machine: on all of its GPUs, or on the CPU.
#   bash scripts/run_local.sh                        on simulated scenes: set up, pretrain, finetune, compare; minutes on two cores
#   bash scripts/run_local.sh --data_path DIR        on BigEarthNet v2: pretrain by the published recipe
#   bash scripts/run_local.sh --task_type finetune --data_path DIR …
# Run it again to continue a stopped run. --dry_run prints the command instead.

# shellcheck disable=SC2154      # `decide` sets the variables
set -euo pipefail
started=$SECONDS start=$(pwd -P) program=run_local.sh python=.venv/bin/python
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
decide $program "$start" "$@"

show() { local line; printf -v line ' %q' "$@"; echo "${line# }"; }
set_up() {
    bash scripts/setup.sh --keep_minimal
    command -v mpirun >/dev/null || launch=("${without_mpi[@]}")
}
if [ ${#command[@]} -gt 0 ]; then
    set_up
    command=("${launch[@]}" "${command[@]}")
    printf '%s\n' "${said[@]}"
    show "${command[@]}"
    mkdir -p "$(dirname "$log")"
    # exec, so that signals reach the program; the copy of its output to the log ignores them.
    exec > >(trap '' TERM INT; exec tee -a "$log") 2>&1
    exec "${command[@]}"
fi

# ---- the demonstration on simulated scenes
if [ -z "$dry_run" ]; then set_up; fi
run() { if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi; }
logged() {  # name, command
    if [ -n "$dry_run" ]; then show "${@:2}"; return; fi
    mkdir -p "$models/logs"
    "${@:2}" 2>&1 | tee "$models/logs/$1_$stamp.log"
}
scenes=$models/simulated
pretrained=$models/pretrain_simulated
finetuned=$models/finetune_simulated
stamp=$(date +%Y%m%d-%H%M%S)
run "$python" -m sarwmix.simulate --out "$scenes" --patches 1280 --scene_side 4 --seed 0 --val_fraction 0.05 --test_fraction 0.2
# Without --norm_pix_loss of the published recipe: encoders trained so are better on these scenes (docs/SCIENCE.md).
logged pretrain_simulated "${launch[@]}" "$python" main_pretrain.py --data_path "$scenes" --output_dir "$pretrained" --resume auto \
    --model mixmim_tiny --batch_size 8 --epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64 --save_epochs 1 4 11
run "$python" -m analysis.exponential_2_n_training "$pretrained" --output "$pretrained/loss.png"
run "$python" main_pretrain.py --data_path "$scenes" --split test --output_dir "$pretrained" --inference_samples 4 \
    --inference "$pretrained"/checkpoint_{1,4,11}.pth

# Finetuning with a tenth of the labels: from the pretrained encoder and from random initialisation, in parallel.
finetune_from() {  # name, checkpoint
    local prefix="$1: "
    if [ -n "$dry_run" ]; then prefix=''; fi
    logged "finetune_simulated_$1" env OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) "${launch[@]}" "$python" main_finetune.py --dataset benv2 \
        --data_path "$scenes" --finetune "$2" --train_fraction 0.1 --output_dir "$finetuned/$1" --resume auto --model mixmim_tiny \
        --batch_size 8 --epochs 24 --warmup_epochs 3 --lr 2e-3 --log_freq 12 --num_workers 0 | sed -u "s/^/$prefix/"
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
finetune_from pretrained "$pretrained/checkpoint.pth" & first=$!
finetune_from random "" & second=$!
wait $first
wait $second

if [ -z "$dry_run" ]; then echo; echo "Held-out scenes, from a tenth of the labels:"; fi
run "$python" -m analysis.compare_runs --runs "$finetuned/pretrained" "$finetuned/random"
if [ -n "$dry_run" ]; then exit; fi
echo "Done in $((SECONDS - started)) s. The encoder is pretrained without --norm_pix_loss, unlike the published recipe (docs/SCIENCE.md)."
echo "Look at:"
echo "  $pretrained/reconstruction_11.png                 predictions of the masked cells"
echo "  $pretrained/inference/reconstructions_1.png       the same for held-out scenes, after 1, 4 and 11 epochs"
echo "  $pretrained/loss.png                              the training loss"
echo "  $pretrained/checkpoint.pth                        the pretrained encoder"
echo "  $models/logs/                                    the logs of all runs"
echo "  $finetuned/pretrained/checkpoint_best.pth    the classifier; its metrics are in eval_test.json beside it"
echo "Next: your own images, docs/YOUR_DATA.md; all pages, docs/README.md"
