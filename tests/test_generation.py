"""Writing token by token from caches and recurrent states, and caches of small numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import scramble
from torch import Tensor

import train_gpt as t

BOS = t.BYTE_BOS
SMALL: dict[str, object] = {
    "NUM_LAYERS": 4, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "PARTIAL_ROPE_DIMS": 0, "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 64, "MICRO_BATCH_TOKENS": 64, "SKC_BLOCK_SIZE": 4, "CAPSULE_DIM": 8, "CAPSULE_NUM": 3,
    "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "GROUP_SIZE": 8, "RECURRENCE_LAYERS": "",
    "TIE_EMBEDDINGS": 0, "BACKOUT": 0,
}  # fmt: skip


def built(preset: str, **variables: object) -> t.GPT:
    """A preset at a small size whose every parameter is random and matters."""
    whole = t.load_config({"PRESET": preset})
    more: dict[str, object] = {"EMBED_DIM": 12 if whole.embed_dim else 0}
    more |= {"CURRICULUM_STAGES": "0:1"} if whole.curriculum_stages else {}
    more |= {"BATCH_STAGES": "0:64"} if whole.batch_stages else {}
    more |= {"RECURRENCE_LAYERS": "1-2"} if whole.looped else {}
    more |= {"HC_START": 2} if whole.hc_start else {}
    more |= {"SLIDING_EVAL_STRIDE": 4} if whole.sliding_eval else {}
    more |= {"INDUCTION_WINDOW": 8} if whole.matched_orders else {}
    more |= {"RMT_SEGMENT": 8, "RMT_TOKENS": 2} if whole.rmt_segment else {}
    sparse = {"NSA_BLOCK": 4, "NSA_STRIDE": 2, "NSA_SELECT_BLOCK": 4, "NSA_SELECT": 4, "NSA_WINDOW": 4}
    more |= sparse if "nsa" in whole.mixers else {}
    if whole.ngram_orders:
        more |= {"BIGRAM_HASH_BUCKETS": 37, "BIGRAM_HASH_DIM": 6 * len(whole.ngram_orders)}
    given = {**SMALL, **more, **variables, "PRESET": preset}
    h = t.load_config({name: str(value) for name, value in given.items()})
    return scramble(t.build_model(h, t.start_runtime(h), BOS))


@pytest.mark.parametrize("preset", [*t.PRESETS, "nsa with memory"])
@torch.no_grad()
def test_greedy_text_is_the_argmax_of_the_parallel_forward(preset: str) -> None:
    """At every position, in float64, from a prompt with a document start in it, past several blocks and segments."""
    memory = {"RMT_SEGMENT": 8, "RMT_TOKENS": 2} if " with" in preset else {}
    model, texts = built(preset.split()[0], **memory), set()
    for prompt in ([BOS, 17, 200, 3, BOS, 9, 77], [BOS, 5], [BOS, *range(20, 40)]):
        written = list(t.generate(model, t.start_runtime(model.h), prompt, 30, 0.0, 1.0, 0))
        logits, _ = model.logits(torch.tensor([prompt + written]), t.scoring_variant(model.h))
        assert written == logits[0].argmax(-1)[len(prompt) - 1 : -1].tolist()
        texts |= {*written}
    assert len(texts) > 1, "the test needs a network that writes more than one token"


RECURRENT = ["skc_small", "rmt"]  # no attention; attention within a segment only


@pytest.mark.parametrize("preset", RECURRENT)
@torch.no_grad()
def test_memory_of_writing_is_constant(preset: str) -> None:
    """Recurrent mixers and closed segments keep a state of one size, however long the text."""
    model = built(preset)
    state, sizes = model.init_state(1), []
    for _ in range(6):
        for seed in range(16):
            _, state = model.logits(torch.tensor([[seed]]), t.scoring_variant(model.h), state)
        sizes.append(sum(part.numel() for part in t.flatten_state(state)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("preset", t.PRESETS)
@torch.no_grad()
def test_an_artifact_alone_says_which_network_it_holds(preset: str, byte_data: Path, tmp_path: Path) -> None:
    """Read with nothing but the data's path set, it gives the same logits, greedy text and state; a contradiction is
    refused."""
    model = built(preset, PRECISION="fp32", DATA_PATH=byte_data)
    weights = t.Weights(model)
    for bank in weights.banks.values():
        bank.latent.copy_(torch.stack([parameter.float() for parameter in bank.parameters]))
    weights.materialize(1.0)
    prints = {"tokenizer": t.load_tokenizer(model.h).fingerprint}
    path = tmp_path / "model.pgz"
    path.write_bytes(t.write_artifact(model.h, t.coded_tensors(weights), prints).data)
    environ = {"DATA_PATH": str(byte_data), "PRECISION": "fp32", "DEVICE": "cpu"}
    _, rt, read, tokenizer, _ = t.open_artifact(str(path), environ)
    tokens = torch.randint(0, BOS, (2, 40), generator=torch.Generator().manual_seed(3))
    tokens[:, [0, 13]] = BOS
    want, got = (m.logits(tokens, t.scoring_variant(m.h))[0] for m in (model, read))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert [part.shape for part in t.flatten_state(read.init_state(1))] == [
        part.shape for part in t.flatten_state(model.init_state(1))
    ]
    for name, value in {"RMT_SEGMENT": "4", "NSA_SELECT": "5", "NSA_WINDOW": "7"}.items():
        if (name.startswith("RMT") and model.h.rmt_segment) or (name.startswith("NSA") and "nsa" in model.h.mixers):
            with pytest.raises(t.UserError, match=name):
                t.open_artifact(str(path), {**environ, name: value})


# ---- caches of small numbers


def cacher(kind: str, turned: int, dim: int = 16) -> t.Cacher:
    values = {"PRESET": "tiny", "NUM_HEADS": "2", "NUM_KV_HEADS": "2", "MODEL_DIM": str(2 * dim), "KV_CACHE": kind}
    return t.Cacher(t.load_config({**values, "TURBO_QUANT_KV": str(turned)}))


def keys(outliers: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(3, 7, 2, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[..., 5] *= 30 if outliers else 1
    return x * torch.tensor([1e-3, 1.0, 1e3], dtype=dtype)[:, None, None, None]


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cached_number_is_off_by_half_a_step_at_most(kind: str, steps: int, turned: int, dtype: torch.dtype) -> None:
    """Half a step for each channel; in the turned basis for the length of the whole vector."""
    cache, x = cacher(kind, turned), keys(False, dtype)
    stored = cache.store(x)
    error = (cache.read(stored, torch.float32).double() - x.double()).abs()
    basis = x.double() @ t.hadamard(16).double() if turned else x.double()
    step = basis.abs().amax(-1, keepdim=True) / steps
    slack = 1 + 1e-5
    if turned:
        assert (error.square().sum(-1, keepdim=True).sqrt() <= 0.5 * step * 4 * slack + 1e-6).all()  # sqrt(16) channels
    else:
        assert (error <= 0.5 * step * slack).all()
    assert stored.codes.dtype == torch.int8
    assert stored.codes.numel() == x.numel() // (2 if kind == "int4" else 1) and stored.scale.dtype == torch.float32


def test_turning_spreads_a_large_channel_over_all() -> None:
    for kind in ("int8", "int4"):
        x = keys(True)
        plain, turned = (
            (c.read(c.store(x), torch.float64) - x).square().mean((1, 2, 3)) for c in (cacher(kind, 0), cacher(kind, 1))
        )
        assert (turned < 0.5 * plain).all()


def test_numbers_of_four_bits_survive_packing() -> None:
    cache = cacher("int4", 0)
    x = torch.arange(-7.0, 8.0).repeat(2)[:16].view(1, 1, 1, 16).expand(1, 1, 2, 16)
    torch.testing.assert_close(cache.read(cache.store(x), torch.float32), x, rtol=1e-3, atol=0)
    zeros = torch.zeros(1, 2, 2, 16)
    assert torch.equal(cache.read(cache.store(zeros), torch.float32), zeros)


@pytest.mark.parametrize("pattern", ["A", "N"])
@torch.no_grad()
def test_exact_caches_hold_what_was_computed(pattern: str) -> None:
    """Under bf16 two bytes a number, though states begin in the type of the weights; and what they give is the same."""
    model = built("nsa", LAYER_PATTERN=pattern, PRECISION="bf16").float()
    rt, tokens = t.start_runtime(model.h), torch.randint(0, BOS, (2, 24), generator=torch.Generator().manual_seed(3))
    state, parts = model.init_state(2), []
    with rt.precision():
        want = model.logits(tokens, t.scoring_variant(model.h))[0]
        for place in range(24):
            logits, state = model.logits(tokens[:, place : place + 1], t.scoring_variant(model.h), state)
            parts.append(logits)
    assert {part.dtype for part in t.flatten_state(state[1]) if part.is_floating_point()} == {torch.bfloat16}
    assert (torch.cat(parts, 1) - want).abs().mean() < 0.02 * want.std()


@pytest.mark.parametrize("pattern", ["A", "N", "N with memory"])
@pytest.mark.parametrize(("kind", "share", "most"), [("int8", 0.5, 0.02), ("int4", 0.25, 0.35)])
@torch.no_grad()
def test_decoding_from_small_caches_is_near_the_exact_one(pattern: str, kind: str, share: float, most: float) -> None:
    """Relative to the spread of logits; and what is kept of each token takes that share of bfloat16's bytes."""
    variables: dict[str, object] = {"LAYER_PATTERN": pattern[0], "NSA_WINDOW": 2}
    variables |= {"RMT_SEGMENT": 64, "RMT_TOKENS": 2, "TRAIN_SEQ_LEN": 128} if " with" in pattern else {}
    variables |= {"TRAIN_BATCH_TOKENS": 128, "MICRO_BATCH_TOKENS": 128} if " with" in pattern else {}
    exact = built("nsa", **variables)
    tokens = torch.randint(0, BOS, (2, 40), generator=torch.Generator().manual_seed(3))
    found = {}
    for name, model in (("exact", exact), (kind, built("nsa", **variables, KV_CACHE=kind, TURBO_QUANT_KV=1))):
        state, parts = model.init_state(2), []
        for place in range(40):
            logits, state = model.logits(tokens[:, place : place + 1], t.scoring_variant(model.h), state)
            parts.append(logits)
        found[name] = torch.cat(parts, 1)
        layer = state[1]
        caches = (layer.k, layer.v) if pattern == "A" else (layer.keys, layer.values)
        size = sum(part.numel() * part.element_size() for cache in caches for part in cache)
        kept = 40 + (4 if " with" in pattern else 0)  # a block of memory before them
        bf16 = 2 * 2 * 2 * kept * model.h.num_kv_heads * model.h.head_dim
    assert size <= bf16 * (share + 4 / (2 * model.h.head_dim))
    error = (found[kind] - found["exact"]).square().mean().sqrt() / found["exact"].std()
    assert 0 < error < most


def test_small_caches_score_carried_windows(byte_data: Path) -> None:
    """CARRY_EVAL reads them: the score is near that of exact caches, and not the same."""
    scores = {}
    for kind in ("exact", "int8"):
        values = {
            "PRESET": "tiny", "VOCAB_SIZE": "256", "DATA_PATH": str(byte_data), "CARRY_EVAL": "1", "ATTN_WINDOW": "24",
            "MAX_VAL_TOKENS": "800", "KV_CACHE": kind, "DEVICE": "cpu", "COMPILE": "0",
        }  # fmt: skip
        h = t.load_config(values)
        rt, tokenizer = t.start_runtime(h), t.load_tokenizer(h)
        model = scramble(t.build_model(h, rt, tokenizer.bos))
        scores[kind] = t.Scorer(h, rt, model, tokenizer.byte_table()).score(t.read_validation(h)).loss
    assert scores["int8"] == pytest.approx(scores["exact"], rel=0.02) and scores["int8"] != scores["exact"]


@pytest.mark.parametrize(
    "wrong",
    [{"CARRY_TRAIN": "1", "BATCH_MODE": "streams", "ATTN_WINDOW": "8"}, {"MODEL_DIM": "24", "TURBO_QUANT_KV": "1"}],
    ids=str,
)
def test_caches_that_cannot_be_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(t.UserError, match="KV"):
        t.load_config({"PRESET": "tiny", "KV_CACHE": "int8", **wrong})
