# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Settings of a site, for scripts/qsub_run.sh: copy this to scripts/site.sh (git ignores it), or name it in SITE. With := what
# is set by a variable or a flag wins. As it stands: H200 nodes of ABCI; the group and the modules are yours to fill in
# (`module avail`; Open MPI must be the one that .venv was set up with).
: "${SITE_QUEUE:=rt_HF}"
: "${SITE_NCPUS:=192}"
: "${SITE_GPU:=H200}"
: "${SITE_GROUP:=}"
: "${SITE_MODULES:=}"
