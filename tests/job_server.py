"""A process that has imported train_gpt and forks a copy of itself for each command it is told to run.

Importing torch takes longer than a tiny job, and tests of resume and of ranks start hundreds of jobs. A copy runs
`train_gpt.main` with the arguments, the environment and the output files of one request, as a fresh process would.

Requests are JSON objects, one on each line of stdin; the reply to each is the copy's process id. When a copy has
ended, its exit code (minus the signal's number if one ended it) is written to the request's `status` file.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_disk_call(number: int) -> None:
    """Arrange that this process is killed just before its `number`-th fsync, rename or deletion, but for heartbeats,
    which another thread writes as often as time passes."""
    left = [number]

    def watch(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            left[0] -= threading.current_thread() is threading.main_thread()
            if left[0] == 0:
                die()
            return call(*args, **options)

        return watched

    os.fsync, os.replace, os.unlink = watch(os.fsync), watch(os.replace), watch(os.unlink)


def kill_in_write(name: str, share: float) -> None:
    """Arrange that this process is killed when it has written that share of the file `name`."""
    import builtins

    plain_open = builtins.open

    class Handle:
        """The file, whose first write stops halfway."""

        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __enter__(self) -> Handle:
            return self

        def __exit__(self, *error: Any) -> None:
            self.handle.close()

        def write(self, data: bytes) -> None:
            self.handle.write(data[: int(len(data) * share)])
            self.handle.flush()
            die()

    def watched(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        handle = plain_open(path, mode, *args, **options)
        return Handle(handle) if "w" in mode and Path(path).name == name else handle

    builtins.open = watched  # type: ignore[assignment]


def fail_disk_call(number: int, code: int) -> None:
    """Arrange that this process's `number`-th fsync fails with an errno, as on a full disk."""
    left, fsync = [number], os.fsync

    def watched(handle: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    os.fsync = watched  # type: ignore[assignment]


def run_clock_at(speed: float) -> None:
    """Let this process's clock run at another speed, since those of two machines never agree to the last digit."""
    monotonic, began = time.monotonic, time.monotonic()
    time.monotonic = lambda: began + speed * (monotonic() - began)


def in_steps(first: int, last: int, act: Callable[[Any], None]) -> None:
    """Arrange that something happens after the backward pass of these steps, counted from 0."""
    make_step = train_gpt.make_step

    def make(s: Any) -> Callable[..., Any]:
        step = make_step(s)

        def stepped(batch: Any, state: Any, progress: float) -> Any:
            out = step(batch, state, progress)
            if first <= state.step <= last:
                act(s)
            return out

        return stepped

    train_gpt.make_step = make


def poison_gradient(first: int, last: int, value: float) -> None:
    """One number of one gradient becomes `value` (NaN, infinity) in these steps."""

    def poison(s: Any) -> None:
        next(p for p in s.model.parameters() if p.grad is not None).grad.view(-1)[0] = value

    in_steps(first, last, poison)


def hang_in_step(number: int) -> None:
    """This process waits for ever in a step, as one whose device has stopped to answer."""
    in_steps(number, number, lambda s: threading.Event().wait())


def hang_in_save() -> None:
    """Every checkpoint takes for ever."""
    train_gpt.save_checkpoint = lambda *_: threading.Event().wait()


def score_slowly(seconds: float) -> None:
    """Every chunk of an evaluation takes so much longer."""
    predict = train_gpt.Scorer.predict

    def slow(*told: Any) -> Any:
        time.sleep(seconds)
        return predict(*told)

    train_gpt.Scorer.predict = slow  # type: ignore[method-assign]


def jump_wall_clock(seconds: float) -> None:
    """The time of day jumps to and fro with every look at it, as when it is set anew."""
    wall, sign = time.time, [1]

    def jumping() -> float:
        sign[0] = -sign[0]
        return wall() + sign[0] * seconds

    time.time = jumping


HOOKS: dict[str, Callable[..., None]] = {
    "poison_gradient": poison_gradient,
    "hang_in_step": hang_in_step,
    "hang_in_save": hang_in_save,
    "score_slowly": score_slowly,
    "jump_wall_clock": jump_wall_clock,
    "kill_at_disk_call": kill_at_disk_call,
    "kill_in_write": kill_in_write,
    "fail_disk_call": fail_disk_call,
    "run_clock_at": run_clock_at,
}


def run(request: dict[str, Any]) -> int:
    """Become the process that a request describes; returns its exit code."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.setsid()
    os.chdir(request["cwd"])
    for stream, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, stream)
        os.close(handle)
    torch.set_num_threads(1)
    if request["hook"]:
        name, *values = request["hook"]
        HOOKS[name](*values)
    argv, environ = request["args"], dict(os.environ)
    try:
        train_gpt.answer_early(argv, environ)
        return train_gpt.main(argv, environ)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:  # noqa: BLE001 (as the interpreter itself: the traceback, and exit code 1)
        traceback.print_exc()
        return 1


def leave(code: int) -> None:
    """End this copy: wait for its threads as the interpreter does, but spare the half second of taking torch apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def reap(running: dict[int, str]) -> None:
    """Write the exit codes of the copies that have ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        path = Path(running.pop(pid))
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(str(os.waitstatus_to_exitcode(status)))
        temporary.replace(path)


def serve() -> None:
    """Answer requests until stdin closes; copies that still run then are ended."""
    running: dict[int, str] = {}
    gc.freeze()  # the collector of a copy would touch, and so copy, all pages it shares with this process
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            line = sys.stdin.readline()
            if not line:
                break
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                leave(run(request))
            running[pid] = request["status"]
            print(pid, flush=True)
        reap(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
