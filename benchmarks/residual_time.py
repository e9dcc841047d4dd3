"""Step time of residual topologies over the plain one's: forward, backward and optimizer, steps in turn in one process.

    python benchmarks/residual_time.py [--layers 4] [--dim 256] [--tokens 4096] [--length 256] [--rounds 20]
                                       [--eager] [--only hc,mhc_lite_2]

Compiled unless --eager. Random tokens, sp1024, float matrices, bf16 where the device has it, one thread on a CPU. For a
GPU: --layers 11 --dim 768 --tokens 49152 --length 2048. Medians with quartiles of the ratios, round by round.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"RESIDUAL": "plain"},
    "unet": {"RESIDUAL": "unet"},
    "hc": {"RESIDUAL": "hc"},
    "hc_all_learned": {"RESIDUAL": "hc", "HC_LEARN": "keep,write,bias,read,mix"},
    "hc_4_lanes": {"RESIDUAL": "hc", "HC_LANES": 4},
    "mhc_lite_2": {"RESIDUAL": "mhc"},
    "mhc_lite_4": {"RESIDUAL": "mhc", "MHC_N": 4},
    "mhc_static_4": {"RESIDUAL": "mhc", "MHC_MODE": "sinkhorn", "MHC_N": 4},
    "mhc_dynamic_2": {"RESIDUAL": "mhc", "MHC_LOGITS": "dynamic"},
    "mhc_dynamic_4": {"RESIDUAL": "mhc", "MHC_MODE": "sinkhorn", "MHC_N": 4, "MHC_LOGITS": "dynamic"},
}


class Step:
    """One topology's training step, its three parts timed."""

    def __init__(self, options: argparse.Namespace, variables: dict[str, Any]) -> None:
        shape = {"NUM_LAYERS": options.layers, "MODEL_DIM": options.dim, "TRAIN_SEQ_LEN": options.length}
        shape |= {"NUM_HEADS": options.dim // 64, "NUM_KV_HEADS": options.dim // 64, "MLP_MULT": 4.0}
        shape |= {"TRAIN_BATCH_TOKENS": options.tokens, "MICRO_BATCH_TOKENS": options.tokens, "RESID_MIX": 0}
        shape |= {"BIGRAM_HASH_BUCKETS": 4096, "COMPILE": int(not options.eager), "CPU_THREADS": 1, **variables}
        h = t.load_config({name: str(value) for name, value in shape.items()})
        self.rt = t.start_runtime(h)
        self.model = t.build_model(h, self.rt, 1)
        self.weights = t.Weights(self.model)
        self.weights.materialize(0.0)
        self.optimizer = t.Optimizer(h, self.rt, self.weights)
        self.loss = torch.compile(self.model.loss, dynamic=False) if self.rt.compile else self.model.loss
        self.tokens = torch.randint(0, h.vocab_size, (options.tokens // h.train_seq_len, h.train_seq_len + 1))
        self.tokens = self.tokens.to(self.rt.device)

    def seconds(self) -> tuple[float, float, float]:
        """Of the forward pass, the backward pass and the optimizer."""
        t.synchronize(self.rt)
        times = [time.perf_counter()]
        with self.rt.precision():
            total = self.loss(self.tokens[:, :-1], self.tokens[:, 1:], t.Variant(experts=True)).total
        t.synchronize(self.rt)
        times.append(time.perf_counter())
        (total / self.tokens.numel()).backward()
        t.synchronize(self.rt)
        times.append(time.perf_counter())
        self.optimizer.step(0.1, 0.9, False, 0.5)
        self.weights.clear_gradients()
        t.synchronize(self.rt)
        times.append(time.perf_counter())
        return tuple(np.diff(times).tolist())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time residual topologies against the plain one.")
    for name, default in (("layers", 4), ("dim", 256), ("tokens", 4096), ("length", 256), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--only", default=",".join(VARIANTS), help="names, comma-separated; plain is always there")
    options = parser.parse_args(argv)
    torch._dynamo.config.recompile_limit = 4 * len(VARIANTS)  # all variants are one function to the compiler
    names = list(dict.fromkeys(["plain", *options.only.split(",")]))
    steps = {name: Step(options, VARIANTS[name]) for name in names}
    for step in steps.values():
        for _ in range(3):
            step.seconds()
    found = np.array([[step.seconds() for step in steps.values()] for _ in range(options.rounds)])  # (R, V, 3)
    found = np.concatenate((found, found.sum(-1, keepdims=True)), -1)
    how = "eager" if options.eager else "compiled"
    print(f"{options.layers} layers x {options.dim}, {options.tokens} tokens a step of {options.length}, {how}")
    columns = ("topology", "ms a step", "whole step", "quartiles", "forward", "backward", "optimizer")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for place, name in enumerate(names):
        ratio = found[:, place] / found[:, 0]
        forward, backward, optimizer, whole = np.median(ratio, 0)
        low, high = np.percentile(ratio[:, 3], (25, 75))
        middle = 1e3 * np.median(found[:, place, 3])
        parts = f"{forward:.3f} | {backward:.3f} | {optimizer:.3f}"
        print(f"| {name} | {middle:.1f} | {whole:.3f} | {low:.3f} to {high:.3f} | {parts} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
