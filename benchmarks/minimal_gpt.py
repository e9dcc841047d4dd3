"""A minimal GPT in float32 on the CPU: the textbook peer that train_gpt.py is measured against.

Pre-norm transformer: RMSNorm, rotary positions, causal attention, 4x GELU MLP, tied embeddings; AdamW with linear
warm-up and linear decay. It imports nothing of the project, so that a mistake in the product cannot hide here too.
    DATA_PATH=<folder of shards> TOKENIZER_PATH=<file.model> VOCAB_SIZE=1024 python benchmarks/minimal_gpt.py
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

SETTINGS = {"NUM_LAYERS": 4, "MODEL_DIM": 128, "NUM_HEADS": 4, "VOCAB_SIZE": 1024, "TRAIN_SEQ_LEN": 256, "SEED": 1337}
SETTINGS |= {"TRAIN_BATCH_TOKENS": 4096, "ITERATIONS": 1_000_000, "TRAIN_LOG_EVERY": 50, "MAX_VAL_TOKENS": 0}
LEARNING_RATE, WARMUP_STEPS, INIT_SCALE = 8e-3, 50, 0.7


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.norm = num_heads, nn.RMSNorm(dim, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qk, v = self.qkv(self.norm(x)).split((2 * dim, dim), dim=-1)
        a, b = qk.view(batch, length, 2 * self.num_heads, -1).chunk(2, dim=-1)  # (B, T, 2 H, Dh / 2) each
        q, k = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).transpose(1, 2).chunk(2, dim=1)
        v = v.view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, H, T, Dh), as q and k
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class MinimalGPT(nn.Module):
    """forward(tokens, targets) -> mean loss in nats; tokens, targets: (B, T) of int64."""

    def __init__(self, num_layers: int, model_dim: int, num_heads: int, vocab_size: int, seq_len: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, model_dim)
        self.blocks = nn.ModuleList(Block(model_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(model_dim, elementwise_affine=False)
        angles = torch.outer(
            torch.arange(seq_len), 10000.0 ** -torch.linspace(0, 1, model_dim // num_heads // 2 + 1)[:-1]
        )
        self.register_buffer("angles", torch.stack((angles.cos(), angles.sin()))[:, :, None], persistent=False)
        for name, weight in self.named_parameters():  # 2L branches are summed, so their outputs start smaller
            shrink = math.sqrt(2 * num_layers) if name.endswith(("out.weight", "down.weight")) else 1.0
            nn.init.normal_(weight, std=INIT_SCALE * model_dim**-0.5 / shrink)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, *self.get_buffer("angles")[:, : tokens.shape[1]])  # cos, sin: (T, 1, Dh / 2)
        logits = F.linear(self.norm(x), self.embed.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


make_model = MinimalGPT


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; every parameter is a matrix and decays. The fused kernel is the fastest one on a CPU, too."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> Tensor:
    loss = model(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def read_shards(folder: str, split: str) -> list[np.ndarray]:
    """The split's shards, memory-mapped: uint16 tokens after a header of 256 int32 words."""
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise SystemExit(f"DATA_PATH={folder} has no fineweb_{split}_*.bin; give a folder of token shards")
    return [np.memmap(path, dtype="<u2", mode="r", offset=1024) for path in paths]


def batches(folder: str, batch_tokens: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive windows of the train split for ever: tokens and targets, each (B, T)."""
    while True:
        for shard in read_shards(folder, "train"):
            for start in range(0, max(1, len(shard) - batch_tokens), batch_tokens):
                chunk = torch.from_numpy(shard[start : start + batch_tokens + 1].astype(np.int64))
                yield chunk[:-1].view(-1, seq_len), chunk[1:].view(-1, seq_len)


def count_bytes(tokens: np.ndarray, tokenizer_path: str) -> int:
    """UTF-8 bytes of tokens[1:] by the field's rule; without a tokenizer, tokens are bytes and 255 is a marker."""
    if not tokenizer_path:
        return int((tokens[1:] != 255).sum())
    sp = SentencePieceProcessor(model_file=tokenizer_path)
    ids = range(sp.vocab_size())
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    size = np.array([0 if silent[i] else 1 if sp.is_byte(i) else len(pieces[i].encode()) for i in ids])
    adds_space = not sp.decode(sp.encode(" a")).startswith(" ")  # to each document; lossless tokenizers do not
    spaced = np.array([piece.startswith(" ") for piece in pieces]) & adds_space
    return int(size[tokens[1:]].sum() - (spaced[tokens[1:]] & silent[tokens[:-1]]).sum())


@torch.no_grad()
def validate(model: nn.Module, tokens: np.ndarray, seq_len: int) -> float:
    """Summed nats of predicting tokens[1:] in separate windows of seq_len, the shorter last one included."""
    stream, total = torch.from_numpy(tokens.astype(np.int64))[None], 0.0  # (1, N)
    for start in range(0, len(tokens) - 1, seq_len):
        window = stream[:, start : start + seq_len + 1]
        total += model(window[:, :-1], window[:, 1:]).item() * (window.shape[1] - 1)
    return total


def main() -> None:
    s = {name: int(os.environ.get(name, value)) for name, value in SETTINGS.items()}
    peak_lr, folder = float(os.environ.get("LEARNING_RATE", LEARNING_RATE)), os.environ.get("DATA_PATH", "")
    limit = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 300)) or math.inf
    tokens = np.concatenate(read_shards(folder, "val"))[: s["MAX_VAL_TOKENS"] + 1 if s["MAX_VAL_TOKENS"] else None]
    size = count_bytes(tokens, os.environ["TOKENIZER_PATH"] if s["VOCAB_SIZE"] != 256 else "")
    torch.manual_seed(s["SEED"])
    model = make_model(s["NUM_LAYERS"], s["MODEL_DIM"], s["NUM_HEADS"], s["VOCAB_SIZE"], s["TRAIN_SEQ_LEN"])
    optimizer, data = make_optimizer(model, peak_lr), batches(folder, s["TRAIN_BATCH_TOKENS"], s["TRAIN_SEQ_LEN"])
    step, elapsed, clock, began = 0, 0.0, "", time.perf_counter()
    while step < s["ITERATIONS"] and elapsed < limit:
        left = min(1 - step / s["ITERATIONS"], 1 - elapsed / limit)
        optimizer.param_groups[0]["lr"] = peak_lr * min(left, (step + 1) / WARMUP_STEPS)
        loss = train_step(model, optimizer, *next(data))
        step, elapsed = step + 1, time.perf_counter() - began
        clock = f"train_time:{elapsed * 1e3:.0f}ms step_avg:{elapsed * 1e3 / step:.2f}ms"
        if step % s["TRAIN_LOG_EVERY"] == 0 or step == 1:
            print(f"step:{step}/{s['ITERATIONS']} train_loss:{loss.item():.4f} {clock}", flush=True)
    loss, bpb = validate(model, tokens, s["TRAIN_SEQ_LEN"]) / np.array([len(tokens) - 1, size * math.log(2)])
    print(f"step:{step}/{s['ITERATIONS']} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {clock}")


if __name__ == "__main__":
    main()
