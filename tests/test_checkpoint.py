"""Section 13 (CHECKPOINT): a run that is killed at any moment and resumed ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SKC_KINDS, TOPOLOGIES

import train_gpt as t

Run = Callable  # a fixture of conftest.py that starts commands

BASE = {"ITERATIONS": "12", "SAVE_EVERY": "3", "TRAIN_LOG_EVERY": "1", "MAX_VAL_TOKENS": "600", "SAMPLE_TOKENS": "0"}
AVERAGE = {"EMA_DECAY": "0.8", "EMA_START_FRACTION": "0.25"}
LATE_HEAD = {"UNTIE_AT_FRACTION": "0.5"}
# Each with something in its state that a checkpoint could forget, and switches exactly at a checkpoint (step 6 of 12).
KINDS: dict[str, dict[str, str]] = {
    "ternary": {},
    "ema, late head, stages, extension": {
        **AVERAGE, **LATE_HEAD, "BATCH_STAGES": "0:128,0.5:256", "EXTENSION_STEPS": "3", "LR_FLOOR": "0.2",
    },
    "streams, carry": {
        **AVERAGE, **LATE_HEAD, "BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1",
        "MICRO_BATCH_TOKENS": "96", "DOC_MASK": "1",
    },
    "documents": {"BATCH_MODE": "documents", "GRAD_CLIP_NORM": "0.5", "MUON_WD": "0.1", "ADAM_WD": "0.1"},
    "tables, induction": {
        **AVERAGE, "BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_DIM": "8", "BIGRAM_HASH_ORDERS": "2,3",
        "INDUCTION_ORDERS": "1,2", "INDUCTION_WINDOW": "40",
    },
    "streams, carry, induction": {
        "BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "CARRY_EVAL": "1", "INDUCTION_ORDERS": "1,2",
        "INDUCTION_WINDOW": "40", "INDUCTION_COUNT": "3",
    },
    "ternary from the middle": {"TERNARY_START_FRACTION": "0.5"},
    "ternary between two steps": {"TERNARY_START_FRACTION": "0.49"},
    "warm-down by steps": {"WARMDOWN_ITERS": "5", "LR_WARMUP_FRACTION": "0.4", "MATRIX_CODEC": "int8"},
    "float64": {"PRECISION": "fp64", **AVERAGE},
    "bf16": {"PRECISION": "bf16", **AVERAGE},
    **SKC_KINDS,
    **TOPOLOGIES,
}  # fmt: skip


def folder_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"]


def error_line(text: str) -> str:
    """The one line that a mistake of the user's is answered with (torch may warn of foreign files before)."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def check_latest(folder: Path) -> None:
    """`latest` names a checkpoint that loads, at whatever moment the run was killed."""
    latest = folder / "checkpoints" / "latest"
    if latest.exists():
        tree = torch.load(folder / "checkpoints" / latest.read_text(), weights_only=True)
        assert f"step_{tree['step']:07d}.pt" == latest.read_text()


def undisturbed(run_job: Run, env: dict[str, str]) -> bytes:
    """The artifact of a run that nothing stops."""
    whole = {**env, "RUN_ID": "whole"}
    if not folder_of(whole).exists():
        done = run_job(whole)
        assert done.code == 0, done.err
    return (folder_of(whole) / "model.pgz").read_bytes()


def check_resumed(run_job: Run, env: dict[str, str], wanted: bytes) -> None:
    """The killed run's folder is sound, and resuming it ends with the wanted artifact."""
    check_latest(folder_of(env))
    done = run_job({**env, "RESUME": "auto"})
    assert done.code == 0, done.err
    assert (folder_of(env) / "model.pgz").read_bytes() == wanted
    check_latest(folder_of(env))


def start_from(env: dict[str, str], name: str) -> None:
    """Put the state of the undisturbed run at one of its checkpoints into a new run folder."""
    source, target = folder_of({**env, "RUN_ID": "whole"}), folder_of(env)
    (target / "checkpoints").mkdir(parents=True)
    shutil.copy(source / "checkpoints" / name, target / "checkpoints" / name)
    (target / "checkpoints" / "latest").write_text(name)


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_every_checkpoint_ends_with_the_same_bytes(
    kind: str, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **BASE, **KINDS[kind], "KEEP_CHECKPOINTS": "9"}
    wanted = undisturbed(run_job, env)
    whole = folder_of({**env, "RUN_ID": "whole"})
    names = sorted(path.name for path in (whole / "checkpoints").glob("step_*.pt"))
    last = int(env["ITERATIONS"]) + int(env.get("EXTENSION_STEPS", "0"))
    assert [int(name[5:-3]) for name in names] == [*range(3, last, 3), last]
    losses = {found["step"]: found["train_loss_nats"] for found in read_metrics(whole, "train")}
    for name in names:
        again = {**env, "RUN_ID": name}
        start_from(again, name)
        check_resumed(run_job, again, wanted)
        for found in read_metrics(folder_of(again), "train"):
            assert found["train_loss_nats"] == losses[found["step"]], found["step"]


def test_killed_at_every_disk_call(run_job: Run, tiny_env: dict[str, str]) -> None:
    """SIGKILL just before each fsync, rename and deletion of the whole run, one run for each, until none is left."""
    env = {**tiny_env, **BASE, **AVERAGE, "ITERATIONS": "4", "SAVE_EVERY": "2", "KEEP_CHECKPOINTS": "1"}
    wanted, number, killed = undisturbed(run_job, env), 0, True
    while killed:
        number += 1
        again = {**env, "RUN_ID": f"call{number}"}
        done = run_job(again, hook=("kill_at_disk_call", number))
        killed = done.code == -9
        assert killed or done.code == 0, done.err
        check_resumed(run_job, again, wanted)
    assert number > 14  # config.env, script, two checkpoints with `latest`, artifact: two calls each; a deletion


@pytest.mark.parametrize("name", ["step_0000006.pt.tmp", "latest.tmp", "model.pgz.tmp", "config.env.tmp"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_killed_in_the_middle_of_a_file(name: str, share: float, run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE}
    wanted = undisturbed(run_job, env)
    done = run_job(env, hook=("kill_in_write", name, share))
    assert done.code == -9 and list(folder_of(env).rglob(name)), done.err
    check_resumed(run_job, env, wanted)


@pytest.mark.parametrize("kind", ["ternary", "ema, late head, stages, extension", "streams, carry"])
def test_killed_again_and_again_by_others(kind: str, start_job: Run, run_job: Run, tiny_env: dict[str, str]) -> None:
    """A real SIGKILL from outside: after the first metrics line, then after random times, until one run ends."""
    env = {**tiny_env, **BASE, **KINDS[kind], "ITERATIONS": "30", "SAVE_EVERY": "1"}
    wanted, choose = undisturbed(run_job, env), random.Random(kind)
    job = start_job(env)
    wait_for(lambda: b'"train"' in read_if_there(folder_of(env) / "metrics.jsonl") or job.ended())
    job.kill()
    codes = [job.wait().code]
    while codes[-1] != 0 and len(codes) < 12:
        check_latest(folder_of(env))
        before = latest_step(env)
        job = start_job({**env, "RESUME": "auto"})
        wait_for(partial(has_moved, env, before, job))
        time.sleep(choose.uniform(0, 0.15))  # the moment of death is what is tested
        job.kill()
        codes.append(job.wait().code)
    assert codes[0] == -9 and set(codes) <= {-9, 0}
    check_resumed(run_job, env, wanted)


def test_killed_as_soon_as_a_checkpoint_or_the_artifact_appears(
    start_job: Run, run_job: Run, tiny_env: dict[str, str]
) -> None:
    env = {**tiny_env, **BASE, "SAVE_EVERY": "1"}
    wanted = undisturbed(run_job, env)
    for pattern in ("checkpoints/step_*.pt.tmp", "checkpoints/step_0000005.pt", "model.pgz.tmp", "model.pgz"):
        again = {**env, "RUN_ID": pattern.replace("/", "_").replace("*", "any")}
        job = start_job(again)
        wait_for(partial(has_file, folder_of(again), pattern, job))
        job.kill()
        assert job.wait().code in (-9, 0)
        check_resumed(run_job, again, wanted)


def read_if_there(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def latest_step(env: dict[str, str]) -> int:
    """Step of the newest checkpoint, or -1."""
    name = read_if_there(folder_of(env) / "checkpoints" / "latest").decode()
    return int(name[5:-3]) if name else -1


def has_moved(env: dict[str, str], before: int, job: Any) -> bool:
    """Whether a job has written a newer checkpoint, or has ended."""
    return latest_step(env) > before or job.ended()


def has_file(folder: Path, pattern: str, job: Any) -> bool:
    """Whether a job has written such a file, or has ended."""
    return any(folder.glob(pattern)) or job.ended()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "what was waited for did not come"
        time.sleep(0.001)


def test_finished_run_resumes_to_itself(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    env = {**tiny_env, **BASE, **AVERAGE, "RUN_ID": "whole"}
    wanted = undisturbed(run_job, env)
    check_resumed(run_job, env, wanted)
    finals = read_metrics(folder_of(env), "final")
    assert finals[0]["val_loss_nats"] == finals[1]["val_loss_nats"] and finals[1]["step"] == 12


def test_resumed_run_can_go_on_longer(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """More ITERATIONS than the checkpoint's run had: the steps continue from there."""
    env = {**tiny_env, **BASE, "RUN_ID": "whole"}
    undisturbed(run_job, env)
    done = run_job({**env, "RESUME": "auto", "ITERATIONS": "15"})
    assert done.code == 0, done.err
    assert [found["step"] for found in read_metrics(folder_of(env), "train")][12:] == [13, 14, 15]


def test_resume_from_a_path_into_a_new_folder(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE}
    wanted = undisturbed(run_job, {**env, "KEEP_CHECKPOINTS": "9"})
    path = folder_of({**env, "RUN_ID": "whole"}) / "checkpoints" / "step_0000006.pt"
    done = run_job({**env, "RESUME": str(path)})
    assert done.code == 0 and f"resumed {path} at step:6" in done.out, done.err
    assert (folder_of(env) / "model.pgz").read_bytes() == wanted


def test_time_bound_run_continues_from_the_elapsed_time(
    start_job: Run, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **BASE, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "3", "SAVE_EVERY": "10"}
    job = start_job(env)
    wait_for(lambda: latest_step(env) >= 20 or job.ended())
    job.kill()
    assert job.wait().code == -9
    name = (folder_of(env) / "checkpoints" / "latest").read_text()
    saved = torch.load(folder_of(env) / "checkpoints" / name, weights_only=True)
    done = run_job({**env, "RESUME": "auto"})
    assert done.code == 0, done.err
    (at,) = (i for i, x in enumerate(read_metrics(folder_of(env))) if x["kind"] == "resume")
    later = [x for x in read_metrics(folder_of(env))[at:] if x["kind"] == "train"]
    assert later[0]["step"] == saved["step"] + 1 and later[0]["train_time_s"] > saved["seconds"]
    assert later[0]["rate_scale"] == pytest.approx(min(1.0, 2 * (1 - later[0]["train_time_s"] / 3)), abs=0.02)
    (final,) = read_metrics(folder_of(env), "final")
    assert 2.0 < final["train_time_s"] <= 3.05 and later[-1]["rate_scale"] < 0.2


def test_finished_time_bound_run_resumes_to_itself(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """There was no time for one more step, so there is none now."""
    env = {**tiny_env, **BASE, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "1", "SAVE_EVERY": "0", "RUN_ID": "whole"}
    wanted = undisturbed(run_job, env)
    check_resumed(run_job, env, wanted)
    first, second = read_metrics(folder_of(env), "final")
    assert first["train_time_s"] == pytest.approx(second["train_time_s"], abs=0.01)
    assert first["step"] == second["step"] and first["val_loss_nats"] == second["val_loss_nats"]


# What is kept


@pytest.mark.parametrize(
    ("keep", "every", "left"), [("1", "0", [7]), ("2", "0", [6, 7]), ("2", "3", [3, 6, 7]), ("99", "0", [*range(1, 8)])]
)
def test_keep_checkpoints(keep: str, every: str, left: list[int], run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE, "ITERATIONS": "7", "SAVE_EVERY": "1", "KEEP_CHECKPOINTS": keep, "KEEP_EVERY": every}
    assert run_job(env).code == 0
    folder = folder_of(env) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *(f"step_{step:07d}.pt" for step in left)]


def test_newest_checkpoint_is_kept_even_if_it_is_not_the_furthest(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """A run that was taken back to an older file goes on in a folder of later steps."""
    h = t.load_config({**tiny_env, "KEEP_CHECKPOINTS": "1", "RESUME": "auto"})
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    for step in (9, 4):
        t.save_checkpoint(h, s.rt, tmp_path, t.TrainState(step=step), s.weights)
    path = t.find_checkpoint(h, tmp_path)
    assert path is not None and path.name == "step_0000004.pt" and path.is_file()


def test_last_checkpoint_is_written_without_save_every(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE, "SAVE_EVERY": "0"}
    assert run_job(env).code == 0
    assert sorted(path.name for path in (folder_of(env) / "checkpoints").iterdir()) == ["latest", "step_0000012.pt"]


@pytest.mark.parametrize("call", range(3, 8))
def test_full_disk_is_one_line_and_harms_nothing(call: int, run_job: Run, tiny_env: dict[str, str]) -> None:
    """Each write of a checkpoint and its pointer fails once, and costs no more than that; when the artifact's fails,
    the run resumes to the same bytes."""
    env = {**tiny_env, **BASE, "ITERATIONS": "4", "SAVE_EVERY": "2"}
    wanted = undisturbed(run_job, env)
    done = run_job(env, hook=("fail_disk_call", call, 28))
    assert not list(folder_of(env).rglob("*.tmp"))
    if call < 7:
        assert done.code == 0 and done.out.count("No space left on device") == 1, done.err
        assert (folder_of(env) / "model.pgz").read_bytes() == wanted
    else:
        assert done.code == 2 and "No space left on device" in error_line(done.err)
        check_resumed(run_job, env, wanted)


def test_checkpoints_that_cannot_be_kept_cost_a_warning(run_job: Run, tiny_env: dict[str, str]) -> None:
    folder_of(tiny_env).mkdir(parents=True)
    (folder_of(tiny_env) / "checkpoints").write_text("in the way")
    done = run_job({**tiny_env, **BASE, "ITERATIONS": "3"})
    assert done.code == 0 and "warning: " in done.out and "checkpoints" in done.out
    assert (folder_of(tiny_env) / "model.pgz").is_file()


def test_files_of_others_among_checkpoints_are_left_alone(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE, "SAVE_EVERY": "2", "KEEP_CHECKPOINTS": "1", "KEEP_EVERY": "8"}
    folder = folder_of(env) / "checkpoints"
    folder.mkdir(parents=True)
    mine = {"step_best.pt", "step_0000000_copy.pt", "step_12.pt"}
    for name in mine:
        (folder / name).write_text("mine")
    assert run_job(env).code == 0
    assert {path.name for path in folder.iterdir()} == {*mine, "latest", "step_0000008.pt", "step_0000012.pt"}


def test_average_that_is_no_longer_kept_is_dropped(run_job: Run, tiny_env: dict[str, str]) -> None:
    """A run resumed with EMA_DECAY=0 exports its own weights, not an average that stood still."""
    env = {**tiny_env, **BASE, "EMA_DECAY": "0.9", "EMA_START_FRACTION": "0", "ITERATIONS": "4"}
    done = run_job(env)
    assert done.code == 0 and "averaged:1" in done.out
    done = run_job({**env, "EMA_DECAY": "0", "ITERATIONS": "8", "RESUME": "auto"})
    assert done.code == 0 and "averaged:0" in done.out


# What is refused


@pytest.fixture
def saved(run_job: Run, tiny_env: dict[str, str]) -> dict[str, str]:
    """The environment of a run with a checkpoint at step 3."""
    env = {**tiny_env, **BASE, "ITERATIONS": "3"}
    assert run_job(env).code == 0
    return {**env, "ITERATIONS": "4"}


def checkpoint_of(env: dict[str, str]) -> Path:
    return folder_of(env) / "checkpoints" / "step_0000003.pt"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_checkpoint_is_one_line(share: float, run_job: Run, saved: dict[str, str]) -> None:
    data = checkpoint_of(saved).read_bytes()
    checkpoint_of(saved).write_bytes(data[: int(len(data) * share)])
    done = run_job({**saved, "RESUME": "auto"})
    assert done.code == 2 and checkpoint_of(saved).name in error_line(done.err)


def test_resume_on_other_data_or_tokenizer_is_told(
    run_job: Run, saved: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(byte_data, tmp_path / "other")
    (folder / "fineweb_train_000000.bin").write_bytes((folder / "fineweb_train_000001.bin").read_bytes())
    done = run_job({**saved, "RESUME": "auto", "DATA_PATH": str(folder)})
    assert done.code == 0 and "was trained on other data than DATA_PATH" in done.out, done.err
    tree = torch.load(checkpoint_of(saved), weights_only=True)
    tree["prints"]["tokenizer"] = "0" * 64
    torch.save(tree, checkpoint_of(saved))
    done = run_job({**saved, "RESUME": str(checkpoint_of(saved))})
    assert done.code == 2 and "another tokenizer" in error_line(done.err)


class Evil:
    """Pickled, this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def zip_with_pickle(path: Path, source: Path, pickled: bytes) -> None:
    """A checkpoint's container with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))


def test_malicious_pickle_is_not_executed(run_job: Run, saved: dict[str, str], tmp_path: Path) -> None:
    trap, good = tmp_path / "trap", checkpoint_of(saved)
    bombs = {name: tmp_path / f"{name}.pt" for name in ("plain", "zipped", "nested")}
    bombs["plain"].write_bytes(pickle.dumps(Evil(trap)))
    zip_with_pickle(bombs["zipped"], good, pickle.dumps(Evil(trap)))
    torch.save({**torch.load(good, weights_only=True), "rng": Evil(trap)}, bombs["nested"])
    for path in bombs.values():
        done = run_job({**saved, "RUN_ID": "new", "RESUME": str(path)})
        assert not trap.exists()
        assert done.code == 2 and str(path) in error_line(done.err), path
        shutil.rmtree(folder_of({**saved, "RUN_ID": "new"}))


@pytest.mark.parametrize("content", [b"", b"\n" * 3000, b"PK\x03\x04" + bytes(2000), random.Random(0).randbytes(3000)])
def test_foreign_file_is_one_line(content: bytes, run_job: Run, saved: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    done = run_job({**saved, "RESUME": str(path)})
    assert done.code == 2 and str(path) in error_line(done.err)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda tree: {},
    "a list": lambda tree: [tree],
    "a tensor": lambda tree: torch.zeros(3),
    "without rng": lambda tree: {n: v for n, v in tree.items() if n != "rng"},
    "without step": lambda tree: {n: v for n, v in tree.items() if n != "step"},
    "structure no JSON": lambda tree: {**tree, "structure": "{"},
    "structure a list": lambda tree: {**tree, "structure": "[]"},
    "empty banks": lambda tree: {**tree, "banks": {key: {} for key in tree["banks"]}},
    "banks without latents": lambda tree: {
        **tree, "banks": {k: {n: v for n, v in b.items() if n != "latent"} for k, b in tree["banks"].items()}
    },
    "latents no tensors": lambda tree: {
        **tree, "banks": {k: {**b, "latent": 7} for k, b in tree["banks"].items()}
    },
    "step a text": lambda tree: {**tree, "step": "3"},
    "wrong latent shape": lambda tree: {
        **tree, "banks": {k: {**b, "latent": b["latent"][..., :1]} for k, b in tree["banks"].items()}
    },
    "another format": lambda tree: {**tree, "format": 99},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_of_another_kind_is_one_line(change: str, run_job: Run, saved: dict[str, str]) -> None:
    torch.save(CHANGES[change](torch.load(checkpoint_of(saved), weights_only=True)), checkpoint_of(saved))
    done = run_job({**saved, "RESUME": "auto"})
    assert done.code == 2 and checkpoint_of(saved).name in error_line(done.err)


def test_missing_checkpoint_is_one_line(run_job: Run, saved: dict[str, str]) -> None:
    named = run_job({**saved, "RESUME": "/nowhere/step_0000001.pt"})
    assert named.code == 2 and "/nowhere" in error_line(named.err)
    checkpoint_of(saved).unlink()
    pointed = run_job({**saved, "RESUME": "auto"})
    assert pointed.code == 2 and checkpoint_of(saved).name in error_line(pointed.err)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MODEL_DIM", "64"), ("NUM_LAYERS", "3"), ("RESIDUAL", "plain"), ("MATRIX_CODEC", "int8"), ("GROUP_SIZE", "8"),
        ("MLP_ACT", "swiglu"), ("UNTIE_AT_FRACTION", "0.9"), ("VALUE_RESIDUAL", "1"), ("LOGIT_SOFTCAP", "15"),
    ],
)  # fmt: skip
def test_another_structure_is_refused_by_name(variable: str, value: str, run_job: Run, saved: dict[str, str]) -> None:
    before = {path: path.read_bytes() for path in (folder_of(saved) / "checkpoints").iterdir()}
    done = run_job({**saved, variable: value, "RESUME": "auto"})
    assert done.code == 2 and variable in error_line(done.err)
    assert before == {path: path.read_bytes() for path in (folder_of(saved) / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("extra", "refused"),
    [({"PRECISION": "fp64"}, "PRECISION"), ({"BATCH_MODE": "documents"}, ""), ({"TRAIN_BATCH_TOKENS": "128"}, "")],
)
def test_other_training_settings_resume_or_are_refused_by_name(
    extra: dict[str, str], refused: str, run_job: Run, saved: dict[str, str]
) -> None:
    done = run_job({**saved, **extra, "RESUME": "auto"})
    assert done.code == (2 if refused else 0), done.err
    assert not refused or f"it differs in {refused}" in error_line(done.err)


def test_checkpoint_of_before_a_variable_existed(run_job: Run, saved: dict[str, str]) -> None:
    """It stands for that variable's default: resumed with it, refused with another value."""
    tree = torch.load(checkpoint_of(saved), weights_only=True)
    structure = json.loads(tree["structure"])
    assert "induction_orders" not in structure
    torch.save({**tree, "structure": json.dumps(structure)}, checkpoint_of(saved))
    done = run_job({**saved, "INDUCTION_ORDERS": "1,2", "RESUME": "auto"})
    assert done.code == 2 and "INDUCTION_ORDERS" in error_line(done.err)
    done = run_job({**saved, "RESUME": "auto"})
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"TRAIN_BATCH_TOKENS": "128"}, 2), ({"CARRY_TRAIN": "0"}, 0),
        ({"CARRY_TRAIN": "0", "BATCH_MODE": "contiguous"}, 0),
    ],
)  # fmt: skip
def test_carried_states_of_other_rows_are_refused_where_they_matter(
    extra: dict[str, str], code: int, run_job: Run, tiny_env: dict[str, str]
) -> None:
    env = {**tiny_env, **BASE, "BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "ITERATIONS": "3"}
    assert run_job(env).code == 0
    done = run_job({**env, "ITERATIONS": "5", **extra, "RESUME": "auto"})
    assert done.code == code, done.err
    assert code == 0 or "carries 8 rows; TRAIN_BATCH_TOKENS=128" in error_line(done.err)


def test_states_are_not_carried_when_that_is_off(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """Resumed with CARRY_TRAIN=0, a run forgets the states that its checkpoint holds."""
    streams = {"BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "RUN_ID": "carry"}
    env = {**tiny_env, **BASE, "ITERATIONS": "3", **streams}
    assert run_job(env).code == 0
    name = checkpoint_of(env)
    tree = torch.load(name, weights_only=True)
    torch.save({**tree, "carry": []}, name.with_name("without.pt"))
    losses = []
    for run, path in (("with", name), ("without", name.with_name("without.pt"))):
        again = {**env, "RUN_ID": run, "RESUME": str(path), "CARRY_TRAIN": "0", "ITERATIONS": "5"}
        assert run_job(again).code == 0
        losses.append([found["train_loss_nats"] for found in read_metrics(folder_of(again), "train")])
    assert losses[0] == losses[1]


# The tree


def test_checkpoint_holds_the_whole_state(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """Latents, moments, average, counts and tuning of every bank come back bit for bit into a fresh session."""
    h = t.load_config({**tiny_env, **AVERAGE, **LATE_HEAD})
    first, second = (t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False)) for _ in range(2))
    step, state = t.make_step(first), t.TrainState()
    for _ in range(2):
        step(first.loader.next(8, 32), state, 0.0)
        first.optimizer.step(1.0, 0.9, True, 0.0)
        first.weights.clear_gradients()
    for bank in first.weights.banks.values():
        bank.tuning = t.Tuning(*(part + 0.25 for part in bank.tuning))
    state = t.TrainState(7, 4480, 1.25, 0.5, t.Position(512, 3), t.Variant(untied=True))
    torch.manual_seed(99)
    t.save_checkpoint(h, first.rt, tmp_path, state, first.weights)
    rng = torch.get_rng_state()
    torch.manual_seed(1)
    back = t.load_checkpoint(second.h, second.rt, tmp_path / "step_0000007.pt", second.model, second.weights)
    assert torch.equal(torch.get_rng_state(), rng)
    assert back == state
    for key, bank in first.weights.banks.items():
        other = second.weights.banks[key]
        assert (
            torch.equal(bank.latent, other.latent) and bank.state.keys() == other.state.keys() and "ema" in bank.state
        )
        assert all(map(torch.equal, bank.tuning, other.tuning)), key
        for name, moment in bank.state.items():
            assert torch.equal(moment, other.state[name]), (key, name)


def test_pointer_moves_only_to_a_file_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str], tmp_path: Path
) -> None:
    """The order that survives a power cut: the checkpoint's bytes, its name, the pointer's bytes, its name."""
    h = t.load_config(tiny_env)
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle: int) -> None:
        calls.append(f"fsync of {os.fstat(handle).st_size > 1000}")
        fsync(handle)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    t.save_checkpoint(h, s.rt, tmp_path, t.TrainState(step=7), s.weights)
    assert calls == ["fsync of True", "rename to step_0000007.pt", "fsync of False", "rename to latest"]


def test_checkpoint_is_plain_data(saved: dict[str, str]) -> None:
    """Only tensors, numbers, text and containers of them: no class of the program is needed to read one."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(name, str) for name in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            assert type(value) in (list, tuple)
            for part in value:
                check(part)
        else:
            assert value is None or isinstance(value, torch.Tensor | int | float | str | bool)

    tree = torch.load(checkpoint_of(saved), weights_only=True)
    check(tree)
    assert json.loads(tree["structure"])["model_dim"] == 32


def test_carried_state_begins_anew_with_the_epoch(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """Rows that jump back to their beginning must not see what the end of the data left."""
    streams = {"BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "ITERATIONS": "5"}
    h = t.load_config({**tiny_env, **streams})
    s, state = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False)), t.TrainState()
    s.loader.usable = 8 * 64 + 1  # two steps of 32 tokens an epoch
    t.train_loop(s, state)
    assert state.position == t.Position(32, 2)
    assert state.carry[0].position.tolist() == [32] * 8


def test_structure_that_is_on_stays_on_in_a_longer_run(run_job: Run, tiny_env: dict[str, str]) -> None:
    """Continued with more steps, progress falls back below the fraction; the trained head is not copied again."""
    env = {**tiny_env, "UNTIE_AT_FRACTION": "0.5", "ITERATIONS": "6", "SAMPLE_TOKENS": "0"}
    assert "from here on: untied" in run_job(env).out
    done = run_job({**env, "ITERATIONS": "40", "RESUME": "auto"})
    assert done.code == 0 and "from here on" not in done.out, done.err
