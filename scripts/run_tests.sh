#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Sets up what is missing, then runs the tests. Arguments go to pytest: bash scripts/run_tests.sh -k weighting
#   SARWMIX_SAMPLE_DATA=DIR   a folder of real samples; the tests that need them are skipped without it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
