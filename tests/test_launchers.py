"""run_local.sh, run_mac.sh, run_8xh100.sh, tests/run.sh, tests/gpu.sh and .ci/run, in a copy of the repository.

Most tests replace python3, pip, torchrun and nvidia-smi by stubs on a PATH that holds nothing else but a few system
tools, so that they are quick and need no network. Two tests at the end make a real environment from tiny wheels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "run_local.sh",
    "run_mac.sh",
    "run_8xh100.sh",
    "tests/run.sh",
    "tests/gpu.sh",
    ".ci/run",
    "tools/setup.sh",
    "tools/supervise.sh",
)
TOOLS = "bash sh env awk cat chmod cksum cp date df dirname grep ls mkdir rm sed sleep tr uname"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt", "requirements-mac.txt")
TORCH_PIN = re.findall("^torch==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]

# A program of the repository that records how it was called; its exit code comes from <NAME>_EXIT.
PROGRAM = """
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["STUB_LOG"], "a") as log:
    log.write("program " + json.dumps([name, sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(int(os.environ.get(name.split(".")[0].upper() + "_EXIT", 0)))
"""

# python3 of the machine: `-m venv` makes a stub environment, all else runs for real, with the stub machine's packages.
MACHINE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv")
    echo "$*" >>"$STUB_LOG"
    for folder; do :; done
    rm -rf "$folder"
    mkdir -p "$folder/bin" "$folder/lib"
    echo stub >"$folder/pyvenv.cfg"
    case $* in *--system-site-packages*) echo "$STUBS/machine" >"$folder/outer" ;; esac
    cp "$STUBS/venv_python" "$folder/bin/python"
    exit ;;
esac
case $2 in
*ensurepip*) exit "${ENSUREPIP_EXIT:-0}" ;;
*version_info*) if [ -n "${OLD_PYTHON:-}" ]; then [ "$2" != "${2#*print}" ] && echo 3.9; exit $?; fi ;;
esac
PYTHONPATH=$STUBS/machine exec REAL -S "$@"
"""

# python of the stub environment: pip "installs" torch as a package of one line; tools and torchrun only record.
VENV_PYTHON = """#!/bin/sh
here=${0%/bin/*}
case "$1 $2" in
"-m pip")
    [ "$3" = install ] || exit 0
    echo "pip $*" >>"$STUB_LOG"
    [ -z "${KILL_IN_PIP:-}" ] || kill -9 "$PPID"
    [ "${PIP_EXIT:-0}" = 0 ] || exit "$PIP_EXIT"
    case $* in *torch==*)
        mkdir -p "$here/lib/torch"
        echo '__version__ = "2.13.0+cpu"' >"$here/lib/torch/__init__.py" ;;
    esac
    exit ;;
"-m ruff" | "-m mypy" | "-m pytest" | "-m torch.distributed.run")
    echo "$* OMP_NUM_THREADS=${OMP_NUM_THREADS:-}" >>"$STUB_LOG"
    [ "$2" != "${FAILING:-}" ] || exit 3
    exit ;;
esac
PYTHONPATH=$here/lib:$(cat "$here/outer" 2>/dev/null) exec REAL -S "$@"
"""

NVIDIA_SMI = """#!/bin/sh
[ "${GPUS:-8}" != none ] || { echo "NVIDIA-SMI has failed"; exit 9; }
i=0
while [ "$i" -lt "${GPUS:-8}" ]; do echo "$i"; i=$((i + 1)); done
"""

TORCHRUN = """#!/bin/sh
echo "torchrun $*" >>"$STUB_LOG"
"""


def write_program(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Machine:
    """A copy of the repository on a machine of stubs."""

    home: Path

    @property
    def repo(self) -> Path:
        return self.home / "repo"

    @property
    def venv(self) -> Path:
        return self.repo / ".venv"

    def install_torch(self, version: str, cuda: bool = False) -> None:
        """Give the machine's python3 a torch."""
        folder = self.home / "machine" / "torch"
        folder.mkdir(parents=True)
        lines = (f"__version__ = {version!r}", "class version: cuda = '12.8'", "class cuda:")
        (folder / "__init__.py").write_text("\n".join(lines) + f"\n    is_available = staticmethod(lambda: {cuda})\n")

    def add_data(self) -> None:
        """Shards and tokenizer where run_8xh100.sh looks for them."""
        shards, tokenizers = self.repo / "data/datasets/fineweb10B_sp8192", self.repo / "data/tokenizers"
        for folder in (shards, tokenizers):
            folder.mkdir(parents=True)
        for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
            (shards / name).touch()
        (tokenizers / "fineweb_8192_bpe.model").touch()

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the repository with nothing but the stubs and these variables."""
        tools = {"PATH": str(self.home / "bin"), "HOME": str(self.home), "STUBS": str(self.home)}
        environ = {**tools, "STUB_LOG": str(self.home / "log"), "MIN_FREE_GB": "0", **variables}
        (self.home / "log").write_text("")
        command = ["bash", str(self.repo / script), *arguments]
        return subprocess.run(
            command, cwd=self.home, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )

    def log(self, start: str = "") -> list[str]:
        """What the stubs recorded in the last run, in order: the lines with this beginning."""
        return [line for line in (self.home / "log").read_text().splitlines() if line.startswith(start)]

    def calls(self) -> dict[str, tuple[list[str], dict[str, str]]]:
        """Arguments and environment of each program of the repository that the last run called, in order."""
        records = [json.loads(line.partition(" ")[2]) for line in self.log("program")]
        return {name: (arguments, environ) for name, arguments, environ in records}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with python3 (no torch), 8 GPUs, and a clean clone."""
    made = Machine(tmp_path.resolve())
    for name in (*SCRIPTS, *REQUIREMENTS):
        (made.repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, made.repo / name)
    for name in ("train_gpt.py", "train_gpt_mlx.py", "data/builtin.py", "records/summary.py"):
        write_program(made.repo / name, PROGRAM)
    for name in TOOLS.split():
        place = shutil.which(name)
        assert place, f"this test needs {name}"
        (made.home / "bin").mkdir(exist_ok=True)
        (made.home / "bin" / name).symlink_to(place)
    stubs = {"bin/python3": MACHINE_PYTHON, "venv_python": VENV_PYTHON, "bin/nvidia-smi": NVIDIA_SMI}
    for name, text in {**stubs, "bin/torchrun": TORCHRUN}.items():
        write_program(made.home / name, text.replace("REAL", sys.executable))
    return made


# ---- the environment ----


def test_first_run_makes_everything_and_trains_on_the_builtin_corpus(machine: Machine) -> None:
    done = machine.run("run_local.sh")
    assert done.returncode == 0, done.stderr
    assert machine.log("-m venv") == ["-m venv --clear .venv"]
    torch, rest = machine.log("pip")
    assert torch.endswith(f" {TORCH_PIN}") and rest.endswith(" -r requirements.txt")
    assert "3 GB" in done.stderr and "TORCH_INDEX_URL=" in done.stderr
    calls = machine.calls()
    assert list(calls) == ["builtin.py", "train_gpt.py", "summary.py"]
    environ = calls["train_gpt.py"][1]
    assert environ["PRESET"] == "local" and environ["VOCAB_SIZE"] == "1024"
    assert environ["DATA_PATH"] == "./data/datasets/builtin_sp1024"
    assert environ["TOKENIZER_PATH"] == "./data/tokenizers/builtin_1024_bpe.model"
    assert calls["summary.py"][0] == [f"runs/{environ['RUN_ID']}"]


def test_second_run_installs_nothing_and_is_quick(machine: Machine) -> None:
    machine.run("run_local.sh")
    before = os.times()
    assert machine.run("run_local.sh").returncode == 0
    after = os.times()
    assert not machine.log("-m venv") and not machine.log("pip")
    # Processor time, because a busy machine stretches every clock.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_torch_index_url_is_for_torch_alone(machine: Machine) -> None:
    machine.run("run_local.sh", "TORCH_INDEX_URL=https://example.org/cpu")
    torch, rest = machine.log("pip")
    assert f"--index-url https://example.org/cpu {TORCH_PIN}" in torch
    assert "example.org" not in rest


def test_machine_torch_is_kept(machine: Machine) -> None:
    machine.install_torch("2.9.1+cu128")
    done = machine.run("run_local.sh")
    assert "keeping this machine's torch: 2.9.1+cu128" in done.stderr and "3 GB" not in done.stderr
    assert machine.log("-m venv") == ["-m venv --clear --system-site-packages .venv"]
    (rest,) = machine.log("pip")
    assert "torch" not in rest
    pins = (machine.repo / rest.split(" -r ")[1]).read_text()
    assert "numpy==" in pins and "sentencepiece==" in pins and "torch==" not in pins


@pytest.mark.parametrize("version", ["2.8.0", "1.13.1"])
def test_old_machine_torch_is_not_used(machine: Machine, version: str) -> None:
    machine.install_torch(version)
    machine.run("run_local.sh")
    assert machine.log("-m venv") == ["-m venv --clear .venv"]
    assert TORCH_PIN in machine.log("pip")[0]


def test_vanished_machine_torch_is_replaced(machine: Machine) -> None:
    machine.install_torch("2.11.0")
    machine.run("run_local.sh")
    shutil.rmtree(machine.home / "machine")
    assert machine.run("run_local.sh").returncode == 0
    assert TORCH_PIN in machine.log("pip")[0]


def test_interrupted_setup_starts_over(machine: Machine) -> None:
    assert machine.run("run_local.sh", KILL_IN_PIP="1").returncode < 0
    (machine.venv / "left_over").touch()
    assert machine.run("run_local.sh").returncode == 0
    assert machine.log("-m venv") == ["-m venv --clear .venv"]
    assert not (machine.venv / "left_over").exists()
    assert machine.run("run_local.sh").returncode == 0
    assert not machine.log("-m venv") and not machine.log("pip")


def test_half_made_venv_without_interpreter_is_remade(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "pyvenv.cfg").touch()
    assert machine.run("run_local.sh").returncode == 0
    assert machine.log("-m venv")


def test_moved_repository_gets_a_new_venv(machine: Machine) -> None:
    machine.run("run_local.sh")
    shutil.move(machine.repo, machine.home / "elsewhere")
    (machine.home / "repo").symlink_to(machine.home / "elsewhere")
    assert machine.run("run_local.sh").returncode == 0
    assert machine.log("-m venv")


def test_activated_broken_venv_can_be_remade(machine: Machine) -> None:
    machine.run("run_local.sh")
    write_program(machine.venv / "bin" / "python3", "#!/bin/sh\nexit 7\n")
    (machine.repo / ".venv.unfinished").touch()
    done = machine.run("run_local.sh", PATH=f"{machine.venv}/bin:{machine.home}/bin")
    assert done.returncode == 0, done.stderr
    assert machine.log("-m venv")


def test_own_venv_of_the_user_is_completed_and_kept(machine: Machine) -> None:
    machine.run("run_local.sh")
    for stamp in (".root", ".stamp-requirements.txt"):
        (machine.venv / stamp).unlink()
    (machine.venv / "precious").touch()
    assert machine.run("run_local.sh").returncode == 0
    assert (machine.venv / "precious").exists() and machine.log("pip") and not machine.log("-m venv")


def test_folder_that_is_no_venv_is_left_alone(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "notes.txt").write_text("mine")
    done = machine.run("run_local.sh")
    assert done.returncode == 2 and "is no virtual environment; rename or remove it" in done.stderr
    assert (machine.venv / "notes.txt").read_text() == "mine"


def test_link_to_the_environment_of_another_folder_empties_nothing(machine: Machine) -> None:
    machine.run("run_local.sh")
    other = machine.home / "other_venv"
    shutil.move(machine.venv, other)
    (other / ".root").write_text("/another/folder\n")
    (other / ".stamp-requirements.txt").unlink()
    machine.venv.symlink_to(other)
    done = machine.run("run_local.sh")
    assert done.returncode == 2 and "/.venv, a link to" in done.stderr and not machine.log("-m venv")
    assert (other / "pyvenv.cfg").exists()


def test_changed_pins_are_installed_without_a_new_venv(machine: Machine) -> None:
    machine.run("run_local.sh")
    with (machine.repo / "requirements.txt").open("a") as file:
        file.write("tqdm==4.67.1\n")
    machine.run("run_local.sh")
    assert len(machine.log("pip")) == 1 and not machine.log("-m venv")


def test_pip_failure_is_one_line_and_the_next_run_goes_on(machine: Machine) -> None:
    done = machine.run("run_local.sh", PIP_EXIT="1")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and not machine.calls()
    assert machine.run("run_local.sh").returncode == 0


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"OLD_PYTHON": "1"}, "found  python3 = 3.9, expected Python >= 3.10"),
        ({"PYTHON": "/nowhere/python3.12"}, "found no working /nowhere/python3.12, expected Python >= 3.10"),
        ({"ENSUREPIP_EXIT": "1"}, "sudo apt install python3-venv"),
    ],
)
def test_unusable_python_is_one_clear_line(machine: Machine, variables: dict[str, str], expected: str) -> None:
    done = machine.run("run_local.sh", **variables)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert not machine.venv.exists()


def test_skip_setup_uses_the_machine_as_it_is(machine: Machine) -> None:
    done = machine.run("run_local.sh", "SKIP_SETUP=1")
    assert done.returncode == 0 and "train_gpt.py" in machine.calls()
    assert not machine.venv.exists() and not machine.log("-m venv")


# ---- run_local.sh ----


def test_arguments_and_environment_reach_training(machine: Machine) -> None:
    machine.run("run_local.sh", "SEED=7", "PRESET=tiny", "RUN_ID=a b", "OUT_DIR=out", NUM_LAYERS="3", SEED="1")
    calls = machine.calls()
    environ = calls["train_gpt.py"][1]
    assert (environ["SEED"], environ["PRESET"], environ["NUM_LAYERS"]) == ("7", "tiny", "3")
    assert calls["summary.py"][0] == ["out/a b"]


@pytest.mark.parametrize("as_argument", [False, True])
def test_own_data_is_used_as_named(machine: Machine, as_argument: bool) -> None:
    if as_argument:
        machine.run("run_local.sh", "DATA_PATH=elsewhere")
    else:
        machine.run("run_local.sh", DATA_PATH="elsewhere")
    calls = machine.calls()
    assert list(calls) == ["train_gpt.py", "summary.py"]
    assert calls["train_gpt.py"][1]["DATA_PATH"] == "elsewhere" and "VOCAB_SIZE" not in calls["train_gpt.py"][1]


@pytest.mark.parametrize("vocabulary, folder", [("256", "builtin_byte256"), ("2048", "builtin_sp2048")])
def test_builtin_corpus_in_another_vocabulary(machine: Machine, vocabulary: str, folder: str) -> None:
    machine.run("run_local.sh", f"VOCAB_SIZE={vocabulary}")
    calls = machine.calls()
    assert calls["builtin.py"][0] == ["--vocab-size", vocabulary]
    environ = calls["train_gpt.py"][1]
    assert environ["DATA_PATH"] == f"./data/datasets/{folder}"
    assert environ.get("TOKENIZER_PATH") == (
        None if vocabulary == "256" else "./data/tokenizers/builtin_2048_bpe.model"
    )


def test_values_of_an_env_file_are_not_overridden_by_defaults(machine: Machine) -> None:
    (machine.repo / "old.env").write_text("DATA_PATH=there\nPRESET=nsa\n")
    machine.run("run_local.sh", "ENV_FILE=old.env")
    calls = machine.calls()
    assert "builtin.py" not in calls
    assert not {"PRESET", "DATA_PATH"} & set(calls["train_gpt.py"][1])


@pytest.mark.parametrize(
    "program, called",
    [
        ("BUILTIN", ["builtin.py"]),
        ("TRAIN_GPT", ["builtin.py", "train_gpt.py"]),
        ("SUMMARY", ["builtin.py", "train_gpt.py", "summary.py"]),
    ],
)
def test_exit_codes_are_passed_on(machine: Machine, program: str, called: list[str]) -> None:
    assert machine.run("run_local.sh", **{f"{program}_EXIT": "6"}).returncode == 6
    assert list(machine.calls()) == called


@pytest.mark.parametrize("script", ["run_local.sh", "run_mac.sh", "run_8xh100.sh", "tests/gpu.sh"])
@pytest.mark.parametrize("argument", ["SEED", "--fast", "A-B=1", "=1"])
def test_other_arguments_are_refused(machine: Machine, script: str, argument: str) -> None:
    done = machine.run(script, argument)
    assert done.returncode == 2 and "expected" in done.stderr and done.stderr.count("\n") == 1
    assert not machine.log()


@pytest.mark.parametrize("script", ["run_local.sh", "run_mac.sh", "run_8xh100.sh", "tests/run.sh", "tests/gpu.sh"])
def test_help_shows_the_header(machine: Machine, script: str) -> None:
    done = machine.run(script, "--help")
    assert done.returncode == 0 and f"bash {script} [" in done.stdout
    assert "set -eu" not in done.stdout and not machine.log()


# ---- run_mac.sh ----

# What tells a Mac from another machine, and its Python's kind; an empty APPLE is Linux or an Intel Mac.
SYSCTL = """#!/bin/sh
case "$2" in
hw.optional.arm64) echo "${APPLE-1}" ;;
hw.memsize) echo $((${GIGABYTES:-16} * 1073741824)) ;;
esac
"""


@pytest.fixture
def mac(machine: Machine) -> Machine:
    """A machine with Apple Silicon, as far as sysctl and python3 tell."""
    write_program(machine.home / "bin/sysctl", SYSCTL)
    python = MACHINE_PYTHON.replace(
        "case $2 in\n*ensurepip*", 'case $2 in\n*platform*) echo "${KIND:-arm64}"; exit ;;\n*ensurepip*'
    )
    write_program(machine.home / "bin/python3", python.replace("REAL", sys.executable))
    return machine


def test_a_mac_trains_the_twin_without_torch(mac: Machine) -> None:
    done = mac.run("run_mac.sh")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in mac.log("pip")] == ["requirements-mac.txt"]
    calls = mac.calls()
    assert list(calls) == ["builtin.py", "train_gpt_mlx.py", "summary.py"]
    assert calls["train_gpt_mlx.py"][1]["PRESET"] == "hybrid_mac" and "16 GB" in done.stderr
    assert calls["summary.py"][0] == [f"runs/{calls['train_gpt_mlx.py'][1]['RUN_ID']}"]


def test_a_preset_for_the_mac_may_be_named(mac: Machine) -> None:
    for gigabytes, arguments, preset in (("8", [], "hybrid_mac"), ("6", [], "local"), ("6", ["PRESET=nsa"], "nsa")):
        assert mac.run("run_mac.sh", *arguments, GIGABYTES=gigabytes).returncode == 0
        assert mac.calls()["train_gpt_mlx.py"][1]["PRESET"] == preset


@pytest.mark.parametrize(
    ("variables", "expected"), [({"APPLE": ""}, "bash run_local.sh"), ({"KIND": "x86_64"}, "expected a native Python")]
)
def test_another_machine_or_a_translated_python_is_one_clear_line(
    mac: Machine, variables: dict[str, str], expected: str
) -> None:
    done = mac.run("run_mac.sh", **variables)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert not mac.log()


# ---- run_8xh100.sh ----

DEFAULTS = (
    "PRESET=ternary MAX_WALLCLOCK_SECONDS=600 MAX_EVAL_SECONDS=600 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 "
    "VOCAB_SIZE=8192 "
    "DATA_PATH=./data/datasets/fineweb10B_sp8192 TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe.model "
    "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:256,expandable_segments:True NCCL_P2P_DISABLE=0 "
)
NODES = {"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": "node0:29500", "RUN_ID": "r1"}


def dry_run(machine: Machine, *arguments: str, **variables: str) -> str:
    """The one line that a dry run prints."""
    done = machine.run("run_8xh100.sh", *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and not machine.log()
    return done.stdout.strip()


def test_dry_run_on_one_node(machine: Machine) -> None:
    expected = DEFAULTS + "RUN_ID=r1 torchrun --standalone --nproc_per_node=8 train_gpt.py"
    assert dry_run(machine, "RUN_ID=r1") == expected
    assert dry_run(machine, "NPROC=1").endswith("torchrun --standalone --nproc_per_node=1 train_gpt.py")


@pytest.mark.parametrize("rank, host", [("0", "1"), ("1", "0")])
def test_dry_run_on_two_nodes(machine: Machine, rank: str, host: str) -> None:
    launch = (
        "RUN_ID=r1 torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node0:29500 --rdzv-id=r1 "
        f"--rdzv-conf=is_host={host} --nproc_per_node=8 train_gpt.py"
    )
    assert dry_run(machine, **{**NODES, "NODE_RANK": rank}) == DEFAULTS + launch


def test_settings_can_be_overridden_and_the_line_can_be_pasted(machine: Machine) -> None:
    line = dry_run(machine, "TRAIN_SEQ_LEN=2048", "SEED=5", "NOTE=a b", MAX_WALLCLOCK_SECONDS="9", NCCL_P2P_DISABLE="1")
    for part in ("TRAIN_SEQ_LEN=2048 ", "SEED=5 ", "MAX_WALLCLOCK_SECONDS=9 ", "NCCL_P2P_DISABLE=1 ", r"NOTE=a\ b "):
        assert line.count(part) == 1, line


def test_named_preset_brings_its_own_batch_and_length(machine: Machine) -> None:
    line = dry_run(machine, "PRESET=frontier")
    assert "PRESET=frontier" in line and "TRAIN_SEQ_LEN" not in line and "TRAIN_BATCH_TOKENS" not in line
    values = t.PRESETS["frontier"]
    assert f"DATA_PATH={values['data_path']} TOKENIZER_PATH={values['tokenizer_path']} " in line


def test_vocabulary_chooses_data_and_tokenizer(machine: Machine) -> None:
    line = dry_run(machine, "VOCAB_SIZE=1024")
    assert "DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model" in line
    line = dry_run(machine, VOCAB_SIZE="256")
    assert "DATA_PATH=./data/datasets/fineweb10B_byte256 " in line and "TOKENIZER_PATH" not in line


def test_allocator_setting_under_its_newer_name_is_respected(machine: Machine) -> None:
    assert "PYTORCH_CUDA_ALLOC_CONF" not in dry_run(machine, PYTORCH_ALLOC_CONF="expandable_segments:False")


def test_dry_run_names_what_is_missing(machine: Machine) -> None:
    done = machine.run("run_8xh100.sh", DRY_RUN="1", GPUS="0")
    assert done.stderr.count("missing: found ") == 3  # GPUs, shards, tokenizer


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"GPUS": "4"}, "found 4 GPUs (nvidia-smi, CUDA_VISIBLE_DEVICES), expected NPROC=8"),
        ({"GPUS": "none"}, "found 0 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "found 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "found 0 GPUs"),
        ({"DATA_PATH": "no/such"}, "DATA_PATH=no/such; run: python data/download.py --variant sp8192 --train-shards 8"),
        ({"TOKENIZER_PATH": "no.model"}, "TOKENIZER_PATH=no.model; run: python data/download.py --variant sp8192"),
        ({"MIN_FREE_GB": "99999999"}, "GB free for ., expected MIN_FREE_GB=99999999"),
        ({**NODES, "RDZV_ENDPOINT": ""}, "NNODES=2 needs RDZV_ENDPOINT"),
        ({**NODES, "RUN_ID": ""}, "NNODES=2 needs RUN_ID"),
        ({**NODES, "NODE_RANK": ""}, "found NODE_RANK=, expected 0 to 1"),
        ({**NODES, "NODE_RANK": "2"}, "found NODE_RANK=2, expected 0 to 1"),
        ({"NPROC": "all"}, "found NPROC=all, expected a whole number of at least 1"),
        ({"NNODES": "0"}, "found NNODES=0, expected a whole number of at least 1"),
    ],
)
def test_what_is_missing_fails_early_in_one_line(machine: Machine, variables: dict[str, str], expected: str) -> None:
    machine.add_data()
    done = machine.run("run_8xh100.sh", **variables)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert not machine.log() and not machine.venv.exists()


def test_launch_runs_torchrun_with_the_settings(machine: Machine) -> None:
    machine.add_data()
    done = machine.run("run_8xh100.sh", "RUN_ID=r1")
    assert done.returncode == 0, done.stderr
    assert machine.log("torchrun") == ["torchrun --standalone --nproc_per_node=8 train_gpt.py"]
    assert done.stdout.startswith(DEFAULTS + "RUN_ID=r1 torchrun ")


def test_machine_torch_is_launched_by_the_interpreter_of_the_venv(machine: Machine) -> None:
    """The machine's own torchrun would not see the packages in .venv."""
    machine.add_data()
    machine.install_torch("2.11.0+cu128")
    machine.run("run_8xh100.sh", "NPROC=2")
    assert not machine.log("torchrun")
    (launch,) = machine.log("-m torch.distributed.run")
    assert launch.startswith("-m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py")


def test_flash_attention_is_a_hint_for_this_cuda(machine: Machine) -> None:
    machine.add_data()
    machine.install_torch("2.11.0+cu128")
    done = machine.run("run_8xh100.sh")
    hint = "-m pip install flash-attn-3 --no-deps --index-url https://download.pytorch.org/whl/cu128"
    assert done.returncode == 0 and hint in done.stderr
    (machine.home / "machine" / "flash_attn_interface.py").touch()
    assert "flash-attn-3" not in machine.run("run_8xh100.sh").stderr


# ---- tools/supervise.sh ----

SUPERVISE = """
. tools/setup.sh
. tools/supervise.sh
check_supervision
supervise runs/r sh ./training
"""
# Each start takes the next of ENDS: step:code, step:code:what it leaves in EXIT_CODE_FILE, or step:wait for a signal.
TRAINING = """
echo "start RESUME=${RESUME:-}" >>"$STUB_LOG"
mkdir -p runs/r/checkpoints
set -- $ENDS
shift "$(($(grep -c '^start' "$STUB_LOG") - 1))"
step=${1%%:*} code=${1#*:}
echo "{\\"step\\": $step, \\"pid\\": 1}" >runs/r/heartbeat_rank0.json
echo "log of start at $step" >>runs/r/train.log
[ -z "${SAVES:-}" ] || echo "step_0000100.pt" >runs/r/checkpoints/latest
case $code in
wait) trap 'echo saved >>runs/r/train.log; exit 143' TERM; while :; do sleep 0.05; done ;;
*:*) echo "${code#*:}" >"$EXIT_CODE_FILE"; exit "${code%:*}" ;;
*) exit "$code" ;;
esac
"""


def supervised(machine: Machine, ends: str, **variables: str) -> subprocess.Popen[str]:
    """Start a fake training run with these ends under supervision."""
    (machine.repo / "training").write_text(TRAINING)
    environ = {"PATH": str(machine.home / "bin"), "STUB_LOG": str(machine.home / "log"), "ENDS": ends, **variables}
    (machine.home / "log").write_text("")
    pipe, command = subprocess.PIPE, ["bash", "-euc", SUPERVISE]
    return subprocess.Popen(command, cwd=machine.repo, env=environ, stdout=pipe, stderr=pipe, text=True)


def end_of(machine: Machine, ends: str, **variables: str) -> tuple[int, list[str], list[str]]:
    """Exit code, starts and the run's log of a fake training run that ends by itself."""
    process = supervised(machine, ends, **variables)
    _, err = process.communicate(timeout=60)
    told = (machine.repo / "runs/r/train.log").read_text().splitlines()
    assert [line for line in told if line not in ("saved",) and "log of" not in line] == err.splitlines()
    assert not (machine.repo / "runs/r.exit").exists()
    return process.returncode, machine.log("start"), told


def test_dead_run_is_restarted_from_its_latest_checkpoint_with_one_log(machine: Machine) -> None:
    code, starts, log = end_of(machine, "120:137 130:5 200:0", SAVES="1")
    assert code == 0 and starts == ["start RESUME=", "start RESUME=auto", "start RESUME=auto"]
    assert log == [
        "log of start at 120",
        "restart 1 of 3: exit code 137 at step 120; continuing from step_0000100.pt",
        "log of start at 130",
        "restart 2 of 3: exit code 5 at step 130; continuing from step_0000100.pt",
        "log of start at 200",
    ]


def test_second_death_at_the_same_step_is_the_last(machine: Machine) -> None:
    code, starts, log = end_of(machine, "50:1 70:1 70:1 80:0")
    assert code == 1 and len(starts) == 3
    assert log[-1] == "giving up: exit code 1 at step 70, as the time before"


def test_restarts_are_bounded(machine: Machine) -> None:
    code, starts, log = end_of(machine, "1:1 2:1 3:139 4:0", MAX_RESTARTS="2")
    assert code == 139 and len(starts) == 3
    assert log[-1] == "giving up: exit code 139 at step 3, after MAX_RESTARTS=2"
    shutil.rmtree(machine.repo / "runs")
    assert end_of(machine, "1:1 2:0", MAX_RESTARTS="0")[0] == 1


@pytest.mark.parametrize(
    "end, code", [("9:2", 2), ("9:3", 3), ("9:143", 143), ("9:1:2", 2), ("9:1:3", 3), ("9:1:143", 143)]
)
def test_what_a_restart_cannot_mend_is_passed_on(end: str, code: int, machine: Machine) -> None:
    """Mistakes, a missed budget and a wanted end, also where torchrun has made 1 of them."""
    assert end_of(machine, f"{end} 10:0")[:2] == (code, ["start RESUME="])


def test_named_checkpoint_is_used_again_until_there_is_an_own_one(machine: Machine) -> None:
    assert end_of(machine, "1:1 2:0", RESUME="old.pt")[1] == ["start RESUME=old.pt"] * 2
    shutil.rmtree(machine.repo / "runs")
    assert end_of(machine, "1:1 2:0", RESUME="old.pt", SAVES="1")[1] == ["start RESUME=old.pt", "start RESUME=auto"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_ends_the_supervision(number: signal.Signals, machine: Machine) -> None:
    process = supervised(machine, "5:wait 6:0")
    limit = time.monotonic() + 30
    while not (machine.repo / "runs/r/train.log").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143 and len(machine.log("start")) == 1
    assert (machine.repo / "runs/r/train.log").read_text().splitlines()[-1] == "saved"


def test_rented_run_is_ended_before_it_has_cost_too_much(machine: Machine) -> None:
    began = time.monotonic()
    money = {"MAX_COST_USD": "0.0025", "PRICE_PER_HOUR": "1", "COST_RESERVE_SECONDS": "7"}  # 9 s
    code, starts, log = end_of(machine, "5:wait 6:0", **money)
    assert code == 143 and len(starts) == 1 and time.monotonic() - began < 9
    assert log[-2] == "saved" and log[-1].startswith("ended by MAX_COST_USD=0.0025 after ")
    shutil.rmtree(machine.repo / "runs")
    assert end_of(machine, "5:0", MAX_COST_USD="9", PRICE_PER_HOUR="9")[0] == 0  # and no clock goes on after the run


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"MAX_COST_USD": "5"}, "found MAX_COST_USD=5, PRICE_PER_HOUR=, expected two numbers above 0"),
        ({"MAX_COST_USD": "five", "PRICE_PER_HOUR": "1"}, "found MAX_COST_USD=five"),
        ({"MAX_COST_USD": "1", "PRICE_PER_HOUR": "100"}, "MAX_COST_USD=1 pays for 36 s at PRICE_PER_HOUR=100"),
        ({"MAX_RESTARTS": "some"}, "found MAX_RESTARTS=some"),
    ],
)
@pytest.mark.parametrize("script", ["run_local.sh", "run_8xh100.sh"])
def test_settings_of_supervision_are_checked(
    script: str, variables: dict[str, str], expected: str, machine: Machine
) -> None:
    machine.add_data()
    done = machine.run(script, **variables)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1 and not machine.log()


def test_run_local_restarts_a_crash(machine: Machine) -> None:
    assert machine.run("run_local.sh", TRAIN_GPT_EXIT="139").returncode == 139
    assert len([line for line in machine.log("program") if '["train_gpt.py"' in line]) == 2  # both at step 0


# ---- tests/run.sh, .ci/run, tests/gpu.sh ----


def test_suite_is_linted_typed_and_run_on_all_cores(machine: Machine) -> None:
    assert machine.run("tests/run.sh", "-k", "two words").returncode == 0
    assert any(line.endswith(" -r requirements-dev.txt") for line in machine.log("pip"))
    assert machine.log("-m ")[1:] == [
        "-m ruff check . OMP_NUM_THREADS=1",
        "-m ruff format --check . OMP_NUM_THREADS=1",
        "-m mypy ./train_gpt.py ./train_gpt_mlx.py OMP_NUM_THREADS=1",
        "-m pytest -n auto --dist worksteal -k two words OMP_NUM_THREADS=1",
    ]
    machine.run("tests/run.sh", "--full")
    assert "-m slow or not slow" in machine.log("-m pytest")[0]
    assert not machine.log("pip")


@pytest.mark.parametrize("script", ["tests/run.sh", ".ci/run"])
@pytest.mark.parametrize("failing, code", [("pytest", 3), ("ruff", 1), ("mypy", 1)])
def test_every_check_counts_and_tests_run_all_the_same(machine: Machine, script: str, failing: str, code: int) -> None:
    assert machine.run(script, FAILING=failing, CI="true").returncode == code
    assert machine.log("-m pytest")


def test_gpu_script_refuses_a_machine_without_cuda(machine: Machine) -> None:
    machine.install_torch("2.11.0", cuda=False)
    done = machine.run("tests/gpu.sh")
    assert done.returncode == 2 and "found no CUDA device" in done.stderr
    assert not machine.log("-m pytest") and not machine.calls()


def test_gpu_script_tests_then_trains_for_a_minute(machine: Machine) -> None:
    machine.install_torch("2.11.0", cuda=True)
    assert machine.run("tests/gpu.sh", "PRESET=nsa").returncode == 0
    assert machine.log("-m pytest")[0].startswith("-m pytest tests/gpu -q")
    environ = machine.calls()["train_gpt.py"][1]
    assert environ["MAX_WALLCLOCK_SECONDS"] == "60" and environ["PRESET"] == "nsa"
    assert machine.run("tests/gpu.sh", FAILING="pytest").returncode == 3
    assert not machine.calls()


# ---- the scripts themselves ----


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_keep_to_bash_3_2(script: str) -> None:
    """macOS ships no newer one: no associative arrays, case conversion, mapfile, name references, |& or &>>."""
    newer = re.compile(r"(declare|local|typeset) -[An]|mapfile|readarray|\$\{\w+(,|\^)|\|&|&>>|\$\{\w+@|printf '%\(")
    assert not newer.findall((ROOT / script).read_text())


def test_requirements_are_exact_pins() -> None:
    for name in REQUIREMENTS:
        for line in (ROOT / name).read_text().splitlines():
            marker = r"(; (python_version (<|>=) \"3.11\"|platform_system == \"(Linux|Darwin)\"))?"
            assert re.match(rf"(#.*|[\w-]+(\[\w+\])?==[\w.]+{marker})$", line), line


# ---- real environments, from tiny wheels ----


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A pure-Python wheel with one module of one line."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def real_machine(machine: Machine) -> Machine:
    """A real interpreter without packages, and wheels: torch in an index, the other pins in a folder."""
    base = machine.home / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    for line in (machine.repo / "requirements.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition(";")[0].partition("==")
            write_wheel(machine.home / ("index/torch" if name == "torch" else "wheels"), name, version)
    wheel = next((machine.home / "index/torch").glob("*.whl")).name
    (machine.home / "index/torch/index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    return machine


def run_for_real(machine: Machine) -> subprocess.CompletedProcess[str]:
    """run_local.sh with pip cut off from the network."""
    return machine.run(
        "run_local.sh",
        PYTHON=str(machine.home / "base/bin/python"),
        TORCH_INDEX_URL=(machine.home / "index").as_uri(),
        PIP_FIND_LINKS=str(machine.home / "wheels"),
        PIP_INDEX_URL=(machine.home / "index").as_uri(),
        PIP_CONFIG_FILE=os.devnull,
    )


def site_packages(environment: Path) -> Path:
    """Where an environment keeps its packages."""
    return next((environment / "lib").glob("python3*/site-packages"))


def test_real_environment_with_torch_from_its_index(real_machine: Machine) -> None:
    done = run_for_real(real_machine)
    assert done.returncode == 0, done.stderr
    installed = {path.name for path in site_packages(real_machine.venv).iterdir()}
    assert {"torch", "numpy", "sentencepiece", "brotli"} <= installed
    assert run_for_real(real_machine).stderr == ""


def test_real_environment_on_top_of_a_virtual_environment_with_torch(real_machine: Machine) -> None:
    """A new environment does not see the packages of the one whose interpreter made it; torch is kept all the same."""
    with zipfile.ZipFile(next((real_machine.home / "index/torch").glob("*.whl"))) as wheel:
        wheel.extractall(site_packages(real_machine.home / "base"))
    done = run_for_real(real_machine)
    assert done.returncode == 0 and "keeping this machine's torch" in done.stderr, done.stderr
    command = [str(real_machine.venv / "bin/python"), "-c", "import brotli, numpy, torch; print(torch.__file__)"]
    place = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert place.startswith(str(real_machine.home / "base"))
    assert run_for_real(real_machine).stderr == ""
