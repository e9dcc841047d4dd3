"""A long run of several ranks that is killed again and again, and started again by tools/supervise.sh.

    python benchmarks/soak.py [--minutes 30] [--ranks 2] [--every 40] [--out FOLDER] [VARIABLE=value ...]

Every so many seconds (half to one and a half times as many, drawn by --seed) a random rank gets SIGKILL, once the run
has saved a checkpoint since its last start. Each rank's resident memory and open descriptors are noted every second. At
the end SIGTERM saves and stops the run. Prints one JSON object: starts, kills, steps, and for the longest-lived process
how far memory and descriptors have grown from its tenth second on; exit code 1 if a start was missed, steps were lost
that a checkpoint held, or a process was left over. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUPERVISE = """
. tools/setup.sh
. tools/supervise.sh
check_supervision
supervise "$1" "$2" -m torch.distributed.run --standalone --nproc_per_node="$3" train_gpt.py
"""
SMALL = {
    "PRESET": "local", "NUM_LAYERS": "2", "MODEL_DIM": "64", "BIGRAM_HASH_BUCKETS": "0", "TRAIN_BATCH_TOKENS": "1024",
    "MICRO_BATCH_TOKENS": "1024", "ITERATIONS": "100000000", "MAX_WALLCLOCK_SECONDS": "0", "SAVE_EVERY": "50",
    "VAL_LOSS_EVERY": "500", "MAX_VAL_TOKENS": "10000", "TRAIN_LOG_EVERY": "50", "CPU_THREADS": "1", "DEVICE": "cpu",
}  # fmt: skip


class Sample(NamedTuple):
    """What a process holds at a moment."""

    age: float
    resident_mib: float
    descriptors: int


def heartbeat(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What a rank last told of itself."""
    path = folder / f"heartbeat_rank{rank}.json"
    return json.loads(path.read_text()) if path.is_file() else {"step": 0, "pid": 0}


def sample(pid: int, began: float) -> Sample | None:
    """A process's memory and descriptors, None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found = Sample(time.monotonic() - began, pages * 4096 / 2**20, len(os.listdir(f"/proc/{pid}/fd")))
        return found if pages else None  # a dead process that nobody has asked for yet holds nothing
    except (OSError, IndexError):
        return None


class Soak:
    """The supervised run, who is killed when, and what was seen."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder, self.choose = options, folder, random.Random(options.seed)
        self.lives: dict[int, list[Sample]] = {}
        self.born: dict[int, float] = {}
        self.kills, self.furthest, self.lost = 0, 0, 0
        self.mine = dict(word.split("=", 1) for word in options.variables)
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **SMALL, **self.mine, "MAX_RESTARTS": "1000000"}
        environ |= {"OUT_DIR": str(folder.parent), "RUN_ID": folder.name}
        command = ["bash", "-euc", SUPERVISE, "soak", str(folder), sys.executable, str(options.ranks)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)

    def look(self) -> list[int]:
        """Sample all ranks; the process ids of those that live."""
        alive = []
        for rank in range(self.options.ranks):
            told = heartbeat(self.folder, rank)
            self.furthest = max(self.furthest, told["step"])
            pid = told["pid"]
            seen = sample(pid, self.born.setdefault(pid, time.monotonic())) if pid else None
            if seen:
                self.lives.setdefault(pid, []).append(seen)
                alive.append(pid)
        return alive

    def run(self) -> None:
        """Kill and watch until the time is over."""
        end, after = time.monotonic() + 60 * self.options.minutes, ""
        due = time.monotonic() + self.wait()
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(1)
            alive, latest = self.look(), self.latest()
            if time.monotonic() > due and len(alive) == self.options.ranks and latest != after:
                os.kill(self.choose.choice(alive), signal.SIGKILL)
                self.kills, after, due = self.kills + 1, latest, time.monotonic() + self.wait()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def latest(self) -> str:
        """The newest checkpoint's name, empty before the first."""
        path = self.folder / "checkpoints" / "latest"
        return path.read_text() if path.is_file() else ""

    def wait(self) -> float:
        return self.options.every * self.choose.uniform(0.5, 1.5)

    def result(self) -> dict[str, Any]:
        """The figures, and what went wrong."""
        if not self.lives:
            raise SystemExit("no rank has begun to train; the log says why, or more --minutes are needed")
        log = (self.folder / "train.log").read_text()
        restarts = log.count("\nrestart ")
        lives = [[s for s in life if s.age > 10] for life in self.lives.values()]
        longest = max((life for life in lives if life), key=len, default=[Sample(0, 0, 0)])
        left = [pid for pid in self.lives if sample(pid, 0)]
        steps = [int(line.split("step:")[1].split()[0]) for line in log.splitlines() if line.startswith("resumed ")]
        figures = {
            "minutes": self.options.minutes, "ranks": self.options.ranks, "kills": self.kills, "restarts": restarts,
            "furthest_step": self.furthest, "last_checkpoint": self.latest(), "exit_code": self.process.returncode,
            "processes": len(self.lives), "longest_life_s": round(longest[-1].age),
            "resident_mib_from_to": [round(longest[0].resident_mib, 1), round(longest[-1].resident_mib, 1)],
            "most_resident_mib": round(max(s.resident_mib for life in self.lives.values() for s in life), 1),
            "descriptors_from_to": [longest[0].descriptors, longest[-1].descriptors],
            "most_descriptors": max(s.descriptors for life in self.lives.values() for s in life),
        }  # fmt: skip
        problems = {
            "a start was missed": restarts != self.kills,
            "a resumed run began before an earlier one": steps != sorted(steps),
            "it did not end as told": self.process.returncode != 143,
            "processes were left over": bool(left),
        }
        return {**figures, "problems": [text for text, there in problems.items() if there]}


def main() -> int:
    """Soak, then tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=float, default=40, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="")
    parser.add_argument("variables", nargs="*", metavar="VARIABLE=value")
    options = parser.parse_args()
    soak = Soak(options, Path(options.out or tempfile.mkdtemp()).absolute() / "soak")
    try:
        soak.run()
    finally:
        if soak.process.poll() is None:
            soak.process.terminate()
    result = soak.result()
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
