#!/usr/bin/env bash
# Validates a machine with an NVIDIA GPU in about five minutes: the GPU tests, then one minute of real training.
#
#     bash tests/gpu.sh [VAR=VALUE ...]         variables as in run_local.sh; PRESET=ternary by default
set -eu
CDPATH='' cd -P -- "$(dirname -- "$0")/.."
. tools/setup.sh

export_settings "$@"
ensure_env requirements.txt requirements-dev.txt
"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "found no CUDA device that torch can use,\
 expected one; nvidia-smi shows the driver's view, bash tests/run.sh tests what needs no GPU"
"$PY" -m pytest tests/gpu -q
use_builtin_data
set_default PRESET ternary
set_default MAX_WALLCLOCK_SECONDS 60
exec "$PY" train_gpt.py
