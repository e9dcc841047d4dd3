"""Recurrent memory over segments: against a version that one can read, its resets, its gradients, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, scramble
from test_nsa import naive_nsa
from torch import Tensor

import train_gpt as t

BOS = t.BYTE_BOS
MEMORY = {
    "LAYER_PATTERN": "A", "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "RMT_SEGMENT": 5, "RMT_TOKENS": 3, "DOC_MASK": 1,
    "NUM_LAYERS": 2, "RESIDUAL": "plain", "RESID_MIX": 0, "TRAIN_SEQ_LEN": 20, "TRAIN_BATCH_TOKENS": 40,
}  # fmt: skip
Run = Callable[..., Done]


def built(**variables: object) -> t.GPT:
    """Layers in float64 whose every parameter is random and matters."""
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    h = t.load_config({name: str(value) for name, value in {**base, **MEMORY, **variables}.items()})
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


def some_tokens(rows: int, length: int, seed: int = 0, starts: float = 0.15) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < starts, BOS)


def tops(model: t.GPT, tokens: Tensor, state: tuple | None = None) -> Tensor:
    return model.hidden(model.context(tokens, state, t.Variant()), state)[0]


# ---- the formula


SPARSE = {
    "LAYER_PATTERN": "NA", "RMT_SEGMENT": 9, "NSA_BLOCK": 2, "NSA_STRIDE": 1, "NSA_SELECT_BLOCK": 2, "NSA_SELECT": 4,
    "NSA_WINDOW": 2, "NSA_STRICT": 1,
}  # fmt: skip


def naive_attention(model: t.GPT, layer: int, x: Tensor, kinds: list[str], documents: list[int]) -> Tensor:
    """Attention of one segment, x (S, D), query by query; memory has no rotary phase."""
    h, attention = model.h, model.blocks[layer]["attn"]
    sizes = (h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim, h.num_kv_heads * h.head_dim)
    parts = (t.rms_norm(x) @ attention.qkv.weight.T).split(sizes, -1)
    q, k, v = (part.unflatten(-1, (-1, h.head_dim)) for part in parts)
    half, text = h.head_dim // 2, [i for i, kind in enumerate(kinds) if kind == "text"]
    angle = torch.zeros(len(x), half, dtype=x.dtype)
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle[text] = torch.arange(len(text), dtype=x.dtype)[:, None] * frequencies
    wave = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(y: Tensor) -> Tensor:
        z = torch.complex(*t.rms_norm(y).chunk(2, -1)) * wave
        return torch.cat((z.real, z.imag), -1)

    q, k = turned(q) * attention.q_gain[:, None], turned(k)
    y = torch.zeros_like(q)
    for i, head in ((i, head) for i in range(len(x)) for head in range(h.num_heads)):
        group = head * h.num_kv_heads // h.num_heads
        seen = [
            j
            for j in range(len(x))
            if (j <= i or kinds[i] == "write") and (documents[i] == documents[j] or not h.doc_mask)
        ]
        p = torch.softmax(k[seen, group] @ q[i, head] / math.sqrt(h.head_dim), 0)
        y[i, head] = p @ v[seen, group]
    return y.flatten(1) @ attention.proj.weight.T


def naive_layer(model: t.GPT, layer: int, x: Tensor, kinds: list[str], documents: list[int], tokens: Tensor) -> Tensor:
    """Mixer and MLP of one segment, x (S, D) of its tokens and memory."""
    mlp = model.blocks[layer]["mlp"]
    if model.h.mixers[layer] == "nsa":
        counts = kinds.count("read"), kinds.count("write")
        y = naive_nsa(model, t.rms_norm(x), tokens, layer, *counts)[0]
    else:
        y = naive_attention(model, layer, x, kinds, documents)
    x = x + model.residual.scale[layer, 0] * y
    inner = torch.relu(t.rms_norm(x) @ mlp.up.weight.T).square()
    return x + model.residual.scale[layer, 1] * (inner @ mlp.down.weight.T)


def naive_tops(model: t.GPT, tokens: Tensor) -> Tensor:
    """One row of tokens (T,), segment by segment."""
    h, memory = model.h, model.memory
    x0 = t.rms_norm(model.embed.weight[tokens])
    documents = (tokens == BOS).cumsum(0).tolist()
    kept, written, found = memory.first, -1, []
    for start in range(0, len(tokens), h.rmt_segment):
        own = documents[start : start + h.rmt_segment]
        kept = kept if written == own[0] else memory.first
        before = kept if own[0] == own[-1] else memory.first
        whole = len(own) == h.rmt_segment
        parts = [t.rms_norm(kept + memory.read), x0[start : start + len(own)]]
        kinds, place = ["read"] * h.rmt_tokens + ["text"] * len(own), [own[0]] * h.rmt_tokens + own
        if whole:
            parts, kinds = [*parts, t.rms_norm(before + memory.write)], [*kinds, *["write"] * h.rmt_tokens]
            place = [*place, *[own[-1]] * h.rmt_tokens]
        x = torch.cat(parts)
        for layer in range(h.num_layers):
            x = naive_layer(model, layer, x, kinds, place, tokens[start : start + len(own)])
        x = t.rms_norm(x)
        found.append(x[h.rmt_tokens : h.rmt_tokens + len(own)])
        kept, written = (x[-h.rmt_tokens :], own[-1]) if whole else (kept, written)
    return torch.cat(found)


@pytest.mark.parametrize("length", [4, 5, 13, 20])
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"DOC_MASK": 0},
        {"DOC_MASK": 0, "ATTN_IMPL": "blocks"},
        SPARSE,
        {**SPARSE, "DOC_MASK": 0, "NSA_SELECT_BLOCK": 3, "RMT_TOKENS": 4},
        {**SPARSE, "NSA_IMPL": "masked", "NSA_GATES": "softmax"},
    ],
    ids=str,
)
@torch.no_grad()
def test_memory_is_its_formula(length: int, variables: dict[str, object]) -> None:
    model = built(**variables)
    for seed in range(3):
        tokens = some_tokens(2, length, seed=seed)
        want = torch.stack([naive_tops(model, row) for row in tokens])
        torch.testing.assert_close(tops(model, tokens), want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tops(model, tokens, model.init_state(2)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variables", [{}, SPARSE, {**SPARSE, "DOC_MASK": 0, "NSA_IMPL": "masked"}], ids=str)
def test_gradients_are_those_of_the_formula(variables: dict[str, object]) -> None:
    model, tokens = built(RMT_BPTT=9, **variables), some_tokens(2, 13, seed=1)
    got, want = tops(model, tokens), torch.stack([naive_tops(model, row) for row in tokens])
    weight = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(0))
    named = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
    mine, theirs = (
        torch.autograd.grad((y * weight).sum(), [p for _, p in named], allow_unused=True) for y in (got, want)
    )
    for (name, _), one, other in zip(named, mine, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variables", [{}, SPARSE, {**SPARSE, "DOC_MASK": 0}], ids=str)
@torch.no_grad()
def test_a_window_in_pieces_is_the_whole_window(variables: dict[str, object]) -> None:
    """A prefill of every length, then token by token, over segments and documents."""
    model, tokens = built(**variables), some_tokens(2, 21)
    want = tops(model, tokens)
    for prefill in (*range(1, 12), 17, 18, 19):
        state, parts = model.init_state(2), []
        for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, 21))]:
            context = model.context(tokens[:, start:stop], state, t.Variant())
            top, state, _ = model.hidden(context, state)
            parts.append(top)
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variables", [SPARSE, {**SPARSE, "DOC_MASK": 0, "RMT_TOKENS": 5}], ids=str)
@torch.no_grad()
def test_reads_of_sparse_attention_are_counted_with_memory(variables: dict[str, object]) -> None:
    model, tokens = built(**variables), some_tokens(3, 20)
    metrics = model.hidden(model.context(tokens, None, t.Variant(measures=True)), None)[2].metrics
    done, foreseen = (
        [float(value) for name, value in metrics.items() if name.endswith(end)]
        for end in ("reads_done", "reads_foreseen")
    )
    assert done and done == pytest.approx(foreseen, rel=1e-6)


# ---- what memory carries, and where it begins anew


@torch.no_grad()
def test_memory_carries_the_past_and_nothing_else_does() -> None:
    """A token of the first segment moves the last one through three rewritings; with memory held, it does not."""
    model, tokens = built(), some_tokens(1, 20, starts=0)
    other = tokens.clone()
    other[0, 1] += 1
    assert (tops(model, other) - tops(model, tokens))[:, 15:].abs().max() > 1e-8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.memory, "known", lambda kept, _: kept._replace(memory=model.memory.first.expand(1, -1, -1)))
        difference = tops(model, other) - tops(model, tokens)
    assert difference[:, 5:].abs().max() == 0 and difference[:, 1:5].abs().max() > 0


@pytest.mark.parametrize("pattern", ["A", "S", "K", "SKPA", "N"])
@pytest.mark.parametrize("start", [5, 7, 9, 10])
@torch.no_grad()
def test_memory_begins_anew_with_a_document(pattern: str, start: int) -> None:
    """Nothing from before a document's start reaches anything after it, however many documents came before."""
    sparse = {**SPARSE, "RMT_SEGMENT": 5} if pattern == "N" else {}
    model = built(**{**sparse, "LAYER_PATTERN": pattern}, CAPSULE_DIM=8, CAPSULE_NUM=3, SKC_BLOCK_SIZE=2)
    tokens = some_tokens(2, 20, starts=0)
    tokens[:, start] = BOS
    other = tokens.clone()
    other[:, :start] = (tokens[:, :start] + 11) % BOS
    other[1, 1:start:2] = BOS
    difference = (tops(model, other) - tops(model, tokens)).abs().amax((0, 2))
    assert difference[start:].max() < 1e-12 and difference[:start].min() > 0


@torch.no_grad()
def test_a_document_start_changes_nothing_of_other_segments_but_through_memory() -> None:
    """With memory held, each segment is a network of its own: how many documents came before does not matter."""
    for pattern in ("S", "K", "A", "SKPA"):
        variables = {"LAYER_PATTERN": pattern, "CAPSULE_DIM": 8, "CAPSULE_NUM": 3, "SKC_BLOCK_SIZE": 2}
        model, tokens = (
            built(**variables, CAPSULE_BANK=1, FEEDBACK_PASSES=1, FEEDBACK_DIM=4, FEEDBACK_SKETCH_TOKENS=2),
            some_tokens(1, 20, starts=0),
        )
        other = tokens.clone()
        other[0, 2] = BOS
        with pytest.MonkeyPatch.context() as patch:
            held = model.memory.first.expand(1, -1, -1)
            patch.setattr(model.memory, "known", lambda kept, _, held=held: kept._replace(memory=held))
            difference = (tops(model, other) - tops(model, tokens))[0].abs().amax(1)
        assert difference[5:].max() == 0 and difference[2:5].max() > 0, pattern


@torch.no_grad()
def test_without_document_mask_a_segment_hands_on_what_lies_before_its_documents_start() -> None:
    """As its attention sees it; memory itself still begins anew where a segment begins with a document."""
    model, tokens = built(DOC_MASK=0), some_tokens(1, 20, starts=0)
    for start, reached in ((7, True), (10, False)):
        one = tokens.clone()
        one[0, start] = BOS
        other = one.clone()
        other[0, :start] = (one[0, :start] + 11) % BOS
        difference = (tops(model, other) - tops(model, one))[0, -(-start // 5) * 5 :].abs().max()
        assert (difference > 1e-9) == reached


@torch.no_grad()
def test_written_tokens_see_each_other_and_all_text() -> None:
    model, tokens = built(DOC_MASK=0), some_tokens(1, 5, starts=0)
    state = model.logits(tokens, t.Variant(), model.init_state(1))[1]

    def first_slot() -> Tensor:
        return model.logits(tokens, t.Variant(), model.init_state(1))[1][-1].memory[0, 0]

    before = first_slot()
    assert torch.equal(before, state[-1].memory[0, 0])
    model.memory.write[-1] += 0.5
    assert (first_slot() - before).abs().max() > 1e-8, "the first written token does not see the last"


@pytest.mark.parametrize(
    ("bptt", "reached"),
    [
        (2, [False, False, True, True]),
        (3, [False, False, False, True]),
        (4, [True, True, True, True]),
        (9, [True, True, True, True]),
    ],
)
def test_gradients_flow_through_so_many_segments(bptt: int, reached: list[bool]) -> None:
    """From the last of four segments; cuts lie before every RMT_BPTT-th segment."""
    model = built(RMT_BPTT=bptt, TIE_EMBEDDINGS=0)
    tokens = torch.arange(20).unsqueeze(0)
    targets = torch.full((1, 20), -100)
    targets[:, 15:] = 3
    moment = t.Moment(torch.tensor(0.5), torch.tensor(0), torch.arange(1))
    model.loss(tokens, targets, t.Variant(), None, moment).total.backward()
    rows = model.embed.weight.grad[:20].abs().amax(1).view(4, 5).amax(1)
    assert (rows > 0).tolist() == reached


def test_memory_is_no_neighbour_of_text() -> None:
    """It has no token, so no n-grams; no rotary phase; convolutions stop at it; blocks of its own; scans run on."""
    model = built(LAYER_PATTERN="SA", CAPSULE_DIM=8, CAPSULE_NUM=3, SKC_BLOCK_SIZE=4)
    tokens = some_tokens(1, 10, starts=0)
    tokens[0, 7] = BOS
    ctx = model.context(tokens, None, t.Variant())
    first, second = (model.piece_context(ctx, piece, None) for piece in model.memory.pieces(10, 0, True))
    assert first.tokens.tolist() == [[-1] * 3 + tokens[0, :5].tolist() + [-1] * 3]
    assert first.age is not None and first.age.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert first.fresh is not None and not first.fresh.any()
    assert (first.rotary[0][0, [0, 1, 2, 3, 8, 9, 10]] == 1).all() and (first.rotary[0][0, 4:8] != 1).any(-1).all()
    # three read tokens in block 0, five of text in blocks 1 and 2, three written in block 3
    assert first.blocks is not None and first.positions.tolist() == [[0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14]]
    assert first.blocks.inside.flatten().tolist() == [True] * 3 + [False] + [True] * 5 + [False] * 3 + [True] * 3 + [
        False
    ]
    assert second.documents.tolist() == [[0] * 3 + [0, 0, 1, 1, 1] + [1] * 3]
    assert second.age is not None and second.age.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert second.fresh is not None and second.fresh.nonzero().tolist() == [[0, 5]]


@torch.no_grad()
def test_memory_is_all_that_a_closed_segment_leaves() -> None:
    """Constant memory: the state after a whole segment holds no keys, and its size does not grow."""
    model = built()
    state, sizes = model.init_state(1), []
    for seed in range(4):
        _, state = model.logits(some_tokens(1, 5, seed=seed), t.Variant(), state)
        sizes.append(sum(part.numel() for part in t.flatten_state(state)))
        assert state[1].k.codes.shape[1] == 0 and state[-1].segment.shape[1] == 0
    assert len(set(sizes)) == 1


# ---- training and evaluation as a user runs them

JOB = {
    "LAYER_PATTERN": "A", "RMT_SEGMENT": "16", "RMT_TOKENS": "3", "BATCH_MODE": "streams", "CARRY_TRAIN": "1",
    "ITERATIONS": "8", "SAVE_EVERY": "4", "TRAIN_LOG_EVERY": "1", "MAX_VAL_TOKENS": "600", "SAMPLE_TOKENS": "0",
    "DOC_MASK": "1",
}  # fmt: skip


def losses_of(folder: Path, read_metrics: Callable) -> dict[int, float]:
    return {found["step"]: found["train_loss_nats"] for found in read_metrics(folder, "train")}


def test_a_light_checkpoint_leaves_memory_out_and_reads_a_window_again(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """Full goes on exactly; light nearly so, and nearer than with no memory at all."""
    found: dict[str, dict[int, float]] = {}
    for mode in ("full", "light"):
        env = {**tiny_env, **JOB, "DATASET_STATE_MODE": mode, "RUN_ID": mode}
        whole = run_job(env)
        assert whole.code == 0, whole.err
        folder = Path(env["OUT_DIR"]) / mode
        tree = torch.load(folder / "checkpoints" / "step_0000004.pt", weights_only=True)
        assert bool(tree["carry"]) == (mode == "full")
        again = {**env, "RUN_ID": mode + "_again", "RESUME": str(folder / "checkpoints" / "step_0000004.pt")}
        done = run_job(again)
        assert done.code == 0, done.err
        assert ("made again from the last 32 tokens" in done.out) == (mode == "light")
        found[mode] = losses_of(folder, read_metrics)
        found[mode + "_again"] = losses_of(Path(env["OUT_DIR"]) / (mode + "_again"), read_metrics)
    assert found["full"] == found["light"], "what a checkpoint holds must not change training"
    assert found["full_again"] == {step: loss for step, loss in found["full"].items() if step > 4}
    assert found["light_again"][5] != found["full"][5], "the states made again know less"
    assert found["light_again"][5] == pytest.approx(found["full"][5], rel=0.02)


@pytest.mark.parametrize("residual", ["hc", "mhc"])
@pytest.mark.parametrize("pattern", ["A", "S", "KP", "N"])
def test_memory_trains_over_mixers_and_topologies(
    residual: str, pattern: str, run_job: Run, tiny_env: dict[str, str]
) -> None:
    """Train, export, reload and score with carried memory; the round trip changes nothing."""
    skc = {"CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8"}
    sparse = {name: str(value) for name, value in SPARSE.items() if name.startswith("NSA")}
    env = {**tiny_env, **skc, **sparse, **JOB, "LAYER_PATTERN": pattern, "RESIDUAL": residual, "CARRY_EVAL": "1"}
    done = run_job(env)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("final_roundtrip_exact"))
    values: dict[str, Any] = dict(word.split(":") for word in line.split()[1:])
    assert float(values["in_memory"]) == pytest.approx(float(values["val_loss"]), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RMT_SEGMENT": -1},
        {"RMT_SEGMENT": 11},
        {"RMT_SEGMENT": 6, "CARRY_TRAIN": 1, "BATCH_MODE": "streams"},
        {"ATTN_WINDOW": 4},
        {"LAYER_PATTERN": "N", "NSA_BLOCK": 6},
        {"RMT_BPTT": 1},
    ],
    ids=str,
)
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    values = {"PRESET": "tiny", **{name: str(value) for name, value in {**MEMORY, **wrong}.items()}}
    with pytest.raises(t.UserError):
        t.load_config(values)
