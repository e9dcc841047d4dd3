"""DATA: shard checks, the token stream, batch orders, exact positions, tokenizers and their byte counts."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_shard
from conftest import document as random_document
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

CPU = {"DEVICE": "cpu", "COMPILE": "0"}
VOCAB, BOS = 65535, 65000  # in the order tests a token is its own place in the stream, but for BOS
SEQ = 8


def folder_of(path: Path, *shards: Sequence[int] | np.ndarray, split: str = "train") -> str:
    """A data folder with these shards."""
    path.mkdir(parents=True, exist_ok=True)
    for number, tokens in enumerate(shards):
        write_shard(path / f"fineweb_{split}_{number:06d}.bin", np.array(tokens))
    return str(path)


# ---- shards ----


def header(magic: int = 20240520, version: int = 1, count: int = 3) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(1012)


@pytest.mark.parametrize(
    "data,named",
    [
        (b"", "0 bytes"),
        (header()[:1000], "1000 bytes"),
        (header(magic=20240521) + bytes(6), "magic 20240521"),
        (header(version=2) + bytes(6), "version 2"),
        (struct.pack(">3i", 20240520, 1, 3) + bytes(1012 + 6), "magic"),
        (header(count=4) + bytes(6), "says 4 tokens but holds 3"),
        (header(count=2) + bytes(6), "says 2 tokens but holds 3"),
        (header(count=3) + bytes(5), "holds 2.5"),
        (header(count=-3) + bytes(6), "says -3"),
        (header(count=0), "no tokens"),
    ],
)
def test_damaged_shard_is_named(data: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(data)
    with pytest.raises(t.UserError, match=named) as caught:
        t.TokenStream(str(tmp_path), "train", 10)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_whole_shard_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "fineweb_val_000000.bin").write_bytes(header() + struct.pack("<3H", 5, 65534, 0))
    stream = t.TokenStream(str(tmp_path), "val", 65535)
    assert stream.tokens == 3 and stream.read(0, 3).tolist() == [5, 65534, 0]
    assert not stream.shards[0].flags.writeable


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("/nowhere", path)], ids=["folder", "dangling link"])
def test_unreadable_shard_is_a_user_error(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder_of(tmp_path, [1, 2, 3])
    make(tmp_path / "fineweb_train_000001.bin")
    with pytest.raises(t.UserError, match="fineweb_train_000001"):
        t.TokenStream(str(tmp_path), "train", 10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_data_says_how_to_get_them(split: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "other", [1], split="val" if split == "train" else "train")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "other"):
        with pytest.raises(t.UserError, match=f"{folder} has no fineweb_{split}.*builtin.py.*download.py"):
            t.TokenStream(str(folder), split, 10)


def test_token_outside_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    stream = t.TokenStream(folder_of(tmp_path, [1, 2, 9], [10, 3]), "train", 10)
    assert stream.read(0, 3).tolist() == [1, 2, 9]
    for start, count in ((3, 1), (0, 5), (2, 2)):
        with pytest.raises(t.UserError, match="token 10 is outside VOCAB_SIZE=10"):
            stream.read(start, count)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), data=st.data())
def test_reading_across_shards_equals_the_concatenation(
    sizes: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(sum(sizes))
    parts = [rng.integers(0, VOCAB, size) for size in sizes]
    folder = folder_of(tmp_path_factory.mktemp("shards"), *parts)
    whole, stream = np.concatenate(parts), t.TokenStream(folder, "train", VOCAB)
    assert stream.tokens == len(whole)
    for _ in range(8):
        start = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - start))
        got = stream.read(start, count)
        assert got.dtype == np.int64 and got.tolist() == whole[start : start + count].tolist()


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 100, 1):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", np.array([number]))
    assert t.TokenStream(str(tmp_path), "train", 1000).read(0, 4).tolist() == [1, 2, 10, 100]


def test_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    base = np.arange(1000) % 50
    other = base.copy()
    other[-1] += 1
    long = [np.tile(base, 70), np.tile(base, 70), np.tile(base, 70)]
    long[1][0] += 1
    long[2][-1] += 1
    prints = {
        **{
            f"long{i}": t.TokenStream(folder_of(tmp_path / f"{i}", x), "train", 100).fingerprint()
            for i, x in enumerate(long)
        },
        "base": t.TokenStream(folder_of(tmp_path / "a", base), "train", 100).fingerprint(),
        "copy": t.TokenStream(folder_of(tmp_path / "b", base), "train", 100).fingerprint(),
        "token": t.TokenStream(folder_of(tmp_path / "c", other), "train", 100).fingerprint(),
        "short": t.TokenStream(folder_of(tmp_path / "d", base[:-1]), "train", 100).fingerprint(),
        "split": t.TokenStream(folder_of(tmp_path / "e", base[:500], base[500:]), "train", 100).fingerprint(),
    }
    assert prints["base"] == prints["copy"] and len(set(prints.values())) == len(prints) - 1


# ---- the loader ----


def places(tokens: int, documents: Sequence[int] = ()) -> np.ndarray:
    """A stream whose tokens are their own places, with BOS at some of them."""
    stream = np.arange(tokens)
    stream[list(documents)] = BOS
    return stream


DOCUMENTS = sorted({0, *(int(x) for x in np.random.default_rng(7).integers(0, 3000, 150)), 37, 38, 39})


def order_env(folder: str, **extra: Any) -> dict[str, str]:
    """Variables of a job over a stream of places."""
    env = {**CPU, "DATA_PATH": folder, "VOCAB_SIZE": str(VOCAB), "TRAIN_SEQ_LEN": str(SEQ), "HOLDOUT_TOKENS": "200"}
    env.update(TRAIN_BATCH_TOKENS=str(4 * SEQ), MICRO_BATCH_TOKENS=str(SEQ))
    return {**env, **{name: str(value) for name, value in extra.items()}}


@pytest.fixture(scope="module")
def place_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """3,000 places in shards of odd sizes, with documents of odd lengths."""
    stream = places(3000, DOCUMENTS)
    return folder_of(tmp_path_factory.mktemp("places"), stream[:701], stream[701:702], stream[702:1999], stream[1999:])


def loader_of(folder: str, mode: str, ranks: tuple[int, int] = (0, 1), **extra: Any) -> t.Loader:
    h = t.load_config(order_env(folder, BATCH_MODE=mode, **extra))
    rank, world = ranks
    return t.Loader(h, t.start_runtime(h)._replace(rank=rank, world=world), BOS)


def take(loader: t.Loader, steps: int, rows: int = 4) -> np.ndarray:
    """(steps, rows, SEQ + 1) tokens of the next batches, targets joined to inputs."""
    batches = [loader.next(rows, SEQ) for _ in range(steps)]
    for batch in batches:
        assert batch.tokens.dtype == batch.targets.dtype == t.torch.int64
        assert batch.tokens[:, 1:].equal(batch.targets[:, :-1])
    return np.stack([np.concatenate((b.tokens, b.targets[:, -1:]), 1) for b in batches])


def where(rows: np.ndarray) -> np.ndarray:
    """Place of each row's first token in the stream; checks that the rest of the row follows it."""
    stream = places(3000, DOCUMENTS)
    first = rows[..., 0].copy()
    for index in zip(*np.nonzero(first == BOS)):
        first[index] = next(d for d in DOCUMENTS if (stream[d : d + SEQ + 1] == rows[index]).all())
    for index in np.ndindex(first.shape):
        assert (stream[first[index] : first[index] + SEQ + 1] == rows[index]).all()
    return first


MODES = pytest.mark.parametrize("mode", t.BATCH_MODES)


@MODES
def test_rows_are_pieces_of_the_stream_and_targets_the_next_tokens(mode: str, place_data: str) -> None:
    assert (where(take(loader_of(place_data, mode), 200)) >= 0).all()


@MODES
@pytest.mark.parametrize("window", [3, 30, 2500])
def test_history_is_what_stands_before_a_row(mode: str, window: int, place_data: str) -> None:
    """Up to the beginning of the stream, -1 before it; a row that begins a document has none."""
    found, stream = 0, places(3000, DOCUMENTS)
    for world in (1, 2):
        for rank in range(world):
            loader = loader_of(place_data, mode, (rank, world), INDUCTION_ORDERS="1,2", INDUCTION_WINDOW=window)
            for _ in range(120):
                batch = loader.next(4, SEQ)
                starts = where(np.concatenate((batch.tokens, batch.targets[:, -1:]), 1))
                assert batch.history.shape == (4 // world, window + 1)
                for start, history in zip(starts, batch.history.numpy(), strict=True):
                    past = [] if mode == "documents" else stream[max(0, start - window - 1) : start].tolist()
                    assert history.tolist() == [-1] * (window + 1 - len(past)) + past
                    found += len(past)
    assert (found > 0) == (mode != "documents")


@MODES
def test_global_order_does_not_depend_on_the_number_of_ranks(mode: str, place_data: str) -> None:
    whole = take(loader_of(place_data, mode), 150)
    for world in (2, 4):
        shares = [loader_of(place_data, mode, (rank, world)) for rank in range(world)]
        assert [loader.next(4, SEQ).row for loader in shares] == [rank * 4 // world for rank in range(world)]
        parts = [take(loader_of(place_data, mode, (rank, world)), 150) for rank in range(world)]
        assert (np.concatenate(parts, 1) == whole).all()


@MODES
@pytest.mark.parametrize("holdout", [0, 184, 200, 10**9])  # 184 leaves whole batches exactly
def test_held_out_tokens_are_never_trained_on(mode: str, holdout: int, place_data: str) -> None:
    loader = loader_of(place_data, mode, HOLDOUT_TOKENS=holdout)
    kept = min(holdout, 300)  # at most a tenth of the stream
    assert loader.usable == 3000 - kept
    first = where(take(loader, 300))  # several epochs
    assert loader.position.epoch >= 2 and first.max() + SEQ < loader.usable
    expected = places(3000, DOCUMENTS)[3000 - kept :]
    h = t.load_config(order_env(place_data, HOLDOUT_TOKENS=holdout))
    assert t.read_holdout(h).tolist() == expected.tolist()


@MODES
def test_saved_position_resumes_exactly_there(mode: str, place_data: str) -> None:
    loader = loader_of(place_data, mode)
    positions, batches = [], []
    for _ in range(200):
        positions.append(loader.position)
        batches.append(take(loader, 1))
    assert positions[0] == t.Position() and len(set(positions)) == 200
    for step in (0, 1, 57, 100, 199):
        loader.seek(positions[step])  # drops the batch that was being prepared
        assert (take(loader, 1) == batches[step]).all()
        fresh = loader_of(place_data, mode)
        fresh.next(4, SEQ)
        fresh.seek(t.Position(*tuple(positions[step])))
        assert (take(fresh, min(3, 200 - step)) == np.concatenate(batches[step : step + 3])).all()


@MODES
def test_second_epoch_repeats_the_first(mode: str, place_data: str) -> None:
    loader = loader_of(place_data, mode)
    epochs: dict[int, list[list[int]]] = {}
    for _ in range(400):
        rows = where(take(loader, 1))[0]
        epochs.setdefault(loader.position.epoch, []).append(rows.tolist())
    assert sorted(epochs) == list(range(len(epochs))) and len(epochs) >= 3
    if mode == "documents":  # a batch may begin in one epoch and end in the next
        return
    assert epochs[0] == epochs[1]


def test_contiguous_rows_use_every_token_in_order(place_data: str) -> None:
    loader = loader_of(place_data, "contiguous")
    steps = (loader.usable - 1) // (4 * SEQ)
    first = where(take(loader, steps))
    assert first.reshape(-1).tolist() == list(range(0, steps * 4 * SEQ, SEQ))
    assert loader.position == t.Position(steps * 4 * SEQ, 0)
    assert where(take(loader, 1))[0, 0] == 0 and loader.position.epoch == 1


@pytest.mark.parametrize("holdout", [200, 183], ids=["a rest is left", "whole rows"])
def test_streams_continue_row_by_row(holdout: int, place_data: str) -> None:
    loader = loader_of(place_data, "streams", HOLDOUT_TOKENS=holdout)
    span = (loader.usable - 1) // 4
    first = where(take(loader, span // SEQ))
    assert first[0].tolist() == [row * span for row in range(4)]
    assert (np.diff(first, axis=0) == SEQ).all() and loader.position.epoch == 0
    assert where(take(loader, 1))[0].tolist() == first[0].tolist() and loader.position.epoch == 1


def test_document_rows_start_with_bos_and_leave_no_document_start_out_of_turn(place_data: str) -> None:
    loader = loader_of(place_data, "documents")
    last = loader.usable - SEQ - 1  # the last place where a row still fits
    expected, at = list[int](), 0
    while len(expected) < 400:
        start = next((d for d in DOCUMENTS if at <= d <= last), None)
        at = 0 if start is None else start + SEQ
        expected += [] if start is None else [start]
    first = where(take(loader, 100))
    assert first.reshape(-1).tolist() == expected


@pytest.mark.parametrize("documents", [[], [2795], [2990]], ids=["none", "too near the end", "only held out"])
def test_data_without_document_starts_are_refused_not_searched_for_ever(documents: list[int], tmp_path: Path) -> None:
    stream = t.TokenStream(folder_of(tmp_path, places(3000, documents)), "train", VOCAB)
    read, calls = stream.read, iter(range(5000))

    def counted(start: int, count: int) -> np.ndarray:
        assert next(calls, None) is not None, "searches without end"
        return read(start, count)

    stream.read = counted  # type: ignore[method-assign]
    for at in (t.Position(), t.Position(1500), t.Position(2799)):
        with pytest.raises(t.UserError, match=f"BATCH_MODE=documents.*{BOS}"):
            t.document_rows(stream, 2800, at, 4, SEQ, BOS)


def test_one_document_start_is_enough(tmp_path: Path) -> None:
    stream = t.TokenStream(folder_of(tmp_path, places(3000, [1700])), "train", VOCAB)
    for at in (t.Position(), t.Position(1500), t.Position(1701), t.Position(2799)):
        starts, after = t.document_rows(stream, 2800, at, 4, SEQ, BOS)
        assert starts == [1700] * 4 and after.epoch >= 3 and after.token == 1700 + SEQ


def test_finding_documents_reads_little_more_than_the_rows(tmp_path: Path) -> None:
    """Half of a row's length apart, documents must not cost a look at thousands of tokens for each row."""
    stream = t.TokenStream(folder_of(tmp_path, places(60000, range(0, 60000, SEQ // 2))), "train", VOCAB)
    read, counts = stream.read, []

    def counted(start: int, count: int) -> np.ndarray:
        counts.append(count)
        return read(start, count)

    stream.read = counted  # type: ignore[method-assign]
    t.document_rows(stream, 59000, t.Position(), 500, SEQ, BOS)
    assert sum(counts) <= 500 * SEQ * 16


def test_batch_size_stages_go_through_the_stream_without_gap(place_data: str) -> None:
    """A change of the number of rows finds another batch prepared; it must be dropped, not returned or skipped."""
    stages: dict[str, Any] = {"BATCH_STAGES": f"0:{2 * SEQ},0.25:{4 * SEQ},0.5:{8 * SEQ}"}
    loader = loader_of(place_data, "contiguous", **stages)
    h = t.load_config(order_env(place_data, **stages))
    rows = [t.stage_at(h.stages, progress) // SEQ for progress in (0.0, 0.2, 0.25, 0.4, 0.499, 0.5, 0.9, 1.0)]
    assert rows == [2, 2, 4, 4, 4, 8, 8, 8]
    first = np.concatenate([where(take(loader, 1, rows=count))[0] for count in rows])
    assert first.tolist() == list(range(0, sum(rows) * SEQ, SEQ))


def test_data_must_hold_one_step_of_the_largest_stage(tmp_path: Path) -> None:
    for stages, most in ((f"0:{2 * SEQ}", 2), (f"0:{SEQ},0.5:{4 * SEQ}", 4)):
        enough = folder_of(tmp_path / f"enough{most}", places(most * SEQ + 1))
        short = folder_of(tmp_path / f"short{most}", places(most * SEQ))
        extra: dict[str, Any] = {"BATCH_STAGES": stages, "HOLDOUT_TOKENS": "0"}
        rows = take(loader_of(enough, "contiguous", **extra), 3, rows=most)
        assert rows[:, :, 0].tolist() == [list(range(0, most * SEQ, SEQ))] * 3
        with pytest.raises(t.UserError, match=f"{most * SEQ} training tokens.*{most * SEQ};"):
            loader_of(short, "contiguous", **extra)


@MODES
def test_next_batch_is_prepared_while_the_step_runs(mode: str, place_data: str) -> None:
    """One batch ahead, and the right one: none is built twice."""
    loader, built = loader_of(place_data, mode), list[t.Position]()
    build = loader.build

    def noted(at: t.Position, rows: int, seq: int) -> Any:
        built.append(at)
        return build(at, rows, seq)

    loader.build = noted  # type: ignore[method-assign]
    for step in range(5):
        loader.next(4, SEQ)
        loader.pool.submit(int).result()  # the one thread has done what it was given
        assert len(built) == len(set(built)) == step + 2 and built[-1] == loader.position


def test_bad_token_reaches_the_caller_through_the_prefetch(tmp_path: Path) -> None:
    tokens = places(2000)
    tokens[5 * 4 * SEQ + 3] = VOCAB  # in the sixth batch
    loader = loader_of(folder_of(tmp_path, tokens), "contiguous")
    take(loader, 5)
    with pytest.raises(t.UserError, match=f"token {VOCAB} is outside"):
        loader.next(4, SEQ)


# ---- tokenizers ----

TEXTS = [
    "Hello world, this is plain text. It costs 1234567 dollars!",
    " leading space", "  two leading spaces", "trailing space ", "a  b   c    d     e", "   ", " ", "x",
    "tabs\tand\nnewlines\r\n\n\n  indented\n\tboth", "\n", "\n leading newline", "\t\t",
    "naïve café Größe — “quotes” … ½ ﬁ ①", "Ｆｕｌｌ ｗｉｄｔｈ", "е́ combining a\u0301e\u0308",
    "\u00a0no-break\u2003em\u200bzero",
    "日本語のテキストと中文字符 한국어", "Русский текст, ελληνικά, עברית, العربية, हिन्दी",
    "ไทยไม่มีช่องว่าง",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 in 🙂🙂 text🙂", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "a▁b ▁c▁", "<s> </s> <unk> <0x41> literal",
    "\x00\x01\x7f control",     "", "🙂", "é", " 🙂", "The the THE tHe   the",
    "def f(x):\n    return x ** 2  # comment\n", "ends with newline\n",
]  # fmt: skip
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
LOSSLESS = {**PLAIN, "add_dummy_prefix": False, "byte_fallback": True, "split_digits": True}
# name -> (vocabulary size, options of the trainer); the lossy ones are what people get from the trainer's defaults.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "lossless_320": (320, LOSSLESS),
    "lossless_600": (600, LOSSLESS),
    "lossless_2000": (2000, LOSSLESS),
    "default": (600, {"byte_fallback": True}),
    "default_unigram": (600, {"byte_fallback": True, "model_type": "unigram"}),
    "dummy_prefix_keeps_spaces": (600, {**LOSSLESS, "add_dummy_prefix": True}),
    "no_prefix_strips_spaces": (600, {"byte_fallback": True, "add_dummy_prefix": False}),
    "user_symbols": (
        600,
        {"byte_fallback": True, "user_defined_symbols": ["<|tag|>", "▁odd"], "control_symbols": ["<ctl>"]},
    ),
}


def train_model(prefix: Path, size: int, options: dict[str, Any]) -> Path:
    """A small sentencepiece model trained on this interpreter's documentation."""
    from pydoc_data.topics import topics

    import sentencepiece

    lines = [line for name in sorted(topics)[:25] for line in topics[name].splitlines() if line]
    lines += [text for text in TEXTS if text.strip() and "\x00" not in text and "<s>" not in text] * 3
    settings: dict[str, Any] = {"model_type": "bpe", "bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=size,
        character_coverage=0.98,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return prefix.with_name(prefix.name + ".model")


def open_model(path: Path) -> t.SentencePieceTokenizer:
    import sentencepiece

    return t.SentencePieceTokenizer(str(path), sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], t.SentencePieceTokenizer]:
    """A tokenizer of MODELS by name, trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), dict[str, t.SentencePieceTokenizer]()

    def get(name: str) -> t.SentencePieceTokenizer:
        if name not in made:
            made[name] = open_model(train_model(folder / name, *MODELS[name]))
        return made[name]

    return get


def byte_value(tokenizer: t.Tokenizer, token: int) -> int | None:
    """The byte that a token stands for, if it stands for one byte of a character."""
    if isinstance(tokenizer, t.ByteTokenizer):
        return token - tokenizer.first if token != tokenizer.bos else None
    return int(tokenizer.model.id_to_piece(token)[1:-1], 16) if tokenizer.model.is_byte(token) else None


def ends_a_character(tokenizer: t.Tokenizer, tokens: Sequence[int]) -> bool:
    """Whether a prefix ends between two characters."""
    run = bytearray()
    for token in reversed(tokens):
        value = byte_value(tokenizer, token)
        if value is None:
            break
        run.insert(0, value)
    try:
        run.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def pieces_between_dividers(
    tokenizer: t.Tokenizer, documents: Sequence[Sequence[int]]
) -> Iterator[tuple[int, list[int]]]:
    """(BOS or unknown token, the tokens up to the next one) of a stream of documents."""
    unknown = tokenizer.model.unk_id() if isinstance(tokenizer, t.SentencePieceTokenizer) else -1
    for document in documents:
        divider, piece = tokenizer.bos, list[int]()
        for token in document:
            if token == unknown:
                yield divider, piece
                divider, piece = unknown, []
            else:
                piece.append(token)
        yield divider, piece


def check_byte_law(tokenizer: t.Tokenizer, documents: Sequence[Sequence[int]]) -> None:
    """Over any span between characters, counted bytes are the bytes by which the decoded text grows.

    The stream is what a shard holds: BOS, then a document's tokens, and so on; each document is a text of its own. The
    unknown token (published tokenizers without byte fallback) has no surface form: it counts 0 and divides texts, too.
    """
    table, stream, lengths, done = tokenizer.byte_table(), [], dict[int, int](), 0
    for divider, document in pieces_between_dividers(tokenizer, documents):
        stream.append(divider)
        for end in range(len(document) + 1):
            if ends_a_character(tokenizer, document[:end]):
                lengths[len(stream) + end] = done + len(tokenizer.text_of(document[:end]).encode("utf-8"))
        stream += document
        done = lengths[len(stream)]
    tokens = np.array(stream)
    counted = np.concatenate(([0, 0], np.cumsum(table.byte_counts(tokens[:-1], tokens[1:]))))
    wrong = {end: (length, int(counted[end])) for end, length in lengths.items() if counted[end] != length}
    assert not wrong, f"at {next(iter(wrong))} of {stream}: decoded and counted {next(iter(wrong.values()))}"


@pytest.mark.parametrize("name", MODELS)
def test_counted_bytes_are_decoded_bytes(name: str, models: Callable) -> None:
    tokenizer = models(name)
    documents = [tokenizer.tokens_of(text) for text in TEXTS]
    check_byte_law(tokenizer, documents)
    check_byte_law(tokenizer, documents[::-1])


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("lossless")])
def test_lossless_tokenizer_counts_the_true_bytes(name: str, models: Callable) -> None:
    tokenizer = models(name)
    table = tokenizer.byte_table()
    for text in TEXTS:
        if "▁" in text:  # sentencepiece's own mark for a space comes back as a space
            continue
        tokens = np.array([tokenizer.bos, *tokenizer.tokens_of(text)])
        assert tokenizer.text_of(tokens[1:]) == text
        assert table.byte_counts(tokens[:-1], tokens[1:]).sum() == len(text.encode("utf-8"))


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["lossless_600", "default", "dummy_prefix_keeps_spaces"])
def test_counted_bytes_are_decoded_bytes_for_any_text(name: str, texts: list[str], models: Callable) -> None:
    tokenizer = models(name)
    check_byte_law(tokenizer, [tokenizer.tokens_of(text) for text in texts])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["lossless_600", "dummy_prefix_keeps_spaces"])
def test_counted_bytes_are_decoded_bytes_for_any_tokens(name: str, data: st.DataObject, models: Callable) -> None:
    """Also for what a tokenizer would not write: pieces in any order, as in a text that a model writes."""
    tokenizer = models(name)
    size = tokenizer.model.vocab_size()
    documents = data.draw(st.lists(st.lists(st.integers(3, size - 1), max_size=12), min_size=1, max_size=3))
    valid = [d for d in documents if all(ends_a_character(tokenizer, d[:i]) for i in range(len(d) + 1))]
    if valid:
        check_byte_law(tokenizer, valid)


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from(t.BYTE_VOCABULARIES),
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4),
)
def test_byte_tokenizer_counts_the_true_bytes(size: int, texts: list[str]) -> None:
    tokenizer = t.ByteTokenizer(size)
    documents = [tokenizer.tokens_of(text) for text in texts]
    assert [tokenizer.text_of(tokens) for tokens in documents] == texts
    assert all(token != tokenizer.bos for tokens in documents for token in tokens)
    check_byte_law(tokenizer, documents)


def test_byte_tokenizer_decodes_what_a_model_may_write() -> None:
    tokens = np.array([255, 72, 105, 255, 0xC3, 255])
    assert t.ByteTokenizer().text_of(tokens.tolist()) == "Hi\ufffd"
    assert t.ByteTokenizer(260).text_of([1, 76, 0, 109, 2, 3, 1]) == "Hi"  # padding, end and unknown say nothing


def test_tokens_without_a_surface_form_count_nothing(models: Callable) -> None:
    tokenizer = models("user_symbols")
    table, model = tokenizer.byte_table(), tokenizer.model
    word = next(i for i in range(model.vocab_size()) if model.id_to_piece(i) == "▁the")
    control = model.piece_to_id("<ctl>")
    for token in (0, 1, 2, control):
        assert table.boundary[token] and table.byte_counts(np.array([word]), np.array([token])) == 0
        assert table.byte_counts(np.array([token]), np.array([word])) == len(
            "the"
        )  # its space is no part of a text's start
    assert table.byte_counts(np.array([word]), np.array([word])) == len(" the")
    assert table.byte_counts(np.array([word]), np.array([model.piece_to_id("<|tag|>")])) == len("<|tag|>")


def published() -> list[Path]:
    """The challenge's own tokenizers, where this machine has them."""
    folders = [
        os.environ.get("PGOLF_TOKENIZERS"),
        ROOT.parent / "shared" / "data" / "tokenizers",
        ROOT / "data" / "tokenizers",
    ]
    found = [sorted(Path(f).glob("fineweb_*_bpe.model")) for f in folders if f]
    return next((paths for paths in found if paths), [])


@pytest.mark.parametrize("path", published() or [None], ids=lambda p: p.stem if p else "none here")
def test_published_tokenizers_count_decoded_bytes(path: Path | None) -> None:
    if path is None:
        pytest.skip("no published tokenizers here; python data/download.py gets them, or set PGOLF_TOKENIZERS")
    tokenizer = open_model(path)
    assert tokenizer.model.vocab_size() == int(path.stem.split("_")[1])
    documents = [tokenizer.tokens_of(text) for text in TEXTS]
    check_byte_law(tokenizer, documents)
    check_byte_law(tokenizer, [tokens for text in TEXTS for tokens in [tokenizer.tokens_of(text * 3 + " " + TEXTS[0])]])


# ---- the tokenizer and the data belong together ----


def data_with(folder: Path, tokenizer: Any) -> str:
    """A folder that says which tokenizer made it."""
    folder_of(folder, [1, 2, 3])
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "fingerprint": "f" * 64, "tokenizer": tokenizer}))
    return str(folder)


@pytest.fixture
def model_path(models: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    tokenizer = models("lossless_600")
    path = tmp_path_factory.mktemp("model") / "corpus_600_bpe.model"
    path.write_bytes(tokenizer.model.serialized_model_proto())
    return str(path), tokenizer.model.vocab_size()


def test_tokenizer_of_the_manifest_is_accepted(model_path: tuple[str, int], tmp_path: Path) -> None:
    path, size = model_path
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    data = data_with(
        tmp_path / "sp", {"kind": "sentencepiece", "file": Path(path).name, "sha256": digest, "vocab_size": size}
    )
    env = {"DATA_PATH": data, "TOKENIZER_PATH": path, "VOCAB_SIZE": str(size)}
    tokenizer = t.load_tokenizer(t.load_config(env))
    assert (
        tokenizer.fingerprint == digest
        and tokenizer.bos == 1
        and tokenizer.text_of(tokenizer.tokens_of(" it  ")) == " it  "
    )
    byte = data_with(tmp_path / "byte", {"kind": "byte", "file": None, "sha256": None, "vocab_size": 256})
    assert isinstance(t.load_tokenizer(t.load_config({"DATA_PATH": byte, "VOCAB_SIZE": "256"})), t.ByteTokenizer)
    bare = {"DATA_PATH": folder_of(tmp_path / "bare", [1])}  # published shards have no manifest
    words = [tokenizer.bos, *tokenizer.tokens_of(" the light of the old harbour and the long night")] * 20
    folder_of(tmp_path / "bare", words, split="val")
    assert t.load_tokenizer(t.load_config({**env, **bare})).fingerprint == digest
    assert t.load_tokenizer(t.load_config({**bare, "VOCAB_SIZE": "256"})).fingerprint == "byte"
    made = {"kind": "byte", "file": "pure_byte_260.json", "sha256": "0" * 64, "vocab_size": 260}  # as downloaded
    published = {"DATA_PATH": data_with(tmp_path / "published", made)}
    assert t.load_tokenizer(t.load_config({**published, "VOCAB_SIZE": "260"})).bos == 1
    for other in ({**published, "VOCAB_SIZE": "256"}, {"DATA_PATH": byte, "VOCAB_SIZE": "260"}):
        with pytest.raises(t.UserError, match="another tokenizer"):
            t.load_tokenizer(t.load_config(other))


@pytest.mark.parametrize("kind", ["other model", "byte data", "model data"])
def test_tokenizer_of_other_data_is_refused(kind: str, model_path: tuple[str, int], tmp_path: Path) -> None:
    path, size = model_path
    made = {"kind": "sentencepiece", "file": "other_600_bpe.model", "sha256": "0" * 64, "vocab_size": size}
    env = {"TOKENIZER_PATH": path, "VOCAB_SIZE": str(size)}
    if kind == "byte data":
        made = {"kind": "byte", "file": None, "sha256": None, "vocab_size": 256}
    if kind == "model data":
        env = {"VOCAB_SIZE": "256"}
    with pytest.raises(t.UserError, match="another tokenizer") as caught:
        t.load_tokenizer(t.load_config({**env, "DATA_PATH": data_with(tmp_path, made)}))
    message = str(caught.value)
    assert ("byte" if kind == "byte data" else "other_600_bpe.model") in message
    assert ("builtin" in message) is False and "\n" not in message


def test_tokens_of_another_tokenizer_are_noticed_without_a_manifest(
    model_path: tuple[str, int], tmp_path: Path, models: Callable
) -> None:
    """Permuted pieces: every token is in the vocabulary, every text but one is gibberish."""
    path, size = model_path
    tokenizer = models("lossless_600")
    words = [tokenizer.bos, *tokenizer.tokens_of("She opened the window, and said: it is late; the boats are in.")] * 40
    renamed = np.arange(size)
    renamed[300:] = np.random.default_rng(0).permutation(np.arange(300, size))
    for tokens, right in ((words, True), (renamed[words].tolist(), False)):
        data = folder_of(tmp_path / str(right), [1, 2, 3])
        folder_of(tmp_path / str(right), tokens, split="val")
        h = t.load_config({"DATA_PATH": data, "TOKENIZER_PATH": path, "VOCAB_SIZE": str(size)})
        if right:
            assert t.load_tokenizer(h).bos == 1
        else:
            with pytest.raises(t.UserError, match="TOKENIZER_PATH=.* does not seem to have made DATA_PATH"):
                t.load_tokenizer(h)


def test_missing_damaged_or_misfitting_tokenizer_is_one_line(model_path: tuple[str, int], tmp_path: Path) -> None:
    path, size = model_path
    data = {"DATA_PATH": folder_of(tmp_path / "d", [1])}
    cases = {
        "none.model": None,
        "empty.model": b"",
        "text.model": b"hello " * 99,
        "cut.model": Path(path).read_bytes()[:5000],
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(t.UserError, match=f"{name} (does not exist|is not a sentencepiece model)"):
            t.load_tokenizer(t.load_config({**data, "TOKENIZER_PATH": str(tmp_path / name), "VOCAB_SIZE": "600"}))
    with pytest.raises(t.UserError, match=f"has {size} pieces, but VOCAB_SIZE={size + 1}"):
        t.load_tokenizer(t.load_config({**data, "TOKENIZER_PATH": path, "VOCAB_SIZE": str(size + 1)}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '{"tokenizer": 3}', '{"tokenizer": "x"}', '{"tokenizer": []}', "é"]
)
def test_damaged_manifest_is_one_line(text: str, tmp_path: Path) -> None:
    folder_of(tmp_path, [1])
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(t.UserError, match="manifest.json"):
        t.load_tokenizer(t.load_config({"DATA_PATH": str(tmp_path), "VOCAB_SIZE": "256"}))


def test_data_fingerprint_is_the_manifests_or_the_shards(tmp_path: Path) -> None:
    made, bare = data_with(tmp_path / "made", {}), folder_of(tmp_path / "bare", [1, 2, 3])
    for folder, expected in ((made, "f" * 64), (bare, t.TokenStream(bare, "train", 10).fingerprint())):
        stream = t.TokenStream(folder, "train", 10)
        assert t.data_fingerprint(t.load_config({"DATA_PATH": folder}), stream) == expected


# ---- case-folded data ----


PREPARE = ROOT / "data" / "prepare.py"
sys.path.insert(0, str(PREPARE.parent))
SHARDS = importlib.import_module("shards")


@pytest.fixture(scope="module", params=["byte", "400"])
def folded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a job on case-folded documents, made by the real command, by bytes or a trained tokenizer."""
    choose, folder = random.Random(5), tmp_path_factory.mktemp("folded")
    for split, count in (("train", 150), ("val", 12)):
        texts = [f"{random_document(choose)} NASA \x0e McX ÉTÉ Straße İ" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kind = ["--tokenizer", "byte"] if request.param == "byte" else ["--vocab-size", request.param]
    inputs = ["--train", f"{folder}/train.jsonl", "--val", f"{folder}/val.jsonl", "--name", "x", "--out", str(folder)]
    subprocess.run([sys.executable, str(PREPARE), *inputs, *kind, "--casefold", "--workers", "1"], check=True)
    made = next((folder / "datasets").iterdir())
    texts = [json.loads(line)["text"] for line in (folder / "val.jsonl").read_text().splitlines()]
    model = next((folder / "tokenizers").glob("*.model"), Path("none"))
    size = "256" if request.param == "byte" else request.param
    names = {"DATA_PATH": str(made), "TOKENIZER_PATH": str(model), "VOCAB_SIZE": size}
    return {**CPU, **names, "PRESET": "tiny", "TEXT_BYTES": str(sum(len(text.encode()) for text in texts))}


def test_bits_per_byte_are_of_the_text_before_folding(
    folded: dict[str, str], tmp_path: Path, run_job: Callable[..., Any], read_metrics: Callable[..., Any]
) -> None:
    """Training, export, reload, `eval` and `generate` by the real commands."""
    job = {**folded, "ITERATIONS": "3", "OUT_DIR": str(tmp_path), "RUN_ID": "run"}
    bytes_of_text = int(job.pop("TEXT_BYTES"))
    assert (done := run_job(job)).code == 0, done.err
    score = read_metrics(tmp_path / "run", "val")[-1]
    assert score["val_bytes"] == bytes_of_text  # the first token is a BOS, of no bytes
    nats = score["val_loss_nats"] * score["val_tokens"]
    assert score["val_bpb"] == pytest.approx(nats / math.log(2) / bytes_of_text)
    artifact = str(tmp_path / "run" / "model.pgz")
    data = {name: job[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "DEVICE", "COMPILE")}
    assert f" bytes:{bytes_of_text} " in run_job(data, ["eval", artifact]).out
    prompt = "The NASA, É"
    written = run_job(data, ["generate", artifact, "--prompt", prompt, "--tokens", "3"])
    assert written.code == 0 and written.out.startswith(prompt)
    tokenizer = t.load_tokenizer(t.load_config(data))
    assert tokenizer.text_of(tokenizer.tokens_of(prompt)) == prompt
    assert tokenizer.text_of(tokenizer.tokens_of("NASA")[:1]) != "NASA"


@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_side_car_of_other_bytes_is_refused(damage: str, folded: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folded["DATA_PATH"], tmp_path / "data")
    side_car = folder / "fineweb_val_000000.bytes"
    counts = side_car.read_bytes()
    if damage == "missing":
        side_car.unlink()
    else:
        side_car.write_bytes(counts[:-1] if damage == "short" else bytes([counts[0] + 1]) + counts[1:])
    given = {**folded, "DATA_PATH": str(folder)}
    del given["TEXT_BYTES"]
    with pytest.raises(t.UserError, match="fineweb_val_000000.bytes"):
        t.load_tokenizer(t.load_config(given))


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aB ẞßİDž\x0e\x0f\x10 01")))
def test_folding_is_that_of_the_tool(text: str) -> None:
    assert t.fold_case(text) == SHARDS.fold_case(text)
    assert t.unfold_case(t.fold_case(text)) == text
    assert t.unfold_case(text) == SHARDS.unfold_case(text)
