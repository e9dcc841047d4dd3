"""What a run left behind, read from its folder or from a log alone: ours, and those that the field publishes.

A run folder holds metrics.jsonl, train.log and config.env; any one of the first two will do. Logs are read line by
line in the form of the challenge's scripts, in both of its spellings (`step:200/9000 train_loss:2.4 train_time:16224ms`
and `200/9000 train_loss: 2.4 train_time: 0.3m`); ours are written in the first.
"""

import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules in records/ only

from benchmarks.kneser_ney import UserError  # noqa: E402 (after the path)

FIELD_BUDGET = 16_000_000  # bytes of the challenge, which its logs do not repeat


class Point(NamedTuple):
    """One line of a curve; NaN where a log does not say."""

    step: int
    seconds: float  # training clock
    tokens: float
    loss: float  # nats a token
    bpb: float  # bits a byte, of validation
    memory: float  # MiB, the most so far


class Score(NamedTuple):
    """A final score and what it may be ranked with."""

    loss: float
    bpb: float
    data: str
    protocol: str

    @property
    def terms(self) -> tuple[str, str]:
        return self.data, self.protocol


class Run(NamedTuple):
    """A run as it was logged. `facts` holds the rest by name: parameters, model_bytes, peak_memory_mib, …"""

    name: str
    path: Path
    train: list[Point]
    val: list[Point]
    scores: dict[str, Score]
    facts: dict[str, Any]
    streams: dict[str, int]  # stored bytes by kind
    config: dict[str, str]
    notes: list[str]

    @property
    def points(self) -> list[Point]:
        """Both curves in order of steps."""
        return sorted((*self.train, *self.val), key=lambda point: point.step)

    @property
    def last(self) -> Point:
        """Where it ended. Every run that could be read has a point or a score."""
        nan = math.nan
        step, seconds = int(self.facts.get("step", 0)), self.facts.get("train_time_s", nan)
        return self.points[-1] if self.points else Point(step, seconds, nan, nan, nan, nan)

    @property
    def seed(self) -> int | None:
        found = self.config.get("SEED", self.facts.get("seed"))
        return None if found is None else int(found)

    @property
    def size(self) -> float:
        """Bytes that count: artifact and code, or the artifact where a log has no more."""
        return self.facts.get("total_bytes", self.facts.get("model_bytes", math.nan))

    @property
    def best(self) -> Score:
        """The score that a run stands for, the last one it made. Raises UserError for a run that did not finish."""
        if not self.scores:
            raise UserError(f"{self.name} has no final score (it ends at step {self.last.step}); let it finish")
        return list(self.scores.values())[-1]


# ---- files -----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the folder of a run") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl. A last line cut off by a kill is left out; any other damage is a UserError."""
    lines, records = read_text(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}:{number} is not a JSON object; the file was damaged")
    return records


def read_config(path: Path) -> dict[str, str]:
    """KEY=VALUE lines, quoted as a shell would."""
    lines = read_text(path).splitlines()
    pairs = (line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return {name.strip(): "".join(shlex.split(value)) for name, _, value in pairs}


def of_kind(records: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record.get("kind") == kind]


def whole_run(path: Path) -> Path:
    """The folder that a log belongs to: its own, or one of the same name, whose log a sweep has written twice. Else the
    log itself. So that no run counts twice."""
    twin = path.with_suffix("")
    own = path.name in ("train.log", "metrics.jsonl")
    return path.parent if own else twin if (twin / "metrics.jsonl").is_file() else path


def is_log(path: Path) -> bool:
    """Whether a file is the log of a run that has no folder."""
    return whole_run(path) == path and any(STEP.match(line) for line in read_text(path).splitlines())


def find_runs(path: Path) -> list[Path]:
    """The run folders and logs at a path or below. Raises UserError where there is none."""
    if path.is_file():
        return [whole_run(path)]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the folder of a run, or a log")
    folders = sorted({file.parent for name in ("metrics.jsonl", "train.log") for file in path.rglob(name)})
    logs = [file for kind in ("*.log", "*.txt") for file in path.rglob(kind) if file.name != "train.log"]
    found = [*folders, *sorted(file for file in logs if is_log(file))]
    if not found:
        raise UserError(f"{path} holds no metrics.jsonl and no log of a run; give the folder of a run, or a log")
    return found


# ---- logs ------------------------------------------------------------------------------------------------------------

NUMBER = r"(\d+(?:\.\d+)?)"
STEP = re.compile(rf"(?:step:)?(\d+)/\d+ (train|val)_loss: ?{NUMBER}(?: val_bpb: ?{NUMBER})?")
TIME = re.compile(rf" train_time: ?{NUMBER}(ms|s|m)\b(?:.* tok/s: ?{NUMBER})?")
FINAL = re.compile(
    rf"(?:diagnostic )?((?:final|quantized|legal_ttt)\w*?)(?:_exact)? val_loss: ?{NUMBER}\s+val_bpb: ?{NUMBER}"
)
SIZES = re.compile(r"model_bytes:(\d+) code_bytes:(\d+) .*total_bytes:(\d+) budget_bytes:(\d+)")
STREAM = re.compile(r"(\w+) +\w+ +\w+ +\d+ +\d+ +(\d+)")
# Numbers that stand in a log once, or the last time in their final form.
FACTS = {
    "parameters": re.compile(r"(?:model_params|parameters): ?(\d+)"),
    "flops_per_token": re.compile(rf".*\bflops_per_token:{NUMBER}"),
    "train_batch_tokens": re.compile(r"\s*train_batch_tokens: ?(\d+)"),
    "train_seq_len": re.compile(r"(?:.* )?train_seq_len: ?(\d+)"),
    "eval_seq_len": re.compile(r"(?:.* )?eval_seq_len: ?(\d+)"),
    "seed": re.compile(r"\s*seed: ?(\d+)"),
    "val_tokens": re.compile(r"(?:val_loader:.* tokens:|train_tokens:\d+ val_tokens:|val_tokens: )(\d+)"),
    "peak_memory_mib": re.compile(rf"(?:peak memory allocated: |memory +peak ){NUMBER} MiB"),
    "code_bytes": re.compile(r"Code size[^:]*: (\d+) bytes"),
    "model_bytes": re.compile(r"Serialized model \S+: (\d+) bytes"),
    "total_bytes": re.compile(r"Total submission size \S+: (\d+) bytes"),
}
TEXTS = {
    "data": re.compile(r"data_fingerprint:(\w+)|train_loader:dataset:(\S+)|\s*datasets_dir: \S*?([^/\s]+)/?$"),
    "tokenizer": re.compile(r"data_fingerprint:\w+ tokenizer:(\w+)"),
    "protocol": re.compile(r"protocol:(\S+)"),
}
# What a final record says besides its score.
FINAL_FACTS = {"step", "train_time_s", "peak_memory_mib", "model_bytes", "code_bytes", "total_bytes", "budget_bytes"}
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
WHOLE_LINE = re.compile(r"(?:ms|bytes|\.\d{8}|eta:[\d:]+)$")  # ends of lines that cannot have lost digits


def whole_lines(text: str) -> tuple[list[str], bool]:
    """The lines of a log, and whether a last one was left out because it is cut off."""
    lines = text.splitlines()
    cut = bool(lines) and not text.endswith("\n") and not WHOLE_LINE.search(lines[-1])
    return lines[: len(lines) - cut], cut


def log_records(lines: list[str]) -> Iterator[dict[str, Any]]:
    """A log's lines as objects of the kinds that metrics.jsonl has; facts as one object `start` for each."""
    pace, batch = 0.0, 0.0
    for line in lines:
        if match := STEP.match(line):
            step, kind, loss, bpb = int(match[1]), match[2], float(match[3]), match[4]
            if found := TIME.search(line):
                timed = float(found[1]) * UNITS[found[2]]  # minutes have one digit after the point, tokens/s all
                timed = step * batch / float(found[3]) if found[2] == "m" and found[3] and batch else timed
                pace = timed / max(1, step)
            record = {"kind": kind, "step": step, "train_time_s": pace * step}
            yield record | ({"val_loss_nats": loss, "val_bpb": float(bpb)} if bpb else {f"{kind}_loss_nats": loss})
        elif match := FINAL.match(line):
            stride = re.search(r"stride:(\d+)", line)
            yield {"kind": "final", "name": match[1], "val_loss_nats": float(match[2]), "val_bpb": float(match[3])} | (
                {"stride": int(stride[1])} if stride else {}
            )
        elif match := SIZES.match(line):
            names = ("model_bytes", "code_bytes", "total_bytes", "budget_bytes")
            yield {"kind": "start", **{name: int(size) for name, size in zip(names, match.groups())}}
        elif match := STREAM.fullmatch(line):
            yield {"kind": "export", "streams": [[match[1], int(match[2])]]}
        else:
            for name, pattern in FACTS.items():
                if match := pattern.match(line):
                    batch = float(match[1]) if name == "train_batch_tokens" else batch
                    yield {"kind": "start", name: float(match[1])}
            for name, pattern in TEXTS.items():
                if match := pattern.match(line):
                    yield {"kind": "start", name: next(text for text in match.groups() if text)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def add(points: list[Point], record: dict[str, Any], batch: float) -> None:
    """Append a line of a curve; a run that was continued or begun anew has written later ones before."""
    step, kind, nan = int(record["step"]), record["kind"], math.nan
    while points and points[-1].step >= step:
        points.pop()
    numbers = (
        record["train_time_s"], record.get("tokens", step * batch), record[f"{kind}_loss_nats"], record.get("val_bpb"),
        record.get("peak_memory_mib"),
    )  # fmt: skip
    points.append(Point(step, *(nan if number is None else float(number) for number in numbers)))


def config_protocol(config: dict[str, str]) -> str:
    """The protocol of a run from before protocols were logged."""
    window = config.get("EVAL_SEQ_LEN", "0")
    window = window if window != "0" else config["TRAIN_SEQ_LEN"]
    stride = f",stride={config['SLIDING_EVAL_STRIDE']}" if config.get("SLIDING_EVAL") == "1" else ""
    carry = ",carry=1" if config.get("CARRY_EVAL") == "1" else ""
    adapters = ",adapters=temperature" if config.get("TEMP_SCALING") == "1" else ""
    return f"window={window}{stride}{carry},streams={config.get('EVAL_STREAMS', '?')}{adapters}"


def field_protocol(name: str, stride: int | None, facts: dict[str, Any]) -> str:
    """What the name of a published log's score says of how it was made, whatever the compressor in the name."""
    window = int(facts.get("eval_seq_len") or facts.get("train_seq_len") or 0)
    way = "ttt" if "ttt" in name else "sliding" if "sliding" in name else "plain"
    return f"{way},window={window or '?'}" + (f",stride={stride}" if stride else "")


def data_name(facts: dict[str, Any]) -> str:
    """What fixes nats a token: text, tokenizer, number of scored tokens."""
    tokenizer = f" tokenizer {facts['tokenizer'][:12]}" if "tokenizer" in facts else ""
    tokens = facts.get("val_tokens")
    return f"{str(facts.get('data', 'unknown'))[:24]}{tokenizer} val_tokens {int(tokens) if tokens else '?'}"


def final_scores(
    finals: list[dict[str, Any]], facts: dict[str, Any], config: dict[str, str], ours: bool
) -> dict[str, Score]:
    """The final scores by name, each with its terms; a repeated one has more digits or is of a resumed run."""
    scores: dict[str, Score] = {}
    strides = {final.get("name"): final["stride"] for final in finals if "stride" in final}
    for final in finals:
        name = final.get("name", "final")
        own = facts.get("protocol") or (config_protocol(config) if "TRAIN_SEQ_LEN" in config else "unknown")
        protocol = own if ours else field_protocol(name, strides.get(name), facts)
        scores[name] = Score(final["val_loss_nats"], final["val_bpb"], data_name(facts), protocol)
    return scores


def build(name: str, path: Path, records: list[dict[str, Any]], config: dict[str, str], notes: list[str]) -> Run:
    """A run from its records. Raises UserError when they hold neither a step nor a score."""
    facts: dict[str, Any] = {}
    for record in records:
        if record.get("kind") in ("start", "final"):
            told = record.keys() - {"kind"} if record["kind"] == "start" else record.keys() & FINAL_FACTS
            facts |= {name: record[name] for name in told if record[name] is not None}
    batch = math.nan if config.get("BATCH_STAGES") else float(config.get("TRAIN_BATCH_TOKENS", "nan"))
    curves: dict[str, list[Point]] = {"train": [], "val": []}
    for record in records:
        if record.get("kind") in curves and record.get(f"{record['kind']}_loss_nats") is not None:
            add(curves[record["kind"]], record, facts.get("train_batch_tokens", batch))
    finals, streams = of_kind(records, "final"), dict[str, int]()
    for exported in of_kind(records, "export"):
        streams |= {row[0]: int(row[-1]) for row in exported["streams"]}
    if not (any(curves.values()) or finals):
        raise UserError(f"{path} holds no step and no score of a run; give the folder of a run, or a log")
    # Whose words they are: ours name a fingerprint or the code's reserve, or have a configuration beside them.
    ours = bool(config) or "tokenizer" in facts or "budget_bytes" in facts
    facts.setdefault("budget_bytes", FIELD_BUDGET)
    scores = final_scores(finals, facts, config, ours)
    if not scores:
        notes = [*notes, f"unfinished, the log ends at step {max(p.step for c in curves.values() for p in c)}"]
    return Run(name, path, curves["train"], curves["val"], scores, facts, streams, config, notes)


def read_run(path: Path, name: str = "") -> Run:
    """A run from its folder or from a log alone. Raises UserError, one line."""
    log = path / "train.log" if path.is_dir() else path
    beside = log.with_name("config.env" if log.name == "train.log" else log.name.split(".")[0] + ".config.env")
    records, notes = list[dict[str, Any]](), list[str]()
    if log.is_file():
        lines, cut = whole_lines(read_text(log))
        records = list(log_records(lines))
        notes += [f"{log.name} ends within a line, which is left out"] * cut
    metrics = log.with_name("metrics.jsonl")
    if log.name == "train.log" and metrics.is_file():  # has all digits: of the log only what it does not have
        found = read_metrics(metrics)
        known = {record["kind"] for record in found if "kind" in record}
        records = [record for record in records if record["kind"] == "start" or record["kind"] not in known] + found
        lines = read_text(metrics).splitlines()
        notes += ["metrics.jsonl ends within a line, which is left out"] * (len(found) < len(lines))
    config = read_config(beside) if beside.is_file() else {}
    return build(name or path_names([path])[0], path, records, config, notes)


def path_names(paths: list[Path]) -> list[str]:
    """A short name for each: the folder's, of a log also its own; with more of the path where two would be the same."""
    parts = []
    for path in paths:
        *above, last = path.resolve().parts
        own = re.sub(r"(\.train)?\.(log|txt)$", "", last)
        parts.append([*above, last] if path.is_dir() else above if own == "train" else [*above[:-1], above[-1], own])
    length = [1 if path.is_dir() or path.name == "train.log" else 2 for path in paths]
    names = ["/".join(one[-n:]) for one, n in zip(parts, length)]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(one[-max(n, depth) :]) if name in twice else name for one, n, name in zip(parts, length, names)
        ]
    return names


def read_runs(paths: Iterable[Path], left_out: list[str] | None = None) -> list[Run]:
    """All runs at some paths, each once. Raises UserError, where `left_out` is given only if none can be read."""
    found = list(dict.fromkeys(run.resolve() for path in paths for run in find_runs(Path(path))))
    runs = list[Run]()
    for path, name in zip(found, path_names(found)):
        try:
            runs.append(read_run(path, name))
        except UserError as error:
            if left_out is None or (path == found[-1] and not runs):
                raise
            left_out.append(str(error))
    return runs


def ranked(runs: list[Run]) -> dict[tuple[str, str], list[tuple[Run, str, Score]]]:
    """Final scores by (data, protocol), best first: only those of the same terms may be ranked together."""
    tables: dict[tuple[str, str], list[tuple[Run, str, Score]]] = {}
    for run in runs:
        for name, score in run.scores.items():
            tables.setdefault(score.terms, []).append((run, name, score))
    return {terms: sorted(rows, key=lambda row: row[2].bpb) for terms, rows in sorted(tables.items())}
