"""The twin's mixers, residual topologies and memory against train_gpt.py: same weights, same results and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SKC_KINDS, TOPOLOGIES, scramble
from torch import Tensor

import train_gpt as t

mx = pytest.importorskip("mlx.core")

import train_gpt_mlx as twin  # noqa: E402

BOS = t.BYTE_BOS
BLOCK, CAPSULES = 4, 3
BASE = {
    "PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "NUM_LAYERS": 2,
    "MODEL_DIM": 16, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "SKC_BLOCK_SIZE": BLOCK, "CAPSULE_DIM": 8,
    "CAPSULE_NUM": CAPSULES, "SKC_CONV": 3, "TRAIN_SEQ_LEN": 32,
}  # fmt: skip
FEEDBACK = {"CAPSULE_BANK": 1, "FEEDBACK_PASSES": 2, "FEEDBACK_SKETCH_TOKENS": 2, "FEEDBACK_DIM": 6}
TUPLES = (
    twin.Ctx, twin.Blocks, twin.Moment, twin.Variant, twin.BlockState, twin.KoopmanState, twin.SKCState, twin.Stream,
    twin.Site, twin.SegmentState, twin.NSAState, twin.Cache, twin.StreamState,
)  # fmt: skip
TYPES = {kind.__name__: kind for kind in TUPLES}


def config(variables: dict[str, object]) -> t.Hyperparameters:
    return t.load_config({name: str(value) for name, value in {**BASE, **variables}.items()})


def built(variables: dict[str, object]) -> t.GPT:
    """A network in float64 with random weights that float32 can hold."""
    h = config(variables)
    return rounded(t.build_model(h, t.start_runtime(h), BOS))


def rounded(model: t.GPT) -> t.GPT:
    """The network with random weights that float32 can hold."""
    scramble(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.float())
    return model


def some_tokens(rows: int, length: int, seed: int = 0, starts: float = 0.12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BOS, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < starts, BOS)


def some_numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def to_mlx(value: Any) -> Any:
    """The twin's form of tensors, and of tuples and dicts that hold some."""
    if isinstance(value, Tensor):
        found = value.detach().numpy()
        return mx.array(found.astype(np.float32) if found.dtype == np.float64 else found)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return TYPES.get(type(value).__name__, type(value))(*map(to_mlx, value))
    if isinstance(value, dict):
        return {name: to_mlx(part) for name, part in value.items()}
    return tuple(map(to_mlx, value)) if isinstance(value, tuple) else value


def leaves_of(value: Any, path: str = "") -> dict[str, Any]:
    """All arrays of either kind within a value, by where they are."""
    if isinstance(value, (Tensor, mx.array)):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    return {name: leaf for key, part in pairs for name, leaf in leaves_of(part, f"{path}.{key}").items()}


def assert_close(got: Any, want: Tensor, tolerance: float, floor: float, name: str) -> None:
    """Equal, or if real numbers equal to `tolerance` times the greatest one, or times `floor`."""
    found, right = np.array(got), want.detach().numpy()
    assert found.shape == right.shape, name
    if right.dtype.kind in "bi":
        np.testing.assert_array_equal(found, right, err_msg=name)
    else:
        size, error = (np.abs(x).max(initial=0.0) for x in (right, found - right))
        assert error < tolerance * max(floor, size), f"{name}: off by {error} of {size}"


def assert_same(got: Any, want: Any) -> None:
    """The same arrays in the same places."""
    got, want = leaves_of(got), leaves_of(want)
    assert got.keys() == want.keys()
    for name, right in want.items():
        assert_close(got[name], right, 1e-5, 1.0, name)


def scalar_of(value: Any) -> Any:
    """A number that depends on every real number in a value, through other weights; to be differentiated."""
    total: Any = 0.0
    for place, (_, leaf) in enumerate(sorted(leaves_of(value).items())):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            total = total + (leaf * some_numbers(*leaf.shape, seed=place)).sum()
        elif isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating):
            total = total + (leaf * mx.array(some_numbers(*leaf.shape, seed=place).float().numpy())).sum()
    return total


def assert_alike(
    pair: tuple[Any, Any], run: Callable[..., Any], run_other: Callable[..., Any], inputs: Sequence[Tensor],
    floor: float = 1e-3,
) -> None:  # fmt: skip
    """A module and its twin give the same with the same weights, gradients by weights and inputs included.

    `run` and `run_other` take the inputs; their results are NamedTuples, tuples, dicts of tensors and arrays.
    """
    module, other = pair
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = run(*leaves)
    weights = dict(module.named_parameters())
    values = {name: to_mlx(weight) for name, weight in weights.items()}
    assert dict(other.named_parameters()).keys() == values.keys()
    assert {name: value.shape for name, value in other.named_parameters()} == {
        name: value.shape for name, value in values.items()
    }

    def loss(values: dict[str, Any], inputs: list[Any]) -> tuple[Any, Any]:
        other.load(values)
        found = run_other(*inputs)
        return scalar_of(found), found

    both, own = mx.value_and_grad(loss, argnums=(0, 1)), [to_mlx(x) for x in leaves]
    # It can be traced; nobody asks for the result, so a C++ compiler stays out of it. Only the loss comes out: MLX 0.32
    # fails where something else that comes out of a differentiated function equals another part of it.
    mx.compile(mx.value_and_grad(lambda *given: loss(*given)[0], argnums=(0, 1)))(values, own)
    (_, got), (by_weight, by_input) = both(values, own)
    other.load(values)
    assert_same(got, want)
    every = [*weights.values(), *leaves]
    grads = torch.autograd.grad(scalar_of(want), every, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(grads, every, strict=True)]
    names = [*weights, *(f"input {i}" for i in range(len(leaves)))]
    got_grads = [*(by_weight[name] for name in weights), *by_input]
    for name, found, right in zip(names, got_grads, grads, strict=True):
        assert_close(found, right, 1e-4, floor, name)


# ---- linear_scan


@pytest.mark.parametrize(("length", "narrow", "begun"), [(1, False, True), (7, True, False), (70, False, True)])
def test_linear_scan(length: int, narrow: bool, begun: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    a = torch.rand(2, length, 1 if narrow else 3, generator=generator).double()
    a = a * (torch.rand(a.shape, generator=generator) > 0.2)
    b, h0 = some_numbers(2, length, 3), some_numbers(2, 3, seed=5)
    values = [a, b, h0] if begun else [a, b]
    nothing, none = t.Module(), twin.Module()
    assert_alike((nothing, none), t.linear_scan, twin.linear_scan, values)
    with pytest.raises(ValueError, match="linear_scan of"):
        twin.linear_scan(to_mlx(a), to_mlx(b), mx.zeros((2, 4)))


def test_a_long_scan_is_the_loop() -> None:
    """Several levels of chunks, with many zeros."""
    a, b = torch.rand(1, 3000, 2, generator=torch.Generator().manual_seed(1)), some_numbers(1, 3000, 2)
    a = (a * (a > 0.3)).double()
    assert_same(twin.linear_scan(to_mlx(a), to_mlx(b)), t.linear_scan(a, b))


# ---- sites

NGRAMS = {"BIGRAM_HASH_BUCKETS": 50, "BIGRAM_HASH_DIM": 12, "ENGRAM_INJECT_LAYER": 0}
SITES: dict[str, tuple[str, dict[str, object]]] = {
    "koopman": ("koopman", {"LAYER_PATTERN": "K"}),
    "koopman, no rotation": ("koopman", {"LAYER_PATTERN": "K", "KOOPMAN_ROTATION": 0, "SKC_CONV": 1}),
    "skc": ("skc", {"LAYER_PATTERN": "S"}),
    "skc, local within blocks": ("skc", {"LAYER_PATTERN": "S", "SKC_LOCAL": "block"}),
    "skc, local only": ("skc", {"LAYER_PATTERN": "S", "SKC_SPECTRAL": 0, "CAPSULE_NUM": 0}),
    "skc, spectral only": ("skc", {"LAYER_PATTERN": "S", "SKC_LOCAL": "off", "CAPSULE_NUM": 0}),
    "skc, capsules only": ("skc", {"LAYER_PATTERN": "S", "SKC_LOCAL": "off", "SKC_SPECTRAL": 0}),
    "skc, engram as bias": ("skc", {"LAYER_PATTERN": "S", "ENG_TO_SKC_MODE": "bias", **NGRAMS}),
    "skc, engram as gate": ("skc", {"LAYER_PATTERN": "S", "ENG_TO_SKC_MODE": "gate", **NGRAMS}),
    "engram": ("engram", {"LAYER_PATTERN": "S", **NGRAMS}),
    "bank": ("bank", {"LAYER_PATTERN": "SA", **FEEDBACK}),
    "bank, no feedback": ("bank", {"LAYER_PATTERN": "SA", "CAPSULE_BANK": 1, "KOOPMAN_ROTATION": 0}),
    "sketch": ("sketch", {"LAYER_PATTERN": "SA", **FEEDBACK}),
    "feedback": ("feedback", {"LAYER_PATTERN": "SA", **FEEDBACK}),
}


def pair_of(model: t.GPT, kind: str) -> tuple[Any, Any]:
    """A site of a network and its twin."""
    site = next(site for site in model.sites if site.kind == kind)
    name = f"blocks.{site.block}.{kind}"
    return model.site(site), twin.SITE_KINDS[kind](model.h, site.layer, name)


def left_by_others(kind: str, ctx: t.Ctx, h: t.Hyperparameters) -> dict[str, Tensor]:
    """What sites before this one have left in the context, random."""
    (rows, length), blocks = ctx.tokens.shape, 0 if ctx.blocks is None else ctx.blocks.keep.shape[1]
    top = {"top": some_numbers(rows, length, h.model_dim, seed=8)} if h.feedback_passes else {}
    passes = [some_numbers(rows, blocks, h.capsule_num, h.capsule_dim, seed=9 + p) for p in range(h.feedback_passes)]
    found = {
        "skc": {"engram": some_numbers(rows, length, h.bigram_hash_dim, seed=8)},
        "bank": {**top, **{f"capsules {p}": c for p, c in enumerate(passes)}},
        "sketch": top,
        "feedback": {"sketch": some_numbers(rows, blocks, h.feedback_dim, h.feedback_dim, seed=8)},
    }
    return found.get(kind, {})


def gathered(memory: dict[str, Any]) -> dict[str, Any]:
    """A context's memory, capsules of all passes in one tuple."""
    trail = tuple(part for name, part in memory.items() if name.startswith("capsules"))
    rest = {name: part for name, part in memory.items() if not name.startswith("capsules")}
    return {**rest, "capsules": trail} if trail else rest


def rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    """A value with the real numbers in it replaced, in order."""
    if isinstance(value, tuple):
        parts = [rebuilt(part, leaves) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    real = isinstance(value, Tensor) and value.is_floating_point()
    return next(leaves) if real or (isinstance(value, mx.array) and value.dtype == mx.float32) else value


def assert_site_alike(model: t.GPT, kind: str, ctx: t.Ctx, state: Any = None) -> Any:
    """A site of a network and its twin do the same with random inputs after a state; returns the next state.

    The state's numbers are inputs, too.
    """
    (module, other), left = pair_of(model, kind), left_by_others(kind, ctx, model.h)
    x, own, own_state = some_numbers(*ctx.tokens.shape, model.h.model_dim, seed=4), to_mlx(ctx), to_mlx(state)
    held = [leaf.detach() for leaf in leaves_of(state).values() if leaf.is_floating_point()]

    def run(x: Tensor, *parts: Tensor) -> Any:
        memory = {**ctx.memory, **gathered(dict(zip(left, parts, strict=False)))}
        return module(x, ctx._replace(memory=memory), rebuilt(state, iter(parts[len(left) :])))

    def run_other(x: Any, *parts: Any) -> Any:
        memory = {**own.memory, **gathered(dict(zip(left, parts, strict=False)))}
        return other(x, own._replace(memory=memory), rebuilt(own_state, iter(parts[len(left) :])))

    inputs = [x, *left.values(), *held]
    assert_alike((module, other), run, run_other, inputs)
    with torch.no_grad():
        return run(*inputs).state


def training_moment(rows: int) -> t.Moment:
    """What marks a training step: only there losses are made."""
    return t.Moment(torch.tensor(0.5), torch.tensor(3), torch.arange(rows))


@pytest.mark.parametrize("case", SITES)
def test_a_site_without_state(case: str) -> None:
    kind, variables = SITES[case]
    model = built(variables)
    variant = t.final_variant(model.h)._replace(measures=True)
    ctx = model.context(some_tokens(2, 14), None, variant, training_moment(2))
    assert_site_alike(model, kind, ctx)


@pytest.mark.parametrize("case", [case for case, (kind, _) in SITES.items() if kind not in ("engram", "feedback")])
def test_a_site_carries_its_state(case: str) -> None:
    """Pieces of a stream that begin and end anywhere in blocks and documents."""
    kind, variables = SITES[case]
    model = built(variables)
    variant, tokens, state = t.scoring_variant(model.h), some_tokens(2, 17, seed=2), model.init_state(2)
    own = next(1 + site.id for site in model.sites if site.kind == kind)
    for start, stop in ((0, 6), (6, 7), (7, 17)):
        ctx = model.context(tokens[:, start:stop], state, variant)
        after = assert_site_alike(model, kind, ctx, state[own])
        state = (model.next_stream(ctx, state[0]), *state[1:own], after, *state[own + 1 :])


# ---- NSA

NSA = {
    "LAYER_PATTERN": "nsa", "NSA_BLOCK": 4, "NSA_STRIDE": 2, "NSA_SELECT_BLOCK": 4, "NSA_SELECT": 4, "NSA_WINDOW": 5,
    "DOC_MASK": 1, "NUM_LAYERS": 1, "NSA_IMPL": "gather",
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "plain": {"DOC_MASK": 0},
    "documents": {},
    "documents, masked": {"NSA_IMPL": "masked"},
    "far apart": {"NSA_BLOCK": 2, "NSA_SELECT_BLOCK": 8, "NSA_SELECT": 3, "NSA_WINDOW": 2, "NUM_KV_HEADS": 1},
    "every token": {"NSA_BLOCK": 3, "NSA_STRIDE": 1, "NSA_SELECT_BLOCK": 3, "NUM_KV_HEADS": 4, "QK_NORM": 0},
    "means": {"NSA_POOL": "mean", "NSA_GATES": "softmax", "PARTIAL_ROPE_DIMS": 4, "PROJ_NORM": 1, "NSA_IMPL": "auto"},
    "one window": {"NSA_WINDOW": 64, "NSA_SELECT": 9},
    "int8 cache": {"KV_CACHE": "int8"},
}
MEMORY: dict[str, object] = {"RMT_SEGMENT": 12, "RMT_TOKENS": 3}


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_attention(shape: str) -> None:
    model = built({**NSA, **SHAPES[shape]})
    variant = t.final_variant(model.h)._replace(measures=True)
    for length in (3, 40):  # without and with blocks
        ctx = model.context(some_tokens(2, length, starts=0.05), None, variant, training_moment(2))
        assert_site_alike(model, "nsa", ctx)


@pytest.mark.parametrize("shape", [name for name in SHAPES if "cache" not in name])
def test_sparse_attention_carries_its_state(shape: str) -> None:
    model = built({**NSA, **SHAPES[shape]})
    variant, tokens, state = t.final_variant(model.h), some_tokens(2, 34, seed=2, starts=0.05), model.init_state(2)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 30), (30, 34)):
        ctx = model.context(tokens[:, start:stop], state, variant)
        state = (model.next_stream(ctx, state[0]), assert_site_alike(model, "nsa", ctx, state[1]), state[2])


@pytest.mark.parametrize("shape", ["documents", "documents, masked", "far apart", "means"])
def test_sparse_attention_with_memory(shape: str) -> None:
    """Pieces of segments with memory that is read, written, both, or neither, the last ones after a state."""
    model = built({**NSA, **SHAPES[shape], **MEMORY})
    variant, tokens = t.final_variant(model.h), some_tokens(2, 24, seed=2, starts=0.05)
    whole = model.context(tokens, None, variant, training_moment(2))
    for measures, piece in ((True, t.Piece(0, 12, 0, 3, 3)), (True, t.Piece(12, 24, 0, 3, 0))):
        ctx = model.piece_context(whole, piece, None)
        assert_site_alike(model, "nsa", ctx._replace(variant=variant._replace(measures=measures)))
    state, stream = model.site_states(2)[0], model.start_stream(model.no_history(tokens))
    for piece in (t.Piece(0, 7, 0, 3, 0), t.Piece(7, 8, 7, 0, 0), t.Piece(8, 12, 8, 0, 3)):
        ctx = model.piece_context(whole, piece, stream if piece.phase else None)
        state, stream = assert_site_alike(model, "nsa", ctx, state), model.next_stream(ctx, stream)


@pytest.mark.parametrize("kind", ["skc", "koopman"])
def test_recurrences_with_memory(kind: str) -> None:
    """Segments' memory tokens lie in blocks of their own."""
    model = built({"LAYER_PATTERN": {"skc": "S", "koopman": "K"}[kind], "NUM_LAYERS": 1, **MEMORY})
    variant, tokens = t.final_variant(model.h)._replace(measures=True), some_tokens(2, 24, seed=2)
    whole = model.context(tokens, None, variant, training_moment(2))
    for piece in (t.Piece(0, 12, 0, 3, 3), t.Piece(12, 24, 0, 3, 0)):
        assert_site_alike(model, kind, model.piece_context(whole, piece, None))


def test_strict_sparse_attention_sees_a_leak() -> None:
    """NSA_STRICT passes on what is sound and stops a range that reaches one token too far."""
    model = built({**NSA, "NSA_STRICT": 1})
    _, other = pair_of(model, "nsa")
    other.load({name: to_mlx(weight) for name, weight in model.site(model.sites[0]).named_parameters()})
    ctx = to_mlx(model.context(some_tokens(2, 20), None, t.final_variant(model.h)))
    x = to_mlx(some_numbers(2, 20, 16))
    other(x, ctx, None)
    views = twin.NSA.views

    class Leaking(twin.NSA):
        def views(self, total: int, near: int, ctx: Any) -> Any:
            found = views(self, total, near, ctx)
            return found._replace(near=found.near._replace(high=found.near.high + 1))

    other.__class__ = Leaking
    with pytest.raises(RuntimeError, match="in its near branch"):
        other(x, ctx, None)


def test_segments() -> None:
    """Pieces of windows, their positions, and the tokens around a text."""
    model = built({"LAYER_PATTERN": "SA", **MEMORY})
    module, other = model.memory, twin.SegmentMemory(model.h)
    for window in itertools.product((1, 11, 12, 30), (0, 5), (False, True)):
        ours, theirs = (list(memory.pieces(*window)) for memory in (module, other))
        assert ours == theirs
        assert [piece.places(12, 3, BLOCK) for piece in ours] == [piece.places(12, 3, BLOCK) for piece in theirs]
    documents = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    kept = t.SegmentState(torch.zeros(0), torch.tensor([0, 2]), documents[:, :0], None)
    own = to_mlx(kept)
    for piece in (t.Piece(0, 4, 0, 3, 3), t.Piece(0, 4, 8, 0, 3), t.Piece(0, 4, 0, 3, 0)):

        def run(x: Tensor, memory: Tensor, piece: Any = piece) -> Any:
            return module.around(kept._replace(memory=memory), x, documents, piece), module.known(
                kept._replace(memory=memory), documents[:, -1]
            ).memory

        def run_other(x: Any, memory: Any, piece: Any = piece) -> Any:
            return other.around(own._replace(memory=memory), x, to_mlx(documents), piece), other.known(
                own._replace(memory=memory), to_mlx(documents[:, -1])
            ).memory

        assert_alike((module, other), run, run_other, [some_numbers(2, 4, 16), some_numbers(2, 3, 16, seed=5)])


# ---- residual topologies

EVERYTHING = {"RESIDUAL": "hc", "HC_LEARN": "keep,write,bias,read,mix", "HC_LANES": 3}
SINKHORN = {"RESIDUAL": "mhc", "MHC_MODE": "sinkhorn"}
NARROW = {"NUM_LAYERS": 3, "MODEL_DIM": 6, "NUM_HEADS": 1, "NUM_KV_HEADS": 1}
HASHED = {"BIGRAM_HASH_BUCKETS": 9, "BIGRAM_HASH_DIM": 8}
LOOPS = {"RECURRENCE_LAYERS": "0-1", "RECURRENCE_DEPTH": 2}
PASSES = {"LAYER_PATTERN": "SA", "FEEDBACK_PASSES": 1, "CAPSULE_BANK": 1}
RESIDUALS: dict[str, dict[str, object]] = {
    "plain": {"RESIDUAL": "plain"},
    "plain, no mix, loops": {"RESIDUAL": "plain", "RESID_MIX": 0, **LOOPS},
    "unet, loops, backout": {"RESIDUAL": "unet", "BACKOUT": 0, **LOOPS},
    "unet, beside": {"RESIDUAL": "unet", "LAYER_PATTERN": "PA"},
    "unet, feedback": {"RESIDUAL": "unet", **PASSES},
    "hc": {"RESIDUAL": "hc", **HASHED},
    "hc, nothing learned": {"RESIDUAL": "hc", "HC_LEARN": "none", "HC_LANES": 3},
    "hc, all learned": {**EVERYTHING, **HASHED, "HC_KEEP_PER_LANE": 1},
    "hc, from layer 1": {**EVERYTHING, **HASHED, "HC_START": 1, "UNET_SKIPS": 1, "BACKOUT": 0},
    "hc, detached, feedback": {**EVERYTHING, **HASHED, **PASSES, "HC_DETACH": 1},
    "mhc lite": {"RESIDUAL": "mhc"},
    "mhc lite, dynamic": {"RESIDUAL": "mhc", "MHC_N": 3, "MHC_LOGITS": "dynamic", "UNET_SKIPS": 1, **LOOPS},
    "mhc lite, five": {"RESIDUAL": "mhc", "MHC_N": 5, "MHC_TAU": 0.5, "BACKOUT": 0, **PASSES},
    "mhc lite, noise": {"RESIDUAL": "mhc", "MHC_GATE_NOISE": 0.5},
    "mhc static, two": SINKHORN,
    "mhc static": {**SINKHORN, "MHC_N": 3},
    "mhc static, gate of tokens": {**SINKHORN, "MHC_N": 3, "MHC_GATE": "token", "MHC_GATE_NOISE": 0.5},
    "mhc dynamic": {**SINKHORN, "MHC_N": 4, "MHC_LOGITS": "dynamic", "MHC_GATE": "token", "MHC_TAU": 0.7},
}


def stream_inputs() -> list[Tensor]:
    """x0, e2, and the weights that stand in for sites."""
    return [some_numbers(*shape, seed=n) for n, shape in enumerate([(2, 5, 6)] * 2 + [(6, 6)] * 3)]


def walk(residual: Any, sites: Sequence[Any], ctx: Any, x0: Any, e2: Any, weights: Sequence[Any]) -> Any:
    """The output, diagnostics and what is read along the sites, each a fixed nonlinear map, other for each kind."""
    r, seen, x = residual.open(x0, e2, ctx), [], x0
    for site in sites:
        read, r, link = residual.read(r, site, ctx)
        x = x if site.beside else read
        seen.append(x)
        y = x @ weights[site.id % len(weights)]
        r = residual.write(r, site, y / (1 + y * y), link)
    return (*residual.close(r), tuple(seen))


@pytest.mark.parametrize("case", RESIDUALS)
def test_a_residual_topology(case: str) -> None:
    h = config({**NARROW, **RESIDUALS[case]})
    sites = t.plan_sites(h, t.final_variant(h))
    residual, other = t.RESIDUALS[h.residual](h, sites).double(), twin.RESIDUALS[h.residual](h, sites)
    with torch.no_grad():
        for place, weight in enumerate(residual.parameters()):
            weight.copy_(some_numbers(*weight.shape, seed=place))
    x0, e2, *weights = stream_inputs()
    nothing = t.Ctx(*[None] * len(t.Ctx._fields))  # type: ignore[arg-type]
    ctx = nothing._replace(variant=t.Variant(measures=True), moment=training_moment(2))
    own_sites, own, own_weights = to_mlx(sites), to_mlx(ctx), [to_mlx(w) for w in weights]
    assert all(isinstance(site, twin.Site) for site in own_sites)

    def run(x0: Tensor, e2: Tensor) -> Any:
        return walk(residual, sites, ctx, x0, e2, weights)

    def run_other(x0: Any, e2: Any) -> Any:
        return walk(other, own_sites, own, x0, e2, own_weights)

    assert_alike((residual, other), run, run_other, [x0, e2])


def test_ranges_of_diagnostics() -> None:
    for variables in ({"RESIDUAL": "mhc"}, {"RESIDUAL": "mhc", "MHC_N": 4}, {"RESIDUAL": "hc"}):
        h = config(variables)
        sites = t.plan_sites(h, t.final_variant(h))
        parts = (kinds[h.residual](h, sites).ranges() for kinds in (t.RESIDUALS, twin.RESIDUALS))
        assert next(parts) == next(parts)


def test_roles_and_labels() -> None:
    """Each parameter's kind, and so its codec and optimizer, is the same; and so is a site's label."""
    for case, variables in RESIDUALS.items():
        h = config({"NUM_LAYERS": 3, **variables})
        sites = t.plan_sites(h, t.final_variant(h))
        residual, other = (kinds[h.residual](h, sites) for kinds in (t.RESIDUALS, twin.RESIDUALS))
        assert residual.kinds == other.kinds, case
        assert [site.label for site in to_mlx(sites)] == [site.label for site in sites]
    for kind, variables in SITES.values():
        module, other = pair_of(built(variables), kind)
        owners = other.owners()
        for name, _ in module.named_parameters():
            path, _, leaf = name.rpartition(".")
            holder, own = owners[name]
            assert holder.kinds[own] == module.get_submodule(path).kinds[leaf], name


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sinkhorn_and_permutations(size: int) -> None:
    logits = some_numbers(4, size, size)
    assert_alike((t.Module(), twin.Module()), lambda x: t.sinkhorn(x, 20), lambda x: twin.sinkhorn(x, 20), [logits])
    assert_same(twin.permutations_of(size), t.permutations_of(size))


# ---- whole networks


@pytest.mark.parametrize("case", [*TOPOLOGIES, *SKC_KINDS])
def test_a_network(case: str) -> None:
    """Loss, auxiliary losses, diagnostics, gradients, and logits of a stream that comes in pieces."""
    jobs: dict[str, dict[str, Any]] = {**TOPOLOGIES, **SKC_KINDS}
    h = t.load_config({"PRESET": "tiny", "VOCAB_SIZE": "256", "PRECISION": "fp64", "DEVICE": "cpu", **jobs[case]})
    model = rounded(t.build_model(h, t.start_runtime(h), BOS))
    other = twin.GPT(h, BOS)
    tokens, targets, moment = some_tokens(2, 21, starts=0.08), some_tokens(2, 21, seed=5), training_moment(2)
    variant = t.final_variant(h)._replace(measures=True)
    own = to_mlx((tokens, targets, variant, None, moment))

    def run() -> Any:
        out = model.loss(tokens, targets, variant, None, moment)
        return out._replace(metrics={name: value.detach() for name, value in out.metrics.items()})

    def run_other() -> Any:
        out = other.loss(*own)
        return out._replace(metrics={name: mx.stop_gradient(value) for name, value in out.metrics.items()})

    assert_alike((model, other), run, run_other, [], 0.1)
    variant, state, own_state = t.scoring_variant(h), model.init_state(2), other.init_state(2)
    with torch.no_grad():
        for piece in tokens.split((5, 1, 15), 1):
            want, state = model.logits(piece, variant, state)
            got, own_state = other.logits(to_mlx(piece), to_mlx(variant), own_state)
            assert_close(got, want, 1e-4, 1.0, "logits")


@pytest.mark.parametrize("case", [*TOPOLOGIES, *SKC_KINDS])
def test_a_step_can_be_compiled(case: str) -> None:
    """With diagnostics and what is carried among its results. Tracing only: nobody asks for numbers."""
    jobs: dict[str, dict[str, Any]] = {**TOPOLOGIES, **SKC_KINDS}
    h = twin.load_config({"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", **jobs[case]})
    model, runtime = twin.GPT(h, BOS), twin.start_runtime(h)._replace(compile=True)
    tokens, moment = to_mlx(some_tokens(2, 21)), to_mlx(training_moment(2))
    batch = twin.Batch(*[None] * len(twin.Batch._fields))._replace(tokens=tokens, targets=tokens, scored=42)
    variant, carry = twin.final_variant(h)._replace(measures=True), model.init_state(2) if h.carry_train else None
    out = twin.Passes(h, runtime, model)(batch, carry, moment, variant, 2)
    trained, measured, carried = {*out.grads}, len(out.metrics), out.carry is not None
    del out  # or pytest would print, and so compute it, to explain a failure
    assert trained == {*dict(model.named_parameters())} and measured > 5
    assert carried == (carry is not None)


# ---- bfloat16: as on an Apple GPU, weights in float32 and the stream in bfloat16


def assert_near(full: Any, half: Any) -> None:
    """Not the same numbers, but what eight bits of mantissa leave of them."""
    full, half = (np.array(x.astype(mx.float32)) for x in (full, half))
    assert 0 < np.abs(half - full).mean() < 0.05 * np.abs(full).mean()


@pytest.mark.parametrize("case", [*SITES, "nsa"])
def test_a_site_in_bfloat16(case: str) -> None:
    """Its output is bfloat16 and near to float32's; what it remembers of blocks and recurrences stays float32."""
    kind, variables = SITES.get(case, ("nsa", NSA))
    model = built(variables)
    module, other = pair_of(model, kind)
    other.load({name: to_mlx(weight) for name, weight in module.named_parameters()})
    ctx = model.context(some_tokens(2, 14), None, t.final_variant(model.h), training_moment(2))
    own, x = to_mlx(ctx), to_mlx(some_numbers(2, 14, model.h.model_dim, seed=4))
    left, found = gathered(to_mlx(left_by_others(kind, ctx, model.h))), []
    for dtype in (mx.float32, mx.bfloat16):
        memory = {name: part.astype(dtype) if name in ("top", "engram") else part for name, part in left.items()}
        out = other(x.astype(dtype), own._replace(memory=memory), other.init_state(2, mx.float32))
        assert out.y is None or out.y.dtype == dtype
        state = out.state[1:] if kind in ("skc", "koopman") else out.state if kind in ("bank", "sketch") else ()
        assert all(part.dtype == mx.float32 for part in leaves_of(state).values())
        found.append(out.memory["sketch"] if out.y is None else out.y)
    assert_near(*found)


@pytest.mark.parametrize("case", ["plain", "hc, all learned", "mhc lite", "mhc dynamic"])
def test_a_stream_in_bfloat16(case: str) -> None:
    h = config({**NARROW, **RESIDUALS[case]})
    sites = to_mlx(t.plan_sites(h, t.final_variant(h)))
    other = twin.RESIDUALS[h.residual](h, sites)
    other.load({n: to_mlx(some_numbers(*w.shape, seed=i)) for i, (n, w) in enumerate(other.named_parameters())})
    x0, e2, *weights = (to_mlx(x) for x in stream_inputs())
    ctx, found = twin.Ctx(*[None] * len(twin.Ctx._fields))._replace(variant=twin.Variant()), []
    for dtype in (mx.float32, mx.bfloat16):
        cast = [part.astype(dtype) for part in (x0, e2, *weights)]
        x, _, seen = walk(other, sites, ctx, *cast[:2], cast[2:])
        assert {part.dtype for part in (x, *seen)} == {dtype}
        found.append(x)
    assert_near(*found)
