"""Native sparse attention against a version that one can read, branch by branch; and the origin's faults, caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import scramble
from torch import Tensor

import train_gpt as t

BOS = t.BYTE_BOS
NSA = {
    "LAYER_PATTERN": "nsa", "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "NSA_BLOCK": 4, "NSA_STRIDE": 2, "NSA_SELECT_BLOCK": 4,
    "NSA_SELECT": 4, "NSA_WINDOW": 5, "DOC_MASK": 1, "NSA_STRICT": 1, "NUM_LAYERS": 1,
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "plain": {"DOC_MASK": 0},
    "documents": {},
    "far apart": {"NSA_BLOCK": 2, "NSA_SELECT_BLOCK": 8, "NSA_SELECT": 3, "NSA_WINDOW": 2, "NUM_KV_HEADS": 1},
    "every token": {"NSA_BLOCK": 3, "NSA_STRIDE": 1, "NSA_SELECT_BLOCK": 3, "NUM_KV_HEADS": 4, "QK_NORM": 0},
    "means": {"NSA_POOL": "mean", "NSA_GATES": "softmax", "PARTIAL_ROPE_DIMS": 4, "PROJ_NORM": 1},
    "one window": {"NSA_WINDOW": 64, "NSA_SELECT": 9},
}
shapes = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of queries in the short sequences of these tests."""
    monkeypatch.setattr(t, "RANGE_STEP", 8)


def built(variables: dict[str, object], **more: object) -> t.GPT:
    """One layer in float64 whose every parameter is random and matters."""
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    h = t.load_config({name: str(value) for name, value in {**base, **NSA, **variables, **more}.items()})
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


def ragged(rows: int, length: int, starts: float = 0.08, seed: int = 0) -> Tensor:
    """Tokens with documents of all lengths, others in each row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < starts, BOS)


def some_inputs(model: t.GPT, tokens: Tensor, seed: int = 1) -> Tensor:
    shape = (*tokens.shape, model.h.model_dim)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the formula, one query at a time


def naive_turn(x: Tensor, h: t.Hyperparameters, places: Tensor) -> Tensor:
    """Rotary positions (S, H, Dh) by complex numbers, each head for itself."""
    half = h.rope_dims // 2
    angle = places.double()[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


def naive_pool(pool: t.BlockPool, x: Tensor, keys: bool) -> Tensor:
    """One vector of the keys or values x (l, Dh) of a block."""
    mean = x.mean(0) * (math.sqrt(len(x)) if keys else 1)
    if not pool.mlp:
        return mean
    return mean + torch.relu((x + pool.place).flatten() @ pool.up.weight.T).square() @ pool.down.weight.T


def naive_choice(shares: dict[int, float], begin: int, place: int, h: t.Hyperparameters) -> tuple[list[int], bool]:
    """Blocks of a query at `place` in a document from `begin` on, by shares of compressed blocks, keyed by number.

    And whether another one is as good as one of them but for less than 1e-6, so that rounding may decide.
    """
    size, first, last = h.nsa_select_block, begin // h.nsa_select_block, place // h.nsa_select_block
    importance = dict.fromkeys(range(first, last + 1), 0.0)
    for number, share in shares.items():
        for token in range(number * h.nsa_stride, number * h.nsa_stride + h.nsa_block):
            importance[token // size] += share / h.nsa_block
    forced = {first, last, max(first, last - 1)}
    free = sorted(importance.keys() - forced, key=lambda block: (-importance[block], block))
    count = h.nsa_select - len(forced)
    close = len(free) > count > 0 and 0 < importance[free[count - 1]] - importance[free[count]] < 1e-6
    return sorted([*forced, *free[:count]]), close


def naive_mean(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of one query to vectors, and its shares; zero of none."""
    if not keys:
        return torch.zeros_like(q), q[:0]
    p = (torch.stack(keys) @ q / math.sqrt(len(q))).softmax(0)
    return p @ torch.stack(values), p


def naive_nsa(
    model: t.GPT, x: Tensor, tokens: Tensor, layer: int = 0, reads: int = 0, writes: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """The layer's output for one row, x (reads + T + writes, D), and which keys each query of text and group saw."""
    h, part = model.h, model.blocks[layer]["nsa"]
    dim, groups, each = h.head_dim, h.num_kv_heads, h.num_heads // h.num_kv_heads
    parts = (x @ part.qkv.weight.T).unflatten(-1, (-1, dim)).split([h.num_heads, *[groups] * 6], 1)
    q, keys, values = parts[0], parts[1:4], parts[4:]
    if h.qk_norm:
        q, keys = t.rms_norm(q), tuple(t.rms_norm(k) for k in keys)
    places = torch.tensor([0] * reads + list(range(len(tokens))) + [0] * writes)
    q, keys = naive_turn(q, h, places) * part.q_gain[:, None], tuple(naive_turn(k, h, places) for k in keys)
    logits = (torch.relu(x @ part.gate_in.weight.T).square() @ part.gate.weight.T).unflatten(-1, (-1, 3))
    y, seen = torch.zeros(len(x), h.num_heads, dim, dtype=x.dtype), {"chosen": {}, "reads": {}, "close": {}}
    begin, size = 0, h.nsa_select_block
    for row in range(len(x)):
        place = row - reads
        written = place >= len(tokens)
        place = min(place, len(tokens) - 1)
        begin = place if h.doc_mask and place > 0 and tokens[place] == BOS else begin
        memory = list(range(min(row + 1, reads))) if begin == 0 else []
        memory += range(reads + len(tokens), len(x)) if written else []
        numbers = [i for i in range(len(x)) if begin <= i * h.nsa_stride <= place - h.nsa_block + 1]
        spans = [slice(reads + i * h.nsa_stride, reads + i * h.nsa_stride + h.nsa_block) for i in numbers]
        for group in range(groups):
            heads = range(group * each, (group + 1) * each)
            k = [keys[0][j, group] for j in memory] + [
                naive_pool(part.key_pool, keys[0][s, group], True) for s in spans
            ]
            v = [values[0][j, group] for j in memory] + [
                naive_pool(part.value_pool, values[0][s, group], False) for s in spans
            ]
            found, shares = {}, dict.fromkeys(numbers, 0.0)
            for head in heads:
                found[head], p = naive_mean(q[row, head], k, v)
                for number, share in zip(numbers, p[len(memory) :].tolist(), strict=True):
                    shares[number] += share
            picked, near = [], []
            if place >= 0:
                chosen, close = naive_choice(shares, begin, place, h)
                picked = [j + reads for j in range(begin, place + 1) if written or j // size in chosen]
                near = [j + reads for j in range(max(begin, place - h.nsa_window + 1), place + 1)]
            if place >= 0 and not written:
                seen["chosen"][place, group], seen["close"][place, group] = chosen, close
                seen["reads"][place, group] = len(numbers) + len(picked) + len(near) + 3 * len(memory)
            for head in heads:
                gates = logits[row, head].clone()
                gates[0] = gates[0] if k else -math.inf
                gates = gates.softmax(0) if h.nsa_gates == "softmax" else torch.sigmoid(gates)
                y[row, head] = gates[0] * found[head]
                for branch, js in ((1, memory + picked), (2, memory + near)):
                    own = [keys[branch][j, group] for j in js], [values[branch][j, group] for j in js]
                    y[row, head] += gates[branch] * naive_mean(q[row, head], *own)[0]
    y = y.flatten(1)
    return (t.rms_norm(y) * part.proj.gain if h.proj_norm else y) @ part.proj.weight.T, seen


@shapes
@pytest.mark.parametrize("backend", ["gather", "masked"])  # kernels: test_nsa_kernels.py
def test_the_layer_is_its_formula_with_its_gradients(shape: str, backend: str) -> None:
    model = built(SHAPES[shape], NSA_IMPL=backend)
    tokens = ragged(2, 37)
    x = some_inputs(model, tokens).requires_grad_()
    weight = some_inputs(model, tokens, seed=2)
    out = model.blocks[0]["nsa"](x, model.context(tokens, None, t.Variant()), None)
    want = torch.stack([naive_nsa(model, x[row], tokens[row])[0] for row in range(2)])
    torch.testing.assert_close(out.y, want, rtol=1e-10, atol=1e-10)
    parameters = [x, *model.blocks[0]["nsa"].parameters()]
    mine, theirs = (torch.autograd.grad((y * weight).sum(), parameters) for y in (out.y, want))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def heard(model: t.GPT, tokens: Tensor) -> dict[str, Any]:
    """What the layer's diagnostics say, and the blocks that it chose."""
    layer, found = model.blocks[0]["nsa"], {}
    inner, x = t.best_blocks, some_inputs(model, tokens)

    def listen(*given: Any) -> t.Choice:
        found["choice"] = inner(*given)
        return found["choice"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "best_blocks", listen)
        out = layer(x, model.context(tokens, None, t.Variant(measures=True)), None)
    return {**found, "metrics": out.metrics, "x": x}


@shapes
@torch.no_grad()
def test_choices_and_reads_are_those_of_the_formula(shape: str) -> None:
    """Foreseen by place alone, counted from the masks and indices that were used, and counted one by one: all alike."""
    model = built(SHAPES[shape])
    tokens = ragged(2, 45)
    found = heard(model, tokens)
    naive = [naive_nsa(model, found["x"][row], tokens[row])[1] for row in range(2)]
    for row, seen in enumerate(naive):
        for (place, group), chosen in seen["chosen"].items():
            mine = found["choice"].blocks[row, group, place].tolist()
            assert sorted(block for block in mine if block >= 0) == chosen or seen["close"][place, group]
        assert sum(seen["close"].values()) <= 1
    reads = sum(sum(seen["reads"].values()) for seen in naive) / sum(len(seen["reads"]) for seen in naive)
    metrics = {name: float(value) for name, value in found["metrics"].items()}
    assert metrics["reads_done"] == pytest.approx(reads, rel=1e-6)
    assert metrics["reads_foreseen"] == pytest.approx(reads, rel=1e-6)
    chosen = [len(blocks) for seen in naive for blocks in seen["chosen"].values()]
    assert metrics["blocks"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-6)


def test_reads_done_are_counted_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that reads less than the formula says is found out."""
    model, inner = built({}), t.best_blocks

    def stingy(*given: Any) -> t.Choice:
        choice = inner(*given)
        blocks = choice.blocks.clone()
        blocks[..., -1] = -1
        return choice._replace(blocks=blocks)

    monkeypatch.setattr(t, "best_blocks", stingy)
    metrics = model.blocks[0]["nsa"](
        some_inputs(model, ragged(1, 45)), model.context(ragged(1, 45), None, t.Variant(measures=True)), None
    ).metrics
    assert metrics["reads_done"] < metrics["reads_foreseen"] - 0.5


def test_of_equals_the_lower_number_is_chosen() -> None:
    importance = torch.tensor([0.5, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]).expand(1, 1, 1, 8)
    tokens = t.Ranges(torch.tensor([[0]]), torch.tensor([[32]]), (t.Part(0, 1, 0, 32, 0, 0),))
    for count, want in ((3, {0, 6, 7}), (4, {0, 1, 6, 7}), (5, {0, 1, 2, 6, 7}), (8, set(range(8)))):
        assert set(t.best_blocks(importance, tokens, 4, count).blocks.flatten().tolist()) == want
    later = t.Ranges(torch.tensor([[21]]), torch.tensor([[30]]), tokens.parts)
    assert set(t.best_blocks(importance, later, 4, 6).blocks.flatten().tolist()) == {5, 6, 7, -1}


@torch.no_grad()
def test_diagnostics_of_gates_and_choices() -> None:
    """Equal gates share evenly; a gate that is alone has no entropy; importance decides what counts as weak."""
    model = built({"DOC_MASK": 0})
    layer, tokens = model.blocks[0]["nsa"], ragged(2, 60, starts=0)
    layer.gate.weight.zero_()
    metrics = heard(model, tokens)["metrics"]
    early = 3 / 60  # the first three queries see no compressed block: two gates
    assert float(metrics["gate_entropy"]) == pytest.approx(1 - early + early * math.log(2) / math.log(3), abs=1e-6)
    assert float(metrics["share_compressed"]) == pytest.approx((1 - early) / 3, abs=1e-6)
    assert float(metrics["gate_max"]) == pytest.approx((1 - early) / 3 + early / 2, abs=1e-6)
    assert float(metrics["gate_collapsed"]) == 0
    layer.q_gain.zero_()  # all shares are the same, 1 / C, and those of blocks: what is chosen is as good as the rest
    metrics = heard(model, tokens)["metrics"]
    assert float(metrics["weak_choices"]) == 0 and 0 < float(metrics["unchosen"]) < 1


# ---- prefill and decoding


@shapes
@torch.no_grad()
def test_prefill_then_decoding_is_the_parallel_forward(shape: str) -> None:
    """A prefill of every length, then token by token, with other documents in each row."""
    model = built(SHAPES[shape], NUM_LAYERS=2)
    tokens = ragged(3, 30)
    want = model.logits(tokens, t.Variant())[0]
    for prefill in (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 29):
        got, state = model.logits(tokens[:, :prefill], t.Variant(), model.init_state(3))
        parts = [got]
        for place in range(prefill, 30):
            got, state = model.logits(tokens[:, place : place + 1], t.Variant(), state)
            parts.append(got)
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_what_a_step_keeps_and_adds() -> None:
    """A compressed block is there when its last token is, before that token's query; the window keeps what it needs."""
    model = built({"DOC_MASK": 0})
    state = model.init_state(1)
    for place in range(20):
        _, state = model.logits(ragged(1, 1, seed=place), t.Variant(), state)
        kept, done = state[1], max(0, (place + 1 - 4) // 2 + 1)
        assert kept.block_keys.shape[1] == kept.block_values.shape[1] == done
        assert kept.open_keys.shape[1] == place + 1 - 2 * done < 4 + 2
        assert kept.near_keys.shape[1] == min(place + 1, 4) and kept.keys.codes.shape[1] == place + 1


# ---- each branch alone: nothing from the future, and all that it should see


BRANCHES = {"compressed": 0, "selected": 1, "near": 2}


def branch_sees(model: t.GPT, branch: str, tokens: Tensor, x: Tensor) -> list[list[bool]]:
    """sees[i][j]: whether the output of this branch alone at i moves when the input at j does."""
    layer = model.blocks[0]["nsa"]

    def run(x: Tensor) -> Tensor:
        def only(*given: Any) -> tuple[Tensor, ...]:
            return tuple(gate * (number == BRANCHES[branch]) for number, gate in enumerate(inner(*given)))

        inner = layer.gates
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "gates", only)
            return layer(x, model.context(tokens, None, t.Variant()), None).y[0]

    base, rows = run(x), []
    for j in range(x.shape[1]):
        other = x.clone()
        other[:, j] += 0.01 * torch.sin(torch.arange(x.shape[2], dtype=x.dtype) + j)
        # What decides about blocks is not what is read: the queries and the choices stay the same.
        rows.append((run(other) - base).abs().amax(1) > 1e-13)
    return torch.stack(rows, 1).tolist()


def should_see(h: t.Hyperparameters, branch: str, tokens: Tensor, chosen: Tensor) -> list[list[bool]]:
    """The same by definition; a query's own input always matters, as its query."""
    begin, rows = 0, []
    for i, token in enumerate(tokens[0].tolist()):
        begin = i if h.doc_mask and token == BOS else begin
        blocks = [
            b for b in range(len(tokens[0])) if begin <= b * h.nsa_stride and b * h.nsa_stride + h.nsa_block - 1 <= i
        ]
        whole = {j for b in blocks for j in range(b * h.nsa_stride, b * h.nsa_stride + h.nsa_block)}
        picks = set(chosen[0, :, i].flatten().tolist())
        keys = {
            "compressed": whole | ({i} if whole else set()),
            "selected": {j for j in range(begin, i + 1) if j // h.nsa_select_block in picks},
            "near": set(range(max(begin, i - h.nsa_window + 1), i + 1)),
        }[branch]
        rows.append([j in keys for j in range(len(tokens[0]))])
    return rows


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("shape", ["plain", "documents", "far apart"])
@torch.no_grad()
def test_each_branch_sees_what_it_should_and_nothing_else(shape: str, branch: str) -> None:
    model = built(SHAPES[shape])
    tokens = ragged(1, 29)
    found = heard(model, tokens)
    assert branch_sees(model, branch, tokens, found["x"]) == should_see(model.h, branch, tokens, found["choice"].blocks)


# ---- the faults of the published origin, put into ours: each is caught by a law that ours keeps


def future_moves_the_past(model: t.GPT, tokens: Tensor) -> bool:
    base = model.logits(tokens, t.Variant())[0]
    for cut in range(1, tokens.shape[1]):
        other = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 7) % BOS), 1)
        if (model.logits(other, t.Variant())[0][:, :cut] - base[:, :cut]).abs().max() > 1e-10:
            return True
    return False


def decoding_differs(model: t.GPT, tokens: Tensor) -> bool:
    want, state, parts = model.logits(tokens, t.Variant())[0], model.init_state(len(tokens)), []
    for place in range(tokens.shape[1]):
        got, state = model.logits(tokens[:, place : place + 1], t.Variant(), state)
        parts.append(got)
    return bool((torch.cat(parts, 1) - want).abs().max() > 1e-8)


def selects_among_all_blocks(patch: pytest.MonkeyPatch) -> None:
    """The softmax that decides about blocks runs over all of them, future ones too."""

    def open_to_all(self: t.Ranges, q: Tensor, k: Tensor, part: t.Part) -> Tensor:
        return (q @ k.mT).softmax(-1)

    inner = t.RangedAttentionFunction.apply

    def apply(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, _: Any, how: tuple) -> Any:
        (y, importance), (parts, blocks) = inner(q, k, v, low, high, None, how), how
        if blocks is not None:
            whole = t.Part(0, q.shape[1], 0, k.shape[1], 0, 0)
            with pytest.MonkeyPatch.context() as inside:
                inside.setattr(t.Ranges, "shares", open_to_all)
                p = t.Ranges(low, high, parts).shares(t.by_groups(q, k.shape[2]), t.by_groups(k, k.shape[2]), whole)
            importance = t.importance_of(p, torch.ones_like(low + high, dtype=torch.bool), *blocks)
        return y, importance

    patch.setattr(t.RangedAttentionFunction, "apply", apply)


def reads_a_cut_cache_by_absolute_position(patch: pytest.MonkeyPatch) -> None:
    """The window's cache, cut to the last keys, is indexed as if it were whole: early queries read late keys."""
    inner = t.NSA.views

    def views(self: t.NSA, total: int, kept: int, ctx: t.Ctx) -> t.Views:
        found = inner(self, total, kept, ctx)
        near, cut = found.near, max(0, ctx.tokens.shape[1] - self.h.nsa_window)
        top = near.high.amax()
        low, high = ((bound + cut).clamp(max=top) for bound in (near.low, near.high))
        parts = tuple(part._replace(first=0, last=int(top), sure_from=0, sure_to=0) for part in near.parts)
        return found._replace(near=t.Ranges(low.clamp(max=top - 1), high, parts))

    patch.setattr(t.NSA, "views", views)


def sees_only_the_first_key(patch: pytest.MonkeyPatch) -> None:
    """is_causal with one query aligns it to key 0: later keys are hidden from decoding."""
    backend = t.NSA_BACKENDS["gather"]

    def near(q: Tensor, k: Tensor, v: Tensor, ranges: t.Ranges) -> Tensor:
        return t.sdpa(q, k, v, None, True) if q.shape[1] == 1 else backend.near(q, k, v, ranges)

    patch.setitem(t.NSA_BACKENDS, "gather", backend._replace(near=near))


def leaves_compressed_keys_out_of_prefill(patch: pytest.MonkeyPatch) -> None:
    """Prefill does not fill the compressed cache."""
    inner = t.NSA.kept

    def kept(self: t.NSA, new: t.NSAState) -> t.NSAState:
        found = inner(self, new)
        return found._replace(block_keys=0 * found.block_keys, block_values=0 * found.block_values)

    patch.setattr(t.NSA, "kept", kept)


def turns_all_heads_as_one(patch: pytest.MonkeyPatch) -> None:
    """The rotation runs over flattened heads, so that most channels of most heads do not turn as their head's do."""
    inner = t.turn_

    def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        flat = x.flatten(2).unsqueeze(2).contiguous()
        return inner(flat, cosine, sine).view(x.shape)

    patch.setattr(t, "turn_", turn)


def formula_fails(model: t.GPT, tokens: Tensor) -> bool:
    x = some_inputs(model, tokens)
    got = model.blocks[0]["nsa"](x, model.context(tokens, None, t.Variant()), None).y[0]
    return not torch.allclose(got, naive_nsa(model, x[0], tokens[0])[0], rtol=1e-8, atol=1e-8)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[t.GPT, Tensor], bool]]] = {
    "selection over future blocks": (selects_among_all_blocks, future_moves_the_past),
    "cut cache, absolute positions": (reads_a_cut_cache_by_absolute_position, future_moves_the_past),
    "one causal query": (sees_only_the_first_key, decoding_differs),
    "no compressed cache": (leaves_compressed_keys_out_of_prefill, decoding_differs),
    "rotation of flattened heads": (turns_all_heads_as_one, formula_fails),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_a_fault_of_the_origin_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in, caught = FAULTS[fault]
    variables = {"DOC_MASK": 0, "NSA_SELECT": 3 if caught is not future_moves_the_past else 4, "NSA_STRICT": 0}
    tokens = ragged(1, 36, starts=0)
    assert not caught(built(variables), tokens)
    put_in(monkeypatch)
    assert caught(built(variables), tokens)


def later(view: t.Ranges) -> t.Ranges:
    """Each query sees one key more than it may; and no part says that all its queries see all."""
    top = max([part.last for part in view.parts], default=0)
    parts = tuple(part._replace(last=min(top, part.last + 1), sure_from=0, sure_to=0) for part in view.parts)
    return view._replace(high=view.high + 1, parts=parts)


def older(view: t.Ranges) -> t.Ranges:
    """Queries see what lies before their documents."""
    return view._replace(low=0 * view.low)


def sure(view: t.Ranges) -> t.Ranges:
    """A part takes it for sure that its first query sees what its last one does."""
    return view._replace(parts=tuple(part._replace(sure_from=part.first, sure_to=part.last) for part in view.parts))


def of_all(view: t.Ranges) -> t.Ranges:
    """Memory of another document is seen."""
    return view._replace(low=0 * view.low if view.front is None else view.low, front=(view.low >= 0).unsqueeze(-1))


STRICT = [
    ("blocks", later, {}), ("keys", later, {}), ("near", later, {}), ("blocks", older, {}), ("keys", older, {}),
    ("near", older, {}), ("blocks", sure, {}), ("near", sure, {}), ("near", of_all, {"RMT_TOKENS": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "fault", "variables"), STRICT)
@torch.no_grad()
def test_strict_mode_stops_a_read_of_the_future_and_of_other_documents(
    field: str, fault: Callable[[t.Ranges], t.Ranges], variables: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"RMT_SEGMENT": 16, **variables} if variables else {}
    tokens, model = ragged(2, 30), built({"NSA_STRICT": 1, **memory})
    model.logits(tokens, t.Variant())
    model.logits(tokens[:, :7], t.Variant(), model.init_state(2))
    inner, branch = t.NSA.views, dict(zip(("blocks", "keys", "near"), t.NSA.BRANCHES, strict=True))[field]

    def views(self: t.NSA, *given: Any) -> t.Views:
        found = inner(self, *given)
        return found._replace(**{field: fault(getattr(found, field))})

    monkeypatch.setattr(t.NSA, "views", views)
    with pytest.raises(RuntimeError, match=f"in its {branch} branch"):
        model.logits(tokens, t.Variant())


# ---- configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {"NSA_STRIDE": 3}, {"NSA_SELECT_BLOCK": 2}, {"NSA_SELECT": 2}, {"NSA_WINDOW": 0}, {"NSA_SELECT_BLOCK": 5},
        {"CARRY_EVAL": 1}, {"COMPILE": 1}, {"NSA_POOL": "max"},
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    values = {**{name: str(value) for name, value in NSA.items()}, **{n: str(v) for n, v in wrong.items()}}
    with pytest.raises(t.UserError):
        t.load_config(values)


def test_windows_of_a_curriculum_need_not_be_powers() -> None:
    h = t.load_config({"PRESET": "nsa_125m"})
    assert h.lengths == ((0.0, 2048), (0.5, 3072)) and h.stages[0][1] % 6144 == 0
    with pytest.raises(t.UserError, match="CURRICULUM_STAGES"):
        t.load_config({"PRESET": "nsa_125m", "CURRICULUM_STAGES": "0:1.7,0.5:1"})
