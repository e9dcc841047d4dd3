"""The data tools: shards and tokenizers, the built-in corpus, prepare.py on every kind of input, download.py."""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
shards, builtin, prepare = (importlib.import_module(name) for name in ("shards", "builtin", "prepare"))
zstandard = importlib.import_module("zstandard")

WORDS = [*"abdefghk", "light", "river", "stone", "wind", "over", "grows", "falls", "slowly", "blue", "seven", "night"]
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "a\r\nb\rc\td",
    "nul \x00 here",
    "▁ meta ▁▁",
    "é ﬁ ① 😀",
    "  two  spaces  ",
    "<s> </s> <0x0A>",
]


def sentence(rng: random.Random, words: int = 30) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{number}: {sentence(rng, rng.randrange(5, 80))}" for number in range(count)] + ODD_TEXTS


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def packed(path: Path, data: bytes) -> bytes:
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    return packers.get(path.suffix, bytes)(data)


def tool(name: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DATA / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def run_prepare(out: Path, *arguments: Any, name: str = "x") -> Path:
    """Run prepare.py in this process with one worker and bytes as tokens, unless told otherwise."""
    tokenizer = [] if {"--tokenizer", "--vocab-size"} & set(map(str, arguments)) else ["--tokenizer", "byte"]
    prepare.main([*map(str, arguments), *tokenizer, "--name", name, "--out", str(out), "--workers", "1"])
    return next(folder for folder in (out / "datasets").iterdir() if folder.name.startswith(f"{name}_"))


def read_documents(folder: Path, split: str, tokenizer: Any = None) -> list[str]:
    """A split's texts, decoded from its shards."""
    tokenizer = tokenizer or shards.ByteTokenizer()
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    tokens = np.concatenate([np.asarray(shards.read_shard(path)) for path in paths])
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]).decode() for part in np.split(tokens, starts[1:])]


def fingerprint(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- shards and tokenizers --------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lossless model, trained once."""
    path = tmp_path_factory.mktemp("model") / "small_320_bpe.model"
    shards.train_sentencepiece(make_texts(300), 320, path)
    return path


def test_shard_has_the_fields_header(tmp_path: Path) -> None:
    entry = shards.write_shard(tmp_path / "a.bin", np.array([1, 2, 65534], dtype=np.uint16))
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert np.frombuffer(raw[1024:], dtype="<u2").tolist() == [1, 2, 65534]
    assert entry == {"file": "a.bin", "tokens": 3, "sha256": hashlib.sha256(raw).hexdigest()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: raw + b"x", "cut short"),
        (lambda raw: raw[:100], "expected a header"),
        (lambda raw: b"nope" + raw[4:], "not a token shard"),
    ],
)
def test_damaged_shard_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "a.bin"
    shards.write_shard(path, np.arange(5, dtype=np.uint16))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(shards.DataError, match=message):
        shards.read_shard(path)


def test_split_writer_cuts_shards_and_keeps_finished_ones(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        writer = shards.SplitWriter(tmp_path, "train", shards.ByteTokenizer(), shard_tokens=7)
        for _ in range(4):
            writer.add(np.array([255, 65, 66, 67, 68], dtype=np.uint16), 1, 4)
        entry: dict[str, Any] = writer.close()
        return entry

    first = build()
    assert [shard["tokens"] for shard in first["shards"]] == [7, 7, 6]
    assert (first["documents"], first["tokens"], first["bytes"]) == (4, 20, 16)
    shards.write_shard(tmp_path / "fineweb_train_000001.bin", np.zeros(7, dtype=np.uint16))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build() == first
    changed = [name for name, stamp in before.items() if (tmp_path / name).stat().st_mtime_ns != stamp]
    assert changed == ["fineweb_train_000001.bin"]


def test_split_writer_refuses_bytes_that_do_not_add_up(tmp_path: Path) -> None:
    writer = shards.SplitWriter(tmp_path, "train", shards.ByteTokenizer())
    writer.add(np.array([255, 65, 66], dtype=np.uint16), 1, 3)
    with pytest.raises(shards.DataError, match="decode to 2 bytes, expected 3"):
        writer.close()


ANY_TEXT = st.text() | st.text(alphabet="▁ \x00\r\n\tab▅<s>/0é😀", max_size=40) | st.sampled_from(ODD_TEXTS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_trained_tokenizer_gives_every_text_back(model: Path, text: str) -> None:
    tokenizer = prepare.worker_tokenizer(str(model))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode()
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.bos_id not in tokens.tolist()


@given(text=ANY_TEXT)
def test_byte_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = shards.ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.bos_id == 255 not in tokenizer.encode(text).tolist()


def test_trained_tokenizer_follows_the_conventions(model: Path) -> None:
    tokenizer = shards.load_tokenizer(model)
    assert (tokenizer.model.unk_id(), tokenizer.model.bos_id(), tokenizer.model.eos_id()) == (0, 1, 2)
    assert tokenizer.model.pad_id() == -1
    assert tokenizer.describe() == {
        "kind": "sentencepiece",
        "file": "small_320_bpe.model",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": 320,
        "lossless": True,
    }


def test_trained_tokenizer_keeps_digits_apart(tmp_path: Path) -> None:
    shards.train_sentencepiece(["1984 " * 200 + text for text in make_texts(200)], 330, tmp_path / "m.model")
    pieces = shards.load_tokenizer(tmp_path / "m.model").pieces
    assert {len(piece.strip()) for piece in pieces if piece.strip().isdigit()} == {1}


def test_training_a_tokenizer_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    shards.train_sentencepiece(make_texts(300), 320, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_lossy_model_is_found_out(tmp_path: Path) -> None:
    import sentencepiece

    path = tmp_path / "lossy.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(make_texts(300)),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            minloglevel=2,
        )
    assert shards.load_tokenizer(path).describe()["lossless"] is False
    write_jsonl(tmp_path / "in.jsonl", ["so      many   spaces", "ﬁne"])
    folder = run_prepare(
        tmp_path, "--train", tmp_path / "in.jsonl", "--val", tmp_path / "in.jsonl", "--tokenizer", path
    )
    manifest = shards.read_manifest(folder)
    assert manifest["splits"]["train"]["bytes"] == len("so      many   spaces") + len("ﬁne".encode())
    assert manifest["source"]["decoded_bytes"]["train"] < manifest["splits"]["train"]["bytes"]


@pytest.mark.parametrize(
    ("size", "message"), [(256, "use --tokenizer byte"), (70000, "65535"), (5000, "give more text")]
)
def test_impossible_vocabulary_is_refused(tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(shards.DataError, match=message):
        shards.train_sentencepiece(make_texts(50), size, tmp_path / "m.model")


def test_small_vocabulary_learns_from_many_scripts(tmp_path: Path) -> None:
    """More characters than pieces: the rare ones become bytes, nothing is lost."""
    texts = ["".join(chr(0x4E00 + (number * 37 + step) % 3000) for step in range(200)) for number in range(40)]
    shards.train_sentencepiece([*texts, *make_texts(200)], 400, tmp_path / "m.model")
    tokenizer = shards.load_tokenizer(tmp_path / "m.model")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text.encode() for text in texts)


# ---- the built-in corpus ----------------------------------------------------


def prose(seed: int, words: int = 120) -> str:
    """Text whose 13-grams are its own."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choice(letters) for _ in range(rng.randrange(2, 9))) for _ in range(words))


def wrapped(text: str, indent: str = "") -> str:
    words = text.split()
    return "\n".join(indent + " ".join(words[start : start + 8]) for start in range(0, len(words), 8))


def module_text(seed: int, words: int = 150) -> str:
    """A module with a long docstring of its own, a function with another, and comments."""
    return (
        f'"""Module {seed}.\n\n{wrapped(prose(3 * seed, words))}\n"""\n\n\ndef work_{seed}(left, right=1):\n'
        f'    """Work {seed}.\n\n{wrapped(prose(3 * seed + 1, 60), "    ")}\n    """\n    return left + right\n\n\n'
        + "\n".join("# " + line for line in wrapped(prose(3 * seed + 2, words)).split("\n"))
        + "\n"
    )


STDLIB_MODULES = [
    "abc",
    "ast",
    "bdb",
    "cmd",
    "code",
    "copy",
    "csv",
    "dis",
    "enum",
    "glob",
    "gzip",
    "heapq",
    "hmac",
    "io",
]


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A folder laid out like a standard library, small."""
    folder = tmp_path / "stdlib"
    for seed, name in enumerate(STDLIB_MODULES):
        write_text(folder / f"{name}.py", module_text(seed))
    for seed, name in enumerate(["__init__", "decoder", "encoder"], 100):
        write_text(folder / "json" / f"{name}.py", module_text(seed))
    for seed, name in enumerate(["test/test_json.py", "json/tests/x.py", "site-packages/p.py", "mine.py"], 200):
        write_text(folder / name, module_text(seed))
    topics = {f"subject{number}": prose(1000 + number, 90) for number in range(12)}
    write_text(folder / "pydoc_data" / "topics.py", f"topics = {topics!r}\n")
    return folder


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def run_builtin(out: Path, stdlib: Path, *arguments: Any) -> Path:
    builtin.main(["--source", str(stdlib), "--out", str(out), "--vocab-size", "400", *map(str, arguments)])
    return out / "datasets" / "builtin_sp400"


def test_builtin_is_complete_and_says_what_it_holds(tmp_path: Path, stdlib: Path, capsys: Any) -> None:
    folder = run_builtin(tmp_path, stdlib)
    manifest = shards.read_manifest(folder)
    tokenizer = shards.load_tokenizer(tmp_path / "tokenizers" / "builtin_400_bpe.model")
    texts = {split: read_documents(folder, split, tokenizer) for split in shards.SPLITS}
    for split, documents in texts.items():
        entry = manifest["splits"][split]
        assert entry["documents"] == len(documents) > 0
        assert entry["bytes"] == sum(len(text.encode()) for text in documents)
        assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])
    assert manifest["fingerprint"] == fingerprint(texts["train"] + texts["val"])
    assert manifest["tokenizer"]["lossless"] is True and manifest["val_13gram_overlap"] < 0.01
    printed = capsys.readouterr().out
    assert f"fingerprint: {manifest['fingerprint']}" in printed and "VOCAB_SIZE=400" in printed


def test_builtin_gives_the_same_bytes_twice(tmp_path: Path, stdlib: Path) -> None:
    first = run_builtin(tmp_path / "a", stdlib)
    arguments = ("--source", stdlib, "--out", tmp_path / "b", "--vocab-size", 400)
    done = tool("builtin", *arguments, PYTHONHASHSEED="7")  # another process, another order of sets
    assert done.returncode == 0, done.stderr
    assert contents(first) == contents(tmp_path / "b" / "datasets" / "builtin_sp400")
    assert contents(tmp_path / "a" / "tokenizers") == contents(tmp_path / "b" / "tokenizers")


def test_builtin_returns_at_once_when_complete(tmp_path: Path, stdlib: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = run_builtin(tmp_path, stdlib)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(builtin, "build_corpus", lambda *_: pytest.fail("built again"))
    run_builtin(tmp_path, stdlib)
    assert "is complete" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_builtin_notices_other_sources_and_damage(
    tmp_path: Path, stdlib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_builtin(tmp_path, stdlib)
    made = (folder / "manifest.json").read_bytes()
    write_text(stdlib / "queue.py", module_text(999))
    run_builtin(tmp_path, stdlib)
    assert "other files" in capsys.readouterr().out
    assert (folder / "manifest.json").read_bytes() == made
    shard = folder / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(shards.DataError, match="--overwrite"):
        run_builtin(tmp_path, stdlib)
    run_builtin(tmp_path, stdlib, "--overwrite")
    assert shards.verify_dataset(folder, shards.read_manifest(folder)) is None


def test_builtin_leaves_out_what_does_not_belong(stdlib: Path) -> None:
    write_text(
        stdlib / "html" / "entities.py", "table = {\n" + "".join(f"    'k{n}': 0x{n:x},\n" for n in range(90)) + "}\n"
    )
    write_text(stdlib / "symtable.py", "def broken(:\n" * 40)
    (stdlib / "locale.py").write_bytes(b"# \xff\xfe\n" * 100)
    documents = builtin.read_documents(stdlib, with_compiled=False)
    assert not [document.name for document in documents if "test" in document.name]
    units = {document.unit for document in documents}
    assert units == {*STDLIB_MODULES, "json", *(f"topic subject{number}" for number in range(12))}


def test_builtin_puts_each_docstring_in_one_document(stdlib: Path) -> None:
    documents = builtin.read_documents(stdlib, with_compiled=False)
    phrase = " ".join(prose(0, 150).split()[:6])
    holders = [document.name for document in documents if phrase in " ".join(document.text.split())]
    assert holders == ["abc.py docstrings"]
    text = next(document.text for document in documents if document.name == "abc.py docstrings")
    assert "abc.work_0(left, right=1)\n\nWork 0.\n" in text
    source = next(document.text for document in documents if document.name == "abc.py")
    assert "def work_0(left, right=1):\n    return left + right" in source


def test_builtin_keeps_units_on_one_side(stdlib: Path) -> None:
    corpus = builtin.build_corpus(stdlib, False)
    train, val = ({document.unit for document in side} for side in (corpus.train, corpus.val))
    assert train and val and not train & val
    assert any(unit.startswith("topic ") for unit in val) and any(not unit.startswith("topic ") for unit in val)
    assert builtin.unit_of("_pyio.py") == builtin.unit_of("io.py") == "io"
    assert builtin.unit_of("json/decoder.py") == builtin.unit_of("json/__init__.py") == "json"


def test_builtin_drops_near_duplicates(stdlib: Path) -> None:
    write_text(stdlib / "statistics.py", module_text(5).replace("Module 5", "Module of another name"))
    names = {document.name for document in builtin.build_corpus(stdlib, False).train}
    names |= {document.name for document in builtin.build_corpus(stdlib, False).val}
    both = {f"{STDLIB_MODULES[5]}.py", "statistics.py"}
    assert len(names & both) == 1


def test_overlap_is_measured_and_limited() -> None:
    def document(name: str, text: str) -> Any:
        return builtin.Document(name, name, text)

    shared = prose(1, 100)
    train = [document("t", shared + " " + prose(2, 500))]
    planted, clean = document("planted", shared + " " + prose(3, 12)), document("clean", prose(4, 10_012))
    # 112 words have 100 13-grams, 88 of them inside the 100 shared words.
    assert builtin.limit_overlap(train, [planted]) == ([planted], 88 / 100)
    kept, overlap = builtin.limit_overlap(train, [planted, clean])
    assert {entry.name for entry in kept} == {"planted", "clean"} and overlap == pytest.approx(88 / 10_100)
    shorter = document("clean", prose(4, 1_012))
    assert builtin.limit_overlap(train, [planted, shorter]) == ([shorter], 0.0)


def test_builtin_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    done = tool("builtin", "--source", tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_builtin_of_this_python(tmp_path: Path) -> None:
    """The real thing, with bytes as tokens. Worth its seconds: the law of 1% must hold on the real library."""
    done = tool("builtin", "--out", tmp_path, "--tokenizer", "byte")
    assert done.returncode == 0, done.stderr
    manifest = shards.read_manifest(tmp_path / "datasets" / "builtin_byte256")
    assert manifest["val_13gram_overlap"] < 0.01
    assert manifest["splits"]["val"]["bytes"] >= 300_000
    assert 0.03 < manifest["splits"]["val"]["bytes"] / manifest["splits"]["train"]["bytes"] < 0.08
    assert done.stdout.endswith("datasets/builtin_byte256 VOCAB_SIZE=256\n")


# ---- prepare: inputs --------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_prepare_reads_jsonl(tmp_path: Path, packing: str) -> None:
    texts = make_texts(200)
    train, val = (
        write_jsonl(tmp_path / f"t.jsonl{packing}", texts),
        write_jsonl(tmp_path / f"v.jsonl{packing}", texts[::-1]),
    )
    folder = run_prepare(tmp_path, "--train", train, "--val", val, "--block-bytes", 2000, "--shard-tokens", 5000)
    manifest = shards.read_manifest(folder)
    assert read_documents(folder, "train") == texts and read_documents(folder, "val") == texts[::-1]
    assert manifest["fingerprint"] == fingerprint(texts + texts[::-1])
    entry = manifest["splits"]["train"]
    assert (entry["documents"], entry["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
    assert entry["tokens"] == entry["bytes"] + entry["documents"]
    assert [shard["tokens"] for shard in entry["shards"]][:-1] == [5000] * (len(entry["shards"]) - 1)
    assert (tmp_path / "work" / "x_byte256").exists() is False
    shards.verify_dataset(folder, manifest)


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_prepare_reads_txt_files_whole(tmp_path: Path, packing: str) -> None:
    texts = make_texts(20)
    for number, text in enumerate(texts):
        path = write_text(tmp_path / "in" / f"{number:03d}.txt{packing}", "")
        path.write_bytes(packed(path, text.encode()))
    write_text(tmp_path / "in" / "README.md", "not text for training")
    folder = run_prepare(tmp_path, "--train", tmp_path / "in", "--val", tmp_path / "in" / f"000.txt{packing}")
    assert read_documents(folder, "train") == texts and read_documents(folder, "val") == texts[:1]


def test_prepare_splits_txt_at_blank_lines(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "\n\none\nstill one\r\n  \n\ntwo\n\t\nthree")
    folder = run_prepare(tmp_path, "--train", path, "--val", path, "--txt-split", "blank", "--block-bytes", 1)
    assert read_documents(folder, "train") == ["one\nstill one\r\n", "two\n", "three"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_prepare_reads_parquet(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    texts = make_texts(700)
    table = pyarrow.table({"id": list(range(len(texts))), "body": pyarrow.array(texts).cast(kind)})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    val = write_jsonl(tmp_path / "v.jsonl", ["x"])
    val.write_text('{"body": "x"}\n')
    folder = run_prepare(tmp_path, "--train", tmp_path / "t.parquet", "--val", val, "--text-field", "body")
    assert read_documents(folder, "train") == texts


def test_prepare_reads_files_that_were_joined(tmp_path: Path) -> None:
    texts = make_texts(30)
    for packing in (".gz", ".xz", ".zst"):
        path = tmp_path / f"t.jsonl{packing}"
        halves = [write_jsonl(tmp_path / f"h{half}.jsonl{packing}", texts[half::2]) for half in (0, 1)]
        path.write_bytes(b"".join(half.read_bytes() for half in halves))
        folder = run_prepare(tmp_path / packing, "--train", path, "--val", halves[0])
        assert read_documents(folder, "train") == texts[0::2] + texts[1::2]


def test_prepare_trains_a_tokenizer_on_train_alone(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", make_texts(400))
    for name, secret in (("a", "xylophone "), ("b", "quixotically ")):
        val = write_jsonl(tmp_path / f"{name}.jsonl", [secret * 2000])
        run_prepare(tmp_path / name, "--train", train, "--val", val, "--vocab-size", 330)
    models = [(tmp_path / name / "tokenizers" / "x_330_bpe.model").read_bytes() for name in ("a", "b")]
    assert models[0] == models[1]
    tokenizer = shards.load_tokenizer(tmp_path / "a" / "tokenizers" / "x_330_bpe.model")
    assert read_documents(tmp_path / "a" / "datasets" / "x_sp330", "train", tokenizer) == make_texts(400)


def test_tokenizer_sample_is_bounded_and_uniform(tmp_path: Path) -> None:
    texts = make_texts(300)
    recipe = prepare.Recipe("text", 0.0, False, "byte")
    forward, backward = (
        prepare.make_sources(prepare.find_files([write_jsonl(tmp_path / f"{name}.jsonl", order)]), "train", "file")
        for name, order in (("f", texts), ("b", texts[::-1]))
    )
    sample = prepare.sample_texts(forward, recipe, 5000)
    assert 3000 < sum(len(text.encode()) for text in sample) <= 5000
    assert sample == prepare.sample_texts(backward, recipe, 5000) and sample[0] != texts[0]


def test_tokenizer_sample_leaves_out_what_the_hash_makes_validation(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(100))
    folder = run_prepare(tmp_path, "--train", path, "--val-fraction", 0.3)
    sources = prepare.make_sources(prepare.find_files([path]), "hash", "file")
    sample = prepare.sample_texts(sources, prepare.Recipe("text", 0.3, False, "byte"), 10**6)
    assert sorted(sample) == sorted(read_documents(folder, "train")) and len(sample) < len(make_texts(100))


def test_prepare_takes_a_tokenizer_by_its_name(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    shutil.copyfile(model, tmp_path / "tokenizers" / "known.model")
    path = write_jsonl(tmp_path / "t.jsonl", ODD_TEXTS)
    folder = run_prepare(tmp_path, "--train", path, "--val", path, "--tokenizer", "known.model")
    assert read_documents(folder, "train", shards.load_tokenizer(model)) == ODD_TEXTS
    assert shards.read_manifest(folder)["tokenizer"]["file"] == "known.model"


# ---- prepare: splits and duplicates -----------------------------------------


def test_hash_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = make_texts(400)
    sides = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        path = write_jsonl(tmp_path / name / "in.jsonl", order)
        folder = run_prepare(tmp_path / name, "--train", path, "--val-fraction", 0.1)
        manifest, found = (
            shards.read_manifest(folder),
            {split: read_documents(folder, split) for split in shards.SPLITS},
        )
        assert manifest["fingerprint"] == fingerprint(found["train"] + found["val"]), "of a block that is shared, too"
        assert all(manifest["splits"][split]["documents"] == len(found[split]) for split in shards.SPLITS)
        sides.append({split: set(found[split]) for split in shards.SPLITS})
    assert sides[0] == sides[1] and not sides[0]["train"] & sides[0]["val"]
    assert sides[0]["train"] | sides[0]["val"] == set(texts) and 20 <= len(sides[0]["val"]) <= 60


def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path, capsys: Any) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", ["a", "b", "a", "v", "c", "v"])
    val = write_jsonl(tmp_path / "v.jsonl", ["v", "w", "w"])
    arguments = ("--train", train, "--val", val, "--block-bytes", 2)
    folder = run_prepare(tmp_path / "keep", *arguments)
    assert read_documents(folder, "train") == ["a", "b", "a", "v", "c", "v"]
    assert "exact duplicates: 4 (2 in train of validation documents), kept" in capsys.readouterr().out
    folder = run_prepare(tmp_path / "drop", *arguments, "--dedup")
    assert read_documents(folder, "train") == ["a", "b", "c"] and read_documents(folder, "val") == ["v", "w"]
    assert shards.read_manifest(folder)["fingerprint"] == fingerprint(["a", "b", "c", "v", "w"])


# ---- prepare: kills, parts, workers -----------------------------------------


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended in the meantime
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def big_corpus(folder: Path) -> list[Any]:
    """Arguments for some hundred blocks: a few seconds of work."""
    rng = random.Random(1)
    train = write_jsonl(folder / "t.jsonl.xz", [sentence(rng, 300) for _ in range(1000)])
    val = write_jsonl(folder / "v.jsonl.gz", [sentence(rng, 300) for _ in range(50)])
    return ["--train", train, "--val", val, "--block-bytes", 10_000, "--shard-tokens", 300_000]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_prepare_continues_after_a_kill_with_the_same_bytes(tmp_path: Path, model: Path, monkeypatch: Any) -> None:
    arguments = [*big_corpus(tmp_path), "--tokenizer", model]
    whole = run_prepare(tmp_path / "whole", *arguments)
    command = [sys.executable, str(DATA / "prepare.py"), *map(str, arguments), "--name", "x", "--workers", "2"]
    work = tmp_path / "killed" / "work" / "x_sp320"
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stderr=subprocess.PIPE)
    wait_for(lambda: len(list(work.glob("*.npz"))) >= 5)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    survived = {path: path.stat().st_mtime_ns for path in work.glob("*.npz")}
    assert not (tmp_path / "killed" / "datasets").exists() and len(survived) < 100
    stamps: dict[Path, int] = {}

    def note_stamps(*rest: Any) -> None:
        stamps.update({path: path.stat().st_mtime_ns for path in survived})
        merge(*rest)

    merge = prepare.merge
    monkeypatch.setattr(prepare, "merge", note_stamps)
    killed = run_prepare(tmp_path / "killed", *arguments)
    assert stamps == survived, "finished blocks are not encoded again"
    assert contents(killed) == contents(whole)


def test_prepare_stopped_while_merging_keeps_finished_shards(tmp_path: Path, monkeypatch: Any) -> None:
    arguments = big_corpus(tmp_path)
    whole = run_prepare(tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shards, "finish_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_prepare(tmp_path / "cut", *arguments)
    cut = tmp_path / "cut" / "datasets" / "x_byte256"
    assert not (cut / "manifest.json").exists()
    (cut / "fineweb_train_000001.bin").write_bytes(b"torn")
    (cut / "fineweb_train_000099.bin").write_bytes(b"of an older build")
    kept = cut / "fineweb_train_000000.bin"
    stamp = kept.stat().st_mtime_ns
    run_prepare(tmp_path / "cut", *arguments)
    assert kept.stat().st_mtime_ns == stamp and contents(cut) == contents(whole)


@pytest.mark.parametrize("files", [1, 9], ids=["blocks are shared", "files are shared"])
def test_parts_on_two_machines_give_the_same_documents(tmp_path: Path, files: int) -> None:
    texts = make_texts(500)
    for number in range(files):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl.gz", texts[number::files])
    arguments = ["--train", tmp_path / "in", "--val-fraction", 0.1, "--block-bytes", 3000, "--dedup"]
    whole = run_prepare(tmp_path / "whole", *arguments)
    both = tmp_path / "merged" / "work" / "x_byte256"
    for part in ("1/2", "2/2"):
        machine = tmp_path / part.replace("/", "-")
        prepare.main(
            [*map(str, arguments), "--tokenizer", "byte", "--name", "x", "--out", str(machine), "--part", part]
        )
        assert not (machine / "datasets").exists()
        shutil.copytree(machine / "work" / "x_byte256", both, dirs_exist_ok=True)
        if part == "1/2":
            with pytest.raises(shards.DataError, match="parts that are left"):
                run_prepare(tmp_path / "merged", "--merge")
    assert len(list((tmp_path / "1-2").rglob("*.npz"))) < len(list(both.glob("*.npz")))
    assert contents(run_prepare(tmp_path / "merged", "--merge", "--dedup")) == contents(whole)


def test_blocks_are_cut_by_their_bytes() -> None:
    """What a kill loses, and what memory holds, is bounded whatever the size of the documents."""
    blocks = prepare.cut_blocks([(number, b"x" * 10) for number in range(7)], 25)
    assert [len(block) for block in blocks] == [3, 3, 1]


def test_workers_do_not_change_the_bytes(tmp_path: Path, model: Path) -> None:
    texts = make_texts(300)
    path = write_jsonl(tmp_path / "t.jsonl", texts)
    arguments = ["--train", path, "--val", path, "--tokenizer", model, "--block-bytes", 4000]
    one = run_prepare(tmp_path / "one", *arguments)
    done = tool("prepare", *arguments, "--name", "x", "--out", tmp_path / "two", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two" / "datasets" / "x_sp320") == contents(one)


def test_same_command_again_verifies_and_returns(tmp_path: Path, capsys: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(20))
    folder = run_prepare(tmp_path, "--train", path, "--val", path)
    run_prepare(tmp_path, "--train", path, "--val", path)
    assert "is complete, its shards are verified" in capsys.readouterr().out
    for other in (["--dedup"], ["--shard-tokens", 500]):
        with pytest.raises(shards.DataError, match="other inputs or settings"):
            run_prepare(tmp_path, "--train", path, "--val", path, *other)
    shard = folder / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"AA")
    with pytest.raises(shards.DataError, match="is not the file that manifest.json names"):
        run_prepare(tmp_path, "--train", path, "--val", path)
    write_jsonl(path, make_texts(21))
    with pytest.raises(shards.DataError, match="other inputs or settings"):
        run_prepare(tmp_path, "--train", path, "--val", path)
    run_prepare(tmp_path, "--train", path, "--val", path, "--overwrite")
    assert read_documents(folder, "train") == make_texts(21)


def test_unfinished_work_of_another_job_is_not_mixed_in(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(20))
    prepare.main(["--train", str(path), "--tokenizer", "byte", "--name", "x", "--out", str(tmp_path), "--part", "1/2"])
    with pytest.raises(shards.DataError, match="val_fraction: 0.01, now 0.5"):
        run_prepare(tmp_path, "--train", path, "--val-fraction", 0.5)
    folder = run_prepare(tmp_path, "--train", path, "--val-fraction", 0.5, "--overwrite")
    fresh = run_prepare(tmp_path / "fresh", "--train", path, "--val-fraction", 0.5)
    assert contents(folder) == contents(fresh), "blocks of the other job are gone"


TRAINED = ["--vocab-size", 330, "--tokenizer-bytes"]
OTHER_SETTINGS = [
    (["--block-bytes", 3000], ["--block-bytes", 2000], "block_bytes: 3000, now 2000"),
    (["--text-field", "text"], ["--text-field", "body"], 'text_field: "text", now "body"'),
    (["--txt-split", "file"], ["--txt-split", "blank"], 'txt_split: "file", now "blank"'),
    ([], ["--skip-bad"], "skip_bad: false, now true"),
    ([*TRAINED, 9000], [*TRAINED, 8000], "tokenizer_source: "),
]


@pytest.mark.parametrize(
    ("first", "then", "message"), OTHER_SETTINGS, ids=[row[2].split(":")[0] for row in OTHER_SETTINGS]
)
def test_blocks_of_other_settings_are_not_mixed_in(
    tmp_path: Path, first: list[Any], then: list[Any], message: str
) -> None:
    """Each setting that decides what is in a block is part of a job's identity."""
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(200))
    run_part = ["--train", path, "--name", "x", "--out", tmp_path, "--part", "1/2", "--workers", 1]
    tokenizer = [] if "--vocab-size" in first else ["--tokenizer", "byte"]
    prepare.main([*map(str, [*run_part, *tokenizer, *first])])
    with pytest.raises(shards.DataError, match=message):
        run_prepare(tmp_path, "--train", path, *then)


def test_changed_input_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["one", "two"])
    run_prepare(tmp_path, "--train", path, "--val", path)
    write_jsonl(path, ["one", "six"])
    with pytest.raises(shards.DataError, match="other inputs or settings"):
        run_prepare(tmp_path, "--train", path, "--val", path)


# ---- prepare: errors --------------------------------------------------------


BAD_LINES = [
    (b'{"text": "a"', "t.jsonl:2: Expecting"),
    (b'{"body": "a"}', "t.jsonl:2: no field 'text', it has 'body'"),
    (b'{"text": 5}', "t.jsonl:2: 'text' is int, expected text"),
    (b'["a"]', "t.jsonl:2: a JSON list, expected an object"),
    (b'{"text": "\xff"}', "t.jsonl:2: 'utf-8' codec can't decode"),
    (rb'{"text": "\ud800"}', "t.jsonl:2: 'utf-8' codec can't encode"),
    (b"[" * 100_000, "t.jsonl:2: maximum recursion"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_named_and_may_be_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_text(tmp_path / "t.jsonl", "")
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n\n{"text": "also good"}')
    with pytest.raises(shards.DataError) as caught:
        run_prepare(tmp_path, "--train", path, "--val", path)
    assert message in str(caught.value) and "--skip-bad" in str(caught.value)
    folder = run_prepare(tmp_path / "skip", "--train", path, "--val", path, "--skip-bad")
    skipped = shards.read_manifest(folder)["source"]["skipped"]
    assert read_documents(folder, "train") == ["good", "also good"]
    assert skipped["documents"] == 2 and message in skipped["named"][0]


def test_all_skipped_documents_are_counted_though_not_all_are_named(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.jsonl", '{"text": "good"}\n' + "bad\n" * 150)
    val = write_jsonl(tmp_path / "v.jsonl", ["fine"])
    skipped = shards.read_manifest(run_prepare(tmp_path, "--train", path, "--val", val, "--skip-bad"))["source"][
        "skipped"
    ]
    assert skipped["documents"] == 150 and len(skipped["named"]) == 100


def test_bad_txt_file_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "in" / "a.txt", "fine")
    (tmp_path / "in" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(shards.DataError, match=r"b\.txt: 'utf-8' codec can't decode byte 0xe9"):
        run_prepare(tmp_path, "--train", tmp_path / "in", "--val-fraction", 0.5)


def test_bad_paragraph_is_named_by_its_line(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "")
    path.write_bytes(b"one\ntwo\n\nthree\ncaf\xe9\n")
    with pytest.raises(shards.DataError, match=r"a\.txt:4: 'utf-8' codec"):
        run_prepare(tmp_path, "--train", path, "--val", path, "--txt-split", "blank")


def test_text_that_a_tokenizer_loses_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    class Careless(shards.ByteTokenizer):  # type: ignore[name-defined, misc]
        def encode(self, text: str) -> Any:
            return super().encode(text.replace("q", ""))

    monkeypatch.setattr(prepare, "worker_tokenizer", lambda spec: Careless())
    path = write_jsonl(tmp_path / "t.jsonl", ["fine", "quite fine"])
    with pytest.raises(shards.DataError, match=r"t\.jsonl:2: the tokenizer does not give this text back"):
        run_prepare(tmp_path, "--train", path, "--val", path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compressed_file_is_refused(tmp_path: Path, packing: str, damage: str) -> None:
    path = write_jsonl(tmp_path / f"t.jsonl{packing}", make_texts(2000))
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw)
    message = "ends in the middle" if damage == "cut" else r"is damaged|codec can't|Expecting|Invalid|Extra data"
    with pytest.raises(shards.DataError, match=message):
        run_prepare(tmp_path, "--train", path, "--val", path)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    cases = [
        ({"id": [1]}, "has no column 'text', it has id"),
        ({"text": [1]}, "holds int64, expected string"),
        ({"text": pyarrow.array([b"ok", b"\xff"])}, "row 2: 'utf-8' codec"),
        ({"text": pyarrow.array(["ok", None])}, "row 2: 'text' is NoneType"),
    ]
    for columns, message in cases:
        parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(shards.DataError, match=message):
            run_prepare(tmp_path, "--train", path, "--val", path, "--overwrite")
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(shards.DataError, match="not a readable parquet file"):
        run_prepare(tmp_path, "--train", path, "--val", path, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "{in}", "--tokenizer", "none.model"], "tokenizer none.model not found"),
        (["--train", "{in}", "--tokenizer", "{in}"], "is not a sentencepiece model"),
        (["--train", "{in}", "--tokenizer", "byte", "--vocab-size", "512"], "give either --tokenizer"),
        (["--train", "{in}.gone", "--tokenizer", "byte"], "in.jsonl.gone not found"),
        (["--train", "{here}", "--tokenizer", "byte", "--part", "3/2"], "--part '3/2' is not I/N"),
        (["--train", "{model}", "--tokenizer", "byte"], "is of no known kind: expected .jsonl, .txt, .parquet"),
        (["--tokenizer", "byte"], "no input"),
        (["--merge", "--tokenizer", "byte"], "holds no work to merge"),
        (["--train", "{in}", "--tokenizer", "byte", "--val-fraction", "0"], "no documents for validation"),
        (["--train", "{in}", "--tokenizer", "byte", "--val-fraction", "1"], r"is not in \[0, 1\)"),
        (["--train", "{in}", "--val", "{in}", "--val-fraction", "0.1", "--tokenizer", "byte"], "choose one"),
        (["--train", "{in}", "--tokenizer", "byte", "--name", "a/b"], "--name 'a/b'"),
        (["--train", "{in}", "--tokenizer", "byte", "--part", "1/2", "--merge"], "--part and --merge are both set"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, model: Path, arguments: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", make_texts(3))
    names = {"in": path, "here": tmp_path, "model": model}
    with pytest.raises(shards.DataError, match=message):
        prepare.main(["--name", "x", "--out", str(tmp_path), "--workers", "1"] + [a.format(**names) for a in arguments])


def test_error_on_the_command_line_is_one_line_and_code_2(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.jsonl", '{"text": "a"}\nnot json\n')
    for workers in (1, 2):
        done = tool(
            "prepare",
            "--train",
            path,
            "--val",
            path,
            "--tokenizer",
            "byte",
            "--name",
            "x",
            "--out",
            tmp_path,
            "--workers",
            workers,
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: {path}:2: ")


def test_full_disk_is_said_and_survived(tmp_path: Path, monkeypatch: Any) -> None:
    arguments = big_corpus(tmp_path)
    written = []

    def fsync(number: int) -> None:
        written.append(number)
        if len(written) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", fsync)
        with pytest.raises(shards.DataError, match="disk full while writing .*npz: free some space"):
            run_prepare(tmp_path / "full", *arguments)
    assert contents(run_prepare(tmp_path / "full", *arguments)) == contents(run_prepare(tmp_path / "whole", *arguments))


def test_damaged_work_file_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(200))
    prepare.main(["--train", str(path), "--tokenizer", "byte", "--name", "x", "--out", str(tmp_path), "--part", "1/1"])
    block = next((tmp_path / "work" / "x_byte256").glob("*.npz"))
    block.write_bytes(block.read_bytes()[:-50])
    with pytest.raises(shards.DataError, match=f"{block.name} is damaged .* delete it and run again"):
        run_prepare(tmp_path, "--merge")
    block.unlink()
    folder = run_prepare(tmp_path, "--train", path)
    assert sorted(read_documents(folder, "train") + read_documents(folder, "val")) == sorted(make_texts(200))


def test_blocks_of_another_tokenizer_are_not_merged(tmp_path: Path, model: Path) -> None:
    """Two machines that each trained their own would give tokens of two meanings."""
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(20))
    prepare.main(
        ["--train", str(path), "--tokenizer", str(model), "--name", "x", "--out", str(tmp_path), "--part", "1/1"]
    )
    shards.train_sentencepiece(make_texts(300, seed=1), 320, tmp_path / "work" / "x_sp320" / "tokenizer" / model.name)
    with pytest.raises(shards.DataError, match="made with another tokenizer"):
        run_prepare(tmp_path, "--merge", "--tokenizer", model)


def test_other_tokenizer_of_the_same_name_is_not_replaced(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(200))
    write_text(tmp_path / "tokenizers" / "x_330_bpe.model", "another model")
    with pytest.raises(shards.DataError, match="x_330_bpe.model exists already"):
        run_prepare(tmp_path, "--train", path, "--val", path, "--vocab-size", 330)


# ---- download ---------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """The little of the hub that downloading needs: paths-info, and resolve with HEAD and ranges."""

    daemon_threads = True

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.repo, self.files = repo, files
        self.served: list[str] = []  # files whose content was sent
        self.damage: dict[str, int] = {}  # how often a file is still to be sent with a wrong byte
        self.broken: set[str] = set()  # files whose next answer breaks off in the middle
        self.ranges: list[int] = []  # where answers began that did not begin at 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class StandInHandler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def do_POST(self) -> None:
        from urllib.parse import parse_qs

        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        assert self.path == f"/api/datasets/{self.server.repo}/paths-info/main"
        rows = [self.describe(path) for path in paths if path in self.server.files]
        self.reply(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def describe(self, path: str) -> dict[str, Any]:
        data = self.server.files[path]
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
        if path.endswith(".bin"):
            row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return row

    def answer(self, send: bool) -> None:
        prefix = f"/datasets/{self.server.repo}/resolve/main/"
        path = self.path.removeprefix(prefix)
        if not self.path.startswith(prefix):
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path not in self.server.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.server.files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(".bin") else git_id(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if send:
            self.server.served.append(path)
            if self.server.damage.get(path):
                self.server.damage[path] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
        if start:
            self.server.ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if send and path in self.server.broken:
            self.server.broken.remove(path)
            self.close_connection = True
            return self.reply(200, data[: len(data) // 2], {**headers, "Content-Length": str(len(data))})
        return self.reply(206 if start else 200, data[start:], headers, send)

    def reply(self, code: int, body: bytes, headers: dict[str, str], send: bool = True) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(body)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def shard_bytes(seed: int, tokens: int = 3000) -> bytes:
    values = np.random.default_rng(seed).integers(3, 320, tokens, dtype=np.uint16)
    values[::100] = 1
    return bytes(shards.shard_header(tokens)) + values.tobytes()


@pytest.fixture
def hub(model: Path) -> Iterator[StandIn]:
    """A repository laid out as the published one: a manifest, two variants, their shards and tokenizers."""
    catalogue = {
        "version": "10B",
        "tokenizers": [
            {
                "name": "sp_bpe_320",
                "model_path": "tokenizers/fineweb_320_bpe.model",
                "vocab_path": "tokenizers/fineweb_320_bpe.vocab",
                "bos_id": 1,
                "vocab_size": 320,
            },
            {"name": "bytes", "path": "tokenizers/pure_byte_260.json", "bos_id": 1, "vocab_size": 260},
        ],
        "datasets": [
            {"name": "fineweb10B_sp320", "tokenizer_name": "sp_bpe_320", "stats": {"files_train": 4, "files_val": 1}},
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
        ],
    }
    files = {
        "datasets/manifest.json": json.dumps(catalogue).encode(),
        "datasets/tokenizers/fineweb_320_bpe.model": model.read_bytes(),
        "datasets/tokenizers/fineweb_320_bpe.vocab": b"the\t-1\n",
        "datasets/tokenizers/pure_byte_260.json": b'{"tokenizer_type": "pure_byte"}\n',
    }
    for number in range(4):
        files[f"datasets/datasets/fineweb10B_sp320/fineweb_train_{number:06d}.bin"] = shard_bytes(number)
    files["datasets/datasets/fineweb10B_sp320/fineweb_val_000000.bin"] = shard_bytes(10)
    for split in ("train", "val"):
        files[f"datasets/datasets/fineweb10B_byte260/fineweb_{split}_000000.bin"] = shard_bytes(20, 500)
    server = StandIn("someone/some-data", files)
    yield server
    server.shutdown()


def fetch(hub: StandIn, out: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    repo = [] if "--repo" in arguments else ["--repo", hub.repo]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "0", **environment}
    return tool("download", "--out", out, *repo, *arguments, **environment)


def test_download_fetches_a_variant_whole(tmp_path: Path, hub: StandIn) -> None:
    done = fetch(hub, tmp_path, "--variant", "sp320", "--train-shards", 2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "datasets" / "fineweb10B_sp320"
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    for name in names:
        assert (folder / name).read_bytes() == hub.files[f"datasets/datasets/fineweb10B_sp320/{name}"]
    manifest = shards.read_manifest(folder)
    assert manifest["splits"]["train"]["tokens"] == 6000 and manifest["splits"]["train"]["documents"] == 60
    assert manifest["splits"]["val"]["tokens"] == 3000
    listing = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names)
    assert manifest["fingerprint"] == hashlib.sha256(listing.encode()).hexdigest()
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2
    assert manifest["tokenizer"]["file"] == "fineweb_320_bpe.model" and manifest["tokenizer"]["lossless"] is True
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == "10B"
    shards.verify_dataset(folder, manifest)
    assert "VOCAB_SIZE=320" in done.stdout and not list((tmp_path / "work").glob("*"))


def test_hub_is_asked_for_many_files_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download, asked = importlib.import_module("download"), list[int]()
    hub = download.Hub("someone/some-data", "root", "main", tmp_path)

    class Api:
        def get_paths_info(self, repo: str, paths: list[str], **_: Any) -> list[Any]:
            asked.append(len(paths))
            return [SimpleNamespace(path=path, size=1, lfs=None, blob_id="") for path in paths]

    monkeypatch.setattr(hub.library, "HfApi", Api)
    targets = {f"datasets/x/{number}.bin": tmp_path / str(number) for number in range(250)}
    assert [file.path for file in hub.describe(targets)] == list(targets) and asked == [100, 100, 50]


def test_download_again_fetches_only_what_is_missing_or_damaged(tmp_path: Path, hub: StandIn) -> None:
    assert fetch(hub, tmp_path, "--variant", "sp320", "--train-shards", 3).returncode == 0
    folder = tmp_path / "datasets" / "fineweb10B_sp320"
    cut, flipped = folder / "fineweb_train_000001.bin", folder / "fineweb_val_000000.bin"
    cut.write_bytes(cut.read_bytes()[:2000])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    small = tmp_path / "tokenizers" / "fineweb_320_bpe.model"  # has git's checksum, not a sha256
    small.write_bytes(small.read_bytes()[:-1] + b"\x7f")
    hub.served.clear()
    done = fetch(hub, tmp_path, "--variant", "sp320", "--train-shards", 2)
    assert done.returncode == 0, done.stderr
    assert {Path(path).name for path in hub.served} == {"manifest.json", cut.name, flipped.name, small.name}
    assert f"{cut} is fetched again: it has 2000 bytes" in done.stdout
    assert f"{flipped} is fetched again: its checksum" in done.stdout
    assert len(shards.read_manifest(folder)["splits"]["train"]["shards"]) == 3, "what was here stays"
    shards.verify_dataset(folder, shards.read_manifest(folder))


def test_download_fetches_a_damaged_answer_once_more(tmp_path: Path, hub: StandIn) -> None:
    path = "datasets/datasets/fineweb10B_sp320/fineweb_train_000000.bin"
    hub.damage[path] = 1
    done = fetch(hub, tmp_path, "--variant", "sp320", "--train-shards", 1)
    assert done.returncode == 0 and hub.served.count(path) == 2, done.stderr
    hub.damage[path] = 2
    done = fetch(hub, tmp_path / "other", "--variant", "sp320", "--train-shards", 1)
    assert done.returncode == 2 and "came damaged twice, its checksum is not the hub's" in done.stderr
    assert not (tmp_path / "other" / path.removeprefix("datasets/")).exists()


def test_download_continues_where_the_connection_broke(tmp_path: Path, hub: StandIn) -> None:
    path = "datasets/datasets/fineweb10B_sp320/fineweb_train_000000.bin"
    hub.files[path] = shard_bytes(0, 12_000_000)  # the library keeps whole chunks of 10 MB of a broken answer
    hub.broken.add(path)
    done = fetch(hub, tmp_path, "--variant", "sp320", "--train-shards", 1)
    assert done.returncode == 0, done.stderr
    assert len(hub.ranges) == 1 and 0 < hub.ranges[0] <= len(hub.files[path]) // 2
    assert (tmp_path / path.removeprefix("datasets/")).read_bytes() == hub.files[path]


def test_download_takes_the_byte_variant(tmp_path: Path, hub: StandIn) -> None:
    done = fetch(hub, tmp_path, "--variant", "byte260", "--train-shards", 1)
    assert done.returncode == 0, done.stderr
    manifest = shards.read_manifest(tmp_path / "datasets" / "fineweb10B_byte260")
    assert manifest["tokenizer"]["kind"] == "byte" and manifest["tokenizer"]["vocab_size"] == 260


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "sp999"], "has no variant 'sp999': known are byte260, sp320"),
        (["--variant", "sp320", "--train-shards", "5"], r"--train-shards 5 is not in [0, 4]"),
        (["--repo", "someone/else"], "has no dataset someone/else"),
        (["--root", "elsewhere"], "has no manifest.json"),
    ],
)
def test_download_says_what_is_wrong(tmp_path: Path, hub: StandIn, arguments: list[str], message: str) -> None:
    done = fetch(hub, tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_download_without_network_says_so(tmp_path: Path, hub: StandIn) -> None:
    done = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.startswith("error: cannot reach http://127.0.0.1")


def test_download_refuses_paths_that_lead_elsewhere(tmp_path: Path) -> None:
    download = importlib.import_module("download")
    for path in ("datasets/../../x", "/etc/x", "other/x"):
        with pytest.raises(shards.DataError, match="expected a file in datasets/ or tokenizers/"):
            download.local_target(tmp_path, path)


def test_download_checks_the_space_first(tmp_path: Path) -> None:
    download = importlib.import_module("download")
    huge = download.RemoteFile("datasets/x/a.bin", tmp_path / "a.bin", 10**18, None, "")
    with pytest.raises(shards.DataError, match="1000000000.0 GB are to be fetched"):
        download.check_space(tmp_path, [huge])


# ---- case folding -----------------------------------------------------------

CASED = [
    "The NASA crew. An A, I'm: iPhone McDONALD",
    "GROSS Straße STRAẞE İstanbul DŽ Dž dž ÉCOLE Ångström Σίσυφος МОСКВА Москва K",
    "marks \x0e\x0f\x10 \x0eA\x0fBC \x100 \x10\x10",
    "  Two  Spaces\n\tTab A",
]
PARTS = st.sampled_from(
    ["a", "B", " ", "Zz", "ß", "ẞ", "İ", "ı", "Dž", "dž", "K", "Å", "ΣΣ", "ς", "\x0e", "\x0f", "\x10", "0"]
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PARTS).map("".join)


@settings(max_examples=1500, deadline=None)
@given(ANY_TEXT)
def test_case_folding_is_lossless(text: str) -> None:
    """And what is folded is as long as the text, its marks aside, and has no capital that could be folded."""
    folded = shards.fold_case(text)
    assert shards.unfold_case(folded) == text
    assert len(folded.encode()) - sum(map(folded.count, shards.MARKS)) == len(text.encode())
    assert not set(folded) & set(shards.LARGE)


def test_case_folding_gives_a_word_the_same_pieces_wherever_it_stands() -> None:
    a, b = shards.CAPITAL, shards.CAPITALS
    assert shards.fold_case("The end. NASA and THE End, iPhone") == (
        f"{a}the end.{b} nasa and{b} the{a} end, i{a}phone"
    )
    assert set("ABCXYZÀÞŽΑΩАЯ") <= set(shards.LARGE) and len(shards.LARGE) == len(set(shards.SMALL))


@pytest.mark.parametrize("tokenizer", [("--tokenizer", "byte"), ("--vocab-size", "400")])
def test_side_cars_hold_the_bytes_of_the_text(tmp_path: Path, tokenizer: tuple[str, str]) -> None:
    train, val = make_texts(60) + CASED, [text.title() for text in make_texts(10, 1)] + CASED
    files = [write_jsonl(tmp_path / f"{split}.jsonl", texts) for split, texts in (("train", train), ("val", val))]
    command = ["--train", files[0], "--val", files[1], "--casefold", "--shard-tokens", "500", *tokenizer]
    folder = run_prepare(tmp_path / "out", *command)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name.endswith("_casefold") and manifest["tokenizer"]["casefold"] is True
    name = manifest["tokenizer"]["file"]
    read = shards.load_tokenizer(shards.CASEFOLD + (str(tmp_path / "out" / "tokenizers" / name) if name else "byte"))
    for split, texts in (("train", train), ("val", val)):
        assert read_documents(folder, split, read) == texts
        whole = b""
        for entry in manifest["splits"][split]["shards"]:
            counts = (folder / entry["file"]).with_suffix(".bytes").read_bytes()
            assert len(counts) == entry["tokens"] and sum(counts) == entry["bytes"]
            whole += counts
        assert sum(whole) == manifest["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert len(manifest["splits"][split]["shards"]) > 1
    assert manifest["fingerprint"] == fingerprint(train + val)
    run_prepare(tmp_path / "out", *command)  # finds itself complete
    side_car = folder / "fineweb_val_000000.bytes"
    side_car.write_bytes(bytes([side_car.read_bytes()[0] ^ 1]) + side_car.read_bytes()[1:])
    with pytest.raises(shards.DataError, match="fineweb_val_000000.bytes"):
        run_prepare(tmp_path / "out", *command)


def test_folded_text_takes_fewer_tokens(tmp_path: Path) -> None:
    """A vocabulary that need not hold words twice."""
    rng = random.Random(3)
    texts = [". ".join(sentence(rng, 12).capitalize() for _ in range(8)) for _ in range(80)]
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    tokens = []
    for fold in ([], ["--casefold"]):
        folder = run_prepare(
            tmp_path / f"out{len(fold)}", "--train", file, "--vocab-size", "330", "--val-fraction", "0.2", *fold
        )
        manifest = json.loads((folder / "manifest.json").read_text())
        tokens.append(manifest["splits"]["train"]["tokens"] / manifest["splits"]["train"]["bytes"])
        assert (list(folder.glob("*.bytes")) == []) == (not fold)
    assert tokens[1] < tokens[0]


def test_parts_of_folded_text_are_merged_alike(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(12, n) + CASED) for n in range(2)]
    whole = run_prepare(tmp_path / "whole", "--train", *files, "--casefold")
    for part in ("1/2", "2/2"):
        prepare.main(
            ["--train", *map(str, files), "--tokenizer", "byte", "--casefold", "--name", "x", "--part", part]
            + ["--out", str(tmp_path / "parts"), "--workers", "1"]
        )
    parts = run_prepare(tmp_path / "parts", "--merge", "--casefold")
    assert contents(parts) == contents(whole)


def test_folding_needs_a_lossless_tokenizer() -> None:
    lossy = shards.ByteTokenizer()
    lossy.lossless = False
    with pytest.raises(shards.DataError, match="lossless"):
        shards.FoldingTokenizer(lossy)
