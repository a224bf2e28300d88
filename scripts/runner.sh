# shellcheck shell=bash disable=SC2154,SC2034      # `decide` sets the variables; the scripts use them
# SPDX-License-Identifier: MIT
# Common functions of run_local.sh, qsub_run.sh and sbatch_run.sh, which source this in the root of the checkout
# and set `program` to their name.
die() { echo "$program: error: $*" >&2; exit 2; }
say() { echo "$program: $*"; }

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

# ---- jobs: qsub_run.sh and sbatch_run.sh

# Decides what is submitted and run, with the settings of the site. Arguments: folder that relative paths refer to, flags …
decide_job() {
    decide "$program" "$@"
    if [ -n "$SITE" ]; then
        set -a
        # shellcheck source=scripts/site.example.sh
        . "$SITE"
        set +a
    fi
    decide "$program:job" . "${dry_run[@]}"
}

# In a job: loads the modules of the site, and refuses to start without the launcher, or without .venv. Arguments: the
# launcher, what to do without it.
prepare_job() {
    if [ -n "${SITE_MODULES:-}" ]; then
        set +u
        # shellcheck disable=SC1091      # the site's
        command -v module >/dev/null || . /etc/profile.d/modules.sh
        # shellcheck disable=SC2086      # a list
        module load $SITE_MODULES
        set -u
    fi
    command -v "$1" >/dev/null || die "there is no $1; $2"
    [ -x .venv/bin/python ] || die "there is no .venv in $root; set it up with: bash scripts/setup.sh"
}

saved_at() { stat -Lc %Y "$run_folder/checkpoint.pth" 2>/dev/null || echo 0; }

# Runs a command with its output in the log, and waits for it. Hands on SIGTERM and SIGUSR1 as SIGUSR1, at which the run saves and
# ends. Sets status: of the run; 143 if it saved and ended at SIGTERM, 0 at SIGUSR1, as at the walltime. Later signals are ignored.
run_job() {
    saved_before=$(saved_at)
    printf '%s\n' "${said[@]}"
    mkdir -p "$(dirname "$log")"
    "$@" >> "$log" 2>&1 &
    local running=$! interrupted=yes
    signalled=''
    trap 'signalled=TERM interrupted=yes; kill -USR1 '$running' 2>/dev/null || true' TERM
    trap 'signalled=${signalled:-USR1} interrupted=yes; kill -USR1 '$running' 2>/dev/null || true' USR1
    while [ -n "$interrupted" ]; do       # a signal ends the `wait`, not the run
        interrupted='' status=0
        wait "$running" || status=$?
    done
    trap '' TERM USR1
    if [ "$status" = 138 ]; then case "$signalled" in TERM) status=143 ;; USR1) status=0 ;; esac; fi       # SIGUSR1 was ours
    if [ "$status" != 0 ]; then tail -n 5 "$log"; fi
}

# Prints why this job is not continued by another, if it is not. RESUBMIT: how many may follow.
why_not() {
    if [ "$status" != 0 ] && [ "$status" != 143 ]; then
        echo "the run ended with status $status"
    elif [ "$task" = test ] || grep -qs '^ "outcome": "finished"' "$run_folder/run.json"; then      # not that of an earlier part, which is further in
        echo "the run is finished"
    elif [ "$RESUBMIT" = 0 ]; then
        echo "RESUBMIT is 0"
    elif [ "$(saved_at)" -le "$saved_before" ]; then
        echo "nothing new was saved in $run_folder/checkpoint.pth"
    fi
}
