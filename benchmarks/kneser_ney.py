"""Interpolated modified Kneser-Ney n-grams over token shards: how far exact counting gets on the same data.

    python benchmarks/kneser_ney.py --data data/datasets/builtin_sp1024 --order 5 --train-tokens 4300000 \\
        --tokenizer data/tokenizers/builtin_1024_bpe.model

Counts come from the first --train-tokens tokens of the train shards; the score is over the whole validation split, in
nats per token and bits per byte, every token given all tokens before it. It is a distribution over the vocabulary in
every context (S. F. Chen and J. Goodman, 1999, "An empirical study of smoothing techniques for language modeling",
section 3). Needs numpy only.

    p_k(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + g(h) p_{k-1}(w | h without its first token),    p_0 = 1 / V

c is the count at the highest order and below it the number of different tokens seen before the gram; D has one value
each for the counts 1, 2 and from 3 on; g(h) is what the discounts took, so that the sum over w is 1.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
BYTE_MARKER = 255  # of the byte tokenizer: starts a document and never occurs in UTF-8
SCORE_CHUNK = 4_000_000  # tokens scored at a time, which bounds memory
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where the closed form fails, as in a tiny corpus

Report = Callable[[int, int, int], None]  # order, highest order, number of grams


class UserError(Exception):
    """Something that the user can put right; shown as one line."""


# ---- data: shards, and what tokens stand for -------------------------------------------------------------------------


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped. Raises UserError when the file is not a whole shard."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    if header.size * 4 < HEADER_BYTES or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path} does not start with a shard header ({SHARD_MAGIC}, {SHARD_VERSION}); make it again")
    expected = HEADER_BYTES + 2 * int(header[2])
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected {expected}; make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))


def read_tokens(folder: str | Path, split: str, limit: int | None = None) -> np.ndarray:
    """The first `limit` tokens (all by default) of a split, uint16. Raises UserError when there are no shards."""
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(f"{folder} has no fineweb_{split}_*.bin; give a folder of token shards (see data/README.md)")
    parts: list[np.ndarray] = []
    wanted = math.inf if limit is None else limit
    for path in paths:
        shard = read_shard(path)
        parts.append(shard[: int(min(wanted, len(shard)))])
        wanted -= len(parts[-1])
        if wanted <= 0:
            break
    return np.concatenate(parts)


class Vocabulary(NamedTuple):
    """What tokens stand for, by the field's rule; a token's bytes do not depend on anything but the token before."""

    pieces: list[bytes]  # UTF-8 of each token, leading space included
    silent: np.ndarray  # control, unknown and unused tokens: no bytes
    first_space_added: bool  # the tokenizer put a space before each document that is none of its text's bytes

    def spans(self, tokens: np.ndarray) -> np.ndarray:
        """Each token but the first as an index into `pieces`, plus its length where its leading space is not text."""
        spaced = np.array([piece.startswith(b" ") for piece in self.pieces])
        dropped = spaced[tokens[1:]] & self.silent[tokens[:-1]] & self.first_space_added
        return tokens[1:] + dropped * np.int64(len(self.pieces))

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes of tokens[1:], those that bits per byte are counted over."""
        table = self.pieces + [piece[1:] for piece in self.pieces]
        parts = []
        for start in range(0, len(tokens) - 1, SCORE_CHUNK):
            spans = self.spans(tokens[start : start + SCORE_CHUNK + 1])
            parts.append(b"".join([table[span] for span in spans.tolist()]))
        return b"".join(parts)

    def count_bytes(self, tokens: np.ndarray) -> int:
        """The length of decode(tokens), without making it."""
        sizes = np.array([len(piece) for piece in self.pieces] + [max(0, len(piece) - 1) for piece in self.pieces])
        chunks = range(0, len(tokens) - 1, SCORE_CHUNK)
        return sum(int(sizes[self.spans(tokens[start : start + SCORE_CHUNK + 1])].sum()) for start in chunks)


def read_vocabulary(tokenizer: str) -> Vocabulary:
    """The vocabulary of a sentencepiece model, or of "byte". Raises UserError when there is no such model."""
    if tokenizer == "byte":
        pieces = [bytes([byte]) for byte in range(BYTE_MARKER)] + [b""]
        return Vocabulary(pieces, np.arange(256) == BYTE_MARKER, first_space_added=False)
    from sentencepiece import SentencePieceProcessor

    if not Path(tokenizer).is_file():
        raise UserError(f"tokenizer {tokenizer} does not exist; give a sentencepiece .model file, or byte")
    model = SentencePieceProcessor(model_file=tokenizer)
    ids = range(model.vocab_size())
    silent = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids])
    pieces = [b"" if silent[i] else piece_bytes(model.id_to_piece(i), model.is_byte(i)) for i in ids]
    # A tokenizer that adds a space to each text drops the first one when it decodes; a lossless one does neither.
    added = not model.decode(model.encode(" a")).startswith(" ")
    return Vocabulary(pieces, silent, added)


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """A byte piece is written <0x41>; in others U+2581 stands for a space."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def check_tokens(tokens: np.ndarray, vocab_size: int, folder: str | Path) -> None:
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{folder} has token {tokens.max()}, but the tokenizer has {vocab_size}; give the one it was made with"
        )


# ---- model -----------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Grams of one length k. A gram's id is its place in `keys`; -1 means never seen.

    keys: (grams,) sorted; id of the first k-1 tokens * vocabulary size + last token, which is exact at any order.
    share: (grams + 1,) discounted count over the context's total; 0 at -1.
    backoff: (contexts + 1,) g(h), what the shares of a context leave to the order below; 1 at -1.
    """

    keys: np.ndarray
    share: np.ndarray
    backoff: np.ndarray
    vocab_size: int

    def find(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Ids of the grams (context, token); -1 where unseen, as is every gram of an unseen context."""
        wanted = contexts * self.vocab_size + tokens
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, places, -1)

    def mix(self, contexts: np.ndarray, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The formula above: p_k from the gram's share and p_{k-1}."""
        return self.share[grams] + self.backoff[contexts] * lower


def discounts(counts: np.ndarray) -> np.ndarray:
    """D of the counts 0, 1, 2 and from 3 on: Chen and Goodman's closed form from the counts of counts n1 to n4."""
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(found) > 0:  # a discount of 0 could leave nothing for unseen tokens
            return np.array([0.0, *found])
    return np.array([0.0, *FALLBACK_DISCOUNTS])


def make_order(keys: np.ndarray, counts: np.ndarray, contexts: int, vocab_size: int) -> Order:
    taken = discounts(counts)[np.minimum(counts, 3)]
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=contexts)
    freed = np.bincount(context, weights=taken, minlength=contexts)
    backoff = np.divide(freed, total, out=np.ones(contexts), where=total > 0)
    # A count is 0 for the stream's very first grams, which have nothing before them: their total may be 0, too.
    share = (counts - taken) / np.maximum(total[context], 1.0)
    return Order(keys, np.append(share, 0.0), np.append(backoff, 1.0), vocab_size)


def fit(tokens: np.ndarray, order: int, vocab_size: int, report: Report | None = None) -> list[Order]:
    """The model of a token stream, lowest order first. O(order N log N) time, about 100 bytes a token of memory."""
    if order < 1 or len(tokens) <= order:
        raise UserError(
            f"order {order} and {len(tokens)} train tokens: give an order from 1 on and more tokens than it"
        )
    keys: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    ends = np.zeros(len(tokens) + 1, np.int64)  # id of the (k-1)-gram that ends at each position, from k-2 on
    for k in range(1, order + 1):
        flat = ends[:-1] * vocab_size + tokens[k - 1 :]
        unique, first, longer, count = np.unique(flat, return_index=True, return_inverse=True, return_counts=True)
        if k > 1:  # each different k-gram is one more token seen before the (k-1)-gram at its end
            counts[-1] = np.bincount(ends[first + 1], minlength=len(keys[-1]))
        keys.append(unique)
        counts.append(count)
        ends = longer
        if report:
            report(k, order, len(unique))
    contexts = [1, *(len(unique) for unique in keys[:-1])]
    return [make_order(*parts, vocab_size) for parts in zip(keys, counts, contexts, strict=True)]


def probabilities(model: Sequence[Order], tokens: np.ndarray) -> np.ndarray:
    """p of each token given those before it in the array, as far back as the order reaches; float64, (N,)."""
    contexts = np.zeros(len(tokens), np.int64)  # the empty context, known everywhere
    p = np.full(len(tokens), 1.0 / model[0].vocab_size)
    for order in model:
        grams = order.find(contexts, tokens)
        p = order.mix(contexts, grams, p)
        contexts = np.append(np.int64(-1), grams[:-1])
    return p


def distribution(model: Sequence[Order], history: np.ndarray) -> np.ndarray:
    """p of every token after a history, (V,)."""
    size = model[0].vocab_size
    p, context, prefixes = np.full(size, 1.0 / size), 0, np.zeros(len(history), np.int64)
    for order in model:
        contexts = np.full(size, context, np.int64)
        p = order.mix(contexts, order.find(contexts, np.arange(size)), p)
        grams = order.find(prefixes, history)
        context = int(grams[-1]) if len(history) else -1
        prefixes = np.append(np.int64(-1), grams[:-1])
    return p


def score(model: Sequence[Order], tokens: np.ndarray) -> float:
    """Summed nats of tokens[1:], each given all tokens before it."""
    total = 0.0
    for start in range(1, len(tokens), SCORE_CHUNK):
        begin = max(0, start - len(model) + 1)
        p = probabilities(model, tokens[begin : start + SCORE_CHUNK])
        total -= float(np.log(p[start - begin :]).sum())
    return total


# ---- command line ----------------------------------------------------------------------------------------------------


def progress_printer() -> Report:
    began = time.monotonic()

    def report(k: int, highest: int, grams: int) -> None:
        elapsed = time.monotonic() - began
        left = elapsed / k * (highest - k)
        print(f"order {k}/{highest}: {grams:,} grams, {elapsed:.1f} s, about {left:.0f} s left", flush=True)

    return report


def run(args: argparse.Namespace) -> None:
    vocabulary = read_vocabulary(args.tokenizer)
    size, began = len(vocabulary.pieces), time.monotonic()
    train, val = read_tokens(args.data, "train", args.train_tokens), read_tokens(args.data, "val")
    for tokens in (train, val):
        check_tokens(tokens, size, args.data)
    model = fit(train, args.order, size, progress_printer())
    fitted = time.monotonic()
    nats, text_bytes, scored = score(model, val), vocabulary.count_bytes(val), len(val) - 1
    print(
        f"kneser_ney order:{args.order} train_tokens:{len(train)} val_loss:{nats / scored:.4f} "
        f"val_bpb:{nats / math.log(2) / text_bytes:.4f} val_tokens:{scored} val_bytes:{text_bytes} "
        f"fit_time:{(fitted - began) * 1e3:.0f}ms score_time:{(time.monotonic() - fitted) * 1e3:.0f}ms"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score an interpolated modified Kneser-Ney n-gram model.")
    env = os.environ
    parser.add_argument("--data", default=env.get("DATA_PATH", "data/datasets/builtin_sp1024"), help="folder of shards")
    parser.add_argument(
        "--tokenizer",
        default=env.get("TOKENIZER_PATH", "data/tokenizers/builtin_1024_bpe.model"),
        help="sentencepiece model, or byte",
    )
    parser.add_argument("--order", type=int, default=5, help="longest gram, in tokens (default 5)")
    parser.add_argument("--train-tokens", type=int, default=None, help="count only the first so many (default: all)")
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
