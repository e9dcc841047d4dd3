"""Layers against their formulas: norm, activations, capped loss, rotary positions, embedding, adapters, observers."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import train_gpt as t

DOUBLE = torch.float64


def config(**variables: object) -> t.Hyperparameters:
    """A tiny float64 configuration."""
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0}
    return t.load_config({name: str(value) for name, value in {**base, **variables}.items()})


def scrambled_model(**variables: object) -> t.GPT:
    """A network whose every parameter is random and matters."""
    h = config(**variables)
    model = t.build_model(h, t.start_runtime(h), t.BYTE_BOS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.5 + 0.3 * noise)
    return model


# ---- norm


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_is_x_over_its_rms(shape: tuple[int, ...], scale: float) -> None:
    x = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).add(0.1) * scale
    for value, rounding in ((x, 1e-14), (x.float(), 1e-6)):
        # the 1e-6 on the vector's length is all that may separate it from the plain formula
        near = 1.001e-6 / float(x.norm(dim=-1).min()) + rounding
        got = t.rms_norm(value)
        torch.testing.assert_close(got, F.rms_norm(value, shape[-1:], eps=0.0), rtol=near, atol=0)


def test_rms_norm_of_initial_embeddings_is_exact() -> None:
    """Embeddings start at a standard deviation of 0.005, where torch's default epsilon would shift them by 0.4%."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 0.005
    torch.testing.assert_close(
        t.rms_norm(x), (x.double() * 8 / x.double().norm(dim=-1, keepdim=True)).float(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (2, 3, 6)])
def test_rms_norm_gradient(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)) + 2).requires_grad_()
    assert gradcheck(t.rms_norm, x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_rms_norm_of_zero_is_zero_with_finite_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype, generator=torch.Generator().manual_seed(4))
    x[1] = 0
    alone = t.rms_norm(x[[0, 2]])
    x.requires_grad_()
    y = t.rms_norm(x)
    assert torch.equal(y[1], torch.zeros(8, dtype=dtype))
    assert torch.equal(y[[0, 2]], alone), "a zero vector disturbs its neighbours"
    (y * torch.randn(3, 8, dtype=dtype)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# ---- activations


@pytest.mark.parametrize(("name", "slope"), [("relu2", 0.0), ("leaky_relu2", 0.5)])
def test_squared_relu_value_and_gradient(name: str, slope: float) -> None:
    act = t.ACTIVATIONS[name]
    x = torch.tensor([-3.0, -1.0, -0.25, 0.0, 0.25, 2.0, 1e3], dtype=DOUBLE)
    assert torch.equal(act(x), torch.where(x > 0, x, slope * x) ** 2)
    smooth = torch.randn(4, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradcheck(act, smooth, atol=1e-7, rtol=1e-6)
    x.requires_grad_()
    act(x).backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * torch.where(x > 0, 2 * x, 2 * slope**2 * x).detach(), rtol=1e-15, atol=0)


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    gate, value = torch.randn(2, 3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(t.ACTIVATIONS["swiglu"](torch.cat((gate, value), -1)), gate * gate.sigmoid() * value)


@pytest.mark.parametrize("name", t.ACTIVATIONS)
def test_every_activation_is_finite_and_sends_gradients(name: str) -> None:
    x = torch.cat((torch.linspace(-30, 30, 63), torch.zeros(1))).repeat(2).requires_grad_()
    y = t.ACTIVATIONS[name](x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert x.grad.count_nonzero() > len(x) // 4
    assert t.ACTIVATIONS[name](torch.zeros(8)).count_nonzero() == 0, "zero in, zero out"


@pytest.mark.parametrize("name", t.ACTIVATIONS)
def test_mlp_is_down_of_activation_of_up(name: str) -> None:
    model = scrambled_model(MLP_ACT=name, MLP_MULT=1.5)
    mlp = model.blocks[0]["mlp"]
    assert mlp.down.weight.shape == (32, 48)
    x = torch.randn(2, 3, 32, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    ctx = model.context(torch.zeros(2, 3, dtype=torch.int64), None, t.Variant())
    out = mlp(x, ctx, mlp.init_state(2, DOUBLE))
    torch.testing.assert_close(out.y, t.ACTIVATIONS[name](x @ mlp.up.weight.T) @ mlp.down.weight.T)


# ---- capped cross-entropy


def loss_inputs(
    rows: int, vocab: int, dtype: torch.dtype = DOUBLE, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    x = torch.randn(rows, 6, generator=generator, dtype=DOUBLE) * scale
    weight = torch.randn(vocab, 6, generator=generator, dtype=DOUBLE)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::5] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float, smoothing: float = 0.0) -> Tensor:
    z = x @ weight.T
    z = cap * torch.tanh(z / cap) if cap else z
    return F.cross_entropy(z, targets, reduction="sum", label_smoothing=smoothing)  # -100 is left out by default


def assert_same_loss(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, rtol: float, upstream: float = 1.0, smoothing: float = 0.0
) -> None:
    want = plain_loss(x.double(), weight.double(), targets, cap, smoothing) * upstream
    want_grads = torch.autograd.grad(want, (x, weight))
    got = t.SoftcapCrossEntropy.apply(x, weight, targets, cap, smoothing) * upstream
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
    for mine, exact in zip(torch.autograd.grad(got, (x, weight)), want_grads, strict=True):
        assert mine.dtype == x.dtype
        torch.testing.assert_close(mine, exact, rtol=rtol, atol=rtol * max(1e-30, float(exact.abs().max())))


# rows of one block: max(128, 2^19 / vocabulary) on a CPU
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 2), (7, 11), (127, 4096), (128, 4096), (129, 4096), (300, 4099), (1100, 1024)]
)
@pytest.mark.parametrize("cap", [0.0, 5.0, 30.0])
def test_capped_cross_entropy_is_torchs(rows: int, vocab: int, cap: float) -> None:
    assert_same_loss(*loss_inputs(rows, vocab), cap, rtol=1e-11)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("cap", [0.0, 5.0, 30.0, 50.0])
def test_smoothed_cross_entropy_is_torchs(cap: float, smoothing: float) -> None:
    """Targets of -100, among which there are some, are left out of the smoothed part, too."""
    x, weight, targets = loss_inputs(150, 4099)
    targets[::7] = -100
    assert_same_loss(x, weight, targets, cap, rtol=1e-10, smoothing=smoothing)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_capped_cross_entropy_in_float32(cap: float) -> None:
    assert_same_loss(*loss_inputs(300, 4099, torch.float32), cap, rtol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0, 88.0, 120.0, 1e3])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1e4])
def test_capped_cross_entropy_for_any_cap_and_size_of_logits(cap: float, scale: float) -> None:
    """In float32 a cap of 100 leaves nothing of exp(z - cap) for ordinary z, and large z must not overflow."""
    x, weight, targets = loss_inputs(13, 40, torch.float32, scale)
    want = plain_loss(x.double(), weight.double(), targets, cap)
    got = t.SoftcapCrossEntropy.apply(x, weight, targets, cap, 0.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(got, (x, weight))
    assert all(grad.isfinite().all() for grad in grads)


def test_uncapped_cross_entropy_of_large_logits() -> None:
    assert_same_loss(*loss_inputs(13, 40, DOUBLE, 1e4), 0.0, rtol=1e-10)
    x, weight, targets = loss_inputs(13, 40, torch.float32, 1e4)
    assert t.SoftcapCrossEntropy.apply(x, weight, targets, 0.0, 0.0).isfinite()


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_capped_cross_entropy_gradcheck(cap: float) -> None:
    x, weight, targets = loss_inputs(9, 7)
    assert gradcheck(
        lambda a, b: t.SoftcapCrossEntropy.apply(a, b, targets, cap, 0.0), (x, weight), atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_batch_of_ignored_targets_costs_nothing(cap: float) -> None:
    x, weight, targets = loss_inputs(150, 4096)
    loss = t.SoftcapCrossEntropy.apply(x, weight, torch.full_like(targets, -100), cap, 0.0)
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and weight.grad is not None
    assert x.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0


def test_upstream_gradient_scales_capped_cross_entropy() -> None:
    assert_same_loss(*loss_inputs(200, 4096), 30.0, rtol=1e-11, upstream=-0.125)


def test_softcap_formula() -> None:
    z = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4])
    torch.testing.assert_close(t.softcap(z, 5.0), 5 * torch.tanh(z / 5))
    assert t.softcap(z, 0.0) is z and t.softcap(z.bfloat16(), 5.0).dtype == torch.float32


# ---- rotary positions

POSITIONS = [0, 1, 2, 4095, 4096, 4097, 65_535, 65_536, 1_000_003, 8_388_608, 2**24 - 1]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_angles_are_exact_at_any_position(precision: str, base: float) -> None:
    h = config(PRECISION=precision, ROPE_BASE=base, MODEL_DIM=64)
    rotary = t.build_model(h, t.start_runtime(h), t.BYTE_BOS).rotary
    cosine, sine = rotary(torch.tensor([POSITIONS]))  # (1, T, 1, R/2)
    pairs = h.rope_dims // 2
    with mpmath.workdps(40):
        angles = [[p * mpmath.mpf(base) ** (-mpmath.mpf(i) / pairs) for i in range(pairs)] for p in POSITIONS]
        want = [np.array([[float(f(a)) for a in row] for row in angles]) for f in (mpmath.cos, mpmath.sin)]
    for got, exact in zip((cosine, sine), want, strict=True):
        assert got.shape == (1, len(POSITIONS), 1, pairs)
        assert got.dtype == (torch.float32 if precision == "fp32" else DOUBLE)
        assert np.abs(got[0, :, 0].double().numpy() - exact).max() < (5e-7 if precision == "fp32" else 1e-8)


def test_rotary_survives_streams_longer_than_its_tables() -> None:
    """A carried state counts positions without end: seq 1,024 times 16,384 steps is 2^24."""
    rotary = t.build_model(config(), t.start_runtime(config()), t.BYTE_BOS).rotary
    cosine, sine = rotary(torch.tensor([[2**24 - 1, 2**24, 2**24 + 5, 2**31 + 7]]))
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones_like(cosine))
    near, far = rotary(torch.tensor([[5]])), rotary(torch.tensor([[2**24 + 5]]))
    back = rotary(torch.tensor([[2]])), rotary(torch.tensor([[2**24 + 2]]))
    q, k = torch.randn(2, 1, 1, 2, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    scores = [(t.turn_(q.clone(), *a) * t.turn_(k.clone(), *b)).sum(-1) for a, b in ((near, back[0]), (far, back[1]))]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1, 4094, 4096, 65_536, 2**24 - 16])
def test_rotary_scores_depend_on_the_distance_only(shift: int) -> None:
    rotary = t.build_model(config(), t.start_runtime(config()), t.BYTE_BOS).rotary
    q, k = torch.randn(2, 1, 8, 3, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    here, there = rotary(torch.arange(8)[None]), rotary(torch.arange(8)[None] + shift)
    scores = [torch.einsum("bihd,bjhd->bhij", t.turn_(q.clone(), *r), t.turn_(k.clone(), *r)) for r in (here, there)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-7, atol=1e-7)
    still = torch.einsum("bihd,bjhd->bhij", q, k)
    torch.testing.assert_close(scores[0].diagonal(0, 2, 3), still.diagonal(0, 2, 3))  # distance 0 turns nothing
    assert (scores[0] - still).abs().tril(-1).max() > 0.1, "position must matter"


def test_rotation_turns_pairs_and_leaves_other_channels_alone() -> None:
    h = config(PARTIAL_ROPE_DIMS=6)
    rotary = t.build_model(h, t.start_runtime(h), t.BYTE_BOS).rotary(torch.arange(5)[None])
    x = torch.randn(2, 5, 3, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    y = t.turn_(x.clone(), *rotary)
    assert torch.equal(y[..., 6:], x[..., 6:])
    for position in range(5):
        for pair in range(3):
            turn = np.exp(1j * position * 10_000.0 ** (-pair / 3))
            a, b = x[:, position, :, pair].numpy(), x[:, position, :, pair + 3].numpy()
            want = (a + 1j * b) * turn
            np.testing.assert_allclose(y[:, position, :, pair].numpy(), want.real, atol=1e-12)
            np.testing.assert_allclose(y[:, position, :, pair + 3].numpy(), want.imag, atol=1e-12)


@pytest.mark.parametrize(
    ("factor", "original", "dims"), [(1, 0, 16), (2, 0, 16), (8, 2048, 16), (40, 100, 10), (4, 1_000_000, 16)]
)
def test_yarn_frequencies_against_a_loop(factor: float, original: int, dims: int) -> None:
    h = config(YARN_FACTOR=factor, YARN_ORIGINAL=original, PARTIAL_ROPE_DIMS=dims, TRAIN_SEQ_LEN=64)
    frequencies, sharpness = t.rotary_frequencies(h)
    for i, got in enumerate(frequencies):
        plain = 10_000.0 ** (-2 * i / dims)
        wavelength = 2 * math.pi / plain
        turns = (original or 64) / wavelength
        if turns < 1:
            want = plain / factor
        elif turns > 32:
            want = plain
        else:
            ramp = (turns - 1) / 31
            want = (1 - ramp) * plain / factor + ramp * plain
        assert got == pytest.approx(want, rel=1e-12)
    assert sharpness == pytest.approx(0.1 * math.log(factor) + 1)
    cosine, sine = t.build_model(h, t.start_runtime(h), t.BYTE_BOS).rotary(torch.tensor([[77]]))
    np.testing.assert_allclose(cosine[0, 0, 0].numpy(), np.cos(77 * frequencies) * sharpness, atol=1e-12)
    np.testing.assert_allclose(sine[0, 0, 0].numpy(), np.sin(77 * frequencies) * sharpness, atol=1e-12)


# ---- embedding and head


@pytest.mark.parametrize("width", [0, 12])
def test_embedding_is_normalized_and_factored(width: int) -> None:
    model = scrambled_model(EMBED_DIM=width)
    tokens = torch.tensor([[3, 255, 3, 9]])
    x, e2, _ = model.embed(model.context(tokens, None, t.Variant()))
    assert e2 is None, "no tables, no n-grams"
    rows = model.embed.weight[tokens]
    if width:
        rows = F.rms_norm(rows, (width,)) @ model.embed.up.weight.T
    torch.testing.assert_close(x, F.rms_norm(rows, (32,)), rtol=1e-5, atol=1e-6)
    assert torch.equal(x[:, 0], x[:, 2]) and x.shape == (1, 4, 32)


@pytest.mark.parametrize("orders", ["2", "2,3", "4", "2,5"])
def test_hashed_ngrams_are_rows_of_whole_ngrams(orders: str) -> None:
    """Against Python integers: the row of each n-gram inside its document and stream, zeros for one that is cut."""
    buckets = 29
    model = scrambled_model(BIGRAM_HASH_BUCKETS=buckets, BIGRAM_HASH_DIM=12, BIGRAM_HASH_ORDERS=orders)
    tokens = torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[0, 5] = tokens[1, [0, 1, 8]] = t.BYTE_BOS
    x, e2, _ = model.embed(model.context(tokens, None, t.Variant()))
    lengths = [int(order) for order in orders.split(",")]
    width = 12 // len(lengths)
    for row in range(3):
        for at in range(12):
            parts = []
            for table, length in enumerate(lengths):
                gram = tokens[row, max(0, at - length + 1) : at + 1].tolist()[::-1]  # the current token first
                key = gram[0] + 1
                for j, token in enumerate(gram[1:], 1):
                    key = (key * 16807 ** (j + 1) + token + 1) % (2**31 - 1)
                cut = len(gram) < length or t.BYTE_BOS in gram[:-1]
                found = model.embed.ngrams.weight[table * buckets + key % buckets]
                parts.append(torch.zeros(width, dtype=DOUBLE) if cut else found)
            torch.testing.assert_close(e2[row, at], torch.cat(parts) @ model.embed.ngrams.up.weight.T)
    torch.testing.assert_close(x, t.rms_norm(model.embed.weight[tokens] + e2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("doc_mask", [0, 1])
@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("orders", ["1", "2", "1,3", "1,2,4"])
def test_induction_finds_what_followed_the_last_times(orders: str, count: int, window: int, doc_mask: int) -> None:
    """Against a search token by token, in the history before the window too; the embedding gets what was found."""
    variables = {"INDUCTION_ORDERS": orders, "INDUCTION_WINDOW": window, "INDUCTION_COUNT": count}
    model = scrambled_model(**variables, DOC_MASK=doc_mask)
    lengths, induction = [int(order) for order in orders.split(",")], model.embed.induction
    past = window + lengths[-1] - 1
    stream = torch.randint(0, 3, (4, past + 20), generator=torch.Generator().manual_seed(1))
    stream[1, past + 5] = stream[2, past - 1] = t.BYTE_BOS
    stream[3, : max(0, past - 2)] = -1  # a stream that begins just before its window
    history, tokens = stream.split((past, 20), 1)
    want = torch.full((4, 20, len(lengths), count), -1)
    for row, at, index in np.ndindex(*want.shape[:3]):
        text, here, order = stream[row].tolist(), past + at, lengths[index]
        seen = []
        for last in range(max(order - 1, here - window), here):
            gram, before = text[here - order + 1 : here + 1], text[last - order + 1 : last + 1]
            apart = doc_mask and t.BYTE_BOS in text[last + 1 : here + 1]
            if gram == before and -1 not in gram and not apart:
                seen.insert(0, text[last + 1])
        want[row, at, index, : len(seen)] = torch.tensor(seen[:count])
    want = want.flatten(2)
    assert torch.equal(induction.followers(tokens, history), want)
    assert (want >= 0).any() and (want < 0).any()
    state = model.start_state(history)
    x, _, _ = model.embed(model.context(tokens, state, t.Variant()))
    table, total = model.embed.weight, model.embed.weight[tokens]
    for index in range(len(lengths) * count):
        found = induction.gain[index] * table[want[..., index].clamp(min=0)] + induction.found[index]
        total = total + found * (want[..., index] >= 0).unsqueeze(-1)
    torch.testing.assert_close(x, t.rms_norm(total), rtol=1e-9, atol=1e-9)
    pull = torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    learned = (table, induction.gain, induction.found)
    got, exact = (torch.autograd.grad((y * pull).sum(), learned) for y in (x, t.rms_norm(total)))
    for mine, grad in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-9, atol=1e-9)


# ---- low-rank adapters and observers

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "factored": {"EMBED_DIM": 12},
    "untied": {"TIE_EMBEDDINGS": 0, "MLP_ACT": "swiglu"},
    "values": {"VALUE_RESIDUAL": 1, "NUM_LAYERS": 3, "RESIDUAL": "plain"},
}


def linear_names(model: t.GPT) -> set[str]:
    """Parameters that a Linear layer owns, by their path in the network."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, t.Linear)}


@pytest.mark.parametrize("option", OPTIONS)
def test_observer_sees_every_linear_layer_once_by_its_parameters_name(option: str) -> None:
    model = scrambled_model(**OPTIONS[option])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    seen: list[str] = []

    def observe(name: str, x: Tensor) -> None:
        assert x.shape[-1] == shapes[name][1]
        seen.append(name)

    tokens = torch.randint(0, 250, (2, 5), generator=torch.Generator().manual_seed(0))
    watched, _ = model.logits(tokens, t.Variant(), observe=observe)
    assert sorted(seen) == sorted([*linear_names(model), model.head_name(t.Variant())])
    matrices = {name for name, role in t.role_table(model).items() if role.group == "matrix"}
    assert set(seen) == {*matrices, model.head_name(t.Variant())}
    assert torch.equal(watched, model.logits(tokens, t.Variant())[0])


@pytest.mark.parametrize("batch", ["none", "one", "each"])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_low_rank_pairs_act_like_a_changed_weight(option: str, batch: str) -> None:
    """x W^T + x A B is a network whose W is W + (A B)^T: for all rows, or for each row its own."""
    model = scrambled_model(**OPTIONS[option])
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 250, (3, 6), generator=generator)
    plain, _ = model.logits(tokens, t.Variant())
    parameters = dict(model.named_parameters())
    lead = {"none": (), "one": (1,), "each": (3,)}[batch]
    for name in sorted(linear_names(model)):
        weight = parameters[name]
        down = torch.randn(*lead, weight.shape[1], 2, generator=generator, dtype=DOUBLE) / 4
        up = torch.randn(*lead, 2, weight.shape[0], generator=generator, dtype=DOUBLE) / 4
        got, _ = model.logits(tokens, t.Variant(), adapters={name: (down, up)})
        change, kept = (down @ up).mT.expand(3, *weight.shape), weight.clone()
        for row in range(3):
            weight.copy_(kept + change[row])
            want, _ = model.logits(tokens[row : row + 1], t.Variant())
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-9, atol=1e-9)
        weight.copy_(kept)
        assert (got - plain).abs().max() > 1e-4, f"{name}: the adapter has no effect"
    assert torch.equal(model.logits(tokens, t.Variant(), adapters={})[0], plain)
