# shellcheck shell=bash disable=SC2154      # `program` is the script's
# SPDX-License-Identifier: MIT
# What run_local.sh, qsub_run.sh and weight_study.sh share; they source it, in the root of the checkout.
die() { echo "$program: error: $*" >&2; exit 2; }

# An interpreter for what needs no set-up: that of .venv where it exists, else what setup.sh would take.
deciding=.venv/bin/python
[ -x $deciding ] || deciding=${PYTHON:-python3}
command -v "$deciding" >/dev/null || die "no $deciding found; install Python 3.11 or newer, or set PYTHON=/path/to/python"

# Evaluates what util/runner.py answers to: script, folder that relative paths are meant from, flags …
decide() {
    local answer
    answer=$("$deciding" -m util.runner "$@") || exit
    eval "$answer"
}
