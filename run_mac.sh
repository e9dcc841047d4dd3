#!/usr/bin/env bash
# Trains, packages and scores a model on the GPU of an Apple computer with MLX. About five minutes by default.
#
#     bash run_mac.sh [VAR=VALUE ...]           for example: bash run_mac.sh MAX_WALLCLOCK_SECONDS=60 SEED=7
#
# Makes .venv on the first run (MLX, no torch), builds the corpus that comes with the repository, trains
# train_gpt_mlx.py, the twin of train_gpt.py, with a preset for this machine's memory, and closes with a comparison.
# `python train_gpt_mlx.py --help` lists the variables; paths are relative to the repository. Besides:
#   DATA_PATH, TOKENIZER_PATH, VOCAB_SIZE   other data than the built-in corpus; VOCAB_SIZE alone (256: bytes) cuts that
#                      corpus into another number of tokens
#   PRESET=hybrid_mac  the default; local below 8 GB of memory; others for a Mac: mac_plain, mac_rmt_mhc_lite, skc_small
#   PYTHON             the interpreter to make .venv with (default: python3); a native one, arm64
#   SKIP_SETUP=1       make no .venv: use that interpreter and its packages as they are
set -eu
CDPATH='' cd -P -- "$(dirname -- "$0")"
. tools/setup.sh

export_settings "$@"
if [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" != 1 ]; then # uname says x86_64 of Apple Silicon, too, under Rosetta
    fail "this is $(uname -s) on $(uname -m), expected macOS on Apple Silicon; bash run_local.sh trains here, with torch"
fi
python=$(find_python) || exit 2
kind=$("$python" -c 'import platform; print(platform.machine())')
[ "$kind" = arm64 ] || fail "found $python for $kind, which runs translated and cannot see the GPU, expected a native \
Python (arm64); install one, or name it with PYTHON=/opt/homebrew/bin/python3"
gigabytes=$(($(sysctl -n hw.memsize) / 1073741824))
ensure_env requirements-mac.txt
use_builtin_data
if [ -z "${ENV_FILE:-}" ]; then
    if [ "$gigabytes" -ge 8 ]; then set_default PRESET hybrid_mac; else set_default PRESET local; fi
fi
note "$gigabytes GB of memory, shared with the GPU: PRESET=${PRESET:-} (micro-batches are cut to half of it)"
export RUN_ID="${RUN_ID:-mac_$(date +%Y%m%d_%H%M%S)}"
code=0
"$PY" train_gpt_mlx.py || code=$?
if [ "$code" = 0 ] || [ "$code" = 3 ]; then # 3: the run is complete, but over its byte budget
    "$PY" records/summary.py "${OUT_DIR:-runs}/$RUN_ID"
fi
exit "$code"
