"""The command `fit`: weights like trained ones, forecasts of bytes and steps, the search for the largest model."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_shard

import train_gpt as t

TINY = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", "COMPILE": "0"}


def config(**variables: object) -> t.Hyperparameters:
    return t.load_config({**TINY, **{name: str(value) for name, value in variables.items()}})


def answer(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def exact_bytes(**variables: object) -> int:
    return t.weigh(config(**variables), t.SPREADS, t.Speed(0.0, 0.0, "")).budget.total_bytes


# ---- statistics of weights


@pytest.mark.parametrize("spread", [t.Spread(0.0, 0.0, 0.0), t.Spread(0.3, 0.2, 0.0), t.Spread(0.1, 0.25, 0.15)])
def test_spread_of_drawn_weights_is_the_one_they_were_drawn_with(spread: t.Spread) -> None:
    w = torch.stack([t.drawn_like((300, 400), spread, torch.Generator().manual_seed(i)) for i in range(4)])
    w[:, :30] = 0  # rows that nothing trained
    found = t.spread_of(w)
    assert found == pytest.approx(spread, abs=0.03 if spread.elements else 0.05)
    assert math.sqrt(float(w[:, 30:].square().mean()) * 400) == pytest.approx(1.0, rel=0.25)


def test_ngrams_that_never_occur_leave_rows_untrained() -> None:
    """Against rows of a hash table that random keys fall into, at the numbers of distinct n-grams that were counted."""
    h = config(BIGRAM_HASH_BUCKETS=262144, BIGRAM_HASH_ORDERS="2,3", VOCAB_SIZE=1000)
    generator = torch.Generator().manual_seed(0)
    empty = []
    for order in (2, 3):
        keys = torch.randint(262144, (t.DISTINCT[1024][order][0],), generator=generator)
        empty.append(1 - keys.unique().numel() / 262144)
    assert t.untrained_share(h, t.DISTINCT_TOKENS) == pytest.approx(sum(empty) / 2, abs=0.003)
    shares = [t.untrained_share(h, tokens) for tokens in (0, 1e5, 1e6, 1e9)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] < 0.01
    assert t.untrained_share(config(), 0.0) == 0
    wide = [
        t.untrained_share(config(BIGRAM_HASH_BUCKETS=262144, BIGRAM_HASH_ORDERS="2,3", VOCAB_SIZE=size), 1e6)
        for size in (256, 1024, 8192)
    ]
    assert wide[0] == wide[1] > wide[2] + 0.1, "the larger the vocabulary, the more n-grams are there"


# ---- time


def test_steps_in_the_clock_by_hand() -> None:
    h = config(MAX_WALLCLOCK_SECONDS=100, ITERATIONS=10**9, TRAIN_BATCH_TOKENS=256)
    model = t.GPT(h, 1)
    flops, count = t.flops_per_token(model), sum(p.numel() for p in model.parameters())
    found = t.foresee(h, t.Speed(1e-9, 1e-7, ""))
    step = 256 * flops * 1e-9 + count * 1e-7
    assert found == pytest.approx((100 / step, 256 * 100 / step, 100), rel=1e-9)


def test_iterations_bound_the_steps() -> None:
    found = t.foresee(config(MAX_WALLCLOCK_SECONDS=100, ITERATIONS=50), t.Speed(1e-12, 0.0, ""))
    assert found.steps == pytest.approx(50) and found.seconds < 1
    free = t.foresee(config(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=50), t.Speed(1e-6, 0.0, ""))
    assert free.steps == pytest.approx(50) and free.seconds > 100


def test_loops_and_batch_stages_count_from_when_they_begin() -> None:
    base = {"MAX_WALLCLOCK_SECONDS": 100, "ITERATIONS": 10**9, "NUM_LAYERS": 4}
    speed = t.Speed(1e-9, 0.0, "")
    never, late, always = (
        t.foresee(config(**base, RECURRENCE_LAYERS="1-2", RECURRENCE_START_FRACTION=at), speed).steps
        for at in (1.0, 0.5, 0.0)
    )
    assert late == pytest.approx((never + always) / 2) and never > 1.2 * always
    assert never == pytest.approx(t.foresee(config(**base), speed).steps)
    staged = t.foresee(config(**base, BATCH_STAGES="0:256,0.5:512"), speed)
    one, two = (t.foresee(config(**base, TRAIN_BATCH_TOKENS=size), speed) for size in (256, 512))
    assert staged.steps == pytest.approx((one.steps + two.steps) / 2)
    assert staged.tokens == pytest.approx(one.tokens) == pytest.approx(two.tokens)


def test_gpus_are_named_with_their_number() -> None:
    assert t.named_speed("H100", 0.5).flop_seconds == pytest.approx(2 / 989e12)
    assert t.named_speed("RTX 4090x2", 1.0).flop_seconds == pytest.approx(1 / 330e12)
    for name in ("H100x0", "x8", "TPU", "H100xx"):
        with pytest.raises(t.UserError, match="--gpu"):
            t.named_speed(name, 0.5)


# ---- bytes


def test_variables_may_stand_before_and_after_options() -> None:
    found = t.parse_command(["fit", "PRESET=tiny", "--gpu", "H100x8", "SEED=1", "NUM_LAYERS=2"])
    assert found.variables == ["PRESET=tiny", "SEED=1", "NUM_LAYERS=2"] and found.gpu == "H100x8"
    for words in (["fit", "--gpu", "H100x8", "zork"], ["eval", "x", "SEED=1"], ["train", "--zork"]):
        with pytest.raises(SystemExit):
            t.parse_command(words)


def test_forecast_has_the_corrections() -> None:
    """int4 factors of the three largest matrices, counted once whatever the sample is."""
    base = {"EXPORT_MODE": "competition_gptq", "MATRIX_CODEC": "bf16", "MODEL_DIM": 64, "INT_GROUP": 0}
    speed = t.Speed(1e-12, 0.0, "")
    with_them = [t.weigh(config(**base), t.SPREADS, speed, limit).streams for limit in (math.inf, 2**12)]
    without = t.weigh(config(**base, LQER_RANK=0), t.SPREADS, speed).streams
    values = 4 * 3 * (64 + 256)  # embedding, 256 x 64, and two matrices of 128 x 64 or the like
    assert "int4" not in without and 0.3 < with_them[0]["int4"] / values < 0.6
    assert with_them[0]["int4"] == with_them[1]["int4"]
    assert with_them[0]["header"] > without["header"] and with_them[0]["scales"] > without["scales"]


@pytest.mark.parametrize("codec", ["ternary", "int6"])
def test_sample_foretells_the_whole(codec: str) -> None:
    h = config(MODEL_DIM=256, NUM_LAYERS=4, MATRIX_CODEC=codec, FP_STORAGE="int7", BIGRAM_HASH_BUCKETS=4096)
    speed = t.Speed(1e-12, 0.0, "")
    whole, sample = (t.weigh(h, t.SPREADS, speed, limit) for limit in (math.inf, 2**18))
    assert sample.parameters == whole.parameters == sum(p.numel() for p in t.GPT(h, 1).parameters())
    assert sample.budget.total_bytes == pytest.approx(whole.budget.total_bytes, rel=0.01)
    assert set(sample.streams) == set(whole.streams)


def test_codecs_that_come_after_training_are_those_of_the_forecast() -> None:
    speed = t.Speed(1e-12, 0.0, "")
    after = config(EXPORT_MODE="mixed", CODEC_MAP="matrix:int6")
    found = [t.weigh(h, t.SPREADS, speed).streams for h in (after, config(MATRIX_CODEC="int6", FP_STORAGE="int7"))]
    weights = [{kind: size for kind, size in streams.items() if kind != "header"} for streams in found]
    assert weights[0] == weights[1] and {"int6", "int7"} <= set(weights[0])


def test_forecast_of_a_trained_models_artifact(
    byte_data: Path,
    tmp_path: Path,
    tiny_env: dict[str, str],
    run_job: Callable[..., Any],
    read_metrics: Callable[..., Any],
) -> None:
    """Within 3% of the real one, by other models' statistics and by those of its own checkpoint."""
    shape = {"MODEL_DIM": "64", "NUM_LAYERS": "3", "ITERATIONS": "150"}
    choose = np.random.default_rng(0)
    for path in byte_data.glob("*.bin"):  # each stretch of text shifted, so that no token's row stays without training
        tokens = np.fromfile(path, "<u2", offset=1024).astype(np.int64)
        shifted = (tokens + np.repeat(choose.integers(255, size=len(tokens) // 64 + 1), 64)[: len(tokens)]) % 255
        write_shard(tmp_path / path.name, shifted)
    job = {**tiny_env, **shape, "DATA_PATH": str(tmp_path)}
    assert run_job(job).code == 0
    folder = Path(job["OUT_DIR"]) / "run"
    real = read_metrics(folder, "final")[0]["model_bytes"]
    words = [f"{name}={value}" for name, value in {**TINY, **shape}.items()]
    checkpoint = str(next((folder / "checkpoints").glob("step_*.pt")))
    for like in ([], ["--like", checkpoint]):
        done = run_job({"HARD_BUDGET_BYTES": str(real + 24_000 + 2_000)}, ["fit", *words, "--step", "64", *like])
        assert done.code == 0, done.err
        found = answer(done.out)
        assert found["value"] == 64 and found["model_bytes"] == pytest.approx(real, rel=0.03)


# ---- the search


def test_answer_fits_and_the_next_one_does_not(run_job: Callable[..., Any]) -> None:
    done = run_job({**TINY, "ITERATIONS": "1000", "MAX_WALLCLOCK_SECONDS": "5"}, ["fit", "HARD_BUDGET_BYTES=120000"])
    assert done.code == 0, done.err
    found = answer(done.out)
    assert found["variable"] == "MODEL_DIM" and found["value"] % 16 == 0  # two heads of a multiple of 8 channels
    assert exact_bytes(MODEL_DIM=found["value"]) == found["total_bytes"] <= 120_000
    assert exact_bytes(MODEL_DIM=found["value"] + 16) > 120_000
    assert found["model_bytes"] == sum(found["streams"].values()) == found["total_bytes"] - found["code_bytes"]
    assert found["steps"] > 0 and found["tokens_per_parameter"] == pytest.approx(
        found["tokens"] / found["parameters"], rel=0.01
    )
    lines = [line.split() for line in done.out.splitlines()]
    heads = next(words for words in lines if words[0] == "MODEL_DIM")
    rows = [words for words in lines if words[0].isdigit()]
    for column in ("MODEL_DIM", "parameters", "total_bytes"):
        numbers = [int(row[heads.index(column)]) for row in rows]
        assert len(numbers) > 2 and numbers == sorted(set(numbers)), column


def search(budget: int, by: str = "width", **variables: object) -> tuple[t.Fitter, int | None]:
    environ = {**TINY, "HARD_BUDGET_BYTES": str(budget), **{name: str(value) for name, value in variables.items()}}
    fitter = t.Fitter(environ, Namespace(by=by, step=0, gpu="H100x8", mfu=0.4, like=""))
    return fitter, fitter.largest()


def test_more_budget_never_gives_less() -> None:
    found = [search(budget)[1] for budget in (40_000, 60_000, 80_000, 120_000)]
    widths = [value for value in found if value]
    assert len(widths) == 4 and widths == sorted(set(widths))


def test_bytes_rise_with_what_is_searched() -> None:
    cases = (("width", 100_000, {}), ("layers", 60_000, {}), ("buckets", 300_000, {"BIGRAM_HASH_BUCKETS": 1024}))
    for by, budget, variables in cases:
        fitter, value = search(budget, by, **variables)
        sizes = [found.budget.total_bytes for _, found in sorted(fitter.seen.items())]
        assert value and len(sizes) > 2 and sizes == sorted(sizes)
        assert fitter.seen[value].fits and not fitter.seen[min(v for v in fitter.seen if v > value)].fits


def test_only_valid_configurations_are_proposed() -> None:
    fitter, value = search(300_000, KV_CACHE="int8", TURBO_QUANT_KV=1)  # needs heads of a power of two
    assert value and all((v // 2) & (v // 2 - 1) == 0 for v in fitter.seen) and len(fitter.seen) > 2
    fitter, value = search(60_000, "layers", NUM_LAYERS=6, RECURRENCE_LAYERS="3-5")
    assert value and min(fitter.seen) >= 6


def test_a_forecast_that_was_wrong_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether samples promise too much or too little, the whole model decides."""
    weigh, right = t.weigh, search(120_000)[1]
    exactly = exact_bytes(MODEL_DIM=right)
    for factor, budget, want in ((0.99, exactly - 1, right - 16), (1.01, exactly, right)):

        def wrong(h: Any, spreads: Any, speed: Any, limit: float = math.inf, by: float = factor) -> t.Candidate:
            found = weigh(h, spreads, speed, limit)
            sizes = {kind: round(size * (by if limit < math.inf else 1)) for kind, size in found.streams.items()}
            return found._replace(streams=sizes)

        monkeypatch.setattr(t, "weigh", wrong)
        assert search(budget)[1] == want


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["HARD_BUDGET_BYTES=24100", "--gpu", "H100x8"], 3, '"value": null'),
        (["--gpu", "TPU"], 2, "--gpu TPU"),
        (["--by", "buckets", "--gpu", "H100"], 2, "BIGRAM_HASH_BUCKETS"),
        (["MODEL_DIMM=3"], 2, "MODEL_DIM"),
        (["--like", "nothing.pt", "--gpu", "H100"], 2, "nothing.pt"),
        (["loud"], 2, "VARIABLE"),
    ],
)
def test_mistakes_and_the_impossible(words: list[str], code: int, told: str, run_job: Callable[..., Any]) -> None:
    done = run_job(TINY, ["fit", *words])
    assert done.code == code and told in done.out + done.err
