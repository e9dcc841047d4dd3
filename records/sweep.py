"""Configurations times seeds, listed, in a grid or searched for, run on cores or GPUs, and compared in pairs.

    python records/sweep.py run   records/sweeps/NAME.json [--devices cpu:0,cpu:1 | cuda:0,cuda:1] [--storage URL]
    python records/sweep.py watch records/sweeps/NAME.json [--storage URL]     the table, again after every run
    python records/sweep.py table records/sweeps/NAME.json [--storage URL]
    python records/sweep.py times records/sweeps/NAME.json [--cores 0] [--steps 12]

The list is a JSON object: `base` and each entry of `configs` hold variables of train_gpt.py (these over those),
`seeds` the seeds that every configuration is run with, `baseline` the configuration that the others are compared with.
A variable SCRIPT names another script than train_gpt.py. `grid`, {variable: [values]}, adds a configuration for every
combination, called VARIABLE=value,... .
Runs are bound by steps (ITERATIONS), so that all train on equal tokens; runs of one seed share data order and the
initial values of the weights that they have in common.

`search` adds, after the list is done, configurations that a sampler of Optuna proposes by the mean losses so far:
{"trials": 30, "sampler": "tpe" | "random" | "gp" | "qmc", "space": {VARIABLE: {"low": 0.01, "high": 0.1, "log": true},
VARIABLE: [values]}}. Each is run with all seeds. The best of many is better than it is: run it with other seeds.

The null experiment: the baseline is also run with `null` other seeds (as many as `seeds` by default, two at least), and
how far they are from it by chance alone stands above every table.

The queue is an Optuna study (SQLite beside the list by default; any database URL): a killed sweep goes on where it was,
a trial whose worker died is tried again and continues from its last checkpoint, and several hosts may share a database.
Every worker runs one process: with one thread, pinned to one core, or on one GPU. Configurations with other data or
another evaluation protocol than the baseline's are not ranked.

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
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from scipy import stats
from sqlalchemy.exc import SQLAlchemyError

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats and retries
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules in records/ only

from records import runs as reading  # noqa: E402 (after the path)

NULL, NULL_SEED = "null", 1_000_000  # the baseline's other seeds are its seeds and this
BEST = 10  # configurations of a search that the table shows
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
}
RETRIES = 3
DEAD_AFTER = 120  # seconds without a sign of life
POLL = 5  # seconds between looks at a queue in which all jobs are taken


SweepError = reading.UserError  # a mistake the user can mend; printed as one line


class Search(NamedTuple):
    """What a list says of its search."""

    trials: int
    sampler: str
    space: dict[str, Any]


class Sweep(NamedTuple):
    """What a list says."""

    path: Path
    base: dict[str, str]
    configs: dict[str, dict[str, str]]
    seeds: list[int]
    baseline: str
    halving: float
    null: int
    search: Search | None

    def jobs(self) -> list[tuple[str, int]]:
        """(configuration, seed), seed by seed, so that pairs complete early; the baseline's other seeds at the end."""
        listed = [(name, seed) for seed in self.seeds for name in self.configs]
        return listed + [(NULL, seed) for seed in self.null_seeds()]

    def null_seeds(self) -> list[int]:
        return [NULL_SEED + number for number in range(self.null)]

    def variables(self, name: str, seed: int) -> dict[str, str]:
        """The environment of one run."""
        return {**self.base, **self.configs[self.baseline if name == NULL else name], "SEED": str(seed)}


def texts(variables: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


def named(variables: dict[str, Any]) -> str:
    """A configuration's name by what it sets."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in variables.items()}
    return ",".join(f"{name}={value}" for name, value in shown.items())


def combinations(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each variable."""
    for values in itertools.product(*grid.values()) if grid else ():
        yield dict(zip(grid, values))


def read_search(raw: dict[str, Any]) -> Search:
    """A list's search. Raises ValueError, KeyError or TypeError."""
    search = Search(int(raw["trials"]), raw.get("sampler", "tpe"), dict(raw["space"]))
    if search.sampler not in SAMPLERS:
        raise ValueError(f"sampler {search.sampler} is not one of {', '.join(SAMPLERS)}")
    for name, spec in search.space.items():
        if not (isinstance(spec, list) and spec) and not (isinstance(spec, dict) and {"low", "high"} <= spec.keys()):
            raise ValueError(f"{name} has neither a list of values nor low and high")
        if isinstance(spec, dict) and not spec["low"] <= spec["high"]:
            raise ValueError(f"{name} has low={spec['low']} above high={spec['high']}")
    return search


def read_sweep(path: Path) -> Sweep:
    """The list in a file. Raises SweepError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        configs = {name: texts(config) for name, config in raw.get("configs", {}).items()}
        choices = list(combinations(raw.get("grid", {})))
        if twice := [name for name, count in Counter(map(named, choices)).items() if count > 1]:
            raise ValueError(f"two choices of its grid have the name {twice[0]}; write the values as texts")
        configs |= {named(choice): texts(choice) for choice in choices}
        seeds, halving = [int(seed) for seed in raw["seeds"]], float(raw.get("halving", "nan"))
        search = read_search(raw["search"]) if "search" in raw else None
        null = int(raw.get("null", max(2, len(seeds))))
        sweep = Sweep(path, texts(raw["base"]), configs, seeds, raw["baseline"], halving, null, search)
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{path} is not a list of configurations: {type(error).__name__}: {error}") from None
    if sweep.baseline not in sweep.configs or NULL in sweep.configs:
        told = f"{NULL!r} is the baseline with other seeds" if NULL in sweep.configs else f"known: {', '.join(configs)}"
        raise SweepError(f"{path}: baseline {sweep.baseline!r} is not among its configs; {told}")
    return sweep


def job_number(sweep: Sweep, name: str, seed: int) -> int:
    """A number that stands for all variables of a run: what is changed in a list is run anew."""
    return zlib.crc32(json.dumps(sweep.variables(name, seed), sort_keys=True).encode())


def open_database(storage: str) -> optuna.storages.RDBStorage:
    """Where trials whose worker is silent for DEAD_AFTER seconds are tried again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    retry = optuna.storages.RetryFailedTrialCallback(max_retry=RETRIES)
    for last in (False, False, False, True):
        try:
            return optuna.storages.RDBStorage(
                storage, heartbeat_interval=DEAD_AFTER // 4, grace_period=DEAD_AFTER, failed_trial_callback=retry
            )
        except SQLAlchemyError:  # another worker makes the same tables at this moment
            if last:
                raise
            time.sleep(1)
    raise AssertionError


def open_study(sweep: Sweep, storage: str) -> optuna.Study:
    """The study of a list, with every job in the queue that is neither there, nor done, nor has failed too often."""
    study = optuna.create_study(study_name=sweep.path.stem, storage=open_database(storage), load_if_exists=True)
    trials = study.get_trials(deepcopy=False)
    failed = Counter(trial.user_attrs.get("job") for trial in trials if trial.state == TrialState.FAIL)
    known = {trial.user_attrs.get("job") for trial in trials if trial.state not in (TrialState.FAIL, TrialState.PRUNED)}
    for name, seed in sweep.jobs():
        number = job_number(sweep, name, seed)
        if number not in known and failed[number] <= RETRIES:
            study.enqueue_trial({"job": number}, {"config": name, "seed": seed, "job": number})
    return study


def open_search(sweep: Sweep, search: Search, storage: str, device: str) -> optuna.Study:
    """The study of a list's search; another space, base or set of seeds is another study."""
    terms = json.dumps([sweep.base, sweep.seeds, search.space], sort_keys=True).encode()
    name = f"{sweep.path.stem}-search-{zlib.crc32(terms):08x}"
    study = optuna.create_study(study_name=name, storage=open_database(storage), load_if_exists=True)
    # Workers must not all propose the same, nor one that is started anew what it has proposed before.
    own = f"{name} {os.uname().nodename} {device} {os.getpid()} {len(study.get_trials(deepcopy=False))}"
    study.sampler = SAMPLERS[search.sampler](zlib.crc32(own.encode()))
    return study


def read_result(folder: Path) -> dict[str, Any] | None:
    """The last object `final` of a run's metrics, or None if it has not ended."""
    path = folder / "metrics.jsonl"
    finals = reading.of_kind(reading.read_metrics(path), "final") if path.is_file() else []
    return finals[-1] if finals else None


def place_of(device: int | str) -> tuple[list[str], dict[str, str]]:
    """Words before the command and variables that keep a run on a core (a number, cpu:number) or GPU (cuda:number)."""
    kind, _, number = str(device).rpartition(":")
    if kind == "cuda":
        return [], {"CUDA_VISIBLE_DEVICES": number}
    pin = ["taskset", "-c", number] if sys.platform == "linux" else []
    return pin, {"CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """In a run's process, before it begins: a killed sweep takes its runs along, which then go on from a checkpoint."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_variables(variables: dict[str, str], run_id: str, device: int | str, out: Path) -> dict[str, Any]:
    """One run on one device, or what it left when it was done before. Raises SweepError when it fails."""
    own = {
        "OUT_DIR": str(out), "RUN_ID": run_id, "RESUME": "auto", "SAVE_EVERY": "500", "MAX_WALLCLOCK_SECONDS": "0",
        "SAMPLE_TOKENS": "0", "KEEP_CHECKPOINTS": "1",
    }  # fmt: skip
    result = read_result(out / run_id)
    if result is None:
        out.mkdir(parents=True, exist_ok=True)
        pin, placed = place_of(device)
        with open(out / f"{run_id}.log", "a", encoding="utf-8") as log:
            environment = {**os.environ, **own, **placed, **variables}
            command = [*pin, sys.executable, str(ROOT / environment.pop("SCRIPT", "train_gpt.py"))]
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=log, check=False, preexec_fn=end_with_parent
            ).returncode
        result = read_result(out / run_id)
        if result is None:
            raise SweepError(f"{run_id} ended with code {code}; see {out / (run_id + '.log')}")
        for path in (out / run_id / "checkpoints").glob("*"):
            path.unlink()  # hundreds of runs would fill the disk
    return result


def run_job(sweep: Sweep, trial: optuna.Trial, device: int | str, out: Path) -> float:
    """One run of the list; its validation loss. Raises SweepError when it fails."""
    name, seed = trial.user_attrs["config"], trial.user_attrs["seed"]
    number = trial.suggest_int("job", 0, 2**32 - 1)
    run_id = f"{name.replace('/', '_')}-{seed}-{number:08x}"
    result = run_variables(sweep.variables(name, seed), run_id, device, out)
    trial.set_user_attr("bpb", result["val_bpb"])
    trial.set_user_attr("bytes", result["model_bytes"])
    trial.set_user_attr("terms", list(reading.read_run(out / run_id).best.terms))
    return float(result["val_loss_nats"])


def proposed(search: Search, trial: optuna.Trial) -> dict[str, str]:
    """The variables that the sampler proposes."""
    values: dict[str, Any] = {}
    for name, spec in search.space.items():
        if isinstance(spec, list):
            values[name] = trial.suggest_categorical(name, spec)
        elif isinstance(spec["low"], int) and isinstance(spec["high"], int):
            values[name] = trial.suggest_int(name, **spec)
        else:
            values[name] = trial.suggest_float(name, **spec)
    return texts(values)


def run_proposal(
    sweep: Sweep, search: Search, trial: optuna.Trial, device: int | str, out: Path, asked: Callable[[], None]
) -> float:
    """A proposed configuration with all seeds; its mean loss. `asked` is called when the sampler has answered."""
    variables = {**sweep.base, **proposed(search, trial)}
    asked()
    losses: dict[int, float] = {}
    for seed in sweep.seeds:
        own = {**variables, "SEED": str(seed)}
        run_id = f"search-{seed}-{zlib.crc32(json.dumps(own, sort_keys=True).encode()):08x}"
        losses[seed] = float(run_variables(own, run_id, device, out)["val_loss_nats"])
    trial.set_user_attr("losses", losses)
    if (out / run_id).is_dir():
        trial.set_user_attr("terms", list(reading.read_run(out / run_id).best.terms))
    return float(np.mean(list(losses.values())))


# SQLite does not lock a row for the worker that takes it: two at once get the same job. Between hosts that is left to
# the run's own lock; the job that is done is then counted by the next `run`. Other databases do lock.
TAKING = threading.Lock()


def take_all(study: optuna.Study, objective: Callable[[optuna.Trial, ExitStack], float], trials: int = 0) -> None:
    """Do what waits in the queue, and new trials up to a number of them, until all are done, those of workers that died
    in between included. The objective closes the stack when it has what it needs of the database."""
    taking = ExitStack()
    while True:
        optuna.storages.fail_stale_trials(study)  # of workers that died: they are put into the queue again
        known = study.get_trials(deepcopy=False)
        retried = sum(RETRIED(trial) is not None for trial in known)
        states = {trial.state for trial in known}
        if TrialState.WAITING in states or len(known) - retried < trials:
            with taking:  # also where the database fails before there is a job
                taking.enter_context(TAKING)
                study.optimize(lambda t: objective(t, taking), n_trials=1, catch=(SweepError, UpdateFinishedTrialError))
        elif TrialState.RUNNING in states:
            time.sleep(POLL)  # another worker's job: done soon, or that worker is dead
        else:
            return


RETRIED = optuna.storages.RetryFailedTrialCallback.retried_trial_number


def work(sweep: Sweep, storage: str, device: int | str, out: Path) -> None:
    """Take jobs of the list until all are done."""
    wanted = {job_number(sweep, name, seed) for name, seed in sweep.jobs()}

    def objective(trial: optuna.Trial, taking: ExitStack) -> float:
        taking.close()  # the job is this worker's: another one may take the next
        if trial.user_attrs.get("job") not in wanted:
            raise optuna.TrialPruned  # another worker took the last job just before, or the list is no longer that
        loss = run_job(sweep, trial, device, out)
        told = f"{trial.user_attrs['config']} seed {trial.user_attrs['seed']}"
        print(f"{device}: {told}: {loss:.4f}", flush=True)
        return loss

    take_all(open_study(sweep, storage), objective)


def seek(sweep: Sweep, search: Search, storage: str, device: int | str, out: Path) -> None:
    """Run proposed configurations until there are enough."""

    def objective(trial: optuna.Trial, taking: ExitStack) -> float:
        loss = run_proposal(sweep, search, trial, device, out, taking.close)
        print(f"{device}: search {named(trial.params)}: {loss:.4f}", flush=True)
        return loss

    take_all(open_search(sweep, search, storage, str(device)), objective, search.trials)


def serve(sweep: Sweep, storage: str, device: int | str, out: Path) -> None:
    """One worker: the list first, since the search is compared with it."""
    work(sweep, storage, device, out)
    if sweep.search:
        seek(sweep, sweep.search, storage, device, out)


def losses(sweep: Sweep, storage: str) -> dict[str, dict[int, float]]:
    """Loss by configuration and seed, of the jobs of the list that are done, and of the best of the search."""
    found: dict[str, dict[int, float]] = {name: {} for name in (*sweep.configs, *[NULL] * (sweep.null > 0))}
    for name, seed, trial in done_jobs(sweep, storage):
        found[name][seed] = float(trial.value)
    return found | found_by_search(sweep, storage)


def done_jobs(sweep: Sweep, storage: str) -> Iterator[tuple[str, int, Any]]:
    """(configuration, seed, trial) of what is done."""
    wanted = {job_number(sweep, name, seed): (name, seed) for name, seed in sweep.jobs()}
    for trial in open_study(sweep, storage).get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params.get("job") in wanted and trial.value is not None:
            yield (*wanted[trial.params["job"]], trial)


def found_by_search(sweep: Sweep, storage: str) -> dict[str, dict[int, float]]:
    """Losses of the best configurations of a search."""
    if not sweep.search:
        return {}
    trials = open_search(sweep, sweep.search, storage, "").get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known = terms_of(sweep, storage).get(sweep.baseline, set())
    alike = [t for t in trials if not known or tuple(t.user_attrs.get("terms", next(iter(known)))) in known]
    best = sorted(alike, key=lambda trial: trial.value)[:BEST]
    return {
        f"search {named(trial.params)}": {int(seed): loss for seed, loss in trial.user_attrs["losses"].items()}
        for trial in best
    }


def terms_of(sweep: Sweep, storage: str) -> dict[str, set[tuple[str, ...]]]:
    """Data and protocols by which each configuration was scored."""
    terms: dict[str, set[tuple[str, ...]]] = {}
    for name, _, trial in done_jobs(sweep, storage):
        terms.setdefault(name, set()).add(tuple(trial.user_attrs.get("terms", ())))
    return terms


def unlike(sweep: Sweep, storage: str) -> set[str]:
    """Configurations that were scored on other data or by another protocol than the baseline."""
    terms = terms_of(sweep, storage)
    known = terms.get(sweep.baseline, set())
    return {name for name, own in terms.items() if known and own != known}


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


def null_lines(sweep: Sweep, found: dict[str, dict[int, float]]) -> list[str]:
    """What the same configuration with other seeds differs by."""
    if not sweep.null:
        return ["null experiment: none, null is 0 in the list", ""]
    own, other = (np.array(list(found.get(name, {}).values())) for name in (sweep.baseline, NULL))
    if min(len(own), len(other)) < 1 or len(own) + len(other) < 3:
        return [f"null experiment ({sweep.baseline} with {sweep.null} other seeds): {len(other)} runs are done", ""]
    squares = sum(float(np.square(losses_ - losses_.mean()).sum()) for losses_ in (own, other))
    spread = float(np.sqrt(squares / (len(own) + len(other) - 2)))
    half = stats.t.ppf(0.975, len(own) + len(other) - 2) * spread * np.sqrt(1 / len(own) + 1 / len(other))
    told = f"null experiment ({sweep.baseline}, {len(own)} and {len(other)} other seeds): difference "
    return [
        f"{told}{other.mean() - own.mean():+.4f}, chance gives +-{half:.4f} (95%), spread of a loss {spread:.4f}",
        "",
    ]


def table(sweep: Sweep, found: dict[str, dict[int, float]], unranked: Sequence[str] = ()) -> str:
    """Markdown, best first; all losses in nats a token."""
    times = read_times(sweep)
    more = " step time | at equal time |" if times else ""
    titles = f"| configuration | runs | nats per token | difference | 95% interval | finds |{more}"
    rows = [*null_lines(sweep, found), titles, "|---" * (titles.count("|") - 1) + "|"]
    ranked = {name: runs for name, runs in found.items() if runs and name != NULL and name not in unranked}
    base, (spread, freedom) = found[sweep.baseline], common_spread(ranked, sweep.seeds)
    means = {name: float(np.mean(list(runs.values()))) for name, runs in ranked.items()}
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
    return "\n".join([*rows, *spread_lines(sweep, spread, freedom), "", *last_lines(sweep, found, unranked)])


def spread_lines(sweep: Sweep, spread: float, freedom: int) -> list[str]:
    """Intervals by the spread that all configurations have in common."""
    if not freedom:
        return []
    error = spread * np.sqrt(2 / len(sweep.seeds))
    half, power = stats.t.ppf(0.975, freedom) * error, stats.t.ppf(0.8, freedom) * error
    told = f"common spread {spread:.4f} ({freedom} degrees of freedom): intervals of any difference over all seeds"
    return ["", f"{told} +-{half:.4f}, finds {half + power:.4f}"]


def absent(sweep: Sweep, found: dict[str, dict[int, float]]) -> list[str]:
    """Runs of the list that have no loss."""
    return [f"{name} ({seed})" for name, seed in sweep.jobs() if seed not in found.get(name, {})]


def last_lines(sweep: Sweep, found: dict[str, dict[int, float]], unranked: Sequence[str]) -> Iterator[str]:
    """What the table does not show."""
    if unranked:
        yield f"not ranked, other data or protocol than {sweep.baseline}: {', '.join(sorted(unranked))}"
    if sweep.search and found.keys() - sweep.configs.keys() - {NULL}:
        shown = min(BEST, sweep.search.trials)
        yield f"search: the best {shown} of {sweep.search.trials}; the least of many is too low: try other seeds"
    yield f"missing: {', '.join(absent(sweep, found)) or 'none'}"


def whole_table(sweep: Sweep, storage: str) -> str:
    """The table of what is in the database."""
    return table(sweep, losses(sweep, storage), sorted(unlike(sweep, storage)))


def watch(sweep: Sweep, storage: str) -> None:
    """Print the table whenever it has changed, in place on a terminal, until nothing is left to do."""
    shown = ""
    while True:
        studies = [open_study(sweep, storage)]
        if sweep.search:
            studies.append(open_search(sweep, sweep.search, storage, "watch"))
        trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
        states = Counter(trial.state.name.lower() for trial in trials)
        text = "\n".join([whole_table(sweep, storage), ", ".join(f"{n} {name}" for name, n in sorted(states.items()))])
        if text != shown:
            print(("\x1b[2J\x1b[H" if sys.stdout.isatty() else "") + text, flush=True)
        if not states["waiting"] and not states["running"]:
            return
        shown = text
        time.sleep(POLL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run and compare a list of configurations.")
    parser.add_argument("command", choices=("run", "watch", "table", "times"))
    parser.add_argument("list", type=Path)
    parser.add_argument("--cores", default="0", help="cores, comma-separated, one worker each")
    parser.add_argument("--devices", default="", help="instead of cores: cpu:0,cpu:1 or cuda:0,cuda:1, one worker each")
    parser.add_argument("--storage", default="", help="database URL of the queue; default: SQLite beside the list")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sweeps", help="folder of run folders")
    parser.add_argument("--steps", type=int, default=12, help="steps of each of the two configurations that are timed")
    options = parser.parse_args(argv)
    try:
        sweep = read_sweep(options.list)
        storage = options.storage or f"sqlite:///{options.list.with_suffix('.db').resolve()}"
        if options.command == "run":
            open_study(sweep, storage)
            devices = (options.devices or options.cores).split(",")
            with ThreadPoolExecutor(len(devices)) as pool:
                list(pool.map(lambda device: serve(sweep, storage, device, options.out / sweep.path.stem), devices))
        if options.command == "times":
            measure_times(sweep, int(options.cores.split(",")[0]), options.steps)
        if options.command == "watch":
            watch(sweep, storage)
        else:
            print(whole_table(sweep, storage))
        if options.command == "run" and absent(sweep, losses(sweep, storage)):
            return 1
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
