"""What goes wrong around a run: signals, hangs, numbers that are not finite, full and read-only disks, damaged files.

Each test injects the fault into the real program. That a run killed at any moment resumes to the same bytes is in
test_checkpoint.py, where the many kills marked slow are, too.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as t

Run = Callable  # a fixture of conftest.py that starts commands

BASE = {"ITERATIONS": "12", "TRAIN_LOG_EVERY": "1", "MAX_VAL_TOKENS": "600", "SAMPLE_TOKENS": "0"}
STREAMS = {"BATCH_MODE": "streams", "ATTN_WINDOW": "8", "CARRY_TRAIN": "1", "CARRY_EVAL": "1"}


def folder_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"]


def error_line(text: str) -> str:
    """The one line that a mistake of the user's is answered with."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "what was waited for did not come"
        time.sleep(0.002)


def wait_for_text(job: Any, text: str, stream: str = "out") -> None:
    """Wait until a job has written a text, or has ended."""
    path = job.folder / stream
    wait_for(lambda: (path.is_file() and text in path.read_text(encoding="utf-8")) or job.ended())


def undisturbed(run_job: Run, env: dict[str, str]) -> bytes:
    """The artifact of a run that nothing disturbs."""
    whole = {**env, "RUN_ID": "whole"}
    if not folder_of(whole).exists():
        done = run_job(whole)
        assert done.code == 0, done.err
    return (folder_of(whole) / "model.pgz").read_bytes()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_tells_how_to_resume_and_ends(
    number: signal.Signals, start_job: Run, run_job: Run, tiny_env: dict[str, str]
) -> None:
    """Without SAVE_EVERY, so that the signal alone makes the checkpoint; resumed, the run ends with the same bytes."""
    env = {**tiny_env, **BASE, "ITERATIONS": "60"}
    wanted, job = undisturbed(run_job, env), start_job(env)
    wait_for_text(job, "step:5/60")
    os.kill(job.pid, number)
    done = job.wait(40)
    assert done.code == 128 + number, done.err
    assert f"{number.name}: saving" in done.err and "Traceback" not in done.err
    told = done.out.splitlines()[-1]
    assert told.startswith(f"stopped by {number.name}; to resume: ") and "RESUME=auto python train_gpt.py" in told
    settings = dict(word.split("=", 1) for word in told.split() if "=" in word)
    again = {"ENV_FILE": settings["ENV_FILE"], "RUN_ID": settings["RUN_ID"], "RESUME": settings["RESUME"]}
    assert run_job(again).code == 0
    assert (folder_of(env) / "model.pgz").read_bytes() == wanted


def test_second_signal_ends_at_once(start_job: Run, tiny_env: dict[str, str]) -> None:
    job = start_job({**tiny_env, **BASE, "ITERATIONS": "100000"}, hook=("hang_in_save",))
    wait_for_text(job, "step:3/")
    os.kill(job.pid, signal.SIGTERM)
    wait_for_text(job, "saving", "err")
    os.kill(job.pid, signal.SIGTERM)  # a launcher that passes on what the terminal sends, too
    time.sleep(1.2)
    assert not job.ended()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(20).code == 143


def test_signal_during_evaluation_is_answered_in_seconds(
    start_job: Run, run_job: Run, tiny_env: dict[str, str]
) -> None:
    """Both the validation between two steps, which takes 50 s here, and the final one, after the last checkpoint."""
    env = {**tiny_env, **BASE, "MAX_VAL_TOKENS": "0", "EVAL_STREAMS": "1"}
    wanted = undisturbed(run_job, env)
    for run, extra, text in (("middle", {"VAL_LOSS_EVERY": "3"}, "step:3/12"), ("end", {}, "training done")):
        again = {**env, "RUN_ID": run}
        job = start_job({**again, **extra}, hook=("score_slowly", 0.3))
        wait_for_text(job, text)
        time.sleep(0.2)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(25).code == 143
        assert (folder_of(again) / "checkpoints" / "latest").is_file()
        assert run_job({**again, "RESUME": "auto"}).code == 0
        assert (folder_of(again) / "model.pgz").read_bytes() == wanted


def start_ranks(start_job: Run, env: dict[str, str], port: int, hooks: dict[int, tuple] | None = None) -> list[Any]:
    """Two ranks without torchrun."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [start_job({**env, **meeting, **place}, hook=(hooks or {}).get(i, ())) for i, place in enumerate(places)]


def test_signal_to_one_rank_ends_all_with_one_checkpoint(
    start_job: Run, run_job: Run, tiny_env: dict[str, str], free_port_number: int
) -> None:
    env = {**tiny_env, **BASE, "ITERATIONS": "40", "PRECISION": "fp64"}
    jobs = start_ranks(start_job, {**env, "ITERATIONS": "100000"}, free_port_number)
    wait_for_text(jobs[0], "step:5/")
    os.kill(jobs[1].pid, signal.SIGTERM)
    ends = [job.wait(40) for job in jobs]
    assert [done.code for done in ends] == [143, 143], ends
    assert "torchrun --standalone --nproc_per_node=2 train_gpt.py" in ends[0].out
    assert len(list((folder_of(env) / "checkpoints").glob("step_*.pt"))) == 1


# Hangs


def test_hung_rank_ends_all_with_stacks(start_job: Run, tiny_env: dict[str, str], free_port_number: int) -> None:
    """The rank that hangs and the one that waits for it both say so, write their stacks, and leave no orphan."""
    env = {**tiny_env, **BASE, "WATCHDOG_SECONDS": "2", "SAVE_EVERY": "2", "WATCHDOG_GRACE_SECONDS": "30"}
    jobs = start_ranks(start_job, env, free_port_number, {1: ("hang_in_step", 4)})
    began = time.monotonic()
    ends = [job.wait(60) for job in jobs]
    assert [done.code for done in ends] == [t.Guard.HANG] * 2, ends
    assert time.monotonic() - began < 60
    for rank, done in enumerate(ends):
        assert f"error: rank {rank}: nothing went on for" in done.err and "RESUME=auto" in done.err
    stacks = [(folder_of(env) / f"hang_rank{rank}.txt").read_text() for rank in range(2)]
    assert "train_loop" in stacks[0] and "stepped" in stacks[1] and "Thread" in stacks[0]
    assert (folder_of(env) / "checkpoints" / "latest").read_text() == "step_0000004.pt"


def test_stopped_process_is_no_hang(start_job: Run, tiny_env: dict[str, str]) -> None:
    """A laptop that sleeps, or Ctrl-Z: the watchdog's seconds stand still, too."""
    env = {**tiny_env, **BASE, "ITERATIONS": "100000", "WATCHDOG_SECONDS": "4", "SAVE_EVERY": "1000"}
    job = start_job(env)
    wait_for_text(job, "step:5/")
    os.kill(job.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(job.pid, signal.SIGCONT)
    time.sleep(0.5)
    assert not job.ended()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(20).code == 143


def test_heartbeat_tells_how_a_run_is(run_job: Run, run_ranks: Run, tiny_env: dict[str, str]) -> None:
    results = run_ranks({**tiny_env, **BASE})
    assert [done.code for done in results] == [0, 0], results
    for rank in range(2):
        told = json.loads((folder_of(tiny_env) / f"heartbeat_rank{rank}.json").read_text())
        assert told["step"] == 12 and abs(told["time_unix_s"] - time.time()) < 600
        assert told["tokens_per_s"] > 0 and told["allocated_mib"] > 10 and told["reserved_mib"] > 10
        assert not list(folder_of(tiny_env).glob("*.tmp"))


# Numbers that are not finite


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("extra", [{}, STREAMS, {"EMA_DECAY": "0.9", "BIGRAM_HASH_BUCKETS": "64"}])
def test_step_that_is_not_finite_is_left_out_and_counted(
    value: str, extra: dict[str, str], run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **BASE, **extra}
    done = run_job(env, hook=("poison_gradient", 3, 5, float(value)))
    assert done.code == 0, done.err
    skipped = [found["skipped_steps"] for found in read_metrics(folder_of(env), "train")]
    assert skipped == [0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    losses = [found["train_loss_nats"] for found in read_metrics(folder_of(env), "train")]
    assert [loss is None for loss in losses] == [3 <= step <= 5 for step in range(12)]
    assert "skipped:3" in done.out
    tree = torch.load(folder_of(env) / "checkpoints" / "step_0000012.pt", weights_only=True)
    assert tree["skipped"] == 3
    assert all(bank["latent"].isfinite().all() for bank in tree["banks"].values())


def test_step_that_is_not_finite_changes_no_weight(run_job: Run, tiny_env: dict[str, str]) -> None:
    """All but the steps' number and the data's position is that of before, moments included."""
    env = {
        **tiny_env,
        **BASE,
        "SAVE_EVERY": "1",
        "KEEP_CHECKPOINTS": "99",
        "BIGRAM_HASH_BUCKETS": "64",
        "MUON_WD": "0.1",
    }
    assert run_job(env, hook=("poison_gradient", 5, 5, math.nan)).code == 0
    names = (f"step_{step:07d}.pt" for step in (5, 6, 7))
    before, after, later = (
        torch.load(folder_of(env) / "checkpoints" / name, weights_only=True)["banks"] for name in names
    )
    for key in before:
        assert torch.equal(before[key]["latent"], after[key]["latent"]), key
        for name, moment in before[key]["state"].items():
            assert torch.equal(moment, after[key]["state"][name]), (key, name)
    assert not all(torch.equal(after[key]["latent"], later[key]["latent"]) for key in before)


def test_all_ranks_leave_out_the_step_of_one(run_ranks: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    results = run_ranks({**tiny_env, **BASE}, hooks={1: ("poison_gradient", 3, 4, math.nan)})
    assert [done.code for done in results] == [0, 0], results
    assert read_metrics(folder_of(tiny_env), "train")[-1]["skipped_steps"] == 2


def test_many_steps_in_a_row_end_the_run_with_a_dump_that_repeats_them(run_job: Run, tiny_env: dict[str, str]) -> None:
    """An infinite weight in a checkpoint, as a fault of memory leaves it: no step after it is finite."""
    env = {**tiny_env, **BASE, "ITERATIONS": "6"}
    assert run_job(env).code == 0
    path = folder_of(env) / "checkpoints" / "step_0000006.pt"
    tree = torch.load(path, weights_only=True)
    for bank in tree["banks"].values():
        bank["latent"].view(-1)[0] = math.inf
    torch.save(tree, path)
    again = {**env, "RUN_ID": "again", "ITERATIONS": "40", "MAX_NONFINITE_STEPS": "3", "RESUME": str(path)}
    done = run_job(again)
    assert done.code == 2 and "not finite in 3 steps in a row, up to step 9" in error_line(done.err)
    told = json.loads((folder_of(again) / "nonfinite" / "step.json").read_text())
    assert told["step"] == 9 and told["loss_nats"] == "nan" and told["gradients"]
    dump = folder_of(again) / "nonfinite" / "step_0000008.pt"
    assert str(dump) in error_line(done.err)
    repeated = run_job({**again, "RUN_ID": "repeated", "MAX_NONFINITE_STEPS": "1", "RESUME": str(dump)})
    assert repeated.code == 2 and "in 1 steps in a row, up to step 9" in error_line(repeated.err)
    other = json.loads((folder_of({**again, "RUN_ID": "repeated"}) / "nonfinite" / "step.json").read_text())
    assert other == told


# Clocks


def test_time_of_day_that_jumps_changes_nothing(run_job: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **BASE}
    done = run_job(env, hook=("jump_wall_clock", 1e6))
    assert done.code == 0, done.err
    assert (folder_of(env) / "model.pgz").read_bytes() == undisturbed(run_job, env)


def test_training_clock_is_one_that_stands_still_in_suspension() -> None:
    told = time.get_clock_info("monotonic")
    assert told.monotonic and not told.adjustable
    assert told.implementation in ("clock_gettime(CLOCK_MONOTONIC)", "mach_absolute_time()")  # not CLOCK_BOOTTIME
