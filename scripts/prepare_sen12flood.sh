#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# SEN12-FLOOD from its archive to what --dataset sen12flood reads. README_sen12.md explains the steps and the choices.
#   bash scripts/prepare_sen12flood.sh --zip ZIP --work DIR --out DIR [FLAGS …]
#   bash scripts/prepare_sen12flood.sh --raw-root DIR --work DIR --out DIR [FLAGS …]
# ZIP: the archive as downloaded; or DIR: where it lies unzipped, with S1list.json. --out gets the data, --work what the
# steps need in between, which is removed at the end. Run it again to continue what was stopped.
#   --layout images|npy      each image once with lists of pairs (default), or a file per pair, seven times as large
#   --resampling METHOD      bilinear (default), nearest or average
#   --units linear|dB        of the Sentinel-1 files (default: linear, as they are published)
#   --max_zeros SHARE        of pixels without data from which on an image is dropped (default: 0.25)
#   --size PIXELS            side of the images (default: 512)
#   --s1-list FILE           another list of images than the archive's S1list.json
#   --train-list FILE --test-list FILE    folders of each split, one per row; without, one or two digits are for test
#   --keep-intermediate      leave --work as it is at the end
#   --workers N              processes of each rank (default: the cores, shared among the ranks)
#   --ranks N                MPI ranks (default: 1)
# LAUNCH="mpirun -np 64 -hostfile /path/hosts" before the command starts the steps so, instead of --ranks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() { echo "prepare_sen12flood.sh: error: $*" >&2; exit 2; }
say() { echo "[prepare] $*"; }

# ---- flags: --max-zeros is --max_zeros, and --flag=value is --flag value
declare -A flags=([layout]=images [resampling]=bilinear [units]=linear [max-zeros]=0.25 [size]=512 [ranks]=1)
while [ $# -gt 0 ]; do
    name=${1%%=*}
    name=${name#--}
    name=${name//_/-}
    case "$1" in
        -h|--help) usage; exit 0 ;;
        --keep-intermediate|--keep_intermediate) flags[keep-intermediate]=yes; shift; continue ;;
        --*) ;;
        *) die "$1: is no flag; see --help" ;;
    esac
    case "$name" in
        zip|raw-root|work|out|s1-list|train-list|test-list|layout|resampling|units|max-zeros|size|workers|ranks) ;;
        *) die "$1: there is no such flag; see --help" ;;
    esac
    if [[ "$1" == *=* ]]; then
        value=${1#*=}
        shift
    else
        [ $# -ge 2 ] || die "--$name needs a value"
        value=$2
        shift 2
    fi
    [ -n "$value" ] || die "--$name needs a value"
    flags[$name]=$value
done

given() { [ -n "${flags[$1]:-}" ]; }
one_of() { case " $2 " in *" ${flags[$1]} "*) ;; *) die "--$1 ${flags[$1]}: give one of $2" ;; esac; }
if given zip && given raw-root; then die "--zip and --raw-root: give one of them"; fi
given zip || given raw-root || die "--zip, or --raw-root, is needed; see --help"
for name in work out; do given $name || die "--$name is needed; see --help"; done
[ "${flags[train-list]:+1}${flags[test-list]:+1}" != 1 ] || die "--train-list and --test-list go together"
one_of layout "images npy"
one_of resampling "bilinear nearest average"
one_of units "linear dB"
for name in size workers ranks; do
    if given $name && ! [[ "${flags[$name]}" =~ ^[1-9][0-9]{0,5}$ ]]; then die "--$name ${flags[$name]}: give a whole number above 0"; fi
done
for name in zip s1-list train-list test-list; do
    if given $name; then [ -f "${flags[$name]}" ] || die "--$name ${flags[$name]}: there is no such file"; fi
done
if given raw-root; then [ -d "${flags[raw-root]}" ] || die "--raw-root ${flags[raw-root]}: there is no such folder"; fi
for name in zip raw-root work out s1-list train-list test-list; do
    if given $name; then flags[$name]=$(realpath -m -- "${flags[$name]}"); fi
done

# ---- folders: none may lie in another that a step fills or that is removed
work=${flags[work]} out=${flags[out]}
within() { [[ "$1/" == "$2/"* ]]; }
within "$work" "$out" && die "--work ${flags[work]} lies in --out; choose another --work"
for step in raw aligned pairs; do
    within "$out" "$work/$step" && die "--out $out lies in $work/$step, which is filled and removed; choose another --out"
    for name in zip raw-root s1-list train-list test-list; do
        if [ "$name,$step" != raw-root,raw ] && given $name && within "${flags[$name]}" "$work/$step"; then
            die "--$name ${flags[$name]} lies in $work/$step, which is filled and removed; choose another --work"
        fi
    done
done
if given raw-root && within "$work" "${flags[raw-root]}"; then die "--work $work lies in --raw-root; choose another --work"; fi
if given raw-root && within "$out" "${flags[raw-root]}"; then die "--out $out lies in --raw-root; choose another --out"; fi

cd "$root"
bash scripts/setup.sh
python=$root/.venv/bin/python
cores=$(nproc)

launch=()
if [ -n "${LAUNCH:-}" ]; then
    read -ra launch <<< "$LAUNCH"
elif [ "${flags[ranks]}" -gt 1 ]; then
    command -v mpirun >/dev/null || die "--ranks ${flags[ranks]}: there is no mpirun; install it (INSTALL.md), or use --workers alone"
    launch=(mpirun -np "${flags[ranks]}" --bind-to none)
    if [ "$(id -u)" = 0 ]; then launch+=(--allow-run-as-root); fi
    if [ "${flags[ranks]}" -gt "$cores" ]; then launch+=(--oversubscribe); fi
    given workers || flags[workers]=$((cores > flags[ranks] ? cores / flags[ranks] : 1))
fi
workers=()
if given workers; then workers=(--workers "${flags[workers]}"); fi
step() { "${launch[@]}" "$python" -m "sarwmix.$1" "${@:2}" "${workers[@]}"; }
pass() { for name in "$@"; do if given "$name"; then words+=("--$name" "${flags[$name]}"); fi; done; }

# ---- what is there already
words=()
pass layout size max-zeros
made_with=(resampling="${flags[resampling]}" units="${flags[units]}" train_list="${flags[train-list]:-}" test_list="${flags[test-list]:-}")
list=${flags[s1-list]:-${flags[zip]:-${flags[raw-root]:-}/S1list.json}}
[ -f "$list" ] || die "$list: there is no such file; give the list of images with --s1-list"
state=$("$python" -m sarwmix.sen12_prune_partial_pairs --state --out "$out" "${words[@]}" --made-with "${made_with[@]}" s1_list="$list")

remove_intermediate() {  # only what the steps wrote themselves: each leaves a step.json. Renamed first, as this may be stopped too
    if given keep-intermediate; then return; fi
    for name in aligned pairs ${flags[zip]:+raw}; do
        if [ -f "$work/$name/step.json" ]; then
            say "removing $work/$name"
            mv -- "$work/$name" "$work/.removing-$name"
        fi
        rm -rf -- "$work/.removing-$name"
    done
}

if [ "$state" = complete ]; then
    remove_intermediate
    say "$out is complete already, nothing to do"
    exit 0
fi

# ---- the steps
words=()
pass zip raw-root s1-list work out layout size
if given keep-intermediate; then words+=(--keep-intermediate); fi
"$python" -m sarwmix.prepare.sen12_disk "${words[@]}"
raw=${flags[raw-root]:-$work/raw}
if given zip; then
    say "1/4 unzipping what is needed"
    step prepare.sen12_unzip --zip "${flags[zip]}" --out "$raw"
fi
say "2/4 aligning the Sentinel-1 images"
words=()
pass s1-list resampling units size
step sen12_align_s1_to_s2 --raw-root "$raw" --out "$work/aligned" "${words[@]}"
say "3/4 making pairs"
words=()
pass train-list test-list
step sen12_data_prep --aligned "$work/aligned" --out "$work/pairs" "${words[@]}"
say "4/4 dropping pairs that lack data, writing the others"
words=()
pass layout size max-zeros
step sen12_prune_partial_pairs --aligned "$work/aligned" --pairs "$work/pairs" --out "$out" "${words[@]}"
remove_intermediate

say "done: $out. preparation.json has the counts, dropped.csv what is not there and why. To train on it from BigEarthNet v1 weights:"
say "  python main_finetune.py --dataset sen12flood --data_path $(printf %q "$out") --finetune benv1_pretrain_checkpoint_64.pth --batch_size 16"
