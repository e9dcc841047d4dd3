"""Time of sparse attention (NSA) against full attention, forward and backward, at several lengths, split by branch.

    python benchmarks/attention_time.py [--lengths 1024,2048,4096,8192,16384] [--tokens 0] [--heads 8] [--kv-heads 2]
        [--dim 64] [--block 8] [--stride 4] [--select-block 16] [--select 4] [--window 64] [--backend gather]
        [--rounds 5] [--device cpu|cuda] [--writing]

Of attention alone: queries, keys and values are given, projections and gates left out, the pooling of blocks is in. A
row has one sequence, or as many as make up --tokens. Full attention is torch's (FlashAttention on CUDA, by SDPA).
The variants take turns; medians, and quartiles of the ratios round by round. bf16 on CUDA; float32 and one thread on a
CPU.
With --writing: whole layers without gradients instead, with projections and caches: tokens/s of reading a context, and
milliseconds of one more token after it, with the bytes of keys and values that it reads.
For a GPU: --lengths 4096,8192,16384,32768,65536 --tokens 65536 --heads 64 --kv-heads 4 --dim 128 --block 32 --stride 16
--select-block 64 --select 16 --window 512.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t
from benchmarks.scan_time import quartiles, seconds


def config_of(options: argparse.Namespace, pattern: str) -> t.Hyperparameters:
    """One layer of the wanted shape."""
    names = {"block": "NSA_BLOCK", "stride": "NSA_STRIDE", "select_block": "NSA_SELECT_BLOCK"}
    names |= {"select": "NSA_SELECT", "window": "NSA_WINDOW", "heads": "NUM_HEADS", "kv_heads": "NUM_KV_HEADS"}
    values = {name: str(vars(options)[key]) for key, name in names.items()}
    values |= {"LAYER_PATTERN": pattern, "NUM_LAYERS": "1", "MODEL_DIM": str(options.heads * options.dim)}
    return t.load_config({**values, "COMPILE": "0", "DEVICE": options.device, "NSA_IMPL": options.backend})


@torch.no_grad()
def writing(options: argparse.Namespace, length: int) -> str:
    """Both layers after a context of this length, in turn: reading it, and one more token."""
    found: dict[str, list[list[float]]] = {"attn": [], "nsa": []}
    for number in range(options.rounds + 1):
        for pattern, times in found.items():
            h = config_of(options, pattern)
            rt = t.start_runtime(h)
            torch.set_num_threads(1)
            model = t.build_model(h, rt, 1)
            layer, x = model.blocks[0][pattern], torch.randn(1, length + 1, h.model_dim, device=rt.device)
            x = x.bfloat16() if options.device == "cuda" else x
            start = model.init_state(1)
            ctx = model.context(torch.full((1, length), 2, device=rt.device), start, t.Variant())
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                state = layer(x[:, :length], ctx, start[1]).state
                prefill = seconds(options.device, lambda: layer(x[:, :length], ctx, start[1]))  # noqa: B023
                stream = model.next_stream(ctx, start[0])
                one = model.context(torch.full((1, 1), 2, device=rt.device), (stream, state), t.Variant())
                steps = [seconds(options.device, lambda: layer(x[:, length:], one, state)) for _ in range(9)]  # noqa: B023
            times += [[prefill, float(np.median(steps))]] if number else []
    reads = {"attn": length + 1, "nsa": (length + 1 - options.block) // options.stride + 1}
    reads["nsa"] += min(length + 1, options.select * options.select_block) + min(length + 1, options.window)
    size = 2 * options.kv_heads * options.dim * (2 if options.device == "cuda" else 4)
    text = f"length:{length}"
    for pattern, times in found.items():
        prefill, step = np.median(np.array(times), 0)
        text += (
            f" {pattern}: read {length / prefill:.4g} tok/s, write {1e3 * step:.3g} ms, {reads[pattern] * size} bytes;"
        )
    return text


class Case:
    """Queries, keys and values of one length, and what the branches see."""

    def __init__(self, options: argparse.Namespace, length: int) -> None:
        self.h = config_of(options, "nsa")
        rt = t.start_runtime(self.h)
        model = t.build_model(self.h, rt, 1)
        rows = max(1, options.tokens // length)
        self.layer, self.backend = model.blocks[0]["nsa"], model.blocks[0]["nsa"].backend
        self.ctx = model.context(torch.full((rows, length), 2, device=rt.device), None, t.Variant())
        self.views, self.size = self.layer.views(length, length, self.ctx), self.h.nsa_select_block
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32

        def drawn(heads: int) -> Tensor:
            return torch.randn(rows, length, heads, options.dim, device=rt.device, dtype=dtype).requires_grad_()

        self.q, self.grad = drawn(options.heads), drawn(options.heads).detach()
        self.k, self.v = ([drawn(options.kv_heads) for _ in range(3)] for _ in range(2))
        self.autocast = torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def blocks(self) -> tuple[Tensor, Tensor]:
        with self.autocast:
            return self.layer.key_pool(self.k[0], self.ctx), self.layer.value_pool(self.v[0], self.ctx)

    def full(self) -> Tensor:
        return t.sdpa(self.q, self.k[1], self.v[1], None, True)

    def compressed(self) -> tuple[Tensor, Tensor]:
        form = (self.h.nsa_block, self.h.nsa_stride, self.size, -(-self.q.shape[1] // self.size), 0)
        return self.backend.compressed(self.q, *self.blocks(), self.views.blocks, form)

    def choice(self, importance: Tensor) -> Tensor:
        return t.best_blocks(importance, self.views.tokens, self.size, self.h.nsa_select).blocks

    def selected(self, chosen: Tensor) -> Tensor:
        return self.backend.selected(self.q, self.k[1], self.v[1], chosen, self.views.keys, self.size)

    def near(self) -> Tensor:
        return self.backend.near(self.q, self.k[2], self.v[2], self.views.near)

    def both(self, work: Callable[[], Tensor]) -> Callable[[], object]:
        """Forward and backward."""
        return lambda: torch.autograd.grad(work(), (self.q, *self.k, *self.v), self.grad, allow_unused=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time sparse attention against full attention.")
    for name, default in (("tokens", 0), ("heads", 8), ("kv-heads", 2), ("dim", 64), ("block", 8), ("stride", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("select-block", 16), ("select", 4), ("window", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--writing", action="store_true")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__} {options.device}, forward and backward, milliseconds; ratios are full over sparse"
    )
    for length in (int(text) for text in options.lengths.split(",")):
        if options.writing:
            print(writing(options, length))
            continue
        case, times = Case(options, length), list[list[float]]()
        torch.set_num_threads(1)
        importance = case.compressed()[1]
        chosen = case.choice(importance)
        works = {
            "full": case.both(case.full), "compressed": case.both(lambda: case.compressed()[0]),  # noqa: B023
            "choice": lambda: case.choice(importance),  # noqa: B023
            "selected": case.both(lambda: case.selected(chosen)), "near": case.both(case.near),  # noqa: B023
        }  # fmt: skip
        for number in range(options.rounds + 1):
            found = [seconds(options.device, work) for work in works.values()]
            times += [found] if number else []  # the first one warms up
        table = np.array(times)
        sparse, names = table[:, 1:].sum(1), list(works)
        parts = " ".join(f"{name}:{1e3 * np.median(table[:, i]):.4g}" for i, name in enumerate(names))
        print(f"length:{length} {parts} sparse:{1e3 * np.median(sparse):.4g} ratio:{quartiles(table[:, 0] / sparse)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
