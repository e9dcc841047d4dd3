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
    """Arrange that this process is killed just before its `number`-th fsync, rename or deletion."""
    left = [number]

    def watch(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            left[0] -= 1
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


HOOKS: dict[str, Callable[..., None]] = {
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
