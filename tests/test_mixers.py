"""Laws of every sequence mixer, under every combination of options: causality, the split law, visibility, gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import scramble
from torch import Tensor

import train_gpt as t

BOS = t.BYTE_BOS
TIED = t.Variant()

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "one_kv_head": {"NUM_KV_HEADS": 1},
    "all_kv_heads": {"NUM_KV_HEADS": 4, "QK_NORM": 0},
    "window3": {"ATTN_WINDOW": 3},
    "window1": {"ATTN_WINDOW": 1},
    "window8_documents": {"ATTN_WINDOW": 8, "DOC_MASK": 1},
    "documents": {"DOC_MASK": 1, "PARTIAL_ROPE_DIMS": 4},
    "values": {"VALUE_RESIDUAL": 1, "ATTN_WINDOW": 4, "NUM_KV_HEADS": 1, "PARTIAL_ROPE_DIMS": 2},
    "values_documents": {"VALUE_RESIDUAL": 1, "DOC_MASK": 1, "RESIDUAL": "plain", "RESID_MIX": 0, "MLP_ACT": "swiglu"},
    "ngrams": {"BIGRAM_HASH_BUCKETS": 37, "BIGRAM_HASH_ORDERS": "2,4", "BIGRAM_HASH_DIM": 8, "DOC_MASK": 1},
    "induction": {"INDUCTION_ORDERS": "1,2", "INDUCTION_WINDOW": 4, "BIGRAM_HASH_BUCKETS": 9, "EMBED_DIM": 12},
    "induction_documents": {"INDUCTION_ORDERS": "1,3", "DOC_MASK": 1, "ATTN_WINDOW": 5},
    "factored": {"EMBED_DIM": 12, "YARN_FACTOR": 4, "YARN_ORIGINAL": 8, "LOGIT_SOFTCAP": 0},
    "blocks": {"ATTN_IMPL": "blocks"},
}
BANK: dict[str, object] = {"CAPSULE_BANK": 1}
FEEDBACK: dict[str, object] = {"FEEDBACK_PASSES": 2, "FEEDBACK_SKETCH_TOKENS": 2, "FEEDBACK_DIM": 6}
ENGRAM: dict[str, object] = {
    "BIGRAM_HASH_BUCKETS": 37, "BIGRAM_HASH_ORDERS": "2,3", "BIGRAM_HASH_DIM": 16, "BIGRAM_HASH_HEADS": 2,
    "ENGRAM_INJECT_LAYER": 0,
}  # fmt: skip
STACK: dict[str, object] = {
    **BANK, **FEEDBACK, "NUM_LAYERS": 4, "FEEDBACK_HALT": 0, "RECURRENCE_LAYERS": "0-1", "BIGRAM_HASH_BUCKETS": 9,
    "BIGRAM_HASH_DIM": 8, "UNET_SKIPS": 1, "BACKOUT": 0,
}  # fmt: skip
NSA: dict[str, object] = {  # of seven blocks a query chooses one freely
    "NSA_BLOCK": 2, "NSA_STRIDE": 1, "NSA_SELECT_BLOCK": 2, "NSA_SELECT": 4, "NSA_WINDOW": 2, "NSA_STRICT": 1,
}  # fmt: skip
RMT: dict[str, object] = {"RMT_SEGMENT": 4, "RMT_TOKENS": 2, "TRAIN_SEQ_LEN": 12, "TRAIN_BATCH_TOKENS": 24}
# (layer pattern, variables) of what SKC and the frontier's parts add
PARTS: dict[str, tuple[str, dict[str, object]]] = {
    "nsa": ("N", NSA),
    "nsa_documents": (
        "N",
        {**NSA, "DOC_MASK": 1, "NSA_BLOCK": 4, "NSA_STRIDE": 2, "NSA_SELECT_BLOCK": 4, "NUM_KV_HEADS": 1},
    ),
    "nsa_mean": ("NA", {**NSA, "DOC_MASK": 1, "NSA_POOL": "mean", "NSA_GATES": "softmax", "NUM_KV_HEADS": 4}),
    "nsa_masked": ("NK", {**NSA, "NSA_IMPL": "masked", "NSA_SELECT_BLOCK": 3, "DOC_MASK": 1}),
    "rmt": ("A", {**RMT, "DOC_MASK": 1}),
    "rmt_two_segments": (
        "A",
        {**RMT, "RMT_BPTT": 2, "RESIDUAL": "mhc", "BIGRAM_HASH_BUCKETS": 9, "BIGRAM_HASH_DIM": 8},
    ),
    "rmt_stack": ("SKPA", {**STACK, **RMT, "RMT_TOKENS": 3, "RMT_SEGMENT": 6, "RESIDUAL": "hc", "SKC_BLOCK_SIZE": 2}),
    "rmt_engram": ("KS", {**ENGRAM, **RMT, "ENG_TO_SKC_MODE": "bias", "SKC_LOCAL": "block", "SMEAR_GATE": 4}),
    "koopman": ("K", {}),
    "koopman_one_tap": ("K", {"SKC_CONV": 1, "RESIDUAL": "plain"}),
    "skc": ("S", {}),
    "skc_from_each_block": ("S", {"SKC_LOCAL": "block"}),
    "skc_local": ("S", {"SKC_SPECTRAL": 0, "CAPSULE_NUM": 0}),
    "skc_spectral": ("S", {"SKC_LOCAL": "off", "CAPSULE_NUM": 0}),
    "skc_capsules": ("S", {"SKC_LOCAL": "off", "SKC_SPECTRAL": 0}),
    "parallel": ("S", {"SKC_PARALLEL_RESIDUAL": 1}),
    "hybrid": ("hybrid", {"ATTN_WINDOW": 3, "DOC_MASK": 1}),
    "competition": ("AKPS", {"VALUE_RESIDUAL": 1, "NUM_LAYERS": 4}),
    "gates": ("A", {"ATTN_GATE": 5, "XSA_LAYERS": 2, "LN_SCALE": 1, "SMEAR_GATE": 4}),
    "smear": ("K", {"SMEAR_GATE": 12, "EMBED_DIM": 12}),
    "engram": ("A", {**ENGRAM, "DOC_MASK": 1}),
    "engram_bias": ("S", {**ENGRAM, "ENG_TO_SKC_MODE": "bias"}),
    "engram_gate": ("P", {**ENGRAM, "ENG_TO_SKC_MODE": "gate"}),
    "experts": ("A", {"MOE_EXPERTS": 3, "MOE_LAYER_FRAC": 1}),
    "two_experts": ("P", {"MOE_EXPERTS": 4, "MOE_TOP_K": 2, "MOE_LAYER_FRAC": 1, "MLP_ACT": "swiglu"}),
    "bank": ("K", {**BANK}),
    "bank_feedback": ("K", {**BANK, **FEEDBACK, "FEEDBACK_HALT": 0}),
    "unturned": ("K", {**BANK, **FEEDBACK, "KOOPMAN_ROTATION": 0}),
    "bank_alone": ("A", {**BANK, "ATTN_WINDOW": 1, "DOC_MASK": 1}),
    "feedback_alone": ("A", {**FEEDBACK, "ATTN_WINDOW": 1, "DOC_MASK": 1}),
    "normed": ("A", {"PROJ_NORM": 1}),
    "normed_experts": ("A", {"PROJ_NORM": 1, "MOE_EXPERTS": 3, "MOE_LAYER_FRAC": 1}),
    "stopping": ("AS", {**BANK, **FEEDBACK, "FEEDBACK_HALT": 0.7, "NUM_LAYERS": 2}),
    "feedback": ("A", {**FEEDBACK, "DOC_MASK": 1, "FEEDBACK_EVERY": 2, "RESIDUAL": "plain"}),
    "speculates": ("S", {**BANK, **FEEDBACK, "CAPSULE_SPECULATE": 1}),
    "value_rows": ("A", {"VALUE_EMBED": 1, "VALUE_RESIDUAL": 1, "ATTN_WINDOW": 3, "XSA_LAYERS": 1}),
    "value_rows_shared": ("A", {"VALUE_EMBED": 2, "SHARED_BLOCKS": 2, "ATTN_INIT": "mimetic"}),
    "hc_stack": ("SKPA", {**STACK, "RESIDUAL": "hc", "HC_LANES": 3, "HC_LEARN": "keep,write,bias,read,mix"}),
    "hc_later": ("AK", {"RESIDUAL": "hc", "HC_START": 1, "STOCHASTIC_DEPTH": 0.2}),
    "mhc_stack": ("SKPA", {**STACK, "RESIDUAL": "mhc", "MHC_N": 3, "MHC_LOGITS": "dynamic"}),
    "mhc_shared": (
        "KA",
        {
            "RESIDUAL": "mhc",
            "MHC_MODE": "sinkhorn",
            "MHC_N": 4,
            "MHC_GATE": "token",
            "SHARED_BLOCKS": 2,
            "NUM_LAYERS": 4,
            "ENGRAM_INJECT_LAYER": 0,
            "BIGRAM_HASH_BUCKETS": 9,
            "BIGRAM_HASH_DIM": 8,
        },
    ),
    "shared": ("S", {"SHARED_BLOCKS": 1, "NUM_LAYERS": 3}),
    "loops": ("SK", {"RECURRENCE_LAYERS": "0", "RECURRENCE_DEPTH": 3}),
}
LAYERED = (
    "value_rows_shared",
    "rmt_two_segments",
    "rmt_stack",
    "hc_stack",
    "hc_later",
    "mhc_stack",
    "mhc_shared",
)  # not of one layer
NAMED = {**{option: ("A", variables) for option, variables in OPTIONS.items()}, **PARTS}
cases = pytest.mark.parametrize(("kind", "option"), [(pattern, option) for option, (pattern, _) in NAMED.items()])
OPTIONS |= {option: variables for option, (_, variables) in PARTS.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries in the short sequences of these tests."""
    monkeypatch.setattr(t, "RANGE_STEP", 4)


def config(kind: str, variables: dict[str, object]) -> t.Hyperparameters:
    """Three layers of one mixer in float64."""
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "NUM_LAYERS": 3}
    shape = {"NUM_HEADS": 4, "NUM_KV_HEADS": 2, "LAYER_PATTERN": kind}
    shape |= {"SKC_BLOCK_SIZE": 4, "CAPSULE_DIM": 8, "CAPSULE_NUM": 3, "SKC_CONV": 3}
    return t.load_config({name: str(value) for name, value in {**base, **shape, **variables}.items()})


def scrambled_model(kind: str, variables: dict[str, object]) -> t.GPT:
    """A network whose every parameter is random and matters."""
    h = config(kind, variables)
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


def some_tokens(rows: int, length: int, seed: int = 0, starts: float = 0.2) -> Tensor:
    """Random tokens, a share of them document starts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < starts, BOS)


def variant(model: t.GPT) -> t.Variant:
    return t.scoring_variant(model.h)


def logits(model: t.GPT, tokens: Tensor, state: tuple | None = None, training: bool = False) -> Tensor:
    """Logits as in evaluation, or as in training: what noise and halting there are differ."""
    if not training:
        return model.logits(tokens, variant(model), state)[0]
    moment = t.Moment(torch.tensor(0.5), torch.tensor(7), torch.arange(len(tokens)))
    ctx = model.context(tokens, state, t.final_variant(model.h), moment)
    return model.hidden(ctx, state)[0] @ model.embed.weight.T if not model.h.embed_dim else model.hidden(ctx, state)[0]


def in_pieces(model: t.GPT, tokens: Tensor, edges: list[int]) -> tuple[Tensor, tuple]:
    """Logits of tokens given piece by piece, and the last state."""
    parts, state = [], model.init_state(len(tokens))
    for start, stop in zip([0, *edges], [*edges, tokens.shape[1]], strict=True):
        part, after = model.logits(tokens[:, start:stop], variant(model), state)
        assert after is not None
        parts, state = [*parts, part], after
    return torch.cat(parts, 1), state


def assert_same_state(one: tuple, other: tuple) -> None:
    pairs = list(zip(t.flatten_state(one), t.flatten_state(other), strict=True))
    assert pairs
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


# ---- the future is not seen


@cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_do_not_depend_on_later_tokens(kind: str, option: str, training: bool) -> None:
    """Bit for bit, whatever the later tokens become, document starts included; with a carried state, too."""
    model = scrambled_model(kind, OPTIONS[option]).train(training)
    with torch.set_grad_enabled(training):
        tokens, prefix = some_tokens(2, 11), some_tokens(2, 6, seed=7)
        for state in (None, model.logits(prefix, variant(model), model.init_state(2))[1]):
            before = logits(model, tokens, state, training)
            for cut in range(11):
                changed = torch.cat((tokens[:, :cut], some_tokens(2, 11 - cut, seed=cut + 1)), 1)
                after = logits(model, changed, state, training)
                tolerance = 1e-12 if model.h.moe_experts else 0.0  # experts' products have other shapes
                error = (after[:, :cut] - before[:, :cut]).abs().max() if cut else 0.0
                assert error <= tolerance, f"a token from {cut} on is seen before it"
                assert not torch.equal(after[:, cut:], before[:, cut:])


@cases
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(kind: str, option: str) -> None:
    model = scrambled_model(kind, OPTIONS[option])
    tokens = some_tokens(3, 9)
    together, state = in_pieces(model, tokens, [4])
    for row in range(3):
        alone, own = in_pieces(model, tokens[row : row + 1], [4])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-10)
        assert_same_state(t.take_rows(state, [row]), own)


# ---- what should be seen is seen


def depends(model: t.GPT, tokens: Tensor, split: int) -> list[list[bool]]:
    """depends[i][j]: whether position i's logits change with token j, the sequence given in two pieces at `split`."""

    def run(x: Tensor) -> Tensor:
        return in_pieces(model, x, [split])[0] if split else logits(model, x)

    base, rows = run(tokens), []
    for j in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, j] = (tokens[:, j] + 17) % BOS
        rows.append((run(other) - base).abs().amax((0, 2)) > 1e-9)
    return torch.stack(rows, 1).tolist()


def documents_of(tokens: Tensor) -> list[int]:
    return (tokens[0] == BOS).cumsum(0).tolist()


@cases
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("split", [0, 5])
@torch.no_grad()
def test_every_visible_token_matters_and_no_other(kind: str, option: str, layers: int, split: int) -> None:
    """Each layer reaches ATTN_WINDOW - 1 tokens further back; DOC_MASK ends the view at the document's start."""
    layers = max(layers, 2 if option in LAYERED else 1)
    model = scrambled_model(kind, {**OPTIONS[option], "NUM_LAYERS": layers})
    tokens = some_tokens(1, 14, starts=0)
    tokens[0, [3, 9]] = BOS
    found, documents, h = depends(model, tokens, split), documents_of(tokens), model.h
    across = h.has_queries and not h.doc_mask
    width = h.skc_block_size
    blockwise = (h.has_skc and h.skc_local == "off") or option in ("bank_alone", "feedback_alone")
    reach = (h.attn_window - 1) * layers if h.attn_window and set(h.mixers) == {"attn"} else 99
    for i in range(14):
        for j in range(14):
            if j in (3, 9):
                continue  # changing a document start moves the documents themselves
            same = across or documents[i] == documents[j]
            near = i == j or (j // width < i // width if blockwise else i - j <= reach)
            assert found[i][j] == (j <= i and near and same), f"query {i}, key {j}"


# ---- the split law


@cases
@torch.no_grad()
def test_a_sequence_may_be_cut_anywhere(kind: str, option: str) -> None:
    """forward(x) = forward(x[:k], s0) joined with forward(x[k:], s1) for every k, and token by token."""
    model = scrambled_model(kind, OPTIONS[option])
    length = 8
    rows = []
    for start in range(-1, length):  # a document starting anywhere, or nowhere: two rows for each
        tokens = some_tokens(2, length, seed=start + 2, starts=0)
        if start >= 0:
            tokens[0, start] = BOS
            tokens[1, [start, (start * 7 + 3) % length]] = BOS
        rows.append(tokens)
    tokens = torch.cat(rows)
    whole = logits(model, tokens)
    at_once, final = in_pieces(model, tokens, [])
    torch.testing.assert_close(at_once, whole, rtol=1e-10, atol=1e-10)
    for edges in [*[[k] for k in range(1, length)], list(range(1, length)), [2, 3, 7]]:
        pieces, state = in_pieces(model, tokens, edges)
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
        assert_same_state(state, final)


@cases
@torch.no_grad()
def test_state_does_not_grow_beyond_its_window(kind: str, option: str) -> None:
    """A windowed mixer's state has a size that the length of the stream does not change; so has its dtype."""
    model = scrambled_model(kind, OPTIONS[option])
    sizes = []
    for length in (42, 90):
        _, state = in_pieces(model, some_tokens(2, length), [7])
        parts = t.flatten_state(state)
        sizes.append(sum(part.numel() for part in parts))
        assert all(len(part) == 2 for part in parts), "the batch comes first in every tensor of a state"
    assert (sizes[0] == sizes[1]) or (model.h.has_queries and not model.h.attn_window and not model.h.rmt_segment)
    stream = state[0]
    assert torch.equal(stream.position, torch.tensor([90, 90]))
    assert torch.equal(stream.document, (some_tokens(2, 90) == BOS).sum(1))


@cases
def test_gradients_of_the_second_piece_match(kind: str, option: str) -> None:
    """Training with a detached carry gives the gradient of the second piece's loss, the first piece held constant."""
    model = scrambled_model(kind, OPTIONS[option])
    tokens, targets = some_tokens(2, 10), some_tokens(2, 10, seed=5)
    _, state = model.logits(tokens[:, :6], variant(model), model.init_state(2))
    state = t.map_state(state, Tensor.detach)
    model.loss(tokens[:, 6:], targets[:, 6:], variant(model), state).total.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    out = torch.nn.functional.cross_entropy(
        logits(model, tokens[:, 6:], state).flatten(0, 1), targets[:, 6:].flatten(), reduction="sum"
    )
    out.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-8)


# ---- training reaches everything


@pytest.mark.parametrize("residual", t.RESIDUALS)
@cases
def test_gradients_reach_every_parameter_within_two_steps(kind: str, option: str, residual: str) -> None:
    """Looked at after two optimizer steps, since output projections start at zero."""
    h = config(kind, {**OPTIONS[option], "RESIDUAL": residual, "MATRIX_CODEC": "exact"})
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, BOS)
    weights = t.Weights(model)
    weights.materialize(0.0)
    optimizer = t.Optimizer(h, rt, weights)
    for step in range(3):
        weights.clear_gradients()
        moment = t.Moment(torch.tensor(0.5), torch.tensor(step), torch.arange(4))
        targets = some_tokens(4, 16, seed=step + 9)
        model.loss(some_tokens(4, 16, seed=step), targets, t.final_variant(h), None, moment).total.backward()
        if step < 2:
            optimizer.step(1.0, 0.9, False, 0.0)
    for name, parameter in model.named_parameters():
        if h.attn_window == 1 and name.endswith("q_gain"):
            continue  # a query that sees one key has nothing to choose
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad.to_dense()
        assert grad.isfinite().all() and grad.abs().max() > 1e-13, f"{name} gets no gradient but rounding errors"


@pytest.mark.parametrize("every", [1, 2, 4, 100])
@pytest.mark.parametrize("residual", t.RESIDUALS)
@cases
def test_recomputing_activations_changes_no_gradient(kind: str, option: str, residual: str, every: int) -> None:
    tokens, targets = some_tokens(2, 9), some_tokens(2, 9, seed=3)
    found = []
    for k in (0, every):
        model = scrambled_model(kind, {**OPTIONS[option], "RESIDUAL": residual, "GRAD_CHECKPOINT": k})
        before = model.logits(some_tokens(2, 5, seed=4), variant(model), model.init_state(2))[1]
        state = t.map_state(before, Tensor.detach)
        out = model.loss(tokens, targets, variant(model), state)
        (model.loss(tokens, targets, variant(model)).total + out.total).backward()
        found.append((out, {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}))
    (one, mine), (other, theirs) = found
    assert torch.equal(one.total, other.total)
    assert all(map(torch.equal, t.flatten_state(one.state), t.flatten_state(other.state)))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- attention against a version that one can read


def naive_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, doc_mask: bool) -> Tensor:
    """Softmax attention of each query over its visible keys, one by one; (B, T, H, Dh)."""
    y = torch.zeros_like(q)
    for b, i, head in (
        (b, i, head) for b in range(q.shape[0]) for i in range(q.shape[1]) for head in range(q.shape[2])
    ):
        group = head * k.shape[2] // q.shape[2]
        first = max(0, i - window + 1) if window else 0
        keys = [j for j in range(first, i + 1) if not doc_mask or documents[b, i] == documents[b, j]]
        scores = torch.stack([q[b, i, head] @ k[b, j, group] for j in keys]) / math.sqrt(q.shape[-1])
        y[b, i, head] = scores.softmax(0) @ v[b, keys, group]
    return y


def turn(x: Tensor, channels: int) -> Tensor:
    """Rotary positions by complex multiplication; x (B, T, H, Dh)."""
    half = channels // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies  # (T, R/2)
    z = torch.complex(x[..., :half], x[..., half:channels]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag, x[..., channels:]), -1)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("factored", *PARTS)])
@torch.no_grad()
def test_attention_is_its_formula(option: str) -> None:
    model = scrambled_model("attn", OPTIONS[option])
    h, layer = model.h, model.blocks[1]["attn"]
    tokens = some_tokens(2, 12)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 12, h.model_dim, dtype=torch.float64, generator=generator)
    v0 = torch.randn(2, 12, h.num_kv_heads, h.head_dim, dtype=torch.float64, generator=generator)
    ctx = model.context(tokens, None, t.Variant())._replace(v0=v0)
    got = layer(x, ctx, None)

    heads = (h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim, h.num_kv_heads * h.head_dim)
    q, k, v = (part.unflatten(-1, (-1, h.head_dim)) for part in (x @ layer.qkv.weight.T).split(heads, -1))
    if h.qk_norm:
        q, k = t.rms_norm(q), t.rms_norm(k)
    q, k = turn(q, h.rope_dims) * layer.q_gain[:, None], turn(k, h.rope_dims)
    if h.value_residual:
        share = 1 / (1 + torch.exp(-layer.v_mix))
        v = share * v + (1 - share) * v0
    documents = (tokens == BOS).cumsum(1)
    y = naive_attention(q, k, v, documents, h.attn_window, h.doc_mask)
    torch.testing.assert_close(got.y, y.flatten(2) @ layer.proj.weight.T, rtol=1e-10, atol=1e-10)
    if h.value_residual:
        assert torch.equal(got.v0, v0), "later layers must get the first layer's values"
    else:
        assert got.v0 is None, "nobody asks for the first layer's values"


def attention_inputs(kv_heads: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(4)
    for heads in (4, kv_heads, kv_heads):
        yield torch.randn(2, 9, heads, 8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 3, 9, 50])
@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_every_path_of_attention_agrees_with_the_naive_one(
    kv_heads: int, window: int, doc_mask: bool, cached: bool
) -> None:
    """The causal fast path, the masked path and the path through the cache are one function."""
    model = scrambled_model("attn", {"NUM_KV_HEADS": kv_heads, "ATTN_WINDOW": window, "DOC_MASK": int(doc_mask)})
    layer = model.blocks[0]["attn"]
    q, k, v = attention_inputs(kv_heads)
    ctx = model.context(some_tokens(2, 9), None, t.Variant())
    want = naive_attention(q, k, v, ctx.documents, window, doc_mask)
    state = layer.init_state(2, torch.float64) if cached else None
    y, after = layer.attend(q, k, v, ctx, state)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert (after is None) == (state is None)


def test_plain_attention_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is built where causality is all there is to it; a window or documents need one."""
    asked: list[tuple[bool, bool]] = []
    real = t.sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        asked.append((mask is not None, causal))
        return real(q, k, v, mask, causal)

    monkeypatch.setattr(t, "sdpa", spy)
    for variables in ({}, {"ATTN_WINDOW": 4}, {"DOC_MASK": 1}):
        logits(scrambled_model("attn", {**variables, "NUM_LAYERS": 1}), some_tokens(1, 6))
    assert asked == [(False, True), (True, False), (True, False)]


@torch.no_grad()
def test_value_residual_takes_the_first_attention_layers_values() -> None:
    """With all weight on v0, no later layer's own value rows matter."""
    model = scrambled_model("attn", {"VALUE_RESIDUAL": 1})
    tokens = some_tokens(2, 8)
    first, later = model.blocks[0]["attn"], [model.blocks[i]["attn"] for i in (1, 2)]
    assert first.v_mix is None and all(layer.v_mix is not None for layer in later)
    for layer in later:
        layer.v_mix.fill_(-100.0)
    before = logits(model, tokens)
    for layer in later:
        layer.qkv.weight[-2 * model.h.head_dim :] = 3.0
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-12, atol=1e-12)
    first.qkv.weight[-1] += 1.0
    assert (logits(model, tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 3, 4, 8, 11])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_blocks_are_attention_with_its_gradients(length: int, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, heads[0], 6), (2, length, heads[1], 6), (2, length, heads[1], 6)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad, found = torch.randn(shapes[0], generator=generator, dtype=torch.float64), []
    for backend in ("blocks", "sdpa"):
        y = t.ATTENTION[backend](*inputs, 0, None)
        found.append([y, *torch.autograd.grad(y, inputs, grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_blocks_are_chosen_for_short_bf16_windows_on_a_cpu() -> None:
    base = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", "COMPILE": "0", "PRECISION": "bf16"}
    cases = {"blocks": {}, "sdpa": {"PRECISION": "fp32"}}
    for extra in ({"ATTN_WINDOW": "8"}, {"DOC_MASK": "1"}, {"EVAL_SEQ_LEN": "2048"}):
        with pytest.raises(t.UserError, match="ATTN_IMPL=auto"):
            h = t.load_config({**base, **extra, "ATTN_IMPL": "blocks"})
            t.choose_attention(h, t.start_runtime(h))
        h = t.load_config({**base, **extra})
        assert t.choose_attention(h, t.start_runtime(h))[0] == "sdpa"
    for backend, extra in cases.items():
        h = t.load_config({**base, **extra})
        assert t.choose_attention(h, t.start_runtime(h))[0] == backend


def test_a_package_that_cannot_be_imported_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention that was built for another torch is there and yet fails when it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rt = t.Runtime(torch.device("cuda", 0), 0, 1, torch.float32, True, True, None)
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: x')")
    name, why = t.choose_attention(t.load_config({"PRESET": "attn"}), rt)
    assert name == "sdpa" and "flash_attn_interface: undefined symbol: x; flash_attn: No module named" in why
    with pytest.raises(t.UserError, match="undefined symbol.*ATTN_IMPL=auto"):
        t.choose_attention(t.load_config({"PRESET": "attn", "ATTN_IMPL": "fa3"}), rt)
    (tmp_path / "flash_attn.py").write_text("")
    assert t.choose_attention(t.load_config({"PRESET": "attn"}), rt)[0] == "fa2"
    assert t.choose_attention(t.load_config({"PRESET": "attn", "DOC_MASK": "1"}), rt)[0] == "fa2"
    with pytest.raises(t.UserError, match="no bf16 on CUDA"):
        t.choose_attention(t.load_config({"PRESET": "attn", "ATTN_IMPL": "fa2"}), rt._replace(autocast=False))


# ---- kernels of variable length


def test_bounds_of_documents_by_hand() -> None:
    """Rows begin documents of their own; those that are not there have no tokens, and the length does not change."""
    documents = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]])
    assert t.document_bounds(documents).tolist() == [0, 2, 4, 7, 8, 8, 8, 8, 8]
    assert t.document_bounds(documents * 0).tolist() == [0, 4, *[8] * 7]
    assert t.document_bounds(torch.arange(8).view(2, 4)).tolist() == list(range(9))
    assert t.document_bounds(torch.zeros(2, 200, dtype=torch.int64)).dtype == torch.int32
    compiled = torch.compile(t.document_bounds, backend="eager", fullgraph=True, dynamic=False)
    sizes = [len(compiled((torch.rand(16, 2048) < share).cumsum(1))) for share in (0.01, 0.0)]
    with torch.compiler.set_stance("fail_on_recompile"):
        sizes.append(len(compiled((torch.rand(16, 2048) < 0.5).cumsum(1))))
    assert sizes == [513] * 3, "a document for 64 tokens"


def one_sequence_after_the_other(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int, **ways: Any
) -> Tensor:
    """What FlashAttention's kernel of variable length computes; tokens beyond the last sequence are left unwritten."""
    assert ways["causal"] and torch.equal(ends, key_ends) and ends.dtype == torch.int32 and longest == longest_key
    edges, window, parts = ends.tolist(), ways["window_size"], []
    assert edges == sorted(edges) and edges[0] == 0
    for first, last in itertools.pairwise(edges):
        assert last - first <= longest
        if first < last:
            place = torch.arange(last - first)
            back = place.unsqueeze(1) - place
            seen = (back >= 0) & (back <= (window[0] if window[0] >= 0 else back.numel()))
            parts.append(t.sdpa(*(x[None, first:last] for x in (q, k, v)), seen[None, None], False)[0])
    return torch.cat([*parts, torch.full_like(q[edges[-1] :], 1e3)])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn whose kernel is the loop above."""
    package = SimpleNamespace(flash_attn_varlen_func=one_sequence_after_the_other)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


def with_kernel(name: str, variables: dict[str, object]) -> t.GPT:
    """A scrambled network on a backend, whatever the device is."""
    h = dataclasses.replace(config("attn", {"DOC_MASK": 1, **variables}), attn_impl=name)
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("starts", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "variables", [{}, {"ATTN_WINDOW": 3}, {"NUM_KV_HEADS": 4, "XSA_LAYERS": 2}, {"RMT_SEGMENT": 5}]
)
def test_documents_by_kernels_of_variable_length_are_the_masked_ones(
    backend: str, starts: float, variables: dict[str, object], flash: None
) -> None:
    """Logits and gradients; with written memory, which sees all of its segment, the mask is taken."""
    tokens, found = some_tokens(3, 13, 1, starts), []
    for name in (backend, "sdpa"):
        model = with_kernel(name, variables)
        out = logits(model, tokens)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 15
    for ours, masked in zip(*found, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_documents_by_kernels_see_all_of_themselves_and_nothing_else(flash: None) -> None:
    model, tokens = with_kernel("fa2", {"NUM_LAYERS": 2}), some_tokens(1, 14, starts=0)
    tokens[0, [3, 9]] = BOS
    found, documents = depends(model, tokens, 0), documents_of(tokens)
    for i in range(14):
        for j in set(range(14)) - {3, 9}:
            assert found[i][j] == (j <= i and documents[i] == documents[j]), f"query {i}, key {j}"


def test_too_many_documents_make_no_number(flash: None) -> None:
    """Of 400 tokens, each a document, 256 have one; no token of the others may see a wrong one."""
    x = torch.randn(2, 200, 1, 4)
    y = t.flash2(x, x, x, 0, torch.arange(400).view(2, 200))
    assert torch.equal(y.isnan().any(-1).flatten(), torch.arange(400) >= 256)
    torch.testing.assert_close(y.flatten(0, 1)[:256], x.flatten(0, 1)[:256])


# ---- rows of tokens in values, and queries that look at their own


@pytest.mark.parametrize(("count", "layers"), [(1, {0, 4}), (2, {0, 1, 3, 4}), (9, {0, 1, 2, 3, 4})])
@torch.no_grad()
def test_values_add_the_row_of_their_token(count: int, layers: set[int]) -> None:
    """v + s e(token) in the first and last layers, all from one table; nothing else changes."""
    model = scrambled_model("A", {"VALUE_EMBED": count, "NUM_LAYERS": 5})
    assert {i for i, block in enumerate(model.blocks) if block["attn"].v_rows is not None} == layers
    tokens = some_tokens(2, 9)
    ctx, layer = model.context(tokens, None, t.Variant()), model.blocks[0]["attn"]
    x = torch.randn(2, 9, model.h.model_dim, dtype=torch.float64)
    heads = (model.h.num_heads + model.h.num_kv_heads) * model.h.head_dim
    seen: list[Tensor] = []
    real = layer.attend
    layer.attend = lambda q, k, v, documents, state: (seen.append(v), real(q, k, v, documents, state))[1]
    layer(x, ctx, None)
    values = x @ layer.qkv.weight[heads:].T + layer.v_rows * model.embed.value_rows[tokens]
    torch.testing.assert_close(seen[0].flatten(2), values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_mimetic_queries_look_at_their_own_keys(heads: int, kv_heads: int) -> None:
    """Of each head W_q^T W_k is 0.7 (Z + I) on the space of its keys; uniform ones have no such diagonal."""
    found = {}
    for init in ("uniform", "mimetic"):
        h = config("A", {"NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "MODEL_DIM": 48 * heads, "ATTN_INIT": init})
        generator = torch.Generator().manual_seed(0)
        shape = ((heads + 2 * kv_heads) * 48, 48 * heads)
        first = t.initial_value(h, "blocks.0.attn.qkv.weight", shape, generator)
        assert first.shape == shape and first.isfinite().all()
        q, k, v = first.split([heads * 48, kv_heads * 48, kv_heads * 48])
        q, k = q.view(heads, 48, -1), k.view(kv_heads, 48, -1).repeat_interleave(heads // kv_heads, 0)
        found[init] = [float((q[i] * k[i]).sum() / 48) for i in range(heads)]
        assert abs(float(v.square().mean()) * shape[1] - 1) < 0.1
        if init == "mimetic":
            torch.testing.assert_close(k[0] @ k[0].T, torch.eye(48), rtol=0, atol=1e-4)
            assert len({round(float(one.sum()), 3) for one in q}) == heads, "heads differ, even those of one group"
    assert all(abs(one) < 0.3 for one in found["uniform"]) and all(0.5 < one < 1.5 for one in found["mimetic"])
