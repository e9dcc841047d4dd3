"""A list of configurations times seeds, run one after the other on pinned cores, and compared in pairs.

    python records/sweep.py run   records/sweeps/NAME.json [--cores 0,1] [--storage URL]
    python records/sweep.py table records/sweeps/NAME.json [--storage URL]
    python records/sweep.py times records/sweeps/NAME.json [--cores 0] [--steps 12]

The list is a JSON object: `base` and each entry of `configs` hold variables of train_gpt.py (these over those),
`seeds` the seeds that every configuration is run with, `baseline` the configuration that the others are compared with.
A variable SCRIPT names another script than train_gpt.py.
Runs are bound by steps (ITERATIONS), so that all train on equal tokens; runs of one seed share data order and the
initial values of the weights that they have in common.

The queue is an Optuna study (SQLite beside the list by default; any database URL): a killed sweep goes on where it was,
a trial whose worker died is tried again and continues from its last checkpoint, and several hosts may share a database.
Every worker runs one process with one thread, pinned to one core.

The table gives the mean loss of each configuration, and the mean paired difference to the baseline with its 95%
interval (Student's t over seeds) and the smallest true difference that the design finds with a power of 80%. A few
pairs tell little of their own spread, so both are also given with the spread that all configurations have in common:
what is left of the losses after a mean for each configuration and one for each seed (two-way analysis of variance).

`times` measures each configuration's step time against the baseline's (`train_gpt.py bench --ratio`: steps in turn, on
one pinned core; to be run on an otherwise idle machine) and keeps the quartiles in NAME.times.json beside the list. The
table then has the step time, and the difference at equal time: a configuration whose step takes r times as long could
have trained on 1/r of the tokens, which costs `halving` * log2(r), the list's loss of the baseline on half the tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from scipy import stats

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats and retries
ROOT = Path(__file__).resolve().parent.parent
RETRIES = 3
DEAD_AFTER = 120  # seconds without a sign of life
POLL = 5  # seconds between looks at a queue in which all jobs are taken


class SweepError(Exception):
    """A mistake the user can mend; printed as one line."""


class Sweep(NamedTuple):
    """What a list says."""

    path: Path
    base: dict[str, str]
    configs: dict[str, dict[str, str]]
    seeds: list[int]
    baseline: str
    halving: float

    def jobs(self) -> list[tuple[str, int]]:
        """(configuration, seed), seed by seed, so that pairs complete early."""
        return [(name, seed) for seed in self.seeds for name in self.configs]

    def variables(self, name: str, seed: int) -> dict[str, str]:
        """The environment of one run."""
        return {**self.base, **self.configs[name], "SEED": str(seed)}


def read_sweep(path: Path) -> Sweep:
    """The list in a file. Raises SweepError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: {k: str(v) for k, v in config.items()} for name, config in raw["configs"].items()}
        base = {name: str(value) for name, value in raw["base"].items()}
        seeds, halving = [int(seed) for seed in raw["seeds"]], float(raw.get("halving", "nan"))
        sweep = Sweep(path, base, texts, seeds, raw["baseline"], halving)
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{path} is not a list of configurations: {type(error).__name__}: {error}") from None
    if sweep.baseline not in sweep.configs:
        raise SweepError(f"{path}: baseline {sweep.baseline!r} is not among its configs")
    return sweep


def job_number(sweep: Sweep, name: str, seed: int) -> int:
    """A number that stands for all variables of a run: what is changed in a list is run anew."""
    return zlib.crc32(json.dumps(sweep.variables(name, seed), sort_keys=True).encode())


def open_study(sweep: Sweep, storage: str) -> optuna.Study:
    """The study of a list, with every job in the queue that is neither there, nor done, nor has failed too often."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    retry = optuna.storages.RetryFailedTrialCallback(max_retry=RETRIES)
    database = optuna.storages.RDBStorage(
        storage, heartbeat_interval=DEAD_AFTER // 4, grace_period=DEAD_AFTER, failed_trial_callback=retry
    )
    study = optuna.create_study(study_name=sweep.path.stem, storage=database, load_if_exists=True)
    trials = study.get_trials(deepcopy=False)
    failed = Counter(trial.user_attrs.get("job") for trial in trials if trial.state == TrialState.FAIL)
    known = {trial.user_attrs.get("job") for trial in trials if trial.state not in (TrialState.FAIL, TrialState.PRUNED)}
    for name, seed in sweep.jobs():
        number = job_number(sweep, name, seed)
        if number not in known and failed[number] <= RETRIES:
            study.enqueue_trial({"job": number}, {"config": name, "seed": seed, "job": number})
    return study


def read_result(folder: Path) -> dict[str, Any] | None:
    """The last object `final` of a run's metrics, or None if it has not ended."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    finals = [record for record in map(json.loads, lines) if record["kind"] == "final"]
    return finals[-1] if finals else None


def run_job(sweep: Sweep, trial: optuna.Trial, core: int, out: Path) -> float:
    """One run on one core; its validation loss. Raises SweepError when it fails."""
    name, seed = trial.user_attrs["config"], trial.user_attrs["seed"]
    number = trial.suggest_int("job", 0, 2**32 - 1)
    run_id = f"{name}-{seed}-{number:08x}"
    own = {
        "OUT_DIR": str(out), "RUN_ID": run_id, "RESUME": "auto", "SAVE_EVERY": "500", "CPU_THREADS": "1",
        "OMP_NUM_THREADS": "1", "MAX_WALLCLOCK_SECONDS": "0", "SAMPLE_TOKENS": "0", "KEEP_CHECKPOINTS": "1",
    }  # fmt: skip
    result = read_result(out / run_id)
    if result is None:
        out.mkdir(parents=True, exist_ok=True)
        pin = ["taskset", "-c", str(core)] if sys.platform == "linux" else []
        with open(out / f"{run_id}.log", "a", encoding="utf-8") as log:
            environment = {**os.environ, **own, **sweep.variables(name, seed)}
            command = [*pin, sys.executable, str(ROOT / environment.pop("SCRIPT", "train_gpt.py"))]
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        result = read_result(out / run_id)
        if result is None:
            raise SweepError(f"{run_id} ended with code {code}; see {out / (run_id + '.log')}")
        for path in (out / run_id / "checkpoints").glob("*"):
            path.unlink()  # hundreds of runs would fill the disk
    trial.set_user_attr("bpb", result["val_bpb"])
    trial.set_user_attr("bytes", result["model_bytes"])
    return float(result["val_loss_nats"])


# SQLite does not lock a row for the worker that takes it: two at once get the same job. Between hosts that is left to
# the run's own lock; the job that is done is then counted by the next `run`. Other databases do lock.
TAKING = threading.Lock()


def work(sweep: Sweep, storage: str, core: int, out: Path) -> None:
    """Take jobs from the queue until all are done, those of workers that died in between included."""
    study, taking = open_study(sweep, storage), ExitStack()
    wanted = {job_number(sweep, name, seed) for name, seed in sweep.jobs()}

    def objective(trial: optuna.Trial) -> float:
        taking.close()  # the job is this worker's: another one may take the next
        if trial.user_attrs.get("job") not in wanted:
            raise optuna.TrialPruned  # another worker took the last job just before, or the list is no longer that
        loss = run_job(sweep, trial, core, out)
        print(f"core {core}: {trial.user_attrs['config']} seed {trial.user_attrs['seed']}: {loss:.4f}", flush=True)
        return loss

    while True:
        optuna.storages.fail_stale_trials(study)  # of workers that died: they are put into the queue again
        states = {trial.state for trial in study.get_trials(deepcopy=False)}
        if TrialState.WAITING in states:
            with taking:  # also where the database fails before there is a job
                taking.enter_context(TAKING)
                study.optimize(objective, n_trials=1, catch=(SweepError, UpdateFinishedTrialError))
        elif TrialState.RUNNING in states:
            time.sleep(POLL)  # another worker's job: done soon, or that worker is dead
        else:
            return


def losses(sweep: Sweep, storage: str) -> dict[str, dict[int, float]]:
    """Loss by configuration and seed, of the jobs of the list that are done."""
    wanted = {job_number(sweep, name, seed): (name, seed) for name, seed in sweep.jobs()}
    found: dict[str, dict[int, float]] = {name: {} for name in sweep.configs}
    for trial in open_study(sweep, storage).get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params.get("job") in wanted and trial.value is not None:
            name, seed = wanted[trial.params["job"]]
            found[name][seed] = trial.value
    return found


def paired(own: dict[int, float], base: dict[int, float]) -> tuple[int, float, float, float]:
    """Number of pairs, mean difference, half width of its 95% interval, and the smallest difference that so many pairs
    with this spread find with a power of 80% (two-sided 5%); NaN for what one pair cannot tell."""
    differences = np.array([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])
    count = len(differences)
    if count < 2:
        return count, float(differences.mean()) if count else np.nan, np.nan, np.nan
    error = differences.std(ddof=1) / np.sqrt(count)
    critical, power = stats.t.ppf(0.975, count - 1), stats.t.ppf(0.8, count - 1)
    return count, float(differences.mean()), float(critical * error), float((critical + power) * error)


def common_spread(found: dict[str, dict[int, float]], seeds: Sequence[int]) -> tuple[float, int]:
    """Standard deviation of a loss about the sum of its configuration's and its seed's effects, and its degrees of
    freedom, from the configurations that have all seeds; (NaN, 0) with fewer than two of them."""
    losses = np.array([[runs[seed] for seed in seeds] for runs in found.values() if runs.keys() >= set(seeds)])
    freedom = (len(losses) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return np.nan, 0
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    return float(np.sqrt(np.square(left).sum() / freedom)), freedom


def times_path(sweep: Sweep) -> Path:
    return sweep.path.with_suffix(".times.json")


def read_times(sweep: Sweep) -> dict[str, list[float]]:
    """Quartiles of step time over the baseline's, by configuration; empty if none were measured."""
    path = times_path(sweep)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def time_config(sweep: Sweep, name: str, core: int, steps: int) -> list[float]:
    """Quartiles of a configuration's step time over the baseline's. Raises SweepError when the measurement fails."""
    first, second = ({**sweep.base, **sweep.configs[n]} for n in (sweep.baseline, name))
    reset = dict.fromkeys(first.keys() - second.keys(), "")  # an empty variable counts as unset
    pin = ["taskset", "-c", str(core)] if sys.platform == "linux" else []
    other = [f"{key}={value}" for key, value in {**reset, **second}.items()]
    command = [*pin, sys.executable, str(ROOT / "train_gpt.py"), "bench", "--steps", str(steps), "--ratio", *other]
    environment = {**os.environ, **first, "CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SweepError(f"{name} cannot be timed: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])["ratio"]


def measure_times(sweep: Sweep, core: int, steps: int) -> None:
    """Time what has no time yet."""
    found = read_times(sweep)
    for name in sweep.configs:
        if name != sweep.baseline and name not in found and "SCRIPT" not in sweep.configs[name]:
            found[name] = time_config(sweep, name, core, steps)
            print(f"{name}: {found[name][1]:.3f} ({found[name][0]:.3f} to {found[name][2]:.3f})", flush=True)
            times_path(sweep).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(sweep: Sweep, found: dict[str, dict[int, float]]) -> str:
    """Markdown, best first; all losses in nats a token."""
    times = read_times(sweep)
    more = " step time | at equal time |" if times else ""
    titles = f"| configuration | runs | nats per token | difference | 95% interval | finds |{more}"
    rows = [titles, "|---" * (titles.count("|") - 1) + "|"]
    base, (spread, freedom) = found[sweep.baseline], common_spread(found, sweep.seeds)
    means = {name: float(np.mean(list(runs.values()))) for name, runs in found.items() if runs}
    for name in sorted(means, key=lambda name: means[name]):
        count, mean, half, least = paired(found[name], base)
        difference = "" if name == sweep.baseline or not count else f"{mean:+.4f}"
        interval = "" if not difference or np.isnan(half) else f"{mean - half:+.4f} to {mean + half:+.4f}"
        finds = "" if not interval else f"{least:.4f}"
        row = f"| {name} | {len(found[name])} | {means[name]:.4f} | {difference} | {interval} | {finds} |"
        if name in times:
            ratio = times[name][1]
            row += f" {ratio:.2f} | {mean + sweep.halving * np.log2(ratio):+.4f} |"
        rows.append(row + ("  |  |" if times and name not in times else ""))
    if freedom:
        error = spread * np.sqrt(2 / len(sweep.seeds))
        half, power = stats.t.ppf(0.975, freedom) * error, stats.t.ppf(0.8, freedom) * error
        told = f"common spread {spread:.4f} ({freedom} degrees of freedom): intervals of any difference over all seeds"
        rows += ["", f"{told} +-{half:.4f}, finds {half + power:.4f}"]
    missing = [f"{name} ({seed})" for name, seed in sweep.jobs() if seed not in found[name]]
    return "\n".join([*rows, "", f"missing: {', '.join(missing) or 'none'}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run and compare a list of configurations.")
    parser.add_argument("command", choices=("run", "table", "times"))
    parser.add_argument("list", type=Path)
    parser.add_argument("--cores", default="0", help="cores, comma-separated, one worker each")
    parser.add_argument("--storage", default="", help="database URL of the queue; default: SQLite beside the list")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sweeps", help="folder of run folders")
    parser.add_argument("--steps", type=int, default=12, help="steps of each of the two configurations that are timed")
    options = parser.parse_args(argv)
    try:
        sweep = read_sweep(options.list)
        storage = options.storage or f"sqlite:///{options.list.with_suffix('.db').resolve()}"
        if options.command == "run":
            open_study(sweep, storage)
            cores = [int(core) for core in options.cores.split(",")]
            with ThreadPoolExecutor(len(cores)) as pool:
                list(pool.map(lambda core: work(sweep, storage, core, options.out / sweep.path.stem), cores))
        if options.command == "times":
            measure_times(sweep, int(options.cores.split(",")[0]), options.steps)
        print(table(sweep, losses(sweep, storage)))
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
