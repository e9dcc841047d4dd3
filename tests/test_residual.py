"""Residual topologies against loops over lists, and the laws that every one of them keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import train_gpt as t

DIM = 6
LAYERS = [1, 2, 3, 4, 5, 7]


def config(**variables: object) -> t.Hyperparameters:
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    return t.load_config({name: str(value) for name, value in {**base, **variables}.items()})


def build(name: str, layers: int, mix: bool = True) -> tuple[t.Hyperparameters, tuple[t.Site, ...], t.Module]:
    """One residual topology with random parameters, float64, and the sites it serves."""
    h = config(NUM_LAYERS=layers, MODEL_DIM=DIM, NUM_HEADS=1, RESIDUAL=name, RESID_MIX=int(mix))
    sites = t.plan_sites(h, t.final_variant(h))
    residual = t.RESIDUALS[name](h, sites).double()
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


def walk(residual: t.Module, sites: Sequence[t.Site], r: tuple) -> tuple:
    for site in sites:
        x, r, link = residual.read(r, site)
        r = residual.write(r, site, branch(site, x), link)
    return r


def start() -> Tensor:
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def naive(residual: t.Module, layers: int, x0: Tensor, mix: bool, unet: bool) -> Tensor:
    """The equations as a loop over layers: x <- x + skip * stored; x <- m0 x + m1 x0; x <- x + scale * f(x), twice."""
    x, stored = x0, []
    for layer in range(layers):
        half = layers // 2
        if unet and half <= layer < 2 * half:
            x = x + residual.skip[layer - half] * stored.pop()
        if mix:
            x = residual.mix[layer, 0] * x + residual.mix[layer, 1] * x0
        for i, kind in enumerate(("attn", "mlp")):
            x = x + residual.scale[layer, i] * branch(t.Site(0, kind, layer), x)
        if unet and layer < half:
            stored.append(x)
    assert not stored
    return x


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mix", [True, False], ids=["mix", "no mix"])
@pytest.mark.parametrize("name", ["plain", "unet"])
def test_topology_is_its_equation(name: str, mix: bool, layers: int) -> None:
    _, sites, residual = build(name, layers, mix)
    got = residual.close(walk(residual, sites, residual.open(start(), None, None)))[0]
    torch.testing.assert_close(got, naive(residual, layers, start(), mix, name == "unet"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mix", [True, False], ids=["mix", "no mix"])
@pytest.mark.parametrize("name", t.RESIDUALS)
def test_every_parameter_acts_and_is_stored_once(name: str, mix: bool, layers: int) -> None:
    _, sites, residual = build(name, layers, mix)
    names = dict(residual.named_parameters())
    assert all(value in t.ROLE_KINDS for value in residual.kinds.values())
    assert {path.split(".")[-1] for path in names} <= set(residual.kinds)
    assert not [path for path in names if "mix" in path] or mix, "RESID_MIX=0 must leave no mixing parameters"
    residual.close(walk(residual, sites, residual.open(start(), None, None)))[0].square().sum().backward()
    for path, parameter in names.items():
        assert parameter.grad is not None, f"{path} is unused"
        assert (parameter.grad != 0).all(), f"a part of {path} is unused"


def test_mixing_parameters_exist_only_with_resid_mix() -> None:
    assert build("plain", 3, mix=True)[2].mix.shape == (3, 2, DIM)
    assert build("plain", 3, mix=False)[2].mix is None


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", t.RESIDUALS)
def test_the_residual_state_may_be_entered_again(name: str, layers: int) -> None:
    """A saved R gives the same result when the rest runs twice: feedback passes and recomputation rely on it."""
    _, sites, residual = build(name, layers)
    for saved_at in range(len(sites) + 1):
        saved = walk(residual, sites[:saved_at], residual.open(start(), None, None))
        copies = [part.clone() for part in t.flatten_state(saved)]
        versions = [part._version for part in t.flatten_state(saved)]
        first = residual.close(walk(residual, sites[saved_at:], saved))[0]
        second = residual.close(walk(residual, sites[saved_at:], saved))[0]
        assert torch.equal(first, second)
        assert isinstance(saved, tuple)
        assert all(map(torch.equal, copies, t.flatten_state(saved))), "R was changed in place"
        assert versions == [part._version for part in t.flatten_state(saved)], "R was written to"


@pytest.mark.parametrize("name", t.RESIDUALS)
def test_a_repeated_layer_uses_its_own_parameters_again(name: str) -> None:
    """Residual parameters belong to (layer, sublayer): loops over a layer add none."""
    h, sites, residual = build(name, 4)
    looped = [*sites[:4], *(s._replace(loop=1) for s in sites[2:4]), *sites[4:]]
    again = t.RESIDUALS[name](h, tuple(s._replace(id=i) for i, s in enumerate(looped)))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in residual.named_parameters()}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", t.RESIDUALS)
@torch.no_grad()
def test_fresh_network_is_the_identity_on_its_embedding(name: str, layers: int) -> None:
    """Output projections start at zero, so only the topology's own constants are left: x0 times a positive number."""
    h = config(NUM_LAYERS=layers, RESIDUAL=name)
    model = t.build_model(h, t.start_runtime(h), t.BYTE_BOS)
    tokens = torch.randint(0, 255, (2, 5), generator=torch.Generator().manual_seed(0))
    ctx = model.context(tokens, None, t.Variant())
    x, _, _ = model.hidden(ctx, None)
    torch.testing.assert_close(x, t.rms_norm(model.embed(ctx)[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", ["plain", "unet"])
@torch.no_grad()
def test_network_runs_its_topology(name: str, layers: int) -> None:
    """A whole network is the naive loop over its own sites, with a norm before each and at the end."""
    h = config(NUM_LAYERS=layers, RESIDUAL=name)
    model = t.build_model(h, t.start_runtime(h), t.BYTE_BOS)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.5 + 0.3 * noise)
    tokens = torch.randint(0, 255, (2, 7), generator=generator)
    ctx = model.context(tokens, None, t.Variant())
    x0, _, _ = model.embed(ctx)
    x, stored, half, residual = x0, [], layers // 2, model.residual
    for layer, block in enumerate(model.blocks):
        if name == "unet" and half <= layer < 2 * half:
            x = x + residual.skip[layer - half] * stored.pop()
        x = residual.mix[layer, 0] * x + residual.mix[layer, 1] * x0
        x = x + residual.scale[layer, 0] * block["attn"](t.rms_norm(x), ctx, None).y
        x = x + residual.scale[layer, 1] * block["mlp"](t.rms_norm(x), ctx, None).y
        if name == "unet" and layer < half:
            stored.append(x)
    torch.testing.assert_close(model.hidden(ctx, None)[0], t.rms_norm(x), rtol=1e-10, atol=1e-10)


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
    _, _, residual = build("unet", 6)
    order = [(layer, loop, turn, sub) for layer, loop, turn in walk for sub in range(2)]
    sites = [t.Site(i, ("attn", "mlp")[o[3]], o[0], o[1], o[2], o[3]) for i, o in enumerate(order)]
    residual = type(residual)(config(NUM_LAYERS=6, MODEL_DIM=DIM, NUM_HEADS=1, RESIDUAL="unet"), sites).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x0 = torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)
    r, x, kept = residual.open(x0, None, None), x0, {}
    for site in sites:
        h, r, link = residual.read(r, site)
        r = residual.write(r, site, branch(site, h), link)
        if site.sub == 0:
            if site.layer >= 3:
                x = x + residual.skip[site.layer - 3] * kept[5 - site.layer]
            x = residual.mix[site.layer, 0] * x + residual.mix[site.layer, 1] * x0
        x = x + residual.scale[site.layer, site.sub] * branch(site, x)
        if site.sub == 1:
            kept[site.layer] = x
    torch.testing.assert_close(residual.close(r)[0], x, rtol=0, atol=1e-12)
