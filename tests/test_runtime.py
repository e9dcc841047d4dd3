"""RUNTIME: device choice, agreement of ranks, clock, log, the lock of a run folder, atomic files."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_environment

import train_gpt as t

CPU = {"DEVICE": "cpu", "COMPILE": "0", "PRECISION": "fp32"}


class FakeTime:
    """Stands in for the time module; `now` is what monotonic returns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(t, "time", clock)
    return clock


# ---- device, precision, ranks ----


def test_one_process_on_a_cpu_is_rank_zero_of_one() -> None:
    rt = t.start_runtime(t.load_config(CPU))
    assert (rt.device.type, rt.rank, rt.world, rt.main) == ("cpu", 0, 1, True)
    assert (rt.dtype, rt.autocast, rt.compile, rt.control) == (torch.float32, False, False, None)


def test_precision_and_compile_settings() -> None:
    assert t.start_runtime(t.load_config({**CPU, "PRECISION": "fp64"})).dtype == torch.float64
    assert t.start_runtime(t.load_config({**CPU, "COMPILE": "1"})).compile
    assert not t.start_runtime(t.load_config({**CPU, "COMPILE": "auto"})).compile
    assert t.start_runtime(t.load_config({**CPU, "PRECISION": "bf16"})).autocast


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_that_multiplies_bf16_uses_it(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = t.load_config({**CPU, "PRECISION": "auto"})
    for features, found in (({feature: True}, True), ({feature: False, "avx512_f": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert t.start_runtime(h).autocast == found
        assert not t.start_runtime(dataclasses.replace(h, precision="fp32")).autocast
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.12
    assert not t.start_runtime(h).autocast


def test_bf16_is_for_matrix_products_and_the_residual_stream() -> None:
    rt = t.start_runtime(t.load_config({**CPU, "PRECISION": "bf16"}))
    with rt.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert rt.dtype == torch.float32


def test_missing_device_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert t.choose_device("auto", 0).type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(t.UserError, match=f"DEVICE={name}.*DEVICE=cpu"):
            t.choose_device(name, 0)


def test_more_ranks_than_gpus_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert t.choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(t.UserError, match="rank 2 has no GPU: 2 found"):
        t.choose_device("auto", 2)


def test_agree_and_on_main_in_one_process() -> None:
    rt = t.start_runtime(t.load_config(CPU))
    assert t.agree(rt, 0.1, 2.0) == (0.1, 2.0)
    assert t.on_main(rt, lambda: {"a": 1}) == {"a": 1}

    def fail() -> None:
        raise t.UserError("no")

    with pytest.raises(t.UserError, match="no"):
        t.on_main(rt, fail)


TWO_RANKS = """
import json, os, sys
import train_gpt as t
rt = t.start_runtime(t.load_config({"DEVICE": "cpu"}))
mine = float(rt.rank) + 0.1
def fail():
    raise t.UserError("refused by rank %d" % rt.rank)
agreed = t.agree(rt, mine, 1e17 + 2)
made = t.on_main(rt, lambda: {"rank": rt.rank})
try:
    t.on_main(rt, fail)
    told = ""
except t.UserError as error:
    told = str(error)
print(json.dumps([rt.rank, rt.world, agreed, made, told]))
t.dist.destroy_process_group()
"""


def test_two_ranks_take_the_values_and_errors_of_rank_zero() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env=clean_environment({**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = sorted(json.loads(p.communicate(timeout=60)[0].splitlines()[-1]) for p in processes)
    same = [2, [0.1, 1e17 + 2], {"rank": 0}, "refused by rank 0"]
    assert results == [[0, *same], [1, *same]]


def test_peak_memory_counts_what_was_held() -> None:
    rt = t.start_runtime(t.load_config(CPU))
    t.synchronize(rt)
    block = torch.ones(100 * t.MIB // 4)
    peak = t.peak_memory_bytes(rt)
    assert block.nbytes < peak < 64 * 2**30
    del block
    assert t.peak_memory_bytes(rt) >= peak


# ---- clock ----


def test_clock_runs_only_between_start_and_stop(fake_time: FakeTime) -> None:
    clock = t.Clock(5.0)
    fake_time.now += 10
    assert clock.seconds() == 5.0
    clock.start()
    fake_time.now += 2.5
    assert clock.seconds() == 7.5
    clock.stop()
    assert clock.banked == 7.5
    fake_time.now += 100
    assert clock.seconds() == 7.5
    clock.stop()  # a second stop adds nothing
    assert clock.seconds() == 7.5
    clock.start()
    fake_time.now += 1
    clock.stop()
    assert clock.seconds() == 8.5


def test_real_clock_never_runs_backwards() -> None:
    clock = t.Clock()
    clock.start()
    readings = [clock.seconds() for _ in range(1000)]
    assert readings == sorted(readings) and readings[0] >= 0 and readings[-1] < 60


@pytest.mark.parametrize(
    "seconds,text",
    [(0, "0:00"), (-3, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3599.6, "1:00:00"), (36061, "10:01:01")],
)
def test_clock_text(seconds: float, text: str) -> None:
    assert t.clock_text(seconds) == text


# ---- log ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_lines_go_to_console_and_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = t.Log(tmp_path, True)
    log.line("first")
    log.line("zweite — é")
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "first\nzweite — é\n"  # before close
    assert capsys.readouterr().out == "first\nzweite — é\n"
    log.close()
    more = t.Log(tmp_path, True)
    more.line("third")
    more.close()
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines() == ["first", "zweite — é", "third"]


def strict(text: str) -> Any:
    """JSON as other programs read it: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    log = t.Log(tmp_path, True)
    log.metric("train", step=1, train_loss_nats=2.5)
    log.metric("val", text="a\nb", rows=[1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log.close()
    assert [strict(line) for line in lines] == [
        {"kind": "train", "step": 1, "train_loss_nats": 2.5},
        {"kind": "val", "text": "a\nb", "rows": [1, 2]},
    ]


def test_metrics_of_a_diverged_run_are_still_json(tmp_path: Path) -> None:
    log = t.Log(tmp_path, True)
    log.metric("train", step=1, train_loss_nats=float("nan"), rate=float("inf"))
    log.close()
    assert strict((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))["step"] == 1


def test_other_ranks_and_folderless_logs_leave_no_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    silent, plain = t.Log(tmp_path, False), t.Log(None, True)
    for log in (silent, plain):
        log.metric("train", step=1)
        log.progress(0.5, "half")
    silent.line("not shown")
    plain.line("shown")
    silent.close()
    plain.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "shown\n"


def test_progress_line_only_on_a_terminal_and_cleared_by_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fake_time: FakeTime
) -> None:
    log = t.Log(tmp_path, True)
    log.progress(0.5, "step 3")
    assert capsys.readouterr().out == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    log.progress(0.5, "step 3 with a long text")
    fake_time.now += 0.001
    log.progress(0.6, "too soon")
    fake_time.now += 1
    log.progress(2.0, "step 4")  # more than all still draws one full bar
    log.line("a line")
    shown = terminal.getvalue()
    log.close()
    first, second, blank, line = shown.split("\r")[1:]
    assert "50% step 3" in first and "#" * 24 in second and len(second) >= len(first)  # nothing of the first stays
    assert blank.strip() == "" and len(blank) >= len(second.rstrip()) and line == "a line\n"
    assert (tmp_path / "train.log").read_text() == "a line\n"


def test_console_that_cannot_show_a_letter_does_not_stop_the_program(
    run_cli: Callable, tiny_env: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "größe"
    os.symlink(tiny_env["DATA_PATH"], folder)
    done = run_cli(["preflight"], {**tiny_env, "DATA_PATH": str(folder), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr[-300:]


# ---- the lock ----


def hold_lock(folder: Path, ready: Any) -> None:
    """In a process of its own: take the lock, tell the parent, live until killed."""
    t.lock_folder(folder)
    ready.send(os.getpid())
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process that holds the lock of tmp_path."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold_lock, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.poll(20) and here.recv() == process.pid
    yield process
    if process.is_alive():
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_second_process_is_refused_with_the_first_ones_number(tmp_path: Path, holder: BaseProcess) -> None:
    for _ in range(2):  # being refused must not disturb the lock
        with pytest.raises(t.UserError, match=rf"{tmp_path.name}.* process {holder.pid};.*RUN_ID"):
            t.lock_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_lock_of_a_killed_process_is_free(tmp_path: Path, holder: BaseProcess) -> None:
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    descriptor = t.lock_folder(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    os.close(descriptor)


def test_lock_is_free_after_release_and_names_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123456789012")  # a longer number of a process that died
    first = t.lock_folder(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    with pytest.raises(t.UserError, match=f"process {os.getpid()};"):
        t.lock_folder(tmp_path)
    os.close(first)
    os.close(t.lock_folder(tmp_path))


# ---- atomic files ----


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"new and longer", b""):
        t.write_atomically(path, data)
        assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call,number", [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_failed_write_leaves_the_old_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(t.UserError, match=f"{path}.*{os.strerror(number)}.*old one is untouched"):
        t.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_disk_that_fills_up_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    """A real short write: the kernel refuses what goes beyond the largest file size."""
    path, limit = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(t.UserError, match="could not be written"):
            t.write_atomically(path, bytes(2**22))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        t.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    t.write_atomically(path, b"new")  # a leftover does not disturb the next write
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/folder/file", "plain/file"])
def test_write_where_no_folder_is_is_a_user_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(t.UserError, match="could not be written"):
        t.write_atomically(tmp_path / where, b"data")


def test_log_on_a_full_disk_costs_its_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("train.log", "metrics.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    log = t.Log(tmp_path, True)
    for number in range(3):
        log.line(f"line {number}")
        log.metric("train", step=number)
    log.close()
    told = capsys.readouterr()
    assert told.out == "line 0\nline 1\nline 2\n"
    assert told.err.count("No space left on device") == 2, "once for each file"


@pytest.mark.parametrize("obstacle", ["folder", "full disk"])
def test_lock_that_cannot_be_written_is_one_line(obstacle: str, tmp_path: Path) -> None:
    if obstacle == "folder":
        (tmp_path / "lock").mkdir()
    else:
        (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(t.UserError, match="lock .*(cannot be opened|could not be written)"):
        t.lock_folder(tmp_path)
