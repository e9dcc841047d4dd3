"""Triton kernels of native sparse attention: against the backend of gathers in the interpreter, built for Hopper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_environment, scramble
from torch import Tensor

import train_gpt as t

BLOCK, STRIDE, SIZE, COUNT, WINDOW = 4, 2, 4, 5, 11  # of compressed keys, of chosen blocks, of near keys


def small_tiles() -> None:
    """Several tiles of queries and of keys, and several chunks, in short sequences."""
    for kernel in t.NSA_TILES:
        t.NSA_TILES[kernel] = (t.Tile(64, 16 if kernel == "importance" else 32, 4, 1),) * 2  # float32 takes half
    t.NSA_CHUNK, t.NSA_PROGRAMS, t.CHUNK_SUM_TILE = 9, 20, 64


def ages(rows: int, before: int, length: int) -> tuple[Tensor, Tensor]:
    """Queries' places after `before` cached tokens, and the first token of each one's document, (B, T)."""
    place = torch.arange(before + length).expand(rows, -1)
    starts = torch.where(torch.rand(place.shape) < 0.06, place, 0).cummax(1).values
    return place[:1, before:], starts[:, before:] if rows > 1 else 0 * place[:, before:]


def seen(kind: str, rows: int, before: int, length: int) -> tuple[t.Ranges, int]:
    """What queries see in a branch, as NSA.views has it, and how many keys there are."""
    place, begin = ages(rows, before, length)
    if kind == "compressed":
        low, high = (begin + STRIDE - 1) // STRIDE, ((place - BLOCK + 1) // STRIDE + 1).clamp(min=0)
        keys = max(0, (before + length - BLOCK) // STRIDE + 1)
    else:
        low, high, keys = begin, place + 1, before + length
        low = torch.maximum(low, place - WINDOW + 1) if kind == "near" else low
    return among(low, high, keys), keys


def among(low: Tensor, high: Tensor, keys: int) -> t.Ranges:
    return t.ranges_of(low, high, False, lambda i: (0, keys))


def drawn(rows: int, length: int, keys: int, groups: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(rows, length, groups * heads, width)
    k, v = torch.randn(2, rows, keys, groups, width)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def agree(mine: Any, other: Any, leaves: tuple[Tensor, ...]) -> None:
    """The same output and the same gradients."""
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(other)
    found = (torch.autograd.grad((y * weight).sum(), leaves) for y in (mine, other))
    for mine_too, other_too in zip(*found, strict=True):
        torch.testing.assert_close(mine_too, other_too, rtol=1e-4, atol=1e-5)


# Rows, cached tokens, queries, groups, heads of each, head size.
SHAPES = (
    (1, 0, 29, 1, 4, 16),
    (2, 0, 21, 1, 3, 16),
    (2, 19, 12, 1, 16, 16),
    (2, 9, 34, 2, 1, 32),
    (2, 40, 1, 1, 2, 16),
)


def check_near(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    for kind in ("near", "all"):
        ranges, keys = seen(kind, rows, before, length)
        leaves = drawn(rows, length, keys, *rest)
        agree(*(t.NSA_BACKENDS[name].near(*leaves, ranges) for name in ("triton", "gather")), leaves)


def check_compressed(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    ranges, keys = seen("compressed", rows, before, length)
    leaves, blocks = drawn(rows, length, keys, *rest), -(-(before + length) // SIZE)
    for form in ((BLOCK, STRIDE, SIZE, blocks, 0), (BLOCK, STRIDE, 12, -(-(before + length) // 12), 0)):
        found = [t.NSA_BACKENDS[name].compressed(*leaves, ranges, form) for name in ("triton", "gather")]
        agree(found[0][0], found[1][0], leaves)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
        assert float(found[0][1].detach().amin()) >= 0  # best_blocks orders by the bits of numbers without a sign


def check_selected(shape: tuple[int, ...]) -> None:
    rows, before, length, *rest = shape
    ranges, keys = seen("all", rows, before, length)
    for size in (SIZE, 12) if rest[0] == 1 and rows == 1 else (SIZE,):
        importance = torch.rand(rows, rest[0], length, -(-keys // size))
        chosen = t.best_blocks(importance, ranges, size, COUNT).blocks
        leaves = drawn(rows, length, keys, *rest)
        agree(*(t.NSA_BACKENDS[name].selected(*leaves, chosen, ranges, size) for name in ("triton", "gather")), leaves)


def check_nothing(_: tuple[int, ...]) -> None:
    """Queries with an empty choice, or an empty range among others, and a branch without any key."""
    mine, gather = t.NSA_BACKENDS["triton"], t.NSA_BACKENDS["gather"]
    q, k, v = leaves = drawn(1, 6, 20, 1, 2, 16)
    low, high = torch.tensor([[0, 2, 5, 9, 9, 20]]), torch.tensor([[0, 7, 5, 10, 20, 20]])
    agree(mine.near(*leaves, among(low, high, 20)), gather.near(*leaves, among(low, high, 20)), leaves)
    chosen = torch.tensor([[-1, -1], [0, -1], [-1, 1], [-1, -1], [1, 0], [-1, -1]]).view(1, 1, 6, 2)
    every, some = among(0 * low, 0 * low + 20, 20), torch.tensor([1, 2, 4])
    found = gather.selected(q[:, some], k, v, chosen[:, :, some], among(0 * low[:, some], high[:, [4] * 3], 20), 16)
    y = mine.selected(*leaves, chosen, every, 16)
    agree(y, torch.zeros_like(y).index_copy(1, some, found), leaves)
    nothing = drawn(1, 6, 0, 1, 2, 16)
    y, importance = mine.compressed(*nothing, among(0 * low, 0 * low, 0), (BLOCK, STRIDE, SIZE, 1, 0))
    assert not y.any() and not importance.any() and importance.shape == (1, 1, 6, 1)
    assert not torch.autograd.grad(y.sum(), nothing)[0].any()


def check_half(shape: tuple[int, ...]) -> None:
    """Near float32, with float16 of matrices, since the interpreter multiplies no bf16."""
    rows, before, length, *rest = shape
    ranges, keys = seen("near", rows, before, length)
    leaves = drawn(rows, length, keys, *rest)
    narrow = tuple(x.detach().half().requires_grad_() for x in leaves)
    y, wide = t.NSA_BACKENDS["triton"].near(*narrow, ranges), t.NSA_BACKENDS["gather"].near(*leaves, ranges)
    found = (y, *torch.autograd.grad(y.sum(), narrow))
    torch.testing.assert_close(t.NSA_BACKENDS["triton"].near(narrow[0], *leaves[1:], ranges), y)  # a state's keys
    for mine, exact in zip(found, (wide, *torch.autograd.grad(wide.sum(), leaves)), strict=True):
        assert mine.dtype == torch.float16
        torch.testing.assert_close(mine.float(), exact, rtol=0.01, atol=0.01)


MODEL = {
    "PRESET": "tiny", "VOCAB_SIZE": 256, "DEVICE": "cpu", "PRECISION": "fp32", "COMPILE": 0, "NUM_LAYERS": 1,
    "LAYER_PATTERN": "N", "MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "DOC_MASK": 1, "NSA_BLOCK": BLOCK,
    "NSA_STRIDE": STRIDE, "NSA_SELECT_BLOCK": SIZE, "NSA_SELECT": COUNT, "NSA_WINDOW": WINDOW,
}  # fmt: skip


def check_model(_: tuple[int, ...], **more: object) -> None:
    """A network compiled as one graph: the same loss and gradients."""
    found = []
    for backend in ("triton", "gather"):
        h = t.load_config({name: str(value) for name, value in {**MODEL, **more, "NSA_IMPL": backend}.items()})
        rt = t.start_runtime(h)
        assert t.with_backends(h, rt)[0].nsa_impl == backend
        model, tokens = scramble(t.build_model(h, rt, 255)).float(), torch.arange(40).view(1, 40) % 7
        tokens[:, 13] = 255
        loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True) if backend == "triton" else model.loss
        total = loss(tokens, tokens.roll(-1, 1), t.final_variant(h)).total
        found.append((total, *torch.autograd.grad(total, list(model.parameters()))))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def check_memory(shape: tuple[int, ...]) -> None:
    """The same with memory around segments: near keys are read without kernels then, and it is counted."""
    memory = {"RMT_SEGMENT": 16, "RMT_TOKENS": 3}
    check_model(shape, **memory)
    for more, count in (({}, 0), (memory, 1)):
        h = t.load_config({name: str(value) for name, value in {**MODEL, **more, "NSA_IMPL": "triton"}.items()})
        model, tokens = t.build_model(h, t.start_runtime(h), 255), torch.arange(32).view(1, 32)
        metrics = model.loss(tokens, tokens, t.Variant(measures=True)).metrics
        assert {float(value) for name, value in metrics.items() if name.endswith("fallbacks")} == {count}


CHECKS: dict[str, tuple[Callable[[tuple[int, ...]], None], tuple[tuple[int, ...], ...]]] = {
    "near": (check_near, SHAPES),
    "compressed": (check_compressed, SHAPES),
    "selected": (check_selected, SHAPES),
    "nothing": (check_nothing, SHAPES[:1]),
    "half": (check_half, SHAPES[:1]),
    "model": (check_model, SHAPES[:1]),
    "memory": (check_memory, SHAPES[:1]),
}
INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_nsa_kernels
test_nsa_kernels.run(sys.argv[3])
print("agree")
"""


def run(name: str) -> None:
    small_tiles()
    check, shapes = CHECKS[name]
    for number, shape in enumerate(shapes):
        torch.manual_seed(number)
        check(shape)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree_with_gathers_in_the_interpreter(name: str) -> None:
    """In a process of its own: kernels are interpreted or not from their definition on."""
    pytest.importorskip("triton")
    environment = {**clean_environment({}), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(ROOT), str(ROOT / "tests"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "agree", done.stderr


class Launches:
    """In a kernel's place: keeps with which arguments it would have run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.found = kernel, list[tuple[tuple[Any, ...], dict[str, int]]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.found.append((args, options))


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


def build(kernel: Any, args: tuple[Any, ...], options: dict[str, int]) -> Any:
    """A kernel compiled for an H100 as a launch would do it."""
    triton = pytest.importorskip("triton")
    assert len(args) == len(kernel.params)
    pairs = [(parameter.name, value) for parameter, value in zip(kernel.params, args, strict=True)]
    constants = {p.name: value for p, value in zip(kernel.params, args, strict=True) if p.is_constexpr}
    signature = {
        name: POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        for name, value in pairs
    } | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, (_, value) in enumerate(pairs) if isinstance(value, Tensor) or value % 16 == 0]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if pairs[i][0] not in constants}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)


KERNELS = (
    "ranged_kernel", "ranged_query_kernel", "ranged_key_kernel", "importance_kernel", "selected_kernel",
    "selected_query_kernel", "selected_key_kernel", "chunk_sum_kernel",
)  # fmt: skip


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)])
def test_kernels_build_for_hopper(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it is launched with the settings of the paper; loads run ahead by asynchronous copies."""
    pytest.importorskip("triton")
    launches = {name: Launches(getattr(t, name)) for name in KERNELS}
    for name, launch in launches.items():
        monkeypatch.setattr(t, name, launch)
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in drawn(2, 256, 256, 2, 16, width))
    place, backend = torch.arange(256).unsqueeze(0), t.NSA_BACKENDS["triton"]
    ranges = among(0 * place.expand(2, -1), place + 1, 256)
    backend.compressed(q, k, v, ranges, (32, 16, 64, 64, 0))[0].sum().backward()
    backend.selected(q, k, v, torch.zeros(2, 2, 256, 16, dtype=torch.int64), ranges, 64).sum().backward()
    for name, launch in launches.items():
        assert launch.found, name
        built = build(launch.kernel, *launch.found[0])
        assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024
        assert name == "chunk_sum_kernel" or "async_copy_global_to_local" in built.asm["ttgir"], name


@pytest.mark.parametrize("variables", [{}, {"MODEL_DIM": 24}, {"NUM_HEADS": 1, "MODEL_DIM": 256}])
def test_where_kernels_cannot_run_is_an_error_at_the_start(variables: dict[str, object]) -> None:
    settings = {**MODEL, "NSA_IMPL": "triton", "PARTIAL_ROPE_DIMS": 0, **variables}
    h = t.load_config({name: str(value) for name, value in settings.items()})
    rt = t.start_runtime(h)
    for here in (rt, rt._replace(device=torch.device("cuda"), dtype=torch.float64)):
        with pytest.raises(t.UserError, match="NSA_IMPL=triton needs .*; try NSA_IMPL=auto"):
            t.with_backends(h, here)
    if variables:
        with pytest.raises(t.UserError, match="heads of 16, 32, 64 or 128"):
            t.with_backends(h, rt._replace(device=torch.device("cuda")))
    other = t.load_config({name: str(value) for name, value in MODEL.items()})
    chosen, why = t.with_backends(other, rt)
    assert chosen.nsa_impl == "gather" and "sparse attention:gather (nothing is measured to be faster)" in why
    assert other.used()["NSA_BACKENDS"] == ("gather",)


def test_a_kernel_is_the_default_where_it_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    h = t.load_config({name: str(value) for name, value in {**MODEL, "PARTIAL_ROPE_DIMS": 0}.items()})
    rt = t.start_runtime(h)._replace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(t, "NSA_FASTEST", {(9, 0): "triton"})
    assert t.choose_sparse(h, rt)[0] == "triton" and h.used()["NSA_BACKENDS"] == ("triton", "gather")
    narrow = t.load_config({name: str(value) for name, value in {**MODEL, "MODEL_DIM": 24}.items()})
    assert t.choose_sparse(narrow, rt) == ("gather", "kernels need heads of 16, 32, 64 or 128, not 12")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert t.choose_sparse(h, rt) == ("gather", "nothing is measured to be faster")
