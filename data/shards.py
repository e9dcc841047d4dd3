"""What the data tools share: token shards, tokenizers, manifests, atomic files, progress lines, clear errors.

A shard is 256 little-endian int32 words (20240520, 1, token count, zeros) and then uint16 tokens; a document is its
BOS token and then its text. A dataset folder is complete when it has a manifest.json, which is written last.
Needs numpy, and sentencepiece where a sentencepiece model is used. Knows nothing of where documents come from.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DATA_FOLDER = Path(__file__).resolve().parent
MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_VOCAB = 65_535
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
MANIFEST = "manifest.json"


class DataError(Exception):
    """A problem that the user can mend; its text says what was found, what was expected, what to do."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line: a user's error is one line and exit code 2, an interrupt is exit code 130."""
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: cannot use {error.filename}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)


# ---- files ----------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that a kill at any moment leaves the old file or the new one, never a torn one.

    The temporary name is new each time: machines that share a folder may write the same file at once.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> DataError:
    """The clear form of an operating system's refusal to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"disk full while writing {path}: free some space and run the same command again to continue")
    return DataError(f"cannot write {path}: {error.strerror or error}; check the folder and its permissions")


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, [(json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()])


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): delete it and run again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected an object: delete it and run again")
    return value


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- shards ---------------------------------------------------------------------------------------------------------


SIDE_CAR = ".bytes"  # beside a shard of case-folded text: the original's UTF-8 bytes of each token, one byte each


def shard_name(split: str, number: int) -> str:
    return f"fineweb_{split}_{number:06d}.bin"


def shard_header(tokens: int) -> bytes:
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def check_shard(path: Path) -> int:
    """The token count of a shard; a DataError when header and size do not agree."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} has {size} bytes, expected a header of {HEADER_BYTES} bytes: fetch or build it again")
    magic, version, tokens = np.frombuffer(head, dtype="<i4")[:3].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path} begins with {magic}, {version}, expected {MAGIC}, {VERSION}: it is not a token shard")
    if size != HEADER_BYTES + 2 * tokens:
        raise DataError(
            f"{path} has {size} bytes, expected {HEADER_BYTES + 2 * tokens} for {tokens} tokens: "
            "it was cut short or damaged, fetch or build it again"
        )
    return tokens


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16, mapped from the file."""
    tokens = check_shard(path)
    if not tokens:  # an empty region cannot be mapped
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def write_shard(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Write a shard and return its manifest entry. A file that already holds these bytes is kept."""
    parts: list[bytes | memoryview] = [
        shard_header(len(tokens)),
        np.ascontiguousarray(tokens, dtype="<u2").data.cast("B"),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    same_size = path.is_file() and path.stat().st_size == sum(len(part) for part in parts)
    if not (same_size and sha256_file(path) == digest.hexdigest()):
        atomic_write(path, parts)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


class SplitWriter:
    """One split of a dataset: takes documents' tokens in order, writes shards, counts documents, tokens and bytes."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.documents = self.tokens = self.bytes = self.decoded_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._buffer = np.empty(shard_tokens, dtype="<u2")  # the system gives its pages only as they are filled
        self._filled = 0

    def add(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        """Take the tokens of some whole documents, BOS included, and the exact UTF-8 length of their texts."""
        self.documents += documents
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.decoded_bytes += int(self.tokenizer.byte_lengths[tokens].sum())
        while len(tokens):
            taken = tokens[: self.shard_tokens - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == self.shard_tokens:
                self._write()

    def close(self) -> dict[str, Any]:
        """Write what is left and return the split's manifest entry."""
        if self._filled:
            self._write()
        if self.tokenizer.lossless and self.decoded_bytes != self.bytes:
            raise DataError(f"{self.split}: the tokens decode to {self.decoded_bytes} bytes, expected {self.bytes}")
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": self.shards}

    def _write(self) -> None:
        path = self.folder / shard_name(self.split, len(self.shards))
        tokens = self._buffer[: self._filled]
        entry = write_shard(path, tokens)
        if self.tokenizer.folds:  # what each token stands for in the text as it was
            counts = self.tokenizer.byte_lengths[tokens].astype(np.uint8).tobytes()
            atomic_write(path.with_suffix(SIDE_CAR), [counts])
            entry |= {"bytes": int(self.tokenizer.byte_lengths[tokens].sum())}
            entry |= {"bytes_sha256": hashlib.sha256(counts).hexdigest()}
        self.shards.append(entry)
        self._filled = 0


# ---- tokenizers -----------------------------------------------------------------------------------------------------

# Lossless case folding: a capital letter becomes a small one behind a mark, so that a word has the same pieces
# wherever it stands. CAPITAL: the next letter is one; CAPITALS: all of the next word's are. A mark stands before the
# one space in front of its word, since pieces begin with a space. Marks that the text itself holds become LITERAL and a
# digit. A letter takes as many bytes as its capital, so a token's bytes in the original are its own less its marks.
# What has no such capital (sharp s, dotted I, titlecase digraphs, ...) stays as it is, as does all beyond Cyrillic:
# what Unicode says of these letters no longer changes. train_gpt.py has the same functions.
CAPITAL, CAPITALS, LITERAL = "\x0e", "\x0f", "\x10"
MARKS = CAPITAL + CAPITALS + LITERAL


def case_pairs() -> tuple[str, str]:
    """The capital letters that are folded, and their small ones."""
    pairs = [(c, c.lower()) for c in map(chr, range(0x530)) if len(c.lower()) == 1 and c.lower() != c]
    pairs = [(c, s) for c, s in pairs if s.upper() == c and s.lower() == s and len(c.encode()) == len(s.encode())]
    return "".join(c for c, _ in pairs), "".join(s for _, s in pairs)


LARGE, SMALL = case_pairs()
TO_SMALL = str.maketrans(LARGE, SMALL)
TO_LARGE = str.maketrans(SMALL, LARGE)
FOLDABLE = re.compile(f"[{MARKS}]|( ?)([{LARGE}{SMALL}]*[{LARGE}][{LARGE}{SMALL}]*)")
FOLDED = re.compile(f"{LITERAL}([0-2])|{CAPITAL}( ?)([{SMALL}])|{CAPITALS}( ?)([{SMALL}]+)")


def fold_word(match: re.Match[str]) -> str:
    """A mark of the text itself, or a word with capitals, as fold_case writes it."""
    space, word = match[1], match[2]
    if word is None:
        return LITERAL + str(MARKS.index(match[0]))
    if len(word) > 1 and word.translate(TO_LARGE) == word:
        return CAPITALS + space + word.translate(TO_SMALL)
    marked = "".join(CAPITAL + letter.translate(TO_SMALL) if letter in LARGE else letter for letter in word)
    return CAPITAL + space + marked[1:] if marked[0] == CAPITAL else space + marked


def fold_case(text: str) -> str:
    return FOLDABLE.sub(fold_word, text)


def unfold_word(match: re.Match[str]) -> str:
    """What a mark and the letters behind it stood for."""
    literal, space, letter, wide, word = match.groups()
    return MARKS[int(literal)] if literal else (space or wide or "") + (letter or word).translate(TO_LARGE)


def unfold_case(text: str) -> str:
    """The inverse of fold_case."""
    return FOLDED.sub(unfold_word, text)


# Texts that a lossy tokenizer changes: runs of spaces, spaces at the edges, controls, compatibility characters.
LOSSLESS_PROBES = ("a  b", " a ", "\ta\n\n b\r\n", "\x00\x7f", "ﬁ①Å", "e\u0301", "\u200b\ufeff", "▁ ▁▁a▁", "😀", "")
META_SPACE = "▁"  # sentencepiece writes a space as this character, so a text that holds it must be taken apart


class Tokenizer:
    """Text to tokens and back. `pieces[i]` is what token i decodes to; BOS and other controls decode to nothing."""

    kind: str
    lossless: bool
    folds = False  # whether tokens' bytes in the text are not those of their pieces

    def __init__(self, pieces: list[bytes], bos_id: int) -> None:
        self.pieces, self.bos_id, self.vocab_size = pieces, bos_id, len(pieces)
        self.byte_lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, uint16, without BOS."""
        raise NotImplementedError

    def decode(self, tokens: np.ndarray) -> bytes:
        """The UTF-8 bytes of tokens: for a lossless tokenizer exactly those of the text."""
        pieces = self.pieces
        return b"".join([pieces[token] for token in tokens.tolist()])

    def dataset_name(self, name: str) -> str:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The manifest's tokenizer entry."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A token is a UTF-8 byte; BOS is 255, a byte that UTF-8 never has."""

    kind = "byte"
    lossless = True

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(255)] + [b""], bos_id=255)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> bytes:
        return tokens[tokens != self.bos_id].astype(np.uint8).tobytes()

    def dataset_name(self, name: str) -> str:
        return f"{name}_byte256"

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": None, "sha256": None, "vocab_size": self.vocab_size, "lossless": True}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Lossless when it was trained so (see train_sentencepiece); the probes tell."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load_sentencepiece(path)
        super().__init__(self._piece_bytes(), self.model.bos_id())
        if not 0 <= self.bos_id < self.vocab_size <= MAX_VOCAB:
            raise DataError(
                f"{path} has BOS {self.bos_id} and {self.vocab_size} pieces, expected a BOS piece and at most "
                f"{MAX_VOCAB} pieces: use another tokenizer"
            )
        self._meta_space = self._byte_tokens(META_SPACE)
        self.lossless = True  # taken for true while the probes run: it selects the exact path of encode
        self.lossless = all(self.decode(self.encode(text)) == text.encode() for text in LOSSLESS_PROBES)

    def encode(self, text: str) -> np.ndarray:
        if META_SPACE in text and self.lossless and self._meta_space is not None:
            return self._encode_around_meta_space(text, self._meta_space)
        return np.array(self.model.encode(text), dtype=np.uint16)

    def dataset_name(self, name: str) -> str:
        return f"{name}_sp{self.vocab_size}"

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "file": self.path.name,
            "sha256": sha256_file(self.path),
            "vocab_size": self.vocab_size,
            "lossless": self.lossless,
        }

    def _encode_around_meta_space(self, text: str, meta_space: list[int]) -> np.ndarray:
        """U+2581 as its three byte pieces: sentencepiece itself would give it back as a space."""
        tokens: list[int] = []
        for number, part in enumerate(text.split(META_SPACE)):
            tokens += meta_space * (number > 0) + self.model.encode(part)
        return np.array(tokens, dtype=np.uint16)

    def _byte_tokens(self, text: str) -> list[int] | None:
        """The byte-fallback tokens of a text, None where the model has no byte pieces."""
        tokens = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return tokens if all(self.model.is_byte(token) for token in tokens) else None

    def _piece_bytes(self) -> list[bytes]:
        return [self._bytes_of(token) for token in range(self.model.vocab_size())]

    def _bytes_of(self, token: int) -> bytes:
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self.model.is_control(token) or self.model.is_unknown(token) or self.model.is_unused(token):
            return b""
        return piece.replace(META_SPACE, " ").encode()


class FoldingTokenizer(Tokenizer):
    """A lossless tokenizer of case-folded text; byte_lengths count the bytes of the text as it was."""

    def __init__(self, inner: Tokenizer) -> None:
        super().__init__(inner.pieces, inner.bos_id)
        if not inner.lossless:
            raise DataError("--casefold needs a lossless tokenizer: train one on folded text with --vocab-size")
        self.inner, self.kind, self.lossless, self.folds = inner, inner.kind, True, True
        self.byte_lengths -= [sum(piece.count(mark) for mark in MARKS.encode()) for piece in inner.pieces]

    def encode(self, text: str) -> np.ndarray:
        return self.inner.encode(fold_case(text))

    def decode(self, tokens: np.ndarray) -> bytes:
        return unfold_case(self.inner.decode(tokens).decode()).encode()

    def dataset_name(self, name: str) -> str:
        return self.inner.dataset_name(name) + CASEFOLD_SUFFIX

    def describe(self) -> dict[str, Any]:
        return {**self.inner.describe(), "casefold": True}


CASEFOLD, CASEFOLD_SUFFIX = "casefold:", "_casefold"


def load_sentencepiece(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError("sentencepiece is not installed: pip install sentencepiece, or use --tokenizer byte") from error
    if not path.is_file():
        raise DataError(f"tokenizer {path} not found: give the path of a sentencepiece .model file, or byte")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is not a sentencepiece model: give another file, or byte") from error


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`byte`, or the path of a sentencepiece model; behind casefold: for text that is case-folded first."""
    if str(spec).startswith(CASEFOLD):
        return FoldingTokenizer(load_tokenizer(str(spec).removeprefix(CASEFOLD)))
    return ByteTokenizer() if str(spec) == "byte" else SentencePieceTokenizer(Path(spec))


SENTENCE = 4000  # characters; the trainer skips sentences of more bytes than its limit, without a word
COVERAGE = 0.9995


def training_alphabet(texts: list[str], size: int) -> set[str]:
    """The characters that get pieces of their own, at most `size`: what is rarer becomes bytes.

    Left out are also the three that the trainer keeps for itself; it would skip the sentences that hold them.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    ranked = sorted((count, char) for char, count in counts.items() if char not in f"\0{META_SPACE}\u2585")[::-1]
    goal, held, alphabet = COVERAGE * sum(count for count, _ in ranked), 0, set[str]()
    for count, char in ranked[:size]:
        if held < goal:
            alphabet.add(char)
            held += count
    return alphabet


def training_sentences(texts: Iterable[str], alphabet: set[str]) -> Iterator[str]:
    """Pieces of texts for the trainer: in the alphabet, not too long, cut at line ends where there are any."""
    runs = re.compile("[" + "".join(map(re.escape, sorted(alphabet))) + "]+")
    for text in texts:
        for run in runs.findall(text):
            while len(run) > SENTENCE:
                cut = run.rfind("\n", 0, SENTENCE) + 1 or SENTENCE
                yield run[:cut]
                run = run[cut:]
            yield run


def train_sentencepiece(texts: list[str], vocab_size: int, path: Path) -> None:
    """Train a lossless BPE model: identity normalization, every space kept, unknown characters as bytes."""
    if not 300 <= vocab_size <= MAX_VOCAB:
        raise DataError(
            f"vocabulary size {vocab_size} is not between 300 and {MAX_VOCAB}: 256 byte pieces and 3 controls are part "
            "of it; for single bytes use --tokenizer byte"
        )
    alphabet = training_alphabet(texts, (vocab_size - 259) // 2)
    model, problem = try_training(list(training_sentences(texts, alphabet)), vocab_size) if alphabet else (b"", "none")
    if not model:
        raise DataError(
            f"no vocabulary of {vocab_size} pieces can be learned from {sum(map(len, texts))} characters: give more "
            f"text or another --vocab-size ({problem.strip().splitlines()[-1][:200]})"
        )
    atomic_write(path, [model])


def try_training(sentences: list[str], vocab_size: int) -> tuple[bytes, str]:
    """The trained model, or nothing and the trainer's complaint."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * SENTENCE,
            minloglevel=2,
        )
    except RuntimeError as error:
        return b"", str(error)
    return model.getvalue(), ""


# ---- manifests ------------------------------------------------------------------------------------------------------


class Fingerprint:
    """The identity of a corpus: sha256 over its texts, each preceded by its length as 8 little-endian bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: bytes) -> None:
        self._digest.update(frame(text))

    def add_frames(self, frames: bytes | memoryview) -> None:
        """Take texts that are already framed."""
        self._digest.update(frames)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


FRAME_HEAD = 8


def frame(text: bytes) -> bytes:
    return len(text).to_bytes(FRAME_HEAD, "little") + text


def make_manifest(
    name: str,
    fingerprint: Fingerprint,
    tokenizer: Tokenizer,
    splits: dict[str, Any],
    overlap: float | None,
    source: dict[str, Any],
) -> dict[str, Any]:
    return {
        "format": 1,
        "name": name,
        "fingerprint": fingerprint.hexdigest(),
        "bos_id": tokenizer.bos_id,
        "tokenizer": tokenizer.describe(),
        "splits": splits,
        "val_13gram_overlap": overlap,
        "source": source,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / MANIFEST)


def verify_dataset(folder: Path, manifest: dict[str, Any]) -> None:
    """Check every shard that a manifest names, by size, header and sha256."""
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                raise DataError(f"{path} is missing though {MANIFEST} names it: run again with --overwrite")
            if check_shard(path) != shard["tokens"] or sha256_file(path) != shard["sha256"]:
                raise DataError(f"{path} is not the file that {MANIFEST} names: run again with --overwrite")
            counts = path.with_suffix(SIDE_CAR)
            if "bytes_sha256" in shard and not (counts.is_file() and sha256_file(counts) == shard["bytes_sha256"]):
                raise DataError(f"{counts} is not what {MANIFEST} says of it: run again with --overwrite")


def check_tokenizer(out: Path, manifest: dict[str, Any]) -> None:
    """Check that OUT/tokenizers has the model that a manifest names."""
    entry = manifest["tokenizer"]
    path = out / "tokenizers" / str(entry["file"])
    if entry["file"] is not None and not (path.is_file() and sha256_file(path) == entry["sha256"]):
        raise DataError(f"{path} is missing or not the model that {MANIFEST} names: run again with --overwrite")


def finish_dataset(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove shards that an earlier, other build left, and write the manifest: the folder is complete."""
    named = {shard["file"]: shard for split in SPLITS for shard in manifest["splits"][split]["shards"]}
    counted = {Path(name).with_suffix(SIDE_CAR).name for name, shard in named.items() if "bytes_sha256" in shard}
    for path in [*folder.glob("fineweb_*_*.bin"), *folder.glob(f"fineweb_*_*{SIDE_CAR}"), *folder.glob("*.tmp")]:
        if path.name not in named.keys() | counted:
            path.unlink()
    write_json(folder / MANIFEST, manifest)


def place_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Put a tokenizer's model into OUT/tokenizers."""
    if isinstance(tokenizer, FoldingTokenizer):
        tokenizer = tokenizer.inner
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    target = out / "tokenizers" / tokenizer.path.name
    if not (target.is_file() and sha256_file(target) == sha256_file(tokenizer.path)):
        atomic_write(target, [tokenizer.path.read_bytes()])


# ---- what the user sees ---------------------------------------------------------------------------------------------


def print_summary(folder: Path, manifest: dict[str, Any], out: Path) -> None:
    """The closing table, and the line that trains on the result."""
    print(f"{'split':<6} {'documents':>10} {'tokens':>14} {'bytes':>15} {'bytes/token':>11} {'shards':>6}")
    for split in SPLITS:
        entry = manifest["splits"][split]
        known = entry["bytes"] is not None  # not for downloaded shards
        size, ratio = (
            (f"{entry['bytes']:,}", f"{entry['bytes'] / max(entry['tokens'], 1):.3f}") if known else ("?", "?")
        )
        print(
            f"{split:<6} {entry['documents']:>10,} {entry['tokens']:>14,} {size:>15} {ratio:>11} "
            f"{len(entry['shards']):>6}"
        )
    overlap, tokenizer = manifest["val_13gram_overlap"], manifest["tokenizer"]
    if overlap is not None:
        print(f"validation 13-grams that train has: {100 * overlap:.3f}%")
    print(f"tokenizer lossless: {'yes' if tokenizer['lossless'] else 'no, it normalizes text'}")
    print(f"fingerprint: {manifest['fingerprint']}")
    model = f"TOKENIZER_PATH={shown(out / 'tokenizers' / tokenizer['file'])} " if tokenizer["file"] else ""
    print(f"DATA_PATH={shown(folder)} {model}VOCAB_SIZE={tokenizer['vocab_size']}")


def shown(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the current folder."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


class Progress:
    """One line of progress with the time left, on stderr: rewritten on a terminal, else new lines at intervals."""

    def __init__(self, label: str, total: int, unit: str = "MB", scale: float = 1e6, every: float = 5.0) -> None:
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.terminal = sys.stderr.isatty()
        self.every = 0.2 if self.terminal else every
        self.start = self.last = time.monotonic()
        self.base = 0

    def skip(self, done: int) -> None:
        """Count work that an earlier run did: it says nothing about the speed of this one."""
        self.base = done

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self._print(done, now - self.start, note, end="" if self.terminal else "\n")

    def close(self, note: str = "") -> None:
        self._print(self.total, time.monotonic() - self.start, note, end="\n")

    def _print(self, done: int, seconds: float, note: str, end: str) -> None:
        worked, left = done - self.base, max(self.total - done, 0)
        eta = f"{seconds * left / worked:.0f} s left" if worked > 0 and left else f"{seconds:.1f} s"
        share = 100 * done / max(self.total, 1)
        line = f"{self.label}: {done / self.scale:.1f}/{self.total / self.scale:.1f} {self.unit} {share:.0f}% {eta}"
        line += f" {note}" if note else ""
        print(f"\r{line:<110}" if self.terminal else line, end=end, file=sys.stderr, flush=True)
