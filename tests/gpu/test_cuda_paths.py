"""What only a GPU can show: presets causal there, attention backends alike, rotary angles exact, compiled = eager."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SMALL = {"NUM_LAYERS": "3", "TRAIN_SEQ_LEN": "128", "TRAIN_BATCH_TOKENS": "512", "MICRO_BATCH_TOKENS": "512"}

FEWER = {  # what SMALL's few layers and short windows do not allow
    "hc": {"BACKOUT": "1"},
    "frontier": {"RECURRENCE_LAYERS": "1-2", "HC_START": "1"},
    "nsa_125m": {"CURRICULUM_STAGES": "0:1"},
    "mac_rmt_mhc_lite": {"RMT_SEGMENT": "64"},
}


def build(preset: str, **more: str) -> tuple[t.Hyperparameters, t.Runtime, t.GPT]:
    """A preset at its own width and vocabulary but few layers, with all weights drawn (none starts at zero)."""
    h = t.load_config({"PRESET": preset, "DEVICE": "cuda", **SMALL, **FEWER.get(preset, {}), **more})
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, 1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn if parameter.ndim == 2 else parameter.cpu() + 0.1 * drawn)
    return h, rt, model


@pytest.mark.parametrize("preset", t.PRESETS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_later_token_moves_an_earlier_logit(preset: str, precision: str) -> None:
    h, rt, model = build(preset, PRECISION=precision)
    tokens = torch.randint(2, h.vocab_size, (2, 128), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad(), rt.precision():
        whole, _ = model.logits(tokens, t.final_variant(h))
        for at in (1, 63, 64, 127):
            changed = tokens.clone()
            changed[:, at:] = (changed[:, at:] + 1) % h.vocab_size
            other, _ = model.logits(changed, t.final_variant(h))
            assert torch.equal(whole[:, :at], other[:, :at])
            assert not torch.equal(whole[:, at:], other[:, at:])


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("backend", ["fa3", "fa2"])
def test_flash_attention_agrees_with_sdpa(backend: str, window: int) -> None:
    if find_spec(t.ATTENTION_PACKAGES[backend]) is None:
        pytest.skip(f"{backend} is not installed")
    q, k, v = (torch.randn(2, 256, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 4, 4))
    key = torch.arange(256, device="cuda")
    mask = (key <= key[:, None]) & (key > key[:, None] - (window or 256))
    expected = t.sdpa(q.float(), k.float(), v.float(), mask, False)
    assert (t.ATTENTION[backend](q, k, v, window, None).float() - expected).abs().max() < 2e-2
    documents = (torch.rand(2, 256, device="cuda") < 0.05).cumsum(1)
    mask = mask & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    expected = t.sdpa(q.float(), k.float(), v.float(), mask, False)
    assert (t.ATTENTION[backend](q, k, v, window, documents).float() - expected).abs().max() < 2e-2


def test_masked_and_causal_sdpa_agree_in_bf16() -> None:
    q, k, v = (torch.randn(2, 256, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 4, 4))
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril()
    assert (t.sdpa(q, k, v, None, True).float() - t.sdpa(q, k, v, mask, False).float()).abs().max() < 2e-2


def test_rotary_angles_are_exact_at_64k() -> None:
    h = t.load_config({"PRESET": "attn", "DEVICE": "cuda"})
    positions = torch.tensor([[0, 1, 4095, 4096, 65535, 65536, 2**20 + 1]], device="cuda")
    cosine, sine = t.Rotary(h).cuda()(positions)
    assert cosine.dtype == torch.float32
    angles = positions.cpu().numpy()[0][:, None] * t.rotary_frequencies(h)[0]
    for found, expected in ((cosine, np.cos(angles)), (sine, np.sin(angles))):
        assert np.abs(found[0, :, 0].cpu().double().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(("precision", "error", "floor"), [("bf16", 0.1, 1e-4), ("fp32", 2e-2, 1e-5)])
@pytest.mark.parametrize("preset", ["attn", "ternary", "local", "skc_small", "nsa", "mhc_lite"])
def test_compiled_loss_and_gradients_agree_with_eager(preset: str, precision: str, error: float, floor: float) -> None:
    """But for rounding (TF32 in float32), of which a gradient that is next to nothing has more than of itself: the
    compiled one may be 1.5 times as far from the eager one as that is from what float32 (TF32) gives."""
    h, rt, model = build(preset, PRECISION=precision)
    tokens = torch.randint(2, h.vocab_size, (4, 129), generator=torch.Generator().manual_seed(1)).cuda()
    compiled, found = torch.compile(model.loss, dynamic=False, fullgraph=True), []
    for loss_of, arithmetic in ((model.loss, rt.precision()), (compiled, rt.precision()), (model.loss, nullcontext())):
        model.zero_grad()
        with arithmetic:
            out = loss_of(tokens[:, :-1], tokens[:, 1:], t.final_variant(h))
        (out.total / tokens.numel()).backward()
        grads = {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((float(out.total.detach()) / tokens.numel(), grads))
    whole = sum(float(grad.square().sum()) for grad in found[0][1].values()) ** 0.5
    assert abs(found[0][0] - found[1][0]) < error / 10
    exact = found[2][1]
    wrong = {n: (g - found[1][1][n]).norm() - 1.5 * (g - exact[n]).norm() for n, g in found[0][1].items()}
    assert not {n: float(x) for n, x in wrong.items() if x > error * (found[0][1][n].norm() + floor * whole)}


@pytest.mark.parametrize("preset", ["hc", "mhc_static"])
@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.1), ("fp32", 1e-2)])
def test_kernels_of_lanes_agree_with_sums(
    preset: str, precision: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of the whole network; most of them are of the connections' own parameters."""
    h, rt, model = build(preset, PRECISION=precision)
    tokens = torch.randint(2, h.vocab_size, (4, 129), generator=torch.Generator().manual_seed(1)).cuda()
    assert model.residual.fuses(torch.zeros(1).cuda())
    found = []
    for fuses in (model.residual.fuses, lambda x: False):
        monkeypatch.setattr(model.residual, "fuses", fuses)
        model.zero_grad()
        with rt.precision():
            out = model.loss(tokens[:, :-1], tokens[:, 1:], t.final_variant(h))
        (out.total / tokens.numel()).backward()
        found.append({n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None})
    wrong = {n: float((g - found[1][n]).norm() / (g.norm() + 1e-12)) for n, g in found[0].items()}
    assert not {n: x for n, x in wrong.items() if x > error}


@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 70, 33), (4, 1000, 768)])
def test_scan_kernels_agree_with_the_plain_scan(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)).cuda()
    b, grad = (torch.randn(shape, generator=generator).cuda() for _ in range(2))
    h0 = torch.randn(shape[0], shape[2], generator=generator).cuda()
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    fused, plain = (t.ScanFunction.apply(*leaves, kernel) for kernel in (True, False))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    for mine, other in zip(*(torch.autograd.grad((h * grad).sum(), leaves) for h in (fused, plain)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("width", "groups", "heads"), [(64, 2, 16), (128, 2, 16), (64, 3, 2), (32, 2, 1)])
def test_sparse_attention_kernels_agree_with_gathers_in_float64(
    width: int, groups: int, heads: int, dtype: torch.dtype, error: float
) -> None:
    """Each branch's output and gradients, by the norm of the difference; three documents, a length of no tile."""
    torch.manual_seed(0)
    length, form = 1500, (32, 16, 64, 24, 0)
    place = torch.arange(length, device="cuda").expand(2, -1)
    begin = torch.where((place == 300) | ((place == 997) & (torch.arange(2, device="cuda")[:, None] == 1)), place, 0)
    begin = begin.cummax(1).values
    tokens, near, coarse = (
        t.ranges_of(low, high, False, lambda i: (0, length))
        for low, high in (
            (begin, place + 1), (torch.maximum(begin, place - 511), place + 1),
            ((begin + 15) // 16, ((place - 31) // 16 + 1).clamp(min=0)),
        )
    )  # fmt: skip
    blocks = (length - 32) // 16 + 1
    coarse = t.ranges_of(coarse.low, coarse.high, False, lambda i: (0, blocks))
    q, k, v = (torch.randn(2, length, n, width, device="cuda", dtype=dtype) for n in (groups * heads, groups, groups))
    narrow, leaves = ([x.detach().to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64))
    weight = torch.randn(q.shape, device="cuda", dtype=dtype)
    first, exact = t.NSA_BACKENDS["triton"], t.NSA_BACKENDS["gather"]

    def compressed(backend: t.NSABackend, x: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return backend.compressed(x[0], x[1][:, :blocks], x[2][:, :blocks], coarse, form)

    importance = compressed(exact, leaves)[1]
    assert (compressed(first, narrow)[1] - importance).norm() <= error * importance.norm()
    chosen = t.best_blocks(importance, tokens, 64, 16).blocks
    for branch in (
        lambda backend, x: compressed(backend, x)[0],
        lambda backend, x: backend.selected(*x, chosen, tokens, 64),
        lambda backend, x: backend.near(*x, near),
    ):
        y, other = branch(first, narrow), branch(exact, leaves)
        grads = torch.autograd.grad((y * weight).sum(), narrow), torch.autograd.grad((other * weight).sum(), leaves)
        for mine, wanted in ((y, other), *zip(*grads, strict=True)):
            assert (mine.double() - wanted).norm() <= error * wanted.norm()


def test_codecs_give_the_same_bits_on_gpu_and_cpu() -> None:
    h = t.load_config({"PRESET": "ternary"})
    weights = torch.randn(3, 96, 300, generator=torch.Generator().manual_seed(3))
    for name in t.CODECS:
        codec = t.CODECS[name](h)
        there, here = (codec.quantize(w, t.default_tuning(w)) for w in (weights.cuda(), weights))
        # A mean summed in another order may round to the next bf16; whatever came out must decode alike.
        assert torch.equal(
            codec.decode(there).cpu(), codec.decode(t.Codes(*(x if x is None else x.cpu() for x in there)))
        )
        assert (there.codes.cpu() != here.codes).float().mean() < 1e-3


def test_loader_delivers_the_same_batches_as_on_the_cpu(byte_data: Path) -> None:
    settings = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DATA_PATH": str(byte_data)}
    runs = []
    for device in ("cuda", "cpu"):
        h = t.load_config({**settings, "DEVICE": device})
        loader = t.Loader(h, t.start_runtime(h), t.BYTE_BOS)
        runs.append([loader.next(8, 32).tokens.cpu() for _ in range(50)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
