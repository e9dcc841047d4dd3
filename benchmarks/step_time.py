"""Time training steps of a preset, alone or against a peer, interleaved in one run.

    python benchmarks/step_time.py PRESET=local_float
    python benchmarks/step_time.py PRESET=local_float --versus PRESET=local
    python benchmarks/step_time.py PRESET=local_float --peer benchmarks/minimal_gpt.py

The peer gets every value of our configuration as a variable, so that both have the same shapes, batch and data.

Ours is timed by `train_gpt.py bench` (data, forward+backward, optimizer, peak memory). A peer is any script that reads
the field's variables and prints the field's `step:N/M ... train_time:…ms` lines; its step time is the median difference
of consecutive lines. The two sides take turns, so that a machine whose speed drifts slows both; the ratio is that of
each pair of turns, given as median, minimum and maximum. Nothing here asserts anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402 (after the path)

LINE = re.compile(r"step:(\d+)/\d+ .*train_time:(\d+(?:\.\d+)?)ms")


def environment(settings: list[str]) -> dict[str, str]:
    """This process's environment with VAR=VALUE words added."""
    return {**os.environ, **dict(word.split("=", 1) for word in settings)}


def resolved(settings: list[str]) -> dict[str, str]:
    """The environment with every value of our configuration, for a script that does not know our presets."""
    config = t.config_env(t.load_config(environment(settings)))
    return {**os.environ, **dict(line.split("=", 1) for line in config.splitlines())}


def run(command: list[str], env: dict[str, str]) -> str:
    """Standard output of a command; ends the benchmark with the command's last words if it fails."""
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} exited with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def time_ours(settings: list[str], steps: int) -> dict[str, float]:
    """The JSON object of `bench`."""
    out = run([sys.executable, "train_gpt.py", "bench", "--steps", str(steps)], environment(settings))
    return json.loads(out.splitlines()[-1])


def time_peer(script: str, settings: list[str], peer_set: list[str], steps: int) -> dict[str, float]:
    """Tokens/s of a script of the field from its log lines, the first quarter of its steps left out."""
    env = resolved(settings) | dict(word.split("=", 1) for word in peer_set)
    env |= {"ITERATIONS": str(steps), "TRAIN_LOG_EVERY": "1", "VAL_LOSS_EVERY": "0", "WARMUP_STEPS": "0"}
    env |= {"MAX_VAL_TOKENS": "4096", "MAX_WALLCLOCK_SECONDS": "0"}
    lines = [(int(m[1]), float(m[2])) for m in map(LINE.search, run([sys.executable, script], env).splitlines()) if m]
    marks = dict(lines)
    times = [marks[n] - marks[n - 1] for n in sorted(marks) if n - 1 in marks and n > steps // 4]
    if not times:
        sys.exit(f"error: {script} printed no consecutive `step:N/M ... train_time:…ms` lines")
    return {"tokens_per_s": float(env["TRAIN_BATCH_TOKENS"]) * 1e3 / statistics.median(times)}


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.4g}  min {min(values):.4g}  max {max(values):.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="VAR=VALUE", help="our configuration")
    parser.add_argument("--peer", metavar="SCRIPT", help="another training script of the field, by path")
    parser.add_argument("--peer-set", nargs="*", default=[], metavar="VAR=VALUE", help="variables for the peer only")
    parser.add_argument("--versus", nargs="*", metavar="VAR=VALUE", help="another configuration of ours")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_intermixed_args()
    ours, others, ratios = [], [], []
    for turn in range(options.rounds):
        ours.append(time_ours(options.settings, options.steps))
        text = f"turn {turn + 1}: ours {ours[-1]['tokens_per_s']:.0f} tok/s"
        if options.peer:
            others.append(time_peer(options.peer, options.settings, options.peer_set, options.steps))
        elif options.versus is not None:
            others.append(time_ours(options.versus, options.steps))
        if others:
            ratios.append(ours[-1]["tokens_per_s"] / others[-1]["tokens_per_s"])
            text += f"  other {others[-1]['tokens_per_s']:.0f} tok/s  ratio {ratios[-1]:.3f}"
        print(text, flush=True)
    for key in ours[0]:
        print(f"ours  {key:<22} {spread([o[key] for o in ours])}")
    share = [o["data_s"] / (o["data_s"] + o["forward_backward_s"] + o["optimizer_s"]) for o in ours]
    print(f"ours  {'loader share of step':<22} {spread(share)}")
    if others:
        print(f"other {'tokens_per_s':<22} {spread([o['tokens_per_s'] for o in others])}")
        print(f"ratio {'ours / other':<22} {spread(ratios)}")


if __name__ == "__main__":
    main()
