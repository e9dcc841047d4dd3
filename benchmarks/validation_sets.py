"""Other validation sets for a model: a folder's validation text in another tokenizer, or its sentences shuffled.

    DATA_PATH=... TOKENIZER_PATH=... python benchmarks/validation_sets.py OUT --tokenizer MODEL [--shuffle SEED]

Reads the validation split of DATA_PATH, writes OUT/fineweb_val_000000.bin in the tokens of MODEL, each document after
its BOS; with --shuffle the sentences of all documents change places, which leaves n-grams within sentences and takes
away topics. See records/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt


def documents(h: train_gpt.Hyperparameters) -> list[str]:
    """The texts between document starts of the validation split."""
    tokenizer, tokens = train_gpt.load_tokenizer(h), train_gpt.read_validation(h)
    cuts = [*np.flatnonzero(tokens == tokenizer.bos).tolist(), len(tokens)]
    return [tokenizer.text_of(tokens[a + 1 : b].tolist()) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def shuffled(texts: list[str], seed: int) -> list[str]:
    """Documents with as many sentences as before, of sentences from anywhere."""
    parts = [re.split(r"(?<=[.!?]) ", text) for text in texts]
    pool = [sentence for part in parts for sentence in part]
    random.Random(seed).shuffle(pool)
    rest = iter(pool)
    return [" ".join(next(rest) for _ in part) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description="see the module's docstring")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shuffle", type=int)
    options = parser.parse_args()
    h = train_gpt.load_config(dict(os.environ))
    texts = documents(h)
    texts = texts if options.shuffle is None else shuffled(texts, options.shuffle)
    target = train_gpt.SentencePieceTokenizer(options.tokenizer, h.vocab_size)
    stream = np.array([token for text in texts for token in (target.bos, *target.tokens_of(text))], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(stream)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fineweb_val_000000.bin").write_bytes(header.tobytes() + stream.tobytes())
    made_with = {"kind": "sentencepiece", "file": Path(options.tokenizer).name, "sha256": target.fingerprint}
    (options.out / "manifest.json").write_text(json.dumps({"format": 1, "tokenizer": made_with}) + "\n")
    print(f"{options.out}: {len(texts)} documents, {len(stream)} tokens")


if __name__ == "__main__":
    main()
