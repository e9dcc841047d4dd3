"""ARTIFACT: the file holds exactly the model's weights; damaged and hostile files give one clear error."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import lzma
import math
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

TINY = {"PRESET": "tiny", "VOCAB_SIZE": "256", "DEVICE": "cpu", "COMPILE": "0"}
TABLES = {"BIGRAM_HASH_BUCKETS": "100", "BIGRAM_HASH_DIM": "16"}
PRINTS = {"data": "d" * 64, "tokenizer": t.ByteTokenizer().fingerprint}
ALLOCATION_LIMIT = 200 * 2**20  # bytes that reading a small file may hold at any time
SECONDS_LIMIT = 5.0


def trained_like(h: t.Hyperparameters) -> tuple[t.GPT, t.Weights]:
    """A model whose latents are all random (fresh ones have zero matrices), quantized as training leaves them."""
    model = t.build_model(h, t.start_runtime(h), 255)
    weights = t.Weights(model)
    generator = torch.Generator().manual_seed(1)
    for bank in weights.banks.values():
        bank.latent.copy_(torch.randn(bank.latent.shape, generator=generator))
    weights.materialize(1.0)
    return model, weights


def export(environ: dict[str, str]) -> tuple[t.Hyperparameters, t.GPT, t.Artifact]:
    h = t.load_config({**TINY, **environ})
    model, weights = trained_like(h)
    return h, model, t.write_artifact(h, t.coded_tensors(weights), PRINTS)


@functools.cache
def tiny_file() -> bytes:
    """The tiny ternary model's file."""
    return export({})[2].data


@pytest.fixture
def artifact() -> bytes:
    return tiny_file()


def bits(values: Any) -> bytes:
    return np.ascontiguousarray(values, np.float32).tobytes()


# ---- what is written is what is read ----

CONFIGS: list[dict[str, str]] = [
    *({"MATRIX_CODEC": name, "FP_STORAGE": name} for name in t.CODECS),
    *({"SCALAR_CODEC": name} for name in t.CODECS),
    {"GROUP_SIZE": "7", "TERNARY_SCALE": "lstsq", "EMBED_DIM": "12", "FP_STORAGE": "fp8"},
    {"TIE_EMBEDDINGS": "0", "MLP_ACT": "swiglu", "VALUE_RESIDUAL": "1", "NUM_LAYERS": "3", "MODEL_DIM": "24"},
    {"UNTIE_AT_FRACTION": "0.5", "RESIDUAL": "plain", "RESID_MIX": "0", "GROUP_SIZE": "100000"},
    {"PRECISION": "fp64", "MATRIX_CODEC": "int6"},
    {"BIGRAM_HASH_BUCKETS": "50", "BIGRAM_HASH_ORDERS": "2,3", "BIGRAM_HASH_DIM": "6", "FP_STORAGE": "int4"},
]


@pytest.mark.parametrize("environ", CONFIGS, ids=str)
def test_file_holds_the_models_weights_bit_for_bit(environ: dict[str, str]) -> None:
    h, model, artifact = export(environ)
    header, weights = t.decode_artifact(artifact.data)
    parameters = dict(model.named_parameters())
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        assert weights[name].dtype == np.float32 and weights[name].shape == tuple(parameter.shape)
        assert bits(weights[name]) == bits(parameter.detach()), name
    again = t.build_model(h, t.start_runtime(h), 255)
    t.load_weights(again, weights)
    assert all(torch.equal(p, parameters[name]) for name, p in again.named_parameters())
    assert header["prints"] == PRINTS
    rebuilt = t.load_config({"DEVICE": "cpu"}, {**header["config"], "train_batch_tokens": 32, "micro_batch_tokens": 32})
    assert t.structure_config(rebuilt) == t.structure_config(h)


def test_tables_that_hardly_any_ngram_has_met_can_be_read_back() -> None:
    """Twelve million zeros take some kilobytes: the bound on what a file may unfold to must know of tables."""
    h = t.load_config({**TINY, "BIGRAM_HASH_BUCKETS": "200000", "BIGRAM_HASH_DIM": "60"})
    artifact = t.write_artifact(h, t.coded_tensors(t.Weights(t.build_model(h, t.start_runtime(h), 255))), PRINTS)
    assert len(artifact.data) < 60_000
    _, weights = t.decode_artifact(artifact.data)
    assert weights["embed.ngrams.weight"].shape == (200_000, 60)


def test_header_rebuilds_the_network_alone() -> None:
    """Every field that changes a parameter's name or shape, or the function they compute, is in the file or a default.

    So these defaults stay, or a new version in the header tells files by the old ones: the sum is of all of them.
    """
    groups = ("model", "nsa", "rmt", "skc", "topology", "weights")
    fields = {s.name for s in t.FIELDS.values() if s.metadata["group"] in groups}
    assert fields - set(t.structure_fields()) == {"attn_impl", "nsa_impl", "nsa_strict", "grad_checkpoint"}
    assert set(t.structure_fields()) - fields == {"vocab_size", "train_seq_len"}
    h = t.load_config(TINY)
    kept, values = opened(tiny_file())[0]["config"], dataclasses.asdict(h)
    assert kept == {n: values[n] for n in t.structure_fields() if values[n] != t.FIELDS[n.upper()].default}
    defaults = {n: t.FIELDS[n.upper()].default for n in sorted(t.structure_fields())}
    assert zlib.crc32(json.dumps(defaults).encode()) == 4086957913


def test_same_weights_give_the_same_bytes() -> None:
    first, second = export({"FP_STORAGE": "fp8"})[2], export({"FP_STORAGE": "fp8"})[2]
    assert first.data == second.data
    assert export({"FP_STORAGE": "fp8", "SEED": "7", "DATA_PATH": "elsewhere", "MATRIX_LR": "9"})[2].data == first.data


def test_table_accounts_for_every_byte() -> None:
    _, model, artifact = export({})
    assert sum(row[-1] for row in artifact.table) == len(artifact.data)
    counts = {row[0]: row[3] for row in artifact.table}
    values = sum(count for kind, count in counts.items() if kind not in ("scales", "header"))
    assert values == sum(p.numel() for p in model.parameters())
    assert all(
        stored <= packed + 4 for *_, packed, stored in artifact.table[:-1]
    )  # a chunk's length, else never longer


def test_packed_bound_holds_before_compression() -> None:
    h = t.load_config(TINY)
    _, weights = trained_like(h)
    artifact = t.write_artifact(h, t.coded_tensors(weights), PRINTS)
    packed = {row[0]: row[4] for row in artifact.table if row[0] != "header" and row[1] != "bitmask"}
    assert sum(packed.values()) <= math.ceil(sum(weights.packed_bytes().values())) + len(packed)


def naive_context(data: bytes, shapes: list[list[int]]) -> list[int]:
    """Values of a context-coded stream, one after the other in plain Python numbers."""
    top, by_column, by_row = data[:3]
    mean, symbols, unit = int.from_bytes(data[3:5], "little"), 2 * top + 1, 2**20 // max(top, 1)
    count, sheets = sum(map(math.prod, shapes)), {}
    for at, shape in zip(np.cumsum([0, *map(math.prod, shapes)]).tolist(), shapes, strict=False):
        tall = sum(math.prod(other[:-1]) for other in shapes if other[-1] == shape[-1])
        width = shape[-1] if tall >= 64 and shape[-1] >= 64 else 0
        sheets.setdefault(width, []).extend(range(at, at + math.prod(shape)))
    lanes = max(8, count // 2**16)
    states = [int.from_bytes(data[5 + 5 * i : 10 + 5 * i], "little") for i in range(lanes)]
    words = iter(np.frombuffer(data, "<u2", -1, 5 + 5 * lanes).tolist())
    counts, values = [[0] * symbols for _ in range(32)], [0] * count
    met: list[tuple[int, int]] = []
    spans: list[list[int]] = []

    def log16(n: int) -> int:
        return ((n + 1) ** 16).bit_length()

    def table() -> list[list[int]]:
        while met:
            context, symbol = met.pop()
            counts[context][symbol] += 1
        both = [[a + b for a, b in zip(row, row[::-1], strict=True)] for row in counts]
        whole = [1 + sum(column) for column in zip(*both, strict=True)]
        prior = [1024 * w // sum(whole) for w in whole]
        weights = [[16 * n + p for n, p in zip(row, prior, strict=True)] for row in both]
        spans = [[1 + w * (2**16 - symbols) // sum(row) for w in row] for row in weights]
        for row in spans:
            row[top] += 2**16 - sum(row)
        return spans

    for width, places in sheets.items():
        columns = width or max(2, min(64, math.isqrt(len(places))))
        rows = -(-len(places) // columns)
        above, left = [mean << 8] * columns, [mean << 8] * rows
        for step in range(rows + columns - 1):
            spans = table() if step % 8 == 0 else spans
            for i, column in enumerate(range(max(0, step - rows + 1), min(columns, step + 1))):
                row, lane = step - column, i % lanes
                logs = by_column * log16(above[column] >> 8) + by_row * log16(left[row] >> 8)
                context = (logs - (by_column + by_row) * log16(mean) + 32) >> 1
                context = min(max(context, 0), 31)
                symbol, start, slot = 0, 0, states[lane] % 2**16
                while slot >= start + spans[context][symbol]:
                    start, symbol = start + spans[context][symbol], symbol + 1
                states[lane] = (states[lane] >> 16) * spans[context][symbol] + slot - start
                if states[lane] < 2**24:
                    states[lane] = states[lane] << 16 | next(words)
                met.append((context, symbol))
                size = abs(symbol - top) * unit
                left[row] += (size - left[row]) >> 5
                above[column] += (size - above[column]) >> 6
                if row * columns + column < len(places):
                    values[places[row * columns + column]] = symbol - top
    assert next(words, None) is None and states == [2**24] * lanes
    return values


def naive_reader(data: bytes) -> dict[str, np.ndarray]:
    """The container as another program would read it: standard library, numpy, brotli, zstandard, nothing of ours."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**24, "lc": 0, "pb": 0}]
    zstd = zstandard.ZstdDecompressor()
    expand = {"none": bytes, "brotli": brotli.decompress, "zstd": lambda b: zstd.decompress(b, max_output_size=2**24)}
    expand["lzma"] = lambda b: lzma.decompress(b, lzma.FORMAT_RAW, filters=filters)
    assert data[:4] == b"PGZ1" and zlib.crc32(data[8:]) == int.from_bytes(data[4:8], "little")
    size = int.from_bytes(data[8:12], "little")
    header, at, streams = json.loads(expand["lzma"](data[12 : 12 + size])), 12 + size, {}
    types = {
        "rows": "i1",
        **{f"int{k}": "i1" for k in range(4, 9)},
        "bytes": "u1",
        "scales": "<u2",
        "halves": "<u2",
        "floats": "<f4",
    }
    for kind, packing, tool, count, _, stored in header["streams"]:
        end, chunks = at + stored, [b""]
        at = end if packing == "context" else at
        while at < end:
            size = int.from_bytes(data[at : at + 4], "little")
            chunks.append(expand[tool](data[at + 4 : at + 4 + size]))
            at += 4 + size
        raw = np.frombuffer(b"".join(chunks), np.uint8)
        if packing == "context":
            marks, shapes = iter(streams.get("rows", itertools.repeat(1))), []
            for _, codec, *shape in header["tensors"]:
                live = sum(next(marks) > 0 for _ in range(math.prod(shape[:-1])))
                shapes += [[live, shape[-1]]] if {"ternary": "trits"}.get(codec, codec) == kind and live else []
            streams[kind] = np.array(naive_context(data[at - stored : at], shapes))
        elif packing == "base3":
            streams[kind] = np.array([int(byte) // 3**i % 3 - 1 for byte in raw for i in range(5)][:count])
        elif packing == "bitmask":
            mask = np.unpackbits(raw)[:count]
            signs = iter(np.unpackbits(raw[-(-count // 8) :]).tolist())
            streams[kind] = np.array([2 * next(signs) - 1 if bit else 0 for bit in mask])
        elif packing == "signs":
            streams[kind] = np.unpackbits(raw)[:count].astype(np.int8) * 2 - 1
        elif packing == "nibbles":
            streams[kind] = np.array([half for byte in raw for half in (byte & 15, byte >> 4)][:count])
        else:
            wide = np.dtype(types[kind]).itemsize
            streams[kind] = np.ascontiguousarray(raw.reshape(wide, count).T).view(types[kind])[:, 0]
    used, weights = dict.fromkeys([*streams, *types, "trits"], 0), {}
    streams = {**dict.fromkeys(used, np.zeros(0, np.int64)), **streams}

    def take(kind: str, count: int) -> np.ndarray:
        used[kind] += count
        return streams[kind][used[kind] - count : used[kind]]

    def take_rows(kind: str, live: np.ndarray, columns: int) -> np.ndarray:
        values = np.zeros((live.size, columns), types.get(kind, "i8"))
        values[live] = take(kind, int(live.sum()) * columns).reshape(-1, columns)
        return values

    for name, codec, *shape in header["tensors"]:
        count, columns = math.prod(shape), shape[-1]
        live = take("rows", count // columns) > 0 if streams["rows"].size else np.ones(count // columns, bool)
        if codec == "exact":
            weights[name] = take_rows("floats", live, columns).reshape(shape)
        elif codec == "bf16":
            weights[name] = (take_rows("halves", live, columns).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        elif codec == "fp16":
            weights[name] = take_rows("halves", live, columns).view(np.float16).astype(np.float32).reshape(shape)
        else:
            group = columns if codec == "fp8" else header["config"]["group_size"]
            groups = -(-columns // group)
            kind = {"fp8": "bytes", "ternary": "trits", "binary": "signs", "fp4": "fours"}.get(codec, codec)
            codes = take_rows(kind, live, columns)
            scales = (take_rows("scales", live, groups).astype(np.uint32) << 16).view(np.float32)
            if codec == "fp8":
                values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
            elif codec == "fp4":  # sign, two bits of exponent, one of mantissa
                sizes = [0, 0.5] + [2.0 ** (e - 1) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1)]
                values = np.array([*sizes, *(-x for x in sizes)], np.float32)[codes]
            else:
                values = codes.astype(np.float32)
            spread = np.stack([scales[:, j // group] for j in range(columns)], 1)
            weights[name] = (values * spread).reshape(shape)
    assert at == len(data) and all(used[kind] == len(stream) for kind, stream in streams.items())
    return weights


def half_empty(environ: dict[str, str]) -> tuple[t.Hyperparameters, t.GPT, t.Artifact]:
    """Like export, with two of three rows all zeros in every second tensor, and some tensors all zeros."""
    h = t.load_config({**TINY, **environ})
    model, weights = trained_like(h)
    for i, name in enumerate(sorted(weights.where)):
        bank, at = weights.where[name]
        if i % 2 and bank.latent.ndim > 2:
            bank.latent[at][torch.arange(bank.latent.shape[1]) % 3 > 0] = 0
        if i % 6 == 1:
            bank.latent[at] = 0
    weights.materialize(1.0)
    return h, model, t.write_artifact(h, t.coded_tensors(weights), PRINTS)


@pytest.mark.parametrize("environ", CONFIGS, ids=str)
def test_rows_of_zeros_are_left_out_and_come_back(environ: dict[str, str]) -> None:
    """By our reader and another one; binary codes, which have no zero, are all there."""
    _, model, artifact = half_empty({**environ, **TABLES, "MODEL_DIM": "64", "NUM_HEADS": "2"})
    parameters = {name: bits(p.detach()) for name, p in model.named_parameters()}
    _, weights = t.decode_artifact(artifact.data)
    assert {name: bits(w) for name, w in weights.items()} == parameters
    assert {name: bits(w) for name, w in naive_reader(artifact.data).items()} == parameters
    counts = {row[0]: row[3] for row in artifact.table if row[0] not in ("scales", "header")}
    zeros = sum(1 for p in model.parameters() for row in p.detach().view(-1, p.shape[-1]) if not row.any())
    assert counts.pop("rows") == sum(p[..., 0].numel() for p in model.parameters()) and zeros > 100
    assert sum(counts.values()) < sum(p.numel() for p in model.parameters())


def test_negative_zeros_are_no_zeros() -> None:
    """Their sign is a bit of the weight."""
    w = np.array([[0.0, 0.0], [0.0, -0.0], [1.0, 0.0]], np.float32)
    h = t.load_config({**TINY, "NUM_LAYERS": "1"})
    assert t.live_rows(w).tolist() == [False, True, True]
    data = t.write_artifact(h, iter([t.Coded("a", "exact", w, None)]), PRINTS).data
    assert bits(t.decode_artifact(data)[1]["a"]) == bits(w)


def test_rows_of_zeros_cost_what_their_marks_do() -> None:
    """Small integers in rows of 32, a tenth of the rows zeros, as in tables that n-grams have half filled."""
    h = t.load_config({**TINY, "INT_GROUP": "0", "FP_STORAGE": "int7", "BIGRAM_HASH_BUCKETS": "20000"})
    rng = np.random.default_rng(0)
    live = rng.random(20_000) > 0.1
    codes = np.rint(rng.standard_normal((20_000, 32)) * 5).clip(-63, 63).astype(np.int8) * live[:, None]
    scales = np.ones((20_000, 1), np.float32)
    whole, rest = (
        t.write_artifact(h, iter([t.Coded("a", "int7", *part)]), PRINTS)
        for part in ((codes, scales), (codes[live], scales[live]))
    )
    share = live.mean()
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * live.size / 8
    assert [row[1] for row in whole.table if row[0] == "int7"] == ["context"]
    assert len(whole.data) - len(rest.data) < 1.1 * entropy + 60


@pytest.mark.parametrize("environ", CONFIGS[::3], ids=str)
def test_another_program_can_read_it(environ: dict[str, str]) -> None:
    _, model, artifact = export(environ)
    weights = naive_reader(artifact.data)
    assert all(bits(weights[name]) == bits(p.detach()) for name, p in model.named_parameters())


@pytest.mark.parametrize("chunk", [2**22, 4096], ids=["one chunk", "many chunks"])
def test_shortest_way_to_store_a_stream_is_chosen(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is best left alone, trits are coded by context; without that even ones are packed five a byte, sparse ones
    by a mask."""
    monkeypatch.setattr(t, "CHUNK_BYTES", chunk)
    rng, winners = np.random.default_rng(0), []
    even, sparse = (
        rng.choice(np.array([-1, 0, 1], np.int8), 40000, p=p) for p in ([0.4, 0.2, 0.4], [0.02, 0.96, 0.02])
    )
    for kind, values in (("bytes", rng.integers(0, 256, 20000, np.uint8)), ("trits", even), ("trits", sparse)):
        sizes = {}
        for packing in t.STREAM_PACKINGS[kind]:
            packed = t.PACKINGS[packing][0](values)
            pieces = [packed[at : at + chunk] for at in range(0, len(packed), chunk)]
            for tool in t.COMPRESSORS:
                sizes[packing, tool] = sum(4 + len(t.COMPRESSORS[tool][0](piece, kind)) for piece in pieces)
        if kind == "trits":
            sizes["context", "none"] = len(t.pack_context(values, [[200, 200]]))
        packing, tool, _, stored = t.compress_best(kind, values, [[200, 200]])
        assert len(stored) == sizes[packing, tool] == min(sizes.values()), sizes
        winners.append((packing, tool))
    assert winners == [("planes", "none"), ("context", "none"), ("context", "none")]
    monkeypatch.setattr(t, "CONTEXT_STREAMS", {})
    assert [t.compress_best("trits", values, [])[0] for values in (even, sparse)] == ["base3", "bitmask"]


def test_long_streams_are_stored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "CHUNK_BYTES", 512)
    monkeypatch.setattr(t, "CONTEXT_STREAMS", {})
    rng = np.random.default_rng(0)
    for kind, values in {
        "trits": rng.choice(np.array([-1, 0, 1], np.int8), 20000, p=[0.02, 0.96, 0.02]),
        "floats": rng.standard_normal(20000).astype("<f4"),
        "int4": rng.integers(-5, 6, 20001).astype(np.int8),
    }.items():
        packing, tool, packed, stored = t.compress_best(kind, values, [])
        raw = t.expand_chunks(tool, stored, packed)
        assert t.PACKINGS[packing][1](raw, values.size, t.STREAM_TYPES[kind]).tolist() == values.tolist()
        assert len(stored) <= packed + 4 * -(-packed // 512), "at most the lengths of the chunks are added"
        if kind == "trits":
            assert len(stored) <= min(len(t.pack_base3(values)), len(t.pack_bitmask(values)))
        for wrong in (stored[:-1], stored + b"\0", stored[4:], b""):
            with pytest.raises((ValueError, lzma.LZMAError)):
                t.expand_chunks(tool, wrong, packed)


def test_load_refuses_other_tensors() -> None:
    h, model, artifact = export({})
    _, weights = t.decode_artifact(artifact.data)
    for change in ({"extra": np.zeros(3, np.float32)}, {"embed.weight": np.zeros((256, 31), np.float32)}):
        with pytest.raises(t.UserError, match="do not fit the network"):
            t.load_weights(model, {**weights, **change})
    weights.pop("embed.weight")
    with pytest.raises(t.UserError, match="embed.weight"):
        t.load_weights(model, weights)


# ---- our coder of small integers ----


def measured_values(rng: np.random.Generator, shapes: list[list[int]], top: int, zeros: float) -> np.ndarray:
    """Integers whose size depends on the column, as in trained weights, (n,) int8."""
    parts = []
    for shape in shapes:
        width = np.exp(rng.standard_normal(shape[-1])) * top / 3
        part = np.rint(rng.standard_normal(shape) * width).clip(-top, top) * (rng.random(shape) >= zeros)
        parts.append(part.astype(np.int8).reshape(-1))
    return np.concatenate(parts)


SIDES = st.lists(st.sampled_from([1, 2, 3, 7, 63, 64, 65, 130]), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(SIDES.filter(lambda s: math.prod(s) <= 10_000), min_size=1, max_size=5),
    top=st.sampled_from([1, 7, 31, 127]), zeros=st.sampled_from([0.0, 0.5, 0.9]), seed=st.integers(0, 99),
)  # fmt: skip
def test_context_coder_returns_what_it_was_given(shapes: list[list[int]], top: int, zeros: float, seed: int) -> None:
    values = measured_values(np.random.default_rng(seed), shapes, top, zeros)
    data = t.pack_context(values, shapes)
    assert data == t.pack_context(values, shapes)
    assert t.unpack_context(data, values.size, shapes, 128).tobytes() == values.tobytes()


@pytest.mark.parametrize("fill", [0, 1, -1, 127, -127, -128])
@pytest.mark.parametrize("shape", [[1, 300], [300, 1], [40, 70]], ids=str)
def test_context_coder_of_a_single_value(fill: int, shape: list[int]) -> None:
    values = np.full(math.prod(shape), fill, np.int8)
    assert (t.unpack_context(t.pack_context(values, [shape]), values.size, [shape], 128) == fill).all()


@pytest.mark.parametrize("top", [1, 31])
def test_context_coder_reaches_its_models_code_length(top: int) -> None:
    """Within 0.1%, and below what one distribution for all takes, since columns differ."""
    shapes = [[700, 520], [300, 520], [200, 640]]
    values = measured_values(np.random.default_rng(1), shapes, top, 0.2)
    data = t.pack_context(values, shapes)
    form = (data[0], data[1], data[2], int.from_bytes(data[3:5], "little"))
    length = t.code_length(t.spans_of([t.gather(values, grid) for grid in t.grids(shapes)], form))
    share = np.bincount(values.astype(int) + 128) / values.size
    alike = -values.size * (share[share > 0] * np.log2(share[share > 0])).sum()
    assert length <= 8 * len(data) <= 1.001 * length
    assert 8 * len(data) < 0.97 * alike and form[1] > 0


@pytest.mark.parametrize(("top", "excess"), [(1, 1.01), (15, 1.01), (63, 1.05)])
def test_context_coder_takes_streams_of_almost_only_zeros(top: int, excess: float) -> None:
    """99 of 100 values: more than 64 values a byte; near the entropy, though each symbol keeps its least share."""
    rng = np.random.default_rng(2)
    values = (rng.integers(-top, top + 1, 2**19) * (rng.random(2**19) < 0.01)).astype(np.int8)
    share = np.bincount(values.astype(int) + 128) / values.size
    entropy = -values.size * (share[share > 0] * np.log2(share[share > 0])).sum() / 8
    kind = "trits" if top == 1 else "int5" if top == 15 else "int7"
    packing, _, _, stored = t.compress_best(kind, values, [[512, 1024]])
    assert packing == "context" and entropy < len(stored) < excess * entropy + 100
    assert (t.unpack_context(stored, values.size, [[512, 1024]], 128) == values).all()


def test_context_coded_file_is_chosen_and_read_by_another_program() -> None:
    h, model, artifact = export({"MODEL_DIM": "64", "NUM_HEADS": "2"})
    assert [row[1:3] for row in artifact.table if row[0] == "trits"] == [("context", "none")]
    weights = naive_reader(artifact.data)
    assert all(bits(weights[name]) == bits(p.detach()) for name, p in model.named_parameters())


@pytest.mark.parametrize("width", [64, 10**4, 2**19])
def test_context_coded_claims_are_refused_in_proportion_to_the_bytes(width: int) -> None:
    """Few bytes cannot claim many values, and shapes with long diagonals take no longer."""
    rows = 2**25 // width
    with pytest.raises(ValueError):
        t.unpack_context(bytes([1, 0, 0, 0, 8]) + bytes(200), rows * width, [[rows, width]], 1)
    data = bytes([1, 2, 2, 0, 8]) + np.random.default_rng(0).bytes(20_000)
    for shape in ([2**20 // width, width], [2**20]):
        if math.prod(shape):
            began = time.process_time()
            with pytest.raises(ValueError):
                t.unpack_context(data, math.prod(shape), [shape], 1)
            assert time.process_time() - began < SECONDS_LIMIT


# ---- the budget ----


def test_budget_counts_the_reserve_or_the_packaged_script(monkeypatch: pytest.MonkeyPatch) -> None:
    h = t.load_config({**TINY, "CODE_BYTES_RESERVE": "1234", "HARD_BUDGET_BYTES": "5000"})
    budget = t.account(h, 3000)
    assert (budget.model_bytes, budget.code_bytes, budget.total_bytes, budget.budget_bytes) == (3000, 1234, 4234, 5000)
    assert not budget.packaged
    monkeypatch.setattr(t, "PACKAGED", True)
    packaged = t.account(h, 3000)
    assert packaged.packaged and packaged.code_bytes == (ROOT / "train_gpt.py").stat().st_size
    assert packaged.total_bytes == 3000 + packaged.code_bytes


# ---- damaged and hostile files ----


def sealed(body: bytes) -> bytes:
    """A body under a right checksum."""
    return t.ARTIFACT_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[8:12], "little")
    return json.loads(t.lzma_expand(data[12 : 12 + size], 2**24)), data[12 + size :]


def squeezed(tool: str, data: bytes) -> bytes:
    """What the compressor of this name could have made of it, at its fastest setting."""
    if tool == "lzma":
        return lzma.compress(data, lzma.FORMAT_RAW, filters=[{**t.LZMA_FILTERS[0], "preset": 0}])
    if tool == "zstd":
        return zstandard.compress(data, 1)
    return brotli.compress(data, quality=1, lgwin=24) if tool == "brotli" else data


def chunked(tool: str, data: bytes) -> bytes:
    """A stream as the container stores it."""
    parts = [squeezed(tool, data[at : at + t.CHUNK_BYTES]) for at in range(0, len(data), t.CHUNK_BYTES)]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def forged(header: Any, payload: bytes) -> bytes:
    """A file with any header, as JSON or as raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = squeezed("lzma", raw)
    return sealed(len(head).to_bytes(4, "little") + head + payload)


def read_within_limits(data: bytes, read: Callable[[bytes], object] = t.decode_artifact) -> str:
    """Read a file in bounded time and memory; returns what it was refused with, or '' if it was read."""
    began = time.process_time()
    tracemalloc.start()
    try:
        read(data)
        refused = ""
    except t.UserError as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < ALLOCATION_LIMIT, f"{peak / 2**20:.0f} MiB were allocated for {len(data)} bytes"
    assert time.process_time() - began < SECONDS_LIMIT
    assert refused.isprintable(), "a file must not write to the terminal"
    return refused


def test_every_truncation_is_refused(artifact: bytes) -> None:
    for size in [*range(16), *range(16, len(artifact), 100), len(artifact) - 1]:
        with pytest.raises(t.UserError):
            t.decode_artifact(artifact[:size])
    with pytest.raises(t.UserError):
        t.decode_artifact(artifact + b"\0")


def test_every_flipped_bit_is_refused(artifact: bytes) -> None:
    for place in [*range(40), *range(40, len(artifact), 37)]:
        damaged = bytearray(artifact)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(t.UserError):
            t.decode_artifact(bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"PGZ1", b"PGZ1" + bytes(4), b"\x80\x04K\x01.", b"{}", bytes(10**6)])
def test_foreign_file_is_one_line_naming_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pgz"
    path.write_bytes(data)
    with pytest.raises(t.UserError, match=str(path)) as caught:
        t.read_artifact(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pgz", tmp_path):
        with pytest.raises(t.UserError, match=f"{path} cannot be read"):
            t.read_artifact(str(path))


HUGE = 10**30


def replaced(header: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    """A header with one value changed; the path's last part may be new."""
    new = copy.deepcopy(header)
    place = new
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return new


def each(path: list[Any], *values: Any) -> list[tuple[list[Any], Any]]:
    return [(path, value) for value in values]


# (place in the header, value): each must be refused.
HOSTILE: list[tuple[list[Any], Any]] = [
    *each(["version"], 0, 2, None, "1", []),
    *each(["config"], None, [], "x", 3, {}),
    *each(["prints"], None, [], "x"),
    *each(["tensors"], None, {}, "x", 3, [3], [[]], [None], ["abc"], [["a"]], [[]] * 100),
    *each(["streams"], None, {}, "x", 3, [], [3], [[]], [["trits"]]),
    *each(["config", "group_size"], 0, -1, HUGE, 2.5, "x", None, [], True, 1e300, math.nan, 2**30),
    *each(["config", "model_dim"], 0, "x", None, []),
    *each(["config", "num_layers"], 0, 10**8, HUGE),
    *each(["config", "zork"], 1),
    *each(["config", "two\nlines\x1b[2J"], 1),
    *each(["config", "iterations"], 1),
    *each(["calibration"], None, [], "x", 3),
    *each(["calibration", "temperature"], 0.0, -1.0, math.inf, math.nan, 1, "x", None, []),
    *each(["tensors", 0, 0], None, [], {}, 3),
    *each(["tensors", 0, 1], None, [], "zork", "exact", 3),
    *each(["tensors", 0, 2], 0, -1, -2, HUGE, 2**31, 2**62, 2.0, "x", None, [], True, math.nan),
    *each(["tensors", 0], ["embed.weight", "bf16"], ["embed.weight", "bf16", -256, -32]),
    *each(["tensors", 0], ["embed.weight", "bf16", *[1] * 100, 256, 32], ["embed.weight", "bf16", *[9] * 400_000]),
    *each(["tensors", 1, 0], "embed.weight"),
    *each(["streams", 0, 0], None, [], "zork", "floats", "scales", "halves"),
    *each(["streams", 0, 1], None, [], "zork", "planes", "base3 "),
    *each(["streams", 0, 2], None, [], "zork", "zip", 3),
]
for place in (3, 4, 5):
    HOSTILE += each(["streams", 0, place], -1, HUGE, 2**31, 1.5, "x", None, [], math.nan)


@pytest.mark.parametrize("path,value", HOSTILE, ids=lambda x: str(x)[:50])
def test_hostile_header_is_refused(path: list[Any], value: Any, artifact: bytes) -> None:
    header, payload = opened(artifact)
    assert header["tensors"][0][0] == "embed.weight" and header["streams"][0][0] == "trits"
    assert read_within_limits(forged(header, payload)) == "", "the untouched file is read"
    assert read_within_limits(forged(replaced(header, path, value), payload)) != ""


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"[" * 10**6, b'{"a":' * 10**5, b"[[]," * 10**6,
     b"1" * 10**6, b'{"version":1,"config":' + b"[" * 9 * 10**5, b'{"version": 1, "x": "' + b"y" * 2**26 + b'"}'],
    ids=range(14),
)  # fmt: skip
def test_header_that_is_no_header_is_refused(raw: bytes, artifact: bytes) -> None:
    assert read_within_limits(forged(raw, b"")) != ""


@pytest.mark.parametrize("missing", ["config", "prints", "tensors", "streams"])
def test_header_without_a_part_is_refused(missing: str, artifact: bytes) -> None:
    header, payload = opened(artifact)
    del header[missing]
    assert read_within_limits(forged(header, payload)) != ""


def test_header_beyond_its_limit_is_refused(artifact: bytes) -> None:
    """A mebibyte, which no model of ours comes near; JSON of more would unfold to many times that in memory."""
    header, payload = opened(artifact)
    assert read_within_limits(forged({**header, "more": "y" * 2**19}, payload)) == ""
    assert "header cannot be read" in read_within_limits(forged({**header, "more": "y" * 2**20}, payload))


@pytest.mark.parametrize("size", [0, 3, 2**31, 2**32 - 1])
def test_header_length_that_is_none_is_refused(size: int, artifact: bytes) -> None:
    assert read_within_limits(sealed(size.to_bytes(4, "little") + artifact[12:])) != ""


def bomb(
    kind: str, packing: str, tool: str, count: int, packed: int, stored: bytes, tensors: list, group: int
) -> bytes:
    """A small file that claims to hold much."""
    config = {**t.structure_config(t.load_config({**TINY, "NUM_LAYERS": "1"})), "group_size": group}
    rows, payload = [[kind, packing, tool, count, packed, len(stored)]], stored
    if kind == "trits":  # with the scales that its codec asks for
        scales = sum(math.prod(shape[:-1]) * -(-shape[-1] // group) for _, _, *shape in tensors)
        zeros = chunked("brotli", bytes(2 * scales))
        rows, payload = [*rows, ["scales", "planes", "brotli", scales, 2 * scales, len(zeros)]], payload + zeros
    header = {"version": 1, "config": config, "prints": {}, "tensors": tensors, "streams": rows}
    return forged({**header, "calibration": {}}, payload)


@pytest.mark.parametrize("tool", ["lzma", "brotli", "zstd"])
@pytest.mark.parametrize("group", [1, 2**30])
@pytest.mark.parametrize("millions", [3, 16, 30])
def test_decompression_bombs_stay_small(tool: str, group: int, millions: int) -> None:
    """Zeros compress a thousandfold; what a small file may unfold to is bounded before anything is allocated."""
    count = millions * 10**6
    trits, floats = chunked(tool, bytes(count // 5)), chunked(tool, bytes(4 * count))
    for data in (
        bomb("trits", "base3", tool, count, count // 5, trits, [["a", "ternary", count]], group),
        bomb("trits", "base3", tool, count, count // 5, trits, [["a", "ternary", count // 2, 2]], group),
        bomb("floats", "planes", tool, count, 4 * count, floats, [["a", "exact", count]], 1),
    ):
        refused = read_within_limits(data)
        assert refused == "" if millions == 3 else "more weights than its bytes can hold" in refused


def test_few_bytes_of_noise_do_not_pay_for_many_empty_weights() -> None:
    """1 MiB of floats that cannot be compressed, and 128 weights for each of its bytes that can."""
    noise, rows = np.random.default_rng(0).bytes(2**20), 125
    config = {**t.structure_config(t.load_config({**TINY, "NUM_LAYERS": "1"})), "group_size": 2**20}
    trits = chunked("lzma", bytes([121]) * math.ceil(rows * 2**20 / 5))
    scales, floats = chunked("lzma", bytes(2 * rows)), chunked("none", noise)
    streams = [
        ["trits", "base3", "lzma", rows * 2**20, math.ceil(rows * 2**20 / 5), len(trits)],
        ["scales", "planes", "lzma", rows, 2 * rows, len(scales)],
        ["floats", "planes", "none", 2**18, 2**20, len(floats)],
    ]
    header = {"version": 1, "config": config, "prints": {}, "calibration": {}, "streams": streams}
    header["tensors"] = [["a", "ternary", rows, 2**20], ["b", "exact", 2**18]]
    assert "more weights than its bytes can hold" in read_within_limits(forged(header, trits + scales + floats))


def test_claim_of_large_tables_lifts_the_bound_only_so_far() -> None:
    """Tables may be empty, so a file may hold more weights than its bytes tell, but not what any header asks for."""
    trits, tensors = chunked("brotli", bytes(2 * 10**7)), [["a", "ternary", 10**8]]
    header, payload = opened(bomb("trits", "base3", "brotli", 10**8, 2 * 10**7, trits, tensors, 2**30))
    data = forged(replaced(header, ["config", "bigram_hash_buckets"], 10**9), payload)
    assert "more weights than its bytes can hold" in read_within_limits(data)


@pytest.mark.parametrize("count", [3, 2**25], ids=["of three values", "of 32M values"])
def test_stream_larger_than_its_tensors_is_refused_before_it_is_unfolded(count: int) -> None:
    """128 MiB of zeros, claimed truly, beside a tensor of three weights."""
    stored = chunked("brotli", bytes(2**27))
    assert read_within_limits(bomb("floats", "planes", "brotli", count, 2**27, stored, [["a", "exact", 3]], 1)) != ""


@pytest.mark.parametrize("tool", ["lzma", "brotli", "zstd", "none"])
def test_streams_that_unfold_to_another_size_are_refused(tool: str) -> None:
    huge = 2**26 if tool == "none" else 2**27  # not compressed, the file itself is in memory
    for real, claimed in ((16, 16), (huge, 8), (8, 16), (0, 8), (16, 8)):
        tensors = [["a", "exact", claimed // 4]]
        whole = squeezed(tool, bytes(real))  # one chunk, however long
        for stored in (chunked(tool, bytes(real)), len(whole).to_bytes(4, "little") + whole):
            refused = read_within_limits(bomb("floats", "planes", tool, claimed // 4, claimed, stored, tensors, 1))
            assert (refused == "") == (real == claimed), "only what is true is read"
    cut = chunked(tool, np.random.default_rng(0).bytes(4000))[:3000]
    assert read_within_limits(bomb("floats", "planes", tool, 1000, 4000, cut, [["a", "exact", 1000]], 1)) != ""


def test_streams_and_tensors_must_match(artifact: bytes) -> None:
    header, payload = opened(artifact)
    for change in (header["tensors"][:-1], header["tensors"] + [["extra", "exact", 3]], header["tensors"][::-1]):
        data = forged({**header, "tensors": change}, payload)
        if change == header["tensors"][::-1]:  # another order is another model, not a damaged file
            read_within_limits(data)
        else:
            assert read_within_limits(data) != ""
    assert read_within_limits(forged(header, payload + b"\0")) != ""
    twice = [*header["streams"], header["streams"][0]]
    first = payload[: header["streams"][0][-1]]
    assert read_within_limits(forged({**header, "streams": twice}, payload + first)) != ""


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-HUGE, HUGE), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """All paths inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_forged_header_crashes_the_reader(data: st.DataObject) -> None:
    header, payload = opened(tiny_file())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(header)))
        header = replaced(header, list(path), data.draw(JSON_VALUES))
    read_within_limits(forged(header, payload))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_forged_bytes_crash_the_reader(data: st.DataObject) -> None:
    """Bytes changed, left out, put in or moved, under a right checksum."""
    body = bytearray(tiny_file()[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(body) - 1))), len(body) - 1)
        kind = data.draw(st.sampled_from(["set", "flip", "cut", "insert", "drop"]))
        if kind == "set":
            body[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "flip":
            body[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del body[at + 1 :]
        elif kind == "insert":
            body[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del body[at + 1 : at + data.draw(st.integers(2, 50))]
    read_within_limits(sealed(bytes(body)))


@functools.cache
def fuzzed_files() -> list[tuple[bytes, dict[str, bytes]]]:
    """Small real files with their weights: both kinds of codes, one with rows of zeros left out."""
    shape = {"MODEL_DIM": "48", "NUM_HEADS": "2", "NUM_LAYERS": "1"}
    makers = ((export, {"MATRIX_CODEC": "ternary"}), (half_empty, {"MATRIX_CODEC": "int5", **TABLES}))
    files = [make({**shape, **more})[2].data for make, more in makers]
    streams = [{row[0]: row[1] for row in opened(data)[0]["streams"]} for data in files]
    assert streams[0]["trits"] == streams[1]["int5"] == "context" and "rows" in streams[1]
    return [(data, {n: bits(w) for n, w in t.decode_artifact(data)[1].items()}) for data in files]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a cut, an insertion, a piece moved, or a header number changed; mostly with its checksum mended."""
    body, kind = bytearray(data[8:]), int(rng.integers(6))
    at, other = (int(rng.integers(len(body))) for _ in range(2))
    if kind == 0:
        for place in rng.integers(0, len(body), int(rng.integers(1, 9))).tolist():
            body[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del body[at:]
    elif kind == 2:
        body[at:at] = rng.bytes(int(rng.integers(1, 30)))
    elif kind == 3:
        length = int(rng.integers(1, 200))
        body[at : at + length] = body[other : other + length]
    else:
        header, payload = opened(data)
        path = [p for p in places(header) if p[0] in ("tensors", "streams", "config")]
        chosen = list(path[int(rng.integers(len(path)))])
        value = [0, 1, 2, 3, 64, 128, 4096, 2**20, 2**31, -1, 0.5, "x", None, [], "context", "ternary", "int8"]
        return forged(replaced(header, chosen, value[int(rng.integers(len(value)))]), payload)
    return sealed(bytes(body)) if rng.random() < 0.9 else data[:8] + bytes(body)


class Reader:
    """How commands read an artifact: from a path, to a network with its weights."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.path, self.env = folder / "model.pgz", {"DATA_PATH": str(data), "DEVICE": "cpu", "COMPILE": "0"}
        self.weights: dict[str, bytes] = {}

    def __call__(self, data: bytes) -> None:
        self.path.write_bytes(data)
        _, _, model, *_ = t.open_artifact(str(self.path), self.env)
        self.weights = {name: bits(p.detach()) for name, p in model.named_parameters()}

    def command(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The command line refuses the file that was refused, with one line that names it."""
        assert t.main(["eval", str(self.path)], self.env) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and told[:-1].isprintable()


def check_mutations(seed: int, count: int, reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    """A clear error or weights, the same unless stored codes changed under a mended checksum, within bounds."""
    rng, refused = np.random.default_rng(seed), 0
    for i in range(count):
        data, weights = fuzzed_files()[int(rng.integers(2))]
        changed = mutate(data, rng)
        message = read_within_limits(changed, reader)
        refused += message != ""
        if message and i % 10 == 0:
            reader.command(capsys)
        if message == "" and changed[4:8] == data[4:8]:
            assert reader.weights == weights
    assert refused > count // 2


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_are_refused_or_read_within_bounds(
    seed: int, byte_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mutations(seed, 15, Reader(tmp_path, byte_data), capsys)


@pytest.mark.slow  # minutes: what was promised is 10,000
@pytest.mark.parametrize("seed", range(100, 120))
def test_ten_thousand_mutated_files_are_refused_or_read_within_bounds(
    seed: int, byte_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mutations(seed, 500, Reader(tmp_path, byte_data), capsys)


# Configurations that no tensors of the tiny file fit; building such a network first would take all memory, or for ever.
GIANTS = [
    {"model_dim": 2**20},
    {"num_layers": 10**8},
    {"mlp_mult": 1e7},
    {"embed_dim": 2**30},
    {"vocab_size": 65535, "embed_dim": 2**16},
    {"moe_experts": 10**9, "moe_layer_frac": 1.0},
    {"recurrence_layers": "0-100000000000"},
    {"induction_orders": "9" * 400},
]


@pytest.mark.parametrize("change", GIANTS, ids=str)
def test_network_larger_than_its_tensors_is_refused_before_it_is_built(
    change: dict[str, Any], artifact: bytes, byte_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, payload = opened(artifact)
    path = tmp_path / "model.pgz"
    path.write_bytes(forged({**header, "config": {**header["config"], **change}}, payload))

    def build(*_: Any) -> None:
        raise AssertionError("the network was about to be built")

    monkeypatch.setattr(t, "build_model", build)
    with pytest.raises(t.UserError):
        t.open_artifact(str(path), {"DATA_PATH": str(byte_data), "DEVICE": "cpu"})


@pytest.mark.parametrize(
    "change", [{"num_heads": 3}, {"num_kv_heads": 5}, {"layer_pattern": "zork"}, {"model_dim": 33}]
)
def test_network_that_cannot_be_is_one_line(
    change: dict[str, Any], artifact: bytes, byte_data: Path, tmp_path: Path
) -> None:
    header, payload = opened(artifact)
    path = tmp_path / "model.pgz"
    path.write_bytes(forged({**header, "config": {**header["config"], **change}}, payload))
    with pytest.raises(t.UserError) as caught:
        t.open_artifact(str(path), {"DATA_PATH": str(byte_data), "DEVICE": "cpu"})
    assert "\n" not in str(caught.value)


def test_eval_command_refuses_a_damaged_file_in_one_line(
    artifact: bytes, tiny_env: dict[str, str], tmp_path: Path, run_cli: Callable
) -> None:
    path = tmp_path / "model.pgz"
    path.write_bytes(artifact[:-9])
    done = run_cli(["eval", str(path)], {k: v for k, v in tiny_env.items() if k != "PRESET"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(path) in done.stderr


# ---- size ----

EXPORT_75M = """
import resource, sys, time
import numpy as np, torch, train_gpt as t
torch.set_num_threads(2)
h = t.load_config({"PRESET": "ternary", "NUM_LAYERS": "11", "DEVICE": "cpu", "COMPILE": "0"})
rt = t.start_runtime(h)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = t.build_model(h, rt, 1)
weights = t.Weights(model)
generator = torch.Generator().manual_seed(1)
for bank in weights.banks.values():
    for latent in bank.latent:
        latent.copy_(torch.randn(latent.shape, generator=generator))
weights.materialize(1.0)
size = 4 * sum(p.numel() for p in model.parameters())
began = time.process_time()
artifact = t.write_artifact(h, t.coded_tensors(weights), {})
written = time.process_time() - began
header, arrays = t.decode_artifact(artifact.data)
read = time.process_time() - began - written
same = all(np.array_equal(arrays[n], p.detach().numpy()) for n, p in model.named_parameters())
print(size, len(artifact.data), written, read, (peak() - before) / size, int(same))
"""


@pytest.mark.slow  # a minute: the promise of 60 s and four times the weights' memory is made for this size only
def test_export_and_reload_of_75_million_weights() -> None:
    """Seconds of the processor, since others may use the machine: compressors run side by side on two cores."""
    environment = {**clean_environment({"PYTHONPATH": str(ROOT)}), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", EXPORT_75M], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    size, stored, written, read, memory, same = map(float, done.stdout.split())
    print(f"{size / 4e6:.1f}M weights: {stored:.0f} bytes, {written:.1f} s and {read:.1f} s, peak {memory:.2f} x")
    assert size > 4 * 70e6 and same == 1
    assert written + read < 2 * 60 and memory < 4


def test_header_of_a_large_model_is_far_below_its_limit() -> None:
    h = dataclasses.replace(t.load_config({"PRESET": "ternary"}), num_layers=64, value_residual=True)
    names = [f"blocks.{i}.attn.{leaf}" for i in range(h.num_layers) for leaf in ("qkv.weight", "proj.weight", "q_gain")]
    header = {"config": t.structure_config(h), "tensors": [[name, "ternary", 9999, 9999] for name in names * 2]}
    assert len(json.dumps(header)) < t.MAX_HEADER_BYTES / 10
