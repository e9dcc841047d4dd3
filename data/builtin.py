"""A corpus that needs no network: the text that every Python installation carries.

    python data/builtin.py                       # data/datasets/builtin_sp1024, data/tokenizers/builtin_1024_bpe.model
    python data/builtin.py --tokenizer byte      # data/datasets/builtin_byte256

Prose first: the language reference of pydoc, the longer docstrings of each module (cut out of its source, so that
nothing is there twice), the docstrings of what is written in C, the texts that lie beside the sources; then the
sources. Left out: tests, tables, near-duplicates. The split unit is a top-level module or a topic, chosen by a hash of
its name: no unit is on both sides. One Python installation gives the same bytes every time; another version gives
other text, so figures are comparable only under one fingerprint.

Sections: documents, selection, command line. Each uses only those above it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import shards
from shards import DataError, Fingerprint, Progress, SplitWriter, Tokenizer

RECIPE = 1  # raise it when the documents change: a folder of an older recipe is then not taken for complete
NAME = "builtin"
MIN_BYTES = 200  # shorter documents are stubs
VAL_SHARE, VAL_BYTES = 0.05, 300_000
GRAM_WORDS = 13
NEAR_DUPLICATE = 0.5  # share of a document's 13-grams that documents before it have
MAX_OVERLAP = 0.01  # share of validation's 13-grams that train may have
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
MODULES = sys.stdlib_module_names - {"antigravity", "ensurepip", "pydoc_data", "test", "this"}


# ==== DOCUMENTS ==============================================================
# Gives: every document of a standard library folder, prose first, in a fixed order.


@dataclass(frozen=True)
class Document:
    """A text, its name, and the unit that it is split with."""

    name: str
    unit: str
    text: str


def read_documents(folder: Path, with_compiled: bool) -> list[Document]:
    prose: list[Document] = []
    sources: list[Document] = []
    files = stdlib_files(folder)
    progress = Progress("read", len(files), "files", 1)
    for number, path in enumerate(files, 1):
        name, text = path.relative_to(folder).as_posix(), read_text(path)
        if path.suffix == ".py":
            split = split_source(name, text)
            prose += split[:1]
            sources += split[1:]
        else:
            prose.append(Document(name, unit_of(name), text))
        progress.update(number)
    progress.close()
    topics = topic_documents(folder / "pydoc_data" / "topics.py")
    compiled = compiled_documents() if with_compiled else []
    return [document for document in [*topics, *prose, *compiled, *sources] if len(document.text) >= MIN_BYTES]


def stdlib_files(folder: Path) -> list[Path]:
    """Sources and texts of the standard library's own modules, sorted."""
    top = [path for path in folder.glob("*") if path.name.removesuffix(".py") in MODULES]
    found = [path for entry in top for path in [entry, *entry.rglob("*")] if path.suffix in (".py", ".txt", ".rst")]
    found = [path for path in found if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)]
    if not found:
        raise DataError(f"{folder} has no standard library sources: give the folder that has os.py with --source")
    return sorted(path for path in found if path.is_file())


def read_text(path: Path) -> str:
    """The text of a file with plain line ends; nothing where it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unit_of(name: str) -> str:
    """The top-level module. An underscored helper goes with the module that it implements: _pyio with io."""
    top = name.partition("/")[0].partition(".")[0]
    bare = [top.removeprefix(prefix) for prefix in ("_py", "_") if top.startswith(prefix)]
    return next((module for module in bare if module in MODULES), top)


def topic_documents(path: Path) -> Iterator[Document]:
    """The language reference that help() shows: a dict literal in pydoc_data/topics.py."""
    tree = ast.parse(read_text(path) if path.is_file() else "")
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(f"topic {name}", f"topic {name}", text)


def is_table(text: str) -> bool:
    """Whether many lines are rows of literals, as in character maps and entity lists."""
    lines = [line.lstrip() for line in text.split("\n") if line.strip()]
    rows = sum(line.startswith(("'", '"', "0x", "(", "b'", 'b"')) and not line.startswith('"""') for line in lines)
    return rows > 0.4 * len(lines)


def split_source(name: str, text: str) -> list[Document]:
    """A source as two documents, the docstrings of several lines and the code without them; nothing for a table."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates, files for other versions
        return []
    if is_table(text):
        return []
    lines = text.split("\n")
    cut: set[int] = set()
    sections = []
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for title, node in [(module, tree), *definitions(tree, module)]:
        span = docstring_lines(node, lines)
        if span:
            cut.update(span)
            sections.append(f"{title}\n\n{ast.get_docstring(node)}\n")
    code = "\n".join(line for number, line in enumerate(lines, 1) if number not in cut)
    unit = unit_of(name)
    return [Document(f"{name} docstrings", unit, "\n".join(sections)), Document(name, unit, code)]


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Any]]:
    """Classes and functions below a node with the titles that their docstrings get."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{name}.{child.name}({ast.unparse(child.args)})", child
        elif isinstance(child, ast.ClassDef):
            yield f"class {name}.{child.name}", child
        else:
            continue
        yield from definitions(child, f"{name}.{child.name}")


def docstring_lines(node: Any, lines: list[str]) -> range | None:
    """The lines of a docstring that may be cut out: several, alone on their lines, with more code below."""
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return None
    value = node.body[0]
    before = lines[value.lineno - 1].encode()[: value.col_offset]
    behind = lines[value.end_lineno - 1].encode()[value.end_col_offset :]
    if before.strip() or behind.strip() or value.lineno == value.end_lineno:
        return None
    return range(value.lineno, value.end_lineno + 1)


def compiled_documents() -> Iterator[Document]:
    """The docstrings of the modules that are compiled into the interpreter, each text once."""
    seen: set[str] = set()
    for name in sorted(MODULES.intersection(sys.builtin_module_names)):
        module = importlib.import_module(name)
        sections = []
        for title, value in [(name, module), *compiled_members(module, name)]:
            text = value.__doc__  # a descriptor, not a text, where a type's members document its instances
            if isinstance(text, str) and text not in seen:
                seen.add(text)
                sections.append(f"{title}\n\n{inspect.cleandoc(text)}\n")
        yield Document(f"{name} compiled", unit_of(name), "\n".join(sections))


def compiled_members(owner: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Types and routines with their members. Plain values would only repeat their type's docstring."""
    for key, value in sorted(vars(owner).items()):
        if isinstance(value, type) and value.__name__ == key and not inspect.isclass(owner):
            yield f"class {name}.{key}", value
            yield from compiled_members(value, f"{name}.{key}")
        elif inspect.isroutine(value) or inspect.isdatadescriptor(value):
            yield f"{name}.{key}", value


# ==== SELECTION ==============================================================
# Gives: which documents are kept, on which side, in which order; how much validation and train share.


def remove_duplicates(documents: list[Document]) -> list[Document]:
    """Drop a document when half of its 13-grams stand in larger ones; short ones when the same text does."""
    seen: set[int] = set()
    texts: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda document: (-len(document.text), document.name)):
        own = set(grams(document.text).tolist())
        repeated = len(own & seen) > NEAR_DUPLICATE * len(own) if own else document.text in texts
        if not repeated:
            kept.append(document)
            seen |= own
            texts.add(document.text)
    return kept


def grams(text: str) -> np.ndarray:
    """A 64-bit hash of every run of 13 words, uint64; the words are lower-cased runs of letters and digits."""
    words = np.array([word_hash(word) for word in re.findall(r"\w+", text.lower())], dtype=np.uint64)
    count = max(len(words) - GRAM_WORDS + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(GRAM_WORDS):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]  # modulo 2^64
    return total


@cache
def word_hash(word: str) -> int:
    return name_hash(word) >> 192


def name_hash(text: str) -> int:
    """A hash that is the same in every run, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def choose_validation(documents: list[Document]) -> set[str]:
    """Units by the hash of their name up to about 5% of the bytes, topics and modules each in their share."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.unit] = sizes.get(document.unit, 0) + len(document.text.encode())
    total = sum(sizes.values())
    share = max(VAL_SHARE, min(VAL_BYTES / total, 0.2)) if total else 0.0
    chosen: set[str] = set()
    for kind in (True, False):
        units = sorted((unit for unit in sizes if unit.startswith("topic ") == kind), key=name_hash)
        goal, held = share * sum(sizes[unit] for unit in units), 0
        for unit in units:
            if held < goal and held + sizes[unit] <= 1.1 * goal:  # a unit that overshoots is passed over
                chosen.add(unit)
                held += sizes[unit]
    return chosen or {min(sizes, key=lambda unit: (sizes[unit], unit))}


def limit_overlap(train: list[Document], val: list[Document]) -> tuple[list[Document], float]:
    """Drop the validation documents that share most with train until less than 1% of its 13-grams is shared.

    Returns those kept and the share that is left: of all 13-grams in validation, counted as often as they occur.
    """
    known = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), *(grams(document.text) for document in train)]))
    rows = []
    for document in val:
        own = grams(document.text)
        found = known[np.searchsorted(known, own, side="right") - 1] == own  # known begins with 0: never before it
        rows.append((int(found.sum()), len(own), document))
    rows.sort(key=lambda row: (row[0] / max(row[1], 1), row[2].name))
    while len(rows) > 1 and shared_part(rows) >= MAX_OVERLAP:
        rows.pop()
    return [document for _, _, document in rows], shared_part(rows)


def shared_part(rows: list[tuple[int, int, Document]]) -> float:
    return sum(row[0] for row in rows) / max(sum(row[1] for row in rows), 1)


def shuffled(documents: list[Document]) -> list[Document]:
    """A fixed order that knows nothing of the folder's: by a hash of the name."""
    return sorted(documents, key=lambda document: name_hash(f"order 1 {document.name}"))


@dataclass(frozen=True)
class Corpus:
    """The documents of both sides in their final order, and what the selection did."""

    train: list[Document]
    val: list[Document]
    overlap: float
    facts: dict[str, Any]


def build_corpus(folder: Path, with_compiled: bool) -> Corpus:
    found = read_documents(folder, with_compiled)
    kept = remove_duplicates(found)
    units = choose_validation(kept)
    train = [document for document in kept if document.unit not in units]
    candidates = [document for document in kept if document.unit in units]
    val, overlap = limit_overlap(train, candidates)
    if not train or not val or overlap >= MAX_OVERLAP:
        raise DataError(
            f"{folder} gives {len(train)} documents to train on and {len(val)} for validation, {100 * overlap:.1f}% "
            "shared: expected some on both sides that share less than 1%; use another --source"
        )
    facts = {
        "found": len(found),
        "near_duplicates": len(found) - len(kept),
        "dropped_for_overlap": len(candidates) - len(val),
        "val_units": sorted({document.unit for document in val}),
    }
    return Corpus(shuffled(train), shuffled(val), overlap, facts)


# ==== COMMAND LINE ===========================================================


def make_tokenizer(args: argparse.Namespace, corpus: Corpus) -> Tokenizer:
    """The byte tokenizer, or a model trained on the train part alone."""
    if args.vocab_size == 256:
        return shards.ByteTokenizer()
    path = args.out / "tokenizers" / f"{NAME}_{args.vocab_size}_bpe.model"
    start = time.monotonic()
    shards.train_sentencepiece([document.text for document in corpus.train], args.vocab_size, path)
    print(f"tokenizer: {args.vocab_size} pieces learned in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return shards.load_tokenizer(path)


def write_split(folder: Path, split: str, documents: list[Document], tokenizer: Tokenizer, print_: Fingerprint) -> Any:
    writer = SplitWriter(folder, split, tokenizer)
    progress, done = Progress(f"encode {split}", sum(len(document.text) for document in documents)), 0
    for document in documents:
        encoded, tokens = document.text.encode(), tokenizer.encode(document.text)
        if tokenizer.decode(tokens) != encoded:
            raise DataError(f"the tokenizer does not give {document.name} back: report this with your Python version")
        print_.add(encoded)
        writer.add(np.concatenate([np.array([tokenizer.bos_id], dtype=np.uint16), tokens]), 1, len(encoded))
        done += len(document.text)
        progress.update(done)
    progress.close()
    return writer.close()


def describe_source(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bytes of this build: cheap to find, so that a complete folder is known at once."""
    listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in stdlib_files(folder)]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return {"tool": NAME, "recipe": RECIPE, "python": python, "files_sha256": digest, "vocab_size": args.vocab_size}


def is_complete(folder: Path, source: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether this corpus is there already; one of another Python is kept and named; --overwrite builds it anew."""
    manifest = shards.read_manifest(folder)
    if manifest is None:
        return False
    if args.overwrite:
        (folder / shards.MANIFEST).unlink()
        return False
    if any(manifest["source"].get(key) != value for key, value in source.items()):
        print(
            f"note: {shards.shown(folder)} was made by {manifest['source'].get('python')} from other files or by "
            f"another recipe (now {source['python']}); it is kept, --overwrite builds it anew"
        )
    shards.verify_dataset(folder, manifest)
    shards.check_tokenizer(args.out, manifest)
    print(f"{shards.shown(folder)} is complete, its shards are verified")
    shards.print_summary(folder, manifest, args.out)
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenizer and token shards from the texts of this Python.")
    add = parser.add_argument
    add("--out", type=Path, default=shards.DATA_FOLDER, help="where datasets/ and tokenizers/ are")
    add("--vocab-size", type=int, default=1024, help="pieces of the BPE tokenizer; 256 means bytes")
    add("--tokenizer", choices=("bpe", "byte"), default="bpe", help="byte is --vocab-size 256")
    add("--source", type=Path, help="another standard library folder than this interpreter's")
    add("--overwrite", action="store_true", help="build anew what is there")
    return parser


def run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    args.vocab_size = 256 if args.tokenizer == "byte" else args.vocab_size
    folder = args.source or Path(sysconfig.get_paths()["stdlib"])
    target = args.out / "datasets" / (f"{NAME}_byte256" if args.vocab_size == 256 else f"{NAME}_sp{args.vocab_size}")
    source = describe_source(folder, args)
    if is_complete(target, source, args):
        return
    corpus = build_corpus(folder, with_compiled=args.source is None)
    tokenizer, fingerprint = make_tokenizer(args, corpus), Fingerprint()
    parts = {"train": corpus.train, "val": corpus.val}
    splits = {split: write_split(target, split, parts[split], tokenizer, fingerprint) for split in shards.SPLITS}
    source |= corpus.facts
    manifest = shards.make_manifest(NAME, fingerprint, tokenizer, splits, corpus.overlap, source)
    shards.finish_dataset(target, manifest)
    shards.print_summary(target, manifest, args.out)
    print(f"built in {time.monotonic() - start:.1f} s", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    run(build_parser().parse_args(arguments))


if __name__ == "__main__":
    shards.run_tool(main)
