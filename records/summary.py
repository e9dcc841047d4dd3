"""The closing comparison of a run: its score beside what compressors and a bigram model reach on the same bytes.

    python records/summary.py runs/RUN_ID

Reads metrics.jsonl and config.env of the run folder, prints a table, and writes curve.png there (if matplotlib is
installed). The baselines depend on the data alone: they are kept in baselines.json beside the shards, so that each is
measured once for a dataset. All bits per byte here have the same divisor, the text bytes of the validation split.
"""

import argparse
import hashlib
import json
import lzma
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules in records/ only

from benchmarks import kneser_ney  # noqa: E402 (after the path)
from benchmarks.kneser_ney import UserError, Vocabulary  # noqa: E402
from records.report import draw_png  # noqa: E402
from records.runs import of_kind, read_config, read_metrics, read_run  # noqa: E402

try:
    import brotli
except ImportError:  # wanted, not required
    brotli = None

BASELINES_VERSION = 1  # part of the cache key: raise it when a baseline's definition changes
BIGRAM_TRAIN_TOKENS = 10_000_000
FEED_BYTES = 1 << 18  # given to a compressor at a time, so that the remaining time can be told
REPORT_EVERY = 10.0  # seconds

Report = Callable[[float], None]  # share done, 0 to 1


class Result(NamedTuple):
    """One row of the table; None where the quantity does not exist."""

    name: str
    bpb: float
    nats: float | None  # per token
    size: int | None  # bytes of the artifact or of the compressed text
    seconds: float | None


class Split(NamedTuple):
    """What baselines are measured on."""

    train: np.ndarray  # the first BIGRAM_TRAIN_TOKENS tokens
    val: np.ndarray
    vocabulary: Vocabulary
    text: bytes  # of val

    def bpb(self, bits: float) -> float:
        return bits / len(self.text)


# ---- the run folder --------------------------------------------------------------------------------------------------


def run_results(records: list[dict[str, Any]]) -> list[Result]:
    """A row for each final score; for a run that did not finish, its last validation."""
    finals = {str(record["name"]): record for record in of_kind(records, "final")}  # a resumed run: the last of a name
    validations = of_kind(records, "val")
    timed = [float(record["train_time_s"]) for record in records if "train_time_s" in record]
    if not finals and not validations:
        raise UserError("metrics.jsonl has no score yet, expected a final or val record; let the run validate first")
    rows = finals or {f"unfinished, step {validations[-1]['step']}": validations[-1]}
    return [
        Result(
            f"this run ({name})", row["val_bpb"], row["val_loss_nats"], row.get("model_bytes"), max(timed, default=None)
        )
        for name, row in rows.items()
    ]


def locate(path: str) -> Path:
    """A path of config.env: relative to the current folder, or to the repository where the run was started."""
    return Path(path) if Path(path).exists() else ROOT / path


def read_split(config: dict[str, str]) -> Split:
    """The data of a run. Raises UserError when it is gone or belongs to another tokenizer."""
    bytewise = config.get("VOCAB_SIZE") == "256"  # the byte tokenizer, which has no file
    missing = {"DATA_PATH", "VOCAB_SIZE", *([] if bytewise else ["TOKENIZER_PATH"])} - config.keys()
    if missing:
        raise UserError(f"config.env has no {min(missing)}, which the baselines need; give the folder of a run")
    folder = locate(config["DATA_PATH"])
    vocabulary = kneser_ney.read_vocabulary("byte" if bytewise else str(locate(config["TOKENIZER_PATH"])))
    limit = int(config.get("MAX_VAL_TOKENS", "0"))  # 0: all; scored are all but the first
    val = kneser_ney.read_tokens(folder, "val", limit + 1 if limit else None)
    train = kneser_ney.read_tokens(folder, "train", BIGRAM_TRAIN_TOKENS)
    for tokens in (train, val):
        kneser_ney.check_tokens(tokens, len(vocabulary.pieces), folder)
    text = vocabulary.decode(val)
    if not text:
        raise UserError(f"{folder} has no validation text; make the data again")
    return Split(train, val, vocabulary, text)


# ---- baselines -------------------------------------------------------------------------------------------------------


def streamed_size(
    feed: Callable[[bytes], bytes], finish: Callable[[], bytes], text: bytes, report: Report
) -> tuple[int, float]:
    """Compressed bytes of a text and seconds."""
    size, began = 0, time.monotonic()
    for start in range(0, len(text), FEED_BYTES):
        size += len(feed(text[start : start + FEED_BYTES]))
        report(min(1.0, (start + FEED_BYTES) / len(text)))
    return size + len(finish()), time.monotonic() - began


def xz(split: Split, report: Report) -> Result:
    packer = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size, seconds = streamed_size(packer.compress, packer.flush, split.text, report)
    return Result("xz -9e", split.bpb(8 * size), None, size, seconds)


def brotli_11(split: Split, report: Report) -> Result:
    packer = brotli.Compressor(quality=11, lgwin=24)  # 16 MiB, the largest window of the standard format
    size, seconds = streamed_size(packer.process, packer.finish, split.text, report)
    return Result("brotli -q 11", split.bpb(8 * size), None, size, seconds)


def bigram(split: Split, report: Report) -> Result:
    """A Kneser-Ney bigram: the best that the previous token alone is known to give."""
    began = time.monotonic()
    size = len(split.vocabulary.pieces)
    model = kneser_ney.fit(split.train, 2, size, lambda k, highest, _: report(k / highest / 2))
    nats = kneser_ney.score(model, split.val)
    bpb = split.bpb(nats / math.log(2))
    return Result("bigram model", bpb, nats / (len(split.val) - 1), None, time.monotonic() - began)


BASELINES: dict[str, Callable[[Split, Report], Result]] = {"bigram": bigram, "brotli": brotli_11, "xz": xz}


def reporter(what: str) -> Report:
    """A line with the remaining time every REPORT_EVERY seconds; silent for what takes less."""
    began = time.monotonic()
    shown = began

    def report(share: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= REPORT_EVERY and 0 < share < 1:
            shown = now
            print(f"measuring {what}: {share:.0%}, about {(now - began) * (1 / share - 1):.0f} s left", flush=True)

    return report


def cache_key(split: Split) -> str:
    """Names the data and the definition of the baselines."""
    digest = hashlib.sha256(f"{BASELINES_VERSION} {BIGRAM_TRAIN_TOKENS} ".encode())
    for part in (split.val.tobytes(), split.train.tobytes(), split.text):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def load_cache(path: Path) -> dict[str, dict[str, list[Any]]]:
    """What was measured so far: {cache key: {baseline: fields of its Result}}."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged: measured again
        return {}


def store_cache(path: Path, cache: dict[str, dict[str, list[Any]]]) -> None:
    """Replace the file whole. A data folder that cannot be written to only costs the time of measuring again."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(cache, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): the baselines will be measured again next time")


def baseline_results(split: Split, folder: Path) -> list[Result]:
    """All baselines, best first; those not in the folder's baselines.json are measured and added to it."""
    path, key = folder / "baselines.json", cache_key(split)
    cache = load_cache(path)
    known = cache.setdefault(key, {})
    for name, measure in BASELINES.items():
        if name == "brotli" and brotli is None:
            print("brotli is not installed and left out; pip install brotli adds it")
        elif name not in known:
            print(f"measuring {name} on {len(split.text):,} bytes (once for this dataset)", flush=True)
            known[name] = list(measure(split, reporter(name)))
            store_cache(path, cache)
    return sorted((Result(*known[name]) for name in BASELINES if name in known), key=lambda row: row.bpb)


# ---- output ----------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Result]) -> str:
    """One line for each row; nats are per token, seconds those of training, fitting or compressing."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}  {'val_bpb':>8}  {'val_loss_nats':>13}  {'bytes':>12}  {'seconds':>8}"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.bpb:>8.4f}  {number(row.nats, '.4f'):>13}  {number(row.size, ',d'):>12}  "
            f"{number(row.seconds, '.1f'):>8}"
        )
    return "\n".join(lines)


def budget_line(records: list[dict[str, Any]]) -> str | None:
    """The artifact's account, where the run got that far."""
    counted = [record for record in of_kind(records, "final") if "total_bytes" in record]
    if not counted:
        return None
    names = ("model_bytes", "code_bytes", "total_bytes", "budget_bytes")
    return " ".join(f"{name}:{counted[-1][name]}" for name in names if name in counted[-1])


def curve_line(folder: Path) -> str:
    path = folder / "curve.png"
    try:
        draw_png([read_run(folder)], path)
    except ImportError:
        return "curve.png left out: matplotlib is not installed (pip install matplotlib)"
    return str(path)


def summarize(folder: Path) -> None:
    """Print the comparison and draw the curve of a run folder. Raises UserError."""
    records = read_metrics(folder / "metrics.jsonl")
    config = read_config(folder / "config.env")
    rows = run_results(records)
    try:
        split = read_split(config)
        rows += baseline_results(split, locate(config["DATA_PATH"]))
        print(f"{len(split.val) - 1:,} validation tokens, {len(split.text):,} bytes of text in {config['DATA_PATH']}")
    finally:  # the run's own score is shown even when its data is gone
        print(table(rows))
    print(*filter(None, [budget_line(records), curve_line(folder)]), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a finished run with baselines on the same bytes.")
    parser.add_argument("run_dir", type=Path, help="folder with metrics.jsonl and config.env")
    try:
        summarize(parser.parse_args(argv).run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
