#!/usr/bin/env bash
# Trains under the competition's rules with torchrun: 10 minutes on 8 GPUs of one machine, or on several machines.
#
#     bash run_8xh100.sh [VAR=VALUE ...]        for example: bash run_8xh100.sh SEED=7 TRAIN_SEQ_LEN=2048
#     on node K of N: bash run_8xh100.sh NNODES=N NODE_RANK=K RDZV_ENDPOINT=host-of-node-0:29500 RUN_ID=name
#
# Checks GPUs, data, tokenizer and disk space first. `python train_gpt.py --help` lists the variables. Besides:
#   NPROC=8            processes on this machine, one for each GPU
#   NNODES=1           machines; with more, NODE_RANK, RDZV_ENDPOINT and one RUN_ID for all are needed
#   MIN_FREE_GB=20     disk space to ask for
#   DRY_RUN=1          print the command and what is missing; run nothing
#   MAX_RESTARTS=3     restarts of a run that dies or hangs, from its latest checkpoint: set SAVE_EVERY for long ones
#   MAX_COST_USD, PRICE_PER_HOUR=...     what this machine costs an hour in USD: the run saves and ends in time
#   TORCH_INDEX_URL, PYTHON, SKIP_SETUP=1     as in run_local.sh
set -eu
CDPATH='' cd -P -- "$(dirname -- "$0")"
. tools/setup.sh
. tools/supervise.sh

problems=0
problem() { # all of them are named before the script stops
    if [ "${DRY_RUN:-0}" = 1 ]; then
        note "missing: $1"
    else
        printf 'error: %s\n' "$1" >&2
        problems=1
    fi
}

need_number() { # need_number NAME LEAST
    case ${!1} in
        '' | *[!0-9]*) fail "found $1=${!1}, expected a whole number of at least $2" ;;
    esac
    [ "${!1}" -ge "$2" ] || fail "found $1=${!1}, expected a whole number of at least $2"
}

check_gpus() {
    local gpus visible
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c '^[0-9]') || true
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        visible=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .) || true
        gpus=$((visible < gpus ? visible : gpus))
    fi
    [ "$gpus" -ge "$NPROC" ] || problem "found $gpus GPUs (nvidia-smi, CUDA_VISIBLE_DEVICES), expected NPROC=$NPROC;\
 set NPROC to what is there, or use run_local.sh"
}

has_shards() { # has_shards train|val
    local shard
    for shard in "$DATA_PATH"/fineweb_"$1"_*.bin; do
        if [ -e "$shard" ]; then return 0; fi
    done
    return 1
}

check_data() {
    local remedy variant=sp$vocabulary
    case $vocabulary in 256 | 260) variant=byte260 ;; esac
    remedy="run: python data/download.py --variant ${variant} --train-shards 80"
    [ "$folded" = "" ] || remedy="run: python data/prepare.py --train docs.jsonl --vocab-size $vocabulary --name fineweb10B --casefold"
    if [ -n "${DATA_PATH:-}" ] && ! { has_shards train && has_shards val; }; then
        problem "found no fineweb_train_*.bin or no fineweb_val_*.bin in DATA_PATH=$DATA_PATH; $remedy"
    fi
    if [ -n "${TOKENIZER_PATH:-}" ] && [ ! -f "$TOKENIZER_PATH" ]; then
        problem "found no file at TOKENIZER_PATH=$TOKENIZER_PATH; $remedy"
    fi
}

check_disk() {
    local folder free
    folder=${OUT_DIR:-runs}
    [ -d "$folder" ] || folder=.
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 * 1024 / 1e9) }')
    [ "$free" -ge "$MIN_FREE_GB" ] || problem "found $free GB free for $folder, expected MIN_FREE_GB=$MIN_FREE_GB;\
 free some, set OUT_DIR to another disk, or lower MIN_FREE_GB"
}

check_nodes() {
    local example="; on every node: NNODES=$NNODES NODE_RANK=0..$((NNODES - 1)) RDZV_ENDPOINT=host:29500 RUN_ID=name"
    [ -n "${RDZV_ENDPOINT:-}" ] || problem "NNODES=$NNODES needs RDZV_ENDPOINT, host and port of node 0$example"
    [ -n "${RUN_ID:-}" ] || problem "NNODES=$NNODES needs RUN_ID, the same on every node$example"
    case ${NODE_RANK:-} in
        '' | *[!0-9]*) problem "found NODE_RANK=${NODE_RANK:-}, expected 0 to $((NNODES - 1))$example" ;;
        *) [ "$NODE_RANK" -lt "$NNODES" ] || problem "found NODE_RANK=$NODE_RANK, expected 0 to $((NNODES - 1))$example" ;;
    esac
}

build_command() {
    local host=0
    if [ "$NNODES" -eq 1 ]; then
        launch=(torchrun --standalone)
    else
        # is_host instead of torchrun's guess by host name, which fails behind load balancers and in containers.
        if [ "${NODE_RANK:-}" = 0 ]; then host=1; fi
        launch=(torchrun "--nnodes=$NNODES" --rdzv-backend=c10d "--rdzv-endpoint=${RDZV_ENDPOINT:-}"
            "--rdzv-id=$RUN_ID" "--rdzv-conf=is_host=$host")
    fi
    launch=("${launch[@]}" "--nproc_per_node=$NPROC" train_gpt.py)
}

# show_command VAR=VALUE...: the launch with its settings in front, so that the line can be logged and pasted.
show_command() {
    local setting name line=""
    local own="NPROC= NNODES= NODE_RANK= RDZV_ENDPOINT= DRY_RUN= MIN_FREE_GB= TORCH_INDEX_URL= PYTHON= SKIP_SETUP= \
MAX_RESTARTS= MAX_COST_USD= PRICE_PER_HOUR= COST_RESERVE_SECONDS="
    for setting in $SETTINGS RUN_ID= "$@"; do
        name=${setting%%=*}
        case "$line $own" in
            *" $name="*) continue ;; # shown already, or for this script alone
        esac
        if [ -n "${!name:-}" ]; then line="$line $(quote "$name=${!name}")"; fi
    done
    for setting in "${launch[@]}"; do line="$line $(quote "$setting")"; done
    printf '%s\n' "${line# }"
}

quote() { # as the shell needs it, and untouched where it needs nothing
    case $1 in
        *[!A-Za-z0-9_./:,=%+-]*) printf '%q' "$1" ;;
        *) printf '%s' "$1" ;;
    esac
}

hint_flash_attention() {
    local build
    if "$PY" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("flash_attn_interface") is None)'; then return; fi
    build=$("$PY" -c 'import torch; print("cu" + torch.version.cuda.replace(".", ""))' 2>/dev/null) || build=cu130
    note "hint: no FlashAttention 3; on H100 it makes attention faster (wheels for cu126, cu128, cu130, torch >= 2.9):\
 $PY -m pip install flash-attn-3 --no-deps --index-url https://download.pytorch.org/whl/$build"
}

export_settings "$@"
NPROC=${NPROC:-8} NNODES=${NNODES:-1} MIN_FREE_GB=${MIN_FREE_GB:-20}
need_number NPROC 1
need_number NNODES 1
need_number MIN_FREE_GB 0
check_supervision

# Competition settings, then what long runs taught: an allocator that does not fragment, peer-to-peer copies left on.
vocabulary=${VOCAB_SIZE:-8192} folded=""
[ "${PRESET:-}" != frontier ] || folded=_casefold
SETTINGS="PRESET=ternary MAX_WALLCLOCK_SECONDS=600 MAX_EVAL_SECONDS=600 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024
VOCAB_SIZE=$vocabulary DATA_PATH=./data/datasets/fineweb10B_sp$vocabulary TOKENIZER_PATH=./data/tokenizers/fineweb_${vocabulary}_bpe.model
PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:256,expandable_segments:True NCCL_P2P_DISABLE=0"
if [ "$vocabulary" = 256 ] || [ "$vocabulary" = 260 ]; then
    # The byte tokenizers need no file.
    SETTINGS=$(printf '%s' "$SETTINGS" | sed "s/_sp$vocabulary/_byte$vocabulary/; s/TOKENIZER_PATH=[^ ]*//")
fi
if [ "$folded" = _casefold ]; then
    SETTINGS=$(printf '%s' "$SETTINGS" | sed "s/_sp$vocabulary/&_casefold/; s/fineweb_${vocabulary}_bpe/fineweb10B_${vocabulary}_casefold_bpe/")
fi
named_preset=${PRESET:-}
for setting in $SETTINGS; do
    case ${setting%%=*} in
        # A variable outranks a preset: one that was asked for by name brings its own batch and length.
        TRAIN_BATCH_TOKENS | TRAIN_SEQ_LEN) if [ -n "$named_preset" ]; then continue; fi ;;
        # torch's newer name for the same setting
        PYTORCH_CUDA_ALLOC_CONF) if [ -n "${PYTORCH_ALLOC_CONF:-}" ]; then continue; fi ;;
    esac
    set_default "${setting%%=*}" "${setting#*=}"
done
check_gpus
check_data
check_disk
if [ "$NNODES" -gt 1 ]; then check_nodes; fi
if [ "$problems" = 1 ]; then exit 2; fi

export RUN_ID="${RUN_ID:-${NPROC}gpu_$(date +%Y%m%d_%H%M%S)}"
build_command
show_command "$@"
if [ "${DRY_RUN:-0}" = 1 ]; then exit 0; fi
ensure_env requirements.txt
hint_flash_attention
code=0
supervise "${OUT_DIR:-runs}/$RUN_ID" "${launch[@]}" || code=$?
exit "$code"
