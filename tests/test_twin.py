"""The MLX twin against train_gpt.py: same text where text can be the same, same numbers where arrays are computed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_structure as structure
import torch
from conftest import ROOT, SKC_KINDS, TOPOLOGIES, small_stages

import train_gpt as t

mx = pytest.importorskip("mlx.core")

import train_gpt_mlx as m  # noqa: E402

SMALL = {
    "VOCAB_SIZE": "256", "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1",
    "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "64", "MICRO_BATCH_TOKENS": "64", "HOLDOUT_TOKENS": "400",
    "SKC_BLOCK_SIZE": "4", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "FEEDBACK_DIM": "8", "GROUP_SIZE": "16",
    "NSA_BLOCK": "4", "NSA_STRIDE": "2", "NSA_SELECT_BLOCK": "4", "NSA_SELECT": "3", "NSA_WINDOW": "6",
    "DEVICE": "cpu", "COMPILE": "0", "PRECISION": "fp32", "EVAL_STREAMS": "3", "MAX_VAL_TOKENS": "600",
    "MUON_MOMENTUM_WARMUP_STEPS": "10", "ITERATIONS": "20", "MAX_WALLCLOCK_SECONDS": "0",
}  # fmt: skip


def small_preset(preset: str) -> dict[str, str]:
    """A preset's structure at a size for tests."""
    whole = t.load_config({"PRESET": preset})
    more = {"PARTIAL_ROPE_DIMS": "8"} if whole.partial_rope_dims else {}
    more |= {"EMBED_DIM": "16"} if whole.embed_dim else {}
    more |= {"BACKOUT": "0"} if whole.backout >= 0 else {}
    more |= {"TTT_SCOPE": "off"} if whole.ttt_scope != "off" else {}  # first pairs are other random numbers there
    if whole.ngram_orders:
        more |= {"BIGRAM_HASH_BUCKETS": "67", "BIGRAM_HASH_DIM": str(4 * len(whole.ngram_orders))}
    return {**SMALL, "PRESET": preset, **more, **small_stages(preset)}


OPTIONS: dict[str, dict[str, str]] = {
    "attention": {
        "VALUE_RESIDUAL": "1", "VALUE_EMBED": "1", "ATTN_WINDOW": "9", "ATTN_GATE": "8",
        "SMEAR_GATE": "8", "PROJ_NORM": "1", "MLP_ACT": "swiglu", "LABEL_SMOOTHING": "0.1", "TIE_EMBEDDINGS": "0",
        "YARN_FACTOR": "2", "LOGIT_SOFTCAP": "0", "STOCHASTIC_DEPTH": "0.3", "LN_SCALE": "1",
    },
    # A first token's attention less its own value is a rounding error, which a norm behind it would make large.
    "own values taken off": {"XSA_LAYERS": "1", "PROJ_NORM": "0"},
    "untied, recomputed": {"UNTIE_AT_FRACTION": "0.5", "GRAD_CHECKPOINT": "1", "EMA_DECAY": "0.9", "MUON_WD": "0.1"},
    "clipped, jordan": {"GRAD_CLIP_NORM": "0.3", "ADAM_WD": "0.1", "MUON_ROW_NORM": "0", "MUON_COEFFS": "jordan"},
}  # fmt: skip


def course_of(h: t.Hyperparameters) -> dict[str, Any]:
    """The fields that shape the network and its course."""
    apart = {"val_loss_every", "val_batch_size", "train_log_every", "save_every", "preset", "hard_budget_bytes"}
    return {name: value for name, value in dataclasses.asdict(h).items() if name not in apart}


EXACT = {"MATRIX_CODEC": "exact", "FP_STORAGE": "exact", "SCALAR_CODEC": "exact"}
CASES = {
    **{preset: {**small_preset(preset), **EXACT} for preset in t.PRESETS},
    **{name: {**SMALL, **EXACT, **more} for name, more in {**OPTIONS, **SKC_KINDS, **TOPOLOGIES}.items()},
}
# At this size some presets are the same network and the same course, so that one of them stands for all.
DISTINCT = list({tuple(course_of(t.load_config(env)).items()): name for name, env in CASES.items()}.values())


def configs(case: str, **more: str) -> tuple[t.Hyperparameters, m.Hyperparameters]:
    environ = {**CASES[case], **more}
    return t.load_config(environ), m.load_config(environ)


# ---- text


def definitions(name: str) -> dict[str, str]:
    """The text of each module-level definition by its name; a program's own name in it is the same in both."""
    source = (ROOT / name).read_text(encoding="utf-8").replace("train_gpt_mlx.py", "train_gpt.py")
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else names:
            found[name] = node
    lines = source.splitlines()
    return {name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for name, node in found.items()}


# What tells that a definition computes with arrays of torch or MLX, or is about them.
LIBRARIES = re.compile(r"\b(torch|F|nn|dist|Tensor|mx|mlx|MLX|triton)\b")
METHODS = re.compile(r"\.(numel|cpu|clone|item|parameters|named_parameters|argmax)\b|log_softmax|grads|gradients")


def test_what_knows_no_array_library_is_the_same_text_in_both_files() -> None:
    ours, twins = definitions("train_gpt.py"), definitions("train_gpt_mlx.py")
    pairs = {name: (ours[name], twins[name]) for name in ours if name in twins}
    free = {n: pair for n, pair in pairs.items() if not any(LIBRARIES.search(x) or METHODS.search(x) for x in pair)}
    assert len(free) > 200 and {"write_artifact", "ByteTable", "plan_sites", "SKC_STACK"} <= set(free)
    different = [name for name, (one, two) in free.items() if one != two]
    assert not different, f"make them the same again in both files: {different}"


def test_config_is_the_same_text_in_both_files() -> None:
    """All of section 1 behind the module docstring, help included."""
    sections = []
    for name in ("train_gpt.py", "train_gpt_mlx.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        sections.append(text[text.index("# ==== 1. CONFIG") : text.index("import numpy as np")].split("import mlx")[0])
    assert sections[0] == sections[1]


STRUCTURE = [
    structure.test_every_section_says_what_it_gives_and_needs, structure.test_no_section_uses_what_a_later_one_defines,
    structure.test_every_variable_is_read_somewhere, structure.test_no_evaluated_code_and_no_namespace_tricks,
    structure.test_attributes_are_not_looked_up_by_text,
    structure.test_attributes_of_layers_are_set_when_they_are_built, structure.test_no_broad_except,
    structure.test_environment_is_read_in_config_runtime_and_main_only,
    structure.test_only_the_log_and_the_command_line_print, structure.test_every_module_level_name_is_used,
    structure.test_classes_and_functions_say_what_they_are, structure.test_everything_is_annotated,
    structure.test_file_and_lines_stay_within_bounds, structure.test_functions_stay_short,
    structure.test_no_block_is_repeated, structure.test_functions_are_flat, structure.test_functions_take_few_arguments,
]  # fmt: skip


@pytest.mark.parametrize("rule", STRUCTURE, ids=lambda rule: rule.__name__)
def test_the_file_has_the_shape_of_the_other_one(rule: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "train_gpt_mlx.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    banners = [(i, found) for i, line in enumerate(lines, 1) if (found := structure.BANNER.fullmatch(line))]
    assert [found[2] for _, found in banners] == structure.SECTIONS
    for name, value in (("SOURCE", source), ("LINES", lines), ("TREE", ast.parse(source)), ("BANNERS", banners)):
        monkeypatch.setattr(structure, name, value)
    rule()


# ---- networks


def some_weights(h: t.Hyperparameters, bos: int, noise: float) -> dict[str, np.ndarray]:
    """Initial weights, moved a little so that none is zero, through an artifact of exact codecs, read by the twin."""
    model, generator = t.build_model(h, t.start_runtime(h), bos), torch.Generator().manual_seed(0)
    tensors = []
    for name, weight in model.named_parameters():
        weight = weight.detach() + noise * torch.randn(weight.shape, generator=generator)
        tensors.append(t.Coded(name, "exact", weight.numpy(), None))
    return m.decode_artifact(t.write_artifact(h, iter(tensors), {}).data)[1]


def pair_of(case: str, **more: str) -> tuple[t.GPT, m.GPT]:
    """The same network with the same weights in both programs."""
    ours, twins = configs(case, **more)
    one = t.build_model(ours, t.start_runtime(ours), 255)
    two = m.build_model(twins, m.start_runtime(twins), 255, fill=False)
    assert {n: tuple(p.shape) for n, p in one.named_parameters()} == {n: p.shape for n, p in two.named_parameters()}
    assert [tuple(site) for site in one.sites] == [tuple(site) for site in two.sites]
    assert {n: tuple(role) for n, role in t.role_table(one).items()} == {
        n: tuple(role) for n, role in m.role_table(two).items()
    }
    weights = some_weights(ours, 255, 0.03)
    t.load_weights(one, weights)
    m.load_weights(two, weights)
    return one, two


def some_batch(h: t.Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
    """(4, T + 1) tokens with documents and repetitions, and what came before them."""
    draw = np.random.default_rng(1)
    tokens = np.where(draw.random((4, h.train_seq_len + 1)) < 0.1, 255, draw.integers(0, 20, (4, h.train_seq_len + 1)))
    return tokens, draw.integers(-1, 20, (4, h.history))


def dense(grad: torch.Tensor | None) -> np.ndarray | None:
    return None if grad is None else (grad.to_dense() if grad.is_sparse else grad).numpy()


@pytest.mark.parametrize("case", DISTINCT)
def test_network_gives_the_same_logits_loss_and_gradients(case: str) -> None:
    one, two = pair_of(case)
    tokens, history = some_batch(one.h)
    for variant in dict.fromkeys(t.variant_at(one.h, progress) for progress in (0.0, 1.0)):
        ours = variant._replace(measures=True)
        twins = m.Variant(*ours)
        want, _ = one.logits(torch.tensor(tokens[:, :-1]), ours, one.start_state(torch.tensor(history)))
        found, _ = two.logits(mx.array(tokens[:, :-1]), twins, two.start_state(mx.array(history)))
        np.testing.assert_allclose(np.array(found), want.detach().numpy(), atol=1e-4, rtol=0)
        moment = t.Moment(torch.tensor(0.5), torch.tensor(3), torch.arange(4))
        out = one.loss(*split(torch.tensor(tokens)), ours, one.start_state(torch.tensor(history)), moment)
        one.zero_grad()
        (out.total / 128 + sum(out.losses.values()) / 4).backward()
        batch = m.Batch(*split(mx.array(tokens)), mx.array(history), 0, 128)
        moment = m.Moment(mx.array(0.5), mx.array(3, mx.int64), mx.arange(4, dtype=mx.int64))
        got = m.Passes(two.h, m.start_runtime(two.h), two)(batch, two.start_state(batch.history), moment, twins, 4)
        assert got.nats.item() == pytest.approx(out.total.item(), rel=1e-5)
        assert got.metrics.keys() == out.metrics.keys()
        traced = m.Passes(two.h, m.start_runtime(two.h)._replace(compile=True), two)
        again = traced(batch, two.start_state(batch.history), moment, twins, 4)  # a graph; it is not computed
        assert {n: g.shape for n, g in again.grads.items()} == {n: g.shape for n, g in got.grads.items()}
        for name, weight in one.named_parameters():
            grad = dense(weight.grad)
            assert (grad is None) == (name not in got.grads), name
            if grad is not None:
                error, size = np.abs(np.array(got.grads[name]) - grad).max(), np.abs(grad).max()
                assert error <= 1e-4 * size + 1e-8, f"{name}: {error} of {size}"


def split(tokens: Any) -> tuple[Any, Any]:
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("case", DISTINCT)
def test_network_carries_the_same_states(case: str) -> None:
    one, two = pair_of(case)
    tokens, _ = some_batch(one.h)
    ours, twins = one.init_state(4), two.init_state(4)
    for start, stop in ((0, 5), (5, 6), (6, 23), (23, 32)):
        want, ours = one.logits(torch.tensor(tokens[:, start:stop]), t.scoring_variant(one.h), ours)
        found, twins = two.logits(mx.array(tokens[:, start:stop]), m.scoring_variant(two.h), twins)
        np.testing.assert_allclose(np.array(found), want.detach().numpy(), atol=1e-4, rtol=0)


# ---- training


def losses_of(program: Any, h: Any, weights: dict[str, np.ndarray], steps: int) -> Iterator[float]:
    """Training losses of the first steps from given weights, with the schedules of a run of so many steps."""
    s = program.open_session(h, program.start_runtime(h), Path("."), program.Log(None, False))
    for bank in s.weights.banks.values():
        stacked = np.stack([weights[name] for name in bank.names])
        bank.latent = (mx.array if program is m else torch.tensor)(stacked, dtype=s.rt.dtype)
    s.weights.materialize(0.0)
    step, state = program.make_step(s), program.TrainState()
    if h.carry_train:
        state.carry = s.model.init_state(h.train_batch_tokens // h.train_seq_len)
    for number in range(steps):
        progress = number / steps
        program.switch_variant(s, state, progress)
        tokens, length = program.stage_at(h.stages, progress), program.stage_at(h.lengths, progress)
        out = step(s.loader.next(tokens // length, length), state, progress)
        how = (program.rate_scale(h, number, 0.0), program.muon_momentum(h, number), h.ema_decay > 0, progress)
        if program is m:
            s.optimizer.step(out.grads, *how)
        else:
            s.optimizer.step(*how)
            s.weights.clear_gradients()
        state.carry, state.step = out.carry, number + 1
        yield out.nats.item() / tokens


def courses_of(
    environ: dict[str, str], steps: int = 20, nudge: float = 0.0, programs: tuple = (t, m)
) -> Iterator[np.ndarray]:
    """The course of each program from the same initial weights, of the last one with weights nudged by a random part.

    PRECISION=fp64 takes rounding out of the comparison, which float32 courses below amplify up to 100,000 times.
    """
    weights, draw = some_weights(t.load_config(environ), 255, 0.0), np.random.default_rng(0)
    for number, program in enumerate(programs):
        change = nudge if number == len(programs) - 1 else 0.0
        moved = {n: (w * (1 + change * draw.standard_normal(w.shape))).astype(np.float32) for n, w in weights.items()}
        yield np.array([*losses_of(program, program.load_config(environ), moved, steps)])


@pytest.mark.parametrize("case", DISTINCT)
def test_training_takes_the_same_course(case: str, byte_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: at most 2e-5, without the noise on copies of experts, for which each library has its own generator."""
    for program in (t, m):
        copy = program.Weights.copy_weight
        monkeypatch.setattr(program.Weights, "copy_weight", lambda self, a, b, noise=0.0, copy=copy: copy(self, a, b))
    want, found = courses_of({**CASES[case], "DATA_PATH": str(byte_data), "PRECISION": "fp64"})
    assert want[-1] < want[0] - 0.5
    np.testing.assert_allclose(found, want, atol=1e-3, rtol=0)


# The presets as they are stored: what differs in the codecs alone is a course of its own here.
STORED = list({tuple(course_of(t.load_config(small_preset(name))).items()): name for name in t.PRESETS}.values())


@pytest.mark.parametrize("preset", STORED)
def test_quantized_training_takes_the_same_course(preset: str, byte_data: Path) -> None:
    """Ternary weights, bf16 embeddings: a latent near a threshold may get another code. Found: at most 0.0009."""
    want, found = courses_of({**small_preset(preset), "DATA_PATH": str(byte_data), "PRECISION": "fp64"})
    assert want[-1] < want[0] - 0.5
    np.testing.assert_allclose(found, want, atol=1e-2, rtol=0)


def is_rough(h: t.Hyperparameters) -> bool:
    """Whether rounding errors grow: experts and blocks are chosen, hyper-connections begin with lanes that are alike.

    A lane that is x0 times a number has no effect behind a norm until a branch has written to it: keep and bias have
    gradients that are rounding errors alone, near ADAM_EPS, and AdamW makes whole steps of them. Those of float64 are
    far below it, and make none.
    """
    return h.residual == "hc" or bool(h.moe_experts) or "nsa" in h.mixers or h.mhc_gate_noise > 0


@pytest.mark.parametrize("case", [case for case in DISTINCT if not is_rough(configs(case)[0])])
def test_training_in_float32_takes_the_same_course(case: str, byte_data: Path) -> None:
    want, found = courses_of({**CASES[case], "DATA_PATH": str(byte_data)})
    np.testing.assert_allclose(found, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", [case for case in DISTINCT if configs(case)[0].residual == "hc"])
def test_hyper_connections_in_float32_part_from_themselves_as_far(case: str, byte_data: Path) -> None:
    """Why the twin's float32 course is only near: train_gpt.py's own is no nearer when weights change by 1e-7."""
    environ = {**CASES[case], "DATA_PATH": str(byte_data)}
    want, found = courses_of(environ)
    again = [np.abs(list(courses_of(environ, nudge=size, programs=(t, t)))[1] - want).max() for size in (1e-7, 2e-7)]
    assert max(again) > 1e-3 and np.abs(found - want).max() < 2e-2


def test_no_preset_has_another_role_for_a_parameter() -> None:
    """At full size, where arrays are shapes: torch's on its meta device, MLX's because nothing asks for values."""
    for preset in t.PRESETS:
        with torch.device("meta"):
            one = t.GPT(t.load_config({"PRESET": preset}), 1)
        two = m.GPT(m.load_config({"PRESET": preset}), 1)
        shapes = {name: tuple(weight.shape) for name, weight in one.named_parameters()}
        assert shapes == {name: weight.shape for name, weight in two.named_parameters()}
        want, found = t.role_table(one), m.role_table(two)
        assert {n: tuple(role) for n, role in found.items()} == {n: tuple(role) for n, role in want.items()}
        assert t.flops_per_token(one) == m.flops_per_token(two)


# ---- codecs and artifacts

CODEC_SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "turned, searched": {"TURBO_QUANT_TRAIN": "1", "TERNARY_SCALE": "lstsq", "CLIP_SEARCH": "1"},
    "rows, clipped": {"CLIP_SIGMA": "2.5", "INT_GROUP": "0"},
}


@pytest.mark.parametrize("setting", CODEC_SETTINGS)
def test_codecs_give_the_same_bits(setting: str) -> None:
    environ = {"PRESET": "tiny", **CODEC_SETTINGS[setting]}
    draw, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    w = (draw.standard_normal((3, 7, 48)) * np.exp(draw.standard_normal((3, 7, 1)) * 3)).astype(np.float32)
    w[0, 0] = 0
    tuning = t.Tuning(*(torch.rand((3, 1, 1), generator=generator) + 0.3 for _ in range(2)))
    for name in t.CODECS:
        one, two = t.CODECS[name](t.load_config(environ)), m.CODECS[name](m.load_config(environ))
        want = one.quantize(torch.tensor(w), tuning)
        found = two.quantize(mx.array(w), m.Tuning(*(mx.array(x.numpy()) for x in tuning)))
        np.testing.assert_array_equal(np.array(found.codes), want.codes.numpy(), name)
        scales = None if want.scales is None else want.scales.numpy()
        if scales is not None:
            np.testing.assert_array_equal(np.array(found.scales), scales, name)
        np.testing.assert_array_equal(np.array(two.decode(found)), one.decode(want).numpy(), name)
        np.testing.assert_array_equal(np.array(two.decode(found)), two.decode_numpy(want.codes.numpy(), scales), name)


def scored(program: Any, h: Any, data: bytes, variables: dict[str, float] | None = None) -> Any:
    """The score of an artifact by a program."""
    header, arrays = program.decode_artifact(data)
    rt, tokenizer = program.start_runtime(h), program.load_tokenizer(h)
    model = program.build_model(h, rt, tokenizer.bos, fill=False)
    program.load_weights(model, arrays)
    calibration = variables or header["calibration"]
    return program.Scorer(h, rt, model, tokenizer.byte_table(), calibration).score(program.read_validation(h))


ARTIFACTS = {
    "ternary": {"PRESET": "tiny"},
    "many": {"PRESET": "tiny", "CODEC_MAP": "mlp.up:fp4,mlp.down:int5,attn.proj:binary", "FP_STORAGE": "fp8"},
    "hybrid": small_preset("hybrid_mac"),
}


def test_weights_settle_into_the_codecs_of_the_file_and_back() -> None:
    """What EXPORT_PROXY_EVAL measures with EXPORT_MODE=mixed."""
    one, two = pair_of("tiny", EXPORT_MODE="mixed")
    ours, twins = t.Weights(one), m.Weights(two)
    found = []
    for inside in (True, False):
        with ours.settled() if inside else nullcontext(), twins.settled() if inside else nullcontext():
            ours.materialize(1.0)
            twins.materialize(1.0)
        want = {name: weight.detach().numpy().copy() for name, weight in one.named_parameters()}
        found.append({name: np.array(weight) for name, weight in two.named_parameters()})
        for name, weight in found[-1].items():
            np.testing.assert_array_equal(weight, want[name], name)
    assert not np.array_equal(found[0]["embed.weight"], found[1]["embed.weight"])
    assert {key: (b.role, type(b.codec).__name__) for key, b in twins.banks.items()} == {
        key: (b.role, type(b.codec).__name__) for key, b in ours.banks.items()
    }


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_artifact_of_either_program_is_read_by_the_other(kind: str, byte_data: Path) -> None:
    environ = {**SMALL, **ARTIFACTS[kind], "DATA_PATH": str(byte_data)}
    ours, twins = t.load_config(environ), m.load_config(environ)
    latents = some_weights(ours, 255, 0.05)
    one = t.build_model(ours, t.start_runtime(ours), 255)
    two = m.build_model(twins, m.start_runtime(twins), 255, fill=False)
    t.load_weights(one, latents)
    m.load_weights(two, latents)
    prints = {"data": "d", "tokenizer": "byte"}
    want = t.write_artifact(ours, t.coded_tensors(t.Weights(one)), prints).data
    found = m.write_artifact(twins, m.coded_tensors(m.Weights(two)), prints).data
    assert found == want, "the same weights make the same bytes"
    scores = scored(t, ours, found), scored(m, twins, want)
    assert scores[0].bytes == scores[1].bytes and scores[0].tokens == scores[1].tokens
    assert scores[1].bpb == pytest.approx(scores[0].bpb, abs=1e-5)


EVALUATIONS: dict[str, dict[str, str]] = {
    "sliding": {"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "8", "MAX_VAL_TOKENS": "61"},  # a last chunk of five
    "carried": {"ATTN_WINDOW": "24", "CARRY_EVAL": "1", "KV_CACHE": "int8"},
    "n-grams": {"NGRAM_CACHE": "1", "EVAL_ENGRAM": "1", "EVAL_ENGRAM_BUCKETS": "64", "TEMP_SCALING": "1"},
    "scalars": {"TTT_SCOPE": "scalars", "TTT_LR": "0.01", "TTT_CHUNK_TOKENS": "64"},
    "all, adam": {"TTT_SCOPE": "all", "TTT_OPTIMIZER": "adam", "TTT_LR": "0.001", "TTT_EPOCHS": "2"},
    "global": {"TTT_SCOPE": "global", "TTT_LR": "0.01", "TTT_PHASES": "2"},
    "lora": {"TTT_SCOPE": "lora", "TTT_LR": "0.1", "TTT_RANK": "2"},
}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_every_way_of_scoring_gives_the_same(kind: str, byte_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**SMALL, **EXACT, **EVALUATIONS[kind], "DATA_PATH": str(byte_data)}
    ours, twins = t.load_config(environ), m.load_config(environ)
    weights = some_weights(ours, 255, 0.05)
    data = t.write_artifact(ours, (t.Coded(n, "exact", w, None) for n, w in weights.items()), {}).data

    def same_pair(self: Any, name: str, weight: Any) -> dict[str, Any]:
        """The first low-rank pair, random numbers of torch's generator in both."""
        own = t.TestTimeTraining(ours).first_pair(name, torch.zeros(weight.shape))
        return {part: mx.array(value.numpy()) for part, value in own.items()}

    monkeypatch.setattr(m.TestTimeTraining, "first_pair", same_pair)
    want, found = (scored(*how, data, {"temperature": 1.2}) for how in ((t, ours), (m, twins)))
    assert (found.tokens, found.bytes) == (want.tokens, want.bytes)
    assert found.loss == pytest.approx(want.loss, abs=1e-5)
    off = {"sliding_eval": False, "temp_scaling": False, "eval_engram": False, "ngram_cache": False, "ttt_scope": "off"}
    plain = scored(t, dataclasses.replace(ours, **off), data)
    assert kind == "carried" or abs(plain.loss - want.loss) > 1e-4, "the setting matters"


# ---- the program


def run(program: Any, argv: list[str], environ: dict[str, str], capsys: Any) -> str:
    capsys.readouterr()
    assert program.main(argv, environ) == 0
    return capsys.readouterr().out


def keys_of(output: str) -> list[tuple[str, ...]]:
    """What each line speaks of, without the lines that are about the library and the text that the model writes."""
    lines = [
        line for line in output.splitlines() if not re.match("python|device|run:|prompt|sample|again|artifact", line)
    ]
    return [tuple(re.findall(r"([a-z_/]+):", line)) or tuple(line.split()[:1]) for line in lines]


@pytest.fixture
def job(tiny_env: dict[str, str]) -> dict[str, str]:
    return {**tiny_env, "MAX_VAL_TOKENS": "1500", "SAVE_EVERY": "10", "VAL_LOSS_EVERY": "10", "EMA_DECAY": "0.9"}


def test_a_run_says_what_the_other_program_says(job: dict[str, str], capsys: Any) -> None:
    one = run(t, ["train"], {**job, "RUN_ID": "one"}, capsys)
    two = run(m, ["train"], {**job, "RUN_ID": "two"}, capsys)
    assert keys_of(one) == keys_of(two)
    folders = [Path(job["OUT_DIR"]) / name for name in ("one", "two")]
    names = [{path.name.replace("_mlx", "") for path in folder.iterdir()} for folder in folders]
    assert names[0] == names[1]
    assert (folders[0] / "config.env").read_text() == (folders[1] / "config.env").read_text()
    for folder, text, program in ((folders[0], one, m), (folders[1], two, t)):
        score = re.findall(r"final_roundtrip_exact .*val_bpb:([\d.]+)", text)[0]
        again = run(program, ["eval", str(folder / "model.pgz")], job, capsys)
        assert float(re.findall(r"final_eval .*val_bpb:([\d.]+)", again)[0]) == pytest.approx(float(score), abs=1e-5)
    for folder, program in ((folders[1], m), (folders[0], m), (folders[1], t)):
        audited = run(program, ["audit", str(folder / "model.pgz"), "--positions", "12"], job, capsys)
        assert "audit: passed, written" in audited and re.search(r"ok +fidelity .* 100.0000%", audited), audited
    written = run(m, ["generate", str(folders[1] / "model.pgz"), "--prompt", "The ", "--tokens", "5"], job, capsys)
    assert written.startswith("The ") and len(written) > 5
    found = [json.loads(run(program, ["preflight", "--full", "--json"], job, capsys)) for program in (t, m)]
    assert [[check["name"] for check in one["checks"]] for one in found][0] == [c["name"] for c in found[1]["checks"]]
    assert found[1]["ok"] and "preflight: ok" in run(m, ["preflight"], job, capsys)
    assert run(m, ["plan"], job, capsys) == run(t, ["plan"], job, capsys)


def test_a_resumed_run_ends_with_the_same_bytes(job: dict[str, str], capsys: Any) -> None:
    job |= {"LAYER_PATTERN": "KA", "ATTN_WINDOW": "16", "BATCH_MODE": "streams", "CARRY_TRAIN": "1", **SKC_SIZES}
    whole = run(m, ["train"], {**job, "RUN_ID": "whole"}, capsys)
    saved = Path(job["OUT_DIR"]) / "whole" / "checkpoints" / "step_0000010.npz"
    rest = run(m, ["train"], {**job, "RUN_ID": "rest", "RESUME": str(saved)}, capsys)
    assert "step:11/" not in rest and "at step:10 " in rest and "step:20/" in whole
    artifacts = [(Path(job["OUT_DIR"]) / name / "model.pgz").read_bytes() for name in ("whole", "rest")]
    assert artifacts[0] == artifacts[1]
    saved.write_bytes(saved.read_bytes()[:-500])
    assert m.main(["train"], {**job, "RUN_ID": "damaged", "RESUME": str(saved)}) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err


def test_a_signal_ends_a_run_that_resumes_to_the_same_bytes(
    job: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job |= {"PRECISION": "fp64"}  # eight bytes of each latent and moment come back
    run(m, ["train"], {**job, "RUN_ID": "whole"}, capsys)
    report, folder = m.report_training, Path(job["OUT_DIR"])

    def told(s: Any, state: Any, *rest: Any) -> None:
        report(s, state, *rest)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(m, "report_training", told)
    assert m.main(["train"], {**job, "RUN_ID": "parts"}) == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert "step:3/" in output and "step:4/" not in output and "stopped by SIGTERM; to resume: ENV_FILE=" in output
    heartbeat = json.loads((folder / "parts" / "heartbeat_rank0.json").read_text())
    assert heartbeat["step"] == 3 and heartbeat["allocated_mib"] > 0
    monkeypatch.setattr(m, "report_training", report)
    run(m, ["train"], {**job, "RUN_ID": "parts", "RESUME": "auto"}, capsys)
    assert (folder / "whole" / "model.pgz").read_bytes() == (folder / "parts" / "model.pgz").read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight(
    value: float, job: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = m.Passes.__call__

    def poisoned(self: Any, batch: Any, carry: Any, moment: Any, *rest: Any) -> Any:
        out = passes(self, batch, carry, moment, *rest)
        grads = {n: g * value if n == "embed.weight" else g for n, g in out.grads.items()}
        return out._replace(grads=grads) if moment.step.item() in (3, 4) else out

    monkeypatch.setattr(m.Passes, "__call__", poisoned)
    job |= {
        "SAVE_EVERY": "1",
        "KEEP_CHECKPOINTS": "99",
        "BIGRAM_HASH_BUCKETS": "64",
        "MUON_WD": "0.1",
        "EMA_DECAY": "0",
    }
    assert "skipped:2" in run(m, ["train"], {**job, "ITERATIONS": "6"}, capsys)
    saved = (Path(job["OUT_DIR"]) / job["RUN_ID"] / "checkpoints" / f"step_{step:07d}.npz" for step in (3, 5, 6))
    before, after, later = (m.read_tree(path) for path in saved)
    assert after["skipped"] == 2
    for key, bank in before["banks"].items():
        same = after["banks"][key]
        assert mx.array_equal(bank["latent"], same["latent"]) and bank["state"].keys() == same["state"].keys()
        assert all(mx.array_equal(moment, same["state"][name]) for name, moment in bank["state"].items()), key
    assert not all(mx.array_equal(b["latent"], later["banks"][key]["latent"]) for key, b in after["banks"].items())


@pytest.mark.parametrize("cause", ["weight", "loss"])
def test_a_loss_that_is_never_finite_ends_the_run_with_a_dump(
    cause: str, job: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite weight in a checkpoint, as a fault of memory leaves it, or a loss whose gradient would be finite."""
    run(m, ["train"], {**job, "RUN_ID": "whole"}, capsys)
    path, loss = Path(job["OUT_DIR"]) / "whole" / "checkpoints" / "step_0000010.npz", m.GPT.loss
    tree = m.read_tree(path)
    for bank in tree["banks"].values() if cause == "weight" else ():
        first = mx.arange(bank["latent"].size).reshape(bank["latent"].shape) == 0
        bank["latent"] = mx.where(first, math.inf, bank["latent"])
    path.write_bytes(m.write_tree(tree))

    def infinite(*args: Any) -> Any:
        out = loss(*args)
        return out._replace(total=out.total + math.inf)

    if cause == "loss":
        monkeypatch.setattr(m.GPT, "loss", infinite)
    assert m.main(["train"], {**job, "RUN_ID": "again", "MAX_NONFINITE_STEPS": "3", "RESUME": str(path)}) == 2
    folder = Path(job["OUT_DIR"]) / "again" / "nonfinite"
    assert "not finite in 3 steps in a row, up to step 13" in capsys.readouterr().err
    told = json.loads((folder / "step.json").read_text())
    assert told["step"] == 13 and told["loss_nats"] in ("nan", "inf") and told["gradients"]
    assert (folder / "step_0000012.npz").is_file()


def test_an_evaluation_ends_when_it_is_asked_to_or_is_late(byte_data: Path) -> None:
    h = m.load_config({**SMALL, "DATA_PATH": str(byte_data)})
    rt, tokenizer = m.start_runtime(h), m.load_tokenizer(h)
    for error, limit, asked in ((m.Interrupted, 0.0, True), (m.AgreedError, 1e-9, False)):
        scorer = m.Scorer(h, rt, m.build_model(h, rt, tokenizer.bos), tokenizer.byte_table())
        scorer.limit, scorer.asked = limit, lambda asked=asked: asked
        with pytest.raises(error):
            scorer.score(m.read_validation(h))


@pytest.mark.parametrize("quantity", t.MATCH_QUANTITIES)
def test_a_width_is_matched_alike(quantity: str) -> None:
    environ = {"PRESET": "skc_proxy", "NUM_LAYERS": "3", "MATCH": f"{quantity}:local"}
    ours, twins = t.matched(t.load_config(environ)), m.matched(m.load_config(environ))
    assert ours.model_dim == twins.model_dim != t.load_config({"PRESET": "skc_proxy"}).model_dim
    assert list(t.match_lines(ours)) == list(m.match_lines(twins))


@pytest.mark.parametrize("kind", ["sliding", "carried", "n-grams", "all, adam", "global", "lora"])
def test_an_audit_finds_the_same(kind: str, byte_data: Path) -> None:
    environ = {**SMALL, **EXACT, **EVALUATIONS[kind], "FREEZE_CHECK_STRICT": "0", "DATA_PATH": str(byte_data)}
    ours, twins = t.load_config(environ), m.load_config(environ)
    one = t.build_model(ours, t.start_runtime(ours), 255)
    two = m.build_model(twins, m.start_runtime(twins), 255, fill=False)
    weights, found = some_weights(ours, 255, 0.05), []
    for program, h, model in ((t, ours, one), (m, twins, two)):
        program.load_weights(model, weights)
        table, tokens = program.load_tokenizer(h).byte_table(), program.read_validation(h)
        make = functools.partial(program.Scorer, h, program.start_runtime(h), model, table, {"temperature": 1.2})
        found.append([*program.Audit(make, tokens[:260], 12, tokens[:400]).findings()])
    assert [(f.check, f.ok) for f in found[0]] == [(f.check, f.ok) for f in found[1]]
    assert all(f.ok for f in found[1]), found[1]


SKC_SIZES = {"CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8"}


def test_weights_are_calibrated_and_quantized_after_training(job: dict[str, str], capsys: Any) -> None:
    job |= {
        "EXPORT_MODE": "competition_gptq", "MATRIX_CODEC": "exact", "FP_STORAGE": "exact", "TEMP_SCALING": "1",
        "LQER_RANK": "2", "LQER_TENSORS": "2", "CODEC_MAP": "matrix:int4,embed:int6", "ITERATIONS": "6",
        "CALIBRATE": "0", "GPTQ_BATCHES": "1",
    }  # fmt: skip
    output = run(m, ["train"], job, capsys)
    assert re.search("gptq: [1-9]", output) and "temperature:" in output
    exact = re.findall(r"final_roundtrip_exact val_loss:([\d.]+) .*in_memory:([\d.]+)", output)[0]
    assert float(exact[0]) == pytest.approx(float(exact[1]), abs=1e-6)


def test_gptq_gives_the_same_codes() -> None:
    ours, twins = configs("tiny", INT_GROUP="16")
    draw = np.random.default_rng(0)
    w, x = draw.standard_normal((2, 12, 48)).astype(np.float32), draw.standard_normal((2, 200, 48))
    hessian = x.swapaxes(1, 2) @ x
    want = t.gptq(t.CODECS["int4"](ours), torch.tensor(w), torch.tensor(hessian))
    found = m.gptq(m.CODECS["int4"](twins), w, hessian)
    np.testing.assert_array_equal(np.array(found.codes), want.codes.numpy())
    np.testing.assert_array_equal(np.array(found.scales), want.scales.numpy() if want.scales is not None else None)


@pytest.mark.parametrize(
    "variable",
    [
        "PRECISION=bf16",
        "ATTN_IMPL=fa3",
        "DEVICE=cuda",
        "CPU_THREADS=2",
        "COMPILE_MODE=reduce-overhead",
    ],
)
def test_what_is_not_there_is_refused_by_name(variable: str, tiny_env: dict[str, str], capsys: Any) -> None:
    name, value = variable.split("=")
    assert m.main(["preflight"], {**tiny_env, "COMPILE": "1", name: value}) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["PRECISION=fp64", "DETERMINISTIC=1", "REQUIRE_FREE_GPU=1"])
def test_what_an_apple_gpu_has_not_is_refused_there_alone(variable: str) -> None:
    h = m.load_config({**SMALL, **dict([variable.split("=")])})
    m.check_supported(h, False)
    with pytest.raises(m.UserError, match=variable.split("=")[0]):
        m.check_supported(h, True)


def test_two_deterministic_runs_are_the_same_bits(job: dict[str, str], capsys: Any) -> None:
    for name in ("one", "two"):
        run(m, ["train"], {**job, "DETERMINISTIC": "1", "BIGRAM_HASH_BUCKETS": "64", "RUN_ID": name}, capsys)
    one, two = ((Path(job["OUT_DIR"]) / name / "model.pgz").read_bytes() for name in ("one", "two"))
    assert one == two


def test_metrics_also_go_to_tensorboard(tiny_env: dict[str, str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = m.Log(tmp_path, True)
    log.sinks = m.open_sinks(m.load_config({**tiny_env, "TENSORBOARD": "1"}), tmp_path)
    log.metric("train", step=3, train_loss_nats=2.5, name="text")
    log.close()
    told = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(told.Tags()["scalars"]) == {"train/step", "train/train_loss_nats"}
    (event,) = told.Scalars("train/train_loss_nats")
    assert event.step == 3 and event.value == 2.5 and event.wall_time > 1e9


ROOMY = {"MODEL_DIM": "64", "NUM_HEADS": "4", "TRAIN_SEQ_LEN": "64", "TRAIN_BATCH_TOKENS": "1024",
         "MICRO_BATCH_TOKENS": "1024"}  # fmt: skip
HEAVY = ["tiny", "frontier", "hybrid", "mhc_static", "rmt", "nsa", "experts, loops, parallel", "untied, recomputed"]


@pytest.fixture
def in_turn() -> Iterator[None]:
    """Over its limit MLX waits for each operation before it starts the next: a peak then depends on no thread's turn.

    Nor may what another test has left be freed while a peak is measured.
    """
    gc.collect()
    limit = mx.set_memory_limit(0)
    yield
    mx.set_memory_limit(limit)


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("case", HEAVY)
def test_memory_of_many_rows_is_foreseen_from_four(case: str, byte_data: Path) -> None:
    h = m.load_config({**CASES[case], **ROOMY, "DATA_PATH": str(byte_data)})
    s = m.open_session(h, m.start_runtime(h), Path("."), m.Log(None, False))
    batch, moment = s.loader.next(16, 64), m.Moment(mx.array(0.5), mx.array(3), mx.arange(16, dtype=mx.int64))
    mx.eval(batch.tokens, batch.targets)
    passes, carry = m.Passes(h, s.rt, s.model), s.model.start_state(batch.history)
    one, four, all_ = (passes.row_bytes(batch, carry, moment, m.final_variant(h), rows) for rows in (1, 4, 16))
    assert all_ * 0.95 < four < all_ * 1.25 and all_ * 0.5 < one < all_ * 2.5


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("case", ["tiny", "hybrid", "untied, recomputed"])
def test_micro_batches_fit_into_half_of_the_memory(case: str, byte_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines of a few MiB, whose half a step never exceeds, moments and average included; one row always runs."""
    h = m.load_config({**CASES[case], **ROOMY, "DATA_PATH": str(byte_data)})
    s = m.open_session(h, m.start_runtime(h), Path("."), m.Log(None, False))
    batch, state, rows = s.loader.next(16, 64), m.TrainState(), list[int]()
    moment, carry = m.Moment(mx.array(0.5), mx.array(3), mx.arange(16, dtype=mx.int64)), None
    mx.eval(batch.tokens, batch.targets)
    s.weights.evaluate()
    parameters = sum(weight.nbytes for _, weight in s.model.named_parameters())
    monkeypatch.setattr(m, "device_name", lambda rt: "mps")
    for room in (1, 4 * 2**20, 8 * 2**20, 2**30):
        memory = 2 * (mx.get_active_memory() + 4 * parameters + room)
        monkeypatch.setattr(m, "machine_memory", lambda memory=memory: memory)
        rows.append(m.Passes(h, s.rt, s.model).rows_at_once(batch, carry, moment, m.Variant()))
        step = m.make_step(s)
        s.optimizer.step(step(batch, state, 0.5).grads, 0.0, 0.9, True, 0.5)
        mx.reset_peak_memory()
        out = step(batch, state, 0.5)
        assert rows[-1] == 1 or mx.get_peak_memory() <= memory // 2
        del out
    assert rows[0] == 1 < rows[1] < rows[2] < rows[3] == 16


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("extra", [{}, {"MLP_MULT": "16"}, {"NGRAM_CACHE": "1"}, {"PRESET": "hybrid_mac"}])
def test_memory_of_an_evaluation_is_bounded(
    extra: dict[str, str], byte_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {**SMALL, **ROOMY, **extra, "MAX_VAL_TOKENS": "5900", "EVAL_STREAMS": "64", "VAL_BATCH_SIZE": "100000"}
    h = m.load_config({**environ, "DATA_PATH": str(byte_data)})
    rt, tokenizer = m.start_runtime(h), m.load_tokenizer(h)
    monkeypatch.setitem(m.MAX_LOGITS, "cpu", 2**20)
    model, tokens = m.build_model(h, rt, tokenizer.bos), m.read_validation(h)
    scorer = m.Scorer(h, rt, model, tokenizer.byte_table())
    mx.eval(dict(model.named_parameters()))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    scorer.score(tokens)
    assert 4 * 2**20 < mx.get_peak_memory() - before < 36 * 2**20


def test_compilation_is_for_gpus_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(value: str) -> bool:
        return m.start_runtime(m.load_config({**SMALL, "COMPILE": value})).compile

    assert [compiles(value) for value in ("auto", "0", "1")] == [False, False, True]
    monkeypatch.setattr(m, "choose_device", lambda name: mx.Device(mx.gpu))
    for name in ("set_default_device", "set_cache_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, lambda _: None)
    assert [compiles(value) for value in ("auto", "0", "1")] == [True, False, True]


@pytest.mark.slow  # a minute of C++: the one test that runs what other tests only trace
def test_compiled_steps_and_scores_are_those_of_plain_ones(byte_data: Path) -> None:
    """Nothing of Python's stays in a compiled function: step number, progress, structure and weights all change."""
    case = {"NUM_LAYERS": "1", "UNTIE_AT_FRACTION": "0.5", "STOCHASTIC_DEPTH": "0.4", "WARMDOWN_FRACTION": "0.5"}
    environ = {**SMALL, **EXACT, **case, "ITERATIONS": "6", "DATA_PATH": str(byte_data)}
    weights = some_weights(t.load_config(environ), 255, 0.0)
    courses, scores = [], []
    for compiled in ("0", "1"):
        h = m.load_config({**environ, "COMPILE": compiled})
        courses.append([*losses_of(m, h, weights, 6)])
        rt, tokenizer, model = m.start_runtime(h), m.load_tokenizer(h), m.build_model(h, m.start_runtime(h), 255)
        scorer = m.Scorer(h, rt, model, tokenizer.byte_table())
        for change in (1.0, 1.5):
            m.load_weights(model, {name: weight * np.float32(change) for name, weight in weights.items()})
            scores.append(scorer.score(m.read_validation(h)).loss)
    np.testing.assert_allclose(courses[1], courses[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(scores[2:], scores[:2], atol=1e-5, rtol=0)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_a_gpu_keeps_few_freed_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict[str, int]()
    for name in ("set_cache_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, functools.partial(told.__setitem__, name))
    monkeypatch.setattr(m, "machine_memory", lambda: 8 * 2**30)
    m.bound_memory()
    assert told == {"set_cache_limit": 2**29, "set_memory_limit": 6 * 2**30}


def test_a_gradient_may_be_lost_behind_mlx_checkpoint() -> None:
    """Why GPT.recomputed gives each array out once. If this fails MLX has been mended, and that need not be."""
    x = mx.array([2.0])

    def twice(x: Any) -> list[Any]:
        return [x * 3] * 2

    plain, lost = (mx.grad(lambda x, run=run: sum(run(x)).sum())(x).item() for run in (twice, mx.checkpoint(twice)))
    assert plain == 6 and lost != 6
