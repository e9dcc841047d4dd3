"""The network as a whole: roles, initial values, heads, generation, compilation, counted FLOPs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble, small_stages
from torch import Tensor

import train_gpt as t

BOS = t.BYTE_BOS
TIED, UNTIED = t.Variant(untied=False), t.Variant(untied=True)

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "factored": {"EMBED_DIM": 12},
    "untied": {"TIE_EMBEDDINGS": 0},
    "untied_factored": {"TIE_EMBEDDINGS": 0, "EMBED_DIM": 12, "MLP_ACT": "swiglu"},
    "untied_later": {"UNTIE_AT_FRACTION": 0.5, "EMBED_DIM": 12},
    "window": {"ATTN_WINDOW": 5, "DOC_MASK": 1, "VALUE_RESIDUAL": 1, "NUM_LAYERS": 3},
    "no_cap": {"LOGIT_SOFTCAP": 0, "QK_NORM": 0, "RESID_MIX": 0, "RESIDUAL": "plain", "MLP_ACT": "leaky_relu2"},
    # n-grams reach further back than induction does
    "history": {
        "BIGRAM_HASH_BUCKETS": 50, "BIGRAM_HASH_ORDERS": "2,5", "BIGRAM_HASH_DIM": 8, "INDUCTION_ORDERS": "1,2",
        "INDUCTION_WINDOW": 2, "TIE_EMBEDDINGS": 0,
    },
}  # fmt: skip


def config(**variables: object) -> t.Hyperparameters:
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    return t.load_config({name: str(value) for name, value in {**base, **variables}.items()})


def build(h: t.Hyperparameters) -> t.GPT:
    return t.build_model(h, t.start_runtime(h), BOS)


def scrambled(h: t.Hyperparameters) -> t.GPT:
    """A network whose every parameter is random and matters."""
    return scramble(build(h))


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < 0.1, BOS)


# ---- plan and roles


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("preset", t.PRESETS)
def test_site_ids_count_up_from_zero(preset: str, layers: int) -> None:
    environ = {"PRESET": preset, "NUM_LAYERS": str(layers), "ENGRAM_INJECT_LAYER": "0", "BACKOUT": "0"}
    environ |= {name: text for name, text in small_stages(preset).items() if name in ("RECURRENCE_LAYERS", "HC_START")}
    h = t.load_config(environ)
    sites = t.plan_sites(h, t.final_variant(h))
    assert [site.id for site in sites] == list(range(len(sites)))
    assert {site.layer for site in sites} == set(range(layers))
    assert {site.kind for site in sites} == set(h.site_kinds)


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_states_are_one_tuple_indexed_by_site(option: str) -> None:
    model = build(config(**OPTIONS[option]))
    _, state = model.logits(some_tokens(2, 4), TIED, model.init_state(2))
    assert state is not None and len(state) == len(model.init_state(2)) == 1 + len(model.sites)
    for site in model.sites:
        assert (state[1 + site.id] is None) == (site.kind == "mlp")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_has_exactly_one_role(option: str) -> None:
    h = config(**OPTIONS[option])
    model = build(h)
    table, parameters = t.role_table(model), dict(model.named_parameters())
    assert set(table) == set(parameters)
    weights = t.Weights(model)
    names = [name for bank in weights.banks.values() for name in bank.names]
    assert sorted(names) == sorted(parameters), "every parameter is in exactly one bank"
    for bank in weights.banks.values():
        for i, name in enumerate(bank.names):
            assert bank.parameters[i] is parameters[name] and bank.role == table[name]
            assert weights.where[name] == (bank, i)
    for name, role in table.items():
        assert role.codec in t.CODECS and role.group in t.GROUPS
        wide = parameters[name].ndim == 2 and not name.startswith(("residual", "embed.induction"))
        assert wide == (role.group != "scalar"), f"{name} is {role}"
        assert role.group != "scalar" or role.decay == 0, "gains must not decay"
    groups = {name: role.group for name, role in table.items() if name.count(".") == 1 and "residual" not in name}
    assert groups == {"embed.weight": "embed", **({"head.weight": "head"} if h.has_head else {})}


def test_codecs_follow_the_configuration() -> None:
    model = build(config(MATRIX_CODEC="int6", FP_STORAGE="fp8", SCALAR_CODEC="exact", TIE_EMBEDDINGS=0))
    want = {"matrix": "int6", "embed": "fp8", "head": "fp8", "scalar": "exact"}
    assert {role.group: role.codec for role in t.role_table(model).values()} == want


# ---- initial values


@pytest.mark.parametrize("option", OPTIONS)
def test_shared_parameters_start_alike_in_two_configurations(option: str) -> None:
    """One seed gives one parameter the same first value whatever else the network has, in any precision."""
    plain = dict(build(config()).named_parameters())
    other = dict(build(config(**OPTIONS[option])).named_parameters())
    shared = [name for name in plain if name in other and plain[name].shape == other[name].shape]
    assert len(shared) >= 5
    assert all(torch.equal(plain[name], other[name]) for name in shared)
    narrow = dict(build(config(**OPTIONS[option], PRECISION="fp32")).named_parameters())
    assert all(narrow[name].dtype == torch.float32 for name in narrow)
    assert all(torch.equal(narrow[name].double(), other[name]) for name in narrow)


@pytest.mark.parametrize("option", OPTIONS)
def test_bf16_products_give_nearly_the_same_loss_and_gradients(option: str) -> None:
    """bf16 has 8 bits: an error of 0.4% a product, which sums over a few layers."""
    exact, h = scrambled(config(**OPTIONS[option])), config(**OPTIONS[option], PRECISION="bf16")
    model, rt, tokens = build(h), t.start_runtime(h), some_tokens(4, 32)
    model.load_state_dict(exact.state_dict())
    with rt.precision():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], TIED).total
    truth = exact.loss(tokens[:, :-1], tokens[:, 1:], TIED).total
    assert loss.dtype == torch.float32 and abs(loss.item() / truth.item() - 1) < 0.02
    loss.backward()
    truth.backward()
    for (name, rough), fine in zip(model.named_parameters(), exact.parameters(), strict=True):
        if fine.grad is not None:
            assert rough.grad is not None and rough.grad.dtype == torch.float32
            error = (rough.grad - fine.grad).norm() / (fine.grad.norm() + 1e-9)
            assert error < 0.1, f"{name}: {error:.3f}"


def test_seed_and_name_choose_the_values() -> None:
    one, other = dict(build(config()).named_parameters()), dict(build(config(SEED=1)).named_parameters())
    assert torch.equal(one["embed.weight"], dict(build(config()).named_parameters())["embed.weight"])
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])


def test_building_leaves_global_random_state_and_dtype_alone() -> None:
    state = torch.get_rng_state()
    build(config())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("option", OPTIONS)
def test_initial_values_have_their_sizes(option: str) -> None:
    h = config(**OPTIONS[option], MODEL_DIM=128, NUM_HEADS=4, QK_GAIN_INIT=1.25, TIED_EMBED_INIT_STD=0.02)
    for name, parameter in build(h).named_parameters():
        value = parameter.detach()
        if name == "embed.weight":
            assert float(value.std()) == pytest.approx(0.02, rel=0.05)
        elif name.startswith("blocks") and (".proj." in name or ".down." in name):
            assert value.count_nonzero() == 0, f"{name} must start at zero"
        elif name == "head.weight" and not h.tie_embeddings:
            assert value.count_nonzero() == 0, "logits start at zero"
        elif name in ("embed.ngrams.weight", "embed.induction.found"):
            assert value.count_nonzero() == 0, "n-grams add nothing at first"
        elif name == "embed.induction.gain":
            assert (value - 0.1).abs().max() < 1e-6
        elif name.endswith("q_gain"):
            assert (value == 1.25).all()
        elif name == "residual.mix":
            assert (value[:, 0] == 1).all() and (value[:, 1] == 0).all()
        elif name in ("residual.scale", "residual.skip"):
            assert (value == 1).all()
        elif value.ndim == 2 and name != "head.weight":
            assert float(value.std()) == pytest.approx(value.shape[1] ** -0.5, rel=0.1), name
            assert float(value.mean()) == pytest.approx(0, abs=3 * float(value.std()) * value.numel() ** -0.5)


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_fresh_network_predicts_almost_uniformly(option: str) -> None:
    h = config(**OPTIONS[option])
    out = build(h).loss(some_tokens(4, 32), some_tokens(4, 32, seed=1), TIED)
    assert out.total.item() / 128 == pytest.approx(math.log(256), abs=0.05)


# ---- loss, logits and heads


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("variant", [TIED, UNTIED], ids=["tied", "untied"])
@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_logits(option: str, variant: t.Variant) -> None:
    model = scrambled(config(**OPTIONS[option]))
    tokens, targets = some_tokens(3, 9), some_tokens(3, 9, seed=1)
    targets[1, 3:6] = -100
    logits, none = model.logits(tokens, variant)
    assert none is None and logits.shape == (3, 9, 256)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model.loss(tokens, targets, variant).total, want, rtol=1e-11, atol=0)
    for last in (1, 4, 9):
        torch.testing.assert_close(
            model.logits(tokens, variant, last=last)[0], logits[:, -last:], rtol=1e-12, atol=1e-12
        )
    if model.h.logit_softcap:
        assert logits.abs().max() <= model.h.logit_softcap


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_head_is_the_matrix_that_the_variant_names(option: str) -> None:
    h = config(**OPTIONS[option])
    model = scrambled(h)
    used = {variant: model.head_weight(variant) for variant in (TIED, UNTIED)}
    assert used[TIED] is (model.embed.weight if h.tie_embeddings else model.head.weight)
    assert used[UNTIED] is (model.head.weight if h.has_head else model.embed.weight)
    tokens = some_tokens(1, 6)
    ctx = model.context(tokens, None, t.Variant())
    x, _, _ = model.hidden(ctx, None)
    if h.embed_dim:
        assert model.head.down is not None
        x = x @ model.head.down.weight.T
    z = x @ used[TIED].T
    want = h.logit_softcap * torch.tanh(z / h.logit_softcap) if h.logit_softcap else z
    torch.testing.assert_close(model.logits(tokens, TIED)[0], want, rtol=1e-11, atol=1e-11)


# ---- untying the head during a run


def untying_session(byte_data: Path, tmp_path: Path, **variables: object) -> t.Session:
    h = config(DATA_PATH=byte_data, UNTIE_AT_FRACTION=0.5, **variables)
    return t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))


def train_steps(s: t.Session, state: t.TrainState, steps: int, average: bool = False) -> None:
    step = t.make_step(s)
    for _ in range(steps):
        step(s.loader.next(8, 32), state, 0.0)
        s.optimizer.step(1.0, 0.9, average, 0.0)
        s.weights.clear_gradients()


CODEC_CASES = pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "exact"])


@CODEC_CASES
@pytest.mark.parametrize("embed_dim", [0, 12])
def test_untying_starts_from_the_very_same_logits(
    byte_data: Path, tmp_path: Path, storage: str, embed_dim: int
) -> None:
    s = untying_session(byte_data, tmp_path, FP_STORAGE=storage, EMBED_DIM=embed_dim)
    state, tokens = t.TrainState(), some_tokens(2, 9)
    train_steps(s, state, 3)
    head, embed = s.model.head.weight, s.model.embed.weight
    bank, index = s.weights.where["head.weight"]
    assert head is not None and bank.state.get("count", torch.zeros(1)).sum() == 0, "a head not in use must rest"
    before = s.model.logits(tokens, state.variant)[0].clone()

    t.switch_variant(s, state, 0.49)
    assert state.variant == TIED
    t.switch_variant(s, state, 0.5)
    assert state.variant == UNTIED
    assert torch.equal(s.model.logits(tokens, state.variant)[0], before), "logits must not change at the switch"

    kept = head.detach().clone()
    train_steps(s, state, 2)
    assert bank.state["count"][index].item() == 2, "the head enters the optimizer afresh"
    assert not torch.equal(head, kept) and not torch.equal(head, embed)
    assert not torch.equal(s.model.logits(tokens, state.variant)[0], before)
    kept = head.detach().clone()
    t.switch_variant(s, state, 0.6)
    assert torch.equal(head, kept), "the switch happens once"

    artifact = t.write_artifact(s.h, t.coded_tensors(s.weights), {}).data
    _, arrays = t.decode_artifact(artifact)
    assert torch.equal(torch.from_numpy(arrays["head.weight"]).double(), head)
    again = build(s.h)
    t.load_weights(again, arrays)
    final = s.model.logits(tokens, state.variant)[0]
    assert torch.equal(again.logits(tokens, t.final_variant(s.h))[0], final)


def test_untying_does_not_disturb_a_running_average(byte_data: Path, tmp_path: Path) -> None:
    """The averaged model is the same before and after the switch: its head is the averaged embedding."""
    s = untying_session(byte_data, tmp_path, EMA_DECAY=0.9)
    state, tokens = t.TrainState(), some_tokens(2, 9)
    train_steps(s, state, 4, average=True)

    def averaged_logits() -> Tensor:
        s.weights.swap_average()
        s.weights.materialize(1.0)
        logits = s.model.logits(tokens, state.variant)[0].clone()
        s.weights.swap_average()
        s.weights.materialize(1.0)
        return logits

    before = averaged_logits()
    t.switch_variant(s, state, 0.5)
    torch.testing.assert_close(averaged_logits(), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_a_run_that_ends_before_its_switch_exports_what_it_scored(
    byte_data: Path, tmp_path: Path, fraction: float
) -> None:
    """Four steps see progress 0, 1/4, 1/2, 3/4; the artifact is read as an untied one all the same."""
    variables = {"ITERATIONS": 4, "UNTIE_AT_FRACTION": fraction, "SAMPLE_TOKENS": 0, "MAX_VAL_TOKENS": 500}
    h = config(DATA_PATH=byte_data, OUT_DIR=tmp_path, RUN_ID="run", EMA_DECAY=0.5, **variables)
    assert t.train(h, t.start_runtime(h)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    final = next(row for row in rows if row["kind"] == "final")
    assert final["val_loss_nats"] == pytest.approx(final["in_memory_val_loss_nats"], abs=1e-9)


# ---- generation


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_generation_is_the_argmax_of_one_parallel_pass(option: str) -> None:
    h = config(**OPTIONS[option])
    model, prompt = scrambled(h), some_tokens(1, 5)[0].tolist()
    written = list(t.generate(model, t.start_runtime(h), prompt, 14, 0.0, 1.0, 0))
    sequence = torch.tensor([prompt + written])
    with torch.no_grad():
        logits, _ = model.logits(sequence, t.final_variant(h))
    assert written == logits[0].argmax(-1)[4:-1].tolist()
    assert len(set(written)) > 1, "the test needs a network that writes more than one token"


def test_generation_repeats_itself_for_one_seed() -> None:
    h = config()
    model, rt = scrambled(h), t.start_runtime(h)
    runs = [list(t.generate(model, rt, [BOS, 65], 12, 1.0, 0.95, seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 12 and all(0 <= token < 256 for token in runs[0])


def draws(logits: Tensor, temperature: float, top_p: float, count: int = 4000, seed: int = 0) -> Tensor:
    """How often each token is drawn, as shares."""
    generator = torch.Generator().manual_seed(seed)
    found = t.sample_token(logits.expand(count, -1), temperature, top_p, generator)
    assert found.shape == (count, 1) and found.dtype == torch.int64
    return torch.bincount(found.flatten(), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 1.0])
def test_nucleus_is_the_smallest_set_of_enough_mass(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -3.0])
    shares = (logits.double() / temperature).softmax(0)
    order = shares.argsort(descending=True).tolist()
    size = next((n for n in range(1, 8) if shares[order[:n]].sum() >= top_p - 1e-12), 7)
    kept = order[:size]
    want = torch.zeros(7, dtype=torch.float64)
    want[kept] = shares[kept] / shares[kept].sum()
    found = draws(logits, temperature, top_p)
    assert set(found.nonzero().flatten().tolist()) <= set(kept)
    assert (found - want).abs().max() < 0.04


def test_nucleus_at_ties_and_at_its_ends() -> None:
    assert draws(torch.zeros(2), 1.0, 0.5).max() == 1, "one of two equal tokens has half of the mass already"
    assert draws(torch.zeros(4), 1.0, 0.75).count_nonzero() == 3
    assert draws(torch.tensor([0.0, 0.1]), 1.0, 0.0).tolist() == [0, 1], "the likeliest token always stays"
    assert draws(torch.tensor([0.0, -1e4, 200.0]), 1.0, 1.0).tolist() == [0, 0, 1]


def test_temperature_zero_is_greedy_and_rows_are_independent() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    found = t.sample_token(logits, 0.0, 0.1, torch.Generator())
    assert found.flatten().tolist() == logits.argmax(-1).tolist()
    pick = t.sample_token(logits * 1000, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(pick, found)


# ---- compilation

SMALL = {
    "NUM_LAYERS": 2,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "TRAIN_SEQ_LEN": 16,
    "SKC_BLOCK_SIZE": 4,
    "NSA_BLOCK": 4,
    "NSA_STRIDE": 2,
    "NSA_SELECT_BLOCK": 4,
    "TRAIN_BATCH_TOKENS": 32,
    "BACKOUT": 0,
}
COMPILED: dict[str, dict[str, object]] = {
    **{
        preset: {
            "PRESET": preset,
            "EMBED_DIM": 8 if "embed_dim" in t.PRESETS[preset] else 0,
            "PARTIAL_ROPE_DIMS": 0,
            **small_stages(preset),
        }
        for preset in t.PRESETS  # fmt: skip
    },
    "documents": {"DOC_MASK": 1, "VALUE_RESIDUAL": 1, "MLP_ACT": "swiglu", "RESIDUAL": "plain", "QK_NORM": 0},
    "carried": {"ATTN_WINDOW": 4, "PARTIAL_ROPE_DIMS": 8, "YARN_FACTOR": 2, "MLP_ACT": "leaky_relu2"},
    "untied_later": {"UNTIE_AT_FRACTION": 0.5, "LOGIT_SOFTCAP": 0, "GRAD_CHECKPOINT": 2},
}


@pytest.mark.parametrize("case", COMPILED)
def test_a_step_compiles_to_one_graph_and_only_once(case: str) -> None:
    """No graph break (fullgraph), no recompilation over progress, data and steps; gradients as without compiling."""
    h = config(**{**SMALL, **COMPILED[case], "PRECISION": "fp64"})
    model, carried = scrambled(h), case == "carried"
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True, dynamic=False)
    variants = dict.fromkeys((TIED, t.final_variant(h)))

    def step(seed: int, variant: t.Variant, state: tuple | None, loss_of: Callable) -> tuple[t.LossOut, list[Tensor]]:
        tokens, targets = some_tokens(2, 16, seed=seed), some_tokens(2, 16, seed=seed + 50)
        moment = t.Moment(torch.tensor(seed / 7), torch.tensor(seed), torch.arange(2))
        out = loss_of(tokens, targets, variant, state, moment)
        out.total.backward()
        grads = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return out._replace(state=t.map_state(out.state, Tensor.detach)), grads

    for variant in variants:
        state = model.init_state(2) if carried else model.start_state(model.no_history(some_tokens(2, 1)))
        for seed in range(2):  # the cache grows from nothing to its window once
            out, _ = step(seed, variant, state, compiled)
            state = out.state if carried else state
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in range(2, 6):
                got, grads = step(seed, variant, state, compiled)
                want, plain_grads = step(seed, variant, state, model.loss)
                torch.testing.assert_close(got.total, want.total, rtol=1e-12, atol=0)
                for one, other in zip(grads, plain_grads, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
                state = got.state if carried else state


SWITCHES: dict[str, dict[str, object]] = {
    "carried": {"BATCH_MODE": "streams", "CARRY_TRAIN": 1, "ATTN_WINDOW": 12},
    "untied_later": {"UNTIE_AT_FRACTION": 0.5},
    "stages": {"BATCH_STAGES": "0:128,0.4:256", "MICRO_BATCH_TOKENS": 128},
    "curriculum": {"CURRICULUM_STAGES": "0:4,0.3:2,0.6:1"},
    "experts": {"MOE_EXPERTS": 2, "MOE_LAYER_FRAC": 1, "MOE_START_FRACTION": 0.5, "DIAG_EVERY": 2},
    "experts, then loops": {
        "MOE_EXPERTS": 2, "MOE_LAYER_FRAC": 1, "MOE_START_FRACTION": 0.25, "RECURRENCE_LAYERS": "0-0",
        "RECURRENCE_START_FRACTION": 0.6,
    },
    "stack": {
        "LAYER_PATTERN": "SKPA", "NUM_LAYERS": 4, "CAPSULE_DIM": 8, "CAPSULE_NUM": 3, "SKC_BLOCK_SIZE": 2,
        "CAPSULE_BANK": 1, "FEEDBACK_PASSES": 1, "FEEDBACK_SKETCH_TOKENS": 2, "STOCHASTIC_DEPTH": 0.2,
        "TERNARY_NOISE_SCALE": 0.02, "CURRICULUM_STAGES": "0:2,0.5:1",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SWITCHES)
def test_everything_is_compiled_before_the_clock_starts(
    case: str, byte_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with every switch goes through without a compilation after its warm-up, which leaves no trace."""
    small: dict[str, object] = {
        "TRAIN_SEQ_LEN": 8,
        "TRAIN_BATCH_TOKENS": 64,
        "ITERATIONS": 8,
        "WARMUP_STEPS": 5,
        "COMPILE": 1,
        "MUON_WD": 0.1,
    }
    h = config(**{**small, **SWITCHES[case]}, DATA_PATH=byte_data)
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, **_: real(f, backend="eager", fullgraph=True, dynamic=dynamic)
    )
    torch._dynamo.reset()
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    before = [(bank.latent.clone(), len(bank.state)) for bank in s.weights.banks.values()]
    warm_up = t.compile_warmup

    def warm_up_then_forbid(s: t.Session, step: Callable, state: t.TrainState) -> None:
        position = s.loader.position
        warm_up(s, step, state)
        assert all(
            torch.equal(bank.latent, kept) for bank, (kept, _) in zip(s.weights.banks.values(), before, strict=True)
        )
        assert [len(bank.state) for bank in s.weights.banks.values()] == [count for _, count in before]
        assert all(p.grad is None for p in s.model.parameters())
        assert s.loader.position == position and state.step == 0 and state.carry is None
        torch.compiler.set_stance("fail_on_recompile")

    monkeypatch.setattr(t, "compile_warmup", warm_up_then_forbid)
    state = t.TrainState()
    try:
        t.train_loop(s, state)
    finally:
        torch.compiler.set_stance("default")
    assert state.step == 8


def test_windows_grow_with_the_curriculum(byte_data: Path, tmp_path: Path) -> None:
    """Shorter windows are more rows of as many tokens, and follow one another in the stream."""
    small = {"TRAIN_SEQ_LEN": 16, "TRAIN_BATCH_TOKENS": 64, "ITERATIONS": 10, "CURRICULUM_STAGES": "0:4,0.3:2,0.5:1"}
    h = config(**small, DATA_PATH=byte_data)
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    shapes, starts, real = [], [], s.loader.next

    def watched(rows: int, length: int) -> t.Batch:
        starts.append(s.loader.position.token)
        batch = real(rows, length)
        shapes.append(tuple(batch.tokens.shape))
        return batch

    s.loader.next = watched  # type: ignore[method-assign]
    t.train_loop(s, t.TrainState())
    assert shapes == [(16, 4)] * 3 + [(8, 8)] * 2 + [(4, 16)] * 5
    assert starts == [64 * step for step in range(10)]


def test_later_experts_start_near_the_first(byte_data: Path, tmp_path: Path) -> None:
    """At MOE_START_FRACTION each is the trained first expert but for 1% of noise, its own."""
    h = config(MOE_EXPERTS=3, MOE_LAYER_FRAC=1, MOE_START_FRACTION=0.5, MATRIX_CODEC="exact", DATA_PATH=byte_data)
    s = t.open_session(h, t.start_runtime(h), tmp_path, t.Log(None, False))
    state = t.TrainState(variant=t.variant_at(h, 0.0))
    t.switch_variant(s, state, 0.4)
    first, second, third = (s.model.get_parameter(f"blocks.0.moe.experts.{e}.up.weight") for e in range(3))
    assert not state.variant.experts and (second - first).std() > 0.1 * first.std()
    kept = first.detach().clone()
    t.switch_variant(s, state, 0.5)
    assert state.variant.experts and torch.equal(first, kept)
    for one, other in ((first, second), (first, third), (second, third)):
        assert 0.005 < (one - other).std() / first.std() < 0.02
    kept = second.detach().clone()
    t.switch_variant(s, state, 0.6)
    assert torch.equal(second, kept), "copied once only"


# ---- counted work


def test_flops_against_a_hand_count() -> None:
    """Two layers of width 32, two heads of 16 and one of keys and values, MLP 64, sequence 32, 256 tokens."""
    qkv, proj, up, down, head = 32 * 4 * 16, 32 * 32, 32 * 64, 64 * 32, 256 * 32
    layer, attention = qkv + proj + up + down, 12 * 2 * 32 * 32
    assert t.flops_per_token(build(config())) == 6 * (2 * layer + head) + attention
    assert t.flops_per_token(build(config(TIE_EMBEDDINGS=0))) == 6 * (2 * layer + head) + attention
    assert t.flops_per_token(build(config(UNTIE_AT_FRACTION=0.5))) == 6 * (2 * layer + head) + attention
    assert t.flops_per_token(build(config(ATTN_WINDOW=8))) == 6 * (2 * layer + head) + attention / 4
    factored = 6 * (2 * layer + 12 * 256 + 2 * 12 * 32) + attention
    assert t.flops_per_token(build(config(EMBED_DIM=12))) == factored
    gated = 6 * (2 * (layer + up) + head) + attention
    assert t.flops_per_token(build(config(MLP_ACT="swiglu"))) == gated
    memory = 1.5 * (6 * (2 * layer + head) + 12 * 2 * 32 * (8 + 2))
    assert t.flops_per_token(build(config(RMT_SEGMENT=8, RMT_TOKENS=2))) == memory
    sparse = {
        "LAYER_PATTERN": "N",
        "NSA_BLOCK": 4,
        "NSA_STRIDE": 2,
        "NSA_SELECT_BLOCK": 4,
        "NSA_SELECT": 3,
        "RMT_SEGMENT": 8,
    }
    short, long = (t.flops_per_token(build(config(**sparse, TRAIN_SEQ_LEN=length))) for length in (32, 64))
    assert short == long, "a segment is all that is attended to"
