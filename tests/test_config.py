"""CONFIG: variables, precedence, presets, errors in one line before torch is imported, help."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

# What machines, shells, schedulers, clouds and libraries set; none of it may disturb a run.
FOREIGN_TEXT = """
PATH HOME USER LOGNAME SHELL PWD OLDPWD SHLVL TERM TERM_PROGRAM COLORTERM LANG LANGUAGE LC_ALL LC_CTYPE LC_TIME TZ
HOSTNAME HOST HOSTTYPE MACHTYPE OSTYPE MAIL EDITOR VISUAL PAGER LESS LESSOPEN LS_COLORS DISPLAY XAUTHORITY DEBUG
DBUS_SESSION_BUS_ADDRESS XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS TMPDIR TEMP TMP _ PS1 PROMPT HISTSIZE COLUMNS
LINES SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK SSH_ASKPASS TMUX TMUX_PANE STY SUDO_USER SUDO_COMMAND PYTHONPATH
PYTHONHOME PYTHONUNBUFFERED PYTHONHASHSEED PYTHONIOENCODING PYTHONDONTWRITEBYTECODE PYTHONWARNINGS VIRTUAL_ENV
VIRTUAL_ENV_PROMPT CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_SHLVL CONDA_EXE PYENV_ROOT UV_CACHE_DIR PIP_INDEX_URL
PIP_EXTRA_INDEX_URL PIP_CACHE_DIR PIP_NO_INPUT PIP_REQUIRE_VIRTUALENV POETRY_HOME CC CXX CFLAGS CXXFLAGS LDFLAGS CPATH
LIBRARY_PATH LD_LIBRARY_PATH LD_PRELOAD DYLD_LIBRARY_PATH MAKEFLAGS PKG_CONFIG_PATH COMPILER MANPATH MODULEPATH
LOADEDMODULES LMOD_CMD MODULESHOME HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy CUDA_VISIBLE_DEVICES
CUDA_HOME CUDA_PATH CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUDA_DEVICE_MAX_CONNECTIONS
CUDA_VERSION CUBLAS_WORKSPACE_CONFIG CUDNN_VERSION NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVARCH NCCL_DEBUG
NCCL_IB_DISABLE NCCL_SOCKET_IFNAME NCCL_P2P_DISABLE NCCL_TIMEOUT NCCL_ASYNC_ERROR_HANDLING NCCL_VERSION
NCCL_NVLS_ENABLE GLOO_SOCKET_IFNAME UCX_TLS OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE MPI_HOME PMI_RANK PMI_SIZE RANK
LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE NODE_RANK
MASTER_ADDR MASTER_PORT NPROC NNODES NPROC_PER_NODE RDZV_ENDPOINT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_HOME TORCH_LOGS
TORCH_CUDA_ARCH_LIST TORCH_INDEX_URL TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_COMPILE_DEBUG TORCHINDUCTOR_CACHE_DIR
TORCHDYNAMO_VERBOSE TORCH_SHOW_CPP_STACKTRACES PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK
TRITON_CACHE_DIR TRITON_INTERPRET OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES MKL_NUM_THREADS MKL_THREADING_LAYER
OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS NUMEXPR_MAX_THREADS VECLIB_MAXIMUM_THREADS KMP_AFFINITY KMP_BLOCKTIME
GOTO_NUM_THREADS BLIS_NUM_THREADS TOKENIZERS_PARALLELISM TRANSFORMERS_CACHE HF_HOME HF_TOKEN HF_ENDPOINT
HF_HUB_OFFLINE HF_DATASETS_CACHE HF_HUB_ENABLE_HF_TRANSFER HUGGINGFACE_HUB_CACHE WANDB_API_KEY WANDB_PROJECT
WANDB_RUN_ID WANDB_MODE WANDB_DIR WANDB_ENTITY WANDB_RESUME MLFLOW_TRACKING_URI TENSORBOARD_LOGDIR COMET_API_KEY
KAGGLE_KERNEL_RUN_TYPE COLAB_GPU JPY_PARENT_PID SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NNODES
SLURM_NODEID SLURM_CPUS_PER_TASK SLURM_JOB_NUM_NODES SLURM_SUBMIT_DIR SLURM_TASKS_PER_NODE SLURM_STEP_ID SLURM_GPUS
SLURM_MEM_PER_NODE SLURM_ARRAY_TASK_ID SBATCH_PARTITION PBS_JOBID PBS_NODEFILE LSB_JOBID KUBERNETES_SERVICE_HOST
KUBERNETES_PORT RUNPOD_POD_ID RUNPOD_GPU_COUNT VAST_CONTAINERLABEL CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_SHA
GITHUB_WORKSPACE GITLAB_CI RUNNER_OS RUNNER_TEMP BUILD_ID JOB_NAME JOB_ID TRAVIS CIRCLECI AWS_REGION AWS_ACCESS_KEY_ID
GOOGLE_APPLICATION_CREDENTIALS AZURE_CLIENT_ID DOCKER_HOST CONTAINER_ID TERM_SESSION_ID ITERM_SESSION_ID VSCODE_PID
VSCODE_IPC_HOOK_CLI GIT_EDITOR GIT_PAGER WSL_DISTRO_NAME JAVA_HOME GOPATH NODE_PATH NVM_DIR CARGO_HOME RUSTUP_HOME
LESS_TERMCAP_mb SYSTEMD_EXEC_PID INVOCATION_ID JOURNAL_STREAM MODEL_NAME DATASET OUTPUT_DIR LOG_LEVEL NUM_WORKERS
BATCH_SIZE PORT GPU_ID EPOCHS
"""
FOREIGN = FOREIGN_TEXT.split()


def sample(name: str) -> Any:
    """A value of a field's type, inside its range, other than the default."""
    spec = t.FIELDS[name]
    meta: Any = spec.metadata
    default: Any = spec.default
    if meta["choices"]:
        return next(c for c in meta["choices"] if c != default)
    if spec.type == "bool":
        return not default
    if spec.type == "str":
        return "some where/else"
    low = -math.inf if meta["low"] is None else meta["low"]
    high = math.inf if meta["high"] is None else meta["high"]
    options = (
        [default + 1, default - 1, default / 2, (default + 1) / 3]
        if spec.type == "float"
        else [default + 1, default - 1]
    )
    return next(v for v in options if low <= v <= high and v != default)


def text_of(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def refused(environ: dict[str, str]) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(t.UserError) as caught:
        t.load_config(environ)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def poison(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which importing torch or numpy fails loudly."""
    folder = tmp_path_factory.mktemp("poison")
    for package in ("torch", "numpy", "sentencepiece"):
        (folder / f"{package}.py").write_text(f"raise RuntimeError('{package} was imported')\n")
    return str(folder)


# ---- single variables ----


@pytest.mark.parametrize("name", t.FIELDS)
def test_field_is_declared_whole_and_parsed_by_its_type(name: str) -> None:
    spec = t.FIELDS[name]
    assert name == spec.name.upper()
    assert spec.type in ("int", "float", "str", "bool")
    assert type(spec.default).__name__ == spec.type
    assert spec.metadata["group"] and spec.metadata["meaning"] and not spec.metadata["meaning"].endswith(".")
    t.check_range(name, spec.default)
    value = t.parse_value(name, text_of(sample(name)))
    assert value == sample(name) and type(value).__name__ == spec.type


@pytest.mark.parametrize("name", [n for n, s in t.FIELDS.items() if s.type in ("int", "float", "bool")])
def test_ill_typed_value_is_refused_by_name(name: str) -> None:
    bad = {"int": ["x", "1.5", "1e3", ""], "float": ["x", "1,5", "nan", "inf", "-inf"], "bool": ["2", "yes", "x"]}
    for text in bad[str(t.FIELDS[name].type)]:
        with pytest.raises(t.UserError, match=f"^{name}="):
            t.parse_value(name, text)


@pytest.mark.parametrize("name", [n for n, s in t.FIELDS.items() if s.metadata["low"] is not None])
def test_value_below_the_least_is_refused(name: str) -> None:
    low = t.FIELDS[name].metadata["low"]
    assert t.parse_value(name, text_of(low)) == low
    with pytest.raises(t.UserError, match=f"^{name}=.*the least is {low:g}"):
        t.parse_value(name, text_of(low - 1))


@pytest.mark.parametrize("name", [n for n, s in t.FIELDS.items() if s.metadata["high"] is not None])
def test_value_above_the_most_is_refused(name: str) -> None:
    high = t.FIELDS[name].metadata["high"]
    assert t.parse_value(name, text_of(high)) == high
    with pytest.raises(t.UserError, match=f"^{name}=.*the most is"):
        t.parse_value(name, text_of(high + 1))


@pytest.mark.parametrize("name", [n for n, s in t.FIELDS.items() if s.metadata["choices"]])
def test_choices_are_closed_and_named(name: str) -> None:
    for choice in t.FIELDS[name].metadata["choices"]:
        assert t.parse_value(name, choice) == choice
    with pytest.raises(t.UserError) as caught:
        t.parse_value(name, "nonsense")
    assert all(choice in str(caught.value) for choice in t.FIELDS[name].metadata["choices"])


@pytest.mark.parametrize("text,value", [("0", False), ("1", True), ("false", False), ("TRUE", True), ("True", True)])
def test_booleans(text: str, value: bool) -> None:
    assert t.load_config({"QK_NORM": text}).qk_norm is value


def test_seed_fits_a_generator() -> None:
    """A seed that torch's generator cannot take must be refused at once, not at the end of the run."""
    import torch

    try:
        seed = t.parse_value("SEED", "1" + "0" * 30)
    except t.UserError:
        return
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "field,registry",
    [
        ("MATRIX_CODEC", "CODECS"),
        ("FP_STORAGE", "CODECS"),
        ("SCALAR_CODEC", "CODECS"),
        ("EXPORT_MODE", "EXPORT_MAPS"),
        ("MLP_ACT", "ACTIVATIONS"),
        ("RESIDUAL", "RESIDUALS"),
        ("BATCH_MODE", "BATCH_MODES"),
    ],
)
def test_choices_are_the_registry(field: str, registry: str) -> None:
    registries: dict[str, dict[str, Any]] = {
        "CODECS": t.CODECS,
        "EXPORT_MAPS": t.EXPORT_MAPS,
        "ACTIVATIONS": t.ACTIVATIONS,
        "RESIDUALS": t.RESIDUALS,
        "BATCH_MODES": t.BATCH_MODES,
    }
    assert set(t.FIELDS[field].metadata["choices"]) == set(registries[registry])


def test_backends_and_mixers_are_the_registries() -> None:
    assert set(t.FIELDS["ATTN_IMPL"].metadata["choices"]) == {"auto", *t.ATTENTION}
    for letter, kind in t.MIXER_LETTERS.items():
        assert kind in t.SITE_KINDS and set(t.load_config({"LAYER_PATTERN": letter}).mixers) == {kind}
    assert t.load_config({"LAYER_PATTERN": "hybrid", "NUM_LAYERS": "3"}).mixers == ("koopman", "attn", "koopman")


# ---- precedence, presets, files ----


def env_file(folder: Path, text: str | bytes) -> str:
    path = folder / "some.env"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_precedence_default_base_preset_file_environment(tmp_path: Path) -> None:
    preset = {"PRESET": "tiny"}
    file = {"ENV_FILE": env_file(tmp_path, "MODEL_DIM=64\nNUM_LAYERS=3\n")}
    assert t.PRESETS["tiny"]["model_dim"] != t.FIELDS["MODEL_DIM"].default
    assert t.load_config({}).model_dim == t.FIELDS["MODEL_DIM"].default
    assert t.load_config({}, {"model_dim": 256}).model_dim == 256
    assert t.load_config(preset, {"model_dim": 256}).model_dim == t.PRESETS["tiny"]["model_dim"]
    assert t.load_config({**preset, **file}).model_dim == 64
    assert t.load_config({**preset, **file, "MODEL_DIM": "128"}).model_dim == 128
    h = t.load_config({**preset, **file, "MODEL_DIM": "128"})
    assert (h.num_layers, h.num_heads, h.matrix_lr) == (
        3,
        t.PRESETS["tiny"]["num_heads"],
        t.FIELDS["MATRIX_LR"].default,
    )


def test_preset_may_stand_in_the_file_and_the_environment_overrides_it(tmp_path: Path) -> None:
    path = env_file(tmp_path, "PRESET=tiny\n")
    assert t.load_config({"ENV_FILE": path}).model_dim == t.PRESETS["tiny"]["model_dim"]
    assert t.load_config({"ENV_FILE": path, "PRESET": "attn"}).model_dim == t.FIELDS["MODEL_DIM"].default


def test_preset_that_the_file_overrides_entirely_is_refused(tmp_path: Path) -> None:
    path = env_file(tmp_path, t.config_env(t.load_config({"PRESET": "local"})))
    whole = dataclasses.replace(t.load_config({"PRESET": "local"}), preset="", env_file=path)
    assert t.load_config({"ENV_FILE": path}) == whole
    assert "no effect" in refused({"ENV_FILE": path, "PRESET": "local_float"})


@pytest.mark.parametrize(
    "huge", [{"MODEL_DIM": "1000000"}, {"MLP_MULT": "1e9"}, {"NUM_LAYERS": "1000", "MODEL_DIM": "65536"}]
)
def test_network_beyond_this_machines_memory_is_refused(huge: dict[str, str]) -> None:
    assert "GiB" in refused(huge)


def test_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    assert t.load_config({"MODEL_DIM": "", "PRESET": "", "ENV_FILE": "", "RUN_ID": ""}) == t.load_config({})
    assert t.load_config({"ENV_FILE": env_file(tmp_path, "MODEL_DIM=\nBATCH_STAGES=\n")}).model_dim == 512


@pytest.mark.parametrize("preset", t.PRESETS)
def test_preset_is_valid_alone_and_names_only_what_differs(preset: str) -> None:
    h, default = t.load_config({"PRESET": preset}), t.load_config({})
    for name, value in t.PRESETS[preset].items():
        assert t.parse_value(name.upper(), text_of(value)) == value
        assert getattr(default, name) != value, f"{preset}: {name} is the default"
    differ = {f.name for f in dataclasses.fields(h) if getattr(h, f.name) != getattr(default, f.name)}
    assert differ == {*t.PRESETS[preset], "preset"}


def same_but_for_identity(a: t.Hyperparameters, b: t.Hyperparameters) -> bool:
    """Equal in all that config.env carries."""
    blank: dict[str, Any] = {"preset": "", "env_file": "", "match": "", "run_id": "", "resume": ""}
    return dataclasses.replace(a, **blank) == dataclasses.replace(b, **blank)


@pytest.mark.parametrize("preset", t.PRESETS)
def test_config_env_reproduces_a_preset_without_naming_it(preset: str, tmp_path: Path) -> None:
    h = t.load_config({"PRESET": preset, "QK_NORM": "0", "MATRIX_LR": "0.1", "RUN_ID": "a"})
    again = t.load_config({"ENV_FILE": env_file(tmp_path, t.config_env(h))})
    assert same_but_for_identity(h, again) and again.preset == "" and again.run_id == ""


@pytest.mark.parametrize("name", [n for n in t.FIELDS if n not in ("PRESET", "ENV_FILE", "MATCH", "RUN_ID", "RESUME")])
def test_config_env_carries_every_field(name: str, tmp_path: Path) -> None:
    h = dataclasses.replace(t.load_config({}), **{name.lower(): sample(name)})
    pairs = t.read_env_file(env_file(tmp_path, t.config_env(h)))
    assert t.Hyperparameters(**{n.lower(): t.parse_value(n, text) for n, text in pairs.items()}) == h


# A path may hold anything but a line end (and what no environment can hold: NUL, and lone surrogates are not text).
PATHS = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(path=PATHS, rate=st.floats(0, 1e300), seed=st.integers(0, 2**62))
def test_config_env_round_trip_of_any_text_and_number(
    path: str, rate: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    h = t.load_config({"DATA_PATH": path, "MATRIX_LR": repr(rate), "SEED": str(seed)})
    folder = tmp_path_factory.getbasetemp()
    again = t.load_config({"ENV_FILE": env_file(folder, t.config_env(h))})
    assert (again.data_path, again.matrix_lr, again.seed) == (path, rate, seed)


def test_env_file_takes_comments_blank_lines_and_quotes(tmp_path: Path) -> None:
    text = "# a run\n\n  # indented\nMODEL_DIM=64\nDATA_PATH='/my data/it'\nOUT_DIR=\"a b\"\n"
    h = t.load_config({"ENV_FILE": env_file(tmp_path, text)})
    assert (h.model_dim, h.data_path, h.out_dir) == (64, "/my data/it", "a b")


@pytest.mark.parametrize(
    "text,named",
    [
        ("MODEL_DIMM=64\n", ":1:"),
        ("\nMODEL_DIM\n", ":2:"),
        ("export MODEL_DIM=64\n", ":1:"),
        ("MODEL_DIM=many\n", "MODEL_DIM=many"),
        ("DATA_PATH=/home/o'neil/data\n", ":1:"),
        (b"DATA_PATH=/d\xe9\n", "ENV_FILE"),
    ],
)
def test_env_file_mistake_is_one_line(text: str | bytes, named: str, tmp_path: Path) -> None:
    assert named in refused({"ENV_FILE": env_file(tmp_path, text)})


def test_env_file_value_with_bare_spaces_is_not_changed_silently(tmp_path: Path) -> None:
    try:
        h = t.load_config({"ENV_FILE": env_file(tmp_path, "DATA_PATH=/my data/it\n")})
    except t.UserError:
        return
    assert h.data_path == "/my data/it"


def test_missing_env_file_is_one_line(tmp_path: Path) -> None:
    assert "No such file" in refused({"ENV_FILE": str(tmp_path / "none.env")})
    assert "cannot be read" in refused({"ENV_FILE": str(tmp_path)})


def test_unknown_preset_names_the_nearest() -> None:
    assert "nearest: local_float" in refused({"PRESET": "local_flaot"})
    assert all(name in refused({"PRESET": "zzz"}) for name in t.PRESETS)


# ---- mistyped and foreign variables ----


def mistypings(name: str) -> list[str]:
    """A letter left out, doubled, an underscore lost, an S appended, two letters swapped."""
    middle = len(name) // 2
    wrong = [name[:middle] + name[middle + 1 :], name[:middle] + name[middle] + name[middle:], name + "S"]
    wrong.append(name.replace("_", "", 1))
    if len(name) >= 8:
        wrong.append(name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :])
    return [w for w in wrong if w not in t.FIELDS and w not in t.FOREIGN]


@pytest.mark.parametrize("name", t.FIELDS)
def test_near_miss_names_the_right_variable(name: str) -> None:
    for wrong in mistypings(name):
        message = refused({wrong: "1"})
        nearest = message.split("nearest: ")[1].split()[0]
        closeness = [difflib.SequenceMatcher(None, wrong, n).ratio() for n in (nearest, name)]
        assert message.startswith(wrong) and closeness[0] >= closeness[1] - 1e-9, (wrong, nearest)


@pytest.mark.parametrize("prefix", t.FAMILY_PREFIXES)
def test_unknown_member_of_a_family_names_a_variable(prefix: str) -> None:
    message = refused({prefix + "QQQQQ": "1"})
    assert message.startswith(prefix + "QQQQQ") and message.split("nearest: ")[1].split()[0] in t.FIELDS


@pytest.mark.parametrize(
    "wrong,right",
    [("num_layers", "NUM_LAYERS"), ("Seed", "SEED"), ("MAX_WALLCLOCK", "MAX_WALLCLOCK_SECONDS"),
     ("GRAD_CLIP", "GRAD_CLIP_NORM"), ("BATCH_TOKENS", "TRAIN_BATCH_TOKENS"), ("SEQ_LEN", "EVAL_SEQ_LEN"),
     ("VAL_EVERY", "SAVE_EVERY"), ("TIE_EMBED", "TIE_EMBEDDINGS"), ("EVAL_STRIDE", "SLIDING_EVAL_STRIDE"),
     ("BUDGET_BYTES", "HARD_BUDGET_BYTES"), ("LOG_EVERY", "TRAIN_LOG_EVERY")],
)  # fmt: skip
def test_shortened_or_small_letters_name_the_right_variable(wrong: str, right: str) -> None:
    """Where several variables hold the words, one of them is named."""
    message = refused({wrong: "1"})
    nearest = message.split("nearest: ")[1].split()[0]
    words = set(wrong.upper().split("_"))
    assert nearest == right or words & set(nearest.split("_")), message


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_variable_is_no_error(name: str) -> None:
    assert name not in t.FIELDS
    assert t.load_config({name: "anything at all"}) == t.load_config({})


# ---- contradictions ----

# One configuration per rule, and a word that its message must hold.
CONTRADICTIONS: list[tuple[dict[str, str], str]] = [
    ({"NUM_LAYERS": "2", "SHARED_BLOCKS": "3"}, "SHARED_BLOCKS=3"),
    ({"MODEL_DIM": "500"}, "NUM_HEADS=8"),
    ({"NUM_KV_HEADS": "3"}, "NUM_KV_HEADS=3"),
    ({"NUM_KV_HEADS": "16"}, "NUM_KV_HEADS=16"),
    ({"MODEL_DIM": "24"}, "even"),
    ({"PARTIAL_ROPE_DIMS": "5"}, "PARTIAL_ROPE_DIMS=5"),
    ({"PARTIAL_ROPE_DIMS": "128"}, "at most 64"),
    ({"BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_ORDERS": "3,2"}, "BIGRAM_HASH_ORDERS=3,2 must rise"),
    ({"BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_ORDERS": "2,2"}, "must rise"),
    ({"BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_ORDERS": "1,2"}, "begin with at least 2"),
    ({"INDUCTION_ORDERS": "0,1"}, "INDUCTION_ORDERS=0,1 must rise from at least 1"),
    ({"INDUCTION_ORDERS": "1,7"}, "too long for VOCAB_SIZE=1024"),
    ({"BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_ORDERS": "2;3"}, "not a list like 2,3"),
    ({"BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_ORDERS": "2,3", "BIGRAM_HASH_DIM": "9"}, "multiple of the 2"),
    ({"BIGRAM_HASH_BUCKETS": "2000000"}, "at most 1048576 of BIGRAM_HASH_DIM=64"),
    ({"TRAIN_SEQ_LEN": "1000"}, "try 524000"),
    ({"TRAIN_BATCH_TOKENS": "1000"}, "try 1024"),
    ({"BATCH_STAGES": "0.5:524288"}, "must start at progress 0"),
    ({"BATCH_STAGES": "fast"}, "BATCH_STAGES=fast"),
    ({"BATCH_STAGES": "0:131072,0.5"}, "BATCH_STAGES"),
    ({"BATCH_STAGES": "0:131072,0.5:1000"}, "TRAIN_SEQ_LEN"),
    ({"BATCH_STAGES": "0:131072,0.5:262144,0.3:524288"}, "BATCH_STAGES"),
    ({"BATCH_STAGES": "0:131072,nan:262144"}, "BATCH_STAGES"),
    ({"BATCH_STAGES": "0:131072,2:262144"}, "BATCH_STAGES"),
    ({"BATCH_STAGES": "0:131072", "BATCH_MODE": "streams"}, "BATCH_MODE=streams"),
    ({"CARRY_TRAIN": "1", "ATTN_WINDOW": "8"}, "BATCH_MODE=streams"),
    ({"CARRY_TRAIN": "1", "BATCH_MODE": "streams"}, "ATTN_WINDOW"),
    ({"CARRY_EVAL": "1"}, "ATTN_WINDOW"),
    ({"CARRY_EVAL": "1", "SLIDING_EVAL": "1", "ATTN_WINDOW": "8"}, "SLIDING_EVAL"),
    ({"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "2048"}, "SLIDING_EVAL_STRIDE=2048"),
    ({"MICRO_BATCH_TOKENS": "512"}, "MICRO_BATCH_TOKENS=512"),
    ({"UNTIE_AT_FRACTION": "0.5", "TIE_EMBEDDINGS": "0"}, "TIE_EMBEDDINGS"),
    ({"LAYER_PATTERN": "attn,wave"}, "LAYER_PATTERN=attn,wave"),
    ({"LAYER_PATTERN": "mlp"}, "LAYER_PATTERN=mlp"),
    ({"LAYER_PATTERN": "attn,"}, "LAYER_PATTERN=attn,"),
    ({"ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "0"}, "MAX_WALLCLOCK_SECONDS"),
    ({"TEMP_SCALING": "1", "HOLDOUT_TOKENS": "0"}, "HOLDOUT_TOKENS"),
    ({"TEMP_SCALING": "1", "MAX_WALLCLOCK_SECONDS": "20", "CALIB_MAX_SECONDS": "30"}, "CALIB_MAX_SECONDS"),
    ({"PRESET": "tiny", "MLP_MULT": "0.01"}, "MLP_MULT"),
    ({"PRESET": "tiny", "CALIBRATE": "1", "HOLDOUT_TOKENS": "0"}, "CALIBRATE needs HOLDOUT_TOKENS"),
    ({"EXPORT_PROXY_EVAL": "5", "HOLDOUT_TOKENS": "0"}, "EXPORT_PROXY_EVAL needs HOLDOUT_TOKENS"),
    ({"EXPORT_PROXY_EVAL": "5", "MAX_WALLCLOCK_SECONDS": "20"}, "CALIB_MAX_SECONDS"),
    ({"PRESET": "tiny", "CALIB_AT_FRACTION": "0.4", "TERNARY_START_FRACTION": "0.5"}, "TERNARY_START_FRACTION=0.5"),
]


@pytest.mark.parametrize("environ,named", CONTRADICTIONS, ids=lambda x: str(x)[:60])
def test_contradiction_is_one_line(environ: dict[str, str], named: str) -> None:
    assert named in refused(environ)


@pytest.mark.parametrize(
    "environ,named",
    [
        ({"MODEL_DIM": "500"}, "NUM_HEADS=8"),
        ({"MODEL_DIM": "wide"}, "MODEL_DIM=wide"),
        ({"MODEL_DIM": "0"}, "MODEL_DIM=0"),
        ({"MATRIX_CODEC": "int3"}, "MATRIX_CODEC=int3"),
        ({"MODEL_DMI": "64"}, "MODEL_DIM"),
        ({"MUON_SPEED": "1"}, "MUON_SPEED"),
        ({"PRESET": "tyni"}, "tiny"),
        ({"ENV_FILE": "/no/such/file"}, "/no/such/file"),
        ({"STRICT_CONFIG": "1", "EMA_START_FRACTION": "0.2"}, "EMA_START_FRACTION"),
    ],
)
@pytest.mark.parametrize("command", [[], ["plan"]])
def test_command_line_refuses_in_one_line_before_torch(
    environ: dict[str, str], named: str, command: list[str], poison: str, run_cli: Callable
) -> None:
    done = run_cli(command, {**environ, "PYTHONPATH": poison}, timeout=30)
    assert done.returncode == 2 and done.stdout == ""
    assert named in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["trian"], ["--model-dim=3"], ["model.pgz"]])
def test_unknown_command_is_one_line(argv: list[str], poison: str, run_cli: Callable) -> None:
    done = run_cli(argv, {"PYTHONPATH": poison}, timeout=30)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert argv[0] in done.stderr and all(command in done.stderr for command in t.COMMANDS)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_mistyped_variable_is_refused_early_beside_an_artifact(command: str, poison: str, run_cli: Callable) -> None:
    done = run_cli([command, "model.pgz"], {"PYTHONPATH": poison, "EVAL_SEQLEN": "64"}, timeout=30)
    assert done.returncode == 2 and "EVAL_SEQ_LEN" in done.stderr and done.stderr.count("\n") == 1


# ---- help ----


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["train", "--help"]])
def test_help_names_every_variable_without_torch(argv: list[str], poison: str, run_cli: Callable) -> None:
    done = run_cli(argv, {"PYTHONPATH": poison, "MODEL_DIMM": "1"}, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    for name, spec in t.FIELDS.items():
        default = int(spec.default) if isinstance(spec.default, bool) else spec.default
        assert spec.metadata["meaning"] in lines[name] and str(default) in lines[name], name
        assert spec.metadata["unit"] in lines[name] and all(
            choice in lines[name] for choice in (spec.metadata["choices"] or ())[:5]
        ), name
    assert all(preset in done.stdout for preset in t.PRESETS) and all(command in done.stdout for command in t.COMMANDS)


def test_help_as_an_argument_of_another_option_is_no_request_for_help(capsys: pytest.CaptureFixture) -> None:
    t.answer_early(["generate", "model.pgz", "--prompt", "help"], {})
    assert capsys.readouterr().out == ""


# ---- variables without effect ----

# Settings that turn parts on and off; each field with a condition acts under one of them and not under another.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"vocab_size": 256},
    {"compile": "0"},
    {"device": "cpu"},
    {"yarn_factor": 4.0},
    {"matrix_codec": "ternary"},
    {"tie_embeddings": False},
    {"warmdown_iters": 100},
    {"ema_decay": 0.99},
    {"sliding_eval": True},
    {"batch_stages": "0:131072"},
    {"muon_momentum_warmup_steps": 0},
    {"iterations": 0},
    {"lr_floor": 0.1},
    {"temp_scaling": True},
    {"matrix_codec": "ternary", "calibrate": True},
    {"matrix_codec": "int6", "calib_at_fraction": 0.5},
    {"export_proxy_eval": 5},
    {"watchdog_seconds": 0.0},
    {"bigram_hash_buckets": 64, "engram_prune": 0.5},
    {"bigram_hash_buckets": 64},
    {"induction_orders": "2"},
    {"layer_pattern": "skc"},
    {"layer_pattern": "K"},
    {"layer_pattern": "skc", "bigram_hash_buckets": 64, "engram_inject_layer": 1},
    {"capsule_bank": True, "feedback_passes": 1},
    {"capsule_bank": True, "feedback_passes": 2},
    {"moe_experts": 4},
    {"recurrence_layers": "1-2"},
    {"ternary_noise_scale": 0.02},
    {"layer_pattern": "K", "induction_orders": "1,2"},
    {"residual": "hc"},
    {"residual": "hc", "hc_learn": "write"},
    {"residual": "hc", "bigram_hash_buckets": 64},
    {"residual": "mhc"},
    {"residual": "mhc", "mhc_mode": "sinkhorn"},
    {"residual": "mhc", "mhc_mode": "sinkhorn", "mhc_n": 3},
    {"layer_pattern": "nsa"},
    {"rmt_segment": 64},
    {"carry_train": True},
    {"kv_cache": "int8"},
    {"ngram_cache": True},
    {"eval_engram": True},
    {"ttt_scope": "lora"},
    {"ttt_scope": "global", "bigram_hash_buckets": 64},
    {"matrix_codec": "int6"},
    {"muon_wd": 0.1},
    {"export_mode": "competition_gptq"},
    {"export_mode": "competition_gptq", "lqer_rank": 0, "max_wallclock_seconds": 0.0},
]


@pytest.mark.parametrize("name", [n for n, s in t.FIELDS.items() if s.metadata["when"]])
def test_variable_without_effect_is_named_exactly_when_it_has_none(name: str) -> None:
    seen = set()
    for setting in SETTINGS:
        if name.lower() in setting:
            continue
        h = t.Hyperparameters(**setting)
        acts = bool(t.FIELDS[name].metadata["when"](h))
        seen.add(acts)
        assert name not in t.ineffective_variables(h)
        named = name in t.ineffective_variables(dataclasses.replace(h, **{name.lower(): sample(name)}))
        assert named is not acts
    assert seen == {True, False}, "no setting turns it on, or none off"


@pytest.mark.parametrize(
    "environ,name",
    [
        ({"EMA_START_FRACTION": "0.2"}, "EMA_START_FRACTION"),
        ({"GROUP_SIZE": "64"}, "GROUP_SIZE"),
        ({"TERNARY_SCALE": "lstsq"}, "TERNARY_SCALE"),
        ({"YARN_ORIGINAL": "64"}, "YARN_ORIGINAL"),
        ({"SLIDING_EVAL_STRIDE": "32"}, "SLIDING_EVAL_STRIDE"),
        ({"HEAD_LR": "0.1"}, "HEAD_LR"),
        ({"EMBED_LR": "0.1"}, "EMBED_LR"),
        ({"TIED_EMBED_LR": "0.1", "TIE_EMBEDDINGS": "0"}, "TIED_EMBED_LR"),
        ({"WARMDOWN_ITERS": "9", "WARMDOWN_FRACTION": "0.2"}, "WARMDOWN_FRACTION"),
        ({"VOCAB_SIZE": "256", "TOKENIZER_PATH": "x.model"}, "TOKENIZER_PATH"),
        ({"COMPILE": "0", "COMPILE_MODE": "max-autotune"}, "COMPILE_MODE"),
        ({"COMPILE": "0", "WARMUP_STEPS": "3"}, "WARMUP_STEPS"),
        ({"DEVICE": "cpu", "WARMUP_STEPS": "3"}, "WARMUP_STEPS"),
        ({"BATCH_STAGES": "0:131072", "TRAIN_BATCH_TOKENS": "65536"}, "TRAIN_BATCH_TOKENS"),
        ({"MUON_MOMENTUM_WARMUP_STEPS": "0", "MUON_MOMENTUM_WARMUP_START": "0.5"}, "MUON_MOMENTUM_WARMUP_START"),
        ({"ITERATIONS": "0", "EXTENSION_STEPS": "5", "LR_FLOOR": "0.1"}, "EXTENSION_STEPS"),
        ({"EXTENSION_STEPS": "5"}, "EXTENSION_STEPS"),
        ({"CALIB_MAX_SECONDS": "5"}, "CALIB_MAX_SECONDS"),
    ],
)
def test_known_variables_without_effect(environ: dict[str, str], name: str) -> None:
    assert t.ineffective_variables(t.load_config(environ)) == [name]
    message = refused({**environ, "STRICT_CONFIG": "1"})
    assert name in message and "STRICT_CONFIG" in message


def test_strict_config_accepts_what_acts_and_what_a_preset_sets() -> None:
    strict = {"STRICT_CONFIG": "1"}
    assert t.load_config({**strict, "EMA_START_FRACTION": "0.2", "EMA_DECAY": "0.9"}).strict_config
    assert t.load_config({**strict, "PRESET": "tiny", "MATRIX_CODEC": "bf16", "VOCAB_SIZE": "256"}).strict_config


def test_variable_without_effect_is_named_at_start(run_cli: Callable, tiny_env: dict[str, str]) -> None:
    done = run_cli(["preflight"], {**tiny_env, "EMA_START_FRACTION": "0.2"})
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stdout.splitlines() if "no effect" in line]
    assert len(named) == 1 and "EMA_START_FRACTION" in named[0]
