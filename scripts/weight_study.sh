#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The papers' study of the polarization weights: pretrains with each kind of weights and each seed, and evaluates the encoders by
# a linear probe of their frozen features and by flood classifiers finetuned from them. Writes a table and a figure.
#   bash scripts/weight_study.sh                                         on simulated scenes and floods
#   bash scripts/weight_study.sh --data_path DIR --flood_path DIR …      on BigEarthNet and SEN12-FLOOD, by the published recipes
# Run it again to continue: finished steps are skipped. --dry_run prints the commands. Flags after -- go to pretraining.
set -euo pipefail
start=$(pwd -P) program=weight_study.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/runner.sh
. scripts/runner.sh
exec "$deciding" -m analysis.weight_study_runs "$start" "$@"
