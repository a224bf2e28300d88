# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Settings of a site, for scripts/qsub_run.sh: copy this to scripts/site.sh (git ignores it), or name it in SITE. With :=,
# variables and flags take precedence. The values are for H200 nodes of ABCI. Fill in your group and modules (`module avail`;
# Open MPI must be the one that .venv was set up with).
: "${SITE_QUEUE:=rt_HF}"
: "${SITE_NCPUS:=192}"
: "${SITE_GPU:=H200}"
: "${SITE_GROUP:=}"
: "${SITE_MODULES:=}"
