# shellcheck shell=bash disable=SC2154      # `program` is the script's
# SPDX-License-Identifier: MIT
# Common functions, which run_local.sh, qsub_run.sh and weight_study.sh source in the root of the checkout.
die() { echo "$program: error: $*" >&2; exit 2; }

# The interpreter of util.runner, which needs no set-up: that of .venv if it exists, else the one that setup.sh would use.
deciding=.venv/bin/python
[ -x $deciding ] || deciding=${PYTHON:-python3}
command -v "$deciding" >/dev/null || die "no $deciding found; install Python 3.11 or newer, or set PYTHON=/path/to/python"

# Evaluates the output of util/runner.py for: script, folder that relative paths refer to, flags …
decide() {
    local answer
    answer=$("$deciding" -m util.runner "$@") || exit
    eval "$answer"
}
