"""Section 14 (TRAINING) and the commands of section 15, by running real commands on tiny jobs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
Run = Callable  # a fixture of conftest.py that starts commands

# Options that change the network, its weights or its schedule, each on top of the tiny preset (ternary matrices).
STREAMS = {"BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1"}
LATE_HEAD = {"UNTIE_AT_FRACTION": "0.5"}
AVERAGE = {"EMA_DECAY": "0.8", "EMA_START_FRACTION": "0.25"}
STAGES = {"BATCH_STAGES": "0:128,0.5:256"}
OPTIONS: dict[str, dict[str, str]] = {
    "ema": AVERAGE,
    "untied": {"TIE_EMBEDDINGS": "0"},
    "untied late, ema": {**LATE_HEAD, **AVERAGE},
    "factored": {"EMBED_DIM": "16"},
    "factored, untied, fp8": {"EMBED_DIM": "16", "TIE_EMBEDDINGS": "0", "FP_STORAGE": "fp8"},
    "swiglu, value residual": {"MLP_ACT": "swiglu", "VALUE_RESIDUAL": "1"},
    "leaky, plain, no mix": {"MLP_ACT": "leaky_relu2", "RESIDUAL": "plain", "RESID_MIX": "0"},
    "partial rope, yarn": {"PARTIAL_ROPE_DIMS": "8", "YARN_FACTOR": "2", "EVAL_SEQ_LEN": "64"},
    "window, documents": {"ATTN_WINDOW": "7", "DOC_MASK": "1", "BATCH_MODE": "documents"},
    "streams, carry": {**STREAMS, "CARRY_EVAL": "1"},
    "ternary late": {"TERNARY_START_FRACTION": "0.7", "TERNARY_SCALE": "lstsq"},
    "odd groups": {"GROUP_SIZE": "24", "SCALAR_CODEC": "exact"},
    "float64": {"PRECISION": "fp64"},
    "bf16": {"PRECISION": "bf16"},
    "bf16, streams, carry": {"PRECISION": "bf16", **STREAMS, "CARRY_EVAL": "1"},
    "sliding, temperature": {"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "8", "TEMP_SCALING": "1"},
    "recomputed, clipped": {"GRAD_CHECKPOINT": "1", "GRAD_CLIP_NORM": "0.5", "MICRO_BATCH_TOKENS": "96"},
    "no cap, no qk norm": {"LOGIT_SOFTCAP": "0", "QK_NORM": "0"},
    "no held-out part": {"HOLDOUT_TOKENS": "0"},
    "one odd layer": {"NUM_LAYERS": "1"},
    "three layers, window 1": {"NUM_LAYERS": "3", "ATTN_WINDOW": "1"},
    "stages, extension": {**STAGES, "EXTENSION_STEPS": "2", "LR_FLOOR": "0.1"},
}
SHORT = {"ITERATIONS": "8", "MAX_VAL_TOKENS": "1500", "SAMPLE_TOKENS": "0"}

TIME = r"train_time:\d+ms step_avg:\d+\.\d\dms"
TRAIN_LINE = re.compile(rf"^step:(\d+)/20 train_loss:\d+\.\d{{4}} {TIME} tok/s:\d+ eta:\d+:\d\d$", re.MULTILINE)
VAL_LINE = re.compile(rf"^step:(\d+)/20 val_loss:\d+\.\d{{4}} val_bpb:\d+\.\d{{4}} {TIME}$", re.MULTILINE)
FINAL_LINE = re.compile(r"^final_roundtrip val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4})$", re.MULTILINE)
SIZE_LINE = re.compile(r"^model_bytes:(\d+) code_bytes:(\d+) .*total_bytes:(\d+) budget_bytes:(\d+)$", re.MULTILINE)
EVAL_LINE = re.compile(r"^final_eval val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)$", re.MULTILINE)
UNITS = ("_nats", "_bpb", "_s", "_per_s", "_mib", "_bytes", "_tokens", "_steps", "seconds")
WITHOUT_UNIT = {
    "kind", "name", "step", "rate_scale", "streams", "data", "tokenizer", "protocol", "seed", "parameters", "device",
    "flops_per_token", "tokens",
}  # fmt: skip


def error_line(text: str) -> str:
    """The one line that a mistake of the user's is answered with."""
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


def artifact_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"] / "model.pgz"


@pytest.fixture
def trained(run_job: Run, tiny_env: dict[str, str]) -> dict[str, str]:
    """The environment of a finished tiny run."""
    done = run_job({**tiny_env, **SHORT})
    assert done.code == 0, done.err
    return tiny_env


def data_of(env: dict[str, str]) -> dict[str, str]:
    """What `eval` and `generate` need of a run's environment."""
    return {name: env[name] for name in ("DATA_PATH", "DEVICE", "COMPILE")}


# The real command, once


def test_run_prints_and_leaves_everything(run_cli: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    done = run_cli([], {**tiny_env, "VAL_LOSS_EVERY": "10"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [int(step) for step in TRAIN_LINE.findall(done.stdout)] == [1, 2, 3, 4, 5, 10, 15, 20]
    assert [int(step) for step in VAL_LINE.findall(done.stdout)] == [10, 20]
    assert len(FINAL_LINE.findall(done.stdout)) == 1
    ((model, code, total, budget),) = SIZE_LINE.findall(done.stdout)
    folder = artifact_of(tiny_env).parent
    assert int(model) == artifact_of(tiny_env).stat().st_size
    assert (int(code), int(total), int(budget)) == (24_000, int(model) + 24_000, 16_000_000)
    assert "\r" not in done.stdout  # a progress bar belongs on a terminal only
    assert (folder / "train.log").read_text(encoding="utf-8") == done.stdout
    assert (folder / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert (folder / "checkpoints" / "latest").read_text() == "step_0000020.pt"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    files = {"train.log", "metrics.jsonl", "config.env", "train_gpt.py", "model.pgz", "lock", "heartbeat_rank0.json"}
    files |= {"model.pgz.reference.npz"}
    assert left == files | {"checkpoints/latest", "checkpoints/step_0000020.pt"}
    (final,) = read_metrics(folder, "final")
    assert final["model_bytes"] == int(model) and final["total_bytes"] == int(total)
    assert f"val_loss:{final['val_loss_nats']:.4f} val_bpb:{final['val_bpb']:.4f}" in done.stdout


def test_metrics_have_units_in_their_names(trained: dict[str, str], read_metrics: Callable) -> None:
    objects = read_metrics(artifact_of(trained).parent)
    assert {found["kind"] for found in objects} >= {"train", "val", "export", "final"}
    for found in objects:
        assert not [n for n in found if n not in WITHOUT_UNIT and not n.endswith(UNITS)], found


def test_log_and_metrics_tell_the_same_times(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """Milliseconds in the one, seconds in the other; a step's time and tokens/s are those since the report before."""
    done = run_job({**tiny_env, "MAX_VAL_TOKENS": "300", "SAMPLE_TOKENS": "0"})
    lines = re.findall(
        r"^step:(\d+)/20 train_loss.*train_time:(\d+)ms step_avg:(\S+)ms tok/s:(\d+)", done.out, re.MULTILINE
    )
    step, seconds = 0, 0.0
    for line, found in zip(lines, read_metrics(artifact_of(tiny_env).parent, "train"), strict=True):
        told, time_ms, average_ms, speed = map(float, line)
        steps, passed = found["step"] - step, found["train_time_s"] - seconds
        step, seconds = found["step"], found["train_time_s"]
        assert told == step and time_ms == pytest.approx(seconds * 1e3, abs=0.6)
        assert average_ms == pytest.approx(seconds * 1e3 / step, abs=0.06)
        assert found["step_time_s"] == pytest.approx(passed / steps, abs=2e-4)
        assert found["tokens_per_s"] == pytest.approx(256 / found["step_time_s"], rel=1e-2)
        assert speed == pytest.approx(found["tokens_per_s"], abs=0.6)
    assert step == 20 and steps == 5


def test_progress_bar_with_remaining_time_on_a_terminal(tiny_env: dict[str, str], tmp_path: Path) -> None:
    terminal, side = pty.openpty()
    env = {**os.environ, **tiny_env, **SHORT, "ITERATIONS": "60", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(ROOT / "train_gpt.py")], env=env, stdout=side, stderr=side) as process:
        os.close(side)
        text = b""
        while part := read_terminal(terminal):
            text += part
        assert process.wait(timeout=60) == 0, text
    os.close(terminal)
    assert re.search(rb"\r\[#*\.+\] +\d+% step \d+ .*eta \d:\d\d", text), text
    assert b"\r" not in (artifact_of(tiny_env).parent / "train.log").read_bytes()


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other side has closed
        return b""


# Artifact and score


def check_roundtrip(run_job: Run, env: dict[str, str], read_metrics: Callable) -> None:
    done = run_job(env)
    assert done.code == 0, done.err
    (final,) = read_metrics(artifact_of(env).parent, "final")
    assert abs(final["val_loss_nats"] - final["in_memory_val_loss_nats"]) < 1e-6
    evaluation = {n: env[n] for n in env if n in t.FIELDS and t.FIELDS[n].metadata["group"] == "evaluation"}
    evaluation = {**data_of(env), "EVAL_STREAMS": "4", **evaluation, "HOLDOUT_TOKENS": env.get("HOLDOUT_TOKENS", "256")}
    evaluation["PRECISION"] = env.get("PRECISION", "fp32")
    if env.get("PRECISION") != "fp64":  # a float64 run rounds its weights once more when it is evaluated in float32
        scored = run_job(evaluation, ["eval", str(artifact_of(env))])
        assert scored.code == 0, scored.err
        ((loss, bpb),) = EVAL_LINE.findall(scored.out)
        assert abs(float(loss) - final["val_loss_nats"]) < 1e-6 and abs(float(bpb) - final["val_bpb"]) < 1e-6


@pytest.mark.parametrize("codec", t.CODECS)
def test_reloaded_score_is_the_score_in_memory(
    codec: str, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **SHORT, "MATRIX_CODEC": codec, "FP_STORAGE": codec, "SCALAR_CODEC": codec}
    check_roundtrip(run_job, env, read_metrics)


@pytest.mark.parametrize("name", OPTIONS)
def test_reloaded_score_is_the_score_in_memory_with_options(
    name: str, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    check_roundtrip(run_job, {**tiny_env, **SHORT, **OPTIONS[name]}, read_metrics)


def test_final_score_is_that_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """A file that does not give back the network must show: the last score comes from its bytes, not from memory."""
    h, decode = t.load_config({**tiny_env, **SHORT}), t.decode_artifact

    def without_embedding(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header, weights = decode(data)
        return header, {**weights, "embed.weight": np.zeros_like(weights["embed.weight"])}

    monkeypatch.setattr(t, "decode_artifact", without_embedding)
    assert t.train(h, t.start_runtime(h)) == 0
    (final,) = read_metrics(artifact_of(tiny_env).parent, "final")
    assert final["val_loss_nats"] == pytest.approx(math.log(256), abs=1e-4) != final["in_memory_val_loss_nats"]


def test_final_score_is_of_the_averaged_weights(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """The plain and the averaging run train alike; only what they score and export at the end differs."""
    losses = []
    for run, extra in (("plain", {}), ("averaged", AVERAGE)):
        env = {**tiny_env, **SHORT, **extra, "RUN_ID": run, "TRAIN_LOG_EVERY": "1"}
        assert run_job(env).code == 0
        train = [found["train_loss_nats"] for found in read_metrics(artifact_of(env).parent, "train")]
        losses.append((train, read_metrics(artifact_of(env).parent, "final")[0]["val_loss_nats"]))
    assert losses[0][0] == losses[1][0]
    assert abs(losses[0][1] - losses[1][1]) > 1e-3


def test_validation_before_the_switch_is_of_the_tied_head(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    losses = []
    for run, extra in (("tied", {}), ("late", LATE_HEAD)):
        env = {**tiny_env, **SHORT, **extra, "RUN_ID": run, "VAL_LOSS_EVERY": "3"}
        assert run_job(env).code == 0
        losses.append([found["val_loss_nats"] for found in read_metrics(artifact_of(env).parent, "val")])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]  # steps 3 and 6, the switch at 4


def test_average_of_a_late_head_starts_at_the_embedding(run_job: Run, tiny_env: dict[str, str]) -> None:
    """Before it exists a head has no value worth averaging: with rates at zero from the switch on, head = embedding."""
    schedule = {"WARMDOWN_FRACTION": "0.5", "UNTIE_AT_FRACTION": "0.9", "EXTENSION_STEPS": "4", "ITERATIONS": "10"}
    env = {**tiny_env, **SHORT, **schedule, "EMA_DECAY": "0.9", "EMA_START_FRACTION": "0.2", "HEAD_LR": "0"}
    env["TIED_EMBED_LR"] = "0"
    assert run_job(env).code == 0
    _, weights = t.read_artifact(str(artifact_of(env)))
    np.testing.assert_array_equal(weights["head.weight"], weights["embed.weight"])


def test_config_env_reproduces_the_artifact(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **SHORT, **AVERAGE, **LATE_HEAD, **STAGES, "SEED": "7", "LR_FLOOR": "0.05", "ADAM_WD": "0.01"}
    assert run_job(env).code == 0
    first = artifact_of(env)
    again = run_job({"ENV_FILE": str(first.parent / "config.env"), "RUN_ID": "again"})
    assert again.code == 0, again.err
    assert (first.parents[1] / "again" / "model.pgz").read_bytes() == first.read_bytes()
    assert (first.parents[1] / "again" / "config.env").read_bytes() == (first.parent / "config.env").read_bytes()
    other = run_job({"ENV_FILE": str(first.parent / "config.env"), "RUN_ID": "other", "SEED": "8"})
    assert other.code == 0
    assert (first.parents[1] / "other" / "model.pgz").read_bytes() != first.read_bytes()


def test_over_budget_is_exit_code_3(run_job: Run, trained: dict[str, str]) -> None:
    env, size = {**trained, **SHORT}, artifact_of(trained).stat().st_size + 24_000
    exact = run_job({**env, "RUN_ID": "exact", "HARD_BUDGET_BYTES": str(size)})
    assert exact.code == 0, exact.out
    over = run_job({**env, "RUN_ID": "over", "HARD_BUDGET_BYTES": str(size - 1)})
    assert over.code == 3
    assert re.search(r"^error: 1 bytes over HARD_BUDGET_BYTES", over.out + over.err, re.MULTILINE)
    assert artifact_of({**env, "RUN_ID": "over"}).is_file()


# Other commands


def test_eval_of_a_part_under_other_settings(run_job: Run, trained: dict[str, str]) -> None:
    found = []
    for extra in ({}, {"EVAL_STREAMS": "1"}, {"VAL_BATCH_SIZE": "64"}):
        done = run_job({**data_of(trained), "MAX_VAL_TOKENS": "1024", **extra}, ["eval", str(artifact_of(trained))])
        assert done.code == 0, done.err
        assert "tokens:1024 " in done.out
        found.append(float(EVAL_LINE.findall(done.out)[0][0]))
    assert max(found) - min(found) < 1e-6


def test_eval_takes_the_shape_from_the_artifact_alone(run_job: Run, tiny_env: dict[str, str]) -> None:
    """Defaults of training variables (batch of 524,288 tokens, ...) may not stand in the way of scoring."""
    env = {**tiny_env, **SHORT, "TRAIN_SEQ_LEN": "24", "TRAIN_BATCH_TOKENS": "96", "MICRO_BATCH_TOKENS": "48"}
    assert run_job({**env, "TEMP_SCALING": "1"}).code == 0
    config = str(artifact_of(env).parent / "config.env")
    for extra in ({}, {"TEMP_SCALING": "1"}, {"EVAL_SEQ_LEN": "40"}, {"ENV_FILE": config}):
        done = run_job({**data_of(env), **extra}, ["eval", str(artifact_of(env))])
        assert done.code == 0, done.err
    done = run_job({**data_of(env), "TRAIN_SEQ_LEN": "40"}, ["eval", str(artifact_of(env))])
    assert done.code == 2 and "TRAIN_SEQ_LEN=40 contradicts the artifact" in done.err


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MODEL_DIM", "64"), ("NUM_LAYERS", "3"), ("VOCAB_SIZE", "1024"), ("MATRIX_CODEC", "int8"), ("PRESET", "attn")],
)
def test_eval_refuses_what_contradicts_the_artifact(
    variable: str, value: str, run_job: Run, trained: dict[str, str]
) -> None:
    done = run_job({**data_of(trained), variable: value}, ["eval", str(artifact_of(trained))])
    if variable == "PRESET":  # the default preset is empty: it contradicts nothing
        assert done.code == 0, done.err
    else:
        assert done.code == 2 and variable in error_line(done.err)


def train_tokenizer(folder: Path, name: str, text: str) -> Path:
    """A sentencepiece model of 350 pieces."""
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / f"{name}.txt"), model_prefix=str(folder / name), vocab_size=350, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / f"{name}.model"


def test_eval_refuses_another_tokenizer(
    run_job: Run, tiny_env: dict[str, str], tmp_path: Path, byte_data: Path
) -> None:
    text = t.TokenStream(str(byte_data), "train", 256).read(0, 30_000)
    lines = t.ByteTokenizer().text_of(text.tolist()).replace(". ", ".\n")
    models = [train_tokenizer(tmp_path, name, words) for name, words in (("one", lines), ("two", lines.upper()))]
    tokens = np.array(sentencepiece.SentencePieceProcessor(model_file=str(models[0])).encode(lines), "<u2")
    header = np.zeros(256, "<i4")
    for split, part in (("train", tokens), ("val", tokens[:800])):
        header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(part)
        (tmp_path / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + part.tobytes())
    env = {**tiny_env, **SHORT, "VOCAB_SIZE": "350", "DATA_PATH": str(tmp_path), "TOKENIZER_PATH": str(models[0])}
    done = run_job(env)
    assert done.code == 0, done.err
    for model, code in ((models[0], 0), (models[1], 2)):
        scored = run_job({**data_of(env), "TOKENIZER_PATH": str(model)}, ["eval", str(artifact_of(env))])
        assert scored.code == code, scored.err
    assert "TOKENIZER_PATH" in error_line(scored.err)
    written = run_job(
        {**data_of(env), "TOKENIZER_PATH": str(models[0])}, ["generate", str(artifact_of(env)), "--prompt", "The"]
    )
    assert written.code == 0 and written.out.startswith("The"), written.err


def test_generate_continues_the_prompt(run_job: Run, trained: dict[str, str]) -> None:
    command = ["generate", str(artifact_of(trained)), "--prompt", "The café ", "--tokens", "12"]
    env = data_of(trained)
    first, again, other = (run_job(env, [*command, "--seed", seed]) for seed in ("1", "1", "2"))
    assert first.code == 0 and first.out.startswith("The café ") and first.err == "", first.err
    assert first.out == again.out and first.out != other.out
    greedy = [run_job(env, [*command, "--temperature", "0", "--seed", seed]).out for seed in ("1", "2")]
    assert greedy[0] == greedy[1]
    empty = run_job(env, ["generate", str(artifact_of(trained)), "--tokens", "3"])
    assert empty.code == 0, empty.err


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "foreign", "cut", "flipped"])
def test_unreadable_artifact_is_one_line(
    command: str, damage: str, run_job: Run, tiny_env: dict[str, str], tmp_path: Path
) -> None:
    path, good = tmp_path / "bad.pgz", small_artifact(tiny_env)
    contents = {"empty": b"", "foreign": b"#!/bin/sh\n" * 50, "cut": good[:-5], "flipped": good[:300] + good[301:]}
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    done = run_job(data_of(tiny_env), [command, str(path)])
    assert done.code == 2 and str(path) in error_line(done.err)


def small_artifact(env: dict[str, str]) -> bytes:
    """The artifact of an untrained model."""
    h = t.load_config({n: v for n, v in env.items() if n != "OUT_DIR"})
    rt = t.start_runtime(h)
    return t.write_artifact(h, t.coded_tensors(t.Weights(t.build_model(h, rt, 255))), {"tokenizer": "byte"}).data


def test_plan_needs_no_data(run_job: Run, tiny_env: dict[str, str]) -> None:
    done = run_job({**tiny_env, "DATA_PATH": "/nowhere"}, ["plan"])
    assert done.code == 0, done.err
    h = t.load_config(tiny_env)
    model = t.build_model(h, t.start_runtime(h), t.BYTE_BOS)
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        assert len(re.findall(rf"^{re.escape(name)} +{shape} ", done.out, re.MULTILINE)) == 1
    assert f"parameters:{sum(p.numel() for p in model.parameters())} " in done.out


def test_preflight_checks_and_leaves_nothing(run_job: Run, tiny_env: dict[str, str], tmp_path: Path) -> None:
    done = run_job(tiny_env, ["preflight"])
    assert done.code == 0 and done.out.endswith("preflight: ok\n"), done.err
    assert not Path(tiny_env["OUT_DIR"]).exists()
    for broken in (
        {"DATA_PATH": str(tmp_path / "none")},
        {"TRAIN_BATCH_TOKENS": str(2**20)},
        {"VOCAB_SIZE": "300", "TOKENIZER_PATH": str(tmp_path / "none.model")},
    ):
        failed = run_job({**tiny_env, **broken}, ["preflight"])
        assert failed.code == 2 and next(iter(broken)) in error_line(failed.err) or "TOKENIZER" in failed.err


def test_preflight_looks_at_every_token(
    run_job: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    """A damaged token that training would meet only after hours, or never."""
    folder = shutil.copytree(byte_data, tmp_path / "damaged")
    for split in ("train", "val"):
        path = sorted(folder.glob(f"fineweb_{split}_*.bin"))[-1]
        data = path.read_bytes()
        path.write_bytes(data[:-3] + b"\x07" + data[-2:])  # the high byte of the last token but one
        done = run_job({**tiny_env, "DATA_PATH": str(folder)}, ["preflight"])
        assert done.code == 2 and "VOCAB_SIZE=256" in error_line(done.err)
        path.write_bytes(data)


def test_preflight_refuses_a_disk_without_room_for_the_checkpoints(run_job: Run, tiny_env: dict[str, str]) -> None:
    done = run_job({**tiny_env, "KEEP_CHECKPOINTS": "1000000000"}, ["preflight"])
    assert done.code == 2 and "MiB free, checkpoints need" in error_line(done.err)


def test_bench_prints_one_object(run_job: Run, tiny_env: dict[str, str]) -> None:
    done = run_job(tiny_env, ["bench", "--steps", "3"])
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert min(result[name] for name in ("tokens_per_s", "forward_backward_s", "optimizer_s", "peak_memory_mib")) > 0
    assert not Path(tiny_env["OUT_DIR"]).exists()


# Run folders


def test_run_folder_is_not_used_twice(run_job: Run, trained: dict[str, str]) -> None:
    folder = artifact_of(trained).parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run_job({**trained, **SHORT, "SEED": "2"})
    assert done.code == 2 and "already holds a run" in error_line(done.err)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_failed_start_does_not_use_up_the_folder(run_job: Run, tiny_env: dict[str, str], tmp_path: Path) -> None:
    """Who mends a mistake and starts again must not be told that the folder already holds a run."""
    failed = run_job({**tiny_env, **SHORT, "DATA_PATH": str(tmp_path / "none")})
    assert failed.code == 2 and "DATA_PATH" in error_line(failed.err)
    again = run_job({**tiny_env, **SHORT})
    assert again.code == 0, again.err


def test_running_folder_is_locked(start_job: Run, run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **SHORT, "ITERATIONS": "1000000", "SAVE_EVERY": "5"}
    job = start_job(env)
    wait_for(artifact_of(env).parent / "checkpoints" / "latest")
    second = run_job({**env, "RESUME": "auto"})
    job.kill()
    assert second.code == 2 and str(job.pid) in error_line(second.err)
    job.wait()
    assert run_job({**env, "RESUME": "auto", "ITERATIONS": "8"}).code == 0  # a killed process holds no lock


def wait_for(path: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_out_dir_that_cannot_be_made_is_one_line(
    place: str, run_job: Run, tiny_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "below" if place == "below a file" else tmp_path / "file"
    done = run_job({**tiny_env, **SHORT, "OUT_DIR": str(out)})
    assert done.code == 2 and "OUT_DIR" in error_line(done.err)


def test_resume_auto_without_a_run_id_is_an_error(run_job: Run, tiny_env: dict[str, str]) -> None:
    """The default run folder is new, so there is nothing to resume: training silently from scratch would be a trap."""
    done = run_job({**{n: v for n, v in tiny_env.items() if n != "RUN_ID"}, **SHORT, "RESUME": "auto"})
    assert done.code == 2 and "RUN_ID" in error_line(done.err)


def test_token_outside_the_vocabulary_is_one_line(
    run_job: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    """Found when the loader's thread reads it, in the middle of a run."""
    folder = shutil.copytree(byte_data, tmp_path / "damaged")
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * 1000 + 1] = 7  # token 1000 becomes 7 * 256 + something
    path.write_bytes(data)
    done = run_job({**tiny_env, **SHORT, "DATA_PATH": str(folder)})
    assert done.code == 2 and "VOCAB_SIZE" in error_line(done.err)


# Schedules


def test_time_bound_run_ends_before_its_limit(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    done = run_job({**tiny_env, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "3", "TRAIN_LOG_EVERY": "1"})
    assert done.code == 0, done.err
    folder = artifact_of(tiny_env).parent
    (final,) = read_metrics(folder, "final")
    assert 2.0 < final["train_time_s"] <= 3.05  # a busy machine can stop any step for a moment
    rates = [found["rate_scale"] for found in read_metrics(folder, "train")]
    assert rates[0] == 1.0 and rates[-1] < 0.2 and rates == sorted(rates, reverse=True)


def test_time_for_fitting_does_not_eat_the_training(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """A short run with the default reserve for fitting is refused, or trains for most of its time: not for one step."""
    env = {**tiny_env, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "2", "TEMP_SCALING": "1", "MAX_VAL_TOKENS": "300"}
    done = run_job(env)
    if done.code == 2:
        assert "MAX_WALLCLOCK_SECONDS" in error_line(done.err)
    else:
        (final,) = read_metrics(artifact_of(env).parent, "final")
        assert done.code == 0 and 1.0 < final["train_time_s"] <= 2.05
    with_reserve = run_job({**env, "RUN_ID": "reserve", "CALIB_MAX_SECONDS": "0.5"})
    assert with_reserve.code == 0, with_reserve.err
    (final,) = read_metrics(artifact_of({**env, "RUN_ID": "reserve"}).parent, "final")
    assert 1.2 < final["train_time_s"] <= 2.05


def test_temperature_is_fitted_within_a_small_reserve(run_job: Run, tiny_env: dict[str, str]) -> None:
    """The reserve is the time for fitting, however small a share of the run it is; without time nothing is claimed."""
    env = {**tiny_env, "TEMP_SCALING": "1", "HOLDOUT_TOKENS": "2048", "ITERATIONS": "4", "MAX_VAL_TOKENS": "300"}
    plenty = run_job({**env, "MAX_WALLCLOCK_SECONDS": "1000", "CALIB_MAX_SECONDS": "30"})
    assert "fitted on held-out" in plenty.out and "temperature:1.0000" not in plenty.out
    h = t.load_config({**env, "CALIB_MAX_SECONDS": "1", "MAX_WALLCLOCK_SECONDS": "9"})
    model, rt = t.build_model(h, t.start_runtime(h), t.BYTE_BOS), t.start_runtime(h)
    for each in (0.0, 0.01, 0.1, 0.3, 0.6, 2.0):  # seconds that pass at each look at the clock
        clock = itertools.count(8.0, each)
        last = [8.0]

        def seconds(clock: Iterator[float] = clock, last: list[float] = last) -> float:
            last[0] = next(clock)
            return last[0]

        tau = t.fit_temperature(h, rt, model, t.read_holdout(h), seconds, 9.0)
        assert (tau is None) == (each > 0.1) and last[0] <= 9.0 + 2 * each


def test_metrics_of_parts_reach_the_metrics_file(
    monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """What a mixer and a residual topology measure is written beside the loss, and auxiliary losses are trained on."""

    class Measuring(t.Attention):
        def forward(self, x: torch.Tensor, ctx: t.Ctx, state: Any) -> t.Out:
            out = super().forward(x, ctx, state)
            metrics = {"size": out.y.detach().norm()} if ctx.variant.measures else {}
            return out._replace(metrics=metrics, losses={"small": self.q_gain.square().sum()})

    class Watched(t.PlainResidual):
        def close(self, r: t.Stream) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return r.lanes[0], {"width": torch.tensor(float(r.x0.shape[-1]))}

    monkeypatch.setitem(t.SITE_KINDS, "attn", Measuring)
    monkeypatch.setitem(t.RESIDUALS, "plain", Watched)
    h = t.load_config({**tiny_env, **SHORT, "RESIDUAL": "plain", "DIAG_EVERY": "3"})
    assert t.train(h, t.start_runtime(h)) == 0
    measured = read_metrics(artifact_of(tiny_env).parent, "diagnostics")
    assert [found["step"] for found in measured] == [3, 6]
    for found in measured:
        assert found["residual.width"] == 32 and {"0.attn.size", "1.attn.size"} <= found.keys()
        assert 0 < found["zeros"] < 1 and 0 <= found["churn"] < 1 and found["gradient_to_weight.matrix"] > 0
    assert found["0.attn.size"] > 0, "after six steps the branch is no longer zero"


class FakeTime:
    """A clock that only steps move, so that tests of the time limit depend on no machine."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def simulated_run(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], cost: Callable[[int, int], float], state: t.TrainState
) -> list[float]:
    """The real training loop with steps of cost(step, tokens) seconds on a fake clock; the rates of its steps."""
    clock, rates, tokens = FakeTime(), list[float](), [0]
    h = t.load_config({**env, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "10"})
    s = t.open_session(h, t.start_runtime(h), Path(h.out_dir), t.Log(None, False))
    read = s.loader.next

    def reading(rows: int, seq: int) -> t.Batch:
        tokens[0] = rows * seq
        return read(rows, seq)

    def stepping(rate: float, *_: object) -> dict[str, torch.Tensor]:
        rates.append(rate)
        assert len(rates) < 1000, "the limit is never reached"
        clock.now += cost(state.step, tokens[0])
        return {}

    def passing(*_: object) -> None:  # validation and checkpoints, out of the clock
        clock.now += 17.0

    monkeypatch.setattr(t, "time", clock)
    monkeypatch.setattr(s.loader, "next", reading)
    monkeypatch.setattr(s.optimizer, "step", stepping)
    monkeypatch.setattr(t, "report_validation", passing)
    monkeypatch.setattr(t, "save_checkpoint", passing)
    t.train_loop(s, state)
    return rates


def test_steps_of_constant_length_fill_the_time(monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]) -> None:
    """Validation and checkpoints cost no training time, and the schedule ends at its floor."""
    state, env = t.TrainState(), {**tiny_env, "LR_FLOOR": "0.01", "VAL_LOSS_EVERY": "3", "SAVE_EVERY": "7"}
    rates = simulated_run(monkeypatch, env, lambda step, tokens: 0.1, state)
    assert 9.5 <= state.seconds <= 10.0
    assert rates[0] == 1.0 and 0.01 <= rates[-1] < 0.08


@pytest.mark.parametrize("growth", [1.0, 1.2])
def test_limit_holds_when_steps_vary(growth: float, monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]) -> None:
    """Steps that jitter and get slower: the end must still be before the limit."""
    choose, state = np.random.default_rng(0), t.TrainState()
    costs = [0.1 * choose.uniform(0.85, 1.0) * (growth if step > 60 else 1.0) for step in range(200)]
    simulated_run(monkeypatch, tiny_env, lambda step, tokens: costs[step], state)
    assert 9.0 <= state.seconds <= 10.0


def test_limit_holds_across_a_batch_stage(monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]) -> None:
    """The first step of a four times larger batch takes four times as long, which no step before it has shown."""
    state, env = t.TrainState(), {**tiny_env, "BATCH_STAGES": "0:64,0.97:256"}
    simulated_run(monkeypatch, env, lambda step, tokens: 0.1 * tokens / 64, state)
    assert 9.4 <= state.seconds <= 10.0


def test_rank_with_a_fast_clock_goes_by_the_agreed_one(
    monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]
) -> None:
    """Its rates must be rank 0's, or its weights would be others: at rank 0's 5 of 10 seconds the fall begins."""
    monkeypatch.setattr(t, "agree", lambda rt, seconds, *rest: (seconds / 2, *(0.4 for _ in rest[:1]), *rest[1:]))
    rates = simulated_run(monkeypatch, tiny_env, lambda step, tokens: 0.4, t.TrainState())
    assert 46 <= len(rates) <= 50
    assert rates[:25] == [1.0] * 25 and 0.4 < rates[37] < 0.6 and 0 < rates[-1] < 0.2


def test_resumed_run_keeps_its_limit_and_schedule(monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]) -> None:
    """The rates go on where the elapsed time is; what had no time for one more step has none after a resume."""
    saved = t.TrainState()
    simulated_run(monkeypatch, tiny_env, lambda step, tokens: 0.1, saved)
    monkeypatch.undo()
    ended, steps = dataclasses.replace(saved, seconds=9.95), saved.step
    assert simulated_run(monkeypatch, tiny_env, lambda step, tokens: 0.1, ended) == []
    monkeypatch.undo()
    middle = dataclasses.replace(saved, seconds=7.5)
    rates = simulated_run(monkeypatch, tiny_env, lambda step, tokens: 0.1, middle)
    assert rates[0] == pytest.approx(0.5) and 9.5 <= middle.seconds <= 10.0 and middle.step == steps + len(rates)


def test_each_step_gets_its_own_point_of_the_schedules(
    monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]
) -> None:
    """Rate and momentum of the step's start, averaging from its fraction on, the quantizer's progress one step on."""
    bounds = {"ITERATIONS": "8", "MAX_WALLCLOCK_SECONDS": "0", "WARMDOWN_FRACTION": "0.5", "VAL_LOSS_EVERY": "0"}
    momentum = {"MUON_MOMENTUM": "0.9", "MUON_MOMENTUM_WARMUP_START": "0.8", "MUON_MOMENTUM_WARMUP_STEPS": "4"}
    h, steps = t.load_config({**tiny_env, **AVERAGE, **bounds, **momentum}), list[tuple]()
    s = t.open_session(h, t.start_runtime(h), Path(h.out_dir), t.Log(None, False))
    monkeypatch.setattr(s.optimizer, "step", lambda *told: steps.append(told[:4]) or {})
    t.train_loop(s, t.TrainState())
    rates, momenta, averages, ahead = zip(*steps, strict=True)
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert momenta == pytest.approx([0.8, 0.825, 0.85, 0.875, 0.9, 0.9, 0.9, 0.9])
    assert averages == (False, False, True, True, True, True, True, True)
    assert ahead == pytest.approx([step / 8 for step in range(1, 9)])


def test_all_schedules_run_together(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """Batch stages, extension, averaging, late head, late ternary, warm-up, clipping, accumulation; each is seen."""
    stages = {"BATCH_STAGES": "0:64,0.25:128,0.75:256", "ITERATIONS": "12", "EXTENSION_STEPS": "3", "LR_FLOOR": "0.1"}
    rest = {"LR_WARMUP_FRACTION": "0.3", "GRAD_CLIP_NORM": "1", "MICRO_BATCH_TOKENS": "96", "SAVE_EVERY": "4"}
    env = {**tiny_env, **stages, **rest, **AVERAGE, **LATE_HEAD, "TERNARY_START_FRACTION": "0.5"}
    done = run_job({**env, "TRAIN_LOG_EVERY": "1", "VAL_LOSS_EVERY": "5"})
    assert done.code == 0, done.err
    folder = artifact_of(env).parent
    train = read_metrics(folder, "train")
    assert [found["step"] for found in train] == list(range(1, 16))
    rates = [found["rate_scale"] for found in train]  # of the step to come
    assert rates[0] < rates[1] < rates[2] and rates[12:] == [0.1, 0.1, 0.1]
    tokens = [found["tokens_per_s"] * found["step_time_s"] for found in train]
    assert tokens == pytest.approx([64] * 3 + [128] * 6 + [256] * 6, rel=0.01)
    assert "step:6 from here on: untied" in done.out and "averaged:1" in done.out
    assert [found["step"] for found in read_metrics(folder, "val")] == [5, 10, 15]
    (final,), (speed,) = read_metrics(folder, "final"), re.findall(r"^training .* (\d+) tok/s", done.out, re.MULTILINE)
    assert int(speed) == pytest.approx(sum(tokens) / final["train_time_s"], rel=0.05)
    _, weights = t.read_artifact(str(artifact_of(env)))
    assert np.abs(weights["head.weight"] - weights["embed.weight"]).max() > 1e-3


def test_streams_carry_and_schedules_together(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **STREAMS, **AVERAGE, **LATE_HEAD, "CARRY_EVAL": "1", "VALUE_RESIDUAL": "1", "DOC_MASK": "1"}
    done = run_job({**env, "MICRO_BATCH_TOKENS": "96", "EXTENSION_STEPS": "2", "SAVE_EVERY": "3"})
    assert done.code == 0, done.err


# Training itself


@pytest.mark.parametrize("extra", [{}, {**STREAMS, **LATE_HEAD}, {**STAGES, "GRAD_CLIP_NORM": "0.3"}])
def test_accumulation_changes_nothing(
    extra: dict[str, str], run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """256 tokens a step in one pass, in eight, and in uneven ones of three windows."""
    losses = []
    for micro in ("256", "32", "96"):
        env = {**tiny_env, **extra, "RUN_ID": micro, "MICRO_BATCH_TOKENS": micro, "PRECISION": "fp64"}
        assert run_job({**env, "TRAIN_LOG_EVERY": "1", "SAMPLE_TOKENS": "0"}).code == 0
        objects = read_metrics(artifact_of(env).parent)
        losses.append([x[k] for x in objects for k in ("train_loss_nats", "val_loss_nats") if k in x])
    assert len(losses[0]) >= 22
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("codec", ["ternary", "bf16"])
def test_training_learns(
    codec: str, run_job: Run, tiny_env: dict[str, str], byte_data: Path, read_metrics: Callable
) -> None:
    """Below the entropy of single bytes, and close to that of pairs, after 100 steps of 512 tokens."""
    env = {**tiny_env, "MATRIX_CODEC": codec, "ITERATIONS": "100", "TRAIN_BATCH_TOKENS": "512", "TRAIN_LOG_EVERY": "50"}
    assert run_job(env).code == 0
    (final,) = read_metrics(artifact_of(env).parent, "final")
    train, val = (t.TokenStream(str(byte_data), split, 256) for split in ("train", "val"))
    counts = np.bincount(train.read(0, train.tokens), minlength=256) + 0.01
    unigram = -np.log(counts / counts.sum())[val.read(0, val.tokens)].mean()
    assert final["val_loss_nats"] < unigram - 0.8
    assert final["val_bpb"] == pytest.approx(final["val_loss_nats"] / math.log(2), rel=0.02)


def test_a_step_sees_the_tokens_before_its_rows(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """Each pass over some rows of a batch gets the history of those rows."""
    variables = {
        "INDUCTION_ORDERS": "1,2",
        "BIGRAM_HASH_BUCKETS": "64",
        "MICRO_BATCH_TOKENS": "96",
        "PRECISION": "fp64",
    }
    h = t.load_config({**tiny_env, **variables})
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    generator = torch.Generator().manual_seed(0)
    for parameter in s.model.parameters():
        parameter.detach().normal_(0.0, 0.2, generator=generator)
    s.loader.next(8, 32)  # its first row has nothing before it
    batch = s.loader.next(8, 32)
    total = t.make_step(s)(batch, t.TrainState(), 0.0).nats
    losses = [
        s.model.loss(batch.tokens, batch.targets, t.Variant(), state).total.item()
        for state in (s.model.start_state(batch.history), None)
    ]
    assert total.item() == pytest.approx(losses[0], rel=1e-12)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_seed_decides_the_run(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    losses = {}
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        env = {**tiny_env, **SHORT, "RUN_ID": run, "SEED": seed, "TRAIN_LOG_EVERY": "1"}
        assert run_job(env).code == 0
        losses[run] = [found["train_loss_nats"] for found in read_metrics(artifact_of(env).parent, "train")]
    assert losses["a"] == losses["b"] and losses["a"] != losses["c"]


def test_diverged_run_still_writes_valid_metrics(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """NaN is not JSON; readers of metrics.jsonl in other languages stop at it."""
    env = {**tiny_env, **SHORT, "SCALAR_LR": "1e30", "MATRIX_CODEC": "bf16", "SCALAR_CODEC": "bf16"}
    done = run_job(env)
    assert done.code == 0 or done.err.startswith("error: "), done.err
    assert "Traceback" not in done.err
    assert read_metrics(artifact_of(env).parent, "train")


def test_warmup_steps_leave_no_trace(tiny_env: dict[str, str]) -> None:
    """Weights, averages, moments and data position are those before, also when a run is resumed in its middle."""
    h = t.load_config({**tiny_env, **LATE_HEAD, **AVERAGE, "WARMUP_STEPS": "3", "COMPILE": "auto"})
    s = t.open_session(h, t.start_runtime(h), Path(h.out_dir), t.Log(None, False))
    step, state = t.make_step(s), t.TrainState()
    for _ in range(3):
        step(s.loader.next(8, 32), state, 0.0)
        s.optimizer.step(1.0, 0.9, True, 0.0)
        s.weights.clear_gradients()
    before = snapshot(s)
    t.compile_warmup(s, step, state)
    after = snapshot(s)
    assert before.keys() == after.keys()
    assert before.pop("position") == after.pop("position")
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def snapshot(s: t.Session) -> dict[str, Any]:
    """Everything a warm-up step could change."""
    found: dict[str, Any] = {"position": s.loader.position}
    for name, parameter in s.model.named_parameters():
        found[name] = parameter.detach().clone()
        assert parameter.grad is None
    for key, bank in s.weights.banks.items():
        found[key + " latent"] = bank.latent.clone()
        found.update({f"{key} {name}": moment.clone() for name, moment in bank.state.items()})
    return found


@pytest.mark.slow  # a minute each: that a preset of full size works and fits is not seen at any other size
@pytest.mark.parametrize("preset", ["skc", "skc_proxy", "hybrid", "hc"])
def test_preset_of_full_size_trains_exports_within_its_limit_and_reloads(preset: str) -> None:
    """Two real optimizer steps on 1 x 256 tokens; the packed bound is of any weights, so trained ones fit, too."""
    h = t.load_config({"PRESET": preset, "DEVICE": "cpu", "COMPILE": "0", "PRECISION": "fp32"})
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, 1)
    weights = t.Weights(model)
    weights.materialize(0.0)
    optimizer, generator = t.Optimizer(h, rt, weights), torch.Generator().manual_seed(0)
    tokens = torch.randint(2, h.vocab_size, (1, 257), generator=generator)
    losses = []
    for step in range(2):
        moment = t.Moment(torch.tensor(0.5), torch.tensor(step), torch.arange(1))
        out = model.loss(tokens[:, :-1], tokens[:, 1:], t.final_variant(h), None, moment)
        ((out.total / 256) + sum(out.losses.values(), torch.zeros(()))).backward()
        optimizer.step(1.0, 0.9, False, 0.5)
        weights.clear_gradients()
        losses.append(float(out.total.detach()) / 256)
    artifact = t.write_artifact(h, t.coded_tensors(weights), {})
    budget = t.account(h, len(artifact.data))
    print(preset, budget, artifact.table)
    assert losses[1] < losses[0] and budget.total_bytes <= budget.budget_bytes
    assert sum(weights.packed_bytes().values()) + budget.code_bytes <= budget.budget_bytes
    _, arrays = t.decode_artifact(artifact.data)
    again = t.build_model(h, rt, 1, fill=False)
    t.load_weights(again, arrays)
    scores = []
    for network in (model, again):
        table = t.ByteTable(np.ones(h.vocab_size, np.int64), *[np.zeros(h.vocab_size, bool)] * 2)
        scores.append(t.Scorer(h, rt, network, table).score(tokens[0].numpy()).loss)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_memory_of_adapters_is_told_before_the_final_score(run_job: Run, tiny_env: dict[str, str]) -> None:
    done = run_job({**tiny_env, "ITERATIONS": "1", "NGRAM_CACHE": "1", "SAMPLE_TOKENS": "0"})
    told = done.out.splitlines()
    (memory,) = (i for i, line in enumerate(told) if "MiB for" in line)
    assert done.code == 0 and memory < next(i for i, line in enumerate(told) if line.startswith("final_roundtrip "))
