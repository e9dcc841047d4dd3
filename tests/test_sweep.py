"""records/sweep.py: paired comparisons, and a queue that goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, clean_environment

pytest.importorskip("optuna")
from scipy import stats

sys.path.insert(0, str(ROOT / "records"))
import sweep

LIST: dict[str, Any] = {
    "baseline": "plain",
    "null": 0,
    "seeds": [1, 2, 3],
    "base": {"PRESET": "tiny", "ITERATIONS": 4},
    "configs": {"plain": {}, "wide": {"MODEL_DIM": 64}},
}


def write_list(folder: Path, **changes: Any) -> Path:
    path = folder / "some.json"
    path.write_text(json.dumps({**LIST, **changes}))
    return path


def storage_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'queue.db'}"


def test_paired_difference_is_students() -> None:
    generator = np.random.default_rng(0)
    base = {seed: float(generator.normal(3, 0.1)) for seed in range(6)}
    own = {seed: base[seed] - 0.05 + float(generator.normal(0, 0.02)) for seed in range(1, 8) if seed in base}
    count, mean, half, least = sweep.paired(own, base)
    differences = [own[seed] - base[seed] for seed in own]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert count == 5 and mean == pytest.approx(np.mean(differences))
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert least > half, "an effect as small as the interval is found only half of the time"
    assert sweep.paired({1: 2.0}, {1: 1.5})[:2] == (1, 0.5) and np.isnan(sweep.paired({1: 2.0}, {1: 1.5})[2])


def test_common_spread_is_that_of_a_two_way_layout() -> None:
    """Effects of configurations and seeds cancel; what is left has the spread that was put in."""
    generator, seeds = np.random.default_rng(1), [1, 2, 3]
    effects = {f"c{i}": generator.normal(0, 5) for i in range(400)}
    found = {
        name: {seed: effect + 7.0 * seed + generator.normal(0, 0.02) for seed in seeds}
        for name, effect in effects.items()
    }
    found["unfinished"] = {1: 99.0}
    spread, freedom = sweep.common_spread(found, seeds)
    assert freedom == 399 * 2 and spread == pytest.approx(0.02, rel=0.06)
    assert sweep.common_spread({"c0": found["c0"]}, seeds)[1] == 0


@pytest.mark.parametrize(
    "text,told",
    [
        ("{", "not a list"),
        ('{"base": {}}', "not a list"),
        (json.dumps({**LIST, "baseline": "x"}), "baseline 'x'"),
        (
            json.dumps({**LIST, "grid": {"A": [0.0123411, 0.0123412]}}),
            "two choices of its grid have the name A=0.01234",
        ),
    ],
)
def test_bad_list_is_one_line(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert sweep.main(["table", str(path)]) == 2
    assert told in capsys.readouterr().err
    assert sweep.main(["table", str(tmp_path / "missing.json")]) == 2


def test_times_are_kept_and_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of twice the time costs what the baseline loses on half of the tokens."""
    some, asked = sweep.read_sweep(write_list(tmp_path, halving=0.25)), []

    def time(s: sweep.Sweep, name: str, core: int, steps: int) -> list[float]:
        asked.append((name, core, steps))
        return [1.9, 2.0, 2.1]

    monkeypatch.setattr(sweep, "time_config", time)
    for _ in range(2):
        sweep.measure_times(some, 1, 5)
    assert asked == [("wide", 1, 5)] and sweep.read_times(some) == {"wide": [1.9, 2.0, 2.1]}
    losses = {"plain": {1: 3.0, 2: 3.1, 3: 3.2}, "wide": {1: 2.9, 2: 3.0, 3: 3.1}}
    assert "2.00 | +0.1500 |" in sweep.table(some, losses)


def test_a_time_is_the_ratio_that_the_product_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        ran.append((command, env))
        return subprocess.CompletedProcess(command, 0, 'a line\n{"ratio": [1, 2, 3]}\n', "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    some = sweep.read_sweep(write_list(tmp_path, configs={"plain": {"MODEL_DIM": 48}, "wide": {"NUM_HEADS": 4}}))
    assert sweep.time_config(some, "wide", 0, 7) == [1, 2, 3]
    command, env = ran[0]
    assert env["MODEL_DIM"] == "48" and {"NUM_HEADS=4", "MODEL_DIM=", "PRESET=tiny"} <= set(command)


def test_queue_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are run once each, an interrupted one again; a changed one is a new job; the table says what is missing."""
    ran: list[tuple[str, int]] = []

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        job = (trial.user_attrs["config"], trial.user_attrs["seed"])
        ran.append(job)
        if len(ran) == 4:
            raise KeyboardInterrupt  # the sweep is ended in the middle of a job
        return 3.0 + (job[0] == "wide") * 0.1 + 0.01 * job[1]

    monkeypatch.setattr(sweep, "run_job", run)
    some, storage = sweep.read_sweep(write_list(tmp_path)), storage_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep.work(some, storage, 0, tmp_path)
    assert len(ran) == 4
    assert "missing: wide (2), plain (3), wide (3)" in sweep.table(some, sweep.losses(some, storage))
    sweep.work(some, storage, 0, tmp_path)
    assert sorted(ran[4:]) == [("plain", 3), ("wide", 2), ("wide", 3)]
    assert "missing: none" in sweep.table(some, sweep.losses(some, storage))
    changed = sweep.read_sweep(write_list(tmp_path, configs={"plain": {}, "wide": {"MODEL_DIM": 96}}))
    assert "missing: wide (1)" in sweep.table(changed, sweep.losses(changed, storage))


def test_a_job_that_has_left_the_list_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables are gone, or others now; back in the list, it is run."""
    ran: list[str] = []

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        number = trial.suggest_int("job", 0, 2**32 - 1)
        ran.append(s.variables(trial.user_attrs["config"], 1).get("MODEL_DIM", "none"))
        assert number == sweep.job_number(s, trial.user_attrs["config"], 1)
        return 3.0

    monkeypatch.setattr(sweep, "run_job", run)
    storage = storage_of(tmp_path)
    first = sweep.read_sweep(
        write_list(tmp_path, seeds=[1], configs={"plain": {}, "a": {"MODEL_DIM": 64}, "b": {"MODEL_DIM": 32}})
    )
    sweep.open_study(first, storage)  # all are queued, none has run
    sweep.work(
        sweep.read_sweep(write_list(tmp_path, seeds=[1], configs={"plain": {}, "a": {"MODEL_DIM": 96}})),
        storage,
        0,
        tmp_path,
    )
    assert sorted(ran) == ["96", "none"]
    sweep.work(first, storage, 0, tmp_path)
    assert sorted(ran) == ["32", "64", "96", "none"]


def test_more_workers_than_jobs_share_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that finds the last job taken waits for it; nothing but jobs is left in the database."""
    monkeypatch.setattr(sweep, "POLL", 0.05)

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        time.sleep(0.5)
        return 3.0

    monkeypatch.setattr(sweep, "run_job", run)
    path, storage = write_list(tmp_path, configs={"plain": {}}, seeds=[1]), storage_of(tmp_path)
    some = sweep.read_sweep(path)
    sweep.open_study(some, storage)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda core: sweep.work(some, storage, core, tmp_path), range(3)))
    trials = sweep.open_study(some, storage).get_trials()
    assert [trial.state.name for trial in trials if trial.state.name != "PRUNED"] == ["COMPLETE"]
    assert sweep.losses(some, storage) == {"plain": {1: 3.0}}


def test_workers_take_jobs_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite would give the same job to two workers that ask at once; their runs go side by side all the same."""
    taking, most, running, ran = [], [0], [], list[str]()
    real = sweep.optuna.Study._pop_waiting_trial_id

    def slowly(study: Any) -> Any:
        taking.append(1)
        most[0] = max(most[0], len(taking))
        time.sleep(0.05)
        found = real(study)
        taking.pop()
        return found

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        running.append(1)
        time.sleep(0.4)
        ran.append(f"{trial.user_attrs['config']} {trial.user_attrs['seed']} {len(running)}")
        running.pop()
        return 3.0

    monkeypatch.setattr(sweep, "POLL", 0.05)
    monkeypatch.setattr(sweep.optuna.Study, "_pop_waiting_trial_id", slowly)
    monkeypatch.setattr(sweep, "run_job", run)
    some, storage = sweep.read_sweep(write_list(tmp_path)), storage_of(tmp_path)
    sweep.open_study(some, storage)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda core: sweep.work(some, storage, core, tmp_path), range(3)))
    assert most[0] == 1
    assert len({job.rsplit(" ", 1)[0] for job in ran}) == len(ran) == 6
    assert max(int(job.split()[-1]) for job in ran) > 1


def test_a_database_that_fails_holds_up_no_other_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(study: Any) -> Any:
        raise RuntimeError("database is locked")

    some, storage = sweep.read_sweep(write_list(tmp_path)), storage_of(tmp_path)
    monkeypatch.setattr(sweep.optuna.Study, "_pop_waiting_trial_id", fail)
    with pytest.raises(RuntimeError, match="locked"):
        sweep.work(some, storage, 0, tmp_path)
    assert not sweep.TAKING.locked()


def test_a_job_whose_worker_died_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just after a kill its trial still looks alive; it is run again as soon as it does not."""
    monkeypatch.setattr(sweep, "POLL", 0.05)
    looks: list[int] = []
    monkeypatch.setattr(sweep.optuna.storages, "fail_stale_trials", lambda study: looks.append(1) or revive(study))

    def revive(study: Any) -> None:
        for trial in study.get_trials(states=(sweep.TrialState.RUNNING,)) if len(looks) > 3 else ():
            study.tell(trial.number, state=sweep.TrialState.FAIL)
            study.enqueue_trial({"job": trial.user_attrs["job"]}, trial.user_attrs)

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        return 3.0

    monkeypatch.setattr(sweep, "run_job", run)
    some, storage = sweep.read_sweep(write_list(tmp_path, configs={"plain": {}}, seeds=[1])), storage_of(tmp_path)
    sweep.open_study(some, storage).ask()  # taken, and its worker killed
    sweep.work(some, storage, 0, tmp_path)
    assert len(looks) > 3 and sweep.losses(some, storage) == {"plain": {1: 3.0}}


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    grid = {"MODEL_DIM": [32, 64], "NUM_HEADS": [1, 2, 4]}
    some = sweep.read_sweep(write_list(tmp_path, grid=grid))
    assert len(some.configs) == 2 + 6 and some.variables("MODEL_DIM=64,NUM_HEADS=4", 3) == {
        **{name: str(value) for name, value in LIST["base"].items()},
        "MODEL_DIM": "64",
        "NUM_HEADS": "4",
        "SEED": "3",
    }
    assert len(some.jobs()) == 8 * 3


@pytest.mark.parametrize("seeds", [[1, 2, 3], [1]])
def test_the_null_experiment_is_run_and_stands_above_the_table(
    seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[dict[str, str]] = []

    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        variables = s.variables(trial.user_attrs["config"], trial.user_attrs["seed"])
        ran.append(variables)
        return 3.0 + 0.01 * (int(variables["SEED"]) % 7)

    monkeypatch.setattr(sweep, "run_job", run)
    path = tmp_path / "some.json"
    path.write_text(json.dumps({**{name: value for name, value in LIST.items() if name != "null"}, "seeds": seeds}))
    some, storage = sweep.read_sweep(path), storage_of(tmp_path)
    assert "0 runs are done" in sweep.whole_table(some, storage)
    sweep.work(some, storage, 0, tmp_path)
    others = [v for v in ran if int(v["SEED"]) not in seeds]
    assert len(others) == max(2, len(seeds)) == len({v["SEED"] for v in others}) and all(
        "MODEL_DIM" not in v for v in others
    )
    first = sweep.whole_table(some, storage).splitlines()[0]
    own, null = ([3.0 + 0.01 * (seed % 7) for seed in one] for one in (some.seeds, some.null_seeds()))
    interval = stats.ttest_ind(null, own).confidence_interval(0.95)  # of equal variances
    assert f"difference {np.mean(null) - np.mean(own):+.4f}" in first
    assert f"+-{(interval.high - interval.low) / 2:.4f} (95%)" in first


@pytest.mark.parametrize("sampler", sweep.SAMPLERS)
def test_samplers_propose_within_the_space(sampler: str) -> None:
    space = {"MATRIX_LR": {"low": 0.001, "high": 1.0, "log": True}, "NUM_HEADS": [1, 2], "DEPTH": {"low": 2, "high": 4}}
    study = sweep.optuna.create_study(sampler=sweep.SAMPLERS[sampler](1))
    found: list[dict[str, str]] = []

    def objective(trial: Any) -> float:
        found.append(sweep.proposed(sweep.Search(4, sampler, space), trial))
        return float(found[-1]["MATRIX_LR"])

    study.optimize(objective, n_trials=4)
    assert all(0.001 <= float(one["MATRIX_LR"]) <= 1 and one["NUM_HEADS"] in "12" for one in found)
    assert all(one["DEPTH"] in "234" for one in found) and len({one["MATRIX_LR"] for one in found}) == 4


def test_a_search_finds_the_least_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proposal is run with all seeds; after an interruption there are as many in the end, none of them twice."""
    ran: list[tuple[str, str, str]] = []

    def run(variables: dict[str, str], run_id: str, device: str, out: Path) -> dict[str, Any]:
        ran.append((variables["MATRIX_LR"], variables["NUM_HEADS"], variables["SEED"]))
        if len(ran) == 5:
            raise KeyboardInterrupt
        loss = abs(np.log(float(variables["MATRIX_LR"]) / 0.03)) + (variables["NUM_HEADS"] != "2")
        return {"val_loss_nats": 3 + loss + 0.001 * int(variables["SEED"])}

    monkeypatch.setattr(sweep, "run_variables", run)
    monkeypatch.setattr(sweep, "BEST", 3)
    space = {"MATRIX_LR": {"low": 0.001, "high": 1.0, "log": True}, "NUM_HEADS": [1, 2]}
    some = sweep.read_sweep(write_list(tmp_path, search={"trials": 5, "space": space}))
    storage = storage_of(tmp_path)
    assert some.search is not None
    with pytest.raises(KeyboardInterrupt):
        sweep.seek(some, some.search, storage, "cuda:0", tmp_path)
    sweep.seek(some, some.search, storage, "cuda:1", tmp_path)
    done = [t for t in sweep.open_search(some, some.search, storage, "").get_trials() if t.state.name == "COMPLETE"]
    assert len(done) == 4, "the interrupted one counts"
    assert all(sorted(ran.count((lr, heads, str(seed))) for seed in (1, 2, 3)) == [1, 1, 1] for lr, heads, _ in ran[5:])
    best = min(done, key=lambda t: t.value)
    found = sweep.losses(some, storage)
    name = next(name for name in found if name.startswith("search"))
    assert len([name for name in found if name.startswith("search")]) == sweep.BEST and found[name][1] == min(
        runs[1] for runs in found.values() if runs
    )
    assert found[name] == {int(seed): loss for seed, loss in best.user_attrs["losses"].items()}
    assert "the least of many is too low" in sweep.table(some, {**found, "plain": {1: 4.0}})


@pytest.mark.parametrize(
    "search",
    [
        {"trials": 3},
        {"trials": 3, "space": {"A": 5}},
        {"trials": 3, "sampler": "x", "space": {"A": [1]}},
        {"trials": 3, "space": {"A": {"low": 2, "high": 1}}},
    ],
)
def test_bad_search_is_one_line(search: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(sweep.SweepError, match="not a list of configurations"):
        sweep.read_sweep(write_list(tmp_path, search=search))


def test_a_search_that_goes_on_proposes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()

    def run(variables: dict[str, str], run_id: str, device: str, out: Path) -> dict[str, Any]:
        ran.append(variables["MATRIX_LR"])
        return {"val_loss_nats": 3.0}

    monkeypatch.setattr(sweep, "run_variables", run)
    search = {"sampler": "random", "space": {"MATRIX_LR": {"low": 0.001, "high": 1.0}}}
    for trials in (2, 4):
        some = sweep.read_sweep(write_list(tmp_path, search={**search, "trials": trials}))
        assert some.search is not None
        sweep.seek(some, some.search, storage_of(tmp_path), "cuda:0", tmp_path)
    assert len(set(ran)) == 4


def test_a_killed_sweep_takes_its_runs_along(tmp_path: Path) -> None:
    """Its run would hold the folder that the next worker goes on in."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    text = f"import sys\nsys.path.insert(0, {str(sweep.ROOT)!r})\nfrom pathlib import Path\nfrom records import sweep\n"
    text += f"sweep.run_variables({{'SCRIPT': {str(script)!r}}}, 'run', '0', Path({str(tmp_path)!r}))\n"
    worker = subprocess.Popen([sys.executable, "-c", text])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    worker.kill()
    worker.wait()
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the run goes on"
        time.sleep(0.05)


def test_a_worker_keeps_to_its_core_or_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        ran.append((command, env))
        folder = tmp_path / env["RUN_ID"]
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"kind": "final", "val_loss_nats": 2.5}\n{"kind": "fin')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    for device in ("cpu:1", "cuda:3"):
        assert sweep.run_variables({"SEED": "1"}, device[:3], device, tmp_path)["val_loss_nats"] == 2.5
    (pinned, own), (free, gpu) = ran
    assert (pinned[:3] == ["taskset", "-c", "1"] or sys.platform != "linux") and own["OMP_NUM_THREADS"] == "1"
    assert gpu["CUDA_VISIBLE_DEVICES"] == "3" and free[0] == sys.executable
    assert sweep.run_variables({"SEED": "1"}, "cpu", "cpu:0", tmp_path)["val_loss_nats"] == 2.5 and len(ran) == 2


def test_what_was_scored_otherwise_is_not_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(s: sweep.Sweep, trial: Any, core: int, out: Path) -> float:
        trial.suggest_int("job", 0, 2**32 - 1)
        trial.set_user_attr("terms", ["data", f"window={32 if trial.user_attrs['config'] == 'wide' else 16}"])
        return 3.0

    monkeypatch.setattr(sweep, "run_job", run)
    some, storage = sweep.read_sweep(write_list(tmp_path)), storage_of(tmp_path)
    sweep.work(some, storage, 0, tmp_path)
    shown = sweep.whole_table(some, storage)
    assert "| plain | 3 |" in shown and "| wide |" not in shown and "protocol than plain: wide" in shown


def test_watch_shows_what_changes_until_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "run_job", lambda s, trial, core, out: trial.suggest_int("job", 0, 2**32 - 1) and 3.0)
    some, storage = sweep.read_sweep(write_list(tmp_path, seeds=[1])), storage_of(tmp_path)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: sweep.work(some, storage, 0, tmp_path))
    sweep.watch(some, storage)
    out = capsys.readouterr().out
    assert out.index("2 waiting") < out.index("missing: none") < out.index("2 complete")


@pytest.mark.slow  # four real runs: that the command line, the pinning and the metrics fit together
def test_a_sweep_runs_and_compares(tmp_path: Path, byte_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in clean_environment({}).items():
        monkeypatch.setenv(name, value)
    base = {**LIST["base"], "VOCAB_SIZE": 256, "DATA_PATH": str(byte_data), "DEVICE": "cpu", "COMPILE": 0}
    path = write_list(tmp_path, base=base, seeds=[1, 2])
    arguments = ["run", str(path), "--storage", storage_of(tmp_path), "--out", str(tmp_path / "out")]
    assert sweep.main(arguments) == 0
    found = sweep.losses(sweep.read_sweep(path), storage_of(tmp_path))
    assert all(set(runs) == {1, 2} for runs in found.values())
    assert len({loss for runs in found.values() for loss in runs.values()}) == 4
