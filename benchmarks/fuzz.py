"""Feeds damaged and forged files to every reader of the program; each must be read, or refused by one clear error.

    python benchmarks/fuzz.py [--seconds 600] [--reader artifact]

Mutations are hypothesis's: bits, cuts, insertions, numbers; half of the files get checksums made right again, so that
what lies behind them is reached. Prints files, refusals and the growth of memory for each reader as one JSON object a
line. A file that makes a reader fail in another way, or take more than 10 s, ends it with a traceback, the file shrunk.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis
import numpy as np
import sentencepiece
import torch
from hypothesis import strategies as st

import train_gpt as t

TINY = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", "COMPILE": "0"}
ENV = b"# a comment\nPRESET=tiny\nSEED=7\nRUN_ID='a b'\nMATRIX_LR=0.02\n"
MANIFEST = {"name": "x", "fingerprint": "ab", "tokenizer": {"kind": "byte", "vocab_size": 256, "sha256": None}}


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """The bytes with one to four faults."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "number", "move")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.sampled_from((1, 4, 100, 2**30)))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "number":  # a size or an offset, very likely
            number = draw(st.sampled_from((0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)))
            data[at : at + 8] = number.to_bytes(8, draw(st.sampled_from(("little", "big"))))
        else:
            data[at:at] = data[at // 2 : at // 2 + 64]
    return bytes(data)


def session() -> tuple[t.Hyperparameters, t.Runtime, t.GPT, t.Weights]:
    """A small network and its weights."""
    h = t.load_config(TINY)
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, t.BYTE_BOS)
    weights = t.Weights(model)
    weights.materialize(1.0)
    return h, rt, model, weights


def vocabulary(prefix: Path) -> bytes:
    """A small sentencepiece model of this file's own text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()), model_prefix=str(prefix), vocab_size=400,
        model_type="bpe", byte_fallback=True, num_threads=1, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    return prefix.with_suffix(".model").read_bytes()


class Readers:
    """A valid file for each reader, and how a damaged one is made and read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.h, self.rt, self.model, self.weights = session()
        t.save_checkpoint(self.h, self.rt, folder, t.TrainState(step=1), self.weights)
        tokens = np.arange(4096) % 256
        header = np.zeros(256, "<i4")
        header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
        self.valid: dict[str, bytes] = {
            "artifact": t.write_artifact(self.h, t.coded_tensors(self.weights), {}).data,
            "checkpoint": (folder / "step_0000001.pt").read_bytes(),
            "shard": header.tobytes() + tokens.astype("<u2").tobytes(),
            "manifest": json.dumps(MANIFEST).encode(),
            "env": ENV,
            "tokenizer": vocabulary(folder / "pieces"),
        }
        self.read: dict[str, Callable[[bytes], object]] = {
            "artifact": t.decode_artifact,
            "checkpoint": self.checkpoint,
            "shard": self.shard,
            "manifest": lambda data: t.read_manifest(str(self.put("manifest.json", data).parent)),
            "env": lambda data: t.load_config({"ENV_FILE": str(self.put("x.env", data))}),
            "tokenizer": self.tokenizer,
        }

    def put(self, name: str, data: bytes) -> Path:
        """A file of these bytes."""
        path = self.folder / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def checkpoint(self, data: bytes) -> None:
        t.load_checkpoint(self.h, self.rt, self.put("x.pt", data), self.model, self.weights)

    def shard(self, data: bytes) -> None:
        path = self.put("fineweb_train_000000.bin", data)
        stream = t.TokenStream(str(path.parent), "train", 256)
        stream.read(0, stream.tokens)

    def tokenizer(self, data: bytes) -> None:
        found = t.SentencePieceTokenizer(str(self.put("x.model", data)), 400)
        found.byte_table()
        found.text_of(found.tokens_of("A line of text."))

    def forged(self, name: str, draw: st.DrawFn) -> bytes:
        """A damaged file, for half of them with the checksums that its bytes should have."""
        valid = self.valid[name]
        if not draw(st.booleans()):
            return draw(damaged(valid))
        if name == "artifact":
            body = draw(damaged(valid[8:]))
            return valid[:4] + zlib.crc32(body).to_bytes(4, "little") + body
        return self.repacked(draw) if name == "checkpoint" else draw(damaged(valid))

    def repacked(self, draw: st.DrawFn) -> bytes:
        """The checkpoint with damage in one part of its container, which has the checksum of what it is now."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.valid["checkpoint"])) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            pickled = next(name for name in names if name.endswith("data.pkl"))
            chosen = draw(st.sampled_from((pickled, pickled, *names)))
            for name in names:
                part = old.read(name)
                new.writestr(name, draw(damaged(part)) if name == chosen else part)
        return buffer.getvalue()


def fuzz(readers: Readers, name: str, examples: int, seed: int) -> tuple[int, int]:
    """Feed so many files to a reader; how many it was, and how many were refused."""
    counts = [0, 0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=10_000, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.data())
    def feed(data: st.DataObject) -> None:
        counts[0] += 1
        try:
            readers.read[name](readers.forged(name, data.draw))
        except t.UserError as error:
            counts[1] += 1
            assert "\n" not in str(error), "one line"

    feed()
    return counts[0], counts[1]


def main() -> None:
    """Fuzz all readers in turn until the time is over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--reader", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        names = [options.reader] if options.reader else list(readers.valid)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        totals = {name: np.zeros(2, int) for name in names}
        for seed in itertools.count():
            if time.monotonic() - began > options.seconds:
                break
            for name in names:
                totals[name] += fuzz(readers, name, 200, seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        for name, (files, refused) in totals.items():
            print(json.dumps({"reader": name, "files": int(files), "refused": int(refused)}))
        print(json.dumps({"seconds": round(time.monotonic() - began), "memory_growth_mib": grown}))


if __name__ == "__main__":
    main()
