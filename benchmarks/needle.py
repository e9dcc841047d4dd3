"""Needle in a haystack: is a token named again from far away? Trains small models and draws depth by length.

    python benchmarks/needle.py [--models nsa,rmt,attn,window] [--lengths 256,512,1024] [--steps 1000] [--out FOLDER]
                                [--device cpu|cuda] [--seed 1337]

A row is BOS and noise with one token of 64 others at a random place, the needle; wherever a question mark stands after
it, and there is one at the end of each row, the needle is to be named. Nothing else is scored. Models have two layers;
`window` is `attn` that sees 64 tokens in each layer, the near branch of `nsa`; chance is one in 64. Each model is
trained on the first length for a third of the steps (on all from the beginning `nsa` learns to use its window alone),
then on all in turn. It is asked at the end of rows with the needle at each of eight depths, 64 rows each. Writes
needle.json and needle.png into the folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

BOS, ASK, NOISE, NEEDLES = 0, 255, range(1, 128), range(128, 192)
DEPTHS, TRIES, QUESTIONS = 8, 64, 8
BASE: dict[str, Any] = {
    "PRESET": "local_float", "VOCAB_SIZE": 256, "NUM_LAYERS": 2, "MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1,
    "MLP_MULT": 2.0, "BIGRAM_HASH_BUCKETS": 0, "INDUCTION_ORDERS": "0", "PARTIAL_ROPE_DIMS": 8,
    "RESID_MIX": 0, "DOC_MASK": 0, "MATRIX_LR": 0.008, "SCALAR_LR": 0.01, "TIE_EMBEDDINGS": 0, "EMBED_LR": 0.015,
    "HEAD_LR": 0.01,
}  # fmt: skip
SPARSE = {
    "LAYER_PATTERN": "nsa", "NSA_BLOCK": 8, "NSA_STRIDE": 4, "NSA_SELECT_BLOCK": 16, "NSA_SELECT": 4, "NSA_WINDOW": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "nsa": SPARSE,
    "rmt": {"RMT_SEGMENT": 64, "RMT_TOKENS": 8, "RMT_BPTT": 32},
    "attn": {},
    "window": {"ATTN_WINDOW": 64},
}


def haystack(rows: int, length: int, depth: float | None, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens and targets (rows, length), -100 where nothing is asked; the needle at `depth`, or anywhere."""
    tokens = draw.choice(NOISE, (rows, length))
    tokens[:, 0], tokens[:, -1] = BOS, ASK
    targets = np.full((rows, length), -100)
    for row, needle in enumerate(draw.choice(NEEDLES, rows)):
        place = draw.integers(1, length - 2) if depth is None else 1 + round(depth * (length - 3))
        questions = draw.integers(place + 1, length, QUESTIONS) if depth is None else []
        tokens[row, place], tokens[row, questions] = needle, ASK
        targets[row, questions], targets[row, -1] = needle, needle
    return tokens, targets


class Learner:
    """One model and what trains it."""

    def __init__(self, variables: dict[str, Any], options: argparse.Namespace, longest: int) -> None:
        given = {**BASE, **variables, "TRAIN_SEQ_LEN": longest, "SEED": options.seed, "DEVICE": options.device}
        given |= {"MICRO_BATCH_TOKENS": max(4096, longest), "TRAIN_BATCH_TOKENS": max(4096, longest), "COMPILE": 0}
        self.h = t.load_config({name: str(value) for name, value in given.items()})
        self.rt = t.start_runtime(self.h)
        self.model = t.build_model(self.h, self.rt, BOS)
        self.weights = t.Weights(self.model)
        self.weights.materialize(0.0)
        self.optimizer = t.Optimizer(self.h, self.rt, self.weights)

    def on_device(self, *arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(self.rt.device) for array in arrays]

    def train(self, tokens: np.ndarray, targets: np.ndarray, scale: float) -> float:
        given, wanted = self.on_device(tokens, targets)
        moment = t.Moment(torch.tensor(0.5), torch.tensor(0), torch.arange(len(given), device=self.rt.device))
        with self.rt.precision():
            loss = self.model.loss(given, wanted, t.Variant(), None, moment).total / (wanted >= 0).sum()
        loss.backward()
        self.optimizer.step(scale, 0.95, False, 0.5)
        self.weights.clear_gradients()
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Share of rows whose needle is named at the end."""
        found, parts = [], max(1, tokens.size // 16384)
        for some, wanted in zip(np.array_split(tokens, parts), np.array_split(targets[:, -1], parts), strict=True):
            given, answer = self.on_device(some, wanted)
            with self.rt.precision():
                logits, _ = self.model.logits(given, t.Variant(), last=1)
            found.append((logits[:, -1].argmax(-1) == answer).float().cpu())
        return float(torch.cat(found).mean())


def run(name: str, lengths: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and try it; accuracies by length, one for each depth."""
    torch.manual_seed(options.seed)
    learner, draw = Learner(MODELS[name], options, max(lengths)), np.random.default_rng(options.seed)
    began, losses = time.monotonic(), list[float]()
    for step in range(options.steps):
        length = lengths[step % len(lengths)] if 3 * step > options.steps else lengths[0]
        scale = min(1.0, (step + 1) / 20, 2 * (1 - step / options.steps))
        losses.append(learner.train(*haystack(max(1, 4096 // length), length, None, draw), scale))
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(
                f"{name} step:{step + 1}/{options.steps} loss:{np.mean(losses[-50:]):.4f} time:{seconds:.0f}s",
                flush=True,
            )
    trained, grid = time.monotonic() - began, dict[str, list[float]]()
    for length in lengths:
        depths = np.linspace(0, 1, DEPTHS)
        grid[str(length)] = [learner.accuracy(*haystack(TRIES, length, depth, draw)) for depth in depths]
        print(f"{name} length:{length} " + " ".join(f"{share:.3f}" for share in grid[str(length)]), flush=True)
    return {"accuracy": grid, "train_seconds": round(trained, 1), "final_loss": float(np.mean(losses[-50:]))}


def draw_picture(results: dict[str, Any], lengths: Sequence[int], path: Path) -> None:
    """Depth by length, a field for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3.2), sharey=True, squeeze=False)
    for field, (name, result) in zip(fields[0], results.items(), strict=True):
        grid = np.array([result["accuracy"][str(length)] for length in lengths]).T
        image = field.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
        for (row, column), share in np.ndenumerate(grid):
            field.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
        field.set_title(f"{name}: least {100 * grid.min():.0f}%")
        field.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        field.set_yticks(range(DEPTHS), [f"{depth:.2f}" for depth in np.linspace(0, 1, DEPTHS)])
        field.set_xlabel("length, tokens")
    fields[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=fields[0].tolist(), label=f"found; chance {100 / len(NEEDLES):.1f}%")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Needle in a haystack.")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default="256,512,1024")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lengths = [int(text) for text in options.lengths.split(",")]
    results = {name: run(name, lengths, options) for name in options.models.split(",")}
    options.out.mkdir(parents=True, exist_ok=True)
    note = {"steps": options.steps, "seed": options.seed, "torch": torch.__version__, "chance": 1 / len(NEEDLES)}
    (options.out / "needle.json").write_text(json.dumps({**note, "models": results}, indent=1) + "\n")
    draw_picture(results, lengths, options.out / "needle.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
