"""What is fitted or chosen for the export (sections 10, 11, 14): never worse on held-out tokens, within its budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_shard

import train_gpt as t

Run = Callable  # a fixture of conftest.py that starts commands

SHORT = {"ITERATIONS": "12", "MAX_VAL_TOKENS": "600", "SAMPLE_TOKENS": "0", "HOLDOUT_TOKENS": "1024"}
CALIBRATE = {**SHORT, "CALIBRATE": "1", "CALIB_PROXY_TOKENS": "512", "CALIB_MAX_SECONDS": "600"}
AVERAGE = {"EMA_DECAY": "0.8", "EMA_START_FRACTION": "0.25"}
TABLES = {"BIGRAM_HASH_BUCKETS": "512", "BIGRAM_HASH_DIM": "8", "BIGRAM_HASH_ORDERS": "2,3"}
EVERYTHING = {
    **CALIBRATE, **AVERAGE, **TABLES, "CALIB_AT_FRACTION": "0.4", "EXPORT_PROXY_EVAL": "3", "ENGRAM_PRUNE": "0.3",
    "ENGRAM_PRUNE_MAX_LOSS": "0.01", "TEMP_SCALING": "1",
}  # fmt: skip


def folder_of(env: dict[str, str]) -> Path:
    return Path(env["OUT_DIR"]) / env["RUN_ID"]


def artifact_of(env: dict[str, str]) -> bytes:
    return (folder_of(env) / "model.pgz").read_bytes()


def finished(run_job: Run, env: dict[str, str]) -> bytes:
    """The artifact of a run that must end well."""
    done = run_job(env)
    assert done.code == 0, done.err
    return artifact_of(env)


class Distance:
    """A proxy whose loss is the distance of one weight of the model to a target."""

    def __init__(self, parameter: torch.Tensor, target: torch.Tensor, most: int) -> None:
        self.parameter, self.target, self.evals, self.most = parameter.detach(), target, 0, most

    def spent(self) -> bool:
        return self.evals >= self.most

    def losses(self) -> np.ndarray:
        self.evals += 1
        return (self.parameter - self.target).double().square().sum().view(1).numpy()

    def loss(self) -> float:
        return float(self.losses()[0])


def weights_of(env: dict[str, str], **more: str) -> t.Weights:
    h = t.load_config({**env, **more})
    weights = t.Weights(t.build_model(h, t.start_runtime(h), t.BYTE_BOS))
    weights.materialize(1.0)
    return weights


# Search


@pytest.mark.parametrize(
    ("codec", "threshold", "multiplier"),
    [("ternary", 0.7, 1.1), ("ternary", 0.35, 0.9), ("ternary", 0.06, 1.0), ("int6", 0.5, 0.8), ("int8", 0.5, 0.9)],
)
def test_search_finds_a_planted_tuning(
    codec: str, threshold: float, multiplier: float, tiny_env: dict[str, str]
) -> None:
    weights = weights_of(tiny_env, MATRIX_CODEC=codec, CALIBRATE="1", CALIB_MAX_CANDIDATES="1", CALIB_MAX_EVALS="60")
    tunable = [name for name, (bank, _) in weights.where.items() if bank.codec.tunes]
    name = max(tunable, key=lambda name: weights.where[name][0].latent[0].numel())
    bank, i = weights.where[name]
    wanted = {"threshold": threshold, "multiplier": multiplier}
    weights.retune(name, wanted)
    target = bank.parameters[i].detach().clone()
    weights.retune(name, {"threshold": 0.5, "multiplier": 1.0})
    proxy: Any = Distance(bank.parameters[i], target, 60)
    found = t.Calibration(weights, proxy).run()
    assert found.found == {name: wanted} and found.best == 0.0 < found.before
    assert torch.equal(bank.parameters[i], target), "the model has what was found"
    others = [float(v[j]) for v in bank.tuning[:1] for j in range(len(bank.names)) if j != i]
    assert set(others) == {0.5}, "nothing else was touched"


@pytest.mark.parametrize("most", [1, 2, 5, 9, 14, 20])
def test_search_stopped_at_any_evaluation_keeps_the_best(most: int, tiny_env: dict[str, str]) -> None:
    weights = weights_of(tiny_env, CALIBRATE="1")
    bank, i = weights.where["blocks.0.mlp.up.weight"]
    weights.retune("blocks.0.mlp.up.weight", {"threshold": 0.7})
    target = bank.parameters[i].detach().clone()
    weights.retune("blocks.0.mlp.up.weight", {"threshold": 0.5})
    proxy: Any = Distance(bank.parameters[i], target, most)
    run = t.Calibration(weights, proxy).run()
    assert proxy.evals <= most and run.best <= run.before
    assert proxy.loss() == run.best, "the weights are those of the best"


def test_gain_is_what_chance_does_not_explain() -> None:
    before = np.array([3.0, 2.0, 4.0, 3.0])
    assert t.gain(before, before - 0.1) == pytest.approx(0.1)
    assert t.gain(before, before - [0.5, -0.3, -0.3, 0.3]) == pytest.approx(0.05 - 0.2061553, abs=1e-6)
    assert t.gain(before[:1], before[:1] - 0.1) == pytest.approx(0.1)
    assert not t.gain(before, before * np.nan) > 0


def test_no_time_is_no_calibration(tiny_env: dict[str, str]) -> None:
    weights = weights_of(tiny_env, CALIBRATE="1", **TABLES, ENGRAM_PRUNE="0.5")
    proxy: Any = Distance(torch.zeros(1), torch.ones(1), 0)
    assert not t.Calibration(weights, proxy).run().found
    assert t.prunable_share(weights, proxy)[0] == 0.0 and proxy.evals == 0


def test_proxy_stops_before_its_limit(tiny_env: dict[str, str]) -> None:
    h = t.load_config({**tiny_env, **CALIBRATE})
    rt, now = t.start_runtime(h), [0.0]

    def seconds() -> float:
        now[0] += 0.5
        return now[0]

    proxy = t.Proxy(t.build_model(h, rt, t.BYTE_BOS), rt, t.scoring_variant(h), seconds, 9.0)
    while not proxy.spent():
        proxy.loss()
    assert 3 <= proxy.evals < 7 and now[0] <= 9.0
    assert proxy.rows[:, :-1].numel() <= 512, "CALIB_PROXY_TOKENS"


def test_proxy_is_the_loss_of_the_held_out_part(tiny_env: dict[str, str]) -> None:
    """Against the scoring engine, over the same windows; no window overlaps what is trained on."""
    h = t.load_config(
        {**tiny_env, "HOLDOUT_TOKENS": "321", "CALIB_PROXY_TOKENS": "4096", "EVAL_STREAMS": "1", **TABLES}
    )
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, t.BYTE_BOS)
    proxy = t.Proxy(model, rt, t.scoring_variant(h), lambda: 0.0, 1.0)
    scorer = t.Scorer(h, rt, model, t.ByteTokenizer(256).byte_table())
    assert proxy.loss() == pytest.approx(scorer.score(t.read_holdout(h)).loss, rel=1e-6)


# The real command


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"MATRIX_CODEC": "int6", "FP_STORAGE": "int8"},
        {"TURBO_QUANT_TRAIN": "1", **AVERAGE},
        {"TERNARY_SCALE": "lstsq", "TEMP_SCALING": "1", "PRECISION": "fp64"},
        {"LAYER_PATTERN": "S", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8", **TABLES},
    ],
    ids=str,
)
def test_run_is_not_worse_on_the_proxy_and_reloads_as_in_memory(
    extra: dict[str, str], run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **CALIBRATE, **extra, "CALIB_MAX_EVALS": "20"}
    finished(run_job, env)
    (told,) = read_metrics(folder_of(env), "calibration")
    assert 1 < told["evals"] <= 20
    assert told["proxy_loss_nats"] <= told["proxy_loss_before_nats"]
    assert bool(told["tuning"]) == (told["proxy_loss_nats"] < told["proxy_loss_before_nats"])
    (final,) = read_metrics(folder_of(env), "final")
    assert final["val_loss_nats"] == pytest.approx(final["in_memory_val_loss_nats"], abs=1e-6)


def test_one_evaluation_changes_no_byte(run_job: Run, tiny_env: dict[str, str]) -> None:
    """The first evaluation is of the weights as they are."""
    plain = finished(run_job, {**tiny_env, **SHORT, "RUN_ID": "plain"})
    assert finished(run_job, {**tiny_env, **CALIBRATE, "CALIB_MAX_EVALS": "1"}) == plain
    assert finished(run_job, {**tiny_env, **CALIBRATE, "RUN_ID": "more"}) != plain


def test_bad_tuning_in_a_checkpoint_is_mended(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """A threshold above every weight leaves no code of a matrix; the same checkpoint, with and without calibration."""
    env = {**tiny_env, **SHORT, "ITERATIONS": "40", "MATRIX_LR": "0.1"}
    finished(run_job, env)
    path = folder_of(env) / "checkpoints" / "step_0000040.pt"
    tree = torch.load(path, weights_only=True)
    for bank in tree["banks"].values():
        planted = bank["tuning"][0].clone()
        for i, name in enumerate(bank["names"]):
            planted[i] = 9.0 if name == "blocks.1.mlp.down.weight" else planted[i]
        bank["tuning"] = (planted, *bank["tuning"][1:])
    torch.save(tree, path)
    scores = []
    for name, extra in (("bad", {}), ("mended", {**CALIBRATE, "CALIB_MAX_EVALS": "40"})):
        again = {**env, **extra, "ITERATIONS": "40", "RUN_ID": name, "RESUME": str(path)}
        finished(run_job, again)
        scores.append(read_metrics(folder_of(again), "final")[0]["val_loss_nats"])
    (told,) = read_metrics(folder_of(again), "calibration")
    assert told["tuning"]["blocks.1.mlp.down.weight"]["threshold"] <= 0.8
    assert told["proxy_loss_nats"] < told["proxy_loss_before_nats"] - 1e-3 and scores[1] < scores[0] - 1e-3


def test_ranks_find_the_same(run_job: Run, run_ranks: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    env = {**tiny_env, **EVERYTHING, "PRECISION": "fp64"}
    wanted = finished(run_job, {**env, "RUN_ID": "one"})
    assert [done.code for done in run_ranks(env)] == [0, 0]
    assert artifact_of(env) == wanted
    for kind in ("calibration", "export_proxy", "engram_prune"):
        both = [read_metrics(folder_of({**env, "RUN_ID": name}), kind) for name in ("one", "run")]
        assert len(both[0]) == len(both[1]) >= 1
        for one, two in zip(*both, strict=True):
            assert one.get("tuning") == two.get("tuning") and one.get("best_step") == two.get("best_step")
            assert one["proxy_loss_nats"] == pytest.approx(two["proxy_loss_nats"], abs=1e-10)


def test_resume_from_any_checkpoint_ends_with_the_same_bytes(run_job: Run, tiny_env: dict[str, str]) -> None:
    """Checkpoints tell whether the aligned phase was calibrated and which state was best."""
    env = {**tiny_env, **EVERYTHING, "SAVE_EVERY": "2", "KEEP_CHECKPOINTS": "9", "RUN_ID": "whole"}
    wanted = finished(run_job, env)
    paths = sorted((folder_of(env) / "checkpoints").glob("step_*.pt"))
    assert len(paths) == 6
    trees = [torch.load(path, weights_only=True) for path in paths]
    assert [tree["calibrated"] for tree in trees] == [False, False, *[True] * 4]
    assert [tree["best"] is not None for tree in trees] == [False, *[True] * 5]
    for path in (paths[0], paths[2], paths[-1]):  # before calibration, amid the proxy evaluations, after the last step
        assert finished(run_job, {**env, "RUN_ID": path.stem, "RESUME": str(path)}) == wanted, path.stem


def test_validation_tokens_do_not_matter(
    run_job: Run, tiny_env: dict[str, str], byte_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(byte_data, other)
    write_shard(other / "fineweb_val_000000.bin", np.random.default_rng(1).integers(0, 255, 6000))
    wanted = finished(run_job, {**tiny_env, **EVERYTHING})
    assert finished(run_job, {**tiny_env, **EVERYTHING, "DATA_PATH": str(other), "RUN_ID": "other"}) == wanted


def test_time_for_calibration_is_within_the_training_clock(
    run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    env = {**tiny_env, **CALIBRATE, "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "4", "CALIB_MAX_SECONDS": "1.5"}
    env |= {"CALIB_MAX_EVALS": "1000000", "CALIB_MAX_CANDIDATES": "1000000", "CALIB_PROXY_TOKENS": "4096"}
    finished(run_job, {**env, "TRAIN_LOG_EVERY": "1", "HOLDOUT_TOKENS": "4000"})
    (final,) = read_metrics(folder_of(env), "final")
    (told,) = read_metrics(folder_of(env), "calibration")
    last = read_metrics(folder_of(env), "train")[-1]["train_time_s"]
    assert last <= 2.6 and 0 < told["seconds"] <= 2.0 and last + 0.9 * told["seconds"] <= final["train_time_s"] <= 4.2


# The aligned phase, the best state, pruning


def test_training_goes_on_with_what_was_found(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    env = {**tiny_env, **CALIBRATE, "CALIBRATE": "0", "CALIB_AT_FRACTION": "0.5", "TRAIN_LOG_EVERY": "1"}
    plain = {**tiny_env, **SHORT, "TRAIN_LOG_EVERY": "1", "RUN_ID": "plain"}
    assert finished(run_job, env) != finished(run_job, plain)
    (told,) = read_metrics(folder_of(env), "calibration")
    assert told["step"] == 6 and told["tuning"]
    losses = [[x["train_loss_nats"] for x in read_metrics(folder_of(e), "train")] for e in (env, plain)]
    assert losses[0][:6] == losses[1][:6] and losses[0][6] != losses[1][6]
    tree = torch.load(folder_of(env) / "checkpoints" / "step_0000012.pt", weights_only=True)
    kept = {n: float(b["tuning"][0][i]) for b in tree["banks"].values() for i, n in enumerate(b["names"])}
    assert {n: kept[n] for n in told["tuning"]} == pytest.approx({n: v["threshold"] for n, v in told["tuning"].items()})


def test_best_state_is_exported(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """At rates that undo what was learned, an earlier state wins; with good rates the last one does."""
    base = {**tiny_env, **SHORT, "ITERATIONS": "20", "EXPORT_PROXY_EVAL": "2", "VAL_LOSS_EVERY": "2"}
    rates = {"TIED_EMBED_LR": "2", "SCALAR_LR": "1", "MATRIX_LR": "1", "WARMDOWN_FRACTION": "0"}
    wild = {**base, **rates, "RUN_ID": "wild"}
    for env in (base, wild):
        finished(run_job, env)
        proxies = {x["step"]: x["proxy_loss_nats"] for x in read_metrics(folder_of(env), "export_proxy")}
        assert list(proxies) == [*range(2, 21, 2)]
        best = min(proxies, key=lambda step: proxies[step])
        assert best == 20 if env is base else best < 20
        scores = {
            x["step"]: x["val_loss_nats"] for x in read_metrics(folder_of(env), "val")
        }  # the last is the export's
        (final,) = read_metrics(folder_of(env), "final")
        assert final["val_loss_nats"] == pytest.approx(scores[best], abs=1e-6)


@pytest.mark.parametrize("bound", ["1000", "0", "0.003"])
@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
def test_pruned_rows_are_zero_and_bounded(
    bound: str, codec: str, run_job: Run, tiny_env: dict[str, str], read_metrics: Callable
) -> None:
    base = {**tiny_env, **SHORT, **TABLES, "FP_STORAGE": codec}
    env = {**base, "ENGRAM_PRUNE": "0.5", "ENGRAM_PRUNE_MAX_LOSS": bound}
    plain = t.decode_artifact(finished(run_job, {**base, "RUN_ID": "plain"}))
    pruned = t.decode_artifact(finished(run_job, env))
    (told,) = read_metrics(folder_of(env), "engram_prune")
    assert told["proxy_loss_nats"] <= told["proxy_loss_before_nats"] + float(bound) or not told["share"]
    before, after = (arrays["embed.ngrams.weight"].any(-1) for _, arrays in (plain, pruned))
    assert before.sum() - after.sum() == told["rows"] and not (after & ~before).any()
    if bound == "1000":
        assert told["share"] == 0.5 and told["rows"] == before.sum() // 2
    if told["rows"]:
        assert read_metrics(folder_of(env), "engram_pruned")[0]["saved_bytes"] > 0
    (final,) = read_metrics(folder_of(env), "final")
    assert final["val_loss_nats"] == pytest.approx(final["in_memory_val_loss_nats"], abs=1e-6)


def test_tables_are_pruned_before_gptq(run_job: Run, tiny_env: dict[str, str], read_metrics: Callable) -> None:
    """With corrections in the file, whose names are no weights'."""
    env = {
        **tiny_env,
        **SHORT,
        **TABLES,
        "MATRIX_CODEC": "bf16",
        "FP_STORAGE": "bf16",
        "EXPORT_MODE": "competition_gptq",
    }
    env |= {"ENGRAM_PRUNE": "0.5", "ENGRAM_PRUNE_MAX_LOSS": "1000", "GPTQ_RESERVE_SECONDS": "0"}
    _, arrays = t.decode_artifact(finished(run_job, env))
    (told,) = read_metrics(folder_of(env), "engram_prune")
    assert told["share"] == 0.5 and (~arrays["embed.ngrams.weight"].any(-1)).sum() >= told["rows"] > 0


def test_rare_and_small_rows_are_pruned_first(tiny_env: dict[str, str]) -> None:
    weights = weights_of(tiny_env, **TABLES)
    bank, _ = weights.where["embed.ngrams.weight"]
    bank.latent = torch.zeros_like(bank.latent)
    bank.latent[0, :4] = torch.tensor([1.0, 1.0, 0.01, 2.0])[:, None]
    bank.state["total"] = torch.ones_like(bank.latent[..., :1])
    bank.state["total"][0, 1] = 1e-9  # hardly ever hit
    assert weights.prune(0.5) == 2
    assert bank.parameters[0].any(-1).nonzero().flatten().tolist() == [0, 3]
    assert weights.prune(0.0) == 0


def test_untouched_weights_come_back(tiny_env: dict[str, str], tmp_path: Path) -> None:
    """After the finish latents, averages and tuning are those of the last step, bit for bit."""
    h = t.load_config({**tiny_env, **EVERYTHING, "WARMUP_STEPS": "0"})
    log = t.Log(None, False)
    s = t.open_session(h, t.start_runtime(h), tmp_path, log)
    (tmp_path / "checkpoints").mkdir()
    state = t.TrainState()
    t.train_loop(s, state)
    kept = {key: [x.clone() for x in (f.latent, *f.tuning, f.average)] for key, f in s.weights.forms().items()}
    assert t.finish(s, state) == 0
    for key, form in s.weights.forms().items():
        for was, now in zip(kept[key], (form.latent, *form.tuning, form.average), strict=True):
            assert torch.equal(was, now), key
