# shellcheck shell=bash
# Shared by run_local.sh, run_8xh100.sh, tests/run.sh and tests/gpu.sh. Bash 3.2 (macOS) must run it.
# Gives: fail, note, export_settings, set_default, ensure_env, use_builtin_data.
# Needs: to be sourced in the repository root, entered with `cd -P` (the set-up compares physical paths).

fail() { # fail MESSAGE [CODE]: what was found, what was expected, what to do; 2 is for what the user can mend
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

note() { printf '%s\n' "$1" >&2; }

# export_settings VAR=VALUE...: makes arguments part of the environment; --help prints the calling script's header.
export_settings() {
    local setting name
    for setting in "$@"; do
        name=${setting%%=*}
        case $setting in
            -h | --help)
                awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
                exit 0
                ;;
            [A-Za-z_]*=*) ;;
            *) fail "found the argument '$setting', expected VAR=VALUE; for example MAX_WALLCLOCK_SECONDS=60" ;;
        esac
        case $name in
            *[!A-Za-z0-9_]*) fail "found the variable name '$name', expected letters, digits and _ only" ;;
        esac
        # shellcheck disable=SC2163
        export "$setting"
    done
}

# set_default NAME VALUE: a value given in the environment, as an argument or in ENV_FILE stays.
set_default() {
    if [ -n "${!1:-}" ] || { [ -n "${ENV_FILE:-}" ] && grep -qs "^$1=" "$ENV_FILE"; }; then
        return
    fi
    export "$1=$2"
}

# find_python: the first interpreter that is new enough.
find_python() {
    local names name version found=""
    names=(python3 python3.13 python3.12 python3.11 python3.10)
    if [ -n "${PYTHON:-}" ]; then
        names=("$PYTHON")
    fi
    for name in "${names[@]}"; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            command -v "$name"
            return
        fi
        found="$found $name = $version"
    done
    fail "found ${found:-no working ${names[0]}}, expected Python >= 3.10; install one, or name it with PYTHON=/path/to/it"
}

# usable_torch INTERPRETER: version and place of its torch, if that imports and is at least 2.9, the oldest supported.
usable_torch() {
    "$1" -c '
import torch
version = torch.__version__
assert tuple(int(part) for part in version.split(".")[:2]) >= (2, 9)
print(version, torch.__file__)' 2>/dev/null
}

# uses_machine_torch: whether the torch that .venv sees lies outside of it.
uses_machine_torch() {
    case $(usable_torch .venv/bin/python) in
        "" | *" $PWD/.venv/"*) return 1 ;;
    esac
}

# venv_stands: not interrupted half-way, not moved here from another folder, interpreter and pip in working order.
venv_stands() {
    [ ! -e .venv.unfinished ] && [ "$(cat .venv/.root 2>/dev/null || pwd -P)" = "$PWD" ] &&
        .venv/bin/python -m pip --version >/dev/null 2>&1
}

# make_venv: a fresh .venv, which sees the machine's own packages only if a usable torch is among them.
make_venv() {
    local python torch
    if [ -e .venv ] && [ ! -e .venv/pyvenv.cfg ] && [ ! -e .venv.unfinished ] && [ -n "$(ls -A .venv)" ]; then
        fail "found $PWD/.venv, which is no virtual environment; rename or remove it, then run this again"
    fi
    if [ -L .venv ]; then  # --clear would empty the folder that it leads to
        fail "found $PWD/.venv, a link to what is no environment of this folder; remove the link, then run this again"
    fi
    python=$(find_python) || exit 2
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python cannot make virtual environments (no venv or\
 ensurepip module); on Debian or Ubuntu: sudo apt install python3-venv, then run this again"
    torch=$(usable_torch "$python") || torch=""
    # The mark lies beside .venv because --clear empties it; it stays until the first install is complete.
    : >.venv.unfinished
    note "making .venv with $python"
    "$python" -m venv --clear ${torch:+--system-site-packages} .venv || fail "$python -m venv .venv failed, see above" 1
    if [ -n "$torch" ]; then
        keep_machine_torch "$python" "$torch"
    fi
    printf '%s\n' "$PWD" >.venv/.root
}

# keep_machine_torch INTERPRETER TORCH: .venv imports that torch, and starts it with its own torchrun.
keep_machine_torch() {
    local site
    note "keeping this machine's torch: $2"
    if [ "$(usable_torch .venv/bin/python)" != "$2" ]; then
        # An interpreter that is itself a virtual environment's: a new one made with it does not see its packages.
        site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        "$1" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' >"$site/machine_torch.pth"
    fi
    # The machine's torchrun would start the machine's interpreter, which lacks the packages of .venv.
    # shellcheck disable=SC2016
    printf '#!/bin/sh\nexec "${0%%/*}/python" -m torch.distributed.run "$@"\n' >.venv/bin/torchrun
    chmod +x .venv/bin/torchrun
}

pip_install() {
    local options
    options=(--disable-pip-version-check --no-input)
    if [ ! -t 1 ]; then
        options=("${options[@]}" --quiet)
    fi
    .venv/bin/python -m pip install "${options[@]}" "$@" || fail "pip could not install what is named above; mend that\
 (network, index, disk space) and run this again, it goes on where it stopped" 1
}

# install_pinned_torch: the exact torch of requirements.txt, from TORCH_INDEX_URL if that is set.
install_pinned_torch() {
    local pin
    pin=$(grep '^torch==' requirements.txt)
    case "$(usable_torch .venv/bin/python)" in
        "${pin#torch==}"[+\ ]*) return ;;
    esac
    note "installing $pin: about 3 GB to download with CUDA (Linux, pip's default index), 0.2 GB without; for a machine\
 without an NVIDIA GPU set TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$pin"
}

# install FILE: the pins of one requirements file; a torch of the machine stays untouched.
install() {
    if ! venv_stands; then
        make_venv
    fi
    if [ "$1" != requirements.txt ]; then
        pip_install -r "$1"
    elif uses_machine_torch; then
        grep -v '^torch==' "$1" >.venv/pins.txt
        pip_install -r .venv/pins.txt
    else
        install_pinned_torch
        pip_install -r "$1"
        usable_torch .venv/bin/python >/dev/null || fail "torch is installed but does not import;\
 .venv/bin/python -c 'import torch' says why" 1
    fi
    rm -f .venv.unfinished
    stamp "$1" >".venv/.stamp-$1"
}

# stamp FILE: what must be unchanged for a finished install to stand: pins, place, interpreter, where torch comes from.
stamp() {
    cksum <"$1"
    .venv/bin/python -c '
import importlib.util, sys
torch = importlib.util.find_spec("torch")
print(sys.prefix, sys.version, torch and torch.origin)' 2>/dev/null
}

# ensure_env FILE...: PY is an interpreter that has the pins of these files. Quick when nothing changed.
ensure_env() {
    local file path own=":$PWD/.venv/bin:"
    # An activated .venv must not be asked to rebuild itself.
    path=":$PATH:"
    path=${path//$own/:}
    path=${path#:}
    PATH=${path%:}
    if [ "${SKIP_SETUP:-0}" = 1 ]; then
        PY=$(find_python) || exit 2
        return
    fi
    for file in "$@"; do
        if [ -e .venv.unfinished ] || [ "$(stamp "$file")" != "$(cat ".venv/.stamp-$file" 2>/dev/null)" ]; then
            install "$file"
        fi
    done
    PATH=$PWD/.venv/bin:$PATH
    PY=$PWD/.venv/bin/python
}

# use_builtin_data: the corpus that needs no download, in VOCAB_SIZE tokens (256 means bytes), unless the data is named.
use_builtin_data() {
    local vocabulary=${VOCAB_SIZE:-1024}
    if [ -n "${DATA_PATH:-}" ] || { [ -n "${ENV_FILE:-}" ] && grep -qs '^DATA_PATH=' "$ENV_FILE"; }; then
        return
    fi
    "$PY" data/builtin.py --vocab-size "$vocabulary"
    export VOCAB_SIZE="$vocabulary"
    if [ "$vocabulary" = 256 ]; then
        export DATA_PATH=./data/datasets/builtin_byte256
    else
        export DATA_PATH="./data/datasets/builtin_sp$vocabulary"
        set_default TOKENIZER_PATH "./data/tokenizers/builtin_${vocabulary}_bpe.model"
    fi
}
