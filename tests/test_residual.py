"""Residual topologies against loops over lists, and the laws that every one of them keeps."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_environment, scramble
from torch import Tensor

import train_gpt as t

DIM = 6
LAYERS = [1, 2, 3, 4, 5, 7]
NGRAMS = {"BIGRAM_HASH_BUCKETS": 9, "BIGRAM_HASH_DIM": 8}
EVERYTHING = {"RESIDUAL": "hc", "HC_LEARN": "keep,write,bias,read,mix"}
SINKHORN = {"RESIDUAL": "mhc", "MHC_MODE": "sinkhorn"}
CASES: dict[str, dict[str, object]] = {
    "plain": {"RESIDUAL": "plain"},
    "plain, no mix": {"RESIDUAL": "plain", "RESID_MIX": 0},
    "unet": {"RESIDUAL": "unet"},
    "unet, no mix": {"RESIDUAL": "unet", "RESID_MIX": 0},
    "backout": {"RESIDUAL": "unet", "BACKOUT": 0},
    "hc": {"RESIDUAL": "hc", **NGRAMS},
    "hc, nothing learned": {"RESIDUAL": "hc", "HC_LEARN": "none", "HC_LANES": 3},
    "hc, all learned": {**EVERYTHING, **NGRAMS, "HC_LANES": 3, "HC_KEEP_PER_LANE": 1},
    "hc, from layer 1": {**EVERYTHING, **NGRAMS, "HC_LANES": 3, "HC_START": 1, "HC_KEEP_PER_LANE": 1},
    "hc, skips": {**EVERYTHING, "UNET_SKIPS": 1, "BACKOUT": 0},
    "mhc lite": {"RESIDUAL": "mhc"},
    "mhc lite, dynamic": {"RESIDUAL": "mhc", "MHC_N": 3, "MHC_LOGITS": "dynamic", "UNET_SKIPS": 1},
    "mhc lite, five": {"RESIDUAL": "mhc", "MHC_N": 5, "MHC_TAU": 0.5, "BACKOUT": 0},
    "mhc static, two": SINKHORN,
    "mhc static": {**SINKHORN, "MHC_N": 3},
    "mhc static, gate of tokens": {**SINKHORN, "MHC_N": 3, "MHC_GATE": "token"},
    "mhc dynamic": {**SINKHORN, "MHC_N": 4, "MHC_LOGITS": "dynamic", "MHC_GATE": "token", "MHC_TAU": 0.7},
}
GRID = [(case, n) for case, values in CASES.items() for n in LAYERS]
DEEP = ("mhc", "BACKOUT", "HC_START")  # what one layer does not have
GRID = [(case, n) for case, n in GRID if n > 1 or not {*CASES[case], CASES[case]["RESIDUAL"]} & {*DEEP}]
grid = pytest.mark.parametrize(("case", "layers"), GRID)
CONTEXT = SimpleNamespace(variant=t.Variant(), moment=None)


def config(**variables: object) -> t.Hyperparameters:
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    return t.load_config({name: str(value) for name, value in {**base, **variables}.items()})


def build(case: str, layers: int, **more: object) -> tuple[t.Hyperparameters, tuple[t.Site, ...], t.Module]:
    """One residual topology with random parameters, float64, and the sites it serves."""
    h = config(NUM_LAYERS=layers, MODEL_DIM=DIM, NUM_HEADS=1, **CASES[case], **more)
    sites = t.plan_sites(h, t.final_variant(h))
    residual = t.RESIDUALS[h.residual](h, sites).double()
    generator = torch.Generator().manual_seed(layers)
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return h, sites, residual


def branch(site: t.Site, x: Tensor) -> Tensor:
    """Stands in for what a site computes: a fixed nonlinear map, other for each site."""
    generator = torch.Generator().manual_seed(100 + 10 * site.layer + (site.kind == "mlp"))
    weight = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) / math.sqrt(DIM)
    return torch.tanh(x @ weight)


def walk(residual: t.Module, sites: Sequence[t.Site], r: t.Stream) -> t.Stream:
    for site in sites:
        x, r, link = residual.read(r, site, CONTEXT)
        r = residual.write(r, site, branch(site, x), link)
    return r


def start(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def opened(h: t.Hyperparameters, residual: t.Module) -> t.Stream:
    return residual.open(start(), start(1) if h.has_bigram_stream else None, CONTEXT)


def mixed_by_sums(h: t.Hyperparameters, logits: Tensor) -> Tensor:
    """R (n, n) of one token's logits: scaled in turn, or a mean over permutations."""
    n = h.mhc_n
    if h.mhc_mode == "lite":
        orders = list(itertools.permutations(range(n)))
        if n > 4:
            orders = [tuple((i + k) % n for i in range(n)) for k in range(n)]
            orders += [tuple({i: i + 1, i + 1: i}.get(j, j) for j in range(n)) for i in range(n - 1)]
        weights, mixing = (logits / h.mhc_tau).softmax(0), torch.zeros(n, n, dtype=torch.float64)
        for weight, order in zip(weights, orders, strict=True):
            for i, j in enumerate(order):
                mixing[i, j] += weight
        return mixing
    mixing = (logits / h.mhc_tau).exp().view(n, n)
    for _ in range(h.sinkhorn_iters if n > 2 else 2000):
        mixing = mixing / mixing.sum(0, keepdim=True)
        mixing = mixing / mixing.sum(1, keepdim=True)
    return mixing


def plain_step(h: t.Hyperparameters, p: t.Module, lanes: list[Tensor], layer: int, sub: int) -> list[Tensor]:
    kind = ("attn", "mlp")[sub]
    return [lanes[0] + p.scale[layer, sub] * branch(t.Site(0, kind, layer), lanes[0])]


def hc_step(
    h: t.Hyperparameters, p: t.Module, lanes: list[Tensor], layer: int, sub: int, e2: Tensor | None
) -> list[Tensor]:
    n, own = h.hc_lanes, layer - h.hc_start
    o, kind = 2 * own + sub, ("attn", "mlp")[sub]
    if own < 0:
        return [lanes[0] + branch(t.Site(0, kind, layer), lanes[0]), *lanes[1:]]
    lanes = lanes * n if len(lanes) == 1 else lanes
    x = lanes[o % n] if p.take is None or not o else sum(p.take[o - 1, j] * lanes[j] for j in range(n))
    y, found = branch(t.Site(0, kind, layer), x), []
    for k in range(n):
        lane = lanes[k] if p.cross is None else sum(p.cross[own, sub, k, j] * lanes[j] for j in range(n))
        r = h.hc_keep_init if p.keep is None else p.keep[own, sub, k if h.hc_keep_per_lane else 0]
        lane = r * lane + (1.0 if p.give is None else p.give[own, sub, k]) * y
        if sub == 0 and p.x0_bias is not None:
            lane = lane + p.x0_bias[own, k] * start()
            if e2 is not None and layer > 0:
                lane = lane + p.e2_bias[own - (h.hc_start == 0), k] * e2
        found.append(lane)
    return found


def mhc_step(h: t.Hyperparameters, p: t.Module, lanes: list[Tensor], layer: int, sub: int) -> list[Tensor]:
    n, o = h.mhc_n, 2 * layer + sub
    begins, ends = 0 not in h.looped, h.num_layers - 1 not in h.looped
    pre, post = torch.sigmoid(p.take), 2 * torch.sigmoid(p.give[o])
    row, place = o - begins, o - begins  # the first sublayer has none, unless a loop comes back to it
    x = lanes[0] if row < 0 else sum(pre[row, j] * lanes[j] for j in range(n)) / pre[row].sum()  # a norm follows
    y = branch(t.Site(0, ("attn", "mlp")[sub], layer), x)
    if place < 0 or (ends and o == 2 * h.num_layers - 1):
        return [lanes[i] + post[i] * y for i in range(n)]
    found = [torch.zeros_like(y) for _ in range(n)]
    for token in itertools.product(*map(range, y.shape[:2])):  # token by token
        seen = t.rms_norm(torch.cat([lane[token] for lane in lanes]))
        logits, gate = p.base[place], p.gate[place]
        if p.look is not None:
            logits = logits + p.alpha[place] * (p.look[place] @ seen)
        if p.gate_look is not None:
            gate = gate + p.gate_look[place] @ seen
        g, mixing = torch.sigmoid(gate), mixed_by_sums(h, logits)
        for i in range(n):
            across = sum(mixing[i, j] * lanes[j][token] for j in range(n))
            found[i][token] = (1 - g) * lanes[i][token] + g * across + post[i] * y[token]
    return found


def naive(h: t.Hyperparameters, residual: t.Module) -> Tensor:
    """The equations as a loop over layers, each topology's own step twice in a layer; looped layers come twice."""
    lanes = [start()] * {"hc": 1 if h.hc_start else h.hc_lanes, "mhc": h.mhc_n}.get(h.residual, 1)
    stored, early, half, order = dict[int, Tensor](), start(), h.num_layers // 2, list(range(h.num_layers))
    if h.looped:
        order[h.looped[-1] + 1 : h.looped[-1] + 1] = h.looped
    for layer in order:
        if h.has_skips and half <= layer < 2 * half:
            lanes[0] = lanes[0] + residual.skip[layer - half] * stored[2 * half - 1 - layer]
        if h.resid_mix and h.residual in ("plain", "unet"):
            lanes[0] = residual.mix[layer, 0] * lanes[0] + residual.mix[layer, 1] * start()
        for sub in range(2):
            if h.residual == "hc":
                lanes = hc_step(h, residual, lanes, layer, sub, start(1) if h.has_bigram_stream else None)
            elif h.residual == "mhc":
                lanes = mhc_step(h, residual, lanes, layer, sub)
            else:
                lanes = plain_step(h, residual, lanes, layer, sub)
        if h.has_skips and layer < half:
            stored[layer] = lanes[0]
        if layer == h.backout:
            early = lanes[0]
    x = sum(lanes) / len(lanes)
    return x - residual.backout * early if h.backout >= 0 else x


@grid
@torch.no_grad()
def test_topology_is_its_equation(case: str, layers: int) -> None:
    h, sites, residual = build(case, layers)
    got = residual.close(walk(residual, sites, opened(h, residual)))[0]
    torch.testing.assert_close(got, naive(h, residual), rtol=1e-9, atol=1e-9)


@grid
def test_every_parameter_acts_and_is_stored_once(case: str, layers: int) -> None:
    h, sites, residual = build(case, layers)
    names = dict(residual.named_parameters())
    assert all(value in t.ROLE_KINDS for value in residual.kinds.values())
    assert {path.split(".")[-1] for path in names} <= set(residual.kinds)
    assert ("mix" in names) == (h.resid_mix and h.residual in ("plain", "unet"))
    if names:
        residual.close(walk(residual, sites, opened(h, residual)))[0].square().sum().backward()
    for path, parameter in names.items():
        assert parameter.grad is not None, f"{path} is unused"
        assert (parameter.grad != 0).all(), f"a part of {path} is unused"


@grid
def test_the_residual_state_may_be_entered_again(case: str, layers: int) -> None:
    """A saved R gives the same result when the rest runs twice: feedback passes and recomputation rely on it."""
    h, sites, residual = build(case, layers)
    for saved_at in range(len(sites) + 1):
        saved = walk(residual, sites[:saved_at], opened(h, residual))
        copies = [part.clone() for part in t.flatten_state(saved)]
        versions = [part._version for part in t.flatten_state(saved)]
        first = residual.close(walk(residual, sites[saved_at:], saved))[0]
        second = residual.close(walk(residual, sites[saved_at:], saved))[0]
        assert torch.equal(first, second)
        assert isinstance(saved, tuple)
        assert all(map(torch.equal, copies, t.flatten_state(saved))), "R was changed in place"
        assert versions == [part._version for part in t.flatten_state(saved)], "R was written to"


@pytest.mark.parametrize("loop", ["0", "0-1", "1-2", "3", "0-3"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_loops_use_the_parameters_of_their_layer_again(case: str, loop: str) -> None:
    """Residual parameters belong to (layer, sublayer); what is stored of a layer is its last output."""
    h, sites, residual = build(case, 4, RECURRENCE_LAYERS=loop)
    assert len(sites) == 8 + 2 * len(h.looped)
    got = residual.close(walk(residual, sites, opened(h, residual)))[0]
    torch.testing.assert_close(got, naive(h, residual), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("case", "layers"), [(case, n) for case, n in GRID if "BACKOUT" not in CASES[case]])
@torch.no_grad()
def test_fresh_network_is_the_identity_on_its_embedding(case: str, layers: int) -> None:
    """Output projections and tables start at zero, so only constants are left: x0 times a positive number."""
    h = config(NUM_LAYERS=layers, **CASES[case])
    model = t.build_model(h, t.start_runtime(h), t.BYTE_BOS)
    tokens = torch.randint(0, 255, (2, 5), generator=torch.Generator().manual_seed(0))
    ctx = model.context(tokens, None, t.Variant())
    x, _, _ = model.hidden(ctx, None)
    torch.testing.assert_close(x, t.rms_norm(model.embed(ctx)[0]), rtol=1e-6, atol=1e-6)


@grid
@torch.no_grad()
def test_network_runs_its_topology(case: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole network is the naive loop over its own sites, with a norm before each and at the end."""
    h = config(NUM_LAYERS=layers, **CASES[case])
    model = scramble(t.build_model(h, t.start_runtime(h), t.BYTE_BOS))
    tokens = torch.randint(0, 255, (2, 7), generator=torch.Generator().manual_seed(3))
    ctx = model.context(tokens, None, t.Variant())
    x0, e2, _ = model.embed(ctx)
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "start", lambda seed=0: e2 if seed else x0)
    sites = ["attn", "mlp"]
    monkeypatch.setattr(
        module, "branch", lambda site, x: model.blocks[site.layer][site.kind](t.rms_norm(x), ctx, None).y
    )
    assert [site.kind for site in t.plan_sites(h, t.final_variant(h))] == sites * layers
    torch.testing.assert_close(model.hidden(ctx, None)[0], t.rms_norm(naive(h, model.residual)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "walk",
    [
        [(0, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (2, 1, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0)],
        [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (3, 1, 0), (4, 1, 0), (5, 0, 0)],
        [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 1, 0), (4, 0, 0), (5, 0, 0)],
        [*((layer, 0, 0) for layer in range(6)), *((layer, 0, 1) for layer in range(3, 6))],
    ],
    ids=["encoder loop", "decoder loop", "one layer twice", "feedback pass"],
)
def test_skips_survive_repeated_layers(walk: list[tuple[int, int, int]]) -> None:
    """A stored output is the layer's last one; every visit of a decoder layer mixes x0 in and takes its skip."""
    residual = build("unet", 6)[2]
    order = [(layer, loop, turn, sub) for layer, loop, turn in walk for sub in range(2)]
    sites = [t.Site(i, ("attn", "mlp")[o[3]], o[0], o[1], o[2], o[3]) for i, o in enumerate(order)]
    residual = type(residual)(config(NUM_LAYERS=6, MODEL_DIM=DIM, NUM_HEADS=1, RESIDUAL="unet"), sites).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x0 = torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)
    r, x, kept = residual.open(x0, None, CONTEXT), x0, {}
    for site in sites:
        h, r, link = residual.read(r, site, CONTEXT)
        r = residual.write(r, site, branch(site, h), link)
        if site.sub == 0:
            if site.layer >= 3:
                x = x + residual.skip[site.layer - 3] * kept[5 - site.layer]
            x = residual.mix[site.layer, 0] * x + residual.mix[site.layer, 1] * x0
        x = x + residual.scale[site.layer, site.sub] * branch(site, x)
        if site.sub == 1:
            kept[site.layer] = x
    torch.testing.assert_close(residual.close(r)[0], x, rtol=0, atol=1e-12)


# ---- connections that are not there, and matrices that neither grow nor shrink streams


def network(**variables: object) -> t.GPT:
    h = config(NUM_LAYERS=4, RESID_MIX=0, **variables)
    return t.build_model(h, t.start_runtime(h), t.BYTE_BOS)


def neutral(model: t.GPT) -> t.GPT:
    """Random weights but for connections that do nothing: as they start, and mHC's R = I, pre = 1 / n, post = 1."""
    values = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("residual")}
    scramble(model)
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
        if model.h.residual == "mhc":
            n, identity = model.h.mhc_n, torch.eye(model.h.mhc_n).flatten()
            model.residual.take.fill_(-math.log(n - 1))
            model.residual.give.zero_()
            model.residual.gate.normal_()
            off = torch.arange(model.residual.base.shape[1]) > 0 if model.h.mhc_mode == "lite" else identity == 0
            model.residual.base.copy_(-1e9 * off)
    return model


@pytest.mark.parametrize(
    "case",
    [
        {"RESIDUAL": "hc"},
        {"RESIDUAL": "hc", "HC_LANES": 4},
        {"RESIDUAL": "hc", "HC_LEARN": "none"},
        {"RESIDUAL": "hc", "HC_LEARN": "keep,write,read,mix", "HC_LANES": 4},
        {"RESIDUAL": "hc", "HC_START": 2},
        {"RESIDUAL": "mhc"},
        {"RESIDUAL": "mhc", "MHC_MODE": "sinkhorn"},
        {"RESIDUAL": "mhc", "MHC_LOGITS": "dynamic"},
        {"RESIDUAL": "mhc", "MHC_N": 4},
        {"RESIDUAL": "mhc", "MHC_N": 4, "MHC_MODE": "sinkhorn", "MHC_GATE": "token"},
    ],
    ids=str,
)
@torch.no_grad()
def test_neutral_connections_are_the_plain_residual(case: dict[str, object]) -> None:
    """Bit for bit with hyper-connections on a power of two lanes, and with two streams."""
    tokens = torch.randint(0, 255, (2, 17), generator=torch.Generator().manual_seed(0))
    extra: dict[str, object] = {"HC_KEEP_INIT": 1} if case["RESIDUAL"] == "hc" else {}
    plain, other = network(RESIDUAL="plain"), neutral(network(**case, **extra))
    for name, parameter in plain.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if name == "residual.scale" else other.get_parameter(name))
    want, got = (model.logits(tokens, t.Variant())[0] for model in (plain, other))
    if case.get("MHC_N", 2) == 2:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def mixing_matrices(draws: int, **variables: object) -> Tensor:
    """R (draws, n, n) of logits drawn from N(0, 1) after the division by tau, float64."""
    h = config(RESIDUAL="mhc", **variables)
    residual = t.ManifoldConnections(h, t.plan_sites(h, t.final_variant(h))).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(draws, residual.base.shape[1], dtype=torch.float64, generator=generator)
    return torch.eye(h.mhc_n) + residual.deviation(drawn * h.mhc_tau)


def sum_errors(mixing: Tensor) -> Tensor:
    """Largest distance of a row's or column's sum from 1, of each matrix."""
    return torch.cat((mixing.sum(-1), mixing.sum(-2)), -1).sub(1).abs().amax(-1)


@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_means_of_permutations_are_doubly_stochastic(n: int, tau: float) -> None:
    mixing = mixing_matrices(1000, MHC_N=n, MHC_TAU=tau)
    assert (mixing >= 0).all() and sum_errors(mixing).max() <= 1e-12


def test_two_streams_need_no_iterations() -> None:
    mixing = mixing_matrices(1000, MHC_N=2, MHC_MODE="sinkhorn")
    assert (mixing >= 0).all() and sum_errors(mixing).max() <= 1e-12


def test_sinkhorn_comes_near_enough() -> None:
    errors = sum_errors(mixing_matrices(1000, MHC_N=4, MHC_MODE="sinkhorn", SINKHORN_ITERS=20))
    assert errors.median() <= 1e-9 and errors.quantile(0.99) <= 1e-5
    few = sum_errors(mixing_matrices(1000, MHC_N=4, MHC_MODE="sinkhorn", SINKHORN_ITERS=2))
    assert few.median() > 1e-3, "what 20 iterations gain"


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_permutations_reach_every_exchange_of_streams(n: int) -> None:
    """The identity is the first, all are permutations, and products of them take each stream everywhere."""
    every = t.permutations_of(n)
    assert torch.equal(every[0], torch.eye(n))
    assert torch.equal(every.sum(-1), torch.ones(len(every), n)) and torch.equal(
        every.sum(-2), torch.ones(len(every), n)
    )
    assert (
        len({tuple(p.flatten().tolist()) for p in every}) == len(every) == (math.factorial(n) if n <= 4 else 2 * n - 1)
    )
    found = {tuple(range(n))}
    orders = [tuple(p.argmax(-1).tolist()) for p in every]
    if n <= 5:
        while True:
            more = found | {tuple(one[i] for i in other) for one in found for other in orders}
            if more == found:
                break
            found = more
        assert len(found) == math.factorial(n)


@pytest.mark.parametrize("case", ["mhc lite", "mhc static, two", "mhc static", "mhc dynamic", "hc, all learned"])
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    h, sites, residual = build(case, 2)
    names = [name for name, _ in residual.named_parameters()]

    def output(*values: Tensor) -> Tensor:
        def run() -> Tensor:
            return residual.close(walk(residual, sites, opened(h, residual)))[0]

        with torch.nn.utils.stateless._reparametrize_module(residual, dict(zip(names, values, strict=True))):
            return run()

    assert torch.autograd.gradcheck(output, tuple(p.detach().clone().requires_grad_() for p in residual.parameters()))


# ---- how they start and learn


def test_first_values_and_groups_are_those_of_the_design() -> None:
    """design: p 1, r sqrt(1.1), beta 0, delta 0.05; logits +-4 to read, gate 0.01, -2 off the diagonal, -8 in lite."""
    hc = network(RESIDUAL="hc", HC_LEARN="keep,write,bias,read,mix", HC_LANES=3, **NGRAMS)
    found = {name: p.detach() for name, p in hc.residual.named_parameters()}
    for name, value in (("keep", math.sqrt(1.1)), ("give", 1.0), ("x0_bias", 0.0), ("e2_bias", 0.05)):
        torch.testing.assert_close(found[name], torch.full_like(found[name], value), rtol=0, atol=1e-4)
    assert torch.equal(found["take"], torch.eye(3, dtype=torch.float64)[[1, 2, 0, 1, 2, 0, 1]])
    assert torch.equal(found["cross"], torch.eye(3, dtype=torch.float64).expand(4, 2, 3, 3))
    sharp = network(RESIDUAL="mhc", MHC_N=3, MHC_MODE="sinkhorn", MHC_LOGITS="dynamic", MHC_GATE="token").residual
    lite = network(RESIDUAL="mhc", MHC_N=3).residual
    torch.testing.assert_close(torch.sigmoid(lite.gate), torch.full_like(lite.gate, 0.01), rtol=1e-3, atol=0)
    assert torch.equal(lite.take, 8 * torch.eye(3, dtype=torch.float64)[[1, 2, 0, 1, 2, 0, 1]] - 4)
    torch.testing.assert_close(lite.give[1], torch.tensor([-0.1, 0.1, -0.1]).double(), rtol=0, atol=1e-4)
    assert torch.equal(lite.base, torch.tensor([0.0] + 5 * [-8.0]).double().expand(6, 6))
    assert torch.equal(sharp.base, 2 * torch.eye(3, dtype=torch.float64).flatten().expand(6, 9) - 2)
    torch.testing.assert_close(sharp.alpha, torch.full_like(sharp.alpha, 0.01), rtol=1e-3, atol=0)
    assert not sharp.gate_look.any() and float((sharp.look.square().mean() * sharp.look.shape[-1]).detach()) < 1.2
    groups = (
        {"keep": ("hc", 5.0), "give": ("hc", 1.0), "x0_bias": ("hc", 1.0)},
        {"give": ("mhc", 1.0), "gate": ("mhc_mix", 1.0)},
    )
    for model, names in zip((hc, network(RESIDUAL="mhc")), groups, strict=True):
        h, rows = model.h, t.role_table(model)
        for name, (group, rate) in names.items():
            role, made = rows[f"residual.{name}"], t.GROUPS[group](h)
            assert (role.group, role.lr_mult, role.decay) == (group, rate, 0.0)
            assert (made.rule, made.beta1, made.beta2, made.decay) == ("adamw", 0.9, 0.95, 0.0)
            assert made.eps == (1e-12 if h.residual == "mhc" else h.adam_eps)
    assert t.GROUPS["mhc"](h).rate == h.mhc_lr and t.GROUPS["mhc_mix"](h).rate == h.mhc_mix_lr


def test_biases_that_are_detached_give_the_embedding_no_gradient() -> None:
    found = []
    for detach in (0, 1):
        h = config(NUM_LAYERS=2, MODEL_DIM=DIM, NUM_HEADS=1, RESIDUAL="hc", HC_DETACH=detach, **NGRAMS)
        residual = scramble(t.HyperConnections(h, t.plan_sites(h, t.final_variant(h))))
        x0, e2 = start().requires_grad_(), start(1).requires_grad_()
        biases = residual.open(x0, e2, CONTEXT).made[-1]
        found.append(torch.autograd.grad(sum(b.sum() for b in biases[2:]), (x0, e2), allow_unused=True))
    assert all(grad.any() for grad in found[0]) and found[1] == (None, None)


@pytest.mark.parametrize("gate", ["scalar", "token"])
def test_gates_are_noisy_in_training_only(gate: str) -> None:
    """Standard deviation as asked, other noise at each step and sublayer; with gates of tokens, in each row."""
    model = network(RESIDUAL="mhc", MHC_GATE=gate, MHC_GATE_NOISE=0.3).residual
    logits = torch.zeros(200, 5, dtype=torch.float64) if gate == "token" else torch.zeros(200, dtype=torch.float64)
    where = torch.tensor(2) if gate == "token" else torch.arange(200)

    def noise(step: int) -> Tensor:
        moment = t.Moment(torch.tensor(0.5), torch.tensor(step), torch.arange(200))
        return torch.logit(model.opened(logits, where, SimpleNamespace(moment=moment)))

    drawn = torch.stack([noise(step) for step in range(20)])
    assert abs(float(drawn.std().detach()) - 0.3) < 0.02 and abs(float(drawn.mean().detach())) < 0.02
    assert torch.equal(noise(3), drawn[3]) and len(drawn.unique()) == 20 * 200
    assert torch.equal(model.opened(logits, where, CONTEXT), torch.full_like(logits, 0.5))


@pytest.mark.parametrize("case", ["mhc lite", "mhc dynamic", "mhc static, gate of tokens"])
@torch.no_grad()
def test_mixing_keeps_its_digits_in_bf16(case: str) -> None:
    """Only streams are bf16: matrices are as doubly stochastic as in float32, and what is measured has its digits."""
    h = config(NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=2, PRECISION="bf16", **CASES[case])
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, t.BYTE_BOS)
    tokens = torch.randint(0, 255, (2, 9), generator=torch.Generator().manual_seed(3))
    for name, parameter in model.named_parameters():
        if name.startswith("residual") or name.endswith("proj.weight"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with rt.precision():
        found = model.hidden(model.context(tokens, None, t.Variant(measures=True)), None)[2].metrics
    exact = config(NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=2, PRECISION="fp32", **CASES[case])
    other = t.build_model(exact, t.start_runtime(exact), t.BYTE_BOS)
    other.load_state_dict(model.state_dict())
    want = other.hidden(other.context(tokens, None, t.Variant(measures=True)), None)[2].metrics
    assert found["residual.column_error"].dtype == torch.float32
    error = float(want["residual.column_error"])  # 20 iterations do not always suffice
    assert float(found["residual.column_error"]) < (1e-5 if "lite" in case else error + 0.02 * error + 1e-5)
    for name in ("gate", "diagonal", "stream_similarity"):
        torch.testing.assert_close(found[f"residual.{name}"], want[f"residual.{name}"], rtol=0, atol=5e-3)
    if exact.mhc_gate == "scalar":
        assert torch.equal(found["residual.gate"], want["residual.gate"])


# ---- streams part


def trained(steps: int, **variables: object) -> tuple[t.GPT, dict[str, float]]:
    """A small float32 network after some steps on random text, with its gradients and measurements at the next."""
    base = {"PRECISION": "fp32", "NUM_LAYERS": 3, "MATRIX_CODEC": "exact", "SCALAR_CODEC": "exact"}
    h = config(**{**base, "RESIDUAL": "mhc", **variables})
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, t.BYTE_BOS)
    weights = t.Weights(model)
    weights.materialize(0.0)
    optimizer = t.Optimizer(h, rt, weights)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        weights.clear_gradients()
        tokens = torch.randint(0, 60, (4, 32), generator=generator)
        moment = t.Moment(torch.tensor(0.5), torch.tensor(step), torch.arange(4))
        out = model.loss(tokens, tokens.roll(-1, 1), t.Variant(measures=True), None, moment)
        out.total.backward()
        if step < steps:
            optimizer.step(1.0, 0.9, False, 0.0)
    return model, {name: float(value) for name, value in out.metrics.items()}


def without_gradient(model: t.GPT) -> list[str]:
    """Connections some of whose elements have a gradient of exactly zero."""
    named = model.residual.named_parameters()
    return [name for name, p in named if p.grad is None or not (p.grad != 0).all()]


FORMS: list[dict[str, object]] = [
    {},
    {"MHC_N": 4},
    {"MHC_LOGITS": "dynamic", "MHC_GATE": "token"},
    {"MHC_MODE": "sinkhorn"},
    {"MHC_MODE": "sinkhorn", "MHC_N": 4},
    {"MHC_MODE": "sinkhorn", "MHC_N": 4, "MHC_LOGITS": "dynamic", "MHC_GATE_NOISE": 0.1},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_connection_learns_from_the_second_step_on(form: dict[str, object]) -> None:
    assert without_gradient(trained(2, **form)[0]) == []


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_streams_part(form: dict[str, object]) -> None:
    measured = trained(50, **form)[1]
    assert measured["residual.stream_similarity"] < 0.99998  # apart by 0.6% of their size
    assert measured["residual.column_error"] < 1e-3 and 0 < measured["residual.gate"] < 1


def test_from_a_symmetric_start_streams_stay_the_same() -> None:
    model, measured = trained(10, MHC_READ_APART=0, MHC_WRITE_APART=0, MHC_LR=0.01)
    assert measured["residual.stream_similarity"] > 1 - 1e-6
    torch.testing.assert_close(*model.residual.give.grad.unbind(1), rtol=1e-4, atol=1e-6)
    assert model.residual.take.grad.abs().max() < 1e-8 and model.residual.base.grad.abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 4])
def test_logits_of_minus_eight_at_a_twentieth_can_never_learn(n: int) -> None:
    """The notes' setting: -160 after the division, so that R is the identity and its gradients are exactly zero."""
    model, measured = trained(2, MHC_MODE="sinkhorn", MHC_N=n, MHC_INIT_OFFDIAG=-8, MHC_TAU=0.05)
    assert measured["residual.diagonal"] == 1.0
    assert not model.residual.base.grad.any() and not model.residual.gate.grad.any()


# ---- what is measured, and said


@torch.no_grad()
def test_measurements_are_of_streams_and_matrices() -> None:
    model = scramble(network(RESIDUAL="mhc", MHC_N=3, MHC_MODE="sinkhorn", SINKHORN_ITERS=2))
    tokens = torch.randint(0, 255, (2, 7), generator=torch.Generator().manual_seed(3))
    ctx, seen = model.context(tokens, None, t.Variant(measures=True)), list[t.Stream]()
    real = model.residual.close
    model.residual.close = lambda r: (seen.append(r), real(r))[1]
    found = model.hidden(ctx, None)[2].metrics
    lanes = seen[0].lanes
    pairs = [torch.cosine_similarity(lanes[i], lanes[j], -1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    mixing = torch.stack([mixed_by_sums(model.h, logits) for logits in model.residual.base])
    gate = torch.sigmoid(model.residual.gate).mean()
    for name, value in (
        ("stream_similarity", sum(pairs) / 3),
        ("gate", gate),
        ("diagonal", mixing.diagonal(dim1=-2, dim2=-1).mean()),
        ("column_error", (mixing.sum(-2) - 1).abs().max()),
    ):
        torch.testing.assert_close(found[f"residual.{name}"].double(), torch.as_tensor(value), rtol=1e-5, atol=1e-7)
    assert found["residual.column_error"] > 1e-4, "so few iterations leave an error to be seen"
    assert not model.hidden(model.context(tokens, None, t.Variant()), None)[2].metrics, "nothing is measured unasked"


def test_a_run_writes_what_its_streams_do(run_cli: Callable, tiny_env: dict[str, str]) -> None:
    done = run_cli([], {**tiny_env, "RESIDUAL": "mhc", "MHC_LOG_EVERY": "5", "ITERATIONS": "10"})
    assert done.returncode == 0, done.stderr
    assert "health step:5 residual.stream_similarity:" in done.stdout
    lines = (Path(tiny_env["OUT_DIR"]) / "run" / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    ranges = [one for one in written if one["kind"] == "ranges"]
    measured = [one for one in written if one["kind"] == "diagnostics"]
    assert len(ranges) == 1 and [one["step"] for one in measured] == [5, 10]
    assert all(name in one for one in measured for name in ranges[0] if name.startswith("residual."))
    assert all(2 < one["step_loss_nats"] < 7 for one in measured)


def test_health_speaks_once_when_a_measurement_leaves_its_range(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = t.Log(tmp_path, True)
    health = t.Health(log, {"residual.gate": (0.3, 0.7, 0.0, 0.9)})
    for step, gate in ((10, 0.5), (20, 0.95), (30, 0.99), (40, 0.8), (50, float("nan")), (60, float("nan"))):
        health.look(step, {"residual.gate": gate, "other": 5.0})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health")]
    assert [line.split()[1] for line in said] == ["step:20", "step:40", "step:50"]
    assert "residual.gate:0.95 out of its range 0 to 0.9" in said[0] and "back" in said[1] and "nan" in said[2]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ranges = [one for one in written if one["kind"] == "ranges"]
    assert len(ranges) == 1
    limits = {"good_from": 0.3, "good_to": 0.7, "bad_below": 0.0, "bad_above": 0.9}
    assert ranges[0]["residual.gate"] == limits
    assert [one["step"] for one in written if one["kind"] == "diagnostics"] == [10, 20, 30, 40, 50, 60]


# ---- kernels

INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
import test_residual as r
import train_gpt as t
t.lanes_tile, t.LANES_PROGRAMS = lambda sums: 8, 3  # 24 numbers: whole tiles in turn; 12: a part of one
for name, settings in r.KERNEL_CASES.items():
    for dim, dtype in ((4, torch.float32), (2, torch.float32), (4, torch.bfloat16)):
        found, kinds = [], [(False, dtype), (True, dtype), (False, torch.float32)]
        for fuses, dtype in kinds:
            t.PlainResidual.fuses = lambda self, x: fuses
            h = r.config(**{"NUM_LAYERS": 3, "MODEL_DIM": dim, "NUM_HEADS": 1, "RESIDUAL": "hc", **settings})
            sites = t.plan_sites(h, t.final_variant(h))
            residual = r.scramble(t.RESIDUALS[h.residual](h, sites)).float()
            x0, e2 = (torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
            leaves = [x0.requires_grad_(), e2.requires_grad_(), *residual.parameters()]
            stream = residual.open(x0.to(dtype), e2.to(dtype) if h.has_bigram_stream else None, r.CONTEXT)
            for site in sites:
                x, stream, link = residual.read(stream, site, r.CONTEXT)
                stream = residual.write(stream, site, torch.tanh(x * (1 + site.layer)), link)
            y = residual.close(stream)[0].float()
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            grads = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
            found.append([y, *(g if g is not None else torch.zeros(1) for g in grads)])
        for sums, mine, exact in zip(*found, strict=True):  # in bf16 as near to float32's result as sums are
            error = (1e-5 if kinds[0][1] == torch.float32 else 0.02) * exact.norm() + 3 * (sums - exact).norm() + 1e-7
            assert (mine - exact).norm() <= error, (name, dim, kinds, mine, sums, exact)
t.PlainResidual.fuses = lambda self, x: fuses
tokens = torch.arange(10).view(1, 10) % 7
for settings in ({"RESIDUAL": "hc", **r.NGRAMS}, {"RESIDUAL": "mhc", "MHC_N": 4}):
    found = []
    for fuses in (False, True):
        h = r.config(NUM_LAYERS=2, MODEL_DIM=8, NUM_HEADS=1, PRECISION="fp32", **settings)
        model = r.scramble(t.build_model(h, t.start_runtime(h), 1))
        loss_of = torch.compile(model.loss, dynamic=False, fullgraph=True, backend="aot_eager") if fuses else model.loss
        loss_of(tokens[:, :-1], tokens[:, 1:], t.final_variant(h)).total.backward()
        found.append([p.grad.to_dense() for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
print("agree")
"""
KERNEL_CASES = {
    "as it won": NGRAMS,
    "without n-grams": {},
    "nothing learned": {"HC_LEARN": "none"},
    "all learned": {"HC_LEARN": "keep,write,bias,read,mix", "HC_KEEP_PER_LANE": 1, **NGRAMS},
    "from layer 1, detached": {"HC_LEARN": "keep,write,bias", "HC_START": 1, "HC_DETACH": 1, **NGRAMS},
    "four lanes, all learned": {"HC_LANES": 4, "HC_LEARN": "keep,write,bias,read,mix", **NGRAMS},
    "two streams": {"RESIDUAL": "mhc"},
    "four streams": {"RESIDUAL": "mhc", "MHC_N": 4, "MHC_MODE": "sinkhorn"},
    "three streams, loops, skips": {"RESIDUAL": "mhc", "MHC_N": 3, "UNET_SKIPS": 1, "RECURRENCE_LAYERS": "1-2"},
    "two streams by token": {"RESIDUAL": "mhc", "MHC_LOGITS": "dynamic", "MHC_GATE": "token"},
}


def test_kernels_of_lanes_agree_with_sums_in_the_interpreter() -> None:
    """Outputs and all gradients, compiled too; in a process of its own, since that is how kernels are interpreted."""
    pytest.importorskip("triton")
    environment = {**clean_environment({}), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "agree", done.stderr


# rows and columns of w, and how many inputs are apart: hc's writes and learned reads, mhc's
@pytest.mark.parametrize(("rows", "count", "apart"), [(2, 3, 0), (2, 5, 0), (4, 7, 0), (1, 4, 0), (4, 5, 4), (1, 4, 4)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_of_lanes_build_for_hopper(dtype: str, rows: int, count: int, apart: int) -> None:
    triton = pytest.importorskip("triton")
    shapes = {"xs": count, "outs": rows, "grads": rows, "founds": count}
    for kernel, sums in ((t.lanes_kernel, 1), (t.lanes_gradient_kernel, rows * count)):
        constants = {"APART": apart, "TILE": t.lanes_tile(sums)}
        signature: dict[str, Any] = {name: (f"*{dtype}",) * shapes.get(name, 1) for name in kernel.arg_names}
        signature |= dict.fromkeys({"w", "dw"} & set(signature), "*fp32") | {"size": "i32"}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = [(i, j) for i, name in enumerate(kernel.arg_names) for j in range(shapes.get(name, 0))]
        attributes = {place: [["tt.divisibility", 16]] for place in aligned}
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024
