"""Several processes give the numbers of one, and a mistake that only one of them meets ends all of them.

Most tests start the ranks without torchrun, which ends the others when one fails: here each has to end by itself, as
under a cluster's own launcher. Gloo on the CPU; float64 wherever two runs are compared.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SKC_KINDS, TOPOLOGIES

import train_gpt as t

Run = Callable  # a fixture of conftest.py that starts commands

BASE = {"PRECISION": "fp64", "TRAIN_LOG_EVERY": "1", "VAL_LOSS_EVERY": "10", "SAMPLE_TOKENS": "0"}
KINDS: dict[str, dict[str, str]] = {
    # ternary; 8 rows a step; accumulation in passes of 2 windows; 4 + 2 + 2 matrices a bank
    "accumulation, clipping": {"MICRO_BATCH_TOKENS": "64", "GRAD_CLIP_NORM": "0.3"},
    "ema, late head, stages": {
        "EMA_DECAY": "0.8", "EMA_START_FRACTION": "0.3", "UNTIE_AT_FRACTION": "0.5", "BATCH_STAGES": "0:128,0.4:256",
        "ADAM_WD": "0.1", "MUON_WD": "0.1",
    },
    "streams, carry": {
        "BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "MICRO_BATCH_TOKENS": "96", "CARRY_EVAL": "1",
    },
    "documents, odd banks": {"BATCH_MODE": "documents", "NUM_LAYERS": "3", "DOC_MASK": "1", "VALUE_RESIDUAL": "1"},
    "tables": {
        "BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_DIM": "8", "BIGRAM_HASH_ORDERS": "2,3", "GRAD_CLIP_NORM": "0.3",
        "MICRO_BATCH_TOKENS": "64", "INDUCTION_ORDERS": "1,2", "INDUCTION_WINDOW": "50",
    },
    **SKC_KINDS,
    **TOPOLOGIES,
    "one layer, uncapped": {"NUM_LAYERS": "1", "LOGIT_SOFTCAP": "0", "EMBED_DIM": "16", "MATRIX_CODEC": "int8"},
}  # fmt: skip


def folder_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"]


def error_line(text: str) -> str:
    """The one line that a mistake of the user's is answered with."""
    lines = text.splitlines()
    assert len(lines) == 1 and "error: " in lines[0], text
    return lines[0]


def losses_of(objects: list[dict[str, Any]]) -> list[float]:
    """Every loss of a run in the order of its log."""
    names = ("train_loss_nats", "val_loss_nats", "in_memory_val_loss_nats", "val_bpb")
    return [found[name] for found in objects for name in names if name in found]


# The same numbers


@pytest.mark.parametrize(
    ("kind", "ranks"), [*((kind, 2) for kind in KINDS), ("accumulation, clipping", 4), ("documents, odd banks", 4)]
)
def test_ranks_give_the_losses_of_one_process(
    kind: str, ranks: int, run_job: Run, run_ranks: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """20 steps: training and validation losses, and the artifact's bytes.

    Sums over ranks round differently in float64's last bits; the artifact stores at most 24 bits of a weight, and
    would differ only if such a last bit decided a rounding.
    """
    env = {**tiny_env, **BASE, **KINDS[kind]}
    one = run_job({**env, "RUN_ID": "one"})
    assert one.code == 0, one.err
    several = run_ranks(env, ranks)
    assert [done.code for done in several] == [0] * ranks, several
    assert all(done.out == "" for done in several[1:])  # one log
    assert all(done.err == "" for done in several), several[0].err  # no warnings either
    folders = (folder_of({**env, "RUN_ID": "one"}), folder_of(env))
    wanted, found = (losses_of(read_metrics(folder)) for folder in folders)
    assert len(wanted) >= 26
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
    assert (folders[0] / "model.pgz").read_bytes() == (folders[1] / "model.pgz").read_bytes()


def test_torchrun_on_two_processes(run_cli: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """The command of the README, once; the score of the artifact under torchrun is that of the run."""
    done = run_cli([], {**tiny_env, "ITERATIONS": "6", "SAMPLE_TOKENS": "0"}, nproc=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final_roundtrip ") == 1 and "ranks:2" in done.stdout
    (final,) = read_metrics(folder_of(tiny_env), "final")
    data = {"PRECISION": "fp32", **{name: tiny_env[name] for name in ("DATA_PATH", "DEVICE", "COMPILE")}}
    scored = run_cli(["eval", str(folder_of(tiny_env) / "model.pgz")], data, nproc=2)
    assert scored.returncode == 0 and scored.stdout.count("final_eval ") == 1, scored.stderr
    told = float(scored.stdout.split("final_eval val_loss:")[1].split()[0])
    assert told == pytest.approx(final["val_loss_nats"], abs=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        {"EVAL_STREAMS": "1"},  # one rank has nothing to score
        {"EVAL_STREAMS": "5", "VAL_BATCH_SIZE": "64"},
        {"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "8", "MAX_VAL_TOKENS": "300", "TEMP_SCALING": "1"},
        {"MAX_VAL_TOKENS": "1"},
    ],
)
def test_evaluation_does_not_depend_on_ranks(
    extra: dict[str, str], run_job: Run, run_ranks: Run, tiny_env: dict[str, str]
) -> None:
    assert run_job({**tiny_env, "ITERATIONS": "2", "SAMPLE_TOKENS": "0", "TEMP_SCALING": "1"}).code == 0
    command = ["eval", str(folder_of(tiny_env) / "model.pgz")]
    env = {**tiny_env, **extra}
    outputs = [run_job(env, command), *(run_ranks(env, ranks, command)[0] for ranks in (2, 3))]
    assert [done.code for done in outputs] == [0, 0, 0], outputs
    lines = [[line for line in done.out.splitlines() if "val_loss" in line or "bytes:" in line] for done in outputs]
    scores = [(line[0], line[1].split(" eval_time")[0]) for line in lines]
    assert len(set(scores)) == 1


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_shares_of_a_bank_are_joined_in_order(
    ranks: int, count: int, monkeypatch: pytest.MonkeyPatch, tiny_env: dict[str, str]
) -> None:
    """Every rank orthogonalizes its share, fewer, more or as many matrices as ranks; together it is the whole bank."""
    torch = t.torch
    h = t.load_config(tiny_env)
    rt = t.start_runtime(h)
    weights = t.Weights(t.build_model(h, rt, t.BYTE_BOS))
    update = torch.randn(count, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    wanted = t.Optimizer(h, rt, weights).sharded(update.clone())
    shares: list[Any] = []
    for gather in ("all_gather_into_tensor", "all_gather"):
        monkeypatch.setattr(t.dist, gather, lambda whole, mine, **_: shares.append(mine.clone()))
    for rank in range(ranks):
        t.Optimizer(h, rt._replace(rank=rank, world=ranks), weights).sharded(update.clone())
    assert len({share.shape for share in shares}) == 1
    torch.testing.assert_close(torch.cat(shares)[:count], wanted, rtol=0, atol=1e-12)


def test_killed_job_resumes_with_another_number_of_ranks(
    run_job: Run, run_ranks: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """Checkpoints of two ranks continue on one, those of one on two, with carried states, to the same end."""
    env = {**tiny_env, **BASE, **KINDS["streams, carry"], "SAVE_EVERY": "5", "KEEP_CHECKPOINTS": "9"}
    whole = {**env, "RUN_ID": "whole"}
    assert run_job(whole).code == 0
    assert [done.code for done in run_ranks({**env, "RUN_ID": "two"})] == [0, 0]
    wanted = losses_of(read_metrics(folder_of(whole), "final"))
    for source, ranks in (("two", 1), ("whole", 2)):
        path = folder_of({**env, "RUN_ID": source}) / "checkpoints" / "step_0000010.pt"
        again = {**env, "RUN_ID": f"{source}_again", "RESUME": str(path)}
        results = run_ranks(again, ranks) if ranks > 1 else [run_job(again)]
        assert [done.code for done in results] == [0] * ranks, results
        np.testing.assert_allclose(losses_of(read_metrics(folder_of(again), "final")), wanted, rtol=0, atol=1e-10)


def test_time_limit_is_agreed(run_ranks: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """Clocks of ranks differ, so only rank 0's may decide: both stop at the same step, and save and score once."""
    env = {**tiny_env, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "2", "SAVE_EVERY": "7", "VAL_LOSS_EVERY": "11"}
    results = run_ranks({**env, "MAX_VAL_TOKENS": "300"}, hooks={1: ("run_clock_at", 1.5)}, timeout=30)
    assert [done.code for done in results] == [0, 0], results
    (final,) = read_metrics(folder_of(env), "final")
    assert final["train_time_s"] <= 2.05  # a busy machine can stop any step for a moment


def test_other_commands_answer_once(run_job: Run, run_ranks: Run, tiny_env: dict[str, str]) -> None:
    """plan, preflight, bench and generate under a launcher: one answer, not one for each rank."""
    assert run_job({**tiny_env, "ITERATIONS": "2", "SAMPLE_TOKENS": "0"}).code == 0
    artifact = str(folder_of(tiny_env) / "model.pgz")
    for args in (["plan"], ["preflight"], ["bench", "--steps", "2"], ["generate", artifact, "--tokens", "3"]):
        results = run_ranks(tiny_env, args=args)
        assert [done.code for done in results] == [0, 0], results
        assert results[0].out and not results[1].out, args


# Mistakes


def error_lines(done: Any) -> list[str]:
    """What a rank that met a mistake of the user's wrote: one line of ours (torch's warnings aside), no traceback."""
    assert "Traceback" not in done.err, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1, done.err
    return lines


def check_all_end(results: list[Any], message: str) -> None:
    """Every rank ends with exit code 2, and at least rank 0 tells why."""
    assert [done.code for done in results] == [2] * len(results), results
    assert message in error_lines(results[0])[0]
    assert all(message in line for done in results[1:] for line in error_lines(done))


def check_one_tells(results: list[Any], rank: int, message: str) -> None:
    """The rank that met a mistake tells it in one line; the others, cut off in the middle of work, end all the same."""
    assert results[rank].code == 2 and message in error_lines(results[rank])[0], results
    assert all(done.code not in (0, -9) for done in results), results


def test_batch_that_does_not_divide(run_ranks: Run, run_cli: Run, tiny_env: dict[str, str]) -> None:
    for extra in ({}, {"BATCH_STAGES": "0:96,0.5:256"}):  # 8 rows, or 3 and 8, for 3 ranks
        check_all_end(run_ranks({**tiny_env, **extra}, 3), "3 ranks")
    began = time.monotonic()
    done = run_cli([], {**tiny_env, "TRAIN_BATCH_TOKENS": "96"}, nproc=2)
    assert done.returncode != 0 and "not a multiple of 2 ranks" in done.stderr
    assert 'train_gpt.py", line' not in done.stderr and time.monotonic() - began < 60


def test_existing_run_is_refused_on_all_ranks(run_ranks: Run, tiny_env: dict[str, str]) -> None:
    folder_of(tiny_env).mkdir(parents=True)
    (folder_of(tiny_env) / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (folder_of(tiny_env) / "model.pgz").write_text("x")
    results = run_ranks(tiny_env)
    check_all_end(results, "already holds a run")
    assert not error_lines(results[1]), "what all ranks know is told once"


def test_locked_folder_is_refused_on_all_ranks(run_ranks: Run, tiny_env: dict[str, str]) -> None:
    folder_of(tiny_env).mkdir(parents=True)
    held = t.lock_folder(folder_of(tiny_env))
    check_all_end(run_ranks(tiny_env), "in use by process")
    t.os.close(held)


def test_folder_that_cannot_be_made_ends_all_ranks(run_ranks: Run, tiny_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_all_end(run_ranks({**tiny_env, "OUT_DIR": str(tmp_path / "file")}), "OUT_DIR")


@pytest.mark.parametrize("call", range(1, 8))
def test_full_disk_on_rank_0_ends_all_ranks(call: int, run_ranks: Run, tiny_env: dict[str, str]) -> None:
    """Rank 0 alone writes: config, script, two checkpoints with their pointers, artifact; each fails once.

    A checkpoint that fails costs a warning, anything else ends the run; no rank waits for ever.
    """
    env = {**tiny_env, "ITERATIONS": "4", "SAVE_EVERY": "2", "SAMPLE_TOKENS": "0", "MAX_VAL_TOKENS": "300"}
    outputs = run_ranks(env, hooks={0: ("fail_disk_call", call, 28)})
    if 3 <= call <= 6:
        assert [done.code for done in outputs] == [0, 0] and "No space left on device" in outputs[0].out
    else:
        check_all_end(outputs, "No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_token_of_one_rank_ends_all_ranks(
    rank: int, run_ranks: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    """Each rank reads only its own rows, so only one of them meets the token; the message must be seen."""
    folder = shutil.copytree(byte_data, tmp_path / "damaged")
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * (512 + 128 * rank + 40) + 1] = 7  # in the third step, in a row of that rank
    path.write_bytes(data)
    check_one_tells(run_ranks({**tiny_env, "DATA_PATH": str(folder)}), rank, "VOCAB_SIZE")


@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_one_rank_lacks_ends_all_ranks(
    rank: int, run_ranks: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    """A node without its copy of the data: rank 0 tells which one."""
    env = {**tiny_env, "DATA_PATH": str(tmp_path / "data_of_rank_{rank}")}
    shutil.copytree(byte_data, tmp_path / f"data_of_rank_{1 - rank}")
    check_all_end(run_ranks(env), f"data_of_rank_{rank}")


def test_damaged_checkpoint_ends_all_ranks(run_ranks: Run, tiny_env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "step_0000001.pt"
    path.write_bytes(b"no checkpoint" * 100)
    check_all_end(run_ranks({**tiny_env, "RESUME": str(path)}), str(path))


def test_checkpoint_that_one_rank_lacks_ends_all_ranks(
    run_job: Run, run_ranks: Run, tiny_env: dict[str, str], tmp_path: Path
) -> None:
    """Nodes without a shared file system: the others must neither start from scratch nor wait for ever."""
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for node in nodes:
        node.mkdir()
    env = {**tiny_env, "ITERATIONS": "4", "SAMPLE_TOKENS": "0", "OUT_DIR": "runs"}
    assert run_job({**env, "OUT_DIR": str(nodes[0] / "runs")}).code == 0
    again = {**env, "RESUME": "auto", "ITERATIONS": "6"}
    check_all_end(run_ranks(again, timeout=30, cwd=str(tmp_path / "node{rank}")), "rank 1: ")


def test_only_rank_0_needs_the_run_folder(run_ranks: Run, tiny_env: dict[str, str], tmp_path: Path) -> None:
    """A fresh run on nodes without a shared file system: rank 0's node has the run folder, and the run ends well."""
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    env = {**tiny_env, "ITERATIONS": "4", "SAMPLE_TOKENS": "0", "SAVE_EVERY": "2", "OUT_DIR": "runs"}
    results = run_ranks(env, cwd=str(tmp_path / "node{rank}"))
    assert [done.code for done in results] == [0, 0], results
    assert (tmp_path / "node0" / "runs" / "run" / "model.pgz").is_file()


def test_artifact_command_with_a_mistake_ends_all_ranks(run_ranks: Run, tiny_env: dict[str, str]) -> None:
    check_all_end(run_ranks(tiny_env, args=["eval", "/nowhere/model.pgz"]), "/nowhere/model.pgz")


def test_killed_rank_ends_the_others(run_ranks: Run, tiny_env: dict[str, str]) -> None:
    """When a rank dies, the connection closes and the others stop with an error rather than wait."""
    env = {**tiny_env, "ITERATIONS": "100000", "SAVE_EVERY": "5"}
    results = run_ranks(env, hooks={0: ("kill_at_disk_call", 9)})
    assert results[0].code == -9 and results[1].code not in (0, -9), results


def test_torchrun_ends_after_a_mistake_of_one_rank(
    run_cli: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(byte_data, tmp_path / "damaged")
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * (128 + 40) + 1] = 7  # in the first step, in a row of rank 1
    path.write_bytes(data)
    try:
        done = run_cli([], {**tiny_env, "DATA_PATH": str(folder)}, nproc=2, timeout=90)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"torchrun hangs: {late.stdout!r} {late.stderr!r}") from None
    assert done.returncode != 0 and "VOCAB_SIZE" in done.stderr
