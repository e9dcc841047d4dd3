#!/usr/bin/env bash
# Trains, packages and scores a model on this machine: CPU, one GPU, or a Mac's GPU. About five minutes by default.
#
#     bash run_local.sh [VAR=VALUE ...]         for example: bash run_local.sh MAX_WALLCLOCK_SECONDS=60 SEED=7
#
# Makes .venv on the first run, builds the corpus that comes with the repository, trains with PRESET=local, and closes
# with a comparison. `python train_gpt.py --help` lists the variables; paths are relative to the repository. Besides:
#   DATA_PATH, TOKENIZER_PATH, VOCAB_SIZE   other data than the built-in corpus; VOCAB_SIZE alone (256: bytes) cuts that
#                      corpus into another number of tokens
#   TORCH_INDEX_URL    where pip takes torch from when .venv is made; PyTorch's CPU build saves 3 GB of download:
#                      https://download.pytorch.org/whl/cpu
#   PRESET=skc, …      presets for eight GPUs keep their 524,288 tokens a step: on less, lower TRAIN_BATCH_TOKENS
#   PYTHON             the interpreter to make .venv with (default: python3); its torch is kept if it is >= 2.9
#   MAX_RESTARTS=3     restarts of a run that dies or hangs, from its latest checkpoint (tools/supervise.sh)
#   SKIP_SETUP=1       make no .venv: use that interpreter and its packages as they are
set -eu
CDPATH='' cd -P -- "$(dirname -- "$0")"
. tools/setup.sh
. tools/supervise.sh

export_settings "$@"
check_supervision
ensure_env requirements.txt
use_builtin_data
[ -n "${ENV_FILE:-}" ] || set_default PRESET local
export RUN_ID="${RUN_ID:-local_$(date +%Y%m%d_%H%M%S)}"
code=0
supervise "${OUT_DIR:-runs}/$RUN_ID" "$PY" train_gpt.py || code=$?
if [ "$code" = 0 ] || [ "$code" = 3 ]; then # 3: the run is complete, but over its byte budget
    "$PY" records/summary.py "${OUT_DIR:-runs}/$RUN_ID"
fi
exit "$code"
