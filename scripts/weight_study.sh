#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The papers' study of the polarization weights: pretrain with each kind of weights and each seed, then see what the encoder is
# worth, by a linear probe of its frozen features and by a flood classifier finetuned from it. Ends with a table and a figure.
#   bash scripts/weight_study.sh                                         on simulated scenes and floods
#   bash scripts/weight_study.sh --data_path DIR --flood_path DIR …      on BigEarthNet and SEN12-FLOOD, by the published recipes
# Run it again to go on: what is finished is not done again. --dry_run prints the commands. Flags after -- go to pretraining.
set -euo pipefail
start=$(pwd -P) program=weight_study.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
exec "$deciding" -m analysis.weight_study_runs "$start" "$@"
