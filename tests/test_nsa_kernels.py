"""Triton kernels of native sparse attention: against the backend of gathers in the interpreter, built for Hopper."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_environment
from torch import Tensor

import train_gpt as t

BLOCK, STRIDE, SIZE, COUNT, WINDOW = 8, 4, 16, 3, 11  # of compressed keys, of chosen blocks, of near keys


def small_tiles() -> None:
    """Several tiles of queries and of keys, and several chunks, in short sequences."""
    for kernel in t.NSA_TILES:
        t.NSA_TILES[kernel] = (t.Tile(16, 16, 4, 1),) * 2
    t.NSA_CHUNK, t.NSA_PROGRAMS, t.CHUNK_SUM_TILE = 5, 40, 64


def ages(rows: int, before: int, length: int) -> tuple[Tensor, Tensor]:
    """Queries' places after `before` cached tokens, and the first token of each one's document, (B, T)."""
    place = torch.arange(before + length).expand(rows, -1)
    starts = torch.where(torch.rand(place.shape) < 0.06, place, 0).cummax(1).values
    return place[:1, before:], starts[:, before:] if rows > 1 else 0 * place[:, before:]


def seen(kind: str, rows: int, before: int, length: int) -> tuple[t.Ranges, int]:
    """What queries see in a branch, as NSA.views has it, and how many keys there are."""
    place, begin = ages(rows, before, length)
    if kind == "compressed":
        low, high = (begin + STRIDE - 1) // STRIDE, ((place - BLOCK + 1) // STRIDE + 1).clamp(min=0)
        keys = max(0, (before + length - BLOCK) // STRIDE + 1)
    else:
        low, high, keys = begin, place + 1, before + length
        low = torch.maximum(low, place - WINDOW + 1) if kind == "near" else low
    return among(low, high, keys), keys


def among(low: Tensor, high: Tensor, keys: int) -> t.Ranges:
    return t.ranges_of(low, high, False, lambda i: (0, keys))


def drawn(rows: int, length: int, keys: int, groups: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(rows, length, groups * heads, width)
    k, v = torch.randn(2, rows, keys, groups, width)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def agree(mine: Any, other: Any, leaves: tuple[Tensor, ...]) -> None:
    """The same output and the same gradients."""
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(other)
    found = (torch.autograd.grad((y * weight).sum(), leaves) for y in (mine, other))
    for mine_too, other_too in zip(*found, strict=True):
        torch.testing.assert_close(mine_too, other_too, rtol=1e-4, atol=1e-5)


# rows, cached tokens, queries, groups, heads of one, head size
SHAPES = (
    (1, 0, 37, 1, 4, 16),
    (2, 0, 53, 2, 3, 16),
    (2, 19, 20, 1, 16, 16),
    (2, 9, 35, 2, 1, 32),
    (2, 40, 1, 1, 2, 16),
)


def check_near(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    for kind in ("near", "all"):
        ranges, keys = seen(kind, rows, before, length)
        leaves = drawn(rows, length, keys, *rest)
        agree(*(t.NSA_BACKENDS[name].near(*leaves, ranges) for name in ("triton", "gather")), leaves)


def check_compressed(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    ranges, keys = seen("compressed", rows, before, length)
    leaves, blocks = drawn(rows, length, keys, *rest), -(-(before + length) // SIZE)
    for form in ((BLOCK, STRIDE, SIZE, blocks), (BLOCK, STRIDE, 12, -(-(before + length) // 12))):
        found = [t.NSA_BACKENDS[name].compressed(*leaves, ranges, form) for name in ("triton", "gather")]
        agree(found[0][0], found[1][0], leaves)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
        assert float(found[0][1].detach().amin()) >= 0  # best_blocks orders by the bits of numbers without a sign


def check_selected(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    ranges, keys = seen("all", rows, before, length)
    for size in (SIZE, 12):
        importance = torch.rand(rows, rest[0], length, -(-keys // size))
        chosen = t.best_blocks(importance, ranges, size, COUNT).blocks
        leaves = drawn(rows, length, keys, *rest)
        agree(*(t.NSA_BACKENDS[name].selected(*leaves, chosen, ranges, size) for name in ("triton", "gather")), leaves)


def check_nothing_seen() -> None:
    """Queries with an empty choice, or an empty range among others, and a branch without any key."""
    mine, gather = t.NSA_BACKENDS["triton"], t.NSA_BACKENDS["gather"]
    q, k, v = leaves = drawn(1, 6, 20, 1, 2, 16)
    low, high = torch.tensor([[0, 2, 5, 9, 9, 20]]), torch.tensor([[0, 7, 5, 10, 20, 20]])
    agree(mine.near(*leaves, among(low, high, 20)), gather.near(*leaves, among(low, high, 20)), leaves)
    chosen = torch.tensor([[-1, -1], [0, -1], [-1, 1], [-1, -1], [1, 0], [-1, -1]]).view(1, 1, 6, 2)
    every, some = among(0 * low, 0 * low + 20, 20), torch.tensor([1, 2, 4])
    found = gather.selected(q[:, some], k, v, chosen[:, :, some], among(0 * low[:, some], high[:, [4] * 3], 20), 16)
    y = mine.selected(*leaves, chosen, every, 16)
    agree(y, torch.zeros_like(y).index_copy(1, some, found), leaves)
    nothing = drawn(1, 6, 0, 1, 2, 16)
    y, importance = mine.compressed(*nothing, among(0 * low, 0 * low, 0), (BLOCK, STRIDE, SIZE, 1))
    assert not y.any() and not importance.any() and importance.shape == (1, 1, 6, 1)
    assert not torch.autograd.grad(y.sum(), nothing)[0].any()
