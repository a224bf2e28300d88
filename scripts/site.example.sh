# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Settings of a site, for scripts/qsub_run.sh and scripts/sbatch_run.sh: copy this to scripts/site.sh (git ignores it), or name it
# in SITE. With :=, variables and flags take precedence.

# PBS. The values are for H200 nodes of ABCI. Fill in your group and modules (`module avail`; Open MPI must be the one that .venv
# was set up with).
: "${SITE_QUEUE:=rt_HF}"
: "${SITE_NCPUS:=192}"
: "${SITE_GPU:=H200}"
: "${SITE_GROUP:=}"
: "${SITE_MODULES:=}"

# Slurm. What `sinfo -o '%P %G %c %f'` shows: partition, GPUs, cores and features of nodes. SITE_GPU and SITE_MODULES are as above.
: "${SITE_PARTITION:=}"
: "${SITE_ACCOUNT:=}"
: "${SITE_GPUS:=8}"
: "${SITE_GRES:=}"              # gpu:h200:8, where --gpus-per-node does not do
: "${SITE_CPUS:=8}"             # for each GPU
: "${SITE_CONSTRAINT:=}"
: "${SITE_SBATCH:=}"            # --qos gpu --mem 0
