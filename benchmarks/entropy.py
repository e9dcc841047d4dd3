"""Bits per weight of an artifact's trits and small integers by general compressors, by an ideal order-0 coder, by ours.

    python benchmarks/entropy.py [--contexts] runs/RUN_ID/model.pgz...

With --contexts instead: what else our coder could go by (tensor, role, scales, neighbours, other orders of rows), and
the share of the stream that it would save. Adaptive code lengths of sizes in each context of ours times what is tried,
by counts that begin as those of the whole stream; signs are alike in all.

The order-0 row is -sum log2 p of each tensor's own frequencies and 16 bits for each of them but one: what a perfect
arithmetic coder for one distribution a tensor takes. `lrzip -z` takes part where the program is installed, zstd where
the package zstandard is. One thread each; every coder's output is expanded again and compared.
"""

import argparse
import lzma
import math
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def lrzip(words: list[str]) -> Callable[[bytes], bytes]:
    """A pass through the program lrzip."""
    return lambda data: subprocess.run(["lrzip", *words, "-Q", "-p", "1"], input=data, capture_output=True).stdout


def general_coders() -> dict[str, Coder]:
    """Compressors of bytes that are there."""
    coders: dict[str, Coder] = {
        "lzma 9e": (lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME), lzma.decompress)
    }
    if find_spec("brotli"):
        import brotli

        coders["brotli 11"] = (lambda d: brotli.compress(d, quality=11, lgwin=24), brotli.decompress)
    if find_spec("zstandard"):
        import zstandard

        coders["zstd 22"] = (zstandard.ZstdCompressor(22).compress, zstandard.ZstdDecompressor().decompress)
    if shutil.which("lrzip"):
        coders["lrzip -z"] = (lrzip(["-z", "-T"]), lrzip(["-d"]))  # -T: also what lz4 cannot shorten
    return coders


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, list[list[int]]]]:
    """Values and tensor shapes of each stream of an artifact."""
    header, payload = t.read_header(Path(path).read_bytes())
    h = t.Hyperparameters(**header["config"])
    streams = t.read_streams(header, payload, 2**40, h)
    return streams, t.stream_shapes(header, h, streams.get("rows"))


def order_0_bits(values: np.ndarray, shapes: list[list[int]]) -> float:
    """Of the tensors one after the other."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    bits = 0.0
    for part in np.split(values, ends[:-1]):
        counts = np.bincount(part.astype(np.int64) + 128)
        counts = counts[counts > 0]
        bits += float(-(counts * np.log2(counts / part.size)).sum()) + 16 * (counts.size - 1)
    return bits


def timed(work: Callable[[], bytes]) -> tuple[bytes, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def rows_of(kind: str, values: np.ndarray, shapes: list[list[int]]) -> list[tuple[str, float, float, float]]:
    """(way, bits per weight, seconds to encode, seconds to decode), the longest first."""
    rows = [("order 0, ideal", order_0_bits(values, shapes) / values.size, np.nan, np.nan)]
    packed = {name: t.PACKINGS[name][0](values) for name in t.STREAM_PACKINGS[kind]}
    for packing, raw in packed.items():
        for name, (pack, unpack) in general_coders().items():
            data, slow = timed(lambda pack=pack, raw=raw: pack(raw))  # type: ignore[misc]
            back, fast = timed(lambda unpack=unpack, data=data: unpack(data))  # type: ignore[misc]
            assert back == raw, name
            rows.append((f"{packing} + {name}", 8 * len(data) / values.size, slow, fast))
    data, slow = timed(lambda: t.pack_context(values, shapes))
    back, fast = timed(lambda: t.unpack_context(data, values.size, shapes, 128).tobytes())
    assert back == values.tobytes()
    form = (data[0], data[1], data[2], int.from_bytes(data[3:5], "little"))
    own = t.code_length(t.spans_of([t.gather(values, grid) for grid in t.grids(shapes)], form))
    rows.append((f"ours, {8 * len(data) / own - 1:.3%} above its model", 8 * len(data) / values.size, slow, fast))
    return sorted(rows, key=lambda row: -row[1])


class Part(NamedTuple):
    """One tensor of a stream: codes (rows, columns) and scales (rows, groups) of its rows that are not all zeros."""

    name: str
    codes: np.ndarray
    scales: np.ndarray

    def spread(self, marks: np.ndarray) -> np.ndarray:
        """Marks of groups, for each value."""
        return np.repeat(marks, -(-self.codes.shape[1] // marks.shape[1]), 1)[:, : self.codes.shape[1]]


def parts_of(path: str, kind: str) -> list[Part]:
    """The tensors of one kind of stream."""
    header, payload = t.read_header(Path(path).read_bytes())
    h = t.Hyperparameters(**header["config"])
    streams, used, found = t.read_streams(header, payload, 2**40, h), dict[str, int](), []
    for name, codec_name, *shape in header["tensors"]:
        codec, count = t.CODECS[codec_name](h), int(np.prod(shape[:-1]))
        live = int((t.take(streams, used, "rows", count) > 0).sum()) if "rows" in streams else count
        codes = t.take(streams, used, codec.stream, live * shape[-1]).reshape(live, shape[-1])
        groups = (codec.scale_shape(shape) or (0,))[-1]
        scales = t.take(streams, used, "scales", live * groups).reshape(live, groups).astype(np.uint32) << 16
        if codec.stream == kind and live:
            found.append(Part(name, codes, scales.view(np.float32)))
    return found


def our_contexts(values: np.ndarray, shapes: list[list[int]]) -> tuple[np.ndarray, float]:
    """The context of each value, and what it takes in them, bits, under the best mix of rows and columns."""
    packed = t.pack_context(values, shapes)
    form = (packed[0], packed[1], packed[2], int.from_bytes(packed[3:5], "little"))
    model, found, bits = t.Frequencies(2 * form[0] + 1), np.empty(values.size, np.int64), 0.0
    for grid in t.grids(shapes):
        sheet, steps = t.gather(values, grid), list[np.ndarray]()

        def step(context: np.ndarray, seen: np.ndarray, steps: list[np.ndarray] = steps) -> np.ndarray:
            steps.append(context)
            index = context * (2 * form[0] + 1) + seen + form[0]
            steps.append(np.log2(65536 / (model.starts[index + 1] - model.starts[index])))
            return index

        t.walk(sheet, form, model, step)
        rows, columns = sheet.shape
        place = [np.arange(max(0, i - rows + 1), min(columns, i + 1)) for i in range(rows + columns - 1)]
        laid = np.empty(sheet.size, np.int64)
        for i, lanes in enumerate(place):
            laid[(i - lanes) * columns + lanes] = steps[2 * i]
        at = 0
        for part in grid[2]:
            found[part] = laid[at : at + part.stop - part.start]
            at += part.stop - part.start
        bits += sum(float(part.sum()) for part in steps[1::2])
    return found, bits


def adaptive_bits(sizes: np.ndarray, contexts: np.ndarray) -> float:
    """Of sizes by counts in each context that begin with 64 values shared out as in the whole."""
    number = np.unique(contexts, return_inverse=True)[1]
    counts = np.zeros((number.max() + 1, int(sizes.max()) + 1))
    np.add.at(counts, (number, sizes), 1)
    first = 64 * (counts.sum(0) + 1) / (counts.sum() + counts.shape[1])
    each = gammaln(first) - gammaln(counts + first)
    whole = gammaln(counts.sum(1) + first.sum()) - gammaln(first.sum())
    return float(each.sum() + whole.sum()) / np.log(2) + float((sizes > 0).sum())


def tried_contexts(parts: list[Part]) -> dict[str, np.ndarray]:
    """Numbers for each value that might tell its size, by name."""
    found: dict[str, list[np.ndarray]] = {}
    before: dict[str, np.ndarray] = {}
    for i, part in enumerate(parts):
        size, scale = np.abs(part.codes.astype(np.int64)), np.log(np.maximum(part.scales, 1e-30))
        role, one = part.name.split(".", 2)[-1], np.zeros(part.codes.shape, np.int64)
        above = before.get(role, size[:0])
        tries = {
            "role": one + zlib.crc32(role.encode()), "tensor": one + i,
            "scale in its tensor": eighths(scale - np.median(scale), part),
            "scale in its row": eighths(scale - np.median(scale, 1, keepdims=True), part),
            "scale in its column": eighths(scale - np.median(scale, 0), part),
            "value to the left": np.pad(size, ((0, 0), (1, 0)))[:, :-1],
            "value above": np.pad(size, ((1, 0), (0, 0)))[:-1],
            "the layer before's": 1 + above if above.shape == size.shape else one,
        }  # fmt: skip
        before[role] = size
        for name, values in tries.items():
            found.setdefault(name, []).append(values.reshape(-1))
    return {name: np.concatenate(values) for name, values in found.items()}


def eighths(values: np.ndarray, part: Part) -> np.ndarray:
    """In which of eight equal shares of a tensor's groups each weight's is."""
    return part.spread(np.searchsorted(np.quantile(values, np.arange(1, 8) / 8), values))


def row_orders(part: Part) -> dict[str, np.ndarray]:
    """Orders of a tensor's rows by name."""
    size = np.abs(part.codes.astype(np.float32))
    alike = np.linalg.svd(size - size.mean(0), full_matrices=False)[0][:, 0]
    keys = {"scale": part.scales.mean(1), "mean size": size.mean(1), "likeness": alike}
    return {name: np.argsort(key, kind="stable") for name, key in keys.items()}


def context_lines(parts: list[Part]) -> Iterator[str]:
    """A table of what contexts and orders of rows save."""
    values, shapes = np.concatenate([part.codes.reshape(-1) for part in parts]), [[*part.codes.shape] for part in parts]
    sizes, (ours, bits) = np.abs(values.astype(np.int64)), our_contexts(values, shapes)
    base, alone = adaptive_bits(sizes, ours), adaptive_bits(sizes, 0 * ours)
    yield f"| ours | {bits / values.size:.5f} | |"
    yield f"| none | {alone / values.size:.5f} | {1 - alone / base:+.3%} |"
    for name, tried in tried_contexts(parts).items():
        length = adaptive_bits(sizes, ours * 2**32 + tried)
        yield f"| ours and {name} | {length / values.size:.5f} | {1 - length / base:+.3%} |"
    cost = sum(math.lgamma(len(part.codes) + 1) for part in parts) / math.log(2)
    for name in row_orders(parts[0]):
        rows = [part.codes[row_orders(part)[name]].reshape(-1) for part in parts]
        length, told = our_contexts(np.concatenate(rows), shapes)[1], 0.0 if name == "scale" else cost
        kept = f" before its order is told, which takes {told / bits:.3%}" * (told > 0)
        yield f"| rows by {name} | {length / values.size:.5f} | {1 - length / bits:+.3%}{kept} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--contexts", action="store_true")
    options = parser.parse_args()
    for path in options.paths:
        streams, shapes = read(path)
        for kind in (kind for kind in ("trits", *t.INT_CODECS) if kind in streams):
            values = streams[kind]
            print(f"{path}: {kind}, {values.size:,} weights, {np.mean(values == 0):.1%} of them zero\n")
            if options.contexts:
                print(
                    "| contexts | bits per weight | saved |\n|---|---|---|",
                    *context_lines(parts_of(path, kind)),
                    sep="\n",
                )
            else:
                print("| way | bits per weight | encode, s | decode, s |\n|---|---|---|---|")
                for name, bits, slow, fast in rows_of(kind, values, shapes[kind]):
                    print(f"| {name} | {bits:.4f} | {slow:.2f} | {fast:.2f} |")
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
