"""Prints the peak of a run's resident memory above what importing and a first small run take, and what was foreseen.

    python tests/memory_peak.py VARIABLE=value ...

In a process of its own, since a peak belongs to a process; Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt as t


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def run(environ: dict[str, str]) -> None:
    """Three steps of the real loop, without evaluation and checkpoints."""
    bounds = {"ITERATIONS": "3", "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "SAVE_EVERY": "0"}
    h = t.load_config({**environ, **bounds})
    s = t.open_session(h, t.start_runtime(h), Path("/nowhere"), t.Log(None, False))
    t.train_loop(s, t.TrainState())


def main() -> None:
    torch.set_num_threads(1)
    environ = dict(word.split("=", 1) for word in sys.argv[1:])
    window = environ["TRAIN_SEQ_LEN"]
    small = {"NUM_LAYERS": "2", "MICRO_BATCH_TOKENS": window, "TRAIN_BATCH_TOKENS": window}
    run({**environ, **small, **({"BATCH_STAGES": f"0:{window}"} if "BATCH_STAGES" in environ else {})})
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    run(environ)
    peak = resident("VmHWM") - before
    h = t.load_config(environ)
    foreseen = t.foreseen_memory(h, t.start_runtime(h))
    print(json.dumps({"peak": peak, **foreseen._asdict(), "ratio": round(foreseen.training / peak, 3)}))
    os._exit(0)


if __name__ == "__main__":
    main()
