"""The SKC stack: formulas against versions that one can read, leaks of the origin, experts, bank, feedback."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, clean_environment, scramble, small_stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import train_gpt as t

BOS = t.BYTE_BOS
W, S, N = 4, 8, 3  # block, width, capsules
BASE = {
    "PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "NUM_LAYERS": 2,
    "SKC_BLOCK_SIZE": W, "CAPSULE_DIM": S, "CAPSULE_NUM": N, "SKC_CONV": 3,
}  # fmt: skip
FEEDBACK = {"CAPSULE_BANK": 1, "FEEDBACK_PASSES": 2, "FEEDBACK_SKETCH_TOKENS": 2, "FEEDBACK_DIM": 6}


def config(**variables: object) -> t.Hyperparameters:
    return t.load_config({name: str(value) for name, value in {**BASE, **variables}.items()})


def scrambled(**variables: object) -> t.GPT:
    """A network whose every parameter is random and matters."""
    return scrambled_of(config(**variables))


def scrambled_of(h: t.Hyperparameters) -> t.GPT:
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


def some_tokens(rows: int, length: int, seed: int = 0, starts: float = 0.15) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < starts, BOS)


def inputs(model: t.GPT, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, length, model.h.model_dim, dtype=torch.float64, generator=generator)


def moment(rows: int) -> t.Moment:
    """What marks a training step: only there losses are made."""
    return t.Moment(torch.tensor(0.5), torch.tensor(3), torch.arange(rows))


# ---- linear_scan


def loop_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    found, h = [], h0
    for step in range(b.shape[1]):
        h = a[:, step] * h + b[:, step]
        found.append(h)
    return torch.stack(found, 1)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 140), rows=st.integers(1, 2), width=st.integers(1, 3), seed=st.integers(0, 99),
    zeros=st.sampled_from([0.0, 0.3, 1.0]), given_start=st.booleans(), narrow=st.booleans(),
)  # fmt: skip
def test_linear_scan_is_the_loop_with_its_gradients(
    length: int, rows: int, width: int, seed: int, zeros: float, given_start: bool, narrow: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(rows, length, 1 if narrow else width, generator=generator, dtype=torch.float64)
    a = a * (torch.rand(a.shape, generator=generator, dtype=torch.float64) >= zeros)
    b, grad = (torch.randn(rows, length, width, generator=generator, dtype=torch.float64) for _ in range(2))
    h0 = torch.randn(rows, width, generator=generator, dtype=torch.float64) * given_start
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    before = [x.detach().clone() for x in leaves]
    h, last = t.linear_scan(a, b, h0 if given_start else None)
    want = loop_scan(a, b, h0)
    torch.testing.assert_close(h, want, rtol=1e-11, atol=1e-11)
    assert torch.equal(last, h[:, -1])
    used = leaves if given_start else leaves[:2]
    ours, theirs = (torch.autograd.grad((y * grad).sum(), used, retain_graph=True) for y in (h, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, before, leaves)), "inputs are left as they were"


def test_linear_scan_keeps_wide_states_and_refuses_misfits() -> None:
    a, b = torch.full((2, 50, 3), 0.9), torch.ones(2, 50, 3, dtype=torch.bfloat16)
    h, last = t.linear_scan(a, b)
    assert h.dtype == last.dtype == torch.float32
    torch.testing.assert_close(last, torch.full((2, 3), (1 - 0.9**50) / 0.1), rtol=1e-5, atol=0)
    for wrong in ((a, b, torch.zeros(2, 4)), (a[..., :2], b, None)):
        with pytest.raises(ValueError, match="linear_scan of a"):
            t.linear_scan(*wrong)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_orthonormal_and_its_own_inverse(n: int) -> None:
    matrix = t.hadamard(n)
    assert torch.equal(matrix.abs(), torch.full((n, n), float(1 / torch.tensor(n).sqrt())))
    torch.testing.assert_close(matrix @ matrix, torch.eye(n))


# ---- mixers against versions that one can read, one row at a time


def convolved(x: Tensor, taps: Tensor, documents: list[int]) -> Tensor:
    rows = []
    for i in range(len(x)):
        seen = [k for k in range(len(taps)) if i >= k and documents[i - k] == documents[i]]
        rows.append(sum(taps[k] * x[i - k] for k in seen))
    return torch.stack(rows)


def scanned(a: Tensor, b: Tensor, fresh: list[bool]) -> Tensor:
    h, rows = torch.zeros_like(b[0]), []
    for i in range(len(b)):
        h = b[i] if fresh[i] else a[i] * h + b[i]
        rows.append(h)
    return torch.stack(rows)


def starts_of(documents: list[int]) -> list[bool]:
    return [i == 0 or documents[i] != documents[i - 1] for i in range(len(documents))]


@pytest.mark.parametrize("turn", [0, 1])
@torch.no_grad()
def test_koopman_is_its_formula(turn: int) -> None:
    model = scrambled(LAYER_PATTERN="K", KOOPMAN_ROTATION=turn)
    layer, tokens, x = model.blocks[1]["koopman"], some_tokens(2, 13), inputs(model, 2, 13)
    got = layer(x, model.context(tokens, None, t.Variant()), None).y
    rotation = t.hadamard(S).double() if turn else torch.eye(S, dtype=torch.float64)
    for row in range(2):
        documents = (tokens[row] == BOS).cumsum(0).tolist()
        u, gate, pace = (x[row] @ layer.inputs.weight.T).chunk(3, -1)
        a, fresh = torch.exp(-F.softplus(pace)), starts_of(documents)
        reset = a * torch.tensor([[not f] for f in fresh], dtype=torch.float64)
        b = (1 - reset) * torch.sigmoid(gate) * (convolved(u, layer.conv.taps, documents) @ rotation)
        h = scanned(reset, b, [False] * 13)
        mixed = (h + h @ layer.v @ layer.u.T) @ rotation
        want = (mixed / mixed.square().mean(-1, keepdim=True).sqrt() * layer.proj.gain) @ layer.proj.weight.T
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


def naive_skc(layer: t.SKC, x: Tensor, documents: list[int], local: str) -> Tensor:
    """One row (T, D), block after block, everything in words of the page."""
    length, transform = len(x), t.hadamard(W).double()
    s, gate = (x @ layer.inputs.weight.T).chunk(2, -1)
    v = torch.sigmoid(gate) * s
    paths = torch.zeros_like(v)
    if local != "off":
        a = torch.sigmoid(layer.local_decay)
        fresh = [f or (local == "block" and i % W == 0) for i, f in enumerate(starts_of(documents))]
        paths = convolved(s, layer.conv.taps, documents) + scanned(a.expand_as(v), (1 - a) * v, fresh)
    z, capsules, running = layer.z0.clone(), torch.zeros(N, S, dtype=torch.float64), 0
    breadth, place = F.softplus(layer.breadth) + 1 / (2 * N), torch.arange(W) / (W - 1)
    keep, hold = torch.sigmoid(layer.decay), torch.sigmoid(layer.hold)
    coupling = layer.u @ layer.v.T / max(1.0, float(layer.u.norm() * layer.v.norm()))
    bend = torch.sigmoid(layer.bend)
    for first in range(0, length, W):
        block = range(first, min(first + W, length))
        moved = capsules + coupling @ capsules
        moved = (1 - bend) * moved + bend * moved.tanh()
        read = transform @ (layer.gain * z)
        routes = {}
        for i in block:
            near = -0.5 * ((place[i - first] - layer.centre) / breadth).square()
            content = torch.sigmoid(layer.route_logit) * (layer.router.weight @ t.rms_norm(v[i]))
            routes[i] = (near + content).softmax(0)
            if documents[i] == running:
                paths[i] += read[i - first] + routes[i] @ moved
        if len(block) < W:
            break
        last = documents[block[-1]]
        mine = torch.stack([v[i] if documents[i] == last else torch.zeros(S, dtype=torch.float64) for i in block])
        weights = torch.stack([routes[i] * (documents[i] == last) for i in block])
        summary = weights.T @ mine / (weights.sum(0)[:, None] + 1e-6)
        goes_on = last == running
        z = keep * goes_on * z + (1 - keep) * (transform @ mine)
        capsules = hold * capsules + (1 - hold) * summary if goes_on else summary
        running = last
    return (t.rms_norm(paths) * layer.proj.gain) @ layer.proj.weight.T


@pytest.mark.parametrize("local", ["run", "block", "off"])
@pytest.mark.parametrize("length", [3, 4, 13])
@torch.no_grad()
def test_skc_is_its_formula(local: str, length: int) -> None:
    model = scrambled(LAYER_PATTERN="S", SKC_LOCAL=local)
    layer, x = model.blocks[1]["skc"], inputs(model, 3, length)
    tokens = some_tokens(3, length, starts=0.0)
    if length > 4:
        tokens[1, [0, 4, 6]] = BOS
        tokens[2, 9] = BOS
    got = layer(x, model.context(tokens, None, t.Variant()), None)
    for row in range(3):
        documents = (tokens[row] == BOS).cumsum(0).tolist()
        want = naive_skc(layer, x[row], documents, local)
        torch.testing.assert_close(got.y[row], want, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_spectral_entropy_loss_is_its_formula() -> None:
    model = scrambled(LAYER_PATTERN="S", SKC_SPECTRAL_ENTROPY=0.3)
    layer, tokens = model.blocks[0]["skc"], some_tokens(2, 10, starts=0.0)
    layer.inputs.weight[1:S] *= 0.01  # one channel has all the energy
    x = inputs(model, 2, 10)
    assert not layer(x, model.context(tokens, None, t.Variant()), None).losses, "none in evaluation"
    got = layer(x, model.context(tokens, None, t.Variant(), moment(2)), None).losses["spectral_entropy"]
    s, gate = (x @ layer.inputs.weight.T).chunk(2, -1)
    v = F.pad(torch.sigmoid(gate) * s, (0, 0, 0, 2)).view(2, 3, W, S)
    energy = (t.hadamard(W).double() @ v).square().sum((1, 2))
    p = energy / energy.sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1)
    want = 0.3 * (0.8 * math.log(S) - entropy).clamp(min=0).sum()
    assert want > 0
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_a_parallel_layer_adds_two_scaled_branches_of_one_input() -> None:
    model = scrambled(LAYER_PATTERN="P", NUM_LAYERS=1, RESIDUAL="plain", RESID_MIX=0)
    tokens = some_tokens(2, 11)
    ctx = model.context(tokens, None, t.Variant())
    x, scale = model.embed(ctx)[0], model.residual.scale[0]
    branches = [model.blocks[0][kind](t.rms_norm(x), ctx, None).y for kind in ("skc", "mlp")]
    want = x + scale[0] * branches[0] + scale[1] * branches[1]
    torch.testing.assert_close(model.hidden(ctx, None)[0], t.rms_norm(want), rtol=1e-10, atol=1e-10)


# A preset's structure at a size for float64; those with a window of attention keep one.
SMALL = {
    "NSA_BLOCK": 4, "NSA_STRIDE": 2, "NSA_SELECT_BLOCK": 4,
    "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "PARTIAL_ROPE_DIMS": 4, "VOCAB_SIZE": 256, "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 64, "MICRO_BATCH_TOKENS": 64, "SKC_BLOCK_SIZE": W, "CAPSULE_DIM": S, "CAPSULE_NUM": N,
    "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "GROUP_SIZE": 8,
}  # fmt: skip


@pytest.mark.parametrize("preset", t.PRESETS)
@torch.no_grad()
def test_no_preset_looks_ahead(preset: str) -> None:
    whole = t.load_config({"PRESET": preset})
    more = {"EMBED_DIM": 12 if whole.embed_dim else 0, "INDUCTION_WINDOW": 8 if whole.matched_orders else None}
    if whole.ngram_orders:
        more |= {"BIGRAM_HASH_BUCKETS": 37, "BIGRAM_HASH_DIM": 6 * len(whole.ngram_orders)}
    given = {**SMALL, **more, **small_stages(preset), "PRESET": preset}
    given = {name: str(value) for name, value in given.items() if value is not None}
    h = t.load_config(given)
    assert not future_moves_the_past(scrambled_of(h))


# ---- the leaks of the published origin are caught by the test that ours passes


def future_moves_the_past(model: t.GPT) -> bool:
    """Whether some logit changes with a later token, or with how many of them there are."""
    with torch.no_grad():
        tokens, seen = some_tokens(2, 11, starts=0.0), False
        base = model.logits(tokens, t.scoring_variant(model.h))[0]
        for cut in range(1, 11):
            changed = torch.cat((tokens[:, :cut], some_tokens(2, 11 - cut, seed=cut, starts=0.0)), 1)
            for other in (changed, tokens[:, :cut]):
                logits = model.logits(other, t.scoring_variant(model.h))[0]
                seen |= bool((logits[:, :cut] - base[:, :cut]).abs().max() > 1e-10)
    return seen


def whole_block_spectrum(layer: t.SKC, grid: Tensor, blocks: t.Blocks, old: t.SKCState) -> tuple[Tensor, t.SKCState]:
    """The origin's Hadamard transform along time and back: a block reads its own spectrum."""
    transform = layer.transform.to(grid.dtype)
    return transform @ (layer.gain * (transform @ grid)), old


def capsules_of_everything(
    layer: t.SKC, grid: Tensor, ctx: t.Ctx, old: t.SKCState
) -> tuple[Tensor, Tensor, t.SKCState]:
    """The origin's router: capsules are pooled over all tokens, and every token reads them."""
    routes = layer.routes(grid, ctx)
    pooled = torch.einsum("bjwn,bjws->bns", routes, grid) / routes.sum((1, 2)).unsqueeze(-1)
    return torch.einsum("bjwn,bns->bjws", routes, pooled), pooled, old


def bank_over_all_time(bank: t.CapsuleBank, x: Tensor, ctx: t.Ctx, old: t.BlockState) -> tuple[Tensor, t.BlockState]:
    """The origin's bank: a softmax over the time axis, read back at every token."""
    shares = bank.routes(x, ctx).softmax(1)
    pooled = torch.einsum("btn,bts->bns", shares, bank.value(x, ctx))
    return pooled.unsqueeze(1).expand(-1, ctx.blocks.inside.shape[1], -1, -1), old


def sketch_of_everything(sketch: t.Sketch, x: Tensor, ctx: t.Ctx, state: None) -> t.Out:
    """The origin's feedback sketch: an average over the whole sequence, fed to all positions."""
    k, v = sketch.pairs(sketch.sketch(ctx.memory["top"].mean(1, keepdim=True), ctx), ctx).chunk(2, -1)
    seen = (k.mT @ v).unsqueeze(1).expand(-1, ctx.blocks.inside.shape[1], -1, -1)
    return t.Out(None, None, memory={"sketch": seen})


def halting_by_the_whole_sequence(model: t.GPT, top: Tensor, ctx: t.Ctx) -> t.Ctx:
    """The origin's halting: one decision from all capsules."""
    memory, trail = ctx.memory, ctx.memory["capsules"]
    stopped = memory["stopped"]
    if "top" in memory:
        top = torch.where(stopped, memory["top"], top)
    if len(trail) > 1:
        change, size = (x.flatten(1).norm(dim=1) for x in (trail[-1] - trail[-2], trail[-1]))
        stopped = stopped | (change < model.h.feedback_halt * size)[:, None, None]
    return ctx._replace(memory={**memory, "top": top, "stopped": stopped})


def places_by_the_last_block(layer: t.SKC, grid: Tensor, ctx: t.Ctx) -> Tensor:
    """The origin's place in the block: scaled by the length of the last block, so it depends on T."""
    last = (ctx.tokens.shape[1] - 1) % W + 1
    place = torch.arange(W, dtype=grid.dtype) / last
    near = -0.5 * ((place.unsqueeze(1) - layer.centre) / (F.softplus(layer.breadth) + 0.1)).square()
    return near.expand(*grid.shape[:-1], -1).softmax(-1)


LEAKS: dict[str, tuple[dict[str, object], type, str, Callable]] = {
    "spectrum of the own block": ({"LAYER_PATTERN": "S"}, t.SKC, "spectral", whole_block_spectrum),
    "capsules pooled over T": ({"LAYER_PATTERN": "S"}, t.SKC, "capsules", capsules_of_everything),
    "bank over all time": ({"CAPSULE_BANK": 1}, t.CapsuleBank, "observed", bank_over_all_time),
    "sketch of the whole sequence": (FEEDBACK, t.Sketch, "forward", sketch_of_everything),
    "halting by all capsules": ({**FEEDBACK, "FEEDBACK_HALT": 1.1}, t.GPT, "after_pass", halting_by_the_whole_sequence),
    "places by the last block": ({"LAYER_PATTERN": "S"}, t.SKC, "routes", places_by_the_last_block),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_each_leak_of_the_origin_is_caught(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, owner, method, naive = LEAKS[leak]
    model = scrambled(**variables)
    assert not future_moves_the_past(model)
    monkeypatch.setattr(owner, method, naive)
    assert future_moves_the_past(model), "the test does not see this leak"


def test_the_leak_that_is_priced_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/leak.py: what the table of records/origin.md says of leaks rests on it."""
    path = ROOT / "benchmarks" / "leak.py"
    spec = importlib.util.spec_from_file_location("leak", path)
    assert spec is not None and spec.loader is not None
    leak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(leak)
    for variables in ({"LAYER_PATTERN": "S"}, {"CAPSULE_BANK": 1}, FEEDBACK):
        assert not future_moves_the_past(scrambled(**variables))
        with monkeypatch.context() as patch:
            patch.setattr(t, "remember", leak.leaky)
            assert future_moves_the_past(scrambled(**variables))


@torch.no_grad()
def test_a_carry_averaged_over_the_batch_is_caught() -> None:
    """The origin's carry: rows see one another through it."""
    model = scrambled(CAPSULE_BANK=1, CARRY_EVAL=1, ATTN_WINDOW=4)
    first, second = some_tokens(2, 9, starts=0.0), some_tokens(2, 6, seed=1, starts=0.0)
    _, state = model.logits(first, t.Variant(), model.init_state(2))
    alone = [model.logits(second[i : i + 1], t.Variant(), t.take_rows(state, [i]))[0] for i in range(2)]
    torch.testing.assert_close(model.logits(second, t.Variant(), state)[0], torch.cat(alone), rtol=1e-10, atol=1e-10)
    place = 1 + next(site.id for site in model.sites if site.kind == "bank")
    leaky = state[place]._replace(seen=state[place].seen.mean(0, keepdim=True).expand(2, -1, -1))
    moved = model.logits(second, t.Variant(), (*state[:place], leaky, *state[place + 1 :]))[0]
    assert (moved - torch.cat(alone)).abs().max() > 1e-6


def test_log_probabilities_added_up_are_no_distribution() -> None:
    """The origin's n-gram tables: a sum of two log-distributions does not sum to one, and ours is asked to."""
    p = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    assert (t.Distribution(p).full().logsumexp(-1).abs() < 1e-12).all()
    assert (t.Distribution(p + p.roll(1, -1)).full().logsumexp(-1).abs() > 1e-3).all()


# ---- bank and feedback


@torch.no_grad()
def test_the_banks_dynamics_stay_bounded() -> None:
    """10,000 applications of K, with any U, V and the largest diagonal that its role allows."""
    model = scrambled(**FEEDBACK)
    bank = next(module for module in model.modules() if isinstance(module, t.CapsuleBank))
    bound = t.role_table(model)["blocks.1.bank.diagonal"].bound
    bank.diagonal.copy_(torch.linspace(-bound, bound, S))
    for size in (0.01, 1.0, 100.0):
        bank.u.mul_(size)
        identity = torch.eye(S, dtype=torch.float64)
        operator = bank.predict(identity)
        assert torch.linalg.matrix_norm(operator, 2) <= 0.999 + 1e-9
        assert torch.linalg.matrix_power(operator, 10_000).abs().max() < 1e-3


def test_the_diagonal_is_bound_after_every_step() -> None:
    h = config(**FEEDBACK, KOOPMAN_LR=0.5)
    model = t.build_model(h, t.start_runtime(h), BOS)
    weights = t.Weights(model)
    optimizer = t.Optimizer(h, t.start_runtime(h), weights)
    bank = model.blocks[1]["bank"]
    for _ in range(3):
        weights.clear_gradients()
        (-bank.diagonal.sum()).backward()
        optimizer.step(1.0, 0.9, False, 0.0)
    assert 0.98 < bank.diagonal.max() <= 0.989 + 1e-3


def test_the_dynamics_have_their_own_rate() -> None:
    """The first step of Adam moves a parameter by the rate."""
    h = config(**FEEDBACK, KOOPMAN_LR=0.25, SCALAR_LR=0.5, SCALAR_CODEC="exact")
    model = t.build_model(h, t.start_runtime(h), BOS)
    weights = t.Weights(model)
    bank = model.blocks[1]["bank"]
    before = {name: getattr(bank, name).detach().clone() for name in ("u", "v", "blend", "gate", "prototypes")}
    weights.clear_gradients()
    sum(getattr(bank, name).sum() for name in before).backward()
    t.Optimizer(h, t.start_runtime(h), weights).step(1.0, 0.9, False, 0.0)
    for name, old in before.items():
        rate = 0.25 if name in ("u", "v", "blend") else 0.5
        torch.testing.assert_close(getattr(bank, name).detach(), old - rate, rtol=1e-5, atol=1e-5)


def block_ends(documents: list[int]) -> list[int]:
    """The document that each whole or open block ends with, after that of no block."""
    return [0] + [documents[min(at + W, len(documents)) - 1] for at in range(0, len(documents), W)]


def naive_capsules(bank: t.CapsuleBank, source: Tensor, project: t.Linear, documents: list[int]) -> list[Tensor]:
    """What each block sees of one row's summaries (N, S), block after block, in words of the page."""
    values = source @ project.weight.T @ t.hadamard(S).double()
    routes = (source @ bank.router.weight.T @ bank.prototypes.T / math.sqrt(S)).softmax(-1)
    c, seen, ends, hold = torch.zeros(N, S, dtype=torch.float64), [], block_ends(documents), torch.sigmoid(bank.hold)
    for j, at in enumerate(range(0, len(source), W)):
        seen.append(c)
        inside = [i for i in range(at, min(at + W, len(source))) if documents[i] == ends[j + 1]]
        summary = sum(torch.outer(routes[i], values[i]) for i in inside) / (routes[inside].sum(0) + 1e-6).unsqueeze(1)
        kept = hold if ends[j + 1] == ends[j] else torch.zeros_like(hold)
        c = kept * c + (1 - kept) * summary
        if (j + 1) * W % bank.h.train_seq_len == 0:
            c = bank.h.capsule_carry_decay * c
    return seen


@torch.no_grad()
def test_the_bank_is_its_formula() -> None:
    """Three passes: capsules, what tokens read of them, and both losses."""
    model = scrambled(**FEEDBACK, TRAIN_SEQ_LEN=2 * W, CAPSULE_CONSISTENCY=0.7, CAPSULE_SPECULATOR=0.4)
    bank, tokens, x = model.blocks[1]["bank"], some_tokens(1, 14), inputs(model, 1, 14)
    tokens[0, 5] = BOS
    documents = (tokens[0] == BOS).cumsum(0).tolist()
    ctx, tops = model.context(tokens, None, t.Variant(), moment(1)), [x.flip(1) * (p + 1) for p in range(2)]
    room = 0.999 - float(bank.diagonal.abs().max())
    shrink = max(0.0, min(1.0, room / float(bank.u.norm() * bank.v.norm())))
    k = torch.diag(bank.diagonal) + shrink * bank.v @ bank.u.T  # from the right
    blend, ends, trail, found = torch.sigmoid(bank.blend), block_ends(documents), list[Tensor](), []
    for p in range(3):
        memory = {"capsules": tuple(c.unsqueeze(0) for c in trail)} | ({"top": tops[p - 1]} if p else {})
        out = bank(x, ctx._replace(memory=memory), None)
        seen = naive_capsules(bank, tops[p - 1][0] if p else x[0], bank.again if p else bank.value, documents)
        observed = torch.stack(seen)
        c = observed + blend * (trail[-1] @ k - observed) if p else observed
        routes = (x[0] @ bank.router.weight.T @ bank.prototypes.T / math.sqrt(S)).softmax(-1)
        read = torch.stack([
            routes[i] @ c[i // W] * (documents[i] == ends[i // W]) for i in range(14)
        ])  # fmt: skip
        want = torch.tanh(bank.gate) * (read @ t.hadamard(S).double() @ bank.proj.weight.T)
        torch.testing.assert_close(out.y[0], want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.memory["capsules"][-1][0], c, rtol=1e-6, atol=1e-7)
        if p:
            consistency = 0.7 * (trail[-1] @ k - observed).square().mean()
            torch.testing.assert_close(out.losses["consistency"], consistency, rtol=1e-5, atol=1e-8)
        trail, found = [*trail, c], [*found, out]
    foreseen = [trail[0] @ k @ k, trail[1] @ k]
    speculator = 0.4 * sum((guess - trail[2]).square().mean() for guess in foreseen)
    assert "speculator" not in found[1].losses
    torch.testing.assert_close(found[2].losses["speculator"], speculator, rtol=1e-5, atol=1e-8)
    spoken = bank(x, ctx._replace(variant=t.Variant(speculates=True), moment=None), None)
    torch.testing.assert_close(spoken.memory["capsules"][-1][0], trail[0] @ k @ k, rtol=1e-6, atol=1e-7)


def test_what_the_bank_foresees_learns_and_not_what_comes() -> None:
    """The consistency loss moves pass 0 and K, never the summary that it is held against."""
    model = scrambled(**FEEDBACK)
    bank, tokens, x = model.blocks[1]["bank"], some_tokens(2, 14, starts=0.0), inputs(model, 2, 14)
    ctx = model.context(tokens, None, t.Variant(), moment(2))
    first = bank(x, ctx, None).memory
    loss = bank(x, ctx._replace(memory={**first, "top": x.flip(1)}), None).losses["consistency"]
    names = dict(bank.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(loss, [*names.values()], allow_unused=True), strict=True))
    assert grads["again.weight"] is None or not grads["again.weight"].any()
    assert all(grads[name] is not None and grads[name].any() for name in ("value.weight", "diagonal", "u", "v"))


@torch.no_grad()
def test_feedback_is_its_formula() -> None:
    model = scrambled(FEEDBACK_PASSES=1, FEEDBACK_SKETCH_TOKENS=2, FEEDBACK_DIM=6)
    sketch, feedback = model.blocks[1]["sketch"], model.blocks[1]["feedback"]
    tokens, x = some_tokens(1, 14), inputs(model, 1, 14)
    tokens[0, 6] = BOS
    documents, top = (tokens[0] == BOS).cumsum(0).tolist(), x.flip(1)
    ctx, ends = model.context(tokens, None, t.Variant()), block_ends(documents)
    memory, hold, want = torch.zeros(6, 6, dtype=torch.float64), torch.sigmoid(sketch.hold), []
    for j, at in enumerate(range(0, 14, W)):
        for i in range(at, min(at + W, 14)):
            read = (x[0, i] @ feedback.query.weight.T) @ memory * (documents[i] == ends[j])
            want.append(torch.tanh(feedback.gate) * (t.rms_norm(read) @ feedback.proj.weight.T))
        memory = memory * hold * (ends[j + 1] == ends[j])
        for part in range(2):
            places = range(at + part * W // 2, at + (part + 1) * W // 2)
            inside = [i for i in places if i < 14 and documents[i] == ends[j + 1]]
            mean = top[0, inside].mean(0) if inside else torch.zeros_like(top[0, 0])
            key, value = (t.rms_norm(mean) @ sketch.sketch.weight.T @ sketch.pairs.weight.T).chunk(2)
            memory = memory + torch.outer(key, value)
    out = sketch(x, ctx._replace(memory={"top": top}), None)
    got = feedback(x, ctx._replace(memory=out.memory), None).y[0]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


def test_losses_do_not_grow_with_the_visits_of_a_layer() -> None:
    """Passes and loops that change nothing: the decoder's loss is counted once."""
    tokens, found = some_tokens(2, 12, starts=0.0), []
    for loops in ({}, {"RECURRENCE_LAYERS": "1", "RECURRENCE_DEPTH": 4}):
        model = scrambled(LAYER_PATTERN="AS", SKC_SPECTRAL_ENTROPY=0.3, RESIDUAL="plain", RESID_MIX=0, **loops)
        with torch.no_grad():
            model.residual.scale.zero_()
            model.blocks[1]["skc"].inputs.weight[:S, 1:].zero_()  # few channels of energy, so that there is a loss
        found.append(model.loss(tokens, tokens, t.final_variant(model.h), None, moment(2)).losses["spectral_entropy"])
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)
    off = scrambled(LAYER_PATTERN="AS", SKC_SPECTRAL_ENTROPY=0.3, SKC_SPECTRAL=0)
    assert not off.loss(tokens, tokens, t.final_variant(off.h), None, moment(2)).losses
    assert "SKC_SPECTRAL_ENTROPY" in t.ineffective_variables(off.h)


@torch.no_grad()
def test_a_carried_state_holds_its_own_numbers_only() -> None:
    """A view of activations in a state would keep them in memory and write them into checkpoints."""
    model = scrambled(LAYER_PATTERN="SK", CAPSULE_BANK=1)
    _, state = model.logits(some_tokens(1, 90), t.Variant(), model.init_state(1))
    for part in t.flatten_state(state):
        assert part.untyped_storage().nbytes() <= part.numel() * part.element_size()


@torch.no_grad()
def test_speculation_without_a_bank_changes_nothing() -> None:
    model = scrambled(FEEDBACK_PASSES=2, FEEDBACK_SKETCH_TOKENS=2, FEEDBACK_DIM=6, CAPSULE_SPECULATE=1)
    assert "CAPSULE_SPECULATE" in t.ineffective_variables(model.h)
    assert t.scoring_variant(model.h) == t.final_variant(model.h)


@pytest.mark.parametrize("scale", [0.0, 0.02])
@torch.no_grad()
def test_noise_on_matrices_has_its_size_and_fades(scale: float) -> None:
    h = config(MODEL_DIM=64, TERNARY_NOISE_SCALE=scale, TERNARY_NOISE_FRACTION=0.5, MATRIX_CODEC="exact")
    model = t.build_model(h, t.start_runtime(h), BOS)
    weights, name = t.Weights(model), "blocks.0.mlp.up.weight"
    weight = model.get_parameter(name)
    before, drawn = weight.clone(), []
    for progress, step in ((0.0, 0), (0.0, 0), (0.0, 1), (0.25, 1), (0.5, 2)):
        weights.materialize(progress)
        assert torch.equal(weight, before), "noise lasts for one step"
        weights.disturb(progress, step)
        drawn.append((weight - before) / before.std())
    for noise, left in zip(drawn, (1, 1, 1, 0.5, 0), strict=True):
        assert float(noise.std()) == pytest.approx(scale * left, rel=0.05)
    assert torch.equal(drawn[0], drawn[1]) and (not scale or not torch.equal(drawn[1], drawn[2]))
    weights.materialize(0.0)
    scalars = model.residual.scale.clone()
    weights.disturb(0.0, 3)
    assert torch.equal(scalars, model.residual.scale)


@torch.no_grad()
def test_blocks_stop_one_by_one() -> None:
    """Halting at 0 is none; at infinity every block keeps its output of the first feedback pass."""
    tokens, found = some_tokens(2, 14, starts=0.0), {}
    for halt in (0.0, 1e9):
        model = scrambled(**{**FEEDBACK, "FEEDBACK_PASSES": 3, "FEEDBACK_HALT": halt})
        found[halt] = model.logits(tokens, t.final_variant(model.h))[0]
    once = scrambled(**{**FEEDBACK, "FEEDBACK_PASSES": 3, "FEEDBACK_HALT": 0.0})
    once.plans = {key: tuple(s for s in sites if s.pass_ <= 1) for key, sites in once.plans.items()}
    one_pass = once.logits(tokens, t.final_variant(once.h))[0]
    torch.testing.assert_close(found[1e9], one_pass, rtol=1e-12, atol=1e-12)
    assert (found[0.0] - one_pass).abs().max() > 1e-6


@torch.no_grad()
def test_a_block_stops_at_the_share_that_is_named() -> None:
    """Blocks 1 to 3 saw their capsules change by 0, 4 and 6 percent; what block 0 sees is nothing, which stays so."""
    model, tokens = scrambled(**FEEDBACK, FEEDBACK_HALT=0.05), some_tokens(1, 16, starts=0.0)
    ctx, now = model.context(tokens, None, t.Variant()), torch.ones(1, 4, N, S, dtype=torch.float64)
    now[:, 0] = 0
    change = torch.tensor([0.0, 0.0, 0.04, 0.06], dtype=torch.float64).view(1, 4, 1, 1)
    memory = {"stopped": torch.zeros(1, 16, 1, dtype=torch.bool), "capsules": (now * (1 - change), now)}
    stopped = model.after_pass(inputs(model, 1, 16), ctx._replace(memory=memory)).memory["stopped"]
    assert stopped.view(4, W).all(1).tolist() == stopped.view(4, W).any(1).tolist() == [True, True, True, False]


@torch.no_grad()
def test_a_stopped_block_hands_on_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 0 and 1 stop after the first feedback pass: later keys and values are those of that pass."""
    model, tokens = (
        scrambled(**{**FEEDBACK, "FEEDBACK_PASSES": 3, "FEEDBACK_HALT": 0.1}),
        some_tokens(2, 16, starts=0.0),
    )
    plain, inputs_of, passes = model.after_pass, dict[str, list[Tensor]](), list[int]()

    def after_pass(top: Tensor, ctx: t.Ctx) -> t.Ctx:
        old, after = ctx.memory["stopped"], plain(top, ctx)
        passes.append(1)
        stopped = old | (torch.arange(16) < 2 * W).view(1, 16, 1) if len(passes) > 1 else old
        return after._replace(memory={**after.memory, "stopped": stopped})

    monkeypatch.setattr(model, "after_pass", after_pass)
    variant = t.final_variant(model.h)
    model.logits(tokens, variant, observe=lambda name, x: inputs_of.setdefault(name, []).append(x.clone()))
    for name in ("blocks.1.attn.qkv.weight", "blocks.1.mlp.up.weight"):
        first, second, third = inputs_of[name][1:]
        for later in (second, third):
            assert torch.equal(later[:, : 2 * W], first[:, : 2 * W])
            assert not torch.equal(later[:, 2 * W :], first[:, 2 * W :])


@torch.no_grad()
def test_a_block_stops_for_the_document_whose_capsules_it_sees() -> None:
    """A document that starts inside the block sees none of them, and goes on."""
    model, tokens = scrambled(**FEEDBACK), some_tokens(1, 10, starts=0.0)
    tokens[0, 6] = BOS
    ctx, same = model.context(tokens, None, t.Variant()), torch.ones(1, 3, N, S, dtype=torch.float64)
    memory = {"stopped": torch.zeros(1, 10, 1, dtype=torch.bool), "capsules": (same, same)}
    stopped = model.after_pass(inputs(model, 1, 10), ctx._replace(memory=memory)).memory["stopped"]
    assert stopped.flatten().tolist() == [True] * 6 + [False] * 2 + [True] * 2


@torch.no_grad()
def test_speculation_needs_no_pass() -> None:
    model = scrambled(**FEEDBACK, CAPSULE_SPECULATE=1)
    variant = t.scoring_variant(model.h)
    assert variant.speculates and max(site.pass_ for site in model.plans[False, True]) == 0
    seen: list[str] = []
    model.logits(some_tokens(1, 9), variant, observe=lambda name, x: seen.append(name))
    assert not [name for name in seen if "feedback" in name or "sketch" in name]


def test_losses_of_the_bank_are_returned_per_sequence() -> None:
    model = scrambled(**FEEDBACK)
    tokens, targets = some_tokens(3, 12, starts=0.0), some_tokens(3, 12, seed=1)
    together = model.loss(tokens, targets, t.final_variant(model.h), None, moment(3)).losses
    assert set(together) == {"consistency", "speculator"}
    variant = t.final_variant(model.h)
    alone = [model.loss(tokens[i : i + 1], targets[i : i + 1], variant, None, moment(1)).losses for i in range(3)]
    for name, loss in together.items():
        torch.testing.assert_close(loss, sum(losses[name] for losses in alone), rtol=1e-10, atol=1e-12)
        assert loss > 0


# ---- experts


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_are_their_formula(top_k: int) -> None:
    model = scrambled(MOE_EXPERTS=4, MOE_TOP_K=top_k, MOE_LAYER_FRAC=1)
    layer, x = model.blocks[0]["moe"], inputs(model, 2, 9)
    ctx = model.context(some_tokens(2, 9), None, t.final_variant(model.h), moment(2))
    out = layer(x, ctx, None)
    want, balance = torch.zeros_like(x), 0.0
    for row in range(2):
        p = (x[row] @ layer.router.weight.T).softmax(-1)
        counts = torch.zeros(4, dtype=torch.float64)
        for i in range(9):
            weight, chosen = p[i].topk(top_k)
            weight = weight / weight.sum() if top_k > 1 else weight
            for w, e in zip(weight, chosen.tolist(), strict=True):
                want[row, i] += w * layer.experts[e](x[row, i], ctx, None).y
                counts[e] += 1
        balance += 4 * (p.mean(0) * counts / (9 * top_k)).sum()
    torch.testing.assert_close(out.y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.losses["moe_balance"], model.h.moe_balance * balance, rtol=1e-10, atol=0)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    names = [name for name, _ in layer.named_parameters()]
    ours, theirs = (torch.autograd.grad((y * grad).sum(), list(layer.parameters())) for y in (out.y, want))
    for name, mine, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("norm", [0, 1])
@torch.no_grad()
def test_experts_are_observed_and_adapted_like_other_matrices(norm: int) -> None:
    model = scrambled(MOE_EXPERTS=3, MOE_LAYER_FRAC=1, PROJ_NORM=norm)
    tokens, seen = some_tokens(2, 9), dict[str, Tensor]()
    variant = t.final_variant(model.h)
    before, _ = model.logits(tokens, variant, observe=lambda name, x: seen.update({name: x}))
    for part, width in (("up", model.h.model_dim), ("down", model.blocks[0]["moe"].experts[0].up.weight.shape[0])):
        rows = [seen[f"blocks.0.moe.experts.{e}.{part}.weight"] for e in range(3)]
        assert sum(len(part) for part in rows) == 18 and all(part.shape[1] == width for part in rows)
        name, generator = f"blocks.0.moe.experts.1.{part}.weight", torch.Generator().manual_seed(0)
        weight = model.get_parameter(name)
        pair = tuple(torch.randn(n, 2, dtype=torch.float64, generator=generator) for n in weight.shape[::-1])
        adapted, _ = model.logits(tokens, variant, adapters={name: (pair[0], pair[1].T)})
        assert not torch.equal(adapted, before)
        weight += pair[1] @ pair[0].T
        torch.testing.assert_close(model.logits(tokens, variant)[0], adapted, rtol=1e-9, atol=1e-9)
        weight -= pair[1] @ pair[0].T
        with pytest.raises(ValueError, match="all rows"):
            model.logits(tokens, variant, adapters={name: (pair[0].expand(2, -1, -1), pair[1].T.expand(2, -1, -1))})


@torch.no_grad()
def test_before_their_start_only_the_first_expert_runs() -> None:
    model = scrambled(MOE_EXPERTS=3, MOE_LAYER_FRAC=1, MOE_START_FRACTION=0.5)
    layer, x = model.blocks[0]["moe"], inputs(model, 2, 9)
    before, after = t.variant_at(model.h, 0.49), t.variant_at(model.h, 0.5)
    assert (before.experts, after.experts) == (False, True)
    ctx = model.context(some_tokens(2, 9), None, before)
    assert torch.equal(layer(x, ctx, None).y, layer.experts[0](x, ctx, None).y)


def test_experts_without_tokens_are_left_alone() -> None:
    h = config(MOE_EXPERTS=3, MOE_LAYER_FRAC=1, MUON_WD=0.1, MATRIX_CODEC="exact")
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, BOS)
    weights = t.Weights(model)
    with torch.no_grad():
        for block in model.blocks:
            block["moe"].router.weight.zero_()  # ties go to the lowest index
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = t.Optimizer(h, rt, weights)
    for _ in range(2):
        weights.clear_gradients()
        model.loss(some_tokens(2, 9), some_tokens(2, 9, seed=2), t.final_variant(h)).total.backward()
        for block in model.blocks:
            block["moe"].router.weight.grad = None
        optimizer.step(1.0, 0.9, False, 0.0)
    for name, parameter in model.named_parameters():
        if ".experts." in name and name.endswith("up.weight"):
            assert torch.equal(parameter, before[name]) == (".experts.0." not in name), name


# ---- frontier parts


@torch.no_grad()
def test_xsa_leaves_nothing_along_the_own_value() -> None:
    generator = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 5, heads, 6, dtype=torch.float64, generator=generator) for heads in (4, 2))
    v[0, 0, 0] = 0
    found = t.without_own_value(y, v)
    for head in range(4):
        own = v[:, :, head // 2]
        assert (found[:, :, head] * own).sum(-1).abs().max() < 1e-12
        rest, unit = y[:, :, head] - found[:, :, head], F.normalize(own, dim=-1, eps=1e-30)
        assert (rest - (rest * unit).sum(-1, keepdim=True) * unit).abs().max() < 1e-9, "nothing else is taken"
    assert torch.equal(found[0, 0, :2], y[0, 0, :2])


@pytest.mark.parametrize(("layers", "count"), [(3, 0), (3, 2), (2, 9)])
def test_xsa_is_on_the_last_attention_layers(layers: int, count: int) -> None:
    model = scrambled(NUM_LAYERS=2 * layers, LAYER_PATTERN="KA", XSA_LAYERS=count)
    on = [block["attn"].xsa for block in model.blocks if "attn" in block]
    assert on == [i >= layers - count for i in range(layers)]


@torch.no_grad()
def test_smear_adds_the_gated_embedding_of_the_previous_token() -> None:
    model = scrambled(SMEAR_GATE=5)
    smear, weight, tokens = model.embed.smear, model.embed.weight, some_tokens(2, 9)
    got, _ = smear(F.embedding(tokens, weight), weight, model.context(tokens, None, t.Variant()))
    for row in range(2):
        for i in range(9):
            want = weight[tokens[row, i]].clone()
            if i and tokens[row, i] != BOS:
                gate = torch.sigmoid(smear.gate.weight[0] @ want[:5]) * smear.amount
                want += gate * weight[tokens[row, i - 1]]
            torch.testing.assert_close(got[row, i], want)


@torch.no_grad()
def test_engram_is_its_formula() -> None:
    model = scrambled(
        BIGRAM_HASH_BUCKETS=11, BIGRAM_HASH_ORDERS="2,3", BIGRAM_HASH_HEADS=2, BIGRAM_HASH_DIM=8, ENGRAM_INJECT_LAYER=1
    )
    engram, tokens, x = model.blocks[1]["engram"], some_tokens(2, 9), t.rms_norm(inputs(model, 2, 9))
    out = engram(x, model.context(tokens, None, t.Variant()), None)
    memory = out.memory["engram"]
    assert not memory[tokens == BOS].any(), "positions without full context give zeros"
    scale = 0.1 + 3.9 * torch.sigmoid(engram.sharpness)
    cosine = F.cosine_similarity(x, memory @ engram.key.weight.T, dim=-1, eps=1e-12)
    want = torch.sigmoid(scale * cosine + engram.bias).unsqueeze(-1) * (memory @ engram.value.weight.T)
    torch.testing.assert_close(out.y, want, rtol=1e-5, atol=1e-6)
    rows, _ = engram.table.rows(tokens, torch.full((2, 2), -1), BOS)
    assert all(len({tuple(rows[..., i].flatten().tolist()) for i in range(4)}) == 4 for _ in range(1))


@torch.no_grad()
def test_ln_scale_shrinks_later_layers_inputs() -> None:
    seen: dict[str, Tensor] = {}
    model = scrambled(NUM_LAYERS=3, LN_SCALE=1, RESIDUAL="plain")
    model.logits(some_tokens(1, 5), t.Variant(), observe=lambda name, x: seen.setdefault(name, x))
    for layer in range(3):
        size = seen[f"blocks.{layer}.attn.qkv.weight"].square().mean().sqrt()
        assert float(size) == pytest.approx(1 / math.sqrt(layer + 1), rel=1e-4)


# ---- structure


OFF: dict[str, tuple[dict[str, object], str]] = {  # a part, what it is switched on with, and a name in its parameters
    "SKC_SPECTRAL": ({"LAYER_PATTERN": "S", "SKC_SPECTRAL": 1}, "z0"),
    "CAPSULE_NUM": ({"LAYER_PATTERN": "S", "CAPSULE_NUM": 3}, "router"),
    "SKC_LOCAL": ({"LAYER_PATTERN": "S", "SKC_LOCAL": "run"}, "conv"),
    "CAPSULE_BANK": ({"CAPSULE_BANK": 1}, "bank"),
    "FEEDBACK_PASSES": ({"FEEDBACK_PASSES": 1}, "feedback"),
    "BIGRAM_HASH_BUCKETS": ({"BIGRAM_HASH_BUCKETS": 9, "ENGRAM_INJECT_LAYER": 1}, "engram"),
    "MOE_EXPERTS": ({"MOE_EXPERTS": 2}, "experts"),
    "SMEAR_GATE": ({"SMEAR_GATE": 4}, "smear"),
    "ATTN_GATE": ({"ATTN_GATE": 4}, "attn.gate"),
    "VALUE_RESIDUAL": ({"VALUE_RESIDUAL": 1}, "v_mix"),
}


@pytest.mark.parametrize("part", OFF)
def test_a_part_that_is_off_is_absent(part: str) -> None:
    """No parameters, no sites, and nothing of it in the state."""
    on, name = OFF[part]
    off = {**on, part: "off" if part == "SKC_LOCAL" else 0}
    with_it, without = scrambled(**on), scrambled(**off)
    assert [n for n, _ in with_it.named_parameters() if name in n]
    assert not [n for n, _ in without.named_parameters() if name in n]
    assert len(without.sites) <= len(with_it.sites)
    sizes = [sum(x.numel() for x in t.flatten_state(model.init_state(1))) for model in (without, with_it)]
    assert sizes[0] < sizes[1] or part in (
        "MOE_EXPERTS",
        "SMEAR_GATE",
        "ATTN_GATE",
        "VALUE_RESIDUAL",
        "FEEDBACK_PASSES",
    )


def test_shared_blocks_share_weights_and_keep_their_own_scales() -> None:
    own, shared = (scrambled(NUM_LAYERS=4, LAYER_PATTERN="KA", SHARED_BLOCKS=count) for count in (0, 2))
    assert [site.block for site in shared.sites] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert shared.residual.scale.shape == own.residual.scale.shape
    matrices = [sum(p.numel() for n, p in m.named_parameters() if n.startswith("blocks")) for m in (shared, own)]
    assert 2 * matrices[0] == matrices[1]
    assert len(shared.init_state(1)) == len(own.init_state(1)), "each visit has a state of its own"


def test_loops_revisit_layers_as_a_group() -> None:
    h = config(NUM_LAYERS=6, RECURRENCE_LAYERS="1-2", RECURRENCE_DEPTH=3, RECURRENCE_START_FRACTION=0.5)
    looped = t.plan_sites(h, t.final_variant(h))
    assert [site.layer for site in looped if site.sub == 0] == [0, 1, 2, 1, 2, 1, 2, 3, 4, 5]
    plain = t.plan_sites(h, t.variant_at(h, 0.2))
    assert [site.layer for site in plain if site.sub == 0] == [0, 1, 2, 3, 4, 5]
    assert {s._replace(visits=1) for s in plain} < {s._replace(visits=1) for s in looped}, "ids stay"
    assert {s.visits for s in looped if s.layer == 1} == {3}, "a layer's losses are means over its visits"


def test_noise_depends_on_its_keys_alone() -> None:
    step, rows = torch.tensor(5), torch.arange(4096)
    one = t.keyed_uniform(7, step, torch.full_like(rows, 3), rows)
    assert torch.equal(one[100:200], t.keyed_uniform(7, step, torch.full((100,), 3), rows[100:200]))
    assert one.min() >= 0 and one.max() < 1 and abs(float(one.mean()) - 0.5) < 0.02
    assert abs(float(one.std()) - 12**-0.5) < 0.01
    for other in ((8, step, 3), (7, step + 1, 3), (7, step, 4)):
        moved = t.keyed_uniform(other[0], other[1], torch.full_like(rows, other[2]), rows)
        assert abs(float(torch.corrcoef(torch.stack((one, moved)))[0, 1])) < 0.06


def test_stochastic_depth_keeps_the_mean_and_is_off_in_evaluation() -> None:
    model = scrambled(STOCHASTIC_DEPTH=0.4, NUM_LAYERS=2)
    site, y = model.sites[-1], torch.ones(2000, 1, 1)
    ctx = model.context(torch.zeros(2000, 1, dtype=torch.int64), None, t.Variant())
    thinned = model.thinned(site, y, ctx._replace(moment=moment(2000)))
    assert sorted(set(thinned.flatten().tolist())) == pytest.approx([0.0, 1 / 0.6])
    assert float(thinned.mean()) == pytest.approx(1, abs=0.06)
    assert model.thinned(site, y, ctx) is y
    early = model.thinned(model.sites[0], y, ctx._replace(moment=moment(2000)))
    assert sorted(set(early.flatten().tolist())) == pytest.approx([0.0, 1 / 0.8]), "earlier layers stay more often"
    assert float((early == 0).double().mean()) == pytest.approx(0.2, abs=0.04)
    assert model.thinned(site._replace(sub=-1), y, ctx._replace(moment=moment(2000))) is y


@pytest.mark.parametrize("mode", ["bias", "gate"])
@torch.no_grad()
def test_the_engram_enters_what_its_mode_says(mode: str) -> None:
    model = scrambled(
        LAYER_PATTERN="S", BIGRAM_HASH_BUCKETS=11, BIGRAM_HASH_DIM=8, ENGRAM_INJECT_LAYER=0, ENG_TO_SKC_MODE=mode,
        SKC_SPECTRAL=0, CAPSULE_NUM=0,
    )  # fmt: skip
    layer, x, tokens = model.blocks[0]["skc"], inputs(model, 1, 9), some_tokens(1, 9, starts=0.0)
    memory = torch.randn(1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = layer(x, model.context(tokens, None, t.Variant())._replace(memory={"engram": memory}), None).y[0]
    s, gate = (x[0] @ layer.inputs.weight.T).chunk(2, -1)
    extra = memory[0] @ layer.engram.weight.T
    s, gate = (s + extra, gate) if mode == "bias" else (s, gate + extra)
    a, v = torch.sigmoid(layer.local_decay), torch.sigmoid(gate) * s
    local = convolved(s, layer.conv.taps, [0] * 9) + scanned(a.expand_as(v), (1 - a) * v, [False] * 9)
    want = (t.rms_norm(local) * layer.proj.gain) @ layer.proj.weight.T
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_diagnostics_of_every_part_are_numbers_that_move() -> None:
    """Of a real forward pass: none is missing and none is stuck at zero."""
    more = {"BIGRAM_HASH_BUCKETS": 11, "BIGRAM_HASH_DIM": 8, "ENGRAM_INJECT_LAYER": 0, "SMEAR_GATE": 4, "ATTN_GATE": 4}
    model = scrambled(LAYER_PATTERN="SAK", NUM_LAYERS=3, MOE_EXPERTS=3, MOE_LAYER_FRAC=1, **more, **FEEDBACK)
    tokens, measured = some_tokens(2, 14, starts=0.0), t.final_variant(model.h)._replace(measures=True)
    found = model.loss(tokens, tokens, measured, None, moment(2)).metrics
    expected = {
        "0.engram.gate_mean", "0.skc.local_rms", "0.skc.spectral_rms", "0.skc.capsules_rms", "0.skc.memory_rms",
        "0.skc.gate_mean", "1.attn.gate_saturated", "1.bank.capsules_rms", "1.bank.pass2.capsules_rms",
        "2.koopman.gate_mean",
        "2.koopman.pass1.keep_gate_mean", "2.moe.load_0", "2.moe.load_2", "2.moe.router_entropy_nats",
        "1.feedback.pass1.opening_rms", "0.skc.branch_over_stream", "embed.smear_gate_mean",
    }  # fmt: skip
    assert expected <= set(found)
    loads = [float(found[f"2.moe.load_{e}"]) for e in range(3)]
    assert sum(loads) == pytest.approx(1)
    for name, value in found.items():
        assert value.isfinite() and (value != 0 or "saturated" in name or "load" in name), name
    assert not model.loss(tokens, tokens, t.final_variant(model.h), None, moment(2)).metrics


# ---- kernels and compilation


INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
import train_gpt as t
from test_skc import loop_scan
t.SCAN_TILE = (8, 4)
generator = torch.Generator().manual_seed(0)
for length, width in ((1, 1), (8, 4), (21, 6)):
    a = torch.rand(2, length, width, generator=generator)
    a = a * (torch.rand(a.shape, generator=generator) > 0.2)
    b, grad = (torch.randn(2, length, width, generator=generator) for _ in range(2))
    h0 = torch.randn(2, width, generator=generator)
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    found = t.ScanFunction.apply(*leaves, True), loop_scan(*leaves)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    for mine, other in zip(*(torch.autograd.grad((h * grad).sum(), leaves) for h in found), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
print("agree")
"""


def test_scan_kernels_agree_with_the_loop_in_the_interpreter() -> None:
    """In a process of its own: kernels are interpreted or not from their definition on."""
    pytest.importorskip("triton")
    environment = {**clean_environment({}), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "agree", done.stderr


def test_scan_kernels_build_for_hopper() -> None:
    triton = pytest.importorskip("triton")
    for kernel, pointers in ((t.scan_kernel, 4), (t.scan_gradient_kernel, 6)):
        signature = {**dict.fromkeys(kernel.arg_names[:pointers], "*fp32"), "length": "i32", "width": "i32"}
        signature |= dict.fromkeys(("TIME", "SIZE"), "constexpr")
        source = triton.compiler.ASTSource(kernel, signature, dict(zip(("TIME", "SIZE"), t.SCAN_TILE, strict=True)))
        built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024


COMPILED = {
    "skc": {"LAYER_PATTERN": "S"},
    "koopman": {"LAYER_PATTERN": "KA", "SMEAR_GATE": 4, "ATTN_GATE": 4, "XSA_LAYERS": 1, "STOCHASTIC_DEPTH": 0.1},
    "parallel experts": {"LAYER_PATTERN": "PA", "MOE_EXPERTS": 3, "MOE_LAYER_FRAC": 1},
    "feedback": {**FEEDBACK, "LAYER_PATTERN": "S"},
    "engram": {"BIGRAM_HASH_BUCKETS": 9, "BIGRAM_HASH_DIM": 8, "ENGRAM_INJECT_LAYER": 1, "RECURRENCE_LAYERS": "1-1"},
    "sparse attention": {
        "LAYER_PATTERN": "N",
        "NSA_BLOCK": 4,
        "NSA_STRIDE": 2,
        "NSA_SELECT_BLOCK": 4,
        "NSA_SELECT": 3,
        "NSA_WINDOW": 4,
        "DOC_MASK": 1,
    },
    "memory": {"RMT_SEGMENT": 4, "RMT_TOKENS": 2, "LAYER_PATTERN": "SA", "LABEL_SMOOTHING": 0.1},
    "memory over sparse attention": {
        "LAYER_PATTERN": "N",
        "NSA_BLOCK": 2,
        "NSA_STRIDE": 1,
        "NSA_SELECT_BLOCK": 2,
        "NSA_SELECT": 3,
        "NSA_WINDOW": 2,
        "DOC_MASK": 1,
        "RMT_SEGMENT": 4,
        "RMT_TOKENS": 2,
    },  # fmt: skip
    "hyper-connections": {"RESIDUAL": "hc", "HC_LEARN": "keep,write,bias,read,mix", "VALUE_EMBED": 1},
    "static connections": {"RESIDUAL": "mhc", "MHC_GATE_NOISE": 0.1, "LAYER_PATTERN": "SA", "UNET_SKIPS": 1},
    "dynamic connections": {"RESIDUAL": "mhc", "MHC_N": 4, "MHC_MODE": "sinkhorn", "MHC_LOGITS": "dynamic"},
}


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("option", COMPILED)
def test_the_step_is_one_graph_for_each_length(option: str, measures: bool) -> None:
    """No graph break, and one compilation for each training window, whatever the progress."""
    model = scrambled(**COMPILED[option])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.loss, backend=counter, fullgraph=True, dynamic=False)
    variant = t.final_variant(model.h)._replace(measures=measures)
    for number, length in enumerate((8, 16, 8, 16, 8)):
        tokens, targets = some_tokens(2, length, seed=number), some_tokens(2, length, seed=number + 5)
        when = t.Moment(torch.tensor(number / 5), torch.tensor(number), torch.arange(2) + number)
        state = model.start_state(torch.full((2, model.h.history), 3))
        out, plain = (f(tokens, targets, variant, state, when) for f in (compiled, model.loss))
        assert bool(out.metrics) == measures
        torch.testing.assert_close(out.total, plain.total)
        (out.total + sum(out.losses.values(), torch.zeros(()))).backward()
    assert counter.frame_count == 2
