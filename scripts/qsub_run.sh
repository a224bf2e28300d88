#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Pretraining by the published recipe on one node of 8 GPUs, under PBS:
#   qsub -v DATA_PATH=/path/to/BigEarthNet-v2,OUTPUT=/path/to/run scripts/qsub_run.sh
# Submit it again after the walltime: it continues from the last epoch. Adapt the resource lines to your site.
#PBS -N sarwmix-pretrain
#PBS -l select=1:ncpus=96:ngpus=8:mpiprocs=8
#PBS -l walltime=24:00:00
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:?submit this with qsub, from the root of the checkout}"
: "${DATA_PATH:?give -v DATA_PATH=folder that holds BigEarthNet-S1}" "${OUTPUT:?give -v OUTPUT=folder of the run}"
exec mpirun -np 8 --bind-to none .venv/bin/python main_pretrain.py --dataset "${DATASET:-benv2}" --data_path "$DATA_PATH" \
    --output_dir "$OUTPUT" --resume auto --model mixmim_base --batch_size 256 --epochs 1024 --stop_epoch 64 --warmup_epochs 40 \
    --blr 1.5e-4 --weight_decay 0.05 --mask_ratio 0.5 --norm_pix_loss
