"""Time of linear_scan, forward and backward: against the obvious loop over time, and on CUDA against memory bandwidth.

    python benchmarks/scan_time.py [--rows 8] [--length 1024] [--width 128] [--rounds 9] [--device cpu|cuda]

The variants take turns; medians and ratios with their quartiles are printed. On CUDA the floor is the bytes that must
be moved (forward: read a and b, write h; backward: read a, h and its gradient, write the gradients of a and b) over the
bandwidth that a copy of the same size reaches in the same run.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt


def loop_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, one step of the stream at a time."""
    found, h = [], h0
    for step in range(b.shape[1]):
        h = a[:, step] * h + b[:, step]
        found.append(h)
    return torch.stack(found, 1)


def seconds(device: str, work: Callable[[], object]) -> float:
    """Time of one call, the device's queue emptied."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def quartiles(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time linear_scan.")
    for name, default in (("rows", 8), ("length", 1024), ("width", 128), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    shape, device = (options.rows, options.length, options.width), options.device
    a = torch.rand(shape, device=device).requires_grad_()
    b, grad = torch.randn(shape, device=device).requires_grad_(), torch.randn(shape, device=device)
    h0 = torch.zeros(shape[0], shape[2], device=device).requires_grad_()

    def both(scan: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(a, b, h0), (a, b, h0), grad)

    def ours(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        return train_gpt.linear_scan(a, b, h0)[0]

    source, target = torch.empty(2, *shape, device=device)
    variants = {
        "ours, forward": lambda: ours(a.detach(), b.detach(), h0.detach()),
        "ours, forward and backward": both(ours),
        "copy": lambda: target.copy_(source),
    }
    if device == "cpu":
        variants["loop, forward and backward"] = both(loop_scan)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for work in variants.values():
        seconds(device, work)  # warm-up, compiles
    for _ in range(options.rounds):
        for name, work in variants.items():
            times[name].append(seconds(device, work))
    found = {name: np.array(values) for name, values in times.items()}
    print(f"B={shape[0]} T={shape[1]} S={shape[2]} float32 on {device}, milliseconds: median (quartiles)")
    for name, values in found.items():
        print(f"  {name:<28}{quartiles(values * 1e3)}")
    if device == "cpu":
        ratio = found["loop, forward and backward"] / found["ours, forward and backward"]
        print(f"loop over ours, forward and backward: {quartiles(ratio)}")
    else:  # the copy reads and writes two tensors, four in all; the forward pass three, forward and backward eight
        print(f"forward over its floor: {quartiles(found['ours, forward'] / (0.75 * found['copy']))}")
        whole = found["ours, forward and backward"] / (2 * found["copy"])
        print(f"forward and backward over their floor: {quartiles(whole)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
