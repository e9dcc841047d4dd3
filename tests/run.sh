#!/usr/bin/env bash
# Lints, type-checks and tests the repository, one test process with one thread for each core.
#
#     bash tests/run.sh [--full] [pytest arguments]
#
# --full adds the tests marked slow. Every step runs; the exit code is pytest's, or 1 if only a check before it failed.
set -eu
CDPATH='' cd -P -- "$(dirname -- "$0")/.."
. tools/setup.sh

full=()
arguments=()
for argument in "$@"; do
    case $argument in
        --full) full=(-m "slow or not slow") ;;
        --help) export_settings --help ;;
        *) arguments=(${arguments[@]+"${arguments[@]}"} "$argument") ;;
    esac
done

ensure_env requirements.txt requirements-dev.txt
# More threads than cores make small steps ten times slower.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1
failed=""
"$PY" -m ruff check . || failed="$failed, ruff check"
"$PY" -m ruff format --check . || failed="$failed, ruff format"
"$PY" -m mypy ./*.py || failed="$failed, mypy"
code=0
"$PY" -m pytest -n auto --dist worksteal ${full[@]+"${full[@]}"} ${arguments[@]+"${arguments[@]}"} || code=$?
if [ -n "$failed" ] && [ "$code" = 0 ]; then
    fail "the tests passed, but not: ${failed#, } (output above)" 1
fi
exit "$code"
