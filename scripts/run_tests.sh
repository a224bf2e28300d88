#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Sets up what is missing, then runs the tests. Arguments go to pytest: bash scripts/run_tests.sh -k weighting
#   TESTS_AT_ONCE=N           processes (default: 2; with more, 5 GB of memory each are needed)
#   SARWMIX_SAMPLE_DATA=DIR   a folder of real samples; the tests that need them are skipped without it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1      # the models of the tests are too small for more
exec .venv/bin/python -m pytest --numprocesses "${TESTS_AT_ONCE:-2}" --dist loadfile "$@"
