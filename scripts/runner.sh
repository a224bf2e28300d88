# shellcheck shell=bash disable=SC2034,SC2154,SC2164      # variables that the two scripts use or set; they run with set -e
# SPDX-License-Identifier: MIT
# What run_local.sh and qsub_run.sh share; they source it. A setting is a variable or a flag of the same name in lower case,
# which wins: MODEL=large, or --model large. Flags of the main programs can follow after --, and win over the recipe's.
#   TASK_TYPE      pretrain, finetune (which ends with the test figures), or test: evaluate what was finetuned
#   DATA_PATH      the data; DATASET: benv2 (default), benv1 or sen12flood
#   MODEL          base (default), large, huge or tiny
#   EPOCH          of pretraining: after which it stops, and from whose checkpoint_EPOCH.pth finetuning starts (default: 64)
#   WEIGHT_MODE    per_channel (default), shared_avg or none; WEIGHT_LEVEL: token (default) or pixel
#   MODELS_PATH    folder of all runs, and of their logs in logs/ (default: output)
#   CHECKPOINT     another file to finetune or to test; "random": finetune from random initialisation
#   PRETRAINED_ON  dataset of the pretraining run to start from (default: DATASET; benv1 for sen12flood, as published); with
#                  CHECKPOINT, whose statistics floods are standardised with
#   SEED           default: 0
#   BATCH_SIZE, ACCUM_ITER   per rank (default: what makes the published global batch of the ranks, and fits them)
#   EXTRA          flags of the main program, as after --, quoted as for a shell
SETTINGS=(TASK_TYPE DATASET DATA_PATH MODEL EPOCH WEIGHT_MODE WEIGHT_LEVEL MODELS_PATH CHECKPOINT PRETRAINED_ON SEED BATCH_SIZE
          ACCUM_ITER EXTRA)
program=$(basename "$0")
extra=()
dry_run=''

say() { echo "$program: $*"; }
die() { echo "$program: error: $*" >&2; exit 2; }

# The comment at the head of this file, and the one of the script that sources it.
usage() {
    local file
    for file in "$0" "${BASH_SOURCE[0]}"; do sed -n '3,/^[^#]/{/^# /{s/^# //;p}}' "$file"; done
}

# Flags → settings, --dry_run, and what follows after --.
read_flags() {
    local name
    while [ $# -gt 0 ]; do
        case $1 in
            -h|--help) usage; exit 0 ;;
            --dry_run) dry_run=yes; shift; continue ;;
            --) shift; extra=("$@"); break ;;
            --*) ;;
            *) die "$1: is no flag; settings are given as --data_path DIR, flags of the main program after --" ;;
        esac
        name=${1%%=*}
        name=${name#--}
        name=${name^^}
        [[ " ${SETTINGS[*]} " == *" $name "* ]] || die "$1: there is no such flag here; see --help, and give flags of the main program after --"
        if [[ $1 == *=* ]]; then
            declare -g "$name=${1#*=}"
            shift
        else
            [ $# -ge 2 ] || die "$1: a value is missing"
            declare -g "$name=$2"
            shift 2
        fi
    done
    if [ ${#extra[@]} = 0 ] && [ -n "${EXTRA:-}" ]; then
        mapfile -t extra < <(xargs -n 1 printf '%s\n' <<< "$EXTRA")
    fi
}

# Everything happens in the checkout, $root; relative paths are meant from where the script was started.
enter_checkout() {
    local name
    for name in DATA_PATH MODELS_PATH CHECKPOINT SITE; do
        if [[ ! ${!name:-} =~ ^(|/.*|random)$ ]]; then declare -g "$name=$(realpath -ms --relative-to="$root" "${!name}")"; fi
    done
    cd "$root"
}

one_of() {  # setting, values
    local name=$1 value=${!1}
    shift
    [[ " $* " == *" $value "* ]] || die "$name=$value: must be one of: $*"
}

whole() {  # setting, least value
    if [[ ! ${!1} =~ ^(0|[1-9][0-9]{0,6})$ ]] || [ "${!1}" -lt "$2" ]; then die "$1=${!1}: must be a whole number of at least $2"; fi
}

# Defaults, and what cannot be meant.
settle() {
    TASK_TYPE=${TASK_TYPE:-pretrain} DATASET=${DATASET:-benv2} MODEL=${MODEL:-base} EPOCH=${EPOCH:-64} SEED=${SEED:-0}
    WEIGHT_MODE=${WEIGHT_MODE:-per_channel} WEIGHT_LEVEL=${WEIGHT_LEVEL:-token} MODELS_PATH=${MODELS_PATH:-output} CHECKPOINT=${CHECKPOINT:-}
    one_of TASK_TYPE pretrain finetune test
    one_of DATASET benv1 benv2 sen12flood
    one_of MODEL base large huge tiny
    one_of WEIGHT_MODE per_channel shared_avg none
    one_of WEIGHT_LEVEL token pixel
    whole EPOCH 1
    whole SEED 0
    if [ -n "${BATCH_SIZE:-}" ]; then whole BATCH_SIZE 1; fi
    if [ -n "${ACCUM_ITER:-}" ]; then whole ACCUM_ITER 1; fi
    [ -n "${DATA_PATH:-}" ] || die "DATA_PATH is missing: the folder of the data, as a variable or as --data_path DIR"
    [ -n "$dry_run" ] || [ -e "$DATA_PATH" ] || die "DATA_PATH=$DATA_PATH: there is no such folder"
    [ "$TASK_TYPE/$DATASET" != pretrain/sen12flood ] || die "DATASET=sen12flood: is for finetuning; pretrain with benv1 or benv2"
    [ "$TASK_TYPE" != pretrain ] || [ -z "$CHECKPOINT" ] || die "CHECKPOINT=$CHECKPOINT: is for TASK_TYPE=finetune and test; to pretrain from weights, give -- --finetune $CHECKPOINT"
    [ "$TASK_TYPE/$CHECKPOINT" != test/random ] || die "CHECKPOINT=random: only TASK_TYPE=finetune starts from random initialisation"
    local flag
    for flag in "${extra[@]}"; do
        [[ ! $flag =~ ^--(batch_size|accum_iter)(=|$) ]] || die "$flag: give it before --, as the other one depends on it"
    done
}

# gpus, gpu_name and gpu_mb (memory of the smallest), as nvidia-smi and CUDA_VISIBLE_DEVICES say; gpus is 0 without one.
find_gpus() {
    local listed name mb
    gpus=0 gpu_name='' gpu_mb=0
    command -v nvidia-smi >/dev/null || return 0
    listed=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits) || return 0
    while IFS=, read -r name mb; do
        mb=${mb//[!0-9]/}
        [ -n "$mb" ] || continue
        gpus=$((gpus + 1)) gpu_name=$name
        if [ "$gpu_mb" = 0 ] || [ "$mb" -lt "$gpu_mb" ]; then gpu_mb=$mb; fi
    done <<< "$listed"
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        local seen=()
        IFS=, read -ra seen <<< "$CUDA_VISIBLE_DEVICES"
        if [[ ${seen[0]:-} == -* ]]; then seen=(); fi
        gpus=${#seen[@]}
    fi
}

# batch and accumulate for $1 ranks: the published global batch, in micro-batches as large as published where they fit.
deal_batch() {
    local ranks=$1 global most per_image weights
    case $MODEL in      # MB that a training step keeps for an image (docs/PERFORMANCE.md), and for weights, gradients and moments
        base) per_image=43 weights=1800 ;; large) per_image=62 weights=3600 ;; huge) per_image=110 weights=11000 ;; tiny) per_image=10 weights=100 ;;
    esac
    case $TASK_TYPE/$DATASET in
        pretrain/*) global=2048 most=256 ;;
        */sen12flood) global=128 most=16 per_image=$((32 * per_image)) ;;      # a pair is twice sixteen patches
        *) global=1024 most=128 ;;
    esac
    if [ "$gpus" = 0 ]; then most=$((most / 8)); fi
    batch=${BATCH_SIZE:-$most}
    if [ -z "${BATCH_SIZE:-}" ]; then
        while [ "$batch" -gt 2 ] && { [ $((batch * ranks)) -gt $global ] ||
                { [ "$gpus" -gt 0 ] && [ $((4 * (batch * per_image + weights))) -gt $((3 * gpu_mb)) ]; }; }; do
            batch=$((batch / 2))
        done
    fi
    accumulate=${ACCUM_ITER:-$((global > batch * ranks ? global / (batch * ranks) : 1))}
    if [ "$TASK_TYPE" != test ] && [ -z "${BATCH_SIZE:-}${ACCUM_ITER:-}" ] && [ $((batch * ranks * accumulate)) != $global ]; then
        die "the published global batch of $global cannot be dealt to $ranks ranks; start 1, 2, 4, 8 or 16, or choose BATCH_SIZE (and ACCUM_ITER)"
    fi
}

# main, run_folder and flags: the program, where it writes, and its flags, for $1 ranks.
recipe() {
    local weighted="${WEIGHT_MODE}_${WEIGHT_LEVEL}_seed$SEED" pretrained_on=$DATASET pretrained start
    if [ "$DATASET" = sen12flood ]; then pretrained_on=benv1; fi
    pretrained_on=${PRETRAINED_ON:-$pretrained_on}
    pretrained="$MODELS_PATH/pretrain_${pretrained_on}_${MODEL}_$weighted"
    deal_batch "$1"
    case $CHECKPOINT in      # what the names of finetuned runs say of their start
        '') start="$([ "$pretrained_on" = "$DATASET" ] || echo "${pretrained_on}_")${weighted}_epoch$EPOCH" ;;
        random) start="random_seed$SEED" ;;
        *) start="$(basename "${CHECKPOINT%.pth}")_seed$SEED" ;;
    esac
    local name="${DATASET}_${MODEL}_$start"
    flags=(--dataset "$DATASET" --data_path "$DATA_PATH" --model "mixmim_$MODEL" --seed "$SEED" --batch_size "$batch")
    case $TASK_TYPE in
        pretrain)
            main=main_pretrain.py run_folder=$pretrained
            flags+=(--accum_iter "$accumulate" --epochs 1024 --stop_epoch "$EPOCH" --warmup_epochs 40 --blr 1.5e-4 --min_lr 0 --weight_decay 0.05
                    --mask_ratio 0.5 --norm_pix_loss --weight_mode "$WEIGHT_MODE" --weight_level "$WEIGHT_LEVEL") ;;
        finetune)
            main=main_finetune.py run_folder=$MODELS_PATH/finetune_$name start=${CHECKPOINT:-$pretrained/checkpoint_$EPOCH.pth}
            if [ "$start" = random ]; then start=''; else need_checkpoint "$start" "pretrain first, or name one with CHECKPOINT"; fi
            flags+=(--accum_iter "$accumulate" --epochs 50 --warmup_epochs 5 --blr 5e-4 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.7
                    --drop_path 0.1 --finetune "$start") ;;
        test)
            main=main_finetune.py run_folder=$MODELS_PATH/test_$name start=${CHECKPOINT:-$MODELS_PATH/finetune_$name/checkpoint_best.pth}
            need_checkpoint "$start" "finetune first, or name one with CHECKPOINT"
            flags+=(--eval --split test --finetune "$start") ;;
    esac
    if [ "$TASK_TYPE/$DATASET/$pretrained_on" = finetune/sen12flood/benv2 ] && [ -n "$CHECKPOINT" ]; then
        flags+=(--mean -19.1966 -12.5144 --std 5.4501 5.0019)      # runs of ours say it, released files and random weights do not
    fi
    flags+=(--output_dir "$run_folder")
    if [ "$TASK_TYPE" != test ]; then flags+=(--resume auto); fi
}

need_checkpoint() {
    [ -n "$dry_run" ] || [ -e "$1" ] || die "$1: there is no such checkpoint; $2"
}

plural() { echo "$1 $2$([ "$1" = 1 ] || echo s)"; }

# log, where this run's console lines go; and a few lines on what it is, as comments, so that a dry run can be pasted.
describe() {  # ranks, nodes
    log="$MODELS_PATH/logs/$(basename "$run_folder")_$(date +%Y%m%d-%H%M%S).log"
    echo "# $(plural "$2" node), $(plural "$1" rank) on ${gpu_name:-the CPU}"
    if [ "$TASK_TYPE" != test ]; then
        echo "# global batch $((batch * accumulate * $1)) = $(plural "$batch" image) × $(plural "$accumulate" accumulation) × $(plural "$1" rank)"
    fi
    echo "# log: $log"
}

# A command as it can be typed.
show() {
    local word line=''
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    echo "${line# }"
}
