"""Any .txt, .jsonl or .parquet text to a tokenizer and token shards: streaming, parallel, resumable, byte-exact.

    python data/prepare.py --train books/ web.jsonl.zst --val-fraction 0.01 --vocab-size 1024 --name mine
    python data/prepare.py --train train.jsonl.xz --val val.jsonl.xz --tokenizer fineweb_1024_bpe.model --name dev

The input is cut into blocks of whole documents. Encoding a block writes one file to OUT/work/<dataset>/, so a killed
run continues and n machines can share the blocks (--part i/n). Merging joins the blocks in input order into shards and
a manifest. What is in a block depends on the input alone: workers, parts and kills leave the final bytes as they are.

Sections: files, records, encoding, job, tokenizer, merging, command line. Each uses only those above it.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shards
from shards import DataError, Fingerprint, Progress, SplitWriter, Tokenizer, load_tokenizer

BLOCK_BYTES = 4 << 20  # about a second of work: little is lost by a kill, and per-block costs do not show
TOKENIZER_BYTES = 64_000_000  # more text hardly changes which pieces are the most frequent
GROUP_FILES = 1024  # neighbouring .txt files that are read as one source
NAMED = 100  # skipped documents and input files that the manifest names one by one
TEXT_PROBLEMS = (ValueError, RecursionError)  # what decoding a document raises; JSON nested too deep recurses


# ==== FILES ==================================================================
# Gives: the input as a list of sources; byte streams that decompress and count.

COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = {".jsonl": "jsonl", ".txt": "txt", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file to read. The label is its path below the argument that named it, the same on every machine."""

    path: Path
    label: str
    size: int


@dataclass(frozen=True)
class Source:
    """What is read in one go: a .jsonl or .parquet file, a .txt file of many documents, or a run of .txt files."""

    index: int
    kind: str
    split: str  # "train", "val", or "hash": each document by its own hash
    files: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def where(self, place: int) -> str:
        """A record's place as the user can look it up."""
        if self.kind == "txt":
            return str(self.files[place].path)
        return f"{self.files[0].path}: row {place}" if self.kind == "parquet" else f"{self.files[0].path}:{place}"


def kind_of(path: Path) -> str | None:
    bare = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return KINDS.get(bare.suffix)


def find_files(arguments: list[Path]) -> list[InputFile]:
    """The files that the arguments name, folders in sorted order. Files of other kinds in a folder are named."""
    found, others = [], []
    for argument in arguments:
        if not argument.exists():
            raise DataError(f"{argument} not found: --train and --val take files and folders")
        base = argument if argument.is_dir() else argument.parent
        inside = sorted(path for path in argument.rglob("*") if path.is_file()) if argument.is_dir() else [argument]
        for path in inside:
            if kind_of(path):
                found.append(InputFile(path, path.relative_to(base).as_posix(), path.stat().st_size))
            elif argument.is_dir():
                others.append(str(path))
            else:
                expected = f"{', '.join(KINDS)}, each plain or with {', '.join(COMPRESSIONS)}"
                raise DataError(f"{path} is of no known kind: expected {expected}")
    if others:
        print(f"not read, {len(others)} files of other kinds: {', '.join(others[:5])}", file=sys.stderr)
    return found


def make_sources(files: list[InputFile], split: str, txt_split: str) -> list[Source]:
    """Sources in input order, not numbered yet. Neighbouring .txt files of one document each share a source."""
    sources: list[Source] = []
    for file in files:
        kind = kind_of(file.path) or ""
        if kind == "txt" and txt_split == "blank":
            kind = "txt-blank"
        last = sources[-1] if sources else None
        if kind == "txt" and last and last.kind == "txt" and len(last.files) < GROUP_FILES:
            sources[-1] = Source(0, kind, split, (*last.files, file))
        else:
            sources.append(Source(0, kind, split, (file,)))
    return sources


class Meter:
    """How many bytes of the input files were read."""

    def __init__(self) -> None:
        self.consumed = 0


class InputStream(io.RawIOBase):
    """The bytes of a file, decompressed by its ending, metered as they lie on disk.

    One reader for gzip, xz and zstd, because the libraries' own differ in what they let pass: zstandard's stream ends
    quietly where a file was cut, and lzma's ignores whatever stands behind the first xz stream.
    """

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path, self.meter, self.file = path, meter, io.FileIO(path)
        self.make = DECOMPRESSORS.get(path.suffix)
        self.member: Any = None  # the decompressor at work, None between the members of a file
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.ready and (piece := self.file.read(1 << 16)):
            self.meter.consumed += len(piece)
            self.ready = memoryview(self._decompress(piece, self.make) if self.make else piece)
        if not self.ready and self.member is not None:
            raise DataError(f"{self.path} ends in the middle of its compressed data: it was cut short, get it again")
        size = min(len(buffer), len(self.ready))
        buffer[:size] = self.ready[:size]
        self.ready = self.ready[size:]
        return size

    def _decompress(self, piece: bytes, make: Callable[[], Any]) -> bytes:
        """What a piece of the file gives, across the ends of members (files may be joined with cat)."""
        out = []
        try:
            while piece := piece if self.member else piece.lstrip(b"\0"):  # zeros may pad the space between members
                self.member = self.member or make()
                out.append(self.member.decompress(piece))
                piece = self.member.unused_data if self.member.eof else b""
                self.member = None if self.member.eof else self.member
        except decompression_errors() as error:
            raise DataError(f"{self.path} is damaged ({error}): get it again") from error
        return b"".join(out)


def open_zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("reading .zst needs zstandard: pip install zstandard") from error
    return zstandard.ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".zst": open_zstd,
}


def decompression_errors() -> tuple[type[Exception], ...]:
    zstandard = sys.modules.get("zstandard")  # optional: its error class exists only once it was loaded
    return (zlib.error, lzma.LZMAError, zstandard.ZstdError) if zstandard else (zlib.error, lzma.LZMAError)


# ==== RECORDS ================================================================
# Gives: the raw documents of a source with their places, cut into blocks; the text of a raw document.

Record = tuple[int, Any]  # a place (line, row, or number of the file) and the raw document


def read_records(source: Source, text_field: str, meter: Meter) -> Iterator[Record]:
    """The records of a source in order. Memory holds one record, whatever the size of the file."""
    if source.kind == "parquet":
        yield from read_rows(source.files[0], text_field, meter)
        return
    for number, file in enumerate(source.files):
        with io.BufferedReader(InputStream(file.path, meter), 1 << 18) as stream:
            if source.kind == "txt":
                yield number, stream.read()
            elif source.kind == "jsonl":
                yield from ((line, content) for line, content in enumerate(stream, 1) if not content.isspace())
            else:
                yield from read_paragraphs(stream)


def read_paragraphs(stream: Iterable[bytes]) -> Iterator[Record]:
    """Documents between blank lines; each keeps its line ends, the blank lines belong to none."""
    first = 0
    lines: list[bytes] = []
    for line, content in enumerate(stream, 1):
        if not content.isspace():
            first = first if lines else line
            lines.append(content)
        elif lines:
            yield first, b"".join(lines)
            lines = []
    if lines:
        yield first, b"".join(lines)


def read_rows(file: InputFile, text_field: str, meter: Meter) -> Iterator[Record]:
    """The values of a parquet file's text column, a few rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading .parquet needs pyarrow: pip install pyarrow") from error
    start, row = meter.consumed, 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        check_column(file.path, table.schema_arrow, text_field)
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():  # as bytes: UTF-8 is checked later
                row += 1
                yield row, value
            meter.consumed = start + file.size * row // table.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is not a readable parquet file ({error}): get it again") from error
    meter.consumed = start + file.size


def check_column(path: Path, schema: Any, text_field: str) -> None:
    if text_field not in schema.names:
        raise DataError(f"{path} has no column {text_field!r}, it has {', '.join(schema.names)}: set --text-field")
    kind = str(schema.field(text_field).type)
    if not re.fullmatch("(large_)?(string|binary)", kind):
        raise DataError(f"{path}: the column {text_field!r} holds {kind}, expected string: set --text-field")


def cut_blocks(records: Iterable[Record], block_bytes: int) -> Iterator[list[Record]]:
    """Runs of whole records of at least block_bytes: a function of the input alone."""
    block: list[Record] = []
    size = 0
    for record in records:
        block.append(record)
        size += len(record[1]) if isinstance(record[1], (bytes, str)) else 0
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def record_text(kind: str, raw: Any, text_field: str) -> tuple[str, bytes]:
    """A raw document as text and as UTF-8. Raises ValueError with what was found and what was expected."""
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    if kind == "jsonl":
        text = json_field(text.removeprefix("\ufeff"), text_field)
    if not isinstance(text, str):
        raise ValueError(f"{text_field!r} is {type(text).__name__}, expected text")
    return text, text.encode("utf-8")


def bad_document(source: Source, place: int, error: Exception, skip_bad: bool) -> str:
    """Name a document that cannot be used; it is an error unless such documents are to be left out."""
    problem = f"{source.where(place)}: {error}"
    if not skip_bad:
        raise DataError(f"{problem}; mend it, or use --skip-bad to leave such documents out") from error
    return problem


def json_field(line: str, text_field: str) -> Any:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object with the field {text_field!r}")
    if text_field not in value:
        raise ValueError(f"no field {text_field!r}, it has {', '.join(map(repr, value)) or 'none'}: set --text-field")
    return value[text_field]


def digest_of(text: bytes) -> bytes:
    """A document's identity: for exact duplicates, the hash split and the tokenizer's sample."""
    return hashlib.blake2b(text, digest_size=16).digest()


def is_validation(split: str, digest: bytes, val_fraction: float) -> bool:
    return split == "val" or (split == "hash" and int.from_bytes(digest[:8], "big") < val_fraction * 2**64)


# ==== ENCODING ===============================================================
# Gives: a block of records as one file of tokens, texts and counts. Knows nothing of other blocks.


@dataclass(frozen=True)
class Recipe:
    """What a worker must know, beside the records, to encode a block."""

    text_field: str
    val_fraction: float
    skip_bad: bool
    tokenizer: str  # "byte" or a path, behind shards.CASEFOLD where text is folded
    casefold: bool = False


@dataclass(frozen=True)
class BlockTask:
    """A block to encode, and where to write it."""

    path: Path
    source: Source
    records: list[Record]
    recipe: Recipe
    position: int  # bytes of the whole input that were read when the block was cut


@dataclass(frozen=True)
class BlockReport:
    """What became of a block."""

    position: int
    text_bytes: int
    tokens: int


@lru_cache(maxsize=1)
def worker_tokenizer(spec: str) -> Tokenizer:
    """Each worker loads its tokenizer once."""
    return load_tokenizer(spec)


@dataclass
class BlockDocuments:
    """The documents of a block, as lists that grow together."""

    tokens: list[np.ndarray]
    texts: list[bytes]
    digests: list[bytes]
    validation: list[bool]
    skipped: list[str]

    def add(self, text: str, encoded: bytes, tokenizer: Tokenizer, task: BlockTask) -> None:
        tokens = tokenizer.encode(text)
        if tokenizer.lossless and tokenizer.decode(tokens) != encoded:
            raise ValueError("the tokenizer does not give this text back")
        digest = digest_of(encoded)
        self.tokens += [np.array([tokenizer.bos_id], dtype=np.uint16), tokens]
        self.texts.append(encoded)
        self.digests.append(digest)
        self.validation.append(is_validation(task.source.split, digest, task.recipe.val_fraction))


def encode_block(task: BlockTask) -> BlockReport:
    """Encode a block and write its file. A document that cannot be used is an error, or is named in the file."""
    tokenizer, recipe = worker_tokenizer(task.recipe.tokenizer), task.recipe
    documents = BlockDocuments([], [], [], [], [])
    for place, raw in task.records:
        try:
            text, encoded = record_text(task.source.kind, raw, recipe.text_field)
            documents.add(text, encoded, tokenizer, task)
        except TEXT_PROBLEMS as error:
            documents.skipped.append(bad_document(task.source, place, error, recipe.skip_bad))
    write_block(task.path, documents, tokenizer)
    return BlockReport(task.position, sum(map(len, documents.texts)), sum(map(len, documents.tokens)))


def write_block(path: Path, documents: BlockDocuments, tokenizer: Tokenizer) -> None:
    """One .npz file. The texts are kept, framed as the fingerprint wants them: it runs over the final order."""
    lengths = [len(tokens) for tokens in documents.tokens]
    frames = zlib.compress(b"".join(map(shards.frame, documents.texts)), 1)
    file = io.BytesIO()
    np.savez(
        file,
        tokens=np.concatenate([np.empty(0, dtype=np.uint16), *documents.tokens]),
        token_counts=np.array(lengths[1::2], dtype=np.int64) + 1,
        byte_counts=np.array([len(text) for text in documents.texts], dtype=np.int64),
        digests=np.frombuffer(b"".join(documents.digests), dtype=">u8").reshape(-1, 2),
        validation=np.array(documents.validation, dtype=bool),
        frames=np.frombuffer(frames, dtype=np.uint8),
        skipped=np.frombuffer(json.dumps(documents.skipped).encode(), dtype=np.uint8),
        tokenizer=np.frombuffer(json.dumps(tokenizer.describe()["sha256"]).encode(), dtype=np.uint8),
    )
    shards.atomic_write(path, [file.getbuffer()])


def encode_blocks(tasks: Iterable[BlockTask], workers: int) -> Iterator[BlockReport]:
    """Reports in task order. At most two blocks a worker wait, so memory does not grow with the input."""
    if workers == 1:
        yield from map(encode_block, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker)
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(encode_block, task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory): run the same command again to continue, "
            "with fewer --workers or a smaller --block-bytes if memory was short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave interrupts to the main process, and end with it: when it is killed, idle workers would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ==== JOB ====================================================================
# Gives: what a run is about, the folder where its blocks lie, which of them are done, whose they are.


@dataclass(frozen=True)
class Part:
    """Machine i of n. With many sources each machine reads its own; with few, all read all and share the blocks."""

    number: int = 0
    parts: int = 1
    by_source: bool = False

    def owns(self, source: int, block: int) -> bool:
        return (source if self.by_source else source + block) % self.parts == self.number

    def reads(self, source: int) -> bool:
        return not self.by_source or self.owns(source, 0)


@dataclass(frozen=True)
class Job:
    """A corpus to be encoded: its sources, its recipe, and its work folder."""

    folder: Path
    sources: list[Source]
    recipe: Recipe
    block_bytes: int

    def block_path(self, source: int, block: int) -> Path:
        return block_path(self.folder, source, block)

    def finished(self, source: Source, part: Part) -> bool:
        """Whether the source was read to its end and all its blocks of this part are there."""
        blocks = blocks_of(self.folder, source.index)
        owned = [block for block in range(blocks or 0) if part.owns(source.index, block)]
        return blocks is not None and all(self.block_path(source.index, block).is_file() for block in owned)

    def tasks(self, part: Part, progress: Progress) -> Iterator[BlockTask]:
        """The blocks of this part that are not done yet. Reading is cheap, so done blocks are read over."""
        before = 0
        for source in filter(lambda source: part.reads(source.index), self.sources):
            meter = Meter()
            if self.finished(source, part):
                progress.skip(before + source.size)
            else:
                yield from self._source_tasks(source, part, progress, meter, before)
            before += source.size

    def _source_tasks(
        self, source: Source, part: Part, progress: Progress, meter: Meter, before: int
    ) -> Iterator[BlockTask]:
        records = read_records(source, self.recipe.text_field, meter)
        blocks = 0
        for blocks, block in enumerate(cut_blocks(records, self.block_bytes), 1):
            path = self.block_path(source.index, blocks - 1)
            if path.is_file():
                progress.skip(before + meter.consumed)
            elif part.owns(source.index, blocks - 1):
                yield BlockTask(path, source, block, self.recipe, before + meter.consumed)
        shards.write_json(end_path(self.folder, source.index), {"blocks": blocks})


def block_path(folder: Path, source: int, block: int) -> Path:
    return folder / f"{source:06d}-{block:06d}.npz"


def end_path(folder: Path, source: int) -> Path:
    return folder / f"{source:06d}-end.json"


def blocks_of(folder: Path, source: int) -> int | None:
    """How many blocks a source has, None while it was not read to its end."""
    end = shards.read_json(end_path(folder, source))
    return None if end is None else int(end["blocks"])


def describe_inputs(sources: list[Source]) -> dict[str, Any]:
    """Which files a job reads: labels, sizes, and the first bytes of each, so that a changed file is noticed."""
    digest = hashlib.sha256()
    for source in sources:
        for file in source.files:
            with open(file.path, "rb") as stream:
                head = hashlib.sha256(stream.read(1 << 16)).hexdigest()
            digest.update(f"{source.split} {file.label} {file.size} {head}\n".encode())
    labels = [(file.label, source.split) for source in sources for file in source.files]
    return {
        "files": len(labels),
        "bytes": sum(source.size for source in sources),
        "sha256": digest.hexdigest(),
        "names": [f"{split} {label}" for label, split in labels[:NAMED]],
    }


def claim_folder(folder: Path, identity: dict[str, Any], sources: int, overwrite: bool) -> dict[str, Any]:
    """Make the work folder this job's; work of another job there is an error, or is dropped by --overwrite."""
    job = {"identity": identity, "sources": sources}
    known = shards.read_json(folder / "job.json")
    if known and known["identity"] != identity:
        if not overwrite:
            key = next(key for key in identity if known["identity"].get(key) != identity[key])
            raise DataError(
                f"{folder} holds unfinished work of another job ({key}: {brief(known['identity'].get(key))}, now "
                f"{brief(identity[key])}): finish that one, choose another --name, or drop it with --overwrite"
            )
        shutil.rmtree(folder)
    shards.write_json(folder / "job.json", job)
    return job


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def encode(job: Job, part: Part, workers: int) -> None:
    """Encode all blocks of a part that are not there yet."""
    total = sum(source.size for source in job.sources if part.reads(source.index))
    progress, start = Progress("encode", total), time.monotonic()
    text_bytes = tokens = 0
    for report in encode_blocks(job.tasks(part, progress), workers):
        text_bytes, tokens = text_bytes + report.text_bytes, tokens + report.tokens
        seconds = time.monotonic() - start
        speed = f"{text_bytes / seconds / 1e6:.1f} MB of text/s, {tokens / seconds / 1e6:.2f} M tokens/s"
        progress.update(report.position, speed)
    seconds = max(time.monotonic() - start, 1e-9)
    progress.close(f"{text_bytes / seconds / 1e6:.1f} MB of text/s, {tokens / seconds / 1e6:.2f} M tokens/s")


# ==== TOKENIZER ==============================================================
# Gives: the tokenizer of a job in its work folder: given, or trained on a sample of the train part.


def train_tokenizer(sources: list[Source], recipe: Recipe, vocab_size: int, limit: int, path: Path) -> None:
    texts = sample_texts(sources, recipe, limit)
    texts = [shards.fold_case(text) for text in texts] if recipe.casefold else texts
    size = sum(map(len, texts))
    print(f"tokenizer: learning {vocab_size} pieces from {len(texts):,} documents, {size / 1e6:.1f} M characters")
    shards.train_sentencepiece(texts, vocab_size, path)


def sample_texts(sources: list[Source], recipe: Recipe, limit: int) -> list[str]:
    """The train documents with the smallest hashes, as many as fit into limit bytes.

    So the sample is uniform over the input and memory is bounded. Once a hash was turned away, larger ones are too.
    """
    heap: list[tuple[int, int, str]] = []  # minus the hash, so that the largest is on top; size; text
    held, ceiling = 0, 1 << 128
    for text, encoded in train_documents(sources, recipe):
        key = int.from_bytes(digest_of(encoded), "big")
        if key >= ceiling:
            continue
        heapq.heappush(heap, (-key, len(encoded), text))
        held += len(encoded)
        while held > limit and len(heap) > 1:
            smallest, size, _ = heapq.heappop(heap)
            held, ceiling = held - size, -smallest
    return [text for _, _, text in sorted(heap, reverse=True)]


def train_documents(sources: list[Source], recipe: Recipe) -> Iterator[tuple[str, bytes]]:
    """The train part's documents in input order."""
    readable = [source for source in sources if source.split != "val"]
    progress = Progress("tokenizer sample", sum(source.size for source in readable))
    before = 0
    for source in readable:
        meter = Meter()
        for place, raw in read_records(source, recipe.text_field, meter):
            progress.update(before + meter.consumed)
            try:
                text, encoded = record_text(source.kind, raw, recipe.text_field)
            except TEXT_PROBLEMS as error:
                bad_document(source, place, error, recipe.skip_bad)
                continue
            if not is_validation(source.split, digest_of(encoded), recipe.val_fraction):
                yield text, encoded
        before += source.size
    progress.close()


# ==== MERGING ================================================================
# Gives: the shards and the manifest, from the blocks of all parts. Needs the work folder, not the input.


class Block:
    """What merging keeps of a block in memory: some 50 bytes a document. Tokens and texts stay in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = self.load("token_counts", "byte_counts", "digests", "validation", "skipped", "tokenizer")
        self.token_counts, self.byte_counts, self.digests, self.validation = arrays[:4]
        self.skipped, self.tokenizer = (json.loads(array.tobytes()) for array in arrays[4:])
        self.keep = np.ones(len(self.validation), dtype=bool)

    def load(self, *names: str) -> list[np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return [file[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path} is damaged ({error}): delete it and run again") from error

    def chosen(self, split: str) -> np.ndarray:
        return self.keep & (self.validation == (split == "val"))


def load_blocks(folder: Path, sources: int, tokenizer: Tokenizer) -> list[Block]:
    """All blocks of a job in input order; an error when some are missing or were made with another tokenizer."""
    counts = [blocks_of(folder, source) for source in range(sources)]
    unread = sum(count is None for count in counts)
    paths = [block_path(folder, source, block) for source, count in enumerate(counts) for block in range(count or 0)]
    missing = [path.name for path in paths if not path.is_file()]
    if unread or missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(paths)} blocks and {unread} of {sources} inputs were not read to "
            "their end: run the parts that are left (or the command without --part), or copy their work folders here"
        )
    blocks, checksum = [Block(path) for path in paths], tokenizer.describe()["sha256"]
    for block in blocks:
        if block.tokenizer != checksum:
            raise DataError(
                f"{block.path} was made with another tokenizer than the one in {folder}: train it once and give it to "
                "all parts with --tokenizer"
            )
    return blocks


def mark_duplicates(blocks: list[Block], drop: bool) -> dict[str, Any]:
    """Count exact duplicates and, when asked, drop all but one of each: validation's first, else the first in order."""
    digests = np.concatenate([np.empty((0, 2), dtype=np.uint64), *(block.digests for block in blocks)])
    train = np.concatenate([np.empty(0, dtype=bool), *(~block.validation for block in blocks)])
    order = np.lexsort((np.arange(len(train)), train, digests[:, 1], digests[:, 0]))
    ranked = digests[order]
    head = np.ones(len(order), dtype=bool)
    head[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    leader = order[np.maximum.accumulate(np.where(head, np.arange(len(order)), 0))]
    leaked = train[order] & ~train[leader]
    keep = np.ones(len(order), dtype=bool)
    keep[order] = head
    edges = np.cumsum([len(block.keep) for block in blocks])[:-1]
    for block, part in zip(blocks, np.split(keep, edges) if blocks else [], strict=True):
        block.keep = part if drop else block.keep
    return {"documents": int((~head).sum()), "train_documents_in_val": int(leaked.sum()), "dropped": drop}


def check_splits(blocks: list[Block]) -> None:
    """Both splits must hold something."""
    documents = {split: sum(int(block.chosen(split).sum()) for block in blocks) for split in shards.SPLITS}
    if not documents["train"]:
        raise DataError(f"no documents to train on, {documents['val']} for validation: give more text with --train")
    if not documents["val"]:
        raise DataError(
            f"no documents for validation, {documents['train']} to train on: give --val FILE or a larger --val-fraction"
        )


def merge_split(split: str, blocks: list[Block], writer: SplitWriter, fingerprint: Fingerprint) -> dict[str, Any]:
    """Stream one split's documents through the shard writer and the fingerprint."""
    chosen = [block.chosen(split) for block in blocks]
    counts = [int(block.token_counts[mask].sum()) for block, mask in zip(blocks, chosen, strict=True)]
    progress, done = Progress(f"merge {split}", sum(counts), "M tokens"), 0
    for block, mask, count in zip(blocks, chosen, counts, strict=True):
        if mask.any():
            tokens, packed = block.load("tokens", "frames")
            frames = np.frombuffer(zlib.decompress(packed.tobytes()), dtype=np.uint8)
            fingerprint.add_frames(frames[np.repeat(mask, block.byte_counts + shards.FRAME_HEAD)].tobytes())
            writer.add(tokens[np.repeat(mask, block.token_counts)], int(mask.sum()), int(block.byte_counts[mask].sum()))
        done += count
        progress.update(done)
    progress.close()
    return writer.close()


@dataclass(frozen=True)
class Output:
    """Where a dataset goes and how it is cut."""

    out: Path
    name: str
    dataset: str
    shard_tokens: int
    dedup: bool

    @property
    def folder(self) -> Path:
        return self.out / "datasets" / self.dataset

    @property
    def work(self) -> Path:
        return self.out / "work" / self.dataset


def merge(output: Output, known: dict[str, Any], tokenizer_spec: str) -> None:
    """Join the blocks of the work folder into the dataset, and remove the work folder. `known` is its job.json."""
    tokenizer = load_tokenizer(tokenizer_spec)
    blocks = load_blocks(output.work, known["sources"], tokenizer)
    duplicates = mark_duplicates(blocks, output.dedup)
    check_splits(blocks)
    fingerprint, splits, decoded = Fingerprint(), {}, {}
    for split in shards.SPLITS:
        writer = SplitWriter(output.folder, split, tokenizer, output.shard_tokens)
        splits[split] = merge_split(split, blocks, writer, fingerprint)
        decoded[split] = writer.decoded_bytes
    skipped = [problem for block in blocks for problem in block.skipped]
    source = {
        "tool": "prepare",
        "job": job_signature(known["identity"], output),
        **known["identity"],
        "exact_duplicates": duplicates,
        "skipped": {"documents": len(skipped), "named": skipped[:NAMED]},
        "decoded_bytes": decoded,
    }
    place_dataset(output, tokenizer, shards.make_manifest(output.name, fingerprint, tokenizer, splits, None, source))
    print_remarks(duplicates, skipped)
    shutil.rmtree(output.work)


def place_dataset(output: Output, tokenizer: Tokenizer, manifest: dict[str, Any]) -> None:
    shards.place_tokenizer(tokenizer, output.out)
    shards.finish_dataset(output.folder, manifest)
    shards.print_summary(output.folder, manifest, output.out)


def print_remarks(duplicates: dict[str, Any], skipped: list[str]) -> None:
    """What a user should know of the input: duplicates, and documents that were left out."""
    if duplicates["documents"]:
        done = "dropped" if duplicates["dropped"] else "kept, --dedup drops them"
        leaked = duplicates["train_documents_in_val"]
        print(f"exact duplicates: {duplicates['documents']:,} ({leaked:,} in train of validation documents), {done}")
    for problem in skipped[:10]:
        print(f"skipped: {problem}")
    if len(skipped) > 10:
        print(f"skipped: {len(skipped) - 10:,} more; the manifest names {min(len(skipped), NAMED)}")


def job_signature(identity: dict[str, Any], output: Output) -> str:
    """What a complete dataset was made from; the same command again finds it done."""
    whole = {"identity": identity, "shard_tokens": output.shard_tokens, "dedup": output.dedup}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


# ==== COMMAND LINE ===========================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Text files to a tokenizer and token shards.")
    add = parser.add_argument
    add("--train", nargs="+", type=Path, default=[], metavar="PATH", help="files and folders of training text")
    add("--val", nargs="+", type=Path, default=[], metavar="PATH", help="files and folders of validation text")
    add("--val-fraction", type=float, help="without --val: share of the documents, by hash of the text (default 0.01)")
    add("--name", required=True, help="name of the corpus; the folder is NAME_spVOCAB or NAME_byte256")
    add("--out", type=Path, default=shards.DATA_FOLDER, help="where datasets/, tokenizers/ and work/ are")
    add("--tokenizer", help="a sentencepiece .model file, or byte")
    add("--vocab-size", type=int, help="train a lossless BPE tokenizer of this size on the train part")
    add("--tokenizer-bytes", type=int, default=TOKENIZER_BYTES, help="text that the tokenizer is trained on, at most")
    add("--text-field", default="text", help="field of .jsonl objects, column of .parquet files")
    add("--txt-split", choices=("file", "blank"), default="file", help="a .txt document: the file, or between blanks")
    add("--shard-tokens", type=int, default=shards.SHARD_TOKENS, help="tokens in a shard")
    add("--block-bytes", type=int, default=BLOCK_BYTES, help="text in a block, the unit of work and of resuming")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that encode")
    add("--casefold", action="store_true", help="fold capitals before tokenization, losslessly; bytes stay the text's")
    add("--dedup", action="store_true", help="drop exact duplicates, in train also those of validation documents")
    add("--skip-bad", action="store_true", help="leave out documents that cannot be read, and name them")
    add("--part", metavar="I/N", help="encode only the Ith of N parts; needs --merge once all are done")
    add("--merge", action="store_true", help="only join the parts in OUT/work into the dataset")
    add("--overwrite", action="store_true", help="replace a dataset of this name, drop unfinished work of other jobs")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    problems = [
        (not re.fullmatch(r"[A-Za-z0-9._-]+", args.name), f"--name {args.name!r} is not letters, digits, . _ -"),
        (not args.train and not args.merge, "no input: give --train PATH"),
        (bool(args.val) and args.val_fraction is not None, "--val and --val-fraction are both set: choose one"),
        (not 0 <= (args.val_fraction or 0) < 1, f"--val-fraction {args.val_fraction} is not in [0, 1)"),
        (
            (args.tokenizer is None) == (args.vocab_size is None),
            "give either --tokenizer FILE|byte or --vocab-size N (to train one)",
        ),
        (not 1 <= args.shard_tokens < 2**31, f"--shard-tokens {args.shard_tokens} is not in [1, 2^31)"),
        (min(args.workers, args.block_bytes, args.tokenizer_bytes) < 1, "--workers and byte counts must be at least 1"),
        (bool(args.part) and args.merge, "--part and --merge are both set: merge when all parts are done"),
    ]
    for wrong, message in problems:
        if wrong:
            raise DataError(message)


def parse_part(text: str | None, sources: int) -> Part:
    if text is None:
        return Part()
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--part {text!r} is not I/N with 1 <= I <= N, for example 2/4")
    return Part(int(match[1]) - 1, int(match[2]), by_source=sources >= 4 * int(match[2]))


def find_tokenizer(args: argparse.Namespace) -> str:
    """The given tokenizer: byte, a path, or the name of a model in OUT/tokenizers."""
    path = Path(args.tokenizer)
    known = args.out / "tokenizers" / path.name
    if args.tokenizer == "byte" or path.is_file() or not known.is_file():
        return str(args.tokenizer)
    return str(known)


def prepare_tokenizer(args: argparse.Namespace, output: Output, sources: list[Source], recipe: Recipe) -> str:
    """The job's tokenizer, kept with its blocks, so that a resumed run and a merge use the same one."""
    prefix = shards.CASEFOLD * recipe.casefold
    if args.tokenizer == "byte":
        return prefix + "byte"
    given = Path(find_tokenizer(args)) if args.tokenizer else None
    path = output.work / "tokenizer" / (given.name if given else f"{model_name(args)}_bpe.model")
    if not path.is_file():
        check_place(output.out / "tokenizers" / path.name, given, args.overwrite)
        if given:
            shards.atomic_write(path, [given.read_bytes()])
        else:
            train_tokenizer(sources, recipe, args.vocab_size, args.tokenizer_bytes, path)
    return prefix + str(path)


def model_name(args: argparse.Namespace) -> str:
    return f"{args.name}_{args.vocab_size}" + shards.CASEFOLD_SUFFIX * args.casefold


def check_place(target: Path, given: Path | None, overwrite: bool) -> None:
    """Refuse to replace another model of the same name."""
    same = given is not None and target.is_file() and shards.sha256_file(target) == shards.sha256_file(given)
    if target.is_file() and not same and not overwrite:
        raise DataError(
            f"{target} exists already: use it with --tokenizer {target}, choose another --name, or replace it with "
            "--overwrite"
        )


def dataset_name(args: argparse.Namespace) -> str:
    if args.tokenizer is None:
        return f"{args.name}_sp{args.vocab_size}" + shards.CASEFOLD_SUFFIX * args.casefold
    return load_tokenizer(shards.CASEFOLD * args.casefold + find_tokenizer(args)).dataset_name(args.name)


def job_identity(args: argparse.Namespace, sources: list[Source], recipe: Recipe) -> dict[str, Any]:
    """Everything that decides what is in the blocks."""
    tokenizer: Any = {"train": args.vocab_size, "bytes": args.tokenizer_bytes}
    if args.tokenizer:
        tokenizer = load_tokenizer(find_tokenizer(args)).describe()["sha256"] or "byte"
    return {
        "inputs": describe_inputs(sources),
        "tokenizer_source": tokenizer,
        "text_field": recipe.text_field,
        "txt_split": args.txt_split,
        "val_fraction": recipe.val_fraction,
        "skip_bad": recipe.skip_bad,
        "block_bytes": args.block_bytes,
        **({"casefold": True} if args.casefold else {}),
    }


def is_complete(output: Output, signature: str, overwrite: bool) -> bool:
    """Whether this very dataset is there already; another one of its name is an error, or loses its manifest."""
    manifest = shards.read_manifest(output.folder)
    if manifest is None:
        return False
    if overwrite:
        (output.folder / shards.MANIFEST).unlink()
        return False
    if manifest["source"].get("job") != signature:
        raise DataError(
            f"{output.folder} holds a complete dataset made from other inputs or settings: choose another --name, or "
            "replace it with --overwrite"
        )
    shards.verify_dataset(output.folder, manifest)
    print(f"{shards.shown(output.folder)} is complete, its shards are verified")
    shards.print_summary(output.folder, manifest, output.out)
    return True


def list_sources(args: argparse.Namespace) -> list[Source]:
    train = make_sources(find_files(args.train), "train" if args.val else "hash", args.txt_split)
    sources = train + make_sources(find_files(args.val), "val", args.txt_split)
    return [Source(index, source.kind, source.split, source.files) for index, source in enumerate(sources)]


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    output = Output(args.out, args.name, dataset_name(args), args.shard_tokens, args.dedup)
    if args.merge:
        return merge_parts(output, args.overwrite)
    sources = list_sources(args)
    fraction = 0.0 if args.val else 0.01 if args.val_fraction is None else args.val_fraction
    recipe = Recipe(args.text_field, fraction, args.skip_bad, "", args.casefold)
    identity = job_identity(args, sources, recipe)
    if is_complete(output, job_signature(identity, output), args.overwrite):
        return None
    known = claim_folder(output.work, identity, len(sources), args.overwrite)
    spec = prepare_tokenizer(args, output, sources, recipe)
    job = Job(output.work, sources, replace(recipe, tokenizer=spec), args.block_bytes)
    encode(job, parse_part(args.part, len(sources)), args.workers)
    if args.part:
        return print(f"part {args.part} is done: bring all parts' {shards.shown(output.work)} together, then --merge")
    return merge(output, known, spec)


def merge_parts(output: Output, overwrite: bool) -> None:
    """The last step after --part: everything that is needed lies in the work folder."""
    known = shards.read_json(output.work / "job.json")
    if known is None:
        raise DataError(f"{output.work} holds no work to merge: run the parts first, with the same --name and --out")
    if not is_complete(output, job_signature(known["identity"], output), overwrite):
        models = sorted((output.work / "tokenizer").glob("*.model"))
        prefix = shards.CASEFOLD * known["identity"].get("casefold", False)
        merge(output, known, prefix + (str(models[0]) if models else "byte"))


def main(arguments: list[str] | None = None) -> None:
    run(build_parser().parse_args(arguments))


if __name__ == "__main__":
    shards.run_tool(main)
