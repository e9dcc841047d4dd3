"""The scoring engine against plain loops: every token once, exact contexts, carried states, honest adapters, bytes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Done, scramble
from torch import Tensor

import train_gpt as t

BOS, VOCAB, WINDOW = t.BYTE_BOS, 256, 16
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def config(**variables: object) -> t.Hyperparameters:
    base = {"PRESET": "tiny", "VOCAB_SIZE": VOCAB, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    sizes = {"EVAL_SEQ_LEN": WINDOW, "EVAL_STREAMS": 3, "MODEL_DIM": 16}
    return t.load_config({name: str(value) for name, value in {**base, **sizes, **variables}.items()})


def scrambled(h: t.Hyperparameters) -> t.GPT:
    """A network whose every parameter is random and matters."""
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


class Stub:
    """Stands in for a network: logits that do not depend on the context, in float64."""

    def __init__(self, logits: Tensor) -> None:
        self.row = logits.double()

    def init_state(self, batch: int) -> tuple:
        return (torch.zeros(batch),)

    def start_state(self, history: Tensor) -> None:
        return None

    def logits(self, tokens: Tensor, variant: Any, state: Any = None, last: int = 0, adapters: Any = None) -> Any:
        return self.row.expand(*tokens[:, -last:].shape, -1), state


def stream(length: int, seed: int = 0, spread: int = BOS) -> np.ndarray:
    """Random tokens with a document start here and there."""
    choose = np.random.default_rng(seed)
    tokens = choose.integers(0, spread, length)
    tokens[choose.random(length) < 0.05] = BOS
    return tokens.astype(np.int64)


def scorer_of(
    h: t.Hyperparameters, model: Any, adapters: list[t.Adapter] | None = None, rank: int = 0, world: int = 1
) -> t.Scorer:
    rt = t.start_runtime(h)._replace(rank=rank, world=world)
    scorer = t.Scorer(h, rt, model, t.ByteTokenizer().byte_table())
    if adapters is not None:
        scorer.adapters = adapters
    return scorer


@torch.no_grad()
def naive_nats(model: t.GPT, tokens: np.ndarray, chunks: list[tuple[int, int, int]]) -> float:
    """Cross-entropy of the targets first + 1 .. last, given the tokens begin .. first before them, chunk by chunk."""
    total, both = 0.0, torch.from_numpy(tokens)
    for begin, first, last in chunks:
        reach = model.h.history
        history = both[max(0, begin - reach) : begin]
        state = model.start_state(F.pad(history, (reach - len(history), 0), value=-1)[None])
        logits, _ = model.logits(both[None, begin:last], t.final_variant(model.h), state)
        total += F.cross_entropy(logits[0, first - begin :], both[first + 1 : last + 1], reduction="sum").item()
    return total


def scored(ledger: list[t.Entry]) -> list[tuple[int, int, int]]:
    """(span, first, stop) of what was scored, in order."""
    return [(entry.span, entry.first, entry.stop) for entry in ledger if entry.kind == "score"]


def plain_chunks(length: int) -> list[tuple[int, int, int]]:
    """(begin, first scored input, last + 1) of windows that do not overlap."""
    return [(at, at, min(at + WINDOW, length - 1)) for at in range(0, length - 1, WINDOW)]


class Recorder(t.Adapter):
    """Notes every chunk and distribution that was scored, by the stream index of the predicted token."""

    def __init__(self) -> None:
        self.chunks: list[t.Chunk] = []
        self.predicted: dict[int, Tensor] = {}
        self.contexts: dict[int, list[int]] = {}

    def wrap(self, states: list[Any], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        self.chunks.append(chunk)
        length = chunk.tokens.shape[1]
        for row, start in enumerate(chunk.starts):
            for i in range(chunk.scored):
                index = start + 1 + i
                assert index not in self.predicted, f"token {index} is scored twice"
                self.predicted[index] = given.full()[row, i]
                self.contexts[index] = chunk.tokens[row, : length - chunk.scored + i + 1].tolist()
        return given


# ---- plain scoring

LENGTHS = [2, 3, WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW + 1, 200, 201]


HISTORY = {"INDUCTION_ORDERS": "1,2", "INDUCTION_WINDOW": 9, "BIGRAM_HASH_BUCKETS": 50, "BIGRAM_HASH_DIM": 4}


@pytest.mark.parametrize("variables", [{}, HISTORY], ids=["window", "history"])
@pytest.mark.parametrize("length", LENGTHS)
def test_plain_score_is_a_loop_over_windows(length: int, variables: dict[str, object]) -> None:
    h = config(**variables)
    model, tokens = scrambled(h), stream(length)
    score = scorer_of(h, model).score(tokens)
    assert score.tokens == length - 1
    assert score.nats == pytest.approx(naive_nats(model, tokens, plain_chunks(length)), rel=1e-11)
    assert score.bytes == (tokens[1:] != BOS).sum()
    assert score.loss == score.nats / score.tokens


@pytest.mark.parametrize("length", [2, 5, 100, 201])
@pytest.mark.parametrize("streams", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("batch", [1, WINDOW * 2, 10**6])
def test_plain_score_depends_on_neither_streams_nor_batch(length: int, streams: int, batch: int) -> None:
    h = config(EVAL_STREAMS=streams, VAL_BATCH_SIZE=batch)
    model, tokens = scrambled(h), stream(length)
    score = scorer_of(h, model).score(tokens)
    assert score.nats == pytest.approx(naive_nats(model, tokens, plain_chunks(length)), rel=1e-11)


def test_memory_of_a_pass_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "MAX_LOGITS", {"cpu": VOCAB * WINDOW * 2})
    h, recorder = config(EVAL_STREAMS=9, VAL_BATCH_SIZE=10**6), Recorder()
    scorer_of(h, scrambled(h), [recorder]).score(stream(300))
    assert max(len(chunk.spans) for chunk in recorder.chunks) == 2


def test_score_uses_the_variant_it_is_given() -> None:
    h = config(UNTIE_AT_FRACTION=0.5)
    model, tokens = scrambled(h), stream(60)
    found = [scorer_of(h, model).score(tokens, variant).nats for variant in (None, t.Variant(True), t.Variant(False))]
    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx(naive_nats(model, tokens, plain_chunks(60)), rel=1e-11)


def test_scoring_leaves_the_model_as_it_was() -> None:
    h = config()
    model = scrambled(h)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    scorer_of(h, model).score(stream(60))
    assert all(p.grad is None and torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))


# ---- the order of scoring

MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "sliding": {"SLIDING_EVAL": 1, "SLIDING_EVAL_STRIDE": 5},
    "sliding one by one": {"SLIDING_EVAL": 1, "SLIDING_EVAL_STRIDE": 1},
    "carried": {"CARRY_EVAL": 1, "ATTN_WINDOW": 6},
    "history": HISTORY,
    "sliding history": {"SLIDING_EVAL": 1, "SLIDING_EVAL_STRIDE": 5, **HISTORY},
    "carried history": {"CARRY_EVAL": 1, "ATTN_WINDOW": 6, **HISTORY},
}
modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("length", [2, 4, WINDOW + 1, 50, 131])
@pytest.mark.parametrize("streams", [1, 3, 100])
def test_every_token_is_scored_once_and_in_order(mode: str, length: int, streams: int) -> None:
    h = config(**MODES[mode], EVAL_STREAMS=streams, VAL_BATCH_SIZE=2 * WINDOW)
    ledger: list[t.Entry] = []
    recorder, shares = Recorder(), []
    score = scorer_of(h, scrambled(h), [recorder]).score(stream(length), ledger=ledger, report=shares.append)
    assert score.tokens == length - 1 and sorted(recorder.predicted) == list(range(1, length))
    last: dict[int, int] = {}
    for span, first, stop in scored(ledger):
        assert first < stop and last.get(span, first) == first, "a span goes forward without a gap"
        last[span] = stop
    spans = sorted((min(f for s, f, _ in scored(ledger) if s == span), stop) for span, stop in last.items())
    assert [first for first, _ in spans] == [1, *(stop for _, stop in spans[:-1])] and spans[-1][1] == length
    assert len(spans) <= streams
    assert shares == sorted(shares) and shares[-1] == 1


# ---- sliding windows


@pytest.mark.parametrize("length", [2, 9, WINDOW + 1, 100, 131])
@pytest.mark.parametrize("stride", [1, 5, WINDOW])
def test_sliding_gives_each_token_its_exact_context(length: int, stride: int) -> None:
    """All tokens of a stride are predicted from one window that ends with them, as long as the stream allows."""
    h, recorder = config(SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=stride), Recorder()
    model, tokens = scrambled(h), stream(length)
    score = scorer_of(h, model, [recorder]).score(tokens)
    chunks = []
    for first in range(0, length - 1, stride):
        last = min(first + stride, length - 1)
        chunks.append((max(0, first + stride - WINDOW), first, last))
        for index in range(first + 1, last + 1):
            assert recorder.contexts[index] == tokens[chunks[-1][0] : index].tolist()
            assert len(recorder.contexts[index]) >= min(index, WINDOW - stride + 1)
    assert score.nats == pytest.approx(naive_nats(model, tokens, chunks), rel=1e-11)


@pytest.mark.parametrize("length", [6 * WINDOW + 1, 6 * WINDOW + 9, 5])
@pytest.mark.parametrize("streams", [1, 2, 5])
def test_sliding_by_whole_windows_is_plain(streams: int, length: int) -> None:
    plain, sliding = (
        config(EVAL_STREAMS=streams),
        config(EVAL_STREAMS=streams, SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=WINDOW),
    )
    model, tokens = scrambled(plain), stream(length)
    assert scorer_of(sliding, model).score(tokens) == scorer_of(plain, model).score(tokens)


# ---- carried states


@torch.no_grad()
def long_nats(model: t.GPT, tokens: np.ndarray, spans: list[tuple[int, int]]) -> float:
    """Each span in one long forward pass; the model's own window is all that limits the context."""
    return naive_nats(model, tokens, [(first, first, last) for first, last in spans])


@pytest.mark.parametrize("length", [2, 9, 100, 131, 6 * WINDOW + 1])
@pytest.mark.parametrize("attn_window", [1, 4, WINDOW, 3 * WINDOW - 5])
@pytest.mark.parametrize("streams", [1, 3, 50])
def test_carried_score_is_one_long_windowed_pass(length: int, attn_window: int, streams: int) -> None:
    variables = {"CARRY_EVAL": 1, "ATTN_WINDOW": attn_window, "EVAL_STREAMS": streams}
    h = config(**variables, DOC_MASK=attn_window % 2, VALUE_RESIDUAL=1)
    model, tokens, ledger = scrambled(h), stream(length), []
    score = scorer_of(h, model).score(tokens, ledger=ledger)
    spans = {}
    for span, first, stop in scored(ledger):
        spans[span] = (spans.get(span, (first - 1, 0))[0], stop - 1)
    assert len(spans) == min(streams, -(-(length - 1) // WINDOW))
    assert score.nats == pytest.approx(long_nats(model, tokens, list(spans.values())), rel=1e-10)


@modes
@pytest.mark.parametrize("batch", [1, 2 * WINDOW, 3 * WINDOW])
def test_batches_do_not_change_the_score(mode: str, batch: int) -> None:
    scores = []
    for size in (batch, 10**6):
        h = config(**MODES[mode], EVAL_STREAMS=7, VAL_BATCH_SIZE=size)
        scores.append(scorer_of(h, scrambled(h), [Unigram()]).score(stream(250)))
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-11)
    assert scores[0][1:] == scores[1][1:]


# ---- ranks


@modes
@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_spans(mode: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of all ranks, which all_reduce adds up, are the score of one process; a rank may have no span."""
    monkeypatch.setattr(t.dist, "all_reduce", lambda tensor, group: None)
    h = config(**MODES[mode], EVAL_STREAMS=4)
    model, tokens = scrambled(h), stream(150)
    alone = scorer_of(h, model, [Unigram()]).score(tokens)
    shares = [scorer_of(h, model, [Unigram()], rank, world).score(tokens) for rank in range(world)]
    assert sum(share.nats for share in shares) == pytest.approx(alone.nats, rel=1e-11)
    assert sum(share.tokens for share in shares) == alone.tokens
    assert sum(share.bytes for share in shares) == alone.bytes


# ---- adapters


class Unigram(t.Adapter):
    """Mixes in the frequencies of what its span has seen."""

    def begin(self, scorer: t.Scorer) -> Tensor:
        return torch.ones(VOCAB, dtype=torch.float64)

    def wrap(self, states: list[Tensor], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        seen = torch.stack(states)
        shares = (seen / seen.sum(1, keepdim=True)).unsqueeze(1)
        return t.Distribution((given.full().exp() * 0.5 + shares * 0.5).log())

    def learn(self, states: list[Tensor], chunk: t.Chunk, given: t.Distribution) -> list[Tensor]:
        scored = chunk.targets[:, -chunk.scored :]
        return [seen + torch.bincount(row, minlength=VOCAB) for seen, row in zip(states, scored, strict=True)]


class SharedUnigram(Unigram):
    """Spans also learn from one another, between three phases."""

    phases = 3

    def merge(self, states: dict[int, Tensor], offers: dict[int, Tensor]) -> dict[int, Tensor]:
        total = torch.stack([state - 1 for _, state in sorted(offers.items())]).sum(0)
        return {span: 1 + total / len(offers) for span in states}


class LowRank(t.Adapter):
    """Gives every span a low-rank change of one weight that grows with what the span has seen."""

    name: ClassVar[str] = "blocks.1.mlp.up.weight"

    def begin(self, scorer: t.Scorer) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    def lora(self, states: list[Tensor], chunk: t.Chunk) -> dict[str, tuple[Tensor, Tensor]]:
        down = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
        up = torch.linspace(0, 1, 32, dtype=torch.float64)[None]
        return {self.name: (down.expand(len(states), 16, 1), torch.stack(states).view(-1, 1, 1) * up)}

    def learn(self, states: list[Tensor], chunk: t.Chunk, given: t.Distribution) -> list[Tensor]:
        means = chunk.targets[:, -chunk.scored :].double().mean(1)
        return [state + mean / 100 for state, mean in zip(states, means, strict=True)]


class Sharpen(t.Adapter):
    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        return t.Distribution((given.full() * 1.5).log_softmax(-1))


STACKS: dict[str, Callable[[], list[t.Adapter]]] = {
    "unigram": lambda: [Unigram()],
    "low rank": lambda: [LowRank()],
    "shared": lambda: [SharedUnigram()],
    "stack": lambda: [LowRank(), Unigram(), Sharpen(), SharedUnigram()],
}


# The program's own adapters, by the variables that switch them on.
CACHE = {"NGRAM_CACHE": 1, "NGRAM_CACHE_ORDERS": "2,3,5", "NGRAM_CACHE_DEPTH": 5}
ENGRAM = {"EVAL_ENGRAM": 1, "EVAL_ENGRAM_BUCKETS": 9, "EVAL_ENGRAM_TOKENS": 30}
LORA = {"TTT_SCOPE": "lora", "TTT_RANK": 3, "TTT_LR": 0.5}
OWN: dict[str, dict[str, object]] = {
    "cache": CACHE,
    "engram": ENGRAM,
    "lora": LORA,
    "lora, late": {**LORA, "TTT_CHUNK_TOKENS": 20, "TTT_EPOCHS": 2, "TTT_OPTIMIZER": "adam", "TTT_LR": 0.01},
    "scalars": {"TTT_SCOPE": "scalars", "TTT_LR": 0.1},
    "all": {"TTT_SCOPE": "all", "TTT_LR": 0.1},
    "global": {"TTT_SCOPE": "global", "TTT_LR": 0.1},
    "stacked": {**LORA, **CACHE, **ENGRAM},
}
every_stack = pytest.mark.parametrize("stack", [*STACKS, *OWN])


def stacked(h: t.Hyperparameters, stack: str) -> tuple[t.Hyperparameters, list[t.Adapter]]:
    """A configuration with some adapters, and these."""
    if stack in STACKS:
        return h, STACKS[stack]()
    values = {name.lower(): t.parse_value(name, str(value)) for name, value in OWN[stack].items()}
    h = dataclasses.replace(h, **values)
    return h, [t.ADAPTERS[name](h) for name in h.used()["ADAPTERS"]]


def predictions(h: t.Hyperparameters, stack: str, tokens: np.ndarray) -> tuple[dict[int, Tensor], list[int], list[int]]:
    """The distribution of every token, the order in which tokens were scored, and where spans start."""
    h, adapters = stacked(h, stack)
    recorder, ledger = Recorder(), []
    scorer_of(h, scrambled(h), [*adapters, recorder]).score(tokens, ledger=ledger)
    order = [index for _, first, stop in scored(ledger) for index in range(first, stop)]
    return recorder.predicted, order, [min(first for s, first, _ in scored(ledger) if s == span) for span in range(3)]


@modes
@every_stack
def test_no_prediction_depends_on_a_token_that_is_scored_later(mode: str, stack: str) -> None:
    """Changing a token, and all that is scored after it, leaves every earlier prediction and its own, bit for bit."""
    h = config(**MODES[mode], EVAL_STREAMS=3)
    tokens = stream(130)
    before, order, starts = predictions(h, stack, tokens)
    # what a span is given of the span before it is context, whenever that is scored
    reach = WINDOW * h.sliding_eval + h.history * (not h.carry_eval) + 1
    context = {index for start in starts for index in range(start - reach, start)}
    places = [at for at in (1, 2, WINDOW, WINDOW + 1, 51, 52, 76, 105, 128, 129) if at not in context]
    assert len(places) >= 6
    for at in places:
        place, changed = order.index(at), tokens.copy()
        later = sorted(set(order[place:]) - context)
        changed[later] = (tokens[later] + 31) % BOS
        assert at in later
        after, _, _ = predictions(h, stack, changed)
        for index in order[: place + 1]:
            assert torch.equal(after[index], before[index]), f"token {index} saw token {at} or one after it"
        assert at + 1 not in before or not torch.equal(after[at + 1], before[at + 1])


@modes
@every_stack
def test_predictions_are_normalized(mode: str, stack: str) -> None:
    found, _, _ = predictions(config(**MODES[mode]), stack, stream(100))
    rows = torch.stack(list(found.values()))
    torch.testing.assert_close(rows.logsumexp(-1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)


def test_adapters_act_in_order_and_learn_after_scoring() -> None:
    """begin, then for each chunk: lora of all, wrap of all, learn of all, but not from a span's last chunk."""
    calls: list[str] = []

    class Note(t.Adapter):
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self, scorer: t.Scorer) -> int:
            calls.append(f"begin {self.name}")
            return 0

        def lora(self, states: list[int], chunk: t.Chunk) -> None:
            calls.append(f"lora {self.name} {states}")

        def wrap(self, states: list[int], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            calls.append(f"wrap {self.name}")
            return t.Distribution((given.full() * (2 if self.name == "a" else 1) + 1e-3).log_softmax(-1))

        def learn(self, states: list[int], chunk: t.Chunk, given: t.Distribution) -> list[int]:
            calls.append(f"learn {self.name}")
            assert given.full().shape == (len(states), chunk.scored, VOCAB)
            return [state + chunk.scored for state in states]

    h, ledger = config(EVAL_STREAMS=1), []
    logits = torch.linspace(-1, 1, VOCAB)
    score = scorer_of(h, Stub(logits), [Note("a"), Note("b")]).score(stream(2 * WINDOW + 1), ledger=ledger)
    chunk = ["wrap a", "wrap b", "learn a", "learn b"]
    assert calls == ["begin a", "begin b", "lora a [0]", "lora b [0]", *chunk, "lora a [16]", "lora b [16]", *chunk[:2]]
    want = F.cross_entropy(
        (2 * logits.double()).expand(2 * WINDOW, -1), torch.from_numpy(stream(2 * WINDOW + 1)[1:]), reduction="sum"
    )
    assert score.nats == pytest.approx(want.item(), rel=1e-11)


def test_answers_are_hidden_until_they_are_scored() -> None:
    """lora and wrap get a chunk without its targets; learn gets them."""
    seen: list[tuple[str, bool]] = []

    class Spy(t.Adapter):
        def lora(self, states: list[None], chunk: t.Chunk) -> None:
            seen.append(("lora", chunk.targets is None))

        def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            seen.append(("wrap", chunk.targets is None))
            return given

        def learn(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> list[None]:
            seen.append(("learn", chunk.targets is None))
            return states

    scorer_of(config(EVAL_STREAMS=1), Stub(torch.zeros(VOCAB)), [Spy()]).score(stream(WINDOW + 2))
    assert seen == [("lora", True), ("wrap", True), ("learn", False), ("lora", True), ("wrap", True)]


def test_two_adapters_may_not_change_one_weight() -> None:
    h = config()
    with pytest.raises(ValueError, match=LowRank.name):
        scorer_of(h, scrambled(h), [LowRank(), LowRank()]).score(stream(40))


def test_unigram_cache_against_a_loop() -> None:
    """With a uniform model the score is that of the mixture, span by span and chunk by chunk."""
    h, tokens, ledger = config(), stream(140, spread=9), []
    score = scorer_of(h, Stub(torch.zeros(VOCAB)), [Unigram()]).score(tokens, ledger=ledger)
    nats, counts = 0.0, {}
    for span, first, stop in scored(ledger):
        seen = counts.setdefault(span, np.ones(VOCAB))
        nats -= sum(math.log(0.5 / VOCAB + 0.5 * seen[tokens[i]] / seen.sum()) for i in range(first, stop))
        for i in range(first, stop):
            seen[tokens[i]] += 1
    assert score.nats == pytest.approx(nats, rel=1e-11)
    assert score.loss < math.log(VOCAB) - 0.3, "the cache must help"


def test_low_rank_adapter_changes_the_weight_it_names() -> None:
    """Each row of a batch has its own change: the score is that of networks with changed weights."""
    h = config()
    model, tokens, ledger = scrambled(h), stream(100), []
    score = scorer_of(h, model, [LowRank()]).score(tokens, ledger=ledger)
    weight, nats, grown = dict(model.named_parameters())[LowRank.name], 0.0, {}
    kept = weight.detach().clone()
    down, up = torch.linspace(-1, 1, 16).double()[:, None], torch.linspace(0, 1, 32).double()[None]
    for span, first, stop in scored(ledger):
        with torch.no_grad():
            weight.copy_(kept + (down @ up).T * grown.get(span, 0.0))
        nats += naive_nats(model, tokens, [(first - 1, first - 1, stop - 1)])
        grown[span] = grown.get(span, 0.0) + tokens[first:stop].mean() / 100
    assert score.nats == pytest.approx(nats, rel=1e-8)


def test_spans_meet_only_between_phases() -> None:
    """In three phases the states of all spans are merged twice, and every span goes on with the merged one."""
    merged: list[dict[int, Tensor]] = []

    class Watched(SharedUnigram):
        def merge(self, states: dict[int, Tensor], offers: dict[int, Tensor]) -> dict[int, Tensor]:
            merged.append(dict(states))
            return super().merge(states, offers)

    h, tokens, recorder = config(EVAL_STREAMS=4), stream(12 * WINDOW + 1), Recorder()
    scorer_of(h, Stub(torch.zeros(VOCAB)), [Watched(), recorder]).score(tokens)
    assert [sorted(states) for states in merged] == [[0, 1, 2, 3]] * 2
    first = {span: state.sum() - VOCAB for span, state in merged[0].items()}
    assert all(count == WINDOW for count in first.values()), "a third of each span, before anything is shared"
    seen = merged[0][0] * 0 + 1 + sum(state - 1 for state in merged[0].values()) / 4
    shares = 0.5 / VOCAB + 0.5 * seen / seen.sum()
    torch.testing.assert_close(recorder.predicted[WINDOW + 1].exp(), shares, **EXACT)


@pytest.mark.parametrize("stack", ["shared", "global"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_phases_do_not_depend_on_ranks(world: int, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for each rank, exchanging at the barriers what the process group would: no weights."""
    h, tokens, barrier = config(EVAL_STREAMS=4), stream(200), threading.Barrier(world, timeout=30)
    h = stacked(h, stack)[0]
    model, board = scrambled(h), [None] * world
    local, sent = threading.local(), list[int]()

    def gather(parts: list, mine: Any, group: Any) -> None:
        sent.append(len(pickle.dumps(mine)))
        board[local.rank] = copy.deepcopy(mine)  # a process group sends copies
        barrier.wait()
        parts[:] = list(board)
        barrier.wait()

    monkeypatch.setattr(t.dist, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(t.dist, "all_gather_object", gather)
    found: list[t.Score | None] = [None] * world

    def run(rank: int) -> None:
        local.rank = rank
        found[rank] = scorer_of(h, copy.deepcopy(model), stacked(h, stack)[1], rank, world).score(tokens)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = scorer_of(h, model, stacked(h, stack)[1]).score(tokens)
    assert all(found) and sum(share.tokens for share in found if share) == alone.tokens
    assert sum(share.nats for share in found if share) == pytest.approx(alone.nats, rel=1e-11)
    assert len(sent) == 2 * world and max(sent) < 8 * sum(p.numel() for p in model.parameters()) / 4
    assert alone.nats != pytest.approx(scorer_of(h, model, []).score(tokens).nats, rel=1e-6)


# ---- the program's own adapters


@pytest.mark.parametrize("stack", OWN)
@pytest.mark.parametrize("mode", ["plain", "sliding", "carried history"])
def test_scores_with_adapters_depend_on_neither_batches_nor_ranks(
    stack: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t.dist, "all_reduce", lambda tensor, group: None)
    h, _ = stacked(config(**MODES[mode], EVAL_STREAMS=4), stack)
    model, tokens = scrambled(h), stream(170, spread=20)
    alone = scorer_of(h, model).score(tokens)
    one_by_one = scorer_of(dataclasses.replace(h, val_batch_size=1), model).score(tokens)
    assert one_by_one.nats == pytest.approx(alone.nats, rel=1e-10)
    if stack != "global":  # whose ranks meet
        shares = [scorer_of(h, model, None, rank, 3).score(tokens) for rank in range(3)]
        assert sum(share.nats for share in shares) == pytest.approx(alone.nats, rel=1e-10)
    plain = scorer_of(h, model, []).score(tokens)
    assert abs(alone.nats - plain.nats) > 1e-3, "the adapters must act"


@pytest.mark.parametrize("stack", OWN)
def test_nothing_survives_an_evaluation(stack: str) -> None:
    """Weights are the same bits, no gradient is left, and a second evaluation with the same scorer is the same."""
    h, _ = stacked(config(BIGRAM_HASH_BUCKETS=50, BIGRAM_HASH_DIM=4), stack)
    model, tokens = scrambled(h), stream(100, spread=20)
    before, scorer = t.fingerprint(model), scorer_of(h, model)
    assert scorer.score(tokens) == scorer.score(tokens)
    assert t.fingerprint(model) == before and all(p.grad is None for p in model.parameters())


def naive_ngram(seen: list[tuple[tuple[int, ...], int]], context: tuple[int, ...], model: Tensor) -> Tensor:
    """PPM-C of the orders of CACHE over (context, token) pairs, and the model below them."""
    p = model
    for order in (2, 3, 5):
        suffix = context[-(order - 1) :]
        following = [token for past, token in seen if past[-(order - 1) :] == suffix]
        counts = torch.bincount(torch.tensor(following, dtype=torch.int64), minlength=len(model)).double()
        distinct = int((counts > 0).sum())
        p = (counts + distinct * p) / (len(following) + distinct) if following else p
    return p


def test_ngram_cache_is_interpolated_counts() -> None:
    """Against a loop over all that was seen, with the gate's own shares of the mixture."""
    h = config(**{**CACHE, "NGRAM_CACHE_DEPTH": 200}, EVAL_STREAMS=1)
    tokens, recorder = stream(200, spread=5), Recorder()
    model = torch.linspace(-2, 2, VOCAB)
    scorer, probs = scorer_of(h, Stub(model)), model.double().softmax(-1)
    shares: list[float] = []

    class Watched(t.NgramAdapter):
        def wrap(self, states: list[Any], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            found = super().wrap(states, chunk, given)
            trust = 1 / (1 + math.exp(-states[0].trust))
            shares.extend((found.parts[3][0] * trust).tolist())
            return found

    scorer.adapters = [Watched(t.ngram_cache(h).kind), recorder]
    scorer.score(tokens)
    seen: list[tuple[tuple[int, ...], int]] = []
    padded = [-1] * 4 + tokens.tolist()
    for index in range(1, len(tokens)):
        if (index - 1) % WINDOW == 0:  # what earlier chunks held
            seen = [(tuple(padded[i : i + 4]), padded[i + 4]) for i in range(1, index)]
        context = tuple(padded[index : index + 4])
        want = (1 - shares[index - 1]) * probs + shares[index - 1] * naive_ngram(seen, context, probs)
        torch.testing.assert_close(recorder.predicted[index].exp(), want, **EXACT)
    assert max(shares) > 0.2, "five tokens in random order are worth a cache"


def test_ngram_memory_is_what_was_said() -> None:
    h = config(**ENGRAM, **CACHE)
    scorer, said = scorer_of(h, Stub(torch.zeros(VOCAB))), []
    scorer.say = said.append
    scorer.score(stream(100))
    assert len(said) == 2 and all("MiB for 3 streams" in text for text in said)
    for adapter in scorer.adapters:
        tables = adapter.begin(scorer)[:4]
        assert sum(part.nbytes for part in tables) == adapter.memory(scorer)


def test_counts_of_a_chunk_are_made_by_blocks() -> None:
    """What numpy holds while a chunk is predicted is a block's counts, not those of all its positions."""
    size = 8192
    h = dataclasses.replace(config(NGRAM_CACHE=1, EVAL_SEQ_LEN=512, EVAL_STREAMS=2), vocab_size=size)
    base = t.ByteTable(np.ones(size, np.int64), np.zeros(size, bool), np.zeros(size, bool))
    scorer = t.Scorer(h, t.start_runtime(h), Stub(torch.zeros(size)), base)
    (adapter,), tokens = scorer.adapters, np.random.default_rng(0).integers(1, size, 2048)
    tracemalloc.start()
    scorer.score(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    logits = 2 * 512 * size * 8
    said = 2 * adapter.memory(scorer) + adapter.work(scorer, 2) - 4 * logits
    assert peak < 1.1 * said < logits / 2, (peak, said)


def test_memory_that_is_not_there_is_refused() -> None:
    h = config(EVAL_ENGRAM=1, EVAL_ENGRAM_BUCKETS=2**30, EVAL_STREAMS=64)
    with pytest.raises(t.UserError, match=r"the adapters need \d+ MiB for 64 streams.*EVAL_ENGRAM_BUCKETS"):
        scorer_of(h, Stub(torch.zeros(VOCAB))).score(stream(64 * WINDOW + 1))


def test_mixture_hardly_loses_where_counts_say_nothing() -> None:
    """Against a model that knows the truth, tokens drawn at random: the cache learns to keep quiet."""
    truth = torch.linspace(-3, 2, VOCAB, dtype=torch.float64)
    h, tokens = config(NGRAM_CACHE=1, EVAL_STREAMS=1), drawn(truth, 3000)
    plain, mixed = (scorer_of(h, Stub(truth), own).score(tokens) for own in ([], None))
    assert mixed.nats - plain.nats < 6, "a few nats for 3,000 tokens"


def test_mixture_wins_where_a_text_repeats() -> None:
    h = config(NGRAM_CACHE=1, EVAL_STREAMS=1)
    tokens = np.tile(stream(100), 5)
    assert scorer_of(h, Stub(torch.zeros(VOCAB))).score(tokens).loss < 0.7 * math.log(VOCAB)


def trained_by_hand(model: t.GPT, h: t.Hyperparameters, tokens: Tensor, names: list[str]) -> float:
    """Windows scored, and then one step of SGD with momentum on each, on a copy of the network."""
    model, total, speed = copy.deepcopy(model), 0.0, {}
    own = dict(model.named_parameters())
    for at in range(0, len(tokens) - 1, WINDOW):
        last = min(at + WINDOW, len(tokens) - 1)
        logits, _ = model.logits(tokens[None, at:last], t.final_variant(h))
        loss = F.cross_entropy(logits[0], tokens[at + 1 : last + 1])
        total += float(loss.detach()) * (last - at)
        grads = torch.autograd.grad(loss, [own[name] for name in names], allow_unused=True)
        kept = {name: g for name, g in zip(names, grads, strict=True) if g is not None}
        scale = min(1.0, h.ttt_clip / float(torch.stack([g.norm() for g in kept.values()]).norm()))
        with torch.no_grad():
            for name, grad in kept.items():
                speed[name] = h.ttt_momentum * speed.get(name, 0) + scale * grad
                own[name] -= h.ttt_lr * speed[name]
    return total


@pytest.mark.parametrize("scope", ["scalars", "all"])
def test_training_at_test_time_is_sgd_on_scored_windows(scope: str) -> None:
    """Each span by itself: the sum of what a plain loop gives on the spans."""
    h = config(TTT_SCOPE=scope, TTT_LR=0.1, EVAL_STREAMS=2)
    model, tokens = scrambled(h), torch.from_numpy(stream(6 * WINDOW + 1))
    names = t.ttt_names(h, model)
    assert len(names) == len(dict(model.named_parameters())) or scope == "scalars"
    halves = [tokens[: 3 * WINDOW + 1], tokens[3 * WINDOW :]]
    want = sum(trained_by_hand(model, h, half, names) for half in halves)
    assert scorer_of(h, model).score(tokens.numpy()).nats == pytest.approx(want, rel=1e-9)


def test_low_rank_pairs_begin_anew_with_a_document() -> None:
    """After a chunk that ends with a document's first token the next one is scored by the network alone."""
    h = config(**LORA, EVAL_STREAMS=1)
    model, tokens = scrambled(h), np.random.default_rng(3).integers(0, BOS, 5 * WINDOW + 1)
    tokens[2 * WINDOW] = BOS
    found = {}
    for name, adapters in (("alone", []), ("adapted", None)):
        scorer, recorder = scorer_of(h, model, adapters), Recorder()
        scorer.adapters.append(recorder)
        scorer.score(tokens)
        found[name] = recorder.predicted
    same = [bool(torch.allclose(found["alone"][i], found["adapted"][i])) for i in range(1, len(tokens))]
    assert [all(same[at : at + WINDOW]) for at in range(0, 5 * WINDOW, WINDOW)] == [True, False, True, False, False]


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("scope", ["all", "global"])
def test_packed_tables_may_be_frozen(scope: str, frozen: int) -> None:
    h = config(TTT_SCOPE=scope, BIGRAM_HASH_BUCKETS=50, BIGRAM_HASH_DIM=4, FREEZE_PACKED_ENGRAM=frozen)
    names = t.ttt_names(h, scrambled(h))
    assert ("embed.ngrams.table.weight" in names or "embed.ngrams.weight" in names) is not frozen.__bool__()
    assert np.isfinite(scorer_of(h, scrambled(h)).score(stream(100)).nats)


def test_scope_without_parameters_is_one_line() -> None:
    h = config(TTT_SCOPE="feedback")
    with pytest.raises(t.UserError, match="TTT_SCOPE=feedback"):
        scorer_of(h, scrambled(h)).score(stream(40))


SKC = {"LAYER_PATTERN": "SA", "CAPSULE_DIM": 8, "CAPSULE_NUM": 3, "SKC_BLOCK_SIZE": 4, "CAPSULE_BANK": 1}


@pytest.mark.parametrize("scope", ["feedback", "skc_safe", "capsule_bank"])
def test_scopes_of_skc_adapt_their_own_parameters(scope: str) -> None:
    h = config(**SKC, FEEDBACK_PASSES=1, FEEDBACK_DIM=8, TTT_SCOPE=scope, TTT_LR=0.1)
    model = scrambled(h)
    part = {"feedback": (".feedback.", ".sketch."), "skc_safe": (".skc.",), "capsule_bank": (".bank.",)}[scope]
    names = t.ttt_names(h, model)
    assert names and all(any(p in name for p in part) for name in names)
    tokens = stream(150)
    assert scorer_of(h, model).score(tokens).nats != pytest.approx(scorer_of(h, model, []).score(tokens).nats, rel=1e-9)


def test_weights_that_an_evaluation_changes_are_noticed() -> None:
    class Writes(t.TestTimeTraining):
        def learn(self, states: list[Any], chunk: t.Chunk, given: t.Distribution) -> list[Any]:
            with torch.no_grad():
                next(self.scorer.model.parameters()).add_(1)
            return states

    for strict in (1, 0):
        h = config(TTT_SCOPE="scalars", FREEZE_CHECK_STRICT=strict)
        scorer = scorer_of(h, scrambled(h), [Writes(h)])
        if strict:
            with pytest.raises(t.UserError, match="changed the model's own weights"):
                scorer.score(stream(100))
        else:
            scorer.score(stream(100))


def test_changed_weights_on_one_rank_end_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(tensor: Tensor, group: Any) -> None:
        tensor += torch.tensor([0.0, 0, 0, 0, 1, 0])  # of a rank that saw its weights change

    monkeypatch.setattr(t.dist, "all_reduce", other)
    h = config(TTT_SCOPE="scalars")
    with pytest.raises(t.AgreedError, match="changed the model's own weights"):
        scorer_of(h, scrambled(h), None, 0, 2).score(stream(100))


# ---- time and protocol


def test_evaluation_that_would_take_too_long_ends_early() -> None:
    """After 2% of the tokens the rest is foretold; nothing more is scored."""
    h, calls, said = config(EVAL_STREAMS=1), [], []

    class Slow(t.Adapter):
        def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            calls.append(chunk.starts[0])
            time.sleep(0.02)
            return given

    scorer = scorer_of(h, Stub(torch.zeros(VOCAB)), [Slow()])
    scorer.limit, scorer.say = 1.0, said.append
    with pytest.raises(t.AgreedError, match="MAX_EVAL_SECONDS=1"):
        scorer.score(stream(100 * WINDOW + 1))
    assert len(calls) == 2 and "will take about" in said[0]
    scorer.limit = 60.0
    assert scorer.score(stream(20 * WINDOW)).tokens == 20 * WINDOW - 1


def test_pace_leaves_the_first_chunk_out_and_all_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: a slow first chunk is no pace; what comes before scoring, and slows down later, counts."""
    clock, said = [0.0], []
    monkeypatch.setattr(t.time, "monotonic", lambda: clock[0])

    class Timed(t.Adapter):
        def __init__(self, seconds: Callable[[int], float]) -> None:
            self.calls, self.seconds = 0, seconds

        def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            clock[0] += self.seconds(self.calls)
            self.calls += 1
            return given

    def timed(limit: float, seconds: Callable[[int], float], began: float | None = None) -> int:
        adapter = Timed(seconds)
        scorer = scorer_of(config(EVAL_STREAMS=1), Stub(torch.zeros(VOCAB)), [adapter])
        scorer.limit, scorer.say, scorer.began = limit, said.append, began
        if limit and limit < 30:
            with pytest.raises(t.AgreedError, match="MAX_EVAL_SECONDS"):
                scorer.score(stream(100 * WINDOW + 1))
        else:
            scorer.score(stream(100 * WINDOW + 1))
        return adapter.calls

    assert timed(100.0, lambda call: 30.0 if call == 0 else 0.5) == 100, "takes 79.5 s; the first pace says 1,525"
    assert said[-1].startswith("evaluation will take about 80 s")
    clock[0] = 50.0
    assert timed(20.0, lambda call: 0.1, began=35.0) == 2, "15 s are over before it begins"
    assert timed(20.0, lambda call: 0.1 if call < 10 else 3.0) == 17, "what was foretold was too little"


def test_score_depends_on_nothing_that_the_protocol_does_not_say() -> None:
    """Other settings make another protocol; one that is named for others is refused, and the order does not matter."""
    text = "window=32,streams=4,adapters=ttt_lora+ngram"

    def loaded(**variables: str) -> t.Hyperparameters:
        return t.load_config({"PRESET": "tiny", "EVAL_PROTOCOL": text, **variables})

    assert loaded().protocol == text and loaded().named
    assert loaded(EVAL_PROTOCOL="streams=4,window=32,adapters=ngram+ttt_lora").named
    changes = {"TTT_LR": "0.5", "TTT_EPOCHS": "4", "TTT_RANK": "2", "NGRAM_CACHE_ORDERS": "2,3", "KV_CACHE": "int4",
        "MAX_VAL_TOKENS": "100", "YARN_FACTOR": "2", "TTT_OPTIMIZER": "adam"}  # fmt: skip
    found = {name: loaded(**{name: value}) for name, value in changes.items()}
    assert len({h.protocol for h in found.values()} | {text}) == len(changes) + 1
    assert not any(h.named for h in found.values())
    assert all(h.protocol.startswith(f"{text},settings=") for h in found.values())
    for name, h in found.items():
        assert loaded(**{name: changes[name], "EVAL_PROTOCOL": h.protocol}).named
        with pytest.raises(t.UserError, match="other evaluation variables"):
            loaded(EVAL_PROTOCOL=h.protocol)
    idle = {"EVAL_ENGRAM_DEPTH": "3", "VAL_BATCH_SIZE": "64", "MAX_EVAL_SECONDS": "9", "SEED": "3"}
    assert loaded(**idle).protocol == text, "what has no effect, or none on the score"


def test_low_rank_pairs_begin_alike_whatever_the_seed() -> None:
    scores = []
    for seed in (1, 2):
        h = config(**LORA, EVAL_STREAMS=1)
        model = scrambled(h)
        scores.append(scorer_of(dataclasses.replace(h, seed=seed), model).score(stream(100)))
    assert scores[0] == scores[1]


def test_protocol_names_what_it_fixes() -> None:
    text = "window=64,stride=16,streams=5,adapters=ttt_lora+temperature+engram+ngram"
    h = t.load_config({"PRESET": "tiny", "EVAL_PROTOCOL": text})
    assert h.protocol == text and h.used()["ADAPTERS"] == ("ttt", "temperature", "engram", "ngram")
    assert (h.eval_window, h.sliding_eval_stride, h.sliding_eval, h.eval_streams) == (64, 16, True, 5)
    plain = t.load_config({"PRESET": "tiny", "EVAL_PROTOCOL": "window=32,streams=4"})
    assert plain.protocol == t.load_config({"PRESET": "tiny"}).protocol == "window=32,streams=4"
    again = t.load_config({"PRESET": "tiny", "EVAL_PROTOCOL": text, "EVAL_STREAMS": "5", "SLIDING_EVAL": "1"})
    assert again == h


@pytest.mark.parametrize(
    "environ,named",
    [
        ({"EVAL_PROTOCOL": "window=64"}, "streams are missing"),
        ({"EVAL_PROTOCOL": "window=64,streams=2,speed=3"}, "speed is unknown"),
        ({"EVAL_PROTOCOL": "window=64,streams=2,adapters=oracle"}, "oracle is unknown"),
        ({"EVAL_PROTOCOL": "window=64,streams=x"}, "EVAL_STREAMS=x"),
        ({"EVAL_PROTOCOL": "window=64,streams=2,window=32"}, "says window twice"),
        ({"EVAL_PROTOCOL": "window=64,streams=2,adapters=ttt_lora+ttt_all"}, "says ttt twice"),
        ({"EVAL_PROTOCOL": "window=64,streams=2,adapters=ngram+ngram"}, "says ngram twice"),
        ({"EVAL_PROTOCOL": "window=64,streams=2", "EVAL_STREAMS": "3"}, "contradicts EVAL_PROTOCOL"),
        ({"TTT_SCOPE": "global", "CARRY_EVAL": "1", "ATTN_WINDOW": "8"}, "excludes CARRY_EVAL"),
        ({"NGRAM_CACHE": "1", "NGRAM_CACHE_ORDERS": "1,2"}, "NGRAM_CACHE_ORDERS"),
        ({"EVAL_ENGRAM": "1", "EVAL_ENGRAM_ORDERS": "1,2"}, "EVAL_ENGRAM_ORDERS"),
    ],
)
def test_protocol_mistakes_are_one_line(environ: dict[str, str], named: str) -> None:
    with pytest.raises(t.UserError, match=named):
        t.load_config({"PRESET": "tiny", **environ})


# ---- the audit


def audited(h: t.Hyperparameters, make: Callable[[], t.Scorer] | None = None, positions: int = 24) -> t.Audit:
    model = scrambled(h)
    tokens = t.audit_stream(h, stream(3000))
    return t.Audit(make or (lambda: scorer_of(h, model)), tokens, positions, stream(2 * len(tokens)))


def failed(audit: t.Audit) -> set[str]:
    return {finding.check for finding in audit.findings() if not finding.ok}


CHECKS = {"causality", "causality: far", "order", "normalization: model", "normalization: all", "score: sum",
    "score: unwatched", "state: weights", "state: scope", "state: adapters", "state: survival",
    "determinism"}  # fmt: skip


@pytest.mark.parametrize("stack", ["plain", *OWN])
@pytest.mark.parametrize("mode", ["carried history", "sliding history"])
def test_honest_evaluations_pass_the_audit(stack: str, mode: str) -> None:
    h = config(**MODES[mode], EVAL_STREAMS=3)
    h = stacked(h, stack)[0] if stack != "plain" else h
    if stack == "global" and h.carry_eval:
        pytest.skip("refused")
    audit = audited(h, positions=8)
    findings = audit.findings()
    assert not [finding for finding in findings if not finding.ok]
    alone = {f"normalization: {type(adapter).__name__}" for adapter in audit.make().adapters}
    assert {finding.check for finding in findings} == CHECKS | alone
    assert len(audit.positions) == 8


def test_positions_of_an_audit_hold_all_kinds_of_edges() -> None:
    h = config(EVAL_STREAMS=2, SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=4)
    audit = audited(h, positions=200)
    assert len(audit.positions) == 200 == len(set(audit.positions))
    spans = [min(e.first for e in audit.whole.ledger if e.span == span) for span in (0, 1)]
    assert {*spans, spans[1] - 1} <= set(audit.positions), "where streams begin"
    documents = set(np.flatnonzero(audit.tokens == BOS).tolist())
    assert documents & set(audit.positions), "where documents begin"
    assert sum(at % 4 == 1 for at in audit.positions) > 30, "chunks begin at every fourth token"


class Oracle(t.Adapter):
    """Knows what it should predict: looks into the stream for the targets."""

    def begin(self, scorer: t.Scorer) -> Tensor:
        return torch.from_numpy(scorer.tokens)

    def wrap(self, states: list[Tensor], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        rows = [state[at + 1 : at + 1 + chunk.scored] for state, at in zip(states, chunk.starts, strict=True)]
        bonus = F.one_hot(torch.stack(rows), VOCAB).to(given.full())
        return t.Distribution((given.full() + 0.01 * bonus).log_softmax(-1))


class Future(t.Adapter):
    """Takes a hint from a token three places on."""

    def begin(self, scorer: t.Scorer) -> Tensor:
        return F.pad(torch.from_numpy(scorer.tokens), (0, 9))

    def wrap(self, states: list[Tensor], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        rows = [state[at + 4 : at + 4 + chunk.scored] for state, at in zip(states, chunk.starts, strict=True)]
        scale = 1 + torch.stack(rows).to(given.full())[..., None] / 1e6
        return t.Distribution((given.full() * scale).log_softmax(-1))


class Unnormalized(t.Adapter):
    """Adds the score of a cache without renormalizing."""

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        return t.Distribution((given.full().exp() + 0.0005).log())


class Peeking(NamedTuple):
    """A distribution that is better for the target than for anyone who asks for all of it."""

    log_probs: Tensor
    parts: Any = None

    def log_prob(self, targets: Tensor) -> Tensor:
        return self.log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) + 0.1

    def full(self, positions: slice = slice(None)) -> Tensor:
        return self.log_probs[:, positions]


class Partial(t.Adapter):
    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> Any:
        return Peeking(given.full())


class Hoarder(Unigram):
    """Keeps what it saw to itself instead of in its spans' states."""

    def __init__(self) -> None:
        self.seen = torch.ones(VOCAB, dtype=torch.float64)

    def begin(self, scorer: t.Scorer) -> None:
        return None

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        shares = (self.seen / self.seen.sum()).expand_as(given.full())
        return t.Distribution((given.full().exp() * 0.5 + shares * 0.5).log())

    def learn(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> list[None]:
        assert chunk.targets is not None
        self.seen = self.seen + torch.bincount(chunk.targets.flatten(), minlength=VOCAB)
        return states


class Writer(t.Adapter):
    """Trains the model itself."""

    def begin(self, scorer: t.Scorer) -> None:
        self.model = scorer.model

    def learn(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> list[None]:
        with torch.no_grad():
            next(self.model.parameters()).mul_(1.001)
        return states


class Eager(t.Scorer):
    """Learns from a chunk before it is scored."""

    def predict(self, chunk: t.Chunk, states: list[list]) -> Any:
        given, _ = super().predict(chunk, states)
        rows = [torch.from_numpy(self.tokens[at + 1 : at + 1 + chunk.scored]) for at in chunk.starts]
        self.learn(chunk._replace(targets=torch.stack(rows)), states, given)
        return super().predict(chunk, states)


class Twice(t.Scorer):
    """Walks the stream a second time with what it learned in the first."""

    def score_group(self, group: list[int], turns: Any, run: tuple, sums: np.ndarray, pace: Any) -> Any:
        super().score_group(group, turns, run, np.zeros(4), pace)
        return super().score_group(group, turns, run, sums, pace)


class Sly(Oracle):
    """Looks at the targets only where nobody looks at it."""

    def begin(self, scorer: t.Scorer) -> Tensor:
        return super().begin(scorer) if scorer.watch is None else torch.zeros(len(scorer.tokens), dtype=torch.int64)


class Lying(Peeking):
    """Better for the target each second time that it is asked."""

    asked: ClassVar[list[int]] = []

    def log_prob(self, targets: Tensor) -> Tensor:
        self.asked.append(1)
        return super().log_prob(targets) - 0.1 * (len(self.asked) % 2)


class Liar(t.Adapter):
    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> Any:
        return Lying(given.full())


class Late(Oracle):
    """Looks at the targets beyond the first 150 tokens of a span, further than an audit's short spans go."""

    def begin(self, scorer: t.Scorer) -> None:
        self.tokens, self.begins = super().begin(scorer), [first for first, _ in scorer.spans]

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        late = any(at - self.begins[span] > 150 for at, span in zip(chunk.starts, chunk.spans, strict=True))
        return super().wrap([self.tokens] * len(states), chunk, given) if late else given


class RarelyUnnormalized(t.Adapter):
    """Adds up to more than 1 behind one pair of tokens in five hundred."""

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        tokens = F.pad(chunk.tokens, (1, 0))[:, -chunk.scored - 1 :]
        rare = (tokens[:, 1:] % 16 == 7) & (tokens[:, :-1] % 16 == 3)
        return t.Distribution(given.full() + 1.0 * rare[..., None])


class Outside(t.Adapter):
    """Changes a weight that is not in TTT_SCOPE, by the way that is meant for what is."""

    def begin(self, scorer: t.Scorer) -> Tensor:
        return dict(scorer.model.named_parameters())["embed.weight"].detach() * 1.001

    def weights(self, states: list[Tensor], chunk: t.Chunk) -> dict[str, Tensor]:
        return {"embed.weight": states[0]}


class Survivor(Sharpen):
    """Counts evaluations, and predicts by their number."""

    def __init__(self) -> None:
        self.runs = 0

    def begin(self, scorer: t.Scorer) -> None:
        self.runs += 1

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        return t.Distribution((given.full() * (1 + self.runs / 100)).log_softmax(-1))


class ClassHoarder(Hoarder):
    """Keeps what it saw in its class."""

    kept: ClassVar[dict[str, Tensor]] = {}

    def begin(self, scorer: t.Scorer) -> None:
        self.kept["seen"] = torch.ones(VOCAB, dtype=torch.float64)

    def learn(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> list[None]:
        assert chunk.targets is not None
        self.kept["seen"] = self.kept["seen"] + torch.bincount(chunk.targets.flatten(), minlength=VOCAB)
        return states


class Random(t.Adapter):
    """Shakes the distribution with random numbers that nobody seeds."""

    def wrap(self, states: list[None], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
        return t.Distribution((given.full() + torch.rand(VOCAB) / 100).log_softmax(-1))


PEEKING = {"causality", "causality: far"}
PLANTED: dict[str, tuple[type[t.Scorer], Callable[[], list[t.Adapter]], set[str]]] = {
    "target peeking": (t.Scorer, lambda: [Oracle()], PEEKING),
    "target peeking when unwatched": (t.Scorer, lambda: [Sly()], {"score: unwatched"}),
    "target peeking far on": (t.Scorer, lambda: [Late()], {"causality: far"}),
    "target peeking when scored": (
        t.Scorer, lambda: [Partial()], {"normalization: Partial", "normalization: all", "score: sum"}),
    "target peeking each second time": (t.Scorer, lambda: [Liar()], {"score: sum", "score: unwatched"}),
    "future leak": (t.Scorer, lambda: [Future()], PEEKING),
    "update before scoring": (
        Eager, lambda: [Unigram()], {*PEEKING, "order"}),
    "second pass": (Twice, lambda: [Unigram()], {*PEEKING, "order"}),
    "unnormalized cache": (t.Scorer, lambda: [Unnormalized()], {"normalization: Unnormalized", "normalization: all"}),
    "rarely unnormalized": (
        t.Scorer, lambda: [RarelyUnnormalized()], {"normalization: RarelyUnnormalized", "normalization: all"}),
    "undeclared state": (t.Scorer, lambda: [Hoarder()], {"state: adapters"}),
    "undeclared state of a class": (t.Scorer, lambda: [ClassHoarder()], {"state: adapters"}),
    "surviving state": (t.Scorer, lambda: [Survivor()], {"state: survival"}),
    "written weights": (t.Scorer, lambda: [Writer()], {"state: weights"}),
    "outside its scope": (t.Scorer, lambda: [Outside()], {"state: scope"}),
    "chance": (t.Scorer, lambda: [Random()], {*PEEKING, "score: unwatched", "state: survival", "determinism"}),
}  # fmt: skip


def planted_audit(kind: type[t.Scorer], adapters: Callable[[], list[t.Adapter]]) -> t.Audit:
    h = config(EVAL_STREAMS=2)
    model, rt, table = scrambled(h), t.start_runtime(h), t.ByteTokenizer().byte_table()

    def make() -> t.Scorer:
        scorer = kind(h, rt, model, table)
        scorer.adapters = adapters()
        return scorer

    return audited(h, make)


@pytest.mark.parametrize("defect", PLANTED)
def test_audit_catches(defect: str) -> None:
    """By name what is wrong, and nothing else, where a defect does not spoil other checks as well."""
    kind, adapters, expected = PLANTED[defect]
    found = failed(planted_audit(kind, adapters))
    assert expected <= found, found
    if defect not in ("written weights", "undeclared state", "second pass", "update before scoring"):
        assert found == expected, "and nothing else is blamed"


def test_audit_refuses_state_that_it_cannot_compare() -> None:
    class Box:
        seen = torch.ones(VOCAB, dtype=torch.float64)

    class Boxed(Hoarder):
        def __init__(self) -> None:
            self.box, self.seen = Box(), Box.seen

    class BoxedState(Unigram):
        def begin(self, scorer: t.Scorer) -> Any:
            return {"a": Box()}

        def wrap(self, states: list[Any], chunk: t.Chunk, given: t.Distribution) -> t.Distribution:
            return given

    for adapter in (Boxed, BoxedState):
        with pytest.raises(t.UserError, match="keeps a Box"):
            planted_audit(t.Scorer, lambda kind=adapter: [kind()])


def test_audit_counts_the_bytes_of_the_text() -> None:
    tokenizer = t.ByteTokenizer()
    tokens = np.array([BOS, *"naïve".encode(), BOS, *"é".encode(), BOS, 65])
    scorer = scorer_of(config(), Stub(torch.zeros(VOCAB)))
    part, used = tokens[:-1], scorer.score(tokens[:-1]).bytes
    good = t.check_bytes(tokenizer, tokenizer.byte_table(), tokens, part, used)
    assert good.ok and good.found.startswith("8 counted, 8 decoded") and "8 of 8 in the audited score" in good.found
    assert not t.check_bytes(tokenizer, tokenizer.byte_table(), tokens, part, used + 1).ok, "another denominator"
    table = tokenizer.byte_table()
    table.base[195] = 2
    assert not t.check_bytes(tokenizer, table, tokens, part, used).ok
    assert not t.check_bytes(tokenizer, tokenizer.byte_table(), tokens[1:6], part, used).ok


def test_what_an_audit_could_not_measure_is_neither_right_nor_wrong() -> None:
    h = config()
    finding = t.check_fidelity(scorer_of(h, scrambled(h)), "nowhere.pgz")
    assert finding.ok is None and "not measured" in finding.found and t.AUDIT_MARKS[finding.ok] == "?   "


def test_commands_score_by_the_protocol_and_audit_it(
    run_job: Callable[..., Done], tiny_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose protocol was named in advance; the score of eval is the run's; the audit passes and is written."""
    protocol = "window=32,stride=16,streams=3,adapters=ttt_lora+ngram"
    env = {**tiny_env, "EVAL_PROTOCOL": protocol, "ITERATIONS": "5", "MAX_VAL_TOKENS": "1500"}
    protocol = t.load_config(env).protocol
    assert ",settings=" in protocol
    env["EVAL_PROTOCOL"] = protocol
    done = run_job(env)
    assert done.code == 0, done.err
    assert f"protocol:{protocol} (named in advance)" in done.out
    final = re.search(r"final_roundtrip_exact val_loss:(\S+) val_bpb:(\S+) in_memory:(\S+)", done.out)
    assert final and float(final[1]) == pytest.approx(float(final[3]), abs=1e-6)
    path = tmp_path / "runs" / "run" / "model.pgz"
    scored_again = run_job(env, ["eval", str(path)])
    assert f"val_bpb:{final[2]}" in scored_again.out and "(named in advance)" in scored_again.out
    late = run_job({**env, "MAX_EVAL_SECONDS": "0.001"}, ["eval", str(path)])
    assert late.code == 2 and "MAX_EVAL_SECONDS=0.001" in late.err and "final_eval" not in late.out
    decode, clock, passed = t.decode_artifact, time.monotonic, [0.0]

    def slowly(data: bytes) -> Any:
        passed[0] += 900.0
        return decode(data)

    monkeypatch.setattr(t, "decode_artifact", slowly)
    monkeypatch.setattr(t.time, "monotonic", lambda: clock() + passed[0])
    assert t.main(["eval", str(path)], {**env, "MAX_EVAL_SECONDS": "600"}) == 2, "reading is part of an evaluation"
    monkeypatch.undo()
    late = run_job({**env, "MAX_EVAL_SECONDS": "0.001", "RUN_ID": "late"})
    assert late.code == 2 and "model_bytes:" in late.out, "what was written is known all the same"
    audit = run_job(env, ["audit", str(path), "--positions", "12"])
    assert audit.code == 0, audit.out + audit.err
    report = json.loads(Path(f"{path}.audit.json").read_text())
    assert report["ok"] and report["protocol"] == protocol and len(report["positions"]) == 12
    checks = {check["check"]: check for check in report["checks"]}
    assert {"causality", "order", "determinism", "bytes", "fidelity", "normalization: all"} <= checks.keys()
    assert "argmax agrees at 100.0000%" in checks["fidelity"]["found"]
    said = Path(f"{path}.reference.npz")
    there = dict(np.load(said))
    for name, value in (("argmax", there["argmax"][::-1]), ("top", there["top"])):
        np.savez(said, **{**there, name: value + (name == "top")})
        h, rt, model, tokenizer, _ = t.open_artifact(str(path), {**env, "DEVICE": "cpu"})
        finding = t.check_fidelity(t.Scorer(h, rt, model, tokenizer.byte_table()), str(path))
        assert finding.ok == (name == "top") and ("most 1.00e+00" in finding.found) == (name == "top")
    said.write_bytes(b"zork")
    damaged = run_job(env, ["audit", str(path), "--positions", "1"])
    assert damaged.code == 2 and "reference.npz cannot be read" in damaged.err


# ---- temperature


def drawn(logits: Tensor, count: int, seed: int = 0) -> np.ndarray:
    """Tokens drawn from softmax(logits)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.double().softmax(-1), count, replacement=True, generator=generator).numpy()


def fitted(
    h: t.Hyperparameters, model: Any, holdout: np.ndarray, tokens: np.ndarray
) -> tuple[float, t.Score, Recorder]:
    """tau, score and what was predicted with the configuration's own adapters."""
    tau = t.fit_temperature(h, t.start_runtime(h), model, holdout, lambda: 0.0, 1.0)
    assert tau is not None
    scorer, recorder = scorer_of(h, model), Recorder()
    scorer.calibration = {"temperature": tau}
    assert isinstance(scorer.adapters[0], t.TemperatureAdapter)
    scorer.adapters.append(recorder)
    return tau, scorer.score(tokens), recorder


@pytest.mark.parametrize("sharpness", [0.7, 1.0, 1.6])
def test_temperature_undoes_wrong_confidence(sharpness: float) -> None:
    """A model whose logits are `sharpness` times the truth needs tau = sharpness."""
    truth = torch.linspace(-3, 2, VOCAB, dtype=torch.float64)
    h = config(TEMP_SCALING=1)
    holdout, tokens = drawn(truth, 8_000), drawn(truth, 500, seed=1)
    tau, score, recorder = fitted(h, Stub(truth * sharpness), holdout, tokens)
    assert tau == pytest.approx(sharpness, rel=0.05)
    rows = torch.stack(list(recorder.predicted.values()))
    want = (truth * sharpness / tau).log_softmax(-1).expand_as(rows)
    torch.testing.assert_close(rows, want, **EXACT)
    torch.testing.assert_close(rows.logsumexp(-1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    plain = scorer_of(config(), Stub(truth * sharpness)).score(tokens)
    assert score.nats < plain.nats or sharpness == 1.0


@pytest.mark.parametrize("variables", [{}, HISTORY], ids=["window", "history"])
def test_temperature_is_the_best_on_the_held_out_tokens(variables: dict[str, object]) -> None:
    """Against a grid; each window is predicted with the tokens before it, as when it is scored."""
    h = config(TEMP_SCALING=1, ATTN_WINDOW=2, NUM_LAYERS=1, LOGIT_SOFTCAP=5, **variables)
    model = scrambled(h)
    text = list(t.generate(model, t.start_runtime(h), [BOS], 42 * WINDOW + 1, 1.25, 1.0, 0))
    holdout = np.array(text, np.int64)
    tau, _, _ = fitted(h, model, holdout, stream(30))
    recorder = Recorder()
    scorer_of(config(ATTN_WINDOW=2, NUM_LAYERS=1, LOGIT_SOFTCAP=5, **variables), model, [recorder]).score(holdout)
    rows = torch.stack([recorder.predicted[index] for index in range(1, len(holdout))])

    def loss(value: float) -> float:
        return F.cross_entropy(rows / value, torch.from_numpy(holdout[1:])).item()

    grid = [loss(0.5 * 4 ** (i / 60)) for i in range(61)]
    assert loss(tau) <= min(grid) + 1e-6
    assert 1.1 < tau < 1.5, "written at a temperature of 1.25"


def test_temperature_sees_no_validation_token() -> None:
    h, truth = config(TEMP_SCALING=1), torch.linspace(-3, 2, VOCAB)
    model, holdout = Stub(truth), drawn(truth, 800)
    taus = {fitted(h, model, holdout, tokens)[0] for tokens in (stream(90), stream(90, seed=9), np.full(90, 7))}
    assert len(taus) == 1
    assert fitted(h, model, drawn(truth, 800, seed=4), stream(90))[0] not in taus


def test_temperature_fit_stops_when_its_time_is_over() -> None:
    h, truth = config(TEMP_SCALING=1), torch.linspace(-3, 2, VOCAB)
    assert t.fit_temperature(h, t.start_runtime(h), Stub(truth), drawn(truth, 800), lambda: 2.0, 1.0) is None


# ---- bits per byte


def test_bits_per_byte_by_hand() -> None:
    """Five scored tokens of a uniform model over 8 tokens: 15 bits; 4 + 1 + 3 + 0 + 2 bytes with the spaces' rule."""
    base = np.array([0, 1, 2, 3, 4, 0, 0, 0])
    space, boundary = np.zeros(8, bool), np.zeros(8, bool)
    space[[1, 2]] = True  # a leading space is one more byte, unless a boundary comes before
    boundary[0] = True
    h = config(VOCAB_SIZE=256)
    scorer = t.Scorer(h, t.start_runtime(h), Stub(torch.zeros(8)), t.ByteTable(base, space, boundary))
    score = scorer.score(np.array([0, 4, 2, 0, 1, 2]))
    assert score.tokens == 5 and score.bytes == 4 + 3 + 0 + 1 + 3
    assert score.nats == pytest.approx(5 * math.log(8)) and score.loss == pytest.approx(math.log(8))
    assert score.bpb == pytest.approx(15 / 11)
    assert math.isnan(t.Score(1.0, 1, 0).bpb)


def test_bytes_of_validation_are_those_of_its_text(byte_data: Path) -> None:
    h = config(DATA_PATH=byte_data)
    tokens = t.read_validation(h)
    score = scorer_of(h, Stub(torch.zeros(VOCAB))).score(tokens)
    text = t.ByteTokenizer().text_of(tokens[1:].tolist())
    assert score.bytes == pytest.approx(len(text.encode()), abs=6)  # a character may be cut at the end
    assert score.bpb == pytest.approx(8 * score.tokens / score.bytes)


def test_validation_is_the_validation_split(byte_data: Path) -> None:
    (shard,) = byte_data.glob("fineweb_val_*.bin")
    assert t.read_validation(config(DATA_PATH=byte_data)).tolist() == np.fromfile(shard, "<u2")[512:].tolist()


@pytest.mark.parametrize("limit", [1, 10, 1000, 10**9])
def test_limit_of_scored_tokens(byte_data: Path, limit: int) -> None:
    whole = t.read_validation(config(DATA_PATH=byte_data))
    h = config(DATA_PATH=byte_data, MAX_VAL_TOKENS=limit)
    tokens = t.read_validation(h)
    assert np.array_equal(tokens, whole[: limit + 1])
    assert scorer_of(h, Stub(torch.zeros(VOCAB))).score(tokens).tokens == min(limit, len(whole) - 1)
