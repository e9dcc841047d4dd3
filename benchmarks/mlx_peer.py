"""Tokens/s and memory of train_gpt_mlx.py against the field's published MLX training script, taking turns.

    python benchmarks/mlx_peer.py PATH/train_gpt_mlx.py NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 \
        TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192 MICRO_BATCH_TOKENS=8192

The peer is train_gpt_mlx.py of github.com/openai/parameter-golf, or one with the same parts: its network, optimizers
and loader are built as its main does, in float32 like ours, from variables of the same names, and its steps are timed
in the order of its loop. Validation and files are left out on both sides. Each turn is a process of its own; where
torch is installed its BLAS is loaded first on both sides, since MLX's own on Linux takes 27 times as long. COMPILE=1
compiles both sides (minutes of C++ on a CPU, once), COMPILE=0 neither, auto each as its script does by default.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SHARED = ("VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS",
          "DATA_PATH", "TOKENIZER_PATH", "SEED", "MUON_BACKEND_STEPS", "LOGIT_SOFTCAP", "QK_GAIN_INIT")  # fmt: skip


def load_blas() -> None:
    """Torch's BLAS in place of MLX's own, which on Linux is the reference one."""
    if sys.platform != "darwin" and (spec := importlib.util.find_spec("torch")) and spec.origin:
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


def ours(_: str) -> Callable[[], None]:
    """One step of train_gpt_mlx.py."""
    sys.path.insert(0, str(ROOT))
    import train_gpt_mlx as m

    h = m.load_config(dict(os.environ))
    return m.Stopwatch(h, m.start_runtime(h)).run


def peer(script: str) -> Callable[[], None]:
    """One step of the script at a path, in float32."""
    import mlx.core as mx

    if os.environ.get("COMPILE") == "0":
        mx.disable_compile()
    os.environ["GRAD_ACCUM_STEPS"] = "1"
    os.environ["MLX_MAX_MICROBATCH_TOKENS"] = os.environ["MICRO_BATCH_TOKENS"]
    os.environ["MLP_MULT"] = str(int(float(os.environ["MLP_MULT"])))
    spec = importlib.util.spec_from_file_location("peer", script)
    assert spec is not None and spec.loader is not None
    p: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(p)
    p.COMPUTE_DTYPE = mx.float32
    args = p.Hyperparameters()
    sizes = (args.vocab_size, args.num_layers, args.model_dim, args.num_heads, args.num_kv_heads, args.mlp_mult)
    model = p.GPT(*sizes, args.logit_chunk_tokens, args.logit_softcap, args.rope_base, args.tied_embed_init_std,
                  args.qk_gain_init)  # fmt: skip
    opt, loader, count = p.SplitOptimizers(model, args), p.TokenLoader(args.train_files), iter(range(10**9))
    both = p.nn.value_and_grad(model, lambda x, y: model.loss(x, y))
    compiled = mx.compile(both, inputs=model.state, outputs=model.state)

    def step() -> None:
        loss, grads = p.loss_and_grad_chunked(args, loader, compiled)
        loss.item()
        opt.step(model, p.clip_grad_tree(grads, args.grad_clip_norm), step=next(count), lr_mul=1.0)
        mx.eval(model.state)  # the next step would wait for it

    return step


SIDES = {"ours": ours, "peer": peer}


def time_side(side: str, script: str, steps: int) -> dict[str, float]:
    """Tokens/s by the clock and by the processor's time, medians of steps without the first three, and peak memory.

    Memory is that of MLX's arrays and of the process. The processor's time of all threads tells more than the clock's
    on a machine that others use.
    """
    load_blas()
    import mlx.core as mx

    step, times = SIDES[side](script), list[tuple[float, float]]()
    for _ in range(steps + 3):
        began = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    tokens, (clock, used) = float(os.environ["TRAIN_BATCH_TOKENS"]), zip(*times[3:], strict=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"tokens_per_s": tokens / statistics.median(clock), "tokens_per_cpu_s": tokens / statistics.median(used)}
    return {**found, "arrays_mib": mx.get_peak_memory() / MIB, "process_mib": most / MIB}


def settings_of(words: list[str]) -> dict[str, str]:
    """Variables for both sides: ours, with every value that the peer reads, too."""
    sys.path.insert(0, str(ROOT))
    import train_gpt as t  # the configuration is the same in both files, and no MLX is loaded here

    exact = {"MATRIX_CODEC": "exact", "FP_STORAGE": "exact", "SCALAR_CODEC": "exact", "MUON_ROW_NORM": "0"}
    given = {**exact, "PRECISION": "fp32", "COMPILE": "auto", **dict(word.split("=", 1) for word in words)}
    values = dict(line.split("=", 1) for line in t.config_env(t.load_config({**os.environ, **given})).splitlines())
    return {**os.environ, **given, **{name: values[name] for name in (*SHARED, "MICRO_BATCH_TOKENS", "MLP_MULT")}}


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.4g}  min {min(values):.4g}  max {max(values):.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="the peer's path")
    parser.add_argument("settings", nargs="*", metavar="VAR=VALUE", help="for both sides")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="time one side in this process, a JSON line")
    options = parser.parse_intermixed_args()
    if options.side:
        print(json.dumps(time_side(options.side, options.script, options.steps)))
        return
    env, found = settings_of(options.settings), {side: list[dict[str, float]]() for side in SIDES}
    for turn in range(options.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, options.script, "--side", side, "--steps", str(options.steps)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
        one, two = (found[side][-1]["tokens_per_s"] for side in SIDES)
        print(f"turn {turn + 1}: ours {one:.0f} tok/s  peer {two:.0f} tok/s  ratio {one / two:.3f}", flush=True)
    for side, turns in found.items():
        for key in turns[0]:
            print(f"{side} {key:<17} {spread([turn[key] for turn in turns])}")
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        print(f"ratio {key:<16} {spread([a[key] / b[key] for a, b in zip(*found.values(), strict=True)])}")


if __name__ == "__main__":
    main()
