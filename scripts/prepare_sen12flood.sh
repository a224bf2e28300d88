#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Prepares SEN12-FLOOD, from its archive to the data that --dataset sen12flood reads. README_sen12.md explains the steps.
#   bash scripts/prepare_sen12flood.sh --zip ZIP --work DIR --out DIR [FLAGS …]
#   bash scripts/prepare_sen12flood.sh --raw_root DIR --work DIR --out DIR [FLAGS …]
# --zip: the archive as downloaded. --raw_root: the unzipped archive, with S1list.json. --out: folder for the data. --work: folder
# for intermediate files, which is removed at the end. Run it again to continue after an interruption.
#   --layout images|npy      each image once with lists of pairs (default), or a file per pair, seven times as large
#   --resampling METHOD      bilinear (default), nearest or average
#   --units linear|dB        units of the Sentinel-1 files (default: linear, as published)
#   --max_zeros SHARE        share of pixels without data at which an image is dropped (default: 0.25)
#   --size PIXELS            side of the images (default: 512)
#   --s1_list FILE           another list of images than the archive's S1list.json
#   --train_list FILE --test_list FILE    folders of each split, one per row (default: names of one or two digits are for test)
#   --keep_intermediate      leave --work as it is at the end
#   --workers N              processes of each rank (default: the cores, shared among the ranks)
#   --ranks N                MPI ranks (default: 1)
# LAUNCH="mpirun -np 64 -hostfile /path/hosts" before the command starts the steps with this prefix, instead of --ranks.
set -euo pipefail
start=$(pwd -P)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case " $* " in
    *" -h "*|*" --help "*) sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/prepare_sen12flood.sh; exit 0 ;;
esac
bash scripts/setup.sh
exec "$PWD/.venv/bin/python" -m sarwmix.prepare.sen12flood --relative_to "$start" "$@"
