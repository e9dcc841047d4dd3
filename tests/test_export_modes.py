"""Codecs after training: the codec map, GPTQ, low-rank corrections, and runs under each EXPORT_MODE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fake_quantize
from torch import Tensor

import train_gpt as t

Run = Callable  # a fixture of conftest.py that starts commands
TINY = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", "COMPILE": "0"}
GPTQ = {"EXPORT_MODE": "competition_gptq", "MATRIX_CODEC": "bf16", "ATTN_GATE": "4", "HOLDOUT_TOKENS": "512"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_hessian(columns: int, count: int = 3) -> Tensor:
    """Of inputs that have much in common, as hidden states do."""
    x = drawn(count, 400, columns, seed=1) + 2 * drawn(count, 400, 4, seed=2) @ drawn(count, 4, columns, seed=3)
    return x.mT @ x


def int_codec(name: str = "int4", **values: Any) -> t.Codec:
    return t.CODECS[name](t.Hyperparameters(**values))


def roles_of(environ: dict[str, str]) -> dict[str, t.Role]:
    h = t.load_config({**TINY, **environ})
    return t.role_table(t.build_model(h, t.start_runtime(h), 255, fill=False))


# ---- the codec map ----


def test_names_of_role_kinds() -> None:
    assert set(t.ROLE_NAMES) == set(t.ROLE_KINDS)


def test_map_gives_each_parameter_the_codec_of_its_most_exact_entry() -> None:
    rules = "embed:int7,matrix:int5,mlp:int6,mlp.down:int4,*.gate.weight:int8,blocks.1.mlp.down:fp4,scalar:bf16"
    rows = roles_of({"CODEC_MAP": rules, "ATTN_GATE": "4", "PROJ_NORM": "1", "EMBED_DIM": "16"})
    want = {
        "embed.weight": "int7", "embed.up.weight": "int5", "blocks.0.attn.qkv.weight": "int5",
        "blocks.0.mlp.up.weight": "int6", "blocks.0.mlp.down.weight": "int4", "blocks.1.mlp.down.weight": "fp4",
        "blocks.0.attn.gate.weight": "int8", "blocks.0.mlp.down.gain": "bf16", "blocks.0.attn.q_gain": "bf16",
    }  # fmt: skip
    assert {name: rows[name].codec for name in want} == want
    assert all(role.export == "" for role in rows.values())


def test_map_is_of_the_file_alone_where_codecs_come_after_training() -> None:
    rows = roles_of({**GPTQ, "CODEC_MAP": "mlp:int5,embed:bf16"})
    got = {name: (rows[name].codec, rows[name].export) for name in rows if name.endswith("weight") and "1." not in name}
    assert got == {
        "embed.weight": ("bf16", ""), "blocks.0.attn.qkv.weight": ("bf16", "int6"),
        "blocks.0.attn.proj.weight": ("bf16", "int6"), "blocks.0.attn.gate.weight": ("fp16", "int8"),
        "blocks.0.mlp.up.weight": ("bf16", "int5"), "blocks.0.mlp.down.weight": ("bf16", "int5"),
    }  # fmt: skip


def test_used_covers_the_map_and_the_corrections() -> None:
    assert "fp4" in t.load_config({**TINY, "CODEC_MAP": "mlp:fp4"}).used()["CODECS"]
    used = t.load_config({**TINY, **GPTQ}).used()["CODECS"]
    assert {"int4", "int6", "int7", "int8", "bf16", "fp16"} <= set(used)
    assert "int4" not in t.load_config({**TINY, **GPTQ, "LQER_RANK": "0"}).used()["CODECS"]


@pytest.mark.parametrize(
    "environ,named",
    [
        ({"CODEC_MAP": "mlp"}, "mlp is not name:codec"),
        ({"CODEC_MAP": "mlp:int9"}, "mlp:int9 is not name:codec"),
        ({"CODEC_MAP": "mlp:int6,,embed:int7"}, "an empty entry is not"),
        ({"CODEC_MAP": "mlp:int6,mlp:int4"}, "names something twice"),
        ({"EXPORT_MODE": "competition_gptq"}, "trains in float: MATRIX_CODEC=ternary"),
        ({**GPTQ, "HOLDOUT_TOKENS": "0"}, "GPTQ_SOURCE=train needs HOLDOUT_TOKENS"),
        ({**GPTQ, "MAX_WALLCLOCK_SECONDS": "20"}, "GPTQ_RESERVE_SECONDS=30.0 must be more than 0"),
        ({**GPTQ, "MAX_WALLCLOCK_SECONDS": "50", "TEMP_SCALING": "1"}, "GPTQ_RESERVE_SECONDS=30.0 must be more than 0"),
    ],
)
def test_bad_settings_are_one_line(environ: dict[str, str], named: str) -> None:
    with pytest.raises(t.UserError) as found:
        t.load_config({**TINY, **environ})
    assert named in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("pattern", ["nothing", "head.down", "blocks.7", "q_gain"])
def test_entry_that_means_no_weight_names_the_known_ones(pattern: str) -> None:
    with pytest.raises(t.UserError) as found:
        roles_of({"CODEC_MAP": f"embed:int8,{pattern}:int6"})
    text = str(found.value)
    assert text.startswith(f"CODEC_MAP: {pattern} names no weight") and "\n" not in text
    assert all(known in text for known in ("matrix", "scalar", "attn.qkv.weight", "mlp.up.weight"))


# ---- GPTQ ----


@pytest.mark.parametrize("group", [0, 16, 48])
@pytest.mark.parametrize("turn", [False, True])
def test_gptq_of_uncorrelated_inputs_rounds_to_the_nearest(group: int, turn: bool) -> None:
    w, codec = drawn(3, 10, 64).float(), int_codec(int_group=group, turbo_quant_train=turn and group != 48)
    got = t.gptq(codec, w, torch.eye(64, dtype=torch.float64).expand(3, -1, -1))
    want = codec.quantize(w.double(), t.default_tuning(w))
    assert torch.equal(got.codes, want.codes) and got.scales is not None and want.scales is not None
    assert torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("name", t.INT_CODECS)
@pytest.mark.parametrize("group", [0, 16, 100])
def test_gptq_beats_rounding_where_inputs_are_correlated(name: str, group: int) -> None:
    """Columns beyond one block of lazy updates, and a last group that is shorter; codes are the codec's own."""
    w, hessian = drawn(3, 20, 150).float(), inputs_hessian(150)
    codec = int_codec(name, int_group=group)
    coded = t.gptq(codec, w, hessian)
    nearest = fake_quantize(codec, w, t.default_tuning(w))
    assert coded.codes.dtype == torch.int8 and coded.scales is not None
    assert tuple(coded.scales.shape) == (3, *codec.scale_shape((20, 150)))  # type: ignore[misc]
    assert torch.equal(coded.scales, coded.scales.bfloat16().float())
    losses = [t.hessian_error(v.double() - w, hessian) for v in (codec.decode(coded), nearest)]
    assert (losses[0] < 0.5 * losses[1]).all(), losses


def test_gptq_is_the_naive_algorithm() -> None:
    """Column by column with the inverse of what is left of the Hessian, after Frantar et al., equations 2 and 3."""
    w, hessian, codec = drawn(1, 6, 20).float(), inputs_hessian(20, 1), int_codec(int_group=0)
    coded = t.gptq(codec, w, hessian)
    assert isinstance(codec, t.IntCodec) and coded.scales is not None
    left, whole, scale = w[0].double(), t.damped(hessian)[0], coded.scales[0, :, 0].double()
    for j in range(20):
        code = (left[:, j] / scale).round().clamp(-7, 7)
        assert coded.codes[0, :, j].tolist() == code.tolist()
        inverse = torch.linalg.inv(whole[j:, j:])
        left[:, j:] -= ((left[:, j] - code * scale) / inverse[0, 0])[:, None] * inverse[0]


def test_gptq_in_the_turned_basis_beats_rounding_there() -> None:
    w, hessian, codec = drawn(2, 16, 64).float(), inputs_hessian(64, 2), int_codec(int_group=16, turbo_quant_train=True)
    values = codec.decode(t.gptq(codec, w, hessian)), fake_quantize(codec, w, t.default_tuning(w))
    losses = [t.hessian_error(v.double() - w, hessian) for v in values]
    assert (losses[0] < 0.5 * losses[1]).all()


def test_inputs_never_seen_leave_a_weight_to_rounding() -> None:
    w, codec = drawn(1, 5, 12).float(), int_codec(int_group=0)
    got = t.gptq(codec, w, torch.zeros(1, 12, 12, dtype=torch.float64))
    assert torch.equal(got.codes, codec.quantize(w.double(), t.default_tuning(w)).codes)


@pytest.mark.parametrize("group", [0, 16])
def test_singular_hessians_are_solved(group: int) -> None:
    """Of fewer inputs than columns, of one input, and with inputs that are always zero: damping makes them regular."""
    w, codec = drawn(3, 10, 48).float(), int_codec(int_group=group)
    few, one, dead = drawn(20, 48, seed=4), drawn(1, 48, seed=5), drawn(400, 48, seed=6)
    dead[:, ::3] = 0
    hessian = torch.stack([x.mT @ x for x in (few, one, dead)])
    assert all(torch.linalg.matrix_rank(h) < 48 for h in hessian)
    coded = t.gptq(codec, w, hessian)
    assert coded.scales is not None and coded.scales.isfinite().all()
    nearest = fake_quantize(codec, w, t.default_tuning(w))
    losses = [t.hessian_error(v.double() - w, hessian) for v in (codec.decode(coded), nearest)]
    assert (losses[0][:2] < 0.7 * losses[1][:2]).all() and losses[0][2] < 1.05 * losses[1][2]


def test_weights_of_an_indefinite_hessian_are_rounded(tiny_env: dict[str, str], tmp_path: Path) -> None:
    s = session_of({**tiny_env, **GPTQ}, tmp_path)
    bank = next(bank for bank in s.weights.banks.values() if bank.role.export in t.INT_CODECS)
    bank.settle(s.h)
    columns = bank.latent.shape[-1]
    good = {name: torch.eye(columns, dtype=torch.float64) for name in bank.names}
    assert t.solve_bank(bank, good, lambda: 0.0, 1.0)[1] == len(bank.names)
    bad = {name: hessian - 3 * torch.ones_like(hessian) for name, hessian in good.items()}
    codes, solved = t.solve_bank(bank, bad, lambda: 0.0, 1.0)
    assert solved == 0 and torch.equal(codes.codes, torch.cat([coded.codes for _, coded in bank.coded()]).cpu())
    bank.settle(s.h, codes)
    some = s._replace(h=dataclasses.replace(s.h, lqer_rank=2, lqer_tensors=2))
    assert set(t.find_corrections(some, good, lambda: 0.0, 1.0)) == set(bank.names)
    assert t.find_corrections(some, bad, lambda: 0.0, 1.0) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite_is_an_error_of_gptq(value: float) -> None:
    hessian = inputs_hessian(12, 1)
    hessian[0, 3, 3] = value
    with pytest.raises(torch.linalg.LinAlgError):
        t.gptq(int_codec(int_group=0), drawn(1, 5, 12).float(), hessian)


# ---- low-rank corrections ----


def test_correction_lessens_the_error_and_torch_and_numpy_agree() -> None:
    w, hessian, codec = drawn(1, 30, 40).float(), inputs_hessian(40, 1), int_codec(int_group=0)
    rest = w - fake_quantize(codec, w, t.default_tuning(w))
    low = t.low_rank(codec, rest[0].double(), hessian[0], 4)
    assert low is not None
    added = low.added_to(torch.zeros(30, 40))
    after = t.hessian_error((rest - added).double(), hessian)
    assert after < 0.5 * t.hessian_error(rest.double(), hessian)
    factors = [codec.decode(part)[0] for part in low[1:]]
    assert np.array_equal(t.corrected(w[0].numpy(), *(f.numpy() for f in factors)), low.added_to(w[0]).numpy())
    assert torch.allclose(added, factors[0].mT @ factors[1], atol=1e-6)


def test_correction_that_would_not_help_is_left_out() -> None:
    """An error that is orthogonal noise in all directions, with one value a row that int4 factors cannot keep."""
    codec = int_codec(int_group=0)
    assert t.low_rank(codec, torch.zeros(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64), 2) is None


def test_half_and_misfit_corrections_are_refused() -> None:
    w, out, into = np.zeros((3, 5), np.float32), np.ones((2, 3), np.float32), np.ones((2, 5), np.float32)
    good = {"a": w, "a.lqer_out": out, "a.lqer_in": into}
    assert t.join_corrections(good)["a"].tolist() == np.full((3, 5), 2.0).tolist()
    for bad in (
        {"a": w, "a.lqer_out": out}, {"a": w, "a.lqer_in": into}, {**good, "a": w[:2]}, {**good, "a": w[0]},
        {**good, "a.lqer_out": out[:1]}, {**good, "a.lqer_in": into[0]}, {"a.lqer_out": out, "a.lqer_in": into},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            t.join_corrections(bad)


# ---- whole runs ----

RUNS: dict[str, dict[str, str]] = {
    "gptq": {**GPTQ, "INT_GROUP": "0"},
    "gptq of own text, groups, temperature": {**GPTQ, "GPTQ_SOURCE": "self", "GPTQ_BATCHES": "2", "TEMP_SCALING": "1"},
    "gptq of experts, average": {
        **GPTQ, "MOE_EXPERTS": "2", "EMA_DECAY": "0.8", "EMA_START_FRACTION": "0.3", "TIE_EMBEDDINGS": "0",
    },
    "gptq turned, tables": {
        **GPTQ, "TURBO_QUANT_TRAIN": "1", "BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_DIM": "8",
        "CODEC_MAP": "table:fp4,mlp.up:binary",
    },
    "mixed": {"EXPORT_MODE": "mixed", "ATTN_GATE": "4"},
    "as trained, map": {"CODEC_MAP": "mlp:int4,attn.qkv:binary,embed:fp4", "CLIP_SEARCH": "1", "INT_GROUP": "0"},
}  # fmt: skip


def folder_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"]


@pytest.mark.parametrize("kind", RUNS)
def test_run_scores_alike_in_memory_and_read_back(
    kind: str, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    done = run_job({**tiny_env, **RUNS[kind], "SAMPLE_TOKENS": "0"})
    assert done.code == 0, done.err
    (final,) = read_metrics(folder_of(tiny_env), "final")
    assert abs(final["val_loss_nats"] - final["in_memory_val_loss_nats"]) < 1e-6
    header, _ = t.decode_artifact((folder_of(tiny_env) / "model.pgz").read_bytes())
    stored = {name: codec for name, codec, *_ in header["tensors"]}
    h = t.load_config({"ENV_FILE": str(folder_of(tiny_env) / "config.env")})
    roles = t.role_table(t.build_model(h, t.start_runtime(h), 255, fill=False))
    plain = {name: codec for name, codec in stored.items() if not name.endswith(t.FACTORS)}
    assert plain == {name: role.export or role.codec for name, role in roles.items()}
    assert len(stored) - len(plain) == (6 if "gptq" in kind else 0)
    assert ("gptq: " in done.out) == ("gptq" in kind)


def test_codecs_of_the_file_are_what_is_calibrated_and_chosen_by(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    """Weights trained in float: the proxy is asked about those of the file, in training too, and their scales are
    tuned."""
    env = {**tiny_env, "EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int4,embed:int4", "CALIBRATE": "1"}
    env |= {"EXPORT_PROXY_EVAL": "6", "ITERATIONS": "12", "MATRIX_CODEC": "bf16", "SAMPLE_TOKENS": "0"}
    env |= {"CALIB_MAX_EVALS": "12", "CALIB_MAX_SECONDS": "60", "MAX_WALLCLOCK_SECONDS": "0"}
    assert run_job(env).code == 0
    (told,), proxies = read_metrics(folder_of(env), "calibration"), read_metrics(folder_of(env), "export_proxy")
    assert told["evals"] > 2 and told["proxy_loss_nats"] <= told["proxy_loss_before_nats"]
    assert min(x["proxy_loss_nats"] for x in proxies) == pytest.approx(told["proxy_loss_before_nats"], abs=1e-9)
    assert {x["step"] for x in proxies} == {6, 12}
    floats = {**env, "EXPORT_MODE": "ternary", "CODEC_MAP": "", "CALIBRATE": "0", "RUN_ID": "floats"}
    assert run_job(floats).code == 0
    plain = read_metrics(folder_of(floats), "export_proxy")
    assert all(one["proxy_loss_nats"] != two["proxy_loss_nats"] for one, two in zip(proxies, plain, strict=True))


def test_weights_that_are_not_finite_are_not_exported(run_job: Run, tiny_env: dict[str, str]) -> None:
    done = run_job({**tiny_env, "MATRIX_LR": "1e30", "SCALAR_LR": "1e30", "TIED_EMBED_LR": "1e30"})
    assert done.code == 2 and "not finite" in done.err and len(done.err.strip().splitlines()) == 1
    assert not (folder_of(tiny_env) / "model.pgz").exists()


def test_two_ranks_write_the_file_of_one(run_job: Run, run_ranks: Run, tiny_env: dict[str, str]) -> None:
    env = {**tiny_env, **RUNS["gptq"], "PRECISION": "fp64", "SAMPLE_TOKENS": "0", "ITERATIONS": "6"}
    assert run_job({**env, "RUN_ID": "one"}).code == 0
    several = run_ranks(env, 2)
    assert [done.code for done in several] == [0, 0], several
    files = [(folder_of({**env, "RUN_ID": name}) / "model.pgz").read_bytes() for name in ("one", env["RUN_ID"])]
    assert files[0] == files[1]


def test_reserve_is_taken_off_the_steps(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """8 seconds of 10 are for GPTQ: steps end before 2 are over, and all before 10."""
    env = {**tiny_env, **GPTQ, "ITERATIONS": "100000", "MAX_WALLCLOCK_SECONDS": "10", "GPTQ_RESERVE_SECONDS": "8"}
    done = run_job({**env, "SAMPLE_TOKENS": "0"}, timeout=100)
    assert done.code == 0 and "warning: training ended" not in done.out, done.out
    last = read_metrics(folder_of(env), "train")[-1]
    assert 0.5 < last["train_time_s"] <= 2.0
    assert last["train_time_s"] < read_metrics(folder_of(env), "final")[0]["train_time_s"] <= 10


def session_of(environ: dict[str, str], folder: Path) -> t.Session:
    h = t.load_config(environ)
    s = t.open_session(h, t.start_runtime(h), folder, t.Log(folder, False))
    for bank in s.weights.banks.values():
        bank.latent.copy_(torch.randn(bank.latent.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    s.weights.materialize(1.0)
    return s


def test_without_time_gptq_gives_up_and_weights_are_rounded(tiny_env: dict[str, str], tmp_path: Path) -> None:
    env = {**tiny_env, **GPTQ, "MAX_WALLCLOCK_SECONDS": "100"}
    late, plain = session_of(env, tmp_path), session_of({**env, "EXPORT_MODE": "mixed"}, tmp_path)
    t.quantize_trained(late, lambda: 100.0)
    for bank in plain.weights.banks.values():
        if bank.role.group == "matrix":
            bank.role = bank.role._replace(export="int6")
    t.quantize_trained(plain, lambda: 100.0)
    for (name, p), (_, q) in zip(late.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_weight_whose_inputs_are_not_finite_is_rounded(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """An MLP of 1e30 squares to infinity: its second matrix has no Hessian, all before it have, and nothing raises."""
    s = session_of({**tiny_env, **GPTQ, "LQER_RANK": "0"}, tmp_path)
    bank, i = s.weights.where["blocks.1.mlp.up.weight"]
    bank.latent[i] = 1e30
    s.weights.materialize(1.0)
    names = {name for name in s.weights.where if name.startswith("blocks") and name.endswith("weight")}
    found = t.input_hessians(s, names, lambda: 0.0, 1.0)
    assert "blocks.1.mlp.down.weight" not in found and "blocks.1.mlp.up.weight" in found
    assert all(hessian.isfinite().all() for hessian in found.values())
    t.quantize_trained(s, lambda: 0.0)
    down, at = s.weights.where["blocks.1.mlp.down.weight"]
    rounded = fake_quantize(down.codec, down.latent[at : at + 1], t.default_tuning(down.latent[:1]))[0]
    assert torch.equal(s.model.get_parameter("blocks.1.mlp.down.weight").detach(), rounded)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hessians_are_those_of_the_inputs(precision: str, tiny_env: dict[str, str], tmp_path: Path) -> None:
    """The tied head's from logits' hidden states; a batch more adds its own. Sums have float32's digits."""
    s = session_of({**tiny_env, **GPTQ, "GPTQ_BATCHES": "1", "PRECISION": precision}, tmp_path)
    seen = dict[str, Tensor]()
    history, tokens = next(t.calibration_batches(s, lambda: 0.0, 1.0))
    assert tuple(tokens.shape) == (8, 32) and tokens[0].tolist() == t.read_holdout(s.h)[:32].tolist()
    with torch.no_grad(), s.rt.precision():
        variant = t.scoring_variant(s.h)
        s.model.logits(tokens, variant, s.model.start_state(history), observe=lambda n, x: seen.update({n: x}))
    found = t.input_hessians(s, set(seen) - {"blocks.0.mlp.up.weight"}, lambda: 0.0, 1.0)
    assert set(found) == set(seen) - {"blocks.0.mlp.up.weight"} and "embed.weight" in found
    for name, hessian in found.items():
        flat = seen[name].flatten(0, -2).double()
        assert torch.allclose(hessian, flat.mT @ flat, rtol=1e-4, atol=1e-4), name
    more = s._replace(h=dataclasses.replace(s.h, gptq_batches=2))
    assert t.input_hessians(more, set(seen), lambda: 0.0, 1.0)["embed.weight"].trace() > found["embed.weight"].trace()


# The preset of eight GPUs, at a size for a CPU.
SMALL_FRONTIER = {
    "PRESET": "frontier", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1",
    "PARTIAL_ROPE_DIMS": "8", "RECURRENCE_LAYERS": "0-1", "HC_START": "1", "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "256", "MICRO_BATCH_TOKENS": "256", "HOLDOUT_TOKENS": "512", "GPTQ_BATCHES": "2",
    "ITERATIONS": "20", "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "VAL_BATCH_SIZE": "512",
    "SLIDING_EVAL_STRIDE": "8", "EVAL_STREAMS": "4", "MAX_VAL_TOKENS": "600", "SAMPLE_TOKENS": "0",
    "PRECISION": "fp32",
}  # fmt: skip


def test_frontier_trains_exports_reloads_and_is_scored_by_sliding_windows_that_learn(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **SMALL_FRONTIER}
    done = run_job(env)
    assert done.code == 0, done.err
    (final,) = read_metrics(folder_of(env), "final")
    assert abs(final["val_loss_nats"] - final["in_memory_val_loss_nats"]) < 1e-6
    assert "protocol:window=32,stride=8,streams=4,adapters=ttt_lora,settings=" in done.out
    assert "MAX_EVAL_SECONDS=600" in done.out
    header, _ = t.decode_artifact((folder_of(env) / "model.pgz").read_bytes())
    assert {"int6", "int7", "int8"} <= {codec for _, codec, *_ in header["tensors"]}
    again = run_job({name: text for name, text in env.items() if name != "RUN_ID"},
        ["eval", str(folder_of(env) / "model.pgz")])  # fmt: skip
    assert again.code == 0, again.err
    found = float(again.out.split("final_eval val_loss:")[1].split()[0])
    assert found == pytest.approx(final["val_loss_nats"], abs=1e-6)
    still = run_job({**env, "TTT_SCOPE": "off", "RUN_ID": "still"}, ["eval", str(folder_of(env) / "model.pgz")])
    assert float(still.out.split("final_eval val_loss:")[1].split()[0]) != pytest.approx(found, abs=1e-6)


def test_a_packaged_script_that_writes_text_for_gptq_keeps_what_that_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "PACKAGED", True)
    assert t.load_config({**TINY, **GPTQ, "GPTQ_SOURCE": "self"}).carries
    assert not t.load_config({**TINY, **GPTQ}).carries
